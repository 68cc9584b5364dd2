"""The loop on methods so small that every step can be done by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latentgen.data import ArraySource, preprocess
from latentgen.errors import TrainingDiverged, UserError
from latentgen.methods.base import Base
from latentgen.train import keys, loop, sharding, step as stepping
from latentgen.types import Aux, Context, Stage, Update

RATE = 0.1


def quadratic(name, wrt, target, every=1):
  """0.5 |p - target(params)|^2, summed over the groups that move."""

  def loss(params, ctx):
    goal = target(params)
    value = sum(0.5 * jnp.sum((params[g] - goal) ** 2) for g in wrt)
    return value, Aux({'seen': goal})

  return Update(name, wrt, loss, every)


@dataclasses.dataclass(frozen=True)
class Toy(Base):
  """Scalar groups a = 1, b = 2, c = 3, any updates."""

  all_updates: tuple = ()
  order: str = 'simultaneous'
  groups: tuple = ('a', 'b')

  def init(self, key, batch):
    values = {'a': 1.0, 'b': 2.0, 'c': 3.0}
    return {'params': {g: jnp.asarray(values[g]) for g in self.groups}, 'stats': {'n': jnp.zeros(())}, 'carry': jnp.zeros(())}

  def updates(self):
    return self.all_updates

  def metrics(self, params, ctx):
    return {'distance': jnp.abs(params['a'] - 0.5) * jnp.ones(ctx.batch['image'].shape[0])}


def stage(updates, name='first', steps=1, rate=RATE, **kwargs):
  options = {k: kwargs.pop(k) for k in ('order', 'groups') if k in kwargs}
  method = kwargs.pop('method', None) or Toy(tuple(updates), **options)
  return Stage(name, method, {u.name: optax.sgd(rate) for u in method.updates()}, steps, **kwargs)


def make_run(tmp_path, *stages, mesh=None, **settings):
  images = np.random.default_rng(0).integers(0, 256, (32, 2, 2, 1), dtype=np.uint8)
  source = ArraySource(images, None, 'toy')
  tmp_path.mkdir(exist_ok=True)
  return loop.Run(
    stages,
    {'train': source, 'valid': source, 'test': source},
    preprocess.make(),
    mesh or sharding.make_mesh(devices=jax.devices()[:1]),
    tmp_path,
    loop.Settings(**{'seed': 0, 'batch_size': 8, 'log_every_steps': 1, 'checkpoint_every_steps': 2, **settings}),
  )


def one_step(stage_, **state):
  """State after one step, outside the loop."""
  raw = {'image': np.zeros((4, 2, 2, 1), np.uint8)}
  first = stepping.init_state(stage_, preprocess.make(), keys.root(0), raw).replace(**state)
  function, _ = stepping.make_step(stage_, preprocess.make())
  return jax.jit(function)(first, stepping.healthy(), keys.root(0), raw)


CROSS = (quadratic('ua', ('a',), lambda p: p['b']), quadratic('ub', ('b',), lambda p: p['a']))


def test_simultaneous_updates_see_the_same_parameters():
  state, _, metrics = one_step(stage(CROSS))
  np.testing.assert_allclose(state.params['a'], 1 - RATE * (1 - 2), rtol=1e-6)
  np.testing.assert_allclose(state.params['b'], 2 - RATE * (2 - 1), rtol=1e-6)
  assert metrics['ub/seen'] == 1.0


def test_sequential_updates_see_the_newest_parameters():
  state, _, metrics = one_step(stage(CROSS, order='sequential'))
  a = 1 - RATE * (1 - 2)
  np.testing.assert_allclose(state.params['a'], a, rtol=1e-6)
  np.testing.assert_allclose(state.params['b'], 2 - RATE * (2 - a), rtol=1e-6)
  np.testing.assert_allclose(metrics['ub/seen'], a, rtol=1e-6)


@pytest.mark.parametrize('order, passes', [('simultaneous', 1), ('sequential', 2)])
def test_simultaneous_updates_of_one_loss_are_one_pass(order, passes):
  traced = []

  def loss(params, ctx):
    traced.append(ctx)
    return 0.5 * (params['a'] - params['b']) ** 2, Aux({'noise': jax.random.normal(ctx.key, ())})

  state, _, metrics = one_step(stage((Update('ua', ('a',), loss), Update('ub', ('b',), loss)), order=order))
  assert len(traced) == passes
  a = 1 - RATE * (1 - 2)
  np.testing.assert_allclose(state.params['a'], a, rtol=1e-6)
  np.testing.assert_allclose(state.params['b'], 2 - RATE * (2 - (a if passes == 2 else 1)), rtol=1e-6)
  np.testing.assert_allclose(metrics['ub/grad_norm'], 2 - (a if passes == 2 else 1), rtol=1e-6)
  assert (metrics['ua/noise'] == metrics['ub/noise']) == (passes == 1)


@pytest.mark.parametrize('parts', [1, 2])
def test_updates_that_share_a_pass_may_each_have_a_loss(parts):
  """Each descends its own: from the other's no gradient comes, though both losses read all parameters."""
  traced = []

  def loss(params, ctx):
    traced.append(ctx)
    both = params['a'] * params['b']
    return {'ua': 3.0 * both, 'ub': both**2}, Aux({'twice': {'ua': 6.0 * both, 'ub': 2.0 * both**2}, 'product': both})

  raw = {'image': np.zeros((4, 2, 2, 1), np.uint8)}
  pair = stage((Update('ua', ('a',), loss), Update('ub', ('b',), loss)))
  first = stepping.init_state(pair, preprocess.make(), keys.root(0), raw)
  function, terms = stepping.make_step(pair, preprocess.make(), parts)
  state, _, metrics = jax.jit(function)(first, stepping.healthy(), keys.root(0), raw)
  np.testing.assert_allclose(state.params['a'], 1 - RATE * 3.0 * 2, rtol=1e-6)
  np.testing.assert_allclose(state.params['b'], 2 - RATE * 2 * (1 * 2) * 1, rtol=1e-6)
  assert len(traced) == parts  # in parts once for its shapes, once in the loop
  found = {name: float(value) for name, value in metrics.items()}
  assert found == {
    **{'ua/loss': 6.0, 'ua/twice': 12.0, 'ua/product': 2.0, 'ua/grad_norm': 6.0},
    **{'ub/loss': 4.0, 'ub/twice': 8.0, 'ub/product': 2.0, 'ub/grad_norm': 4.0},
  }
  assert set(terms) == set(found)


def test_every_runs_on_its_steps_alone_and_reports_only_then(tmp_path):
  lazy = (quadratic('ua', ('a',), lambda p: 0.0), quadratic('ub', ('b',), lambda p: 0.0, every=3))
  run = make_run(tmp_path, stage(lazy, steps=5))
  loop.train(run)
  params = loop.load_variables(run, run.recipe[0])['params']
  np.testing.assert_allclose(params['a'], (1 - RATE) ** 5, rtol=1e-6)
  np.testing.assert_allclose(params['b'], 2 * (1 - RATE), rtol=1e-6)  # the third step alone
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows if 'ub/loss' in r] == [3]
  assert [r['step'] for r in rows] == [1, 2, 3, 4, 5]


def test_rare_updates_report_where_the_log_is_a_multiple_of_their_steps(tmp_path):
  lazy = (quadratic('ua', ('a',), lambda p: 0.0), quadratic('ub', ('b',), lambda p: 0.0, every=2))
  loop.train(make_run(tmp_path, stage(lazy, steps=8), log_every_steps=4))
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows if 'ub/loss' in r] == [4, 8]


@pytest.mark.parametrize('order', ['simultaneous', 'sequential'])
def test_an_update_that_is_left_out_leaves_statistics_as_the_others_made_them(tmp_path, order):
  def counting(name, wrt, every):
    return Update(name, wrt, lambda p, ctx: (p[wrt[0]], Aux(stats={'n': ctx.stats['n'] + 1.0})), every)

  run = make_run(tmp_path, stage((counting('ua', ('a',), 1), counting('ub', ('b',), 2)), steps=3, order=order))
  loop.train(run)
  # Simultaneous updates read the same statistics, of which the last to write stands.
  assert loop.load_variables(run, run.recipe[0])['stats']['n'] == (3.0 if order == 'simultaneous' else 4.0)


def test_prepare_is_shared_carried_and_without_gradient():
  class Chain(Toy):
    def prepare(self, params, ctx):
      return params['a'] * 3.0, ctx.carry + 1.0

  seen = Update('ua', ('a',), lambda p, ctx: (p['a'] * ctx.shared, Aux({'carry': ctx.carry})))
  other = Update('ub', ('b',), lambda p, ctx: (p['b'] * ctx.shared, Aux()))
  state, _, metrics = one_step(stage((), method=Chain((seen, other))))
  np.testing.assert_allclose(state.params['a'], 1 - RATE * 3.0, rtol=1e-6)  # 6 if the gradient went through prepare
  np.testing.assert_allclose(state.params['b'], 2 - RATE * 3.0, rtol=1e-6)
  assert state.carry == 1.0 and metrics['ua/carry'] == 1.0


def test_frozen_groups_keep_their_bits_and_loss_changes_stats():
  count = Update('ua', ('a',), lambda p, ctx: (p['a'] ** 2 + p['b'], Aux(stats={'n': ctx.stats['n'] + 1})))
  state, _, _ = one_step(stage((count,), load={'b': 'earlier'}))
  assert state.params['b'] == 2.0 and state.stats['n'] == 1.0


def test_ema_per_group_and_hand_over_of_the_average(tmp_path):
  first = stage((quadratic('u', ('a', 'b'), lambda p: 0.0),), steps=4, ema={'a': 0.9})
  second = stage(
    (quadratic('uc', ('c',), lambda p: 0.0),), name='second', groups=('a', 'b', 'c'), load={'a': 'first', 'b': 'first'}
  )
  run = make_run(tmp_path, first, second)
  loop.train(run)
  value, average = 1.0, 1.0
  for t in range(4):
    value *= 1 - RATE
    decay = min(0.9, (1 + t) / (10 + t))
    average = decay * average + (1 - decay) * value
  given = loop.load_variables(run, run.recipe[1])['params']
  np.testing.assert_allclose(given['a'], average, rtol=1e-6)
  np.testing.assert_allclose(given['b'], 2 * (1 - RATE) ** 4, rtol=1e-6)
  assert given['b'] == loop.load_variables(run, first)['params']['b']


@dataclasses.dataclass(frozen=True)
class Wide(Toy):
  """Toy with a vector for `a`."""

  def init(self, key, batch):
    found = super().init(key, batch)
    return {**found, 'params': {**found['params'], 'a': jnp.ones(3)}}


@pytest.mark.parametrize(
  'groups, method, message',
  [
    (('b',), Toy, r"load\.a: stage 'first' has no such group; it has \['b'\]"),
    (('a', 'b'), Wide, r'load\.a: the shapes of the earlier stage differ'),
  ],
)
def test_hand_over_that_cannot_work_is_refused_before_the_first_stage(tmp_path, groups, method, message):
  first = stage((quadratic('u', groups, lambda p: 0.0),), groups=groups)
  update = quadratic('ub', ('b',), lambda p: 0.0)
  second = stage((update,), name='second', method=method((update,)), load={'a': 'first'})
  with pytest.raises(UserError, match=message):
    loop.train(make_run(tmp_path / 'run', first, second))
  assert not list((tmp_path / 'run').iterdir())


def test_fit_stage_gets_all_training_data_and_hands_on(tmp_path):
  def fit(variables, batches, key):
    count = sum(batch['image'].shape[0] for batch in batches)
    return {'params': {'a': jnp.asarray(float(count))}}

  fitted = Stage('fitted', Toy(groups=('a',)), {}, 0, fit=fit)
  second = stage((quadratic('ub', ('b',), lambda p: p['a']),), name='second', load={'a': 'fitted'})
  run = make_run(tmp_path, fitted, second)
  loop.train(run)
  assert loop.load_variables(run, fitted)['params']['a'] == 32.0
  np.testing.assert_allclose(loop.load_variables(run, second)['params']['b'], 2 - RATE * (2 - 32), rtol=1e-6)


def test_best_step_by_validation_is_handed_on(tmp_path):
  # a falls from 1 to 0 and passes 0.5, where the metric is least, between the checkpoints at 6 and 8.
  run = make_run(tmp_path, stage((quadratic('u', ('a', 'b'), lambda p: 0.0),), steps=20, best='distance'))
  loop.train(run)
  np.testing.assert_allclose(loop.load_variables(run, run.recipe[0])['params']['a'], (1 - RATE) ** 6, rtol=1e-5)
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  valid = {r['step']: r['distance'] for r in rows if r['split'] == 'valid'}
  assert min(valid, key=valid.get) == 6 and len(valid) == 11  # the start counts
  assert {int(p.name) for p in (tmp_path / 'checkpoints' / 'first').iterdir()} == {6, 18, 20}


class Undefined(Toy):
  """Its metric is no number from where a has fallen below 0.7."""

  def metrics(self, params, ctx):
    return {'distance': jnp.log(params['a'] - 0.7) * jnp.ones(ctx.batch['image'].shape[0])}


def test_a_validation_metric_that_is_no_number_ends_the_run_or_is_never_best(tmp_path):
  method = Undefined((quadratic('u', ('a', 'b'), lambda p: 0.0),))
  run = make_run(tmp_path / 'stop', stage((), method=method, steps=8, best='distance'))
  with pytest.raises(TrainingDiverged, match='distance of the validation split was not finite at step 4; .*nonfinite'):
    loop.train(run)
  assert run.checkpoints(run.recipe[0]).latest() == 2
  run = make_run(tmp_path / 'skip', *run.recipe, nonfinite='skip')
  loop.train(run)
  store = run.checkpoints(run.recipe[0])
  assert store.chosen() == 2 and store.latest() == 8
  store.close()
  rows = [json.loads(line) for line in (tmp_path / 'skip' / 'metrics.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows if 'distance' in r] == [0, 2]


def test_where_a_stage_starts_may_be_the_best_of_it(tmp_path):
  run = make_run(tmp_path, stage((quadratic('u', ('a', 'b'), lambda p: 5.0),), steps=6, best='distance'))
  loop.train(run)
  assert loop.load_variables(run, run.recipe[0])['params']['a'] == 1.0


def test_patience_ends_a_stage_for_good(tmp_path):
  def build():
    first = stage((quadratic('u', ('a', 'b'), lambda p: 0.0),), steps=100, best='distance', patience_steps=4)
    return make_run(tmp_path, first, stage((quadratic('u', ('b',), lambda p: p['a']),), name='second', steps=2, load={'a': 'first'}))

  run = build()
  loop.train(run)
  np.testing.assert_allclose(loop.load_variables(run, run.recipe[1])['params']['a'], (1 - RATE) ** 6, rtol=1e-5)
  assert run.checkpoints(run.recipe[0]).latest() == 10  # best at 6, looked at every 2 steps
  before = (tmp_path / 'metrics.jsonl').read_text()
  assert all(loop.finished(build(), s) for s in run.recipe)
  loop.train(build())
  assert (tmp_path / 'metrics.jsonl').read_text() == before
  assert set(json.loads((tmp_path / 'seconds.json').read_text())) == {'first', 'second'}


def test_a_stage_cut_short_before_its_patience_is_over_goes_on(tmp_path):
  first = stage((quadratic('u', ('a', 'b'), lambda p: 0.0),), steps=8, best='distance', patience_steps=4)
  run = make_run(tmp_path, first)
  loop.train(run)
  assert run.checkpoints(first).latest() == 8 and not loop._waited(first, run.checkpoints(first))
  more = make_run(tmp_path, dataclasses.replace(first, steps=20))
  assert not loop.finished(more, more.recipe[0])
  loop.train(more)
  assert more.checkpoints(first).latest() == 10


def noisy(groups=('a', 'b')):
  """A loss that depends on data and keys, so that a resumed run can go wrong."""

  def loss(params, ctx: Context):
    noise = jax.random.normal(ctx.key, ())
    return sum((params[g] - ctx.batch['image'].mean() - noise) ** 2 for g in groups), Aux()

  return Update('u', groups, loss)


def test_resumed_run_equals_uninterrupted_run_to_the_bit(tmp_path):
  def build(folder):
    first = dataclasses.replace(stage((noisy(),), steps=7), optim={'u': optax.adam(0.1)}, ema={'a': 0.9})
    second = stage((noisy(('c',)),), name='second', steps=5, groups=('a', 'c'), load={'a': 'first'})
    return make_run(tmp_path / folder, first, second)

  loop.train(build('whole'))
  broken = build('broken')

  class Stop(Exception):
    pass

  for stop_after in (6, 4, 3):  # in the first stage, in the first again, in the second
    calls = []
    feed = loop.Run.feed

    def counted(self, batch, calls=calls, stop_after=stop_after, feed=feed):
      calls.append(1)
      if len(calls) > stop_after:
        raise Stop
      return feed(self, batch)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(loop.Run, 'feed', counted)
      with pytest.raises(Stop):
        loop.train(broken)
  loop.train(broken)
  for name in ('first', 'second'):
    whole, again = build('whole'), build('broken')
    index = 0 if name == 'first' else 1
    one, two = (loop.load_variables(r, r.recipe[index]) for r in (whole, again))
    jax.tree.map(np.testing.assert_array_equal, one, two)
  assert (tmp_path / 'whole' / 'metrics.jsonl').read_text() == (tmp_path / 'broken' / 'metrics.jsonl').read_text()


def test_non_finite_stops_with_step_and_term_and_keeps_the_last_good_checkpoint(tmp_path):
  def loss(params, ctx):
    return params['a'] ** 2, Aux({'fine': params['a'], 'broken': jnp.where(ctx.step == 4, jnp.nan, 1.0)})

  run = make_run(tmp_path, stage((Update('u', ('a', 'b'), loss),), steps=9))
  with pytest.raises(TrainingDiverged, match=r"stage 'first': u/broken was not finite at step 4"):
    loop.train(run)
  assert run.checkpoints(run.recipe[0]).latest() == 4


def test_step_does_not_retrace(tmp_path):
  traces = []

  def loss(params, ctx):
    traces.append(1)
    return params['a'] ** 2, Aux()

  loop.train(make_run(tmp_path, stage((Update('u', ('a', 'b'), loss),), steps=6)))
  assert len(traces) == 1


U = quadratic('u', ('a', 'b'), lambda p: 0.0)


@pytest.mark.parametrize(
  'stages, message',
  [
    ([stage((U,), steps=0)], 'config.stages.first.steps is 0'),
    ([stage((U,)), stage((U,))], "names stage 'first' twice"),
    ([dataclasses.replace(stage((U,)), optim={})], "config.stages.first.optim has no optimiser for update 'u'"),
    ([dataclasses.replace(stage((U,)), optim={'u': optax.sgd(1), 'x': optax.sgd(1)})], 'config.stages.first.optim.x'),
    ([stage((quadratic('u', ('a', 'q'), lambda p: 0.0),))], "update 'u' moves group 'q'"),
    ([stage((U, quadratic('v', ('a',), lambda p: 0.0)))], "'u' and 'v' both move group 'a'"),
    ([stage((quadratic('u', ('a',), lambda p: 0.0),))], "config.stages.first.load: nothing trains group 'b'"),
    ([stage((U,), load={'a': 'nowhere'})], "config.stages.first.load.a names stage 'nowhere'"),
    ([stage((U,), ema={'z': 0.9})], 'config.stages.first.ema.z'),
    ([stage((U,), order='both')], "order is 'both'"),
    ([stage((quadratic('u', ('a', 'b'), lambda p: 0.0, every=0),))], 'every = 0'),
    ([Stage('f', Toy(), {}, 3, fit=lambda *a: {})], 'config.stages.f.steps is 3'),
    ([Stage('f', Toy(), {}, 0, fit=lambda *a: {}, best='distance')], "config.stages.f.best is 'distance'"),
  ],
)
def test_recipes_that_cannot_work_are_refused_before_any_work(tmp_path, stages, message):
  with pytest.raises(UserError, match=message.replace('(', r'\(')):
    loop.train(make_run(tmp_path, *stages))
  assert not list(tmp_path.iterdir())


def test_overlapping_updates_are_allowed_in_sequence(tmp_path):
  loop.train(make_run(tmp_path, stage((U, quadratic('v', ('a',), lambda p: 0.0)), order='sequential')))


def test_damaged_checkpoint_is_reported_in_one_line(tmp_path):
  run = make_run(tmp_path, stage((U,), steps=4))
  loop.train(run)
  files = sorted(p for p in (tmp_path / 'checkpoints' / 'first' / '4' / 'state').rglob('*') if p.is_file() and p.stat().st_size)
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(UserError, match='checkpoint .* cannot be read'):
    loop.load_variables(make_run(tmp_path, *run.recipe), run.recipe[0])


def test_fsdp_rule_splits_the_largest_divisible_axis_but_never_the_stack():
  class TwoByFour:
    shape = {'data': 1, 'fsdp': 4}

  spec = lambda path, shape, rules=sharding.DEFAULT_RULES: tuple(sharding._spec(path, shape, TwoByFour, rules, 16))
  assert spec('params/decoder/kernel', (3, 3, 8, 12)) == (None, None, None, 'fsdp')
  assert spec('params/decoder/stack/kernel', (16, 3, 3, 8, 6)) == (None, None, None, 'fsdp')
  assert spec('params/decoder/stack/bias', (16, 6)) == ()
  assert spec('params/bias', (4,)) == ()
  assert spec('params/kernel', (64, 64), (('bias', 'fsdp'), ('kernel', 'replicate'))) == ()
