"""What fits into memory, asked before anything is allocated."""

import os

from latentgen.errors import UserError

DEFLATE = 1032  # deflate's greatest ratio of expansion: 258 bytes for 2 bits


def check(size: int, what: str, remedy: str) -> None:
  """Refuses what the machine cannot hold.

  Args:
    size: in bytes.
    what: the file or config key that asks for it.
    remedy: what to do about it.

  Raises:
    UserError: it is more than the memory of this machine.
  """
  there = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  if size > there:
    raise UserError(f'{what} asks for {size / 2**30:,.0f} GiB of memory, this machine has {there / 2**30:,.0f}; {remedy}')
