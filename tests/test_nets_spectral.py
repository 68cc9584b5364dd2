"""Power iteration over a tree of parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.nets import spectral


def top(matrix):
  return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[0]


def tree(seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    'stem': {'kernel': normal(3, 3, 1, 4), 'gain': normal(4), 'bias': normal(4)},
    'cell': {
      'depthwise': {'kernel': normal(5, 5, 1, 6)},
      'BatchNorm_0': {'scale': normal(6), 'bias': normal(6)},
      'squeeze': {'kernel': normal(6, 4), 'bias': normal(4)},
      'norm': {'scale': normal(6)},
    },
    'stack_0': {
      'posterior': {'kernel': normal(2, 1, 1, 4, 9), 'gain': normal(2, 9)},
      'BatchNorm_1': {'scale': normal(2, 6), 'bias': normal(2, 6)},
    },
  }


def test_forty_iterations_reach_one_percent():
  kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 64, 64)), jnp.float32)
  params = {'conv': {'kernel': kernel}}
  state = spectral.init(jax.random.key(0), params)
  value, _ = spectral.penalty(params, state, iterations=0)
  np.testing.assert_allclose(value, top(kernel.reshape(576, 64)), rtol=0.01)


def test_warm_start_tracks_a_moving_matrix():
  rng = np.random.default_rng(1)
  a, b = (rng.normal(size=(1, 1, 32, 16)) for _ in range(2))
  state = spectral.init(jax.random.key(0), {'conv': {'kernel': jnp.asarray(a, jnp.float32)}})
  step = jax.jit(spectral.penalty)
  for i in range(60):
    moved = jnp.asarray(np.cos(i / 60) * a + np.sin(i / 60) * b, jnp.float32)
    value, state = step({'conv': {'kernel': moved}}, state)
  np.testing.assert_allclose(value, top(moved[0, 0]), rtol=0.01)


def test_gradient_is_the_outer_product():
  params = {'conv': {'kernel': jnp.asarray(np.random.default_rng(2).normal(size=(1, 1, 7, 5)), jnp.float32)}}
  state = spectral.init(jax.random.key(0), params, 200)
  grad = jax.grad(lambda p: spectral.penalty(p, state)[0])(params)['conv']['kernel'][0, 0]
  u, _, v = np.linalg.svd(np.asarray(params['conv']['kernel'][0, 0]))
  np.testing.assert_allclose(grad, np.outer(u[:, 0], v[0]), atol=1e-3)
  frozen = jax.grad(lambda p: sum(a.sum() for a in jax.tree.leaves(spectral.penalty(p, state)[1])))(params)
  np.testing.assert_array_equal(frozen['conv']['kernel'], 0.0)


def expected(params):
  total = 0.0

  def normalised(kernel, gain):
    kernel = np.asarray(kernel, np.float64)
    return kernel / np.sqrt((kernel**2).sum((0, 1, 2))) * np.exp(np.asarray(gain, np.float64))

  stem, stack = params['stem'], params['stack_0']
  total += top(normalised(stem['kernel'], stem['gain']).reshape(9, 4))
  total += top(params['cell']['depthwise']['kernel'].reshape(25, 6))
  total += sum(top(normalised(stack['posterior']['kernel'][i], stack['posterior']['gain'][i])[0, 0]) for i in range(2))
  total += np.abs(params['cell']['BatchNorm_0']['scale']).max()
  return total + np.abs(stack['BatchNorm_1']['scale']).max(1).sum()


def test_sum_over_all_convolutions_and_batch_norms():
  params = tree()
  shapes = {k: v.shape for k, v in spectral.matrices(params).items()}
  assert shapes == {'4x9': (1, 4, 9), '6x25': (1, 6, 25), '9x4': (2, 9, 4)}
  value, state = spectral.penalty(params, spectral.init(jax.random.key(0), params, 300))
  np.testing.assert_allclose(value, expected(params), rtol=1e-4)
  again, _ = spectral.penalty(params, state)
  np.testing.assert_allclose(again, value, rtol=1e-5)


def test_groups_or_not_is_the_same():
  params = tree()
  grouped = {
    'encoder': {'stack_0': {'posterior': params['stack_0']['posterior']}},
    'decoder': {k: v for k, v in params.items() if k != 'stack_0'}
    | {'stack_0': {'BatchNorm_1': params['stack_0']['BatchNorm_1']}},
  }
  value, _ = spectral.penalty(grouped, spectral.init(jax.random.key(0), grouped, 300))
  np.testing.assert_allclose(value, expected(params), rtol=1e-4)


def test_all_zero_kernels_stay_finite():
  params = {'conv': {'kernel': jnp.zeros((1, 1, 3, 3)), 'gain': jnp.zeros(3)}}
  state = spectral.init(jax.random.key(0), params)
  value, grad = jax.value_and_grad(lambda p: spectral.penalty(p, state)[0])(params)
  assert value == 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(grad))
