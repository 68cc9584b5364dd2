#!/bin/bash
# Several nodes, one process for each GPU:  sbatch launch/slurm_nodes.sh
# JAX takes the coordinator, the number of processes and its own GPU from Slurm: as many tasks as GPUs on a node, and no
# --gpus-per-task, which would hide from a process the GPU that it takes.
#SBATCH --job-name=nvae_nce
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -u

source .venv/bin/activate
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # which srun does not take over from sbatch since Slurm 22.05
srun --kill-on-bad-exit=1 python -m latentgen.main --config=experiments/nvae_nce.py
status=$?

# 143: told to stop, by preemption or five minutes before the time is up; the same job goes on from its checkpoint.
# A job that was cancelled is no longer RUNNING and stays away.
if [ "$status" -eq 143 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
