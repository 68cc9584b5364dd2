"""Semi-supervised training: the objective against loops over the classes, traces whose class is drawn, unknown labels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from latentgen.errors import UserError
from latentgen.methods import iwae, semi_supervised, vae
from latentgen.nets import biva, groups
from latentgen.types import Context, Trace

KEY = jax.random.key(0)
CLASSES, K, B = 3, 2, 5
LABELS = np.array([1, -1, 0, -1, 2])


# ---------------------------------------------------------------------------------------- the loss on given numbers


def numbers():
  """(rates per level [g, k, classes, b], log p(x|z, y) [k, classes, b], logits [k, b, classes])."""
  rng = np.random.default_rng(0)
  levels = tuple(rng.normal(1.5, 1.5, (g, K, CLASSES, B)) for g in (1, 2))
  return levels, rng.normal(-20, 2, (K, CLASSES, B)), rng.normal(size=(K, B, CLASSES))


@dataclasses.dataclass(frozen=True)
class Given:
  """A network that finds `numbers`, its rates times a parameter of the encoder, its logits times another."""

  num_classes: int = CLASSES

  def apply(self, variables, x, k, rngs, mutable, method, train=False):
    del rngs, mutable, train
    params = variables['params']['encoder']
    levels, log_px, logits = numbers()
    log_qy = jax.nn.log_softmax(params['b'] * jnp.float32(logits))
    if method == 'classify':
      return params['b'] * jnp.float32(logits), {}
    assert method == 'infer_classes' and k == K and x.shape[0] == B
    flat = lambda a: jnp.float32(a).reshape(*a.shape[:-3], K * CLASSES, B)
    log_q = tuple(params['a'] * flat(level) for level in levels)
    zeros = tuple(jnp.zeros(q.shape) for q in log_q)
    return (Trace((), (), log_q, zeros, None, (), None, flat(log_px), None), log_qy), {}


def context(labels=LABELS, step=0):
  batch = {'image': jnp.zeros((B, 1, 1, 1)), 'label': jnp.asarray(labels, jnp.int32)}
  return Context(batch=batch, key=KEY, step=jnp.asarray(step), stats={})


PARAMS = {'encoder': {'encoder': {'a': jnp.ones(()), 'b': jnp.ones(())}}, 'decoder': {}}


def by_hand(labels, alpha, floor, a=1.0, b=1.0):
  """The loss by loops over images, samples and classes."""
  levels, log_px, logits = numbers()
  total = 0.0
  for n in range(B):
    for k in range(K):
      log_q = logits[k, n] * b - special.logsumexp(logits[k, n] * b)
      bound = []
      for c in range(CLASSES):
        rates = [a * level[g, k, c, n] for level in levels for g in range(len(level))]
        bound.append(log_px[k, c, n] - sum(max(r, floor) for r in rates) + np.log(1 / CLASSES))
      if labels[n] >= 0:
        total += bound[labels[n]] + alpha * log_q[labels[n]]
      else:
        total += sum(np.exp(log_q[c]) * bound[c] for c in range(CLASSES)) - sum(np.exp(log_q) * log_q)
  return -total / (K * B)


@pytest.mark.parametrize('labels', [LABELS, [-1] * B, [0, 1, 2, 2, 0]])
@pytest.mark.parametrize('alpha, floor', [(0.0, -np.inf), (0.7, 1.0)])
def test_loss_and_gradients_by_loops(labels, alpha, floor):
  options = {} if floor == -np.inf else {'free_bits': floor}
  method = semi_supervised.build(Given(), 10, alpha=alpha, samples=K, **options)
  (update,) = method.updates()
  (loss, _), grads = jax.value_and_grad(update.loss, has_aux=True)(PARAMS, context(labels))
  np.testing.assert_allclose(loss, by_hand(labels, alpha, floor), rtol=1e-5)
  h = 1e-5
  for name in ('a', 'b'):
    slope = [by_hand(labels, alpha, floor, **{name: 1 + s * h}) for s in (1, -1)]
    np.testing.assert_allclose(grads['encoder']['encoder'][name], (slope[0] - slope[1]) / (2 * h), rtol=1e-3, atol=1e-4)


def test_metrics_of_training_are_those_of_the_plain_bounds():
  method = semi_supervised.build(Given(), 10, alpha=0.5, samples=K, free_bits=2.0)
  _, aux = method.loss(PARAMS, context())
  logits = numbers()[2]
  log_q = logits - special.logsumexp(logits, axis=-1, keepdims=True)
  known = LABELS >= 0
  np.testing.assert_allclose(aux.metrics['elbo'], -by_hand(LABELS, 0.0, -np.inf), rtol=1e-5)
  np.testing.assert_allclose(aux.metrics['labelled'], 0.6, rtol=1e-6)
  picked = [log_q[k, n, LABELS[n]] for n in np.flatnonzero(known) for k in range(K)]
  np.testing.assert_allclose(aux.metrics['cross_entropy'], -np.mean(picked), rtol=1e-5)
  np.testing.assert_allclose(
    aux.metrics['accuracy'], (log_q.mean(0).argmax(-1) == LABELS)[known].mean(), rtol=1e-6
  )
  _, aux = method.loss(PARAMS, context([-1] * B))
  assert aux.metrics['accuracy'] == aux.metrics['cross_entropy'] == 0 and np.isfinite(list(aux.metrics.values())).all()


def test_classify_averages_probabilities():
  logits = numbers()[2]
  method = semi_supervised.build(Given(), 10, samples=K)
  found = method.classify({'params': PARAMS, 'stats': {}}, jnp.zeros((B, 1, 1, 1)), KEY)
  np.testing.assert_allclose(np.exp(found), special.softmax(logits, -1).mean(0), rtol=1e-5)


# ---------------------------------------------------------------------------------------- the network with classes


SIZE = (4, 4, 1)
NET = biva.build(SIZE, latents=(2, 2), strides=(2, 1), kernels=(3,), blocks=1, filters=3, num_classes=CLASSES)
X = jnp.asarray(np.random.default_rng(0).uniform(size=(4, *SIZE)) < 0.5, jnp.float32)


def mode(level, group, q, context, key):
  del level, group, context, key
  return q.mean


def params():
  shapes = jax.eval_shape(lambda: NET.init({'params': KEY, 'sample': KEY}, X, method='infer')['params'])
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    values = rng.uniform(1.5, 3.0, leaf.shape) if path[-1].key == 'gain' else rng.normal(size=leaf.shape)
    return jnp.asarray(values, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


P = params()


def run(method, *args, **kwargs):
  return NET.apply({'params': P}, *args, rngs={'sample': jax.random.key(2)}, method=method, **kwargs)


def test_every_class_is_the_pass_under_that_class():
  trace, log_qy = run('infer_classes', X, k=2, choose=mode)
  assert trace.log_px.shape == (2 * CLASSES, 4) and log_qy.shape == (2, 4, CLASSES)
  each = [run('infer', X, y=jnp.tile(jnp.eye(CLASSES)[c], (4, 1)), choose=mode) for c in range(CLASSES)]
  for c, alone in enumerate(each):
    for sample in (c, CLASSES + c):
      np.testing.assert_allclose(trace.log_px[sample], alone.log_px[0], rtol=1e-4)
      for a, b in zip((*trace.log_q, *trace.log_p, *trace.z), (*alone.log_q, *alone.log_p, *alone.z), strict=True):
        np.testing.assert_allclose(a[:, sample], b[:, 0], rtol=1e-3, atol=1e-4)
  # y reaches the image, the priors, q(z_L) and q(z^TD), not the bottom-up latent.
  first, second = each[:2]
  assert np.abs(first.log_px - second.log_px).min() > 1e-3
  assert np.abs(first.posterior[0].loc - second.posterior[0].loc).max() > 1e-3
  change = np.abs(first.posterior[1].loc - second.posterior[1].loc).max((1, 2, 3))
  assert change[0] > 1e-3 and change[1] == 0
  assert (np.abs(first.prior[1].loc - second.prior[1].loc).max((1, 2, 3)) > 1e-3).all()
  np.testing.assert_allclose(special.softmax(run('classify', X)[0], -1).sum(-1), 1.0, rtol=1e-5)


def test_traces_with_a_drawn_class_estimate_the_unlabelled_bound():
  """At the posterior modes of z, the mean over y ~ q(y | x) of log w is U(x)."""
  trace, log_qy = run('infer_classes', X, choose=mode)
  each = np.asarray(trace.log_weight(), np.float64) - np.log(CLASSES)  # [classes, b]
  q = np.exp(np.asarray(log_qy[0], np.float64)).T
  want = (q * (each - np.log(q))).sum(0)
  found = np.asarray(run('infer', X, k=3000, choose=mode).log_weight(), np.float64)
  spread = np.sqrt((q * (each - np.log(q) - want) ** 2).sum(0) / 3000)
  assert (spread > 0).all()
  np.testing.assert_array_less(np.abs(found.mean(0) - want), 4 * spread + 1e-3)


def test_generation_draws_the_class_or_takes_it():
  y = jnp.eye(CLASSES)
  zeros = lambda level, group, prior, context, key: jnp.zeros_like(prior.loc)
  each = np.asarray(run('simulate', CLASSES, y=y, choose=zeros).px.mean[0])
  drawn = run('simulate', 600, choose=zeros)
  distance = np.abs(np.asarray(drawn.px.mean[0])[:, None] - each).max((2, 3, 4))
  np.testing.assert_allclose(distance.min(1), 0.0, atol=1e-4)
  counts = np.bincount(distance.argmin(1), minlength=CLASSES)
  assert np.abs(counts - 200).max() < 60  # five standard deviations
  given = run('simulate', CLASSES, y=y, choose=zeros).log_p[0]
  np.testing.assert_allclose(drawn.log_p[0][0, 0, 0], given[0, 0, 0] - np.log(CLASSES), rtol=1e-5)


def test_one_step_reads_the_labels_and_marginalises_the_rest():
  """On the network: with no label known the loss is minus U, and gradients reach both groups."""
  method = semi_supervised.build(NET, 10, alpha=2.0)
  grouped = groups(P)

  @jax.jit
  def losses(labels):
    ctx = Context(batch={'image': X, 'label': labels}, key=KEY, step=jnp.zeros((), jnp.int32), stats={})
    (loss, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(grouped, ctx)
    return loss, aux.metrics, jax.tree.map(lambda g: jnp.abs(g).max(), grads)

  unknown, metrics, grads = losses(jnp.full(4, -1))
  np.testing.assert_allclose(unknown, -metrics['elbo'], rtol=1e-5)
  assert min(jax.tree.leaves(grads['encoder']['encoder']['classes'])) > 0
  known, metrics, _ = losses(jnp.arange(4) % CLASSES)
  np.testing.assert_allclose(known, 2.0 * metrics['cross_entropy'] - metrics['elbo'], rtol=1e-5)


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize('net, options, message', [
  (Given(num_classes=0), {}, 'model.num_classes is less than 2'),
  (Given(), {'alpha': -1.0}, 'method.alpha is -1.0'),
  (Given(), {'samples': 0}, 'method.samples is 0'),
  (Given(), {'free_bits': -1.0}, 'method.free_bits is -1.0'),
  (Given(), {'free_bits_decay': 2.0}, 'method.free_bits_decay is 2.0'),
])  # fmt: skip
def test_options_that_cannot_be(net, options, message):
  with pytest.raises(UserError, match=message):
    semi_supervised.build(net, 10, **options)


@pytest.mark.parametrize('method', [vae, iwae])
def test_methods_that_do_not_train_classes_refuse_them(method):
  with pytest.raises(UserError, match="model.num_classes is 3: .*'semi_supervised'"):
    method.build(NET, 10)


def test_it_is_a_vae_with_labels():
  method = semi_supervised.build(NET, 10, free_bits=2.0, free_bits_decay=0.5)
  first, last = (method.charged(jnp.ones(1), jnp.asarray(step)) for step in (0, 9))
  assert isinstance(method, vae.VAE) and last < first == 2.0
