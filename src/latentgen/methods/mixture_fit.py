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
    return {'params': {'prior': prior}}


def build(
  net: LatentNet,
  steps: int,
  *,
  components: int = 10,
  learned_weights: bool = True,
  max_scale: float = 2.0,
  restarts: int = 10,
  covariance: str = 'diag',
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
  return FittedMixture(net, mixture, steps, restarts=restarts, covariance=covariance)
