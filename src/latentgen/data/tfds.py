"""Data sets that tensorflow-datasets has prepared, read record by record without TensorFlow.

Preparing one needs TensorFlow (`pip install tensorflow-cpu`) and a network, once:

    python -c "import tensorflow_datasets as t; t.builder('mnist').download_and_prepare(file_format='array_record')"

Nothing is downloaded here. `load` looks for the prepared folder and, if it is not there, says so at once.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import os
import pathlib
import re
from typing import Any

import numpy as np

from latentgen.data import paths, splits
from latentgen.data.folder import fit
from latentgen.data.source import ArraySource, RecordSource, in_memory as to_memory
from latentgen.errors import UserError, did_you_mean


def load(
  dataset: str,
  data_dir: str | None = None,
  train: str = 'train',
  valid: int | float | str | None = None,
  test: str = 'test',
  crop: Sequence[int] | None = None,
  size: int | None = None,
  image: str = 'image',
  label: str | None = 'label',
  in_memory: bool = False,
) -> dict[str, RecordSource | ArraySource]:
  """The splits of a prepared data set.

  Args:
    dataset: its name in tensorflow-datasets: 'mnist', 'emnist/letters', 'celeb_a', 'mnist:3.0.1'.
    data_dir: where it is prepared; default: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
    train: the training split, in the notation of tensorflow-datasets: 'train', 'train[:-5000]'.
    valid: the validation split in that notation, or how much of the end of the training split it takes (a count or a
      fraction); default: the split 'validation' where there is one, else a tenth.
    test: the test split.
    crop: (top, left, height, width) in pixels; default: the central square if there is a size, else all.
    size: side in pixels that images are resized to; default: as they are.
    image: feature that holds the image.
    label: feature that holds the class; without classes all labels are -1.
    in_memory: read everything at the start.

  Raises:
    UserError: the data set is not prepared, not in a format with random access, or lacks a split or feature.
  """
  if crop is not None:
    ok = isinstance(crop, Sequence) and len(crop) == 4 and all(isinstance(c, int) for c in crop)
    if not ok or min(crop[:2]) < 0 or min(crop[2:]) < 1:
      raise UserError(f'config.data.crop = {crop!r} must be (top, left, height, width) in pixels')
    crop = tuple(crop)
  if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 4096):
    raise UserError(f'config.data.size = {size!r} must be a number of pixels from 1 to 4096')
  for key, value in (('image', image), ('label', label)):
    if not isinstance(value, str) and (key, value) != ('label', None):
      raise UserError(f'config.data.{key} = {value!r} must be the name of a feature')
  folder = find(dataset, data_dir)

  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(folder)
  except Exception as error:  # parsers of several packages
    raise UserError(
      f'{folder}: damaged description ({error}); prepare it again: {_recipe(dataset, data_dir)}'
    ) from None
  decode, classes = _decoder(builder.info.features, dataset, image, label, crop, size)

  def read(split: str, key: str, part: str) -> RecordSource:
    base = split.split('[')[0].strip() if isinstance(split, str) else split
    if base not in builder.info.splits:
      known = list(builder.info.splits)
      hint = did_you_mean(base, known) + f' (it has {", ".join(known)})'
      raise UserError(f'config.data.{key} = {split!r} is not a split of {dataset!r}{hint}')
    try:
      records = builder.as_data_source(split)
      identity = repr(
        (builder.info.full_name, split, builder.info.splits[base].shard_lengths, image, label, crop, size)
      )
      source = RecordSource(records, decode, f'{dataset}/{part}', classes, identity)
      _ = source.shape  # reads a record, so that damaged files show here
      return source
    except NotImplementedError:
      raise UserError(
        f'{folder} is not in the format array_record; prepare it so: {_recipe(dataset, data_dir)}'
      ) from None
    except (OSError, ValueError, IndexError, RuntimeError, AssertionError) as error:
      raise UserError(
        f'{folder}: cannot read split {split!r} ({error}); correct config.data.{key} or prepare it again'
      ) from None

  whole, last = read(train, 'train', 'train'), read(test, 'test', 'test')
  if valid is None and 'validation' in builder.info.splits:
    valid = 'validation'
  if isinstance(valid, str):
    found = {'train': whole, 'valid': read(valid, 'valid', 'valid'), 'test': last}
  else:
    cut = len(whole) - splits.size(0.1 if valid is None else valid, len(whole), 'config.data.valid')
    found = {
      'train': whole.subset(slice(0, cut)),
      'valid': whole.subset(slice(cut, None), f'{dataset}/valid'),
      'test': last,
    }
  return {split: to_memory(source) for split, source in found.items()} if in_memory else found


def find(dataset: str, data_dir: str | None = None) -> pathlib.Path:
  """Folder of a prepared data set, its newest version unless `dataset` names one ('mnist:3.0.1').

  Raises:
    UserError: there is none, or more than one configuration.
  """
  root = paths.resolve(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets', 'config.data.data_dir')
  name, _, version = str(dataset or '').partition(':')
  if not re.fullmatch(r'\w[\w.+-]{0,99}(/[\w.+-]{1,99})?', name) or '..' in name:
    raise UserError(f"config.data.dataset = {dataset!r} must name a data set of tensorflow-datasets, such as 'mnist'")
  prepared = [f.parent for depth in ('*', '*/*') for f in (root / name).glob(f'{depth}/dataset_info.json')]
  prepared = [f for f in prepared if version in ('', f.name)]
  if not prepared:
    there = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    raise UserError(
      f'config.data.dataset = {dataset!r} is not prepared in {root}{did_you_mean(name, there)} (to prepare it:'
      f' {_recipe(dataset, data_dir)}; or set config.data.data_dir to where it is; or read files with config.data.name'
      " = 'idx', 'npz' or 'folder')"
    )
  parents = sorted({f.parent for f in prepared})
  if len(parents) > 1:
    configs = ', '.join(repr(f'{name}/{p.name}') for p in parents)
    raise UserError(f'config.data.dataset = {dataset!r} is prepared in several configurations; name one: {configs}')
  return max(prepared, key=lambda f: [int(n) if n.isdecimal() else -1 for n in f.name.split('.')])


def _recipe(dataset: str, data_dir: str | None) -> str:
  place = f', data_dir={str(data_dir)!r}' if data_dir else ''
  return (
    'pip install tensorflow-cpu && python -c "import tensorflow_datasets as t;'
    f" t.builder({str(dataset)!r}{place}).download_and_prepare(file_format='array_record')\""
  )


def _decoder(
  features: Any, dataset: str, image: str, label: str | None, crop: tuple | None, size: int | None
) -> tuple[Callable[[Mapping[str, Any]], tuple[np.ndarray, int | None]], int]:
  """(record -> (uint8 [h, w, c], label or None), number of classes)."""
  if image not in features:
    known = list(features)
    raise UserError(
      f'config.data.image = {image!r} is not a feature of {dataset!r}{did_you_mean(image, known)}'
      f' (it has {", ".join(known)})'
    )
  shape, dtype = features[image].shape, np.dtype(features[image].np_dtype)
  if dtype != np.uint8 or len(shape) != 3:
    raise UserError(
      f'config.data.image = {image!r} of {dataset!r} is {dtype} {shape}, not uint8 [h, w, c]; name another'
    )
  if size is None and crop is None and None in shape:
    raise UserError(f'config.data.size is missing: the images of {dataset!r} differ in size')
  if crop is not None and None not in shape and (crop[0] + crop[2] > shape[0] or crop[1] + crop[3] > shape[1]):
    raise UserError(f'config.data.crop = {crop} leaves the images of {dataset!r}, which are {shape[0]} by {shape[1]}')
  classes = getattr(features[label], 'num_classes', None) if label and label in features else None
  return functools.partial(_decode, image=image, label=label if classes else None, crop=crop, size=size), classes or 0


def _decode(
  record: Mapping[str, Any], image: str, label: str | None, crop: tuple | None, size: int | None
) -> tuple[np.ndarray, int | None]:
  array = np.asarray(record[image])
  if crop is not None or size is not None:
    from PIL import Image

    array = fit(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array), size, crop)
  return array, None if label is None else int(record[label])
