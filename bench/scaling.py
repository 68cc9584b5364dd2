"""The table of docs/scaling.md, printed: python bench/scaling.py [EXPERIMENT [IMAGES_A_DEVICE]].

Predicts weak scaling over data-parallel devices of an experiment's first stage. The step is compiled once, for two devices: on
more of them each has the same program, and collectives the same tensors between more members (tests/test_cost.py).
"""

import dataclasses
import pathlib
import sys

from latentgen import assembly, config as configs
from latentgen.nets import convolution
from latentgen.train import cost
from latentgen.train.hardware import HARDWARE

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def measure(spec: str, images: int) -> cost.Cost:
  """Of a step on two devices."""
  _, config = configs.load(spec)
  configs.override(config, {'data.batch_size': 2 * images})
  run = assembly.build(config, pathlib.Path('unused'), cost.make_mesh(2), shapes_only=True)
  with convolution.implementation('native'):
    return cost.measure(run, run.recipe[0])


def spread(pair: cost.Cost, devices: int) -> cost.Cost:
  """The step of a pair of devices, on so many with as many images each."""
  assert all(c.group == (0, 1) for c in pair.moved)
  return dataclasses.replace(
    pair,
    mesh={'data': devices, 'fsdp': 1},
    batch_size=pair.batch_size * devices // 2,
    flops={dtype: count * devices // 2 for dtype, count in pair.flops.items()},
    moved=tuple(dataclasses.replace(c, group=tuple(range(devices))) for c in pair.moved) if devices > 1 else (),
  )


def main(spec: str = 'experiments/nvae.py:celebahq256', images: str = '4') -> None:
  pair = measure(spec, int(images))
  print(f'{spec}, stage {pair.stage}, {images} images a device, {sum(pair.parameters.values()):,} parameters')
  print('on each device:', ', '.join(f'{kind} {cost.human(size)}' for kind, size in pair.memory.items() if size))
  print(f'collectives a step: {sum(c.times for c in pair.moved):,}, {cost.human(sum(c.times * c.payload for c in pair.moved))}')
  print('predicted: compute + collectives, efficiency without overlap to efficiency with full overlap')
  names = [h.name for h in HARDWARE]
  print('| devices | images | each sends |', ' | '.join(names), '|')
  print('|', ' | '.join(['---:'] * (3 + len(names))), '|')
  for devices in DEVICES:
    step = spread(pair, devices)
    cells = []
    for hardware in HARDWARE:
      (compute, moving), (least, most) = step.seconds(hardware), step.efficiency(hardware)
      cells.append(f'{cost.duration(compute)} + {cost.duration(moving)}, {least:.0%} to {most:.0%}')
    sent = cost.human(sum(c.times * c.sent for c in step.moved))
    print('|', ' | '.join([str(devices), str(step.batch_size), sent, *cells]), '|')


if __name__ == '__main__':
  main(*sys.argv[1:])
