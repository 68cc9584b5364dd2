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


def flags(kills: int) -> list[str]:
  """Of a run of both stages that is long enough for so many kills."""
  return [
    '--config=experiments/vae_nce.py:smoke', f'--config.stages.vae.steps={200 * kills}', f'--config.stages.nce.steps={100 * kills}',
    '--config.train.checkpoint_every_steps=20', '--config.train.log_every_steps=7', "--config.evaluate.tasks=('likelihood','samples')",
  ]  # fmt: skip


def start(workdir: pathlib.Path, kills: int) -> subprocess.Popen:
  env = {**os.environ, 'PYTHONPATH': str(ROOT / 'src')}
  command = [sys.executable, '-m', 'latentgen.main', *flags(kills), f'--workdir={workdir}']
  return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(workdir: pathlib.Path, kills: int) -> float:
  """Seconds that the command takes to its end."""
  begun, process = time.monotonic(), start(workdir, kills)
  _, error = process.communicate(timeout=1200)
  if process.returncode:
    raise RuntimeError(f'status {process.returncode}: {error[-2000:]}')
  return time.monotonic() - begun


def disturbed(workdir: pathlib.Path, kills: int, idle: float, training: float, draw: random.Random) -> int:
  """Kills the command up to so many times, then lets it end; the number of kills.

  Args:
    workdir: of the run.
    kills: at most.
    idle: seconds that the command takes beside training; a fifth of the kills come within them.
    training: seconds that training takes; the other kills come after some of it, so that they spread over most of the run.
    draw: of the instants.
  """
  for done in range(kills):
    process = start(workdir, kills)
    instant = draw.uniform(0.0, idle) if draw.random() < 0.2 else idle + draw.uniform(0.0, 1.6 * training / kills)
    try:
      _, error = process.communicate(timeout=instant)
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.communicate()
      continue
    if process.returncode:
      raise RuntimeError(f'status {process.returncode} after {done} kills: {error[-2000:]}')
    return done
  finish(workdir, kills)
  return kills


def outcome(workdir: pathlib.Path, kills: int) -> dict[str, bytes]:
  """What must be the same: metrics, results, pictures, and every parameter of both stages."""
  import numpy as np

  from latentgen import assembly, config as configs
  from latentgen.main import parse
  from latentgen.train import loop

  found = {name: (workdir / name).read_bytes() for name in ('metrics.jsonl', 'results.json')}
  found |= {str(p.relative_to(workdir)): p.read_bytes() for p in sorted((workdir / 'samples').rglob('*.png'))}
  parsed, overrides = parse(flags(kills))
  _, config = configs.load(str(ROOT / parsed.config))
  configs.override(config, overrides)
  run = assembly.build(config, workdir)
  for stage in run.recipe:
    import jax

    for path, leaf in jax.tree_util.tree_leaves_with_path(loop.load_variables(run, stage)):
      found[f'{stage.name}{jax.tree_util.keystr(path)}'] = np.asarray(leaf).tobytes()
  return found


def main(folder: str, kills: int = 50, seed: int = 0) -> dict[str, int]:
  whole, broken = pathlib.Path(folder) / 'whole', pathlib.Path(folder) / 'broken'
  finish(whole, kills)
  idle = finish(whole, kills)  # nothing is left to train, and compiled programs are cached
  training = finish(pathlib.Path(folder) / 'timed', kills) - idle
  done = disturbed(broken, kills, idle, training, random.Random(seed))
  one, two = outcome(whole, kills), outcome(broken, kills)
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
