"""Normalising flows over vectors: coupling or autoregressive layers of monotone splines, and a learned linear map."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from latentgen.distributions import soft_clamp
from latentgen.errors import UserError, near
from latentgen.priors import coordinates
from latentgen.samplers.splines import spline
from latentgen.types import Array, Key

KINDS, TRANSFORMERS = ('coupling', 'autoregressive'), ('spline', 'affine')
START = 1e-2  # deviation of the last weights of a layer's network, so that a layer is near the identity at first


@dataclasses.dataclass(frozen=True)
class Flow:
  """v = b(u), u ~ N(0, I), log p(v) = log N(b^-1(v); 0, I) + log|det d b^-1 / dv|.

  b = A o b_1 o .. o b_layers, where A(y) = L y + c with L lower triangular and a positive diagonal. A is nearest to the data:
  splines are the identity outside an interval, and A brings the data into it and fits the tails that stay outside. Without layers
  the flow is a Gaussian of any covariance.

  A layer changes every coordinate by a monotone function whose parameters are what a masked network makes of the coordinates of
  lower rank, then permutes them. Ranks are 0 and 1 in equal parts ('coupling') or all different ('autoregressive').

  Args:
    kind: 'coupling', two passes for a sample, nearly as fast in both directions; 'autoregressive', d passes for a sample, one
      for a density.
    transformer: the monotone function, a rational-quadratic 'spline' or 'affine'.
    layers: of that kind.
    width: hidden units of a layer's network.
    depth: hidden layers of it.
    knots: bins of a spline.
    interval: a spline acts on (-interval, interval).

  References:
    Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", 2017, arXiv 1605.08803.
    Germain, Gregor, Murray and Larochelle, "MADE", 2015, arXiv 1502.03509 (the masks).
    Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation", 2017, arXiv 1705.07057.
    Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows", 2019, arXiv 1906.04032.
  """

  kind: Literal['coupling', 'autoregressive'] = 'coupling'
  transformer: Literal['spline', 'affine'] = 'spline'
  layers: int = 4
  width: int = 64
  depth: int = 2
  knots: int = 8
  interval: float = 4.0
  exact = True
  samplers = ('flow',)

  def init(self, key: Key, d: int) -> dict[str, Array]:
    params = {'loc': jnp.zeros(d), 'factor': jnp.zeros((d, d))}
    if not self.layers:
      return params
    masks = _masks(self, d)
    for i, (mask, k) in enumerate(zip(masks, jax.random.split(key, len(masks)), strict=True)):
      size = START if i == self.depth else 1.0
      fan_in = np.maximum(mask.sum(0), 1)
      params[f'kernel_{i}'] = size * mask * jax.random.normal(k, (self.layers, *mask.shape)) / np.sqrt(fan_in)
      params[f'bias_{i}'] = jnp.zeros((self.layers, mask.shape[1]))
    return params

  def loss(self, params: Any, key: Key, u: Array) -> Array:
    del key
    return -self.log_prob(params, u)

  def sample(self, params: Any, key: Key, n: int, d: int, sampler: str, temperature: float) -> Array:
    del sampler
    return self.transform(params, coordinates.standard(key, n, d, temperature))

  def log_prob(self, params: Any, u: Array) -> Array:
    base, log_det = self.inverse(params, u)
    return coordinates.log_normal(base) + log_det

  def transform(self, params: Any, u: Array) -> Array:
    """Base coordinates [n, d] -> vectors b(u) [n, d]."""
    if self.layers:
      d = u.shape[-1]
      ranks = int(_ranks(self, d).max()) + 1

      def step(y: Array, layer: tuple[Any, Array]) -> tuple[Array, None]:
        own, order = layer
        y = y[:, jnp.argsort(order)]
        # After pass i the coordinates of ranks up to i are right, and those of the next rank can be inverted.
        return jax.lax.fori_loop(0, ranks, lambda _, v: self._change(y, self._network(own, v), True)[0], y), None

      u, _ = jax.lax.scan(step, u, self._stack(params, d), reverse=True)
    factor, _ = _triangular(params)
    return u @ factor.T + params['loc']

  def inverse(self, params: Any, v: Array) -> tuple[Array, Array]:
    """Vectors [n, d] -> (base coordinates b^-1(v) [n, d], log|det d b^-1 / dv| [n])."""
    factor, log_det = _triangular(params)
    y = jax.scipy.linalg.solve_triangular(factor, (v - params['loc']).T, lower=True).T
    total = jnp.broadcast_to(-log_det, v.shape[:1])
    if not self.layers:
      return y, total

    def step(carry: tuple[Array, Array], layer: tuple[Any, Array]) -> tuple[tuple[Array, Array], None]:
      (y, total), (own, order) = carry, layer
      y, log_slope = self._change(y, self._network(own, y), False)
      return (y[:, order], total + log_slope.sum(-1)), None

    return jax.lax.scan(step, (y, total), self._stack(params, v.shape[-1]))[0]

  def evaluations(self, params: Any, d: int, sampler: str) -> float:
    """Passes through all layers: one a rank."""
    del params, sampler
    return float(_ranks(self, d).max() + 1) if self.layers else 0.0

  def _stack(self, params: Any, d: int) -> tuple[Any, Array]:
    """(parameters of the layers, their permutations [layers, d]), the layer nearest to the data first."""
    rng = np.random.default_rng(0)
    mix = self.kind == 'coupling' and d > 2
    orders = [rng.permutation(d) if mix else np.arange(d)[::-1] for _ in range(self.layers)]
    return {k: v for k, v in params.items() if k not in ('loc', 'factor')}, jnp.asarray(np.stack(orders))

  def _network(self, own: Any, y: Array) -> Array:
    """Parameters of the change of every coordinate, [n, d, p]; those of lower rank decide."""
    n, d = y.shape
    h = y
    for i, mask in enumerate(_masks(self, d)):
      h = (jax.nn.silu(h) if i else h) @ (own[f'kernel_{i}'] * mask) + own[f'bias_{i}']
    return h.reshape(n, d, -1)

  def _change(self, y: Array, raw: Array, backwards: bool) -> tuple[Array, Array]:
    """(the coordinates changed, log of the slopes), [n, d] each."""
    if self.transformer == 'spline':
      return spline(y, raw, self.interval, inverse=backwards)
    log_scale, shift = soft_clamp(raw[..., 0]), raw[..., 1]
    return (jnp.exp(-log_scale) * (y - shift), -log_scale) if backwards else (jnp.exp(log_scale) * y + shift, log_scale)


def _triangular(params: Any) -> tuple[Array, Array]:
  """(L [d, d], log det L)."""
  log_diagonal = jnp.diagonal(params['factor'])
  return jnp.tril(params['factor'], -1) + jnp.diag(jnp.exp(log_diagonal)), log_diagonal.sum()


def _ranks(flow: Flow, d: int) -> np.ndarray:
  return np.arange(d) if flow.kind == 'autoregressive' else (np.arange(d) >= math.ceil(d / 2)).astype(int)


@functools.lru_cache
def _masks(flow: Flow, d: int) -> tuple[np.ndarray, ...]:
  """0 or 1 for every weight of a layer's network: a unit of some rank sees no input of a higher one, an output only lower ones."""
  ranks = _ranks(flow, d)
  top = ranks.max()
  hidden = np.arange(flow.width) % top if top else np.full(flow.width, -1)
  outputs = np.repeat(ranks, 3 * flow.knots - 1 if flow.transformer == 'spline' else 2)
  layers = [ranks, *[hidden] * flow.depth]
  inner = [(a[:, None] <= b).astype(np.float32) for a, b in zip(layers[:-1], layers[1:], strict=True)]
  return (*inner, (hidden[:, None] < outputs).astype(np.float32) * (hidden[:, None] >= 0))


def build(**options) -> Flow:
  """The density as a config names it; see Flow.

  Raises:
    UserError: a value that cannot be, naming the key.
  """
  flow = Flow(**options)
  for name, known in (('kind', KINDS), ('transformer', TRANSFORMERS)):
    if getattr(flow, name) not in known:
      raise UserError(f'method.prior.{name} is {getattr(flow, name)!r}{near(getattr(flow, name), known)}')
  for name, least in (('layers', 0), ('width', 1), ('depth', 1), ('knots', 2)):
    value = getattr(flow, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise UserError(f'method.prior.{name} is {value!r}, need a whole number of at least {least}')
  if isinstance(flow.interval, bool) or not isinstance(flow.interval, (int, float)) or not flow.interval > 0:
    raise UserError(f'method.prior.interval is {flow.interval!r}, need a positive number')
  return flow
