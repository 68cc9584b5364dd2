"""Images from a file of numpy arrays, `.npz` or `.npy`.

An `.npz` holds either its splits (`train_images`, `test_images`, also `x_train`, `x_test`; labels `train_labels` or
`y_train`; a validation split `valid_images` or `x_valid` if there is one) or all images together (`images`, `labels`).
A `.npy` holds images alone. Images are uint8, [n, h, w] or [n, h, w, c].
"""

from collections.abc import Mapping
import pathlib
import zipfile
import zlib

import numpy as np

from latentgen.data import paths, splits
from latentgen.data.source import ArraySource
from latentgen.errors import UserError

_NAMES = {'train': ('train',), 'valid': ('valid', 'val', 'validation'), 'test': ('test',)}


def load(path: str, valid: int | float = 0.1, test: int | float = 0.1) -> dict[str, ArraySource]:
  """The splits of an array file; a fixed permutation draws those that the file does not have.

  Args:
    path: the file.
    valid: size of the validation split, a count or a fraction, where the file has none; taken from its training images.
    test: size of the test split, where the file has all images together.

  Raises:
    UserError: no such file or arrays, or not the dtype or shape that is needed.
  """
  file = paths.resolve(path, 'config.data.path')
  arrays = _read(file)
  name = file.stem
  if 'images' in arrays:
    whole = _source(arrays, file, name, 'images', 'labels')
    order = splits.permutation(len(whole), 0)
    cuts = splits.parts(len(whole), valid, test)
    return {s: whole.subset(order[cut], f'{name}/{s}') for s, cut in zip(('train', 'valid', 'test'), cuts, strict=True)}
  found = {split: _split(arrays, file, name, split) for split in _NAMES}
  for split in ('train', 'test'):
    if found[split] is None:
      raise UserError(
        f'{file} has no {split} images: it holds {", ".join(sorted(arrays)) or "nothing"}; save them as {split}_images,'
        ' or all images together as images'
      )
  if found['valid'] is None:
    train = found['train']
    order = splits.permutation(len(train), 0)
    cut = splits.size(valid, len(train), 'config.data.valid')
    found |= {'train': train.subset(order[cut:]), 'valid': train.subset(order[:cut], f'{name}/valid')}
  classes = max(source.num_classes for source in found.values())
  for source in found.values():
    source.num_classes = classes
  return found


def _split(arrays: Mapping[str, np.ndarray], file: pathlib.Path, name: str, split: str) -> ArraySource | None:
  for word in _NAMES[split]:
    for images, labels in ((f'{word}_images', f'{word}_labels'), (f'x_{word}', f'y_{word}')):
      if images in arrays:
        return _source(arrays, file, f'{name}/{split}', images, labels)
  return None


def _source(arrays: Mapping[str, np.ndarray], file: pathlib.Path, name: str, images: str, labels: str) -> ArraySource:
  x, y = arrays[images], arrays.get(labels)
  if x.dtype != np.uint8:
    hint = 'np.round(255 * x).astype(np.uint8) if they lie in [0, 1]' if x.dtype.kind == 'f' else 'x.astype(np.uint8)'
    raise UserError(f'{file}: {images} are {x.dtype}, they must be uint8, 0 to 255; save {hint}')
  if x.ndim == 3:
    x = x[..., None]
  if x.ndim != 4 or 0 in x.shape:
    raise UserError(f'{file}: {images} are {list(x.shape)}, they must be [n, h, w] or [n, h, w, c]; reshape them')
  if y is not None:
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.shape != x.shape[:1] or y.dtype.kind not in 'iu' or y.min() < 0 or y.max() >= 2**31:
      raise UserError(f'{file}: {labels} must be {len(x)} class numbers from 0, not {y.dtype} {list(y.shape)}')
  return ArraySource(x, y, name)


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with open(file, 'rb') as handle:
      start = handle.read(6)
    if start == b'\x93NUMPY':
      return {'images': np.array(np.load(file, mmap_mode='r', allow_pickle=False))}  # a map is held to the file's size
    if not zipfile.is_zipfile(file):
      raise UserError(f'config.data.path = {str(file)!r} is neither an .npz nor an .npy file; save it with numpy.savez')
    with np.load(file, allow_pickle=False) as archive:
      return {key: archive[key] for key in archive.files}
  except (FileNotFoundError, IsADirectoryError):
    raise UserError(f'config.data.path = {str(file)!r} is not a file; point it to an .npz or .npy file') from None
  except (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    zlib.error,
    zipfile.BadZipFile,
    NotImplementedError,
    MemoryError,
  ) as error:
    raise UserError(f'{file} cannot be read ({error}); save plain arrays with numpy.savez') from None
