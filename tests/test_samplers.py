"""SIR and Langevin dynamics on targets whose moments are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latentgen import samplers

LOG_2 = np.log(2.0)


def _log_ratio(z):
  """log q / p for q = N(1, 0.5^2), p = N(0, 1)."""
  return -1.5 * z**2 + 4.0 * z - 2.0 + LOG_2


def _standard(*shape):
  return lambda key, c: jax.random.normal(key, (c, *shape))


def _toy(seed, num, n, chunk=64):
  sample = jax.jit(lambda key: samplers.sir(key, _standard(n), _log_ratio, num, chunk))
  return sample(jax.random.key(seed))


# ---------------------------------------------------------------------------------------- resampling


@pytest.mark.parametrize('num, n, chunk, mean', [
  (1, 200_000, 64, 0.000),
  (2, 200_000, 64, 0.488),
  (5, 200_000, 2, 0.845),  # an odd number of proposals in chunks of two: the tail is masked
  (10, 100_000, 4, 0.945),
  (50, 50_000, 64, 0.991),
  (500, 20_000, 60, 1.0),
])  # fmt: skip
def test_bias_of_the_mean(num, n, chunk, mean):
  z, _ = _toy(num, num, n, chunk)
  assert abs(float(z.mean()) - mean) < 0.01 + 4 * float(z.std()) / np.sqrt(n)
  if num >= 50:
    np.testing.assert_allclose(z.std(), 0.5, atol=0.02)


@pytest.mark.parametrize('num, n, want', [(1, 200_000, -2.81), (5, 100_000, -0.270), (10, 100_000, -0.104),
                                          (50, 50_000, -0.0163), (500, 20_000, -0.0024)])  # fmt: skip
def test_bias_of_the_log_normaliser(num, n, want):
  _, info = _toy(num + 1, num, n, chunk=3 if num < 50 else 48)
  error = 4 * float(info.log_z.std()) / np.sqrt(n)
  assert abs(float(info.log_z.mean()) - want) < error + 6e-3 * abs(want) + 5e-5
  if num < 500:
    assert info.log_z.mean() < 0


def test_effective_sample_size():
  """ESS / M -> 1 / E_q[r] = 0.3735."""
  _, info = _toy(0, 2000, 1000, chunk=100)
  share = np.asarray(info.ess) / 2000
  np.testing.assert_allclose(share.mean(), 0.3735, atol=4 * share.std() / np.sqrt(1000) + 1e-3)


def test_info_is_that_of_the_weights():
  """Proposals that do not depend on the key; three of them in chunks of two, so weights 1, 2, 1 and a masked 2."""
  table = jnp.log(jnp.array([[1.0], [2.0]]))
  n = 50_000

  def propose(key, c):
    del key
    return jnp.broadcast_to(table[:c], (c, n))

  index, info = samplers.sir(jax.random.key(0), propose, lambda a: a, 3, 2)
  np.testing.assert_allclose(info.log_z, np.log(4 / 3), rtol=1e-5)
  np.testing.assert_allclose(info.ess, 16 / 6, rtol=1e-5)
  share = float((index > 0.1).mean())
  assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(n)


def test_ring():
  """q: radius N(2, 0.1), base N(0, I_2): the hole holds 1 - exp(-1/8) of the base and nothing of q."""

  def log_ratio(z):
    radius = jnp.sqrt(jnp.square(z).sum(-1))
    log_q = -0.5 * jnp.square((radius - 2.0) / 0.1) - jnp.log(0.1 * (2 * np.pi) ** 1.5 * radius)
    return log_q + 0.5 * jnp.square(z).sum(-1) + np.log(2 * np.pi)

  n = 20_000
  hole = lambda z: float((jnp.linalg.norm(z, axis=-1) < 0.5).mean())
  before = hole(jax.random.normal(jax.random.key(0), (n, 2)))
  z, _ = samplers.sir(jax.random.key(1), _standard(n, 2), log_ratio, 200)
  assert abs(before - 0.1175) < 0.01
  assert hole(z) < 0.01
  radius = jnp.linalg.norm(z, axis=-1)
  np.testing.assert_allclose([radius.mean(), radius.std()], [2.0, 0.1], atol=0.01)
  np.testing.assert_allclose(z.mean(0), 0.0, atol=5 * np.sqrt(2 / n))


def test_equal_weights_leave_the_base():
  n = 50_000
  z, info = samplers.sir(jax.random.key(0), _standard(n, 2), lambda z: jnp.zeros(z.shape[:2]), 20, 8)
  np.testing.assert_allclose(z.mean(0), 0.0, atol=5 / np.sqrt(n))
  np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=5 * np.sqrt(2 / n))
  np.testing.assert_allclose(info.log_z, 0.0, atol=1e-6)
  np.testing.assert_allclose(info.ess, 20.0, rtol=1e-5)


def test_two_groups_in_sequence():
  """z1 ~ N(1, .5), z2 | z1 ~ N(z1, .5) from independent standard normals: correlation sqrt(1/2)."""
  n = 10_000
  log_normal = lambda z, m, s: -0.5 * jnp.square((z - m) / s) - jnp.log(s)
  conditional = lambda loc: lambda z: log_normal(z, loc, 0.5) - log_normal(z, 0.0, 1.0)
  z1, _ = samplers.sir(jax.random.key(0), _standard(n), conditional(1.0), 500, 50)
  z2, _ = samplers.sir(jax.random.key(1), _standard(n), conditional(z1), 500, 50)
  assert abs(np.corrcoef(z1, z2)[0, 1] - 0.707) < 0.03
  np.testing.assert_allclose([z1.mean(), z2.mean()], 1.0, atol=0.03)


def test_proposals_may_be_trees_and_outputs_stay_together():
  n = 64

  def propose(key, c):
    z = jax.random.normal(key, (c, n, 3))
    return {'z': z, 'sum': z.sum(-1), 'tag': jnp.broadcast_to(jnp.arange(n), (c, n))}

  sample, info = samplers.sir(jax.random.key(0), propose, lambda a: a['sum'], 33, 10)
  assert sample['z'].shape == (n, 3) and info.log_z.shape == info.ess.shape == (n,)
  np.testing.assert_allclose(sample['z'].sum(-1), sample['sum'], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(sample['tag'], np.arange(n))


def test_ratios_of_zero():
  """Only z > 1 has weight; where no ratio is positive a proposal still comes back and log_z says so."""
  z, info = samplers.sir(jax.random.key(0), _standard(500), lambda z: jnp.where(z > 1.0, 0.0, -jnp.inf), 100, 7)
  assert (z > 1.0).all()
  np.testing.assert_allclose(jnp.exp(info.log_z).mean(), stats.norm.sf(1.0), atol=0.01)
  z, info = samplers.sir(jax.random.key(0), _standard(50), lambda z: jnp.full_like(z, -jnp.inf), 20, 7)
  assert (z != 0).all() and (info.log_z == -jnp.inf).all() and (info.ess == 0).all()


def test_memory_does_not_grow_with_the_number_of_proposals():
  def temporary(num, chunk=64):
    fn = lambda key: samplers.sir(key, _standard(32, 16), lambda z: z.sum(-1), num, chunk)
    return jax.jit(fn).lower(jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

  few, many = temporary(128), temporary(4096)
  assert many < 1.05 * few + 1024
  assert temporary(4096, chunk=4096) > 20 * many  # and the number does measure the proposals


@pytest.mark.parametrize('num, chunk', [(0, 4), (4, 0)])
def test_counts_are_positive(num, chunk):
  with pytest.raises(ValueError, match='positive'):
    samplers.sir(jax.random.key(0), _standard(2), _log_ratio, num, chunk)


# ---------------------------------------------------------------------------------------- Langevin


@pytest.mark.parametrize('eta, steps, variance', [(0.01, 200, 0.2525), (0.1, 40, 0.2778), (0.5, 20, 0.5)])
def test_stationary_variance(eta, steps, variance):
  """Target N(1, 0.5^2): s^2 / (1 - eta / (4 s^2))."""
  n = 100_000
  sampler = samplers.langevin(lambda z: -2.0 * jnp.square(z - 1.0))
  start = 1.0 + 0.5 * jax.random.normal(jax.random.key(0), (n,))
  state, info = jax.jit(sampler.run, static_argnums=3)(jax.random.key(1), sampler.init(start), eta, steps)
  assert info.grad_norm.shape == (steps, n)
  z = np.asarray(state.position, np.float64)
  assert abs(z.var() - variance) < 4 * variance * np.sqrt(2 / n) + 1e-4
  assert abs(z.mean() - 1.0) < 4 * np.sqrt(variance / n)


def test_one_step():
  """From z = 3 on a standard normal: mean 3 - 3 eta / 2, variance eta."""
  n, eta = 100_000, 0.2
  sampler = samplers.langevin(lambda z: -0.5 * jnp.square(z).sum(-1))
  before = sampler.init(jnp.full((n, 1), 3.0))
  np.testing.assert_allclose(before.log_density, -4.5)
  np.testing.assert_allclose(before.grad, -3.0)
  after, info = sampler.step(jax.random.key(0), before, eta)
  np.testing.assert_allclose(info.grad_norm, 3.0)
  np.testing.assert_allclose(after.position.mean(), 2.7, atol=5 * np.sqrt(eta / n))
  np.testing.assert_allclose(after.position.var(), eta, rtol=5 * np.sqrt(2 / n))
  np.testing.assert_allclose(after.log_density, -0.5 * np.square(after.position[:, 0]), rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(after.grad, -after.position, rtol=1e-6)


def test_chains_and_leaves_are_independent():
  variances = jnp.array([0.5, 2.0])
  energy = lambda z: jnp.square(z['a']) + jnp.square(z['c']) + (jnp.square(z['b']) / variances).sum((1, 2))
  sampler = samplers.langevin(lambda z: -0.5 * energy(z))
  position = {'a': jnp.zeros(20_000), 'b': jnp.zeros((20_000, 1, 2)), 'c': jnp.zeros(20_000)}  # two of one shape
  state, info = jax.jit(sampler.run, static_argnums=3)(jax.random.key(0), sampler.init(position), 0.1, 100)
  draws = np.column_stack([state.position['a'], state.position['b'][:, 0], state.position['c']])
  variance = np.array([1.0, 0.5, 2.0, 1.0])
  want = variance / (1 - 0.1 / (4 * variance)) * (1 - (1 - 0.05 / variance) ** 200)  # after 100 steps from zero
  np.testing.assert_allclose(draws.var(0), want, rtol=5 * np.sqrt(2 / 20_000))
  assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 5 / np.sqrt(20_000)
  assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 5 / np.sqrt(20_000)
  norms = np.sqrt(np.square(draws / variance).sum(1))
  _, info = sampler.step(jax.random.key(1), state, 0.1)
  np.testing.assert_allclose(info.grad_norm, norms, rtol=1e-5)
