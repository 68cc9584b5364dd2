"""Latent score-based generative models: a VAE and the diffusion prior on its noise coordinates, trained together.

Vahdat, Kreis and Kautz, "Score-based Generative Modeling in Latent Space", 2021, arXiv 2106.05931.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from latentgen.errors import UserError, near
from latentgen.methods.base import per_group
from latentgen.methods.density import LatentDensity
from latentgen.nets import spectral
from latentgen.priors import coordinates
from latentgen.priors.diffusion import Diffusion
from latentgen.types import Array, Aux, Batch, Context, Key, LatentNet, Params, Trace, Update, Variables

TIMES = ('shared', 'separate')
DRAWS = 8  # times an image in validation


@dataclasses.dataclass(frozen=True)
class LSGM(LatentDensity):
  """Two simultaneous updates: the VAE on its bound, whatever the prior's weighting is; the prior on samples without gradient.

  vae:   E_x[ -log p(x|z) + beta (KL(q || N(0, I)) + CE + log N(u; 0, I)) ] + lambda_1 spectral
  prior: E_x[ int_e^1 w(t) |eps - eps_theta(u_t, t)|^2 dt ] + lambda_2 spectral

  u are the noise coordinates of q's sample, CE = losses.diffusion_cross_entropy its estimate of -log p(u), with likelihood
  weights. Both updates see the same u and eps. The gradient of neither reaches the other's parameters.

  Args:
    net: any network with location-scale latents.
    codes: 'sample'.
    levels: how many of the top levels the prior covers; the others keep the network's own. 0 is all.
    prior: the diffusion, with its own weighting w and density of times.
    times: 'shared', the VAE has the prior's times, weighted anew (algorithm 1 where the prior's weighting is 'll', else 3), or
      'separate', it has times of its own, drawn for likelihood weights (algorithm 2).
    joint: False trains the prior alone, on a frozen VAE.
    steps: length T of the stage.
    beta: weight of the divergence, the prior's term included.
    beta_start: its value at the first step.
    warmup_portion: share of T over which it goes from one to the other, linearly.
    spectral: weights (lambda_1, lambda_2) of the spectral terms; 0 is off.
  """

  times: Literal['shared', 'separate'] = 'separate'
  joint: bool = True
  steps: int = 1
  beta: float = 1.0
  beta_start: float = 1.0
  warmup_portion: float = 0.1
  spectral: tuple[float, float] = (0.0, 0.0)

  def init(self, key: Key, batch: Batch) -> Variables:
    variables = super().init(key, batch)
    for i, (name, groups) in enumerate(self._penalties()):
      chosen = {g: variables['params'][g] for g in groups}
      variables['stats'][name] = spectral.init(jax.random.fold_in(key, 2 + i), chosen)
    return variables

  def _penalties(self) -> list[tuple[str, tuple[str, ...]]]:
    named = (('spectral', ('encoder', 'decoder')), ('spectral_prior', ('prior',)))
    return [item for item, weight in zip(named, self.spectral, strict=True) if weight and (self.joint or item is named[1])]

  def updates(self) -> tuple[Update, ...]:
    prior = Update('prior', ('prior',), self.prior_loss)
    return (Update('vae', ('encoder', 'decoder'), self.vae_loss), prior) if self.joint else (prior,)

  def prepare(self, params: Params, ctx: Context) -> tuple[Any, Any]:
    """{'infer', 'noise', 'time', 'own', 'dropout': keys, 'u': [b, d]}."""
    names = ('infer', 'noise', 'time', 'own', 'dropout')
    keys = dict(zip(names, jax.random.split(ctx.key, len(names)), strict=True))
    trace, _ = self.infer(params, ctx.stats, ctx.batch['image'], keys['infer'], train=self.joint)
    return {**keys, 'u': self.coordinates(params, ctx.stats).pack(trace.eps)[0]}, ctx.carry

  def schedule(self, step: Array) -> Array:
    """beta at a step."""
    done = jnp.clip(step / (self.warmup_portion * self.steps), 0.0, 1.0) if self.warmup_portion else 1.0
    return self.beta_start + (self.beta - self.beta_start) * done

  def prior_loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    keys, u = ctx.shared, ctx.shared['u']
    t, density = self.prior.times(keys['time'], len(u))
    error = self.prior.error(params['prior'], u, t, jax.random.normal(keys['noise'], u.shape), keys['dropout'])
    metrics = {'cross_entropy': self.prior.weighted(error, t, density, 'll').mean()}
    metrics['mixing'] = jax.nn.sigmoid(params['prior']['logit']).mean()
    loss = self.prior.weighted(error, t, density).mean()
    return self._regularised(loss, 1, params, ctx, metrics, {})

  def vae_loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    keys = ctx.shared
    trace, stats = self.infer(params, ctx.stats, ctx.batch['image'], keys['infer'], train=True)
    u = self.coordinates(params, ctx.stats).pack(trace.eps)[0]
    shared = self.times == 'shared'
    t, density = self.prior.times(keys['time' if shared else 'own'], len(u), None if shared else 'll')
    error = self.prior.error(params['prior'], u, t, jax.random.normal(keys['noise'], u.shape), keys['dropout'])
    tilt = self.prior.weighted(error, t, density, 'll') + coordinates.log_normal(u)
    kl, log_px, beta = _rate(trace), trace.log_px.mean(0), self.schedule(ctx.step)
    metrics = {
      'elbo': (log_px - kl - tilt).mean(), 'elbo_normal': (log_px - kl).mean(), 'tilt': tilt.mean(), 'log_px': log_px.mean(),
      'beta': beta,
    }  # fmt: skip
    return self._regularised((beta * (kl + tilt) - log_px).mean(), 0, params, ctx, metrics, stats)

  def _regularised(self, loss: Array, i: int, params: Params, ctx: Context, metrics: dict, stats: dict) -> tuple[Array, Aux]:
    if self.spectral[i]:
      name, groups = ('spectral', ('encoder', 'decoder')) if i == 0 else ('spectral_prior', ('prior',))
      penalty, stats[name] = spectral.penalty({g: params[g] for g in groups}, ctx.stats[name])
      loss, metrics['spectral'] = loss + self.spectral[i] * penalty, penalty
    return loss, Aux(metrics, stats)

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    """{'nelbo': by the cross-entropy, at eight times an image; 'nelbo_normal': by N(0, I); 'tilt': their difference}."""
    infer, *keys = jax.random.split(ctx.key, 1 + DRAWS)
    trace, _ = self.infer(params, ctx.stats, ctx.batch['image'], infer)
    u = self.coordinates(params, ctx.stats).pack(trace.eps)[0]

    def cross_entropy(key: Key) -> Array:
      time, noise = jax.random.split(key)
      t, density = self.prior.times(time, len(u), 'll')
      return self.prior.weighted(self.prior.error(params['prior'], u, t, jax.random.normal(noise, u.shape)), t, density, 'll')

    tilt = jax.lax.map(cross_entropy, jnp.stack(keys)).mean(0) + coordinates.log_normal(u)
    normal = _rate(trace) - trace.log_px.mean(0)
    return {'nelbo': normal + tilt, 'nelbo_normal': normal, 'tilt': tilt}

  def log_prior(self, variables: Variables, u: Array, key: Key) -> Array:
    """log p(u) under the probability flow."""
    flat = u.reshape(-1, u.shape[-1])
    return self.prior.log_prob(variables['params']['prior'], flat, key).reshape(u.shape[:-1])


def _rate(trace: Trace) -> Array:
  """[b], nats."""
  return per_group(trace.rate()).sum(0)


def build(net: LatentNet, steps: int, *, prior: Diffusion | None = None, levels: int = 1, **options: Any) -> LSGM:
  """The method as a config names it; see LSGM for the options.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  if not isinstance(prior, Diffusion):
    raise UserError("method.prior is missing or no diffusion: a section with name='diffusion'")
  for name in ('codes', 'whiten'):
    if name in options:
      raise UserError(f'method.{name} is for the method density, lsgm has samples of the posterior as they are')
  if isinstance(levels, bool) or not isinstance(levels, int) or levels < 0:
    raise UserError(f'method.levels is {levels!r}, need a whole number, 0 for all')
  options['spectral'] = tuple(options.get('spectral', (0.0, 0.0)))
  method = LSGM(net, 'sample', levels, prior=prior, steps=steps, **options)
  if method.times not in TIMES:
    raise UserError(f'method.times is {method.times!r}{near(str(method.times), TIMES)}')
  if not isinstance(method.joint, bool):
    raise UserError(f'method.joint is {method.joint!r}, need True or False')
  if len(method.spectral) != 2 or min(method.spectral) < 0:
    raise UserError(f'method.spectral is {method.spectral}, need two weights of at least 0, for the VAE and for the prior')
  if not 0 <= method.warmup_portion <= 1:
    raise UserError(f'method.warmup_portion is {method.warmup_portion!r}, need a share of the stage, 0 to 1')
  for name in ('beta', 'beta_start'):
    if not getattr(method, name) > 0:
      raise UserError(f'method.{name} is {getattr(method, name)!r}, need a positive number')
  return method
