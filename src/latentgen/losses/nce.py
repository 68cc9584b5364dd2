"""Noise-contrastive estimation of a density ratio."""

import jax
from jaxtyping import Array, Float


def nce(logit_posterior: Float[Array, '...'], logit_prior: Float[Array, '...']) -> Float[Array, '']:
  """Sum of the two mean binary cross-entropies: mean softplus(-l(z_q)) + mean softplus(l(z_p)).

  The optimal logit is log q(z) / p(z), whatever the two sample counts, and the optimum 2 log 2 - 2 JSD(q, p).

  Args:
    logit_posterior: classifier logits at posterior samples, [...].
    logit_prior: classifier logits at prior samples, [...]; need not have the same shape.

  Returns:
    Loss in nats; 2 log 2 = 1.3863 at chance.

  References:
    Aneja, Schwing, Kautz, Vahdat, "A Contrastive Learning Approach for Training Variational Autoencoder Priors", 2021,
    arXiv:2010.02917.
  """
  return jax.nn.softplus(-logit_posterior).mean() + jax.nn.softplus(logit_prior).mean()
