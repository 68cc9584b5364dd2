"""Few labels in training: counts, determinism, repeated images, and what tasks and configs see of it."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from latentgen import assembly, config as configs, data
from latentgen.data import ArraySource, RecordSource, labels
from latentgen.errors import UserError
from latentgen.evaluate import Subject, base, features, run_all

COUNTS = (9, 4, 30)  # images of the classes 0, 1 and 3


def source(kind=ArraySource):
  """Images that say their own index, in random order of classes; class 2 does not occur."""
  target = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], COUNTS))
  image = np.arange(len(target), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
  if kind is ArraySource:
    return ArraySource(image, target, 'set/train', 4)
  return RecordSource(list(zip(image, target, strict=True)), lambda record: record, 'set/train', 4)


def everything(found):
  batch = found.take(slice(None))
  return batch['image'][:, 0, 0, 0].astype(int), batch['label']


@pytest.mark.parametrize('kind', [ArraySource, RecordSource])
@pytest.mark.parametrize('count', [1, 3, 4])
def test_every_class_keeps_so_many_true_labels(kind, count):
  true = source().take(slice(None))['label']
  found = labels.few(source(kind), 5, labels_per_class=count)
  index, label = everything(found)
  np.testing.assert_array_equal(index, np.arange(sum(COUNTS)))  # all images stay, in their order
  kept = np.flatnonzero(label >= 0)
  np.testing.assert_array_equal(label[kept], true[kept])
  np.testing.assert_array_equal(np.bincount(label[kept], minlength=4), [count, count, 0, count])
  assert (label[np.setdiff1d(index, kept)] == -1).all()
  assert (found.num_classes, found.shape, found.name, len(found)) == (4, (2, 2, 1), 'set/train', sum(COUNTS))


def test_subset_is_fixed_by_the_seed_and_nested():
  found = {(seed, n): everything(labels.few(source(), seed, n))[1] >= 0 for seed in range(4) for n in (1, 2, 4)}
  for (seed, n), kept in found.items():
    np.testing.assert_array_equal(kept, everything(labels.few(source(), seed, n))[1] >= 0)
    assert (found[seed, 4] | ~kept).all()  # fewer labels are a part of more
  assert len({kept.tobytes() for (_, n), kept in found.items() if n == 4}) == 4
  sums = {labels.few(source(), seed, n).checksum() for seed, n in found}
  assert len(sums) == len(found) and labels.few(source(), 0, 2).checksum() in sums


def test_labelled_images_are_repeated_behind_all_others():
  n = sum(COUNTS)
  once, label = everything(labels.few(source(), 0, 2))
  found = labels.few(source(), 0, 2, labelled_copies=3)
  index, again = everything(found)
  assert len(found) == n + 2 * 6 and found.distinct == n
  np.testing.assert_array_equal(index[:n], once)
  np.testing.assert_array_equal(again[:n], label)
  np.testing.assert_array_equal(np.bincount(index[n:], minlength=n), 2 * (label >= 0))
  np.testing.assert_array_equal(again[n:], label[index[n:]])
  part = found.subset(np.array([n, 0, n + 1]), 'part')
  np.testing.assert_array_equal(everything(part)[0], index[[n, 0, n + 1]])
  assert part.name == 'part' and len(part) == 3
  everyone = labels.few(source(), 0, labelled_copies=2)
  np.testing.assert_array_equal(everything(everyone)[0], np.tile(np.arange(n), 2))


def test_without_options_it_is_the_source_itself():
  original = source()
  assert labels.few(original, 0) is original


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'labels_per_class': 5}, 'config.data.labels_per_class is 5, and class 1 of set/train has only 4 labelled images'),
    ({'labels_per_class': 0}, 'config.data.labels_per_class is 0'),
    ({'labels_per_class': True}, 'config.data.labels_per_class is True'),
    ({'labels_per_class': 2.0}, 'config.data.labels_per_class is 2.0'),
    ({'labelled_copies': 0}, 'config.data.labelled_copies is 0'),
    ({'labelled_copies': None}, 'config.data.labelled_copies is None'),
  ],
)
def test_bad_values_name_the_key(options, text):
  with pytest.raises(UserError) as caught:
    labels.few(source(), 0, **options)
  assert text in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('options', [{'labels_per_class': 1}, {'labelled_copies': 2}])
def test_no_labels_at_all(options):
  bare = ArraySource(np.zeros((5, 2, 2, 1), np.uint8), None, 'bare')
  with pytest.raises(UserError, match=f'config.data.{next(iter(options))} needs labels, and bare has none'):
    labels.few(bare, 0, **options)


# ---------------------------------------------------------------------------------------- in configs and tasks


def test_config_takes_labels_from_the_training_split_alone():
  options = dict(name='digits', batch_size=50, binarize='fixed', held_out_classes=(9,))
  plain = assembly.build_data(options, 3)[0]
  found = assembly.build_data(dict(options, labels_per_class=10, labelled_copies=20), 3)[0]
  n = len(plain['train'])
  assert len(found['train']) == n + 19 * 90
  for split in data.SPLITS:  # the images, binarised once, are those of the run without these options
    np.testing.assert_array_equal(found[split].take(slice(n))['image'], plain[split].take(slice(n))['image'])
  assert (found['valid'].take(slice(None))['label'] >= 0).all() and (found['test'].take(slice(None))['label'] >= 0).all()
  with pytest.raises(UserError, match='config.data.labels_per_class is 500, and class'):
    assembly.build_data(dict(options, labels_per_class=500), 3)
  with pytest.raises(UserError, match='config.data.labelled_copies is 0'):
    assembly.build_data(dict(options, labelled_copies=0), 3, (8, 8, 1))


def test_another_data_set_keeps_the_label_options():
  config = ConfigDict(dict(data=dict(
    name='digits', batch_size=4, held_out_classes=(9,), labels_per_class=2, labelled_copies=3, bits=4,
  )))  # fmt: skip
  configs.override(config, {'data.name': 'idx'})
  assert config.data.to_dict() == dict(name='idx', batch_size=4, labels_per_class=2, labelled_copies=3, bits=4)


@dataclasses.dataclass(frozen=True)
class Nothing:
  """A method that no task asks anything here."""

  samplers = ('base',)


def subject(**options):
  splits = {'train': labels.few(source(), 0, **options), 'test': source()}
  preprocess = lambda key, batch, train: {'image': jnp.float32(batch['image']) / 255}
  return Subject(Nothing(), {}, splits, preprocess, jax.random.key(0))


def test_tasks_get_true_labels_or_a_message():
  s = subject(labels_per_class=2, labelled_copies=4)
  with pytest.raises(UserError, match="'probe' needs the labels of split 'train', and 37 of its 61 images have none"):
    base.labels(s, 'probe', 'train')
  np.testing.assert_array_equal(base.labels(s, 'probe', 'test', 7), source().take(slice(7))['label'])
  rows, known = base.labelled(s, 'probe', 'train')
  assert len(rows) == len(set(rows)) == 6  # each image once, copies left out
  np.testing.assert_array_equal(known, source().take(rows)['label'])
  assert len(base.labelled(s, 'probe', 'test')[0]) == sum(COUNTS)
  bare = dataclasses.replace(s, data={'test': ArraySource(np.zeros((5, 2, 2, 1), np.uint8))})
  for function in (base.labels, base.labelled):
    with pytest.raises(UserError, match="'probe' needs labels, and split 'test' has none"):
      function(bare, 'probe', 'test')


def test_features_are_trained_on_labelled_images_alone(monkeypatch):
  """The classifier behind the distances sees as many images as have labels; a label of -1 would be a class of its own."""
  seen, original = [], features.classifier

  def spy(images, target, *args, **options):
    seen.append(target)
    return original(images, target, *args, **options)

  monkeypatch.setattr(features, 'classifier', spy)
  s = dataclasses.replace(subject(labels_per_class=4), method=Noise())
  run_all(s, {'frechet': {'steps': 2, 'repeats': 2, 'blocks': 2}})
  np.testing.assert_array_equal(np.bincount(seen[0], minlength=4), [4, 4, 0, 4])


class Noise(Nothing):
  """Generates uniform noise."""

  def simulate(self, variables, key, n, sampler=None, temperature=1.0, choose=None):
    image = jax.random.uniform(key, (1, n, 2, 2, 1))
    return Given(Mean(image))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
  mean: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
  px: Mean
