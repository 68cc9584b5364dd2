"""For programs that compile much and run little."""

import os

FLAGS = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def environment(**more: str) -> dict[str, str]:
  """This one with XLA told to hurry; XLA_FLAGS in `more` are added, other names are set."""
  flags = (os.environ.get('XLA_FLAGS', ''), FLAGS, more.pop('XLA_FLAGS', ''))
  return {**os.environ, **more, 'XLA_FLAGS': ' '.join(filter(None, flags))}
