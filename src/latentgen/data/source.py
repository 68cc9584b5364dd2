"""Random-access image sources: the one interface between files and the pipeline."""

from collections.abc import Callable, Sequence
import functools
import hashlib
from typing import Any, Protocol

import numpy as np

Indices = np.ndarray | Sequence[int] | slice


class Source(Protocol):
  """A split of a data set: images in a fixed order, read by index."""

  name: str
  num_classes: int  # 0 where there are no labels
  shape: tuple[int, int, int]  # h, w, c of an image
  stored: bool  # whether examples are read from storage each time, which is worth doing in advance

  def __len__(self) -> int: ...

  def take(self, indices: Indices) -> dict[str, np.ndarray]:
    """{'image': [m, h, w, c], 'label': int32 [m]} of the examples at indices [m]; label -1 if unknown.

    Images are uint8; float32 where the data are no bytes (points of a toy distribution), and then used as they are.
    """
    ...

  def subset(self, indices: Indices, name: str | None = None) -> 'Source':
    """The source of these examples alone, in this order."""
    ...

  def checksum(self) -> str:
    """SHA-256, in hex, of what the source holds (of what identifies it, for sources too large to read)."""
    ...


class ArraySource:
  """Images in memory.

  Args:
    images: uint8 or float32 [n, h, w, c].
    labels: int [n], or None.
    name: for messages and reports, such as 'mnist/train'.
    num_classes: labels are below this; default: the largest label + 1, 0 without labels.

  Raises:
    ValueError: images are not uint8 or float32 [n, h, w, c], or labels do not fit.
  """

  stored = False

  def __init__(
    self, images: np.ndarray, labels: np.ndarray | None = None, name: str = '', num_classes: int | None = None
  ):
    images = np.asarray(images)
    if images.dtype not in (np.uint8, np.float32) or images.ndim != 4:
      raise ValueError(f'{name}: images must be uint8 or float32 [n, h, w, c], not {images.dtype} {list(images.shape)}')
    if labels is None:
      labels, seen = np.full(len(images), -1, np.int32), 0
    else:
      labels = np.asarray(labels).astype(np.int32)
      if labels.shape != (len(images),):
        raise ValueError(f'{name}: labels must be [{len(images)}], not {list(labels.shape)}')
      seen = int(labels.max(initial=-1)) + 1
    if num_classes is not None and num_classes < seen:
      raise ValueError(f'{name}: label {seen - 1} with num_classes = {num_classes}')
    self.name = name
    self.num_classes = seen if num_classes is None else num_classes
    self.shape = tuple(images.shape[1:])
    self._images, self._labels = images, labels

  def __len__(self) -> int:
    return len(self._images)

  def take(self, indices: Indices) -> dict[str, np.ndarray]:
    indices = indices if isinstance(indices, slice) else np.asarray(indices, np.intp)
    return {'image': self._images[indices], 'label': self._labels[indices]}

  def subset(self, indices: Indices, name: str | None = None) -> 'ArraySource':
    part = self.take(indices)  # a slice gives views
    return ArraySource(part['image'], part['label'], self.name if name is None else name, self.num_classes)

  def checksum(self) -> str:
    return self._checksum

  @functools.cached_property
  def _checksum(self) -> str:
    digest = hashlib.sha256(repr((self._images.shape, self.num_classes)).encode())
    digest.update(np.ascontiguousarray(self._images).data)
    digest.update(np.ascontiguousarray(self._labels, '<i4').data)
    return digest.hexdigest()


class RecordSource:
  """Images read record by record from storage, for sets that memory does not hold.

  Args:
    records: anything with `__len__` and `__getitem__(int)`, such as a `tfds.data_source`.
    decode: record -> (uint8 [h, w, c], label or None).
    name: for messages and reports.
    num_classes: labels are below this; 0 without labels.
    identity: text that identifies the content (name, version, sizes, options of decoding), for the checksum.
    indices: int [n] records that belong to the source, in order; default all.
  """

  stored = True

  def __init__(
    self,
    records: Any,
    decode: Callable[[Any], tuple[np.ndarray, int | None]],
    name: str = '',
    num_classes: int = 0,
    identity: str = '',
    indices: np.ndarray | None = None,
  ):
    self.name, self.num_classes = name, num_classes
    self._records, self._decode, self._identity = records, decode, identity
    self._indices = np.arange(len(records)) if indices is None else np.asarray(indices, np.int64)

  def __len__(self) -> int:
    return len(self._indices)

  @functools.cached_property
  def shape(self) -> tuple[int, int, int]:
    return tuple(self._decode(self._records[int(self._indices[0])])[0].shape)

  def take(self, indices: Indices) -> dict[str, np.ndarray]:
    indices = self._indices[indices if isinstance(indices, slice) else np.asarray(indices, np.intp)]
    images = np.empty((len(indices), *self.shape), np.uint8)
    labels = np.full(len(indices), -1, np.int32)
    for row, index in enumerate(indices):
      image, label = self._decode(self._records[int(index)])
      if image.dtype != np.uint8 or image.shape != self.shape:
        raise ValueError(f'{self.name}: record {index} is {image.dtype} {image.shape}, the first is uint8 {self.shape}')
      images[row] = image
      if label is not None:
        labels[row] = label
    return {'image': images, 'label': labels}

  def subset(self, indices: Indices, name: str | None = None) -> 'RecordSource':
    rows = self._indices[indices if isinstance(indices, slice) else np.asarray(indices, np.intp)]
    name = self.name if name is None else name
    return RecordSource(self._records, self._decode, name, self.num_classes, self._identity, rows)

  def checksum(self) -> str:
    head = repr((self._identity, self.num_classes, self.shape)).encode()
    return hashlib.sha256(head + np.ascontiguousarray(self._indices, '<i8').tobytes()).hexdigest()


def in_memory(source: Source) -> ArraySource:
  """The same examples as an `ArraySource`."""
  batch = source.take(slice(None))
  labels = batch['label'] if source.num_classes else None
  return ArraySource(batch['image'], labels, source.name, source.num_classes)
