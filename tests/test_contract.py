"""What every experiment must keep, on its smoke variant: a new file in experiments/ is tested by being there."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentgen import config as configs
from latentgen.train import check, checkpoint, keys, loop, step as stepping

EXPERIMENTS = sorted((pathlib.Path(__file__).parents[1] / 'experiments').glob('*.py'))


@functools.cache
def build(path):
  file, config = configs.load(f'{path}:smoke')
  return file, config, configs.build(config, pathlib.Path('unused'), mesh=_mesh())


def _mesh():
  from latentgen.train import sharding

  return sharding.make_mesh(devices=jax.devices()[:1])


def cases():
  for path in EXPERIMENTS:
    for stage in configs.load(f'{path}:smoke')[1].recipe:
      yield pytest.param(path, stage, id=f'{path.stem}-{stage}')


CASES = list(cases())


@functools.cache
def two_steps(path, name):
  """(stage, states after 0, 1 and 2 steps, metrics of each step, number of traces, the step, the data iterator after 1)."""
  run = build(path)[2]
  stage = next(s for s in run.recipe if s.name == name)
  function, _ = stepping.make_step(stage, run.preprocess)
  traces = []

  def counted(*args):
    traces.append(1)
    return function(*args)

  step = jax.jit(counted)
  batches = run.iterator(stage)
  state = jax.jit(functools.partial(stepping.init_state, stage, run.preprocess))(run.root, next(run.iterator(stage)))
  states, found, health = [state], [], stepping.healthy()
  for i in range(2):
    position = batches.get_state()
    state, health, metrics = step(state, health, keys.root(0), next(batches))
    states.append(state)
    found.append(jax.device_get(metrics))
  return stage, states, found, len(traces), step, position


@pytest.mark.slow
@pytest.mark.parametrize('path, name', CASES)
def test_two_steps_are_finite_and_traced_once(path, name):
  _, _, metrics, traces, *_ = two_steps(path, name)
  assert all(np.isfinite(v) for found in metrics for v in found.values())
  assert traces == 1


@pytest.mark.slow
@pytest.mark.parametrize('path, name', CASES)
def test_a_step_after_a_checkpoint_is_the_step_without_it_to_the_bit(path, name, tmp_path):
  """Parameters, statistics, chains, every optimiser and average come back, and the data go on where they were."""
  run = build(path)[2]
  stage, states, _, _, step, position = two_steps(path, name)
  before = run.iterator(stage)
  before.set_state(position)
  store = checkpoint.Checkpoints(tmp_path)
  store.save(1, states[1], before)
  store.close()
  again = run.iterator(stage)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), states[1])
  restored = checkpoint.Checkpoints(tmp_path).restore(1, shapes, again)
  state, _, _ = step(restored, stepping.healthy(), keys.root(0), next(again))
  jax.tree.map(np.testing.assert_array_equal, state, states[2])


@pytest.mark.slow
@pytest.mark.parametrize('path, name', CASES)
def test_named_groups_move_and_no_others(path, name):
  stage, states, *_ = two_steps(path, name)
  moving = {g for u in stage.method.updates() for g in u.wrt}
  for group in states[0].params:
    same = jax.tree.map(lambda a, b: bool((a == b).all()), states[0].params[group], states[2].params[group])
    if group in moving:
      assert not all(jax.tree.leaves(same)), f'{group} did not move'
    else:
      assert all(jax.tree.leaves(same)), f'{group} is frozen and moved'


@pytest.mark.slow
@pytest.mark.parametrize('path, name', CASES)
def test_samples_have_the_images_shape_and_range(path, name):
  run = build(path)[2]
  stage, states, *_ = two_steps(path, name)
  variables = stepping.evaluation_variables(states[2])
  for sampler in stage.method.samplers:
    images = jax.jit(lambda v, key, s=sampler: stage.method.sample(v, key, 3, s))(variables, jax.random.key(1))
    assert images.shape == (3, *run.data['train'].shape) and np.isfinite(images).all()
    if run.data['train'].take([0])['image'].dtype == np.uint8:
      assert 0 <= float(images.min()) and float(images.max()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_every_variant_builds_a_recipe_without_allocating(path):
  file, config, run = build(path)
  for variant in ('', *file.module.VARIANTS):
    plain = configs.plain(configs.load(f'{path}:{variant}')[1])
    recipe = configs.build_recipe(plain, plain.get('image_shape', run.data['train'].shape))
    check.check_names(recipe)
    assert [s.name for s in recipe] == list(plain['recipe'])


@pytest.mark.slow
def test_frozen_statistics_are_handed_over(tmp_path):
  """Stage 2 sees the BatchNorm statistics that stage 1 ended with, and leaves them alone."""
  path = next(p for p in EXPERIMENTS if p.stem == 'nvae_nce')
  _, config = configs.load(f'{path}:smoke')
  run = configs.build(config, tmp_path, mesh=_mesh())
  loop.train(run)
  one, two = (loop.load_variables(run, stage) for stage in run.recipe)
  for group in ('encoder', 'decoder'):
    jax.tree.map(np.testing.assert_array_equal, one['params'][group], two['params'][group])
    jax.tree.map(np.testing.assert_array_equal, one['stats'][group], two['stats'][group])
  assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(one['stats']['decoder']))
