"""Densities against scipy, quadrature, enumeration and hand-derived numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from latentgen import distributions

DLM = distributions.DiscretizedLogisticMixture


def _reference_mass(x, logits, loc, log_scale, coeffs, bits):
  """Probability of one pixel x [c] in float64 from plain cdf differences."""
  top = 2**bits - 1
  pixel = 2 * np.asarray(x, np.float64) - 1
  total = 0.0
  for j, weight in enumerate(special.softmax(np.asarray(logits, np.float64))):
    mass = weight
    for i, value in enumerate(pixel):
      mean = float(loc[j][i])
      if coeffs is not None and i == 1:
        mean += coeffs[j][0] * pixel[0]
      if coeffs is not None and i == 2:
        mean += coeffs[j][1] * pixel[0] + coeffs[j][2] * pixel[1]
      scale = np.exp(float(log_scale[j][i]))
      upper = np.inf if x[i] == 1 else (value + 1 / top - mean) / scale
      lower = -np.inf if x[i] == 0 else (value - 1 / top - mean) / scale
      if lower > 0:  # the upper tail in terms of the lower one, where float64 still resolves it
        upper, lower = -lower, -upper
      mass *= special.expit(upper) - special.expit(lower)
    total += mass
  return total


def _random_mixture(seed, m=3, c=3, bits=8, shape=()):
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(rng.normal(size=shape + s), jnp.float32)
  return DLM(draw(m), 0.7 * draw(m, c), draw(m, c) - 1.0, jnp.tanh(draw(m, 3)) if c == 3 else None, bits)


# ---------------------------------------------------------------------------------------- normal and friends


def test_normal_log_prob_is_scipys():
  x = np.array([-3.0, 0.2, 5.0], np.float32)
  got = distributions.Normal(0.5, jnp.array([0.1, 1.0, 30.0])).log_prob(x)
  np.testing.assert_allclose(got, stats.norm(0.5, [0.1, 1.0, 30.0]).logpdf(x), rtol=1e-5)


@pytest.mark.parametrize('q, p', [((0.3, 0.5), (-1.0, 2.0)), ((2.0, 3.0), (0.0, 1.0)), ((0.0, 1.0), (0.0, 1.01))])
def test_normal_kl_is_the_integral(q, p):
  density, other = stats.norm(*q), stats.norm(*p)
  integrand = lambda z: density.pdf(z) * (density.logpdf(z) - other.logpdf(z))
  want, _ = integrate.quad(integrand, q[0] - 12 * q[1], q[0] + 12 * q[1], epsabs=1e-12)
  got = distributions.Normal(*map(jnp.float32, q)).kl(distributions.Normal(*map(jnp.float32, p)))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


def test_normal_kl_of_equal_densities_is_exactly_zero():
  a = distributions.Normal(jnp.linspace(-3, 3, 7), jnp.linspace(0.1, 9, 7))
  assert (a.kl(a) == 0).all()


def test_normal_sample_and_temper():
  base = distributions.Normal(jnp.array([1.0, -2.0]), jnp.full((100_000, 1), 0.5))
  draws = base.temper(0.2).sample(jax.random.key(0))
  assert draws.shape == base.mean.shape == (100_000, 2)
  # Standard errors: 0.1 / sqrt(1e5) = 3e-4 for the mean, 0.1 / sqrt(2e5) = 2.3e-4 for the deviation.
  np.testing.assert_allclose(draws.mean(0), [1.0, -2.0], atol=1.5e-3)
  np.testing.assert_allclose(draws.std(0), [0.1, 0.1], atol=1.2e-3)
  assert distributions.Normal(0, 1).sample(jax.random.key(0)).dtype == jnp.float32


def test_bernoulli():
  logits = jnp.array([-2.0, 0.0, 3.0, 200.0, -200.0])
  base = distributions.Bernoulli(logits)
  p = special.expit(np.array([-2.0, 0.0, 3.0]))
  np.testing.assert_allclose(base.log_prob(jnp.ones(5))[:3], np.log(p), rtol=1e-5)
  np.testing.assert_allclose(base.log_prob(jnp.full(5, 0.3))[:3], 0.3 * np.log(p) + 0.7 * np.log1p(-p), rtol=1e-5)
  np.testing.assert_allclose(base.log_prob(jnp.zeros(5))[3:], [-200.0, 0.0], atol=1e-6)
  np.testing.assert_allclose(base.mean[:3], p, rtol=1e-5)
  draws = jax.vmap(base.sample)(jax.random.split(jax.random.key(1), 20_000))
  assert set(np.unique(draws)) == {0.0, 1.0}
  np.testing.assert_allclose(draws.mean(0)[:3], p, atol=5 * 0.5 / np.sqrt(20_000))


def test_independent_sums_the_last_axes_only():
  rng = np.random.default_rng(0)
  loc, x = rng.normal(size=(3, 2, 4, 5)), rng.normal(size=(2, 4, 5))
  base = distributions.Independent(distributions.Normal(jnp.float32(loc), 2.0), 2)
  want = [[stats.norm(loc[k, b], 2.0).logpdf(x[b]).sum() for b in range(2)] for k in range(3)]
  np.testing.assert_allclose(base.log_prob(jnp.float32(x)), want, rtol=1e-5)
  np.testing.assert_array_equal(base.mean, np.float32(loc))
  assert base.sample(jax.random.key(0)).shape == (3, 2, 4, 5)


def test_independent_of_no_axes_is_the_base():
  rng = np.random.default_rng(0)
  loc, x = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
  base = distributions.Normal(jnp.float32(loc), jnp.full((3, 2), 2.0))
  found = distributions.Independent(base, 0).log_prob(jnp.float32(x))
  np.testing.assert_allclose(found, stats.norm(loc, 2.0).logpdf(x), rtol=1e-5)


# ---------------------------------------------------------------------------------------- logistic mixture


def test_number_and_layout_of_parameters():
  assert DLM.num_parameters(3, 10) == 100
  assert DLM.num_parameters(1, 5) == 15
  raw = np.random.default_rng(0).normal(size=(2, 20)).astype(np.float32)
  raw[:, 8:14] -= 7.0
  mix = DLM.from_parameters(jnp.asarray(raw), 3, 8, 2)
  assert mix.bits == 8
  for n, j in itertools.product(range(2), range(2)):
    assert mix.logits[n, j] == raw[n, j]
    for i in range(3):
      assert mix.loc[n, j, i] == raw[n, 2 + 3 * j + i]
      assert mix.log_scale[n, j, i] == max(raw[n, 8 + 3 * j + i], -7.0)
      np.testing.assert_allclose(mix.coeffs[n, j, i], np.tanh(raw[n, 14 + 3 * j + i]), rtol=1e-5)
  assert DLM.from_parameters(jnp.zeros((2, 15), jnp.bfloat16), 1, 8, 5).loc.dtype == jnp.float32
  assert DLM.from_parameters(jnp.zeros((2, 15)), 1, 8, 5).coeffs is None
  with pytest.raises(ValueError, match='20 parameters'):
    DLM.from_parameters(jnp.zeros((2, 21)), 3, 8, 2)


@pytest.mark.parametrize('spread', [1.0, 5.0, 40.0])
def test_all_64_colours_of_two_bits_sum_to_one(spread):
  colours = jnp.array(list(itertools.product(range(4), repeat=3)), jnp.float32) / 3.0
  raw = spread * jax.random.normal(jax.random.key(0), (50, 1, 100))
  log_p = jax.jit(lambda r: DLM.from_parameters(r, 3, 2, 10).log_prob(colours))(raw)  # [50, 64]
  assert log_p.shape == (50, 64)
  np.testing.assert_allclose(jnp.exp(log_p).sum(1), 1.0, atol=2e-5)


@pytest.mark.parametrize('bits', [1, 5, 8])
def test_grey_levels_sum_to_one_even_at_extreme_parameters(bits):
  loc, log_scale = map(np.ravel, np.meshgrid([-1e4, -50, -1, 0.3, 1, 3, 1e4], [-7.0, -6.5, -3.0, 0.0, 7.0, 30.0, 90.0]))
  levels = jnp.arange(2**bits)[:, None] / (2**bits - 1)

  def log_prob(loc, log_scale):
    return DLM(jnp.zeros(1), loc[None, None], log_scale[None, None], None, bits).log_prob(levels)

  args = jnp.float32(loc), jnp.float32(log_scale)
  log_p = jax.jit(jax.vmap(log_prob))(*args)
  assert jnp.isfinite(log_p).all()
  np.testing.assert_allclose(jnp.exp(log_p).sum(1), 1.0, atol=3e-5)
  gradients = jax.jit(jax.vmap(jax.jacrev(log_prob, argnums=(0, 1))))(*args)
  assert all(jnp.isfinite(g).all() for g in gradients)


def test_five_bit_colours_sum_to_one():
  colours = jnp.array(list(itertools.product(range(32), repeat=3)), jnp.float32) / 31.0
  np.testing.assert_allclose(jnp.exp(_random_mixture(3, bits=5).log_prob(colours)).sum(), 1.0, atol=5e-5)


def test_eight_bit_red_marginal_is_the_red_mixture():
  mix = _random_mixture(4, m=2)
  green, blue = (a.ravel() for a in jnp.meshgrid(jnp.arange(256) / 255, jnp.arange(256) / 255))
  red_only = lambda r: _reference_mass([r], mix.logits, mix.loc[:, :1], mix.log_scale[:, :1], None, 8)
  for level in (0, 77, 255):
    red = jnp.full_like(green, level / 255)
    got = jnp.exp(mix.log_prob(jnp.stack([red, green, blue], -1))).sum()
    np.testing.assert_allclose(got, red_only(level / 255), rtol=2e-4)
  np.testing.assert_allclose(sum(red_only(level / 255) for level in range(256)), 1.0, atol=1e-12)


@pytest.mark.parametrize('bits, c', [(2, 3), (5, 3), (8, 3), (8, 1), (8, 2)])
def test_log_prob_is_the_difference_of_cdfs(bits, c):
  mix = _random_mixture(5, c=c, bits=bits)
  levels = np.random.default_rng(6).integers(0, 2**bits, size=(20, c))
  levels[0], levels[1] = 0, 2**bits - 1
  x = levels / (2**bits - 1)
  want = [np.log(_reference_mass(row, mix.logits, mix.loc, mix.log_scale, mix.coeffs, bits)) for row in x]
  np.testing.assert_allclose(mix.log_prob(jnp.float32(x)), want, rtol=2e-5, atol=1e-5)


def test_log_prob_in_the_far_tail():
  """Level 128 of 8 bits, mean 3, scale e^-7: (y - mean) e^7 dominates, log p = (upper edge - mean) / scale to 1e-3."""
  mix = DLM(jnp.zeros(1), jnp.full((1, 1), 3.0), jnp.full((1, 1), -7.0), None, 8)
  want = (2 * 128 / 255 - 1 + 1 / 255 - 3.0) * np.exp(7.0)
  np.testing.assert_allclose(mix.log_prob(jnp.array([128 / 255])), want, rtol=1e-5)


def test_gradients_match_finite_differences_of_the_reference():
  mix = _random_mixture(7, m=2)
  x = [0.2, 0.6, 1.0]
  grad = jax.jit(jax.grad(lambda m: m.log_prob(jnp.float32(x))))(mix)
  arrays = {name: np.asarray(getattr(mix, name), np.float64) for name in ('logits', 'loc', 'log_scale', 'coeffs')}
  for name, array in arrays.items():
    for index in np.ndindex(array.shape):
      sides = []
      for sign in (1, -1):
        moved = {k: v.copy() for k, v in arrays.items()}
        moved[name][index] += sign * 1e-5
        sides.append(np.log(_reference_mass(x, **moved, bits=8)))
      np.testing.assert_allclose(getattr(grad, name)[index], (sides[0] - sides[1]) / 2e-5, rtol=1e-3, atol=2e-4)


def test_extreme_colour_parameters_have_finite_values_and_gradients():
  raw = jnp.concatenate([jnp.full((1, 100), s) for s in (-1e4, -30.0, 0.0, 30.0, 1e4)])[:, None, None]
  x = jnp.array([[0.0, 0.5019608, 1.0]])
  f = lambda r: DLM.from_parameters(r, 3, 8, 10).log_prob(x).sum()
  value, grad = jax.jit(jax.value_and_grad(f))(raw)
  assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_parameters_with_a_sample_axis_meet_images_without():
  mix = _random_mixture(8, bits=5, shape=(4, 2, 3, 3))  # [k, b, h, w]
  x = jax.random.randint(jax.random.key(0), (2, 3, 3, 3), 0, 32) / 31.0
  log_prob = jax.jit(DLM.log_prob)
  got = log_prob(mix, x)
  assert got.shape == (4, 2, 3, 3)
  for k in range(4):
    one = jax.tree.map(lambda a, k=k: a[k], mix)
    np.testing.assert_allclose(got[k], log_prob(one, x), rtol=1e-5, atol=1e-5)
  image = distributions.Independent(mix, 2).log_prob(x)
  np.testing.assert_allclose(image, np.asarray(got).sum((2, 3)), rtol=1e-5)


def test_mean_couples_channels_and_clips():
  log_scale = jnp.full((1, 3), -5.0)
  one = DLM(jnp.zeros(1), jnp.array([[0.5, 0.2, -0.1]]), log_scale, jnp.array([[0.5, -0.4, 0.3]]), 8)
  # r = 0.5; g = 0.2 + 0.5 * 0.5 = 0.45; b = -0.1 - 0.4 * 0.5 + 0.3 * 0.45 = -0.165
  np.testing.assert_allclose(one.mean, [0.75, 0.725, 0.4175], rtol=1e-6)
  two = DLM(jnp.log(jnp.array([0.25, 0.75])), jnp.array([[9.0], [-0.5]]), jnp.zeros((2, 1)), None, 8)
  np.testing.assert_allclose(two.mean, [0.25 * 1.0 + 0.75 * 0.25], rtol=1e-6)
  # With narrow components the mean is that of the samples.
  draws = jax.vmap(one.sample)(jax.random.split(jax.random.key(0), 4000))
  np.testing.assert_allclose(draws.mean(0), one.mean, atol=1e-3)


def test_samples_have_the_probabilities_that_log_prob_states():
  mix = _random_mixture(9, bits=2)
  n = 200_000
  levels = np.asarray(jax.vmap(mix.sample)(jax.random.split(jax.random.key(0), n))) * 3
  np.testing.assert_allclose(levels, np.round(levels), atol=1e-6)
  codes = np.round(levels).astype(int) @ [16, 4, 1]
  colours = np.array(list(itertools.product(range(4), repeat=3))) / 3
  want = [_reference_mass(x, mix.logits, mix.loc, mix.log_scale, mix.coeffs, 2) for x in colours]
  observed = np.bincount(codes, minlength=64) / n
  error = np.sqrt(np.array(want) / n)
  assert (np.abs(observed - want) < 5 * error + 1 / n).all()


def test_logistic_mixture_is_a_pytree_with_static_bits():
  mix = _random_mixture(10, bits=5)
  leaves, treedef = jax.tree.flatten(mix)
  assert len(leaves) == 4 and jax.tree.unflatten(treedef, leaves).bits == 5
  x = jnp.array([0.0, 1.0, 0.0])
  np.testing.assert_allclose(jax.jit(lambda m: m.log_prob(x))(mix), mix.log_prob(x), rtol=1e-6)


# ---------------------------------------------------------------------------------------- mixture, clamps


def test_gaussian_mixture_log_prob_is_scipys():
  weights, loc = np.array([0.2, 0.8]), np.array([[0.0, 1.0, 2.0], [-1.0, 0.5, 0.0]])
  scale = np.array([[0.5, 1.0, 2.0], [0.1, 3.0, 1.0]])
  z = np.random.default_rng(0).normal(size=(4, 5, 3))
  parts = [w * stats.norm(m, s).pdf(z).prod(-1) for w, m, s in zip(weights, loc, scale, strict=True)]
  mix = distributions.GaussianMixture(*map(jnp.float32, (weights, loc, scale)))
  np.testing.assert_allclose(mix.log_prob(jnp.float32(z)), np.log(sum(parts)), rtol=1e-5, atol=1e-5)


def test_gaussian_mixture_samples_have_its_moments():
  weights, loc, scale = np.array([0.3, 0.7]), np.array([[-1.0, 4.0], [2.0, 0.0]]), np.array([[0.5, 1.0], [0.2, 2.0]])
  mix = distributions.GaussianMixture(*map(jnp.float32, (weights, loc, scale)))
  z = np.asarray(mix.sample(jax.random.key(0), 200_000))
  mean = weights @ loc
  variance = weights @ (scale**2 + loc**2) - mean**2
  np.testing.assert_allclose(mix.mean, mean, rtol=1e-6)
  np.testing.assert_allclose(z.mean(0), mean, atol=5 * np.sqrt(variance.max() / 200_000))
  np.testing.assert_allclose(z.var(0), variance, rtol=0.02)
  # Correlation between dimensions exists only if one component is drawn for all of them.
  cross = (weights * (loc - mean).prod(-1)).sum()
  np.testing.assert_allclose(np.cov(z.T)[0, 1], cross, rtol=0.03)


def test_repeated_draws_of_a_mixture_are_a_batch():
  p = distributions.GaussianMixture(jnp.array([0.25, 0.75]), jnp.array([[4.0, 0.0], [0.0, -8.0]]), jnp.full((2, 2), 0.1))
  many = distributions.Repeated(p, 4000)
  z = np.asarray(many.sample(jax.random.key(0)))
  np.testing.assert_array_equal(many.mean, np.tile([1.0, -6.0], (4000, 1)))
  assert z.shape == (4000, 2) and abs((z[:, 0] > 2).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
  np.testing.assert_array_equal(many.log_prob(z), p.log_prob(z))


def test_dead_component_has_no_say_and_a_finite_gradient():
  loc, scale = jnp.array([[0.0], [50.0]]), jnp.ones((2, 1))
  f = lambda w: distributions.GaussianMixture(w, loc, scale).log_prob(jnp.zeros(1))
  value, grad = jax.value_and_grad(f)(jnp.array([1.0, 0.0]))
  np.testing.assert_allclose(value, stats.norm.logpdf(0.0), rtol=1e-6)
  np.testing.assert_allclose(grad, [1.0, 0.0], atol=1e-6)  # density ratio N_k(z) / p(z)


def test_soft_clamp():
  x = jnp.linspace(-40, 40, 801)
  y = distributions.soft_clamp(x)
  np.testing.assert_array_equal(y, -distributions.soft_clamp(-x))
  assert (jnp.abs(distributions.soft_clamp(jnp.linspace(-20, 20, 401))) < 5).all() and (jnp.abs(y) <= 5).all()
  np.testing.assert_allclose(jax.grad(distributions.soft_clamp)(0.0), 1.0, rtol=1e-6)
  np.testing.assert_allclose(distributions.soft_clamp(jnp.float32(2.0), 2.0), 2 * np.tanh(1.0), rtol=1e-6)


def test_soft_clamped_normal():
  log_sigma = jnp.array([-1e3, -5.0, 0.0, 5.0, 1e3])
  normal = distributions.soft_clamped_normal(jnp.array([-1e3, 0.0, 1.0, 0.0, 1e3]), log_sigma)
  want = [np.exp(-5) + 0.01, np.exp(-5 * np.tanh(1)) + 0.01, 1.01, np.exp(5 * np.tanh(1)) + 0.01, np.exp(5) + 0.01]
  np.testing.assert_allclose(normal.scale, want, rtol=1e-5)
  np.testing.assert_allclose(normal.loc[jnp.array([0, 2, 4])], [-5.0, 5 * np.tanh(0.2), 5.0], rtol=1e-5)
