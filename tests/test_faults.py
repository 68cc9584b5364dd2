"""Whole runs of the command line that are killed, stopped, or find no room to write."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import faults
import numpy as np
from PIL import Image
from processes import end, together
import pytest

ROOT = pathlib.Path(__file__).parents[1]
LONG = [
  f'--config={ROOT}/experiments/vae_nce.py:smoke', '--config.stages.vae.steps=100000', '--config.train.checkpoint_every_steps=20',
  '--config.train.log_every_steps=20',
]  # fmt: skip

pytestmark = pytest.mark.slow


def start(workdir, *args, preexec_fn=None, **env):
  env = {**os.environ, 'PYTHONPATH': str(ROOT / 'src'), **env}
  command = [sys.executable, '-m', 'latentgen.main', *args, f'--workdir={workdir}']
  return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn)


def rows(workdir):
  try:
    return (workdir / 'metrics.jsonl').read_text().splitlines()
  except FileNotFoundError:
    return []


def wait_for_rows(workdir, n, processes):
  deadline = time.monotonic() + 300
  while len(rows(workdir)) < n:
    assert all(p.poll() is None for p in processes) and time.monotonic() < deadline
    time.sleep(0.05)


def pair(workdir, *args):
  return together(lambda **env: start(workdir, *args, **env))


def test_kills_at_random_instants_leave_no_trace(tmp_path):
  found = faults.main(str(tmp_path), kills=3)
  assert found['kills'] == 3 and found['compared'] > 20
  assert found['different'] == 0 and found['repeated rows'] == 0, found


def test_sigterm_ends_with_143_and_the_same_command_goes_on(tmp_path):
  process = start(tmp_path / 'run', *LONG)
  wait_for_rows(tmp_path / 'run', 2, [process])
  process.terminate()
  (status,), (said,) = end([process])
  assert status == 143 and 'Traceback' not in said
  step = int(re.search(r"stopped by SIGTERM; all is saved, and the same command goes on from step (\d+) of 'vae'", said)[1])
  again = start(tmp_path / 'run', *LONG, f'--config.stages.vae.steps={step + 5}')
  _, (said,) = end([again])
  assert again.returncode == 2 and 'was made with config.stages.vae.steps' in said  # another run; the same one goes on
  again = start(tmp_path / 'run', *LONG)
  wait_for_rows(tmp_path / 'run', len(rows(tmp_path / 'run')) + 1, [again])
  again.terminate()
  _, (said,) = end([again])
  assert f'vae: resuming from step {step}\n' in said


def test_two_processes_stop_at_the_same_step(tmp_path):
  both = pair(tmp_path / 'run', *LONG)
  wait_for_rows(tmp_path / 'run', 2, both)
  both[1].terminate()
  status, said = end(both)
  assert status == [143, 143], said
  steps = {re.search(r'goes on from step (\d+) of', text)[1] for text in said}
  assert len(steps) == 1


@pytest.mark.parametrize('dies', [0, 1])  # the first one has the runtime's coordinator, which the other misses at once
def test_a_process_that_dies_ends_the_other_with_one_line_and_the_same_command_goes_on(tmp_path, dies):
  both = pair(tmp_path / 'run', *LONG)
  wait_for_rows(tmp_path / 'run', 3, both)
  both[dies].send_signal(signal.SIGKILL)
  status, said = end(both, seconds=150)
  assert status[dies] == -signal.SIGKILL and status[1 - dies] == 1, said
  assert 'if another process has gone, start all again' in said[1 - dies].splitlines()[-1]
  again = pair(tmp_path / 'run', *LONG)
  wait_for_rows(tmp_path / 'run', len(rows(tmp_path / 'run')) + 1, again)
  again[0].terminate()
  status, said = end(again)
  assert status == [143, 143] and re.search(r'vae: resuming from step \d+0\n', said[0]), said


def test_a_fit_in_closed_form_takes_and_leaves_parameters_that_two_processes_share(tmp_path):
  args = [f'--config={ROOT}/experiments/prior_comparison.py:smoke', "--config.recipe=('vae', 'normal')"]
  args += ["--config.evaluate.tasks=('samples',)", '--config.mesh.fsdp=2', '--config.mesh.min_shard_size=16']
  status, said = end(pair(tmp_path / 'run', *args), seconds=300)
  assert status == [0, 0], said
  assert "vae: parameters P('fsdp',)" in said[0] and (tmp_path / 'run' / 'checkpoints' / 'normal' / '0').is_dir()


def test_two_processes_evaluate_like_one(tmp_path):
  args = [f'--config={ROOT}/experiments/vae_nce.py:smoke']
  both = pair(tmp_path / 'two', *args)
  status, said = end(both, seconds=500)
  assert status == [0, 0], said
  (status,), (said,) = end([start(tmp_path / 'one', *args)], seconds=500)
  assert status == 0, said
  one, two = (json.loads((tmp_path / name / 'results.json').read_text()) for name in ('one', 'two'))
  assert one.keys() == two.keys() and two.pop('run')['mesh']['data'] == 2
  assert one.pop('run')['revision']
  for name, result in one.items():  # the order of sums alone differs
    assert abs(result['value'] - two[name]['value']) <= 2e-3 * max(1.0, abs(result['value'])), name
    assert result['n'] == two[name]['n']
  drawn = []
  split = ('--config.mesh.fsdp=2', '--config.mesh.min_shard_size=1')
  for begin, mesh in ((pair, split), (lambda *args: [start(*args)], ())):  # from the same parameters
    processes = begin(tmp_path / 'two', *args, '--mode=sample', '--sampler=base', '--num=11', *mesh)
    status, said = end(processes, seconds=300)
    assert not any(status), said
    folder = tmp_path / 'two' / 'samples' / 'nce'
    with np.load(folder / 'drawn-base.npz', allow_pickle=False) as found, Image.open(folder / 'drawn-base.png') as image:
      drawn.append((found['images'], np.asarray(image).astype(int)))
    for path in folder.glob('drawn*'):
      path.unlink()
  (two, picture), (one, other) = drawn
  assert two.shape == (11, 8, 8, 1) and picture.shape == other.shape
  np.testing.assert_allclose(two, one, atol=1e-4)
  assert abs(picture - other).max() <= 1


def test_no_room_for_a_checkpoint_is_said_and_the_last_good_one_stays(tmp_path):
  """No file may grow beyond so many bytes, as on a full disk."""

  def small():
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

  args = [a for a in LONG if 'steps=100000' not in a] + ['--config.stages.vae.steps=40']
  quiet = {'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  (status,), (said,) = end([start(tmp_path / 'run', *args, preexec_fn=small, **quiet)], seconds=300)
  assert status == 1, said
  assert 'could not be written' in said.splitlines()[-1] and 'the same command goes on' in said.splitlines()[-1]
  assert 'Traceback' not in said  # of the writers that find Orbax's event loop closed
  (status,), (said,) = end([start(tmp_path / 'run', *args, "--config.evaluate.tasks=('samples',)")], seconds=300)
  assert status == 0, said


def test_a_folder_that_cannot_be_written_is_refused():
  (status,), (said,) = end([start('/proc/latentgen', *LONG)])
  assert status == 2 and said.count('\n') == 1 and '--workdir: /proc/latentgen cannot be written' in said
