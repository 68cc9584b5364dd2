"""Evaluation: tasks over a trained method, the results they write, and the report that shows them.

    findings = run_all(subject, {'likelihood': {'samples': 1000}, 'two_sample': {}})

A task is a module of this package with `run(subject, **options) -> Findings`, and `NEEDS`, the functions that it needs of
a method, where there are any; a new one is a new file.
"""

from collections.abc import Mapping
import dataclasses
import importlib
import inspect
import pkgutil
from typing import Any

import threadpoolctl  # comes with scikit-learn

from latentgen.errors import UserError
from latentgen.evaluate.base import Findings, Picture, Result, Subject, Table, check_count, named_key, near, require
from latentgen.evaluate.writing import write_pictures, write_results, write_tables

__all__ = [
  'Findings', 'Picture', 'Result', 'Subject', 'Table', 'check_subject', 'check_tasks', 'run_all', 'write_pictures',
  'write_results', 'write_tables',
]  # fmt: skip

_NO_TASK = ('base', 'charts', 'features', 'grids', 'outliers', 'report', 'statistics', 'writing')  # the other modules here


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
    parameters = inspect.signature(task_module(task).run).parameters
    known = list(parameters)[1:]
    for option, value in (options or {}).items():
      key = f'config.evaluate.{task}.{option}'
      if option not in known:
        raise UserError(f'{key}: unknown option{near(option, known)}')
      if type(parameters[option].default) is int and value is not None:  # all whole numbers here are counts
        check_count(key, value)


def check_subject(tasks: Mapping[str, Mapping[str, Any]], data: Mapping[str, Any], method: Any) -> None:
  """Refuses, before anything is trained, tasks that cannot work on this method or these data.

  A task names what it `NEEDS` of a method, and may look at the data by `check(data, **options)`.

  Args:
    tasks: {task: its options}.
    data: {split: source}.
    method: what is evaluated.

  Raises:
    UserError: what the task cannot work with.
  """
  for task, options in tasks.items():
    require(method, task, getattr(task_module(task), 'NEEDS', ()))
    check = getattr(task_module(task), 'check', None)
    if check is not None:
      check(data, **dict(options or {}))


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
