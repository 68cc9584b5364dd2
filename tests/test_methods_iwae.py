"""Importance-weighted estimators against the exact linear-Gaussian model z ~ N(mu, 1), x | z ~ N(z, 1), q = N(a x + b, 2/3).

At x = 1, mu = 0, a = 1/2, b = 0.3: log p(x) = -1.515512, and E log w = -1.628338. Reference values are from closed forms or
from double loops in numpy.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentgen import data, losses, nets, optim
from latentgen.data import preprocess
from latentgen.distributions import Independent, Normal
from latentgen.errors import UserError
from latentgen.evaluate import Subject, gradient_snr, run_all
from latentgen.methods import iwae, vae
from latentgen.nets import markov
from latentgen.train import step as stepping
from latentgen.types import Context, Trace

LOG_P, ELBO = -1.515512, -1.628338
IWAE_K = {2: -1.56127, 5: -1.53178, 10: -1.52328, 50: -1.51698}
KEY = jax.random.key(0)


class Conjugate(nn.Module):
  """The exact model; `mean` is that of q at x = 1 with b = 0.3, `variance` that of q."""

  variance: float = 2 / 3
  mean: float = 0.8

  def setup(self):
    self.mu = self.param('mu', nn.initializers.zeros, ())
    self.encoder = Shift(self.mean - 0.5)

  def infer(self, x, k=1, train=False):
    flat = x.reshape(1, 1, -1)
    loc = jnp.broadcast_to(0.5 * flat + self.encoder(), (1, k, x.shape[0]))[..., None]
    q = Normal(loc, jnp.full(loc.shape, self.variance**0.5))
    z = q.sample(self.make_rng('sample'))
    prior = Normal(jnp.full(z.shape, self.mu), jnp.ones(z.shape))
    px = Independent(Normal(z[0][..., None, None], jnp.ones_like(z[0][..., None, None])), 3)
    p = prior.log_prob(z).sum(-1)
    q_log = q.log_prob(z).sum(-1)
    return Trace((z - self.mu,), (z,), (q_log,), (p,), None, (z,), (prior,), px.log_prob(x), px, (q,))

  def __call__(self, x, k=1, train=False):
    return self.infer(x, k, train)


class Shift(nn.Module):
  start: float

  @nn.compact
  def __call__(self):
    return self.param('b', nn.initializers.constant(self.start), ())


def make(objective, net=None, **options):
  return iwae.build(net or Conjugate(), 1, objective=objective, **options)


X = jnp.ones((1, 1, 1, 1))


@functools.cache
def variables(net=None):
  with jax.ensure_compile_time_eval():  # kept for whoever asks next, so no part of the trace of whoever asks first
    return make('iwae', net).init(KEY, {'image': X})


def context(key, x=X):
  return Context(batch={'image': x}, key=key, step=jnp.int32(0), stats={})


def gradients(method, key=KEY, params=None, x=X):
  """{update: flat gradient over the parameters that it moves}."""
  params = variables(method.net)['params'] if params is None else params
  found, _ = stepping.gradients(method.updates(), params, context(key, x))
  return {name: jax.tree.map(jnp.negative, grads) for name, (_, grads) in found.items()}


def flat(tree):
  return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])


def mean_gradients(method, draws, seed=0):
  """Means and standard errors of d/d mu and d/d b over fresh samples."""
  found = jax.jit(jax.vmap(lambda key: {n: jax.tree.leaves(g)[0] for n, g in gradients(method, key).items()}))(
    jax.random.split(jax.random.key(seed), draws)
  )
  return {n: (float(g.mean()), float(g.std() / draws**0.5)) for n, g in found.items()}


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize('k', IWAE_K)
def test_bounds_of_the_exact_model(k):
  net = Conjugate()
  log_w = jax.jit(
    lambda key: net.apply({'params': nets.ungroup(variables()['params'])}, X.repeat(200_000, 0), k, rngs={'sample': key}).log_weight()
  )(KEY)
  bound = losses.iwae(log_w)
  assert float(bound.mean()) == pytest.approx(IWAE_K[k], abs=4 * float(bound.std()) / 200_000**0.5 + 2e-4)
  assert float(log_w.mean()) == pytest.approx(ELBO, abs=5e-3)


def test_with_the_posterior_as_q_every_bound_is_the_evidence():
  net = Conjugate(variance=0.5, mean=0.5)
  trace = net.apply({'params': nets.ungroup(variables(net)['params'])}, X, 8, rngs={'sample': KEY})
  np.testing.assert_allclose(trace.log_weight(), LOG_P, atol=1e-5)


@pytest.mark.parametrize('objective', ['stl', 'dreg'])
def test_path_gradients_vanish_at_the_posterior_sample_by_sample(objective):
  net = Conjugate(variance=0.5, mean=0.5)
  for k in (1, 6):
    found = gradients(make(objective, net, samples=k))['inference']
    np.testing.assert_allclose(flat(found), 0.0, atol=1e-6)
    assert abs(flat(gradients(make('iwae', net, samples=k))['inference'])[0]) > 1e-3


# ---------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize(
  'one, other',
  [
    (dict(objective='miwae', outer=6, samples=1), dict(objective='vae', outer=1, samples=6)),
    (dict(objective='miwae', outer=1, samples=6), dict(objective='iwae', outer=1, samples=6)),
    (dict(objective='ciwae', outer=1, samples=6, beta=1.0), dict(objective='vae', outer=1, samples=6)),
    (dict(objective='ciwae', outer=1, samples=6, beta=0.0), dict(objective='iwae', outer=1, samples=6)),
    (dict(objective='piwae', outer=1, samples=6), dict(objective='iwae', outer=1, samples=6)),
    (dict(objective='dreg', outer=1, samples=1), dict(objective='stl', outer=1, samples=1)),
  ],
)
def test_reductions(one, other):
  for a, b in zip(*(jax.tree.leaves(gradients(make(**o))) for o in (one, other)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_piwae_moves_theta_by_iwae_mk_and_phi_by_miwae():
  """And phi by nothing else: not by the sum of both, as when gradients are not cleared in between."""
  piwae, whole, parts = (gradients(make(o, outer=3, samples=4)) for o in ('piwae', 'iwae', 'miwae'))
  np.testing.assert_allclose(flat(piwae['generation']), flat(whole['generation']), rtol=1e-6)
  np.testing.assert_allclose(flat(piwae['inference']), flat(parts['inference']), rtol=1e-6)
  assert abs(flat(piwae['inference']) - flat(whole['inference'])) > 1e-3
  assert abs(flat(piwae['inference']) - flat(parts['inference']) - flat(whole['inference'])) > 1e-3


def test_samples_are_split_into_m_rows_of_k():
  method = make('miwae', outer=2, samples=7)
  log_w = jnp.asarray(np.random.default_rng(0).normal(size=(14, 3)), jnp.float32)
  by_hand = [
    np.mean([np.log(np.mean(np.exp(np.float64(log_w)[m * 7 : m * 7 + 7, b]))) for m in range(2)]) for b in range(3)
  ]
  np.testing.assert_allclose(method.bound(log_w, 'encoder'), by_hand, rtol=1e-6, atol=3e-7)


# ---------------------------------------------------------------------------------------------- estimators


def numpy_estimate(objective, k, seed, alpha=0.0):
  """The phi-gradient d/db of the exact model on given noise, written out.

  z = 0.8 + s eps; log w = -z^2/2 - (1 - z)^2/2 + eps^2/2 + const; along the path d log w / dz = -z + (1 - z) + eps / s, and
  dz/db = 1; in total the score of q cancels the last term.
  """
  s = (2 / 3) ** 0.5
  eps = np.asarray(jax.random.normal(jax.random.key(seed), (k,)), np.float64)
  z = 0.8 + s * eps
  log_w = -0.5 * z**2 - 0.5 * (1 - z) ** 2 + 0.5 * eps**2
  w = np.exp(log_w - log_w.max())
  w /= w.sum()
  path = (1 - 2 * z) + eps / s
  total = 1 - 2 * z
  return {
    'iwae': (w * total).sum(),
    'stl': (w * path).sum(),
    'dreg': (((1 - alpha) * w**2 + alpha * (w - w**2)) * path).sum(),
    'generation': (w * z).sum(),  # d log p(z) / d mu at mu = 0
  }


@pytest.mark.parametrize('objective, alpha', [('iwae', 0.0), ('stl', 0.0), ('dreg', 0.0), ('dreg', 0.9), ('dreg', 1.0)])
def test_gradients_on_given_noise(objective, alpha, monkeypatch):
  k, seed = 5, 3
  noise = jax.random.normal(jax.random.key(seed), (k,))
  monkeypatch.setattr(Normal, 'sample', lambda self, key: self.loc + self.scale * noise[None, :, None, None])
  found = gradients(make(objective, samples=k, alpha=alpha))
  expected = numpy_estimate(objective, k, seed, alpha)
  np.testing.assert_allclose(flat(found['inference']), expected[objective], rtol=1e-5)
  np.testing.assert_allclose(flat(found['generation']), expected['generation'], rtol=1e-5)


ESTIMATORS = {
  'stl': (losses.sticking_the_landing, lambda w: w),
  'dreg': (losses.doubly_reparameterised, lambda w: w**2),
  'rws': (lambda log_w: losses.doubly_reparameterised(log_w, 1.0), lambda w: w - w**2),
}


@pytest.mark.parametrize('name', ESTIMATORS)
def test_samples_of_no_weight_leave_the_others_alone(name):
  estimator, weights = ESTIMATORS[name]
  log_w = np.array([[-np.inf, -np.inf, 0.3], [0.5, -np.inf, -1.0], [-2.0, -np.inf, 1.2]])
  w = np.exp(log_w) / np.maximum(np.exp(log_w).sum(0), 1e-300)
  want = np.where(w > 0, weights(w) * np.where(w > 0, log_w, 0.0), 0.0).sum(0)
  np.testing.assert_allclose(estimator(jnp.float32(log_w)), [want[0], -np.inf, want[2]], rtol=1e-5)
  grad = jax.grad(lambda a: estimator(a).sum())(jnp.float32(log_w))
  np.testing.assert_allclose(grad, weights(w), rtol=1e-5, atol=1e-7)
  assert np.isnan(estimator(jnp.array([[jnp.nan], [0.0]])))[0]  # and what is broken stays visible


@pytest.mark.parametrize('name', ESTIMATORS)
def test_bfloat16_weights_are_taken_in_float32(name):
  estimator, weights = ESTIMATORS[name]
  log_w = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 2)), jnp.bfloat16)
  exact = np.asarray(log_w, np.float64)
  w = np.exp(exact) / np.exp(exact).sum(0)
  found = estimator(log_w)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, (weights(w) * exact).sum(0), rtol=1e-4)


@pytest.mark.parametrize('k', [1, 2, 8])
def test_dreg_is_unbiased_and_stl_only_for_one_sample(k):
  draws = 100_000
  found = {o: mean_gradients(make(o, samples=k), draws, seed)['inference'] for seed, o in enumerate(('iwae', 'dreg', 'stl'))}
  error = lambda o: abs(found[o][0] - found['iwae'][0]) / np.hypot(found[o][1], found['iwae'][1])
  assert error('dreg') < 4
  assert error('stl') < 4 if k == 1 else error('stl') > 8


@pytest.mark.slow
def test_slopes_of_the_signal_to_noise_ratio():
  """The closed-form asymptotics: -1/2 for IWAE's inference network, +1/2 for all else; +1/2 in M."""
  ks = (4, 16, 64)
  ratio = lambda objective, m, k, draws: gradient_snr.snr(
    make(objective, outer=m, samples=k), variables()['params'], {}, {'image': X}, jax.random.key(k), draws, 4000
  )
  slopes = {}
  for objective, draws in (('iwae', 3_000_000), ('stl', 100_000), ('dreg', 100_000)):
    found = [jax.device_get(ratio(objective, 1, k, draws)) for k in ks]
    for update in found[0]:
      slopes[objective, update] = np.polyfit(np.log(ks), np.log([f[update] for f in found]), 1)[0]
  assert slopes.pop(('iwae', 'inference')) == pytest.approx(-0.5, abs=0.08)
  for slope in slopes.values():
    assert slope == pytest.approx(0.5, abs=0.08)
  found = [jax.device_get(ratio('miwae', m, 4, 400_000)) for m in (1, 16)]
  for update in found[0]:
    assert np.log(found[1][update] / found[0][update]) / np.log(16) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize('m', [1, 9])
def test_signal_to_noise_ratio_of_a_mean(m):
  """With one sample a weight the gradient of mu is z ~ N(0.8, 2/3), averaged over M."""
  method = make('vae', outer=m, samples=1)
  found = gradient_snr.snr(method, variables()['params'], {}, {'image': X}, KEY, 40_000, 4000)
  expected = 0.8 / np.sqrt(2 / 3 / m)
  assert float(found['generation']) == pytest.approx(expected, rel=0.02)


def subject(method):
  source = data.load('toy', kind='factors', dims=4, components=2, train=64, valid=8, test=8)
  batch = preprocess.make()(KEY, source['train'].take(slice(0, 8)), True)
  return Subject(method, method.init(KEY, batch), source, preprocess.make(), KEY, batch_size=8)


def test_the_task_reports_ratios_and_slopes():
  net = markov.build((1, 4, 1), latents=(2,), hidden=((),), likelihood='normal', scale=0.5)
  options = dict(draws=350, chunk=100, inner=(1, 8), outer=(1, 4), objectives=('iwae', 'dreg'))
  findings = run_all(subject(make('iwae', net)), {'gradient_snr': options})
  names = {name.removeprefix('gradient_snr/') for name in findings.results}
  for objective, letter, counts in (('iwae', 'k', (1, 8)), ('dreg', 'k', (1, 8)), ('miwae', 'm', (1, 4))):
    for update in ('generation', 'inference'):
      assert {f'{objective}/{update}/{letter}{n}' for n in counts} <= names
  ratio = [findings.results[f'gradient_snr/miwae/generation/m{m}'].value for m in (1, 4)]
  slope = findings.results['gradient_snr/miwae/generation/slope_m'].value
  assert slope == pytest.approx(np.log(ratio[1] / ratio[0]) / np.log(4))
  picture = findings.images['gradient_snr']
  assert picture.array.dtype == np.uint8
  assert findings.results['gradient_snr/iwae/inference/k8'].n == 400 and '400 draws' in picture.caption  # whole chunks


def test_two_gradients_are_enough_for_a_ratio():
  net = markov.build((1, 4, 1), latents=(2,), hidden=((),), likelihood='normal', scale=0.5)
  options = dict(draws=2, chunk=1, inner=(1, 2), outer=(1, 2), objectives=('iwae',))
  results = run_all(subject(make('iwae', net)), {'gradient_snr': options}).results
  assert all(np.isfinite(result.value) for result in results.values())
  assert results['gradient_snr/iwae/inference/k2'].n == 2


@pytest.mark.parametrize(
  'options, words',
  [
    ({'draws': 1, 'chunk': 1}, 'config.evaluate.gradient_snr.draws: must be an integer of at least 2, not 1'),
    ({'inner': (4,)}, 'config.evaluate.gradient_snr.inner'),
    ({'objectives': ('iwea',)}, 'config.evaluate.gradient_snr.objectives'),
  ],
)
def test_bad_options_of_the_task_name_their_key(options, words):
  net = markov.build((1, 4, 1), latents=(2,), hidden=((),), likelihood='normal')
  with pytest.raises(UserError, match=words):
    run_all(subject(make('iwae', net)), {'gradient_snr': options})


def test_the_task_refuses_other_methods():
  net = markov.build((1, 4, 1), latents=(2,), hidden=((),), likelihood='normal')
  with pytest.raises(UserError, match="'gradient_snr' needs methods.iwae, not VAE"):
    run_all(subject(vae.build(net, 10)), {'gradient_snr': {}})


def test_stairs_hold_each_rate_three_times_as_long():
  """Burda et al.: 3^i epochs at 0.001 * 10^(-i / 7), i = 0 .. 7."""
  optimiser = optim.build('o', 3280, 'sgd', learning_rate=1e-3, final_learning_rate=1e-4, schedule='stairs')

  def step(state, _):
    change, state = optimiser.update({'x': jnp.ones(())}, state)
    return state, -change['x']

  rates = np.asarray(jax.lax.scan(step, optimiser.init({'x': jnp.zeros(())}), None, 3280)[1])
  expected = np.concatenate([np.full(3**i, 1e-3 * 10 ** (-i / 7)) for i in range(8)])
  np.testing.assert_allclose(rates, expected, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- the networks


def test_markov_chain_of_two_latents_has_the_density_that_it_says():
  net = markov.build((2, 2, 1), latents=(3, 2), hidden=((5,), (4,)))
  x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, 2, 2, 1)), jnp.float32)
  params = net.init({'params': KEY, 'sample': KEY}, x)
  trace = net.apply(params, x, 6, rngs={'sample': jax.random.key(1)})
  assert [z.shape for z in trace.z] == [(1, 6, 4, 2), (1, 6, 4, 3)]
  assert trace.kl is None and trace.context[0].shape == (1, 6, 4, 0)
  for z, eps, prior, log_p in zip(trace.z, trace.eps, trace.prior, trace.log_p, strict=True):
    np.testing.assert_allclose(prior.loc + prior.scale * eps, z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Normal(prior.loc, prior.scale).log_prob(z).sum(-1), log_p, rtol=1e-5)
  np.testing.assert_array_equal(trace.prior[0].loc, 0)
  # The generative pass with these latents gives the same decoder and the same conditional prior.
  again = net.apply(
    params, 4, lambda level, *_: trace.z[level][0, 2], method='simulate', rngs={'sample': KEY}
  )
  np.testing.assert_allclose(again.px.mean[0], trace.px.mean[2], rtol=1e-5)
  np.testing.assert_allclose(again.prior[1].loc[0, 0], trace.prior[1].loc[0, 2], rtol=1e-5, atol=1e-6)


def test_decoder_starts_at_the_mean_of_the_first_batch():
  net = markov.build((1, 3, 1), latents=(2,), hidden=((4,),))
  x = jnp.asarray([[1, 0, 1], [1, 0, 0]], jnp.float32).reshape(2, 1, 3, 1)
  params = net.init({'params': KEY, 'sample': KEY}, x)['params']
  rate = x.mean()
  expected = [(2 + rate) / 3, rate / 3, (1 + rate) / 3]
  np.testing.assert_allclose(jax.nn.sigmoid(params['decoder']['head']['bias']), np.ravel(expected), rtol=1e-5)


def test_one_latent_has_the_closed_form_kl():
  net = markov.build((2, 2, 1), latents=(2,), hidden=((5,),))
  x = jnp.ones((1, 2, 2, 1))
  params = net.init({'params': KEY, 'sample': KEY}, x)
  trace = net.apply(params, x, 50_000, rngs={'sample': KEY})
  sampled = trace.log_q[0] - trace.log_p[0]
  assert float(sampled.mean()) == pytest.approx(float(trace.kl[0].mean()), abs=4 * float(sampled.std()) / 50_000**0.5)


@pytest.mark.parametrize('objective', ['stl', 'dreg'])
def test_path_estimators_refuse_a_hierarchy(objective):
  net = markov.build((2, 2, 1), latents=(3, 2), hidden=((5,), (4,)))
  with pytest.raises(UserError, match='config.model: the estimator'):
    make(objective, net).init(KEY, {'image': jnp.ones((2, 2, 2, 1))})
  assert 'encoder' in make('piwae', net, outer=2).init(KEY, {'image': jnp.ones((2, 2, 2, 1))})['params']


@pytest.mark.parametrize(
  'options, key',
  [({'objective': 'iwea'}, 'objective'), ({'samples': 0}, 'samples'), ({'outer': 0}, 'outer'), ({'beta': 1.5}, 'beta')],
)
def test_bad_options_name_their_key(options, key):
  with pytest.raises(UserError, match=f'method.{key}'):
    iwae.build(Conjugate(), 1, **options)


@pytest.mark.parametrize('options, key', [({'latents': ()}, 'latents'), ({'latents': (3, 2)}, 'hidden'), ({'scale': 0.0}, 'scale')])
def test_bad_chains_name_their_key(options, key):
  with pytest.raises(UserError, match=f'model.{key}'):
    markov.build((2, 2, 1), **options)


@pytest.mark.parametrize('objective, most', [('iwae', 1.05), ('piwae', 1.4), ('dreg', 1.4)])
def test_both_updates_are_one_forward_pass(objective, most):
  """One backward pass as well, where both ascend the same; else two of which each leaves out the other's weights: 4 / 3.

  Inside a loop, as in a batch that is split: there the compiler would not merge two passes.
  """
  net = markov.build((8, 8, 1), latents=(8,), hidden=((64, 64),))
  method, single = (make(o, net, samples=8, outer=2) for o in (objective, 'iwae'))
  x = jnp.ones((16, 8, 8, 1))
  params = jax.jit(lambda: method.init(KEY, {'image': x}))()['params']

  def flops(function):
    many = jax.jit(lambda params: jax.lax.map(functools.partial(function, params), jax.random.split(KEY, 2)))
    return many.lower(params).compile().cost_analysis()['flops']

  one = flops(lambda params, key: jax.grad(lambda p: single.loss(p, context(key, x))[0])(params))
  assert flops(lambda params, key: gradients(method, key, params, x)) < most * one
