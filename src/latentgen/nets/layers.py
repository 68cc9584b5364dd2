"""Layers that the networks share: convolution, dense layer, BatchNorm, squeeze-and-excitation."""

import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from latentgen.nets import convolution
from latentgen.types import Array, Key

swish = nn.swish


def affine(
  module: nn.Module, shape: tuple[int, ...], use_bias: bool, mask: Array | None = None
) -> tuple[Array, Array | None]:
  """The parameters `kernel` [..., i, o] and `bias` [o] or None of a compact module, float32.

  Both start as U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default (Kaiming uniform with a = sqrt 5), the kernel
  times the mask. They are one draw of random numbers: the draws are most of what compiling an initialisation costs.
  """
  size, outputs = math.prod(shape), shape[-1]
  bias: Array | float = 0.0

  def first(key: Key) -> Array:
    nonlocal bias
    bound = math.sqrt(outputs / size)
    draw = jax.random.uniform(key, (size + use_bias * outputs,), minval=-bound, maxval=bound)
    kernel, bias = draw[:size].reshape(shape), draw[size:]
    return kernel if mask is None else kernel * mask

  # Flax also traces initialisers to check shapes; only the real call may leave a bias behind.
  known = module.has_variable('params', 'kernel')
  kernel = module.param('kernel', (lambda _: jnp.zeros(shape)) if known else first)
  return kernel, module.param('bias', lambda _: jnp.broadcast_to(bias, (outputs,))) if use_bias else None


class Conv(nn.Module):
  """Convolution with symmetric zero padding (k - 1) // 2; channels last.

  Parameters are float32: `kernel` [k, k, i, o] (depthwise [k, k, 1, i]), `bias` [o], and with weight normalisation
  `gain` [o], the log norm of each filter. Kernel and bias start as in PyTorch, U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

  Args:
    features: output channels; ignored if depthwise.
    kernel_size: k.
    stride: of both axes.
    use_bias: adds a bias.
    weight_norm: w = exp(gain) v / (||v|| + 1e-5), gain starts at log(||v|| + 0.01).
    depthwise: one filter a channel.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  use_bias: bool = True
  weight_norm: bool = False
  depthwise: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mask: Any = None) -> Array:
    """[n, h, w, i] -> [n, h', w', o].

    A mask of 0 and 1, which broadcasts to the kernel, keeps weights out: they start at 0 and their gradients are 0.
    """
    k, channels = self.kernel_size, x.shape[-1]
    shape = (k, k, 1, channels) if self.depthwise else (k, k, channels, self.features)
    mask = None if mask is None else jnp.asarray(mask, jnp.float32)
    kernel, bias = affine(self, shape, self.use_bias, mask)
    if mask is not None:
      kernel = kernel * mask
    if self.weight_norm:
      gain = self.param('gain', lambda _: jnp.log(convolution.channel_norm(kernel).reshape(-1) + 0.01))
      kernel = convolution.weight_norm(kernel, gain)
    y = convolution.convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.depthwise)
    return y if bias is None else y + bias.astype(self.dtype)


class ConvTranspose(nn.Module):
  """Transposed convolution, channels last; `kernel` [k, k, i, o] and `bias` [o] start as those of `Conv`.

  Args:
    features: output channels.
    kernel_size: k.
    stride: of both axes.
    padding: rows and columns dropped on every side.
    output_padding: of those after the last row and column, so many stay.
    use_bias: adds a bias.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 3
  stride: int = 2
  padding: int = 1
  output_padding: int = 0
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[n, h, w, i] -> [n, h', w', o], h' = (h - 1) stride - 2 padding + k + output_padding."""
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel, bias = affine(self, shape, self.use_bias)
    crop = (self.padding, self.padding - self.output_padding)
    y = convolution.transposed(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, crop)
    return y if bias is None else y + bias.astype(self.dtype)


class Dense(nn.Module):
  """x W + b, initialised as `Conv`.

  Args:
    features: outputs.
    dtype: of the computation.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[..., i] -> [..., features]."""
    kernel, bias = affine(self, (x.shape[-1], self.features), True)
    return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


def batch_norm(train: bool, dtype: Any = jnp.float32) -> nn.BatchNorm:
  """BatchNorm over [n, h, w]; eps 1e-5, new statistics weigh 0.05; statistics in float32.

  Under jit with a sharded batch the statistics are those of the whole batch. The running variance is the biased one
  (PyTorch keeps the unbiased one). To be made inside a compact method.
  """
  return nn.BatchNorm(use_running_average=not train, momentum=0.95, epsilon=1e-5, dtype=dtype)


class SqueezeExcite(nn.Module):
  """x * sigmoid(Dense(relu(Dense(mean over pixels)))), with max(c / 16, 4) hidden units.

  References:
    Hu, Shen, Albanie, Sun and Wu, "Squeeze-and-Excitation Networks", 2018, arXiv 1709.01507.
  """

  dtype: Any = jnp.float32

  def __call__(self, x: Array) -> Array:
    """[n, h, w, c] -> [n, h, w, c]."""
    return x * self.gate(x)[:, None, None]

  @nn.compact
  def gate(self, x: Array) -> Array:
    """[n, h, w, c] -> [n, c] in (0, 1)."""
    channels = x.shape[-1]
    hidden = max(channels // 16, 4)
    h = nn.relu(Dense(hidden, self.dtype, name='squeeze')(x.mean((1, 2))))
    return nn.sigmoid(Dense(channels, self.dtype, name='excite')(h))
