#!/bin/bash
# One node, one process that drives all its GPUs:  sbatch launch/slurm_node.sh
# Start it in the repository's folder, on a file system that the nodes share, with the package installed in .venv.
#SBATCH --job-name=nvae_nce
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -u

source .venv/bin/activate
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # which srun does not take over from sbatch since Slurm 22.05
srun python -m latentgen.main --config=experiments/nvae_nce.py
status=$?

# 143: told to stop, by preemption or five minutes before the time is up; the same job goes on from its checkpoint.
# A job that was cancelled is no longer RUNNING and stays away.
if [ "$status" -eq 143 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
