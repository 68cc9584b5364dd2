"""Toy distributions against their known moments."""

import numpy as np
import pytest

from latentgen import data
from latentgen.errors import UserError


def test_blobs_lie_where_they_should():
  train = data.load('toy', kind='blobs', dims=3, components=4, noise=0.5, train=20_000)['train']
  batch = train.take(slice(None))
  x, y = batch['image'][:, 0, :, 0], batch['label']
  assert train.shape == (1, 3, 1) and x.dtype == np.float32 and train.num_classes == 4
  for label, center in enumerate([(4, 0, 0), (0, 4, 0), (-4, 0, 0), (0, -4, 0)]):
    mine = x[y == label]
    assert len(mine) == pytest.approx(5000, abs=250)
    np.testing.assert_allclose(mine.mean(0), center, atol=0.04)
    np.testing.assert_allclose(mine.std(0), 0.5, atol=0.02)


def test_factors_have_the_covariance_of_their_loadings():
  x = data.load('toy', kind='factors', dims=6, components=2, noise=0.5, train=50_000)['train'].take(slice(None))['image']
  eigenvalues = np.linalg.eigvalsh(np.cov(x.reshape(len(x), -1).T))[::-1]
  np.testing.assert_allclose(eigenvalues[:2], [16.25, 4.25], rtol=0.03)
  np.testing.assert_allclose(eigenvalues[2:], 0.25, rtol=0.05)


def test_grid_fills_the_unit_square():
  batch = data.load('toy', kind='grid', components=9, noise=0.1, train=20_000)['train'].take(slice(None))
  x, y = batch['image'][:, 0, :, 0], batch['label']
  for label in range(9):
    mine = x[y == label]
    assert len(mine) == pytest.approx(20_000 / 9, abs=200)
    np.testing.assert_allclose(mine.mean(0), (np.array(divmod(label, 3)) + 0.5) / 3, atol=0.004)
    np.testing.assert_allclose(mine.std(0), 0.1 / 3, atol=0.002)


def test_same_seed_same_points_and_disjoint_splits():
  a, b = data.load('toy'), data.load('toy')
  other = data.load('toy', seed=1)
  assert a['train'].checksum() == b['train'].checksum() != other['train'].checksum()
  assert not np.isin(a['test'].take(slice(None))['image'], a['train'].take(slice(None))['image']).any()


@pytest.mark.parametrize(
  'options, key',
  [({'kind': 'blob'}, 'kind'), ({'dims': 1}, 'dims'), ({'noise': 0.0}, 'noise'), ({'kind': 'factors', 'components': 3}, 'components'),
   ({'kind': 'grid', 'components': 8}, 'components'), ({'kind': 'grid', 'dims': 3}, 'components')],
)
def test_bad_values_name_their_key(options, key):
  with pytest.raises(UserError, match=f'config.data.{key}'):
    data.load('toy', **options)
