"""Are the critics' log-odds the log-ratios they stand for? Reliability on held-out images, one curve a group.

A tilted prior p(z) r(z) / Z takes r from the logits of a classifier between posterior and prior samples; r is the
density ratio exactly where the classifier's probabilities are calibrated.

References:
  J. Aneja, A. Schwing, J. Kautz, A. Vahdat, A contrastive learning approach for training variational autoencoder
  priors, 2021, arXiv 2010.02917.
"""

import math

import jax.numpy as jnp
import numpy as np

from latentgen.evaluate import charts
from latentgen.evaluate.base import (
  Findings, Picture, Result, Subject, average, check_count, hook, named_key, per_example, seed_of
)  # fmt: skip
from latentgen.evaluate.statistics import Reliability, reliability

CHANCE = 2 * math.log(2)
NEEDS = ('logits',)


def run(
  subject: Subject, *, split: str = 'test', limit: int | None = None, bins: int = 15, repeats: int = 100
) -> Findings:
  """Measures calibration of a method with `logits(variables, x, key) -> (posterior, prior)`, per level [g, b].

  Args:
    subject: what is evaluated.
    split: which images; not those the critics were trained on.
    limit: only the first so many.
    bins: equal bins of probability.
    repeats: bootstrap draws, over images, of the calibration error's standard error.

  Returns:
    calibration/level<i>/group<j>/ece, /accuracy, /nce for every group, calibration/ece, /accuracy for all groups
    pooled, and calibration/nce, the mean over groups. ece: expected calibration error, biased upwards by about
    sqrt(bins / n). accuracy: a logit of 0 is half right. nce [nats]: sum of the two mean cross-entropies; chance is
    2 log 2 = 1.386. Picture: the reliability curves.

  Raises:
    UserError: if the method has no `logits`, or for a bad value.
  """
  logits = hook(subject, 'calibration', 'logits')
  check_count('config.evaluate.calibration.bins', bins, least=2)
  check_count('config.evaluate.calibration.repeats', repeats, least=2)

  def both(variables, x, key):
    posterior, prior = logits(variables, x, key)
    return {f'level{i}': jnp.stack(pair, -1) for i, pair in enumerate(zip(posterior, prior, strict=True))}  # [g, b, 2]

  found = per_example(subject, 'calibration', both, split, limit, axis=1)
  groups = {f'{level}/group{j}': pair for level, pairs in found.items() for j, pair in enumerate(pairs)}  # [n, 2]
  pooled = np.stack(list(groups.values()), 1)  # [n, groups, 2]
  n = len(pooled)
  findings, curves = Findings(), {}
  for name, pair in {**groups, '': pooled}.items():
    prefix = f'calibration/{name}' if name else 'calibration'
    positive, negative = pair[..., 0], pair[..., 1]
    curves[name or 'all groups'] = curve = reliability(positive, negative, bins)
    error = _error_of_error(positive, negative, bins, repeats, seed_of(named_key(subject.key, prefix)))
    findings.results[f'{prefix}/ece'] = Result(curve.error(), 'probability', n, error)
    right = (np.heaviside(np.float64(positive), 0.5) + np.heaviside(-np.float64(negative), 0.5)) / 2
    loss = np.logaddexp(0, -positive.astype(np.float64)) + np.logaddexp(0, negative.astype(np.float64))
    findings.results[f'{prefix}/accuracy'] = average(right.reshape(n, -1).mean(1), 'fraction')
    findings.results[f'{prefix}/nce'] = average(loss.reshape(n, -1).mean(1), 'nats')
  whole = findings.results['calibration/nce'].value
  findings.images['calibration'] = Picture(
    _picture(curves),
    'Calibration of the critics',
    f'Share of posterior samples among those given a probability, on {n} held-out images; on the diagonal the logit is '
    f'the log-ratio. Line in bold: all {len(groups)} groups. Below: how many samples got which probability. '
    f'Mean NCE loss {whole:.3f} nats, chance {CHANCE:.3f}.',
  )
  return findings


def _error_of_error(positive, negative, bins: int, repeats: int, seed: int) -> float:
  """Bootstrap over images."""
  rng = np.random.default_rng(seed)
  n = len(positive)
  draws = [np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64) for _ in range(repeats)]
  return float(np.std([reliability(positive, negative, bins, w).error() for w in draws], ddof=1))


def _picture(curves: dict[str, Reliability]) -> np.ndarray:
  with charts.style():
    figure, (ax, below) = charts.axes(4.2, 4.8, rows=2, heights=(4, 1))
    bins = len(curves['all groups'].count)
    centres = (np.arange(bins) + 0.5) / bins
    for name, curve in curves.items():
      whole = name == 'all groups'
      seen = curve.count > 0.002 * curve.count.sum()
      style = {'color': charts.COLORS[0], 'lw': 2, 'marker': 'o', 'ms': 3.5, 'zorder': 3} if whole else {
        'color': charts.INK, 'lw': 0.7, 'alpha': 0.6
      }  # fmt: skip
      if whole or len(curves) > 2:
        ax.plot(curve.predicted[seen], curve.observed[seen], **style)
    ax.plot([0, 1], [0, 1], color=charts.INK, lw=0.8, ls=':')
    ax.set(ylabel='share of posterior samples', xlim=(0, 1), ylim=(0, 1))
    whole = curves['all groups']
    below.bar(centres, whole.count / whole.count.sum(), 0.9 / bins, color=charts.COLORS[0], alpha=0.7)
    below.set(xlabel='probability given', xlim=(0, 1), ylabel='share')
    return charts.pixels(figure)
