"""IDX files: what is written comes back, and whatever is wrong with them is one line that names the file."""

import gzip
import hashlib
import math
import os
import pathlib
import struct
import tempfile

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from latentgen.data import idx, load
from latentgen.errors import UserError

RNG = np.random.default_rng(0)
NAMES = {
  ('train', 'images'): 'train-images-idx3-ubyte',
  ('train', 'labels'): 'train-labels-idx1-ubyte',
  ('test', 'images'): 't10k-images-idx3-ubyte',
  ('test', 'labels'): 't10k-labels-idx1-ubyte',
}


def encode(array: np.ndarray) -> bytes:
  return bytes((0, 0, 8, array.ndim)) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()


def write(folder: pathlib.Path, zipped=False, rename=lambda name: name, n=40, m=10, side=5):
  arrays = {
    ('train', 'images'): RNG.integers(0, 256, (n, side, side + 1), np.uint8),
    ('train', 'labels'): np.arange(n, dtype=np.uint8) % 7,
    ('test', 'images'): RNG.integers(0, 256, (m, side, side + 1), np.uint8),
    ('test', 'labels'): np.arange(m, dtype=np.uint8) % 7,
  }
  folder.mkdir(exist_ok=True)
  for key, array in arrays.items():
    data = encode(array)
    (folder / (rename(NAMES[key]) + '.gz' * zipped)).write_bytes(gzip.compress(data) if zipped else data)
  return arrays


def message(call, *args, **options) -> str:
  with pytest.raises(UserError) as caught:
    call(*args, **options)
  assert '\n' not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize('zipped', [False, True])
@pytest.mark.parametrize(
  'rename',
  [
    lambda name: name,
    lambda name: name.replace('-idx', '.idx'),
    lambda name: 'emnist-letters-' + name.replace('t10k', 'test'),
  ],
)
def test_round_trip(tmp_path, zipped, rename):
  arrays = write(tmp_path, zipped, rename)
  splits = load('idx', path=str(tmp_path), valid=8)
  assert {s: len(splits[s]) for s in splits} == {'train': 32, 'valid': 8, 'test': 10}
  expected = {'train': ('train', slice(0, 32)), 'valid': ('train', slice(32, 40)), 'test': ('test', slice(0, 10))}
  for name, (split, rows) in expected.items():
    batch = splits[name].take(slice(None))
    np.testing.assert_array_equal(batch['image'][..., 0], arrays[split, 'images'][rows])
    np.testing.assert_array_equal(batch['label'], arrays[split, 'labels'][rows])
    assert splits[name].shape == (5, 6, 1) and splits[name].num_classes == 7


def test_plain_copy_wins_and_hidden_files_are_skipped(tmp_path):
  write(tmp_path, zipped=True)
  arrays = write(tmp_path, zipped=False)
  (tmp_path / '._train-images-idx3-ubyte').write_bytes(b'x')
  np.testing.assert_array_equal(
    load('idx', path=tmp_path, valid=8)['test'].take([3])['image'][0, ..., 0], arrays['test', 'images'][3]
  )


def test_transpose_prefix_and_labels(tmp_path):
  arrays = write(tmp_path, rename=lambda name: 'a-' + name)
  write(tmp_path, rename=lambda name: 'b-' + name)
  assert 'config.data.prefix' in message(load, 'idx', path=tmp_path, valid=8)
  (tmp_path / 'a-train-labels-idx1-ubyte').unlink()
  assert 'config.data.labels' in message(load, 'idx', path=tmp_path, valid=8, prefix='a-')
  test = load('idx', path=tmp_path, valid=0.2, prefix='a-', labels=False, transpose=True)['test'].take([0, 1])
  np.testing.assert_array_equal(test['image'][..., 0], arrays['test', 'images'][:2].transpose(0, 2, 1))
  np.testing.assert_array_equal(test['label'], [-1, -1])


@pytest.mark.parametrize('zipped', [False, True])
@pytest.mark.parametrize(
  'damage, word',
  [
    (lambda b: b'', 'starts with nothing'),
    (lambda b: b'\0\0\x0d\x03' + b[4:], 'starts with 00000d03'),
    (lambda b: encode(np.zeros((40, 30), np.uint8)), 'starts with 00000802'),
    (lambda b: b[:9], 'truncated in its header'),
    (lambda b: b[:-1], 'truncated'),
    (lambda b: b + b'\0', 'bytes follow'),
    (lambda b: b[:4] + struct.pack('>3I', 0, 5, 6), 'cannot be'),
    (lambda b: b[:4] + struct.pack('>3I', 40, 0, 6) + b[16:], 'cannot be'),
    (lambda b: b[:4] + struct.pack('>3I', 2, 2**31, 2**31) + b[16:], 'cannot be'),
    (lambda b: b[:4] + struct.pack('>3I', 2**32 - 1, 4096, 4096) + b[16:], 'truncated'),
  ],
)
def test_damage_is_named(tmp_path, zipped, damage, word):
  write(tmp_path, zipped)
  file = tmp_path / (NAMES['train', 'images'] + '.gz' * zipped)
  data = file.read_bytes()
  file.write_bytes(gzip.compress(damage(gzip.decompress(data))) if zipped else damage(data))
  text = message(load, 'idx', path=tmp_path, valid=8)
  assert word in text and str(file) in text


@pytest.mark.parametrize(
  'damage', [lambda b: b[:-9], lambda b: b[:30], lambda b: b + b'junk', lambda b: b[:20] + b'\xff' * 9 + b[29:]]
)
def test_damaged_gzip_is_named(tmp_path, damage):
  write(tmp_path, zipped=True)
  file = tmp_path / (NAMES['test', 'images'] + '.gz')
  file.write_bytes(damage(file.read_bytes()))
  text = message(load, 'idx', path=tmp_path, valid=8)
  assert 'gzip' in text and str(file) in text


def test_a_lying_header_allocates_nothing(tmp_path):
  import tracemalloc

  body = bytes((0, 0, 8, 3)) + struct.pack('>3I', 1000, 1000, 1000) + bytes(1 << 21)  # gzips to 2 kB, claims 1 GB
  for data in (body, gzip.compress(body)):
    (tmp_path / 'x').write_bytes(data)
    tracemalloc.start()
    assert 'truncated' in message(idx.read, tmp_path / 'x', 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_files_must_belong_together(tmp_path):
  write(tmp_path)
  (tmp_path / NAMES['test', 'labels']).write_bytes(encode(np.zeros(9, np.uint8)))
  text = message(load, 'idx', path=tmp_path, valid=8)
  assert '9 labels' in text and '10 images' in text
  write(tmp_path)
  (tmp_path / NAMES['test', 'images']).write_bytes(encode(np.zeros((10, 5, 5), np.uint8)))
  assert 'do not belong together' in message(load, 'idx', path=tmp_path, valid=8)


def test_missing(tmp_path):
  assert 'not a directory' in message(load, 'idx', path=tmp_path / 'no')
  assert 'train-images-idx3-ubyte' in message(load, 'idx', path=tmp_path)
  write(tmp_path)
  (tmp_path / NAMES['test', 'images']).unlink()
  assert 't10k-images-idx3-ubyte' in message(load, 'idx', path=tmp_path)
  assert 'config.data.path is missing' in message(load, 'idx')


@pytest.mark.parametrize('valid', [0, -1, 40, 5000, 1.0, 0.0, 'x', None, True, float('nan')])
def test_validation_split_must_fit(tmp_path, valid):
  write(tmp_path)
  assert 'config.data.valid' in message(load, 'idx', path=tmp_path, valid=valid)


@settings(max_examples=200, deadline=None, database=None)
@given(data=st.data(), zipped=st.booleans())
def test_any_mutation_reads_or_is_a_user_error(data, zipped):
  good = encode(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
  raw = bytearray(gzip.compress(good, mtime=0) if zipped else good)
  for _ in range(data.draw(st.integers(1, 4))):
    place = data.draw(st.integers(0, max(len(raw) - 1, 0)))
    what = data.draw(st.sampled_from(('set', 'cut', 'insert')))
    if what == 'set' and raw:
      raw[place] = data.draw(st.integers(0, 255))
    elif what == 'cut':
      del raw[place : place + data.draw(st.integers(1, 8))]
    else:
      raw[place:place] = data.draw(st.binary(min_size=1, max_size=8))
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / 'file'
    file.write_bytes(raw)
    try:
      array = idx.read(file, 3)
    except UserError as error:
      assert str(file) in str(error)
    else:
      assert array.dtype == np.uint8 and array.ndim == 3 and 0 < math.prod(array.shape) <= 1032 * len(raw)


def _real(name: str) -> pathlib.Path:
  beside = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'
  folder = pathlib.Path(os.environ.get('LATENTGEN_TEST_DATA') or beside) / name
  if not folder.is_dir():
    pytest.skip('no image data here; set LATENTGEN_TEST_DATA to a directory with mnist/ and fashion_mnist/')
  return folder


@pytest.mark.parametrize(
  'name, digest',
  [
    ('mnist', 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db'),
    ('fashion_mnist', 'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888'),
  ],
)
def test_the_published_files(name, digest):
  splits = load('idx', path=_real(name))
  assert {s: len(splits[s]) for s in splits} == {'train': 55000, 'valid': 5000, 'test': 10000}
  assert splits['train'].shape == (28, 28, 1) and splits['train'].num_classes == 10
  sha = hashlib.sha256(bytes((0, 0, 8, 3)) + struct.pack('>3I', 60000, 28, 28))  # of the whole unpacked training file
  for split in ('train', 'valid'):
    sha.update(splits[split].take(slice(None))['image'].tobytes())
  assert sha.hexdigest() == digest
  assert np.bincount(splits['test'].take(slice(None))['label']).min() > 800
