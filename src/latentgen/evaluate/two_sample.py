"""Latent two-sample test: can a fresh classifier tell posterior latents of held-out images from a sampler's?

An area under the ROC curve of 1/2 says that this classifier finds no difference; a learned prior that fits better
than the base comes closer to 1/2. Predictions are cross-validated by image, so that nothing is scored by what has
seen it.

Compared on Gaussians and mixtures with known ratio (600 to 5,000 examples, 8 and 32 dimensions) were logistic
regression on quadratic features, a small network, boosted trees, and means of their log-odds. The mean of the first two
is the default: within 0.03 of the best area in every case, where either alone, and the trees, fall behind by 0.05 to
0.13 in some (the trees see no correlations). The area is a lower bound: another classifier might see more.

References:
  D. Lopez-Paz and M. Oquab, Revisiting classifier two-sample tests, 2017, arXiv 1610.06545.
"""

from collections.abc import Mapping, Sequence
from typing import Any
import warnings

import jax
import numpy as np

from latentgen.evaluate import charts
from latentgen.evaluate.base import (
  Findings,
  Picture,
  Result,
  Subject,
  check_choice,
  check_count,
  check_images,
  chosen_samplers,
  named_key,
  per_example,
  seed_of,
  simulations,
)
from latentgen.evaluate.statistics import auroc, balanced_accuracy, pooled

CLASSIFIERS = ('both', 'quadratic', 'network')
COORDINATES = ('z', 'eps')
Latents = list[np.ndarray]  # per level
NEEDS = ('trace',)


def check(
  data: Mapping[str, Any], *, split: str | Sequence[str] = 'test', limit: int | None = 5000, folds: int = 5, **_
) -> None:
  """Refuses fewer images than two a fold."""
  check_images(data, 'two_sample', split, limit, 2 * folds)


def run(
  subject: Subject,
  *,
  split: str | Sequence[str] = 'test',
  limit: int | None = 5000,
  draws: int = 1,
  samplers: Sequence[str] | None = None,
  coordinates: str = 'z',
  classifier: str = 'both',
  folds: int = 5,
  components: int = 64,
) -> Findings:
  """Tests every sampler.

  Args:
    subject: what is evaluated.
    split: which images' posteriors; a name or several.
    limit: only the first so many images of each split.
    draws: posterior samples an image; those of one image stay in one fold and count as one cluster.
    samplers: names; all the method has by default.
    coordinates: 'z', or 'eps' for noise coordinates.
    classifier: 'quadratic' (logistic regression), 'network', or 'both' (their mean log-odds).
    folds: of the cross-validation.
    components: principal components, fitted on the training folds, that stand for latents of more dimensions.

  Returns:
    two_sample/<sampler>/auroc and /accuracy on all latents, two_sample/<sampler>/level<i>/auroc on one level where
    there are several; n counts images. Picture: ROC curves.

  Raises:
    UserError: for a bad value, naming the key.
  """
  where = 'config.evaluate.two_sample'
  check_choice(f'{where}.coordinates', coordinates, COORDINATES)
  check_choice(f'{where}.classifier', classifier, CLASSIFIERS)
  check_count(f'{where}.draws', draws)
  check_count(f'{where}.folds', folds, least=2)
  check_count(f'{where}.components', components)
  names = chosen_samplers(subject, 'two_sample', samplers)

  def posterior(variables, x, key):
    return dict(enumerate(_rows(getattr(subject.method.trace(variables, x, key, draws), coordinates))))

  splits = (split,) if isinstance(split, str) else tuple(split)
  found = [per_example(subject, 'two_sample', posterior, name, limit) for name in splits]
  real = [np.concatenate(level) for level in zip(*(f.values() for f in found), strict=True)]  # [n, draws, d] a level
  n = len(real[0])
  check_count(f'{where}.limit (images found)', n, least=2 * folds)

  findings, scores = Findings(), {}
  for name in names:
    key = named_key(subject.key, f'sampler/{name}')
    drawn = simulations(
      subject, name, n * draws, lambda trace: _rows(getattr(trace, coordinates)), jax.random.fold_in(key, 0)
    )
    fake = [level[:, 0] for level in drawn]
    seed = seed_of(jax.random.fold_in(key, 1))
    whole = [np.concatenate(levels, -1) for levels in (real, fake)]
    tested = {f'two_sample/{name}': whole}
    if len(real) > 1:
      tested |= {f'two_sample/{name}/level{i}': [real[i], fake[i]] for i in range(len(real))}
    for prefix, (a, b) in tested.items():
      folded = cross_validated(a, b, classifier, folds, components, seed)
      weights = [len(p) for p, _ in folded]
      area = pooled([auroc(*f) for f in folded], weights)
      findings.results[f'{prefix}/auroc'] = Result(area.value, 'probability', n, area.stderr)
      if a is whole[0]:
        right = pooled([balanced_accuracy(*f) for f in folded], weights)
        findings.results[f'{prefix}/accuracy'] = Result(right.value, 'fraction', n, right.stderr)
        scores[f'{name} ({area.value:.3f})'] = folded
  findings.images['two_sample'] = Picture(
    _curves(scores),
    'Telling posterior from prior latents',
    f'ROC curves of a fresh classifier between posterior latents of {n} held-out images and as many of each sampler; '
    'the area is in brackets, the diagonal is chance: the nearer, the better the sampler.',
  )
  return findings


def _rows(levels) -> tuple[jax.Array, ...]:
  """Per level [g, k, b, ...] -> [b, k, all of a sample's dimensions]."""
  return tuple(z.transpose(2, 1, 0, *range(3, z.ndim)).reshape(z.shape[2], z.shape[1], -1) for z in levels)


def cross_validated(
  real: np.ndarray, fake: np.ndarray, classifier: str = 'both', folds: int = 5, components: int = 64, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Log-odds of every example from a classifier that was fitted without its fold.

  Folds are equal in size and balance of the classes, and scored apart: scores of different classifiers are not
  compared.

  Args:
    real: [n, draws, d], label 1; a row stays in one fold.
    fake: [m, d], label 0.
    classifier: one of CLASSIFIERS.
    folds: number of folds.
    components: see `run`.
    seed: of folds and classifiers.

  Returns:
    per fold (log-odds of real [n_f, draws], of fake [m_f]).
  """
  rng = np.random.default_rng(seed)
  fold_real, fold_fake = rng.permutation(len(real)) % folds, rng.permutation(len(fake)) % folds
  parts = []
  for fold in range(folds):
    a, b = real[fold_real != fold], fake[fold_fake != fold]
    a = a.reshape(-1, a.shape[-1])
    x, y = np.concatenate([a, b]), np.repeat([1, 0], [len(a), len(b)])
    held, also = real[fold_real == fold], fake[fold_fake == fold]
    score = fit(x, y, classifier, components, seed)
    parts.append((score(held.reshape(-1, held.shape[-1])).reshape(held.shape[:2]), score(also)))
  return parts


def fit(x: np.ndarray, y: np.ndarray, classifier: str, components: int, seed: int):
  """Fits a classifier to x [n, d] with labels y [n]; returns the function x -> log-odds [n]."""
  from sklearn.decomposition import PCA
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.linear_model import LogisticRegression
  from sklearn.neural_network import MLPClassifier
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import PolynomialFeatures, StandardScaler

  x = np.asarray(x, np.float64)
  steps = [StandardScaler()]
  if x.shape[1] > components:
    steps += [PCA(min(components, len(x) - 1), svd_solver='randomized', random_state=seed), StandardScaler()]
  prepare = make_pipeline(*steps).fit(x)
  models = {
    'quadratic': make_pipeline(
      PolynomialFeatures(2, include_bias=False), StandardScaler(), LogisticRegression(C=0.02, max_iter=300)
    ),
    'network': MLPClassifier(
      (128, 128), alpha=0.01, batch_size=min(128, len(x) // 2), early_stopping=True, n_iter_no_change=5, max_iter=60,
      random_state=seed,
    ),
  }  # fmt: skip
  chosen = list(models.values()) if classifier == 'both' else [models[classifier]]
  prior = np.log(y.mean() / (1 - y.mean()))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)  # early stopping and 300 iterations are a choice
    for model in chosen:
      model.fit(prepare.transform(x), y)

  def score(new):
    new = prepare.transform(np.asarray(new, np.float64))
    logs = [np.log(np.clip(model.predict_proba(new), 1e-12, 1)) for model in chosen]
    return np.mean([log[:, 1] - log[:, 0] for log in logs], 0) - prior

  return score


def _curves(scores: dict[str, list]) -> np.ndarray:
  with charts.style():
    figure, ax = charts.axes(4.2, 3.8)
    grid = np.linspace(0, 1, 101)
    for (label, folded), color in zip(scores.items(), charts.COLORS * len(scores)):
      # Per fold the true-positive rate at each false-positive rate, averaged over folds.
      rates = [np.mean(p.reshape(-1, 1) > np.quantile(q, 1 - grid)[None], 0) for p, q in folded]
      ax.plot(grid, np.mean(rates, 0), color=color, lw=1.6, label=label)
    ax.plot([0, 1], [0, 1], color=charts.INK, lw=0.8, ls=':')
    ax.set(xlabel='prior samples taken for posterior', ylabel='posterior samples recognised', aspect='equal')
    ax.legend(frameon=False, loc='lower right')
    return charts.pixels(figure)
