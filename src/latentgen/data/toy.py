"""Distributions of known form in few dimensions, as images of one row: for studies whose answer is known.

Values are float32, not bytes: leave `binarize`, `bits` and the like of `config.data` at their defaults.
"""

import math

import numpy as np

from latentgen.data import memory
from latentgen.data.source import ArraySource
from latentgen.errors import UserError, near

KINDS = ('blobs', 'factors', 'circle', 'grid')


def load(
  kind: str = 'blobs',
  dims: int = 2,
  components: int = 4,
  noise: float = 0.5,
  train: int = 4000,
  valid: int = 1000,
  test: int = 1000,
  seed: int = 0,
) -> dict[str, ArraySource]:
  """Splits of images [1, dims, 1].

  blobs: a mixture of `components` equal Gaussians with deviation `noise`, their means at distance 4 from the origin, evenly
    around the circle in the first two dimensions; the label is the component.
  factors: x = W z + noise * u, z ~ N(0, I) with `components` dimensions, u ~ N(0, I), and W the first columns of a random
    orthogonal matrix times 4, 2, 1, 1/2 ...; no labels.
  circle: (cos t, sin t, 0, ..), t ~ von Mises(0, 1), density exp(cos t) / (2 pi I_0(1)); without noise, so that the
    points fill one dimension of `dims`; no labels.
  grid: a mixture of k x k = `components` equal Gaussians in the plane; their means ((i + 1/2) / k, (j + 1/2) / k) fill the unit
    square, `noise` is their deviation over the distance 1 / k of two neighbours, and the label is k i + j.

  Args:
    kind: one of KINDS.
    dims: dimensions of x.
    components: components of the mixture, or factors.
    noise: standard deviation; see above for that of a grid; unused by the circle, as `components`.
    train: examples in the split; `valid` and `test` likewise.
    seed: of the draw.

  Raises:
    UserError: a value that cannot be.
  """
  where = 'config.data'
  if kind not in KINDS:
    raise UserError(f'{where}.kind is {kind!r}{near(kind, KINDS)}')
  counts = {'dims': dims, 'components': components, 'train': train, 'valid': valid, 'test': test}
  for name, value in counts.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < (2 if name == 'dims' else 1):
      raise UserError(f'{where}.{name} is {value!r}, need a whole number of at least {2 if name == "dims" else 1}')
  if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 < noise < 1e30:
    raise UserError(f'{where}.noise is {noise!r}, need a positive number')
  if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
    raise UserError(f'{where}.seed is {seed!r}, need a whole number of at least 0')
  if kind == 'factors' and components > dims:
    raise UserError(f'{where}.components is {components}, more factors than the {dims} dimensions')
  side = math.isqrt(components)
  if kind == 'grid' and (side**2 != components or dims != 2):
    raise UserError(f'{where}.components is {components}, need a square number for a grid, and {where}.dims = 2, not {dims}')
  n = train + valid + test
  square = dims**2 if kind == 'factors' else 0
  memory.check(8 * (n * (dims + 1) + square), f'{where}.dims = {dims} with {n} examples', 'make one of them smaller')
  rng = np.random.default_rng([KINDS.index(kind), seed])
  if kind == 'blobs':
    labels = rng.integers(components, size=n)
    angle = 2 * math.pi * labels / components
    x = noise * rng.standard_normal((n, dims))
    x[:, 0] += 4 * np.cos(angle)
    x[:, 1] += 4 * np.sin(angle)
  elif kind == 'circle':
    labels, x = None, np.zeros((n, dims))
    angle = rng.vonmises(0.0, 1.0, n)
    x[:, 0], x[:, 1] = np.cos(angle), np.sin(angle)
  elif kind == 'grid':
    labels = rng.integers(components, size=n)
    x = (np.stack(divmod(labels, side), 1) + 0.5 + noise * rng.standard_normal((n, 2))) / side
  else:
    labels = None
    loadings = np.linalg.qr(rng.standard_normal((dims, dims)))[0][:, :components] * 4.0 * 0.5 ** np.arange(components)
    x = rng.standard_normal((n, components)) @ loadings.T + noise * rng.standard_normal((n, dims))
  images = x.astype(np.float32).reshape(n, 1, dims, 1)
  whole = ArraySource(images, labels, f'toy/{kind}', components if labels is not None else 0)
  cuts = {'train': slice(0, train), 'valid': slice(train, train + valid), 'test': slice(train + valid, None)}
  return {split: whole.subset(part, f'toy/{kind}/{split}') for split, part in cuts.items()}
