"""A hierarchical VAE with a noise-contrastive prior (NCP-VAE).

Paper      Aneja, Schwing, Kautz, Vahdat, "A Contrastive Learning Approach for Training Variational Autoencoder Priors",
           NeurIPS 2021, arXiv 2010.02917; backbone: experiments/nvae.py.
Command    python -m latentgen.main --config=experiments/nvae_nce.py
Default    scikit-learn's 8x8 digits at 4 bits; minutes on two CPU cores.
Variants   :smoke (seconds)  :mnist  :cifar10  :celeba64  :celebahq256 (data prepared once by tensorflow-datasets)

Stage 1 trains the VAE. Stage 2 trains one binary critic a group on the frozen VAE, from fresh posterior and prior samples
under the same context. The prior p(z_l | z_<l) r_l(z_l, context_l) / Z_l is then sampled by SIR or by Langevin dynamics in noise
coordinates.

Deviations. No official code exists, and of the paper only abstract, introduction and tables could be read; the training
schedule below is derived, not copied (paper / here / why):
  critics with BatchNorm / GroupNorm / BatchNorm leaks the class through the batch's statistics
  critics see (z_l, context_l) / also z_l's noise coordinates / given the context a bijection of z_l, so the same ratio, and the
    critic need not learn the prior's mean and deviation
  SIR from M = 5000 / M = 500 by default / its bias falls as 1 / M; --config.stages.nce.method.proposals=5000
  stage 2's optimiser and length: unread / Adam 2e-3 to 1e-5, the step with the least held-out loss / critics memorise small
    training sets
  Gaussian decoder on RGB / mixtures of discretised logistics / probabilities of pixels, comparable in bits/dim
  stage 2 in batches of its own size / the same batch in both stages / one data stream
"""

from ml_collections import ConfigDict
import nvae

VARIANTS = ('smoke', 'mnist', 'cifar10', 'celeba64', 'celebahq256')

PAPER = dict(
  cifar10=[dict(name='CIFAR-10 FID', paper=24.08, ours='', note='Inception features; not comparable with ours')],
  celebahq256=[dict(name='CelebA-HQ 256 FID', paper=24.8, ours='', note='Inception features; not comparable with ours')],
)


def add_stage(config: ConfigDict, steps: int, warmup: int = 0, **method) -> ConfigDict:
  """A noise-contrastive prior on the model of the stage 'vae', whatever it is."""
  config.recipe = (*config.recipe, 'nce')
  config.stages.nce = dict(
    steps=steps,
    method=dict(
      name='nce', coordinates='both', samples=1, proposals=500, chunk=50, langevin_steps=200, step_size=5e-2,
      normaliser_proposals=50, **method,
    ),
    optim=dict(critic=dict(
      name='adam', learning_rate=2e-3, final_learning_rate=1e-5, warmup_steps=warmup, weight_decay=1e-4
    )),
    load=dict(encoder='vae', decoder='vae'),
    best='nce',
  )  # fmt: skip
  config.evaluate.tasks = ('likelihood', 'two_sample', 'frechet', 'calibration', 'partition', 'samples')
  config.evaluate.likelihood.update(samples=50, chunk=10, limit=50)  # each sample estimates log Z of every group
  config.evaluate.partition = dict(limit=100, proposals=100)
  config.evaluate.calibration = dict()
  config.evaluate.unlock()
  return config


def smoke(config: ConfigDict) -> ConfigDict:
  """Either stage in seconds."""
  config = nvae.smoke(config)
  config.stages.nce.method.update(channels=4, proposals=4, chunk=2, langevin_steps=2, normaliser_proposals=2)
  config.evaluate.partition.update(limit=8, proposals=2)
  return config


def get_config(variant: str = '') -> ConfigDict:
  config = nvae.get_config(variant)
  if variant in nvae.PUBLISHED:
    epoch = nvae.PUBLISHED[variant][3] // config.data.batch_size
    config = add_stage(config, 20 * epoch, channels=64, blocks='AAABAAAB')
    config.paper = tuple(PAPER.get(variant, ()))
    return config
  config = add_stage(config, 1500, channels=16, blocks='AB')
  config.evaluate.two_sample.split = ('valid', 'test')
  return smoke(config) if variant == 'smoke' else config


def sweep(name: str) -> list[dict]:
  """--sweep=seeds: three seeds."""
  return {'seeds': [{'seed': seed} for seed in range(3)]}[name]
