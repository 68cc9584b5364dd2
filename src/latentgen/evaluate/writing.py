"""Results to JSON, pictures to PNG, tables to CSV: written whole or not at all, the same bytes for the same findings."""

from collections.abc import Mapping
import csv
import io
import json
import math
import os
import pathlib
import re
from typing import Any

import numpy as np
from PIL import Image

from latentgen.evaluate.base import Picture, Result, Table
from latentgen.files import replace_file


def as_json(results: Mapping[str, Result]) -> dict[str, dict]:
  """{name: {'value', 'unit', 'n', 'stderr'}}, sorted by name, groups and levels in numeric order.

  Raises:
    ValueError: if a value or its standard error is not finite, naming it.
  """
  found = {}
  for name in sorted(results, key=natural):
    r = results[name]
    for what, number in (('value', r.value), ('stderr', r.stderr)):
      if number is not None and not math.isfinite(number):
        raise ValueError(f'result {name!r}: {what} is {number}; a number that is not finite is no result')
    stderr = None if r.stderr is None else float(r.stderr)
    found[name] = {'value': float(r.value), 'unit': r.unit, 'n': int(r.n), 'stderr': stderr}
  return found


def natural(name: str) -> list:
  """Sort key that puts group10 behind group9."""
  return [(1, int(part), '') if part.isdigit() else (0, 0, part) for part in re.split(r'(\d+)', name)]


def write_results(path: str | os.PathLike, results: Mapping[str, Result], run: Mapping[str, Any] | None = None) -> None:
  """Writes `results.json`: {name: {value, unit, n, stderr}}, before them {'run': what they were made with} if given.

  Raises:
    ValueError: if a number is not finite; nothing is written then.
  """
  found = {'run': dict(run)} if run else {}
  text = json.dumps({**found, **as_json(results)}, indent=2, allow_nan=False) + '\n'
  replace_file(path, text.encode())


def write_pictures(folder: str | os.PathLike, images: Mapping[str, Picture]) -> list[dict[str, str]]:
  """Writes every picture as `<folder>/<name>.png`.

  Args:
    folder: `samples/<stage>` of the work directory; made if need be.
    images: {name: picture}; a '/' in a name becomes '-'.

  Returns:
    [{'title', 'caption', 'path': absolute}] in the given order, as `report.write` takes them.
  """
  folder = pathlib.Path(folder).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  listed = []
  for name, picture in images.items():
    path = folder / f'{name.replace("/", "-")}.png'
    replace_file(path, png(picture.array))
    listed.append({'title': picture.title, 'caption': picture.caption, 'path': str(path)})
  return listed


def write_tables(folder: str | os.PathLike, tables: Mapping[str, Table]) -> None:
  """Writes every table as `<folder>/<name>.csv`."""
  for name, table in tables.items():
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerows([table.columns, *table.rows])
    replace_file(pathlib.Path(folder) / f'{name.replace("/", "-")}.csv', buffer.getvalue().encode())


def png(array: np.ndarray) -> bytes:
  """uint8 [H, W] or [H, W, 3] -> the bytes of a PNG file."""
  array = np.asarray(array)
  if array.dtype != np.uint8 or array.ndim not in (2, 3):
    raise ValueError(f'a picture is uint8 [H, W] or [H, W, 3], not {array.dtype} {array.shape}')
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, format='png', optimize=True)
  return buffer.getvalue()
