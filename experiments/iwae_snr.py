"""Signal-to-noise ratios of importance-weighted gradients: more samples starve the inference network.

Papers     Rainforth et al., "Tighter Variational Bounds are Not Necessarily Better", ICML 2018, arXiv 1802.04537, section 3 and
           figure 1: SNR of the generative network grows as sqrt(M K), that of the inference network falls as sqrt(M / K).
           Tucker et al., "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", ICLR 2019, arXiv 1810.04152.
Command    python -m latentgen.main --config=experiments/iwae_snr.py
Default    a linear-Gaussian model of three factors in ten dimensions, trained to its optimum and then displaced; two minutes.
Variants   :smoke (seconds)  :digits, the same of a two-layer MLP on scikit-learn's digits, partly trained

Measured slopes, generative and inference network: IWAE 0.51, -0.435; STL 0.51, 0.57; IWAE-DReG 0.51, 0.41; MIWAE in M 0.50, 0.50.

Deviations (paper / here / why):
  model N(z; mu, I) N(x; z, I) with q of fixed variance 2/3, parameters set to the optimum plus 0.01 N(0, 1) / a linear VAE,
    trained, plus 0.005 N(0, 1) / nothing is set by hand; the asymptotic slopes are the same
  K from 1 / K from 4 / the slopes are those of large K
  SNR per parameter, averaged over ten / norm of the mean over root of the total variance, all parameters / one number a network
"""

from ml_collections import ConfigDict
import iwae

VARIANTS = ('smoke', 'digits')


def get_config(variant: str = '') -> ConfigDict:
  if variant == 'digits':
    config = iwae.get_config('iwae')
    config.stages.iwae.steps = 1000
    snr = dict(draws=2000, chunk=20, perturb=0.0)
  else:
    config = iwae.get_config('smoke' if variant else '')
    config.data = dict(name='toy', kind='factors', dims=10, components=3, noise=0.5, batch_size=100)
    config.model = dict(name='markov', latents=(3,), hidden=((),), likelihood='normal', scale=0.5)
    config.stages.iwae.method.update(objective='vae', outer=1, samples=1)
    for optim in config.stages.iwae.optim.values():
      optim.update(learning_rate=1e-2, final_learning_rate=1e-5)
    if not variant:
      config.stages.iwae.steps = 10_000
    snr = dict(draws=50_000, chunk=500, inner=(4, 8, 16, 32, 64), outer=(1, 4, 16, 64), perturb=0.005)
    if variant:
      snr.update(draws=8, chunk=4, inner=(1, 4), outer=(1, 4))
  config.evaluate.tasks = ('likelihood', 'gradient_snr')
  config.evaluate.gradient_snr = ConfigDict(snr)
  config.evaluate.likelihood.samples = 100 if not variant else config.evaluate.likelihood.samples
  return config
