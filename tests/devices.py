"""Run as a program by test_mesh.py: a few steps of the main job on a mesh, losses and frozen groups to stdout as JSON.

usage: devices.py WORKDIR DATA FSDP
"""

import json
import os
import pathlib
import sys

import jax


def main(workdir: str, data: int, fsdp: int) -> None:
  if 'JAX_NUM_PROCESSES' in os.environ:
    from latentgen.main import start_jax

    start_jax('auto')
  from latentgen import config as configs
  from latentgen.train import loop

  root = pathlib.Path(__file__).parents[1]
  _, config = configs.load(f'{root / "experiments" / "nvae_nce.py"}:smoke')
  config.stages.vae.steps = config.stages.nce.steps = 6
  configs.override(config, {'mesh.data': data, 'mesh.fsdp': fsdp})
  with config.unlocked():
    config.mesh.min_shard_size = 64
  run = configs.build(config, pathlib.Path(workdir))
  run.workdir.mkdir(exist_ok=True, parents=True)
  loop.train(run)
  one, two = (loop.load_variables(run, stage) for stage in run.recipe)
  frozen = jax.tree.map(
    lambda a, b: bool(jax.numpy.array_equal(a, b)),
    [(v['params'][g], v['stats'][g]) for v in (one,) for g in ('encoder', 'decoder')],
    [(v['params'][g], v['stats'][g]) for v in (two,) for g in ('encoder', 'decoder')],
  )
  abstract = run.abstract(run.recipe[0])
  split = sum(a.sharding.spec != jax.sharding.PartitionSpec() for a in jax.tree.leaves(abstract.params))
  if jax.process_index() == 0:
    rows = [json.loads(line) for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()]
    report = {'rows': rows, 'frozen': all(jax.tree.leaves(frozen)), 'split': split, 'devices': jax.device_count()}
    (run.workdir / 'found.json').write_text(json.dumps(report))


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
