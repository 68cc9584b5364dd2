"""BIVA: a deep hierarchy with bottom-up and top-down latents; the ladder VAE; outliers; few labels.

Paper      Maaloe, Fraccaro, Lievin, Winther, "BIVA: A Very Deep Hierarchy of Latent Variables for Generative Modeling",
           NeurIPS 2019, arXiv 1902.02102; :lvae Soenderby, Raiko, Maaloe, Soenderby, Winther, "Ladder Variational
           Autoencoders", NIPS 2016, arXiv 1602.02282.
Command    python -m latentgen.main --config=experiments/biva.py
Default    scikit-learn's 8x8 digits at 4 bits, three layers; minutes on two CPU cores. Test images, this command and :no_skip:
           78.4 and 80.2 nats (minus the bound with K = 200), 81.8 and 83.1 (K = 1); rates of the groups (TD, BU), coarse to
           fine, 3.6 | 4.2, 3.3 | 4.2, 1.3 and 1.7 | 1.9, 1.9 | 5.6, 4.5.
Variants   :smoke (seconds)
           :lvae     no bottom-up latents, precision-weighted posteriors; the default's sizes
           :no_skip  the default without skip connections in the generative model
           :semi     half of the default's width, 10 labels a class, the others unlabelled; --sweep=labels: test error with 1, 5, 10,
                     means over three seeds, 0.377, 0.077, 0.072; of a supervised classifier on the same labels 0.315, 0.147, 0.101
           :anomaly  three layers of 16 filters on binarised Fashion-MNIST, outliers MNIST; IDX files in --config.data.path=DIR
                     and --config.evaluate.anomaly.outliers.mnist.path=DIR; area under the ROC curve, MNIST being positive:
                     L^{>0} 0.216, LLR^{>1} 0.867, LLR^{>2} 0.598, LLR^{>3} 0.078
           :mnist  :cifar10   architecture, batch, optimiser and free bits as published (15 layers and 103 M parameters for
                     CIFAR-10, tests/test_nets_biva.py); data from tensorflow-datasets, prepared once

Deviations from the paper or its published code (known from its abstract, the code and tables that cite it; paper / here / why):
  log-variances are softplus, so that no deviation is below 1 / deviations are softplus / a posterior can be narrower than
    N(0, I); --config.model.scale=logvar
  transposed convolutions / repetition, then a convolution of the same size / fast on a CPU, same number of parameters
  trained on training and validation images, model selected on test images / a validation split is set aside / nothing is
    chosen on test data
  10,000 epochs / 500 / length of the PyTorch code
  fine-tuning without free bits / they fade over the last fifth of the default / one stage; --config.stages.vae.method.
    free_bits_decay=0.2 for the others
  the same seed in every stochastic layer / independent noise / an error of the code
  bound with many samples trains on the last one (PyTorch code) / one sample / it is the ELBO
  :lvae with batch norm and warm-up of the KL / weight norm and free bits / BIVA's blocks
"""

import math

import csrae
from ml_collections import ConfigDict
import nvae
import nvae_anomaly

VARIANTS = ('smoke', 'lvae', 'no_skip', 'semi', 'anomaly', 'mnist', 'cifar10')

MNIST = dict(
  latents=(48, 40, 32, 24, 16, 8), strides=(2, 1, 1, 1, 1, 2), kernels=(5, 3), blocks=3, filters=64,
  dropout_q=0.5, dropout_p=0.5, likelihood='bernoulli',
)  # fmt: skip
CIFAR10 = dict(
  latents=tuple(range(38, 9, -2)), strides=(2, *(1,) * 9, 2, 1, 1, 1, 2), kernels=(5, 3), blocks=3, filters=96, conv=True,
  dropout_q=0.2, likelihood='dmol', mixtures=10, bits=8,
)  # fmt: skip

# image shape, data, model, training images
PUBLISHED = dict(
  mnist=((28, 28, 1), dict(name='tfds', dataset='mnist', valid=5000, in_memory=True, binarize='fixed'), MNIST, 55_000),
  cifar10=((32, 32, 3), dict(name='tfds', dataset='cifar10', valid=5000, in_memory=True), CIFAR10, 45_000),
)

PAPER = dict(
  mnist=[dict(name='MNIST, nats', paper=-80.47, ours='likelihood/elbo', note='ELBO, one sample; fine-tuned')],
  cifar10=[dict(name='CIFAR-10, bits/dim', paper=3.08, ours='likelihood/elbo_bits_per_dim', note='one sample')],
)


def base(data: dict, model: dict, steps: int, final: float, decay: float = 0.0) -> ConfigDict:
  """nvae.py's recipe with this network, optimiser and objective."""
  config = nvae.base(data, {}, steps, 0, (0.0, 0.0), 2e-3)
  with config.unlocked():
    config.model = ConfigDict(dict(name='biva', scale='std', skip=True, dtype='float32', **model))
    config.stages.vae.method = ConfigDict(dict(name='vae', beta=1.0, free_bits=2.0, free_bits_decay=decay))
    config.stages.vae.ema = ConfigDict(dict(encoder=0.9995, decoder=0.9995))
  config.stages.vae.optim.vae.update(
    learning_rate=2e-3, final_learning_rate=final, schedule='exponential', weight_decay=0.0, eps=1e-8
  )
  return config


def digits() -> ConfigDict:
  model = dict(
    latents=(8, 6, 4), strides=(2, 1, 2), kernels=(3,), blocks=1, filters=32, dropout_q=0.0, dropout_p=0.0, likelihood='dmol',
    mixtures=3, bits=4,
  )  # fmt: skip
  config = base(dict(name='digits', batch_size=64, bits=4), model, 2500, 5e-4, 0.2)
  config.stages.vae.ema.update(encoder=0.995, decoder=0.995)
  config.train.checkpoint_every_steps = 250
  config.evaluate.likelihood.samples = 200
  return config


def published(variant: str) -> ConfigDict:
  shape, data, model, images = PUBLISHED[variant]
  steps = 500 * (images // 48)
  config = base(dict(data, batch_size=48), model, steps, 2e-3 * math.exp(-1e-6 * steps))  # the rate falls by 1e-6 a step
  with config.unlocked():
    config.image_shape = shape  # for --mode=estimate, which does without data
    config.paper = tuple(PAPER.get(variant, ()))
  return config


def anomaly() -> ConfigDict:
  """Small enough for a CPU; k counts layers."""
  model = dict(latents=(16, 8, 4), strides=(2, 2, 2), kernels=(5, 3), blocks=1, filters=16, likelihood='bernoulli')
  config = base(dict(nvae_anomaly.FASHION, batch_size=48), model, 3000, 5e-4, 0.2)
  config.stages.vae.ema.update(encoder=0.995, decoder=0.995)
  return nvae_anomaly.against_mnist(config, 'level')


def semi(config: ConfigDict, labels: int) -> ConfigDict:
  """Labels for so many images a class of ten, and a class in the generative model."""
  with config.unlocked():
    config.data.update(labels_per_class=labels, labelled_copies=5)
    config.model.update(num_classes=10, filters=16)  # every class passes through the generative model
    config.stages.vae.steps = 1000
    config.stages.vae.method = ConfigDict(
      dict(name='semi_supervised', alpha=20.0, free_bits=2.0, free_bits_decay=0.2)
    )
    config.stages.vae.optim = ConfigDict(dict(semi=config.stages.vae.optim.vae))
    config.evaluate.tasks = ('likelihood', 'classification', 'samples')
    config.evaluate.classification = ConfigDict()
  return config


def get_config(variant: str = '') -> ConfigDict:
  if variant in PUBLISHED:
    return published(variant)
  if variant == 'anomaly':
    return anomaly()
  config = digits()
  if variant == 'smoke':
    config.model.update(latents=(3, 2), strides=(2, 2), filters=4)
    return nvae.smoke(config)
  if variant == 'lvae':
    config.model.unlock()
    config.model.update(bottom_up=False, merge='precision')
  if variant == 'no_skip':
    config.model.skip = False
  return semi(config, 10) if variant == 'semi' else config


def sweep(name: str) -> list[dict]:
  """Of :semi, --sweep=labels: one, five and ten labels a class, three seeds each."""
  return {'labels': csrae.labels()}[name]
