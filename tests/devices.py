"""Run as a program by test_mesh.py: a few steps of the main job on a mesh, losses and frozen groups to stdout as JSON.

usage: devices.py EXPERIMENT WORKDIR DATA FSDP
"""

import json
import os
import pathlib
import sys

import jax


def main(experiment: str, workdir: str, data: int, fsdp: int) -> None:
  if 'JAX_NUM_PROCESSES' in os.environ:
    from latentgen.main import start_jax

    start_jax('auto')
  from latentgen import assembly, config as configs
  from latentgen.train import loop

  root = pathlib.Path(__file__).parents[1]
  _, config = configs.load(f'{root / "experiments" / experiment}:smoke')
  config.stages.vae.steps = config.stages.nce.steps = 4
  configs.override(config, {'mesh.data': data, 'mesh.fsdp': fsdp})
  with config.unlocked():
    config.mesh.min_shard_size = 64
  run = assembly.build(config, pathlib.Path(workdir))
  run.workdir.mkdir(exist_ok=True, parents=True)
  loop.train(run)
  one, two = (loop.load_variables(run, stage) for stage in run.recipe)

  def frozen_groups(variables):
    return [(variables['params'][g], variables['stats'].get(g)) for g in ('encoder', 'decoder')]

  frozen = jax.tree.map(lambda a, b: bool((a == b).all()), frozen_groups(one), frozen_groups(two))
  abstract = run.abstract(run.recipe[0])
  split = sum(a.sharding.spec != jax.sharding.PartitionSpec() for a in jax.tree.leaves(abstract.params))
  if jax.process_index() == 0:
    rows = [json.loads(line) for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()]
    report = {'rows': rows, 'frozen': all(jax.tree.leaves(frozen)), 'split': split, 'devices': jax.device_count()}
    (run.workdir / 'found.json').write_text(json.dumps(report))


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
