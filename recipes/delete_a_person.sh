#!/bin/sh
# Deletes the messages of one person while the service runs, so that no byte of them is left in the database and its WAL.
# flock is that of util-linux (macOS: brew install flock). See "One person's messages" in deploy/README.md.
set -eu
flock inlet.db-lock sqlite3 inlet.db "PRAGMA secure_delete = ON;
    DELETE FROM readings WHERE sensor = 'Jane-Doe-4711';
    DELETE FROM refused WHERE instr(body, 'Jane-Doe-4711');
    PRAGMA wal_checkpoint(TRUNCATE);"
