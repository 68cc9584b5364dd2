"""NCSN: a network of scores at many noise levels, sampled by annealed Langevin dynamics; inpainting.

Paper      Song, Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", NeurIPS 2019, arXiv 1907.05600.
Command    python -m latentgen.main --config=experiments/ncsn.py
Default    scikit-learn's 8x8 digits at 4 bits, a narrow network; minutes on two CPU cores. This command, test images: Frechet
           distance on the features of a small classifier 4.7 annealed, 3.8 denoised, 4.0 real training images (standard errors
           2 to 3, 250 images); right half hidden, mean squared error of the average of four draws 0.043, of one draw 0.070, of
           the training mean 0.067 (standard errors 0.003 to 0.011, 32 images).
Variants   :smoke (seconds)
           :sliced   the default by sliced score matching
           :mnist  :cifar10  :celeba   the paper's network, ladder, steps and optimiser; data from tensorflow-datasets

Deviations (paper / here / why):
  weights of one step, picked among checkpoints by sample quality / average with decay 0.999 (default 0.995), of the step with
    the least denoising loss on held-out images / later work shows that the average samples better; nothing is chosen by eye
  the last sample is kept as it is / sampler 'annealed'; 'denoised' adds a last step to the mean / takes away the last noise
  10 levels, sigma 1 to 0.01, 100 steps a level / the same for :mnist, :cifar10, :celeba; the default ends at 0.03, about the
    noise of dequantised 4 bits, with 30 steps a level / time
  the network is the score / the same for the published sizes; the default divides it by sigma / trains faster
  inpainting keeps the noise of the last level in the known pixels / they are put back / they are known
  inception score and FID on 50,000 samples / distances on the features of a small classifier / no Inception network here
"""

from ml_collections import ConfigDict
import nvae

VARIANTS = ('smoke', 'sliced', 'mnist', 'cifar10', 'celeba')

CELEBA = dict(name='tfds', dataset='celeb_a', crop=(39, 19, 140, 140), size=32, flip=True)

# image shape, data, channels
PUBLISHED = dict(
  mnist=((28, 28, 1), {k: v for k, v in nvae.PUBLISHED['mnist'][1].items() if k != 'binarize'}, 64),
  cifar10=((32, 32, 3), nvae.PUBLISHED['cifar10'][1], 128),
  celeba=((32, 32, 3), CELEBA, 128),
)

PAPER = dict(
  cifar10=[dict(name='CIFAR-10 FID', paper=25.32, ours='', note='Inception features; not comparable with ours')],
)


def base(data: dict, model: dict, steps: int, **method) -> ConfigDict:
  """The recipe that all sizes share."""
  config = nvae.base(dict(data, dequantize=True), {}, steps, 0, (0.0, 0.0), 1e-3)
  with config.unlocked():
    config.model = ConfigDict(dict(name='ncsn', levels=10, dtype='float32', **model))
    config.recipe = ('score',)
    config.stages = ConfigDict(
      dict(
        score=dict(
          steps=steps,
          method=dict(name='score', start=1.0, objective='denoising', **method),
          optim=dict(score=dict(name='adam', learning_rate=1e-3)),
          ema=dict(score=0.999),
          best='denoising',
        )
      )
    )
    config.evaluate = ConfigDict(
      dict(
        tasks=('frechet', 'inpainting', 'samples'),
        frechet=dict(samplers=('annealed', 'denoised')),
        inpainting=dict(),
        samples=dict(samplers=('annealed', 'denoised', 'single'), parts=('samplers',)),
      )
    )
  return config


def digits() -> ConfigDict:
  config = base(
    dict(name='digits', batch_size=64, bits=4), dict(channels=16, units=1, dilations=(1, 2)), 2000,
    end=0.03, divide=True, langevin_steps=30, step_size=2e-4, inpainting_step_size=2e-4, single_step_size=2e-4,
  )  # fmt: skip
  config.train.checkpoint_every_steps = 500
  config.stages.score.optim.score.update(learning_rate=2e-3, final_learning_rate=1e-4, warmup_steps=50)
  config.stages.score.ema.score = 0.995
  config.evaluate.inpainting.limit = 32
  config.evaluate.inpainting.unlock()
  return config


def smoke(config: ConfigDict) -> ConfigDict:
  """The default in seconds: same path, one or two of everything."""
  config.data.batch_size = 8
  config.model.update(channels=4, levels=2)
  config.stages.score.update(steps=2)
  config.stages.score.optim.score.update(warmup_steps=0)
  config.stages.score.method.update(langevin_steps=2)
  config.train.update(log_every_steps=1, checkpoint_every_steps=1)
  config.evaluate.frechet.update(samplers=('annealed',), limit=40, train_limit=100, steps=5, repeats=2)
  config.evaluate.inpainting.update(limit=8, draws=2, images=2)
  config.evaluate.samples.update(count=4, samplers=('annealed',))
  return config


def get_config(variant: str = '') -> ConfigDict:
  if variant in PUBLISHED:
    shape, data, channels = PUBLISHED[variant]
    config = base(dict(data, batch_size=128), dict(channels=channels, units=2, dilations=(2, 4)), 200_000)
    config.image_shape = shape  # for --mode=estimate, which does without data
    config.paper = tuple(PAPER.get(variant, ()))
    return config
  config = digits()
  if variant == 'sliced':
    config.stages.score.method.objective = 'sliced'
  return smoke(config) if variant == 'smoke' else config
