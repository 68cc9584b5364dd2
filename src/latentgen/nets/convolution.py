"""Convolutions as pure functions, channels last, with gradients that stay fast inside loops on a CPU.

On XLA's CPU backend the backward of a convolution inside a loop body (`lax.scan`, `nn.scan`) misses the fast path and
takes 20 to 40 times as long (jax issue 12868), and depthwise convolutions are slow everywhere. There, and only there,
`convolve` brings its own gradients (no forward mode through them); elsewhere it is XLA's convolution. Values agree to
rounding.
"""

from collections.abc import Iterator
import contextlib
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from latentgen.types import Array

LAYOUT = ('NHWC', 'HWIO', 'NHWC')
_FORCED: list[str] = []


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
  """Forces 'native' (XLA's) or 'custom' (own gradients) for what is traced inside; the default follows the backend."""
  if name not in ('native', 'custom'):
    raise ValueError(f"implementation is 'native' or 'custom', not {name!r}")
  _FORCED.append(name)
  try:
    yield
  finally:
    _FORCED.pop()


def _custom() -> bool:
  return _FORCED[-1] == 'custom' if _FORCED else jax.default_backend() == 'cpu'


def convolve(x: Array, kernel: Array, stride: int = 1, depthwise: bool = False) -> Array:
  """Convolution with the symmetric zero padding p = (k - 1) // 2, whatever the stride.

  Args:
    x: [n, h, w, i].
    kernel: [k, k', i, o]; depthwise [k, k', 1, i].
    stride: of both axes.
    depthwise: every channel has its own filter.

  Returns:
    [n, h', w', o] with h' = (h + 2p - k) // stride + 1.
  """
  kh, kw = kernel.shape[:2]
  padding = ((kh - 1) // 2,) * 2, ((kw - 1) // 2,) * 2
  if _custom():
    if (kh, kw) == (1, 1) and not depthwise:
      return x[:, ::stride, ::stride] @ kernel[0, 0]
    if not depthwise:
      return dense(x, kernel, stride, padding)
    if stride == 1 and kh % 2 and kw % 2:
      return taps(x, kernel)
  return _conv(x, kernel, stride, padding, feature_group_count=x.shape[-1] if depthwise else 1)


def _conv(x, kernel, stride, padding, **kwargs):
  return lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=LAYOUT, **kwargs)


def _crop_or_pad(x: Array, high: tuple[int, int]) -> Array:
  """Adds zeros, or drops rows and columns where negative, at the end of both spatial axes."""
  return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, high[0], 0), (0, high[1], 0), (0, 0, 0)))


# ---------------------------------------------------------------------------------------------- dense


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense(x: Array, kernel: Array, stride: int, padding: tuple[tuple[int, int], ...]) -> Array:
  """Convolution [n, h, w, i], [k, k', i, o] -> [n, h', w', o] whose two backward convolutions are in canonical form."""
  return _conv(x, kernel, stride, padding)


def _dense_forward(x, kernel, stride, padding):
  return dense(x, kernel, stride, padding), (x, kernel)


def _dense_backward(stride, padding, residuals, g):
  x, kernel = residuals
  barrier = lax.optimization_barrier  # else XLA folds the transposes back into slow dimension numbers
  sizes = list(zip(x.shape[1:3], kernel.shape[:2], g.shape[1:3], padding, strict=True))
  # Input: g with stride - 1 zeros between its pixels against the flipped, transposed kernel.
  around = [(k - 1 - low, h - (m - 1) * stride - 1 + low) for h, k, m, (low, _) in sizes]
  flipped = barrier(jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2))
  dx = _conv(g, flipped, 1, around, lhs_dilation=(stride,) * 2)
  # Kernel: channels as batch, batch as channels; rows that no window reaches are cropped first.
  reach = [k + (m - 1) * stride - h - low for h, k, m, (low, _) in sizes]
  left, right = barrier((x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)))
  left = _crop_or_pad(left, [min(r, 0) for r in reach])
  around = [(low, max(r, 0)) for r, (_, _, _, (low, _)) in zip(reach, sizes, strict=True)]
  dw = barrier(_conv(left, right, 1, around, rhs_dilation=(stride,) * 2))
  return dx, dw.transpose(1, 2, 0, 3)


dense.defvjp(_dense_forward, _dense_backward)


# ---------------------------------------------------------------------------------------------- depthwise


def _padded(x: Array, kh: int, kw: int) -> Array:
  return jnp.pad(x, ((0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))


@jax.custom_vjp
def taps(x: Array, kernel: Array) -> Array:
  """Depthwise convolution [n, h, w, c], [k, k', 1, c] -> [n, h, w, c], stride 1, odd k: one sum of shifted products."""
  kh, kw = kernel.shape[:2]
  padded, (_, h, w, _) = _padded(x, kh, kw), x.shape
  return sum(padded[:, i : i + h, j : j + w] * kernel[i, j, 0] for i in range(kh) for j in range(kw))


def _taps_forward(x, kernel):
  return taps(x, kernel), (x, kernel)


def _taps_backward(residuals, g):
  x, kernel = residuals
  (kh, kw), (n, h, w, c) = kernel.shape[:2], x.shape
  padded = _padded(x, kh, kw)

  def add(total: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
    # Row by row, so that what the k * k' sums read stays in the cache.
    image, row = at
    rows = lax.dynamic_slice(padded, (image, row, 0, 0), (1, kh, w + kw - 1, c))[0]
    gradient = lax.dynamic_slice(g, (image, row, 0, 0), (1, 1, w, c))[0, 0]
    return total + jnp.stack([(rows[i, j : j + w] * gradient).sum(0) for i in range(kh) for j in range(kw)]), None

  at = jnp.unravel_index(jnp.arange(n * h, dtype=jnp.int32), (n, h))
  dw, _ = lax.scan(add, jnp.zeros((kh * kw, c), g.dtype), at)
  return taps(g, jnp.flip(kernel, (0, 1))), dw.reshape(kernel.shape).astype(kernel.dtype)


taps.defvjp(_taps_forward, _taps_backward)


# ---------------------------------------------------------------------------------------------- weights, resizing


def channel_norm(kernel: Array) -> Array:
  """Euclidean norm of the filter of every output channel, [..., k, k', i, o] -> [..., 1, 1, 1, o]."""
  square = jnp.square(kernel).sum((-4, -3, -2), keepdims=True)
  # A filter that is masked everywhere has norm 0, where the root has no finite gradient.
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def weight_norm(kernel: Array, gain: Array) -> Array:
  """w = exp(gain) v / (||v|| + 1e-5) per output channel; kernel v [..., k, k', i, o], gain [..., o].

  References:
    Salimans and Kingma, "Weight Normalization", 2016, arXiv 1602.07868.
  """
  return jnp.exp(gain)[..., None, None, None, :] * kernel / (channel_norm(kernel) + 1e-5)


def _interpolation(n: int) -> np.ndarray:
  """[2n, n] weights of linear interpolation that maps the first and the last sample onto themselves."""
  at = np.arange(2 * n) * (n - 1) / (2 * n - 1)
  return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(n))).astype(np.float32)


def bilinear_upsample(x: Array) -> Array:
  """Doubles both sides with corners aligned, [n, h, w, c] -> [n, 2h, 2w, c]."""
  rows, columns = (jnp.asarray(_interpolation(n), x.dtype) for n in x.shape[1:3])
  return jnp.einsum('ph,qw,nhwc->npqc', rows, columns, x)


def nearest_upsample(x: Array) -> Array:
  """Doubles both sides by repetition, [n, h, w, c] -> [n, 2h, 2w, c]."""
  n, h, w, c = x.shape
  return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)
