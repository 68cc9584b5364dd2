"""The model's own classifier against one that was trained on the same labels alone.

References:
  D. Kingma, D. Rezende, S. Mohamed, M. Welling, Semi-supervised learning with deep generative models, 2014, arXiv 1406.5298.
"""

import warnings

import numpy as np

from latentgen.errors import UserError
from latentgen.evaluate import features
from latentgen.evaluate.base import (
  Findings,
  Result,
  Subject,
  average,
  check_count,
  hook,
  labelled,
  named_key,
  per_example,
  seed_of,
)

NEEDS = ('classify',)
LABELS = True


def run(
  subject: Subject, *, split: str = 'test', limit: int | None = None, train_limit: int | None = None, folds: int = 5
) -> Findings:
  """Classifies a split.

  The supervised classifier is the best of logistic regressions and networks of one hidden layer on pixels, by cross-validation
  on the labelled training images, and then trained on all of these; it sees no unlabelled one.

  Args:
    subject: what is evaluated; its method has `classify`.
    split: images that are classified; those without label, or of classes that training has no label of, are left out.
    limit: only the first so many of them.
    train_limit: only the first so many training images for the supervised classifier.
    folds: of the cross-validation, or the labels of the rarest class where these are fewer; with one label of a class there is
      none, and it is a logistic regression.

  Returns:
    classification/<model or supervised>/error  [fraction] and /nll  [nats]: mean of -log p(y | x), for the supervised one at
      most 87 nats an image, where float32 ends;
    classification/labels: how many labels the supervised classifier has.

  Raises:
    UserError: a method without classifier, no labels, or a bad value, naming the key.
  """
  classify = hook(subject, 'classification', 'classify')
  check_count('config.evaluate.classification.folds', folds, least=2)
  rows, y = labelled(subject, 'classification', 'train', train_limit)
  if len(np.unique(y)) < 2:
    raise UserError("config.evaluate.tasks: 'classification' needs labels of at least two classes in training; leave it out")
  here, target = labelled(subject, 'classification', split, limit)
  known = np.isin(target, y)
  here, target = here[known], target[known]
  if not len(here):
    raise UserError(f'config.evaluate.classification.split: no image of {split!r} is of a class that training has labels of')
  log_p = per_example(subject, 'classification', lambda v, x, key: {'log_p': classify(v, x, key)}, split, limit)['log_p'][here]
  x, new = (
    features.grey_images(subject, 'classification', name, n)[0] for name, n in (('train', train_limit), (split, limit))
  )
  model = supervised(_flat(x[rows]), y, folds, seed_of(named_key(subject.key, 'supervised')))
  with np.errstate(divide='ignore'):
    mine = np.log(model.predict_proba(_flat(new[here])))
  baseline = np.full((len(here), max(log_p.shape[1], y.max() + 1)), -np.inf)
  baseline[:, model.classes_] = mine
  results = {'classification/labels': Result(len(rows), 'labels', len(rows))}
  for name, found in (('model', log_p), ('supervised', np.maximum(baseline, np.log(np.finfo(np.float32).tiny)))):
    results[f'classification/{name}/error'] = average(found.argmax(-1) != target, 'fraction')
    results[f'classification/{name}/nll'] = average(-found[np.arange(len(target)), target], 'nats')
  return Findings(results)


def supervised(x: np.ndarray, y: np.ndarray, folds: int, seed: int):
  """The classifier with the least cross-validated error, fitted to all of x [n, d] and y [n]."""
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.linear_model import LogisticRegression
  from sklearn.model_selection import StratifiedKFold, cross_val_score
  from sklearn.neural_network import MLPClassifier

  candidates = [LogisticRegression(C=c, max_iter=500) for c in (1.0, 0.1, 10.0)]
  candidates += [
    MLPClassifier((128,), alpha=alpha, learning_rate_init=3e-3, max_iter=200, random_state=seed) for alpha in (1e-3, 1.0)
  ]
  folds = min(folds, int(np.unique(y, return_counts=True)[1].min()))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', ConvergenceWarning)  # bounded iterations are a choice
    if folds > 1:
      parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
      scores = [cross_val_score(model, x, y, cv=parts).mean() for model in candidates]
      candidates.insert(0, candidates[int(np.argmax(scores))])
    return candidates[0].fit(x, y)


def _flat(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1).astype(np.float64)
