"""A latent prior as a product of density ratios, each learned by a classifier between posterior and prior samples.

Paper      Xiao, Han, "Adaptive Multi-stage Density Ratio Estimation for Learning Latent Space Energy-based Model", NeurIPS 2022, arXiv
           2209.08739.
Command    python -m latentgen.main --config=experiments/multistage_dre.py
Default    scikit-learn's 8x8 digits, 8 latent dimensions, MLPs, up to three ratios; minutes on two CPU cores.
Variants   :smoke (seconds)  :frozen (ratios on a VAE's encoder)  :anomaly (digits 1 and 4 are held out)  :svhn  :celeba64 (sizes of
           experiments/latent_ebm.py)

The recipe: a generator under N(0, I) with short-run Langevin posteriors; then in turn a ratio and the generator again, with the
posterior inferred anew under the prior so far. A ratio starts at zero, and ends at its lowest held-out cross-entropy: one that
finds nothing to correct after `patience_steps` is handed on as zero, so that the number of stages follows the data.

Measured by the command above, seed 0: AUROC of a classifier between posterior codes and draws of N(0, I) 0.735, Langevin 0.549, SIR
0.554 (standard error 0.025); Fréchet distance 15.8, 5.2, 6.3 (training images: 4.4).

No code of the authors was found, and of the paper only abstract, introduction and a figure's caption could be read: the schedule is
our reading.

Deviations (paper / here / why):
  latent dimension, widths, number of stages: unread / those of the latent EBM, three stages
  the negatives of later stages from a persistent pool or short chains / short chains, through the priors of all stages in turn /
    the same process then samples the model
  stops a stage / by its held-out cross-entropy on validation images / classifiers memorise small training sets
"""

import latent_ebm
from ml_collections import ConfigDict
import nvae

VARIANTS = ('smoke', 'frozen', 'anomaly', 'svhn', 'celeba64')

PAPER = (
  dict(name='SVHN FID', paper=26.19, ours='', note='Inception features; not comparable with ours'),
  dict(name='CelebA-64 FID', paper=35.38, ours='', note='Inception features; not comparable with ours'),
)


def ratio(one: dict, k: int, steps: int, patience: int, load: dict) -> dict:
  """The stage of ratio `k`: a network that tells codes of data from samples of the prior so far."""
  return dict(
    steps=steps,
    method=dict(one['method'], tilts=k + 1, objective='contrast', train=('prior',)),
    optim=dict(prior=dict(one['optim']['prior'], learning_rate=1e-3)),
    load=load,
    best='contrast',
    patience_steps=patience,
  )


def chain(config: ConfigDict, ratios: int, steps: int, again: int, patience: int) -> ConfigDict:
  """Turns the one stage of latent_ebm into `ratios` ratios with the generator's own stages before and between."""
  one = config.stages.ebm.to_dict()
  stages, load = {}, {}
  for k in range(ratios):
    stages[f'generator{k}'] = dict(
      one,
      steps=again if k else one['steps'],
      method=dict(one['method'], tilts=k, train=('generator',)),
      optim=dict(generator=one['optim']['generator']),
      ema=dict(decoder=0.999),
      load=dict(load),
    )
    load['decoder'] = f'generator{k}'
    stages[f'ratio{k}'] = ratio(one, k, steps, patience, dict(load))
    load[f'tilt{k}'] = f'ratio{k}'
  config.recipe, config.stages = tuple(stages), stages
  config.evaluate.tasks = (*config.evaluate.tasks, 'ratios')
  config.evaluate.ratios = dict()
  return config


def frozen(config: ConfigDict, ratios: int, steps: int, patience: int) -> ConfigDict:
  """The ratios alone, on the encoder of a VAE."""
  config = latent_ebm.two_stage(config)
  one, stages = config.stages.ebm.to_dict(), dict(vae=config.stages.vae.to_dict())
  for k in range(ratios):
    load = dict(encoder='vae', decoder='vae', **{f'tilt{i}': f'ratio{i}' for i in range(k)})
    stages[f'ratio{k}'] = ratio(one, k, steps, patience, load)
  config.recipe, config.stages = tuple(stages), stages
  config.evaluate.tasks = (*config.evaluate.tasks, 'ratios')
  config.evaluate.ratios = dict()
  return config


def get_config(variant: str = '') -> ConfigDict:
  if variant in ('svhn', 'celeba64'):
    config = latent_ebm.get_config('svhn')
    if variant == 'celeba64':
      config.data = dict(name='tfds', dataset='celeb_a', crop=(40, 15, 148, 148), size=64, batch_size=100)
      config.image_shape, config.model.hidden = (64, 64, 3), (64, 128, 256, 512)
    config.paper = ({'svhn': PAPER[0], 'celeba64': PAPER[1]}[variant],)
    return chain(config, 4, 20_000, 50_000, 5000)
  config = latent_ebm.get_config('anomaly' if variant == 'anomaly' else '')
  config.train.checkpoint_every_steps = 100
  if variant == 'frozen':
    return frozen(config, 3, 1500, 400)
  config = chain(config, 2 if variant == 'smoke' else 3, 1500, 1500, 400)
  if variant == 'smoke':
    config = nvae.smoke(config)
    for stage in config.stages.values():
      stage.method.update(hidden=(8,), prior_steps=2, posterior_steps=2, proposals=20)
    config.evaluate.partition.proposals = 20
  return config
