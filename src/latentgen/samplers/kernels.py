"""Markov chains of a given length as functions from a density and starting points to end points.

Whoever needs samples of an unnormalised density takes a `Kernel` and does not ask which: short unadjusted chains for training,
adjusted ones or an exact grid where the answer must be right.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from latentgen.samplers.langevin import langevin

Array = jax.Array
LogDensity = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Moves n independent chains; each has noise of its own, whatever the others are.

  Args:
    run: what is called.
    steps: gradient evaluations a chain.
  """

  run: Callable[..., tuple[Array, Array]]
  steps: int

  def __call__(self, key: Array, log_density: LogDensity, position: Array, *data: Any) -> tuple[Array, Array]:
    """Runs the chains.

    Args:
      key: PRNG key.
      log_density: (position [n, d], *data [n, ...]) -> unnormalised log-density, nats, [n]; a chain's value depends on its own
        row of every argument alone.
      position: where the chains start, [n, d].
      *data: what each chain is conditioned on, arrays [n, ...].

    Returns:
      (position [n, d], share of proposals that were accepted [n]).
    """
    return self.run(key, log_density, position, *data)


def _keys(key: Array, n: int) -> Array:
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def ula(steps: int, step_size: float) -> Kernel:
  """Unadjusted Langevin: z <- z + (eta / 2) grad log p + sqrt(eta) w. Published `s` is sqrt(eta).

  Its stationary law is not p: variance 1 / (1 - eta / 4) for N(0, 1). See samplers.langevin.

  Args:
    steps: length of the chain.
    step_size: eta.

  References:
    Nijkamp, Hill, Zhu and Wu, "Learning Non-Convergent Non-Persistent Short-Run MCMC Toward Energy-Based Model", 2019, arXiv
    1904.09770.
  """

  def run(key, log_density, position, *data):
    chain = langevin(lambda z: log_density(z, *data))
    state, _ = chain.run(_keys(key, len(position)), chain.init(position), step_size, steps)
    return state.position, jnp.ones(len(position))

  return Kernel(run, steps)


def mala(steps: int, step_size: float) -> Kernel:
  """Metropolis-adjusted Langevin, from blackjax: its stationary law is p.

  Args:
    steps: length of the chain.
    step_size: eta as in `ula`; blackjax's own step size is eta / 2.

  References:
    Besag, comment on "Representations of Knowledge in Complex Systems", 1994. Roberts and Tweedie, 1996.
  """
  import blackjax  # takes seconds

  kernel = blackjax.mala.build_kernel()

  def run(key, log_density, position, *data):
    def chain(key, z, *own):
      alone = lambda z: log_density(z[None], *(a[None] for a in own))[0]

      def body(state, index):
        state, info = kernel(jax.random.fold_in(key, index), state, alone, 0.5 * step_size)
        return state, info.is_accepted

      state, accepted = jax.lax.scan(body, blackjax.mala.init(z, alone), jnp.arange(steps))
      return state.position, accepted.mean()

    return jax.vmap(chain)(_keys(key, len(position)), position, *data)

  return Kernel(run, steps)
