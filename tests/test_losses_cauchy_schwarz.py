"""The Cauchy-Schwarz divergence against closed forms, quadrature, Monte Carlo and its own invariances."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latentgen import losses
from latentgen.distributions import GaussianMixture, Normal

module = importlib.import_module('latentgen.losses.cauchy_schwarz')


def _arrays(*arrays):
  return tuple(jnp.float32(np.asarray(a)) for a in arrays)


def _random_pair(seed, b, c, d):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(b, d)), np.exp(0.4 * rng.normal(size=(b, d)))
  p = rng.dirichlet(np.ones(c)), 1.5 * rng.normal(size=(c, d)), np.exp(0.4 * rng.normal(size=(c, d)))
  return q, p


@pytest.mark.parametrize('q, p, want', [
  (([[0.0]], [[1.0]]), ([0.5, 0.5], [[-2.0], [2.0]], [[1.0], [1.0]]), 0.66250137),
  (([[1.0]], [[0.5**0.5]]), ([0.3, 0.7], [[0.0], [3.0]], [[1.0], [0.5]]), 1.32969379),
  (([[0.0]], [[1.0]]), ([1.0], [[1.0]], [[2.0]]), 0.21157178),
  (([[1.0]], [[2.0]]), ([1.0], [[0.0]], [[1.0]]), 0.21157178),
])  # fmt: skip
def test_closed_forms(q, p, want):
  q, p = _arrays(*q), _arrays(*p)
  np.testing.assert_allclose(losses.cauchy_schwarz(q, p), [want], atol=3e-7)
  np.testing.assert_allclose(losses.cauchy_schwarz(q, p, convention='b'), [2 * want], atol=6e-7)
  np.testing.assert_array_equal(losses.cauchy_schwarz(Normal(*q), GaussianMixture(*p)), losses.cauchy_schwarz(q, p))


def test_unknown_convention():
  with pytest.raises(ValueError, match="'c'"):
    losses.cauchy_schwarz(_arrays([[0.0]], [[1.0]]), _arrays([1.0], [[0.0]], [[1.0]]), convention='c')


def test_quadrature_in_one_dimension():
  (loc, scale), p = _random_pair(0, 5, 4, 1)
  z = np.linspace(-30, 30, 200_001)
  step = z[1] - z[0]
  p_z = sum(w * stats.norm.pdf(z, m, s) for w, m, s in zip(p[0], p[1][:, 0], p[2][:, 0], strict=True))
  want = []
  for m, s in zip(loc[:, 0], scale[:, 0], strict=True):
    q_z = stats.norm.pdf(z, m, s)
    overlap, qq, pp = (q_z * p_z).sum() * step, (q_z**2).sum() * step, (p_z**2).sum() * step
    want.append(-np.log(overlap / np.sqrt(qq * pp)))
  np.testing.assert_allclose(losses.cauchy_schwarz(_arrays(loc, scale), _arrays(*p)), want, rtol=1e-5, atol=1e-6)


def test_monte_carlo_in_two_dimensions():
  (loc, scale), (weights, p_loc, p_scale) = _random_pair(1, 1, 3, 2)
  rng = np.random.default_rng(2)
  n = 400_000
  p_pdf = lambda z: sum(w * stats.norm.pdf(z, m, s).prod(-1) for w, m, s in zip(weights, p_loc, p_scale, strict=True))
  q_z = rng.normal(loc, scale, size=(n, 2))
  k = rng.choice(3, size=n, p=weights)
  p_z = rng.normal(p_loc[k], p_scale[k])
  overlap, qq, pp = p_pdf(q_z).mean(), stats.norm.pdf(q_z, loc, scale).prod(-1).mean(), p_pdf(p_z).mean()
  want = -np.log(overlap) + 0.5 * np.log(qq) + 0.5 * np.log(pp)
  got = losses.cauchy_schwarz(_arrays(loc, scale), _arrays(weights, p_loc, p_scale))
  np.testing.assert_allclose(got, want, atol=3e-3)


@pytest.mark.parametrize('d', [1, 8, 64, 512])
def test_zero_when_all_components_are_q(d):
  rng = np.random.default_rng(d)
  loc, scale = rng.normal(size=(1, d)), np.exp(rng.normal(size=(1, d)))
  p = _arrays(rng.dirichlet(np.ones(7)), np.repeat(loc, 7, 0), np.repeat(scale, 7, 0))
  assert abs(losses.cauchy_schwarz(_arrays(loc, scale), p)[0]) < 1e-6


def test_affine_invariance():
  q, p = _random_pair(3, 4, 5, 6)
  a, shift = -3.7, 11.0
  moved = losses.cauchy_schwarz(_arrays(a * q[0] + shift, -a * q[1]), _arrays(p[0], a * p[1] + shift, -a * p[2]))
  np.testing.assert_allclose(moved, losses.cauchy_schwarz(_arrays(*q), _arrays(*p)), rtol=1e-4)


def test_splitting_a_component_changes_nothing():
  q, p = _random_pair(4, 3, 3, 4)
  split = lambda a: np.concatenate([a, a[:1]])
  weights = split(p[0])
  weights[[0, -1]] /= 2
  total = lambda posterior, prior: losses.cauchy_schwarz(posterior, prior).sum()
  f = lambda prior: jax.jit(jax.value_and_grad(total))(_arrays(*q), prior)
  refined, whole = f(_arrays(weights, split(p[1]), split(p[2]))), f(_arrays(*p))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), refined, whole)


def test_a_batch_is_its_examples():
  q, p = _random_pair(5, 6, 3, 4)
  q, p = _arrays(*q), _arrays(*p)
  single = [losses.cauchy_schwarz((q[0][i : i + 1], q[1][i : i + 1]), p)[0] for i in range(6)]
  np.testing.assert_allclose(losses.cauchy_schwarz(q, p), single, rtol=1e-5)


def _unconstrained(loc, log_var, p_loc, p_log_var, logits):
  q = loc, jnp.exp(0.5 * log_var)
  return losses.cauchy_schwarz(q, (jax.nn.softmax(logits), p_loc, jnp.exp(0.5 * p_log_var))).sum()


def _unconstrained_arguments(seed, b, c, d, spread=1.5):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(b, d)), 0.5 * rng.normal(size=(b, d))
  return *q, spread * rng.normal(size=(c, d)), 0.5 * rng.normal(size=(c, d)), rng.normal(size=c)


def test_gradients_are_finite_differences():
  with jax.enable_x64(True):
    arguments = _unconstrained_arguments(6, 2, 3, 2)
    value = jax.jit(_unconstrained)
    grads = jax.jit(jax.grad(_unconstrained, argnums=range(5)))(*map(jnp.asarray, arguments))
    for i, (array, grad) in enumerate(zip(arguments, grads, strict=True)):
      for index in np.ndindex(array.shape):
        sides = []
        for sign in (1, -1):
          moved = [a.copy() for a in arguments]
          moved[i][index] += sign * 1e-5
          sides.append(float(value(*map(jnp.asarray, moved))))
        np.testing.assert_allclose(grad[index], (sides[0] - sides[1]) / 2e-5, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('d', [200, 512])
def test_float32_is_stable_in_many_dimensions(d):
  """Components three standard deviations apart in every dimension; N(0; 3, 2)^200 is below the smallest float64."""
  rng = np.random.default_rng(7)
  offsets = 3.0 * np.arange(5)[:, None] * rng.choice([-1, 1], size=(5, d))
  arguments = list(_unconstrained_arguments(8, 4, 5, d))
  arguments[2] = offsets
  f = jax.jit(jax.value_and_grad(_unconstrained, argnums=range(5)))
  single = f(*map(jnp.float32, arguments))
  with jax.enable_x64(True):
    double = jax.tree.map(np.asarray, f(*map(jnp.asarray, arguments)))
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(single))
  np.testing.assert_allclose(single[0], double[0], rtol=1e-5)
  for a, b in zip(single[1], double[1], strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


def test_chunks_change_neither_value_nor_gradient(monkeypatch):
  arguments = [jnp.float32(a) for a in _unconstrained_arguments(9, 5, 7, 3)]
  compiled = lambda: jax.jit(jax.value_and_grad(lambda *a: _unconstrained(*a), argnums=range(5)))  # traced anew each
  whole = compiled()(*arguments)
  monkeypatch.setattr(module, '_MAX_ELEMENTS', 42)  # two rows of 7 x 3 at a time, a remainder of one
  assert 'while' in compiled().lower(*arguments).as_text()  # the loop is really taken
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), compiled()(*arguments), whole)


def test_dead_component():
  q, p = _random_pair(10, 2, 3, 4)
  weights = np.array([0.4, 0.6, 0.0])
  f = lambda w, m, s: losses.cauchy_schwarz(_arrays(*q), (w, m, s)).sum()
  value, grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*_arrays(weights, *p[1:]))
  np.testing.assert_allclose(value, f(*_arrays(weights[:2], p[1][:2], p[2][:2])), rtol=1e-5)
  assert all(jnp.isfinite(g).all() for g in grads)


def test_many_components_in_many_dimensions_are_finite_in_float32():
  """256 dimensions and 500 components, as far apart as 60 standard deviations a dimension."""
  arguments = _unconstrained_arguments(11, 3, 500, 256, spread=20.0)
  value, grads = jax.jit(jax.value_and_grad(_unconstrained, argnums=range(5)))(*map(jnp.float32, arguments))
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
  # Every other component is so far away that the nearest one alone decides: -log int q p and log int p^2 in closed form.
  loc, log_var, p_loc, p_log_var, logits = (np.asarray(a, np.float64) for a in arguments)
  log_w = logits - np.log(np.exp(logits).sum())
  normal = lambda x, v: -0.5 * (np.square(x) / v + np.log(2 * np.pi * v)).sum(-1)
  cross = log_w + normal(loc[:, None] - p_loc, np.exp(log_var)[:, None] + np.exp(p_log_var))
  own_q = normal(np.zeros_like(loc), 2 * np.exp(log_var))
  own_p = 2 * log_w + normal(np.zeros_like(p_loc), 2 * np.exp(p_log_var))
  want = (-np.logaddexp.reduce(cross, -1) + 0.5 * own_q + 0.5 * np.logaddexp.reduce(own_p)).sum()
  np.testing.assert_allclose(value, want, rtol=1e-5)
