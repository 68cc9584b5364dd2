"""Networks. Flax Linen is imported here (and by critics) only; the rest of the package calls `init` and `apply`."""

from collections.abc import Mapping
from typing import Any

INFERENCE = frozenset({'encoder', 'posterior'})


def groups(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Splits a nested dict of parameters or statistics into inference and generation.

  What lies under a path component `encoder` or `posterior` belongs to inference.

  Args:
    tree: nested dict.

  Returns:
    {'encoder': nested dict, 'decoder': nested dict}; their leaves are those of `tree`, none twice.
  """
  return {'encoder': _part(tree, True), 'decoder': _part(tree, False)}


def _part(tree: Mapping[str, Any], inference: bool) -> dict[str, Any]:
  out = {}
  for name, value in tree.items():
    if name in INFERENCE:
      if inference:
        out[name] = value
    elif isinstance(value, Mapping):
      if inner := _part(value, inference):
        out[name] = inner
    elif not inference:
      out[name] = value
  return out


def ungroup(grouped: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Merges the trees of all groups into one nested dict; the inverse of `groups`.

  Raises:
    ValueError: if two groups hold the same leaf.
  """
  out: dict[str, Any] = {}
  for tree in grouped.values():
    _merge(out, tree, '')
  return out


def _merge(out: dict[str, Any], tree: Mapping[str, Any], path: str) -> None:
  for name, value in tree.items():
    if name not in out:
      out[name] = _copy(value)
    elif isinstance(value, Mapping) and isinstance(out[name], dict):
      _merge(out[name], value, f'{path}{name}/')
    else:
      raise ValueError(f'two parameter groups hold {path}{name}')


def _copy(tree: Any) -> Any:
  return {name: _copy(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree
