"""Work directories that are damaged, alien or in the way: read, or refused in one line, and never written to by a look."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

from fuzzing import WORDS, little_memory, mutated, runs, survives
import jax
import pytest

from latentgen import config as configs, sections, workdir as workdirs
from latentgen.errors import UserError
from latentgen.files import TEMPORARY
from latentgen.train import checkpoint, sharding, writers

MINE = {
  'experiment': 'vae_nce', 'variant': 'smoke', 'config': {'seed': 0, 'model': {'name': 'vae', 'hidden': [3]}, 'train': {'log_every_steps': 5}},
  'overrides': {}, 'versions': {'jax': '0'}, 'seed': 0, 'mesh': {'data': 1, 'fsdp': 1},
}  # fmt: skip
ROWS = [{'step': s, 'stage': stage, 'split': 'train', 'loss': 0.5} for stage in ('vae', 'nce') for s in (1, 2, 3)]


@runs(200, 5000)
def test_config_json(tmp_path, count):
  rng, path = random.Random(1), tmp_path / 'config.json'
  with little_memory():
    for _ in range(count):
      bad = mutated(rng, MINE)
      path.write_bytes(bad)
      found = survives(lambda: workdirs.check(tmp_path, MINE), bad)
      assert not isinstance(found, UserError) or str(tmp_path) in str(found)
      assert path.read_bytes() == bad and len(list(tmp_path.iterdir())) == 1


def test_what_decides_nothing_may_change_in_a_finished_run(tmp_path):
  row = {'name': 'log p(x)', 'paper': -80.0}
  before = {**MINE, 'config': {**MINE['config'], 'paper': [row]}}
  (tmp_path / 'config.json').write_text(json.dumps(before))
  for paper in ([{**row, 'paper': -80.5}], [row, row], []):
    workdirs.check(tmp_path, {**before, 'config': {**MINE['config'], 'paper': paper}})
  workdirs.check(tmp_path, MINE)
  with pytest.raises(UserError, match='was made with config.seed = 0, not 1'):
    workdirs.check(tmp_path, {**before, 'config': {**before['config'], 'seed': 1}})


@runs(100, 2000)
def test_rewind(tmp_path, count):
  rng, path = random.Random(2), tmp_path / 'metrics.jsonl'
  for _ in range(count):
    lines = [json.dumps(row).encode() for row in ROWS]
    for _ in range(rng.choice((1, 2))):
      place = rng.randrange(len(ROWS))
      lines[place : place + rng.randrange(2)] = [mutated(rng, ROWS[place])]
    path.write_bytes(b'\n'.join(lines))
    survives(lambda: writers.Metrics(tmp_path).rewind('nce', 2), path.read_bytes())
    path.unlink(missing_ok=True)
    assert not list(tmp_path.iterdir())


@runs(100, 2000)
def test_seconds(tmp_path, count):
  rng, path = random.Random(3), tmp_path / 'seconds.json'
  for _ in range(count):
    path.write_bytes(mutated(rng, {'vae': 1.5, 'nce': 2.0}))
    survives(lambda: writers.Clock(tmp_path).add('vae'), path.read_bytes())
    assert [p.name for p in tmp_path.iterdir()] == ['seconds.json']


STRAY = ('', '-1', '+3', '007', '9' * 30, '\u0663', '\u00b2', '1.5', '1e3', 'x', 'tmp', '3.orbax-checkpoint-tmp-1', ' 4', '0x2', 'None')


@runs(200, 1000)
def test_names_in_a_checkpoint_folder(tmp_path, count):
  rng = random.Random(4)
  for i in range(count):
    folder = tmp_path / str(i)
    folder.mkdir()
    for name in rng.sample(STRAY, 4):
      place = folder / (name or 'empty')
      kind = rng.randrange(4)
      if kind == 0:
        place.mkdir()
      elif kind == 1:
        place.write_bytes(b'')
      elif kind == 2:
        place.symlink_to(tmp_path)
      else:
        place.symlink_to(place)
    survives(lambda folder=folder: checkpoint.Checkpoints(folder).latest(), sorted(folder.iterdir()))


def test_links_and_folders_in_place_of_files(tmp_path):
  outside, workdir = tmp_path / 'outside', tmp_path / 'run'
  outside.write_text('mine')
  for name in ('.lock', *(f'{name}{TEMPORARY}' for name in ('config.json', 'metrics.jsonl', 'seconds.json'))):
    workdir.mkdir()
    (workdir / name).symlink_to(outside)
    (workdir / 'metrics.jsonl').write_text('torn\n')

    def use():
      with workdirs.claim(workdir, MINE):
        writers.Metrics(workdir).rewind('vae', 1)
        writers.Clock(workdir).add('vae')

    found = survives(use, name)
    assert isinstance(found, UserError) == (name == '.lock')
    assert outside.read_text() == 'mine'
    shutil.rmtree(workdir)
  for name in ('config.json', 'metrics.jsonl', 'seconds.json'):
    (workdir / name).mkdir(parents=True)
    calls = {
      'config.json': lambda: workdirs.read(workdir), 'metrics.jsonl': lambda: writers.Metrics(workdir).rewind('vae', 1),
      'seconds.json': lambda: writers.Clock(workdir),
    }  # fmt: skip
    found = survives(calls[name], name)
    assert isinstance(found, UserError) and name in str(found)
    shutil.rmtree(workdir)
  os.mkfifo(tmp_path / 'config.json')  # reading it would wait for ever
  assert 'is damaged' in str(survives(lambda: workdirs.read(tmp_path), 'fifo'))


def test_what_a_kill_leaves_of_config_json_is_no_other_run(tmp_path):
  (tmp_path / 'config.json.tmp').write_text('{"experiment": "va')
  (tmp_path / '.lock').touch()
  workdirs.check(tmp_path, MINE)
  with workdirs.claim(tmp_path, MINE):
    assert workdirs.read(tmp_path) == MINE
  assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'config.json']
  (tmp_path / 'config.json').rename(tmp_path / 'other.json')
  with pytest.raises(UserError, match='holds files but no run'):
    workdirs.check(tmp_path, MINE)


def test_config_json_that_another_process_writes_between_two_looks_is_read(tmp_path, monkeypatch):
  with workdirs.claim(tmp_path, MINE):
    pass
  for mine, said in ((MINE, None), ({**MINE, 'variant': 'mnist'}, 'holds experiment vae_nce:smoke, not vae_nce:mnist')):
    looks = iter((None, workdirs.read(tmp_path)))
    with monkeypatch.context() as patched:
      patched.setattr(workdirs, 'read', lambda workdir, looks=looks: next(looks))
      found = survives(lambda mine=mine: workdirs.check(tmp_path, mine), mine['variant'])
    assert said in str(found) if said else found is None


def test_paths_of_work_directories(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for word in WORDS:
    if '\0' not in word and '\ud800' not in word:  # no argument of a command holds them
      survives(lambda word=word: workdirs.check(pathlib.Path(word), MINE), word)
  assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- the command line itself

ROOT = pathlib.Path(__file__).parents[1]


def snapshot(folder):
  return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}


@pytest.fixture
def begun(tmp_path):
  """The folder of a run of vae_nce.py:smoke that was stopped before its first step."""
  file, config = configs.load(f'{ROOT}/experiments/vae_nce.py:smoke')
  mine = workdirs.describe(file, sections.plain(config), {}, sharding.make_mesh(devices=jax.devices()[:1]))
  with workdirs.claim(tmp_path / 'run', mine):
    pass
  (tmp_path / 'run' / 'metrics.jsonl').write_text('')
  return tmp_path / 'run'


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, spoil, args, said',
  [
    ('config.json', lambda p: p.write_bytes(p.read_bytes()[:100]), ['vae_nce.py:smoke'], 'take another --workdir'),
    ('metrics.jsonl', lambda p: (p.unlink(), p.mkdir()), ['vae_nce.py:smoke'], 'move it away'),
    (
      'results.json', lambda p: p.write_text('{"likelihood/elbo": {"value": "1'),
      ['nvae_nce.py:smoke', '--sweep=seeds', '--mode=collect'], 'cannot be read',
    ),
  ],
  ids=['config', 'metrics', 'results'],
)  # fmt: skip
def test_the_command_refuses_in_one_line_and_changes_nothing(begun, name, spoil, args, said):
  if name == 'results.json':
    begun = begun.rename(begun.with_name('seeds-0')).parent
    spoilt = begun / 'seeds-0' / name
  else:
    spoilt = begun / name
  spoil(spoilt)
  before = snapshot(begun)
  command = [sys.executable, '-m', 'latentgen.main', f'--config={ROOT}/experiments/{args[0]}', *args[1:], f'--workdir={begun}']
  env = {**os.environ, 'PYTHONPATH': str(ROOT / 'src')}
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 2, done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith('latentgen: ') and str(spoilt) in last and said in last and 'Traceback' not in done.stderr
  assert name == 'metrics.jsonl' or done.stderr.count('\n') == 1  # that one is found when the run has begun to speak
  assert snapshot(begun) == before
