"""From stored bytes to what a model sees, on the device: pure functions of a key and a batch."""

from collections.abc import Callable
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.data.source import ArraySource, Source
from latentgen.errors import UserError, did_you_mean
from latentgen.types import Array, Batch, Key

BINARIZE = ('none', 'fresh', 'threshold', 'fixed')
Preprocess = Callable[[Key, Batch, bool], dict[str, Array]]


def make(
  binarize: str = 'none', dequantize: bool = False, bits: int = 8, pad: int = 0, flip: bool = False
) -> Preprocess:
  """Builds the preprocessing of a run.

  With x a stored byte (0..255) and level = floor(x / 2^(8 - bits)), a pixel becomes

    binarize 'none':       level / (2^bits - 1), or (level + u) / 2^bits with u ~ U[0, 1) if dequantize
    binarize 'fresh':      Bernoulli(x / 255), drawn anew at every access
    binarize 'threshold':  1 if x / 255 > 1/2
    binarize 'fixed':      x / 255 of a source that `binarize_fixed` made; NaN where x is neither 0 nor 255

  Args:
    binarize: one of BINARIZE.
    dequantize: adds uniform noise within the grey level's bin, so that a density over the reals bounds the probability.
    bits: bits a channel that are kept, 1 to 8.
    pad: rows and columns of zeros added on every side, before anything else (28x28 with 2 is 32x32).
    flip: in training, mirror each image left to right with probability 1/2.

  Returns:
    preprocess(key, batch, train), to be traced by jit with `train` static: batch['image'] uint8 [b, h, w, c] becomes
    float32 [b, h + 2 pad, w + 2 pad, c] in [0, 1], all else stays as it is. With no option set, float32 images stay too.

  Raises:
    UserError: a value is out of range, or two do not go together.
  """
  if binarize not in BINARIZE:
    raise UserError(
      f'config.data.binarize = {binarize!r} must be one of {", ".join(BINARIZE)}' + did_you_mean(binarize, BINARIZE)
    )
  for name, value, low, high in (('bits', bits, 1, 8), ('pad', pad, 0, 512)):
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
      raise UserError(f'config.data.{name} = {value!r} must be an integer from {low} to {high}')
  for name, value in (('dequantize', dequantize), ('flip', flip)):
    if not isinstance(value, bool):
      raise UserError(f'config.data.{name} = {value!r} must be True or False')
  if binarize != 'none' and bits < 8:
    raise UserError(f"config.data.bits = {bits} needs config.data.binarize = 'none', not {binarize!r}")
  if binarize != 'none' and dequantize:
    raise UserError(f"config.data.dequantize needs config.data.binarize = 'none', not {binarize!r}")

  defaults = dict(bits=8, dequantize=False, pad=0, flip=False)
  chosen = {name: value for name, value in dict(bits=bits, dequantize=dequantize, pad=pad, flip=flip).items() if value != defaults[name]}

  def preprocess(key: Key, batch: Batch, train: bool) -> dict[str, Array]:
    x = jnp.asarray(batch['image'])
    if x.dtype == jnp.float32 and binarize == 'none' and not chosen:
      return dict(batch)
    if binarize != 'none':
      _check_bytes(binarize, x.dtype)
    if x.dtype == jnp.float32:
      name, value = next(iter(chosen.items()))
      raise UserError(f'config.data.{name} = {value!r} needs images of bytes, and these are {x.dtype}; set it to {defaults[name]!r}')
    if x.dtype != jnp.uint8 or x.ndim != 4:
      raise TypeError(f"batch['image'] must be uint8 [b, h, w, c], not {x.dtype} {list(x.shape)}")
    flip_key, pixel_key = jax.random.split(key)
    if pad:
      x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    if flip and train:
      x = jnp.where(jax.random.bernoulli(flip_key, 0.5, (x.shape[0], 1, 1, 1)), x[:, :, ::-1], x)
    if binarize == 'none':
      x = _levels(pixel_key, x, bits, dequantize)
    elif binarize == 'fresh':
      x = (_uniform(pixel_key, x.shape) * 255 < x.astype(jnp.float32)).astype(jnp.float32)
    elif binarize == 'threshold':
      x = (x >= 128).astype(jnp.float32)
    else:
      x = jnp.where((x == 0) | (x == 255), (x == 255).astype(jnp.float32), jnp.nan)
    return {**batch, 'image': x}

  return preprocess


def _check_bytes(binarize: str, dtype: np.dtype) -> None:
  if dtype != np.uint8:
    raise UserError(f"config.data.binarize = {binarize!r} needs images of bytes, and these are {dtype}; leave it at 'none'")


def _levels(key: Key, x: Array, bits: int, dequantize: bool) -> Array:
  level = jnp.right_shift(x, jnp.uint8(8 - bits)).astype(jnp.float32)
  if dequantize:
    return (level + _uniform(key, x.shape)) / 2**bits
  # Compilers turn division by a constant into a product with its rounded reciprocal, which is off by an ulp. With the
  # reciprocal in two parts, where the product with the first is exact, the sum is rounded once and right.
  high = np.round(2**16 / (2**bits - 1)) / 2**16
  return level * np.float32(high) + level * np.float32(1 / (2**bits - 1) - high)


def _uniform(key: Key, shape: tuple[int, ...]) -> Array:
  """U[0, 1) on a grid of 2^-16: added to a level of 8 bits it is exact in float32, and never rounds up to the next."""
  return jax.random.bits(key, shape, jnp.uint16).astype(jnp.float32) / 2**16


def binarize_fixed(source: Source, seed: int, chunk: int = 4096) -> ArraySource:
  """One Bernoulli(x / 255) draw of every pixel, in memory: values 0 and 255, the same for the same seed and name.

  Args:
    source: grey images.
    seed: of the draw.
    chunk: images drawn at a time; no influence on the result.

  Raises:
    UserError: the images are no bytes.

  References:
    R. Salakhutdinov and I. Murray, On the quantitative analysis of deep belief networks, ICML 2008 (the practice of
    fixing one binarised copy of MNIST).
  """
  stream = np.random.PCG64(np.random.SeedSequence([int(seed) & (2**64 - 1), zlib.crc32(source.name.encode())]))
  images = np.empty((len(source), *source.shape), np.uint8)
  labels = np.empty(len(source), np.int32)
  for start in range(0, len(source), chunk):
    batch = source.take(slice(start, start + chunk))
    _check_bytes('fixed', batch['image'].dtype)
    x = batch['image'].astype(np.uint64)
    draw = stream.random_raw(x.size).reshape(x.shape) >> np.uint64(32)  # uniform over 0 .. 2^32 - 1
    images[start : start + chunk] = np.where(draw * np.uint64(255) < x << np.uint64(32), 255, 0)
    labels[start : start + chunk] = batch['label']
  return ArraySource(images, labels if source.num_classes else None, source.name, source.num_classes)
