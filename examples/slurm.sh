#!/bin/bash
# A run on several machines under Slurm: one task a node, which is torchrun; it starts the node's ranks.
#
#   sbatch --nodes 4 examples/slurm.sh small --data texts/ --out runs/small --parallel.shard
#
# Submit it in a directory that all nodes see, with the environment of engram-lm active. Arguments are those of `engram-lm train`.
# The job goes on by itself after its time is over, a node's failure or preemption, until the run is complete.

#SBATCH --job-name=engram
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# Add what your site wants: --partition, --account, and --gpus-per-node if there are any.

set -euo pipefail

ranks_per_node=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / ranks_per_node))
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over from sbatch
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # seconds that torchrun gives ranks to end their step and save

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node need different ones

# Slurm signals this script alone (B:). It passes the signal on to torchrun on every node, and torchrun to the ranks.
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

srun torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks_per_node" \
  --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$SLURM_JOB_ID" \
  --max-restarts 3 \
  -m engram_lm train "$@" --resume &
run=$!

status=0
wait "$run" || status=$?
if [[ $stopped ]]; then # the signal ended the first wait, not the run
  status=0
  wait "$run" || status=$?
  if ((status)); then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
