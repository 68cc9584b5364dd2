"""A Cauchy-Schwarz regularised autoencoder."""

from ml_collections import ConfigDict
import nvae

VARIANTS = ('smoke', 'clustering', 'semi', 'density', 'blobs', 'standard', 'mixture', 'vamp', 'mnist')


def base(data: dict, model: dict, steps: int, rate: float = 1e-3) -> ConfigDict:
  config = nvae.base(data, dict(latent=8, hidden=(256, 256), likelihood='bernoulli') | model, steps, 0, (0.0, 0.0), rate)
  config.model.name = 'vae'
  for key in ('remat', 'dtype'):
    del config.model[key]
  stage = config.stages.vae
  with config.unlocked():
    stage.method = dict(
      name='mixture', objective='cauchy_schwarz', prior='free', components=50, learned_weights=False, spread=1.0, weight=1.0,
      warmup_portion=0.1, restart=0.1, max_scale=2.0, target=None, dual_rate=1e-2, samples=1, reseed=0.1, reseed_portion=0.5, classes=0, alpha=1.0,
      defensive=0.0,
    )
    stage.optim.vae = dict(name='adam', learning_rate=rate, final_learning_rate=1e-4)
    stage.best = ''
    config.evaluate.tasks = ('likelihood',)
  return config


def get_config(variant: str = '') -> ConfigDict:
  data = dict(name='digits', batch_size=100, binarize='none', bits=8)
  config = base(data, {}, 3000)
  config.train.checkpoint_every_steps = 500
  method = config.stages.vae.method
  config.evaluate.unlock()
  if variant == 'clustering':
    method.components = 10
    config.evaluate.tasks = ('clustering',)
    config.evaluate.clustering = dict(restarts=5)
  return config
