#!/usr/bin/env bash
# A training on two machines: two network namespaces joined by a cable of their own, one process in each, which find
# each other by torchrun's rendezvous. Compared with one process by `tests/long/processes.py`. Needs root.
#     tests/long/nodes.sh python train_dreambooth_s2ft.py --flags ...
set -euo pipefail
name=s2ft$$
trap 'ip netns del ${name}a; ip netns del ${name}b' EXIT
ip netns add ${name}a
ip netns add ${name}b
ip link add ${name}x netns ${name}a type veth peer name ${name}y netns ${name}b
for end in a:x:1 b:y:2; do
    IFS=: read -r side link number <<<"$end"
    ip -n $name$side address add 10.77.0.$number/24 dev $name$link
    ip -n $name$side link set $name$link up
    ip -n $name$side link set lo up
done
python=$1
shift
node() {
    ip netns exec $name$1 env GLOO_SOCKET_IFNAME=$name$2 TP_SOCKET_IFNAME=$name$2 ACCELERATE_USE_CPU=1 \
        "$python" -m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_id run \
        --rdzv_conf "is_host=$((1 - $3)),read_timeout=900,keep_alive_max_attempt=200" \
        --rdzv_backend c10d --rdzv_endpoint 10.77.0.1:29500 --local_addr 10.77.0.$(($3 + 1)) "${@:4}"
}
node a x 0 "$@" &
first=$!
node b y 1 "$@"
wait $first
