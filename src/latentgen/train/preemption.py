"""SIGTERM, which schedulers send before they take a machine away: the loop saves at once and leaves."""

import signal
import threading
from types import TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils


class Notice:
  """Whether to stop, to be asked once after every step; all processes hear yes after the same step.

  Several processes leave the signal to the runtime of JAX, which spreads it and agrees on the step; a single one listens itself,
  from `with Notice() as notice:` until the block ends.
  """

  def __init__(self):
    self._several = jax.process_count() > 1
    self._given, self._asked, self._before = False, 0, None

  def __enter__(self) -> Self:
    if not self._several and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._give)
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _give(self, *_) -> None:
    self._given = True

  def given(self) -> bool:
    self._asked += 1
    return multihost_utils.reached_preemption_sync_point(self._asked) if self._several else self._given
