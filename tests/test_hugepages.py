"""Large pages, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest

from latentgen import hugepages

PROGRAM = """
import os, sys
from latentgen import hugepages
hugepages.restart('probe')
import json, resource
import jax, jax.numpy as jnp
function, x = jax.jit(jnp.sin), jnp.ones(20_000_000)
for i in range(12):
  if i == 2:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  jax.block_until_ready(function(x))
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10
print(json.dumps([os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), faults]))
"""


def run(folder, *before, **environment):
  (folder / 'probe.py').write_text(PROGRAM)
  env = {k: v for k, v in os.environ.items() if k != hugepages.VARIABLE} | {'JAX_PLATFORMS': 'cpu', **environment}
  env['PYTHONPATH'] = os.pathsep.join(filter(None, (str(folder), os.environ.get('PYTHONPATH'))))
  command = [sys.executable, *before, '-m', 'probe', '--a=b c', '']
  with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
    pid, arguments, variable, faults = json.loads(process.communicate(timeout=300)[0].splitlines()[0])
  assert process.returncode == 0 and pid == process.pid and arguments == ['--a=b c', '']
  return variable, faults


def offered():
  return hugepages.SETTING.exists() and '[madvise]' in hugepages.SETTING.read_text()


@pytest.mark.skipif(not offered(), reason='the system gives no large pages to those who ask')
def test_the_program_starts_anew_with_large_pages_once(tmp_path):
  variable, faults = run(tmp_path)
  assert variable == hugepages.VALUE
  assert faults < 2000  # for the 76 MiB of the result; 19,532 pages of 4 KiB


def test_what_the_environment_says_about_malloc_stands(tmp_path):
  variable, faults = run(tmp_path, GLIBC_TUNABLES='glibc.malloc.hugetlb=0')
  assert variable == 'glibc.malloc.hugetlb=0'
  if offered():
    assert faults > 10_000  # what the other test would see if nothing were asked for


def test_what_another_program_runs_is_left_alone(tmp_path):
  assert run(tmp_path, '-m', 'cProfile')[0] is None
