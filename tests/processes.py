"""Several processes on loopback that are one run."""

from collections.abc import Callable, Sequence
import socket
import subprocess


def together(start: Callable[..., subprocess.Popen], count: int = 2) -> list[subprocess.Popen]:
  """What `start(**environment)` starts, so often, as processes that find each other."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  common = {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': str(count)}
  return [start(JAX_PROCESS_ID=str(i), **common) for i in range(count)]


def end(processes: Sequence[subprocess.Popen], seconds: float = 120) -> tuple[list[int], list[str]]:
  """The statuses and what was said to stderr, within so many seconds; after them all are killed."""
  try:
    said = [p.communicate(timeout=seconds)[1] for p in processes]
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()  # jax.distributed swallows SIGTERM
  return [p.returncode for p in processes], said
