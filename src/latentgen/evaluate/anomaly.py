"""Outliers by the bounds L^{>k}: what an image's lower latents owe to having seen it tells more than its likelihood.

With the lowest k of the latents drawn from their conditional prior instead of the posterior,

  L^{>k}(x) = E[ log p(x|z) + log p(z_{>k}) - log q(z_{>k}|x) ],  z_{>k} ~ q(z|x), z_{<=k} ~ p(z_{<=k} | z_{>k}),

L^{>0} is the evidence lower bound, and L^{>K} of all K is E_{p(z)} log p(x|z). The score is the likelihood ratio
LLR^{>k} = L^{>0} - L^{>k}: large where the details of an image have to be told, because its upper latents do not imply them.
Where the model has classes, the drawn class is one of the uppermost latents: L^{>k} keeps it as long as it keeps any group.

A method without a density of images may have scores of its own, `anomaly_scores(variables, x, key) -> {name: [b]}`, larger for what is
more anomalous; the task compares these instead.

References:
  L. Maaloe, M. Fraccaro, V. Lievin, O. Winther, BIVA: A very deep hierarchy of latent variables for generative modeling, 2019,
  arXiv 1902.02102.
  J. Havtorn, J. Frellsen, S. Hauberg, L. Maaloe, Hierarchical VAEs know what they don't know, 2021, arXiv 2102.08248.
  E. Nalisnick et al., Do deep generative models know what they don't know?, 2019, arXiv 1810.09136.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.evaluate import charts, outliers as sets
from latentgen.evaluate.base import (
  Findings,
  Picture,
  Result,
  Subject,
  average,
  check_choice,
  check_count,
  class_above,
  named_key,
  per_example,
  seed_of,
)
from latentgen.evaluate.grids import beside, grid
from latentgen.evaluate.outliers import NORMAL
from latentgen.evaluate.statistics import auroc
from latentgen.losses import log_mean_exp

LOWER, UNITS, COMBINE = ('sample', 'mode'), ('group', 'level'), ('log_mean_exp', 'mean')

NEEDS = ('trace or anomaly_scores', 'density or anomaly_scores')


def run(
  subject: Subject,
  *,
  split: str = 'test',
  outliers: Any = ('noise', 'shuffled', 'inverted'),
  samples: int = 1,
  combine: str = 'log_mean_exp',
  lower: str = 'sample',
  unit: str = 'group',
  limit: int | None = None,
  columns: int = 8,
) -> Findings:
  """Scores images of a split against sets of outliers.

  All images go through the run's own preprocessing. Where the split has classes that training did not, these are left out of
  what counts as in distribution.

  Args:
    subject: what is evaluated.
    split: images in distribution, and what sets are made from.
    outliers: one set, several, or {name: set}; a set is one of `outliers.MADE` ('held_out' classes, 'noise', 'shuffled',
      'inverted') or another data set as `config.data` has it, dict(name='idx', path=...), of which the same split is taken.
    samples: K, posterior samples an image; all bounds use the same.
    combine: how these become one bound, 'log_mean_exp' (the importance-weighted one) or 'mean'.
    lower: the lowest k are a 'sample' of the conditional base prior, or its 'mode' (mean), which is another quantity with less
      variance.
    unit: what k counts: a 'group' or a whole 'level' (resolution).
    limit: only the first so many images of every set.
    columns: images a row in the picture of extremes.

  Returns:
    Findings with, for k = 1 .. K:
      anomaly/<set>/elbo, /bound<k>, /llr<k>  [nats]: mean scores; <set> = in_distribution for the split's own images;
      anomaly/<set>/<score>/auroc, /auprc, /fpr80: outliers against the images in distribution, outliers being positive, by
        low elbo, low bound<k>, high llr<k>; fpr80 is the share of images in distribution that is taken for outliers when 80 %
        of the outliers are found. Chance is 1/2, the outliers' share, and 0.8.
    For a method with `anomaly_scores` and no density of images, anomaly/<set>/<score> and the same three areas of its scores, in
    place of the bounds, to which `samples`, `combine`, `lower` and `unit` belong.
    Pictures: histograms of the bounds and of the ratios, and the images that are hardest to tell apart.

  Raises:
    UserError: for a bad value, naming the key.
  """
  where = 'config.evaluate.anomaly'
  check_choice(f'{where}.lower', lower, LOWER)
  check_choice(f'{where}.unit', unit, UNITS)
  check_choice(f'{where}.combine', combine, COMBINE)
  check_count(f'{where}.samples', samples)
  check_count(f'{where}.columns', columns)
  seed = seed_of(named_key(subject.key, 'outliers'))
  sources = sets.sources(subject.data, split, outliers, limit, seed)
  own = not getattr(subject.method, 'density', True)
  score = subject.method.anomaly_scores if own else bounds(subject.method, samples, combine, lower, unit)
  splits = {f'anomaly/{name}': source for name, source in sources.items()}
  subject = dataclasses.replace(subject, data={**subject.data, **splits})
  found = {name: per_example(subject, 'anomaly', score, f'anomaly/{name}', axis=-1) for name in sources}
  found = {name: jax.tree.map(lambda a: a.astype(np.float64), values) for name, values in found.items()}
  scores = found if own else {name: named_scores(values['bounds']) for name, values in found.items()}
  findings = Findings()
  for name, mine in scores.items():
    for score_name, values in mine.items():
      findings.results[f'anomaly/{name}/{score_name}'] = average(values, 'nats')
      if name != NORMAL:
        sign = 1 if own or score_name.startswith('llr') else -1
        told = detection(sign * values, sign * scores[NORMAL][score_name])
        findings.results |= {f'anomaly/{name}/{score_name}/{metric}': result for metric, result in told.items()}
  names = list(scores[NORMAL])
  if own:
    findings.images['anomaly_scores'] = Picture(
      _histograms(scores, names), 'Scores of outliers', 'Nats an image; high scores speak for an outlier. Outermost hundredths are cut.'
    )
    _extremes(findings, scores, sources, columns, names)
    return findings
  _pictures(findings, scores, sources, columns, lower, unit)
  return findings


def check(data: Mapping[str, Any], *, split: str = 'test', outliers: Any = None, limit: int | None = None, **_) -> None:
  """What can be said of the options before training: makes the sets.

  Args:
    data: {split: source} of the run.
    split: see `run`, as `outliers` and `limit`.

  Raises:
    UserError: no such set, files that cannot be read, images of another shape.
  """
  if outliers is not None:
    sets.sources(data, split, outliers, limit, 0)


def bounds(method: Any, samples: int = 1, combine: str = 'log_mean_exp', lower: str = 'sample', unit: str = 'group'):
  """Builds the function of a batch that gives all bounds of every image.

  Args:
    method: a `LatentModel`.
    samples: see `run`, as the others.

  Returns:
    (variables, x [b, h, w, c], key) -> {'bounds': [K + 1, b]}, L^{>0} first, nats.
  """

  def one(variables, x, key):
    infer, below = jax.random.split(key)
    trace = method.trace(variables, x, infer, 1)
    counts = [level.shape[0] for level in trace.z]
    starts = np.cumsum([0, *counts])
    ends = np.arange(starts[-1]) if unit == 'group' else starts[:-1]
    ratio = jnp.concatenate([(p - q)[:, 0] for p, q in zip(trace.log_p, trace.log_q, strict=True)])  # [groups, b]
    order = jnp.arange(len(ratio))[:, None]
    label = None if trace.label is None else trace.label[0]

    def above(fixed):
      def choose(level, group, prior, context, key):
        del context
        drawn = prior.sample(key) if lower == 'sample' else prior.mean
        upper = trace.z[level][group][0].astype(drawn.dtype)
        return jnp.where(int(starts[level]) + group < fixed, upper, drawn)

      given = class_above(label, fixed, named_key(below, 'class'))
      log_px = method.simulate(variables, below, x.shape[0], choose=choose, **given).px.log_prob(x)[0]
      return log_px + jnp.where(order < fixed, ratio, 0.0).sum(0)

    # Every bound has the same posterior sample and the same noise below it.
    return jnp.concatenate([trace.log_weight(), jax.lax.map(above, jnp.asarray(ends[::-1].copy(), jnp.int32))])

  def function(variables, x, key):
    each = jax.lax.map(lambda k: one(variables, x, k), jax.random.split(key, samples))  # [samples, K + 1, b]
    return {'bounds': each.mean(0) if combine == 'mean' else log_mean_exp(each, axis=0)}

  return function


def named_scores(values: np.ndarray) -> dict[str, np.ndarray]:
  """Bounds [K + 1, n] -> {'elbo', 'bound1', .., 'llr1', ..: [n]}."""
  above = {f'bound{k}': values[k] for k in range(1, len(values))}
  return {'elbo': values[0], **above, **{f'llr{k}': values[0] - values[k] for k in range(1, len(values))}}


def detection(positive: np.ndarray, negative: np.ndarray) -> dict[str, Result]:
  """How well a score tells positives from negatives.

  Args:
    positive: scores [n] of outliers, which should be high.
    negative: scores [m] of images in distribution.

  Returns:
    auroc with DeLong's standard error; auprc, the average precision; fpr80, the least share of negatives at or above a
    threshold that 80 % of the positives reach, with the binomial standard error at that threshold.
  """
  from sklearn.metrics import average_precision_score, roc_curve

  label = np.repeat([1, 0], [len(positive), len(negative)])
  both = np.concatenate([positive, negative])
  n = len(both)
  area = auroc(positive[:, None], negative)
  fpr, tpr, _ = roc_curve(label, both, drop_intermediate=False)
  rate = float(fpr[np.argmax(tpr >= 0.8)])
  return {
    'auroc': Result(area.value, 'probability', n, area.stderr),
    'auprc': Result(min(float(average_precision_score(label, both)), 1.0), 'precision', n),
    'fpr80': Result(rate, 'fraction', n, float(np.sqrt(rate * (1 - rate) / len(negative)))),
  }


# ---------------------------------------------------------------------------------------------- pictures


def _pictures(findings: Findings, scores: dict, sources: dict, columns: int, lower: str, unit: str) -> None:
  ratios = [name for name in scores[NORMAL] if name.startswith('llr')]
  plain = [name for name in scores[NORMAL] if name not in ratios]
  drawn = 'drawn from' if lower == 'sample' else 'at the mode of'
  findings.images['anomaly_scores'] = Picture(
    beside({'bounds L>k': _histograms(scores, plain), 'ratios L>0 - L>k': _histograms(scores, ratios)}),
    'Scores of outliers',
    f'Nats an image. elbo is L>0; k counts the lowest {unit}s, which are {drawn} the conditional prior instead of the '
    'posterior. Low bounds and high ratios speak for an outlier; outermost hundredths are cut off.',
  )
  _extremes(findings, scores, sources, columns, ratios)


def _extremes(findings: Findings, scores: dict, sources: dict, columns: int, ranked: Sequence[str]) -> None:
  """The images that are hardest to tell apart by scores that are high for outliers, a row a score."""
  panels = {}
  for name, source in sources.items():
    rows = []
    for score in ranked:
      order = np.argsort(scores[name][score], kind='stable')
      rows.append((order[::-1] if name == NORMAL else order)[np.arange(columns) % len(order)])
    image = source.take(np.concatenate(rows))['image']
    image = image / 255 if image.dtype == np.uint8 else image
    panels[f'{name}: {"highest" if name == NORMAL else "lowest"}'] = grid(image, columns)
  findings.images['anomaly_extremes'] = Picture(
    beside(panels),
    'Hardest to tell apart',
    f'A row a score ({", ".join(ranked)}): images in distribution for which it is highest, and outliers for which it is lowest.',
  )


def _histograms(scores: dict[str, dict[str, np.ndarray]], names: Sequence[str]) -> np.ndarray:
  with charts.style():
    figure, rows = charts.axes(4.6, 0.6 + 1.25 * len(names), len(names))
    for ax, name in zip(np.atleast_1d(rows), names, strict=True):
      each = {label: mine[name] for label, mine in scores.items()}
      ends = np.concatenate([np.quantile(values, (0.01, 0.99)) for values in each.values()])
      low, high = ends.min(), ends.max()
      bins = np.linspace(low, high if high > low else low + 1, 61)
      for (label, values), color in zip(each.items(), charts.COLORS * len(each)):
        weights = np.full(len(values), 1 / len(values))
        ax.hist(values, bins, weights=weights, color=color, alpha=0.2 if label != NORMAL else 0.45)
        ax.hist(values, bins, weights=weights, color=color, histtype='step', label=label.replace('_', ' '))
      ax.set_ylabel(name)
      ax.set_yticks([])
    charts.legend(np.atleast_1d(rows)[0], fontsize=7, loc='upper right')
    return charts.pixels(figure)
