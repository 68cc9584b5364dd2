"""Pictures: samples of every sampler, reconstructions, temperatures, and what each level of the hierarchy decides.

All from the subject's key, so that pictures of two runs differ by the models alone.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.errors import UserError
from latentgen.evaluate.base import (
  Findings,
  Picture,
  Subject,
  batches,
  check_choice,
  check_count,
  chosen_samplers,
  class_above,
  drawn,
  fetch,
  named_key,
)
from latentgen.evaluate.grids import beside, grid, interleave

PARTS = ('samplers', 'reconstructions', 'temperatures', 'levels')


def run(
  subject: Subject,
  *,
  split: str = 'test',
  count: int = 64,
  samplers: Sequence[str] | None = None,
  temperatures: Sequence[float] = (0.6, 0.8, 1.0),
  images: int = 8,
  columns: int = 8,
  readjust_batches: int = 50,
  parts: Sequence[str] = PARTS,
) -> Findings:
  """Draws the pictures.

  Args:
    subject: what is evaluated.
    split: images that are reconstructed and resampled.
    count: samples in a grid.
    samplers: names; all the method has by default, the base prior first.
    temperatures: factors on the base prior's deviations, for the default sampler; none: no such picture.
    images: rows of the resampling picture; four times as many are reconstructed.
    columns: at most so many columns in the resampling picture.
    readjust_batches: batches of prior samples from which a method with `readjust` takes new BatchNorm statistics at
      every temperature but 1; 0: none.
    parts: which pictures, of PARTS; a method without latents has samples alone.

  Returns:
    Pictures before_after (only where there are several samplers), samples_<sampler>, reconstructions, temperatures,
    levels (only where there are several groups).

  Raises:
    UserError: for a bad value, naming the key.
  """
  where = 'config.evaluate.samples'
  for name, value, least in (
    ('count', count, 1), ('images', images, 1), ('columns', columns, 2), ('readjust_batches', readjust_batches, 0)
  ):  # fmt: skip
    check_count(f'{where}.{name}', value, least)
  for part in parts:
    check_choice(f'{where}.parts', part, PARTS)
  for t in temperatures:
    if isinstance(t, bool) or not isinstance(t, (int, float)) or not t > 0:
      raise UserError(f'{where}.temperatures: must be positive numbers, not {t!r}')
  names = sorted(chosen_samplers(subject, 'samples', samplers), key=lambda name: name != 'base')
  pictures: dict[str, Picture] = {}
  if 'samplers' in parts:
    _samplers(subject, names, count, pictures)
  if 'temperatures' in parts and len(temperatures):
    _temperatures(subject, tuple(temperatures), min(count, 36), readjust_batches, pictures)
  latents = hasattr(subject.method, 'trace')
  if 'reconstructions' in parts and latents:
    _reconstructions(subject, split, 4 * images, pictures)
  if 'levels' in parts and latents:
    _levels(subject, split, images, columns, pictures)
  return Findings(images=pictures)


def _means(subject: Subject, sampler: str | None, n: int, temperature: float = 1.0) -> np.ndarray:
  """Decoder means [n, h, w, c], from the same key whatever the sampler and the temperature."""
  return drawn(subject, sampler, n, named_key(subject.key, 'draw'), temperature)


def _samplers(subject: Subject, names: Sequence[str], count: int, pictures: dict[str, Picture]) -> None:
  grids = {name: grid(_means(subject, name, count)) for name in names}
  if len(grids) > 1:
    pictures['before_after'] = Picture(
      beside({'before: base' if name == 'base' else f'after: {name}': array for name, array in grids.items()}),
      'Samples of the base prior and of the learned one' if 'base' in grids else 'Samples by sampler',
      f'{count} decoder means a sampler ({", ".join(grids)}), from the same key; not selected.',
    )
  for name, array in grids.items():
    pictures[f'samples_{name}'] = Picture(array, f'Samples: {name}', f'{count} decoder means, not selected.')


def _temperatures(
  subject: Subject, temperatures: Sequence[float], count: int, batches: int, pictures: dict[str, Picture]
) -> None:
  panels = {}
  for t in temperatures:
    variables, readjust = subject.variables, getattr(subject.method, 'readjust', None)
    if readjust is not None and batches and t != 1:
      again = jax.jit(lambda variables, key, t=t: readjust(variables, key, t, batches))
      variables = again(variables, named_key(subject.key, 'readjust'))
    at = dataclasses.replace(subject, variables=variables)
    panels[f'temperature {t:g}'] = grid(_means(at, None, count, float(t)))
  default = subject.method.samplers[0]
  pictures['temperatures'] = Picture(
    beside(panels),
    'Samples by temperature',
    f'Sampler {default}; every deviation of the base prior times the temperature, everything else equal.',
  )


def _first(subject: Subject, split: str, n: int) -> tuple[jax.Array, int, jax.Array]:
  """(images [b, h, w, c] of the first batch, how many of them count, key)."""
  key, raw, mask = next(batches(subject, 'samples', split))
  return subject.preprocess(key, raw, False)['image'], min(n, int(mask.sum())), named_key(key, 'posterior')


def _reconstructions(subject: Subject, split: str, n: int, pictures: dict[str, Picture]) -> None:
  x, n, key = _first(subject, split, n)
  mean = jax.jit(lambda variables, x, key: subject.method.trace(variables, x, key, 1).px.mean[0])
  x, mean = fetch((x, mean(subject.variables, x, key)))
  pairs = min(4, n)
  pictures['reconstructions'] = Picture(
    grid(interleave(x[:n], mean[:n]), 2 * pairs),
    'Reconstructions',
    f'The first {n} images of {split}, in pairs: original, and decoder mean at one posterior sample.',
  )


def _levels(subject: Subject, split: str, n: int, columns: int, pictures: dict[str, Picture]) -> None:
  x, n, key = _first(subject, split, n)

  @jax.jit
  def infer(variables, x, key):
    trace = subject.method.trace(variables, x, key, 1)
    return jax.tree.map(lambda z: z[:, 0], trace.z), None if trace.label is None else trace.label[0]

  z, label = infer(subject.variables, x, key)  # per level [g, b, ...]; [b, classes] or None
  total = sum(level.shape[0] for level in z)
  if total < 2:
    return
  starts = np.cumsum([0, *(level.shape[0] for level in z)])
  size = x.shape[0]

  @jax.jit
  def resample(variables, z, label, fixed, key):
    def choose(level, group, prior, context, key):
      del context
      drawn = prior.sample(key)
      return jnp.where(int(starts[level]) + group < fixed, z[level][group].astype(drawn.dtype), drawn)

    given = class_above(label, fixed, named_key(key, 'class'))
    return subject.method.simulate(variables, key, size, choose=choose, **given).px.mean[0]

  shown = np.unique(np.rint(np.linspace(total, 0, min(columns, total + 1))).astype(int))[::-1]
  key = named_key(subject.key, 'resample')
  cells = [fetch(resample(subject.variables, z, label, jnp.int32(fixed), key))[:n] for fixed in shown]
  pictures['levels'] = Picture(
    grid(interleave(fetch(x)[:n], *cells), len(shown) + 1),
    'What each level decides',
    f'A row is an image of {split}. First the original; then decoder means with the top {", ".join(map(str, shown))} '
    f'of {total} groups fixed to a posterior sample and all groups below drawn from the base prior.',
  )
