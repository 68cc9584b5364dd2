"""Diffusions against closed forms and quadrature: variances, times, cross-entropies, probability flows, the learned density."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from latentgen import losses
from latentgen.errors import UserError
from latentgen.priors import diffusion as prior
from latentgen.samplers import diffusion, sdes

KEY = jax.random.key(0)
ALL = {
  'vp': sdes.VP(), 'offset': sdes.VP(initial=0.02), 'geometric': sdes.GeometricVP(), 'sub_vp': sdes.SubVP(), 've': sdes.VE()
}  # fmt: skip
STARTS = {'geometric': 0.0}


@pytest.fixture
def grid():
  """Times, in double precision."""
  with jax.enable_x64(True):
    yield jnp.linspace(0.01, 1.0, 23)


# ---------------------------------------------------------------------------------------- the diffusions


@pytest.mark.parametrize('name', ALL)
def test_moments_solve_the_equation_of_the_drift(name, grid):
  """dm/dt = f m, ds/dt = 2 f s + g^2, dv/dt = 2 f v + g^2, by differences; m_0 = 1."""
  sde, h = ALL[name], 1e-5
  t = grid[1:-1]
  slope = lambda function: (np.asarray(function(t + h)) - np.asarray(function(t - h))) / (2 * h)
  f, g2 = np.asarray(sde.drift(t)), np.asarray(sde.diffusion(t))
  np.testing.assert_allclose(sde.mean(0.0), 1.0, rtol=1e-12)
  np.testing.assert_allclose(slope(sde.mean), f * sde.mean(t), rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(slope(sde.variance), 2 * f * sde.variance(t) + g2, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(sde.variance_rate(t), 2 * f * sde.variance(t) + g2, rtol=1e-8)
  np.testing.assert_allclose(slope(sde.spread), 2 * f * sde.spread(t) + g2, rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(sde.spread_rate(t), 0.5 * slope(lambda t: jnp.log(sde.spread(t))), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('name', ALL)
def test_the_inverse_of_the_variance(name, grid):
  sde = ALL[name]
  np.testing.assert_allclose(sde.time(sde.variance(grid)), grid, atol=1e-9)


def test_the_inverse_in_single_precision():
  t = jnp.linspace(0.01, 0.6, 30)  # at t = 1 the variance is within 4e-5 of 1, and single precision has 6e-8
  for sde in (sdes.VP(), sdes.GeometricVP()):
    np.testing.assert_allclose(sde.time(sde.variance(t)), t, atol=1e-5)


def test_constants_of_the_geometric_diffusion(grid):
  sde = sdes.GeometricVP(3e-5, 0.999)
  beta, s = np.asarray(sde.diffusion(grid)), np.asarray(sde.variance(grid))
  np.testing.assert_allclose(beta * (1 - s) / s, 10.4133, atol=1e-4)
  np.testing.assert_allclose([sde.variance(0.0), sde.variance(1.0)], [3e-5, 0.999], rtol=1e-9)
  for sde, first in ((sde, 3e-5), (sdes.VP(), 0.0), (sdes.VP(initial=0.02), 0.02)):
    np.testing.assert_allclose(np.square(sde.mean(grid)), (1 - np.asarray(sde.variance(grid))) / (1 - first), rtol=1e-9)


def test_the_linear_diffusion_by_hand():
  t = 0.37
  b = 0.1 * t + 9.95 * t * t
  sde = sdes.VP()
  np.testing.assert_allclose(sde.variance(t), 1 - math.exp(-b), rtol=1e-6)
  np.testing.assert_allclose(sdes.SubVP().variance(t), (1 - math.exp(-b)) ** 2, rtol=1e-6)
  np.testing.assert_allclose(sdes.SubVP().diffusion(t), (0.1 + 19.9 * t) * (1 - math.exp(-2 * b)), rtol=1e-6)
  np.testing.assert_allclose(sdes.VE(1e-4, 2500.0).variance(1.0), 2500.0, rtol=1e-5)


# ---------------------------------------------------------------------------------------- times


CASES = [(name, sampling) for name in ALL for sampling in sdes.SAMPLINGS if sampling != 'un' or name in ('vp', 'offset')]


@pytest.mark.parametrize('name, sampling', CASES)
def test_times_have_the_density_that_is_said(name, sampling, grid):
  """d rho / dt is the density, and rho = 0, 1 are the ends: hence it integrates to one."""
  sde, e = ALL[name], STARTS.get(name, 0.01)
  draw = lambda rho: sdes.draw_times(sde, sampling, rho, e)
  rho = jnp.linspace(0.001, 0.999, 41)
  t, density = (np.asarray(a) for a in draw(rho))
  speed = np.asarray(jax.vmap(jax.grad(lambda r: draw(r)[0]))(rho))
  np.testing.assert_allclose(speed * density, 1.0, rtol=1e-6)
  np.testing.assert_allclose(draw(jnp.array([0.0, 1.0]))[0], [e, 1.0], atol=1e-9)
  assert (np.diff(t) > 0).all()


def test_the_mass_of_unweighted_times():
  total = integrate.quad(lambda t: math.exp(-0.1 * t - 9.95 * t * t), 0.01, 1.0)[0]
  np.testing.assert_allclose(total, 0.266004, atol=1e-6)
  np.testing.assert_allclose(sdes.unweighted_mass(sdes.VP(), 0.01), total, rtol=1e-5)


def test_unweighted_times_are_for_one_diffusion():
  with pytest.raises(ValueError, match='VP'):
    sdes.draw_times(sdes.VE(), 'un', jnp.ones(1), 0.01)


def toy(sde, sampling, weighting, e, z0=1.3, n=100_000):
  """One-sample estimates of int w |eps - sqrt(s) z_t|^2 dt for a scalar z_0 and the noise prediction of N(0, I)."""
  draw, noise = jax.random.split(KEY)
  t, density = sdes.draw_times(sde, sampling, jax.random.uniform(draw, (n,)), e)
  eps, s = jax.random.normal(noise, (n,)), sde.variance(t)
  error = eps - jnp.sqrt(s) * (sde.mean(t) * z0 + jnp.sqrt(s) * eps)
  return np.asarray(sdes.weight(sde, weighting, t) / density * jnp.square(error), np.float64), error, t, density


@pytest.mark.parametrize(
  'e, sampling, weighting, mean, sd',
  [
    (1e-2, 'll', 'll', 3.4533, 0.50), (1e-2, 'uniform', 'll', 3.4533, 7.5), (1e-3, 'll', 'll', 4.9027, 0.65),
    (1e-3, 'uniform', 'll', 4.9027, 19.4), (1e-2, 're', 're', 0.67147, None), (1e-2, 'uniform', 're', 0.67147, None),
    (1e-2, 're', 'll', 3.4533, None), (1e-2, 'un', 'll', 3.4533, None),
  ],
)  # fmt: skip
def test_importance_sampling_of_times_is_exact_and_less_noisy(e, sampling, weighting, mean, sd):
  """Over t alone: E over eps of the squared error is (1 - s)^2 + s (1 - s) z_0^2."""
  sde, rho = sdes.VP(), (jnp.arange(200_000) + 0.5) / 200_000
  t, density = sdes.draw_times(sde, sampling, rho, e)
  b = 0.1 * np.asarray(t, np.float64) + 9.95 * np.square(np.asarray(t, np.float64))
  s, rest = -np.expm1(-b), np.exp(-b)
  found = np.asarray(sdes.weight(sde, weighting, t) / density, np.float64) * (rest**2 + s * rest * 1.3**2)
  np.testing.assert_allclose(found.mean(), mean, rtol=2e-4)
  if sd is not None:
    np.testing.assert_allclose(found.std(), sd, rtol=0.02)


def test_unweighted_importance_sampling_against_quadrature():
  s = lambda t: 1 - math.exp(-0.1 * t - 9.95 * t * t)
  integrand = lambda t: (1 - s(t)) ** 2 + s(t) * (1 - s(t)) * 1.3**2
  total = integrate.quad(integrand, 0.01, 1.0)[0]
  for sampling in ('un', 'uniform', 'll'):
    found, *_ = toy(sdes.VP(), sampling, 'un', 0.01)
    assert abs(found.mean() - total) < 4 * found.std() / math.sqrt(found.size)


def test_cross_entropy_with_its_constant():
  """E over z_e = m_e z_0 + sqrt(s_e) eps of -log N(z_e; 0, 1), by hand."""
  sde, e, z0 = sdes.VP(), 0.01, 1.3
  _, error, t, density = toy(sde, 'll', 'll', e, z0)
  found = losses.diffusion_cross_entropy(error[:, None], sdes.weight(sde, 'll', t) / density, sde.variance(e))
  s = 1 - math.exp(-0.001 - 9.95e-4)
  exact = 0.5 * math.log(2 * math.pi) + 0.5 * ((1 - s) * z0**2 + s)
  np.testing.assert_allclose(exact, 1.76325, atol=1e-5)
  assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(found.size) + 4e-5


def test_cross_entropy_by_quadrature():
  """The same without noise: E over eps in closed form, t by quadrature."""
  s = lambda t: 1 - math.exp(-0.1 * t - 9.95 * t * t)
  error2 = lambda t: (1 - s(t)) ** 2 + s(t) * (1 - s(t)) * 1.3**2
  total = integrate.quad(lambda t: (0.1 + 19.9 * t) / (2 * s(t)) * error2(t), 0.01, 1.0)[0]
  np.testing.assert_allclose(total, 3.4533, atol=1e-4)
  found = losses.diffusion_cross_entropy(jnp.full((1, 1), math.sqrt(total)), jnp.ones(1), sdes.VP().variance(0.01))
  np.testing.assert_allclose(found, 1.76325, atol=1e-4)


def test_cross_entropy_counts_all_dimensions():
  found = losses.diffusion_cross_entropy(jnp.ones((2, 3, 4)), jnp.array([0.5, 2.0]), 0.01)
  np.testing.assert_allclose(found, np.array([6.0, 24.0]) + 6 * math.log(2 * math.pi * math.e * 0.01), rtol=1e-5)


# ---------------------------------------------------------------------------------------- the probability flow


def normal_residual(sde, variance, loc=0.0):
  """r of data N(loc, variance): eps_theta = sqrt(s) (z - m loc) / (m^2 variance + s)."""

  def residual(z, t):
    m, s, v = sde.mean(t)[:, None], sde.variance(t)[:, None], sde.spread(t)[:, None]
    return jnp.sqrt(s) * ((z - m * loc) / (m * m * variance + s) - z / v)

  return residual


def test_density_of_a_normal_by_hand():
  sde = sdes.VP()
  found, _ = jax.jit(lambda z: diffusion.log_density(sde, normal_residual(sde, 0.25), z))(jnp.array([[0.2], [0.9]]))
  np.testing.assert_allclose(found, [-0.3058, -1.8458], atol=1e-4)


@pytest.mark.parametrize('name', ['geometric', 'sub_vp', 've'])
def test_density_and_samples_of_a_normal_with_a_mean(name):
  """Every diffusion carries N(loc, 1/4) to nearly N(0, v_1): the rest of the mean at t = 1 is a rest of the model."""
  sde, loc = ALL[name], 0.3
  z = jnp.array([[0.2, 0.1], [0.9, -0.4]])
  found, count = jax.jit(lambda z: diffusion.log_density(sde, normal_residual(sde, 0.25, loc), z, end=1e-4))(z)
  np.testing.assert_allclose(found, stats.norm(loc, 0.5).logpdf(z).sum(-1), atol=0.02)
  start = jnp.sqrt(sde.spread(1.0)) * jax.random.normal(KEY, (20_000, 1))
  drawn, _ = jax.jit(lambda z: diffusion.generate(sde, normal_residual(sde, 0.25, loc), z, end=1e-4))(start)
  np.testing.assert_allclose([drawn.mean(), drawn.var()], [loc, 0.25], atol=0.015)
  assert 10 < int(count) < 400


@pytest.mark.parametrize('name', ALL)
def test_ancestral_samples_of_a_normal(name):
  sde = ALL[name]
  start = jnp.sqrt(sde.spread(1.0)) * jax.random.normal(KEY, (20_000, 1))
  draw = lambda z: diffusion.ancestral(sde, normal_residual(sde, 0.25, 0.3), jax.random.key(1), z, steps=1000)
  drawn = jax.jit(draw)(start)
  np.testing.assert_allclose([drawn.mean(), drawn.var()], [0.3, 0.25 + sde.variance(0.0)], atol=0.02)


def test_ode_samples_have_the_variance_of_the_data():
  sde, start = sdes.VP(), jax.random.normal(KEY, (5000, 1))
  drawn, count = jax.jit(lambda z: diffusion.generate(sde, normal_residual(sde, 0.25), z))(start)
  np.testing.assert_allclose(drawn, 0.5 * start, atol=2e-3)  # linear: the map of N(0, 1) to N(0, 1/4)
  assert int(count) < 100


@pytest.mark.parametrize('name', ['vp', 'geometric'])
def test_nothing_moves_where_there_is_nothing_to_learn(name):
  sde, z = ALL[name], jax.random.normal(KEY, (50, 3))
  zero = lambda z, t: jnp.zeros_like(z)
  for t in (1e-3, 0.3, 1.0):
    assert (diffusion.flow(sde, zero, jnp.asarray(t), z) == 0).all()
  drawn, count = jax.jit(lambda z: diffusion.generate(sde, zero, z))(z)
  assert (drawn == z).all() and int(count) <= 26
  found = jax.jit(lambda z: diffusion.log_density(sde, zero, z)[0])(z)
  np.testing.assert_allclose(found, stats.norm.logpdf(z).sum(-1), rtol=1e-5)


@pytest.mark.parametrize('name', ['sub_vp', 've'])
def test_the_standard_normal_under_other_diffusions(name):
  """r = 0 is N(0, I) there too, though z_t moves."""
  z = jax.random.normal(KEY, (50, 3))
  found = diffusion.log_density(ALL[name], lambda z, t: jnp.zeros_like(z), z)[0]
  np.testing.assert_allclose(found, stats.norm.logpdf(z).sum(-1), atol=1e-3)


def test_probes_of_the_trace():
  """A field A z: exact trace, unbiased estimates, and half the variance of two probes; the flow itself is linear."""
  matrix = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) * 0.3
  sde, n = sdes.VP(), 4000
  residual = lambda z, t: 0.2 * jnp.sqrt(sde.variance(t))[:, None] * (z @ matrix.T)
  z = jnp.broadcast_to(jax.random.normal(KEY, (4,)), (n, 4))
  exact = diffusion.log_density(sde, residual, z[:1])[0]
  gain = integrate.quad(lambda t: 0.5 * (0.1 + 19.9 * t) * 0.2, 1e-5, 1.0)[0]  # int g^2 / (2 sqrt(s)) 0.2 sqrt(s)
  last = jax.scipy.linalg.expm(gain * matrix) @ z[0]
  np.testing.assert_allclose(exact, gain * np.trace(matrix) + stats.norm.logpdf(last).sum(), atol=2e-3)
  spread = {}
  for m in (1, 2):
    probes = jax.random.normal(jax.random.key(m), (m, n, 4))
    found = np.asarray(jax.jit(lambda z, p: diffusion.log_density(sde, residual, z, probes=p)[0])(z, probes))
    assert abs(found.mean() - float(exact[0])) < 4 * found.std() / math.sqrt(n)
    spread[m] = found.var()
  symmetric = 0.5 * (matrix + matrix.T)
  np.testing.assert_allclose(spread[1], gain**2 * 2 * np.square(symmetric).sum(), rtol=0.15)
  np.testing.assert_allclose(spread[1] / spread[2], 2.0, rtol=0.2)


def test_too_many_steps_are_not_hidden(monkeypatch):
  monkeypatch.setattr(diffusion, 'MAX_STEPS', 3)
  drawn, _ = diffusion.generate(sdes.VP(), normal_residual(sdes.VP(), 0.01), jax.random.normal(KEY, (5, 1)))
  assert np.isnan(drawn).all()


# ---------------------------------------------------------------------------------------- the learned density


def shaken(params, scale=0.1):
  rng = np.random.default_rng(3)
  return jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) * scale, jnp.float32), params)


@pytest.mark.parametrize('sde', list(prior.SDES))
def test_mixing_logits_of_minus_infinity_are_the_standard_normal(sde):
  density = prior.build(sde=sde, channels=16, layers=1, end=1e-4)
  params = {**shaken(density.init(KEY, 3)), 'logit': jnp.full(3, -jnp.inf)}
  u = jax.random.normal(KEY, (20, 3))
  np.testing.assert_allclose(jax.jit(density.log_prob)(params, u), stats.norm.logpdf(u).sum(-1), atol=2e-3)
  assert (density.residual(params, u, jnp.full(20, 0.5)) == 0).all()


def test_the_first_loss_is_that_of_the_standard_normal():
  u = 0.8 * jax.random.normal(KEY, (5000, 2)) + 0.5
  density = prior.build(channels=16, layers=1, mixed=-6.0)
  params = density.init(KEY, 2)
  found = density.loss(params, jax.random.key(1), u)
  s = 1 - math.exp(-0.001 - 9.95e-4)
  exact = math.log(2 * math.pi) + 0.5 * ((1 - s) * np.square(u).sum(-1).mean() + 2 * s)
  assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / math.sqrt(5000) + 0.01


def test_the_mixed_parametrisation_by_hand():
  density = prior.build(channels=16, layers=1)
  params = shaken(density.init(KEY, 3))
  z, t = jax.random.normal(KEY, (5, 3)), jnp.linspace(0.1, 0.5, 5)
  own = density.net.apply({'params': params['net']}, z, t)
  times = np.asarray(t, np.float64)
  deviation = np.sqrt(1 - np.exp(-0.1 * times - 9.95 * times**2))[:, None]
  a = 1 / (1 + np.exp(-np.asarray(params['logit'])))
  mixed = (1 - a) * deviation * z + a * own
  np.testing.assert_allclose(density.residual(params, z, t) + deviation * z, mixed, atol=1e-5)
  m = np.sqrt(1 - deviation**2)
  error = density.error(params, jnp.asarray((z - deviation * 0.7) / m), t, jnp.full((5, 3), 0.7))
  np.testing.assert_allclose(error, 0.7 - mixed, atol=1e-5)


def test_dropout_is_for_the_loss_only():
  density = prior.build(channels=16, layers=2, dropout=0.5)
  params = shaken(density.init(KEY, 3))
  z, t = jax.random.normal(KEY, (5, 3)), jnp.full(5, 0.5)
  one, two = (density.residual(params, z, t, jax.random.key(i)) for i in range(2))
  assert float(jnp.abs(one - two).max()) > 1e-3
  assert (density.residual(params, z, t) == density.residual(params, z, t)).all()


def test_counts_of_evaluations():
  density = prior.build(channels=16, layers=1, steps=7)
  params = shaken(density.init(KEY, 3))
  assert density.evaluations(params, 3, 'ancestral') == 7 and 20 <= density.evaluations(params, 3, 'ode') < 1000
  drawn, count = jax.jit(functools.partial(density.counted, n=4, d=3, sampler='ode', temperature=1.0))(params, KEY)
  assert drawn.shape == (4, 3) and 20 <= int(count) < 1000
  np.testing.assert_array_equal(density.sample(params, KEY, 4, 3, 'ancestral', 1.0).shape, (4, 3))
  still = density.sample({**params, 'logit': jnp.full(3, -jnp.inf)}, KEY, 1000, 3, 'ode', 0.5)
  np.testing.assert_allclose(still.std(), 0.5, rtol=0.05)


def mixture(n, key):
  which, noise = jax.random.split(key)
  centre = jnp.where(jax.random.bernoulli(which, 0.3, (n, 1)), jnp.array([1.5, 0.0]), jnp.array([-1.0, 0.8]))
  return centre + 0.4 * jax.random.normal(noise, (n, 2))


def mixture_log_prob(z, m=1.0, s=0.0):
  """The mixture's log-density after a diffusion by m and s."""
  scale = np.sqrt(m * m * 0.16 + s)
  each = [math.log(w) + stats.norm(m * np.array(c), scale).logpdf(z).sum(-1) for w, c in ((0.3, (1.5, 0)), (0.7, (-1, 0.8)))]
  return np.logaddexp(*each)


@pytest.mark.slow
def test_scores_of_a_mixture_are_learned():
  """eps_theta within 10 % of the analytic noise prediction, and the density of the flow that of the mixture."""
  import optax

  density = prior.build(channels=64, layers=2, mixed=-3.0)
  optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, 2000))

  @jax.jit
  def train(key):
    params = density.init(key, 2)

    def step(carry, key):
      params, state = carry
      data, noise = jax.random.split(key)
      grads = jax.grad(lambda p: density.loss(p, noise, mixture(256, data)).mean())(params)
      updates, state = optimiser.update(grads, state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(key, 2000))[0][0]

  params = train(KEY)
  z0, noise = mixture(2000, jax.random.key(5)), jax.random.normal(jax.random.key(6), (2000, 2))
  for t in (0.05, 0.2, 0.5):
    b = 0.1 * t + 9.95 * t * t
    m, s = math.exp(-b / 2), 1 - math.exp(-b)
    z = np.asarray(m * z0 + math.sqrt(s) * noise, np.float64)
    h = 1e-5
    score = [(mixture_log_prob(z + d, m, s) - mixture_log_prob(z - d, m, s)) / (2 * h) for d in h * np.eye(2)]
    exact = -math.sqrt(s) * np.stack(score, -1)
    found = density.residual(params, jnp.float32(z), jnp.full(2000, t)) + math.sqrt(s) * z
    assert np.sqrt(np.square(found - exact).mean()) < 0.1 * np.sqrt(np.square(exact).mean())
  u = mixture(500, jax.random.key(7))
  np.testing.assert_allclose(jax.jit(density.log_prob)(params, u).mean(), mixture_log_prob(np.asarray(u)).mean(), atol=0.05)
  drawn = jax.jit(lambda p: density.sample(p, KEY, 2000, 2, 'ode', 1.0))(params)
  np.testing.assert_allclose((drawn[:, 0] > 0.25).mean(), 0.3, atol=0.05)


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(sde='vpp'), "method.prior.sde is 'vpp'; did you mean 'vp'"),
    (dict(weighting='lll'), "method.prior.weighting is 'lll'"),
    (dict(sampling='u'), "method.prior.sampling is 'u'"),
    (dict(sde='ve', sampling='un'), "method.prior.sampling is 'un'"),
    (dict(sde='geometric', sde_range=(1e-4, 2.0)), 'method.prior.sde_range is'),
    (dict(start=0.0), 'method.prior.start is 0.0'),
    (dict(channels=0), 'method.prior.channels is 0'),
    (dict(probes=-1), 'method.prior.probes is -1'),
    (dict(tolerance=0.0), 'method.prior.tolerance is 0.0'),
    (dict(end=0.0), 'method.prior.end is 0.0'),
    (dict(dropout=1.0), 'method.prior.dropout is 1.0'),
  ],
)
def test_refusals_name_the_key(options, message):
  with pytest.raises(UserError, match=message):
    prior.build(**options)
