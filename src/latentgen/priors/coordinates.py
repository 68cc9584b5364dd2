"""The noise coordinates of a Gaussian hierarchy, laid out as one vector a sample.

With z_l = loc_l(z_<l) + scale_l(z_<l) eps_l a density p(eps) is a prior for any such hierarchy; its base is N(0, I), whatever the
network. A plain VAE has eps = z.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp

from latentgen.errors import UserError
from latentgen.types import Array, Choose, Key, Trace


@dataclasses.dataclass(frozen=True)
class Coordinates:
  """Where each group of the covered levels lies in the vector.

  Args:
    shapes: (g, ...) of each covered level, coarse to fine.
  """

  shapes: tuple[tuple[int, ...], ...]

  @property
  def size(self) -> int:
    """d."""
    return sum(map(math.prod, self.shapes))

  def pack(self, levels: Sequence[Array]) -> Array:
    """eps per level [g, k, b, ...] (those below the covered ones are left out) -> [k, b, d]."""
    rows = [jnp.moveaxis(eps, 0, 2) for eps in levels[: len(self.shapes)]]
    return jnp.concatenate([row.reshape(*row.shape[:2], -1) for row in rows], -1)

  def unpack(self, u: Array) -> tuple[Array, ...]:
    """[n, d] -> eps per covered level, [g, n, ...]."""
    ends = list(itertools.accumulate(map(math.prod, self.shapes)))
    parts = jnp.split(u, ends[:-1], -1)
    return tuple(jnp.moveaxis(p.reshape(-1, *s), 1, 0) for p, s in zip(parts, self.shapes, strict=True))

  def choose(self, u: Array, below: Choose) -> Choose:
    """Places the vectors u [n, d]; groups of levels that are not covered come from `below`."""
    levels = self.unpack(u)

    def choose(level: int, group, prior, context: Array, key: Key) -> Array:
      if level >= len(levels):
        return below(level, group, prior, context, key)
      return prior.loc + prior.scale * levels[level][group].astype(prior.loc.dtype)

    return choose


def of(trace: Trace, levels: int = 0) -> Coordinates:
  """The coordinates of a trace (shapes suffice).

  Args:
    trace: any.
    levels: how many of the top levels are covered; 0 is all.

  Raises:
    UserError: the latents are not location-scale, or there are fewer levels.
  """
  if trace.prior is None:
    raise UserError('config.model.name: a learned prior needs location-scale latents, and this network has none')
  if not 0 <= levels <= len(trace.eps):
    raise UserError(f'method.levels is {levels}, and the network has {len(trace.eps)}')
  return Coordinates(tuple((e.shape[0], *e.shape[3:]) for e in trace.eps[: levels or None]))


def log_normal(u: Array) -> Array:
  """log N(u; 0, I) in nats, [..., d] -> [...]."""
  return -0.5 * (jnp.square(u).sum(-1) + u.shape[-1] * math.log(2.0 * math.pi))


def standard(key: Key, n: int, d: int, temperature: float = 1.0) -> Array:
  """n draws of N(0, temperature^2 I), [n, d]."""
  return temperature * jax.random.normal(key, (n, d))
