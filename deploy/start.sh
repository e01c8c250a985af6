#!/bin/sh
# What a container runs: migrate, then the service. The kernel drops a SIGTERM to process 1 until that has a handler, so
# this shell stays process 1 and hands it on. So the container ends at once, also while it starts or migrates.
ended=
trap 'ended=yes; kill -TERM "$!" 2>/dev/null' TERM INT
python service.py migrate &
wait "$!" || exit
[ -z "$ended" ] || exit 143
python service.py &
while wait "$!"; status=$?; kill -0 "$!" 2>/dev/null; do :; done # a signal ends only the wait
exit "$status"
