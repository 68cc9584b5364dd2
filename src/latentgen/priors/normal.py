"""N(0, I) with a learned mean and deviation of every coordinate, or without: what other densities are measured against."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from latentgen.distributions import Normal
from latentgen.errors import UserError
from latentgen.priors import coordinates
from latentgen.types import Array, Key


@dataclasses.dataclass(frozen=True)
class Moments:
  """N(loc, diag(scale^2)), fitted in closed form; with `standard` N(0, I) itself, whatever the codes."""

  standard: bool = False
  exact = True
  samplers = ('normal',)

  def init(self, key: Key, d: int) -> dict[str, Array]:
    del key
    return {'loc': jnp.zeros(d), 'scale': jnp.ones(d)}

  def fit(self, key: Key, u: Any) -> dict[str, Array]:
    if self.standard:
      return self.init(key, u.shape[1])
    scale = np.maximum(u.std(0), 1e-6 * max(u.std(), 1e-6))  # a coordinate that never varies stays finite
    return {'loc': jnp.asarray(u.mean(0), jnp.float32), 'scale': jnp.asarray(scale, jnp.float32)}

  def sample(self, params: Any, key: Key, n: int, d: int, sampler: str, temperature: float) -> Array:
    del sampler
    return params['loc'] + params['scale'] * coordinates.standard(key, n, d, temperature)

  def log_prob(self, params: Any, u: Array) -> Array:
    return Normal(params['loc'], params['scale']).log_prob(u).sum(-1)

  def evaluations(self, params: Any, d: int, sampler: str) -> float:
    del sampler
    return 0.0


def build(*, standard: bool = False) -> Moments:
  """The density as a config names it."""
  if not isinstance(standard, bool):
    raise UserError(f'method.prior.standard is {standard!r}, need True or False')
  return Moments(standard)
