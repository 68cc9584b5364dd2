"""Mixtures of Gaussians of any covariance over vectors, fitted by expectation maximisation."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.errors import UserError, near
from latentgen.types import Array, Key

COVARIANCES = ('full', 'diag')


@dataclasses.dataclass(frozen=True)
class FittedMixture:
  """p(u) = sum_k pi_k N(u; m_k, L_k L_k^T).

  Args:
    components: k.
    covariance: 'full', or 'diag' for diagonal L.
    floor: added to the variances.
    restarts: fits, from k-means each, of which the likeliest is kept.

  References:
    Ghosh, Sajjadi, Vergari, Black and Schölkopf, "From Variational to Deterministic Autoencoders", 2020, arXiv 1903.12436,
    section 4 (ex-post density estimation; 10 components of full covariance).
  """

  components: int = 10
  covariance: Literal['full', 'diag'] = 'full'
  floor: float = 1e-6
  restarts: int = 1
  exact = True
  samplers = ('mixture',)

  def init(self, key: Key, d: int) -> dict[str, Array]:
    c = self.components
    scale = jnp.broadcast_to(jnp.eye(d), (c, d, d)) if self.covariance == 'full' else jnp.ones((c, d))
    return {'log_weights': jnp.full(c, -math.log(c)), 'loc': jax.random.normal(key, (c, d)), 'scale': scale}

  def fit(self, key: Key, u: Any) -> dict[str, Array]:
    """Parameters for vectors [n, d].

    Raises:
      UserError: fewer vectors than components.
    """
    from sklearn.mixture import GaussianMixture

    if len(u) < self.components:
      raise UserError(f'method.prior.components is {self.components}, more than the {len(u)} codes')
    found = GaussianMixture(
      self.components, covariance_type=self.covariance, n_init=self.restarts, max_iter=1000, reg_covar=self.floor,
      random_state=int(jax.random.randint(key, (), 0, 2**31 - 1)),
    ).fit(np.asarray(u, np.float64))  # fmt: skip
    factor = np.linalg.cholesky if self.covariance == 'full' else np.sqrt
    values = {'log_weights': np.log(found.weights_), 'loc': found.means_, 'scale': factor(found.covariances_)}
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}

  def sample(self, params: Any, key: Key, n: int, d: int, sampler: str, temperature: float) -> Array:
    """[n, d]; the temperature is a factor on the deviations of the components."""
    del sampler
    pick, noise = jax.random.split(key)
    rows = jax.random.categorical(pick, params['log_weights'], shape=(n,))
    eps, scale = temperature * jax.random.normal(noise, (n, d)), params['scale'][rows]
    return params['loc'][rows] + (jnp.einsum('nij,nj->ni', scale, eps) if self.covariance == 'full' else scale * eps)

  def log_prob(self, params: Any, u: Array) -> Array:
    def component(loc: Array, scale: Array) -> Array:
      gap = u - loc
      if self.covariance == 'full':
        eps = jax.scipy.linalg.solve_triangular(scale, gap.T, lower=True).T
        log_det = jnp.log(jnp.diagonal(scale)).sum()
      else:
        eps, log_det = gap / scale, jnp.log(scale).sum()
      return -0.5 * (jnp.square(eps).sum(-1) + u.shape[-1] * math.log(2.0 * math.pi)) - log_det

    each = jax.vmap(component)(params['loc'], params['scale'])  # [c, n]
    return jax.nn.logsumexp(params['log_weights'][:, None] + each, axis=0)

  def evaluations(self, sampler: str) -> float:
    del sampler
    return 0.0


def build(**options) -> FittedMixture:
  """The density as a config names it; see FittedMixture.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  mixture = FittedMixture(**options)
  if mixture.covariance not in COVARIANCES:
    raise UserError(f'method.prior.covariance is {mixture.covariance!r}{near(mixture.covariance, COVARIANCES)}')
  for name in ('components', 'restarts'):
    value = getattr(mixture, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise UserError(f'method.prior.{name} is {value!r}, need a whole number of at least 1')
  if not mixture.floor > 0:
    raise UserError(f'method.prior.floor is {mixture.floor!r}, need a positive number')
  return mixture
