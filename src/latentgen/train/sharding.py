"""Devices: one mesh `(data, fsdp)`, placement of the state by rules, of batches along both axes.

One device is the mesh (1, 1), so that nothing is written twice. A mesh changes speed and memory, never results (beyond
summation order).
"""

from collections.abc import Callable, Sequence
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from latentgen.errors import UserError

AXES = ('data', 'fsdp')
DEFAULT_RULES = (('.*', 'fsdp'),)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
  """The device mesh; `data=-1` takes all devices that `fsdp` leaves.

  Raises:
    UserError: if data * fsdp is not the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  if fsdp < 1 or len(devices) % fsdp:
    raise UserError(f'config.mesh.fsdp is {fsdp}: it must divide the {len(devices)} devices')
  if data == -1:
    data = len(devices) // fsdp
  if data * fsdp != len(devices):
    raise UserError(f'config.mesh: data * fsdp = {data} * {fsdp}, but there are {len(devices)} devices; data=-1 fits')
  # Explicit axes, jax's default, refuse to fold importance samples into the batch.
  return Mesh(np.asarray(devices).reshape(data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
  """That the devices divide the batch, and each part of it.

  Raises:
    UserError: they do not.
  """
  where = 'config.data.batch_size'
  if batch_size % mesh.size:
    fits = max(mesh.size, batch_size // mesh.size * mesh.size)
    raise UserError(f'{where} is {batch_size}, not divisible by the {mesh.size} devices; {fits} would be')
  if batch_size % (accumulate * mesh.size):
    parts = f'the {accumulate} parts of config.train.accumulate on {mesh.size} devices'
    raise UserError(f'{where} is {batch_size}, not divisible by {parts}')


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules, min_size: int) -> P:
  for pattern, rule in rules:
    if re.search(pattern, path):
      break
  else:
    rule = 'replicate'
  if rule == 'replicate' or mesh.shape['fsdp'] == 1 or math.prod(shape) < min_size:
    return P()
  if rule != 'fsdp':
    raise UserError(f"config.mesh.rules: {rule!r} for {pattern!r} is neither 'fsdp' nor 'replicate'")
  first = 1 if re.search(r'(^|/)stack', path) else 0  # the axis of scanned groups is never split
  axes = [i for i in range(first, len(shape)) if shape[i] % mesh.shape['fsdp'] == 0]
  if not axes:
    return P()
  axis = max(axes, key=lambda i: shape[i])
  return P(*(['fsdp' if i == axis else None for i in range(axis + 1)]))


def shardings(tree: Any, mesh: Mesh, rules=DEFAULT_RULES, min_size: int = 2**16) -> Any:
  """A sharding for every leaf of a tree of arrays or shapes.

  Args:
    tree: arrays or ShapeDtypeStructs.
    mesh: the `(data, fsdp)` mesh.
    rules: pairs (regular expression over 'params/decoder/...', 'fsdp' | 'replicate'); the first match wins. 'fsdp' splits a
      tensor on its largest divisible axis.
    min_size: tensors with fewer elements stay whole.
  """

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, _spec(name, leaf.shape, mesh, rules, min_size))

  return jax.tree_util.tree_map_with_path(one, tree)


def describe(tree: Any, placed: Any) -> list[str]:
  """The grouping that the rules made, one line a distinct partition: spec, tensors, elements."""
  table: dict[str, list[int]] = {}
  for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
    row = table.setdefault(str(sharding.spec), [0, 0])
    row[0] += 1
    row[1] += math.prod(leaf.shape)
  return [f'{spec}: {n} tensors, {size:,} elements' for spec, (n, size) in sorted(table.items())]


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Host arrays (this process's share) -> global arrays split over the mesh."""
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  with jax.transfer_guard('allow'):  # meant, but implicit to the guard
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def gather(mesh: Mesh) -> Callable[[Any], Any]:
  """What makes a tree of split arrays whole on every device; without it, XLA splits activations as it finds the kernels split."""
  if mesh.shape['fsdp'] == 1:
    return lambda tree: tree
  return lambda tree: jax.lax.with_sharding_constraint(tree, replicated(mesh))
