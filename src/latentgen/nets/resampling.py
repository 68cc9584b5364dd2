"""Halving and doubling maps through the filter [1, 3, 3, 1], or by averages; channels last, zeros outside the map.

Each function is what a depthwise convolution with the outer product of the filter does, but as sums of slices, one axis at
a time: XLA's grouped convolutions are slow on a CPU, and these also have fast gradients of any order.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, arXiv 1912.04958. Zhang, "Making Convolutional
Networks Shift-Invariant Again", 2019, arXiv 1904.11486.
"""

import jax.numpy as jnp

from latentgen.types import Array

FILTER = (1.0, 3.0, 3.0, 1.0)


def fir_downsample(x: Array) -> Array:
  """Halves both sides, [n, h, w, c] -> [n, h/2, w/2, c]: y_i = sum_k f_k x_{2i + k - 1}, f = (1, 3, 3, 1) / 8."""
  for axis in (1, 2):
    size = x.shape[axis]
    padded = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)])
    x = sum(weight / 8.0 * _every_second(padded, axis, k, k + size) for k, weight in enumerate(FILTER))
  return x


def fir_upsample(x: Array) -> Array:
  """Doubles both sides, [n, h, w, c] -> [n, 2h, 2w, c]: y_{2i} = (x_{i-1} + 3 x_i) / 4, y_{2i+1} = (3 x_i + x_{i+1}) / 4."""
  for axis in (1, 2):
    size = x.shape[axis]
    padded = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)])
    before, after = (_cut(padded, axis, start, start + size) for start in (0, 2))
    pair = jnp.stack([(before + 3.0 * x) / 4.0, (3.0 * x + after) / 4.0], axis + 1)
    x = pair.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
  return x


def mean_downsample(x: Array) -> Array:
  """Halves both sides by averages of 2x2 pixels, [n, h, w, c] -> [n, h/2, w/2, c]."""
  n, h, w, c = x.shape
  return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def _cut(x: Array, axis: int, start: int, stop: int, stride: int = 1) -> Array:
  return x[(slice(None),) * axis + (slice(start, stop, stride),)]


def _every_second(x: Array, axis: int, start: int, stop: int) -> Array:
  return _cut(x, axis, start, stop, 2)
