"""Binary critics of one latent group, as logits: small convolutional nets on maps, MLPs on vectors.

They see the group and the top-down context that parametrises its prior. The first layer is a sum of one map of each, so that
many proposals share one pass over their context.
"""

from collections.abc import Sequence
import math

from flax import linen as nn
import jax.numpy as jnp

from latentgen.nets.layers import Conv
from latentgen.types import Array


class Block(nn.Module):
  """x + [GroupNorm, Swish, Conv3x3] twice, squeeze-and-excitation; halves the map and doubles the channels if `down`."""

  down: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1] * (2 if self.down else 1)
    stride = 2 if self.down else 1
    h = x
    for s in (stride, 1):
      h = nn.GroupNorm(num_groups=math.gcd(8, h.shape[-1]))(h)
      h = Conv(channels, 3, stride=s)(nn.swish(h))
    gate = nn.relu(nn.Dense(max(channels // 16, 4))(h.mean((1, 2))))
    h = h * nn.sigmoid(nn.Dense(channels)(gate))[:, None, None]
    skip = Conv(channels, 1, stride=2)(nn.swish(x)) if self.down else x
    return skip + h


class Critic(nn.Module):
  """log r(z, context), the logit of 'posterior' against 'prior'.

  Args:
    channels: width of the stem (maps) or of the hidden layers (vectors).
    blocks: body on maps, a string of A (same size) and B (halved; A where the map is at most 4 wide already).
    layers: hidden layers on vectors.

  References:
    Aneja, Schwing, Kautz and Vahdat, "A Contrastive Learning Approach for Training Variational Autoencoder Priors", 2021,
    arXiv 2010.02917, section 3; GroupNorm for its BatchNorm, which would leak the class through batch statistics.
  """

  channels: int = 64
  blocks: Sequence[str] | str = 'AAABAAAB'
  layers: int = 2

  @nn.compact
  def __call__(self, z: Array, context: Array) -> Array:
    """Maps z [(m,) n, h, w, c] and context [(m,) n, h, w, c'], or vectors [(m,) n, d] and [(m,) n, d'] -> [(m,) n]."""
    return self._map(z, context) if z.ndim > 3 else self._vector(z, context)

  def _vector(self, z: Array, context: Array) -> Array:
    h = nn.Dense(self.channels, name='stem')(z)
    if context.shape[-1]:
      h = h + nn.Dense(self.channels, use_bias=False, name='context')(context)
    for _ in range(self.layers - 1):
      h = nn.Dense(self.channels)(nn.swish(h))
    return nn.Dense(1, kernel_init=nn.initializers.zeros)(nn.swish(h))[..., 0]

  def _map(self, z: Array, context: Array) -> Array:
    def stem(x: Array, **kwargs) -> Array:
      return Conv(self.channels, 3, **kwargs)(x.reshape(-1, *x.shape[-3:])).reshape(*x.shape[:-1], self.channels)

    h = stem(z, name='stem') + stem(context, use_bias=False, name='context')
    lead = h.shape[:-3]
    h = h.reshape(-1, *h.shape[-3:])
    for kind in self.blocks:
      h = Block(down=kind == 'B' and h.shape[1] > 4)(h)
    h = nn.swish(h).mean((1, 2))
    return nn.Dense(1, kernel_init=nn.initializers.zeros)(h)[:, 0].reshape(lead)


def features(z: Array, prior, coordinates: str) -> Array:
  """What a critic sees of a group: latent ('z') or noise ('eps') coordinates, or both, along the last axis."""
  eps = (z - prior.loc) / prior.scale
  return {'z': lambda: z, 'eps': lambda: eps, 'both': lambda: jnp.concatenate([z, eps], -1)}[coordinates]()
