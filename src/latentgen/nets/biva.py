"""BIVA: a deep hierarchy with two latents a layer, one inferred bottom-up and one top-down; the ladder VAE is a special case.

Maaloe, Fraccaro, Lievin and Winther, "BIVA: A Very Deep Hierarchy of Latent Variables for Generative Modeling", 2019, arXiv
1902.02102. Soenderby, Raiko, Maaloe, Soenderby and Winther, "Ladder Variational Autoencoders", 2016, arXiv 1602.02282.

p(x, z) = p(x | z) p(z_L) prod_{i<L} p(z_i^TD | z_>i) p(z_i^BU | z_>i)
q(z | x) = q(z_L | x, z_<L^BU) prod_{i<L} q(z_i^BU | x, z_<i^BU) q(z_i^TD | x, z_<i^BU, z_>i)

A level of a Trace is a layer, coarse to fine; its groups are (TD, BU), the top has one. Samples k are folded into the batch
behind the images, [b * k, ...]. With classes, y joins z at every stage of the generative model, and in q(z_L | .).
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from latentgen.distributions import Normal
from latentgen.errors import UserError, near
from latentgen.nets import images
from latentgen.nets.ladder import MERGES, SCALES, Down, Encoder, Head, Layer, Map, Posterior, Top, Up
from latentgen.nets.residual import Gated, Normed
from latentgen.types import Array, Choose, Distribution, Key, Trace, ancestral


def _terms(prior: Normal, q: Normal | None, z: Array, context: Array) -> dict[str, Any]:
  """The entries of a Trace for one group, leading axis n."""

  def total(a: Array) -> Array:
    return a.reshape(a.shape[0], -1).sum(-1)

  terms = {'eps': (z - prior.loc) / prior.scale, 'z': z, 'log_p': total(prior.log_prob(z)), 'context': context, 'prior': prior}
  return terms if q is None else {**terms, 'log_q': total(q.log_prob(z)), 'posterior': q}


class BIVA(nn.Module):
  """See `types.LatentNet` for the methods. Initialise with `method='infer'` on images: the layers take their scales from them.

  The context of a group is the state that its prior is computed from, flattened for vectors; the top has zeros. KLs are
  log-ratios of one sample, as published: a Trace has no closed form.

  Args:
    image_shape: (h, w, c).
    latents: dimensions of z_1, ..., z_L, fine to coarse; with `conv` channels of maps.
    strides: 1 or 2 of each encoder stage, fine to coarse; the last number counts for all that are missing.
    kernels: sizes of the convolutions of each stage, likewise.
    blocks: gated blocks a stage.
    filters: width.
    conv: latents are maps of their stage's size.
    head_kernel: of their heads; 0 is the size of the map, as published.
    bottom_up: False leaves z^BU and its path out.
    skip: False leaves out the paths from each stage of the generative model to the next.
    merge: how q(z^TD) is made, 'block' or 'precision' (the ladder VAE's), see ladder.Posterior.
    share_prior: 'precision' fuses with the prior itself.
    scale: 'std' or 'logvar', see ladder.gaussian; of priors and posteriors alike.
    dropout_q: rate in the encoder.
    dropout_p: rate in the generative model and in the blocks that merge.
    init_scale: standard deviation of the layers' outputs on the first batch.
    likelihood: 'bernoulli', 'dmol' or 'normal', see `images.pixel_likelihood`.
    mixtures: components (dmol).
    bits: bits a pixel (dmol).
    num_classes: classes y of p(x, z | y); 0: none.
    dtype: of the layers, 'float32' or 'bfloat16'; parameters and densities are float32.
  """

  image_shape: tuple[int, int, int]
  latents: tuple[int, ...] = (48, 40, 32, 24, 16, 8)
  strides: tuple[int, ...] = (2, 1, 1, 1, 1, 2)
  kernels: tuple[int, ...] = (5, 3)
  blocks: int = 3
  filters: int = 64
  conv: bool = False
  head_kernel: int = 0
  bottom_up: bool = True
  skip: bool = True
  merge: str = 'block'
  share_prior: bool = True
  scale: str = 'std'
  dropout_q: float = 0.0
  dropout_p: float = 0.0
  init_scale: float = 0.01
  likelihood: str = 'bernoulli'
  mixtures: int = 10
  bits: int = 8
  num_classes: int = 0
  dtype: str = 'float32'

  @property
  def sizes(self) -> list[tuple[int, int]]:
    """(h, w) of the image and of the maps of stages 1 to L."""
    sizes = [self.image_shape[:2]]
    for i in range(len(self.latents)):
      sizes.append(tuple(math.ceil(n / _at(self.strides, i)) for n in sizes[-1]))
    return sizes

  def __call__(self, x: Array, k: int = 1, train: bool = False) -> Trace:
    """`infer`."""
    return self.infer(x, k, train)

  def infer(self, x: Array, k: int = 1, train: bool = False, y: Array | None = None, choose: Choose = ancestral) -> Trace:
    """Posterior pass, [b, h, w, c] in [0, 1] -> Trace; the stochastic encoder runs once a sample.

    Args:
      x: images.
      k: samples an image.
      train: with dropout.
      y: classes, one-hot [b, classes], on which the Trace is conditioned; None draws y ~ q(y | x, z^BU) where there are
        classes, and the top level's log_q and log_p have log q(y | .) and log p(y) in them.
      choose: picks each latent from its posterior; its context is the state for TD, the features b_i for BU.
    """
    y = None if y is None else jnp.repeat(y, k, axis=0)
    trace = self._run(x, x.shape[0], k, choose, train, y)[0]
    return trace.replace(log_px=trace.px.log_prob(x))

  def infer_classes(
    self, x: Array, k: int = 1, train: bool = False, choose: Choose = ancestral
  ) -> tuple[Trace, Array]:
    """Posterior passes conditioned on every class in turn, over one bottom-up pass a sample.

    Returns:
      Trace with k * classes samples, the class the faster axis; log q(y | x, z^BU), [k, b, classes].
    """
    trace, logits = self._run(x, x.shape[0], k, choose, train, None, every_class=True)
    return trace.replace(log_px=trace.px.log_prob(x)), jax.nn.log_softmax(logits)

  def classify(self, x: Array, k: int = 1, train: bool = False) -> Array:
    """Logits of q(y | x, z^BU), [k, b, classes]; not conditioned on any latent that y conditions."""
    return self._run(x, x.shape[0], k, ancestral, train, None, logits_only=True)[1]

  def simulate(
    self, n: int, choose: Choose = ancestral, temperature: float = 1.0, train: bool = False, y: Array | None = None
  ) -> Trace:
    """Top-down pass without data: Trace with k = 1 and b = n; where there are classes, y [n, classes] is uniform by default.

    `choose` sees the prior with its standard deviation times `temperature`; log_p, eps and prior of the Trace are those of the
    model.
    """

    def tempered(level: int, group: Any, prior: Normal, context: Array, key: Key) -> Array:
      return choose(level, group, prior.temper(temperature), context, key)

    return self._run(None, n, 1, tempered, train, y)[0]

  def generate(self, n: int, choose: Choose = ancestral, temperature: float = 1.0) -> Distribution:
    """Distribution over [n, h, w, c]."""
    return jax.tree.map(lambda a: a[0], self.simulate(n, choose, temperature).px)

  @nn.compact
  def _run(
    self, x: Array | None, b: int, k: int, choose: Choose, train: bool, y: Array | None,
    every_class: bool = False, logits_only: bool = False,
  ) -> tuple[Any, Array | None]:  # fmt: skip
    """(Trace without log_px, logits [k, b, classes] or None)."""
    depth, classes, dtype, sizes = len(self.latents), self.num_classes, jnp.dtype(self.dtype), self.sizes
    common = {'init_scale': self.init_scale, 'dtype': dtype}
    root = self.make_rng('sample')

    def key(level: int, group: int) -> Key:
      return jax.random.fold_in(jax.random.fold_in(root, level), group)

    def block(i: int, dropout: float = self.dropout_p) -> Any:
      return functools.partial(Gated, self.filters, _at(self.kernels, i), dropout=dropout, **common)

    def stage(i: int, name: str) -> Up:
      return Up(block(i, self.dropout_q), self.blocks, _at(self.strides, i), i == 0, name=name)

    def head(i: int, name: str) -> Head:
      return Head(self.latents[i], self.conv, self.head_kernel, self.scale, **common, name=name)

    def seen(h: Array) -> Array:
      return h if self.conv else h.reshape(h.shape[0], -1)

    def draw(i: int, q: Normal, h: Array) -> Array:
      return choose(depth - 1 - i, 1, q, seen(h), key(depth - 1 - i, 1))

    n, top, taps, drawn, logits = b * k, None, [None] * depth, [], None
    if x is not None:
      parts = (stage, head, functools.partial(Map, **common), depth, classes, functools.partial(Normed, **common))
      taps, top, drawn, logits = Encoder(*parts, self.bottom_up, name='encoder')(x, k, draw, train)
      if logits_only:
        return None, jnp.moveaxis(logits.reshape(b, k, classes), 1, 0)

    log_q_y = log_p_y = 0.0
    if every_class:
      taps, top, drawn = jax.tree.map(lambda a: jnp.repeat(a, classes, axis=0), (taps, top, drawn))
      y, n = jnp.tile(jnp.eye(classes), (n, 1)), n * classes
    elif classes and y is None:
      uniform = jnp.zeros((n, classes))
      index = jax.random.categorical(key(depth, 0), uniform if logits is None else logits)
      y, log_p_y = jax.nn.one_hot(index, classes), -math.log(classes)
      log_q_y = 0.0 if logits is None else (jax.nn.log_softmax(logits) * y).sum(-1)

    state, above, terms = None, [None] * self.blocks, []
    for level in range(depth):
      i = depth - 1 - level
      if level:
        posterior = functools.partial(Posterior, block(i + 1), functools.partial(head, i), self.merge, self.share_prior)
        layer = Layer(1 + self.bottom_up, functools.partial(head, i), posterior, name=f'layer_{i}')
        priors, q = layer(state, taps[i], train)
        context = seen(state)
      else:
        shape = (*sizes[-1], self.latents[-1]) if self.conv else (self.latents[-1],)
        priors, q = [Normal(jnp.zeros((n, *shape)), jnp.ones((n, *shape)))], None
        context = jnp.zeros((n, *sizes[-1], 1) if self.conv else (n, 0))
        if x is not None:
          q = Top(block(i), functools.partial(head, i), name='posterior')(top, y, train)
      groups = []
      for group, prior in enumerate(priors):
        if group and x is not None:
          found, z = drawn[i]
        else:
          found, z = q, choose(level, group, prior if q is None else q, context, key(level, group))
        groups.append(_terms(prior, found, z, context))
      code = jnp.concatenate([group['z'] for group in groups], -1)
      terms.append(jax.tree.map(lambda *a: jnp.stack(a), *groups))
      state = Map((*sizes[i + 1], self.filters), **common, name=f'map_{i}')(code, y)
      outputs = Down(block(i), self.blocks, sizes[i], name=f'stage_{i}')(state, above, train)
      state, above = outputs[-1], outputs if self.skip else above

    channels = images.num_parameters(self.likelihood, self.image_shape[2], self.mixtures)
    raw = Normed(channels, **common, name='image')(nn.elu(state))
    terms[0]['log_p'] = terms[0]['log_p'] + log_p_y
    if x is not None:
      terms[0]['log_q'] = terms[0]['log_q'] + log_q_y

    def unfold(a: Array, axis: int = 1) -> Array:
      return jnp.moveaxis(a.reshape(*a.shape[:axis], b, n // b, *a.shape[axis + 1 :]), axis + 1, axis)

    terms = [jax.tree.map(unfold, t) for t in terms]
    trace = Trace(
      **{name: tuple(t[name] for t in terms) for name in ('eps', 'z', 'log_p', 'context', 'prior')},
      log_q=tuple(t['log_q'] for t in terms) if x is not None else (),
      kl=None,
      posterior=tuple(t['posterior'] for t in terms) if x is not None else None,
      log_px=None,
      px=images.pixel_likelihood(unfold(raw, 0), self.likelihood, self.image_shape[2], self.bits, self.mixtures),
      label=None if y is None else unfold(y, 0),
    )
    return trace, None if logits is None else jnp.moveaxis(logits.reshape(b, k, classes), 1, 0)


def _at(values: Sequence[int], i: int) -> int:
  return values[min(i, len(values) - 1)]


def build(image_shape: Sequence[int], **options: Any) -> BIVA:
  """A BIVA for images (h, w, c); the options are the fields of `BIVA`.

  Raises:
    UserError: if an option has a value that cannot be.
  """
  for name in ('latents', 'strides', 'kernels'):
    options[name] = tuple(options.get(name, getattr(BIVA, name)))
  net = BIVA(tuple(image_shape), **options)
  for name, least in (('latents', 1), ('kernels', 1), ('strides', 1)):
    values = getattr(net, name)
    if not values or min(values) < least:
      raise UserError(f'model.{name} is {values}, need one whole number of at least {least} a layer, fine to coarse')
  if max(net.strides) > 2:
    raise UserError(f'model.strides is {net.strides}, need 1 or 2 for each stage')
  for name, least in (('blocks', 1), ('filters', 1), ('head_kernel', 0), ('num_classes', 0), ('mixtures', 1), ('bits', 1)):
    if getattr(net, name) < least:
      raise UserError(f'model.{name} is {getattr(net, name)}, need at least {least}')
  for name in ('dropout_q', 'dropout_p'):
    if not 0 <= getattr(net, name) < 1:
      raise UserError(f'model.{name} is {getattr(net, name)}, need at least 0 and less than 1')
  if not net.init_scale > 0:
    raise UserError(f'model.init_scale is {net.init_scale}, need a positive number')
  choices = {'merge': MERGES, 'scale': SCALES, 'likelihood': images.LIKELIHOODS, 'dtype': ('float32', 'bfloat16')}
  for name, known in choices.items():
    if getattr(net, name) not in known:
      raise UserError(f'model.{name} is {getattr(net, name)!r}{near(getattr(net, name), known)}')
  if net.num_classes and not net.bottom_up:
    raise UserError('model.num_classes needs model.bottom_up: the classifier reads the bottom-up latents')
  return net
