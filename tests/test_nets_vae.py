"""The plain VAE, against linear-Gaussian closed forms where there are any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latentgen import nets
from latentgen.errors import UserError
from latentgen.nets import vae

KEYS = {'params': jax.random.key(0), 'sample': jax.random.key(1)}
SIGMA = 0.5


def linear():
  """A linear-Gaussian VAE with given weights, images, and their exact log p(x)."""
  rng = np.random.default_rng(0)
  w, b = rng.normal(size=(2, 4)), rng.normal(size=4)
  x = rng.normal(size=(3, 4))
  precision = np.eye(2) + w @ w.T / SIGMA**2
  gain = np.linalg.solve(precision, w) / SIGMA**2  # posterior mean of z is gain (x - b)
  log_scale = -0.5 * np.log(np.diag(precision)) + 0.3  # wider than the best diagonal q
  encoder = {'kernel': np.concatenate([gain.T, np.zeros((4, 2))], 1), 'bias': np.concatenate([-gain @ b, log_scale])}
  params = {'encoder': {'head': encoder}, 'decoder': {'head': {'kernel': w, 'bias': b}}}
  exact = stats.multivariate_normal(b, w.T @ w + SIGMA**2 * np.eye(4)).logpdf(x)
  net = vae.build((2, 2, 1), latent=2, hidden=(), likelihood='normal', scale=SIGMA)
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
  return net, params, x.reshape(3, 2, 2, 1).astype(np.float32), exact


def test_many_samples_recover_the_exact_likelihood():
  net, params, x, exact = linear()
  shapes = jax.eval_shape(lambda: net.init(KEYS, x))['params']
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
  infer = jax.jit(lambda key: net.apply({'params': params}, x, k=40_000, rngs={'sample': key}))
  trace = infer(jax.random.key(0))
  log_w = np.asarray(trace.log_weight(), np.float64)  # [k, b]

  def bound(k):
    split = log_w.reshape(-1, k, 3)
    return (np.log(np.exp(split - split.max(1, keepdims=True)).mean(1)) + split.max(1)).mean(0)

  np.testing.assert_allclose(bound(len(log_w)), exact, atol=0.02)
  bounds = np.stack([bound(k) for k in (1, 5, 50, 1000)])
  assert (np.diff(bounds, axis=0) > 0).all() and (bounds[-1] <= exact + 0.02).all()
  elbo = trace.log_px.mean(0) - trace.kl[0][0].mean(0)
  np.testing.assert_allclose(elbo, bounds[0], atol=0.03)


def test_closed_form_kl_and_log_prob():
  net, params, x, _ = linear()
  trace = net.apply({'params': params}, x, k=2, rngs={'sample': jax.random.key(0)})
  head, out = (jax.tree.map(np.asarray, params[name]['head']) for name in ('encoder', 'decoder'))
  raw = x.reshape(3, 4) @ head['kernel'] + head['bias']
  loc, scale = raw[:, :2], np.exp(raw[:, 2:])
  np.testing.assert_allclose(trace.kl[0][0, 0], (0.5 * (loc**2 + scale**2 - 1) - np.log(scale)).sum(1), rtol=1e-4)
  z = np.asarray(trace.z[0][0])
  np.testing.assert_allclose(trace.log_q[0][0], stats.norm(loc, scale).logpdf(z).sum(-1), rtol=1e-4)
  np.testing.assert_allclose(trace.log_p[0][0], stats.norm.logpdf(z).sum(-1), rtol=1e-4)
  np.testing.assert_array_equal(trace.eps[0], trace.z[0])
  mean = z @ out['kernel'] + out['bias']
  want = stats.norm(mean, SIGMA).logpdf(x.reshape(3, 4)).sum(-1)
  np.testing.assert_allclose(trace.log_px, want, rtol=1e-4)


@pytest.mark.parametrize(
  ('likelihood', 'conv', 'scale'),
  [
    ('bernoulli', False, 1.0),
    ('normal', False, 'learned'),
    ('normal', True, 'image'),
    ('normal', True, 'pixel'),
    ('dmol', True, 1.0),
  ],
)
def test_shapes(likelihood, conv, scale):
  channels = 3 if likelihood == 'dmol' else 1
  shape = (5, 6, channels)
  options = dict(likelihood=likelihood, scale=scale, mixtures=2, dtype='bfloat16')
  net = vae.build(shape, latent=3, hidden=(4, 6), conv=conv, **options)
  x = jnp.zeros((2, *shape))

  def run():
    variables = net.init(KEYS, x)
    trace = net.apply(variables, x, k=4, rngs=KEYS)
    sample = net.apply(variables, 7, temperature=0.5, rngs=KEYS, method='simulate')
    image = net.apply(variables, 7, rngs=KEYS, method='generate').mean
    return variables, trace, trace.px.mean, trace.log_weight(), sample, image

  variables, trace, mean, log_w, sample, image = jax.eval_shape(run)
  assert set(variables) == {'params'} and set(nets.groups(variables['params'])['encoder']) == {'encoder'}
  assert trace.z[0].shape == trace.prior[0].loc.shape == (1, 4, 2, 3) and trace.context[0].shape == (1, 4, 2, 0)
  assert trace.kl[0].shape == trace.log_q[0].shape == trace.log_p[0].shape == (1, 4, 2)
  assert trace.log_px.shape == log_w.shape == (4, 2) and log_w.dtype == jnp.float32
  assert mean.shape == (4, 2, *shape) and image.shape == (7, *shape)
  assert sample.z[0].shape == (1, 1, 7, 3) and sample.kl is None and sample.log_q == () and sample.log_px is None


def test_learned_noise_has_a_soft_floor():
  net = vae.build((2, 2, 1), latent=1, hidden=(), likelihood='normal', scale='learned')
  _, params, _, _ = linear()
  z = jnp.zeros((1, 1))
  params = jax.tree.map(lambda a: a[:1] if a.ndim == 2 and a.shape[0] == 2 else a, params)
  for log_scale, want in ((0.0, 0.0), (-1.0, -1.0), (-100.0, -6.0)):
    scale = net.apply({'params': params | {'log_scale': jnp.asarray(log_scale)}}, z, method='decode').base.scale
    np.testing.assert_allclose(np.log(scale), want, atol=0.01)


def test_choose_and_temperature():
  net, params, _, _ = linear()
  seen = []

  def choose(level, group, prior, context, key):
    seen.append((level, group, prior.loc.shape, float(prior.scale[0, 0]), context.shape))
    return jnp.ones((5, 2))

  trace = net.apply({'params': params}, 5, choose, 0.5, rngs={'sample': jax.random.key(0)}, method='simulate')
  assert seen == [(0, 0, (5, 2), 0.5, (5, 0))]
  np.testing.assert_allclose(trace.log_p[0], 2 * stats.norm.logpdf(1.0), rtol=1e-5)


def test_mistakes_name_the_key():
  wrong = {'likelihood': 'bernouli', 'activation': 'relo', 'scale': 'learnt', 'dtype': 'float16'}
  for key, value in wrong.items():
    with pytest.raises(UserError, match=f'model.{key}'):
      vae.build((4, 4, 1), **{key: value})
  with pytest.raises(UserError, match='model.hidden'):
    vae.build((4, 4, 1), conv=True, hidden=())
