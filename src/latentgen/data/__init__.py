"""Data sets: one module a set (or a kind of files), each with a `load(**options)` that returns its three splits.

`load('digits')` calls `latentgen.data.digits.load`; a name with a dot is the path of a module elsewhere, so that a new
data set needs no change here: `load('mypackage.galaxies', size=64)`.
"""

from collections.abc import Mapping
import importlib
import inspect
import pkgutil
from types import ModuleType

from latentgen.data.source import ArraySource, RecordSource, Source
from latentgen.errors import UserError, did_you_mean

__all__ = ['SPLITS', 'ArraySource', 'RecordSource', 'Source', 'load', 'names']

SPLITS = ('train', 'valid', 'test')


def names() -> list[str]:
  """Names of the data sets of this package: its modules that have a `load`."""
  modules = [m.name for m in pkgutil.iter_modules(__path__)]
  return sorted(m for m in modules if callable(getattr(importlib.import_module(f'{__name__}.{m}'), 'load', None)))


def load(name: str, **options) -> dict[str, Source]:
  """The splits of a data set.

  Args:
    name: a module of this package ('digits', 'idx', 'npz', 'folder', 'tfds') or the dotted path of any module that
      has a `load`.
    **options: arguments of that module's `load`, as the config's `data` section has them.

  Returns:
    {'train', 'valid', 'test'}: sources of one image shape.

  Raises:
    UserError: no such data set or option, an option missing, or whatever is wrong with the files.
  """
  function = getattr(_module(name), 'load', None)
  if not callable(function):
    raise _unknown(name, f'module {name!r} has no load()' if '.' in name else None)
  _check_options(name, function, options)
  sources = function(**options)
  if not isinstance(sources, Mapping) or not set(SPLITS) <= set(sources):
    raise UserError(f"config.data.name = {name!r}: its load() must return a dict with 'train', 'valid' and 'test'")
  if len({sources[s].shape for s in SPLITS}) != 1:
    shapes = {s: sources[s].shape for s in SPLITS}
    raise UserError(f'config.data.name = {name!r}: splits differ in the shape of an image, {shapes}')
  return dict(sources)


def _module(name: str) -> ModuleType:
  if not isinstance(name, str) or not all(part.isidentifier() for part in name.split('.')):
    raise _unknown(name)
  path = name if '.' in name else f'{__name__}.{name}'
  try:
    return importlib.import_module(path)
  except ModuleNotFoundError as error:
    if error.name and (path == error.name or path.startswith(error.name + '.')):
      raise _unknown(name, f'there is no module {error.name!r}' if '.' in name else None) from None
    raise


def _unknown(name: object, why: str | None = None) -> UserError:
  known = names()
  return UserError(
    f'config.data.name = {name!r} is not a data set'
    + (f' ({why})' if why else '')
    + did_you_mean(name, known)
    + f' (known: {", ".join(known)}, or the dotted path of a module with a load())'
  )


def _check_options(name: str, function, options: Mapping[str, object]) -> None:
  parameters = inspect.signature(function).parameters.values()
  if any(p.kind is p.VAR_KEYWORD for p in parameters):
    return
  known = [p.name for p in parameters]
  for key in options:
    if key not in known:
      raise UserError(
        f'config.data.{key} is not an option of data set {name!r}'
        + did_you_mean(key, known)
        + f' (its options: {", ".join(known) or "none"})'
      )
  for p in parameters:
    if p.default is p.empty and p.name not in options:
      raise UserError(f'config.data.{p.name} is missing: data set {name!r} needs it')
