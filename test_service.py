"""The tests of service.py, in its order. Real SQLite, real files, real processes; only the clock is ever faked."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import gc
import gzip
import http.client
import http.server
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import tomllib
import tracemalloc
import types
import zlib
from datetime import datetime
from pathlib import Path

import falcon.testing
import pytest

import service

HERE = Path(service.__file__).parent
DEADLINE_S = 20

MESSAGE_COLUMNS = """
    id INTEGER PRIMARY KEY AUTOINCREMENT, received_at TEXT NOT NULL, client TEXT NOT NULL, key TEXT,
    body TEXT NOT NULL CHECK (json_valid(body))"""


def stream_sql(name: str, more: str = "") -> str:
    """A stream with its index; more is put behind the message columns."""
    return (
        f"CREATE TABLE IF NOT EXISTS {name} ({MESSAGE_COLUMNS}{more}) STRICT;\n"
        f"CREATE UNIQUE INDEX IF NOT EXISTS {name}_key ON {name} (client, key) WHERE key IS NOT NULL;\n"
    )


NOBODY_CHECKS = stream_sql("messages").replace(
    " CHECK (json_valid(body))", ", note TEXT DEFAULT 'check ( json_valid ( body ) )'"
)

# Every kind of rule that can refuse a message, beside a stream that takes everything.
READINGS = """,
    sensor TEXT NOT NULL AS (body ->> 'sensor') REFERENCES sensors (name),
    value REAL NOT NULL AS (body ->> 'value')
        CONSTRAINT "value must be between -90 and 60" CHECK (value BETWEEN -90 AND 60),
    lot TEXT AS (body ->> 'lot') UNIQUE,
    batch TEXT AS (body ->> 'batch'),
    size INTEGER AS (abs(body ->> 'size')),
    note TEXT AS (body ->> 'note') CHECK (length(note) < 10)"""
SCHEMA = f"""{stream_sql("messages")}
CREATE TABLE IF NOT EXISTS sensors (name TEXT PRIMARY KEY) STRICT;
INSERT OR IGNORE INTO sensors VALUES ('a-17'), ('b-4');
{stream_sql("readings", READINGS)}
CREATE UNIQUE INDEX "one reading for each batch" ON readings (batch);
CREATE TRIGGER no_mondays BEFORE INSERT ON readings WHEN NEW.note = 'monday'
BEGIN SELECT RAISE(ABORT, 'there is no reading on mondays'); END;
CREATE TABLE counts (sensor TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT;
CREATE TRIGGER count_readings AFTER INSERT ON readings
BEGIN INSERT INTO counts VALUES (NEW.sensor, 1) ON CONFLICT (sensor) DO UPDATE SET n = n + 1; END;
CREATE TABLE weights (n INTEGER) STRICT;
CREATE TRIGGER weigh AFTER INSERT ON readings WHEN NEW.body ->> 'weight' IS NOT NULL
BEGIN INSERT INTO weights VALUES (NEW.body ->> 'weight'); END;
CREATE VIEW warm AS SELECT * FROM readings WHERE value > 20;
"""
TOKEN = "a-token-for-tests"
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}
READING = '{"sensor": "a-17", "value": 21.5}'
NOW = "2026-11-22T10:00:00.123Z"
BATCH = {"Content_Type": "application/x-ndjson"}
# The beginnings of requests, as bytes
HOST = b"Host: x\r\n"
GET = b"GET /healthz HTTP/1.1\r\n"
FROM_TESTER = b"Host: x\r\nAuthorization: Bearer %b\r\n" % TOKEN.encode()
POST = b"POST /messages HTTP/1.1\r\nContent-Type: application/json\r\n" + FROM_TESTER
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def add_tester(path: Path, name: str = "tester", token: str = TOKEN, can: str = "write read") -> None:
    """A client whose token the tests know."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=DEADLINE_S)) as db:
        digest = service.digest_of(token)
        db.execute("INSERT INTO clients (name, token, can) VALUES (?, ?, ?)", (name, digest, can))


# Fixtures


@pytest.fixture(scope="session")
def schemas():
    """What has been read, by its SQL: to read it takes longer than most tests."""
    return {}


@pytest.fixture
def open_store(tmp_path, schemas):
    """Opens a store on inlet.db, with this schema.sql beside it; there is a client `tester`."""
    stores = []

    def open_it(sql=SCHEMA, **options):
        path = tmp_path / "schema.sql"
        path.write_text(sql)
        if sql not in schemas:
            schemas[sql] = service.read_schema(path)
        schema = dataclasses.replace(schemas[sql], path=path)
        store = service.Store(service.Database(tmp_path / "inlet.db"), schema, **options)
        if store.open():
            add_tester(tmp_path / "inlet.db")
        stores.append(store)
        return store

    yield open_it
    for each in stores:
        each.close()


@pytest.fixture
def store(open_store):
    return open_store(clock=lambda: NOW)


class Client(falcon.testing.TestClient):
    """A client of the app, in process, with a token."""

    def post(self, stream, body, **headers):
        headers = AUTHORIZATION | {"Content-Type": "application/json"} | in_http(headers)
        return self.simulate_post(f"/{stream}", body=body, headers={k: v for k, v in headers.items() if v is not None})

    def get(self, path, **headers):
        return self.simulate_get(path, headers=AUTHORIZATION | in_http(headers))


def in_http(headers):
    return {name.replace("_", "-"): value for name, value in headers.items()}


def client_of(store, max_body=1_048_576):
    return Client(service.create_app(store, service.Clients(store, max_body)))


@pytest.fixture
def client(store):
    return client_of(store, max_body=100_000)


def for_many_tests(fixture_name, config):
    """The scope of a fixture for tests that do not care what is stored. Over a cluster, each begins with an empty one."""
    return "function" if config.pluginmanager.has_plugin("over_cluster") else "module"


@pytest.fixture(scope=for_many_tests)
def any_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any-store")
    (folder / "schema.sql").write_text(SCHEMA)
    store = service.Store(service.Database(folder / "inlet.db"), service.read_schema(folder / "schema.sql"))
    store.open()
    add_tester(folder / "inlet.db")
    with contextlib.closing(store):
        yield store


@pytest.fixture(scope=for_many_tests)
def any_client(any_store):
    return client_of(any_store, max_body=100_000)


@pytest.fixture
def command(capsys, tmp_path):
    """Runs a command on the files of this test, in this process: (status, stdout, stderr)."""

    def it_serves(*_):
        pytest.fail("it serves")

    names = ("--database", tmp_path / "inlet.db", "--schema", tmp_path / "schema.sql", "--listen", "127.0.0.1:0")

    def run_it(*arguments, files=names):
        signal.signal(signal.SIGALRM, it_serves)
        signal.alarm(DEADLINE_S)
        try:
            status = service.main([str(argument) for argument in (*files, *arguments)])
        except SystemExit as error:
            status = error.code
        finally:
            signal.alarm(0)
        return status, *capsys.readouterr()

    return run_it


@pytest.fixture
def one_line_error(command):
    """Runs a command, which must not be possible and say so in one clear line; returns that."""

    def run_it(*arguments, **options):
        status, printed, line = command(*arguments, **options)
        assert (status, printed, line.count("\n"), line[:7]) == (2, "", 1, "inlet: "), line
        return line

    return run_it


class Process:
    """`python service.py` as a process of its own, on a free port."""

    program = (str(HERE / "service.py"),)

    def __init__(self, folder: Path, *arguments: str, environ: dict[str, str] | None = None):
        self.folder, self.database, self.environ = folder, folder / "inlet.db", environ or {}
        self.arguments = ["--database", str(self.database), "--listen", "127.0.0.1:0", *arguments]
        self.start()

    def start(self):
        with open(self.folder / "log", "a") as log:
            command = [sys.executable, *self.program, *self.arguments]
            environ = os.environ | self.environ
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environ)
        first_line = self.process.stdout.readline()  # ends too when the process does
        assert "listening on" in first_line, self.log
        self.url = first_line.split()[-1]
        self.address = self.url.removeprefix("http://")

    @property
    def log(self):
        return (self.folder / "log").read_text()

    def printed(self, lines):
        return "".join(self.process.stdout.readline() for _ in range(lines))

    def connect(self):
        return http.client.HTTPConnection(self.address, timeout=DEADLINE_S)

    def socket(self, data=b""):
        """A connection over which this is sent."""
        sock = socket.create_connection(tuple(self.address.split(":")), DEADLINE_S)
        sock.sendall(data)
        return sock

    def answers(self, data):
        """The statuses and all bytes that these bytes are answered with, until the server closes the connection."""
        with self.socket(data) as sock:
            received = b"".join(iter(lambda: sock.recv(65536), b""))
        return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)], received

    def terminate(self, number=signal.SIGTERM):
        """Asks it to end; its exit status. Fails if it has to be killed."""
        self.process.send_signal(number)
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail("the server did not end")

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def close(self):
        if self.process.poll() is None:
            assert self.terminate() == 0
        self.process.stdout.close()


@pytest.fixture
def server_with(tmp_path):
    """Starts a server with these flags on the database and schema.sql of the test."""
    with contextlib.ExitStack() as stack:
        schema = ("--schema", str(tmp_path / "schema.sql"))
        yield lambda *flags: stack.enter_context(contextlib.closing(Process(tmp_path, *schema, *flags)))


@pytest.fixture
def server(store, server_with):
    """A server beside the store."""
    return server_with()


@pytest.fixture(scope="module")
def any_server(tmp_path_factory):
    """A server for tests that do not care what it has stored."""
    folder = tmp_path_factory.mktemp("any")
    with contextlib.closing(Process(folder)) as process:
        add_tester(folder / "inlet.db")
        yield process


def send(connection, method, path, body=None, **headers):
    """One request over a socket; (status, headers, body). A body that is a list of bytes goes in chunks."""
    headers = AUTHORIZATION | {"Content-Type": "application/json"} | in_http(headers)
    chunked = isinstance(body, list)
    if chunked:
        headers["Transfer-Encoding"] = "chunked"
    connection.request(method, path, iter(body) if chunked else body, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def entry(store, stream, *bodies, **options):
    return service.Entry(store.schema.streams[stream], "x", options.pop("key", None), list(bodies), **options)


def append(store, stream, body, key=None):
    """A message straight into the store; its id."""
    return store.append(entry(store, stream, body, key=key)).first_id


def commit_together(store, *entries):
    """Gives all of these one COMMIT, as a server does; returns of each its first id, or the status of its refusal."""
    for each in entries:
        store.queue.append(each)
    while store.queue:
        store.write()
    return [getattr(each.result, "status", None) or each.result.first_id for each in entries]


def database_of(where):
    """A connection to the database of a store or process, in autocommit mode."""
    path = where.database.path if isinstance(where, service.Store) else where.database
    return contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=DEADLINE_S))


def rows(where, sql="SELECT * FROM readings"):
    with database_of(where) as db:
        return db.execute(sql).fetchall()


def change(where, *statements):
    """Does what somebody with the sqlite3 command could do."""
    with database_of(where) as db:
        db.executescript("; ".join(statements))


@contextlib.contextmanager
def another_program_writes(where):
    """Has SQLite's lock for as long as the block takes."""
    with database_of(where) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


@contextlib.contextmanager
def another_process_has_its_turn(where):
    """Has the lock that stands beside the database for as long as the block takes."""
    with open(f"{where.database.path}-lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def eventually(condition, within_s=DEADLINE_S):
    """Waits until something is true, and returns it."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def within(seconds):
    """The block takes no longer than this."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def watch(monkeypatch, before=lambda db, sql: None):
    """Calls `before` with each statement of the connections made from now on; returns the list of all SQL that is run."""
    statements, real = [], sqlite3.connect

    class Watched(sqlite3.Connection):
        def execute(self, sql, *values):
            self.set_trace_callback(statements.append)
            before(self, sql)
            return super().execute(sql, *values)

    monkeypatch.setattr(sqlite3, "connect", lambda *a, **options: real(*a, **options, factory=Watched))
    return statements


@contextlib.contextmanager
def in_threads(work, count):
    """Runs work(number) in so many threads beside the block, and waits for them at its end."""
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(60)


@contextlib.contextmanager
def sending(server, body, stream="messages", count=1):
    """Sends a message again and again while the block runs; gives it the list of (status, id)."""
    stop, answers = threading.Event(), []

    def produce(_):
        with contextlib.suppress(OSError, http.client.HTTPException):  # the server has ended
            connection = server.connect()
            while not stop.is_set():
                status, _, data = send(connection, "POST", f"/{stream}", body)
                answers.append((status, json.loads(data).get("id")))

    with in_threads(produce, count), contextlib.ExitStack() as stack:
        stack.callback(stop.set)
        yield answers


def python(code, folder):
    """What a program prints that knows `service` and a `client` of its application."""
    knows = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import falcon.testing, service\n"
        "client = falcon.testing.TestClient(service.application)\n"
    )
    command, environ = [sys.executable, "-c", knows + code, str(HERE)], os.environ | {"INLET_DATABASE": "inlet.db"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
    return done.stdout + done.stderr


def command_line(folder, *arguments):
    """A command on the files in a folder, as a list of words."""
    files = ["--database", str(folder / "inlet.db"), "--schema", str(folder / "schema.sql")]
    return [sys.executable, str(HERE / "service.py"), *arguments, *files]


def start(folder, *arguments):
    pipe = subprocess.PIPE
    return subprocess.Popen(command_line(folder, *arguments), stdout=pipe, stderr=pipe, text=True)


def run(folder, *arguments, given=None):
    command = command_line(folder, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, input=given)


def readme(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def recipe(name):
    return (HERE / "recipes" / name).read_text()


# The extras


def copy_of_the_service(folder, *without, extras=True):
    """Copies service.py and schema.sql, and the extras but for those without, into a folder; returns it."""
    for name in ("service.py", "schema.sql"):
        shutil.copy(HERE / name, folder)
    if extras:
        left_out = shutil.ignore_patterns("test_*", "conftest.py", "__pycache__", *without)
        shutil.copytree(HERE / "extras", folder / "extras", ignore=left_out)
    return folder


class Copied(Process):
    """A server of such a copy, in its folder."""

    def __init__(self, folder, *arguments):
        self.program = (str(folder / "service.py"),)
        super().__init__(folder, *arguments)


EXTRAS = sorted(
    path.name for path in (HERE / "extras").iterdir() if path.suffix in (".py", ".html") and "test" not in path.name
)


def test_without_extras_the_rest_is_as_before(tmp_path):
    """faults/test_extras.py deletes each in turn."""
    assert len(EXTRAS) == 16
    short_contract("*", tmp_path)


def short_contract(name, folder):
    """What holds without an extra. What it does is not there then, and a command or flag that needs it says so in one line."""
    with contextlib.closing(Copied(copy_of_the_service(folder, name))) as server:
        add_tester(server.database)
        eventually(lambda: send(server.connect(), "GET", "/")[0] == 200)
        with contextlib.closing(server.connect()) as connection:
            first = send(connection, "POST", "/messages", "1", Idempotency_Key="k")
            assert (first[0], json.loads(first[2])["id"]) == (201, 1)
            assert send(connection, "POST", "/messages", "1", Idempotency_Key="k")[1]["Idempotent-Replayed"] == "true"
            assert send(connection, "POST", "/messages", [b"1", b"x"])[0] == 400
            assert json.loads(send(connection, "POST", "/messages", "2\n3", **BATCH)[2])["count"] == 2
            assert [m["body"] for m in json.loads(send(connection, "GET", "/messages?after=1")[2])["messages"]] == [
                2,
                3,
            ]
            lenient = send(connection, "POST", "/messages", "x\n4", Prefer="handling=lenient", **BATCH)
            assert lenient[0] == (400 if name in ("outcomes.py", "*") else 201)
            form = send(connection, "POST", "/messages", "a=1", Content_Type=service.FORM)
            assert form[0] == (415 if name in ("senders.py", "*") else 201)
            assert send(connection, "GET", "/healthz", Authorization="")[0] == 200
            assert send(connection, "GET", "/metrics")[0] == (404 if name in ("metrics.py", "*") else 200)
            since = send(connection, "GET", "/messages?since=2026-11-27")
            assert since[0] == (400 if name in ("reading.py", "*") else 200)
            table = send(connection, "GET", "/messages", Accept="text/csv")
            assert table[0] == (406 if name in ("reading.py", "*") else 200)
            kind = send(connection, "GET", "/", Accept="text/html", Authorization="")[1]["Content-Type"]
            assert (kind == "text/html; charset=utf-8") == (name not in ("page.py", "page.html", "reading.py", "*"))
        assert "Traceback" not in server.log
    for extra, words in (
        ("migrate.py", ["migrate"]), ("forward.py", ["forward", "messages", "http://127.0.0.1:1"]), ("rqlite.py", ["--database", "http://127.0.0.1:1"]), ("nodes.py", ["--database", "http://127.0.0.1:1"]),
        ("senders.py", ["client", "add", "x", "--signs", "github"]), ("loop.py", ["--server", "loop"]),
    ):  # fmt: skip
        if name == extra or (name == "*" and extra != "nodes.py"):  # rqlite.py needs that one
            command = [sys.executable, str(folder / "service.py"), *words]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S)
            assert (done.returncode, done.stderr.count("\n"), extra in done.stderr) == (2, 1, True), done.stderr


def test_service_py_alone_keeps_what_it_has_acknowledged(tmp_path):
    """With schema.sql, falcon and waitress, in an empty folder: 32 senders, and kill -9."""
    with contextlib.closing(Copied(copy_of_the_service(tmp_path, extras=False))) as server:
        add_tester(server.database)
        eventually(lambda: send(server.connect(), "GET", "/")[0] == 200)
        with sending(server, "1", count=32) as answers:
            eventually(lambda: len(answers) > 300)
            server.kill()
        server.start()
        acknowledged = [message_id for status, message_id in answers if status == 201]
        stored = [row[0] for row in rows(server, "SELECT id FROM messages")]
        assert len(set(acknowledged)) == len(acknowledged) > 300
        assert set(acknowledged) <= set(stored)
        page = json.loads(send(server.connect(), "GET", "/messages?limit=1000")[2])["messages"]
        assert [message["id"] for message in page] == stored[:1000]


def test_there_is_one_module_whoever_asks_for_it(tmp_path):
    """A package `extras` from elsewhere does not get in between; and an extra finds this very service."""
    (tmp_path / "extras").mkdir()
    (tmp_path / "extras" / "__init__.py").write_text("raise ImportError('not this one')")
    code = """if True:
        import importlib, runpy
        again = importlib.import_module("service")
        metrics = service.extra("metrics")
        print(again is service, metrics.Store is service.Store, service.extra("metrics") is metrics, service.extra("no"))
        sys.argv = ["service.py", "--version"]
        del sys.modules["service"]
        try:
            runpy.run_path(sys.argv[0] if os.path.exists(sys.argv[0]) else service.__file__, run_name="__main__")
        except SystemExit:
            pass
    """
    assert python(code, tmp_path) == f"True True True None\nInlet {service.__version__}\n"


# The app


def test_the_application_opens_the_database_at_its_first_request_and_not_before(tmp_path):
    code = "print(os.listdir(), client.simulate_get('/messages').status_code, os.path.exists('inlet.db'))"
    assert python(code, tmp_path) == "[] 401 True\nthere is no client: python service.py client add NAME\n"


def test_first_requests_that_cannot_be_served_fail_together_and_not_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "BUSY_TIMEOUT_S", 0.5)
    monkeypatch.setenv("INLET_DATABASE", str(tmp_path / "inlet.db"))
    client = falcon.testing.TestClient(service.LazyApplication())
    with open(tmp_path / "inlet.db-lock", "ab") as file, concurrent.futures.ThreadPoolExecutor() as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        started = time.monotonic()
        asked = [pool.submit(client.simulate_get, "/messages") for _ in range(4)]
        assert {each.result().status_code for each in asked} == {503}
        assert time.monotonic() - started < 1.9
        fcntl.flock(file, fcntl.LOCK_UN)
        assert client.simulate_get("/messages").status_code == 401


def test_an_application_that_is_not_set_up_says_so_in_answer_and_log(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("INLET_DATABASE", str(tmp_path / "no-such-folder" / "inlet.db"))
    answer = falcon.testing.TestClient(service.LazyApplication()).simulate_get("/healthz")
    assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
    assert "no-such-folder" not in answer.text
    assert "no-such-folder" in caplog.text


@pytest.mark.parametrize(("used_before", "status"), [(False, 401), (True, 503)])
def test_a_process_may_fork_before_its_first_request_and_not_after_it(used_before, status, tmp_path):
    """SQLite keeps its locks in memory that a child inherits: 10 of 24 messages of such a child were lost."""
    code = f"""if True:
        import warnings
        warnings.simplefilter("ignore")  # Python warns of forks beside threads
        ask = lambda: client.simulate_get("/messages").status_code
        {used_before} and ask()
        child = os.fork()
        os.write(1, f"{{'parent' if child else 'child'}} {{ask()}}\\n".encode())
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
    """
    printed = python(code, tmp_path)
    assert {f"child {status}", "parent 401"} <= set(printed.splitlines())
    assert ("was forked" in printed) == used_before


def test_an_unexpected_error_says_nothing_and_is_logged(open_store, caplog):
    def fail():
        raise LookupError("a secret")

    answer = client_of(open_store(clock=fail)).post("messages", "1")
    assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
    assert "secret" not in answer.text
    assert re.search("Traceback(.|\n)*a secret", caplog.text)


@pytest.mark.parametrize(("method", "path", "status", "words", "allow"), [
    ("DELETE", "/messages", 405, "method", {"GET", "HEAD", "POST", "OPTIONS"}), ("BREW", "/messages", 501, "method", None),
    ("PUT", "/messages/1", 405, "method", {"GET", "HEAD", "OPTIONS"}), ("POST", "/", 405, "method", {"GET", "HEAD", "OPTIONS"}),
    *[("GET", path, 404, "nothing at this path", None) for path in ("/no", "//messages", "/messages//", "/messages/x", "/Messages", "/clients")],
    ("GET", "/messages/7", 404, "no message with this id", None),
])  # fmt: skip
def test_unknown_paths_and_methods_are_problems_too(method, path, status, words, allow, client):
    with pytest.warns() if method == "BREW" else contextlib.nullcontext():
        answer = client.simulate_request(method, path, headers=AUTHORIZATION)
    assert answer.status_code == answer.json["status"] == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert words in answer.json["detail"]
    assert set(answer.headers.get("Allow", "").split(", ")) == (allow or {""})
    assert client.simulate_request(method if allow else "GET", path).status_code == 401  # before anything else


def test_a_database_that_cannot_be_read_is_503(client, store):
    change(store, "ALTER TABLE messages RENAME TO away")
    for answer in (client.get("/messages"), client.get("/messages/1"), client.post("messages", "1")):
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    change(store, "ALTER TABLE away RENAME TO messages")
    assert client.get("/messages").status_code == 200


# Settings


@pytest.mark.parametrize(("arguments", "words"), [
    ("--threads 0", ["--threads", "INLET_THREADS", "1 to 999"]), ("--threads many", ["--threads", "'many'"]),
    ("--max-body 1e6", ["--max-body", "INLET_MAX_BODY"]), ("--listen 8080", ["--listen", "HOST:PORT"]),
    ("--listen 127.0.0.1:99999", ["127.0.0.1:99999"]), ("--listen 'no such host:0'", ["no such host:0"]),
    ("--listen unix:", ["--listen", "unix:PATH"]), ("--prefix ingest/", ["--prefix", "INLET_PREFIX", "/ingest"]),
    ("--cors a.example", ["--cors", "https://a.example"]),
    ("--schema no-such.sql", ["no-such.sql", "cannot be read"]), ("--database no-such/inlet.db", ["no-such"]),
    ("--database ''", ["--database", "the path of"]), ("--database .", ["cannot be opened"]),
    ("--no-such-flag", ["--no-such-flag"]), ("no-such-command", ["no-such-command"]), ("backup", ["backup"]),
])  # fmt: skip
def test_it_ends_with_one_line_if_it_cannot_run_like_this(arguments, words, one_line_error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = one_line_error(*shlex.split(arguments), files=("--listen", "127.0.0.1:0"))
    assert all(word in line for word in words), line


def test_a_password_in_the_address_of_a_cluster_is_not_shown(command, monkeypatch):
    monkeypatch.setattr(service.needed("rqlite", "a cluster"), "BUSY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(service.extra("nodes"), "CONNECT_TIMEOUT_S", 0.1)
    status, _, line = command("client", "list", "--database", "http://me:hunter2@127.0.0.1:1")
    assert (status, "127.0.0.1:1" in line, "hunter2" in line) == (1, True, False)


def test_a_flag_counts_more_than_the_environment(one_line_error, monkeypatch):
    monkeypatch.setenv("INLET_MAX_BODY", "-10")
    monkeypatch.setenv("INLET_THREADS", "")  # as good as none
    assert "'-10'" in one_line_error("migrate")
    assert "'-20'" in one_line_error("migrate", "--max-body=-20")
    assert "there is no database" in one_line_error("client", "list", "--max-body", "20")


def test_the_help_names_every_setting_and_command(command):
    _, text, _ = command("--help")
    names = ["LISTEN", "DATABASE", "SCHEMA", "THREADS", "MAX_BODY", "PREFIX", "CORS"]
    flags = ["--replace", "--can", "--signs", "--secret"]
    for word in [*(f"INLET_{name}" for name in names), "client add", "migrate", "backup PATH", *flags]:
        assert word in text


def test_the_script_metadata_names_what_requirements_txt_pins():
    """PEP 723, so that `uv run service.py` works as it is. pytest is only for the tests."""
    source = (HERE / "service.py").read_text()
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", source)[1]
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    *pinned, pytest_pinned = (HERE / "requirements.txt").read_text().split()
    assert (pinned, pytest_pinned[:8]) == (metadata["dependencies"], "pytest==")
    assert metadata["requires-python"] == ">=3.11"


# The schema


X = stream_sql("x")
COLUMN = ", n TEXT AS (body ->> 'n')"


@pytest.mark.parametrize(("sql", "words"), [
    ("CREATE TABLE x (a INTEGER;", ["line 2", "syntax error"]), ("\n\nCREATE TABEL x (a);", ["line 4", "TABEL"]),
    ("DROP TABLE messages;", ["line 2", "only CREATE"]), ("PRAGMA user_version = 1;", ["line 2", "only CREATE"]),
    ("CREATE TEMP TABLE t (a);", ["line 2", "TEMP"]),
    ("CREATE TABLE l (a); INSERT INTO l VALUES (1);", ["line 2", "INSERT OR IGNORE"]),
    ("CREATE TABLE clients (name TEXT);", ["clients", "belongs to the service"]),
    ("CREATE VIEW Clients AS SELECT 1 AS token;", ["Clients", "belongs to the service"]),
    (X.replace("key TEXT,", ""), ["no such column"]),
    ("CREATE TABLE x (id INTEGER PRIMARY KEY AUTOINCREMENT, received_at TEXT NOT NULL, client TEXT NOT NULL,"
     " body TEXT NOT NULL) STRICT;", ["table x", "needs the column key TEXT"]),
    (X.replace(" AUTOINCREMENT", ""), ["table x", "id needs AUTOINCREMENT"]),
    (X.replace("INTEGER PRIMARY KEY AUTOINCREMENT", "INTEGER"), ["table x", "needs the column id INTEGER PRIMARY KEY"]),
    (X.replace("client TEXT NOT NULL", "client TEXT"), ["table x", "needs the column client TEXT NOT NULL"]),
    (X.replace("body TEXT", "body BLOB"), ["table x", "needs the column body TEXT NOT NULL"]),
    (X.replace("key TEXT", "key TEXT AS (body ->> 'key')"), ["table x", "needs the column key"]),
    (X.replace("STRICT", ""), ["table x", "STRICT"]), (X.partition("CREATE UNIQUE")[0], ["table x", "lacks its index", "x_key"]),
    (X.replace("UNIQUE INDEX", "INDEX"), ["lacks its index"]), (X.replace("key IS NOT NULL", "key > 'm'"), ["lacks its index"]),
    (X.replace("(client, key)", "(client, key COLLATE NOCASE)"), ["table x", "lacks its index"]),
    (X.replace("client TEXT NOT NULL", "client TEXT NOT NULL COLLATE NOCASE"), ["table x", "lacks its index"]),
    (stream_sql("x", ", note TEXT NOT NULL"), ["table x", "nothing can fill the column note"]),
    (stream_sql("x", ", After TEXT AS (body ->> 'n')"), ["table x", "after", "parameter"]),
    (stream_sql("x", ', "limit" TEXT AS (body ->> 1)'), ["table x", "limit", "parameter"]),
    (stream_sql("metrics"), ["'metrics'", "cannot be a route"]), (stream_sql('"é"').replace('"é"_key', "e_key"), ["cannot be a route"]),
    (stream_sql('"a b"').replace('"a b"_key', "ab_key"), ["'a b'", "cannot be a route"]),
    (stream_sql("x", COLUMN + " REFERENCES nowhere (n)"), ["table x", "no such table", "nowhere"]),
    (X + "CREATE TRIGGER t AFTER INSERT ON x BEGIN INSERT INTO nowhere VALUES (1); END;", ["table x", "nowhere"]),
    (X + "CREATE TRIGGER t BEFORE INSERT ON x BEGIN SELECT raise /**/ (Rollback, 'no'); END;", ["RAISE(ABORT"]),
    (X + "CREATE TRIGGER t AFTER INSERT ON x BEGIN SELECT RAISE(IGNORE); END;", ["trigger t", "RAISE(ABORT"]),
    (X + "CREATE TRIGGER t AFTER INSERT ON x BEGIN INSERT OR ROLLBACK INTO x VALUES (1); END;", ["OR ROLLBACK"]),
    (stream_sql("x", COLUMN + " UNIQUE ON CONFLICT REPLACE"), ["table x", "ON CONFLICT"]),
    (stream_sql("x", COLUMN + " REFERENCES messages (id) DEFERRABLE INITIALLY DEFERRED"), ["table x", "deferred"]),
    # A misspelled name in double quotes is a text to SQLite, and the rule void: https://www.sqlite.org/quirks.html#dblquote
    (stream_sql("x", COLUMN + ' CHECK ("m" > 0)'), ["no such column: m", "double quotes"]),
    (stream_sql("x", ', n TEXT AS ("bodi" ->> 1)'), ["bodi", "double quotes"]),
    (X + 'CREATE TRIGGER t AFTER INSERT ON x WHEN "kei" > 1 BEGIN SELECT 1; END;', ["kei", "double quotes"]),
    (X + 'CREATE TRIGGER t AFTER INSERT ON x BEGIN DELETE FROM x WHERE "key" = "old"; END;', ["old", "double quotes"]),
    (X + 'CREATE VIEW v AS SELECT "bodi" FROM x;', ["bodi", "double quotes"]),
    (X + 'CREATE INDEX i ON x ("bodi");', ["bodi"]),
])  # fmt: skip
def test_it_refuses_a_schema_that_cannot_work(sql, words, one_line_error, tmp_path):
    path = tmp_path / "schema.sql"
    path.write_text(f"-- a comment; with a semicolon\n{sql}" + stream_sql("messages"))
    line = one_line_error()
    assert str(path) in line
    assert all(word in line for word in words), line
    assert not (tmp_path / "inlet.db").exists()


def test_it_refuses_a_schema_without_streams_and_an_old_sqlite_by_name(one_line_error, tmp_path, monkeypatch):
    (tmp_path / "schema.sql").write_text("CREATE TABLE counts (n INTEGER);")
    assert "no table has the columns of a stream" in one_line_error()
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 37, 2))
    assert "3.38.0" in one_line_error()


@pytest.mark.parametrize("sql", [
    X.upper().replace("JSON_VALID(BODY)", "json_valid(Body)"),
    X.replace("key IS NOT NULL", "(key IS NOT NULL)"),
    X.partition("CREATE UNIQUE")[0] + "CREATE UNIQUE INDEX i ON x (key, client);",
    '\ufeffCREATE TABLE "x" ("id" INTEGER, [received_at] TEXT NOT NULL, `client` TEXT NOT NULL, key TEXT, body TEXT'
    " NOT NULL, note TEXT DEFAULT 'INITIALLY DEFERRED', PRIMARY KEY (id AUTOINCREMENT), UNIQUE (client, key)) STRICT;",
    stream_sql("x", ", ok INTEGER AS (body = '1'), fail INTEGER AS (0), CHECK (ok OR fail), CHECK (ok OR 'on conflict')"),
    X + "CREATE TABLE seen (n); CREATE TRIGGER t AFTER INSERT ON x WHEN NEW.body OR 0 BEGIN"
    " INSERT OR IGNORE INTO seen VALUES (NEW.body); INSERT OR REPLACE INTO seen VALUES ('raise(fail'); END;",
])  # fmt: skip
def test_a_stream_can_be_written_in_other_ways(sql, open_store):
    store = open_store(sql)
    (name,) = store.schema.streams
    assert commit_together(store, *[entry(store, name, "1", key="k") for _ in range(2)]) == [1, 1]
    assert commit_together(store, *[entry(store, name, body, key="K") for body in "12"]) == [2, 422]


def test_the_schemas_in_schema_sql_and_readme_work(open_store, tmp_path):
    """Also when somebody has changed schema.sql, as README says."""
    shipped, example = (HERE / "schema.sql").read_text(), readme("sql")[0]
    service.read_schema(HERE / "schema.sql")
    own = shipped.index("-- One stream")
    head, commented = shipped[:own], shipped[shipped.index("-- CREATE TABLE") : own]
    (tmp_path / "schema.sql").write_text(head + commented.replace("-- ", ""))
    assert set(service.read_schema(tmp_path / "schema.sql").streams) == {"readings"}
    store = open_store(stream_sql("messages") + example)
    append(store, "readings", '{"sensor": "b-4", "value": 1, "serial": 12}')
    for more in ('"value": "12"', *[f'"value": 1, "serial": {n}' for n in ('"13"', "1.5", "12")]):
        with pytest.raises(service.Problem) as refused:
            append(store, "readings", f'{{"sensor": "b-4", {more}}}')
        assert ("serial" if "serial" in more else "value") in str(refused.value)


def test_the_recipes_work(open_store):
    names = ("retention.sql", "no_member_twice.sql", "hours.sql", "alarms.sql", "github.sql")
    recipes = "".join(map(recipe, names)).replace("1000000", "3")
    now = [NOW]
    store = open_store(stream_sql("messages") + readme("sql")[0] + recipes, clock=lambda: now[0])
    client = client_of(store)
    for n in range(6):
        client.post("messages", str(n))
    assert [message["body"] for message in client.get("/messages").json["messages"]] == [3, 4, 5]
    days = [f"2026-{day}.000Z" for day in ("10-01T10:00:00", "10-30T23:59:59", "10-31T10:00:00", "11-30T10:00:00")]
    for now[0] in days:
        for value in (1, 55):
            body = {"sensor": "a-17", "value": value, "serial": 100 * days.index(now[0]) + value}
            assert client.post("readings", json.dumps(body)).status_code == 201
    kept = [message["received_at"] for message in client.get("/readings").json["messages"]]
    assert kept == [days[2]] * 2 + [days[3]] * 2
    (plan,) = rows(store, "EXPLAIN QUERY PLAN SELECT id FROM readings WHERE received_at < '2026'")
    assert "INDEX readings_received_at" in plan[3]
    assert client.get("/hours?hour=2026-11-30T10").json == {"rows": [{"hour": "2026-11-30T10", "count": 2}]}
    assert [message["body"]["value"] for message in client.get("/latest").json["messages"]] == [55]
    twice = client.post("readings", '{"sensor": "a-17", "value": 5, "value": 1, "serial": 7}')
    assert twice.json["detail"] == "a member comes twice"
    for when in ("hour=2026-11-30T10", "day=2026-11-30"):
        assert len(client.get(f"/alarms?{when}").json["messages"]) == 1
    add_tester(store.database.path, "sensor", "s", "write:readings")
    assert client.post("alarms", "1", Authorization="Bearer s").status_code == 403
    for event in ("push", "ping"):
        client.post("deliveries", "{}", X_GitHub_Event=event)
    assert [message["headers"]["x-github-event"] for message in client.get("/pushes").json["messages"]] == ["push"]


def test_named_rules_speak_however_they_are_written(open_store):
    store = open_store(
        stream_sql("X", """, a TEXT AS (body ->> 'a') CONSTRAINT 'it''s a' CHECK (a <> 'q'), b TEXT AS (body ->> 'b'),
        c TEXT AS (body ->> 'c'), CONSTRAINT [no "Ö"] CHECK (b <> 'q'), CONSTRAINT /* c */ `not``c` check(c <> 'q')""")
        + 'CREATE UNIQUE INDEX "one a and b" ON x (b, "A"); CREATE UNIQUE INDEX "one (c)" ON X (lower(c));'
    )  # fmt: skip
    append(store, "X", '{"a": 1, "b": 2, "c": "C"}')
    for body, words in {
        '{"a": "q"}': "it's a", '{"b": "q"}': 'no "Ö"', '{"c": "q"}': "not`c", '{"a": 1, "b": 2}': "one a and b",
        '{"c": "c"}': "one (c)",
    }.items():  # fmt: skip
        with pytest.raises(service.Problem) as refused:
            append(store, "X", body)
        assert str(refused.value) == words


@pytest.mark.parametrize(("old", "new", "words"), [
    ("< 10", "< 20", ["table readings has changed", "+ note", "- note"]), ("is no", "was no", ["trigger no_mondays has changed"]),
    ("ON readings (batch)", "ON readings (batch, lot)", ["index one reading for each batch has changed"]),
    ('UNIQUE INDEX "one', 'INDEX "one', ["index one reading for each"]), ("VIEW warm", "VIEW hot", ["view hot is new"]),
    ("readings", "measures", ["table measures is new", "table readings is not in the schema"]),
])  # fmt: skip
def test_it_refuses_a_database_that_differs_from_the_schema(old, new, words, store, tmp_path, one_line_error):
    (tmp_path / "schema.sql").write_text(SCHEMA.replace(old, new))
    files = len(os.listdir("/dev/fd"))
    line = one_line_error()
    assert "migrate" in line
    assert all(word in line for word in words), line
    assert len(os.listdir("/dev/fd")) <= files  # other servers try again at each request


def test_what_changes_no_message_stops_no_start(store, open_store, one_line_error, caplog):
    change(store, "CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER)", "CREATE VIEW mine AS SELECT 1")
    open_store(SCHEMA.replace(", value REAL", " /* a comment */ ,\n\n value   REAL -- more\n"))
    assert caplog.text == ""
    change(store, "CREATE INDEX by_hand ON readings (note)")
    open_store(SCHEMA + "CREATE INDEX wished ON readings (size);")
    assert re.search("index by_hand.*migrate(.|\n)*index wished|index wished.*migrate(.|\n)*index by_hand", caplog.text)
    change(store, "CREATE UNIQUE INDEX refusing ON readings (note)")
    assert "index refusing" in one_line_error()


# The store


def test_threads_that_write_at_once_share_commits(open_store):
    """Whoever is done does not queue once more to learn it: with a lock, 64 threads made groups of 1.7."""
    groups = []
    store = open_store(clock=lambda: groups.append(NOW) or NOW)
    with in_threads(lambda number: [append(store, "messages", f"{number}") for _ in range(10)], 64):
        pass
    assert len(rows(store, "SELECT * FROM messages")) == 640
    assert len(groups) < 640 / 5


def test_what_fails_in_a_shared_commit_costs_only_itself(store):
    whole, broken = (entry(store, "readings", READING, READING, *more, lines=[1, 2, 3]) for more in ([], ["{}"]))
    bodies = [entry(store, "readings", body) for body in (READING, "{}", READING)]
    ids = commit_together(store, *bodies[:2], broken, whole, entry(store, "messages", "1"), bodies[2])
    assert ids == [1, 422, 422, 2, 1, 4]
    assert [row[0] for row in rows(store)] == [1, 2, 3, 4]
    same_key = [entry(store, "messages", body, key="k") for body in "112"]
    assert commit_together(store, *same_key) == [2, 2, 422]
    assert [each.result.replayed for each in same_key[:2]] == [False, True]
    store._schema_look_at = time.monotonic() + 60  # it has just looked
    change(store, "DROP TABLE readings")  # as migrate does beside a running process
    entries = [entry(store, "messages", "1"), entry(store, "readings", READING), entry(store, "messages", "2")]
    assert commit_together(store, *entries) == [3, 503, 4]


def test_a_message_that_undoes_the_transaction_costs_only_its_stream(store):
    """The ids of one stream are used up. SQLite says that the disk is full, and rolls back everything."""
    append(store, "readings", READING)
    change(store, f"UPDATE sqlite_sequence SET seq = {service.MAX_ID} WHERE name = 'readings'")
    streams = ["messages", "readings", "messages", "readings", "messages", "readings", "messages"]
    entries = [entry(store, stream, READING if stream == "readings" else "1") for stream in streams]
    batch = entry(store, "messages", "2", "3", lines=[1, 2])
    assert commit_together(store, *entries, batch) == [1, 503, 2, 503, 3, 503, 4, 5]
    assert len(rows(store, "SELECT * FROM messages")) == 6


def test_messages_wait_for_one_large_batch_at_most_and_small_batches_share_a_commit(store):
    """130 clients with batches of 10,000 made everybody wait for 10 s, for a 503."""
    large = [entry(store, "messages", *["1"] * 2000, lines=list(range(1, 2001))) for _ in range(4)]
    small = [entry(store, "messages", *["2"] * 100, lines=list(range(1, 101))) for _ in range(5)]
    alone = [entry(store, "messages", "3") for _ in range(3)]
    for each in (alone[0], *large, alone[1], *small, alone[2]):
        store.queue.append(each)
    done = []
    while store.queue:
        store.write()
        done.append([sum(bool(each.result) for each in kind) for kind in (large, small, alone)])
    assert done == [[1, 0, 3], [2, 0, 3], [3, 0, 3], [4, 0, 3], [4, 5, 3]]
    first_ids = [each.result.first_id for each in large + small]
    assert first_ids == sorted(first_ids)


@pytest.mark.parametrize(("by_hand", "body"), [
    ("CREATE TRIGGER skip BEFORE INSERT ON messages WHEN NEW.body = '1' BEGIN SELECT RAISE(IGNORE); END", "1"),
    ("DROP INDEX messages_key", "2"),
])  # fmt: skip
def test_rules_that_somebody_changes_beside_the_service_lose_nothing_behind_a_201(by_hand, body, client, store):
    assert client.post("messages", "0").status_code == 201
    change(store, by_hand)
    store._schema_look_at = time.monotonic() + 60  # it has just looked
    for sent, headers in ((body, {}), (f"3\n{body}", BATCH)):
        status = client.post("messages", sent, **headers).status_code
        assert status == (503 if "TRIGGER" in by_hand else 201)
    assert ("1",) not in rows(store, "SELECT body FROM messages")
    store._schema_look_at = 0  # a second later
    for sent in (body, "4"):
        answer = client.post("messages", sent)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert client.get("/messages").status_code == 200


def test_a_database_that_is_damaged_says_so(client, store, caplog):
    for _ in range(300):
        append(store, "messages", json.dumps("x" * 1000))
    store.close()
    with open(store.database.path, "r+b") as file:  # as `cp` into the file of a running service does
        file.seek(4096)
        file.write(b"\xff" * 200_000)
    for _ in range(3):
        for answer in (client.post("messages", "1"), client.get("/messages?limit=1000")):
            assert answer.status_code == 503
            assert "restored from a backup" in answer.json["detail"]
    assert len([line for line in caplog.messages if line.startswith("the database is damaged")]) <= 2


def test_who_fails_to_take_its_result_keeps_nobody_elses(store):
    entries, told = [entry(store, "messages", str(n)) for n in range(3)], []
    for each, changed in zip(entries, (lambda: told.append(1), lambda: 1 / 0, lambda: told.append(3)), strict=True):
        each.changed = changed
        store.queue.append(each)
    store.write()
    assert [each.result.first_id for each in entries] == [1, 2, 3]
    assert told == [1, 3]


def test_who_is_interrupted_while_it_waits_leaves_nothing_in_the_queue(store, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.database, "transaction", interrupted)
        with pytest.raises(KeyboardInterrupt):
            append(store, "messages", "1")
    assert not store.queue
    assert append(store, "messages", "2") == 1


def test_who_has_its_result_writes_for_nobody_else_before_it_returns(store, monkeypatch):
    insert, first_is_there, others_are_there, last_may_end = (
        store.database._insert,
        *[threading.Event() for _ in range(3)],
    )

    def slow(db, each, received_at):
        if each.bodies == ["first"]:
            first_is_there.set()
            assert others_are_there.wait(DEADLINE_S)
        elif each.bodies == ["last"]:
            assert last_may_end.wait(DEADLINE_S)
        else:
            eventually(lambda: store.queue)  # the last one waits already when these have their results
        return insert(db, each, received_at)

    monkeypatch.setattr(store.database, "_insert", slow)
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        pool.submit(append, store, "messages", "first")
        assert first_is_there.wait(DEADLINE_S)
        others = [pool.submit(append, store, "messages", "1") for _ in range(20)]
        eventually(lambda: len(store.queue) == 20)
        pool.submit(lambda: (eventually(lambda: not store.queue), append(store, "messages", "last")))
        others_are_there.set()
        try:
            assert len({each.result(DEADLINE_S) for each in others}) == 20  # while the last one hangs
        finally:
            last_may_end.set()


def test_a_value_that_is_too_big_costs_only_its_message(open_store):
    store = open_store(stream_sql("x", ", p BLOB AS (zeroblob(body)) CHECK (length(p) > 0)"))
    assert commit_together(store, *[entry(store, "x", n) for n in ("1", "2000000000", "2")]) == [1, 422, 2]


def test_a_message_costs_one_statement_its_token_none_and_a_batch_one_synced_transaction(open_store, monkeypatch):
    writers = []
    statements = watch(monkeypatch, lambda db, sql: writers.append(db) if sql.startswith("INSERT INTO") else None)
    client = client_of(open_store())
    client.post("messages", "1")
    for lines in (0, 1, 2, 10_000):  # 0: one that is no batch
        statements.clear()
        answer = client.post("messages", "1\n" * max(1, lines), **BATCH if lines else {})
        assert (answer.status_code, answer.json.get("count", 0)) == (201, lines)
        verbs = [sql.split()[0] for sql in statements if not sql.startswith(("PRAGMA", "SELECT last_insert_rowid"))]
        inserts = ["SAVEPOINT", *["INSERT"] * lines, "RELEASE"] if lines else ["INSERT"]
        assert verbs == ["BEGIN", *inserts, "COMMIT"]
    wanted = {"synchronous": (2,), "journal_mode": ("wal",), "foreign_keys": (1,)}
    assert {name: writers[-1].execute(f"PRAGMA {name}").fetchone() for name in wanted} == wanted


@pytest.mark.parametrize(("what", "results", "stored"), [
    ("loses its transaction", [503, 503, 503], []), ("is full for one", [1, 503, 2], [1, 2]),
    ("fails before the COMMIT", [503, 503, 503], []), ("fails after the COMMIT", [503, 503, 503], [1, 2, 3]),
])  # fmt: skip
def test_a_failing_disk_is_503_and_a_keyed_retry_finds_out(what, results, stored, open_store, monkeypatch):
    """SQLite says FULL at max_page_count as it does of a disk, rolled back transaction included."""
    inserts, failing = [], []

    def fail(db, sql):
        execute = sqlite3.Connection.execute
        inserts.extend([sql] * (bool(failing) and sql.startswith("INSERT INTO")))
        if what == "is full for one":
            execute(db, f"PRAGMA max_page_count = {failing[0] if failing else 10**6}")
        elif what == "loses its transaction" and sql.startswith("INSERT INTO") and len(inserts) > 1:
            execute(db, "ROLLBACK")
            raise sqlite3.IntegrityError("as if")
        elif failing and what.endswith("COMMIT") and sql == "COMMIT":
            failing.clear(), execute(db, sql if "after" in what else "ROLLBACK")
            raise sqlite3.OperationalError("disk I/O error")

    watch(monkeypatch, fail)
    store = open_store()
    failing += rows(store, "PRAGMA page_count")[0]
    bodies = enumerate(("1", json.dumps("x" * 90_000), "2"))
    entries = [entry(store, "messages", body, key=f"{n}") for n, body in bodies]
    assert commit_together(store, *entries) == results
    assert rows(store, "SELECT id FROM messages") == [(each,) for each in stored]
    failing.clear(), inserts.clear()
    again = [entry(store, "messages", *each.bodies, key=each.key) for each in entries]
    assert sorted(commit_together(store, *again)) == [1, 2, 3]
    assert [each.result.replayed for each in again].count(True) == len(stored)


def test_another_program_that_holds_the_write_lock_is_503(client, store, monkeypatch):
    monkeypatch.setattr(service, "BUSY_TIMEOUT_S", 0.1)
    with another_program_writes(store):
        answer = client.post("messages", "{}")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
        assert "The database is busy" in answer.json["detail"]
        assert client.get("/messages").status_code == 200  # reading never waits for a writer
    assert client.post("messages", "{}").status_code == 201


@pytest.mark.parametrize("held", [another_program_writes, another_process_has_its_turn])
def test_whoever_waits_too_long_is_answered_in_time_and_leaves_nothing(held, store):
    """Not one after the other; and neither their messages nor threads nor descriptors stay behind."""
    append(store, "messages", "1")
    late = []

    def wait(_):
        mine = entry(store, "messages", "2", deadline=time.monotonic() + 0.5)
        with pytest.raises(service.Problem) as refused:
            store.append(mine)
        late.append((refused.value.status, time.monotonic() - mine.deadline))

    with held(store):
        threads, files = threading.active_count(), len(os.listdir("/dev/fd"))
        with in_threads(wait, 10):
            pass
        assert [status for status, _ in late] == [503] * 10
        assert max(seconds for _, seconds in late) < 2
        assert threading.active_count() <= threads
        assert len(os.listdir("/dev/fd")) <= files
    append(store, "messages", "3")
    assert [row[4] for row in rows(store, "SELECT * FROM messages")] == ["1", "3"]


MANY = (
    "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {})"
    " INSERT INTO messages (received_at, client, body) SELECT 'now', 'x', json_object('n', n, 's', printf('%{}c', 'x')) FROM n"
)


def slow_store(open_store, count):
    """A store with a column that takes about 4 ms to compute for each of its messages."""
    slow = ", slow INTEGER AS (" + "+".join(["length(body)"] * 400) + ")"
    add_slow = f"ALTER TABLE messages ADD COLUMN {slow[1:]}"  # later, for it is computed at an INSERT, too
    change(open_store(stream_sql("messages", COLUMN)), MANY.format(count, 10_000), add_slow)
    return open_store(stream_sql("messages", COLUMN + slow))


def test_a_read_that_takes_too_long_is_ended_and_says_which_filter_has_no_index(open_store, monkeypatch):
    store = slow_store(open_store, 400)
    change(store, "CREATE INDEX by_n ON messages (n)")
    monkeypatch.setattr(service, "READ_TIMEOUT_S", 0.2)
    client = client_of(store)
    with within(1.5):
        answer = client.get("/messages?slow=0")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert re.search(r"\bindex\b.*\bslow\b", answer.json["detail"])
    assert "on n" not in answer.json["detail"]
    assert [message["id"] for message in client.get("/messages?n=77").json["messages"]] == [77]


# The engine


def test_the_database_knows_which_index_serves_a_filter_best(open_store, tmp_path):
    """Without statistics, SQLite takes the wrong one of two: 18.8 ms in place of 0.04 for 60,000 rows."""
    sql = stream_sql("messages", ", a TEXT AS (body ->> 'a'), b TEXT AS (body ->> 'b')")
    sql += "CREATE INDEX messages_a ON messages (a); CREATE INDEX messages_b ON messages (b);"
    open_store(sql)
    member = "json_object('a', printf('%d', n), 'b', 'same')"
    many = f"WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 3000) SELECT '', '', {member} FROM c"
    store = open_store(sql)
    change(store, f"INSERT INTO messages (received_at, client, body) {many}")
    for plan in ("messages_b", "messages_a"):
        with store.database.reader() as db:
            steps = db.execute(
                "EXPLAIN QUERY PLAN SELECT 1 FROM messages AS t WHERE t.a = '7' AND t.b = 'same'"
            ).fetchall()
            assert plan in steps[0][3]
        store = open_store(sql)  # a start


def test_its_own_connections_are_in_autocommit_mode_and_spill_into_memory(store):
    append(store, "messages", "1")
    assert store.database._writer.execute("PRAGMA temp_store").fetchone() == (2,)
    for db in (store.database._writer, store.database._open_reader()[0]):
        assert db.autocommit is True if sys.version_info >= (3, 12) else db.isolation_level is None
        assert not db.in_transaction


def test_no_sql_has_numbered_parameters_which_python_3_12_takes_for_names():
    for path in (HERE / "service.py", *(HERE / "extras").glob("*.py")):
        assert not re.search(r"[ (=]\?\d", path.read_text()), path


def test_a_symlink_is_the_database_it_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "inlet.db").symlink_to("real/store.db")
    with contextlib.closing(Process(tmp_path)) as server:
        add_tester(tmp_path / "real" / "store.db")
        for _ in range(2):
            assert send(server.connect(), "POST", "/messages", "1")[0] == 201
        assert {path.name for path in tmp_path.iterdir()} == {"inlet.db", "real", "log"}  # the lock is of the real one
        server.kill()
    assert len(rows(server, "SELECT * FROM messages")) == 2


def test_a_database_or_wal_that_was_removed_is_never_written_to(client, store, tmp_path):
    assert client.post("messages", "1").status_code == 201
    os.unlink(f"{store.database.path}-wal")
    assert client.post("messages", "2").status_code == 201
    store.database.path.rename(tmp_path / "away")
    assert client.post("messages", "9").status_code == 503
    assert not store.database.path.exists()
    (tmp_path / "away").rename(store.database.path)
    assert client.post("messages", "3").status_code == 201
    assert [m["body"] for m in client.get("/messages").json["messages"]] == [1, 2, 3]


def test_a_database_that_was_replaced_is_read_and_written_anew(client, store, tmp_path):
    assert client.post("messages", "1").status_code == 201
    service.backup(store.database, tmp_path / "copy.db")
    assert client.post("messages", "2").status_code == 201
    assert len(client.get("/messages").json["messages"]) == 2
    os.replace(tmp_path / "copy.db", store.database.path)
    for name in ("wal", "shm"):
        os.unlink(f"{store.database.path}-{name}")
    assert client.post("messages", "3").status_code in (201, 503)
    assert client.post("messages", "3").status_code == 201
    bodies = [message["body"] for message in client.get("/messages").json["messages"]]
    assert bodies in ([1, 3], [1, 3, 3])


def test_a_restart_goes_on_with_the_next_id_whatever_was_deleted_and_is_read(store, open_store):
    append(store, "messages", "1")
    change(store, "DELETE FROM messages")
    with database_of(store) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM messages").fetchall()
        append(store, "messages", "2")
        with within(2):
            assert append(open_store(), "messages", "3") == 3


def test_it_refuses_a_database_in_utf_16_and_one_that_it_may_not_write(store, tmp_path, one_line_error):
    store.close()
    with open(tmp_path / "inlet.db", "r+b") as file:
        file.seek(18)  # https://www.sqlite.org/fileformat.html#file_format_version_numbers: not even root may write
        file.write(b"\x03")
    assert "inlet.db" in one_line_error()
    (tmp_path / "inlet.db").unlink()
    change(store, "PRAGMA encoding = 'UTF-16'", SCHEMA)
    assert "UTF-8" in one_line_error()


# Clients


@pytest.fixture
def hasty_clients(monkeypatch):
    """What the clients are is looked at after 0.05 s, not after 0.8 s."""
    monkeypatch.setattr(service, "CLIENTS_REFRESH_S", 0.05)


def basic(text):
    return "Basic " + base64.b64encode(text).decode()


@pytest.mark.parametrize("authorization", [
    "Bearer wrong", "Bearer", "Bearer ", f"Bearer {TOKEN}, Bearer {TOKEN}", f"Token {TOKEN}", TOKEN, "Bearer \xe9\xff",
    "Bearer " + "x" * 100_000, "Basic !!!", basic(b"no colon"), basic(b"\xff:\xff"), basic(f"{TOKEN}:x".encode()), None,
], ids=range(13))  # fmt: skip
def test_nobody_comes_in_without_a_token(authorization, client):
    for path in ("/", "/messages", "/messages/1", "/nothing"):
        answer = client.simulate_get(path, headers={"Authorization": authorization} if authorization else {})
        assert (answer.status_code, answer.headers["Content-Type"]) == (401, "application/problem+json")
        why = ', error="invalid_token"' if authorization else ""
        assert answer.headers["WWW-Authenticate"] == f'Bearer realm="inlet"{why}, Basic realm="inlet"'
        assert TOKEN not in answer.text


@pytest.mark.parametrize("authorization", [
    f"Bearer {TOKEN}", f"bearer  {TOKEN}", basic(f"any:{TOKEN}".encode()), basic(f":{TOKEN}".encode()).rstrip("="),
    basic(f"a:{TOKEN}".encode()).replace("Basic ", "basic  ").rstrip("="),
])  # fmt: skip
def test_a_token_comes_as_bearer_or_as_the_password_of_basic(authorization, client):
    assert client.simulate_get("/messages", headers={"Authorization": authorization}).status_code == 200


def test_wrong_tokens_cost_little_where_the_clients_are_slow_to_read(client, store, monkeypatch):
    """The server's loop looks a token up that it does not know: on a cluster, that is a request."""
    reader, reads = store.database.reader, []

    def slow(*arguments):
        reads.append(arguments)
        time.sleep(0.1)
        return reader(*arguments)

    monkeypatch.setattr(store.database, "reader", slow)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert client.get("/messages", Authorization="Bearer wrong").status_code == 401
    assert len(reads) <= 4


def test_the_clients_are_read_again_only_if_they_have_changed(open_store, monkeypatch):
    """50,000 tokens made a message take 241 ms each 0.8 s, and a wrong token 566 ms."""
    statements = watch(monkeypatch)
    store = open_store()
    client = client_of(store)

    def reads(token, name="Bearer"):
        statements.clear()
        monkeypatch.setattr(service, "CLIENTS_REFRESH_S", -1)  # each request looks
        status = client.get("/messages", Authorization=f"Bearer {token}").status_code
        return status, sum("FROM clients AS c" in sql and "c.token" in sql for sql in statements)

    assert reads(TOKEN)[0] == 200
    append(store, "messages", "1")
    assert [reads(TOKEN), reads("wrong")] == [(200, 0), (401, 0)]
    add_tester(store.database.path, "other", "new")
    assert [reads("new"), reads("new")] == [(200, 1), (200, 0)]
    change(store, "UPDATE clients SET can = 'write' WHERE name = 'other'")
    assert [reads("new"), reads("new")] == [(403, 1), (403, 0)]
    change(store, "DELETE FROM clients WHERE name = 'other'")
    assert [reads("new")[0], reads("new")[0]] == [401, 401]


def test_after_a_restore_a_token_that_is_removed_again_stops(hasty_clients, client, store, command, tmp_path):
    """A copy counts the changes of its clients on: the same number can mean something else."""
    add_tester(store.database.path, "bad", "bad")
    assert command("backup", tmp_path / "copy.db")[0] == 0
    add_tester(store.database.path, "new", "new")
    assert client.post("messages", "1", Authorization="Bearer bad").status_code == 201
    assert client.post("messages", "1", Authorization="Bearer new").status_code == 201
    (tmp_path / "copy.db").rename(store.database.path)
    assert command("client", "remove", "bad")[0] == 0
    eventually(lambda: client.post("messages", "2", Authorization="Bearer bad").status_code == 401, within_s=4)
    assert client.post("messages", "2", Authorization="Bearer new").status_code == 401
    assert client.post("messages", "2").status_code == 201


def test_a_restored_database_with_other_rules_is_not_served(client, open_store, store, command, tmp_path):
    """Each copy has the same number for its schema."""
    assert command("backup", tmp_path / "copy.db")[0] == 0
    (tmp_path / "copy.db").rename(store.database.path)
    eventually(lambda: client.post("messages", "1").status_code == 201)
    assert command("backup", tmp_path / "copy.db")[0] == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as db:
        (version,) = db.execute("PRAGMA schema_version").fetchone()
        db.execute("DROP INDEX messages_key")
        db.execute(f"PRAGMA schema_version = {version}")
    (tmp_path / "copy.db").rename(store.database.path)
    eventually(lambda: client.post("messages", "1").status_code == 503)
    assert client.post("messages", "1").status_code == 503


def test_a_backup_is_whole_also_right_after_a_restore(client, store, command, tmp_path):
    """Nobody has written since, so the WAL of the old database still stands beside the new one."""
    assert command("backup", tmp_path / "old.db")[0] == 0
    for _ in range(500):
        append(store, "messages", json.dumps("x" * 500))
    (tmp_path / "old.db").rename(store.database.path)
    assert command("backup", tmp_path / "copy.db")[0] == 0
    assert copied(tmp_path / "copy.db") == []
    eventually(lambda: client.post("messages", "1").status_code == 201)
    assert copied(store.database.path) == [1]


def test_a_backup_of_a_damaged_database_is_none(store, command, tmp_path):
    for _ in range(200):
        append(store, "messages", json.dumps("x" * 1000))
    store.close()
    with open(store.database.path, "r+b") as file:
        file.seek(40_000)
        file.write(b"\xff" * 8192)
    status, _, error = command("backup", tmp_path / "copy.db")
    assert (status, "damaged" in error or "malformed" in error) == (1, True)
    assert not (tmp_path / "copy.db").exists()


def test_a_generated_column_of_another_type_than_its_own_is_no_damage(open_store, command, tmp_path):
    """Older versions of SQLite do not ask it in STRICT tables. quick_check tells it, also before it tells damage."""
    store = open_store(stream_sql("messages", ", n INTEGER AS (body ->> 'n')") + stream_sql("x"))
    statuses = {client_of(store).post("messages", '{"n": 99999999999999999999}').status_code for _ in range(200)}
    assert statuses in ({201}, {422})  # SQLite 3.53 asks it
    assert command("backup", tmp_path / "copy.db") == (0, "", "")
    with database_of(store) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        db.execute("INSERT INTO x (received_at, client, body) VALUES ('t', 'c', 'no JSON')")
    status, _, error = command("backup", tmp_path / "other.db")
    assert (status, "CHECK constraint failed in x" in error) == (1, True)


def test_an_older_database_that_is_put_in_the_place_of_this_one_has_its_clients(hasty_clients, client, store, tmp_path):
    """It has no table that counts the changes of the clients."""
    assert client.get("/messages").status_code == 200
    with (
        database_of(store) as db,
        contextlib.closing(sqlite3.connect(tmp_path / "old.db", isolation_level=None)) as old,
    ):
        db.backup(old)
        for event in ("INSERT", "UPDATE", "DELETE"):
            old.execute(f"DROP TRIGGER IF EXISTS clients_after_{event}")
        old.executescript("PRAGMA journal_mode = WAL; DROP TABLE IF EXISTS clients_version; DELETE FROM clients")
        old.execute("INSERT INTO clients (name, token, can) VALUES ('old', ?, 'read')", (service.digest_of("old"),))
    (tmp_path / "old.db").rename(store.database.path)
    eventually(lambda: client.get("/messages", Authorization="Bearer old").status_code == 200, within_s=4)
    assert client.get("/messages").status_code == 401


def test_a_client_may_do_what_it_was_granted(store):
    for can, allowed in {
        "write": "write:messages write:readings", "read": "read:messages read:readings", "": "",
        "write:readings read:messages": "write:readings read:messages",
    }.items():  # fmt: skip
        token = f"may:{can}:"
        add_tester(store.database.path, token, token, can)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        client = client_of(store)  # which knows of the new one at once
        for method, action in (("POST", "write"), ("GET", "read")):
            for stream in ("messages", "readings"):
                answer = client.simulate_request(method, f"/{stream}", headers=headers, body=READING)
                if f"{action}:{stream}" in allowed:
                    assert answer.status_code in (200, 201)
                else:
                    challenge = f'error="insufficient_scope", scope="{action}:{stream}"'
                    assert (answer.status_code, challenge in answer.headers["WWW-Authenticate"]) == (403, True)
                    assert answer.json["stream"] == stream
        listed = client.simulate_get("/", headers=headers).json["streams"]
        assert {f"{action}:{name}" for name in listed for action in listed[name]["can"]} == set(allowed.split())


def test_a_database_of_before_1_1_keeps_its_clients(tmp_path, open_store, command):
    """Their table stood in schema.sql, written like this."""
    with contextlib.closing(sqlite3.connect(tmp_path / "inlet.db", isolation_level=None)) as db:
        old = "\n    name TEXT NOT NULL PRIMARY KEY,\n    token TEXT NOT NULL UNIQUE,  -- its digest\n    can TEXT NOT NULL\n"
        db.executescript(f"CREATE TABLE IF NOT EXISTS clients ({old}) STRICT;{SCHEMA}")
        db.execute("INSERT INTO messages (received_at, client, key, body) VALUES ('t', 'tester', 'k', '1')")
    add_tester(tmp_path / "inlet.db")
    client = client_of(open_store())
    assert client.post("messages", "1", Idempotency_Key="k").headers["Idempotent-Replayed"] == "true"
    assert client.post("messages", "1").json["id"] == 2
    assert command("client", "list")[1] == f"tester\t{service.digest_of(TOKEN)[:8]}\tunknown\twrite read\ttoken\n"


def test_a_token_is_replaced_by_another_of_the_same_client(hasty_clients, client, store, command):
    """Keys belong to the name, so that a replay still is one. A token that is new is looked for at once."""
    assert client.post("messages", "1", Idempotency_Key="k").status_code == 201
    _, token, _ = command("client", "add", "tester", "--can", "write")
    answer = client.post("messages", "1", Idempotency_Key="k", Authorization=f"Bearer {token.strip()}")
    assert (answer.status_code, answer.headers["Idempotent-Replayed"]) == (201, "true")
    assert client.get("/messages", Authorization=f"Bearer {token.strip()}").status_code == 403
    listed = [line.split("\t") for line in command("client", "list")[1].splitlines()]
    digests = {service.digest_of(TOKEN)[:8], service.digest_of(token.strip())[:8]}
    assert {(name, digest) for name, digest, *_ in listed} == {("tester", digest) for digest in digests}
    assert command("client", "remove", "tester", service.digest_of(TOKEN)[:8]) == (0, "", "")
    eventually(lambda: client.get("/messages").status_code == 401, within_s=3)
    assert client.post("messages", "2", Authorization=f"Bearer {token.strip()}").status_code == 201


def test_the_database_can_be_read_by_its_owner_only(tmp_path, open_store):
    """It may hold secrets."""
    store = open_store()
    append(store, "messages", "1")
    for name in ("inlet.db", "inlet.db-wal", "inlet.db-shm", "inlet.db-lock"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
    (tmp_path / "inlet.db").chmod(0o640)  # and what its owner has chosen stays
    open_store()
    assert stat.S_IMODE((tmp_path / "inlet.db").stat().st_mode) == 0o640
    for name in ("inlet.db", "inlet.db-wal", "inlet.db-shm"):  # as versions before 1.1 have left it
        (tmp_path / name).chmod(0o644)
    open_store()
    for name in ("inlet.db", "inlet.db-wal", "inlet.db-shm"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name


# Statistics


def test_the_log_names_refusals_and_counts_the_rest(store, server):
    with contextlib.closing(server.connect()) as connection:
        for _ in range(300):
            assert send(connection, "POST", "/readings", "{}")[0] == 422
        assert send(connection, "GET", "/nothing%0aat%20all")[0] == 404
        time.sleep(1.1)
        behind = {"X_Forwarded_For": "192.0.2.7\\n", "Idempotency_Key": "k" * 100}
        assert send(connection, "POST", "/readings?a%0ab=1", "no", **behind)[0] == 400
        assert send(connection, "GET", "/" + "%00" * 1000)[0] == 404
    refused = [line for line in server.log.splitlines() if " inlet INFO " in line]
    assert "422 to 'tester' at '/readings': 'sensor is required' (from 127.0.0.1)" in refused[0]
    assert re.search(
        r"400 to 'tester' at .* \(from 127.0.0.1, X-Forwarded-For claims '192\S+, key 'k{63}\)", server.log
    )
    assert max(map(len, server.log.splitlines())) < 400
    assert sum(" 422 to " in line for line in refused) < 60
    counted = [int(n) for n in re.findall(r"and (\d+) more such lines", server.log)]
    assert sum(counted) + sum(" to 'tester' at " in line for line in refused) == 303
    assert all(line[:2] == "20" for line in server.log.splitlines())  # no line breaks from outside
    assert TOKEN not in server.log


def test_no_kind_of_line_comes_more_than_ten_times_a_second(store, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    now = [time.monotonic() + 10]
    monkeypatch.setattr(service.time, "monotonic", lambda: now[0])
    service.line_limit.tell()
    for n in range(50):
        service.log.error("no room for %d", n)
        service.log.info("refused %d", n)
        service.log.critical("damaged")
    now[0] += 2
    service.line_limit.tell()
    assert [sum(line.startswith(word) for line in caplog.messages) for word in ("no room", "refused", "damaged")] == [
        10,
        10,
        1,
    ]
    assert {"and 40 more such lines: refused ...", "and 40 more such lines: no room for ..."} <= set(caplog.messages)
    now[0] += 60
    service.log.critical("damaged")
    assert caplog.messages.count("damaged") == 2


def test_the_log_says_what_came_in_a_minute(store, caplog, monkeypatch):
    client = client_of(store)
    for body in (READING, "{}", READING):
        client.post("readings", body)
    caplog.set_level(logging.INFO)
    now = time.monotonic()
    monkeypatch.setattr(service.time, "monotonic", lambda: now + 61)
    store.statistics.tell()
    store.statistics.tell()
    monkeypatch.setattr(service.time, "monotonic", lambda: now + 200)  # a minute in which nothing came
    store.statistics.tell()
    told = [record.message for record in caplog.records if "minute" in record.message]
    assert [line[: line.index("slowest")] for line in told] == ["in a minute: 2 requests stored, 1 refused, 0 failed; "]


# Reading requests


def reading(**members):
    return json.dumps({"sensor": "a-17", "value": 1} | members)


def refusals():
    """Every refusal of a POST: what is sent, the status, words in the answer, its members."""
    r = "readings"
    yield "no member", r, '{"value": 1}', {}, 422, ["sensor is required"], {"stream": r}
    yield "not an object", r, "[1, 2]", {}, 422, ["sensor is required"], {}
    yield "named check", r, reading(value=61), {}, 422, ["value must be between -90 and 60"], {}
    yield "unnamed check", r, reading(note="0123456789"), {}, 422, ["breaks a rule"], {}
    yield "type", r, reading(weight="x"), {}, 422, ["cannot store TEXT value in INTEGER column weights.n"], {}
    yield "foreign key", r, reading(sensor="c"), {}, 422, ["does not exist"], {}
    yield "trigger", r, reading(note="monday"), {}, 422, ["there is no reading on mondays"], {}
    yield "overflow", r, reading(size=-(2**63)), {}, 422, ["cannot be applied"], {}
    yield "unnamed unique", r, reading(lot="L"), {}, 409, ["the same lot"], {}
    yield "named unique", r, reading(batch="B"), {}, 409, ["one reading for each batch"], {"stream": r}
    yield "key of another body", r, READING, {"Idempotency_Key": "used"}, 422, ["another body"], {}
    for name, key in {"empty": "", "space": "a b", "long": "k" * 256, "ä": "ä", "quotes": '""', "list": "a, b"}.items():
        yield f"key: {name}", r, READING, {"Idempotency_Key": key}, 400, ["Idempotency-Key", "255"], {}
    kinds = ["application/json", "application/*+json", *service.NDJSON_TYPES]
    accepted = {"accepted": kinds + ([service.FORM] if service.extra("senders") else [])}
    for kind in (None, "text/plain", "multipart/form-data; boundary=x", "application/jsonp", "text/json",
                 "application/json; charset=latin-1", "", "json", "application/json" + ";" * 15_000,
                 "application/json; charset=" + '"' * 15_000):  # fmt: skip
        yield f"type {str(kind)[:40]}", r, READING, {"Content_Type": kind}, 415, ["application/json"], accepted
    yield "too large", r, '"' + "x" * 100_000 + '"', {}, 413, ["100000 bytes"], {"limit": 100_000}
    yield "cut short", r, READING, {"Content_Length": "1000"}, 400, ["cut short", "of 1000 bytes"], {}
    for coding in ("br", "deflate", "gzip, gzip", "zstd"):
        yield f"coding {coding}", r, READING, {"Content_Encoding": coding}, 415, ["gzip"], {"accepted": ["gzip"]}
    yield "not gzip", r, READING, {"Content_Encoding": "gzip"}, 400, ["not gzip"], {}
    good = READING + "\n"
    yield "batch: empty", r, "\n\r\n", BATCH, 400, ["empty"], {}
    yield "batch: bad line", r, good * 2 + '{"a": nul}\n', BATCH, 400, ["line 3 column 7"], {"line": 3, "column": 7}
    yield "batch: behind blank lines", r, f"\n{good} \r\n\n{{}}", BATCH, 422, ["is required"], {"line": 5}
    yield "batch: byte-order mark", r, "\ufeff" + good, BATCH, 400, ["a byte-order mark, line 1 column 1"], {"line": 1}
    for blank in "\xa0\x1f\u2028":
        yield f"batch: no blank line {blank!r}", r, f"{good}{blank}\n", BATCH, 400, ["line 2 column 1"], {"line": 2}
    yield "byte-order mark", r, "\ufeff" + good, {}, 400, ["a byte-order mark, line 1 column 1"], {"line": 1}
    yield "batch: one value on two lines", r, '{"sensor":\n "a-17"}', BATCH, 400, ["line 1"], {"line": 1}
    yield "batch: two values on a line", r, READING + READING, BATCH, 400, ["Extra data, line 1"], {"line": 1}
    yield "batch: depth", r, good + "[" * 600 + "]" * 600, BATCH, 400, ["nested", "line 2 column 513"], {"line": 2}
    yield "batch: first line", r, "{}\n" + good, BATCH, 422, ["sensor is required"], {"line": 1, "stream": r}
    yield "batch: refused line", r, good * 3 + reading(value=99), BATCH, 422, ["-90 and 60"], {"line": 4, "stream": r}
    yield "batch: colliding lines", r, (reading(lot="M") + "\n") * 2, BATCH, 409, ["same lot"], {"line": 2}
    yield "batch: trigger", r, good + reading(note="monday") + "\n" + good, BATCH, 422, ["on mondays"], {"line": 2}
    used_key = BATCH | {"Idempotency_Key": "used"}
    yield "batch: key of another body", r, good * 2, used_key, 422, ["another body"], {}
    yield "batch: too many", r, "1\n" * 10_001, BATCH, 413, ["10000 lines"], {"limit": 10_000}
    yield "batch: too many with blank lines", r, "\n" * 10_001 + "1", BATCH, 413, ["10000 lines"], {"limit": 10_000}
    yield "bad JSON", r, '{"a": 1,\n "b": tru}', {}, 400, ["line 2 column 7"], {"line": 2, "column": 7}
    yield "no token", r, READING, {"Authorization": None}, 401, ["Bearer"], {}
    yield "bad token", r, READING, {"Authorization": "Bearer nonsense"}, 401, ["not valid"], {}
    yield "no such stream", "nothing", READING, {}, 404, ["nothing at this path"], {}
    yield "not a stream", "sensors", READING, {}, 404, ["nothing at this path"], {}
    yield "a slash too much", "/readings", READING, {}, 404, ["nothing at this path"], {}
    yield "method", "readings/1", READING, {}, 405, ["method"], {}


@pytest.mark.parametrize(
    ("stream", "body", "headers", "status", "words", "members"),
    [pytest.param(*refusal, id=name) for name, *refusal in refusals()],
)
def test_it_refuses(stream, body, headers, status, words, members, any_client, any_store):
    client, store = any_client, any_store
    used = '{"sensor": "a-17", "value": 1, "lot": "L", "batch": "B"}'
    assert client.post("readings", used, Idempotency_Key="used").status_code == 201
    before = rows(store), rows(store, "SELECT * FROM counts")

    answer = client.post(stream, body, **headers)

    assert answer.status_code == answer.json["status"] == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["title"]
    assert all(word in answer.json["detail"] for word in words), answer.json
    assert members.items() <= answer.json.items()
    assert (rows(store), rows(store, "SELECT * FROM counts")) == before
    for secret in (TOKEN, "INSERT", "length(note)", "0123456789", "monday'"):
        assert secret not in answer.text


def json_traps():
    """Texts at the edge of RFC 8259: are they JSON?"""
    yes = {
        "whole number": "7", "string": '"x"', "null": "null", "white space around": " \t\r\n{} \r\n", "1e999": "1e999",
        "-1e999": "[-1e999]", "1.10": "1.10", "-0": "-0", "10,000 digits": "1" * 10_000, "a long fraction": "0." + "1" * 5000,
        "duplicate members": '{"a": 1, "a": 2}', "escaped lone surrogate": r'"\ud800"', "escaped NUL": r'"\u0000"',
        "surrogate in a name": r'{"\udc00": 1}', "DEL": '"\x7f"', "U+2028": '"\u2028"', "noncharacter": '"\uffff"',
        "empty name": '{"": 0}', "escaped slash": r'"\/"', "depth 512": "[" * 512 + "]" * 512, "brackets in a string": '"' + "[{" * 600 + '"',
        "many small arrays": "[" + ",".join(["[]"] * 2000) + "]", "emoji": '"\U0001f600"', "BOM inside": '"\ufeff"',
    }  # fmt: skip
    no = {
        "NaN": "NaN", "NaN inside": '["NaN", NaN]', "Infinity": "Infinity", "-Infinity": "-Infinity", "NUL after": '{"a":1}\0garbage',
        "NUL": "\0", "depth 100,000": "[" * 100_000, "depth 513": "[" * 513 + "]" * 513, "depth of objects": '{"a":' * 600 + "1" + "}" * 600,
        "BOM": "\ufeff{}", "empty": "", "only white space": " \n ", "raw newline": '"a\nb"', "raw tab": '"a\tb"', "raw NUL": '"a\0b"',
        "unclosed": '{"a": 1', "unclosed string": '"abc', "trailing comma": "[1,]", "comment": "{} // no", "single quotes": "{'a': 1}",
        "leading zero": "01", "plus": "+1", "hex": "0x1", "bare point": "1.", "no point": ".5", "two values": "1 2", "True": "True",
        "bad escape": r'"\x41"', "short escape": r'"\u12"', "no-break space": "\xa0{}", "form feed": "\f{}", "name without quotes": "{a: 1}",
        "Arabic digits": "١", "underscore": "1_000", "lone minus": "-", "bare word": "nul", "BOM after": "{}\ufeff",
        "array as a name": '{["a"]:1}', "object as a name": '{{"x":"y"}\n\t:[1]}', "array as a name inside": '[{"a":{"b":1,[1,["c"]] :2}}]',
    }  # fmt: skip
    for name, text in yes.items():
        yield pytest.param(text.encode("utf-8", "surrogatepass"), True, id=f"yes: {name}")
    for name, text in no.items():
        yield pytest.param(text.encode("utf-8", "surrogatepass"), False, id=f"no: {name}")
    yield pytest.param(b'"\xed\xa0\x80"', False, id="no: raw lone surrogate")
    yield pytest.param(b'"\xc0\xaf"', False, id="no: overlong")
    yield pytest.param(b'"\xf4\x90\x80\x80"', False, id="no: past U+10FFFF")
    yield pytest.param('"x"'.encode("utf-16"), False, id="no: UTF-16")
    for character in ("é", "€", "😀"):
        encoded = character.encode()
        for at in range(len(encoded)):
            for bad in (b"\xff", b"\x80", b'"', b"a", b""):
                broken = encoded[:at] + bad + encoded[at + 1 :]
                if broken.decode(errors="ignore").encode() != broken:
                    yield pytest.param(b'"' + broken + b'"', False, id=f"no: {character} with {bad!r} at {at}")


@pytest.mark.parametrize(("data", "is_json"), list(json_traps()))
def test_it_takes_json_as_rfc_8259_has_it_and_nothing_else(data, is_json, any_client, any_store):
    client, before = any_client, rows(any_store, "SELECT count(*) FROM messages")
    answer = client.post("messages", data, Content_Length=str(len(data)))
    if is_json:
        assert answer.status_code == 201
        number = answer.json["id"]
        page = client.get(f"/messages?after={number - 1}").content
        assert page.startswith(b'{"messages": [{"id": %d, ' % number)
        assert page.endswith(b'"body": %b}], "next": "/messages?after=%d"}' % (data, number))
        assert client.get(f"/messages/{number}").content.endswith(b'"key": null, "body": ' + data + b"}")
        assert rows(any_store, f"SELECT CAST(body AS BLOB) FROM messages WHERE id = {number}") == [(data,)]
    else:
        assert answer.status_code == 400
        assert {"line", "column"} <= answer.json.keys()
        assert rows(any_store, "SELECT count(*) FROM messages") == before


@pytest.mark.parametrize(("data", "line", "column"), [
    (b"{}\n\n  x", 3, 3), ("é€😀x".encode(), 1, 1), (b'["abc\xff"]', 1, 6), (b'{"a": 1,\n"b": NaN}', 2, 6), (b"", 1, 1),
    (b'["NaN", "Infinity \\" NaN",\n-Infinity]', 2, 1), (b"[\n" * 513 + b"]" * 513, 513, 1),
    (b'{"[[":"\\"[",\n "a":' + b"[{}," * 511 + b"1" + b"]" * 511 + b"}", 2, 2047),
], ids=range(8))  # fmt: skip
def test_it_says_where_a_body_stops_being_json(data, line, column, any_client):
    answer = any_client.post("messages", data, Content_Length=str(len(data)))
    assert (answer.status_code, answer.json["line"], answer.json["column"]) == (400, line, column)


@pytest.mark.parametrize("text", [
    "[" + "[]," * 340_000 + "[]]", "[[],[]," * 140_000, '"' * 1_000_000, '"\\' * 500_000, "[" * 600 + '"\\"' * 300_000,
    '["' + "[" * 1_000_000, "[" + "[],[]," * 170_000 + "-Infinity", "[" + '"",' * 340_000 + "NaN", "N" * 1_000_000,
], ids=range(9))  # fmt: skip
def test_no_text_takes_long_to_read(text, store):
    """However little of gzip it comes in. The first takes longest: 0.3 s, most of it in Python's json and SQLite."""
    client, data = client_of(store), gzip.compress(text.encode(), 1)
    started = time.process_time()
    answer = client.post("messages", data, Content_Encoding="gzip")
    assert time.process_time() - started < 3
    assert answer.status_code == (201 if text.endswith("]]") else 400)


def test_random_bytes_are_refused_alike_by_sql_and_by_python(open_store):
    """A stream without CHECK (json_valid(body)) leaves the check to Python."""
    client = client_of(open_store(stream_sql("messages") + NOBODY_CHECKS.replace("messages", "loose")))
    alphabet = [*map(str.encode, '{}[],:"\\1- \n\0a'), b"e9", b"true", b"\xff", b"NaN"]
    chosen, statuses = random.Random(1), set()
    for _ in range(1000):
        data = b"".join(chosen.choices(alphabet, k=chosen.randint(0, 12)))
        sent = [client.post(stream, data, Content_Length=str(len(data))) for stream in ("messages", "loose")]
        kinds = {(answer.status_code, answer.json.get("detail"), answer.json.get("column")) for answer in sent}
        assert len(kinds) == 1
        statuses.add(sent[0].status_code)
    assert statuses == {201, 400}


@pytest.mark.parametrize(("lines", "status", "line"), [
    ([READING, "nul", "{}"], 400, 2), ([READING, "{}", "nul"], 422, 2), ([READING, "", "{}", '"' + "x" * 20_000], 400, 4),
    ([READING] * 600 + ['{"a": ' + "[" * 600 + "]" * 600 + "}"], 400, 601), ([READING] * 3 + ["[1]\0"], 400, 4),
], ids=range(5))  # fmt: skip
def test_of_a_batch_the_first_line_that_is_refused_is_told(lines, status, line, client, store):
    """But what is large, deep, or has a NUL is seen before."""
    answer = client.post("readings", "\n".join(lines), **BATCH, Idempotency_Key="k")
    assert (answer.status_code, answer.json["line"]) == (status, line)
    assert rows(store) == []


def test_what_is_no_json_is_told_so_also_when_nothing_can_be_written(client, store, monkeypatch):
    """Or its sender would try again, for as long as a disk is full."""

    def fail(deadline):
        raise OSError("there is no disk")

    monkeypatch.setattr(store.database, "transaction", fail)
    assert [client.post("messages", body).status_code for body in ("nul", "1")] == [400, 503]


def test_a_refusal_tells_no_large_text_apart_while_others_wait(client, store, monkeypatch):
    """A client that sends only such texts, or a retry of one, would hold up everybody, in each process."""
    large, small = json.dumps({"sensor": "a-17", "value": 1, "lot": "L", "pad": "x" * 20_000}), reading(lot="L")
    assert client.post("readings", large, Idempotency_Key="k").status_code == 201
    seen, require_json = [], service.require_json

    def noted(text, *line):
        seen.append((len(text), bool(store._group)))
        return require_json(text, *line)

    monkeypatch.setattr(service, "require_json", noted)
    assert client.post("readings", large, Idempotency_Key="k").status_code == 201
    bodies = (large, small, large[:-1], small[:-1])
    assert [client.post("readings", body).status_code for body in bodies] == [409, 409, 400, 400]
    assert [what for what in seen if what[1]] == [(len(small), True), (len(small) - 1, True)]


def test_what_is_refused_does_not_stay_in_memory(store):
    gc.collect()
    gc.disable()
    try:
        sent = {"messages": ["nul", "NaN"], "readings": ["{}", reading(lot="L"), reading(lot="L")]}
        for stream, bodies in sent.items():
            store.queue.extend(entry(store, stream, body) for body in bodies)
        store.write()
        assert not any(isinstance(each, service.Entry) for each in gc.get_objects())
    finally:
        gc.enable()


ODD_RULE = ", value TEXT AS (json_extract(body -> 'new', body ->> 'field'))"
ODD_FIELDS = ('{"field": "nope", "new": {}}', r'{"field": "\ud800", "new": {}}')


@pytest.mark.parametrize("headers", [{}, BATCH, BATCH | {"Prefer": "handling=lenient"}])
def test_a_message_whose_error_is_not_utf_8_fails_alone(headers, open_store, caplog):
    """SQLite quotes the path, and Python raises UnicodeDecodeError in place of an sqlite3.Error."""
    store = open_store(stream_sql("messages", ODD_RULE) + stream_sql("x"))
    client = client_of(store)
    for body in ODD_FIELDS:
        answer = client.post("messages", body, **headers)
        told = answer.json["refused"][0] if "Prefer" in headers else answer.json
        assert (told["status"], told["detail"]) == (422, "A rule of this stream cannot be applied to the message")
    entries = [entry(store, "x", "1"), entry(store, "messages", ODD_FIELDS[1]), entry(store, "x", "2")]
    assert commit_together(store, *entries) == [1, 422, 2]
    assert "unexpected" not in caplog.text


def test_the_log_says_why_a_rule_cannot_be_applied(open_store, caplog):
    caplog.set_level(logging.INFO)
    client = client_of(open_store(stream_sql("messages", ", here TEXT AS (datetime(received_at, 'localtime'))")))
    assert client.post("messages", "{}").status_code == 422
    assert "cannot be applied to the message: non-deterministic use of datetime()" in caplog.text


def test_a_failure_to_read_the_clients_counts_for_the_stream(store, monkeypatch):
    """So that there is an alert."""
    clients = service.Clients(store, 1000)
    client = Client(service.create_app(store, clients))
    client.post("messages", "1")
    monkeypatch.setattr(clients, "_failure", TimeoutError())
    monkeypatch.setattr(clients, "_read_at", math.inf)
    assert client.post("messages", "1").status_code == 503
    assert client.get("/nothing").status_code == 503
    assert (store.statistics.answers["messages", 503], store.statistics.answers["", 503]) == (1, 1)


def test_a_view_whose_error_quotes_a_message_says_so_without_it(open_store, caplog):
    columns = "SELECT id, received_at, client, key, body FROM messages WHERE"
    view = f"CREATE VIEW cheap AS {columns} json_extract(body, body ->> 'field') < 10;"
    client = client_of(open_store(stream_sql("messages") + view))
    for field in (r"\ud800", "hunter2 " * 20_000):
        assert client.post("messages", f'{{"field": "{field}"}}').status_code == 201
        assert client.get("/cheap").status_code == 503
        assert client.get("/").json["views"]["cheap"]["last_id"] is None
    assert "the view cheap cannot be read" in caplog.text
    assert ("hunter2" in caplog.text, "unexpected" in caplog.text) == (False, False)


@pytest.mark.parametrize("text", [
    r'1\u0000}], \"next\": \"/messages?after=999999\", \"x\": [{', r'{[\"a\"]: 1}', r'{\"a\": 1, {\"x\": \"y\"} : 2}',
    "[" * 1100 + r'{[\"a\"]: 1}' + "]" * 1100,
], ids=range(4))  # fmt: skip
def test_no_text_that_only_json_valid_takes_gets_into_the_json_of_a_page(text, open_store):
    """It does not look behind a NUL, which ->> gives since 3.43; before 3.42, an array could be the name of a member."""
    copied = (
        "INSERT INTO other (received_at, client, body) VALUES (NEW.received_at, NEW.client, NEW.body ->> 'payload');"
    )
    store = open_store(
        stream_sql("messages") + stream_sql("other", ", headers TEXT")
        + f"CREATE TRIGGER copy AFTER INSERT ON messages BEGIN {copied} END;"
        "CREATE VIEW payloads AS SELECT id, received_at, client, key, body ->> 'payload' AS body FROM messages;"
        "CREATE VIEW heads AS SELECT id, received_at, client, key, '1' AS body, body ->> 'payload' AS headers FROM messages;"
    )  # fmt: skip
    client = client_of(store)
    assert client.post("messages", f'{{"payload": "{text}"}}').status_code in (201, 422)
    for name in ("payloads", "heads", "other"):
        for message in client.get(f"/{name}").json["messages"]:
            assert client.get(f"/{name}/{message['id']}/body").json == message["body"]
        assert client.get(f"/{name}").json.keys() == {"messages", "next"}


def test_a_batch_is_not_stored_twice_when_it_is_sent_again_as_a_lenient_one(client, store):
    for number, body in enumerate(('{"a":1}\n\n{"a":2}', '\n{"a":1}\n{"a":2}')):
        both = BATCH | {"Idempotency_Key": f"k{number}"}
        assert client.post("messages", body, **both).status_code == 201
        again = client.post("messages", body, Prefer="handling=lenient", **both)
        stored = rows(store, f"SELECT count(*) FROM messages WHERE key GLOB 'k{number}*'")
        assert (again.status_code in (201, 422), stored) == (True, [(2,)])


@pytest.mark.parametrize(
    "index", ["", "CREATE INDEX by_client ON messages (client);", "CREATE INDEX c ON messages (client, received_at);"]
)
def test_a_key_is_looked_up_by_its_own_index_whatever_others_there_are(index, open_store):
    store = open_store(stream_sql("messages") + index)
    for each in (entry(store, "messages", "1", key="k"), entry(store, "messages", "1", key="k", refused=[], lines=[1])):
        sql, values = service.stored_under_key(each)
        with database_of(store) as db:
            plan = [step[3] for step in db.execute(f"EXPLAIN QUERY PLAN {sql}", values) if " t USING" in step[3]]
        assert len(plan) == 2
        assert all("INDEX messages_key (client=? AND key" in step for step in plan)


def test_a_report_can_have_the_smallest_id_that_there_is(open_store):
    client = client_of(
        open_store(stream_sql("messages") + "CREATE VIEW numbers AS SELECT body ->> 'n' AS id FROM messages;")
    )
    for n in (-(2**63), -(2**63), 5):
        client.post("messages", f'{{"n": {n}}}')
    page = client.get("/numbers?limit=1")
    assert page.status_code == 200
    assert client.get(page.json["next"]).json["rows"] == [{"id": 5}]


def test_a_database_whose_link_leads_elsewhere_takes_nothing(store, tmp_path):
    link, copy = tmp_path / "link.db", tmp_path / "copy.db"
    link.symlink_to(store.database.path)
    linked = service.Store(service.Database(link), store.schema)
    assert append(linked, "messages", "1") == 1
    service.backup(linked.database, copy)
    copy.replace(link)

    def is_refused():
        with pytest.raises(service.Problem, match="cannot be used"):
            append(linked, "messages", "2")
        return True

    linked.database._last_look = ()  # it looks once a second
    assert is_refused()
    assert rows(store, "SELECT count(*) FROM messages") == [(1,)]


def test_root_writes_nothing_where_a_link_in_place_of_the_lock_leads(store, tmp_path):
    store.close()
    secret, lock = tmp_path / "secret", Path(f"{store.database.path}-lock")
    secret.write_text("x")
    lock.unlink()
    lock.symlink_to(secret)
    with pytest.raises(OSError, match="symbolic"), service.Database(store.database.path)._lock_file():
        pass
    lock.unlink()
    lock.symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="symbolic"), service.Database(store.database.path)._lock_file():
        pass
    assert (secret.read_text(), (tmp_path / "new").exists()) == ("x", False)


def test_an_entry_without_a_message_is_no_malformed_one(store):
    assert service.malformed(service.Entry(store.schema.streams["messages"])) is None


@pytest.mark.parametrize("name", ["messages", "Messages"])
def test_who_serves_takes_nothing_when_a_stream_no_longer_checks_json(name, client, store, caplog):
    without = NOBODY_CHECKS.replace("EXISTS messages", f"EXISTS {name}")
    change(store, "DROP TABLE messages", without)
    store.schema.path.write_text(store.schema.path.read_text().replace(stream_sql("messages"), without))
    store._schema_look_at = 0  # a second later
    assert [client.post("messages", body).status_code for body in ("nul", "1")] == [400, 503]
    assert rows(store, "SELECT * FROM messages") == []
    assert "takes messages in another way: start the service again" in caplog.text
    client = client_of(service.Store(store.database, service.read_schema(store.schema.path)))
    assert [client.post(name, body).status_code for body in ("nul", "1")] == [400, 201]


CHUNKS = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}


@pytest.mark.parametrize(("body", "environ", "status"), [
    (b"[1, 2, 3]", {"CONTENT_LENGTH": "9"}, 201), (b"[1, 2, 3]", CHUNKS, 201), (b"[1, 2, 3] ", CHUNKS, 413), (b"1", {}, 411),
    (b"1", {"wsgi.input_terminated": True}, 411), *[(b"1", {"CONTENT_LENGTH": n}, 400) for n in ("-5", "1_0", "2 ", "٣", "3")],
    (b"1", {"CONTENT_LENGTH": "9" * 5000}, 413), (b"1", {"CONTENT_LENGTH": "10"}, 413),
    (b"1", CHUNKS | {"SERVER_SOFTWARE": "Granian"}, 411), (b"1", {"CONTENT_LENGTH": "1", "SERVER_SOFTWARE": "Granian"}, 201),
], ids=range(14))  # fmt: skip
def test_it_reads_exactly_the_body_that_was_announced(body, environ, status, store):
    headers = AUTHORIZATION | {"Content-Type": "application/json"}
    common = falcon.testing.create_environ("/messages", method="POST", headers=headers)
    for name in ("CONTENT_LENGTH", "wsgi.input_terminated"):
        common.pop(name, None)
    app, started, stream = service.create_app(store, service.Clients(store, 9)), [], io.BytesIO(body)
    trickle = types.SimpleNamespace(read=lambda size: stream.read(min(size, 3)))  # as some servers hand it on
    app(common | {"wsgi.input": trickle} | environ, lambda line, *_: started.append(int(line.split()[0])))
    assert started == [status]


@pytest.mark.parametrize("error", [OSError, TimeoutError, ConnectionResetError])
@pytest.mark.parametrize("environ", [{"CONTENT_LENGTH": "9"}, {"CONTENT_LENGTH": "9000000"}, CHUNKS])
def test_what_breaks_off_is_never_stored(error, environ, client, store):
    """As servers tell of a client that has gone, or of chunks that are malformed."""
    sent = iter([b"1\n", error()])

    def read(size):
        if isinstance(piece := next(sent), Exception):
            raise piece
        return piece

    common = falcon.testing.create_environ("/messages", method="POST", headers=AUTHORIZATION | in_http(BATCH))
    common.pop("CONTENT_LENGTH", None)
    started = []
    broken = environ | {"wsgi.input": types.SimpleNamespace(read=read)}
    client.app(common | broken, lambda line, *_: started.append(int(line.split()[0])))
    assert started == [400]
    assert rows(store, "SELECT * FROM messages") == []


def test_it_takes_every_json_type_and_gzip(client, store):
    for kind in [
        "json; charset=utf-8",
        'JSON; charset="UTF-8"',
        "json;charset=utf8",
        "json; charset=US-ASCII",
        "a+json",
    ]:
        assert client.post("messages", "0", Content_Type=f"application/{kind}").status_code == 201, kind
    for coding in ("gzip", "GZIP", "x-gzip"):
        assert client.post("messages", gzip.compress(b'{"a":\t1.10}'), Content_Encoding=coding).status_code == 201
        assert client.post("messages", gzip.compress(b"1\n2\n"), Content_Encoding=coding, **BATCH).json["count"] == 2
    for coding in ("identity", ""):
        assert client.post("messages", "3", Content_Encoding=coding).status_code == 201
    assert [row[4] for row in rows(store, "SELECT * FROM messages")][5:] == ['{"a":\t1.10}', "1", "2"] * 3 + ["3"] * 2


@pytest.mark.parametrize(("data", "status"), [
    (gzip.compress(json.dumps("x" * 99_998).encode()), 201), (gzip.compress(json.dumps("x" * 99_999).encode()), 413),
    (gzip.compress(b"{}")[:-1], 400), (gzip.compress(b"{}")[:-8] + bytes(8), 400), (gzip.compress(b"{}") + b"x", 400),
    (gzip.compress(b"1 ") * 100, 400), (gzip.compress(b" ") * 99 + gzip.compress(b"1"), 201), (gzip.compress(b"1") * 101, 400),
    (gzip.compress(b'"') + gzip.compress(b'x"'), 201), (gzip.compress(b"1" * 50_000) * 3, 413),
    (gzip.compress(b"1") + gzip.compress(b"2")[:-1], 400), (gzip.compress(b""), 400), (zlib.compress(b"{}"), 400), (b"\x1f\x8b", 400), (b"", 400),
], ids=range(15))  # fmt: skip
def test_gzip_is_whole_and_within_the_limit_or_refused(data, status, client, store):
    answer = client.post("messages", data, Content_Encoding="gzip", Content_Length=str(len(data)))
    assert answer.status_code == status
    assert len(rows(store, "SELECT * FROM messages")) == (status == 201)


def test_a_gzip_bomb_costs_neither_memory_nor_time(store):
    """1 MiB that would unpack to more than 600 MiB."""
    packer = zlib.compressobj(9, wbits=31)
    start = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    bomb = start + (packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)) * (1_000_000 // len(start))
    assert 900_000 < len(bomb) < 2**20
    client = client_of(store)
    tracemalloc.start()
    started = time.process_time()
    answer = client.post("messages", bomb, Content_Encoding="gzip")
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    assert time.process_time() - started < 0.5
    assert answer.status_code == 413


# Resources: POST


def test_it_takes_a_message_and_a_batch(client, store):
    answer = client.post("readings", READING)
    assert (answer.status_code, answer.json) == (201, {"id": 1, "received_at": NOW})
    assert answer.headers["Location"] == "/readings/1"
    assert answer.headers["Content-Type"] == "application/json"
    lines = [reading(value=n) for n in range(3)]
    blank = "\n \r\n\n"
    answer = client.post("readings/", blank + f"\r\n{blank}".join(lines) + blank, **BATCH)
    assert (answer.status_code, answer.json) == (201, {"count": 3, "first_id": 2, "last_id": 4, "received_at": NOW})
    first, *batch = rows(store, "SELECT id, received_at, client, key, body, sensor, value FROM readings")
    assert first == (1, NOW, "tester", None, READING, "a-17", 21.5)
    assert [row[4] for row in batch] == lines
    assert rows(store, "SELECT * FROM counts") == [("a-17", 4)]


def test_a_key_replays_the_first_answer(client, store):
    first = client.post("readings", READING, Idempotency_Key="k-1")
    assert "Idempotent-Replayed" not in first.headers
    client.post("readings", READING)
    for header in ("k-1", '"k-1"'):
        again = client.post("readings", READING, Idempotency_Key=header)
        assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
        assert (again.json, again.headers["Location"]) == (first.json, first.headers["Location"])
    assert client.post("readings", READING + " ", Idempotency_Key="k-1").status_code == 422  # another body
    for _ in range(2):  # a lot that is used: by this very message
        assert client.post("readings", reading(lot="8"), Idempotency_Key="lot").json["id"] == 3
    assert client.post("readings", "{}", Idempotency_Key="free").status_code == 422
    assert client.post("readings", READING, Idempotency_Key="free").json["id"] == 4  # a refusal uses up nothing
    assert [row[3] for row in rows(store)] == ["k-1", None, "lot", "free"]


def test_a_batch_replays_as_one_and_says_if_it_was_partly_deleted(client, store):
    batch = BATCH | {"Idempotency_Key": "b"}
    first = client.post("messages", "1\n2\n3\n", **batch)
    client.post("messages", "4")
    again = client.post("messages", "1\r\n2\n3", **batch)
    assert (again.status_code, again.json, again.headers["Idempotent-Replayed"]) == (201, first.json, "true")
    for other in ("1\n2\n", "1\n2\n3\n4\n", "1\n", "1\n3\n2\n", "4\n"):
        assert client.post("messages", other, **batch).status_code == 422
    assert client.post("messages", "1", Idempotency_Key="b").status_code == 422
    assert client.post("messages", "1", Idempotency_Key="b!").status_code == 201  # sorts next to the lines of b
    assert client.post("messages", "1\n2\n3\n", **batch).json == first.json
    stored = [("b", "1"), ("b 2", "2"), ("b 3", "3"), (None, "4"), ("b!", "1")]
    assert rows(store, "SELECT key, body FROM messages") == stored
    for gone in ("b 2", "b"):
        change(store, f"DELETE FROM messages WHERE key = '{gone}'")
        answer = client.post("messages", "1\n2\n3\n", **batch)
        assert (answer.status_code, "deleted" in answer.json["detail"]) == (422, True)
        assert "another body" in client.post("messages", "7\n8\n9\n", **batch).json["detail"]


def test_a_key_belongs_to_its_client_and_stream(client, store):
    add_tester(store.database.path, "other", "other")
    senders = [("messages", TOKEN, 1), ("messages", "other", 2), ("readings", TOKEN, 1)]
    for replayed in (None, "true"):
        for stream, token, message_id in senders:
            answer = client.post(stream, READING, Idempotency_Key="k", Authorization=f"Bearer {token}")
            assert (answer.status_code, answer.json["id"]) == (201, message_id)
            assert answer.headers.get("Idempotent-Replayed") == replayed
    assert rows(store, "SELECT client, key FROM messages") == [("tester", "k"), ("other", "k")]


def test_the_longest_key_and_every_visible_character_are_taken(client, store):
    visible = "".join(chr(code) for code in range(0x21, 0x7F))
    for key in ("k" * 255, visible[1:]):
        assert client.post("messages", "{}", Idempotency_Key=key).status_code == 201
    escaped = visible.replace("\\", "\\\\").replace('"', '\\"')
    assert client.post("messages", "{}", Idempotency_Key=f'"{escaped}"').status_code == 201
    assert rows(store, "SELECT key FROM messages") == [("k" * 255,), (visible[1:],), (visible,)]


# Resources: the feed


def ids(answer):
    assert answer.status_code == 200, answer.text
    return [message["id"] for message in answer.json["messages"]]


def test_the_feed_goes_on_where_next_says(client):
    for n in range(5):
        client.post("messages", f"[{n}]")
    seen, path = [], "/messages?limit=2"
    for expected in ([1, 2], [3, 4], [5], []):
        answer = client.get(path)
        assert ids(answer) == expected
        assert answer.headers["Link"] == f'<{answer.json["next"]}>; rel="next"'
        seen += answer.json["messages"]
        path = answer.json["next"]
    assert path == "/messages?after=5&limit=2"
    assert [message["body"] for message in seen] == [[n] for n in range(5)]
    assert client.get("/messages").json["messages"] == seen
    assert seen[0] == {"id": 1, "received_at": NOW, "client": "tester", "key": None, "body": [0]}


def test_the_feed_filters_by_generated_columns(client, store):
    for sensor, value in (("a-17", 1), ("b-4", 2), ("a-17", 3)):
        client.post("readings", json.dumps({"sensor": sensor, "value": value}))
    answer = client.get("/readings?sensor=a-17&limit=1")
    assert ids(answer) == [1]
    assert answer.json["next"] == "/readings?after=1&limit=1&sensor=a-17"
    assert ids(client.get(answer.json["next"])) == [3]
    assert ids(client.get("/readings?value=2.0&sensor=b-4")) == [2]
    assert ids(client.get("/readings?sensor=' OR 1=1 --")) == ids(client.get("/readings?sensor")) == []
    change(store, "DROP VIEW warm", "DROP TRIGGER no_mondays", "ALTER TABLE readings DROP COLUMN note")
    assert client.get("/readings?note=note").status_code == 503  # though SQLite takes an unknown "name" for a string


def test_a_column_without_a_type_is_filtered_by_what_is_in_it(open_store):
    store = open_store(stream_sql("x", COLUMN.replace("TEXT", "ANY")))
    long, real = "9007199254740993", "0.12345678901234567"
    for text in ("5", '"5"', '"abc"', "0", "1234567890123456789", "0.1", long, f'"{long}"', real):
        append(store, "x", f'{{"n": {text}}}')
    client = client_of(store)
    for text, found in {"5": [1, 2], "abc": [3], "1234567890123456789": [5], "0.1": [6], long: [7, 8], long[:-1] + "2": [],
                        real: [9], "": [], "null": [], "%22abc%22": []}.items():  # fmt: skip
        assert ids(client.get(f"/x?n={text}")) == found, text


@pytest.mark.parametrize("kind", ["x-ndjson", "jsonl", "x-ndjson, application/json;q=0.5"])
def test_the_feed_is_ndjson_if_asked(kind, client):
    client.post("messages", '{\n "a":\r\n 1}', Idempotency_Key="k")
    client.post("messages", "2")
    answer = client.get("/messages", Accept=f"application/{kind}")
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    assert answer.headers["Link"] == '</messages?after=2>; rel="next"'
    lines = answer.text.splitlines()
    assert [json.loads(line)["body"] for line in lines] == [{"a": 1}, 2]
    assert json.loads(lines[0])["key"] == "k"
    assert client.get("/messages?after=2", Accept=f"application/{kind}").text == ""
    for path in ("/messages", "/messages/1", "/messages/1/body", "/"):
        for accept in ("*/*", "image/png"):
            assert client.get(path, Accept=accept).headers["Vary"] == "Accept", path
    assert client.get("/messages", Accept=", application/json,,text/csv;q=0.2").headers["Content-Type"] == service.JSON


def test_a_page_ends_at_about_4_mib_but_never_empty(client, store):
    for size in [1_000_000] * 9 + [6_000_000]:
        append(store, "messages", json.dumps("x" * size))
    for after, found in {0: [1, 2, 3, 4, 5], 5: [6, 7, 8, 9, 10], 9: [10], 10: []}.items():
        assert ids(client.get(f"/messages?after={after}")) == found


@pytest.mark.parametrize(("query", "words"), [
    ("limit=0", ["limit", "1 to 1000"]), ("limit=1001", ["limit", "1 to 1000"]), ("limit=ten", ["limit"]), ("after=-1", ["after"]),
    ("after=9223372036854775808", ["after"]), ("after=١", ["after"]), ("after=", ["after"]), ("body=x", ["'body'"]),
    ("after=1&after=2", ["after", "more than once"]), ("colour=red", ["'colour'", "after, limit, wait, fields, since, sensor, value"]),
])  # fmt: skip
def test_the_feed_refuses_what_it_does_not_know(query, words, any_client):
    answer = any_client.get(f"/readings?{query}")
    assert (answer.status_code, answer.headers["Content-Type"]) == (400, "application/problem+json")
    assert all(word in answer.json["detail"] for word in words)


@pytest.mark.parametrize("path", ["/readings", "/readings/1", "/", "/warm"])
def test_an_accept_header_that_names_nothing_here_is_406(path, client):
    client.post("readings", READING)
    answer = client.get(path, Accept="text/html, image/png")
    assert (answer.status_code, answer.json["accepted"][0]) == (406, "application/json")
    for accept in (
        "*/*",
        "",
        "application/*",
        "text/html, */*;q=0.1",
        "Application/JSON",
        "image/PNG, APPLICATION/Json",
    ):
        assert client.get(path, Accept=accept).status_code == 200


def test_no_answer_is_kept_by_anybody_on_the_way(client):
    client.post("readings", READING)
    for method, path in (
        ("GET", "/readings"),
        ("GET", "/readings/1"),
        ("GET", "/"),
        ("POST", "/readings"),
        ("GET", "/no"),
    ):
        for headers in (AUTHORIZATION, {}):
            answer = client.simulate_request(method, path, body=READING, headers=headers)
            assert (answer.headers["Cache-Control"], answer.headers["X-Content-Type-Options"]) == (
                "no-store",
                "nosniff",
            )


def test_an_accept_header_takes_no_time(client):
    def seconds():
        started = time.process_time()
        for accept in ("application/x-ndjson" + ";" * 15_000, "a/b," * 4000, "*/*;q=" + "0" * 15_000):
            assert client.get("/messages", Accept=accept).status_code == 400
        return time.process_time() - started

    eventually(lambda: seconds() < 0.1)


def test_what_a_read_is_takes_no_time_to_tell():
    """The loop does that, before it knows whose request it is."""
    for query in ("", "after=1", "after=1&limit=2&", "since=2026-01-01T00:00:00%2B01:00&wait=3&fields=1"):
        assert service.PLAIN_QUERY.fullmatch(query)
    for query in ("n=1", "after=1&n=1", "n=1&after=1", "after=1 ", "after", "&"):
        assert not service.PLAIN_QUERY.fullmatch(query)

    def seconds(query):
        started = time.process_time()
        for _ in range(20):
            service.PLAIN_QUERY.fullmatch(query)
        return time.process_time() - started

    for query in ("after=" * 2600 + "!", "after=" + "a" * 15_600 + "!", "after=after&" * 1300 + "!"):
        eventually(lambda: seconds(query) < 3 * seconds("after=1&" * 1950))  # noqa: B023


def test_one_message_can_be_read(client):
    client.post("messages", '{"b":1.10,"a":2}', Idempotency_Key="k")
    answer = client.get("/messages/1")
    assert answer.text.endswith('"client": "tester", "key": "k", "body": {"b":1.10,"a":2}}')
    assert (client.simulate_head("/messages/1", headers=AUTHORIZATION).content, answer.status_code) == (b"", 200)
    for bad in [
        "2",
        "0",
        "-1",
        "1.0",
        "+1",
        "01",
        "0_1",
        "%D9%A1",
        "x",
        "1 OR 1=1",
        "9" * 30,
        f"{2**63 - 1}",
        f"{2**63}",
        "%00",
        "1/2",
    ]:
        refused = client.get(f"/messages/{bad}")
        assert (refused.status_code, refused.headers["Content-Type"]) == (404, "application/problem+json"), bad


def test_the_root_says_what_there_is_and_links_honour_the_mount_point(client):
    fields = ["sensor", "value", "lot", "batch", "size", "note"]
    for _ in range(3):
        client.post("readings", READING)
    streams = {"messages": {"href": "/messages", "can": ["write", "read"], "fields": [], "last_id": 0}}
    streams["readings"] = {"href": "/readings", "can": ["write", "read"], "fields": fields, "last_id": 3}
    views = {"warm": {"href": "/warm", "can": ["read"], "fields": fields, "last_id": 3}}
    about = {"service": "Inlet", "version": service.__version__, "streams": streams, "views": views}
    assert client.get("/").json == about
    inside = {"extras": {"SCRIPT_NAME": "/a b"}, "headers": AUTHORIZATION | {"Content-Type": "application/json"}}
    assert client.simulate_post("/messages", body="{}", **inside).headers["Location"] == "/a%20b/messages/1"
    assert client.simulate_get("/messages", **inside).json["next"] == "/a%20b/messages?after=1"
    assert client.simulate_get("/", **inside).json["streams"]["messages"]["href"] == "/a%20b/messages"


def test_a_stream_with_headers_keeps_those_of_the_request(open_store):
    sql = stream_sql("messages", ", headers TEXT, type TEXT AS (headers ->> 'ce-type')") + stream_sql("plain")
    store = open_store(sql)
    client = client_of(store)
    sent = {
        "Ce-Type": "é é",
        "X-B": '"2"',
        "Cookie": "secret",
        "Proxy-Authorization": "secret",
        "Content-Type": "application/json",
    }
    secrets = (
        *(
            "Cf-Access-Jwt-Assertion",
            "X-Amzn-Oidc-Data",
            "Paypal-Transmission-Sig",
            "X-Forwarded-Client-Cert",
            "X-Auth",
        ),
        *(
            "X-Passphrase",
            "X-Session-Id",
            "X-Credentials",
            "X-Sign",
            "X-Sms-Otp",
            "X-Keys",
            "X-Key-1",
            "X-Signing-Keys",
        ),
        *("X-Vault-Unwrap-Keys", "X-Sig-V2", "X-Webhook-Sign-V2", "X-Bearer", "X-Access-Code"),
        *("X-Amz-Firehose-Access-Key", "ApiKey", "X-Auth-Key", "Ocp-Apim-Subscription-Key", "X-Functions-Key"),
        "X-Hub-Signature-256",
        "Webhook-Signature",
        "X-Hub-Signature",
        "X-Gitlab-Token",
        "X-Api-Key",
        "X-Hmac-Sha256",
    )
    sent |= dict.fromkeys(secrets, TOKEN) | {
        "Content-Length": "1",
        "X-A": "1",
        "X-Event-Key": "repo:push",
        "X-Keywords": "a",
        "X-Signal": "b",
    }
    sent |= {"X-Author": "me", "Remote-Addr": "6.6.6.6", "Http-X-A": "7", "Server-Name": "a", "Idempotency-Key": "k"}
    client.post("messages", "1", **sent)
    client.post("messages", "1\n2", Ce_Type="t", **BATCH)
    one, *batch = client.get("/messages").json["messages"]
    assert list(one) == ["id", "received_at", "client", "key", "body", "headers"]
    kept = {"ce-type": "é é", "content-length": "1", "content-type": "application/json", "x-a": "1", "x-b": '"2"'}
    kept |= {
        "x-author": "me",
        "x-event-key": "repo:push",
        "x-keywords": "a",
        "x-signal": "b",
        "remote-addr": "6.6.6.6",
        "http-x-a": "7",
        "server-name": "a",
        "idempotency-key": "k",
    }
    came = {"host": "falconframework.org", "user-agent": one["headers"]["user-agent"]}
    assert one["headers"] == kept | came  # nothing but what came as a header, and none in the place of another
    assert list(one["headers"]) == sorted(one["headers"])
    assert "secret" not in json.dumps(one)
    assert "authorization" not in one["headers"]
    assert [message["headers"]["ce-type"] for message in batch] == ["t", "t"]
    assert [message["id"] for message in client.get("/messages?type=t").json["messages"]] == [2, 3]
    assert client.get("/messages/2").json["headers"]["ce-type"] == "t"
    client.post("plain", "1")
    assert "headers" not in client.get("/plain/1").json


FIELDS = """, headers TEXT, a TEXT AS (body ->> 'a'), "b c" REAL AS (body ->> 'b'), raw BLOB AS (CAST(body ->> 'a' AS BLOB)),
    n ANY AS (json_array_length(body -> 'list'))"""


def test_fields_are_shown_if_they_are_asked_for(open_store):
    view = "CREATE VIEW seen AS SELECT *, 9e999 AS much FROM x WHERE id < 3;"
    client = client_of(open_store(stream_sql("x", FIELDS) + stream_sql("plain") + view))
    for body in ('{"a": "é\\"", "b": 1, "list": [1,  2]}', '{"a": "\\ud800"}', "3"):
        assert client.post("x", body).status_code == 201
    first = {"a": 'é"', "b c": 1.0, "raw": "c3a922", "n": 2}
    page = client.get("/x?fields=1&limit=2")
    assert page.json["messages"][0]["fields"] == first
    assert list(page.json["messages"][0])[-2:] == ["headers", "fields"]
    assert (
        page.json["messages"][1]["fields"]["a"] == "\N{REPLACEMENT CHARACTER}" * 3
    )  # what SQLite makes of half a character
    assert '"body": {"a": "é\\"", "b": 1, "list": [1,  2]}' in page.text
    assert page.json["next"] == "/x?after=2&fields=1&limit=2"
    assert client.get(page.json["next"]).json["messages"][0]["fields"] == dict.fromkeys(["a", "b c", "raw", "n"])
    assert client.get("/x/1?fields=1").json["fields"] == first
    assert "fields" not in client.get("/x/1").json
    assert "fields" not in client.get("/x?fields=0").json["messages"][0]
    assert json.loads(client.get("/x?fields=1&limit=1", Accept="application/x-ndjson").text)["fields"] == first
    client.post("plain", "1")
    assert client.get("/plain?fields=1").json["messages"][0]["fields"] == {}
    assert client.get("/seen?fields=1").json["messages"][0]["fields"] == first | {"much": math.inf}
    for path in ("/x/1?limit=1", "/x/1?fields=2", "/x/1?a=1"):
        assert client.get(path).status_code == 400
    assert client.get("/x", Accept="TEXT/CSV").headers["Content-Type"] == "text/csv; charset=utf-8"


def test_the_body_alone_is_what_was_sent(open_store):
    client = client_of(open_store(stream_sql("x") + "CREATE VIEW odd AS SELECT id, 1 AS received_at, 2 AS client, 3 AS key,"
                                  " 'no json' AS body FROM x;"))  # fmt: skip
    body = '{"b":1.10,\n "b" : [1,2 ]}\n'
    client.post("x", body)
    answer = client.get("/x/1/body")
    assert (answer.content, answer.headers["Content-Type"]) == (body.encode(), "application/json")
    assert client.get("/odd/1/body").content == b'"no json"'
    head = client.simulate_head("/x/1/body", headers=AUTHORIZATION)
    assert (head.status_code, head.content) == (200, b"")
    for path in ("/x/2/body", "/x/01/body", "/x/1/bodies", "/x/body"):
        assert client.get(path).status_code == 404, path
    assert client.get("/x/1/body", Accept="text/csv").status_code == 406


def test_a_body_that_a_trigger_has_made_is_utf_8_in_every_form(open_store):
    sql = stream_sql("messages") + stream_sql("texts", ", a TEXT AS (body ->> 'a')") + (
        "CREATE TRIGGER copy AFTER INSERT ON messages BEGIN INSERT INTO texts (received_at, client, body)"
        " VALUES (NEW.received_at, NEW.client, json_object('a', NEW.body ->> 'a')); END;")  # fmt: skip
    client = client_of(open_store(sql))
    assert client.post("messages", '{"a": "\\ud83d cut"}').status_code == 201
    for path, accept in (("/texts", "*/*"), ("/texts?fields=1", "application/x-ndjson"), ("/texts", "text/csv"),
                         ("/texts/1/body", "*/*")):  # fmt: skip
        answer = client.get(path, Accept=accept)
        assert (answer.status_code, "\N{REPLACEMENT CHARACTER}" in answer.content.decode()) == (200, True)


def test_whatever_a_trigger_has_made_stops_nobody_who_reads(open_store):
    sql = stream_sql("messages") + stream_sql("copies", ", headers TEXT") + (
        "CREATE TRIGGER copy AFTER INSERT ON messages BEGIN INSERT INTO copies (received_at, client, key, body, headers)"
        " SELECT e.value, e.value, e.value, '1', json_quote(e.value) FROM json_each(NEW.body) AS e; END;")  # fmt: skip
    store = open_store(sql)
    client = client_of(store)
    assert client.post("messages", '["\\ud83d cut", "a"]').status_code == 201
    replaced = "\N{REPLACEMENT CHARACTER}" * 3 + " cut"
    for path in ("/copies", "/copies?fields=1"):
        first, second = client.get(path).json["messages"]
        assert [first[name] for name in ("received_at", "client", "key", "headers")] == [replaced] * 4
        assert second["key"] == "a"
    for path, accept in (("/copies/1", "*/*"), ("/copies/1/body", "*/*"), ("/copies", "text/csv")):
        assert client.get(path, Accept=accept).status_code == 200, path


def test_what_sql_says_of_a_message_is_one_line_in_the_log(open_store, caplog):
    view = "CREATE VIEW odd AS SELECT json_extract(body, body ->> 'path') AS found FROM messages;"
    client = client_of(open_store(stream_sql("messages") + view))
    assert (
        client.post("messages", json.dumps({"path": "x\n2026 inlet CRITICAL \x1b[31mall is lost"})).status_code == 201
    )
    assert client.get("/odd").status_code == 503
    (line,) = [line for line in caplog.messages if "cannot be read" in line]
    assert line.isprintable()


def test_a_report_with_ids_can_be_read_whole(open_store):
    views = """CREATE VIEW squares AS SELECT body * body AS square, id * 10 - 30 AS id FROM messages ORDER BY body DESC;
    CREATE VIEW named AS SELECT 'a' || id AS id FROM messages; CREATE VIEW twice AS SELECT 1 AS id, id AS n FROM messages;"""
    store = open_store(stream_sql("messages") + views)
    client = client_of(store)
    assert client.get("/squares?limit=2").json == {"rows": [], "next": "/squares?limit=2"}
    for n in range(5):
        client.post("messages", str(n))
    seen, path = [], "/squares?limit=2"
    for number, more in ((2, True), (2, True), (1, False), (0, False)):
        answer = client.get(path)
        assert (len(answer.json["rows"]), answer.json.get("more", False)) == (number, more)
        assert answer.headers["Link"] == f'<{answer.json["next"]}>; rel="next"'
        seen += answer.json["rows"]
        path = answer.json["next"]
    assert seen == [{"square": n * n, "id": 10 * n - 20} for n in range(5)]
    assert path == "/squares?after=20&limit=2"
    assert client.get("/squares?after=-10").json["rows"] == seen[2:]
    assert client.get("/squares?square=4").json["rows"] == [seen[2]]
    assert client.get("/squares/1").status_code == 404
    assert client.get("/squares?since=2026-01-01").status_code == client.get("/squares?fields=1").status_code == 400
    named = client.get("/named?limit=2").json
    assert named == {"rows": [{"id": "a1"}, {"id": "a2"}], "more": True}  # no numbers: it cannot be read on
    assert len(client.get("/twice?limit=2").json["rows"]) == 5  # an id is never split between two pages


@pytest.mark.parametrize("name", ["after", "limit", "wait", "fields", "since"])
def test_a_column_that_is_called_like_a_parameter_is_refused(name, one_line_error, tmp_path):
    (tmp_path / "schema.sql").write_text(stream_sql("x", f", `{name.title()}` TEXT AS (body ->> 'a')"))
    assert f"table x: GET has a parameter {name}; name the column otherwise" in one_line_error()


def test_headers_and_lines_that_make_too_much_together_are_refused(open_store):
    client = client_of(open_store(stream_sql("messages", ", headers TEXT")))
    answer = client.post("messages", "1\n" * 10_000, X_A="x" * 8000, **BATCH)
    assert (answer.status_code, answer.json["limit"]) == (413, 1024 * 1024)
    assert client.post("messages", "1\n" * 100, X_A="x" * 8000, **BATCH).status_code == 201


VIEWS = """CREATE VIEW large AS SELECT * FROM messages WHERE body > 2;
CREATE VIEW latest AS SELECT client, max(id) AS last, count(*) AS "how many", x'00ff' AS bytes, NULL AS "nothing",
    1.5 AS "n", 9e999 AS much, -9e999 AS little, '"' || char(10) AS text FROM messages GROUP BY client;
CREATE VIEW odd AS SELECT id, 7 AS received_at, NULL AS client, 8 AS key, 'no json' AS body, '[1]' AS headers FROM messages;
CREATE VIEW overflow AS SELECT abs(CAST(body AS INTEGER)) AS n FROM messages;
CREATE VIEW many AS SELECT 1 AS after UNION ALL SELECT 2 UNION ALL SELECT 3;
CREATE VIEW _hidden AS SELECT 1 AS one;
CREATE VIEW slow AS WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) AS n FROM n;
"""


def test_a_view_with_the_message_columns_is_a_feed_and_any_other_a_report(open_store):
    client = client_of(open_store(stream_sql("messages") + VIEWS))
    for n in range(1, 6):
        client.post("messages", str(n))
    page = client.get("/large?limit=2")
    assert [message["body"] for message in page.json["messages"]] == [3, 4]
    assert (page.json["next"], page.headers["Link"]) == (
        "/large?after=4&limit=2",
        '</large?after=4&limit=2>; rel="next"',
    )
    assert client.get(page.json["next"]).json["messages"][0]["id"] == 5
    assert (client.get("/large/3").json["body"], client.get("/large/2").status_code) == (3, 404)
    row = {"client": "tester", "last": 5, "how many": 5, "bytes": "00ff", "nothing": None, "n": 1.5}
    row |= {"much": math.inf, "little": -math.inf, "text": '"\n'}
    report = client.get("/latest")
    assert report.json == {"rows": [row]}
    assert "Infinity" not in report.text
    assert json.loads(client.get("/latest", Accept="application/x-ndjson").text) == row
    for query, found in (("how%20many=5&last=5", 1), ("client=nobody", 0), ("n=1.5&limit=1", 1)):
        assert len(client.get(f"/latest?{query}").json["rows"]) == found, query
    for query in ("after=1", "x=1", "limit=0"):
        assert client.get(f"/latest?{query}").status_code == 400
    odd = {"id": 1, "received_at": "7", "client": "", "key": "8", "body": "no json"}
    assert {name: value for name, value in client.get("/odd/1").json.items() if name != "headers"} == odd
    assert client.get("/large?limit=1").json["next"] == "/large?after=3&limit=1"
    for limit, more in ((2, True), (3, False), (1, True)):
        answer = client.get(f"/many?limit={limit}").json
        assert (len(answer["rows"]), answer.get("more", False)) == (min(limit, 3), more)
    assert client.post("large", "1").status_code == 405
    assert client.get("/latest/1").status_code == client.get("/_hidden").status_code == 404
    assert client.get("/overflow").status_code == 200
    client.post("messages", "2")
    root = client.get("/").json
    assert [root["views"][name].get("last_id") for name in ("large", "latest")] == [5, None]


def test_an_id_that_a_view_has_several_times_is_never_split_between_pages(open_store):
    views = """CREATE TABLE tags (n INTEGER, tag TEXT) STRICT;
    CREATE VIEW tagged AS SELECT m.*, t.tag AS tag FROM messages AS m JOIN tags AS t ON t.n <= CAST(m.body AS INTEGER);
    CREATE VIEW too_often AS SELECT m.* FROM messages AS m JOIN messages AS o JOIN messages AS p JOIN messages AS q;"""
    store = open_store(stream_sql("messages") + views)
    client = client_of(store)
    change(store, "INSERT INTO tags VALUES (1, 'a'), (2, 'b'), (3, 'c'), (4, 'd')")
    for n in (3, 1, 4, 2, 0, 4, 1):
        assert client.post("messages", str(n)).status_code == 201
    for limit in range(1, 6):
        path, bodies = f"/tagged?limit={limit}", []
        while page := (answer := client.get(path).json)["messages"]:
            bodies += [message["body"] for message in page]
            path = answer["next"]
        assert bodies == [3] * 3 + [1] + [4] * 4 + [2] * 2 + [4] * 4 + [1]
    assert len(client.get("/tagged?limit=1&tag=d").json["messages"]) == 1
    assert len(client.get("/too_often?limit=1").json["messages"]) == 7**3
    assert client.post("messages", "\n".join("1" * 4), **BATCH).status_code == 201
    answer = client.get("/too_often?limit=1")
    assert (answer.status_code, "the id 1 too often" in answer.json["detail"]) == (503, True)


def test_no_message_makes_a_view_answer_with_what_is_not_json(open_store):
    """A lone surrogate becomes text that is not UTF-8, 1e999 an infinity; and an id or headers may be a BLOB."""
    views = """CREATE VIEW report AS SELECT body ->> 'x' AS x, count(*) AS n FROM messages GROUP BY x;
    CREATE VIEW feed AS SELECT id, received_at, client, key, body ->> 'x' AS body, CAST('{}' AS BLOB) AS headers FROM messages;
    CREATE VIEW blobs AS SELECT CAST(id AS BLOB) AS id, received_at, client, key, body FROM messages;"""
    client = client_of(open_store(stream_sql("messages") + views))
    for x in ('"\\ud800"', "1e999", "-1e999", "null", "[1]", '"\\u0000"'):
        assert client.post("messages", f'{{"x": {x}}}').status_code == 201
    for path, accept in itertools.product(("report", "feed", "feed/1", "feed/2", "blobs"), ("json", "x-ndjson")):
        answer = client.get(f"/{path}", Accept=f"application/{accept}")
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, f"application/{accept}"), path
        text = answer.content.decode()
        for line in text.split("\n")[:-1] if accept == "x-ndjson" else [text]:
            json.loads(line, parse_constant=pytest.fail)


def test_a_view_that_cannot_be_read_is_503_and_a_slow_one_ends(open_store, monkeypatch, caplog):
    monkeypatch.setattr(service, "READ_TIMEOUT_S", 0.5)
    store = open_store(stream_sql("messages") + VIEWS)
    client = client_of(store)
    client.post("messages", "-9223372036854775808")
    answer = client.get("/overflow")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert "the view overflow cannot be read: integer overflow" in caplog.text
    assert "this view" in answer.json["detail"]
    with within(5):
        assert "took more than" in client.get("/slow").json["detail"]
        assert client.get("/").status_code == 200
    add_tester(store.database.path, "reader", "r", "read:latest")
    assert client.get("/latest", Authorization="Bearer r").status_code == 200
    assert client.get("/large", Authorization="Bearer r").status_code == 403


@pytest.mark.parametrize(("sql", "words"), [
    ("SELECT * FROM absent", ["view v", "absent"]), ("SELECT token FROM clients", ["view v", "clients"]),
    ("SELECT 1 AS \"limit\"", ["view v", "limit"]), ("SELECT secret AS x FROM main.clients", ["view v", "clients"]),
])  # fmt: skip
def test_a_view_that_does_not_compile_or_shows_tokens_ends_the_start(sql, words, one_line_error, tmp_path):
    for name in ("v", "_v"):
        (tmp_path / "schema.sql").write_text(f"{X}CREATE VIEW {name} AS {sql};")
        if (name, "limit") != ("_v", words[1]):
            line = one_line_error()
            assert all(word.replace("view v", f"view {name}") in line for word in words), line


def test_pages_of_other_origins_may_use_it_if_they_are_named(server_with, store):
    page = {"Origin": "https://a.example"}
    preflight = page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    ask = {"Authorization": "", "Content-Type": ""}
    allowed_server = server_with("--cors", "https://a.example,https://b.example")
    allowed = allowed_server.connect()
    status, headers, _ = send(allowed, "OPTIONS", "/messages", **ask, **preflight)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, "https://a.example")
    same = [send(allowed, "OPTIONS", path, **ask, **preflight) for path in ("/", "/nothing", "/messages/1", "/metrics")]
    headers.replace_header("Date", "")
    for other_status, others, content in same:  # who asks has no token, and learns nothing of what there is
        others.replace_header("Date", "")
        assert (other_status, others.items(), content) == (status, headers.items(), b"")
    assert "POST" in headers["Access-Control-Allow-Methods"]
    assert "authorization" in headers["Access-Control-Allow-Headers"]
    for method, body, status in (("POST", "1", 201), ("POST", "no", 400), ("GET", None, 200)):
        answer = send(allowed, method, "/messages", body, **page)
        assert (answer[0], answer[1]["Access-Control-Allow-Origin"]) == (status, "https://a.example")
        assert "Origin" in answer[1]["Vary"]
        assert "Location" in answer[1]["Access-Control-Expose-Headers"]
    status, headers, _ = send(
        allowed, "POST", "/messages", "1", Authorization="Bearer x", **page
    )  # refused at its head
    assert (status, headers["Access-Control-Allow-Origin"]) == (401, "https://a.example")
    allowed = allowed_server.connect()
    assert send(allowed, "OPTIONS", "/messages", **ask)[0] == 401
    for origin in ("https://c.example", "", "null"):
        assert send(allowed, "OPTIONS", "/messages", **ask, **(preflight | {"Origin": origin}))[0] == 401
    assert send(allowed, "POST", "/messages", "1", Origin="https://c.example")[1]["Access-Control-Allow-Origin"] is None
    none = server_with().connect()
    for origin in ("https://a.example", ""):
        assert send(none, "OPTIONS", "/messages", **ask, **(preflight | {"Origin": origin}))[0] == 401
    assert send(none, "POST", "/messages", "1", **page)[1]["Access-Control-Allow-Origin"] is None


# Resources: health


@pytest.fixture
def hurried(monkeypatch):
    """One look in 0.1 s, not in a second."""
    monkeypatch.setattr(service.HealthResource, "EVERY_S", 0.1)


def health(client):
    """The status, without a token."""
    answer = client.simulate_get("/healthz")
    assert {"alive": True, "ready": answer.status_code == 200}.items() <= answer.json.items()
    return answer.status_code


def test_livez_is_200_as_long_as_the_process_answers(store, client):
    assert client.simulate_get("/livez").json == {"alive": True}
    with another_program_writes(store):
        assert client.simulate_get("/livez").status_code == 200


def test_healthz_tells_within_seconds_what_can_be_done(hurried, client, store, tmp_path):
    assert health(client) == 200
    database, away = store.database.path, tmp_path / "away"
    for break_it, mend_it in (
        (lambda: database.rename(away), lambda: away.rename(database)),
        (lambda: change(store, "ALTER TABLE clients RENAME TO c"), lambda: change(store, "ALTER TABLE c RENAME TO clients")),
    ):  # fmt: skip
        break_it()
        eventually(lambda: health(client) == 503, within_s=6)
        mend_it()
        eventually(lambda: health(client) == 200, within_s=6)


@pytest.mark.parametrize("failing", ["append", "start"])
def test_healthz_is_not_misled_for_ever_by_what_fails_once(failing, hurried, client, store, monkeypatch):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(*((store, "append") if failing == "append" else (threading.Thread, "start")), fail)
        assert health(client) == 503
    eventually(lambda: health(client) == 200, within_s=4)


def test_healthz_is_200_where_each_commit_takes_longer_than_its_looks(hurried, client, store, monkeypatch):
    write = store.append
    monkeypatch.setattr(store, "append", lambda each: (time.sleep(0.3), write(each)))
    assert [health(client), health(client)] == [200, 200]


def test_healthz_recovers_from_a_lack_of_memory(hurried, client, store, monkeypatch):
    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(store, "append", fail)
        assert health(client) == 503
    eventually(lambda: health(client) == 200, within_s=4)


# Many POSTs, one COMMIT


def many_at_once(server, count, body="1"):
    """The same POST on many connections; the answers come when they are asked for."""
    connections = [server.connect() for _ in range(count)]
    for connection in connections:
        connection.request("POST", "/messages", body, AUTHORIZATION | {"Content-Type": "application/json"})
    return connections


def test_32_threads_two_processes_and_deliberate_duplicates(server, server_with, store):
    """Half of the messages have a key, and each of those is sent by two threads; a consumer follows the feed."""
    servers, threads, messages = (server, server_with()), 32, 40
    answers, seen, stop = [], [], threading.Event()

    def produce(number):
        connection = servers[number % 2].connect()
        for n in range(messages):
            sender = number // 2 if n % 2 else number
            key = {"Idempotency_Key": f"{sender}-{n}"} if n % 2 else {}
            status, headers, data = send(connection, "POST", "/messages", f"[{sender}, {n}]", **key)
            answers.append((status, *key.values(), json.loads(data).get("id"), "Idempotent-Replayed" in headers))

    def consume(_):
        connection, path, last_round, page = server.connect(), "/messages?limit=50", False, {"messages": True}
        while not last_round or page["messages"]:
            last_round = stop.is_set()
            page = json.loads(send(connection, "GET", path)[2])
            seen.extend(message["id"] for message in page["messages"])
            path = page["next"]

    with in_threads(consume, 1):
        with in_threads(produce, threads):
            pass
        stop.set()
    with_key = threads * messages // 2
    assert len(answers) == threads * messages
    assert {status for status, *_ in answers} == {201}
    assert len({answer[1:-1] for answer in answers if len(answer) == 4}) == with_key // 2  # one id for each key
    assert sum(answer[-1] for answer in answers) == with_key // 2
    assert seen == sorted({answer[-2] for answer in answers})
    assert seen == [row[0] for row in rows(store, "SELECT * FROM messages")]
    assert "locked" not in server.log


def test_kill_9_loses_nothing_that_was_acknowledged(server, store):
    """Senders with keys retry what had no answer, while the server is killed at random moments."""
    acknowledged, stop = {}, threading.Event()

    def produce(number):
        n = 0
        while not stop.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                key = f"{number}-{n}"
                status, _, data = send(server.connect(), "POST", "/messages", json.dumps(key), Idempotency_Key=key)
                if status == 201:
                    acknowledged[key] = json.loads(data)["id"]
                    n += 1

    with in_threads(produce, 4):
        for count in range(10, 110, 20):
            eventually(lambda: len(acknowledged) > count)  # noqa: B023
            time.sleep(random.uniform(0, 0.1))
            server.kill()
            server.start()
        stop.set()
    stored = rows(store, "SELECT key, id FROM messages")
    assert acknowledged.items() <= dict(stored).items()
    assert len(dict(stored)) == len(stored)
    assert rows(store, "PRAGMA integrity_check") == [("ok",)]


# The server, as a process


def test_the_first_start_prints_a_curl_that_works_and_no_other_start_makes_a_client(tmp_path, command):
    with contextlib.closing(Process(tmp_path, environ={"TZ": "Asia/Tokyo"})) as process:
        printed = process.printed(8)
        words = shlex.split(next(line for line in printed.splitlines() if line.startswith("curl ")))
        headers = dict(words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H")
        connection = process.connect()
        connection.request("POST", words[2].removeprefix(process.url), words[words.index("-d") + 1], headers)
        answer = connection.getresponse()
        received_at = json.load(answer)["received_at"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", received_at)
        assert abs(datetime.fromisoformat(received_at).timestamp() - time.time()) < 5
        token = headers["Authorization"].split()[1]
        assert token in printed.splitlines()
        stored = b"".join(path.read_bytes() for path in tmp_path.glob("inlet.db*"))  # where only digests are kept
        assert (service.digest_of(token).encode() in stored, token.encode() in stored) == (True, False)
        process.close()
        assert command("client", "list")[1].startswith("default\t")
        assert command("client", "remove", "default")[0] == 0
        process.start()  # and this one makes none, though the last was removed
        process.terminate()
        assert process.process.stdout.read() == ""
        assert command("client", "list") == (0, "", "")


def test_of_two_first_starts_at_once_one_makes_the_client(tmp_path):
    (tmp_path / "schema.sql").write_text(SCHEMA)
    with open(tmp_path / "inlet.db-lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        starts = [start(tmp_path, "--listen", "127.0.0.1:0") for _ in range(4)]
        time.sleep(1)  # so that most of them wait
    assert all("listening on" in process.stdout.readline() for process in starts)
    printed = []
    for process in starts:
        with process:
            process.terminate()
            printed.append(process.stdout.read())
    (token,) = re.findall(r'"Authorization: Bearer (.*?)"', "".join(printed))
    made = types.SimpleNamespace(database=tmp_path / "inlet.db")
    assert rows(made, "SELECT token FROM clients") == [(service.digest_of(token),)]


def test_a_body_of_exactly_the_limit_is_taken_and_who_sends_more_gets_the_answer(any_server):
    """And not a broken pipe: what is left of the body is read first."""
    limit, _, _ = service.SETTINGS["max-body"]
    connection, body = any_server.connect(), json.dumps("x" * (limit - 2)).encode()
    for whole in (body, [body[:999], body[999:]]):
        assert send(connection, "POST", "/messages", whole)[0] == 201
    for larger in (body + b" ", [body, b" "], body * 9, [body] * 9):
        for token, status in ((TOKEN, 413), ("wrong", 401)):
            answer = send(any_server.connect(), "POST", "/messages", larger, Authorization=f"Bearer {token}")
            assert answer[0] == json.loads(answer[2])["status"] == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_0_and_answers_what_is_in_flight(number, server, store, tmp_path):
    """The COMMIT is held up by another program while the signal comes. What is stored is in the one file then."""
    store.close()
    with another_program_writes(store), server.socket():
        (connection,) = many_at_once(server, 1)
        time.sleep(0.3)
        server.process.send_signal(number)
        time.sleep(0.3)
        assert server.process.poll() is None
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["id"]) == (201, 1)
    with within(5):
        assert server.process.wait(DEADLINE_S) == 0
    (tmp_path / "copy.db").write_bytes(store.database.path.read_bytes())
    assert copied(tmp_path / "copy.db") == [1]


def test_it_listens_on_an_address_that_is_free_and_on_a_unix_socket(server, tmp_path, one_line_error):
    assert server.address in one_line_error("--listen", server.address, "--database", tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()  # or nobody would ever see its token
    path = tmp_path / "a:socket"
    process = Process(tmp_path, "--listen", f"unix:{path}", "--database", str(tmp_path / "other.db"))
    with contextlib.closing(process), socket.socket(socket.AF_UNIX) as sock:
        assert f"--unix-socket {path}" in process.printed(8)
        assert str(path) in one_line_error("--listen", f"unix:{path}")  # and nothing takes its place
        process.kill()  # what it leaves behind is no obstacle
        process.start()
        sock.settimeout(DEADLINE_S)
        sock.connect(str(path))
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_pipelined_requests_are_answered_in_order(server):
    requests = [POST + b"Content-Length: %d\r\n\r\n%d" % (len(str(n)), n) for n in range(20)]
    requests.append(POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\n20\r\n0\r\nX: y\r\n\r\n")
    statuses, received = server.answers(b"\r\n".join(requests))
    assert statuses == [201] * 21
    assert [int(n) for n in re.findall(rb'{"id": (\d+)', received)] == list(range(1, 22))
    assert [row[4] for row in rows(server, "SELECT * FROM messages")] == [str(n) for n in range(21)]


# migrate and backup


def copied(path):
    with contextlib.closing(sqlite3.connect(path)) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [row[0] for row in copy.execute("SELECT id FROM messages ORDER BY id")]


def test_a_backup_is_of_one_moment_while_messages_come_in(server, tmp_path, command):
    with sending(server, json.dumps("x" * 50_000)) as answers:
        eventually(lambda: len(answers) > 300)
        before = len(answers)
        assert command("backup", tmp_path / "copy.db") == (0, "", "")
        eventually(lambda: len(answers) > before + 5)
    ids = copied(tmp_path / "copy.db")
    assert ids == list(range(1, len(ids) + 1))
    assert before <= len(ids) <= len(answers)
    assert not list(tmp_path.glob("*.partial"))


def test_a_backup_replaces_a_file_only_if_told_to(store, one_line_error, command, tmp_path):
    append(store, "messages", "1")
    target = tmp_path / "copy.db"
    target.write_bytes(b"the old one")
    assert "--replace" in one_line_error("backup", target)
    assert target.read_bytes() == b"the old one"
    assert command("backup", target, "--replace") == (0, "", "")
    assert copied(target) == [1]


def test_a_backup_is_never_put_over_its_own_database(store, one_line_error, command, tmp_path):
    assert command("backup", tmp_path / "alone.db")[0] == 0
    line = one_line_error("backup", tmp_path / "alone.db", "--replace", "--database", tmp_path / "alone.db")
    assert "the database itself" in line


@pytest.mark.parametrize(("target", "words"), [
    ("inlet.db", "itself"), ("used.db", "used.db-wal"), ("stale.db", "stale.db-journal"), ("folder", "folder"), (".", "folder"),
    ("no-such-folder/x.db", "no-such-folder/x.db"),
])  # fmt: skip
def test_a_backup_that_cannot_be_is_one_line(target, words, store, one_line_error, tmp_path, monkeypatch):
    """And touches nothing."""
    monkeypatch.chdir(tmp_path)
    append(store, "messages", "1")
    (tmp_path / "folder").mkdir()
    for name in ("used.db-wal", "stale.db-journal"):
        (tmp_path / name).write_bytes(b"another's")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for more in ([], ["--replace"]):
        assert words in one_line_error("backup", target, *more)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_of_two_backups_to_one_path_each_is_whole_or_refused(store, tmp_path):
    for _ in range(10):
        append(store, "messages", json.dumps("x" * 900_000))
    backups = [start(tmp_path, "backup", str(tmp_path / "copy.db")) for _ in range(3)]
    errors = [process.communicate(timeout=DEADLINE_S)[1] for process in backups]
    assert sorted(process.returncode for process in backups) == [0, 2, 2]
    assert sorted(error.count("\n") for error in errors) == [0, 1, 1]
    assert copied(tmp_path / "copy.db") == list(range(1, 11))
    assert not list(tmp_path.glob("*.partial*"))


# The command line


def test_clients_are_added_listed_and_removed_beside_a_running_server(server, tmp_path, command):
    added = run(tmp_path, "client", "add", "sensor-7", "--can", "write:readings", "--can", "read")
    token = added.stdout.strip()
    assert (added.returncode, added.stdout.count("\n"), added.stderr) == (0, 1, "")
    assert "\twrite:readings read\ttoken\n" in command("client", "list")[1]
    connection, authorization = server.connect(), {"Authorization": f"Bearer {token}"}
    eventually(lambda: send(connection, "POST", "/readings", READING, **authorization)[0] == 201, within_s=5)
    assert send(connection, "POST", "/messages", READING, **authorization)[0] == 403
    assert command("client", "remove", "sensor-7") == (0, "", "")
    assert "sensor-7" not in command("client", "list")[1]
    eventually(lambda: send(connection, "POST", "/readings", READING, **authorization)[0] == 401, within_s=5)


@pytest.mark.parametrize(("arguments", "words"), [
    (["add", "x", "--can", "write:nothing"], "nothing"), (["add", "x", "--can", "delete"], "delete"), ([], "add NAME"),
    (["add", "white space"], "NAME"), (["remove", "tester", "0000"], "'0000'"), (["remove", "tester", ""], "''"),
    (["add", "x", "--secret", "-"], "--signs"), (["remove", "nobody"], "nobody"),
])  # fmt: skip
def test_what_cannot_be_done_to_a_client_is_one_line(arguments, words, store, one_line_error):
    assert words in one_line_error("client", *arguments)
    assert rows(store, "SELECT name FROM clients") == [("tester",)]


@pytest.mark.parametrize("schema", [SCHEMA.replace("< 10", "< 20"), "DROP TABLE x;", None])
def test_a_leaked_token_can_be_revoked_whatever_schema_sql_looks_like(schema, store, command, tmp_path):
    (tmp_path / "schema.sql").unlink()
    if schema:
        (tmp_path / "schema.sql").write_text(schema)
    assert command("client", "list")[1].startswith("tester\t")
    assert command("client", "remove", "tester") == (0, "", "")
    status, token, _ = command("client", "add", "other")
    assert status == 0
    assert rows(store, "SELECT name, token FROM clients") == [("other", service.digest_of(token.strip()))]


def test_the_first_token_is_the_one_that_the_owner_sets(tmp_path):
    """From the environment or a file. Then nothing secret is printed."""
    (tmp_path / "secret").write_text("a-token-from-a-file\n")
    for folder, environ, token in (
        ("one", {"INLET_TOKEN": " a-token-of-the-owner "}, "a-token-of-the-owner"),
        ("two", {"INLET_TOKEN_FILE": str(tmp_path / "secret")}, "a-token-from-a-file"),
    ):
        (tmp_path / folder).mkdir()
        for _ in range(2):  # what is made has its token, whatever is set later
            with contextlib.closing(Process(tmp_path / folder, environ=environ)) as server:
                assert send(server.connect(), "GET", "/", Authorization=f"Bearer {token}")[0] == 200
                assert rows(server, "SELECT name FROM clients") == [("default",)]
                assert server.terminate() == 0
                assert token not in server.process.stdout.read() + server.log
                assert ("INLET_TOKEN is not a token of this database" in server.log) == (
                    "INLET_TOKEN" in environ and token not in environ["INLET_TOKEN"]
                )
            environ = {"INLET_TOKEN": "another-token-later"}


def test_a_first_token_that_is_none_ends_the_start(one_line_error, store, monkeypatch):
    for name, value in (
        ("INLET_TOKEN", "short"),
        ("INLET_TOKEN", "a token with spaces in it"),
        ("INLET_TOKEN_FILE", "nowhere"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert name in one_line_error()


def test_clients_are_made_before_the_first_start(command, tmp_path, server_with):
    """Then there is no client default."""
    (tmp_path / "schema.sql").write_text(SCHEMA)
    assert command("migrate") == (0, "there is no database yet: the first start makes it\n", "")
    assert not (tmp_path / "inlet.db").exists()
    status, token, _ = command("client", "add", "shop", "--can", "write:readings", "read")
    assert status == 0
    server = server_with()
    assert send(server.connect(), "GET", "/", Authorization=f"Bearer {token.strip()}")[0] == 200
    assert rows(server, "SELECT name FROM clients") == [("shop",)]
    assert "first start" not in server.log


@pytest.mark.parametrize("words", ["client list", "client remove x", "backup copy.db"])
def test_only_serving_and_client_add_make_a_database(words, one_line_error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.sql").write_text(SCHEMA)
    assert "there is no database" in one_line_error(*words.split())
    assert list(tmp_path.iterdir()) == [tmp_path / "schema.sql"]


# The program in recipes/


def test_the_consumer_and_the_sender_in_python_work(server):
    exec(recipe("client.py"), names := {})
    sent = [names["send"](f"{server.url}/messages", TOKEN, {"n": n}) for n in range(3)]
    seen, url = [], f"{server.url}/messages?limit=2"
    for _ in range(3):  # each time from the URL that was kept
        message, url = next(names["messages"](url, TOKEN))
        seen.append((message["id"], message["body"]["n"]))
    assert seen == list(zip(sent, range(3), strict=True))
    assert url == f"{server.url}/messages?after=3&limit=2"


class Trouble(http.server.BaseHTTPRequestHandler):
    """Answers what stands in `answers`: (status, headers, body); a status of 0 is no answer."""

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers["Idempotency-Key"], body))
        status, headers, body = self.server.answers.pop(0) if self.server.answers else (410, {}, b"")
        if status:
            self.send_response(status)
            for header in ({"Content-Length": len(body)} | headers).items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body)

    do_POST = do_GET


def test_the_consumer_and_the_sender_in_python_outlast_all_that_can_pass():
    trouble = [(503, {"Retry-After": 7}, b"{}"), (429, {"Retry-After": 9}, b"{}"), (408, {}, b"{}"), (0, {}, b"")]
    trouble += [(502, {}, b"<html>"), (200, {"Content-Length": 500}, b'{"id": 7, "mess')]
    page = b'{"messages": [{"id": 41, "body": %b}, {"id": 42, "body": 2}], "next": "/under/messages?after=42"}'
    page %= b"1" * 4301
    exec(recipe("client.py"), names := {})
    slept = []
    names["time"] = types.SimpleNamespace(sleep=slept.append)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Trouble) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        server.asked, server.answers = [], [*trouble, (201, {}, b'{"id": 7, "received_at": "t"}')]
        assert names["send"](f"{url}/messages", TOKEN, {"n": 1}) == 7
        assert server.asked == [server.asked[0]] * 7  # the same key and body each time
        assert server.asked[0][1]
        assert slept[:2] == [7, 9]
        server.asked, server.answers = [], [*trouble, (200, {}, page), (200, {}, page)]
        feed = names["messages"](f"{url}/under/messages?wait=30", TOKEN)
        (first, first_url), (second, second_url) = next(feed), next(feed)
        assert (first["id"], second, first_url) == (41, {"id": 42, "body": 2}, f"{url}/under/messages?after=41")
        next(names["messages"](second_url, TOKEN))
        asked = ["/under/messages?wait=30"] * 7 + ["/under/messages?after=42"]
        assert [path for path, _, _ in server.asked] == asked
        assert slept[6:8] == [7, 9]
        server.answers = [(422, {}, b"{}")]  # what would never pass
        with pytest.raises(Exception, match="422"):
            names["send"](f"{url}/messages", TOKEN, {"n": 1})
        server.shutdown()
