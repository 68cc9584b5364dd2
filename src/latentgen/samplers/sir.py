"""Sampling-importance-resampling in memory that does not grow with the number of proposals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from latentgen.losses.bounds import RunningLogMeanExp


class SIRInfo(NamedTuple):
  """What the weights of the proposals say, per output."""

  log_z: Array  # [n], nats; log (1/num) sum_m r_m, biased downwards as an estimate of log E[r]
  ess: Array  # [n]; effective number of proposals, a count in [1, num]


def sir(
  key: Array,
  propose: Callable[[Array, int], Any],
  log_ratio: Callable[[Any], Float[Array, 'c n']],
  num: int,
  chunk: int = 64,
) -> tuple[Any, SIRInfo]:
  """Draws one of `num` fresh proposals per output with probability proportional to its ratio.

  z = z_j,  j = argmax_m [log r(z_m) + g_m],  g_m ~ Gumbel(0, 1) i.i.d.,  z_m ~ p

  The argmax is kept while chunks of proposals stream by, which picks j with probability r_j / sum_m r_m exactly. The
  law of z tends to p r / Z with bias O(1 / num). Where every ratio is zero a proposal is returned, with log_z = -inf.

  Args:
    key: PRNG key.
    propose: (key, c) -> proposals from p, a tree of arrays [c, n, ...].
    log_ratio: proposals [c, n, ...] -> log r, nats, [c, n].
    num: proposals per output; any positive number.
    chunk: proposals held at once, per output.

  Returns:
    The chosen proposals, [n, ...], and an `SIRInfo`.

  Raises:
    ValueError: `num` or `chunk` is not positive.

  References:
    Rubin, "Using the SIR algorithm to simulate posterior distributions", 1988.
    Aneja, Schwing, Kautz, Vahdat, "A Contrastive Learning Approach for Training Variational Autoencoder Priors", 2021,
    arXiv:2010.02917.
  """
  if num < 1 or chunk < 1:
    raise ValueError(f'num and chunk are positive, not {num} and {chunk}')
  chunk = min(chunk, num)

  def body(carry: Any, index: Array) -> tuple[Any, None]:
    best, sample, running = carry
    key_propose, key_gumbel = jax.random.split(jax.random.fold_in(key, index))
    proposals = propose(key_propose, chunk)
    log_r = log_ratio(proposals).astype(running.peak.dtype)
    real = index * chunk + jnp.arange(chunk) < num  # the last chunk may be too long
    log_r = jnp.where(real[:, None], log_r, -jnp.inf)
    # 'high': the default resolution cuts the right tail at 16.6, which long runs of proposals reach.
    score = log_r + jax.random.gumbel(key_gumbel, log_r.shape, log_r.dtype, mode='high')
    winner = score.argmax(0)
    challenger = score.max(0)
    better = (challenger > best) | (index == 0)
    sample = jax.tree.map(lambda old, new: _where(better, _pick(new, winner), old), sample, proposals)
    return (jnp.where(better, challenger, best), sample, running.update(log_r)), None

  proposals = jax.eval_shape(lambda k: propose(k, chunk), key)
  ratio = jax.eval_shape(log_ratio, proposals)
  n, dtype = ratio.shape[1], jnp.promote_types(ratio.dtype, jnp.float32)
  sample = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), proposals)
  carry = (jnp.full((n,), -jnp.inf, dtype), sample, RunningLogMeanExp.init((n,), dtype))
  (_, sample, running), _ = jax.lax.scan(body, carry, jnp.arange(-(-num // chunk)))
  return sample, SIRInfo(running.log_sum() - jnp.log(jnp.asarray(num, dtype)), running.ess())


def _pick(proposals: Array, winner: Array) -> Array:
  """[c, n, ...], [n] -> [n, ...]."""
  return proposals[winner, jnp.arange(winner.shape[0])]


def _where(mask: Array, a: Array, b: Array) -> Array:
  return jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
