"""Run as a program by test_cost.py: what a smoke experiment's training step moves between emulated devices, as JSON.

usage: traffic.py EXPERIMENT DATA FSDP
"""

import dataclasses
import json
import pathlib
import sys

import jax

from latentgen import assembly, config as configs
from latentgen.nets import convolution
from latentgen.train import cost


def main(experiment: str, data: int, fsdp: int) -> None:
  root = pathlib.Path(__file__).parents[1]
  _, config = configs.load(f'{root / "experiments" / experiment}:smoke')
  with config.unlocked():
    config.mesh.min_shard_size = 64
  run = assembly.build(config, pathlib.Path('unused'), cost.make_mesh(data, fsdp))
  state = run.abstract(run.recipe[0])
  with convolution.implementation('native'):
    traced = cost.trace(run, run.recipe[0])
    found = cost.measure(run, run.recipe[0])
  memory = traced.lower().compile().memory_analysis()  # with the options of training
  size = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
  report = {
    'moved': [dataclasses.asdict(c) for c in found.moved],
    'memory': found.memory,
    'compiled': memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
    'parameters': size(state.params),
    'largest': max(a.size for a in jax.tree.leaves(state.params)),
    'statistics': size(state.stats),
  }
  print(json.dumps(report))


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
