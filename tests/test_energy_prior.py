"""Energy-based priors against closed forms: linear-Gaussian models, exact kernels on a grid, known stationary laws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from latentgen import samplers
from latentgen.errors import UserError
from latentgen.methods import energy_prior
from latentgen.methods.energy_prior import EnergyPrior
from latentgen.nets import vae
from latentgen.priors import energy
from latentgen.types import Context

WIDE = np.linspace(-9, 9, 3601)  # for quadrature


class Quadratic:
  """f(u) = a + b u - c u^2 / 2 in one dimension."""

  def init(self, key, u):
    return {'params': dict.fromkeys('abc', jnp.zeros(()))}

  def apply(self, variables, u):
    p = variables['params']
    return p['a'] + p['b'] * u[..., 0] - 0.5 * p['c'] * jnp.square(u[..., 0])


def grid(low, high, points=200):
  """An exact kernel in one dimension: draws from the density on a grid, wherever it starts."""
  places = jnp.linspace(low, high, points)

  def run(key, log_density, position, *data):
    n = len(position)
    at = jax.vmap(lambda place: log_density(jnp.full((n, 1), place), *data))(places)  # [points, n]
    index, jitter = jax.random.split(key)
    below = jnp.cumsum(jax.nn.softmax(at, axis=0), axis=0) < jax.random.uniform(index, (n,))
    drawn = places[jnp.minimum(below.sum(0), points - 1)]
    spread = (places[1] - places[0]) * (jax.random.uniform(jitter, (n,)) - 0.5)
    return (drawn + spread)[:, None], jnp.ones(n)

  return samplers.Kernel(run, 1)


def line(slope, deviation):
  """(network, parameters) of x = slope z + N(0, deviation^2), one pixel."""
  net = vae.build((1, 1, 1), latent=1, hidden=(), likelihood='normal', scale=deviation)
  return net, {'head': {'kernel': jnp.full((1, 1), slope), 'bias': jnp.zeros(1)}}


def start(method, decoder):
  variables = method.init(jax.random.key(0), {'image': jnp.zeros((4, 1, 1, 1))})
  return {**variables, 'params': {**variables['params'], 'decoder': {'decoder': decoder}}}


def context(x, key, carry=(), shared=()):
  return Context({'image': jnp.asarray(x, jnp.float32).reshape(-1, 1, 1, 1)}, key, jnp.int32(0), {}, carry, shared)


def fit(method, variables, data, steps, rate, batch=1000, seed=0, once=False):
  """Variables after so many Adam steps on the active tilt, and the mean of the second half's.

  With `once`, samples are drawn once, at all data, of which every step takes some; its rate falls to zero.
  """
  schedule = optax.cosine_decay_schedule(rate, steps) if once else rate
  optimiser = optax.adam(schedule, b1=0.5)
  params, carry = variables['params'], variables['carry']
  own, fixed = params[method.active], params
  data = jnp.asarray(data, jnp.float32)
  pool = jax.jit(lambda: method.prepare(params, context(data, jax.random.key(seed)))[0])() if once else None

  @jax.jit
  def run(own, carry):
    def step(state, i):
      own, carry, opt, mean = state
      key = jax.random.fold_in(jax.random.key(seed), i)
      rows = jax.random.randint(jax.random.fold_in(key, 1), (batch,), 0, len(data))
      merged = {**fixed, method.active: own}
      if once:
        shared = {name: values[rows] for name, values in pool.items()}
      else:
        shared, carry = method.prepare(merged, context(data[rows], key, carry))
      loss = lambda own: method.prior_loss({**fixed, method.active: own}, context(data[rows], key, carry, shared))[0]
      change, opt = optimiser.update(jax.grad(loss)(own), opt, own)
      own = optax.apply_updates(own, change)
      share = jnp.where(2 * i >= steps, 2.0 / steps, 0.0)
      return (own, carry, opt, jax.tree.map(lambda m, o: m + share * o, mean, own)), None

    zero = jax.tree.map(jnp.zeros_like, own)
    return jax.lax.scan(step, (own, carry, optimiser.init(own), zero), jnp.arange(steps))[0]

  own, carry, _, mean = run(own, carry)
  done = lambda own: {**variables, 'params': {**fixed, method.active: own}, 'carry': carry}
  return done(own), done(mean)


def density(method, params, tilts=None):
  """(normalised p(z) on WIDE, its integral before)."""
  log_p = method.log_prior_unnormalised(params, jnp.asarray(WIDE, jnp.float32)[:, None], tilts)
  p = np.exp(np.asarray(log_p, np.float64))
  total = np.trapezoid(p, WIDE)
  return p / total, total


def moments(p):
  mean = np.trapezoid(p * WIDE, WIDE)
  return mean, np.trapezoid(p * np.square(WIDE - mean), WIDE)


def divergence(p, q):
  """KL(p || q) by quadrature."""
  return np.trapezoid(np.where(p > 1e-30, p * (np.log(np.maximum(p, 1e-30)) - np.log(np.maximum(q, 1e-300))), 0.0), WIDE)


# ---------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize('s', [0.4, 0.8])
def test_stationary_variance_of_the_unadjusted_kernel_is_biased_and_of_the_adjusted_one_is_not(s):
  z = jax.random.normal(jax.random.key(0), (60_000, 1))
  log_density = lambda u: -0.5 * jnp.square(u).sum(-1)
  for make, want in ((samplers.ula, 1.0 / (1.0 - s**2 / 4)), (samplers.mala, 1.0)):
    end, accepted = jax.jit(lambda key, make=make: make(60, s**2)(key, log_density, z))(jax.random.key(1))
    assert np.var(end) == pytest.approx(want, abs=4.5 * want * np.sqrt(2 / len(z)))
    assert (accepted == 1).all() if make is samplers.ula else 0.5 < accepted.mean() < 1


@pytest.mark.parametrize('make', [samplers.ula, samplers.mala])
def test_a_chain_does_not_depend_on_the_others(make):
  method, variables = _lebm(make(7, 0.04))
  x = jax.random.normal(jax.random.key(3), (64, 1, 1, 1))
  key = jax.random.key(5)
  draw = jax.jit(lambda x: method.posterior_samples(variables['params'], {}, x, key, 1)[0])
  alone, among = draw(x[:1]), draw(x)
  np.testing.assert_allclose(alone, among[:1], rtol=1e-5)
  other = draw(x + jnp.arange(64.0).reshape(-1, 1, 1, 1))
  np.testing.assert_allclose(other[:1], among[:1], rtol=1e-5)


# ---------------------------------------------------------------------------------------------- maximum likelihood


def _lebm(kernel, prior=None, **options):
  net, decoder = line(2.0, 0.5)
  method = EnergyPrior(net, tilt=Quadratic(), train=('prior',), prior_kernel=prior or kernel, posterior_kernel=kernel, **options)
  return method, start(method, decoder)


def _data(n=20_000):
  """x = 2 z + N(0, 0.25) of z ~ N(1, 0.36)."""
  rng = np.random.default_rng(0)
  return 2 * rng.normal(1, 0.6, n) + rng.normal(0, 0.5, n)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('prior', 'posterior', 'chains', 'want', 'within'),
  [
    (samplers.ula(200, 0.04), samplers.ula(200, 0.01), 0, (1.0, 0.36), 0.03),
    (grid(-5, 6), grid(-3, 5), 0, (1.0, 0.36), 0.03),
    (samplers.mala(20, 0.16), samplers.mala(100, 0.04), 2000, (1.0, 0.36), 0.03),
    (samplers.ula(60, 0.16), samplers.ula(20, 0.01), 0, (0.856, 0.224), 0.03),  # short chains have not arrived: known bias
  ],
  ids=['long', 'grid', 'persistent', 'short'],
)
def test_maximum_likelihood_in_closed_form(prior, posterior, chains, want, within):
  method, variables = _lebm(posterior, prior, chains=chains)
  _, averaged = fit(method, variables, _data(), 1200, 0.03, batch=500)
  own = averaged['params']['tilt0']
  found = float(own['b'] / (1 + own['c'])), float(1 / (1 + own['c']))
  assert found == pytest.approx(want, abs=within)


def test_gradient_of_the_tilt_has_the_closed_form_and_its_sign():
  """d log p / db = E_posterior[z] - E_prior[z], d/dc = -(E_posterior[z^2] - E_prior[z^2]) / 2; the loss descends it."""
  method, variables = _lebm(grid(-6, 8, 800))
  b, c = 0.3, 0.5
  params = {**variables['params'], 'tilt0': {'a': jnp.zeros(()), 'b': jnp.asarray(b), 'c': jnp.asarray(c)}}
  x = _data(20_000)
  precision = 1 + c + 4 / 0.25
  mean = (b + 2 * x / 0.25) / precision
  posterior = np.array([mean.mean(), (np.square(mean) + 1 / precision).mean()])
  prior = np.array([b / (1 + c), np.square(b / (1 + c)) + 1 / (1 + c)])
  want = np.array([-1.0, 0.5]) * (posterior - prior)
  shared, _ = method.prepare(params, context(x, jax.random.key(1)))
  gradient = jax.grad(lambda own: method.prior_loss({**params, 'tilt0': own}, context(x, jax.random.key(1), shared=shared))[0])
  found = gradient(params['tilt0'])
  assert found['b'] < 0  # data lie above the prior: b rises
  np.testing.assert_allclose([found['b'], found['c']], want, atol=3 * np.sqrt(2 * 1.5 / len(x)))


def test_no_tilt_is_plain_short_run_inference():
  kernel = samplers.ula(9, 0.02)
  method, variables = _lebm(kernel)
  x = jnp.asarray(_data(16), jnp.float32).reshape(-1, 1, 1, 1)
  key = jax.random.key(2)
  found, _ = method.posterior_samples(variables['params'], {}, x, key, 1)
  begin, run = jax.random.split(key)
  u = jnp.stack([jax.random.normal(jax.random.fold_in(begin, i), (1,)) for i in range(16)])
  plain = lambda u, x: -0.5 * jnp.square(u[:, 0]) - jnp.square(x[:, 0, 0, 0] - 2 * u[:, 0]) / 0.5
  np.testing.assert_allclose(found, kernel(run, plain, u, x)[0], rtol=1e-4, atol=1e-5)


@functools.cache
def _modes(place, deviation, n=20_000):
  rng = np.random.default_rng(1)
  z = rng.choice([-place, place], n) + deviation * rng.normal(size=n)
  p = 0.5 * (stats.norm.pdf(WIDE, -place, deviation) + stats.norm.pdf(WIDE, place, deviation))
  return z, p


@pytest.mark.slow
@pytest.mark.parametrize(
  ('prior', 'posterior', 'modes', 'rate', 'bound'),
  [
    (grid(-6, 6), grid(-6, 6), (1.5, 0.4), 1e-3, 0.05),
    (grid(-6, 6), grid(-6, 6), (2.0, 0.3), 1e-3, 0.05),
    (samplers.mala(60, 0.16), samplers.mala(40, 0.09), (1.5, 0.4), 1e-3, 0.05),
    (samplers.ula(60, 0.16), samplers.ula(40, 0.01), (1.5, 0.4), 1e-4, 0.3),  # the published kernel: a sampler, less a density
  ],
  ids=['grid', 'grid-far', 'mala', 'ula'],
)
def test_a_prior_of_two_modes_is_found(prior, posterior, modes, rate, bound):
  net, decoder = line(1.0, 0.3)
  tilt = energy.Tilt((64, 64), 'gelu')
  method = EnergyPrior(net, tilt=tilt, train=('prior',), prior_kernel=prior, posterior_kernel=posterior)
  z, true = _modes(*modes)
  x = z + 0.3 * np.random.default_rng(2).normal(size=len(z))
  done, _ = fit(method, start(method, decoder), x, 3000 if rate < 1e-3 else 2000, rate, batch=256)
  assert divergence(true, density(method, done['params'])[0]) < bound


def test_normaliser_and_log_prior_of_a_quadratic_tilt():
  """Z of exp(b z - c z^2 / 2) under N(0, 1) is exp(b^2 / (2 (1 + c))) / sqrt(1 + c)."""
  method, variables = _lebm(samplers.ula(1, 0.1), proposals=200_000, chunk=20_000)
  b, c = 0.4, 0.8
  params = {**variables['params'], 'tilt0': {'a': jnp.zeros(()), 'b': jnp.asarray(b), 'c': jnp.asarray(c)}}
  log_z = b**2 / (2 * (1 + c)) - 0.5 * np.log1p(c)
  assert method.log_normaliser(params, jax.random.key(0), 1).log_z[0] == pytest.approx(log_z, abs=0.006)
  u = jnp.linspace(-2.0, 2.0, 7)[:, None]
  want = stats.norm.logpdf(u[:, 0], b / (1 + c), 1 / np.sqrt(1 + c))
  found = method.log_prior({'params': params, 'stats': {}}, u, jax.random.key(0))
  np.testing.assert_allclose(found, want, atol=0.006)


def test_joint_score_finds_points_off_the_manifold_and_far_from_its_centre():
  net = vae.build((4, 5, 1), latent=3, hidden=(), likelihood='normal', scale=0.1)
  rng = np.random.default_rng(0)
  w = np.linalg.qr(rng.normal(size=(20, 20)))[0]
  decoder = {'head': {'kernel': jnp.asarray(w[:, :3].T, jnp.float32), 'bias': jnp.zeros(20)}}
  method = EnergyPrior(net, tilt=energy.Tilt((8,)), prior_kernel=samplers.ula(1, 0.1), posterior_kernel=samplers.mala(100, 0.01))
  variables = method.init(jax.random.key(0), {'image': jnp.zeros((2, 4, 5, 1))})
  variables['params']['decoder'] = {'decoder': decoder}

  def images(z, off=0.0):
    direction = rng.normal(size=(len(z), 17))
    direction *= off / np.linalg.norm(direction, axis=1, keepdims=True)
    noise = 0.1 * rng.normal(size=(len(z), 20))
    return jnp.asarray(z @ w[:, :3].T + direction @ w[:, 3:].T + noise, jnp.float32).reshape(-1, 4, 5, 1)

  z = rng.normal(size=(200, 3))
  far = 6 * z / np.linalg.norm(z, axis=1, keepdims=True)
  score = jax.jit(lambda x: method.anomaly_scores(variables, x, jax.random.key(1))['joint'])
  inside = score(images(rng.normal(size=(200, 3))))
  for outside in (score(images(z, 5 * 0.1 * np.sqrt(17))), score(images(far))):
    assert roc_auc_score(np.repeat([0, 1], 200), np.concatenate([inside, outside])) > 0.99


# ---------------------------------------------------------------------------------------------- chains of ratios


def _chain(net, decoder, tilt, kernel, data, stages, steps, rate, adaptive=True, **options):
  """(method, parameters) after that many ratios, each trained on its own."""
  params = {}
  for k in range(1, stages + 1):
    method = EnergyPrior(
      net, tilt=tilt, tilts=k, objective='contrast', train=('prior',), prior_kernel=kernel, posterior_kernel=kernel
    )
    variables = start(method, decoder)
    variables['params'] |= {name: value for name, value in params.items() if name.startswith('tilt')}
    trained = method
    if not adaptive:  # posterior of the first stage for ever
      trained = _Frozen(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})
    params = fit(trained, variables, data, steps, rate, seed=k, once=True, **options)[0]['params']
  return method, params


class _Frozen(EnergyPrior):
  def posterior_samples(self, params, stats, x, key, tilts):
    return super().posterior_samples(params, stats, x, key, 0)


SMALL = 0.5  # deviation of x given z


@functools.cache
def _gaussian_chain(adaptive=True):
  net, decoder = line(1.0, SMALL)
  x = np.random.default_rng(3).normal(4.0, 1.5, 20_000)
  return _chain(net, decoder, Quadratic(), grid(-8, 12, 400), x, 3, 1500, 0.1, adaptive)


@pytest.mark.slow
def test_ratios_follow_expectation_maximisation_on_the_prior():
  """With exact ratios p_{k+1} is the aggregate posterior under p_k: kappa = v / (v + s^2), m += kappa (4 - m), ..."""
  method, params = _gaussian_chain()
  m, v, s2 = 0.0, 1.0, SMALL**2
  likelihood = []
  for k in range(1, 4):
    kappa = v / (v + s2)
    m, v = m + kappa * (4.0 - m), (1 - kappa) * v + kappa**2 * 2.25
    p, _ = density(method, params, k)
    assert moments(p) == pytest.approx((m, v), abs=0.12), k
    mean, variance = moments(p)
    likelihood.append(stats.norm.logpdf(np.random.default_rng(3).normal(4, 1.5, 20_000), mean, np.sqrt(variance + s2)).mean())
  assert (m, v) == pytest.approx((3.995, 1.99), abs=0.01)
  assert all(np.diff(likelihood) > -0.01)


@pytest.mark.slow
def test_the_posterior_is_inferred_anew_under_every_prior():
  method, params = _gaussian_chain(adaptive=False)
  assert moments(density(method, params)[0]) == pytest.approx((3.2, 1.65), abs=0.12)


@pytest.mark.slow
def test_many_stages_do_what_one_cannot():
  """Modes at -3 and 3 under N(0, 1): one classifier saturates, a chain recovers the ratio."""
  net, decoder = line(1.0, 0.5)
  z, true = _modes(3.0, 0.3)
  x = z + 0.5 * np.random.default_rng(4).normal(size=len(z))
  method, params = _chain(net, decoder, energy.Tilt((64, 64)), grid(-6, 6), x, 4, 2500, 2e-3)
  found = [density(method, params, k) for k in range(1, 5)]
  gaps = [divergence(true, p) for p, _ in found]
  assert gaps[3] < 0.4 * gaps[0]
  assert all(total == pytest.approx(1.0, abs=0.05) for _, total in found)  # a product of the best classifiers is normalised


def test_a_saturated_stage_shows_in_its_accuracy():
  net, decoder = line(1.0, 0.1)
  method = EnergyPrior(
    net, tilt=Quadratic(), objective='contrast', train=('prior',), prior_kernel=grid(-4, 4), posterior_kernel=grid(10, 14)
  )
  variables = start(method, decoder)
  variables['params']['tilt0'] = {'a': jnp.asarray(-24.0), 'b': jnp.asarray(4.0), 'c': jnp.zeros(())}
  x = np.random.default_rng(0).normal(12.0, 0.5, 500)
  shared, _ = method.prepare(variables['params'], context(x, jax.random.key(0)))
  loss, aux = method.prior_loss(variables['params'], context(x, jax.random.key(0), shared=shared))
  assert aux.metrics['accuracy'] == 1.0 and loss < 0.01
  variables['params']['tilt0'] = dict.fromkeys('abc', jnp.zeros(()))
  _, aux = method.prior_loss(variables['params'], context(x, jax.random.key(0), shared=shared))
  assert aux.metrics['accuracy'] == 0.5  # it decides nothing


def test_tilts_add_up_and_only_the_last_learns():
  net, decoder = line(1.0, 0.5)
  method = EnergyPrior(net, tilt=energy.Tilt((8, 8)), tilts=3, objective='contrast', prior_kernel=samplers.ula(2, 0.1))
  variables = start(method, decoder)
  noisy = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(1), a.shape), variables['params'])
  u = jax.random.normal(jax.random.key(2), (5, 1))
  one = lambda i: jax.grad(lambda u: method.tilt.apply({'params': noisy[f'tilt{i}']}, u).sum())(u)
  whole = jax.grad(lambda u: method.log_prior_unnormalised(noisy, u).sum())(u)
  np.testing.assert_allclose(whole, -u + one(0) + one(1) + one(2), atol=1e-6)
  ctx = context(np.zeros(5), jax.random.key(3))
  shared, _ = method.prepare(noisy, ctx)
  gradient = jax.grad(lambda p: method.prior_loss(p, ctx.replace(shared=shared))[0])(noisy)
  norms = {g: float(optax.tree.norm(t)) for g, t in gradient.items()}
  assert norms.pop('tilt2') > 0 and set(norms.values()) == {0.0}
  assert [u.wrt for u in method.updates()] == [('tilt2',), ('decoder',)]


def test_persistent_chains_are_carried_and_some_start_anew():
  method, variables = _lebm(samplers.ula(1, 1e-12), chains=40, restart=0.25)
  prepare = jax.jit(lambda key: method.prepare(variables['params'], context(np.zeros(40), key, variables['carry']))[1])
  moved = []
  for i in range(50):
    moved.append(np.mean(np.abs(prepare(jax.random.key(i))['chains'] - variables['carry']['chains']) > 1e-3))
  assert np.mean(moved) == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 2000))


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (dict(objective='contrastive'), ['method.objective', "'contrast'"]),
    (dict(posterior='chain'), ['method.posterior', 'encoder']),
    (dict(kernel='nuts'), ['method.kernel', 'mala']),
    (dict(prior_steps=0), ['method.prior_steps']),
    (dict(posterior_steps=0), ['method.posterior_steps']),
    (dict(prior_step_size=0.0), ['method.prior_step_size']),
    (dict(restart=1.5), ['method.restart']),
    (dict(hidden=(0,)), ['method.hidden']),
    (dict(activation='relu6'), ['method.activation']),
  ],
)
def test_bad_options_name_the_key(options, words):
  with pytest.raises(UserError) as caught:
    energy_prior.build(None, 10, **options)
  assert all(word in str(caught.value) for word in words) and '\n' not in str(caught.value)
