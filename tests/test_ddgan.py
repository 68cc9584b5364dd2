"""Denoising diffusion GANs: the chain against its closed forms, the updates against gradients that are known, the networks."""

import dataclasses
import itertools
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.signal
import scipy.stats

from latentgen import config as configs, data, losses
from latentgen.errors import UserError
from latentgen.evaluate import Subject, modes
from latentgen.methods import ddgan as method
from latentgen.nets import convolution, ddgan, resampling, unet
from latentgen.samplers import denoising
from latentgen.train import keys, step as stepping
from latentgen.types import Context, Stage

KEY = jax.random.key(0)
softplus = lambda a: np.logaddexp(0.0, a)


# ---------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize('steps, want', [
  (4, dict(
    beta=(0.47826, 0.84921, 0.95642, 0.98740), alpha_bar=(0.52174, 0.07868, 0.00343, 0.00004),
    c1=(1, 0.6658, 0.2692, 0.0578), c2=(0, 0.2016, 0.1930, 0.1119), v=(0, 0.44082, 0.88420, 0.98406),
  )),
  (2, dict(beta=(0.92132, 0.99945), alpha_bar=(0.07868, 0.00004), c1=(1, 0.2804), c2=(0, 0.0216), v=(0, 0.92086))),
])  # fmt: skip
def test_schedule_has_the_published_numbers(steps, want):
  schedule = denoising.vp_schedule(steps)
  assert schedule.steps == steps
  for name, values in want.items():
    np.testing.assert_allclose(getattr(schedule, name)[1:], values, atol=1e-4, err_msg=name)
  assert (schedule.c1[1], schedule.c2[1], schedule.v[1]) == (1.0, 0.0, 0.0)
  assert (schedule.beta[0], schedule.alpha_bar[0]) == (0.0, 1.0)


@pytest.mark.parametrize('steps', [1, 2, 4, 8, 100])
def test_schedules_end_alike_whatever_their_length(steps):
  schedule = denoising.vp_schedule(steps)
  assert (np.diff(schedule.alpha_bar) < 0).all()
  log = -0.1 * (1 - 1e-3) - 19.9 * (1 - 1e-6) / 2  # minus the integral of the rate over [1e-3, 1]
  np.testing.assert_allclose(schedule.alpha_bar[-1], np.exp(log), rtol=1e-5)


def test_geometric_schedule_has_geometric_variances():
  first = 0.25
  schedule = denoising.geometric_schedule(3, 1e-3, 0.9, first)
  # Relative to the process at its start, which the chain takes for the data.
  variance = 1e-3 * 900.0 ** (first + (1 - first) * np.arange(4) / 3)
  np.testing.assert_allclose(schedule.alpha_bar, (1 - variance) / (1 - variance[0]), rtol=1e-5)


@pytest.mark.parametrize('betas', [(), (0.5, 1.0), (0.0,), ((0.5,),)])
def test_variances_that_cannot_be(betas):
  with pytest.raises(ValueError, match='within'):
    denoising.from_betas(betas)


@pytest.mark.parametrize('t', [1, 2, 4])
def test_posterior_gives_the_marginal_of_the_step_before(t):
  n, x0 = 100_000, -0.7
  schedule = denoising.vp_schedule(4)
  one, two = jax.random.split(KEY)
  start, times = jnp.full((n, 1), x0), jnp.full(n, t)
  x_t = denoising.q_sample(schedule, one, start, times)
  got = np.asarray(denoising.posterior_sample(schedule, two, start, x_t, times), np.float64)
  kept = np.prod(1 - np.float64(schedule.beta[1:t]))
  np.testing.assert_allclose(got.mean(), np.sqrt(kept) * x0, atol=0.01)
  np.testing.assert_allclose(got.var(), 1 - kept, atol=0.01)
  if t == 1:
    assert (got == np.float32(x0)).all()


def test_neighbours_have_the_moments_of_the_chain():
  n, schedule = 200_000, denoising.vp_schedule(4)
  for t in (1, 3):
    before, x_t = denoising.q_sample_pair(schedule, KEY, jnp.full((n, 1), 0.5), jnp.full(n, t))
    kept, beta = np.prod(1 - np.float64(schedule.beta[1:t])), np.float64(schedule.beta[t])
    np.testing.assert_allclose(before.mean(), 0.5 * np.sqrt(kept), atol=0.01)
    np.testing.assert_allclose(x_t.mean(), 0.5 * np.sqrt(kept * (1 - beta)), atol=0.01)
    want = np.array([[1 - kept, np.sqrt(1 - beta) * (1 - kept)], [np.sqrt(1 - beta) * (1 - kept), 1 - kept * (1 - beta)]])
    np.testing.assert_allclose(np.cov(before[:, 0], x_t[:, 0]), want, atol=0.01)


def two_points(schedule, share, mean):
  """Draws of x_0 in {-1, 1} from q(x_0 | x_t) where x_0 = 1 has that share, or its mean."""

  def predict(key, x, t):
    kept = jnp.asarray(schedule.alpha_bar)[t][:, None]
    logit = 2 * jnp.sqrt(kept) * x / (1 - kept) + np.log(share / (1 - share))
    if mean:
      return 2 * jax.nn.sigmoid(logit) - 1
    return jnp.where(jnp.log(jax.random.uniform(key, x.shape)) < jax.nn.log_sigmoid(logit), 1.0, -1.0)

  return predict


@pytest.mark.parametrize('steps', [1, 2, 4, 8])
def test_chain_is_exact_with_draws_and_shrinks_with_means(steps):
  schedule = denoising.vp_schedule(steps)
  start, chain = jax.random.split(KEY)
  x = jax.random.normal(start, (100_000, 1))
  for share in (0.5, 0.8):
    got = np.asarray(denoising.sample(schedule, two_points(schedule, share, False), chain, x))
    assert set(np.unique(got)) == {-1.0, 1.0}
    np.testing.assert_allclose(got.mean(), 2 * share - 1, atol=0.015)
  got = denoising.sample(schedule, two_points(schedule, 0.5, True), chain, x)
  np.testing.assert_allclose(jnp.square(got).mean(), {1: 0.0, 2: 0.074, 4: 0.447, 8: 0.876}[steps], atol=0.01)


# ---------------------------------------------------------------------------------------- updates


class Noise(nn.Module):
  """x_0 = mean + scale z, whatever x_t."""

  @nn.compact
  def __call__(self, x_t, t, z, train=False):
    mean = self.param('mean', nn.initializers.constant(0.3), ())
    scale = self.param('scale', nn.initializers.constant(0.2), ())
    return jnp.broadcast_to((mean + scale * z)[:, None, None], x_t.shape)


class Quadratic(nn.Module):
  """a x^2 + b x + c of x_{t-1}, summed over the image, and d x_t."""

  @nn.compact
  def __call__(self, before, x_t, t):
    a, b, c, d = (self.param(name, nn.initializers.zeros, ()) for name in 'abcd')
    return (a * jnp.square(before) + b * before + d * x_t).sum((1, 2, 3)) + c


def toy(image_shape=(1, 1, 1), **options):
  built = method.build(ddgan.Pair(image_shape, 1, Noise(), Quadratic()), 10, **options)
  return built


def context(image, step=0):
  return Context(batch={'image': jnp.asarray(image)}, key=KEY, step=jnp.int32(step), stats={})


def params(a=0.0, b=0.0, c=0.0, d=0.0, mean=0.3, scale=0.2):
  discriminator = dict(a=a, b=b, c=c, d=d)
  groups = {'generator': dict(mean=mean, scale=scale), 'discriminator': discriminator}
  return jax.tree.map(jnp.float32, groups)


def test_optimal_discriminator_is_the_log_ratio():
  """One step of noise so large that x_1 tells nothing: data N(-.1, .3^2) against the generator's N(.3, .2^2)."""
  n = 400_000
  x0 = -0.1 + 0.3 * jax.random.normal(jax.random.key(1), (n, 1, 1, 1))
  p, q = scipy.stats.norm(-0.1, 0.3), scipy.stats.norm(0.3, 0.2)
  a = 1 / (2 * 0.2**2) - 1 / (2 * 0.3**2)
  b = -0.1 / 0.3**2 - 0.3 / 0.2**2
  c = -(0.1**2) / (2 * 0.3**2) + 0.3**2 / (2 * 0.2**2) + np.log(0.2 / 0.3)
  at = 0.17
  np.testing.assert_allclose(a * at**2 + b * at + c, p.logpdf(at) - q.logpdf(at), rtol=1e-6)
  at = np.linspace(-4, 4, 20_001)
  ratio = p.logpdf(at) - q.logpdf(at)
  want = scipy.integrate.trapezoid(p.pdf(at) * softplus(-ratio) + q.pdf(at) * softplus(ratio), at)
  one = toy(timesteps=1, gamma=0.0)
  (loss, aux), grads = jax.value_and_grad(one.discriminator_loss, has_aux=True)(params(a, b, c), context((x0 + 1) / 2))
  np.testing.assert_allclose(loss, want, atol=5e-3)
  np.testing.assert_allclose(aux.metrics['adversarial'], want, atol=5e-3)
  for name in 'abc':
    np.testing.assert_allclose(grads['discriminator'][name], 0.0, atol=4e-3, err_msg=name)
  loss, _ = one.generator_loss(params(a, b, c), context((x0 + 1) / 2))
  np.testing.assert_allclose(loss, scipy.integrate.trapezoid(q.pdf(at) * softplus(-ratio), at), atol=1e-2)


def test_equal_distributions_cost_two_log_two():
  x0 = 0.3 + 0.2 * jax.random.normal(jax.random.key(1), (100, 1, 1, 1))
  loss, _ = toy(timesteps=1).discriminator_loss(params(), context((x0 + 1) / 2))
  np.testing.assert_allclose(loss, 2 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize('step, due', [(0, True), (1, False), (14, False), (15, True), (30, True)])
def test_penalty_is_lazy_and_not_rescaled(step, due):
  """D = b x_{t-1} + d x_t, summed over 2 x 3 x 1 pixels: (gamma / 2) 6 b^2, nothing of d."""
  image = jax.random.uniform(jax.random.key(2), (8, 2, 3, 1))
  b, d, gamma = 0.7, 5.0, 0.4
  find = lambda weight: jax.jit(
    jax.value_and_grad(toy((2, 3, 1), gamma=weight, r1_every=15).discriminator_loss, has_aux=True)
  )(params(b=b, d=d), context(image, step))
  ((loss, aux), with_it), (_, without) = find(gamma), find(0.0)
  np.testing.assert_allclose(loss - aux.metrics['adversarial'], gamma / 2 * 6 * b**2 if due else 0.0, atol=2e-5)
  with_it, without = with_it['discriminator'], without['discriminator']
  np.testing.assert_allclose(with_it['b'] - without['b'], gamma * 6 * b if due else 0.0, atol=1e-4)
  np.testing.assert_allclose(with_it['d'], without['d'], atol=1e-5)


def test_first_step_compares_the_generators_own_images():
  t, real, _, fake = toy(timesteps=4).draw(params(scale=0.0)['generator'], jnp.full((64, 1, 1, 1), 0.9), KEY)
  first = np.asarray(t) == 1
  assert 4 < first.sum() < 60 and set(np.unique(t)) == {1, 2, 3, 4}
  assert (fake[first] == np.float32(0.3)).all() and (fake[~first] != np.float32(0.3)).all()
  assert (real[first] == 2 * np.float32(0.9) - 1).all()


class Recorder:
  """A network that notes what it is given, and answers zeros of the shape of its first input or of the batch."""

  def __init__(self, per_image):
    self.per_image, self.calls = per_image, []

  def apply(self, variables, *args, **kwargs):
    self.calls.append([np.asarray(a) for a in args])
    return jnp.zeros(len(args[0]) if self.per_image else args[0].shape)


def test_both_halves_share_x_t_and_both_updates_draw_afresh():
  generator, discriminator = Recorder(per_image=False), Recorder(per_image=True)
  built = method.DDGAN(ddgan.Pair((2, 2, 1), 3, generator, discriminator), gamma=0.0)
  image = jax.random.uniform(KEY, (16, 2, 2, 1))
  empty = {'generator': {}, 'discriminator': {}}
  built.discriminator_loss(empty, context(image))
  (real, x_t, t), (fake, same, again) = discriminator.calls
  np.testing.assert_array_equal(x_t, same)
  np.testing.assert_array_equal(t, again)
  assert (real != fake).any() and real.shape == fake.shape == (16, 2, 2, 1)
  np.testing.assert_array_equal(generator.calls[0][0], x_t)
  np.testing.assert_array_equal(generator.calls[0][1], t)
  # As the loop does it: every update has a key of its own.
  built.generator_loss(empty, context(image).replace(key=jax.random.key(1)))
  for one, other in zip(generator.calls[0][:3], generator.calls[1][:3], strict=True):  # x_t, t and z
    assert (one != other).any()


@pytest.mark.parametrize('frozen, moving', [('generator', 'discriminator'), ('discriminator', 'generator')])
def test_an_update_moves_its_own_group_alone_and_the_second_sees_the_first(frozen, moving):
  built = toy((2, 2, 1))
  assert built.order == 'sequential' and [u.name for u in built.updates()] == ['discriminator', 'generator']
  rates = {frozen: 0.0, moving: 0.1}
  stage = Stage('gan', built, {name: optax.sgd(rate) for name, rate in rates.items()}, 1)
  raw = {'image': jax.random.uniform(KEY, (8, 2, 2, 1))}
  preprocess = lambda key, raw, train: raw
  state = stepping.init_state(stage, preprocess, KEY, raw)
  state = state.replace(params={**params(b=0.5, c=0.1)})
  step, _ = stepping.make_step(stage, preprocess)
  after, _, metrics = jax.jit(step)(state, stepping.healthy(), KEY, raw)
  jax.tree.map(np.testing.assert_array_equal, after.params[frozen], state.params[frozen])
  assert any(float(abs(a - b)) > 0 for a, b in zip(*(jax.tree.leaves(s.params[moving]) for s in (after, state)), strict=True))
  for update in built.updates():
    (_, _), grads = stepping.gradient(update, state.params, context(raw['image']))
    assert set(grads) == {update.name}
  if moving == 'discriminator':  # the generator's loss is that of the discriminator after its step
    new = built.generator_loss(after.params, context(raw['image']).replace(key=keys_of_update(1)))[0]
    np.testing.assert_allclose(metrics['generator/loss'], new, rtol=1e-5)


def keys_of_update(i):
  return jax.random.fold_in(jax.random.fold_in(KEY, 0), keys.UPDATES + i)


def test_samples_are_images_of_the_generator():
  built = toy((1, 2, 1), timesteps=2)
  variables = {'params': params(scale=0.1), 'stats': {}}
  sample = jax.jit(lambda temperature: built.sample(variables, KEY, 5000, temperature=temperature))
  images = sample(1.0)
  assert images.shape == (5000, 1, 2, 1)
  # The last step has no noise: x_0 is the generator's, (0.3 + 0.1 z + 1) / 2.
  np.testing.assert_allclose(images.mean(), 0.65, atol=0.003)
  np.testing.assert_allclose(images.std(), 0.05, atol=0.002)
  np.testing.assert_allclose(sample(0.5).std(), 0.025, atol=0.001)
  with pytest.raises(UserError, match='--sampler=sir'):
    built.sample(variables, KEY, 2, 'sir')


def test_metrics_are_per_image():
  image = jax.random.uniform(KEY, (6, 1, 1, 1))
  found = toy().metrics(params(c=1.5), context(image))
  np.testing.assert_allclose(found['adversarial'], np.full(6, softplus(-1.5) + softplus(1.5)), rtol=1e-6)


@pytest.mark.parametrize('options, message', [
  (dict(timesteps=0), 'method.timesteps is 0'),
  (dict(r1_every=0), 'method.r1_every is 0'),
  (dict(gamma=-1.0), 'method.gamma is -1.0'),
  (dict(schedule='vq'), "method.schedule is 'vq'; known: geometric, vp"),
  (dict(beta_min=30.0), 'method.beta_max is 20.0'),
  (dict(schedule='geometric'), 'method.beta_max is 20.0'),
])  # fmt: skip
def test_options_of_the_method_that_cannot_be(options, message):
  with pytest.raises(UserError, match=message):
    toy(**options)


# ---------------------------------------------------------------------------------------- networks


def perturbed(variables, scale=0.2):
  """Every parameter moved, so that nothing is zero."""
  leaves, tree = jax.tree.flatten(variables)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(tree, [leaf + jnp.float32(scale * rng.standard_normal(leaf.shape)) for leaf in leaves])


@pytest.mark.parametrize('shape', [(8, 6), (2, 2)])
def test_filters_are_those_of_a_separable_convolution(shape):
  x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
  f = np.outer((1, 3, 3, 1), (1, 3, 3, 1)) / 64
  down, up = resampling.fir_downsample(jnp.asarray(x)), resampling.fir_upsample(jnp.asarray(x))
  for n, c in itertools.product(range(2), range(3)):
    padded = np.pad(x[n, :, :, c], 1)
    np.testing.assert_allclose(down[n, :, :, c], scipy.signal.convolve2d(padded, f, 'valid')[::2, ::2], atol=1e-5)
    spread = np.zeros((2 * shape[0], 2 * shape[1]))
    spread[::2, ::2] = x[n, :, :, c]
    want = scipy.signal.convolve2d(np.pad(spread, ((2, 1), (2, 1))), 4 * f, 'valid')
    np.testing.assert_allclose(up[n, :, :, c], want, atol=1e-5)
  mean = x.reshape(2, shape[0] // 2, 2, shape[1] // 2, 2, 3).mean((2, 4))
  np.testing.assert_allclose(resampling.mean_downsample(jnp.asarray(x)), mean, atol=1e-6)


def test_positional_embedding():
  got = unet.positional_embedding(jnp.array([0, 3]), 6)
  frequency = np.array([1.0, 1e-2, 1e-4])
  np.testing.assert_allclose(got[0], [0, 0, 0, 1, 1, 1], atol=1e-7)
  np.testing.assert_allclose(got[1], [*np.sin(3 * frequency), *np.cos(3 * frequency)], rtol=1e-5)


def test_adaptive_norm_is_group_norm_at_zero_and_affine_in_the_embedding():
  x = np.random.default_rng(0).normal(2.0, 3.0, (2, 3, 3, 8)).astype(np.float32)
  w = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)
  groups = x.reshape(2, 9, 2, 4)
  plain = ((groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)
  variables = unet.Norm().init(KEY, x, w)
  np.testing.assert_allclose(unet.Norm().apply(variables, x, np.zeros_like(w)), plain, atol=1e-4)
  kernel = np.asarray(variables['params']['style']['kernel'])
  gain, shift = np.split(w @ kernel, 2, -1)
  want = (1 + gain)[:, None, None] * plain + shift[:, None, None]
  np.testing.assert_allclose(unet.Norm().apply(variables, x, w), want, atol=1e-4)


def test_attention_is_that_of_one_head():
  x = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype(np.float32)
  variables = perturbed(unet.Attention().init(KEY, x), 0.5)
  p = jax.tree.map(np.asarray, variables['params'])
  norm = p['norm']['norm']
  h = ((x - x.mean()) / np.sqrt(x.var() + 1e-6) * norm['scale'] + norm['bias']).reshape(4, 4)
  q, k, v = (h @ p[name]['kernel'] + p[name]['bias'] for name in ('query', 'key', 'value'))
  weight = np.exp(q @ k.T / 2)
  h = (weight / weight.sum(1, keepdims=True)) @ v @ p['out']['kernel'] + p['out']['bias']
  np.testing.assert_allclose(unet.Attention().apply(variables, x), (x + h.reshape(x.shape)) / np.sqrt(2), atol=1e-4)


def test_pixel_norm_has_mean_square_one():
  z = ddgan.pixel_norm(jnp.float32(np.random.default_rng(0).normal(3.0, 5.0, (7, 20))))
  np.testing.assert_allclose(jnp.square(z).mean(-1), 1.0, rtol=1e-5)


def test_minibatch_deviation():
  x = np.random.default_rng(0).normal(size=(8, 2, 3, 5)).astype(np.float32)
  got = np.asarray(ddgan.minibatch_deviation(jnp.asarray(x)))
  np.testing.assert_array_equal(got[..., :5], x)
  for i in range(8):
    mine = x[[j for j in range(8) if j % 2 == i % 2]]
    np.testing.assert_allclose(got[i, ..., 5], mine.std(0).mean(), rtol=1e-5)
  same = ddgan.minibatch_deviation(jnp.broadcast_to(x[:1], (4, 2, 3, 5)))
  np.testing.assert_allclose(same[..., 5], 0.0, atol=1.01e-4)
  np.testing.assert_allclose(ddgan.minibatch_deviation(jnp.asarray(x[:2]))[..., 5], x[:2].std(0).mean(), rtol=1e-5)
  with pytest.raises(UserError, match='config.data.batch_size is 6'):
    ddgan.minibatch_deviation(jnp.asarray(x[:6]))


def test_parameter_counts():
  """The generators of CIFAR-10 and of 256x256 images: a change of architecture shows here."""
  path = pathlib.Path(__file__).parents[1] / 'experiments' / 'ddgan.py'
  module = configs.load(f'{path}:cifar10')[0].module
  for variant, want in (('cifar10', 48.43), ('celebahq256', 39.73)):
    shape, _, model, *_ = module.PUBLISHED[variant]
    pair = ddgan.build(shape, **model)
    x, t, z = (jax.ShapeDtypeStruct(s, d) for s, d in (((4, *shape), 'float32'), ((4,), 'int32'), ((4, 100), 'float32')))
    found = jax.eval_shape(pair.generator.init, KEY, x, t, z)
    assert round(sum(a.size for a in jax.tree.leaves(found)) / 1e6, 2) == want


SMALL = dict(
  latent=3, channels=4, multipliers=(1, 2), blocks=1, attention=(2,), embedding=5, mapping=0, discriminator='tiny',
  discriminator_channels=2, time_embedding=4,
)  # fmt: skip


@pytest.fixture(scope='module')
def small():
  """(Pair, parameters none of which is zero, x_{t-1}, x_t, steps, z)."""
  pair = ddgan.build((4, 4, 1), **SMALL)
  before, x_t = jax.random.normal(KEY, (2, 4, 4, 4, 1))
  t, z = jnp.array([1, 2, 3, 4]), jax.random.normal(jax.random.key(1), (4, 3))
  shapes = jax.eval_shape(lambda key: method.build(pair, 1).init(key, {'image': x_t})['params'], KEY)
  return pair, perturbed(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), 0.4), before, x_t, t, z


@pytest.mark.slow
def test_networks_start_at_zero(small):
  pair, _, before, x_t, t, z = small
  start = jax.jit(lambda key: method.build(pair, 1).init(key, {'image': x_t})['params'])(KEY)
  np.testing.assert_array_equal(pair.generator.apply({'params': start['generator']}, x_t, t, z), 0.0)
  np.testing.assert_array_equal(pair.discriminator.apply({'params': start['discriminator']}, before, x_t, t), 0.0)


def test_networks_heed_step_latent_and_neighbour(small):
  pair, moved, before, x_t, t, z = small
  generate = jax.jit(lambda p, x, t, z: pair.generator.apply({'params': p}, x, t, z))
  judge = jax.jit(lambda p, b, x, t: pair.discriminator.apply({'params': p}, b, x, t))
  image = generate(moved['generator'], x_t, t, z)
  assert image.shape == x_t.shape and float(jnp.abs(image).max()) <= 1
  for other in ((x_t + 1, t, z), (x_t, t[::-1], z), (x_t, t, -z)):
    assert float(jnp.abs(generate(moved['generator'], *other) - image).max()) > 1e-3
  # A scale of the latents is none of its business (PixelNorm).
  np.testing.assert_allclose(generate(moved['generator'], x_t, t, 3 * z), image, atol=1e-4)

  logits = judge(moved['discriminator'], before, x_t, t)
  assert logits.shape == (4,)
  for other in ((before + 1, x_t, t), (before, x_t + 1, t), (before, x_t, t[::-1])):
    assert float(jnp.abs(judge(moved['discriminator'], *other) - logits).max()) > 1e-3


@pytest.mark.slow
def test_penalty_of_the_convolutional_discriminator_by_finite_differences(small):
  pair, moved, before, x_t, t, _ = small

  @jax.jit
  def logits(x, p):
    return pair.discriminator.apply({'params': p}, x, x_t, t).sum()

  @jax.jit
  def penalty(p):
    return losses.r1(lambda x: pair.discriminator.apply({'params': p}, x, x_t, t), before)

  p = moved['discriminator']
  h, square = 1e-2, 0.0
  for i in np.ndindex(before.shape):
    up, down = (logits(before.at[i].add(s * h), p) for s in (1, -1))
    square += float((up - down) / (2 * h)) ** 2
  np.testing.assert_allclose(penalty(p), square / 4, rtol=1e-2)

  # Its gradient jumps where a unit changes sign, so no differences: against XLA's own derivatives of its convolutions.
  found = {}
  for name in ('custom', 'native'):
    with convolution.implementation(name):
      found[name] = jax.jit(jax.grad(lambda p: penalty.__wrapped__(p)))(p)
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(found['native'])) > 1e-2
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found['custom'], found['native'])


@pytest.mark.slow
def test_unet_on_small_maps():
  net = unet.UNet(4, (1, 2), 1, (), out_channels=3, time_scale=1000.0, dropout=0.5)
  unet.check((2, 2, 5), net)
  x, t = jax.random.normal(KEY, (2, 2, 2, 5)), jnp.array([0.1, 0.9])
  shapes = jax.eval_shape(net.init, KEY, x, t)
  variables = perturbed(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), 0.4)
  apply = jax.jit(lambda t, key, train: net.apply(variables, x, t, train=train, rngs={'dropout': key}), static_argnums=2)
  y = apply(t, KEY, False)
  assert y.shape == (2, 2, 2, 3) and y.dtype == jnp.float32
  assert float(jnp.abs(apply(t + 1e-3, KEY, False) - y).max()) > 1e-4
  np.testing.assert_array_equal(apply(t, jax.random.key(1), False), y)
  assert float(jnp.abs(apply(t, KEY, True) - apply(t, jax.random.key(1), True)).max()) > 1e-3
  with pytest.raises(ValueError, match='latent_embedding'):
    net.apply(variables, x, t, jnp.zeros((2, 3)))


@pytest.mark.parametrize('options', [dict(), dict(frequencies=2, compare=True)])
def test_points_by_perceptrons(options):
  pair = ddgan.build((1, 2, 1), architecture='mlp', latent=2, hidden=8, layers=2, **options)
  x, t, z = jnp.ones((3, 1, 2, 1)), jnp.array([1, 2, 2]), jnp.ones((3, 2))
  image, _ = pair.generator.init_with_output(KEY, x, t, z)
  logits, _ = pair.discriminator.init_with_output(KEY, x, x, t)
  assert image.shape == x.shape and logits.shape == (3,)
  assert (image[0] != image[1]).all() and (image[1] == image[2]).all() and logits[0] != logits[1] == logits[2]


@pytest.mark.parametrize('options, message', [
  (dict(architecture='cnn'), "model.architecture is 'cnn'"),
  (dict(discriminator='smal'), "model.discriminator is 'smal'.*did you mean"),
  (dict(discriminator='large'), "model.discriminator is 'large'.*6 halvings.*not 8x8"),
  (dict(latent=-1), 'model.latent is -1'),
  (dict(frequencies=-1), 'model.frequencies is -1'),
  (dict(channels=2), 'model.channels is 2'),
  (dict(multipliers=(1, 2, 2, 2, 2)), 'model.multipliers has 5 levels'),
  (dict(multipliers=()), 'model.multipliers is'),
  (dict(dropout=1.0), 'model.dropout is 1.0'),
  (dict(dtype='float16'), "model.dtype is 'float16'"),
])  # fmt: skip
def test_options_of_the_networks_that_cannot_be(options, message):
  with pytest.raises(UserError, match=message):
    ddgan.build((8, 8, 1), **options)


# ---------------------------------------------------------------------------------------- modes


@dataclasses.dataclass(frozen=True)
class Corners:
  """Samples at the means of modes 0 and 24 of the grid in equal shares, and a tenth of all at the origin."""

  samplers = ('base',)

  def sample(self, variables, key, n, sampler=None, temperature=1.0):
    i = jnp.arange(n)
    x = jnp.where(i % 10 == 0, 0.0, jnp.where(i < n // 2, 0.1, 0.9))
    return jnp.broadcast_to(x[:, None, None, None], (n, 1, 2, 1))


def grid(**options):
  return data.load('toy', kind='grid', components=25, noise=0.05, **options)


def subject(splits):
  return Subject(Corners(), {}, splits, lambda key, batch, train: batch, KEY, 100)


def test_modes_of_known_samples():
  findings = modes.run(subject(grid(train=5000, test=1000)), count=200)
  value = lambda name: findings.results[f'modes/{name}'].value
  assert (value('found/base'), value('found/real')) == (2, 25)
  np.testing.assert_allclose(value('good/base'), 0.9)
  np.testing.assert_allclose(value('kl/base'), np.log(25 / 2), atol=0.1)
  assert value('good/real') >= 0.97 and value('kl/real') < 0.1
  assert findings.images['modes_base'].array.ndim == 3


def test_modes_need_points():
  with pytest.raises(UserError, match="'modes' needs labelled points"):
    modes.check(data.load('toy', kind='factors', components=2))
  points = grid(train=100, valid=10, test=10)
  with pytest.raises(UserError, match="'modes' needs labelled points, and these data have no labels"):
    modes.check({split: data.ArraySource(source.take(slice(None))['image'], None) for split, source in points.items()})
  modes.check(points)
