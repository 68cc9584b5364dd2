"""What a report and a sweep find in their runs, and the charts that an experiment names: read, or refused in one line."""

import json
import pathlib
import random
import types

from fuzzing import VALUES, WORDS, mutated, runs, survives

from latentgen import run as modes, sweeps
from latentgen.config import File
from latentgen.errors import UserError
from latentgen.evaluate import report


RESULTS = {'likelihood/elbo': {'value': -60.0, 'unit': 'nats', 'n': 250, 'stderr': 0.5},
  'rate': {'value': 2.0, 'unit': 'nats', 'n': 250, 'stderr': None}}
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
    chart = {rng.choice(('x', 'y', 'label', 'title', 'log')): rng.choice(VALUES + WORDS) for _ in range(3)}
    chart |= rng.choice(({}, {'x': 'seed', 'y': 'rate'}))
    charts = rng.choice(([chart], [chart], chart, rng.choice(VALUES)))
    found = survives(lambda charts=charts: sweeps.check(experiment(charts), 'lr', SETS), charts)
    assert isinstance(found, UserError) or all(set(c) <= set(sweeps.CHART_KEYS) for c in found)


@runs(20, 100)
def test_metrics_for_a_report(tmp_path, count):
  rng, path = random.Random(7), tmp_path / 'metrics.jsonl'
  rows = [{'step': s, 'stage': 'vae', 'split': 'train', 'loss': 0.5} for s in range(4)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  assert modes._rows(path) == rows
  for _ in range(count):
    bad = mutated(rng, rows[2]).replace(b'\n', b' ')
    path.write_bytes(b'\n'.join([json.dumps(rows[0]).encode(), bad, json.dumps(rows[1]).encode()]))
    found = survives(lambda: modes._rows(path), bad)
    assert [r for r in found if r in rows[:2]] == rows[:2] and len(found) <= 3
    assert 'vae' in survives(lambda found=found: report.curves(found), bad)
