"""Weight-normalised layers with data-dependent initialisation, and the gated residual block of ladder networks.

Salimans and Kingma, "Weight Normalization", 2016, arXiv 1602.07868. Maaloe, Fraccaro, Lievin and Winther, "BIVA: A Very Deep
Hierarchy of Latent Variables for Generative Modeling", 2019, arXiv 1902.02102.
"""

import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from latentgen.nets import convolution
from latentgen.types import Array

CONSTANT = 1e-6  # standard deviations below this are those of a unit that does not vary over the batch


class Normed(nn.Module):
  """Dense layer or convolution with w = gain v / ||v|| per output; SAME padding.

  `gain` [o] and `bias` [o] are set by the batch that the module is initialised on: every output has mean 0 and standard
  deviation `init_scale` over it. `kernel` v starts as N(0, 0.05^2). All three are float32.

  Args:
    features: outputs o.
    kernel_size: of the convolution; 0 is a dense layer on the last axis.
    stride: of the convolution.
    init_scale: standard deviation of every output on the first batch.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 0
  stride: int = 1
  init_scale: float = 0.01
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., i] -> [..., o], or [n, h, w, i] -> [n, ceil(h / stride), ceil(w / stride), o]."""
    k = self.kernel_size
    shape = (*(k, k) * (k > 0), x.shape[-1], self.features)
    # Drawn flat: XLA's CPU backend compiles draws of several axes many times slower.
    kernel = self.param('kernel', lambda key: 0.05 * jax.random.normal(key, (math.prod(shape),)).reshape(shape))
    direction = kernel / jnp.sqrt(jnp.square(kernel).sum(tuple(range(kernel.ndim - 1)), keepdims=True))

    def linear(kernel: Array) -> Array:
      kernel = kernel.astype(self.dtype)
      if not k:
        return x.astype(self.dtype) @ kernel
      odd = jnp.pad(x, ((0, 0), (0, 1 - k % 2), (0, 1 - k % 2), (0, 0)))  # `convolve` pads (k - 1) // 2 on every side
      return convolution.convolve(odd.astype(self.dtype), kernel, self.stride)

    gain = bias = jnp.zeros(self.features)
    if self.is_initializing():
      raw = linear(direction).astype(jnp.float32).reshape(-1, self.features)
      scale = raw.std(0)
      gain = jnp.where(scale > CONSTANT, self.init_scale / jnp.maximum(scale, CONSTANT), 1.0)
      bias = -raw.mean(0) * gain
    gain, bias = self.param('gain', lambda _: gain), self.param('bias', lambda _: bias)
    return linear(gain * direction) + bias.astype(self.dtype)


def enlarge(x: Array, size: tuple[int, int]) -> Array:
  """[n, h, w, c] by repetition to [n, *size, c], at most twice as large."""
  return x if x.shape[1:3] == size else convolution.nearest_upsample(x)[:, : size[0], : size[1]]


class Gated(nn.Module):
  """h = dropout(elu(conv(elu(x)) + proj(elu(aux)))); a, b = conv(h); shortcut(x) + a sigmoid(b).

  The projection is 1x1, or k x k after an enlargement where aux is smaller than x. The shortcut averages over strides and adds
  channels of zeros; there is none where the map grows or the channels shrink. Maps grow by repetition before a convolution.

  Args:
    filters: output channels.
    kernel_size: k of the convolutions.
    stride: of the second one.
    shortcut: False leaves the shortcut out.
    dropout: rate.
    init_scale: see Normed.
    dtype: of the computation.
  """

  filters: int
  kernel_size: int = 3
  stride: int = 1
  shortcut: bool = True
  dropout: float = 0.0
  init_scale: float = 0.01
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, aux: Array | None = None, size: tuple[int, int] | None = None, train: bool = False) -> Array:
    """[n, h, w, c], aux [n, h', w', c'] with h' = h or h / 2, size of the output if that is larger -> [n, *size, filters]."""

    def conv(features: int, kernel_size: int, stride: int = 1, name: str = '') -> Normed:
      return Normed(features, kernel_size, stride, self.init_scale, self.dtype, name=name)

    h = conv(self.filters, self.kernel_size, name='inner')(nn.elu(x))
    if aux is not None:
      kernel_size = 1 if aux.shape[1:3] == x.shape[1:3] else self.kernel_size
      h = h + conv(self.filters, kernel_size, name='aux')(nn.elu(enlarge(aux, x.shape[1:3])))
    h = nn.Dropout(self.dropout, rng_collection='sample', deterministic=not train)(nn.elu(h))
    grown = size is not None and size != x.shape[1:3]
    h = conv(2 * self.filters, self.kernel_size, self.stride, 'outer')(enlarge(h, size) if grown else h)
    value, gate = jnp.split(h, 2, -1)
    out = value * nn.sigmoid(gate)
    if not self.shortcut or grown or x.shape[-1] > self.filters:
      return out
    if self.stride > 1:
      x = nn.avg_pool(x, (self.stride,) * 2, (self.stride,) * 2, 'SAME', count_include_pad=False)
    return out + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.filters - x.shape[-1])))
