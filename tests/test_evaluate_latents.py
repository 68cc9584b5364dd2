"""Clustering and pictures of the latent space, on a method whose codes are the pixels of its images."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentgen.data.source import ArraySource
from latentgen.distributions import GaussianMixture, Independent, Normal
from latentgen.errors import UserError
from latentgen.evaluate import Subject, clustering, latent_space, run_all
from latentgen.types import Trace, ancestral

CENTRES = np.array([[0.2, 0.2, 0.5], [0.8, 0.2, 0.5], [0.5, 0.8, 0.5]])
SCALES = np.array([[0.1, 0.2, 0.02], [0.05, 0.05, 0.02], [0.2, 0.1, 0.02]])
WEIGHTS = np.array([0.5, 0.2, 0.3])


@dataclasses.dataclass(frozen=True)
class Pixels:
  """q(z | x) = N(x, 0.1^2) over three pixels, the decoder's mean is z."""

  samplers = ('base',)

  def _trace(self, z, **given):  # z [k, b, 3]
    px = Independent(Normal(z[..., None, :, None], 1.0), 3)
    return Trace((z[None],), (z[None],), (), (), None, (jnp.zeros((1, *z.shape[:2], 0)),), None, None, px, **given)

  def trace(self, variables, x, key, k=1):
    q = Normal(jnp.broadcast_to(x[:, 0, :, 0], (k, x.shape[0], 3)), 0.1)
    return self._trace(q.sample(key), posterior=(Normal(q.loc[None], jnp.full((1, k, x.shape[0], 3), 0.1)),))

  def simulate(self, variables, key, n, sampler=None, temperature=1.0, choose=None):
    z = (choose or ancestral)(0, 0, Normal(jnp.zeros((n, 3)), jnp.ones((n, 3))), jnp.zeros((n, 0)), key)
    return self._trace(z[None])


class Mixed(Pixels):
  """Knows its clusters and a prior."""

  def cluster(self, variables, x, key):
    return jax.nn.log_softmax(-jnp.square(x[:, 0, :, 0][:, None] - variables['params']['centres']).sum(-1))

  def mixture(self, variables):
    return GaussianMixture(jnp.float32(WEIGHTS), variables['params']['centres'], jnp.float32(SCALES))


def subject(method, noise=0.03, labels=True):
  def one(seed, n):
    rng = np.random.default_rng(seed)
    label = np.resize([0, 0, 1, 2], n)
    image = np.clip(CENTRES[label] + noise * rng.normal(size=(n, 3)), 0, 1)
    return ArraySource(np.rint(255 * image).astype(np.uint8)[:, None, :, None], label if labels else None)

  def preprocess(key, batch, train):
    return {**batch, 'image': batch['image'].astype(jnp.float32) / 255}

  data = {'train': one(0, 200), 'valid': one(1, 60), 'test': one(2, 90)}
  return Subject(method, {'params': {'centres': jnp.float32(CENTRES)}, 'stats': {}}, data, preprocess, jax.random.key(3), 64)


def best_accuracy(label, group, size):
  """By trying all ways to give groups classes."""
  return max(np.mean(np.array(p)[group] == label) for p in itertools.permutations(range(size)))


def test_scores_by_hand():
  rng = np.random.default_rng(0)
  label, group = rng.integers(4, size=50), rng.integers(4, size=50)
  group[:25] = (label[:25] + 1) % 4
  found = clustering.scores(label, group)
  assert found['accuracy'] == pytest.approx(best_accuracy(label, group, 4))
  p = np.array([[np.mean((label == i) & (group == j)) for j in range(4)] for i in range(4)])
  entropy = lambda q: -(q[q > 0] * np.log(q[q > 0])).sum()
  mutual = entropy(p.sum(0)) + entropy(p.sum(1)) - entropy(p)
  assert found['nmi'] == pytest.approx(2 * mutual / (entropy(p.sum(0)) + entropy(p.sum(1))))
  pairs = lambda n: (n * (n - 1) / 2).sum()
  n = p * 50
  a, b, all_pairs = pairs(n.sum(0)), pairs(n.sum(1)), pairs(np.array([50.0]))
  assert found['ari'] == pytest.approx((pairs(n) - a * b / all_pairs) / ((a + b) / 2 - a * b / all_pairs))


def test_left_over_groups_and_classes_count_as_wrong():
  label = np.array([0, 0, 0, 1, 1, 1])
  assert clustering.scores(label, np.array([0, 0, 1, 2, 2, 3]))['accuracy'] == pytest.approx(4 / 6)
  assert clustering.scores(label, np.zeros(6, int))['accuracy'] == pytest.approx(3 / 6)
  assert clustering.scores(label, 1 - label) == pytest.approx({'accuracy': 1.0, 'nmi': 1.0, 'ari': 1.0})


def test_well_separated_classes_are_found_by_all():
  results = run_all(subject(Mixed()), {'clustering': {'restarts': 3}}).results
  for what in ('model', 'gmm', 'kmeans', 'pixels'):
    assert [results[f'clustering/{what}/{s}'].value for s in ('accuracy', 'nmi', 'ari')] == pytest.approx([1, 1, 1])
    assert results[f'clustering/{what}/accuracy'].n == 90
  results = run_all(subject(Pixels()), {'clustering': {'restarts': 1, 'baselines': ('kmeans',)}}).results
  assert set(results) == {f'clustering/kmeans/{s}' for s in ('accuracy', 'nmi', 'ari')}


def test_the_models_own_clusters_are_judged_not_the_baselines():
  s = subject(Mixed())
  merged = jnp.float32(np.array([[0.5, 0.2, 0.5], [0.5, 0.8, 0.5], [0.5, 0.9, 0.5]]))  # classes 0 and 1 in one cluster
  s = dataclasses.replace(s, variables={'params': {'centres': merged}, 'stats': {}})
  results = run_all(s, {'clustering': {'restarts': 2, 'limit': 80}}).results
  assert results['clustering/gmm/accuracy'].value == 1.0
  found = results['clustering/model/accuracy']
  # Of 80 images 40 are of class 0, 20 of class 1 and 20 of class 2.
  assert 50 / 80 <= found.value <= 60 / 80
  assert found.stderr == pytest.approx((found.value * (1 - found.value) / 80) ** 0.5)


def test_clustering_needs_labels():
  with pytest.raises(UserError, match="'clustering' needs labels"):
    run_all(subject(Mixed(), labels=False), {'clustering': {}})
  with pytest.raises(UserError, match='config.evaluate.clustering.baselines'):
    run_all(subject(Mixed()), {'clustering': {'baselines': ('gnm',)}})
  with pytest.raises(UserError, match='config.evaluate.clustering.components'):
    run_all(subject(Mixed()), {'clustering': {'components': 0}})


# ---------------------------------------------------------------------------------------------- pictures


def test_plane_is_that_of_principal_components():
  from sklearn.decomposition import PCA

  points = np.random.default_rng(0).normal(size=(50, 5)) * [1, 5, 2, 0.1, 3]
  origin, directions = latent_space.plane(points)
  want = PCA(2).fit(points)
  got = (points - origin) @ directions
  np.testing.assert_allclose(np.abs(got), np.abs(want.transform(points)), atol=1e-8)
  for d in (1, 2):
    origin, directions = latent_space.plane(points[:, :d])
    np.testing.assert_array_equal(((points[:, :d] - origin) @ directions)[:, :d], points[:, :d])


def test_ellipse_of_a_projected_gaussian():
  rng = np.random.default_rng(1)
  variance, directions = np.array([4.0, 1.0, 0.25]), np.linalg.qr(rng.normal(size=(3, 2)))[0]
  half, angle = latent_space.ellipse(variance, directions)
  drawn = (rng.normal(size=(400_000, 3)) * np.sqrt(variance)) @ directions
  turn = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
  np.testing.assert_allclose(half[0], (drawn @ turn).std(), rtol=5e-3)
  np.testing.assert_allclose(half[1], (drawn @ [-turn[1], turn[0]]).std(), rtol=5e-3)
  assert abs(np.mean((drawn @ turn) * (drawn @ [-turn[1], turn[0]]))) < 0.02


def tile(array, row, column, scale=48, gap=2):
  """Pixels [3] of the one-row image at that place of a grid, in [0, 1]."""
  top, left = gap + row * (scale + gap), gap + column * (3 * scale + gap)
  return array[top, left + scale // 2 : left + 3 * scale : scale] / 255


def test_components_are_decoded_by_weight():
  array = run_all(subject(Mixed()), {'latent_space': {'parts': ('components',)}}).images['components'].array
  for place, component in enumerate((0, 2, 1)):
    np.testing.assert_allclose(tile(array, *divmod(place, 2)), CENTRES[component], atol=1 / 255)


@pytest.mark.parametrize('method', [Pixels(), Mixed()])
def test_traversals_sweep_one_dimension(method):
  s = subject(method)
  options = {'parts': ('traversals',), 'images': 2, 'dimensions': 2, 'columns': 3}
  array = run_all(s, {'latent_space': options}).images['traversals'].array
  x = s.data['test'].take(slice(None))['image'][:, 0, :, 0] / 255
  active = np.argsort(-x.var(0))[:2]
  assert 2 not in active  # the third pixel is the same in all classes
  if method == Pixels():
    ends = {d: (-2, 2) for d in active}
  else:
    middle = WEIGHTS @ CENTRES
    deviation = np.sqrt(WEIGHTS @ (SCALES**2 + CENTRES**2) - middle**2)
    ends = {d: (middle[d] - 2 * deviation[d], middle[d] + 2 * deviation[d]) for d in active}
  for image in range(2):
    for i, d in enumerate(active):
      row = 2 * image + i
      np.testing.assert_allclose(tile(array, row, 0), x[image], atol=1 / 255)
      for column, value in zip((1, 2, 3), (ends[d][0], sum(ends[d]) / 2, ends[d][1]), strict=True):
        want = x[image].copy()
        want[d] = np.clip(value, 0, 1)
        np.testing.assert_allclose(tile(array, row, column), want, atol=2 / 255)


class Classed(Pixels):
  """The third pixel of the decoder's mean is the class over 4, which the posterior reads off the first."""

  def _with(self, trace, label):
    mean = trace.px.base.loc.at[:, :, 0, 2, 0].set(label.argmax(-1) / 4)
    return trace.replace(px=Independent(Normal(mean, 1.0), 3), label=label[None])

  def trace(self, variables, x, key, k=1):
    return self._with(super().trace(variables, x, key, k), jax.nn.one_hot(jnp.int32(4 * x[:, 0, 0, 0]), 5))

  def simulate(self, variables, key, n, sampler=None, temperature=1.0, choose=None, label=None):
    return self._with(super().simulate(variables, key, n, sampler, temperature, choose), label)


def test_traversals_keep_the_class():
  s = subject(Classed())
  options = {'parts': ('traversals',), 'images': 4, 'dimensions': 2, 'columns': 3}
  array = run_all(s, {'latent_space': options}).images['traversals'].array
  x = s.data['test'].take(slice(None))['image'][:4, 0, :, 0] / 255
  want = (4 * x[:, 0]).astype(int) / 4
  assert len(set(want)) > 1
  for image, value in enumerate(want):
    found = [tile(array, 2 * image + i, column)[2] for i in range(2) for column in (1, 2, 3)]
    np.testing.assert_allclose(found, value, atol=1 / 255)


def test_the_image_shown_is_the_one_whose_code_is_traversed():
  """Under a preprocessing that draws: what is not swept is what the original has."""
  def noisy(key, batch, train):
    image = batch['image'].astype(jnp.float32) / 255
    return {**batch, 'image': jnp.clip(image + 0.2 * jax.random.normal(key, image.shape), 0.0, 1.0)}

  s = dataclasses.replace(subject(Pixels()), preprocess=noisy)
  options = {'parts': ('traversals',), 'images': 3, 'dimensions': 1, 'columns': 2}
  array = run_all(s, {'latent_space': options}).images['traversals'].array
  shown, swept = (np.stack([tile(array, row, column) for row in range(3)]) for column in (0, 1))
  same = np.abs(shown - swept).max(0) < 2 / 255
  assert same.sum() == 2


def test_scatter_with_and_without_a_mixture_and_labels():
  for s in (subject(Mixed()), subject(Pixels()), subject(Mixed(), labels=False)):
    images = run_all(s, {'latent_space': {}}).images
    assert ('components' in images) == isinstance(s.method, Mixed)
    picture = images['latent_space']
    assert picture.array.dtype == np.uint8 and picture.array.shape[2] == 3 and (picture.array < 250).any()
    assert ('of the 3 components' in picture.caption) == isinstance(s.method, Mixed)


def test_bad_options_name_the_key():
  for options in ({'columns': 1}, {'images': 0}, {'parts': ('scater',)}):
    with pytest.raises(UserError, match=f'config.evaluate.latent_space.{next(iter(options))}'):
      run_all(subject(Pixels()), {'latent_space': options})
