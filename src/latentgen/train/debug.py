"""Where a value that is not finite comes from."""

from collections.abc import Callable
import pathlib
import traceback
from typing import Any

import flax
import jax
import optax

from latentgen.train.step import healthy

BELOW = [pathlib.Path(module.__file__).parent for module in (flax, jax, optax)]


def culprit(step: Callable[..., Any], state: Any, key: jax.Array, raw: Any) -> str:
  """Repeats a training step one operation at a time, and says which was the first to make a NaN, else an infinity.

  Args:
    step: as made by `make_step`.
    state: what the step began from; None if that was not kept.
    key: of the stage.
    raw: the batch.
  """
  if state is None:
    return 'config.debug.nan_check=True finds the operation'
  for kind in ('nans', 'infs'):
    try:
      with jax.transfer_guard('allow'), jax.disable_jit(), getattr(jax, f'debug_{kind}')(True):
        step(state, healthy(), key, raw)
    except FloatingPointError as error:
      return f'{" ".join(str(error).split(".")[0].split())}, {_place(error)}'
  return 'no single operation makes it when the step is repeated without compilation'


def _place(error: BaseException) -> str:
  """The innermost line that belongs to no library below this one."""
  while error.__cause__ is not None:  # for what a backward pass does, JAX tells the line of the forward pass
    error = error.__cause__
  frames = traceback.extract_tb(error.__traceback__)
  last = [f for f in frames if not any(pathlib.Path(f.filename).is_relative_to(folder) for folder in BELOW)][-1]
  return f'at {last.filename}:{last.lineno} in {last.name}: {last.line}'
