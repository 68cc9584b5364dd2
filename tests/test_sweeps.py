"""The runs of a sweep on one page: tables by hand, charts by what they hold, the command line."""

import base64
import json
import pathlib
import re
import types

import numpy as np
import pytest

from latentgen import main as command, sweeps
from latentgen.config import File
from latentgen.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
SETS = [{'model.scale': 1.0}, {'model.scale': 0.1}, {'model.scale': 'learned'}]
CHARTS = [
  {'x': 'model.scale', 'y': 'likelihood/elbo', 'log': 'x'},
  {'x': 'likelihood/rate', 'y': 'likelihood/elbo', 'label': 'model.scale', 'title': 'Rate & <elbo>'},
]


def result(value, unit='nats', stderr=0.5):
  return {'value': value, 'unit': unit, 'n': 250, 'stderr': stderr}


def place(workdir, name='beta', values=((-60.0, 2.0), (20.25, 14.0), (31.0, 16.0))):
  for i, (elbo, rate) in enumerate(values):
    folder = workdir / f'{name}-{i}'
    folder.mkdir(parents=True)
    results = {'likelihood/elbo': result(elbo), 'likelihood/rate': result(rate, stderr=None)}
    (folder / 'results.json').write_text(json.dumps(results))


def experiment(charts=CHARTS, doc='Fixed & learned <noise>.\n\nMore.', name='beta'):
  module = types.SimpleNamespace(__doc__=doc, SWEEP_CHARTS={name: charts})
  return File(pathlib.Path('experiments/some.py'), '', module)


def test_the_table_has_the_swept_keys_first(tmp_path):
  place(tmp_path)
  sweeps.collect(experiment(), 'beta', SETS, tmp_path)
  lines = (tmp_path / 'beta.md').read_text().splitlines()
  assert lines[:9] == [
    '# some, sweep beta',
    '',
    '## Runs',
    '',
    '| run | model.scale | likelihood/elbo | likelihood/rate |',
    '| --- | --- | --- | --- |',
    '| beta-0 | 1 | -60 | 2 |',
    '| beta-1 | 0.1 | 20.25 | 14 |',
    '| beta-2 | learned | 31 | 16 |',
  ]
  assert lines[10:] == [
    '## All results',
    '',
    '| result | unit | beta-0 | beta-1 | beta-2 |',
    '| --- | --- | --- | --- | --- |',
    '| likelihood/elbo | nats | -60 | 20.25 | 31 |',
    '| likelihood/rate | nats | 2 | 14 | 16 |',
  ]


def test_what_is_alike_in_all_runs_stands_apart(tmp_path):
  place(tmp_path)
  sweeps.collect(experiment(), 'beta', [{'train.accumulate': 20, **overrides} for overrides in SETS], tmp_path)
  text = (tmp_path / 'beta.md').read_text()
  assert '| run | model.scale | likelihood/elbo | likelihood/rate |\n' in text
  assert text.endswith('## Overridden alike in all runs\n\n| key | value |\n| --- | --- |\n| train.accumulate | 20 |\n')


def test_seeds_have_mean_and_spread(tmp_path):
  values = [(1.25, 2.0), (2.5, 2.0), (4.5, 5.0)]
  place(tmp_path, 'seeds', values)
  sweeps.collect(experiment(()), 'seeds', [{'seed': s} for s in range(3)], tmp_path)
  row = next(line for line in (tmp_path / 'seeds.md').read_text().splitlines() if line.startswith('| likelihood/elbo'))
  mean, deviation = (float(cell) for cell in row.strip('| ').split(' | ')[-2:])
  np.testing.assert_allclose([mean, deviation], [2.75, np.std([1.25, 2.5, 4.5], ddof=1)], atol=0.06)
  assert '<img' not in (tmp_path / 'seeds.html').read_text()


def test_settings_with_several_seeds_have_a_column_each(tmp_path):
  place(tmp_path, 'both', [(1.0, 2.0), (3.0, 2.0), (10.0, 2.0), (14.0, 2.0)])
  sets = [{'model.scale': scale, 'model.same': 1, 'seed': seed} for scale in (0.5, 'learned') for seed in (0, 1)]
  sweeps.collect(experiment(()), 'both', sets, tmp_path)
  lines = (tmp_path / 'both.md').read_text().split('## Runs')[0].splitlines()
  assert '| result | unit | 0.5 | learned |' in lines
  row = next(line for line in lines if line.startswith('| likelihood/elbo')).strip('| ').split(' | ')
  found = [float(number) for cell in row[2:] for number in cell.split(' ± ')]
  np.testing.assert_allclose(found, [2.0, 2**0.5, 12.0, 8**0.5], atol=0.06)


def test_the_page_loads_nothing_and_escapes_what_it_shows(tmp_path):
  place(tmp_path)
  sets = [*SETS[:2], {'model.scale': '<script>|$x$'}]
  sweeps.collect(experiment(), 'beta', sets, tmp_path)
  page = (tmp_path / 'beta.html').read_text()
  assert '<script' not in page and 'Fixed &amp; learned &lt;noise&gt;' in page and 'Rate &amp; &lt;elbo&gt;' in page
  assert not re.search(r'(src|href)="(?!data:)', page) and '@import' not in page and 'url(' not in page
  charts = re.findall(r'data:image/svg\+xml;base64,([^"]+)', page)
  assert len(charts) == 2 and all(base64.b64decode(c).lstrip().startswith(b'<?xml') for c in charts)
  assert '<script>\\|$x$' in (tmp_path / 'beta.md').read_text()
  before = (tmp_path / 'beta.html').read_bytes(), (tmp_path / 'beta.md').read_bytes()
  sweeps.collect(experiment(), 'beta', sets, tmp_path)
  assert before == ((tmp_path / 'beta.html').read_bytes(), (tmp_path / 'beta.md').read_bytes())


def drawn(monkeypatch, chart):
  """What a chart of the three runs holds: (lines with their marks, texts)."""
  seen = {}
  monkeypatch.setattr(sweeps.charts, 'svg', lambda figure: seen.update(ax=figure.axes[0]) or b'')
  members = [
    sweeps.Member(f'beta-{i}', s, {'likelihood/elbo': result(e), 'likelihood/rate': result(r)})
    for i, (s, e, r) in enumerate(zip(SETS, (-60.0, 20.0, 31.0), (2.0, 14.0, 16.0), strict=True))
  ]
  sweeps.draw(chart, members, ['model.scale'])
  ax = seen['ax']
  return [np.transpose(line.get_data()).tolist() for line in ax.lines], [t.get_text() for t in ax.texts], ax


def test_points_of_a_sweep_that_overrides_nothing_carry_the_names_of_the_runs(monkeypatch):
  seen = {}
  monkeypatch.setattr(sweeps.charts, 'svg', lambda figure: seen.update(ax=figure.axes[0]) or b'')
  results = {'likelihood/elbo': result(1.0), 'likelihood/rate': result(2.0)}
  members = [sweeps.Member(f'none-{i}', {}, results) for i in range(2)]
  sweeps.draw({'x': 'likelihood/rate', 'y': 'likelihood/elbo'}, members, sweeps.swept([{}, {}]))
  assert [(line.get_label(), line.get_xydata().tolist()) for line in seen['ax'].lines] == [
    ('none-0', [[2.0, 1.0]]), ('none-1', [[2.0, 1.0]])
  ]  # fmt: skip


def test_a_word_among_numbers_is_a_line_across(monkeypatch):
  lines, texts, ax = drawn(monkeypatch, CHARTS[0])
  assert lines[0] == [[0.1, 20.0], [1.0, -60.0]] and texts == []  # in the order of the key
  assert [y for _, y in lines[1]] == [31.0, 31.0] and ax.lines[1].get_label() == 'learned'
  assert ax.get_xscale() == 'log' and ax.get_yscale() == 'linear'


def test_results_against_each_other_carry_their_labels(monkeypatch):
  lines, texts, _ = drawn(monkeypatch, CHARTS[1])
  assert lines == [[[14.0, 20.0], [2.0, -60.0]], [[16.0, 31.0]]] and texts == ['0.1', '1']


@pytest.mark.parametrize('chart, message', [
  ({'x': 'a'}, 'without x and y'),
  ({'x': 'a', 'y': 'b', 'lable': 'c'}, "'lable'; did you mean 'label'"),
  ({'x': 'a', 'y': 'b', 'label': 'model.scal'}, "label 'model.scal' is not swept; did you mean 'model.scale'"),
])  # fmt: skip
def test_charts_that_cannot_be(chart, message):
  with pytest.raises(UserError) as error:
    sweeps.check(experiment([chart]), 'beta', SETS)
  assert message in str(error.value).replace('"', "'") and '\n' not in str(error.value)


def test_a_missing_or_damaged_run_is_named_and_nothing_written(tmp_path):
  place(tmp_path)
  (tmp_path / 'beta-1' / 'results.json').write_text('{')
  for hint in ('cannot be read', 'train it first'):
    with pytest.raises(UserError, match=f"run 1 of sweep 'beta' has no results.*beta-1.*{hint}"):
      sweeps.collect(experiment(), 'beta', SETS, tmp_path)
    (tmp_path / 'beta-1' / 'results.json').unlink(missing_ok=True)
  assert not list(tmp_path.glob('beta.*'))


SPEC = f'--config={ROOT}/experiments/learned_variance.py:'


@pytest.mark.parametrize('args, message', [
  (['--mode=collect'], '--mode=collect needs --sweep=NAME'),
  (['--mode=collect', '--sweep=beta', '--sweep_index=0'], 'leave --sweep_index out'),
  (['--mode=collect', '--sweep=beta'], "run 0 of sweep 'beta' has no results"),
])  # fmt: skip
def test_collect_on_the_command_line(tmp_path, args, message):
  with pytest.raises(UserError, match=message):
    command.main([f'{SPEC}beta', f'--workdir={tmp_path}', *args])


@pytest.mark.parametrize('variant, name', [('beta', 'beta'), ('', 'sigma')])
def test_what_the_experiment_sweeps_and_charts_is_accepted(variant, name):
  from latentgen import assembly, config as configs, sections

  file, config = configs.load(SPEC.removeprefix('--config=') + variant)
  scales, sets = [], file.module.sweep(name)
  for overrides in sets:
    one = config.copy_and_resolve_references()
    configs.override(one, overrides)
    (stage,) = assembly.build_recipe(sections.plain(one), (8, 8, 1))
    scales.append(stage.method.net.scale)
  wanted = {'beta': [*file.module.FIXED, 'learned'], 'sigma': ['learned', 'image', 'pixel', 'analytic']}
  assert scales == wanted[name] and len(sweeps.check(file, name, sets)) > 1


@pytest.mark.slow
def test_a_sweep_ends_with_its_page(tmp_path):
  text = (
    f'import sys\nsys.path.insert(0, {str(ROOT / "experiments")!r})\nfrom learned_variance import get_config, VARIANTS\n'
    "SWEEP_CHARTS = {'lr': [dict(x='stages.vae.optim.vae.learning_rate', y='likelihood/elbo')]}\n"
    "def sweep(name):\n  return {'lr': [{'stages.vae.optim.vae.learning_rate': r} for r in (1e-3, 1e-2)]}[name]\n"
  )
  (tmp_path / 'mine.py').write_text(text)
  args = [f'--config={tmp_path}/mine.py:smoke', f'--workdir={tmp_path}/runs', "--config.evaluate.tasks=('likelihood',)"]
  command.main([*args, '--sweep=lr', '--sweep_index=0'])
  assert not (tmp_path / 'runs' / 'lr.html').exists()
  command.main([*args, '--sweep=lr'])
  table = (tmp_path / 'runs' / 'lr.md').read_text()
  for i in range(2):
    elbo = json.loads((tmp_path / 'runs' / f'lr-{i}' / 'results.json').read_text())['likelihood/elbo']['value']
    assert f'| lr-{i} |' in table and f'{elbo:.1f}'[:4] in table
  page = (tmp_path / 'runs' / 'lr.html').read_bytes()
  command.main([*args, '--sweep=lr', '--mode=collect'])
  assert (tmp_path / 'runs' / 'lr.html').read_bytes() == page
