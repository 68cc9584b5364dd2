"""Signal-to-noise ratio of the gradient estimators against the number of samples: what K does to each network.

SNR = |E g| / std g over fresh samples at fixed parameters and images. Theory: sqrt(M K) for the generative network; for the
inference network sqrt(M / K) under IWAE, and sqrt(M K) under STL and DReG.

References:
  T. Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018, arXiv 1802.04537, section 3.
  G. Tucker et al., Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, 2018, arXiv 1810.04152.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.errors import UserError
from latentgen.evaluate import charts
from latentgen.evaluate.base import Findings, Picture, Result, Subject, batches, check_choice, check_count, fetch, named_key
from latentgen.train import step as stepping
from latentgen.types import Context

OBJECTIVES = ('vae', 'iwae', 'ciwae', 'stl', 'dreg')


def check(data: Mapping[str, Any], *, method: Any, inner: Sequence[int] = (1, 4), outer: Sequence[int] = (1, 4), **_) -> None:
  """Refuses a method without such estimators, and a slope through fewer than two points."""
  del data
  if not {'objective', 'outer', 'samples'} <= {f.name for f in dataclasses.fields(method)}:
    raise UserError(f"config.evaluate.tasks: 'gradient_snr' needs methods.iwae, not {type(method).__name__}; leave it out")
  for name, values in (('inner', inner), ('outer', outer)):
    if len(values) < 2:
      raise UserError(f'config.evaluate.gradient_snr.{name}: a slope needs at least two values, not {tuple(values)}')


def run(
  subject: Subject,
  *,
  split: str = 'test',
  images: int = 1,
  draws: int = 10_000,
  chunk: int = 100,
  inner: Sequence[int] = (1, 4, 16, 64),
  outer: Sequence[int] = (1, 4, 16, 64),
  objectives: Sequence[str] = ('iwae', 'stl', 'dreg'),
  perturb: float = 0.0,
) -> Findings:
  """Estimates the ratio for every objective, at M = 1 for each K of `inner` and at K = 1 for each M of `outer`.

  Over the parameters p of an update, SNR^2 = sum_p (E g_p)^2 / sum_p Var g_p, with the unbiased estimate of the numerator.

  Args:
    subject: what is evaluated; its method is one with the fields `objective`, `outer` and `samples`, as methods.iwae.
    split: where the images are from.
    images: the gradient is that of so many images together.
    draws: gradients behind every ratio, two or more; it resolves ratios down to about draws^(-1/2).
    chunk: gradients computed at a time; `draws` is rounded up to whole chunks.
    inner: values of K.
    outer: values of M.
    objectives: of the method; M sweeps the first one's miwae.
    perturb: standard deviation of noise that is added to all parameters first, to leave an optimum.

  Returns:
    Findings with gradient_snr/<objective>/<update>/k<K> and gradient_snr/miwae/<update>/m<M> [ratio], the least-squares
    slopes of their logarithms, gradient_snr/<objective>/<update>/slope_k and gradient_snr/miwae/<update>/slope_m, and a picture.

  Raises:
    UserError: for a bad value, naming the key, or a method without such estimators.
  """
  where = 'config.evaluate.gradient_snr'
  for name, value, least in (('images', images, 1), ('draws', draws, 2), ('chunk', chunk, 1)):
    check_count(f'{where}.{name}', value, least)
  for name, values in (('inner', inner), ('outer', outer)):
    for value in values:
      check_count(f'{where}.{name}', value)
  check(subject.data, method=subject.method, inner=inner, outer=outer)
  for objective in objectives:
    check_choice(f'{where}.objectives', objective, OBJECTIVES)
  data_key, raw, _ = next(batches(subject, 'gradient_snr', split, images))
  batch = jax.tree.map(lambda a: a[:images], subject.preprocess(data_key, raw, False))
  params = perturbed(subject.variables['params'], named_key(subject.key, 'perturb'), perturb)
  used = _rounds(draws, chunk) * chunk

  @functools.partial(jax.jit, static_argnums=0)
  def ratios(method, params, key):
    return snr(method, params, subject.variables['stats'], batch, key, draws, chunk)

  settings = [(name, name, 'k', 1, k) for name in objectives for k in inner]
  settings += [('miwae', 'miwae', 'm', m, 1) for m in outer]
  found: dict[tuple[str, str], list[tuple[int, float]]] = {}
  results = {}
  for label, objective, letter, m, k in settings:
    method = dataclasses.replace(subject.method, objective=objective, outer=m, samples=k)
    for update, value in fetch(ratios(method, params, named_key(subject.key, f'{label}/{m}/{k}'))).items():
      number = k if letter == 'k' else m
      results[f'gradient_snr/{label}/{update}/{letter}{number}'] = Result(float(value), 'ratio', used)
      found.setdefault((label, update), []).append((number, float(value)))
  for (label, update), points in found.items():
    letter = 'm' if label == 'miwae' else 'k'
    slope = _slope(points)
    if slope is not None:
      results[f'gradient_snr/{label}/{update}/slope_{letter}'] = Result(slope, 'log ratio / log samples', len(points))
  caption = (
    f'Signal-to-noise ratio of the gradients of each network at fixed parameters, {used} draws a point. '
    'Dotted: slopes of one half, up and down.'
  )
  picture = Picture(_chart(found), 'What more samples do to the gradients', caption)
  return Findings(results, {'gradient_snr': picture})


def perturbed(params, key: jax.Array, deviation: float):
  """params + deviation * N(0, I)."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  noisy = [a + deviation * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, noisy)


def snr(method, params, stats, batch, key: jax.Array, draws: int, chunk: int) -> dict[str, jax.Array]:
  """{update: |E g| / std g} from at least `draws` gradients, in whole chunks; 0 where the mean is lost in the noise."""
  rounds = _rounds(draws, chunk)

  def gradients(key):
    ctx = Context(batch=batch, key=key, step=jnp.zeros((), jnp.int32), stats=stats)
    passes = [stepping.gradients(updates, params, ctx)[0] for updates in stepping.by_loss(method.updates())]
    return {name: grads for found in passes for name, (_, grads) in found.items()}

  def add(i, sums):
    found = jax.vmap(gradients)(jax.random.split(jax.random.fold_in(key, i), chunk))
    moments = jax.tree.map(lambda g: jnp.stack([g.sum(0), jnp.square(g).sum(0)]), found)
    return jax.tree.map(jnp.add, sums, moments)

  shapes = jax.eval_shape(gradients, key)
  sums = jax.lax.fori_loop(0, rounds, add, jax.tree.map(lambda s: jnp.zeros((2, *s.shape)), shapes))
  n = rounds * chunk

  def ratio(tree):
    signal = noise = 0.0
    for total, squares in jax.tree.leaves(tree):
      mean = total / n
      variance = (squares / n - jnp.square(mean)) * (n / (n - 1))
      signal, noise = signal + (jnp.square(mean) - variance / n).sum(), noise + variance.sum()
    return jnp.sqrt(jnp.maximum(signal, 0.0) / noise)

  return {name: ratio(tree) for name, tree in sums.items()}


def _rounds(draws: int, chunk: int) -> int:
  return math.ceil(draws / chunk)


def _slope(points: list[tuple[int, float]]) -> float | None:
  """Least-squares slope of log ratio on log samples; None if some ratio could not be told from zero."""
  if min(value for _, value in points) <= 0:
    return None
  return float(np.polyfit(*np.log(np.asarray(points, np.float64)).T, 1)[0])


def _chart(found: dict[tuple[str, str], list[tuple[int, float]]]) -> np.ndarray:
  with charts.style():
    updates = sorted({update for _, update in found})
    figure, panels = charts.axes(6.4, 2.8 * len(updates), len(updates))
    labels = list(dict.fromkeys(label for label, _ in found))
    for ax, update in zip(np.atleast_1d(panels), updates, strict=True):
      for label, color in zip(labels, charts.COLORS, strict=False):
        points = np.asarray([p for p in found[label, update] if p[1] > 0])
        if len(points):
          name = 'miwae, against M' if label == 'miwae' else f'{label}, against K'
          ax.loglog(*points.T, 'o-', color=color, lw=1.4, ms=4, label=name)
      (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
      middle = math.sqrt(bottom * top)
      for sign in (1, -1):
        line = [middle * (n / math.sqrt(low * high)) ** (0.5 * sign) for n in (low, high)]
        ax.plot([low, high], line, color=charts.INK, lw=0.8, ls=':')
      ax.set(ylim=(bottom, top), xlabel='samples', ylabel='SNR', title=f'{update} network')
      ax.legend(frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5))
    return charts.pixels(figure)
