"""A plain one-group VAE with a noise-contrastive prior: the method of nvae_nce on any latent-variable network.

Paper      Aneja, Schwing, Kautz, Vahdat, "A Contrastive Learning Approach for Training Variational Autoencoder Priors",
           NeurIPS 2021, arXiv 2010.02917, the setting of a single group.
Command    python -m latentgen.main --config=experiments/vae_nce.py
Default    scikit-learn's 8x8 digits at 4 bits, 8 latent dimensions, MLPs; a few minutes on two CPU cores.
Variants   :smoke (seconds)  :mnist (data prepared once by tensorflow-datasets)

Deviations: those of experiments/nvae_nce.py; the paper's single-group backbone is an RAE, this one is a VAE.
"""

from ml_collections import ConfigDict
import nvae
import nvae_nce
from nvae_nce import sweep as sweep  # --sweep=seeds

VARIANTS = ('smoke', 'mnist')


def get_config(variant: str = '') -> ConfigDict:
  config = nvae.get_config('mnist' if variant == 'mnist' else '')
  with config.unlocked():
    likelihood = {k: config.model[k] for k in ('likelihood', 'mixtures', 'bits') if k in config.model}
    config.model = ConfigDict(dict(name='vae', latent=8, hidden=(256, 256), **likelihood))
    config.paper = ()
  stage = config.stages.vae
  stage.method.update(balance=False, spectral=(0.0, 0.0))
  stage.optim.vae = ConfigDict(dict(name='adam', learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=0))
  if variant != 'mnist':
    stage.steps = 4000
  config = nvae_nce.add_stage(config, 3000, channels=128, layers=3)
  if variant == 'smoke':
    config = nvae_nce.smoke(config)
    config.model.hidden = (16,)
  return config
