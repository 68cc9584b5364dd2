"""Restoring images by the posterior over a density's coordinates: unknown pixels are filled in, noise is taken away.

  log p(u | x) = log p(u) + sum over known pixels of log N(x; g(u), s^2 + noise^2) + const,

g the decoder behind the density (a flow's base is N(0, I)), s the deviation of the model's own residuals on validation images; by
Gaussians at the modes, whose curvature is that of the prior and Gauss-Newton's of the likelihood.

References:
  V. Böhm, U. Seljak, Probabilistic Autoencoder, 2022, arXiv 2006.05479, section 5.
"""

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.distributions import Normal
from latentgen.errors import UserError
from latentgen.evaluate.base import (
  Findings,
  Picture,
  Result,
  Subject,
  average,
  batches,
  check_choice,
  check_count,
  fetch,
  named_key,
  per_example,
)
from latentgen.evaluate.grids import beside, grid, interleave
from latentgen.samplers.laplace import laplace_mixture

NEEDS = ('starts', 'place', 'picture', 'exact')
WIDEST = 2.0  # deviation of a posterior in any direction, where the prior itself has no maximum
UNKNOWN = ('lower', 'right', 'centre', 'random')


def run(
  subject: Subject,
  *,
  split: str = 'test',
  images: int = 16,
  unknown: str = 'lower',
  noise: float = 0.3,
  starts: int = 16,
  steps: int = 300,
  samples: int = 64,
  limit: int | None = None,
) -> Findings:
  """Restores the first images of a split twice: with half of their pixels unknown, and under noise.

  Args:
    subject: what is evaluated.
    split: images that are restored.
    images: how many, at most one batch.
    unknown: which half of the pixels is, one of UNKNOWN.
    noise: standard deviation of what is added to every pixel.
    starts: of the search for modes.
    steps: of the search.
    samples: of the posterior, an image.
    limit: validation images on which s is measured.

  Returns:
    Findings with restoration/sigma, s; and for inpainting and denoising, as means over images:
      restoration/<task>/mse: squared error a pixel of the posterior's mean image, on unknown pixels (inpainting) or all;
      restoration/<task>/mse_mode: the same of the heaviest mode's image;
      restoration/inpainting/mse_mean_fill: of the training images' mean, restoration/denoising/mse_observed: of the noisy image;
      restoration/<task>/components: distinct modes that were found.
    Picture: original, corrupted, the heaviest mode's image, posterior samples.

  Raises:
    UserError: for a bad value, naming the key.
  """
  where = 'config.evaluate.restoration'
  check_choice(f'{where}.unknown', unknown, UNKNOWN)
  for name, value in (('images', images), ('starts', starts), ('steps', steps), ('samples', samples)):
    check_count(f'{where}.{name}', value)
  if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not noise > 0:
    raise UserError(f'{where}.noise: must be a positive number, not {noise!r}')
  sigma = residual_sigma(subject, limit)
  key, raw, mask = next(batches(subject, 'restoration', split))
  x = subject.preprocess(key, raw, False)['image'][: min(images, int(mask.sum()))]
  known = _known(unknown, x.shape, named_key(subject.key, 'unknown'))
  noisy = x + noise * jax.random.normal(named_key(subject.key, 'noise'), x.shape)
  everywhere = jnp.ones_like(x)
  restore = jax.jit(restorer(subject.method, starts, steps, samples))
  findings = Findings({'restoration/sigma': sigma})
  panels = {}
  key = named_key(subject.key, 'restore')
  for task, observed, seen, deviation, counted in (
    ('inpainting', x, known, sigma.value, 1 - known), ('denoising', noisy, everywhere, np.hypot(sigma.value, noise), everywhere),
  ):  # fmt: skip
    found = fetch(restore(subject.variables, observed, seen, jnp.float32(deviation), key))
    mean = lambda a, c=counted: np.asarray((c * a).sum((1, 2, 3)) / c.sum((1, 2, 3)))
    error = lambda image: average(mean((image - x) ** 2), 'squared error')
    findings.results |= {
      f'restoration/{task}/mse': error(found['mean']),
      f'restoration/{task}/mse_mode': error(found['mode']),
      f'restoration/{task}/components': average(found['components'], 'modes'),
    }
    if task == 'inpainting':
      findings.results[f'restoration/{task}/mse_mean_fill'] = error(_mean_image(subject))
      observed = jnp.where(seen > 0, x, 0.5)
    else:
      findings.results[f'restoration/{task}/mse_observed'] = error(noisy)
    drawn = [found['samples'][:, i] for i in range(min(4, samples))]
    shown = interleave(*(np.asarray(a) for a in (x, observed, found['mode'], found['mean'])), *drawn)[: 8 * (4 + len(drawn))]
    panels[task] = grid(shown, 4 + len(drawn))
  findings.images['restoration'] = Picture(
    beside(panels),
    'Restorations',
    'A row an image: original; corrupted; at the heaviest mode; mean over the posterior; then samples of the posterior. Restored '
    'images are decoder means throughout, known pixels included.',
  )
  return findings


def residual_sigma(subject: Subject, limit: int | None = None, split: str = 'valid') -> Result:
  """Root mean square of x - g(code of x) over the pixels of a split's images; the decoder is not clamped.

  For a linear autoencoder with d of D dimensions and noise of deviation s it is s sqrt(1 - d / D).
  """

  def square(variables, x, key):
    mean = subject.method.encode(variables['params'], variables['stats'], x, key)[0].px.mean[0]
    return {'square': jnp.square(x - mean).mean((1, 2, 3))}

  values = per_example(subject, 'restoration', square, split, limit)['square'].astype(np.float64)
  sigma = float(np.sqrt(values.mean()))
  stderr = float(values.std(ddof=1) / np.sqrt(len(values)) / (2 * sigma)) if len(values) > 1 and sigma > 0 else None
  return Result(sigma, 'deviation', len(values), stderr)


def restorer(method, starts: int, steps: int, samples: int):
  """Builds (variables, x [b, h, w, c], known [b, h, w, c] of 0 and 1, deviation [], key) -> tree of arrays by image.

  Its entries: mode, mean [b, h, w, c]; samples [b, samples, h, w, c]; components [b].
  """

  def function(variables, x, known, deviation, key):
    def image(u):
      vectors, log_prob = method.place(variables, u)
      return method.picture(variables, vectors), log_prob

    def one(args):
      x, known, key = args
      begin, draw = jax.random.split(key)

      def log_density(u, weight):
        mean, log_prob = image(u[None])
        log_px = jnp.where(known > 0, Normal(mean[0], deviation).log_prob(x), 0.0).sum()
        return log_prob[0] + weight * log_px

      def curvature(u):
        # Gauss-Newton, J^T J / deviation^2 for the likelihood: no direction is wider than the prior has it.
        of_prior = -jax.hessian(lambda u: method.place(variables, u[None])[1][0])(u)
        jacobian = jax.jacfwd(lambda u: (known * image(u[None])[0][0]).reshape(-1))(u)
        return of_prior + jacobian.T @ jacobian / jnp.square(deviation)

      found = laplace_mixture(log_density, method.starts(variables, begin, starts), steps, curvature, WIDEST**-2)
      drawn = image(found.sample(draw, samples))[0]
      best = image(found.loc[jnp.argmax(found.log_weights)][None])[0][0]
      components = (found.log_weights > -jnp.inf).sum()
      return {'mode': best, 'mean': drawn.mean(0), 'samples': drawn, 'components': components.astype(jnp.float32)}

    return jax.lax.map(one, (x, known, jax.random.split(key, len(x))))

  return function


def _known(unknown: str, shape: tuple[int, ...], key) -> jax.Array:
  """1 where a pixel is known, [b, h, w, c]; half of them."""
  b, h, w, _ = shape
  row, column = jnp.arange(h)[:, None], jnp.arange(w)[None]
  if unknown == 'random':
    order = jax.random.uniform(key, (b, h * w)).argsort(1).argsort(1)
    seen = (order < h * w // 2).reshape(b, h, w)
  else:
    side = 0.5 * jnp.sqrt(0.5)  # a box of half the area
    inside = (jnp.abs((row + 0.5) / h - 0.5) < side) & (jnp.abs((column + 0.5) / w - 0.5) < side)
    one = {'lower': (row < h // 2) | (column < 0), 'right': (column < w // 2) | (row < 0), 'centre': ~inside}[unknown]
    seen = jnp.broadcast_to(one, (b, h, w))
  return jnp.broadcast_to(seen[..., None], shape).astype(jnp.float32)


def _mean_image(subject: Subject) -> np.ndarray:
  """Mean of at most 5,000 training images, [h, w, c]."""
  limit = min(5000, len(subject.data['train']))
  return per_example(subject, 'restoration', lambda v, x, key: {'image': x}, 'train', limit)['image'].mean(0)
