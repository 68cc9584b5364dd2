"""Data files that are damaged or lie, and options that cannot be: read, or refused in one line that names file or key."""

import gzip
import io
import itertools
import os
import random
import struct
import zipfile

from fuzzing import VALUES, WORDS, damage, little_memory, runs, survives
import numpy as np
from PIL import Image
import pytest

from latentgen import data
from latentgen.data import folder, idx, npz
from latentgen.errors import UserError


def encode(array: np.ndarray, shape=None) -> bytes:
  shape = array.shape if shape is None else shape
  return bytes((0, 0, 8, len(shape))) + struct.pack(f'>{len(shape)}I', *shape) + array.tobytes()


IMAGES = np.arange(9 * 16, dtype=np.uint8).reshape(9, 4, 4)
IDX = {
  'train-images-idx3-ubyte': encode(IMAGES),
  'train-labels-idx1-ubyte': encode(np.arange(9, dtype=np.uint8)),
  't10k-images-idx3-ubyte': encode(IMAGES),
  't10k-labels-idx1-ubyte': encode(np.arange(9, dtype=np.uint8)),
}


def check(found, path, allowed=()):
  """Refused with the file or key in the message, or sound."""
  if isinstance(found, UserError):
    assert str(path) in str(found) or 'config.data' in str(found) or any(a in str(found) for a in allowed), found
    return
  assert set(found) == set(data.SPLITS)
  for source in found.values():
    batch = source.take(slice(0, 4))
    assert batch['image'].dtype == np.uint8 and batch['image'].shape[1:] == source.shape
    assert batch['label'].dtype == np.int32 and batch['label'].max(initial=-1) < max(source.num_classes, 1)


@runs(100, 5000)
def test_idx(tmp_path, count):
  rng = random.Random(1)
  for name, good in IDX.items():
    (tmp_path / name).write_bytes(good)
  with little_memory():
    for i in range(count):
      name, zipped = rng.choice(list(IDX)), rng.random() < 0.4
      bad = damage(rng, gzip.compress(IDX[name], mtime=0) if zipped else IDX[name], list(IDX.values()))
      (tmp_path / name).write_bytes(bad)
      check(survives(lambda: data.load('idx', path=str(tmp_path), valid=2), (i, name, bad)), tmp_path)
      (tmp_path / name).write_bytes(IDX[name])


def savez(compressed=True, **arrays) -> bytes:
  buffer = io.BytesIO()
  (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
  return buffer.getvalue()


def npy(array=IMAGES, header=None, **kwargs) -> bytes:
  """A .npy file, its header replaced by a text."""
  buffer = io.BytesIO()
  np.save(buffer, array, **kwargs)
  raw = buffer.getvalue()
  return raw if header is None else raw[:8] + struct.pack('<H', len(header)) + header.encode() + raw[128:]


def archive(members: dict[str, bytes], compression=zipfile.ZIP_DEFLATED) -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w', compression) as file:
    for name, content in members.items():
      file.writestr(name, content)
  return buffer.getvalue()


LABELS = np.arange(9)
ARRAYS = [
  savez(images=IMAGES, labels=LABELS),
  savez(False, images=IMAGES, labels=LABELS),
  savez(False, x_train=IMAGES, y_train=LABELS, x_test=IMAGES, y_test=LABELS),
  npy(),
  npy(np.asfortranarray(IMAGES)),
]


@runs(100, 5000)
def test_npz(tmp_path, count):
  rng, path = random.Random(2), tmp_path / 'file.npz'
  with little_memory():
    for i in range(count):
      if rng.random() < 0.7:
        bad = damage(rng, rng.choice(ARRAYS), ARRAYS)
      else:  # damage inside an archive that is whole
        names = rng.choice([('images', 'labels'), ('x_train', 'x_test'), ('train_images', 'test_images', 'train_labels')])
        members = {f'{n}.npy': npy(LABELS if 'label' in n else IMAGES) for n in names}
        chosen = rng.choice(list(members))
        bad = archive({**members, chosen: damage(rng, members[chosen], ARRAYS)},
          rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)))
      path.write_bytes(bad)
      check(survives(lambda: data.load('npz', path=str(path), valid=2, test=2), (i, bad)), path)


SHAPES = ('(9, 4, 4)', '(9999999999999, 4, 4)', '(9, 4, 1000000000)', '(-9, -4, 4)', '(9, 4)', '()', '(0, 4, 4)',
  '(9.0, 4, 4)', '(True, 4, 4)',
          '(9L, 4, 4)', '9', '(1,)*9', '(2**40, 4, 4)', '(18446744073709551617, 4, 4)', '(' * 3000,
          '-' * 3000 + '1')  # fmt: skip
DTYPES = ("'|u1'", "'|O'", "'<f8'", "'<i8'", "'<U1000000000'", "'|V99999999999'", "'x'", "''", 'None',
  "('|u1', (99999, 99999))", "[('a', '|u1')]",
          "[('a', '|O')]", "'<M8[ns]'", "'<c16'", "[('a', '|u1', (2,)), ('a', '|u1')]", '{}', '[[]]', "'|S0'",
          "'\\d'")  # fmt: skip


def headers():
  for shape in SHAPES:
    for dtype in DTYPES:
      for order in ('False', 'True', '3'):
        yield f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
  yield from ('', '{}', '{' * 5000, 'x', "{'descr': '|u1'}", "{'shape': (9, 4, 4)}", '\n', '[1, 2]', ' ' * 60000,
    "{'descr': '|u1', 'x': " + '9' * 9000)


@pytest.mark.parametrize('inside', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_headers_of_arrays(tmp_path, inside):
  path = tmp_path / 'file'
  with little_memory():
    for header in itertools.islice(headers(), 0, None, 1 if inside else 4):
      bad = npy(header=header)
      path.write_bytes(archive({'images.npy': bad}) if inside else bad)
      check(survives(lambda: data.load('npz', path=str(path), valid=2, test=2), header), path)


def picture(kind: str, mode='RGB', size=(6, 5), **options) -> bytes:
  buffer = io.BytesIO()
  image = Image.linear_gradient('L').resize(size).convert(mode)
  image.save(buffer, format=kind, **options)
  return buffer.getvalue()


PICTURES = {
  **{f'{mode}.png'.replace(';', ''): picture('png', mode) for mode in ('RGB', 'L', 'P', 'RGBA', 'LA', '1', 'I;16')},
  'interlaced.png': picture('png', 'P', transparency=b'\0\1\2'),
  **{f'{mode}.jpg': picture('jpeg', mode) for mode in ('RGB', 'L', 'CMYK')},
  'progressive.jpeg': picture('jpeg', progressive=True),
  'a.gif': picture('gif', 'P'),
  'a.bmp': picture('bmp'),
  'a.tif': picture('tiff'),
  'f.tiff': picture('tiff', 'F'),
  'a.webp': picture('webp'),
  'a.ppm': picture('ppm'),
  'a.pgm': picture('ppm', 'L'),
}


@runs(150, 6000)
def test_pictures(tmp_path, count):
  rng, others = random.Random(3), list(PICTURES.values())
  for i in range(3):
    (tmp_path / f'{i}.png').write_bytes(PICTURES['RGB.png'])
  with little_memory():
    for i in range(count):
      name = rng.choice(list(PICTURES))
      bad = damage(rng, PICTURES[name], others)
      path = tmp_path / (rng.choice(list(PICTURES)) if rng.random() < 0.1 else name)
      path.write_bytes(bad)
      channels = rng.choice((1, 3))
      load = lambda path=path, channels=channels: data.load('folder', path=str(tmp_path), size=4, channels=channels, valid=1,
        test=1)
      check(survives(load, (i, name, bad)), path)
      path.unlink()


OPTIONS = {
  'idx': ('path', 'valid', 'labels', 'prefix', 'transpose'),
  'npz': ('path', 'valid', 'test'),
  'folder': ('path', 'size', 'channels', 'valid', 'test', 'in_memory'),
  'tfds': ('dataset', 'data_dir', 'train', 'valid', 'test', 'crop', 'size', 'image', 'label', 'in_memory'),
  'toy': ('kind', 'dims', 'components', 'noise', 'train', 'valid', 'test', 'seed'),
  'digits': ('held_out_classes',),
}


@runs(150, 3000)
def test_options(tmp_path, monkeypatch, count):
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  monkeypatch.chdir(tmp_path / 'a' / 'b')
  monkeypatch.setenv('HOME', str(tmp_path / 'a'))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  rng = random.Random(4)
  for name, good in IDX.items():
    (tmp_path / name).write_bytes(good)
  (tmp_path / 'file.npz').write_bytes(ARRAYS[0])
  (tmp_path / 'pictures').mkdir()
  for i in range(4):
    (tmp_path / 'pictures' / f'{i}.png').write_bytes(PICTURES['RGB.png'])
  good = {
    'idx': {'path': str(tmp_path), 'valid': 2}, 'npz': {'path': str(tmp_path / 'file.npz'), 'valid': 2, 'test': 2},
    'folder': {'path': str(tmp_path / 'pictures'), 'size': 4, 'valid': 1, 'test': 1}, 'tfds': {'dataset': 'mnist'},
    'toy': {'train': 8, 'valid': 2, 'test': 2}, 'digits': {},
  }  # fmt: skip
  before = sorted(tmp_path.rglob('*'))
  with little_memory():
    for _ in range(count):
      name = rng.choice(list(OPTIONS))
      options = {**good[name], **{rng.choice(OPTIONS[name]): rng.choice(VALUES + WORDS) for _ in range(rng.choice((1, 1, 2)))}}
      found = survives(lambda name=name, options=options: data.load(name, **options), (name, options))
      assert not isinstance(found, UserError) or 'config.data' in str(found) or str(tmp_path) in str(found)
  assert sorted(tmp_path.rglob('*')) == before


# ---------------------------------------------------------------------------------------------- one at a time


def message(call) -> str:
  with little_memory():
    found = survives(call, '')
  assert isinstance(found, UserError)
  return str(found)


def test_what_promises_terabytes_is_refused_before_it_is_allocated(tmp_path, monkeypatch):
  asked = []
  empty = np.empty
  noted = lambda shape, *args: asked.append(np.prod(shape, dtype=float)) or empty(shape, *args)
  monkeypatch.setattr(np, 'empty', noted)
  huge = (4_000_000_000, 4000, 4000)
  path = tmp_path / 'file'
  for raw in (encode(IMAGES, huge), gzip.compress(encode(IMAGES, huge))):
    path.write_bytes(raw)
    assert 'truncated' in message(lambda: idx.read(path, 3))
  lie = npy(header=f"{{'descr': '|u1', 'fortran_order': False, 'shape': {huge}, }}\n")
  path.write_bytes(lie)
  assert 'announced' in message(lambda: npz.load(path))
  bomb = archive({'images.npy': lie})
  path.write_bytes(bomb)
  assert 'announced' in message(lambda: npz.load(path))
  central = bomb.index(b'PK\x01\x02')  # the directory says that the member is as large as its header
  size = (2**32 - 2).to_bytes(4, 'little')
  path.write_bytes(bomb[: central + 24] + size + bomb[central + 28 :])
  assert 'promises more than it can hold' in message(lambda: npz.load(path))
  path.write_bytes(archive({'images.npy': npy()}, zipfile.ZIP_BZIP2))
  assert 'numpy does not use' in message(lambda: npz.load(path))
  assert 'GiB of memory' in message(lambda: data.load('toy', train=10**15))
  assert max(asked, default=0) < 1e6


def test_what_the_machine_cannot_hold_is_refused(tmp_path, monkeypatch):
  for i in range(3):
    (tmp_path / f'{i}.png').write_bytes(PICTURES['RGB.png'])
  (tmp_path / 'file.npz').write_bytes(ARRAYS[0])
  small = {'SC_PHYS_PAGES': 1, 'SC_PAGE_SIZE': 64}
  monkeypatch.setattr(os, 'sysconf', small.__getitem__)
  assert 'config.data.in_memory = False' in message(lambda: folder.load(tmp_path, size=4, valid=1, test=1))
  assert len(folder.load(tmp_path, size=4, valid=1, test=1, in_memory=False)['train']) == 1
  assert 'GiB of memory' in message(lambda: npz.load(tmp_path / 'file.npz'))
  assert 'config.data.dims' in message(lambda: data.load('toy'))


def test_decompression_bombs(tmp_path):
  for i in range(2):
    (tmp_path / f'{i}.png').write_bytes(PICTURES['RGB.png'])
  Image.new('1', (10000, 10000)).save(tmp_path / '2.png')  # 100 million pixels in some 12 kB
  assert (tmp_path / '2.png').stat().st_size < 20_000
  assert '2.png cannot be decoded' in message(lambda: data.load('folder', path=str(tmp_path), size=4, valid=1, test=1))


def test_no_decoder_but_those_of_the_suffixes_sees_a_file(tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n')
  assert 'png cannot be decoded' in message(lambda: data.load('folder', path=str(tmp_path), size=4, valid=1, test=1))


def test_kinds_of_pixels_mean_the_same(tmp_path):
  levels = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)
  grey = Image.fromarray(levels)
  deep = levels.astype(np.uint16) * 256 + 255
  kinds = {
    'grey.png': grey, 'colour.png': grey.convert('RGB'), 'alpha.png': grey.convert('RGBA'), 'palette.png': grey.convert('P'),
    'deep.png': Image.fromarray(deep), 'deep.tif': Image.fromarray(deep), 'deep.pgm': Image.fromarray(deep.astype(np.int32)),
    'wide.png': Image.fromarray(np.pad(levels, ((0, 0), (3, 3)))),
  }  # fmt: skip
  for name, image in kinds.items():
    image.save(tmp_path / name)
  for channels in (1, 3):
    found = data.load('folder', path=str(tmp_path), size=4, channels=channels, valid=1, test=1)
    for source in found.values():
      for image in source.take(slice(None))['image']:
        np.testing.assert_array_equal(image, np.repeat(levels[..., None], channels, -1))
  Image.fromarray(levels.astype(np.float32)).save(tmp_path / 'float.tif')
  assert 'more than 16 bits' in message(lambda: data.load('folder', path=str(tmp_path), size=4, valid=1, test=1))


def test_places_that_hold_no_data(tmp_path):
  file, loop, gone = tmp_path / 'file', tmp_path / 'loop', tmp_path / 'gone'
  file.write_bytes(b'')
  loop.symlink_to(loop)
  (tmp_path / 'empty').mkdir()
  gone.symlink_to(tmp_path / 'nothing')
  for name in ('idx', 'npz', 'folder'):
    for place in (file, loop, gone, tmp_path / 'empty', file / 'below', '~nobody-of-that-name', 'a' * 300, '/dev/null', '',
      None, 3):
      text = message(lambda name=name, place=place: data.load(name, path=place))
      assert 'config.data.path' in text or str(place) in text, (name, place)
