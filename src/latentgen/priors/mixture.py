"""Mixtures of diagonal Gaussians as the prior over a single group of latents: p(z) = sum_k pi_k N(z; m_k, diag v_k)."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from latentgen.distributions import GaussianMixture, Normal
from latentgen.errors import UserError, near
from latentgen.types import Array, Key, Params

MODES = ('free', 'pseudo', 'fixed', 'standard')
MIN_LOG_SCALE = -4.0  # of a component's log standard deviation


def _bounds(max_scale: float) -> tuple[float, float]:
  """(centre, half width) of the interval of log standard deviations."""
  top = math.log(max_scale)
  return (top + MIN_LOG_SCALE) / 2, (top - MIN_LOG_SCALE) / 2


def bound(raw: Array, max_scale: float) -> Array:
  """Log standard deviations inside (-4, log max_scale): centre + half width * tanh(raw / half width)."""
  centre, half = _bounds(max_scale)
  return centre + half * jnp.tanh(raw / half)


def unbound(log_scale: Array, max_scale: float) -> Array:
  """The inverse of `bound`; what lies outside, or within a thousandth of the ends, comes from just inside."""
  centre, half = _bounds(max_scale)
  return half * jnp.arctanh(jnp.clip((log_scale - centre) / half, -0.999, 0.999))


@dataclasses.dataclass(frozen=True)
class Mixture:
  """A mixture whose components are parameters, moments of an encoder, or constants.

  free: loc [c, d] and raw log standard deviations [c, d] are parameters; they start at N(0, spread^2) and at deviation 1.
  pseudo: moments of the encoder at c learnable images, which start at training images (VampPrior).
  fixed: deviation 1 around `prototypes`.
  standard: N(0, I).

  Args:
    components: c; 1 if standard.
    mode: one of MODES.
    learned_weights: weights are softmax(logits); else 1 / c.
    spread: deviation of the initial means (free).
    max_scale: upper bound of the components' deviations, above 1 (free). The Cauchy-Schwarz divergence of a narrow q from a
      wide p grows as half the log of their ratio only, so that components without a bound spread over several clusters.
    prototypes: means, c tuples of d numbers (fixed).

  References:
    Tran, Pantic and Deisenroth, "Cauchy-Schwarz Regularized Autoencoder", 2022, arXiv 2101.02149.
    Tomczak and Welling, "VAE with a VampPrior", 2018, arXiv 1705.07120, equation 9.
  """

  components: int = 10
  mode: Literal['free', 'pseudo', 'fixed', 'standard'] = 'free'
  learned_weights: bool = False
  spread: float = 1.0
  max_scale: float = 2.0
  prototypes: tuple[tuple[float, ...], ...] = ()

  @property
  def movable(self) -> bool:
    """Whether components have parameters, so that dead ones can be put elsewhere."""
    return self.mode in ('free', 'pseudo')

  def init(self, key: Key, latent: int, images: Array) -> dict[str, Array]:
    """Parameters, each with the components along its first axis; none if nothing is learned.

    Args:
      key: PRNG key.
      latent: d.
      images: [b, h, w, c], of which pseudo-inputs start as copies.
    """
    c, params = self.components, {}
    if self.mode == 'free':
      params['loc'] = self.spread * jax.random.normal(key, (c, latent))
      params['log_scale'] = jnp.full((c, latent), unbound(0.0, self.max_scale))
    elif self.mode == 'pseudo':
      pick, noise = jax.random.split(key)
      b = images.shape[0]
      rows = jnp.resize(jax.random.permutation(pick, b), c)  # none twice before all are there once
      params['images'] = images[rows] + 0.01 * jax.random.normal(noise, (c, *images.shape[1:]))
    if self.learned_weights:
      params['logits'] = jnp.zeros(c)
    return params

  def constants(self, latent: int) -> dict[str, Array]:
    """What a mixture has in place of parameters of its components, {'loc': [c, d]} if fixed or standard."""
    if self.movable:
      return {}
    rows = self.prototypes if self.mode == 'fixed' else ((0.0,) * latent,)
    return {'loc': jnp.asarray(rows, jnp.float32)}

  def distribution(self, params: Params, encode: Callable[[Array], Normal]) -> GaussianMixture:
    """The prior.

    Args:
      params: as `init` makes them, and the constants.
      encode: images [c, ...] -> q(z | x), a Normal [c, d].
    """
    c = self.components
    weights = jax.nn.softmax(params['logits']) if self.learned_weights else jnp.full(c, 1.0 / c)
    if self.mode == 'free':
      return GaussianMixture(weights, params['loc'], jnp.exp(bound(params['log_scale'], self.max_scale)))
    if self.mode == 'pseudo':
      q = encode(params['images'])
      return GaussianMixture(weights, q.loc, q.scale)
    return GaussianMixture(weights, params['loc'], jnp.ones_like(params['loc']))

  def seeds(self, params: Params, codes: Array, scale: Array, images: Array) -> dict[str, Array]:
    """Where components start anew: one at each of c given examples.

    Args:
      params: as `init` makes them.
      codes: means of q(z | x) at the examples, [c, d].
      scale: standard deviations for the components, [d] (free).
      images: the examples, [c, h, w, channels] (pseudo).

    Returns:
      A tree as `params`; the weights are 1 / c.
    """
    new = {}
    if self.mode == 'free':
      new = {'loc': codes, 'log_scale': jnp.broadcast_to(unbound(jnp.log(scale), self.max_scale), params['log_scale'].shape)}
    elif self.mode == 'pseudo':
      new = {'images': images}
    if self.learned_weights:
      new['logits'] = jnp.full_like(params['logits'], jax.nn.logsumexp(params['logits']) - math.log(self.components))
    return new


def checked(
  components: int = 10,
  prior: str = 'free',
  learned_weights: bool = False,
  spread: float = 1.0,
  max_scale: float = 2.0,
  prototypes: Sequence[Sequence[float]] = (),
) -> Mixture:
  """The mixture that a method's options describe; `prior` is its mode.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  if prior not in MODES:
    raise UserError(f'method.prior is {prior!r}{near(prior, MODES)}')
  prototypes = tuple(tuple(map(float, row)) for row in prototypes)
  if prior == 'fixed' and (not prototypes or len({len(row) for row in prototypes}) > 1):
    raise UserError('method.prototypes needs means of equal length for a fixed prior')
  components = {'fixed': len(prototypes), 'standard': 1}.get(prior, components)
  if isinstance(components, bool) or not isinstance(components, int) or components < 1:
    raise UserError(f'method.components is {components!r}, need a whole number of at least 1')
  if not spread > 0:
    raise UserError(f'method.spread is {spread}, need a positive number')
  if not max_scale > 1:
    raise UserError(f'method.max_scale is {max_scale}, need a number above 1')
  return Mixture(components, prior, learned_weights, spread, max_scale, prototypes)


def places(key: Key, points: Array, centres: Array, dead: Array, log_odds: Array) -> Array:
  """Examples for dead components, drawn one after the other as k-means++ draws its centres.

  P(example) ~ squared distance to the nearest centre that lives or has its example already, times the component's own odds.

  Args:
    key: PRNG key.
    points: [b, d].
    centres: [c, d].
    dead: bool [c].
    log_odds: [c, b].

  Returns:
    Rows of `points`, int [c]; those of living components mean nothing.

  References:
    Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", 2007.
  """
  distance = jnp.square(points[:, None] - centres).sum(-1)  # [b, c]
  nearest = jnp.where(dead, jnp.inf, distance).min(-1)
  nearest = jnp.where(jnp.isfinite(nearest), nearest, 1.0)  # nothing lives: the first is drawn by its odds alone

  def one(carry, component):
    nearest, first = carry
    dead, odds, key = component
    row = jax.random.categorical(key, jnp.log(nearest) + odds)
    mine = jnp.square(points - points[row]).sum(-1)
    return (jnp.where(dead, jnp.where(first, mine, jnp.minimum(nearest, mine)), nearest), first & ~dead), row

  return jax.lax.scan(one, (nearest, dead.all()), (dead, log_odds, jax.random.split(key, len(dead))))[1]


def reseed(params: Params, shift: Params, dead: Array, seeds: Any) -> Any:
  """The shift under which dead components, parameter + shift, are at their seeds; the others keep theirs.

  Args:
    params: parameters of a mixture, as the optimiser moves them.
    shift: tree as `params`.
    dead: bool [c].
    seeds: tree as `params`.
  """
  where = lambda p, s, new: jnp.where(dead.reshape(-1, *(1,) * (p.ndim - 1)), new - p, s)
  return jax.tree.map(where, params, shift, seeds)


def log_overlap(q: Normal, mixture: GaussianMixture) -> Array:
  """log pi_k + log int q(z) N(z; m_k, v_k) dz = log pi_k + log N(mu; m_k, sigma^2 + v_k), in nats.

  Its softmax over k is the share of each component in the expected density of the mixture under q.

  Args:
    q: diagonal Gaussians, loc and scale [b, d].
    mixture: c components in d dimensions.

  Returns:
    [b, c].
  """
  scale = jnp.sqrt(jnp.square(q.scale[:, None]) + jnp.square(mixture.scale))
  return jnp.log(mixture.weights) + Normal(mixture.loc, scale).log_prob(q.loc[:, None]).sum(-1)


def by_class(mixture: GaussianMixture, classes: int) -> GaussianMixture:
  """p(z | y) for components in `classes` equal runs: leaves [classes, c / classes, ...], weights of a class sum to one."""
  split = jax.tree.map(lambda a: a.reshape(classes, -1, *a.shape[1:]), mixture)
  return dataclasses.replace(split, weights=split.weights / split.weights.sum(-1, keepdims=True))


def defensive(key: Key, q: Normal, mixture: GaussianMixture, share: float, k: int) -> tuple[Array, Array]:
  """k draws an example from (1 - share) q + share p, and their log-density.

  Args:
    key: PRNG key.
    q: loc and scale [b, d].
    mixture: p.
    share: of the prior, in (0, 1).
    k: number of draws.

  Returns:
    (z [k, b, d], log density [k, b] in nats).
  """
  which, own, prior = jax.random.split(key, 3)
  b, d = q.loc.shape
  from_q = Normal(*(jnp.broadcast_to(a, (k, b, d)) for a in (q.loc, q.scale))).sample(own)
  from_p = mixture.sample(prior, k * b).reshape(k, b, d)
  z = jnp.where(jax.random.bernoulli(which, share, (k, b, 1)), from_p, from_q)
  log_q = math.log1p(-share) + q.log_prob(z).sum(-1)
  return z, jnp.logaddexp(log_q, math.log(share) + mixture.log_prob(z))
