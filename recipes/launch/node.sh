#!/bin/bash
# One node of a run on several: torchrun, which starts a process for each GPU. All arguments are vimfast train's.
#
#   NODES=2 RENDEZVOUS=host0:29500 JOB=tiny recipes/launch/node.sh --config vim_tiny --data-path shards/ ...
#
# NODES       how many there are [1]
# RENDEZVOUS  host and port of the first, by a name that it knows itself by [localhost:29500]
# JOB         a name that no other run of these nodes has [vimfast]
# GPUS        processes on this node: a number, or gpu for one on each GPU [gpu]
# RESTARTS    how often torchrun starts again after a crash, from the last checkpoint [3]
#
# Ends with a status by which a scheduler can tell what to start again: 143 after SIGTERM and 75 after SIGUSR1 (the place
# is saved), 143 too where another node was told to stop, 255 where the first node is gone; otherwise as torchrun does
# (0: done; 1: it failed, and starting again would not help).
set -u
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else restarted processes meet at the old addresses

python "$(dirname "$0")/torchrun.py" --nnodes="${NODES:-1}" --nproc_per_node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-3}" \
    --rdzv_backend=c10d --rdzv_id="${JOB:-vimfast}" --rdzv_endpoint="${RENDEZVOUS:-localhost:29500}" \
    -m vimfast.train "$@" --resume auto &
child=$!

stopped=0
stop() {
    stopped=$1
    kill -TERM "$child" 2>/dev/null
}
trap 'stop 143' TERM
trap 'stop 75' USR1

wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
    wait "$child"
    status=$?
done
if [ "$status" -ne 0 ] && [ "$stopped" -ne 0 ]; then
    exit "$stopped"
fi
exit "$status"
