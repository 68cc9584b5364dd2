"""The statistics behind the tasks, on numpy arrays: ROC areas, distances between feature clouds, reliability."""

import math
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
  """A number and its standard error."""

  value: float
  stderr: float


# ---------------------------------------------------------------------------------------------- two samples


def auroc(positive: np.ndarray, negative: np.ndarray) -> Estimate:
  """P(positive > negative) + P(tie) / 2, with DeLong's standard error for clustered positives.

  Args:
    positive: scores [n, draws]; the draws of a row (of one image) may depend on one another, rows may not.
    negative: scores [m], independent.

  References:
    E. DeLong, D. DeLong, D. Clarke-Pearson, Comparing the areas under two or more correlated receiver operating
    characteristic curves, 1988. N. Obuchowski, Nonparametric analysis of clustered ROC curve data, 1997.
  """
  from scipy.stats import rankdata  # half a second, which training need not wait for

  positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
  flat = positive.reshape(-1)
  ranks = rankdata(np.concatenate([flat, negative]))
  below = (ranks[: flat.size] - rankdata(flat)) / negative.size  # share of negatives below each positive
  above = 1 - (ranks[flat.size :] - rankdata(negative)) / flat.size  # share of positives above a negative
  rows = below.reshape(positive.shape).mean(1)
  return Estimate(float(rows.mean()), math.sqrt(_squared_error(rows) + _squared_error(above)))


def balanced_accuracy(positive: np.ndarray, negative: np.ndarray) -> Estimate:
  """Mean of both classes' share on the right side of 0, of which 0 itself is half; scores as in `auroc`."""
  positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
  right, also = np.heaviside(positive, 0.5).mean(1), np.heaviside(-negative, 0.5)
  return Estimate(float(right.mean() + also.mean()) / 2, math.sqrt(_squared_error(right) + _squared_error(also)) / 2)


def _squared_error(values: np.ndarray) -> float:
  """Squared standard error of a mean."""
  return float(values.var(ddof=1) / values.size) if values.size > 1 else 0.25


def pooled(estimates: list[Estimate], weights: list[float]) -> Estimate:
  """Weighted mean of independent estimates."""
  w = np.asarray(weights, np.float64) / np.sum(weights)
  values, errors = np.asarray(estimates, np.float64).T
  return Estimate(float(w @ values), float(np.sqrt(np.square(w) @ np.square(errors))))


# ---------------------------------------------------------------------------------------------- feature clouds


def frechet(x: np.ndarray, y: np.ndarray) -> float:
  """Fréchet distance of the Gaussians with the moments of two clouds [n, d], [m, d].

  |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x^1/2 S_y S_x^1/2)^1/2), biased upwards by finite n: compare at equal n only.

  References:
    M. Heusel et al., GANs trained by a two time-scale update rule converge to a local Nash equilibrium, 2017, arXiv
    1706.08500, equation 6.
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  return frechet_of_moments(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))


def frechet_of_moments(mean_x: np.ndarray, cov_x: np.ndarray, mean_y: np.ndarray, cov_y: np.ndarray) -> float:
  """The same from means [d] and covariances [d, d]."""
  cov_x, cov_y = np.atleast_2d(cov_x), np.atleast_2d(cov_y)
  values, vectors = np.linalg.eigh(cov_x)
  root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
  cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_y @ root), 0, None)).sum()
  return float(max(np.square(mean_x - mean_y).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross, 0.0))


def bootstrap(statistic, x: np.ndarray, y: np.ndarray, repeats: int, seed: int) -> float:
  """Standard error of statistic(x, y) when the rows of both are drawn anew with replacement."""
  rng = np.random.default_rng(seed)
  found = [
    statistic(x[rng.integers(len(x), size=len(x))], y[rng.integers(len(y), size=len(y))]) for _ in range(repeats)
  ]
  return float(np.std(found, ddof=1))


def kernel_distance(x: np.ndarray, y: np.ndarray, blocks: int, seed: int) -> Estimate:
  """Unbiased squared maximum mean discrepancy with k(a, b) = (a.b / d + 1)^3, which may be below 0.

  The mean over disjoint random blocks of both clouds; blocks are independent, hence the standard error.

  Args:
    x: [n, d].
    y: [m, d].
    blocks: how many; each must hold two rows.
    seed: of the partition into blocks.

  References:
    M. Bińkowski et al., Demystifying MMD GANs, 2018, arXiv 1801.01401, section 4.
    A. Gretton et al., A kernel two-sample test, 2012, lemma 6.
  """
  rng = np.random.default_rng(seed)
  x, y = (np.asarray(a, np.float64)[rng.permutation(len(a))] for a in (x, y))
  parts = zip(np.array_split(x, blocks), np.array_split(y, blocks), strict=True)
  found = np.asarray([_discrepancy(a, b) for a, b in parts])
  return Estimate(float(found.mean()), float(found.std(ddof=1) / math.sqrt(blocks)))


class Coverage(NamedTuple):
  """Shares of samples and of real points that lie near one another, each in [0, 1] but density, which has mean 1 at equality."""

  precision: float
  recall: float
  density: float
  coverage: float


def coverage(real: np.ndarray, fake: np.ndarray, neighbours: int = 5) -> Coverage:
  """How samples cover real points, by balls around each point that reach its k-th nearest neighbour of the same cloud.

  precision: share of samples in some real ball; recall: share of real points in some sample's ball; density: real balls that hold
  a sample, averaged, over k; coverage: share of real balls with a sample in them.

  Args:
    real: [n, d].
    fake: [m, d].
    neighbours: k.

  References:
    T. Kynkäänniemi et al., Improved precision and recall metric for assessing generative models, 2019, arXiv 1904.06991.
    M. F. Naeem et al., Reliable fidelity and diversity metrics for generative models, 2020, arXiv 2002.09797, equations 2-4.
  """
  from scipy.spatial.distance import cdist

  reach = lambda a: np.sort(cdist(a, a), 1)[:, min(neighbours, len(a) - 1)]  # the nearest of all is the point itself
  between = cdist(real, fake)
  in_real = between <= reach(real)[:, None]
  in_fake = between <= reach(fake)
  density = in_real.sum(0).mean() / neighbours
  return Coverage(*map(float, (in_real.any(0).mean(), in_fake.any(1).mean(), density, in_real.any(1).mean())))


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
  def kernel(a, b):
    inner = a @ b.T / a.shape[1] + 1
    return inner * inner * inner  # ten times as fast as a power

  def within(a):
    k = kernel(a, a)
    return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

  return within(x) + within(y) - 2 * kernel(x, y).mean()


# ---------------------------------------------------------------------------------------------- reliability


class Reliability(NamedTuple):
  """Per bin of predicted probability: how many, the mean prediction, the share of positives (both 0 where empty)."""

  count: np.ndarray
  predicted: np.ndarray
  observed: np.ndarray

  def error(self) -> float:
    """Expected calibration error, sum_bins count / n * |predicted - observed|.

    References:
      C. Guo, G. Pleiss, Y. Sun, K. Weinberger, On calibration of modern neural networks, 2017, arXiv 1706.04599,
      equation 3.
    """
    return float(self.count @ np.abs(self.predicted - self.observed) / self.count.sum())


def reliability(
  positive: np.ndarray, negative: np.ndarray, bins: int = 15, weight: np.ndarray | None = None
) -> Reliability:
  """Reliability curve of binary logits in equal bins of probability.

  Args:
    positive: logits [n, ...] whose label is 1; the first axis is the image.
    negative: logits [n, ...] whose label is 0.
    bins: number of bins.
    weight: of the images, [n]; 1 by default (bootstrap draws give their counts).
  """
  logits = np.stack([np.asarray(positive, np.float64), np.asarray(negative, np.float64)], 1)  # [n, 2, ...]
  label = np.zeros_like(logits)
  label[:, 0] = 1
  probability = 0.5 * (1 + np.tanh(logits / 2))
  weights = np.ones(len(logits)) if weight is None else weight
  weights = np.broadcast_to(weights.reshape(-1, *[1] * (logits.ndim - 1)), logits.shape).ravel()
  place = np.minimum((probability * bins).astype(int), bins - 1).ravel()
  count, predicted, observed = (
    np.bincount(place, weights * value.ravel(), bins) for value in (np.ones_like(label), probability, label)
  )
  safe = np.where(count > 0, count, 1)
  return Reliability(count, predicted / safe, observed / safe)
