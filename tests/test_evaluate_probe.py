"""Probes on codes of known worth, and the model's classifier beside a supervised one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from latentgen.data import ArraySource, labels
from latentgen.distributions import Normal
from latentgen.errors import UserError
from latentgen.evaluate import Subject, classification, run_all
from latentgen.types import Trace

KINDS = 3


@dataclasses.dataclass(frozen=True)
class Reader:
  """Its posterior mean is the one-hot class times `signal` in the first of two groups, 0 in the second.

  An image says its class in the lowest two bits of pixel 0; the other pixels are noise.
  """

  signal: float = 3.0
  confidence: float = 0.8
  samplers = ('base',)

  def trace(self, variables, x, key, k=1):
    label = jnp.round(x[:, 0, 0, 0] * 255).astype(jnp.int32) % 4
    loc = jnp.stack([self.signal * jax.nn.one_hot(label, KINDS), jnp.zeros((x.shape[0], KINDS))])[:, None]
    q = Normal(loc, jnp.full_like(loc, 0.1))
    z = q.sample(key)
    return Trace((z,), (z,), (), (), None, (), None, None, None, posterior=(q,))

  def classify(self, variables, x, key):
    """Right with probability `confidence`, except that class 2 is taken for 0."""
    label = jnp.round(x[:, 0, 0, 0] * 255).astype(jnp.int32) % 4
    said = jnp.where(label == 2, 0, label)
    other = (1 - self.confidence) / (KINDS - 1)
    return jnp.log(jnp.where(jax.nn.one_hot(said, KINDS) > 0, self.confidence, other))


@dataclasses.dataclass(frozen=True)
class Bare:
  """The same without a classifier."""

  samplers = ('base',)
  trace = Reader.trace
  signal: float = 3.0


def source(n, seed, kinds=KINDS, dots=0):
  """The class in two bits, noise elsewhere; `dots` is the brightness that class c adds to pixel (1, c)."""
  rng = np.random.default_rng(seed)
  label = rng.permutation(np.arange(n) % kinds)
  image = rng.integers(0, 100, (n, 3, 4, 1))
  image[np.arange(n), 1, label, 0] += dots
  image[:, 0, 0, 0] = image[:, 0, 0, 0] // 4 * 4 + label
  return ArraySource(image.astype(np.uint8), label, f'set{seed}', KINDS)


def preprocess(key, batch, train):
  return {**batch, 'image': batch['image'].astype(jnp.float32) / 255}


def subject(method=Reader(), train=None, test=None, **options):
  train, test = train or source(150, 0), test or source(90, 1)
  splits = {'train': labels.few(train, 0, **options), 'test': test}
  return Subject(method, {}, splits, preprocess, jax.random.key(2), 64)


def test_codes_that_separate_the_classes_need_one_label_each():
  r = run_all(subject(), {'probe': {'counts': (1, 5), 'draws': 4}}).results
  counts = ('labels1', 'labels5', 'all')
  assert set(r) == {'probe/labels'} | {f'probe/{f}/{n}/accuracy' for f in ('codes', 'pixels') for n in counts}
  for n in counts:
    assert r[f'probe/codes/{n}/accuracy'].value == 1.0 and r[f'probe/codes/{n}/accuracy'].stderr == 0.0
    assert r[f'probe/codes/{n}/accuracy'].n == 90
    assert abs(r[f'probe/pixels/{n}/accuracy'].value - 1 / 3) < 0.25  # two bits of one noisy pixel say next to nothing
  assert r['probe/labels'].value == 150
  assert r == run_all(subject(), {'probe': {'counts': (1, 5), 'draws': 4}}).results


def test_codes_without_signal_are_at_chance():
  r = run_all(subject(Reader(signal=0.0)), {'probe': {'counts': (5,), 'draws': 3}}).results
  assert r['probe/codes/labels5/accuracy'].value == pytest.approx(1 / 3)  # 30 of each class, all taken for one
  assert r['probe/codes/all/accuracy'].value == pytest.approx(1 / 3)


def test_pixels_as_by_hand():
  """All labels, standardised by the training moments: the same regression, fitted here."""
  train, test = source(150, 0, dots=60), source(90, 1, dots=60)
  r = run_all(subject(train=train, test=test), {'probe': {'counts': (10,), 'draws': 2, 'inverse_penalty': 0.5}}).results
  a, b = (s.take(slice(None)) for s in (train, test))
  x, new = (batch['image'].reshape(len(batch['image']), -1) / 255 for batch in (a, b))
  model = LogisticRegression(C=0.5, max_iter=2000).fit((x - x.mean(0)) / x.std(0), a['label'])
  want = (model.predict((new - x.mean(0)) / x.std(0)) == b['label']).mean()
  found = r['probe/pixels/all/accuracy']
  assert 0.5 < want < 1 and abs(found.value - want) < 1.5 / 90  # at most one image on the border
  assert found.stderr == pytest.approx((found.value * (1 - found.value) / 89) ** 0.5)
  assert r['probe/pixels/labels10/accuracy'].value < found.value + 0.02


def test_probe_uses_only_labels_that_there_are():
  """With 5 labels a class, copies or not, 5 is the most; unlabelled images only tell the moments."""
  few = run_all(subject(labels_per_class=5), {'probe': {'draws': 3}}).results
  copied = run_all(subject(labels_per_class=5, labelled_copies=7), {'probe': {'draws': 3}}).results
  for r in (few, copied):
    assert r['probe/labels'].value == 15
    assert {name.split('/')[2] for name in r if 'codes' in name} == {'labels1', 'labels5', 'all'}
  # five of five: every draw is the same set
  assert few['probe/pixels/labels5/accuracy'].stderr == pytest.approx(0.0, abs=1e-12)
  assert few['probe/pixels/labels5/accuracy'].value == few['probe/pixels/all/accuracy'].value


def test_classes_without_training_labels_are_left_out():
  r = run_all(subject(train=source(100, 0, kinds=2)), {'probe': {'counts': (1,), 'draws': 2}}).results
  assert r['probe/codes/all/accuracy'].value == 1.0 and r['probe/codes/all/accuracy'].n == 60


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'counts': (0,)}, 'config.evaluate.probe.counts'),
    ({'draws': 1}, 'config.evaluate.probe.draws'),
    ({'inverse_penalty': 0.0}, 'config.evaluate.probe.inverse_penalty'),
    ({'split': 'tets'}, 'config.evaluate.probe.split'),
  ],
)
def test_bad_values_name_the_key(options, text):
  with pytest.raises(UserError, match=text):
    run_all(subject(), {'probe': options})


@pytest.mark.parametrize('task', ['probe', 'classification'])
def test_one_class_is_no_task(task):
  with pytest.raises(UserError, match=f"'{task}' needs labels of at least two classes"):
    run_all(subject(train=source(20, 0, kinds=1)), {task: {}})


# ---------------------------------------------------------------------------------------- the model's own classifier


def test_error_and_likelihood_of_a_known_classifier():
  r = run_all(subject(), {'classification': {'folds': 2}}).results
  assert r['classification/model/error'].value == pytest.approx(1 / 3)  # class 2, 30 of 90
  nll = -(2 * np.log(0.8) + np.log(0.1)) / 3
  assert r['classification/model/nll'].value == pytest.approx(nll, rel=1e-5)
  assert r['classification/model/error'].n == 90 and r['classification/labels'].value == 150
  assert r['classification/model/error'].stderr == pytest.approx((2 / 9 / 89) ** 0.5)


def test_supervised_classifier_sees_the_labelled_images_alone():
  """Labels that say nothing but for 4 a class: the bright dot is learned from these."""
  train, test = source(300, 0, dots=150), source(90, 1, dots=150)
  for options in ({'labels_per_class': 4}, {'labels_per_class': 4, 'labelled_copies': 9}):
    r = run_all(subject(train=train, test=test, **options), {'classification': {}}).results
    assert r['classification/labels'].value == 12
    assert r['classification/supervised/error'].value < 0.15
    assert 0 < r['classification/supervised/nll'].value < 1.1
  one = run_all(subject(train=train, test=test, labels_per_class=1), {'classification': {}}).results
  rows = np.flatnonzero(labels.few(train, 0, 1).take(slice(None))['label'] >= 0)
  a, b = train.take(rows), test.take(slice(None))
  model = LogisticRegression(max_iter=500).fit(a['image'].reshape(3, -1) / 255, a['label'])
  want = (model.predict(b['image'].reshape(90, -1) / 255) != b['label']).mean()
  assert one['classification/supervised/error'].value == pytest.approx(want, abs=1.5 / 90)


def test_classes_without_label_are_no_part_of_it():
  r = run_all(subject(train=source(100, 0, kinds=2)), {'classification': {'folds': 2}}).results
  assert r['classification/model/error'].value == 0.0 and r['classification/model/error'].n == 60


def test_supervised_prefers_what_generalises():
  """Exclusive or: no linear classifier does it, so a network is chosen."""
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (600, 2))
  y = (x[:, 0] * x[:, 1] > 0).astype(int)
  model = classification.supervised(x[:400], y[:400], 3, 0)
  assert (model.predict(x[400:]) == y[400:]).mean() > 0.85


def test_a_method_without_classifier_is_named():
  with pytest.raises(UserError, match="'classification' needs a method with 'classify', and Bare has none"):
    run_all(subject(Bare()), {'classification': {}})


def test_bad_folds():
  with pytest.raises(UserError, match='config.evaluate.classification.folds'):
    run_all(subject(), {'classification': {'folds': 1}})
