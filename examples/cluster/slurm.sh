#!/bin/bash
# Submit from the folder of the repository, after make setup:  sbatch examples/cluster/slurm.sh
#SBATCH --job-name=minipar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
# shellcheck source=/dev/null
source "${VENV:-.venv}/bin/activate"

# The first node of the job is where all others ask. Two jobs that share a node take different ports.
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))

# One torchrun a node. It starts one rank for each GPU, and the torchruns find each other at the first node.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" \
  --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-backend c10d \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-endpoint "$first:$port" \
  examples/cluster/train.py --tp "${TP:-8}" --steps "${STEPS:-200}" --save "${CHECKPOINTS:-checkpoints}/$SLURM_JOB_ID"
