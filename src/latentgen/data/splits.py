"""Fixed splits and shuffles: the same on every machine and with every numpy, for only raw bits are drawn."""

import numpy as np

from latentgen.errors import UserError


def permutation(n: int, *entropy: int) -> np.ndarray:
  """A permutation of range(n), int64 [n], that depends on n and the non-negative integers `entropy` alone.

  Ranks raw 64-bit draws: numpy promises stable bit streams, but not a stable `Generator.permutation`.
  """
  return np.argsort(np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n), kind='stable')


def stratified(labels: np.ndarray, *entropy: int) -> np.ndarray:
  """A permutation, int64 [n], any contiguous part of which has nearly the class frequencies of labels, int [n]."""
  labels = np.asarray(labels)
  order = permutation(len(labels), *entropy)
  place = np.empty(len(labels))
  for label in np.unique(labels):
    members = order[labels[order] == label]
    place[members] = (np.arange(len(members)) + 0.5) / len(members)
  return order[np.argsort(place[order], kind='stable')]


def size(value: object, n: int, key: str) -> int:
  """How many of n examples a split takes: a count (int) or a fraction (float below 1) of n.

  Raises:
    UserError: not between 1 and n - 1.
  """
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  count = 0
  if number and isinstance(value, int):
    count = value
  elif number and 0 < value < 1:
    count = max(1, round(n * value))
  if not 0 < count < n:
    raise UserError(f'{key} = {value!r} must be a number of images from 1 to {n - 1}, or a fraction between 0 and 1')
  return count


def parts(n: int, valid: object, test: object) -> tuple[slice, slice, slice]:
  """Slices of the training, validation and test part of n shuffled examples.

  Raises:
    UserError: the parts leave nothing to train on.
  """
  n_valid, n_test = size(valid, n, 'config.data.valid'), size(test, n, 'config.data.test')
  n_train = n - n_valid - n_test
  if n_train < 1:
    raise UserError(f'config.data.valid + config.data.test = {n_valid + n_test} leave none of {n} images to train on')
  return slice(0, n_train), slice(n_train, n_train + n_valid), slice(n_train + n_valid, n)
