"""Layers, cells and flows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentgen.nets import cells, flows, layers
from latentgen.nets.convolution import nearest_upsample

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 8)), jnp.float32)


def init(module, x, seed=0):
  """Variables without compiling random numbers: shapes from flax, numbers from numpy."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)

  def fill(path, leaf):
    name = path[-1].key
    if name == 'var' or name == 'scale':
      return jnp.ones(leaf.shape)
    return jnp.zeros(leaf.shape) if name == 'mean' else jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def test_conv_starts_as_documented():
  conv = layers.Conv(64, 3, weight_norm=True)
  params = conv.init(jax.random.key(0), X)['params']
  bound = 1 / np.sqrt(9 * 8)
  for name in ('kernel', 'bias'):
    assert np.abs(params[name]).max() <= bound
  assert np.abs(params['kernel']).max() > 0.98 * bound
  np.testing.assert_allclose(params['kernel'].std(), bound / np.sqrt(3), rtol=0.02)
  norm = np.sqrt((np.asarray(params['kernel']) ** 2).sum((0, 1, 2)))
  np.testing.assert_allclose(params['gain'], np.log(norm + 0.01), rtol=1e-5)


def test_conv_stride_pads_symmetrically():
  conv = layers.Conv(1, 3, stride=2, use_bias=False)
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
  np.testing.assert_array_equal(conv.apply({'params': {'kernel': kernel}}, x)[0, :, :, 0], [[0, 2], [8, 10]])


def test_batch_norm_constants():
  module = cells.EncoderCell(8, train=True)
  variables = init(module, X)
  _, changed = module.apply(variables, X, mutable=['batch_stats'])
  stats = changed['batch_stats']['BatchNorm_0']
  np.testing.assert_allclose(stats['mean'], 0.05 * X.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(stats['var'], 0.95 + 0.05 * X.var((0, 1, 2)), rtol=1e-4)


def test_squeeze_excite():
  module = layers.SqueezeExcite()
  params = init(module, X)
  gate = module.apply(params, X, method='gate')
  assert gate.shape == (3, 8) and (gate > 0).all() and (gate < 1).all()
  np.testing.assert_allclose(module.apply(params, X), X * gate[:, None, None], rtol=1e-6)
  assert params['params']['squeeze']['kernel'].shape == (8, 4)


@pytest.mark.parametrize('make', [cells.EncoderCell, cells.DecoderCell])
def test_identity_without_branch(make):
  module = make(8)
  variables = init(module, X)
  if make is cells.EncoderCell:
    last = variables['params']['Conv_1']
    last['gain'], last['bias'] = jnp.full(8, -jnp.inf), jnp.zeros(8)
  else:
    last = variables['params']['BatchNorm_3']
    last['scale'], last['bias'] = jnp.zeros(8), jnp.zeros(8)
  np.testing.assert_array_equal(module.apply(variables, X), X)


def test_branch_weighs_a_tenth():
  module = cells.EncoderCell(8, squeeze_excite=False)
  variables = init(module, X)
  last = variables['params']['Conv_1']
  last['gain'], last['bias'] = jnp.full(8, -jnp.inf), jnp.ones(8)
  np.testing.assert_allclose(module.apply(variables, X) - X, 0.1, rtol=1e-4)


def test_down_skip_keeps_all_four_phases():
  module = cells.FactorizedReduction(10)
  variables = init(module, X)
  y = module.apply(variables, X)
  assert y.shape == (3, 2, 2, 10)
  for row in range(2):
    for column in range(2):
      phase = X[:, row::2, column::2]
      permuted = X.at[:, row::2, column::2].set(phase[:, ::-1])
      assert np.abs(module.apply(variables, permuted) - y).max() > 1e-3


def test_upsampling_cell_repeats_pixels_first():
  """The branch on repeated pixels is what the published cell computes; ours repeats them later."""
  up, flat = cells.DecoderCell(4, up=True, train=True), cells.DecoderCell(4, train=True)
  variables = init(up, X)
  ours, stats = up.apply(variables, X, mutable=['batch_stats'])
  skip = cells.Upsample(4).apply({'params': variables['params']['skip']}, X)
  branch = variables | {'params': {k: v for k, v in variables['params'].items() if k != 'skip'}}

  theirs, want = flat.apply(branch, nearest_upsample(X), mutable=['batch_stats'], method='branch')
  np.testing.assert_allclose(ours - skip, 0.1 * theirs, rtol=1e-3, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), stats, want)


# ---------------------------------------------------------------------------------------------- flows


def jacobian(module, variables, shape):
  z = jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)
  size = int(np.prod(shape))
  flow = jax.jit(jax.jacrev(lambda v: module.apply(variables, v.reshape(1, *shape)).reshape(size)))
  return np.asarray(flow(z.reshape(size)))


@pytest.mark.parametrize('mirror', [False, True])
def test_masked_cell_is_unit_triangular(mirror):
  shape = (4, 3, 2)
  module = flows.MaskedCell(mirror=mirror)
  variables = init(module, jnp.zeros((1, *shape)))
  j = jacobian(module, variables, shape)
  triangle = np.triu(j, 1) if not mirror else np.tril(j, -1)
  np.testing.assert_array_equal(triangle, 0.0)
  np.testing.assert_array_equal(np.diag(j), 1.0)
  other = np.tril(j, -1) if not mirror else np.triu(j, 1)
  # Everything before a position and inside its window is seen: position 1 sees 0, the last pixel its left neighbour.
  first = (1, 0) if not mirror else (-2, -1)
  assert other[first] != 0 and np.count_nonzero(other) > 0.5 * other[np.tril_indices(len(j), -1)].size


def test_pair_preserves_volume():
  shape = (3, 3, 2)
  module = flows.Flow()
  j = jacobian(module, init(module, jnp.zeros((1, *shape))), shape)
  sign, logdet = np.linalg.slogdet(j.astype(np.float64))
  assert sign == 1 and abs(logdet) < 1e-4
  assert np.abs(np.triu(j, 1)).max() > 1e-4 and np.abs(np.tril(j, -1)).max() > 1e-4


def test_shift_does_not_reach_earlier_pixels():
  module = flows.MaskedCell()
  z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 5, 3)), jnp.float32)
  variables = init(module, z)
  moved = module.apply(variables, z.at[0, 2, 2].add(1.0)) - module.apply(variables, z)
  flat = np.abs(np.asarray(moved)).reshape(25, 3)
  assert flat[:12].max() == 0 and flat[13:].max() > 0


def test_masked_weights_are_stored_as_zero_and_get_no_gradient():
  module = flows.MaskedCell()
  z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 3, 2)), jnp.float32)
  params = jax.jit(module.init)(jax.random.key(0), z)['params']
  grads = jax.jit(jax.grad(lambda p: jnp.sin(module.apply({'params': p}, z)).sum()))(params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  for name in ('Conv_0', 'Conv_1', 'Conv_2'):
    kernel, grad = params[name]['kernel'], grads[name]['kernel']
    assert (kernel == 0).any() and (grad[kernel == 0] == 0).all()
  assert (params['Conv_0']['kernel'][2] == 0).all() and (params['Conv_0']['kernel'][0] != 0).all()
