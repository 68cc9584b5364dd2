"""NVAE: a deep hierarchical variational autoencoder.

Paper      Vahdat, Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", NeurIPS 2020, arXiv 2007.03898.
Command    python -m latentgen.main --config=experiments/nvae.py
Default    scikit-learn's 8x8 digits at 4 bits, two scales of two groups; minutes on two CPU cores.
Variants   :smoke (seconds)  :mnist  :cifar10  :imagenet32  :celeba64  :celebahq256  :ffhq256
           with the paper's architecture, batch, epochs and weights (parameter counts: tests/test_nets_nvae.py). Their data come
           from tensorflow-datasets, prepared once; FFHQ from a folder: --config.data.path=DIR.

Deviations from the paper or its published code (known from facts about it; paper / here / why):
  discretised logistics switch to a density in narrow bins / exact bin masses everywhere / so that they sum to one over all
    values, at 8 and at 5 bits
  the top prior is called N(0, 1), its deviation is 1.01 / 1.01 in samples, densities and KL alike / one distribution
  ELBO and IWAE of MNIST on fresh Bernoulli pixels at test time too / the same, with a fixed key / repeatable
  KL balancing divides by a redundant factor / left out / it cancels in the normalisation
  learning rate steps down once an epoch / at every step / the same curve, smooth
  parameters averaged over GPUs every 100 steps / never / one program over all devices keeps one copy
  trained on the full training split / a validation split is set aside from it / nothing is chosen on test data
  fp16 with loss scaling / bfloat16 convolutions by model.dtype, float32 elsewhere / no scaling needed
"""

from ml_collections import ConfigDict

VARIANTS = ('smoke', 'mnist', 'cifar10', 'imagenet32', 'celeba64', 'celebahq256', 'ffhq256')

RGB = dict(likelihood='dmol', pre_blocks=1, pre_cells=2, flows=1)

# image shape, data, model, training images, batch, epochs, warm-up epochs, spectral weights, learning rate
PUBLISHED = dict(
  mnist=(
    (28, 28, 1),
    dict(name='tfds', dataset='mnist', valid=5000, in_memory=True, binarize='fresh'),
    dict(groups=(5, 10), channels=32, pre_blocks=2, pre_cells=3, likelihood='bernoulli'),
    55_000, 400, 400, 5, (1e-2, 1e-2), 1e-2,
  ),
  cifar10=(
    (32, 32, 3),
    dict(name='tfds', dataset='cifar10', valid=5000, in_memory=True, flip=True),
    dict(RGB, groups=(30,), channels=128),
    45_000, 256, 400, 5, (1e-2, 1e-2), 1e-2,
  ),
  imagenet32=(
    (32, 32, 3),
    dict(name='tfds', dataset='downsampled_imagenet/32x32', valid=10_000, flip=True),
    dict(RGB, groups=(28,), channels=192),
    1_271_149, 576, 45, 1, (1.0, 1e-2), 1e-2,
  ),
  celeba64=(
    (64, 64, 3),
    dict(name='tfds', dataset='celeb_a', crop=(40, 15, 148, 148), size=64, flip=True),
    dict(RGB, groups=(5, 10, 20), channels=64),
    162_770, 128, 90, 5, (1e-1, 1e-1), 1e-2,
  ),
  celebahq256=(
    (256, 256, 3),
    dict(name='tfds', dataset='celeb_a_hq/256', train='train[:27000]', valid='train[27000:27500]', test='train[27500:]',
         bits=5, flip=True),
    dict(RGB, groups=(4, 4, 4, 8, 16), channels=30, flows=2, bits=5),
    27_000, 96, 300, 5, (1.0, 1e-2), 1e-2,
  ),
  ffhq256=(
    (256, 256, 3),
    dict(name='folder', path='ffhq256', size=256, in_memory=False, bits=5, flip=True),
    dict(RGB, groups=(4, 4, 4, 8, 16), channels=30, flows=2, bits=5),
    56_000, 96, 200, 5, (1.0, 1e-1), 8e-3,
  ),
)  # fmt: skip

PAPER = dict(
  mnist=[dict(name='MNIST, nats', paper=-78.01, ours='likelihood/iwae', note='K = 1000')],
  cifar10=[dict(name='CIFAR-10, bits/dim', paper=2.91, ours='likelihood/iwae_bits_per_dim', note='with flows')],
  celebahq256=[dict(name='CelebA-HQ 256, 5 bits, bits/dim', paper=0.70, ours='likelihood/iwae_bits_per_dim', note='with flows')],
)


def base(data: dict, model: dict, steps: int, warmup: int, spectral: tuple, rate: float) -> ConfigDict:
  """The recipe that all sizes share."""
  return ConfigDict(
    dict(
      seed=0,
      data=data,
      model=dict(name='nvae', remat=False, dtype='float32', **model),
      recipe=('vae',),
      stages=dict(
        vae=dict(
          steps=steps,
          method=dict(name='vae', beta=1.0, warmup_portion=0.3, balance=True, spectral=spectral),
          optim=dict(
            vae=dict(
              name='adamax', learning_rate=rate, final_learning_rate=1e-4, warmup_steps=warmup, weight_decay=3e-4, eps=1e-3,
              clip_norm=0.0,
            )
          ),
        )
      ),
      train=dict(log_every_steps=50, checkpoint_every_steps=1000),
      mesh=dict(data=-1, fsdp=1),
      evaluate=dict(
        tasks=('likelihood', 'two_sample', 'frechet', 'samples'),
        likelihood=dict(samples=1000, chunk=50),
        frechet=dict(),
        samples=dict(),
        two_sample=dict(),
      ),
      paper=(),
    )
  )  # fmt: skip


def digits() -> ConfigDict:
  model = dict(
    groups=(2, 2), latent=4, channels=12, pre_blocks=0, cells_encoder=1, cells_decoder=1, likelihood='dmol', mixtures=3, bits=4,
  )  # fmt: skip
  config = base(dict(name='digits', batch_size=64, bits=4), model, 2000, 100, (1e-2, 1e-2), 1e-2)
  config.train.checkpoint_every_steps = 250
  config.evaluate.likelihood.samples = 200
  return config


def smoke(config: ConfigDict) -> ConfigDict:
  """The default in seconds: same path, one or two of everything."""
  config.data.batch_size = 8
  for stage in config.stages.values():
    stage.steps = min(stage.steps, 2)
    for optim in stage.get('optim', {}).values():
      optim.warmup_steps = 0
  config.train.update(log_every_steps=1, checkpoint_every_steps=1)
  config.evaluate.likelihood.update(samples=4, chunk=2, limit=8)
  config.evaluate.two_sample.limit = 40
  config.evaluate.frechet.update(limit=40, train_limit=100, steps=5, repeats=2)
  config.evaluate.samples.update(count=4, images=2, readjust_batches=2)
  return config


def get_config(variant: str = '') -> ConfigDict:
  if variant in PUBLISHED:
    shape, data, model, images, batch, epochs, warmup, spectral, rate = PUBLISHED[variant]
    epoch = images // batch
    config = base(dict(data, batch_size=batch), model, epochs * epoch, warmup * epoch, spectral, rate)
    config.image_shape = shape  # for --mode=estimate, which does without data
    config.paper = tuple(PAPER.get(variant, ()))
    return config
  config = digits()
  if variant == 'smoke':
    config.model.update(groups=(1, 1), latent=2, channels=4)
    return smoke(config)
  return config
