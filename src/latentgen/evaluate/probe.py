"""What a few labels are worth: logistic regression on the encoder's codes beside the same on raw pixels.

References:
  G. Alain, Y. Bengio, Understanding intermediate layers using linear classifier probes, 2016, arXiv 1610.01644.
"""

from collections.abc import Sequence
import math
import warnings

import numpy as np

from latentgen.errors import UserError
from latentgen.evaluate import features
from latentgen.evaluate.base import Findings, Result, Subject, average, check_count, codes, labelled, named_key, seed_of

NEEDS = ('trace',)
LABELS = True


def run(
  subject: Subject,
  *,
  split: str = 'test',
  limit: int | None = None,
  train_limit: int | None = 10000,
  counts: Sequence[int] = (1, 5, 10),
  draws: int = 20,
  inverse_penalty: float = 1.0,
) -> Findings:
  """Fits the probes on labelled training images and scores them on a split.

  Codes are posterior means of all groups (`base.codes`), pixels are without the noise of preprocessing. Both are standardised
  with the training split's moments, for which no labels are needed. The draws of labels are the same for both.

  Args:
    subject: what is evaluated.
    split: images that are classified; those of classes without any labelled training image are left out.
    limit: only the first so many of them.
    train_limit: only so many training images.
    counts: labels a class; those that some class has too few labels for are left out.
    draws: random subsets of labels for each count.
    inverse_penalty: C of the logistic regression, on standardised features.

  Returns:
    probe/<codes or pixels>/labels<n>/accuracy  [fraction]: mean over the draws; the standard error is that over draws, of the
      choice of labels alone;
    probe/<codes or pixels>/all/accuracy: with all labels that there are; standard error over images;
    probe/labels: how many these are.

  Raises:
    UserError: no labels, fewer than two classes, or a bad value, naming the key.
  """
  where = 'config.evaluate.probe'
  check_count(f'{where}.draws', draws, least=2)
  counts = tuple(counts) if isinstance(counts, (tuple, list)) else (counts,)
  for count in counts:
    check_count(f'{where}.counts', count)
  if isinstance(inverse_penalty, bool) or not isinstance(inverse_penalty, (int, float)) or not inverse_penalty > 0:
    raise UserError(f'{where}.inverse_penalty is {inverse_penalty!r}, need a positive number')
  rows, y = labelled(subject, 'probe', 'train', train_limit)
  kinds = np.unique(y)
  if len(kinds) < 2:
    raise UserError("config.evaluate.tasks: 'probe' needs labels of at least two classes in split 'train'; leave it out")
  here, target = labelled(subject, 'probe', split, limit)
  here, target = here[np.isin(target, kinds)], target[np.isin(target, kinds)]
  if not len(here):
    raise UserError(f'{where}.split: no image of {split!r} is of a class that training has labels of')
  members = [np.flatnonzero(y == kind) for kind in kinds]
  rng = np.random.default_rng(seed_of(named_key(subject.key, 'draws')))
  shuffled = [[rng.permutation(m) for m in members] for _ in range(draws)]

  results = {'probe/labels': Result(len(rows), 'labels', len(rows))}
  read = {'codes': codes, 'pixels': lambda *which: _flat(features.grey_images(*which)[0])}
  for name, function in read.items():
    x, new = function(subject, 'probe', 'train', train_limit), function(subject, 'probe', split, limit)
    loc, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    scale = np.where(scale > 0, scale, 1.0)
    x, new = (x[rows] - loc) / scale, (new[here] - loc) / scale
    for count in counts:
      if count > min(map(len, members)):
        continue
      found = []
      for draw in shuffled:
        picked = np.concatenate([order[:count] for order in draw])
        found.append((fit(x[picked], y[picked], inverse_penalty).predict(new) == target).mean())
      error = float(np.std(found, ddof=1) / math.sqrt(draws))
      results[f'probe/{name}/labels{count}/accuracy'] = Result(float(np.mean(found)), 'fraction', len(here), error)
    right = fit(x, y, inverse_penalty).predict(new) == target
    results[f'probe/{name}/all/accuracy'] = average(right, 'fraction')
  return Findings(results)


def fit(x: np.ndarray, y: np.ndarray, inverse_penalty: float):
  """Multinomial logistic regression of y [n] on x [n, d]."""
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.linear_model import LogisticRegression

  with warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)  # 500 iterations are a choice
    return LogisticRegression(C=inverse_penalty, max_iter=500).fit(x, y)


def _flat(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1)
