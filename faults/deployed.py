"""Starts each set-up of deploy/ for real, with its own files, other ports and other paths."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from test_service import DEADLINE_S, HERE

DEPLOY = HERE / "deploy"
BIN = Path(sys.prefix) / "bin"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def adapted(name: str, folder: Path, *changes: tuple[str, str]) -> Path:
    """A file of deploy/ with other ports and paths, in folder. Each change has to apply."""
    text = (DEPLOY / name).read_text()
    for old, new in changes:
        assert old in text, f"{old!r} is not in {name}"
        text = text.replace(old, new)
    (folder / name).write_text(text)
    return folder / name


@contextlib.contextmanager
def running(command, folder: Path, port: int, environ=None, path="/healthz"):
    """A server that has to answer on a port; everything that it prints goes to the file `server-log`."""
    with open(folder / "server-log", "a") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | (environ or {}),
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not answers(port, path):
            assert time.monotonic() < deadline, (folder / "server-log").read_text()[-3000:]
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            raise


def answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status not in (502, 504)  # what a proxy says alone
    return False


@contextlib.contextmanager
def nginx(folder: Path, upstream: str, prefix: str = ""):
    """nginx with deploy/nginx.conf in front of an address; yields (host, port)."""
    port = free_port()
    changes = [("listen 80;", f"listen 127.0.0.1:{port};"), ("server 127.0.0.1:8080;", f"server {upstream};")]
    if prefix:
        changes.append(("location / {", f"location {prefix}/ {{"))
    adapted("nginx.conf", folder, *changes)
    temporary = "".join(
        f"{kind}_temp_path {folder}/nginx-{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx-main.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; user root; worker_rlimit_nofile 20000; events {{ worker_connections 8192; }}"
        f" http {{ access_log off; {temporary} include {folder}/nginx.conf; }}"
    )
    command = ["nginx", "-c", folder / "nginx-main.conf", "-e", folder / "nginx-error"]
    with running(command, folder, port, path=f"{prefix}/healthz"):
        yield "127.0.0.1", port
