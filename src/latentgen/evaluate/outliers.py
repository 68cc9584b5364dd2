"""Sets of images that a model was not trained on: held-out classes, noise, changed images, other data sets."""

from collections.abc import Callable, Mapping
import re
from typing import Any

import numpy as np

from latentgen import data
from latentgen.data import preprocess
from latentgen.data.labels import all_labels
from latentgen.data.source import ArraySource, RecordSource, Source
from latentgen.errors import UserError, near
from latentgen.evaluate.base import check_choice, check_count

WHERE = 'config.evaluate.anomaly.outliers'
NORMAL = 'in_distribution'


def sources(splits: Mapping[str, Any], split: str, outliers: Any, limit: int | None, seed: int) -> dict[str, Source]:
  """The images in distribution, and every set of outliers.

  Args:
    splits: {split: source} of the run.
    split: what is in distribution, less classes that the training split does not have.
    outliers: as `anomaly.run` takes them.
    limit: images of each set.
    seed: of noise.

  Returns:
    {'in_distribution': source, name of a set: source}, all of one image shape.

  Raises:
    UserError: what is wrong with an option or with files.
  """
  check_choice('config.evaluate.anomaly.split', split, splits)
  if limit is not None:
    check_count('config.evaluate.anomaly.limit', limit)
  whole, wanted = splits[split], named(outliers)
  # Reading the labels of records reads the images.
  look = 'held_out' in wanted.values() or not isinstance(splits['train'], RecordSource)
  new = held_out(splits, split) if look else np.zeros(len(whole), bool)
  inside = whole.subset(np.flatnonzero(~new)) if new.any() else whole
  inside = inside.subset(slice(0, limit))
  if not len(inside):
    raise UserError(f'config.evaluate.anomaly.split: split {split!r} holds no images in distribution')
  found: dict[str, Source] = {NORMAL: inside}
  for name, what in wanted.items():
    if what == 'held_out':
      if not new.any():
        raise UserError(
          f"{WHERE}: 'held_out' needs classes in split {split!r} that training does not have (for digits, set"
          ' config.data.held_out_classes); leave it out'
        )
      found[name] = whole.subset(np.flatnonzero(new)[:limit])
    elif isinstance(what, str):
      images = inside.take(slice(None))['image']
      found[name] = ArraySource(MADE[what](images, np.random.default_rng([seed, list(MADE).index(what)])), None, name)
    else:
      found[name] = _other(name, dict(what), split, inside).subset(slice(0, limit))
  return found


def named(outliers: Any) -> dict[str, Any]:
  """{name of a set: one of MADE, 'held_out', or the options of a data set} from the forms that a config may use.

  Raises:
    UserError: none, an unknown one, or two of one name.
  """
  if isinstance(outliers, Mapping) and not isinstance(outliers.get('name'), str):
    pairs = list(outliers.items())
  else:
    several = [outliers] if isinstance(outliers, (str, Mapping)) else list(outliers or ())
    pairs = [(what if isinstance(what, str) else _title(what), what) for what in several]
  if not pairs:
    raise UserError(f'{WHERE} is empty: name at least one of {", ".join(KINDS)}, or a data set as dict(name=...)')
  found: dict[str, Any] = {}
  for name, what in pairs:
    if isinstance(what, str):
      if what not in KINDS:
        raise UserError(f'{WHERE} names {what!r}{near(what, KINDS)}, or a data set as dict(name=...)')
    elif not isinstance(what, Mapping) or not isinstance(what.get('name'), str):
      raise UserError(f'{WHERE} names {what!r}: neither one of {", ".join(KINDS)} nor a data set as dict(name=...)')
    if not isinstance(name, str) or not re.fullmatch(r'[\w.-]+', name) or name == NORMAL or name in found:
      raise UserError(f'{WHERE}: {name!r} cannot be the name of a set, or is taken; write dict(<name>=...)')
    found[name] = what
  return found


def held_out(splits: Mapping[str, Any], split: str) -> np.ndarray:
  """bool [n]: the example's class does not occur in the training split."""
  if not splits[split].num_classes or not splits['train'].num_classes:
    return np.zeros(len(splits[split]), bool)
  known = np.unique(all_labels(splits['train']))
  mine = all_labels(splits[split])
  return (mine >= 0) & ~np.isin(mine, known) & (known >= 0).any()


def _title(options: Any) -> str:
  """A name for a data set that the config gives none: the last part of its path, else its kind."""
  path = str(options.get('path', '')).rstrip('/').rsplit('/', 1)[-1] if isinstance(options, Mapping) else ''
  return re.sub(r'[^\w.-]+', '_', path or str(options.get('name') if isinstance(options, Mapping) else options))


def _other(name: str, options: dict[str, Any], split: str, like: Source) -> Source:
  """A split of another data set, as the run's own preprocessing can take it."""
  try:
    loaded = data.load(options.pop('name'), **options)
  except UserError as error:
    raise UserError(str(error).replace('config.data.', f'{WHERE}.')) from error
  other = loaded[split] if split in loaded else loaded['test']
  if tuple(other.shape) != tuple(like.shape):
    shapes = tuple(other.shape), tuple(like.shape)
    raise UserError(f'{WHERE}: images of {name!r} are {shapes[0]}, those of the run {shapes[1]}; they must match')
  mine, theirs = (source.take(slice(0, 64))['image'] for source in (like, other))
  if mine.dtype != theirs.dtype:
    raise UserError(f'{WHERE}: images of {name!r} are {theirs.dtype}, those of the run {mine.dtype}; they must match')
  return preprocess.binarize_fixed(other, 0) if _binary(mine) and not _binary(theirs) else other


def _binary(images: np.ndarray) -> bool:
  """Whether a fixed binarisation has been at these."""
  return images.dtype == np.uint8 and bool(np.isin(images, (0, 255)).all())


# ---------------------------------------------------------------------------------------------- made from what is there


def noise(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Independent uniform pixels over the range that images [n, h, w, c] can have; 0 or 255 where these have no other."""
  if _binary(images):
    return rng.integers(0, 2, images.shape, np.uint8) * np.uint8(255)
  if images.dtype == np.uint8:
    return rng.integers(0, 256, images.shape, np.uint8)
  return rng.uniform(images.min(), images.max(), images.shape).astype(np.float32)


def shuffled(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The pixels of every image in an order of its own; channels of a pixel stay together."""
  n, h, w, c = images.shape
  order = rng.random((n, h * w)).argsort(1)
  return np.take_along_axis(images.reshape(n, h * w, c), order[..., None], 1).reshape(images.shape)


def inverted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """White for black: 255 - x, or the largest plus the least value minus x where images are no bytes."""
  del rng
  return 255 - images if images.dtype == np.uint8 else images.max() + images.min() - images


MADE: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
  'noise': noise, 'shuffled': shuffled, 'inverted': inverted,
}  # fmt: skip
KINDS = ('held_out', *MADE)
