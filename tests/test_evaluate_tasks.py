"""The tasks on a hierarchical toy method whose posteriors, samplers and critics are known."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from latentgen.data.source import ArraySource
from latentgen.distributions import Bernoulli, Independent, Normal
from latentgen.errors import UserError
from latentgen.evaluate import Subject, check_subject, check_tasks, features, names, run_all, task_module
from latentgen.evaluate.grids import GAP, grid
from latentgen.types import Trace, ancestral

GROUPS, WIDTH, SHIFT = (1, 2), 2, 0.5  # groups of each level, dimensions of each group


def per_level(values, groups):
  return tuple(jnp.stack(values[sum(groups[:i]) : sum(groups[: i + 1])]) for i in range(len(groups)))


@dataclasses.dataclass(frozen=True)
class Toy:
  """All three groups are N(0, I) under the base prior and N(SHIFT, I) under the posterior of every image.

  The decoder writes the latents into the image: pixel (l, d) is sigmoid(z_l,d), all others 1/2; group 0 of level 1 is
  row 1.
  The sampler 'learned' draws from the aggregate posterior. Critics are exact, times `factor`.
  """

  factor: float = 1.0
  samplers = ('learned', 'base')

  def _trace(self, z, log_px=None):  # z: [groups, k, b, WIDTH]
    z = jnp.asarray(z)
    pixels = jax.nn.sigmoid(z).transpose(1, 2, 0, 3)  # [k, b, groups, WIDTH]
    image = jnp.full((*z.shape[1:3], 4, 4, 1), 0.5).at[:, :, : z.shape[0], :WIDTH, 0].set(pixels)
    levels = per_level(list(z), GROUPS)
    p = tuple(Normal(0.0, 1.0).log_prob(l).sum(-1) for l in levels)
    q = tuple(Normal(SHIFT, 1.0).log_prob(l).sum(-1) for l in levels)
    px = Independent(Normal(image, 0.1), 3)
    return Trace(levels, levels, q, p, None, tuple(jnp.zeros_like(l) for l in levels), None, log_px, px)

  def trace(self, variables, x, key, k=1):
    z = SHIFT + jax.random.normal(key, (sum(GROUPS), k, x.shape[0], WIDTH))
    return self._trace(z, self._trace(z).px.log_prob(x))

  def simulate(self, variables, key, n, sampler=None, temperature=1.0, choose=None):
    shift = 0.0 if (sampler or self.samplers[0]) == 'base' or choose else SHIFT
    choose = choose or ancestral
    found = []
    for level, groups in enumerate(GROUPS):
      def step(carry, g, level=level):
        prior = Normal(jnp.zeros((n, WIDTH)), temperature)
        mine = jax.random.fold_in(jax.random.fold_in(key, level), g)
        return carry, shift + choose(level, g, prior, jnp.zeros((n, 1)), mine)
      found += list(jax.lax.scan(step, 0, jnp.arange(groups))[1])
    return self._trace(jnp.stack(found)[:, None])

  def _log_ratio(self, z):
    return self.factor * (SHIFT * z - SHIFT**2 / 2).sum(-1)

  def logits(self, variables, x, key):
    posterior, prior = jax.random.normal(key, (2, sum(GROUPS), x.shape[0], WIDTH))
    return tuple(per_level(list(self._log_ratio(z)), GROUPS) for z in (SHIFT + posterior, prior))

  def partition(self, variables, x, key, proposals):
    z = jax.random.normal(key, (sum(GROUPS), x.shape[0], proposals, WIDTH))
    log_r = self._log_ratio(z)
    log_z = jax.nn.logsumexp(log_r, -1) - math.log(proposals)
    ess = jnp.exp(2 * jax.nn.logsumexp(log_r, -1) - jax.nn.logsumexp(2 * log_r, -1))
    return per_level(list(log_z), GROUPS), per_level(list(ess), GROUPS)


def preprocess(key, batch, train):
  del key, train
  return {**batch, 'image': batch['image'].astype(jnp.float32) / 255}


def sources(n=150, labels=True):
  def one(seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(3, size=n)
    image = rng.integers(0, 120, (n, 4, 4, 1)) + 60 * (np.arange(4) % 3 == label[:, None])[:, None, :, None]
    return ArraySource(image.astype(np.uint8), label if labels else None)

  return {split: one(seed) for seed, split in enumerate(('train', 'valid', 'test'))}


def subject(n=150, labels=True, batch_size=64, **options):
  return Subject(
    Toy(**options), {'params': {}, 'stats': {}}, sources(n, labels), preprocess, jax.random.key(7), batch_size
  )


def test_two_sample_tells_base_from_posterior_and_not_the_learned_prior():
  options = {'classifier': 'quadratic', 'draws': 3, 'split': ('valid', 'test')}
  results = run_all(subject(), {'two_sample': options}).results
  optimum = scipy.stats.norm.cdf(SHIFT * math.sqrt(sum(GROUPS) * WIDTH) / math.sqrt(2))
  base, learned = results['two_sample/base/auroc'], results['two_sample/learned/auroc']
  assert base.n == 300
  assert optimum - 0.05 < base.value < optimum + 3.5 * base.stderr
  assert abs(learned.value - 0.5) < 3.5 * learned.stderr
  level = scipy.stats.norm.cdf(SHIFT * math.sqrt(WIDTH) / math.sqrt(2))
  found = results['two_sample/base/level0/auroc']
  assert level - 0.05 < found.value < level + 3.5 * found.stderr
  assert results['two_sample/base/accuracy'].value > 0.6 > results['two_sample/learned/accuracy'].value


def test_frechet_prefers_the_sampler_that_is_nearer():
  s = subject(batch_size=200)
  # Test images drawn from the toy's own aggregate posterior, so that 'learned' is at the floor.
  x = np.asarray(s.method.trace({}, jnp.zeros((1600, 4, 4, 1)), jax.random.key(3)).px.mean[0] * 255).astype(np.uint8)
  label = (x[:, 0, 0, 0] > 160).astype(int)
  data = {'train': ArraySource(x[:800], label[:800]), 'test': ArraySource(x[800:], label[800:])}
  s = dataclasses.replace(s, data=data)
  results = run_all(s, {'frechet': {'steps': 300, 'repeats': 20, 'blocks': 5}}).results
  for kind in ('frechet', 'kernel'):
    base, learned, real = (results[f'{kind}_small_classifier/{name}'] for name in ('base', 'learned', 'real'))
    assert base.n == 800 and base.stderr > 0
    assert base.value > learned.value + 2 * math.hypot(base.stderr, learned.stderr)
    assert abs(learned.value - real.value) < 4 * math.hypot(learned.stderr, real.stderr)
  assert results['small_classifier/accuracy'].value > 0.9
  assert results == run_all(s, {'frechet': {'steps': 300, 'repeats': 20, 'blocks': 5}}).results
  assert not [name for name in results if 'fid' in name.lower()]


def test_features_without_labels_are_named_after_what_they_are():
  results = run_all(subject(labels=False), {'frechet': {'components': 4, 'repeats': 5}}).results
  names = ('real', 'base', 'learned')
  assert set(results) == {f'{kind}_pca/{name}' for kind in ('frechet', 'kernel') for name in names}


def test_real_images_stay_grey_under_fresh_binarisation():
  from latentgen.data import preprocess as make

  s = subject(n=30)
  grey = s.data['test'].take(slice(None))['image'] / 255
  for options, expected, error in (
    ({'binarize': 'fresh'}, grey, 1e-6),
    ({'binarize': 'threshold'}, grey >= 128 / 255, 0),
    ({'dequantize': True}, grey * 255 / 256 + 0.5 / 256, 0.5 / 256),
    ({}, grey, 1e-6),
  ):
    found, labels = features.grey_images(dataclasses.replace(s, preprocess=make.make(**options)), 'frechet', 'test')
    np.testing.assert_allclose(found, expected, atol=error, err_msg=str(options))
    assert labels.shape == (30,)
  found, _ = features.grey_images(dataclasses.replace(s, preprocess=make.make('fresh', pad=2)), 'frechet', 'test', 5)
  np.testing.assert_allclose(found[:, 2:-2, 2:-2], grey[:5], atol=1e-6)
  assert found.shape == (5, 8, 8, 1) and not found[:, :2].any()


def test_calibration_of_exact_and_of_overconfident_critics():
  exact = run_all(subject(n=3000, batch_size=1000), {'calibration': {'repeats': 10}})
  doubled = run_all(subject(n=3000, batch_size=1000, factor=2.0), {'calibration': {'repeats': 10}}).results
  results = exact.results
  assert results['calibration/ece'].value < 0.02 < 0.05 < doubled['calibration/ece'].value
  names = ('ece', 'accuracy', 'nce')
  assert {f'calibration/level1/group{j}/{name}' for j in range(2) for name in names} <= set(results)
  # Two unit normals at distance d, equal odds: the best accuracy is Phi(d / 2).
  best = scipy.stats.norm.cdf(SHIFT * math.sqrt(WIDTH) / 2)
  accuracy = results['calibration/level0/group0/accuracy']
  assert abs(accuracy.value - best) < 4 * accuracy.stderr
  assert results['calibration/nce'].value < min(2 * math.log(2), doubled['calibration/nce'].value)
  assert exact.images['calibration'].array.dtype == np.uint8


def test_critics_as_they_began_are_right_half_of_the_time():
  results = run_all(subject(n=20, factor=0.0), {'calibration': {'repeats': 2}}).results
  for name in ('', '/level0/group0', '/level1/group1'):
    found = results[f'calibration{name}/accuracy']
    assert found.value == 0.5 and found.stderr == 0.0


def test_partition_shows_the_bias_at_m_and_ten_m():
  results = run_all(subject(n=400), {'partition': {'proposals': 5, 'limit': 400}}).results
  # log-normal r: exact log Z = 0, Var r = e^{d^2} - 1 with d^2 = SHIFT^2 WIDTH; to first order -Var / (2 M) a group.
  bias = {m: results[f'partition/M{m}/log_z'] for m in (5, 50)}
  assert bias[5].value < bias[50].value < 3 * bias[50].stderr
  expected = -3 * (math.exp(SHIFT**2 * WIDTH) - 1) / (2 * 50)
  assert abs(bias[50].value - expected) < 4 * bias[50].stderr
  gain = results['partition/log_z_gain']
  assert gain.value == pytest.approx(bias[50].value - bias[5].value, abs=1e-6)
  share = results['partition/M50/level1/group1/ess_fraction']
  assert share.value == pytest.approx(math.exp(-(SHIFT**2) * WIDTH), abs=0.05)  # 1 / E[r^2]
  assert share.n == 400


def test_pictures():
  images = run_all(subject(), {'samples': {'count': 9, 'images': 3, 'temperatures': (0.5, 1.0)}}).images
  assert set(images) == {'before_after', 'samples_base', 'samples_learned', 'temperatures', 'reconstructions', 'levels'}
  for picture in images.values():
    assert picture.array.dtype == np.uint8 and picture.array.ndim in (2, 3) and picture.title
  again = run_all(subject(), {'samples': {'count': 9, 'images': 3, 'temperatures': (0.5, 1.0)}}).images
  assert all((images[name].array == again[name].array).all() for name in images)


def test_fixed_groups_stay_and_the_others_change():
  """Columns of the picture: the original, then 3, 2, 1, 0 groups fixed; latent l is in pixel row l."""
  array = run_all(subject(), {'samples': {'images': 4, 'parts': ('levels',)}}).images['levels'].array
  scale, gap = 12, 2
  tile = 4 * scale + gap
  assert array.shape == (4 * tile + gap, 5 * tile + gap)
  cell = lambda row, column: array[gap + row * tile :, gap + column * tile :][: 4 * scale : scale, : 4 * scale : scale]
  for row in range(4):
    whole = cell(row, 1)
    for column, fixed in ((2, 2), (3, 1), (4, 0)):
      other = cell(row, column)
      same = [(whole[g, :WIDTH] == other[g, :WIDTH]).all() for g in range(3)]
      assert same == [True] * fixed + [False] * (3 - fixed)


class Classed(Toy):
  """The last pixel tells the class, which the posterior reads off the image's first."""

  def _with(self, trace, label):
    mean = trace.px.base.loc.at[0, :, 3, 3, 0].set(label.argmax(-1) / 2)
    return trace.replace(px=Independent(Normal(mean, 0.1), 3), label=label[None])

  def trace(self, variables, x, key, k=1):
    return self._with(super().trace(variables, x, key, k), jax.nn.one_hot(jnp.int32(2.9 * x[:, 0, 0, 0]), 3))

  def simulate(self, variables, key, n, sampler=None, temperature=1.0, choose=None, label=None):
    return self._with(super().simulate(variables, key, n, sampler, temperature, choose), label)


def test_the_class_stays_while_any_group_does():
  s = dataclasses.replace(subject(n=64), method=Classed())
  image = s.data['test'].take(slice(None))['image'] / 255
  array = run_all(s, {'samples': {'images': 60, 'parts': ('levels',)}}).images['levels'].array
  scale, gap = 12, 2
  tile = 4 * scale + gap
  last = array[gap + 3 * scale :: tile, gap + 3 * scale :: tile][:60].astype(float) / 255  # [images, columns]
  want = np.float32(2.9 * image[:60, 0, 0, 0]).astype(int) / 2
  assert len(np.unique(want)) > 1
  np.testing.assert_allclose(last[:, 1:4], np.repeat(want[:, None], 3, 1), atol=1 / 255)
  counts = [np.sum(np.abs(last[:, 4] - c / 2) < 1e-2) for c in range(3)]
  assert sum(counts) == 60 and min(counts) > 5  # uniform, 20 each


def test_grid_layout():
  images = np.zeros((3, 2, 3, 1))
  images[0, 0, 0], images[1, 1, 2], images[2] = 1.0, 0.5, 7.0
  found = grid(images, columns=2, scale=2, gap=1)
  assert found.shape == (2 * 5 + 1, 2 * 7 + 1) and found.dtype == np.uint8
  assert (found[1:3, 1:3] == 255).all() and found[1, 3] == 0 and found[3, 1] == 0  # first tile, enlarged pixel
  assert (found[3:5, 12:14] == 128).all() and found[3, 11] == 0  # second tile, lower right pixel
  assert (found[6:10, 1:7] == 255).all()  # third tile, clipped
  assert (found[6:10, 8:14] == GAP).all() and (found[0] == GAP).all() and (found[:, 7] == GAP).all()
  assert grid(np.zeros((4, 8, 8, 1))).shape == (2 * 50 + 2, 2 * 50 + 2)  # 8x8 is enlarged six times
  assert grid(np.zeros((2, 64, 64, 3)), 2).shape == (68, 134, 3)


def test_tasks_do_not_depend_on_one_another():
  alone = run_all(subject(), {'partition': {'limit': 50}}).results
  among = run_all(subject(), {'likelihood': {'samples': 2}, 'partition': {'limit': 50}}).results
  assert {name: among[name] for name in alone} == alone


@pytest.mark.parametrize(
  ('tasks', 'words'),
  [
    ({'two_sample': {'samplers': ('lerned',)}}, ['config.evaluate.two_sample.samplers', "did you mean 'learned'"]),
    ({'two_sample': {'classifier': 'qadratic'}}, ['config.evaluate.two_sample.classifier', "'quadratic'"]),
    ({'two_sample': {'folds': 1}}, ['config.evaluate.two_sample.folds']),
    ({'samples': {'temperatures': (0.0,)}}, ['config.evaluate.samples.temperatures', '0.0']),
    ({'frechet': {'limit': 3}}, ['config.evaluate.frechet.limit']),
    ({'partition': {'proposals': 0}}, ['config.evaluate.partition.proposals']),
  ],
)
def test_bad_options_name_the_key(tasks, words):
  with pytest.raises(UserError) as caught:
    run_all(subject(n=40), tasks)
  for word in words:
    assert word in str(caught.value)


def test_options_are_checked_before_any_work():
  with pytest.raises(UserError, match='config.evaluate.samples.cout: unknown option; did you mean .count.'):
    check_tasks({'likelihood': {}, 'samples': {'cout': 3}})


def test_options_that_tasks_have_by_default_pass_their_checks():
  for task in names():
    options = list(inspect.signature(task_module(task).run).parameters.values())[1:]
    check_tasks({task: {p.name: p.default for p in options}})
  check_tasks({'samples': {'readjust_batches': 0, 'samplers': 'base', 'temperatures': (1, 0.5)}, 'comparison': {'priors': (('a', 'b'),)}})


@pytest.mark.parametrize(
  ('task', 'option', 'value'),
  [
    ('likelihood', 'limit', 0),
    ('likelihood', 'limit', 2.5),
    ('likelihood', 'samples', None),
    ('likelihood', 'split', ('valid', 'test')),
    ('two_sample', 'folds', 1),
    ('two_sample', 'coordinates', 'x'),
    ('samples', 'temperatures', 0.5),
    ('samples', 'temperatures', (1.0, 0.0)),
    ('samples', 'readjust_batches', -1),
    ('samples', 'samplers', 3),
    ('latent_space', 'parts', ('scater',)),
    ('inpainting', 'hidden', 'lower'),
    ('restoration', 'noise', -0.1),
    ('restoration', 'unknown', 'upper'),
    ('clustering', 'components', 0),
    ('clustering', 'baselines', ('means',)),
    ('anomaly', 'lower', 'modus'),
    ('gradient_snr', 'objectives', ('elbow',)),
    ('gradient_snr', 'inner', (1, 0)),
    ('gradient_snr', 'draws', 1),
    ('comparison', 'priors', ('flow',)),
    ('probe', 'inverse_penalty', 'small'),
  ],
)
def test_values_of_options_are_checked_by_name_and_type(task, option, value):
  with pytest.raises(UserError, match=f'config.evaluate.{task}.{option}: '):
    check_tasks({task: {option: value}})


@pytest.mark.parametrize(
  ('tasks', 'words'),
  [
    ({'likelihood': {'split': 'tst'}}, "config.evaluate.likelihood.split: unknown value 'tst'; did you mean 'test'?"),
    ({'two_sample': {'split': ('valid', 'tst')}}, "config.evaluate.two_sample.split: unknown value 'tst'"),
    ({'two_sample': {'split': ('valid', 'test'), 'limit': 4}}, 'config.evaluate.two_sample.limit .*at least 10, not 8'),
    ({'two_sample': {'samplers': 'lerned'}}, "config.evaluate.two_sample.samplers: unknown value 'lerned'"),
    ({'manifold': {'stages': ('vea',)}}, "config.evaluate.manifold.stages: unknown value 'vea'"),
    ({'comparison': {'priors': (('base', 'vea'),)}}, "config.evaluate.comparison.priors: unknown value 'vea'"),
    ({'clustering': {}}, "'clustering' needs labels, and split 'test' has none"),
    ({'gradient_snr': {}}, "'gradient_snr' needs methods.iwae, not Toy"),
  ],
)
def test_what_a_run_does_not_have_is_refused_before_training(tasks, words):
  with pytest.raises(UserError, match=words):
    check_subject(tasks, sources(labels=False), Toy(), ('vae',))


def test_a_decoder_that_is_not_gaussian_is_refused_before_training():
  key, x = jax.random.key(0), jnp.zeros((2, 4, 4, 1))
  check_subject({'uncertainty': {}}, sources(), Toy(), trace=lambda: jax.eval_shape(Toy().trace, {}, x, key))
  bernoulli = lambda: dataclasses.replace(Toy().trace({}, x, key), px=Independent(Bernoulli(x), 3))
  with pytest.raises(UserError, match="'uncertainty' needs a Gaussian decoder, and this one is Bernoulli"):
    check_subject({'uncertainty': {}}, sources(), Toy(), trace=bernoulli)
