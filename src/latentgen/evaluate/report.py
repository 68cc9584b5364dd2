"""One self-contained page about a run: what ran, what it looks like, how it learned, what came out beside the paper.

The page needs no network, no script and no other file, and is the same to the byte for the same inputs.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
import math
import os
import pathlib
import re
from typing import Any

import jinja2
from PIL import Image

from latentgen.evaluate import charts
from latentgen.evaluate.base import Result, Table
from latentgen.evaluate.writing import as_json, natural
from latentgen.files import replace_file

META = ('experiment', 'variant', 'overrides', 'seed', 'mesh', 'data', 'versions')  # of config.json, beside the config
MAX_LINES = 8  # in one chart
FIRST = ('before_after', 'comparison_samples')  # stems of pictures, of which the first that there is leads


def write(
  workdir: str | os.PathLike,
  *,
  config: Mapping[str, Any],
  header: str,
  results: Mapping[str, Result | Mapping[str, Any]],
  pictures: Sequence[Mapping[str, Any]],
  metrics: Iterable[Mapping[str, Any]],
  paper: Sequence[Mapping[str, Any]] = (),
  command: str = '',
  tables: Iterable[Table] = (),
) -> pathlib.Path:
  """Writes `report.html` into a work directory.

  Args:
    workdir: the run's directory; its name stands on the page, its path does not.
    config: what config.json holds, {'config', 'overrides', 'versions', 'seed', 'mesh'}, or a bare config.
    header: docstring of the experiment: the first line is the title; from a line that starts with 'Deviations' or
      'Where this differs', the deviations from the paper.
    results: {name: Result}, or {name: {'value', 'unit', 'n', 'stderr'}}.
    pictures: [{'title', 'caption', 'path'}] as `write_pictures` returns them; paths absolute or below workdir. The
      one whose file has a name of FIRST comes first.
    metrics: rows of metrics.jsonl: {'step', 'stage', 'split', name: number ...}.
    paper: the paper's numbers, rows {'name', 'paper', 'ours': a name in results, or a list of such names, 'note'}; a row with
      'when', {dotted config key: value}, is shown if the run had these values.
    command: what repeats the run.
    tables: shown above what ran.

  Returns:
    Path of the page.
  """
  workdir = pathlib.Path(workdir)
  results = as_json({name: r if isinstance(r, Result) else Result(**r) for name, r in results.items()})
  title, about, deviations = split_header(header)
  shown = [_inline(picture, workdir) for picture in pictures]
  lead = next((p for stem in FIRST for p in shown if p['stem'] == stem), None)
  settings = config['config'] if isinstance(config.get('config'), Mapping) else config
  known = META if settings is not config else ()
  meta = [(name, summary(config[name])) for name in known if config.get(name) not in (None, '', {})]
  chosen = flatten(settings)
  page = environment().get_template('report.html.jinja').render(
    title=title or workdir.name,
    run=workdir.name,
    about=about,
    deviations=deviations,
    meta=meta,
    settings=chosen,
    lead=lead,
    pictures=[p for p in shown if p is not lead],
    curves=curves(metrics),
    groups=grouped(results),
    paper=[beside(row, results) for row in paper if {k: str(v) for k, v in row.get('when', {}).items()}.items() <= dict(chosen).items()],
    command=command,
    tables=list(tables),
  )
  path = workdir / 'report.html'
  replace_file(path, page.encode())
  return path


def environment() -> jinja2.Environment:
  """Where the templates of pages are found; all that they show is escaped."""
  found = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), undefined=jinja2.StrictUndefined,
    autoescape=True, trim_blocks=True, lstrip_blocks=True,
  )  # fmt: skip
  found.filters |= {'number': number, 'error': error}
  return found


# ---------------------------------------------------------------------------------------------- text and numbers


def split_header(header: str) -> tuple[str, str, str]:
  """Experiment docstring -> (title, text, deviations from the paper)."""
  lines = (header or '').strip().splitlines()
  heading = re.compile(r'\W*(deviations|differences|where this differs)\b', re.I)
  start = next((i for i, line in enumerate(lines) if heading.match(line)), len(lines))
  title = lines[0].strip().rstrip('.') if lines else ''
  return title, '\n'.join(lines[1:start]).strip(), '\n'.join(lines[start:]).strip()


def flatten(tree: Mapping[str, Any], prefix: str = '') -> list[tuple[str, str]]:
  """Nested mapping -> sorted rows (dotted key, text)."""
  rows = []
  for key in sorted(tree, key=str):
    value, name = tree[key], f'{prefix}{key}'
    rows += flatten(value, f'{name}.') if isinstance(value, Mapping) and value else [(name, str(value))]
  return rows


def summary(value: Any) -> str:
  """A mapping on one line, long hashes cut short."""
  if not isinstance(value, Mapping):
    return str(value)
  short = re.compile('^([0-9a-f]{12})[0-9a-f]{28,}$')
  return ', '.join(f'{name} {short.sub(lambda m: m[1], text)}' for name, text in flatten(value))


def error(value: float | None) -> str:
  """A standard error with two digits."""
  return '' if value is None else f'{value:#.2g}'.rstrip('.') if value < 100 else f'{value:.0f}'


def number(value: float, stderr: float | None = None) -> str:
  """A number to the last place that its standard error lets one read, else to four digits or so."""
  if float(value).is_integer() and abs(value) < 1e9:
    return f'{int(value):,}'
  if stderr and math.isfinite(stderr):
    places = min(max(1 - math.floor(math.log10(stderr)), 0), 8)
    return f'{value:,.{places}f}'
  return f'{value:.4g}' if abs(value) < 1000 else f'{value:,.1f}'


def grouped(results: Mapping[str, Mapping]) -> list[dict]:
  """Results by the first part of the name; rows of single groups apart, since a deep hierarchy has many."""
  groups: dict[str, dict] = {}
  for name, result in results.items():
    group = groups.setdefault(name.split('/')[0], {'name': name.split('/')[0], 'rows': [], 'details': []})
    deep = re.search(r'(^|/)level\d+(/|$)', name)
    group['details' if deep else 'rows'].append({'name': name, **result})
  return list(groups.values())


def beside(row: Mapping[str, Any], results: Mapping[str, Mapping]) -> dict:
  """A row of the paper's table with our numbers, those that there are."""
  names = row.get('ours') or ()
  names = (names,) if isinstance(names, str) else names
  ours = [{'name': name, **results[name]} for name in names if name in results]
  missing = [name for name in names if name not in results]
  found = {'name': row['name'], 'paper': row.get('paper'), 'note': row.get('note') or ''}
  return {**found, 'ours': ours, 'missing': missing}


# ---------------------------------------------------------------------------------------------- pictures


def _inline(picture: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / picture['path']
  with Image.open(path) as image:
    width, height = image.size
  found = {'title': picture['title'], 'caption': picture.get('caption', ''), 'stem': path.stem}
  return {**found, 'source': data('image/png', path.read_bytes()), 'broad': width > 1.8 * height}


def data(kind: str, content: bytes) -> str:
  """A data: URL, so that a page needs no other file."""
  return f'data:{kind};base64,{base64.b64encode(content).decode()}'


def curves(metrics: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
  """A chart for every stage and metric, train and valid in one: {stage: [{'title', 'source'}]}, stages as they ran.

  Metrics of groups or levels (name/level0/group1, name_3, ...) share one chart.
  """
  series: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
  for row in metrics:
    for name, value in row.items():
      if name in ('step', 'stage', 'split') or type(value) not in (int, float) or not math.isfinite(value):
        continue
      family = re.sub(r'[/_]?(level|group)_?\d+|[/_]\d+', '', name) or name
      label = ' '.join(filter(None, [name if family != name else '', row.get('split', '')])) or name
      series.setdefault((row.get('stage', ''), family), {}).setdefault(label, []).append((row['step'], value))
  charted: dict[str, list[dict[str, str]]] = {}
  for (stage, family), lines in sorted(series.items(), key=lambda item: natural(item[0][1])):
    if any(len(points) > 1 for points in lines.values()):
      charted.setdefault(stage, []).append({'title': family, 'source': data('image/svg+xml', _chart(lines))})
  order = list(dict.fromkeys(stage for stage, _ in series))
  return {stage: charted[stage] for stage in order if stage in charted}


def _chart(lines: Mapping[str, list[tuple[float, float]]]) -> bytes:
  with charts.style():
    figure, ax = charts.axes(3.5, 2.1)
    for i, (label, points) in enumerate(sorted(lines.items(), key=lambda item: natural(item[0]))[:MAX_LINES]):
      steps, values = zip(*sorted(points), strict=True)
      mark = 'o' if len(points) < 12 else None
      color = charts.COLORS[i % len(charts.COLORS)]
      ax.plot(steps, values, color=color, lw=1.5, marker=mark, ms=2.5, label=charts.plain(label))
    ax.set_xlabel('step')
    ax.margins(x=0.02)
    ax.locator_params(nbins=5)
    charts.legend(ax, fontsize=7.5)
    return charts.svg(figure)
