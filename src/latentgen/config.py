"""Config files, their variants and overrides. A config is plain data (ml_collections.ConfigDict)."""

import ast
from collections.abc import Mapping
import dataclasses
import difflib
import fnmatch
import importlib
import importlib.util
import inspect
import pathlib
import sys
from types import ModuleType
from typing import Any
import warnings

from ml_collections import ConfigDict

from latentgen.errors import UserError, near, one_line
from latentgen.sections import DEBUG, flatten, plain

OPEN = ('data', 'model', 'train', 'mesh', 'evaluate.*', 'stages.*.method', 'stages.*.method.prior', 'stages.*.optim.*')
# sections whose options belong to what they configure, which checks them itself
NAMED = ('evaluate.*', 'stages.*.ema', 'stages.*.load')  # likewise, and any two of their names may be near each other


@dataclasses.dataclass(frozen=True)
class File:
  """An experiment file with the variant that was asked for."""

  path: pathlib.Path
  variant: str
  module: ModuleType

  @property
  def name(self) -> str:
    return self.path.stem + (f'-{self.variant}' if self.variant else '')


def load(spec: str) -> tuple[File, ConfigDict]:
  """Loads 'path.py' or 'path.py:variant'.

  Raises:
    UserError: no such file, no `get_config` in it, an error in it, or an unknown variant.
  """
  name, _, variant = spec.partition(':')
  path = pathlib.Path(name)
  try:
    there = path.is_file()
    known = [p for folder in dict.fromkeys((path.parent, pathlib.Path('experiments'))) for p in sorted(folder.glob('*.py'))]
  except OSError as error:
    raise UserError(f'--config: {name!r} cannot be looked up ({error.strerror}); give the path of a file') from error
  if not there:
    same = [p.as_posix() for p in known if p.stem == path.stem]
    hint = f'; did you mean {same[0]!r}?' if same else near(name, map(str, known)) if known else ''
    raise UserError(f'--config: there is no file {name!r}{hint}')
  loader = importlib.util.spec_from_file_location(f'latentgen_experiment_{path.stem}', path)
  if loader is None:
    raise UserError(f'--config: {name!r} is not a Python file')
  module = importlib.util.module_from_spec(loader)
  sys.path.insert(0, str(path.parent.absolute()))  # an experiment may build on its neighbours
  try:
    loader.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    raise UserError(f'--config: {name} cannot be loaded: {one_line(error)}') from error
  finally:
    sys.path.pop(0)
  if not callable(getattr(module, 'get_config', None)):
    raise UserError(f'--config: {name} defines no get_config(variant)')
  variants = getattr(module, 'VARIANTS', ())
  if not isinstance(variants, (tuple, list)) or not all(isinstance(v, str) for v in variants):
    raise UserError(f'--config: {name}: VARIANTS is {variants!r}, need a tuple of names')
  variants = ('', *variants)
  if variant not in variants:
    raise UserError(f'--config: {name} has no variant {variant!r}{near(variant, variants[1:])}')
  try:
    config = module.get_config(variant)
    if isinstance(config, ConfigDict):
      config = _unshared(config)
      config.debug = ConfigDict({**DEBUG, **config.get('debug', {})})
    plain(config)  # references that lead nowhere show here
  except (Exception, SystemExit) as error:
    raise UserError(f'--config: {name}: get_config({variant!r}) failed: {one_line(error)}') from error
  if not isinstance(config, ConfigDict):
    got = type(config).__name__
    raise UserError(f'--config: {name}: get_config({variant!r}) returned {got}, need an ml_collections.ConfigDict')
  return File(path, variant, module), config.lock()


def _unshared(config: ConfigDict) -> ConfigDict:
  """A copy in which two sections that are one dict are two, so that setting a key of one leaves the other; references stay."""
  copy = ConfigDict()
  for key, value in config.items(preserve_field_references=True):
    copy[key] = _unshared(value) if isinstance(value, ConfigDict) else value
  return copy


def override(config: ConfigDict, values: Mapping[str, Any]) -> None:
  """Sets dotted keys in place; texts are read as Python literals of the type that the key has.

  A section in OPEN also takes keys that the file does not set, unless they look like a misspelt one; one in NAMED takes all.
  What a file may leave out can be set as if it were there: the options of any task, `best` of a stage and the like. Naming
  another data set drops the options of the one before.

  Raises:
    UserError: an unknown key (with the near miss) or a value of another type.
  """
  data = config.get('data')
  if not isinstance(data, ConfigDict):
    raise UserError(f'config.data is {data!r}, need a section of named keys')
  if values.get('data.name', data.get('name')) != data.get('name'):
    _drop_source_options(data)
  for key, value in values.items():
    *parents, last = key.split('.')
    node = config
    for i, part in enumerate(parents):
      path = '.'.join(parents[: i + 1])
      if isinstance(node, ConfigDict) and part not in node and _left_out(config).get(path):
        _set(node, path, part, ConfigDict())
      if not isinstance(node, ConfigDict) or part not in node:
        _unknown(path, config)
      node = node[part]
    if not isinstance(node, ConfigDict):
      _unknown(key, config)
    if last not in node:
      inside = lambda patterns, path='.'.join(parents): any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
      free = inside(OPEN) and not difflib.get_close_matches(last, node, n=1, cutoff=0.75)
      if not free and not inside(NAMED):
        section = _left_out(config).get(key)
        if section is None:
          _unknown(key, config)
        if section:
          raise UserError(f'config.{key} is a section; set one of its keys')
      _set(node, key, last, _literal(value))
      continue
    if isinstance(node[last], ConfigDict):
      raise UserError(f'config.{key} is a section; set one of its keys: {", ".join(node[last])}')
    _set(node, key, last, _coerce(key, value, node[last]))


def _left_out(config: ConfigDict) -> dict[str, bool]:
  """{key that a file may leave out: whether it is a section}."""
  from latentgen.evaluate import names

  tasks = [f'evaluate.{name}' for name in names()]
  stages = config.get('stages')
  stages = [f'stages.{name}' for name in stages] if isinstance(stages, ConfigDict) else []
  keys = ['image_shape', 'seed', 'evaluate.tasks', *(f'{stage}.{key}' for stage in stages for key in ('best', 'patience_steps'))]
  sections = ['evaluate', 'mesh', 'train', *tasks, *(f'{stage}.{key}' for stage in stages for key in ('ema', 'load'))]
  return dict.fromkeys(keys, False) | dict.fromkeys(sections, True)


def _set(node: ConfigDict, key: str, last: str, value: Any) -> None:
  try:
    with node.unlocked():
      node[last] = value
  except (KeyError, TypeError, ValueError) as error:  # names and types that a ConfigDict does not take
    raise UserError(f'config.{key} cannot be set to {value!r}: {one_line(error)}') from error


def _unknown(key: str, config: ConfigDict) -> None:
  leaves = [*flatten(config), *_left_out(config)]
  known = sorted({'.'.join(parts[: i + 1]) for parts in (leaf.split('.') for leaf in leaves) for i in range(len(parts))})
  parent, _, last = key.rpartition('.')
  beside = {name.rpartition('.')[2]: name for name in known if name.rpartition('.')[0] == parent}
  close = []
  anywhere = {name.rpartition('.')[2]: name for name in sorted(known, key=lambda name: -name.count('.'))}  # outermost of a name
  for names in (beside, anywhere):
    close = close or [names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.6)]
  hint = f'; did you mean config.{close[0]}?' if close else f'; known: {", ".join(beside or config)}'
  raise UserError(f'config.{key} does not exist{hint}')


def _drop_source_options(data: ConfigDict) -> None:
  from latentgen.data import labels, preprocess

  kept = {'name', 'batch_size', *labels.OPTIONS, *inspect.signature(preprocess.make).parameters}
  with data.unlocked():
    for key in set(data) - kept:
      del data[key]


def _literal(value: Any) -> Any:
  """A Python literal if the text is one, else the text."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of the compiler, about texts that are none
      return ast.literal_eval({'true': 'True', 'false': 'False', 'none': 'None'}.get(value.lower(), value))
  except (ValueError, SyntaxError, AttributeError, TypeError, MemoryError, RecursionError):  # deep nesting is text, too
    return value


def _coerce(key: str, value: Any, old: Any) -> Any:
  if isinstance(value, str) and not isinstance(old, str):
    value = _literal(value)
  if old is None or value is None:
    return value
  if isinstance(old, bool) or isinstance(value, bool):
    good = isinstance(old, bool) and isinstance(value, bool)
  elif isinstance(old, float):
    good = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    value = float(value) if good else value
  elif isinstance(old, (tuple, list)):
    value = (value,) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else value
    good = isinstance(value, (tuple, list))
    value = tuple(value) if good else value
  else:
    good = isinstance(value, type(old))
  if not good:
    finite = ' a finite one' if isinstance(old, float) and type(value) in (int, float) else ''
    raise UserError(f'config.{key} is {type(old).__name__} ({old!r}); {value!r} is not{finite}')
  return value
