#!/usr/bin/env bash
# Train on two "nodes" of this machine: two network namespaces joined by a cable, each with a host name and a torchrun of
# its own, which recipes/launch/node.sh starts. Run as root, on CPUs, through gloo.
#
#   tools/two_nodes.sh DATA --output_dir RUN [flags of vimfast.train]
#
# DATA       a folder, or the URL of a store that answers in both namespaces
# {node}     in a flag becomes 0 and 1, for what each node has on a disk of its own: --cache-dir /tmp/cache{node}
# PROCESSES  on each node [2]
# RESTARTS   how often torchrun starts again after a crash [0]
# NAME       of the namespaces and hosts, before -0 and -1; the cables are eth-vf0 and eth-vf1 [vimfast-<process id>]
# PYTHON     the one with torch [python]
#
# A node that is killed (ip netns pids NAME-1 | xargs kill -9), or has lost the first one, is started again, as a scheduler
# does. ip -n NAME-1 link set eth-vf1 down pulls the cable. Ends with 0 if both nodes do.
set -euo pipefail

for word in "$@"; do
    case $word in -h | --help)
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        exit
        ;;
    esac
done
case ${1-} in "" | -*)
    echo "usage: tools/two_nodes.sh DATA --output_dir RUN [flags of vimfast.train]" >&2
    exit 2
    ;;
esac
case $1 in *://*) data=$1 ;; *) data=$(realpath "$1") ;; esac
shift
processes=${PROCESSES:-2} port=29500 python=$(command -v "${PYTHON:-python}") name=${NAME:-vimfast-$$}
names=("$name-0" "$name-1") # of the namespaces, and the hosts
addresses=(10.213.7.1 10.213.7.2) cables=(eth-vf0 eth-vf1) open=$(mktemp)
cd "$(dirname "$0")/.."

clean() {
    rm -f "$open"
    for name in "${names[@]}"; do
        ip netns pids "$name" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del "$name" 2>/dev/null || true
        rm -rf "/etc/netns/$name"
        rmdir --ignore-fail-on-non-empty /etc/netns 2>/dev/null || true
    done
}
trap clean EXIT

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

launch() { # number, flags: node.sh as one types it on that node
    local i=$1
    shift
    ip netns exec "${names[i]}" unshare --uts sh -c 'hostname "$0" && exec "$@"' "${names[i]}" \
        env GLOO_SOCKET_IFNAME="${cables[i]}" OMP_NUM_THREADS=1 NODES=2 GPUS="$processes" JOB=two-nodes \
        RESTARTS="${RESTARTS:-0}" RENDEZVOUS="${names[0]}:$port" PATH="$(dirname "$python"):$PATH" \
        "PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" \
        recipes/launch/node.sh --data-path "$data" --device cpu "${@//\{node\}/$i}" 2>&1 | sed -u "s/^/node $i: /"
}

node() {
    local status=137
    while [ -e "$open" ]; do # neither node has ended for good
        launch "$@" && status=0 || status=$?
        echo "node $1 ended with status $status"
        case $status in 137 | 255) sleep 1 ;; *) rm -f "$open" ;; esac
    done
    return "$status"
}

node 0 "$@" &
first=$!
node 1 "$@" &
second=$!
status=0
wait "$first" || status=$?
wait "$second" && last=0 || last=$?
exit $((status > last ? status : last))
