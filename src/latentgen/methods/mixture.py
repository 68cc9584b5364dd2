"""Autoencoders with a mixture prior: regularised by the Cauchy-Schwarz divergence in closed form, or trained on the ELBO.

Tran, Pantic and Deisenroth, "Cauchy-Schwarz Regularized Autoencoder", 2022, arXiv 2101.02149. Tomczak and Welling, "VAE with a
VampPrior", 2018, arXiv 1705.07120.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from latentgen import losses
from latentgen.distributions import GaussianMixture, Normal, Repeated
from latentgen.errors import UserError, near
from latentgen.methods.base import LatentMethod
from latentgen.priors import mixture as mixtures
from latentgen.types import Array, Aux, Batch, Choose, Context, Key, LatentNet, Params, Trace, Update, Variables

OBJECTIVES = ('cauchy_schwarz', 'elbo')
MASS_DECAY = 0.99  # of the running share of the data that each component has


@dataclasses.dataclass(frozen=True)
class MixturePrior(LatentMethod):
  """One update of encoder, decoder and prior.

  loss = E_x[ -E_q log p(x|z) + lambda D(q(z|x), p(z)) ]

  with D the Cauchy-Schwarz divergence, or log q - log p at the drawn z ('elbo'). With the former the loss bounds nothing: what
  is reported as an ELBO or a likelihood always comes from the densities of a trace.

  With `classes`, c / classes components in a row belong to each class. Where the label y is known (not -1), D is to p(z|y),
  and the loss has the term -alpha log p(y|x), with p(y|x) the share of the class in the overlap of q(z|x) and the mixture.

  A component whose running share of the data falls below `reseed` / c starts anew at an example of the batch far from the
  others (of its class, where there are classes). Its parameters stay where the optimiser has them: a shift is added to them,
  which lives in the statistics of the group `prior`. Where config.train.accumulate splits a batch, shares, lambda and new starts
  move with every part.

  Args:
    net: a network with one group of latent vectors and a Gaussian posterior.
    prior: the mixture.
    steps: length T of the stage, for the schedules.
    objective: one of OBJECTIVES.
    samples: posterior samples an image, k.
    weight: lambda; where it starts, if there is a target.
    warmup_portion: share of T over which lambda rises linearly to its value; 0 is no warm-up.
    target: mean divergence in nats that lambda is adapted to, lambda <- max(0, lambda + dual_rate (D - target)).
    dual_rate: see target.
    reseed: see above; 0 is never.
    reseed_portion: share of T after which components are left alone.
    restart: share of T at which all components start anew at examples of one batch, as wide as the posteriors; 0 is never.
    classes: number of classes; 0 does without labels.
    alpha: weight of the labels' log-probability.
    defensive: share of prior samples in the proposal of importance-weighted likelihoods.
    frozen: moves the prior alone; encoder and decoder come from an earlier stage.
  """

  prior: mixtures.Mixture = mixtures.Mixture()
  steps: int = 1
  objective: Literal['cauchy_schwarz', 'elbo'] = 'cauchy_schwarz'
  samples: int = 1
  weight: float = 1.0
  warmup_portion: float = 0.0
  target: float | None = None
  dual_rate: float = 1e-2
  reseed: float = 0.1
  reseed_portion: float = 0.5
  restart: float = 0.0
  classes: int = 0
  alpha: float = 1.0
  defensive: float = 0.0
  frozen: bool = False
  samplers = ('mixture',)

  # -------------------------------------------------------------------------------------------- state

  def init(self, key: Key, batch: Batch) -> Variables:
    """Adds the group `prior`, where anything in it is learned, its statistics, and the dual variable.

    Raises:
      UserError: the network has other latents than one Gaussian vector, or labels are missing.
    """
    variables = super().init(key, batch)
    latent = _latent(self.example(variables, batch))
    if self.prior.mode == 'fixed' and len(self.prior.prototypes[0]) != latent:
      raise UserError(f'method.prototypes have {len(self.prior.prototypes[0])} dimensions, and model.latent is {latent}')
    if self.classes and 'label' not in batch:
      raise UserError(f'method.classes is {self.classes}, and the data have no labels')
    params = self.prior.init(jax.random.fold_in(key, 1), latent, batch['image'])
    if params:
      variables['params']['prior'] = params
    if self.prior.movable:
      c = self.prior.components
      variables['stats']['prior'] = {'shift': jax.tree.map(jnp.zeros_like, params), 'mass': jnp.full(c, 1.0 / c)}
    else:
      variables['stats']['prior'] = {'constants': self.prior.constants(latent)}
    if self.target is not None:
      variables['stats']['dual'] = {'weight': jnp.asarray(self.weight, jnp.float32)}
    return variables

  # -------------------------------------------------------------------------------------------- prior

  def _mixture(self, params: Params, stats: Any) -> GaussianMixture:
    own, state = params.get('prior', {}), stats['prior']
    own = jax.tree.map(jnp.add, own, state['shift']) if self.prior.movable else {**own, **state['constants']}
    return self.prior.distribution(own, lambda images: self._posterior(params, stats, images))

  def _posterior(self, params: Params, stats: Any, x: Array) -> Normal:
    """q(z | x), loc and scale [b, d]."""
    return _gaussian(self.infer(params, stats, x, jax.random.key(0))[0])

  def mixture(self, variables: Variables) -> GaussianMixture:
    """The prior."""
    return self._mixture(variables['params'], variables['stats'])

  def cluster(self, variables: Variables, x: Array, key: Key) -> Array:
    """log p(component | x) by the components' overlap with q(z | x), [b, c]."""
    del key
    q = self._posterior(variables['params'], variables['stats'], x)
    return jax.nn.log_softmax(mixtures.log_overlap(q, self.mixture(variables)))

  @property
  def classify(self) -> Any:
    """(variables, x, key) -> log p(y | x) [b, classes]; None without classes."""
    return self._classify if self.classes else None

  def _classify(self, variables: Variables, x: Array, key: Key) -> Array:
    return self._log_class(self.cluster(variables, x, key))

  def _log_class(self, overlap: Array) -> Array:
    """[..., c] -> normalised [..., classes]."""
    return jax.nn.log_softmax(jax.nn.logsumexp(overlap.reshape(*overlap.shape[:-1], self.classes, -1), axis=-1))

  # -------------------------------------------------------------------------------------------- training

  def updates(self) -> tuple[Update, ...]:
    learned = ('prior',) if self.prior.movable or self.prior.learned_weights else ()
    return (Update('prior', learned, self.loss) if self.frozen else Update('vae', ('encoder', 'decoder', *learned), self.loss),)

  def divergence(self, trace: Trace, q: Normal, p: GaussianMixture) -> Array:
    """D of every image, [b]."""
    if self.objective == 'cauchy_schwarz':
      return losses.cauchy_schwarz(q, p)
    if self.prior.components == 1:
      return q.kl(Normal(p.loc, p.scale)).sum(-1)
    return (trace.log_q[0][0] - p.log_prob(trace.z[0][0])).mean(0)

  def loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    trace, stats = self.infer(params, ctx.stats, ctx.batch['image'], ctx.key, self.samples, train=True)
    q, p = _gaussian(trace), self._mixture(params, ctx.stats)
    log_px, divergence = trace.log_px.mean(0), self.divergence(trace, q, p)
    overlap = mixtures.log_overlap(q, p)
    metrics = {'log_px': log_px.mean()}
    supervised = 0.0
    if self.classes:
      label = ctx.batch['label']
      each = jax.vmap(lambda p: self.divergence(trace, q, p))(mixtures.by_class(p, self.classes))  # [classes, b]
      pick = lambda table: jnp.take_along_axis(table, jnp.maximum(label, 0)[None], 0)[0]
      divergence = jnp.where(label >= 0, pick(each), divergence)
      supervised = jnp.where(label >= 0, pick(self._log_class(overlap).T), 0.0)
      metrics['log_py'] = supervised.sum() / jnp.maximum((label >= 0).sum(), 1)
    weight = self._weight(ctx)
    loss = (weight * divergence - log_px - self.alpha * supervised).mean()

    name = 'kl' if self.objective == 'elbo' else 'cauchy_schwarz'
    within, between = jnp.square(q.scale).mean(), q.loc.var(0).mean()
    # Near 1 where posteriors hide from the penalty in width.
    metrics |= {name: divergence.mean(), 'weight': weight, 'within_share': within / (within + between)}
    if self.target is not None:
      dual = ctx.stats['dual']['weight'] + self.dual_rate * (divergence.mean() - self.target)
      stats['dual'] = {'weight': jnp.maximum(dual, 0.0)}
    if self.prior.movable:
      stats['prior'], metrics['reseeded'] = self._reseed(params['prior'], ctx, q, p, overlap)
      mass = stats['prior']['mass']
      metrics['components'] = jnp.exp(jax.scipy.special.entr(mass / mass.sum()).sum())  # effective number
    return loss, Aux(metrics, stats)

  def _weight(self, ctx: Context) -> Array:
    """lambda at this step."""
    weight = self.weight if self.target is None else ctx.stats['dual']['weight']
    if not self.warmup_portion:
      return jnp.asarray(weight, jnp.float32)
    return weight * losses.kl_warmup(ctx.step, self.steps, portion=self.warmup_portion)

  def _reseed(
    self, params: Params, ctx: Context, q: Normal, p: GaussianMixture, overlap: Array
  ) -> tuple[Any, Array]:
    """(new statistics of the prior, number of components that start anew)."""
    c, old = self.prior.components, ctx.stats['prior']
    mass = MASS_DECAY * old['mass'] + (1 - MASS_DECAY) * jax.nn.softmax(overlap).mean(0)
    dead = (mass < self.reseed / c) & (ctx.step < self.reseed_portion * self.steps)
    if self.restart:
      dead |= ctx.step == int(self.restart * self.steps)
    fit = jnp.zeros(overlap.T.shape)  # log-odds of each example as the new place of a component, [c, b]
    if self.classes:
      label, log_class = ctx.batch['label'][:, None], self._log_class(overlap)
      known = jnp.where(label == jnp.arange(self.classes), 0.0, -1e9)
      fit = jnp.repeat(jnp.where(label >= 0, known, log_class).T, c // self.classes, axis=0)
    live = lambda: jnp.zeros(c, jnp.int32)
    pick = lambda: mixtures.places(jax.random.fold_in(ctx.key, 1), _whole(q.loc), p.loc, dead, _whole(fit.T).T)
    rows = jax.lax.cond(dead.any(), pick, live)
    current = jax.tree.map(jnp.add, params, old['shift'])
    seeds = self.prior.seeds(current, q.loc[rows], jnp.sqrt(jnp.square(q.scale).mean(0)), ctx.batch['image'][rows])
    shift = mixtures.reseed(params, old['shift'], dead, seeds)
    new = {'shift': shift, 'mass': jnp.where(dead, 1.0 / c, mass)}
    return jax.lax.stop_gradient((new, dead.sum()))

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    """nelbo under the mixture (one sample; a bound whatever the objective), and the divergence of the loss.

    With classes the classifier's error, 0 where there is no label.
    """
    variables = {'params': params, 'stats': ctx.stats}
    trace = self.trace(variables, ctx.batch['image'], ctx.key)
    found = {'nelbo': sum(r.sum(0) for r in trace.rate()).mean(0) - trace.log_px.mean(0), 'nll_px': -trace.log_px.mean(0)}
    if self.objective == 'cauchy_schwarz':
      found['cauchy_schwarz'] = losses.cauchy_schwarz(_gaussian(trace), self.mixture(variables))
    if self.classes and 'label' in ctx.batch:
      guess = self._classify(variables, ctx.batch['image'], ctx.key).argmax(-1)
      found['error'] = ((ctx.batch['label'] >= 0) & (guess != ctx.batch['label'])).astype(jnp.float32)
    return found

  # -------------------------------------------------------------------------------------------- evaluation

  def trace(self, variables: Variables, x: Array, key: Key, k: int = 1) -> Trace:
    """Posterior samples with `log_p` under the mixture; a closed-form `kl` where it has one component."""
    trace, p = super().trace(variables, x, key, k), self.mixture(variables)
    kl = None
    if self.prior.components == 1:
      kl = (trace.posterior[0].kl(Normal(p.loc[0], p.scale[0])).sum(-1),)
    return trace.replace(log_p=(p.log_prob(trace.z[0]),), kl=kl, prior=None)

  def propose(self, variables: Variables, x: Array, key: Key, k: int = 1) -> Trace:
    """A trace for importance weights, of draws from (1 - defensive) q(z | x) + defensive p(z).

    Nothing in the Cauchy-Schwarz divergence makes q(z | x) as wide as p(z | x); with a share of the prior the weights are
    bounded by p(x | z) / defensive.
    """
    if not self.defensive:
      return self.trace(variables, x, key, k)
    p = self.mixture(variables)
    q = self._posterior(variables['params'], variables['stats'], x)
    z, log_q = mixtures.defensive(key, q, p, self.defensive, k)  # [k, b, d]
    n = z.shape[0] * z.shape[1]
    flat = super().simulate(variables, key, n, choose=lambda *_: z.reshape(n, -1))
    lead = lambda a: a.reshape(*z.shape[:2], *a.shape[2:]) if a.ndim > 1 else a
    px = jax.tree.map(lead, flat.px)
    return flat.replace(
      eps=(z[None],), z=(z[None],), log_q=(log_q[None],), log_p=(p.log_prob(z)[None],), prior=None,
      context=(jnp.zeros((1, *z.shape[:2], 0)),), px=px, log_px=px.log_prob(x),
    )  # fmt: skip

  def chooser(self, variables: Variables, sampler: str, temperature: float) -> Choose:
    """A component for every example, then a draw from it; the temperature is a factor on the components' deviations."""
    del sampler
    p = self.mixture(variables)
    p = dataclasses.replace(p, scale=temperature * p.scale)

    def choose(level, group, prior, context, key):
      del level, group, prior
      return p.sample(key, context.shape[0])

    return choose

  def simulate(self, variables: Variables, key: Key, n: int, *args: Any, choose: Choose | None = None, **kwargs: Any) -> Trace:
    """As any method's, with the mixture as the prior that `choose` sees, and `log_p` under it."""
    p, own = self.mixture(variables), choose
    if choose is not None:
      own = lambda level, group, prior, context, key: choose(level, group, Repeated(p, n), context, key)
    trace = super().simulate(variables, key, n, *args, choose=own, **kwargs)
    return trace.replace(log_p=(p.log_prob(trace.z[0]),), prior=None)


def _latent(trace: Trace) -> int:
  """Dimensions of the one vector of latents that a mixture prior needs."""
  what = 'a mixture prior needs a network with'
  if len(trace.z) != 1 or trace.z[0].shape[0] != 1 or trace.z[0].ndim != 4:
    groups = sum(z.shape[0] for z in trace.z)
    raise UserError(f'config.model.name: {what} one group of latent vectors; this one has {groups} of maps or vectors')
  if trace.posterior is None:
    raise UserError(f'config.model.name: {what} a Gaussian posterior')
  return trace.z[0].shape[-1]


def _gaussian(trace: Trace) -> Normal:
  """q(z | x) of a trace with one group; loc and scale [b, d]."""
  (q,) = trace.posterior
  return Normal(*(jnp.broadcast_to(a, q.shape)[0, 0] for a in (q.loc, q.scale)))


def _whole(x: Array) -> Array:
  """All rows of `x`, one for each image, on every device.

  Draws that depend on each other would ask the devices for their rows anew each time. What comes before stays split by images.
  """
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty:
    return x
  for spec in (PartitionSpec(mesh.axis_names), PartitionSpec()):
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
  return x


def build(
  net: LatentNet,
  steps: int,
  *,
  components: int = 10,
  prior: str = 'free',
  learned_weights: bool = False,
  spread: float = 1.0,
  max_scale: float = 2.0,
  prototypes: Sequence[Sequence[float]] = (),
  **options,
) -> MixturePrior:
  """The method as a config names it.

  Args:
    net: the network.
    steps: length of the stage.
    components: see priors.mixture.Mixture, as `prior` (its mode), `learned_weights`, `spread`, `max_scale`, `prototypes`.
    **options: see MixturePrior.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  mixture = mixtures.checked(components, prior, learned_weights, spread, max_scale, prototypes)
  method = MixturePrior(net, mixture, steps, **options)
  if method.objective not in OBJECTIVES:
    raise UserError(f'method.objective is {method.objective!r}{near(method.objective, OBJECTIVES)}')
  for name, least in (('samples', 1), ('weight', 0), ('dual_rate', 0), ('reseed', 0), ('alpha', 0), ('classes', 0)):
    if getattr(method, name) < least:
      raise UserError(f'method.{name} is {getattr(method, name)}, need at least {least}')
  for name in ('warmup_portion', 'reseed_portion', 'restart'):
    if not 0 <= getattr(method, name) <= 1:
      raise UserError(f'method.{name} is {getattr(method, name)}, need a share between 0 and 1')
  if not 0 <= method.defensive < 1:
    raise UserError(f'method.defensive is {method.defensive}, need at least 0 and less than 1')
  if method.frozen and not (mixture.movable or mixture.learned_weights):
    raise UserError(f'method.frozen: there is nothing to train in a {mixture.mode!r} prior with fixed weights')
  if method.classes and mixture.components % method.classes:
    raise UserError(f'method.components is {mixture.components}, need a multiple of method.classes = {method.classes}')
  return method
