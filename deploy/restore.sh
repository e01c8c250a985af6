#!/bin/sh
# Puts a backup in the place of a database whose service is stopped. What was there goes into a folder beside it.
#   sh restore.sh COPY DATABASE       with - as COPY, it is read from stdin
set -eu
umask 077
new="$2.restored" before="$2.before-$(date -u +%Y%m%dT%H%M%S)"
if [ -e "$2" ]; then cp -p "$2" "$new"; fi # for its owner and mode
trap 'rm -f "$new"' EXIT
cat -- "$1" >"$new"
python3 -c 'import sqlite3, sys
sqlite3.connect(f"file:{sys.argv[1]}?immutable=1", uri=True).execute("SELECT count(*) FROM clients")' "$new" ||
    { echo "$1 is no backup of Inlet, or was cut off; nothing was changed" >&2; exit 1; }
mkdir "$before"
for file in "$2" "$2-wal" "$2-shm" "$2-lock"; do
    if [ -e "$file" ]; then mv "$file" "$before"; fi
done
mv "$new" "$2"
sync
echo "$2 is the backup now; what was there is in $before"
