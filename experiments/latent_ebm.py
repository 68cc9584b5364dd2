"""A latent space energy-based prior: generator and energy learned together by short chains, without an encoder.

Paper      Pang, Han, Nijkamp, Zhu, Wu, "Learning Latent Space Energy-Based Prior Model", NeurIPS 2020, arXiv 2006.08205.
Command    python -m latentgen.main --config=experiments/latent_ebm.py
Default    scikit-learn's 8x8 digits, 8 latent dimensions, MLPs; minutes on two CPU cores.
Variants   :smoke (seconds)  :persistent (chains of the prior live on)  :two_stage (energy on a frozen VAE, its encoder's samples)
           :anomaly (digits 1 and 4 are held out and must be found)  :svhn  :celeba128 (published sizes)

Every step draws posterior samples by Langevin dynamics on log p(z) + log p(x | z) and prior samples on log p(z), both from noise;
then two updates read them at the same parameters: the energy's, E_posterior[f] - E_prior[f], and the generator's, log p(x | z).

Measured by the command above, seed 0: AUROC of a classifier between posterior codes and draws of N(0, I) 0.802, Langevin 0.505, SIR
0.564 (standard error 0.025); Fréchet distance 18.9, 8.2, 5.5 (training images: 4.4).

Short posterior chains do not arrive: on a linear-Gaussian model with the published 60 and 20 steps the learned prior has mean 0.86
and variance 0.22 where maximum likelihood has 1.00 and 0.36 (tests/test_energy_prior.py); log p(x) is unknown, no bound is given.

Deviations (paper / here / why):
  the network's output is the energy E / it is f = -E, p(z) ~ N(z; 0, I) exp(f(z)) / the sign of a log-ratio, as everywhere here
  step s of z + s^2/2 grad + s w / step_size = s^2, 0.16 and 0.01 for 0.4 and 0.1 / one convention for all Langevin dynamics here
  20 posterior steps of s^2 = 0.01 / 40 of 0.02 on the digits / shorter chains stay near N(0, I) and leave little to learn
  images in [-1, 1], sigma 0.3 / images in [0, 1], sigma 0.15 / the same model
  loss of the generator |x - g(z)|^2 / -log p(x | z), constants included / Adam is invariant to the factor 1 / (2 sigma^2)
  rates decay by 0.998 an epoch / cosine / the same end
  transposed convolutions, no encoder / depth to space / several times faster on a CPU
  the energy's last layer starts at random / at zero / the prior starts as N(0, I)
"""

from ml_collections import ConfigDict
import nvae

VARIANTS = ('smoke', 'persistent', 'two_stage', 'anomaly', 'svhn', 'celeba128')

PUBLISHED = dict(  # shape, data, channels of the generator's layers, energy's widths, activation, prior and posterior steps, epochs
  svhn=((32, 32, 3), dict(name='tfds', dataset='svhn_cropped', batch_size=100), (64, 128, 256), (200, 200), 'leaky_relu', 60, 20,
        73_257, 200),
  celeba128=((128, 128, 3), dict(name='tfds', dataset='celeb_a', crop=(40, 15, 148, 148), size=128, batch_size=400),
             (32, 64, 128, 256, 512), (1000, 1000), 'gelu', 60, 20, 162_770, 400),
)  # fmt: skip

PAPER = dict(svhn=[dict(name='SVHN FID', paper=29.44, ours='', note='Inception features; not comparable with ours')])


def base(data: dict, model: dict, steps: int, rates: tuple[float, float], **method) -> ConfigDict:
  """One stage; `rates` of energy and generator."""
  config = nvae.base(data, {}, steps, 0, (0.0, 0.0), 1e-3)
  config.model = dict(name='vae', likelihood='normal', scale=0.15, bounded=True, **model)
  config.recipe = ('ebm',)
  adam = dict(name='adam', b1=0.5, final_learning_rate=1e-5, warmup_steps=0)
  config.stages = dict(
    ebm=dict(
      steps=steps,
      method=dict(
        name='energy_prior', hidden=(200, 200), activation='gelu', prior_steps=60, prior_step_size=0.16, posterior_steps=20,
        posterior_step_size=0.01, chains=0, **method,
      ),
      optim=dict(prior=dict(adam, learning_rate=rates[0]), generator=dict(adam, learning_rate=rates[1])),
      ema=dict(decoder=0.999, tilt0=0.999),
    )
  )  # fmt: skip
  config.evaluate.tasks = ('two_sample', 'frechet', 'partition', 'samples')
  config.evaluate.partition = dict(limit=10, proposals=2000)
  return config


def two_stage(config: ConfigDict) -> ConfigDict:
  """The energy alone, on a VAE that is trained before; posterior samples are its encoder's."""
  vae, ebm = nvae.digits().stages.vae, config.stages.ebm
  vae.steps = 4000
  vae.method.update(balance=False, spectral=(0.0, 0.0))
  vae.optim.vae = dict(name='adam', learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=0)
  config.recipe, config.stages = ('vae', 'ebm'), dict(vae=vae, ebm=ebm)
  ebm.method.update(posterior='encoder', posterior_steps=0, train=('prior',))
  ebm.load = dict(encoder='vae', decoder='vae')
  ebm.ema = dict(tilt0=0.999)
  del ebm.optim.generator
  config.evaluate.tasks = ('likelihood', *config.evaluate.tasks)
  config.evaluate.likelihood.update(samples=200, chunk=50)
  return config


def get_config(variant: str = '') -> ConfigDict:
  if variant in PUBLISHED:
    shape, data, channels, hidden, activation, prior, posterior, images, epochs = PUBLISHED[variant]
    model = dict(latent=100, hidden=channels, conv=True, activation='leaky_relu')
    config = base(data, model, epochs * images // data['batch_size'], (2e-5, 1e-4))
    config.stages.ebm.method.update(hidden=hidden, activation=activation, prior_steps=prior, posterior_steps=posterior)
    config.image_shape = shape
    config.paper = tuple(PAPER.get(variant, ()))
    return config
  config = base(dict(name='digits', batch_size=100), dict(latent=8, hidden=(128, 128)), 4000, (2e-4, 1e-3))
  config.train.checkpoint_every_steps = 500
  config.stages.ebm.method.update(posterior_steps=40, posterior_step_size=0.02)
  if variant == 'persistent':
    config.stages.ebm.method.chains = 1000
  elif variant == 'two_stage':
    config = two_stage(config)
  elif variant == 'anomaly':
    config.data.held_out_classes = (1, 4)
    config.evaluate.tasks = (*config.evaluate.tasks, 'anomaly')
    config.evaluate.anomaly = dict(outliers='held_out')
  elif variant == 'smoke':
    config = nvae.smoke(config)
    config.stages.ebm.method.update(chains=16, hidden=(8,), prior_steps=2, posterior_steps=2, proposals=20)
    config.evaluate.partition.proposals = 20
  return config
