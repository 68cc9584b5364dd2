"""Uncertainty of decoders whose error and noise are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from latentgen.data.source import ArraySource
from latentgen.distributions import Bernoulli, Independent, Normal
from latentgen.errors import UserError
from latentgen.evaluate import Subject, run_all, uncertainty
from latentgen.types import Trace

SHAPE, N = (4, 5, 1), 400
TRUE = np.linspace(0.02, 0.3, 20).reshape(SHAPE)  # deviation of each pixel


@dataclasses.dataclass(frozen=True)
class Toy:
  """f = 0.5 + spread z, z ~ N(0, 1) a pixel; sigma = factor * (its own scale)."""

  scale: tuple = tuple(TRUE.reshape(-1))
  factor: float = 1.0
  spread: float = 0.0
  bernoulli: bool = False
  samplers = ('base',)

  def _trace(self, key, k, b):
    loc = 0.5 + self.spread * jax.random.normal(key, (k, b, *SHAPE))
    scale = self.factor * jnp.asarray(self.scale, jnp.float32)
    px = Bernoulli(loc) if self.bernoulli else Normal(loc, scale.reshape(SHAPE) if scale.size > 1 else scale)
    return Trace((), (), (), (), None, (), None, None, Independent(px, 3))

  def trace(self, variables, x, key, k=1):
    return self._trace(key, k, x.shape[0])

  def simulate(self, variables, key, n, sampler=None, temperature=1.0, choose=None):
    return self._trace(key, 1, n)


def data():
  return 0.5 + TRUE * np.random.default_rng(0).standard_normal((N, *SHAPE))


def measure(options=None, **toy):
  source = ArraySource(data().astype(np.float32))
  subject = Subject(Toy(**toy), {}, {'test': source}, lambda key, batch, train: batch, jax.random.key(1), 64)
  findings = run_all(subject, {'uncertainty': options or {}})
  return {name.removeprefix('uncertainty/'): r for name, r in findings.results.items()}, findings.images


def test_the_right_scale_of_every_pixel():
  found, images = measure()
  error = np.abs(data() - 0.5)
  np.testing.assert_allclose(found['rmse'].value, np.sqrt(np.square(error).mean()), rtol=1e-5)
  np.testing.assert_allclose(found['sigma'].value, np.sqrt(np.square(TRUE).mean()), rtol=1e-5)
  np.testing.assert_allclose(found['within_sigma'].value, (error < TRUE).mean(), rtol=1e-6)
  assert abs(found['within_sigma'].value - 0.6827) < 3.5 * found['within_sigma'].stderr < 0.05
  assert abs(found['sigma_over_rmse'].value - 1) < 0.03
  ranks = [scipy.stats.rankdata(a) for a in (np.broadcast_to(TRUE, error.shape), error)]
  np.testing.assert_allclose(found['spearman'].value, np.corrcoef(*(r.reshape(-1) for r in ranks))[0, 1], atol=1e-6)
  assert found['coverage_error'].value < 0.01 and found['ece'].value < 0.01
  assert all(r.n == N for r in found.values())
  names = {f'uncertainty_{n}' for n in ('reconstructions', 'samples', 'coverage', 'calibration')}
  assert set(images) == names and all(p.array.dtype == np.uint8 for p in images.values())


def test_calibration_error_by_hand():
  """Ten equal bins of two pixels each."""
  found, _ = measure({'samples': 1}, factor=2.0)
  error, sigma = (np.square(a).reshape(-1, 10, 2) for a in (data() - 0.5, np.broadcast_to(2 * TRUE, (N, *SHAPE))))
  apart = np.abs(np.sqrt(error.mean((0, 2))) - np.sqrt(sigma.mean((0, 2))))
  np.testing.assert_allclose(found['ece'].value, apart.mean(), rtol=1e-4)
  np.testing.assert_allclose(found['within_sigma'].value, 2 * scipy.stats.norm.cdf(2) - 1, atol=0.01)


def test_one_scale_for_all_pixels_has_no_rank_and_one_bin():
  best = float(np.sqrt(np.square(data() - 0.5).mean()))
  found, images = measure(scale=(best,))
  assert 'spearman' not in found and 'uncertainty_calibration' not in images
  np.testing.assert_allclose([found['sigma_over_rmse'].value, found['ece'].value], [1.0, 0.0], atol=1e-5)
  ratio = np.abs(data() - 0.5) / best
  levels = np.arange(0.05, 0.96, 0.05)
  edges = scipy.stats.norm.ppf((1 + levels) / 2)
  want = np.mean([abs((ratio <= e).mean() - level) for e, level in zip(edges, levels, strict=True)])
  np.testing.assert_allclose(found['coverage_error'].value, want, atol=1e-4)
  assert found['within_sigma'].value > 0.69  # many small errors and a few large ones


def test_errors_are_those_of_posterior_samples():
  found, _ = measure({'samples': 8}, spread=0.4)
  np.testing.assert_allclose(found['rmse'].value, np.sqrt(np.square(TRUE).mean() + 0.16), rtol=0.02)


def test_some_pixels_of_large_images():
  whole, some = measure()[0], measure({'pixels': 7})[0]
  assert some['sigma'].value != whole['sigma'].value and some['sigma'].n == N
  assert abs(some['within_sigma'].value - 0.683) < 0.05  # sigma and error of the same pixels


def test_maps_show_sigma_beside_the_mean():
  _, images = measure({'images': 4}, scale=tuple(TRUE.reshape(-1)))
  picture, scale, gap = images['uncertainty_samples'].array, 12, 2
  tile = lambda i: picture[gap : gap + 4 * scale, gap + i * (5 * scale + gap) :][::scale, : 5 * scale : scale]
  np.testing.assert_allclose(tile(0), 127.5, atol=1)
  np.testing.assert_allclose(tile(1), np.minimum(TRUE[..., 0] / np.quantile(TRUE, 0.99), 1) * 255, atol=4)


def test_shades_of_colour():
  value = np.stack([np.full((2, 3, 3), v) for v in (0.1, 0.2, 0.3)], -1)
  got = uncertainty.shades(value, 0.5)
  assert got.shape == (2, 3, 3, 3)
  np.testing.assert_allclose(got, np.sqrt(0.14 / 3) / 0.5)


def test_a_decoder_without_a_gaussian_scale_is_refused():
  with pytest.raises(UserError, match="'uncertainty' needs a Gaussian decoder, and this one is Bernoulli") as error:
    measure(bernoulli=True)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('option, value', [('samples', 0), ('pixels', 0), ('bins', 1), ('images', 0), ('split', 'tets')])
def test_mistakes_name_the_key(option, value):
  with pytest.raises(UserError, match=f'config.evaluate.uncertainty.{option}'):
    measure({option: value})
