"""Samplers that only need a density, a density ratio or a score."""

from latentgen.samplers.annealed import annealed_langevin, geometric_ladder, step_sizes
from latentgen.samplers.langevin import Langevin, LangevinInfo, LangevinState, langevin
from latentgen.samplers.sir import SIRInfo, sir

__all__ = [
  'Langevin',
  'LangevinInfo',
  'LangevinState',
  'SIRInfo',
  'annealed_langevin',
  'geometric_ladder',
  'langevin',
  'sir',
  'step_sizes',
]
