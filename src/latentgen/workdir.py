"""The work directory: whose it is, that it can be written, that nobody else writes it, and what a run says about itself."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from typing import Any

import jax

from latentgen.config import File
from latentgen.errors import UserError
from latentgen.files import TEMPORARY, replace_file
from latentgen.sections import flatten

PACKAGES = ('latentgen', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'ml-collections')
OURS = ('.lock', f'config.json{TEMPORARY}')  # how names begin that are there before config.json
FREE = ('evaluate.', 'paper', 'train.log_every_steps', 'train.keep_', 'mesh.', 'debug.')  # what may differ when a run is resumed


def describe(file: File, config: dict[str, Any], overrides: dict[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """What config.json holds."""
  versions = {'python': platform.python_version()}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {
    'experiment': file.path.stem,
    'variant': file.variant,
    'config': config,
    'overrides': {k: str(v) for k, v in overrides.items()},
    'versions': versions,
    'revision': revision(file.path.parent),
    'seed': config.get('seed', 0),
    'mesh': {**{k: int(v) for k, v in mesh.shape.items()}, 'device': mesh.devices.flat[0].device_kind},
  }


def revision(folder: pathlib.Path) -> str | None:
  """The git commit that a folder is at, '-dirty' if changed since; None outside git."""
  command = ['git', '-C', str(folder.absolute()), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  return None


def changes(workdir: pathlib.Path, mine: dict[str, Any]) -> list[str]:
  """What is not as it was when the run began, a line each: versions, the code's commit, the mesh."""
  found = read(workdir) or {}
  before = found.get('versions') if isinstance(found.get('versions'), dict) else {}
  pairs = {name: (before.get(name), new) for name, new in mine['versions'].items()}
  pairs |= {name: (found.get(name), mine[name]) for name in ('revision', 'mesh')}
  return [f'{name} was {old} when this run began and is {new} now' for name, (old, new) in pairs.items() if old and old != new]


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
  """config.json, or None if there is none.

  Raises:
    UserError: if it cannot be read.
  """
  path = workdir / 'config.json'
  if not path.exists():
    return None
  try:
    if not path.is_file():
      raise ValueError('no file')
    found = json.loads(path.read_text())
    for key, kind in (('experiment', str), ('variant', str), ('config', dict)):
      if not isinstance(found[key], kind):
        raise TypeError(key)
    return found
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f'{path} is damaged ({type(error).__name__}); take another --workdir') from error


def check(workdir: pathlib.Path, mine: dict[str, Any]) -> None:
  """That a work directory, if it holds a run, holds this one; changes nothing.

  Raises:
    UserError: another experiment, another config, a file in its place.
  """
  try:
    if workdir.exists() and not workdir.is_dir():
      raise UserError(f'--workdir: {workdir} is a file')
  except OSError as error:
    raise UserError(f'--workdir: {workdir} cannot be looked up ({error.strerror}); take another folder') from error
  found = read(workdir)
  if found is None and workdir.is_dir() and any(not p.name.startswith(OURS) for p in workdir.iterdir()):
    found = read(workdir)  # another process of this run may have begun in between
    if found is None:
      raise UserError(f'--workdir: {workdir} holds files but no run (no config.json); take another folder')
  if found is None:
    return
  if (found['experiment'], found['variant']) != (mine['experiment'], mine['variant']):
    names = [':'.join(filter(None, (d['experiment'], d['variant']))) for d in (found, mine)]
    raise UserError(f'--workdir: {workdir} holds experiment {names[0]}, not {names[1]}; take another folder')
  old, new = flatten(found['config']), flatten(json.loads(json.dumps(mine['config'])))
  for key in sorted(old.keys() | new.keys()):
    if not key.startswith(FREE) and old.get(key) != new.get(key):
      raise UserError(
        f'--workdir: {workdir} was made with config.{key} = {old.get(key)!r}, not {new.get(key)!r}; '
        'set it so, or take another folder'
      )


@contextlib.contextmanager
def claim(workdir: pathlib.Path, mine: dict[str, Any]):
  """Makes the directory this run's own for a while, and writes config.json if there is none.

  Raises:
    UserError: if it cannot be written, or another run holds it.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir, prefix='.lock-'):
      pass
    lock = os.fdopen(os.open(workdir / '.lock', os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644), 'w')
  except OSError as error:
    raise UserError(f'--workdir: {workdir} cannot be written ({error.strerror}); take another folder') from error
  with lock:
    if jax.process_index() == 0:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        raise UserError(f'--workdir: another run is at work in {workdir}; wait for it, or take another folder') from error
      if not (workdir / 'config.json').exists():
        write_json(workdir / 'config.json', mine)
    yield


def write_json(path: pathlib.Path, value: Any) -> None:
  """Whole or not at all."""
  replace_file(path, (json.dumps(value, indent=2) + '\n').encode())
