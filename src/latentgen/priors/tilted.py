"""Priors that tilt a base: p(z) = prod_l p(z_l | z_<l) r_l(z_l, context_l) / Z_l(z_<l), with log r_l any conditional critic."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from latentgen import samplers
from latentgen.priors.critics import Critic, features
from latentgen.types import Array, Choose, Key, Params, Trace


@dataclasses.dataclass(frozen=True)
class Tilted:
  """A tilt of any location-scale hierarchy, one critic a group, stacked over the groups of a level.

  Args:
    critic: module with `init(key, z, context)` and `apply(params, z, context)` -> logit.
    coordinates: what the critic sees, 'z', 'eps' (noise coordinates, the prior is N(0, I) there) or 'both'; with the context
      given, all three carry the same information.

  References:
    Aneja, Schwing, Kautz and Vahdat, "A Contrastive Learning Approach for Training Variational Autoencoder Priors", 2021,
    arXiv 2010.02917, equation 3 and section 3.2.
  """

  critic: Critic
  coordinates: Literal['z', 'eps', 'both'] = 'both'

  def init(self, key: Key, trace: Trace) -> dict[str, Any]:
    """{'level0': critic parameters stacked over its groups, ...} for a trace's shapes."""
    params = {}
    for level, (z, context, prior) in enumerate(zip(trace.z, trace.context, trace.prior, strict=True)):
      seen = features(z, prior, self.coordinates)[0, 0]
      keys = jax.random.split(jax.random.fold_in(key, level), z.shape[0])
      init = jax.vmap(lambda k: self.critic.init(k, seen, context[0, 0])['params'])
      params[f'level{level}'] = {'stack': init(keys)}
    return params

  def _apply(self, params: Any, z: Array, prior: Any, context: Array) -> Array:
    return self.critic.apply({'params': params}, features(z, prior, self.coordinates), context)

  def log_ratio(self, params: Params, z: tuple[Array, ...], prior: tuple[Any, ...], context: tuple[Array, ...]):
    """log r of every group: per level [g, k, b]."""
    # A map over groups, not vmap, which would make grouped convolutions of the critics': slow on a CPU.
    return tuple(
      jax.lax.map(lambda args: self._apply(*args), (params[f'level{i}']['stack'], *args))
      for i, args in enumerate(zip(z, prior, context, strict=True))
    )

  def normalisers(self, params: Params, trace: Trace, key: Key, proposals: int, chunk: int):
    """Estimates of log Z_l(z_<l) at a trace's contexts, from fresh base samples.

    log Z = log mean_m r(z_m, context), z_m ~ p(z_l | z_<l); E[estimate] <= log Z (Jensen), by Var[r] / (2 M Z^2) to first
    order.

    Args:
      params: critics.
      trace: where; per level [g, k, b, ...].
      key: PRNG key.
      proposals: M.
      chunk: proposals in memory at a time.

    Returns:
      (log_z, ess): per level [g, k, b]; nats, and the effective number among the M proposals.
    """
    log_z, ess = [], []
    for i, (prior, context) in enumerate(zip(trace.prior, trace.context, strict=True)):

      def one(args):
        group, prior, context, key = args
        lead = context.shape[:2]
        flat = lambda x: x.reshape(lead[0] * lead[1], *x.shape[2:])  # not -1: a context may be empty
        prior, context = jax.tree.map(flat, (prior, context))
        _, info = self._resample(group, prior, context, key, proposals, chunk)
        return info.log_z.reshape(lead), info.ess.reshape(lead)

      keys = jax.random.split(jax.random.fold_in(key, i), prior.loc.shape[0])
      found = jax.lax.map(one, (params[f'level{i}']['stack'], prior, context, keys))
      log_z.append(found[0])
      ess.append(found[1])
    return tuple(log_z), tuple(ess)

  def _resample(self, group: Any, prior: Any, context: Array, key: Key, proposals: int, chunk: int, temperature=1.0):
    """SIR at n contexts with one group's critic: (z [n, ...], info)."""

    def propose(key, c):
      eps = jax.random.normal(key, (c, *prior.loc.shape), prior.loc.dtype)
      return prior.loc + temperature * prior.scale * eps

    def log_ratio(z):
      return self._apply(group, z, prior, context)

    return samplers.sir(key, propose, log_ratio, num=proposals, chunk=min(chunk, proposals))

  def sir(self, params: Params, proposals: int, chunk: int, temperature: float = 1.0) -> Choose:
    """Sampling-importance-resampling, group by group: one of M fresh proposals by weight, memory O(chunk) whatever M."""

    def choose(level, group, prior, context, key):
      critic = _group(params, level, group)
      return self._resample(critic, prior, context, key, proposals, chunk, temperature)[0]

    return choose

  def langevin(self, params: Params, steps: int, step_size: float, temperature: float = 1.0) -> Choose:
    """Unadjusted Langevin dynamics in noise coordinates, group by group, from a draw of the base.

    U(eps) = |eps|^2 / 2 - log r(loc + temperature scale eps, context); no Jacobian, as the scale is fixed given z_<l.
    """

    def choose(level, group, prior, context, key):
      critic = _group(params, level, group)
      scale = temperature * prior.scale

      def log_density(eps):
        ratio = self._apply(critic, prior.loc + scale * eps, prior, context)
        return ratio - 0.5 * jnp.square(eps).reshape(eps.shape[0], -1).sum(-1)

      start, run = jax.random.split(key)
      chain = samplers.langevin(log_density)
      state = chain.init(jax.random.normal(start, prior.loc.shape, prior.loc.dtype))
      return prior.loc + scale * chain.run(run, state, step_size, steps)[0].position

    return choose


def _group(params: Params, level: int, group: Any) -> Any:
  return jax.tree.map(lambda p: p[group], params[f'level{level}']['stack'])
