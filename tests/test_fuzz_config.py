"""Hostile config files, overrides and flags: each is taken, or refused in one line that names the key, the file or the flag."""

import os
import pathlib
import random
import subprocess
import sys
import warnings

from fuzzing import VALUES, WORDS, damage, little_memory, runs, survives
from ml_collections import ConfigDict
import pytest

from latentgen import assembly, config as configs, main as command, run as modes, sections
from latentgen.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def tiny() -> ConfigDict:
  """Two stages on a few points; everything that a config can hold."""
  adam = dict(name='adam', learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=1, schedule='cosine', weight_decay=0.0,
    clip_norm=1.0,
              rates=(('decoder', 0.5),))  # fmt: skip
  nce = dict(name='nce', coordinates='eps', channels=4, layers=1, proposals=3)
  return ConfigDict(dict(
    seed=0,
    data=dict(name='toy', batch_size=4, dims=2, train=8, valid=4, test=4),
    model=dict(name='vae', latent=2, hidden=(3,), likelihood='normal', scale=0.5),
    recipe=('vae', 'nce'),
    stages=dict(
      vae=dict(steps=3, method=dict(name='vae', free_bits=0.0), optim=dict(vae=adam), ema=dict(decoder=0.9), best='nelbo',
      patience_steps=0),
      nce=dict(steps=3, method=nce, optim=dict(critic=adam), load=dict(encoder='vae', decoder='vae')),
    ),
    evaluate=dict(tasks=('likelihood', 'samples'), likelihood=dict(samples=8)),
    mesh=dict(data=-1, fsdp=1, rules=(('.*', 'fsdp'),), min_shard_size=64),
    train=dict(log_every_steps=1, checkpoint_every_steps=2, keep_checkpoints=2),
    paper=({'name': 'x', 'paper': 1.0, 'ours': 'likelihood/elbo', 'note': ''},),
  )).lock()  # fmt: skip


def build(config: ConfigDict, workdir: pathlib.Path, overrides=()):
  """All that is done to a config before a run touches anything."""
  configs.override(config, dict(overrides))
  modes.tasks(config)
  return assembly.build(config, workdir)


def test_the_tiny_config_is_sound(tmp_path):
  found = build(tiny(), tmp_path)
  assert [s.name for s in found.recipe] == ['vae', 'nce'] and found.settings.batch_size == 4


KEYS = [*sections.flatten(tiny()), 'image_shape']
SECTIONS = ('data', 'model', 'stages', 'evaluate', 'mesh', 'train', 'stages.vae', 'stages.vae.method', 'stages.vae.optim',
  'stages.vae.optim.vae',
            'stages.nce.load', 'stages.vae.ema', 'evaluate.likelihood', 'strange')  # fmt: skip
STRANGE = ('', '.', '..', 'data', 'data.', '.data', 'data..name', 'stages', 'stages.vae', 'stages.vae.method.name.x',
  'model.items', 'model.lock',
           'model._fields', 'model.__class__', 'data.get', 'model.\u00e9', 'model. ', 'seed.x', 'recipe.0',
           'stages.vae.optim.vae.b1', 'x' * 4000,
           'a.' * 2000, 'stages.vae.optim.vae', 'model.scale_', 'model.activation', 'data.bits', 'data.pad',
           'data.labels_per_class',
           'data.labelled_copies', 'data.kind', 'data.noise', 'data.components', 'model.conv', 'model.log_scale',
           'model.dtype', 'model.mixtures',
           'model.image_shape', 'model.parent', 'stages.vae.method.net', 'stages.vae.method.steps', 'stages.vae.method.prior',
           'evaluate.likelihood.bounds', 'evaluate.samples.num', 'evaluate.grids', 'data.binarize',
           'stages.vae.optim.vae.eps')  # fmt: skip


def about(found) -> None:
  if isinstance(found, UserError):
    assert 'config.' in str(found), found


@runs(120, 5000)
def test_overrides(tmp_path, count):
  rng = random.Random(1)
  with little_memory():
    for _ in range(count):
      keys = [rng.choice(KEYS if rng.random() < 0.75 else STRANGE) for _ in range(rng.choice((1, 1, 2)))]
      overrides = {key: rng.choice(WORDS) for key in keys}
      about(survives(lambda overrides=overrides: build(tiny(), tmp_path, overrides), overrides))
  assert not list(tmp_path.iterdir())


@runs(120, 3000)
def test_values_in_the_file(tmp_path, count):
  rng = random.Random(2)
  with little_memory():
    for _ in range(count):
      config = tiny().copy_and_resolve_references()
      key, value = rng.choice([*KEYS, *SECTIONS]), rng.choice(VALUES)
      *parents, last = key.split('.')
      with config.unlocked(), config.ignore_type():
        node = config
        for part in parents:
          node = node[part]
        if rng.random() < 0.15 and last in node:
          del node[last]
        else:
          node[last] = ConfigDict(value) if isinstance(value, dict) and all(isinstance(k, str) for k in value) else value
      about(survives(lambda config=config: build(config, tmp_path), (key, value)))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('key, value, text', [
  ('model.hidden', '0', 'config.model.hidden is (0,), need positive whole numbers'),
  ('stages.nce.method.channels', '-1', 'config.stages.nce'),
  ('model.hidden', '(16_000_000, 16_000_000)', 'GiB of memory'),
  ('stages.vae.ema.encoder', '2.0', 'config.stages.vae.ema.encoder is 2.0'),
  ('stages.vae.optim.vae.weight_decay', 'nan', "config.stages.vae.optim.vae.weight_decay is float (0.0); 'nan' is not"),
  ('train.keep_checkpoints', '0', 'config.train.keep_checkpoints is 0'),
  ('mesh.rules', "(('(', 'fsdp'),)", 'no regular expression'),
  ('stages.vae.best', 'nelb', "config.stages.vae.best is no validation metric of the stage; did you mean 'nelbo'"),
  ('mesh.min_shard_size', '0', 'config.mesh.min_shard_size is 0'),
  ('train.accumulate', '17', 'the 17 parts of config.train.accumulate'),
  ('model.scale', '1e400', 'finite'),
  ('seed', '-1', 'config.seed is -1'),
  ('model.latent', '2.5', 'config.model.latent is int (2); 2.5 is not'),
  ('model.activation', '3', "config.model.activation is 3, need str"),
  ('stages.nce.method.layers', '1' + '0' * 12,
  'config.stages.nce.method.layers is 1000000000000, need a whole number of at most'),
])  # fmt: skip
def test_what_only_shapes_or_sizes_show(tmp_path, key, value, text):
  def shapes():
    config = tiny()
    if key.endswith('.encoder'):
      with config.unlocked():
        config.stages.vae.ema.encoder = 0.5
    assembly.check_shapes(build(config, tmp_path, {key: value}))

  found = survives(shapes, (key, value))
  assert isinstance(found, UserError) and text in str(found), found
  assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- experiment files

WHOLE = (ROOT / 'experiments' / 'vae_nce.py').read_text()
LITTLE = '''"""A title."""
from ml_collections import ConfigDict

VARIANTS = ('smoke',)


def get_config(variant=''):
  return ConfigDict({'seed': 0, 'data': {'name': 'toy', 'batch_size': 4}, 'model': {'name': 'vae'}, 'recipe': (), 'stages': {}})


def sweep(name):
  return {'seeds': [{'seed': 0}, {'seed': 1}]}[name]
'''
BODIES = (
  '1 / 0', 'raise SystemExit(0)', 'raise SystemExit("x\\ny")', 'import sys; sys.exit(3)', 'raise Exception',
  'raise KeyError("a\\nb")', 'return',
  'return None', 'return 3', 'return {}', 'return {"data": 1}', 'return []', 'return ConfigDict', 'return ConfigDict()',
  'return lambda: 0',
  'return ConfigDict({"data": 3})', 'return ConfigDict({"data": {}, "model": {}, "recipe": "x", "stages": {}})',
  'return get_config(variant)',
  'return ConfigDict({1: 2})', 'return open("/dev/null")', 'yield 3', 'import nothing_of_that_name',
  'from latentgen import nothing',
  'raise MemoryError', 'raise RecursionError', 'raise StopIteration', 'assert False',
  'return ConfigDict({"seed": None}).seed.x',
)  # fmt: skip
TEXTS = (
  b'', b'\0', b'\xff\xfe', b'\x80', b'def', b'x = 1', b'get_config = 3', b'get_config = None', b'# -*- coding: nothing -*-',
  b'(' * 500, b'x = ' + b'9' * 5000,
  b'raise SystemExit', b'import sys\nsys.exit(0)', b'1/0', b'  indented', b'class get_config: pass', b'def get_config(): pass',
  b'def get_config(a, b): pass', b'\xef\xbb\xbf' + LITTLE.encode(), LITTLE.replace("('smoke',)", '3').encode(),
  LITTLE.replace("('smoke',)", '(1, None)').encode(),
  LITTLE.replace("('smoke',)", "'smoke'").encode(), LITTLE.replace("('smoke',)", 'None').encode(),
  *(LITTLE.replace('return ConfigDict(', f'{body}\n  return ConfigDict(').encode() for body in BODIES),
)  # fmt: skip


def load(path, variant, tmp_path):
  file, config = configs.load(f'{path}:{variant}' if variant else str(path))
  command.sweep(file, None, None)
  return build(config, tmp_path / 'run', {'seed': '1'})


@runs(60, 1500)
def test_experiment_files(tmp_path, count):
  rng, path = random.Random(3), tmp_path / 'experiment.py'
  others = [t.encode() for t in (WHOLE, LITTLE)]
  for i in range(count):
    text = TEXTS[i] if i < len(TEXTS) else damage(rng, LITTLE.encode(), others)
    path.write_bytes(text)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of Python's compiler, about the file
      found = survives(lambda: load(path, rng.choice(('', '', 'smoke', 'x')), tmp_path), text)
    assert isinstance(found, UserError) and ('--config' in str(found) or 'config.' in str(found)), found
  assert sorted(p.name for p in tmp_path.iterdir()) in (['__pycache__', 'experiment.py'], ['experiment.py'])


def test_places_of_experiments(tmp_path):
  loop = tmp_path / 'loop.py'
  loop.symlink_to(loop)
  (tmp_path / 'folder.py').mkdir()
  for place in (*WORDS, tmp_path, tmp_path / 'folder.py', loop, tmp_path / 'none.py', '/dev/null', '/proc/self/mem', ':',
    '::', ':smoke'):
    found = survives(lambda place=place: configs.load(str(place)), place)
    assert isinstance(found, UserError) and '--config' in str(found), found


# ---------------------------------------------------------------------------------------------- flags

FLAGS = ('--config', '--workdir', '--mode', '--distributed', '--sweep', '--sweep_index', '--num', '--sampler',
  '--temperature', '--config.', '--config.a',
         '--config.data', '--', '-', '---', '-h', '-x', '--Mode', '--config=', '=', '')  # fmt: skip


@runs(300, 5000)
def test_flags(count):
  rng = random.Random(4)
  for _ in range(count):
    argv = [rng.choice(FLAGS) + rng.choice(('', '=', '=' + rng.choice(WORDS),
      rng.choice(WORDS))) for _ in range(rng.choice((1, 1, 2, 3)))]
    argv = [a for a in [*argv, *rng.choice(([], ['--config=x.py']))] if a not in ('-h', '--help')]
    found = survives(lambda argv=argv: command.parse(argv), argv)
    assert isinstance(found, UserError) or found[0].mode in command.MODES


# ---------------------------------------------------------------------------------------------- the command itself

NCE = f'--config={ROOT / "experiments" / "vae_nce.py"}:smoke'
LIE = bytes((0, 0, 8, 3)) + b'\xff\xff\xff\xff' + b'\0\0\x0f\xff' * 2
COMMANDS = [
  (['--config={tmp}/exits.py'], 'exits.py cannot be loaded: SystemExit'),
  (['--config={tmp}/raises.py'], "get_config('') failed: ZeroDivisionError"),
  ([NCE, '--config.model.hidden=' + '(' * 3000], 'config.model.hidden is'),
  ([NCE, '--config.data.batch_size=1' + '0' * 30], 'config.data.batch_size'),
  ([NCE, '--config.stages.vae.method.\u00e9\u202e=1'], 'config.stages.vae.method'),
  ([NCE, '--config.seed=nan'], "config.seed is int (0); 'nan' is not"),
  ([NCE, '--config.model.hidden=0'], 'config.model.hidden is (0,)'),
  ([NCE, '--config.data.name=idx', '--config.data.path={tmp}/idx'], 'train-images-idx3-ubyte: truncated'),
  ([NCE, '--config.data.name=folder', '--config.data.path={tmp}/pictures'], '.png cannot be decoded'),
  ([NCE, '--config.data.name=npz', '--config.data.path={tmp}/idx'], 'is not a file'),
  ([NCE, '--sweep=seeds', '--sweep_index=first'], '--sweep_index: invalid int value'),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('args, text', COMMANDS, ids=[text for _, text in COMMANDS])
def test_command_line(tmp_path, args, text):
  (tmp_path / 'exits.py').write_text('raise SystemExit(0)')
  (tmp_path / 'raises.py').write_text('def get_config(variant):\n  1 / 0\n')
  for folder, name, content in (('idx', 'train-images-idx3-ubyte', LIE), ('pictures', '{}.png', b'\x89PNG\r\n\x1a\n')):
    (tmp_path / folder).mkdir()
    for i in range(3):
      (tmp_path / folder / name.format(i)).write_bytes(content)
  files = lambda: sorted(p for p in tmp_path.rglob('*') if '__pycache__' not in p.parts)
  before = files()
  done = subprocess.run(
    [sys.executable, '-m', 'latentgen.main', *(a.replace('{tmp}', str(tmp_path)) for a in args),
    f'--workdir={tmp_path / "run"}'],
    capture_output=True, text=True, timeout=60, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT / 'src')},
  )  # fmt: skip
  assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1, done.stderr
  assert done.stderr.startswith('latentgen: ') and text in done.stderr
  assert files() == before
