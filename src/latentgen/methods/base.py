"""Defaults of a method, and what every method on a latent-variable network shares."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from latentgen import nets
from latentgen.errors import UserError
from latentgen.types import Array, Batch, Choose, Context, Key, LatentNet, Params, Trace, Variables, ancestral

NET_GROUPS = ('encoder', 'decoder')


@functools.partial(jax.jit, static_argnums=0)
def _initialised(net: LatentNet, key: Key, x: Array) -> Any:
  """The network's own variables; jitted so that several stages with one network trace it once."""
  return net.init(dict(zip(('params', 'sample'), jax.random.split(key))), x, method='infer')


class Base:
  """A method with nothing to prepare, to carry, or to measure."""

  order = 'simultaneous'
  samplers: tuple[str, ...] = ('base',)

  def prepare(self, params: Params, ctx: Context) -> tuple[Any, Any]:
    del params
    return (), ctx.carry

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    del params, ctx
    return {}

  def sampler(self, name: str | None) -> str:
    """The sampler of that name, or the default one.

    Raises:
      UserError: if the method has no such sampler.
    """
    if name is None:
      return self.samplers[0]
    if name not in self.samplers:
      raise UserError(f'--sampler={name}: this method has {", ".join(self.samplers)}')
    return name


@dataclasses.dataclass(frozen=True)
class LatentMethod(Base):
  """A method on a `LatentNet`, whose parameters are the groups `encoder` and `decoder`.

  Args:
    net: the network; only `init` and `apply` are called.
  """

  net: LatentNet
  density = True  # traces hold log q and log p, so that there are bounds on log p(x)

  def init(self, key: Key, batch: Batch) -> Variables:
    found = _initialised(self.net, key, batch['image'])
    stats = nets.groups(found.get('batch_stats', {}))
    return {'params': nets.groups(found['params']), 'stats': {g: tree for g, tree in stats.items() if tree}}

  def example(self, variables: Variables, batch: Batch) -> Trace:
    """A posterior Trace with k = 1, of zeros: for what depends on shapes alone."""
    trace = jax.eval_shape(lambda v: self.infer(v['params'], v.get('stats', {}), batch['image'], jax.random.key(0))[0], variables)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), trace)

  def _apply(self, params: Params, stats: Any, key: Key, method: str, *args, train: bool = False, **kwargs):
    variables = {'params': nets.ungroup({g: params[g] for g in NET_GROUPS if g in params})}
    if running := {g: stats[g] for g in NET_GROUPS if g in stats}:
      variables['batch_stats'] = nets.ungroup(running)
    mutable = ['batch_stats'] if train else []
    out, changed = self.net.apply(
      variables, *args, train=train, rngs={'sample': key}, mutable=mutable, method=method, **kwargs
    )
    return out, {g: t for g, t in nets.groups(changed.get('batch_stats', {})).items() if t}

  def infer(self, params: Params, stats: Any, x: Array, key: Key, k: int = 1, train: bool = False):
    """(Trace of k posterior samples an image, changed statistics)."""
    return self._apply(params, stats, key, 'infer', x, k=k, train=train)

  def trace(self, variables: Variables, x: Array, key: Key, k: int = 1) -> Trace:
    return self.infer(variables['params'], variables['stats'], x, key, k)[0]

  def chooser(self, variables: Variables, sampler: str, temperature: float) -> Choose:
    """How a sampler picks one group; the base prior's own draw here."""
    del variables, sampler

    def choose(level, group, prior, context, key):
      return ancestral(level, group, prior.temper(temperature), context, key)

    return choose

  def simulate(
    self,
    variables: Variables,
    key: Key,
    n: int,
    sampler: str | None = None,
    temperature: float = 1.0,
    choose: Choose | None = None,
    label: Array | None = None,
  ) -> Trace:
    """A top-down pass in evaluation mode: Trace with k = 1 and b = n.

    Args:
      variables: {'params', 'stats'}.
      key: PRNG key.
      n: number of samples.
      sampler: one of `samplers`; the first by default.
      temperature: factor on the standard deviation of every base conditional.
      choose: overrides the sampler group by group.
      label: classes, one-hot [n, classes], of a network that has them; None: the network draws them.
    """
    choose = choose or self.chooser(variables, self.sampler(sampler), temperature)
    given = {} if label is None else {'y': label}
    return self._apply(variables['params'], variables['stats'], key, 'simulate', n, choose=choose, **given)[0]

  def sample(self, variables: Variables, key: Key, n: int, sampler: str | None = None, temperature: float = 1.0) -> Array:
    """[n, h, w, c] decoder means."""
    return self.simulate(variables, key, n, sampler, temperature).px.mean[0]

  def evaluations(self, variables: Variables, sampler: str) -> float:
    """Evaluations of the prior's networks that one sample takes; a gradient counts as one."""
    del variables, sampler
    return 0.0

  def readjust(self, variables: Variables, key: Key, temperature: float, batches: int = 500, n: int = 16) -> Variables:
    """BatchNorm statistics of prior samples at a temperature, in place of those of training images.

    Returns:
      variables with the statistics after `batches` top-down passes of n samples in training mode.

    References:
      Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020, arXiv 2007.03898, section 4.
    """
    if 'decoder' not in variables['stats']:
      return variables

    choose = LatentMethod.chooser(self, variables, 'base', temperature)

    def one(stats, key):
      _, changed = self._apply(variables['params'], stats, key, 'simulate', n, choose=choose, train=True)
      return {**stats, **changed}, None

    stats, _ = jax.lax.scan(one, dict(variables['stats']), jax.random.split(key, batches))
    return {**variables, 'stats': stats}


def without_classes(net: LatentNet, method: str) -> None:
  """For methods whose gradient does not pass through classes that are drawn.

  Raises:
    UserError: the network draws classes.
  """
  if classes := getattr(net, 'num_classes', 0):
    raise UserError(f"model.num_classes is {classes}: method {method!r} does not train classes; take 'semi_supervised', or set it to 0")


def per_group(levels: tuple[Array, ...]) -> Array:
  """Per-level terms [g, k, b] -> mean over k of all groups, [l, b]."""
  return jnp.concatenate([level.mean(1) for level in levels])
