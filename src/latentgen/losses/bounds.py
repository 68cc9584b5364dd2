"""Monte Carlo bounds on log p(x) from importance log-weights log w = log p(x, z) - log q(z | x), in nats."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike


def log_mean_exp(log_w: Float[Array, '...'], axis: int = 0) -> Float[Array, '...']:
  """Log of the mean of exponentials: log (1/K) sum_k exp(log_w_k).

  Entries may be -inf (weight zero); where all are, the value is -inf and the gradient zero.

  Args:
    log_w: log-weights, nats.
    axis: the axis of the K samples.

  Returns:
    `log_w` without `axis`, float32 or wider.
  """
  peak, shifted = _shift(log_w, axis)
  return _log(shifted.mean(axis)) + peak.squeeze(axis)


def elbo(log_px: Float[Array, 'k b'], kl: Float[Array, 'k b'], *, beta: ScalarLike = 1.0) -> Float[Array, ' b']:
  """Evidence lower bound: (1/K) sum_k [log p(x | z_k) - beta kl_k].

  Args:
    log_px: reconstruction terms log p(x | z_k), nats, [k, b].
    kl: rate per sample, closed form or log q - log p, summed over the groups, nats, [k, b].
    beta: weight of the rate.

  Returns:
    Bound in nats, [b].

  References:
    Kingma, Welling, "Auto-Encoding Variational Bayes", 2013, arXiv:1312.6114, eq. 3.
  """
  return (log_px - beta * kl).mean(0)


def iwae(log_w: Float[Array, 'k b']) -> Float[Array, ' b']:
  """Importance-weighted bound: log (1/K) sum_k w_k.

  Args:
    log_w: log-weights, nats, [k, b]; -inf allowed.

  Returns:
    Bound in nats, [b]; K = 1 returns the input.

  References:
    Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2015, arXiv:1509.00519, eq. 8.
  """
  return log_mean_exp(log_w, axis=0)


def miwae(log_w: Float[Array, 'm k b']) -> Float[Array, ' b']:
  """Mean of M importance-weighted bounds: (1/M) sum_m log (1/K) sum_k w_mk.

  Args:
    log_w: log-weights, nats, [m, k, b]; the outer mean is over axis 0, the inner one over axis 1.

  Returns:
    Bound in nats, [b].

  References:
    Rainforth, Kosiorek, Le, Maddison, Igl, Wood, Teh, "Tighter Variational Bounds are Not Necessarily Better", 2018,
    arXiv:1802.04537.
  """
  return log_mean_exp(log_w, axis=1).mean(0)


def ciwae(log_w: Float[Array, 'k b'], beta: ScalarLike) -> Float[Array, ' b']:
  """Convex combination on the same samples: beta (1/K) sum_k log w_k + (1 - beta) log (1/K) sum_k w_k.

  Args:
    log_w: log-weights, nats, [k, b], finite.
    beta: weight of the ELBO in [0, 1]. The gradient in beta is ELBO - IWAE <= 0: learned, it goes to 0.

  Returns:
    Bound in nats, [b].

  References:
    Rainforth et al., "Tighter Variational Bounds are Not Necessarily Better", 2018, arXiv:1802.04537.
  """
  return beta * log_w.mean(0) + (1.0 - beta) * iwae(log_w)


def effective_sample_size(log_w: Float[Array, 'k b']) -> Float[Array, ' b']:
  """Kish's effective number of samples: (sum_k w_k)^2 / sum_k w_k^2, in [1, K]; 0 where all weights are zero.

  Args:
    log_w: log-weights, nats, [k, b].

  Returns:
    A count (not divided by K), [b].
  """
  _, w = _shift(log_w, 0)
  return _ratio(jnp.square(w.sum(0)), jnp.square(w).sum(0))


def eubo(log_w: Float[Array, 'k b']) -> Float[Array, ' b']:
  """Self-normalised estimate of the evidence upper bound E_{p(z|x)} log w: sum_k w~_k log w_k, w~ = w / sum w.

  With finite K it is biased downwards: a diagnostic, not a certificate.

  Args:
    log_w: log-weights, nats, [k, b]; -inf allowed.

  Returns:
    Estimate in nats, [b].
  """
  peak, w = _shift(log_w, 0)
  live = w > 0
  total = w.sum(0)
  estimate = _ratio((w * jnp.where(live, log_w - peak, 0.0)).sum(0), total) + peak.squeeze(0)
  return jnp.where(total == 0, -jnp.inf, estimate)


def cubo(log_w: Float[Array, 'k b'], n: ScalarLike = 2) -> Float[Array, ' b']:
  """Estimate of the chi upper bound: (1/n) log (1/K) sum_k w_k^n; biased downwards by Jensen.

  Args:
    log_w: log-weights, nats, [k, b].
    n: order, >= 1; 1 is the importance-weighted bound.

  Returns:
    Estimate in nats, [b].

  References:
    Dieng, Tran, Ranganath, Paisley, Blei, "Variational Inference via chi Upper Bound Minimization", 2017,
    arXiv:1611.00328.
  """
  return log_mean_exp(n * log_w, axis=0) / n


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningLogMeanExp:
  """Log-mean-exp and effective sample size over chunks of samples, in memory that does not grow with K.

  state = (max_k log w_k, sum_k w_k / e^max, sum_k w_k^2 / e^(2 max), K); a valid carry of `jax.lax.scan`.
  """

  peak: Any  # [*b], nats
  total: Any  # [*b]
  total_sq: Any  # [*b]
  count: Any  # [] int32

  @classmethod
  def init(cls, shape: tuple[int, ...], dtype: Any = jnp.float32) -> 'RunningLogMeanExp':
    """The state before any sample, for a batch of `shape`."""
    zeros = jnp.zeros(shape, dtype)
    return cls(jnp.full(shape, -jnp.inf, dtype), zeros, zeros, jnp.zeros((), jnp.int32))

  def update(self, log_w: Float[Array, 'c *b']) -> 'RunningLogMeanExp':
    """Takes in c more log-weights per batch entry, [c, *b]; -inf counts as a sample of weight zero."""
    log_w = log_w.astype(self.peak.dtype)
    peak = jax.lax.stop_gradient(jnp.maximum(self.peak, log_w.max(0)))
    safe = jnp.where(jnp.isfinite(peak), peak, 0.0)
    old, new = jnp.exp(self.peak - safe), jnp.exp(log_w - safe)
    total = self.total * old + new.sum(0)
    total_sq = self.total_sq * jnp.square(old) + jnp.square(new).sum(0)
    return RunningLogMeanExp(peak, total, total_sq, self.count + log_w.shape[0])

  def log_sum(self) -> Float[Array, '*b']:
    """log sum_k w_k, nats."""
    return _log(self.total) + jnp.where(jnp.isfinite(self.peak), self.peak, 0.0)

  def value(self) -> Float[Array, '*b']:
    """log (1/K) sum_k w_k, nats."""
    return self.log_sum() - jnp.log(self.count.astype(self.total.dtype))

  def ess(self) -> Float[Array, '*b']:
    """(sum_k w_k)^2 / sum_k w_k^2, a count."""
    return _ratio(jnp.square(self.total), self.total_sq)


def _shift(log_w: Array, axis: int) -> tuple[Array, Array]:
  """Largest log-weight (kept axis, 0 where it is infinite) and the weights divided by its exponential."""
  log_w = log_w.astype(jnp.promote_types(log_w.dtype, jnp.float32))
  peak = jax.lax.stop_gradient(log_w.max(axis, keepdims=True))
  peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
  return peak, jnp.exp(log_w - peak)


def _log(x: Array) -> Array:
  """log x with gradient zero at zero; NaN stays NaN."""
  return jnp.where(x == 0, -jnp.inf, jnp.log(jnp.where(x == 0, 1.0, x)))


def _ratio(a: Array, b: Array) -> Array:
  """a / b, zero where b is."""
  return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))
