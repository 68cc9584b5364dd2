"""Settings of all tests: the CPU, quick compilation, a persistent cache of it, shapes checked in the public maths."""

import importlib.metadata
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_QUICK = ['--xla_backend_optimization_level=1']
if importlib.metadata.version('jax').startswith('0.10.'):
  _QUICK.append('--xla_cpu_use_fusion_emitters=false')  # a third of the compilation; later versions do without the flag
os.environ.setdefault('XLA_FLAGS', ' '.join(_QUICK))
_CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'xla'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(('latentgen.losses', 'latentgen.samplers'), 'beartype.beartype')


@pytest.fixture(autouse=True, scope='module')
def _forget():
  """Compiled programs of one file do not stay: they hold memory, and memory maps, of which the kernel allows so many."""
  yield
  jax.clear_caches()
