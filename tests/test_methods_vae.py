"""The VAE's loss against numpy on given traces, BatchNorm re-adjustment, and the optimisers a stage names."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latentgen import optim
from latentgen.distributions import Independent, Normal
from latentgen.errors import UserError
from latentgen.methods import vae
from latentgen.nets import nvae
from latentgen.nets.layers import batch_norm
from latentgen.train import step as stepping
from latentgen.types import Context, Trace, ancestral

KEY = jax.random.key(0)
STEPS = 100
WARMUP = {'steps': STEPS, 'warmup_portion': 0.6, 'warmup_start': 0.1}
RAMP = {0: 1e-4, 10: 1e-4, 40: 0.5, 69: 59 / 60, 70: 1.0, 99: 1.0}  # step -> weight of the KL over beta


# ---------------------------------------------------------------------------------------- the loss on a given trace


@dataclasses.dataclass(frozen=True)
class Given:
  """A network whose trace is `numbers`, its KL times one parameter of the encoder, log p(x|z) plus one of the decoder.

  Two levels: two groups of 2x2 maps, one group of 4x4 maps; k = 2 samples, b = 3 images.
  """

  closed: bool = True

  def init(self, keys, x, method):
    del keys, x, method
    rng = np.random.default_rng(5)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)
    return {
      'params': {
        'encoder': {'a': jnp.ones(()), 'conv': {'kernel': kernel}},
        'shift': jnp.zeros(()),
        'BatchNorm_0': {'scale': jnp.array([0.5, -2.0])},
      }
    }

  def apply(self, variables, x, k, train, rngs, mutable, method):
    assert method == 'infer' and x.shape == (3, 1, 1, 1) and k == 2
    del rngs, mutable, train
    params = variables['params']
    kl, log_px = numbers()
    kl = tuple(params['encoder']['a'] * jnp.float32(level) for level in kl)
    z = tuple(jnp.zeros((*level.shape, side, side, 3)) for level, side in zip(kl, (2, 4), strict=True))
    base = tuple(jnp.full(level.shape, -7.0) for level in kl)
    trace = Trace(
      z, z, tuple(b + r for b, r in zip(base, kl, strict=True)), base, kl if self.closed else None, z, None,
      params['shift'] + jnp.float32(log_px), None,
    )  # fmt: skip
    return trace, {}


def numbers():
  """(KL per level [g, k, b], log p(x|z) [k, b]); without a closed form one-sample KLs may be negative."""
  rng = np.random.default_rng(3)
  levels = rng.uniform(0.0, 3.0, (2, 2, 3)), rng.uniform(-0.5, 0.5, (1, 2, 3)) + 9.0
  levels[0][1] *= 0.02  # a group with next to nothing in it
  return levels, rng.normal(size=(2, 3)) * 5 - 20


def per_group():
  """KL [l, b] and log p(x|z) [b], averaged over k."""
  levels, log_px = numbers()
  return np.concatenate([level.mean(1) for level in levels]), log_px.mean(0)


def balance(kl, alpha=(1.0, 1.0, 8.0)):
  """gamma by a loop: alpha is 4^s / G_s over its minimum, (1/2, 1/2, 4) * 2."""
  share = [(np.mean([abs(v) for v in row]) + 0.01) / a for row, a in zip(kl, alpha, strict=True)]
  return np.array(share) / (sum(share) / len(share))


def loss_of(step, closed=True, **options):
  """(loss, Aux, gradient) of the method's only update, through the training step's own gradient."""
  method = vae.VAE(Given(closed), samples=2, **options)
  batch = {'image': jnp.zeros((3, 1, 1, 1))}
  variables = method.init(KEY, batch)
  ctx = Context(batch=batch, key=KEY, step=jnp.asarray(step, jnp.int32), stats=variables['stats'])
  (update,) = method.updates()
  assert update.wrt == ('encoder', 'decoder')
  (loss, aux), grads = stepping.gradient(update, variables['params'], ctx)
  return float(loss), aux, grads


@pytest.mark.parametrize('step', RAMP)
@pytest.mark.parametrize('balanced', [False, True])
def test_loss_by_hand(step, balanced):
  kl, log_px = per_group()
  gamma = balance(kl) if balanced and RAMP[step] < 1 else np.ones(3)
  np.testing.assert_allclose(gamma.mean(), 1.0)
  beta = 2.5 * RAMP[step]
  loss, aux, grads = loss_of(step, beta=2.5, balance=balanced, **WARMUP)
  rate = (gamma[:, None] * kl).sum(0).mean()
  np.testing.assert_allclose(loss, beta * rate - log_px.mean(), rtol=1e-5)
  np.testing.assert_allclose(aux.metrics['beta'], beta, rtol=1e-5)
  # No gradient through gamma: the KL's scale moves the loss as if gamma were a constant.
  np.testing.assert_allclose(grads['encoder']['encoder']['a'], beta * rate, rtol=1e-5)
  np.testing.assert_allclose(grads['decoder']['shift'], -1.0, rtol=1e-6)


def test_balance_matters_before_the_end_of_the_warmup_only():
  kl, _ = per_group()
  assert np.abs(balance(kl) - 1).max() > 0.3
  mid, end = (loss_of(s, balance=True, **WARMUP)[0] - loss_of(s, **WARMUP)[0] for s in (40, 70))
  assert abs(mid) > 0.1 and end == 0.0


def test_without_warmup_the_weight_is_beta_from_the_start():
  kl, log_px = per_group()
  loss, aux, _ = loss_of(0, beta=0.5, balance=True, steps=STEPS)
  np.testing.assert_allclose(loss, 0.5 * kl.sum(0).mean() - log_px.mean(), rtol=1e-5)
  assert aux.metrics['beta'] == 0.5


@pytest.mark.parametrize('options', [{}, {'beta': 4.0}, {'balance': True, **WARMUP}, {'free_bits': 2.0}])
def test_metrics_are_those_of_the_plain_bound(options):
  kl, log_px = per_group()
  _, aux, _ = loss_of(20, **options)
  found = [aux.metrics[name] for name in ('elbo', 'kl', 'log_px')]
  np.testing.assert_allclose(found, [(log_px - kl.sum(0)).mean(), kl.sum(0).mean(), log_px.mean()], rtol=1e-5)
  assert 'spectral' not in aux.metrics


def test_free_bits_floor_each_group():
  """Every group and image pays at least the floor; below it no gradient."""
  kl, log_px = per_group()
  loss, _, grads = loss_of(0, free_bits=1.2)
  assert (kl < 1.2).any() and (kl > 1.2).any()
  np.testing.assert_allclose(loss, np.maximum(kl, 1.2).sum(0).mean() - log_px.mean(), rtol=1e-5)
  np.testing.assert_allclose(grads['encoder']['encoder']['a'], np.where(kl > 1.2, kl, 0).sum(0).mean(), rtol=1e-5)


def test_rate_without_a_closed_form_is_log_q_minus_log_p():
  closed, open_ = loss_of(40, beta=2.0, **WARMUP)[0], loss_of(40, closed=False, beta=2.0, **WARMUP)[0]
  np.testing.assert_allclose(open_, closed, rtol=1e-5)


def test_spectral_weight_is_geometric_along_the_warmup():
  """At half of the warm-up the weight is sqrt(first last)."""
  kernel = np.asarray(Given().init(None, None, None)['params']['encoder']['conv']['kernel'])
  penalty = np.linalg.svd(kernel.reshape(18, 4), compute_uv=False)[0] + 2.0  # and the largest scale of BatchNorm
  for step, ramp in RAMP.items():
    loss, aux, grads = loss_of(step, spectral=(1.0, 0.01), **WARMUP)
    plain, _, _ = loss_of(step, **WARMUP)
    weight = 10 ** (-2 * ramp)
    np.testing.assert_allclose(aux.metrics['spectral'], penalty, rtol=1e-3)
    np.testing.assert_allclose(loss - plain, weight * penalty, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(grads['decoder']['BatchNorm_0']['scale'], [0.0, -weight], rtol=1e-4)
    assert set(aux.stats) == {'spectral'}  # singular vectors go on to the next step
    u = next(iter(aux.stats['spectral'].values()))[0]
    np.testing.assert_allclose(np.linalg.norm(u), 1.0, rtol=1e-4)


def test_metrics_are_per_image():
  kl, log_px = per_group()

  class Two(Given):
    def apply(self, variables, x, k, **kwargs):
      assert k == 1
      return super().apply(variables, x, 2, **kwargs)

  method = vae.VAE(Two(), beta=7.0, steps=STEPS)
  batch = {'image': jnp.zeros((3, 1, 1, 1))}
  variables = method.init(KEY, batch)
  ctx = Context(batch=batch, key=KEY, step=jnp.zeros((), jnp.int32), stats=variables['stats'])
  found = method.metrics(variables['params'], ctx)
  np.testing.assert_allclose(found['nelbo'], kl.sum(0) - log_px, rtol=1e-5)
  np.testing.assert_allclose(found['kl'], kl.sum(0), rtol=1e-5)


# ---------------------------------------------------------------------------------------- weights of the groups


def shaped(*shapes):
  """A Trace that knows the shapes of its latents only."""
  z = tuple(np.broadcast_to(np.float32(0), shape) for shape in shapes)
  return Trace(z, z, (), (), None, (), None, None, None)


@pytest.mark.parametrize('groups, want', [
  ((4, 4, 4, 8, 16), (1, 4, 16, 32, 64)),  # fine to coarse [16, 8, 4, 4, 4]
  ((5, 10, 20), (1, 2, 4)),
  ((5, 10), (1, 2)),
  ((30,), (1,)),
])  # fmt: skip
def test_balance_alpha_of_published_shapes(groups, want):
  trace = shaped(*((g, 1, 1, 8 * 2**s, 8 * 2**s, 20) for s, g in enumerate(groups)))
  each = [a for a, g in zip(want, groups, strict=True) for _ in range(g)]
  np.testing.assert_allclose(vae.balance_alpha(trace), each)
  np.testing.assert_allclose(nvae.kl_balance_alpha(groups), each)


def test_balance_alpha_of_other_latents():
  np.testing.assert_allclose(vae.balance_alpha(shaped((1, 2, 3, 16))), [1.0])  # vectors
  np.testing.assert_allclose(vae.balance_alpha(shaped((2, 2, 3, 5), (1, 2, 3, 9))), [1.0, 1.0, 2.0])
  np.testing.assert_allclose(vae.balance_alpha(shaped((1, 1, 1, 2, 3, 4), (3, 1, 1, 4, 6, 4))), [1.0] + 3 * [4 / 3])


def test_balance_alpha_of_the_network_itself():
  options = dict(latent=2, channels=4, pre_blocks=0, cells_encoder=1, cells_decoder=1)
  net = nvae.build((8, 8, 1), groups=(1, 3), **options)
  x = jnp.zeros((1, 8, 8, 1))
  trace = jax.eval_shape(lambda key: net.init_with_output({'params': key, 'sample': key}, x, method='infer')[0], KEY)
  np.testing.assert_allclose(vae.balance_alpha(shaped(*(z.shape for z in trace.z))), nvae.kl_balance_alpha(net.groups))


@pytest.mark.parametrize('value', [(0.1,), (0.0, 0.1), (0.1, 0.0), (-1.0, 1.0), (0.1, 0.1, 0.1)])
def test_spectral_weights_that_cannot_be(value):
  with pytest.raises(UserError, match='method.spectral needs two weights'):
    vae.build(Given(), 10, spectral=value)
  assert vae.build(Given(), 10, spectral=[0.1, 0.01]).spectral == (0.1, 0.01)
  assert vae.build(Given(), 10).steps == 10


# ---------------------------------------------------------------------------------------- BatchNorm at a temperature


class Part(nn.Module):
  """y = BatchNorm(3 x + 2)."""

  train: bool

  @nn.compact
  def __call__(self, x):
    gain = self.param('gain', nn.initializers.constant(3.0), ())
    return batch_norm(self.train)(gain * x + 2.0)


class Normalised(nn.Module):
  """One number, z ~ N(1, 2^2) a priori and N(encoder(x), .1^2) given x; encoder and decoder are `Part`s. One sample."""

  normalise: bool = True

  def infer(self, x, k=1, train=False):
    assert k == 1
    return self.run(x, x.shape[0], train, None)

  def simulate(self, n, choose=ancestral, temperature=1.0, train=False):
    assert temperature == 1.0
    return self.run(None, n, train, choose)

  @nn.compact
  def run(self, x, n, train, choose):
    ones = jnp.ones((n, 1, 1, 1))
    prior, key, terms = Normal(ones, 2.0 * ones), self.make_rng('sample'), {'log_q': (), 'kl': None}
    if x is None:
      z = choose(0, 0, prior, ones, key)
    else:
      q = Normal(Part(train, name='encoder')(x), 0.1 * ones)
      z = q.sample(key)
      terms = {'log_q': (q.log_prob(z)[None, None, :, 0, 0, 0],), 'kl': (q.kl(prior)[None, None, :, 0, 0, 0],)}
    y = Part(train, name='decoder')(z) if self.normalise else z
    px = Independent(Normal(y[None], ones[None]), 3)
    lift = lambda tree: (jax.tree.map(lambda a: a[None, None], tree),)
    return Trace(
      eps=lift((z - prior.loc) / prior.scale),
      z=lift(z),
      log_p=lift(prior.log_prob(z)[:, 0, 0, 0]),
      context=lift(ones),
      prior=lift(prior),
      log_px=None if x is None else px.log_prob(x),
      px=px,
      **terms,
    )


def normalised():
  method = vae.VAE(Normalised(), steps=10, spectral=(0.1, 0.1))
  x = jnp.asarray(np.random.default_rng(0).uniform(size=(8, 1, 1, 1)), jnp.float32)
  return method, jax.jit(lambda key: method.init(key, {'image': x}))(KEY), x


def test_training_changes_statistics_of_both_groups():
  method, variables, x = normalised()
  ctx = Context(batch={'image': x}, key=KEY, step=jnp.zeros((), jnp.int32), stats=variables['stats'])
  _, aux = method.loss(variables['params'], ctx)
  got = aux.stats['encoder']['encoder']['BatchNorm_0']
  h = 3 * np.asarray(x) + 2
  np.testing.assert_allclose(got['mean'], [0.05 * h.mean()], rtol=1e-4)  # new statistics weigh 0.05
  np.testing.assert_allclose(got['var'], [0.95 + 0.05 * h.var()], rtol=1e-4)
  assert set(aux.stats) == {'encoder', 'decoder', 'spectral'}
  assert set(method.metrics(variables['params'], ctx)) == {'nelbo', 'kl'}  # in evaluation mode nothing changes


@pytest.mark.parametrize('t', [1.0, 0.5])
def test_readjust_reaches_the_statistics_of_prior_samples(t):
  """Before BatchNorm they are 3 z + 2 with z ~ N(1, (2 t)^2); batches of 16 lack a sixteenth of the variance."""
  method, variables, _ = normalised()
  start = jax.tree.map(lambda a: a + 10.0, variables['stats']['decoder'])  # far off, as after training on images
  variables = {**variables, 'stats': {**variables['stats'], 'decoder': start}}
  after = jax.jit(lambda v, key: method.readjust(v, key, t))(variables, KEY)
  got = after['stats']['decoder']['decoder']['BatchNorm_0']
  noise = np.sqrt(0.05 / 1.95 / 16)  # of an average of batch means with these weights, over the standard deviation
  np.testing.assert_allclose(got['mean'], [3 * 1 + 2], atol=4 * 6 * t * noise)
  np.testing.assert_allclose(got['var'], [(6 * t) ** 2 * 15 / 16], rtol=4 * np.sqrt(2) * noise)
  # With them the outputs of prior samples are normalised.
  drawn = method.simulate(after, KEY, 20_000, temperature=t)
  np.testing.assert_allclose(drawn.px.mean.mean(), 0.0, atol=4 * noise + 0.03)
  np.testing.assert_allclose(drawn.px.mean.std(), np.sqrt(16 / 15), rtol=0.1)
  # Nothing else moves.
  jax.tree.map(np.testing.assert_array_equal, after['params'], variables['params'])
  for group in ('encoder', 'spectral'):
    jax.tree.map(np.testing.assert_array_equal, after['stats'][group], variables['stats'][group])


def test_readjust_weighs_each_batch_by_a_twentieth():
  method, variables, _ = normalised()
  for batches in (1, 3):
    after = jax.jit(lambda v, key, m=batches: method.readjust(v, key, 0.0, m, 4))(variables, KEY)
    got = after['stats']['decoder']['decoder']['BatchNorm_0']
    np.testing.assert_allclose(got['mean'], [5 * (1 - 0.95**batches)], rtol=1e-5)  # all draws are the mean
    np.testing.assert_allclose(got['var'], [0.95**batches], rtol=1e-4)


def test_readjust_without_batch_norm_does_nothing():
  method, variables, _ = normalised()
  method = dataclasses.replace(method, net=Normalised(normalise=False), spectral=(0.0, 0.0))
  stats = {'encoder': variables['stats']['encoder']}
  variables = {**variables, 'stats': stats}
  assert method.readjust(variables, KEY, 0.7) is variables


# ---------------------------------------------------------------------------------------- optimisers


def walk(transform, params, grads):
  """Parameters after each of the given gradients."""
  state, found = transform.init(params), []
  for grad in grads:
    delta, state = transform.update(grad, state, params)
    params = optax.apply_updates(params, delta)
    found.append(params)
  return found


def adamax(params, grads, rate, decay, b1=0.9, b2=0.999, eps=1e-3):
  """Adamax with L2 decay in the gradient and eps added to |g| inside the maximum, in numpy."""
  m, u, found = 0.0, 0.0, []
  for t, grad in enumerate(grads):
    g = grad + decay * params
    m = b1 * m + (1 - b1) * g
    u = np.maximum(b2 * u, np.abs(g) + eps)
    params = params - rate / (1 - b1 ** (t + 1)) * m / u
    found.append(params)
  return found


def test_adamax_is_that_of_the_published_code():
  rng = np.random.default_rng(0)
  params = rng.normal(size=7)
  grads = rng.normal(size=(5, 7)) * np.array([1e-4, 1e-3, 1e-2, 1.0, 0.0, 3e-4, 10.0])  # around eps, and large
  build = lambda **kwargs: optim.build('', 100, 'adamax', 1e-2, **kwargs)
  run = lambda **kwargs: walk(build(**kwargs), jnp.float32(params), jnp.float32(grads))
  for got, want in zip(run(weight_decay=3e-4, eps=1e-3), adamax(params, grads, 1e-2, 3e-4), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  for other in (run(weight_decay=3e-4), run(eps=1e-3)):  # the default eps, no decay: something else
    assert np.abs(other[-1] - want).max() > 1e-4


def test_muon_takes_orthogonal_steps_with_matrices_and_adams_with_the_rest():
  rng = np.random.default_rng(0)
  params = {'kernel': jnp.zeros((6, 4)), 'bias': jnp.zeros(4)}
  grads = {'kernel': jnp.float32(rng.normal(size=(6, 4)) * [0.1, 1.0, 10.0, 1.0]), 'bias': jnp.float32([1e-3, -1.0, 10.0, 0.1])}
  rate, rms = 0.01, 0.2
  transform = optim.build('', 10, 'muon', rate, consistent_rms=rms)
  updates, _ = transform.update(grads, transform.init(params), params)
  sizes = np.linalg.svd(updates['kernel'], compute_uv=False) / (rate * rms * np.sqrt(6))
  assert (sizes > 0.6).all() and (sizes < 1.3).all()  # those of the gradient: over a factor of 100
  adam = optim.build('', 10, 'nadam', rate)
  np.testing.assert_allclose(updates['bias'], adam.update(grads, adam.init(params))[0]['bias'], rtol=1e-5)


def rates(steps, **options):
  """The learning rate of every step, read off plain gradient descent."""
  transform = optim.build('', steps, 'sgd', **options)
  after = np.asarray(walk(transform, jnp.zeros(()), [jnp.ones(())] * (steps + 1)), np.float64)
  return -np.diff(after, prepend=0.0)


def test_linear_warmup_then_cosine_to_the_final_rate():
  got = rates(20, learning_rate=1e-2, final_learning_rate=1e-4, warmup_steps=4)
  np.testing.assert_allclose(got[:5], [0.0, 0.25e-2, 0.5e-2, 0.75e-2, 1e-2], rtol=1e-4, atol=1e-8)
  t = np.arange(17) / 16
  np.testing.assert_allclose(got[4:], 1e-4 + (1e-2 - 1e-4) * (1 + np.cos(np.pi * t)) / 2, rtol=1e-3)
  np.testing.assert_allclose([got[12], got[20]], [0.505e-2, 1e-4], rtol=1e-3)


def test_exponential_and_constant_rates():
  got = rates(10, learning_rate=1.0, final_learning_rate=0.01, schedule='exponential')
  np.testing.assert_allclose(got, 10 ** (-2 * np.arange(11) / 10), rtol=1e-3)
  np.testing.assert_allclose(rates(5, learning_rate=0.5), 0.5, rtol=1e-5)
  np.testing.assert_allclose(rates(5, learning_rate=0.5, warmup_steps=2), [0, 0.25, 0.5, 0.5, 0.5, 0.5], rtol=1e-5)


def test_clipping_comes_before_the_decay():
  transform = optim.build('', 10, 'sgd', 1.0, clip_norm=1.0, weight_decay=0.1)
  (got,) = walk(transform, jnp.array([10.0, 0.0]), [jnp.array([3.0, 4.0])])
  np.testing.assert_allclose(got, [10 - 0.6 - 1.0, -0.8], rtol=1e-5)


@pytest.mark.parametrize('options, message', [
  ({'name': 'adamaxx'}, "x.name is 'adamaxx'.*did you mean 'adamax'"),
  ({'name': 'mechanize'}, "x.name is 'mechanize'"),
  ({'esp': 1e-3}, 'x.esp does not exist'),
  ({'learning_rate': 0.0}, 'x.learning_rate is 0.0'),
  ({'final_learning_rate': -1.0}, 'x.final_learning_rate is -1.0'),
  ({'warmup_steps': 10}, 'x.warmup_steps is 10'),
  ({'weight_decay': -1.0}, 'x.weight_decay is -1.0'),
  ({'schedule': 'linear', 'final_learning_rate': 1e-4}, "x.schedule is 'linear'"),
  ({'schedule': 'stair'}, "x.schedule is 'stair'.*did you mean 'stairs'"),
  ({'schedule': 'stairs', 'final_learning_rate': 0.0}, "x.final_learning_rate is 0.* 'stairs'"),
  ({'schedule': 'exponential', 'final_learning_rate': 0}, "x.final_learning_rate is 0.* 'exponential'"),
])  # fmt: skip
def test_optimisers_that_cannot_be(options, message):
  with pytest.raises(UserError, match=message):
    optim.build('x', 10, **options)
