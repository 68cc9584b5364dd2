"""Images from a file of numpy arrays, `.npz` or `.npy`.

An `.npz` holds either its splits (`train_images`, `test_images`, also `x_train`, `x_test`; labels `train_labels` or
`y_train`; a validation split `valid_images` or `x_valid` if there is one) or all images together (`images`, `labels`).
A `.npy` holds images alone. Images are uint8, [n, h, w] or [n, h, w, c].
"""

from collections.abc import Mapping
import math
import pathlib
from typing import BinaryIO
import warnings
import zipfile

import numpy as np

from latentgen.data import memory, paths, splits
from latentgen.data.source import ArraySource
from latentgen.errors import UserError

_KINDS, _DIMENSIONS = 'biufc', 8  # of arrays that are read
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
      if handle.read(6) == b'\x93NUMPY':
        handle.seek(0)
        return {'images': _array(handle, file.stat().st_size)}
    if not zipfile.is_zipfile(file):
      raise UserError(f'config.data.path = {str(file)!r} is neither an .npz nor an .npy file; save it with numpy.savez')
    with zipfile.ZipFile(file) as archive:
      members = {m.filename.removesuffix('.npy'): m for m in archive.infolist() if m.filename.endswith('.npy')}
      memory.check(sum(m.file_size for m in members.values()), str(file), 'split it, or save images as a folder')
      return {name: _member(archive, member) for name, member in members.items()}
  except UserError:
    raise
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
    raise UserError(f'config.data.path = {str(file)!r} is not a file; point it to an .npz or .npy file') from None
  except Exception as error:  # parsers of several packages
    raise UserError(f'{file} cannot be read ({error}); save plain arrays with numpy.savez') from None


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
  if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise ValueError(f'{member.filename} is compressed in a way that numpy does not use')
  if member.file_size > memory.DEFLATE * member.compress_size:
    raise ValueError(f'{member.filename} promises more than it can hold')
  with archive.open(member) as handle:
    return _array(handle, member.file_size)


def _array(handle: BinaryIO, size: int) -> np.ndarray:
  """The array in a .npy file of `size` bytes; its header is not believed, and no object is unpickled.

  Raises:
    ValueError: the header is damaged, or promises what the file does not hold.
  """
  version = np.lib.format.read_magic(handle)
  if version not in ((1, 0), (2, 0)):
    raise ValueError(f'version {version} of the format is not one for plain arrays')
  read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # numpy warns about old headers, and Python about what it finds in damaged ones
    shape, fortran, dtype = read(handle)
  if dtype.kind not in _KINDS or not all(type(side) is int and side >= 0 for side in shape) or len(shape) > _DIMENSIONS:
    raise ValueError(f'{dtype} {shape} is no array of numbers')
  count = math.prod(shape)
  if handle.tell() + count * dtype.itemsize != size:
    raise ValueError(f'{dtype} {shape} is announced, which is not what the file holds')
  array = np.empty(count, dtype)
  if count and handle.readinto(array.view(np.uint8)) != array.nbytes:
    raise ValueError('truncated')
  return array.reshape(shape, order='F' if fortran else 'C')
