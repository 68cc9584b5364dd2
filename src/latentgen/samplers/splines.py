"""Monotone rational-quadratic splines of one variable, in both directions."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MIN_BIN, MIN_SLOPE = 1e-3, 1e-3


def spline(
  x: Float[Array, '*n'], raw: Float[Array, '*n p'], interval: float, inverse: bool = False
) -> tuple[Float[Array, '*n'], Float[Array, '*n']]:
  """A smooth increasing function, the identity outside (-interval, interval); with raw = 0 everywhere.

  Between two knots (x_k, y_k), with s = (y_k+1 - y_k) / (x_k+1 - x_k), slopes d_k and t = (x - x_k) / (x_k+1 - x_k),

    y = y_k + (y_k+1 - y_k) (s t^2 + d_k t (1 - t)) / (s + (d_k+1 + d_k - 2 s) t (1 - t)).

  Args:
    x: where.
    raw: for every x, K widths and K heights of bins as logits and K - 1 slopes at inner knots before a softplus, p = 3 K - 1.
    interval: half width; both outer slopes are 1.
    inverse: evaluate the inverse function.

  Returns:
    (value, log of the derivative of what was evaluated), nats.

  References:
    Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows", 2019, arXiv 1906.04032, equations 4 to 8, 25 to 29.
  """
  bins = (raw.shape[-1] + 1) // 3
  widths, heights, slopes = jnp.split(raw, (bins, 2 * bins), -1)

  def knots(logits: Array) -> Array:
    share = MIN_BIN + (1.0 - MIN_BIN * bins) * jax.nn.softmax(logits)
    inner = 2.0 * interval * jnp.cumsum(share[..., :-1], -1) - interval
    ends = jnp.full((*inner.shape[:-1], 1), interval, inner.dtype)
    return jnp.concatenate([-ends, inner, ends], -1)

  xs, ys = knots(widths), knots(heights)
  slopes = MIN_SLOPE + jax.nn.softplus(slopes + math.log(math.expm1(1.0 - MIN_SLOPE)))
  ones = jnp.ones((*slopes.shape[:-1], 1), slopes.dtype)
  slopes = jnp.concatenate([ones, slopes, ones], -1)
  at = ys if inverse else xs
  inside = jnp.abs(x) < interval
  safe = jnp.where(inside, x, 0.0)
  index = (safe[..., None] >= at[..., 1:-1]).sum(-1)
  chosen = jax.nn.one_hot(index, bins, dtype=raw.dtype)
  pick = lambda a: (chosen * a).sum(-1)
  x0, y0, d0, d1 = pick(xs[..., :-1]), pick(ys[..., :-1]), pick(slopes[..., :-1]), pick(slopes[..., 1:])
  width, height = pick(jnp.diff(xs)), pick(jnp.diff(ys))
  s = height / width
  bend = d0 + d1 - 2.0 * s
  if inverse:
    gap = safe - y0
    a, b, c = height * (s - d0) + gap * bend, height * d0 - gap * bend, -s * gap
    t = 2.0 * c / (-b - jnp.sqrt(jnp.maximum(jnp.square(b) - 4.0 * a * c, 1e-30)))
    value = x0 + t * width
  else:
    t = (safe - x0) / width
    value = y0 + height * (s * jnp.square(t) + d0 * t * (1.0 - t)) / (s + bend * t * (1.0 - t))
  slope = jnp.square(s) * (d1 * jnp.square(t) + 2.0 * s * t * (1.0 - t) + d0 * jnp.square(1.0 - t))
  log_slope = jnp.log(slope) - 2.0 * jnp.log(s + bend * t * (1.0 - t))
  log_slope = jnp.where(inside, log_slope, 0.0)
  return jnp.where(inside, value, x), -log_slope if inverse else log_slope
