"""Files that are written whole or not at all."""

import os
import pathlib

TEMPORARY = '.tmp'  # ends the name of what a kill may leave beside a file


def replace_file(path: str | os.PathLike, content: bytes) -> None:
  """Writes beside the file and moves into place; makes its folder if need be."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(path.name + TEMPORARY)
  beside.unlink(missing_ok=True)  # what a kill left, or a link that leads elsewhere
  beside.write_bytes(content)
  os.replace(beside, path)
