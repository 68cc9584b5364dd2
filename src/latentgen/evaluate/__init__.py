"""Evaluation: tasks over a trained method, the results they write, and the report that shows them.

    findings = run_all(subject, {'likelihood': {'samples': 1000}, 'two_sample': {}})

A task is a module of this package with `run(subject, **options) -> Findings`, and `NEEDS`, the functions that it needs of
a method, where there are any; a new one is a new file. Options are checked before anything is trained: their types by the
annotations of `run`, and texts against the tuple that the module holds under the option's name in capitals (`parts`: PARTS,
`unit`: UNITS). Names mean the same in every task: `split` and `samplers` are those of the run, `stages` of its recipe.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from typing import Any

import threadpoolctl  # comes with scikit-learn

from latentgen.errors import UserError, near
from latentgen.evaluate.base import (
  Findings, Picture, Result, Subject, Table, check_choice, check_count, named_key, require,
)  # fmt: skip
from latentgen.evaluate.writing import write_pictures, write_results, write_tables

__all__ = [
  'Findings', 'Picture', 'Result', 'Subject', 'Table', 'check_subject', 'check_tasks', 'run_all', 'write_pictures',
  'write_results', 'write_tables',
]  # fmt: skip

_NO_TASK = ('base', 'charts', 'features', 'grids', 'outliers', 'report', 'statistics', 'writing')  # the other modules here
_LEAST = {  # of whole numbers, where it is not 1
  'folds': 2, 'blocks': 2, 'repeats': 2, 'bins': 2, 'factor': 2, 'readjust_batches': 0,
  'samples.columns': 2, 'latent_space.columns': 2, 'probe.draws': 2, 'gradient_snr.draws': 2,
}  # fmt: skip
_POSITIVE = ('temperatures', 'deviations', 'noise', 'inverse_penalty')


def names() -> tuple[str, ...]:
  """The tasks there are, by name."""
  return tuple(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NO_TASK)


def task_module(name: str):
  """The module of a task.

  Raises:
    UserError: if there is none of that name.
  """
  if name not in names():
    raise UserError(f'config.evaluate.tasks: no task {name!r}{near(name, names())}')
  return importlib.import_module(f'{__name__}.{name}')


def check_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> None:
  """Refuses unknown tasks and options, before anything is trained.

  Args:
    tasks: {task: its options}.

  Raises:
    UserError: naming the key and what comes close to it.
  """
  for task, options in tasks.items():
    module = task_module(task)
    parameters = inspect.signature(module.run).parameters
    known = list(parameters)[1:]
    for option, value in (options or {}).items():
      key = f'config.evaluate.{task}.{option}'
      if option not in known:
        raise UserError(f'{key}: unknown option{near(option, known)}')
      choices = getattr(module, option.upper(), getattr(module, f'{option.upper()}S', None))
      _check_option(key, value, parameters[option].annotation, choices)


def _check_option(key: str, value: Any, kind: Any, choices: tuple[str, ...] | None) -> None:
  """That a value is of the type that the task has for it, and in the range that goes with its name."""
  *_, task, option = key.split('.')
  if option == 'samplers' and isinstance(value, str):
    return
  if not _fits(value, kind):
    need = inspect.formatannotation(kind).replace('collections.abc.Sequence', 'tuple')
    raise UserError(f'{key}: must be {need}, not {value!r}')
  for one in value if isinstance(value, (tuple, list)) else (value,):
    if option in _POSITIVE and not one > 0:
      raise UserError(f'{key}: must be positive, not {one!r}')
    if type(one) is int and option not in _POSITIVE and kind is not float:  # all whole numbers here are counts
      check_count(key, one, _LEAST.get(f'{task}.{option}', _LEAST.get(option, 1)))
    if choices is not None and isinstance(one, str):
      check_choice(key, one, choices)


def _fits(value: Any, kind: Any) -> bool:
  """Whether a value is of the type of an annotation, of those that options have."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, one) for one in inner)
  if origin in (tuple, Sequence):
    return isinstance(value, (tuple, list)) and all(_fits(one, inner[0]) for one in value)
  if kind is float:
    return type(value) in (int, float)
  return type(value) is kind if kind in (int, str, types.NoneType) else True


def check_subject(
  tasks: Mapping[str, Mapping[str, Any]],
  data: Mapping[str, Any],
  method: Any,
  stages: Sequence[str] = (),
  trace: Callable[[], Any] | None = None,
) -> None:
  """Refuses, before anything is trained, tasks that cannot work on this method or these data.

  A task names what it `NEEDS` of a method, whether it needs `LABELS`, and may look at more by
  `check(data, method=method, trace=trace, **options)`.

  Args:
    tasks: {task: its options}, which `check_tasks` has checked.
    data: {split: source}.
    method: what is evaluated.
    stages: of the recipe.
    trace: gives `method.trace` of a batch by its shapes.

  Raises:
    UserError: what the task cannot work with.
  """
  for task, options in tasks.items():
    module, where = task_module(task), f'config.evaluate.{task}'
    options = dict(options or {})
    require(method, task, getattr(module, 'NEEDS', ()))
    for split in _several(options.get('split', 'test')):
      check_choice(f'{where}.split', split, data)
      if getattr(module, 'LABELS', False) and not data[split].num_classes:
        raise UserError(f'config.evaluate.tasks: {task!r} needs labels, and split {split!r} has none; leave it out')
    for name in _several(options.get('samplers') or ()):
      check_choice(f'{where}.samplers', name, method.samplers)
    for name in options.get('stages', ()):
      check_choice(f'{where}.stages', name, stages)
    for name in [stage for row in options.get('priors') or () for stage in row[1:]]:
      check_choice(f'{where}.priors', name, stages)
    check = getattr(module, 'check', None)
    if check is not None:
      check(data, method=method, trace=trace, **options)


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
  return (names,) if isinstance(names, str) else tuple(names)


def run_all(subject: Subject, tasks: Mapping[str, Mapping[str, Any]]) -> Findings:
  """Runs tasks on one subject.

  Every task gets a key of its own, folded from the subject's by the task's name: what it finds depends neither on the
  order of the tasks nor on which others there are.

  Args:
    subject: what is evaluated.
    tasks: {task: its options}, as in `config.evaluate`.

  Returns:
    All findings together.

  Raises:
    UserError: for an unknown task or option, or a bad value.
  """
  check_tasks(tasks)
  findings = Findings()
  # One thread for numpy and scikit-learn: sums in one order on any number of cores, no contention on shared ones.
  with threadpoolctl.threadpool_limits(1):
    for task, options in tasks.items():
      require(subject.method, task, getattr(task_module(task), 'NEEDS', ()))
      mine = dataclasses.replace(subject, key=named_key(subject.key, task))
      findings.merge(task_module(task).run(mine, **dict(options or {})))
  return findings
