"""Two emulated devices, and two processes, against one device: the same losses, frozen groups to the bit."""

import json
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from quick import environment

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.slow


def start(experiment, workdir, data, fsdp, **env):
  env = environment(PYTHONPATH=str(HERE.parent / 'src'), **env)
  command = [sys.executable, str(HERE / 'devices.py'), experiment, str(workdir), str(data), str(fsdp)]
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def found(process, workdir):
  try:
    _, error = process.communicate(timeout=500)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGKILL)  # jax.distributed swallows SIGTERM
    raise
  assert process.returncode == 0, error[-3000:]
  return json.loads((workdir / 'found.json').read_text())


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('one')
  return found(start('nvae_nce.py', workdir, 1, 1), workdir)


def same(one, other):
  assert [(r['stage'], r['step'], r['split']) for r in one['rows']] == [
    (r['stage'], r['step'], r['split']) for r in other['rows']
  ]
  for a, b in zip(one['rows'], other['rows'], strict=True):
    for name in a.keys() - {'stage', 'split'}:
      # summation order alone differs; training amplifies it step by step
      np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=2e-3, err_msg=f'{name} at {a["stage"]} {a["step"]}')
  assert one['frozen'] and other['frozen']


@pytest.mark.parametrize('data, fsdp', [(2, 1), (1, 2)])
def test_two_devices_train_like_one(alone, tmp_path, data, fsdp):
  flags = '--xla_force_host_platform_device_count=2'
  other = found(start('nvae_nce.py', tmp_path, data, fsdp, XLA_FLAGS=flags), tmp_path)
  assert other['devices'] == 2
  assert (other['split'] > 10) == (fsdp == 2)
  same(alone, other)


def test_two_processes_train_like_one(tmp_path):
  alone = found(start('vae_nce.py', tmp_path / 'one', 1, 1), tmp_path / 'one')
  tmp_path = tmp_path / 'two'
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  common = {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': '2'}
  pair = [start('vae_nce.py', tmp_path, 2, 1, JAX_PROCESS_ID=str(i), **common) for i in range(2)]
  try:
    other = found(pair[0], tmp_path)
    pair[1].communicate(timeout=60)
    assert pair[1].returncode == 0
  finally:
    for process in pair:
      if process.poll() is None:
        process.send_signal(signal.SIGKILL)
  assert other['devices'] == 2
  same(alone, other)
