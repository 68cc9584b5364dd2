"""Checkpoints by Orbax: latest, save, restore, load_params. Nothing else imports Orbax.

Layout: <workdir>/checkpoints/<stage>/<step>/, the damaged ones in <workdir>/checkpoints/damaged/<stage>-<step>/. Saves are
asynchronous and atomic: a killed save leaves a temporary folder that is never listed. Each holds the state, where the data are, and
the shapes of the state, by which a checkpoint of another model is told from a damaged one.
"""

from collections.abc import Mapping
import errno
import functools
import logging
import math
import pathlib
import re
import shutil
import sys
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from latentgen.errors import Damaged, SaveFailed, UserError
from latentgen.types import TrainState

STEP = re.compile('0|[1-9][0-9]{0,17}')  # what Orbax calls the folder of a step
NOISE = ('Waiting for previous', 'Reached preemption sync point')


def _worth_saying(record: logging.LogRecord) -> bool:
  """Not what is noise, nor what Orbax logs about an error that it raises as well."""
  return not any(text in record.getMessage() for text in NOISE) and not (record.exc_info and 'orbax' in record.pathname)


logging.getLogger('absl').addFilter(_worth_saying)


@functools.cache
def _quiet_writers() -> None:
  """Where one array cannot be written, the writers of the others find Orbax's event loop closed and each print a traceback."""
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if (unraisable.exc_type, str(unraisable.exc_value)) != (RuntimeError, 'Event loop is closed'):
      before(unraisable)

  sys.unraisablehook = hook


class Checkpoints:
  """The checkpoints of one stage.

  Args:
    folder: <workdir>/checkpoints/<stage>.
    keep: how many of the newest to keep.
    best: name of a validation metric (lower is better); its best step is kept as well.
    hours: keep, besides, one for every so many hours of training; 0: none.
  """

  def __init__(self, folder: pathlib.Path, keep: int = 2, best: str | None = None, hours: float = 0.0):
    self._folder = folder.absolute()
    self._best = best
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if hours:
      policies.append(ocp.checkpoint_managers.EveryNSeconds(round(3600 * hours)))
    if best:
      policies.append(
        ocp.checkpoint_managers.BestN(get_metric_fn=self._score, n=1, reverse=True, keep_checkpoints_without_metrics=False)
      )
    self._options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
      best_fn=self._score if best else None,
      best_mode='min',
      create=True,
      enable_background_delete=False,
    )
    self._manager: ocp.CheckpointManager | None = None

  def _score(self, metrics: Mapping[str, float]) -> float:
    score = metrics[self._best]
    return score if math.isfinite(score) else math.inf  # what is no number has no place in an order

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      if not flags.FLAGS.is_parsed():  # Orbax reads a flag of its own for every array, and unparsed ones answer with an exception
        flags.FLAGS.mark_as_parsed()
      _quiet_writers()
      for leftover in self._folder.glob('*.orbax-checkpoint-tmp*'):
        if jax.process_index() == 0:
          shutil.rmtree(leftover, ignore_errors=True)
      self._manager = ocp.CheckpointManager(self._folder, options=self._options)
    return self._manager

  def latest(self) -> int | None:
    """The newest committed step; touches nothing."""
    if not self._folder.is_dir():
      return None
    steps = [int(p.name) for p in self._folder.iterdir() if STEP.fullmatch(p.name) and p.is_dir()]
    return max(steps, default=None)

  def chosen(self) -> int | None:
    """The step that the stage hands on: the best by its metric, else the latest."""
    if self._best is None or self.latest() is None:
      return self.latest()
    return self._open().best_step()

  def save(self, step: int, state: TrainState, data: Any, metrics: Mapping[str, float] | None = None) -> None:
    """Starts an asynchronous save of the state and the data iterator; the state may be donated right after."""
    import grain

    shapes = _shapes(state)
    if jax.process_count() == 1:  # Orbax holds up the loop for every array of JAX, hardly for those of numpy
      state = jax.tree.map(np.array, jax.device_get(state))
    items = {'state': ocp.args.StandardSave(state), 'shapes': ocp.args.JsonSave(shapes)}
    if data is not None:
      items['data'] = grain.checkpoint.CheckpointSave(data)
    try:
      self._open().save(step, args=ocp.args.Composite(**items), metrics=dict(metrics) if metrics else None)
    except Exception as error:  # of this save or of the one before it, which it waits for
      raise self._failed(error) from error

  def _failed(self, error: Exception) -> SaveFailed:
    remedy = 'free space there'
    if jax.process_count() > 1:
      remedy += ' or, if another process has gone, start all again'
    return SaveFailed(
      f'a checkpoint could not be written to {self._folder} ({_reason(error)}); {remedy}: the same command goes on from step '
      f'{self.latest() or 0}'
    )

  def restore(self, step: int, abstract: TrainState, data: Any = None) -> TrainState:
    """Restores onto the shardings of `abstract` and, if given, sets the data iterator.

    Raises:
      Damaged: if the checkpoint cannot be read.
      UserError: if it is of other shapes, or this process has no room or no right to read it.
    """
    import grain

    where = f'checkpoint {self._folder / str(step)}'
    try:
      known = self._open().restore(step, args=ocp.args.Composite(shapes=ocp.args.JsonRestore()))['shapes']
      items: dict[str, Any] = {'state': ocp.args.StandardRestore(abstract)}
      if data is not None:
        items['data'] = grain.checkpoint.CheckpointRestore(data)
      if not (other := _difference(known, _shapes(abstract))):
        return self._open().restore(step, args=ocp.args.Composite(**items))['state']
    except Exception as error:  # Orbax and tensorstore raise many types for damaged files
      if _hindered(error):
        raise UserError(f'{where} cannot be read here ({_reason(error)}); it stays as it is: make room, or take more devices') from error
      raise Damaged(f'{where} cannot be read ({_reason(error)}); --mode=train goes on from the one before it') from error
    raise UserError(f'{where} is of another model: {other}; take the code that wrote it, or another --workdir')

  def set_aside(self, step: int) -> pathlib.Path:
    """Moves a damaged checkpoint out of the way, where it can be looked at."""
    self.close()
    target = self._folder.parent / 'damaged' / f'{self._folder.name}-{step}'
    if jax.process_index() == 0:
      target.parent.mkdir(exist_ok=True)
      shutil.rmtree(target, ignore_errors=True)
      (self._folder / str(step)).rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('set_aside')
    return target

  def load_params(self, abstract: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, stats) that this stage hands on: averaged parameters where it keeps an average."""
    step = self.chosen()
    if step is None:
      raise UserError(f'{self._folder} holds no checkpoint')
    state = self.restore(step, abstract)
    return {**state.params, **state.ema}, dict(state.stats)

  def scored(self) -> int | None:
    """The newest step that was saved with its validation metrics."""
    manager = self._open()
    return max((s for s in manager.all_steps() if manager.metrics(s)), default=None)

  def wait(self) -> None:
    """Until the last save is whole.

    Raises:
      SaveFailed: if it cannot be.
    """
    if self._manager is not None:
      try:
        self._manager.wait_until_finished()
      except Exception as error:
        raise self._failed(error) from error

  def close(self) -> None:
    """Waits for the last save, as `wait`, and raises as it does."""
    manager, self._manager = self._manager, None
    if manager is not None:
      try:
        manager.close()
      except Exception as error:
        raise self._failed(error) from error


def _hindered(error: BaseException | None) -> bool:
  """Whether what failed speaks of this process rather than of the file."""
  if error is None:
    return False
  short = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)
  return short or isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error) or _hindered(error.__cause__)


def _reason(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def _shapes(state: TrainState) -> dict[str, list]:
  """{path of a leaf: [shape, type]}."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): [list(leaf.shape), str(leaf.dtype)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def _difference(found: Mapping[str, list], wanted: Mapping[str, list]) -> str:
  """The first leaf in which two states differ, '' if there is none."""
  for path in sorted(found.keys() | wanted.keys()):
    if found.get(path) != wanted.get(path):
      there, here = ('missing' if d.get(path) is None else f'{d[path][1]} {d[path][0]}' for d in (found, wanted))
      return f'{path} is {there} there and {here} here'
  return ''
