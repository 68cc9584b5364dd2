"""What every experiment must keep, on its smoke variant: a new file in experiments/ is tested by being there."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentgen import assembly, config as configs, types
from latentgen.train import check, checkpoint, keys, loop, sharding, step as stepping

EXPERIMENTS = sorted((pathlib.Path(__file__).parents[1] / 'experiments').glob('*.py'))

# Seconds of compilation are what these tests cost: two steps need no optimised code.
QUICK = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)

def build(path):
  file, config = configs.load(f'{path}:smoke')
  return file, config, assembly.build(config, pathlib.Path('unused'), mesh=sharding.make_mesh(devices=jax.devices()[:1]))


def cases():
  for path in EXPERIMENTS:
    for stage in configs.load(f'{path}:smoke')[1].recipe:
      yield pytest.param((path, stage), id=f'{path.stem}-{stage}')


@dataclasses.dataclass
class Steps:
  """Two steps of a stage: the states after 0, 1 and 2 of them, the metrics of each, and where the data were in between."""

  run: loop.Run
  stage: types.Stage
  states: list
  metrics: list
  traces: int
  step: Callable
  position: bytes


@pytest.fixture(scope='module', params=cases())
def steps(request):
  """One stage at a time: compiled programs hold many memory maps, of which a process may have some ten thousand."""
  path, name = request.param
  run = build(path)[2]
  stage = next(s for s in run.recipe if s.name == name)
  function, _ = stepping.make_step(stage, run.preprocess)
  traces = []

  def counted(*args):
    traces.append(1)
    return function(*args)

  step = jax.jit(counted, compiler_options=QUICK)
  batches = run.iterator(stage)
  initial = jax.jit(functools.partial(stepping.init_state, stage, run.preprocess), compiler_options=QUICK)
  place = functools.partial(jax.device_put, device=jax.devices()[0])  # as a restored state is: nothing compiles twice
  state = place(initial(run.root, next(run.iterator(stage))))
  states, found, health = [state], [], place(stepping.healthy())
  for _ in range(2):
    position = batches.get_state()
    state, health, metrics = step(state, health, place(keys.root(0)), place(next(batches)))
    states.append(state)
    found.append(jax.device_get(metrics))
  yield Steps(run, stage, states, found, len(traces), step, position)
  jax.clear_caches()


@pytest.mark.slow
def test_two_steps_are_finite_and_traced_once(steps):
  assert all(np.isfinite(v) for found in steps.metrics for v in found.values())
  assert steps.traces == 1


@pytest.mark.slow
def test_a_step_after_a_checkpoint_is_the_step_without_it_to_the_bit(steps, tmp_path):
  """Parameters, statistics, chains, every optimiser and average come back, and the data go on where they were."""
  _, one, two = steps.states
  before = steps.run.iterator(steps.stage)
  before.set_state(steps.position)
  store = checkpoint.Checkpoints(tmp_path)
  store.save(1, one, before)
  store.close()
  again = steps.run.iterator(steps.stage)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), one)
  restored = checkpoint.Checkpoints(tmp_path).restore(1, shapes, again)
  state, _, _ = steps.step(restored, *jax.device_put((stepping.healthy(), keys.root(0), next(again)), jax.devices()[0]))
  jax.tree.map(np.testing.assert_array_equal, state, two)


@pytest.mark.slow
def test_named_groups_move_and_no_others(steps):
  initial, _, last = steps.states
  moving = {g for u in steps.stage.method.updates() for g in u.wrt}
  for group in initial.params:
    same = jax.tree.map(lambda a, b: bool((a == b).all()), initial.params[group], last.params[group])
    if group in moving:
      assert not all(jax.tree.leaves(same)), f'{group} did not move'
    else:
      assert all(jax.tree.leaves(same)), f'{group} is frozen and moved'


@pytest.mark.slow
def test_samples_have_the_images_shape_and_range(steps):
  method, data = steps.stage.method, steps.run.data['train']
  variables = stepping.evaluation_variables(steps.states[2])
  for sampler in method.samplers:
    sample = jax.jit(lambda v, key, s=sampler: method.sample(v, key, 3, s), compiler_options=QUICK)
    images = sample(variables, jax.random.key(1))
    assert images.shape == (3, *data.shape) and np.isfinite(images).all()
    if data.take([0])['image'].dtype == np.uint8:
      assert 0 <= float(images.min()) and float(images.max()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_every_variant_builds_a_recipe_without_files_or_allocating(path):
  """As --mode=estimate does: data that are neither embedded nor drawn are stood for by `config.image_shape`."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for variant in ('', *configs.load(str(path))[0].module.VARIANTS):
    config = configs.load(f'{path}:{variant}')[1]
    assert config.data.name in ('digits', 'toy') or 'image_shape' in config, variant
    run = assembly.build(config, pathlib.Path('unused'), mesh, shapes_only=True)
    check.check_names(run.recipe)
    assert [s.name for s in run.recipe] == list(config.recipe)


@pytest.mark.slow
def test_frozen_statistics_are_handed_over(tmp_path):
  """Stage 2 sees the BatchNorm statistics that stage 1 ended with, and leaves them alone."""
  path = next(p for p in EXPERIMENTS if p.stem == 'nvae_nce')
  _, config = configs.load(f'{path}:smoke')
  run = assembly.build(config, tmp_path, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
  loop.train(run)
  one, two = (loop.load_variables(run, stage) for stage in run.recipe)
  for group in ('encoder', 'decoder'):
    jax.tree.map(np.testing.assert_array_equal, one['params'][group], two['params'][group])
    jax.tree.map(np.testing.assert_array_equal, one['stats'][group], two['stats'][group])
  assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(one['stats']['decoder']))
