"""From a config to a run: its data, its recipe, its mesh and settings."""

from collections.abc import Callable, Mapping
import contextlib
import inspect
import math
import pathlib
from typing import Any

from ml_collections import ConfigDict

from latentgen.errors import UserError, near
from latentgen.nets import convolution
from latentgen.options import built, call, module, split_name
from latentgen.sections import check, check_train, plain


def build_data(
  config: Mapping[str, Any], seed: int, shape: tuple[int, ...] | None = None
) -> tuple[dict[str, Any], Callable[..., Any], int]:
  """(splits, preprocess, batch size) of `config.data`.

  `seed` fixes a fixed binarisation and which labels are kept; `shape` stands for the data.
  """
  import numpy as np

  from latentgen import data
  from latentgen.data import labels, memory, pipeline, preprocess

  name, options = split_name(config, 'config.data')
  batch_size = options.pop('batch_size', None)
  if type(batch_size) is not int or batch_size < 1:
    raise UserError(f'config.data.batch_size is {batch_size!r}, need a positive whole number')
  steps = {k: options.pop(k) for k in inspect.signature(preprocess.make).parameters if k in options}
  label_options = {k: options.pop(k) for k in labels.OPTIONS if k in options}
  labels.check(**label_options)
  if shape:
    if not isinstance(shape, tuple) or len(shape) != 3 or not all(type(side) is int and 1 <= side <= 2**16 for side in shape):
      raise UserError(f'config.image_shape is {shape!r}, need (height, width, channels)')
    memory.check(batch_size * math.prod(shape), 'config.data.batch_size', 'make it smaller')
    blank = data.ArraySource(np.broadcast_to(np.uint8(0), (batch_size, *shape)), None, 'shapes alone')
    splits = dict.fromkeys(data.SPLITS, blank)
  else:
    splits = built('config.data', data.load, name, **options)
  pipeline.Steps(splits['train'], batch_size, seed)  # complains of a batch that is larger than the split
  if steps.get('binarize') == 'fixed':
    splits = {split: preprocess.binarize_fixed(source, seed) for split, source in splits.items()}
  if not shape:
    splits['train'] = labels.few(splits['train'], seed, **label_options)
  return splits, preprocess.make(**steps), batch_size


def build_recipe(config: Mapping[str, Any], image_shape: tuple[int, int, int]) -> tuple[Any, ...]:
  """The stages that `config.recipe` names, in that order."""
  from latentgen import optim
  from latentgen.types import Stage

  name, options = split_name(config['model'], 'config.model')
  net = call(module('latentgen.nets', name, 'config.model.name').build, 'config.model', options, image_shape)
  stages = []
  for stage in config['recipe']:
    where = f'config.stages.{stage}'
    if stage not in config['stages']:
      raise UserError(f'config.recipe names stage {stage!r}{near(stage, config["stages"])}')
    options = dict(config['stages'][stage])
    known = ('steps', 'method', 'optim', 'load', 'ema', 'best', 'patience_steps')
    for key in options:
      if key not in known:
        raise UserError(f'{where}.{key} does not exist{near(key, known)}')
    steps = options.get('steps', 0)
    if type(steps) is not int or steps < 0:
      raise UserError(f'{where}.steps is {steps!r}, need a whole number of steps')
    for group, decay in options.get('ema', {}).items():
      if type(decay) not in (int, float) or not 0 <= decay < 1:
        raise UserError(f'{where}.ema.{group} is {decay!r}, need a decay from 0 to below 1')
    if not isinstance(options.get('best'), (str, type(None))):
      raise UserError(f'{where}.best is {options["best"]!r}, need the name of a validation metric')
    method_name, method_options = split_name(options.get('method', {}), f'{where}.method')
    found = module('latentgen.methods', method_name, f'{where}.method.name')
    if isinstance(method_options.get('prior'), Mapping):  # a section: a module of priors with its own options
      prior, prior_options = split_name(method_options['prior'], f'{where}.method.prior')
      builder = module('latentgen.priors', prior, f'{where}.method.prior.name').build
      method_options['prior'] = call(builder, f'{where}.method.prior', prior_options)
    method = call(found.build, f'{where}.method', method_options, net, steps)
    optimisers = [(u, o, f'{where}.optim.{u}') for u, o in options.get('optim', {}).items()]
    stages.append(
      Stage(
        name=stage,
        method=method,
        optim={u: built(key, optim.build, key, steps, **o) for u, o, key in optimisers},
        steps=steps,
        load=options.get('load', {}),
        fit=getattr(method, 'fit', None),
        ema=options.get('ema', {}),
        best=options.get('best') or None,
        patience_steps=options.get('patience_steps', 0),
      )
    )
  return tuple(stages)


def _image_shape(source: Any, preprocess: Callable[..., Any]) -> tuple[int, int, int]:
  """Of an image as the network sees it, which padding changes."""
  import jax

  raw = source.take([0])
  function = lambda key: preprocess(key, raw, False)
  return built('config.data', jax.eval_shape, function, jax.random.key(0))['image'].shape[1:]


def check_likelihood(net: Any, data: Mapping[str, Any], source: Any) -> None:
  """Refuses a decoder whose distribution is over other values than the images have.

  Args:
    net: a network; one without `likelihood` goes with all images.
    data: `config.data`.
    source: the training images.

  Raises:
    UserError: one line that names the keys of both.
  """
  likelihood, binarize, bits = getattr(net, 'likelihood', None), data.get('binarize', 'none'), data.get('bits', 8)
  where = f'config.model.likelihood = {likelihood!r}'
  if likelihood == 'dmol':
    if binarize != 'none':
      raise UserError(f"{where} is over grey levels, and config.data.binarize is {binarize!r}; take 'bernoulli', or binarize = 'none'")
    if data.get('dequantize', False):
      raise UserError(f"{where} is over whole grey levels, and config.data.dequantize is True; take 'normal', or dequantize = False")
    if bits != net.bits:
      raise UserError(f'config.model.bits is {net.bits} and config.data.bits is {bits}; with {where} they must be the same')
  if likelihood == 'bernoulli' and binarize == 'none':
    image = source.take(slice(0, 64))['image']
    if ((image != 0) & (image != (255 if image.dtype == 'uint8' else 1))).any():
      raise UserError(f"{where} is over black and white, and config.data.binarize is 'none'; set it to 'fresh', or take 'normal'")


def build(config: ConfigDict, workdir: pathlib.Path, mesh: Any = None, shapes_only: bool = False) -> Any:
  """The whole run of a config.

  Args:
    config: the resolved config.
    workdir: where the run lives.
    mesh: overrides `config.mesh`.
    shapes_only: do without data where `config.image_shape` says what they look like; such a run can only be estimated.

  Raises:
    UserError: one line that names the key.
  """
  from latentgen.train import check as checks, loop, sharding

  check(config)
  config = plain(config)
  seed = config.get('seed', 0)
  shape = config.get('image_shape') if shapes_only else None
  splits, preprocess, batch_size = build_data(config['data'], seed, shape)
  recipe = build_recipe(config, _image_shape(splits['train'], preprocess))
  checks.check_names(recipe)
  check_likelihood(getattr(recipe[0].method, 'net', None), config['data'], splits['train'])
  if mesh is None:
    options = {k: v for k, v in config.get('mesh', {}).items() if k in ('data', 'fsdp')}
    mesh = built('config.mesh', sharding.make_mesh, **options)
  settings = call(loop.Settings, 'config.train', check_train(config), seed, batch_size)
  sharding.check_batch(batch_size, mesh, settings.accumulate)
  return loop.Run(recipe, splits, preprocess, mesh, workdir, settings)


def forms(config: ConfigDict) -> contextlib.AbstractContextManager[None]:
  """What must surround all tracing: which forms of convolutions `config.debug.native_convolutions` chooses."""
  native = config.get('debug', {}).get('native_convolutions', False)
  return convolution.implementation('native') if native is True else contextlib.nullcontext()


def check_shapes(run: Any, allocated: bool = True) -> None:
  """Initialises every stage by its shapes alone, where networks find out what does not go together.

  Args:
    run: what `build` has made.
    allocated: whether the states will be allocated, so that they must fit into memory.

  Raises:
    UserError: one line that names the stage.
  """
  from latentgen.data import memory
  from latentgen.train import cost

  for stage in run.recipe:
    where = f'config.stages.{stage.name}'
    state = built(where, run.abstract, stage)
    if allocated and run.mesh.devices.flat[0].platform == 'cpu':
      memory.check(cost.bytes_per_device(state), f'{where}, parameters and optimisers,', 'make config.model smaller')


def check_evaluation(run: Any, tasks: Mapping[str, Mapping[str, Any]]) -> None:
  """Refuses tasks that cannot work on what is evaluated, the last stage, as far as its shapes tell.

  Args:
    run: what `build` has made.
    tasks: {task: its options}.

  Raises:
    UserError: one line that names the key.
  """
  import jax

  from latentgen import evaluate
  from latentgen.train import step

  stage = run.recipe[-1]

  def trace():
    key, variables = jax.random.key(0), step.evaluation_variables(run.abstract(stage))
    batch = jax.eval_shape(lambda raw: run.preprocess(key, raw, False), run.example())
    return jax.eval_shape(lambda variables, x: stage.method.trace(variables, x, key, 1), variables, batch['image'])

  evaluate.check_subject(tasks, run.data, stage.method, [s.name for s in run.recipe], trace)
