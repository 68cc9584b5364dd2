"""Mixture priors and the methods on them, against quadrature, scipy, plain VAEs and known blobs."""

import dataclasses
import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latentgen import losses, optim
from latentgen.data import toy
from latentgen.distributions import GaussianMixture, Normal
from latentgen.errors import UserError
from latentgen.evaluate import Subject, anomaly, likelihood, run_all
from latentgen.methods import mixture as methods
from latentgen.methods import mixture_fit as fitting
from latentgen.methods import vae as plain
from latentgen.nets import nvae, vae
from latentgen.priors import mixture as priors
from latentgen.train import loop, sharding, step as stepping
from latentgen.types import Context, Stage

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 2, 2, 1)), jnp.float32)
LABELS = jnp.array([0, 1, 2, -1, -1, 0])
CENTRES = ((0.0, 1.0), (2.0, -1.0), (-1.0, -2.0), (0.5, 0.5), (3.0, 0.0), (-2.0, 2.0))


def network(**options):
  return vae.build((2, 2, 1), **{'latent': 2, 'hidden': (5,), **options})


def made(net=None, steps=100, **options):
  """(method, its initial variables)."""
  method = methods.build(net or network(), steps, **options)
  return method, jax.jit(lambda key: method.init(key, {'image': IMAGES, 'label': LABELS}))(KEY)


def context(variables, step=0, **options):
  batch = {'image': IMAGES, 'label': LABELS}
  return Context(batch=batch, key=KEY, step=jnp.asarray(step, jnp.int32), stats=variables['stats'], **options)


def gaussian(variables, net=None):
  """q(z | x) of the network's encoder in numpy, (loc, scale) [b, d]."""
  variables = {'params': {**variables['params']['encoder'], **variables['params']['decoder']}}
  loc, log_scale = (net or network()).apply(variables, IMAGES, method=lambda net, x: net.encoder(x))
  return np.asarray(loc, np.float64), np.exp(np.asarray(log_scale, np.float64))


def posterior_pass(method, variables, k):
  """The trace that a loss with the key KEY sees."""
  return jax.jit(lambda v: method.infer(v['params'], v['stats'], IMAGES, KEY, k)[0])(variables)


def numbers(p):
  return tuple(np.asarray(a, np.float64) for a in (p.weights, p.loc, p.scale))


def density(z, weights, loc, scale):
  """Mixture density of z [..., d] by scipy."""
  return sum(w * stats.norm.pdf(z, m, s).prod(-1) for w, m, s in zip(weights, loc, scale, strict=True))


# ---------------------------------------------------------------------------------------------- the prior


def test_bounds_of_the_deviations():
  scale = np.exp(priors.bound(jnp.linspace(-40.0, 40.0, 101), 3.0))
  np.testing.assert_allclose([scale.min(), scale.max()], [np.exp(-4), 3.0], rtol=1e-4)
  inner = np.linspace(-3.9, 1.0, 30)
  np.testing.assert_allclose(priors.bound(priors.unbound(inner, 3.0), 3.0), inner, rtol=1e-3, atol=1e-4)
  assert np.isfinite(priors.unbound(jnp.array([-9.0, 9.0]), 3.0)).all()


def test_free_components_start_as_they_should():
  prior = priors.Mixture(4000, spread=0.3)
  p = prior.distribution(prior.init(KEY, 2, IMAGES), None)
  np.testing.assert_allclose(p.weights, 1 / 4000)
  np.testing.assert_allclose(p.scale, 1.0, rtol=1e-5)
  np.testing.assert_allclose([p.loc.mean(), p.loc.std()], [0.0, 0.3], atol=0.02)


def test_pseudo_inputs_start_at_training_images_and_give_encoder_moments():
  method, variables = made(prior='pseudo', components=6)
  images = variables['params']['prior']['images']
  nearest = np.abs(np.asarray(images)[:, None] - np.asarray(IMAGES)).max((2, 3, 4))
  assert sorted(nearest.argmin(1)) == list(range(6)) and nearest.min(1).max() < 0.06
  variables['params']['prior'] = {'images': IMAGES}
  p = method.mixture(variables)
  loc, scale = gaussian(variables)
  np.testing.assert_allclose(p.loc, loc, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(p.scale, scale, rtol=1e-5)


def test_overlap_is_the_integral():
  q = np.array([0.3]), np.array([0.7])
  weights, loc, scale = np.array([0.2, 0.8]), np.array([[-1.0], [2.0]]), np.array([[0.5], [1.5]])
  z = np.linspace(-20, 20, 200_001)
  want = [np.log(w * np.sum(stats.norm.pdf(z, *q) * stats.norm.pdf(z, m, s)) * (z[1] - z[0])) for w, m, s in zip(
    weights, loc[:, 0], scale[:, 0], strict=True)]  # fmt: skip
  q = Normal(*(jnp.float32(a)[None] for a in q))
  got = priors.log_overlap(q, GaussianMixture(*map(jnp.float32, (weights, loc, scale))))
  np.testing.assert_allclose(got[0], want, atol=1e-5)


def test_learned_weights_and_classes():
  prior = priors.Mixture(6, learned_weights=True)
  params = {**prior.init(KEY, 2, IMAGES), 'logits': jnp.log(jnp.array([1.0, 2, 3, 4, 5, 6]))}
  p = prior.distribution(params, None)
  np.testing.assert_allclose(p.weights, np.arange(1, 7) / 21, rtol=1e-6)
  each = priors.by_class(p, 3)
  np.testing.assert_allclose(each.weights, [[1 / 3, 2 / 3], [3 / 7, 4 / 7], [5 / 11, 6 / 11]], rtol=1e-6)
  np.testing.assert_array_equal(each.loc[1], p.loc[2:4])


def test_places_are_far_from_the_living():
  points = jnp.array([[0.0, 0], [0.01, 0], [9.0, 0], [9.0, 0.01], [0, 9.0], [-5, 5]])
  centres = jnp.array([[0.0, 0], [70.0, 70], [70, 70], [5, 5]])
  dead = jnp.array([False, True, True, False])
  found = []
  for seed in range(40):
    rows = priors.places(jax.random.key(seed), points, centres, dead, jnp.zeros((4, 6)))
    near = {2: 2, 3: 2}  # the twins at (9, 0)
    found.append(sorted(near.get(int(r), int(r)) for r in rows[1:3]))
    assert found[-1][0] != found[-1][1] and 0 not in found[-1] and 1 not in found[-1]
  # Squared distances to the nearest of (0, 0) and (5, 5): 41 at (9, 0), at its twin and at (0, 9), 50 at (-5, 5).
  first = [f for f in found if 2 in f]
  assert len(first) > 20
  odds = jnp.full((4, 6), -1e9).at[1, 4].set(0.0).at[2, 5].set(0.0)
  rows = priors.places(KEY, points, centres, jnp.ones(4, bool), odds)
  np.testing.assert_array_equal(rows[1:3], [4, 5])


def test_reseeding_moves_dead_components_only():
  prior = priors.Mixture(3, learned_weights=True)
  params = {**prior.init(KEY, 2, IMAGES), 'logits': jnp.array([0.0, 1.0, -9.0])}
  shift = jax.tree.map(lambda a: jnp.full_like(a, 0.25), params)
  current = jax.tree.map(jnp.add, params, shift)
  codes = jnp.array([[9.0, 9], [8, 8], [7, -7]])
  seeds = prior.seeds(current, codes, jnp.array([0.5, 1.5]), None)
  moved = jax.tree.map(jnp.add, params, priors.reseed(params, shift, jnp.array([False, False, True]), seeds))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:2], b[:2]), moved, current)
  np.testing.assert_allclose(moved['loc'][2], [7, -7], rtol=1e-6)
  np.testing.assert_allclose(np.exp(priors.bound(moved['log_scale'][2], 2.0)), [0.5, 1.5], rtol=1e-5)
  total = np.exp([0.25, 1.25, -8.75]).sum()
  np.testing.assert_allclose(np.exp(moved['logits'][2]), total / 3, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- losses


def test_cauchy_schwarz_loss_on_the_networks_own_gaussians():
  method, variables = made(prior='fixed', prototypes=CENTRES, weight=0.7, samples=2)
  loss, aux = jax.jit(method.loss)(variables['params'], context(variables))
  trace = posterior_pass(method, variables, 2)
  grid = np.linspace(-12, 12, 801)
  z = np.stack(np.meshgrid(grid, grid, indexing='ij'), -1)
  cell = (grid[1] - grid[0]) ** 2
  p = density(z, np.full(6, 1 / 6), np.array(CENTRES), np.ones((6, 2)))
  want = []
  for m, s in zip(*gaussian(variables), strict=True):
    q = stats.norm.pdf(z, m, s).prod(-1)
    want.append(-np.log((q * p).sum() * cell) + 0.5 * np.log((q**2).sum() * cell) + 0.5 * np.log((p**2).sum() * cell))
  np.testing.assert_allclose(aux.metrics['cauchy_schwarz'], np.mean(want), rtol=1e-4)
  np.testing.assert_allclose(loss, 0.7 * np.mean(want) - trace.log_px.mean(), rtol=1e-5)
  assert not {'elbo', 'nelbo', 'kl'} & set(aux.metrics)


def test_elbo_loss_is_the_density_ratio_at_the_draw():
  method, variables = made(objective='elbo', prior='fixed', prototypes=CENTRES)
  loss, aux = jax.jit(method.loss)(variables['params'], context(variables))
  trace = posterior_pass(method, variables, 1)
  z = np.asarray(trace.z[0][0, 0], np.float64)
  log_q = np.log(stats.norm.pdf(z, *gaussian(variables)).prod(-1))
  log_p = np.log(density(z, np.full(6, 1 / 6), np.array(CENTRES), np.ones((6, 2))))
  np.testing.assert_allclose(aux.metrics['kl'], (log_q - log_p).mean(), rtol=1e-5)
  np.testing.assert_allclose(loss, (log_q - log_p).mean() - trace.log_px.mean(), rtol=1e-5)


def test_the_standard_prior_is_a_plain_vae():
  net = network()
  method, variables = made(net, objective='elbo', prior='standard', weight=0.5)
  reference = plain.build(net, 100, beta=0.5)
  ctx = context(variables)
  (ours, _), grads = jax.jit(lambda p: stepping.gradient(method.updates()[0], p, ctx))(variables['params'])
  (theirs, _), wanted = jax.jit(lambda p: stepping.gradient(reference.updates()[0], p, ctx))(variables['params'])
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, wanted)
  one, other = (jax.jit(lambda v, m=m: m.trace(v, IMAGES, KEY, 3))(variables) for m in (method, reference))
  np.testing.assert_allclose(one.kl[0], other.kl[0], rtol=1e-5)
  np.testing.assert_allclose(one.log_weight(), other.log_weight(), rtol=1e-5)


@pytest.mark.parametrize('objective', methods.OBJECTIVES)
def test_labelled_images_are_held_to_their_classes_components(objective):
  method, variables = made(objective=objective, components=6, classes=3, alpha=2.0, learned_weights=True)
  variables['params']['prior']['logits'] = jnp.arange(6.0) / 3
  loss, aux = jax.jit(method.loss)(variables['params'], context(variables))
  weights, loc, scale = numbers(method.mixture(variables))
  trace = posterior_pass(method, variables, 1)
  q, z, total, log_py = gaussian(variables), np.asarray(trace.z[0][0, 0], np.float64), [], []
  for i, y in enumerate(np.asarray(LABELS)):
    own = slice(None) if y < 0 else slice(2 * y, 2 * y + 2)
    w, m, s = weights[own] / weights[own].sum(), loc[own], scale[own]
    mine = (q[0][i : i + 1], q[1][i : i + 1])
    if objective == 'elbo':
      total.append(np.log(stats.norm.pdf(z[i], q[0][i], q[1][i]).prod()) - np.log(density(z[i], w, m, s)))
    else:
      total.append(float(losses.cauchy_schwarz(tuple(map(jnp.float32, mine)), tuple(map(jnp.float32, (w, m, s))))[0]))
    if y >= 0:
      overlap = weights * stats.norm.pdf(mine[0], loc, np.sqrt(scale**2 + mine[1] ** 2)).prod(-1)
      log_py.append(np.log(overlap.reshape(3, 2).sum(1)[y] / overlap.sum()))
  want = np.mean(total) - float(trace.log_px.mean()) - 2.0 * np.sum(log_py) / 6
  np.testing.assert_allclose(loss, want, rtol=1e-4)
  np.testing.assert_allclose(aux.metrics['log_py'], np.mean(log_py), rtol=1e-4)
  log_y = method.classify(variables, IMAGES, KEY)
  assert log_y.shape == (6, 3)
  np.testing.assert_allclose([log_y[i, y] for i, y in enumerate(LABELS) if y >= 0], log_py, rtol=1e-4)
  assert methods.build(network(), 10).classify is None


def test_images_without_a_label_are_no_errors():
  method, variables = made(components=6, classes=3)
  found = jax.jit(method.metrics)(variables['params'], context(variables))
  guess = np.asarray(method.classify(variables, IMAGES, KEY)).argmax(1)
  want = [float(y >= 0 and g != y) for g, y in zip(guess, np.asarray(LABELS), strict=True)]
  assert any(want)
  np.testing.assert_array_equal(found['error'], want)


def test_the_weight_rises_and_follows_the_target():
  method, variables = made(weight=3.0, warmup_portion=0.5)
  loss = jax.jit(method.loss)
  weights = [float(loss(variables['params'], context(variables, t))[1].metrics['weight']) for t in (25, 60)]
  np.testing.assert_allclose(weights, [1.5, 3.0], rtol=1e-3)

  method, variables = made(weight=0.3, target=50.0, dual_rate=0.5)
  _, aux = jax.jit(method.loss)(variables['params'], context(variables))
  found = float(aux.metrics['cauchy_schwarz'])
  np.testing.assert_allclose(aux.stats['dual']['weight'], max(0.0, 0.3 + 0.5 * (found - 50.0)))  # 0, not negative
  method, variables = made(weight=0.3, target=0.01, dual_rate=0.5)
  _, aux = jax.jit(method.loss)(variables['params'], context(variables))
  np.testing.assert_allclose(aux.stats['dual']['weight'], 0.3 + 0.5 * (found - 0.01), rtol=1e-5)


# ---------------------------------------------------------------------------------------------- dead components


@pytest.mark.parametrize('prior', ['free', 'pseudo'])
def test_a_dead_component_starts_anew_at_an_example(prior):
  method, variables = made(prior=prior, components=3, reseed=0.1)
  if prior == 'free':
    variables['params']['prior']['loc'] = jnp.array([[0.0, 0.0], [1e3, 1e3], [0.1, 0.0]])
  else:
    variables['params']['prior']['images'] = jnp.stack([IMAGES[0], IMAGES[1] + 1e3, IMAGES[2]])
  variables['stats']['prior']['mass'] = jnp.array([0.5, 0.03, 0.47])
  loss = jax.jit(method.loss)
  ctx = context(variables, step=10)
  value, aux = loss(variables['params'], ctx)
  assert aux.metrics['reseeded'] == 1
  after = method.mixture({**variables, 'stats': aux.stats})
  before = method.mixture(variables)
  for i in (0, 2):
    np.testing.assert_array_equal(after.loc[i], before.loc[i])
  distance = np.abs(np.asarray(after.loc[1]) - gaussian(variables)[0]).max(1)
  assert distance.min() < 1e-4
  assert aux.stats['prior']['mass'][1] == np.float32(1 / 3)
  # No gradient passes through the shift, late steps leave it alone, and so does reseed = 0.
  assert loss(variables['params'], context(variables, step=60))[1].metrics['reseeded'] == 0
  never = dataclasses.replace(method, reseed=0.0)
  assert jax.jit(never.loss)(variables['params'], ctx)[1].metrics['reseeded'] == 0


def test_a_class_is_reseeded_from_its_own_examples():
  method, variables = made(components=3, classes=3, reseed=0.9)
  variables['stats']['prior']['mass'] = jnp.array([1.0, 1.0, 0.0])
  places = gaussian(variables)[0]
  _, aux = jax.jit(method.loss)(variables['params'], context(variables, 0))
  at = np.abs(np.asarray(method.mixture({**variables, 'stats': aux.stats}).loc[2]) - places).max(1).argmin()
  assert int(LABELS[at]) in (2, -1)  # never an example that is known to be of another class


# ---------------------------------------------------------------------------------------------- evaluation


def test_traces_and_simulations_are_under_the_mixture():
  method, variables = made(prior='fixed', prototypes=CENTRES)
  p = np.full(6, 1 / 6), np.array(CENTRES), np.ones((6, 2))
  trace = jax.jit(lambda v: method.trace(v, IMAGES, KEY, 4))(variables)
  np.testing.assert_allclose(trace.log_p[0][0], np.log(density(np.asarray(trace.z[0][0], np.float64), *p)), rtol=1e-4)
  assert trace.kl is None and trace.prior is None
  drawn = jax.jit(lambda key: method.simulate(variables, key, 60_000, 'mixture'))(KEY)
  z = np.asarray(drawn.z[0][0, 0], np.float64)
  np.testing.assert_allclose(drawn.log_p[0][0, 0], np.log(density(z, *p)), rtol=1e-4)
  spread = np.array(CENTRES).var(0) + 1
  np.testing.assert_allclose(z.mean(0), np.mean(CENTRES, 0), atol=4 * np.sqrt(spread.max() / 60_000))
  np.testing.assert_allclose(z.var(0), spread, rtol=0.03)
  cold = np.asarray(jax.jit(lambda key: method.simulate(variables, key, 500, temperature=1e-4).z[0][0, 0])(KEY))
  nearest = np.abs(cold[:, None] - np.array(CENTRES)).max(-1)
  assert nearest.min(1).max() < 1e-2
  np.testing.assert_allclose(np.bincount(nearest.argmin(1), minlength=6) / 500, 1 / 6, atol=0.07)  # one for each draw
  with pytest.raises(UserError, match='--sampler=normal'):
    method.simulate(variables, KEY, 2, 'normal')


def linear(posterior=(0.5, 0.0, 1.0, 1.0)):
  """A linear Gaussian decoder, p(x | z) = N(W z + b, 0.5^2), whose evidence under a mixture is a mixture too.

  The posterior of every image is the same: two means, then two log deviations.
  """
  net = vae.build((1, 3, 1), latent=2, hidden=(), likelihood='normal', scale=0.5)
  method = methods.build(net, 10, prior='fixed', prototypes=CENTRES[:3])
  rng = np.random.default_rng(4)
  x = rng.normal(size=(5, 1, 3, 1)) * 2
  variables = jax.jit(lambda key: method.init(key, {'image': jnp.float32(x)}))(KEY)
  head = {'kernel': jnp.float32(rng.normal(size=(2, 3))), 'bias': jnp.float32(rng.normal(size=3))}
  variables['params']['decoder'] = {'decoder': {'head': head}}
  variables['params']['encoder'] = {'encoder': {'head': {'kernel': jnp.zeros((3, 4)), 'bias': jnp.float32(posterior)}}}
  w, b = (np.asarray(head[name], np.float64) for name in ('kernel', 'bias'))
  cover = w.T @ w + 0.25 * np.eye(3)
  want = np.log(sum(stats.multivariate_normal.pdf(x[:, 0, :, 0], np.array(m) @ w + b, cover) for m in CENTRES[:3]) / 3)
  return method, variables, jnp.float32(x), want


def test_bounds_without_the_posterior_are_under_the_mixture():
  """L^{>1} = E_p(z) log N(x; W z + b, 0.5^2), in closed form under the mixture and under N(0, I)."""
  method, variables, _, _ = linear()
  far = np.array(CENTRES[:3]) + 3.0
  method = dataclasses.replace(method, prior=dataclasses.replace(method.prior, prototypes=tuple(map(tuple, far))))
  variables = {**variables, 'stats': {**variables['stats'], 'prior': {'constants': method.prior.constants(2)}}}
  head = jax.tree.map(lambda a: np.asarray(a, np.float64), variables['params']['decoder']['decoder']['head'])
  x = np.random.default_rng(6).normal(size=(4, 3))

  def want(means, lower):
    error = np.square(x[:, None] - (np.asarray(means) @ head['kernel'] + head['bias'])).sum(-1).mean(-1)
    spread = np.square(head['kernel']).sum() if lower == 'sample' else 0.0
    return -0.5 * (error + spread) / 0.25 - 1.5 * np.log(2 * np.pi * 0.25)

  for lower, means in (('sample', far), ('mode', [far.mean(0)])):
    bounds = jax.jit(anomaly.bounds(method, 1, lower=lower))
    copies = 20_000
    found = bounds(variables, jnp.float32(x).repeat(copies, 0)[:, None, :, None], KEY)['bounds']
    assert found.shape == (2, 4 * copies)
    values = np.asarray(found[1], np.float64).reshape(4, copies)
    error = values.std(1) / np.sqrt(copies)
    assert np.all(np.abs(values.mean(1) - want(means, lower)) < 4 * error + 1e-3)
    assert np.all(np.abs(values.mean(1) - want([[0.0, 0.0]], lower)) > 10 * error + 1)


@pytest.mark.parametrize('share', [0.0, 0.5])
def test_importance_weights_reach_the_evidence(share):
  method, variables, x, want = linear()
  method = dataclasses.replace(method, defensive=share)
  function = jax.jit(likelihood.terms(method.trace, method.propose, 20_000, 1000))
  found = function(variables, x, KEY)
  assert np.all(found['ess'] > 100)
  np.testing.assert_allclose(found['iwae'], want, atol=0.15)
  assert np.all(found['elbo'] < found['iwae'])


def test_a_defensive_proposal_covers_what_a_narrow_posterior_misses():
  method, variables, x, want = linear((9.0, 9.0, -6.0, -6.0))
  found = {}
  for share in (0.0, 0.5):
    method = dataclasses.replace(method, defensive=share)
    found[share] = jax.jit(likelihood.terms(method.trace, method.propose, 20_000, 1000))(variables, x, KEY)
  np.testing.assert_allclose(found[0.5]['iwae'], want, atol=0.15)
  assert np.all(found[0.0]['iwae'] < want - 5)
  np.testing.assert_allclose(found[0.0]['reconstruction'], found[0.5]['reconstruction'], rtol=1e-5)  # of q in either case


def test_log_density_of_the_defensive_proposal():
  q, p = Normal(jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.2]])), GaussianMixture(
    jnp.array([0.4, 0.6]), jnp.array([[4.0, 0.0], [-4.0, 0.0]]), jnp.ones((2, 2)))  # fmt: skip
  z, log_q = priors.defensive(KEY, q, p, 0.25, 50_000)
  own = stats.norm.pdf(np.asarray(z[:, 0], np.float64), [0.0, 1.0], [0.5, 0.2]).prod(-1)
  want = 0.75 * own + 0.25 * density(np.asarray(z[:, 0], np.float64), *numbers(p))
  np.testing.assert_allclose(log_q[:, 0], np.log(want), rtol=1e-4, atol=1e-4)
  shares = [(jnp.abs(z[:, 0, 0]) < 2).mean(), (z[:, 0, 0] > 2).mean(), (z[:, 0, 0] < -2).mean()]
  np.testing.assert_allclose(shares, [0.75 + 0.25 * 0.0228, 0.25 * 0.4 * 0.977, 0.25 * 0.6 * 0.977], atol=0.01)


# ---------------------------------------------------------------------------------------------- training


def test_an_interrupted_run_ends_as_an_undisturbed_one_to_the_bit(tmp_path):
  """With a dual variable that moves, a restart of all components, and one that is always dead."""
  data = toy.load('blobs', train=40, valid=4, test=4)
  net = vae.build((1, 2, 1), latent=2, hidden=(4,), likelihood='normal')
  options = {'components': 3, 'target': 0.1, 'dual_rate': 0.3, 'restart': 0.34, 'reseed': 0.95, 'reseed_portion': 1.0}

  def build(folder):
    method = methods.build(net, 6, **options)
    stage = Stage('vae', method, {'vae': optim.build('', 6, 'adam', 1e-2)}, 6)
    settings = loop.Settings(0, 8, 1, 1)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    (tmp_path / folder).mkdir(exist_ok=True)
    return loop.Run((stage,), data, lambda key, batch, train: batch, mesh, tmp_path / folder, settings)

  loop.train(build('whole'))
  run, calls, feed = build('broken'), [], loop.Run.feed

  def counted(self, batch):
    calls.append(1)
    if len(calls) == 5:  # one to initialise, three steps
      raise InterruptedError
    return feed(self, batch)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.Run, 'feed', counted)
    with pytest.raises(InterruptedError):
      loop.train(run)
  loop.train(run)
  one, two = (loop.load_variables(r, r.recipe[0]) for r in (build('whole'), build('broken')))
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert one['stats']['dual']['weight'] != 1.0 and np.abs(one['stats']['prior']['shift']['loc']).max() > 0
  rows = [(tmp_path / folder / 'metrics.jsonl').read_text() for folder in ('whole', 'broken')]
  assert rows[0] == rows[1] and json.loads(rows[0].splitlines()[2])['vae/reseeded'] == 3


@pytest.mark.parametrize('covariance', ['diag', 'full'])
def test_fit_finds_the_mixture_of_the_codes(covariance):
  """Codes are the images, drawn from three Gaussians of weights 1/2, 1/3 and 1/6."""
  net = vae.build((1, 2, 1), latent=2, hidden=(), likelihood='normal')
  method = fitting.build(net, 0, components=3, restarts=2, covariance=covariance)
  rng = np.random.default_rng(0)
  k = np.resize([0, 0, 0, 1, 1, 2], 6000)
  loc, scale = np.array([[0.0, 4.0], [5.0, 0.0], [-4.0, -4.0]]), np.array([[0.5, 1.0], [1.0, 0.5], [0.3, 0.3]])
  x = jnp.float32(loc[k] + scale[k] * rng.normal(size=(6000, 2)))[:, None, :, None]
  variables = jax.jit(lambda key: method.init(key, {'image': x[:8]}))(KEY)
  head = {'kernel': jnp.eye(2, 4), 'bias': jnp.zeros(4)}
  variables['params']['encoder'] = {'encoder': {'head': head}}
  fitted = method.fit(variables, [{'image': part} for part in jnp.split(x, 3)], KEY)
  variables['params'].update(fitted['params'])
  p = method.mixture(variables)
  order = np.argsort(-np.asarray(p.weights))
  np.testing.assert_allclose(p.weights[order], [1 / 2, 1 / 3, 1 / 6], atol=0.01)
  np.testing.assert_allclose(p.loc[order], loc, atol=0.1)
  np.testing.assert_allclose(p.scale[order], scale, rtol=0.06)
  for bad in ({'restarts': 0}, {'components': 0}):
    with pytest.raises(UserError, match=f'method.{next(iter(bad))} is 0'):
      fitting.build(net, 0, **bad)


def test_components_go_to_the_nearest_classes_equally_many_to_each():
  means = np.array([[0.0], [10.0], [1.0], [11.0], [4.0], [30.0]])
  codes, labels = np.array([[0.5], [10.5], [12.0], [4.0]]), np.array([0, 1, 1, -1])
  order = fitting.by_distance(means, codes, labels, 2)
  assert set(order[:3]) == {0, 2, 4} and set(order[3:]) == {1, 3, 5}
  # Six components, two classes: all 20 splits by hand.
  best = min(
    itertools.combinations(range(6), 3),
    key=lambda zero: sum(
      min((means[c, 0] - code) ** 2 for code, y in zip(codes[:, 0], labels, strict=True) if y == (0 if c in zero else 1))
      for c in range(6)
    ),
  )
  assert set(best) == set(order[:3])
  with pytest.raises(UserError, match='no training image has label 2'):
    fitting.by_distance(means, codes, labels, 3)


@functools.cache
def blobs(components, seeds):
  """Methods trained on four blobs, 1500 steps of 200 points; the seeds all at once."""
  net = vae.build((1, 2, 1), latent=2, hidden=(32,), likelihood='normal', scale=0.5)
  data, steps = toy.load('blobs', train=2000, valid=100, test=500), 1500
  method = methods.build(net, steps, components=components, warmup_portion=0.1, restart=0.1, reseed=0.5)
  stage = Stage('vae', method, {'vae': optim.build('', steps, 'adam', 5e-3, final_learning_rate=5e-4)}, steps)
  preprocess = lambda key, batch, train: batch
  x = jnp.asarray(data['train'].take(slice(None))['image'])
  function, _ = stepping.make_step(stage, preprocess)

  def train(key):
    state = stepping.init_state(stage, preprocess, key, {'image': x[:200]})

    def body(carry, k):
      state, health, _ = function(*carry, key, {'image': x[jax.random.randint(k, (200,), 0, len(x))]})
      return (state, health), None

    state, health = jax.lax.scan(body, (state, stepping.healthy()), jax.random.split(key, steps))[0]
    return stepping.evaluation_variables(state), health['step']

  variables, bad = jax.jit(jax.vmap(train))(jax.random.split(KEY, seeds))
  assert (bad < 0).all()
  one = lambda i: jax.tree.map(lambda a: a[i], variables)
  return [Subject(method, one(i), data, preprocess, KEY, 500) for i in range(seeds)]


@pytest.mark.slow
def test_blobs_are_found_without_labels():
  found = []
  for s in blobs(4, 5):
    results = run_all(s, {'clustering': {'restarts': 1, 'baselines': ()}}).results
    x = jnp.asarray(s.data['test'].take(slice(None))['image'])
    mass = np.asarray(jnp.exp(jax.jit(s.method.cluster)(s.variables, x, KEY)).mean(0))
    found.append(results['clustering/model/accuracy'].value > 0.95 and mass.min() > 0.15 and mass.max() < 0.35)
  assert sum(found) >= 4


@pytest.mark.slow
def test_four_components_explain_four_blobs_better_than_one():
  one, four = (
    run_all(blobs(c, n)[0], {'likelihood': {'samples': 500, 'chunk': 100}}).results['likelihood/iwae'].value
    for c, n in ((1, 1), (4, 5))
  )
  assert four > one + 0.1


# ---------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize('options, message', [
  ({'components': 0}, 'method.components is 0'),
  ({'components': 2.5}, 'method.components is 2.5'),
  ({'prior': 'psuedo'}, "method.prior is 'psuedo'; did you mean 'pseudo'"),
  ({'prior': 'fixed'}, 'method.prototypes'),
  ({'prior': 'fixed', 'prototypes': ((0.0,), (1.0, 2.0))}, 'method.prototypes'),
  ({'objective': 'kl'}, "method.objective is 'kl'"),
  ({'spread': 0.0}, 'method.spread is 0.0'),
  ({'max_scale': 1.0}, 'method.max_scale is 1.0'),
  ({'samples': 0}, 'method.samples is 0'),
  ({'weight': -1.0}, 'method.weight is -1.0'),
  ({'defensive': 1.0}, 'method.defensive is 1.0'),
  ({'warmup_portion': 1.5}, 'method.warmup_portion is 1.5'),
  ({'classes': 4, 'components': 10}, 'method.components is 10, need a multiple of method.classes = 4'),
])  # fmt: skip
def test_bad_options_name_the_key(options, message):
  with pytest.raises(UserError, match=re.escape(message)):
    methods.build(network(), 10, **options)


def test_networks_and_data_that_do_not_fit():
  init = lambda method, **batch: jax.eval_shape(lambda key: method.init(key, {'image': IMAGES, **batch}), KEY)
  with pytest.raises(UserError, match='config.model.name: .* one group of latent vectors; this one has 2'):
    tiny = nvae.build((8, 8, 1), groups=(1, 1), latent=2, channels=4, pre_blocks=0, likelihood='bernoulli')
    jax.eval_shape(lambda key: methods.build(tiny, 10).init(key, {'image': jnp.zeros((2, 8, 8, 1))}), KEY)
  with pytest.raises(UserError, match='method.classes is 2, and the data have no labels'):
    init(methods.build(network(), 10, classes=2))
  with pytest.raises(UserError, match='method.prototypes have 3 dimensions, and model.latent is 2'):
    init(methods.build(network(), 10, prior='fixed', prototypes=((0.0, 0.0, 0.0),)))
