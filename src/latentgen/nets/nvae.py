"""NVAE: groups of latent maps over several resolutions, a bottom-up encoder and a top-down decoder that q and p share.

Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020, arXiv 2007.03898.

The groups of one resolution are one `nn.scan`, so that compile time does not grow with depth. Their parameters are
stacked under a name that starts with `stack`. Samples k are folded into the batch behind the images, [b * k, ...],
which keeps the batch sharded; a Trace has them in front.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from latentgen.distributions import Normal, soft_clamped_normal
from latentgen.errors import UserError
from latentgen.nets import images
from latentgen.nets.cells import DecoderCell, EncoderCell
from latentgen.nets.flows import Flow
from latentgen.nets.layers import Conv
from latentgen.types import Array, Choose, Distribution, Trace, ancestral


def adaptive_groups(scales: int, finest: int, minimum: int = 1) -> tuple[int, ...]:
  """Groups per resolution, coarse to fine: `finest` at the finest, then half as many each, at least `minimum`.

  MNIST: (2, 10) -> (5, 10). CelebA-HQ 256: (5, 16, 4) -> (4, 4, 4, 8, 16).
  """
  counts = [finest]
  while len(counts) < scales:
    counts.append(max(minimum, counts[-1] // 2))
  return tuple(reversed(counts))


def kl_balance_alpha(groups: Sequence[int]) -> list[float]:
  """Weights of all groups, coarse to fine, in NVAE's KL balancing: 4^s / groups[s], divided by the smallest.

  Args:
    groups: groups per resolution, coarse to fine.

  References:
    Vahdat and Kautz, 2020, arXiv 2007.03898, appendix A; Vahdat et al., "DVAE++", 2018, arXiv 1802.04920.
  """
  levels = [4**s / g for s, g in enumerate(groups)]
  return [a / min(levels) for a, g in zip(levels, groups, strict=True) for _ in range(g)]


def _terms(prior: Normal, z: Array, context: Array, posterior: Normal | None, base: Array | None) -> dict[str, Any]:
  """The entries of a Trace for one group, leading axis n; `base` is the sample of q before its flows, `z` after."""

  def total(a: Array) -> Array:
    return a.sum((1, 2, 3))

  terms = {
    'eps': (z - prior.loc) / prior.scale,
    'z': z,
    'log_p': total(prior.log_prob(z)),
    'context': context,
    'prior': prior,
  }
  if posterior is not None:
    terms['log_q'] = total(posterior.log_prob(base))  # flows preserve volume
    if base is z:
      terms |= {'kl': total(posterior.kl(prior)), 'posterior': posterior}
  return terms


class Posterior(nn.Module):
  """q(z_l | z_<l, x) from a bottom-up feature and the top-down state.

  Args:
    latent: channels of z_l.
    flows: number of volume-preserving flows on the sample.
    dtype: of the computation.
  """

  latent: int
  flows: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, feature: Array, state: Array | None, prior: Array | None) -> tuple[Normal, Array, Array]:
    """One sample.

    Args:
      feature: [n, h, w, c].
      state: top-down state [n, h, w, c]; None for the first group.
      prior: raw mean and log-scale [n, h, w, 2 latent] of the prior, which q's are added to, or None.

    Returns:
      the Normal, its sample, and the sample after the flows (the same array without flows), [n, h, w, latent].
    """
    if state is not None:
      feature = feature + Conv(feature.shape[-1], 1, weight_norm=True, dtype=self.dtype, name='combine')(state)
    raw = Conv(2 * self.latent, 3, weight_norm=True, dtype=self.dtype, name='sampler')(feature).astype(jnp.float32)
    q = soft_clamped_normal(*jnp.split(raw if prior is None else prior + raw, 2, -1))
    base = z = q.sample(self.make_rng('sample'))
    for i in range(self.flows):
      z = Flow(self.dtype, name=f'flow_{i}')(z)
    return q, base, z


class Combine(nn.Module):
  """s <- Conv1x1(concat[s, z])."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, state: Array, z: Array) -> Array:
    """[n, h, w, c], [n, h, w, latent] -> [n, h, w, c]."""
    both = jnp.concatenate([state, z.astype(state.dtype)], -1)
    return Conv(state.shape[-1], 1, weight_norm=True, dtype=self.dtype, name='conv')(both)


class DecoderGroup(nn.Module):
  """Scan body over the groups of a level: decoder cells, prior, posterior or choice, combiner.

  Args:
    level: index of the level.
    cells: cells before the group.
    cell: makes a decoder cell from its width and name.
    posterior: makes the posterior from its name.
    residual: q is relative to p.
    choose: picks z when there is no feature.
    latent: channels of z.
    dtype: of the computation.
  """

  level: int
  cells: int
  cell: Callable[..., nn.Module]
  posterior: Callable[..., nn.Module]
  residual: bool
  choose: Choose
  latent: int
  dtype: Any

  @nn.compact
  def __call__(self, state: Array, inputs: tuple[Array, Array | None]) -> tuple[Array, dict[str, Any]]:
    """State [n, h, w, c] and (index of the group, feature [b, h, w, c] or None) -> next state and the group's terms."""
    group, feature = inputs
    for i in range(self.cells):
      state = self.cell(state.shape[-1], name=f'cell_{i}')(state)
    raw = Conv(2 * self.latent, 1, weight_norm=True, dtype=self.dtype, name='prior')(nn.elu(state)).astype(jnp.float32)
    prior = soft_clamped_normal(*jnp.split(raw, 2, -1))
    q = base = None
    if feature is None:
      z = self.choose(self.level, group, prior, state, self.make_rng('sample'))
    else:
      feature = jnp.repeat(feature, state.shape[0] // feature.shape[0], axis=0)
      q, base, z = self.posterior(name='posterior')(feature, state, raw if self.residual else None)
    return Combine(self.dtype, name='combine')(state, z), _terms(prior, z, state, q, base)


class EncoderGroup(nn.Module):
  """Scan body over the groups of a level, bottom up: encoder cells, then a tap."""

  cells: int
  cell: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, h: Array, _: None) -> tuple[Array, Array]:
    """[b, h, w, c] -> twice the same shape."""
    for i in range(self.cells):
      h = self.cell(h.shape[-1], name=f'cell_{i}')(h)
    return h, h


class Encoder(nn.Module):
  """Bottom-up tower.

  Args:
    groups: groups per level, coarse to fine.
    channels: of the stem.
    pre_blocks: blocks before the first level, each of which halves the map.
    pre_cells: cells a block.
    cells: cells before each tap.
    cell: makes an encoder cell.
    scan: makes a module that runs over the groups of a level.
    dtype: of the computation.
  """

  groups: tuple[int, ...]
  channels: int
  pre_blocks: int
  pre_cells: int
  cells: int
  cell: Callable[..., nn.Module]
  scan: Callable[..., Any]
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, list[Array]]:
    """Images [b, h, w, c] in [0, 1] -> feature of the first group; per level, [g, b, h, w, c] of the other groups."""
    h = Conv(self.channels, 3, weight_norm=True, dtype=self.dtype, name='stem')(2.0 * x - 1.0)
    for i in range(self.pre_blocks):
      for j in range(self.pre_cells):
        down = j == self.pre_cells - 1
        h = self.cell(h.shape[-1] * (2 if down else 1), down=down, name=f'pre_{i}_{j}')(h)
    features = []
    for level in reversed(range(len(self.groups))):
      # In reverse, so that tap and parameters of a group have the index that the decoder gives it.
      stack = self.scan(EncoderGroup, self.groups[level], reverse=True)
      h, taps = stack(self.cells, self.cell, name=f'stack_{level}')(h, None)
      features.insert(0, taps)
      if level:
        h = self.cell(2 * h.shape[-1], down=True, name=f'down_{level}')(h)
    features[0] = features[0][1:]  # the first one is h
    return nn.elu(Conv(h.shape[-1], 1, weight_norm=True, dtype=self.dtype, name='top')(nn.elu(h))), features


class NVAE(nn.Module):
  """Deep hierarchical VAE; see `types.LatentNet` for its methods. Initialise with `method='infer'`.

  The first group has a fixed prior N(0, 1.01^2) (1.01 is what the soft clamp makes of 0, as in the published code) and
  the learned constant as context.

  Args:
    image_shape: (h, w, c); images are zero-padded to a size that all levels divide, the decoder's output is cropped.
    groups: groups per level, coarse to fine.
    latent: channels of a group.
    channels: of the stem; every halving of the map doubles them.
    pre_blocks: blocks before the encoder's tower, each halves the map; as many after the decoder's. May be 0.
    pre_cells: cells in each of these blocks.
    cells_encoder: cells a group in the encoder.
    cells_decoder: cells a group in the decoder.
    flows: volume-preserving flows on each posterior; with them the KL has no closed form.
    residual_posterior: q is relative to p.
    likelihood: 'bernoulli', 'dmol' or 'normal', see `images.pixel_likelihood`.
    mixtures: components (dmol).
    bits: bits a pixel (dmol).
    squeeze_excite: gates in all cells.
    remat: recomputes activations in the backward pass.
    dtype: of convolutions, 'float32' or 'bfloat16'; parameters, densities and statistics are float32.
  """

  image_shape: tuple[int, int, int]
  groups: tuple[int, ...] = (5, 10)
  latent: int = 20
  channels: int = 32
  pre_blocks: int = 2
  pre_cells: int = 3
  cells_encoder: int = 2
  cells_decoder: int = 2
  flows: int = 0
  residual_posterior: bool = True
  likelihood: str = 'bernoulli'
  mixtures: int = 10
  bits: int = 8
  squeeze_excite: bool = True
  remat: bool = False
  dtype: str = 'float32'

  @property
  def multiple(self) -> int:
    """What the sides of a padded image are multiples of."""
    return 2 ** (self.pre_blocks + len(self.groups) - 1)

  def latent_shape(self, level: int) -> tuple[int, int, int]:
    """(h, w, latent) of one group."""
    side = [images.padded_size(n, self.multiple) * 2**level // self.multiple for n in self.image_shape[:2]]
    return side[0], side[1], self.latent

  def __call__(self, x: Array, k: int = 1, train: bool = False) -> Trace:
    """`infer`."""
    return self.infer(x, k, train)

  def infer(self, x: Array, k: int = 1, train: bool = False) -> Trace:
    """Posterior pass, [b, h, w, c] in [0, 1] -> Trace; one encoder pass for all k samples."""
    trace = self._run(x, x.shape[0], k, ancestral, train)
    return trace.replace(log_px=trace.px.log_prob(x))

  def simulate(self, n: int, choose: Choose = ancestral, temperature: float = 1.0, train: bool = False) -> Trace:
    """Top-down pass without data: Trace with k = 1 and b = n.

    `choose` sees the prior with its standard deviation times `temperature`; log_p, eps and prior of the Trace are those
    of the model. `train` re-adjusts BatchNorm's statistics.
    """

    def tempered(level: int, group: Any, prior: Normal, context: Array, key: Any) -> Array:
      return choose(level, group, prior.temper(temperature), context, key)

    return self._run(None, n, 1, tempered, train)

  def generate(self, n: int, choose: Choose = ancestral, temperature: float = 1.0) -> Distribution:
    """Distribution over [n, h, w, c]."""
    return jax.tree.map(lambda a: a[0], self.simulate(n, choose, temperature).px)

  @nn.compact
  def _run(self, x: Array | None, b: int, k: int, choose: Choose, train: bool) -> Trace:
    n, dtype, levels = b * k, jnp.dtype(self.dtype), len(self.groups)
    wrap = functools.partial(nn.remat, prevent_cse=False) if self.remat else lambda module: module
    options = {'squeeze_excite': self.squeeze_excite, 'train': train, 'dtype': dtype}
    posterior = functools.partial(Posterior, self.latent, self.flows, dtype)

    def scan(body: type[nn.Module], length: int, reverse: bool = False) -> Any:
      # Inside a scan XLA cannot merge the recomputation with the forward pass, so remat needs no barrier.
      axes, rngs = {'params': 0, 'batch_stats': 0}, {'params': True, 'sample': True}
      return nn.scan(wrap(body), variable_axes=axes, split_rngs=rngs, length=length, reverse=reverse)

    first, features = None, [None] * levels
    if x is not None:
      cell = functools.partial(EncoderCell, **options)
      tower = (self.channels, self.pre_blocks, self.pre_cells, self.cells_encoder)
      first, features = Encoder(self.groups, *tower, cell, scan, dtype, name='encoder')(images.pad(x, self.multiple))

    shape = (*self.latent_shape(0)[:2], self.channels * self.multiple)
    constant = self.param('constant', nn.initializers.uniform(1.0), shape)
    state = jnp.broadcast_to(constant.astype(dtype), (n, *shape))
    zeros = jnp.zeros((n, *self.latent_shape(0)))
    prior, q, base = soft_clamped_normal(zeros, zeros), None, None
    if first is None:
      z = choose(0, 0, prior, state, self.make_rng('sample'))
    else:
      q, base, z = posterior(name='posterior')(jnp.repeat(first, k, axis=0), None, None)
    terms = [_terms(prior, z, state, q, base)]
    state = Combine(dtype, name='combine')(state, z)

    cell = functools.partial(DecoderCell, **options)
    for level, count in enumerate(self.groups):
      if level:
        state = cell(state.shape[-1] // 2, up=True, name=f'up_{level}')(state)
      start = 0 if level else 1
      if count > start:
        body = (level, self.cells_decoder, cell, posterior, self.residual_posterior, choose, self.latent, dtype)
        stack = scan(DecoderGroup, count - start)(*body, name=f'stack_{level}')
        state, rest = stack(state, (jnp.arange(start, count, dtype=jnp.int32), features[level]))
        if level:
          terms.append(rest)
        else:
          terms[0] = jax.tree.map(lambda a, r: jnp.concatenate([a[None], r]), terms[0], rest)
      else:
        terms[0] = jax.tree.map(lambda a: a[None], terms[0])

    cell = functools.partial(cell, expansion=3)
    for i in range(self.pre_blocks):
      for j in range(self.pre_cells):
        state = cell(state.shape[-1] // (1 if j else 2), up=not j, name=f'post_{i}_{j}')(state)
    outputs = images.num_parameters(self.likelihood, self.image_shape[2], self.mixtures)
    raw = Conv(outputs, 3, weight_norm=True, dtype=dtype, name='image')(nn.elu(state))

    def unfold(a: Array, axis: int) -> Array:
      return jnp.moveaxis(a.reshape(*a.shape[:axis], b, k, *a.shape[axis + 1 :]), axis + 1, axis)

    raw = images.crop(unfold(raw, 0), *self.image_shape[:2])
    terms = [jax.tree.map(lambda a: unfold(a, 1), t) for t in terms]
    return Trace(
      **{name: tuple(t[name] for t in terms) for name in ('eps', 'z', 'log_p', 'context', 'prior')},
      log_q=tuple(t['log_q'] for t in terms) if x is not None else (),
      kl=tuple(t['kl'] for t in terms) if 'kl' in terms[0] else None,
      posterior=tuple(t['posterior'] for t in terms) if 'posterior' in terms[0] else None,
      log_px=None,
      px=images.pixel_likelihood(raw, self.likelihood, self.image_shape[2], self.bits, self.mixtures),
    )


def build(image_shape: Sequence[int], **options: Any) -> NVAE:
  """An NVAE for images (h, w, c); the options are the fields of `NVAE`.

  Raises:
    UserError: if an option has a value that cannot be.
  """
  options['groups'] = tuple(options.get('groups', NVAE.groups))
  net = NVAE(tuple(image_shape), **options)
  for name in ('latent', 'channels', 'cells_encoder', 'cells_decoder', 'mixtures', 'bits'):
    if type(value := getattr(net, name)) is not int or value < 1:
      raise UserError(f'model.{name} is {value!r}, need a positive whole number')
  if net.flows < 0:
    raise UserError(f'model.flows is {net.flows!r}, need at least 0')
  if not net.groups or min(net.groups) < 1:
    raise UserError(f'model.groups is {net.groups}: it needs one positive number a level, coarse to fine')
  if net.likelihood not in images.LIKELIHOODS:
    raise UserError(f'model.likelihood is {net.likelihood!r}, not one of {", ".join(images.LIKELIHOODS)}')
  if net.dtype not in ('float32', 'bfloat16'):
    raise UserError(f"model.dtype is {net.dtype!r}, not 'float32' or 'bfloat16'")
  if net.pre_blocks < 0 or (net.pre_blocks and net.pre_cells < 1):
    raise UserError('model.pre_blocks must not be negative, and model.pre_cells at least 1')
  return net
