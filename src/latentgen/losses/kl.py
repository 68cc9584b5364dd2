"""Closed-form KL terms and how they are weighted, in nats."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike


def free_bits(kl: Float[Array, '...'], floor: ScalarLike) -> Float[Array, '...']:
  """Elementwise floor on a rate: max(kl, floor); below the floor the gradient is zero.

  Args:
    kl: rate per group, nats. Average over the batch first for the published per-group form, sum over groups afterwards.
    floor: nats.

  Returns:
    Floored rate, same shape.

  References:
    Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016, arXiv:1606.04934.
  """
  return jnp.maximum(kl, floor)


def kl_balance(kl: Float[Array, 'l b'], alpha: Float[Array, ' l'], eps: ScalarLike = 0.01) -> Float[Array, ' l']:
  """Weights that hold the rates of the groups in balance while the KL is warmed up; no gradient flows through.

  a_l = (mean_b |kl_lb| + eps) / alpha_l,  gamma_l = a_l / mean_j a_j

  Args:
    kl: rate per group and example, nats, [l, b].
    alpha: target share per group, [l]: 4^s / G_s over its minimum, for scale s (0 coarsest) with G_s groups.
    eps: nats; keeps a dead group from losing all its weight.

  Returns:
    gamma, [l], mean one. Use it only while beta < 1, and ones afterwards.

  References:
    Vahdat, Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020, arXiv:2007.03898 (as in the
    published code).
  """
  share = (jnp.abs(kl).mean(1) + eps) / alpha
  return jax.lax.stop_gradient(share / share.mean())


def residual_kl(
  delta_mu: Float[Array, '...'], delta_log_sigma: Float[Array, '...'], log_sigma_p: Float[Array, '...']
) -> Float[Array, '...']:
  """KL of a posterior given relative to its prior, N(mu_p + dmu, (sigma_p dsigma)^2) from N(mu_p, sigma_p^2).

  KL = (dmu^2 / sigma_p^2 + dsigma^2 - log dsigma^2 - 1) / 2

  Args:
    delta_mu: dmu, [...].
    delta_log_sigma: log dsigma, [...].
    log_sigma_p: log standard deviation of the prior, [...].

  Returns:
    Elementwise KL, nats; exactly zero for dmu = 0, dsigma = 1. Soft clamps and scale floors are not part of it.

  References:
    Vahdat, Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020, arXiv:2007.03898, eq. 2.
  """
  twice = 2.0 * delta_log_sigma
  return 0.5 * (jnp.square(delta_mu * jnp.exp(-log_sigma_p)) + jnp.expm1(twice) - twice)
