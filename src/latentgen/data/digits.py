"""Handwritten digits that ship with scikit-learn: 1,797 images, 8x8, 17 grey levels.

References:
  E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from collections.abc import Sequence
import importlib.util
import pathlib

import numpy as np

from latentgen.data import splits
from latentgen.data.source import ArraySource
from latentgen.errors import UserError

VALID, TEST = 250, 250  # 1,297 are left to train on


def load(held_out_classes: Sequence[int] = ()) -> dict[str, ArraySource]:
  """1,297 training, 250 validation and 250 test images, [8, 8, 1]; a fixed split, stratified by class.

  Args:
    held_out_classes: digits that are left out of 'train' and 'valid' (not of 'test').

  Raises:
    UserError: held_out_classes are not digits, or all of them.
  """
  held = list(held_out_classes) if isinstance(held_out_classes, Sequence) else [None]
  if not all(isinstance(c, int) for c in held) or not set(held) < set(range(10)):
    raise UserError(f'config.data.held_out_classes = {held_out_classes!r} must be a tuple of some of the digits 0 to 9, as (8,)')
  grey, target = _raw()
  images = np.round(grey * (255 / 16)).astype(np.uint8)[..., None]
  everything = ArraySource(images, target, 'digits', num_classes=10)
  order = splits.stratified(target, 0)
  kept = lambda rows: rows[~np.isin(target[rows], held)]
  train, valid, test = (order[part] for part in splits.parts(len(order), VALID, TEST))
  return {
    'train': everything.subset(kept(train), 'digits/train'),
    'valid': everything.subset(kept(valid), 'digits/valid'),
    'test': everything.subset(test, 'digits/test'),
  }


def _raw() -> tuple[np.ndarray, np.ndarray]:
  """Grey levels 0 to 16, [1797, 8, 8], and classes; read from their file, as importing scikit-learn takes long."""
  found = importlib.util.find_spec('sklearn')
  file = pathlib.Path(found.origin).parent / 'datasets' / 'data' / 'digits.csv.gz' if found and found.origin else None
  if file and file.is_file():
    rows = np.loadtxt(file, np.int64, delimiter=',')
    return rows[:, :64].reshape(-1, 8, 8), rows[:, 64]
  from sklearn import datasets  # of a version that keeps its files elsewhere

  raw = datasets.load_digits()
  return raw.images, raw.target
