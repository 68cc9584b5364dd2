"""Settings of all tests: the CPU, a persistent compilation cache, shapes checked in the public maths."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'xla'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(('latentgen.losses', 'latentgen.samplers'), 'beartype.beartype')
