"""Density ratios, adversarial losses, score matching, Gaussian likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from latentgen import losses

LOG_2 = np.log(2.0)


def _log_ratio(z):
  """log q / p for q = N(1, 0.5^2), p = N(0, 1)."""
  return -1.5 * z**2 + 4.0 * z - 2.0 + LOG_2


def _grid(n):
  """Midpoints of n equal-probability bins of q and of p: expectations without Monte Carlo noise."""
  u = (np.arange(n) + 0.5) / n
  return stats.norm(1.0, 0.5).ppf(u), stats.norm.ppf(u)


# ---------------------------------------------------------------------------------------- noise contrast


def test_nce_at_its_optimum():
  q, p = stats.norm(1.0, 0.5), stats.norm()
  mixture = lambda z: 0.5 * (q.pdf(z) + p.pdf(z))
  term = lambda d: integrate.quad(lambda z: d.pdf(z) * (d.logpdf(z) - np.log(mixture(z))), -8, 8, limit=200)[0]
  optimum = 2 * LOG_2 - term(q) - term(p)  # 2 log 2 - 2 JSD
  np.testing.assert_allclose(optimum, 0.9383, atol=5e-5)
  z_q, z_p = _grid(100_000)[0], _grid(200_000)[1]  # unequal counts: each class has its own mean
  loss = lambda f: float(losses.nce(jnp.float32(f(z_q)), jnp.float32(f(z_p))))
  np.testing.assert_allclose(loss(_log_ratio), optimum, atol=1e-4)
  for other in (lambda z: _log_ratio(z) + 0.3, lambda z: 0.8 * _log_ratio(z), lambda z: -_log_ratio(z)):
    assert loss(other) > optimum + 2e-3
  np.testing.assert_allclose(loss(np.zeros_like), 2 * LOG_2, rtol=1e-6)


def test_nce_recovers_the_log_ratio():
  rng = np.random.default_rng(0)
  features = lambda z: jnp.stack([jnp.ones_like(z), z, z**2], -1)
  z_q, z_p = jnp.float32(rng.normal(1.0, 0.5, 100_000)), jnp.float32(rng.normal(size=50_000))
  objective = jax.jit(lambda w: losses.nce(features(z_q) @ w, features(z_p) @ w))
  w = jnp.zeros(3)
  for _ in range(12):  # Newton
    w = w - jnp.linalg.solve(jax.hessian(objective)(w), jax.grad(objective)(w))
  z = np.linspace(-0.5, 2.5, 31)
  assert np.abs(features(jnp.float32(z)) @ w - _log_ratio(z)).max() < 0.1
  np.testing.assert_allclose(objective(w), 0.9383, atol=0.01)


def test_nce_does_not_overflow():
  value, grad = jax.value_and_grad(losses.nce, argnums=(0, 1))(jnp.array([-1e4, 1e4]), jnp.array([1e4, -1e4, 0.0]))
  np.testing.assert_allclose(value, 1e4 / 2 + (1e4 + LOG_2) / 3, rtol=1e-6)
  np.testing.assert_allclose(grad[0], [-0.5, 0.0], atol=1e-7)
  np.testing.assert_allclose(grad[1], [1 / 3, 0.0, 1 / 6], atol=1e-7)


# ---------------------------------------------------------------------------------------- adversarial


def test_adversarial_losses():
  real, fake = np.array([0.3, -2.0]), np.array([1.5, 0.0, -4.0])
  softplus = lambda a: np.log1p(np.exp(a))
  got = losses.discriminator(jnp.float32(real), jnp.float32(fake))
  np.testing.assert_allclose(got, softplus(-real).mean() + softplus(fake).mean(), rtol=1e-6)
  np.testing.assert_allclose(losses.generator(jnp.float32(fake)), softplus(-fake).mean(), rtol=1e-6)
  # Non-saturating: a generator that is found out (logit -4) still has a gradient near one.
  np.testing.assert_allclose(jax.grad(losses.generator)(jnp.array([-4.0])), [-1 / (1 + np.exp(-4.0))], rtol=1e-5)


def test_r1_is_the_squared_norm_of_a_linear_discriminator():
  a = jnp.float32(np.random.default_rng(0).normal(size=(3, 2)))
  x = jax.random.normal(jax.random.key(0), (5, 3, 2))
  np.testing.assert_allclose(losses.r1(lambda v: (a * v).sum((1, 2)), x), np.square(a).sum(), rtol=1e-5)
  # |x|^2 / 2 has gradient x: the mean over the batch, not the sum.
  half = lambda v: 0.5 * jnp.square(v).sum((1, 2))
  np.testing.assert_allclose(losses.r1(half, x), np.square(x).sum() / 5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- score matching


def test_denoising_loss_of_the_exact_score_of_a_point_mass_is_zero():
  sigma = jnp.array([0.01, 0.5, 3.0])
  x = jnp.ones((3, 4, 2))
  score = lambda y, s: -(y - 1.0) / jnp.square(s)[:, None, None]
  np.testing.assert_allclose(losses.denoising_score_matching(score, jax.random.key(0), x, sigma), 0.0, atol=1e-6)


def test_denoising_loss_sums_the_event_and_does_not_depend_on_the_level_at_zero_score():
  sigma = jnp.repeat(jnp.array([0.1, 7.0]), 20_000)
  zero = lambda y, s: jnp.zeros_like(y)
  loss = losses.denoising_score_matching(zero, jax.random.key(0), jnp.zeros((40_000, 3, 2)), sigma)
  # |eps|^2 / 2 in six dimensions: mean 3, variance 3.
  np.testing.assert_allclose(loss.reshape(2, -1).mean(1), 3.0, atol=5 * np.sqrt(3 / 20_000))


def test_denoising_loss_is_least_at_the_perturbed_score():
  """x ~ N(0, 1), sigma = 0.5: the best linear score is -y / 1.25; loss(a) = E (sigma a y + eps)^2 / 2."""
  x = jax.random.normal(jax.random.key(0), (200_000, 1))
  sigma = jnp.full((200_000,), 0.5)
  loss = lambda a: losses.denoising_score_matching(lambda y, s: a * y, jax.random.key(1), x, sigma).mean()
  slope, curvature = jax.grad(loss)(-0.8), jax.grad(jax.grad(loss))(-0.8)
  np.testing.assert_allclose(curvature, 0.25 * 1.25, rtol=0.02)
  assert abs(slope / curvature) < 0.015  # distance to the minimum; 5 standard errors


def test_sliced_score_matching_of_a_linear_score():
  """s(x) = A x: tr A + |A x|^2 / 2."""
  a = jnp.float32(np.random.default_rng(0).normal(size=(3, 3)))
  x = jax.random.normal(jax.random.key(0), (4, 3))
  n = 20_000
  got = losses.sliced_score_matching(lambda y: y @ a.T, jax.random.key(1), x, projections=n)
  want = np.trace(a) + 0.5 * np.square(np.asarray(x) @ np.asarray(a).T).sum(1)
  sym = 0.5 * (a + a.T)
  np.testing.assert_allclose(got, want, atol=5 * np.sqrt(2 * np.square(sym).sum() / n))  # Var v'Av = 2 |sym A|^2


def test_sliced_score_matching_is_least_at_the_score():
  """x ~ N(0, I): loss(a) = 2 a + a^2 for s = a x in two dimensions, least at -1, where it is -1."""
  x = jax.random.normal(jax.random.key(0), (100_000, 2, 1))
  loss = lambda a: losses.sliced_score_matching(lambda y: a * y, jax.random.key(1), x).mean()
  for a in (-1.0, -0.5, 0.0):
    np.testing.assert_allclose(loss(a), 2 * a + a**2, atol=0.03)
  assert abs(jax.grad(loss)(-1.0)) < 0.04


# ---------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize('scale_shape', [(), (3, 1, 1), (3, 2, 4), (5, 3, 2, 4)])
def test_gaussian_nll_is_scipys(scale_shape):
  rng = np.random.default_rng(0)
  x, loc = rng.normal(size=(3, 2, 4)), rng.normal(size=(5, 3, 2, 4))
  scale = np.exp(rng.normal(size=scale_shape))
  got = losses.gaussian_nll(*(jnp.float32(a) for a in (x, loc, scale)))
  want = -stats.norm.logpdf(x, loc, scale).sum((-1, -2))
  assert got.shape == (5, 3)
  np.testing.assert_allclose(got, want, rtol=2e-5)


def test_gaussian_nll_at_the_mean():
  x = jnp.ones((3, 2, 4))
  np.testing.assert_allclose(losses.gaussian_nll(x, x, 0.5), [8 * np.log(0.5 * np.sqrt(2 * np.pi))] * 3, rtol=1e-5)


def test_optimal_scale():
  rng = np.random.default_rng(0)
  x, loc = jnp.float32(rng.normal(size=(6, 5, 2))), jnp.float32(0.1 * rng.normal(size=(6, 5, 2)))
  mse = np.square(np.asarray(x - loc), dtype=np.float64)
  scale = losses.optimal_scale(x, loc)
  np.testing.assert_allclose(scale, np.sqrt(mse.mean()), rtol=1e-6)
  nll = lambda s: losses.gaussian_nll(x, loc, s).mean()
  np.testing.assert_allclose(nll(scale), 5 * (np.log(mse.mean()) + 1 + np.log(2 * np.pi)), rtol=1e-5)
  assert abs(jax.grad(nll)(scale)) < 1e-4 and nll(scale) < min(nll(1.05 * scale), nll(0.95 * scale))
  stopped = jax.grad(lambda m: losses.gaussian_nll(x, m, jax.lax.stop_gradient(losses.optimal_scale(x, m))).mean())(loc)
  flowing = jax.grad(lambda m: losses.gaussian_nll(x, m, losses.optimal_scale(x, m)).mean())(loc)
  np.testing.assert_allclose(stopped, flowing, atol=1e-6)
  per_example = losses.optimal_scale(x, loc, per_example=True)
  np.testing.assert_allclose(per_example, np.sqrt(mse.mean((1, 2), keepdims=True)), rtol=1e-5)
  assert losses.optimal_scale(x, x, floor=0.05) == np.float32(0.05)
