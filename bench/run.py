"""make bench: the tables of docs/benchmarks.md, printed. Ratios within one run; medians; conditions stated."""

import os
import platform
import statistics
import time

os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)  # compile times are measured here

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from latentgen.methods import vae as vae_method  # noqa: E402
from latentgen.nets import nvae, vae  # noqa: E402
from latentgen.train import keys, step as stepping  # noqa: E402
from latentgen.types import Stage  # noqa: E402

REPEATS = 3


def compile_seconds(groups: int) -> float:
  """Lowering and compiling the train step of an NVAE with so many groups at one resolution."""
  import optax

  net = nvae.build((8, 8, 1), groups=(groups,), latent=4, channels=8, pre_blocks=0, cells_encoder=1, cells_decoder=1)
  method = vae_method.build(net, 100, balance=True, warmup_portion=0.3, spectral=(1e-2, 1e-2))
  stage = Stage('vae', method, {'vae': optax.adamax(1e-3)}, 100)
  raw = {'image': jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32)}
  preprocess = lambda key, batch, train: batch
  key = jax.eval_shape(lambda: keys.root(0))
  state = jax.eval_shape(lambda k, r: stepping.init_state(stage, preprocess, k, r), key, raw)
  health = jax.eval_shape(stepping.healthy)
  seconds = []
  for _ in range(REPEATS):
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(stepping.make_step(stage, preprocess)[0]).lower(state, health, key, raw).compile()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def likelihood_bytes(samples: int, chunk: int = 50) -> int:
  """Temporaries of the compiled importance-weighted bound, from the program that evaluation runs."""
  from latentgen.evaluate import likelihood

  net = vae.build((28, 28, 1), latent=16, hidden=(256,))
  method = vae_method.build(net, 1)
  batch = {'image': jax.ShapeDtypeStruct((32, 28, 28, 1), jnp.float32)}
  key = jax.eval_shape(lambda: keys.root(0))
  variables = jax.eval_shape(lambda k, b: {'stats': {}, **method.init(k, b)}, key, batch)

  def bound(variables, x, key):
    return likelihood.importance(lambda key, k: method.trace(variables, x, key, k).log_weight(), key, samples, chunk)

  return jax.jit(bound).lower(variables, batch['image'], key).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
  print(f'{time.strftime("%Y-%m-%d")}, Python {platform.python_version()}, jax {jax.__version__}, '
        f'{jax.devices()[0].device_kind}, {os.cpu_count()} cores, median of {REPEATS}')  # fmt: skip
  print('| what | figure | target |\n| --- | --- | --- |')
  few, many = compile_seconds(4), compile_seconds(24)
  print(f'| compile time of the train step, 24 groups / 4 groups at one resolution | {many:.1f} s / {few:.1f} s = {many / few:.2f} | < 1.5 |')
  small, large = likelihood_bytes(50), likelihood_bytes(5000)
  print(f'| peak temporaries of the likelihood, K = 5,000 / K = 50 | {large / 2**20:.1f} / {small / 2**20:.1f} MiB = {large / small:.2f} | < 1.2 |')


if __name__ == '__main__':
  main()
