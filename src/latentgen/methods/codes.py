"""What methods with a learned prior on noise coordinates share: vectors from traces, and traces from vectors."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from latentgen.errors import UserError
from latentgen.methods.base import LatentMethod
from latentgen.priors import coordinates
from latentgen.priors.coordinates import Coordinates
from latentgen.types import Array, Choose, Key, Params, Trace, Variables, ancestral

CODES = ('sample', 'mean')


@dataclasses.dataclass(frozen=True)
class CodesMethod(LatentMethod):
  """A method whose prior is a density on noise coordinates; see priors.coordinates.

  Args:
    net: any network with location-scale latents.
    codes: what stands for an image, a 'sample' of its posterior or the posterior's 'mean' (of a network with one group), as for
      an autoencoder without noise. With the latter there is no density of the data.
    levels: how many of the top levels the prior covers, the others keep the network's own; 0 is all.
  """

  codes: Literal['sample', 'mean'] = 'sample'
  levels: int = 0

  # -------------------------------------------------------------------------------------------- to be overridden

  def log_prior(self, variables: Variables, u: Array, key: Key) -> Array:
    """log p(u) in nats, [..., d] -> [...]."""
    del variables, key
    return coordinates.log_normal(u)

  def draw(self, variables: Variables, key: Key, n: int, d: int, sampler: str, temperature: float) -> Array:
    """Vectors of the prior, [n, d]."""
    del variables, sampler
    return coordinates.standard(key, n, d, temperature)

  # -------------------------------------------------------------------------------------------- traces

  def coordinates(self, params: Params, stats: Any) -> Coordinates:
    """How the network's noise coordinates are laid out.

    Raises:
      UserError: the network's latents are not location-scale, or not one group where `codes` is 'mean'.
    """
    top_down = lambda params, stats: self._apply(params, stats, jax.random.key(0), 'simulate', 1)[0]
    trace = jax.eval_shape(top_down, params, stats)
    found = coordinates.of(trace, self.levels)
    if self.codes == 'mean' and (len(trace.eps) > 1 or trace.eps[0].shape[0] > 1):
      groups = sum(e.shape[0] for e in trace.eps)
      raise UserError(f"method.codes is 'mean', which needs a network with one group of latents; this one has {groups}")
    return found

  def encode(self, params: Params, stats: Any, x: Array, key: Key, k: int = 1, train: bool = False) -> tuple[Trace, Any]:
    """`infer`, or with `codes` = 'mean' k copies of the posterior mean, decoded; without `log_q` then, and `log_px` given."""
    if self.codes == 'sample':
      return self.infer(params, stats, x, key, k, train)
    inferred, changed = self.infer(params, stats, x, key, 1, train)
    if inferred.posterior is None:
      raise UserError("method.codes is 'mean', which needs a Gaussian posterior")
    means = [(q.loc - p.loc) / p.scale for q, p in zip(inferred.posterior, inferred.prior, strict=True)]
    u = self.coordinates(params, stats).pack(means)
    trace, more = self.decode(params, stats, jnp.tile(u[0], (k, 1)), key, train)
    return folded(trace, x, k).replace(posterior=inferred.posterior), {**changed, **more}

  def decode(self, params: Params, stats: Any, u: Array, key: Key | None = None, train: bool = False) -> tuple[Trace, Any]:
    """(Trace with k = 1 of given vectors u [n, d], changed statistics); levels that are not covered are drawn."""
    choose = self.coordinates(params, stats).choose(u, ancestral)
    key = jax.random.key(0) if key is None else key
    return self._apply(params, stats, key, 'simulate', len(u), choose=choose, train=train)

  def vectors(self, params: Params, stats: Any, x: Array, key: Key) -> Array:
    """The noise coordinates of images x [b, h, w, c], [b, d]; no gradient reaches the network."""
    trace, _ = self.encode(params, stats, x, key)
    return jax.lax.stop_gradient(self.coordinates(params, stats).pack(trace.eps)[0])

  def trace(self, variables: Variables, x: Array, key: Key, k: int = 1) -> Trace:
    """Posterior samples; what the prior adds to log p(z) stands with the first group of the first level."""
    infer, noise = jax.random.split(key)
    trace, _ = self.encode(variables['params'], variables['stats'], x, infer, k)
    if not self.density:
      return trace.replace(kl=None)
    u = self.coordinates(variables['params'], variables['stats']).pack(trace.eps)
    tilt = self.log_prior(variables, u, noise) - coordinates.log_normal(u)
    first, *rest = trace.log_p
    return trace.replace(log_p=(first.at[0].add(tilt), *rest), kl=None)

  def simulate(
    self,
    variables: Variables,
    key: Key,
    n: int,
    sampler: str | None = None,
    temperature: float = 1.0,
    choose: Choose | None = None,
    label: Array | None = None,
  ) -> Trace:
    if choose is None:
      params, stats = variables['params'], variables['stats']
      own, key = jax.random.split(key)
      layout = self.coordinates(params, stats)
      u = self.draw(variables, own, n, layout.size, self.sampler(sampler), temperature)
      choose = layout.choose(u, super().chooser(variables, 'base', temperature))
    return super().simulate(variables, key, n, sampler, temperature, choose, label)


def folded(trace: Trace, x: Array, k: int) -> Trace:
  """A trace of k b decoded vectors, sample by sample, as one of k samples of each image x [b, h, w, c]; no `log_q`."""
  fold = lambda tree, lead: jax.tree.map(lambda a: a.reshape(*a.shape[:lead], k, len(x), *a.shape[lead + 2 :]), tree)
  px = fold(trace.px, 0)
  levels = {name: fold(getattr(trace, name), 1) for name in ('eps', 'z', 'log_p', 'context', 'prior')}
  return trace.replace(px=px, log_px=px.log_prob(x), label=fold(trace.label, 0), **levels)


def check_codes(codes: str, levels: int) -> None:
  """Refuses what CodesMethod cannot be built with."""
  if codes not in CODES:
    raise UserError(f"method.codes is {codes!r}, need 'sample' or 'mean'")
  if isinstance(levels, bool) or not isinstance(levels, int) or levels < 0:
    raise UserError(f'method.levels is {levels!r}, need a whole number, 0 for all')
