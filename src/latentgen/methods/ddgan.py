"""Denoising diffusion GAN: few large denoising steps, each one a conditional GAN.

Xiao, Kreis and Vahdat, "Tackling the Generative Learning Trilemma with Denoising Diffusion GANs", 2022, arXiv 2112.07804.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from latentgen import losses
from latentgen.errors import UserError, near
from latentgen.methods.base import Base
from latentgen.samplers import denoising
from latentgen.types import Array, Aux, Batch, Context, Key, Params, Update, Variables

SCHEDULES = {'vp': denoising.vp_schedule, 'geometric': denoising.geometric_schedule}


@dataclasses.dataclass(frozen=True)
class DDGAN(Base):
  """One update of the discriminator, then one of the generator against the new discriminator.

  p(x_{t-1} | x_t) = E_{z ~ N(0, I)} q(x_{t-1} | x_t, x_0 = G(x_t, z, t)), x_0 in [-1, 1]
  loss of D = E softplus(-D(x_{t-1}, x_t, t)) + E softplus(D(x'_{t-1}, x_t, t))
    + (gamma / 2) E |grad_{x_{t-1}} D(x_{t-1}, x_t, t)|^2
  loss of G = E softplus(-D(x'_{t-1}, x_t, t))

  with (x_{t-1}, x_t) of the forward chain, x'_{t-1} of the model given the same x_t, and t uniform on 1, ..., T. The gradient
  penalty joins the discriminator's loss in every `r1_every`-th step, with the same weight: it shares that step's optimiser
  and its moments, which an update of its own would not.

  Args:
    net: the networks; see `nets.ddgan.Pair`.
    timesteps: T, also the number of network calls of a sample.
    schedule: 'vp' or 'geometric' (see `samplers.denoising`).
    beta_min: first rate of 'vp', first variance of 'geometric'.
    beta_max: last one.
    gamma: weight of the gradient penalty; 0 is none.
    r1_every: steps from one penalty to the next.
  """

  net: Any
  timesteps: int = 4
  schedule: str = 'vp'
  beta_min: float = 0.1
  beta_max: float = 20.0
  gamma: float = 0.05
  r1_every: int = 15
  order = 'sequential'

  @property
  def chain(self) -> denoising.Schedule:
    return SCHEDULES[self.schedule](self.timesteps, self.beta_min, self.beta_max)

  def init(self, key: Key, batch: Batch) -> Variables:
    x = jnp.zeros(batch['image'].shape)
    t, z = jnp.ones(len(x), jnp.int32), jnp.zeros((len(x), self.net.latent))
    one, other = jax.random.split(key)
    generator = self.net.generator.init(one, x, t, z)['params']
    discriminator = self.net.discriminator.init(other, x, x, t)['params']
    return {'params': {'generator': generator, 'discriminator': discriminator}, 'stats': {}}

  def updates(self) -> tuple[Update, ...]:
    return (
      Update('discriminator', ('discriminator',), self.discriminator_loss),
      Update('generator', ('generator',), self.generator_loss),
    )

  def predict(self, generator: Params, key: Key, x_t: Array, t: Array, temperature: float = 1.0, train: bool = False) -> Array:
    """A draw of x_0 given x_t [b, h, w, c] by the generator, from a fresh z ~ N(0, temperature^2 I)."""
    latent, dropout = jax.random.split(key)
    z = temperature * jax.random.normal(latent, (len(x_t), self.net.latent))
    return self.net.generator.apply({'params': generator}, x_t, t, z, train, rngs={'dropout': dropout})

  def draw(self, generator: Params, image: Array, key: Key, train: bool = True) -> tuple[Array, Array, Array, Array]:
    """(t [b], real x_{t-1}, x_t, the model's x_{t-1} given the same x_t) for images [b, h, w, c] in [0, 1]."""
    times, forward, latent, noise = jax.random.split(key, 4)
    t = jax.random.randint(times, (len(image),), 1, self.timesteps + 1)
    real, x_t = denoising.q_sample_pair(self.chain, forward, 2.0 * image - 1.0, t)
    x0 = self.predict(generator, latent, x_t, t, train=train)
    return t, real, x_t, denoising.posterior_sample(self.chain, noise, x0, x_t, t)

  def logits(self, discriminator: Params, before: Array, x_t: Array, t: Array) -> Array:
    """D(x_{t-1}, x_t, t), [b]."""
    return self.net.discriminator.apply({'params': discriminator}, before, x_t, t)

  def discriminator_loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    t, real, x_t, fake = self.draw(params['generator'], ctx.batch['image'], ctx.key)
    positive = self.logits(params['discriminator'], real, x_t, t)
    negative = self.logits(params['discriminator'], fake, x_t, t)
    adversarial = losses.discriminator(positive, negative)
    accuracy = ((positive > 0).mean() + (negative < 0).mean()) / 2.0
    metrics = {'adversarial': adversarial, 'accuracy': accuracy}
    if not self.gamma:
      return adversarial, Aux(metrics)

    def penalty(discriminator):
      return losses.r1(lambda before: self.logits(discriminator, before, x_t, t), real)

    due = ctx.step % self.r1_every == 0
    r1 = jax.lax.cond(due, penalty, lambda discriminator: jnp.zeros(()), params['discriminator'])
    return adversarial + self.gamma / 2.0 * r1, Aux(metrics)

  def generator_loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    t, _, x_t, fake = self.draw(params['generator'], ctx.batch['image'], ctx.key)
    return losses.generator(self.logits(params['discriminator'], fake, x_t, t)), Aux()

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    """The discriminator's adversarial loss on held-out images, nats: 2 log 2 where it cannot tell; no measure of quality."""
    t, real, x_t, fake = self.draw(params['generator'], ctx.batch['image'], ctx.key, train=False)
    positive = self.logits(params['discriminator'], real, x_t, t)
    negative = self.logits(params['discriminator'], fake, x_t, t)
    return {'adversarial': jax.nn.softplus(-positive) + jax.nn.softplus(negative)}

  def sample(self, variables: Variables, key: Key, n: int, sampler: str | None = None, temperature: float = 1.0) -> Array:
    """Images in T network calls, [n, h, w, c] in [0, 1].

    Args:
      variables: {'params', 'stats'}.
      key: PRNG key.
      n: number of images.
      sampler: there is one, 'base'.
      temperature: standard deviation of the latents z; the noise of the chain stays as it is.
    """
    self.sampler(sampler)
    start, chain = jax.random.split(key)
    generator = variables['params']['generator']

    def predict(key, x_t, t):
      return self.predict(generator, key, x_t, t, temperature)

    x_T = jax.random.normal(start, (n, *self.net.image_shape))  # noqa: N806
    return (denoising.sample(self.chain, predict, chain, x_T) + 1.0) / 2.0


def build(net: Any, steps: int, **options) -> DDGAN:
  """The method as a config names it; see DDGAN for the options."""
  del steps
  method = DDGAN(net, **options)
  if not hasattr(net, 'discriminator'):
    raise UserError("config.model: the method 'ddgan' needs a generator and a discriminator, such as model.name = 'ddgan'")
  for name in ('timesteps', 'r1_every'):
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise UserError(f'method.{name} is {value!r}, need a whole number of at least 1')
  if method.schedule not in SCHEDULES:
    raise UserError(f'method.schedule is {method.schedule!r}{near(method.schedule, SCHEDULES)}')
  if not method.gamma >= 0:
    raise UserError(f'method.gamma is {method.gamma!r}, need a weight of at least 0')
  if not 0 < method.beta_min < method.beta_max or (method.schedule == 'geometric' and not method.beta_max < 1):
    last = ' and below 1' if method.schedule == 'geometric' else ''
    raise UserError(f'method.beta_max is {method.beta_max!r}, need more than method.beta_min, {method.beta_min!r}{last}')
  return method
