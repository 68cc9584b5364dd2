"""One training step: every method's updates through the package's only reverse pass."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from latentgen.train import check, keys
from latentgen.types import Array, Aux, Context, Key, Params, Stage, TrainState, Update

Preprocess = Callable[..., Any]  # (key, raw batch, train) -> batch
Health = dict[str, Array]  # {'step', 'term'}: the first step and term that were not finite, -1 while all is well

Gather = Callable[[Params], Params]  # makes parameters that are split over devices whole

EMA_WARMUP = 10.0  # average over min(decay, (1 + t) / (10 + t)), so that early averages forget the initialisation


def own(value: Any, update: Update) -> Array:
  """That update's, of a loss or metric that may have one for each."""
  return value[update.name] if isinstance(value, Mapping) else value


def gradients(
  updates: Sequence[Update], params: Params, ctx: Context, gather: Gather = lambda p: p
) -> tuple[dict[str, tuple[Array, Params]], Aux]:
  """Of updates with one loss, by one forward pass: ({update: (its loss, gradient over the groups of its `wrt`)}, aux)."""
  moved = {g: params[g] for update in updates for g in update.wrt}
  loss, pullback, aux = jax.vjp(lambda p: updates[0].loss(gather({**params, **p}), ctx), moved, has_aux=True)
  names = tuple(loss) if isinstance(loss, Mapping) else ()

  def back(update: Update | None) -> Params:
    if update is None:
      return pullback(jnp.ones((), loss.dtype))[0]
    return pullback({name: jnp.asarray(name == update.name, loss[name].dtype) for name in names})[0]

  common = None if names else back(None)
  trees = {update.name: back(update) if names else common for update in updates}
  return {u.name: (own(loss, u), {g: trees[u.name][g] for g in u.wrt}) for u in updates}, aux


def gradient(update: Update, params: Params, ctx: Context) -> tuple[tuple[Array, Aux], Params]:
  """Of a single update, as a test or a notebook wants it: ((loss, aux), gradient over the groups of `update.wrt`)."""
  found, aux = gradients((update,), params, ctx)
  loss, grads = found[update.name]
  return (loss, aux), grads


def accumulated(
  passes: Sequence[Sequence[Update]], params: Params, ctxs: Sequence[Context], gather: Gather
) -> list[tuple[dict[str, tuple[Array, Params]], Aux]]:
  """As `gradients` of every pass, of the mean over the parts on the first axis of `batch` and `shared`, of which one is held at a time.

  Every part has noise of its own; changes of statistics go from part to part. What the passes have in common is computed once: they
  go through a part together.
  """

  def one(i: Array, batch: Any, shared: Any, stats: Any):
    found, after, changed = [], [], []
    for updates, ctx, before in zip(passes, ctxs, stats, strict=True):
      part = ctx.replace(batch=batch, shared=shared, key=jax.random.fold_in(ctx.key, i), stats=before)
      each, aux = gradients(updates, params, part, gather)
      found.append((each, dict(aux.metrics)))
      after.append({**before, **aux.stats})
      changed.append(dict(aux.stats))
    return found, after, changed

  parts = len(jax.tree.leaves(ctxs[0].batch)[0])
  rows, stats = (jnp.arange(parts), ctxs[0].batch, ctxs[0].shared), [dict(ctx.stats) for ctx in ctxs]
  first = jax.tree.map(lambda x: x[0], rows)
  shapes, _, changed = jax.eval_shape(one, *first, stats)

  def body(carry, row):
    total, stats = carry
    found, stats, _ = one(*row, stats)
    return (jax.tree.map(lambda t, f: t + f / parts, total, found), stats), None

  zero = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.result_type(s.dtype, jnp.float32)), shapes)
  (found, stats), _ = jax.lax.scan(body, (zero, stats), rows)
  return [
    (each, Aux(metrics, {name: after[name] for name in names}))
    for (each, metrics), after, names in zip(found, stats, changed, strict=True)
  ]


def by_loss(updates: Sequence[Update]) -> list[list[Update]]:
  """Updates of one loss together: they are one forward pass."""
  passes: list[list[Update]] = []
  for update in updates:
    same = next((found for found in passes if found[0].loss == update.loss), None)
    if same is None:
      passes.append([update])
    else:
      same.append(update)
  return passes


def split(batch: Any, parts: int) -> Any:
  """[b, ...] -> [parts, b / parts, ...], example i to part i mod parts, so that each device keeps its own."""
  return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)


def init_state(stage: Stage, preprocess: Preprocess, key: Key, raw: Any) -> TrainState:
  """The state of a stage before its first step; pure, to be jitted with out_shardings."""
  batch = preprocess(keys.named(key, 'preprocess'), raw, True)
  variables = stage.method.init(key, batch)
  params = dict(variables['params'])
  check.check_groups(stage, params)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    stats=dict(variables.get('stats', {})),
    carry=variables.get('carry', ()),
    opt=optimiser_state(stage, params),
    ema={g: params[g] for g in stage.ema},
    skipped=jnp.zeros((), jnp.int32),
  )
  return jax.tree.map(lambda x: jnp.asarray(x, x.dtype), state)  # weak types would trace the second step anew


def optimiser_state(stage: Stage, params: Params) -> dict[str, Any]:
  if stage.fit is not None:
    return {}
  return {u.name: stage.optim[u.name].init({g: params[g] for g in u.wrt}) for u in stage.method.updates()}


def evaluation_variables(state: TrainState) -> dict[str, Any]:
  """What evaluation and later stages see: averaged parameters where the stage keeps an average."""
  return {'params': {**state.params, **state.ema}, 'stats': state.stats}


def healthy() -> Health:
  return {'step': jnp.full((), -1, jnp.int32), 'term': jnp.full((), -1, jnp.int32)}


def make_step(
  stage: Stage, preprocess: Preprocess, parts: int = 1, skip: bool = False, gather: Gather = lambda p: p
) -> tuple[Callable[..., Any], list[str]]:
  """Builds the pure step function of a stage.

  Args:
    stage: what is trained.
    preprocess: (key, raw batch, train) -> batch.
    parts: gradients are means over so many parts of the batch, computed one after the other.
    gather: makes parameters that are split over devices whole, for losses to read.
    skip: a step of which a loss, metric or gradient is not finite changes nothing but the counts of steps and of skipped ones.

  Returns:
    step: (state, health, stage key, raw batch) -> (state, health, {'update/metric': scalar}).
    terms: filled while `step` is traced; names what `health['term']` counts.
  """
  method, updates = stage.method, stage.method.updates()
  terms: list[str] = []
  order = {update.name: i for i, update in enumerate(updates)}
  if method.order == 'simultaneous':  # those that run at the same steps go together
    groups = [[u for u in updates if u.every == every] for every in dict.fromkeys(u.every for u in updates)]
  else:
    groups = [[u] for u in updates]

  def run(group: Sequence[Update], params: Params, opt: Any, ctx: Context):
    """Updates -> their groups' new parameters, optimiser states, changed stats, metrics."""
    passes = by_loss(group)
    ctxs = [ctx.replace(key=jax.random.fold_in(ctx.key, keys.UPDATES + order[updates[0].name])) for updates in passes]
    if parts == 1:
      found = [gradients(updates, params, c, gather) for updates, c in zip(passes, ctxs, strict=True)]
    else:
      found = accumulated(passes, params, ctxs, gather)
    moved, states, stats, metrics = {}, {}, {}, {}
    for updates, (each, aux) in zip(passes, found, strict=True):
      stats.update(aux.stats)
      for update in updates:
        loss, grads = each[update.name]
        old = {g: params[g] for g in update.wrt}
        delta, states[update.name] = stage.optim[update.name].update(grads, opt[update.name], old)
        moved.update(optax.apply_updates(old, delta))
        named = {'loss': loss, **{name: own(value, update) for name, value in aux.metrics.items()}, 'grad_norm': optax.tree.norm(grads)}
        metrics.update({f'{update.name}/{name}': jnp.asarray(value, jnp.float32) for name, value in named.items()})
    return moved, states, stats, metrics

  def run_every(group: Sequence[Update], params: Params, opt: Any, ctx: Context, kept: Any):
    """As `run`; at steps that leave the group out, changed stats are what the step has made of them so far, `kept`."""
    if group[0].every == 1:
      return run(group, params, opt, ctx)
    took = functools.partial(run, group)
    shapes = jax.eval_shape(took, params, opt, ctx)

    def skip(params, opt, ctx):
      del ctx
      stats = {name: kept[name] for name in shapes[2]}
      return {g: params[g] for g in shapes[0]}, opt, stats, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[3])

    return jax.lax.cond((ctx.step + 1) % group[0].every == 0, took, skip, params, opt, ctx)

  def step(state: TrainState, health: Health, key: Key, raw: Any):
    key = jax.random.fold_in(key, state.step)
    batch = preprocess(jax.random.fold_in(key, keys.PREPROCESS), raw, True)
    ctx = Context(batch=batch, key=key, step=state.step, stats=state.stats, carry=state.carry, ema=state.ema)
    prepared = ctx.replace(key=jax.random.fold_in(key, keys.PREPARE))

    def prepare(carry: Any, i: Any, batch: Any):
      own = prepared.replace(batch=batch, carry=carry, key=prepared.key if i is None else jax.random.fold_in(prepared.key, i))
      return jax.lax.stop_gradient(method.prepare(jax.lax.stop_gradient(gather(state.params)), own))[::-1]

    if parts == 1:
      carry, shared = prepare(state.carry, None, batch)
    else:
      ctx = ctx.replace(batch=split(batch, parts))
      carry, shared = jax.lax.scan(lambda carry, row: prepare(carry, *row), state.carry, (jnp.arange(parts), ctx.batch))
    ctx = ctx.replace(shared=shared, carry=carry)

    params, stats, opt, metrics = dict(state.params), dict(state.stats), dict(state.opt), {}
    for group in groups:
      before = {u.name: opt[u.name] for u in group}
      seen = (state.params, ctx) if method.order == 'simultaneous' else (params, ctx.replace(stats=stats))
      new, after, changed, found = run_every(group, seen[0], before, seen[1], stats)
      params.update(new)
      opt.update(after)
      stats.update(changed)
      metrics.update(found)

    decay = {g: jnp.minimum(d, (1.0 + state.step) / (EMA_WARMUP + state.step)) for g, d in stage.ema.items()}
    ema = {g: optax.incremental_update(params[g], state.ema[g], 1.0 - d) for g, d in decay.items()}

    terms[:] = list(metrics)
    bad = ~jnp.isfinite(jnp.stack([jnp.zeros(()), *metrics.values()])[len(metrics) > 0 :])  # a stage may have no updates
    first = ~jnp.asarray(skip) & bad.any() & (health['step'] < 0)
    health = {
      'step': jnp.where(first, state.step, health['step']),
      'term': jnp.where(first, jnp.argmax(bad).astype(jnp.int32), health['term']),
    }
    new = TrainState(state.step + 1, params, stats, carry, opt, ema, state.skipped)
    if skip:
      undone = state.replace(step=new.step, skipped=state.skipped + 1)
      new = jax.tree.map(functools.partial(jnp.where, bad.any()), undone, new)
    return new, health, metrics

  return step, terms


def make_validation(stage: Stage, preprocess: Preprocess) -> Callable[..., Any]:
  """(variables, step, key, raw, mask [b]) -> {metric: sum over the unmasked examples}."""

  def validate(variables, step, key, raw, mask):
    batch = preprocess(jax.random.fold_in(key, keys.PREPROCESS), raw, False)
    ctx = Context(batch=batch, key=jax.random.fold_in(key, keys.UPDATES), step=step, stats=variables['stats'])
    found = stage.method.metrics(variables['params'], ctx)
    return {name: jnp.where(mask, value, 0.0).sum() for name, value in found.items()}

  return validate
