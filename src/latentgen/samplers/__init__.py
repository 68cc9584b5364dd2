"""Samplers that only need a density, a density ratio or a score."""

from latentgen.samplers.annealed import annealed_langevin, geometric_ladder, step_sizes
from latentgen.samplers.kernels import Kernel, mala, ula
from latentgen.samplers.langevin import Langevin, LangevinInfo, LangevinState, langevin
from latentgen.samplers.sir import SIRInfo, sir

__all__ = [
  'Kernel',
  'Langevin',
  'LangevinInfo',
  'LangevinState',
  'SIRInfo',
  'annealed_langevin',
  'geometric_ladder',
  'langevin',
  'mala',
  'sir',
  'step_sizes',
  'ula',
]
