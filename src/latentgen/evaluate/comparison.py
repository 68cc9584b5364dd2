"""Several priors on one frozen network, side by side: one row a prior, one table, one grid.

Each prior is a stage of the recipe. How well it samples is measured in latent and in image space, at the same number of
samples and against the same held-out images; what it costs, by clock and by count.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import statistics
import time

import jax
import numpy as np

from latentgen.errors import UserError, near
from latentgen.evaluate import charts, frechet, likelihood, two_sample
from latentgen.evaluate.base import (
  Findings,
  Picture,
  Result,
  Subject,
  Table,
  average,
  check_count,
  drawn,
  named_key,
  per_example,
  seed_of,
)
from latentgen.evaluate.grids import beside, grid
from latentgen.evaluate.report import number
from latentgen.evaluate.statistics import bootstrap, coverage, frechet as frechet_distance, kernel_distance

NETWORK = ('encoder', 'decoder')
CHANCE = 0.5
COLUMNS = {  # key of a result: (heading, what is best)
  'auroc': ('latent AUROC', 'low'),
  'frechet': ('Fréchet', 'low'),
  'kernel': ('kernel', 'low'),
  'precision': ('precision', 'high'),
  'recall': ('recall', 'high'),
  'density': ('density', None),
  'coverage': ('coverage', 'high'),
  'elbo': ('ELBO, nats', 'high'),
  'iwae': ('log p(x), nats', 'high'),
  'gain': ('gain, nats', 'high'),
  'parameters': ('parameters', None),
  'training': ('training, s', None),
  'sampling': ('s / 1,000 samples', None),
  'evaluations': ('evaluations / sample', None),
}


def run(
  subject: Subject,
  *,
  priors: Sequence[Sequence[str]] | None = None,
  split: str | Sequence[str] = 'test',
  limit: int | None = 5000,
  train_limit: int | None = 20000,
  steps: int = 1500,
  repeats: int = 50,
  neighbours: int = 5,
  likelihood_samples: int = 20,
  likelihood_chunk: int = 10,
  likelihood_limit: int | None = 250,
  timed: int = 1000,
  count: int = 36,
) -> Findings:
  """Compares the priors.

  Args:
    subject: what is evaluated.
    priors: rows (name, stage, ...), the stages that train this prior, the last one last; by default every stage.
    split: held-out images, a name or several; those of image space are of the last one.
    limit: only the first so many images of each split.
    train_limit: see evaluate.frechet, as `steps` and `repeats`.
    neighbours: k of precision, recall, density and coverage.
    likelihood_samples: importance samples of log p(x), where the prior has a density.
    likelihood_chunk: of them at a time.
    likelihood_limit: only the first so many images.
    timed: samples whose drawing is timed, after compilation; the median of three.
    count: samples of each prior in the grid.

  Returns:
    comparison/<prior>/auroc (latent two-sample test), /frechet, /kernel, /precision, /recall, /density, /coverage (features
    of a small classifier), /elbo, /iwae and /gain, log p(x) over that of the first prior (where there is a density),
    /parameters, /evaluations (of the prior's networks, a sample); comparison/real/... for training images in place of
    samples. Table: these, seconds of training and of sampling. Pictures: comparison_samples, of every
    prior; comparison_auroc, with its error.

  Raises:
    UserError: for a bad value, naming the key.
  """
  where = 'config.evaluate.comparison'
  for name, value in (('repeats', repeats), ('neighbours', neighbours), ('timed', timed), ('count', count)):
    check_count(f'{where}.{name}', value)
  chosen = _chosen(subject, where, priors)
  splits = (split,) if isinstance(split, str) else tuple(split)
  kind, embed, test, train, results = frechet.space(subject, 'comparison', splits[-1], limit, train_limit, steps, 32, 20)
  results = {f'comparison/{name}': result for name, result in results.items()}
  reference, n = embed(test), len(test)
  rows = np.random.default_rng(seed_of(named_key(subject.key, 'real'))).permutation(len(train))[:n]
  results |= _images('real', embed(train[rows]), reference, kind, repeats, neighbours, named_key(subject.key, 'real'))
  clock: dict[tuple[str, str], float] = {}
  nats: dict[str, dict[str, np.ndarray]] = {}
  panels = {'held-out images': grid(test[:count])}
  for name, stages in chosen.items():
    mine = dataclasses.replace(subject.stages[stages[-1]](), key=subject.key)
    sampler = mine.method.samplers[0]
    tested = two_sample.run(mine, split=splits, limit=limit, samplers=sampler).results[f'two_sample/{sampler}/auroc']
    results[f'comparison/{name}/auroc'] = tested
    samples = drawn(mine, sampler, max(n, count), named_key(subject.key, 'draw'))
    panels[name] = grid(samples[:count])
    results |= _images(name, embed(samples[:n]), reference, kind, repeats, neighbours, named_key(subject.key, name))
    if mine.method.density:
      bounds = likelihood.terms(mine.method.trace, mine.method.trace, likelihood_samples, likelihood_chunk)
      nats[name] = per_example(mine, 'comparison', bounds, splits[-1], likelihood_limit, axis=-1)
      results |= {f'comparison/{name}/{key}': average(nats[name][key], 'nats') for key in ('elbo', 'iwae')}
      gain = nats[name]['iwae'].astype(np.float64) - next(iter(nats.values()))['iwae']
      results[f'comparison/{name}/gain'] = average(gain, 'nats')
    own = [tree for group, tree in mine.variables['params'].items() if group not in NETWORK]
    size = sum(int(leaf.size) for leaf in jax.tree.leaves(own))
    results[f'comparison/{name}/parameters'] = Result(size, 'parameters', 1)
    results[f'comparison/{name}/evaluations'] = Result(float(mine.method.evaluations(mine.variables, sampler)), 'evaluations', 1)
    clock[name, 'training'] = sum(subject.seconds.get(stage, 0.0) for stage in stages)
    clock[name, 'sampling'] = _seconds(mine, sampler, timed)
  pictures = {
    'comparison_samples': Picture(
      _rows(panels), 'One network, many priors', f'{count} decoder means of each prior, from the same key; not selected.'
    ),
    'comparison_auroc': Picture(
      _chart({name: results[f'comparison/{name}/auroc'] for name in chosen}),
      'Telling posterior from prior latents, by prior',
      'Area under the ROC curve of a fresh classifier on held-out images, with its standard error; dotted: chance.',
    ),
  }
  return Findings(results, pictures, {'comparison': _table(list(chosen), results, clock, kind, n)})


def _chosen(subject: Subject, where: str, priors) -> dict[str, tuple[str, ...]]:
  known = subject.stages
  chosen = {name: tuple(stages) for name, *stages in (zip(known, known) if priors is None else priors)}
  for name, stages in chosen.items():
    if name == 'real' or not stages:
      raise UserError(f'{where}.priors: {name!r} {"is taken" if stages else "names no stage"}')
    for stage in stages:
      if stage not in known:
        raise UserError(f'{where}.priors: {name!r} has no stage {stage!r}{near(stage, known)}')
  return chosen


def _images(name: str, cloud, reference, kind: str, repeats: int, neighbours: int, key) -> dict[str, Result]:
  """Distances between clouds of features [n, d]."""
  seed, n = seed_of(key), len(reference)
  kernel, error = kernel_distance(cloud, reference, 10, seed), bootstrap(frechet_distance, cloud, reference, repeats, seed)
  found = {
    'frechet': Result(frechet_distance(cloud, reference), f'{kind} feature units^2', n, error),
    'kernel': Result(kernel.value, 'squared MMD', n, kernel.stderr),
  }
  for what, value in coverage(reference, cloud, neighbours)._asdict().items():
    found[what] = Result(value, 'share' if what != 'density' else 'balls a sample over k', n)
  return {f'comparison/{name}/{what}': result for what, result in found.items()}


def _seconds(subject: Subject, sampler: str, n: int) -> float:
  """Median seconds of drawing 1,000 samples, compilation left out."""
  size = min(n, subject.batch_size)
  draw = jax.jit(lambda variables, key: subject.method.sample(variables, key, size, sampler))
  taken = []
  for repeat in range(4):
    start = time.perf_counter()
    for i in range(-(-n // size) if repeat else 1):  # the first call compiles
      jax.block_until_ready(draw(subject.variables, jax.random.fold_in(subject.key, i)))
    taken.append(time.perf_counter() - start)
  return statistics.median(taken[1:]) * 1000 / (-(-n // size) * size)


def _table(names: list[str], results: Mapping[str, Result], clock: Mapping, kind: str, n: int) -> Table:
  def value(name: str, key: str) -> float | None:
    found = results.get(f'comparison/{name}/{key}')
    return clock.get((name, key)) if found is None else found.value

  def text(name: str, key: str) -> str:
    found = results.get(f'comparison/{name}/{key}')
    if found is None:
      return f'{clock[name, key]:.3g}' if (name, key) in clock else '–'
    error = f' ± {found.stderr:.2g}' if found.stderr and key not in ('elbo', 'iwae') else ''  # of pairs: see gain
    return number(found.value, found.stderr or 0.01) + error

  bold = set()
  for column, (key, (_, best)) in enumerate(COLUMNS.items(), 1):
    values = {i: value(name, key) for i, name in enumerate(names)}
    values = {i: v for i, v in values.items() if v is not None}
    if best and len(values) > 1:
      ends = min if best == 'low' else max
      bold |= {(i + 1, column) for i, v in values.items() if v == ends(values.values())}
  labels = {'real': 'training images', **{name: name for name in names}}
  rows = [[label, *(text(name, key) for key in COLUMNS)] for name, label in labels.items()]
  caption = (
    'Latent AUROC: how well a fresh classifier tells prior samples from posterior ones of held-out images, 0.5 at chance. '
    f'Fréchet and kernel distance, precision, recall, density and coverage: on {kind.replace("_", " ")} features of {n} decoder '
    'means against as many held-out images; training images set the floor. ELBO and log p(x), an importance-weighted bound, '
    'where the prior has a density; gain: of log p(x) over the first prior, image by image. Evaluations: of the prior’s '
    'networks, a gradient counts as one. Best of each column in bold; differences within the standard errors are noise.'
  )
  columns = ['prior', *(heading for heading, _ in COLUMNS.values())]
  return Table(columns, rows, 'Priors on one frozen network', caption, frozenset(bold))


def _rows(panels: Mapping[str, np.ndarray], across: int = 5) -> np.ndarray:
  """Titled panels, so many side by side."""
  names = list(panels)
  lines = [beside({name: panels[name] for name in names[i : i + across]}) for i in range(0, len(names), across)]
  lines = [line if line.ndim == 3 else np.repeat(line[..., None], 3, -1) for line in lines]
  width = max(line.shape[1] for line in lines)
  return np.concatenate([np.pad(line, ((0, 8), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines])


def _chart(areas: Mapping[str, Result]) -> np.ndarray:
  with charts.style():
    figure, ax = charts.axes(5.2, 0.8 + 0.32 * len(areas))
    places = np.arange(len(areas))[::-1]
    values, errors = zip(*((r.value, r.stderr or 0.0) for r in areas.values()), strict=True)
    ax.errorbar(values, places, xerr=errors, color=charts.COLORS[0], marker='o', ls='')
    ax.axvline(CHANCE, color=charts.INK, lw=0.8, ls=':')
    ax.set(xlabel='latent AUROC', yticks=places, yticklabels=list(areas))
    return charts.pixels(figure)
