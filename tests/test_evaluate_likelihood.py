"""Bounds on a linear-Gaussian model against its exact likelihood."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from latentgen.data.source import ArraySource
from latentgen.distributions import Independent, Normal
from latentgen.errors import UserError
from latentgen.evaluate import Subject, run_all
from latentgen.evaluate import likelihood
from latentgen.types import Trace

SIDE, DIM, NOISE = 3, 2, 0.3


@dataclasses.dataclass(frozen=True)
class Linear:
  """x | z ~ N(W z + c, s^2 I), z ~ N(0, I), q(z | x) = N(exact posterior mean + shift, (exact deviation * widen)^2)."""

  shift: float = 0.2
  widen: float = 1.2
  closed: bool = True
  samplers = ('base',)

  def _params(self):
    # Orthogonal columns make the exact posterior a product of independent normals.
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(SIDE * SIDE, DIM)))[0]
    return jnp.asarray(q * np.array([0.8, 0.4]), jnp.float32), jnp.full(SIDE * SIDE, 0.5)

  def posterior(self, x):
    w, c = self._params()
    precision = 1 + jnp.square(w).sum(0) / NOISE**2
    mean = (x.reshape(x.shape[0], -1) - c) @ w / NOISE**2 / precision
    return Normal(mean + self.shift, self.widen / jnp.sqrt(precision) * jnp.ones_like(mean))

  def decoder(self, z):
    w, c = self._params()
    loc = (z @ w.T + c).reshape(*z.shape[:-1], SIDE, SIDE, 1)
    return Independent(Normal(loc, NOISE), 3)

  def trace(self, variables, x, key, k=1):
    q, p = self.posterior(x), Normal(0.0, 1.0)
    z = q.loc + q.scale * jax.random.normal(key, (k, *q.loc.shape))
    px = self.decoder(z)
    levels = [Normal(q.loc[:, i], q.scale[:, i]) for i in range(DIM)]  # every coordinate a level of its own
    each = tuple(z[None, ..., i : i + 1] for i in range(DIM))
    kl = tuple(jnp.broadcast_to(l.kl(p), (1, k, x.shape[0])) for l in levels) if self.closed else None
    return Trace(
      eps=each,
      z=each,
      log_q=tuple(l.log_prob(z[None, ..., i]) for i, l in enumerate(levels)),
      log_p=tuple(p.log_prob(z[None, ..., i]) for i in range(DIM)),
      kl=kl,
      context=tuple(jnp.zeros_like(e) for e in each),
      prior=None,
      log_px=px.log_prob(x),
      px=px,
    )


def exact(x):
  """log p(x), by the joint normal of x."""
  w, c = (np.asarray(a, np.float64) for a in Linear()._params())
  return scipy.stats.multivariate_normal(c, w @ w.T + NOISE**2 * np.eye(SIDE * SIDE)).logpdf(x.reshape(len(x), -1))


def subject(n=13, batch_size=5, **options):
  images = np.random.default_rng(1).integers(0, 256, (n, SIDE, SIDE, 1)).astype(np.uint8)
  preprocess = lambda key, batch, train: {**batch, 'image': batch['image'].astype(jnp.float32) / 255}
  return Subject(
    method=Linear(**options),
    variables={'params': {}, 'stats': {}},
    data={'test': ArraySource(images)},
    preprocess=preprocess,
    key=jax.random.key(0),
    batch_size=batch_size,
  )


def images(s):
  return s.data['test'].take(slice(None))['image'].astype(np.float64) / 255


def test_importance_weighted_bound_reaches_the_exact_likelihood():
  s = subject(n=24, batch_size=8)
  results = run_all(s, {'likelihood': {'samples': 5000, 'chunk': 700}}).results
  iwae = results['likelihood/iwae']
  # Error of log mean w is the deviation of w / sqrt(K): with ESS/K about 0.7 an image it is 0.009, of the mean 0.002.
  assert iwae.value == pytest.approx(exact(images(s)).mean(), abs=0.01)
  assert iwae.stderr == pytest.approx(exact(images(s)).std(ddof=1) / math.sqrt(24), rel=0.02)
  assert iwae.n == 24 and iwae.unit == 'nats'
  bits = results['likelihood/iwae_bits_per_dim']
  assert bits.value == pytest.approx(-iwae.value / (math.log(2) * SIDE * SIDE)) and bits.unit == 'bits/dim'
  assert 0.2 * 5000 < results['likelihood/ess'].value < 5000


@pytest.mark.parametrize('samples', [1, 7, 8, 9])
def test_exact_posterior_gives_the_exact_likelihood_with_any_number_of_samples(samples):
  s = subject(shift=0.0, widen=1.0)
  results = run_all(s, {'likelihood': {'samples': samples, 'chunk': 4}}).results
  assert results['likelihood/iwae'].value == pytest.approx(exact(images(s)).mean(), abs=1e-4)
  assert results['likelihood/ess'].value == pytest.approx(samples, rel=1e-5)


@pytest.mark.parametrize(('samples', 'chunk'), [(10, 3), (10, 10), (12, 4), (2, 5)])
def test_chunks_hold_exactly_k_samples(samples, chunk):
  def log_weight(key, k):
    return 300 * jax.random.normal(key, (k, 2))  # over- and underflows outside log space

  key = jax.random.key(3)
  value, ess = likelihood.importance(log_weight, key, samples, chunk)
  sizes = [chunk] * (samples // chunk) + [samples % chunk] * (samples % chunk > 0)
  drawn = np.concatenate([log_weight(jax.random.fold_in(key, i), k) for i, k in enumerate(sizes)]).astype(np.float64)
  assert len(drawn) == samples
  np.testing.assert_allclose(value, scipy.special.logsumexp(drawn, 0) - math.log(samples), rtol=1e-5)
  log_ess = 2 * scipy.special.logsumexp(drawn, 0) - scipy.special.logsumexp(2 * drawn, 0)
  np.testing.assert_allclose(ess, np.exp(log_ess), rtol=1e-3)


def test_elbo_is_the_closed_form():
  s = subject(n=40, batch_size=16)
  results = run_all(s, {'likelihood': {'samples': 2, 'elbo_samples': 4000}}).results
  x = images(s)
  q = s.method.posterior(jnp.asarray(x, jnp.float32))
  loc, scale = np.asarray(q.loc, np.float64), np.asarray(q.scale, np.float64)
  kl = 0.5 * (scale**2 + loc**2 - 1) - np.log(scale)
  for i in range(DIM):
    assert results[f'kl/level{i}/group0'].value == pytest.approx(kl[:, i].mean(), rel=1e-5)
  w, c = (np.asarray(a, np.float64) for a in s.method._params())
  square = np.square(x.reshape(40, -1) - loc @ w.T - c).sum(1) + np.square(scale) @ np.square(w).sum(0)
  expected = -square / (2 * NOISE**2) - 9 * math.log(NOISE * math.sqrt(2 * math.pi))
  assert results['likelihood/rate'].value == pytest.approx(kl.sum(1).mean(), rel=1e-5)
  assert results['likelihood/reconstruction'].value == pytest.approx(expected.mean(), abs=0.02)
  assert results['likelihood/elbo'].value == pytest.approx((expected - kl.sum(1)).mean(), abs=0.02)
  assert results['likelihood/elbo'].value < exact(x).mean()
  assert results['likelihood/active_groups'].value == 2


def test_further_bounds_and_the_kl_to_the_posterior():
  s = subject(n=40, batch_size=20)
  results = run_all(s, {'likelihood': {'samples': 3000, 'chunk': 500, 'elbo_samples': 500, 'bounds': (1, 20)}}).results
  evidence, elbo = exact(images(s)).mean(), results['likelihood/elbo']
  assert results['likelihood/posterior_kl'].value == pytest.approx(evidence - elbo.value, abs=0.02)
  assert results['likelihood/iwae_1'].value == pytest.approx(elbo.value, abs=0.5)
  assert elbo.value < results['likelihood/iwae_20'].value < results['likelihood/iwae'].value + 0.02


def test_padding_counts_for_nothing():
  whole = run_all(subject(n=13, batch_size=13, shift=0.0, widen=1.0), {'likelihood': {'samples': 3}}).results
  padded = run_all(subject(n=13, batch_size=5, shift=0.0, widen=1.0), {'likelihood': {'samples': 3}}).results
  for name in ('likelihood/rate', 'likelihood/iwae', 'kl/level1/group0'):
    assert padded[name].n == 13
    assert padded[name].value == pytest.approx(whole[name].value, rel=1e-5)
    assert padded[name].stderr == pytest.approx(whole[name].stderr, rel=1e-4)
  limited = subject(n=13, batch_size=5, shift=0.0, widen=1.0)
  limited = run_all(limited, {'likelihood': {'samples': 3, 'limit': 7}}).results
  expected = exact(images(subject())[:7]).mean()
  assert limited['likelihood/iwae'].value == pytest.approx(expected, abs=1e-4) and limited['likelihood/iwae'].n == 7


def test_rate_without_closed_form_is_its_estimate():
  s = subject(n=40, batch_size=40, closed=False)
  results = run_all(s, {'likelihood': {'samples': 2, 'elbo_samples': 2000}}).results
  closed = run_all(subject(n=40, batch_size=40), {'likelihood': {'samples': 2}}).results
  assert results['likelihood/rate'].value == pytest.approx(closed['likelihood/rate'].value, abs=0.02)


def test_memory_does_not_grow_with_the_number_of_samples():
  s = subject(n=32, batch_size=32)
  x = jnp.asarray(images(s), jnp.float32)

  def temporaries(samples):
    function = likelihood.terms(s.method.trace, s.method.trace, samples, 25)
    return jax.jit(function).lower(s.variables, x, s.key).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(5000) < 1.2 * temporaries(50)


def test_same_key_same_numbers():
  first, second = (run_all(subject(), {'likelihood': {'samples': 5}}).results for _ in range(2))
  assert first == second
  other = run_all(dataclasses.replace(subject(), key=jax.random.key(1)), {'likelihood': {'samples': 5}}).results
  assert other['likelihood/iwae'] != first['likelihood/iwae']


@pytest.mark.parametrize(
  ('tasks', 'words'),
  [
    ({'likelihood': {'samples': 0}}, ['config.evaluate.likelihood.samples', '0']),
    ({'likelihood': {'samples': -3}}, ['config.evaluate.likelihood.samples', '-3']),
    ({'likelihood': {'samples': 2.5}}, ['config.evaluate.likelihood.samples']),
    ({'likelihood': {'sample': 5}}, ['config.evaluate.likelihood.sample:', "did you mean 'samples'"]),
    ({'likelyhood': {}}, ['config.evaluate.tasks', "did you mean 'likelihood'"]),
    ({'base': {}}, ['config.evaluate.tasks']),
    ({'likelihood': {'split': 'tset'}}, ['config.evaluate.likelihood.split', "did you mean 'test'"]),
    ({'likelihood': {'limit': 0}}, ['config.evaluate.likelihood.limit']),
    ({'calibration': {}}, ['config.evaluate.tasks', 'logits', 'Linear']),
    ({'partition': {}}, ['config.evaluate.tasks', 'partition', 'Linear']),
  ],
)
def test_bad_options_name_the_key(tasks, words):
  with pytest.raises(UserError) as caught:
    run_all(subject(), tasks)
  for word in words:
    assert word in str(caught.value)
  assert '\n' not in str(caught.value)
