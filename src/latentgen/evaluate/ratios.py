"""A chain of density ratios, stage by stage: how much each classifier still finds on held-out images."""

import numpy as np

from latentgen.evaluate import charts
from latentgen.evaluate.base import Findings, Picture, Result, Subject, average, hook, per_example

NEEDS = ('ratios',)
CHANCE = 2 * np.log(2)


def run(subject: Subject, *, split: str = 'test', limit: int | None = None) -> Findings:
  """Reads every stage's logits at posterior samples of the images, and at as many of the prior that it tilts.

  Args:
    subject: what is evaluated.
    split: images.
    limit: only the first so many.

  Returns:
    ratios/<k>/contrast, both cross-entropies in nats (2 log 2 = 1.386 at chance); /accuracy (1/2 at chance; at 1 the classes no
    longer overlap and the ratio is no estimate); /divergence, the mean logit at posterior samples, an estimate of
    KL(posterior || prior before). A stage that was left as it began has logit 0. Picture: contrast and divergence by stage.
  """
  found = per_example(subject, 'ratios', hook(subject, 'ratios', 'ratios'), split, limit, axis=1)
  positive, negative = (np.asarray(found[name], np.float64) for name in ('positive', 'negative'))  # [K, n]
  contrast = np.logaddexp(0, -positive) + np.logaddexp(0, negative)
  right = ((positive > 0) * 1.0 + (positive == 0) * 0.5 + (negative < 0) + (negative == 0) * 0.5) / 2
  results: dict[str, Result] = {}
  for k in range(len(positive)):
    results[f'ratios/{k}/contrast'] = average(contrast[k], 'nats')
    results[f'ratios/{k}/accuracy'] = average(right[k], 'fraction')
    results[f'ratios/{k}/divergence'] = average(positive[k], 'nats')
  with charts.style():
    figure, (left, other) = charts.axes(4.6, 4.2, 2)
    stages = np.arange(1, len(positive) + 1)
    for ax, values, label in ((left, contrast, 'cross-entropies, nats'), (other, positive, 'mean logit, nats')):
      error = values.std(1) / np.sqrt(values.shape[1])
      ax.errorbar(stages, values.mean(1), error, color=charts.COLORS[0], marker='o', lw=1.4)
      ax.set(xlabel='stage', ylabel=label, xticks=stages)
    left.axhline(CHANCE, color=charts.INK, lw=0.8, ls=':')
    other.axhline(0, color=charts.INK, lw=0.8, ls=':')
    picture = charts.pixels(figure)
  caption = f'Classifiers of {positive.shape[1]} posterior samples of {split} from as many of the prior before; dotted: chance.'
  return Findings(results, {'ratios': Picture(picture, 'What each ratio corrects', caption)})
