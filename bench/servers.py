"""The servers of the benchmark, the load on them, and what is read from them while they work."""

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
PYTHON = sys.executable
BIN = Path(PYTHON).parent
PORT = 18080
BIND = f"127.0.0.1:{PORT}"
DESCRIPTORS = 4096  # 1,000 connections, and what idles beside them
SHORT = json.dumps({"sensor": "a-17", "value": 21.5, "at": "2026-11-22T10:00:00Z", "tags": ["x", "y"], "note": ""})
MESSAGE = SHORT.replace('""}', '"' + "n" * (450 - len(SHORT)) + '"}')
assert len(MESSAGE) == 450
TABLE = (
    "CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, received_at TEXT NOT NULL, client TEXT NOT NULL,"
    " key TEXT, body TEXT NOT NULL CHECK (json_valid(body)))",
    "CREATE UNIQUE INDEX messages_key ON messages (client, key) WHERE key IS NOT NULL",
)


class Peer:
    """Something that takes messages over HTTP, and how to start it.

    root is the folder of the service.py that it imports. inlet says that it needs a token of that service;
    makes_token, that it writes what belongs into Authorization to the file BENCH_TOKEN. stores says that each 2xx is a
    row of the table messages, in the file that rows_in names; durable, that it is synced before the answer.
    """

    def __init__(
        self,
        name,
        *command,
        path="/messages",
        body=MESSAGE,
        headers=None,
        root=ROOT,
        packages="",
        inlet=False,
        makes_token=False,
        rows_in="DATABASE",
        stores=True,
        durable=True,
    ):
        self.name = name
        self.command = [str(word).replace("BIN", str(BIN)) for word in command]
        self.path = path
        self.body = body
        self.headers = {"Content-Type": "application/json"} | (headers or {})
        self.root = root
        self.packages = packages
        self.inlet = inlet
        self.makes_token = makes_token
        self.rows_in = rows_in
        self.stores = stores
        self.durable = durable and stores

    @contextlib.contextmanager
    def running(self, folder=None, environ=None, wrapper=()):
        """Starts it with an empty database, or with the one in folder; yields the process when it has taken a message."""
        with tempfile.TemporaryDirectory() as temporary:
            database = Path(folder or temporary) / "data.db"
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", PORT)) == 0:
                    raise SystemExit(f"something else answers on port {PORT}: it would be measured instead")
            self.prepare(database)
            self.token = database.with_suffix(".token") if self.makes_token else None
            path = (environ or {}).get("COUNT_PATH", ""), self.packages, self.root, BENCH / "peers"
            environ = os.environ | {
                "BENCH_DATABASE": str(database),
                "BENCH_PORT": str(PORT),
                "BENCH_TOKEN": str(self.token),
                "INLET_DATABASE": str(database),
                "PYTHONPATH": ":".join(map(str, path)),
                "PYTHONDONTWRITEBYTECODE": "1",
            } | {name: value.replace("DATABASE", str(database)) for name, value in (environ or {}).items()}  # fmt: skip
            command = [word.replace("DATABASE", str(database)) for word in self.command]
            started = time.perf_counter()
            with open(Path(temporary) / "log", "w+") as log:
                process = subprocess.Popen(
                    [*wrapper, *command],
                    env=environ,
                    cwd=BENCH / "peers",
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                try:
                    while process.poll() is not None or not self.accepts_a_message():
                        if process.poll() is not None or time.perf_counter() > started + 60:
                            log.seek(0)
                            raise SystemExit(f"{self.name} does not take a message:\n{log.read()[-3000:]}")
                        time.sleep(0.005)
                    process.first_2xx_s = time.perf_counter() - started
                    process.database = database
                    yield process
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGTERM)
                    try:
                        process.wait(20)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()

    def prepare(self, database):
        """Makes the database if it is not there. Inlet's comes from its own first start, which prints a token."""
        token = database.with_suffix(".token")
        if not database.exists() and not self.inlet:
            with contextlib.closing(sqlite3.connect(database)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(";".join(TABLE))
        elif not database.exists():
            command = [PYTHON, f"{self.root}/service.py", "--listen", BIND, "--database", str(database)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first_start:
                curl = next(line for line in first_start.stdout if line.startswith("curl "))
                first_start.terminate()
                first_start.stdout.read()  # or it could not say its last words
            token.write_text(curl.partition("Bearer ")[2].partition('"')[0])
        if self.inlet:
            self.headers["Authorization"] = f"Bearer {token.read_text().strip()}"

    def accepts_a_message(self):
        if self.makes_token:
            if not self.token.exists():
                return False
            self.headers["Authorization"] = self.token.read_text()
        return 200 <= self.request("POST", self.path, self.body)[0] < 300

    def request(self, method, path, body=None):
        """The status and the body of the answer; 0 and nothing if there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request(method, path, body, self.headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        return 0, b""

    @contextlib.contextmanager
    def database_open(self, database):
        """Has a connection to the database open, which only reads."""
        file = Path(self.rows_in.replace("DATABASE", str(database)))
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as db:
            db.execute("SELECT 1 FROM sqlite_schema").fetchone()
            yield db

    def rows(self, database):
        """The number of messages in the database."""
        with self.database_open(database) as db:
            return db.execute("SELECT count(*) FROM messages").fetchone()[0]

    def rows_at_rest(self, database):
        """The number of messages, as soon as no more of them come in."""
        before, rows = None, 0
        while rows != before:
            time.sleep(0.1)
            before, rows = rows, self.rows(database)
        return rows


class Rqlite(Peer):
    """rqlite's own API for SQL: its table is made over HTTP, and its rows are counted there."""

    def __init__(self, name, rqlited):
        command = (
            rqlited,
            "-node-id",
            "1",
            "-http-addr",
            BIND,
            "-raft-addr",
            f"127.0.0.1:{PORT + 1}",
            "DATABASE.rqlite",
        )
        insert = "INSERT INTO messages (received_at, client, body) VALUES (datetime('now'), 'default', ?)"
        super().__init__(name, *command, path="/db/execute", body=json.dumps([[insert, MESSAGE]]))

    def accepts_a_message(self):
        if self.request("GET", "/readyz")[0] != 200:  # it answers 200 to statements before it can do them
            return False
        self.request("POST", "/db/execute", json.dumps(TABLE))
        return super().accepts_a_message()

    def rows(self, database):
        answer = self.request("GET", "/db/query?q=SELECT%20count(*)%20FROM%20messages")[1]
        return json.loads(answer)["results"][0]["values"][0][0]


class WordPress(Peer):
    """A content management system: its rows are posts in MariaDB, which also counts the statements."""

    def __init__(self, name):
        post = json.dumps({"title": "bench", "content": MESSAGE, "status": "publish"})
        super().__init__(
            name, PYTHON, "wordpress.py", path="/index.php?rest_route=/wp/v2/posts", body=post, makes_token=True
        )

    def ask(self, database, statement):
        command = ["mariadb", "--no-defaults", f"--socket={database}.wordpress/mariadb.socket", "-N", "-e", statement]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]

    def rows(self, database):
        return int(self.ask(database, "SELECT count(*) FROM wordpress.wp_posts WHERE post_type = 'post'"))

    def statements(self, database):
        """The number of SQL statements so far, of all connections."""
        return int(self.ask(database, "SHOW GLOBAL STATUS LIKE 'Questions'"))


def inlet(root=ROOT, python=PYTHON, packages="", name="Inlet"):
    command = (python, f"{root}/service.py", "--listen", BIND, "--database", "DATABASE")
    return Peer(name, *command, root=root, packages=packages, inlet=True)


def on_granian(root=ROOT):
    """Inlet as deploy/granian.sh has it."""
    options = ("--interface", "wsgi", "--host", "127.0.0.1", "--port", str(PORT), "--workers", "1")
    options += ("--blocking-threads", "64", "--http", "1", "--backlog", "1024")
    return Peer("Inlet on granian", "BIN/granian", *options, "service:application", root=root, inlet=True)


def on_gunicorn(workers=1, root=ROOT):
    """Inlet in the workers of deploy/gunicorn.conf.py, with a thread for each of 64 connections if there are two."""
    options = ("-b", BIND, "--worker-class", "gthread", "--workers", str(workers), "--threads", "32")
    return Peer("Inlet on gunicorn", "BIN/gunicorn", *options, "service:application", root=root, inlet=True)


def constant(server, app, name=None, root=ROOT):
    """A server (of Inlet, or waitress) that answers a constant; app is wsgi, or falcon for a route in front of it."""
    command = (PYTHON, "constant_app.py", server, app)
    return Peer(name or f"{server}, a constant", *command, root=root, stores=False)


def untuned_falcon(name="Falcon, untuned"):
    return Peer(name, PYTHON, "falcon_app.py")


# Driving


def raise_descriptor_limit():
    """Lets this process and what it starts have 1,000 connections, or ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        raise SystemExit(f"1,000 connections need {DESCRIPTORS:,} open files; `ulimit -Hn` allows {hard:,}")
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))


LUA = """
wrk.method = "%(method)s"
%(headers)s
wrk.body = %(body)s
%(more)s
done = function(summary, latency, requests)
  io.write(string.format('RESULT {"requests": %%d, "duration_us": %%d, "status_errors": %%d, "socket_errors": %%d, '
    .. '"p50_us": %%d, "p99_us": %%d}\\n', summary.requests, summary.duration, summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


def wrk(peer, connections, seconds, method="POST", body=None, path=None, headers=None, more="", port=PORT):
    """One run of wrk; its figures, with the rate in requests a second."""
    body = peer.body if body is None and method == "POST" else body
    lines = [f'wrk.headers["{name}"] = "{value}"' for name, value in (peer.headers | (headers or {})).items()]
    with tempfile.TemporaryDirectory() as folder:
        text = "nil"
        if body is not None:
            (Path(folder) / "body").write_text(body)
            text = f'io.open("{folder}/body"):read("*a")'
        script = Path(folder) / "script.lua"
        script.write_text(LUA % {"method": method, "headers": "\n".join(lines), "body": text, "more": more})
        url = f"http://127.0.0.1:{port}{path or peer.path}"
        duration = f"-d{max(1, round(seconds))}s"
        command = ["wrk", "-t1", f"-c{connections}", duration, "--timeout", "20s", "-s", str(script), url]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT"))[7:])
    figures["rate"] = figures["requests"] / figures["duration_us"] * 1e6
    return figures


def tree(process):
    """A process and all that it has started."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def cpu_s(process):
    return sum(sum(member.cpu_times()[:2]) for member in tree(process))


def rss_mb(process):
    return sum(member.memory_info().rss for member in tree(process)) / 1e6


def median(values):
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def send_one_by_one(peer, count):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
    for _ in range(count):
        connection.request("POST", peer.path, peer.body, peer.headers)
        answer = connection.getresponse()
        answer.read()
        assert 200 <= answer.status < 300, answer.status
    connection.close()


def system_calls(process, peer, count):
    """System calls, opened files and fsyncs of one message, from strace -c."""
    with tempfile.TemporaryDirectory() as folder:
        tracers = []
        for n, member in enumerate(tree(process)):
            command = ["strace", "-f", "-c", "-U", "name,calls", "-o", f"{folder}/{n}", "-p", str(member.pid)]
            tracers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        wait_until_traced(process)
        send_one_by_one(peer, count)
        wait_until_traced(process)  # a thread that came later is traced too
        for tracer in tracers:
            tracer.send_signal(signal.SIGINT)
            tracer.wait()
        calls = {}
        for file in Path(folder).iterdir():
            for line in file.read_text().splitlines():
                words = line.split()
                if len(words) == 2 and words[1].isdigit() and words[0] != "total":
                    calls[words[0]] = calls.get(words[0], 0) + int(words[1])
    return {
        "system_calls": sum(calls.values()) / count,
        "opened_files": sum(calls.get(name, 0) for name in ("open", "openat", "creat")) / count,
        "fsyncs": sum(calls.get(name, 0) for name in ("fsync", "fdatasync")) / count,
        "system_calls_by_name": {name: calls[name] / count for name in sorted(calls, key=calls.get, reverse=True)[:12]},
    }


def wait_until_traced(process):
    """Returns when strace is attached to every thread of the server: else its counts would be too low."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        files = [file for member in tree(process) for file in Path(f"/proc/{member.pid}/task").glob("*/status")]
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread ended meanwhile
            if not any("TracerPid:\t0\n" in file.read_text() for file in files):
                return
        time.sleep(0.01)
    raise SystemExit("strace does not attach to every thread of the server")


# Showing


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(figure, form="{:,.0f}"):
    return f"{form.format(figure['median'])} ({form.format(figure['min'])}–{form.format(figure['max'])})"
