"""What a compiled program moves between devices, read from its text (XLA's HLO)."""

from collections.abc import Iterator
import dataclasses
import math
import re

import numpy as np

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_COLLECTIVE = re.compile(rf' = (.*?) (ragged-all-to-all|{"|".join(KINDS)})(-start)?\(')
_SHAPE = re.compile(r'\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]')
_CALLED = re.compile(r'\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r'replica_groups=\{(?:\{([\d,]*)\})?')
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}')
_IDS = re.compile(r'\[([\d,]+)\](?:T\(([\d,]+)\))?$')
_PAIRS = re.compile(r'source_target_pairs=\{\{(\d+),(\d+)\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Args:
    kind: one of KINDS.
    payload: bytes of the whole tensor that it makes (all-gather) or takes on each device (all others).
    group: devices that take part together, the first of the groups if there are several.
    times: how often a run of the program does it.
    source: the operation of the traced program that it comes from, '' if the compiler made it.
    counted: whether it is known how often the loops around it run; they are taken once otherwise.
  """

  kind: str
  payload: int
  group: tuple[int, ...]
  times: int
  source: str
  counted: bool

  @property
  def sent(self) -> float:
    """Bytes that a device sends each time, by the ring algorithms, which are optimal."""
    n = len(self.group)
    if self.kind in ('collective-permute', 'collective-broadcast'):
      return float(self.payload)
    return (2 if self.kind == 'all-reduce' else 1) * self.payload * (n - 1) / n


def find(text: str, devices: int) -> list[Collective]:
  """The collectives among two devices or more; loops count as often as they run, conditionals as their dearest branch.

  Args:
    text: of the compiled program, `compiled.as_text()`.
    devices: that it runs on.
  """
  bodies: dict[str, list[str]] = {}
  entry = name = ''
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      name = start[2]
      bodies[name] = []
      entry = name if start[1] else entry
    elif name:
      bodies[name].append(line)
  return [c for c in _Walk(bodies, devices).computation(entry) if len(c.group) > 1]


class _Walk:
  """Through computations and what they call, each read once."""

  def __init__(self, bodies: dict[str, list[str]], devices: int):
    self._bodies, self._devices = bodies, devices
    self._found: dict[str, list[Collective]] = {}

  def computation(self, name: str) -> list[Collective]:
    if name not in self._found:
      self._found[name] = [c for line in self._bodies.get(name, ()) for c in self._line(line)]
    return self._found[name]

  def _line(self, line: str) -> Iterator[Collective]:
    if match := _COLLECTIVE.search(line):
      yield _collective(line, match, self._devices)
    called = dict(_CALLED.findall(line))
    if 'body' in called:
      trips = _TRIPS.search(line)
      for c in self.computation(called['body']) + self.computation(called['condition']):
        yield dataclasses.replace(c, times=c.times * int(trips[1] if trips else 1), counted=c.counted and trips is not None)
      return
    branches = [name.strip().lstrip('%') for names in _BRANCHES.findall(line) for name in names.split(',')]
    branches += [called.pop(key) for key in ('true_computation', 'false_computation') if key in called]
    if branches:
      yield from max(map(self.computation, branches), key=lambda found: sum(c.times * c.sent for c in found))
    for name in called.values():
      yield from self.computation(name)


def _collective(line: str, match: re.Match, devices: int) -> Collective:
  kind = match[2].removeprefix('ragged-')
  sizes = [
    math.ceil(int(bits or 8) / 8 * math.prod(map(int, filter(None, shape.split(',')))))
    for _, bits, shape in _SHAPE.findall(match[1])
  ]
  if match[3] and kind in ('all-gather', 'collective-permute'):  # (operands, results, ...)
    sizes = sizes[len(sizes) // 2 :] if kind == 'all-gather' else sizes[1:2]
  group = _group(line, devices)
  payload = sum(sizes) * (len(group) if kind == 'reduce-scatter' else 1)
  source = re.search(r'op_name="([^"]*)"', line)
  return Collective(kind, payload, group, 1, source[1] if source else '', True)


def _group(line: str, devices: int) -> tuple[int, ...]:
  """The first group of devices of a collective, in any of XLA's notations."""
  if pairs := _PAIRS.search(line):
    return tuple(map(int, pairs.groups()))
  if iota := _IOTA.search(line):
    return tuple(_counted(iota[2], iota[3]).reshape(_ints(iota[1]))[0].tolist())
  if mesh := _MESH.search(line):
    axes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
    ids = np.arange(math.prod(axes.values()))
    if mesh[2]:  # devices in another order than they are counted
      counted = _IDS.match(mesh[2])
      ids = _counted(*counted.groups()) if counted else np.array(_ints(mesh[2]))
    chosen = re.findall(r"'([^']*)'(:)?", mesh[3])
    if not any(part for _, part in chosen):
      names = {name for name, _ in chosen}
      kept = tuple(slice(None) if name in names else 0 for name in axes)
      return tuple(ids.reshape(tuple(axes.values()))[kept].ravel().tolist())
  elif listed := _LISTED.search(line):
    return tuple(_ints(listed[1])) if listed[1] else tuple(range(devices))
  elif 'replica_groups=' not in line:
    return tuple(range(devices))
  raise ValueError(f'groups of devices in a notation that is not known: {line.strip()[:300]}')


def _counted(shape: str, order: str | None) -> np.ndarray:
  """0, 1, 2 ... in an array of a shape, its axes in an order, both written as '4,2'."""
  ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
  return ids.transpose(_ints(order)) if order else ids


def _ints(text: str) -> list[int]:
  return [int(i) for i in text.split(',')]
