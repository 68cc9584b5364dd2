"""Many learned priors on one frozen VAE, in one table: what each gains in samples and likelihood, and what it costs.

Papers     standard normal: Kingma, Welling, 2013, arXiv 1312.6114; Gaussian mixture fitted afterwards: Ghosh et al., 2020, arXiv
           1903.12436; VampPrior: Tomczak, Welling, 2018, arXiv 1705.07120; spline flow: Böhm, Seljak, 2022, arXiv 2006.05479;
           noise-contrastive: Aneja et al., 2021, arXiv 2010.02917; ratio chain: Xiao, Han, 2022, arXiv 2209.08739; energy-based: Pang
           et al., 2020, arXiv 2006.08205; diffusion: Vahdat et al., 2021, arXiv 2106.05931 (second stage alone).
Command    python -m latentgen.main --config=experiments/prior_comparison.py
Default    scikit-learn's 8x8 digits at 4 bits, 8 latent dimensions; minutes on two CPU cores.
Variants   :smoke (seconds)  :mnist  :fashion (data prepared once by tensorflow-datasets)
Sweep      --sweep=seeds: three seeds

Every prior is one more stage of the recipe, trained on posterior samples of the same encoder; the table and the grid of samples are
the first thing in the report, the table also in tables/comparison.csv. Three seeds are in docs/results.md.

Deviations: those of the experiment of each prior. The VampPrior's pseudo-inputs are trained with the network frozen (paper: jointly).
"""

from ml_collections import ConfigDict
import nvae
import vae_nce

VARIANTS = ('smoke', 'mnist', 'fashion')
PRIORS = (
  ('standard normal', 'normal'),
  ('Gaussian mixture', 'gmm'),
  ('VampPrior', 'vamp'),
  ('spline flow', 'flow'),
  ('noise-contrastive', 'nce'),
  ('ratio chain', 'ratio0', 'ratio1', 'ratio2'),
  ('energy-based', 'ebm'),
  ('diffusion', 'diffusion'),
)


def priors(config: ConfigDict, steps: int, components: int) -> dict[str, dict]:
  """The stages after 'vae'; each takes its network from there."""
  load = dict(encoder='vae', decoder='vae')

  def rate(start: float, end: float = 1e-5) -> dict:
    return dict(name='adam', learning_rate=start, final_learning_rate=end, warmup_steps=0)

  def density(prior: dict, best: bool = True) -> dict:
    stage = dict(steps=0, method=dict(name='density', prior=prior), load=load)
    return dict(stage, steps=steps, optim=dict(prior=rate(1e-3)), best='prior') if best else stage

  def energy(tilts: int, objective: str, start: float, **options) -> dict:
    method = dict(
      name='energy_prior', objective=objective, posterior='encoder', posterior_steps=0, train=('prior',), tilts=tilts,
      hidden=(128, 128), prior_steps=60, prior_step_size=0.16, proposals=2000,
    )  # fmt: skip
    earlier = {f'tilt{i}': f'ratio{i}' for i in range(tilts - 1)}
    return dict(steps=steps, method=method, optim=dict(prior=rate(start)), load={**load, **earlier}, **options)

  patient = dict(best='contrast', patience_steps=steps // 3)
  stages = dict(
    normal=density(dict(name='normal', standard=True), best=False),
    gmm=density(dict(name='gmm', components=components), best=False),
    vamp=dict(
      steps=steps,
      method=dict(name='mixture', objective='elbo', prior='pseudo', components=500, learned_weights=True, frozen=True),
      optim=dict(prior=rate(3e-3)),
      load=load,
      best='nelbo',
    ),
    flow=density(dict(name='flow')),
    nce=config.stages.nce.to_dict(),
    **{f'ratio{i}': energy(i + 1, 'contrast', 1e-3, **patient) for i in range(3)},
    ebm=energy(1, 'likelihood', 2e-4, ema=dict(tilt0=0.999)),
    diffusion=dict(density(dict(name='diffusion'), best=False), steps=2 * steps, optim=dict(prior=rate(1e-3)), ema=dict(prior=0.999)),
  )
  stages['nce']['steps'] = steps
  return stages


def get_config(variant: str = '') -> ConfigDict:
  config = vae_nce.get_config('mnist' if variant in ('mnist', 'fashion') else '')
  if variant == 'fashion':
    config.data.dataset = 'fashion_mnist'
  found = priors(config, 20_000 if variant in ('mnist', 'fashion') else 1500, 100 if variant in ('mnist', 'fashion') else 20)
  vae = config.stages.vae.to_dict()
  config.stages = dict(vae=vae, **found)
  config.recipe = ('vae', *found)
  config.train.checkpoint_every_steps = 100 if variant in ('', 'smoke') else 1000
  config.evaluate.tasks = ('comparison',)
  config.evaluate.comparison = dict(priors=PRIORS, split=('valid', 'test'))
  if variant == 'smoke':
    config = nvae.smoke(config)
    config.model.hidden = (16,)
    for name, stage in config.stages.items():
      if stage.method.name == 'energy_prior':
        stage.method.update(hidden=(8,), prior_steps=2, proposals=20)
    config.stages.nce.method.update(channels=4, proposals=4, chunk=2, langevin_steps=2, normaliser_proposals=2)
    config.stages.gmm.method.prior.components = 2
    config.stages.vamp.method.components = 4
    config.evaluate.comparison.update(
      limit=40, train_limit=100, steps=5, repeats=2, likelihood_samples=2, likelihood_chunk=2, likelihood_limit=4, timed=8, count=4
    )
  return config


def sweep(name: str) -> list[dict]:
  """--sweep=seeds."""
  return {'seeds': [{'seed': seed} for seed in range(3)]}[name]
