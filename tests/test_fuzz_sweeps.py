"""What a sweep finds in its runs, and the charts that an experiment names: read, or refused in one line."""

import json
import pathlib
import random
import types

from fuzzing import VALUES, WORDS, damage, little_memory, survives
import pytest

from latentgen import sweeps
from latentgen.config import File
from latentgen.errors import UserError


def runs(few: int, many: int):
  """The same test short, and long."""
  return pytest.mark.parametrize('count', [few, pytest.param(many, marks=pytest.mark.slow)])


RESULTS = {'likelihood/elbo': {'value': -60.0, 'unit': 'nats', 'n': 250, 'stderr': 0.5}, 'rate': {'value': 2.0, 'unit': 'nats', 'n': 250, 'stderr': None}}
ALIEN = ('', 'null', '3', '[]', '{}', '"x"', 'true', 'NaN', '[1, 2]', '{"stage": 3}', '{"step": 1}', '{"stage": "vae", "step": "x"}', '{"stage": [], "step": 1}',
         '{"stage": {}, "step": null}', '{"stage": "vae", "step": NaN}', '{"stage": "other", "step": 1}', '{"step": 1, "stage": "va', '[' * 100_000,
         '{"a":' * 50_000, '9' * 5000, '\x00', '\ud7ff', '<html>', '{"experiment": 1, "variant": 2, "config": 3}',
         '{"experiment": "vae_nce", "variant": "smoke", "config": []}', '{"experiment": "vae_nce", "variant": "smoke", "config": null}',
         '{"experiment": {}, "variant": [], "config": {}}', '{"first": "x"}', '{"first": [1]}', '{"vae": NaN}')  # fmt: skip


def mutated(rng: random.Random, good) -> bytes:
  """JSON with bytes damaged, a value changed, or something else altogether."""
  what = rng.random()
  if what < 0.5:
    return damage(rng, json.dumps(good).encode(), [a.encode() for a in ALIEN if a])
  if what < 0.7:
    return rng.choice(ALIEN).encode()
  found = json.loads(json.dumps(good))
  node = found
  while True:
    keys = list(node) if isinstance(node, dict) else range(len(node))
    key = rng.choice(keys)
    if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.6:
      node = node[key]
      continue
    value = rng.choice(VALUES + WORDS)
    node[key] = value if type(value) in (int, float, str, bool, type(None)) else {'x': [1]}
    return json.dumps(found).encode()


def experiment(charts):
  module = types.SimpleNamespace(__doc__='x', SWEEP_CHARTS={'lr': charts})
  return File(pathlib.Path('experiments/some.py'), '', module)


SETS = [{'seed': 0}, {'seed': 1}]


@runs(30, 1500)
def test_results_of_a_sweep(tmp_path, count):
  rng = random.Random(5)
  for i in range(2):
    (tmp_path / f'lr-{i}').mkdir()
    (tmp_path / f'lr-{i}' / 'results.json').write_text(json.dumps(RESULTS))
  for _ in range(count):
    bad = mutated(rng, RESULTS)
    (tmp_path / 'lr-1' / 'results.json').write_bytes(bad)
    found = survives(lambda: sweeps.collect(experiment([]), 'lr', SETS, tmp_path), bad)
    if isinstance(found, UserError):
      assert 'lr-1' in str(found) and not list(tmp_path.glob('lr.*'))
    for path in tmp_path.glob('lr.*'):
      path.unlink()


@runs(200, 1000)
def test_charts_of_a_sweep(count):
  rng = random.Random(6)
  for _ in range(count):
    chart = {rng.choice(('x', 'y', 'label', 'title', 'log')): rng.choice(VALUES + WORDS) for _ in range(3)} | rng.choice(({}, {'x': 'seed', 'y': 'rate'}))
    charts = rng.choice(([chart], [chart], chart, rng.choice(VALUES)))
    found = survives(lambda charts=charts: sweeps.check(experiment(charts), 'lr', SETS), charts)
    assert isinstance(found, UserError) or all(set(c) <= set(sweeps.CHART_KEYS) for c in found)
