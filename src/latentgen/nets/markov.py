"""A Markov chain of latents under MLPs: x -> z_1 -> ... -> z_L in inference, z_L -> ... -> z_1 -> x in generation.

Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2015, arXiv 1509.00519, section 5.
"""

from collections.abc import Sequence
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from latentgen.distributions import Independent, Normal
from latentgen.errors import UserError, near
from latentgen.nets import images
from latentgen.nets.vae import ACTIVATIONS
from latentgen.types import Array, Choose, Distribution, Trace, ancestral

LIKELIHOODS = ('bernoulli', 'normal')


def _dense(features: int, name: str, **options: Any) -> nn.Dense:
  return nn.Dense(features, kernel_init=nn.initializers.xavier_uniform(), name=name, **options)


class Gaussian(nn.Module):
  """MLP to a diagonal Gaussian: [..., i] -> (Normal over [..., latent], last hidden layer [..., h]).

  Args:
    latent: dimensions.
    hidden: widths of the hidden layers.
    activation: of these.
  """

  latent: int
  hidden: tuple[int, ...]
  activation: str

  @nn.compact
  def __call__(self, h: Array) -> tuple[Normal, Array]:
    lead, h = h.shape[:-1], h.reshape(-1, h.shape[-1])  # gradients over one axis of rows are faster than over two
    for i, width in enumerate(self.hidden):
      h = getattr(nn, self.activation)(_dense(width, f'layer_{i}')(h))
    out = Normal(_dense(self.latent, 'loc')(h), jnp.exp(_dense(self.latent, 'log_scale')(h))), h
    return jax.tree.map(lambda a: a.reshape(*lead, -1), out)


class Encoder(nn.Module):
  """Pixels -> q(z_1 | x), q(z_2 | z_1) ..., each drawn from in turn."""

  latents: tuple[int, ...]
  hidden: tuple[tuple[int, ...], ...]
  activation: str

  @nn.compact
  def __call__(self, x: Array, k: int) -> list[tuple[Normal, Array]]:
    """[b, d] -> per latent, bottom up, (q over [k, b, latent], its sample)."""
    q, _ = Gaussian(self.latents[0], self.hidden[0], self.activation, name='q_0')(x)
    q = jax.tree.map(lambda a: jnp.broadcast_to(a, (k, *a.shape)), q)  # one pass through the first MLP for all samples
    found = [(q, q.sample(self.make_rng('sample')))]
    for i, (latent, hidden) in enumerate(zip(self.latents[1:], self.hidden[1:], strict=True), 1):
      q, _ = Gaussian(latent, hidden, self.activation, name=f'q_{i}')(found[-1][1])
      found.append((q, q.sample(self.make_rng('sample'))))
    return found


class Decoder(nn.Module):
  """z_1 -> one number a pixel; its bias starts where the mean of the first batch is."""

  outputs: int
  hidden: tuple[int, ...]
  activation: str
  logits: bool

  @nn.compact
  def __call__(self, z: Array, x: Array | None) -> Array:
    """[..., latent] -> [..., outputs]; x [b, outputs] is read when parameters are made."""
    lead, z = z.shape[:-1], z.reshape(-1, z.shape[-1])
    for i, width in enumerate(self.hidden):
      z = getattr(nn, self.activation)(_dense(width, f'layer_{i}')(z))

    def start(key, shape, dtype):
      del key
      if x is None:
        return jnp.zeros(shape, dtype)
      if not self.logits:
        return x.mean(0).astype(dtype)
      ones = x.sum(0) + x.mean()  # a pseudo-count, for pixels that are constant in the batch
      return jnp.log(ones / (x.shape[0] + 1.0 - ones)).astype(dtype)

    return _dense(self.outputs, 'head', bias_init=start)(z).reshape(*lead, -1)


class MarkovVAE(nn.Module):
  """One level a latent, top (z_L) first, with one group each; see `types.LatentNet` for the methods.

  q(z | x) = q(z_1 | x) prod_l q(z_{l+1} | z_l),  p(x, z) = p(z_L) prod_l p(z_l | z_{l+1}) p(x | z_1),  p(z_L) = N(0, I).

  With one latent the KL has a closed form; with more, `kl` is None. The context of a latent is the last hidden layer of
  the MLP that computes its prior, empty for z_L.

  Args:
    image_shape: (h, w, c).
    latents: dimensions of z_1 ... z_L, bottom up.
    hidden: for each latent the widths of its MLPs, q(z_l | z_{l-1}) and p(z_{l-1} | z_l); tanh, sigma = exp.
    activation: one of nets.vae.ACTIVATIONS.
    likelihood: 'bernoulli', or 'normal' with standard deviation `scale`.
    scale: of the normal likelihood, in the units of the image.
  """

  image_shape: tuple[int, int, int]
  latents: tuple[int, ...] = (50,)
  hidden: tuple[tuple[int, ...], ...] = ((200, 200),)
  activation: str = 'tanh'
  likelihood: str = 'bernoulli'
  scale: float = 1.0

  def setup(self) -> None:
    self.encoder = Encoder(self.latents, self.hidden, self.activation)
    reverse = [part[::-1] for part in self.hidden]
    # priors[l] gives p(z_l | z_{l+1}), l counted from 0 at the bottom.
    self.priors = [
      Gaussian(self.latents[i], reverse[i + 1], self.activation, name=f'prior_{i}') for i in range(len(self.latents) - 1)
    ]
    outputs = math.prod(self.image_shape)
    self.decoder = Decoder(outputs, reverse[0], self.activation, self.likelihood == 'bernoulli')

  def __call__(self, x: Array, k: int = 1, train: bool = False) -> Trace:
    """`infer`."""
    return self.infer(x, k, train)

  def infer(self, x: Array, k: int = 1, train: bool = False) -> Trace:
    """Posterior pass, [b, h, w, c] in [0, 1] -> Trace."""
    del train
    flat = x.reshape(x.shape[0], -1)
    found = self.encoder(flat, k)[::-1]
    trace = self._trace([z for _, z in found], flat)
    kl = None
    if len(found) == 1:
      kl = (found[0][0].kl(_standard(found[0][1].shape)).sum(-1)[None],)
    return trace.replace(
      log_q=tuple(q.log_prob(z).sum(-1)[None] for q, z in found),
      kl=kl,
      log_px=trace.px.log_prob(x),
      posterior=tuple(jax.tree.map(lambda a: a[None], q) for q, _ in found),
    )

  def simulate(self, n: int, choose: Choose = ancestral, temperature: float = 1.0, train: bool = False) -> Trace:
    """Trace of a draw from the prior, whose standard deviations `choose` sees times `temperature`; k = 1, b = n."""
    del train
    prior, context, drawn = _standard((n, self.latents[-1])), jnp.zeros((n, 0)), []
    for level in range(len(self.latents)):
      if level:
        prior, context = self.priors[-level](drawn[-1])
      drawn.append(choose(level, 0, prior.temper(temperature), context, self.make_rng('sample')))
    return self._trace([z[None] for z in drawn])

  def generate(self, n: int, choose: Choose = ancestral, temperature: float = 1.0) -> Distribution:
    """Distribution over [n, h, w, c]."""
    return jax.tree.map(lambda a: a[0], self.simulate(n, choose, temperature).px)

  def _trace(self, latents: list[Array], x: Array | None = None) -> Trace:
    """What generation alone knows; latents top first, each [k, b, d]."""
    top = latents[0]
    priors, contexts = [_standard(top.shape)], [jnp.zeros((*top.shape[:-1], 0))]
    for net, above in zip(self.priors[::-1], latents[:-1], strict=True):
      prior, context = net(above)
      priors.append(prior)
      contexts.append(context)
    out = self.decoder(latents[-1], x).reshape(*latents[-1].shape[:-1], *self.image_shape)
    if self.likelihood == 'bernoulli':
      px = images.pixel_likelihood(out, 'bernoulli', self.image_shape[2], 8, 1)
    else:
      px = Independent(Normal(out, jnp.full(out.shape, self.scale)), 3)
    return Trace(
      eps=tuple(((z - p.loc) / p.scale)[None] for p, z in zip(priors, latents, strict=True)),
      z=tuple(z[None] for z in latents),
      log_q=(),
      log_p=tuple(p.log_prob(z).sum(-1)[None] for p, z in zip(priors, latents, strict=True)),
      kl=None,
      context=tuple(c[None] for c in contexts),
      prior=tuple(jax.tree.map(lambda a: a[None], p) for p in priors),
      log_px=None,
      px=px,
    )


def _standard(shape: tuple[int, ...]) -> Normal:
  return Normal(jnp.zeros(shape), jnp.ones(shape))


def build(image_shape: Sequence[int], **options: Any) -> MarkovVAE:
  """A MarkovVAE for images (h, w, c); the options are the fields of `MarkovVAE`.

  Raises:
    UserError: if an option has a value that cannot be.
  """
  options['latents'] = tuple(options.get('latents', MarkovVAE.latents))
  options['hidden'] = tuple(tuple(h) for h in options.get('hidden', MarkovVAE.hidden))
  net = MarkovVAE(tuple(image_shape), **options)
  if not net.latents or min(net.latents) < 1:
    raise UserError(f'model.latents is {net.latents}: it needs the dimensions of every latent, bottom up')
  if len(net.hidden) != len(net.latents):
    raise UserError(f'model.hidden has {len(net.hidden)} entries, model.latents {len(net.latents)}: one tuple of widths a latent')
  if any(width < 1 for widths in net.hidden for width in widths):
    raise UserError(f'model.hidden is {net.hidden!r}, need positive whole numbers')
  if net.activation not in ACTIVATIONS:
    raise UserError(f'model.activation is {net.activation!r}{near(net.activation, ACTIVATIONS)}')
  if net.likelihood not in LIKELIHOODS:
    raise UserError(f'model.likelihood is {net.likelihood!r}{near(net.likelihood, LIKELIHOODS)}')
  if not net.scale > 0:
    raise UserError(f'model.scale is {net.scale!r}, need a positive number')
  return net
