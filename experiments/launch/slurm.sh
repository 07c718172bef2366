#!/bin/bash
# Trains on several nodes of a SLURM cluster: `sbatch experiments/launch/slurm.sh`.
#
# Change: the #SBATCH lines (partition, nodes, GPUs, time), REPOSITORY (on a file system that all
# nodes see, with its environment in .venv), WORKDIR (shared too), the preset and the mesh. The mesh's
# axes multiply to the number of devices: here 4 nodes x 8 GPUs = fsdp 8 x expert 4.
#
# One process a GPU, as jax expects under srun: it finds the coordinator, its number and its GPU
# from SLURM's variables (--coordinator=auto). Two minutes before the time limit, and when the job
# is preempted, SLURM sends SIGTERM: the run saves and exits with 0. Submit it again to go on.

#SBATCH --job-name=dsjax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dsjax-%j.log

set -euo pipefail

REPOSITORY=${REPOSITORY:-$HOME/dsjax}
WORKDIR=${WORKDIR:-$HOME/runs/dsjax}

cd "$REPOSITORY"

# --kill-on-bad-exit: one process that ends badly takes the rest along, should they not notice.
srun --kill-on-bad-exit=1 .venv/bin/python -m experiments.pretrain \
  --coordinator=auto \
  --preset=tiny \
  --set train.batch_size=32 \
  --workdir="$WORKDIR" \
  --set mesh.rules=fsdp_ep \
  --set mesh.fsdp=8 \
  --set mesh.expert=4
