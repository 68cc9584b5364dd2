"""Large pages for large arrays on a CPU.

XLA's CPU backend takes the memory of a step anew for every step, and the GNU C library maps a block that large from the kernel
and gives it back: every step has the kernel clear its pages again, one by one. That takes far less time by pages of 2 MiB than by
those of 4 KiB. malloc asks for them where the environment says so before the program starts.
"""

import os
import pathlib
import sys

SETTING = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
VARIABLE, VALUE = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1'


def missing() -> bool:
  """Whether large pages are to be had and not asked for. What the environment says about malloc already stands."""
  try:
    name, version = os.confstr('CS_GNU_LIBC_VERSION').split()
    numbers = tuple(int(part) for part in version.split('.'))
    offered = '[madvise]' in SETTING.read_text()
  except (AttributeError, OSError, ValueError):  # another C library or system
    return False
  return name == 'glibc' and numbers >= (2, 35) and offered and VARIABLE not in os.environ


def restart(module: str) -> None:
  """Starts this program anew, as the same process, with large pages asked for; returns where that changes nothing.

  Args:
    module: its name; only what was started as `python -m module` starts anew, what a debugger or profiler runs does not.
  """
  words = sys.orig_argv[1:]
  direct = '-m' in words and words[words.index('-m') + 1 :][:1] == [module]
  if direct and missing() and sys.executable:
    os.execve(sys.executable, [sys.executable, *words], {**os.environ, VARIABLE: VALUE})
