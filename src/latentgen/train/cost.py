"""What a step of a stage costs, from shapes alone: parameters, bytes on each device, FLOPs, traffic, predicted efficiency."""

from collections import Counter
from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
from jax.extend import backend

from latentgen.errors import UserError
from latentgen.train import collectives, loop, sharding, step as stepping
from latentgen.train.hardware import HARDWARE, Hardware
from latentgen.types import Stage

UNITS = ('B', 'KiB', 'MiB', 'GiB', 'TiB')
KINDS = {'params': 'parameters', 'opt': 'optimiser', 'ema': 'averages', 'stats': 'statistics', 'carry': 'carry'}
MOST_DEVICES = 2**14  # that are emulated
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}  # of machine code that nobody runs
ASSUMPTIONS = (
  'Times are predictions from datasheets (latentgen/train/hardware.py): compute at peak; collectives one after the other, at',
  'full bandwidth, by rings, first within a server or pod, then across; no latency. Efficiency is compute / (compute +',
  'collectives) without overlap, compute / max(compute, collectives) with full overlap. Temporaries and collectives are',
  'those of the program for the platform named above; another may merge collectives, or reduce-scatter where this all-reduces.',
)


def make_mesh(data: int = -1, fsdp: int = 1) -> jax.sharding.Mesh:
  """The mesh of a config, of emulated CPU devices if those at hand are not as many. Arrays made before become invalid.

  Raises:
    UserError: not a number of devices.
  """
  if data == -1:
    data = max(1, len(jax.devices()) // max(fsdp, 1))
  for key, count in (('data', data), ('fsdp', fsdp)):
    if not 1 <= count <= MOST_DEVICES:
      raise UserError(f'config.mesh.{key} is {count}, need a number of devices from 1 to {MOST_DEVICES}')
  if data * fsdp > MOST_DEVICES:
    raise UserError(f'config.mesh: data * fsdp = {data} * {fsdp} devices, at most {MOST_DEVICES} are emulated; take fewer')
  if data * fsdp != len(jax.devices()):
    backend.clear_backends()
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', data * fsdp)
  return sharding.make_mesh(data, fsdp)


def flops(jaxpr: Any) -> Counter[str]:
  """{dtype: multiply-adds times two} of all convolutions and matrix products, loops counted as often as they run."""
  total: Counter[str] = Counter()
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      per_output = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    elif name == 'conv_general_dilated':
      kernel, spec = eqn.invars[1].aval, params['dimension_numbers'].rhs_spec
      per_output = kernel.size // kernel.shape[spec[0]]
    else:
      times = params.get('length', 1) if name == 'scan' else 1
      branches = [flops(sub) for sub in _inner(params)]
      if name == 'cond':
        branches = [max(branches, key=lambda found: found.total(), default=Counter())]
      for found in branches:
        total.update({dtype: times * count for dtype, count in found.items()})
      continue
    total[eqn.invars[0].aval.dtype.name] += 2 * eqn.outvars[0].aval.size * per_output
  return total


def _inner(params: Any) -> list[Any]:
  """The programs in an equation's parameters: bodies of loops, branches, calls."""
  found = []
  for value in jax.tree.leaves(list(params.values()), is_leaf=lambda v: hasattr(v, 'eqns') or hasattr(v, 'jaxpr')):
    value = getattr(value, 'jaxpr', value)
    if hasattr(value, 'eqns'):
      found.append(value)
  return found


def bytes_per_device(tree: Any) -> int:
  """Of a tree of shapes; one without a sharding is whole on its device."""
  held = lambda a: a.sharding.shard_shape(a.shape) if a.sharding else a.shape
  return sum(math.prod(held(a)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def human(size: float) -> str:
  power = min(int(math.log(max(size, 1), 1024)), len(UNITS) - 1)
  return f'{size / 1024**power:.1f} {UNITS[power]}'


def duration(seconds: float) -> str:
  for unit, size in (('s', 1.0), ('ms', 1e-3), ('us', 1e-6)):
    if seconds >= size:
      break
  return f'{seconds / size:.3g} {unit}'


def trace(run: loop.Run, stage: Stage) -> jax.stages.Traced:
  """The training step as the loop compiles it."""
  return loop.build_step(run, stage)[0].trace(*loop.step_arguments(run, stage))


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one training step.

  Args:
    stage: its name.
    mesh: {axis: devices}.
    platform: that the step was compiled for.
    batch_size: images of a step, on all devices together.
    parameters: {group: how many}.
    memory: {kind: bytes on each device}, with the temporaries of the compiled step.
    flops: {dtype: operations of a step, all devices together}.
    moved: collectives of a step.
  """

  stage: str
  mesh: Mapping[str, int]
  platform: str
  batch_size: int
  parameters: Mapping[str, int]
  memory: Mapping[str, int]
  flops: Mapping[str, int]
  moved: tuple[collectives.Collective, ...]

  @property
  def devices(self) -> int:
    return math.prod(self.mesh.values())

  def seconds(self, hardware: Hardware) -> tuple[float, float]:
    """(compute, collectives) of a step on each device; the products are taken to be split evenly."""
    share = {dtype: count / self.devices for dtype, count in self.flops.items()}
    return hardware.compute_seconds(share), hardware.communication_seconds(self.moved)

  def efficiency(self, hardware: Hardware) -> tuple[float, float]:
    """Share of the time that is compute: (without overlap, with full overlap)."""
    compute, communication = self.seconds(hardware)
    return compute / (compute + communication or 1.0), compute / (max(compute, communication) or 1.0)


def measure(run: loop.Run, stage: Stage) -> Cost:
  """Compiles the step for the mesh of `run`, on which nothing is run. A stage in closed form has no step."""
  state, *rest = loop.step_arguments(run, stage)
  memory = {label: bytes_per_device(getattr(state, name)) for name, label in KINDS.items()}
  count, moved = Counter(), ()
  platform = run.mesh.devices.flat[0].platform
  if stage.fit is None:
    memory['batch'] = bytes_per_device(rest)
    traced = trace(run, stage)
    count = flops(traced.jaxpr.jaxpr)
    compiled = traced.lower().compile(compiler_options=QUICK if platform == 'cpu' else None)
    moved = tuple(collectives.find(compiled.as_text(), run.mesh.size))
    found = compiled.memory_analysis()
    if found is not None:
      memory['activations and temporaries'] = found.temp_size_in_bytes
  return Cost(
    stage=stage.name,
    mesh=dict(run.mesh.shape),
    platform=platform,
    batch_size=run.settings.batch_size,
    parameters={group: sum(a.size for a in jax.tree.leaves(tree)) for group, tree in state.params.items()},
    memory=memory,
    flops=count,
    moved=moved,
  )


def table(run: loop.Run, stage: Stage) -> list[str]:
  """Lines for a person."""
  cost = measure(run, stage)
  lines = [f'stage {stage.name}: mesh {dict(cost.mesh)}, batch {cost.batch_size}, compiled for {cost.platform}']
  lines += [f'  parameters of {group}: {count:,}' for group, count in cost.parameters.items()]
  if stage.fit is not None:
    return [*lines, '  fitted in closed form: no training step']
  lines += [f'  {kind} on each device: {human(size)}' for kind, size in cost.memory.items() if size]
  lines.append(f'  in all on each device: {human(sum(cost.memory.values()))}')
  types = ', '.join(f'{dtype} {count:.3e}' for dtype, count in sorted(cost.flops.items()))
  lines.append(f'  FLOPs a step (convolutions, matrix products): {sum(cost.flops.values()):.3e} ({types or "none"})')
  for kind in collectives.KINDS:
    found = [c for c in cost.moved if c.kind == kind]
    if found:
      payload, sent = sum(c.times * c.payload for c in found), sum(c.times * c.sent for c in found)
      lines.append(f'  {kind}: {sum(c.times for c in found):,} a step, {human(payload)}; each device sends {human(sent)}')
  if not cost.moved:
    lines.append('  collectives: none')
  if not all(c.counted for c in cost.moved):
    lines.append('  some collectives are in loops of unknown length, which are counted once')
  for hardware in HARDWARE:
    (compute, communication), (least, most) = cost.seconds(hardware), cost.efficiency(hardware)
    fits = 'fits' if sum(cost.memory.values()) <= hardware.memory else 'does not fit'
    lines.append(
      f'  {cost.devices} x {hardware.name}, predicted: compute {duration(compute)}, collectives {duration(communication)}, '
      f'efficiency {least:.1%} to {most:.1%}; {fits} in {human(hardware.memory)}'
    )
  return lines
