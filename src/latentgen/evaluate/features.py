"""Image features for distances between sets of images: a small classifier trained here, or principal components.

Neither is Inception, and distances on them compare with nothing outside this package: results carry the features' name.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latentgen.evaluate.base import Subject, batches, fetch

DRAWS = 8  # of the dequantisation noise, when it is averaged out


def grey_images(subject: Subject, task: str, split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """The images of a split without the noise of preprocessing, E[preprocess(image)], and their labels.

  A sampler gives decoder means, which are grey; freshly binarised images would differ from any of them by their noise
  alone. So stochastic binarisation is replaced by the probabilities it draws from, x / 255; dequantisation noise is
  averaged out; preprocessing without noise is kept as it is.

  Args:
    subject: what is evaluated.
    task: for messages.
    split: which images.
    limit: only the first so many.

  Returns:
    (images [n, h, w, c] float32 in [0, 1], labels [n], -1 where there is none).
  """
  images, labels = [], []
  for key, raw, mask in batches(subject, task, split, limit):
    label = raw.get('label')
    grey, label = fetch((_grey(subject.preprocess, key, raw), label if label is not None else raw['image'][:, 0, 0, 0]))
    images.append(grey[mask])
    labels.append(label[mask] if 'label' in raw else np.full(mask.sum(), -1))
  return np.concatenate(images), np.concatenate(labels)


@functools.partial(jax.jit, static_argnums=0)
def _grey(preprocess, key, raw):
  """Expectation over the noise of preprocessing, [b, h, w, c]."""
  drawn = jax.vmap(lambda k: preprocess(k, raw, False)['image'])(jax.random.split(key, DRAWS))
  drawn = drawn.astype(jnp.float32)
  noisy = (drawn != drawn[:1]).any()
  binary = ((drawn == 0) | (drawn == 1)).all()
  grey = raw['image'].astype(jnp.float32) / 255
  margins = [(have - want) // 2 for have, want in zip(drawn.shape[2:4], grey.shape[1:3], strict=True)]
  grey = jnp.pad(grey, ((0, 0), *((m, m) for m in margins), (0, 0)))
  return jnp.where(noisy & binary, grey, drawn.mean(0))


# ---------------------------------------------------------------------------------------------- a small classifier

Weights = list[tuple[jax.Array, jax.Array]]


def classifier(
  images: np.ndarray,
  labels: np.ndarray,
  classes: int,
  key: jax.Array,
  widths: tuple[int, ...] = (256, 64),
  steps: int = 1500,
  batch_size: int = 128,
) -> Weights:
  """Trains a multilayer perceptron on pixels: Adam, cosine schedule, weight decay; the same key gives the same weights.

  Args:
    images: [n, h, w, c] in [0, 1].
    labels: [n] in 0..classes-1.
    classes: number of classes.
    key: PRNG key.
    widths: hidden layers; the last is the features' dimension.
    steps: gradient steps.
    batch_size: images a step, drawn with replacement.
  """
  x, y = jnp.asarray(images.reshape(len(images), -1)), jnp.asarray(labels, jnp.int32)
  sizes = (x.shape[1], *widths, classes)
  keys = jax.random.split(jax.random.fold_in(key, 0), len(sizes) - 1)
  weights = [
    (jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, jnp.zeros(o))
    for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
  ]
  optimiser = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-3)

  def loss(weights, rows):
    hidden = penultimate(weights, x[rows])
    logits = hidden @ weights[-1][0] + weights[-1][1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

  def step(state, key):
    weights, opt = state
    gradient = jax.grad(loss)(weights, jax.random.randint(key, (batch_size,), 0, len(x)))
    change, opt = optimiser.update(gradient, opt, weights)
    return (optax.apply_updates(weights, change), opt), None

  train = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0][0])
  return train((weights, optimiser.init(weights)), jax.random.split(jax.random.fold_in(key, 1), steps))


@jax.jit
def penultimate(weights: Weights, x: jax.Array) -> jax.Array:
  """Activations of the last hidden layer: x [n, ...] -> [n, d]."""
  hidden = x.reshape(x.shape[0], -1)
  for matrix, bias in weights[:-1]:
    hidden = jax.nn.relu(hidden @ matrix + bias)
  return hidden


def accuracy(weights: Weights, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """1 where the classifier is right, [n]."""
  logits = np.asarray(penultimate(weights, jnp.asarray(images)) @ weights[-1][0] + weights[-1][1])
  return (logits.argmax(-1) == labels).astype(np.float64)


# ---------------------------------------------------------------------------------------------- principal components


def components(images: np.ndarray, count: int, seed: int):
  """The function images [n, h, w, c] -> their first `count` principal components [n, d], fitted here."""
  from sklearn.decomposition import PCA

  flat = images.reshape(len(images), -1).astype(np.float64)
  pca = PCA(min(count, *flat.shape), svd_solver='randomized', random_state=seed).fit(flat)
  return lambda new: pca.transform(new.reshape(len(new), -1).astype(np.float64))
