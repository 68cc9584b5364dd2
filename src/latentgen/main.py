"""The command line: python -m latentgen.main --config=experiments/nvae_nce.py[:variant] [--config.key=value ...].

Exit status 0: done. 2: bad input, said in one line, nothing touched. 1: the run itself failed (say, a loss that is not finite, a
full disk). 143: stopped by SIGTERM with everything saved, to be started again.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
import copy
import ctypes
import errno
import gc
import math
import os
import pathlib
import signal
import sys
from typing import Any, NoReturn

from latentgen import hugepages
from latentgen.errors import Preempted, SaveFailed, TrainingDiverged, UserError, did_you_mean, one_line

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PREEMPTED = 128 + 15
SHORT = 160  # characters of another's message
AGAIN = 'if another process has gone, start all again: the same command goes on from the last checkpoint'
EXPLICIT = 'set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or --distributed=off'
MODES = ('train', 'evaluate', 'sample', 'estimate', 'collect')


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    raise UserError(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
  """(flags, {dotted config key: text}).

  Raises:
    UserError: a flag that does not exist or has no such value.
  """
  parser = _Parser(prog='python -m latentgen.main', description=__doc__, allow_abbrev=False)
  parser.add_argument('--config', required=True, metavar='FILE.py[:VARIANT]', help='experiment; --config.key=value overrides')
  parser.add_argument('--workdir', help='where the run lives; default runs/<experiment>[-variant]')
  parser.add_argument('--mode', default='train', choices=MODES, help='train resumes by itself and ends with a report')
  parser.add_argument('--distributed', default='auto', choices=('auto', 'on', 'off'), help='several hosts')
  parser.add_argument('--sweep', metavar='NAME', help='runs the override sets of sweep(NAME), then shows them on one page')
  parser.add_argument('--sweep_index', type=int, metavar='I', help='only the I-th of them; the page by --mode=collect')
  parser.add_argument('--sampler', help='mode sample: one of the samplers of the last stage')
  parser.add_argument('--num', type=int, help='mode sample: number of images, 64 by default')
  parser.add_argument('--temperature', type=float, help='mode sample: factor on the deviations of the base prior, 1 by default')
  known = [a for action in parser._actions for a in action.option_strings]
  overrides, rest = {}, []
  for arg in argv:
    if arg.startswith('--config.') and '=' in arg:
      key, _, value = arg.removeprefix('--config.').partition('=')
      overrides[key] = value
    elif arg.startswith('--') and arg.split('=')[0] not in known or arg.startswith('-h') and arg != '-h':
      hint = '; write --config.key=value' if arg.startswith('--config.') else did_you_mean(arg.split('=')[0], known)
      raise UserError(f'unknown flag {arg.split("=")[0]}{hint}')
    else:
      rest.append(arg)
  flags, extra = parser.parse_known_args(rest)
  if extra:
    raise UserError(f'unexpected argument {extra[0]!r}; flags are written --name=value')
  if flags.workdir == '':
    raise UserError('--workdir is empty; name a folder, or leave it out')
  for name in ('sampler', 'num', 'temperature'):
    if getattr(flags, name) is not None and flags.mode != 'sample':
      raise UserError(f'--{name} needs --mode=sample; leave it out')
  flags.num = 64 if flags.num is None else flags.num
  flags.temperature = 1.0 if flags.temperature is None else flags.temperature
  if flags.num < 1:
    raise UserError(f'--num is {flags.num}, need at least 1')
  if not 0 < flags.temperature < math.inf:
    raise UserError(f'--temperature is {flags.temperature}, need a positive number')
  return flags, overrides


def cluster() -> bool:
  """Whether this is one process of several: by `JAX_*` variables, else where `jax.distributed` would find so by itself.

  Slurm, Open MPI and GKE's TPUs say it in the environment; Kubernetes alone is asked, about the indexed Job of this pod.

  Raises:
    UserError: Kubernetes does not answer.
  """
  env = os.environ
  several = lambda name: env.get(name, '1') not in ('0', '1')
  if 'JAX_NUM_PROCESSES' in env:
    return several('JAX_NUM_PROCESSES')  # what is no number is refused later
  return (
    (several('SLURM_NTASKS') and 'SLURM_STEP_NODELIST' in env)  # a batch script without srun is one process
    or several('OMPI_COMM_WORLD_SIZE')
    or any(',' in env.get(name, '') for name in ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'))
    or any(name in env for name in ('TPU_PROCESS_ADDRESSES_PATH', 'MEGASCALE_COORDINATOR_ADDRESS'))
    or ('TPU_WORKER_HOSTNAMES' not in env and {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= env.keys() and _pods() > 1)
  )


def _pods() -> int:
  """Pods of the indexed Job that this one belongs to, as jax.distributed would count them."""
  try:
    from jax._src.clusters import K8sCluster  # no public name offers the count

    return K8sCluster.get_process_count() if K8sCluster.is_env_present() else 1
  except Exception as error:
    what = f'Kubernetes does not say how many pods this Job has ({one_line(error, SHORT)})'
    raise UserError(f'--distributed: {what}; {EXPLICIT}') from error


def start_jax(distributed: str) -> None:
  """Compilation cache and, where there are several hosts, the distributed runtime; before any device is looked at.

  Raises:
    UserError: the environment does not say which processes are one run.
  """
  import jax

  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
    jax.config.update('jax_compilation_cache_dir', str(cache / 'latentgen' / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  if distributed == 'on' or (distributed == 'auto' and cluster()):
    explicit = {}
    if 'JAX_NUM_PROCESSES' in os.environ:
      numbers = {name: os.environ.get(name, '') for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')}
      for name, value in numbers.items():
        if not value.isdecimal():
          raise UserError(f'{name} is {value!r} in the environment, need a whole number')
      if 'JAX_COORDINATOR_ADDRESS' not in os.environ:
        raise UserError('JAX_NUM_PROCESSES is set and JAX_COORDINATOR_ADDRESS is not; set it to host:port of process 0')
      explicit = {
        'coordinator_address': os.environ['JAX_COORDINATOR_ADDRESS'],
        'num_processes': int(numbers['JAX_NUM_PROCESSES']),
        'process_id': int(numbers['JAX_PROCESS_ID']),
      }
    try:
      jax.distributed.initialize(**explicit)
    except jax.errors.JaxRuntimeError:  # processes that do not come
      raise
    except (ValueError, RuntimeError) as error:
      raise UserError(f'--distributed={distributed}: {one_line(error, SHORT)}; {EXPLICIT}') from error
    _leave_when_aborted()


def _leave_when_aborted() -> None:
  """Where another process has gone, the runtime aborts this one: then it ends with a line and status 1 of its own.

  Python's own handlers run in the main thread, which may be waiting for the other process: this one runs in the thread that aborts.
  """

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def leave(_: int) -> None:
    _leave(1, f'aborted by the runtime of JAX; {AGAIN}')

  libc = ctypes.CDLL(None)
  libc.signal.argtypes = (ctypes.c_int, type(leave))
  libc.signal(signal.SIGABRT, leave)
  _leave_when_aborted.handler = leave  # it must outlive this call


def main(argv: Sequence[str]) -> None:
  """Runs the command; raises UserError instead of exiting."""
  flags, overrides = parse(argv)
  start_jax(flags.distributed)
  from latentgen import assembly, config as configs, run, sweeps

  file, config = configs.load(flags.config)
  if flags.sweep is None and flags.sweep_index is not None:
    raise UserError('--sweep_index needs --sweep=NAME')
  if flags.sweep_index is not None and flags.mode == 'collect':
    raise UserError('--mode=collect shows all runs of a sweep; leave --sweep_index out')
  if flags.mode == 'collect' and flags.sweep is None:
    raise UserError('--mode=collect needs --sweep=NAME')
  members = sweep(file, flags.sweep, flags.sweep_index, overrides)
  workdir = pathlib.Path(flags.workdir or pathlib.Path('runs') / file.name)
  whole = flags.sweep is not None and flags.sweep_index is None and flags.mode in ('train', 'evaluate', 'collect')
  sets = [values for _, values in members]
  if whole:
    sweeps.check(file, flags.sweep, sets)
  for name, values in members if flags.mode != 'collect' else ():
    one = copy.deepcopy(config)  # with its references
    configs.override(one, {**values, **overrides})
    command = run.Command(file, one, {**values, **overrides}, workdir / name if name else workdir, flags)
    with assembly.forms(one):
      getattr(run, flags.mode)(command)
  if whole:
    sweeps.collect(file, flags.sweep, sets, workdir)


def sweep(file, name: str | None, index: int | None, overrides: Collection[str] = ()):
  """The override sets to run: (folder, {key: value}); one empty set where nothing is swept. None sets a key of `overrides`."""
  if name is None:
    return [('', {})]
  if not callable(getattr(file.module, 'sweep', None)):
    raise UserError(f'--sweep={name}: {file.path} defines no sweep(name)')
  try:
    sets = list(file.module.sweep(name))
  except KeyError as error:
    raise UserError(f'--sweep={name}: {file.path} has no sweep of that name') from error
  except Exception as error:
    raise UserError(f'--sweep={name}: {file.path}: sweep({name!r}) failed: {one_line(error, SHORT)}') from error
  if not all(isinstance(s, Mapping) and all(isinstance(key, str) for key in s) for s in sets):
    raise UserError(f'--sweep={name}: {file.path}: sweep({name!r}) must return dicts of config keys and values')
  if index is not None and not 0 <= index < len(sets):
    raise UserError(f'--sweep_index is {index}, sweep {name!r} has {len(sets)} runs')
  for key in overrides:
    if any(key in s for s in sets):
      raise UserError(f'--config.{key} is set by sweep {name}; leave it out')
  return [(f'{name}-{i}', s) for i, s in enumerate(sets) if index in (None, i)]


def cli() -> None:
  """Entry point with the exit statuses of the command line."""
  gc.set_threshold(50_000)  # new objects; what is traced stays, and is not worth looking through at every 700 of them
  try:
    main(sys.argv[1:])
  except UserError as error:
    _leave(2, error)
  except (TrainingDiverged, SaveFailed) as error:
    _leave(1, error)
  except Preempted as error:
    _leave(PREEMPTED, error)
  except KeyboardInterrupt:
    _leave(130, 'interrupted; the same command goes on from the last checkpoint')
  except OSError as error:
    if error.errno not in DISK:
      raise
    _leave(1, f'{error.filename or "a file"} could not be written ({error.strerror}); the same command goes on from the last checkpoint')
  except RuntimeError as error:  # what the runtime of JAX raises
    if not _several():
      raise
    _leave(1, f'{one_line(error, SHORT)}; {AGAIN}')


def _several() -> bool:
  return 'jax' in sys.modules and sys.modules['jax'].process_count() > 1


def _leave(status: int, message: Any) -> NoReturn:
  print(f'latentgen: {message}', file=sys.stderr, flush=True)
  if _several() and status != PREEMPTED:
    os._exit(status)  # an orderly end would wait for processes that do not come
  sys.exit(status)


if __name__ == '__main__':
  hugepages.restart('latentgen.main')
  cli()
