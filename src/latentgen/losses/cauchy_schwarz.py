"""Cauchy-Schwarz divergence between a diagonal Gaussian and a mixture of diagonal Gaussians, in closed form."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_MAX_ELEMENTS = 2**24  # of a [rows, c, d] intermediate; 64 MiB in float32


def cauchy_schwarz(q: Any, p: Any, *, convention: str = 'a') -> Float[Array, ' b']:
  """Cauchy-Schwarz divergence, zero iff q = p.

  D(q, p) = -log int q p + (1/2) log int q^2 + (1/2) log int p^2     (convention 'a'; 'b' is twice that)

  It is not a KL: log p(x) is not bounded by reconstruction minus a multiple of it.

  Args:
    q: diagonal Gaussians; an object with `loc`, `scale` [b, d], or that pair. Scales are standard deviations.
    p: mixture; an object with `weights` [c], `loc`, `scale` [c, d], or that triple. Weights sum to one, zeros allowed.
    convention: 'a' or 'b'.

  Returns:
    Divergence in nats per example, [b].

  Raises:
    ValueError: unknown convention.

  References:
    Tran, Pantic, Deisenroth, "Cauchy-Schwarz Regularized Autoencoder", 2022, arXiv:2101.02149.
    Kampa, Hasanbelliu, Principe, "Closed-form Cauchy-Schwarz PDF divergence for mixture of Gaussians", 2011 (whose
    eq. 3 prints (2 pi)^D where the self terms need (4 pi)^D).
  """
  if convention not in ('a', 'b'):
    raise ValueError(f"convention is 'a' or 'b', not {convention!r}")
  q_loc, q_scale = q if isinstance(q, tuple) else (q.loc, q.scale)
  weights, p_loc, p_scale = p if isinstance(p, tuple) else (p.weights, p.loc, p.scale)
  dtype = functools.reduce(jnp.promote_types, (jnp.result_type(a) for a in (q_loc, p_loc)), jnp.float32)
  q_loc, q_scale, weights, p_loc, p_scale = (jnp.asarray(a, dtype) for a in (q_loc, q_scale, weights, p_loc, p_scale))
  q_loc, q_scale = jnp.broadcast_arrays(q_loc, q_scale)
  p_loc, p_scale = jnp.broadcast_arrays(p_loc, p_scale)

  # int N_k N_l = |N_k| |N_l| exp(affinity_kl) with |N_k| = sqrt(int N_k^2). The norm of q cancels, and so do the powers
  # of pi in those of p: what is left does not grow with d when the densities agree.
  log_norm = -0.5 * jnp.log(p_scale).sum(-1)
  log_norm = log_norm - jax.lax.stop_gradient(log_norm.max())  # D does not change when all norms are rescaled
  cross = jax.nn.logsumexp(log_norm + _affinity(q_loc, q_scale, p_loc, p_scale), axis=-1, b=weights)
  pair = log_norm[:, None] + log_norm + _affinity(p_loc, p_scale, p_loc, p_scale)
  self_p = jax.nn.logsumexp(pair, b=weights[:, None] * weights)
  divergence = 0.5 * self_p - cross
  return 2.0 * divergence if convention == 'b' else divergence


def _affinity(
  loc_a: Float[Array, 'n d'], scale_a: Float[Array, 'n d'], loc_b: Float[Array, 'c d'], scale_b: Float[Array, 'c d']
) -> Float[Array, 'n c']:
  """log of int N_a N_b / sqrt(int N_a^2 int N_b^2), <= 0; large products go row by row and are recomputed backwards."""

  def row(a: tuple[Array, Array]) -> Array:
    loc, scale = a
    # (s + v) / (2 sqrt(s v)) = 1 + (sigma - tau)^2 / (2 sigma tau): exact at equality.
    mismatch = 0.5 * jnp.log1p(0.5 * jnp.square(scale - scale_b) / (scale * scale_b))
    distance = 0.5 * jnp.square(loc - loc_b) / (jnp.square(scale) + jnp.square(scale_b))
    return -(mismatch + distance).sum(-1)

  (n, d), c = loc_a.shape, loc_b.shape[0]
  if n * c * d <= _MAX_ELEMENTS:
    return jax.vmap(row)((loc_a, scale_a))
  return jax.lax.map(jax.checkpoint(row), (loc_a, scale_a), batch_size=max(1, _MAX_ELEMENTS // (c * d)))
