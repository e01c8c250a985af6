#!/bin/sh
# Appends each message of a stream to a file of one message a line, for ever: sh follow.sh readings
# The file is its own checkpoint: stop it at any moment, and start it again. BASE is the address of the service, and
# TOKEN may read. The bodies stay as they were sent: look into them with jq.
set -eu
file="$1.ndjson"
touch "$file"
# A crash can spoil the last line. It is asked for again.
if [ -n "$(tail -c 1 "$file")" ] || ! tail -n 1 "$file" | grep -q '^{"id": [0-9]*, .*}$'; then
    sed '$d' "$file" > "$file.new"
    mv "$file.new" "$file"
fi
while true; do
    after=$(tail -n 1 "$file" | sed 's/^{"id": \([0-9]*\), .*/\1/')
    # Not curl's --retry: it would put a page behind the half of one.
    if page=$(curl -fsS --max-time 90 -H "Authorization: Bearer $TOKEN" -H "Accept: application/x-ndjson" \
        "$BASE/$1?limit=1000&wait=30&after=${after:-0}") && [ -n "$page" ]; then
        printf '%s\n' "$page" >> "$file"
    else
        sleep 1
    fi
done
