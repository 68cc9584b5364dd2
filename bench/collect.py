"""Collects results.json of several work directories into one table: mean and spread over seeds.

usage: python bench/collect.py [--only=PREFIX ...] WORKDIR ...
"""

import json
import pathlib
import statistics
import sys


def main(args: list[str]) -> None:
  prefixes = tuple(a.removeprefix('--only=') for a in args if a.startswith('--only='))
  runs = [json.loads((pathlib.Path(a) / 'results.json').read_text()) for a in args if not a.startswith('--')]
  if not runs:
    sys.exit(__doc__)
  print('| result | unit | each run | mean | standard deviation over runs |\n| --- | --- | --- | --- | --- |')
  for name in runs[0]:
    if (not prefixes or name.startswith(prefixes)) and all(name in run for run in runs):
      values = [run[name]['value'] for run in runs]
      spread = f'{statistics.stdev(values):.3f}' if len(values) > 1 else ''
      each = ', '.join(f'{v:.3f}' for v in values)
      print(f'| {name} | {runs[0][name]["unit"]} | {each} | {statistics.fmean(values):.3f} | {spread} |')


if __name__ == '__main__':
  main(sys.argv[1:])
