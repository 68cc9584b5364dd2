"""BIVA and the ladder VAE: who depends on whom, terms against scipy, layers that take their scale from data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from latentgen import nets
from latentgen.data import digits
from latentgen.distributions import Normal
from latentgen.errors import UserError
from latentgen.methods import vae
from latentgen.nets import biva, ladder
from latentgen.nets.residual import Normed
from latentgen.types import Context

KEYS = {'params': jax.random.key(0), 'sample': jax.random.key(1)}
SIZE = (6, 6, 1)
TINY = dict(latents=(3, 2, 2), strides=(2, 1, 2), kernels=(3,), blocks=1, filters=4)
GROUPS = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]  # (level, group): z_3, then (TD, BU) of layers 2 and 1


def images(n=8, size=SIZE):
  return jnp.asarray(np.random.default_rng(0).uniform(size=(n, *size)) < 0.4, jnp.float32)


@functools.cache
def tiny(**options):
  """(network, its parameters)."""
  net = biva.build(SIZE, **{**TINY, **options})
  return net, filled(net, images())


def filled(net, x):
  """Parameters of ordinary size, without the network's own initialisation."""
  shapes = jax.eval_shape(lambda: net.init(KEYS, x, method='infer')['params'])
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    draws = {'kernel': lambda: rng.normal(size=leaf.shape), 'gain': lambda: rng.uniform(0.6, 1.4, leaf.shape)}
    return jnp.asarray(draws.get(path.rpartition('/')[2], lambda: 0.3 * rng.normal(size=leaf.shape))(), jnp.float32)

  return edit(shapes, draw)


def run(net, params, method, *args, key=2, **kwargs):
  return net.apply({'params': params}, *args, rngs={'sample': jax.random.key(key)}, method=method, **kwargs)


def mode(level, group, q, context, key):
  del level, group, context, key
  return q.mean


def edit(params, change):
  """change(path 'a/b/c', leaf) on every leaf."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: change('/'.join(p.key for p in path), leaf), params)


# ---------------------------------------------------------------------------------------- shapes and terms


@pytest.mark.parametrize('conv', [False, True])
def test_levels_are_layers_and_groups_are_top_down_then_bottom_up(conv):
  net, params = tiny(conv=conv)
  trace = jax.eval_shape(lambda p: run(net, p, 'infer', images(), k=3), params)
  ends = [(2, 2, 2), (3, 3, 2), (3, 3, 3)] if conv else [(2,), (2,), (3,)]
  groups = [1, 2, 2]
  assert [z.shape for z in trace.z] == [(g, 3, 8, *end) for g, end in zip(groups, ends, strict=True)]
  assert [q.loc.shape for q in trace.posterior] == [p.loc.shape for p in trace.prior] == [z.shape for z in trace.z]
  assert [q.shape for q in trace.log_q] == [p.shape for p in trace.log_p] == [(g, 3, 8) for g in groups]
  assert trace.log_px.shape == (3, 8) and trace.kl is None
  drawn = jax.eval_shape(lambda p: run(net, p, 'simulate', 5), params)
  assert [z.shape for z in drawn.z] == [(g, 1, 5, *end) for g, end in zip(groups, ends, strict=True)]
  assert drawn.log_q == () and drawn.posterior is None and drawn.log_px is None
  assert [c.shape[3:] for c in drawn.context] == ([(2, 2, 1), (3, 3, 4), (3, 3, 4)] if conv else [(0,), (36,), (36,)])
  assert jax.eval_shape(lambda p: run(net, p, 'generate', 5).mean, params).shape == (5, *SIZE)


def test_terms_against_scipy():
  net, params = tiny()
  x = images()
  trace = jax.tree.map(np.asarray, run(net, params, 'infer', x, k=2))
  assert sum(len(rate) for rate in trace.rate()) == 2 * 3 - 1
  for z, q, p, log_q, log_p, rate in zip(
    trace.z, trace.posterior, trace.prior, trace.log_q, trace.log_p, trace.rate(), strict=True
  ):
    np.testing.assert_allclose(log_q, stats.norm(q.loc, q.scale).logpdf(z).sum(-1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log_p, stats.norm(p.loc, p.scale).logpdf(z).sum(-1), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(rate, log_q - log_p)
  assert (trace.prior[0].loc == 0).all() and (trace.prior[0].scale == 1).all()
  chance = special.expit(np.asarray(trace.px.base.logits, np.float64))
  log_px = stats.bernoulli(chance).logpmf(np.asarray(x, int)).sum((2, 3, 4))
  np.testing.assert_allclose(trace.log_px, log_px, rtol=1e-4)
  total = sum(p.sum(0) for p in trace.log_p) - sum(q.sum(0) for q in trace.log_q)
  np.testing.assert_allclose(trace.log_weight(), log_px + total, rtol=1e-4)


def test_deviations_of_both_parametrisations():
  raw = np.array([[0.3, -0.2, -1.0, 4.0]])
  np.testing.assert_allclose(ladder.gaussian(raw, 'std').loc, [[0.3, -0.2]], rtol=1e-6)
  np.testing.assert_allclose(ladder.gaussian(raw, 'std').scale, np.log1p(np.exp([[-1.0, 4.0]])) + 1e-3, rtol=1e-5)
  np.testing.assert_allclose(ladder.gaussian(raw, 'logvar').scale ** 2, 1 + np.exp([[-1.0, 4.0]]), rtol=1e-5)


def test_samples_belong_to_their_images():
  """At the posterior modes all samples of an image are equal, and those of another image are others."""
  net, params = tiny()
  one, three = (run(net, params, 'infer', images(), k=k, choose=mode) for k in (1, 3))
  for a, b in zip(jax.tree.leaves(one.z), jax.tree.leaves(three.z), strict=True):
    np.testing.assert_allclose(np.broadcast_to(a, b.shape), b, rtol=1e-4, atol=1e-5)
    assert np.abs(np.diff(a[:, 0], axis=1)).max() > 1e-2
  np.testing.assert_allclose(np.broadcast_to(one.log_px, (3, 8)), three.log_px, rtol=1e-4)
  free = run(net, params, 'infer', images(), k=2)
  assert all(np.abs(z[:, 0] - z[:, 1]).min(axis=(1, 2)).max() > 1e-5 for z in free.z)
  noise = [(z - q.loc) / q.scale for z, q in zip(free.z, free.posterior, strict=True)]
  first = np.stack([e[g, 0, :, 0] for e in noise for g in range(len(e))])
  assert np.abs(np.corrcoef(first) - np.eye(5)).max() < 0.98  # no two layers share their noise


def test_odd_images_and_logistic_mixtures():
  net = biva.build((7, 5, 3), latents=(2, 2), strides=(2,), kernels=(5, 3), blocks=1, filters=3, likelihood='dmol', mixtures=2)
  x = jnp.asarray(np.random.default_rng(0).integers(256, size=(3, 7, 5, 3)) / 255, jnp.float32)
  assert net.sizes == [(7, 5), (4, 3), (2, 2)]
  trace = run(net, filled(net, x), 'infer', x)
  assert trace.px.mean.shape == (1, 3, 7, 5, 3) and np.isfinite(trace.log_weight()).all()


def test_published_sizes():
  """CIFAR-10 with 15 layers: 103 M parameters in the table of the submission of VDVAE (arXiv 2011.10650)."""
  net = biva.build(
    (32, 32, 3), latents=tuple(range(38, 9, -2)), strides=(2, *(1,) * 9, 2, 1, 1, 1, 2), kernels=(5, 3), blocks=3, filters=96,
    conv=True, likelihood='dmol', dropout_q=0.2,
  )  # fmt: skip
  trace, variables = jax.eval_shape(lambda: net.init_with_output(KEYS, jnp.zeros((2, 32, 32, 3)), method='infer'))
  assert [z.shape[3:] for z in trace.z] == [
    (4, 4, 10), *((8, 8, c) for c in (12, 14, 16, 18)), *((16, 16, c) for c in range(20, 39, 2))
  ]  # fmt: skip
  assert round(sum(leaf.size for leaf in jax.tree.leaves(variables)) / 1e6) == 103


# ---------------------------------------------------------------------------------------- who sees whom


def fixed(zs):
  return lambda level, group, *_: zs[GROUPS.index((level, group))]


def dependence(function, zs):
  """Largest change of loc and scale of group i when z_j moves, [5, 5]; 0 where it is the same to the bit."""
  function = jax.jit(function)

  def flat(zs):
    found = function(zs)
    return [np.concatenate([found[l].loc[g].ravel(), found[l].scale[g].ravel()]) for l, g in GROUPS]

  before = flat(zs)
  after = [flat([z + (0.5 if i == j else 0.0) for i, z in enumerate(zs)]) for j in range(len(zs))]
  return np.array([[np.abs(a[i] - before[i]).max() for a in after] for i in range(len(zs))])


def latents():
  rng = np.random.default_rng(4)
  return [jnp.asarray(rng.normal(size=(1, {0: 2, 1: 2, 2: 3}[level])), jnp.float32) for level, _ in GROUPS]


@pytest.mark.parametrize('skip', [True, False])
def test_priors_depend_on_all_latents_above_by_the_skips(skip):
  net, params = tiny(skip=skip)
  found = dependence(lambda zs: run(net, params, 'simulate', 1, choose=fixed(zs)).prior, latents())
  levels = np.array([level for level, _ in GROUPS])
  distance = levels[:, None] - levels
  above = distance > 0 if skip else distance == 1
  assert (found[above] > 1e-5).all() and (found[~above] == 0).all()


def test_posteriors_depend_as_the_factorisation_says():
  net, params = tiny()
  x = images(1)
  found = dependence(lambda zs: run(net, params, 'infer', x, choose=fixed(zs)).posterior, latents())
  # Rows: of z3, TD2, BU2, TD1, BU1; columns: on the same.
  want = np.array([
    [0, 0, 1, 0, 1],  # q(z_3 | x, z_<3^BU)
    [1, 0, 0, 0, 1],  # q(z_2^TD | x, z_1^BU, z_3)
    [0, 0, 0, 0, 1],  # q(z_2^BU | x, z_1^BU)
    [1, 1, 1, 0, 0],  # q(z_1^TD | x, z_3, z_2)
    [0, 0, 0, 0, 0],  # q(z_1^BU | x)
  ])  # fmt: skip
  np.testing.assert_array_equal(found > 1e-5, want.astype(bool))
  assert (found[want == 0] == 0).all()


def test_generation_needs_no_encoder():
  net, params = tiny()
  grouped = nets.groups(params)
  alone = run(net, grouped['decoder'], 'generate', 4)
  np.testing.assert_array_equal(alone.mean, run(net, params, 'generate', 4).mean)
  assert set(grouped['encoder']) == {'encoder', 'posterior', 'layer_0', 'layer_1'}
  assert all(set(grouped['encoder'][name]) == {'posterior'} for name in ('layer_0', 'layer_1'))


def test_both_directions_share_the_generative_stages():
  """From the latents of an inference, generation finds its priors and image; a stage's weight moves q of the layers below."""
  net, params = tiny()
  x = images()
  trace = run(net, params, 'infer', x)
  again = run(net, params, 'simulate', 8, choose=lambda level, group, *_: trace.z[level][group, 0])
  for a, b in zip(jax.tree.leaves((trace.prior, trace.px)), jax.tree.leaves((again.prior, again.px)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  moved = edit(params, lambda path, leaf: 1.5 * leaf if path == 'stage_1/block_0/outer/gain' else leaf)
  other = run(net, moved, 'infer', x, choose=lambda level, group, *_: trace.z[level][group, 0])
  change = [np.abs(a.loc - b.loc).max((1, 2, 3)) for a, b in zip(trace.posterior, other.posterior, strict=True)]
  assert change[2][0] > 1e-3  # q(z_1^TD), below stage 2
  assert change[2][1] == 0 and (change[0] == 0).all() and (change[1] == 0).all()


# ---------------------------------------------------------------------------------------- objective


def constant_heads(params, posterior=None):
  """All heads of a layer give the same Gaussian, whatever comes in: q = p. `posterior` {path: bias} sets some of q's."""
  one = float(np.log(np.expm1(1.0 - 1e-3)))  # softplus gives 1 - 0.001
  rng = np.random.default_rng(7)
  bias = {i: np.concatenate([rng.normal(size=d), rng.normal(size=d) + 1.0]) for i, d in enumerate((3, 2))}
  heads = {'posterior/head': np.repeat([0.0, one], 2)}
  for i in (0, 1):
    names = (f'layer_{i}/prior_td', f'layer_{i}/prior_bu', f'layer_{i}/posterior/head', f'encoder/head_{i}')
    heads |= dict.fromkeys(names, bias[i])
  heads |= posterior or {}

  def change(path, leaf):
    name, _, end = path.rpartition('/layer/')
    if name not in heads or end == 'kernel':
      return leaf
    return jnp.zeros_like(leaf) if end == 'gain' else jnp.asarray(heads[name], jnp.float32)

  return edit(params, change)


def loss_of(method, params, x):
  ctx = Context(batch={'image': x}, key=jax.random.key(2), step=jnp.zeros((), jnp.int32), stats={})
  return method.loss(nets.groups(params), ctx)


def test_equal_heads_pair_up():
  """With q = p factor by factor every rate is 0 and the objective is log p(x|z) minus the free bits of 2 L - 1 groups."""
  net, params = tiny()
  params, x = constant_heads(params), images()
  trace = run(net, params, 'infer', x, k=2)
  np.testing.assert_allclose(np.concatenate(trace.rate()), 0.0, atol=1e-5)
  for free, paid in ((2.0, 10.0), (0.0, 0.0)):
    loss, aux = loss_of(vae.build(net, 10, free_bits=free), params, x)
    np.testing.assert_allclose(loss, paid - aux.metrics['log_px'], rtol=1e-5)


def test_free_bits_stop_the_gradient_per_group_and_image():
  """Heads are constants and the image's layer is off: the gradient at a head is that of its own rates above the floor."""
  net, params = tiny()
  loc, raw = np.array([1.5, -1.0]), np.array([-0.7, 0.3])
  params = constant_heads(params, {'layer_1/posterior/head': np.concatenate([loc, raw])})
  params = edit(params, lambda path, leaf: 0 * leaf if path in ('image/gain', 'image/bias') else leaf)
  x = images(32)
  trace = run(net, params, 'infer', x)
  rate, z, prior = (np.asarray(a)[0, 0] for a in (trace.rate()[1], trace.z[1], trace.prior[1].loc))
  scale = np.asarray(trace.prior[1].scale)[0, 0]
  bits = float(np.median(rate))
  paying = rate > bits
  assert bits > 0 and paying.sum() == 16
  for floor, counts in ((bits, paying), (0.0, np.ones(32, bool))):
    method = vae.build(net, 10, free_bits=floor)
    grads = jax.jit(jax.grad(lambda p, method=method: loss_of(method, p, x)[0]))(params)
    want = (counts[:, None] * (z - prior) / scale**2).mean(0)  # d rate / d loc with z = loc + scale eps
    np.testing.assert_allclose(grads['layer_1']['posterior']['head']['layer']['bias'][:2], want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('step, counts', [(0, 1.0), (60, 1.0), (80, 0.5), (100, 0.0)])
def test_free_bits_fade_until_the_rates_themselves_are_paid(step, counts):
  """Also rates below 0, which one sample may have."""
  rates, floored = jnp.array([-0.7, 0.0, 1.9, 2.5]), np.array([2.0, 2.0, 2.0, 2.5])
  method = vae.build(tiny()[0], 100, free_bits=2.0, free_bits_decay=0.4)
  want = counts * floored + (1 - counts) * np.asarray(rates)
  np.testing.assert_allclose(method.charged(rates, jnp.asarray(step)), want, rtol=1e-6)
  np.testing.assert_allclose(vae.build(tiny()[0], 100, free_bits=2.0).charged(rates, jnp.asarray(99)), floored)


# ---------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize('conv', [False, True])
def test_layers_take_their_scale_from_the_first_batch(conv):
  options = dict(TINY, latents=(3, 2), strides=(2, 1), conv=conv)
  net, x = biva.build(SIZE, **options), images(32)
  params = jax.jit(lambda x: net.init(KEYS, x, method='infer')['params'])(x)

  @jax.jit
  def outputs(params):
    kept = lambda module, _: isinstance(module, Normed)
    return net.apply(
      {'params': params}, x, rngs={'sample': KEYS['sample']}, method='infer', capture_intermediates=kept
    )[1]['intermediates']

  found = [np.asarray(leaf).reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(outputs(params))]
  assert len(found) == len([1 for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == 'gain'])
  for y in found:
    assert np.abs(y.mean(0)).max() < 1e-4
    np.testing.assert_allclose(y.std(0), 0.01, rtol=0.05)


@pytest.mark.parametrize('k, stride', [(0, 1), (1, 1), (3, 2), (4, 1)])
def test_weight_normalised_layers_against_loops(k, stride):
  rng = np.random.default_rng(k)
  x = rng.normal(size=(3, 5, 4, 2)).astype(np.float32)
  kernel = rng.normal(size=(k, k, 2, 3) if k else (2, 3))
  gain, bias = rng.normal(size=3), rng.normal(size=3)
  params = {name: jnp.float32(a) for name, a in (('kernel', kernel), ('gain', gain), ('bias', bias))}
  got = Normed(3, k, stride).apply({'params': params}, x)
  w = gain * kernel / np.sqrt((kernel.reshape(-1, 3) ** 2).sum(0))
  if not k:
    want = x @ w + bias
  else:
    low = (k - 1) // 2
    padded = np.pad(x, ((0, 0), (low, k), (low, k), (0, 0)))
    rows, columns = (-(-n // stride) for n in (5, 4))
    want = np.array([[
      [np.einsum('ijc,ijco->o', padded[n, r * stride : r * stride + k, c * stride : c * stride + k], w) for c in range(columns)]
      for r in range(rows)] for n in range(3)]) + bias  # fmt: skip
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_unit_that_does_not_vary_keeps_a_finite_gain():
  layer = Normed(3)
  _, variables = layer.init_with_output(KEYS['params'], jnp.ones((1, 4)))
  np.testing.assert_array_equal(variables['params']['gain'], 1.0)


def test_dropout_is_on_in_training_alone():
  net, params = tiny()
  noisy = biva.build(SIZE, **TINY, dropout_q=0.5, dropout_p=0.5)
  x = images()
  plain, dropped, off = (
    run(n, params, 'infer', x, choose=mode, train=train).log_px for n, train in ((net, True), (noisy, True), (noisy, False))
  )
  np.testing.assert_array_equal(plain, off)
  assert np.abs(plain - dropped).min() > 1e-4


# ---------------------------------------------------------------------------------------- the ladder VAE


def test_fusion_by_hand_and_by_quadrature():
  got = ladder.fuse(Normal(jnp.float32(1.0), jnp.sqrt(0.5)), Normal(jnp.float32(-1.0), jnp.sqrt(2.0)))
  np.testing.assert_allclose([got.loc, got.scale**2], [0.6, 0.4], rtol=1e-6)
  z = np.linspace(-12, 12, 20_001)
  product = stats.norm(1, np.sqrt(0.5)).pdf(z) * stats.norm(-1, np.sqrt(2.0)).pdf(z)
  product /= product.sum()
  mean = (z * product).sum()
  np.testing.assert_allclose([got.loc, got.scale**2], [mean, ((z - mean) ** 2 * product).sum()], rtol=1e-5)


@pytest.mark.parametrize('share', [True, False])
def test_ladder_posteriors_are_the_priors_times_the_encoders_gaussians(share):
  """Dividing q(z_i | x, z_>i) by p(z_i | z_>i) leaves what does not depend on z_>i."""
  net, params = tiny(bottom_up=False, merge='precision', share_prior=share)
  trace = run(net, params, 'infer', images(), k=2)
  assert [z.shape[0] for z in trace.z] == [1, 1, 1]
  for level in (1, 2):
    q, p = trace.posterior[level], trace.prior[level]
    precision = q.scale**-2.0 - p.scale**-2.0
    mean = (q.loc * q.scale**-2.0 - p.loc * p.scale**-2.0) / precision
    apart = [np.abs(a[0, 0] - a[0, 1]).max() for a in (precision / precision.max(), mean)]
    assert np.abs(p.loc[0, 0] - p.loc[0, 1]).max() > 1e-2
    assert (max(apart) < 1e-3 and (precision > 0).all()) if share else max(apart) > 1e-2


def test_without_its_bottom_up_latents_biva_is_the_ladder():
  """The weights on z^BU and its features set to 0: the same latents, rates and images as the network that lacks them."""
  net, params = tiny()
  width, dims = TINY['filters'], {'map_1': 2, 'map_0': 3}

  def mute(path, leaf):
    if path.startswith('encoder/top_down_') and '/aux/' in path and not path.endswith('kernel'):
      return jnp.zeros_like(leaf)
    if path == 'posterior/merge/inner/kernel':
      return leaf.at[..., :width, :].set(0.0)
    if path in [f'{name}/layer/kernel' for name in dims]:
      return leaf.at[dims[path[:5]] :].set(0.0)
    return leaf

  def smaller(path, leaf):
    if path == 'posterior/merge/inner/kernel':
      return leaf[..., width:, :]
    return leaf[: dims[path[:5]]] if path in [f'{name}/layer/kernel' for name in dims] else leaf

  params = edit(params, mute)
  bare = biva.build(SIZE, **TINY, bottom_up=False)
  cut = edit(params, smaller)
  shapes = jax.eval_shape(lambda: bare.init(KEYS, images(), method='infer'))['params']
  assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [leaf.shape for leaf in jax.tree.leaves(_like(cut, shapes))]
  one, two = run(net, params, 'infer', images(), k=2), run(bare, _like(cut, shapes), 'infer', images(), k=2)
  np.testing.assert_allclose(one.log_px, two.log_px, rtol=1e-4)
  for a, b in ((one.z, two.z), (one.rate(), two.rate())):
    for level, (mine, bare_ones) in enumerate(zip(a, b, strict=True)):
      np.testing.assert_allclose(mine[:1], bare_ones, rtol=1e-3, atol=1e-4, err_msg=f'level {level}')
  drawn = [run(n, p, 'simulate', 3).px.mean for n, p in ((net, params), (bare, _like(cut, shapes)))]
  np.testing.assert_allclose(*drawn, rtol=1e-4)


def _like(tree, shapes):
  """The part of a tree that has a counterpart."""
  return {name: _like(tree[name], inner) if isinstance(inner, dict) else tree[name] for name, inner in shapes.items()}


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize('options, message', [
  ({'latents': ()}, r'model.latents is \(\)'),
  ({'latents': (4, 0)}, r'model.latents is \(4, 0\)'),
  ({'strides': (3,)}, r'model.strides is \(3,\)'),
  ({'blocks': 0}, 'model.blocks is 0'),
  ({'filters': 0}, 'model.filters is 0'),
  ({'dropout_q': 1.0}, 'model.dropout_q is 1.0'),
  ({'init_scale': 0.0}, 'model.init_scale is 0.0'),
  ({'merge': 'blok'}, "model.merge is 'blok'; did you mean 'block'"),
  ({'scale': 'var'}, "model.scale is 'var'"),
  ({'likelihood': 'bernouli'}, "model.likelihood is 'bernouli'; did you mean 'bernoulli'"),
  ({'dtype': 'float16'}, "model.dtype is 'float16'"),
  ({'num_classes': 10, 'bottom_up': False}, 'model.num_classes needs model.bottom_up'),
])  # fmt: skip
def test_options_that_cannot_be(options, message):
  with pytest.raises(UserError, match=message):
    biva.build((8, 8, 1), **options)


# ---------------------------------------------------------------------------------------- training


def trained(steps=600):
  """Three layers with 2 free bits a group on binarised 8x8 digits -> (method, parameters, test images)."""
  splits = digits.load()
  train, test = (np.float32(splits[s].take(slice(None))['image'] > 127) for s in ('train', 'test'))
  net = biva.build((8, 8, 1), latents=(8, 4, 2), strides=(2, 1, 2), kernels=(3,), blocks=1, filters=16)
  method, optimiser = vae.build(net, steps, free_bits=2.0), optax.adamax(2e-3)
  params = jax.jit(lambda x: method.init(jax.random.key(0), {'image': x})['params'])(train[:64])

  @jax.jit
  def step(params, state, x, key):
    ctx = Context(batch={'image': x}, key=key, step=jnp.zeros((), jnp.int32), stats={})
    delta, state = optimiser.update(jax.grad(lambda p: method.loss(p, ctx)[0])(params), state)
    return optax.apply_updates(params, delta), state

  state, rng = optimiser.init(params), np.random.default_rng(0)
  for i in range(steps):
    params, state = step(params, state, train[rng.integers(len(train), size=64)], jax.random.key(i))
  return method, params, test


@pytest.mark.slow
def test_every_latent_is_in_use_after_training_and_more_samples_tighten_the_bound():
  method, params, x = trained()
  trace = jax.jit(lambda p, key: method.infer(p, {}, x, key, 20)[0])
  rates = [np.asarray(rate).mean((1, 2)) for rate in trace(params, jax.random.key(1)).rate()]
  assert np.concatenate(rates).min() > 0.5
  log_w = np.concatenate([np.asarray(trace(params, jax.random.key(i)).log_weight(), np.float64) for i in range(10)])
  bounds = [special.logsumexp(log_w.reshape(-1, k, len(x)), axis=1) - np.log(k) for k in (1, 10, 100)]
  gains = [b.mean(0) - a.mean(0) for a, b in zip(bounds, bounds[1:])]
  assert all(gain.mean() > -3 * gain.std() / np.sqrt(len(x)) for gain in gains) and gains[0].mean() > 0.1
