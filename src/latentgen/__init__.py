"""latentgen: deep latent-variable generative models in JAX.

`import latentgen` is cheap; `latentgen.losses`, `.distributions`, `.samplers`, `.nets`, `.priors`, `.methods` load on first use.
"""

import importlib

__version__ = '0.1.0'

_PARTS = ('losses', 'distributions', 'samplers', 'nets', 'priors', 'methods', 'data', 'evaluate', 'types', 'config')


def __getattr__(name: str):
  if name in _PARTS:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted([*globals(), *_PARTS])
