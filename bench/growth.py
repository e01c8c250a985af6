"""What batches and pages cost, and the cost as work grows: rows, bodies, connections that idle, processes."""

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

from servers import MESSAGE, PORT, PYTHON, ROOT, inlet, median, say, spread, table, wrk

INSERT = "INSERT INTO messages (received_at, client, key, body) VALUES (?, ?, ?, ?)"
VALUES = ("2026-11-22T10:00:00.123Z", "bench", None, MESSAGE)
PAGE = "SELECT id, received_at, client, key, body FROM messages WHERE id > 0 ORDER BY id LIMIT 1000"
BATCHES = (1, 10, 100, 1000, 10_000)
PROCESSES = (1, 2, 4)


def measure(options):
    """{"batches": …, "database": …, "load": …}, each {title: figure}"""
    rows = 100_000 if options.quick else 10_000_000
    return {
        "rows": rows,
        "batches": batches_and_pages(options),
        "database": large_database(options, rows),
        "load": bodies_idle_connections_and_processes(options),
    }


def in_process(batch):
    return f"executemany, {batch:,} rows a COMMIT"


def over_http(batch):
    return f"Inlet, {batch:,} message{'s' * (batch > 1)} a request, 4 connections"


def batches_and_pages(options):
    """Rows a second that the sqlite3 module takes alone, and what is left of them over HTTP."""
    samples = {}

    def add(title, value):
        samples.setdefault(title, []).append(value)
        say(f"{title}: {value:,.0f}/s")

    peer = inlet()
    peer.command += ["--max-body", "10000000"]  # bytes: 10,000 messages have 4.5 MB
    for _ in range(options.rounds):
        for batch in BATCHES:
            with tempfile.TemporaryDirectory() as folder:
                database = Path(folder) / "data.db"
                peer.prepare(database)
                with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
                    db.execute("PRAGMA synchronous = FULL")

                    def write(db=db, batch=batch):
                        db.execute("BEGIN IMMEDIATE")
                        db.executemany(INSERT, (VALUES for _ in range(batch)))
                        db.execute("COMMIT")

                    add(in_process(batch), per_second(write, batch, options))
                    if batch == 1000:
                        add(
                            "fetchall of 1,000 rows",
                            per_second(lambda db=db: db.execute(PAGE).fetchall(), 1000, options),
                        )
                with peer.running(folder):
                    headers = {"Content-Type": "application/x-ndjson"} if batch > 1 else {}
                    figures = wrk(peer, 4, options.seconds, body="\n".join([MESSAGE] * batch), headers=headers)
                    add(over_http(batch), figures["rate"] * batch)
                    if batch == 1000:
                        path, accept = "/messages?after=0&limit=1000", {"Accept": "application/x-ndjson"}
                        page = wrk(peer, 4, options.seconds, "GET", path=path, headers=accept)
                        add("Inlet, feed in pages of 1,000, 4 connections", page["rate"] * 1000)
                        figures["status_errors"] += page["status_errors"]
                    assert not figures["status_errors"]
    return {title: median(values) for title, values in samples.items()}


def per_second(action, rows, options):
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < options.seconds:
        action()
        count += rows
    return count / passed


def large_database(options, rows):
    """Inserts into an empty database and into one with that many rows, and pages of its feed."""
    peer = inlet()
    samples = {}
    with tempfile.TemporaryDirectory() as folder:
        say(f"filling a database with {rows:,} messages")
        large, small = Path(folder) / "large", Path(folder) / "small"
        for place in (large, small):
            place.mkdir()
            peer.prepare(place / "data.db")
        fill(large / "data.db", rows)
        for _ in range(options.rounds):
            for name, place in (("small", small), ("large", large)):
                with peer.running(place):
                    wrk(peer, 64, options.seconds / 3)
                    samples.setdefault(f"insert, {name}", []).append(wrk(peer, 64, options.seconds)["rate"])
                    if name == "large":
                        for where, after in (("start", 0), ("end", rows - 2000)):
                            path = f"/messages?after={after}&limit=1000"
                            rate = wrk(peer, 4, options.seconds, "GET", path=path)["rate"]
                            samples.setdefault(f"page at the {where}", []).append(rate)
    return {title: median(values) for title, values in samples.items()}


def fill(database, rows):
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        for start in range(0, rows, 100_000):
            db.execute(
                "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?)"
                " INSERT INTO messages (received_at, client, body)"
                " SELECT '2026-11-22T10:00:00.123Z', 'bench', ? FROM n",
                (min(100_000, rows), MESSAGE),
            )
            if start % 1_000_000 == 0:
                say(f"{start:,}")


def bodies_idle_connections_and_processes(options):
    peer = inlet()
    samples = {}

    def add(title, **more):
        figures = wrk(peer, 64, options.seconds, **more)
        assert not figures["status_errors"]
        samples.setdefault(title, []).append(figures["rate"])
        say(f"{title}: {figures['rate']:,.0f}/s")

    for _ in range(options.rounds):
        for kib in (1, 16, 256):
            with peer.running():
                add(f"bodies of {kib} KiB", body=json.dumps("x" * (kib * 1024 - 2)))
        with peer.running():
            wrk(peer, 64, options.seconds / 3)
            add("64 busy")
            with idle_connections(1000, PORT):
                add("64 busy, 1,000 idle")
            add("64 busy")
        for processes in PROCESSES:
            with several(peer, processes) as ports, nginx(ports) as port:
                wrk(peer, 64, options.seconds / 3, port=port)
                add(f"behind nginx, {processes} process{'es' * (processes > 1)}", port=port)
                if processes == 1:
                    with idle_connections(1000, port):
                        add("behind nginx, 1 process, 1,000 idle", port=port)
    return {title: median(values) for title, values in samples.items()}


@contextlib.contextmanager
def idle_connections(count, port):
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    time.sleep(1)
    yield
    for sock in sockets:
        sock.close()


@contextlib.contextmanager
def several(peer, count):
    """That many processes on one database; yields their ports."""
    with peer.running() as process, contextlib.ExitStack() as stack:
        ports = [PORT, *range(PORT + 2, PORT + 1 + count)]
        for port in ports[1:]:
            words = ("--listen", f"127.0.0.1:{port}", "--database", str(process.database))
            command = [PYTHON, f"{ROOT}/service.py", *words]
            more = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            stack.callback(more.wait)
            stack.callback(more.terminate)
            assert "listening" in more.stdout.readline()
        yield ports


@contextlib.contextmanager
def nginx(ports, port=PORT + 1):
    servers = " ".join(f"server 127.0.0.1:{port};" for port in ports)
    with tempfile.TemporaryDirectory() as folder:
        configuration = f"""
            worker_processes 1; pid {folder}/pid; error_log {folder}/error; daemon off;
            events {{ worker_connections 4096; }}
            http {{ access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
              fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
              upstream inlet {{ {servers} keepalive 64; }}
              server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://inlet; proxy_http_version 1.1;
                proxy_set_header Connection ""; }} }} }}"""
        (Path(folder) / "conf").write_text(configuration)
        process = subprocess.Popen(["nginx", "-c", f"{folder}/conf", "-e", f"{folder}/error"])
        while not os.path.exists(f"{folder}/pid"):
            time.sleep(0.01)
        yield port
        process.terminate()
        process.wait()


def markdown(found):
    batches = [[title, spread(figure)] for title, figure in found["batches"].items()]
    rows = [[title, spread(figure)] for title, figure in (found["database"] | found["load"]).items()]
    return "\n\n".join(
        [
            table(["rows/s", "median (min–max)"], batches),
            table([f"requests/s (large: {found['rows']:,} messages)", "median (min–max)"], rows),
        ]
    )


def targets(found):
    figures = found["batches"] | found["database"] | found["load"]

    def ratio(one, other):
        return figures[one]["median"] / figures[other]["median"]

    for batch in BATCHES:
        yield f"batches of {batch:,}: Inlet / executemany", 0.65, ratio(over_http(batch), in_process(batch))
    yield "1,000 idle connections / none", 0.85, ratio("64 busy, 1,000 idle", "64 busy")
    yield f"inserts at {found['rows']:,} rows / at none", 0.9, ratio("insert, large", "insert, small")
    yield "a page at the end / at the start of the feed", 0.9, ratio("page at the end", "page at the start")
