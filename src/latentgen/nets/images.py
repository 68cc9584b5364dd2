"""Between images and maps: padding to a size that can be halved, cropping, and likelihoods over pixels."""

import jax.numpy as jnp

from latentgen.distributions import Bernoulli, DiscretizedLogisticMixture, Independent, Normal, soft_clamped_normal
from latentgen.types import Array

LIKELIHOODS = ('bernoulli', 'normal', 'dmol')


def padded_size(size: int, multiple: int) -> int:
  """The next multiple."""
  return -(-size // multiple) * multiple


def pad(x: Array, multiple: int) -> Array:
  """Zeros around an image, [b, h, w, c] -> [b, h', w', c], both sides multiples; an odd row goes to the far side."""
  extra = [padded_size(n, multiple) - n for n in x.shape[1:3]]
  return jnp.pad(x, ((0, 0), *((e // 2, e - e // 2) for e in extra), (0, 0)))


def crop(x: Array, height: int, width: int) -> Array:
  """What `pad` put zeros around, [..., h', w', c] -> [..., height, width, c]."""
  top, left = ((n - m) // 2 for n, m in zip(x.shape[-3:-1], (height, width), strict=True))
  return x[..., top : top + height, left : left + width, :]


def num_parameters(likelihood: str, channels: int, mixtures: int) -> int:
  """Channels that a decoder has to emit."""
  if likelihood == 'dmol':
    return DiscretizedLogisticMixture.num_parameters(channels, mixtures)
  return {'bernoulli': channels, 'normal': 2 * channels}[likelihood]


def pixel_likelihood(raw: Array, likelihood: str, channels: int, bits: int, mixtures: int) -> Independent:
  """The density over images in [0, 1] that a decoder's output stands for.

  Args:
    raw: [..., h, w, num_parameters].
    likelihood: 'bernoulli'; 'dmol', a mixture of discretised logistics; or 'normal', soft-clamped mean and standard
      deviation on [-1, 1], moved to [0, 1]: a density, D log 2 nats above the one on [-1, 1].
    channels: of the image.
    bits: of a pixel (dmol).
    mixtures: components (dmol).

  Returns:
    distribution over [..., h, w, channels], float32.
  """
  raw = raw.astype(jnp.float32)
  if likelihood == 'bernoulli':
    return Independent(Bernoulli(raw), 3)
  if likelihood == 'dmol':
    return Independent(DiscretizedLogisticMixture.from_parameters(raw, channels, bits, mixtures), 2)
  wide = soft_clamped_normal(*jnp.split(raw, 2, -1))
  return Independent(Normal(0.5 * (wide.loc + 1.0), 0.5 * wide.scale), 3)
