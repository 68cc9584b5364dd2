"""Unadjusted Langevin dynamics on a batch of independent chains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike


class LangevinState(NamedTuple):
  """Where the chains are."""

  position: Any  # tree of [n, ...]
  log_density: Any  # [n], nats, unnormalised
  grad: Any  # tree like `position`


class LangevinInfo(NamedTuple):
  """What one step did."""

  grad_norm: Any  # [n]; Euclidean norm of the gradient that the step followed


class Langevin(NamedTuple):
  """The sampler: three pure functions."""

  init: Callable[[Any], LangevinState]
  step: Callable[[Array, LangevinState, Any], tuple[LangevinState, LangevinInfo]]
  run: Callable[[Array, LangevinState, Any, int], tuple[LangevinState, LangevinInfo]]


def langevin(log_density: Callable[[Any], Float[Array, ' n']]) -> Langevin:
  """Unadjusted Langevin algorithm.

  z <- z + (eta / 2) grad log p(z) + sqrt(eta) w,  w ~ N(0, I)

  There is no accept step: for a normal target of variance s^2 the stationary variance is s^2 / (1 - eta / (4 s^2)).

  Args:
    log_density: position, a tree of [n, ...] -> unnormalised log-density per chain, nats, [n]; chains must
      not interact.

  Returns:
    `init(position) -> state`, `step(key, state, step_size) -> (state, info)` and
    `run(key, state, step_size, steps) -> (state, info)` with `info` stacked, [steps, n]. `step_size` is eta. A key is one
    for all chains, or an array [n] of one for each: then a chain does not depend on which others there are.

  References:
    Roberts, Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations", 1996.
    Xiao, Kreis, Kautz, Vahdat, "VAEBM", 2021, arXiv:2010.00654 (the same step-size convention).
  """

  def total(position: Any) -> tuple[Array, Array]:
    value = log_density(position)
    return value.sum(), value  # one backward pass: the gradient of the sum is each chain's own

  def init(position: Any) -> LangevinState:
    (_, value), grad = jax.value_and_grad(total, has_aux=True)(position)
    return LangevinState(position, value, grad)

  def step(key: Array, state: LangevinState, step_size: ScalarLike) -> tuple[LangevinState, LangevinInfo]:
    leaves, treedef = jax.tree.flatten(state.position)
    split = jnp.moveaxis(_each(lambda k: jax.random.split(k, len(leaves)))(key), -1, 0)
    keys = jax.tree.unflatten(treedef, list(split))

    def move(z: Array, grad: Array, leaf_key: Array) -> Array:
      shape = z.shape[leaf_key.ndim :]
      noise = _each(lambda k: jax.random.normal(k, shape, z.dtype))(leaf_key)
      return (z + 0.5 * step_size * grad + jnp.sqrt(step_size) * noise).astype(z.dtype)

    position = jax.tree.map(move, state.position, state.grad, keys)
    return init(position), LangevinInfo(_norm(state.grad))

  def run(
    key: Array, state: LangevinState, step_size: ScalarLike, steps: int
  ) -> tuple[LangevinState, LangevinInfo]:
    def body(carry: LangevinState, index: Array) -> tuple[LangevinState, LangevinInfo]:
      return step(_each(lambda k: jax.random.fold_in(k, index))(key), carry, step_size)

    return jax.lax.scan(body, state, jnp.arange(steps))

  return Langevin(init, step, run)


def _each(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
  """The function of a key, for one key or an array of them."""
  return lambda key: jax.vmap(function)(key) if key.ndim else function(key)


def _norm(tree: Any) -> Array:
  """Euclidean norm per chain over all leaves."""
  return jnp.sqrt(sum(jnp.square(a).sum(tuple(range(1, a.ndim))) for a in jax.tree.leaves(tree)))
