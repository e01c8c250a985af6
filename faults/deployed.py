"""Starts each set-up of deploy/ for real, with its own files, other ports and other paths."""

import contextlib
import http.client
import os
import pwd
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from common import Server

from test_service import DEADLINE_S, HERE

DEPLOY = HERE / "deploy"
BIN = Path(sys.prefix) / "bin"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def adapted(name: str, folder: Path, *changes: tuple[str, str]) -> Path:
    """A file of deploy/, or of a folder in it, with other ports and paths, in folder. Each change has to apply."""
    text = (DEPLOY / name).read_text()
    for old, new in changes:
        assert old in text, f"{old!r} is not in {name}"
        text = text.replace(old, new)
    file = folder / Path(name).name
    file.write_text(text)
    return file


def temporary_paths(folder: Path) -> str:
    """What lets nginx keep its temporary files in a folder."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return "".join(f"{kind}_temp_path {folder}/nginx-{kind};" for kind in kinds)


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
    changes = [("listen 80;", f"listen 127.0.0.1:{port};"), ("server 127.0.0.1:8080 ", f"server {upstream} ")]
    if prefix:
        changes.append(("location / {", f"location {prefix}/ {{"))
    adapted("nginx.conf", folder, *changes)
    (folder / "nginx-main.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; user root; worker_rlimit_nofile 20000; events {{ worker_connections 8192; }}"
        f" http {{ access_log off; {temporary_paths(folder)} include {folder}/nginx.conf; }}"
    )
    command = ["nginx", "-c", folder / "nginx-main.conf", "-e", folder / "nginx-error"]
    with running(command, folder, port, path=f"{prefix}/healthz"):
        yield "127.0.0.1", port


def settings(path: Path) -> dict[str, str]:
    """The environment of a server that serves a database."""
    return {
        "INLET_DATABASE": str(path),
        "INLET_SCHEMA": str(path.with_name("schema.sql")),
        "PYTHONPATH": f"{HERE}:{DEPLOY}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@contextlib.contextmanager
def apache(path: Path, *changes: tuple[str, str]):
    """Apache with mod_wsgi and deploy/apache.conf, with changes to that file; yields (host, port)."""
    folder, port, user = path.parent, free_port(), pwd.getpwnam("www-data")
    site = sysconfig.get_path("purelib")
    setup = f"import os, sys\nsys.path[:0] = [{str(HERE)!r}, {site!r}]\nos.environ.update({settings(path)!r})\n"
    adapted("inlet.wsgi", folder, ("import os\n", setup))
    file = adapted(
        "apache.conf",
        folder,
        ("python-home=/srv/inlet/.venv python-path=/srv/inlet", "user=www-data group=www-data"),
        ("/srv/inlet/deploy/inlet.wsgi", str(folder / "inlet.wsgi")),
        ("/srv/inlet/deploy", str(folder)),
        *changes,
    )
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    for entry in (folder, *folder.glob("inlet.db*"), folder / "schema.sql"):
        os.chown(entry, user.pw_uid, user.pw_gid)
    modules = "/usr/lib/apache2/modules"
    names = {
        "mpm_event": "mod_mpm_event",
        "authz_core": "mod_authz_core",
        "reqtimeout": "mod_reqtimeout",
        "wsgi": "mod_wsgi",
    }
    load = "\n".join(f"LoadModule {name}_module {modules}/{file}.so" for name, file in names.items())
    (folder / "apache-main.conf").write_text(
        f"ServerRoot {folder}\nServerName localhost\nListen 127.0.0.1:{port}\nPidFile {folder}/apache.pid\nUser www-data\nGroup www-data\n"
        f"ErrorLog {folder}/server-log\n{load}\nWSGISocketPrefix {folder}/wsgi\nInclude {file}\n"
    )
    with running(["apache2", "-f", folder / "apache-main.conf", "-DFOREGROUND"], folder, port):
        yield "127.0.0.1", port


@contextlib.contextmanager
def gunicorn(path: Path):
    port = free_port()
    file = adapted("gunicorn.conf.py", path.parent, ("127.0.0.1:8080", f"127.0.0.1:{port}"))
    with running([BIN / "gunicorn", "-c", file, "service:application"], path.parent, port, settings(path)):
        yield "127.0.0.1", port


@contextlib.contextmanager
def uwsgi(path: Path):
    port = free_port()
    file = adapted("uwsgi.ini", path.parent, ("127.0.0.1:8080", f"127.0.0.1:{port}"))
    with running([BIN / "uwsgi", "--ini", file], path.parent, port, settings(path)):
        yield "127.0.0.1", port


@contextlib.contextmanager
def granian(path: Path):
    port = free_port()
    file = adapted("granian.sh", path.parent, ("--port 8080", f"--port {port}"))
    environ = settings(path) | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    with running(["sh", file], path.parent, port, environ):
        yield "127.0.0.1", port


@contextlib.contextmanager
def alone(path: Path, *flags: str):
    """`python service.py`, which has to end well."""
    server = Server(path.parent, *flags)
    yield "127.0.0.1", server.port
    assert server.end() == 0


@contextlib.contextmanager
def behind_nginx(path: Path):
    with alone(path) as (host, port), nginx(path.parent, f"{host}:{port}") as address:
        yield address


# Each of them serves a database; yields (host, port).
SERVERS = {
    "loop": alone,
    "waitress": lambda path: alone(path, "--server", "waitress"),
    "gunicorn": gunicorn,
    "uwsgi": uwsgi,
    "granian": granian,
    "apache": apache,
    "nginx": behind_nginx,
}
