"""The worked example of docs/adding.md, executed; README's library examples, executed."""

import pathlib
import re
import sys
import types

import jax
import numpy as np
import optax
import pytest

from latentgen import options
from latentgen.nets import vae
from latentgen.train import keys, step as stepping
from latentgen.types import Stage

ROOT = pathlib.Path(__file__).parents[1]


def blocks(path):
  return re.findall(r'```python\n(.*?)```', path.read_text(), re.S)


def test_the_worked_example_trains(monkeypatch):
  module = types.ModuleType('mylab.mypaper')
  monkeypatch.setitem(sys.modules, 'mylab.mypaper', module)
  exec(blocks(ROOT / 'docs' / 'adding.md')[0], module.__dict__)
  net = vae.build((4, 4, 1), latent=2, hidden=(8,))
  method = options.call(module.build, 'method', {'samples': 3}, net, 10)
  stage = Stage('iwae', method, {'iwae': optax.adam(1e-2)}, 10)
  two = np.indices((4, 4)).sum(0) % 2  # a chessboard and its inverse: log p(x) can rise from -16 log 2 to -log 2
  raw = {'image': np.stack([two, 1 - two] * 8)[..., None].astype(np.float32)}
  preprocess = lambda key, batch, train: batch
  state = stepping.init_state(stage, preprocess, keys.root(0), raw)
  step = jax.jit(stepping.make_step(stage, preprocess)[0])
  health, bounds = stepping.healthy(), []
  for _ in range(100):
    state, health, metrics = step(state, health, keys.root(0), raw)
    bounds.append(float(metrics['iwae/iwae']))
  assert np.mean(bounds[-10:]) > np.mean(bounds[:10]) + 5.0


@pytest.mark.parametrize('index', range(len(blocks(ROOT / 'README.md'))))
def test_readme_examples_run(index):
  exec(blocks(ROOT / 'README.md')[index], {})
