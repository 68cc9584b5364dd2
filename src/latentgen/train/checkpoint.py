"""Checkpoints by Orbax, in four verbs: latest, save, restore, load_params. Nothing else imports Orbax.

Layout: <workdir>/checkpoints/<stage>/<step>/. Saves are asynchronous and atomic: a killed save leaves a temporary folder that
is never listed.
"""

from collections.abc import Mapping
import logging
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from latentgen.errors import UserError
from latentgen.types import TrainState

logging.getLogger('absl').addFilter(lambda record: 'Waiting for previous' not in record.getMessage())


class Checkpoints:
  """The checkpoints of one stage.

  Args:
    folder: <workdir>/checkpoints/<stage>.
    keep: how many of the newest to keep.
    best: name of a validation metric (lower is better); its best step is kept as well.
  """

  def __init__(self, folder: pathlib.Path, keep: int = 2, best: str | None = None):
    self._folder = folder.absolute()
    self._best = best
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if best:
      policies.append(
        ocp.checkpoint_managers.BestN(get_metric_fn=lambda m: m[best], n=1, reverse=True, keep_checkpoints_without_metrics=False)
      )
    self._options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
      best_fn=(lambda m: m[best]) if best else None,
      best_mode='min',
      create=True,
      enable_background_delete=False,
    )
    self._manager: ocp.CheckpointManager | None = None

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      for leftover in self._folder.glob('*.orbax-checkpoint-tmp*'):
        if jax.process_index() == 0:
          shutil.rmtree(leftover, ignore_errors=True)
      self._manager = ocp.CheckpointManager(self._folder, options=self._options)
    return self._manager

  def latest(self) -> int | None:
    """The newest committed step; touches nothing."""
    if not self._folder.is_dir():
      return None
    steps = [int(p.name) for p in self._folder.iterdir() if p.is_dir() and p.name.isdigit()]
    return max(steps, default=None)

  def chosen(self) -> int | None:
    """The step that the stage hands on: the best by its metric, else the latest."""
    if self._best is None or self.latest() is None:
      return self.latest()
    return self._open().best_step()

  def save(self, step: int, state: TrainState, data: Any, metrics: Mapping[str, float] | None = None) -> None:
    """Starts an asynchronous save of the state and the data iterator; the state may be donated right after."""
    import grain

    items = {'state': ocp.args.StandardSave(state)}
    if data is not None:
      items['data'] = grain.checkpoint.CheckpointSave(data)
    self._open().save(step, args=ocp.args.Composite(**items), metrics=dict(metrics) if metrics else None)

  def restore(self, step: int, abstract: TrainState, data: Any = None) -> TrainState:
    """Restores onto the shardings of `abstract` and, if given, sets the data iterator.

    Raises:
      UserError: if the checkpoint is damaged or of another shape.
    """
    import grain

    items: dict[str, Any] = {'state': ocp.args.StandardRestore(abstract)}
    if data is not None:
      items['data'] = grain.checkpoint.CheckpointRestore(data)
    try:
      return self._open().restore(step, args=ocp.args.Composite(**items))['state']
    except Exception as error:  # Orbax and tensorstore raise many types for damaged files
      reason = ' '.join(str(error).split())[:200]
      raise UserError(
        f'checkpoint {self._folder / str(step)} cannot be read ({type(error).__name__}: {reason}); delete that folder to '
        'go on from the one before it'
      ) from error

  def load_params(self, abstract: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, stats) that this stage hands on: averaged parameters where it keeps an average."""
    step = self.chosen()
    if step is None:
      raise UserError(f'{self._folder} holds no checkpoint')
    state = self.restore(step, abstract)
    return {**state.params, **state.ema}, dict(state.stats)

  def wait(self) -> None:
    if self._manager is not None:
      self._manager.wait_until_finished()

  def close(self) -> None:
    if self._manager is not None:
      self._manager.close()
      self._manager = None
