"""Semi-supervised learning with a generative model p(x, z | y) p(y): unlabelled images marginalise the classes exactly.

Kingma, Rezende, Mohamed and Welling, "Semi-supervised Learning with Deep Generative Models", 2014, arXiv 1406.5298. Maaloe,
Fraccaro, Lievin and Winther, "BIVA: A Very Deep Hierarchy of Latent Variables for Generative Modeling", 2019, arXiv 1902.02102.
"""

import dataclasses

import jax
import jax.numpy as jnp

from latentgen import losses
from latentgen.errors import UserError
from latentgen.methods import vae
from latentgen.types import Array, Aux, Context, Key, LatentNet, Params, Update, Variables


@dataclasses.dataclass(frozen=True)
class SemiSupervised(vae.VAE):
  """One update of encoder and decoder, on batches whose 'label' is -1 where it is not known.

  F(x, y) = log p(x | z, y) - beta(t) sum_l KL_l(x, y) + log p(y), p(y) uniform
  U(x)    = sum_y q(y | x) F(x, y) + H[q(y | x)]
  loss    = -mean over the batch of (F(x, y) + alpha log q(y | x) where y is known, else U(x))

  q(y | x, z^BU) reads one bottom-up pass, which all classes share. `trace` draws y ~ q(y | x, z^BU) and counts log q(y | .) and
  log p(y) to the top level; `simulate` draws y ~ p(y). See methods.vae.VAE for the arguments that are not here.

  Args:
    alpha: weight of the classifier's log-likelihood; published: 0.1 * images / labelled images.
  """

  alpha: float = 0.1

  def updates(self) -> tuple[Update, ...]:
    return (Update('semi', ('encoder', 'decoder'), self.loss),)

  def _classes(self, params: Params, ctx: Context):
    """(Trace with k * classes samples, log q(y | x, z^BU) [k, b, classes], changed statistics)."""
    x = ctx.batch['image']
    (trace, log_qy), stats = self._apply(params, ctx.stats, ctx.key, 'infer_classes', x, k=self.samples, train=True)
    return trace, log_qy, stats

  def loss(self, params: Params, ctx: Context) -> tuple[Array, Aux]:
    trace, log_qy, stats = self._classes(params, ctx)
    k, b, classes = log_qy.shape
    label = ctx.batch['label']
    known = label >= 0
    rates = jnp.concatenate(trace.rate()).reshape(-1, k, classes, b)  # [l, k, classes, b]
    charged = self.charged(rates, ctx.step)
    log_px = trace.log_px.reshape(k, classes, b)
    log_qy = jnp.moveaxis(log_qy, 2, 1)  # [k, classes, b]
    beta = self.beta * self.schedule(ctx.step)
    given = jax.nn.one_hot(label, classes, axis=0)  # [classes, b]; zeros where the label is -1

    def objectives(kl: Array, weight: Array | float) -> tuple[Array, Array]:
      """(F(x, y) at the label, U(x)), [b] each."""
      each = log_px - weight * kl.sum(0) - jnp.log(classes)
      return (given * each).sum(1).mean(0), (jnp.exp(log_qy) * (each - log_qy)).sum(1).mean(0)

    labelled, unlabelled = objectives(charged, beta)
    log_label = (given * log_qy).sum(1).mean(0)
    loss = -jnp.where(known, labelled + self.alpha * log_label, unlabelled).mean()

    elbo = jnp.where(known, *objectives(rates, 1.0))
    count = jnp.maximum(known.sum(), 1)
    right = (log_qy.mean(0).argmax(0) == label) & known
    weights = jnp.where(known, given, jnp.exp(log_qy))  # [k, classes, b]
    metrics = {
      'elbo': elbo.mean(),
      'kl': (weights * rates.sum(0)).sum(1).mean(),
      'log_px': (weights * log_px).sum(1).mean(),
      'beta': beta,
      'labelled': known.mean(),
      'cross_entropy': -log_label.sum() / count,
      'accuracy': right.sum() / count,
    }
    return loss, Aux(metrics, stats)

  def metrics(self, params: Params, ctx: Context) -> dict[str, Array]:
    """Adds the classifier's cross-entropy and error, 0 where there is no label."""
    variables = {'params': params, 'stats': ctx.stats}
    log_p = self.classify(variables, ctx.batch['image'], jax.random.fold_in(ctx.key, 1))
    label = ctx.batch['label']
    known = label >= 0
    picked = jnp.take_along_axis(log_p, jnp.maximum(label, 0)[:, None], 1)[:, 0]
    wrong = (known & (log_p.argmax(1) != label)).astype(jnp.float32)
    return {**super().metrics(params, ctx), 'cross_entropy': jnp.where(known, -picked, 0.0), 'error': wrong}

  def classify(self, variables: Variables, x: Array, key: Key) -> Array:
    """log q(y | x) with `samples` bottom-up samples, averaged as probabilities: [b, classes]."""
    logits, _ = self._apply(variables['params'], variables['stats'], key, 'classify', x, k=self.samples)
    return losses.log_mean_exp(jax.nn.log_softmax(logits), axis=0)


def build(
  net: LatentNet,
  steps: int,
  *,
  alpha: float = 0.1,
  samples: int = 1,
  beta: float = 1.0,
  warmup_portion: float = 0.0,
  warmup_start: float = 1e-4,
  free_bits: float = 0.0,
  free_bits_decay: float = 0.0,
) -> SemiSupervised:
  """The method as a config names it; see SemiSupervised for the options.

  Raises:
    UserError: the network has no classes, or an option has a value that cannot be.
  """
  if getattr(net, 'num_classes', 0) < 2:
    raise UserError('model.num_classes is less than 2: method semi_supervised needs a network with classes')
  if alpha < 0:
    raise UserError(f'method.alpha is {alpha}, need at least 0')
  if samples < 1:
    raise UserError(f'method.samples is {samples}, need at least 1')
  shared = dict(samples=samples, beta=beta, warmup_portion=warmup_portion, warmup_start=warmup_start)
  shared |= dict(free_bits=free_bits, free_bits_decay=free_bits_decay)
  return SemiSupervised(net, steps, **vae.checked(shared), alpha=alpha)
