"""Estimates: traffic read from programs written by hand, times by hand, a small NVAE on two emulated devices."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from quick import environment

from latentgen.errors import UserError
from latentgen.train import collectives, cost
from latentgen.train.collectives import Collective
from latentgen.train.hardware import HARDWARE, Hardware

HERE = pathlib.Path(__file__).parent

PROGRAM = """\
HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %all-gather.1 = f32[4,10]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[2,4], dimensions={0}
  ROOT %t = (s32[], f32[10]{0}) tuple(%i, %y)
}

%condition (p: (s32[], f32[10])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[])) -> (s32[]) {
  %while.1 = (s32[], f32[10]{0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce.2 = (bf16[5]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), replica_groups={{0,4},{1,5}}, to_apply=%sum, \
metadata={op_name="jit(step)/metric"}
}

%cheap (p: f32[10]) -> f32[10] {
  ROOT %all-reduce.3 = f32[1]{0} all-reduce(%p), replica_groups={}, to_apply=%sum
}

%dear (p: f32[10]) -> f32[10] {
  ROOT %reduce-scatter.1 = f32[10]{0} reduce-scatter(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, to_apply=%sum
}

ENTRY %main (p: f32[10]) -> f32[10] {
  %while.2 = (s32[]) while(%t), condition=%condition, body=%outer, backend_config={"known_trip_count":{"n":"7"}}
  %conditional.1 = f32[10]{0} conditional(%i, %p, %p), branch_computations={%cheap, %dear}
  %all-reduce.4 = f32[6]{0} all-reduce(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%sum
  %all-reduce.5 = f32[6]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%sum
  %collective-permute.1 = f32[6]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_of_a_program_written_by_hand():
  found = collectives.find(PROGRAM, 8)
  assert sorted((c.kind, c.payload, c.group, c.times) for c in found) == [
    ('all-gather', 4 * 10 * 4, (0, 1, 2, 3), 21),  # in two loops
    ('all-reduce', 6 * 4, (0, 4), 1),
    ('all-reduce', 5 * 2 + 6 * 4, (0, 4), 7),
    ('collective-permute', 6 * 4, (0, 1), 1),
    ('reduce-scatter', 2 * 10 * 4, (0, 4), 1),  # the dearer branch; one device in a group of its own sends nothing
  ]
  assert all(c.counted for c in found) and {c.source for c in found} == {'', 'jit(step)/metric'}


def test_a_loop_of_unknown_length_counts_once_and_says_so():
  found = collectives.find(PROGRAM.replace('"n":"7"', '"m":"7"'), 8)
  assert [(c.times, c.counted) for c in found if c.kind == 'all-gather'] == [(3, False)]
  assert [c.counted for c in found if c.kind == 'reduce-scatter'] == [True]


@pytest.mark.parametrize(
  'groups, first',
  [
    ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 1)),  # of a (4, 2) mesh, columns first
    ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", (0, 2, 4, 6)),
    ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", (3, 1)),
    ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'a','b'}", (3, 1, 2, 0)),
  ],
)
def test_devices_in_another_order_than_they_are_counted(groups, first):
  line = f'  %x = f32[6]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%sum'
  found = collectives.find('ENTRY %main (p: f32[6]) -> f32[6] {\n' + line + '\n}', 8)
  assert [c.group for c in found] == [first]


def test_a_notation_of_groups_that_is_not_known_is_an_error():
  with pytest.raises(ValueError, match='notation'):
    collectives.find(PROGRAM.replace("{'axis_0'}", "{'axis_1':(2)2}"), 8)


RINGS = [('all-reduce', 1.5), ('all-gather', 0.75), ('reduce-scatter', 0.75), ('all-to-all', 0.75)]


@pytest.mark.parametrize('kind, factor', RINGS)
def test_bytes_that_a_ring_of_four_sends(kind, factor):
  assert Collective(kind, 1000, (0, 1, 2, 3), 1, '', True).sent == 1000 * factor


def test_times_within_and_across_servers():
  machine = Hardware('toy', {'float32': 1e3, 'bfloat16': 4e3}, 1e9, near=100.0, domain=4, far=10.0, source='')
  reduce = lambda *group, kind='all-reduce': [Collective(kind, 800, group, 2, '', True)]
  seconds = machine.communication_seconds
  assert seconds(reduce(0, 1, 2, 3)) == pytest.approx(2 * 2 * 600 / 100)
  assert seconds(reduce(0, 4)) == pytest.approx(2 * 2 * 400 / 10)
  # Eight devices on two servers: 3/4 of the tensor within, then a quarter of it, halved, across; there and back.
  assert seconds(reduce(*range(8))) == pytest.approx(2 * 2 * (600 / 100 + 100 / 10))
  assert seconds(reduce(*range(8), kind='all-gather')) == pytest.approx(2 * (600 / 100 + 100 / 10))
  assert seconds(reduce(*range(8), kind='all-to-all')) == pytest.approx(2 * (300 / 100 + 400 / 10))
  assert seconds(reduce(3, 4, kind='collective-permute')) == pytest.approx(2 * 800 / 10)
  assert machine.compute_seconds({'float32': 500, 'bfloat16': 500, 'float64': 10}) == pytest.approx(0.5 + 0.125 + 0.01)


def test_efficiency_is_the_share_of_compute():
  machine = Hardware('toy', {'float32': 1e3}, 1e9, near=100.0, domain=4, far=10.0, source='')
  moved = (Collective('all-gather', 400, (0, 1), 1, '', True),)  # 2 s
  step = cost.Cost('s', {'data': 2, 'fsdp': 1}, 'cpu', 4, {}, {}, {'float32': 2000}, moved)  # 1 s on each of two
  assert step.seconds(machine) == pytest.approx((1.0, 2.0))
  assert step.efficiency(machine) == pytest.approx((1 / 3, 1 / 2))


def test_hardware_is_named_once_and_says_where_its_figures_are_from():
  assert [h.name for h in HARDWARE] == ['H200 SXM', 'TPU v5e', 'TPU v5p']
  for h in HARDWARE:
    assert 'bfloat16' in h.peak and h.peak['float32'] <= h.peak['bfloat16'] and h.near > h.far and h.source


BAD = [(0, 1, 'data'), (-2, 1, 'data'), (1, 0, 'fsdp'), (10**6, 1, 'data'), (2**10, 2**10, '')]


@pytest.mark.parametrize('data, fsdp, key', BAD)
def test_meshes_that_cannot_be_are_refused(data, fsdp, key):
  with pytest.raises(UserError, match=f'^config.mesh.?{key}'):
    cost.make_mesh(data, fsdp)


def test_flops_count_loops_branches_and_types():
  def step(x, w, kernel, image):
    x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)
    y = jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)
    z = jax.lax.conv_general_dilated(image, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    return y, z

  f32, bf16 = jnp.zeros((2, 8)), jnp.zeros((1, 4, 4, 3), jnp.bfloat16)
  jaxpr = jax.make_jaxpr(step)(f32, jnp.zeros((8, 8)), jnp.zeros((3, 3, 3, 7), jnp.bfloat16), bf16).jaxpr
  assert cost.flops(jaxpr) == {'float32': (5 + 2) * 2 * 2 * 8 * 8, 'bfloat16': 2 * 16 * 7 * 27}


# ---------------------------------------------------------------------------------------------- a small NVAE


def traffic(experiment, data, fsdp):
  env = environment(PYTHONPATH=str(HERE.parent / 'src'), JAX_PLATFORMS='cpu')
  command = [sys.executable, str(HERE / 'traffic.py'), experiment, str(data), str(fsdp)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


@pytest.fixture(scope='module')
def split_data():
  return traffic('nvae.py', 2, 1)


@pytest.fixture(scope='module')
def split_parameters():
  return traffic('nvae.py', 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['split_data', 'split_parameters'])
def test_bytes_on_each_device_are_those_of_the_compiled_step(mesh, request):
  found = request.getfixturevalue(mesh)
  assert sum(found['memory'].values()) == pytest.approx(found['compiled'], rel=0.1)


@pytest.mark.slow
def test_data_parallel_step_reduces_gradients_and_statistics_and_moves_nothing_else(split_data):
  moved = split_data['moved']
  assert {c['kind'] for c in moved} == {'all-reduce'} and all(c['counted'] and c['group'] == [0, 1] for c in moved)
  total = sum(c['payload'] * c['times'] for c in moved)
  gradients = 4 * split_data['parameters']
  channels = split_data['statistics'] // 2  # a mean and a variance
  # BatchNorm reduces two moments forward and two backward; metrics and the balance of the KL terms are scalars.
  assert gradients <= total <= gradients + 4 * 4 * channels + 256


@pytest.mark.slow
def test_more_devices_move_the_same_tensors():
  two, four = ([{**c, 'group': len(c['group'])} for c in traffic('vae_nce.py', n, 1)['moved']] for n in (2, 4))
  assert two and [{**c, 'group': 4} for c in two] == four


@pytest.mark.slow
def test_split_parameters_are_gathered_and_activations_stay(split_parameters):
  moved = split_parameters['moved']
  assert {c['kind'] for c in moved} <= {'all-reduce', 'all-gather', 'reduce-scatter'}
  assert max(c['payload'] for c in moved if c['kind'] == 'all-gather') <= 4 * split_parameters['largest']


@pytest.mark.slow
def test_components_that_start_anew_are_drawn_without_traffic_in_the_loop():
  found = traffic('csrae.py', 4, 1)
  assert all(c['times'] == 1 and c['counted'] for c in found['moved'])
  # The gradient of every parameter is reduced: images are still split where the network sees them.
  assert sum(c['payload'] for c in found['moved'] if c['kind'] == 'all-reduce') >= 4 * found['parameters']
