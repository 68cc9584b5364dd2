"""Outliers by a hierarchical VAE: how much of the likelihood do the lower latents owe to having seen the image?

Paper      Maaloe, Fraccaro, Lievin, Winther, "BIVA: A Very Deep Hierarchy of Latent Variables for Generative Modeling",
           NeurIPS 2019, arXiv 1902.02102 (the bound L^{>k}); Havtorn, Frellsen, Hauberg, Maaloe, "Hierarchical VAEs Know What
           They Don't Know", ICML 2021, arXiv 2102.08248 (the likelihood ratio LLR^{>k}); backbone: experiments/nvae.py.
Command    python -m latentgen.main --config=experiments/nvae_anomaly.py
Default    scikit-learn's 8x8 digits at 4 bits without 8 and 9, which are outliers, as are noise, shuffled and inverted digits;
           minutes on two CPU cores.
Variants   :smoke (seconds)  :fashion (trained on binarised Fashion-MNIST, outliers MNIST; half an hour on a busy CPU core)

:fashion reads IDX files (train-images-idx3-ubyte.gz ...) from data/fashion_mnist and data/mnist, or from
--config.data.path=DIR and --config.evaluate.anomaly.outliers.mnist.path=DIR.

Measured with these commands, area under the ROC curve, outliers being positive (standard errors to 0.013, held out 0.05):
                                              L^{>0}   LLR^{>1}  LLR^{>2}  LLR^{>3}  LLR^{>4}
  :fashion, MNIST, 1,000 images each          0.170    0.936     0.952     0.828     0.125
  --config.evaluate.anomaly.lower=sample      0.170    0.774     0.864     0.705     0.280
  default, 49 held-out digits                 0.952    0.541     0.617     0.573     0.379
The ratio is for outliers that are simpler than the data, which the likelihood prefers. Where outliers are merely unlikely, as
all those of the default are, the likelihood finds them and the ratio does not.

Deviations (paper / here / why):
  BIVA and bottom-up hierarchical VAEs / NVAE / the scores are of any hierarchy; this one trains in minutes
  upper latents, too, at the mode of their posterior / sampled / as the bound is defined
  1000 importance samples for L^{>0} / one sample for every bound, the same one / scores at equal cost
"""

from ml_collections import ConfigDict
import nvae

VARIANTS = ('smoke', 'fashion')


FASHION = dict(name='idx', path='data/fashion_mnist', valid=5000, binarize='fresh')


def detect(config: ConfigDict, outliers: dict, lower: str, unit: str = 'group', limit: int | None = None) -> ConfigDict:
  """The anomaly task on a config of nvae.py."""
  with config.unlocked():
    config.evaluate.tasks = ('likelihood', 'anomaly', 'samples')
    config.evaluate.anomaly = ConfigDict(dict(outliers=outliers, samples=1, lower=lower, unit=unit, limit=limit))
    config.paper = ()
  return config


def against_mnist(config: ConfigDict, unit: str) -> ConfigDict:
  """The task on a model of FASHION, which trains on a CPU."""
  config.image_shape = (28, 28, 1)
  config.train.checkpoint_every_steps = 200
  config.evaluate.likelihood.update(samples=20, chunk=20, limit=1000)
  outliers = dict(mnist=dict(name='idx', path='data/mnist'), noise='noise', inverted='inverted')
  return detect(config, outliers, 'mode', unit, 1000)


def fashion() -> ConfigDict:
  model = dict(
    groups=(2, 2), latent=4, channels=6, pre_blocks=2, pre_cells=1, cells_encoder=1, cells_decoder=1, squeeze_excite=False,
    likelihood='bernoulli',
  )  # fmt: skip
  return against_mnist(nvae.base(dict(FASHION, batch_size=32), model, 1600, 50, (1e-2, 1e-2), 1e-2), 'group')


def get_config(variant: str = '') -> ConfigDict:
  if variant == 'fashion':
    return fashion()
  config = nvae.get_config(variant)
  config.data.held_out_classes = (8, 9)
  names = ('held_out', 'noise', 'shuffled', 'inverted')
  return detect(config, {name: name for name in names}, 'sample', limit=16 if variant == 'smoke' else None)
