"""How many modes of points with known clusters do samples reach, and how many samples lie near one?

The clusters are those of the labels: mean and deviation of each are taken from the training points. For two dimensions, where
distance means something. Srivastava et al., "VEEGAN", 2017, arXiv 1705.07761, section 4.1 (high-quality samples, modes).
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

from latentgen.errors import UserError
from latentgen.evaluate import charts
from latentgen.evaluate.base import (
  Findings, Picture, Result, Subject, average, check_count, chosen_samplers, drawn, labels, named_key, per_example
)  # fmt: skip

DIMS = 2


def check(data: Mapping[str, Any], **options) -> None:
  """Refuses data that are not labelled points in the plane."""
  del options
  source = data['train']
  size = math.prod(source.shape)
  if size != DIMS:
    raise UserError(f"config.evaluate.tasks: 'modes' needs labelled points in the plane, not {source.shape}; leave it out")
  if not source.num_classes:
    raise UserError("config.evaluate.tasks: 'modes' needs labelled points, and these data have no labels; leave it out")


def run(
  subject: Subject,
  *,
  split: str = 'test',
  count: int = 2500,
  deviations: float = 4.0,
  samplers: Sequence[str] | None = None,
) -> Findings:
  """Counts the modes that samples find.

  A sample is good if the mean of its nearest cluster is at most `deviations` deviations away (Euclidean); a mode is found if
  good samples of it make up a tenth of its share among equal ones, or more.

  Args:
    subject: what is evaluated.
    split: real points that are counted alike, as the best that there is.
    count: samples drawn, and at most so many real points.
    deviations: radius of a mode.
    samplers: names; all the method has by default.

  Returns:
    modes/good/<sampler>, share of good samples; modes/found/<sampler>, number of modes; modes/kl/<sampler>, KL divergence in
    nats of the good samples' histogram over modes from the training points'; <sampler> = real for the split. Picture: points.

  Raises:
    UserError: for a bad value, naming the key, or data that are no labelled points in the plane.
  """
  where = 'config.evaluate.modes'
  check(subject.data)
  check_count(f'{where}.count', count)
  if isinstance(deviations, bool) or not isinstance(deviations, (int, float)) or not deviations > 0:
    raise UserError(f'{where}.deviations: must be a positive number, not {deviations!r}')
  train = _points(subject, 'train')
  classes = labels(subject, 'modes', 'train')
  known = np.unique(classes)
  means = np.stack([train[classes == c].mean(0) for c in known])
  share = np.array([(classes == c).mean() for c in known])
  # Of every coordinate around its cluster's mean, all clusters pooled.
  deviation = math.sqrt(np.mean(np.square(train - means[np.searchsorted(known, classes)])))
  clouds = {'real': _points(subject, split, count)}
  for name in chosen_samplers(subject, 'modes', samplers):
    clouds[name] = drawn(subject, name, count, named_key(subject.key, f'sampler/{name}')).reshape(count, DIMS)

  findings = Findings()
  for name, cloud in clouds.items():
    good, nearest = near_modes(cloud, means, deviations * deviation)
    counts = np.bincount(nearest[good], minlength=len(means))
    found = int((counts >= max(1.0, 0.1 * len(cloud) / len(means))).sum())
    findings.results[f'modes/good/{name}'] = average(good, 'fraction')
    findings.results[f'modes/found/{name}'] = Result(float(found), f'of {len(means)} modes', len(cloud))
    if counts.sum():
      p = counts / counts.sum()
      kl = float((p[p > 0] * np.log(p[p > 0] / share[p > 0])).sum())
      findings.results[f'modes/kl/{name}'] = Result(kl, 'nats', int(counts.sum()))
    if name != 'real':
      findings.images[f'modes_{name}'] = Picture(
        _picture(cloud, clouds['real'], means),
        f'Modes: {name}',
        f'{count} samples, not selected, over points of {split}; {found} of {len(means)} modes found, '
        f'{good.mean():.1%} of samples within {deviations:g} deviations of one.',
      )
  return findings


def near_modes(points: np.ndarray, means: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
  """(bool [n], whether a mean [m, d] is within the radius of a point [n, d]; int [n], which is nearest)."""
  distance = np.linalg.norm(points[:, None].astype(np.float64) - means, axis=-1)
  return distance.min(1) <= radius, distance.argmin(1)


def _points(subject: Subject, split: str, limit: int | None = None) -> np.ndarray:
  def read(variables, x, key):
    del variables, key
    return {'x': x.reshape(len(x), -1)}

  return per_example(subject, 'modes', read, split, limit)['x'].astype(np.float64)


def _picture(cloud: np.ndarray, real: np.ndarray, means: np.ndarray) -> np.ndarray:
  with charts.style():
    figure, ax = charts.axes(4.6, 4.6)
    ax.plot(*real.T, '.', ms=3, color=charts.COLORS[7], alpha=0.3, label='real', zorder=1)
    ax.plot(*cloud.T, '.', ms=3, color=charts.COLORS[0], alpha=0.6, label='samples', zorder=2)
    ax.plot(*means.T, 'x', ms=5, color=charts.COLORS[1], label='modes', zorder=3)
    ax.set(aspect='equal')
    charts.legend(ax, loc='upper center', bbox_to_anchor=(0.5, -0.06), ncols=3)
    return charts.pixels(figure)
