#!/bin/sh
# What a container runs: migrate, then the service. The kernel ignores SIGTERM for process 1 while that has no handler, and
# Python has none during its start. So this shell is process 1, and passes the signal on.
ended=
trap 'ended=yes; kill -TERM "$!" 2>/dev/null' TERM INT
python service.py migrate &
wait "$!" || true # the service starts if its schema is that of the database: on a full disk, messages can be read
[ -z "$ended" ] || exit 143
python service.py &
while wait "$!"; status=$?; kill -0 "$!" 2>/dev/null; do :; done # a signal ends only the wait
exit "$status"
