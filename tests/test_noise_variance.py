"""Learned noise against closed forms: the best scale, probabilistic PCA, the balance with the KL, stability."""

import functools
import math
import os
import pathlib
import subprocess
import sys

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, stats

from latentgen import assembly, config as configs, losses, nets, optim, sections
from latentgen.distributions import Normal
from latentgen.errors import UserError
from latentgen.methods import vae as method
from latentgen.nets import vae
from latentgen.train import step as stepping
from latentgen.types import Context

KEY = jax.random.key(0)
LOG_2PI = math.log(2 * math.pi)


def images(x):
  """[n, d] -> [n, 1, d, 1]."""
  return jnp.asarray(x, jnp.float32)[:, None, :, None]


def linear(dims, latent=1, **options):
  floor = -12.0 if options.get('scale') == 'analytic' else None
  return vae.build((1, dims, 1), latent=latent, hidden=(), likelihood='normal', **{'log_scale_floor': floor, **options})


def initial(net, x):
  return net.init({'params': KEY, 'sample': KEY}, x[:1])


def blind(net, x, **replaced):
  """Parameters with which mean and posterior are those of nothing: f = 0, q = N(0, 1)."""
  return {**jax.tree.map(jnp.zeros_like, initial(net, x)['params']), **replaced}


def exact_terms(net, params, x):
  """E_q log p(x|z) and KL per image, [b] each. For a linear decoder with scale free of z: points with q's first two moments.

  The points are loc +- sqrt(latent) scale e_i, all of one weight.
  """
  loc, log_scale = net.apply({'params': params}, x, method=lambda module, x: module.encoder(x))
  q = Normal(loc, jnp.exp(log_scale))
  offsets = math.sqrt(net.latent) * jnp.concatenate([jnp.eye(net.latent), -jnp.eye(net.latent)])
  points = loc + q.scale * offsets[:, None]
  log_px = net.apply({'params': params}, points, method='decode').log_prob(x).mean(0)
  return log_px, q.kl(Normal(jnp.zeros_like(loc), jnp.ones_like(loc))).sum(-1)


def moments(x):
  """2 d points with the mean and the covariance of x [n, 1, d, 1], all that the likelihood of a linear model depends on."""
  rows = np.asarray(x, np.float64).reshape(len(x), -1)
  root = np.sqrt(rows.shape[1]) * np.linalg.cholesky(np.cov(rows.T, bias=True)).T
  return images(rows.mean(0) + np.concatenate([root, -root]))


@functools.cache
def ascent(net, steps=12_000):
  """Full-batch Adam on weight E log p(x|z) - KL: (parameters, x, weight) -> parameters."""
  optimiser = optax.adam(optax.cosine_decay_schedule(0.01, steps), b2=0.99)

  def run(params, x, weight):
    def loss(params):
      log_px, kl = exact_terms(net, params, x)
      return (kl - weight * log_px).mean()

    def step(carry, _):
      params, state = carry
      delta, state = optimiser.update(jax.grad(loss)(params), state)
      return (optax.apply_updates(params, delta), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), None, steps)[0][0]

  return jax.jit(run)


def fit(net, data, weight=1.0):
  """(parameters, log p term, KL) at the maximum; it is sought on `moments` of the data, the means are over all of them."""
  params = ascent(net)(initial(net, data)['params'], moments(data), weight)
  return params, *(float(t.mean()) for t in exact_terms(net, params, data))


def scale_of(net, params, stats=None):
  """The net's noise at z = 0, [d]."""
  variables = {'params': params, **({'batch_stats': stats} if stats else {})}
  return np.asarray(net.apply(variables, jnp.zeros((1, net.latent)), method='decode').base.scale, np.float64).reshape(-1)


# ---------------------------------------------------------------------------------------- the best scale


@pytest.mark.parametrize('options', [{}, {'log_scale': -2.0, 'log_scale_floor': -6.0, 'log_scale_ceiling': 2.0}])
def test_learned_variance_is_the_mean_square_error(options):
  x = images(np.random.default_rng(0).normal(0, 0.3, (200, 50)))
  mse = float(np.square(np.asarray(x, np.float64)).mean())
  net = linear(50, scale='learned', **options)
  params = blind(net, x)

  def loss(log_scale, miscounted=1.0):
    px = net.apply({'params': params | {'log_scale': log_scale}}, jnp.zeros((1, 1)), method='decode')
    log_det = jnp.log(px.base.scale).sum()
    nll = -px.log_prob(x).mean()
    return miscounted * (nll - log_det) + log_det

  def minimum(**kwargs):
    found = optimize.minimize_scalar(jax.jit(lambda v: loss(v, **kwargs)), bounds=(-5, 1), method='bounded').x
    # Single precision leaves the minimum of a value uncertain; one Newton step on the slope does not.
    at = found - float(jax.grad(loss)(found, **kwargs) / jax.hessian(loss)(found, **kwargs))
    return scale_of(net, params | {'log_scale': jnp.float32(at)})[0] ** 2, float(loss(at, **kwargs))

  variance, nll = minimum()
  np.testing.assert_allclose(variance, mse, rtol=1e-4)
  np.testing.assert_allclose(nll / 50, 0.5 * (math.log(mse) + 1 + LOG_2PI), rtol=1e-5)
  # Half the squared error once more, as in published code, is another optimum, which this test tells apart.
  np.testing.assert_allclose(minimum(miscounted=0.5)[0], mse / 2, rtol=1e-3)


def test_gradients_of_the_network_are_those_of_the_best_scale_stopped_or_not():
  """Learned at its optimum, analytic with its gradient, and the same number fixed."""
  x = images(np.random.default_rng(1).normal(0.5, 0.2, (16, 12)))
  nets_ = {name: vae.build((1, 12, 1), latent=3, hidden=(8,), likelihood='normal', scale=name, log_scale_floor=floor)
           for name, floor in (('learned', None), ('analytic', -12.0), ('image', None))}  # fmt: skip
  params = initial(nets_['analytic'], x)['params']
  run = dict(rngs={'sample': KEY}, method='infer', k=2, train=True)
  trace, _ = nets_['analytic'].apply({'params': params, 'batch_stats': {'mse': 1.0}}, x, mutable=['batch_stats'], **run)
  error = np.square(np.asarray(x - trace.px.mean, np.float64))
  sigma = math.sqrt(error.mean())
  np.testing.assert_allclose(trace.px.base.scale, sigma, rtol=1e-5)

  def gradient(net, x, extra=(), stats=None, mutable=False):
    def loss(p):
      variables = {'params': {**p, **dict(extra)}, **({'batch_stats': stats} if stats else {})}
      out = net.apply(variables, x, mutable=mutable, **run)
      trace = out[0] if mutable else out
      return (trace.kl[0].sum(0).mean(0) - trace.log_px.mean(0)).mean()

    return ravel_pytree(jax.grad(loss)(params))[0]

  fixed = gradient(vae.build((1, 12, 1), latent=3, hidden=(8,), likelihood='normal', scale=sigma), x)
  log_scale = jnp.float32(math.log(sigma))
  found = {
    'learned': gradient(nets_['learned'], x, {'log_scale': log_scale}),
    'analytic': gradient(nets_['analytic'], x, stats={'mse': jnp.float32(1.0)}, mutable=['batch_stats']),
    'image': gradient(nets_['image'], x, {'noise': {'kernel': jnp.zeros((3, 1)), 'bias': log_scale[None]}}),
  }
  for name, value in found.items():
    np.testing.assert_allclose(value, fixed, rtol=1e-5, atol=1e-5 * float(jnp.abs(fixed).max()), err_msg=name)


def test_best_scale_of_one_image_is_that_of_a_batch_of_one():
  x, loc = np.random.default_rng(2).normal(size=(2, 1, 1, 9, 1)).astype(np.float32)
  one = losses.optimal_scale(jnp.asarray(x), jnp.asarray(loc), per_example=True)
  np.testing.assert_allclose(one.reshape(()), np.sqrt(np.square(x - loc).mean()), rtol=1e-6)


def test_analytic_scale_is_of_the_batch_in_training_and_of_the_running_average_after():
  rng = np.random.default_rng(3)
  batches = [images(rng.normal(0.0, s, (32, 20))) for s in (0.2, 0.5, 0.3)]
  net = linear(20, scale='analytic', log_scale=math.log(0.7))
  variables = initial(net, batches[0])
  variables['params'] = blind(net, batches[0])
  np.testing.assert_allclose(variables['batch_stats']['mse'], 0.49, rtol=1e-6)
  average = 0.49
  for x in batches:
    mse = float(np.square(np.asarray(x, np.float64)).mean())
    trace, changed = net.apply(variables, x, train=True, rngs={'sample': KEY}, mutable=['batch_stats'], method='infer')
    average = 0.99 * average + 0.01 * mse
    np.testing.assert_allclose(trace.px.base.scale, math.sqrt(mse), rtol=1e-5)
    np.testing.assert_allclose(trace.log_px.mean(), -10 * (math.log(mse) + 1 + LOG_2PI), rtol=1e-4)
    np.testing.assert_allclose(changed['batch_stats']['mse'], average, rtol=1e-5)
    variables['batch_stats'] = changed['batch_stats']
  quiet = net.apply(variables, batches[0], rngs={'sample': KEY}, method='infer')
  drawn = net.apply(variables, 3, rngs={'sample': KEY}, method='simulate')
  for px in (quiet.px, drawn.px):
    np.testing.assert_allclose(px.base.scale, math.sqrt(average), rtol=1e-5)
  want = stats.norm(0, math.sqrt(average)).logpdf(np.asarray(batches[0])).sum((1, 2, 3))
  np.testing.assert_allclose(quiet.log_px[0], want, rtol=1e-4)


def test_analytic_statistics_belong_to_the_generative_model_and_pass_through_the_method():
  net = linear(4, scale='analytic')
  made = method.build(net, 10)
  x = images(np.random.default_rng(4).normal(size=(8, 4)))
  variables = made.init(KEY, {'image': x})
  assert set(variables['stats']) == {'decoder'} and nets.ungroup(variables['stats']) == {'mse': 1.0}
  ctx = Context({'image': x}, KEY, jnp.int32(0), variables['stats'])
  _, aux = made.loss(variables['params'], ctx)
  assert 0 < float(aux.stats['decoder']['mse']) != 1.0
  assert made.sample({**variables, 'stats': aux.stats}, KEY, 3).shape == (3, 1, 4, 1)


# ---------------------------------------------------------------------------------------- balance with the KL


def test_fixed_variance_is_beta():
  """gradient of -ELBO at sigma = gradient of [SSE / 2 + sigma^2 KL] / sigma^2, the unit-variance VAE with beta = sigma^2."""
  sigma = 0.3
  x = images(np.random.default_rng(5).normal(0.5, 0.2, (8, 6)))
  common = dict(latent=2, hidden=(5,), likelihood='normal')

  def gradient(scale, beta):
    made = method.build(vae.build((1, 6, 1), scale=scale, **common), 10, beta=beta)
    variables = made.init(KEY, {'image': x})
    ctx = Context({'image': x}, KEY, jnp.int32(0), variables['stats'])
    return ravel_pytree(jax.grad(lambda p: made.loss(p, ctx)[0])(variables['params']))[0]

  np.testing.assert_allclose(gradient(sigma, 1.0), gradient(1.0, sigma**2) / sigma**2, rtol=1e-4, atol=1e-4)
  assert float(jnp.abs(gradient(sigma, 1.0) - gradient(1.0, 1.0)).max()) > 1.0


@pytest.fixture(scope='module')
def factors():
  """20,000 vectors of 10 from three factors and noise of variance 0.25; eigenvalues of their covariance, descending."""
  rng = np.random.default_rng(6)
  w = np.linalg.qr(rng.normal(size=(10, 10)))[0][:, :3] * np.sqrt([12.0, 7.5, 3.4])
  x = rng.normal(size=(20_000, 3)) @ w.T + 0.5 * rng.normal(size=(20_000, 10)) + rng.normal(size=10)
  return images(x), np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]


def ppca(eigenvalues, latent):
  """(variance, singular values of the decoder, mean log-likelihood) of the maximum-likelihood model."""
  variance = eigenvalues[latent:].mean()
  log_det = np.log(eigenvalues[:latent]).sum() + (10 - latent) * math.log(variance)
  return variance, np.sqrt(eigenvalues[:latent] - variance), -0.5 * (10 * LOG_2PI + log_det + 10)


def surviving(net, params, x):
  """(how many units' posterior means vary by more than 1e-2, singular values of the decoder)."""
  loc, _ = net.apply({'params': params}, x, method=lambda module, x: module.encoder(x))
  values = np.linalg.svd(np.asarray(params['decoder']['head']['kernel'], np.float64), compute_uv=False)
  return int((np.var(np.asarray(loc), 0) > 1e-2).sum()), values


@pytest.mark.parametrize('latent', [1, 2, 3])
def test_linear_vae_with_learned_noise_is_probabilistic_pca(factors, latent):
  x, eigenvalues = factors
  variance, singular, log_likelihood = ppca(eigenvalues, latent)
  net = linear(10, latent, scale='learned')
  params, log_px, kl = fit(net, x)
  np.testing.assert_allclose(scale_of(net, params)[0] ** 2, variance, rtol=1e-3)
  np.testing.assert_allclose(log_px - kl, log_likelihood, atol=1e-3)
  survivors, values = surviving(net, params, x)
  assert survivors == latent
  np.testing.assert_allclose(values, singular, rtol=1e-3)
  # The bound that training samples is the one that was maximised here.
  trace = net.apply({'params': params}, x, rngs={'sample': KEY}, method='infer')
  bound = np.asarray(trace.log_px[0] - trace.kl[0][0, 0], np.float64)
  assert abs(bound.mean() - (log_px - kl)) < 4 * bound.std() / math.sqrt(len(bound))


def test_too_large_a_fixed_variance_collapses_what_it_drowns(factors):
  x, eigenvalues = factors
  wanted = np.sqrt(np.maximum(eigenvalues[:3] - 4.0, 0.0))
  assert (eigenvalues[:3] > 4).tolist() == [True, True, False]
  net = linear(10, 3, scale=2.0)
  params, _, kl = fit(net, x)
  survivors, values = surviving(net, params, x)
  assert survivors == 2
  np.testing.assert_allclose(values, wanted, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(kl, 0.5 * np.log(eigenvalues[:2] / 4.0).sum(), rtol=1e-3)


def test_scaling_the_data_scales_the_noise_and_shifts_the_bound(factors):
  x, a = factors[0], 3.0
  net = linear(10, 2, scale='learned')
  one, scaled = fit(net, x), fit(net, a * x)
  np.testing.assert_allclose(np.log(scale_of(net, scaled[0])[0] / scale_of(net, one[0])[0]), math.log(a), atol=0.01)
  np.testing.assert_allclose((scaled[1] - scaled[2]) - (one[1] - one[2]), -10 * math.log(a), atol=0.02)
  np.testing.assert_allclose(scaled[2], one[2], atol=0.02)
  # And exactly so along the orbit: with the input normalised the posterior is the same.
  moved = jax.tree.map(lambda v: v, one[0])
  moved['encoder']['head']['kernel'] = moved['encoder']['head']['kernel'] / a
  moved['decoder']['head'] = jax.tree.map(lambda v: a * v, moved['decoder']['head'])
  moved['log_scale'] = moved['log_scale'] + math.log(a)
  log_px, kl = exact_terms(net, moved, a * x)
  np.testing.assert_allclose(log_px.mean(), one[1] - 10 * math.log(a), rtol=1e-4)
  np.testing.assert_allclose(kl.mean(), one[2], rtol=1e-4)


def test_a_mean_over_pixels_in_place_of_the_sum_loses_the_latents(factors):
  x = factors[0]
  net = linear(10, 3, scale='learned')
  kl, lost = fit(net, x)[2], fit(net, x, weight=0.1)[2]
  assert kl > 5 * lost
  trace = net.apply(initial(net, x), x, rngs={'sample': KEY}, method='infer')
  mean, scale = np.asarray(trace.px.mean), 1.0
  np.testing.assert_allclose(trace.log_px, stats.norm(mean, scale).logpdf(np.asarray(x)).sum((-3, -2, -1)), rtol=1e-4)


# ---------------------------------------------------------------------------------------- noise that varies


def test_per_pixel_noise_is_recovered_and_the_global_one_is_its_mean():
  rng = np.random.default_rng(7)
  true = rng.permutation(np.linspace(0.05, 0.5, 40))
  x = images(rng.normal(size=(2000, 40)) * true + rng.uniform(size=40))
  found = {}
  for kind in ('pixel', 'learned'):
    net = linear(40, scale=kind, log_scale=-1.0)
    params = blind(net, x)
    free = {'bias': params['decoder']['head']['bias'], 'log_scale': params.get('log_scale', jnp.zeros(()))}

    def place(free, params=params):
      head = {'kernel': params['decoder']['head']['kernel'], 'bias': free['bias']}
      return {**params, 'decoder': {'head': head}, **({'log_scale': free['log_scale']} if 'log_scale' in params else {})}

    def loss(free, net=net, place=place):
      return -net.apply({'params': place(free)}, jnp.zeros((1, 1)), method='decode').log_prob(x).mean()

    optimiser = optax.adam(optax.cosine_decay_schedule(0.05, 400))

    def step(carry, _, loss=loss, optimiser=optimiser):
      free, state = carry
      delta, state = optimiser.update(jax.grad(loss)(free), state)
      return (optax.apply_updates(free, delta), state), None

    (free, _), _ = jax.jit(lambda c, step=step: jax.lax.scan(step, c, None, 400))((free, optimiser.init(free)))
    found[kind] = scale_of(net, place(free))
  assert stats.spearmanr(found['pixel'], true).statistic > 0.95
  np.testing.assert_allclose(found['pixel'], true, rtol=0.1)
  np.testing.assert_allclose(found['learned'][0] ** 2, np.square(true).mean(), rtol=0.03)


@pytest.mark.parametrize('scale', ['learned', 'image', 'pixel'])
def test_learned_scales_start_where_they_are_told_to(scale):
  x = images(np.zeros((2, 6)))
  net = linear(6, scale=scale, log_scale=math.log(0.5), bounded=True)
  px = net.apply(initial(net, x), jnp.zeros((3, 1)), method='decode')
  np.testing.assert_allclose(px.base.scale, 0.5, rtol=1e-5)
  np.testing.assert_allclose(px.mean, 0.5)  # sigmoid(0)


@pytest.mark.parametrize('low, high', [(-6.0, None), (None, 1.0), (-2.0, 1.0)])
def test_soft_clip_keeps_order_and_bounds(low, high):
  x = jnp.linspace(-20.0, 20.0, 401)
  y = np.asarray(vae.soft_clip(x, low, high), np.float64)
  assert (np.diff(y) >= 0).all() and (np.diff(y)[195:205] > 0).all()
  if low is not None:
    np.testing.assert_allclose(y[0], low, atol=0.06)  # the ceiling moves the floor a little
  if high is not None:
    np.testing.assert_allclose(y[-1], high, atol=1e-4)
  if low is None:
    np.testing.assert_allclose(y[:100], x[:100], atol=1e-3)


@pytest.mark.parametrize('apart', [0.5, 2.0, 4.0])
def test_soft_clip_falls_below_close_bounds_by_so_much(apart):
  found = float(vae.soft_clip(jnp.float32(-60.0), -3.0, -3.0 + apart))
  np.testing.assert_allclose(-3.0 - found, np.log1p(np.exp(-apart)), rtol=1e-4)


# ---------------------------------------------------------------------------------------- stability


def training(net, x, steps, rates=(), rate=5e-3):
  """The loss and its slope in the log-scale, [steps] each, under the method's own loss."""
  made = method.build(net, steps)
  variables = made.init(KEY, {'image': x})
  transform = optim.build('', steps, learning_rate=rate, final_learning_rate=1e-5, rates=rates)

  def step(carry, i):
    params, state = carry
    ctx = Context({'image': x}, jax.random.fold_in(KEY, i), i, variables['stats'])
    (loss, _), grads = jax.value_and_grad(made.loss, has_aux=True)(params, ctx)
    delta, state = transform.update(grads, state, params)
    row = loss, grads['decoder']['log_scale']
    return (optax.apply_updates(params, delta), state), row

  carry = variables['params'], transform.init(variables['params'])
  return jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(carry)[1]


def test_constant_data_stay_finite_above_a_floor():
  x = jnp.full((16, 1, 6, 1), 0.4)
  net = vae.build((1, 6, 1), latent=1, hidden=(4,), likelihood='normal', scale='learned')
  loss, slope = training(net, x, 1000, (('log_scale', 20.0),))
  assert np.isfinite(loss).all() and np.isfinite(slope).all()
  assert abs(float(slope[0])) > 1 and float(jnp.abs(slope[-50:]).max()) < 0.1
  assert float(loss[-1]) > 6 * (-6.01 + 0.5 * LOG_2PI)


def test_without_a_floor_the_density_of_constant_data_has_no_bound():
  """What the floor is for: with f exact, the loss falls by D for every unit of log-scale."""
  x = jnp.zeros((4, 1, 6, 1))
  loss = {}
  for floor in (None, -6.0):
    net = linear(6, scale='learned', log_scale_floor=floor)
    at = lambda v, net=net: -float(
      net.apply({'params': blind(net, x, log_scale=jnp.float32(v))}, jnp.zeros((1, 1)), method='decode').log_prob(x).mean()
    )
    loss[floor] = [at(v) for v in (-10.0, -20.0, -40.0)]
  np.testing.assert_allclose(np.diff(loss[None]), [-60.0, -120.0], rtol=1e-4)
  np.testing.assert_allclose(loss[-6.0], 6 * (-6.0 + 0.5 * LOG_2PI), atol=0.15)


def test_analytic_scale_has_a_floor_and_a_ceiling_without_a_singular_gradient():
  x = jnp.full((4, 1, 6, 1), 0.0)
  for value, options, want in ((0.0, {'log_scale_floor': -6.0}, -6.0), (9.0, {'log_scale_ceiling': 1.0}, 1.0)):
    net = linear(6, scale='analytic', **options)
    params = blind(net, x)

    def loss(params, net=net, value=value):
      stats_ = {'mse': jnp.float32(1.0)}
      trace, _ = net.apply(
        {'params': params, 'batch_stats': stats_}, x + value, train=True, rngs={'sample': KEY}, mutable=['batch_stats'],
        method='infer',
      )  # fmt: skip
      return -trace.log_px.mean(), trace.px.base.scale

    (_, scale), grads = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(np.log(scale), want, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_only_a_floor_keeps_the_gradient_of_an_exact_fit():
  """As the docstring says of the floor."""
  x = jnp.ones((2, 3))
  loss = lambda loc, floor: losses.gaussian_nll(x, loc, losses.optimal_scale(x, loc, floor=floor)).sum()
  assert np.isfinite(jax.grad(loss)(x, 1e-3)).all() and np.isnan(jax.grad(loss)(x, 0.0)).any()


# ---------------------------------------------------------------------------------------- a rate of its own


def test_rates_multiply_the_steps_of_what_they_match():
  params = {'decoder': {'log_scale': jnp.zeros(()), 'head': {'bias': jnp.zeros(2)}}, 'encoder': {'bias': jnp.zeros(2)}}
  grads = jax.tree.map(lambda v: jnp.full_like(v, 3.0), params)
  transform = optim.build('x', 10, 'adam', 1e-2, rates=(('nothing', 7.0), ('log_scale$', 5.0), ('^decoder/', 2.0)))
  state = transform.init(params)
  for _ in range(3):  # Adam's step of a constant gradient is the rate
    delta, state = transform.update(grads, state, params)
    got = delta['decoder']['log_scale'], delta['decoder']['head']['bias'], delta['encoder']['bias']
    for d, factor in zip(got, (5.0, 2.0, 1.0), strict=True):
      np.testing.assert_allclose(d, -1e-2 * factor, rtol=1e-4)


@pytest.mark.parametrize('rates, message', [
  ((('log_scale', 0.0),), "x.rates holds .*'log_scale', 0.0"),
  (('log_scale', 2.0), "x.rates holds 'log_scale'"),
  ((('(', 2.0),), 'no regular expression'),
])  # fmt: skip
def test_rates_that_cannot_be(rates, message):
  with pytest.raises(UserError, match=message):
    optim.build('x', 10, rates=rates)


@pytest.mark.parametrize('options, message', [
  ({'scale': 'analytical'}, "model.scale is 'analytical'"),
  ({'scale': 0.0}, 'model.scale is 0.0'),
  ({'log_scale': None}, 'model.log_scale is None, need a number'),
  ({'log_scale': math.nan}, 'model.log_scale is nan'),
  ({'log_scale_floor': 'low'}, "model.log_scale_floor is 'low', need a number or None"),
  ({'log_scale_floor': 1.0, 'log_scale_ceiling': 1.0}, 'model.log_scale_floor is 1.0'),
  ({'scale': 'analytic', 'log_scale_floor': None}, "^model.log_scale_floor is None, need a number.*model.scale = 'analytic'"),
  ({'bounded': 1}, 'model.bounded is 1'),
])  # fmt: skip
def test_mistakes_name_the_key(options, message):
  with pytest.raises(UserError, match=message) as error:
    vae.build((4, 4, 1), likelihood='normal', **options)
  assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------------------- data, devices


def test_dequantised_digits_leave_no_density_to_gain_below_a_level():
  """Pixels that are always 0 spread as U[0, 1/16), far above the floor; without the noise their best scale is none."""
  root = pathlib.Path(__file__).parents[1]
  _, config = configs.load(f'{root}/experiments/learned_variance.py')
  splits, preprocess, _ = assembly.build_data(sections.plain(config.data), 0)
  raw = splits['train'].take(slice(0, None))
  x = np.asarray(preprocess(KEY, raw, True)['image'], np.float64)
  constant = raw['image'].max(0) == 0
  assert constant.sum() >= 1 and raw['image'].max() == 255
  np.testing.assert_allclose(x[:, constant].std(0), 1 / 16 / math.sqrt(12), rtol=0.1)
  assert math.log(x.std(0).min()) > vae.VAE.log_scale_floor + 1.5
  # Even the normal of every pixel's own moments stays below the density of a known grey level, log 16 a pixel.
  assert stats.norm(x.mean(0), x.std(0)).logpdf(x).mean() < math.log(16)


def digits(scale, steps=2000):
  """The experiment's digits with this scale: (test bound, training mean square error, variance) after so many steps."""
  root = pathlib.Path(__file__).parents[1]
  _, config = configs.load(f'{root}/experiments/learned_variance.py:beta')
  configs.override(config, {'model.scale': scale, 'stages.vae.steps': steps})
  plain = sections.plain(config)
  splits, preprocess, size = assembly.build_data(plain['data'], 0)
  (stage,) = assembly.build_recipe(plain, (8, 8, 1))
  raw = {name: {'image': jnp.asarray(splits[name].take(slice(0, None))['image'])} for name in ('train', 'test')}
  step = stepping.make_step(stage, preprocess)[0]
  take = lambda key: {'image': jax.random.choice(key, raw['train']['image'], (size,), replace=False)}
  state = stepping.init_state(stage, preprocess, KEY, take(KEY))

  def run(carry, i):
    return step(*carry, KEY, take(jax.random.fold_in(KEY, i)))[:2], None

  (state, health), _ = jax.jit(lambda c: jax.lax.scan(run, c, jnp.arange(steps)))((state, stepping.healthy()))
  assert int(health['step']) == -1
  variables = stepping.evaluation_variables(state)
  images_ = {name: preprocess(KEY, batch, False)['image'] for name, batch in raw.items()}
  train, test = (stage.method.trace(variables, images_[name], KEY, 4) for name in ('train', 'test'))
  mse = float(jnp.square(images_['train'] - train.px.base.loc).mean())
  return float((test.log_px - test.kl[0][0]).mean()), mse, float(test.px.base.scale.reshape(-1)[0]) ** 2


@pytest.mark.slow
def test_learned_noise_does_as_well_as_the_best_fixed_one_on_digits():
  bound, mse, variance = digits('learned')
  np.testing.assert_allclose(variance, mse, rtol=0.05)
  fixed = {v: digits(math.sqrt(v))[0] for v in (1.0, 0.1, 0.03, 0.01)}
  assert bound >= max(fixed.values()) - 1.0
  assert fixed[1.0] < bound - 50 and fixed[0.1] < bound - 10  # the choice matters


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from latentgen.nets import vae
assert jax.device_count() == 2
x = jnp.concatenate([jnp.full((4, 1, 6, 1), 0.1), jnp.full((4, 1, 6, 1), 0.7)])
x = jax.device_put(x, NamedSharding(jax.make_mesh((2,), ('data',)), P('data')))
net = vae.build((1, 6, 1), latent=1, hidden=(), likelihood='normal', scale='analytic')
params = jax.tree.map(jnp.zeros_like, net.init({'params': jax.random.key(0), 'sample': jax.random.key(0)}, x)['params'])
run = lambda x: net.apply({'params': params, 'batch_stats': {'mse': jnp.float32(1)}}, x, train=True, method='infer',
                          mutable=['batch_stats'], rngs={'sample': jax.random.key(0)})
trace, changed = jax.jit(run)(x)
np.testing.assert_allclose(trace.px.base.scale, (0.5 * (0.01 + 0.49)) ** 0.5, rtol=1e-5)
np.testing.assert_allclose(changed['batch_stats']['mse'], 0.99 + 0.01 * 0.25, rtol=1e-5)
"""


@pytest.mark.slow
def test_analytic_scale_is_of_the_whole_batch_where_it_is_split_over_devices():
  path = str(pathlib.Path(__file__).parents[1] / 'src')
  env = {**os.environ, 'PYTHONPATH': path, 'XLA_FLAGS': os.environ['XLA_FLAGS'] + ' --xla_force_host_platform_device_count=2'}
  done = subprocess.run([sys.executable, '-c', SHARDED], capture_output=True, text=True, timeout=200, env=env)
  assert done.returncode == 0, done.stderr[-2000:]
