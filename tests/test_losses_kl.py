"""KL terms, their weights and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentgen import losses


def _normal_kl(mu_q, sigma_q, mu_p, sigma_p):
  """Textbook KL of two normals, float64."""
  return np.log(sigma_p / sigma_q) + (sigma_q**2 + (mu_q - mu_p) ** 2) / (2 * sigma_p**2) - 0.5


def test_residual_kl_is_the_kl_of_the_two_normals():
  mu_p, delta_mu, delta, log_sigma_p = np.random.default_rng(0).normal(size=(4, 500))
  want = _normal_kl(mu_p + delta_mu, np.exp(log_sigma_p + delta), mu_p, np.exp(log_sigma_p))
  got = losses.residual_kl(*(jnp.float32(a) for a in (delta_mu, delta, log_sigma_p)))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_residual_kl_vanishes_with_its_gradient_at_the_prior():
  log_sigma_p = jnp.linspace(-4, 4, 9)
  zero = jnp.zeros(9)
  assert (losses.residual_kl(zero, zero, log_sigma_p) == 0).all()
  for argnum in range(3):
    grad = jax.grad(lambda *a: losses.residual_kl(*a).sum(), argnum)(zero, zero, log_sigma_p)
    np.testing.assert_array_equal(grad, 0.0)
  # Second order: KL = delta^2 for small delta = log dsigma, where the textbook form in float32 gives noise.
  np.testing.assert_allclose(losses.residual_kl(zero, zero + 1e-4, log_sigma_p), 1e-8, rtol=2e-2)


def test_free_bits():
  kl = jnp.array([[0.01, 0.7], [0.2, 0.1]])
  np.testing.assert_allclose(losses.free_bits(kl, 0.15), [[0.15, 0.7], [0.2, 0.15]], rtol=1e-6)
  grad = jax.grad(lambda a: losses.free_bits(a, 0.15).sum())(kl)
  np.testing.assert_array_equal(grad, [[0.0, 1.0], [1.0, 0.0]])


# ---------------------------------------------------------------------------------------- balancing


def test_balance_against_a_loop():
  kl = np.array([[1.0, -3.0], [4.0, 6.0], [0.0, 0.0]])
  alpha = np.array([1.0, 4.0, 16.0])
  share = [((abs(a) + abs(b)) / 2 + 0.01) / c for (a, b), c in zip(kl, alpha, strict=True)]
  want = np.array(share) / (sum(share) / 3)
  got = losses.kl_balance(jnp.float32(kl), jnp.float32(alpha))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(got.mean(), 1.0, rtol=1e-6)


def test_balance_of_equal_shares_is_one():
  alpha = jnp.array([1.0, 2.0, 8.0])
  kl = (alpha * 5.0 - 0.01)[:, None] * jnp.ones((1, 4))
  np.testing.assert_allclose(losses.kl_balance(kl, alpha), 1.0, rtol=1e-6)


def test_balance_does_not_see_the_scale_of_the_kl():
  kl = 5.0 + jnp.abs(jax.random.normal(jax.random.key(0), (6, 10)))
  alpha = jnp.array([1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
  np.testing.assert_allclose(losses.kl_balance(2 * kl, alpha), losses.kl_balance(kl, alpha), rtol=2e-3)
  scale_free = lambda a: losses.kl_balance(a, alpha, eps=0.0)
  np.testing.assert_allclose(scale_free(2 * kl), scale_free(kl), rtol=1e-6)
  assert (losses.kl_balance(jnp.zeros((6, 10)), alpha) > 0).all()  # eps: a dead group keeps a weight


def test_no_gradient_flows_through_the_balance():
  kl = jnp.array([[1.0, 2.0], [3.0, 5.0]])
  alpha = jnp.array([1.0, 2.0])
  grad = jax.grad(lambda a: (losses.kl_balance(a, alpha) * a.mean(1)).sum())(kl)
  gamma = np.array([1.51, 4.01 / 2]) / np.mean([1.51, 4.01 / 2])
  np.testing.assert_allclose(grad, np.repeat(gamma[:, None] / 2, 2, axis=1), rtol=1e-5)


# ---------------------------------------------------------------------------------------- schedules


def test_warmup():
  total = 1000
  beta = lambda t: float(losses.kl_warmup(jnp.asarray(t), total))
  assert beta(0) == np.float32(1e-4)
  np.testing.assert_allclose(beta(150), (150 - 0.1) / 300, rtol=1e-5)
  assert beta(300) < 1.0
  assert beta(301) == beta(1000) == 1.0
  np.testing.assert_allclose(losses.kl_warmup(50, 100, start=0.25, portion=0.5), 0.5, rtol=1e-6)
  assert losses.kl_warmup(3, 100, start=0.0, portion=0.0) == 1.0
  assert losses.kl_warmup(10, 100, start=0.2, minimum=0.0) == 0.0


@pytest.mark.parametrize('fraction, want', [(0.0, 1.0), (0.5, 0.1), (1.0, 0.01), (0.25, 10**-0.5)])
def test_log_interpolation_is_geometric(fraction, want):
  np.testing.assert_allclose(losses.log_interpolate(1.0, 1e-2, fraction), want, rtol=1e-5)
