"""Densities over arrays, as pytrees: Normal, Bernoulli, discretised logistic mixture, Gaussian mixture, soft clamps.

Written here rather than taken from a library of distributions because the hierarchical models need soft-clamped normals
and a discretised logistic mixture that sums to one exactly and broadcasts over leading sample axes. All log quantities
are in nats. Parameters are held as given: keep them in float32.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Array = jax.Array
_LOG_2PI = math.log(2.0 * math.pi)
_MIN_LOG_SCALE = -7.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normal:
  """Elementwise normal density.

  log N(x; loc, scale^2) = -(x - loc)^2 / (2 scale^2) - log scale - log(2 pi) / 2

  Args:
    loc: mean, [...].
    scale: standard deviation, > 0, broadcastable against `loc`.
  """

  loc: Any
  scale: Any

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one draw."""
    return jnp.broadcast_shapes(jnp.shape(self.loc), jnp.shape(self.scale))

  @property
  def mean(self) -> Array:
    """Mean, broadcast to `shape`."""
    return jnp.broadcast_to(self.loc, self.shape)

  def log_prob(self, value: ArrayLike) -> Array:
    """Elementwise log-density, nats."""
    return -0.5 * jnp.square((value - self.loc) / self.scale) - jnp.log(self.scale) - 0.5 * _LOG_2PI

  def sample(self, key: Array) -> Array:
    """One reparameterised draw, loc + scale * eps."""
    return self.loc + self.scale * jax.random.normal(key, self.shape, jnp.result_type(self.loc, self.scale, 1.0))

  def kl(self, other: 'Normal') -> Array:
    """Elementwise KL(self || other) in nats; exactly zero where the two agree.

    KL = (r^2 - 1) / 2 - log r + (loc - loc')^2 / (2 scale'^2), r = scale / scale'
    """
    log_ratio = jnp.log(self.scale / other.scale)
    # expm1 keeps the small-difference regime, where r^2 - 1 and 2 log r cancel.
    return 0.5 * (jnp.expm1(2.0 * log_ratio) - 2.0 * log_ratio + jnp.square((self.loc - other.loc) / other.scale))

  def temper(self, temperature: Any) -> 'Normal':
    """The same mean with the standard deviation multiplied by `temperature`."""
    return Normal(self.loc, temperature * self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bernoulli:
  """Elementwise Bernoulli; values strictly inside (0, 1) give the usual cross-entropy.

  log p(x) = x log sigmoid(l) + (1 - x) log sigmoid(-l) = x l - log(1 + exp(l))

  Args:
    logits: log-odds of a one, [...].
  """

  logits: Any

  @property
  def mean(self) -> Array:
    """Probability of a one."""
    return jax.nn.sigmoid(self.logits)

  def log_prob(self, value: ArrayLike) -> Array:
    """Elementwise log-probability, nats; value in [0, 1]."""
    # log(1 + exp(l)), written out: several times faster on a CPU than logaddexp, in value and gradient.
    softplus = jnp.maximum(self.logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(self.logits)))
    return value * self.logits - softplus

  def sample(self, key: Array) -> Array:
    """One draw in {0, 1}, of the dtype of the logits."""
    return jax.random.bernoulli(key, self.mean).astype(jnp.result_type(self.logits))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Independent:
  """Joint density of independent entries: `log_prob` sums the last `ndims` axes of the base's.

  Args:
    base: distribution with elementwise `log_prob`.
    ndims: number of trailing axes that make one event.
  """

  base: Any
  ndims: int = dataclasses.field(metadata={'static': True})

  @property
  def mean(self) -> Array:
    """Mean of the base."""
    return self.base.mean

  def log_prob(self, value: ArrayLike) -> Array:
    """Log-density of the event, nats."""
    base, ndims, event = self.base, self.ndims, jnp.shape(value)[-self.ndims :]
    elementwise = ndims > 0 and isinstance(base, (Normal, Bernoulli))
    if elementwise and all(jnp.shape(leaf)[-ndims:] == event for leaf in jax.tree.leaves(base)):
      # One flat axis: loops over [h, w, 1] are several times slower on a CPU.
      base, value = jax.tree.map(lambda a: jnp.reshape(a, (*jnp.shape(a)[:-ndims], math.prod(event))), (base, value))
      ndims = 1
    log_prob = base.log_prob(value)
    return log_prob.sum(tuple(range(log_prob.ndim - ndims, log_prob.ndim)))

  def sample(self, key: Array) -> Array:
    """One draw of the base."""
    return self.base.sample(key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiscretizedLogisticMixture:
  """Mixture of discretised logistics over pixels with coupled channels, normalised exactly.

  p(x) = sum_j pi_j prod_i [F((e_i+ - mu_ij) / s_ij) - F((e_i- - mu_ij) / s_ij)], F the logistic cdf, e+- the edges of
  the pixel's bin on [-1, 1], -+infinity for the first and last level. With three channels and `coeffs`,
  mu_G += c0 r and mu_B += c1 r + c2 g with the true pixel values r, g in [-1, 1].

  Deviation: published code replaces small interior bins by the density at their centre, which does not sum to one;
  here log(F(a) - F(b)) = log F(a) + log F(-b) + log(1 - exp(b - a)) is used throughout.

  Args:
    logits: mixture logits, [..., m].
    loc: means on [-1, 1], [..., m, c].
    log_scale: log-scales, [..., m, c].
    coeffs: channel coefficients, [..., m, 3], or None; needs c == 3.
    bits: bits of a pixel; values are k / (2^bits - 1).

  References:
    Salimans, Karpathy, Chen, Kingma, "PixelCNN++", 2017, arXiv:1701.05517, eqs. 1-3.
    Vahdat, Kautz, "NVAE", 2020, arXiv:2007.03898 (parameter layout).
  """

  logits: Any
  loc: Any
  log_scale: Any
  coeffs: Any = None
  bits: int = dataclasses.field(default=8, metadata={'static': True})

  @staticmethod
  def num_parameters(channels: int, mixtures: int) -> int:
    """Length of the last axis of `raw`: 100 for RGB with ten components."""
    return mixtures * (1 + 2 * channels + (3 if channels == 3 else 0))

  @classmethod
  def from_parameters(cls, raw: Array, channels: int, bits: int, mixtures: int) -> 'DiscretizedLogisticMixture':
    """Reads a network's output.

    Args:
      raw: [..., num_parameters(channels, mixtures)]: m logits, m * c means, m * c log-scales (clamped at -7) and, for
        three channels, m * 3 coefficients (through tanh); component-major.
      channels: c.
      bits: bits of a pixel.
      mixtures: m.

    Raises:
      ValueError: the last axis has another length.
    """
    wanted = cls.num_parameters(channels, mixtures)
    if raw.shape[-1] != wanted:
      raise ValueError(f'{mixtures} mixtures of {channels} channels need {wanted} parameters, not {raw.shape[-1]}')
    raw = raw.astype(jnp.promote_types(raw.dtype, jnp.float32))
    ends = [mixtures, mixtures * (1 + channels), mixtures * (1 + 2 * channels)]
    logits, loc, log_scale, coeffs = jnp.split(raw, ends, axis=-1)
    stack = lambda a: a.reshape(*a.shape[:-1], mixtures, -1)
    log_scale = jnp.maximum(stack(log_scale), _MIN_LOG_SCALE)
    return cls(logits, stack(loc), log_scale, jnp.tanh(stack(coeffs)) if channels == 3 else None, bits)

  @property
  def _top(self) -> int:
    return 2**self.bits - 1

  def log_prob(self, value: ArrayLike) -> Array:
    """Log-probability of each pixel, nats, the channels summed.

    Args:
      value: [..., h, w, c] in [0, 1]; may have fewer leading axes than the parameters.

    Returns:
      [..., h, w].
    """
    level = jnp.round(value * self._top)[..., None, :]  # [..., 1, c]
    loc = self.loc
    if self.coeffs is not None:
      red, green = (2.0 * level[..., i] / self._top - 1.0 for i in (0, 1))
      loc = loc + self._shift(red, green)
    inv_scale = jnp.exp(-self.log_scale)
    # Edges from integers: the upper edge of a level and the lower edge of the next are the same float.
    upper = ((2.0 * level + 1.0 - self._top) / self._top - loc) * inv_scale
    lower = ((2.0 * level - 1.0 - self._top) / self._top - loc) * inv_scale
    first, last = level <= 0, level >= self._top
    log_mass = (
      jnp.where(last, 0.0, jax.nn.log_sigmoid(upper))
      + jnp.where(first, 0.0, jax.nn.log_sigmoid(-lower))
      + jnp.where(first | last, 0.0, _log1mexp(math.log(2.0 / self._top) - self.log_scale))
    )
    return jax.nn.logsumexp(jax.nn.log_softmax(self.logits, axis=-1) + log_mass.sum(-1), axis=-1)

  @property
  def mean(self) -> Array:
    """Mixture of the component means in [0, 1], [..., c]; means are clipped before they shift later channels."""
    clip = lambda a: jnp.clip(a, -1.0, 1.0)
    loc = self.loc
    if self.coeffs is not None:
      red = clip(loc[..., 0])
      green = clip(loc[..., 1] + self.coeffs[..., 0] * red)
      loc = loc + self._shift(red, green)
    weights = jax.nn.softmax(self.logits, axis=-1)[..., None]
    return jnp.clip(0.5 * (weights * clip(loc)).sum(-2) + 0.5, 0.0, 1.0)  # the sum may round past the ends

  def sample(self, key: Array) -> Array:
    """One exact draw, [..., c], of values k / (2^bits - 1)."""
    key_component, key_pixel = jax.random.split(key)
    index = jax.random.categorical(key_component, self.logits)[..., None, None]
    pick = lambda a: jnp.take_along_axis(a, index, axis=-2)[..., 0, :]
    loc, scale = pick(self.loc), jnp.exp(pick(self.log_scale))
    noise = scale * jax.random.logistic(key_pixel, loc.shape, loc.dtype)
    # Rounding the continuous draw to the nearest level gives each bin its mass, tails to the edge bins included.
    snap = lambda a: jnp.clip(jnp.round(0.5 * (a + 1.0) * self._top), 0.0, self._top) / self._top
    if self.coeffs is None:
      return snap(loc + noise)
    coeffs = pick(self.coeffs)
    red = snap(loc[..., 0] + noise[..., 0])
    r = 2.0 * red - 1.0
    green = snap(loc[..., 1] + coeffs[..., 0] * r + noise[..., 1])
    g = 2.0 * green - 1.0
    blue = snap(loc[..., 2] + coeffs[..., 1] * r + coeffs[..., 2] * g + noise[..., 2])
    return jnp.stack([red, green, blue], axis=-1)

  def _shift(self, red: Array, green: Array) -> Array:
    """What the earlier channels (in [-1, 1]) add to the means, [..., m, 3]."""
    c0, c1, c2 = (self.coeffs[..., i] for i in range(3))
    return jnp.stack(jnp.broadcast_arrays(jnp.zeros_like(c0 * red), c0 * red, c1 * red + c2 * green), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianMixture:
  """Mixture of diagonal Gaussians: p(z) = sum_k weights_k prod_d N(z_d; loc_kd, scale_kd^2).

  Args:
    weights: mixture probabilities, sum to one, zeros allowed, [c].
    loc: means, [c, d].
    scale: standard deviations, [c, d].
  """

  weights: Any
  loc: Any
  scale: Any

  @property
  def mean(self) -> Array:
    """[d]."""
    return self.weights @ self.loc

  def log_prob(self, value: ArrayLike) -> Array:
    """Log-density in nats, [..., d] -> [...]."""
    components = Normal(self.loc, self.scale).log_prob(value[..., None, :]).sum(-1)
    # Weights enter as factors, so that a dead component (weight 0) has a finite gradient.
    return jax.nn.logsumexp(components, axis=-1, b=self.weights)

  def sample(self, key: Array, n: int) -> Array:
    """n independent draws, [n, d]."""
    key_component, key_noise = jax.random.split(key)
    index = jax.random.categorical(key_component, jnp.log(self.weights), shape=(n,))
    return Normal(self.loc[index], self.scale[index]).sample(key_noise)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Repeated:
  """n independent draws of one density over vectors: `mean` and `sample` are [n, d].

  Args:
    base: a distribution whose `sample` takes the number of draws, as GaussianMixture.
    n: how many.
  """

  base: Any
  n: int = dataclasses.field(metadata={'static': True})

  @property
  def mean(self) -> Array:
    """That of the base for every draw."""
    return jnp.broadcast_to(self.base.mean, (self.n, *self.base.mean.shape))

  def log_prob(self, value: ArrayLike) -> Array:
    """Log-density of each draw in nats, [n, d] -> [n]."""
    return self.base.log_prob(value)

  def sample(self, key: Array) -> Array:
    """The n draws."""
    return self.base.sample(key, self.n)


def soft_clamp(x: ArrayLike, bound: float = 5.0) -> Array:
  """Smooth clamp to (-bound, bound) with slope one at zero: bound * tanh(x / bound).

  References:
    Vahdat, Kautz, "NVAE", 2020, arXiv:2007.03898 (in the published code, not in the paper).
  """
  return bound * jnp.tanh(x / bound)


def soft_clamped_normal(mu: ArrayLike, log_sigma: ArrayLike, floor: float = 0.01) -> Normal:
  """Normal(soft_clamp(mu), exp(soft_clamp(log_sigma)) + floor)."""
  return Normal(soft_clamp(mu), jnp.exp(soft_clamp(log_sigma)) + floor)


def _log1mexp(log_width: Array) -> Array:
  """log(1 - exp(-exp(log_width))), finite with finite gradients for every finite input."""
  small = log_width < -5.0
  width = jnp.exp(jnp.clip(log_width, -5.0, 80.0))
  tiny = jnp.exp(jnp.minimum(log_width, -5.0))
  series = log_width - tiny / 2.0 + jnp.square(tiny) / 24.0  # the next term is below 1e-12
  # Past width 80 the result is 0 to the last bit, so the clip costs nothing.
  return jnp.where(small, series, jnp.log(-jnp.expm1(-width)))
