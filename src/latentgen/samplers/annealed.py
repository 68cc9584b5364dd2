"""Annealed Langevin dynamics: from the noisiest of a ladder of levels to the cleanest, by the scores of each."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

CONVENTIONS = {'half': 0.5, 'full': 1.0}  # drift over step size


def geometric_ladder(start: float, end: float, levels: int) -> Float[Array, ' levels']:
  """Noise levels in geometric progression, sigma_i = start (end / start)^((i - 1) / (levels - 1)), [levels].

  Args:
    start: first and largest standard deviation.
    end: last and smallest one.
    levels: how many.

  Raises:
    ValueError: unless start > end > 0 and there are two levels or more, or start = end and there is one.
  """
  falling = levels > 1 and start > end > 0
  if not falling and not (levels == 1 and start == end > 0):
    raise ValueError(f'{levels} levels from {start} to {end}: need a falling ladder of positive numbers')
  return jnp.geomspace(start, end, levels, dtype=jnp.float32)


def step_sizes(sigmas: Float[Array, ' levels'], eps: ScalarLike) -> Float[Array, ' levels']:
  """a_i = eps (sigma_i / sigma_L)^2, so that the signal-to-noise ratio of an update is that of every other level."""
  return eps * jnp.square(sigmas / sigmas[-1])


def annealed_langevin(
  score_fn: Callable[[Array, Array, Array], Array],
  key: Array,
  x0: Float[Array, 'n *event'],
  sigmas: Float[Array, ' levels'],
  *,
  steps: int,
  eps: ScalarLike,
  convention: Literal['half', 'full'] = 'half',
  clamp: Callable[[Array, Array, Array], Array] | None = None,
  denoise: bool = False,
  temperature: ScalarLike = 1.0,
) -> Float[Array, 'n *event']:
  """Runs `steps` unadjusted Langevin steps at each level, each level starting where the one before ended.

  'half': x <- x + (a_i / 2) s(x, i) + sqrt(a_i) w      (the paper's algorithm)
  'full': x <- x + a_i s(x, i) + sqrt(2 a_i) w          (the authors' code for images)
  with a_i = eps (sigma_i / sigma_L)^2 and w ~ N(0, I); eps in the 'full' form is 2 eps in the 'half' form.

  For a normal target of variance s^2 the stationary variance is s^2 / (1 - a / (4 s^2)) in the 'half' form and
  s^2 / (1 - a / (2 s^2)) in the 'full' form.

  Args:
    score_fn: (x [n, *event], index of the level [], its sigma []) -> score of the data perturbed by N(0, sigma^2 I),
      [n, *event]. A network looks at the index, a formula at sigma.
    key: PRNG key.
    x0: where the chains start.
    sigmas: noise standard deviations, from the largest to the smallest.
    steps: T, steps a level.
    eps: step size of the last level.
    convention: 'half' or 'full'.
    clamp: (x, sigma [], key) -> x, applied at the start of a level and after every step, with one key a level: it puts
      noisy known values in place, which is inpainting.
    denoise: ends by the mean of x given its noisy version, x + sigma_L^2 s(x, L).
    temperature: factor on the deviation of w; 1 samples, less goes towards the modes.

  Returns:
    The chains' ends.

  Raises:
    ValueError: an unknown convention, or no step.

  References:
    Song, Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019, arXiv:1907.05600,
    algorithms 1 and 2.
    Jolicoeur-Martineau, Piche-Taillefer, Tachet des Combes, Mitliagkas, "Adversarial score matching and improved
    sampling for image generation", 2020, arXiv:2009.05475 (the last denoising).
  """
  if convention not in CONVENTIONS:
    raise ValueError(f'convention is {convention!r}, need one of {", ".join(CONVENTIONS)}')
  if steps < 1:
    raise ValueError(f'steps is {steps}, need at least 1')
  drifts = CONVENTIONS[convention] * step_sizes(sigmas, eps)

  def at_level(x: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
    level, sigma, drift = inputs
    noise_key, clamp_key = jax.random.split(jax.random.fold_in(key, level))

    def hold(x: Array) -> Array:
      return x if clamp is None else clamp(x, sigma, clamp_key)

    def step(x: Array, index: Array) -> tuple[Array, None]:
      w = jax.random.normal(jax.random.fold_in(noise_key, index), x.shape, x.dtype)
      x = x + drift * score_fn(x, level, sigma) + temperature * jnp.sqrt(2.0 * drift) * w
      return hold(x).astype(x0.dtype), None

    return jax.lax.scan(step, hold(x), jnp.arange(steps))[0], None

  levels = jnp.arange(sigmas.shape[0])
  x, _ = jax.lax.scan(at_level, x0, (levels, sigmas, drifts))
  return x + jnp.square(sigmas[-1]) * score_fn(x, levels[-1], sigmas[-1]) if denoise else x
