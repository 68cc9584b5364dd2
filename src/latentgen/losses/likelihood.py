"""Gaussian reconstruction terms with the noise scale as a parameter, in nats."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike


def gaussian_nll(
  x: Float[Array, 'b *event'], loc: Float[Array, '...'], scale: Float[Array, '...'] | ScalarLike
) -> Float[Array, '...']:
  """Negative log-density under a diagonal Gaussian, summed over the axes of an event.

  nll = sum_d [log(2 pi scale_d^2) / 2 + (x_d - loc_d)^2 / (2 scale_d^2)]

  The event is what `x` has beside its batch axis, so leading sample axes of `loc` stay. Differentiated through `scale`
  it learns the noise: one scalar, one per image ([b, 1, 1, 1]) or one per pixel.

  Args:
    x: data, [b, *event].
    loc: decoder means, [*k, b, *event].
    scale: standard deviation in the units of x, broadcastable against `loc`.

  Returns:
    Nats, [*k, b].

  References:
    Lin, Roberts, Trigoni, Clark, "Balancing Reconstruction Quality and Regularisation in ELBO for VAEs", 2019,
    arXiv:1909.03765.
  """
  terms = jnp.log(scale) + 0.5 * jnp.square((x - loc) / scale)
  return (terms + 0.5 * math.log(2.0 * math.pi)).sum(tuple(range(1 - x.ndim, 0)))


def optimal_scale(
  x: Float[Array, 'b *event'], loc: Float[Array, '...'], *, per_example: bool = False, floor: float = 1e-3
) -> Float[Array, '...']:
  """The shared standard deviation that minimises `gaussian_nll`: sqrt(mean (x - loc)^2), at least `floor`.

  The gradient of the loss in `loc` is the same with the scale stopped or not, its optimum having zero slope.

  Args:
    x: data, [b, *event].
    loc: decoder means, [*k, b, *event].
    per_example: one scale an example instead of one for the batch.
    floor: smallest scale, in the units of x. At 0 a fit without any error has scale 0, and the gradient of its loss is NaN.

  Returns:
    [], or [*k, b, 1, ...] for `per_example`.

  References:
    Rybkin, Daniilidis, Levine, "Simple and Effective VAE Training with Calibrated Decoders", 2021, arXiv:2006.13202.
  """
  error = jnp.square(x - loc)
  mse = error.mean(tuple(range(1 - x.ndim, 0)), keepdims=True) if per_example else error.mean()
  return jnp.sqrt(jnp.maximum(mse, floor**2))
