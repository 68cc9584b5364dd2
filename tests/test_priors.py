"""Critics and tilts on hand-made traces: broadcasting, coordinates, temperature, stacked parameters, normalisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latentgen.distributions import Normal
from latentgen.priors.critics import Critic, features
from latentgen.priors.tilted import Tilted
from latentgen.types import Trace

KEY = jax.random.key(0)
LOC, SCALE = 0.7, 0.4  # of q in the coordinates of `Exact`


def shaken(params, seed=1):
  """Parameters moved off their initialisation, the zero heads too."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) * 0.3, jnp.float32), params)


def trace_of(*levels):
  """A Trace with z, prior and context only; a level is (shape of z [g, k, b, ...], width of the context)."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  z = tuple(normal(*shape) for shape, _ in levels)
  prior = tuple(Normal(normal(*shape), jnp.exp(0.3 * normal(*shape))) for shape, _ in levels)
  context = tuple(normal(*shape[:-1], width) for shape, width in levels)
  return Trace(z, z, (), (), None, context, prior, None, None)


# ---------------------------------------------------------------------------------------- critics


@functools.cache
def critic_on(kind):
  """(critic, shaken parameters, z [m, n, ...], context [n, ...])."""
  rng = np.random.default_rng(2)
  event = (8, 8, 2) if kind == 'map' else (3,)
  z = jnp.asarray(rng.normal(size=(3, 2, *event)), jnp.float32)
  context = jnp.asarray(rng.normal(size=(2, *event[:-1], 5)), jnp.float32)
  critic = Critic(channels=8, blocks='AB', layers=3)
  return critic, shaken(jax.jit(critic.init)(KEY, z[0], context)), z, context


@pytest.mark.parametrize('kind', ['map', 'vector'])
def test_proposals_share_their_context(kind):
  critic, params, z, context = critic_on(kind)
  apply = jax.jit(critic.apply)
  got = apply(params, z, context)
  assert got.shape == (3, 2) and float(jnp.abs(got - got.mean()).min()) > 1e-4
  np.testing.assert_allclose(got, apply(params, z, jnp.tile(context[None], (3, *(1,) * context.ndim))), atol=1e-5)
  np.testing.assert_allclose(got, jnp.stack([apply(params, one, context) for one in z]), atol=1e-5)
  swapped = apply(params, z, context[::-1])
  assert float(jnp.abs(swapped - got).min()) > 1e-4  # the context is used


def test_vector_critic_against_numpy():
  critic, params, z, context = critic_on('vector')
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params['params'])
  swish = lambda a: a / (1 + np.exp(-a))
  h = np.asarray(z) @ p['stem']['kernel'] + p['stem']['bias'] + np.asarray(context) @ p['context']['kernel']
  for name in ('Dense_0', 'Dense_1', 'Dense_2'):
    h = swish(h) @ p[name]['kernel'] + p[name]['bias']
  np.testing.assert_allclose(critic.apply(params, z, context), h[..., 0], rtol=1e-4, atol=1e-5)


def test_critics_without_context():
  critic = Critic(channels=4)
  params = critic.init(KEY, jnp.ones((2, 3)), jnp.ones((2, 0)))['params']
  assert 'context' not in params
  assert critic.apply({'params': shaken(params)}, jnp.ones((5, 2, 3)), jnp.ones((2, 0))).shape == (5, 2)


@pytest.mark.parametrize('event', [(4,), (4, 4, 2)])
def test_untrained_tilt_is_none(event):
  tilt = Tilted(Critic(channels=4, blocks=''), 'both')
  trace = trace_of(((2, 1, 3, *event), 2))
  params = jax.jit(tilt.init)(KEY, trace)
  (ratio,) = jax.jit(tilt.log_ratio)(params, trace.z, trace.prior, trace.context)
  assert ratio.shape == (2, 1, 3)
  np.testing.assert_array_equal(ratio, 0.0)
  (log_z,), (ess,) = jax.jit(lambda params, key: tilt.normalisers(params, trace, key, 7, 3))(params, KEY)
  np.testing.assert_allclose(log_z, 0.0, atol=1e-6)
  np.testing.assert_allclose(ess, 7.0, rtol=1e-5)


def test_untrained_tilt_leaves_the_base():
  n, d = 4000, 4
  tilt = Tilted(Critic(channels=4))
  params = jax.jit(tilt.init)(KEY, trace_of(((1, 1, 3, d), 2)))
  prior = Normal(jnp.full((n, d), 2.0), jnp.full((n, d), 0.5))
  z = jax.jit(lambda key: tilt.sir(params, 20, 8)(0, 0, prior, jnp.zeros((n, 2)), key))(KEY)
  assert stats.kstest(np.ravel(z), stats.norm(2.0, 0.5).cdf).pvalue > 1e-3
  np.testing.assert_allclose(np.cov(z.T), 0.25 * np.eye(d), atol=0.25 * 5 * np.sqrt(2 / n))


# ---------------------------------------------------------------------------------------- stacked parameters


def test_stacked_critics_are_each_group_by_itself():
  """Two levels of maps of different sizes, three and two groups."""
  trace = trace_of(((3, 2, 2, 4, 4, 1), 2), ((2, 2, 2, 8, 8, 2), 3))
  critic = Critic(channels=4, blocks='')
  tilt = Tilted(critic, 'both')
  params = jax.jit(tilt.init)(KEY, trace)
  first = params['level0']['stack']['stem']['kernel']
  assert first.shape == (3, 3, 3, 2, 4)  # groups, then a 3x3 convolution of z and eps
  assert float(jnp.abs(first[0] - first[1]).max()) > 1e-2  # groups start from different draws
  params = shaken(params)
  got = jax.jit(tilt.log_ratio)(params, trace.z, trace.prior, trace.context)
  apply = jax.jit(critic.apply)
  for level, groups in enumerate((3, 2)):
    assert got[level].shape == (groups, 2, 2)
    for g in range(groups):
      own = jax.tree.map(lambda p, g=g: p[g], params[f'level{level}']['stack'])
      prior = trace.prior[level]
      z = np.asarray(trace.z[level][g])
      seen = np.concatenate([z, (z - np.asarray(prior.loc[g])) / np.asarray(prior.scale[g])], -1)
      want = apply({'params': own}, jnp.asarray(seen), trace.context[level][g])
      np.testing.assert_allclose(got[level][g], want, atol=1e-5)


class Exact:
  """log q / p with p = N(0, 1) and q = N(loc, scale^2) of the noise coordinate, from either coordinate.

  'noise' reads eps, last of what it sees; 'base' reads z, first of what it sees, and the prior's parameters off the
  context.
  """

  def __init__(self, form):
    self.form = form

  def init(self, key, z, context):
    del key, z, context
    return {'params': {'loc': jnp.asarray(LOC), 'scale': jnp.asarray(SCALE)}}

  def apply(self, variables, seen, context):
    p = variables['params']
    u = seen[..., 0] if self.form == 'base' else seen[..., -1]
    loc, scale = (context[..., 0], context[..., 1]) if self.form == 'base' else (0.0, 1.0)
    log_normal = lambda m, s: -0.5 * jnp.square((u - m) / s) - jnp.log(s)
    return log_normal(loc + scale * p['loc'], scale * p['scale']) - log_normal(loc, scale)


STACK = {'level0': {'stack': {'loc': jnp.array([LOC, -2.0]), 'scale': jnp.array([SCALE, 0.2])}}}


def test_features_are_latents_then_noise():
  z, prior = jnp.ones((2, 3, 4)), Normal(jnp.full((3, 4), 0.5), jnp.full((3, 4), 0.25))
  np.testing.assert_array_equal(features(z, prior, 'z'), z)
  np.testing.assert_array_equal(features(z, prior, 'eps'), 2.0 * z)
  np.testing.assert_array_equal(features(z, prior, 'both'), np.concatenate([z, 2.0 * z], -1))


@pytest.mark.parametrize('coordinates, form', [('z', 'base'), ('both', 'base'), ('eps', 'noise'), ('both', 'noise')])
def test_coordinates_carry_the_same_ratio(coordinates, form):
  trace = trace_of(((2, 3, 5, 1), 1))
  prior = trace.prior[0]
  context = jnp.concatenate([prior.loc, prior.scale], -1)  # what an exact critic has to know
  got = Tilted(Exact(form), coordinates).log_ratio(STACK, trace.z, trace.prior, (context,))[0]
  z, loc, scale = (np.asarray(a[..., 0], np.float64) for a in (trace.z[0], prior.loc, prior.scale))
  for g, (m, s) in enumerate(((LOC, SCALE), (-2.0, 0.2))):
    q = stats.norm(loc[g] + scale[g] * m, scale[g] * s)
    want = q.logpdf(z[g]) - stats.norm(loc[g], scale[g]).logpdf(z[g])
    np.testing.assert_allclose(got[g], want, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------- sampling

PRIOR = (3.0, 2.0)  # of the tests below


def draw(choose, n, group=0):
  """n draws of one group from N(3, 2^2), its context its prior's parameters."""
  prior = Normal(jnp.full((n, 1), PRIOR[0]), jnp.full((n, 1), PRIOR[1]))
  context = jnp.concatenate([prior.loc, prior.scale], -1)
  return np.asarray(jax.jit(lambda group, key: choose(0, group, prior, context, key))(jnp.int32(group), KEY))[:, 0]


def tempered(t):
  """(mean, sd) of N(eps; 0, t^2) q(eps) / N(eps; 0, 1) in noise coordinates: a product of three normals."""
  precision = 1 / t**2 + 1 / SCALE**2 - 1
  return LOC / SCALE**2 / precision, precision**-0.5


@pytest.mark.parametrize('coordinates, form', [('z', 'base'), ('eps', 'noise')])
@pytest.mark.parametrize('t', [1.0, 0.6])
def test_temperature_scales_proposals_and_not_the_ratio(coordinates, form, t):
  """SIR at temperature t has the density N(z; loc, (t scale)^2) r(z), r at the true z."""
  n = 4000
  mean, sd = tempered(t)
  wrong = LOC / SCALE**2 / t / (1 / t**2 + (1 / SCALE**2 - 1) / t**2)  # the ratio at eps / t
  assert t == 1.0 or abs(mean - wrong) > 0.1
  z = draw(Tilted(Exact(form), coordinates).sir(STACK, 400, 50, t), n)
  np.testing.assert_allclose(z.mean(), PRIOR[0] + PRIOR[1] * mean, atol=PRIOR[1] * (0.005 + 4 * sd / np.sqrt(n)))
  np.testing.assert_allclose(z.std(), PRIOR[1] * sd, rtol=4 / np.sqrt(2 * n) + 0.01)


@pytest.mark.parametrize('t', [1.0, 0.6])
def test_langevin_has_the_same_target_as_sir(t):
  """In noise coordinates scaled by t; step eta adds a known bias, variance / (1 - eta / (4 variance))."""
  n, eta = 4000, 0.05
  mean, sd = tempered(t)
  biased = np.sqrt(1 / (1 - eta / (4 * (sd / t) ** 2))) * sd
  z = draw(Tilted(Exact('noise'), 'eps').langevin(STACK, 100, eta, t), n)
  np.testing.assert_allclose(z.mean(), PRIOR[0] + PRIOR[1] * mean, atol=PRIOR[1] * (0.005 + 4 * sd / np.sqrt(n)))
  np.testing.assert_allclose(z.std(), PRIOR[1] * biased, rtol=4 / np.sqrt(2 * n))


def test_constant_ratio_at_a_temperature_is_the_tempered_base():
  params = {'level0': {'stack': {'loc': jnp.zeros(1), 'scale': jnp.ones(1)}}}
  z = draw(Tilted(Exact('noise'), 'eps').sir(params, 8, 3, 0.5), 4000)
  assert stats.kstest(z, stats.norm(PRIOR[0], 0.5 * PRIOR[1]).cdf).pvalue > 1e-3


@pytest.mark.parametrize('sampler', ['sir', 'langevin'])
def test_a_traced_group_finds_its_own_critic(sampler):
  tilt = Tilted(Exact('noise'), 'eps')
  choose = tilt.sir(STACK, 2000, 200) if sampler == 'sir' else tilt.langevin(STACK, 200, 0.02)
  z = draw(choose, 500, group=1)
  np.testing.assert_allclose(z.mean(), PRIOR[0] - 2.0 * PRIOR[1], atol=0.15)
  assert z.std() < 0.5 * PRIOR[1]


# ---------------------------------------------------------------------------------------- normalisers


def test_normalisers_of_every_group_at_its_context():
  """r = exp(a u + c): log Z = a^2 / 2 + c, below it on average, by (e^(a^2) - 1) / (2 M)."""

  class Linear:
    def apply(self, variables, seen, context):
      return variables['params']['a'] * seen[..., 0] + context[..., 0]

  params = {'level0': {'stack': {'a': jnp.array([0.5, 1.0])}}}
  trace = trace_of(((2, 50, 200, 1), 1))
  m = 20
  (log_z,), (ess,) = jax.jit(lambda key: Tilted(Linear(), 'eps').normalisers(params, trace, key, m, 7))(KEY)
  assert log_z.shape == ess.shape == (2, 50, 200)
  for g, a in enumerate((0.5, 1.0)):
    variance = np.exp(a * a) - 1
    error = np.asarray(log_z[g] - trace.context[0][g, ..., 0]) - a * a / 2
    bias = -variance / (2 * m)  # to first order in 1 / M
    np.testing.assert_allclose(error.mean(), bias, atol=0.2 * abs(bias) + 4 * error.std() / np.sqrt(error.size))
    assert error.mean() < -4 * error.std() / np.sqrt(error.size)
    np.testing.assert_allclose(error.std(), np.sqrt(variance / m), rtol=0.1)
    np.testing.assert_allclose(error[..., :100].mean(), error[..., 100:].mean(), atol=0.01)  # whatever the context
    assert 1 <= float(ess[g].min()) and float(ess[g].max()) <= m


def test_normalisers_without_context():
  """Vectors of a single level: the context has width 0."""
  trace = trace_of(((1, 2, 3, 4), 0))
  tilt = Tilted(Critic(channels=4))
  params = shaken(jax.jit(tilt.init)(KEY, trace))
  (log_z,), (ess,) = jax.jit(lambda key: tilt.normalisers(params, trace, key, 6, 6))(KEY)
  assert log_z.shape == ess.shape == (1, 2, 3)
  assert len(np.unique(log_z)) == 6  # every context its own proposals
