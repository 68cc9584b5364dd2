"""Probabilistic autoencoder: an autoencoder first, then a normalising flow on its codes.

Paper      Böhm, Seljak, "Probabilistic Autoencoder", TMLR 2022, arXiv 2006.05479.
Command    python -m latentgen.main --config=experiments/pae.py
Default    scikit-learn's 8x8 digits, 8 latent dimensions, a coupling flow of splines; minutes on two CPU cores.
Variants   :smoke (seconds)  :autoregressive  :gmm  :kde  :vae  :ebm (other densities on the codes)
           :fashion (grey Fashion-MNIST, 64 latent dimensions, outliers MNIST)  :mnist (data prepared once by tensorflow-datasets)

Stages: the autoencoder, until held-out reconstructions get no better; mean and deviation of the codes; the density of the whitened
codes, until that of held-out codes gets no better. No later stage moves the autoencoder. Samples are decoded draws of the density;
outliers have a low density at their code or a bad reconstruction; corrupted images are restored by the posterior over the flow's base.

:fashion reads IDX files (train-images-idx3-ubyte.gz ...) from data/fashion_mnist and data/mnist, or from
--config.data.path=DIR and --config.evaluate.anomaly.outliers.mnist.path=DIR.

Measured with the default command (seed 0, 250 test digits; standard errors in brackets):
  outliers, area under the ROC curve      noise           shuffled        inverted
    by the density of the code            0.996 (0.001)   0.990 (0.003)   1.000
    by the reconstruction, by the sum     1.000           1.000           1.000
  a classifier tells samples from digits  AUROC 0.550 (0.018), chance 1/2
  restoration, squared error a pixel      lower half unknown 0.043 (0.011) at the heaviest mode, 0.083 (0.006) for the mean image;
                                          noise of deviation 0.3: 0.019 (0.002), 0.094 (0.003) before
None of :fashion, :mnist and the other densities has been run to its end.

Deviations (paper / here / why):
  a Gaussian prior weighs on the codes in the second half of the autoencoder's training / none / the flow fits any codes
  the noise's deviation of every pixel / one for all / fewer numbers to fit; restoration measures its own on held-out images
  spline, affine and shift layers with learned permutations / spline couplings, fixed permutations, a learned triangular map /
    the linear map has the tails
  10 dimensions, InfoGAN's networks, 500,000 steps of 16 (MNIST) / as the variants say / sizes for a CPU
  the Hessian at a mode / Gauss-Newton's for the likelihood / where a search ends on a slope, the Hessian is not definite
  rotated copies of training images / none / the density is of the data as they are
"""

from ml_collections import ConfigDict
import nvae

VARIANTS = ('smoke', 'autoregressive', 'gmm', 'kde', 'vae', 'ebm', 'fashion', 'mnist')

DENSITIES = dict(
  flow=dict(name='flow', kind='coupling', transformer='spline', layers=6, width=64, knots=8),
  autoregressive=dict(name='flow', kind='autoregressive', transformer='spline', layers=4, width=64, knots=8),
  gmm=dict(name='gmm', components=10, covariance='full', floor=1e-3),
  kde=dict(name='kde'),
  vae=dict(name='vae', width=128),
)
FITTED = ('gmm', 'kde')


def adam(rate: float, last: float) -> dict:
  return dict(name='adam', learning_rate=rate, final_learning_rate=last, warmup_steps=0)


def add_density(config: ConfigDict, density: str, steps: int, patience: int, codes: str = 'mean') -> ConfigDict:
  """Whitening and one of DENSITIES after the stage 'autoencoder'."""
  frozen = dict(encoder='autoencoder', decoder='autoencoder')
  with config.unlocked():
    config.recipe = (*config.recipe, 'whitening', 'density')
    config.stages.whitening = dict(steps=0, method=dict(name='whitening', codes=codes), load=frozen)
    method = dict(name='density', codes=codes, whiten=True, prior=DENSITIES[density])
    config.stages.density = dict(steps=0, method=method, load=dict(frozen, whitening='whitening'))
    if density not in FITTED:
      config.stages.density.update(
        steps=steps, optim=dict(prior=adam(2e-3, 1e-5)), best='prior', patience_steps=patience,
      )  # fmt: skip
  return config


def energy_based(config: ConfigDict) -> ConfigDict:
  """An energy on the codes, which a penalty keeps near N(0, I), the base that it tilts."""
  with config.unlocked():
    config.stages.autoencoder.method.prior_weight = 1.0
    config.recipe = ('autoencoder', 'density')
    config.stages.density = dict(
      steps=3000,
      method=dict(
        name='energy_prior', posterior='encoder', posterior_steps=0, train=('prior',), codes='mean', prior_step_size=0.04
      ),
      optim=dict(prior=adam(2e-4, 1e-5)),
      load=dict(encoder='autoencoder', decoder='autoencoder'),
      ema=dict(tilt0=0.999),
    )
    config.evaluate.tasks = ('two_sample', 'frechet', 'anomaly', 'samples')
  return config


def autoencoder(data: dict, model: dict, steps: int, patience: int) -> ConfigDict:
  """An autoencoder with early stopping, and the tasks of this page."""
  config = nvae.base(data, dict(likelihood='normal', bounded=True, scale='learned', log_scale=-1.5), 0, 0, (0.0, 0.0), 1e-3)
  with config.unlocked():
    config.model = dict(config.model, name='vae', **model)
    for key in ('remat',):
      del config.model[key]
    config.recipe = ('autoencoder',)
    config.stages = dict(
      autoencoder=dict(
        steps=steps, method=dict(name='autoencoder'), optim=dict(autoencoder=adam(1e-3, 1e-5)), best='reconstruction',
        patience_steps=patience,
      )
    )  # fmt: skip
    config.evaluate = dict(
      tasks=('two_sample', 'frechet', 'anomaly', 'restoration', 'samples'),
      two_sample=dict(split=('valid', 'test')),
      frechet=dict(),
      samples=dict(),
      anomaly=dict(outliers=dict(noise='noise', shuffled='shuffled', inverted='inverted')),
      restoration=dict(),
    )
  return config


def digits() -> ConfigDict:
  config = autoencoder(dict(name='digits', batch_size=64), dict(latent=8, hidden=(256, 256)), 6000, 1500)
  config.train.checkpoint_every_steps = 250
  return config


def images(data: dict, latent: int, batch: int = 64) -> ConfigDict:
  """28x28 images on a convolutional network."""
  config = autoencoder(dict(data, batch_size=batch), dict(latent=latent, hidden=(32, 64), conv=True), 6000, 2000)
  config.image_shape = (28, 28, 1)
  config.evaluate.two_sample.limit = 2000
  config.evaluate.frechet.update(limit=2000, train_limit=5000)
  return config


def fashion() -> ConfigDict:
  config = images(dict(name='idx', path='data/fashion_mnist', valid=5000), 64)
  config.evaluate.anomaly = dict(outliers=dict(mnist=dict(name='idx', path='data/mnist'), noise='noise'), limit=5000)
  config.paper = (
    dict(name='MNIST by density, AUROC', paper=0.997, ours='anomaly/mnist/density/auroc', note='authors\' notebook'),
    dict(name='MNIST by reconstruction, AUROC', paper=0.855, ours='anomaly/mnist/reconstruction/auroc', note='authors\' notebook'),
  )  # fmt: skip
  return config


def smoke(config: ConfigDict) -> ConfigDict:
  """The default in seconds."""
  config.data.batch_size = 32
  config.model.hidden = (16,)
  for stage in config.stages.values():
    if stage.steps:
      stage.update(steps=2, patience_steps=0)
  config.train.update(log_every_steps=1, checkpoint_every_steps=1)
  config.evaluate.two_sample.limit = 40
  config.evaluate.frechet.update(limit=40, train_limit=100, steps=5, repeats=2)
  config.evaluate.samples.update(count=4, images=2)
  config.evaluate.anomaly.limit = 16
  config.evaluate.restoration.update(images=2, starts=2, steps=4, limit=16)
  return config


def get_config(variant: str = '') -> ConfigDict:
  if variant == 'fashion':
    return add_density(fashion(), 'flow', 6000, 2000)
  if variant == 'mnist':
    return add_density(images(dict(name='tfds', dataset='mnist', valid=5000, in_memory=True), 10), 'flow', 6000, 2000)
  if variant == 'ebm':
    return energy_based(digits())
  config = add_density(digits(), variant if variant in DENSITIES else 'flow', 3000, 750)
  if variant == 'smoke':
    config.stages.density.method.prior.update(layers=2, width=8)
    return smoke(config)
  if variant == 'vae':  # no density to restore by
    config.evaluate.tasks = tuple(task for task in config.evaluate.tasks if task != 'restoration')
  return config
