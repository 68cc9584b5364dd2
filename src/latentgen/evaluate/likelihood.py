"""Bounds on the log-likelihood and where their nats go: ELBO, rate of every group, importance-weighted bound.

All three are means over a whole split. Published negative log-likelihoods are minus `likelihood/iwae`, at the K of the
table: 1000 for NVAE's on MNIST, 5000 for most others.

References:
  Y. Burda, R. Grosse, R. Salakhutdinov, Importance Weighted Autoencoders, 2016, arXiv 1509.00519, equation 8.
"""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

from latentgen.evaluate.base import Findings, Result, Subject, average, check_count, per_example
from latentgen.losses import RunningLogMeanExp

ACTIVE_NATS = 0.01  # a group is active if its rate, averaged over the split, is more than this
NEEDS = ('trace', 'density')


def run(
  subject: Subject,
  *,
  split: str = 'test',
  limit: int | None = None,
  samples: int = 100,
  chunk: int = 25,
  elbo_samples: int = 1,
  bounds: Sequence[int] = (),
) -> Findings:
  """Evaluates the bounds.

  Args:
    subject: what is evaluated.
    split: which images.
    limit: only the first so many of them.
    samples: K of the importance-weighted bound; memory does not depend on it.
    chunk: posterior samples that are in memory at a time; it changes the bound's random numbers, not its law.
    elbo_samples: posterior samples an image in the ELBO, averaged.
    bounds: further values of K, each with samples of its own.

  Returns:
    Findings with, as means over images and standard errors over images:
      likelihood/elbo, /reconstruction, /rate  [nats]: E_q log p(x|z) - rate; the rate is the closed-form KL where the
        model has it, else its one-sample estimate;
      kl/level<i>/group<j>  [nats]: the rate of one group;
      likelihood/active_groups: how many of those are above 0.01 nats, averaged over the images;
      likelihood/iwae  [nats]: log 1/K sum_k p(x, z_k) / q(z_k | x); likelihood/iwae_<K> likewise for K of `bounds`;
      likelihood/posterior_kl  [nats]: IWAE minus ELBO, an estimate from below of KL(q(z | x) || p(z | x));
      likelihood/elbo_bits_per_dim, /iwae_bits_per_dim: minus the bound / (ln 2 * h * w * c). For a continuous decoder
        on [0, 1], this counts density on that interval: 8-bit tables lie log2(256) = 8 higher;
      likelihood/ess: effective sample size (sum w)^2 / sum w^2, between 1 and K;
      likelihood/samples: K.

  Raises:
    UserError: for a bad value, naming the key.
  """
  where = 'config.evaluate.likelihood'
  for name, value in (('samples', samples), ('chunk', chunk), ('elbo_samples', elbo_samples)):
    check_count(f'{where}.{name}', value)
  for value in bounds:
    check_count(f'{where}.bounds', value)
  propose = getattr(subject.method, 'propose', subject.method.trace)
  function = terms(subject.method.trace, propose, samples, chunk, elbo_samples, tuple(bounds))
  found = per_example(subject, 'likelihood', function, split, limit, axis=-1)
  dims = int(found.pop('dims')[0])
  results: dict[str, Result] = {}
  active = 0
  for name in [name for name in found if name.startswith('level')]:
    for j, values in enumerate(found.pop(name)):
      results[f'kl/{name}/group{j}'] = rate = average(values, 'nats')
      active += rate.value > ACTIVE_NATS
  for name, values in found.items():
    results[f'likelihood/{name}'] = average(values, 'samples' if name == 'ess' else 'nats')
  n = results['likelihood/elbo'].n
  for name in ('elbo', 'iwae'):
    results[f'likelihood/{name}_bits_per_dim'] = average(-found[name] / (math.log(2) * dims), 'bits/dim')
  results['likelihood/active_groups'] = Result(int(active), 'groups', n)
  results['likelihood/samples'] = Result(samples, 'samples', n)
  return Findings(results)


def terms(trace, propose, samples: int, chunk: int, elbo_samples: int = 1, bounds: tuple[int, ...] = ()):
  """Builds the function of a batch that the task maps over a split.

  Args:
    trace: `LatentModel.trace`.
    propose: where the importance samples come from, `LatentModel.propose` or `trace`.
    samples: K.
    chunk: samples in memory at a time; K need not be a multiple of it.
    elbo_samples: samples of the ELBO.
    bounds: further values of K.

  Returns:
    (variables, x [b, h, w, c], key) -> {name: [b]} for elbo, reconstruction, rate, iwae, posterior_kl, ess, dims, iwae_<K>, and
    {'level<i>': [g, b]}.
  """

  def function(variables, x, key):
    elbo_key, iwae_key = jax.random.split(key)
    passed = trace(variables, x, elbo_key, elbo_samples)
    rates = {f'level{i}': rate.mean(1) for i, rate in enumerate(passed.rate())}
    rate = sum(r.sum(0) for r in rates.values())
    reconstruction = passed.log_px.mean(0)

    def log_weight(key, k):
      return propose(variables, x, key, k).log_weight()

    iwae, ess = importance(log_weight, iwae_key, samples, chunk)
    more = {f'iwae_{k}': importance(log_weight, jax.random.fold_in(iwae_key, k), k, chunk)[0] for k in bounds}
    dims = jnp.full(x.shape[:1], math.prod(x.shape[1:]))
    elbo = reconstruction - rate
    found = {'elbo': elbo, 'reconstruction': reconstruction, 'rate': rate, 'iwae': iwae, 'posterior_kl': iwae - elbo, 'ess': ess}
    return {**found, **more, **rates, 'dims': dims}

  return function


def importance(log_weight, key: jax.Array, samples: int, chunk: int):
  """log 1/K sum_k w_k and its effective sample size, in memory O(chunk).

  The last, smaller chunk is a pass of its own, so that exactly K samples count.

  Args:
    log_weight: (key, k) -> [k, b].
    key: PRNG key.
    samples: K.
    chunk: samples a pass.

  Returns:
    (bound [b] in nats, effective sample size [b]).
  """
  chunk = min(chunk, samples)
  whole, rest = divmod(samples, chunk)

  def add(i, running):
    return running.update(log_weight(jax.random.fold_in(key, i), chunk))

  batch = jax.eval_shape(lambda: log_weight(key, chunk)).shape[1:]
  running = jax.lax.fori_loop(0, whole, add, RunningLogMeanExp.init(batch))
  if rest:
    running = running.update(log_weight(jax.random.fold_in(key, whole), rest))
  return running.value(), running.ess()
