"""What the modes of the command line do; `collect` is in sweeps.py."""

import argparse
from collections.abc import Mapping
import dataclasses
import functools
import json
import math
import pathlib
import shlex
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from latentgen import assembly, config as configs, evaluate as evaluation, sections, workdir as workdirs
from latentgen.errors import UserError
from latentgen.evaluate import grids, report
from latentgen.evaluate.base import fetch
from latentgen.train import keys, loop, writers
from latentgen.train.writers import say


@dataclasses.dataclass(frozen=True)
class Command:
  """One resolved command: the experiment, its config with overrides, where it runs."""

  file: configs.File
  config: ConfigDict
  overrides: dict[str, Any]
  workdir: pathlib.Path
  flags: argparse.Namespace

  def text(self) -> str:
    """The command that repeats the run, as a shell reads it."""
    spec = str(self.file.path) + (f':{self.file.variant}' if self.file.variant else '')
    values = [f'--config.{key}={value}' for key, value in self.overrides.items()]
    return shlex.join(['python', '-m', 'latentgen.main', f'--config={spec}', *values])


def tasks(config: ConfigDict) -> dict[str, dict[str, Any]]:
  """{task: options} of `config.evaluate`, checked."""
  sections.check(config)
  section = sections.plain(config.get('evaluate', {}))
  names = section.pop('tasks', ())
  evaluation.check_tasks({**{name: {} for name in names}, **section})  # options of a task that is left out may stay
  chosen = {name: section.get(name, {}) for name in names}
  return chosen


def _open(command: Command) -> tuple[loop.Run, dict[str, Any]]:
  """The run and its description, all checks done and nothing touched."""
  tasks(command.config)
  run = assembly.build(command.config, command.workdir.absolute())
  assembly.check_shapes(run)
  mine = workdirs.describe(command.file, sections.plain(command.config), command.overrides, run.mesh)
  mine['data'] = {split: {'n': len(source), 'sha256': source.checksum()} for split, source in run.data.items()}
  workdirs.check(command.workdir, mine)
  return run, mine


def _trained(command: Command) -> tuple[loop.Run, dict[str, Any]]:
  run, mine = _open(command)
  if workdirs.read(command.workdir) is None:
    raise UserError(f'--workdir: {command.workdir} holds no run; train it first, with the same command and --mode=train')
  for stage in run.recipe:
    if not loop.finished(run, stage):
      raise UserError(f'--workdir: stage {stage.name!r} of {command.workdir} is not finished; go on with --mode=train')
  return run, mine


def train(command: Command) -> None:
  """Trains what is not trained yet, then evaluates and reports."""
  run, mine = _open(command)
  assembly.check_evaluation(run, tasks(command.config))
  with workdirs.claim(command.workdir, mine):
    for line in workdirs.changes(command.workdir, mine):
      say(line)
    loop.train(run)
    _evaluate(command, run, mine)


def evaluate(command: Command) -> None:
  """Evaluates a finished run again."""
  run, mine = _trained(command)
  assembly.check_evaluation(run, tasks(command.config))
  with workdirs.claim(command.workdir, mine):
    _evaluate(command, run, mine)


def subject(run: loop.Run, name: str | None = None) -> evaluation.Subject:
  """A stage as evaluation sees it, the last by default."""
  stage = next((s for s in run.recipe if s.name == name), run.recipe[-1])
  return evaluation.Subject(
    method=stage.method,
    variables=loop.load_variables(run, stage),
    data=run.data,
    preprocess=run.preprocess,
    key=keys.named(run.root, 'evaluation'),
    batch_size=run.settings.batch_size,
    put=run.put,
    stages={s.name: functools.partial(subject, run, s.name) for s in run.recipe},
    seconds=writers.Clock(run.workdir).seconds,
  )


def _evaluate(command: Command, run: loop.Run, mine: dict[str, Any]) -> None:
  chosen, stage, target = tasks(command.config), run.recipe[-1].name, subject(run)
  findings = evaluation.Findings()
  for name, options in chosen.items():
    say(f'evaluating: {name}')
    findings.merge(evaluation.run_all(target, {name: options}))
  if jax.process_index():
    return
  results = _finite(findings.results)
  made = {k: mine[k] for k in ('versions', 'revision', 'seed', 'mesh', 'data')}
  evaluation.write_results(command.workdir / 'results.json', results, made)
  pictures = evaluation.write_pictures(command.workdir / 'samples' / stage, findings.images)
  evaluation.write_tables(command.workdir / 'tables', findings.tables)
  report.write(
    command.workdir,
    config=mine,
    header=command.file.module.__doc__ or '',
    results=results,
    pictures=pictures,
    metrics=_rows(command.workdir / 'metrics.jsonl'),
    paper=[dict(row) for row in sections.plain(command.config.get('paper', ()))],
    command=command.text(),
    tables=findings.tables.values(),
  )
  say(f'report: {command.workdir / "report.html"}')


def _finite(results: Mapping[str, evaluation.Result]) -> dict[str, evaluation.Result]:
  """The results whose value and standard error are finite; of each other one a line is said."""
  kept = {}
  for name, result in results.items():
    if math.isfinite(result.value) and (result.stderr is None or math.isfinite(result.stderr)):
      kept[name] = result
    else:
      error = '' if result.stderr is None else f' ± {result.stderr}'
      say(f'{name} is not finite ({result.value}{error}) and is left out of results.json')
  return kept


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl; lines that are none, torn by a kill or of somebody else, are passed over."""
  rows = []
  for line in path.read_text(errors='replace').split('\n') if path.is_file() else ():
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(row, dict) and type(row.get('step')) is int and all(isinstance(row.get(k), str) for k in ('stage', 'split')):
      rows.append(row)
  return rows


def sample(command: Command) -> None:
  """Draws images from a finished run to samples/<stage>/drawn-<sampler>.png and .npz."""
  run, mine = _trained(command)
  target, flags = subject(run), command.flags
  sampler = target.method.sampler(flags.sampler)
  size = min(flags.num, target.batch_size)
  draw = jax.jit(lambda v, key: target.method.sample(v, key, size, sampler, flags.temperature))
  variables, key = target.variables, keys.named(target.key, 'sample')
  if flags.temperature != 1.0 and hasattr(target.method, 'readjust'):
    variables = jax.jit(target.method.readjust, static_argnums=2)(variables, keys.named(key, 'readjust'), flags.temperature)
  count = -(-flags.num // size)
  images = np.concatenate([fetch(draw(variables, jax.random.fold_in(key, i))) for i in range(count)])[: flags.num]
  with workdirs.claim(command.workdir, mine):
    if jax.process_index():
      return
    folder = command.workdir / 'samples' / run.recipe[-1].name
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f'drawn-{sampler}.npz', images=images)
    picture = evaluation.Picture(grids.grid(images), f'{flags.num} samples by {sampler}')
    evaluation.write_pictures(folder, {f'drawn-{sampler}': picture})
  say(f'{flags.num} images: {folder / f"drawn-{sampler}"}.png and .npz')


def estimate(command: Command) -> None:
  """What a step of every stage costs, from shapes alone, on the mesh of the config; nothing is allocated, nothing written."""
  from latentgen.nets import convolution
  from latentgen.train import cost

  options = {k: v for k, v in sections.plain(command.config.get('mesh', {})).items() if k in ('data', 'fsdp')}
  run = assembly.build(command.config, command.workdir.absolute(), cost.make_mesh(**options), shapes_only=True)
  assembly.check_shapes(run, allocated=False)
  with convolution.implementation('native'):  # count what an accelerator computes
    for stage in run.recipe:
      print(*cost.table(run, stage), sep='\n', flush=True)
  print(*cost.ASSUMPTIONS, sep='\n')
