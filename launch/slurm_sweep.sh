#!/bin/bash
# A sweep, one run for each task of an array, and the page that shows them together when all are done:
#   job=$(sbatch --parsable launch/slurm_sweep.sh)
#   sbatch --dependency=afterok:"$job" launch/slurm_collect.sh
# --array counts the override sets of the experiment's sweep(), from 0.
#SBATCH --job-name=nvae_nce-seeds
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -u

source .venv/bin/activate
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # which srun does not take over from sbatch since Slurm 22.05
srun python -m latentgen.main --config=experiments/nvae_nce.py --sweep=seeds --sweep_index="$SLURM_ARRAY_TASK_ID"
status=$?

# 143: told to stop, by preemption or five minutes before the time is up; the same task goes on from its checkpoint.
# A task that was cancelled is no longer RUNNING and stays away.
if [ "$status" -eq 143 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
