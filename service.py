#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["falcon==4.4.0", "waitress==3.0.2"]
# ///
"""Inlet takes in JSON messages over HTTP and files each one as a row in SQLite.

Run it:    python service.py               (every flag: python service.py --help)
Embed it:  any WSGI server, with service:application

THE SCHEMA IS THE API.  schema.sql is the only file that an owner edits. A table in it that has the five
message columns (id, received_at, client, key, body) is a stream. The body is the message; all other columns
are generated from it. Constraints are the validation, triggers are the business logic.

ROUTES
    POST /{stream}       take one message (application/json), or many, all or none (application/x-ndjson)
    GET  /{stream}       the feed: messages in commit order, ?after=ID&limit=N&FIELD=VALUE
    GET  /{stream}/{id}  one message
    GET  /               the streams that this client may use, and the version
    GET  /healthz        can a message be written now?  (the one route that needs no token)

GUARANTEES
 1. 201 is sent after the COMMIT that holds the message has been synced to disk (WAL, synchronous=FULL).
 2. The body is kept byte for byte. Nothing parses and re-writes it.
 3. One Idempotency-Key of one client names at most one message: a UNIQUE index decides, so a retry gets the
    first answer again, whatever threads, processes and crashes were in between.
 4. 4xx: nothing was stored; do not retry unchanged. 5xx or no answer: outcome unknown; retry with the key.
 5. Ids grow in commit order and are never used again: who follows the feed's `next` misses no message.

LIMITS
 One machine, one SQLite file on a local disk (network file systems do not keep guarantee 1). A body is at most
 --max-body bytes, as it is sent and as it is unpacked; a message is nested at most 512 deep, and a batch has at
 most 10,000. The built-in server waits for slow clients, but not well: put a proxy in front of it on the open
 Internet.

READING ORDER
 settings, problems, the schema, the store, clients, reading requests, resources, the app, the server for
 `python service.py`, migrate and backup, the command line. Each needs only what stands above it.
"""

import argparse
import base64
import binascii
import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import signal
import sqlite3
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http import HTTPStatus
from json.encoder import encode_basestring as json_string
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote, urlencode

import falcon
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask
from waitress.wasyncore import poll2

__version__ = "1.0.0"

log = logging.getLogger("inlet")


# ---------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------


class SetupError(Exception):
    """The service cannot start like this. The text is one line that says what to change."""


@dataclass(frozen=True)
class Settings:
    """What an owner can set: by a flag, else by the environment variable INLET_<NAME>."""

    listen: str = "127.0.0.1:8080"
    database: Path = Path("inlet.db")
    schema: Path = Path(__file__).with_name("schema.sql")
    threads: int = 8
    max_body: int = 1_048_576
    prefix: str = ""


def settings_from(values: dict[str, str]) -> Settings:
    """The settings with the given texts in place of the defaults; SetupError if one makes no sense."""
    parse = {
        "listen": address,
        "database": file_path,
        "schema": Path,
        "threads": whole_number(1, 1000),
        "max_body": whole_number(1, 1_000_000_000),
        "prefix": path_prefix,
    }
    parsed = {}
    for name, text in values.items():
        try:
            parsed[name] = parse[name](text)
        except ValueError as error:
            flag = name.replace("_", "-")
            raise SetupError(f"--{flag} (INLET_{name.upper()}) {error}, not {text!r}") from None
    return Settings(**parsed)


def settings_in_environment() -> dict[str, str]:
    """The texts of the settings that stand in the environment."""
    variables = {name: f"INLET_{name.upper()}" for name in Settings.__dataclass_fields__}
    return {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A parser for whole numbers from low to high."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"takes a whole number from {low} to {high}")
        return int(text)

    return parse


def file_path(text: str) -> Path:
    """The path of a file, which may not be there yet."""
    path = Path(text)
    if not path.name or path.is_dir():
        raise ValueError("takes the path of a file")
    return path


def path_prefix(text: str) -> str:
    """The path that a proxy in front passes on everything under, such as /ingest."""
    if not re.fullmatch(r"(?:/[A-Za-z0-9._~-]+)+", text):
        raise ValueError("takes a path such as /ingest")
    return text


def address(text: str) -> str:
    """HOST:PORT, [IPV6]:PORT or unix:PATH, as it was given."""
    if text.startswith("unix:") and len(text) > len("unix:"):
        return text
    host_and_port = re.fullmatch(r"(?:[^:\[\]\s]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", text)
    if not host_and_port or int(host_and_port[1]) > 65535:
        raise ValueError("takes HOST:PORT or unix:PATH")
    return text


# ---------------------------------------------------------------------------------------------------------
# Problems: every refusal, as RFC 9457 has it
# ---------------------------------------------------------------------------------------------------------


class Problem(Exception):
    """An answer other than success.

    status is the HTTP status, detail a sentence that a person can act on; members stand beside them in the
    JSON, and headers go with the answer. Nothing in it may hold a token, a body or SQL.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None, **members: Any):
        super().__init__(detail)
        self.status = status
        self.headers = headers or {}
        title = HTTPStatus(status).phrase
        self.body = json.dumps({"title": title, "status": status, "detail": detail, **members}).encode()


def unavailable(status: int, detail: str) -> Problem:
    """A 5xx that tells the client when to try again."""
    return Problem(status, detail, {"Retry-After": str(RETRY_AFTER_S)})


RETRY_AFTER_S = 2
UNKNOWN_OUTCOME = "Try again with the same Idempotency-Key: whether the message was stored is not known."


def storage_problem(error: Exception) -> Problem:
    """What a client is told when the database fails. https://www.sqlite.org/rescode.html"""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL":
        return unavailable(507, f"The disk is full. {UNKNOWN_OUTCOME}")
    if name.startswith("SQLITE_BUSY") or isinstance(error, TimeoutError):
        return unavailable(503, f"Another program is writing to the database. {UNKNOWN_OUTCOME}")
    return unavailable(503, f"The database cannot be used at the moment. {UNKNOWN_OUTCOME}")


# ---------------------------------------------------------------------------------------------------------
# The schema, read into streams
# ---------------------------------------------------------------------------------------------------------

OLDEST_SQLITE = (3, 38, 0)  # the first with ->> built in

MESSAGE_COLUMNS = {
    "id": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "received_at": "TEXT NOT NULL",
    "client": "TEXT NOT NULL",
    "key": "TEXT",
    "body": "TEXT NOT NULL",
}
RESERVED_NAMES = {"clients", "healthz", "metrics"}

# White space and comments match without the group; what is left are the tokens that mean something.
SQL_TOKEN = re.compile(
    r"""\s+|--[^\n]*|/\*.*?(?:\*/|\Z)
    |('(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]|\w+|.)""",
    re.DOTALL | re.VERBOSE,
)


class Stream:
    """A table that takes messages: its name, the SQL that inserts one (received_at, client, key, body), and for each
    generated column the SQL that filters by it.
    """

    def __init__(self, name: str, filters: dict[str, str]):
        self.name = name
        self.filters = filters
        self.insert = f'INSERT INTO "{name}" (received_at, client, key, body) VALUES (?, ?, ?, ?)'


class SchemaObject(NamedTuple):
    """A table, index, trigger or view: the table that it belongs to (in lower case), and its CREATE statement."""

    table: str
    sql: str


@dataclass(frozen=True)
class Schema:
    """All that schema.sql says."""

    streams: dict[str, Stream]
    statements: list[str]  # in the order of the file
    objects: dict[tuple[str, str], SchemaObject]  # by (type, name)
    sentences: dict[str, str]  # what SQLite says of a broken constraint: what its owner says


def read_schema(path: Path) -> Schema:
    """schema.sql, tried out in an empty database in memory; SetupError names what is wrong with it."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        raise SetupError(f"SQLite {sqlite3.sqlite_version} is too old: Inlet needs {oldest} or newer")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} cannot be read: {error}") from None
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.execute("PRAGMA foreign_keys = ON")
        statements = []
        for line, statement in sql_statements(text):
            try:
                if not re.match(r"CREATE (?!TEMP)|INSERT ", sql_words(statement)):
                    raise SetupError(f"{path}, line {line}: only CREATE (not TEMP) and INSERT may stand here")
                db.execute(statement)
                if sql_words(statement).startswith("INSERT ") and db.execute(statement).rowcount > 0:
                    raise SetupError(
                        f"{path}, line {line}: run again, this adds more rows: use INSERT OR IGNORE and a key"
                    )
            except sqlite3.Error as error:
                raise SetupError(f"{path}, line {line}: {error}") from None
            statements.append(statement)
        objects = schema_objects(db)
        try:
            for (_, name), made in objects.items():
                refuse_unsafe_rules(name, made.sql)
            ordinary = {row[1] for row in db.execute("PRAGMA main.table_list") if row[2] == "table"}
            tables = [name for kind, name in objects if kind == "table" and name in ordinary]
            streams = [stream for name in tables if (stream := stream_from(db, name, objects))]
            require_clients(db)
        except SetupError as error:
            raise SetupError(f"{path}: {error}") from None
        if not streams:
            columns = ", ".join(MESSAGE_COLUMNS)
            raise SetupError(f"{path}: no table has the columns of a stream ({columns})")
        sentences = dict(pair for name in tables for pair in constraint_sentences(db, name, objects))
    return Schema({stream.name: stream for stream in streams}, statements, objects, sentences)


def sql_statements(text: str) -> Iterator[tuple[int, str]]:
    """The statements of a script, each with the number of the line that it begins on."""
    start = 0
    for token in SQL_TOKEN.finditer(text):
        if token[0] == ";" and sqlite3.complete_statement(text[start : token.end()]):
            if len(sql_tokens(text[start : token.end()])) > 1:
                yield line_of(text, start), text[start : token.end()]
            start = token.end()
    if sql_tokens(text[start:]):
        yield line_of(text, start), text[start:]


def line_of(text: str, start: int) -> int:
    """The number of the line with the first token from start on."""
    first = next(token for token in SQL_TOKEN.finditer(text, start) if token[1])
    return text.count("\n", 0, first.start()) + 1


def sql_tokens(sql: str) -> list[str]:
    """The tokens of a piece of SQL, without white space and comments."""
    return [token for token in SQL_TOKEN.findall(sql) if token]


def sql_words(sql: str) -> str:
    """A piece of SQL in capitals, with one space between tokens, and without what stands in quotes."""
    return " ".join(token.upper() for token in sql_tokens(sql) if token[0] not in "'\"`[")


def schema_objects(db: sqlite3.Connection) -> dict[tuple[str, str], SchemaObject]:
    """Every CREATE in a database, by type and name, in the order of creation."""
    rows = db.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_schema"
        " WHERE sql IS NOT NULL AND substr(name, 1, 7) <> 'sqlite_' ORDER BY rowid"
    )
    return {(kind, name): SchemaObject(table.lower(), sql) for kind, name, table, sql in rows}


def refuse_unsafe_rules(name: str, sql: str) -> None:
    """Stops rules whose refusal SQLite cannot keep to the one message that broke them."""
    words = sql_words(sql)
    if re.search(r"\bRAISE \( (?:ROLLBACK|FAIL|IGNORE)\b|\bOR (?:ROLLBACK|FAIL)\b", words):
        raise SetupError(f"{name}: only RAISE(ABORT, 'sentence') refuses one message and nothing else")
    if re.search(r"\bINITIALLY DEFERRED\b", words):
        raise SetupError(f"{name}: a deferred foreign key cannot refuse one message; leave DEFERRED out")
    if words.startswith("CREATE TABLE") and re.search(r"\bON CONFLICT\b", words):
        raise SetupError(f"{name}: ON CONFLICT in a table could drop a message behind its 201; leave it out")


def stream_from(db: sqlite3.Connection, name: str, objects: dict[tuple[str, str], SchemaObject]) -> Stream | None:
    """The stream that a table is, or None; SetupError says what an almost-stream lacks."""
    columns = {row[1]: row for row in db.execute(f"PRAGMA table_xinfo({quoted(name)})")}
    if len(columns.keys() & MESSAGE_COLUMNS.keys()) < 3:
        return None
    for column in MESSAGE_COLUMNS.keys() - columns.keys():
        raise SetupError(f"table {name} is almost a stream: it lacks the column {column} {MESSAGE_COLUMNS[column]}")
    for column, wanted in MESSAGE_COLUMNS.items():
        _, _, kind, not_null, _, primary_key, hidden = columns[column]
        has = f"{kind} PRIMARY KEY" if primary_key else f"{kind} NOT NULL" if not_null else kind
        if primary_key and "AUTOINCREMENT" in sql_words(objects["table", name].sql).split():
            has += " AUTOINCREMENT"
        if hidden or has.upper() != wanted:
            raise SetupError(f"table {name} is almost a stream: its column {column} must be {wanted}")
    if not has_key_index(db, name, objects):
        raise SetupError(
            f"table {name} is almost a stream: it lacks its index, CREATE UNIQUE INDEX {name}_key"
            f" ON {name} (client, key) WHERE key IS NOT NULL"
        )
    for column, (_, _, _, not_null, default, _, hidden) in columns.items():
        if column not in MESSAGE_COLUMNS and not hidden and not_null and default is None:
            raise SetupError(f"table {name}: nothing can fill the column {column}; generate it from the body")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", name) or name in RESERVED_NAMES:
        raise SetupError(f"table {name!r} cannot be a route: use letters, digits, _ and -, and no route's name")
    generated = {column: row[2] for column, row in columns.items() if row[6] in (2, 3)}
    stream = Stream(name, {column: filter_for(column, kind) for column, kind in generated.items()})
    try:
        db.execute(f"EXPLAIN {stream.insert}", (None,) * 4)  # compiles triggers and foreign keys as well
    except sqlite3.Error as error:
        raise SetupError(f"table {name} can take no message: {error}") from None
    return stream


def filter_for(column: str, kind: str) -> str:
    """The condition that a generated column equals a text. A typed one is compared as its type, index and all;
    one without (https://www.sqlite.org/datatype3.html, 3.1) would never equal a text if it holds a number.
    """
    untyped = kind.upper() in ("", "ANY", "BLOB")
    return f"CAST({quoted(column)} AS TEXT) = ?" if untyped else f"{quoted(column)} = ?"


def has_key_index(db: sqlite3.Connection, table: str, objects: dict[tuple[str, str], SchemaObject]) -> bool:
    """Does a UNIQUE index hold every Idempotency-Key of a client to one row?"""
    for _, index, unique, _, partial in db.execute(f"PRAGMA index_list({quoted(table)})").fetchall():
        columns = {row[2] for row in db.execute(f"PRAGMA index_info({quoted(index)})")}
        if unique and columns == {"client", "key"}:
            if not partial:
                return True
            condition = [unquoted(token).upper() for token in sql_tokens(objects["index", index].sql)[-5:]]
            if condition == ["WHERE", "KEY", "IS", "NOT", "NULL"]:
                return True
    return False


def require_clients(db: sqlite3.Connection) -> None:
    """Stops a schema whose clients table cannot hold clients."""
    columns = {row[1]: row for row in db.execute("PRAGMA table_xinfo(clients)")}
    for column in ("name", "token", "can"):
        if column not in columns or not columns[column][3]:
            raise SetupError(f"it lacks the table clients (name, token, can), with {column} TEXT NOT NULL")
    try:
        for name, token in (("a", "x"), ("b", "y"), ("a", "z")):
            db.execute("INSERT INTO clients (name, token, can) VALUES (?, ?, '')", (name, token))
    except sqlite3.IntegrityError as error:
        if (name, token) != ("a", "z") or "UNIQUE" not in str(error):
            raise SetupError(f"the table clients cannot hold a client: {error}") from None
    else:
        raise SetupError("the table clients must hold each name only once: name TEXT NOT NULL PRIMARY KEY")


def constraint_sentences(
    db: sqlite3.Connection, table: str, objects: dict[tuple[str, str], SchemaObject]
) -> Iterator[tuple[str, str]]:
    """(what SQLite says, what the client reads) for the constraints of a table that have a name."""
    for definition in sql_definitions(objects["table", table].sql):
        words = [token.upper() for token in definition]
        for at in (i for i, word in enumerate(words[:-2]) if word == "CONSTRAINT"):
            sentence, kind = unquoted(definition[at + 1]), words[at + 2]
            if kind == "CHECK":
                yield f"CHECK constraint failed: {sentence}", sentence
            elif kind == "NOT" and at > 0:
                yield f"NOT NULL constraint failed: {table}.{unquoted(definition[0])}", sentence
            elif kind == "UNIQUE":
                columns = definition[at + 4 : words.index(")", at)] if at == 0 else definition[:1]
                names = ", ".join(f"{table}.{unquoted(c)}" for c in columns if c != ",")
                yield f"UNIQUE constraint failed: {names}", sentence
    for _, index, unique, origin, _ in db.execute(f"PRAGMA index_list({quoted(table)})").fetchall():
        if unique and origin == "c" and " " in index:  # a name without a space is for the owner's eyes
            columns = [row[2] for row in db.execute(f"PRAGMA index_info({quoted(index)})")]
            yield f"UNIQUE constraint failed: {', '.join(f'{table}.{c}' for c in columns)}", index
            yield f"UNIQUE constraint failed: index '{index}'", index


def sql_definitions(create_table: str) -> list[list[str]]:
    """The tokens of each column and table constraint between the outer parentheses of a CREATE TABLE."""
    definitions: list[list[str]] = [[]]
    depth = 0
    for token in sql_tokens(create_table):
        depth -= token == ")"
        if depth == 1 and token == ",":
            definitions.append([])
        elif depth > 0:
            definitions[-1].append(token)
        depth += token == "("
    return definitions


def quoted(name: str) -> str:
    """A name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def unquoted(token: str) -> str:
    """The name that a token of SQL stands for."""
    if token[0] in "\"'`":
        return token[1:-1].replace(token[0] * 2, token[0])
    return token[1:-1] if token[0] == "[" else token


def differences(db: sqlite3.Connection, schema: Schema) -> list[str]:
    """What the tables of a database lack or have too much, beside schema.sql; empty if they are the same.

    Comments and white space do not count, and neither do tables and views of somebody else's.
    """
    found = []
    existing = schema_objects(db)
    for (kind, name), new in schema.objects.items():
        old = existing.get((kind, name))
        if old is None:
            found.append(f"{kind} {name} is new")
        elif sql_tokens(old.sql) != sql_tokens(new.sql):
            before, after = ({" ".join(d) for d in sql_definitions(made.sql)} for made in (old, new))
            changes = [f"+ {d}" for d in sorted(after - before)] + [f"- {d}" for d in sorted(before - after)]
            found.append(f"{kind} {name} has changed" + "".join(f" [{change}]" for change in changes))
    return found + [f"{kind} {name} is gone from the schema" for kind, name in leftovers(db, schema)]


def leftovers(db: sqlite3.Connection, schema: Schema) -> list[tuple[str, str]]:
    """(type, name) of what once stood in schema.sql: streams, and indexes and triggers on its tables."""

    tables = {name.lower() for kind, name in schema.objects if kind == "table"}

    def belongs(kind: str, name: str, table: str) -> bool:
        if kind == "table":
            columns = {row[1] for row in db.execute(f"PRAGMA table_xinfo({quoted(name)})")}
            return MESSAGE_COLUMNS.keys() <= columns
        return table in tables

    existing = schema_objects(db).items()
    gone = [(kind, name, made.table) for (kind, name), made in existing if (kind, name) not in schema.objects]
    return [(kind, name) for kind, name, table in gone if belongs(kind, name, table)]


# ---------------------------------------------------------------------------------------------------------
# The store: "commit these entries, tell me what became of each; read these rows"
# ---------------------------------------------------------------------------------------------------------

BUSY_TIMEOUT_S = 10.0  # how long a message waits for its turn to be written before it is answered with 503
LARGE_WAL_BYTES = 16 * 1024 * 1024  # it is about 4 MiB if no reader stays for long
SQLITE_CONSTRAINT_DATATYPE = 3091  # of STRICT tables; Python has no name for it
PAGE_BYTES = 4 * 1024 * 1024  # a page of the feed ends after about this much


def utc_now() -> str:
    """The time in UTC as RFC 3339, with milliseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection in autocommit mode; mode is ro, rw or rwc as in https://www.sqlite.org/uri.html"""
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=BUSY_TIMEOUT_S,
    )
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA synchronous = FULL")  # in WAL mode: one fsync of the WAL in every COMMIT
    db.execute("PRAGMA checkpoint_fullfsync = ON")  # macOS: fsync alone does not reach the disk there
    db.execute("PRAGMA fullfsync = ON")
    return db


class WriteLock:
    """The turn to write, among processes: a flock on a file of its own beside the database.

    SQLite's own lock is polled for, so that a busy process starves the others; and from 3.7.0 to 3.51.2 two
    connections that write or checkpoint at the same moment can corrupt a WAL. Whoever waits here is queued by
    the kernel. flock(2) knows no time limit, so a thread waits where the caller may have to give up, on a
    descriptor of its own: what it is granted too late cannot be mistaken for a lock that somebody uses.
    """

    def __init__(self, database: Path):
        self._path = database.with_name(database.name + "-lock")
        self._fd = self._open()

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    @contextlib.contextmanager
    def held(self, timeout_s: float = BUSY_TIMEOUT_S) -> Iterator[None]:
        """Holds the lock for a block; TimeoutError if another process has it for too long."""
        fd = self._fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fd = self._granted_within(timeout_s)
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
            if fd != self._fd:
                os.close(fd)

    def _granted_within(self, timeout_s: float) -> int:
        fd = self._open()
        guard = threading.Lock()
        granted, abandoned = threading.Event(), threading.Event()

        def wait_in_kernel() -> None:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with guard:
                granted.set()
                if abandoned.is_set():
                    os.close(fd)

        threading.Thread(target=wait_in_kernel, daemon=True).start()
        granted.wait(timeout_s)
        with guard:
            if not granted.is_set():
                abandoned.set()
                raise TimeoutError("another process holds the write lock")
        return fd

    def close(self) -> None:
        os.close(self._fd)


class Entry:
    """What one request wants written, and then what became of it."""

    __slots__ = (
        *("batch", "bodies", "client", "deadline", "done", "first_id", "key", "last_id", "line", "problem"),
        *("received_at", "replayed", "stream"),
    )

    def __init__(self, stream: Stream, client: str, key: str | None, bodies: list[str], batch: bool = False):
        self.stream = stream
        self.client = client
        self.key = key
        self.bodies = bodies
        self.batch = batch
        self.deadline = time.monotonic() + BUSY_TIMEOUT_S
        self.done = False
        self.problem: Problem | None = None
        self.replayed = False
        self.received_at = ""
        self.first_id = self.last_id = self.line = 0


class Store:
    """The messages, in one SQLite file.

    Requests that wait at the same time share one COMMIT: each queues its entry and asks for the lock; who
    gets it writes everything that is queued and commits once, and the others find their work done. The sqlite3
    module alone writes 5,200 rows a second with a COMMIT for each, and 150,000 with one for a thousand (bench/).

    gather is called with an entry that has been queued, before its thread asks for the lock. A server can use
    it to let more requests queue theirs; see TurnDispatcher.
    """

    def __init__(
        self,
        path: Path,
        schema: Schema,
        clock: Callable[[], str] = utc_now,
        gather: Callable[[Entry], None] = lambda entry: None,
    ):
        self.path = path
        self.schema = schema
        self.clock = clock
        self.gather = gather
        self._queue: deque[Entry] = deque()
        self._lock = threading.Lock()  # held by the thread that writes
        self._write_lock: WriteLock | None = None
        self._writer: sqlite3.Connection | None = None
        self._files: list[tuple[int, int] | None] = []
        self._wal_is_large = False
        self._generation = 0  # of the files: readers open theirs again when it has grown
        self._readers = threading.local()
        # The sqlite3 module gives up the GIL at each row, so that two threads that read a page each hand it to
        # each other a thousand times: 4 at once made 110 pages a second, in turn 200. A filter may take long
        # between two rows, so it waits for nobody.
        self.page_turn = threading.Lock()

    # Opening and closing

    def open(self) -> None:
        """Makes the database if there is none; SetupError if it cannot be used or differs from the schema."""
        try:
            self._write_lock = WriteLock(self.path)
            try:
                with self._write_lock.held():
                    self._create_or_compare()
                    self._open_writer()
            except BaseException:
                self._write_lock.close()
                raise
        except TimeoutError as error:
            raise SetupError(f"{self.path}: {error}") from None
        except (sqlite3.Error, OSError) as error:
            raise SetupError(f"{self.path} cannot be opened: {error}") from None

    def _create_or_compare(self) -> None:
        with contextlib.closing(connect(self.path, "rwc")) as db:
            if not schema_objects(db):
                self._create(db)
            found = differences(db, self.schema)
        if found:
            raise SetupError(f"{self.path} differs from the schema ({'; '.join(found)}): run migrate")

    def _create(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        for statement in self.schema.statements:
            db.execute(statement)
        db.execute("COMMIT")
        sync_directory(self.path.parent)  # or a power cut could take the new file with every message in it

    def _open_writer(self) -> sqlite3.Connection:
        """The connection that writes. The caller holds the write lock."""
        db = connect(self.path, "rw")  # never makes a file: a database that has gone is not to be replaced
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA journal_size_limit = {LARGE_WAL_BYTES}")  # what a long reader made grow shrinks after
        # After a failed fsync the kernel takes the lost pages for clean (https://lwn.net/Articles/752063/), and
        # a WAL with a hole in it ends there. So what an earlier process left in the WAL goes to the database.
        # If a reader is in its way, the WAL is in use by somebody who knows where it ends, and stays as it is.
        checkpoint(db)
        self._files = file_identities(self.path)
        self._generation += 1
        self._writer = db
        return db

    def _discard_writer(self) -> None:
        if self._writer:
            with contextlib.suppress(sqlite3.Error):
                self._writer.close()
        self._writer = None

    def close(self) -> None:
        """Lets a COMMIT that is under way end, then closes; the WAL goes into the database."""
        if self._lock.acquire(timeout=BUSY_TIMEOUT_S):
            with contextlib.suppress(TimeoutError, sqlite3.Error), self._write_lock.held():
                if self._writer:
                    checkpoint(self._writer)
                self._discard_writer()
            self._write_lock.close()
            self._lock.release()

    # Writing

    def append(self, entry: Entry) -> None:
        """Commits the messages of an entry to disk, all or none; the entry then holds their ids.

        Its bodies are JSON texts that have been checked. Raises Problem: 4xx when a rule of the schema refused
        them (nothing is stored), 5xx when the outcome is unknown.
        """
        self._queue.append(entry)
        self.gather(entry)
        if not entry.done and self._lock.acquire(timeout=max(0.0, entry.deadline - time.monotonic())):
            try:
                if not entry.done:
                    self._commit(self._take_queue(), entry.deadline)
            finally:
                self._lock.release()
        if not entry.done:
            with contextlib.suppress(ValueError):  # not there: it is in the COMMIT that takes so long
                self._queue.remove(entry)
            raise storage_problem(TimeoutError())
        if entry.problem:
            raise entry.problem

    def _take_queue(self) -> list[Entry]:
        group = []
        with contextlib.suppress(IndexError):  # len() says nothing: an entry may be withdrawn at any moment
            while True:
                group.append(self._queue.popleft())
        return group

    def _commit(self, group: list[Entry], deadline: float) -> None:
        """Writes a group of entries with one COMMIT. On any failure of the database, all of them fail."""
        failure = storage_problem(RuntimeError())
        try:
            with self._write_lock.held(max(0.1, deadline - time.monotonic())):
                try:
                    db = self._ready_writer()
                    received_at = self.clock()
                    db.execute("BEGIN IMMEDIATE")
                    for entry in group:
                        self._insert(db, entry, received_at)
                    db.execute("COMMIT")
                    if self._files != file_identities(self.path):
                        raise OSError("the database was removed or replaced during the COMMIT")
                    failure = None
                    self._watch_wal()
                except BaseException:
                    self._discard_writer()  # rolls back; a failed COMMIT is never tried again
                    raise
        except (sqlite3.Error, OSError, MemoryError) as error:
            log.error("%d requests could not be written: %s: %s", len(group), type(error).__name__, error)
            failure = storage_problem(error)
        finally:
            for entry in group:
                entry.problem = failure or entry.problem
                entry.done = True

    def _watch_wal(self) -> None:
        """Says once that the WAL has grown large, and once that it no longer is."""
        large = os.path.getsize(f"{self.path}-wal") > LARGE_WAL_BYTES
        if large and not self._wal_is_large:
            log.warning("the WAL has grown over %d MiB: a reader stays open", LARGE_WAL_BYTES // 2**20)
        elif self._wal_is_large and not large:
            log.info("the WAL is small again")
        self._wal_is_large = large

    def _ready_writer(self) -> sqlite3.Connection:
        """The connection that writes, opened again if it is lost or its files are not the ones on disk."""
        if self._writer and self._files != file_identities(self.path):
            log.error("%s or its WAL was removed or replaced; opening it again", self.path)
            if self._files[0] == file_identity(self.path):
                checkpoint(self._writer)  # what is in a WAL that was removed can still be saved
            self._discard_writer()
        return self._writer or self._open_writer()

    def _insert(self, db: sqlite3.Connection, entry: Entry, received_at: str) -> None:
        """Inserts the rows of one entry. A refusal is noted in it, and undoes that entry only."""
        entry.line = 1
        try:
            if entry.batch:
                db.execute("SAVEPOINT batch")
            values = (received_at, entry.client, entry.key, entry.bodies[0])
            entry.first_id = entry.last_id = db.execute(entry.stream.insert, values).lastrowid
            if entry.batch:
                db.executemany(entry.stream.insert, rows_after_the_first(entry, received_at))
                (entry.last_id,) = db.execute("SELECT last_insert_rowid()").fetchone()
                db.execute("RELEASE batch")
            entry.received_at = received_at
        except sqlite3.Error as error:
            # FULL, IOERR, NOMEM and BUSY may have rolled everything back, and the next INSERT would be a
            # transaction of its own: https://www.sqlite.org/lang_transaction.html (3, response to errors)
            if not db.in_transaction:
                raise
            if entry.batch:
                db.execute("ROLLBACK TO batch")
                db.execute("RELEASE batch")
            if not self._settle(db, entry, error):
                raise

    def _settle(self, db: sqlite3.Connection, entry: Entry, error: sqlite3.Error) -> bool:
        """Decides an entry whose INSERT failed: a replay, or a refusal. False if the message is not the cause."""
        stored = self._stored_under_key(db, entry) if entry.key else []
        members = {"stream": entry.stream.name} | ({"line": entry.line} if entry.batch else {})
        if stored and [body for _, _, body in stored] == entry.bodies:
            entry.first_id, entry.received_at, _ = stored[0]
            entry.last_id = stored[-1][0]
            entry.replayed = True
        elif stored:
            entry.problem = Problem(422, "This Idempotency-Key was used before, with another body.")
        elif isinstance(error, sqlite3.IntegrityError):
            status, sentence = self._refusal(error, entry.stream)
            entry.problem = Problem(status, sentence, **members)
        elif error.sqlite_errorname in ("SQLITE_ERROR", "SQLITE_TOOBIG") and can_compile(db, entry.stream.insert):
            # Not the statement but what this body makes of it, such as an overflow in an expression.
            entry.problem = Problem(422, "A rule of this stream cannot be applied to the message.", **members)
        return entry.replayed or entry.problem is not None

    def _stored_under_key(self, db: sqlite3.Connection, entry: Entry) -> list[tuple[int, str, str]]:
        """(id, received_at, body) of the message, or of all lines of the batch, that came with a key."""
        return db.execute(
            f'SELECT id, received_at, body FROM "{entry.stream.name}"'
            " WHERE client = ? AND (key = ? OR key > ? AND key < ?) ORDER BY id",
            (entry.client, entry.key, key_of_line(entry.key, ""), entry.key + "!"),  # "!" is next to the space
        ).fetchall()

    def _refusal(self, error: sqlite3.IntegrityError, stream: Stream) -> tuple[int, str]:
        """(status, what the client reads) for a broken rule: the owner's words where there are any."""
        text, kind = str(error), error.sqlite_errorname
        subject = text.rpartition(": ")[2].replace(f"{stream.name}.", "")
        sentence = self.schema.sentences.get(text)
        if kind in ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY"):
            return 409, sentence or "Another message has the same " + subject.replace("index ", "")
        if kind == "SQLITE_CONSTRAINT_NOTNULL":
            sentence = sentence or f"{subject} is required"
        elif kind == "SQLITE_CONSTRAINT_FOREIGNKEY":
            sentence = "The message refers to something that does not exist (FOREIGN KEY)"
        elif error.sqlite_errorcode == SQLITE_CONSTRAINT_DATATYPE:  # "cannot store TEXT value in REAL column …"
            sentence = text.replace(f"{stream.name}.", "")
        elif kind == "SQLITE_CONSTRAINT_TRIGGER":
            sentence = text
        return 422, sentence or "The message breaks a rule of this stream (CHECK)"

    def probe(self) -> None:
        """Writes and syncs one page, as a message would; raises what stops it."""
        if not self._lock.acquire(timeout=BUSY_TIMEOUT_S):
            raise TimeoutError("a COMMIT takes too long")
        try:
            with self._write_lock.held():
                try:
                    db = self._ready_writer()
                    db.execute("BEGIN IMMEDIATE")
                    (version,) = db.execute("PRAGMA user_version").fetchone()
                    db.execute(f"PRAGMA user_version = {version}")  # writes page 1, also when it stays the same
                    db.execute("COMMIT")
                except BaseException:
                    self._discard_writer()
                    raise
        finally:
            self._lock.release()

    # Reading: a connection for each thread, which never waits for a writer

    def _reader(self) -> sqlite3.Connection:
        if getattr(self._readers, "generation", None) != self._generation:
            generation = self._generation
            self._readers.db = connect(self.path, "ro")
            self._readers.generation = generation
        return self._readers.db

    def page(self, stream: Stream, after: int, limit: int, filters: dict[str, str]) -> Iterator[tuple]:
        """Rows (id, received_at, client, key, body in bytes) in commit order after an id; at most limit of them.

        filters: generated columns and the values they must equal. Close the iterator to end its snapshot.
        """
        conditions = "".join(f" AND {stream.filters[field]}" for field in filters)
        cursor = self._reader().execute(
            f'SELECT id, received_at, client, key, CAST(body AS BLOB) FROM "{stream.name}"'
            f" WHERE id > ?{conditions} ORDER BY id LIMIT ?",
            (after, *filters.values(), limit),
        )
        with contextlib.closing(cursor):
            yield from cursor

    def message(self, stream: Stream, message_id: int) -> tuple | None:
        """The row (id, received_at, client, key, body in bytes) with an id, or None."""
        row = next(self.page(stream, message_id - 1, 1, {}), None)
        return row if row and row[0] == message_id else None

    def clients(self) -> list[tuple[str, str, str]]:
        """(name, digest, grants) of every client, as the files on disk have it now."""
        if self._files[0] != file_identity(self.path):
            self._generation += 1
        return self._reader().execute("SELECT name, token, can FROM clients ORDER BY name").fetchall()

    # Keeping clients: for the command line, which has no message to write

    def add_client(self, name: str, digest: str, can: str) -> bool:
        """Adds a client; False if there is one of that name."""
        return self._change(
            "INSERT INTO clients (name, token, can) VALUES (?, ?, ?) ON CONFLICT DO NOTHING", name, digest, can
        )

    def remove_client(self, name: str) -> bool:
        """Removes a client; False if there is none of that name."""
        return self._change("DELETE FROM clients WHERE name = ?", name)

    def _change(self, sql: str, *values: str) -> bool:
        with self._lock, self._write_lock.held():
            return self._ready_writer().execute(sql, values).rowcount == 1


def rows_after_the_first(entry: Entry, received_at: str) -> Iterator[tuple]:
    """What is inserted for the lines of a batch from the second on; entry.line is the one under way."""
    for line, body in enumerate(entry.bodies[1:], 2):
        entry.line = line
        yield received_at, entry.client, key_of_line(entry.key, line), body


def key_of_line(key: str | None, line: int | str) -> str | None:
    """The key of a line of a batch after the first, which has the batch's own. No client's key has a space."""
    return None if key is None else f"{key} {line}"


def file_identity(path: Path | str) -> tuple[int, int] | None:
    """(device, inode) of a file, or None: one that is deleted or replaced does not keep them."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def file_identities(path: Path) -> list[tuple[int, int] | None]:
    """The identities of a database that is open, and of its WAL."""
    return [file_identity(path), file_identity(f"{path}-wal")]


def checkpoint(db: sqlite3.Connection) -> None:
    """Moves the WAL into the database as far as that goes without waiting for anybody."""
    db.execute("PRAGMA busy_timeout = 0")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000:.0f}")


def can_compile(db: sqlite3.Connection, insert: str) -> bool:
    """Is an INSERT of four values still possible with the tables as they are?"""
    try:
        db.execute(f"EXPLAIN {insert}", (None,) * 4)
    except sqlite3.Error:
        return False
    return True


def sync_directory(path: Path) -> None:
    """Makes the names of new files in a directory durable; see fsync(2)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------------------------
# Clients: who may come in
# ---------------------------------------------------------------------------------------------------------

CLIENTS_REFRESH_S = 1.0  # how soon every process knows of a new or a revoked token


@dataclass(frozen=True)
class Client:
    """Somebody with a token. grants are write and read, for all streams or with :STREAM for one."""

    name: str
    grants: frozenset[str]

    def can(self, action: str, stream: Stream) -> bool:
        return action in self.grants or f"{action}:{stream.name}" in self.grants


class Clients:
    """The clients table in memory, so that a request costs no SQL for its token."""

    def __init__(self, store: Store):
        self._store = store
        self._by_digest: dict[str, Client] = {}
        self._read_again_at = 0.0

    def authenticate(self, authorization: str | None) -> Client:
        """The client whose token an Authorization header holds: Bearer (RFC 6750), or Basic (RFC 7617) with the
        token as its password. Raises Problem 401.
        """
        if not authorization:
            raise Problem(401, "Send a token: Authorization: Bearer TOKEN.", {"WWW-Authenticate": CHALLENGE})
        if time.monotonic() >= self._read_again_at:
            self._read_clients()
        scheme, _, credentials = authorization.partition(" ")
        token = password_in(credentials) if scheme.lower() == "basic" else credentials
        # What is looked up is a digest: how long that takes says nothing about how much of a token is right.
        client = self._by_digest.get(digest_of(token))
        if client is None or scheme.lower() not in ("bearer", "basic"):
            raise Problem(401, "This token is not valid here.", {"WWW-Authenticate": INVALID_TOKEN})
        return client

    def _read_clients(self) -> None:
        try:
            rows = self._store.clients()
        except (sqlite3.Error, OSError) as error:
            log.error("the clients cannot be read: %s", error)
            raise storage_problem(error) from None
        self._by_digest = {digest: Client(name, frozenset(can.split())) for name, digest, can in rows}
        self._read_again_at = time.monotonic() + CLIENTS_REFRESH_S


CHALLENGE = 'Bearer realm="inlet", Basic realm="inlet"'
INVALID_TOKEN = 'Bearer realm="inlet", error="invalid_token", Basic realm="inlet"'


def new_token() -> str:
    """A token that nobody can guess: 256 random bits."""
    return secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    """The SHA-256 digest of a token in hexadecimal: all that is kept of it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def password_in(credentials: str) -> str:
    """The password in the credentials of a Basic Authorization header; empty if there is none."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def permit(client: Client, action: str, stream: Stream) -> None:
    """Stops a client that may not do this; Problem 403."""
    if not client.can(action, stream):
        scope = f"{action}:{stream.name}"
        challenge = f'Bearer realm="inlet", error="insufficient_scope", scope="{scope}"'
        raise Problem(403, f"This token lacks the grant {scope}.", {"WWW-Authenticate": challenge}, stream=stream.name)


# ---------------------------------------------------------------------------------------------------------
# Reading requests
# ---------------------------------------------------------------------------------------------------------

MAX_DEPTH = 512  # of arrays and objects: under the limit of every SQLite (1000 from 3.42 on) and of Python
MAX_ID = 2**63 - 1
LARGEST_BATCH = 10_000  # messages: about 0.1 s during which nobody else can write
NDJSON_TYPES = ("application/x-ndjson", "application/jsonl")

# What the grammar of a JSON text is made of, as far as finding a place in one needs it.
# A string that does not end goes to the end: looking for its end from each quote again would take for ever.
JSON_TOKEN = re.compile(r'"(?:[^"\\]++|\\.?)*+(?:"|\Z)|[\[\]{}]|-?Infinity|NaN', re.DOTALL)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# parse_int: a whole number may have more digits than int() takes (4300); its value is of no interest here.
JSON_DECODER = json.JSONDecoder(parse_int=float, parse_constant=_refuse_constant)


def json_text(data: bytes) -> str:
    """A body as text, if it is one JSON value as RFC 8259 has it; Problem 400 with line and column if not."""
    text = utf8_text(data)
    require_json(text)
    return text


def json_lines(data: bytes) -> list[str]:
    """The lines of a body, if each is a JSON value; empty ones at the end are left out. Problem 400 or 413."""
    lines = utf8_text(data).rstrip("\r\n").split("\n")
    if lines == [""]:
        raise Problem(400, "The batch is empty.")
    if len(lines) > LARGEST_BATCH:
        raise Problem(413, f"The batch has more than {LARGEST_BATCH} messages.", limit=LARGEST_BATCH)
    lines = [line.removesuffix("\r") for line in lines]
    for number, line in enumerate(lines, 1):
        require_json(line, number)
    return lines


def utf8_text(data: bytes) -> str:
    """A body as text; Problem 400 if it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise json_problem("it is not UTF-8", data[: error.start].decode()) from None


def require_json(text: str, first_line: int = 1) -> None:
    """Stops a text that is not one JSON value; Problem 400."""
    try:
        JSON_DECODER.decode(text)
    except RecursionError:
        refuse_depth(text, first_line)
        raise
    except json.JSONDecodeError as error:
        raise json_problem(error.msg, text[: error.pos], first_line) from None
    except ValueError as error:
        constant = next(token for token in JSON_TOKEN.finditer(text) if token[0][-1] in "Ny")
        raise json_problem(str(error), text[: constant.start()], first_line) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        refuse_depth(text, first_line)


def refuse_depth(text: str, first_line: int) -> None:
    """Stops a text with too many arrays and objects inside of each other; Problem 400."""
    depth = 0
    for token in JSON_TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise json_problem(f"it is nested more than {MAX_DEPTH} deep", text[: token.start()], first_line)
        elif token[0] in "]}":
            depth -= 1


def json_problem(reason: str, text_before: str, first_line: int = 1) -> Problem:
    """The refusal of a body, with the place (counted from 1, in characters) where it stops being JSON."""
    line = text_before.count("\n") + first_line
    column = len(text_before) - text_before.rfind("\n")
    return Problem(400, f"The body is not JSON: {reason}, line {line} column {column}.", line=line, column=column)


def is_batch(content_type: str | None) -> bool:
    """Does a Content-Type say one message on each line (NDJSON)? Problem 415 if it does not say JSON in UTF-8."""
    if content_type == "application/json":  # what nearly all send
        return False
    kind, options = falcon.parse_header(content_type or "")
    batch = kind.lower() in NDJSON_TYPES
    is_json = kind.lower() == "application/json" or re.fullmatch(r"[\w.-]+/[\w.+-]+\+json", kind, re.I | re.A)
    if not (batch or is_json) or options.get("charset", "utf-8").lower() != "utf-8":
        accepted = ["application/json", "application/*+json", *NDJSON_TYPES]
        detail = f"Send one message as {accepted[0]} (or any type that ends in +json), many as {accepted[2]}, in UTF-8."
        raise Problem(415, detail, {"Accept-Post": ", ".join(accepted)}, accepted=accepted)
    return batch


def without_gzip(data: bytes, coding: str | None, max_body: int) -> bytes:
    """A body with its Content-Encoding undone; Problem 400 if it is broken, 413 if too large, 415 if not gzip.

    Nothing is unpacked past the limit: a small body that would become a huge one costs what it may cost.
    """
    if coding is None or coding.lower() == "identity":
        return data
    if coding.lower() not in ("gzip", "x-gzip"):
        raise Problem(415, "The only Content-Encoding here is gzip.", {"Accept-Encoding": "gzip"}, accepted=["gzip"])
    member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        unpacked = member.decompress(data, max_body + 1)
    except zlib.error:
        raise Problem(400, "The body is not gzip.") from None
    if len(unpacked) > max_body:
        raise too_large(max_body)
    if not member.eof or member.unused_data:
        raise Problem(400, "The body is not one whole gzip member.")
    return unpacked


def read_body(environ: dict[str, Any], max_body: int) -> bytes:
    """The body of a request, whole; Problem 400 if it is cut short, 411 without a length, 413 if it is too large."""
    length = environ.get("CONTENT_LENGTH")
    if length:
        if not re.fullmatch(r"[0-9]+", length, re.ASCII):
            raise Problem(400, "Content-Length is not a number.")
        wanted = int(length) if len(length) < 19 else MAX_ID
    elif environ.get("wsgi.input_terminated"):  # the server takes chunks, and ends the stream where they end
        wanted = None
    else:
        raise Problem(411, "Send a Content-Length.")
    if (wanted or 0) > max_body:
        raise too_large(max_body)
    try:
        data = read_up_to(environ["wsgi.input"], max_body + 1 if wanted is None else wanted)
    except OSError:  # how some servers tell that the client has gone
        data = b""
    if wanted is not None and len(data) < wanted:
        raise Problem(400, f"The body was cut short: {len(data)} of {wanted} bytes came.")
    if len(data) > max_body:
        raise too_large(max_body)
    return data


def read_up_to(stream: Any, size: int) -> bytes:
    """size bytes of a stream, or what it has; one read() may give less."""
    data = stream.read(size)
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def too_large(max_body: int) -> Problem:
    return Problem(413, f"The body is larger than {max_body} bytes.", limit=max_body)


def idempotency_key(header: str | None) -> str | None:
    """The Idempotency-Key of a request, bare or as a quoted string (RFC 8941, 3.3.3); Problem 400 if malformed."""
    if header is None:
        return None
    key = header
    if len(header) > 1 and header[0] == header[-1] == '"':
        key = re.sub(r'\\(["\\])', r"\1", header[1:-1])
    if not re.fullmatch(r"[!-~]{1,255}", key):
        raise Problem(400, "Idempotency-Key takes 1 to 255 visible ASCII characters, without spaces.")
    return key


@dataclass(frozen=True)
class Cursor:
    """Where a consumer of a feed stands: the query of GET /{stream}."""

    after: int
    limit: int
    filters: dict[str, str]

    def query(self) -> str:
        """The query string for it, without what is default."""
        limit = {} if self.limit == DEFAULT_PAGE else {"limit": self.limit}
        return urlencode({"after": self.after, **limit, **self.filters})


DEFAULT_PAGE = 100  # messages
LARGEST_PAGE = 1000


def cursor_from(params: dict[str, str | list[str]], stream: Stream) -> Cursor:
    """The cursor that query parameters ask for; Problem 400 if one is unknown, doubled or out of range."""
    for name, value in params.items():
        if name not in ("after", "limit", *stream.filters):
            known = ["after", "limit", *stream.filters]
            raise Problem(400, f"There is no parameter {name[:64]!r}: there are {', '.join(known)}.", parameters=known)
        if isinstance(value, list):
            raise Problem(400, f"The parameter {name} is given more than once.")
    values = dict(params)
    after = number_in("after", values.pop("after", "0"), 0, MAX_ID)
    limit = number_in("limit", values.pop("limit", str(DEFAULT_PAGE)), 1, LARGEST_PAGE)
    return Cursor(after, limit, values)


def number_in(name: str, text: str, low: int, high: int) -> int:
    """The whole number that a parameter holds; Problem 400."""
    if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
        raise Problem(400, f"{name} takes a whole number from {low} to {high}.")
    return int(text)


def wants_ndjson(req: falcon.Request) -> bool:
    """Does the client ask for one JSON text on each line?"""
    if req.accept in ("*/*", "application/json"):
        return False
    return req.client_prefers(("application/json", *NDJSON_TYPES)) in NDJSON_TYPES


# ---------------------------------------------------------------------------------------------------------
# Resources
# ---------------------------------------------------------------------------------------------------------


def envelope(row: tuple) -> bytes:
    """A message as the feed gives it. The body is put in as it was sent: it is JSON already."""
    message_id, received_at, client, key, body = row
    head = (
        f'{{"id": {message_id}, "received_at": {json_string(received_at)}, "client": {json_string(client)},'
        f' "key": {"null" if key is None else json_string(key)}, "body": '
    )
    return b"%b%b}" % (head.encode(), body)


def on_one_line(message: bytes) -> bytes:
    """The same JSON without line breaks. JSON has them between tokens only, where a space means the same."""
    return message.replace(b"\n", b" ").replace(b"\r", b" ")


def mount_point(req: falcon.Request) -> str:
    """The path that the app is mounted under, ready for a link; mostly empty."""
    return quote(req.root_path) if req.root_path else ""


class StreamResource:
    """/{stream}"""

    def __init__(self, store: Store, stream: Stream, max_body: int):
        self._store = store
        self._stream = stream
        self._max_body = max_body

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        permit(req.context.client, "write", self._stream)
        batch = is_batch(req.content_type)
        key = idempotency_key(req.env.get("HTTP_IDEMPOTENCY_KEY"))
        data = read_body(req.env, self._max_body)
        data = without_gzip(data, req.env.get("HTTP_CONTENT_ENCODING"), self._max_body)
        bodies = json_lines(data) if batch else [json_text(data)]
        entry = Entry(self._stream, req.context.client.name, key, bodies, batch)
        self._store.append(entry)
        resp.status = falcon.HTTP_201
        if entry.replayed:
            resp.set_header("Idempotent-Replayed", "true")
        if batch:
            ids = f'"count": {len(bodies)}, "first_id": {entry.first_id}, "last_id": {entry.last_id}'
        else:
            ids = f'"id": {entry.first_id}'
            resp.set_header("Location", f"{mount_point(req)}/{self._stream.name}/{entry.first_id}")
        resp.data = f'{{{ids}, "received_at": "{entry.received_at}"}}'.encode()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        permit(req.context.client, "read", self._stream)
        cursor = cursor_from(req.params, self._stream)
        ndjson = wants_ndjson(req)
        messages, last_id = self._page(cursor)
        next_page = f"{mount_point(req)}/{self._stream.name}?{replace(cursor, after=last_id).query()}"
        resp.set_header("Link", f'<{next_page}>; rel="next"')
        if ndjson:
            resp.content_type = NDJSON_TYPES[0]
            resp.data = b"".join(b"%b\n" % on_one_line(message) for message in messages)
        else:
            resp.data = b'{"messages": [%b], "next": %b}' % (b", ".join(messages), json_string(next_page).encode())

    on_head = on_get

    def _page(self, cursor: Cursor) -> tuple[list[bytes], int]:
        """The messages of a page, and the id to go on after."""
        messages, size, last_id = [], 0, cursor.after
        pages = self._store.page(self._stream, cursor.after, cursor.limit, cursor.filters)
        turn = contextlib.nullcontext() if cursor.filters else self._store.page_turn
        with turn, contextlib.closing(pages) as rows:
            for row in rows:
                messages.append(envelope(row))
                size += len(messages[-1])
                last_id = row[0]
                if size >= PAGE_BYTES:
                    break
        return messages, last_id


class MessageResource:
    """/{stream}/{id}"""

    def __init__(self, store: Store, stream: Stream):
        self._store = store
        self._stream = stream

    def on_get(self, req: falcon.Request, resp: falcon.Response, message_id: str) -> None:
        permit(req.context.client, "read", self._stream)
        number = int(message_id) if re.fullmatch(r"[0-9]{1,19}", message_id) else 0
        row = self._store.message(self._stream, number) if number <= MAX_ID else None
        if row is None:
            raise Problem(404, "There is no message with this id.", stream=self._stream.name)
        resp.data = envelope(row)

    on_head = on_get


class RootResource:
    """/"""

    def __init__(self, schema: Schema):
        self._schema = schema

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        streams = {}
        for name, stream in self._schema.streams.items():
            can = [action for action in ("write", "read") if req.context.client.can(action, stream)]
            if can:
                href = f"{mount_point(req)}/{name}"
                streams[name] = {"href": href, "can": can, "fields": list(stream.filters)}
        resp.media = {"service": "Inlet", "version": __version__, "streams": streams}

    on_head = on_get


class HealthResource:
    """/healthz: alive is that this process answers; ready is that a message can be written now.

    All who ask while a probe runs share it, and no answer waits longer than PROBE_TIMEOUT_S for it: however
    slow the disk is, and however often somebody asks, one write a second is the most that this causes.
    """

    PROBE_TIMEOUT_S = 2.0
    PROBE_INTERVAL_S = 1.0

    def __init__(self, store: Store):
        self._store = store
        self._lock = threading.Lock()
        self._probed = threading.Event()
        self._probed_at = -self.PROBE_INTERVAL_S
        self._failure: Problem | None = None
        self._probed.set()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        with self._lock:
            if self._probed.is_set() and time.monotonic() >= self._probed_at + self.PROBE_INTERVAL_S:
                self._probed.clear()
                threading.Thread(target=self._probe, daemon=True).start()
        if not self._probed.wait(self.PROBE_TIMEOUT_S):
            raise not_ready("A write takes too long.")
        if self._failure:
            raise self._failure
        resp.media = {"alive": True, "ready": True}

    on_head = on_get

    def _probe(self) -> None:
        try:
            self._store.probe()
            self._failure = None
        except (sqlite3.Error, OSError, MemoryError) as error:
            log.error("not ready: %s: %s", type(error).__name__, error)
            self._failure = not_ready("The database cannot be written.")
        finally:
            self._probed_at = time.monotonic()
            self._probed.set()


def not_ready(detail: str) -> Problem:
    return Problem(503, detail, {"Retry-After": str(RETRY_AFTER_S)}, alive=True, ready=False)


# ---------------------------------------------------------------------------------------------------------
# The app
# ---------------------------------------------------------------------------------------------------------


class Authentication:
    """Falcon middleware: nobody comes to any route but /healthz without a token, be there such a route or not."""

    def __init__(self, clients: Clients):
        self._clients = clients

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        if req.path == "/healthz":
            return
        if not req.auth and "mod_wsgi.version" in req.env:
            hint = "Send a token. If you did: Apache has kept it to itself, and needs WSGIPassAuthorization On."
            raise Problem(401, hint, {"WWW-Authenticate": CHALLENGE})
        req.context.client = self._clients.authenticate(req.auth)


def create_app(store: Store, max_body: int = Settings.max_body) -> falcon.App:
    """The WSGI app that serves a store."""
    app = falcon.App(middleware=[Authentication(Clients(store))])
    app.add_route("/", RootResource(store.schema))
    app.add_route("/healthz", HealthResource(store))
    for stream in store.schema.streams.values():
        app.add_route(f"/{stream.name}", StreamResource(store, stream, max_body))
        app.add_route(f"/{stream.name}/{{message_id}}", MessageResource(store, stream))
    app.add_error_handler(Exception, answer_bug)
    app.add_error_handler(sqlite3.Error, answer_database_error)
    app.add_error_handler(falcon.HTTPError, answer_http_error)
    app.add_error_handler(Problem, answer_problem)
    return app


def answer_problem(req: falcon.Request, resp: falcon.Response, problem: Problem, params: dict) -> None:
    resp.status = problem.status
    resp.content_type = "application/problem+json"
    resp.set_headers(problem.headers)
    resp.data = problem.body


def answer_http_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: dict) -> None:
    """Falcon's own refusals: an unknown route, or a method that a route does not have."""
    details = {404: "There is nothing at this path.", 405: "This path does not take this method."}
    if error.status_code in details:
        problem = Problem(error.status_code, details[error.status_code], dict(error.headers or {}))
    else:  # Falcon says 400 to methods that it does not know; RFC 9110, 15.6.2 says 501
        problem = Problem(501, "No path here takes this method.")
    answer_problem(req, resp, problem, params)


def answer_database_error(req: falcon.Request, resp: falcon.Response, error: sqlite3.Error, params: dict) -> None:
    log.error("the database cannot be read: %s: %s", type(error).__name__, error)
    answer_problem(req, resp, unavailable(503, "The database cannot be read at the moment. Try again."), params)


def answer_bug(req: falcon.Request, resp: falcon.Response, error: Exception, params: dict) -> None:
    log.error("unexpected error at %s %s", req.method, req.path, exc_info=error)
    answer_problem(req, resp, unavailable(500, f"An unexpected error. {UNKNOWN_OUTCOME}"), params)


def open_store(settings: Settings) -> Store:
    """The store that the settings name, opened; SetupError if it cannot be."""
    store = Store(settings.database, read_schema(settings.schema))
    store.open()
    return store


class LazyApplication:
    """The app for other servers, made by the first request in a process.

    So importing this module touches no disk, and a server that forks after the import (gunicorn --preload,
    uWSGI) never shares a connection between processes, which SQLite forbids.
    """

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._app: falcon.App | None = None

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        if self._app is None:
            try:
                require_threads(environ)
                self._make()
            except SetupError as error:
                log.critical("%s", error)
                problem = unavailable(503, "The service is not set up; its log says why.")
                start_response(
                    "503 Service Unavailable", [("Content-Type", "application/problem+json"), *problem.headers.items()]
                )
                return [problem.body]
        return self._app(environ, start_response)

    def _make(self) -> None:
        with self._lock:
            if self._app is None:
                settings = settings_from(settings_in_environment())
                self._app = create_app(open_store(settings), settings.max_body)


def require_threads(environ: dict[str, Any]) -> None:
    """Stops uWSGI without threads, where whatever waits in one would wait for ever."""
    if "uwsgi.version" in environ:
        import uwsgi  # only there inside of uWSGI

        if not {"enable-threads", "threads"} & {os.fsdecode(name) for name in uwsgi.opt}:
            raise SetupError("uWSGI runs no threads of Python: set enable-threads = true")


application = LazyApplication()


# ---------------------------------------------------------------------------------------------------------
# The server behind `python service.py`
# ---------------------------------------------------------------------------------------------------------

WRITERS = 2  # threads that write: one commits while the other gathers the next group
LARGEST_GROUP = 64  # requests on the stack of one writer: more made no measurable difference
CONNECTIONS = 4096  # fewer if the process may not open as many files
MAX_HEADER_BYTES = 16_384
DRAIN_S = 5.0  # how long a server that was told to stop waits for the requests in flight


class TurnDispatcher:
    """waitress's task dispatcher, arranged for shared COMMITs.

    waitress wakes a thread for each request, and all of them then wait for the same disk: 64 connections cost
    two thread switches and a fight for the GIL per message. Here all POSTs that one turn of waitress's loop
    has read are handed to one writer together. It starts the first; where that waits for its COMMIT
    (Store.gather), the writer starts the next one, on top of it on the same stack, and so on; the last one
    commits for all of them. On 2 cores that made 7,300 messages a second out of 3,000, and 130 µs of CPU each
    out of 370. What reads goes to threads of its own, which no slow disk can occupy.
    """

    def __init__(self, readers: int):
        self._writes: deque[Any] = deque()  # waitress channels with a POST to run
        # Channels whose client sent another request before it took the last answer. They wait until it has: no
        # thread ever does, and a client that never reads costs one page of memory.
        self._unread: deque[Any] = deque()
        self._turns: SimpleQueue[None] = SimpleQueue()  # wakes a writer
        self._reads: SimpleQueue[Any] = SimpleQueue()
        self._stack = threading.local()
        self.wake_loop: Callable[[], None] = lambda: None
        for work in [self._write] * WRITERS + [self._read] * readers:
            threading.Thread(target=work, daemon=True).start()

    def add_task(self, channel: Any) -> None:
        """Called by waitress for a channel whose next request has come in whole."""
        request = channel.requests[0]
        if channel.total_outbufs_len:
            self._unread.append(channel)
        elif request.error or request.command != "POST":
            self._reads.put(channel)
        else:
            self._writes.append(channel)

    def end_turn(self) -> None:
        """Called by the loop when it has read and sent what there is: the writers may start."""
        for _ in range(len(self._unread)):
            self.add_task(self._unread.popleft())
        if self._writes:
            self._turns.put(None)

    def gather(self, entry: Entry) -> None:
        """Runs the POSTs that wait, up to where they wait for the COMMIT too, until this entry is done."""
        if not self.in_writer() or self._stack.depth >= LARGEST_GROUP:
            return
        self._stack.depth += 1
        try:
            while not entry.done and time.monotonic() < entry.deadline and self._run_next():
                pass
        finally:
            self._stack.depth -= 1

    def in_writer(self) -> bool:
        """Is this a thread that writes?"""
        return hasattr(self._stack, "depth")

    def answered(self) -> None:
        """Called by waitress when there is something to send: wakes the loop. A writer does so after its group."""
        if not self.in_writer():
            self.wake_loop()

    def _write(self) -> None:
        self._stack.depth = 0
        while True:
            self._turns.get()
            while self._run_next():
                self.wake_loop()  # at the end of each group, and not only of the last

    def _run_next(self) -> bool:
        try:
            channel = self._writes.popleft()
        except IndexError:
            return False
        run_request(channel)
        return True

    def _read(self) -> None:
        while True:
            run_request(self._reads.get())


def run_request(channel: Any) -> None:
    """Lets waitress run one request, and answer its errors. Whatever waitress throws itself, the thread goes on:
    without its writers the service would be dead, and look alive.
    """
    try:
        channel.service()
    except Exception:
        with contextlib.suppress(Exception):  # there may be no memory left to say so
            log.exception("waitress failed")


class ProblemTask(ErrorTask):
    """What waitress itself refuses, said as a problem like everything else."""

    details: ClassVar = {
        400: "The request is not well-formed HTTP/1.1.",
        413: "The body is far larger than what is taken here.",
        431: f"The headers are larger than {MAX_HEADER_BYTES} bytes.",
        501: "The only Transfer-Encoding here is chunked.",
    }

    def execute(self) -> None:
        status = self.request.error.code
        problem = Problem(status, self.details.get(status, UNKNOWN_OUTCOME))
        self.status = f"{status} {HTTPStatus(status).phrase}"
        self.response_headers.append(("Content-Type", "application/problem+json"))
        self.set_close_on_finish()
        self.content_length = len(problem.body)
        self.write(problem.body)


class Parser(HTTPRequestParser):
    """Refuses what two servers in a row could understand differently (RFC 9112, 2.6, 5.2 and 6.3)."""

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        framed_twice = self.chunked and "CONTENT_LENGTH" in self.headers
        folded = b"\r\n " in header_plus or b"\r\n\t" in header_plus
        unknown_version = self.version not in ("1.0", "1.1")
        if framed_twice or folded or unknown_version or "TRANSFER_ENCODING" in self.headers:
            raise ParsingError("ambiguous")
        # waitress forgets that a request is whole when it says 100 Continue to one without a body, or with one that
        # it refuses: the answer would never come.
        if self.body_rcv is None or self.content_length >= self.adj.max_request_body_size:
            self.expect_continue = False


class Channel(HTTPChannel):
    """A connection. What a writer answers is only queued, for the loop to send: each send() would give up the GIL,
    and wait for it again while the loop and the other writer want it too.
    """

    parser_class = Parser
    error_task_class = ProblemTask

    def _flush_some(self, do_close: bool = True) -> bool:
        return not self.server.task_dispatcher.in_writer() and super()._flush_some(do_close)


class Server:
    """waitress with a TurnDispatcher and an end: stop() lets the requests in flight finish."""

    def __init__(self, app: falcon.App, store: Store, settings: Settings):
        self._map: dict[int, Any] = {}
        self._dispatcher = TurnDispatcher(settings.threads)
        store.gather = self._dispatcher.gather
        where = {"listen": settings.listen}
        if settings.listen.startswith("unix:"):
            # Who may come in is a matter of tokens; the proxy in front mostly runs as another user.
            where = {"unix_socket": settings.listen.removeprefix("unix:"), "unix_socket_perms": "666"}
        # waitress counts the framing of chunks, and refuses what is exactly as large; the app is exact.
        far_too_large = 2 * settings.max_body + 65_536
        create_server(
            app,
            map=self._map,
            _dispatcher=self._dispatcher,
            connection_limit=connection_limit(),
            asyncore_use_poll=True,  # select() ends at descriptor 1024
            max_request_header_size=MAX_HEADER_BYTES,
            max_request_body_size=far_too_large,
            inbuf_overflow=far_too_large,  # no temporary file for a body
            ident="Inlet",
            url_prefix=settings.prefix,
            **where,
        )
        self._listeners = [d for d in self._map.values() if isinstance(d, BaseWSGIServer)]
        for listener in self._listeners:
            listener.channel_class = Channel
            listener.pull_trigger = self._dispatcher.answered
        self._wake = self._listeners[0].trigger.pull_trigger
        self._dispatcher.wake_loop = self._wake
        self._stopping = False

    @property
    def url(self) -> str:
        """Where the server can be reached; empty for a Unix socket."""
        listener = self._listeners[0]
        if listener.effective_host == "unix":
            return ""
        host = f"[{listener.effective_host}]" if ":" in listener.effective_host else listener.effective_host
        return f"http://{host}:{listener.effective_port}"

    def stop(self) -> None:
        """Ends run() when the requests in flight have their answers. May be called in a signal handler."""
        self._stopping = True
        self._wake()

    def run(self) -> None:
        """Serves until stop() is called."""
        # A writer's stack holds a whole group: about 20 frames for each request, and its JSON on top.
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 40 * LARGEST_GROUP + 2 * MAX_DEPTH))
        while not self._stopping:
            self._turn(1.0)
        for listener in self._listeners:
            listener.del_channel()
            listener.socket.close()
        deadline = time.monotonic() + DRAIN_S
        while self._busy_channels() and time.monotonic() < deadline:
            self._turn(0.1)

    def _turn(self, timeout_s: float) -> None:
        poll2(timeout_s, self._map)
        self._dispatcher.end_turn()

    def _busy_channels(self) -> list[Any]:
        """The connections that still have something to come; the others are told to close."""
        channels = [channel for listener in self._listeners for channel in listener.active_channels.values()]
        for channel in channels:
            if not channel.requests and not channel.request:
                channel.close_when_flushed = True
        return [channel for channel in channels if channel.requests or channel.request or channel.total_outbufs_len]


def connection_limit() -> int:
    """How many connections this process can hold, having asked for all that the system allows it."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, soft - 64))


# ---------------------------------------------------------------------------------------------------------
# migrate and backup
# ---------------------------------------------------------------------------------------------------------

COPY_ROWS = 10_000  # in one statement of a migration
SHOWN_IDS = 20

Progress = Callable[[str, int, int], None]  # what, how much is done, of how much


class BrokenRules(Exception):
    """Old messages break a new rule. The text names the rules and the ids, a line for each rule."""


def migrate(path: Path, schema: Schema, progress: Progress) -> list[str]:
    """Gives a database the tables of schema.sql, in one transaction, and returns what was changed.

    A table that differs is made anew, and its ordinary columns are copied; what is generated computes itself.
    Ids stay as they are, and used ones stay used. Raises BrokenRules or SetupError, having changed nothing.
    """
    lock = WriteLock(path)
    with contextlib.closing(lock), lock.held(), contextlib.closing(connect(path, "rw")) as db:
        db.execute("PRAGMA foreign_keys = OFF")  # they are checked at the end
        db.execute("BEGIN IMMEDIATE")
        changes = differences(db, schema)
        broken = Migration(db, schema, progress).run()
        if broken:
            db.execute("ROLLBACK")
            raise BrokenRules("\n".join(broken))
        db.execute("COMMIT")
        checkpoint(db)
        return changes


class Migration:
    """One run of migrate, inside of its transaction."""

    def __init__(self, db: sqlite3.Connection, schema: Schema, progress: Progress):
        self._db = db
        self._schema = schema
        self._progress = progress

    def run(self) -> list[str]:
        """Changes the database, and returns the rules that rows break, a line for each."""
        self._drop_empty_streams()
        rebuilt = self._tables_to_rebuild()
        self._drop_rules(rebuilt)
        broken = [line for table in rebuilt for line in self._rebuild(table)]
        if not broken:
            self._create_missing()
            for statement in self._schema.statements:
                if sql_words(statement).startswith("INSERT "):
                    self._db.execute(statement)
            broken = self._broken_references()
        return broken

    def _drop_empty_streams(self) -> None:
        for kind, name in leftovers(self._db, self._schema):
            if kind == "table":
                if self._count(name):
                    raise SetupError(
                        f"the table {name} is not in the schema and holds {self._count(name)} messages:"
                        f" put it back, or drop it by hand"
                    )
                with self._keeping_used_ids(name):
                    self._db.execute(f"DROP TABLE {quoted(name)}")

    def _tables_to_rebuild(self) -> list[str]:
        """Tables whose CREATE or whose UNIQUE indexes differ: their rows have to pass the new rules."""
        old, new = schema_objects(self._db), self._schema.objects
        both = [name for kind, name in new if kind == "table" and (kind, name) in old]
        return [name for name in both if rules_for_rows(old, name) != rules_for_rows(new, name)]

    def _drop_rules(self, rebuilt: list[str]) -> None:
        """Drops what is made again later: it stands on a table that is rebuilt, has changed, or has gone."""
        gone = leftovers(self._db, self._schema)
        tables = {name.lower() for name in rebuilt}
        for (kind, name), old in schema_objects(self._db).items():
            new = self._schema.objects.get((kind, name))
            changed = new and sql_tokens(new.sql) != sql_tokens(old.sql)
            if kind != "table" and (old.table in tables or changed or (kind, name) in gone):
                self._db.execute(f"DROP {kind} IF EXISTS {quoted(name)}")  # a view takes its triggers with it

    def _rebuild(self, table: str) -> list[str]:
        """Makes a table anew and copies its rows; returns the rules that they break.

        The rows wait in a table without any rules. (Renaming the old table would rewrite what refers to it.)
        """
        db, new, copy = self._db, self._schema.objects["table", table], f"{table} before migrate"
        if sql_words(new.sql).startswith("CREATE VIRTUAL"):
            raise SetupError(f"the virtual table {table} has changed: drop it by hand, and it is made anew")
        before = self._ordinary_columns(table)
        columns = ", ".join(quoted(column) for column in before)
        is_stream = table in self._schema.streams and "id" in before
        definitions = [quoted(column) + " INTEGER PRIMARY KEY" * (is_stream and column == "id") for column in before]
        db.execute(f"CREATE TABLE {quoted(copy)} ({', '.join(definitions)})")
        db.execute(f"INSERT INTO {quoted(copy)} ({columns}) SELECT {columns} FROM {quoted(table)}")
        with self._keeping_used_ids(table):
            db.execute(f"DROP TABLE {quoted(table)}")
            db.execute(new.sql)
        for (kind, _), index in self._schema.objects.items():
            if kind == "index" and index.table == new.table and sql_words(index.sql).startswith("CREATE UNIQUE"):
                db.execute(index.sql)
        self._refuse_to_forget(table, copy)
        kept = ", ".join(quoted(column) for column in self._ordinary_columns(table) if column in before)
        insert = f"INSERT INTO {quoted(table)} ({kept}) SELECT {kept} FROM {quoted(copy)}"
        broken = self._copy_messages(table, copy, insert) if is_stream else self._copy_lookup(table, insert)
        db.execute(f"DROP TABLE {quoted(copy)}")
        return broken

    @contextlib.contextmanager
    def _keeping_used_ids(self, table: str) -> Iterator[None]:
        """Keeps what AUTOINCREMENT knows of a table that is dropped: https://www.sqlite.org/autoinc.html"""
        used = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
        yield
        if used:
            self._db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, used[0]))

    def _refuse_to_forget(self, table: str, copy: str) -> None:
        """Stops a migration that would drop what stands in an ordinary column: nothing can compute it again."""
        for column in set(self._ordinary_columns(copy)) - set(self._ordinary_columns(table)):
            if self._db.execute(f"SELECT 1 FROM {quoted(copy)} WHERE {quoted(column)} IS NOT NULL").fetchone():
                raise SetupError(f"table {table}: the column {column} holds data, and is not in the schema")

    def _copy_messages(self, table: str, copy: str, insert: str) -> list[str]:
        """Copies by ranges of ids; a range with a row that breaks a rule goes row by row, to name it."""
        broken: dict[str, list[int]] = {}
        total, done, last = self._count(copy), 0, -(2**63)
        ids_after = f"SELECT id FROM {quoted(copy)} WHERE id > ? ORDER BY id LIMIT {COPY_ROWS}"
        while ids := [row[0] for row in self._db.execute(ids_after, (last,))]:
            try:
                self._db.execute(f"{insert} WHERE id > ? AND id <= ? ORDER BY id", (last, ids[-1]))
            except sqlite3.Error as error:
                self._require_transaction(error)
                for message_id in ids:
                    try:
                        self._db.execute(f"{insert} WHERE id = ?", (message_id,))
                    except sqlite3.Error as row_error:
                        self._require_transaction(row_error)
                        rule = self._schema.sentences.get(str(row_error), str(row_error))
                        broken.setdefault(rule, []).append(message_id)
            last, done = ids[-1], done + len(ids)
            self._progress(table, done, total)
        return [broken_rule(table, rule, ids) for rule, ids in broken.items()]

    def _copy_lookup(self, table: str, insert: str) -> list[str]:
        try:
            self._db.execute(insert)
        except sqlite3.Error as error:
            self._require_transaction(error)
            return [f"{table}: {self._schema.sentences.get(str(error), str(error))}"]
        return []

    def _require_transaction(self, error: sqlite3.Error) -> None:
        """Lets only those errors pass that leave the transaction as it is: a rule, and not the disk."""
        if not self._db.in_transaction or error.sqlite_errorname in ("SQLITE_FULL", "SQLITE_NOMEM"):
            raise error

    def _create_missing(self) -> None:
        for key, new in self._schema.objects.items():
            if key not in schema_objects(self._db):  # looked up each time: FTS5 makes tables with its own
                self._db.execute(new.sql)

    def _broken_references(self) -> list[str]:
        broken: dict[tuple[str, str], list[int]] = {}
        for kind, name in self._schema.objects:
            if kind == "table":
                for table, rowid, parent, _ in self._db.execute(f"PRAGMA foreign_key_check({quoted(name)})"):
                    broken.setdefault((table, parent), []).append(rowid)
        return [broken_rule(t, f"FOREIGN KEY to {parent}", ids) for (t, parent), ids in broken.items()]

    def _ordinary_columns(self, table: str) -> list[str]:
        """The columns that hold something of their own, in lower case, in which SQLite does not tell names apart."""
        return [row[1].lower() for row in self._db.execute(f"PRAGMA table_xinfo({quoted(table)})") if row[6] == 0]

    def _count(self, table: str) -> int:
        return self._db.execute(f"SELECT count(*) FROM {quoted(table)}").fetchone()[0]


def rules_for_rows(objects: dict[tuple[str, str], SchemaObject], table: str) -> tuple:
    """What decides whether a table can hold a row: its CREATE and its UNIQUE indexes, as tokens."""
    mine = [o.sql for (kind, _), o in objects.items() if kind == "index" and o.table == table.lower()]
    unique = sorted(sql_tokens(sql) for sql in mine if sql_words(sql).startswith("CREATE UNIQUE"))
    return sql_tokens(objects["table", table].sql), unique


def broken_rule(table: str, rule: str, ids: list[int]) -> str:
    """A line that says which messages break a rule."""
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return f"{table}: {len(ids)} broke {rule!r}: ids {', '.join(map(str, ids[:SHOWN_IDS]))}{more}"


def backup(path: Path, target: Path, progress: Progress) -> None:
    """Copies the database as it is at one moment, while others write to it.

    target comes into being, or is replaced, only when the copy is whole and on disk.
    """
    in_use = [path, *path.parent.glob(f"{glob.escape(path.name)}-*")]
    if Path(f"{target}-wal").exists() or (target.exists() and any(target.samefile(file) for file in in_use)):
        raise SetupError(f"{target} is in use")
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with contextlib.closing(connect(path, "ro")) as source, contextlib.closing(sqlite3.connect(partial)) as copy:
            source.execute("BEGIN")  # one snapshot for all steps: else they would start again at every write
            source.execute("SELECT 1 FROM sqlite_schema").fetchall()
            source.backup(
                copy, pages=1000, sleep=0, progress=lambda _, left, all_: progress("pages", all_ - left, all_)
            )
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
        sync_directory(target.absolute().parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors that are one clear line."""

    def error(self, message: str) -> None:
        self.exit(2, f"inlet: {message} (--help tells more)\n")


def parser() -> argparse.ArgumentParser:
    """The command line; its --help is the reference."""
    settings = argparse.ArgumentParser(add_help=False)
    for flag, metavar, text in (
        ("--listen", "HOST:PORT", "or unix:PATH; INLET_LISTEN, 127.0.0.1:8080"),
        ("--database", "PATH", "the SQLite file; INLET_DATABASE, inlet.db"),
        ("--schema", "PATH", "the streams; INLET_SCHEMA, schema.sql beside service.py"),
        ("--threads", "N", "threads that read (two more write); INLET_THREADS, 8"),
        ("--max-body", "BYTES", "largest body, compressed or not; INLET_MAX_BODY, 1048576"),
        ("--prefix", "PATH", "the path that a proxy has it under, such as /ingest; INLET_PREFIX, none"),
    ):
        settings.add_argument(flag, metavar=metavar, help=text, default=argparse.SUPPRESS)
    top = OneLineParser(
        prog="service.py",
        description="Takes in JSON messages over HTTP and files each one as a row in SQLite. "
        "Without a command it serves. A flag counts more than the environment variable named beside it.",
        epilog="Exit status: 0 done, 1 not done (the line on stderr says why), 2 cannot be done like this.",
        parents=[settings],
    )
    top.add_argument("--version", action="version", version=f"Inlet {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=OneLineParser)

    def command(within: Any, name: str, text: str) -> argparse.ArgumentParser:
        return within.add_parser(name, help=text, description=text, parents=[settings])

    client = command(commands, "client", "keep the clients: who may come in")
    actions = client.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=OneLineParser)
    add = command(actions, "add", "add a client and print its token, once, alone on stdout")
    add.add_argument("name", metavar="NAME")
    add.add_argument(
        "--can",
        nargs="+",
        metavar="GRANT",
        default=["write", "read"],
        help="write, read, write:STREAM or read:STREAM; default: write read",
    )
    command(actions, "list", "print the clients and what they can do")
    command(actions, "remove", "remove a client; its token stops working within seconds").add_argument(
        "name", metavar="NAME"
    )
    command(
        commands,
        "migrate",
        "rebuild what schema.sql has changed; if old messages break a new rule, say which, and change nothing",
    )
    command(commands, "backup", "write a consistent copy of the database, online").add_argument(
        "path", metavar="PATH", type=Path
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = vars(parser().parse_args(arguments))
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    flags = {name: options[name] for name in Settings.__dataclass_fields__ if name in options}
    try:
        settings = settings_from(settings_in_environment() | flags)
        run = {None: serve, "client": keep_clients, "migrate": run_migrate, "backup": run_backup}
        return run[options["command"]](settings, options)
    except SetupError as error:
        print(f"inlet: {error}", file=sys.stderr)
        return 2
    except BrokenRules as error:
        print(f"inlet: nothing was changed, because old messages break new rules:\n{error}", file=sys.stderr)
        return 1
    except (sqlite3.Error, OSError) as error:
        print(f"inlet: {settings.database}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def serve(settings: Settings, options: dict[str, Any]) -> int:
    store = open_store(settings)
    try:
        server = Server(create_app(store, settings.max_body), store, settings)
    except (OSError, ValueError) as error:
        raise SetupError(f"cannot listen on {settings.listen}: {error}") from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    print(f"Inlet {__version__} is listening on {server.url or settings.listen}", flush=True)
    if not store.clients():
        print(first_client(store, settings, server.url), flush=True)
    server.run()
    for number in (signal.SIGTERM, signal.SIGINT):  # a second one must not end the interpreter while it ends
        signal.signal(number, signal.SIG_IGN)
    store.close()
    return 0


def first_client(store: Store, settings: Settings, url: str) -> str:
    """Makes the client `default`; returns a text with its token and a command that sends a message."""
    token = new_token()
    store.add_client("default", digest_of(token), "write read")
    stream = next(iter(store.schema.streams))
    socket = f"--unix-socket {settings.listen.removeprefix('unix:')} "
    to = f"{'' if url else socket}{url or 'http://localhost'}{settings.prefix}/{stream}"
    return f"""
This is the first start: the client "default" was made, and may write and read. Its token, shown only now:

{token}

Send a message:

curl -i {to} -H "Authorization: Bearer {token}" -H "Content-Type: application/json" -d '{{"hello": "world"}}'
"""


def keep_clients(settings: Settings, options: dict[str, Any]) -> int:
    store = open_store(settings)
    with contextlib.closing(store):
        if options["action"] == "list":
            for name, _, can in store.clients():
                print(f"{name}\t{can}")
            return 0
        name = options["name"]
        if options["action"] == "remove":
            if not store.remove_client(name):
                raise SetupError(f"there is no client {name}")
            return 0
        if not re.fullmatch(r"\w[\w.@-]{0,63}", name):
            raise SetupError("NAME takes up to 64 letters, digits, '.', '_', '-' and '@'")
        for grant in options["can"]:
            action, _, stream = grant.partition(":")
            if action not in ("write", "read") or (":" in grant and stream not in store.schema.streams):
                raise SetupError(f"{grant} is no grant: they are write, read, write:STREAM and read:STREAM")
        token = new_token()
        if not store.add_client(name, digest_of(token), " ".join(options["can"])):
            raise SetupError(f"there is a client {name} already; remove it first")
        print(token)
        return 0


def run_migrate(settings: Settings, options: dict[str, Any]) -> int:
    schema = read_schema(settings.schema)
    if not settings.database.exists():
        raise SetupError(f"there is no database {settings.database}")
    for change in migrate(settings.database, schema, show_progress) or ["no table had changed"]:
        print(change)
    return 0


def run_backup(settings: Settings, options: dict[str, Any]) -> int:
    if not settings.database.exists():
        raise SetupError(f"there is no database {settings.database}")
    backup(settings.database, options["path"], show_progress)
    return 0


def show_progress(what: str, done: int, total: int) -> None:
    """A line that counts, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done:,} of {total:,}", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
