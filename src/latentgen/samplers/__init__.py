"""Samplers that only need a density or a density ratio."""

from latentgen.samplers.kernels import Kernel, mala, ula
from latentgen.samplers.langevin import Langevin, LangevinInfo, LangevinState, langevin
from latentgen.samplers.sir import SIRInfo, sir

__all__ = ['Kernel', 'Langevin', 'LangevinInfo', 'LangevinState', 'SIRInfo', 'langevin', 'mala', 'sir', 'ula']
