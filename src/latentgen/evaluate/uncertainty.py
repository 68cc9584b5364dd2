"""Is the decoder's noise scale the size of its errors? Coverage, calibration over the scale, and maps of the uncertainty.

All with posterior samples, as the bound has them: sigma answers for the error that a sample of z leaves, not that of the
posterior's mean.

References:
  S. Lin, S. Roberts, N. Trigoni, R. Clark, Balancing reconstruction quality and regularisation in ELBO for VAEs, 2019,
  arXiv 1909.03765.
  O. Rybkin, K. Daniilidis, S. Levine, Simple and effective VAE training with calibrated decoders, 2020, arXiv 2006.13202.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from latentgen.distributions import Normal
from latentgen.errors import UserError
from latentgen.evaluate import charts
from latentgen.evaluate.base import (
  Findings, Picture, Result, Subject, average, batches, check_count, fetch, named_key, per_example, simulations
)  # fmt: skip
from latentgen.evaluate.grids import grid, interleave
from latentgen.types import Trace

LEVELS = np.arange(1, 20) / 20  # nominal coverage
SPREAD = 1e-6  # relative range of sigma below which it is one number
NEEDS = ('trace',)


def check(data: Mapping[str, Any], *, trace: Callable[[], Trace] | None = None, **_) -> None:
  """Refuses a decoder that is not Gaussian."""
  del data
  if trace is not None:
    gaussian(trace())


def run(
  subject: Subject,
  *,
  split: str = 'test',
  limit: int | None = None,
  samples: int = 4,
  pixels: int = 1024,
  bins: int = 10,
  images: int = 32,
) -> Findings:
  """Compares the scale sigma of a Gaussian decoder with its errors x - f, f the mean.

  Args:
    subject: what is evaluated; trace.px is an Independent Normal.
    split: which images; held-out ones, unless the fit itself is asked about.
    limit: only the first so many.
    samples: posterior samples an image.
    pixels: values (pixels times channels) an image; of larger images the same random ones of each.
    bins: quantiles of sigma in the calibration error.
    images: reconstructions and samples that are shown with their maps.

  Returns:
    Findings, n in images, with
      uncertainty/sigma [image units]: root mean sigma^2; /rmse: root mean square error; /sigma_over_rmse: 1 for a global
        sigma that is at its optimum for these images;
      uncertainty/within_sigma: fraction of |x - f| < sigma, 0.683 if the errors are normal and sigma is right;
      uncertainty/coverage_error: mean |empirical - nominal| over central intervals of 5, 10, ... 95 %;
      uncertainty/ece [image units]: mean over quantiles of sigma, by their share, of |root mean square error - root mean
        sigma^2| in it;
      uncertainty/spearman: rank correlation of sigma and |x - f| over images and pixels; left out where sigma is one number.
    Pictures: uncertainty_reconstructions, uncertainty_samples, coverage, and calibration over sigma where that varies.

  Raises:
    UserError: if the decoder is not Gaussian, or for a bad value.
  """
  where = 'config.evaluate.uncertainty'
  for name, value, least in (('samples', samples, 1), ('pixels', pixels, 1), ('bins', bins, 2), ('images', images, 1)):
    check_count(f'{where}.{name}', value, least)
  pixels_key = named_key(subject.key, 'pixels')

  def errors(variables, x, key):
    px = gaussian(subject.method.trace(variables, x, key, samples))
    rows = [jnp.broadcast_to(a, px.shape).reshape(samples, x.shape[0], -1).swapaxes(0, 1) for a in (x - px.loc, px.scale)]
    size = rows[0].shape[-1]
    if size > pixels:
      chosen = jax.random.choice(pixels_key, size, (pixels,), replace=False)
      rows = [a[..., chosen] for a in rows]
    return dict(zip(('error', 'sigma'), rows, strict=True))

  found = {name: a.astype(np.float64) for name, a in per_example(subject, 'uncertainty', errors, split, limit).items()}
  findings = Findings()
  _numbers(found['error'], found['sigma'], bins, findings)
  _maps(subject, split, images, findings)
  return findings


def gaussian(trace: Trace) -> Normal:
  """The elementwise normal of trace.px.

  Raises:
    UserError: if it is none.
  """
  base = getattr(trace.px, 'base', None)
  if not isinstance(base, Normal):
    kind = type(base if base is not None else trace.px).__name__
    raise UserError(f"config.evaluate.tasks: 'uncertainty' needs a Gaussian decoder, and this one is {kind}; leave it out")
  return base


# ---------------------------------------------------------------------------------------- numbers


def coverage(ratio: np.ndarray, levels: np.ndarray = LEVELS) -> np.ndarray:
  """Share of |x - f| / sigma within the central intervals of a normal, one for each nominal level."""
  edges = scipy.special.ndtri((1 + np.asarray(levels)) / 2)
  return np.searchsorted(np.sort(ratio, axis=None), edges, side='right') / ratio.size


def binned(error: np.ndarray, sigma: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(root mean sigma^2, root mean square error, share) by quantiles of sigma; fewer bins where sigma has ties."""
  error, sigma = error.reshape(-1), sigma.reshape(-1)
  edges = np.unique(np.quantile(sigma, np.arange(1, bins) / bins))
  index = np.searchsorted(edges, sigma, side='left')
  count = np.bincount(index, minlength=len(edges) + 1)
  rms = lambda v: np.sqrt(np.bincount(index, np.square(v), len(edges) + 1)[count > 0] / count[count > 0])
  return rms(sigma), rms(error), count[count > 0] / count.sum()


def varies(sigma: np.ndarray) -> bool:
  return sigma.max() - sigma.min() > SPREAD * sigma.max()


def _numbers(error: np.ndarray, sigma: np.ndarray, bins: int, findings: Findings) -> None:
  """Results and charts of error and sigma, [n, samples, pixels] each."""
  per_image = lambda v: v.reshape(len(v), -1).mean(1)
  roots = {}
  for name, square in (('sigma', np.square(sigma)), ('rmse', np.square(error))):
    mean = average(per_image(square), '')
    roots[name] = math.sqrt(mean.value)
    stderr = None if mean.stderr is None else mean.stderr / (2 * roots[name])
    findings.results[f'uncertainty/{name}'] = Result(roots[name], 'image units', mean.n, stderr)
  n, ratio = len(error), np.abs(error) / sigma
  empirical = coverage(ratio)
  edges, observed, share = binned(error, sigma, bins)
  ece = float((share * np.abs(observed - edges)).sum())
  findings.results |= {
    'uncertainty/sigma_over_rmse': Result(roots['sigma'] / roots['rmse'], 'ratio', n),
    'uncertainty/within_sigma': average(per_image(ratio < 1), 'fraction'),
    'uncertainty/coverage_error': Result(float(np.abs(empirical - LEVELS).mean()), 'fraction', n),
    'uncertainty/ece': Result(ece, 'image units', n),
  }
  if varies(sigma):
    rho = scipy.stats.spearmanr(sigma, np.abs(error), axis=None).statistic
    findings.results['uncertainty/spearman'] = Result(float(rho), 'correlation', n)
    findings.images['uncertainty_calibration'] = Picture(
      _chart(edges, observed, 'sigma', 'root mean square error', max(edges.max(), observed.max()) * 1.05),
      'Error against sigma',
      f'By {len(edges)} quantiles of sigma over {n} held-out images; on the diagonal the decoder knows how wrong it is. '
      f'Mean distance from it {ece:.4f}.',
    )
  within = findings.results['uncertainty/within_sigma'].value
  findings.images['uncertainty_coverage'] = Picture(
    _chart(np.r_[0, LEVELS, 1], np.r_[0, empirical, 1], 'nominal coverage', 'empirical coverage', 1.0),
    'Coverage',
    f'Share of pixels of {n} images inside the central intervals of the decoder at posterior samples. Within one sigma: '
    f'{within:.3f}, nominally 0.683. Above the diagonal: sigma is too large for most pixels.',
  )


def _chart(x, y, xlabel: str, ylabel: str, top: float) -> np.ndarray:
  with charts.style():
    figure, ax = charts.axes(3.6, 3.4)
    ax.plot([0, top], [0, top], color=charts.INK, lw=0.8, ls=':')
    ax.plot(x, y, color=charts.COLORS[0], lw=2, marker='o', ms=3.5)
    ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, top), ylim=(0, top))
    return charts.pixels(figure)


# ---------------------------------------------------------------------------------------- maps


def shades(value: np.ndarray, top: float) -> np.ndarray:
  """[n, h, w, c] -> grey levels of its root mean square over channels, `top` white, as often as the image has channels."""
  grey = np.sqrt(np.square(value).mean(-1, keepdims=True)) / top
  return np.repeat(grey, value.shape[-1], -1)


def _maps(subject: Subject, split: str, n: int, findings: Findings) -> None:
  def read(px: Normal):
    return {'mean': px.mean[0], 'sigma': jnp.broadcast_to(px.scale, px.shape)[0]}

  key, raw, mask = next(batches(subject, 'uncertainty', split))
  x = subject.preprocess(key, raw, False)['image']
  infer = jax.jit(lambda v, x, key: read(gaussian(subject.method.trace(v, x, key, 1))))
  shown = min(n, int(mask.sum()))
  found = fetch({'x': x, **infer(subject.variables, x, named_key(key, 'posterior'))})
  found = {name: a[:shown] for name, a in found.items()}
  drawn = simulations(subject, None, n, lambda t: read(gaussian(t)), named_key(subject.key, 'draw'))
  error = np.abs(found['x'] - found['mean'])
  top = float(np.quantile(np.concatenate([found['sigma'].ravel(), error.ravel()]), 0.99))
  tiles = interleave(found['x'], found['mean'], shades(found['sigma'], top), shades(error, top))
  findings.images['uncertainty_reconstructions'] = Picture(
    grid(tiles, 4 * min(4, shown)),
    'Uncertainty of reconstructions',
    f'The first {shown} images of {split}, in fours: original, decoder mean at one posterior sample, its sigma, the error '
    f'|x - f|; {top:.3g} and more is white in the last two.',
  )
  top = float(np.quantile(drawn['sigma'], 0.99))
  findings.images['uncertainty_samples'] = Picture(
    grid(interleave(drawn['mean'], shades(drawn['sigma'], top)), 2 * min(8, n)),
    'Uncertainty of samples',
    f'{n} draws by {subject.method.samplers[0]}, not selected, in pairs: decoder mean, sigma ({top:.3g} and more is white).',
  )
