"""MNIST and its relatives from a directory of IDX files, plain or gzipped: MNIST, Fashion-MNIST, KMNIST, EMNIST.

The header of an IDX file is a magic number (two zero bytes, 8 for unsigned bytes, the number of dimensions) and the
dimensions, all big-endian 32-bit integers; the bytes of the array follow. The files are MNIST's under the names they
are published with: `train-images-idx3-ubyte`, `t10k-labels.idx1-ubyte.gz`, `emnist-letters-test-images-idx3-ubyte`.
"""

from collections.abc import Callable
import gzip
import math
import pathlib
import struct
from typing import BinaryIO
import zlib

import numpy as np

from latentgen.data import memory, paths, splits
from latentgen.data.source import ArraySource
from latentgen.errors import UserError

_SIDE = 4096  # pixels; larger dimensions are a damaged header
_BLOCK = 1 << 20  # bytes read at a time
_PARTS = {'train': ('train',), 'test': ('t10k', 'test')}
_AGAIN = 'get the file again'


def load(
  path: str, valid: int | float = 5000, labels: bool = True, prefix: str = '', transpose: bool = False
) -> dict[str, ArraySource]:
  """The splits of a directory of IDX files; images [h, w, 1].

  Args:
    path: the directory.
    valid: images at the end of the training file that make the validation split; a count, or a fraction of the file.
    labels: read the label files too.
    prefix: only files whose name starts with this, where a directory holds several sets ('emnist-letters').
    transpose: swap rows and columns; EMNIST's images lie on their side.

  Raises:
    UserError: a file is missing or ambiguous, damaged, or does not fit the others.
  """
  for key, value, kind in (('labels', labels, bool), ('prefix', prefix, str), ('transpose', transpose, bool)):
    if not isinstance(value, kind):
      raise UserError(f'config.data.{key} = {value!r} must be {"a text" if kind is str else "True or False"}')
  folder = paths.resolve(path, 'config.data.path')
  if not folder.is_dir():
    raise UserError(
      f'config.data.path = {str(path)!r} is not a directory; it must hold IDX files (train-images-idx3-ubyte ...)'
    )
  arrays = {}
  for split in _PARTS:
    file = _find(folder, split, 'images', prefix)
    images = read(file, 3)
    target = None
    if labels:
      label_file = _find(folder, split, 'labels', prefix)
      target = read(label_file, 1)
      if len(target) != len(images):
        raise UserError(f'{label_file} has {len(target)} labels for the {len(images)} images of {file}; {_AGAIN}')
    arrays[split] = (images.swapaxes(1, 2) if transpose else images)[..., None], target
  (train, train_labels), (test, test_labels) = arrays['train'], arrays['test']
  if train.shape[1:] != test.shape[1:]:
    raise UserError(
      f'{folder}: training images are {train.shape[1:3]}, test images {test.shape[1:3]}; the files do not'
      ' belong together'
    )
  classes = max(int(t.max()) for t in (train_labels, test_labels)) + 1 if labels else 0
  name = prefix or folder.resolve().name
  cut = len(train) - splits.size(valid, len(train), 'config.data.valid')
  whole = ArraySource(train, train_labels, name, classes)
  return {
    'train': whole.subset(slice(0, cut), f'{name}/train'),
    'valid': whole.subset(slice(cut, None), f'{name}/valid'),
    'test': ArraySource(test, test_labels, f'{name}/test', classes),
  }


def _find(folder: pathlib.Path, split: str, what: str, prefix: str) -> pathlib.Path:
  """The one file of a split's images or labels; of a plain and a gzipped copy the plain one."""
  kind = 'idx3' if what == 'images' else 'idx1'
  found: dict[str, pathlib.Path] = {}
  for file in sorted(folder.iterdir(), reverse=True):  # 'name.gz' before 'name'
    name = file.name.lower()
    if name.startswith('.') or not file.name.startswith(prefix) or not file.is_file():
      continue
    if what in name and kind in name and any(p in name.split(what)[0] for p in _PARTS[split]):
      found[name.removesuffix('.gz')] = file
  usual = f'{_PARTS[split][0]}-{what}-{kind}-ubyte'
  if not found:
    here = f' of files that start with {prefix!r}' if prefix else ''
    hint = '; or set config.data.labels = False' if what == 'labels' else ''
    raise UserError(f'config.data.path: {folder} has no {split} {what}{here}; put {usual} or {usual}.gz there{hint}')
  if len(found) > 1:
    names = ', '.join(sorted(f.name for f in found.values()))
    raise UserError(f'config.data.path: {folder} has more than one set ({names}); pick one with config.data.prefix')
  return next(iter(found.values()))


def read(path: str | pathlib.Path, dimensions: int) -> np.ndarray:
  """The array in an IDX file of unsigned bytes.

  Nothing is allocated on the word of the header: the file is read block by block, up to what the header promises, and
  not at all if a file of its size cannot hold that much.

  Args:
    path: the file; gzip is recognised by its first two bytes.
    dimensions: how many the array must have.

  Returns:
    uint8, of that many dimensions.

  Raises:
    UserError: not an IDX file, or damaged, or the file cannot be read.
  """
  path = pathlib.Path(path)
  try:
    with open(path, 'rb') as file:
      zipped = file.read(2) == b'\x1f\x8b'
    with gzip.open(path, 'rb') if zipped else open(path, 'rb') as file:
      return _parse(path, file, dimensions)
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise UserError(f'{path}: damaged gzip file ({error}); {_AGAIN}') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror or error})') from None


def _parse(path: pathlib.Path, file: BinaryIO, dimensions: int) -> np.ndarray:
  magic, want = file.read(4), bytes((0, 0, 8, dimensions))
  if magic != want:
    raise UserError(
      f'{path}: starts with {magic.hex() or "nothing"}, not with {want.hex()}: not an IDX file of'
      f' {dimensions}-dimensional bytes; {_AGAIN}'
    )
  header = file.read(4 * dimensions)
  if len(header) < 4 * dimensions:
    raise UserError(f'{path}: truncated in its header; {_AGAIN}')
  shape = struct.unpack(f'>{dimensions}I', header)
  if 0 in shape or any(side > _SIDE for side in shape[1:]):
    raise UserError(f'{path}: the header gives the shape {shape}, which cannot be; {_AGAIN}')
  count = math.prod(shape)
  short = f'{path}: truncated: {list(shape)} bytes are announced, the file holds less; {_AGAIN}'
  if count > memory.DEFLATE * path.stat().st_size:
    raise UserError(short)
  memory.check(count, str(path), _AGAIN)
  body = _body(file, count)
  if len(body) < count:
    raise UserError(short)
  if len(body) > count:
    raise UserError(f'{path}: bytes follow after the {list(shape)} that are announced; {_AGAIN}')
  return np.frombuffer(body, np.uint8).reshape(shape)


def _body(file: BinaryIO, count: int) -> bytearray:
  """What is left of the file, at most count + 1 bytes."""
  body = bytearray()
  read_on: Callable[[], bytes] = lambda: file.read(min(_BLOCK, count + 1 - len(body)))
  while block := read_on():
    body += block
  return body
