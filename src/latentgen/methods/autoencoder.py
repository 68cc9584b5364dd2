"""An autoencoder without noise: the posterior's mean is the code.

Böhm and Seljak, "Probabilistic Autoencoder", 2022, arXiv 2006.05479, section 2 (its MAP variant with `prior_weight`). Ghosh,
Sajjadi, Vergari, Black and Schölkopf, "From Variational to Deterministic Autoencoders", 2020, arXiv 1903.12436.
"""

import dataclasses

import jax.numpy as jnp

from latentgen.errors import UserError
from latentgen.methods.codes import CodesMethod
from latentgen.types import Array, Aux, Context, LatentNet, Params, Update


@dataclasses.dataclass(frozen=True)
class Autoencoder(CodesMethod):
  """loss = E_x[ -log p(x | mean(x)) - prior_weight log N(mean(x); 0, I) ].

  Args:
    net: a network with one group of latents and a Gaussian posterior, whose deviation is never used.
    prior_weight: weight of the codes' log-density under N(0, I), constants left out.
  """

  prior_weight: float = 0.0
  density = False

  def updates(self) -> tuple[Update, ...]:
    return (Update('autoencoder', ('encoder', 'decoder'), self.loss),)

  def loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    trace, stats = self.encode(params, ctx.stats, ctx.batch['image'], ctx.key, train=True)
    u = self.coordinates(params, ctx.stats).pack(trace.eps)[0]
    penalty = 0.5 * jnp.square(u).sum(-1)
    loss = (self.prior_weight * penalty - trace.log_px[0]).mean()
    return loss, Aux({'log_px': trace.log_px.mean(), 'penalty': penalty.mean()}, stats)

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    trace, _ = self.encode(params, ctx.stats, ctx.batch['image'], ctx.key)
    return {'reconstruction': -trace.log_px[0]}


def build(net: LatentNet, steps: int, *, prior_weight: float = 0.0) -> Autoencoder:
  """The method as a config names it; see Autoencoder."""
  del steps
  if prior_weight < 0:
    raise UserError(f'method.prior_weight is {prior_weight}, need at least 0')
  return Autoencoder(net, 'mean', prior_weight=prior_weight)
