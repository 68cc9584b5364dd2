"""Mean and deviation of every coordinate of the training images' codes: a stage in closed form, for densities that follow."""

from collections.abc import Iterable
import dataclasses

import jax.numpy as jnp
import numpy as np

from latentgen.methods.codes import CodesMethod, check_codes
from latentgen.methods.density import all_codes
from latentgen.types import Batch, Key, LatentNet, Variables


@dataclasses.dataclass(frozen=True)
class Whitening(CodesMethod):
  """Fits the group `whitening`; its prior is N(loc, scale^2)."""

  density = False

  def init(self, key: Key, batch: Batch) -> Variables:
    variables = super().init(key, batch)
    d = self.coordinates(variables['params'], variables['stats']).size
    variables['params']['whitening'] = {'loc': jnp.zeros(d), 'scale': jnp.ones(d)}
    return variables

  def updates(self):
    return ()

  def fit(self, variables: Variables, batches: Iterable[Batch], key: Key) -> Variables:
    codes = np.asarray(all_codes(self, variables, batches, key), np.float64)
    scale = np.maximum(codes.std(0), 1e-6 * max(codes.std(), 1e-6))  # a coordinate that never varies stays finite
    found = {'loc': jnp.asarray(codes.mean(0), jnp.float32), 'scale': jnp.asarray(scale, jnp.float32)}
    return {'params': {'whitening': found}}

  def draw(self, variables: Variables, key: Key, n: int, d: int, sampler: str, temperature: float):
    own = variables['params']['whitening']
    return own['loc'] + own['scale'] * super().draw(variables, key, n, d, sampler, temperature)


def build(net: LatentNet, steps: int, *, codes: str = 'mean', levels: int = 0) -> Whitening:
  """The method as a config names it; see CodesMethod."""
  del steps
  check_codes(codes, levels)
  return Whitening(net, codes, levels)
