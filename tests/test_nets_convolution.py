"""Convolutions with their own gradients against XLA's."""

import itertools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from latentgen.nets import convolution
from latentgen.nets.layers import ConvTranspose

CASES = [
  (size, kernel, stride)
  for size, kernel, stride in itertools.product(((6, 6), (7, 5)), (1, 3, 4, 5), (1, 2))
  if (size, kernel) != ((7, 5), 5) or stride == 2
]


def reference(x, kernel, stride=1, groups=1):
  p = (kernel.shape[0] - 1) // 2
  layout = ('NHWC', 'HWIO', 'NHWC')
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), ((p, p), (p, p)), dimension_numbers=layout, feature_group_count=groups
  )


def value_and_gradients(f, x, kernel):
  y, pull = jax.vjp(f, x, kernel)
  weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
  return y, *pull(weights)


@pytest.mark.parametrize(('size', 'kernel', 'stride'), CASES)
def test_dense(size, kernel, stride):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(3, *size, 2)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(kernel, kernel, 2, 4)), jnp.float32)

  def ours(x, w):
    with convolution.implementation('custom'):
      return convolution.convolve(x, w, stride)

  got = value_and_gradients(ours, x, w)
  want = value_and_gradients(lambda x, w: reference(x, w, stride), x, w)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('implementation', ['custom', 'native'])
@pytest.mark.parametrize(('kernel', 'stride', 'padding', 'output_padding'), [(3, 2, 1, 0), (3, 2, 1, 1), (4, 2, 1, 0), (3, 1, 0, 0), (5, 3, 2, 1)])
def test_transposed(implementation, kernel, stride, padding, output_padding):
  """The linear map whose transpose is the strided convolution: <transposed(x), y> = <x, convolution(y)>."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 4, 3, 2)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(kernel, kernel, 2, 5)), jnp.float32)
  crop = (padding, padding - output_padding)
  sides = [(n - 1) * stride - 2 * padding + kernel + output_padding for n in x.shape[1:3]]

  def convolved(y):
    layout, around = ('NHWC', 'HWIO', 'NHWC'), ((padding, padding),) * 2
    return lax.conv_general_dilated(y, w.transpose(0, 1, 3, 2), (stride, stride), around, dimension_numbers=layout)[:, :4, :3]

  def ours(x, w):
    with convolution.implementation(implementation):
      return convolution.transposed(x, w, stride, crop)

  got, want = jax.jit(ours)(x, w), jax.linear_transpose(convolved, jnp.zeros((2, *sides, 5)))(x)[0]
  assert got.shape == (2, *sides, 5)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  weights = jnp.cos(jnp.arange(got.size, dtype=jnp.float32)).reshape(got.shape)
  np.testing.assert_allclose(jax.grad(lambda x: (ours(x, w) * weights).sum())(x), convolved(weights), rtol=1e-5, atol=1e-5)


def test_transposed_layer_doubles_the_map_as_pytorch_does():
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  for more, side in ((0, 7), (1, 8)):  # (4 - 1) 2 - 2 + 3 + output_padding
    y, variables = ConvTranspose(5, output_padding=more).init_with_output(jax.random.key(1), x)
    assert y.shape == (2, side, side, 5)
    kernel, bias = variables['params']['kernel'], variables['params']['bias']
    np.testing.assert_allclose(y[:, 0, 0], x[:, 0, 0] @ kernel[1, 1] + bias, rtol=1e-5, atol=1e-5)  # one window alone reaches it


@pytest.mark.parametrize(('size', 'kernel'), [((6, 6), 5), ((7, 5), 3), ((2, 3), 5), ((1, 1), 5)])
def test_depthwise(size, kernel):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(kernel, kernel, 1, 3)), jnp.float32)

  def ours(x, w):
    with convolution.implementation('custom'):
      return convolution.convolve(x, w, depthwise=True)

  got = value_and_gradients(ours, x, w)
  want = value_and_gradients(lambda x, w: reference(x, w, groups=3), x, w)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_implementation_follows_the_backend_and_the_override():
  x, w = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))

  def traced():
    return str(jax.make_jaxpr(lambda x, w: convolution.convolve(x, w))(x, w))

  assert ('custom_vjp' in traced()) == (jax.default_backend() == 'cpu')
  with convolution.implementation('native'):
    assert 'custom_vjp' not in traced()
  with convolution.implementation('custom'):
    assert 'custom_vjp' in traced()
  with pytest.raises(ValueError, match='native'), convolution.implementation('fast'):
    pass


def test_half_precision_keeps_its_type():
  x, w = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 2), jnp.bfloat16)
  with convolution.implementation('custom'):
    y, pull = jax.vjp(lambda x, w: convolution.convolve(x, w, 2), x, w)
    assert {a.dtype for a in (y, *pull(y))} == {jnp.dtype('bfloat16')}


def test_weight_norm_has_finite_gradients_at_zero():
  kernel = jnp.zeros((3, 3, 2, 4)).at[..., 0].set(0.5)
  gain = jnp.log(jnp.asarray([2.0, 1.0, 1.0, 1.0]))
  w = convolution.weight_norm(kernel, gain)
  np.testing.assert_allclose(jnp.linalg.norm(w[..., 0]), 2.0, rtol=1e-4)
  grads = jax.grad(lambda k, g: convolution.weight_norm(k, g).sum(), (0, 1))(kernel, gain)
  assert all(np.isfinite(g).all() for g in grads)
  stacked = convolution.weight_norm(jnp.stack([kernel, 2 * kernel]), jnp.stack([gain, gain]))
  np.testing.assert_allclose(stacked[0], w, rtol=1e-5)


def test_bilinear_upsample_aligns_corners():
  got = convolution.bilinear_upsample(jnp.asarray([0.0, 3.0, 9.0]).reshape(1, 1, 3, 1))[0, :, :, 0]
  want = np.interp(np.linspace(0, 2, 6), [0, 1, 2], [0.0, 3.0, 9.0])
  np.testing.assert_allclose(got, np.stack([want, want]), rtol=1e-6)


def test_nearest_upsample():
  got = convolution.nearest_upsample(jnp.arange(4.0).reshape(1, 2, 2, 1))[0, :, :, 0]
  np.testing.assert_array_equal(got, [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, 5))
  weights = jax.random.normal(jax.random.key(1), (2, 6, 4, 5))
  slopes = []
  for name in ('custom', 'native'):
    with convolution.implementation(name):
      slopes.append(jax.grad(lambda x: (convolution.nearest_upsample(x) * weights).sum())(x))
  np.testing.assert_allclose(*slopes, rtol=1e-6, atol=1e-6)
