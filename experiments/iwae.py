"""Importance-weighted autoencoders: tighter bounds, and the gradient estimators that repair their inference networks.

Papers     Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, arXiv 1509.00519 (IWAE).
           Rainforth et al., "Tighter Variational Bounds are Not Necessarily Better", ICML 2018, arXiv 1802.04537 (MIWAE,
           PIWAE, CIWAE).
           Roeder, Wu, Duvenaud, "Sticking the Landing", NeurIPS 2017, arXiv 1703.09194 (STL).
           Tucker et al., "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", ICLR 2019, arXiv 1810.04152
           (DReG).
Command    python -m latentgen.main --config=experiments/iwae.py
Default    IWAE with K = 16 on scikit-learn's digits, binarised afresh at every access; a minute on two CPU cores.
Variants   :smoke (seconds)  :vae :iwae :miwae :piwae :ciwae :stl :iwae_dreg :dreg, each with 16 samples a step, on the digits
           :mnist (one layer) and :mnist_2layers: the paper's networks, batch and schedule of 3,280 epochs; K = 50
           :mnist_short, the one-layer network for a CPU: many epochs with few samples, then some with all; below an hour a row
Sweeps     --sweep=objectives: final bounds, KL(q || p(z | x)) and effective sample size of all objectives, on the digits
           of :mnist_short, --sweep=burda: IWAE with K = 1, 5, 50; --sweep=rainforth: 64 samples, five objectives

Measured by --sweep=objectives (250 test images, one seed): the bound with K = 1,000 in nats, this minus the ELBO, effective
samples of 1,000:
  vae -22.59 0.48 449   iwae -22.30 2.27 181   miwae -22.37 0.83 286   piwae -22.31 1.39 177   ciwae -22.46 0.63 322
  stl -22.26 1.16 189   iwae_dreg -22.30 1.44 186   dreg -22.30 1.27 183
in the order of Rainforth et al.: the generative model is best under IWAE and PIWAE, the posterior under the VAE, MIWAE between.
MNIST, --sweep=burda, one seed, -log p by 5,000 samples: 86.30, 85.76, 85.30 for K = 1, 5, 50; the paper has 86.76, 85.54, 84.78.
--sweep=rainforth, one seed, log p by 5,000 samples, here and in the paper (more in docs/results.md):
  iwae -84.80 -84.52   piwae -84.85 -84.46   miwae -85.13 -84.97   ciwae -85.45 -85.24   vae -85.97 -86.21

`likelihood/iwae` is the bound with the K of the table, `likelihood/posterior_kl` that minus the ELBO. The study of gradient
signal-to-noise ratios is experiments/iwae_snr.py.

Deviations (paper / here / why):
  Adam's second moments start at 1 / at 0, with bias correction / a standard optimiser; it matters for the first thousand steps
  output biases start at the log-odds of the training mean / of the first batch's, with a pseudo-count / the same in expectation
  Adam, batches of 20, 3,280 epochs / :mnist_short has Muon (Jordan et al., 2024), batches of 500, 148 to 811 epochs / to end within an hour
  IWAE starts like the others / from MIWAE (2, 4), its encoder's rate a quarter (--sweep=rainforth) / 0.7 nats worse else
  400 validation images / 400 of MNIST's, drawn by tensorflow-datasets / nothing is selected on them
  PIWAE in published code adds the encoder's two gradients / theta ascends IWAE_MK, phi MIWAE_MK / as the paper has it
  DReG: alpha of the published flags is 0.9 / :iwae_dreg has 0, :dreg 0.9 / both are offered
"""

from ml_collections import ConfigDict
import nvae

OBJECTIVES = {
  'vae': dict(objective='vae', outer=16, samples=1),
  'iwae': dict(objective='iwae', outer=1, samples=16),
  'miwae': dict(objective='miwae', outer=4, samples=4),
  'piwae': dict(objective='piwae', outer=4, samples=4),
  'ciwae': dict(objective='ciwae', outer=1, samples=16, beta=0.5),
  'stl': dict(objective='stl', outer=1, samples=16),
  'iwae_dreg': dict(objective='dreg', outer=1, samples=16, alpha=0.0),
  'dreg': dict(objective='dreg', outer=1, samples=16, alpha=0.9),
}
VARIANTS = ('smoke', *OBJECTIVES, 'mnist', 'mnist_2layers', 'mnist_short')

SWEEP_CHARTS = dict(
  objectives=[dict(x='likelihood/posterior_kl', y='likelihood/iwae', label='stages.iwae.method.objective')],
  rainforth=[dict(x='likelihood/posterior_kl', y='likelihood/iwae', label='stages.iwae.method.objective')],
)

ONE_LAYER = dict(latents=(50,), hidden=((200, 200),))
TWO_LAYERS = dict(latents=(100, 50), hidden=((200, 200), (100, 100)))
MNIST = dict(name='tfds', dataset='mnist', valid=400, in_memory=True, binarize='fresh')
PUBLISHED = dict(
  name='adam', learning_rate=1e-3, final_learning_rate=1e-4, schedule='stairs', b1=0.99, b2=0.999, eps=1e-4,
)  # fmt: skip
FASTER = dict(schedule='cosine', b1=0.9, eps=1e-8)
MUON = dict(name='muon', schedule='cosine', consistent_rms=0.2, ns_steps=3, preconditioning='aol')
PAPER = dict(mnist={50: -84.78}, mnist_2layers={50: -82.90}, mnist_short={1: -86.76, 5: -85.54, 50: -84.78})  # test bound by K
EPOCHS = 3280  # sum of 3^i, i = 0..7
EPOCH = 119  # steps of :mnist_short, of 500 images


def base(data: dict, model: dict, steps: int, method: dict, samples: int) -> ConfigDict:
  """The recipe that all variants share; `samples` is the K of the evaluation."""
  config = nvae.base(dict(data, batch_size=20), {}, steps, 0, (0.0, 0.0), 1e-3)
  config.model = dict(name='markov', activation='tanh', likelihood='bernoulli', **model)
  config.recipe = ('iwae',)
  config.stages = dict(
    iwae=dict(
      steps=steps,
      method=dict(name='iwae', **{'beta': 0.5, 'alpha': 0.0, **method}),
      optim=dict(generation=PUBLISHED, inference=PUBLISHED),
    )
  )
  config.evaluate.tasks = ('likelihood', 'samples')
  config.evaluate.likelihood.update(samples=samples, chunk=50)
  return config


def short(config: ConfigDict) -> ConfigDict:
  """In place of the published schedule a stage `start` with few samples, then one with all of them."""
  config.data.batch_size = 500
  stage = config.stages.iwae.to_dict()
  config.recipe = ('start', 'iwae')
  config.stages.start = stage
  config.stages.iwae.load = dict(encoder='start', decoder='start')
  for name, first, last in (('start', 1e-2, 2e-3), ('iwae', 2e-3, 1e-5)):
    optim = dict(MUON, learning_rate=first, final_learning_rate=last)
    config.stages[name].optim = ConfigDict(dict(generation=optim, inference=optim))
  return config


def get_config(variant: str = '') -> ConfigDict:
  if not variant.startswith('mnist'):
    method = OBJECTIVES.get(variant, OBJECTIVES['iwae'])
    model = dict(latents=(8,), hidden=((64, 64),))
    config = base(dict(name='digits', binarize='fresh'), model, 8000, method, 1000)
    config.data.batch_size = 100
    for optim in config.stages.iwae.optim.values():
      optim.update(learning_rate=2e-3, final_learning_rate=1e-5, **FASTER)
    if variant == 'smoke':
      config.data.batch_size = 8
      config.stages.iwae.steps = 2
      config.train.update(log_every_steps=1, checkpoint_every_steps=1)
      config.evaluate.likelihood.update(samples=4, chunk=2, limit=8)
      config.evaluate.samples.update(count=4, images=2)
    return config
  layers = TWO_LAYERS if variant == 'mnist_2layers' else ONE_LAYER
  config = base(MNIST, layers, EPOCHS * 59_600 // 20, dict(objective='iwae', outer=1, samples=50), 5000)
  config.image_shape = (28, 28, 1)  # for --mode=estimate, which does without data
  config.train.checkpoint_every_steps = 10_000
  config.paper = tuple(
    dict(
      name=f'MNIST, trained with K = {k}: bound, nats',
      paper=nats,
      ours='likelihood/iwae',
      note='K = 5,000',
      when={'stages.iwae.method.objective': 'iwae', 'stages.iwae.method.outer': 1, 'stages.iwae.method.samples': k},
    )
    for k, nats in PAPER[variant].items()
  )
  if variant == 'mnist_short':
    config = short(config)
    configs = sweep('burda')[-1]
    config.update_from_flattened_dict(configs)
    config.evaluate.likelihood.bounds = (64,)
  return config


def member(start: dict, full: dict, epochs: tuple[int, int], **others) -> dict:
  """One member of a sweep of :mnist_short: options of both stages' methods, their lengths, and other keys of the config."""
  stages = zip(('start', 'iwae'), (start, full), epochs, strict=True)
  return {
    f'stages.{name}.{key}': value
    for name, method, length in stages
    for key, value in {**{f'method.{k}': v for k, v in method.items()}, 'steps': length * EPOCH}.items()
  } | others


def many(objective: str, start: tuple[int, int], full: tuple[int, int], other: str = '', inference: float = 4e-3) -> dict:
  """A member with 64 samples a step, of which 25 images at a time fit the caches; the rate between the stages is twice `short`'s.

  `other` is the objective of the start, where it differs; `inference` the encoder's rate after it.
  """
  methods = (dict(objective=o, outer=m, samples=k) for o, (m, k) in ((other or objective, start), (objective, full)))
  rates = {f'start.optim.{update}.final_learning_rate': 4e-3 for update in ('generation', 'inference')}
  rates |= {'iwae.optim.generation.learning_rate': 4e-3, 'iwae.optim.inference.learning_rate': inference}
  return member(*methods, (100, 48), **{f'stages.{key}': rate for key, rate in rates.items()}, **{'train.accumulate': 20})


def sweep(name: str) -> list[dict]:
  """The overrides of each run."""

  def method(objective, outer, samples):
    return dict(objective=objective, outer=outer, samples=samples)

  if name == 'objectives':
    return [{f'stages.iwae.method.{key}': value for key, value in method.items()} for method in OBJECTIVES.values()]
  return {
    'burda': [
      member(method('iwae', 1, 1), method('iwae', 1, 1), (500, 250)),
      member(method('iwae', 1, 5), method('iwae', 1, 5), (320, 160)),
      member(method('iwae', 1, 5), method('iwae', 1, 50), (240, 36)),
    ],
    'rainforth': [
      many('iwae', (2, 4), (1, 64), other='miwae', inference=1e-3),  # encoder: little signal in much noise
      many('piwae', (2, 4), (8, 8)),
      many('miwae', (2, 4), (8, 8)),
      many('ciwae', (1, 8), (1, 64)),
      many('vae', (8, 1), (64, 1)),
    ],
  }[name]
