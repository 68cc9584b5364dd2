"""LSGM: a score-based diffusion as the prior of a hierarchical VAE, trained with it.

Paper      Vahdat, Kreis, Kautz, "Score-based Generative Modeling in Latent Space", NeurIPS 2021, arXiv 2106.05931.
Command    python -m latentgen.main --config=experiments/lsgm.py
"""

from ml_collections import ConfigDict
import nvae

VARIANTS = ('smoke', 'two_stage', 'vector')


def get_config(variant: str = '') -> ConfigDict:
  config = nvae.get_config()
  config.model.update(groups=(2,), latent=2, pre_blocks=1, pre_cells=1)
  stage = config.stages.vae
  config.recipe = ('vae', 'lsgm')
  config.stages.lsgm = dict(
    steps=1000,
    method=dict(
      name='lsgm',
      prior=dict(name='diffusion', sde='vp', weighting='ll', sampling='ll', map=(2, 4, 4, 2), channels=32, layers=1, probes=1,
                 tolerance=1e-3),
      times='shared', joint=True),
    optim=dict(
      vae=dict(name='adam', learning_rate=1e-4, final_learning_rate=1e-5),
      prior=dict(name='adam', learning_rate=1e-3)),
    load=dict(encoder='vae', decoder='vae'),
    ema=dict(prior=0.999),
    best='nelbo',
  )
  config.evaluate.likelihood.update(samples=1)
  if variant == 'smoke':
    return nvae.smoke(config)
  return config
