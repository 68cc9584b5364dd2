"""A diffusion in few steps: its forward chain, the chain's posterior, and ancestral sampling by a prediction of the data.

Steps are numbered as in the papers: x_0 is the data, x_T nearly noise, and entry t of every array of a `Schedule` belongs to
step t, so that nothing is shifted by one; entry 0 is the step that does nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np


class Schedule(NamedTuple):
  """Coefficients of the chain, [T + 1] each, float32, indexed by step.

  q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
  q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), alpha_bar_t = prod_{s <= t} (1 - beta_s)
  q(x_{t-1} | x_t, x_0) = N(c1_t x_0 + c2_t x_t, v_t I)
  """

  beta: Any
  alpha_bar: Any
  c1: Any
  c2: Any
  v: Any

  @property
  def steps(self) -> int:
    """T."""
    return len(self.beta) - 1


def from_betas(beta: Any) -> Schedule:
  """The schedule of variances beta_1, ..., beta_T (a numpy array, in (0, 1)), computed in float64.

  c1_t = beta_t sqrt(alpha_bar_{t-1}) / (1 - alpha_bar_t), c2_t = sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t),
  v_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t); at t = 1 they are 1, 0, 0: the posterior is x_0 itself.

  Raises:
    ValueError: no step, or a variance that is not within (0, 1).
  """
  beta = np.asarray(beta, np.float64)
  if beta.ndim != 1 or not len(beta) or not ((beta > 0) & (beta < 1)).all():
    raise ValueError(f'need variances within (0, 1), one a step, not {beta}')
  alpha_bar = np.cumprod(1.0 - beta)
  before = np.concatenate([[1.0], alpha_bar[:-1]])
  rest = 1.0 - alpha_bar
  rest[0] = beta[0]
  rows = (
    (0.0, beta),
    (1.0, alpha_bar),
    (1.0, beta * np.sqrt(before) / rest),
    (0.0, np.sqrt(1.0 - beta) * (1.0 - before) / rest),
    (0.0, beta * (1.0 - before) / rest),
  )
  return Schedule(*(np.concatenate([[first], row]).astype(np.float32) for first, row in rows))


def vp_schedule(steps: int, beta_min: float = 0.1, beta_max: float = 20.0, first: float = 1e-3) -> Schedule:
  """T steps of the variance-preserving process.

  s(u) = 1 - exp(-beta_min u - (beta_max - beta_min) u^2 / 2),  u_i = (i / T) (1 - first) + first
  beta_i = 1 - (1 - s(u_i)) / (1 - s(u_{i-1}))

  Args:
    steps: T.
    beta_min: rate at u = 0.
    beta_max: rate at u = 1.
    first: where the process starts.

  References:
    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021, arXiv:2011.13456.
    Xiao, Kreis, Vahdat, "Tackling the Generative Learning Trilemma with Denoising Diffusion GANs", 2022, arXiv:2112.07804.
  """
  u = np.arange(steps + 1) / steps * (1.0 - first) + first
  kept = -beta_min * u - (beta_max - beta_min) * u**2 / 2.0  # log (1 - s)
  return from_betas(-np.expm1(np.diff(kept)))


def geometric_schedule(steps: int, var_min: float = 1e-4, var_max: float = 0.9999, first: float = 1e-3) -> Schedule:
  """T steps of a process whose noise variance grows geometrically, s(u) = var_min (var_max / var_min)^u; else `vp_schedule`."""
  u = np.arange(steps + 1) / steps * (1.0 - first) + first
  return from_betas(-np.expm1(np.diff(np.log1p(-var_min * (var_max / var_min) ** u))))


def q_sample(
  schedule: Schedule, key: Array, x0: Float[Array, 'b *event'], t: Int[Array, ' b']
) -> Float[Array, 'b *event']:
  """Draws x_t given the data: sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.

  Args:
    schedule: of the chain.
    key: PRNG key.
    x0: data, [b, *event].
    t: step per example, 0 to T; 0 gives the data back.

  Returns:
    x_t.
  """
  kept = _at(schedule.alpha_bar, t, x0)
  return jnp.sqrt(kept) * x0 + jnp.sqrt(1.0 - kept) * jax.random.normal(key, x0.shape, x0.dtype)


def q_sample_pair(
  schedule: Schedule, key: Array, x0: Float[Array, 'b *event'], t: Int[Array, ' b']
) -> tuple[Float[Array, 'b *event'], Float[Array, 'b *event']]:
  """Draws two neighbours (x_{t-1}, x_t) of the forward chain; at t = 1 the first is the data.

  Args:
    schedule: of the chain.
    key: PRNG key.
    x0: data, [b, *event].
    t: step per example, 1 to T.
  """
  one, other = jax.random.split(key)
  before = q_sample(schedule, one, x0, t - 1)
  beta = _at(schedule.beta, t, x0)
  return before, jnp.sqrt(1.0 - beta) * before + jnp.sqrt(beta) * jax.random.normal(other, x0.shape, x0.dtype)


def posterior_sample(
  schedule: Schedule, key: Array, x0: Float[Array, 'b *event'], x_t: Float[Array, 'b *event'], t: Int[Array, ' b']
) -> Float[Array, 'b *event']:
  """Draws x_{t-1} from q(x_{t-1} | x_t, x_0); at t = 1 it is x_0 without noise.

  Args:
    schedule: of the chain.
    key: PRNG key.
    x0: data, or a prediction of them, [b, *event].
    x_t: where the chain is, [b, *event].
    t: step per example, 1 to T.
  """
  c1, c2, v = (_at(a, t, x0) for a in (schedule.c1, schedule.c2, schedule.v))
  return c1 * x0 + c2 * x_t + jnp.sqrt(v) * jax.random.normal(key, x0.shape, x0.dtype)


def sample(
  schedule: Schedule,
  predict_x0: Callable[[Array, Array, Array], Array],
  key: Array,
  x_T: Float[Array, 'b *event'],  # noqa: N803
) -> Float[Array, 'b *event']:
  """Ancestral sampling in T predictions: for t = T, ..., 1 draw x_{t-1} from q(x_{t-1} | x_t, x_0 = predict_x0(key, x_t, t)).

  The chain is exact where the prediction is a draw from q(x_0 | x_t), and too narrow where it is its mean.

  Args:
    schedule: of the chain.
    predict_x0: (key, x_t [b, *event], t [b] int32) -> a draw of x_0, [b, *event].
    key: PRNG key.
    x_T: where to start, noise.

  Returns:
    x_0, [b, *event].
  """

  def body(x: Array, t: Array) -> tuple[Array, None]:
    predict, noise = jax.random.split(jax.random.fold_in(key, t))
    times = jnp.full(x.shape[:1], t)
    return posterior_sample(schedule, noise, predict_x0(predict, x, times), x, times), None

  return jax.lax.scan(body, x_T, jnp.arange(schedule.steps, 0, -1, dtype=jnp.int32))[0]


def _at(coefficients: Any, t: Array, like: Array) -> Array:
  """Entries t [b] as [b, 1, ...]."""
  return jnp.asarray(coefficients, like.dtype)[t].reshape(-1, *(1,) * (like.ndim - 1))
