"""What stands on a page is text: nothing runs, and nothing is loaded from elsewhere, whatever a run is called or holds."""

import base64
from html.parser import HTMLParser
import json
import pathlib
import types
from xml.etree import ElementTree

import numpy as np
import pytest

from latentgen import sweeps
from latentgen.config import File
from latentgen.evaluate import Picture, Result, Table, report, write_pictures

HOSTILE = (
  '<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", '" onload="alert(1)',
  '</style><script>alert(1)</script>',
  '</title><script src="//evil.example/x.js"></script>', 'javascript:alert(1)', '<a href="javascript:alert(1)">x</a>',
  '<iframe src="http://evil.example">',
  '<link rel=stylesheet href=http://evil.example/x.css>', '<svg onload=alert(1)>', '{{ 7 * 7 }}', '{% raw %}',
  '&lt;script&gt;', '<!--', '-->', ']]>',
  '<meta http-equiv=refresh content="0;url=http://evil.example">', '<base href="http://evil.example/">', '\x00\x1b',
  '$\\frac{$', '$x$', '\u202e', '<b>bold</b>',
)  # fmt: skip
VOID = {'meta', 'img', 'br'}
TAGS = {'html', 'head', 'meta', 'title', 'style', 'body', 'main', 'header', 'h1', 'h2', 'h3', 'p', 'div', 'span', 'strong',
  'table', 'thead', 'tbody', 'tr',
        'th', 'td', 'figure', 'img', 'figcaption', 'pre', 'dl', 'dt', 'dd', 'details', 'summary', 'br'}  # fmt: skip
DRAWN = {'svg', 'metadata', 'RDF', 'Work', 'type', 'format', 'defs', 'style', 'g', 'path', 'use', 'clipPath', 'rect', 'text',
  'tspan'}
ATTRIBUTES = {'lang', 'charset', 'name', 'content', 'class', 'src', 'alt'}


class Page(HTMLParser):
  """All that a browser would see: elements, in balance; attributes; the text."""

  def __init__(self, text: str):
    super().__init__(convert_charrefs=True)
    self.open, self.tags, self.attributes, self.texts, self.style = [], set(), [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes += [(tag, name, value or '') for name, value in attrs]
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    (self.style if self.open and self.open[-1] == 'style' else self.texts).append(data)

  def handle_comment(self, data):
    raise AssertionError(data)


def harmless(text: str) -> Page:
  page = Page(text)
  assert page.tags <= TAGS
  for tag, name, value in page.attributes:
    assert name in ATTRIBUTES and not name.startswith('on'), (tag, name)
    assert name != 'src' or value.startswith(('data:image/png;base64,', 'data:image/svg+xml;base64,')), value
    if value.startswith('data:image/svg'):
      drawing = ElementTree.fromstring(base64.b64decode(value.partition(',')[2]))
      for element in drawing.iter():
        assert element.tag.rpartition('}')[2] in DRAWN, element.tag
        for key, where in element.attrib.items():
          local = key.rpartition('}')[2]
          assert not local.startswith('on') and (local != 'href' or where.startswith('#')), (key, where)
  style = ''.join(page.style)
  assert '@import' not in style and 'url(' not in style and page.attributes.count(('meta', 'http-equiv', 'refresh')) == 0
  return page


def written(folder: pathlib.Path, bad: str) -> str:
  """A report in which everything that a user, a file or a method can choose is `bad`."""
  images = {'before_after': Picture(np.zeros((4, 4), np.uint8), bad, bad), 'x': Picture(np.zeros((4, 4), np.uint8), bad, bad)}
  return report.write(
    folder,
    config={'config': {bad: bad, 'model': {'name': bad, 'list': (bad, {bad: bad})}}, 'experiment': bad, 'variant': bad,
            'overrides': {bad: bad}, 'versions': {bad: bad}, 'seed': bad, 'mesh': {bad: bad}, 'data': {bad: {'n': bad}}},
    header=f'{bad}\n\n{bad}\n\nDeviations: {bad}\n',
    results={bad: Result(1.5, bad, 3, 0.1), f'level0/{bad}': Result(1.0, bad, 3)},
    pictures=write_pictures(folder / 'samples', images),
    metrics=[{'step': s, 'stage': bad, 'split': split, bad: float(s), 'loss': bad} for s in (1, 2) for split in (bad, 'valid')],
    paper=[{'name': bad, 'paper': bad, 'ours': [bad, 'none'], 'note': bad}],
    command=bad,
    tables=[Table(bad, (bad, bad), [(bad, bad)], bad)],
  ).read_text()  # fmt: skip


@pytest.mark.parametrize('bad', HOSTILE)
def test_report(tmp_path, bad):
  page = harmless(written(tmp_path, bad))
  text = ' '.join(' '.join(page.texts).split())
  assert text.count(' '.join(bad.split())) >= 10  # it stands there as it is


@pytest.mark.parametrize('bad', HOSTILE)
def test_page_of_a_sweep(tmp_path, bad):
  sets = [{'model.scale': bad, bad: 1}, {'model.scale': 0.5, bad: bad}]
  for i in range(2):
    (tmp_path / f'lr-{i}').mkdir()
    result = {'value': 1.0 + i, 'unit': bad, 'n': 3, 'stderr': None}
    (tmp_path / f'lr-{i}' / 'results.json').write_text(json.dumps({bad: result, 'elbo': result}))
  chart = {'x': 'model.scale', 'y': bad, 'label': bad, 'title': bad}
  module = types.SimpleNamespace(__doc__=f'{bad}\n\nMore {bad}', SWEEP_CHARTS={'lr': [chart]})
  sweeps.collect(File(pathlib.Path('experiments/some.py'), '', module), 'lr', sets, tmp_path)
  page = harmless((tmp_path / 'lr.html').read_text())
  assert sum(bad.split()[0] in text for text in page.texts) >= 5
