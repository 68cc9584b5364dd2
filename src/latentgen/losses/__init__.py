"""Bounds and losses as pure functions on arrays, in nats. Bounds are to be maximised, losses to be minimised."""

from latentgen.losses.adversarial import discriminator, generator, r1
from latentgen.losses.bounds import (
  RunningLogMeanExp,
  ciwae,
  cubo,
  effective_sample_size,
  elbo,
  eubo,
  iwae,
  log_mean_exp,
  miwae,
)
from latentgen.losses.cauchy_schwarz import cauchy_schwarz
from latentgen.losses.diffusion import diffusion_cross_entropy
from latentgen.losses.estimators import doubly_reparameterised, sticking_the_landing
from latentgen.losses.kl import free_bits, kl_balance, residual_kl
from latentgen.losses.likelihood import gaussian_nll, optimal_scale
from latentgen.losses.nce import nce
from latentgen.losses.schedules import kl_warmup, log_interpolate
from latentgen.losses.score import denoising_score_matching, noisy_sliced_score_matching, sliced_score_matching

__all__ = [
  'RunningLogMeanExp',
  'cauchy_schwarz',
  'ciwae',
  'cubo',
  'denoising_score_matching',
  'diffusion_cross_entropy',
  'discriminator',
  'doubly_reparameterised',
  'effective_sample_size',
  'elbo',
  'eubo',
  'free_bits',
  'gaussian_nll',
  'generator',
  'iwae',
  'kl_balance',
  'kl_warmup',
  'log_interpolate',
  'log_mean_exp',
  'miwae',
  'nce',
  'noisy_sliced_score_matching',
  'optimal_scale',
  'r1',
  'residual_kl',
  'sliced_score_matching',
  'sticking_the_landing',
]
