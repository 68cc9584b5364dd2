"""Importance-weighted bounds and the gradient estimators of their papers.

Burda et al., "Importance Weighted Autoencoders", 2015, arXiv 1509.00519. Rainforth et al., "Tighter Variational Bounds are
Not Necessarily Better", 2018, arXiv 1802.04537. Roeder et al., "Sticking the Landing", 2017, arXiv 1703.09194. Tucker et al.,
"Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2018, arXiv 1810.04152.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from latentgen import losses
from latentgen.distributions import Normal
from latentgen.errors import UserError, near
from latentgen.methods.base import LatentMethod, without_classes
from latentgen.types import Array, Aux, Batch, Context, Key, LatentNet, Params, Trace, Update, Variables

OBJECTIVES = ('vae', 'iwae', 'miwae', 'piwae', 'ciwae', 'stl', 'dreg')
PATHWISE = ('stl', 'dreg')


@dataclasses.dataclass(frozen=True)
class IWAE(LatentMethod):
  """Two simultaneous updates on the same M x K samples: `generation` moves the decoder, `inference` the encoder.

  objective  generation ascends                           inference ascends
  vae        mean of log w (no closed-form KL)            the same
  iwae       IWAE with M K samples                        the same
  miwae      mean of M IWAEs with K samples               the same
  ciwae      beta (mean of log w) + (1 - beta) IWAE_MK    the same
  piwae      IWAE with M K samples                        mean of M IWAEs with K samples
  stl        mean of M IWAEs with K samples               along the samples' path alone, weights w~
  dreg       mean of M IWAEs with K samples               along the path alone, weights (1 - 2 alpha) w~^2 + alpha w~

  Both are one forward pass.

  Args:
    net: any LatentNet; 'stl' and 'dreg' need one group with a Gaussian posterior.
    objective: one of OBJECTIVES.
    outer: M.
    samples: K.
    beta: weight of the ELBO (ciwae).
    alpha: share of the wake update (dreg).
  """

  objective: str = 'iwae'
  outer: int = 1
  samples: int = 5
  beta: float = 0.5
  alpha: float = 0.0

  def init(self, key: Key, batch: Batch) -> Variables:
    variables = super().init(key, batch)
    if self.objective in PATHWISE:
      trace = self.example(variables, batch)
      if trace.posterior is None or len(trace.z) > 1 or trace.z[0].shape[0] > 1:
        raise UserError(
          f'config.model: the estimator {self.objective!r} needs one group of latents with a Gaussian posterior; with '
          "more its gradient is another one; use objective 'iwae'"
        )
    return variables

  def updates(self) -> tuple[Update, ...]:
    return (Update('generation', ('decoder',), self.loss), Update('inference', ('encoder',), self.loss))

  def bound(self, log_w: Array, update: str) -> Array:
    """What that update ascends, log_w [m k, b] -> [b]; for 'stl' and 'dreg' the bound, not the surrogate."""
    if self.objective == 'vae':
      return log_w.mean(0)
    if self.objective == 'ciwae':
      return losses.ciwae(log_w, self.beta)
    if self.objective == 'iwae' or (self.objective == 'piwae' and update == 'generation'):
      return losses.iwae(log_w)
    return losses.miwae(self._split(log_w))

  def _split(self, log_w: Array) -> Array:
    """[m k, b] -> [m, k, b]."""
    return log_w.reshape(self.outer, self.samples, -1)

  def loss(self, params: Params, ctx: Context) -> tuple[dict[str, Array] | Array, Aux]:
    trace, stats = self.infer(params, ctx.stats, ctx.batch['image'], ctx.key, self.outer * self.samples, train=True)
    log_w = trace.log_weight()
    bound = {update: self.bound(log_w, update).mean() for update in ('generation', 'inference')}
    metrics = {'bound': bound, 'elbo': log_w.mean(), 'ess': losses.effective_sample_size(log_w).mean()}
    if self.objective in PATHWISE:
      ascended = {**bound, 'inference': self.surrogate(trace).mean()}
    else:
      ascended = bound if self.objective == 'piwae' else bound['generation']  # one backward pass does for both
    return jax.tree.map(jnp.negative, ascended), Aux(metrics, stats)

  def surrogate(self, trace: Trace) -> Array:
    """What the encoder ascends along the samples' path alone, of that gradient and no meaning as a bound; [m, b]."""
    log_w = self._split(pathwise_log_weight(trace))
    if self.objective == 'stl':
      return jax.vmap(losses.sticking_the_landing)(log_w)
    return jax.vmap(lambda w: losses.doubly_reparameterised(w, self.alpha))(log_w)

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    trace, _ = self.infer(params, ctx.stats, ctx.batch['image'], ctx.key, self.outer * self.samples)
    log_w = trace.log_weight()
    return {'nelbo': -log_w.mean(0), 'niwae': -losses.iwae(log_w)}


def pathwise_log_weight(trace: Trace) -> Array:
  """log p(x, z) - log q(z | x) of a one-group Trace, with no gradient through the parameters of q but for z; [k, b]."""
  q, z = trace.posterior[0], trace.z[0]
  log_q = Normal(*jax.lax.stop_gradient((q.loc, q.scale))).log_prob(z).sum(tuple(range(3, z.ndim)))
  return trace.log_px + trace.log_p[0][0] - log_q[0]


def build(net: LatentNet, steps: int, **options: Any) -> IWAE:
  """The method as a config names it; see IWAE for the options."""
  del steps
  without_classes(net, 'iwae')
  method = IWAE(net, **options)
  if method.objective not in OBJECTIVES:
    raise UserError(f'method.objective is {method.objective!r}{near(method.objective, OBJECTIVES)}')
  for name in ('outer', 'samples'):
    if getattr(method, name) < 1:
      raise UserError(f'method.{name} is {getattr(method, name)}, need at least 1')
  for name in ('beta', 'alpha'):
    if not 0 <= getattr(method, name) <= 1:
      raise UserError(f'method.{name} is {getattr(method, name)}, need a number from 0 to 1')
  return method
