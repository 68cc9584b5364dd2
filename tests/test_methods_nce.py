"""Noise-contrastive priors on a two-group Gaussian hierarchy, where aggregate posteriors and ratios are known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latentgen import optim
from latentgen.distributions import Independent, Normal
from latentgen.errors import UserError
from latentgen.methods import nce
from latentgen.methods.base import LatentMethod
from latentgen.priors.critics import Critic
from latentgen.priors.tilted import Tilted
from latentgen.train import step as stepping
from latentgen.types import Context, Stage, Trace, Update, ancestral

KEY = jax.random.key(0)
LOG_2 = np.log(2.0)
KL_1 = LOG_2 + (0.25 + 1.0) / 2 - 0.5  # of N(1, .5) from N(0, 1), 0.8181
KL_2 = LOG_2 + (0.25 + 1.25) / 2 - 0.5  # of N(z1, .5) from N(0, 1), averaged over z1 ~ N(1, .5)


@dataclasses.dataclass(frozen=True)
class Toy:
  """Scalars z1 and z2 with context z1; the image is [x1, x2], standard normal.

  q(z1 | x) = N(1 + .4 x1, .3) and q(z2 | z1, x) = N(z1 + .3 x2, .4), so that the aggregates are z1 ~ N(1, .5) and
  z2 | z1 ~ N(z1, .5). p(z1) = N(0, 1) and p(z2 | z1) = N(slope z1, 1), with slope 0. The decoder's mean is [z1, z2].

  Args:
    groups: 1 leaves z2 out.
    split: two levels of one group instead of one level of two.
    closed: the KL in closed form.
  """

  groups: int = 2
  split: bool = False
  closed: bool = True

  def init(self, keys, x, method):
    assert set(keys) == {'params', 'sample'} and x.shape[1:] == (1, 2, 1) and method == 'infer'
    return {
      'params': {
        'encoder': {
          'loc': jnp.array([1.0, 0.0]),
          'slope': jnp.ones(()),
          'gain': jnp.array([0.4, 0.3]),
          'scale': jnp.array([0.3, 0.4]),
        },
        'prior': {'slope': jnp.zeros(())},
      },
      'batch_stats': {'prior': {'mean': jnp.full((), 0.25)}},
    }

  def apply(self, variables, *args, train, rngs, mutable, method, **kwargs):
    assert not train and not mutable, 'contexts are those of evaluation mode'
    assert variables['batch_stats']['prior']['mean'].shape == ()
    return getattr(self, method)(variables['params'], rngs['sample'], *args, **kwargs), {}

  def infer(self, params, key, x, k):
    e = params['encoder']
    x = x.reshape(-1, 2)

    def pick(group, prior, below):
      loc = e['loc'][group] + e['slope'] * below + e['gain'][group] * x[:, group, None]
      q = Normal(loc, jnp.full(loc.shape, e['scale'][group]))
      z = q.sample(jax.random.fold_in(key, group))
      return z, {'log_q': q.log_prob(z)[..., 0], 'kl': q.kl(prior)[..., 0]}

    trace = self._run(params, (k, x.shape[0], 1), pick)
    return trace.replace(log_px=trace.px.log_prob(x[:, None, :, None]), kl=trace.kl if self.closed else None)

  def simulate(self, params, key, n, choose=ancestral):
    def pick(group, prior, below):
      level, index = (group, 0) if self.split else (0, group)
      prior, below = jax.tree.map(lambda a: a[0], (prior, below))
      return choose(level, index, prior, below, jax.random.fold_in(key, group))[None], {}

    return self._run(params, (1, n, 1), pick)

  def _run(self, params, shape, pick):
    below, found = jnp.zeros(shape), []
    for group in range(self.groups):
      prior = Normal(params['prior']['slope'] * below, jnp.ones(shape))
      z, extra = pick(group, prior, below)
      log_p = prior.log_prob(z)[..., 0]
      found.append({'z': z, 'eps': z - prior.loc, 'log_p': log_p, 'prior': prior, 'context': below, **extra})
      below = z
    stack = lambda terms: jax.tree.map(lambda *leaves: jnp.stack(leaves), *terms)
    levels = [stack([f]) for f in found] if self.split else [stack(found)]
    leaves = {name: tuple(level[name] for level in levels) for name in levels[0]}
    image = jnp.concatenate([*(f['z'] for f in found), *[jnp.zeros(shape)] * (2 - self.groups)], -1)
    px = Independent(Normal(image[..., None, :, None], jnp.ones((*shape, 2, 1))), 3)
    return Trace(**{'log_q': (), 'kl': None, **leaves}, log_px=None, px=px)


class Exact:
  """log N(z; loc + slope c, .5) - log N(z; 0, 1) + shift."""

  def init(self, key, z, context):
    del key, z, context
    return {'params': {'loc': jnp.zeros(()), 'slope': jnp.zeros(()), 'shift': jnp.zeros(())}}

  def apply(self, variables, z, context):
    p, z = variables['params'], z[..., 0]
    mean = p['loc'] + p['slope'] * context[..., 0]
    return -2.0 * jnp.square(z - mean) + LOG_2 + 0.5 * jnp.square(z) + p['shift']


def images(n, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(n, 1, 2, 1)), jnp.float32)


@functools.cache
def exact(groups=2, split=False, closed=True, shift=0.0, **options):
  """(method with the exact critic, its variables)."""
  method = nce.NCE(Toy(groups, split, closed), Tilted(Exact(), 'z'), **options)
  variables = method.init(KEY, {'image': images(2)})
  right = {'loc': [1.0, 0.0], 'slope': [0.0, 1.0], 'shift': [shift, -shift]}
  for level, tree in variables['params']['critic'].items():
    index = int(level[-1]) if split else slice(groups)
    tree['stack'] = {k: jnp.asarray(right[k])[index].reshape(tree['stack'][k].shape) for k in tree['stack']}
  return method, variables


def simulate(method, variables, n, *args):
  """(z1, z2) in numpy, and the Trace."""
  trace = jax.jit(lambda v, key: method.simulate(v, key, n, *args))(variables, KEY)
  return *np.concatenate([np.asarray(z) for z in trace.z])[:, 0, :, 0], trace


def in_context(x):
  stats = {'decoder': {'prior': {'mean': jnp.zeros(())}}}
  return Context(batch={'image': x}, key=KEY, step=jnp.zeros((), jnp.int32), stats=stats)


# ---------------------------------------------------------------------------------------- sampling with the exact ratio


@pytest.mark.parametrize('split', [False, True], ids=['one level', 'two levels'])
def test_sir_reproduces_the_aggregate_posterior(split):
  z1, z2, trace = simulate(*exact(split=split), 8000, 'sir')
  np.testing.assert_allclose([z1.mean(), z2.mean()], 1.0, atol=0.03)
  np.testing.assert_allclose([z1.std(), z2.std()], [0.5, 0.5**0.5], atol=0.02)
  assert abs(np.corrcoef(z1, z2)[0, 1] - 0.5**0.5) < 0.03
  contexts = np.concatenate([np.asarray(c) for c in trace.context])[:, 0, :, 0]
  np.testing.assert_array_equal(contexts, [np.zeros(8000), z1])  # the second group, under the choice of the first
  np.testing.assert_array_equal(trace.px.mean[0, :, 0, :, 0], np.stack([z1, z2], 1))


def test_base_sampler_and_default_sampler():
  method, variables = exact(proposals=20)
  z1, z2, _ = simulate(method, variables, 8000, 'base')
  np.testing.assert_allclose([z1.mean(), z2.mean(), np.corrcoef(z1, z2)[0, 1]], 0.0, atol=5 / np.sqrt(8000))
  z1, z2, _ = simulate(method, variables, 8000, 'base', 0.5)
  np.testing.assert_allclose([z1.std(), z2.std()], 0.5, rtol=0.05)
  default, named = (jax.jit(lambda v, s=s: method.sample(v, KEY, 5, s))(variables) for s in (None, 'sir'))
  assert default.shape == (5, 1, 2, 1)
  np.testing.assert_array_equal(default, named)
  with pytest.raises(UserError, match='sir, langevin, base'):
    method.sample(variables, KEY, 5, 'gibbs')


@pytest.mark.parametrize('eta, steps, split', [(0.01, 400, False), (0.2, 60, True)])
def test_langevin_reproduces_it_up_to_its_bias(eta, steps, split):
  """A conditional variance s^2 becomes s^2 / (1 - eta / (4 s^2)), 0.2525 or 0.3125 for 0.25; correlations stay."""
  method, variables = exact(split=split, langevin_steps=steps, step_size=eta)
  n = 6000
  z1, z2, _ = simulate(method, variables, n, 'langevin')
  variance = 0.25 / (1 - eta)
  np.testing.assert_allclose([z1.mean(), z2.mean()], 1.0, atol=0.05)
  np.testing.assert_allclose(z1.var(), variance, rtol=5 * np.sqrt(2 / n))
  np.testing.assert_allclose((z2 - z1).var(), variance, rtol=5 * np.sqrt(2 / n))
  assert abs(np.corrcoef(z1, z2)[0, 1] - 0.5**0.5) < 0.03


# ---------------------------------------------------------------------------------------- normalisers and likelihoods


def test_normalisers_of_the_exact_ratio():
  """log Z = 0; the mean estimate at M = 5, 10, 50, 500 is -0.270, -0.104, -0.0163, -0.0024; ESS / M goes to 0.3735."""
  method, variables = exact(groups=1)
  for m, b, want, atol in ((5, 20_000, -0.270, 0.03), (10, 20_000, -0.104, 0.015), (50, 20_000, -0.0163, 0.006)):
    (log_z,), (ess,) = jax.jit(lambda v, x, m=m: method.partition(v, x, KEY, m))(variables, images(b))
    assert log_z.shape == ess.shape == (1, b)
    np.testing.assert_allclose(log_z.mean(), want, atol=atol)
    assert float(log_z.mean()) < 0
  (log_z,), (ess,) = jax.jit(lambda v, x: method.partition(v, x, KEY, 500))(variables, images(2000))
  np.testing.assert_allclose(log_z.mean(), -0.0024, atol=0.006)
  np.testing.assert_allclose(ess.mean() / 500, 0.3735, atol=0.01)


def test_trace_is_under_the_tilted_prior():
  k, b = 2, 4000
  method, variables = exact(normaliser_proposals=400)
  x = images(b)
  trace = jax.jit(lambda v, x: method.trace(v, x, KEY, k))(variables, x)
  z1, z2 = np.asarray(trace.z[0], np.float64)[..., 0]  # [k, b]
  x1, x2 = np.asarray(x, np.float64).reshape(b, 2).T
  assert trace.log_p[0].shape == trace.kl[0].shape == (2, k, b)
  # The posterior is the network's.
  np.testing.assert_allclose(trace.log_q[0][0], stats.norm(1 + 0.4 * x1, 0.3).logpdf(z1), rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(trace.log_q[0][1], stats.norm(z1 + 0.3 * x2, 0.4).logpdf(z2), rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(trace.log_px, stats.norm(z1, 1).logpdf(x1) + stats.norm(z2, 1).logpdf(x2), rtol=1e-4)
  # The tilt l - log Z is in log p and, with the other sign, in the KL.
  kl = lambda m, s: -np.log(s) + (s**2 + m**2) / 2 - 0.5
  base_kl = np.stack([kl(np.broadcast_to(1 + 0.4 * x1, z1.shape), 0.3), kl(z1 + 0.3 * x2, 0.4)])
  tilt = np.asarray(trace.log_p[0]) - stats.norm.logpdf([z1, z2])
  np.testing.assert_allclose(base_kl - np.asarray(trace.kl[0]), tilt, atol=2e-3)
  ratio = np.stack([stats.norm(1, 0.5).logpdf(z1), stats.norm(z1, 0.5).logpdf(z2)]) - stats.norm.logpdf([z1, z2])
  log_z = ratio - tilt
  assert (np.abs(np.median(log_z, (1, 2))) < 0.02).all() and (log_z.mean((1, 2)) < 0).all()
  # L_NCP - L_base is KL(q || p) of the aggregates, and what is left of the KL is the mutual information with x.
  np.testing.assert_allclose(tilt.mean((1, 2)), [KL_1, KL_2], atol=0.05)
  np.testing.assert_allclose(trace.kl[0].mean((1, 2)), [np.log(0.5 / 0.3), np.log(0.5 / 0.4)], atol=0.05)
  # The importance weights see it.
  np.testing.assert_allclose(
    trace.log_weight(), trace.log_px + trace.log_p[0].sum(0) - trace.log_q[0].sum(0), rtol=1e-4, atol=1e-4
  )


def test_a_constant_in_the_logits_cancels():
  """Critics off by a constant sample and score the same; without log Z the traces would differ by the constant."""
  x = images(50)
  few = {'proposals': 20, 'chunk': 20, 'normaliser_proposals': 20}
  (method, right), (_, wrong) = exact(**few), exact(shift=0.7, **few)

  @jax.jit
  def run(v):
    return method.trace(v, x, KEY, 3), method.simulate(v, KEY, 50, 'sir'), method.partition(v, x, KEY, 9)

  (one, drawn, (log_z, ess)), (two, again, (log_z_2, ess_2)) = run(right), run(wrong)
  for a, b in zip(jax.tree.leaves((one, drawn, ess)), jax.tree.leaves((two, again, ess_2)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(log_z_2[0] - log_z[0], np.repeat([[0.7], [-0.7]], 50, 1), atol=1e-4)


def test_trace_without_a_closed_form():
  method, variables = exact(closed=False, normaliser_proposals=400)
  trace = jax.jit(lambda v, x: method.trace(v, x, KEY))(variables, images(8000))
  assert trace.kl is None
  np.testing.assert_allclose(trace.rate()[0].mean((1, 2)), [np.log(0.5 / 0.3), np.log(0.5 / 0.4)], atol=0.07)


def chance_minus_twice_jsd(q, p, z):
  """Optimum of a group's loss by the trapezoidal rule."""
  term = lambda d: np.trapezoid(d.pdf(z) * (np.logaddexp(q.logpdf(z), p.logpdf(z)) - d.logpdf(z)), z)
  return term(q) + term(p)


def test_critics_that_decide_nothing_are_half_right():
  method = nce.build(Toy(2, False, True), 10, channels=4, layers=1)
  params, ctx = method.init(KEY, {'image': images(2)})['params'], in_context(images(50))
  _, aux = method.loss(params, ctx.replace(shared=method.prepare(params, ctx)[0]))
  assert aux.metrics['accuracy_mean'] == 0.5


def test_loss_and_metrics_at_the_optimum():
  z = np.linspace(-9, 9, 4001)
  optimum_1 = chance_minus_twice_jsd(stats.norm(1, 0.5), stats.norm(), z)
  np.testing.assert_allclose(optimum_1, 0.9383, atol=5e-5)
  nodes, weights = np.polynomial.hermite_e.hermegauss(15)
  each = [chance_minus_twice_jsd(stats.norm(1 + 0.5 * node, 0.5), stats.norm(), z) for node in nodes]
  optimum_2 = weights @ each / weights.sum()
  method, variables = exact()
  ctx = in_context(images(40_000))

  @jax.jit
  def evaluate(params):
    shared, _ = method.prepare(params, ctx)
    return *method.loss(params, ctx.replace(shared=shared)), method.metrics(params, ctx)['nce']

  loss, aux, nats = evaluate(variables['params'])
  assert nats.shape == (40_000,)
  np.testing.assert_allclose([loss, nats.mean()], optimum_1 + optimum_2, atol=0.025)
  np.testing.assert_allclose(aux.metrics['nce_per_group'], loss / 2, rtol=1e-5)
  np.testing.assert_allclose(aux.metrics['nce_best_group'], min(optimum_1, optimum_2), atol=0.015)
  assert 0.7 < aux.metrics['accuracy_mean'] < 0.9
  sure = jax.tree.map(lambda p: p.at[:].set(1e3), variables['params']['critic'])
  saturated = float(evaluate({**variables['params'], 'critic': sure})[0])
  assert np.isfinite(saturated) and saturated > 1e5  # log D through the probability would overflow


# ---------------------------------------------------------------------------------------- pairs and gradients


def related():
  """Variables with q(z2 | z1) = p(z2 | z1) = N(.8 z1, 1) in the aggregate, but q(z1) = N(1, .5) and p(z1) = N(0, 1)."""
  found = Toy().init({'params': KEY, 'sample': KEY}, images(1), 'infer')['params']
  slope = jnp.float32(0.8)
  encoder = {**found['encoder'], 'slope': slope, 'gain': jnp.array([0.4, 0.6]), 'scale': jnp.array([0.3, 0.8])}
  return {'encoder': {'encoder': encoder}, 'decoder': {'prior': {'slope': slope}}}


def test_pairs_share_the_posterior_context():
  method, variables = exact(samples=3)
  params = {**variables['params'], **related()}
  ctx = in_context(images(3000)).replace(carry='kept')
  (positives, negatives, prior, context), carry = method.prepare(params, ctx)
  assert carry == 'kept'
  (z1, z2), (n1, n2), c = positives[0][..., 0], negatives[0][..., 0], context[0][1, ..., 0]
  assert z1.shape == n1.shape == c.shape == (3, 3000)
  np.testing.assert_array_equal(c, z1)
  np.testing.assert_array_equal(prior[0].loc[1, ..., 0], np.float32(0.8) * c)
  atol = 5 / np.sqrt(9000)
  np.testing.assert_allclose([n1.mean(), n1.std() - 1], 0.0, atol=atol)
  # n2 given c is N(.8 c, 1). Under contexts from the prior its mean would be 0 and not .8.
  np.testing.assert_allclose([(n2 - 0.8 * c).mean(), (n2 - 0.8 * c).std() - 1], 0.0, atol=atol)
  residuals = np.stack([a.ravel() for a in (z1 - 1, z2 - 0.8 * c, n1, n2 - 0.8 * c)])
  np.testing.assert_allclose(np.corrcoef(residuals), np.eye(4), atol=atol)  # fresh and independent noise
  again = method.prepare(params, ctx.replace(key=jax.random.key(1)))[0]
  for a, b in zip(jax.tree.leaves((positives, negatives)), jax.tree.leaves(again[:2]), strict=True):
    assert not np.isclose(a, b).all()


def test_gradient_reaches_critics_only():
  method, variables = exact()
  params, ctx = variables['params'], in_context(images(16))
  ctx = ctx.replace(shared=method.prepare(params, ctx)[0])
  assert [(u.name, u.wrt) for u in method.updates()] == [('critic', ('critic',))]
  _, grads = stepping.gradient(Update('all', ('encoder', 'decoder', 'critic'), method.loss), params, ctx)
  for group in ('encoder', 'decoder'):
    assert all((g == 0).all() for g in jax.tree.leaves(grads[group]))
  # d/d shift of sum_l [mean softplus(-l(q)) + mean softplus(l(p))] by hand.
  positives, negatives, _, context = ctx.shared
  for g in range(2):
    mean = 1.0 if g == 0 else np.asarray(context[0][1, ..., 0])
    ratio = lambda z, m=mean: -2 * (z - m) ** 2 + LOG_2 + z**2 / 2
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    q, p = (ratio(np.asarray(z[0][g, ..., 0])) for z in (positives, negatives))
    want = -sigmoid(-q).mean() + sigmoid(p).mean()
    np.testing.assert_allclose(grads['critic']['level0']['stack']['shift'][g], want, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- training


@functools.cache
def trainer(groups, steps=600, batch=2048):
  """(method, initial state, jitted state -> (state, health, losses)); the step is the training loop's own."""
  tilt = Tilted(Critic(channels=32, layers=2), 'z')
  method = nce.NCE(Toy(groups), tilt, proposals=200, normaliser_proposals=200)
  adam = optim.build('', steps, learning_rate=1e-2, final_learning_rate=1e-4)
  stage = Stage('nce', method, {'critic': adam}, steps, load={'encoder': 'vae', 'decoder': 'vae'})
  preprocess = lambda key, raw, train: raw
  step, _ = stepping.make_step(stage, preprocess)

  @jax.jit
  def run(state):
    def body(carry, i):
      raw = {'image': jax.random.normal(jax.random.fold_in(jax.random.key(7), i), (batch, 1, 2, 1))}
      state, health, metrics = step(*carry, KEY, raw)
      return (state, health), metrics['critic/loss']

    (state, health), losses = jax.lax.scan(body, (state, stepping.healthy()), jnp.arange(steps))
    return state, health, losses

  return method, stepping.init_state(stage, preprocess, KEY, {'image': images(2)}), run


@functools.cache
def trained(which):
  """(method, variables before, variables after, losses)."""
  method, state, run = trainer(2 if which == 'related' else 1)
  if which == 'related':
    state = state.replace(params={**state.params, **related()})
  elif which == 'no-op':  # q(z1) = N(0, 1): sd .6 of the mean and .8 of the noise
    encoder = {**state.params['encoder']['encoder'], 'loc': jnp.zeros(2)}
    encoder |= {'gain': jnp.array([0.6, 0.3]), 'scale': jnp.array([0.8, 0.4])}
    state = state.replace(params={**state.params, 'encoder': {'encoder': encoder}})
  after, health, losses = run(state)
  assert health['step'] == -1
  return method, stepping.evaluation_variables(state), stepping.evaluation_variables(after), np.asarray(losses)


def logit(method, variables, group, z, context):
  """One group's critic by itself, z and context [n]."""
  params = jax.tree.map(lambda p: p[group], variables['params']['critic']['level0']['stack'])
  z, context = (jnp.float32(a)[:, None] for a in (z, context))
  return np.asarray(method.tilt.critic.apply({'params': params}, z, context))


def log_ratio(z):
  """log N(z; 1, .5) / N(z; 0, 1)."""
  return stats.norm(1, 0.5).logpdf(z) - stats.norm.logpdf(z)


def test_training_finds_the_ratio():
  method, _, variables, losses = trained('toy')
  np.testing.assert_allclose(losses[0], 2 * LOG_2, rtol=1e-5)  # zero heads
  z = np.linspace(-0.2, 2.2, 25)
  np.testing.assert_allclose(logit(method, variables, 0, z, 0 * z), log_ratio(z), atol=0.15)
  ctx = in_context(images(40_000, seed=1))
  fresh = jax.jit(lambda params: method.metrics(params, ctx)['nce'])(variables['params'])
  assert abs(float(fresh.mean()) - 0.9383) < 0.02


def test_trained_prior_gains_no_more_than_the_divergence():
  """Mean of L_NCP - L_base on held-out data, KL(q || p) - KL(q || p r / Z): positive, and at most KL(q || p)."""
  method, _, variables, _ = trained('toy')
  x = images(4000, seed=2)
  trace = jax.jit(lambda v: method.trace(v, x, KEY))(variables)
  gain = float(LatentMethod(method.net).trace(variables, x, KEY).kl[0].mean() - trace.kl[0].mean())
  assert KL_1 - 0.05 < gain < KL_1 + 0.04
  z = simulate(method, variables, 8000, 'sir')[0]
  np.testing.assert_allclose([z.mean(), z.std()], [1.0, 0.5], atol=0.04)


def test_no_difference_leaves_the_prior():
  method, _, variables, _ = trained('no-op')
  z = np.linspace(-2, 2, 41)
  assert np.abs(logit(method, variables, 0, z, 0 * z)).max() < 0.1
  z = simulate(method, variables, 8000, 'sir')[0]
  np.testing.assert_allclose([z.mean(), z.std() - 1], 0.0, atol=0.06)
  (log_z,), (ess,) = jax.jit(lambda v, x: method.partition(v, x, KEY, 500))(variables, images(500))
  assert np.abs(log_z).max() < 0.05 and ess.min() > 490


def test_contexts_of_negatives_are_the_posteriors():
  """With q(z2 | z1) = p(z2 | z1) the second critic has nothing to learn, though q(z1) and p(z1) differ.

  With negatives under contexts from the prior its logit would be log q(z1) / p(z1), up to 1.36 at z1 = 4/3.
  """
  method, _, variables, _ = trained('related')
  c = np.linspace(0.2, 1.8, 17)
  np.testing.assert_allclose(logit(method, variables, 0, c, 0 * c), log_ratio(c), atol=0.15)
  grid, eps = (a.ravel() for a in np.meshgrid(c, np.linspace(-1.2, 1.2, 7)))
  got = logit(method, variables, 1, 0.8 * grid + eps, grid)
  assert np.abs(got).max() < 0.1
  np.testing.assert_allclose(log_ratio(4 / 3), 1.36, atol=1e-3)
  assert np.abs(got - log_ratio(grid)).max() > 1.0
  log_z, _ = jax.jit(lambda v, x: method.partition(v, x, KEY, 500))(variables, images(500))
  assert abs(float(log_z[0][1].mean())) < 0.05


def test_training_leaves_the_network_to_the_bit():
  for which in ('toy', 'no-op', 'related'):
    _, before, after, _ = trained(which)
    for kind, group in (('params', 'encoder'), ('params', 'decoder'), ('stats', 'decoder')):
      assert jax.tree.leaves(before[kind][group])
      jax.tree.map(np.testing.assert_array_equal, before[kind][group], after[kind][group])
    critics = (variables['params']['critic'] for variables in (before, after))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *critics)
    assert max(jax.tree.leaves(moved)) > 0.1


# ---------------------------------------------------------------------------------------- construction


def test_latents_without_a_prior_in_closed_form_are_refused():
  class Bare(Toy):
    def infer(self, *args, **kwargs):
      return super().infer(*args, **kwargs).replace(prior=None)

  with pytest.raises(UserError, match='needs location-scale latents'):
    nce.NCE(Bare(), Tilted(Exact(), 'z')).init(KEY, {'image': images(2)})


@pytest.mark.parametrize('option, value', [
  ('coordinates', 'noise'), ('proposals', 0), ('chunk', 0), ('normaliser_proposals', 0), ('samples', 0),
  ('langevin_steps', 0),
])  # fmt: skip
def test_mistakes_name_the_key(option, value):
  with pytest.raises(UserError, match=f'method.{option} is {value!r}'):
    nce.build(Toy(), 10, **{option: value})


def test_build_passes_its_options_on():
  method = nce.build(Toy(), 10, channels=8, blocks='B', layers=1, coordinates='eps', proposals=7)
  assert method.tilt == Tilted(Critic(8, 'B', 1), 'eps') and method.proposals == 7
