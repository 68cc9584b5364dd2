"""Sources, the data sets that need no download, and the messages for wrong names, options and files."""

import importlib.util
import sys

import numpy as np
from PIL import Image
import pytest

from latentgen import data
from latentgen.data import ArraySource, RecordSource, load, splits
from latentgen.errors import UserError, did_you_mean

RNG = np.random.default_rng(0)


def images(n, *shape):
  return RNG.integers(0, 256, (n, *shape), np.uint8)


def rows(source) -> list[bytes]:
  return [image.tobytes() for image in source.take(slice(None))['image']]


def message(call, *args, **options) -> str:
  with pytest.raises(UserError) as caught:
    call(*args, **options)
  assert '\n' not in str(caught.value)
  return str(caught.value)


# ---------------------------------------------------------------------------------------------- digits


def test_digits_are_scikit_learns():
  from sklearn.datasets import load_digits

  raw = load_digits()
  found = load('digits')
  assert {s: len(found[s]) for s in found} == {'train': 1297, 'valid': 250, 'test': 250}
  batches = [found[s].take(slice(None)) for s in data.SPLITS]
  ours = np.concatenate([b['image'] for b in batches])[..., 0]
  labels = np.concatenate([b['label'] for b in batches])
  # back to the 17 levels; the same images with the same labels, each once: the splits are disjoint
  levels = np.round(ours / 255 * 16).astype(int).reshape(-1, 64)
  pairs = sorted(map(tuple, np.c_[levels, labels]))
  assert pairs == sorted(map(tuple, np.c_[raw.data.astype(int), raw.target]))
  np.testing.assert_array_equal(np.round(levels * 255 / 16).reshape(-1, 8, 8), ours)
  assert len(np.unique(ours)) == 17


def test_digits_split_is_stratified_and_fixed():
  found = load('digits')
  for split, n in (('valid', 250), ('test', 250)):
    counts = np.bincount(found[split].take(slice(None))['label'], minlength=10)
    assert np.abs(counts - n / 10).max() <= 2, counts
  assert found['train'].checksum() == load('digits')['train'].checksum()
  assert len({found[s].checksum() for s in found}) == 3
  # pinned: a change of the split changes every published number
  assert {s: found[s].checksum()[:16] for s in found} == PINNED


def test_digits_are_the_same_where_their_file_is_not_found(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert {s: source.checksum()[:16] for s, source in load('digits').items()} == PINNED


PINNED = {'train': '9725c64682386e19', 'valid': '880b079a0167fc83', 'test': 'c7d0f16be2f23618'}


def test_digits_held_out_classes():
  found = load('digits', held_out_classes=(3, 7))
  assert not {3, 7} & set(found['train'].take(slice(None))['label'])
  assert {3, 7} <= set(found['test'].take(slice(None))['label'])
  assert found['train'].num_classes == 10
  for bad in ((10,), tuple(range(10)), 'ab', 3, ([1],)):
    assert 'config.data.held_out_classes' in message(load, 'digits', held_out_classes=bad)
  assert 'must be a tuple of some of the digits 0 to 9, as (8,)' in message(load, 'digits', held_out_classes=8)


# ---------------------------------------------------------------------------------------------- sources


def record_source(x, y, **options):
  return RecordSource(list(zip(x, y, strict=True)), lambda r: (r[0], int(r[1])), 'r', num_classes=9, **options)


@pytest.mark.parametrize('make', [lambda x, y: ArraySource(x, y, 'r', 9), record_source])
def test_take_and_subset(make):
  x, y = images(20, 3, 4, 2), np.arange(20) % 9
  source = make(x, y)
  assert len(source) == 20 and source.shape == (3, 4, 2) and source.num_classes == 9
  for indices in ([5, 1, 1], np.array([19, 0]), slice(2, 7), []):
    batch = source.take(indices)
    rows = np.arange(20)[indices] if isinstance(indices, slice) else np.asarray(indices, int)
    np.testing.assert_array_equal(batch['image'], x[rows])
    np.testing.assert_array_equal(batch['label'], y[rows])
    assert batch['image'].dtype == np.uint8 and batch['label'].dtype == np.int32
  part = source.subset([9, 8, 7, 6]).subset(slice(1, 3), 'part')
  np.testing.assert_array_equal(part.take([1, 0])['image'], x[[7, 8]])
  assert part.name == 'part' and len(part) == 2 and part.num_classes == 9
  assert source.checksum() == make(x, y).checksum() != part.checksum()


def test_checksum_sees_every_part():
  x, y = images(6, 2, 2, 1), np.arange(6)
  changed = x.copy()
  changed[5, 1, 1, 0] ^= 1
  sources = [
    ArraySource(x, y),
    ArraySource(changed, y),
    ArraySource(x, y[::-1]),
    ArraySource(x),
    ArraySource(x, y, num_classes=7),
    ArraySource(x.reshape(6, 4, 1, 1), y),
    ArraySource(x[::-1], y),
  ]
  assert len({s.checksum() for s in sources}) == len(sources)


def test_array_source_refuses():
  for bad in (
    lambda: ArraySource(np.zeros((2, 3, 3, 1))),
    lambda: ArraySource(images(2, 3, 3)),
    lambda: ArraySource(images(2, 3, 3, 1), np.zeros(3, int)),
    lambda: ArraySource(images(2, 3, 3, 1), [0, 5], num_classes=5),
  ):
    with pytest.raises(ValueError):
      bad()


def test_records_of_another_size_are_refused():
  source = RecordSource([images(1, 2, 2, 1)[0], images(1, 2, 3, 1)[0]], lambda r: (r, None))
  np.testing.assert_array_equal(source.take([0])['label'], [-1])
  with pytest.raises(ValueError, match='record 1'):
    source.take([0, 1])


def test_permutation_is_a_fixed_permutation():
  order = splits.permutation(1000, 3, 4)
  assert sorted(order) == list(range(1000))
  assert not np.array_equal(order, splits.permutation(1000, 3, 5))
  # ranks of the published stream of PCG64, which numpy keeps stable
  np.testing.assert_array_equal(
    np.random.PCG64(np.random.SeedSequence([3, 4])).random_raw(1000)[order],
    np.sort(np.random.PCG64(np.random.SeedSequence([3, 4])).random_raw(1000)),
  )


# ---------------------------------------------------------------------------------------------- names and options


def test_names():
  assert data.names() == ['digits', 'folder', 'idx', 'npz', 'tfds', 'toy']


@pytest.mark.parametrize(
  'name', ['digts', 'source', '', '.digits', 'no.such', 'os.path', 'latentgen.data.nope', 3, None, '../x', 'a b']
)
def test_unknown_name(name):
  text = message(load, name)
  assert 'config.data.name' in text and 'tfds' in text
  assert ("did you mean 'digits'" in text) or name != 'digts'


def test_unknown_option():
  text = message(load, 'idx', pth='x')
  assert 'config.data.pth' in text and "did you mean 'path'" in text


@pytest.mark.parametrize('name', ['idx', 'npz', 'folder'])
@pytest.mark.parametrize('path', [None, '', 3, 'no/such/place', 'a\0b'])
def test_path_must_exist(name, path):
  assert f'config.data.path = {path!r}' in message(load, name, path=path)


def test_a_module_of_ones_own(tmp_path, monkeypatch):
  (tmp_path / 'mine_pkg').mkdir()
  (tmp_path / 'mine_pkg' / 'stars.py').write_text(
    'import numpy as np\nfrom latentgen.data import ArraySource\n'
    'def load(n, splits=("train", "valid", "test"), **rest):\n'
    '  return {s: ArraySource(np.zeros((n, 2, 2, 1), np.uint8)) for s in splits}\n'
  )
  (tmp_path / 'mine_pkg' / 'broken.py').write_text('import no_such_module_at_all\n')
  monkeypatch.syspath_prepend(tmp_path)
  try:
    assert len(load('mine_pkg.stars', n=4, other=1)['valid']) == 4
    assert 'config.data.n is missing' not in message(load, 'mine_pkg.stars', n=4, splits=('train',))
    with pytest.raises(ModuleNotFoundError, match='no_such_module_at_all'):  # a bug of that module, not a wrong name
      load('mine_pkg.broken')
  finally:
    for name in [m for m in sys.modules if m.startswith('mine_pkg')]:
      del sys.modules[name]


def test_user_error_is_one_line():
  assert str(UserError('a\n  b')) == 'a b'
  assert did_you_mean('trian', ['train', 'test']) == "; did you mean 'train'?" and did_you_mean('zzz', ['train']) == ''


# ---------------------------------------------------------------------------------------------- npz


def test_npz_with_splits(tmp_path):
  x, y, t = images(30, 4, 5), np.arange(30) % 3, images(7, 4, 5)
  np.savez(tmp_path / 'a.npz', x_train=x, y_train=y, x_test=t, y_test=np.full(7, 4))
  found = load('npz', path=tmp_path / 'a.npz', valid=6)
  assert [len(found[s]) for s in data.SPLITS] == [24, 6, 7]
  assert sorted(rows(found['train']) + rows(found['valid'])) == sorted(i.tobytes() for i in x)
  assert rows(found['test']) == [i.tobytes() for i in t] and found['train'].num_classes == 5
  v = images(5, 4, 5, 1)
  np.savez(tmp_path / 'b.npz', train_images=x, valid_images=v, test_images=t)
  found = load('npz', path=str(tmp_path / 'b.npz'))
  assert (
    rows(found['valid']) == [i.tobytes() for i in v] and len(found['train']) == 30 and found['train'].num_classes == 0
  )


@pytest.mark.parametrize('kind', ['npz', 'npy'])
def test_npz_of_all_images(tmp_path, kind):
  x = images(50, 4, 4, 3)
  np.savez(tmp_path / 'a.npz', images=x) if kind == 'npz' else np.save(tmp_path / 'a.npy', x)
  found = load('npz', path=tmp_path / f'a.{kind}', valid=0.1, test=10)
  assert [len(found[s]) for s in data.SPLITS] == [35, 5, 10]
  assert sorted(sum((rows(found[s]) for s in found), [])) == sorted(i.tobytes() for i in x)
  assert 'leave none' in message(load, 'npz', path=tmp_path / f'a.{kind}', valid=25, test=25)


def test_npz_refuses(tmp_path):
  def save(**arrays):
    np.savez(tmp_path / 'a.npz', **arrays)
    return message(load, 'npz', path=tmp_path / 'a.npz')

  x = images(20, 4, 4)
  assert 'np.round(255 * x)' in save(images=x / 255)
  assert 'int64' in save(images=x.astype(int))
  assert 'reshape' in save(images=x.reshape(20, 16))
  assert 'class numbers' in save(images=x, labels=np.arange(19))
  assert 'class numbers' in save(images=x, labels=np.linspace(0, 1, 20))
  assert 'no test images' in save(x_train=x)
  assert 'cannot be read' in save(images=np.array([{}, 1], object))  # pickles stay shut
  assert 'differ in the shape' in save(x_train=x, x_test=images(5, 3, 3))
  assert 'not a file' in message(load, 'npz', path=tmp_path / 'no.npz')
  assert 'not a file' in message(load, 'npz', path=tmp_path)
  np.save(tmp_path / 'b.npy', x)
  whole = (tmp_path / 'b.npy').read_bytes()
  zipped = (tmp_path / 'a.npz').read_bytes()
  for bad in (
    b'',
    b'junk',
    whole[:-1],
    whole[:50],
    whole.replace(b'(20, 4, 4)', b'(9999999999, 4, 4)'),
    zipped[:-9],
    zipped[:300] + zipped[330:],
  ):
    (tmp_path / 'bad').write_bytes(bad)
    assert str(tmp_path / 'bad') in message(load, 'npz', path=tmp_path / 'bad')


# ---------------------------------------------------------------------------------------------- folder


def fill(root, n=6, size=(8, 8)):
  for c in ('cat', 'dog'):
    (root / c).mkdir(parents=True, exist_ok=True)
    for i in range(n):
      Image.fromarray(images(1, size[1], size[0], 3)[0]).save(root / c / f'{i}.png')


@pytest.mark.parametrize('in_memory', [True, False])
def test_folder_by_class(tmp_path, in_memory):
  fill(tmp_path)
  (tmp_path / 'notes.txt').write_text('x')
  found = load('folder', path=tmp_path, size=8, valid=2, test=3, in_memory=in_memory)
  assert [len(found[s]) for s in data.SPLITS] == [7, 2, 3]
  assert found['train'].shape == (8, 8, 3) and found['train'].num_classes == 2
  everything = {}
  for source in found.values():
    batch = source.take(slice(None))
    everything |= {i.tobytes(): label for i, label in zip(batch['image'], batch['label'], strict=True)}
  expected = {np.asarray(Image.open(f)).tobytes(): int(f.parent.name == 'dog') for f in tmp_path.rglob('*.png')}
  assert everything == expected
  assert (
    found['test'].checksum()
    == load('folder', path=tmp_path, size=8, valid=2, test=3, in_memory=in_memory)['test'].checksum()
  )


def test_folder_split_depends_on_names_alone(tmp_path):
  fill(tmp_path / 'a')
  for file in sorted((tmp_path / 'a').rglob('*.png'), reverse=True):
    copy = tmp_path / 'b' / file.parent.name / file.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(file.read_bytes())
  first, second = (load('folder', path=tmp_path / f, size=8, valid=2, test=3) for f in 'ab')
  for name in ('train', 'valid', 'test'):
    assert rows(first[name]) == rows(second[name])


def test_folder_crops_the_centre_and_resizes(tmp_path):
  wide = np.zeros((4, 12, 3), np.uint8)
  wide[:, 4:8] = 200  # the central square
  for i in range(3):
    Image.fromarray(wide).save(tmp_path / f'{i}.png')
  found = load('folder', path=tmp_path, size=2, channels=1, valid=1, test=1)
  image = found['train'].take([0])['image']
  assert image.shape == (1, 2, 2, 1) and (image == 200).all() and found['train'].num_classes == 0


def test_folder_refuses(tmp_path):
  assert 'not a directory' in message(load, 'folder', path=tmp_path / 'no')
  assert '0 image files' in message(load, 'folder', path=tmp_path)
  fill(tmp_path)
  assert 'config.data.size' in message(load, 'folder', path=tmp_path, size=0)
  assert 'config.data.channels' in message(load, 'folder', path=tmp_path, channels=2)
  bad = tmp_path / 'cat' / '3.png'
  whole = bad.read_bytes()
  for damaged in (whole[: len(whole) // 2], b'', b'text'):
    bad.write_bytes(damaged)
    assert str(bad) in message(load, 'folder', path=tmp_path, size=8)
  bad.write_bytes(whole)
  (tmp_path / 'stray.png').write_bytes(whole)
  assert 'beside sub-folders' in message(load, 'folder', path=tmp_path, size=8)
