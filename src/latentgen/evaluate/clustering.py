"""How well groups that were found without labels agree with the classes: the method's own, and of any model's codes.

Accuracy is that of the best one-to-one matching of groups and classes on the evaluated split; groups that are left over count as
wrong. Normalised mutual information (over the arithmetic mean of the entropies) and the adjusted Rand index need no matching.

References:
  H. W. Kuhn, The Hungarian Method for the Assignment Problem, 1955. L. Hubert and P. Arabie, Comparing Partitions, 1985.
"""

import math

import numpy as np

from latentgen.evaluate import base
from latentgen.evaluate.base import Findings, Result, Subject, check_choice, check_count, codes, per_example, seed_of
from latentgen.evaluate.features import grey_images

BASELINES = ('gmm', 'kmeans', 'pixels')
FLOOR = 1e-4  # added to the variances of the fitted Gaussians
NEEDS = ('trace',)
LABELS = True


def run(
  subject: Subject,
  *,
  split: str = 'test',
  limit: int | None = None,
  components: int | None = None,
  train_limit: int | None = 10_000,
  restarts: int = 10,
  baselines: tuple[str, ...] = BASELINES,
) -> Findings:
  """Groups a split and compares with its labels.

  Args:
    subject: what is evaluated.
    split: which images; nothing is fitted to them but the matching.
    limit: only the first so many of them.
    components: groups of the baselines; by default the number of classes.
    train_limit: training images that baselines are fitted to.
    restarts: of every fit, of which the best by its own criterion is kept.
    baselines: of BASELINES: a Gaussian mixture with full covariances and k-means, both on posterior means, and k-means on
      pixels.

  Returns:
    Findings with clustering/<what>/accuracy, /nmi and /ari for every baseline, and for 'model' where the method has `cluster`.

  Raises:
    UserError: for a bad value, naming the key, or data without labels.
  """
  where = 'config.evaluate.clustering'
  for name, value in (('components', components), ('train_limit', train_limit), ('limit', limit)):
    if value is not None:
      check_count(f'{where}.{name}', value)
  check_count(f'{where}.restarts', restarts)
  for name in baselines:
    check_choice(f'{where}.baselines', name, BASELINES)
  label = base.labels(subject, 'clustering', split, limit)
  count = components or int(subject.data[split].num_classes)
  seed, groups = seed_of(subject.key), {}
  if (cluster := getattr(subject.method, 'cluster', None)) is not None:
    found = per_example(subject, 'clustering', lambda v, x, key: {'log_p': cluster(v, x, key)}, split, limit)
    groups['model'] = found['log_p'].argmax(-1)
  if {'gmm', 'kmeans'} & set(baselines):
    train, test = (codes(subject, 'clustering', *part) for part in (('train', train_limit), (split, limit)))
    if 'gmm' in baselines:
      groups['gmm'] = gaussian_mixture(train, test, count, seed, restarts)
    if 'kmeans' in baselines:
      groups['kmeans'] = k_means(train, test, count, seed, restarts)
  if 'pixels' in baselines:
    train, test = (grey_images(subject, 'clustering', *part)[0] for part in (('train', train_limit), (split, limit)))
    groups['pixels'] = k_means(train.reshape(len(train), -1), test.reshape(len(test), -1), count, seed, restarts)
  results = {}
  for name, group in groups.items():
    for score, value in scores(label, group).items():
      error = math.sqrt(value * (1 - value) / len(label)) if score == 'accuracy' else None
      results[f'clustering/{name}/{score}'] = Result(value, 'accuracy' if score == 'accuracy' else 'index', len(label), error)
  return Findings(results)


def scores(label: np.ndarray, group: np.ndarray) -> dict[str, float]:
  """Agreement of two partitions of the same n examples.

  Args:
    label: classes, int [n].
    group: groups, int [n].

  Returns:
    {'accuracy': after the best one-to-one matching, 'nmi', 'ari'}.
  """
  from scipy.optimize import linear_sum_assignment
  from sklearn import metrics

  table = metrics.cluster.contingency_matrix(label, group)
  matched = table[linear_sum_assignment(table, maximize=True)].sum()
  return {
    'accuracy': float(matched / len(label)),
    'nmi': float(metrics.normalized_mutual_info_score(label, group)),
    'ari': float(metrics.adjusted_rand_score(label, group)),
  }


def gaussian_mixture(train: np.ndarray, test: np.ndarray, components: int, seed: int, restarts: int) -> np.ndarray:
  """Most probable component of test points [n, d] under a mixture with full covariances fitted to train points; [n]."""
  from sklearn.mixture import GaussianMixture

  model = GaussianMixture(components, n_init=restarts, max_iter=500, reg_covar=FLOOR, random_state=seed)
  return model.fit(train.astype(np.float64)).predict(test.astype(np.float64))


def k_means(train: np.ndarray, test: np.ndarray, components: int, seed: int, restarts: int) -> np.ndarray:
  """Nearest of the means of train points to each of the test points [n, d]; [n]."""
  from sklearn.cluster import KMeans

  model = KMeans(components, n_init=restarts, random_state=seed)
  return model.fit(train.astype(np.float64)).predict(test.astype(np.float64))
