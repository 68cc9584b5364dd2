"""The one training loop: runs the stages of a recipe in order, resumes by itself, hands parameters on."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.data import pipeline
from latentgen.errors import Damaged, Preempted, TrainingDiverged, UserError, near
from latentgen.train import check, debug, keys, sharding, step as stepping
from latentgen.train.checkpoint import Checkpoints
from latentgen.train.preemption import Notice
from latentgen.train.writers import Clock, Metrics, StageProgress, say
from latentgen.types import Recipe, Stage, TrainState, Variables


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a recipe is run.

  Results depend on `seed`, `batch_size`, when `best` is looked at, `accumulate` (each part has noise and batch statistics of its own)
  and, where something is not finite, on `nonfinite`; on nothing else in here.
  """

  seed: int
  batch_size: int
  log_every_steps: int = 50
  checkpoint_every_steps: int = 500
  keep_checkpoints: int = 2
  keep_every_hours: float = 0.0
  accumulate: int = 1  # parts of a batch, held one at a time
  nonfinite: str = 'stop'  # or 'skip'
  nan_check: bool = False  # config.debug
  rules: tuple[tuple[str, str], ...] = sharding.DEFAULT_RULES
  min_shard_size: int = 2**16


@dataclasses.dataclass(frozen=True)
class Run:
  """A recipe with all that it needs to be trained or looked at.

  Args:
    recipe: the stages, in order.
    data: {'train' | 'valid' | 'test': Source}.
    preprocess: (key, raw batch, train) -> batch, on device.
    mesh: the `(data, fsdp)` mesh.
    workdir: where checkpoints and metrics live.
    settings: see Settings.
  """

  recipe: Recipe
  data: Mapping[str, Any]
  preprocess: stepping.Preprocess
  mesh: jax.sharding.Mesh
  workdir: pathlib.Path
  settings: Settings

  @functools.cached_property
  def root(self) -> jax.Array:
    return keys.root(self.settings.seed)

  def checkpoints(self, stage: Stage) -> Checkpoints:
    settings = self.settings
    return Checkpoints(self.workdir / 'checkpoints' / stage.name, settings.keep_checkpoints, stage.best, settings.keep_every_hours)

  def put(self, batch: Any) -> Any:
    return sharding.put_batch(batch, self.mesh)

  def feed(self, batch: Any) -> Any:
    """A batch as a compiled function takes it once: on one device from the host, which is faster than to put it there before."""
    return self.put(batch) if self.mesh.size > 1 else batch

  def iterator(self, stage: Stage) -> Any:
    # Stages draw in different orders, so that none repeats the first stage's batches.
    seed = jax.jit(lambda root: jax.random.bits(keys.named(root, 'data', stage.name), dtype=jnp.uint32))  # one program, not seven
    return pipeline.train_iterator(
      self.data['train'], self.settings.batch_size, int(seed(self.root)), jax.process_index(), jax.process_count()
    )

  def example(self) -> Any:
    """The shapes of a raw batch, as one step is fed with it, with their sharding."""
    rows, split = self.data['train'].take(np.zeros(1, np.int64)), sharding.batch_sharding(self.mesh) if self.mesh.size > 1 else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.settings.batch_size, *x.shape[1:]), x.dtype, sharding=split), rows)

  @functools.cached_property
  def _abstract(self) -> dict[str, TrainState]:
    return {}

  def abstract(self, stage: Stage) -> TrainState:
    """The state of a stage as shapes with shardings; allocates nothing."""
    if stage.name not in self._abstract:
      self._abstract[stage.name] = self._shapes(stage)
    return self._abstract[stage.name]

  @functools.cached_property
  def _initialisers(self) -> dict[str, Callable[..., TrainState]]:
    return {}

  def initialiser(self, stage: Stage) -> Callable[..., TrainState]:
    """(root key, raw batch) -> the first state of a stage; always the same function, so that it is traced only once."""
    first = lambda root, raw: stepping.init_state(stage, self.preprocess, keys.named(root, 'init', stage.name), raw)
    return self._initialisers.setdefault(stage.name, jax.jit(first))

  def _shapes(self, stage: Stage) -> TrainState:
    raw = self.example()
    shapes = jax.eval_shape(self.initialiser(stage), self.root, raw)
    if stage.best:
      mask = jax.ShapeDtypeStruct((self.settings.batch_size,), bool)
      validate, variables = stepping.make_validation(stage, self.preprocess), stepping.evaluation_variables(shapes)
      scores = jax.eval_shape(validate, variables, shapes.step, self.root, raw, mask)
      if stage.best not in scores:
        raise UserError(f'config.stages.{stage.name}.best is no validation metric of the stage{near(stage.best, scores)}')
    placed = sharding.shardings(shapes, self.mesh, self.settings.rules, self.settings.min_shard_size)
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)


def build_step(run: Run, stage: Stage) -> tuple[Any, Callable[..., Any], list[str]]:
  """The training step as the loop compiles it, as plain function, and the terms that it reports (see `make_step`)."""
  settings, whole = run.settings, sharding.replicated(run.mesh)
  skip = settings.nonfinite == 'skip'
  function, terms = stepping.make_step(stage, run.preprocess, settings.accumulate, skip, sharding.gather(run.mesh))
  out = (jax.tree.map(lambda a: a.sharding, run.abstract(stage)), whole, whole)
  return jax.jit(function, donate_argnums=() if settings.nan_check else (0, 1), out_shardings=out), function, terms


def step_arguments(run: Run, stage: Stage) -> tuple[Any, ...]:
  """Shapes with shardings of everything that a training step takes."""
  whole = sharding.replicated(run.mesh)
  place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole)
  rest = jax.tree.map(place, jax.eval_shape(lambda: (stepping.healthy(), jax.random.key(0))))
  return run.abstract(stage), *rest, run.example()


def load_variables(run: Run, stage: Stage) -> Variables:
  """{'params', 'stats'} that a finished stage hands on."""
  store = run.checkpoints(stage)
  params, stats = store.load_params(run.abstract(stage))
  store.close()
  return {'params': params, 'stats': stats}


def finished(run: Run, stage: Stage) -> bool:
  store = run.checkpoints(stage)
  done = store.latest() == stage.steps or _waited(stage, store)
  store.close()
  return done


def _waited(stage: Stage, store: Checkpoints) -> bool:
  """Whether the stage's metric has not been better for as long as the stage has patience."""
  if not stage.patience_steps or store.latest() is None:
    return False
  return store.scored() - store.chosen() >= stage.patience_steps


def train(run: Run) -> None:
  """Trains every stage that is not finished yet; where a checkpoint is damaged, on from the one before it.

  Raises:
    UserError: if the recipe or its data cannot work.
    TrainingDiverged: on the first value that is not finite.
    Preempted: after SIGTERM, when all is saved.
    SaveFailed: if a checkpoint cannot be written.
  """
  check.check_names(run.recipe)
  sharding.check_batch(run.settings.batch_size, run.mesh, run.settings.accumulate)
  for stage in run.recipe:
    _check_load(run, stage)  # all complaints before any work
  metrics = Metrics(run.workdir)
  try:
    with Notice() as notice:
      for index, stage in enumerate(run.recipe):
        if finished(run, stage) and _sound(run, stage):
          continue
        if stage.fit is not None:
          _fit(run, index, metrics)
        else:
          _train_stage(run, index, metrics, notice)
        if notice.given():
          raise Preempted(f'stopped by SIGTERM; all is saved, and the same command goes on after {stage.name!r}')
  finally:
    metrics.close()


def _sound(run: Run, stage: Stage) -> bool:
  """Whether what a finished stage hands on can be read; sets it aside if not."""
  store = run.checkpoints(stage)
  try:
    store.load_params(run.abstract(stage))
    return True
  except Damaged as error:
    _set_aside(store, store.chosen(), error)
    return finished(run, stage) and _sound(run, stage)
  finally:
    store.close()


def _set_aside(store: Checkpoints, step: int, error: Damaged) -> None:
  say(f'{error}; the damaged one is now {store.set_aside(step)}')


@contextlib.contextmanager
def _meanwhile(compile_: Callable[[], Any]) -> Iterator[Callable[[], None]]:
  """Yields what starts compiling, in a thread of its own, what is called after the block; there, what fails here fails again."""

  def quietly() -> None:
    with contextlib.suppress(Exception):
      compile_()

  thread = threading.Thread(target=quietly)
  try:
    yield thread.start
  finally:
    if thread.ident is not None:
      thread.join()


def _resume(run: Run, stage: Stage, store: Checkpoints, compile_step: Callable[[], None]) -> tuple[TrainState, int, Any]:
  """(state, step, data iterator) of the newest sound checkpoint, or of the beginning; calls `compile_step` once, on its way."""
  compile_step = functools.cache(compile_step)
  while (step := store.latest()) is not None:
    compile_step()
    iterator = run.iterator(stage)
    try:
      state = store.restore(step, run.abstract(stage), iterator)
      say(f'{stage.name}: resuming from step {step}')
      return state, step, iterator
    except Damaged as error:
      _set_aside(store, step, error)
  return _initial(run, stage, run.abstract(stage), compile_step), 0, run.iterator(stage)


def _initial(run: Run, stage: Stage, abstract: TrainState, compile_step: Callable[[], None] = lambda: None) -> TrainState:
  """A fresh state, with the groups that earlier stages hand over; `compile_step` is called when the state's program is traced."""
  out = jax.tree.map(lambda a: a.sharding, abstract)
  with contextlib.closing(run.iterator(stage)) as iterator:
    first = run.root, run.feed(next(iterator))
  build = jax.jit(run.initialiser(stage), out_shardings=out).lower(*first)
  compile_step()  # not before: two threads that trace wait for each other, but one traces while the other compiles
  state = build.compile()(*first)
  for source in dict.fromkeys(stage.load.values()):
    given = load_variables(run, next(s for s in run.recipe if s.name == source))
    for group in (g for g, s in stage.load.items() if s == source):
      state.params[group] = jax.device_put(given['params'][group], jax.tree.map(lambda a: a.sharding, abstract.params[group]))
      if group in state.stats and group in given['stats']:
        state.stats[group] = jax.device_put(
          given['stats'][group], jax.tree.map(lambda a: a.sharding, abstract.stats[group])
        )
  if stage.load:  # averages and optimisers start from what was handed over
    fresh = jax.jit(
      lambda params: (stepping.optimiser_state(stage, params), {g: jax.tree.map(jnp.copy, params[g]) for g in stage.ema}),
      out_shardings=(out.opt, out.ema),
    )
    opt, ema = fresh(state.params)
    state = state.replace(opt=opt, ema=ema)
  return state


def _check_load(run: Run, stage: Stage) -> None:
  """Whether earlier stages have the groups that they are to hand over, in the shapes that this stage needs."""
  wanted = run.abstract(stage).params
  for group, source in stage.load.items():
    given = run.abstract(next(s for s in run.recipe if s.name == source)).params
    where = f'config.stages.{stage.name}.load.{group}'
    if group not in given:
      raise UserError(f'{where}: stage {source!r} has no such group; it has {sorted(given)}')
    _same_shapes(given[group], wanted[group], where)


def _same_shapes(given: Any, wanted: Any, where: str) -> None:
  shapes = [jax.tree_util.tree_map(lambda a: (a.shape, str(a.dtype)), t) for t in (given, wanted)]
  if shapes[0] != shapes[1]:
    raise UserError(f'{where}: the shapes of the earlier stage differ from those that this stage needs')


def _train_stage(run: Run, index: int, metrics: Metrics, notice: Notice) -> None:
  stage, settings = run.recipe[index], run.settings
  store, abstract = run.checkpoints(stage), run.abstract(stage)
  for line in sharding.describe(abstract.params, jax.tree.map(lambda a: a.sharding, abstract.params)):
    say(f'{stage.name}: parameters {line}')
  clock = Clock(run.workdir)
  compiled, function, terms = build_step(run, stage)
  with _meanwhile(lambda: compiled.lower(*step_arguments(run, stage)).compile()) as compile_step:
    state, step, iterator = _resume(run, stage, store, compile_step)
  metrics.rewind(stage.name, -1 if store.latest() is None else step)

  skip, whole = settings.nonfinite == 'skip', sharding.replicated(run.mesh)
  validate = _validator(run, stage) if stage.best else None
  if validate and store.latest() is None:  # where a stage starts may be the best of it
    scores = validate(state)
    metrics.write(stage.name, 0, _finite(scores), split='valid')
    store.save(0, state, iterator, scores)
  # Made under jit, as several processes can only make what spans them all together.
  start = jax.jit(lambda key: (keys.named(key, stage.name), stepping.healthy()), out_shardings=whole)
  key, health = start(run.root)
  # Steps on an emulated mesh that are not waited for starve each other's collectives and abort.
  wait = run.mesh.size > 1 and run.mesh.devices.flat[0].platform == 'cpu'
  first = step
  progress = StageProgress(stage.name, index, len(run.recipe), step, stage.steps)
  try:
    with jax.transfer_guard('disallow'):
      while step < stage.steps:
        before, raw = state if settings.nan_check else None, run.feed(next(iterator))
        with jax.transfer_guard_host_to_device('allow'):
          state, health, found = compiled(state, health, key, raw)
        step += 1
        if wait or step == first + 1:
          jax.block_until_ready(state)
        if step == first + 1:
          progress.compiled()
        last, stop = step == stage.steps, notice.given()
        logs, saves = step % settings.log_every_steps == 0 or last, step % settings.checkpoint_every_steps == 0 or last
        if logs or saves or stop or settings.nan_check:
          _check_health(health, terms, stage, functools.partial(debug.culprit, function, before, key, raw))
        if logs:
          values = _ran(stage, step, jax.device_get(found))
          if skip:
            values = _finite(values) | {'skipped': float(jax.device_get(state.skipped))}
          metrics.write(stage.name, step, values)
          metrics.speed(stage.name, step, progress.rate(step))
          progress.show(step, values)
        if saves:
          scores = validate(state) if validate else None
          if scores:
            metrics.write(stage.name, step, _finite(scores), split='valid')
          store.save(step, state, iterator, scores)
          clock.add(stage.name)
          if stage.patience_steps and not last and not stop:
            store.wait()
            if _waited(stage, store):
              say(f'{stage.name}: {stage.best} was best at step {store.chosen()}; stopping at {step}')
              break
        if stop:
          if not saves:
            store.save(step, state, iterator)
            clock.add(stage.name)
          store.wait()
          raise Preempted(f'stopped by SIGTERM; all is saved, and the same command goes on from step {step} of {stage.name!r}')
  finally:
    progress.close()
    iterator.close()
    store.wait()
    store.close()


def _check_health(health: stepping.Health, terms: list[str], stage: Stage, culprit: Callable[[], str]) -> None:
  step, term = (int(x) for x in jax.device_get((health['step'], health['term'])))
  if step >= 0:
    raise TrainingDiverged(
      f'stage {stage.name!r}: {terms[term]} was not finite at step {step}; the last good checkpoint is kept. {culprit()}. Lower '
      f"config.stages.{stage.name}.optim.*.learning_rate, set clip_norm there, or config.train.nonfinite to 'skip'"
    )


def _ran(stage: Stage, step: int, values: Mapping[str, Any]) -> dict[str, float]:
  """The metrics of the updates that ran at `step`; rarer updates report when they do."""
  idle = {u.name for u in stage.method.updates() if step % u.every}
  return {name: float(value) for name, value in values.items() if name.split('/')[0] not in idle}


def _finite(values: Mapping[str, float]) -> dict[str, float]:
  return {name: value for name, value in values.items() if np.isfinite(value)}


def _validator(run: Run, stage: Stage) -> Callable[[TrainState], dict[str, float]]:
  """Means of the method's metrics over the validation split, with the same noise every time; TrainingDiverged if one is not finite."""
  function = jax.jit(stepping.make_validation(stage, run.preprocess))
  root = keys.named(run.root, 'validation', stage.name)

  def validate(state: TrainState) -> dict[str, float]:
    totals: dict[str, float] = {}
    with jax.transfer_guard('allow'):
      share = jax.process_index(), jax.process_count()
      batches = pipeline.evaluation_batches(run.data['valid'], run.settings.batch_size, None, *share)
      for i, (raw, mask) in enumerate(batches):
        sums = function(
          stepping.evaluation_variables(state), state.step, jax.random.fold_in(root, i), run.put(raw), run.put(mask)
        )
        for name, value in jax.device_get(sums).items():
          totals[name] = totals.get(name, 0.0) + float(value)
      bad = [name for name, total in totals.items() if not np.isfinite(total)]
      if bad and run.settings.nonfinite == 'stop':
        raise TrainingDiverged(
          f'stage {stage.name!r}: {bad[0]} of the validation split was not finite at step {int(state.step)}; the last good '
          f"checkpoint is kept. Lower config.stages.{stage.name}.optim.*.learning_rate, or set config.train.nonfinite to 'skip'"
        )
    return {name: total / len(run.data['valid']) for name, total in totals.items()}

  return validate


def _fit(run: Run, index: int, metrics: Metrics) -> None:
  """A stage in closed form."""
  stage, abstract, clock = run.recipe[index], run.abstract(run.recipe[index]), Clock(run.workdir)
  say(f'[{index + 1}/{len(run.recipe)}] {stage.name}: fitting')
  metrics.rewind(stage.name, -1)
  state, whole = _initial(run, stage, abstract), sharding.replicated(run.mesh)
  key = keys.named(run.root, stage.name)
  preprocess = jax.jit(functools.partial(run.preprocess, train=False))
  epoch = [
    preprocess(jax.random.fold_in(key, i), batch)
    for i, batch in enumerate(pipeline.epoch(run.data['train'], run.settings.batch_size))
  ]
  # Every process fits by itself, to whole parameters of its own.
  given = jax.device_get(jax.jit(lambda v: v, out_shardings=whole)({'params': state.params, 'stats': state.stats}))
  fitted = stage.fit(given, epoch, jax.random.fold_in(key, len(epoch)))
  params = {**given['params'], **fitted['params']}
  for group in params:
    _same_shapes(params[group], abstract.params[group], f'config.stages.{stage.name}: group {group!r} after fit')
  params, stats = jax.device_get((params, {**given['stats'], **fitted.get('stats', {})}))
  bad = [g for g in params if not all(np.isfinite(x).all() for x in jax.tree.leaves(params[g]))]
  if bad:
    raise TrainingDiverged(f'stage {stage.name!r}: the fit left values that are not finite in group {bad[0]!r}')
  put = lambda host, like: jax.device_put(host, jax.tree.map(lambda a: a.sharding, like))
  state = state.replace(params=put(params, abstract.params), stats=put(stats, abstract.stats))
  store = run.checkpoints(stage)
  store.save(0, state, None)
  store.close()
  clock.add(stage.name)
