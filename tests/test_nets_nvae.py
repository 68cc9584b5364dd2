"""NVAE: published sizes, wiring, densities, gradients. Shapes are tiny; one network is compiled once for many tests."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latentgen import nets
from latentgen.distributions import Normal, soft_clamped_normal
from latentgen.errors import UserError
from latentgen.nets import convolution, nvae
from latentgen.nets.images import pixel_likelihood

KEY = jax.random.key(0)
SHAPE = (7, 6, 1)
OPTIONS = dict(groups=(2, 3), latent=2, channels=4, pre_blocks=1, pre_cells=1, cells_encoder=1, cells_decoder=1)
SMALL = dict(groups=(3,), pre_blocks=0)  # for what has to be compiled once more


def shapes(net):
  x = jnp.zeros((1, *net.image_shape))
  return jax.eval_shape(lambda key: net.init({'params': key, 'sample': key}, x, method='infer'), KEY)


def variables(net, seed=0):
  """Numbers from numpy for the shapes from flax: no random numbers to compile."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    name = path[-1].key
    if name in ('mean', 'var'):
      return jnp.full(leaf.shape, float(name == 'var'))
    if name == 'kernel':
      return jnp.asarray(rng.uniform(-1, 1, leaf.shape) / math.sqrt(math.prod(leaf.shape[-4:-1])), jnp.float32)
    return jnp.asarray(rng.uniform(-0.3, 0.3, leaf.shape) + {'scale': 1.0, 'gain': -1.0}.get(name, 0.0), jnp.float32)

  return jax.tree_util.tree_map_with_path(fill, shapes(net))


@functools.cache
def tiny(**options):
  net = nvae.build(SHAPE, **OPTIONS | options)
  return net, variables(net)


@functools.cache
def inference(k=1, **options):
  """Jitted (variables, x, key) -> (Trace, log-weights)."""
  net, _ = tiny(**options)

  def run(v, x, key):
    trace = net.apply(v, x, k=k, rngs={'sample': key}, method='infer')
    return trace, trace.log_weight()

  return jax.jit(run)


def images(b=2, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 2, size=(b, *SHAPE)), jnp.float32)


def without_posterior(v):
  """Parameters with which all posterior samplers put out 0."""

  def zero(path, leaf):
    names = [p.key for p in path]
    return jnp.zeros_like(leaf) if names[-2] == 'sampler' and names[-1] != 'gain' else leaf

  return jax.tree_util.tree_map_with_path(zero, v)


# ---------------------------------------------------------------------------------------------- published sizes

GREY = dict(pre_blocks=2, pre_cells=3)
RGB = dict(pre_blocks=1, pre_cells=2, likelihood='dmol')
PUBLISHED = {  # side, groups, channels, flows, rest; millions of parameters, latent dimensions
  'mnist': ((28, nvae.adaptive_groups(2, 10), 32, 0, GREY), 33.36, 14_400),
  'cifar10': ((32, (30,), 128, 1, RGB), 130.85, 153_600),
  'imagenet32': ((32, (28,), 192, 1, RGB), 268.51, 143_360),
  'celeba64': ((64, nvae.adaptive_groups(3, 20), 64, 1, RGB), 153.28, 467_200),
  'celebahq256': ((256, nvae.adaptive_groups(5, 16, 4), 30, 2, RGB), 330.80, 6_005_760),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_parameter_counts_and_latents(name):
  (side, groups, channels, flows, rest), millions, latents = PUBLISHED[name]
  shape = (side, side, 3 if rest is RGB else 1)
  net = nvae.build(shape, groups=groups, channels=channels, flows=flows, **rest)
  count = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes(net)['params']))
  assert abs(count / 1e6 / millions - 1) < 1e-3
  assert sum(g * math.prod(net.latent_shape(level)) for level, g in enumerate(net.groups)) == latents
  if name == 'mnist':
    assert net.groups == (5, 10) and net.latent_shape(0) == (4, 4, 20) and count // 1000 == 33_363


def test_adaptive_groups():
  assert nvae.adaptive_groups(5, 16, 4) == (4, 4, 4, 8, 16)
  assert nvae.adaptive_groups(3, 20) == (5, 10, 20)
  assert nvae.adaptive_groups(1, 30) == (30,)


def test_kl_balance_alpha():
  by_level = {
    (5, 10): [1, 2],
    (5, 10, 20): [1, 2, 4],
    (4, 4, 4, 8, 16): [1, 4, 16, 32, 64],
  }
  for groups, alpha in by_level.items():
    assert nvae.kl_balance_alpha(groups) == [a for a, g in zip(alpha, groups, strict=True) for _ in range(g)]


# ---------------------------------------------------------------------------------------------- the trace


def test_trace_shapes_and_padding():
  net, v = tiny()
  assert net.multiple == 4 and net.latent_shape(0) == (2, 2, 2) and net.latent_shape(1) == (4, 4, 2)
  trace, log_w = inference(3)(v, images(), KEY)
  for level, (g, side, width) in enumerate(((2, 2, 16), (3, 4, 8))):
    assert trace.z[level].shape == trace.eps[level].shape == (g, 3, 2, side, side, 2)
    assert trace.prior[level].loc.shape == trace.prior[level].scale.shape == (g, 3, 2, side, side, 2)
    assert trace.context[level].shape == (g, 3, 2, side, side, width)
    assert trace.log_q[level].shape == trace.log_p[level].shape == trace.kl[level].shape == (g, 3, 2)
  assert trace.log_px.shape == log_w.shape == (3, 2) and trace.px.mean.shape == (3, 2, *SHAPE)
  assert np.isfinite(log_w).all()


def test_densities_are_those_of_the_parts():
  _, v = tiny()
  x = images()
  trace, log_w = inference(3)(v, x, KEY)
  logits = np.asarray(trace.px.base.logits, np.float64)
  total = -np.log1p(np.exp(np.where(x == 1, -logits, logits))).sum((2, 3, 4))
  np.testing.assert_allclose(trace.log_px, total, rtol=1e-4)
  for level in range(2):
    z, prior = np.asarray(trace.z[level], np.float64), trace.prior[level]
    log_p = stats.norm.logpdf(z, prior.loc, prior.scale).sum((3, 4, 5))
    np.testing.assert_allclose(trace.log_p[level], log_p, rtol=1e-4)
    np.testing.assert_allclose(prior.loc + prior.scale * trace.eps[level], z, atol=1e-5)
    total = total + (log_p - np.asarray(trace.log_q[level])).sum(0)
    assert (np.asarray(trace.kl[level]) >= 0).all()
  np.testing.assert_allclose(log_w, total, rtol=1e-4)


def test_first_group():
  _, v = tiny()
  trace, _ = inference(3)(v, images(), KEY)
  np.testing.assert_array_equal(trace.prior[0].loc[0], 0.0)
  np.testing.assert_allclose(trace.prior[0].scale[0], 1.01)
  np.testing.assert_allclose(trace.context[0][0], np.broadcast_to(v['params']['constant'], (3, 2, 2, 2, 16)))


def test_kl_is_the_mean_of_log_q_minus_log_p():
  _, v = tiny()
  traces = [inference(3)(v, images(), key)[0] for key in jax.random.split(KEY, 200)]
  for level in range(2):
    closed = np.concatenate([t.kl[level].reshape(-1, 6) for t in traces], 1)
    gap = np.concatenate([(t.log_q[level] - t.log_p[level]).reshape(-1, 6) for t in traces], 1) - closed
    error = gap.std(1) / math.sqrt(gap.shape[1])
    assert (np.abs(gap.mean(1)) < 5 * error).all() and (error < 0.2 * closed.mean(1)).all()


def test_samples_are_folded_into_the_batch():
  _, v = tiny(**SMALL)
  x = images()
  many, log_w = inference(3, **SMALL)(v, x, KEY)
  one, log_w_one = inference(**SMALL)(v, jnp.repeat(x, 3, 0), KEY)
  np.testing.assert_allclose(log_w, log_w_one.reshape(2, 3).T, rtol=1e-4)
  for a, b in zip(many.z, one.z, strict=True):
    np.testing.assert_allclose(a[:, 2, 1], b[:, 0, 5], atol=1e-4)
  assert np.abs(many.z[0][:, 0] - many.z[0][:, 1]).min() > 0


def test_zero_posterior_output_is_the_prior():
  _, v = tiny()
  trace, _ = inference(3)(without_posterior(v), images(), KEY)
  for kl in trace.kl:  # of the first group too: its q is then N(0, 1.01^2)
    # Zero to the bit op by op (next test); fused, exp of p and of q may differ in the last bit, whose square this is.
    np.testing.assert_allclose(kl, 0.0, atol=1e-12)
  for q, p in zip(trace.log_q, trace.log_p, strict=True):
    np.testing.assert_allclose(q, p, rtol=1e-5)


def test_zero_posterior_output_has_zero_kl_to_the_bit():
  rng = np.random.default_rng(0)
  feature, state, prior = (jnp.asarray(rng.normal(size=(2, 3, 3, c)), jnp.float32) for c in (4, 4, 6))
  module = nvae.Posterior(3)
  params = module.init({'params': KEY, 'sample': KEY}, feature, state, prior)
  q, _, _ = module.apply(without_posterior(params), feature, state, prior, rngs={'sample': KEY})
  np.testing.assert_array_equal(q.kl(soft_clamped_normal(*jnp.split(prior, 2, -1))), 0.0)


def test_residual_kl_formula():
  """KL = (dmu^2 / sig_p^2 + dsig^2 - log dsig^2 - 1) / 2 for q = N(mu_p + dmu, sig_p dsig)."""
  mu, sig, dmu, dsig = np.random.default_rng(0).uniform(0.5, 2.0, size=(4, 50)).astype(np.float32)
  got = Normal(mu + dmu, sig * dsig).kl(Normal(mu, sig))
  np.testing.assert_allclose(got, 0.5 * (dmu**2 / sig**2 + dsig**2 - np.log(dsig**2) - 1), atol=1e-5)


def test_soft_clamp_bounds_the_prior():
  _, v = tiny()

  def huge(path, leaf):
    return leaf * 1e3 if 'prior' in [p.key for p in path] and path[-1].key == 'bias' else leaf

  trace, _ = inference(3)(jax.tree_util.tree_map_with_path(huge, v), images(), KEY)
  loc, scale = trace.prior[1].loc, trace.prior[1].scale
  assert np.abs(loc).max() <= 5 and scale.min() >= np.exp(-5) + 0.00999 and scale.max() <= np.exp(5) + 0.0101
  assert np.abs(loc).max() > 4.9


# ---------------------------------------------------------------------------------------------- x enters through z only


def test_decoder_sees_x_through_z_only():
  _, v = tiny(**SMALL)
  _, (_, by_image) = gradient(**SMALL)(v['params'], images())
  assert np.abs(by_image).max() > 0
  _, (_, by_image) = gradient(**SMALL)(without_posterior(v)['params'], images())
  np.testing.assert_array_equal(by_image, 0.0)


def test_choose_replays_inference():
  """Fixed latents through the generative pass give back context, log p(z) and p(x | z) of inference."""
  net, v = tiny()
  trace, _ = inference(3)(v, images(), KEY)

  @jax.jit
  def replay(v, z):
    def choose(level, group, prior, context, key):
      return z[level][group, 1]

    return net.apply(v, 2, choose, rngs={'sample': KEY}, method='simulate')

  again = replay(v, trace.z)
  assert again.kl is None and again.log_q == () and again.log_px is None
  for name in ('z', 'log_p', 'context'):
    for a, b in zip(getattr(again, name), getattr(trace, name), strict=True):
      np.testing.assert_allclose(a[:, 0], b[:, 1], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(again.px.log_prob(images())[0], trace.log_px[1], rtol=1e-4)


def test_choose_gets_level_group_and_tempered_prior():
  """... and a training pass without data moves the decoder's statistics, not the encoder's."""
  net, v = tiny(pre_blocks=0)
  seen = []

  def choose(level, group, prior, context, key):
    seen.append((level, prior.loc.shape, context.shape))
    return prior.loc + prior.scale * (10.0 * level + group + 0.01 * jax.random.normal(key, prior.loc.shape))

  @jax.jit
  def run(v):
    return net.apply(v, 4, choose, 0.5, True, rngs={'sample': KEY}, mutable=['batch_stats'], method='simulate')

  trace, changed = run(v)
  assert set(seen) == {(0, (4, 4, 3, 2), (4, 4, 3, 8)), (1, (4, 8, 6, 2), (4, 8, 6, 4))}
  noise = []
  for level, groups in enumerate(OPTIONS['groups']):
    for group in range(groups):
      rest = np.asarray(trace.eps[level][group]) / 0.5 - (10 * level + group)
      assert np.abs(rest).max() < 0.06
      noise.append(rest.ravel()[0])
  assert len(set(noise)) == 5  # every group has its own key
  before, after = nets.groups(v['batch_stats']), nets.groups(changed['batch_stats'])
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a != b).any()), before['decoder'], after['decoder']))
  if after['encoder']:
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before['encoder'], after['encoder']))


# ---------------------------------------------------------------------------------------------- gradients


@functools.cache
def gradient(implementation='custom', **options):
  """Compiled (params, x) -> ((bound in nats, statistics), gradients by params and by x, seen by the encoder only)."""
  net, v = tiny(**options)

  def bound(params, x):
    trace, changed = net.apply(
      {**v, 'params': params}, x, train=True, rngs={'sample': KEY}, mutable=['batch_stats'], method='infer'
    )
    log_px = trace.px.log_prob(images(seed=1))  # of other images, so that x enters through the encoder only
    return log_px.mean() - sum(r.sum(0).mean() for r in trace.rate()), changed

  with convolution.implementation(implementation):
    return jax.jit(jax.value_and_grad(bound, (0, 1), has_aux=True)).lower(v['params'], images()).compile()


def close(a, b):
  """Equal up to what float32 leaves of gradients that cancel (biases in front of a BatchNorm)."""
  size = max(np.abs(g).max() for g in jax.tree.leaves(a))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * size), a, b)


def test_remat_changes_nothing():
  _, v = tiny(**SMALL)
  got = gradient(remat=True, **SMALL)(v['params'], images())
  want = gradient(**SMALL)(v['params'], images())
  np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-6)
  close(got[0][1], want[0][1])
  close(got[1], want[1])


def test_gradient_against_finite_differences():
  _, v = tiny(**SMALL)
  compiled = gradient(**SMALL)
  _, (grads, _) = compiled(v['params'], images())
  rng, parts, h = np.random.default_rng(0), nets.groups(v['params']), 1e-3
  for group in parts:
    # Along the gradient and some noise, so that the slope is far from 0.
    size = math.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(nets.groups(grads)[group])))
    own = jax.tree.map(lambda g: g / size + 0.01 * rng.normal(size=g.shape), nets.groups(grads)[group])
    zeros = jax.tree.map(jnp.zeros_like, parts)
    direction = nets.ungroup({**zeros, group: own})
    slope = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    ends = [jax.tree.map(lambda p, d, s=s: jnp.float32(p + s * h * d), v['params'], direction) for s in (1, -1)]
    plus, minus = (float(compiled(p, images())[0][0]) for p in ends)
    np.testing.assert_allclose((plus - minus) / (2 * h), slope, rtol=0.01)


@pytest.mark.slow
def test_custom_convolutions_give_the_native_gradients():
  _, v = tiny(**SMALL)
  got = gradient(**SMALL)(v['params'], images())
  want = gradient('native', **SMALL)(v['params'], images())
  np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-5)
  close(got[1], want[1])


# ---------------------------------------------------------------------------------------------- variants


def test_flows():
  _, v = tiny(flows=1, **SMALL)
  trace, log_w = inference(flows=1, **SMALL)(v, images(), KEY)
  assert trace.kl is None and np.isfinite(log_w).all()
  assert trace.rate()[0].shape == (3, 1, 2)

  def off(path, leaf):
    flow = any(str(p.key).startswith('flow') for p in path)
    return jnp.zeros_like(leaf) if flow and path[-1].key != 'gain' else leaf

  plain = jax.tree_util.tree_map_with_path(off, without_posterior(v))
  trace, _ = inference(flows=1, **SMALL)(plain, images(), KEY)
  for q, p in zip(trace.log_q, trace.log_p, strict=True):
    np.testing.assert_allclose(q, p, rtol=1e-4)
  inference_part = nets.groups(v['params'])['encoder']
  assert 'flow_0' in inference_part['posterior'] and 'flow_0' in inference_part['stack_0']['posterior']


@pytest.mark.parametrize(
  'options',
  [
    dict(groups=(1, 2), pre_blocks=0, likelihood='normal'),
    dict(groups=(3,), likelihood='dmol', mixtures=3, flows=2, residual_posterior=False, dtype='bfloat16'),
    dict(groups=(1,), squeeze_excite=False, remat=True),
  ],
)
def test_variants_have_the_right_shapes_and_types(options):
  shape = (8, 8, 3)
  net = nvae.build(shape, **OPTIONS | options)
  x = jnp.zeros((2, *shape))

  def run():
    v = net.init({'params': KEY, 'sample': KEY}, x)
    trace = net.apply(v, x, k=2, rngs={'sample': KEY}, method='infer')
    return v, trace, trace.log_weight(), net.apply(v, 3, rngs={'sample': KEY}, method='generate').mean

  v, trace, log_w, image = jax.eval_shape(run)
  assert log_w.shape == (2, 2) and image.shape == (3, *shape)
  assert [z.shape[0] for z in trace.z] == list(net.groups)
  floats = (trace.z, trace.eps, trace.log_q, trace.log_p, trace.prior, trace.log_px, trace.px, v)
  assert {a.dtype for a in jax.tree.leaves(floats)} == {jnp.dtype('float32')}


def test_parameters_of_a_level_are_stacked():
  _, v = tiny()
  for stack in (v['params']['stack_1'], v['params']['encoder']['stack_1']):
    assert {p.shape[0] for p in jax.tree.leaves(stack)} == {3}
  grouped = nets.groups(v['params'])
  assert set(grouped['encoder']) == {'encoder', 'posterior', 'stack_0', 'stack_1'}
  assert set(grouped['encoder']['stack_1']) == {'posterior'}
  assert set(grouped['decoder']['stack_1']) == {'cell_0', 'combine', 'prior'}


def test_normal_likelihood_is_a_density_on_the_unit_interval():
  raw = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)
  x = np.random.default_rng(1).uniform(size=(2, 3, 4, 1)).astype(np.float32)
  loc, scale = 5 * np.tanh(raw[..., :1] / 5), np.exp(5 * np.tanh(raw[..., 1:] / 5)) + 0.01
  want = stats.norm(loc, scale).logpdf(2 * x - 1).sum((1, 2, 3)) + 12 * np.log(2)
  np.testing.assert_allclose(pixel_likelihood(raw, 'normal', 1, 8, 10).log_prob(x), want, rtol=1e-4)


def test_mistakes_name_the_key():
  for key, value in {'groups': (), 'likelihood': 'gauss', 'dtype': 'float16', 'pre_blocks': -1}.items():
    with pytest.raises(UserError, match=f'model.{key}'):
      nvae.build((8, 8, 1), **{key: value})
