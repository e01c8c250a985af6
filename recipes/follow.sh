#!/bin/sh
# Appends what is new in a stream to a file of one message a line, which is its own checkpoint: sh follow.sh readings
# BASE is the address of the service, and TOKEN may read. jq reads only the id: the bodies stay as they were sent.
touch "$1.ndjson"
while page=$(curl -fsS --retry 9 -H "Authorization: Bearer $TOKEN" -H "Accept: application/x-ndjson" \
    "$BASE/$1?limit=1000&after=$(tail -n 1 "$1.ndjson" | jq -s '.[0].id // 0')") && [ -n "$page" ]
do printf '%s\n' "$page" >> "$1.ndjson"; done
