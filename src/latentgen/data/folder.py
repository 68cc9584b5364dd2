"""Images from a directory of image files, flat or in one sub-folder a class."""

from collections.abc import Sequence
import functools
import pathlib
import warnings

import numpy as np

from latentgen.data import memory, paths, splits
from latentgen.data.source import ArraySource, RecordSource, in_memory as to_memory
from latentgen.errors import UserError

FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')  # no other decoder of Pillow sees the files
SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm')


def load(
  path: str,
  size: int = 64,
  channels: int = 3,
  valid: int | float = 0.1,
  test: int | float = 0.1,
  in_memory: bool = True,
) -> dict[str, ArraySource | RecordSource]:
  """The splits of a directory of image files, [size, size, channels]; classes are the sub-folders, sorted by name.

  Each image is cropped to its central square and resized. The splits are cut from a fixed permutation of the sorted
  file names, so they are the same wherever the files lie.

  Args:
    path: the directory.
    size: side of an image in pixels.
    channels: 3 for colour, 1 for grey.
    valid: size of the validation split, a count or a fraction of all.
    test: size of the test split.
    in_memory: decode all images at the start; else each time an image is read.

  Raises:
    UserError: no images there, one cannot be decoded, or an option is out of range.
  """
  if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 4096:
    raise UserError(f'config.data.size = {size!r} must be a number of pixels from 1 to 4096')
  if channels not in (1, 3):
    raise UserError(f'config.data.channels = {channels!r} must be 1 or 3')
  if not isinstance(in_memory, bool):
    raise UserError(f'config.data.in_memory = {in_memory!r} must be True or False')
  root = paths.resolve(path, 'config.data.path')
  if not root.is_dir():
    raise UserError(f'config.data.path = {str(path)!r} is not a directory; it must hold image files')
  files = sorted((f for f in root.rglob('*') if _is_image(f, root)), key=lambda f: f.relative_to(root).as_posix())
  if len(files) < 3:
    raise UserError(
      f'config.data.path: {root} has {len(files)} image files ({" ".join(SUFFIXES)}); at least 3 are needed'
    )
  parents = [f.relative_to(root).parts[0] if f.parent != root else '' for f in files]
  classes = sorted(set(parents))
  if '' in classes and len(classes) > 1:
    raise UserError(f'config.data.path: {root} has images beside sub-folders of images; use one or the other')
  labels = None if classes == [''] else [classes.index(p) for p in parents]
  identity = repr((size, channels, [(f.relative_to(root).as_posix(), f.stat().st_size) for f in files]))
  source = RecordSource(
    _Files(files, labels),
    functools.partial(_decode, size=size, channels=channels),
    root.resolve().name,
    len(classes) if labels else 0,
    identity,
  )
  order, name = splits.permutation(len(files), 0), source.name
  cuts = splits.parts(len(files), valid, test)
  if in_memory:
    memory.check(len(files) * size**2 * channels, 'config.data.size', 'make it smaller, or set config.data.in_memory = False')
    source = to_memory(source)
  return {s: source.subset(order[cut], f'{name}/{s}') for s, cut in zip(('train', 'valid', 'test'), cuts, strict=True)}


def _is_image(file: pathlib.Path, root: pathlib.Path) -> bool:
  hidden = any(part.startswith('.') for part in file.relative_to(root).parts)
  return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()


class _Files:
  """Records of image files: (path, label or None)."""

  def __init__(self, files: Sequence[pathlib.Path], labels: Sequence[int] | None):
    self._files, self._labels = files, labels

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> tuple[pathlib.Path, int | None]:
    return self._files[index], None if self._labels is None else self._labels[index]


def _decode(record: tuple[pathlib.Path, int | None], size: int, channels: int) -> tuple[np.ndarray, int | None]:
  from PIL import Image

  path, label = record
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # about details of damaged files
      warnings.simplefilter('error', Image.DecompressionBombWarning)
      with Image.open(path, formats=FORMATS) as image:
        return fit(_bytes(image, path).convert('RGB' if channels == 3 else 'L'), size), label
  except UserError:
    raise
  except Exception as error:  # the decoders raise many types for damaged files
    raise UserError(f'{path} cannot be decoded ({type(error).__name__}: {error}); replace or remove it') from None


def _bytes(image, path: pathlib.Path):
  """The PIL image with a byte a channel: of 16-bit grey levels the high byte."""
  from PIL import Image

  if image.mode not in ('F', 'I') and not image.mode.startswith('I;16'):
    return image
  levels = np.asarray(image)
  if image.mode == 'F' or levels.min() < 0 or levels.max() >= 2**16:
    raise UserError(f'{path} has grey levels of more than 16 bits; save it with 8 bits a channel')
  return Image.fromarray((levels >> 8).astype(np.uint8))


def fit(image, size: int | None = None, crop: tuple[int, int, int, int] | None = None) -> np.ndarray:
  """Crops and resizes a PIL image.

  Args:
    image: PIL image, 'L' or 'RGB'.
    size: side of the square result in pixels; None keeps the size of the crop.
    crop: (top, left, height, width) in pixels; None is the central square, or all of it if size is None.

  Returns:
    uint8 [h, w, c].
  """
  from PIL import Image

  width, height = image.size
  if crop is None and size is not None:
    side = min(width, height)
    crop = ((height - side) // 2, (width - side) // 2, side, side)
  if crop is not None:
    top, left, rows, columns = crop
    image = image.crop((left, top, left + columns, top + rows))
  if size is not None and image.size != (size, size):
    image = image.resize((size, size), Image.Resampling.BILINEAR)  # antialiased
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array
