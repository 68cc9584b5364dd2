"""Optimisers by name: optax, with a learning-rate schedule, L2 decay, clipping and factors by parameter around it."""

from collections.abc import Sequence
import functools
import inspect
import re

import jax
import optax
import optax.contrib

from latentgen.errors import UserError, near

WRAPPER = ('name', 'learning_rate', 'final_learning_rate', 'warmup_steps', 'schedule', 'weight_decay', 'clip_norm', 'skip_norm', 'rates')
CONTRIB = ('muon',)  # of optax.contrib; others there want more than gradients, or evaluate other parameters than they train
SCHEDULES = ('cosine', 'exponential', 'stairs')
STAIRS, GROWTH = 8, 3  # stair i lasts 3^i parts of the stage


def build(
  where: str,
  steps: int,
  name: str = 'adam',
  learning_rate: float = 1e-3,
  final_learning_rate: float | None = None,
  warmup_steps: int = 0,
  schedule: str = 'cosine',
  weight_decay: float = 0.0,
  clip_norm: float = 0.0,
  skip_norm: float = 0.0,
  rates: Sequence[tuple[str, float]] = (),
  **options,
) -> optax.GradientTransformation:
  """An optimiser as a config names it.

  Args:
    where: config key, for messages.
    steps: length of the stage.
    name: an optimiser of optax, such as 'adam' or 'adamax', or 'muon': orthogonal steps for matrices, Adam's for the rest.
    learning_rate: after the warm-up.
    final_learning_rate: at the end of the stage; None keeps `learning_rate`, 0 is for 'cosine' alone.
    warmup_steps: linear from 0.
    schedule: between the two rates, 'cosine', 'exponential', or 'stairs': 8 constant rates in geometric progression, each
      held three times as long as the one before (Burda et al., 2015, arXiv 1509.00519, section 5).
    weight_decay: added to the gradient times the parameter before the optimiser (L2, as torch does; optax's adamw decouples).
    clip_norm: clips the global norm of the gradient; 0 is off.
    skip_norm: leaves out the update, the optimiser's state untouched, where the gradient's norm is larger; 0 is off. What happens where
      it is not finite, config.train.nonfinite says.
    rates: pairs (regular expression over 'decoder/log_scale' and the like, factor on the learning rate); the first match
      wins, and what none matches has factor 1. A pattern may match nothing, as those of config.mesh.rules may.
    **options: further arguments of the optax function.

  Raises:
    UserError: a rate, name or option that cannot be.
  """
  numbers = {'learning_rate': learning_rate, 'warmup_steps': warmup_steps, 'weight_decay': weight_decay, 'clip_norm': clip_norm}
  for key, value in {**numbers, 'final_learning_rate': final_learning_rate or 0.0}.items():
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise UserError(f'{where}.{key} is {value!r}, need a number')
  function = getattr(optax.contrib if name in CONTRIB else optax, str(name), None)
  if not callable(function) or 'learning_rate' not in inspect.signature(function).parameters:
    names = [*CONTRIB, *(n for n in dir(optax) if n.startswith(('ada', 'sgd', 'lion', 'rms', 'nadam', 'radam', 'novo', 'lamb')))]
    raise UserError(f'{where}.name is {name!r}, which is no optimiser of optax{near(name, names)}')
  known = set(inspect.signature(function).parameters)
  for option in options:
    if option not in known:
      raise UserError(f'{where}.{option} does not exist{near(option, known | set(WRAPPER))}')
  if not learning_rate > 0:
    raise UserError(f'{where}.learning_rate is {learning_rate!r}, need a positive number')
  if schedule not in SCHEDULES:
    raise UserError(f'{where}.schedule is {schedule!r}{near(schedule, SCHEDULES)}')
  if final_learning_rate is not None and not 0 <= final_learning_rate:
    raise UserError(f'{where}.final_learning_rate is {final_learning_rate!r}, need a number of at least 0')
  if final_learning_rate == 0 and schedule != 'cosine':
    raise UserError(f"{where}.final_learning_rate is 0, need a positive number with schedule {schedule!r}, or schedule 'cosine'")
  for key, value in (('warmup_steps', warmup_steps), ('weight_decay', weight_decay), ('clip_norm', clip_norm), ('skip_norm', skip_norm)):
    if value < 0:
      raise UserError(f'{where}.{key} is {value!r}, need at least 0')
  if warmup_steps and steps and warmup_steps >= steps:
    raise UserError(f'{where}.warmup_steps is {warmup_steps}, need less than the {steps} steps of the stage')
  rate = _rate(schedule, learning_rate, final_learning_rate, max(steps - warmup_steps, 1))
  if warmup_steps:
    rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), rate], [warmup_steps])
  chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  if weight_decay:
    chain.append(optax.add_decayed_weights(weight_decay))
  chain.append(function(learning_rate=rate, **options))
  if rates:
    chain.append(_scaled(f'{where}.rates', rates))
  whole = optax.chain(*chain)
  if skip_norm:
    large = functools.partial(optax.skip_large_updates, max_squared_norm=skip_norm**2)
    return optax.MultiSteps(whole, 1, should_skip_update_fn=large).gradient_transformation()
  return whole


def _scaled(where: str, rates: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
  """Multiplies the steps of the parameters whose path a pattern matches; has no state."""
  for rule in rates:
    good = isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], (int, float))
    if not good or isinstance(rule[1], bool) or not rule[1] > 0:
      raise UserError(f'{where} holds {rule!r}, need pairs of a regular expression and a positive factor')
    try:
      re.compile(rule[0])
    except re.error as error:
      raise UserError(f'{where} holds {rule[0]!r}, which is no regular expression: {error}') from error

  def factor(path) -> float:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return next((factor for pattern, factor in rates if re.search(pattern, name)), 1.0)

  def update(updates, state, params=None):
    del params
    return jax.tree_util.tree_map_with_path(lambda path, u: factor(path) * u, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rate(schedule: str, first: float, last: float | None, steps: int) -> optax.Schedule:
  if last is None or last == first:
    return optax.constant_schedule(first)
  if schedule == 'cosine':
    return optax.cosine_decay_schedule(first, steps, alpha=last / first)
  if schedule == 'exponential':
    return optax.exponential_decay(first, steps, last / first)
  rates = [first * (last / first) ** (i / (STAIRS - 1)) for i in range(STAIRS)]
  ends = [round(steps * (GROWTH**i - 1) / (GROWTH**STAIRS - 1)) for i in range(1, STAIRS)]
  return optax.join_schedules([optax.constant_schedule(rate) for rate in rates], ends)
