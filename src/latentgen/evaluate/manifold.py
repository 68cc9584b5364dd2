"""Densities on a manifold: what a two-step model says of images that lie on its decoder's surface, and what it misses of them.

  log p(x) = log p(z) - 1/2 log det(J^T J),  z the code of x, J the decoder's Jacobian at z,

nats with respect to the surface's measure. It is the density of x only as far as decoding the code gives x back, so that the
reconstruction error stands beside it. A density with as many dimensions as the image has no such limit, and none on how large it
can be: on data of fewer dimensions its likelihood says nothing of the distribution along the surface.

References:
  G. Loaiza-Ganem, B. L. Ross, J. C. Cresswell, A. L. Caterini, Diagnosing and Fixing Manifold Overfitting in Deep Generative Models,
  2022, arXiv 2204.07172.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from latentgen.errors import UserError, near
from latentgen.evaluate import charts
from latentgen.evaluate.base import (
  Findings,
  Picture,
  Result,
  Subject,
  average,
  check_count,
  drawn,
  named_key,
  per_example,
)
from latentgen.samplers.manifolds import on_manifold

NEEDS = ('trace',)
CIRCLE = 'toy/circle'


def run(
  subject: Subject,
  *,
  split: str = 'test',
  stages: Sequence[str] = (),
  limit: int | None = None,
  samples: int = 10_000,
  bins: int = 20,
) -> Findings:
  """Densities on the manifold, reconstruction errors, and on the circle how well samples are spread over it.

  Args:
    subject: what is evaluated.
    split: images, and the angles that samples are compared with.
    stages: stages of the recipe that are compared, one after the other; () is the one that is evaluated.
    limit: only the first so many images.
    samples: drawn for the angles.
    bins: of their histograms.

  Returns:
    Findings with, before which `<stage>/` stands if `stages` names any, the densities for those with a density on codes alone:
      manifold/log_p [nats]: mean of log p(x) over images where it is finite; its dimension is that of the codes;
      manifold/lost_rank: share of images where the Jacobian has lost rank, log p(x) = -inf;
      manifold/reconstruction_error: Euclidean distance of an image from its decoded code;
      manifold/log_p_codes [nats]: mean log-density of the codes alone;
      manifold/angle_distance: on the data set toy/circle, the total variation between histograms of angles of samples and data;
      manifold/off_circle: and the mean distance of samples from the circle.
    Picture, on the circle: points of data and samples, and histograms of their angles.

  Raises:
    UserError: for a bad value, naming the key.
  """
  where = 'config.evaluate.manifold'
  check_count(f'{where}.samples', samples)
  check_count(f'{where}.bins', bins, 2)
  for name in stages:
    if name not in subject.stages:
      raise UserError(f'{where}.stages names {name!r}{near(name, subject.stages)}')
  subjects = {f'{name}/': subject.stages[name]() for name in stages} or {'': subject}
  circle = str(getattr(subject.data[split], 'name', '')).startswith(CIRCLE) and subject.data[split].shape[1] == 2
  findings, clouds = Findings(), {}
  for prefix, each in subjects.items():
    results = _of_images(each, split, limit) if getattr(each.method, 'exact', False) else {}
    if circle:
      x = subject.data[split].take(slice(0, limit))['image'].reshape(-1, 2)
      y = drawn(each, None, samples, named_key(subject.key, 'manifold')).reshape(-1, 2)
      results['angle_distance'] = Result(angle_distance(x, y, bins), 'total variation', samples)
      results['off_circle'] = average(np.abs(np.linalg.norm(y, axis=1) - 1), 'distance')
      clouds[prefix.rstrip('/') or 'samples'] = y
    findings.results |= {f'manifold/{prefix}{name}': result for name, result in results.items()}
  if circle:
    findings.images['manifold'] = Picture(
      _clouds({'data': x, **clouds}, bins),
      'On the circle',
      f'Above: points of {split} and samples. Below: densities of their angles, that of the data in grey.',
    )
  return findings


def _of_images(subject: Subject, split: str, limit: int | None) -> dict[str, Result]:
  found = per_example(subject, 'manifold', densities(subject.method), split, limit)
  found = {name: values.astype(np.float64) for name, values in found.items()}
  finite = np.isfinite(found['log_p'])
  results = {
    'lost_rank': average(~finite, 'fraction'),
    'reconstruction_error': average(found['error'], 'distance'),
    'log_p_codes': average(found['log_p_codes'], 'nats'),
  }
  return {**results, 'log_p': average(found['log_p'][finite], 'nats')} if finite.any() else results


def densities(method):
  """Builds (variables, x [b, h, w, c], key) -> {'log_p', 'log_p_codes', 'error': [b]}."""

  def function(variables, x, key):
    trace, _ = method.encode(variables['params'], variables['stats'], x, key)
    z = method.coordinates(variables['params'], variables['stats']).pack(trace.eps)[0]
    log_pz = method.log_prior(variables, z, key)
    decode = lambda z: method.picture(variables, z[None])[0]
    gap = x - trace.px.mean[0]
    error = jnp.sqrt(jnp.square(gap).sum((1, 2, 3)))
    return {'log_p': on_manifold(decode, log_pz, z), 'log_p_codes': log_pz, 'error': error}

  return function


def angle_distance(x: np.ndarray, y: np.ndarray, bins: int) -> float:
  """Total variation, 1/2 sum |p - q|, between histograms of the angles of points [n, 2] and [m, 2]."""
  p, q = (_histogram(points, bins)[0] / len(points) for points in (x, y))
  return float(0.5 * np.abs(p - q).sum())


def _histogram(points: np.ndarray, bins: int):
  return np.histogram(np.arctan2(points[:, 1], points[:, 0]), bins, (-np.pi, np.pi))


def _clouds(points: dict[str, np.ndarray], bins: int) -> np.ndarray:
  with charts.style():
    figure, rows = charts.axes(2.6 * len(points), 4.2, 2, (3, 2))
    for ax in rows:
      ax.remove()
    places = figure.subplots(2, len(points), height_ratios=(3, 2), squeeze=False)
    counts, edges = _histogram(points['data'], bins)
    for (name, cloud), top, below, color in zip(points.items(), *places, charts.COLORS, strict=False):
      top.scatter(*cloud[:2000].T, s=2, color=color, linewidths=0)
      top.set(title=name.replace('_', ' '), aspect='equal', xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
      mine, _ = _histogram(cloud, bins)
      width = edges[1] - edges[0]
      below.stairs(counts / counts.sum() / width, edges, fill=True, color=charts.INK, alpha=0.35)
      below.stairs(mine / mine.sum() / width, edges, color=color)
      below.set(xlabel='angle', xlim=(-np.pi, np.pi))
    return charts.pixels(figure)
