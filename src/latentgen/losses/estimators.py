"""Gradient estimators of importance-weighted bounds, as functions whose gradient is the estimator, not as bounds.

All read `log_w` along the path alone: log p(x, z) - log q(z | x) with the parameters of q stopped and z live, so that
the gradient of the inference network flows through its samples. Their values bound nothing; report `iwae`.

As in the bounds, log-weights may be -inf (weight zero, no gradient), and values are float32 or wider; where all weights are zero
the value is -inf.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike


def sticking_the_landing(log_w_path: Float[Array, 'k b']) -> Float[Array, ' b']:
  """sum_k sg(w~_k) log w_k; the gradient is the reparameterised one of IWAE without its score term.

  Unbiased for the ELBO (K = 1) only; zero variance where q is the posterior.

  Args:
    log_w_path: log p(x, z) - log q(z | x), the parameters of q stopped, nats, [k, b].

  Returns:
    [b]; ascend it in the parameters of q.

  References:
    Roeder, Wu, Duvenaud, "Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference",
    2017, arXiv:1703.09194, section 4.
  """
  return _weighted(log_w_path, lambda w: w)


def doubly_reparameterised(log_w_path: Float[Array, 'k b'], alpha: ScalarLike = 0.0) -> Float[Array, ' b']:
  """sum_k sg((1 - alpha) w~_k^2 + alpha (w~_k - w~_k^2)) log w_k.

  alpha = 0 is the unbiased estimator of the gradient of IWAE (IWAE-DReG), alpha = 1 that of reweighted wake-sleep's
  wake update of q (RWS-DReG). For one group of latents: with more, q of a lower one reads samples of an upper one, and the
  score terms that this leaves out are no longer all of them.

  Args:
    log_w_path: log p(x, z) - log q(z | x), the parameters of q stopped, nats, [k, b].
    alpha: share of RWS-DReG, in [0, 1].

  Returns:
    [b]; ascend it in the parameters of q.

  References:
    Tucker, Lawson, Gu, Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2018,
    arXiv:1810.04152, eqs. 8, 12 and 13.
  """
  return _weighted(log_w_path, lambda w: (1.0 - alpha) * jnp.square(w) + alpha * (w - jnp.square(w)))


def _weighted(log_w: Array, weights: Callable[[Array], Array]) -> Array:
  """sum_k sg(weights(w~_k)) log w_k, w~ = w / sum w; [k, b] -> [b]."""
  log_w = log_w.astype(jnp.promote_types(log_w.dtype, jnp.float32))
  dead = jnp.isneginf(log_w)
  none = dead.all(0)
  w = jax.nn.softmax(jnp.where(none, 0.0, log_w), 0)
  each = jax.lax.stop_gradient(weights(w)) * jnp.where(dead, 0.0, log_w)
  return jnp.where(none, -jnp.inf, each.sum(0))
