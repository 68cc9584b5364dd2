"""Densities over vectors against closed forms, quadrature and scikit-learn; and as priors on the codes of linear models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from sklearn import datasets, mixture, neighbors

from latentgen.errors import UserError
from latentgen.evaluate import base as evaluation
from latentgen.methods import autoencoder, density, whitening
from latentgen.nets import vae as nets
from latentgen.priors import flow, gmm, kde, normal, vae

KEY = jax.random.key(0)
FLOWS = {
  'coupling': dict(layers=2, width=16),
  'affine coupling': dict(transformer='affine', layers=2, width=16),
  'autoregressive': dict(kind='autoregressive', layers=2, width=16),
  'affine autoregressive': dict(kind='autoregressive', transformer='affine', layers=2, width=16),
  'linear': dict(layers=0),
}


def shaken(params, seed=1, size=0.3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape) * size, jnp.float32), params)


def fitted(prior, u, steps, rate=1e-2, batch=None, seed=0):
  """Parameters after `steps` of Adam on vectors u [n, d], with all of them or random batches a step."""
  transform = optax.adam(optax.cosine_decay_schedule(rate, steps))
  params = prior.init(KEY, u.shape[1])
  u = jnp.asarray(u, jnp.float32)

  @jax.jit
  def run(params, key):
    def step(carry, key):
      params, state = carry
      pick, noise = jax.random.split(key)
      rows = u if batch is None else u[jax.random.randint(pick, (batch,), 0, len(u))]
      grads = jax.grad(lambda p: prior.loss(p, noise, rows).mean())(params)
      delta, state = transform.update(grads, state, params)
      return (optax.apply_updates(params, delta), state), None

    return jax.lax.scan(step, (params, transform.init(params)), jax.random.split(key, steps))[0][0]

  return run(params, jax.random.key(seed))


# ---------------------------------------------------------------------------------------- flows


@pytest.mark.parametrize('name, d', [*((name, 5) for name in FLOWS), ('coupling', 1), ('coupling', 2), ('autoregressive', 1)])
def test_flow_inverts_and_knows_its_jacobian(name, d):
  prior = flow.build(**FLOWS[name])
  params = shaken(prior.init(KEY, d), size=0.05)
  v = 2 * jax.random.normal(jax.random.key(1), (40, d))

  @jax.jit
  def run(params, v):
    base, log_det = prior.inverse(params, v)
    jacobian = jax.vmap(jax.jacfwd(lambda one: prior.inverse(params, one[None])[0][0]))(v)
    return base, log_det, prior.transform(params, base), jacobian, prior.log_prob(params, v)

  base, log_det, back, jacobian, log_prob = run(params, v)
  np.testing.assert_allclose(back, v, atol=1e-5, rtol=1e-5)
  np.testing.assert_allclose(log_det, np.linalg.slogdet(np.asarray(jacobian, np.float64))[1], atol=1e-4)
  want = stats.norm.logpdf(np.asarray(base, np.float64)).sum(1) + log_det
  np.testing.assert_allclose(log_prob, want, rtol=1e-5, atol=1e-4)
  assert float(jnp.abs(base - v).max()) > 0.1 and float(jnp.abs(log_det).min()) > 0  # it does something


@pytest.mark.parametrize('name', FLOWS)
def test_flow_integrates_to_one(name):
  prior = flow.build(**FLOWS[name])
  params = shaken(prior.init(KEY, 2), size=0.1)
  side = jnp.linspace(-12, 12, 401)
  grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
  mass = jnp.exp(jax.jit(prior.log_prob)(params, grid)).sum() * (side[1] - side[0]) ** 2
  np.testing.assert_allclose(mass, 1.0, atol=1e-2)


@pytest.mark.parametrize('name', ['coupling', 'autoregressive', 'linear'])
def test_flow_samples_follow_its_density(name):
  """Means of test functions of samples, against quadrature of the density."""
  prior = flow.build(**FLOWS[name])
  params = shaken(prior.init(KEY, 2), size=0.1)
  side = jnp.linspace(-12, 12, 401)
  grid = np.asarray(jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2), np.float64)
  weight = np.exp(np.asarray(jax.jit(prior.log_prob)(params, jnp.asarray(grid)), np.float64))
  drawn = np.asarray(jax.jit(lambda p: prior.sample(p, KEY, 20_000, 2, 'flow', 1.0))(params), np.float64)
  for function in (np.sin, np.cos, np.tanh):
    for direction in ([1, 0], [0, 1], [1, -1]):
      value, want = function(drawn @ direction), weight @ function(grid @ direction) / weight.sum()
      assert abs(value.mean() - want) < 4 * value.std() / np.sqrt(len(drawn))
  cold = prior.sample(params, KEY, 5, 2, 'flow', 0.0)
  np.testing.assert_allclose(cold, jnp.broadcast_to(prior.transform(params, jnp.zeros((1, 2))), (5, 2)), atol=1e-6)


def test_flow_is_a_dict_of_arrays_and_the_rest_follows_from_the_options():
  prior = flow.build(layers=2, width=8)
  params = prior.init(jax.random.key(1), 6)
  assert all(isinstance(name, str) and leaf.dtype == jnp.float32 for name, leaf in params.items())
  v = jax.random.normal(KEY, (3, 6))
  before = prior.log_prob(params, v)
  flow._masks.cache_clear()
  np.testing.assert_array_equal(flow.build(layers=2, width=8).log_prob(params, v), before)


@pytest.mark.parametrize('name, d, passes', [
  ('coupling', 5, 2), ('affine coupling', 2, 2), ('autoregressive', 5, 5), ('affine autoregressive', 1, 1), ('linear', 5, 0),
])  # fmt: skip
def test_a_sample_takes_as_many_passes_as_it_says(name, d, passes, monkeypatch):
  """Counted where the loops run in Python."""
  prior, calls, network = flow.build(**FLOWS[name]), [], flow.Flow._network
  params = prior.init(KEY, d)
  monkeypatch.setattr(flow.Flow, '_network', lambda *args: (calls.append(1), network(*args))[1])
  with jax.disable_jit():
    prior.sample(params, KEY, 3, d, 'flow', 1.0)
  assert prior.evaluations(params, d, 'flow') == passes and len(calls) == passes * prior.layers


def linear_gaussian(n=4000):
  """(W [20, 3], scales of z, x [n, 20]) of x = W z + 0.05 noise with W of orthonormal columns."""
  rng = np.random.default_rng(0)
  w = np.linalg.qr(rng.normal(size=(20, 3)))[0]
  scale = np.sqrt([9.0, 1.0, 0.1])
  return w, scale, rng.normal(size=(n, 3)) * scale @ w.T + 0.05 * rng.normal(size=(n, 20))


def linear_net(w, noise=0.05):
  """A VAE whose code's mean is W^T x, deviation `noise`, and whose image is W z; its variables."""
  net = nets.build((1, len(w), 1), latent=w.shape[1], hidden=(), likelihood='normal', scale=noise)
  d = w.shape[1]
  head = {'kernel': np.hstack([w, np.zeros_like(w)]), 'bias': np.hstack([np.zeros(d), np.full(d, np.log(noise))])}
  tail = {'kernel': w.T, 'bias': np.zeros(len(w))}
  params = {'encoder': {'encoder': {'head': head}}, 'decoder': {'decoder': {'head': tail}}}
  return net, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def with_prior(prior, w, fit=None, whiten=None, codes='mean'):
  """(LatentDensity on the linear model, its variables)."""
  net, params = linear_net(w)
  method = density.build(net, 0, prior=prior, codes=codes, whiten=whiten is not None)
  variables = method.init(KEY, {'image': jnp.zeros((2, 1, len(w), 1))})
  wanted = jax.tree.map(jnp.shape, variables['params'])
  params |= {'prior': fit if fit is not None else variables['params']['prior']}
  if whiten is not None:
    params['whitening'] = {k: jnp.asarray(v, jnp.float32) for k, v in whiten.items()}
  assert jax.tree.map(jnp.shape, params) == wanted
  return method, {'params': params, 'stats': {}}


def test_linear_flow_on_linear_codes_is_the_gaussian_of_the_principal_components():
  w, scale, x = linear_gaussian()
  z = x @ w
  prior = flow.build(layers=0)
  params = fitted(prior, z, 3000, 2e-2)
  got = prior.log_prob(params, jnp.asarray(z[:200], jnp.float32))
  want = stats.multivariate_normal(z.mean(0), np.cov(z.T, bias=True)).logpdf(z[:200])
  np.testing.assert_allclose(got, want, atol=1e-3)
  method, variables = with_prior(prior, w, params)
  drawn = np.asarray(method.sample(variables, KEY, 20_000))[:, 0, :, 0]
  covariance = w * scale**2 @ w.T
  assert np.linalg.norm(np.cov(drawn.T) - covariance) < 0.05 * np.linalg.norm(covariance)


@functools.cache
def moons(n=4000):
  """(train [n, 2], held out [1000, 2]) of two moons with noise 0.1, standardised by constants."""
  points, _ = datasets.make_moons(n + 1000, noise=0.1, random_state=0)
  points = (points - [0.5, 0.25]) / [0.87, 0.5]
  return points[:n], points[n:]


@pytest.mark.slow
def test_spline_flow_on_two_moons_is_as_good_as_kernels():
  train, held = moons()
  prior = flow.build(layers=6, width=64)
  params = fitted(prior, train, 4000, 3e-3, 256)
  nll = -float(jax.jit(prior.log_prob)(params, jnp.asarray(held, jnp.float32)).mean())
  kernels = kde.build()
  oracle = -float(kernels.log_prob(kernels.fit(KEY, train), jnp.asarray(held, jnp.float32)).mean())
  assert nll < oracle + 0.05
  # Embedded in ten dimensions, generated points cannot be told from held-out ones by their energy distance.
  rng = np.random.default_rng(0)
  method, variables = with_prior(prior, rng.normal(size=(10, 2)), params)
  x = np.asarray(method.sample(variables, KEY, 500))[:, 0, :, 0]
  y = held[:500] @ np.asarray(variables['params']['decoder']['decoder']['head']['kernel'])
  both = np.concatenate([x, y])
  distances = np.linalg.norm(both[:, None] - both, axis=-1)

  def energy(first):
    a, b = distances[np.ix_(first, first)].mean(), distances[np.ix_(~first, ~first)].mean()
    return 2 * distances[np.ix_(first, ~first)].mean() - a - b

  label = np.arange(1000) < 500
  null = [energy(rng.permutation(label)) for _ in range(200)]
  assert energy(label) < np.quantile(null, 0.95)


def test_heavy_tails_leave_the_flow_finite():
  """Log-normal codes, some of which lie far outside the splines' interval."""
  u = np.random.default_rng(0).lognormal(sigma=1.5, size=(2000, 3))
  assert u.max() > 60
  prior = flow.build(layers=2, width=16)
  params = fitted(prior, u, 300, 1e-2, 128)
  before = prior.log_prob(prior.init(KEY, 3), jnp.asarray(u, jnp.float32)).mean()
  after = prior.log_prob(params, jnp.asarray(u, jnp.float32))
  assert np.isfinite(after).all() and after.mean() > before + 1
  assert np.isfinite(prior.sample(params, KEY, 1000, 3, 'flow', 1.0)).all()


# ---------------------------------------------------------------------------------------- mixtures and kernels


@pytest.mark.parametrize('covariance', ['full', 'diag'])
def test_fitted_mixture_is_that_of_scikit_learn(covariance):
  train, held = moons()
  prior = gmm.build(components=6, covariance=covariance)
  params = prior.fit(KEY, train)
  seed = int(jax.random.randint(KEY, (), 0, 2**31 - 1))
  want = mixture.GaussianMixture(6, covariance_type=covariance, max_iter=1000, random_state=seed).fit(train)
  np.testing.assert_allclose(prior.log_prob(params, jnp.asarray(held)), want.score_samples(held), atol=1e-3)
  drawn = np.asarray(prior.sample(params, KEY, 20_000, 2, 'mixture', 1.0))
  np.testing.assert_allclose(drawn.mean(0), train.mean(0), atol=4 * train.std() / np.sqrt(20_000))
  np.testing.assert_allclose(np.cov(drawn.T), np.cov(train.T), atol=0.04)
  shapes = jax.tree.map(jnp.shape, prior.init(KEY, 2))
  assert shapes == jax.tree.map(jnp.shape, params)
  cold = prior.sample(params, KEY, 50, 2, 'mixture', 0.0)
  assert np.abs(np.asarray(cold)[:, None] - want.means_).max(-1).min(1).max() < 1e-5


def test_kernel_density_is_that_of_scikit_learn():
  train, held = moons()
  for n, points in ((300, 300), (300, 1500), (4000, 700)):  # all places filled, some left, more examples than places
    prior = kde.build(points=points)
    params = prior.fit(KEY, train[:n])
    used = np.asarray(params['weights']) > 0
    assert used.sum() == min(n, points) and np.isclose(params['weights'].sum(), 1)
    h = float(params['bandwidth'])
    want = neighbors.KernelDensity(bandwidth=h).fit(np.asarray(params['points'])[used]).score_samples(held)
    np.testing.assert_allclose(jax.jit(prior.log_prob)(params, jnp.asarray(held, jnp.float32)), want, atol=2e-3)
    gradient = jax.grad(lambda u, p=prior, q=params: p.log_prob(q, u).sum())(jnp.asarray(held[:20], jnp.float32))
    assert np.isfinite(gradient).all()
    assert jax.tree.map(jnp.shape, prior.init(KEY, 2)) == jax.tree.map(jnp.shape, params)


def test_bandwidth_maximises_what_others_say_of_each():
  u = moons()[0][:150]
  naive = lambda h: np.mean([
    neighbors.KernelDensity(bandwidth=h).fit(np.delete(u, i, 0)).score_samples(u[i : i + 1])[0] for i in range(len(u))
  ])  # fmt: skip
  best = kde.best_bandwidth(u)
  np.testing.assert_allclose(kde.leave_one_out(u, best), naive(best), rtol=1e-9)
  assert all(naive(best) > naive(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_kernel_samples_are_examples_and_noise():
  u = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
  prior = kde.build(points=8, bandwidth=0.5)
  params = prior.fit(KEY, u)
  drawn = np.asarray(prior.sample(params, KEY, 9000, 2, 'kernel', 1.0))
  distance = np.linalg.norm(drawn[:, None] - u, axis=-1)
  np.testing.assert_allclose(np.bincount(distance.argmin(1)) / 9000, 1 / 3, atol=0.02)
  np.testing.assert_allclose((distance.min(1) ** 2).mean(), 2 * 0.25, rtol=0.05)


# ---------------------------------------------------------------------------------------- a VAE on vectors


def test_bound_of_the_vector_vae_is_the_density_at_the_exact_posterior_and_below_it_elsewhere():
  """u = A^T w + b + s e with orthogonal rows of A: the posterior has independent coordinates."""
  prior = vae.build(latent=2, depth=0)
  a, b, s = np.array([[1.0, 2.0, 2.0], [0.4, 0.2, -0.4]]), np.array([0.3, -1.0, 0.5]), 0.6
  precision = 1 + (a**2).sum(1) / s**2
  unclip = lambda y: vae.FLOOR + np.log(np.expm1(y - vae.FLOOR))
  mean = a.T / s**2 / precision
  params = {
    'decode': {'Dense_0': {'kernel': a, 'bias': b}},
    'encode': {'Dense_0': {
      'kernel': np.hstack([mean, np.zeros((3, 2))]), 'bias': np.hstack([-b @ mean, unclip(-0.5 * np.log(precision))]),
    }},
    'log_scale': unclip(np.log(s)),
  }  # fmt: skip
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, prior.init(KEY, 3))
  u = np.random.default_rng(0).normal(size=(6, 3))
  exact = stats.multivariate_normal(b, a.T @ a + s**2 * np.eye(3))
  bound = jax.jit(prior.bound, static_argnums=3)
  for k in (1, 7):
    np.testing.assert_allclose(bound(params, KEY, jnp.asarray(u, jnp.float32), k), exact.logpdf(u), atol=1e-4)
  loss = jax.jit(jax.vmap(prior.loss, (None, 0, None)))
  estimate = lambda p: np.asarray(loss(p, jax.random.split(KEY, 2000), jnp.asarray(u, jnp.float32)))
  losses = estimate(params)
  assert (np.abs(losses.mean(0) + exact.logpdf(u)) < 4 * losses.std(0) / np.sqrt(2000)).all()
  params['encode']['Dense_0']['bias'] += 0.5
  losses = estimate(params)
  assert (losses.mean(0) > -exact.logpdf(u) + 4 * losses.std(0) / np.sqrt(2000)).all()
  drawn = np.asarray(prior.sample(params, KEY, 40_000, 3, 'vae', 1.0))
  np.testing.assert_allclose(np.cov(drawn.T), exact.cov, atol=0.03 * np.trace(exact.cov))
  np.testing.assert_allclose(drawn.mean(0), b, atol=0.05)


def test_vector_vae_learns():
  train, held = moons()
  prior = vae.build(width=64)
  params = fitted(prior, train, 1500, 3e-3, 256)
  bound = prior.bound(params, KEY, jnp.asarray(held, jnp.float32), 100).mean()
  gaussian = stats.multivariate_normal(train.mean(0), np.cov(train.T)).logpdf(held).mean()
  assert bound > gaussian + 0.3


# ---------------------------------------------------------------------------------------- priors on codes


def test_codes_of_the_mean_decode_to_the_image_of_the_mean():
  w, _, x = linear_gaussian(8)
  method, variables = with_prior(normal.build(), w)
  image = jnp.asarray(x, jnp.float32).reshape(8, 1, 20, 1)
  trace = jax.jit(lambda v, x: method.trace(v, x, KEY, 3))(variables, image)
  projected = x @ w @ w.T
  assert trace.px.mean.shape == (3, 8, 1, 20, 1) and trace.log_px.shape == (3, 8) and trace.log_q == ()
  np.testing.assert_allclose(trace.px.mean[:, :, 0, :, 0], np.broadcast_to(projected, (3, 8, 20)), atol=1e-5)
  want = stats.norm(projected, 0.05).logpdf(x).sum(1)
  np.testing.assert_allclose(trace.log_px, np.broadcast_to(want, (3, 8)), rtol=1e-4, atol=1e-2)
  np.testing.assert_allclose(trace.eps[0][0, 0], x @ w, atol=1e-5)


def test_prior_of_codes_in_the_trace_and_the_jacobian_of_whitening():
  w, _, x = linear_gaussian(16)
  rng = np.random.default_rng(3)
  loc, scale, mean, deviation = rng.normal(size=3), np.array([2.0, 0.5, 0.1]), rng.normal(size=3), np.array([1.0, 0.7, 1.3])
  fit = {'loc': jnp.asarray(mean, jnp.float32), 'scale': jnp.asarray(deviation, jnp.float32)}
  image = jnp.asarray(x, jnp.float32).reshape(16, 1, 20, 1)
  for whiten, centre, spread in (
    (None, mean, deviation), ({'loc': loc, 'scale': scale}, loc + scale * mean, scale * deviation),
  ):  # fmt: skip
    method, variables = with_prior(normal.build(), w, fit, whiten, codes='sample')
    assert method.density
    trace = jax.jit(lambda v, x, m=method: m.trace(v, x, KEY, 2))(variables, image)
    z = np.asarray(trace.z[0][0], np.float64)
    np.testing.assert_allclose(trace.log_p[0][0], stats.norm(centre, spread).logpdf(z).sum(-1), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(trace.log_q[0][0], stats.norm(x @ w, 0.05).logpdf(z).sum(-1), rtol=1e-4, atol=1e-2)
    drawn = np.asarray(method.simulate(variables, KEY, 20_000).z[0][0, 0])
    np.testing.assert_allclose(drawn.mean(0), centre, atol=4 * spread.max() / np.sqrt(20_000))
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.03)


def batches_of(x, size):
  image = jnp.asarray(x, jnp.float32).reshape(len(x), 1, -1, 1)
  return [{'image': image[i : i + size]} for i in range(0, len(x), size)]


def test_fits_in_closed_form_see_every_code_once_and_in_order():
  w, _, x = linear_gaussian(300)
  net, params = linear_net(w)
  white = whitening.build(net, 0)
  found = white.fit({'params': params, 'stats': {}}, batches_of(x, 128), KEY)['params']['whitening']
  z = x @ w
  np.testing.assert_allclose(found['loc'], z.mean(0), atol=1e-5)
  np.testing.assert_allclose(found['scale'], z.std(0), rtol=1e-5)
  method, variables = with_prior(gmm.build(components=2), w, whiten=found)
  codes = density.all_codes(method, variables, batches_of(x, 128), KEY)  # the last batch is smaller
  np.testing.assert_allclose(codes, z, atol=1e-5)
  mine = method.fit(variables, batches_of(x, 128), KEY)
  assert set(mine['params']) == {'prior'} and method.updates() == ()
  variables['params']['prior'] = mine['params']['prior']
  want = mixture.GaussianMixture(2, random_state=0, n_init=5).fit(z).score(z)
  got = float(method.log_prior(variables, jnp.asarray(z, jnp.float32), KEY).mean())
  np.testing.assert_allclose(got, want, atol=0.05)


def test_a_coordinate_that_never_varies_whitens_to_something_finite():
  w, _, x = linear_gaussian(50)
  w = w.copy()
  w[:, 2] = 0
  net, params = linear_net(w)
  found = whitening.build(net, 0).fit({'params': params, 'stats': {}}, batches_of(x, 50), KEY)['params']['whitening']
  assert np.isfinite(found['scale']).all() and (found['scale'] > 0).all()


def test_moments_of_a_coordinate_that_never_varies_are_finite():
  prior, u = normal.build(), np.random.default_rng(0).normal(size=(200, 3)) * [1.0, 2.0, 0.0] + [0.0, 1.0, 0.3]
  params = prior.fit(KEY, u)
  np.testing.assert_allclose(params['scale'][:2], u.std(0)[:2], rtol=1e-5)
  assert 0 < params['scale'][2] < 1e-5
  rows = jnp.asarray(u, jnp.float32)
  assert np.isfinite(prior.log_prob(params, rows)).all()
  inner = prior.log_prob(params, rows) + jnp.log(params['scale'][2]) + 0.5 * np.log(2 * np.pi)  # the third at its mean
  want = stats.norm(u.mean(0)[:2], u.std(0)[:2]).logpdf(u[:, :2]).sum(1)
  np.testing.assert_allclose(inner, want, atol=1e-3)
  assert np.isfinite(prior.log_prob(prior.fit(KEY, np.full((5, 2), 0.3)), jnp.full((5, 2), 0.3))).all()


def test_codes_without_exact_densities_have_no_likelihood():
  w, _, _ = linear_gaussian(2)
  net, _ = linear_net(w)
  for method in (
    density.build(net, 0, prior=vae.build(), codes='sample'),  # a bound
    density.build(net, 0, prior=normal.build(), codes='mean'),  # no posterior
    autoencoder.build(net, 0), whitening.build(net, 0),
  ):  # fmt: skip
    assert not method.density
    with pytest.raises(UserError, match="'likelihood' needs a method with 'density'"):
      evaluation.require(method, 'likelihood', ('density',))
  assert density.build(net, 0, prior=normal.build(), codes='sample').density


@pytest.mark.parametrize('prior', ['flow', 'gmm', 'kde', 'vae', 'normal'])
def test_any_density_on_any_codes_gives_images(prior):
  """Five steps, or a fit, on the codes of a digits' network of the real kind."""
  made = {
    'flow': lambda: flow.build(layers=2, width=8), 'gmm': lambda: gmm.build(components=3), 'kde': lambda: kde.build(points=64),
    'vae': lambda: vae.build(width=8), 'normal': normal.build,
  }[prior]()  # fmt: skip
  net = nets.build((8, 8, 1), latent=4, hidden=(8,), likelihood='normal', bounded=True, scale=0.1)
  method = density.build(net, 5, prior=made, codes='mean')
  x = jax.random.uniform(KEY, (32, 8, 8, 1))
  variables = method.init(KEY, {'image': x})
  if hasattr(method, 'fit'):
    variables['params'] |= method.fit(variables, [{'image': x}], KEY)['params']
  else:
    u = method.vectors(variables['params'], {}, x, KEY)
    before = variables['params']['prior']
    variables['params']['prior'] = fitted(made, u, 5)
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), before, variables['params']['prior'])))
  images = jax.jit(lambda v, key: method.sample(v, key, 7))(variables, KEY)
  assert images.shape == (7, 8, 8, 1) and np.isfinite(images).all() and float(images.std(0).max()) > 0


@pytest.mark.parametrize('module, options, message', [
  (flow, dict(kind='copling'), "method.prior.kind is 'copling'; did you mean 'coupling'"),
  (flow, dict(transformer='x'), 'method.prior.transformer is'),
  (flow, dict(layers=-1), 'method.prior.layers is -1'),
  (flow, dict(interval=0.0), 'method.prior.interval is 0.0'),
  (gmm, dict(components=0), 'method.prior.components is 0'),
  (gmm, dict(covariance='tied'), "method.prior.covariance is 'tied'"),
  (kde, dict(points=1), 'method.prior.points is 1'),
  (kde, dict(bandwidth=-1.0), 'method.prior.bandwidth is -1.0'),
  (vae, dict(width=0), 'method.prior.width is 0'),
])  # fmt: skip
def test_options_that_cannot_be(module, options, message):
  with pytest.raises(UserError, match=message):
    module.build(**options)


def test_too_few_codes():
  with pytest.raises(UserError, match='method.prior.components is 10, more than the 4 codes'):
    gmm.build().fit(KEY, np.zeros((4, 2)))
  with pytest.raises(UserError, match='at least two codes'):
    kde.build().fit(KEY, np.zeros((1, 2)))


def test_outliers_by_density_and_by_reconstruction_are_different_outliers():
  """On the subspace but far out: only the density tells. Off the subspace with small codes: only the reconstruction."""
  from sklearn.metrics import roc_auc_score

  w, _, _ = linear_gaussian(2)
  rng = np.random.default_rng(5)
  n, noise = 500, lambda size: size * rng.normal(size=(500, 20))
  inside = rng.normal(size=(n, 3)) @ w.T + noise(0.05)
  far = rng.normal(size=(n, 3))
  far = 6 * far / np.linalg.norm(far, axis=1, keepdims=True) @ w.T + noise(0.05)
  off = 0.3 * rng.normal(size=(n, 3)) @ w.T + noise(0.5)
  method, variables = with_prior(normal.build(standard=True), w)
  run = jax.jit(lambda v, x: method.anomaly_scores(v, x, KEY))
  scores = [run(variables, jnp.asarray(x, jnp.float32).reshape(n, 1, 20, 1)) for x in (inside, far, off)]
  area = lambda i, name: roc_auc_score(np.repeat([0, 1], n), np.concatenate([scores[0][name], scores[i][name]]))
  assert area(1, 'density') == 1 and abs(area(1, 'reconstruction') - 0.5) < 0.07
  assert area(2, 'reconstruction') == 1 and area(2, 'density') < 0.3 and area(2, 'sum') == 1
  want = -stats.norm.logpdf(inside @ w).sum(1)
  np.testing.assert_allclose(scores[0]['density'], want, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(scores[0]['sum'], scores[0]['density'] + scores[0]['reconstruction'], rtol=1e-5)
  bound, variables = with_prior(vae.build(width=4), w)
  assert set(bound.anomaly_scores(variables, jnp.zeros((2, 1, 20, 1)), KEY)) == {'reconstruction'}
