#!/bin/bash
# The page of a sweep whose runs are done; see slurm_sweep.sh.
#SBATCH --job-name=nvae_nce-collect
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
set -eu

source .venv/bin/activate
srun env JAX_PLATFORMS=cpu python -m latentgen.main --config=experiments/nvae_nce.py --sweep=seeds --mode=collect
