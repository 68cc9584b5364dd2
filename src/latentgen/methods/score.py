"""Score matching at a ladder of noise levels, sampled by annealed Langevin dynamics: images without latents or a density.

Song and Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019, arXiv 1907.05600.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from latentgen import losses, samplers
from latentgen.errors import UserError, near
from latentgen.methods.base import Base
from latentgen.samplers.annealed import CONVENTIONS
from latentgen.types import Array, Aux, Batch, Context, Key, Params, Update, Variables

OBJECTIVES = ('denoising', 'sliced')


@dataclasses.dataclass(frozen=True)
class Score(Base):
  """One update of the score network s(x, i), i the index of the noise level.

  loss = E_i E_x [sigma_i^p l(x; sigma_i)], one level i ~ U{1..L} an image, l the denoising loss
  (1/2) |s(x + sigma eps, i) + eps / sigma|^2 or sliced score matching at x + sigma eps.

  Samplers: 'annealed' as in the paper; 'denoised', the same and then the mean of the image given its noisy version, which
  takes away the noise of the last level; 'single', as many steps as these at the last level alone (the paper's baseline).

  Args:
    net: (x [b, h, w, c], level int [b]) -> field [b, h, w, c]; has `image_shape` and `levels`.
    start: first and largest standard deviation of the noise, in units of images in [0, 1].
    end: last and smallest one.
    objective: one of OBJECTIVES.
    power: p, the power of sigma that weighs a level.
    projections: directions an image (sliced).
    variance_reduced: form of sliced score matching.
    divide: the score is the field over sigma_i, so that the field has one scale at all levels; without, it is the field.
    langevin_steps: T, steps a level.
    step_size: eps, of the last level.
    inpainting_step_size: eps where known pixels are held.
    single_step_size: eps of 'single'.
    convention: 'half' or 'full', what a step size means (samplers.annealed_langevin).

  References:
    Song and Ermon, "Improved Techniques for Training Score-Based Generative Models", 2020, arXiv 2006.09011 (`divide`).
  """

  net: Any
  start: float = 1.0
  end: float = 0.01
  objective: str = 'denoising'
  power: float = 2.0
  projections: int = 1
  variance_reduced: bool = True
  divide: bool = False
  langevin_steps: int = 100
  step_size: float = 2e-5
  inpainting_step_size: float = 8e-6
  single_step_size: float = 5e-5
  convention: str = 'full'
  samplers = ('annealed', 'denoised', 'single')

  @property
  def sigmas(self) -> Array:
    """The ladder, [levels]."""
    return samplers.geometric_ladder(self.start, self.end, self.net.levels)

  def init(self, key: Key, batch: Batch) -> Variables:
    x = batch['image']
    found = self.net.init(key, x, jnp.zeros(x.shape[:1], jnp.int32))
    return {'params': {'score': found['params']}, 'stats': {}}

  def score(self, params: Params, x: Array, level: Array) -> Array:
    """Gradient of the log-density of noisy images, [b, h, w, c], int [b] -> [b, h, w, c]."""
    field = self.net.apply({'params': params['score']}, x, level)
    return field / self.sigmas[level][:, None, None, None] if self.divide else field

  def updates(self) -> tuple[Update, ...]:
    return (Update('score', ('score',), self.loss),)

  def loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    x = ctx.batch['image']
    level_key, key = jax.random.split(ctx.key)
    level = jax.random.randint(level_key, x.shape[:1], 0, self.net.levels)
    score_fn = lambda y, _: self.score(params, y, level)
    if self.objective == 'sliced':
      options = dict(projections=self.projections, variance_reduced=self.variance_reduced)
      loss = losses.noisy_sliced_score_matching(score_fn, key, x, self.sigmas[level], power=self.power, **options)
    else:
      loss = losses.denoising_score_matching(score_fn, key, x, self.sigmas[level], power=self.power)
    return loss.mean(), Aux({self.objective: loss.mean()})

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    """The denoising loss with weights sigma^2, averaged over all levels, whatever the objective."""
    x = ctx.batch['image']

    def at(level: Array) -> Array:
      levels = jnp.full(x.shape[:1], level)
      score_fn = lambda y, _: self.score(params, y, levels)
      return losses.denoising_score_matching(score_fn, jax.random.fold_in(ctx.key, level), x, self.sigmas[levels])

    return {'denoising': jax.lax.map(at, jnp.arange(self.net.levels)).mean(0)}

  def sample(self, variables: Variables, key: Key, n: int, sampler: str | None = None, temperature: float = 1.0) -> Array:
    """Ends of Langevin chains that start at U[0, 1], clipped to [0, 1].

    Args:
      variables: {'params', 'stats'}.
      key: PRNG key.
      n: number of samples.
      sampler: one of `samplers`; the first by default.
      temperature: factor on the deviation of the chains' noise.

    Returns:
      images [n, h, w, c].
    """
    name = self.sampler(sampler)
    if name == 'single':
      options = dict(levels=slice(-1, None), steps=self.langevin_steps * self.net.levels, eps=self.single_step_size)
    else:
      options = dict(levels=slice(None), steps=self.langevin_steps, eps=self.step_size, denoise=name == 'denoised')
    x = self._chains(variables, key, n, temperature=temperature, **options)
    return jnp.clip(x, 0.0, 1.0)

  def evaluations(self, variables: Variables, sampler: str) -> float:
    """Evaluations of the network that one sample takes."""
    del variables
    return float(self.langevin_steps * self.net.levels + (sampler == 'denoised'))

  def inpaint(self, variables: Variables, x: Array, mask: Array, key: Key) -> Array:
    """Draws the unknown pixels given the known ones, by the sampler 'denoised' with known pixels held at their noisy values.

    Args:
      variables: {'params', 'stats'}.
      x: images [b, h, w, c]; what they hold at unknown pixels is not looked at.
      mask: 1 where a pixel is known, 0 where not; broadcasts to x.
      key: PRNG key.

    Returns:
      images [b, h, w, c] in [0, 1]; those of x where known.
    """
    known = jnp.broadcast_to(mask, x.shape) > 0

    def clamp(y: Array, sigma: Array, key: Key) -> Array:
      return jnp.where(known, x + sigma * jax.random.normal(key, x.shape, x.dtype), y)

    options = dict(levels=slice(None), steps=self.langevin_steps, eps=self.inpainting_step_size, denoise=True)
    drawn = self._chains(variables, key, x.shape[0], clamp=clamp, **options)
    return jnp.where(known, x, jnp.clip(drawn, 0.0, 1.0))

  def _chains(self, variables: Variables, key: Key, n: int, levels: slice, **options: Any) -> Array:
    """n chains over these levels, not clipped."""
    start_key, key = jax.random.split(key)
    x0 = jax.random.uniform(start_key, (n, *self.net.image_shape))
    index = jnp.arange(self.net.levels)[levels]

    def score_fn(x: Array, level: Array, sigma: Array) -> Array:
      del sigma
      return self.score(variables['params'], x, jnp.broadcast_to(index[level], (n,)))

    return samplers.annealed_langevin(score_fn, key, x0, self.sigmas[levels], convention=self.convention, **options)


def build(net: Any, steps: int, **options: Any) -> Score:
  """The method as a config names it; see Score for the options.

  Raises:
    UserError: if an option has a value that cannot be, or the network knows no noise levels.
  """
  del steps
  if not hasattr(net, 'levels') or not hasattr(net, 'image_shape'):
    raise UserError('method.name: score needs a network of noisy images with a number of levels (model.name=ncsn)')
  method = Score(net, **options)
  for key, known in (('objective', OBJECTIVES), ('convention', CONVENTIONS)):
    if getattr(method, key) not in known:
      raise UserError(f'method.{key} is {getattr(method, key)!r}{near(getattr(method, key), known)}')
  for key in ('projections', 'langevin_steps'):
    value = getattr(method, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise UserError(f'method.{key} is {value!r}, need a positive whole number')
  for key in ('start', 'end', 'step_size', 'inpainting_step_size', 'single_step_size'):
    if not getattr(method, key) > 0:
      raise UserError(f'method.{key} is {getattr(method, key)!r}, need a positive number')
  if method.power < 0:
    raise UserError(f'method.power is {method.power!r}, need at least 0')
  if net.levels > 1 and method.start <= method.end or net.levels == 1 and method.start != method.end:
    raise UserError(f'method.start is {method.start}, need more than method.end, {method.end}; the same for a single level')
  return method
