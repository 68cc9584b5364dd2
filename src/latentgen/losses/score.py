"""Score matching: losses whose minimiser is the gradient of a log-density."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def denoising_score_matching(
  score_fn: Callable[[Array, Array], Array],
  key: Array,
  x: Float[Array, 'b *event'],
  sigma: Float[Array, ' b'],
  *,
  power: float = 2.0,
) -> Float[Array, ' b']:
  """Denoising loss at given noise levels; weighted by sigma^2, as by default, all levels have one scale.

  loss = (sigma^p / 2) |s(x + sigma eps, sigma) + eps / sigma|^2 = (sigma^(p - 2) / 2) |sigma s(x + sigma eps, sigma) + eps|^2

  Args:
    score_fn: (noisy x [b, *event], sigma [b]) -> score [b, *event].
    key: PRNG key.
    x: data, [b, *event].
    sigma: noise standard deviation per example, [b].
    power: p.

  Returns:
    Loss summed over the event, [b].

  References:
    Vincent, "A Connection Between Score Matching and Denoising Autoencoders", 2011.
    Song, Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019, arXiv:1907.05600,
    eqs. 5-6.
  """
  noisy, eps, level = _perturb(key, x, sigma)
  residual = level * score_fn(noisy, sigma) + eps
  return 0.5 * _weight(sigma, power - 2.0) * _sum_event(jnp.square(residual))


def sliced_score_matching(
  score_fn: Callable[[Array], Array],
  key: Array,
  x: Float[Array, 'b *event'],
  *,
  projections: int = 1,
  variance_reduced: bool = True,
) -> Float[Array, ' b']:
  """Sliced score matching, v ~ N(0, I): variance-reduced, E_v [v^T (ds/dx) v] + (1/2) |s(x)|^2, or as it was first derived.

  Without the reduction the second term is (1/2) E_v [(v^T s(x))^2], which has the same mean.

  Args:
    score_fn: x [b, *event] -> score [b, *event], each example on its own.
    key: PRNG key.
    x: data, [b, *event].
    projections: number of directions v per example.
    variance_reduced: takes the expectation of the second term in closed form.

  Returns:
    Loss per example, [b]; equal to half the squared error of the score up to a constant of the data.

  References:
    Song, Garg, Shi, Ermon, "Sliced Score Matching", 2019, arXiv:1905.07088.
  """
  # Reverse mode, v^T (ds/dx): networks may bring gradients of their own, through which there is no forward mode.
  score, pull = jax.vjp(score_fn, x)
  v = jax.random.normal(key, (projections, *x.shape), x.dtype)
  trace = jax.vmap(lambda v: _sum_event(v * pull(v)[0]))(v)
  square = _sum_event(jnp.square(score))
  if not variance_reduced:
    square = jax.vmap(lambda v: jnp.square(_sum_event(v * score)))(v).mean(0)
  return trace.mean(0) + 0.5 * square


def noisy_sliced_score_matching(
  score_fn: Callable[[Array, Array], Array],
  key: Array,
  x: Float[Array, 'b *event'],
  sigma: Float[Array, ' b'],
  *,
  power: float = 2.0,
  projections: int = 1,
  variance_reduced: bool = True,
) -> Float[Array, ' b']:
  """Sliced score matching of the perturbed data, sigma^p times `sliced_score_matching` at x + sigma eps.

  Its minimiser is that of `denoising_score_matching`; it does not need the density of the noise, and varies more.

  Args:
    score_fn: (noisy x [b, *event], sigma [b]) -> score [b, *event], each example on its own.
    key: PRNG key.
    x: data, [b, *event].
    sigma: noise standard deviation per example, [b].
    power: p.
    projections: number of directions v per example.
    variance_reduced: see `sliced_score_matching`.

  Returns:
    Loss per example, [b]; may be negative.

  References:
    Song, Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019, arXiv:1907.05600,
    section 4.2.
  """
  noise_key, slice_key = jax.random.split(key)
  noisy, _, _ = _perturb(noise_key, x, sigma)
  loss = sliced_score_matching(
    lambda y: score_fn(y, sigma), slice_key, noisy, projections=projections, variance_reduced=variance_reduced
  )
  return _weight(sigma, power) * loss


def _perturb(key: Array, x: Array, sigma: Array) -> tuple[Array, Array, Array]:
  """(x + sigma eps, eps, sigma as it broadcasts to x)."""
  level = sigma.reshape(-1, *(1,) * (x.ndim - 1))
  eps = jax.random.normal(key, x.shape, x.dtype)
  return x + level * eps, eps, level


def _weight(sigma: Array, power: float) -> Array:
  return sigma**power if power else jnp.ones_like(sigma)


def _sum_event(x: Array) -> Array:
  return x.sum(tuple(range(1, x.ndim)))
