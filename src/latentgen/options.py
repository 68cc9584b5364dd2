"""What a config names, called with the options that it gives.

Names are module paths: `model.name = 'nvae'` is `latentgen.nets.nvae`, a dotted name is a module of the user's own; each
such module offers `build`. Options are checked against the signature of what they configure.
"""

from collections.abc import Callable, Mapping
import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import types
from types import ModuleType
import typing
from typing import Any

from latentgen.errors import UserError, near, one_line


def module(package: str, name: str, where: str, attribute: str = 'build') -> ModuleType:
  """The module that a config names, from `package` or the user's own dotted path.

  Raises:
    UserError: no such module, or it lacks `attribute`.
  """
  path = name if '.' in name else f'{package}.{name}'
  if all(part.isidentifier() for part in path.split('.')):
    try:
      if importlib.util.find_spec(path) is not None:
        found = importlib.import_module(path)
        if hasattr(found, attribute):
          return found
    except Exception as error:  # a module of the user's may fail in any way
      if not isinstance(error, ModuleNotFoundError) or error.name and not path.startswith(error.name):
        raise UserError(f'{where} = {name!r} cannot be imported: {one_line(error)}') from error
  home = importlib.import_module(package)
  names = [m.name for m in pkgutil.iter_modules(home.__path__) if not m.name.startswith('_')]
  names = [n for n in names if hasattr(importlib.import_module(f'{package}.{n}'), attribute)]
  raise UserError(f'{where} = {name!r} is no module of {package} with {attribute}(){near(name, names)}')


def call(function: Callable[..., Any], where: str, options: Mapping[str, Any], *fixed: Any) -> Any:
  """function(*fixed, **options), with unknown and missing options reported as config keys.

  A `**options` parameter takes the fields of the dataclass that the function returns.
  """
  signature = inspect.signature(function)
  parameters = list(signature.parameters.values())[len(fixed) :]
  result = None
  known = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
  if any(p.kind == p.VAR_KEYWORD for p in parameters):
    result = typing.get_type_hints(function).get('return')
    taken = set(list(signature.parameters)[: len(fixed)])
    if dataclasses.is_dataclass(result):
      known |= {f.name for f in dataclasses.fields(result) if f.init} - {'parent', 'name'} - taken
  hints = _hints(function, dataclasses.is_dataclass(result) and result)
  for name, value in options.items():
    if name not in known:
      raise UserError(f'{where}.{name} does not exist{near(name, known)}')
    if name in hints and not _fits(value, hints[name]):
      raise UserError(f'{where}.{name} is {value!r}, need {getattr(hints[name], "__name__", hints[name])}')
  for p in parameters:
    if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty and p.name not in options:
      raise UserError(f'{where}.{p.name} is missing')
  return built(where, function, *fixed, **options)


def _hints(function: Callable[..., Any], result: Any) -> dict[str, Any]:
  """Types of the arguments of a function and, where its **options are those, of the fields of what it returns."""
  try:
    return {**(typing.get_type_hints(result) if result else {}), **typing.get_type_hints(function)}
  except Exception:  # hints that nobody has evaluated yet
    return {}


def _fits(value: Any, hint: Any) -> bool:
  """Whether a value of a config is of a type, as far as that is one of the plain types of configs."""
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, one) for one in inner)
  if origin is tuple:
    every = inner[0] if len(inner) == 2 and inner[1] is ... else Any
    return isinstance(value, (tuple, list)) and all(_fits(one, every) for one in value)
  if hint is float:
    return type(value) in (int, float)
  return type(value) is hint if hint in (int, bool, str, types.NoneType) else True


def built(where_: str, function_: Callable[..., Any], *fixed: Any, **options: Any) -> Any:
  """function(*fixed, **options); what it raises is a `UserError` that starts with the config key of the options."""
  try:
    return function_(*fixed, **options)
  except UserError as error:
    text, parts = str(error), where_.split('.')
    tails = ['.'.join(parts[i:]) for i in range(1, len(parts))]  # from the longest
    tail = next((tail for tail in tails if text.startswith(f'{tail}.')), '')
    relative = where_.removesuffix(tail) + text if tail else f'{where_}: {text}'
    raise UserError(text if 'config.' in text else relative) from error
  except Exception as error:  # a value of the wrong type or size, found out wherever it is used
    raise UserError(f'{where_}: {one_line(error)}') from error


def split_name(options: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
  if not isinstance(options, Mapping):
    raise UserError(f'{where} is {options!r}, need a section of named keys')
  options = dict(options)
  if not isinstance(options.get('name'), str) or not options['name']:
    raise UserError(f'{where}.name is missing')
  return options.pop('name'), options
