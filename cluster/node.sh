#!/usr/bin/env bash
# Runs one node of a cluster:  node.sh FOLDER [FLAG OF rqlited …]
#
# A node votes once for each term, and its folder remembers for whom. If it came back under its id with an empty folder, it
# could vote again, for a node that lacks what was acknowledged. So this starts an empty folder only
# - with NEW_NODE=yes, at the first start of all nodes,
# - with JOIN=b:4002, for one more node, and for one that was removed from the cluster before (README.md, "Replace a node").
#   It asks that node to be let in, whatever -bootstrap-expect and -join say. With those, a node that hears from a leader
#   takes itself for a member, and never asks; and a leader may send to a node for some time after its removal.
#
# A node whose SQLite finds no room for a row goes on without it, and differs from the others from then on. So this kills
# the node when less than ROOM_MIB (512) are free. It starts the node when twice as much is free, also the first time; then
# the node takes from the others what it has missed. It adds -fk: without that, a node checks no foreign keys. And it ends
# the daily PRAGMA optimize: it would give each node other statistics, and so other query plans.
set -euo pipefail
folder=$1
shift
room_mib=${ROOM_MIB:-512}
node=
trap 'kill -TERM $node 2>/dev/null || exit 0' TERM INT # exit if there is no node
umask 077 # the folder has messages, and secrets of senders
mkdir -p "$folder"
if ! test -e "$folder/raft.db" && test "${NEW_NODE:-}" != yes && test -z "${JOIN:-}"; then
    echo "node.sh: $folder has no raft.db. Remove the lost node from the cluster, then start this with JOIN=another:4002" >&2
    exit 1
fi

join=${JOIN:+-bootstrap-expect 0 -join $JOIN} # at its first start here, also if it could not join before

free_mib() { df --output=avail --block-size=1M "$folder" | tail -n 1; }

while true; do
    until (($(free_mib) > 2 * room_mib)); do
        echo "node.sh: less than $((2 * room_mib)) MiB are free for $folder: the node is not started" >&2
        sleep 5 & wait $! || true # so that a signal is handled at once
    done
    # shellcheck disable=SC2086 # several words, or none
    "${RQLITED:-rqlited}" -fk -auto-optimize-int 0h "$@" $join "$folder" &
    node=$!
    join=
    killed=
    while kill -0 "$node" 2>/dev/null; do
        if (($(free_mib) < room_mib)); then
            echo "node.sh: less than $room_mib MiB are free for $folder: the node is killed" >&2
            killed=yes
            kill -KILL "$node"
            break
        fi
        sleep 0.5 & wait $! || true
    done
    status=0
    wait "$node" || status=$?
    test "$killed" || exit "$status"
done
