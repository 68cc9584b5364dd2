"""Preprocessing: ranges, grids and frequencies of pixels, and what does not go together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentgen import assembly
from latentgen.data import ArraySource, preprocess
from latentgen.errors import UserError

KEY = jax.random.key(0)
EVERY = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


def run(raw, key=KEY, train=True, **options):
  function = jax.jit(preprocess.make(**options), static_argnums=2)
  out = function(key, {'image': jnp.asarray(raw), 'label': jnp.arange(len(raw))}, train)
  np.testing.assert_array_equal(out['label'], np.arange(len(raw)))
  assert out['image'].dtype == jnp.float32
  return np.asarray(out['image'])


@pytest.mark.parametrize('bits', range(1, 9))
def test_bits_grid(bits):
  x = run(EVERY, bits=bits)
  expected = np.floor(EVERY / 2 ** (8 - bits)) / (2**bits - 1)
  np.testing.assert_array_equal(x, expected.astype(np.float32))
  assert len(np.unique(x)) == 2**bits and x.min() == 0 and x.max() == 1


@pytest.mark.parametrize('bits', [1, 5, 8])
def test_dequantised_values_stay_in_their_bin(bits):
  raw = np.tile(EVERY, (400, 1, 1, 1))
  x = run(raw, bits=bits, dequantize=True).astype(np.float64)
  level = raw // 2 ** (8 - bits)
  u = x * 2**bits - level
  assert (u >= 0).all() and (u < 1).all()
  np.testing.assert_array_equal(np.floor(x * 2**bits), level)
  se = np.sqrt(1 / 12 / u.size)
  assert abs(u.mean() - 0.5) < 5 * se and abs((u**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / u.size)
  top = u[raw == 255]
  assert abs(top.mean() - 0.5) < 5 * np.sqrt(1 / 12 / top.size)
  assert not np.array_equal(x, run(raw, jax.random.key(1), bits=bits, dequantize=True))


def frequencies(x):
  """Frequency of ones of each of the 256 grey levels, [256]."""
  assert set(np.unique(x)) <= {0.0, 1.0}
  return x.reshape(len(x), 256).mean(0)


def assert_intensity(frequency, n):
  p = np.arange(256) / 255
  assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-12).all()
  assert frequency[0] == 0 and frequency[255] == 1


def test_fresh_binarisation_has_the_mean_of_the_intensity():
  raw = np.tile(EVERY, (2000, 1, 1, 1))
  x = run(raw, binarize='fresh')
  assert_intensity(frequencies(x), 2000)
  y = run(raw, jax.random.key(1), binarize='fresh')
  assert not np.array_equal(x, y)
  np.testing.assert_array_equal(x, run(raw, binarize='fresh', train=False))  # the key alone decides


def test_threshold():
  x = run(EVERY, binarize='threshold')
  np.testing.assert_array_equal(x.ravel(), np.arange(256) / 255 > 0.5)


def test_fixed_binarisation():
  source = ArraySource(np.tile(EVERY, (2000, 1, 1, 1)), np.arange(2000) % 7, 'grey/train')
  binary = preprocess.binarize_fixed(source, 5, chunk=300)
  assert binary.num_classes == 7 and binary.name == 'grey/train' and binary.shape == source.shape
  x = run(binary.take(slice(None))['image'], binarize='fixed')
  assert_intensity(frequencies(x), 2000)
  np.testing.assert_array_equal(x, run(binary.take(slice(None))['image'], jax.random.key(9), binarize='fixed'))
  np.testing.assert_array_equal(binary.take(slice(None))['label'], np.arange(2000) % 7)
  assert binary.checksum() == preprocess.binarize_fixed(source, 5).checksum()
  other = [preprocess.binarize_fixed(source, 6), preprocess.binarize_fixed(source.subset(slice(None), 'grey/test'), 5)]
  assert len({binary.checksum(), *(o.checksum() for o in other)}) == 3
  assert np.isnan(run(EVERY, binarize='fixed')).sum() == 254  # grey images were never binarised


def test_flip_in_training_only():
  rng = np.random.default_rng(0)
  raw = rng.integers(0, 256, (400, 3, 4, 2), np.uint8)
  plain = run(raw)
  x = run(raw, flip=True)
  same = (x == plain).all((1, 2, 3))
  mirrored = (x == plain[:, :, ::-1]).all((1, 2, 3))
  assert (same ^ mirrored).all() and abs(mirrored.mean() - 0.5) < 5 * np.sqrt(0.25 / 400)
  np.testing.assert_array_equal(run(raw, flip=True, train=False), plain)
  assert not np.array_equal(x, run(raw, jax.random.key(1), flip=True))


@pytest.mark.parametrize('options', [{}, {'binarize': 'fresh'}, {'binarize': 'threshold'}])
def test_padding_is_zero(options):
  raw = np.full((2, 3, 5, 1), 255, np.uint8)
  x = run(raw, pad=2, **options)
  assert x.shape == (2, 7, 9, 1) and x.sum() == raw.size and (x[:, 2:5, 2:7] == 1).all()


def test_padding_is_dequantised_like_black():
  x = run(np.full((2, 3, 5, 1), 255, np.uint8), pad=1, dequantize=True)
  assert 0 < x[:, 0].mean() < 1 / 256 and x[:, 0].std() > 0


@pytest.mark.parametrize(
  'options, key',
  [
    ({'binarize': 'frehs'}, 'binarize'),
    ({'binarize': None}, 'binarize'),
    ({'bits': 0}, 'bits'),
    ({'bits': 9}, 'bits'),
    ({'bits': 5.0}, 'bits'),
    ({'pad': -1}, 'pad'),
    ({'flip': 1}, 'flip'),
    ({'dequantize': 'yes'}, 'dequantize'),
    ({'binarize': 'fresh', 'bits': 5}, 'bits'),
    ({'binarize': 'fixed', 'dequantize': True}, 'dequantize'),
  ],
)
def test_what_does_not_go_together(options, key):
  with pytest.raises(UserError, match=f'config.data.{key}'):
    preprocess.make(**options)


@pytest.mark.parametrize('binarize', ['fresh', 'threshold', 'fixed'])
def test_only_bytes_are_binarised(binarize):
  config = dict(name='toy', train=20, valid=5, test=5, batch_size=4, binarize=binarize)
  with pytest.raises(UserError, match=f"config.data.binarize = '{binarize}' needs images of bytes, and these are float32"):
    splits, function, _ = assembly.build_data(config, 0)
    function(KEY, splits['train'].take([0]), True)


@pytest.mark.parametrize('option, default', [({'bits': 5}, 8), ({'dequantize': True}, False), ({'pad': 2}, 0), ({'flip': True}, False)])
def test_options_for_bytes_are_refused_for_points_by_their_key(option, default):
  (name, value), batch = *option.items(), {'image': jnp.zeros((1, 1, 2, 1))}
  with pytest.raises(UserError, match=f'config.data.{name} = {value} needs images of bytes, and these are float32; set it to {default}'):
    preprocess.make(**option)(KEY, batch, True)


def test_only_bytes_are_preprocessed():
  points = {'image': jnp.full((2, 3, 3, 1), -1.5)}
  np.testing.assert_array_equal(preprocess.make()(KEY, points, True)['image'], points['image'])
  with pytest.raises(TypeError, match='uint8'):
    preprocess.make()(KEY, {'image': jnp.zeros((2, 3, 3, 1), jnp.int32)}, True)
