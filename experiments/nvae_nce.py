"""A hierarchical VAE with a noise-contrastive prior (NCP-VAE).

Paper      Aneja, Schwing, Kautz, Vahdat, "A Contrastive Learning Approach for Training Variational Autoencoder Priors",
           NeurIPS 2021, arXiv 2010.02917; backbone Vahdat, Kautz, "NVAE", NeurIPS 2020, arXiv 2007.03898.
Command    python -m latentgen.main --config=experiments/nvae_nce.py
Default    scikit-learn's 8x8 digits, 16 grey levels, two scales; minutes on two CPU cores.
Variants   :smoke (seconds)  :mnist  :cifar10  :celeba64  :celebahq256 (data prepared by tensorflow-datasets)

Stage 1 trains the VAE, stage 2 one binary critic a group on the frozen VAE, from fresh posterior and prior samples. The
prior p(z_l | z_<l) r_l(z_l, context_l) / Z_l is then sampled by SIR or by Langevin dynamics in noise coordinates.

Where this differs from the paper (of which no official code exists; its appendix could not be read):
  paper                              here                            why
  critic: residual, BatchNorm        GroupNorm                       BatchNorm leaks the class through batch statistics
  critic sees (z_l, context_l)       also the noise coordinates      a bijection of z_l given the context, so the same
                                     (z_l - mean) / deviation        ratio; it spares the critic to learn mean, deviation
  SIR with M = 5000                  M = 500 by default              the bias falls as 1 / M; set method.proposals
  epochs, rates of stage 2: unread   Adam 1e-3 -> 1e-5, best step    spec of the reproduction; early stopping on held-out
                                     by held-out loss                images, as a critic can memorise the training set
  Gaussian decoder on RGB            discretised logistics           a likelihood of the pixels, comparable in bits/dim
"""

from ml_collections import ConfigDict

VARIANTS = ('smoke', 'mnist', 'cifar10', 'celeba64', 'celebahq256')


def digits() -> ConfigDict:
  steps = 2500
  return ConfigDict(
    dict(
      seed=0,
      data=dict(name='digits', batch_size=64, bits=4),
      model=dict(
        name='nvae', groups=(2, 3), latent=4, channels=16, pre_blocks=0, cells_encoder=1, cells_decoder=1,
        likelihood='dmol', mixtures=3, bits=4,
      ),
      recipe=('vae', 'nce'),
      stages=dict(
        vae=dict(
          steps=steps,
          method=dict(name='vae', warmup_portion=0.3, balance=True, spectral=(1e-2, 1e-2)),
          optim=dict(
            vae=dict(
              name='adamax', learning_rate=1e-2, final_learning_rate=1e-4, warmup_steps=100, weight_decay=3e-4, eps=1e-3
            )
          ),
          best='',
        ),
        nce=dict(
          steps=1500,
          method=dict(name='nce', channels=16, blocks='AB', samples=2, proposals=500, chunk=50, langevin_steps=200),
          optim=dict(critic=dict(name='adam', learning_rate=1e-3, final_learning_rate=1e-5, weight_decay=1e-4)),
          load=dict(encoder='vae', decoder='vae'),
          best='nce',
        ),
      ),
      train=dict(log_every_steps=50, checkpoint_every_steps=250),
      mesh=dict(data=-1, fsdp=1),
      evaluate=dict(tasks=()),
    )
  )  # fmt: skip


def get_config(variant: str = '') -> ConfigDict:
  config = digits()
  if variant == 'smoke':
    for stage in config.stages.values():
      stage.steps = 2
  return config
