"""The networks that are compared, from the framework's own parts."""

from flax import linen as nn
import jax

from latentgen.distributions import Normal
from latentgen.nets import images, nvae, vae
from latentgen.nets.layers import Conv, ConvTranspose, Dense, batch_norm
from latentgen.types import Array, Distribution, Trace

LATENT = 16


class Encoder(nn.Module):
  """Pythae's Encoder_Conv_VAE_MNIST."""

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
    for width in (128, 256, 512, 1024):
      x = nn.relu(batch_norm(train)(Conv(width, 4, 2)(x)))
    x = x.reshape(x.shape[0], -1)
    return Dense(LATENT)(x), Dense(LATENT)(x)


class Decoder(nn.Module):
  """Pythae's Decoder_Conv_AE_MNIST, up to its sigmoid."""

  @nn.compact
  def __call__(self, z: Array, train: bool = False) -> Array:
    h = Dense(4 * 4 * 1024)(z).reshape(-1, 4, 4, 1024)
    for width, more in ((512, 0), (256, 1)):
      h = nn.relu(batch_norm(train)(ConvTranspose(width, output_padding=more)(h)))
    return ConvTranspose(1, output_padding=1)(h)


class ConvVAE(nn.Module):
  """The convolutional VAE of Pythae's MNIST benchmark, 17 M parameters, as a `types.LatentNet`."""

  def setup(self) -> None:
    self.encoder, self.decoder = Encoder(), Decoder()

  def infer(self, x: Array, k: int = 1, train: bool = False) -> Trace:
    loc, log_variance = self.encoder(x, train)
    q = jax.tree.map(lambda a: a[None].repeat(k, 0), Normal(loc, jax.numpy.exp(0.5 * log_variance)))
    z = q.sample(self.make_rng('sample'))
    prior = Normal(jax.numpy.zeros(z.shape), jax.numpy.ones(z.shape))
    px = self.decode(z, train)
    return Trace(
      eps=(z[None],),
      z=(z[None],),
      log_q=(q.log_prob(z).sum(-1)[None],),
      log_p=(prior.log_prob(z).sum(-1)[None],),
      kl=(q.kl(prior).sum(-1)[None],),
      context=(jax.numpy.zeros((1, *z.shape[:-1], 0)),),
      prior=None,
      log_px=px.log_prob(x),
      px=px,
      posterior=None,
    )

  def decode(self, z: Array, train: bool = False) -> Distribution:
    logits = self.decoder(z.reshape(-1, LATENT), train)
    return images.pixel_likelihood(logits.reshape(*z.shape[:-1], *logits.shape[1:]), 'bernoulli', 1, 8, 1)


def mlp() -> vae.VAE:
  return vae.build((28, 28, 1), latent=LATENT, hidden=(512,))


def hierarchy(**options) -> nvae.NVAE:
  """The NVAE of the table, 1.28 M parameters: one group at 4x4, two at 8x8."""
  small = {'groups': (1, 2), 'latent': 20, 'channels': 16, 'pre_blocks': 2, 'pre_cells': 2, 'cells_encoder': 1, 'cells_decoder': 1}
  return nvae.build((28, 28, 1), **{**small, **options})
