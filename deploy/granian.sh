#!/bin/sh
# granian: an HTTP server in Rust. Settings: INLET_DATABASE … in the environment. Chunked bodies get 411: when one is cut
# short, granian gives what has come to the app as if it were whole.
exec granian --interface wsgi --host 127.0.0.1 --port 8080 --workers 1 --blocking-threads 64 \
    --http 1 --backlog 1024 service:application
