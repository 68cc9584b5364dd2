"""Handwritten digits that ship with scikit-learn: 1,797 images, 8x8, 17 grey levels.

References:
  E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from collections.abc import Sequence

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
    raise UserError(f'config.data.held_out_classes = {held_out_classes!r} must be some of the digits 0 to 9')
  from sklearn import datasets

  raw = datasets.load_digits()
  images = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
  everything = ArraySource(images, raw.target, 'digits', num_classes=10)
  order = splits.stratified(raw.target, 0)
  kept = lambda rows: rows[~np.isin(raw.target[rows], held)]
  train, valid, test = (order[part] for part in splits.parts(len(order), VALID, TEST))
  return {
    'train': everything.subset(kept(train), 'digits/train'),
    'valid': everything.subset(kept(valid), 'digits/valid'),
    'test': everything.subset(test, 'digits/test'),
  }
