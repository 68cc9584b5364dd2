"""The training stream is shuffled, sharded and resumable; evaluation sees every example once."""

import itertools
import json
import threading

import numpy as np
import pytest

from latentgen.data import ArraySource, pipeline
from latentgen.errors import UserError

N = 53


def numbered(n=N) -> ArraySource:
  """Images that carry their index."""
  index = np.arange(n)
  return ArraySource(
    np.stack([index // 256, index % 256], 1).astype(np.uint8)[:, None, :, None], index % 10, 'numbered'
  )


def ids(batch) -> list[int]:
  return (batch['image'][:, 0, 0, 0].astype(int) * 256 + batch['image'][:, 0, 1, 0]).tolist()


def draw(iterator, steps) -> list[list[int]]:
  return [ids(next(iterator)) for _ in range(steps)]


def test_epochs_are_different_permutations_without_remainder():
  it = pipeline.train_iterator(numbered(), 10, seed=1)
  epochs = [sum(draw(it, 5), []) for _ in range(3)]
  for epoch in epochs:
    assert len(set(epoch)) == 50 and set(epoch) <= set(range(N))
  assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
  assert set().union(*epochs) == set(range(N))  # what an epoch drops is not always the same
  batch = next(it)
  assert set(batch) == {'image', 'label'} and batch['image'].shape == (10, 1, 2, 1) and batch['image'].dtype == np.uint8
  np.testing.assert_array_equal(batch['label'], np.array(ids(batch)) % 10)


def test_order_depends_on_the_seed_alone():
  streams = [draw(pipeline.train_iterator(numbered(), 10, seed), 12) for seed in (1, 1, 2, -1)]
  assert streams[0] == streams[1] and streams[0] != streams[2] != streams[3]


def test_reading_ahead_changes_nothing():
  expected = draw(pipeline.train_iterator(numbered(), 10, 1), 23)
  threads, stored = set(), numbered()
  take, stored.stored = stored.take, True
  stored.take = lambda indices: (threads.add(threading.get_ident()), take(indices))[1]
  it = pipeline.train_iterator(stored, 10, 1)
  assert draw(it, 9) == expected[:9]
  assert threads and threading.get_ident() not in threads
  state = it.get_state()
  it.close()
  again = pipeline.train_iterator(stored, 10, 1)
  again.set_state(state)
  assert draw(again, 14) == expected[9:]
  again.close()


@pytest.mark.parametrize('before', [0, 3, 5, 8])
def test_resume_goes_on_with_the_next_batch(before):
  expected = draw(pipeline.train_iterator(numbered(), 10, 1), 20)  # an epoch is 5 steps
  it = pipeline.train_iterator(numbered(), 10, 1)
  draw(it, before)
  state = json.loads(json.dumps(it.get_state()))
  draw(it, 2)
  fresh = pipeline.train_iterator(numbered(), 10, 1)
  fresh.set_state(state)
  assert draw(fresh, 12) == expected[before : before + 12]


def test_resume_through_a_checkpoint(tmp_path):
  import grain
  import orbax.checkpoint as ocp

  it = pipeline.train_iterator(numbered(), 10, 1)
  draw(it, 7)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(it)))
    manager.wait_until_finished()
    fresh = pipeline.train_iterator(numbered(), 10, 1)
    manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
  assert draw(fresh, 6) == draw(it, 6)


@pytest.mark.parametrize('count', [2, 5])
def test_processes_share_the_same_global_batches(count):
  whole = draw(pipeline.train_iterator(numbered(), 10, 1), 12)
  parts = [draw(pipeline.train_iterator(numbered(), 10, 1, i, count), 12) for i in range(count)]
  for step in range(12):
    assert [len(p[step]) for p in parts] == [10 // count] * count
    assert sum((p[step] for p in parts), []) == whole[step]


@pytest.mark.parametrize('batch_size', [0, -1, 2.5, True, '8', None, N + 1])
def test_wrong_batch_size(batch_size):
  with pytest.raises(UserError, match='config.data.batch_size'):
    pipeline.train_iterator(numbered(), batch_size, 0)


def test_batch_size_must_split_over_processes():
  for call in (
    lambda: pipeline.train_iterator(numbered(), 10, 0, 0, 3),
    lambda: pipeline.evaluation_batches(numbered(), 10, None, 0, 3),
  ):
    with pytest.raises(UserError, match='config.data.batch_size = 10 .* 3 processes'):
      call()
  with pytest.raises(UserError, match='config.data.batch_size'):
    pipeline.epoch(numbered(), 0)


@pytest.mark.parametrize('batch_size, limit', list(itertools.product([1, 8, 53, 60], [None, 1, 16, 53, 1000])))
def test_evaluation_counts_each_example_once(batch_size, limit):
  n = min(limit or N, N)
  seen = []
  for batch, mask in pipeline.evaluation_batches(numbered(), batch_size, limit):
    assert batch['image'].shape[0] == batch['label'].shape[0] == mask.shape[0] == batch_size and mask.dtype == bool
    assert max(ids(batch)) < n  # the filling is data as well
    seen += np.array(ids(batch))[mask].tolist()
  assert seen == list(range(n))


@pytest.mark.parametrize('count', [2, 4])
def test_evaluation_over_processes(count):
  parts = [list(pipeline.evaluation_batches(numbered(), 8, None, i, count)) for i in range(count)]
  assert {len(p) for p in parts} == {7}
  seen = [i for step in zip(*parts, strict=True) for batch, mask in step for i in np.array(ids(batch))[mask].tolist()]
  assert seen == list(range(N))


def test_epoch_is_all_examples_in_order():
  batches = list(pipeline.epoch(numbered(), 10))
  assert [len(ids(b)) for b in batches] == [10] * 5 + [3] and sum(map(ids, batches), []) == list(range(N))
