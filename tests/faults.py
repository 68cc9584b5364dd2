"""Kills a run at random instants, starts it again each time, and compares what is left with an undisturbed run, to the bit.

usage: faults.py WORKDIR [KILLS] [SEED]
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = [
  '--config=experiments/vae_nce.py:smoke', '--config.stages.vae.steps=600', '--config.stages.nce.steps=300',
  '--config.train.checkpoint_every_steps=20', '--config.train.log_every_steps=7', "--config.evaluate.tasks=('likelihood','samples')",
]  # fmt: skip


def start(workdir: pathlib.Path) -> subprocess.Popen:
  env = {**os.environ, 'PYTHONPATH': str(ROOT / 'src')}
  command = [sys.executable, '-m', 'latentgen.main', *COMMAND, f'--workdir={workdir}']
  return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(workdir: pathlib.Path) -> float:
  """Seconds that the command takes to its end."""
  begun, process = time.monotonic(), start(workdir)
  _, error = process.communicate(timeout=600)
  if process.returncode:
    raise RuntimeError(f'status {process.returncode}: {error[-2000:]}')
  return time.monotonic() - begun


def disturbed(workdir: pathlib.Path, kills: int, seconds: float, draw: random.Random) -> int:
  """Kills the command up to so many times, each within `seconds` of its start, then lets it end; the number of kills."""
  for done in range(kills):
    process = start(workdir)
    try:
      _, error = process.communicate(timeout=draw.uniform(0.0, seconds))
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.communicate()
      continue
    if process.returncode:
      raise RuntimeError(f'status {process.returncode} after {done} kills: {error[-2000:]}')
    return done
  finish(workdir)
  return kills


def outcome(workdir: pathlib.Path) -> dict[str, bytes]:
  """What must be the same: metrics, results, pictures, and every parameter of both stages."""
  import numpy as np

  from latentgen import assembly, config as configs
  from latentgen.main import parse
  from latentgen.train import loop

  found = {name: (workdir / name).read_bytes() for name in ('metrics.jsonl', 'results.json')}
  found |= {str(p.relative_to(workdir)): p.read_bytes() for p in sorted((workdir / 'samples').rglob('*.png'))}
  flags, overrides = parse(COMMAND)
  _, config = configs.load(str(ROOT / flags.config))
  configs.override(config, overrides)
  run = assembly.build(config, workdir)
  for stage in run.recipe:
    import jax

    for path, leaf in jax.tree_util.tree_leaves_with_path(loop.load_variables(run, stage)):
      found[f'{stage.name}{jax.tree_util.keystr(path)}'] = np.asarray(leaf).tobytes()
  return found


def main(folder: str, kills: int = 50, seed: int = 0) -> dict[str, int]:
  whole, broken = pathlib.Path(folder) / 'whole', pathlib.Path(folder) / 'broken'
  finish(whole)
  seconds = 0.8 * finish(pathlib.Path(folder) / 'timed')  # compiled programs are cached now; most attempts shall be killed
  done = disturbed(broken, kills, seconds, random.Random(seed))
  one, two = outcome(whole), outcome(broken)
  rows = [json.loads(line) for line in two['metrics.jsonl'].splitlines()]
  places = [(r['stage'], r['split'], r['step']) for r in rows]
  return {
    'kills': done,
    'different': sum(one.get(name) != two.get(name) for name in one.keys() | two.keys()),
    'compared': len(one),
    'rows': len(rows),
    'repeated rows': len(places) - len(set(places)),
  }


if __name__ == '__main__':
  print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
