"""From a config file to a run: loading, overriding, checking, building.

A config is plain data (ml_collections.ConfigDict). Names in it are module paths: `model.name = 'nvae'` is
`latentgen.nets.nvae`, a dotted name is a module of the user's own; each such module offers `build`.
"""

import ast
from collections.abc import Callable, Iterable, Mapping
import dataclasses
import difflib
import fnmatch
import importlib
import importlib.util
import inspect
import math
import pathlib
import pkgutil
import sys
import types
from types import ModuleType
import typing
from typing import Any
import warnings

from ml_collections import ConfigDict

from latentgen.errors import UserError, near
from latentgen.sections import check, check_rules, flatten as flatten, plain as plain

OPEN = ('data', 'model', 'train', 'evaluate.*', 'stages.*.method', 'stages.*.method.prior', 'stages.*.optim.*')
# sections whose options belong to what they configure, which checks them itself


# ------------------------------------------------------------------------------------------- files and overrides


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
    there, folder = path.is_file(), path.parent if path.parent.is_dir() else pathlib.Path('experiments')
  except OSError as error:
    raise UserError(f'--config: {name!r} cannot be looked up ({error.strerror}); give the path of a file') from error
  if not there:
    found = [p.as_posix() for p in folder.glob('*.py')] if folder.is_dir() else []
    raise UserError(f'--config: there is no file {name!r}{near(name, found) if found else ""}')
  loader = importlib.util.spec_from_file_location(f'latentgen_experiment_{path.stem}', path)
  if loader is None:
    raise UserError(f'--config: {name!r} is not a Python file')
  module = importlib.util.module_from_spec(loader)
  sys.path.insert(0, str(path.parent.absolute()))  # an experiment may build on its neighbours
  try:
    loader.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    raise UserError(f'--config: {name} cannot be loaded: {_one_line(error)}') from error
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
    if isinstance(config, ConfigDict) and 'debug' not in config:
      with config.unlocked():
        config.debug = ConfigDict({'nan_check': False})
    plain(config)  # references that lead nowhere show here
  except (Exception, SystemExit) as error:
    raise UserError(f'--config: {name}: get_config({variant!r}) failed: {_one_line(error)}') from error
  if not isinstance(config, ConfigDict):
    got = type(config).__name__
    raise UserError(f'--config: {name}: get_config({variant!r}) returned {got}, need an ml_collections.ConfigDict')
  return File(path, variant, module), config.lock()


def _one_line(error: BaseException) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def override(config: ConfigDict, values: Mapping[str, Any]) -> None:
  """Sets dotted keys in place; texts are read as Python literals of the type that the key has.

  A section in OPEN also takes keys that the file does not set, unless they look like a misspelt one. Naming another
  data set drops the options of the one before.

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
      if not isinstance(node, ConfigDict) or part not in node:
        _unknown('.'.join(parents[: i + 1]), config)
      node = node[part]
    if not isinstance(node, ConfigDict):
      _unknown(key, config)
    if last not in node and any(fnmatch.fnmatchcase('.'.join(parents), pattern) for pattern in OPEN):
      if not difflib.get_close_matches(last, node, n=1, cutoff=0.75):
        _set(node, key, last, _literal(value))
        continue
    if last not in node:
      _unknown(key, config)
    if isinstance(node[last], ConfigDict):
      raise UserError(f'config.{key} is a section; set one of its keys: {", ".join(node[last])}')
    _set(node, key, last, _coerce(key, value, node[last]))


def _set(node: ConfigDict, key: str, last: str, value: Any) -> None:
  try:
    with node.unlocked():
      node[last] = value
  except (KeyError, TypeError, ValueError) as error:  # names and types that a ConfigDict does not take
    raise UserError(f'config.{key} cannot be set to {value!r}: {_one_line(error)}') from error


def _unknown(key: str, config: ConfigDict) -> None:
  known = flatten(config)
  close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
  if not close:  # the last name alone, wherever it stands
    tails = {k.split('.')[-1]: k for k in known}
    close = [tails[t] for t in difflib.get_close_matches(key.split('.')[-1], tails, n=1, cutoff=0.6)]
  hint = f'; did you mean config.{close[0]}?' if close else f'; its sections: {", ".join(config)}'
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


# ------------------------------------------------------------------------------------------- building


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
        raise UserError(f'{where} = {name!r} cannot be imported: {_one_line(error)}') from error
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
  return _built(where, function, *fixed, **options)


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


def _built(where_: str, function_: Callable[..., Any], *fixed: Any, **options: Any) -> Any:
  """function(*fixed, **options); what it raises is a `UserError` that starts with the config key of the options."""
  try:
    return function_(*fixed, **options)
  except UserError as error:
    parent, _, last = where_.rpartition('.')
    text = str(error)
    relative = f'{parent}.{text}' if text.startswith(f'{last}.') else f'{where_}: {text}'
    raise UserError(text if 'config.' in text else relative) from error
  except Exception as error:  # a value of the wrong type or size, found out wherever it is used
    raise UserError(f'{where_}: {_one_line(error)}') from error


def split_name(options: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
  if not isinstance(options, Mapping):
    raise UserError(f'{where} is {options!r}, need a section of named keys')
  options = dict(options)
  if not isinstance(options.get('name'), str) or not options['name']:
    raise UserError(f'{where}.name is missing')
  return options.pop('name'), options


def build_data(
  config: Mapping[str, Any], seed: int, shape: tuple[int, ...] | None = None
) -> tuple[dict[str, Any], Callable[..., Any], int]:
  """(splits, preprocess, batch size) of `config.data`.

  `seed` fixes a fixed binarisation and which labels are kept; `shape` stands for the data.
  """
  import numpy as np

  from latentgen import data
  from latentgen.data import labels, memory, pipeline, preprocess

  name, options = split_name(config, 'config.data')
  batch_size = options.pop('batch_size', None)
  if type(batch_size) is not int or batch_size < 1:
    raise UserError(f'config.data.batch_size is {batch_size!r}, need a positive whole number')
  steps = {k: options.pop(k) for k in inspect.signature(preprocess.make).parameters if k in options}
  label_options = {k: options.pop(k) for k in labels.OPTIONS if k in options}
  labels.check(**label_options)
  if shape:
    if not isinstance(shape, tuple) or len(shape) != 3 or not all(type(side) is int and 1 <= side <= 2**16 for side in shape):
      raise UserError(f'config.image_shape is {shape!r}, need (height, width, channels)')
    memory.check(batch_size * math.prod(shape), 'config.data.batch_size', 'make it smaller')
    blank = data.ArraySource(np.broadcast_to(np.uint8(0), (batch_size, *shape)), None, 'shapes alone')
    splits = dict.fromkeys(data.SPLITS, blank)
  else:
    splits = _built('config.data', data.load, name, **options)
  pipeline.Steps(splits['train'], batch_size, seed)  # complains of a batch that is larger than the split
  if steps.get('binarize') == 'fixed':
    splits = {split: preprocess.binarize_fixed(source, seed) for split, source in splits.items()}
  if not shape:
    splits['train'] = labels.few(splits['train'], seed, **label_options)
  return splits, preprocess.make(**steps), batch_size


def build_recipe(config: Mapping[str, Any], image_shape: tuple[int, int, int]) -> tuple[Any, ...]:
  """The stages that `config.recipe` names, in that order."""
  from latentgen import optim
  from latentgen.types import Stage

  name, options = split_name(config['model'], 'config.model')
  net = call(module('latentgen.nets', name, 'config.model.name').build, 'config.model', options, image_shape)
  stages = []
  for stage in config['recipe']:
    where = f'config.stages.{stage}'
    if stage not in config['stages']:
      raise UserError(f'config.recipe names stage {stage!r}{near(stage, config["stages"])}')
    options = dict(config['stages'][stage])
    known = ('steps', 'method', 'optim', 'load', 'ema', 'best', 'patience_steps')
    for key in options:
      if key not in known:
        raise UserError(f'{where}.{key} does not exist{near(key, known)}')
    steps = options.get('steps', 0)
    if type(steps) is not int or steps < 0:
      raise UserError(f'{where}.steps is {steps!r}, need a whole number of steps')
    for group, decay in options.get('ema', {}).items():
      if type(decay) not in (int, float) or not 0 <= decay < 1:
        raise UserError(f'{where}.ema.{group} is {decay!r}, need a decay from 0 to below 1')
    if not isinstance(options.get('best'), (str, type(None))):
      raise UserError(f'{where}.best is {options["best"]!r}, need the name of a validation metric')
    method_name, method_options = split_name(options.get('method', {}), f'{where}.method')
    found = module('latentgen.methods', method_name, f'{where}.method.name')
    if isinstance(method_options.get('prior'), Mapping):  # a section: a module of priors with its own options
      prior, prior_options = split_name(method_options['prior'], f'{where}.method.prior')
      builder = module('latentgen.priors', prior, f'{where}.method.prior.name').build
      method_options['prior'] = call(builder, f'{where}.method.prior', prior_options)
    method = call(found.build, f'{where}.method', method_options, net, steps)
    optimisers = [(u, o, f'{where}.optim.{u}') for u, o in options.get('optim', {}).items()]
    stages.append(
      Stage(
        name=stage,
        method=method,
        optim={u: _built(key, optim.build, key, steps, **o) for u, o, key in optimisers},
        steps=steps,
        load=options.get('load', {}),
        fit=getattr(method, 'fit', None),
        ema=options.get('ema', {}),
        best=options.get('best') or None,
        patience_steps=options.get('patience_steps', 0),
      )
    )
  return tuple(stages)


def _image_shape(source: Any, preprocess: Callable[..., Any]) -> tuple[int, int, int]:
  """Of an image as the network sees it, which padding changes."""
  import jax

  raw = source.take([0])
  function = lambda key: preprocess(key, raw, False)
  return _built('config.data', jax.eval_shape, function, jax.random.key(0))['image'].shape[1:]


def build(config: ConfigDict, workdir: pathlib.Path, mesh: Any = None, shapes_only: bool = False) -> Any:
  """The whole run of a config.

  Args:
    config: the resolved config.
    workdir: where the run lives.
    mesh: overrides `config.mesh`.
    shapes_only: do without data where `config.image_shape` says what they look like; such a run can only be estimated.

  Raises:
    UserError: one line that names the key.
  """
  from latentgen.train import check as checks, loop, sharding

  check(config)
  config = plain(config)
  seed = config.get('seed', 0)
  shape = config.get('image_shape') if shapes_only else None
  splits, preprocess, batch_size = build_data(config['data'], seed, shape)
  recipe = build_recipe(config, _image_shape(splits['train'], preprocess))
  checks.check_names(recipe)
  if mesh is None:
    options = {k: v for k, v in config.get('mesh', {}).items() if k in ('data', 'fsdp')}
    mesh = _built('config.mesh', sharding.make_mesh, **options)
  sharding.check_batch(batch_size, mesh)
  settings = dict(config.get('train', {}))
  for key in ('rules', 'min_shard_size'):
    if key in config.get('mesh', {}):
      settings[key] = config['mesh'][key]
  check_rules(settings.get('rules', ()))
  for key, value in settings.items():
    counts = key.endswith('_steps') or key in ('keep_checkpoints', 'accumulate', 'min_shard_size')
    if counts and (type(value) is not int or value < 1):
      raise UserError(f'config.train.{key} is {value!r}, need a positive whole number')
  if type(hours := settings.get('keep_every_hours', 0.0)) not in (int, float) or not 0 <= hours < math.inf:
    raise UserError(f'config.train.keep_every_hours is {hours!r}, need a number of at least 0')
  if settings.get('nonfinite', 'stop') not in ('stop', 'skip'):
    raise UserError(f"config.train.nonfinite is {settings['nonfinite']!r}, need 'stop' or 'skip'")
  parts = settings.get('accumulate', 1)
  if batch_size % (parts * mesh.size):
    raise UserError(f'config.train.accumulate is {parts}: it and the {mesh.size} devices do not divide the batch of {batch_size}')
  if not isinstance(nan_check := config.get('debug', {}).get('nan_check', False), bool):
    raise UserError(f'config.debug.nan_check is {nan_check!r}, need True or False')
  settings['nan_check'] = nan_check
  settings = call(loop.Settings, 'config.train', settings, seed, batch_size)
  return loop.Run(recipe, splits, preprocess, mesh, workdir, settings)


def check_shapes(run: Any, allocated: bool = True) -> None:
  """Initialises every stage by its shapes alone, where networks find out what does not go together.

  Args:
    run: what `build` has made.
    allocated: whether the states will be allocated, so that they must fit into memory.

  Raises:
    UserError: one line that names the stage.
  """
  from latentgen.data import memory
  from latentgen.train import cost

  for stage in run.recipe:
    where = f'config.stages.{stage.name}'
    state = _built(where, run.abstract, stage)
    if allocated and run.mesh.devices.flat[0].platform == 'cpu':
      memory.check(cost.bytes_per_device(state), f'{where}, parameters and optimisers,', 'make config.model smaller')
