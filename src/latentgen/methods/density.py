"""A density on the codes of a frozen network: the second step of all two-step models.

Dai and Wipf, "Diagnosing and Enhancing VAE Models", 2019, arXiv 1903.05789. Ghosh, Sajjadi, Vergari, Black and Schölkopf, "From
Variational to Deterministic Autoencoders", 2020, arXiv 1903.12436. Böhm and Seljak, "Probabilistic Autoencoder", 2022, arXiv
2006.05479. Loaiza-Ganem, Ross, Cresswell and Caterini, "Diagnosing and Fixing Manifold Overfitting in Deep Generative Models",
2022, arXiv 2204.07172.
"""

from collections.abc import Iterable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.errors import UserError
from latentgen.methods.codes import CodesMethod, check_codes
from latentgen.nets import convolution
from latentgen.priors import coordinates
from latentgen.types import Array, Aux, Batch, Context, Density, Key, LatentNet, Params, Update, Variables


@dataclasses.dataclass(frozen=True)
class LatentDensity(CodesMethod):
  """One update of the group `prior`; encoder and decoder come from an earlier stage.

  With `whiten` the density is over (u - loc) / scale, with loc and scale the group `whitening`, which a stage of the method
  `whitening` fits; densities of u have the Jacobian, -sum log scale.

  Args:
    net: see CodesMethod, as `codes` and `levels`.
    prior: the density.
    whiten: see above.
  """

  prior: Density = None
  whiten: bool = False

  @property
  def samplers(self) -> tuple[str, ...]:
    """The density's own; of a posterior's samples also 'base', which draws from N(0, I) in its place."""
    return self.prior.samplers if self.codes == 'mean' else (*self.prior.samplers, 'base')

  @property
  def density(self) -> bool:
    return self.prior.exact and self.codes == 'sample'

  @property
  def exact(self) -> bool:
    """Whether the density of codes is known."""
    return self.prior.exact

  def init(self, key: Key, batch: Batch) -> Variables:
    variables = super().init(key, batch)
    d = self.coordinates(variables['params'], variables['stats']).size
    variables['params']['prior'] = self.prior.init(jax.random.fold_in(key, 1), d)
    if self.whiten:
      variables['params']['whitening'] = {'loc': jnp.zeros(d), 'scale': jnp.ones(d)}
    return variables

  def prepare(self, params: Params, ctx: Context) -> tuple[Any, Any]:
    return self.white(params, self.vectors(params, ctx.stats, ctx.batch['image'], ctx.key)), ctx.carry

  def updates(self) -> tuple[Update, ...]:
    return (Update('prior', ('prior',), self.loss),)

  def loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    return self.prior.loss(params['prior'], ctx.key, ctx.shared).mean(), Aux()

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    """{'prior': what is minimised, -log p(u) in nats where the density is exact}."""
    code, noise = jax.random.split(ctx.key)
    u = self.vectors(params, ctx.stats, ctx.batch['image'], code)
    if self.prior.exact:
      return {'prior': -self.log_prior({'params': params, 'stats': ctx.stats}, u, noise)}
    return {'prior': self.prior.loss(params['prior'], noise, self.white(params, u))}

  def white(self, params: Params, u: Array) -> Array:
    """u, [..., d], as the density sees it."""
    return (u - params['whitening']['loc']) / params['whitening']['scale'] if self.whiten else u

  def log_prior(self, variables: Variables, u: Array, key: Key) -> Array:
    del key
    params = variables['params']
    flat = self.white(params, u).reshape(-1, u.shape[-1])
    found = self.prior.log_prob(params['prior'], flat).reshape(u.shape[:-1])
    return found - jnp.log(params['whitening']['scale']).sum() if self.whiten else found

  def evaluations(self, variables: Variables, sampler: str) -> float:
    if sampler == 'base':
      return 0.0
    d = self.coordinates(variables['params'], variables['stats']).size
    return self.prior.evaluations(variables['params']['prior'], d, sampler)

  def draw(self, variables: Variables, key: Key, n: int, d: int, sampler: str, temperature: float) -> Array:
    if sampler == 'base':
      return coordinates.standard(key, n, d, temperature)
    params = variables['params']
    u = self.prior.sample(params['prior'], key, n, d, sampler, temperature)
    return params['whitening']['loc'] + params['whitening']['scale'] * u if self.whiten else u

  # -------------------------------------------------------------------------------------------- hooks of evaluation tasks

  def starts(self, variables: Variables, key: Key, n: int) -> Array:
    """n draws of the coordinates that `place` takes, [n, d]: a flow's base, else the density's own."""
    d = self.coordinates(variables['params'], variables['stats']).size
    if hasattr(self.prior, 'transform'):
      return coordinates.standard(key, n, d)
    return self.prior.sample(variables['params']['prior'], key, n, d, self.samplers[0], 1.0)

  def place(self, variables: Variables, u: Array) -> tuple[Array, Array]:
    """u [n, d] -> (noise coordinates [n, d], log-density of u in nats [n]); see `starts`. For exact densities."""
    params = variables['params']
    if hasattr(self.prior, 'transform'):
      vectors, log_prob = self.prior.transform(params['prior'], u), coordinates.log_normal(u)
    else:
      vectors, log_prob = u, self.prior.log_prob(params['prior'], u)
    if self.whiten:
      vectors = params['whitening']['loc'] + params['whitening']['scale'] * vectors
    return vectors, log_prob

  def picture(self, variables: Variables, vectors: Array) -> Array:
    """Decoder means at noise coordinates [n, d], [n, h, w, c]; has derivatives of any order, forwards and backwards."""
    with convolution.implementation('native'):
      return self.decode(variables['params'], variables['stats'], vectors)[0].px.mean[0]

  def anomaly_scores(self, variables: Variables, x: Array, key: Key) -> dict[str, Array]:
    """Scores of images x [b, h, w, c] in nats, [b], larger for what is more anomalous.

    reconstruction: -log p(x | code); density: -log p(code), where the density is exact; sum: of both.

    References:
      Böhm and Seljak, "Probabilistic Autoencoder", 2022, arXiv 2006.05479, section 4 (the density alone).
    """
    code, noise = jax.random.split(key)
    trace, _ = self.encode(variables['params'], variables['stats'], x, code)
    scores = {'reconstruction': -trace.log_px[0]}
    if self.prior.exact:
      u = self.coordinates(variables['params'], variables['stats']).pack(trace.eps)[0]
      scores['density'] = -self.log_prior(variables, u, noise)
      scores['sum'] = scores['reconstruction'] + scores['density']
    return scores


@dataclasses.dataclass(frozen=True)
class FittedDensity(LatentDensity):
  """The same in closed form, on the codes of all training images; a stage of no steps."""

  def updates(self) -> tuple[Update, ...]:
    return ()

  def fit(self, variables: Variables, batches: Iterable[Batch], key: Key) -> Variables:
    params, codes = variables['params'], all_codes(self, variables, batches, key)
    codes = np.asarray(self.white(params, codes), np.float64)
    return {'params': {'prior': self.prior.fit(jax.random.fold_in(key, 0), codes)}}


def all_codes(method: CodesMethod, variables: Variables, batches: Iterable[Batch], key: Key) -> np.ndarray:
  """The noise coordinates of all images of the batches, in order, [n, d]."""
  encode = jax.jit(lambda variables, x, key: method.vectors(variables['params'], variables['stats'], x, key))
  rows = [np.asarray(encode(variables, batch['image'], jax.random.fold_in(key, 1 + i))) for i, batch in enumerate(batches)]
  return np.concatenate(rows)


def build(
  net: LatentNet, steps: int, *, prior: Density | None = None, codes: str = 'sample', levels: int = 0, whiten: bool = False
) -> LatentDensity:
  """The method as a config names it; `prior` is a section with the name of a module of latentgen.priors and its options.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  del steps
  if not hasattr(prior, 'sample'):
    raise UserError("method.prior is missing: a section with the name of a density, as dict(name='flow')")
  check_codes(codes, levels)
  kind = FittedDensity if hasattr(prior, 'fit') else LatentDensity
  return kind(net, codes, levels, prior=prior, whiten=whiten)
