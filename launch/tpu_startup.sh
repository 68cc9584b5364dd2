#!/bin/bash
# Run by every worker of a TPU slice when it boots, as root: the shared folder for runs and a Python environment.
# tpu_pod.sh hands it over, with the address of an NFS share in the metadata key `runs`.
set -euo pipefail

attribute='http://metadata.google.internal/computeMetadata/v1/instance/attributes/runs'
share=$(curl --silent --fail --header 'Metadata-Flavor: Google' "$attribute")

apt-get update
apt-get install --yes nfs-common python3-pip
mkdir -p /mnt/runs
mountpoint --quiet /mnt/runs || mount -t nfs -o hard "$share" /mnt/runs

pip install uv
uv venv --seed --python 3.12 --clear /opt/latentgen
/opt/latentgen/bin/pip install 'jax[tpu]'
chmod -R a+rwX /opt/latentgen
touch /opt/latentgen/ready
