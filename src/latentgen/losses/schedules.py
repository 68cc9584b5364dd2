"""Schedules of loss weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike


def kl_warmup(
  step: ScalarLike,
  total_steps: ScalarLike,
  start: ScalarLike = 1e-4,
  portion: ScalarLike = 0.3,
  minimum: ScalarLike = 1e-4,
) -> Float[Array, '']:
  """Linear warm-up of the weight of the KL: clip((t - start T) / (portion T), minimum, 1).

  Args:
    step: t, counts from 0.
    total_steps: T.
    start: share of T before the ramp.
    portion: share of T that the ramp takes; 0 switches at its start.
    minimum: smallest weight.

  Returns:
    beta in [minimum, 1].

  References:
    Vahdat, Kautz, "NVAE", 2020, arXiv:2007.03898 (published code).
  """
  ramp = jnp.maximum(jnp.asarray(portion * total_steps, jnp.float32), 1e-8)
  return jnp.clip((step - start * total_steps) / ramp, minimum, 1.0)


def log_interpolate(init: ScalarLike, final: ScalarLike, fraction: ScalarLike) -> Float[Array, '']:
  """Geometric interpolation: init^(1 - fraction) final^fraction.

  Args:
    init: value at fraction 0, > 0.
    final: value at fraction 1, > 0.
    fraction: in [0, 1], such as beta of `kl_warmup`.

  Returns:
    The interpolated value.
  """
  return jnp.exp((1.0 - fraction) * jnp.log(init) + fraction * jnp.log(final))
