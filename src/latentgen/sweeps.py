"""The runs of a sweep side by side: one Markdown table and one self-contained page beside their folders."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any

import jax

from latentgen.config import File
from latentgen.errors import UserError, near
from latentgen.evaluate import charts, report
from latentgen.evaluate.writing import natural
from latentgen.files import replace_file
from latentgen.train.writers import say

CHART_KEYS = ('x', 'y', 'label', 'title', 'log')


@dataclasses.dataclass(frozen=True)
class Member:
  """One finished run: its folder's name, the overrides that make it, its results.json."""

  name: str
  overrides: Mapping[str, Any]
  results: Mapping[str, Mapping[str, Any]]

  def value(self, name: str) -> Any:
    """Of a result or an overridden key; None where there is neither."""
    return self.results[name]['value'] if name in self.results else self.overrides.get(name)


def swept(sets: Sequence[Mapping[str, Any]]) -> list[str]:
  """The keys that any run overrides, in order."""
  return list(dict.fromkeys(key for overrides in sets for key in overrides))


def check(file: File, name: str, sets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The charts that the experiment's `SWEEP_CHARTS` names for a sweep.

  Each is a dict with x and y, names of results or of swept keys; label, the swept key that names a point (the first one by
  default); title; log, the axes that are logarithmic ('x', 'y' or 'xy').

  Raises:
    UserError: a chart that has no x and y, another key, or a label that is not swept.
  """
  keys, where = swept(sets), f'{file.path}: SWEEP_CHARTS[{name!r}]'
  charted = getattr(file.module, 'SWEEP_CHARTS', {})
  listed = charted.get(name, ()) if isinstance(charted, Mapping) else None
  if not isinstance(listed, (tuple, list)) or not all(isinstance(chart, Mapping) for chart in listed):
    raise UserError(f'{where} is {listed!r}, need a list of dicts with x and y')
  listed = list(listed)
  for chart in listed:
    for key in chart:
      if key not in CHART_KEYS:
        raise UserError(f'{where} has a chart with {key!r}{near(key, CHART_KEYS)}')
    if not chart.get('x') or not chart.get('y'):
      raise UserError(f'{where} has a chart without x and y')
    for key, value in chart.items():
      if not isinstance(value, str):
        raise UserError(f'{where} has a chart with {key} = {value!r}, need a text')
    if set(chart.get('log', '')) - set('xy'):
      raise UserError(f"{where} has a chart with log = {chart['log']!r}, need 'x', 'y' or 'xy'")
    if 'label' in chart and chart['label'] not in keys:
      raise UserError(f'{where}: label {chart["label"]!r} is not swept{near(chart["label"], keys)}')
  return listed


def collect(file: File, name: str, sets: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> None:
  """Reads results.json of `workdir/<name>-<i>` and writes `workdir/<name>.md` and `workdir/<name>.html`.

  Args:
    file: the experiment.
    name: of the sweep.
    sets: the override sets of all its runs, in order.
    workdir: the folder that holds the runs.

  Raises:
    UserError: a run is missing or not finished, or the experiment names a chart that cannot be.
  """
  if jax.process_index():
    return
  keys, listed = swept(sets), check(file, name, sets)
  members = []
  for i, overrides in enumerate(sets):
    path = workdir / f'{name}-{i}' / 'results.json'
    try:
      results = json.loads(path.read_text())
      if isinstance(results, dict):
        results.pop('run', None)
      _check_results(results)
    except (OSError, ValueError, RecursionError) as error:
      hint = 'train it first' if isinstance(error, FileNotFoundError) else f'cannot be read ({type(error).__name__})'
      raise UserError(f'--workdir: run {i} of sweep {name!r} has no results: {path}; {hint}') from error
    members.append(Member(f'{name}-{i}', overrides, results))
  different = [k for k in keys if len({_text(m.overrides.get(k, '')) for m in members}) > 1] or keys
  tables = {'Runs': runs_table(members, different, listed), 'All results': results_table(members, keys)}
  if different != keys:
    tables['Overridden alike in all runs'] = ['key', 'value'], [[k, _text(sets[0].get(k, ''))] for k in keys if k not in different]
  if set(keys) > {'seed'}:
    tables = {'Mean and standard deviation over seeds': seeds_table(members, keys), **tables}
  title = f'{file.name}, sweep {name}'
  text = f'# {title}\n' + ''.join(f'\n## {head}\n\n{markdown(*table)}\n' for head, table in tables.items())
  replace_file(workdir / f'{name}.md', text.encode())
  pictures = [{'title': _title(chart), 'source': report.data('image/svg+xml', draw(chart, members, keys))} for chart in listed]
  page = report.environment().get_template('sweep.html.jinja').render(
    title=title, about=report.split_header(file.module.__doc__ or '')[0], run=workdir.name, charts=pictures, tables=tables
  )
  path = workdir / f'{name}.html'
  replace_file(path, page.encode())
  say(f'sweep {name}: {path}')


def _check_results(results: Any) -> None:
  """That they are what `write_results` writes; raises ValueError."""
  if not isinstance(results, dict):
    raise ValueError('no results')
  for name, result in results.items():
    if not isinstance(result, dict) or not isinstance(result.get('unit'), str) or not {'value', 'n', 'stderr'} <= set(result):
      raise ValueError(name)
    if not _is_number(result['value']) or not _is_number(result['n']):
      raise ValueError(name)
    if result['stderr'] is not None and not (_is_number(result['stderr']) and result['stderr'] >= 0):
      raise ValueError(name)


# ---------------------------------------------------------------------------------------- tables

Table = tuple[list[str], list[list[str]]]  # heads, rows


def runs_table(members: Sequence[Member], keys: Sequence[str], listed: Sequence[Mapping[str, Any]]) -> Table:
  """A row for every run: what was overridden, then the results that the charts name."""
  names = dict.fromkeys(chart[axis] for chart in listed for axis in ('x', 'y'))
  shown = [name for name in names if any(name in m.results for m in members)]
  rows = [[m.name, *(_text(m.overrides.get(k, '')) for k in keys), *(_number(m, n) for n in shown)] for m in members]
  return ['run', *keys, *shown], rows


def results_table(members: Sequence[Member], keys: Sequence[str]) -> Table:
  """A row for every result, a column for every run; mean and standard deviation where runs differ by the seed alone."""
  spread = set(keys) == {'seed'} and len(members) > 1
  heads = ['result', 'unit', *(m.name for m in members), *(['mean', 'standard deviation over runs'] if spread else [])]
  rows = []
  for name in sorted({name for m in members for name in m.results}, key=natural):
    found = [m.results[name] for m in members if name in m.results]
    row = [name, found[0]['unit'], *(_number(m, name) for m in members)]
    if spread:
      values = [r['value'] for r in found]
      deviation = statistics.stdev(values) if len(values) > 1 else None
      row += [report.number(statistics.fmean(values), deviation), '' if deviation is None else report.error(deviation)]
    rows.append(row)
  return heads, rows


def seeds_table(members: Sequence[Member], keys: Sequence[str]) -> Table:
  """A row for every result, a column for every setting: mean and standard deviation of the runs that differ by the seed alone."""
  groups: dict[tuple[str, ...], list[Member]] = {}
  for m in members:
    groups.setdefault(tuple(_text(m.overrides.get(key, '')) for key in keys if key != 'seed'), []).append(m)
  differing = [i for i, values in enumerate(zip(*groups, strict=True)) if len(set(values)) > 1]
  heads = ['result', 'unit', *(', '.join(group[i] for i in differing) for group in groups)]
  rows = []
  for name in sorted({name for m in members for name in m.results}, key=natural):
    each = [[m.results[name] for m in group if name in m.results] for group in groups.values()]
    rows.append([name, next(r['unit'] for group in each for r in group), *map(_spread, each)])
  return heads, rows


def _spread(results: Sequence[Mapping[str, Any]]) -> str:
  values = [r['value'] for r in results]
  if len(values) < 2:
    return ''.join(report.number(v) for v in values)
  deviation = statistics.stdev(values)
  return f'{report.number(statistics.fmean(values), deviation)} ± {report.error(deviation)}'


def markdown(heads: list[str], rows: list[list[str]]) -> str:
  """A table; bars and line ends in a cell are escaped."""
  cell = lambda text: ' '.join(text.split()).replace('|', '\\|')
  line = lambda cells: '| ' + ' | '.join(map(cell, cells)) + ' |'
  return '\n'.join([line(heads), line(['---'] * len(heads)), *map(line, rows)])


def _number(member: Member, name: str) -> str:
  if name not in member.results:
    return ''
  result = member.results[name]
  return report.number(result['value'], result['stderr'])


def _text(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _title(chart: Mapping[str, Any]) -> str:
  return chart.get('title') or f'{chart["y"]} against {chart["x"]}'


# ---------------------------------------------------------------------------------------- charts


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def draw(chart: Mapping[str, Any], members: Sequence[Member], keys: Sequence[str]) -> bytes:
  """One chart as SVG: runs whose label is a number joined in its order, others on their own; where nothing is swept, by name.

  A run that has no number for x because the swept key holds a word ('learned') is a horizontal line at its y.
  """
  label = chart.get('label', keys[0] if keys else None)
  named = lambda m: m.name if label is None else m.value(label)
  numbers = sorted((m for m in members if _is_number(named(m))), key=named)
  words = [m for m in members if not _is_number(named(m))]
  with charts.style():
    figure, ax = charts.axes(4.6, 3.2)
    points = [(m.value(chart['x']), m.value(chart['y']), named(m)) for m in numbers]
    points = [p for p in points if _is_number(p[0]) and _is_number(p[1])]
    if points:
      ax.plot([p[0] for p in points], [p[1] for p in points], color=charts.COLORS[0], lw=1.5, marker='o', ms=4)
    if chart['x'] != label:
      for x, y, value in points:
        ax.annotate(_plain(value), (x, y), xytext=(4, 4), textcoords='offset points', fontsize=7.5)
    for i, m in enumerate(words):
      x, y, color = m.value(chart['x']), m.value(chart['y']), charts.COLORS[1 + i % (len(charts.COLORS) - 1)]
      if _is_number(x) and _is_number(y):
        ax.plot([x], [y], color=color, ls='', marker='D', ms=6, label=_plain(named(m)))
      elif _is_number(y):
        ax.axhline(y, color=color, lw=1.5, ls='--', label=_plain(named(m)))
    for axis in chart.get('log', ''):
      getattr(ax, f'set_{axis}scale')('log')
    ax.set(xlabel=_plain(chart['x']), ylabel=_plain(chart['y']))
    if words:
      ax.legend(frameon=False, fontsize=7.5)
    return charts.svg(figure)


def _plain(value: Any) -> str:
  return charts.plain(_text(value))
