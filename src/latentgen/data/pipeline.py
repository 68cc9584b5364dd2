"""From sources to batches: a shuffled, sharded, resumable stream to train on, and exact passes to evaluate on."""

from collections.abc import Iterator
import sys
import threading

import numpy as np

from latentgen.data import splits
from latentgen.data.source import Source
from latentgen.errors import UserError

Batches = dict[str, np.ndarray]

AHEAD = 4  # batches that threads read in advance from sources in storage


class Steps:
  """Element t is what this process sees of global step t's batch; grain reads it like any other data source.

  Every epoch is a new permutation of the source, from (seed, epoch), cut into global batches; the remainder is dropped.
  A process takes its rows of the global batch, so the batch of a step does not depend on the number of processes.
  """

  def __init__(self, source: Source, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1):
    rows = _local(batch_size, process_index, process_count)
    if batch_size > len(source):
      raise UserError(
        f'config.data.batch_size = {batch_size} is more than the {len(source)} images of {source.name}; make it smaller'
      )
    self._source, self._batch_size, self._seed, self._rows = source, batch_size, int(seed) & (2**64 - 1), rows
    self.steps_per_epoch = len(source) // batch_size
    self._lock, self._cache = threading.Lock(), (-1, np.empty(0, np.int64))

  def __len__(self) -> int:
    return sys.maxsize // 2  # endless, for all purposes

  def __getitem__(self, step: int) -> Batches:
    epoch, place = divmod(int(step), self.steps_per_epoch)
    return self._source.take(self._order(epoch)[place * self._batch_size :][: self._batch_size][self._rows])

  def _order(self, epoch: int) -> np.ndarray:
    with self._lock:  # prefetching threads share the permutation
      if self._cache[0] != epoch:
        self._cache = epoch, splits.permutation(len(self._source), self._seed, epoch)
      return self._cache[1]

  def __repr__(self) -> str:
    return f'Steps({self._source.name}, batch_size={self._batch_size}, seed={self._seed})'


def train_iterator(
  source: Source, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
):
  """Endless shuffled batches.

  Args:
    source: the training split.
    batch_size: of all processes together.
    seed: of the order.
    process_index: this process, `jax.process_index()`.
    process_count: number of processes; divides batch_size.

  Returns:
    grain.DatasetIterator over {'image': uint8 [b, h, w, c], 'label': int32 [b]}, b = batch_size / process_count. Its
    `get_state()` is small; `set_state` or `grain.checkpoint` go on with the very next batch. `close()` ends the threads that read
    in advance where the source is in storage.

  Raises:
    UserError: batch_size is no positive multiple of process_count, or larger than the split.
  """
  import grain

  steps = Steps(source, batch_size, seed, process_index, process_count)
  ahead = AHEAD if source.stored else 0
  options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
  return iter(grain.MapDataset.source(steps).to_iter_dataset(options))


def evaluation_batches(
  source: Source, batch_size: int, limit: int | None = None, process_index: int = 0, process_count: int = 1
) -> Iterator[tuple[Batches, np.ndarray]]:
  """The source in order, in batches of one size, each example counted once.

  Args:
    source: any split.
    batch_size: of all processes together; may be larger than the source.
    limit: only the first `limit` examples; None for all.
    process_index: this process.
    process_count: number of processes; all get the same number of batches.

  Yields:
    Batch with b = batch_size / process_count rows, and mask, bool [b]: False on rows that only fill up the last batch
    (they repeat its examples, so that no statistic over the batch sees anything but data).

  Raises:
    UserError: batch_size is no positive multiple of process_count.
  """
  rows = _local(batch_size, process_index, process_count)
  return _evaluation_batches(source, batch_size, len(source) if limit is None else min(limit, len(source)), rows)


def _evaluation_batches(source: Source, batch_size: int, n: int, rows: slice) -> Iterator[tuple[Batches, np.ndarray]]:
  for start in range(0, n, batch_size):
    count = min(batch_size, n - start)
    fill = np.arange(batch_size)
    yield source.take(start + fill[rows] % count), (fill < count)[rows]


def epoch(source: Source, batch_size: int) -> Iterator[Batches]:
  """The source in order, every example once; the last batch is smaller where batch_size does not divide the source."""
  _local(batch_size, 0, 1)
  return (source.take(slice(start, start + batch_size)) for start in range(0, len(source), batch_size))


def _local(batch_size: int, process_index: int, process_count: int) -> slice:
  """Rows of the global batch that belong to this process."""
  if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
    raise UserError(f'config.data.batch_size = {batch_size!r} must be a positive integer')
  if batch_size % process_count:
    raise UserError(f'config.data.batch_size = {batch_size} must be a multiple of the {process_count} processes')
  local = batch_size // process_count
  return slice(process_index * local, (process_index + 1) * local)
