"""Samples and log-densities of a diffusion whose noise prediction is eps_theta(z, t) = sqrt(s_t) z / v_t + r(z, t).

r is what a prediction says beyond that of N(0, I): with r = 0 the prior is N(0, v_t I) at every t (v_0 = 1), and the
probability flow of a variance-preserving diffusion stands still, exactly.

Song, Sohl-Dickstein, Kingma, Kumar, Ermon and Poole, "Score-Based Generative Modeling through Stochastic Differential
Equations", 2021, arXiv 2011.13456, section 4.3. Grathwohl, Chen, Bettencourt, Sutskever and Duvenaud, "FFJORD", 2019, arXiv
1810.01367 (one probe for a whole solution).
"""

from collections.abc import Callable
import math

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latentgen.samplers.sdes import SDE

Residual = Callable[[Array, Array], Array]  # (z [n, *event], t [n]) -> r [n, *event], every example on its own

MAX_STEPS = 10_000
STAGES = 6  # evaluations a step of Tsitouras' method, whose last is the first of the next step


def flow(sde: SDE, residual: Residual, t: Array, z: Float[Array, 'n *event']) -> Float[Array, 'n *event']:
  """dz/dt of the probability-flow ODE, f z + g^2 eps_theta / (2 sqrt(s)), at one time t."""
  gain = 0.5 * sde.diffusion(t) / jnp.sqrt(sde.variance(t))
  return sde.spread_rate(t) * z + gain * residual(z, jnp.full(z.shape[:1], t))


def generate(
  sde: SDE, residual: Residual, z: Float[Array, 'n *event'], *, end: float = 1e-5, tolerance: float = 1e-5
) -> tuple[Float[Array, 'n *event'], Int[Array, '']]:
  """Follows the probability flow from t = 1 to `end`, by Tsitouras' 5(4) method with adaptive steps, one for all examples.

  Args:
    sde: the diffusion.
    residual: r.
    z: draws from N(0, v_1 I).
    end: time to stop at.
    tolerance: relative and absolute.

  Returns:
    (z at time `end`, evaluations of r); NaN if 10,000 steps do not suffice.
  """
  field = lambda t, z, _: flow(sde, residual, t, z)
  return _solve(field, z, 1.0, end, tolerance)


def log_density(
  sde: SDE,
  residual: Residual,
  z: Float[Array, 'n *event'],
  *,
  probes: Float[Array, 'm n *event'] | None = None,
  end: float = 1e-5,
  tolerance: float = 1e-5,
) -> tuple[Float[Array, ' n'], Int[Array, '']]:
  """log p(z) under the probability flow: log N(z_1; 0, v_1 I) + int_end^1 tr(d(dz/dt)/dz) dt.

  The trace is exact, by one backward pass for each of the D elements, or with `probes` Hutchinson's estimate mean_m v^T J v.

  Args:
    sde: the diffusion.
    residual: r.
    z: where; taken to be at time `end`.
    probes: v, mean 0 and covariance I; the same all along the flow, so that the integrand is smooth.
    end: time to start from.
    tolerance: relative and absolute.

  Returns:
    (nats [n], evaluations of the flow, each with its derivatives); NaN if 10,000 steps do not suffice.
  """
  size = math.prod(z.shape[1:])
  basis = jnp.eye(size).reshape(size, 1, *z.shape[1:])
  directions = jnp.broadcast_to(basis, (size, *z.shape)) if probes is None else probes
  scale = 1.0 if probes is None else 1.0 / probes.shape[0]

  def field(t, state, _):
    z = state[0]
    dz, pull = jax.vjp(lambda z: flow(sde, residual, t, z), z)
    along = lambda v: (v * pull(v)[0]).reshape(z.shape[0], -1).sum(-1)
    return dz, scale * jax.vmap(along)(directions).sum(0)

  (last, volume), evaluations = _solve(field, (z, jnp.zeros(z.shape[0])), end, 1.0, tolerance)
  v = sde.spread(1.0)
  norm = jnp.square(last).reshape(z.shape[0], -1).sum(-1)
  return volume - 0.5 * (norm / v + size * (math.log(2.0 * math.pi) + jnp.log(v))), evaluations


def _solve(field, state, start: float, end: float, tolerance: float):
  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(field),
    diffrax.Tsit5(),
    t0=start,
    t1=end,
    dt0=None,
    y0=state,
    stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    max_steps=MAX_STEPS,
    throw=False,
  )
  good = solution.result == diffrax.RESULTS.successful
  last = jax.tree.map(lambda y: jnp.where(good, y[-1], jnp.nan), solution.ys)
  return last, STAGES * solution.stats['num_steps'] + 2  # one to begin with, one more to choose the first step


def ancestral(
  sde: SDE, residual: Residual, key: Array, z: Float[Array, 'n *event'], *, steps: int = 1000, end: float = 1e-5
) -> Float[Array, 'n *event']:
  """Ancestral sampling on a grid of equal steps from t = 1 to `end`.

  z_r = (z_t - s_(t|r) eps_theta / sqrt(s_t)) / m_(t|r) + sqrt(s_(t|r) s_r / s_t) w, with m_(t|r) = m_t / m_r and
  s_(t|r) = s_t - m_(t|r)^2 s_r: the law of z_r given z_t and the prediction of z_0.

  Args:
    sde: the diffusion.
    residual: r.
    key: PRNG key.
    z: draws from N(0, v_1 I).
    steps: of the grid.
    end: time to stop at.

  Returns:
    z at time `end`.

  References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239, algorithm 2.
  """
  times = jnp.linspace(1.0, end, steps + 1)

  def step(z, inputs):
    t, r, key = inputs
    factor, s, below = sde.mean(t) / sde.mean(r), sde.variance(t), sde.variance(r)
    added = s - jnp.square(factor) * below
    eps = jnp.sqrt(s) * z / sde.spread(t) + residual(z, jnp.full(z.shape[:1], t))
    noise = jax.random.normal(key, z.shape, z.dtype)
    return (z - added / jnp.sqrt(s) * eps) / factor + jnp.sqrt(added * below / s) * noise, None

  return jax.lax.scan(step, z, (times[:-1], times[1:], jax.random.split(key, steps)))[0]
