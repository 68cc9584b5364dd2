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
  """The command; what it says goes to a file beside the work directory."""
  env = {**os.environ, 'PYTHONPATH': str(ROOT / 'src')}
  command = [sys.executable, '-m', 'latentgen.main', *flags(kills), f'--workdir={workdir}']
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with said(workdir).open('w') as file:
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=file)


def said(workdir: pathlib.Path) -> pathlib.Path:
  return workdir.with_suffix('.log')


def finish(workdir: pathlib.Path, kills: int) -> float:
  """Seconds that the command takes to its end."""
  begun = time.monotonic()
  if status := start(workdir, kills).wait(timeout=1200):
    raise RuntimeError(f'status {status}: {said(workdir).read_text()[-2000:]}')
  return time.monotonic() - begun


def disturbed(workdir: pathlib.Path, kills: int, idle: float, written: int, draw: random.Random) -> int:
  """Kills the command so many times, then lets it end; the number of kills.

  Args:
    workdir: of the run.
    kills: how many.
    idle: seconds that the command takes beside training; a fifth of the kills come within them, whatever has been reached.
    written: lines of metrics that the whole run writes; the other kills come some time after a random number of new ones, so that
      they spread over the run however fast the machine is.
    draw: of the instants.
  """
  metrics = workdir / 'metrics.jsonl'
  lines = lambda: metrics.read_bytes().count(b'\n') if metrics.exists() else 0
  for done in range(kills):
    early = draw.random() < 0.2
    more = 0 if early else draw.randint(0, max(1, (written - lines()) // (kills - done) - 1))
    process, wanted = start(workdir, kills), lines() + more
    deadline = time.monotonic() + draw.uniform(0.0, idle)
    while process.poll() is None and (time.monotonic() < deadline if early else lines() <= wanted):
      time.sleep(0.002)
    if not early:
      time.sleep(draw.uniform(0.0, 0.05))
    process.send_signal(signal.SIGKILL)
    if (status := process.wait()) != -signal.SIGKILL:
      if status:
        raise RuntimeError(f'status {status} after {done} kills: {said(workdir).read_text()[-2000:]}')
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
  written = len((whole / 'metrics.jsonl').read_bytes().splitlines())
  done = disturbed(broken, kills, idle, written, random.Random(seed))
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
