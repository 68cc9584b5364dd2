"""L^{>k} and the likelihood ratio on an exact linear-Gaussian hierarchy, detection by hand, and the sets of outliers."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from latentgen import config as configs, sections
from latentgen.data import ArraySource, preprocess
from latentgen.distributions import Independent, Normal
from latentgen.errors import UserError
from latentgen.evaluate import Subject, anomaly, check_subject, outliers, run_all
from latentgen.methods import semi_supervised
from latentgen.nets import biva, groups
from latentgen.types import Trace, ancestral

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
# x: (L^{>1}, LLR^{>1}, LLR^{>2}) of Exact, with the lower latents sampled
TABLE = {0.0: (-2.22778, 0.85069, 1.19528), 2.0: (-3.98778, 1.81069, 4.39528), 4.0: (-9.26778, 4.69069, 13.99528)}


@dataclasses.dataclass(frozen=True)
class Exact:
  """z2 ~ N(0, 1), z1 | z2 ~ N(z2, 1), x | z1 ~ N(z1, .5) (variances), q the exact posterior; images are [1, 1, 1].

  Marginals: z2 | x ~ N(.4 x, .6), z1 | z2, x ~ N((z2 + 2 x) / 3, 1/3). One level of two groups, or two levels of one.
  """

  levels: int = 1

  def _trace(self, z2, z1, x=None):
    zs = [jnp.stack([z2, z1])[..., None]] if self.levels == 1 else [z2[None, ..., None], z1[None, ..., None]]
    stack = lambda a, b: (jnp.stack([a, b]),) if self.levels == 1 else (a[None], b[None])
    log_p = stack(Normal(0.0, 1.0).log_prob(z2), Normal(z2, 1.0).log_prob(z1))
    px = Independent(Normal(z1[..., None, None, None], jnp.sqrt(0.5)), 3)
    log_q, log_px = (), None
    if x is not None:
      v = x[:, 0, 0, 0]
      log_q = stack(Normal(0.4 * v, 0.6**0.5).log_prob(z2), Normal((z2 + 2 * v) / 3, 3**-0.5).log_prob(z1))
      log_px = px.log_prob(x)
    return Trace(tuple(zs), tuple(zs), log_q, log_p, None, (), None, log_px, px)

  def trace(self, variables, x, key, k=1):
    v = x[:, 0, 0, 0]
    a, b = jax.random.normal(key, (2, k, x.shape[0]))
    z2 = 0.4 * v + 0.6**0.5 * a
    return self._trace(z2, (z2 + 2 * v) / 3 + 3**-0.5 * b, x)

  def simulate(self, variables, key, n, sampler=None, temperature=1.0, choose=ancestral):
    top, low = jax.random.split(key)
    context = jnp.zeros((n, 1))
    ones = jnp.ones((n, 1))
    z2 = choose(0, 0, Normal(0 * ones, ones), context, top)
    z1 = choose(*((0, jnp.int32(1)) if self.levels == 1 else (1, jnp.int32(0))), Normal(z2, ones), context, low)
    return self._trace(z2[None, :, 0], z1[None, :, 0])


def plain(key, batch, train):
  return batch


def images(values):
  return np.asarray(values, np.float32).reshape(-1, 1, 1, 1)


def values_of(x, n, method=Exact(), samples=1, **options):
  """Bounds [3, n] of n copies of x."""
  function = anomaly.bounds(method, samples, **options)
  return np.asarray(jax.jit(function)({}, jnp.asarray(images(np.full(n, x))), jax.random.key(3))['bounds'], np.float64)


def close(found, want):
  """Within 3 standard errors of a mean, which are at most 0.05 here."""
  error = found.std(ddof=1) / np.sqrt(len(found))
  assert error < 0.05 and abs(found.mean() - want) < 3 * error + 1e-5, (found.mean(), want, error)


@pytest.mark.parametrize('unit, levels', [('group', 1), ('level', 2), ('group', 2)])
@pytest.mark.parametrize('x', TABLE)
def test_sampled_bounds_of_an_exact_hierarchy(x, unit, levels):
  elbo, one, two = values_of(x, 200_000, Exact(levels), unit=unit)
  np.testing.assert_allclose(elbo, scipy.stats.norm.logpdf(x, 0, 2.5**0.5), atol=1e-4)  # q is exact: every sample is log p(x)
  close(one, TABLE[x][0])
  close(elbo - one, TABLE[x][1])
  close(elbo - two, TABLE[x][2])


def test_a_level_of_two_groups_counts_once():
  assert values_of(0.0, 4, unit='level').shape == (2, 4)  # one level: L^{>0} and L^{>1}, all from the prior
  np.testing.assert_allclose(values_of(0.0, 4, unit='level')[1], values_of(0.0, 4)[2], rtol=1e-6)


@pytest.mark.parametrize('x', TABLE)
def test_ratio_is_a_kl_where_the_posterior_is_exact(x):
  """KL(p(z_{<=k} | z_{>k}) || q(z_{<=k} | z_{>k}, x)), by its own closed form, is not negative."""
  elbo, one, two = values_of(x, 200_000)
  # given z2, KL(N(z2, 1) || N((z2 + 2 x) / 3, 1/3)), averaged over z2 ~ N(.4 x, .6)
  kl1 = 0.5 * (-np.log(3) + 3 - 1 + 3 * 4 / 9 * ((0.6 * x) ** 2 + 0.6))
  # log p(x) - E log N(x; z1, .5), z1 ~ N(0, 2)
  kl2 = scipy.stats.norm.logpdf(x, 0, 2.5**0.5) + 0.5 * np.log(np.pi) + x**2 + 2
  np.testing.assert_allclose((kl1, kl2), TABLE[x][1:], atol=1e-4)
  assert min(kl1, kl2) > 0
  close(elbo - one, kl1)
  close(elbo - two, kl2)


def test_mode_is_another_quantity():
  """At the mode x is told by N(x; z2, .5) with z2 ~ N(.4 x, .6), or by N(x; 0, .5)."""
  x = 2.0
  _, one, two = values_of(x, 200_000, lower='mode')
  kl = 0.5 * (np.log(1 / 0.6) + 0.6 - 1 + (0.4 * x) ** 2)
  close(one, -0.5 * np.log(np.pi) - ((0.6 * x) ** 2 + 0.6) - kl)
  np.testing.assert_allclose(two, scipy.stats.norm.logpdf(x, 0, 0.5**0.5), atol=1e-4)


def test_samples_are_combined_as_said():
  """With many samples log-mean-exp of L^{>1} is log E_q[w], here log p(x) again; the mean stays at the bound."""
  x = 2.0
  many = values_of(x, 200, samples=2000)
  np.testing.assert_allclose(many[0], scipy.stats.norm.logpdf(x, 0, 2.5**0.5), atol=1e-4)
  close(many[1], scipy.stats.norm.logpdf(x, 0, 2.5**0.5))
  close(values_of(x, 200, samples=2000, combine='mean')[1], TABLE[x][0])


# ---------------------------------------------------------------------------------------- a model with classes


CLASSES, SIZE, COPIES = 3, (4, 4, 1), 200
NET = biva.build(SIZE, latents=(2, 2), strides=(2, 1), kernels=(3,), blocks=1, filters=3, num_classes=CLASSES)


@dataclasses.dataclass(frozen=True)
class Given(semi_supervised.SemiSupervised):
  """Has seen its posterior sample already: the one of the key that `variables` hold, whatever the key."""

  def trace(self, variables, x, key, k=1):
    return super().trace(variables, x, jax.random.key(variables['seed']), k)


def classed():
  """(method, variables far from the initial ones, as many images of each of two kinds)."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(np.repeat(rng.uniform(size=(2, *SIZE)) < 0.5, COPIES, 0), jnp.float32)
  keys = {'params': jax.random.key(0), 'sample': jax.random.key(1)}
  shapes = jax.eval_shape(lambda: NET.init(keys, x[:4], method='infer')['params'])

  def draw(path, leaf):
    return jnp.float32(rng.uniform(1.0, 2.0, leaf.shape) if path[-1].key == 'gain' else 0.7 * rng.normal(size=leaf.shape))

  params = groups(jax.tree_util.tree_map_with_path(draw, shapes))
  return Given(NET, 10), {'params': params, 'stats': {}, 'seed': 4}, x


def test_the_class_of_a_trace_goes_with_its_latents():
  method, variables, x = classed()
  trace = jax.jit(lambda v, x: method.trace(v, x, jax.random.key(0)))(variables, x)
  assert trace.label.shape == (1, 2 * COPIES, CLASSES) and set(np.unique(trace.label)) == {0.0, 1.0}
  assert (trace.label.sum(-1) == 1).all() and (trace.label.sum((0, 1)) > 5).all()
  back = lambda level, group, *_: trace.z[level][group][0]

  @jax.jit
  def log_px(variables, label, key):
    found = method.simulate(variables, key, len(x), choose=back, label=label)
    return found.px.log_prob(x)[0], found.label

  again, label = log_px(variables, trace.label[0], jax.random.key(9))
  np.testing.assert_allclose(again, trace.log_px[0], rtol=1e-4)
  np.testing.assert_array_equal(label, trace.label)
  other, label = log_px(variables, None, jax.random.key(9))  # the network draws another
  differs = (label != trace.label).any(-1)[0]
  assert 0.5 < differs.mean() < 0.9
  np.testing.assert_array_equal(np.abs(other - trace.log_px[0]) > 1e-3, differs)


def test_labels_of_passes_are_those_that_were_given():
  method, variables, x = classed()
  x, y = x[:3], jnp.eye(CLASSES)[jnp.array([2, 0, 1])]
  run = lambda name, *args, **options: method._apply(variables['params'], {}, jax.random.key(1), name, *args, **options)[0]
  np.testing.assert_array_equal(run('infer', x, 2, y=y).label, np.stack([y, y]))
  every, _ = run('infer_classes', x, 2)
  np.testing.assert_array_equal(every.label.argmax(-1), np.tile(np.arange(CLASSES), 2)[:, None].repeat(3, 1))
  np.testing.assert_array_equal(run('simulate', 3, y=y).label, y[None])
  plain_net = biva.build(SIZE, latents=(2, 2), strides=(2, 1), kernels=(3,), blocks=1, filters=3)
  drawn = jax.eval_shape(lambda k: plain_net.init_with_output({'params': k, 'sample': k}, x), jax.random.key(0))[0]
  assert drawn.label is None


def test_bounds_with_classes_keep_the_class_while_they_keep_a_group():
  """With the lower latents at their modes every bound is one pass of the network under the trace's class; without any group
  left the class is any of the three."""
  method, variables, x = classed()
  found = np.asarray(jax.jit(anomaly.bounds(method, lower='mode'))(variables, x, jax.random.key(3))['bounds'], np.float64)
  trace = method.trace(variables, x, None)
  total = len(found) - 1
  assert total == 3
  np.testing.assert_allclose(found[0], trace.log_weight()[0], rtol=1e-5)
  order, flat = [(0, 0), (1, 0), (1, 1)], []
  for level, group in order:
    flat.append(np.asarray(trace.log_p[level][group, 0] - trace.log_q[level][group, 0], np.float64))

  def under(y, fixed):
    """log p(x | z) [n] with the top groups of the trace, the others at the mode, under classes y [n, classes]."""
    keep = lambda level, group, prior, *_: trace.z[level][group][0] if order.index((level, group)) < fixed else prior.mean
    pass_ = method._apply(variables['params'], {}, jax.random.key(0), 'simulate', len(x), y=y, choose=keep)[0]
    return np.asarray(pass_.px.log_prob(x)[0], np.float64)

  for k in range(1, total):
    fixed = total - k
    np.testing.assert_allclose(found[k], under(trace.label[0], fixed) + sum(flat[:fixed]), rtol=1e-4)
  each = np.stack([under(jnp.tile(jnp.eye(CLASSES)[c], (len(x), 1)), 0) for c in range(CLASSES)])
  assert np.abs(np.diff(np.sort(each, 0), axis=0)).min() > 1e-2
  distance = np.abs(found[total] - each)
  assert distance.min(0).max() < 1e-3
  drawn = distance.argmin(0)
  n = len(x)
  assert np.abs(np.bincount(drawn, minlength=CLASSES) - n / 3).max() < 4 * np.sqrt(n * 2 / 9)
  assert abs((drawn == np.asarray(trace.label[0]).argmax(-1)).mean() - 1 / 3) < 4 * np.sqrt(2 / 9 / n)


# ---------------------------------------------------------------------------------------- detection


def test_detection_by_hand():
  # positives 3, 1, 2, 5, 4 against 0, 2, 3.5, -1; threshold 2 finds four of five and takes two of four
  found = anomaly.detection(np.array([3.0, 1.0, 2.0, 5.0, 4.0]), np.array([0.0, 2.0, 3.5, -1.0]))
  assert found['auroc'].value == pytest.approx((3 + 2 + 2.5 + 4 + 4) / 20)
  assert found['fpr80'].value == pytest.approx(0.5)
  assert found['fpr80'].stderr == pytest.approx(0.25)
  # by falling score: 5 4 | 3.5 | 3 | 2 (one of each) | 1, precision at each recall step
  assert found['auprc'].value == pytest.approx((1 + 1 + 3 / 4 + 4 / 6 + 5 / 7) / 5)
  assert found['auroc'].n == 9


def test_detection_of_perfect_and_of_wrong_scores():
  low, high = np.arange(50.0), 100 + np.arange(20.0)
  assert [r.value for r in anomaly.detection(high, low).values()] == [1.0, 1.0, 0.0]
  assert anomaly.detection(low, high)['auroc'].value == 0.0 and anomaly.detection(low, high)['fpr80'].value == 1.0


def test_area_is_scikit_learns():
  rng = np.random.default_rng(0)
  a, b = rng.normal(0.7, 1, 300).round(1), rng.normal(0, 1, 500).round(1)
  found = anomaly.detection(a, b)['auroc']
  assert found.value == pytest.approx(metrics.roc_auc_score(np.repeat([1, 0], [300, 500]), np.r_[a, b]))
  assert abs(found.value - scipy.stats.norm.cdf(0.7 / 2**0.5)) < 3 * found.stderr


def subject(test, labels=None, train_labels=None):
  classes = 0 if labels is None else 10
  splits = {
    'train': ArraySource(images([0.0, 1.0]), train_labels, 'set/train', classes),
    'test': ArraySource(test, labels, 'set/test', classes),
  }
  return Subject(Exact(), {}, splits, plain, jax.random.key(5), 64)


def test_task_on_a_set_whose_scores_are_known():
  """Outliers at +-4 among N(0, 2.5): log p(x) is monotone in |x|, so the area is P(|x| < 4), and the ratio grows as |x|."""
  rng = np.random.default_rng(1)
  x = rng.normal(0, 2.5**0.5, 400)
  test = images(np.r_[x, np.full(100, 4.0), np.full(100, -4.0)])
  s = subject(test, labels=np.repeat([0, 9], [400, 200]), train_labels=np.array([0, 0]))
  found = run_all(s, {'anomaly': {'outliers': ('held_out', 'noise')}})
  r = found.results
  inside = (abs(x) < 4).mean()
  assert r['anomaly/held_out/elbo/auroc'].value == pytest.approx(inside, abs=1e-3)
  assert r['anomaly/held_out/elbo/auroc'].n == 600
  assert r['anomaly/held_out/elbo/fpr80'].value == pytest.approx(1 - inside, abs=5e-3)
  # LLR^{>2} given z1 ~ p is monotone in (x - z1)^2: P(|4 - z1| > |x - z1'|)
  z = rng.normal(0, 2**0.5, (2, 200_000))
  want = (abs(4 - z[0]) > abs(rng.normal(0, 2.5**0.5, 200_000) - z[1])).mean()
  bound = r['anomaly/held_out/bound2/auroc']
  assert abs(bound.value - want) < 3.5 * bound.stderr and 0 < bound.stderr < 0.05
  close_to = scipy.stats.norm.logpdf(x, 0, 2.5**0.5).mean()
  assert r['anomaly/in_distribution/elbo'].value == pytest.approx(close_to, abs=1e-4)
  assert r['anomaly/held_out/llr2'].value == pytest.approx(TABLE[4.0][2], abs=3 * r['anomaly/held_out/llr2'].stderr)
  scores = ('elbo', 'bound1', 'bound2', 'llr1', 'llr2')
  assert set(r) == {f'anomaly/{s}/{name}' for s in ('in_distribution', 'held_out', 'noise') for name in scores} | {
    f'anomaly/{s}/{name}/{metric}' for s in ('held_out', 'noise') for name in scores for metric in ('auroc', 'auprc', 'fpr80')
  }
  assert r['anomaly/noise/elbo'].n == 400
  for picture in found.images.values():
    assert picture.array.dtype == np.uint8 and picture.array.ndim == 3
  assert run_all(s, {'anomaly': {'outliers': ('held_out', 'noise')}}).results == r


# ---------------------------------------------------------------------------------------- sets of outliers


GREY = np.random.default_rng(2).integers(0, 200, (30, 4, 3, 1), np.uint8)
LABELS = np.arange(30) % 3


def splits(image=GREY, train=(0, 1)):
  """Training has the classes `train` only."""
  kept = np.isin(LABELS, train)
  return {'train': ArraySource(image[kept], LABELS[kept], 'set/train', 3), 'test': ArraySource(image, LABELS, 'set/test', 3)}


def make(wanted, limit=None, image=GREY, seed=0, **options):
  found = outliers.sources(splits(image, **options), 'test', wanted, limit, seed)
  return {name: source.take(slice(None))['image'] for name, source in found.items()}


def test_sets_made_from_the_split():
  found = make(('held_out', 'noise', 'shuffled', 'inverted'))
  inside = GREY[LABELS < 2]
  np.testing.assert_array_equal(found['in_distribution'], inside)
  np.testing.assert_array_equal(found['held_out'], GREY[LABELS == 2])
  np.testing.assert_array_equal(found['inverted'], 255 - inside)
  flat = found['shuffled'].reshape(20, -1)
  np.testing.assert_array_equal(np.sort(flat, 1), np.sort(inside.reshape(20, -1), 1))
  assert (flat != inside.reshape(20, -1)).any(1).all()
  ranks = inside.reshape(20, -1).argsort(1, kind='stable')
  assert len({tuple(np.take_along_axis(f[None], o[None], 1)[0].argsort()) for f, o in zip(flat, ranks, strict=True)}) > 10
  assert found['noise'].shape == inside.shape and found['noise'].max() > 200  # beyond what the images have
  assert abs(found['noise'].mean() - 127.5) < 3.5 * 73.9 / found['noise'].size ** 0.5
  again = make(('noise', 'shuffled'))
  np.testing.assert_array_equal(again['noise'], found['noise'])
  assert (make('noise', seed=1)['noise'] != found['noise']).any()


def test_colours_of_a_pixel_stay_together():
  x = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
  y = outliers.shuffled(x, np.random.default_rng(0))
  assert {tuple(p) for p in y[0].reshape(-1, 3)} == {tuple(p) for p in x[0].reshape(-1, 3)}
  assert (y[0] != x[0]).any()


def test_limit_is_of_every_set():
  assert {len(v) for v in make(('held_out', 'inverted'), limit=7).values()} == {7}


def test_fixed_binarisation_stays_binary():
  binary = (GREY > 100).astype(np.uint8) * np.uint8(255)
  for image in make(('noise', 'inverted', 'shuffled'), image=binary).values():
    assert set(np.unique(image)) == {0, 255}


def test_sets_may_be_given_in_three_forms(tmp_path):
  np.savez(tmp_path / 'other.npz', train_images=GREY, test_images=GREY[:5])
  options = dict(name='npz', path=str(tmp_path / 'other.npz'))
  for wanted, name in (
    (options, 'other.npz'), (('noise', options), 'other.npz'), ({'mine': options}, 'mine'), ({'name': options}, 'name')
  ):  # fmt: skip
    np.testing.assert_array_equal(make(wanted)[name], GREY[:5], err_msg=str(wanted))
  assert list(make({'a': 'noise', 'b': 'inverted'})) == ['in_distribution', 'a', 'b']
  fixed = make(options, image=(GREY > 100).astype(np.uint8) * np.uint8(255))['other.npz']  # binarised as the run's own images
  assert set(np.unique(fixed)) == {0, 255}


def test_all_sets_see_the_same_preprocessing():
  """Freshly binarised pixels of a grey of 1/2 are ones half of the time, whatever set they are in."""
  half = np.full((300, 2, 2, 1), 128, np.uint8)
  data = {'train': ArraySource(half), 'test': ArraySource(half)}
  s = Subject(Pixels(), {}, data, preprocess.make('fresh'), jax.random.key(0))
  r = run_all(s, {'anomaly': {'outliers': 'inverted'}}).results
  for name in ('in_distribution', 'inverted'):
    assert r[f'anomaly/{name}/elbo'].value == pytest.approx(2.0, abs=4 / 1200**0.5)
    assert r[f'anomaly/{name}/elbo'].stderr == pytest.approx(1 / 300**0.5, rel=0.2)
  assert r['anomaly/in_distribution/elbo'].value != r['anomaly/inverted/elbo'].value


class Pixels(Exact):
  """log p(x | z) is the number of ones; latents say nothing."""

  def trace(self, variables, x, key, k=1):
    trace = super().trace(variables, x[:, :1, :1], key, k)
    return trace.replace(log_px=x.sum((1, 2, 3))[None], log_q=trace.log_p)

  def simulate(self, variables, key, n, sampler=None, temperature=1.0, choose=ancestral):
    trace = super().simulate(variables, key, n, choose=choose)
    return trace.replace(px=Ones())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ones:
  def log_prob(self, x):
    return x.sum((1, 2, 3))[None]


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'outliers': 'nois'}, ["config.evaluate.anomaly.outliers names 'nois'", "'noise'"]),
    ({'outliers': ()}, ['config.evaluate.anomaly.outliers is empty', 'held_out']),
    ({'outliers': ('noise', 'noise')}, ["'noise' cannot be the name of a set, or is taken"]),
    ({'outliers': {'in_distribution': 'noise'}}, ["'in_distribution' cannot be the name"]),
    ({'outliers': ('noise', 3)}, ['config.evaluate.anomaly.outliers names 3']),
    ({'outliers': dict(name='idx', path='/nowhere/at/all')}, ["config.evaluate.anomaly.outliers.path = '/nowhere/at/all'"]),
    ({'outliers': dict(name='idxx')}, ['config.evaluate.anomaly.outliers.name', "'idx'"]),
    ({'outliers': dict(name='digits')}, ["images of 'digits' are (8, 8, 1), those of the run (4, 3, 1); they must match"]),
    ({'outliers': 'held_out'}, ["'held_out' needs classes in split 'test'", 'config.data.held_out_classes']),
    ({'split': 'tets'}, ['config.evaluate.anomaly.split', "'test'"]),
    ({'limit': 0}, ['config.evaluate.anomaly.limit']),
  ],
)  # fmt: skip
def test_bad_sets_are_refused_before_training(options, words):
  data = splits(train=(0, 1, 2))
  with pytest.raises(UserError) as caught:
    check_subject({'likelihood': {}, 'anomaly': {'outliers': 'noise', **options}}, data, Exact())
  for word in words:
    assert word in str(caught.value), str(caught.value)


def test_paths_of_another_data_set_are_flags():
  _, config = configs.load(f'{EXPERIMENTS / "nvae_anomaly.py"}:fashion')
  configs.override(config, {'evaluate.anomaly.outliers.mnist.path': 'elsewhere'})
  wanted = outliers.named(sections.plain(config.evaluate.anomaly.outliers))
  assert wanted['mnist'] == dict(name='idx', path='elsewhere') and wanted['noise'] == 'noise'


@pytest.mark.parametrize(
  'option', [{'lower': 'modus'}, {'unit': 'groups'}, {'combine': 'max'}, {'samples': 0}, {'columns': 0}], ids=str
)
def test_bad_options_name_the_key(option):
  with pytest.raises(UserError, match=f'config.evaluate.anomaly.{next(iter(option))}'):
    run_all(subject(images([0.0, 1.0])), {'anomaly': {'outliers': 'noise', **option}})
