"""A score-based diffusion as a density on noise coordinates, with the mixed parametrisation of its scores.

Vahdat, Kreis and Kautz, "Score-based Generative Modeling in Latent Space", 2021, arXiv 2106.05931.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from latentgen import losses
from latentgen.errors import UserError, near
from latentgen.nets import unet
from latentgen.nets.layers import Dense
from latentgen.priors import coordinates
from latentgen.samplers import diffusion, sdes
from latentgen.types import Array, Key

SDES = {'vp': (sdes.VP, 0.01), 'geometric': (sdes.GeometricVP, 0.0), 'sub_vp': (sdes.SubVP, 0.01), 've': (sdes.VE, 0.01)}
TIME_SCALE = 1000.0  # times are embedded as if they were the numbers of a thousand steps


class Vectors(nn.Module):
  """eps' on vectors: residual blocks of two dense layers that are told the time; zero at the start.

  Args:
    channels: width.
    layers: blocks.
    dropout: rate, in each block.
  """

  channels: int
  layers: int
  dropout: float

  @nn.compact
  def __call__(self, z: Array, t: Array, train: bool = False) -> Array:
    """[n, d] of unit scale, times [n] -> [n, d]."""
    time = nn.swish(Dense(self.channels, name='time')(unet.positional_embedding(TIME_SCALE * t, self.channels)))
    h = Dense(self.channels, name='in')(z)
    for i in range(self.layers):
      r = nn.swish(Dense(self.channels, name=f'first_{i}')(nn.swish(h)) + Dense(self.channels, name=f'time_{i}')(time))
      r = nn.Dropout(self.dropout, deterministic=not train)(r)
      h += Dense(self.channels, name=f'second_{i}')(r)
    return nn.Dense(z.shape[-1], kernel_init=nn.initializers.zeros, name='out')(nn.swish(h))


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """p(u) by a diffusion of u = z_0, with eps_theta(z, t) = (1 - a) sqrt(s_t) z / v_t + a eps'(z, t), a = sigmoid(logit).

  v_t is the variance that N(0, I) has at time t (1 for 'vp'): at a = 0 the prior is N(0, I). There is one logit a coordinate,
  or a channel of maps.

  Args:
    sde: the diffusion.
    net: eps', (z of unit scale, t, train) -> like z.
    start: e, the first time of the loss.
    weighting: of the loss over t, see samplers.sdes.weight.
    sampling: how t is drawn, see samplers.sdes.draw_times.
    mixed: the logits to begin with.
    map: (g, h, w, c), how a vector is laid out as the maps of g groups, for a `net` on maps; () for vectors.
    steps: of the sampler 'ancestral'.
    tolerance: of the sampler 'ode', and of log-densities.
    end: first time of sampling and densities.
    probes: of Hutchinson's trace in log-densities; 0 is the exact trace, which takes d derivatives.
  """

  sde: sdes.SDE
  net: nn.Module
  start: float = 0.01
  weighting: str = 'll'
  sampling: str = 'll'
  mixed: float = -3.0
  map: tuple[int, ...] = ()
  steps: int = 1000
  tolerance: float = 1e-5
  end: float = 1e-5
  probes: int = 0
  exact = True
  samplers = ('ode', 'ancestral')

  def init(self, key: Key, d: int) -> dict[str, Any]:
    if self.map and math.prod(self.map) != d:
      raise UserError(f'method.prior.map is {self.map}, {math.prod(self.map)} numbers, and the codes have {d}')
    z = self._unpack(jnp.zeros((1, d)))
    return {'net': self.net.init(key, z, jnp.ones(1))['params'], 'logit': jnp.full(z.shape[-1], float(self.mixed))}

  def _unpack(self, u: Array) -> Array:
    """[n, d] -> [n, h, w, g c]."""
    if not self.map:
      return u
    g, h, w, c = self.map
    return jnp.moveaxis(u.reshape(-1, g, h, w, c), 1, 3).reshape(-1, h, w, g * c)

  def _pack(self, z: Array) -> Array:
    if not self.map:
      return z
    g, h, w, c = self.map
    return jnp.moveaxis(z.reshape(-1, h, w, g, c), 3, 1).reshape(z.shape[0], -1)

  def residual(self, params: Any, z: Array, t: Array, key: Key | None = None) -> Array:
    """a (eps'(z, t) - sqrt(s_t) z / v_t): what is predicted beyond N(0, I).

    Args:
      params: of `init`.
      z: [n, d].
      t: [n].
      key: for dropout; None is without.
    """
    v, deviation = self.sde.spread(t), jnp.sqrt(self.sde.variance(t))
    rngs = {} if key is None else {'dropout': key}
    seen = self._unpack(z / jnp.sqrt(v)[:, None])
    own = self.net.apply({'params': params['net']}, seen, t, train=key is not None, rngs=rngs)
    return self._pack(jax.nn.sigmoid(params['logit']) * (own - self._unpack((deviation / v)[:, None] * z)))

  def error(self, params: Any, u: Array, t: Array, eps: Array, key: Key | None = None) -> Array:
    """eps - eps_theta at z_t = m_t u + sqrt(s_t) eps; u and eps [n, d], t [n]."""
    m, deviation, v = self.sde.mean(t)[:, None], jnp.sqrt(self.sde.variance(t))[:, None], self.sde.spread(t)[:, None]
    z = m * u + deviation * eps
    return eps - deviation * z / v - self.residual(params, z, t, key)

  def times(self, key: Key, n: int, sampling: str | None = None) -> tuple[Array, Array]:
    """(t, density), [n] each."""
    return sdes.draw_times(self.sde, sampling or self.sampling, jax.random.uniform(key, (n,)), self.start)

  def weighted(self, error: Array, t: Array, density: Array, weighting: str | None = None) -> Array:
    """The loss from errors [n, d]; with 'll' the cross-entropy -log p(u), in nats and constants included. [n]."""
    weighting = weighting or self.weighting
    weight = sdes.weight(self.sde, weighting, t) / density
    if weighting == 'll':
      return losses.diffusion_cross_entropy(error, weight, self.sde.variance(self.start))
    return weight * jnp.square(error).sum(-1)

  def loss(self, params: Any, key: Key, u: Array) -> Array:
    time, noise, dropout = jax.random.split(key, 3)
    t, density = self.times(time, u.shape[0])
    return self.weighted(self.error(params, u, t, jax.random.normal(noise, u.shape), dropout), t, density)

  def sample(self, params: Any, key: Key, n: int, d: int, sampler: str, temperature: float) -> Array:
    return self.counted(params, key, n, d, sampler, temperature)[0]

  def counted(self, params: Any, key: Key, n: int, d: int, sampler: str, temperature: float) -> tuple[Array, Array]:
    """(samples [n, d], evaluations of the network that they took together, [])."""
    first, noise = jax.random.split(key)
    z = jnp.sqrt(self.sde.spread(1.0)) * coordinates.standard(first, n, d, temperature)
    residual = functools.partial(self.residual, params)
    if sampler == 'ancestral':
      return diffusion.ancestral(self.sde, residual, noise, z, steps=self.steps, end=self.end), jnp.asarray(self.steps)
    return diffusion.generate(self.sde, residual, z, end=self.end, tolerance=self.tolerance)

  def log_prob(self, params: Any, u: Array, key: Key | None = None) -> Array:
    """Under the probability flow; `key` draws the probes, the same ones every time without it."""
    probes = None
    if self.probes:
      probes = jax.random.normal(jax.random.key(0) if key is None else key, (self.probes, *u.shape))
    residual = functools.partial(self.residual, params)
    return diffusion.log_density(self.sde, residual, u, probes=probes, end=self.end, tolerance=self.tolerance)[0]

  def evaluations(self, params: Any, d: int, sampler: str) -> float:
    """Of 'ode', whose steps adapt, those that 64 samples take together."""
    if sampler == 'ancestral':
      return float(self.steps)
    run = jax.jit(lambda params: self.counted(params, jax.random.key(0), 64, d, sampler, 1.0)[1])
    return float(run(params))


def build(
  *,
  sde: str = 'vp',
  sde_range: tuple[float, float] = (),
  start: float | None = None,
  map: tuple[int, ...] = (),
  channels: int = 128,
  layers: int = 3,
  dropout: float = 0.0,
  multipliers: tuple[int, ...] = (1,),
  attention: tuple[int, ...] = (),
  fir: bool = False,
  dtype: str = 'float32',
  **options: Any,
) -> Diffusion:
  """The density as a config names it; further options are the fields of Diffusion.

  Args:
    sde: 'vp', 'geometric', 'sub_vp' or 've'.
    sde_range: (beta0, beta1) of 'vp' and 'sub_vp', (smallest, largest variance) of the others; () has the class's defaults.
    start: e; by default 0 for 'geometric', else 0.01.
    map: (g, h, w, c) of the one level that is covered, for a U-Net (nets.unet) on maps [h, w, g c]; () has an MLP on vectors.
    channels: width of the network.
    layers: its blocks, of a U-Net for every level.
    dropout: rate.
    multipliers: of the U-Net, as what follows: factors on `channels`, one a level.
    attention: heights of maps with attention.
    fir: resample through a filter.
    dtype: of the convolutions.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  where = 'method.prior'
  if sde not in SDES:
    raise UserError(f'{where}.sde is {sde!r}{near(sde, SDES)}')
  if sde_range and (len(sde_range) != 2 or not 0 < sde_range[0] < sde_range[1] or sde == 'geometric' and sde_range[1] >= 1):
    bound = ', the larger below 1' if sde == 'geometric' else ''
    raise UserError(f'{where}.sde_range is {sde_range}, need two rising positive numbers{bound}')
  kind, first = SDES[sde]
  start = first if start is None else start
  if not 0 <= start < 1 or start == 0 and sde != 'geometric':
    raise UserError(f'{where}.start is {start!r}, need a time of at least 0 and below 1, and above 0 unless sde is geometric')
  for key, value, least in (('channels', channels, 2), ('layers', layers, 1)):
    if not _whole(value, least):
      raise UserError(f'{where}.{key} is {value!r}, need a whole number of at least {least}')
  if not 0 <= dropout < 1:
    raise UserError(f'{where}.dropout is {dropout!r}, need a rate of at least 0 and below 1')
  net = Vectors(channels, layers, dropout)
  if map:
    if len(map) != 4 or not all(_whole(n, 1) for n in map):
      raise UserError(f'{where}.map is {map}, need (groups, height, width, channels) of a level')
    g, h, w, c = map
    net = unet.UNet(
      channels, multipliers, layers, attention, g * c, fir, dropout=dropout, time_scale=TIME_SCALE, dtype=dtype
    )  # fmt: skip
    unet.check((h, w, g * c), net, where)
  return check(Diffusion(kind(*sde_range), net, start, map=map, **options))


def check(found: Diffusion) -> Diffusion:
  """The same, if its options can be.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  where = 'method.prior'
  for key, known in (('weighting', sdes.WEIGHTINGS), ('sampling', sdes.SAMPLINGS)):
    if getattr(found, key) not in known:
      raise UserError(f'{where}.{key} is {getattr(found, key)!r}{near(str(getattr(found, key)), known)}')
  if found.sampling == 'un' and not isinstance(found.sde, sdes.VP):
    raise UserError(f"{where}.sampling is 'un', which only sde 'vp' has")
  for key, least in (('steps', 1), ('probes', 0)):
    if not _whole(getattr(found, key), least):
      raise UserError(f'{where}.{key} is {getattr(found, key)!r}, need a whole number of at least {least}')
  if not found.tolerance > 0:
    raise UserError(f'{where}.tolerance is {found.tolerance!r}, need a positive number')
  if not 0 < found.end < 1:
    raise UserError(f'{where}.end is {found.end!r}, need a time above 0 and below 1')
  return found


def _whole(value: Any, least: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= least
