"""What is timed, and how; for both environments, so nothing but the standard library."""

from collections.abc import Callable
import json
import os
import statistics
import sys
import time
from typing import Any

# The published sizes that are compared; shapes are [n, h, w, c].
MLP = {'latent': 16, 'hidden': 512, 'batch': 100}
DEPTHWISE = ((32, 8, 8, 768), (32, 8, 8, 384), (32, 16, 16, 192), (32, 32, 32, 96))
KERNEL = 5
SAMPLES = 1000  # K of likelihoods
LEARNING_RATE = 1e-3
START = ('--config=experiments/nvae_nce.py:smoke', '--config.train.log_every_steps=1')


def one_thread() -> None:
  """Pins this process to one core and its libraries to one thread; before they are imported."""
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = '1'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_multi_thread_eigen=false'
  os.environ['JAX_PLATFORMS'] = 'cpu'


def cpu_seconds(function: Callable[[], Any], warm: int = 2, seconds: float = 1.5, repeats: int = 5) -> float:
  """CPU seconds of a call that returns when it is done: the median of a few means, each over at least `seconds` in all."""
  for _ in range(warm):
    function()
  start = time.process_time()
  function()
  calls = max(1, round(seconds / repeats / max(time.process_time() - start, 1e-6)))
  found = []
  for _ in range(repeats):
    start = time.process_time()
    for _ in range(calls):
      function()
    found.append((time.process_time() - start) / calls)
  return statistics.median(found)


def answer(rows: dict[str, Callable[..., Any]]) -> None:
  """Runs the row that the command line names, with what follows as its arguments, and prints what it returns."""
  name, *arguments = sys.argv[1:]
  print(json.dumps(rows[name](*arguments)))
