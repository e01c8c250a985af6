#!/usr/bin/env bash
# Starts three nodes on this machine, for a first look:  cluster/start.sh [FOLDER]
#
# They serve on the ports 4101, 4102 and 4103, until you press Ctrl+C. Their data stay in FOLDER (cluster/data).
# If there is no rqlited on the path, it is built here, which needs Go 1.24 and a C compiler, and takes some minutes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/data}
mkdir -p "$folder"
for n in 1 2 3; do
    if curl -s "http://127.0.0.1:410$n/readyz" >/dev/null; then
        echo "something answers on port 410$n already" >&2
        exit 1
    fi
done
export RQLITED=${RQLITED:-$(command -v rqlited || echo "$here/rqlited/rqlited")}
if ! test -x "$RQLITED"; then
    test "$RQLITED" = "$here/rqlited/rqlited" || { echo "there is no $RQLITED" >&2; exit 1; }
    echo "building rqlited ..."
    go build -C "$here/rqlited" -trimpath -ldflags='-s -w' -o rqlited github.com/rqlite/rqlite/v8/cmd/rqlited
fi
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
ready= pids=()
flags() {
    echo "-node-id n$1 -http-addr 127.0.0.1:410$1 -raft-addr 127.0.0.1:420$1" \
        "-bootstrap-expect 3 -join 127.0.0.1:4201,127.0.0.1:4202,127.0.0.1:4203"
}
if ! ls -d "$folder"/n[123] >/dev/null 2>&1; then export NEW_NODE=yes; fi # not for one that was lost
for n in 1 2 3; do
    # shellcheck disable=SC2046 # several words
    "$here/node.sh" "$folder/n$n" $(flags $n) >"$folder/n$n.log" 2>&1 &
    pids[n]=$!
done
for n in 1 2 3; do
    for _ in $(seq 300); do
        if curl -fs "http://127.0.0.1:410$n/readyz" >/dev/null; then ready+=$n; continue 2; fi
        kill -0 "${pids[n]}" 2>/dev/null || break
        sleep 0.1
    done
    echo "node n$n does not come up; $folder/n$n.log says why. If its folder was lost, run this while the others go on:" >&2
    echo "  curl -f -X DELETE http://127.0.0.1:410$((n % 3 + 1))/remove -d '{\"id\": \"n$n\"}' &&" \
        "JOIN=127.0.0.1:420$((n % 3 + 1)) RQLITED=$RQLITED $here/node.sh $folder/n$n $(flags $n)" >&2
done
test ${#ready} -ge 2 || exit 1
echo "${#ready} nodes are ready. Start front ends beside them, as many as you want:"
echo "python service.py --database http://127.0.0.1:4101,127.0.0.1:4102,127.0.0.1:4103 --listen 127.0.0.1:8080"
wait
