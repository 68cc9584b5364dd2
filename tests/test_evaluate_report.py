"""The files that an evaluation leaves behind."""

import ast
import base64
import io
import json
import math
import pathlib
import re

import numpy as np
from PIL import Image
import pytest

from latentgen.evaluate import Picture, Result, charts, report, write_pictures, write_results
from latentgen.files import TEMPORARY

EXPERIMENTS = sorted((pathlib.Path(__file__).parents[1] / 'experiments').glob('*.py'))

HEADER = """A title of <b>some</b> experiment.

Paper      Somebody, 2021.

Deviations from the paper:
  critic & co   here   why
"""


KEPT = {'model.name': '<script>alert(2)</script>'}


def inputs(folder):
  rng = np.random.default_rng(0)
  images = {
    'samples_base': Picture(rng.integers(0, 255, (20, 30)).astype(np.uint8), 'Samples', 'second'),
    'before_after': Picture(np.full((20, 30, 3), 9, np.uint8), 'Before <script>alert(1)</script>', 'first'),
  }
  rows = [
    {'step': s, 'stage': stage, 'split': split, f'{stage}/loss': 1 / s, f'{stage}/kl/level0/group1': float(s)}
    for stage in ('vae', 'nce')
    for s in (1, 2, 3)
    for split in ('train', 'valid')
  ]
  return dict(
    config={'config': {'model': {'name': '<script>alert(2)</script>'}}, 'seed': 3, 'mesh': {'data': 1}, 'versions': {}},
    header=HEADER,
    results={
      'likelihood/iwae': Result(-78.0123, 'nats', 10000, 0.0345),
      'kl/level0/group10': Result(1.0, 'nats', 5),
      'kl/level0/group9': Result(2.0, 'nats', 5),
      '<script>alert(3)</script>': Result(1.5, 'x', 1),
    },
    pictures=write_pictures(folder / 'samples' / 'nce', images),
    metrics=rows + [{'step': 4, 'stage': 'vae', 'split': 'train', 'vae/loss': math.nan}],
    paper=[
      {'name': 'log-likelihood', 'paper': -78.1, 'ours': 'likelihood/iwae', 'note': 'K = 1000'},
      {'name': 'FID', 'paper': 24.08, 'ours': 'nothing/here', 'note': None},
      {'name': 'row of this run', 'paper': 1.5, 'when': KEPT},
      {'name': 'row of another run', 'paper': 2.5, 'when': {**KEPT, 'model.depth': 3}},
    ],
    command="python -m latentgen.main '--config.a=<x>'",
  )


def page(folder):
  return report.write(folder, **inputs(folder)).read_text()


def test_report_needs_nothing_but_itself(tmp_path):
  text = page(tmp_path)
  assert 'http://' not in text and 'https://' not in text
  assert '<script' not in text and '<link' not in text and '@import' not in text and 'url(' not in text
  sources = re.findall(r'src="([^"]*)"', text)
  assert len(sources) == 2 + 4 and all(s.startswith('data:image/') for s in sources)
  assert str(tmp_path) not in text


def test_report_escapes_and_says_what_it_must(tmp_path):
  text = page(tmp_path)
  for i in (1, 2, 3):
    assert f'&lt;script&gt;alert({i})&lt;/script&gt;' in text
  assert 'A title of &lt;b&gt;some&lt;/b&gt; experiment</h1>' in text
  assert '-78.012' in text and '0.035' in text and '10,000' in text and '-78.1' in text
  assert 'not measured' in text and 'K = 1000' in text and 'critic &amp; co' in text
  assert 'row of this run' in text and 'row of another run' not in text
  assert '--config.a=&lt;x&gt;' in text
  assert text.index('Before &lt;script') < text.index('Beside the paper') < text.index('Samples.')  # before/after first
  assert text.index('>vae<') < text.index('>nce<')  # stages in the order they ran
  assert text.index('group9') < text.index('group10')


def test_report_is_the_same_to_the_byte(tmp_path):
  (tmp_path / 'a' / 'run').mkdir(parents=True), (tmp_path / 'b' / 'run').mkdir(parents=True)
  assert page(tmp_path / 'a' / 'run') == page(tmp_path / 'b' / 'run')
  assert not [p for p in (tmp_path / 'a' / 'run').rglob('*') if p.name.endswith(TEMPORARY)]


def test_report_shows_the_pictures_themselves(tmp_path):
  text = page(tmp_path)
  first = base64.b64decode(re.search(r'data:image/png;base64,([^"]*)', text)[1])
  with Image.open(io.BytesIO(first)) as image:
    assert (np.asarray(image) == 9).all() and image.size == (30, 20)


@pytest.mark.parametrize('names, first', [
  (('x', 'comparison_samples'), 'comparison_samples'),
  (('comparison_samples', 'before_after'), 'before_after'),
  (('x', 'y'), None),
])  # fmt: skip
def test_the_picture_that_leads(tmp_path, names, first):
  images = {name: Picture(np.zeros((4, 4), np.uint8), f'title of {name}') for name in names}
  pictures = write_pictures(tmp_path / 'samples', images)
  paper = [{'name': 'FID', 'paper': 24.08}]
  text = report.write(tmp_path, config={'a': 1}, header='', results={}, pictures=pictures, metrics=[], paper=paper).read_text()
  leads = [name for name in names if text.index(f'title of {name}') < text.index('Beside the paper')]
  assert leads == ([first] if first else [])


def test_report_of_almost_nothing(tmp_path):
  path = report.write(tmp_path, config={'a': 1}, header='', results={}, pictures=[], metrics=[])
  assert tmp_path.name in path.read_text()


def test_results_file(tmp_path):
  path = tmp_path / 'results.json'
  write_results(path, {'b/group10': Result(1, 'nats', 3), 'b/group2': Result(2.5, 'nats', 3, 0.5)})
  found = json.loads(path.read_text())
  assert list(found) == ['b/group2', 'b/group10']
  assert found['b/group2'] == {'value': 2.5, 'unit': 'nats', 'n': 3, 'stderr': 0.5}
  assert found['b/group10']['stderr'] is None
  before = path.read_bytes()
  for bad in (Result(math.nan, 'nats', 3), Result(math.inf, 'nats', 3), Result(1.0, 'nats', 3, math.nan)):
    with pytest.raises(ValueError, match="'likelihood/elbo'.*not finite"):
      write_results(path, {'a': Result(1.0, 'x', 1), 'likelihood/elbo': bad})
  assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_pictures_round_trip(tmp_path):
  array = np.random.default_rng(1).integers(0, 255, (7, 5, 3)).astype(np.uint8)
  listed = write_pictures(tmp_path / 'samples', {'a/b': Picture(array, 'T', 'C')})
  assert listed == [{'title': 'T', 'caption': 'C', 'path': str(tmp_path / 'samples' / 'a-b.png')}]
  with Image.open(listed[0]['path']) as image:
    assert np.array_equal(np.asarray(image), array)
  with pytest.raises(ValueError, match='uint8'):
    write_pictures(tmp_path, {'x': Picture(array / 255, 'T')})


@pytest.mark.parametrize(
  ('value', 'stderr', 'text'),
  [
    (-78.0123, 0.0345, '-78.012'),
    (1234.5, 12.0, '1,234'),
    (0.51234, None, '0.5123'),
    (5000.0, None, '5,000'),
    (1e-5, None, '1e-05'),
    (math.nan, math.nan, 'nan'),
    (1.5, math.inf, '1.5'),
  ],
)
def test_numbers_show_what_their_error_lets_one_read(value, stderr, text):
  assert report.number(value, stderr) == text


def test_charts_hold_no_date_and_lines_of_one_family_share_one():
  values = {'kl/level0/group0': 1.0, 'kl/level0/group1': 2.0, 'loss': 0.1}
  rows = [{'step': s, 'stage': 'a', **values} for s in range(3)]
  found = report.curves(rows)
  assert list(found) == ['a'] and [c['title'] for c in found['a']] == ['kl', 'loss']
  drawn = base64.b64decode(found['a'][0]['source'].split(',')[1]).decode()
  assert '<dc:date>' not in drawn
  with charts.style():
    figure, ax = charts.axes(2, 1)
    ax.plot([0, 1], [0, 1])
    assert charts.pixels(figure).dtype == np.uint8


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiments_deviations_stand_at_the_end_of_its_header(path):
  _, text, deviations = report.split_header(ast.get_docstring(ast.parse(path.read_text())))
  assert deviations and 'Command' in text
  assert 'Measured' not in deviations
