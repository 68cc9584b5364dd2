"""The two updates of LSGM on a plain VAE: where gradients go, which times and weights they see, and the bound they report."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latentgen.errors import UserError
from latentgen.methods import lsgm
from latentgen.nets import vae
from latentgen.priors import diffusion as prior
from latentgen.train import step as stepping
from latentgen.types import Context

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(9), (6, 4, 4, 1))
NET = vae.build((4, 4, 1), latent=3, hidden=(16,), likelihood='bernoulli')


def method_of(times='shared', weighting='ll', sampling='ll', **options):
  density = prior.build(channels=16, layers=1, weighting=weighting, sampling=sampling, tolerance=1e-4)
  return lsgm.build(NET, 100, prior=density, times=times, **options)


def shaken(tree, scale=0.2, seed=3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) * scale, jnp.float32), tree)


def context(method, step=0):
  """(parameters off their initialisation, context after `prepare`)."""
  variables = method.init(KEY, {'image': IMAGES})
  params = {**variables['params'], 'prior': shaken(variables['params']['prior'])}
  ctx = Context(batch={'image': IMAGES}, key=jax.random.key(1), step=jnp.asarray(step, jnp.int32), stats=variables['stats'])
  shared, carry = method.prepare(params, ctx)
  return params, ctx.replace(shared=shared, carry=carry)


def smooth(params):
  """The same without sines of the time in the network, along which a random one is too rough for adaptive steps."""
  net = params['prior']['net']
  still = {**net, 'time': jax.tree.map(jnp.zeros_like, net['time'])}
  return {**params, 'prior': {**params['prior'], 'net': still}}


def size(tree):
  return sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('times', lsgm.TIMES)
def test_gradients_stay_in_their_groups(times):
  """The prior's loss does not move the VAE, and the groups of the two updates are what they may move."""
  method = method_of(times)
  params, ctx = context(method)
  vae_update, prior_update = method.updates()
  assert (vae_update.wrt, prior_update.wrt) == (('encoder', 'decoder'), ('prior',)) and method.order == 'simultaneous'
  grads = jax.jit(jax.grad(lambda p: prior_update.loss(p, ctx)[0]))(params)
  assert size(grads['encoder']) == 0 == size(grads['decoder']) and size(grads['prior']) > 1e-3
  (_, _), moved = stepping.gradient(vae_update, params, ctx)
  assert set(moved) == {'encoder', 'decoder'} and size(moved['encoder']) > 1e-3


def test_the_encoder_hears_of_the_prior():
  """Its gradient is not that of a VAE with N(0, I)."""
  method = method_of()
  params, ctx = context(method)
  loss = lambda prior: stepping.gradient(method.updates()[0], {**params, 'prior': prior}, ctx)[1]['encoder']
  still = {**params['prior'], 'logit': jnp.full(3, -jnp.inf)}
  difference = jax.tree.map(jnp.subtract, loss(params['prior']), loss(still))
  assert size(difference) > 1e-2


def test_both_gradients_of_algorithm_one_are_those_of_one_loss():
  """With likelihood weights for both the two updates follow the bound itself."""
  method = method_of()
  params, ctx = context(method)
  vae_update, prior_update = method.updates()
  together = jax.grad(lambda p: vae_update.loss(p, ctx)[0])(params)
  for update in (vae_update, prior_update):
    for group, tree in stepping.gradient(update, params, ctx)[1].items():
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), tree, together[group])


def by_hand(method, params, ctx, key):
  """(u, eps, t, error) of a step at the times of a key, from the definitions."""
  trace, _ = method.infer(params, ctx.stats, IMAGES, ctx.shared['infer'], train=True)
  u = np.asarray(trace.z[0][0, 0], np.float64)  # a plain VAE: noise coordinates are the latents
  np.testing.assert_allclose(ctx.shared['u'], u, atol=1e-6)
  eps = np.asarray(jax.random.normal(ctx.shared['noise'], u.shape), np.float64)
  return trace, u, eps, np.asarray(jax.random.uniform(key, (len(u),)), np.float64)


def log_variance(t):
  return np.log(-np.expm1(-0.1 * t - 9.95 * t * t))


def time_of(log_s):
  b = -np.log(-np.expm1(log_s))
  return (-0.1 + np.sqrt(0.01 + 4 * 9.95 * b)) / (2 * 9.95)


def test_the_losses_by_hand():
  """Algorithm 3: the prior's times have uniform variance and weights g^2 / 2; the VAE's loss is the bound at those times."""
  method = method_of(weighting='re', sampling='re', beta=2.0, warmup_portion=0.0)
  params, ctx = context(method)
  trace, u, eps, rho = by_hand(method, params, ctx, ctx.shared['time'])
  low, high = np.exp(log_variance(np.array([0.01, 1.0])))
  s = rho * high + (1 - rho) * low
  t = time_of(np.log(s))
  z = np.sqrt(1 - s)[:, None] * u + np.sqrt(s)[:, None] * eps
  own = method.prior.residual(params['prior'], jnp.float32(z), jnp.float32(t)) + np.sqrt(s)[:, None] * z
  square = np.square(eps - own).sum(-1)
  loss, _ = method.prior_loss(params, ctx)
  np.testing.assert_allclose(loss, (0.5 * (high - low) / (1 - s) * square).mean(), rtol=2e-3)
  cross = 0.5 * (high - low) / (s * (1 - s)) * square + 1.5 * (math.log(2 * math.pi * math.e) + np.log(low))
  tilt = cross + stats.norm.logpdf(u).sum(-1)
  kl = np.asarray(trace.kl[0].sum((0, 1)))
  loss, aux = method.vae_loss(params, ctx)
  np.testing.assert_allclose(aux.metrics['tilt'], tilt.mean(), rtol=2e-3)
  np.testing.assert_allclose(loss, (2.0 * (kl + tilt) - trace.log_px[0]).mean(), rtol=1e-3)


def test_separate_times_have_likelihood_weights():
  """Algorithm 2: log-uniform variances for the VAE, whatever the prior has; the same noise."""
  method = method_of('separate', weighting='un', sampling='un')
  params, ctx = context(method)
  _, u, eps, rho = by_hand(method, params, ctx, ctx.shared['own'])
  low, high = log_variance(np.array([0.01, 1.0]))
  log_s = rho * high + (1 - rho) * low
  s, t = np.exp(log_s), time_of(log_s)
  z = np.sqrt(1 - s)[:, None] * u + np.sqrt(s)[:, None] * eps
  own = method.prior.residual(params['prior'], jnp.float32(z), jnp.float32(t)) + np.sqrt(s)[:, None] * z
  cross = 0.5 * (high - low) / (1 - s) * np.square(eps - own).sum(-1) + 1.5 * (math.log(2 * math.pi * math.e) + low)
  tilt = cross + stats.norm.logpdf(u).sum(-1)
  np.testing.assert_allclose(method.vae_loss(params, ctx)[1].metrics['tilt'], tilt.mean(), rtol=2e-3)


def test_the_weight_of_the_divergence_rises_at_first():
  method = method_of(beta_start=0.7, warmup_portion=0.1)
  found = [float(method.schedule(jnp.asarray(step))) for step in (0, 5, 10, 99)]
  np.testing.assert_allclose(found, [0.7, 0.85, 1.0, 1.0], rtol=1e-6)


def test_a_frozen_vae_has_one_update():
  method = method_of(joint=False, spectral=(1e-2, 1e-2))
  (update,) = method.updates()
  assert update.wrt == ('prior',) and 'spectral' not in method.init(KEY, {'image': IMAGES})['stats']


def test_the_reported_bound_is_that_of_the_flow():
  """`trace` has log p(u) of the probability flow in place of log N(u); at a = 0 nothing changes."""
  method = method_of()
  params, ctx = context(method)
  params = smooth(params)
  variables = {'params': params, 'stats': ctx.stats}
  trace = jax.jit(lambda v: method.trace(v, IMAGES, KEY, 2))(variables)
  u = trace.z[0][0]
  exact = method.prior.log_prob(params['prior'], u.reshape(-1, 3)).reshape(2, 6)
  np.testing.assert_allclose(trace.log_p[0][0], exact, atol=1e-3)
  assert float(jnp.abs(trace.log_p[0][0] - stats.norm.logpdf(u).sum(-1)).max()) > 0.05
  still = {**variables, 'params': {**params, 'prior': {**params['prior'], 'logit': jnp.full(3, -jnp.inf)}}}
  trace = method.trace(still, IMAGES, KEY, 2)
  np.testing.assert_allclose(trace.log_p[0][0], stats.norm.logpdf(trace.z[0][0]).sum(-1), atol=1e-4)
  found = method.metrics(still['params'], ctx)
  assert float(jnp.abs(found['nelbo'] - found['nelbo_normal'] - found['tilt']).max()) < 1e-4


def test_samples_come_from_the_prior():
  method = method_of()
  params, ctx = context(method)
  params = smooth(params)
  variables = {'params': params, 'stats': ctx.stats}
  drawn = jax.jit(lambda v: method.simulate(v, KEY, 5))(variables)
  key, _ = jax.random.split(KEY)
  np.testing.assert_allclose(drawn.z[0][0, 0], method.prior.sample(params['prior'], key, 5, 3, 'ode', 1.0), atol=2e-3)
  base = method.simulate(variables, KEY, 5, 'base')
  np.testing.assert_allclose(base.z[0][0, 0], jax.random.normal(key, (5, 3)), atol=1e-6)
  assert method.samplers == ('ode', 'ancestral', 'base')
  assert method.evaluations(variables, 'base') == 0 and method.evaluations(variables, 'ode') >= 20


@pytest.mark.slow
def test_a_prior_on_maps():
  """The U-Net sees the groups' maps side by side; log-densities by probes are those of the exact trace on average."""
  build = functools.partial(prior.build, map=(2, 4, 4, 1), channels=8, layers=1, tolerance=1e-3)
  density = build()
  params = shaken(density.init(KEY, 32), 0.05)
  u = jax.random.normal(KEY, (3, 32))
  maps = density._unpack(u)
  assert maps.shape == (3, 4, 4, 2)
  np.testing.assert_array_equal(maps[..., 1], u[:, 16:].reshape(3, 4, 4))  # the second group's map
  np.testing.assert_array_equal(density._pack(maps), u)
  exact = jax.jit(density.log_prob)(params, u[:1])
  estimates = jax.jit(build(probes=1).log_prob)(params, jnp.broadcast_to(u[:1], (512, 32)))
  assert abs(float(estimates.mean() - exact[0])) < 4 * float(estimates.std()) / math.sqrt(512) + 2e-3
  with pytest.raises(UserError, match='method.prior.map is'):
    density.init(KEY, 33)


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(times='both'), "method.times is 'both'"),
    (dict(spectral=(1.0,)), 'method.spectral is'),
    (dict(warmup_portion=2.0), 'method.warmup_portion is 2.0'),
    (dict(beta=0.0), 'method.beta is 0.0'),
    (dict(levels=-1), 'method.levels is -1'),
    (dict(joint=1), 'method.joint is 1'),
    (dict(codes='mean'), 'method.codes is for'),
  ],
)
def test_refusals_name_the_key(options, message):
  with pytest.raises(UserError, match=message):
    method_of(**options)


def test_a_prior_is_needed():
  with pytest.raises(UserError, match='method.prior is missing'):
    lsgm.build(NET, 1)
