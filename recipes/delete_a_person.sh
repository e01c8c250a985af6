#!/bin/sh
# Deletes the messages of one person while the service runs, so that no byte of them is left in the database and its WAL.
# flock is that of util-linux (macOS: brew install flock). See "One person's messages" in deploy/README.md.
set -eu
person=Jane-Doe-4711
delete="DELETE FROM readings WHERE sensor = '$person';"
if sqlite3 inlet.db "SELECT 'there is' FROM sqlite_schema WHERE name = 'refused'" | grep -q .; then
    delete="$delete DELETE FROM refused WHERE instr(body, '$person');"
fi
flock inlet.db-lock sqlite3 inlet.db "PRAGMA secure_delete = ON; $delete" >/dev/null
until flock inlet.db-lock sqlite3 inlet.db "PRAGMA wal_checkpoint(TRUNCATE)" | grep -q "^0|"; do
    sleep 1 # a program reads: the old pages stay in the WAL until it has ended
done
