"""What must hold of any config, whatever it configures; and configs as plain data."""

from collections.abc import Mapping
import math
import re
from typing import Any

from ml_collections import ConfigDict

from latentgen.errors import UserError, near

TOP_LEVEL = ('data', 'model', 'recipe', 'stages', 'evaluate', 'mesh', 'train', 'debug', 'seed', 'paper', 'image_shape')

DEBUG = {'nan_check': False, 'native_convolutions': False}  # what `config.debug` holds, and its defaults
MESH = ('data', 'fsdp', 'rules', 'min_shard_size')

LARGEST = 2**24  # whole number in the options of a network, a method or a task


def flatten(config: Mapping, prefix: str = '') -> dict[str, Any]:
  """{'a.b.c': leaf}."""
  flat = {}
  for key in config:
    value = config[key]
    if isinstance(value, (ConfigDict, Mapping)):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def plain(config: Any) -> Any:
  """ConfigDicts and lists as dicts and tuples, all the way down."""
  if isinstance(config, (ConfigDict, Mapping)):
    return {k: plain(config[k]) for k in config}
  return tuple(plain(v) for v in config) if isinstance(config, (list, tuple)) else config


def check(config: Any) -> None:
  """What must hold of any config: sections are sections, names are texts, numbers are finite and not absurdly large.

  Raises:
    UserError: one line that names the key.
  """
  config = plain(config)
  for key in config:
    if key not in TOP_LEVEL:
      raise UserError(f'config.{key} does not exist{near(key, TOP_LEVEL)}')
  for key in ('data', 'model', 'recipe', 'stages'):
    if key not in config:
      raise UserError(f'config.{key} is missing')
  _section('data', config['data'])
  _section('model', config['model'])
  for name, stage in _section('stages', config['stages']).items():
    where = f'stages.{name}'
    for part in _section(where, stage):
      if part in ('method', 'optim', 'load', 'ema'):
        _section(f'{where}.{part}', stage[part])
    for update, options in stage.get('optim', {}).items():
      _section(f'{where}.optim.{update}', options)
  for name, options in _section('evaluate', config.get('evaluate', {})).items():
    if name != 'tasks':
      _section(f'evaluate.{name}', options)
  for key, known in (('mesh', MESH), ('train', None), ('debug', DEBUG)):  # what trains checks `train`
    for name in _section(key, config.get(key, {})):
      if known and name not in known:
        raise UserError(f'config.{key}.{name} does not exist{near(name, known)}')
  for key, names in (('recipe', config['recipe']), ('evaluate.tasks', config.get('evaluate', {}).get('tasks', ()))):
    if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
      raise UserError(f'config.{key} is {names!r}, need a tuple of names')
  _check_paper(config.get('paper', ()))
  seed = config.get('seed', 0)
  if type(seed) is not int or not 0 <= seed < 2**32:
    raise UserError(f'config.seed is {seed!r}, need a whole number from 0 to {2**32 - 1}')
  for key, value in flatten(config).items():
    counts = key.startswith(('model.', 'evaluate.')) or re.match(r'stages\.[^.]*\.method\.', key)
    _finite(key, value, LARGEST if counts else 2**63 - 1)


def _check_paper(rows: Any) -> None:
  if not isinstance(rows, tuple):
    raise UserError(f'config.paper is {rows!r}, need a tuple of rows dict(name=..., paper=..., ours=...)')
  for row in rows:
    if not isinstance(row, Mapping) or not isinstance(row.get('name'), str):
      raise UserError(f'config.paper holds {row!r}, need rows dict(name=..., paper=..., ours=...)')
    if not isinstance(row.get('when', {}), Mapping):
      raise UserError(f"config.paper holds a row with when = {row['when']!r}, need a section of config keys")
    ours = row.get('ours', ())
    if not all(isinstance(name, str) for name in (ours if isinstance(ours, tuple) else (ours or '',))):
      raise UserError(f'config.paper holds a row with ours = {ours!r}, need the name of a result, or several')


def _section(key: str, value: Any) -> Mapping[str, Any]:
  if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
    raise UserError(f'config.{key} is {value!r}, need a section of named keys')
  return value


def _finite(key: str, value: Any, largest: int) -> None:
  if isinstance(value, tuple):
    for one in value:
      _finite(key, one, largest)
  elif isinstance(value, float) and not math.isfinite(value):
    raise UserError(f'config.{key} is {value!r}, need a finite number')
  elif isinstance(value, int) and abs(value) > largest:
    raise UserError(f'config.{key} is {value!r}, need a whole number of at most {largest}')


def check_train(config: Mapping[str, Any]) -> dict[str, Any]:
  """What must hold of `config.train`, `config.mesh.rules`, `config.mesh.min_shard_size` and `config.debug`, whatever is trained.

  Returns:
    {name: value} of the settings of a run (`train.loop.Settings`) that the config gives.

  Raises:
    UserError: one line that names the key.
  """
  train, mesh = config.get('train', {}), config.get('mesh', {})
  sharding = {key: mesh[key] for key in ('rules', 'min_shard_size') if key in mesh}
  settings = {**train, **sharding, 'nan_check': config.get('debug', {}).get('nan_check', False)}
  _check_rules(settings.get('rules', ()))
  for key, value in settings.items():
    counts = key.endswith('_steps') or key in ('keep_checkpoints', 'accumulate', 'min_shard_size')
    if counts and (type(value) is not int or value < 1):
      raise UserError(f'config.{"mesh" if key in sharding else "train"}.{key} is {value!r}, need a positive whole number')
  if type(hours := settings.get('keep_every_hours', 0.0)) not in (int, float) or not 0 <= hours < math.inf:
    raise UserError(f'config.train.keep_every_hours is {hours!r}, need a number of at least 0')
  if settings.get('nonfinite', 'stop') not in ('stop', 'skip'):
    raise UserError(f"config.train.nonfinite is {settings['nonfinite']!r}, need 'stop' or 'skip'")
  for key, value in config.get('debug', {}).items():
    if type(value) is not bool:
      raise UserError(f'config.debug.{key} is {value!r}, need True or False')
  return settings


def _check_rules(rules: Any) -> None:
  for rule in rules if isinstance(rules, tuple) else (rules,):
    if not isinstance(rule, tuple) or len(rule) != 2 or not isinstance(rule[0], str) or rule[1] not in ('fsdp', 'replicate'):
      raise UserError(f"config.mesh.rules holds {rule!r}, need pairs of a regular expression and 'fsdp' or 'replicate'")
    try:
      re.compile(rule[0])
    except (re.error, RecursionError, OverflowError) as error:
      raise UserError(f'config.mesh.rules holds {rule[0]!r}, which is no regular expression: {error}') from error
