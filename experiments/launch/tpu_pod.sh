#!/bin/bash
# Trains on every host of a Cloud TPU slice: `experiments/launch/tpu_pod.sh`, from your own machine.
#
# Change: NAME and ZONE of the slice, REPOSITORY (there on every host, the same version, with
# `pip install -e .[tpu]`), WORKDIR (a file system that all hosts mount, as Filestore), the preset and
# the mesh. The mesh's axes multiply to the number of chips: here v5p-64, 32 chips = fsdp 8 x expert 4.
#
# One process a host; jax finds the others from the metadata server (--coordinator=auto). The run
# belongs to the SSH session: start this in tmux, or on a machine that stays. To stop:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=0 \
#     --command="pkill -TERM -f experiments.pretrain"
# On one host is enough: all save at the same step and exit with 0.

set -euo pipefail

NAME=${NAME:-dsjax}
ZONE=${ZONE:-us-east5-a}
REPOSITORY=${REPOSITORY:-dsjax}
WORKDIR=${WORKDIR:-/mnt/shared/runs/dsjax}

gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="
  cd $REPOSITORY &&
  exec .venv/bin/python -m experiments.pretrain \
    --coordinator=auto \
    --preset=tiny \
    --set train.batch_size=32 \
    --workdir=$WORKDIR \
    --set mesh.rules=fsdp_ep \
    --set mesh.fsdp=8 \
    --set mesh.expert=4
"
