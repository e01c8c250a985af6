#!/bin/sh
# Appends what is new in a stream to a file of one message a line, which is its own checkpoint: sh follow.sh readings
# BASE is the address of the service, and TOKEN may read. jq reads only the id: the bodies stay as they were sent.
set -eu
touch "$1.ndjson"
tail -n 1 "$1.ndjson" | jq -e .id > /dev/null 2>&1 || sed -i '$d' "$1.ndjson" # a line that a crash has cut
page=more
while [ -n "$page" ]; do
    page=$(curl -fsS --retry 9 -H "Authorization: Bearer $TOKEN" -H "Accept: application/x-ndjson" \
        "$BASE/$1?limit=1000&after=$(tail -n 1 "$1.ndjson" | jq -s '.[0].id // 0')")
    [ -z "$page" ] || printf '%s\n' "$page" >> "$1.ndjson"
done
