"""Areas, distances, calibration errors against closed forms; the latent two-sample test where the answer is known."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import threadpoolctl

from latentgen.evaluate import statistics
from latentgen.evaluate.two_sample import cross_validated


@pytest.fixture(autouse=True)
def one_thread():
  """As in `run_all`: many small products on several threads wait for one another."""
  with threadpoolctl.threadpool_limits(1):
    yield


def test_auroc_and_delong_error_by_brute_force():
  rng = np.random.default_rng(0)
  positive, negative = rng.normal(0.7, 1, (60, 1)).round(1), rng.normal(0, 1, 45).round(1)  # ties
  pairs = np.sign(positive - negative) / 2 + 0.5
  found = statistics.auroc(positive, negative)
  assert found.value == pytest.approx(pairs.mean())
  expected = pairs.mean(1).var(ddof=1) / 60 + pairs.mean(0).var(ddof=1) / 45
  assert found.stderr == pytest.approx(math.sqrt(expected))


def test_auroc_error_is_the_deviation_over_repetitions_also_of_clusters():
  rng = np.random.default_rng(1)
  for draws, shared in ((1, 0.0), (4, 0.9)):
    found = []
    for _ in range(400):
      common = rng.normal(size=(80, 1))
      positive = 0.5 + shared * common + math.sqrt(1 - shared**2) * rng.normal(size=(80, draws))
      found.append(statistics.auroc(positive, rng.normal(size=80)))
    values, errors = np.asarray(found).T
    assert values.mean() == pytest.approx(scipy.stats.norm.cdf(0.5 / math.sqrt(2)), abs=0.01)
    assert errors.mean() == pytest.approx(values.std(), rel=0.12)


def test_two_sample_test_finds_nothing_where_there_is_nothing():
  rng = np.random.default_rng(2)
  z = []
  for seed in range(6):
    real, fake = rng.normal(size=(300, 1, 4)), rng.normal(size=(300, 4))
    folded = cross_validated(real, fake, 'quadratic', seed=seed)
    area = statistics.pooled([statistics.auroc(*f) for f in folded], [len(p) for p, _ in folded])
    right = statistics.pooled([statistics.balanced_accuracy(*f) for f in folded], [len(p) for p, _ in folded])
    assert abs(area.value - 0.5) < 3.5 * area.stderr and abs(right.value - 0.5) < 3.5 * right.stderr
    z.append((area.value - 0.5) / area.stderr)
  assert abs(np.mean(z)) < 3 / math.sqrt(6)


def test_a_logit_of_zero_is_half_right():
  positive, negative = np.array([[0.0, 2.0], [-1.0, 0.0]]), np.array([0.0, -1.0, 3.0, -0.0])
  found = statistics.balanced_accuracy(positive, negative)
  assert found.value == pytest.approx(((0.5 + 1 + 0 + 0.5) / 4 + (0.5 + 1 + 0 + 0.5) / 4) / 2)
  assert statistics.balanced_accuracy(np.zeros((5, 2)), np.zeros(7)) == (0.5, 0.0)


@pytest.mark.parametrize('classifier', ['both', 'quadratic', 'network'])
def test_two_sample_test_recovers_the_area_of_shifted_gaussians(classifier):
  rng = np.random.default_rng(3)
  shift = 1.0
  real, fake = rng.normal(size=(800, 1, 3)), rng.normal(size=(800, 3))
  real[..., 1] += shift
  folded = cross_validated(real, fake, classifier)
  found = statistics.pooled([statistics.auroc(*f) for f in folded], [len(p) for p, _ in folded])
  optimum = scipy.stats.norm.cdf(shift / math.sqrt(2))
  assert optimum - 0.04 < found.value < optimum + 3 * found.stderr


def test_two_sample_test_sees_scale_and_draws_of_one_image_stay_together():
  rng = np.random.default_rng(4)
  real = np.repeat(rng.normal(size=(100, 1, 6)), 5, 1) + 1e-3 * rng.normal(size=(100, 5, 6))  # five near copies
  folded = cross_validated(real, rng.normal(size=(500, 6)), 'both')
  area = statistics.pooled([statistics.auroc(*f) for f in folded], [len(p) for p, _ in folded])
  assert abs(area.value - 0.5) < 3.5 * area.stderr  # copies across folds would be recognised
  assert sum(p.size for p, _ in folded) == 500 and all(p.shape[1] == 5 for p, _ in folded)
  scaled = cross_validated(0.5 * rng.normal(size=(400, 1, 6)), rng.normal(size=(400, 6)), 'quadratic')
  assert min(statistics.auroc(*f).value for f in scaled) > 0.85  # the linear part alone is blind to it


def test_frechet_distance_of_gaussians():
  rng = np.random.default_rng(5)
  a, b = rng.normal(size=(2, 6, 6))
  a, b = a @ a.T + np.eye(6), b @ b.T
  mean = rng.normal(size=(2, 6))
  expected = np.square(mean[0] - mean[1]).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
  assert statistics.frechet_of_moments(mean[0], a, mean[1], b) == pytest.approx(expected, rel=1e-6)
  scales, other = np.array([1.0, 2.0, 3.0]), np.array([0.5, 2.0, 1.0])  # diagonal: sum of (s - t)^2
  x, y = rng.normal(size=(2, 60000, 3))
  assert statistics.frechet(x * scales, y * other + 1) == pytest.approx(3 + 0.25 + 4, rel=0.03)
  assert statistics.frechet(x, x) == pytest.approx(0, abs=1e-8)


def test_bootstrap_error_of_a_mean():
  rng = np.random.default_rng(6)
  x, y = rng.normal(size=(200, 1)), rng.normal(size=(300, 1))
  error = statistics.bootstrap(lambda a, b: a.mean() - b.mean(), x, y, 400, 0)
  assert error == pytest.approx(math.sqrt(1 / 200 + 1 / 300), rel=0.15)


def test_kernel_distance_is_unbiased():
  rng = np.random.default_rng(7)
  found = [statistics.kernel_distance(rng.normal(size=(40, 3)), rng.normal(size=(40, 3)), 4, s) for s in range(300)]
  values, errors = np.asarray(found).T
  assert abs(values.mean()) < 3 * values.std() / math.sqrt(300)
  assert (values < 0).any() and (values > 0).any()
  assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.25)
  # In one dimension, (ab + 1)^3 compares the first three moments: sum_j binom(3, j) (E x^j - E y^j)^2.
  x, y = rng.normal(size=(100000, 1)), rng.normal(0.5, 1, (100000, 1))
  moments = np.array([0.5, 1.25 - 1, 0.125 + 1.5])
  assert statistics.kernel_distance(x, y, 100, 0).value == pytest.approx(np.array([3, 3, 1]) @ moments**2, rel=0.08)


def calibrated(n, factor, rng):
  """Logits of N(1, 1) against N(-1, 1), whose log-ratio is 2 t, times a factor."""
  return factor * 2 * rng.normal(1, 1, n), factor * 2 * rng.normal(-1, 1, n)


def test_calibration_error_is_zero_where_calibrated_and_not_where_doubled():
  rng = np.random.default_rng(8)
  exact = statistics.reliability(*calibrated(100000, 1.0, rng)).error()
  doubled = statistics.reliability(*calibrated(100000, 2.0, rng)).error()
  assert exact < 0.006
  # Expectation of |sigmoid(4 t) - sigmoid(2 t)| under the mixture of both classes, by quadrature.
  t = np.linspace(-8, 8, 20001)
  mixture = (scipy.stats.norm.pdf(t, 1) + scipy.stats.norm.pdf(t, -1)) / 2
  expected = np.trapezoid(mixture * np.abs(1 / (1 + np.exp(-4 * t)) - 1 / (1 + np.exp(-2 * t))), t)
  assert doubled == pytest.approx(expected, abs=0.006)


def test_reliability_bins():
  curve = statistics.reliability(np.array([[0.0], [50.0]]), np.array([[0.0], [-800.0]]), bins=4)
  np.testing.assert_allclose(curve.count, [1, 0, 2, 1])
  np.testing.assert_allclose(curve.predicted, [0, 0, 0.5, 1])
  np.testing.assert_allclose(curve.observed, [0, 0, 0.5, 1])
  weighted = statistics.reliability(np.array([0.0, 50.0]), np.array([0.0, -800.0]), 4, np.array([3.0, 0.0]))
  np.testing.assert_allclose(weighted.count, [0, 0, 6, 0])
