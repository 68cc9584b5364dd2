"""Distances between samples and test images on the features of a small classifier trained here.

They order the samplers of one model on one data set, and nothing else. They are NOT the Fréchet Inception distance:
other features, other scale; results are named after the features so that nobody takes one for the other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentgen.evaluate import features
from latentgen.evaluate.base import (
  Findings,
  Result,
  Subject,
  average,
  check_count,
  check_images,
  chosen_samplers,
  drawn,
  named_key,
  seed_of,
)
from latentgen.evaluate.statistics import bootstrap, frechet, kernel_distance


def check(data: Mapping[str, Any], *, split: str = 'test', limit: int | None = 5000, blocks: int = 10, **_) -> None:
  """Refuses fewer images than two a block."""
  check_images(data, 'frechet', split, limit, 2 * blocks)


def run(
  subject: Subject,
  *,
  split: str = 'test',
  limit: int | None = 5000,
  train_limit: int | None = 20000,
  samplers: Sequence[str] | None = None,
  steps: int = 1500,
  repeats: int = 50,
  blocks: int = 10,
  components: int = 32,
) -> Findings:
  """Measures every sampler, and real training images as the floor.

  Samples are decoder means; real images are grey values, not binarised afresh (`features.grey_images`). All sets have
  the size of the test set, since the Fréchet distance depends on it.

  Args:
    subject: what is evaluated.
    split: the reference.
    limit: only the first so many reference images.
    train_limit: only so many training images for the classifier.
    samplers: names; all the method has by default.
    steps: gradient steps of the classifier.
    repeats: bootstrap draws of the standard error.
    blocks: of the kernel distance.
    components: principal components, where there are no labels.

  Returns:
    frechet_small_classifier/<sampler> and kernel_small_classifier/<sampler>, <sampler> = real for training images;
    and the classifier's accuracy on the reference, small_classifier/accuracy. Without labels: frechet_pca/...,
    kernel_pca/...

  Raises:
    UserError: for a bad value, naming the key.
  """
  where = 'config.evaluate.frechet'
  for name, value, least in (
    ('steps', steps, 1), ('repeats', repeats, 2), ('blocks', blocks, 2), ('components', components, 1)
  ):  # fmt: skip
    check_count(f'{where}.{name}', value, least)
  names = chosen_samplers(subject, 'frechet', samplers)
  kind, embed, test, train, results = space(subject, 'frechet', split, limit, train_limit, steps, components, 2 * blocks)
  n = len(test)
  reference = embed(test)
  rows = np.random.default_rng(seed_of(named_key(subject.key, 'real'))).permutation(len(train))[:n]
  clouds = {'real': embed(train[rows])}
  for name in names:
    key = named_key(subject.key, f'sampler/{name}')
    clouds[name] = embed(drawn(subject, name, n, key))
  for name, cloud in clouds.items():
    seed = seed_of(named_key(subject.key, f'resampling/{name}'))
    error = bootstrap(frechet, cloud, reference, repeats, seed)
    results[f'frechet_{kind}/{name}'] = Result(frechet(cloud, reference), f'{kind} feature units^2', n, error)
    kernel = kernel_distance(cloud, reference, blocks, seed)
    results[f'kernel_{kind}/{name}'] = Result(kernel.value, 'squared MMD', n, kernel.stderr)
  return Findings(results)


def space(
  subject: Subject, task: str, split: str, limit: int | None, train_limit: int | None, steps: int, components: int, least: int
):
  """Trains the features.

  Args:
    subject: what is evaluated.
    task: its name, for messages.
    split: the reference, as `limit` and the others in `run`.
    least: how many reference images there must be.

  Returns:
    (their name, images -> float64 [n, d], reference images, training images, {name: Result} about the features).
  """
  train, train_labels = features.grey_images(subject, task, 'train', train_limit)
  test, labels = features.grey_images(subject, task, split, limit)
  check_count(f'config.evaluate.{task}.limit (images found)', len(test), least)
  known = train_labels >= 0
  classes = subject.data['train'].num_classes if known.any() else 0
  if not classes:
    return 'pca', features.components(train, components, seed_of(named_key(subject.key, 'pca'))), test, train, {}
  kind = 'small_classifier'
  weights = features.classifier(train[known], train_labels[known], classes, named_key(subject.key, kind), steps=steps)

  def embed(images):
    return np.asarray(features.penultimate(weights, images), np.float64)

  return kind, embed, test, train, {f'{kind}/accuracy': average(features.accuracy(weights, test, labels), 'fraction')}
