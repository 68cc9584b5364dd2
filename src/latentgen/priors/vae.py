"""A small VAE over vectors: the second of two variational autoencoders."""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from latentgen.distributions import Normal
from latentgen.errors import UserError
from latentgen.losses import log_mean_exp
from latentgen.nets.vae import soft_clip
from latentgen.priors import coordinates
from latentgen.types import Array, Key

FLOOR = -6.0  # soft bound of log deviations


class Perceptron(nn.Module):
  """[..., i] -> [..., outputs]."""

  width: int
  depth: int
  outputs: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for _ in range(self.depth):
      x = nn.silu(nn.Dense(self.width)(x))
    return nn.Dense(self.outputs)(x)


@dataclasses.dataclass(frozen=True)
class VectorVAE:
  """p(u) = E_{w ~ N(0, I)} N(u; f(w), s^2 I) with one learned s, of which only bounds are known.

  What is minimised is -E_q[log p(u | w)] + KL(q(w | u) || N(0, I)), at least -log p(u).

  Args:
    latent: dimensions of w; 0 is as many as u has.
    width: hidden units.
    depth: hidden layers.

  References:
    Dai and Wipf, "Diagnosing and Enhancing VAE Models", 2019, arXiv 1903.05789.
  """

  latent: int = 0
  width: int = 128
  depth: int = 2
  exact = False
  samplers = ('vae',)

  def _nets(self, d: int) -> tuple[Perceptron, Perceptron]:
    return Perceptron(self.width, self.depth, 2 * (self.latent or d)), Perceptron(self.width, self.depth, d)

  def init(self, key: Key, d: int) -> dict[str, Any]:
    first, second = jax.random.split(key)
    encode, decode = self._nets(d)
    return {
      'encode': encode.init(first, jnp.zeros((1, d)))['params'],
      'decode': decode.init(second, jnp.zeros((1, self.latent or d)))['params'],
      'log_scale': jnp.zeros(()),
    }

  def _posterior(self, params: Any, u: Array) -> Normal:
    raw = self._nets(u.shape[-1])[0].apply({'params': params['encode']}, u)
    loc, log_scale = jnp.split(raw, 2, -1)
    return Normal(loc, jnp.exp(soft_clip(log_scale, FLOOR, None)))

  def _decode(self, params: Any, w: Array, d: int) -> Normal:
    loc = self._nets(d)[1].apply({'params': params['decode']}, w)
    return Normal(loc, jnp.broadcast_to(jnp.exp(soft_clip(params['log_scale'], FLOOR, None)), loc.shape))

  def loss(self, params: Any, key: Key, u: Array) -> Array:
    """Minus the evidence lower bound with one sample, nats, [n]."""
    q = self._posterior(params, u)
    kl = q.kl(Normal(jnp.zeros_like(q.loc), jnp.ones_like(q.loc))).sum(-1)
    return kl - self._decode(params, q.sample(key), u.shape[-1]).log_prob(u).sum(-1)

  def bound(self, params: Any, key: Key, u: Array, k: int = 1) -> Array:
    """The importance-weighted lower bound on log p(u) with k samples, nats, [n, d] -> [n]."""
    q = self._posterior(params, u)
    q = Normal(*(jnp.broadcast_to(a, (k, *a.shape)) for a in (q.loc, q.scale)))
    w = q.sample(key)
    log_px = self._decode(params, w, u.shape[-1]).log_prob(u).sum(-1)
    return log_mean_exp(log_px + coordinates.log_normal(w) - q.log_prob(w).sum(-1), axis=0)

  def sample(self, params: Any, key: Key, n: int, d: int, sampler: str, temperature: float) -> Array:
    """[n, d]; the temperature is a factor on the deviation of w."""
    del sampler
    top, noise = jax.random.split(key)
    return self._decode(params, coordinates.standard(top, n, self.latent or d, temperature), d).sample(noise)

  def evaluations(self, sampler: str) -> float:
    del sampler
    return 1.0


def build(*, latent: int = 0, width: int = 128, depth: int = 2) -> VectorVAE:
  """The density as a config names it; see VectorVAE.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  for name, value, least in (('latent', latent, 0), ('width', width, 1), ('depth', depth, 0)):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise UserError(f'method.prior.{name} is {value!r}, need a whole number of at least {least}')
  return VectorVAE(latent, width, depth)
