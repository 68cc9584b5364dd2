"""Nothing is lost: SIGTERM, damaged checkpoints, other shapes, keep policies, values that are not finite."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import re
import resource
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import Toy, make_run, noisy, one_step, stage

from latentgen.errors import Damaged, Preempted, TrainingDiverged, UserError
from latentgen.train import checkpoint, loop
from latentgen.train.writers import Metrics
from latentgen.types import Aux, Context, Stage, Update


def two_stages(folder, **settings):
  first = dataclasses.replace(stage((noisy(),), steps=7), optim={'u': optax.adam(0.1)}, ema={'a': 0.9}, best='distance')
  second = stage((noisy(('c',)),), name='second', steps=5, groups=('a', 'c'), load={'a': 'first'})
  return make_run(folder, first, second, **settings)


def same(one, two):
  """Both stages hand on the same, and the same was written about them."""
  for index in range(2):
    jax.tree.map(np.testing.assert_array_equal, *(loop.load_variables(r, r.recipe[index]) for r in (one, two)))
  rows = [sorted((r.workdir / 'metrics.jsonl').read_text().splitlines()) for r in (one, two)]
  assert rows[0] == rows[1]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  run = two_stages(tmp_path_factory.mktemp('whole'))
  loop.train(run)
  return run


def cut(folder):
  """Halves every file of a checkpoint's state."""
  files = [p for p in (folder / 'state').rglob('*') if p.is_file()]
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---------------------------------------------------------------------------------------------- SIGTERM


@pytest.mark.parametrize('batch', [4, 9, 11, 13])
def test_sigterm_saves_at_once_and_the_same_command_goes_on(tmp_path, monkeypatch, whole, batch):
  run, feed, calls = two_stages(tmp_path), loop.Run.feed, []

  def counted(self, raw):
    calls.append(1)
    if len(calls) == batch:
      os.kill(os.getpid(), signal.SIGTERM)
    return feed(self, raw)

  before = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    patch.setattr(loop.Run, 'feed', counted)
    with pytest.raises(Preempted, match=r'goes on from step \d of .(first|second)') as stopped:
      loop.train(run)
  assert signal.getsignal(signal.SIGTERM) is before
  step, name = re.search(r"step (\d+) of '(\w+)'", str(stopped.value)).groups()
  assert run.checkpoints(run.recipe[['first', 'second'].index(name)]).latest() == int(step)
  loop.train(run)
  same(whole, run)


def test_sigterm_in_a_stage_of_closed_form_is_heard_after_it(tmp_path):
  def fit(variables, batches, key):
    os.kill(os.getpid(), signal.SIGTERM)
    return {'params': {'a': np.float32(3.0)}}

  fitted = Stage('fitted', Toy(groups=('a',)), {}, 0, fit=fit)
  run = make_run(tmp_path, fitted)
  with pytest.raises(Preempted, match="goes on after 'fitted'"):
    loop.train(run)
  assert loop.finished(run, fitted) and loop.load_variables(run, fitted)['params']['a'] == 3.0


def test_a_step_saved_without_validation_is_no_end_of_patience(tmp_path):
  """Steps that SIGTERM saves have no metric: only those at which an undisturbed run looks count."""
  best = dataclasses.replace(stage((noisy(),), steps=20), best='distance', patience_steps=4)
  run = make_run(tmp_path, best)
  store = run.checkpoints(best)
  state = one_step(best)[0]
  for step, value in ((0, 1.0), (2, 0.5), (4, 0.7), (7, None)):
    store.save(step, state, None, None if value is None else {'distance': value})
  store.close()
  assert store.scored() == 4 and not loop.finished(run, best)
  store.save(8, state, None, {'distance': 0.6})
  store.close()
  assert loop.finished(run, best)


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize('missing', [False, True], ids=['truncated', 'deleted'])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, capfd, whole, missing):
  run = two_stages(tmp_path)
  short = dataclasses.replace(run, recipe=(dataclasses.replace(run.recipe[0], steps=4),))
  loop.train(short)
  newest = tmp_path / 'checkpoints' / 'first' / '4'
  if missing:
    for path in (newest / 'state').rglob('*'):
      if path.is_file():
        path.unlink()
  else:
    cut(newest)
  loop.train(run)
  said = capfd.readouterr().err
  assert f'{newest} cannot be read' in said and 'first: resuming from step 2' in said
  assert (tmp_path / 'checkpoints' / 'damaged' / 'first-4').is_dir()
  same(whole, run)


def test_what_a_finished_stage_handed_on_is_trained_again_if_damaged(tmp_path, whole):
  run = two_stages(tmp_path)
  loop.train(run)
  for path in (tmp_path / 'checkpoints' / 'second').iterdir():
    cut(path)  # all of them: the stage begins anew
  cut(tmp_path / 'checkpoints' / 'first' / str(run.checkpoints(run.recipe[0]).chosen()))
  with pytest.raises(Damaged, match='--mode=train goes on'):
    loop.load_variables(run, run.recipe[1])
  loop.train(run)
  jax.tree.map(np.testing.assert_array_equal, *(loop.load_variables(r, r.recipe[1])['params']['c'] for r in (whole, run)))


@pytest.mark.parametrize('error', [MemoryError(), PermissionError(13, 'no'), OSError(24, 'many'), RuntimeError('RESOURCE_EXHAUSTED: x')])
def test_a_checkpoint_that_there_is_no_room_to_read_is_left(tmp_path, monkeypatch, error):
  run = make_run(tmp_path, stage((noisy(),), steps=4))
  loop.train(run)

  def fail(*_, **__):
    raise ValueError('while reading') from error

  monkeypatch.setattr('orbax.checkpoint.CheckpointManager.restore', fail)
  with pytest.raises(UserError, match='cannot be read here .* stays as it is') as found:
    loop.train(make_run(tmp_path, *run.recipe))
  assert not isinstance(found.value, Damaged) and run.checkpoints(run.recipe[0]).latest() == 4


def test_a_kill_before_the_first_checkpoint_leaves_no_row_twice(tmp_path, monkeypatch):
  run = make_run(tmp_path, dataclasses.replace(stage((noisy(),), steps=4), best='distance'))

  def die(*_):
    raise InterruptedError

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, 'save', die)
    with pytest.raises(InterruptedError):
      loop.train(run)
  loop.train(run)
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows if r['split'] == 'valid'] == [0, 2, 4]


def test_a_checkpoint_of_other_shapes_is_refused_and_left(tmp_path):
  run = make_run(tmp_path, stage((noisy(),), steps=4))
  loop.train(run)
  other = make_run(tmp_path, dataclasses.replace(run.recipe[0], steps=6, optim={'u': optax.adam(0.1)}))
  with pytest.raises(UserError, match='is of another model: opt/u/.* is missing there and .* here') as error:
    loop.train(other)
  assert not isinstance(error.value, Damaged) and run.checkpoints(run.recipe[0]).latest() == 4


def test_a_metrics_file_with_torn_lines_is_mended(tmp_path):
  rows = [{'stage': 'a', 'step': s, 'split': 'train', 'x': 1.0} for s in (1, 2, 3)] + [{'stage': 'b', 'step': 1}]
  text = '\n'.join(map(json.dumps, rows)) + '\n{"stage": "b", "st\n17\nnull\n\x00\n{"step": 1}\n{"stage": "a", "step": null}\n'
  (tmp_path / 'metrics.jsonl').write_text(text)
  Metrics(tmp_path).rewind('a', 2)
  kept = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert kept == [rows[0], rows[1], rows[3]]


def test_one_checkpoint_for_every_so_many_hours_stays(tmp_path):
  state = one_step(stage((noisy(),)))[0]
  store = checkpoint.Checkpoints(tmp_path / 'first', keep=1, hours=1.5 / 3600)
  for step in range(1, 6):
    store.save(step, state, None)
    store.wait()
    time.sleep(0.8)
  store.close()
  kept = {int(p.name) for p in (tmp_path / 'first').iterdir()}
  assert 1 in kept and 5 in kept and 2 not in kept and len(kept) < 5


# ---------------------------------------------------------------------------------------------- not finite


def spoilt(at, where='loss'):
  """a falls by a tenth of itself at every step, but for steps at which the square root of -1 is taken."""

  def loss(params, ctx: Context):
    bad = jnp.sqrt(jnp.where(ctx.step == at, -1.0, 1.0))
    return 0.5 * params['a'] ** 2 * (bad if where == 'loss' else 1.0), Aux({'root': bad})

  return Update('u', ('a', 'b'), loss)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
  run = make_run(tmp_path, dataclasses.replace(stage((spoilt(2),), steps=5), ema={'a': 0.5}), nonfinite='skip')
  loop.train(run)
  np.testing.assert_allclose(run.checkpoints(run.recipe[0]).restore(5, run.abstract(run.recipe[0])).params['a'], 0.9**4, rtol=1e-6)
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [row['skipped'] for row in rows] == [0, 0, 1, 1, 1]
  assert 'u/loss' not in rows[2] and 'u/loss' in rows[3]


@pytest.mark.parametrize('backward', [False, True])
def test_nan_check_names_the_line(tmp_path, backward):
  def loss(params, ctx):
    if backward:  # the value is 0, its gradient 0 times infinity
      return jnp.sqrt(params['a'] * jnp.where(ctx.step == 2, 0.0, 1.0)) * 0.0 + params['b'], Aux()
    return jnp.log(params['a'] - jnp.where(ctx.step == 2, 2.0, 0.0)), Aux()

  run = make_run(tmp_path, stage((Update('u', ('a', 'b'), loss),), steps=4), nan_check=True)
  word = 'jnp.sqrt' if backward else 'jnp.log'
  with pytest.raises(TrainingDiverged, match=rf'was not finite at step 2.*invalid value \(nan\).*{re.escape(word)}\(params'):
    loop.train(run)


# ---------------------------------------------------------------------------------------------- accumulation


def test_accumulated_gradients_are_those_of_the_mean_over_the_parts():
  """Parts are examples i mod n; statistics pass from part to part, noise differs between them, chains go through `prepare`."""
  from latentgen.data import preprocess
  from latentgen.train import keys, step as stepping

  def loss(params, ctx):
    mean = ctx.batch['image'].mean()
    noise = jax.random.normal(ctx.key, ())
    return (params['a'] - mean) ** 2 + 0.0 * noise, Aux({'mean': mean, 'noise': noise}, {'n': 0.5 * ctx.stats['n'] + mean})

  one = stage((Update('u', ('a', 'b'), loss),))
  images = np.random.default_rng(0).integers(0, 256, (8, 2, 2, 1), dtype=np.uint8)
  raw = {'image': images}
  first = stepping.init_state(one, preprocess.make(), keys.root(0), raw)
  state, _, found = jax.jit(stepping.make_step(one, preprocess.make(), parts=4)[0])(first, stepping.healthy(), keys.root(0), raw)
  means = [images[i::4].mean() / 255 for i in range(4)]
  np.testing.assert_allclose(found['u/loss'], np.mean([(1 - m) ** 2 for m in means]), rtol=1e-5)
  np.testing.assert_allclose(state.params['a'], 1 - 0.1 * np.mean([2 * (1 - m) for m in means]), rtol=1e-5)
  stats = 0.0
  for m in means:
    stats = 0.5 * stats + m
  np.testing.assert_allclose(state.stats['n'], stats, rtol=1e-5)
  single = jax.random.normal(jax.random.fold_in(jax.random.fold_in(keys.root(0), 0), keys.UPDATES), ())
  assert abs(float(found['u/noise']) - float(single)) > 1e-3


def test_updates_that_go_through_the_parts_together_get_what_each_gets_alone():
  from latentgen.data import preprocess
  from latentgen.train import keys, step as stepping

  def loss(name, power):
    def value(params, ctx):
      mean = ctx.batch['image'].mean() * (1 + ctx.stats['n'])
      return (params[name] - mean) ** power, Aux({'mean': mean}, {'n': ctx.stats['n'] + power * mean})

    return Update(f'u{name}', (name,), value)

  both, raw = (loss('a', 2), loss('b', 4)), {'image': np.random.default_rng(0).integers(0, 256, (8, 2, 2, 1), dtype=np.uint8)}

  def after(*updates):
    chosen = stage(updates, load={g: 'earlier' for g in 'ab' if f'u{g}' not in {u.name for u in updates}})
    first = stepping.init_state(chosen, preprocess.make(), keys.root(0), raw)
    state, _, found = jax.jit(stepping.make_step(chosen, preprocess.make(), parts=4)[0])(first, stepping.healthy(), keys.root(0), raw)
    return state, found

  state, found = after(*both)
  for name, update in zip('ab', both, strict=True):
    alone, metrics = after(update)
    np.testing.assert_allclose(state.params[name], alone.params[name], rtol=1e-6)
    assert state.params[name] != {'a': 1.0, 'b': 2.0}[name]
    for key, value in metrics.items():
      np.testing.assert_allclose(found[key], value, rtol=1e-6)
  np.testing.assert_allclose(state.stats['n'], alone.stats['n'], rtol=1e-6)  # the last to change it


def test_a_gradient_above_the_norm_is_left_out():
  from latentgen import optim

  built = optim.build('config.stages.s.optim.u', 10, 'sgd', 0.1, skip_norm=1.0)
  state = built.init({'a': jnp.zeros(2)})
  for gradient, want in (([0.3, 0.4], [-0.03, -0.04]), ([3.0, 4.0], [0.0, 0.0]), ([0.6, 0.0], [-0.06, 0.0])):
    delta, state = built.update({'a': jnp.array(gradient)}, state, {'a': jnp.zeros(2)})
    np.testing.assert_allclose(delta['a'], want, rtol=1e-5)



# ---------------------------------------------------------------------------------------------- long runs


def endure(folder):
  """{step: (open files, bytes of memory)} of this process during 50,000 steps."""
  run = make_run(folder, stage((noisy(),), steps=50_000), log_every_steps=100, checkpoint_every_steps=2500)
  seen, write = {}, Metrics.write

  def watched(self, name, step, values, split='train'):
    write(self, name, step, values, split)
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
    seen[step] = len(os.listdir('/proc/self/fd')), pages * resource.getpagesize()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Metrics, 'write', watched)
    loop.train(run)
  return seen


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads what the process holds from /proc')
def test_fifty_thousand_steps_leave_memory_and_files_as_they_were(tmp_path):
  # In a process of its own: what other tests have freed comes and goes.
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
    seen = pool.submit(endure, tmp_path).result(timeout=500)
  early, late = (np.median([seen[s] for s in seen if low < s <= high], 0) for low, high in ((5000, 15_000), (40_000, 50_000)))
  assert abs(late[0] - early[0]) <= 2 and late[1] - early[1] < 5e6, (early, late)
