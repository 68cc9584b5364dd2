"""Posteriors as mixtures of Gaussians against closed forms; restorations by linear models against exact conditionals."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentgen import data
from latentgen.data.source import ArraySource
from latentgen.errors import UserError
from latentgen.evaluate import base as evaluation, restoration
from latentgen.methods import density
from latentgen.nets import vae as nets
from latentgen.priors import flow, vae
from latentgen.samplers import laplace

KEY = jax.random.key(0)
NOISE = 0.05


def test_linear_posterior_is_the_exact_conditional():
  """Half of ten pixels of x = W u + b + noise, u ~ N(0, I_3)."""
  rng = np.random.default_rng(0)
  w, b, sigma = rng.normal(size=(10, 3)), rng.normal(size=10), 0.3
  known = np.arange(10) % 2 == 0
  x = w @ rng.normal(size=3) + b + sigma * rng.normal(size=10)
  precision = np.eye(3) + w[known].T @ w[known] / sigma**2
  mean = np.linalg.solve(precision, w[known].T @ (x - b)[known]) / sigma**2
  wk, rest = jnp.asarray(w[known], jnp.float32), jnp.asarray((x - b)[known], jnp.float32)

  def log_density(u, weight):
    return -0.5 * jnp.square(u).sum() - weight * 0.5 * jnp.square((rest - wk @ u) / sigma).sum()

  starts = jax.random.normal(KEY, (12, 3))
  found = jax.jit(lambda s: laplace.laplace_mixture(log_density, s, 200))(starts)
  np.testing.assert_allclose(found.loc, np.broadcast_to(mean, (12, 3)), atol=1e-4)
  for factor in np.asarray(found.factor):
    np.testing.assert_allclose(factor @ factor.T, np.linalg.inv(precision), atol=1e-4)
  assert (np.asarray(found.log_weights) > -np.inf).sum() == 1 and found.log_weights[0] == 0
  drawn = np.asarray(found.sample(KEY, 40_000))
  np.testing.assert_allclose(np.cov(drawn.T), np.linalg.inv(precision), rtol=0.1, atol=2e-4)


def test_both_roots_of_a_square_are_found_with_equal_weights():
  """g(u) = u^2 = 4 with deviation 0.1."""
  log_density = lambda u, weight: -0.5 * u[0] ** 2 - weight * 0.5 * ((4 - u[0] ** 2) / 0.1) ** 2
  found = jax.jit(lambda s: laplace.laplace_mixture(log_density, s, 400))(jax.random.normal(KEY, (16, 1)))
  kept = np.asarray(found.log_weights) > -np.inf
  assert kept.sum() == 2
  # d/du of the log posterior is -u + 2 u (4 - u^2) / 0.01 = 0.
  root = np.sqrt(4 - 0.005)
  np.testing.assert_allclose(np.sort(np.asarray(found.loc)[kept, 0]), [-root, root], atol=1e-4)
  np.testing.assert_allclose(np.exp(np.asarray(found.log_weights)[kept]), 0.5, atol=0.02)
  second = 1 + (6 * root**2 - 8) / 0.01  # minus the second derivative
  np.testing.assert_allclose(np.asarray(found.factor)[kept, 0, 0] ** 2, 1 / second, rtol=1e-3)
  drawn = np.asarray(found.sample(KEY, 4000))[:, 0]
  assert abs((drawn > 0).mean() - 0.5) < 0.04 and np.abs(np.abs(drawn) - root).max() < 0.2


def test_weights_of_unequal_modes_are_their_masses():
  """Two Gaussians far apart, of weights 0.8 and 0.2 and deviations 0.5 and 1.5."""
  def log_density(u, weight):
    del weight
    each = jnp.stack([jnp.log(0.8 / 0.5) - 0.5 * ((u[0] - 9) / 0.5) ** 2, jnp.log(0.2 / 1.5) - 0.5 * ((u[0] + 9) / 1.5) ** 2])
    return jax.nn.logsumexp(each)

  starts = jnp.array([[-12.0], [11.0], [-7.0], [8.0]])
  found = jax.jit(lambda s: laplace.laplace_mixture(log_density, s, 200))(starts)
  np.testing.assert_allclose(np.exp(found.log_weights), [0.2, 0.8, 0, 0], atol=1e-3)


def test_likelihood_comes_in_by_and_by():
  weights = np.asarray(laplace.annealing(100))
  assert len(weights) == 100 and weights[0] == pytest.approx(0.2) and weights[49] == pytest.approx(0.5)
  assert (np.diff(weights[:50]) > 0).all() and (weights[50:] == 1).all()


# ---------------------------------------------------------------------------------------- the task


def subject_of(n=600):
  """A linear autoencoder with the true directions and the true density of the codes; 4 x 5 images."""
  rng = np.random.default_rng(0)
  w = np.linalg.qr(rng.normal(size=(20, 3)))[0]
  scale = np.sqrt([9.0, 1.0, 0.3])
  x = rng.normal(size=(n, 3)) * scale @ w.T + NOISE * rng.normal(size=(n, 20))
  net = nets.build((4, 5, 1), latent=3, hidden=(), likelihood='normal', scale=1.0)
  method = density.build(net, 0, prior=flow.build(layers=0), codes='mean')
  params = {
    'encoder': {'encoder': {'head': {'kernel': np.hstack([w, 0 * w]), 'bias': np.zeros(6)}}},
    'decoder': {'decoder': {'head': {'kernel': w.T, 'bias': np.zeros(20)}}},
    'prior': {'loc': np.zeros(3), 'factor': np.diag(np.log(scale))},
  }
  variables = {'params': jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params), 'stats': {}}
  splits = {name: ArraySource(x.astype(np.float32).reshape(n, 4, 5, 1), None, name) for name in data.SPLITS}
  take = lambda key, raw, train: {'image': jnp.asarray(raw['image'], jnp.float32)}
  return evaluation.Subject(method, variables, splits, take, KEY, 128), w, scale, x


def test_sigma_is_what_the_codes_leave_of_the_noise():
  subject, _, _, x = subject_of(4000)
  found = restoration.residual_sigma(subject)
  assert found.n == 4000
  np.testing.assert_allclose(found.value, NOISE * np.sqrt(1 - 3 / 20), rtol=0.01)
  assert abs(found.value - NOISE * np.sqrt(1 - 3 / 20)) < 4 * found.stderr


def test_restorations_of_a_linear_model_are_conditional_means():
  subject, w, scale, x = subject_of()
  findings = restoration.run(subject, images=6, starts=4, steps=200, samples=2000, noise=0.4)
  sigma = findings.results['restoration/sigma'].value
  known = np.arange(20) < 10

  def conditional(observed, seen, deviation):
    a = (w * scale)[seen]
    precision = np.eye(3) + a.T @ a / deviation**2
    return np.linalg.solve(precision, a.T @ observed[seen]) / deviation**2 @ (w * scale).T

  want = np.mean([((conditional(row, known, sigma) - row)[~known] ** 2).mean() for row in x[:6]])
  found = findings.results
  np.testing.assert_allclose(found['restoration/inpainting/mse_mode'].value, want, rtol=1e-2)
  np.testing.assert_allclose(found['restoration/inpainting/mse'].value, want, rtol=0.1)
  fill = ((x[:6] - x.mean(0))[:, ~known] ** 2).mean()
  np.testing.assert_allclose(found['restoration/inpainting/mse_mean_fill'].value, fill, rtol=1e-3)
  assert want < 0.1 * fill
  assert found['restoration/inpainting/components'].value == 1
  np.testing.assert_allclose(found['restoration/denoising/mse_observed'].value, 0.16, rtol=0.3)
  assert found['restoration/denoising/mse_mode'].value < 0.3 * found['restoration/denoising/mse_observed'].value
  assert findings.images['restoration'].array.dtype == np.uint8


@pytest.mark.parametrize('unknown', restoration.UNKNOWN)
def test_half_of_the_pixels_are_known(unknown):
  known = np.asarray(restoration._known(unknown, (3, 8, 8, 2), KEY))
  assert known.shape == (3, 8, 8, 2) and set(np.unique(known)) == {0, 1}
  assert 0.4 < known.mean() < 0.61 and (known[..., 0] == known[..., 1]).all()
  if unknown == 'random':
    assert (known[0] != known[1]).any()


def test_refusals():
  subject, _, _, _ = subject_of(8)
  for options, message in (
    (dict(unknown='left'), 'restoration.unknown'), (dict(noise=0), 'restoration.noise'), (dict(starts=0), 'restoration.starts'),
  ):  # fmt: skip
    with pytest.raises(UserError, match=message):
      restoration.run(subject, **options)
  bound = density.build(types.SimpleNamespace(), 0, prior=vae.build(), codes='mean')
  with pytest.raises(UserError, match="'restoration' needs a method with 'exact'"):
    evaluation.require(bound, 'restoration', restoration.NEEDS)
