"""NCSN++'s U-Net: residual blocks on a ladder of resolutions, told the time and, where asked for, a latent embedding.

A denoiser, a score network or a generator, on images or on small maps of latents. Song, Sohl-Dickstein, Kingma, Kumar, Ermon
and Poole, "Score-Based Generative Modeling through Stochastic Differential Equations", 2021, arXiv 2011.13456, appendix H.
"""

import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from latentgen.errors import UserError
from latentgen.nets import convolution, resampling
from latentgen.types import Array


def scaled(scale: float = 1.0) -> nn.initializers.Initializer:
  """Uniform with variance scale / mean of fan-in and fan-out; zeros for scale 0."""
  return nn.initializers.variance_scaling(scale, 'fan_avg', 'uniform') if scale else nn.initializers.zeros


class ScaledConv(nn.Module):
  """Convolution like `layers.Conv`, but with `scaled` weights and zero bias at the start.

  Args:
    features: output channels.
    kernel_size: k, odd.
    scale: of the initial variance; 0 starts at zero.
    use_bias: adds a bias.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 3
  scale: float = 1.0
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[n, h, w, i] -> [n, h, w, features]."""
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param('kernel', scaled(self.scale), shape)
    y = convolution.convolve(x.astype(self.dtype), kernel.astype(self.dtype))
    return y + self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype) if self.use_bias else y


def positional_embedding(t: Array, dim: int) -> Array:
  """Sines and cosines of times [b] at dim / 2 frequencies from 1 down to 1 / 10000 in geometric progression: [b, dim].

  References:
    Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762 (as in tensor2tensor: all sines first).
  """
  half = dim // 2
  frequency = jnp.exp(-math.log(10_000.0) / max(half - 1, 1) * jnp.arange(half))
  phase = t.astype(jnp.float32)[:, None] * frequency
  return jnp.pad(jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1), ((0, 0), (0, dim - 2 * half)))


class Norm(nn.Module):
  """GroupNorm with at most 32 groups of at least 4 channels; with an embedding w, gain and shift are those of w.

  y = gamma(w) GN(x) + beta(w), (gamma, beta) = W w + (1, 0): plain normalisation at w = 0.
  """

  @nn.compact
  def __call__(self, x: Array, w: Array | None = None) -> Array:
    """[n, h, w, c], [n, e] or None -> [n, h, w, c]."""
    channels = x.shape[-1]
    groups = math.gcd(min(max(channels // 4, 1), 32), channels)
    if w is None:
      return nn.GroupNorm(groups, epsilon=1e-6, name='norm')(x)
    h = nn.GroupNorm(groups, epsilon=1e-6, use_bias=False, use_scale=False, name='norm')(x)

    def start(key, shape, dtype=jnp.float32):
      del key
      return jnp.where(jnp.arange(shape[0]) < channels, 1.0, 0.0).astype(dtype)

    style = nn.Dense(2 * channels, kernel_init=scaled(), bias_init=start, name='style')(w)
    gain, shift = jnp.split(style[:, None, None].astype(h.dtype), 2, -1)
    return gain * h + shift


class Block(nn.Module):
  """BigGAN's residual block: (skip + conv(swish(norm(conv(resample(swish(norm(x)))) + time)))) / sqrt(2).

  The last convolution starts at zero; the skip is a 1x1 convolution where resolution or channels change.

  Args:
    features: output channels.
    resample: '', 'down' or 'up'.
    fir: resample through the filter [1, 3, 3, 1], else by averages and repetition.
    dropout: rate, before the last convolution.
    dtype: of the convolutions.

  References:
    Brock, Donahue and Simonyan, "Large Scale GAN Training for High Fidelity Natural Image Synthesis", 2019, arXiv 1809.11096.
  """

  features: int
  resample: str = ''
  fir: bool = False
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, time: Array, w: Array | None, train: bool) -> Array:
    """[n, h, w, c], time embedding [n, e], latent embedding [n, e'] or None -> [n, h', w', features]."""
    h = nn.swish(Norm(name='norm_in')(x, w))
    if self.resample:
      h, x = resample(h, self.resample, self.fir), resample(x, self.resample, self.fir)
    h = ScaledConv(self.features, dtype=self.dtype, name='conv_in')(h)
    h += nn.Dense(self.features, kernel_init=scaled(), dtype=self.dtype, name='time')(nn.swish(time))[:, None, None]
    h = nn.swish(Norm(name='norm_out')(h, w))
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    h = ScaledConv(self.features, scale=0.0, dtype=self.dtype, name='conv_out')(h)
    if self.resample or x.shape[-1] != self.features:
      x = ScaledConv(self.features, 1, dtype=self.dtype, name='skip')(x)
    return (x + h) / math.sqrt(2.0)


class Attention(nn.Module):
  """Self-attention with one head over the pixels: (x + out(softmax(q k / sqrt(c)) v)) / sqrt(2), `out` zero at the start."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[n, h, w, c] -> [n, h, w, c]."""
    n, height, width, c = x.shape
    h = Norm(name='norm')(x).reshape(n, height * width, c)
    q, k, v = (nn.Dense(c, kernel_init=scaled(), dtype=self.dtype, name=name)(h) for name in ('query', 'key', 'value'))
    weight = jax.nn.softmax(jnp.einsum('nqc,nkc->nqk', q, k).astype(jnp.float32) / math.sqrt(c))
    h = jnp.einsum('nqk,nkc->nqc', weight.astype(v.dtype), v)
    h = nn.Dense(c, kernel_init=scaled(0.0), dtype=self.dtype, name='out')(h)
    return (x + h.reshape(x.shape)) / math.sqrt(2.0)


def resample(x: Array, how: str, fir: bool) -> Array:
  """'down' halves both sides, 'up' doubles them."""
  if how == 'down':
    return resampling.fir_downsample(x) if fir else resampling.mean_downsample(x)
  return resampling.fir_upsample(x) if fir else convolution.nearest_upsample(x)


class UNet(nn.Module):
  """A map and a time to a map of the same resolution, zero at the start.

  Args:
    channels: c of the first level; level i has c * multipliers[i].
    multipliers: one number a level; every level but the last halves the map.
    blocks: residual blocks a level on the way down, one more on the way up.
    attention: heights of the maps that get attention; the coarsest map in the middle always has it.
    out_channels: of the output.
    fir: resample through the filter [1, 3, 3, 1].
    latent_embedding: size of the embedding z that scales and shifts the norms of all blocks; 0 for none.
    pyramid: add the downsampled input, through a 3x3 convolution, to every coarser level ("progressive input, residual").
    dropout: rate.
    time_scale: factor on t before it is embedded: 1 for step numbers, 1000 for times in [0, 1].
    dtype: of the convolutions, 'float32' or 'bfloat16'; parameters and output are float32.
  """

  channels: int = 128
  multipliers: tuple[int, ...] = (1, 2, 2, 2)
  blocks: int = 2
  attention: tuple[int, ...] = (16,)
  out_channels: int = 3
  fir: bool = False
  latent_embedding: int = 0
  pyramid: bool = False
  dropout: float = 0.0
  time_scale: float = 1.0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Array, t: Array, z: Array | None = None, train: bool = False) -> Array:
    """Noisy map to output.

    Args:
      x: [b, h, w, c]; h and w divide by 2 to the number of levels less one.
      t: times [b].
      z: [b, latent_embedding], where there is one.
      train: with dropout (rng stream 'dropout').

    Returns:
      [b, h, w, out_channels], float32.
    """
    if (z is None) == bool(self.latent_embedding) or z is not None and z.shape[-1] != self.latent_embedding:
      raise ValueError(f'z must be [b, {self.latent_embedding}], or None for latent_embedding = 0')
    dtype = jnp.dtype(self.dtype)

    def block(features: int, name: str, how: str = '') -> Block:
      return Block(features, how, self.fir, self.dropout, dtype, name=name)

    def attend(h: Array, name: str) -> Array:
      return Attention(dtype, name=name)(h) if h.shape[1] in self.attention else h

    width, last = self.channels, len(self.multipliers) - 1
    time = positional_embedding(t * self.time_scale, width)
    time = nn.Dense(4 * width, kernel_init=scaled(), name='time_in')(time)
    time = nn.Dense(4 * width, kernel_init=scaled(), name='time_out')(nn.swish(time))

    h, pyramid = ScaledConv(width, dtype=dtype, name='stem')(x), x
    skips = [h]
    for i, multiplier in enumerate(self.multipliers):
      for j in range(self.blocks):
        h = attend(block(width * multiplier, f'down_{i}_{j}')(h, time, z, train), f'down_{i}_{j}_attention')
        skips.append(h)
      if i < last:
        h = block(width * multiplier, f'down_{i}', 'down')(h, time, z, train)
        if self.pyramid:
          pyramid = resample(pyramid, 'down', self.fir)
          pyramid = ScaledConv(h.shape[-1], dtype=dtype, name=f'pyramid_{i}')(pyramid)
          h = pyramid = (pyramid + h) / math.sqrt(2.0)
        skips.append(h)
    h = block(h.shape[-1], 'middle_0')(h, time, z, train)
    h = Attention(dtype, name='middle_attention')(h)
    h = block(h.shape[-1], 'middle_1')(h, time, z, train)
    for i, multiplier in reversed(list(enumerate(self.multipliers))):
      for j in range(self.blocks + 1):
        h = block(width * multiplier, f'up_{i}_{j}')(jnp.concatenate([h, skips.pop()], -1), time, z, train)
      h = attend(h, f'up_{i}_attention')
      if i:
        h = block(width * multiplier, f'up_{i}', 'up')(h, time, z, train)
    h = nn.swish(Norm(name='head_norm')(h))
    return ScaledConv(self.out_channels, scale=0.0, dtype=dtype, name='head')(h).astype(jnp.float32)


def check(image_shape: tuple[int, ...], net: UNet, where: str = 'model') -> None:
  """Refuses sizes that cannot be, naming the config key.

  Args:
    image_shape: (h, w, c) of the map.
    net: the network.
    where: config section of its options.

  Raises:
    UserError: one line.
  """
  if not net.multipliers or any(not _whole(m) for m in net.multipliers):
    raise UserError(f'{where}.multipliers is {net.multipliers!r}, need a positive whole number for every level')
  for key, least in (('channels', 4), ('blocks', 1), ('latent_embedding', 0)):
    if not _whole(getattr(net, key), least):
      raise UserError(f'{where}.{key} is {getattr(net, key)!r}, need a whole number of at least {least}')
  if not 0 <= net.dropout < 1:
    raise UserError(f'{where}.dropout is {net.dropout!r}, need a rate of at least 0 and below 1')
  if net.dtype not in ('float32', 'bfloat16'):
    raise UserError(f"{where}.dtype is {net.dtype!r}, not 'float32' or 'bfloat16'")
  factor = 2 ** (len(net.multipliers) - 1)
  if any(side % factor for side in image_shape[:2]):
    height, width = image_shape[:2]
    levels = len(net.multipliers)
    raise UserError(f'{where}.multipliers has {levels} levels, which need sides that divide by {factor}, not {height}x{width}')


def _whole(value: Any, least: int = 1) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= least
