"""Training with few labels: most labels of a split are taken away, and the images that keep theirs may be repeated."""

import hashlib
from typing import Any
import zlib

import numpy as np

from latentgen.data import memory, splits
from latentgen.data.source import Indices, Source
from latentgen.errors import UserError

OPTIONS = ('labels_per_class', 'labelled_copies')  # of `few`, in `config.data`
_CHUNK = 4096


class Relabelled:
  """Examples of another source with labels of their own, in any order and as often as wanted; images are not copied.

  Args:
    source: where the images are.
    rows: int [n], examples of `source`.
    labels: int [n], their labels, -1 if unknown.
    distinct: so many rows at the beginning are different examples; the rest repeats them. Default all.
    name: for messages and reports; default that of `source`.
  """

  def __init__(
    self, source: Source, rows: np.ndarray, labels: np.ndarray, distinct: int | None = None, name: str | None = None
  ):
    self.name = source.name if name is None else name
    self.num_classes, self.shape, self.stored = source.num_classes, source.shape, source.stored
    self.distinct = len(rows) if distinct is None else distinct
    self._source, self._rows, self._labels = source, np.asarray(rows, np.intp), np.asarray(labels, np.int32)

  def __len__(self) -> int:
    return len(self._rows)

  def take(self, indices: Indices) -> dict[str, np.ndarray]:
    indices = indices if isinstance(indices, slice) else np.asarray(indices, np.intp)
    return {**self._source.take(self._rows[indices]), 'label': self._labels[indices]}

  def subset(self, indices: Indices, name: str | None = None) -> 'Relabelled':
    indices = indices if isinstance(indices, slice) else np.asarray(indices, np.intp)
    return Relabelled(self._source, self._rows[indices], self._labels[indices], None, self.name if name is None else name)

  def checksum(self) -> str:
    digest = hashlib.sha256(self._source.checksum().encode())
    digest.update(np.ascontiguousarray(self._rows, '<i8').data)
    digest.update(np.ascontiguousarray(self._labels, '<i4').data)
    return digest.hexdigest()


def all_labels(source: Source, limit: int | None = None) -> np.ndarray:
  """int32 [n] of the first `limit` examples, read in pieces, since sources read images along with labels."""
  n = len(source) if limit is None else min(limit, len(source))
  parts = [source.take(slice(i, min(i + _CHUNK, n)))['label'] for i in range(0, n, _CHUNK)]
  return np.concatenate(parts) if parts else np.empty(0, np.int32)


def few(source: Source, seed: int, labels_per_class: int | None = None, labelled_copies: int = 1) -> Source:
  """The source with few labels.

  Args:
    source: the training split.
    seed: which images keep their label follows from it and the labels; fewer labels are a part of more.
    labels_per_class: labels that are kept of every class that occurs; all others become -1. None: all are kept.
    labelled_copies: how often every labelled image occurs: once in its place, and then again behind all others.

  Returns:
    `source` itself where neither option asks for anything; else a source whose first len(source) images are those of
    `source`, in its order.

  Raises:
    UserError: a bad value, no labels, or a class with fewer images than labels are asked for.
  """
  check(labels_per_class, labelled_copies)
  if labels_per_class is None and labelled_copies == 1:
    return source
  labels = all_labels(source)
  key = 'labels_per_class' if labels_per_class is not None else 'labelled_copies'
  if not (labels >= 0).any():
    raise UserError(f'config.data.{key} needs labels, and {source.name} has none; leave it out')
  kept = np.flatnonzero(labels >= 0)
  if labels_per_class is not None:
    order = splits.permutation(len(labels), int(seed) & (2**64 - 1), zlib.crc32(b'labels'))  # other than a training epoch's
    kept = []
    for label in np.unique(labels[labels >= 0]):
      members = order[labels[order] == label]
      if len(members) < labels_per_class:
        raise UserError(
          f'config.data.labels_per_class is {labels_per_class}, and class {label} of {source.name} has only'
          f' {len(members)} labelled images'
        )
      kept.append(members[:labels_per_class])
    kept = np.sort(np.concatenate(kept))
  mine = np.full(len(labels), -1, np.int32)
  mine[kept] = labels[kept]
  size = 24 * (len(labels) + len(kept) * (labelled_copies - 1))  # bytes of indices and labels
  memory.check(size, f'config.data.labelled_copies = {labelled_copies}', 'make it smaller')
  rows = np.concatenate([np.arange(len(labels)), np.tile(kept, labelled_copies - 1)])
  return Relabelled(source, rows, mine[rows], len(labels))


def check(labels_per_class: Any = None, labelled_copies: Any = 1) -> None:
  """Refuses what are no counts.

  Raises:
    UserError: naming the config key.
  """
  for key, value in (('labels_per_class', labels_per_class), ('labelled_copies', labelled_copies)):
    optional = key == 'labels_per_class' and value is None
    if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
      raise UserError(f'config.data.{key} is {value!r}, need a whole number of at least 1')
