"""The common form of an evaluation: what a task is given, what it gives back, and the one way it reads a data set.

A task is a module of this package with `run(subject, **options) -> Findings`; its options are `config.evaluate.<task>`.
Everything that is averaged is averaged exactly over a split: the last batch is padded and the padding masked out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from latentgen.data import pipeline
from latentgen.data.labels import all_labels
from latentgen.errors import UserError, near
from latentgen.train.keys import named as named_key

Tree = Any


@dataclasses.dataclass(frozen=True)
class Result:
  """One number: its unit, over how many examples it was taken, and its standard error over those (None: not known)."""

  value: float
  unit: str
  n: int
  stderr: float | None = None


@dataclasses.dataclass
class Picture:
  """A picture to be written and shown: uint8 [H, W, 3], or [H, W] in grey."""

  array: np.ndarray
  title: str
  caption: str = ''


@dataclasses.dataclass
class Table:
  """A table to be written and shown: texts by row and column, some of them set in bold. It may hold what a clock decides."""

  columns: Sequence[str]
  rows: Sequence[Sequence[str]]
  title: str
  caption: str = ''
  bold: frozenset[tuple[int, int]] = frozenset()  # (row, column)


@dataclasses.dataclass
class Findings:
  """What a task found out, by name. Names are unique over all tasks of a run; `results` holds nothing that a clock decides."""

  results: dict[str, Result] = dataclasses.field(default_factory=dict)
  images: dict[str, Picture] = dataclasses.field(default_factory=dict)
  tables: dict[str, Table] = dataclasses.field(default_factory=dict)

  def merge(self, other: 'Findings') -> None:
    """Takes over everything in `other`.

    Raises:
      ValueError: if a name is taken already.
    """
    for mine, theirs in ((self.results, other.results), (self.images, other.images), (self.tables, other.tables)):
      twice = sorted(mine.keys() & theirs.keys())
      if twice:
        raise ValueError(f'two evaluation tasks report the same name: {twice}')
      mine.update(theirs)


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is evaluated.

  Attributes:
    method: a `LatentModel` and `Method` (see `latentgen.types`).
    variables: {'params', 'stats'}, averaged weights where a stage keeps them.
    data: {split: source}; a source has `take(indices) -> {'image': uint8 [n, h, w, c], 'label': [n]}`, `len`, `shape`
      and `num_classes`.
    preprocess: (key, raw batch, train) -> batch with 'image' float32 in [0, 1]; traceable.
    key: typed PRNG key; everything random below follows from it.
    batch_size: examples in one device batch.
    put: host batch -> device arrays (a sharding, where there are several devices).
    stages: {stage of the recipe: the same about that stage}, loaded when called.
    seconds: {stage: how long it was trained}.
  """

  method: Any
  variables: Mapping[str, Any]
  data: Mapping[str, Any]
  preprocess: Callable[..., Mapping[str, jax.Array]]
  key: jax.Array
  batch_size: int = 128
  put: Callable[[Tree], Tree] = jax.device_put
  stages: Mapping[str, Callable[[], 'Subject']] = dataclasses.field(default_factory=dict)
  seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- options


def check_choice(key: str, value: Any, options) -> None:
  if value not in options:
    raise UserError(f'{key}: unknown value {value!r}{near(value, options)}')


def check_count(key: str, value: Any, least: int = 1) -> None:
  """Refuses what is not an integer of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
    raise UserError(f'{key}: must be an integer of at least {least}, not {value!r}')


def check_images(data: Mapping[str, Any], task: str, split: str | Sequence[str], limit: int | None, least: int) -> None:
  """Refuses splits that hold, within `limit` of each, fewer than `least` images."""
  sizes = [len(data[name]) for name in ((split,) if isinstance(split, str) else split)]
  found = sum(size if limit is None else min(size, limit) for size in sizes)
  check_count(f'config.evaluate.{task}.limit (images found)', found, least)


def chosen_samplers(subject: Subject, task: str, names: Any = None) -> tuple[str, ...]:
  """The method's samplers, or those of them that `config.evaluate.<task>.samplers` names."""
  known = tuple(subject.method.samplers)
  if names is None:
    return known
  names = (names,) if isinstance(names, str) else tuple(names)
  for name in names:
    check_choice(f'config.evaluate.{task}.samplers', name, known)
  return names


def hook(subject: Subject, task: str, name: str) -> Callable[..., Any]:
  """A function that only some methods have.

  Raises:
    UserError: if this one has not.
  """
  require(subject.method, task, (name,))
  return getattr(subject.method, name)


def require(method: Any, task: str, names: Sequence[str]) -> None:
  """Refuses a task whose method lacks one of these functions; 'density' is there unless a method denies it.

  A name may be several, joined by ' or ', of which one is enough.
  """
  for name in names:
    if not any(getattr(method, one, one == 'density') for one in name.split(' or ')):
      kind = type(method).__name__
      raise UserError(f'config.evaluate.tasks: {task!r} needs a method with {name!r}, and {kind} has none; leave it out')


# ---------------------------------------------------------------------------------------------- data


def source(subject: Subject, task: str, split: str):
  """The data of a split.

  Raises:
    UserError: if there is no such split, or nothing in it.
  """
  check_choice(f'config.evaluate.{task}.split', split, subject.data)
  if not len(subject.data[split]):
    raise UserError(f'config.evaluate.{task}.split: split {split!r} holds no examples')
  return subject.data[split]


def batches(
  subject: Subject, task: str, split: str, limit: int | None = None
) -> Iterator[tuple[jax.Array, Tree, np.ndarray]]:
  """Runs over the first `limit` examples of a split.

  Yields:
    (key of the batch, raw batch on the device, mask [b] of what is no padding).
  """
  if limit is not None:
    check_count(f'config.evaluate.{task}.limit', limit)
  data, stream = source(subject, task, split), named_key(subject.key, f'data/{split}')
  share = jax.process_index(), jax.process_count()
  for i, (raw, mask) in enumerate(pipeline.evaluation_batches(data, subject.batch_size, limit, *share)):
    if share[1] > 1:
      mask = multihost_utils.process_allgather(mask, tiled=True)
    yield jax.random.fold_in(stream, i), subject.put(raw), np.asarray(mask, bool)


def seed_of(key: jax.Array) -> int:
  """An integer seed for libraries that know no keys."""
  return int(jax.random.randint(key, (), 0, 2**31 - 1))


def fetch(tree: Tree) -> Tree:
  """Device arrays -> numpy arrays, gathered over processes where these hold parts of them."""

  def one(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)

  return jax.tree.map(one, tree)


def per_example(
  subject: Subject, task: str, function: Callable, split: str, limit: int | None = None, axis: int = 0
) -> dict[str, np.ndarray]:
  """Evaluates `function(variables, image [b, h, w, c], key)` on every example of a split.

  Args:
    subject: what is evaluated.
    task: its name, for messages.
    function: traceable; returns {name: array} with the examples along `axis` of each.
    split: name of the split.
    limit: only that many examples.
    axis: where the examples are.

  Returns:
    {name: array} over exactly the n examples of the split, in order; no padding.
  """

  @jax.jit
  def compute(variables, raw, key):
    prepare, run = jax.random.split(key)
    return function(variables, subject.preprocess(prepare, raw, False)['image'], run)

  parts = []
  for key, raw, mask in batches(subject, task, split, limit):
    found = fetch(compute(subject.variables, raw, key))
    parts.append({name: np.compress(mask, value, axis=axis) for name, value in found.items()})
  return {name: np.concatenate([part[name] for part in parts], axis) for name in parts[0]}


def labels(subject: Subject, task: str, split: str, limit: int | None = None) -> np.ndarray:
  """Labels int32 [n] of what `per_example` visits, all of them known.

  Raises:
    UserError: if the data have none, or not for all images (`labelled` gives those that have one).
  """
  found = _known_labels(subject, task, split, limit)
  if unknown := int((found < 0).sum()):
    raise UserError(
      f'config.evaluate.tasks: {task!r} needs the labels of split {split!r}, and {unknown} of its {len(found)} images have'
      ' none (config.data.labels_per_class); take another split, or leave it out'
    )
  return found


def labelled(subject: Subject, task: str, split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """(rows int64 [m] of what `per_example` visits that have a label, their labels int32 [m]); no image twice.

  Raises:
    UserError: if there are none.
  """
  found = _known_labels(subject, task, split, limit)
  found = found[: getattr(subject.data[split], 'distinct', len(found))]
  rows = np.flatnonzero(found >= 0)
  return rows, found[rows]


def _known_labels(subject: Subject, task: str, split: str, limit: int | None) -> np.ndarray:
  data = source(subject, task, split)
  found = all_labels(data, limit) if data.num_classes else np.empty(0, np.int32)
  if not (found >= 0).any():
    raise UserError(f'config.evaluate.tasks: {task!r} needs labels, and split {split!r} has none; leave it out')
  return found


def codes(subject: Subject, task: str, split: str, limit: int | None = None) -> np.ndarray:
  """What the encoder makes of the images of a split: posterior means, float32 [n, d] over all groups.

  Groups below the first are conditioned on one sample of those above; where the posterior is no Gaussian, its sample
  stands for its mean.
  """

  def encode(variables, x, key):
    trace = subject.method.trace(variables, x, key, 1)
    levels = trace.z if trace.posterior is None else [q.loc for q in trace.posterior]
    rows = [z[:, 0].swapaxes(0, 1).reshape(x.shape[0], -1) for z in levels]
    return {'codes': jnp.concatenate(rows, -1)}

  return per_example(subject, task, encode, split, limit)['codes']


def simulations(
  subject: Subject, sampler: str | None, n: int, read: Callable, key: jax.Array, temperature: float = 1.0
) -> Tree:
  """Draws n samples in equal batches and keeps `read(trace)` of each: a tree of numpy arrays [n, ...].

  Args:
    subject: what is evaluated.
    sampler: name of a sampler of the method; None is its default.
    n: how many.
    read: traceable; Trace of a batch -> tree of arrays with the samples on the first axis.
    key: PRNG key.
    temperature: scale of the base prior's deviations.
  """
  size = min(n, subject.batch_size)

  @jax.jit
  def draw(variables, key):
    return read(subject.method.simulate(variables, key, size, sampler=sampler, temperature=temperature))

  parts = [fetch(draw(subject.variables, jax.random.fold_in(key, i))) for i in range(math.ceil(n / size))]
  return jax.tree.map(lambda *a: np.concatenate(a)[:n], *parts)


def class_above(label: jax.Array | None, fixed: Any, key: jax.Array) -> dict[str, jax.Array]:
  """What tells `simulate` the class of a pass that keeps the top `fixed` groups of a trace: it belongs to the uppermost latents.

  Args:
    label: of the trace, one-hot [b, classes]; None where the network has no classes.
    fixed: how many groups are kept; may be traced.
    key: of the draw from p(y), uniform, where none is.

  Returns:
    {'label': [b, classes]}; {} without classes.
  """
  if label is None:
    return {}
  n, classes = label.shape
  fresh = jax.nn.one_hot(jax.random.randint(key, (n,), 0, classes), classes, dtype=label.dtype)
  return {'label': jnp.where(fixed > 0, label, fresh)}


def drawn(subject: Subject, sampler: str | None, n: int, key: jax.Array, temperature: float = 1.0) -> np.ndarray:
  """n images of a sampler, decoder means, [n, h, w, c]; of any method, latents or none. Arguments as in `simulations`."""
  if hasattr(subject.method, 'simulate'):
    return simulations(subject, sampler, n, lambda trace: trace.px.mean[0], key, temperature)
  size = min(n, subject.batch_size)
  draw = jax.jit(lambda variables, key: subject.method.sample(variables, key, size, sampler, temperature))
  parts = [fetch(draw(subject.variables, jax.random.fold_in(key, i))) for i in range(math.ceil(n / size))]
  return np.concatenate(parts)[:n]


# ---------------------------------------------------------------------------------------------- numbers


def average(values: np.ndarray, unit: str) -> Result:
  """Mean over the examples [n] in float64, with its standard error s / sqrt(n)."""
  values = np.asarray(values, np.float64)
  n = len(values)
  return Result(float(values.mean()), unit, n, float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None)

