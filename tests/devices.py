"""Run as a program by test_mesh.py: a few steps of the main job on a mesh; what came out goes to WORKDIR/found.json.

usage: devices.py WORKDIR DATA FSDP [DIES]

The process of rank DIES kills itself in the third step of four, when the checkpoint of the second is there.
"""

import collections
import functools
import json
import os
import pathlib
import signal
import time

import jax

from latentgen import main as command

EXPERIMENT = pathlib.Path(__file__).parents[1] / 'experiments' / 'nvae_nce.py'


def main(argv: list[str]) -> None:
  command.start_jax('auto')
  from latentgen import assembly, config as configs
  from latentgen.train import loop

  workdir, (data, fsdp) = pathlib.Path(argv[0]), map(int, argv[1:3])
  _, config = configs.load(f'{EXPERIMENT}:smoke')
  config.stages.vae.steps, config.stages.nce.steps, config.train.checkpoint_every_steps = 4, 2, 2
  config.model.update(groups=(2,), channels=8)  # half of the compilation
  configs.override(config, {'mesh.data': data, 'mesh.fsdp': fsdp})
  with config.unlocked():
    config.mesh.min_shard_size = 64
  run = assembly.build(config, workdir)
  run.workdir.mkdir(exist_ok=True, parents=True)
  if argv[3:] == [str(jax.process_index())]:
    loop.Metrics.write = functools.partialmethod(die, workdir / 'checkpoints' / 'vae' / '2')
  compiled = collections.Counter()
  jax.monitoring.register_event_duration_secs_listener(lambda name, _, **about: compiled.update([(name, about.get('fun_name'))]))
  loop.train(run)
  one, two = (loop.load_variables(run, stage) for stage in run.recipe)

  def frozen_groups(variables):
    return [(variables['params'][g], variables['stats'].get(g)) for g in ('encoder', 'decoder')]

  frozen = jax.tree.map(lambda a, b: bool((a == b).all()), frozen_groups(one), frozen_groups(two))
  abstract = run.abstract(run.recipe[0])
  split = sum(a.sharding.spec != jax.sharding.PartitionSpec() for a in jax.tree.leaves(abstract.params))
  if jax.process_index() == 0:
    rows = [json.loads(line) for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()]
    steps = compiled['/jax/core/compile/backend_compile_duration', 'jit(step)']
    report = {'rows': rows, 'frozen': all(jax.tree.leaves(frozen)), 'split': split, 'devices': jax.device_count(), 'compiled': steps}
    (run.workdir / 'found.json').write_text(json.dumps(report))


def die(metrics, checkpoint: pathlib.Path, stage: str, step: int, *args) -> None:
  """In place of Metrics.write, which only the first process needs."""
  if (stage, step) == ('vae', 3):
    while not checkpoint.exists():
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == '__main__':
  command.main = main
  command.cli()  # with its messages and exit statuses
