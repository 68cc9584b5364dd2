"""Bounds on a model whose log p(x) is known, against double loops, and at the edge of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from latentgen import losses

LOG_P = -1.515512  # log N(1; 0, 2): z ~ N(0, 1), x | z ~ N(z, 1), x = 1


def _log_weights(shape, seed=0, loc=0.8, var=2 / 3):
  z = np.random.default_rng(seed).normal(loc, np.sqrt(var), size=shape)
  log_w = stats.norm.logpdf(z) + stats.norm.logpdf(1.0, z) - stats.norm.logpdf(z, loc, np.sqrt(var))
  return log_w.astype(np.float32)


def _random(*shape, seed=0, scale=3.0):
  return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


# ---------------------------------------------------------------------------------------- exact values


@pytest.mark.parametrize('k, n, want', [
  (1, 400_000, -1.628338),
  (2, 400_000, -1.56127),
  (5, 200_000, -1.53178),
  (10, 200_000, -1.52328),
  (50, 40_000, -1.51698),
])  # fmt: skip
def test_iwae_of_the_linear_gaussian_model(k, n, want):
  log_w = _log_weights((k, n), seed=k)
  ratio = np.exp(log_w - LOG_P).mean(0)
  # E[w] / p(x) = 1: a control variate of known mean, which removes the leading term of the noise.
  estimate = np.asarray(losses.iwae(jnp.asarray(log_w)), np.float64) - (ratio - 1)
  error = estimate.std() / np.sqrt(n)
  assert error < 7e-4
  assert abs(estimate.mean() - want) < 4 * error + 2e-4  # 2e-4: the table's own tolerance


def test_gap_falls_as_half_chi_square_over_k():
  log_w = _log_weights((200, 20_000), seed=3)
  ratio = np.exp(log_w - LOG_P).mean(0)
  gap = LOG_P - (np.asarray(losses.iwae(jnp.asarray(log_w))) - (ratio - 1))
  assert abs(200 * gap.mean() - 0.0753) < 4 * 200 * gap.std() / np.sqrt(20_000) + 2e-3  # second order: O(1 / K)


def test_elbo_with_closed_form_kl():
  """E_q log p(x | z) = -log(2 pi) / 2 - ((1 - 0.8)^2 + 2/3) / 2 and KL(q || p(z)) = (2/3 + 0.64 - 1 - log(2/3)) / 2."""
  log_px = jnp.full((3, 1), -0.5 * np.log(2 * np.pi) - 0.5 * (0.04 + 2 / 3))
  kl = jnp.full((3, 1), 0.5 * (2 / 3 + 0.64 - 1 - np.log(2 / 3)))
  np.testing.assert_allclose(losses.elbo(log_px, kl), -1.628338, atol=1e-6)
  np.testing.assert_allclose(losses.elbo(log_px, kl, beta=0.0), log_px[0], rtol=1e-6)
  np.testing.assert_allclose(losses.elbo(log_px, kl, beta=2.0), log_px[0] - 2 * kl[0], rtol=1e-6)


def test_upper_bounds():
  log_w = _log_weights((1_000_000, 1), seed=5)
  w = np.exp(log_w - LOG_P)[:, 0].astype(np.float64)
  error = (w * (log_w[:, 0] + 1.429171)).std() / 1e3  # delta method, self-normalised estimate
  assert abs(losses.eubo(jnp.asarray(log_w))[0] + 1.429171) < 4 * error + 2e-5
  error = (w**2).std() / (2 * (w**2).mean()) / 1e3
  assert abs(losses.cubo(jnp.asarray(log_w))[0] + 1.445377) < 4 * error + 2e-5
  # The same two numbers by quadrature.
  posterior, q = stats.norm(0.5, np.sqrt(0.5)), stats.norm(0.8, np.sqrt(2 / 3))
  log_ratio = lambda z: posterior.logpdf(z) - q.logpdf(z)
  eubo = LOG_P + integrate.quad(lambda z: posterior.pdf(z) * log_ratio(z), -9, 10)[0]
  cubo = LOG_P + 0.5 * np.log(integrate.quad(lambda z: q.pdf(z) * np.exp(2 * log_ratio(z)), -9, 10)[0])
  np.testing.assert_allclose([eubo, cubo], [-1.429171, -1.445377], atol=2e-6)


def test_every_bound_is_exact_at_the_posterior():
  log_w = jnp.asarray(_log_weights((8, 50), loc=0.5, var=0.5))
  for bound in (losses.iwae(log_w), losses.ciwae(log_w, 0.3), losses.eubo(log_w), losses.cubo(log_w)):
    np.testing.assert_allclose(bound, LOG_P, atol=2e-6)
  np.testing.assert_allclose(losses.effective_sample_size(log_w), 8.0, rtol=1e-5)


def test_bounds_are_ordered_and_the_upper_gap_is_a_divergence():
  log_w = _random(4, 6, 30)
  flat = log_w.reshape(24, 30)
  mean, miwae, iwae = flat.mean(0), losses.miwae(log_w), losses.iwae(flat)
  assert (mean < miwae).all() and (miwae < iwae).all()
  w = special.softmax(np.asarray(flat, np.float64), axis=0)
  np.testing.assert_allclose(losses.eubo(flat) - iwae, (w * np.log(w * 24)).sum(0), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- reductions and axes


@pytest.mark.parametrize('gradient', [False, True])
def test_reductions(gradient):
  transform = lambda f: jax.grad(lambda a: f(a).sum()) if gradient else f
  log_w = _random(7, 5)
  same = lambda f, g: np.testing.assert_allclose(transform(f)(log_w), transform(g)(log_w), rtol=1e-5, atol=1e-6)
  same(lambda a: losses.miwae(a[:, None]), lambda a: losses.elbo(a, jnp.zeros_like(a)))
  same(lambda a: losses.miwae(a[None]), losses.iwae)
  same(lambda a: losses.ciwae(a, 1.0), lambda a: a.mean(0))
  same(lambda a: losses.ciwae(a, 0.0), losses.iwae)
  same(lambda a: losses.ciwae(a, 0.25), lambda a: 0.25 * a.mean(0) + 0.75 * losses.iwae(a))
  same(lambda a: losses.cubo(a, 1), losses.iwae)


def _double_loop(log_w):
  m, k, b = log_w.shape
  out = np.zeros(b)
  for i in range(b):
    for outer in range(m):
      out[i] += np.log(sum(np.exp(float(log_w[outer, inner, i])) for inner in range(k)) / k) / m
  return out


@pytest.mark.parametrize('constant', ['none', 'outer', 'inner'])
def test_miwae_axes(constant):
  log_w = np.random.default_rng(1).normal(size=(2, 7, 3)) * 2
  if constant == 'outer':
    log_w[:] = log_w[:1]
  if constant == 'inner':
    log_w[:] = log_w[:, :1]
  want = _double_loop(log_w)
  np.testing.assert_allclose(losses.miwae(jnp.float32(log_w)), want, rtol=1e-5)
  assert np.abs(_double_loop(log_w.swapaxes(0, 1)) - want).max() > 0.05  # the test sees swapped axes


def test_gradient_of_iwae_is_softmax():
  log_w = _random(9, 4)
  got = jax.grad(lambda a: losses.iwae(a).sum())(log_w)
  np.testing.assert_allclose(got, special.softmax(np.asarray(log_w), axis=0), rtol=1e-5)
  per_chunk = jax.grad(lambda a: losses.miwae(a).sum())(log_w.reshape(3, 3, 4))
  np.testing.assert_allclose(per_chunk, special.softmax(np.asarray(log_w).reshape(3, 3, 4), axis=1) / 3, rtol=1e-5)


# ---------------------------------------------------------------------------------------- numerics


def test_log_mean_exp_far_from_zero():
  log_w = jnp.array([[-1e4], [-1e4 + 1]])
  value, grad = jax.value_and_grad(lambda a: losses.iwae(a).sum())(log_w)
  np.testing.assert_allclose(value, -1e4 + np.log((1 + np.e) / 2), rtol=2e-7)
  np.testing.assert_allclose(grad[:, 0], special.softmax([0.0, 1.0]), rtol=1e-3)  # 1e-3: -9999 has 3 digits to spare
  np.testing.assert_array_equal(losses.iwae(jnp.array([[-85.3, 4e4]])), jnp.array([-85.3, 4e4]))


def test_zero_weights():
  log_w = jnp.array([[-jnp.inf, -jnp.inf], [0.0, -jnp.inf], [1.0, -jnp.inf]])
  np.testing.assert_allclose(losses.iwae(log_w), [np.log((1 + np.e) / 3), -np.inf], rtol=1e-6)
  np.testing.assert_allclose(losses.effective_sample_size(log_w), [(1 + np.e) ** 2 / (1 + np.e**2), 0.0], rtol=1e-6)
  np.testing.assert_allclose(losses.eubo(log_w), [np.e / (1 + np.e), -np.inf], rtol=1e-6)
  for bound in (losses.iwae, losses.eubo, losses.cubo):
    grad = jax.grad(lambda a, bound=bound: jnp.where(jnp.isfinite(bound(a)), bound(a), 0.0).sum())(log_w)
    assert jnp.isfinite(grad).all() and (grad[:, 1] == 0).all() and grad[2, 0] > 0
  assert jnp.isnan(losses.iwae(jnp.array([[jnp.nan], [0.0]])))[0]  # and what is broken stays visible


def test_effective_sample_size():
  log_w = jnp.log(jnp.array([[1.0, 1.0], [1.0, 1e-30], [2.0, 1e-30]])) + 500.0
  np.testing.assert_allclose(losses.effective_sample_size(log_w), [16 / 6, 1.0], rtol=1e-4)


def test_bfloat16_weights_are_summed_in_float32():
  log_w = jnp.zeros((1000, 2), jnp.bfloat16)
  assert losses.iwae(log_w).dtype == jnp.float32
  np.testing.assert_allclose(losses.effective_sample_size(log_w), 1000.0, rtol=1e-6)


# ---------------------------------------------------------------------------------------- streaming


def test_running_log_mean_exp_over_5000_samples():
  log_w = np.asarray(_random(5000, 6, scale=4.0)) - np.array([85.0, 0.0, 3e3, -3e3, 1.0, 10.0], np.float32)

  @jax.jit
  def stream(chunks):
    start = losses.RunningLogMeanExp.init((6,))
    return jax.lax.scan(lambda s, c: (s.update(c), None), start, chunks)[0]

  state = stream(jnp.asarray(log_w).reshape(100, 50, 6))
  exact = np.asarray(log_w, np.float64)
  lse = special.logsumexp(exact, axis=0)
  np.testing.assert_allclose(state.value(), lse - np.log(5000), rtol=2e-7, atol=5e-6)
  np.testing.assert_allclose(state.log_sum(), lse, rtol=2e-7, atol=5e-6)
  np.testing.assert_allclose(state.ess(), np.exp(2 * lse - special.logsumexp(2 * exact, axis=0)), rtol=1e-4)
  assert state.count == 5000


def test_running_log_mean_exp_with_uneven_chunks_zeros_and_gradient():
  log_w = jnp.concatenate([jnp.full((3, 2), -jnp.inf), _random(4, 2), _random(1, 2, seed=1)])

  def value(a):
    state = losses.RunningLogMeanExp.init((2,))
    for chunk in (a[:3], a[3:7], a[7:]):
      state = state.update(chunk)
    return state.value()

  np.testing.assert_allclose(value(log_w), special.logsumexp(np.asarray(log_w), axis=0) - np.log(8), rtol=1e-5)
  grad = jax.grad(lambda a: value(a).sum())(log_w)
  np.testing.assert_allclose(grad, special.softmax(np.asarray(log_w), axis=0), rtol=1e-5, atol=1e-7)
  empty = losses.RunningLogMeanExp.init((2,)).update(log_w[:3])
  assert (empty.value() == -jnp.inf).all() and (empty.ess() == 0).all()
