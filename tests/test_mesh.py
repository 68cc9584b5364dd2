"""Four emulated devices, and four processes of which one dies, against one device: same losses, frozen groups to the bit."""

import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
from processes import end, together
import pytest
from quick import environment

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.slow


def start(workdir, data, fsdp, *dies, **env):
  # NPROC: threads of a process. Collectives that wait for one another hold one each, for every device; too few never end.
  env = environment(PYTHONPATH=str(HERE.parent / 'src'), NPROC='256', **env)
  command = [sys.executable, str(HERE / 'devices.py'), *map(str, (workdir, data, fsdp, *dies))]
  return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def found(processes, workdir):
  """What a run that ends well has left, and what each process said."""
  status, said = end(processes, seconds=500)
  assert not any(status), said
  return json.loads((workdir / 'found.json').read_text()), said


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('one')
  return found([start(workdir, 1, 1)], workdir)[0]


def same(one, other):
  assert [(r['stage'], r['step'], r['split']) for r in one['rows']] == [
    (r['stage'], r['step'], r['split']) for r in other['rows']
  ]
  for a, b in zip(one['rows'], other['rows'], strict=True):
    for name in a.keys() - {'stage', 'split'}:
      # summation order alone differs; training amplifies it step by step
      np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=2e-3, err_msg=f'{name} at {a["stage"]} {a["step"]}')
  assert one['frozen'] and other['frozen'] and other['devices'] == 4
  assert one['compiled'] == other['compiled'] == 2  # the step of each stage, ahead of its first state, and not again


def test_four_devices_that_split_images_and_parameters_train_like_one(alone, tmp_path):
  other, _ = found([start(tmp_path, 2, 2, XLA_FLAGS='--xla_force_host_platform_device_count=4')], tmp_path)
  assert other['split'] > 10
  same(alone, other)


def test_four_processes_train_like_one_though_one_of_them_dies(alone, tmp_path):
  four = together(lambda **env: start(tmp_path, 4, 1, 2, **env), 4)
  four[2].wait(timeout=500)
  status, said = end(four, seconds=60)
  assert status == [1, 1, -signal.SIGKILL, 1], said
  assert all('if another process has gone, start all again' in said[i].splitlines()[-1] for i in (0, 1, 3)), said
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert max(r['step'] for r in rows) < 4 and {r['stage'] for r in rows} == {'vae'}
  other, said = found(together(lambda **env: start(tmp_path, 4, 1, **env), 4), tmp_path)
  assert 'vae: resuming from step 2\n' in said[0]
  same(alone, other)
