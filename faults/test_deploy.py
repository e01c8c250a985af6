"""Every set-up of deploy/, started for real, fulfils the same contract."""

import configparser
import contextlib
import http.client
import json
import os
import pwd
import re
import shutil
import socket
import sqlite3
import subprocess
import sysconfig
import threading
import time
from pathlib import Path

import pytest
from common import SCHEMA, Server, database, sql, wait_until
from deployed import BIN, DEPLOY, adapted, apache, free_port, granian, nginx, running, settings, uwsgi

import service
from test_service import AUTHORIZATION, DEADLINE_S, HERE, recipe, run, send

SETTINGS = {service.variable(name) for name in (*service.SETTINGS, "token", "token-file")}  # in the environment


def contract(address, path, prefix="", processes=1, log=None, keep_alive=True):
    """What a client may count on, whatever stands between it and the service."""

    def ask(method, route, body=None, connection=None, **headers):
        own = connection or http.client.HTTPConnection(*address, timeout=DEADLINE_S)
        try:
            return send(own, method, prefix + route, body, **headers)
        finally:
            if not connection:
                own.close()

    assert ask("GET", "/healthz")[0] == 200
    assert ask("GET", "/messages", Authorization="Bearer wrong")[0] == 401

    status, headers, data = ask("POST", "/messages", b'{"b":1.10,  "a":2}', Idempotency_Key="k")
    assert (status, headers["Location"], json.loads(data)["id"]) == (201, f"{prefix}/messages/1", 1)
    again = ask("POST", "/messages", b'{"b":1.10,  "a":2}', Idempotency_Key="k")
    assert (again[0], again[1]["Idempotent-Replayed"], again[2]) == (201, "true", data)
    assert ask("POST", "/messages", b"{}", Idempotency_Key="k")[0] == 422
    status, headers, data = ask("POST", "/messages", b'{"bad": 1}')
    assert (status, headers["Content-Type"], json.loads(data)["detail"]) == (
        422,
        "application/problem+json",
        "it is bad",
    )
    assert ask("POST", "/messages", b'{"a": nul}')[0] == 400
    assert ask("POST", "/messages", b"x", Content_Type="text/plain")[0] == 415
    assert ask("POST", "/messages", b"1\n2\n", Content_Type="application/x-ndjson")[0] == 201

    status, headers, data = ask("GET", "/messages?limit=1")
    assert b'"body": {"b":1.10,  "a":2}}' in data
    assert json.loads(data)["next"] == f"{prefix}/messages?after=1&limit=1"
    assert headers["Link"] == f'<{prefix}/messages?after=1&limit=1>; rel="next"'
    assert json.loads(ask("GET", "/")[2])["streams"]["messages"]["href"] == f"{prefix}/messages"

    large = json.dumps("x" * (service.parser().parse_args([]).max_body - 2)).encode()
    status, headers, data = ask("POST", "/messages", large)
    assert status == 201
    route = headers["Location"].removeprefix(prefix)
    assert ask("GET", route)[2].endswith(b'"body": ' + large + b"}")
    status, headers, data = ask("POST", "/messages", large + b" ")
    assert (status, json.loads(data)["limit"]) == (413, len(large))
    status, headers, data = ask("POST", "/messages", large * 5)
    assert (status, headers["Content-Type"], json.loads(data)["status"]) == (413, "application/problem+json", 413)

    answers, errors = [], []

    def produce(number):
        try:
            connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S) if keep_alive else None
            for n in range(30):
                status, _, data = ask(
                    "POST",
                    "/messages",
                    f'"{number // 2}-{n}"'.encode(),
                    connection,
                    Idempotency_Key=f"{number // 2}-{n}",
                )
                answers.append((status, number // 2, n, json.loads(data).get("id")))
        except Exception as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=produce, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert {status for status, *_ in answers} == {201}
    assert len({(number, n, message_id) for _, number, n, message_id in answers}) == 8 * 30
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*), count(DISTINCT id) FROM messages").fetchone() == (4 + 240, 4 + 240)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    deadline = time.monotonic() + DEADLINE_S
    while len(processes_with(path)) < processes:  # which process takes a connection is the server's choice
        assert time.monotonic() < deadline, "not all processes have taken a request"
        many = [http.client.HTTPConnection(*address, timeout=DEADLINE_S) for _ in range(30)]
        for connection in many:
            connection.request("GET", f"{prefix}/healthz")
        assert {connection.getresponse().status for connection in many} == {200}

    assert run(path.parent, "client", "remove", "tester").returncode == 0
    time.sleep(1.5)
    assert {ask("GET", "/messages")[0] for _ in range(40)} == {401}
    if log:
        assert "locked" not in log.read_text()
        assert "Traceback" not in log.read_text()


def processes_with(path):
    """The processes that have a file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(path):
                found.add(link.parts[2])
    return found - {str(os.getpid())}


def test_python_service_py(tmp_path):
    path = database(tmp_path)
    server = Server(tmp_path)
    contract(server.address.split(":"), path, log=tmp_path / "log")
    assert server.end() == 0


@pytest.mark.parametrize("upstream", ["tcp", "unix", "prefix"])
def test_nginx_in_front(upstream, tmp_path):
    path = database(tmp_path)
    listen = ("--listen", f"unix:{tmp_path}/socket") if upstream == "unix" else ()
    prefix = "/ingest" if upstream == "prefix" else ""
    server = Server(tmp_path, *listen, *(("--prefix", prefix) if prefix else ()))
    with nginx(tmp_path, f"unix:{tmp_path}/socket" if upstream == "unix" else server.address, prefix) as address:
        contract(address, path, prefix, log=tmp_path / "log")
        with socket.create_connection(address) as sock:  # a health check of the old kind, without a Host
            sock.sendall(f"GET {prefix}/livez HTTP/1.0\r\n\r\n".encode())
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert server.end() == 0


def test_nginx_waits_longer_than_a_read_and_reads_that_are_late_do_not_stop_the_writers():
    conf = (DEPLOY / "nginx.conf").read_text()
    assert int(re.search(r"proxy_read_timeout (\d+)s;", conf)[1]) > service.LONGEST_WAIT_S + service.READ_TIMEOUT_S
    assert "max_fails=0;" in conf


def test_behind_nginx_the_log_and_source_ip_have_the_address_of_the_client_whatever_it_claims(tmp_path):
    """The recipe for GitHub, and the line of a 401."""
    database(tmp_path, SCHEMA + recipe("github.sql").partition("CREATE VIEW pushes")[0])
    server = Server(tmp_path)
    claim = {"X-Forwarded-For": "203.0.113.66, 203.0.113.67", "Content-Type": "application/json"}

    def ask(address, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S, source_address=("127.0.0.9", 0))
        with contextlib.closing(connection):
            connection.request(method, path, body, claim | headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    with nginx(tmp_path, server.address) as address:
        assert ask(address, "GET", "/messages", Authorization="Bearer wrong")[0] == 401
        assert ask(address, "POST", "/deliveries", "1", **AUTHORIZATION)[0] == 201
        assert ask(address, "POST", "/deliveries", "no", **AUTHORIZATION, **{"Idempotency-Key": "k"})[0] == 400
        for by, count in (("127.0.0.9", 1), ("203.0.113.66", 0)):
            assert len(ask(address, "GET", f"/deliveries?source_ip={by}", **AUTHORIZATION)[1]["messages"]) == count
        (message,) = ask(address, "GET", "/deliveries", **AUTHORIZATION)[1]["messages"]
        assert message["headers"]["x-forwarded-for"] == "127.0.0.9"
    assert server.end() == 0
    refused, malformed = (line for line in server.log.splitlines() if re.search(" 40[01] to ", line))
    assert refused.endswith("(from 127.0.0.1, X-Forwarded-For claims '127.0.0.9')")
    assert "401 to '' at '/messages'" in refused
    assert malformed.endswith("(from 127.0.0.1, X-Forwarded-For claims '127.0.0.9', key 'k')")
    assert "203.0.113" not in server.log


@pytest.mark.parametrize("preload", ["False", "True"])
def test_gunicorn(preload, tmp_path):
    path, port = database(tmp_path), free_port()
    changes = ("127.0.0.1:8080", f"127.0.0.1:{port}"), ("preload_app = False", f"preload_app = {preload}")
    file = adapted("gunicorn.conf.py", tmp_path, *changes)
    with running([BIN / "gunicorn", "-c", file, "service:application"], tmp_path, port, settings(path)):
        contract(("127.0.0.1", port), path, processes=2, log=tmp_path / "server-log")


def test_gunicorn_under_a_path(tmp_path):
    path, port = database(tmp_path), free_port()
    file = adapted("gunicorn.conf.py", tmp_path, ("127.0.0.1:8080", f"127.0.0.1:{port}"))
    environ = settings(path) | {"SCRIPT_NAME": "/ingest"}
    with running([BIN / "gunicorn", "-c", file, "service:application"], tmp_path, port, environ, "/ingest/healthz"):
        contract(("127.0.0.1", port), path, "/ingest", processes=2)


def test_uwsgi(tmp_path):
    path = database(tmp_path)
    with uwsgi(path) as address:
        # Its http-socket closes a connection after each answer, without a word.
        contract(address, path, processes=2, log=tmp_path / "server-log", keep_alive=False)


def test_uwsgi_without_threads_says_so(tmp_path):
    path, port = database(tmp_path), free_port()
    changes = ("127.0.0.1:8080", f"127.0.0.1:{port}"), ("enable-threads = true", ""), ("threads = 16", "")
    file = adapted("uwsgi.ini", tmp_path, *changes)
    with running([BIN / "uwsgi", "--ini", file], tmp_path, port, settings(path)):
        status, headers, _ = send(http.client.HTTPConnection("127.0.0.1", port), "GET", "/healthz")
        assert (status, headers["Content-Type"]) == (503, "application/problem+json")
        assert "enable-threads" in (tmp_path / "server-log").read_text()


def test_granian(tmp_path):
    path = database(tmp_path)
    with granian(path) as address:
        contract(address, path, log=tmp_path / "server-log")


def test_apache_with_mod_wsgi(tmp_path):
    path = database(tmp_path)
    with apache(path) as address:
        contract(address, path, processes=2, log=tmp_path / "server-log")


def test_apache_that_keeps_the_authorization_to_itself_says_so(tmp_path):
    path = database(tmp_path)
    with apache(path, ("WSGIPassAuthorization On", "WSGIPassAuthorization Off")) as address:
        status, _, data = send(http.client.HTTPConnection(*address), "GET", "/messages")
        assert status == 401
        assert "WSGIPassAuthorization On" in json.loads(data)["detail"]


@pytest.mark.parametrize("site", ["mounted_flask:app", "mounted_django:application"])
def test_mounted_under_a_site_that_is_there(site, tmp_path):
    path, port = database(tmp_path), free_port()
    command = [BIN / "gunicorn", "-b", f"127.0.0.1:{port}", "--threads", "16", site]
    with running(command, tmp_path, port, settings(path), "/"):
        assert send(http.client.HTTPConnection("127.0.0.1", port), "GET", "/")[2] == b"the site"
        contract(("127.0.0.1", port), path, "/ingest", log=tmp_path / "server-log")


def test_the_systemd_unit(tmp_path):
    """systemd itself checks the unit; then its command runs as an unprivileged user with its environment."""
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", DEPLOY / "inlet.service"], capture_output=True, text=True
    )
    complaints = [
        line for line in checked.stderr.splitlines() if "inlet.service" in line and "not executable" not in line
    ]
    assert not complaints, complaints
    exposure = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=30", DEPLOY / "inlet.service"],
        capture_output=True,
        text=True,
    )
    assert exposure.returncode == 0, exposure.stdout[-500:] + exposure.stderr
    unit = (DEPLOY / "inlet.service").read_text()
    # After a full disk, or what else keeps it down for long, it starts by itself: systemd stops after five starts in 10 s.
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.read_string(unit)
    assert (parsed["Unit"]["StartLimitIntervalSec"], parsed["Service"]["Restart"]) == ("0", "always")
    environ = dict(
        line.removeprefix("Environment=").split("=", 1) for line in unit.splitlines() if line.startswith("Environment=")
    )
    start = next(line.removeprefix("ExecStart=").split() for line in unit.splitlines() if line.startswith("ExecStart="))
    assert set(environ) <= SETTINGS
    path, port = database(tmp_path), free_port()
    user = pwd.getpwnam("nobody")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    for entry in (tmp_path, *tmp_path.glob("inlet.db*")):
        os.chown(entry, user.pw_uid, user.pw_gid)
    copy = tmp_path / "srv"
    copy.mkdir()
    shutil.copy(HERE / "service.py", copy)
    shutil.copytree(HERE / "extras", copy / "extras", ignore=shutil.ignore_patterns("*test*", "__pycache__"))
    assert [Path(word).name for word in start] == ["python", "service.py"]
    environ |= {
        "INLET_DATABASE": str(path),
        "INLET_LISTEN": f"127.0.0.1:{port}",
        "INLET_SCHEMA": str(tmp_path / "schema.sql"),
    }
    environ["PYTHONPATH"] = sysconfig.get_path("purelib")
    command = [
        "setpriv",
        "--reuid=nobody",
        "--regid=nogroup",
        "--clear-groups",
        "--no-new-privs",
        "/usr/bin/python3",
        copy / "service.py",
    ]
    with running(command, tmp_path, port, environ) as process:
        contract(("127.0.0.1", port), path, log=tmp_path / "server-log")
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


def test_litestream_copies_while_messages_come_in(tmp_path):
    """The real program, built from its source; what it copied is restored and has every message."""
    litestream = os.environ["INLET_LITESTREAM"]
    version = subprocess.run([litestream, "version"], check=True, capture_output=True, text=True).stdout
    assert tuple(map(int, version.strip().removeprefix("v").split("."))) > (0, 5, 16)  # as litestream.yml says
    path, log = database(tmp_path), tmp_path / "litestream-log"
    file = adapted(
        "litestream.yml",
        tmp_path,
        ("/var/lib/inlet/inlet.db", str(path)),
        ("/mnt/elsewhere/inlet", str(tmp_path / "replica")),
    )
    server = Server(tmp_path)
    with open(log, "w") as output:
        process = subprocess.Popen([litestream, "replicate", "-config", file], stdout=output, stderr=output)
    restored = tmp_path / "restored.db"

    def restore():
        restored.unlink(missing_ok=True)
        done = subprocess.run([litestream, "restore", "-config", file, "-o", restored, path], capture_output=True)
        return done.returncode == 0 and sql(restored, "SELECT count(*) FROM messages")[0][0]

    try:
        with contextlib.closing(server.connect()) as connection:
            for n in range(300):
                assert send(connection, "POST", "/messages", json.dumps(f"{n} {'x' * 10_000}"))[0] == 201
        wait_until(lambda: restore() == 300, "what was copied lacks messages")  # while it runs
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
    assert server.end() == 0
    assert restore() == 300
    assert sql(restored, "PRAGMA integrity_check") == [("ok",)]
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
    assert " level=ERROR " not in log.read_text()
    assert run(tmp_path, "client", "list").returncode == 0  # its tables are no difference to the schema


def test_the_set_ups_name_nothing_that_is_not_there():
    """Litestream's and the others' paths and settings are those of the service."""
    for file in DEPLOY.iterdir():
        if file.is_file():
            for word in file.read_text().replace("=", " ").split():
                if word.startswith("INLET_"):
                    assert word.rstrip("\"',:)") in SETTINGS, (file, word)
    assert "inlet.db" in (DEPLOY / "litestream.yml").read_text()
