"""What a stage costs, from shapes alone: parameters, FLOPs of a step, bytes on each device."""

import math
from typing import Any

import jax

from latentgen.train import loop, sharding, step as stepping
from latentgen.types import Stage

UNITS = ('B', 'KiB', 'MiB', 'GiB', 'TiB')


def flops(jaxpr: Any) -> int:
  """Multiply-adds times two of all convolutions and matrix products, loops counted as often as they run."""
  total = 0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    elif name == 'conv_general_dilated':
      kernel, spec = eqn.invars[1].aval, params['dimension_numbers'].rhs_spec
      total += 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[spec[0]]
    times = params.get('length', 1) if name == 'scan' else 1
    branches = [flops(sub) for sub in _inner(params)]
    total += max(branches, default=0) if name == 'cond' else times * sum(branches)
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
  """Of a tree of shapes with shardings."""
  return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def human(size: float) -> str:
  power = min(int(math.log(max(size, 1), 1024)), len(UNITS) - 1)
  return f'{size / 1024**power:.1f} {UNITS[power]}'


def step_arguments(run: loop.Run, stage: Stage) -> tuple[Any, ...]:
  """Shapes with shardings of everything that a training step takes."""
  state = run.abstract(stage)
  whole = sharding.replicated(run.mesh)
  place = lambda tree, s: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree)
  health = place(jax.eval_shape(stepping.healthy), whole)
  key = place(jax.eval_shape(lambda: jax.random.key(0)), whole)
  return state, health, key, place(run.example(), sharding.batch_sharding(run.mesh))


def table(run: loop.Run, stage: Stage) -> list[str]:
  """Lines for a person; the step is compiled for the mesh of `run`, on the platform at hand."""
  state, health, key, raw = step_arguments(run, stage)
  lines = [f'stage {stage.name}: mesh {dict(run.mesh.shape)}, batch {run.settings.batch_size}']
  for group, tree in state.params.items():
    lines.append(f'  parameters of {group}: {sum(a.size for a in jax.tree.leaves(tree)):,}')
  if stage.fit is not None:
    return [*lines, '  fitted in closed form: no training step']
  for name in ('params', 'opt', 'ema', 'stats', 'carry'):
    lines.append(f'  {name} on each device: {human(bytes_per_device(getattr(state, name)))}')
  function, _ = stepping.make_step(stage, run.preprocess)
  lines.append(f'  FLOPs a step (convolutions, matrix products): {flops(jax.make_jaxpr(function)(state, health, key, raw).jaxpr):.3e}')
  out = (jax.tree.map(lambda a: a.sharding, state), None, None)
  memory = jax.jit(function, donate_argnums=(0, 1), out_shardings=out).lower(state, health, key, raw).compile().memory_analysis()
  if memory is not None:
    lines.append(f'  activations and temporaries of the compiled step: {human(memory.temp_size_in_bytes)}')
  return lines
