"""The command line: what it refuses, and whole runs of it."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentgen import config as configs, evaluate as evaluation, main as command, run as modes, sections
from latentgen.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
NCE = str(ROOT / 'experiments' / 'vae_nce.py') + ':smoke'


def run(*args, **kwargs):
  env = {**os.environ, 'PYTHONPATH': str(ROOT / 'src'), **kwargs.pop('env', {})}
  return subprocess.run(
    [sys.executable, '-m', 'latentgen.main', *args], capture_output=True, text=True, timeout=600, cwd=ROOT, env=env, **kwargs
  )


def snapshot(folder):
  return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob('*')}


# ---------------------------------------------------------------------------------------------- bad input

BAD = [
  (['--config.data.batchsize=3'], 'config.data.batchsize does not exist; did you mean config.data.batch_size?'),
  (['--config.stages.vae.stepz=3'], 'did you mean config.stages.vae.steps?'),
  (['--config.stages.vae.steps=many'], "config.stages.vae.steps is int"),
  (['--config.stages.vae.steps=1.5'], "config.stages.vae.steps is int"),
  (['--config.stages.vae=3'], 'config.stages.vae is a section'),
  (['--config.stages.vae.frozen=3'], 'config.stages.vae.frozen does not exist; known: best, ema, load, method, optim, patience_steps, st'),
  (['--config.vae.steps=3'], 'config.vae does not exist; did you mean config.stages.vae?'),
  (['--config.stages.vea.steps=3'], 'config.stages.vea does not exist; did you mean config.stages.vae?'),
  (['--config.stages.vae.steps=0'], 'config.stages.vae.steps is 0'),
  (['--config.stages.vae.steps=-1'], 'config.stages.vae.steps is -1'),
  (['--config.stages.vae.optim.vae.learning_rate=-1.0'], 'config.stages.vae.optim.vae.learning_rate is -1.0'),
  (['--config.stages.vae.optim.vae.name=adm'], "is no optimiser of optax; did you mean 'adam'?"),
  (['--config.evaluate.likelihood.samples=0'], 'config.evaluate.likelihood.samples'),
  (['--config.evaluate.likelihood.bouns=5'], "config.evaluate.likelihood.bouns: unknown option; did you mean 'bounds'"),
  (['--config.evaluate.likelihood.limit=-3'], 'config.evaluate.likelihood.limit: must be an integer of at least 1, not -3'),
  (['--config.evaluate.likelihood.bounds=5'], 'config.evaluate.likelihood.bounds: must be tuple[int], not 5'),
  (['--config.evaluate.two_sample.split=tst'], "config.evaluate.two_sample.split: unknown value 'tst'; did you mean 'test'?"),
  (['--config.evaluate.two_sample.limit=1'], 'config.evaluate.two_sample.limit (images found): must be an integer of at least 10'),
  (["--config.evaluate.frechet.samplers=('sirr',)"], "config.evaluate.frechet.samplers: unknown value 'sirr'"),
  (['--config.evaluate.frechet.limit=3'], 'config.evaluate.frechet.limit (images found): must be an integer of at least 20'),
  (["--config.evaluate.samples.parts=('sampler',)"], "config.evaluate.samples.parts: unknown value 'sampler'"),
  (["--config.evaluate.samples.temperatures=(-1.0,)"], 'config.evaluate.samples.temperatures: must be positive, not -1.0'),
  (["--config.evaluate.tasks=('likelihood','uncertainty')"], "'uncertainty' needs a Gaussian decoder"),
  (["--config.evaluate.tasks=('gradient_snr',)"], "'gradient_snr' needs methods.iwae, not NCE"),
  (['--config.evaluate.anomaly.lowr=mode'], "config.evaluate.anomaly.lowr: unknown option; did you mean 'lower'?"),
  (['--config.evaluate.anomly.lower=mode'], 'config.evaluate.anomly does not exist; did you mean config.evaluate.anomaly?'),
  (["--config.evaluate.tasks=('anomaly',)", '--config.evaluate.anomaly.outliers=nois'], "config.evaluate.anomaly.outliers names 'nois'"),
  (['--config.evaluate.anomaly=3'], 'config.evaluate.anomaly is a section'),
  (['--config.stages.vae.bst=nelbo'], 'config.stages.vae.bst does not exist; did you mean config.stages.vae.best?'),
  (['--config.stages.vae.best=nelb'], "config.stages.vae.best is no validation metric of the stage; did you mean 'nelbo'"),
  (['--config.stages.vae.patience_steps=-1'], 'config.stages.vae.patience_steps is -1'),
  (['--config.stages.vae.ema.encodr=0.9'], 'config.stages.vae.ema.encodr: no such parameter group'),
  (['--config.stages.nce.load.critic=vea'], "config.stages.nce.load.critic names stage 'vea'"),
  (['--config.image_shap=(8,8,1)'], 'config.image_shap does not exist; did you mean config.image_shape?'),
  (['--config.paper=3'], 'config.paper holds 3, need rows dict(name='),
  (["--config.paper=({'name':'x','when':3},)"], 'config.paper holds a row with when = 3'),
  (["--config.paper=({'name':'x','ours':3},)"], 'config.paper holds a row with ours = 3'),
  (['--config.stages.vae.method.free_bitz=1.0'], "free_bitz does not exist; did you mean 'free_bits'?"),
  (['--config.stages.vae.optim.vae.nesterof=True'], "nesterof does not exist; did you mean 'nesterov'?"),
  (["--config.evaluate.tasks=('likelyhood',)"], 'likelyhood'),
  (['--config.stages.nce.method.proposals=0'], 'method.proposals is 0'),
  (['--config.stages.nce.method.step_size=-0.05'], 'config.stages.nce.method.step_size is -0.05, need a positive number'),
  (['--config.stages.nce.method.step_size=0'], 'config.stages.nce.method.step_size is 0.0, need a positive number'),
  (['--config.stages.nce.method.channels=0'], 'config.stages.nce.method.channels is 0, need at least 1'),
  (['--config.stages.nce.method.layers=0'], 'config.stages.nce.method.layers is 0, need at least 1'),
  (['--config.stages.nce.method.blocks=AC'], "config.stages.nce.method.blocks is 'AC'"),
  (['--config.stages.vae.method.beta=-1'], 'config.stages.vae.method.beta is -1'),
  (['--config.stages.vae.method.warmup_portion=1.5'], 'config.stages.vae.method.warmup_portion is 1.5, need a share of the stage'),
  (['--config.stages.vae.method.warmup_start=-0.1'], 'config.stages.vae.method.warmup_start is -0.1, need a share of the stage'),
  (['--config.stages.nce.method.coordinates=w'], "method.coordinates is 'w'"),
  (["--config.recipe=('nce',)"], 'config.stages.nce.load.decoder names stage'),
  (["--config.recipe=('vae','nse')"], "names stage 'nse'; did you mean 'nce'?"),
  (['--config.data.name=digitz'], "did you mean 'digits'?"),
  (['--config.data.batch_size=0'], 'config.data.batch_size is 0'),
  (['--config.data.batch_size=5000'], 'config.data.batch_size'),
  (['--config.model.name=vay'], "did you mean 'vae'?"),
  (['--config.model.likelihood=poisson'], 'poisson'),
  (['--config.model.latent=-2'], 'config.model.latent is -2, need a positive whole number'),
  (['--config.model.mixtures=0'], 'config.model.mixtures is 0, need a positive whole number'),
  (['--config.model.bits=0'], 'config.model.bits is 0, need a positive whole number'),
  (['--config.model.likelihood=bernoulli'], "config.model.likelihood = 'bernoulli' is over black and white, and config.data.binarize"),
  (['--config.data.bits=5'], 'config.model.bits is 4 and config.data.bits is 5'),
  (['--config.data.dequantize=True'], "config.model.likelihood = 'dmol' is over whole grey levels, and config.data.dequantize is True"),
  (['--config.data.bits=8', '--config.data.binarize=fresh'], "config.model.likelihood = 'dmol' is over grey levels, and config.data.bina"),
  (['--config.mesh.fsdp=3'], 'config.mesh.fsdp is 3'),
  (['--config.mesh.min_shard_size=0'], 'config.mesh.min_shard_size is 0'),
  (['--config.mesh.rule=0'], "config.mesh.rule does not exist; did you mean 'rules'?"),
  (['--config.seed=x'], 'config.seed is int'),
  (['--mode=trane'], 'invalid choice'),
  (['--confg=x'], 'unknown flag --confg; did you mean'),
  (['--num=0', '--mode=sample'], '--num is 0'),
  (['--mode=evaluate'], 'holds no run'),
  (['--workdir='], '--workdir is empty'),
  (['--num=8'], '--num needs --mode=sample'),
  (['--mode=evaluate', '--sampler=base'], '--sampler needs --mode=sample'),
  (['--temperature=0.5'], '--temperature needs --mode=sample'),
  (['--sweep=x'], 'no sweep of that name'),
  (['--sweep=seeds', '--sweep_index=3'], 'has 3 runs'),
  (['--sweep=seeds', '--config.seed=7'], '--config.seed is set by sweep seeds; leave it out'),
  (['--sweep=seeds', '--sweep_index=0', '--config.seed=7'], '--config.seed is set by sweep seeds; leave it out'),
  (['stray'], 'stray'),
]  # fmt: skip


@pytest.mark.parametrize('args, message', BAD, ids=[' '.join(a) for a, _ in BAD])
def test_bad_input_is_one_line_that_names_the_key_and_touches_nothing(tmp_path, args, message):
  workdir = tmp_path / 'run'
  with pytest.raises(UserError) as error:
    command.main([f'--config={NCE}', f'--workdir={workdir}', *args])
  assert message in str(error.value) and '\n' not in str(error.value)
  assert not workdir.exists()


def test_a_key_inside_a_prior_is_named_once(tmp_path):
  args = [f'--config={ROOT / "experiments" / "pae.py"}:smoke', f'--workdir={tmp_path / "run"}']
  with pytest.raises(UserError, match='^config.stages.density.method.prior.knots is 0, need a whole number of at least 2'):
    command.main([*args, '--config.stages.density.method.prior.knots=0'])


@pytest.mark.parametrize(
  'network, option, value',
  [
    ('nvae', 'latent', 0),
    ('nvae', 'channels', 0),
    ('nvae', 'cells_decoder', 0),
    ('nvae', 'mixtures', 0),
    ('nvae', 'bits', -1),
    ('nvae', 'flows', -1),
    ('biva', 'bits', 0),
    ('biva', 'mixtures', 0),
    ('ddgan', 'latent', -1),
    ('iwae', 'latents', (0,)),
    ('iwae', 'hidden', ((0,),)),
  ],
)
def test_sizes_of_networks_are_refused_by_their_key(tmp_path, network, option, value):
  args = [f'--config={ROOT / "experiments" / network}.py:smoke', f'--workdir={tmp_path / "run"}']
  with pytest.raises(UserError, match=re.escape(f'config.model.{option} is {value}')):
    command.main([*args, f'--config.model.{option}={value}'])


@pytest.mark.parametrize(
  'spec, message',
  [
    ('experiments/vae_nce.py:smok', "has no variant 'smok'; did you mean 'smoke'?"),
    ('experiments/vae_nces.py', "there is no file 'experiments/vae_nces.py'; did you mean 'experiments/vae_nce.py'?"),
    ('vae_nce.py', "there is no file 'vae_nce.py'; did you mean 'experiments/vae_nce.py'?"),
    ('vae_nce:smoke', "there is no file 'vae_nce'; did you mean 'experiments/vae_nce.py'?"),
    ('nowhere/vae_nce.py', "did you mean 'experiments/vae_nce.py'?"),
    ('Makefile', 'not a Python file'),
  ],
)
def test_bad_config_files(monkeypatch, spec, message):
  monkeypatch.chdir(ROOT)
  with pytest.raises(UserError) as error:
    command.main([f'--config={spec}'])
  assert message in str(error.value)


def test_broken_config_file_says_what_is_broken(tmp_path):
  for text, message in (('x = 1/0', 'ZeroDivisionError'), ('x = 1', 'defines no get_config'), ('def', 'SyntaxError')):
    (tmp_path / 'broken.py').write_text(text)
    with pytest.raises(UserError, match=message):
      command.main([f'--config={tmp_path / "broken.py"}'])


@pytest.mark.parametrize('section, key', [('debug', 'nan_chek'), ('mesh', 'dta')])
def test_keys_that_a_file_misspells(section, key):
  _, config = configs.load(NCE)
  with config.unlocked():
    config[section] = {key: True}
  with pytest.raises(UserError, match=f'config.{section}.{key} does not exist; did you mean'):
    sections.check(config)


def test_the_papers_numbers_are_rows():
  config = sections.plain(configs.load(NCE)[1])
  with pytest.raises(UserError, match='config.paper is .*, need a tuple of rows'):
    sections.check({**config, 'paper': dict(name='x', paper=1.0)})


def test_damaged_idx_files_and_empty_folders(tmp_path):
  def refuse(*args):
    with pytest.raises(UserError) as error:
      command.main([f'--config={NCE}', f'--workdir={tmp_path / "run"}', '--mode=train', *args])
    assert not (tmp_path / 'run').exists()
    return str(error.value)

  experiment = tmp_path / 'files.py'
  experiment.write_text(
    'import sys\nsys.path.insert(0, %r)\nimport vae_nce\nVARIANTS = ("smoke",)\n'
    'def get_config(variant):\n  c = vae_nce.get_config("smoke")\n'
    '  with c.unlocked():\n    c.data = dict(name="idx", path=%r, batch_size=2)\n  return c\n'
    % (str(ROOT / 'experiments'), str(tmp_path / 'data'))
  )
  args = [f'--config={experiment}']
  (tmp_path / 'data').mkdir()
  assert str(tmp_path / 'data') in refuse(*args)
  images = np.zeros((4, 8, 8), np.uint8)
  good = b'\0\0\x08\x03' + b''.join(n.to_bytes(4, 'big') for n in images.shape) + images.tobytes()
  for name in ('train', 't10k'):
    (tmp_path / 'data' / f'{name}-images-idx3-ubyte').write_bytes(good)
    (tmp_path / 'data' / f'{name}-labels-idx1-ubyte').write_bytes(b'\0\0\x08\x01\0\0\0\x04' + bytes(4))
  path = tmp_path / 'data' / 'train-images-idx3-ubyte'
  for bad in (good[:-5], b'\1\2\x08\x03' + good[4:]):
    path.write_bytes(bad)
    assert path.name in refuse(*args)
  experiment.write_text(experiment.read_text().replace('"idx"', '"folder"'))
  for p in (tmp_path / 'data').iterdir():
    p.unlink()
  assert str(tmp_path / 'data') in refuse(*args)


def test_exit_status_and_no_traceback():
  done = run(f'--config={NCE}', '--config.stages.vae.stepz=3')
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1 and done.stderr.startswith('latentgen: config.stages.vae.stepz')
  assert done.stdout == ''


def test_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  for place, message in ((tmp_path / 'file', 'is a file'), (pathlib.Path('/proc/latentgen'), 'cannot be written')):
    with pytest.raises(UserError, match=message):
      command.main([f'--config={NCE}', f'--workdir={place}'])


def test_data_can_come_from_elsewhere_by_flags(tmp_path):
  from latentgen import assembly, config as configs, sections

  np.savez(tmp_path / 'images.npz', images=np.zeros((40, 8, 8, 1), np.uint8))
  _, config = configs.load(f'{ROOT / "experiments" / "nvae.py"}:mnist')
  configs.override(config, {'data.name': 'npz', 'data.path': str(tmp_path / 'images.npz'), 'data.batch_size': '4'})
  assert sections.plain(config.data) == {
    'name': 'npz', 'path': str(tmp_path / 'images.npz'), 'batch_size': 4, 'binarize': 'fresh'
  }  # fmt: skip
  splits, _, batch = assembly.build_data(sections.plain(config.data), 0)
  assert splits['train'].shape == (8, 8, 1) and batch == 4
  configs.override(config, {'data.colour': '1'})
  # Options that only the code behind a section knows; it is what refuses unknown ones.
  configs.override(config, {'evaluate.likelihood.bounds': '(8, 64)', 'stages.vae.method.free_bits': '0.5'})
  assert config.evaluate.likelihood.bounds == (8, 64) and config.stages.vae.method.free_bits == 0.5
  with pytest.raises(UserError, match='config.data.colour'):
    assembly.build_data(sections.plain(config.data), 0)


def test_a_key_of_one_section_leaves_another_that_was_made_from_the_same_dict(tmp_path):
  """References say that keys go together; sections that happen to be one object do not."""
  (tmp_path / 'twins.py').write_text(
    'from ml_collections import ConfigDict\n'
    'def get_config(variant):\n'
    '  both = dict(rate=1.0, inner=dict(width=2))\n'
    '  c = ConfigDict(dict(data={}, one=both, other=both, rate=3.0))\n'
    '  c.follows = c.get_ref("rate")\n'
    '  return c\n'
  )
  _, config = configs.load(str(tmp_path / 'twins.py'))
  configs.override(config, {'one.rate': '5.0', 'other.inner.width': '7', 'rate': '4.0'})
  assert config.one.to_dict() == {'rate': 5.0, 'inner': {'width': 2}}
  assert config.other.to_dict() == {'rate': 1.0, 'inner': {'width': 7}}
  assert config.follows == config.rate == 4.0


def test_what_a_file_leaves_out_can_be_set(tmp_path):
  (tmp_path / 'bare.py').write_text(
    'from ml_collections import ConfigDict\n'
    'def get_config(variant):\n'
    '  return ConfigDict(dict(data={}, model={}, recipe=("vae",), stages=dict(vae=dict(steps=3, ema=dict(decoder=0.9)))))\n'
  )
  _, config = configs.load(str(tmp_path / 'bare.py'))
  values = {
    'evaluate.tasks': "('anomaly',)", 'evaluate.anomaly.outliers': 'noise', 'evaluate.anomaly.samples': '3',
    'evaluate.frechet.limit': 'None', 'image_shape': '(8, 8, 1)', 'mesh.data': '1', 'train.log_every_steps': '5',
    'stages.vae.best': 'nelbo', 'stages.vae.patience_steps': '2', 'stages.vae.ema.encoder': '0.5', 'stages.vae.load.decoder': 'vae',
  }  # fmt: skip
  configs.override(config, values)
  sections.check(config)
  assert modes.tasks(config) == {'anomaly': {'outliers': 'noise', 'samples': 3}}
  assert config.evaluate.frechet.limit is None and config.image_shape == (8, 8, 1)
  stage = config.stages.vae.to_dict()
  assert stage == dict(steps=3, best='nelbo', patience_steps=2, ema=dict(decoder=0.9, encoder=0.5), load=dict(decoder='vae'))
  with pytest.raises(UserError, match='config.evaluate.anomly does not exist; did you mean config.evaluate.anomaly?'):
    configs.override(config, {'evaluate.anomly.samples': '3'})


def test_references_are_followed_in_every_run_of_a_sweep(tmp_path, monkeypatch):
  (tmp_path / 'pair.py').write_text(
    'from ml_collections import ConfigDict\n'
    'def get_config(variant):\n'
    '  c = ConfigDict(dict(data={}, model=dict(width=3), rate=1.0))\n'
    '  c.model.height = 2 * c.model.get_ref("width")\n'
    '  c.follows = c.get_ref("rate")\n'
    '  return c\n'
    'def sweep(name):\n'
    '  return [{"model.width": 5}, {}, {"rate": 2.0}]\n'
  )
  seen = []
  monkeypatch.setattr(modes, 'train', lambda c: seen.append((c.config.model.width, c.config.model.height, c.config.follows)))
  for i in range(3):
    command.main([f'--config={tmp_path}/pair.py', '--sweep=x', f'--sweep_index={i}'])
  monkeypatch.setattr('latentgen.sweeps.collect', lambda *args: None)
  command.main([f'--config={tmp_path}/pair.py', '--sweep=x'])
  assert seen == 2 * [(5, 10, 1.0), (3, 6, 1.0), (3, 6, 2.0)]
  command.main([f'--config={tmp_path}/pair.py', '--config.model.width=4'])
  assert seen[-1] == (4, 8, 1.0)


def commanded(path, args):
  """The command that such arguments make, and its config."""
  flags, overrides = command.parse(args)
  file, config = configs.load(flags.config)
  configs.override(config, overrides)
  return modes.Command(file, config, overrides, path, flags), config


def test_the_command_of_a_report_is_what_a_shell_reads(tmp_path):
  folder = tmp_path / 'a $HOME; folder'
  folder.mkdir()
  (folder / 'mine.py').write_text(f'import sys\nsys.path.insert(0, {str(ROOT / "experiments")!r})\nfrom vae_nce import get_config, VARIANTS\n')
  values = {
    'evaluate.tasks': "('likelihood', 'samples')", 'data.path': "it's; rm $HOME `ls` & > x | *", 'stages.vae.steps': '7', 'seed': '3',
    'mesh.rules': '(("dec/.*", "fsdp"),)',
  }  # fmt: skip
  args = [f'--config={folder}/mine.py:smoke', *(f'--config.{key}={value}' for key, value in values.items())]
  made, config = commanded(tmp_path, args)
  words = shlex.split(made.text())
  assert words[:3] == ['python', '-m', 'latentgen.main'] and words[3:] == args
  assert commanded(tmp_path, words[3:])[1].to_json() == config.to_json()
  said = subprocess.run(['sh', '-c', made.text().replace('python -m latentgen.main', "printf '%s\\n'")], capture_output=True, text=True)
  assert said.stdout.splitlines() == args


def test_a_result_that_is_not_finite_is_left_out_and_said(tmp_path, monkeypatch, capsys):
  made, config = commanded(tmp_path, [f'--config={NCE}', "--config.evaluate.tasks=('samples',)"])
  result = lambda *numbers: evaluation.Result(numbers[0], 'nats', 3, *numbers[1:])
  found = {'good': result(1.0, 0.5), 'lost': result(float('nan')), 'far': result(float('inf'), 1.0), 'vague': result(2.0, float('nan'))}
  picture = evaluation.Picture(np.zeros((4, 4), np.uint8), 'A picture')
  findings = evaluation.Findings(found, {'x': picture}, {'t': evaluation.Table(['a'], [['1']], 'T')})
  monkeypatch.setattr(evaluation, 'run_all', lambda target, tasks: findings)
  monkeypatch.setattr(modes, 'subject', lambda run: None)
  mine = {'config': sections.plain(config), 'versions': {}, 'revision': None, 'seed': 0, 'mesh': {}, 'data': {}}
  modes._evaluate(made, types.SimpleNamespace(recipe=[types.SimpleNamespace(name='nce')]), mine)
  assert json.loads((tmp_path / 'results.json').read_text()).keys() == {'run', 'good'}
  lines = [line for line in capsys.readouterr().err.splitlines() if 'left out of results.json' in line]
  assert [line.split()[0] for line in lines] == ['lost', 'far', 'vague'] and lines[1].startswith('far is not finite (inf ± 1.0)')
  assert (tmp_path / 'samples' / 'nce' / 'x.png').exists() and (tmp_path / 'tables' / 't.csv').exists()
  page = (tmp_path / 'report.html').read_text()
  assert 'good' in page and '>vague<' not in page


@pytest.mark.parametrize('process', [0, 1])
def test_the_first_process_alone_writes_samples(tmp_path, monkeypatch, process):
  made, _ = commanded(tmp_path / 'run', [f'--config={NCE}', '--mode=sample', '--num=5'])
  method = types.SimpleNamespace(
    sampler=lambda name: 'base', sample=lambda variables, key, n, sampler, temperature: jax.random.uniform(key, (n, 4, 4, 1))
  )
  target = types.SimpleNamespace(method=method, variables={}, key=jax.random.key(0), batch_size=2)
  monkeypatch.setattr(modes, '_trained', lambda c: (types.SimpleNamespace(recipe=[types.SimpleNamespace(name='nce')]), {}))
  monkeypatch.setattr(modes, 'subject', lambda run: target)
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  modes.sample(made)
  assert sorted(p.name for p in (tmp_path / 'run').rglob('drawn*')) == ['drawn-base.npz', 'drawn-base.png'][: 2 - 2 * process]


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A finished smoke run of the main job."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  done = run(f'--config={NCE}', f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr
  return workdir, done


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(finished):
  workdir, done = finished
  assert 'report.html' in done.stderr.splitlines()[-1]
  described = json.loads((workdir / 'config.json').read_text())
  assert described['experiment'] == 'vae_nce' and described['variant'] == 'smoke' and 'jax' in described['versions']
  results = json.loads((workdir / 'results.json').read_text())
  assert {'value', 'unit', 'n', 'stderr'} <= set(results['likelihood/elbo'])
  assert {'two_sample/sir/auroc', 'two_sample/base/auroc', 'two_sample/langevin/auroc'} <= set(results)
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [(r['stage'], r['step']) for r in rows if r['split'] == 'train'] == [('vae', 1), ('vae', 2), ('nce', 1), ('nce', 2)]
  assert list((workdir / 'samples' / 'nce').glob('*.png')) and list((workdir / 'tensorboard' / 'vae').iterdir())
  page = (workdir / 'report.html').read_text()
  assert 'http://' not in page.replace('http://www.w3.org', '') and 'https://' not in page
  assert '--config=' in page


@pytest.mark.slow
def test_evaluate_again_gives_the_same_results(finished):
  workdir, _ = finished
  before = (workdir / 'results.json').read_text(), (workdir / 'report.html').read_bytes()
  assert run(f'--config={NCE}', f'--workdir={workdir}', '--mode=evaluate').returncode == 0
  assert before == ((workdir / 'results.json').read_text(), (workdir / 'report.html').read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize('sampler', ['sir', 'langevin', 'base'])
def test_sample_mode(finished, sampler):
  workdir, _ = finished
  args = (f'--config={NCE}', f'--workdir={workdir}', '--mode=sample', f'--sampler={sampler}', '--num=11')
  assert run(*args).returncode == 0
  folder = workdir / 'samples' / 'nce'
  with np.load(folder / f'drawn-{sampler}.npz', allow_pickle=False) as found:
    assert found['images'].shape == (11, 8, 8, 1)
  assert (folder / f'drawn-{sampler}.png').stat().st_size > 100


@pytest.mark.slow
def test_unknown_sampler_and_another_experiments_workdir(finished):
  workdir, _ = finished
  before = snapshot(workdir)
  for args, message in (
    ((f'--config={NCE}', '--mode=sample', '--sampler=gibbs'), 'sir, langevin, base'),
    ((f'--config={NCE.replace("vae_nce", "nvae")}',), 'holds experiment vae_nce:smoke, not nvae:smoke'),
    ((f'--config={NCE}', '--config.seed=5'), 'was made with config.seed = 0, not 5'),
  ):
    done = run(*args, f'--workdir={workdir}')
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1
  assert snapshot(workdir) == before


@pytest.mark.slow
def test_estimate_prints_and_writes_nothing(tmp_path):
  done = run(f'--config={NCE}', f'--workdir={tmp_path / "run"}', '--mode=estimate')
  assert done.returncode == 0 and not (tmp_path / 'run').exists()
  assert 'parameters of critic' in done.stdout and 'FLOPs a step' in done.stdout


@pytest.mark.slow
def test_truncated_checkpoint_is_refused_and_left_alone(finished, tmp_path):
  import shutil

  workdir = tmp_path / 'copy'
  shutil.copytree(finished[0], workdir)
  for path in (workdir / 'checkpoints' / 'nce').rglob('state/**/*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  before = snapshot(workdir / 'checkpoints')
  done = run(f'--config={NCE}', f'--workdir={workdir}', '--mode=evaluate')
  assert done.returncode == 2 and 'checkpoint' in done.stderr and done.stderr.count('\n') == 1
  assert snapshot(workdir / 'checkpoints') == before


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['vae', 'nce'])
def test_killed_run_ends_like_an_undisturbed_one_to_the_bit(tmp_path, stage):
  args = [
    f'--config={NCE}', '--config.stages.vae.steps=40', '--config.stages.nce.steps=40',
    '--config.train.checkpoint_every_steps=7', "--config.evaluate.tasks=('likelihood','samples')",
  ]  # fmt: skip
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  assert run(*args, f'--workdir={whole}').returncode == 0
  env = {**os.environ, 'PYTHONPATH': str(ROOT / 'src')}
  process = subprocess.Popen(
    [sys.executable, '-m', 'latentgen.main', *args, f'--workdir={killed}'], cwd=ROOT, env=env, stderr=subprocess.DEVNULL
  )
  seen = killed / 'metrics.jsonl'
  deadline = time.time() + 300
  while time.time() < deadline and process.poll() is None:
    if seen.exists() and sum(f'"stage": "{stage}"' in line for line in seen.read_text().splitlines()) >= 11:
      process.send_signal(signal.SIGKILL)
      break
    time.sleep(0.005)
  assert process.wait() == -signal.SIGKILL, 'the run ended before it could be killed'
  again = run(*args, f'--workdir={killed}')
  assert again.returncode == 0, again.stderr
  if stage == 'nce':
    assert 'vae: resuming' not in again.stderr
  for name in ('metrics.jsonl', 'results.json'):
    assert (whole / name).read_text() == (killed / name).read_text()
  images = sorted(p.relative_to(whole) for p in (whole / 'samples').rglob('*.png'))
  assert images
  for image in images:
    assert (whole / image).read_bytes() == (killed / image).read_bytes()


def test_native_convolutions_can_be_asked_for():
  from latentgen import assembly
  from latentgen.nets import convolution

  _, config = configs.load(str(ROOT / 'experiments' / 'vae_nce.py') + ':smoke')
  traced = lambda: str(jax.make_jaxpr(lambda x, w: convolution.convolve(x, w))(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))))
  with assembly.forms(config):
    assert 'custom_vjp' in traced()
  configs.override(config, {'debug.native_convolutions': 'True'})
  with assembly.forms(config):
    assert 'custom_vjp' not in traced()
