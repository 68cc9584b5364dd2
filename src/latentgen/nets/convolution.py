"""Convolutions as pure functions, channels last, with gradients that stay fast inside loops on a CPU.

On XLA's CPU backend the backward of a convolution inside a loop body (`lax.scan`, `nn.scan`) misses the fast path and
takes 20 to 40 times as long (jax issue 12868), strided and depthwise ones are slow everywhere. There, and only there,
`convolve` has forms and gradients of its own (no forward mode through them); elsewhere it is XLA's convolution. Values agree
to rounding; `config.debug.native_convolutions` turns them off.
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
      return dense(x, kernel, padding) if stride == 1 else by_patches(x, kernel, stride, padding)
    if stride == 1 and kh % 2 and kw % 2:
      return taps(x, kernel)
  return _conv(x, kernel, stride, padding, feature_group_count=x.shape[-1] if depthwise else 1)


def _conv(x, kernel, stride, padding, **kwargs):
  return lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=LAYOUT, **kwargs)


# ---------------------------------------------------------------------------------------------- dense


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: Array, kernel: Array, padding: tuple[tuple[int, int], ...]) -> Array:
  """Convolution [n, h, w, i], [k, k', i, o] -> [n, h', w', o], stride 1; its two backward convolutions are in canonical form."""
  return _conv(x, kernel, 1, padding)


def _dense_forward(x, kernel, padding):
  return dense(x, kernel, padding), (x, kernel)


def _dense_backward(padding, residuals, g):
  x, kernel = residuals
  barrier = lax.optimization_barrier  # else XLA folds the transposes back into slow dimension numbers
  around = [(k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape[:2], padding, strict=True)]
  dx = _conv(g, barrier(jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)), 1, around)
  # The kernel's: channels as batch, batch as channels.
  dw = barrier(_conv(*barrier((x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3))), 1, padding))
  return dx, dw.transpose(1, 2, 0, 3)


dense.defvjp(_dense_forward, _dense_backward)


def by_patches(x: Array, kernel: Array, stride: int, padding: tuple[tuple[int, int], ...]) -> Array:
  """Convolution [n, h, w, i], [k, k', i, o] -> [n, h', w', o] as one matrix product; so are its gradients."""
  kh, kw, inputs, outputs = kernel.shape
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  h, w = ((n - k) // stride + 1 for n, k in zip(padded.shape[1:3], (kh, kw), strict=True))
  ends = (h - 1) * stride + 1, (w - 1) * stride + 1
  patches = [padded[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i in range(kh) for j in range(kw)]
  return jnp.concatenate(patches, -1) @ kernel.reshape(kh * kw * inputs, outputs)


def transposed(x: Array, kernel: Array, stride: int, crop: tuple[int, int]) -> Array:
  """Transposed convolution: every pixel spreads over a window, as the gradient of a strided convolution does.

  Args:
    x: [n, h, w, i].
    kernel: [k, k', i, o]; tap (0, 0) is the first row and column of a window, as in the convolution that this transposes.
    stride: between windows, of both axes.
    crop: rows and columns to drop before the first and after the last one; PyTorch's (p, p - output_padding).

  Returns:
    [n, h', w', o] with h' = (h - 1) stride + k - sum(crop).
  """
  if not _custom():
    around = [(k - 1 - crop[0], k - 1 - crop[1]) for k in kernel.shape[:2]]
    return _conv(x, jnp.flip(kernel, (0, 1)), 1, around, lhs_dilation=(stride,) * 2)
  return _spread(x, kernel, stride, crop)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _spread(x: Array, kernel: Array, stride: int, crop: tuple[int, int]) -> Array:
  """`transposed` as a matrix product for each tap; those that fall on one phase of the stride are added before phases are woven."""
  (n, h, w, _), (kh, kw, _, outputs) = x.shape, kernel.shape
  more = [-(-k // stride) - 1 for k in (kh, kw)]  # pixels by which a phase is larger than x

  def phase(a: int, b: int) -> Array:
    total = jnp.zeros((n, h + more[0], w + more[1], outputs), x.dtype)
    for i in range(a, kh, stride):
      for j in range(b, kw, stride):
        before = i // stride, j // stride
        edges = [(low, most - low) for low, most in zip(before, more, strict=True)]
        total = total + jnp.pad(x @ kernel[i, j], ((0, 0), *edges, (0, 0)))
    return total

  rows = [jnp.stack([phase(a, b) for b in range(stride)], 3) for a in range(stride)]
  woven = jnp.stack(rows, 2).reshape(n, (h + more[0]) * stride, (w + more[1]) * stride, outputs)
  edges = [(-crop[0], (m - 1) * stride + k - crop[1] - (m + e) * stride, 0) for m, k, e in zip((h, w), (kh, kw), more, strict=True)]
  return lax.pad(woven, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def _spread_forward(x, kernel, stride, crop):
  return _spread(x, kernel, stride, crop), (x, kernel)


def _spread_backward(stride, crop, residuals, g):
  x, kernel = residuals
  (kh, kw, inputs, outputs), (_, h, w, _) = kernel.shape, x.shape
  g = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), (*crop, 0), (*crop, 0), (0, 0, 0)))
  ends = (h - 1) * stride + 1, (w - 1) * stride + 1
  flat, dx, dw = x.reshape(-1, inputs), 0.0, []
  for i in range(kh):
    for j in range(kw):
      seen = g[:, i : i + ends[0] : stride, j : j + ends[1] : stride].reshape(-1, outputs)
      dx = dx + seen @ kernel[i, j].T
      dw.append(flat.T @ seen)
  return dx.reshape(x.shape), jnp.stack(dw).reshape(kernel.shape)


_spread.defvjp(_spread_forward, _spread_backward)


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
  # The barrier keeps XLA from sharing the broadcast filters with the forward pass, by which neither would be one loop.
  return taps(g, lax.optimization_barrier(jnp.flip(kernel, (0, 1)))), dw.reshape(kernel.shape).astype(kernel.dtype)


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
  return _repeat_custom(x) if _custom() else _repeat(x)


def _repeat(x: Array) -> Array:
  n, h, w, c = x.shape
  return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


def _repeat_backward(_, g):
  # A sum of four phases, elementwise: a reduction over axes of two is several times slower on a CPU.
  return (sum(g[:, row::2, column::2] for row in range(2) for column in range(2)),)


_repeat_custom = jax.custom_vjp(_repeat)
_repeat_custom.defvjp(lambda x: (_repeat(x), None), _repeat_backward)
