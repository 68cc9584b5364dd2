#!/bin/bash
# A run on a slice of a TPU pod, from its request to its end; from your own machine, in the repository's folder:
#   ZONE=us-west4-a RUNS=10.0.0.2:/runs launch/tpu_pod.sh
# RUNS is an NFS share (Filestore, say): checkpoints must be seen by all workers and outlive a slice that is preempted.
# When the slice is taken away the script asks for another; the same command goes on from the last checkpoint. STARTS bounds how
# often a command that fails is started again.
set -uo pipefail

NAME=${NAME:-nvae-nce}
ZONE=${ZONE:?the zone of the slice}
RUNS=${RUNS:?the NFS share for runs, host:/path}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
PRICE=${PRICE:---spot}
STARTS=${STARTS:-100}
here=$(dirname "$0")

# What all workers do, at the same time; --distributed=on, as a TPU VM says what it is by its metadata server alone.
command='until [ -e /opt/latentgen/ready ]; do sleep 5; done; cd ~/latentgen && /opt/latentgen/bin/pip install --quiet . &&
source /opt/latentgen/bin/activate &&
python -m latentgen.main --config=experiments/nvae_nce.py --workdir=/mnt/runs/nvae_nce --distributed=on'

state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' 2>/dev/null
}

worker() { # VERB ARGUMENTS...
  local verb=$1
  shift
  gcloud compute tpus tpu-vm "$verb" --zone="$ZONE" --worker=all "$@"
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

request() {
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" --metadata=runs="$RUNS" --metadata-from-file=startup-script="$here/tpu_startup.sh" "$PRICE"
}

while [ "$STARTS" -gt 0 ]; do
  case $(state) in
    ACTIVE)
      STARTS=$((STARTS - 1))
      worker ssh "$NAME" --command='mkdir -p ~/latentgen' &&
        worker scp --recurse pyproject.toml README.md src experiments "$NAME":latentgen/ &&
        worker ssh "$NAME" --command="$command"
      status=$?
      if [ "$status" -eq 0 ] || [ "$status" -eq 2 ]; then # done, or bad input, which another slice would not mend
        delete
        exit "$status"
      fi
      sleep 60
      ;;
    SUSPENDING | SUSPENDED | FAILED) delete ;;
    '') request || exit ;;
    *) sleep 60 ;; # waiting for its turn, or being made
  esac
done
delete
echo "$NAME: given up after so many starts; the last lines above say why" >&2
exit 1
