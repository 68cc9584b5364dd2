"""Volume-preserving autoregressive flows on a latent map, z <- z - mu(z) with mu strictly causal, so log|det| = 0.

Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020, arXiv 2007.03898, section 3; Kingma et al.,
"Improved Variational Inference with Inverse Autoregressive Flow", 2016, arXiv 1606.04934.
"""

from typing import Any

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from latentgen.nets.layers import Conv
from latentgen.types import Array


def causal_mask(size: int, order_in: np.ndarray, order_out: np.ndarray, strict: bool, mirror: bool) -> np.ndarray:
  """Mask of a convolution in raster order over pixels, then channel order inside a pixel.

  Args:
    size: k, odd.
    order_in: [i], position of each input channel in its pixel.
    order_out: [o], likewise.
    strict: an output does not see the input of its own position.
    mirror: reverses the order of pixels and of channels.

  Returns:
    [k, k, i, o] of 0 and 1.
  """
  pixel = np.arange(size * size).reshape(size, size)
  here = size * size // 2
  before = np.greater if mirror else np.less
  same = before(order_in[:, None], order_out[None])
  if not strict:
    same = same | (order_in[:, None] == order_out[None])
  mask = np.broadcast_to(before(pixel, here)[..., None, None], (size, size, *same.shape)).astype(np.float32)
  mask[size // 2, size // 2] = same
  return mask


class MaskedCell(nn.Module):
  """z - mu(z): masked Conv3x3 to six times the channels, ELU, masked depthwise 5x5, ELU, ELU, masked 1x1.

  Each latent channel owns six hidden ones. The first convolution is strict; the others let a hidden channel see its own
  position.

  Args:
    mirror: reversed raster order.
    expansion: hidden channels a latent channel.
    dtype: of the computation; the sum is float32.
  """

  mirror: bool = False
  expansion: int = 6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, z: Array) -> Array:
    """[n, h, w, c] -> [n, h, w, c]; the Jacobian is unit triangular in raster order."""
    channels = z.shape[-1]
    latent = np.arange(channels)
    hidden = np.repeat(latent, self.expansion)

    def conv(features: int, size: int, depthwise: bool = False) -> Conv:
      return Conv(features, size, weight_norm=True, depthwise=depthwise, dtype=self.dtype)

    h = conv(hidden.size, 3)(z, causal_mask(3, latent, hidden, True, self.mirror))
    own = causal_mask(5, np.zeros(1), np.zeros(1), False, self.mirror)
    h = conv(hidden.size, 5, depthwise=True)(nn.elu(h), own)
    mu = conv(channels, 1)(nn.elu(nn.elu(h)), causal_mask(1, hidden, latent, False, self.mirror))
    return z - mu.astype(z.dtype)


class Flow(nn.Module):
  """A masked cell and a second one in mirrored raster order."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, z: Array) -> Array:
    """[n, h, w, c] -> [n, h, w, c], log|det| = 0."""
    z = MaskedCell(mirror=False, dtype=self.dtype, name='forward')(z)
    return MaskedCell(mirror=True, dtype=self.dtype, name='mirrored')(z)
