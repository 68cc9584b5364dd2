"""Samplers that only need a density or a density ratio."""

from latentgen.samplers.langevin import Langevin, LangevinInfo, LangevinState, langevin
from latentgen.samplers.sir import SIRInfo, sir

__all__ = ['Langevin', 'LangevinInfo', 'LangevinState', 'SIRInfo', 'langevin', 'sir']
