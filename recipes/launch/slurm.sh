#!/bin/bash
# Two nodes of 8 GPUs under SLURM: sbatch recipes/launch/slurm.sh
#
# Three minutes before the time limit, and when the job is preempted, SLURM sends SIGTERM to all nodes. The run then saves
# its place and ends with status 143, and the job queues itself again; so it does after 75. Any other status ends it.
#SBATCH --job-name=vim-tiny
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --exclusive
#SBATCH --time=24:00:00 --signal=TERM@180
#SBATCH --requeue --open-mode=append --output=%x-%j.log
set -u

# What to change: the data, and a folder on a disk that all nodes share.
DATA=${DATA:-s3://bucket/shards}
OUTPUT=${OUTPUT:-$HOME/runs/$SLURM_JOB_NAME}
CACHE=${CACHE:-/tmp/vimfast-$USER} # on a disk of each node: the shards of a store are kept there

# A job that SLURM started again keeps its number; a fresh rendezvous must not meet what is left of the last one.
JOB=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
RENDEZVOUS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500
NODES=$SLURM_NNODES
export JOB RENDEZVOUS NODES

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \
    bash recipes/launch/node.sh --config vim_tiny_8gpu --data-path "$DATA" --cache-dir "$CACHE" --output_dir "$OUTPUT"
status=$?
if [ "$status" -eq 143 ] || [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
