"""Where every random number of a run comes from: folds of one seed, wide instead of deep, none kept in the state.

root -> stage (crc32 of its name) -> step -> 0 preprocessing | 1 prepare | 2 + i update i
root -> 'init' -> stage, and root -> 'validation' | 'evaluation' | 'data' beside it.
"""

import zlib

import jax

from latentgen.types import Key

PREPROCESS, PREPARE, UPDATES = 0, 1, 2


def root(seed: int) -> Key:
  return jax.random.key(seed)


def named(key: Key, *names: str) -> Key:
  """Folds names into a key by their crc32."""
  for name in names:
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
  return key
