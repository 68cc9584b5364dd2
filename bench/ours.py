"""This framework, one row at a time: python bench/ours.py ROW; prints JSON. Rows against a peer run on one thread."""

import sys
import time

import timing

STARTED = time.perf_counter()
ALONE = ('step', 'likelihood', 'depthwise', 'layers', 'layer_seconds', 'priors')
if sys.argv[1] in ALONE:
  timing.one_thread()

import functools  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import statistics  # noqa: E402

from flax import linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import networks  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from latentgen.evaluate import likelihood as likelihoods  # noqa: E402
from latentgen.methods import vae as vae_method  # noqa: E402
from latentgen.nets import convolution, nvae  # noqa: E402
from latentgen.nets.layers import Conv, batch_norm  # noqa: E402
from latentgen.train import cost, keys, step as stepping  # noqa: E402
from latentgen.types import Stage  # noqa: E402

NVAE = {'balance': True, 'warmup_portion': 0.3, 'spectral': (1e-2, 1e-2)}
NVAE_BATCH = 32


def images(n: int, shape: tuple[int, ...] = (28, 28, 1)) -> jax.Array:
  return (jax.random.uniform(jax.random.key(0), (n, *shape)) > 0.5).astype(jnp.float32)


class Program:
  """A compiled training step with a state to run it on."""

  def __init__(self, net, batch: int, optimiser, shape=(28, 28, 1), **options):
    stage = Stage('vae', vae_method.build(net, 1000, **options), {'vae': optimiser}, 1000)
    self._raw = {'image': images(batch, shape)}
    preprocess = lambda key, batch, train: batch
    init = functools.partial(stepping.init_state, stage, preprocess)
    self.shapes = jax.eval_shape(init, keys.root(0), self._raw)
    function = jax.jit(stepping.make_step(stage, preprocess)[0], donate_argnums=(0, 1))
    self._lowered = function.lower(self.shapes, jax.eval_shape(stepping.healthy), keys.root(1), self._raw)
    self._start = lambda: (jax.jit(init)(keys.root(0), self._raw), stepping.healthy())

  def compiled(self):
    return self._lowered.compile()

  def run(self):
    """A function of a step that returns when it is done."""
    step, (state, health), key = self.compiled(), self._start(), keys.root(1)

    def one():
      nonlocal state, health
      state, health, _ = step(state, health, key, self._raw)
      jax.block_until_ready(state)
      return state

    return one

  @property
  def parameters(self) -> int:
    return sum(x.size for x in jax.tree.leaves(self.shapes.params))


def program(kind: str) -> tuple[Program, int]:
  """The training step of a row, and its batch size."""
  if kind == 'nvae':
    return Program(networks.hierarchy(), NVAE_BATCH, optax.adamax(1e-3), **NVAE), NVAE_BATCH
  net = {'mlp': networks.mlp, 'conv': networks.ConvVAE}[kind]()
  return Program(net, timing.MLP['batch'], optax.adam(timing.LEARNING_RATE)), timing.MLP['batch']


def step(kind: str) -> dict[str, float]:
  """Images a CPU second."""
  built, batch = program(kind)
  return {'images': batch / timing.cpu_seconds(built.run()), 'parameters': built.parameters}


def likelihood(kind: str) -> dict[str, float]:
  """Image-samples a CPU second of the task's own function, K an image; FLOPs of its decoder, and those a square product does a second."""
  net, n, chunk = {'mlp': (networks.mlp(), 32, 25), 'conv': (networks.ConvVAE(), 4, 25)}[kind]
  method, x = vae_method.build(net, 1), images(n)
  variables = {'stats': {}, **jax.jit(method.init)(keys.root(0), {'image': x})}
  function = jax.jit(likelihoods.terms(method.trace, method.trace, timing.SAMPLES, chunk))
  seconds = timing.cpu_seconds(lambda: jax.block_until_ready(function(variables, x, keys.root(1))), warm=1, repeats=3)
  z = jax.ShapeDtypeStruct((1, networks.LATENT), jnp.float32)
  decode = lambda z: net.init_with_output({'params': keys.root(3), 'sample': keys.root(4)}, z, method='decode')[0].base.logits
  flops = sum(cost.flops(jax.make_jaxpr(decode)(z).jaxpr).values())
  square, product = jax.random.normal(keys.root(2), (2048, 2048)), jax.jit(jnp.matmul)
  rate = 2 * 2048**3 / timing.cpu_seconds(lambda: jax.block_until_ready(product(square, square)))
  return {'samples': n * timing.SAMPLES / seconds, 'flops': flops, 'rate': rate}


def depthwise(form: str) -> list[float]:
  """Seconds, forward and backward, by shape; `form` is 'custom' or 'native'."""
  found = []
  for shape in timing.DEPTHWISE:
    x, g = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    kernel = jax.random.normal(jax.random.key(2), (timing.KERNEL, timing.KERNEL, 1, shape[-1]))

    def both(x, kernel, g):
      with convolution.implementation(form):
        y, pull = jax.vjp(lambda x, kernel: convolution.convolve(x, kernel, depthwise=True), x, kernel)
      return y, pull(g)

    function = jax.jit(both)
    found.append(timing.cpu_seconds(lambda: jax.block_until_ready(function(x, kernel, g)), seconds=0.5))
  return found


def layers(path: str) -> int:
  """Writes the convolutions and normalisations of the NVAE's training pass to a file; how many there are."""
  net, key, found = networks.hierarchy(), jax.random.key(0), {}

  def times(path: str) -> int:
    stack = re.search(r'(encoder/)?stack_(\d)', path)
    if not stack:
      return 1
    level = int(stack[2])
    return net.groups[level] - (not stack[1] and level == 0)  # the first group of the decoder stands alone

  def watch(function, args, kwargs, context):
    module, name = context.module, '/'.join(context.module.path)
    if context.method_name == '__call__' and isinstance(module, Conv):
      kind = 'depthwise' if module.depthwise else f'{module.kernel_size}x{module.kernel_size}'
      options = {'features': args[0].shape[-1] if module.depthwise else module.features, 'bias': module.use_bias}
      found[name] = {'kind': kind, 'size': module.kernel_size, 'stride': module.stride, **options}
    elif context.method_name == '__call__' and isinstance(module, nn.BatchNorm):
      found[name] = {'kind': 'normalise'}
    if name in found and 'shape' not in found[name]:
      found[name] |= {'shape': list(args[0].shape), 'times': times(name)}
    return function(*args, **kwargs)

  def forward(variables, x):
    return net.apply(variables, x, 1, True, method='infer', rngs={'sample': key}, mutable=['batch_stats'])

  x = images(NVAE_BATCH)
  variables = jax.eval_shape(lambda: net.init({'params': key, 'sample': key}, x, method='infer'))
  with nn.intercept_methods(watch):
    jax.eval_shape(forward, variables, x)
  with open(path, 'w') as file:
    json.dump(list(found.values()), file)
  return len(found)


def layer_seconds(path: str) -> dict[str, float]:
  """As `layers` of peers.py: seconds of our layers, forward and backward, each compiled on its own, summed by kind."""
  with open(path) as file:
    wanted = json.load(file)
  known, totals = {}, {}
  for layer in wanted:
    times, key = layer.pop('times'), json.dumps(layer)
    if key not in known:
      kind, shape = layer['kind'], layer['shape']
      if kind == 'normalise':
        module = Normalise()
      else:
        options = {'use_bias': layer['bias'], 'depthwise': kind == 'depthwise'}
        module = Conv(layer['features'], layer['size'], layer['stride'], **options)
      x = jax.random.normal(jax.random.key(0), shape)
      variables = jax.jit(module.init)(jax.random.key(1), x)
      forward = lambda p, x, v=variables, m=module: m.apply({**v, 'params': p}, x, mutable=['batch_stats'])[0]
      g = jnp.ones(jax.eval_shape(forward, variables['params'], x).shape)

      def both(params, x, g, forward=forward):
        y, pull = jax.vjp(forward, params, x)
        return y, pull(g)

      function = jax.jit(both)
      run = lambda f=function, a=(variables['params'], x, g): jax.block_until_ready(f(*a))
      known[key] = timing.cpu_seconds(run, seconds=0.5)
    totals[layer['kind']] = totals.get(layer['kind'], 0.0) + times * known[key]
  return totals


class Normalise(nn.Module):
  """BatchNorm in training and Swish."""

  @nn.compact
  def __call__(self, x):
    return nn.swish(batch_norm(True)(x))


def stack(groups: int, **options) -> nvae.NVAE:
  """So many groups at one resolution."""
  return nvae.build((8, 8, 1), groups=(groups,), latent=4, channels=8, pre_blocks=0, cells_encoder=1, cells_decoder=1, **options)


def compile_seconds(groups: str) -> float:
  """Lowering and compiling the training step."""
  start = time.perf_counter()
  Program(stack(int(groups)), 16, optax.adamax(1e-3), (8, 8, 1), **NVAE).compiled()
  return time.perf_counter() - start


def memory() -> dict[str, list[int]]:
  """Temporaries of the compiled step, less those the gradients take, for two depths, without and with rematerialisation."""
  found = {}
  for name, options in (('kept', {}), ('recomputed', {'remat': True})):
    found[name] = []
    for groups in (4, 32):
      built = Program(stack(groups, **options), 64, optax.adamax(1e-3), (8, 8, 1), **NVAE)
      found[name].append(built.compiled().memory_analysis().temp_size_in_bytes - 4 * built.parameters)
  # What a group hands on and records, [64, 8, 8, .] in float32: the encoder's state and tap, the decoder's state as context
  # and as carry (8 channels each), and eps, z, and mean and scale of prior and posterior (4 channels each).
  return {**found, 'carry': 4 * 64 * 8 * 8 * (4 * 8 + 6 * 4)}


def likelihood_bytes(samples: str) -> int:
  """Temporaries of the compiled importance-weighted bound of an MLP VAE, 32 images, chunks of 50."""
  method, batch = vae_method.build(networks.mlp(), 1), jax.ShapeDtypeStruct((32, 28, 28, 1), jnp.float32)
  key = jax.eval_shape(lambda: keys.root(0))
  variables = jax.eval_shape(lambda k, x: {'stats': {}, **method.init(k, {'image': x})}, key, batch)
  function = jax.jit(likelihoods.terms(method.trace, method.trace, int(samples), 50))
  return function.lower(variables, batch, key).compile().memory_analysis().temp_size_in_bytes


def priors() -> dict[str, dict[str, float]]:
  """Sampling one group of a noise-contrastive prior against its critic alone: CPU seconds and bytes."""
  from latentgen.distributions import Normal
  from latentgen.priors.critics import Critic
  from latentgen.priors.tilted import Tilted

  n, shape, width, chunk, steps = 2, (8, 8, 20), 64, 50, 100
  tilt, key = Tilted(Critic(), 'z'), jax.random.key(0)  # the published critic: 64 channels, eight blocks
  context = jax.random.normal(key, (n, 8, 8, width))
  prior = Normal(jnp.zeros((n, *shape)), jnp.ones((n, *shape)))
  critic = jax.jit(lambda: tilt.critic.init(key, jnp.zeros((1, *shape)), context[:1])['params'])()
  params = {'level0': {'stack': jax.tree.map(lambda p: p[None], critic)}}

  def alone(z):
    return tilt.critic.apply({'params': critic}, z, context)

  def many(count):
    z = jax.random.normal(key, (chunk, n, *shape))
    total = lambda i, sum_: sum_ + alone(z + sum_[0, 0]).mean()  # each pass waits for the one before
    return lambda: jax.lax.fori_loop(0, count // chunk, total, jnp.zeros((chunk, n)))

  def slopes(count):
    z = jax.random.normal(key, (n, *shape))
    both = jax.value_and_grad(lambda z: alone(z).sum())
    return lambda: jax.lax.fori_loop(0, count, lambda _, at: (both(at[0])[1], at[1] + 1), (z, 0))

  def chosen(choose):
    return lambda: choose(0, 0, prior, context, jax.random.key(1))

  functions = {
    'sir': chosen(tilt.sir(params, 5000, chunk)),
    'sir, a tenth': chosen(tilt.sir(params, 500, chunk)),
    'critic, 5,000 times': many(5000),
    'langevin': chosen(tilt.langevin(params, steps, 1e-2)),
    'critic and gradient, 101 times': slopes(steps + 1),
    'base': lambda: prior.sample(jax.random.key(1)),
  }
  found = {}
  for name, function in functions.items():
    compiled = jax.jit(function).lower().compile()
    seconds = timing.cpu_seconds(lambda: jax.block_until_ready(compiled()), warm=1, repeats=3)
    found[name] = {'seconds': seconds / n, 'bytes': compiled.memory_analysis().temp_size_in_bytes}
  return found


def pipeline() -> float:
  """Images a second that training batches deliver, shuffled and batched, from a data set in memory."""
  from latentgen.data import pipeline as pipelines
  from latentgen.data.source import ArraySource

  source = ArraySource(np.zeros((60_000, 28, 28, 1), np.uint8), name='zeros')
  batches = pipelines.train_iterator(source, timing.MLP['batch'], 0)
  next(batches)
  start, count = time.perf_counter(), 3000
  for _ in range(count):
    next(batches)
  return count * timing.MLP['batch'] / (time.perf_counter() - start)


def loop(folder: str) -> dict[str, float]:
  """Seconds of 1,000 steps of the MLP VAE in the loop, batches and logs included, and of its compiled step alone; in turns."""
  import pathlib

  from latentgen import optim
  from latentgen.data.source import ArraySource
  from latentgen.train import loop as loops, sharding
  from latentgen.train.writers import Metrics

  source = ArraySource(np.random.default_rng(0).integers(0, 256, (10_000, 28, 28, 1), np.uint8), name='noise')
  prepare = lambda key, raw, train: {'image': (raw['image'] > 127).astype(jnp.float32)}
  steps, warm, batch = 1100, 100, timing.MLP['batch']
  optimiser = optim.build('optim', steps, 'adam', timing.LEARNING_RATE)
  stage = Stage('vae', vae_method.build(networks.mlp(), steps), {'vae': optimiser}, steps)
  data = dict.fromkeys(('train', 'valid', 'test'), source)
  settings = loops.Settings(seed=0, batch_size=batch, checkpoint_every_steps=10 * steps)
  seen, write = {}, Metrics.write

  def watched(self, name, at, *args, **kwargs):
    seen[at] = time.perf_counter()
    write(self, name, at, *args, **kwargs)

  def run(workdir) -> loops.Run:
    return loops.Run((stage,), data, prepare, sharding.make_mesh(1), workdir, settings)

  def whole(workdir) -> float:
    workdir.mkdir(parents=True)
    loops.train(run(workdir))
    return seen[steps] - seen[warm]

  function = jax.jit(stepping.make_step(stage, prepare)[0], donate_argnums=(0, 1))
  raw = jax.device_put(source.take(slice(0, batch)))
  first = jax.jit(functools.partial(stepping.init_state, stage, prepare))

  def bare() -> float:
    state, health, key = first(keys.root(0), raw), stepping.healthy(), keys.root(1)
    for i in range(steps):
      if i == warm:
        jax.block_until_ready(state)
        start = time.perf_counter()
      state, health, _ = function(state, health, key, raw)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  Metrics.write = watched
  pairs = [(whole(pathlib.Path(folder) / str(i)), bare()) for i in range(9)]
  found = dict(zip(('loop', 'step', 'over'), map(statistics.median, zip(*((a, b, a / b - 1) for a, b in pairs))), strict=True))
  idle, take = run(pathlib.Path(folder)), jax.jit(lambda raw: raw)
  batches = idle.iterator(stage)
  return {**found, 'batch': timing.cpu_seconds(lambda: jax.block_until_ready(take(idle.feed(next(batches)))))}


def checkpoint(folder: str) -> dict[str, float]:
  """Seconds for which an asynchronous save of the NVAE's state blocks, that it adds to four steps in all, and of a step."""
  import pathlib

  from latentgen.train.checkpoint import Checkpoints

  step = program('nvae')[0].run()
  step()
  store, timed, blocked = Checkpoints(pathlib.Path(folder).absolute(), keep=2), {False: [], True: []}, []
  for i in range(8):
    start, saves = time.perf_counter(), i % 2 == 1
    state = step()
    if saves:
      begun = time.perf_counter()
      store.save(i, state, None)
      blocked.append(time.perf_counter() - begun)
    for _ in range(3):
      step()
    timed[saves].append(time.perf_counter() - start)
    store.wait()
  store.close()
  plain, saved = (statistics.median(timed[k]) for k in (False, True))
  return {'blocked': statistics.median(blocked), 'added': saved - plain, 'step': plain / 4, 'arrays': len(jax.tree.leaves(state))}


def start(folder: str) -> dict[str, float]:
  """Where the seconds to the first logged step go: JAX's own account of tracing and of compiled programs that it reads."""
  from latentgen import main
  from latentgen.train.writers import Metrics

  names = {
    '/jax/core/compile/jaxpr_trace_duration': 'tracing',
    '/jax/core/compile/jaxpr_to_mlir_module_duration': 'lowering',
    '/jax/compilation_cache/cache_retrieval_time_sec': 'reading compiled programs',
  }
  parts = {'imports': time.perf_counter() - STARTED, **dict.fromkeys(names.values(), 0.0)}

  def listen(event: str, seconds: float, **kwargs) -> None:
    if event in names:
      parts[names[event]] += seconds

  class Reached(Exception):
    pass

  def stop(*args, **kwargs):
    raise Reached

  jax.monitoring.register_event_duration_secs_listener(listen)
  Metrics.write, sys.argv = stop, ['latentgen', *timing.START, f'--workdir={folder}']
  try:
    main.cli()
  except Reached:
    return parts
  raise RuntimeError('the smoke configuration logs nothing')


def devices() -> list[str]:
  """Kinds of the devices that are no CPU."""
  return [d.device_kind for d in jax.devices() if d.platform != 'cpu']


def matmul_rate(dtype: str, side: int = 8192, count: int = 20) -> float:
  """FLOPs a second of products of square matrices, one after the other."""
  a = jax.random.normal(jax.random.key(0), (side, side), dtype) / side**0.5
  chain = jax.jit(lambda a: jax.lax.fori_loop(0, count, lambda _, x: x @ a, a))
  jax.block_until_ready(chain(a))
  start = time.perf_counter()
  jax.block_until_ready(chain(a))
  return 2 * side**3 * count / (time.perf_counter() - start)


def accelerator(spec: str, dtype: str, remat: str, steps: str = '20') -> dict[str, float]:
  """The training step of an experiment's first stage on one device: images and FLOPs a second, bytes of temporaries.

  FLOPs are those of convolutions and matrix products, without what rematerialisation does again.
  """
  import pathlib

  from latentgen import assembly, config as configs
  from latentgen.train import sharding

  _, config = configs.load(spec)
  counts = {}
  for again in (False, remat == 'True'):
    configs.override(config, {'model.dtype': dtype, 'model.remat': str(again)})
    run = assembly.build(config, pathlib.Path('unused'), sharding.make_mesh(1), shapes_only=True)
    counts[again] = sum(cost.flops(cost.trace(run, run.recipe[0]).jaxpr.jaxpr).values())
  stage, raw = run.recipe[0], jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.example())
  function = jax.jit(stepping.make_step(stage, run.preprocess)[0], donate_argnums=(0, 1))
  state = jax.jit(functools.partial(stepping.init_state, stage, run.preprocess))(keys.root(0), raw)
  health, key = stepping.healthy(), keys.root(1)
  compiled = function.lower(state, health, key, raw).compile()
  for i in range(int(steps) + 3):
    if i == 3:
      jax.block_until_ready(state)
      start = time.perf_counter()
    state, health, _ = compiled(state, health, key, raw)
  jax.block_until_ready(state)
  rate = int(steps) / (time.perf_counter() - start)
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  return {'images': rate * run.settings.batch_size, 'flops': rate * counts[False], 'bytes': temporaries, 'batch': run.settings.batch_size}


if __name__ == '__main__':
  rows = (
    devices, matmul_rate, accelerator, step, likelihood, depthwise, layers, layer_seconds, compile_seconds, memory, likelihood_bytes, priors,
    pipeline, loop, checkpoint, start,
  )  # fmt: skip
  timing.answer({row.__name__: row for row in rows})
