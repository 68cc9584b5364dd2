"""The noise-conditional score network: a RefineNet with dilated convolutions and conditional instance norm.

Song and Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019, arXiv 1907.05600, appendix A.
Lin, Milan, Shen and Reid, "RefineNet: Multi-Path Refinement Networks for High-Resolution Semantic Segmentation", 2017, arXiv
1611.06612.
"""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latentgen.errors import UserError
from latentgen.nets import convolution
from latentgen.nets.layers import Conv
from latentgen.types import Array, Key

EPSILON = 1e-5  # under the roots of the norm


class Norm(nn.Module):
  """Conditional instance norm++: gamma_i ((x - m) / s + alpha_i (m - mean(m)) / std(m)) + beta_i.

  m and s are mean and standard deviation over the pixels of a channel of one image, mean(m) and std(m) are over its
  channels. So nothing depends on the other images of a batch, and shifts between channels, which instance norm loses, stay.
  gamma_i, alpha_i and beta_i are rows of a table, one a noise level.
  """

  levels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, level: Array) -> Array:
    """[b, h, w, c], int [b] -> [b, h, w, c]."""
    channels = x.shape[-1]

    def first(key: Key) -> Array:
      ones = 1.0 + 0.02 * jax.random.normal(key, (self.levels, 2, channels))
      return jnp.concatenate([ones, jnp.zeros((self.levels, 1, channels))], 1)

    gamma, alpha, beta = jnp.moveaxis(self.param('table', first)[level], 1, 0)[:, :, None, None]
    x = x.astype(jnp.float32)
    mean = x.mean((1, 2), keepdims=True)
    h = (x - mean) * jax.lax.rsqrt(x.var((1, 2), keepdims=True) + EPSILON)
    shift = mean - mean.mean(-1, keepdims=True)
    if channels > 1:
      shift *= jax.lax.rsqrt(mean.var(-1, keepdims=True, ddof=1) + EPSILON)
    return (gamma * (h + alpha * shift) + beta).astype(self.dtype)


class Dilated(nn.Module):
  """`Conv` of size 3 whose taps are `dilation` pixels apart: it runs on the d^2 maps of every d-th row and column."""

  features: int
  dilation: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[b, h, w, i] -> [b, h, w, o]."""
    conv, d = Conv(self.features, 3, dtype=self.dtype, name='conv'), self.dilation
    if d == 1:
      return conv(x)
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % d), (0, -w % d), (0, 0)))
    rows, columns = x.shape[1] // d, x.shape[2] // d
    x = x.reshape(b, rows, d, columns, d, c).transpose(2, 4, 0, 1, 3, 5).reshape(d * d * b, rows, columns, c)
    y = conv(x).reshape(d, d, b, rows, columns, self.features).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(b, rows * d, columns * d, self.features)[:, :h, :w]


class Block(nn.Module):
  """x + conv(elu(norm(conv(elu(norm(x)))))).

  Args:
    features: channels that come out.
    levels: of the norms.
    dilation: of the convolutions.
    halve: halves the map by averaging.
    widen: the second convolution changes the number of channels, not the first, and the way around has a convolution, too.
    dtype: of the convolutions.
  """

  features: int
  levels: int
  dilation: int = 1
  halve: bool = False
  widen: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, level: Array) -> Array:
    """[b, h, w, i] -> [b, h', w', features]."""
    middle = x.shape[-1] if self.widen else self.features
    around = x
    if self.halve:
      around = _halve(Conv(self.features, 1, dtype=self.dtype, name='around')(x))
    elif self.widen:
      around = Dilated(self.features, self.dilation, self.dtype, name='around')(x)
    h = nn.elu(Norm(self.levels, self.dtype, name='norm_0')(x, level))
    h = Dilated(middle, self.dilation, self.dtype, name='conv_0')(h)
    h = nn.elu(Norm(self.levels, self.dtype, name='norm_1')(h, level))
    h = Dilated(self.features, self.dilation, self.dtype, name='conv_1')(h)
    return around + (_halve(h) if self.halve else h)


class Units(nn.Module):
  """Residual convolution units: `count` times x + conv(elu(norm(conv(elu(norm(x))))))."""

  count: int
  levels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, level: Array) -> Array:
    """[b, h, w, c] -> [b, h, w, c]."""
    for i in range(self.count):
      h = x
      for j in range(2):
        h = nn.elu(Norm(self.levels, self.dtype, name=f'norm_{i}_{j}')(h, level))
        h = Conv(x.shape[-1], 3, use_bias=False, dtype=self.dtype, name=f'conv_{i}_{j}')(h)
      x = x + h
    return x


class Refine(nn.Module):
  """Adapts its inputs, adds them up at the size of the first, and pools them in a chain of average pooling and convolution."""

  features: int
  levels: int
  units: int = 2  # of each input
  last: int = 1  # at the end
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: Sequence[Array], level: Array) -> Array:
    """Maps [b, h, w, c] or half as large -> [b, h, w, features]."""
    maps = [Units(self.units, self.levels, self.dtype, name=f'adapt_{i}')(x, level) for i, x in enumerate(inputs)]
    h = maps[0]
    if len(maps) > 1:
      scaled = []
      for i, x in enumerate(maps):
        x = Norm(self.levels, self.dtype, name=f'norm_{i}')(x, level)
        x = Conv(self.features, 3, dtype=self.dtype, name=f'conv_{i}')(x)
        scaled.append(x if x.shape[1:3] == h.shape[1:3] else convolution.bilinear_upsample(x))
      h = sum(scaled)
    path = h = nn.elu(h)
    for i in range(2):
      path = _pool(Norm(self.levels, self.dtype, name=f'pool_norm_{i}')(path, level))
      path = Conv(self.features, 3, use_bias=False, dtype=self.dtype, name=f'pool_conv_{i}')(path)
      h = h + path
    return Units(self.last, self.levels, self.dtype, name='out')(h, level)


class NCSN(nn.Module):
  """Images and the index of their noise level -> a field of the image's shape: the score, up to the method's scale.

  The map is halved once; after that dilations 2 and 4 widen what a pixel sees.

  Args:
    image_shape: (h, w, c), h and w even.
    levels: noise levels that the norms know.
    channels: of the full-size map; the half-size maps have twice as many.
    units: residual units that adapt every input of a refinement, and one more end the last; the paper has 2.
    dilations: of the third and the fourth stage.
    dtype: of the convolutions, 'float32' or 'bfloat16'; parameters, norms and the output are float32.
  """

  image_shape: tuple[int, int, int]
  levels: int = 10
  channels: int = 128
  units: int = 2
  dilations: tuple[int, int] = (2, 4)
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Array, level: Array) -> Array:
    """[b, h, w, c] around [0, 1], int [b] -> [b, h, w, c]."""
    dtype, c = jnp.dtype(self.dtype), self.channels
    h = Conv(c, 3, dtype=dtype, name='begin')(2.0 * x - 1.0)
    stages = ((c, 1, False, False), (2 * c, 1, True, True), *((2 * c, d, False, True) for d in self.dilations))
    maps = []
    for i, (features, dilation, halve, widen) in enumerate(stages):
      h = Block(features, self.levels, dilation, halve, widen, dtype, name=f'stage_{i}_0')(h, level)
      h = Block(features, self.levels, dilation, dtype=dtype, name=f'stage_{i}_1')(h, level)
      maps.append(h)
    h = None
    for i, (features, last) in enumerate(((2 * c, 1), (2 * c, 1), (c, 1), (c, self.units + 1))):
      inputs = [maps.pop()] if h is None else [maps.pop(), h]
      h = Refine(features, self.levels, self.units, last, dtype, name=f'refine_{i}')(inputs, level)
    h = nn.elu(Norm(self.levels, dtype, name='norm')(h, level))
    return Conv(self.image_shape[2], 3, dtype=dtype, name='end')(h).astype(jnp.float32)


def _halve(x: Array) -> Array:
  """Means of squares of four pixels, [b, h, w, c] -> [b, h / 2, w / 2, c]."""
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def _pool(x: Array) -> Array:
  """Means over 5 x 5 windows, zeros around the map counted; as two products with band matrices, [b, h, w, c] -> the same."""
  rows, columns = (jnp.asarray(_band(n), x.dtype) for n in x.shape[1:3])
  return jnp.einsum('ph,qw,bhwc->bpqc', rows, columns, x)


def _band(n: int) -> np.ndarray:
  at = np.arange(n)
  return (np.abs(at[:, None] - at) <= 2) / 5.0


def build(image_shape: Sequence[int], **options: Any) -> NCSN:
  """A score network for images (h, w, c); the options are the fields of `NCSN`.

  Raises:
    UserError: if an option has a value that cannot be.
  """
  options['dilations'] = tuple(options.get('dilations', NCSN.dilations))
  net = NCSN(tuple(image_shape), **options)
  for key in ('levels', 'channels', 'units'):
    value = getattr(net, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise UserError(f'model.{key} is {value!r}, need a positive whole number')
  if len(net.dilations) != 2 or any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in net.dilations):
    raise UserError(f'model.dilations is {net.dilations!r}, need two positive whole numbers')
  if net.dtype not in ('float32', 'bfloat16'):
    raise UserError(f"model.dtype is {net.dtype!r}, not 'float32' or 'bfloat16'")
  if any(n % 2 for n in net.image_shape[:2]):
    raise UserError(f'model.name: ncsn halves the map once, so both sides must be even, not {net.image_shape[:2]} (data.pad)')
  return net
