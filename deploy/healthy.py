"""The health check of a container: exits with 0 if GET /healthz of the service at INLET_LISTEN says 200."""

import http.client
import os
import socket

where = os.environ.get("INLET_LISTEN", "127.0.0.1:8080")
connection = http.client.HTTPConnection("localhost")
if where.startswith("unix:"):
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(3)
    connection.sock.connect(where.removeprefix("unix:"))
else:
    host, _, port = where.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))
    connection.sock = socket.create_connection((host, int(port)), timeout=3)
connection.request("GET", "/healthz")
raise SystemExit(connection.getresponse().status != 200)
