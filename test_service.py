"""The tests of service.py, in its order. Real SQLite, real files, real processes; only the clock is ever faked."""

import base64
import contextlib
import gzip
import http.client
import io
import json
import os
import random
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
import tracemalloc
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


CLIENTS = (
    "CREATE TABLE IF NOT EXISTS clients"
    " (name TEXT NOT NULL PRIMARY KEY, token TEXT NOT NULL UNIQUE, can TEXT NOT NULL) STRICT;\n"
)

# Every kind of rule that can refuse a message, beside a stream that takes everything.
SCHEMA = (
    CLIENTS
    + stream_sql("messages")
    + "CREATE TABLE IF NOT EXISTS sensors (name TEXT PRIMARY KEY) STRICT;\n"
    + "INSERT OR IGNORE INTO sensors VALUES ('a-17'), ('b-4');\n"
    + stream_sql(
        "readings",
        """,
    sensor TEXT NOT NULL AS (body ->> 'sensor') REFERENCES sensors (name),
    value REAL NOT NULL AS (body ->> 'value')
        CONSTRAINT "value must be between -90 and 60" CHECK (value BETWEEN -90 AND 60),
    serial INTEGER AS (body ->> 'serial') CONSTRAINT "this serial number was used" UNIQUE,
    lot TEXT AS (body ->> 'lot') UNIQUE,
    batch TEXT AS (body ->> 'batch'),
    size INTEGER AS (abs(body ->> 'size')),
    note TEXT AS (body ->> 'note') CHECK (length(note) < 10)""",
    )
    + 'CREATE UNIQUE INDEX "one reading for each batch" ON readings (batch);\n'
    + "CREATE TRIGGER no_mondays BEFORE INSERT ON readings WHEN NEW.note = 'monday'\n"
    + "BEGIN SELECT RAISE(ABORT, 'there is no reading on mondays'); END;\n"
    + "CREATE TABLE counts (sensor TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT;\n"
    + "CREATE TRIGGER count_readings AFTER INSERT ON readings BEGIN\n"
    + "INSERT INTO counts VALUES (NEW.sensor, 1) ON CONFLICT (sensor) DO UPDATE SET n = n + 1; END;\n"
    + "CREATE TABLE weights (n INTEGER) STRICT;\n"
    + "CREATE TRIGGER weigh AFTER INSERT ON readings WHEN NEW.body ->> 'weight' IS NOT NULL\n"
    + "BEGIN INSERT INTO weights VALUES (NEW.body ->> 'weight'); END;\n"
    + "CREATE VIEW warm AS SELECT * FROM readings WHERE value > 20;\n"
)
TOKEN = "a-token-for-tests"
READING = '{"sensor": "a-17", "value": 21.5}'


# Fixtures


@pytest.fixture
def schema_file(tmp_path):
    path = tmp_path / "schema.sql"
    path.write_text(SCHEMA)
    return path


@pytest.fixture
def store(tmp_path, schema_file):
    store = service.Store(
        tmp_path / "inlet.db", service.read_schema(schema_file), clock=lambda: "2026-11-22T10:00:00.123Z"
    )
    store.open()
    store.add_client("tester", service.digest_of(TOKEN), "write read")
    yield store
    store.close()


class Client(falcon.testing.TestClient):
    """A client of the app, in process, with a token."""

    def post(self, stream, body, **headers):
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        return self.simulate_post(f"/{stream}", body=body, headers={k: v for k, v in headers.items() if v is not None})

    def get(self, path, **headers):
        headers = {"Authorization": f"Bearer {TOKEN}"} | headers
        return self.simulate_get(path, headers=headers)


@pytest.fixture
def client(store):
    return Client(service.create_app(store, max_body=100_000))


@pytest.fixture
def one_line_error(capsys):
    """Runs the command line, which must fail with one clear line; returns (status, line)."""

    def run(*arguments):
        try:
            status = service.main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("inlet: ")
        assert printed.err.count("\n") == 1
        return status, printed.err

    return run


class Process:
    """`python service.py` as a process of its own, on a free port."""

    def __init__(self, folder: Path, *arguments: str, environ: dict[str, str] | None = None):
        self.database = folder / "inlet.db"
        self.folder = folder
        self.arguments = ["--database", str(self.database), "--listen", "127.0.0.1:0", *arguments]
        self.environ = environ or {}
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "service.py"), *self.arguments],
            stdout=subprocess.PIPE,
            stderr=open(self.folder / "log", "a"),  # noqa: SIM115
            text=True,
            env=os.environ | self.environ,
        )
        first_line = self.process.stdout.readline()  # ends too when the process does
        assert "listening on" in first_line, (self.folder / "log").read_text()
        self.url = first_line.split()[-1]
        self.address = self.url.removeprefix("http://")

    def printed(self, lines):
        return "".join(self.process.stdout.readline() for _ in range(lines))

    def connect(self):
        return http.client.HTTPConnection(self.address, timeout=DEADLINE_S)

    def terminate(self, number=signal.SIGTERM):
        """Asks it to end; its exit status. Fails if it has to be killed."""
        self.process.send_signal(number)
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail("the server did not end")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        if self.process.poll() is None:
            assert self.terminate() == 0
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path, store):
    """A server beside the store: same database, same schema."""
    with contextlib.closing(Process(tmp_path, "--schema", str(tmp_path / "schema.sql"))) as process:
        yield process


def send(connection, method, path, body=None, **headers):
    """One request over a socket; (status, headers, body). A body that is a list of bytes goes in chunks."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    chunked = isinstance(body, list)
    if chunked:
        headers["Transfer-Encoding"] = "chunked"
    connection.request(method, path, iter(body) if chunked else body, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def append(store, stream, body, key=None):
    """A message straight into the store; its id."""
    entry = service.Entry(store.schema.streams[stream], "x", key, [body])
    store.append(entry)
    return entry.first_id


def rows(store, sql="SELECT * FROM readings"):
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        return db.execute(sql).fetchall()


def raw_bodies(page: bytes) -> list[bytes]:
    """The bodies of a page in the NDJSON form, as bytes and not as values."""
    return [line.partition(b'"body": ')[2][:-1] for line in page.splitlines()]


# Settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], ["--threads", "INLET_THREADS", "1 to 1000"]),
        (["--threads", "many"], ["--threads", "'many'"]),
        (["--max-body", "1e6"], ["--max-body", "INLET_MAX_BODY"]),
        (["--listen", "8080"], ["--listen", "HOST:PORT"]),
        (["--listen", "127.0.0.1:99999"], ["--listen"]),
        (["--listen", "unix:"], ["--listen", "unix:PATH"]),
        (["--prefix", "ingest/"], ["--prefix", "INLET_PREFIX", "/ingest"]),
        (["--schema", "no-such.sql"], ["no-such.sql", "cannot be read"]),
        (["--database", "no-such-folder/inlet.db"], ["no-such-folder/inlet.db"]),
        (["--database", ""], ["--database", "the path of a file"]),
        (["--database", "."], ["--database", "the path of a file"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["no-such-command"], ["no-such-command"]),
        (["client", "add", "x", "--can", "write:nothing"], ["write:nothing"]),
        (["client", "add", "x", "--can", "delete"], ["delete"]),
        (["client", "add", "white space"], ["NAME"]),
        (["client", "remove", "nobody"], ["nobody"]),
        (["migrate"], ["there is no database"]),
        (["backup", "copy.db"], ["there is no database"]),
    ],
)
def test_it_ends_with_one_line_if_it_cannot_run_like_this(arguments, words, one_line_error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, line = one_line_error(*arguments)
    assert status == 2
    assert all(word in line for word in words), line


def test_a_flag_counts_more_than_the_environment(monkeypatch):
    monkeypatch.setenv("INLET_MAX_BODY", "10")
    monkeypatch.setenv("INLET_THREADS", "3")
    settings = service.settings_from(service.settings_in_environment() | {"max_body": "20"})
    assert (settings.max_body, settings.threads) == (20, 3)


def test_a_bad_value_in_the_environment_is_named(one_line_error, monkeypatch):
    monkeypatch.setenv("INLET_THREADS", "-1")
    status, line = one_line_error()
    assert status == 2
    assert "INLET_THREADS" in line


def test_the_help_names_every_setting_and_command(capsys):
    with pytest.raises(SystemExit):
        service.main(["--help"])
    text = capsys.readouterr().out
    for word in [
        "INLET_LISTEN",
        "INLET_DATABASE",
        "INLET_SCHEMA",
        "INLET_THREADS",
        "INLET_MAX_BODY",
        "client",
        "migrate",
        "backup",
    ]:
        assert word in text


def test_the_script_metadata_names_what_requirements_txt_pins():
    """PEP 723, so that `uv run service.py` works as it is."""
    source = (HERE / "service.py").read_text()
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", source)[1]
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    assert metadata["dependencies"] == (HERE / "requirements.txt").read_text().split()
    assert metadata["requires-python"] == ">=3.11"


# The schema


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("CREATE TABLE x (a INTEGER;", ["line 3", "syntax error"]),
        ("\n\nCREATE TABEL x (a);", ["line 5", "TABEL"]),
        ("DROP TABLE messages;", ["line 3", "only CREATE (not TEMP) and INSERT"]),
        ("PRAGMA journal_mode = DELETE;", ["line 3", "only CREATE (not TEMP) and INSERT"]),
        (stream_sql("x").replace("key TEXT,", ""), ["no such column"]),
        ("CREATE TABLE x (id, received_at, client, body);", ["table x", "lacks the column key TEXT"]),
        (
            stream_sql("x").replace(" AUTOINCREMENT", ""),
            ["table x", "column id must be INTEGER PRIMARY KEY AUTOINCREMENT"],
        ),
        (
            stream_sql("x").replace("client TEXT NOT NULL", "client TEXT"),
            ["table x", "column client must be TEXT NOT NULL"],
        ),
        (stream_sql("x").replace("body TEXT", "body BLOB"), ["table x", "column body must be TEXT NOT NULL"]),
        (stream_sql("x").replace("key TEXT", "key TEXT AS (body ->> 'key')"), ["table x", "column key must be"]),
        (stream_sql("x").partition("CREATE UNIQUE")[0], ["table x", "lacks its index", "x_key"]),
        (stream_sql("x").replace("UNIQUE INDEX", "INDEX"), ["table x", "lacks its index"]),
        (stream_sql("x").replace("key IS NOT NULL", "key > 'm'"), ["table x", "lacks its index"]),
        (stream_sql("x", ", note TEXT NOT NULL"), ["table x", "nothing can fill the column note"]),
        (stream_sql("metrics"), ["'metrics'", "cannot be a route"]),
        (stream_sql("x", ", n TEXT AS (body ->> 'n') UNIQUE ON CONFLICT REPLACE"), ["x:", "ON CONFLICT"]),
        (
            stream_sql("x")
            + "CREATE TRIGGER t AFTER INSERT ON x BEGIN INSERT OR ROLLBACK INTO clients VALUES (1, 2, 3); END;",
            ["t:", "RAISE(ABORT"],
        ),
        ("CREATE TEMP TRIGGER t AFTER INSERT ON clients BEGIN SELECT 1; END;", ["line 3", "not TEMP"]),
        ("CREATE TABLE l (a); INSERT INTO l VALUES (1);", ["line 3", "INSERT OR IGNORE"]),
        (stream_sql('"a b"').replace('"a b"_key', "ab_key"), ["'a b'", "cannot be a route"]),
        (stream_sql('"é"').replace('"é"_key', "e_key"), ["cannot be a route"]),
        (stream_sql("x", ", n TEXT AS (body ->> 'n') REFERENCES nowhere (n)"), ["table x", "no such table", "nowhere"]),
        (
            stream_sql("x") + "CREATE TRIGGER t AFTER INSERT ON x BEGIN INSERT INTO nowhere VALUES (1); END;",
            ["table x", "no such table", "nowhere"],
        ),
        (
            stream_sql("x") + "CREATE TRIGGER t BEFORE INSERT ON x BEGIN SELECT raise /**/ (Rollback, 'no'); END;",
            ["t:", "RAISE(ABORT"],
        ),
        (
            stream_sql("x") + "CREATE TRIGGER t AFTER INSERT ON x BEGIN SELECT RAISE(IGNORE); END;",
            ["t:", "RAISE(ABORT"],
        ),
        (
            stream_sql("x", ", n TEXT AS (body ->> 'n') REFERENCES messages (id) DEFERRABLE INITIALLY DEFERRED"),
            ["x:", "deferred"],
        ),
    ],
)
def test_it_refuses_a_schema_that_cannot_work(sql, words, one_line_error, tmp_path):
    path = tmp_path / "schema.sql"
    path.write_text(CLIENTS + "-- a comment; with a semicolon\n" + sql + stream_sql("messages"))
    status, line = one_line_error("--schema", path, "--database", tmp_path / "inlet.db")
    assert status == 2
    assert str(path) in line
    assert all(word in line for word in words), line
    assert not (tmp_path / "inlet.db").exists()


@pytest.mark.parametrize(
    ("sql", "word"),
    [
        (CLIENTS, "no table has the columns"),
        (stream_sql("x"), "lacks the table clients"),
        (stream_sql("x") + CLIENTS.replace("can TEXT NOT NULL", "can TEXT"), "can TEXT NOT NULL"),
        (stream_sql("x") + CLIENTS.replace("PRIMARY KEY", ""), "each name only once"),
        (stream_sql("x") + CLIENTS.replace("can TEXT", "mail TEXT NOT NULL, can TEXT"), "clients.mail"),
    ],
)
def test_it_refuses_a_schema_without_streams_or_clients(sql, word, one_line_error, tmp_path):
    (tmp_path / "schema.sql").write_text(sql)
    status, line = one_line_error("--schema", tmp_path / "schema.sql", "--database", tmp_path / "inlet.db")
    assert status == 2
    assert word in line


def test_it_refuses_an_old_sqlite_by_name(one_line_error, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 37, 2))
    status, line = one_line_error()
    assert status == 2
    assert "SQLite" in line
    assert "3.38.0" in line


def test_only_tables_with_the_message_columns_are_streams(store):
    assert list(store.schema.streams) == ["messages", "readings"]
    assert tuple(store.schema.streams["readings"].filters) == (
        "sensor",
        "value",
        "serial",
        "lot",
        "batch",
        "size",
        "note",
    )


def test_the_shipped_schema_and_the_example_in_its_comments_work(tmp_path):
    text = (HERE / "schema.sql").read_text()
    example = text[text.index("-- CREATE TABLE") : text.index("-- One stream")].replace("-- ", "")
    (tmp_path / "schema.sql").write_text(text + example)
    assert set(service.read_schema(tmp_path / "schema.sql").streams) == {"messages", "readings"}


def test_other_ways_to_write_the_same_stream_are_taken(tmp_path):
    written = (
        "\ufeff"
        + CLIENTS
        + 'CREATE TABLE "m" ("id" INTEGER, [received_at] TEXT NOT NULL, `client` TEXT NOT NULL, key TEXT,'
        " body TEXT NOT NULL, note TEXT DEFAULT 'INITIALLY DEFERRED', PRIMARY KEY (id AUTOINCREMENT), UNIQUE (client, key));"
    )
    (tmp_path / "schema.sql").write_text(written)
    store = service.Store(tmp_path / "inlet.db", service.read_schema(tmp_path / "schema.sql"))
    store.open()
    assert [append(store, "m", "1", key="k") for _ in range(2)] == [1, 1]
    store.close()


def test_named_constraints_are_found_however_they_are_written(tmp_path):
    sql = stream_sql(
        "x",
        """, a TEXT CONSTRAINT "send an a" NOT NULL AS (body ->> 'a'), b TEXT AS (body ->> 'b'),
        CONSTRAINT "one a and b" UNIQUE (a, "b"), CONSTRAINT [no "q"] CHECK (b <> 'q')""",
    )
    (tmp_path / "schema.sql").write_text(CLIENTS + sql)
    assert service.read_schema(tmp_path / "schema.sql").sentences == {
        "NOT NULL constraint failed: x.a": "send an a",
        "UNIQUE constraint failed: x.a, x.b": "one a and b",
        'CHECK constraint failed: no "q"': 'no "q"',
    }


def test_what_a_trigger_does_on_conflict_is_its_own_matter(tmp_path):
    sql = (
        "CREATE TABLE seen (name TEXT PRIMARY KEY); CREATE TRIGGER t AFTER INSERT ON messages BEGIN"
        " INSERT OR IGNORE INTO seen VALUES (NEW.body); INSERT OR REPLACE INTO seen VALUES ('last'); END;"
    )
    (tmp_path / "schema.sql").write_text(CLIENTS + stream_sql("messages") + sql)
    store = service.Store(tmp_path / "inlet.db", service.read_schema(tmp_path / "schema.sql"))
    store.open()
    assert [append(store, "messages", "1") for _ in range(2)] == [1, 2]
    store.close()


def test_a_full_text_index_kept_by_a_trigger_just_works(tmp_path):
    sql = (
        "CREATE VIRTUAL TABLE found USING fts5 (text);\n"
        "CREATE TRIGGER index_it AFTER INSERT ON messages BEGIN INSERT INTO found VALUES (NEW.body); END;"
    )
    (tmp_path / "schema.sql").write_text(CLIENTS + stream_sql("messages") + sql)
    for _ in range(2):  # and the second start finds no difference
        store = service.Store(tmp_path / "inlet.db", service.read_schema(tmp_path / "schema.sql"))
        store.open()
        append(store, "messages", '"a needle"')
        store.close()
    assert rows(store, "SELECT count(*) FROM found WHERE found MATCH 'needle'") == [(2,)]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("< 10", "< 20", ["table readings has changed", "+ note", "- note"]),
        ("'there is no", "'there was no", ["trigger no_mondays has changed"]),
        ("ON readings (batch)", "ON readings (batch, lot)", ["index one reading for each batch has changed"]),
        ("CREATE VIEW warm", "CREATE VIEW hot", ["view hot is new"]),
        ("readings", "measures", ["table measures is new", "table readings is gone"]),
    ],
)
def test_it_refuses_a_database_that_differs_from_the_schema(old, new, words, store, schema_file, one_line_error):
    schema_file.write_text(SCHEMA.replace(old, new))
    status, line = one_line_error("--schema", schema_file, "--database", store.path)
    assert status == 2
    assert "migrate" in line
    assert all(word in line for word in words), line


def test_comments_white_space_and_tables_of_others_are_no_difference(store, schema_file):
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        db.execute("CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER)")
        db.execute("CREATE VIEW mine AS SELECT 1")
    schema_file.write_text(SCHEMA.replace(", value REAL", " /* a comment */ ,\n\n value   REAL -- more\n"))
    again = service.Store(store.path, service.read_schema(schema_file))
    again.open()
    again.close()


# POST


def test_it_takes_a_message(client, store):
    answer = client.post("readings", READING)
    assert answer.status_code == 201
    assert answer.headers["Location"] == "/readings/1"
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json == {"id": 1, "received_at": "2026-11-22T10:00:00.123Z"}
    assert rows(store, "SELECT id, received_at, client, key, body, sensor, value FROM readings") == [
        (1, "2026-11-22T10:00:00.123Z", "tester", None, READING, "a-17", 21.5)
    ]
    assert rows(store, "SELECT * FROM counts") == [("a-17", 1)]


def reading(**members):
    return json.dumps({"sensor": "a-17", "value": 1} | members)


def refusals():
    """Every refusal of a POST: what is sent, the status, words in the answer, its members."""
    r = "readings"
    yield "no member", r, '{"value": 1}', {}, 422, ["sensor is required"], {"stream": r}
    yield "null member", r, reading(sensor=None), {}, 422, ["sensor is required"], {"stream": r}
    yield "not an object", r, "[1, 2]", {}, 422, ["sensor is required"], {}
    yield "named check", r, reading(value=61), {}, 422, ["value must be between -90 and 60"], {}
    yield "unnamed check", r, reading(note="0123456789"), {}, 422, ["breaks a rule"], {}
    yield "type", r, reading(weight="x"), {}, 422, ["cannot store TEXT value in INTEGER column weights.n"], {}
    yield "foreign key", r, reading(sensor="c"), {}, 422, ["does not exist"], {}
    yield "trigger", r, reading(note="monday"), {}, 422, ["there is no reading on mondays"], {}
    yield "overflow", r, reading(size=-(2**63)), {}, 422, ["cannot be applied"], {}
    yield "named unique", r, reading(serial=7), {}, 409, ["this serial number was used"], {"stream": r}
    yield "unnamed unique", r, reading(lot="L"), {}, 409, ["the same lot"], {}
    yield "unique index", r, reading(batch="B"), {}, 409, ["one reading for each batch"], {}
    yield "key of another body", r, READING, {"Idempotency_Key": "used"}, 422, ["another body"], {}
    for name, key in {"empty": "", "space": "a b", "long": "k" * 256, "ä": "ä", "quotes": '""', "list": "a, b"}.items():
        yield f"key: {name}", r, READING, {"Idempotency_Key": key}, 400, ["Idempotency-Key", "255"], {}
    kinds = ["application/json", "application/*+json", "application/x-ndjson", "application/jsonl"]
    accepted = {"accepted": kinds}
    for kind in (None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "text/json",
                 "application/json; charset=latin-1", "", "json"):  # fmt: skip
        yield f"type {kind}", r, READING, {"Content_Type": kind}, 415, ["application/json"], accepted
    yield "too large", r, '"' + "x" * 100_000 + '"', {}, 413, ["100000 bytes"], {"limit": 100_000}
    yield "cut short", r, READING, {"Content_Length": "1000"}, 400, ["cut short", "of 1000 bytes"], {}
    for coding in ("br", "deflate", "gzip, gzip", "zstd"):
        yield f"coding {coding}", r, READING, {"Content_Encoding": coding}, 415, ["gzip"], {"accepted": ["gzip"]}
    yield "not gzip", r, READING, {"Content_Encoding": "gzip"}, 400, ["not gzip"], {}
    nd, good = {"Content_Type": "application/x-ndjson"}, READING + "\n"
    yield "batch: empty", r, "\n\r\n", nd, 400, ["empty"], {}
    yield "batch: bad line", r, good * 2 + '{"a": nul}\n' + good, nd, 400, ["line 3 column 7"], {"line": 3, "column": 7}
    yield "batch: blank line", r, good + "\n" + good, nd, 400, ["line 2 column 1"], {"line": 2}
    yield "batch: one value on two lines", r, '{"sensor":\n "a-17"}', nd, 400, ["line 1"], {"line": 1}
    yield "batch: two values on a line", r, READING + READING, nd, 400, ["Extra data, line 1"], {"line": 1}
    yield "batch: NaN", r, good + "NaN", nd, 400, ["NaN", "line 2 column 1"], {"line": 2}
    yield "batch: depth", r, good + "[" * 600 + "]" * 600, nd, 400, ["nested", "line 2 column 513"], {"line": 2}
    yield "batch: first line", r, "{}\n" + good, nd, 422, ["sensor is required"], {"line": 1, "stream": r}
    yield "batch: refused line", r, good * 3 + reading(value=99), nd, 422, ["-90 and 60"], {"line": 4, "stream": r}
    yield "batch: lines that collide", r, f"{reading(lot='M')}\n{reading(lot='M')}", nd, 409, ["same lot"], {"line": 2}
    yield "batch: trigger", r, good + reading(note="monday") + "\n" + good, nd, 422, ["on mondays"], {"line": 2}
    yield "batch: overflow", r, good + reading(size=-(2**63)), nd, 422, ["cannot be applied"], {"line": 2}
    used_key = nd | {"Idempotency_Key": "used"}
    yield "batch: key of another body", r, good * 2, used_key, 422, ["another body"], {}
    yield "batch: too many", r, "1\n" * 10_001, nd, 413, ["10000 messages"], {"limit": 10_000}
    yield "bad JSON", r, '{"a": 1,\n "b": tru}', {}, 400, ["line 2 column 7"], {"line": 2, "column": 7}
    yield "no token", r, READING, {"Authorization": None}, 401, ["Bearer"], {}
    yield "bad token", r, READING, {"Authorization": "Bearer nonsense"}, 401, ["not valid"], {}
    yield "no such stream", "nothing", READING, {}, 404, ["nothing at this path"], {}
    yield "not a stream", "sensors", READING, {}, 404, ["nothing at this path"], {}
    yield "method", "readings/1", READING, {}, 405, ["method"], {}


@pytest.mark.parametrize(
    ("stream", "body", "headers", "status", "words", "members"),
    [pytest.param(*refusal, id=name) for name, *refusal in refusals()],
)
def test_it_refuses(stream, body, headers, status, words, members, client, store):
    used = '{"sensor": "a-17", "value": 1, "serial": 7, "lot": "L", "batch": "B"}'
    assert client.post("readings", used, Idempotency_Key="used").status_code == 201
    before = rows(store), rows(store, "SELECT * FROM counts")

    answer = client.post(stream, body, **headers)

    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["status"] == status
    assert answer.json["title"]
    assert all(word in answer.json["detail"] for word in words), answer.json
    assert members.items() <= answer.json.items()
    assert (rows(store), rows(store, "SELECT * FROM counts")) == before
    for secret in (TOKEN, "INSERT", "length(note)", "0123456789", "monday'"):
        assert secret not in answer.text


def test_a_refused_message_uses_up_no_id_of_the_next(client):
    assert client.post("readings", READING).json["id"] == 1
    assert client.post("readings", "{}").status_code == 422
    assert client.post("readings", READING).json["id"] == 2


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", 'Application/JSON; charset="UTF-8"', "application/vnd.api+json"]
)
def test_it_takes_every_json_type(kind, client):
    assert client.post("messages", "{}", Content_Type=kind).status_code == 201


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
def test_it_takes_json_as_rfc_8259_has_it_and_nothing_else(data, is_json, client, store):
    answer = client.post("messages", data, Content_Length=str(len(data)))
    if is_json:
        assert answer.status_code == 201
        page = client.get("/messages").content
        assert page.startswith(b'{"messages": [{"id": 1, ')
        assert page.endswith(b'"body": ' + data + b'}], "next": "/messages?after=1"}')
        assert client.get("/messages/1").content.endswith(b'"key": null, "body": ' + data + b"}")
        assert rows(store, "SELECT CAST(body AS BLOB) FROM messages") == [(data,)]
    else:
        assert answer.status_code == 400
        assert {"line", "column"} <= answer.json.keys()
        assert rows(store, "SELECT * FROM messages") == []


@pytest.mark.parametrize(
    ("data", "line", "column"),
    [
        (b"{}\n\n  x", 3, 3),
        ("é€😀x".encode(), 1, 1),
        (b'["abc\xff"]', 1, 6),
        (b'{"a": 1,\n"b": NaN}', 2, 6),
        (b'["NaN", "Infinity \\" NaN",\n-Infinity]', 2, 1),
        (b"[\n" * 513 + b"]" * 513, 513, 1),
        (b"", 1, 1),
    ],
)
def test_it_says_where_a_body_stops_being_json(data, line, column, client):
    answer = client.post("messages", data, Content_Length=str(len(data)))
    assert answer.status_code == 400
    assert (answer.json["line"], answer.json["column"]) == (line, column)


@pytest.mark.parametrize("data", ["[]" * 600 + '"\\' * 300_000, '"' * 600_000, "[" * 600 + '"\\"' * 200_000])
def test_no_text_takes_long_to_refuse(data, client):
    started = time.process_time()
    assert client.post("messages", data[:99_999]).status_code == 400
    with pytest.raises(service.Problem):
        service.json_text(data.encode())
    with contextlib.suppress(service.Problem):
        service.refuse_depth(data, 1)
    assert time.process_time() - started < 2


def test_a_stream_of_random_bytes_is_never_an_internal_error(client):
    chosen = random.Random(1)
    alphabet = [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"1",
        b"e9",
        b"-",
        b"true",
        b"\xff",
        b"\0",
        b"NaN",
        b" ",
        b"\n",
        b"a",
    ]
    statuses = set()
    for _ in range(3000):
        data = b"".join(chosen.choices(alphabet, k=chosen.randint(0, 12)))
        answer = client.post("messages", data, Content_Length=str(len(data)))
        statuses.add(answer.status_code)
        if answer.status_code == 201:
            assert sqlite3.connect(":memory:").execute("SELECT json_valid(?)", (data.decode(),)).fetchone() == (1,)
    assert statuses == {201, 400}


@pytest.mark.parametrize(
    ("length", "status"),
    [(None, 411), ("-5", 400), ("1_0", 400), ("2 ", 400), ("٣", 400), ("9" * 5000, 413), ("100001", 413), ("3", 400)],
)
def test_it_reads_exactly_what_content_length_says(length, status):
    environ = {"wsgi.input": io.BytesIO(b"{}"), "CONTENT_LENGTH": length}
    with pytest.raises(service.Problem) as refused:
        service.read_body(environ, 100_000)
    assert refused.value.status == status


def test_it_reads_a_body_that_comes_in_pieces_and_one_without_a_length():
    class Trickle(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 3))

    assert service.read_body({"wsgi.input": Trickle(b"[1, 2, 3]"), "CONTENT_LENGTH": "9"}, 9) == b"[1, 2, 3]"
    chunked = {"wsgi.input_terminated": True}
    assert service.read_body(chunked | {"wsgi.input": Trickle(b"[1, 2, 3]")}, 9) == b"[1, 2, 3]"
    with pytest.raises(service.Problem) as refused:
        service.read_body(chunked | {"wsgi.input": Trickle(b"[1, 2, 3] ")}, 9)
    assert refused.value.status == 413


def test_it_takes_a_batch(client, store):
    client.post("readings", READING)
    lines = [reading(value=n) for n in range(3)]
    answer = client.post("readings", "\r\n".join(lines) + "\n\n\r\n", Content_Type="application/x-ndjson")
    assert answer.status_code == 201
    assert answer.json == {"count": 3, "first_id": 2, "last_id": 4, "received_at": "2026-11-22T10:00:00.123Z"}
    assert [row[4] for row in rows(store)] == [READING, *lines]
    assert rows(store, "SELECT * FROM counts") == [("a-17", 4)]


@pytest.mark.parametrize("lines", [1, 2, 10_000])
def test_a_batch_is_one_transaction_and_one_statement(lines, client, store):
    client.get("/")
    statements = []
    store._writer.set_trace_callback(statements.append)
    answer = client.post("messages", "1\n" * lines, Content_Type="application/jsonl")
    assert (answer.status_code, answer.json["count"], answer.json["last_id"]) == (201, lines, lines)
    kinds = [statement.split()[0] for statement in statements]
    assert kinds == ["BEGIN", "SAVEPOINT", *["INSERT"] * lines, "SELECT", "RELEASE", "COMMIT"]


def test_a_batch_replays_as_one(client, store):
    batch = {"Content_Type": "application/x-ndjson", "Idempotency_Key": "b"}
    first = client.post("messages", "1\n2\n3\n", **batch)
    client.post("messages", "4")
    again = client.post("messages", "1\r\n2\n3", **batch)
    assert (again.status_code, again.json, again.headers["Idempotent-Replayed"]) == (201, first.json, "true")
    for other in ("1\n2\n", "1\n2\n3\n4\n", "1\n", "1\n3\n2\n", "4\n"):
        assert client.post("messages", other, **batch).status_code == 422
    assert client.post("messages", "1", Idempotency_Key="b").status_code == 422
    assert client.post("messages", "1", Idempotency_Key="b!").status_code == 201  # sorts next to the lines of b
    assert client.post("messages", "1\n2\n3\n", **batch).json == first.json
    assert rows(store, "SELECT key, body FROM messages") == [
        ("b", "1"),
        ("b 2", "2"),
        ("b 3", "3"),
        (None, "4"),
        ("b!", "1"),
    ]


def test_a_refused_batch_in_a_shared_commit_costs_only_itself(store):
    stream = store.schema.streams["readings"]
    group = [
        service.Entry(stream, "x", None, [READING, READING], batch=True),
        service.Entry(stream, "x", "k", [READING, READING, "{}"], batch=True),
        service.Entry(stream, "x", None, [READING]),
    ]
    store._commit(group, time.monotonic() + DEADLINE_S)
    assert [(entry.first_id, entry.problem and entry.problem.status) for entry in group[::2]] == [(1, None), (3, None)]
    assert group[1].problem.status == 422
    assert len(rows(store)) == 3


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip"])
def test_it_unpacks_gzip(coding, client, store):
    assert client.post("messages", gzip.compress(b'{"a":\t1.10}'), Content_Encoding=coding).status_code == 201
    batch = {"Content_Type": "application/x-ndjson", "Content_Encoding": coding}
    assert client.post("messages", gzip.compress(b"1\n2\n"), **batch).json["count"] == 2
    assert client.post("messages", "3", Content_Encoding="identity").status_code == 201
    assert [row[4] for row in rows(store, "SELECT * FROM messages")] == ['{"a":\t1.10}', "1", "2", "3"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (gzip.compress(json.dumps("x" * 99_998).encode()), 201),
        (gzip.compress(json.dumps("x" * 99_999).encode()), 413),
        (gzip.compress(b"{}")[:-1], 400),
        (gzip.compress(b"{}")[:-8] + bytes(8), 400),
        (gzip.compress(b"{}") + b"x", 400),
        (gzip.compress(b"{}") * 2, 400),
        (gzip.compress(b""), 400),
        (zlib.compress(b"{}"), 400),
        (b"\x1f\x8b", 400),
        (b"", 400),
    ],
)
def test_gzip_is_whole_and_within_the_limit_or_refused(data, status, client, store):
    answer = client.post("messages", data, Content_Encoding="gzip", Content_Length=str(len(data)))
    assert answer.status_code == status
    assert len(rows(store, "SELECT * FROM messages")) == (status == 201)


def test_a_gzip_bomb_costs_neither_memory_nor_time():
    """1 MiB that would unpack to more than 1 GiB."""
    packer = zlib.compressobj(9, wbits=31)
    million = bytes(2**20)
    bomb = b"".join(packer.compress(million) for _ in range(1030)) + packer.flush()
    assert len(bomb) > 1_000_000
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(service.Problem) as refused:
        service.without_gzip(bomb, "gzip", 1_048_576)
    assert refused.value.status == 413
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    tracemalloc.stop()
    assert time.process_time() - started < 0.5


# Idempotency


def test_a_key_replays_the_first_answer(client, store):
    first = client.post("readings", READING, Idempotency_Key="k-1")
    assert "Idempotent-Replayed" not in first.headers
    client.post("readings", READING)
    for header in ("k-1", '"k-1"'):
        again = client.post("readings", READING, Idempotency_Key=header)
        assert again.status_code == 201
        assert again.headers["Idempotent-Replayed"] == "true"
        assert (again.json, again.headers["Location"]) == (first.json, first.headers["Location"])
    assert [row[3] for row in rows(store)] == ["k-1", None]


def test_the_same_body_with_other_white_space_is_another_body(client):
    client.post("readings", READING, Idempotency_Key="k")
    assert client.post("readings", READING + " ", Idempotency_Key="k").status_code == 422


def test_a_key_belongs_to_its_client_and_stream(client, store):
    store.add_client("other", service.digest_of("other"), "write")
    for stream, token in (("messages", TOKEN), ("messages", "other"), ("readings", TOKEN)):
        answer = client.post(stream, READING, Idempotency_Key="k", Authorization=f"Bearer {token}")
        assert answer.status_code == 201
        assert "Idempotent-Replayed" not in answer.headers
    assert rows(store, "SELECT client, key FROM messages") == [("tester", "k"), ("other", "k")]


def test_a_retry_is_a_replay_also_where_the_first_would_refuse_the_second(client):
    """The serial number is used: by this very message."""
    body = '{"sensor": "a-17", "value": 1, "serial": 8}'
    first = client.post("readings", body, Idempotency_Key="k")
    again = client.post("readings", body, Idempotency_Key="k")
    assert (again.status_code, again.json) == (201, first.json)


def test_a_retry_of_the_second_client_with_the_same_key_is_its_own(client, store):
    store.add_client("other", service.digest_of("other"), "write")
    other = {"Idempotency_Key": "k", "Authorization": "Bearer other"}
    client.post("messages", "1", Idempotency_Key="k")
    for _ in range(2):
        answer = client.post("messages", "2", **other)
        assert (answer.status_code, answer.json["id"]) == (201, 2)


def test_a_refused_message_leaves_its_key_free(client):
    assert client.post("readings", "{}", Idempotency_Key="k").status_code == 422
    assert client.post("readings", READING, Idempotency_Key="k").status_code == 201


def test_the_longest_key_and_every_visible_character_are_taken(client, store):
    visible = "".join(chr(code) for code in range(0x21, 0x7F))
    for key in ("k" * 255, visible[1:]):
        assert client.post("messages", "{}", Idempotency_Key=key).status_code == 201
    escaped = visible.replace("\\", "\\\\").replace('"', '\\"')
    assert client.post("messages", "{}", Idempotency_Key=f'"{escaped}"').status_code == 201
    assert rows(store, "SELECT key FROM messages") == [("k" * 255,), (visible[1:],), (visible,)]


# The feed


def test_the_feed_goes_on_where_next_says(client):
    for n in range(5):
        client.post("messages", f"[{n}]")
    seen, path = [], "/messages?limit=2"
    for expected in ([1, 2], [3, 4], [5], []):
        answer = client.get(path)
        assert answer.status_code == 200
        assert [message["id"] for message in answer.json["messages"]] == expected
        assert answer.headers["Link"] == f'<{answer.json["next"]}>; rel="next"'
        seen += answer.json["messages"]
        path = answer.json["next"]
    assert path == "/messages?after=5&limit=2"
    assert [message["body"] for message in seen] == [[n] for n in range(5)]
    assert client.get("/messages").json["messages"] == seen
    assert seen[0] == {
        "id": 1, "received_at": "2026-11-22T10:00:00.123Z", "client": "tester", "key": None, "body": [0],
    }  # fmt: skip


def test_the_feed_filters_by_generated_columns(client):
    for sensor, value in (("a-17", 1), ("b-4", 2), ("a-17", 3)):
        client.post("readings", json.dumps({"sensor": sensor, "value": value}))
    answer = client.get("/readings?sensor=a-17&limit=1")
    assert [message["id"] for message in answer.json["messages"]] == [1]
    assert answer.json["next"] == "/readings?after=1&limit=1&sensor=a-17"
    assert [message["id"] for message in client.get(answer.json["next"]).json["messages"]] == [3]
    assert [message["id"] for message in client.get("/readings?value=2.0&sensor=b-4").json["messages"]] == [2]
    assert client.get("/readings?sensor=' OR 1=1 --").json["messages"] == []


def test_a_column_without_a_type_is_filtered_by_its_text(tmp_path):
    (tmp_path / "schema.sql").write_text(CLIENTS + stream_sql("x", ", n ANY AS (body ->> 'n')"))
    store = service.Store(tmp_path / "inlet.db", service.read_schema(tmp_path / "schema.sql"))
    store.open()
    for body in ('{"n": 5}', '{"n": "5"}', '{"n": "abc"}', '{"n": 0}'):
        append(store, "x", body)
    assert [row[0] for row in store.page(store.schema.streams["x"], 0, 9, {"n": "5"})] == [1, 2]
    assert [row[0] for row in store.page(store.schema.streams["x"], 0, 9, {"n": "abc"})] == [3]
    store.close()


@pytest.mark.parametrize(
    "kind", ["application/x-ndjson", "application/jsonl", "application/x-ndjson, application/json;q=0.5"]
)
def test_the_feed_is_ndjson_if_asked(kind, client):
    client.post("messages", '{\n "a":\r\n 1}', Idempotency_Key="k")
    client.post("messages", "2")
    answer = client.get("/messages", Accept=kind)
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    assert answer.headers["Link"] == '</messages?after=2>; rel="next"'
    lines = answer.text.splitlines()
    assert [json.loads(line)["body"] for line in lines] == [{"a": 1}, 2]
    assert json.loads(lines[0])["key"] == "k"
    assert client.get("/messages?after=2", Accept=kind).text == ""


def test_a_page_ends_at_about_4_mib_but_never_empty(client, store):
    for _ in range(9):
        append(store, "messages", json.dumps("x" * 1_000_000))
    append(store, "messages", json.dumps("x" * 6_000_000))
    pages, path = [], "/messages"
    while (page := client.get(path).json)["messages"]:
        pages.append([message["id"] for message in page["messages"]])
        path = page["next"]
    assert pages == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert [m["id"] for m in client.get("/messages?after=9").json["messages"]] == [10]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("limit=0", ["limit", "1 to 1000"]),
        ("limit=1001", ["limit", "1 to 1000"]),
        ("limit=ten", ["limit"]),
        ("after=-1", ["after"]),
        ("after=9223372036854775808", ["after"]),
        ("after=١", ["after"]),
        ("after=", ["after"]),
        ("after=1&after=2", ["after", "more than once"]),
        ("colour=red", ["'colour'", "after, limit, sensor, value"]),
        ("body=x", ["'body'"]),
        ("sensor", None),
    ],
)
def test_the_feed_refuses_what_it_does_not_know(query, words, client):
    answer = client.get(f"/readings?{query}")
    assert answer.status_code == (400 if words else 200)
    if words:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert all(word in answer.json["detail"] for word in words)


def test_one_message_can_be_read(client):
    client.post("messages", '{"b":1.10,"a":2}', Idempotency_Key="k")
    answer = client.get("/messages/1")
    assert answer.status_code == 200
    assert answer.text.endswith('"client": "tester", "key": "k", "body": {"b":1.10,"a":2}}')
    for bad in ("2", "0", "-1", "1.0", "x", "1 OR 1=1", "9" * 30, "9223372036854775808", "%00", "1/2"):
        refused = client.get(f"/messages/{bad}")
        assert refused.status_code == 404, bad
        assert refused.headers["Content-Type"] == "application/problem+json"


def test_head_answers_like_get_without_a_body(client):
    client.post("messages", "{}")
    for path in ("/", "/messages", "/messages/1", "/healthz"):
        answer = client.simulate_head(path, headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 200, path
        assert answer.content == b""


def test_links_honour_the_mount_point(store):
    client = Client(service.create_app(store))
    inside = {
        "extras": {"SCRIPT_NAME": "/a b"},
        "headers": {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
    }
    assert client.simulate_post("/messages", body="{}", **inside).headers["Location"] == "/a%20b/messages/1"
    assert client.simulate_get("/messages", **inside).json["next"] == "/a%20b/messages?after=1"
    assert client.simulate_get("/", **inside).json["streams"]["messages"]["href"] == "/a%20b/messages"


# Errors


def test_an_unexpected_error_says_nothing_and_is_logged(client, store, monkeypatch, caplog):
    def fail(*_):
        raise LookupError("a secret")

    monkeypatch.setattr(store, "message", fail)
    answer = client.get("/messages/1")
    assert answer.status_code == 500
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "secret" not in answer.text
    assert "a secret" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("DELETE", "/messages", 405, {"GET", "HEAD", "POST", "OPTIONS"}),
        ("PUT", "/messages/1", 405, {"GET", "HEAD", "OPTIONS"}),
        ("POST", "/", 405, {"GET", "HEAD", "OPTIONS"}),
        ("GET", "/nothing", 404, None),
        ("GET", "/messages/", 404, None),
        ("GET", "/Messages", 404, None),
        ("GET", "/clients", 404, None),
        ("BREW", "/messages", 501, None),
    ],
)
def test_unknown_paths_and_methods_are_problems_too(method, path, status, allow, client):
    with pytest.warns() if method == "BREW" else contextlib.nullcontext():
        answer = client.simulate_request(method, path, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["status"] == status
    if allow:
        assert set(answer.headers["Allow"].split(", ")) == allow
    assert client.simulate_request(method if allow else "GET", path).status_code == 401  # before anything else


def test_a_database_that_cannot_be_read_is_503(client, store):
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute("ALTER TABLE messages RENAME TO away")
        for path in ("/messages", "/messages/1"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
        answer = client.post("messages", "1")  # not the message's fault
        assert answer.status_code == 503
        db.execute("ALTER TABLE away RENAME TO messages")
    assert client.post("messages", "1").status_code == 201


# Clients


@pytest.mark.parametrize(
    ("authorization", "challenge"),
    [
        (None, 'Bearer realm="inlet", Basic realm="inlet"'),
        ("Bearer wrong", 'error="invalid_token"'),
        ("Bearer", 'error="invalid_token"'),
        ("Bearer ", 'error="invalid_token"'),
        (f"Bearer {TOKEN}, Bearer {TOKEN}", 'error="invalid_token"'),
        (f"Token {TOKEN}", 'error="invalid_token"'),
        (TOKEN, 'error="invalid_token"'),
        ("Bearer \xe9\xff", 'error="invalid_token"'),
        ("Bearer " + "x" * 100_000, 'error="invalid_token"'),
        ("Basic !!!", 'error="invalid_token"'),
        ("Basic " + base64.b64encode(b"no colon").decode(), 'error="invalid_token"'),
        ("Basic " + base64.b64encode(b"\xff:\xff").decode(), 'error="invalid_token"'),
    ],
)
def test_nobody_comes_in_without_a_token(authorization, challenge, client):
    headers = {"Authorization": authorization} if authorization else {}
    for path in ("/", "/messages", "/messages/1", "/nothing"):
        answer = client.simulate_get(path, headers=headers)
        assert answer.status_code == 401
        assert challenge in answer.headers["WWW-Authenticate"]
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert TOKEN not in answer.text


@pytest.mark.parametrize(
    "authorization",
    [f"Bearer {TOKEN}", f"bearer {TOKEN}", "Basic " + base64.b64encode(f"any:{TOKEN}".encode()).decode()],
)
def test_a_token_comes_as_bearer_or_as_the_password_of_basic(authorization, client):
    assert client.simulate_get("/messages", headers={"Authorization": authorization}).status_code == 200


def test_only_digests_are_kept(store):
    with open(store.path, "rb") as database, open(f"{store.path}-wal", "rb") as wal:
        stored = database.read() + wal.read()
    assert service.digest_of(TOKEN).encode() in stored
    assert TOKEN.encode() not in stored


@pytest.mark.parametrize(
    ("can", "allowed"),
    [
        ("write", {("POST", "messages"), ("POST", "readings")}),
        ("read", {("GET", "messages"), ("GET", "readings")}),
        ("write:readings read:messages", {("POST", "readings"), ("GET", "messages")}),
        ("", set()),
    ],
)
def test_a_client_may_do_what_it_was_granted(can, allowed, client, store):
    store.add_client("limited", service.digest_of("limited"), can)
    headers = {"Authorization": "Bearer limited", "Content-Type": "application/json"}
    for method, action in (("POST", "write"), ("GET", "read")):
        for stream in ("messages", "readings"):
            answer = client.simulate_request(method, f"/{stream}", headers=headers, body=READING)
            if (method, stream) in allowed:
                assert answer.status_code in (200, 201)
            else:
                assert answer.status_code == 403
                assert f'error="insufficient_scope", scope="{action}:{stream}"' in answer.headers["WWW-Authenticate"]
    listed = client.simulate_get("/", headers=headers).json["streams"]
    assert listed.keys() == {stream for _, stream in allowed}


def test_the_root_says_what_there_is(client):
    assert client.get("/").json == {
        "service": "Inlet",
        "version": service.__version__,
        "streams": {
            "messages": {"href": "/messages", "can": ["write", "read"], "fields": []},
            "readings": {
                "href": "/readings",
                "can": ["write", "read"],
                "fields": ["sensor", "value", "serial", "lot", "batch", "size", "note"],
            },
        },
    }


def test_a_token_costs_no_sql(client, store):
    client.post("messages", "{}")
    statements = []
    store._writer.set_trace_callback(statements.append)
    store._reader().set_trace_callback(statements.append)
    client.post("messages", "{}")
    store._reader().set_trace_callback(None)
    assert [statement.split()[0] for statement in statements] == ["BEGIN", "INSERT", "COMMIT"]


def test_a_revoked_token_stops_within_seconds_in_a_running_process(server, store):
    connection = server.connect()
    assert send(connection, "GET", "/messages")[0] == 200
    store.remove_client("tester")
    deadline = time.monotonic() + 5
    while send(connection, "GET", "/messages")[0] != 401:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# The store


def test_requests_that_wait_together_share_a_commit(store):
    """While one COMMIT is under way, the others queue; then one of them writes for all."""
    statements = []
    store._writer.set_trace_callback(statements.append)
    queued = threading.Semaphore(0)
    store.gather = lambda entry: queued.release()
    with store._lock:
        threads = [threading.Thread(target=append, args=(store, "messages", f"{n}")) for n in range(8)]
        for thread in threads:
            thread.start()
        for _ in threads:
            queued.acquire()
    for thread in threads:
        thread.join(DEADLINE_S)
    kinds = [statement.split()[0] for statement in statements]
    assert kinds == ["BEGIN", *["INSERT"] * 8, "COMMIT"]
    assert sorted(row[4] for row in rows(store, "SELECT * FROM messages")) == [str(n) for n in range(8)]


def test_a_refused_message_costs_only_itself_in_a_shared_commit(store):
    stream = store.schema.streams["readings"]
    group = [service.Entry(stream, "x", None, [body]) for body in (READING, "{}", READING)]
    store._commit(group, time.monotonic() + DEADLINE_S)
    assert [entry.first_id for entry in group] == [1, 0, 2]
    assert [entry.problem and entry.problem.status for entry in group] == [None, 422, None]
    assert len(rows(store)) == 2


def test_the_same_key_twice_in_a_shared_commit_is_one_row(store):
    stream = store.schema.streams["messages"]
    group = [service.Entry(stream, "x", "k", [body]) for body in ("1", "1", "2")]
    store._commit(group, time.monotonic() + DEADLINE_S)
    assert [entry.first_id for entry in group] == [1, 1, 0]
    assert [entry.replayed for entry in group] == [False, True, False]
    assert group[2].problem.status == 422


def test_a_value_that_is_too_big_costs_only_its_message(tmp_path):
    big = ", p TEXT AS (replace(printf('%.*c', body ->> 'n', 'x'), 'x', '0123456789')) CHECK (length(p) > 0)"
    (tmp_path / "schema.sql").write_text(CLIENTS + stream_sql("x", big))
    store = service.Store(tmp_path / "inlet.db", service.read_schema(tmp_path / "schema.sql"))
    store.open()
    stream = store.schema.streams["x"]
    group = [service.Entry(stream, "x", None, [json.dumps({"n": n})]) for n in (1, 150_000_000, 2)]
    store._commit(group, time.monotonic() + DEADLINE_S)
    assert [entry.problem and entry.problem.status for entry in group] == [None, 422, None]
    store.close()


class Withdrawing(service.deque):
    """A queue from which another thread withdraws its entry just after somebody has asked for its length."""

    def __len__(self):
        length = super().__len__()
        if length > 1:
            self.popleft()
        return length


def test_an_entry_that_was_not_committed_is_never_acknowledged(store):
    """However the queue changes under the leader's hands."""
    stream = store.schema.streams["messages"]
    others = [service.Entry(stream, "x", None, [str(n)]) for n in range(3)]
    store._queue = Withdrawing(others)
    mine = service.Entry(stream, "x", None, ["mine".join('""')])
    store.append(mine)
    stored = {row[0]: row[4] for row in rows(store, "SELECT * FROM messages")}
    assert stored == {entry.first_id: entry.bodies[0] for entry in (*others, mine) if entry.done}
    assert stored[mine.first_id] == '"mine"'
    lost = service.Entry(stream, "x", None, ["9"])
    store.gather = lambda entry: store._queue.clear()
    with pytest.raises(service.Problem):
        store.append(lost)


class RolledBack(sqlite3.Connection):
    """A connection that loses its transaction at the second INSERT, as it may when the disk is full."""

    inserts = -(10**6)

    def execute(self, sql, *values):
        RolledBack.inserts += sql.startswith("INSERT")
        if sql.startswith("INSERT") and RolledBack.inserts == 2:
            super().execute("ROLLBACK")
            raise sqlite3.IntegrityError("as if")
        return super().execute(sql, *values)


def test_a_transaction_that_was_rolled_back_behind_ones_back_fails_all(store, monkeypatch):
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, **k, factory=RolledBack))
    store._discard_writer()
    RolledBack.inserts = 0
    group = [service.Entry(store.schema.streams["messages"], "x", None, [str(n)]) for n in range(3)]
    store._commit(group, time.monotonic() + DEADLINE_S)
    assert [entry.problem.status for entry in group] == [503, 503, 503]
    assert rows(store, "SELECT * FROM messages") == []


def test_a_full_disk_is_507_for_all_and_recovers(client, store):
    """max_page_count makes SQLite say FULL as a disk does, rolled back transaction included."""
    assert client.post("messages", "{}").status_code == 201
    (pages,) = store._writer.execute("PRAGMA page_count").fetchone()
    store._writer.execute(f"PRAGMA max_page_count = {pages}")
    big = json.dumps("x" * 90_000)
    group = [service.Entry(store.schema.streams["messages"], "x", None, [body]) for body in ("1", big, "2")]
    store._commit(group, time.monotonic() + DEADLINE_S)
    assert [entry.problem.status for entry in group] == [507, 507, 507]
    assert len(rows(store, "SELECT * FROM messages")) == 1
    assert client.post("messages", big).status_code == 201
    assert len(rows(store, "SELECT * FROM messages")) == 2


class BrokenCommit(sqlite3.Connection):
    """A connection whose COMMIT fails, before or after it has reached the disk."""

    when = None

    def execute(self, sql, *values):
        if sql == "COMMIT" and BrokenCommit.when:
            when, BrokenCommit.when = BrokenCommit.when, None
            if when == "after":
                super().execute(sql)
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *values)


@pytest.mark.parametrize(("when", "stored"), [("before", 0), ("after", 1)])
def test_a_failed_commit_is_a_5xx_and_a_keyed_retry_finds_out(when, stored, client, store, monkeypatch):
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, **k, factory=BrokenCommit))
    store._discard_writer()
    BrokenCommit.when = when
    answer = client.post("messages", "1", Idempotency_Key="k")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert len(rows(store, "SELECT * FROM messages")) == stored
    answer = client.post("messages", "1", Idempotency_Key="k")
    assert answer.status_code == 201
    assert answer.json["id"] == 1
    assert ("Idempotent-Replayed" in answer.headers) == (when == "after")
    assert len(rows(store, "SELECT * FROM messages")) == 1


def test_another_program_that_holds_the_write_lock_is_503(client, store, monkeypatch):
    store._writer.execute("PRAGMA busy_timeout = 100")
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = client.post("messages", "{}")
        assert answer.status_code == 503
        assert "Another program" in answer.json["detail"]
        assert answer.headers["Retry-After"]
        assert client.get("/messages").status_code == 200  # reading never waits for a writer
        other.execute("ROLLBACK")
    assert client.post("messages", "{}").status_code == 201


def test_who_waits_too_long_for_the_lock_is_answered_and_leaves_nothing(store, monkeypatch):
    monkeypatch.setattr(service, "BUSY_TIMEOUT_S", 0.2)
    with store._lock, pytest.raises(service.Problem) as refused:
        append(store, "messages", "1")
    assert refused.value.status == 503
    append(store, "messages", "2")
    assert [row[4] for row in rows(store, "SELECT * FROM messages")] == ["2"]


def test_a_write_lock_that_is_granted_too_late_is_given_back(tmp_path):
    first, second, third = (service.WriteLock(tmp_path / "inlet.db") for _ in range(3))
    with first.held():
        with pytest.raises(TimeoutError), second.held(timeout_s=0.1):
            pytest.fail("held twice")
        with pytest.raises(TimeoutError), second.held(timeout_s=0.1):
            pytest.fail("held twice")
    with third.held(timeout_s=DEADLINE_S), pytest.raises(TimeoutError), second.held(timeout_s=0.1):
        pytest.fail("held twice")
    with second.held(timeout_s=DEADLINE_S):
        pass
    for lock in (first, second, third):
        lock.close()


def test_a_database_that_was_removed_is_never_written_to(client, store, tmp_path):
    assert client.post("messages", "1").status_code == 201
    store.path.rename(tmp_path / "away")
    answer = client.post("messages", "2")
    assert answer.status_code == 503
    assert not store.path.exists()
    (tmp_path / "away").rename(store.path)
    assert client.post("messages", "3").status_code == 201
    assert [m["body"] for m in client.get("/messages").json["messages"]] == [1, 3]


def test_a_wal_that_was_removed_is_never_written_to(store):
    append(store, "messages", "1")
    os.unlink(f"{store.path}-wal")
    append(store, "messages", "2")
    assert [row[4] for row in rows(store, "SELECT * FROM messages")] == ["1", "2"]


class MovedAway(sqlite3.Connection):
    """A connection whose database is moved away by somebody while a COMMIT is under way."""

    path = None

    def execute(self, sql, *values):
        result = super().execute(sql, *values)
        if sql == "COMMIT" and MovedAway.path:
            MovedAway.path.rename(MovedAway.path.with_name("away"))
            MovedAway.path = None
        return result


def test_a_database_that_is_removed_during_the_commit_is_a_5xx(client, store, monkeypatch):
    assert client.post("messages", "1").status_code == 201
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, **k, factory=MovedAway))
    store._discard_writer()
    MovedAway.path = store.path
    assert client.post("messages", "2").status_code == 503
    store.path.with_name("away").rename(store.path)
    assert client.post("messages", "3").status_code == 201


def test_a_database_that_was_replaced_is_read_and_written_anew(client, store, tmp_path):
    assert client.post("messages", "1").status_code == 201
    service.backup(store.path, tmp_path / "copy.db", lambda *_: None)
    assert client.post("messages", "2").status_code == 201
    os.replace(tmp_path / "copy.db", store.path)
    for name in ("wal", "shm"):
        os.unlink(f"{store.path}-{name}")
    assert client.post("messages", "3").status_code in (201, 503)
    assert client.post("messages", "3").status_code == 201
    bodies = [message["body"] for message in client.get("/messages").json["messages"]]
    assert bodies in ([1, 3], [1, 3, 3])


def test_a_reader_that_could_not_connect_once_tries_again(store, monkeypatch):
    append(store, "messages", "1")
    with monkeypatch.context() as patch:
        patch.setattr(service, "connect", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("no descriptors")))
        with pytest.raises(sqlite3.OperationalError):
            store.message(store.schema.streams["messages"], 1)
    assert store.message(store.schema.streams["messages"], 1)[4] == b"1"


def test_opening_is_not_held_up_by_a_reader_and_empties_the_wal_of_a_killed_process(tmp_path, store, schema_file):
    append(store, "messages", "1")
    again = service.Store(store.path, store.schema)
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM messages").fetchall()
        append(store, "messages", "2")
        started = time.monotonic()
        again.open()
        assert time.monotonic() - started < 2
    again.close()
    assert os.path.getsize(f"{store.path}-wal") == 0


def test_a_store_that_cannot_be_opened_keeps_no_file_open(store, schema_file):
    schema_file.write_text(SCHEMA.replace("< 10", "< 20"))
    other = service.read_schema(schema_file)
    counts = []
    for _ in range(6):
        with pytest.raises(service.SetupError):
            service.Store(store.path, other).open()
        counts.append(len(os.listdir("/dev/fd")))
    assert counts[-1] == counts[1]


def test_the_time_is_utc_with_milliseconds(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        times = [service.utc_now() for _ in range(30) if not time.sleep(0.001)]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text) for text in times)
    parsed = datetime.fromisoformat(times[-1]).timestamp()
    assert abs(parsed - time.time()) < 5
    assert len(set(times)) > 5


def test_a_restart_goes_on_with_the_next_id_also_after_deletions(store, schema_file):
    append(store, "messages", "1")
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute("DELETE FROM messages")
    again = service.Store(store.path, service.read_schema(schema_file))
    again.open()
    assert append(again, "messages", "2") == 2
    again.close()


def test_the_writer_syncs_every_commit(store):
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._writer.execute("PRAGMA foreign_keys").fetchone() == (1,)


# Health


def test_healthz_needs_no_token_and_says_ready(client):
    answer = client.simulate_get("/healthz")
    assert answer.status_code == 200
    assert answer.json == {"alive": True, "ready": True}


def test_healthz_writes_for_real(store, tmp_path):
    client = Client(service.create_app(store))
    store.path.rename(tmp_path / "away")
    answer = client.simulate_get("/healthz")
    assert answer.status_code == 503
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (answer.json["alive"], answer.json["ready"]) == (True, False)
    (tmp_path / "away").rename(store.path)


def test_healthz_writes_at_most_once_in_its_interval(store, monkeypatch):
    monkeypatch.setattr(service.HealthResource, "PROBE_INTERVAL_S", 0.3)
    probes, real = [], store.probe
    monkeypatch.setattr(store, "probe", lambda: probes.append(1) or real())
    client = Client(service.create_app(store))
    for _ in range(10):
        assert client.simulate_get("/healthz").status_code == 200
    assert len(probes) == 1
    time.sleep(0.35)
    assert client.simulate_get("/healthz").status_code == 200
    assert len(probes) == 2


def test_healthz_answers_in_time_when_nothing_can_be_written(store, monkeypatch):
    monkeypatch.setattr(service.HealthResource, "PROBE_TIMEOUT_S", 0.2)
    client = Client(service.create_app(store))
    with store._lock:
        for _ in range(3):
            answer = client.simulate_get("/healthz")
            assert answer.status_code == 503
            assert answer.json["ready"] is False


# The app in other servers


def test_importing_touches_no_disk(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import service; print(callable(service.application))"
    result = subprocess.run(
        [sys.executable, "-c", code, str(HERE)], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert result.stdout == "True\n", result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_application_opens_the_database_at_its_first_request(tmp_path, monkeypatch):
    monkeypatch.setenv("INLET_DATABASE", str(tmp_path / "inlet.db"))
    application = service.LazyApplication()
    client = falcon.testing.TestClient(application)
    assert list(tmp_path.iterdir()) == []
    assert client.simulate_get("/healthz").status_code == 200
    assert client.simulate_get("/messages").status_code == 401
    assert (tmp_path / "inlet.db").exists()


def test_an_application_that_is_not_set_up_says_so_in_answer_and_log(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("INLET_DATABASE", str(tmp_path / "no-such-folder" / "inlet.db"))
    answer = falcon.testing.TestClient(service.LazyApplication()).simulate_get("/healthz")
    assert answer.status_code == 503
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "no-such-folder" not in answer.text
    assert "no-such-folder" in caplog.text


def test_a_forked_child_opens_its_own_connection(tmp_path, monkeypatch):
    monkeypatch.setenv("INLET_DATABASE", str(tmp_path / "inlet.db"))
    application = service.LazyApplication()
    client = falcon.testing.TestClient(application)
    assert client.simulate_get("/healthz").status_code == 200
    parents = application._app
    child = os.fork()
    if child == 0:
        os._exit(0 if application._app is None and client.simulate_get("/healthz").status_code == 200 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert application._app is parents


# The server, as a process


def test_the_first_start_prints_a_curl_that_works(tmp_path):
    with contextlib.closing(Process(tmp_path)) as process:
        printed = process.printed(8)
        words = shlex.split(next(line for line in printed.splitlines() if line.startswith("curl ")))
        headers = dict(words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H")
        connection = process.connect()
        connection.request("POST", words[2].removeprefix(process.url), words[words.index("-d") + 1], headers)
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["id"]) == (201, 1)
        token = headers["Authorization"].split()[1]
        assert token in printed.splitlines()
        process.terminate()
        process.start()  # and the second start prints no token
        process.terminate()
        assert process.process.stdout.read() == ""


def test_what_waitress_refuses_is_a_problem_too(server):
    for request, status in (
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", 431),
        (b"POST /messages HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST /messages HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    ):
        with socket.create_connection(tuple(server.address.split(":")), DEADLINE_S) as sock:
            sock.sendall(request)
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            assert answer.status == status
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert json.load(answer)["status"] == status


def test_who_expects_100_continue_gets_it_and_an_answer_with_a_body_and_without(server):
    for method, body, status in (("GET", None, 200), ("POST", b"", 400), ("POST", b"1", 201)):
        connection = server.connect()
        assert send(connection, method, "/messages", body, Expect="100-continue")[0] == status
    with socket.create_connection(tuple(server.address.split(":")), DEADLINE_S) as sock:
        sock.sendall(b"POST /messages HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 999999999\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_of_exactly_the_limit_is_taken_and_one_byte_more_is_not(server):
    limit = service.Settings.max_body
    connection = server.connect()
    body = json.dumps("x" * (limit - 2)).encode()
    assert send(connection, "POST", "/messages", body)[0] == 201
    assert send(connection, "POST", "/messages", [body[:999], body[999:]])[0] == 201
    status, _, problem = send(server.connect(), "POST", "/messages", body + b" ")
    assert (status, json.loads(problem)["limit"]) == (413, limit)
    assert send(server.connect(), "POST", "/messages", [body, b" "])[0] == 413


def test_pipelined_requests_are_answered_in_order(server):
    headers = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    one = f"POST /messages HTTP/1.1\r\n{headers}Content-Length: %d\r\n\r\n%s"
    with socket.create_connection(tuple(server.address.split(":")), DEADLINE_S) as sock:
        sock.sendall("".join(one % (len(str(n)), n) for n in range(20)).encode())
        received = b""
        while received.count(b'"received_at"') < 20:
            data = sock.recv(65536)
            assert data, received
            received += data
    assert [int(n) for n in re.findall(rb'{"id": (\d+)', received)] == list(range(1, 21))


def many_at_once(server, count, method="POST", path="/messages", body="1"):
    """The same request on many connections; the answers come when they are asked for."""
    connections = [server.connect() for _ in range(count)]
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    for connection in connections:
        connection.request(method, path, body, headers)
    return connections


def test_requests_that_come_together_share_a_commit_and_never_hold_up_a_reader(server, store):
    """Another process has the write lock for a second; what comes meanwhile is written in few COMMITs, deep JSON too."""
    assert send(server.connect(), "POST", "/messages", "0")[0] == 201
    with store._write_lock.held():
        waiting = many_at_once(server, 100, body="[" * 512 + "]" * 512)
        time.sleep(0.5)
        started = time.monotonic()
        assert send(server.connect(), "GET", "/messages")[0] == 200
        assert time.monotonic() - started < 1
    answers = [connection.getresponse() for connection in waiting]
    assert {answer.status for answer in answers} == {201}
    assert len({json.load(answer)["received_at"] for answer in answers}) <= 10


def test_a_client_that_does_not_read_stops_nobody(server, store):
    """Pipelined pages pile up for clients that never read, on more connections than there are threads."""
    for _ in range(5):
        append(store, "messages", json.dumps("x" * 1_000_000))
    ask = f"GET /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    deaf = [socket.create_connection(tuple(server.address.split(":")), DEADLINE_S) for _ in range(3)]
    for sock in deaf:
        sock.sendall(ask * 8)
    time.sleep(1)
    for _ in range(5):
        started = time.monotonic()
        assert send(server.connect(), "GET", "/healthz")[0] == 200
        assert send(server.connect(), "POST", "/messages", "1")[0] == 201
        assert time.monotonic() - started < 3
    received = 0
    while received < 8 * 5_000_000:  # and who reads at last gets everything
        data = deaf[0].recv(2**20)
        assert data
        received += len(data)
    for sock in deaf:
        sock.close()


def test_many_idle_connections_disturb_nobody(server):
    idle = [socket.create_connection(tuple(server.address.split(":")), DEADLINE_S) for _ in range(300)]
    for _ in range(20):
        assert send(server.connect(), "POST", "/messages", "1")[0] == 201
    for sock in idle:
        sock.close()


def test_a_stalled_body_does_not_hold_up_the_end(server):
    with socket.create_connection(tuple(server.address.split(":")), DEADLINE_S) as sock:
        sock.sendall(b"POST /messages HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        time.sleep(0.3)
        started = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - started < service.DRAIN_S + 2


def test_a_stopped_server_leaves_everything_in_the_one_file(server, store, tmp_path):
    for n in range(3):
        assert send(server.connect(), "POST", "/messages", str(n))[0] == 201
    assert send(server.connect(), "GET", "/messages")[0] == 200
    store.close()
    store._write_lock = service.WriteLock(store.path)  # for the fixture
    assert server.terminate() == 0
    (tmp_path / "copy.db").write_bytes(store.path.read_bytes())
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as db:
        assert db.execute("SELECT count(*) FROM messages").fetchone() == (3,)


def test_32_threads_at_once_with_deliberate_duplicates(server, store):
    """Half of the messages have a key, and each of those is sent by two threads; a consumer follows the feed."""
    threads, messages = 32, 40
    answers, stop = [], threading.Event()

    def produce(number):
        connection = server.connect()
        for n in range(messages):
            shared = number // 2 if n % 2 else None
            key = f"{shared}-{n}" if n % 2 else None
            body = json.dumps({"sender": shared if n % 2 else number, "n": n})
            status, headers, data = send(
                connection, "POST", "/messages", body, **({"Idempotency_Key": key} if key else {})
            )
            answers.append((status, key, json.loads(data).get("id"), body, "Idempotent-Replayed" in headers))

    def consume():
        connection, path = server.connect(), "/messages?limit=50"
        while True:
            last_round = stop.is_set()
            page = json.loads(send(connection, "GET", path)[2])
            seen.extend((message["id"], message["key"]) for message in page["messages"])
            path = page["next"]
            if last_round and not page["messages"]:
                return

    seen = []
    producers = [threading.Thread(target=produce, args=(n,)) for n in range(threads)]
    consumer = threading.Thread(target=consume)
    for thread in [consumer, *producers]:
        thread.start()
    for thread in producers:
        thread.join(60)
    stop.set()
    consumer.join(60)

    assert len(answers) == threads * messages
    assert {status for status, *_ in answers} == {201}
    ids_of_key = {}
    for _, key, message_id, _, _ in answers:
        if key:
            ids_of_key.setdefault(key, set()).add(message_id)
    assert all(len(ids) == 1 for ids in ids_of_key.values())
    unique = threads * messages // 2 + threads * messages // 4
    assert sum(replayed for *_, replayed in answers) == threads * messages // 4
    ids = [message_id for message_id, _ in seen]
    assert ids == sorted(set(ids))
    assert len(ids) == unique == len(rows(store, "SELECT * FROM messages"))
    assert {message_id for _, _, message_id, _, _ in answers} == set(ids)
    assert len(ids_of_key) == threads * messages // 4


def test_several_processes_on_one_database(server, store, tmp_path):
    """Duplicates race across processes."""
    (tmp_path / "second").mkdir()
    second = Process(tmp_path / "second", "--schema", str(tmp_path / "schema.sql"), "--database", str(store.path))
    answers = []

    def produce(process):
        connection = process.connect()
        for n in range(150):
            status, _, data = send(connection, "POST", "/messages", f"[{n}]", Idempotency_Key=f"k{n}")
            answers.append((status, n, json.loads(data)["id"]))

    with contextlib.closing(second):
        threads = [threading.Thread(target=produce, args=(process,)) for process in (server, second) * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(answers) == 8 * 150
    assert {status for status, _, _ in answers} == {201}
    assert len({(n, message_id) for _, n, message_id in answers}) == 150 == len(rows(store, "SELECT * FROM messages"))
    assert "locked" not in (tmp_path / "log").read_text() + (tmp_path / "second" / "log").read_text()


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path, store):
    """A sender with keys retries what had no answer, while the server is killed at random moments."""
    chosen = random.Random()
    process = Process(tmp_path, "--schema", str(tmp_path / "schema.sql"))
    acknowledged = {}
    stop = threading.Event()

    def produce(number):
        n = 0
        while not stop.is_set():
            try:
                status, _, data = send(
                    process.connect(), "POST", "/messages", f"[{number}, {n}]", Idempotency_Key=f"{number}-{n}"
                )
            except (OSError, http.client.HTTPException):
                time.sleep(0.01)
                continue
            if status == 201:
                acknowledged[number, n] = json.loads(data)["id"]
                n += 1

    producers = [threading.Thread(target=produce, args=(number,)) for number in range(4)]
    for thread in producers:
        thread.start()
    for _ in range(6):
        time.sleep(chosen.uniform(0.05, 0.4))
        process.kill()
        process.process.stdout.close()
        process.start()
    time.sleep(0.2)
    stop.set()
    for thread in producers:
        thread.join(60)
    process.close()
    stored = {tuple(json.loads(body)): message_id for message_id, body in rows(store, "SELECT id, body FROM messages")}
    assert len(acknowledged) > 50
    assert acknowledged.items() <= stored.items()
    assert len(stored) == len(rows(store, "SELECT * FROM messages"))
    assert rows(store, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_0_and_answers_what_is_in_flight(number, server, store):
    """The COMMIT is held up by another program while the signal comes."""
    connection, idle = server.connect(), server.connect()
    idle.connect()
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        connection.request(
            "POST", "/messages", "1", {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        )
        time.sleep(0.5)
        server.process.send_signal(number)
        time.sleep(0.3)
        assert server.process.poll() is None
        other.execute("ROLLBACK")
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["id"]) == (201, 1)
    started = time.monotonic()
    assert server.process.wait(DEADLINE_S) == 0
    assert time.monotonic() - started < 5
    assert [row[4] for row in rows(store, "SELECT * FROM messages")] == ["1"]


def test_it_ends_in_time_while_clients_go_on_sending(server):
    stop = threading.Event()

    def produce():
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = server.connect()
            while not stop.is_set():
                send(connection, "POST", "/messages", "1")

    threads = [threading.Thread(target=produce) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    started = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - started < service.DRAIN_S + 2
    stop.set()
    for thread in threads:
        thread.join(DEADLINE_S)


def test_it_listens_on_a_unix_socket(tmp_path):
    path = tmp_path / "socket"
    process = Process(tmp_path, "--listen", f"unix:{path}")
    with contextlib.closing(process), socket.socket(socket.AF_UNIX) as sock:
        assert f"--unix-socket {path}" in process.printed(8)
        sock.settimeout(DEADLINE_S)
        sock.connect(str(path))
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert (answer.status, json.load(answer)["ready"]) == (200, True)


def test_an_address_in_use_is_one_line(server, one_line_error, tmp_path):
    arguments = ("--listen", server.address, "--database", tmp_path / "inlet.db", "--schema", tmp_path / "schema.sql")
    status, line = one_line_error(*arguments)
    assert status == 2
    assert server.address in line


# The command line


def run(tmp_path, *arguments):
    command = [
        sys.executable,
        str(HERE / "service.py"),
        *arguments,
        "--database",
        str(tmp_path / "inlet.db"),
        "--schema",
        str(tmp_path / "schema.sql"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_clients_are_added_listed_and_removed_beside_a_running_server(server, tmp_path):
    added = run(tmp_path, "client", "add", "sensor-7", "--can", "write:readings", "read")
    token = added.stdout.strip()
    assert (added.returncode, added.stdout.count("\n"), added.stderr) == (0, 1, "")
    assert "sensor-7\twrite:readings read\n" in run(tmp_path, "client", "list").stdout
    assert run(tmp_path, "client", "add", "sensor-7").returncode == 2
    deadline = time.monotonic() + 5
    while (status := send(server.connect(), "POST", "/readings", READING, Authorization=f"Bearer {token}")[0]) == 401:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert status == 201
    assert send(server.connect(), "POST", "/messages", READING, Authorization=f"Bearer {token}")[0] == 403
    assert run(tmp_path, "client", "remove", "sensor-7").returncode == 0
    assert "sensor-7" not in run(tmp_path, "client", "list").stdout


def test_a_backup_is_whole_while_messages_come_in(server, store, tmp_path):
    stop, sent = threading.Event(), []

    def produce():
        connection = server.connect()
        while not stop.is_set():
            sent.append(json.loads(send(connection, "POST", "/messages", json.dumps("x" * 5000))[2])["id"])

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        while len(sent) < 300:
            time.sleep(0.01)
        before = len(sent)
        assert run(tmp_path, "backup", str(tmp_path / "copy.db")).returncode == 0
    finally:
        stop.set()
        thread.join(DEADLINE_S)
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        ids = [row[0] for row in copy.execute("SELECT id FROM messages ORDER BY id")]
    assert ids == list(range(1, len(ids) + 1))
    assert before <= len(ids) <= len(sent)
    assert not list(tmp_path.glob("*.partial"))


def test_a_backup_never_replaces_a_database_in_use(store, one_line_error, tmp_path):
    (tmp_path / "other.db-wal").touch()
    for target in (store.path, tmp_path / "other.db", f"{store.path}-wal", f"{store.path}-lock"):
        status, line = one_line_error("backup", target, "--database", store.path)
        assert (status, "in use" in line) == (2, True)


# Migration


def migrate_command(store, schema_file):
    arguments = ["migrate", "--database", str(store.path), "--schema", str(schema_file)]
    return [sys.executable, str(HERE / "service.py"), *arguments]


def migrate(store, schema_file, *changes):
    sql = SCHEMA
    for old, new in changes:
        assert old in sql
        sql = sql.replace(old, new)
    schema_file.write_text(sql)
    return run(schema_file.parent, "migrate")


def test_migrate_recomputes_everything_but_the_messages(client, store, schema_file):
    for n in range(30):
        client.post(
            "readings",
            json.dumps({"sensor": "a-17", "value": n, "note": f"n{n}", "colour": "red"}),
            Idempotency_Key=f"k{n}",
        )
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute("DELETE FROM readings WHERE id IN (7, 30)")
    messages = rows(store, "SELECT id, received_at, client, key, body FROM readings")
    done = migrate(
        store,
        schema_file,
        ("batch TEXT AS (body ->> 'batch'),", "colour TEXT AS (body ->> 'colour') CHECK (colour = 'red'),"),
        (
            'CREATE UNIQUE INDEX "one reading for each batch" ON readings (batch)',
            "CREATE INDEX by_note ON readings (note)",
        ),
        ("value > 20", "value > 10"),
        ("mondays", "tuesdays"),
        ("'b-4'", "'b-5'"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    for word in (
        "table readings has changed",
        "index by_note is new",
        "index one reading for each batch is gone",
        "view warm",
    ):
        assert word in done.stdout
    assert rows(store, "SELECT id, received_at, client, key, body FROM readings") == messages
    assert set(rows(store, "SELECT colour FROM readings")) == {("red",)}
    assert rows(store, "SELECT * FROM counts") == [("a-17", 30)]  # triggers do not run again
    assert len(rows(store, "SELECT * FROM sensors")) == 3
    again = service.Store(store.path, service.read_schema(schema_file))
    again.open()
    assert append(again, "readings", READING.replace("}", ', "colour": "red"}')) == 31
    again.close()
    assert "no table had changed" in run(schema_file.parent, "migrate").stdout


def test_migrate_says_which_messages_break_a_new_rule_and_changes_nothing(client, store, schema_file):
    for n in range(60):
        client.post("readings", json.dumps({"sensor": "a-17", "value": n, "note": f"n{n % 55}"}))
    before = rows(store), rows(store, "SELECT type, name, sql FROM sqlite_schema")
    done = migrate(
        store,
        schema_file,
        (
            '"value must be between -90 and 60" CHECK (value BETWEEN -90 AND 60)',
            '"not so warm" CHECK (value < 5 OR value > 7)',
        ),
        ('"one reading for each batch" ON readings (batch)', '"one note each" ON readings (note)'),
    )
    assert done.returncode == 1
    assert "3 broke 'not so warm': ids 6, 7, 8\n" in done.stderr
    assert "5 broke 'one note each': ids 56, 57, 58, 59, 60\n" in done.stderr
    assert (rows(store), rows(store, "SELECT type, name, sql FROM sqlite_schema")) == before
    assert client.post("readings", READING).status_code == 201


def test_migrate_reports_references_that_lead_nowhere(client, store, schema_file):
    client.post("readings", '{"sensor": "a-17", "value": 1, "lot": "x"}')
    done = migrate(
        store,
        schema_file,
        ("lot TEXT AS (body ->> 'lot') UNIQUE", "lot TEXT AS (body ->> 'lot') REFERENCES sensors (name)"),
    )
    assert done.returncode == 1
    assert "FOREIGN KEY to sensors': ids 1" in done.stderr


def test_migrate_rebuilds_what_others_refer_to(client, store, schema_file):
    client.post("readings", READING)
    done = migrate(
        store, schema_file, ("sensors (name TEXT PRIMARY KEY)", "sensors (Name TEXT PRIMARY KEY, place TEXT)"),
        ("INTO sensors VALUES ('a-17'), ('b-4')", "INTO sensors (name) VALUES ('a-17'), ('b-4')"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(store, "SELECT * FROM sensors") == [("a-17", None), ("b-4", None)]
    assert rows(store, "SELECT count(*) FROM sqlite_schema WHERE sql LIKE '%before migrate%'") == [(0,)]
    assert rows(store, "PRAGMA foreign_key_check") == []


def test_migrate_checks_a_unique_index_that_is_all_that_is_new(client, store, schema_file):
    for body in ("1", "1", "2"):
        client.post("messages", body)
    done = migrate(
        store, schema_file, ("CREATE VIEW", 'CREATE UNIQUE INDEX "no doubles" ON messages (body);\nCREATE VIEW')
    )
    assert done.returncode == 1
    assert "1 broke 'no doubles': ids 2\n" in done.stderr


def test_migrate_refuses_to_forget_a_column_with_data(store, schema_file):
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute("INSERT INTO counts VALUES ('a-17', 3)")
    renamed = SCHEMA.replace("n INTEGER NOT NULL) STRICT", "number INTEGER) STRICT").replace(
        "SET n = n + 1", "SET number = 1"
    )
    schema_file.write_text(renamed)
    done = run(schema_file.parent, "migrate")
    assert done.returncode == 2
    assert "table counts: the column n holds data" in done.stderr
    assert rows(store, "SELECT * FROM counts") == [("a-17", 3)]


def test_migrate_takes_a_check_that_names_its_table_and_a_view_with_a_trigger(tmp_path):
    view = "CREATE VIEW v AS SELECT {0} AS x; CREATE TRIGGER i INSTEAD OF INSERT ON v BEGIN SELECT {0}; END;"
    path = tmp_path / "schema.sql"
    path.write_text(CLIENTS + stream_sql("M", ", a TEXT AS (body ->> 'a') CHECK (M.a <> 'q')") + view.format(1)
                    + "CREATE TRIGGER t AFTER INSERT ON m BEGIN SELECT 1; END;")  # fmt: skip
    store = service.Store(tmp_path / "inlet.db", service.read_schema(path))
    store.open()
    append(store, "M", '{"a": "1"}')
    path.write_text(CLIENTS + stream_sql("M", ", a TEXT AS (body ->> 'a') CHECK (M.a <> 'r')") + view.format(2))
    done = run(tmp_path, "migrate")
    assert (done.returncode, done.stderr) == (0, "")
    assert "trigger t is gone" in done.stdout
    assert rows(store, "SELECT id, a FROM M") == [(1, "1")]
    store.close()


def test_a_stream_that_was_dropped_empty_never_uses_an_id_again(store, schema_file):
    for n in range(3):
        append(store, "messages", str(n))
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute("DELETE FROM messages")
    assert migrate(store, schema_file, (stream_sql("messages"), "")).returncode == 0
    assert migrate(store, schema_file, ("", "")).returncode == 0
    again = service.Store(store.path, service.read_schema(schema_file))
    again.open()
    assert append(again, "messages", "1") == 4
    again.close()


def test_migrate_waits_for_its_turn(store, schema_file):
    schema_file.write_text(SCHEMA.replace("value > 20", "value > 10"))
    command = migrate_command(store, schema_file)
    with store._write_lock.held():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
    assert process.wait(DEADLINE_S) == 0


def test_a_backup_that_fails_leaves_the_old_one(store, tmp_path):
    for _ in range(20):
        append(store, "messages", json.dumps("x" * 500_000))
    target = tmp_path / "copy.db"
    target.write_bytes(b"the old one")

    def fail(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        service.backup(store.path, target, fail)
    assert target.read_bytes() == b"the old one"
    assert not list(tmp_path.glob("*.partial"))


def test_a_backup_is_of_one_moment(store, tmp_path):
    for _ in range(20):
        append(store, "messages", json.dumps("x" * 500_000))
    steps = []

    def write(what, done, total):
        steps.append(done)
        append(store, "messages", "1")

    service.backup(store.path, tmp_path / "copy.db", write)
    assert len(steps) > 1
    assert steps == sorted(set(steps))
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("SELECT count(*) FROM messages").fetchone() == (20,)


def test_migrate_never_drops_a_stream_with_messages(client, store, schema_file):
    client.post("messages", "{}")
    done = migrate(store, schema_file, (stream_sql("messages"), ""))
    assert done.returncode == 2
    assert "messages is not in the schema and holds 1 messages" in done.stderr
    assert len(rows(store, "SELECT * FROM messages")) == 1


def test_migrate_works_beside_a_running_server(server, store, schema_file):
    stop, statuses = threading.Event(), []

    def produce():
        connection = server.connect()
        while not stop.is_set():
            statuses.append(send(connection, "POST", "/readings", READING)[0])

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        while len(statuses) < 200:
            time.sleep(0.01)
        done = migrate(store, schema_file, ("value BETWEEN -90 AND 60", "value BETWEEN -90 AND 61"))
        count = len(statuses)
        while len(statuses) < count + 50:
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join(DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert set(statuses) == {201}
    assert [row[0] for row in rows(store)] == list(range(1, len(statuses) + 1))


def test_a_migration_that_is_killed_leaves_everything_as_it_was(store, schema_file, tmp_path):
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute(
            "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 200000)"
            " INSERT INTO messages (received_at, client, body) SELECT 'now', 'x', json_object('n', n) FROM n"
        )
    schema_file.write_text(
        SCHEMA.replace(stream_sql("messages"), stream_sql("messages", ", n INTEGER AS (body ->> 'n')"))
    )
    command = migrate_command(store, schema_file)
    for delay in (0.4, 0.6, 0.8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
        if rows(store, "SELECT sql LIKE '%n INTEGER%' FROM sqlite_schema WHERE name = 'messages'") == [(1,)]:
            break  # it was faster than this time
        assert rows(store, "SELECT count(*), max(id), sum(body ->> 'n') FROM messages") == [
            (200000, 200000, 20000100000)
        ]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert rows(store, "SELECT count(*), max(id), sum(n) FROM messages") == [(200000, 200000, 20000100000)]


# README


def test_the_consumer_and_the_sender_in_readme_work(server, store):
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    ids = [names["send"](f"{server.url}/messages", TOKEN, {"n": n}) for n in range(3)]
    feed = names["messages"](server.url, TOKEN)
    assert [(m["id"], m["body"]["n"]) for m in (next(feed) for _ in range(3))] == list(zip(ids, range(3), strict=True))


def test_the_schema_in_readme_works_behind_the_shipped_one(tmp_path):
    example = re.search(r"```sql\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "schema.sql").write_text((HERE / "schema.sql").read_text() + example)
    store = service.Store(tmp_path / "inlet.db", service.read_schema(tmp_path / "schema.sql"))
    store.open()
    append(store, "readings", '{"sensor": "b-4", "value": 1, "serial": 12}')
    for serial in ('"13"', "1.5", "true", "12"):
        with pytest.raises(service.Problem) as refused:
            append(store, "readings", f'{{"sensor": "b-4", "value": 1, "serial": {serial}}}')
        assert b"serial" in refused.value.body
    store.close()
