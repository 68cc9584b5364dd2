"""Paths as configs give them."""

import os
import pathlib

from latentgen.errors import UserError


def resolve(path: object, key: str) -> pathlib.Path:
  """The path with ~ expanded.

  Raises:
    UserError: it is not a path, or empty, or one that no file can have; names the config key.
  """
  if not isinstance(path, (str, os.PathLike)) or not str(path).strip() or '\0' in str(path):
    raise UserError(f'{key} = {path!r} must be a path')
  try:
    found = pathlib.Path(path).expanduser()
    os.fsencode(found)
    found.exists()  # says whether the system takes such a path at all
  except (OSError, RuntimeError, ValueError) as error:
    raise UserError(f'{key} = {str(path)[:200]!r} is no path that can be read ({error.__class__.__name__})') from None
  return found
