"""Prepared data sets are found at once and read without TensorFlow; what is missing is said with the remedy."""

import sys
import time

import numpy as np
from PIL import Image
import pytest

from latentgen.data import load
from latentgen.errors import UserError

tfds = pytest.importorskip('tensorflow_datasets')

RNG = np.random.default_rng(0)
X, Y = RNG.integers(0, 256, (50, 8, 6, 3), np.uint8), np.arange(50) % 4


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """50 small images, 40 to train on."""

  VERSION = tfds.core.Version('1.2.0')
  extra_splits = {}

  def _info(self):
    features = {
      'image': tfds.features.Tensor(shape=(8, 6, 3), dtype=np.uint8),
      'label': tfds.features.ClassLabel(num_classes=4),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    del dl_manager
    parts = {'train': (0, 40), 'test': (40, 50)} | self.extra_splits
    return {name: self._generate_examples(*part) for name, part in parts.items()}

  def _generate_examples(self, start, stop):
    for i in range(start, stop):
      yield i, {'image': X[i], 'label': int(Y[i])}


class TinyValid(Tiny, skip_registration=True):
  """The same with a validation split."""

  extra_splits = {'validation': (30, 40)}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  for builder in (Tiny, TinyValid):
    builder(data_dir=folder).download_and_prepare(file_format='array_record')
  return folder


def content(source) -> dict[bytes, int]:
  batch = source.take(slice(None))
  return {i.tobytes(): int(label) for i, label in zip(batch['image'], batch['label'], strict=True)}


def expected(start, stop) -> dict[bytes, int]:
  return {X[i].tobytes(): int(Y[i]) for i in range(start, stop)}


@pytest.mark.parametrize('in_memory', [True, False])
def test_reads_what_was_prepared(root, in_memory):
  found = load('tfds', dataset='tiny', data_dir=str(root), valid=8, in_memory=in_memory)
  assert [len(found[s]) for s in ('train', 'valid', 'test')] == [32, 8, 10]
  assert content(found['train']) | content(found['valid']) == expected(0, 40)
  assert content(found['test']) == expected(40, 50)
  assert found['train'].shape == (8, 6, 3) and found['train'].num_classes == 4
  again = load('tfds', dataset='tiny:1.2.0', data_dir=str(root), valid=8, in_memory=in_memory)
  assert again['valid'].checksum() == found['valid'].checksum() != found['train'].checksum()
  assert 'tensorflow' not in sys.modules


def test_validation_split(root):
  found = load('tfds', dataset='tiny_valid', data_dir=str(root))
  assert content(found['valid']) == expected(30, 40) and len(found['train']) == 40
  assert len(load('tfds', dataset='tiny', data_dir=str(root))['valid']) == 4  # a tenth
  parts = load('tfds', dataset='tiny', data_dir=str(root), train='train[:-5]', valid='train[-5:]', test='test[:3]')
  assert [len(parts[s]) for s in ('train', 'valid', 'test')] == [35, 5, 3]
  assert content(parts['train']) | content(parts['valid']) == expected(0, 40)


def test_crop_and_size(root):
  plain = load('tfds', dataset='tiny', data_dir=str(root))['test'].take(slice(None))['image']
  crop = load('tfds', dataset='tiny', data_dir=str(root), crop=[1, 2, 4, 3])['test'].take(slice(None))['image']
  np.testing.assert_array_equal(crop, plain[:, 1:5, 2:5])
  square = load('tfds', dataset='tiny', data_dir=str(root), size=6)['test'].take(slice(None))['image']
  np.testing.assert_array_equal(square, plain[:, 1:7])
  small = load('tfds', dataset='tiny', data_dir=str(root), crop=(0, 0, 6, 6), size=3)['test']
  image = np.asarray(Image.fromarray(plain[0, :6]).resize((3, 3), Image.Resampling.BILINEAR))
  assert small.shape == (3, 3, 3)
  np.testing.assert_array_equal(small.take([0])['image'][0], image)


def message(**options) -> str:
  with pytest.raises(UserError) as caught:
    load('tfds', **options)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_not_prepared_is_said_at_once(root, monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  start = time.monotonic()
  text = message(dataset='mnist')
  assert time.monotonic() - start < 1
  for part in ("'mnist'", str(tmp_path), 'array_record', 'tensorflow-cpu', 'config.data.data_dir', "'idx'"):
    assert part in text
  assert "did you mean 'tiny'" in message(dataset='tinny', data_dir=str(root))
  assert 'is not prepared' in message(dataset='tiny:9.9.9', data_dir=str(root))
  assert 'config.data.dataset' in message(dataset='', data_dir=str(root))


@pytest.mark.parametrize(
  'options, word',
  [
    ({'test': 'tst'}, "did you mean 'test'"),
    ({'train': 'train[:-5'}, 'config.data.train'),
    ({'train': 'train[:0]'}, 'config.data.train'),
    ({'valid': 40}, 'config.data.valid'),
    ({'valid': 'none'}, 'config.data.valid'),
    ({'image': 'imge'}, "did you mean 'image'"),
    ({'image': 'label'}, 'config.data.image'),
    ({'crop': (0, 0, 9, 9)}, 'config.data.crop'),
    ({'crop': (0, 0, 9)}, 'config.data.crop'),
    ({'crop': (0, 0, 0, 2)}, 'config.data.crop'),
    ({'size': 0}, 'config.data.size'),
  ],
)
def test_wrong_options(root, options, word):
  assert word in message(dataset='tiny', data_dir=str(root), **options)


@pytest.mark.parametrize('damage', ['cut', 'unlink', 'info', 'format'])
def test_damaged_files(tmp_path, damage):
  Tiny(data_dir=tmp_path).download_and_prepare(file_format='array_record')
  folder = tmp_path / 'tiny' / '1.2.0'
  shard, info = next(folder.glob('*train*array_record*')), folder / 'dataset_info.json'
  if damage == 'cut':
    shard.write_bytes(shard.read_bytes()[:500])
  elif damage == 'unlink':
    shard.unlink()
  elif damage == 'info':
    info.write_text('{')
  else:
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
  text = message(dataset='tiny', data_dir=str(tmp_path))
  assert str(folder) in text and 'prepare it' in text


def test_versions_and_configurations(root, tmp_path):
  import shutil

  shutil.copytree(root / 'tiny', tmp_path / 'tiny')
  shutil.copytree(tmp_path / 'tiny' / '1.2.0', tmp_path / 'tiny' / '1.10.0')
  from latentgen.data.tfds import find

  assert find('tiny', str(tmp_path)).name == '1.10.0' and find('tiny:1.2.0', str(tmp_path)).name == '1.2.0'
  for config in ('a', 'b'):
    shutil.copytree(root / 'tiny' / '1.2.0', tmp_path / 'many' / config / '1.2.0')
  assert "'many/a', 'many/b'" in message(dataset='many', data_dir=str(tmp_path))
  assert find('many/b', str(tmp_path)).parent.name == 'b'


def test_catalogue_sets_have_the_features_that_are_read():
  from latentgen.data.tfds import _decoder

  with tfds.testing.mock_data(num_examples=3):
    records = tfds.data_source('mnist', split='train')
    features = tfds.builder('mnist').info.features
    decode, classes = _decoder(features, 'mnist', 'image', 'label', None, None)
    image, label = decode(records[0])
  assert classes == 10 and image.shape == (28, 28, 1) and image.dtype == np.uint8 and 0 <= label < 10
