"""BIVA with a noise-contrastive prior: the method of nvae_nce on a hierarchy with two latents a layer.

Paper      Maaloe, Fraccaro, Lievin, Winther, "BIVA: A Very Deep Hierarchy of Latent Variables for Generative Modeling", NeurIPS
           2019, arXiv 1902.02102; Aneja, Schwing, Kautz, Vahdat, "A Contrastive Learning Approach for Training Variational
           Autoencoder Priors", NeurIPS 2021, arXiv 2010.02917. No paper joins the two.
Command    python -m latentgen.main --config=experiments/biva_nce.py
Default    scikit-learn's 8x8 digits at 4 bits; minutes on two CPU cores.
Variants   :smoke (seconds)  :mnist (data prepared once by tensorflow-datasets)

Deviations: those of experiments/biva.py and experiments/nvae_nce.py. Critics of vectors are MLPs that see the latent, its noise
coordinates and the generative state, flattened.
"""

import biva
from ml_collections import ConfigDict
import nvae_nce
from nvae_nce import sweep as sweep  # --sweep=seeds

VARIANTS = ('smoke', 'mnist')


def get_config(variant: str = '') -> ConfigDict:
  config = biva.get_config(variant)
  if variant == 'mnist':
    config = nvae_nce.add_stage(config, 20 * (biva.PUBLISHED['mnist'][3] // config.data.batch_size), channels=128, layers=3)
    config.paper = ()
    return config
  config = nvae_nce.add_stage(config, 1500, channels=64, layers=3)
  return nvae_nce.smoke(config) if variant == 'smoke' else config
