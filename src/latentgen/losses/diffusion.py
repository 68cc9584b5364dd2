"""The cross-entropy of a diffusion prior, in nats."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike


def diffusion_cross_entropy(
  error: Float[Array, 'b *event'], weight: Float[Array, ' b'], start_variance: ScalarLike
) -> Float[Array, ' b']:
  """One-sample estimate of CE(q(z_e | x) || p(z_e)), where p is a diffusion prior down to its first time e.

  CE = int_e^1 g^2 / (2 s) E|eps - eps_theta(z_t, t)|^2 dt + (D / 2) log(2 pi exp(1) s_e),

  the constant being the entropy of q(z_e | z_0). With e -> 0 this is E_q[-log p(z_0)]; D counts the elements of the event.

  Args:
    error: eps - eps_theta(z_t, t), one time per example.
    weight: g^2 / (2 s) at that time, divided by the density that it was drawn from.
    start_variance: s_e.

  Returns:
    Nats, [b].

  References:
    Vahdat, Kreis, Kautz, "Score-based Generative Modeling in Latent Space", 2021, arXiv:2106.05931, theorem 1.
  """
  flat = error.reshape(error.shape[0], -1)
  constant = 0.5 * flat.shape[1] * (math.log(2.0 * math.pi) + 1.0 + jnp.log(start_variance))
  return weight * jnp.square(flat).sum(-1) + constant
