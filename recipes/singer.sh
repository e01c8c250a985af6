#!/bin/sh
# One run of Singer: what is new in `readings` goes to data/readings.jsonl, and how far it came to state.json.
# pip install tap-rest-api-msdk==1.4.2 and target-jsonl==0.1.4 in two virtual environments, whose folders TAP and TARGET are.
# A pipe from one to the other would keep rows of a tap that has failed, but not its state: they would come twice.
set -eu
sed "s|\"BASE\"|\"$BASE\"|; s|\"TOKEN\"|\"$TOKEN\"|" "$(dirname "$0")/singer_tap.json" > tap.json
echo '{"destination_path": "data", "do_timestamp_file": false}' > target.json
[ -s state.json ] || echo '{}' > state.json
mkdir -p data
"$TAP/bin/tap-rest-api-msdk" --config tap.json --state state.json > run.singer
"$TARGET/bin/target-jsonl" --config target.json < run.singer > state.new
[ ! -s state.new ] || tail -n 1 state.new > state.json
