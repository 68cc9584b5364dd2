"""Where metrics go: metrics.jsonl, TensorBoard, the console. Only process 0 writes.

metrics.jsonl holds nothing that a clock decides, so that an interrupted run leaves the same file as an uninterrupted one.
"""

from collections.abc import Mapping
import json
import pathlib
import sys
import time

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from latentgen.errors import UserError
from latentgen.files import replace_file

SHOWN = 6  # metrics on a console line


class Metrics:
  """metrics.jsonl and TensorBoard.

  Args:
    workdir: the run's directory.
  """

  def __init__(self, workdir: pathlib.Path):
    self._path = workdir / 'metrics.jsonl'
    self._boards = workdir / 'tensorboard'
    self._file = None
    self._writers: dict[str, object] = {}
    self._lead = jax.process_index() == 0

  def rewind(self, stage: str, step: int) -> None:
    """Forgets what was written after `step` of `stage`, and lines that are none: a resumed run writes it again."""
    if not self._lead or not self._path.exists():
      return
    try:
      lines = self._path.read_text(errors='replace').removesuffix('\n').split('\n')
    except OSError as error:
      raise UserError(f'{self._path} cannot be read ({error.strerror}); move it away') from error
    kept = []
    for line in lines:
      try:
        row = json.loads(line)
        past = row['stage'] == stage and row['step'] > step
      except (ValueError, KeyError, TypeError, RecursionError):  # cut short by a kill, or no row of metrics
        continue
      if not past:
        kept.append(line)
    if len(kept) != len(lines):
      replace_file(self._path, ''.join(line + '\n' for line in kept).encode())

  def write(self, stage: str, step: int, values: Mapping[str, float], split: str = 'train') -> None:
    if not self._lead:
      return
    if self._file is None:
      self._file = self._path.open('a')
    row = {'step': step, 'stage': stage, 'split': split, **{k: float(v) for k, v in values.items()}}
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    self._board(stage, values, step, prefix=split)

  def speed(self, stage: str, step: int, steps_per_second: float) -> None:
    """The clock's numbers, to TensorBoard alone."""
    if self._lead:
      self._board(stage, {'steps_per_second': steps_per_second}, step, prefix='speed')

  def _board(self, stage: str, values: Mapping[str, float], step: int, prefix: str) -> None:
    from tensorboardX import SummaryWriter

    if stage not in self._writers:
      self._writers[stage] = SummaryWriter(str(self._boards / stage), purge_step=step)
    for name, value in values.items():
      self._writers[stage].add_scalar(f'{prefix}/{name}', float(value), step)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    for writer in self._writers.values():
      writer.close()


class Clock:
  """seconds.json: how long each stage has trained, first compilation included, over all starts of a run up to their last save.

  Args:
    workdir: the run's directory.
  """

  def __init__(self, workdir: pathlib.Path):
    self._path = workdir / 'seconds.json'
    self._last = time.perf_counter()
    _ = self.seconds  # damage shows before any work

  @property
  def seconds(self) -> dict[str, float]:
    try:
      found = json.loads(self._path.read_text()) if self._path.exists() else {}
      if not isinstance(found, dict) or not all(type(s) in (int, float) and 0 <= s < 1e12 for s in found.values()):
        raise ValueError('no seconds')
      return found
    except (OSError, ValueError, RecursionError) as error:
      raise UserError(f'{self._path} is damaged ({type(error).__name__}); delete it, and the times so far are forgotten') from error

  def add(self, stage: str) -> None:
    """Adds the time since the last call, or since the clock was made."""
    now = time.perf_counter()
    seconds = self.seconds
    seconds[stage] = round(seconds.get(stage, 0.0) + now - self._last, 3)
    self._last = now
    if jax.process_index() == 0:
      replace_file(self._path, (json.dumps(seconds, indent=2) + '\n').encode())


class StageProgress:
  """One stage on the console: a live bar on a terminal, a line per log step elsewhere."""

  def __init__(self, stage: str, index: int, stages: int, step: int, steps: int):
    self._label = f'[{index + 1}/{stages}] {stage}'
    self._steps, self._start, self._first = steps, time.perf_counter(), step
    self._console = Console(file=sys.stderr, highlight=False)
    self._quiet = jax.process_index() != 0
    self._bar = None
    if self._console.is_terminal and not self._quiet:
      columns = (
        TextColumn('{task.description}'), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn('{task.fields[line]}'),
      )  # fmt: skip
      self._bar = Progress(*columns, console=self._console)
      self._bar.start()
      self._task = self._bar.add_task(self._label, total=steps, completed=step, line='compiling')

  def compiled(self) -> None:
    """The first step is done: rates count from here."""
    self._start, self._first = time.perf_counter(), self._first + 1

  def rate(self, step: int) -> float:
    return (step - self._first) / max(time.perf_counter() - self._start, 1e-9)

  def show(self, step: int, values: Mapping[str, float]) -> None:
    if self._quiet:
      return
    rate = self.rate(step)
    chosen = [(k, v) for k, v in values.items() if not k.split('/')[-1].startswith('grad_norm')][:SHOWN]
    line = f'{rate:.1f} steps/s  ' + '  '.join(f'{name} {value:.4g}' for name, value in chosen)
    if self._bar is not None:
      self._bar.update(self._task, completed=step, line=line)
      return
    left = (self._steps - step) / max(rate, 1e-9)
    eta = f'{int(left) // 60}:{int(left) % 60:02d} left' if step > self._first else ''
    self._console.print(f'{self._label}  step {step}/{self._steps}  {eta}  {line}', markup=False, soft_wrap=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()


def say(text: str) -> None:
  """One line to a person, from process 0."""
  if jax.process_index() == 0:
    Console(file=sys.stderr, highlight=False).print(text, markup=False, soft_wrap=True)
