"""Spectral regularisation: the largest singular value of every convolution, by power iteration across steps.

Yoshida and Miyato, "Spectral Norm Regularization for Improving the Generalizability of Deep Learning", 2017,
arXiv 1705.10941; Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020,
arXiv 2007.03898, section 3.2.

Pure functions over a nested dict of parameters, split into groups or not. A convolution is a leaf `kernel` of four axes
[k, k', i, o], or five where a scan has stacked layers in front; with a `gain` beside it the weight is the normalised
one, as the network uses it. Masked kernels are stored masked. Dense layers (two axes) are left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from latentgen.nets.convolution import weight_norm
from latentgen.types import Array, Key

EPS = 1e-3  # floor of the norms of u and v
State = dict[str, tuple[Array, Array]]  # {'OxI': (u [layers, O], v [layers, I])}


def _modules(tree: Mapping[str, Any], name: str = '') -> Iterator[tuple[str, Mapping[str, Any]]]:
  """All (name, nested dict) below and including a tree, in an order that does not depend on insertion."""
  yield name, tree
  for key in sorted(tree):
    if isinstance(tree[key], Mapping):
      yield from _modules(tree[key], key)


def matrices(params: Mapping[str, Any]) -> dict[str, Array]:
  """The weights of all convolutions as matrices, stacked by shape.

  Args:
    params: nested dict.

  Returns:
    {'OxI': [layers, O, I]} with O output channels and I = k * k' * i; depthwise O = c, I = k * k'.
  """
  found: dict[str, list[Array]] = {}
  for _, module in _modules(params):
    kernel = module.get('kernel')
    if kernel is None or isinstance(kernel, Mapping) or kernel.ndim < 4:
      continue
    if 'gain' in module:
      kernel = weight_norm(kernel, module['gain'])
    height, width, inputs, outputs = kernel.shape[-4:]
    rows = jnp.moveaxis(kernel, -1, -4).reshape(-1, outputs, height * width * inputs)
    found.setdefault(f'{rows.shape[1]}x{rows.shape[2]}', []).append(rows.astype(jnp.float32))
  return {shape: jnp.concatenate(found[shape]) for shape in sorted(found)}


def batch_norm_penalty(params: Mapping[str, Any]) -> Array:
  """Sum over BatchNorm layers of max over channels of |scale|."""
  scales = [m['scale'] for name, m in _modules(params) if name.startswith('BatchNorm') and 'scale' in m]
  return sum((jnp.abs(s).max(-1).sum() for s in scales), jnp.zeros(()))


def _normalise(x: Array) -> Array:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), EPS)


def _iterate(w: Array, u: Array, v: Array, iterations: int) -> tuple[Array, Array]:
  """Power iteration on a stack of matrices, w [l, o, i], u [l, o], v [l, i]."""

  def step(_, uv):
    v = _normalise(jnp.einsum('loi,lo->li', w, uv[0]))
    return _normalise(jnp.einsum('loi,li->lo', w, v)), v

  return lax.fori_loop(0, iterations, step, (u, v))


def init(key: Key, params: Mapping[str, Any], iterations: int = 40) -> State:
  """Singular vectors to start from.

  Args:
    key: PRNG key.
    params: nested dict; `penalty` must see the same structure.
    iterations: of power iteration.

  Returns:
    {'OxI': (u [layers, O], v [layers, I])}.
  """
  state = {}
  for i, (shape, w) in enumerate(matrices(params).items()):
    keys = jax.random.split(jax.random.fold_in(key, i))
    u, v = (_normalise(jax.random.normal(k, (w.shape[0], n))) for k, n in zip(keys, w.shape[1:], strict=True))
    state[shape] = _iterate(w, u, v, iterations)
  return state


def sigmas(params: Mapping[str, Any], state: State, iterations: int = 4) -> tuple[dict[str, Array], State]:
  """Largest singular value u^T W v of every convolution, {'OxI': [layers]}, and the new state; d sigma / dW = u v^T."""
  values, new = {}, {}
  for shape, w in matrices(params).items():
    u, v = _iterate(lax.stop_gradient(w), *state[shape], iterations)
    new[shape] = u, v = lax.stop_gradient((u, v))
    values[shape] = jnp.einsum('lo,loi,li->l', u, w, v)
  return values, new


def penalty(params: Mapping[str, Any], state: State, iterations: int = 4) -> tuple[Array, State]:
  """Sum of largest singular values of all convolutions plus sum over BatchNorm layers of max |scale|.

  Args:
    params: nested dict.
    state: of `init` or of the call before.
    iterations: of power iteration.

  Returns:
    the penalty, [], and the new state, through which no gradient flows.
  """
  values, new = sigmas(params, state, iterations)
  return sum((v.sum() for v in values.values()), jnp.zeros(())) + batch_norm_penalty(params), new
