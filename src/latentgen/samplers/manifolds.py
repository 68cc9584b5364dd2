"""Densities that a map carries from codes to the surface it parametrises."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def log_volume(function: Callable[[Array], Array], z: Float[Array, 'n d']) -> Float[Array, ' n']:
  """1/2 log det(J^T J) of a map at z: the log of how much it stretches volume.

  By the QR decomposition of J, sum_i log |R_ii|, which does not square J's condition number; J by forward differentiation.

  Args:
    function: [d] -> array of at least d entries.
    z: where.

  Returns:
    [n]; -inf where J has lost rank, never NaN.
  """

  def one(z: Array) -> Array:
    jacobian = jax.jacfwd(lambda z: function(z).reshape(-1))(z)
    r = jnp.linalg.qr(jacobian, mode='r')
    diagonal = jnp.abs(jnp.diagonal(r))
    lost = diagonal.min() <= jnp.finfo(diagonal.dtype).eps * max(jacobian.shape) * jnp.abs(r).max()
    return jnp.where(lost, -jnp.inf, jnp.log(jnp.where(lost, 1.0, diagonal)).sum())

  return jax.vmap(one)(z)


def on_manifold(
  function: Callable[[Array], Array], log_pz: Float[Array, ' n'], z: Float[Array, 'n d']
) -> Float[Array, ' n']:
  """log p(x) = log p(z) - 1/2 log det(J^T J) at x = G(z), nats with respect to the surface's own measure.

  Args:
    function: G, [d] -> array of at least d entries, one to one.
    log_pz: log-density of the codes, nats.
    z: the codes.

  Returns:
    [n]; -inf where J loses rank, as there is no density there: never NaN or +inf.

  References:
    Loaiza-Ganem, Ross, Cresswell and Caterini, "Diagnosing and Fixing Manifold Overfitting in Deep Generative Models", 2022,
    arXiv 2204.07172, equation 6.
  """
  volume = log_volume(function, z)
  return jnp.where(volume > -jnp.inf, log_pz - jnp.where(volume > -jnp.inf, volume, 0.0), -jnp.inf)
