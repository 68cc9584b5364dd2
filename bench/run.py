"""make bench: measures every row and writes docs/benchmarks.md. Ratios to a peer are medians over rounds in turns.

usage: run.py [--peers=PYTHON] [--out=FILE] [--rounds=N] [ROW ...]
"""

import argparse
from collections.abc import Callable
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import timing

from latentgen import hugepages

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent


class Failed(Exception):
  """A measurement that could not be made, and why."""


class Bench:
  """Runs measurements in processes of their own; `peers` is the interpreter of the peers' environment, or why there is none."""

  def __init__(self, peers: str, folder: pathlib.Path, rounds: int):
    self._peers, self.folder, self.rounds = peers, folder, rounds
    self.quick = max(3, rounds)  # rounds of what takes seconds, and of what is near its target
    self.cache = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'rounds')}  # what a second round need not compile again

  def ours(self, *arguments: Any, **env: str) -> Any:
    return self._run(sys.executable, 'ours.py', arguments, env)

  def theirs(self, *arguments: Any) -> Any:
    if not os.path.exists(self._peers):
      raise Failed(self._peers)
    return self._run(self._peers, 'peers.py', arguments, {})

  def _run(self, python: str, program: str, arguments: tuple[Any, ...], env: dict[str, str]) -> Any:
    whole = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    whole |= {'PYTHONPATH': str(ROOT / 'src'), hugepages.VARIABLE: hugepages.VALUE, **env}  # as the command line, and so the peers
    command = [python, str(HERE / program), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=whole, capture_output=True, text=True, timeout=1200)
    if done.returncode:
      raise Failed((done.stderr.strip().splitlines() or ['no output'])[-1][:300])
    return json.loads(done.stdout.splitlines()[-1])

  def against(self, unit: str, ours: tuple[Any, ...], theirs: tuple[Any, ...], rounds: int, digits: int = 0) -> tuple[str, float]:
    """(figures, ratio) of rates in turns."""
    pairs = [(self.ours(*ours, **self.cache)[unit], self.theirs(*theirs)[unit]) for _ in range(rounds)]
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return f'{mine:,.{digits}f} / {other:,.{digits}f} = **{ratio:.2f}**', ratio


Row = tuple[str, str, str]  # what, figure, target


def mlp_step(bench: Bench) -> Row:
  figure, _ = bench.against('images', ('step', 'mlp'), ('step', 'mlp'), bench.quick)
  return 'train step, MLP VAE 784-512-16, batch 100: images per CPU second, ours / Pythae', figure, '> 1.5'


def conv_step(bench: Bench) -> Row:
  figure, _ = bench.against('images', ('step', 'conv'), ('step', 'conv'), bench.rounds, 1)
  return "train step, convolutional VAE of Pythae's MNIST benchmark, batch 100: images per CPU second, ours / Pythae", figure, '> 1.3'


def nvae_step(bench: Bench) -> list[Row]:
  path = bench.folder / 'layers.json'
  count, pairs, kinds = bench.ours('layers', path), [], {}
  for _ in range(bench.quick):
    kinds = bench.theirs('layers', path)
    pairs.append((bench.ours('step', 'nvae', **bench.cache)['images'], 32 / sum(kinds.values())))
  mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
  ratio = statistics.median(a / b for a, b in pairs)
  what = (
    'train step, NVAE 1.28 M, batch 32, spectral term, KL, likelihood and Adamax included: images per CPU second, ours / what '
    f"forward and backward of torch's own {count} layers alone allow"
  )
  ours = bench.ours('layer_seconds', path)
  each = '; '.join(f'{kind}: {1e3 * ours[kind]:.0f} / {1e3 * kinds[kind]:.0f}' for kind in kinds)
  total = sum(ours.values()), sum(kinds.values())
  return [
    (what, f'{mine:.1f} / {other:.1f} = **{ratio:.2f}**; {1e3 * total[0]:.0f} of our {1e3 * 32 / mine:.0f} ms are its layers', '> 1.2'),
    (
      "the same layers alone, forward and backward, ms a batch of 32, ours / torch's (normalise: BatchNorm and Swish)",
      f'{each}; **{total[0] / total[1]:.2f}**',
      '< 1',
    ),
  ]


def large_pages(bench: Bench) -> Row:
  rate = lambda value: bench.ours('step', 'nvae', **{hugepages.VARIABLE: value}, **bench.cache)['images']
  pairs = [(rate(hugepages.VALUE), rate('')) for _ in range(bench.rounds)]
  large, small = (statistics.median(column) for column in zip(*pairs, strict=True))
  what = 'large pages for large arrays on a CPU (`hugepages.py`), the same NVAE step: images per CPU second, with / without'
  return what, f'{large:.1f} / {small:.1f} = **{statistics.median(a / b for a, b in pairs):.2f}**', '> 1'


def depthwise(bench: Bench) -> Row:
  mine, native, other = bench.ours('depthwise', 'custom'), bench.ours('depthwise', 'native'), bench.theirs('depthwise')
  shapes = [f'{h}x{w}x{c}' for _, h, w, c in timing.DEPTHWISE]
  figures = [
    f'{shape}: {1e3 * a:.1f} / {1e3 * b:.1f} = **{a / b:.2f}** ({1e3 * n:.0f})'
    for shape, a, b, n in zip(shapes, mine, other, native, strict=True)
  ]
  return "depthwise 5x5, forward and backward, batch 32: ms, ours / torch (XLA's grouped convolution)", '; '.join(figures), '< 1'


def compilation(bench: Bench) -> Row:
  seconds = {g: bench.ours('compile_seconds', g) for g in (4, 8, 16, 32)}
  each = ', '.join(f'{g}: {s:.1f} s' for g, s in seconds.items())
  return 'compile time of the train step by groups at one resolution, 32 / 4', f'{each}; **{seconds[32] / seconds[4]:.2f}**', '< 1.5'


def depth_memory(bench: Bench) -> Row:
  found = bench.ours('memory')
  growth = {name: (found[name][1] - found[name][0]) / 28 for name in ('kept', 'recomputed')}
  figure = (
    f'without {growth["kept"] / 2**20:.2f} MiB, with {growth["recomputed"] / 2**20:.2f} MiB = '
    f'**{growth["recomputed"] / found["carry"]:.2f}** times what a group hands on ({found["carry"] / 2**20:.2f} MiB)'
  )
  what = 'memory of the train step that a further group takes, beside its gradient, batch 64: without and with rematerialisation'
  return what, figure, 'the carry only'


def likelihood_memory(bench: Bench) -> Row:
  few, many = bench.ours('likelihood_bytes', 500), bench.ours('likelihood_bytes', 5000)
  figure = f'{many / 2**20:.1f} / {few / 2**20:.1f} MiB = **{many / few:.2f}**'
  return 'memory of the importance-weighted likelihood in chunks of 50, K = 5,000 / K = 500', figure, 'flat'


def _likelihood(bench: Bench, kind: str, name: str, rounds: int) -> Row:
  figure, ratio = bench.against('samples', ('likelihood', kind), ('likelihood', kind), rounds)
  found = bench.ours('likelihood', kind)
  achieved, wanted = (1e-9 * found['samples'] * found['flops'] * factor for factor in (1, 10 / ratio))
  figure += (
    f'; matrix products of the decoder, {found["flops"] / 1e6:.1f} MFLOP a sample: {achieved:.0f} GFLOP/s with all else beside; '
    f'a square matrix product reaches {found["rate"] / 1e9:.0f} here, 10 times would take {wanted:.0f}'
  )
  return f"likelihood, K = 1,000, {name}: image-samples per CPU second, ours / Pythae's `get_nll`", figure, '> 10'


def mlp_likelihood(bench: Bench) -> Row:
  return _likelihood(bench, 'mlp', 'MLP VAE', bench.quick)


def conv_likelihood(bench: Bench) -> Row:
  return _likelihood(bench, 'conv', 'convolutional VAE', bench.rounds)


def priors(bench: Bench) -> list[Row]:
  found = bench.ours('priors')
  rows = []
  for name, alone in (('sir', 'critic, 5,000 times'), ('langevin', 'critic and gradient, 101 times')):
    mine, bare, base = (found[key]['seconds'] for key in (name, alone, 'base'))
    what = {'sir': 'SIR, M = 5,000 proposals', 'langevin': 'Langevin, 100 steps'}[name]
    what += f': ms a sample of one group of 8x8x20, ours / {alone} (a draw of the base prior)'
    rows.append((what, f'{1e3 * mine:.1f} / {1e3 * bare:.1f} = **{mine / bare:.2f}** ({1e3 * base:.3f})', '< 1.2'))
  few, many = (found[key]['bytes'] / 2**20 for key in ('sir, a tenth', 'sir'))
  rows.append(('memory of SIR, M = 5,000 / M = 500', f'{many:.1f} / {few:.1f} MiB = **{many / few:.2f}**', 'flat'))
  return rows


def pipeline(bench: Bench) -> Row:
  images = statistics.median(bench.ours('pipeline') for _ in range(bench.rounds))
  eaten = bench.ours('step', 'mlp')['images']
  what = 'input pipeline: images a second, shuffled and batched, 28x28 in memory / what the fastest step here eats'
  return what, f'{images:,.0f} / {eaten:,.0f} = **{images / eaten:.0f}**', '> 5'


def loop(bench: Bench) -> Row:
  found = bench.ours('loop', bench.folder / 'loop')
  what = '1,000 steps of the MLP VAE in the loop, with batches and logs / the compiled step alone, wall seconds, medians of 9 pairs'
  figure = f'{found["loop"]:.2f} / {found["step"]:.2f}: **{found["over"]:+.1%}**'
  figure += f'; a batch handed to a compiled function takes a core {1e6 * found["batch"]:.0f} us'
  return what, figure, '< +5 %'


def checkpoint(bench: Bench) -> Row:
  found = bench.ours('checkpoint', bench.folder / 'checkpoints')
  what = 'asynchronous save of the NVAE: how long it holds up the loop / a step (all that it adds to 4 steps)'
  blocked, step, added = (1e3 * found[key] for key in ('blocked', 'step', 'added'))
  return what, f'{blocked:.0f} / {step:.0f} ms = **{blocked / step:.2f}** ({added:.0f} ms); {found["arrays"]} arrays', '< 1'


def startup(bench: Bench) -> Row:
  """Seconds from the command to the first step that is logged, compilation cache warm; the first run warms it."""
  env = {**os.environ, 'PYTHONPATH': str(ROOT / 'src'), 'JAX_COMPILATION_CACHE_DIR': str(bench.folder / 'cache')}
  seconds = []
  for i in range(bench.quick + 1):
    workdir = bench.folder / f'start{i}'
    command = [sys.executable, '-m', 'latentgen.main', f'--workdir={workdir}', *timing.START]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL) as process:
      metrics = workdir / 'metrics.jsonl'
      while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
      if process.poll() is not None:
        raise Failed('the smoke configuration does not run')
      seconds.append(time.perf_counter() - start)
      process.kill()
  parts = bench.ours('start', bench.folder / 'parts', JAX_COMPILATION_CACHE_DIR=env['JAX_COMPILATION_CACHE_DIR'])
  each = ', '.join(f'{name} {value:.1f} s' for name, value in parts.items())
  what = 'start: command to the first step of `nvae_nce.py:smoke`, compilation cache warm (a step is traced while the first state is read)'
  return what, f'**{statistics.median(seconds[1:]):.1f} s**; {each}', '< 8 s'


def accelerator(bench: Bench) -> list[Row]:
  if not bench.ours('devices'):
    raise Failed('no accelerator is at hand')
  rows = []
  for spec in ('cifar10', 'celeba64'):
    for dtype in ('bfloat16', 'float32'):
      rate = bench.ours('matmul_rate', dtype)
      for remat in (False, True):
        found = bench.ours('accelerator', f'experiments/nvae.py:{spec}', dtype, remat)
        what = f'NVAE {spec}, {dtype}{", rematerialised" if remat else ""}, batch {found["batch"]}: images a second, utilisation'
        used = found['flops'] / rate
        figure = f'{found["images"]:,.0f}; **{used:.0%}** of {rate / 1e12:.0f} TFLOP/s measured'
        figure += f'; {found["bytes"] / 2**30:.1f} GiB temporaries'
        rows.append((what, figure, 'stated'))
  return rows


ROWS: tuple[Callable[[Bench], Any], ...] = (
  mlp_step, conv_step, nvae_step, large_pages, depthwise, compilation, depth_memory, mlp_likelihood, conv_likelihood, likelihood_memory,
  priors, pipeline, loop, checkpoint, startup, accelerator,
)  # fmt: skip


def processor() -> str:
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    return next(line.split(': ', 1)[1] for line in lines if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


def conditions(bench: Bench) -> str:
  try:
    versions = bench.theirs('versions')
    peers = ', '.join(f'{name} {version}' for name, version in versions.items())
  except Failed as error:
    peers = f'no peer could be installed: {error}'
  when = datetime.date.today().isoformat()
  at_hand = bench.ours('devices')
  return (
    f'{when}, {processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, jax {importlib.metadata.version("jax")}; {peers}. '
    f'Large pages for all ({hugepages.VALUE}). Rates per CPU second are of one thread, medians of {bench.rounds} rounds '
    f'(MLP, NVAE and start: {bench.quick}), ours and the peer in turns. '
    f'Accelerator: {", ".join(at_hand) or "none at hand, so nothing below was measured on one"}.'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--peers', default='none was asked for', help="interpreter of the peers' environment")
  parser.add_argument('--out', help='file to write; default: print only')
  parser.add_argument('--rounds', type=int, default=3, help='repeats of what is compared with a peer, of which medians are taken')
  parser.add_argument('rows', nargs='*', choices=[[], *(row.__name__ for row in ROWS)], help='default: all')
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    bench = Bench(flags.peers, pathlib.Path(folder), flags.rounds)
    lines = ['# Benchmarks', '', f'Printed by `make bench ROUNDS={flags.rounds}`.', '', conditions(bench), '']
    lines += ['| what | figure | target |', '| --- | --- | --- |']
    print('\n'.join(lines), flush=True)
    for row in ROWS:
      if flags.rows and row.__name__ not in flags.rows:
        continue
      try:
        found = row(bench)
      except Failed as error:
        found = (row.__name__, f'not measured: {error}', '')
      for cells in found if isinstance(found, list) else [found]:
        lines.append(f'| {" | ".join(cells)} |')
        print(lines[-1], flush=True)
  if flags.out:
    pathlib.Path(flags.out).write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
  main()
