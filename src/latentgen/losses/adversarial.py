"""Non-saturating adversarial losses and the gradient penalty at real data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def discriminator(real_logits: Float[Array, '...'], fake_logits: Float[Array, '...']) -> Float[Array, '']:
  """Discriminator loss: mean softplus(-D(real)) + mean softplus(D(fake)).

  Args:
    real_logits: logits at data, [...].
    fake_logits: logits at generated points, [...].

  Returns:
    Loss in nats; 2 log 2 at chance.

  References:
    Goodfellow et al., "Generative Adversarial Networks", 2014, arXiv:1406.2661, eq. 1.
  """
  return jax.nn.softplus(-real_logits).mean() + jax.nn.softplus(fake_logits).mean()


def generator(fake_logits: Float[Array, '...']) -> Float[Array, '']:
  """Non-saturating generator loss: mean softplus(-D(fake)).

  Args:
    fake_logits: logits at generated points, [...].

  Returns:
    Loss in nats.

  References:
    Goodfellow et al., "Generative Adversarial Networks", 2014, arXiv:1406.2661, section 3.
  """
  return jax.nn.softplus(-fake_logits).mean()


def r1(discriminator_fn: Callable[[Array], Array], x: Float[Array, 'b *event']) -> Float[Array, '']:
  """Gradient penalty at real data: mean_b |dD(x_b)/dx_b|^2. Multiply by gamma / 2.

  Args:
    discriminator_fn: x [b, *event] -> logits with leading axis b, each example on its own.
    x: data, [b, *event].

  Returns:
    Mean squared gradient norm, the event summed.

  References:
    Mescheder, Geiger, Nowozin, "Which Training Methods for GANs do actually Converge?", 2018, arXiv:1801.04406, eq. 9.
  """
  gradient = jax.grad(lambda a: discriminator_fn(a).sum())(x)
  return jnp.square(gradient).sum() / x.shape[0]
