"""The plain VAE: one group of latents, a diagonal Gaussian posterior, prior N(0, I); fully connected or convolutional.

Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, arXiv 1312.6114. Learned noise: Lin, Roberts, Trigoni and
Clark, "Balancing Reconstruction Quality and Regularisation in ELBO for VAEs", 2019, arXiv 1909.03765; Rybkin, Daniilidis
and Levine, "Simple and Effective VAE Training with Calibrated Decoders", 2020, arXiv 2006.13202.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from latentgen.distributions import Independent, Normal
from latentgen.errors import UserError, near
from latentgen.losses import optimal_scale
from latentgen.nets import images
from latentgen.nets.layers import Conv
from latentgen.types import Array, Choose, Distribution, Trace, ancestral

ACTIVATIONS = ('relu', 'tanh', 'swish', 'elu', 'gelu', 'softplus', 'leaky_relu', 'sigmoid')
SCALES = ('learned', 'analytic', 'image', 'pixel')
MOMENTUM = 0.99  # of the running average of 'analytic'


def soft_clip(log_scale: Array, low: float | None, high: float | None) -> Array:
  """Softly between two bounds, either of which may be missing.

  low + softplus(x - low), then high - softplus(high - x): strictly increasing, and x itself far from the bounds. With both the
  result can be below low, by up to log(1 + e^(low - high)): it counts where they are a few nats apart.

  Args:
    log_scale: log standard deviation, any shape.
    low: floor, or None.
    high: ceiling, or None.
  """
  x = log_scale.astype(jnp.float32)
  if low is not None:
    x = low + jax.nn.softplus(x - low)
  return x if high is None else high - jax.nn.softplus(high - x)


class Encoder(nn.Module):
  """Images [b, h, w, c] -> mean and log standard deviation of q(z | x), [b, latent] each."""

  latent: int
  hidden: tuple[int, ...]
  activation: Callable[[Array], Array]
  conv: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    h = images.pad(x, 2 ** len(self.hidden)) if self.conv else x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.hidden):
      layer = Conv(width, 3, 2, dtype=self.dtype, name=f'layer_{i}') if self.conv else self._dense(width, f'layer_{i}')
      h = self.activation(layer(h))
    raw = self._dense(2 * self.latent, 'head')(h.reshape(h.shape[0], -1)).astype(jnp.float32)
    loc, log_scale = jnp.split(raw, 2, -1)
    return loc, log_scale

  def _dense(self, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=self.dtype, name=name)


class Decoder(nn.Module):
  """Latents [n, latent] -> map [n, h, w, outputs], not cropped if convolutional."""

  image_shape: tuple[int, int, int]
  outputs: int
  hidden: tuple[int, ...]
  activation: Callable[[Array], Array]
  conv: bool
  dtype: Any

  @nn.compact
  def __call__(self, z: Array) -> Array:
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    if not self.conv:
      for i, width in enumerate(reversed(self.hidden)):
        z = self.activation(dense(width, name=f'layer_{i}')(z))
      shape = (*self.image_shape[:2], self.outputs)
      return dense(math.prod(shape), name='head')(z).reshape(-1, *shape)
    multiple = 2 ** len(self.hidden)
    side = [images.padded_size(n, multiple) // multiple for n in self.image_shape[:2]]
    width = self.hidden[-1]
    h = self.activation(dense(math.prod(side) * width, name='stem')(z)).reshape(-1, *side, width)
    for i, width in enumerate((*reversed(self.hidden[:-1]), self.hidden[0])):
      # Four times the channels, then depth to space: what a transposed convolution does, several times faster on a CPU.
      h = Conv(4 * width, 3, dtype=self.dtype, name=f'layer_{i}')(h)
      n, rows, columns, _ = h.shape
      h = h.reshape(n, rows, columns, 2, 2, width).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * rows, 2 * columns, width)
      h = self.activation(h)
    return Conv(self.outputs, 3, dtype=self.dtype, name='head')(h)


class VAE(nn.Module):
  """One level with one group; see `types.LatentNet` for the methods. Context is empty, [1, k, b, 0].

  Args:
    image_shape: (h, w, c).
    latent: dimensions of z.
    hidden: widths of the encoder's hidden layers, the decoder's in reverse; () is linear. With `conv` the channels of
      strided convolutions, each of which halves the map (zero-padded where needed).
    activation: one of ACTIVATIONS.
    conv: convolutional.
    likelihood: 'bernoulli', 'normal' (in the units of the image), or 'dmol'.
    bounded: the normal likelihood's mean goes through a sigmoid; else it is unbounded.
    scale: standard deviation of the normal likelihood: a number; or 'learned', one parameter; 'analytic', the root mean
      square error of the batch in training, of its running average in evaluation and samples; 'image', of z; 'pixel',
      of z for every pixel and channel.
    log_scale: log standard deviation that those which are not a number start at (at or near it).
    log_scale_floor: soft lower bound (hard for 'analytic', which needs one); None is no bound. The default, exp(-6), is about
      half a level of 8 bits.
    log_scale_ceiling: upper bound, likewise.
    mixtures: components (dmol).
    bits: bits a pixel (dmol).
    dtype: of layers, 'float32' or 'bfloat16'; parameters and densities are float32.
  """

  image_shape: tuple[int, int, int]
  latent: int = 16
  hidden: tuple[int, ...] = (512,)
  activation: str = 'relu'
  conv: bool = False
  likelihood: str = 'bernoulli'
  bounded: bool = False
  scale: float | str = 1.0
  log_scale: float = 0.0
  log_scale_floor: float | None = -6.0
  log_scale_ceiling: float | None = None
  mixtures: int = 10
  bits: int = 8
  dtype: str = 'float32'

  def setup(self) -> None:
    common = (self.hidden, getattr(nn, self.activation), self.conv, jnp.dtype(self.dtype))
    channels = self.image_shape[2]
    outputs = images.num_parameters(self.likelihood, channels, self.mixtures)
    if self.likelihood == 'normal':
      outputs = 2 * channels if self.scale == 'pixel' else channels
      start = nn.initializers.constant(self.log_scale)
      if self.scale == 'learned':
        self.noise = self.param('log_scale', start, ())
      elif self.scale == 'analytic':
        self.mse = self.variable('batch_stats', 'mse', lambda: jnp.asarray(math.exp(2.0 * self.log_scale), jnp.float32))
      elif self.scale == 'image':
        self.noise = nn.Dense(1, kernel_init=nn.initializers.zeros, bias_init=start)
    self.encoder = Encoder(self.latent, *common)
    self.decoder = Decoder(self.image_shape, outputs, *common)

  def __call__(self, x: Array, k: int = 1, train: bool = False) -> Trace:
    """`infer`."""
    return self.infer(x, k, train)

  def infer(self, x: Array, k: int = 1, train: bool = False) -> Trace:
    """Posterior pass, [b, h, w, c] in [0, 1] -> Trace."""
    loc, log_scale = self.encoder(x)
    q = Normal(*(jnp.broadcast_to(a, (k, *a.shape)) for a in (loc, jnp.exp(log_scale))))
    z = q.sample(self.make_rng('sample'))
    trace = self._trace(z)
    if train and self.scale == 'analytic' and self.likelihood == 'normal':
      trace = trace.replace(px=self._fit(trace.px.base.loc, x))
    return trace.replace(
      log_q=(q.log_prob(z).sum(-1)[None],),
      kl=(q.kl(_prior(z.shape)).sum(-1)[None],),
      log_px=trace.px.log_prob(x),
      posterior=(jax.tree.map(lambda a: a[None], q),),
    )

  def simulate(self, n: int, choose: Choose = ancestral, temperature: float = 1.0, train: bool = False) -> Trace:
    """Trace of a draw from the prior, whose standard deviation `choose` sees times `temperature`; k = 1, b = n."""
    del train
    prior = _prior((n, self.latent)).temper(temperature)
    z = choose(0, 0, prior, jnp.zeros((n, 0)), self.make_rng('sample'))
    return self._trace(z[None])

  def generate(self, n: int, choose: Choose = ancestral, temperature: float = 1.0) -> Distribution:
    """Distribution over [n, h, w, c]."""
    return jax.tree.map(lambda a: a[0], self.simulate(n, choose, temperature).px)

  def decode(self, z: Array) -> Distribution:
    """[..., latent] -> distribution over [..., h, w, c]."""
    height, width, channels = self.image_shape
    raw = self.decoder(z.reshape(-1, self.latent))
    raw = images.crop(raw, height, width).astype(jnp.float32).reshape(*z.shape[:-1], height, width, -1)
    if self.likelihood != 'normal':
      return images.pixel_likelihood(raw, self.likelihood, channels, self.bits, self.mixtures)
    loc = raw[..., :channels]
    if self.bounded:
      loc = nn.sigmoid(loc)
    if self.scale == 'learned':
      scale = self._exp(self.noise)
    elif self.scale == 'analytic':
      scale = jnp.sqrt(self.mse.value)
    elif self.scale == 'image':
      scale = self._exp(self.noise(z))[..., None, None]
    elif self.scale == 'pixel':
      scale = self._exp(self.log_scale + raw[..., channels:])
    else:
      scale = jnp.asarray(self.scale, jnp.float32)
    return _normal(loc, scale)

  def _exp(self, log_scale: Array) -> Array:
    return jnp.exp(soft_clip(log_scale, self.log_scale_floor, self.log_scale_ceiling))

  def _fit(self, loc: Array, x: Array) -> Distribution:
    """The normal around loc [k, b, h, w, c] whose one scale is the best for these images; the gradient flows through it.

    scale^2 = mean (x - loc)^2 over samples, images, pixels and channels: of the whole batch, also where it is sharded.
    """
    low, high = (None if bound is None else math.exp(bound) for bound in (self.log_scale_floor, self.log_scale_ceiling))
    scale = optimal_scale(x, loc, floor=low or 0.0)
    scale = scale if high is None else jnp.minimum(scale, high)
    if self.is_mutable_collection('batch_stats'):
      self.mse.value = MOMENTUM * self.mse.value + (1.0 - MOMENTUM) * jax.lax.stop_gradient(jnp.square(scale))
    return _normal(loc, scale)

  def _trace(self, z: Array) -> Trace:
    """What generation alone knows, z [k, b, latent]."""
    prior = _prior(z.shape)
    return Trace(
      eps=(z[None],),
      z=(z[None],),
      log_q=(),
      log_p=(prior.log_prob(z).sum(-1)[None],),
      kl=None,
      context=(jnp.zeros((1, *z.shape[:-1], 0)),),
      prior=(jax.tree.map(lambda a: a[None], prior),),
      log_px=None,
      px=self.decode(z),
    )


def _normal(loc: Array, scale: Array) -> Independent:
  return Independent(Normal(loc, jnp.broadcast_to(scale, loc.shape)), 3)


def _prior(shape: tuple[int, ...]) -> Normal:
  return Normal(jnp.zeros(shape), jnp.ones(shape))


def build(image_shape: Sequence[int], **options: Any) -> VAE:
  """A VAE for images (h, w, c); the options are the fields of `VAE`.

  Raises:
    UserError: if an option has a value that cannot be.
  """
  options['hidden'] = tuple(options.get('hidden', VAE.hidden))
  net = VAE(tuple(image_shape), **options)
  if net.activation not in ACTIVATIONS:
    raise UserError(f'model.activation is {net.activation!r}{near(net.activation, ACTIVATIONS)}')
  if net.likelihood not in images.LIKELIHOODS:
    raise UserError(f'model.likelihood is {net.likelihood!r}{near(net.likelihood, images.LIKELIHOODS)}')
  if isinstance(net.scale, str) and net.scale not in SCALES or not isinstance(net.scale, str) and not net.scale > 0:
    raise UserError(f'model.scale is {net.scale!r}: a positive number or one of {", ".join(SCALES)}')
  low, high = net.log_scale_floor, net.log_scale_ceiling
  for key, value in (('log_scale_floor', low), ('log_scale_ceiling', high), ('log_scale', net.log_scale)):
    optional = value is None and key != 'log_scale'
    if not optional and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
      raise UserError(f'model.{key} is {value!r}, need a number{"" if key == "log_scale" else " or None"}')
  if net.scale == 'analytic' and low is None:
    raise UserError("model.log_scale_floor is None, need a number, as -6.0: the gradient of model.scale = 'analytic' is NaN at 0")
  if low is not None and high is not None and low >= high:
    raise UserError(f'model.log_scale_floor is {low}, need less than model.log_scale_ceiling, {high}')
  if not isinstance(net.bounded, bool):
    raise UserError(f'model.bounded is {net.bounded!r}, need True or False')
  if net.dtype not in ('float32', 'bfloat16'):
    raise UserError(f"model.dtype is {net.dtype!r}, not 'float32' or 'bfloat16'")
  if not all(type(width) is int and width > 0 for width in net.hidden):
    raise UserError(f'model.hidden is {net.hidden!r}, need positive whole numbers')
  for name in ('latent', 'mixtures', 'bits'):
    if type(value := getattr(net, name)) is not int or value < 1:
      raise UserError(f'model.{name} is {value!r}, need a positive whole number')
  if net.conv and not net.hidden:
    raise UserError('model.hidden is empty: a convolutional VAE needs a width for each halving of the map')
  return net
