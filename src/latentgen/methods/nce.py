"""Noise-contrastive priors: binary critics tell posterior from prior samples of a frozen model, and tilt its prior.

Aneja, Schwing, Kautz and Vahdat, "A Contrastive Learning Approach for Training Variational Autoencoder Priors", 2021, arXiv
2010.02917. Gutmann and Hyvarinen, "Noise-contrastive estimation", 2010.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from latentgen import losses
from latentgen.errors import UserError
from latentgen.methods.base import LatentMethod
from latentgen.priors.critics import Critic
from latentgen.priors.tilted import Tilted
from latentgen.types import Array, Aux, Batch, Choose, Context, Key, LatentNet, Params, Trace, Update, Variables


@dataclasses.dataclass(frozen=True)
class NCE(LatentMethod):
  """One update of all critics, on a network that no update moves.

  Each critic sees posterior and prior samples of its group under the same context z_<l ~ q(z_<l | x): one positive and one
  negative a context, fresh at every step.

  Args:
    net: any LatentNet whose latents are location-scale.
    tilt: the critics and how they tilt.
    samples: posterior samples an image and step.
    proposals: M of SIR.
    chunk: proposals in memory at a time.
    langevin_steps: steps of Langevin dynamics.
    step_size: its step size, in noise coordinates.
    normaliser_proposals: M of the estimates of log Z in `trace`, hence in likelihoods.
  """

  tilt: Tilted
  samples: int = 1
  proposals: int = 500
  chunk: int = 50
  langevin_steps: int = 100
  step_size: float = 1e-2
  normaliser_proposals: int = 100
  samplers = ('sir', 'langevin', 'base')

  def init(self, key: Key, batch: Batch) -> Variables:
    variables = super().init(key, batch)
    trace = self.example(variables, batch)
    if trace.prior is None:
      raise UserError('config.model: a noise-contrastive prior needs location-scale latents, and this network has none')
    variables['params']['critic'] = self.tilt.init(jax.random.fold_in(key, 1), trace)
    return variables

  def prepare(self, params: Params, ctx: Context) -> tuple[Any, Any]:
    return self._pairs(params, ctx.stats, ctx.batch['image'], ctx.key, self.samples), ctx.carry

  def _pairs(self, params: Params, stats: Any, x: Array, key: Key, k: int):
    """(positives, negatives, prior, context), each per level [g, k, b, ...]."""
    infer, noise = jax.random.split(key)
    trace, _ = self.infer(params, stats, x, infer, k)
    negatives = tuple(prior.sample(jax.random.fold_in(noise, i)) for i, prior in enumerate(trace.prior))
    return trace.z, negatives, trace.prior, trace.context

  def updates(self) -> tuple[Update, ...]:
    return (Update('critic', ('critic',), self.loss),)

  def _logits(self, critic: Params, pairs) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    positives, negatives, prior, context = pairs
    return self.tilt.log_ratio(critic, positives, prior, context), self.tilt.log_ratio(critic, negatives, prior, context)

  def loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    """Sum over the groups of both mean cross-entropies; chance is 2 log 2 a group."""
    positive, negative = self._logits(params['critic'], ctx.shared)
    each = jnp.concatenate([jax.vmap(losses.nce)(p, n) for p, n in zip(positive, negative, strict=True)])
    right = lambda logit: jnp.heaviside(logit, 0.5).mean()  # 0 is half right
    accuracy = jnp.stack([(right(p) + right(-n)) / 2 for p, n in zip(positive, negative, strict=True)])
    metrics = {'nce_per_group': each.mean(), 'accuracy_mean': accuracy.mean(), 'nce_best_group': each.min()}
    return each.sum(), Aux(metrics)

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    positive, negative = self.logits({'params': params, 'stats': ctx.stats}, ctx.batch['image'], ctx.key)
    each = jnp.concatenate([jax.nn.softplus(-p) + jax.nn.softplus(n) for p, n in zip(positive, negative, strict=True)])
    return {'nce': each.sum(0)}

  def logits(self, variables: Variables, x: Array, key: Key) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The critics' logits on one posterior and one prior sample a group: two tuples, per level [g, b]."""
    pairs = self._pairs(variables['params'], variables['stats'], x, key, 1)
    return jax.tree.map(lambda logit: logit[:, 0], self._logits(variables['params']['critic'], pairs))

  def partition(self, variables: Variables, x: Array, key: Key, proposals: int):
    """(log Z_l(z_<l), effective sample size among the proposals) at posterior contexts; per level [g, b]."""
    infer, noise = jax.random.split(key)
    trace = super().trace(variables, x, infer)
    found = self.tilt.normalisers(variables['params']['critic'], trace, noise, proposals, self.chunk)
    return jax.tree.map(lambda value: value[:, 0], found)

  def trace(self, variables: Variables, x: Array, key: Key, k: int = 1) -> Trace:
    """Posterior samples whose `log_p` and `kl` are under the tilted prior, log Z estimated afresh for every sample.

    The estimate of log Z is too low on average (Jensen), so bounds from this trace are too high, by the order of Var[r] / (2 M)
    nats a group; `evaluate.partition` shows the trend with M.
    """
    infer, noise = jax.random.split(key)
    trace = super().trace(variables, x, infer, k)
    critic = variables['params']['critic']
    log_z, _ = self.tilt.normalisers(critic, trace, noise, self.normaliser_proposals, self.chunk)
    ratio = self.tilt.log_ratio(critic, trace.z, trace.prior, trace.context)
    tilt = jax.tree.map(lambda l, z: l - z, ratio, log_z)
    log_p = jax.tree.map(jnp.add, trace.log_p, tilt)
    kl = None if trace.kl is None else jax.tree.map(jnp.subtract, trace.kl, tilt)
    return trace.replace(log_p=log_p, kl=kl)

  def evaluations(self, variables: Variables, sampler: str) -> float:
    """Of each group's critic."""
    return {'sir': self.proposals, 'langevin': self.langevin_steps, 'base': 0}[sampler]

  def chooser(self, variables: Variables, sampler: str, temperature: float) -> Choose:
    critic = variables['params']['critic']
    if sampler == 'sir':
      return self.tilt.sir(critic, self.proposals, self.chunk, temperature)
    if sampler == 'langevin':
      return self.tilt.langevin(critic, self.langevin_steps, self.step_size, temperature)
    return super().chooser(variables, sampler, temperature)


def build(
  net: LatentNet,
  steps: int,
  *,
  channels: int = 64,
  blocks: str = 'AAABAAAB',
  layers: int = 2,
  coordinates: Literal['z', 'eps', 'both'] = 'both',
  **options,
) -> NCE:
  """The method as a config names it.

  Args:
    net: the network whose prior is tilted.
    steps: length of the stage; unused.
    channels: see priors.critics.Critic, as `blocks` and `layers`.
    coordinates: see priors.tilted.Tilted.
    **options: see NCE.
  """
  del steps
  if coordinates not in ('z', 'eps', 'both'):
    raise UserError(f"method.coordinates is {coordinates!r}, need 'z', 'eps' or 'both'")
  for name in ('proposals', 'chunk', 'normaliser_proposals', 'samples', 'langevin_steps'):
    if options.get(name, 1) < 1:
      raise UserError(f'method.{name} is {options[name]}, need at least 1')
  for name, value in (('channels', channels), ('layers', layers)):
    if value < 1:
      raise UserError(f'method.{name} is {value}, need at least 1')
  if set(blocks) - set('AB'):
    raise UserError(f"method.blocks is {blocks!r}, need a text of 'A' and 'B'")
  if not options.get('step_size', 1.0) > 0:
    raise UserError(f'method.step_size is {options["step_size"]}, need a positive number')
  return NCE(net, Tilted(Critic(channels, blocks, layers), coordinates), **options)
