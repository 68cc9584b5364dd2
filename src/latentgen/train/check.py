"""What must hold of a recipe before anything is computed."""

from collections.abc import Mapping

from latentgen.errors import UserError
from latentgen.types import Recipe, Stage


def check_names(recipe: Recipe) -> None:
  """Checks what needs no shapes: stage names, lengths, optimisers, hand-over between stages.

  Raises:
    UserError: one line that names the config key.
  """
  seen: list[str] = []
  if not recipe:
    raise UserError('config.recipe is empty: name at least one stage')
  for stage in recipe:
    where = f'config.stages.{stage.name}'
    if stage.name in seen:
      raise UserError(f'config.recipe names stage {stage.name!r} twice')
    if stage.fit is None and stage.steps < 1:
      raise UserError(f'{where}.steps is {stage.steps}: a stage that is not fitted in closed form needs at least 1 step')
    if stage.fit is not None and stage.steps:
      raise UserError(f'{where}.steps is {stage.steps}: a stage fitted in closed form takes 0 steps')
    if stage.fit is not None and stage.best:
      raise UserError(f'{where}.best is {stage.best!r}: a stage fitted in closed form has one result; leave it out')
    patience = stage.patience_steps
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
      raise UserError(f'{where}.patience_steps is {patience!r}, need a whole number of steps, 0 for none')
    if patience and not stage.best:
      raise UserError(f'{where}.patience_steps needs {where}.best, the validation metric that is waited for')
    for group, source in stage.load.items():
      if source not in seen:
        raise UserError(f'{where}.load.{group} names stage {source!r}, which does not run before it; earlier: {seen}')
    if stage.fit is None:
      _check_updates(stage, where)
    seen.append(stage.name)


def _check_updates(stage: Stage, where: str) -> None:
  updates = stage.method.updates()
  names = [u.name for u in updates]
  if not updates:
    raise UserError(f'{where}: its method has no updates and the stage no fit')
  if len(set(names)) != len(names):
    raise UserError(f'{where}: two updates share a name in {names}')
  for update in updates:
    if update.name not in stage.optim:
      raise UserError(f'{where}.optim has no optimiser for update {update.name!r}; it has {sorted(stage.optim)}')
    if update.every < 1:
      raise UserError(f'{where}: update {update.name!r} has every = {update.every}, need at least 1')
  for name in stage.optim:
    if name not in names:
      raise UserError(f'{where}.optim.{name}: the method has no such update; it has {names}')
  if stage.method.order not in ('simultaneous', 'sequential'):
    raise UserError(f"{where}: order is {stage.method.order!r}, need 'simultaneous' or 'sequential'")


def check_groups(stage: Stage, params: Mapping) -> None:
  """Checks what needs the parameter groups of a stage, as its method initialises them.

  Raises:
    UserError: one line that names the config key.
  """
  where = f'config.stages.{stage.name}'
  groups = sorted(params)
  for what, names in (('load', stage.load), ('ema', stage.ema)):
    for name in names:
      if name not in params:
        raise UserError(f'{where}.{what}.{name}: no such parameter group; the method has {groups}')
  if stage.fit is not None:
    return
  owner: dict[str, str] = {}
  for update in stage.method.updates():
    for group in update.wrt:
      if group not in params:
        raise UserError(f'{where}: update {update.name!r} moves group {group!r}, which is not among {groups}')
      if stage.method.order == 'simultaneous' and group in owner:
        raise UserError(f'{where}: simultaneous updates {owner[group]!r} and {update.name!r} both move group {group!r}')
      owner[group] = update.name
  for group in groups:
    if group not in owner and group not in stage.load:
      raise UserError(f'{where}.load: nothing trains group {group!r}, so say which earlier stage it comes from')
