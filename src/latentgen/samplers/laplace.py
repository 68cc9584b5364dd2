"""Posteriors as mixtures of Gaussians: modes found from several starts, each with the curvature there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import optax

NEWTON = 4  # steps after the descent
FIRST, LAST = 0.2, 0.5  # weight of the likelihood over the first half of the descent; 1 thereafter


class LaplaceMixture(NamedTuple):
  """sum_i w_i N(loc_i, F_i F_i^T)."""

  log_weights: Any  # [s]; normalised, -inf for what is found twice
  loc: Any  # [s, d]
  factor: Any  # [s, d, d]
  log_density: Any  # [s]; at loc, nats, unnormalised

  def sample(self, key: Array, n: int) -> Float[Array, 'n d']:
    """n independent draws."""
    pick, noise = jax.random.split(key)
    rows = jax.random.categorical(pick, self.log_weights, shape=(n,))
    eps = jax.random.normal(noise, (n, self.loc.shape[1]))
    return self.loc[rows] + jnp.einsum('nij,nj->ni', self.factor[rows], eps)


def annealing(steps: int) -> Float[Array, ' steps']:
  """Weights of the likelihood: from 0.2 to 0.5 over the first half, then 1."""
  half = steps // 2
  return jnp.concatenate([jnp.linspace(FIRST, LAST, half), jnp.ones(steps - half)])


def climb(
  log_density: Callable[[Array, Array], Array], starts: Float[Array, 's d'], steps: int, rate: float = 0.1, last: float = 1e-4
) -> Float[Array, 's d']:
  """Adam on independent starts while the likelihood's weight rises (`annealing`); rates fall geometrically.

  Args:
    log_density: (u [d], weight []) -> nats, [].
    starts: where from.
    steps: how many.
    rate: first learning rate.
    last: last learning rate.

  References:
    Böhm and Seljak, "Probabilistic Autoencoder", 2022, arXiv 2006.05479, section 5.
  """
  transform = optax.adam(optax.exponential_decay(rate, max(steps, 1), last / rate))
  gradient = jax.vmap(jax.grad(log_density), (0, None))

  def step(carry: Any, weight: Array) -> tuple[Any, None]:
    u, state = carry
    delta, state = transform.update(-gradient(u, weight), state, u)
    return (u + delta, state), None

  return jax.lax.scan(step, (starts, transform.init(starts)), annealing(steps))[0][0]


def laplace_mixture(
  log_density: Callable[[Array, Array], Array],
  starts: Float[Array, 's d'],
  steps: int,
  hessian: Callable[[Array], Array] | None = None,
  least: float = 1e-3,
) -> LaplaceMixture:
  """A mixture over the modes that starts lead to.

  w_i is proportional to exp(log p(loc_i)) det(Sigma_i)^(1/2), Sigma_i the inverse of minus the Hessian at loc_i; starts that end at
  one mode count once.

  Args:
    log_density: (u [d], weight of the likelihood []) -> unnormalised log posterior in nats, [].
    starts: where the descents begin.
    steps: of Adam; see `climb`. Four steps of Newton's method follow, each taken only where it climbs.
    hessian: u [d] -> minus the Hessian [d, d] of log_density(u, 1), or what stands for it (Gauss-Newton); jax.hessian by default.
    least: floor of its eigenvalues, for places that are no maximum.

  References:
    Böhm and Seljak, "Probabilistic Autoencoder", 2022, arXiv 2006.05479, section 5.
  """
  full = lambda u: log_density(u, jnp.ones(()))
  curvature = hessian or (lambda u: -jax.hessian(full)(u))

  def inverse_root(u: Array) -> tuple[Array, Array]:
    """(F with F F^T the covariance, log det F)."""
    values, vectors = jnp.linalg.eigh(curvature(u))
    values = jnp.maximum(values, least)
    return vectors / jnp.sqrt(values), -0.5 * jnp.log(values).sum()

  def newton(u: Array, _: Any) -> tuple[Array, None]:
    factor, _ = inverse_root(u)
    moved = u + factor @ (factor.T @ jax.grad(full)(u))
    return jnp.where(full(moved) > full(u), moved, u), None

  polish = lambda u: jax.lax.scan(newton, u, None, NEWTON)[0]
  loc = jax.vmap(polish)(climb(log_density, starts, steps))
  factor, log_det = jax.vmap(inverse_root)(loc)
  log_p = jax.vmap(full)(loc)
  raw = jnp.where(distinct(loc, factor), log_p + log_det, -jnp.inf)
  return LaplaceMixture(jax.nn.log_softmax(raw), loc, factor, log_p)


def distinct(loc: Float[Array, 's d'], factor: Float[Array, 's d d'], closer: float = 0.1) -> Bool[Array, ' s']:
  """Whether no earlier one is within `closer` standard deviations of its own Gaussian."""
  gap = loc[:, None] - loc[None]
  eps = jax.vmap(lambda f, rows: jnp.linalg.solve(f, rows.T).T, (0, 1), 1)(factor, gap)  # [i, j] by the scale of j
  near = jnp.sqrt(jnp.square(eps).sum(-1)) < closer
  return ~jnp.tril(near, -1).any(1)
