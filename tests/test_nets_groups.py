"""Splitting trees by the convention on names."""

import pytest

from latentgen import nets

TREE = {
  'encoder': {'stem': 1, 'stack_0': {'cell': 2}},
  'stack_0': {'posterior': {'sampler': 3}, 'prior': 4, 'deep': {'posterior': 5, 'rest': 6}},
  'posterior': {'encoder_like': 7},
  'constant': 8,
  'my_encoder': {'x': 9},
}


def leaves(tree):
  return sorted(v for x in tree.values() for v in (leaves(x) if isinstance(x, dict) else [x]))


def test_groups_split_on_exact_components():
  grouped = nets.groups(TREE)
  assert set(grouped) == {'encoder', 'decoder'}
  assert leaves(grouped['encoder']) == [1, 2, 3, 5, 7]
  assert leaves(grouped['decoder']) == [4, 6, 8, 9]
  assert grouped['encoder']['stack_0'] == {'posterior': {'sampler': 3}, 'deep': {'posterior': 5}}


def test_ungroup_inverts():
  assert nets.ungroup(nets.groups(TREE)) == TREE
  assert nets.groups({}) == {'encoder': {}, 'decoder': {}}
  grouped = nets.groups(TREE)
  nets.ungroup(grouped)['stack_0']['prior'] = 0
  assert grouped['decoder']['stack_0']['prior'] == 4


def test_ungroup_refuses_two_owners():
  with pytest.raises(ValueError, match='stack/a'):
    nets.ungroup({'encoder': {'stack': {'a': 1}}, 'decoder': {'stack': {'a': 2}}})
