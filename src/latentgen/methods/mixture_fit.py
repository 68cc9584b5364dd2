"""A mixture prior fitted to the codes of a trained encoder by expectation maximisation: a stage in closed form.

Ghosh, Sajjadi, Vergari, Black and Schölkopf, "From Variational to Deterministic Autoencoders", 2020, arXiv 1903.12436, section
4 (ex-post density estimation). The fit is a prior by itself, or where the training of another begins.
"""

from collections.abc import Iterable
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.errors import UserError
from latentgen.methods.mixture import MixturePrior
from latentgen.priors import mixture as mixtures
from latentgen.types import Batch, Key, LatentNet, Variables

FLOOR = 1e-4  # added to the variances


@dataclasses.dataclass(frozen=True)
class FittedMixture(MixturePrior):
  """Fits the group `prior`, with learned weights or without; encoder and decoder come from an earlier stage.

  With `classes` the components, fitted without labels, are handed out to these, equally many to each, so that the sum of
  their squared distances from the class's labelled codes is least.

  Args:
    restarts: fits, from k-means each, of which the likeliest is kept.
    covariance: of the mixture that is fitted: 'diag', or 'full', of which the prior takes the variances alone. The
      latter is no fit of this prior, but a better start for training it: clusters of codes need not be axis-aligned before.
  """

  restarts: int = 10
  covariance: Literal['diag', 'full'] = 'diag'

  def fit(self, variables: Variables, batches: Iterable[Batch], key: Key) -> Variables:
    """The parameters of the mixture that is fitted to posterior means."""
    from sklearn.mixture import GaussianMixture

    encode = jax.jit(lambda x: self._posterior(variables['params'], variables['stats'], x).loc)
    batches = list(batches)
    codes = np.concatenate([np.asarray(encode(batch['image']), np.float64) for batch in batches])
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    found = GaussianMixture(
      self.prior.components, covariance_type=self.covariance, n_init=self.restarts, max_iter=500, reg_covar=FLOOR,
      random_state=seed,
    ).fit(codes)  # fmt: skip
    variance = found.covariances_ if self.covariance == 'diag' else np.diagonal(found.covariances_, axis1=1, axis2=2)
    log_scale = jnp.asarray(0.5 * np.log(variance), jnp.float32)
    prior = {
      'loc': jnp.asarray(found.means_, jnp.float32),
      'log_scale': mixtures.unbound(log_scale, self.prior.max_scale),
    }
    if self.prior.learned_weights:
      prior['logits'] = jnp.asarray(np.log(found.weights_), jnp.float32)
    if self.classes:
      labels = np.concatenate([np.asarray(batch['label']) for batch in batches])
      order = by_distance(found.means_, codes, labels, self.classes)
      prior = {name: value[order] for name, value in prior.items()}
    return {'params': {'prior': prior}}


def by_distance(means: np.ndarray, codes: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
  """An order of components in which each run of c / classes belongs to one class.

  Args:
    means: of the components, [c, d].
    codes: [n, d].
    labels: int [n], -1 where unknown.
    classes: their number, which divides c.

  Returns:
    int [c]; of all such orders the one with the least sum of squared distances, each of a mean from the nearest code of its
    class.

  Raises:
    UserError: a class without any label.
  """
  from scipy.optimize import linear_sum_assignment
  from scipy.spatial.distance import cdist

  missing = sorted(set(range(classes)) - set(labels.tolist()))
  if missing:
    raise UserError(f'method.classes is {classes}, and no training image has label {missing[0]}')
  cost = np.stack([cdist(means, codes[labels == y], 'sqeuclidean').min(1) for y in range(classes)], 1)
  _, slots = linear_sum_assignment(np.repeat(cost, len(means) // classes, 1))
  return np.argsort(slots)


def build(
  net: LatentNet,
  steps: int,
  *,
  components: int = 10,
  learned_weights: bool = True,
  max_scale: float = 2.0,
  restarts: int = 10,
  covariance: str = 'diag',
  classes: int = 0,
) -> FittedMixture:
  """The method as a config names it; see priors.mixture.Mixture and FittedMixture.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  mixture = mixtures.checked(components=components, learned_weights=learned_weights, max_scale=max_scale)
  if restarts < 1:
    raise UserError(f'method.restarts is {restarts}, need at least 1')
  if covariance not in ('diag', 'full'):
    raise UserError(f"method.covariance is {covariance!r}, need 'diag' or 'full'")
  if classes < 0 or (classes and components % classes):
    raise UserError(f'method.components is {components}, need a multiple of method.classes = {classes}')
  return FittedMixture(net, mixture, steps, restarts=restarts, covariance=covariance, classes=classes)
