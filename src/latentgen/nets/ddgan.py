"""Generator and discriminator of a denoising diffusion GAN, both told the step.

Xiao, Kreis and Vahdat, "Tackling the Generative Learning Trilemma with Denoising Diffusion GANs", 2022, arXiv 2112.07804,
appendix C.
"""

from collections.abc import Sequence
import dataclasses
import math

from flax import linen as nn
import jax.numpy as jnp

from latentgen.errors import UserError, near
from latentgen.nets import resampling, unet
from latentgen.nets.unet import ScaledConv, positional_embedding, scaled
from latentgen.types import Array

# (stem, blocks as (features, halves the map), initial scale of the last convolution), in multiples of the base width
DISCRIMINATORS = dict(
  tiny=(2, ((2, False), (4, True), (4, True)), 0.0),
  small=(2, ((2, False), (4, True), (8, True), (8, True)), 0.0),
  large=(2, ((4, True), (8, True), (8, True), (8, True), (8, True), (8, True)), 1.0),
)
ARCHITECTURES = ('unet', 'mlp')
GROUP = 4  # examples over which the minibatch deviation is taken


def pixel_norm(z: Array) -> Array:
  """z / sqrt(mean z^2 + 1e-8), [b, d]: every row has mean square 1 (Karras et al., 2018, arXiv 1710.10196)."""
  return z / jnp.sqrt(jnp.square(z).mean(-1, keepdims=True) + 1e-8)


def minibatch_deviation(x: Array) -> Array:
  """Appends one channel: the standard deviation over groups of 4 examples, averaged over pixels and channels.

  Group j of m = b / 4 holds the examples j, j + m, j + 2 m, j + 3 m. A smaller batch is one group.

  Args:
    x: [b, h, w, c].

  Returns:
    [b, h, w, c + 1].

  Raises:
    UserError: if the batch does not split into such groups.

  References:
    Karras, Aila, Laine and Lehtinen, "Progressive Growing of GANs", 2018, arXiv 1710.10196.
  """
  b, h, w, c = x.shape
  group = min(b, GROUP)
  if b % group:
    raise UserError(f'config.data.batch_size is {b}, need a multiple of {GROUP}, over which the discriminator compares images')
  deviation = jnp.sqrt(x.reshape(group, -1, h, w, c).var(0) + 1e-8).mean((1, 2, 3))
  return jnp.concatenate([x, jnp.broadcast_to(jnp.tile(deviation, group)[:, None, None, None], (b, h, w, 1))], -1)


class Mapping(nn.Module):
  """Latents z to the embedding of the norms: PixelNorm, then 1 + layers times Dense and swish; [b, d] -> [b, features]."""

  features: int
  layers: int

  @nn.compact
  def __call__(self, z: Array) -> Array:
    h = pixel_norm(z)
    for i in range(self.layers + 1):
      h = nn.swish(nn.Dense(self.features, kernel_init=scaled(), name=f'layer_{i}')(h))
    return h


class Generator(nn.Module):
  """Draws x_0 given x_t: tanh(U-Net(x_t, t, mapping(z))).

  Args:
    unet: the network; its `latent_embedding` is the size of the mapping's output, 0 without z.
    layers: of the mapping, beside the first.
  """

  unet: unet.UNet
  layers: int

  @nn.compact
  def __call__(self, x_t: Array, t: Array, z: Array, train: bool = False) -> Array:
    """x_t [b, h, w, c], steps 1 to T [b] (embedded as 0 to T - 1), z [b, d] -> x_0 [b, h, w, c] in [-1, 1]."""
    size = self.unet.latent_embedding
    w = Mapping(size, self.layers, name='mapping')(z) if size else None
    return jnp.tanh(self.unet(x_t, t - 1, w, train))


class Down(nn.Module):
  """(skip + conv(lrelu(conv(lrelu(x)) + time))) / sqrt(2), halved before the second convolution, which starts at zero."""

  features: int
  halve: bool

  @nn.compact
  def __call__(self, x: Array, time: Array) -> Array:
    h = ScaledConv(self.features, name='conv_in')(_leaky(x))
    h += nn.Dense(self.features, kernel_init=scaled(), name='time')(time)[:, None, None]
    h = _leaky(h)
    if self.halve:
      h, x = resampling.fir_downsample(h), resampling.fir_downsample(x)
    h = ScaledConv(self.features, scale=0.0, name='conv_out')(h)
    return (h + ScaledConv(self.features, 1, use_bias=False, name='skip')(x)) / math.sqrt(2.0)


class Discriminator(nn.Module):
  """Logit that x_{t-1} was drawn before x_t by the forward chain, not by the generator.

  Args:
    kind: of DISCRIMINATORS.
    channels: base width.
    time_embedding: size of the embedding of t.
  """

  kind: str
  channels: int
  time_embedding: int

  @nn.compact
  def __call__(self, before: Array, x_t: Array, t: Array) -> Array:
    """x_{t-1} and x_t [b, h, w, c], steps 1 to T [b] -> logits [b]."""
    stem, blocks, scale = DISCRIMINATORS[self.kind]
    time = positional_embedding(t - 1, self.time_embedding)
    for i in range(2):
      time = _leaky(nn.Dense(self.time_embedding, kernel_init=scaled(), name=f'time_{i}')(time))
    h = ScaledConv(stem * self.channels, 1, name='stem')(jnp.concatenate([before, x_t], -1))
    for i, (multiple, halve) in enumerate(blocks):
      h = Down(multiple * self.channels, halve, name=f'block_{i}')(h, time)
    h = ScaledConv(h.shape[-1], scale=scale, name='last')(minibatch_deviation(h))
    return nn.Dense(1, kernel_init=scaled(), name='head')(_leaky(h).sum((1, 2)))[:, 0]


class Perceptron(nn.Module):
  """`Generator` for points and very small images: a perceptron on (x_t, embedding of t, z)."""

  hidden: int
  layers: int

  @nn.compact
  def __call__(self, x_t: Array, t: Array, z: Array, train: bool = False) -> Array:
    del train
    h = jnp.concatenate([x_t.reshape(len(x_t), -1), positional_embedding(t - 1, self.hidden), z], -1)
    for i in range(self.layers):
      h = nn.swish(nn.Dense(self.hidden, name=f'layer_{i}')(h))
    return jnp.tanh(nn.Dense(math.prod(x_t.shape[1:]), name='head')(h)).reshape(x_t.shape)


class PerceptronDiscriminator(nn.Module):
  """`Discriminator` for the same: a perceptron on (x_{t-1}, x_t, embedding of t).

  Args:
    hidden: width.
    layers: hidden layers.
    frequencies: f; sines and cosines of pi 2^i x, i < f, of both points join what it sees (Tancik et al., "Fourier Features Let
      Networks Learn High Frequency Functions in Low Dimensional Domains", 2020, arXiv 2006.10739).
    compare: append the minibatch deviation to the last hidden layer but one.
  """

  hidden: int
  layers: int
  frequencies: int
  compare: bool

  @nn.compact
  def __call__(self, before: Array, x_t: Array, t: Array) -> Array:
    x = jnp.concatenate([before, x_t], -1).reshape(len(x_t), -1)
    waves = [wave(math.pi * 2**i * x) for i in range(self.frequencies) for wave in (jnp.sin, jnp.cos)]
    h = jnp.concatenate([x, *waves, positional_embedding(t - 1, self.hidden)], -1)
    for i in range(self.layers):
      h = _leaky(nn.Dense(self.hidden, name=f'layer_{i}')(h))
    if self.compare:
      h = minibatch_deviation(h[:, None, None])[:, 0, 0]
      h = _leaky(nn.Dense(self.hidden, name='last')(h))
    return nn.Dense(1, name='head')(h)[:, 0]


def _leaky(x: Array) -> Array:
  return nn.leaky_relu(x, 0.2)


@dataclasses.dataclass(frozen=True)
class Pair:
  """The two networks.

  Attributes:
    image_shape: (h, w, c).
    latent: dimensions of z.
    generator: (x_t, t, z, train) -> x_0 in [-1, 1].
    discriminator: (x_{t-1}, x_t, t) -> logits [b].
  """

  image_shape: tuple[int, int, int]
  latent: int
  generator: nn.Module
  discriminator: nn.Module


def build(
  image_shape: Sequence[int],
  *,
  architecture: str = 'unet',
  latent: int = 100,
  channels: int = 128,
  multipliers: Sequence[int] = (1, 2, 2, 2),
  blocks: int = 2,
  attention: Sequence[int] = (16,),
  embedding: int = 256,
  mapping: int = 4,
  fir: bool = True,
  pyramid: bool = True,
  dropout: float = 0.0,
  dtype: str = 'float32',
  discriminator: str = 'small',
  discriminator_channels: int = 64,
  time_embedding: int = 256,
  hidden: int = 256,
  layers: int = 3,
  frequencies: int = 0,
  compare: bool = False,
) -> Pair:
  """The networks for images (h, w, c).

  Args:
    image_shape: of the data.
    architecture: 'unet', or 'mlp' for points and very small images.
    latent: dimensions of z; 0 is no latent, hence a denoiser with one answer.
    channels: of the U-Net's first level; see `unet.UNet` for this and the next options up to `dtype`.
    multipliers: widths of its levels.
    blocks: residual blocks a level.
    attention: heights of the maps with attention.
    embedding: size of the embedding of z.
    mapping: layers of the mapping from z, beside the first.
    fir: resample through the filter [1, 3, 3, 1].
    pyramid: add the downsampled input to every level.
    dropout: rate, in the generator.
    dtype: of the generator's convolutions.
    discriminator: one of DISCRIMINATORS: 'small' and 'large' are those of the paper for 32x32 and 256x256, 'tiny' is for 8x8.
    discriminator_channels: its base width.
    time_embedding: size of its embedding of t.
    hidden: width of both perceptrons ('mlp').
    layers: hidden layers of both ('mlp').
    frequencies: of the perceptron's discriminator, see `PerceptronDiscriminator`; for points with fine structure.
    compare: the perceptron's discriminator compares examples by the minibatch deviation, as that of the U-Net always does.

  Raises:
    UserError: an option that cannot be.
  """
  if architecture not in ARCHITECTURES:
    raise UserError(f'model.architecture is {architecture!r}{near(architecture, ARCHITECTURES)}')
  if discriminator not in DISCRIMINATORS:
    raise UserError(f'model.discriminator is {discriminator!r}{near(discriminator, DISCRIMINATORS)}')
  for key, value, least in (
    ('latent', latent, 0), ('embedding', embedding, 1), ('mapping', mapping, 0), ('time_embedding', time_embedding, 4),
    ('discriminator_channels', discriminator_channels, 1), ('hidden', hidden, 4), ('layers', layers, 1),
    ('frequencies', frequencies, 0),
  ):  # fmt: skip
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise UserError(f'model.{key} is {value!r}, need a whole number of at least {least}')
  shape = tuple(image_shape)
  if architecture == 'mlp':
    judge = PerceptronDiscriminator(hidden, layers, frequencies, compare)
    return Pair(shape, latent, Perceptron(hidden, layers), judge)
  net = unet.UNet(
    channels, tuple(multipliers), blocks, tuple(attention), shape[-1], fir, embedding if latent else 0, pyramid, dropout,
    dtype=dtype,
  )  # fmt: skip
  unet.check(shape, net)
  halvings = sum(halve for _, halve in DISCRIMINATORS[discriminator][1])
  if min(shape[:2]) < 2**halvings or any(side % 2**halvings for side in shape[:2]):
    raise UserError(
      f'model.discriminator is {discriminator!r}, whose {halvings} halvings need sides that divide by {2**halvings},'
      f' not {shape[0]}x{shape[1]}'
    )
  return Pair(shape, latent, Generator(net, mapping), Discriminator(discriminator, discriminator_channels, time_embedding))
