"""The variational autoencoder: minus ELBO, with NVAE's warm-up, balancing and spectral regularisation where asked for.

Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, arXiv 1312.6114. Vahdat and Kautz, "NVAE: A Deep Hierarchical
Variational Autoencoder", 2020, arXiv 2007.03898.
"""

import dataclasses

import jax
import jax.numpy as jnp

from latentgen import losses
from latentgen.errors import UserError
from latentgen.methods.base import LatentMethod, per_group, without_classes
from latentgen.nets import spectral
from latentgen.types import Array, Aux, Batch, Context, Key, LatentNet, Params, Trace, Update, Variables


@dataclasses.dataclass(frozen=True)
class VAE(LatentMethod):
  """One update of encoder and decoder.

  loss = E_x[ -log p(x|z) + beta(t) sum_l gamma_l KL_l ] + lambda(t) (sum of spectral norms + sum of BatchNorm scales)

  Args:
    net: any LatentNet.
    steps: length T of the stage, for the schedules.
    samples: posterior samples an image, k.
    beta: final weight of the KL.
    warmup_portion: share of T over which the KL weight rises linearly to `beta`; 0 is no warm-up.
    warmup_start: share of T before the rise. The weight is never below 1e-4 of `beta`.
    balance: equalise the groups' KL during warm-up.
    free_bits: nats of KL per group and image that cost nothing.
    free_bits_decay: last share of T over which max(kl, free_bits) passes linearly into kl, so that the stage ends on the bound;
      0 keeps the floor. (With a floor that sinks to 0 a rate of one sample would end as max(r, 0), which is not r on average.)
    spectral: weight of the spectral term, (first, last), interpolated geometrically along the warm-up; (0, 0) is off.
  """

  steps: int = 1
  samples: int = 1
  beta: float = 1.0
  warmup_portion: float = 0.0
  warmup_start: float = 1e-4
  balance: bool = False
  free_bits: float = 0.0
  free_bits_decay: float = 0.0
  spectral: tuple[float, float] = (0.0, 0.0)

  def init(self, key: Key, batch: Batch) -> Variables:
    variables = super().init(key, batch)
    if any(self.spectral):
      state = spectral.init(jax.random.fold_in(key, 1), variables['params'])
      variables['stats']['spectral'] = state
    return variables

  def updates(self) -> tuple[Update, ...]:
    return (Update('vae', ('encoder', 'decoder'), self.loss),)

  def schedule(self, step: Array) -> Array:
    """Fraction of the warm-up that is done, [1e-4, 1]."""
    if not self.warmup_portion:
      return jnp.ones(())
    return losses.kl_warmup(step, self.steps, self.warmup_start, self.warmup_portion)

  def charged(self, rates: Array, step: Array) -> Array:
    """What the rates of groups and images cost at a step, free bits taken into account; nats, same shape."""
    if not self.free_bits:
      return rates
    floored = losses.free_bits(rates, self.free_bits)
    if not self.free_bits_decay:
      return floored
    share = jnp.clip((self.steps - step) / (self.free_bits_decay * self.steps), 0.0, 1.0)
    return rates + share * (floored - rates)

  def loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    trace, stats = self.infer(params, ctx.stats, ctx.batch['image'], ctx.key, self.samples, train=True)
    kl = per_group(trace.rate())  # [l, b]
    log_px = trace.log_px.mean(0)  # [b]
    ramp = self.schedule(ctx.step)
    weighted = self.charged(kl, ctx.step)
    if self.balance:
      gamma = losses.kl_balance(weighted, balance_alpha(trace))
      weighted = jnp.where(ramp < 1.0, gamma, 1.0)[:, None] * weighted
    loss = (self.beta * ramp * weighted.sum(0) - log_px).mean()
    metrics = {'elbo': (log_px - kl.sum(0)).mean(), 'kl': kl.sum(0).mean(), 'log_px': log_px.mean(), 'beta': self.beta * ramp}
    if any(self.spectral):
      penalty, stats['spectral'] = spectral.penalty(params, ctx.stats['spectral'])
      metrics['spectral'] = penalty
      loss += losses.log_interpolate(*self.spectral, ramp) * penalty
    return loss, Aux(metrics, stats)

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    trace, _ = self.infer(params, ctx.stats, ctx.batch['image'], ctx.key)
    kl = per_group(trace.rate()).sum(0)
    return {'nelbo': kl - trace.log_px.mean(0), 'kl': kl}


def balance_alpha(trace: Trace) -> Array:
  """NVAE's weights of the groups, positions of the level over groups in the level, smallest one 1; [l]."""
  alpha = []
  for z in trace.z:
    positions = z[0, 0, 0, ..., 0].size if z.ndim > 4 else 1
    alpha += [positions / z.shape[0]] * z.shape[0]
  return jnp.asarray(alpha) / min(alpha)


def build(net: LatentNet, steps: int, **options) -> VAE:
  """The method as a config names it; see VAE for the options."""
  without_classes(net, 'vae')
  return VAE(net, steps, **checked(options))


def checked(options: dict) -> dict:
  """Options of `VAE` whose values can be.

  Raises:
    UserError: naming the one that cannot.
  """
  options['spectral'] = tuple(options.get('spectral', (0.0, 0.0)))
  if len(options['spectral']) != 2 or min(options['spectral']) < 0 or (0.0 in options['spectral'] and any(options['spectral'])):
    raise UserError('method.spectral needs two weights, both positive or both 0')
  for name in ('beta', 'free_bits'):
    if options.get(name, 0.0) < 0:
      raise UserError(f'method.{name} is {options[name]}, need at least 0')
  for name in ('free_bits_decay', 'warmup_portion', 'warmup_start'):
    if not 0 <= options.get(name, 0.0) <= 1:
      raise UserError(f'method.{name} is {options[name]}, need a share of the stage, 0 to 1')
  return options
