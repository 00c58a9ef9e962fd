#!/usr/bin/env bash
# Train on two "nodes" of this machine: two network namespaces joined by a cable, each with a host name and a torchrun of
# its own. It shows that the commands of docs/several_gpus.md work between hosts. Run as root.
#
#   tools/two_nodes.sh DATA [flags of vimfast.train]
#
# PROCESSES=2 on each node, on CPUs, through gloo; PYTHON=python is the one with torch. Ends with 0 if both nodes do.
set -euo pipefail

for word in "$@"; do
    case $word in -h | --help)
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        exit
        ;;
    esac
done
case ${1-} in "" | -*)
    echo "usage: tools/two_nodes.sh DATA [flags of vimfast.train]" >&2
    exit 2
    ;;
esac
data=$(realpath "$1")
shift
processes=${PROCESSES:-2} port=29500 python=${PYTHON:-python}
names=(vimfast-node0 vimfast-node1) # of the namespaces, and the hosts
addresses=(10.213.7.1 10.213.7.2) cables=(vfnode0 vfnode1)
cd "$(dirname "$0")/.."

clean() {
    for name in "${names[@]}"; do
        ip netns pids "$name" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del "$name" 2>/dev/null || true
        rm -rf "/etc/netns/$name"
        rmdir --ignore-fail-on-non-empty /etc/netns 2>/dev/null || true
    done
}
trap clean EXIT
clean

ip netns add "${names[0]}"
ip netns add "${names[1]}"
ip link add "${cables[0]}" netns "${names[0]}" type veth peer name "${cables[1]}" netns "${names[1]}"
for i in 0 1; do
    ip -n "${names[i]}" link set lo up
    ip -n "${names[i]}" address add "${addresses[i]}/24" dev "${cables[i]}"
    ip -n "${names[i]}" link set "${cables[i]}" up
    mkdir -p "/etc/netns/${names[i]}" # its hosts file is what the namespace sees as /etc/hosts
    printf '%s\n' "127.0.0.1 localhost" "${addresses[0]} ${names[0]}" "${addresses[1]} ${names[1]}" \
        >"/etc/netns/${names[i]}/hosts"
done

node() { # number, flags: torchrun as one types it on that node
    local i=$1
    shift
    ip netns exec "${names[i]}" unshare --uts sh -c 'hostname "$0" && exec "$@"' "${names[i]}" \
        env GLOO_SOCKET_IFNAME="${cables[i]}" OMP_NUM_THREADS=1 \
        "PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" \
        "$python" -m torch.distributed.run --nnodes=2 --nproc_per_node="$processes" --rdzv_id=two-nodes \
        --rdzv_backend=c10d --rdzv_endpoint="${names[0]}:$port" \
        -m vimfast.train --data-path "$data" --device cpu "$@" 2>&1 | sed -u "s/^/node $i: /"
}

node 0 "$@" &
first=$!
node 1 "$@" &
second=$!
status=0
wait "$first" || status=$?
echo "node 0 ended with status $status"
wait "$second" && last=0 || last=$?
echo "node 1 ended with status $last"
exit $((status > last ? status : last))
