"""Paths as configs give them."""

import os
import pathlib

from latentgen.errors import UserError


def resolve(path: object, key: str) -> pathlib.Path:
  """The path with ~ expanded.

  Raises:
    UserError: it is not a path, or empty; names the config key.
  """
  if not isinstance(path, (str, os.PathLike)) or not str(path).strip() or '\0' in str(path):
    raise UserError(f'{key} = {path!r} must be a path')
  return pathlib.Path(path).expanduser()
