"""Score matching: losses whose minimiser is the gradient of a log-density."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def denoising_score_matching(
  score_fn: Callable[[Array, Array], Array], key: Array, x: Float[Array, 'b *event'], sigma: Float[Array, ' b']
) -> Float[Array, ' b']:
  """Denoising loss at given noise levels, weighted by sigma^2 so that all levels have one scale.

  loss = (sigma^2 / 2) |s(x + sigma eps, sigma) + eps / sigma|^2 = (1/2) |sigma s(x + sigma eps, sigma) + eps|^2

  Args:
    score_fn: (noisy x [b, *event], sigma [b]) -> score [b, *event].
    key: PRNG key.
    x: data, [b, *event].
    sigma: noise standard deviation per example, [b].

  Returns:
    Loss summed over the event, [b].

  References:
    Vincent, "A Connection Between Score Matching and Denoising Autoencoders", 2011.
    Song, Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019, arXiv:1907.05600,
    eqs. 5-6.
  """
  level = sigma.reshape(-1, *(1,) * (x.ndim - 1))
  eps = jax.random.normal(key, x.shape, x.dtype)
  residual = level * score_fn(x + level * eps, sigma) + eps
  return 0.5 * _sum_event(jnp.square(residual))


def sliced_score_matching(
  score_fn: Callable[[Array], Array], key: Array, x: Float[Array, 'b *event'], *, projections: int = 1
) -> Float[Array, ' b']:
  """Variance-reduced sliced score matching: E_v [v^T (ds/dx) v] + (1/2) |s(x)|^2 with v ~ N(0, I).

  Args:
    score_fn: x [b, *event] -> score [b, *event], each example on its own.
    key: PRNG key.
    x: data, [b, *event].
    projections: number of directions v per example.

  Returns:
    Loss per example, [b]; equal to half the squared error of the score up to a constant of the data.

  References:
    Song, Garg, Shi, Ermon, "Sliced Score Matching", 2019, arXiv:1905.07088.
  """

  def curvature(v: Array) -> tuple[Array, Array]:
    score, directional = jax.jvp(score_fn, (x,), (v,))
    return score, _sum_event(v * directional)

  v = jax.random.normal(key, (projections, *x.shape), x.dtype)
  score, trace = jax.vmap(curvature, out_axes=(None, 0))(v)
  return trace.mean(0) + 0.5 * _sum_event(jnp.square(score))


def _sum_event(x: Array) -> Array:
  return x.sum(tuple(range(1, x.ndim)))
