"""Kernel density over vectors: a Gaussian around every example, of the width under which the others predict each best."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.errors import UserError
from latentgen.types import Array, Key

CHUNK = 512  # rows of a table of distances in memory at a time
NARROW, WIDE = 1e-3, 2.0  # between which the bandwidth is looked for, times the vectors' root mean square deviation


@dataclasses.dataclass(frozen=True)
class Kernels:
  """p(u) = 1/n sum_i N(u; u_i, h^2 I), over at most `points` examples, chosen at random where there are more.

  Args:
    points: how many at most.
    bandwidth: h, in the units of the vectors; 0 is the one that maximises the mean leave-one-out log-density,
      1/n sum_i log 1/(n-1) sum_{j != i} N(u_i; u_j, h^2 I).

  References:
    Duin, "On the choice of smoothing parameters for Parzen estimators of probability density functions", 1976.
  """

  points: int = 5000
  bandwidth: float = 0.0
  exact = True
  samplers = ('kernel',)

  def init(self, key: Key, d: int) -> dict[str, Array]:
    weights = jnp.zeros(self.points).at[0].set(1.0)
    return {'points': jax.random.normal(key, (self.points, d)), 'weights': weights, 'bandwidth': jnp.ones(())}

  def fit(self, key: Key, u: Any) -> dict[str, Array]:
    """Parameters for vectors [n, d]; places that no example fills have weight 0.

    Raises:
      UserError: fewer than two vectors.
    """
    if len(u) < 2:
      raise UserError('method.prior: a kernel density needs at least two codes')
    rows = np.asarray(jax.random.permutation(key, len(u)))[: self.points]
    chosen = np.asarray(u, np.float64)[rows]
    n, d = chosen.shape
    points, weights = np.zeros((self.points, d), np.float32), np.zeros(self.points, np.float32)
    points[:n], weights[:n] = chosen, 1.0 / n
    bandwidth = self.bandwidth or best_bandwidth(chosen)
    return {'points': jnp.asarray(points), 'weights': jnp.asarray(weights), 'bandwidth': jnp.asarray(bandwidth, jnp.float32)}

  def sample(self, params: Any, key: Key, n: int, d: int, sampler: str, temperature: float) -> Array:
    """[n, d]; the temperature is a factor on the bandwidth."""
    del sampler
    pick, noise = jax.random.split(key)
    rows = jax.random.choice(pick, self.points, (n,), p=params['weights'])
    return params['points'][rows] + temperature * params['bandwidth'] * jax.random.normal(noise, (n, d))

  def log_prob(self, params: Any, u: Array) -> Array:
    """Nats, [n]; in memory O(n CHUNK)."""
    d, chunks = u.shape[1], -(-self.points // CHUNK)
    more = chunks * CHUNK - self.points
    points = jnp.pad(params['points'], ((0, more), (0, 0))).reshape(chunks, CHUNK, d)
    weights = jnp.pad(params['weights'], (0, more)).reshape(chunks, CHUNK)

    def exponent(centres: Array) -> Array:
      return -0.5 * jnp.square((u[:, None] - centres) / params['bandwidth']).sum(-1)

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
      terms = jnp.concatenate([total[:, None], exponent(chunk[0])], 1)
      return jax.nn.logsumexp(terms, axis=1, b=jnp.append(1.0, chunk[1])), None

    # The first chunk is never without an example, so that the running sum is finite from there on.
    start = jax.nn.logsumexp(exponent(points[0]), axis=1, b=weights[0])
    total, _ = jax.lax.scan(add, start, (points[1:], weights[1:]))
    return total - d * (jnp.log(params['bandwidth']) + 0.5 * math.log(2.0 * math.pi))

  def evaluations(self, sampler: str) -> float:
    del sampler
    return 0.0


def leave_one_out(u: np.ndarray, bandwidth: float) -> float:
  """1/n sum_i log 1/(n-1) sum_{j != i} N(u_i; u_j, h^2 I) in nats, for u [n, d] in float64."""
  from scipy.special import logsumexp

  n, d = u.shape
  total = 0.0
  for start in range(0, n, CHUNK):
    rows = np.arange(start, min(start + CHUNK, n))
    square = (u[rows] ** 2).sum(1)[:, None] + (u**2).sum(1) - 2 * u[rows] @ u.T
    square[np.arange(len(rows)), rows] = np.inf
    total += logsumexp(-0.5 * np.maximum(square, 0) / bandwidth**2, axis=1).sum()
  return total / n - math.log(n - 1) - d * (math.log(bandwidth) + 0.5 * math.log(2 * math.pi))


def best_bandwidth(u: np.ndarray) -> float:
  """Where `leave_one_out` is largest, to a thousandth."""
  from scipy.optimize import minimize_scalar

  u = u - u.mean(0)
  spread = max(math.sqrt(u.var(0).mean()), 1e-12)
  ends = math.log(NARROW * spread), math.log(WIDE * spread)
  found = minimize_scalar(lambda h: -leave_one_out(u, math.exp(h)), bounds=ends, method='bounded', options={'xatol': 1e-3})
  return math.exp(found.x)


def build(*, points: int = 5000, bandwidth: float = 0.0) -> Kernels:
  """The density as a config names it; see Kernels.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  if isinstance(points, bool) or not isinstance(points, int) or points < 2:
    raise UserError(f'method.prior.points is {points!r}, need a whole number of at least 2')
  if not bandwidth >= 0:
    raise UserError(f'method.prior.bandwidth is {bandwidth!r}, need a positive number, or 0 for the best')
  return Kernels(points, bandwidth)
