"""Residual cells of NVAE: out = skip(x) + 0.1 branch(x), channels last.

Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020, arXiv 2007.03898, section 3 and figure 3.
"""

from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from latentgen.nets.convolution import bilinear_upsample, nearest_upsample
from latentgen.nets.layers import Conv, SqueezeExcite, batch_norm, swish
from latentgen.types import Array

BRANCH_WEIGHT = 0.1


class FactorizedReduction(nn.Module):
  """Halves the map and keeps all pixel phases: Swish, then four strided 1x1 convolutions, one a pixel of a block."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[n, h, w, c] -> [n, h/2, w/2, features], h and w even."""
    x = swish(x)
    quarter = self.features // 4
    parts = []
    for i, (row, column) in enumerate(((0, 0), (1, 1), (0, 1), (1, 0))):
      width = quarter if i < 3 else self.features - 3 * quarter
      phase = x[:, row::2, column::2]
      parts.append(Conv(width, 1, weight_norm=True, dtype=self.dtype, name=f'phase_{row}{column}')(phase))
    return jnp.concatenate(parts, -1)


class EncoderCell(nn.Module):
  """[BatchNorm, Swish, Conv3x3] twice, squeeze-and-excitation; weight-normalised convolutions.

  Args:
    features: output channels.
    down: halves the map, by the stride of the first convolution.
    squeeze_excite: gates the channels of the branch.
    train: BatchNorm uses and updates batch statistics.
    dtype: of the computation.
  """

  features: int
  down: bool = False
  squeeze_excite: bool = True
  train: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[n, h, w, c] -> [n, h, w, features], halved if `down`."""
    h = x
    for stride in (2 if self.down else 1, 1):
      h = swish(batch_norm(self.train, self.dtype)(h))
      h = Conv(self.features, 3, stride, weight_norm=True, dtype=self.dtype)(h)
    if self.squeeze_excite:
      h = SqueezeExcite(self.dtype)(h)
    skip = FactorizedReduction(self.features, self.dtype, name='skip')(x) if self.down else x
    return skip + BRANCH_WEIGHT * h


class DecoderCell(nn.Module):
  """Inverted bottleneck: BatchNorm, 1x1 expansion, depthwise 5x5, 1x1 projection, squeeze-and-excitation.

  Args:
    features: output channels.
    expansion: hidden channels over input channels.
    up: doubles the map.
    squeeze_excite: gates the channels of the branch.
    train: BatchNorm uses and updates batch statistics.
    dtype: of the computation.
  """

  features: int
  expansion: int = 6
  up: bool = False
  squeeze_excite: bool = True
  train: bool = False
  dtype: Any = jnp.float32

  def setup(self) -> None:
    if self.up:
      self.skip = Upsample(self.features, self.dtype)

  def __call__(self, x: Array) -> Array:
    """[n, h, w, c] -> [n, h, w, features], doubled if `up`."""
    return (self.skip(x) if self.up else x) + BRANCH_WEIGHT * self.branch(x)

  @nn.compact
  def branch(self, x: Array) -> Array:
    """[n, h, w, c] -> [n, h, w, features], doubled if `up`."""

    def conv(features: int, size: int, depthwise: bool = False) -> Conv:
      return Conv(features, size, use_bias=False, depthwise=depthwise, dtype=self.dtype)

    hidden = self.expansion * x.shape[-1]
    h = conv(hidden, 1)(batch_norm(self.train, self.dtype)(x))
    h = swish(batch_norm(self.train, self.dtype)(h))
    if self.up:
      # NVAE repeats the pixels before the first BatchNorm. All layers so far act on single pixels, and repetition
      # leaves batch statistics as they are, so this is the same function at a quarter of the cost.
      h = nearest_upsample(h)
    h = conv(hidden, 5, depthwise=True)(h)
    h = swish(batch_norm(self.train, self.dtype)(h))
    h = batch_norm(self.train, self.dtype)(conv(self.features, 1)(h))
    return SqueezeExcite(self.dtype)(h) if self.squeeze_excite else h


class Upsample(nn.Module):
  """Bilinear doubling with aligned corners and a 1x1 convolution; they commute, convolution first is cheaper."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[n, h, w, c] -> [n, 2h, 2w, features]."""
    return bilinear_upsample(Conv(self.features, 1, weight_norm=True, dtype=self.dtype, name='conv')(x))
