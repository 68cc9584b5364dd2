"""Densities on surfaces against analytic ones and quadrature; likelihoods that grow without bound on data of fewer dimensions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latentgen import data
from latentgen.data import toy
from latentgen.errors import UserError
from latentgen.evaluate import base as evaluation, manifold
from latentgen.methods import density
from latentgen.nets import vae as nets
from latentgen.priors import normal
from latentgen.samplers import manifolds

KEY = jax.random.key(0)
KAPPA = 1.5


def curve(z):
  t = z[0] + 0.3 * jnp.sin(z[0])
  return 2 * jnp.stack([jnp.cos(t), jnp.sin(t)])


def test_density_on_a_circle_is_the_analytic_one_and_integrates_to_one():
  """x = 2 (cos s, sin s), s = t + 0.3 sin t, t ~ von Mises(1.5); the arc's element is 2 ds."""
  t = np.linspace(-np.pi, np.pi, 2001)[:-1]
  log_pz = stats.vonmises(KAPPA).logpdf(t)
  z = jnp.asarray(t[:, None], jnp.float32)
  got = np.asarray(jax.jit(lambda z: manifolds.on_manifold(curve, jnp.asarray(log_pz, jnp.float32), z))(z))
  np.testing.assert_allclose(got[::20], (log_pz - np.log(2 * (1 + 0.3 * np.cos(t))))[::20], atol=1e-5)
  s = t + 0.3 * np.sin(t)
  arc = 2 * np.diff(np.append(s, s[0] + 2 * np.pi))
  integral = lambda log_p: ((np.exp(log_p) + np.exp(np.roll(log_p, -1))) / 2 * arc).sum()
  np.testing.assert_allclose(integral(got), 1.0, atol=1e-3)
  np.testing.assert_allclose(integral(log_pz), 2.358, atol=1e-3)  # without the Jacobian


def test_density_does_not_depend_on_the_parametrisation():
  """w = h(z) = z + z^3 and G o h^-1."""
  w = jnp.asarray(np.random.default_rng(0).uniform(-2, 2, (50, 1)), jnp.float32)

  def back(w):
    z = jnp.zeros(())
    for _ in range(60):  # Newton
      z = z - (z + z**3 - w[0]) / (1 + 3 * z**2)
    return z[None]

  z = jax.vmap(back)(w)
  log_pz = stats.norm.logpdf(np.asarray(z[:, 0], np.float64))
  log_pw = log_pz - np.log(1 + 3 * np.asarray(z[:, 0], np.float64) ** 2)
  one = jax.jit(lambda z, p: manifolds.on_manifold(curve, p, z))(z, jnp.asarray(log_pz, jnp.float32))
  two = jax.jit(lambda w, p: manifolds.on_manifold(lambda w: curve(back(w)), p, w))(w, jnp.asarray(log_pw, jnp.float32))
  np.testing.assert_allclose(one, two, atol=1e-5)


def test_isometries_keep_the_density_and_scales_divide_it():
  q = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(12, 4)))[0], jnp.float32)
  z, log_pz = jax.random.normal(KEY, (20, 4)), jax.random.normal(KEY, (20,))
  np.testing.assert_allclose(manifolds.on_manifold(lambda z: q @ z, log_pz, z), log_pz, atol=1e-5)
  np.testing.assert_allclose(manifolds.on_manifold(lambda z: 3 * q @ z, log_pz, z), log_pz - 4 * np.log(3), atol=1e-5)


def test_lost_rank_is_minus_infinity_and_never_nan():
  z = jnp.array([[0.0, 0.0], [1.0, 2.0]])
  collapsed = lambda z: jnp.stack([z[0] + z[1], z[0] + z[1], 2 * z[0] + 2 * z[1]])
  constant = lambda z: jnp.zeros(3) * z[0]
  at_zero = lambda z: jnp.stack([z[0] ** 2, z[1], z[0] * 0])
  for function, want in ((collapsed, [True, True]), (constant, [True, True]), (at_zero, [True, False])):
    got = np.asarray(jax.jit(lambda z, f=function: manifolds.on_manifold(f, jnp.zeros(2), z))(z))
    assert not np.isnan(got).any() and list(got == -np.inf) == want
  np.testing.assert_allclose(got[1], -np.log(2.0), rtol=1e-6)


def test_likelihood_of_a_wrong_density_grows_without_bound():
  """Data on an axis of the plane: N(0, S) x N(0, s^2) with a wrong S and a small s beats the right S with a larger s."""
  u = np.zeros((5000, 2))
  u[:, 0] = 2.0 * np.random.default_rng(0).standard_normal(5000)
  prior = normal.build()
  mean = lambda along, across: float(prior.log_prob(
    {'loc': jnp.zeros(2), 'scale': jnp.array([along, across])}, jnp.asarray(u, jnp.float32)
  ).mean())  # fmt: skip
  assert mean(6.0, 1e-6) > mean(2.0, 1e-1) + 10
  for s in (1e-1, 1e-3, 1e-6):
    np.testing.assert_allclose(mean(6.0, s / 2) - mean(6.0, s), np.log(2), atol=1e-4)
    want = stats.norm(0, [6.0, s]).logpdf(u).sum(1).mean()
    np.testing.assert_allclose(mean(6.0, s), want, rtol=1e-5)


def test_points_of_the_circle():
  splits = toy.load('circle', train=4000, valid=10, test=10)
  x = splits['train'].take(slice(None))['image'].reshape(-1, 2)
  np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, atol=1e-6)
  angle = np.arctan2(x[:, 1], x[:, 0])
  assert stats.kstest(angle, stats.vonmises(1.0).cdf).pvalue > 0.01
  assert stats.kstest(angle, stats.vonmises(2.0).cdf).pvalue < 1e-6
  assert splits['train'].name == 'toy/circle/train' and not splits['train'].num_classes
  wide = toy.load('circle', dims=5, train=10, valid=10, test=10)['train'].take(slice(None))['image']
  assert wide.shape == (10, 1, 5, 1) and (wide[:, 0, 2:] == 0).all()


def test_distance_of_angles():
  rng = np.random.default_rng(0)
  on = lambda t: np.stack([np.cos(t), np.sin(t)], 1)
  x, y = on(rng.vonmises(0, 1, 20_000)), on(rng.uniform(-np.pi, np.pi, 20_000))
  assert manifold.angle_distance(x, x, 20) == 0
  edges = np.linspace(-np.pi, np.pi, 21)
  exact = 0.5 * np.abs(np.diff(stats.vonmises(1).cdf(edges)) - 0.05).sum()
  np.testing.assert_allclose(manifold.angle_distance(x, y, 20), exact, atol=0.02)
  assert exact > 0.1 and manifold.angle_distance(3 * x, x, 20) < 1e-9  # radii do not matter


def subject_of(scale, collapse=False):
  """Circle data; code = first coordinate / scale, image = (scale code, 0)."""
  net = nets.build((1, 2, 1), latent=1, hidden=(), likelihood='normal', scale=1.0)
  method = density.build(net, 0, prior=normal.build(), codes='mean')
  params = {
    'encoder': {'encoder': {'head': {'kernel': [[1 / scale, 0], [0, 0]], 'bias': [0, 0]}}},
    'decoder': {'decoder': {'head': {'kernel': [[0.0 if collapse else scale, 0]], 'bias': [0, 0]}}},
    'prior': {'loc': [0.0], 'scale': [2.0]},
  }
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params, is_leaf=lambda a: isinstance(a, list))
  splits = toy.load('circle', train=100, valid=100, test=300)
  assert set(splits) == set(data.SPLITS)
  take = lambda key, raw, train: {'image': jnp.asarray(raw['image'], jnp.float32)}
  return evaluation.Subject(method, {'params': params, 'stats': {}}, splits, take, KEY, 128)


def test_task_on_a_line():
  subject = subject_of(0.5)
  findings = manifold.run(subject, samples=500)
  x = subject.data['test'].take(slice(None))['image'].reshape(-1, 2)
  found = {name.removeprefix('manifold/'): result.value for name, result in findings.results.items()}
  codes = stats.norm(0, 2).logpdf(x[:, 0] / 0.5).mean()
  np.testing.assert_allclose(found['log_p_codes'], codes, rtol=1e-5)
  np.testing.assert_allclose(found['log_p'], codes - np.log(0.5), rtol=1e-5)
  np.testing.assert_allclose(found['reconstruction_error'], np.abs(x[:, 1]).mean(), rtol=1e-5)
  assert found['lost_rank'] == 0 and 0 < found['angle_distance'] <= 1 and found['off_circle'] > 0
  assert findings.images['manifold'].array.ndim == 3


def test_task_on_a_point_and_on_stages():
  subject = subject_of(0.5, collapse=True)
  found = manifold.run(subject, samples=50).results
  assert found['manifold/lost_rank'].value == 1 and 'manifold/log_p' not in found
  both = dataclasses.replace(subject, stages={'one': lambda: subject, 'two': lambda: subject_of(1.0)})
  found = manifold.run(both, stages=('one', 'two'), samples=50).results
  assert found['manifold/one/lost_rank'].value == 1 and found['manifold/two/lost_rank'].value == 0
  with pytest.raises(UserError, match="manifold.stages names 'tow'; did you mean 'two'"):
    manifold.run(both, stages=('tow',))
