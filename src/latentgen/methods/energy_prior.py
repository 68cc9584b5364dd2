"""Energy-based priors on noise coordinates: by maximum likelihood with short-run chains, or as a chain of density ratios.

Pang, Han, Nijkamp, Zhu and Wu, "Learning Latent Space Energy-Based Prior Model", 2020, arXiv 2006.08205. Xiao and Han, "Adaptive
Multi-stage Density Ratio Estimation for Learning Latent Space Energy-based Model", 2022, arXiv 2209.08739.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from latentgen import losses, nets
from latentgen.errors import UserError, near
from latentgen.methods.codes import CodesMethod, check_codes, folded
from latentgen.priors import coordinates, energy
from latentgen.samplers import Kernel, SIRInfo, mala, sir, ula
from latentgen.types import Array, Aux, Batch, Context, Key, LatentNet, Params, Trace, Update, Variables

OBJECTIVES = ('likelihood', 'contrast')
POSTERIORS = ('langevin', 'encoder')
UPDATES = ('prior', 'generator')
KERNELS = {'ula': ula, 'mala': mala}


@dataclasses.dataclass(frozen=True)
class EnergyPrior(CodesMethod):
  """p_K(u) = N(u; 0, I) exp(f_0(u) + ... + f_K-1(u)) / Z; the last tilt, the group `tilt<K-1>`, is what the update `prior` moves.

  'likelihood': gradient E_posterior[grad f] - E_prior[grad f], both under all K tilts (Pang et al., equation 8), K = 1 as a rule.
  'contrast': the last tilt is the logit of a classifier between posterior samples and samples of the prior, both under the
  K - 1 tilts before it, so that p_K = p_K-1 exp(f) approaches the aggregate posterior (Xiao and Han, section 3).

  With `posterior` = 'langevin' there is no encoder: posterior samples are short chains on log p(u) + log p(x | u) from noise. With
  'encoder' they are the encoder's (of an earlier stage), moved on by such a chain if its kernel has steps. The update `generator`
  moves the decoder by -log p(x | u) at the same posterior samples.

  Args:
    net: see CodesMethod, as `codes` and `levels`.
    tilt: module with `init(key, u)` and `apply(params, u)` -> f.
    tilts: K; 0 is N(0, I), with a generator to be trained.
    objective: one of OBJECTIVES.
    posterior: one of POSTERIORS.
    train: the updates, of 'prior' and 'generator'.
    prior_kernel: chains of the prior.
    posterior_kernel: chains of the posterior.
    chains: persistent chains of the prior, of which each step moves as many as there are images; 0 starts from noise every time.
    restart: share of the persistent chains that start from noise again when their turn comes.
    proposals: M of SIR, and of the estimate of log Z.
    chunk: of them in memory at a time.
  """

  tilt: Any = energy.Tilt()
  tilts: int = 1
  objective: Literal['likelihood', 'contrast'] = 'likelihood'
  posterior: Literal['langevin', 'encoder'] = 'langevin'
  train: tuple[str, ...] = UPDATES
  prior_kernel: Kernel = ula(60, 0.16)
  posterior_kernel: Kernel = ula(20, 0.01)
  chains: int = 0
  restart: float = 0.05
  proposals: int = 2000
  chunk: int = 500
  samplers = ('langevin', 'sir', 'base')

  @property
  def density(self) -> bool:
    return self.posterior == 'encoder' and not self.posterior_kernel.steps and self.codes == 'sample'

  @property
  def active(self) -> str:
    """The group that is trained."""
    return f'tilt{self.tilts - 1}'

  # -------------------------------------------------------------------------------------------- state

  def init(self, key: Key, batch: Batch) -> Variables:
    if self.posterior == 'encoder':
      variables = super().init(key, batch)
    else:
      keys = dict(zip(('params', 'sample'), jax.random.split(key)))
      found = self.net.init(keys, 1, method='simulate')
      split = lambda tree: {g: t for g, t in nets.groups(tree).items() if t}
      variables = {'params': split(found['params']), 'stats': split(found.get('batch_stats', {}))}
    d = self.coordinates(variables['params'], variables['stats']).size
    for i in range(self.tilts):
      variables['params'][f'tilt{i}'] = self.tilt.init(jax.random.fold_in(key, 2 + i), jnp.zeros((1, d)))['params']
    start = coordinates.standard(jax.random.fold_in(key, 1), self.chains, d)
    return {**variables, 'carry': {'chains': start} if self.chains else ()}

  # -------------------------------------------------------------------------------------------- densities

  def log_tilt(self, params: Params, u: Array, tilts: int | None = None) -> Array:
    """f_0 + ... + f_{tilts - 1}, [..., d] -> [...]; all of them by default."""
    own = [self.tilt.apply({'params': params[f'tilt{i}']}, u) for i in range(self.tilts if tilts is None else tilts)]
    return sum(own, jnp.zeros(u.shape[:-1]))

  def log_prior_unnormalised(self, params: Params, u: Array, tilts: int | None = None) -> Array:
    """log N(u; 0, I) + log_tilt, [n, d] -> [n]."""
    return coordinates.log_normal(u) + self.log_tilt(params, u, tilts)

  def log_px(self, params: Params, stats: Any, u: Array, x: Array) -> Array:
    """log p(x | u), [n, d] and [n, h, w, c] -> [n]."""
    return self.decode(params, stats, u)[0].px.log_prob(x)[0]

  def log_normaliser(self, params: Params, key: Key, d: int) -> SIRInfo:
    """log Z from `proposals` draws of N(0, I), and their effective number."""
    return self._resample(params, key, 1, d)[1]

  def log_prior(self, variables: Variables, u: Array, key: Key) -> Array:
    params = variables['params']
    log_z = self.log_normaliser(params, key, u.shape[-1]).log_z[0]
    flat = self.log_prior_unnormalised(params, u.reshape(-1, u.shape[-1]))
    return flat.reshape(u.shape[:-1]) - log_z

  def partition(self, variables: Variables, x: Array, key: Key, proposals: int):
    """(log Z, effective sample size among the proposals), [1, b] each as there is no context; see evaluate.partition."""
    params, b = variables['params'], len(x)
    d = self.coordinates(params, variables['stats']).size
    info = dataclasses.replace(self, proposals=proposals).log_normaliser(params, key, d)
    return tuple((jnp.broadcast_to(a, (1, b)),) for a in (info.log_z, info.ess))

  # -------------------------------------------------------------------------------------------- samples

  def prior_samples(self, params: Params, key: Key, start: Array, tilts: int) -> Array:
    """Moves points [n, d] through the priors of 1, 2, ..., `tilts` tilts in turn."""
    for i in range(1, tilts + 1):
      start = self._move(params, jax.random.fold_in(key, i), start, i)
    return start

  def _move(self, params: Params, key: Key, start: Array, tilts: int) -> Array:
    """One chain under the prior of so many tilts."""
    if not tilts:
      return start
    return self.prior_kernel(key, lambda u: self.log_prior_unnormalised(params, u, tilts), start)[0]

  def posterior_samples(self, params: Params, stats: Any, x: Array, key: Key, tilts: int) -> tuple[Array, Array]:
    """(u [b, d], acceptance [b]) at images x, under the prior of so many tilts."""
    start, run = jax.random.split(key)
    if self.posterior == 'encoder':
      u = self.vectors(params, stats, x, start)
    else:
      each = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(start, i), (self.coordinates(params, stats).size,)))
      u = each(jnp.arange(len(x)))
    if not self.posterior_kernel.steps:
      return u, jnp.ones(len(x))
    density = lambda u, x: self.log_prior_unnormalised(params, u, tilts) + self.log_px(params, stats, u, x)
    return self.posterior_kernel(run, density, u, x)

  def _resample(self, params: Params, key: Key, n: int, d: int, temperature: float = 1.0):
    propose = lambda key, c: coordinates.standard(key, c * n, d, temperature).reshape(c, n, d)
    return sir(key, propose, lambda u: self.log_tilt(params, u), num=self.proposals, chunk=self.chunk)

  def draw(self, variables: Variables, key: Key, n: int, d: int, sampler: str, temperature: float) -> Array:
    params = variables['params']
    if sampler == 'sir':
      return self._resample(params, key, n, d, temperature)[0]
    start, run = jax.random.split(key)
    u = coordinates.standard(start, n, d, temperature)
    return u if sampler == 'base' else self.prior_samples(params, run, u, self.tilts)

  def evaluations(self, variables: Variables, sampler: str) -> float:
    steps = sum(range(1, self.tilts + 1)) * self.prior_kernel.steps
    return {'langevin': steps, 'sir': self.tilts * self.proposals, 'base': 0}[sampler]

  # -------------------------------------------------------------------------------------------- training

  def prepare(self, params: Params, ctx: Context) -> tuple[Any, Any]:
    posterior, prior, pick, fresh = jax.random.split(ctx.key, 4)
    x = ctx.batch['image']
    tilts = self.tilts - (self.objective == 'contrast' and 'prior' in self.train)
    positive, accepted = self.posterior_samples(params, ctx.stats, x, posterior, tilts)
    if 'prior' not in self.train:
      return {'positive': positive, 'accepted': accepted}, ctx.carry
    start = coordinates.standard(fresh, *positive.shape)
    if not self.chains:
      negative, carry = self.prior_samples(params, prior, start, tilts), ctx.carry
    else:
      again, rows = jax.random.split(pick)
      rows = jax.random.choice(rows, self.chains, start.shape[:1], replace=False)
      keep = jax.random.bernoulli(again, 1.0 - self.restart, (len(start), 1))
      start = jnp.where(keep, ctx.carry['chains'][rows], start)
      negative = self._move(params, prior, start, tilts)
      carry = {'chains': ctx.carry['chains'].at[rows].set(negative)}
    return {'positive': positive, 'negative': negative, 'accepted': accepted}, carry

  def updates(self) -> tuple[Update, ...]:
    known = (Update('prior', (self.active,), self.prior_loss), Update('generator', ('decoder',), self.generator_loss))
    return tuple(update for update in known if update.name in self.train)

  def _logits(self, params: Params, shared: Any) -> tuple[Array, Array]:
    apply = lambda u: self.tilt.apply({'params': params[self.active]}, u)
    return apply(shared['positive']), apply(shared['negative'])

  def prior_loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    positive, negative = self._logits(params, ctx.shared)
    metrics = {'tilt_posterior': positive.mean(), 'tilt_prior': negative.mean(), 'norm': self._norm(ctx.shared['negative'])}
    if self.posterior_kernel.steps:
      metrics['accepted'] = ctx.shared['accepted'].mean()
    if self.objective == 'likelihood':
      return negative.mean() - positive.mean(), Aux(metrics)
    right = lambda logit: jnp.heaviside(logit, 0.5).mean()  # 0 is half right
    metrics['accuracy'] = (right(positive) + right(-negative)) / 2
    return losses.nce(positive, negative), Aux(metrics)

  def _norm(self, u: Array) -> Array:
    """Root mean square of the coordinates; 1 for the base."""
    return jnp.sqrt(jnp.square(u).mean())

  def generator_loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    trace, stats = self.decode(params, ctx.stats, ctx.shared['positive'], ctx.key, train=True)
    log_px = trace.px.log_prob(ctx.batch['image']).mean()
    return -log_px, Aux({'log_px': log_px}, stats)

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    """Of 'contrast' the two cross-entropies in nats, 2 log 2 at chance; of 'likelihood' the difference of the tilts' means."""
    shared, _ = dataclasses.replace(self, chains=0).prepare(params, ctx)
    found = {}
    if 'prior' in self.train:
      positive, negative = self._logits(params, shared)
      found['gap'] = negative - positive
      if self.objective == 'contrast':
        found = {'contrast': jax.nn.softplus(-positive) + jax.nn.softplus(negative)}
    if 'generator' in self.train:
      found['reconstruction'] = -self.log_px(params, ctx.stats, shared['positive'], ctx.batch['image'])
    return found

  def ratios(self, variables: Variables, x: Array, key: Key) -> dict[str, Array]:
    """Every tilt's logit at posterior and prior samples of its own stage: {'positive', 'negative'}, [K, b]."""
    params, found = variables['params'], []
    for i in range(self.tilts):
      stage = dataclasses.replace(self, tilts=i + 1, objective='contrast', train=('prior',), chains=0)
      ctx = Context({'image': x}, jax.random.fold_in(key, i), jnp.int32(0), variables['stats'])
      found.append(stage._logits(params, stage.prepare(params, ctx)[0]))
    return {name: jnp.stack([pair[i] for pair in found]) for i, name in enumerate(('positive', 'negative'))}

  # -------------------------------------------------------------------------------------------- evaluation

  def encode(self, params: Params, stats: Any, x: Array, key: Key, k: int = 1, train: bool = False) -> tuple[Trace, Any]:
    """k posterior samples an image, decoded; where a chain made them their density is unknown and there is no `log_q`."""
    if self.posterior == 'encoder' and not self.posterior_kernel.steps:
      return super().encode(params, stats, x, key, k, train)
    u, _ = self.posterior_samples(params, stats, jnp.tile(x, (k, 1, 1, 1)), key, self.tilts)
    trace, _ = self.decode(params, stats, u)
    return folded(trace, x, k), {}

  def anomaly_scores(self, variables: Variables, x: Array, key: Key) -> dict[str, Array]:
    """Larger is more anomalous: -log p(x, u) up to log Z at a posterior sample u, and its two parts, in nats [b]."""
    params, stats = variables['params'], variables['stats']
    u, _ = self.posterior_samples(params, stats, x, key, self.tilts)
    prior, error = -self.log_prior_unnormalised(params, u), -self.log_px(params, stats, u, x)
    return {'joint': prior + error, 'prior': prior, 'reconstruction': error}


def build(
  net: LatentNet,
  steps: int,
  *,
  objective: str = 'likelihood',
  posterior: str = 'langevin',
  train: Sequence[str] = UPDATES,
  tilts: int = 1,
  hidden: Sequence[int] = (200, 200),
  activation: str = 'gelu',
  kernel: str = 'ula',
  prior_steps: int = 60,
  prior_step_size: float = 0.16,
  posterior_steps: int = 20,
  posterior_step_size: float = 0.01,
  chains: int = 0,
  restart: float = 0.05,
  proposals: int = 2000,
  chunk: int = 500,
  codes: str = 'sample',
) -> EnergyPrior:
  """The method as a config names it; see EnergyPrior, priors.energy.Tilt, and samplers.kernels for the two kernels.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  del steps
  choices = dict(objective=(objective, OBJECTIVES), posterior=(posterior, POSTERIORS), kernel=(kernel, KERNELS))
  for name, (value, known) in choices.items():
    if value not in known:
      raise UserError(f'method.{name} is {value!r}{near(value, known)}')
  if not set(train) <= set(UPDATES) or not train:
    raise UserError(f'method.train is {tuple(train)!r}, need one or both of {UPDATES}')
  counts = dict(prior_steps=prior_steps, proposals=proposals, chunk=chunk)
  for name, value in {**counts, 'posterior_steps': posterior_steps, 'chains': chains, 'tilts': tilts}.items():
    needed = {'posterior_steps': posterior == 'langevin', 'tilts': 'prior' in train}
    least = int(name in counts or needed.get(name, False))
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise UserError(f'method.{name} is {value!r}, need a whole number of at least {least}')
  for name, value in (('prior_step_size', prior_step_size), ('posterior_step_size', posterior_step_size)):
    if not value > 0:
      raise UserError(f'method.{name} is {value}, need a positive number')
  if not 0 <= restart <= 1:
    raise UserError(f'method.restart is {restart}, need a share between 0 and 1')
  check_codes(codes, 0)
  make = KERNELS[kernel]
  return EnergyPrior(
    net, codes, tilt=energy.checked(hidden, activation), tilts=tilts, objective=objective, posterior=posterior, train=tuple(train),
    prior_kernel=make(prior_steps, prior_step_size), posterior_kernel=make(posterior_steps, posterior_step_size),
    chains=chains, restart=restart, proposals=proposals, chunk=min(chunk, proposals),
  )  # fmt: skip
