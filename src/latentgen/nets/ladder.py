"""Parts of ladder networks: stages of gated blocks, stochastic heads, and how the two directions of inference meet.

Soenderby, Raiko, Maaloe, Soenderby and Winther, "Ladder Variational Autoencoders", 2016, arXiv 1602.02282. Maaloe, Fraccaro,
Lievin and Winther, "BIVA: A Very Deep Hierarchy of Latent Variables for Generative Modeling", 2019, arXiv 1902.02102.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from latentgen.distributions import Normal
from latentgen.nets.residual import Gated, Normed
from latentgen.types import Array

SCALES = ('std', 'logvar')
MERGES = ('block', 'precision')
MIN_SCALE = 1e-3


def gaussian(raw: Array, scale: str) -> Normal:
  """A diagonal Gaussian from a network's output [..., 2 d], float32.

  Args:
    raw: means, then what the standard deviation s is made of.
    scale: 'std', s = softplus(raw) + 0.001; 'logvar', log s^2 = softplus(raw), hence s >= 1, as in the published code.
  """
  loc, raw = jnp.split(raw.astype(jnp.float32), 2, -1)
  positive = jax.nn.softplus(raw)
  return Normal(loc, positive + MIN_SCALE if scale == 'std' else jnp.exp(0.5 * positive))


def fuse(a: Normal, b: Normal) -> Normal:
  """Product of two Gaussian densities, normalised: precisions add up, means are weighted by them.

  References:
    Soenderby et al., 2016, arXiv 1602.02282, equations 9 to 11.
  """
  weights = [jnp.square(1.0 / n.scale) for n in (a, b)]
  total = weights[0] + weights[1]
  return Normal((a.loc * weights[0] + b.loc * weights[1]) / total, jax.lax.rsqrt(total))


class Head(nn.Module):
  """elu, then one layer to the mean and the standard deviation of a latent.

  Args:
    latent: dimensions of the latent, or channels of its map.
    conv: the latent is a map.
    kernel_size: of the convolution; 0 is the size of the map.
    scale: one of SCALES.
    init_scale: see residual.Normed.
    dtype: of the computation.
  """

  latent: int
  conv: bool = False
  kernel_size: int = 0
  scale: str = 'std'
  init_scale: float = 0.01
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h: Array) -> Normal:
    """[n, h, w, c] -> Normal over [n, latent] or [n, h, w, latent]."""
    h = nn.elu(h) if self.conv else nn.elu(h).reshape(h.shape[0], -1)
    kernel_size = (self.kernel_size or max(h.shape[1:3])) if self.conv else 0
    layer = Normed(2 * self.latent, kernel_size, init_scale=self.init_scale, dtype=self.dtype, name='layer')
    return gaussian(layer(h), self.scale)


class Map(nn.Module):
  """A latent as a map: vectors through a dense layer, maps as they are.

  Args:
    shape: (h, w, c) that vectors become.
    init_scale: see residual.Normed.
    dtype: of the computation.
  """

  shape: tuple[int, int, int]
  init_scale: float = 0.01
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, z: Array, y: Array | None = None) -> Array:
    """[n, d] or [n, h, w, d], and classes [n, classes] beside it -> [n, h, w, c]."""
    z = beside(z, y)
    if z.ndim == 4:
      return z.astype(self.dtype)
    dense = Normed(math.prod(self.shape), init_scale=self.init_scale, dtype=self.dtype, name='layer')
    return dense(z).reshape(-1, *self.shape)


def beside(h: Array, y: Array | None) -> Array:
  """Appends classes [n, c] to the channels of a vector or of every place of a map."""
  if y is None:
    return h
  everywhere = y.reshape(-1, *(1,) * (h.ndim - 2), y.shape[-1])
  return jnp.concatenate([h, jnp.broadcast_to(everywhere, (*h.shape[:-1], y.shape[-1]))], -1)


class Up(nn.Module):
  """Stage of the encoder: gated blocks, the last of them with the stride; each sees aux.

  Args:
    block: makes a gated block.
    blocks: how many.
    stride: of the last one.
    first: the stage reads the image; its first block has no shortcut.
  """

  block: Callable[..., Gated]
  blocks: int
  stride: int
  first: bool

  @nn.compact
  def __call__(self, h: Array, aux: Array | None, train: bool) -> Array:
    """[n, h, w, c] -> [n, ceil(h / stride), ceil(w / stride), filters]."""
    for j in range(self.blocks):
      stride = self.stride if j == self.blocks - 1 else 1
      h = self.block(stride=stride, shortcut=j > 0 or not self.first, name=f'block_{j}')(h, aux, train=train)
    return h


class Down(nn.Module):
  """Stage of the generative model: gated blocks, the first of them enlarges; block j sees block j of the stage above.

  Args:
    block: makes a gated block.
    blocks: how many.
    size: (h, w) of the output.
  """

  block: Callable[..., Gated]
  blocks: int
  size: tuple[int, int]

  @nn.compact
  def __call__(self, h: Array, above: Sequence[Array | None], train: bool) -> list[Array]:
    """[n, h, w, c] and the blocks of the stage above -> [n, *size, filters] of every block, the last one the output."""
    outputs = []
    for j in range(self.blocks):
      h = self.block(shortcut=j > 0, name=f'block_{j}')(h, above[j], self.size, train)
      outputs.append(h)
    return outputs


class Encoder(nn.Module):
  """Bottom-up inference: the stochastic path of z^BU, and features for top-down inference.

  b_i = stage(s_{i-1}; concat(b_{i-1}, t_{i-1})), z_i^BU ~ q(. | b_i), s_i = map(z_i^BU)
  t_i = stage(t_{i-1}; b_i); s_0 = t_0 = x

  Without the bottom-up path t_i = stage(t_{i-1}). The first stage is shared by all samples of an image; without the bottom-up
  path everything is.

  Args:
    stage: makes a stage from its number (0 is the first) and its name.
    head: makes a head from its number and its name.
    remap: makes a Map from its shape and its name.
    layers: number of stages.
    classes: number of classes of q(y | x, z^BU); 0: none.
    hidden: makes the layers of that classifier from their outputs and names.
    bottom_up: has the stochastic path.
  """

  stage: Callable[..., Up]
  head: Callable[..., Head]
  remap: Callable[..., Map]
  layers: int
  classes: int
  hidden: Callable[..., Normed]
  bottom_up: bool

  @nn.compact
  def __call__(self, x: Array, k: int, draw: Callable[[int, Normal, Array], Array], train: bool):
    """Images [b, h, w, c] in [0, 1] and how to draw z_i^BU (number, posterior, features) -> terms of n = b k samples.

    Returns:
      t_1..t_L [n, h, w, c]; concat(t_L, b_L); per layer below the top (posterior, sample) of z^BU; logits [n, classes] or None.
    """
    repeat = functools.partial(jnp.repeat, repeats=k, axis=0)
    s = t = 2.0 * x - 1.0
    b, aux, taps, drawn = None, None, [], []
    for i in range(self.layers):
      if self.bottom_up:
        b = self.stage(i, name=f'bottom_up_{i}')(s, aux, train)
      t = self.stage(i, name=f'top_down_{i}')(t, b, train)
      if self.bottom_up:
        if not i:
          b, t = repeat(b), repeat(t)
        aux = jnp.concatenate([b, t], -1)
        if i < self.layers - 1:
          q = self.head(i, name=f'head_{i}')(b)
          z = draw(i, q, b)
          drawn.append((q, z))
          s = self.remap(b.shape[1:], name=f'map_{i}')(z)
      taps.append(t)
    if not self.bottom_up:
      taps = [repeat(t) for t in taps]
    top = aux if self.bottom_up else taps[-1]
    logits = None
    if self.classes:
      h = self.hidden(4 * self.classes, name='classes_inner')(nn.elu(top).reshape(top.shape[0], -1))
      logits = self.hidden(self.classes, name='classes')(nn.elu(h)).astype(jnp.float32)
    return taps, top, drawn, logits


class Posterior(nn.Module):
  """q(z_i^TD | x, z_>i): features of the encoder meet the generative state.

  Args:
    block: makes the gated block of 'block'.
    head: makes a head from its name.
    merge: 'block', a gated block of both; 'precision', the encoder's Gaussian times the prior.
    share: 'precision' takes the prior itself; else a Gaussian from the state through a head of its own.
  """

  block: Callable[..., Gated]
  head: Callable[..., Head]
  merge: str
  share: bool

  @nn.compact
  def __call__(self, feature: Array, state: Array, prior: Normal, train: bool) -> Normal:
    """[n, h, w, c] each, and the Normal p(z_i^TD | z_>i)."""
    if self.merge == 'block':
      return self.head(name='head')(self.block(name='merge')(feature, state, train=train))
    return fuse(self.head(name='head')(feature), prior if self.share else self.head(name='state')(state))


class Layer(nn.Module):
  """One layer of latents below the top: priors and posteriors given the generative state.

  Args:
    groups: 2 for (z^TD, z^BU), 1 for z^TD alone.
    head: makes a head from its name.
    posterior: makes the posterior of z^TD from its name.
  """

  groups: int
  head: Callable[..., Head]
  posterior: Callable[..., Posterior]

  @nn.compact
  def __call__(self, state: Array, feature: Array | None, train: bool) -> tuple[list[Normal], Normal | None]:
    """State [n, h, w, c], feature of the encoder or None -> priors of the groups, posterior of z^TD or None."""
    priors = [self.head(name=f'prior_{name}')(state) for name in ('td', 'bu')[: self.groups]]
    q = None if feature is None else self.posterior(name='posterior')(feature, state, priors[0], train)
    return priors, q


class Top(nn.Module):
  """q(z_L | x, z^BU, y): a gated block without shortcut and a head."""

  block: Callable[..., Gated]
  head: Callable[..., Head]

  @nn.compact
  def __call__(self, feature: Array, y: Array | None, train: bool) -> Normal:
    """[n, h, w, c], [n, classes] or None -> Normal of z_L."""
    return self.head(name='head')(self.block(shortcut=False, name='merge')(beside(feature, y), train=train))
