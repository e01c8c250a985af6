#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["falcon==4.4.0", "waitress==3.0.2"]
# ///
"""Inlet takes in JSON messages over HTTP and files each one as a row in SQLite.

Run it:    python service.py               (every flag: python service.py --help)
Embed it:  any WSGI server with threads, as service:application

THE SCHEMA IS THE API.  schema.sql is the only file that an owner edits. A table in it with the five message
columns (id, received_at, client, key, body) is a stream. The body is the message; every other column is
generated from it. Constraints are the validation, triggers are the business logic.

ROUTES
    POST /{stream}       take one message (application/json), or many, all or none (application/x-ndjson)
    GET  /{stream}       the feed: messages in commit order, ?after=ID&limit=N&FIELD=VALUE
    GET  /{stream}/{id}  one message
    GET  /{view}         the same for a view with the message columns; {"rows": […]} for any other view
    GET  /               the streams and views that this client may use, and the version; for a browser, page.html
    GET  /healthz        can a message be written now?  (needs no token)
    GET  /metrics        how it is doing, for Prometheus

GUARANTEES
 1. 201 is sent after the COMMIT that holds the message has been synced to disk (WAL, synchronous=FULL).
 2. The body is kept byte for byte. Nothing parses and re-writes it.
 3. One Idempotency-Key of one client names at most one message. A UNIQUE index decides, so a retry gets the
    first answer again, whatever threads, processes and crashes came between.
 4. 4xx: nothing was stored; do not retry unchanged. 5xx or no answer: outcome unknown; retry with the key.
 5. Ids grow in commit order and are never used again: who follows the feed's `next` misses no message.

LIMITS
 Linux or macOS; one SQLite file on a local disk (a network file system breaks guarantee 1), or an rqlite cluster:
 cluster/README.md.
 A body has at most --max-body bytes, as it is sent and as it is unpacked. A message is nested at most 512 deep.
 A batch has at most 10,000 messages. On the open Internet, put a web server in front: it is better with slow clients.

TO CHANGE                                     SEE
 a route, or what it answers                  the app, resources
 a flag                                       settings
 what makes a table a stream                  the schema
 what a client reads when a rule refuses it   REFUSALS in the store
 how messages reach the disk, or a cluster    the store, the engine; cluster/rqlite.py
 who may come in                              clients
 what the log and /metrics say                statistics
 what a POST may contain                      reading requests
 how many POSTs share a COMMIT                the server
 how HTTP is read and written                 in place of waitress
"""

import argparse
import base64
import binascii
import bisect
import contextlib
import errno
import fcntl
import hashlib
import hmac
import io
import json
import logging
import math
import os
import platform
import re
import resource
import secrets
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from email.utils import formatdate
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from itertools import accumulate
from json.encoder import encode_basestring as json_string
from pathlib import Path
from queue import Empty, SimpleQueue
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import IO, Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlencode

import falcon
from waitress.server import BaseWSGIServer, create_server

__version__ = "1.1.0"

log = logging.getLogger("inlet")


# ==================== The app: which resource answers which path ====================================


def create_app(store: "Store", clients: "Clients", max_body: int, cors: str = "") -> falcon.App:
    """Return the WSGI app that serves a store to its clients; cors: origins whose pages may use it, with commas."""
    shown = ["Location", "Link", "Idempotent-Replayed", "Retry-After"]
    middleware = [falcon.CORSMiddleware(cors.split(","), expose_headers=shown)] if cors else []
    with contextlib.suppress(OSError):  # without the file, / is JSON for everybody
        middleware.append(Page(Path(__file__).with_name("page.html").read_bytes()))
    app = falcon.App(middleware=[*middleware, clients])
    app.add_route("/", RootResource(store))
    app.add_route("/healthz", HealthResource(store, clients))
    app.add_route("/metrics", MetricsResource(store))
    for stream in store.schema.streams.values():
        resource = StreamResource(store, stream, clients, max_body) if stream.takes else ViewResource(store, stream)
        app.add_route(f"/{stream.name}", resource)
        if stream.has_ids:
            app.add_route(f"/{stream.name}/{{message_id:int(min=1, max={MAX_ID})}}", resource, suffix="message")
    app.add_error_handler((Exception, falcon.HTTPError), answer_error)
    return app


def answer_error(req: falcon.Request, resp: falcon.Response, error: Exception, params: dict) -> None:
    """Answer whatever a request raised: a refusal of ours, one of Falcon's, a read that failed, or a bug."""
    match error:
        case Problem():
            problem = error
        case falcon.HTTPNotFound():
            problem = Problem(404, "There is nothing at this path.")
        case falcon.HTTPError():  # Falcon says 400 to methods that it does not know; RFC 9110, 15.6.2 says 501
            status = 405 if isinstance(error, falcon.HTTPMethodNotAllowed) else 501
            problem = Problem(status, "This path does not take this method.", error.headers)
        case sqlite3.Error() | TimeoutError():
            log.error("the database cannot be read: %s: %s", type(error).__name__, error)
            problem = Problem(503, "The database cannot be read at the moment. Try again.")
        case _:
            log.error("unexpected error at %s %r", req.method, req.path, exc_info=error)
            problem = Problem(500, f"An unexpected error. {UNKNOWN_OUTCOME}")
    req.context.detail = problem.detail
    resp.status, headers, resp.data = problem.answer()
    resp.set_headers(headers)


class LazyApplication:
    """The app for other servers, made by the first request in a process.

    So importing this module touches no disk. A server that forks after the import (gunicorn --preload, uWSGI) shares no
    connection between processes: SQLite forbids that.
    """

    def __init__(self) -> None:
        self._apps: dict[int, falcon.App] = {}  # by process id: a forked child makes one of its own
        self._lock = threading.Lock()
        self._failed_at, self._failure = 0.0, Exception()
        # No fork while the app is made: the child would inherit locks of SQLite that no thread of it releases.
        unlock = self._lock.release
        os.register_at_fork(before=self._lock.acquire, after_in_parent=unlock, after_in_child=unlock)

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        try:
            app = self._apps.get(os.getpid()) or self._make_once(environ)
        except SetupError as error:
            log.critical("%s", error)
            status, headers, content = Problem(503, "The service is not set up; its log says why.").answer()
            start_response(status, headers)
            return [content]
        return app(environ, start_response)

    def _make_once(self, environ: dict[str, Any]) -> falcon.App:
        process, arrived_at = os.getpid(), time.monotonic()
        with self._lock:
            if arrived_at < self._failed_at:  # what has failed meanwhile would take as long again
                raise self._failure
            try:
                self._apps[process] = self._apps.get(process) or self._make(environ)
            except SetupError as error:
                self._failed_at, self._failure = time.monotonic(), error
                raise
            return self._apps[process]

    def _make(self, environ: dict[str, Any]) -> falcon.App:
        if "uwsgi.version" in environ:
            import uwsgi  # only there inside of uWSGI

            if not {"enable-threads", "threads"} & {os.fsdecode(name) for name in uwsgi.opt}:
                raise SetupError("uWSGI runs no threads of Python: set enable-threads = true")
        settings = settings_from({})
        store = Store(database_at(settings.database), read_schema(settings.schema))
        store.open()
        return create_app(store, Clients(store, settings.cors), settings.max_body, settings.cors)


application = LazyApplication()


# ==================== Settings ======================================================================


class SetupError(Exception):
    """The service cannot run like this. The text is one line that says what to change."""


def setting(flag: str, default: Any, pattern: str, takes: str) -> Any:
    """Return a field of Settings. pattern: a regular expression of valid values; takes: the text for --help."""
    return field(default=default, metadata={"flag": flag, "pattern": pattern, "takes": takes})


UP_TO_65535 = r"[0-5]?\d{1,4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5]"


@dataclass(frozen=True)
class Settings:
    """What an owner can set: by a flag, else by the environment variable INLET_<NAME>, else the default."""

    listen: str = setting(
        "--listen", "127.0.0.1:8080", rf"unix:.+|.+:({UP_TO_65535})", "HOST:PORT, [IPV6]:PORT or unix:PATH"
    )
    database: str = setting(
        "--database", "inlet.db", ".+", "the path of the SQLite file, or http://HOST:PORT,… of rqlite"
    )
    schema: Path = setting("--schema", Path(__file__).with_name("schema.sql"), ".+", "the path of the streams' file")
    threads: int = setting("--threads", 8, r"[1-9]\d{0,2}", "the number of threads that read, 1 to 999")
    max_body: int = setting(
        "--max-body", 1_048_576, r"[1-9]\d{0,8}", "the bytes of the largest body, compressed or not"
    )
    cors: str = setting(
        "--cors",
        "",
        r"https?://[^\s,/]+(,https?://[^\s,/]+)*",
        "origins whose pages may use it, with commas: https://a.example,https://b.example",
    )
    prefix: str = setting("--prefix", "", r"(/[\w.~-]+)+", "the path that a proxy has it under, such as /ingest")


def settings_from(flags: dict[str, Any]) -> Settings:
    """Return the settings that flags and environment give; SetupError names a value that makes no sense."""
    values = {}
    for each in fields(Settings):
        variable = f"INLET_{each.name.upper()}"
        text = flags.get(each.name)
        text = os.environ.get(variable, "").strip() or None if text is None else text
        if text is not None:
            if not re.fullmatch(each.metadata["pattern"], text, re.ASCII):
                raise SetupError(f"{each.metadata['flag']} ({variable}) takes {each.metadata['takes']}, not {text!r}")
            values[each.name] = type(each.default)(text)
    return Settings(**values)


# ==================== Problems: every refusal, as RFC 9457 has it ===================================

Answer = tuple[str, list[tuple[str, str]], bytes]  # status line, headers and content, as WSGI has them
RETRY_AFTER_S = 2
UNKNOWN_OUTCOME = "Try again with the same Idempotency-Key: whether the message was stored is not known."


class Problem(Exception):
    """An answer other than success.

    status is the HTTP status, detail a sentence that a person can act on. members stand beside them in the JSON,
    and headers go with the answer. Nothing in it may hold a token, a body or SQL.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None, **members: Any):
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers = dict(headers or {})
        if status in (500, 503, 507):  # the next try may succeed
            self.headers["Retry-After"] = str(RETRY_AFTER_S)
        self._members = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail, **members}

    def answer(self) -> Answer:
        headers = [("Content-Type", "application/problem+json"), *self.headers.items()]
        return f"{self.status} {self._members['title']}", headers, json.dumps(self._members).encode()


def storage_problem(error: Exception) -> Problem:
    """Return what a client is told when the database fails. https://www.sqlite.org/rescode.html"""
    name = getattr(error, "sqlite_errorname", "")
    status, cause = 503, "The database cannot be used at the moment."
    if name == "SQLITE_FULL":
        status, cause = 507, "The disk is full."
    elif name.startswith("SQLITE_BUSY") or isinstance(error, TimeoutError):
        cause = "Another program is writing to the database."
    return Problem(status, f"{cause} {UNKNOWN_OUTCOME}")


# ==================== The schema, read into streams =================================================

OLDEST_SQLITE = (3, 38, 0)  # the first with ->> built in
RESERVED_NAMES = ("clients", "healthz", "metrics")
MESSAGE_COLUMNS = {
    "id": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "received_at": "TEXT NOT NULL",
    "client": "TEXT NOT NULL",
    "key": "TEXT",
    "body": "TEXT NOT NULL",
}
# SQL that would undo more than one message: the kind of object that has it, a pattern, why it is refused.
UNSAFE_RULES = (
    ("trigger", r"raise \( (?:rollback|fail|ignore)\b", "only RAISE(ABORT, 'sentence') refuses just one message"),
    ("trigger", r"(?:insert|update) or (?:rollback|fail)\b", "OR ROLLBACK and OR FAIL undo more than one message"),
    ("table", r"initially deferred\b", "a deferred foreign key cannot refuse one message; leave DEFERRED out"),
    ("table", r"on conflict\b", "ON CONFLICT in a table could drop a message behind its 201; leave it out"),
)
# Group 1 is a token. White space and comments match too, but leave it empty.
SQL_TOKEN = re.compile(
    r"""\s+|--[^\n]*|/\*.*?(?:\*/|\Z)|('(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]|[\w$\x80-\U0010ffff]+|.)""",
    re.DOTALL,
)


def fold(name: str) -> str:
    """Return a name as SQLite compares it: only ASCII letters lose their case."""
    return name.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")


def quoted(name: str) -> str:
    """Return a name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def normal(sql: str) -> list[str]:
    """Return the tokens of a piece of SQL, without comments, white space, and case outside of quotes."""
    return [token if token[0] in "'\"`[" else fold(token) for token in SQL_TOKEN.findall(sql) if token]


def plain(sql: str) -> str:
    """Return a piece of SQL with one space between its tokens."""
    return " ".join(normal(sql))


def columns_of(db: sqlite3.Connection, table: str) -> dict[str, dict[str, Any]]:
    """Return the rows of https://www.sqlite.org/pragma.html#pragma_table_xinfo by the folded names of the columns.

    Their `hidden` is over 1 if the column is generated.
    """
    names = ("cid", "name", "type", "notnull", "dflt_value", "pk", "hidden")
    rows = db.execute(f"PRAGMA main.table_xinfo({quoted(table)})")
    return {fold(row[1]): dict(zip(names, row, strict=True)) for row in rows}


class SchemaObject(NamedTuple):
    """A table, index, trigger or view: its type, its name, the table that it belongs to (folded), its CREATE."""

    kind: str
    name: str
    table: str
    sql: str

    @property
    def unique(self) -> bool:
        return normal(self.sql)[1] == "unique"

    def same_as(self, other: "SchemaObject") -> bool:
        return normal(self.sql) == normal(other.sql)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


Objects = dict[tuple[str, str], SchemaObject]  # by type and folded name


def schema_objects(db: sqlite3.Connection) -> Objects:
    """Return every CREATE in a database, in the order of creation."""
    rows = db.execute(
        "SELECT s.type, s.name, s.tbl_name, s.sql FROM sqlite_schema AS s"
        " WHERE s.sql IS NOT NULL AND substr(s.name, 1, 7) <> 'sqlite_' ORDER BY s.rowid"
    )
    return {(kind, fold(name)): SchemaObject(kind, name, fold(table), sql) for kind, name, table, sql in rows}


@dataclass(frozen=True)
class Stream:
    """What has a route: a table that takes messages, or a view.

    fields: the columns to filter by, True for those with a type (not ANY or BLOB). A view without ids is a report.
    """

    name: str
    fields: dict[str, bool]
    takes: bool = True
    has_ids: bool = True
    has_headers: bool = False

    @cached_property
    def insert(self) -> str:
        """The SQL that inserts a message: received_at, client, key, body, and headers if the table has them."""
        more, value = (", headers", ", ?") if self.has_headers else ("", "")
        return f'INSERT INTO "{self.name}" (received_at, client, key, body{more}) VALUES (?, ?, ?, ?{value})'

    @cached_property
    def selected(self) -> list[str]:
        """The SQL of what a page selects from it, as t. A view can have anything in its columns."""
        if self.takes:
            columns = [f"t.{name}" for name in ("id", "received_at", "client", "key")]
            return [*columns, "CAST(t.body AS BLOB)", *["t.headers"] * self.has_headers]
        if not self.has_ids:
            return [f"t.{quoted(name)}" for name in self.fields]
        texts = [f"CAST(ifnull(t.{name}, '') AS TEXT)" for name in ("received_at", "client")]
        casts = [f"CAST(t.{name} AS TEXT)" for name in (("body", "headers") if self.has_headers else ("body",))]
        jsons = [f"iif(json_valid({cast}), {cast}, json_quote({cast}))" for cast in casts]
        return ["CAST(t.id AS INTEGER)", *texts, "CAST(t.key AS TEXT)", *jsons]

    @property
    def explain(self) -> tuple[str, tuple]:
        """The SQL that compiles the insert, with its triggers and foreign keys, and values for it."""
        return f"EXPLAIN {self.insert}", (None,) * (4 + self.has_headers)


@dataclass(frozen=True)
class Schema:
    """All that schema.sql says."""

    streams: dict[str, Stream]
    statements: list[str]  # in the order of the file
    objects: Objects
    sentences: dict[str, str]  # what SQLite says of a broken rule (folded): what its owner says


def read_schema(path: Path) -> Schema:
    """Return what schema.sql says, tried out in an empty database; SetupError names what is wrong with it."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        raise SetupError(f"SQLite {sqlite3.sqlite_version} is too old: Inlet needs {oldest} or newer")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} cannot be read: {error}") from None
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.execute("PRAGMA foreign_keys = ON")
        try:
            statements = run_script(db, text)
            objects = schema_objects(db)
            for made in objects.values():
                refuse_unsafe_rules(made)
            # Is a table STRICT? Only ordinary tables count, not virtual tables and their shadow tables.
            strict = {fold(row[1]): row[5] for row in db.execute("PRAGMA main.table_list") if row[2] == "table"}
            tables = [made for (kind, name), made in objects.items() if kind == "table" and name in strict]
            streams = [stream for table in tables if (stream := stream_from(db, table, strict[fold(table.name)]))]
            views = [view for made in objects.values() if made.kind == "view" and (view := view_from(db, made))]
        except SetupError as error:
            raise SetupError(f"{path}: {error}") from None
        if not streams:
            raise SetupError(f"{path}: no table has the columns of a stream ({', '.join(MESSAGE_COLUMNS)})")
        sentences = dict(pair for table in tables for pair in sentences_of(db, table))
    return Schema({stream.name: stream for stream in streams + views}, statements, objects, sentences)


def run_script(db: sqlite3.Connection, text: str) -> list[str]:
    """Run schema.sql in an empty database and return its statements; SetupError names the line that fails."""
    statements, line, pending = [], 1, ""
    for piece in re.split(r"(?<=;)", text):
        pending += piece
        first = next((token for token in SQL_TOKEN.finditer(pending) if token[1]), None)
        if not first or (piece.endswith(";") and not sqlite3.complete_statement(pending)):
            continue
        where = f"line {line + pending.count(chr(10), 0, first.start())}"
        words = normal(pending)
        if words[0] not in ("create", "insert"):
            raise SetupError(f"{where}: only CREATE and INSERT may stand here")
        try:
            db.execute(pending)
        except sqlite3.Error as error:
            raise SetupError(f"{where}: {error}") from None
        if db.execute("SELECT 1 FROM sqlite_temp_schema").fetchone():
            raise SetupError(f"{where}: only CREATE (not TEMP) and INSERT may stand here")
        if words[0] == "insert" and not adds_nothing(db, pending):
            raise SetupError(f"{where}: each migrate runs this again: use INSERT OR IGNORE and a key")
        statements.append(pending)
        line, pending = line + pending.count("\n"), ""
    return statements


def adds_nothing(db: sqlite3.Connection, insert: str) -> bool:
    """Does an INSERT that has been run add nothing when it is run again?"""
    changes = db.total_changes
    with contextlib.suppress(sqlite3.Error):
        db.execute(insert).fetchall()
        return db.total_changes == changes
    return False


def refuse_unsafe_rules(made: SchemaObject) -> None:
    """Raise SetupError for what cannot be kept to one message, and for what belongs to the service."""
    if fold(made.name) == "clients":
        raise SetupError(f"{made} belongs to the service, which makes it: take it out of this file")
    words = " ".join(token for token in normal(made.sql) if token[0] not in "'\"`[")
    for kind, pattern, reason in UNSAFE_RULES:
        if made.kind == kind and re.search(rf"\b{pattern}", words):
            raise SetupError(f"{made}: {reason}")


def stream_from(db: sqlite3.Connection, table: SchemaObject, strict: int) -> Stream | None:
    """Return the stream that a table is, or None; SetupError says what an almost-stream lacks."""
    name, columns = table.name, columns_of(db, table.name)
    if len(columns.keys() & MESSAGE_COLUMNS.keys()) < 3:
        return None
    almost = f"table {name} is almost a stream"
    for wanted, definition in MESSAGE_COLUMNS.items():
        column = columns.get(wanted)
        if not column:
            raise SetupError(f"{almost}: it lacks the column {wanted} {definition}")
        has = f"{column['type']} PRIMARY KEY" if column["pk"] else column["type"] + " NOT NULL" * column["notnull"]
        if column["pk"] and "autoincrement" in normal(table.sql):
            has += " AUTOINCREMENT"
        if column["hidden"] or has.upper() != definition:
            raise SetupError(f"{almost}: its column {wanted} must be {definition}")
    headers = columns.pop("headers", None)
    if headers and (headers["type"].upper() != "TEXT" or headers["hidden"]):
        raise SetupError(f"table {name}: its column headers must be headers TEXT")
    if not strict:
        raise SetupError(f"{almost}: it must end with STRICT, as in CREATE TABLE {name} (…) STRICT")
    require_route(table, columns, ["after", "limit"])
    for folded, column in columns.items():
        unfilled = column["notnull"] and column["dflt_value"] is None and not column["hidden"]
        if unfilled and folded not in MESSAGE_COLUMNS:
            raise SetupError(f"table {name}: nothing can fill the column {folded}; generate it from the body")
    fields = fields_of(column for column in columns.values() if column["hidden"] > 1)
    stream = Stream(name, fields, has_headers=bool(headers))
    one_row_a_key = "ON CONFLICT (client COLLATE BINARY, key COLLATE BINARY) WHERE key IS NOT NULL DO NOTHING"
    try:
        compiled, values = stream.explain
        db.execute(compiled, values)
        db.execute(f"{compiled} {one_row_a_key}", values)
    except sqlite3.Error as error:
        if not str(error).startswith("ON CONFLICT clause does not match"):
            raise SetupError(f"table {name} can take no message: {error}") from None
        index = f"CREATE UNIQUE INDEX {name}_key ON {name} (client, key) WHERE key IS NOT NULL"
        raise SetupError(f"{almost}: it lacks its index, {index}") from None
    return stream


def view_from(db: sqlite3.Connection, view: SchemaObject) -> Stream | None:
    """Return what a view has to show, or None if its name begins with _; SetupError if it cannot be read."""
    try:
        db.execute(f"EXPLAIN SELECT * FROM {quoted(view.name)}")  # where no table clients is: no view can show a token
    except sqlite3.Error as error:
        raise SetupError(f"{view}: {error}") from None
    if view.name.startswith("_"):
        return None
    columns = columns_of(db, view.name)
    has_ids, has_headers = columns.keys() >= MESSAGE_COLUMNS.keys(), "headers" in columns
    require_route(view, columns, ["after", "limit"] if has_ids else ["limit"])
    shown = {*MESSAGE_COLUMNS, "headers"} if has_ids else ()
    fields = fields_of(column for name, column in columns.items() if name not in shown)
    return Stream(view.name, fields, takes=False, has_ids=has_ids, has_headers=has_ids and has_headers)


def require_route(made: SchemaObject, columns: Iterable[str], parameters: list[str]) -> None:
    """Raise SetupError if the name of a table or view cannot be a path, or a column is called like a parameter."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", made.name) or fold(made.name) in RESERVED_NAMES:
        hint = "use letters, digits, _ and -, and no name of the service's"
        raise SetupError(f"{made.kind} {made.name!r} cannot be a route: {hint}")
    for folded in set(parameters).intersection(columns):
        raise SetupError(f"{made}: GET has a parameter {folded}; name the column otherwise")


def fields_of(columns: Iterable[dict[str, Any]]) -> dict[str, bool]:
    return {column["name"]: column["type"].upper() not in ("", "ANY", "BLOB") for column in columns}


def sentences_of(db: sqlite3.Connection, table: SchemaObject) -> Iterator[tuple[str, str]]:
    """Yield (what SQLite says, what the client reads) for the named CHECKs and UNIQUE INDEXes of a table."""
    tokens = normal(table.sql)
    for before, name, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if (before, after) == ("constraint", "check"):
            sentence = name[1:-1].replace(name[0] * 2, name[0]) if name[0] in "'\"`[" else name
            yield fold(f"CHECK constraint failed: {sentence}"), sentence
    for _, index, unique, origin, _ in db.execute(f"PRAGMA index_list({quoted(table.name)})").fetchall():
        if unique and origin == "c" and " " in index:  # an index name with a space is a sentence for the client
            columns = [f"{table.name}.{row[2]}" for row in db.execute(f"PRAGMA index_info({quoted(index)})")]
            yield fold(f"UNIQUE constraint failed: {', '.join(columns)}"), index
            yield fold(f"UNIQUE constraint failed: index '{index}'"), index


def differences(db: sqlite3.Connection, schema: Schema) -> list[tuple[str, bool]]:
    """Return how a database differs from schema.sql, and True for what must not be served like this.

    An index that is not UNIQUE may differ. Comments and other people's tables do not count.
    """
    found, existing = [], schema_objects(db)
    for key, new in schema.objects.items():
        old = existing.get(key)
        serious = new.kind != "index" or new.unique or bool(old and old.unique)
        if not old:
            found.append((f"{new} is new", serious))
        elif not new.same_as(old):
            before, after = ({line.strip() for line in made.sql.splitlines()} for made in (old, new))
            changes = [f"[+ {line}]" for line in sorted(after - before)] + [
                f"[- {line}]" for line in sorted(before - after)
            ]
            found.append((" ".join([f"{new} has changed", *changes]), serious))
    return found + [(f"{old} is not in the schema", old.kind != "index" or old.unique) for old in leftovers(db, schema)]


def leftovers(db: sqlite3.Connection, schema: Schema) -> list[SchemaObject]:
    """Return what schema.sql no longer has: streams, and indexes and triggers of tables that it still has."""
    known = {name for kind, name in schema.objects if kind in ("table", "view")}
    gone = [old for key, old in schema_objects(db).items() if key not in schema.objects and old.kind != "view"]
    return [o for o in gone if (is_stream(db, o.name) if o.kind == "table" else o.table in known)]


def is_stream(db: sqlite3.Connection, table: str) -> bool:
    """Has a table of a database, or a view, the columns of a message?"""
    return columns_of(db, table).keys() >= MESSAGE_COLUMNS.keys()


# ==================== The store: commit entries, read rows ===========================================================

MAX_ID = 2**63 - 1
BUSY_TIMEOUT_S = 10.0  # from the arrival of a message to its 503
READ_TIMEOUT_S = 10.0  # for the SQL of one page
CANNOT_APPLY = "A rule of this stream cannot be applied to the message"  # such as an overflow in an expression

# What a client reads, by SQLite's name of the error. {said} are SQLite's words, {text} the same without the table's
# name, {subject} what they are about.
REFUSALS = {
    "SQLITE_CONSTRAINT_NOTNULL": (422, "{subject} is required"),
    "SQLITE_CONSTRAINT_CHECK": (422, "The message breaks a rule of this stream (CHECK)"),
    "SQLITE_CONSTRAINT_UNIQUE": (409, "Another message has the same {subject}"),
    "SQLITE_CONSTRAINT_PRIMARYKEY": (409, "Another message has the same {subject}"),
    "SQLITE_CONSTRAINT_ROWID": (409, "Another message has the same {subject}"),
    "SQLITE_CONSTRAINT_FOREIGNKEY": (422, "The message refers to something that does not exist (FOREIGN KEY)"),
    "SQLITE_CONSTRAINT_TRIGGER": (422, "{said}"),
    "SQLITE_CONSTRAINT_DATATYPE": (422, "{text}"),  # of STRICT tables: cannot store TEXT value in REAL column …
    "SQLITE_CONSTRAINT": (422, CANNOT_APPLY),  # of virtual tables
    "SQLITE_CONSTRAINT_VTAB": (422, CANNOT_APPLY),
    "SQLITE_MISMATCH": (422, CANNOT_APPLY),
    "SQLITE_ERROR": (422, CANNOT_APPLY),
    "SQLITE_TOOBIG": (422, CANNOT_APPLY),
}


def utc_now() -> str:
    """Return the time in UTC as RFC 3339, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


class Stored(NamedTuple):
    """The result of an entry that is on disk. replayed: it was there before, under the same key."""

    first_id: int
    last_id: int
    received_at: str
    count: int = 1
    replayed: bool = False


@dataclass(slots=True, eq=False)
class Entry:
    """What one request wants written: JSON texts that have been checked. Without any, it only tries to write.

    key stands for all bodies. deadline, a time.monotonic(), is when the client gets its 503.
    """

    stream: Stream | None = None
    client: str = ""
    key: str | None = None
    bodies: list[str] = field(default_factory=list)
    headers: tuple[str, ...] = ()  # the request's, as one JSON object, if the stream has a column for them
    batch: bool = False
    signed: bool = False  # then a known key gets its first answer, even with another body
    deadline: float = field(default_factory=lambda: time.monotonic() + BUSY_TIMEOUT_S)
    line: int = 1  # of the batch: the one that is being inserted
    result: Stored | Problem | None = None
    then: Callable[[], None] = lambda: None  # called when there is a result, or, without one, to say: call write()


class Store:
    """The messages. Many threads append, and one COMMIT takes what has come together.

    A thread that finds no other one writing writes everything that is queued, and commits once. The others wait for
    their own result. Then one that still waits is told to write. With 64 threads, a plain lock gave 1.8 messages a
    COMMIT, and this gives 63 (bench/threads.py). A server that has no thread for each entry calls put() and write().
    """

    def __init__(self, database: "Database", schema: Schema, clock: Callable[[], str] = utc_now):
        self.schema = schema
        self.database = database
        self.queue: list[Entry] = []  # entries that nobody writes yet
        self.statistics = Statistics([stream.name for stream in schema.streams.values() if stream.takes])
        self._clock = clock
        self._mutex = threading.Lock()  # for the queue, for what follows, and for the results of entries
        self._writing = False  # is there a thread that writes?
        # Threads that read pages at once fight for the GIL at every row: four made 110 pages a second, and 200 in turn.
        # A read with a filter can be slow, so it does not take this lock.
        self.page_turn = threading.Lock()

    def open(self, default_token: str = "") -> bool:
        """Open the database, or make it; SetupError if it cannot be used or differs from the schema.

        Returns True if it was made, together with the client `default`, if a token for it is given.
        """
        digest, database = digest_of(default_token), self.database
        try:
            with database.alone(self.schema) as db:
                if db.execute("PRAGMA encoding").fetchone() != ("UTF-8",):
                    raise SetupError(f"{database} is not in UTF-8: copy it into a new database")
                made = not schema_objects(db)
                db.execute("BEGIN IMMEDIATE")
                touch(db)  # which fails now, where each message would fail later
                if made:
                    for statement in (CLIENTS_TABLE, *self.schema.statements):
                        db.execute(statement)
                    if default_token:
                        db.execute(ADD_CLIENT, ("default", digest, "write read", utc_now(), None, None))
                else:
                    make_clients(db)
                db.execute("COMMIT")
                found = differences(db, self.schema)
                if made and default_token:  # on a cluster, another process may have been first
                    made = bool(db.execute("SELECT 1 FROM clients AS c WHERE c.token = ?", (digest,)).fetchone())
        except (sqlite3.Error, OSError) as error:
            raise SetupError(f"{database} cannot be opened: {error}") from None
        if any(is_serious for _, is_serious in found):
            told = "; ".join(text for text, _ in found)
            raise SetupError(f"{database} differs from the schema ({told}): run migrate")
        for text, _ in found:
            log.warning("%s: run migrate", text)
        return made

    def close(self) -> None:
        """Let a COMMIT that is under way end, then close."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while self._writing and time.monotonic() < deadline:
            time.sleep(0.01)
        self.database.close()

    # Writing

    def append(self, entry: Entry) -> Stored:
        """Commit the messages of an entry to disk, all or none.

        Raises Problem: 4xx when a rule of the schema refused them (nothing is stored), 5xx when the outcome is unknown.
        """
        told: SimpleQueue[None] = SimpleQueue()
        entry.then = partial(told.put, None)
        self.put(entry)
        try:
            while entry.result is None:
                self.write()
                if entry.result is None:
                    told.get(timeout=max(0.0, entry.deadline - time.monotonic()))
        except Empty:
            pass
        finally:
            self.withdraw(entry)
        if isinstance(entry.result, Problem):
            raise entry.result
        return entry.result

    def put(self, entry: Entry) -> None:
        """Queue an entry for a COMMIT. entry.then is called when it has its result, or when somebody has to write()."""
        with self._mutex:
            self.queue.append(entry)

    def withdraw(self, entry: Entry) -> None:
        """Give an entry that still waits the result that its outcome is unknown."""
        if entry.result:
            return
        with self._mutex:
            entry.result = entry.result or storage_problem(TimeoutError())
            if entry in self.queue:
                self.queue.remove(entry)
        self._tell_one()  # this one may have been told to write

    def write(self) -> None:
        """Write what is queued, if no other thread does. What has come meanwhile is left to those who wait for it."""
        with self._mutex:
            if self._writing or not self.queue:
                return
            self._writing, first = True, self.queue[0]
        try:
            while first.result is None:
                self._write_group()
        finally:
            self._writing = False
            self._tell_one()

    def _tell_one(self) -> None:
        """Tell one that waits to write, if nobody does."""
        with self._mutex:
            waiting = [] if self._writing else self.queue[:1]
        for each in waiting:
            run_safely(each.then)

    def _write_group(self) -> None:
        """Write everything that is queued, in a file with one COMMIT. If that fails, all of it fails."""
        group, results, failure, began = [], [], RuntimeError("a bug"), time.monotonic()
        with self._mutex:
            deadline = min(waiting.deadline for waiting in self.queue)
        try:
            with self.database.transaction(deadline) as db:
                with self._mutex:
                    group, self.queue = self.queue, []
                inserted = self.database.insert(db, group, self._clock())
                written = self._results(db, group, inserted)
            results = written
        except (sqlite3.Error, OSError, MemoryError) as error:
            failure = error
            if not group:  # the transaction has not begun, and entries that came later may still wait for the lock
                now = time.monotonic() if isinstance(error, TimeoutError) else float("inf")
                with self._mutex:
                    group = [entry for entry in self.queue if entry.deadline <= now]
                    self.queue = [entry for entry in self.queue if entry.deadline > now]
            if group:
                log.error("%d requests could not be written: %s: %s", len(group), type(error).__name__, error)
        finally:
            with self._mutex:
                for entry, result in zip(group, results or [storage_problem(failure) for _ in group], strict=True):
                    entry.result = result
            for entry in group:
                run_safely(entry.then)
            if results:
                new = [each for each in results if isinstance(each, Stored) and not each.replayed]
                self.statistics.committed(time.monotonic() - began, sum(each.count for each in new))

    def _results(
        self, db: sqlite3.Connection, group: list[Entry], inserted: list[Stored | Exception]
    ) -> list[Stored | Problem]:
        """Return the results of entries, of which some were inserted, and the others have an error."""
        if all(isinstance(each, Stored) for each in inserted):
            return inserted
        results = dict(zip(group, inserted, strict=True))
        refused = [entry for entry in group if not isinstance(results[entry], Stored)]
        keyed = [entry for entry in refused if entry.key is not None]
        rows = dict(zip(keyed, self.database.fetch(db, [stored_under_key(entry) for entry in keyed]), strict=True))
        for entry in refused:
            results[entry] = self._replay(entry, rows.get(entry, [])) or self._refusal(entry, results[entry])
        return list(results.values())

    def _replay(self, entry: Entry, rows: list[tuple] | Exception) -> Stored | Problem | None:
        """Return what the rows under the key of an entry stand for, a Problem if for something else, or None."""
        if isinstance(rows, Exception):
            return storage_problem(rows)
        sent = {key_of_line(entry.key, line): body for line, body in enumerate(entry.bodies, 1)}
        stored = {key: body for _, _, key, body in rows}
        if stored == sent or (stored and entry.signed):
            return Stored(rows[0][0], rows[-1][0], rows[0][1], len(rows), replayed=True)
        or_deleted = ", or some of its messages have been deleted since" if stored.items() <= sent.items() else ""
        return Problem(422, f"This Idempotency-Key was used before, with another body{or_deleted}.") if stored else None

    def _refusal(self, entry: Entry, error: Exception) -> Problem:
        """Return why an entry was not inserted: a rule that it breaks, or a fault of the database."""
        said, name = str(error), getattr(error, "sqlite_errorname", "")
        if said.startswith("cannot store "):  # Python 3.11 has no name for it
            name = "SQLITE_CONSTRAINT_DATATYPE"
        if name not in REFUSALS:
            log.error("a message for %s could not be stored: %s: %s", entry.stream.name, name, error)
            return storage_problem(error)
        status, words = REFUSALS[name]
        text = re.sub(rf"\b{entry.stream.name}\.", "", said, flags=re.IGNORECASE)
        words = words.format(said=said, text=text, subject=text.rpartition(": ")[2].removeprefix("index "))
        members = {"stream": entry.stream.name} | ({"line": entry.line} if entry.batch else {})
        return Problem(status, self.schema.sentences.get(fold(said), words), **members)

    # Reading

    def page(
        self,
        stream: Stream,
        after: int,
        limit: int,
        filters: dict[str, str],
        abandoned: Callable[[], bool],
        until: int = MAX_ID,
    ) -> Iterator[tuple]:
        """Yield rows (id, received_at, client, key, body in bytes, headers if there are any) in commit order.

        They have ids over after, up to until; at most limit of them. Of a report, the rows as they are. filters:
        columns and the texts that they must equal. Close the iterator to end its snapshot. Raises Problem 503 after
        READ_TIMEOUT_S in SQL, or when abandoned() says that nobody waits for the rows.
        """
        conditions, values = "t.id > :after AND t.id <= :until", {"after": after, "until": until, "limit": limit}
        if not stream.has_ids:
            conditions = "true"
        for number, (column, text) in enumerate(filters.items()):
            conditions += f" AND {condition(stream, column, f':value{number}')}"
            values[f"value{number}"] = text
        sql, began = self.database.page_sql(stream, conditions), time.monotonic()
        try:
            with self.database.reader(READ_TIMEOUT_S, abandoned) as db:
                # SQL makes text that is not UTF-8 out of a lone surrogate.
                db.text_factory = str if stream.takes else partial(str, encoding="utf-8", errors="replace")
                yield from db.execute(sql, values)
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            if name == "SQLITE_ERROR" and not stream.takes:
                log.error("the view %s cannot be read: %s", stream.name, error)
                raise Problem(503, "The SQL of this view fails on what is stored; the log says why.") from None
            if name != "SQLITE_INTERRUPT":
                raise
            detail = "The read was ended: its client has closed the connection, or the process forks."
            if time.monotonic() - began >= READ_TIMEOUT_S:
                detail = self._why_slow(stream, filters)
            raise Problem(503, detail) from None

    def _why_slow(self, stream: Stream, filters: Iterable[str]) -> str:
        """Return the detail for a read that took too long: which columns of its filters have no index."""
        detail = f"This read took more than {READ_TIMEOUT_S:.0f} s."
        for column in filters:
            plan = f'EXPLAIN QUERY PLAN SELECT 1 FROM "{stream.name}" AS t WHERE {condition(stream, column, "?1")}'
            with self.database.reader() as db:
                if any(step[3].startswith("SCAN") for step in db.execute(plan, ("",))):  # sqlite.org/eqp.html
                    detail += f" There is no index on {column}."
        return detail

    def last_id(self, stream: Stream) -> int | None:
        """Return the last id of a stream, used or deleted, or that of a view; None if it cannot be found in time."""
        sql, values = "SELECT s.seq FROM sqlite_sequence AS s WHERE s.name = ?", (stream.name,)
        if not stream.takes:
            sql, values = f'SELECT CAST(t.id AS INTEGER) FROM "{stream.name}" AS t ORDER BY t.id DESC LIMIT 1', ()
        with contextlib.suppress(sqlite3.DatabaseError), self.database.reader(0.2) as db:
            return (db.execute(sql, values).fetchone() or (0,))[0]

    def message(self, stream: Stream, message_id: int) -> tuple | None:
        """Return the row with an id, as page() has it, or None."""
        return next(self.page(stream, message_id - 1, 1, {}, lambda: False, until=message_id), None)


def rows_of(entry: Entry, received_at: str) -> Iterator[tuple]:
    """Yield what is inserted for each message of an entry; entry.line is the one under way."""
    for entry.line, body in enumerate(entry.bodies, 1):  # noqa: B020
        yield received_at, entry.client, key_of_line(entry.key, entry.line), body, *entry.headers


def stored_under_key(entry: Entry) -> tuple[str, dict[str, Any]]:
    """Return the SQL of the rows that have the key of an entry, and its parameters."""
    return (
        f'SELECT t.id, t.received_at, t.key, t.body FROM "{entry.stream.name}" AS t'
        " WHERE t.client COLLATE BINARY = :client AND (t.key COLLATE BINARY = :key"
        " OR t.key COLLATE BINARY > :first AND t.key COLLATE BINARY < :end) ORDER BY t.id LIMIT :most",
        # The keys of lines are between `key ` and `key!`. One row too many shows that it was something else.
        {"client": entry.client, "key": entry.key, "first": f"{entry.key} ", "end": f"{entry.key}!"}
        | {"most": -1 if entry.signed else len(entry.bodies) + 1},
    )


def key_of_line(key: str | None, line: int) -> str | None:
    """Return the key of one line: line 1 has the batch's key k1, line 2 has `k1 2`. No client's key has a space."""
    return key if key is None or line == 1 else f"{key} {line}"


def condition(stream: Stream, column: str, value: str) -> str:
    """Return the SQL that compares a column with a text; where it has no type, also with the number in the text."""
    if stream.fields[column]:
        return f"t.{quoted(column)} = {value}"
    number = f"iif(json_type({value}) IN ('integer', 'real'), {value} ->> '$', {value})"
    return f"t.{quoted(column)} IN ({value}, iif(json_valid({value}), {number}, {value}))"


# ==================== The engine: open, insert, query and close one SQLite file =====================

LARGE_WAL_BYTES = 16 * 1024 * 1024  # it is about 4 MiB if no reader stays for long
SQLITE_STEPS = 10_000  # between two looks at the clock: less than 10 ms


def database_at(where: str) -> "Database":
    """Return the engine for the setting --database. That of rqlite is loaded only if it is used."""
    if where.startswith(("http://", "https://")):
        sys.modules.setdefault("service", sys.modules[__name__])  # it is __main__ now, and would be loaded once more
        from cluster.rqlite import Cluster

        return Cluster(where)
    if re.search(r"://|^https?:|^[^/]*:\d+(,|$)", where, re.IGNORECASE):  # the value can hold a password
        raise SetupError("--database (INLET_DATABASE) begins with http:// or https:// if it is for a cluster")
    return Database(Path(where))


def connect(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    """Return a connection in autocommit mode; mode is ro, rw or rwc as in https://www.sqlite.org/uri.html"""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=busy_timeout_s)
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA synchronous = FULL")  # in WAL mode: one fsync of the WAL in every COMMIT
    db.execute("PRAGMA checkpoint_fullfsync = ON")  # macOS: fsync alone does not reach the disk there
    db.execute("PRAGMA fullfsync = ON")
    return db


def poll(attempt: Callable[[], Any], deadline: float, holder: str) -> None:
    """Try to get a lock until the deadline, a time.monotonic(); then TimeoutError."""
    pause_s = 0.0001
    while True:
        try:
            attempt()
            return
        except (BlockingIOError, sqlite3.OperationalError) as error:
            if not getattr(error, "sqlite_errorname", "SQLITE_BUSY").startswith("SQLITE_BUSY"):
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(f"{holder} holds the write lock") from None
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, 0.002)


def lock_file(database: Path) -> IO:
    """Open the file beside a database that is there to be locked, by its owner only: who can read it can lock it."""
    return open(f"{database}-lock", "ab", opener=partial(os.open, mode=0o600))


@contextlib.contextmanager
def locked(file: IO, deadline: float) -> Iterator[None]:
    """Run a block while no other process may write; TimeoutError if the lock is not free by the deadline.

    It is a flock on a file of its own beside the database. SQLite polls for its own lock with pauses that grow, so that
    a busy process starves the others; and from 3.7.0 to 3.51.2 two connections that write or checkpoint at the same
    moment can corrupt a WAL (https://sqlite.org/wal.html). flock(2) knows no time limit, so it is polled for as well.
    """
    poll(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB), deadline, "another process")
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


class Database:
    """One SQLite file: a connection that writes, and a pool of connections that read and never wait for a writer."""

    def __init__(self, path: Path):
        self.path = path.resolve()  # once: the WAL of a symlinked database stands beside the real file
        self._folder, self._paths = str(self.path.parent), [f"{self.path}{suffix}" for suffix in ("", "-wal", "-shm")]
        self._lock: IO | None = None
        self._writer: sqlite3.Connection | None = None
        self._files: tuple = ()  # (device, inode) of the database, its WAL and its -shm when the writer opened them
        self._wal_is_large = False
        self._last_look: tuple = ()  # (device, inode, ctime of the folder, second) when the files were looked at
        self._readers: list[tuple[sqlite3.Connection, Any]] = []  # that nobody uses, each with its file
        self._gate = threading.Condition()  # for what follows
        self._using = 0  # threads that use a connection
        self.closing = 0  # threads that wait to close all connections
        # A child would inherit locks of SQLite, and files that are locked. So all is closed while a process forks.
        os.register_at_fork(before=self._close_all, after_in_parent=self._reopen, after_in_child=self._reopen_in_child)

    def __str__(self) -> str:
        return str(self.path)

    @contextlib.contextmanager
    def alone(self, new_schema: Schema | None = None) -> Iterator[sqlite3.Connection]:
        """Yield a connection while no other process writes.

        new_schema: what is made if there is no database. Without it, SetupError is raised then.
        """
        path, deadline, mode = self.path, time.monotonic() + BUSY_TIMEOUT_S, "rwc" if new_schema else "rw"
        if not new_schema and not path.is_file():
            hint = "the service makes it, by its first start or its first request"
            raise SetupError(f"there is no database {path}: {hint}")
        if not path.parent.is_dir():
            raise SetupError(f"there is no folder {path.parent} for the database {path.name}")
        if new_schema:
            # Only its owner may read what has secrets. A file that is there must not be opened: to close it would take
            # SQLite's locks from this process (https://www.sqlite.org/howtocorrupt.html, 2.2).
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, mode=0o600))
        with lock_file(path) as file, locked(file, deadline):
            _, wal, shm = [os.path.exists(each) for each in self._paths]
            if shm and not wal:  # a second WAL would make the -shm of those who have it open wrong
                hint = "if a process has it open, it saves that WAL with its next message; if none has, remove the -shm"
                raise SetupError(f"the WAL of {path} was removed, but not its -shm: {hint}")
            with contextlib.closing(connect(path, mode, BUSY_TIMEOUT_S)) as db:
                if new_schema:
                    db.execute("PRAGMA journal_mode = WAL")
                yield db
            if new_schema:
                sync_directory(path.parent)  # else a power cut could lose the new file and its messages

    def to_migrate(self, schema: Schema) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return self.alone()

    @contextlib.contextmanager
    def _in_use(self, deadline: float) -> Iterator[None]:
        """Keep the connections open for a block; TimeoutError if they are still being closed at the deadline."""
        with self._gate:
            if self.closing:
                self._wait_until_open(deadline)
            self._using += 1
        try:
            yield
        finally:
            with self._gate:
                self._using -= 1
                if self.closing:
                    self._gate.notify_all()

    def _wait_until_open(self, deadline: float) -> None:
        with self._gate:
            if not self._gate.wait_for(lambda: not self.closing, max(0.0, deadline - time.monotonic())):
                raise TimeoutError("the connections are being closed, which waits for a long read")

    def _close_all(self, using: int = 0) -> None:
        """Close every connection, when only so many threads use one. Nobody can open one before _reopen()."""
        self._gate.acquire()
        self.closing += 1  # so that slow reads end
        self._gate.wait_for(lambda: self._using == using)
        if self._writer and identity_and_size(self._paths[1])[0] != self._files[1]:
            with contextlib.suppress(sqlite3.Error):
                checkpoint(self._writer)  # or what is in a WAL that was removed would be lost
        close_each([self._writer, *(connection for connection, _ in self._readers)])
        self._writer, self._readers = None, []

    def _reopen(self) -> None:
        self._gate.notify_all()  # raises RuntimeError if _close_all() was interrupted: then there is nothing to undo
        self.closing -= 1
        self._gate.release()

    def _reopen_in_child(self) -> None:
        self._gate, self._using, self.closing = threading.Condition(), 0, 0  # no other thread is in the child
        if self._lock:  # it would stay locked here when the parent dies
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def transaction(self, deadline: float) -> Iterator[sqlite3.Connection]:
        """Run a block in a transaction and commit it to disk, in one thread at a time; TimeoutError if it cannot begin.

        A COMMIT that fails has an unknown outcome. Then, and after every other error, the connection is thrown away:
        that rolls back, and nothing is committed twice.
        """
        if self.closing:  # wait without the lock, for others need it meanwhile
            self._wait_until_open(deadline)
        self._lock = self._lock or lock_file(self.path)
        with locked(self._lock, deadline), self._in_use(deadline):
            try:
                db = self._ready_writer(deadline)
                poll(lambda: db.execute("BEGIN IMMEDIATE"), deadline, "another program")
                yield db
                db.execute("COMMIT")
            except TimeoutError:  # nothing has begun
                raise
            except BaseException:
                self._close_writer()
                raise

    def insert(self, db: sqlite3.Connection, entries: list[Entry], received_at: str) -> list[Stored | Exception]:
        """Insert the rows of entries. An error that is returned has undone only its entry; any other is raised."""
        return [self._insert(db, entry, received_at) for entry in entries]

    def fetch(self, db: sqlite3.Connection, queries: list[tuple[str, dict]]) -> list[list[tuple]]:
        """Return the rows of each query."""
        return [db.execute(*query).fetchall() for query in queries]

    def _insert(self, db: sqlite3.Connection, entry: Entry, received_at: str) -> Stored | Exception:
        if not entry.bodies:
            touch(db)
            return Stored(0, 0, received_at, 0)
        insert, rows = entry.stream.insert, rows_of(entry, received_at)
        try:
            if entry.batch:
                db.execute("SAVEPOINT batch")
            first = last = db.execute(insert, next(rows)).lastrowid
            if entry.batch:
                db.executemany(insert, rows)
                (last,) = db.execute("SELECT last_insert_rowid()").fetchone()
                db.execute("RELEASE batch")
            return Stored(first, last, received_at, len(entry.bodies))
        except (sqlite3.Error, MemoryError) as error:
            # FULL, IOERR, NOMEM and BUSY may have rolled everything back, and the next INSERT would be a
            # transaction of its own: https://www.sqlite.org/lang_transaction.html (3, response to errors)
            if not db.in_transaction:
                raise
            if entry.batch:
                db.execute("ROLLBACK TO batch")
                db.execute("RELEASE batch")
            try:
                # Can any message be inserted? The text is new each time: SQLite looks at the tables when it compiles.
                compiled, values = entry.stream.explain
                db.execute(f"{compiled} -- {time.monotonic_ns()}", values)
            except sqlite3.Error as fault:
                return sqlite3.DatabaseError(f"no message can be inserted: {fault}")
            return error

    def close(self) -> None:
        """Close the connections; the WAL goes into the database."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        with contextlib.suppress(OSError, sqlite3.Error), lock_file(self.path) as file, locked(file, deadline):
            if self._writer and self._files == tuple(identity_and_size(path)[0] for path in self._paths):
                checkpoint(self._writer)
            self._close_all()
            self._reopen()

    def _ready_writer(self, deadline: float) -> sqlite3.Connection:
        """Return the connection that writes, opened again if it is lost or its files are not the ones on disk."""
        # stat() of a file makes the next write to it slower: 260 µs for a COMMIT in place of 190. Linux then notes the
        # exact time (docs.kernel.org/filesystems/multigrain-ts.html). So the files are looked at once a second, and
        # when their folder has changed; a change in the last second may not show in its ctime.
        folder, now = os.stat(self._folder), time.time()
        look = folder.st_dev, folder.st_ino, folder.st_ctime_ns, int(now)
        if self._writer and self._last_look == look and folder.st_ctime < now - 1:
            return self._writer
        files, sizes = zip(*map(identity_and_size, self._paths), strict=True)
        if self._writer and self._files != files:
            log.error("%s, its WAL or its -shm was removed or replaced; opening it again", self.path)
            if self._files[0] == files[0] and self._files[1] != files[1]:
                # What is in a WAL that was removed can be saved when nobody reads it.
                poll(lambda: checkpoint(self._writer, required=True), deadline, "a reader of the removed WAL")
            self._close_all(using=1)  # readers as well, for they share the -shm
            self._reopen()
        if self._wal_is_large != (sizes[1] > LARGE_WAL_BYTES):
            self._wal_is_large = not self._wal_is_large
            change = "has grown: a reader stays open" if self._wal_is_large else "is small again"
            log.warning("the WAL %s (%d MiB)", change, sizes[1] // 2**20)
        self._last_look = look
        return self._writer or self._open_writer()

    def _open_writer(self) -> sqlite3.Connection:
        """Open the connection that writes, while no other process does."""
        opened, _ = identity_and_size(self._paths[0])
        self._writer = db = connect(self.path, "rw", 1.0)  # never makes a file in place of one that has gone
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA journal_size_limit = {LARGE_WAL_BYTES}")  # what a long reader made grow shrinks after
        # After a failed fsync the kernel marks the lost pages as clean: https://lwn.net/Articles/752063/. A WAL with a
        # hole in it ends there. So what an earlier process left in the WAL goes to the database. If a reader prevents
        # that, another connection uses the WAL, so it is intact.
        checkpoint(db)
        self._files = tuple(identity_and_size(path)[0] for path in self._paths)
        if self._files[0] != opened:
            raise sqlite3.OperationalError("the database was replaced while it was opened")
        return db

    def _close_writer(self) -> None:
        close_each([self._writer])
        self._writer = None

    @staticmethod
    def page_sql(stream: Stream, conditions: str) -> str:
        """Return the SQL of a page; the parameter :limit is the number of its rows."""
        order = " ORDER BY t.id" if stream.has_ids else ""
        return f'SELECT {", ".join(stream.selected)} FROM "{stream.name}" AS t WHERE {conditions}{order} LIMIT :limit'

    @contextlib.contextmanager
    def reader(
        self, limit_s: float = READ_TIMEOUT_S, abandoned: Callable[[], bool] = lambda: False
    ) -> Iterator[sqlite3.Connection]:
        """Lend a connection. Its query ends with SQLITE_INTERRUPT after limit_s, or when abandoned() is true."""
        began = time.monotonic()

        def give_up() -> bool:
            taken_s = time.monotonic() - began
            return taken_s > limit_s or (taken_s > 1 and abandoned()) or (taken_s > 0.3 and self.closing > 0)

        with self._in_use(time.monotonic() + BUSY_TIMEOUT_S):
            db, file = None, None
            with contextlib.suppress(IndexError):
                db, file = self._readers.pop()
            on_disk, _ = identity_and_size(self._paths[0])
            if file is None or file != on_disk:  # not opened yet, or removed, or replaced
                db, file = connect(self.path, "ro", BUSY_TIMEOUT_S), on_disk
            db.set_progress_handler(give_up, SQLITE_STEPS)
            try:
                yield db
            except sqlite3.Error:
                file = None
                db.close()  # now, and not when the traceback lets go of it: a fork may wait for that
                raise
            finally:
                if file:
                    self._readers.append((db, file))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of its files, by the names of the metrics."""
        sizes = [identity_and_size(path)[1] for path in self._paths]
        return {"database_bytes": sizes[0], "wal_bytes": sizes[1]}

    def copy_to(self, target: str) -> None:
        """Write a copy of what it is at this moment to a file."""
        if not self.path.is_file():
            raise SetupError(f"there is no database {self}")
        os.chmod(target, self.path.stat().st_mode)
        closing = contextlib.closing
        with closing(connect(self.path, "ro", BUSY_TIMEOUT_S)) as source, closing(sqlite3.connect(target)) as copy:
            source.execute("BEGIN")  # one snapshot for all steps: else they would start again at every write
            source.execute("SELECT 1 FROM sqlite_schema").fetchall()
            source.backup(copy, pages=10_000, progress=lambda _, left, of: show(f"{left} of {of} pages left"))


def identity_and_size(path: str | Path) -> tuple[tuple[int, int] | None, int]:
    """Return (device, inode) of a file and its bytes; None and 0 if there is none."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None, 0
    return (stat.st_dev, stat.st_ino), stat.st_size


def close_each(connections: Iterable[sqlite3.Connection | None]) -> None:
    """Close connections, whatever state they are in."""
    for connection in filter(None, connections):
        with contextlib.suppress(sqlite3.Error):
            connection.close()


def touch(db: sqlite3.Connection) -> None:
    """Write page 1 as it is: a write that changes nothing."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    db.execute(f"PRAGMA user_version = {version}")


def checkpoint(db: sqlite3.Connection, required: bool = False) -> None:
    """Move the WAL into the database as far as that goes without waiting; BlockingIOError if all of it is required."""
    db.execute("PRAGMA busy_timeout = 0")
    (is_busy, _, _) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if is_busy and required:
        raise BlockingIOError


def sync_directory(path: Path) -> None:
    """Make the names of new files in a directory durable; see fsync(2)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ==================== Statistics: what /metrics and the log say =====================================

STARTED_AT = time.time()
LOGGED_REFUSALS = 10  # a second; the rest is counted
COMMIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, "+Inf")
GROUP_SIZES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, "+Inf")


class Statistics:
    """Counts of this process. To count takes no lock: each thread has counts of its own, and one at a time commits."""

    def __init__(self, streams: Iterable[str]):
        # By thread, then by stream and status. Statuses that have an alert begin with 0.
        zeros = {(stream, status): 0 for stream in streams for status in (201, 503, 507)}
        self._counts: dict[int, dict[tuple[str, int], int]] = {0: zeros}
        self._commit_s, self._group_sizes = dict.fromkeys(COMMIT_S, 0), dict.fromkeys(GROUP_SIZES, 0)
        self._sums = [0.0, 0]  # of both
        self._slowest_s = 0.0  # COMMIT of this minute
        self._minute_ends = time.monotonic() + 60
        self._last_minute = dict.fromkeys((2, 4, 5), 0)  # counts until then, by the first digit of the status
        self._second_ends, self._logged, self._unlogged = 0.0, 0, 0

    def answered(self, stream: str, status: int, client: str = "", detail: str = "", path: str = "") -> None:
        """Count an answer; if it is a refusal, let the log say so."""
        counts = self._counts.setdefault(threading.get_ident(), {})
        counts[stream, status] = counts.get((stream, status), 0) + 1
        if status >= 400:
            self._log(f"{status} to {client!r} at {path or '/' + stream!r}: {detail!r}")

    def committed(self, seconds: float, messages: int) -> None:
        """Count a COMMIT with what was stored by it."""
        self._commit_s[COMMIT_S[bisect.bisect_left(COMMIT_S, seconds, hi=len(COMMIT_S) - 1)]] += 1
        self._group_sizes[GROUP_SIZES[bisect.bisect_left(GROUP_SIZES, messages, hi=len(GROUP_SIZES) - 1)]] += 1
        self._sums = [self._sums[0] + seconds, self._sums[1] + messages]
        self._slowest_s = max(self._slowest_s, seconds)

    def tell(self) -> None:
        """Log what came in the last minute, if it is over and something came."""
        now = time.monotonic()
        if self._unlogged and now > self._second_ends:
            more, self._unlogged = self._unlogged, 0
            log.info("and %d more refusals", more)
        if now < self._minute_ends:
            return
        self._minute_ends, before, self._last_minute = now + 60, self._last_minute, dict.fromkeys((2, 4, 5), 0)
        for (_, status), count in self._answers().items():
            if status == 201 or status >= 400:
                self._last_minute[status // 100] += count
        stored, refused, failed = (self._last_minute[digit] - before[digit] for digit in (2, 4, 5))
        if stored or refused or failed:
            slowest_s, self._slowest_s = self._slowest_s, 0.0
            told = "in a minute: %d requests stored, %d refused, %d failed; slowest COMMIT %.3f s"
            log.info(told, stored, refused, failed, slowest_s)

    def families(self) -> list[tuple]:
        """Return the metrics of this process: name, type, help, samples."""
        requests = [({"stream": stream, "status": status}, n) for (stream, status), n in self._answers().items()]
        return [
            ("requests_total", "counter", "Requests that this process has answered.", requests),
            ("commits_total", "counter", "COMMITs of this process.", [({}, sum(self._commit_s.values()))]),
            ("commit_duration_seconds", "histogram", "From BEGIN to COMMIT.", [(self._commit_s.copy(), self._sums[0])]),
            ("messages_per_commit", "histogram", "Messages.", [(self._group_sizes.copy(), self._sums[1])]),
        ]

    def _answers(self) -> dict[tuple[str, int], int]:
        total: Counter[tuple[str, int]] = Counter()
        for counts in self._counts.copy().values():
            total.update(counts.copy())
        return total

    def _log(self, refusal: str) -> None:
        now = time.monotonic()
        if now > self._second_ends:
            self._second_ends, self._logged = now + 1, 0
        if self._logged < LOGGED_REFUSALS:
            self._logged += 1
            log.info("%s", refusal)
        else:
            self._unlogged += 1


# ==================== Clients: who may come in ======================================================

CLIENTS_REFRESH_S = 0.8  # how soon every process knows of a new or a revoked token
CLIENTS_TIMEOUT_S = 1.0  # to read them, for the server's loop waits
CLIENTS_RETRY_S = 0.05  # after they could not be read, or after a token was not among them
CLIENTS_TABLE = """CREATE TABLE clients (
    name    TEXT NOT NULL,
    token   TEXT NOT NULL UNIQUE,  -- the SHA-256 digest of the token, or of the secret, in hexadecimal
    can     TEXT NOT NULL,         -- grants with spaces between: write read write:NAME read:NAME
    made_at TEXT,
    signs   TEXT,                  -- the name of a scheme, for a sender that signs its messages
    secret  TEXT                   -- that it shares with us
) STRICT"""
ADD_CLIENT = """INSERT INTO clients (name, token, can, made_at, signs, secret)
    VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""
SIGNED_WITHIN_S = 300  # for schemes that sign a time
SHORTEST_SECRET = 8  # bytes
MOST_SIGNATURES = 8  # in one header
SEND_A_TOKEN = "Send a token: Authorization: Bearer TOKEN."
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="inlet", Basic realm="inlet"'}
INVALID_TOKEN = {"WWW-Authenticate": 'Bearer realm="inlet", error="invalid_token", Basic realm="inlet"'}


@dataclass(frozen=True)
class Client:
    """Somebody with a token. grants are write and read, for all streams or with :STREAM for one."""

    name: str
    grants: frozenset[str]

    def can(self, action: str, stream: Stream) -> bool:
        return action in self.grants or f"{action}:{stream.name.lower()}" in self.grants

    def require(self, action: str, stream: Stream | None = None) -> None:
        """Raise Problem 403 if this client may not do this: with a stream, or everywhere."""
        if not (self.can(action, stream) if stream else action in self.grants):
            scope = f"{action}:{stream.name}" if stream else action
            challenge = {"WWW-Authenticate": f'Bearer realm="inlet", error="insufficient_scope", scope="{scope}"'}
            members = {"stream": stream.name} if stream else {}
            raise Problem(403, f"This client lacks the grant {scope}.", challenge, **members)


class Scheme(NamedTuple):
    """How a sender signs a message with HMAC-SHA256. Headers have their names in WSGI."""

    signature_header: str  # that has signatures
    signature: str  # the pattern of one of them
    encode: Callable[[bytes], bytes]  # how it is written
    signed_prefix: str  # before the body: {time} is that of the signature, {id} is that of the delivery
    time: tuple[str, str] | None  # a header and a pattern
    delivery_header: str | None  # the header that names the delivery; None: the body's member id
    secret_prefix: str  # what our secrets begin with

    def hmac_key(self, text: str) -> bytes:
        """Return the HMAC key in the text of a secret; ValueError if it is malformed."""
        if self.secret_prefix:
            return base64.b64decode(text.removeprefix(self.secret_prefix), validate=True)
        return text.encode()


SCHEMES = {
    "standard": Scheme(  # https://www.standardwebhooks.com
        "HTTP_WEBHOOK_SIGNATURE", r"(?<!\S)v1,(\S+)", base64.b64encode, "{id}.{time}.",
        ("HTTP_WEBHOOK_TIMESTAMP", r"^(\d{1,18})$"), "HTTP_WEBHOOK_ID", "whsec_"),
    "github": Scheme(  # https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries
        "HTTP_X_HUB_SIGNATURE_256", r"^sha256=(\S+)$", binascii.hexlify, "", None, "HTTP_X_GITHUB_DELIVERY", ""),
    "stripe": Scheme(  # https://docs.stripe.com/webhooks#verify-manually
        "HTTP_STRIPE_SIGNATURE", r"(?:^|,)v1=([^,\s]+)", binascii.hexlify, "{time}.",
        ("HTTP_STRIPE_SIGNATURE", r"(?:^|,)t=(\d{1,18})(?:,|$)"), None, ""),
    "shopify": Scheme(  # https://shopify.dev/docs/apps/build/webhooks/subscribe/https
        "HTTP_X_SHOPIFY_HMAC_SHA256", r"^(\S+)$", base64.b64encode, "", None, "HTTP_X_SHOPIFY_WEBHOOK_ID", ""),
}  # fmt: skip


class Clients:
    """Falcon middleware: every path except /healthz needs a token, also a path that does not exist. (See Page for /.)

    The clients table is kept in memory, so that a request costs no SQL for its token.
    """

    def __init__(self, store: Store, cors: str = ""):
        self._database = store.database
        self._streams = {stream.name for stream in store.schema.streams.values() if stream.takes}
        self._statistics = store.statistics
        self._origins = cors.split(",") if cors else []
        self._by_digest: dict[str, Client] = {}
        self._signers: dict[str, list[tuple[bytes, Client]]] = {}  # secrets by the name of the scheme
        self._read_at = self._missed_at = -CLIENTS_REFRESH_S
        self._failure: Exception | None = None

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        preflight = req.method == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in req.env
        if req.path == "/healthz" or (preflight and req.env.get("HTTP_ORIGIN") in self._origins):
            return
        req.context.client = req.env.get("inlet.client") or self.authenticate(req.env, req.method)
        if req.context.client is None and req.path[1:] not in self._streams:  # or a stranger would learn what there is
            raise Problem(401, SEND_A_TOKEN, CHALLENGE)

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: Any, succeeded: bool) -> None:
        """Count the answer, unless it is given later."""
        context = req.context
        if "is_put" not in context:
            stream = resource.stream.name if isinstance(resource, ViewResource) else ""
            client = context.client.name if context.get("client") else ""
            self._statistics.answered(stream, resp.status_code, client, context.get("detail", ""), req.path)
            self._statistics.tell()
            if self._origins:
                resp.append_header("Vary", "Origin")

    def authenticate(self, headers: dict[str, Any], method: str) -> Client | None:
        """Return the client whose token is in the headers (with their names in WSGI): Bearer (RFC 6750), or Basic
        (RFC 7617) with the token as its password. None for a POST that is signed: its body says who sent it.

        Raises Problem 401, or 503 if the clients cannot be read.
        """
        if time.monotonic() >= self._read_at + CLIENTS_REFRESH_S:
            self.read()
        if self._failure:
            raise storage_problem(self._failure)
        authorization = headers.get("HTTP_AUTHORIZATION")
        if not authorization:
            if method == "POST" and scheme_of(headers) in self._signers:
                return None
            hint = SEND_A_TOKEN
            if "mod_wsgi.version" in headers:
                hint += " If you did: Apache has kept it to itself, and needs WSGIPassAuthorization On."
            raise Problem(401, hint, CHALLENGE)
        scheme, _, credentials = authorization.partition(" ")
        scheme, credentials = scheme.lower(), credentials.strip(" ")
        if scheme not in ("bearer", "basic"):
            raise Problem(401, "Send Authorization: Bearer TOKEN, or Basic with the token as password.", INVALID_TOKEN)
        # What is looked up is a digest: how long that takes says nothing about how much of a token is right.
        digest = digest_of(password_in(credentials) if scheme == "basic" else credentials)
        if digest not in self._by_digest and time.monotonic() > self._missed_at + CLIENTS_RETRY_S:
            began = time.monotonic()
            self.read()  # it may be new
            self._missed_at = time.monotonic() + 9 * (time.monotonic() - began)  # at most a tenth of the time
        client = self._by_digest.get(digest)
        if client is None:
            raise Problem(401, "This token is not valid here.", INVALID_TOKEN)
        return client

    def signer(self, headers: dict[str, Any], body: bytes) -> tuple[Client, Scheme]:
        """Return the client that has signed a body as it was sent, and how; Problem 401 if there is none.

        The time is checked where the scheme signs one.
        """
        name = scheme_of(headers)
        scheme = SCHEMES[name]
        given = [text.encode("latin-1") for text in re.findall(scheme.signature, headers[scheme.signature_header])]
        delivery, signed_at = headers.get(scheme.delivery_header, ""), ""
        if scheme.time:
            header, pattern = scheme.time
            found = re.search(pattern, headers.get(header, ""), re.ASCII)
            signed_at = found[1] if found else "0"
            if abs(time.time() - int(signed_at)) > SIGNED_WITHIN_S:
                detail = f"The signature has no time, or one that is not within {SIGNED_WITHIN_S} s of now."
                raise Problem(401, detail, CHALLENGE)
        signed = scheme.signed_prefix.format(id=delivery, time=signed_at).encode("latin-1") + body
        if given and (delivery or "{id}" not in scheme.signed_prefix):
            for secret, client in self._signers.get(name, ()):
                expected = scheme.encode(hmac.digest(secret, signed, "sha256"))
                if any(hmac.compare_digest(expected, signature) for signature in given[:MOST_SIGNATURES]):
                    return client, scheme
        raise Problem(401, f"The signature ({name}) is not valid here.", CHALLENGE)

    def read(self) -> Exception | None:
        """Read the clients table again. Returns the error, if any; then nobody gets in until a read works."""
        by_digest, signers, self._failure = {}, {}, None
        try:
            with self._database.reader(CLIENTS_TIMEOUT_S) as db:
                rows = db.execute("SELECT c.name, c.token, c.can, c.signs, c.secret FROM clients AS c").fetchall()
            for name, digest, can, signs, secret in rows:
                client = Client(name, frozenset(can.lower().split()))
                if not signs:
                    by_digest[digest] = client
                elif signs in SCHEMES:  # others come from a newer version
                    with contextlib.suppress(ValueError):
                        signers.setdefault(signs, []).append((SCHEMES[signs].hmac_key(secret), client))
            self._by_digest, self._signers = by_digest, signers
        except (sqlite3.Error, OSError) as error:
            log.error("the clients cannot be read: %s", error)
            self._failure = error.with_traceback(None)
        self._read_at = time.monotonic()
        if self._failure:  # the next try comes after CLIENTS_RETRY_S
            self._read_at += CLIENTS_RETRY_S - CLIENTS_REFRESH_S
        return self._failure


def scheme_of(headers: dict[str, Any]) -> str | None:
    """Return the name of the scheme by which a request with these headers is signed, or None."""
    return next((name for name, scheme in SCHEMES.items() if scheme.signature_header in headers), None)


def make_clients(db: sqlite3.Connection) -> None:
    """Make the clients table, or bring an older one up to date."""
    old = columns_of(db, "clients")
    if "signs" in old:
        return
    if old:
        uses_it = re.compile(r"references \W?clients\b|^create trigger .* on clients\b")
        users = [str(each) for each in schema_objects(db).values() if uses_it.search(plain(each.sql))]
        users += sorted(old.keys() - {"name", "token", "can"})
        if users:
            raise SetupError(
                f"the table clients belongs to the service, but {users[0]} uses it: move that elsewhere first"
            )
        db.execute('CREATE TEMP TABLE "old clients" AS SELECT c.name, c.token, c.can FROM main.clients AS c')
        db.execute("DROP TABLE clients")
    db.execute(CLIENTS_TABLE)
    if old:
        db.execute('INSERT INTO clients (name, token, can) SELECT o.name, o.token, o.can FROM temp."old clients" AS o')


def digest_of(token: str) -> str:
    """Return the SHA-256 digest of a token in hexadecimal: all that is kept of it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def password_in(credentials: str) -> str:
    """Return the password in the credentials of a Basic Authorization header; empty if there is none."""
    try:
        padded = credentials + "=" * (-len(credentials) % 4)
        return base64.b64decode(padded, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


# ==================== Reading requests ==============================================================

MAX_DEPTH = 512  # of arrays and objects: under the limit of every SQLite (1000 from 3.42 on) and of Python
LARGEST_BATCH = 10_000  # messages: about 0.1 s during which nobody else can write
READ_OF_TOO_LARGE = 16 * 1024 * 1024  # bytes
KEY = r"[!-~]{1,255}"
LONGEST_MEDIA_TYPE = 256  # characters: Falcon's parser takes time with the square of their number
JSON = "application/json"
NDJSON_TYPES = ("application/x-ndjson", "application/jsonl")
ACCEPTED_TYPES = [JSON, "application/*+json", *NDJSON_TYPES]
HEADERS = ("HTTP_", "CONTENT_TYPE", "CONTENT_LENGTH")  # what they begin with in WSGI
SECRET_HEADER = re.compile("AUTHORI|COOKIE|SIGNATURE|HMAC|TOKEN|SECRET|API_KEY|PASSWORD")  # is never kept
MOST_HEADERS = 16 * 1024 * 1024  # bytes in all rows of a batch
DEFAULT_PAGE = 100  # messages
LARGEST_PAGE = 1000

# A place in a JSON text is found by one match in C, so that no text takes long to refuse. A string without an end goes
# to the end of the text.
STRING = r'"(?:[^"\\]++|\\.?)*+(?:"|\Z)'
UP_TO_CONSTANT = re.compile(rf'(?:[^"NI-]++|{STRING}|-(?!I))*+', re.DOTALL)  # NaN, Infinity, -Infinity
UP_TO_BRACKET = rf'(?:[^"\[\]{{}}]++|{STRING})*+[\[\]{{}}]'
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
DEPTH_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# parse_int: a whole number may have more digits than int() takes (4300); its value is of no interest here.
JSON_DECODER = json.JSONDecoder(parse_int=float, parse_constant=_refuse_constant)


def json_texts(data: bytes, batch: bool) -> list[str]:
    """Return a body as text if it is JSON as RFC 8259 has it; of a batch, each line. Problem 400 (with line and column)
    or 413 if not.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise json_problem("it is not UTF-8", data[: error.start].decode()) from None
    lines = [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")] if batch else [text]
    if batch and lines == [""]:
        raise Problem(400, "The batch is empty.")
    if len(lines) > LARGEST_BATCH:
        raise Problem(413, f"The batch has more than {LARGEST_BATCH} messages.", limit=LARGEST_BATCH)
    for number, line in enumerate(lines, 1):
        require_json(line, number)
    return lines


def require_json(text: str, first_line: int = 1) -> None:
    """Raise Problem 400 if a text is not one JSON value."""
    try:
        JSON_DECODER.decode(text)
    except RecursionError:
        refuse_depth(text, first_line)
        raise
    except json.JSONDecodeError as error:
        raise json_problem(error.msg, text[: error.pos], first_line) from None
    except ValueError as error:
        raise json_problem(str(error), UP_TO_CONSTANT.match(text)[0], first_line) from None
    if len(text) > 2 * MAX_DEPTH and text.count("[") + text.count("{") > MAX_DEPTH:
        refuse_depth(text, first_line)


def refuse_depth(text: str, first_line: int) -> None:
    """Raise Problem 400 if a text has too many arrays and objects inside of each other."""
    brackets = re.sub(STRING, "", text, flags=re.DOTALL).encode().translate(None, NOT_BRACKETS)
    depths = accumulate(map(DEPTH_STEP.__getitem__, brackets))
    too_deep = next((number for number, depth in enumerate(depths, 1) if depth > MAX_DEPTH), None)
    if too_deep:
        before = re.match(rf"(?:{UP_TO_BRACKET}){{{too_deep}}}+", text, re.DOTALL)[0][:-1]
        raise json_problem(f"it is nested more than {MAX_DEPTH} deep", before, first_line)


def json_problem(reason: str, text_before: str, first_line: int = 1) -> Problem:
    """Return the refusal of a body, with the place (counted from 1, in characters) where it stops being JSON."""
    line = text_before.count("\n") + first_line
    column = len(text_before) - text_before.rfind("\n")
    return Problem(400, f"The body is not JSON: {reason}, line {line} column {column}.", line=line, column=column)


def is_batch(content_type: str | None) -> bool:
    """Does a Content-Type say one message on each line (NDJSON)? Problem 415 if it does not say JSON in UTF-8."""
    if content_type == JSON:  # what nearly all send
        return False
    kind, options = falcon.parse_header((content_type or "")[:LONGEST_MEDIA_TYPE])
    batch = kind.lower() in NDJSON_TYPES
    is_json = batch or re.fullmatch(r"application/json|[\w.-]+/[\w.+-]+\+json", kind, re.IGNORECASE | re.ASCII)
    in_utf_8 = options.get("charset", "utf-8").lower() in ("utf-8", "utf8", "us-ascii")
    if not is_json or not in_utf_8 or len(content_type) > LONGEST_MEDIA_TYPE:
        detail = "Send one message as application/json (or any +json), many as application/x-ndjson, in UTF-8."
        raise Problem(415, detail, {"Accept-Post": ", ".join(ACCEPTED_TYPES)}, accepted=ACCEPTED_TYPES)
    return batch


def without_gzip(data: bytes, coding: str | None, max_body: int) -> bytes:
    """Return a body with its Content-Encoding undone; Problem 400 if broken, 413 if too large, 415 if not gzip.

    Nothing is unpacked past the limit: a small body cannot use more memory than a large one.
    """
    if not coding or coding.lower() == "identity":
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
    """Return the body of a request, whole; Problem 400 if it is cut short, 411 without a length, 413 if too large."""
    length = environ.get("CONTENT_LENGTH")
    in_chunks = environ.get("wsgi.input_terminated") and environ.get("HTTP_TRANSFER_ENCODING")
    if not length and not in_chunks:
        raise Problem(411, "Send a Content-Length.")
    if length and not (length.isascii() and length.isdigit()):
        raise Problem(400, "Content-Length is not a number.")
    wanted = int(length[-19:]) if length else max_body + 1
    if length and (wanted > max_body or len(length) > 19):
        left, more = READ_OF_TOO_LARGE, b"x"  # or other servers would close on a client that still sends
        while left > 0 and more:
            more = environ["wsgi.input"].read(min(left, 65_536))
            left -= len(more)
        raise too_large(max_body)
    data, more = b"", b"x"
    while len(data) < wanted and more:  # one read() may give less
        try:
            more = environ["wsgi.input"].read(wanted - len(data))
        except OSError:  # how some servers tell that the client has gone
            more = b""
        data += more
    if length and len(data) < wanted:
        raise Problem(400, f"The body was cut short: {len(data)} of {wanted} bytes came.")
    if len(data) > max_body:
        raise too_large(max_body)
    return data


def too_large(max_body: int) -> Problem:
    return Problem(413, f"The body is larger than {max_body} bytes.", limit=max_body)


def idempotency_key(header: str | None) -> str | None:
    """Return the Idempotency-Key of a request, bare or a quoted string (RFC 8941, 3.3.3); Problem 400 if malformed."""
    if header and len(header) > 1 and header[0] == header[-1] == '"':
        header = re.sub(r'\\(["\\])', r"\1", header[1:-1])
    if header is not None and not re.fullmatch(KEY, header):
        raise Problem(400, "Idempotency-Key takes 1 to 255 visible ASCII characters, without spaces.")
    return header


def id_in(text: str) -> str:
    """Return the member id of a JSON text, if it has one that is a string; else an empty string."""
    value = json.loads(text, parse_int=float)
    return value["id"] if isinstance(value, dict) and isinstance(value.get("id"), str) else ""


def delivery_key(delivery: str) -> str | None:
    """Return the key for a delivery id: the id, or its digest if it is not a valid key, or None if it is empty."""
    return delivery if re.fullmatch(KEY, delivery) else digest_of(delivery) if delivery else None


def kept_headers(environ: dict[str, Any], rows: int) -> str:
    """Return the headers of a request as one JSON object, sorted by their names in lower case, without secrets.

    Problem 413 if they are too much, for each row of a batch has them.
    """
    kept = [name for name in environ if name.startswith(HEADERS) and not SECRET_HEADER.search(name) and environ[name]]
    headers = {name.removeprefix("HTTP_").replace("_", "-").lower(): environ[name] for name in kept}
    text = json.dumps(headers, sort_keys=True)
    if rows * len(text) > MOST_HEADERS:
        raise Problem(
            413, f"The headers, once for each message, have more than {MOST_HEADERS} bytes.", limit=MOST_HEADERS
        )
    return text


def page_from(params: dict[str, str | list[str]], stream: Stream) -> tuple[int, int, dict[str, str]]:
    """Return (after, limit, filters) from a query; Problem 400 if a parameter is unknown, doubled or out of range."""
    known = ["after"] * stream.has_ids + ["limit", *stream.fields]
    filters = {"after": "0", "limit": str(DEFAULT_PAGE)} | params
    for name, value in params.items():
        if name not in known:
            raise Problem(400, f"There is no parameter {name[:64]!r}: there are {', '.join(known)}.", parameters=known)
        if isinstance(value, list):
            raise Problem(400, f"The parameter {name} is given more than once.")
    numbers = []
    for name, low, high in (("after", 0, MAX_ID), ("limit", 1, LARGEST_PAGE)):
        text = filters.pop(name)
        if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise Problem(400, f"{name} takes a whole number from {low} to {high}.")
        numbers.append(int(text))
    return *numbers, filters


def preferred(req: falcon.Request, *types: str) -> str | None:
    """Return which media type the client prefers: the first if it does not say, None if it takes none of them."""
    if req.accept in ("*/*", types[0]):
        return types[0]
    if len(req.accept) > LONGEST_MEDIA_TYPE:
        raise Problem(400, f"Accept takes at most {LONGEST_MEDIA_TYPE} characters.")
    return req.client_prefers(types)


# ==================== Resources =====================================================================

PAGE_BYTES = 4 * 1024 * 1024  # a page of the feed ends after about this much


def envelope(row: tuple) -> bytes:
    """Return a message as the feed gives it. The body is put in as it was sent: it is JSON already."""
    message_id, received_at, client, key, body, *headers = row
    head = (
        f'{{"id": {message_id}, "received_at": {json_string(received_at)}, "client": {json_string(client)},'
        f' "key": {"null" if key is None else json_string(key)}, "body": '
    )
    tail = f', "headers": {headers[0] or "null"}' if headers else ""
    return b"%b%b%b}" % (head.encode(), body if isinstance(body, bytes) else body.encode(), tail.encode())


def report_row(names: Iterable[str], row: tuple) -> bytes:
    """Return a row of a report as a JSON object; a BLOB in hexadecimal, an infinity as a number that is too large."""
    members = []
    for name, value in zip(names, row, strict=True):
        infinite = isinstance(value, float) and math.isinf(value)
        text = f"{value:.0f}".replace("inf", "9e999") if infinite else json.dumps(value, default=bytes.hex)
        members.append(f"{json_string(name)}: {text}")
    return f"{{{', '.join(members)}}}".encode()


def link(req: falcon.Request, name: str) -> str:
    """Return the path of a stream or view, below the one that the app is mounted under."""
    return f"{quote(req.root_path)}/{name}"


def answer_to(entry: Entry, url: str) -> Answer:
    """Return the answer to a POST that has its result; url is that of its stream."""
    stored = entry.result
    if isinstance(stored, Problem):
        return stored.answer()
    headers = [("Content-Type", JSON)]
    if stored.replayed:
        headers.append(("Idempotent-Replayed", "true"))
    if entry.batch:
        ids = f'"count": {stored.count}, "first_id": {stored.first_id}, "last_id": {stored.last_id}'
    else:
        ids = f'"id": {stored.first_id}'
        headers.append(("Location", f"{url}/{stored.first_id}"))
    return "201 Created", headers, f'{{{ids}, "received_at": "{stored.received_at}"}}'.encode()


class ViewResource:
    """/{view} and /{view}/{id}"""

    def __init__(self, store: Store, stream: Stream):
        self._store = store
        self.stream = stream

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        stream = self.stream
        req.context.client.require("read", stream)
        resp.set_header("Vary", "Accept")
        after, limit, filters = page_from(req.params, stream)
        ndjson = preferred(req, JSON, *NDJSON_TYPES) in NDJSON_TYPES
        abandoned = req.env.get("inlet.is_abandoned", lambda: False)
        texts, size, more = [], 0, False
        with self._store.page_turn if stream.takes and not filters else contextlib.nullcontext():
            for row in self._store.page(stream, after, limit + (not stream.has_ids), filters, abandoned):
                if more := len(texts) == limit or size >= PAGE_BYTES:
                    break
                texts.append(envelope(row) if stream.has_ids else report_row(stream.fields, row))
                size += len(texts[-1])
                after = row[0]
        name, tail = b"rows", b', "more": true' if more else b""
        if stream.has_ids:
            query = {"after": after} | ({} if limit == DEFAULT_PAGE else {"limit": limit}) | filters
            next_page = f"{link(req, stream.name)}?{urlencode(query)}"
            resp.set_header("Link", f'<{next_page}>; rel="next"')
            name, tail = b"messages", f', "next": {json_string(next_page)}'.encode()
        if ndjson:
            resp.content_type = NDJSON_TYPES[0]
            # JSON has line breaks between tokens only, where a space means the same.
            lines = (text.replace(b"\n", b" ").replace(b"\r", b" ") for text in texts)
            resp.data = b"".join(b"%b\n" % line for line in lines)
        else:
            resp.data = b'{"%b": [%b]%b}' % (name, b", ".join(texts), tail)

    def on_get_message(self, req: falcon.Request, resp: falcon.Response, message_id: int) -> None:
        req.context.client.require("read", self.stream)
        row = self._store.message(self.stream, message_id)
        if row is None or not req.path.endswith(f"/{message_id}"):  # Falcon takes 0_1 for a number
            raise Problem(404, "There is no message with this id.", stream=self.stream.name)
        resp.data = envelope(row)

    on_head = on_get
    on_head_message = on_get_message


class StreamResource(ViewResource):
    """/{stream} and /{stream}/{id}"""

    def __init__(self, store: Store, stream: Stream, clients: Clients, max_body: int):
        super().__init__(store, stream)
        self._clients = clients
        self._max_body = max_body

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        stream, client, environ = self.stream, req.context.client, req.env
        if client:
            client.require("write", stream)
        data, scheme = read_body(environ, self._max_body), None
        if client is None:
            client, scheme = self._clients.signer(environ, data)
            req.context.client = client
            client.require("write", stream)
        batch = is_batch(req.content_type)
        data = without_gzip(data, environ.get("HTTP_CONTENT_ENCODING"), self._max_body)
        texts = json_texts(data, batch)
        if scheme:
            key = delivery_key(environ.get(scheme.delivery_header, "") if scheme.delivery_header else id_in(texts[0]))
        else:
            key = idempotency_key(environ.get("HTTP_IDEMPOTENCY_KEY"))
        headers = (kept_headers(environ, len(texts)),) if stream.has_headers else ()
        entry = Entry(stream, client.name, key, texts, headers, batch, signed=bool(scheme))
        url = link(req, stream.name)
        if put := environ.get("inlet.put"):  # the server has it committed together with others, and answers then
            entry.deadline = environ["inlet.arrived_at"] + BUSY_TIMEOUT_S
            req.context.is_put = True
            put(entry, url)
        else:
            self._store.append(entry)
            resp.status, headers, resp.data = answer_to(entry, url)
            resp.set_headers(headers)


class Page:
    """Falcon middleware: page.html for browsers that ask for /. There is no data in it, so it needs no token."""

    def __init__(self, content: bytes):
        parts = re.findall(rb"<(?:style|script)>(.*?)</(?:style|script)>", content, re.DOTALL)
        hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts)
        only_here = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self._content, self._etag = content, f'"{hashlib.sha256(content).hexdigest()}"'
        self._headers = {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache", "ETag": self._etag}
        self._headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Vary": "Accept"}
        self._headers["Cross-Origin-Opener-Policy"] = "same-origin"  # who opens this tab cannot steer it
        policy = f"default-src 'none'; script-src {hashes}; style-src {hashes}; {only_here}"
        self._headers["Content-Security-Policy"] = policy

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        is_asked = req.path == "/" and req.method in ("GET", "HEAD") and not req.auth
        if is_asked and preferred(req, JSON, "text/html") == "text/html":
            resp.complete, resp.data = True, self._content
            resp.set_headers(self._headers)
            if self._etag in req.get_header("If-None-Match", default=""):
                resp.status = 304


class RootResource:
    """/"""

    def __init__(self, store: Store):
        self._store = store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        streams, views = {}, {}
        for name, stream in self._store.schema.streams.items():
            actions = ("write", "read") if stream.takes else ("read",)
            can = [action for action in actions if req.context.client.can(action, stream)]
            if can:
                found = {"href": link(req, name), "can": can, "fields": list(stream.fields)}
                if stream.has_ids:
                    found["last_id"] = self._store.last_id(stream)
                (streams if stream.takes else views)[name] = found
        resp.set_header("Vary", "Accept")
        resp.media = {"service": "Inlet", "version": __version__, "streams": streams, "views": views}

    on_head = on_get


class HealthResource:
    """/healthz: alive is that this process answers; ready is that a message can be written now.

    The first request lets a thread write and sync a page. Those that arrive until EVERY_S later get what it has found.
    They wait for it at most until PATIENCE_S after it began.
    """

    EVERY_S = 1.0
    PATIENCE_S = 2.0

    def __init__(self, store: Store, clients: Clients):
        self._store = store
        self._clients = clients
        self._mutex = threading.Lock()
        self._began_at = -self.EVERY_S
        self._found: Future[str] = Future()  # what is wrong
        self._found.set_result("")

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        try:
            with self._mutex:
                arrived_at = req.env.get("inlet.arrived_at", time.monotonic())
                if self._found.done() and arrived_at > self._began_at + self.EVERY_S:
                    found: Future[str] = Future()
                    threading.Thread(target=self._probe, args=(found,), daemon=True).start()
                    self._found, self._began_at = found, time.monotonic()
            failure = self._found.result(max(0.0, self._began_at + self.PATIENCE_S - time.monotonic()))
        except TimeoutError:
            failure = "A write takes too long."
        except RuntimeError:
            failure = "No thread can be started."
        if failure:
            raise Problem(503, failure, alive=True, ready=False)
        resp.media = {"alive": True, "ready": True}

    on_head = on_get

    def _probe(self, found: Future[str]) -> None:
        failure = "The database cannot be written."
        try:
            self._store.append(Entry())
            failure = "The clients cannot be read." if self._clients.read() else ""
        except Exception as error:  # whatever it is, it must not say that all is well
            log.error("not ready: %s: %s", type(error).__name__, error)
        finally:
            found.set_result(failure)


class MetricsResource:
    """/metrics, in the text format of Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/"""

    def __init__(self, store: Store):
        self._store = store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        req.context.client.require("read")
        store = self._store
        used = resource.getrusage(resource.RUSAGE_SELF)
        last_ids = {each.name: store.last_id(each) for each in store.schema.streams.values() if each.takes}
        messages = [({"stream": name}, last_id) for name, last_id in last_ids.items() if last_id is not None]
        about = {"version": __version__, "sqlite": sqlite3.sqlite_version, "python": platform.python_version()}
        families = [
            ("build_info", "gauge", "The versions that run.", [(about, 1)]),
            ("messages_total", "counter", "Messages that were stored, by all processes.", messages),
            ("waiting", "gauge", "Messages that wait for a COMMIT.", [({}, len(store.queue))]),
            *(
                (name, "gauge", "The bytes of the database, or of its WAL.", [({}, size)])
                for name, size in store.database.sizes().items()
            ),
            *store.statistics.families(),
        ]
        process = [
            ("start_time_seconds", "gauge", "When this process started, in Unix time.", [({}, STARTED_AT)]),
            ("cpu_seconds_total", "counter", "CPU time of this process.", [({}, used.ru_utime + used.ru_stime)]),
            ("resident_memory_bytes", "gauge", "Its memory.", [({}, resident_bytes(used.ru_maxrss))]),
        ]
        resp.content_type = "text/plain; version=0.0.4; charset=utf-8"
        resp.text = "".join([*map(exposed("inlet"), families), *map(exposed("process"), process)])


def exposed(prefix: str) -> Callable[[tuple], str]:
    """Return what writes a metric: its name, type, help, and samples of (labels, value).

    A histogram has samples of (its buckets by their upper bounds, the sum of what was seen).
    """

    def lines(family: tuple) -> str:
        name, kind, about, samples = f"{prefix}_{family[0]}", *family[1:]
        out = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
        for labels, value in samples:
            if kind == "histogram":
                counts = [*accumulate(labels.values())]
                out += [f'{name}_bucket{{le="{le}"}} {count}' for le, count in zip(labels, counts, strict=True)]
                out += [f"{name}_sum {value}", f"{name}_count {counts[-1]}"]
            else:
                pairs = ",".join(f'{label}="{text}"' for label, text in labels.items())
                out.append(f"{name}{{{pairs}}} {value}" if pairs else f"{name} {value}")
        return "\n".join([*out, ""])

    return lines


def resident_bytes(largest: int) -> int:
    """Return the memory of this process; where there is no /proc (macOS), the most that it has had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return largest


# ==================== The server behind `python service.py` =========================================

CONNECTIONS = 4096  # fewer if the process may not open as many files
IDLE_S = 120  # after which a connection without a running request is closed
MAX_HEAD_BYTES = 16_384
SMALL_BYTES = 16_384  # bodies and answers up to this size are not counted
BODIES_BYTES = 64 * 1024 * 1024  # the limit for the sum of the larger bodies that are on their way
UNSENT_BYTES = 64 * 1024 * 1024  # of answers; above it, the client that has not read for longest is closed
DISCARDED_BYTES = 64 * 1024 * 1024  # read after a refusal, for a client that has to send all before it reads why
GATHER_S = 0.010  # the longest that a message waits for other people's requests before its COMMIT begins
AWAKE_S = 0.000_060  # after which the loop sleeps until there is something to do
STUCK_S = 0.020  # after this time in a COMMIT, the other thread becomes the loop
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
DRAIN_S = BUSY_TIMEOUT_S + 1  # how long a server that was told to stop waits for the requests in flight


class Server:
    """waitress's listening sockets, with a loop that runs POSTs itself, so that many share one COMMIT.

    A turn of the loop:

        read what has come in  → run POST A, POST B, POST C: each puts its message into the queue of the store
                               → one COMMIT of A, B and C → send three times 201

    A thread for each request would cost two thread switches a message, and a fight for the GIL at each row.

    Two threads take turns: one is the loop, and the other stands by. A write can take longer than STUCK_S: the disk is
    slow, or somebody holds the lock. Then the thread that stands by becomes the loop: no write stops a read. The other
    one stands by when its write has ended. GETs have threads of their own. Only the loop touches connections.
    """

    def __init__(self, app: Callable, settings: Settings, store: Store, authenticate: Callable[..., Client | None]):
        self.app = app
        self.settings = settings
        self.store = store
        self.authenticate = authenticate
        self.connections: set[Connection] = set()
        # It remembers which connections it watches. poll() takes all of them in each turn: with 1,000 idle clients that
        # was a fifth slower.
        self.selector = DefaultSelector()
        self.stopping = False
        self._posts: deque[Request] = deque()  # that have come in whole
        self._slow_posts: deque[Request] = deque()  # those that may take long to check
        self._gets: SimpleQueue[Request] = SimpleQueue()
        self._probes: SimpleQueue[Request] = SimpleQueue()  # of /healthz and /metrics, which must not wait for reads
        self._answered: deque[Request] = deque()
        self._wake_pending = False  # has the loop been woken since it last looked?
        self._loop_thread = 0  # the thread that is the loop
        self._write_began = 0.0  # 0 while the loop does not write
        self._loop_lock = threading.Lock()  # for _loop_thread and _write_began
        self._write_seen = threading.Event()  # there was a write since the thread that stands by last looked
        self._drain_until = 0.0
        self._ended = threading.Event()
        self._look_after_at = 0.0
        self._accepts = False
        self._listeners = listeners(self)
        trigger = self._listeners[0].trigger
        self.selector.register(trigger.socket, EVENT_READ, lambda _: trigger.handle_read())
        self.port = self._listeners[0].effective_port  # which the system has chosen if 0 was asked for
        self.environ = {  # what all requests have in common: PEP 3333
            "SCRIPT_NAME": settings.prefix,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": str(self.port),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def run(self) -> None:
        """Serve until one of STOP_SIGNALS comes, which all threads have to block; let the requests in flight finish."""
        run_gets, run_probes = partial(self._run_all, self._gets), partial(self._run_all, self._probes)
        for work in [run_gets] * self.settings.threads + [run_probes] + [self._take_turns] * 2:  # the loop is last
            threading.Thread(target=work, daemon=True).start()
        signal.sigwait(STOP_SIGNALS)
        self.stopping = True
        self.wake()
        self._ended.wait()

    def add(self, request: "Request") -> None:
        """Take a request that has come in whole."""
        if request.method != "POST":
            (self._probes if request.path.endswith(("/healthz", "/metrics")) else self._gets).put(request)
        elif request.held > SMALL_BYTES or "HTTP_CONTENT_ENCODING" in request.headers:
            self._slow_posts.append(request)
        else:
            self._posts.append(request)

    def finish(self, request: "Request") -> None:
        """Take a request that has its answer. Any thread may call this."""
        self._answered.append(request)
        if threading.get_ident() != self._loop_thread and not self._wake_pending:
            self.wake()

    def require_room(self, request: "Request") -> None:
        """Raise Problem if a request holds many bytes of its body, and all together hold too many.

        Requests without a known client have a limit of their own.
        """
        if request.held > SMALL_BYTES:
            all_requests = [each.request for each in self.connections if each.request]
            together = sum(each.held for each in all_requests if (each.client is None) == (request.client is None))
            if together > max(BODIES_BYTES, 4 * self.settings.max_body):
                raise Problem(503, "Too many large bodies are on their way.")

    def require_size(self, size: int) -> None:
        """Raise Problem if a body of this size in bytes is too large."""
        if size > self.settings.max_body:
            raise too_large(self.settings.max_body)

    def make_room(self) -> None:
        """Close connections whose clients do not read, as long as too much of answers is held."""
        unsent = sorted((each for each in self.connections if each.output), key=lambda each: -each.active_at)
        while sum(len(each.output) for each in unsent) > UNSENT_BYTES:
            unsent.pop().close()

    def look_after(self, now: float) -> None:
        """Close idle connections, and answer 503 where a message waits too long. The loop does this every second."""
        for each in list(self.connections):
            if not each.running and each.active_at < now - IDLE_S:
                each.close()
            elif each.running and each.request.method == "POST" and each.request.arrived_at + BUSY_TIMEOUT_S < now:
                each.request.give_up()

    def _take_turns(self) -> None:
        me = threading.get_ident()
        with self._loop_lock:
            self._loop_thread = self._loop_thread or me
        while not self._ended.is_set():
            run_safely(self._turn if self._loop_thread == me else self._stand_by)

    def _turn(self) -> None:
        self._wake_pending = False
        self._send_answers()
        self._watch_listeners()
        for ready, events in self._select():
            ready.data(events)
        now = time.monotonic()
        if now > self._look_after_at:
            self._look_after_at = now + 1
            self.look_after(now)
        if self.stopping:
            self._drain()
        while self._posts and time.monotonic() < now + GATHER_S:
            self._posts.popleft().run()
        if self._slow_posts:
            self._slow_posts.popleft().run()
        self._send_answers()
        self.store.statistics.tell()
        if self.store.queue:
            self._write()  # if that took longer than STUCK_S, the other thread is the loop now

    def _select(self) -> list:
        """Wait for something to do, at most a second.

        A client that has its answer often sends again at once. To sleep and be woken takes longer than that. So for
        AWAKE_S the loop only yields the processor: with one connection, 2,480 messages a second in place of 2,230.
        """
        busy, awake_until = self._posts or self._slow_posts, time.monotonic() + AWAKE_S
        while not (ready := self.selector.select(0)) and not busy and time.monotonic() < awake_until:
            os.sched_yield()
        if not ready and not busy:
            ready = self.selector.select(0.1 if self.stopping else 1)
        return ready

    def _watch_listeners(self) -> None:
        """Let the selector tell of new clients as long as there is room for them."""
        accepts = len(self.connections) < self._listeners[0].adj.connection_limit and not self.stopping
        if accepts != self._accepts:
            self._accepts = accepts
            if not accepts and not self.stopping:
                log.warning("%d connections are open: others wait until one is closed", len(self.connections))
            for listener in self._listeners:
                if accepts:
                    self.selector.register(listener.socket, EVENT_READ, partial(accept_all, listener))
                else:
                    self.selector.unregister(listener.socket)

    def _send_answers(self) -> None:
        while self._answered:
            request = self._answered.popleft()
            request.connection.answer(request)

    def _write(self) -> None:
        self._write_began = time.monotonic()
        if not self._write_seen.is_set():
            self._write_seen.set()
        self.store.write()
        with self._loop_lock:
            if self._loop_thread == threading.get_ident():
                self._write_began = 0.0

    def _stand_by(self) -> None:
        """Become the loop if the thread that is the loop takes too long to write."""
        self._write_seen.wait()
        self._write_seen.clear()
        time.sleep(STUCK_S)
        with self._loop_lock:
            if self._write_began:
                self._write_seen.set()
                if time.monotonic() > self._write_began + STUCK_S:
                    self._loop_thread, self._write_began = threading.get_ident(), 0.0

    def _drain(self) -> None:
        """Take no more connections, and end when the requests in flight have their answers, or after DRAIN_S."""
        if not self._drain_until:
            self._drain_until = time.monotonic() + DRAIN_S
            self._watch_listeners()  # before a new connection gets the number of a closed one
            for listener in self._listeners:
                accept_all(listener)
                listener.socket.close()
        elif not any(each.is_busy() for each in self.connections) or time.monotonic() > self._drain_until:
            self._ended.set()

    def _run_all(self, requests: SimpleQueue) -> None:
        while True:
            run_safely(requests.get().run)

    def wake(self) -> None:
        """Let the loop begin a turn. Any thread may call this."""
        self._wake_pending = True
        self._listeners[0].trigger.pull_trigger()


def run_safely(work: Callable, *arguments: Any) -> None:
    """Run something for a thread that has to go on whatever happens: without it the service would only look alive."""
    try:
        work(*arguments)
    except Exception:
        with contextlib.suppress(Exception):  # there may be no memory left to say so
            log.exception("the server failed")


# ==================== In place of waitress 3.0.2: how HTTP is read and written ====================

# RFC 9112, 2 to 5. Possessive quantifiers take one pass; waitress's expressions take 29 s for 16 KB of `GET a://111…`.
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
FIELD_LINE = rb"%b:[\t -~\x80-\xff]*+\r\n" % TOKEN
HEAD = re.compile(rb"(%b) ([!-~]++) HTTP/1\.([01])\r\n((?:%b)*+)" % (TOKEN, FIELD_LINE))
HOST = rb"(?:\[[0-9A-Fa-f:.]++\]|[A-Za-z0-9._~!$&'()*+,;=%-]*+)(?::[0-9]*+)?"
HOST_FIELD = re.compile(HOST)
TARGET = re.compile(rb"(?:https?://(?![:/?])%b|(?=[/*]))(\*|/[^?#]*+)?(?:\?([^#]*+))?" % HOST, re.IGNORECASE)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*+;[\t -~\x80-\xff]*+)?\r\n")
TRAILER_LINE = re.compile(FIELD_LINE)
MAX_LINE_BYTES = 1024  # of a chunk or a trailer
RECEIVE_BYTES = 65_536
http_date = lru_cache(maxsize=1)(formatdate)


def listeners(server: Server) -> list[BaseWSGIServer]:
    """Return waitress's listening sockets; OSError or ValueError if it cannot listen there."""
    listen = server.settings.listen
    where = {"listen": listen}
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as other, contextlib.suppress(OSError):
            other.connect(path)
            raise ValueError("another process listens there")  # waitress would take its place
        # Any user may connect: tokens decide who may come in, and the proxy in front mostly runs as another user.
        where = {"unix_socket": path, "unix_socket_perms": "666"}
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = 64 + 3 * server.settings.threads  # each thread that reads opens the database, its WAL and its -shm
    limit = CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, files - spare))
    sockets: dict[int, Any] = {}
    create_server(server.app, map=sockets, _dispatcher=server, connection_limit=limit, **where)
    return [each for each in sockets.values() if isinstance(each, BaseWSGIServer)]


def accept_all(listener: BaseWSGIServer, _: int = EVENT_READ) -> None:
    """Accept all who wait. waitress accepts one in a turn of its loop, so that the 256th waited for a second."""
    try:
        server = listener.task_dispatcher  # as listeners() has set it
        while len(server.connections) < listener.adj.connection_limit:
            sock, address = listener.socket.accept()
            listener.set_socket_options(sock)
            Connection(server, sock, listener.fix_addr(address)[0])
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            log.warning("no connection can be accepted: %s", error)
            time.sleep(0.1)  # or the loop would try without a pause


class Connection:
    """A client's connection. Its requests are run one after the other; while one is run, nothing more is read.

    In waitress, threads would share its buffers. There, an answer over 1 MiB becomes a temporary file. Over 16 MiB, a
    thread waits for the client.
    """

    def __init__(self, server: Server, sock: socket.socket, address: str):
        self.server = server
        self.socket = sock
        self.address = address
        self.connected = True
        self.active_at = time.monotonic()
        self.request: Request | None = None  # whose body is awaited, or that is run
        self.running = False
        self.output = bytearray()  # what the client has not taken yet
        self._input = b""  # what has not been parsed yet
        self._lingers = False  # after the last answer
        self._ended = False  # will the client send no more?
        self._discarded = 0  # bytes
        self._watched = 0  # events
        sock.setblocking(False)
        server.connections.add(self)
        self._watch()

    def _wants_input(self) -> bool:
        return self.connected and not self._ended and (self._lingers or not (self.running or self.output))

    def _watch(self) -> None:
        """Let the selector tell when something can be done here."""
        events = EVENT_READ * self._wants_input() | EVENT_WRITE * bool(self.output)
        if events != self._watched:
            if self._watched:
                self.server.selector.unregister(self.socket)
            if events:
                self.server.selector.register(self.socket, events, self.ready)
            self._watched = events

    def ready(self, events: int) -> None:
        """Do what the socket is ready for.

        While a request is run, it is still watched for input: to change that twice for each request would cost more
        than to ignore what comes then.
        """
        try:
            if events & EVENT_WRITE:
                self.handle_write()
            elif self._wants_input():
                self.handle_read()
            else:
                self._watch()
        except Exception:
            self.close()  # or the selector would report it again and again
            raise

    def is_busy(self) -> bool:
        """Is there a request or an answer that is unfinished?"""
        return bool(self.running or self.request or self.output or (self._input and not self._lingers))

    def handle_read(self) -> None:
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                self.close()
            return
        if self._lingers:
            self._discarded += len(data)
        else:
            self.active_at = time.monotonic()
        if (not data and not self.output) or self._discarded > DISCARDED_BYTES:
            self.close()
        elif not data:  # the client has closed for sending, and waits for the rest of its answer
            self._ended = True
        elif not self._lingers:
            self._input += data
            self._parse_input()

    def _parse_input(self) -> None:
        """Read a request as far as it has come, and let it be run when it is whole."""
        try:
            if not self.request and not self._read_head():
                return
            request, body = self.request, self.request.body
            if body:
                self._input = body.take(self._input)
                request.held = body.held
                self.server.require_size(request.held)
                self.server.require_room(request)
                if not body.complete:
                    return
                request.headers["CONTENT_LENGTH"] = str(body.held)
            request.arrived_at = time.monotonic()
            self.running = True
            self.server.add(request)
        except Problem as problem:
            self.request = self.request or Request(self)
            self.request.keeps_alive, self.request.body, self.request.held = False, None, 0
            self.request.answer = problem.answer()
            self.request.count_refusal(problem)
            self.answer(self.request)

    def _read_head(self) -> bool:
        """Read the head of a request; False if it has not come whole. Whether it may have a body is decided here."""
        self._input = self._input.lstrip(b"\r\n")  # empty lines before a request: RFC 9112, 2.2
        head, end, rest = self._input.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD_BYTES:
            raise Problem(431, f"The headers are larger than {MAX_HEAD_BYTES} bytes.")
        if not end:
            return False
        self._input, self.request = rest, Request(self)
        self.request.read_head(head + b"\r\n")
        if self.request.method != "POST":
            self.request.ignore_body()
        if self.request.body:
            self.request.client = self.server.authenticate(self.request.headers, self.request.method)
            self.request.admitted_at = time.monotonic()
            self.server.require_size(self.request.length)
            if self.request.expects_continue:
                self.output += b"HTTP/1.1 100 Continue\r\n\r\n"
                self.handle_write()
        return self.connected

    def answer(self, request: "Request") -> None:
        """Send the answer of a request, then read the next one. After the last one, close for sending, but read on.

        To close while the client still sends could destroy its answer.
        """
        if not self.connected or request is not self.request:
            return
        self._lingers = not request.keeps_alive or self.server.stopping
        status, headers, content = request.answer
        lines = [f"HTTP/1.1 {status}"]
        lines += [f"{name.title()}: {value}" for name, value in [*headers, *request.more_headers]]
        lines += ["Server: Inlet", f"Date: {http_date(int(time.time()), usegmt=True)}"]
        if request.method == "HEAD":
            content = b""
        elif not status.startswith("304"):
            lines.append(f"Content-Length: {len(content)}")
        if self._lingers or request.version == "1.0":
            lines.append("Connection: close" if self._lingers else "Connection: keep-alive")
        self.request, self.running = None, False
        if len(content) > SMALL_BYTES:
            self.server.make_room()
        self.output += "\r\n".join([*lines, "", ""]).encode("latin-1")
        self.output += content
        self.handle_write()

    def handle_write(self) -> None:
        """Send what the client takes at this moment. When that was all, read the next request."""
        try:
            sent = self.socket.send(self.output)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        del self.output[:sent]
        if sent:
            self.active_at = time.monotonic()
        if self._ended and not self.output:
            self.close()
            return
        if not self.output:
            if self._lingers:
                with contextlib.suppress(OSError):
                    self.socket.shutdown(socket.SHUT_WR)
            elif self._input and not self.request:
                self._parse_input()
        self._watch()

    def close(self) -> None:
        self.connected = False
        self.output.clear()
        self.request = None  # else the two would refer to each other
        self._watch()
        self.server.connections.discard(self)
        self.socket.close()

    def is_abandoned(self) -> bool:
        """Has the client closed its side, and sent nothing more before that? Any thread may ask."""
        try:
            return self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except (OSError, AttributeError):  # closed here
            return True


class Request:
    """A request, read strictly: what two servers in a row could understand differently is refused (RFC 9112, 11.2)."""

    method, version, path = "", "1.1", ""
    keeps_alive = True
    expects_continue = False
    length = 0  # bytes that the body will have, if the head says so
    held = 0  # bytes of it that are in memory, unpacked or not
    body: "Body | None" = None
    client: Client | None = None  # whose request it is, if it has a body
    admitted_at = 0.0  # when that was found out
    arrived_at = 0.0  # when it had come in whole
    is_put = False  # was its message put into the queue of the store?
    entry: Entry | None = None  # as long as it has no result
    answer = Problem(503, "The client has closed the connection.").answer()
    more_headers: Iterable[tuple[str, str]] = ()

    def __init__(self, connection: Connection):
        self.connection = connection
        self.headers: dict[str, str] = {}  # by their names in WSGI

    def read_head(self, head: bytes) -> None:
        """Read the request line and the headers; Problem 400 or 501."""
        match = HEAD.fullmatch(head)
        target = match and TARGET.fullmatch(match[2])
        if not target:
            raise Problem(400, "The request is not well-formed HTTP/1.1.")
        self.method, self.version = match[1].decode(), f"1.{match[3].decode()}"
        self.path, self.query = unquote_to_bytes(target[1] or b"/").decode("latin-1"), (target[2] or b"").decode()
        headers = self.headers
        for line in match[4].split(b"\r\n")[:-1]:
            name, _, value = line.partition(b":")
            if key := wsgi_name(name):
                text = value.strip(b" \t").decode("latin-1")
                headers[key] = f"{headers[key]}, {text}" if key in headers else text
        if not HOST_FIELD.fullmatch(headers.get("HTTP_HOST", "" if self.version == "1.0" else " ").encode("latin-1")):
            raise Problem(400, "A request has one Host.")
        if "HTTP_CONNECTION" in headers or self.version != "1.1":
            options = {option.strip(" \t").lower() for option in headers.get("HTTP_CONNECTION", "").split(",")}
            self.keeps_alive = "close" not in options and (self.version == "1.1" or "keep-alive" in options)
        length, coding = headers.get("CONTENT_LENGTH"), headers.pop("HTTP_TRANSFER_ENCODING", None)
        if coding is not None:  # RFC 9112, 6.3
            codings = [each.strip(" \t").lower() for each in coding.split(",")]
            if length is not None or self.version == "1.0" or "" in codings or "chunked" in codings[:-1]:
                raise Problem(400, "It is not clear where the body ends.")
            if codings != ["chunked"]:
                raise Problem(501, "The only Transfer-Encoding here is chunked.")
            self.body = Body(None)
        elif length is not None:
            if len(length) > 18 or not (length.isascii() and length.isdigit()):
                raise Problem(400, "Content-Length is not a number of bytes.")
            self.length = int(length)
            self.body = Body(self.length) if self.length else None
        self.expects_continue = self.version == "1.1" and headers.get("HTTP_EXPECT", "").lower() == "100-continue"

    def ignore_body(self) -> None:
        """Leave a body unread, and the connection with it."""
        self.keeps_alive, self.body = self.keeps_alive and not self.body, None

    def run(self) -> None:
        """Run the app. The answer goes to the loop: at once, or when the message of this request has been stored."""
        waited_s = time.monotonic() - self.arrived_at
        if self.connection.request is not self or (waited_s > 1 and self.connection.is_abandoned()):
            self.connection.server.finish(self)  # nobody waits for the answer
            return
        answer = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
            answer[:] = status, headers

        try:
            content = b"".join(self.connection.server.app(self.environ(), start_response))
            status, headers = answer
            if self.is_put:
                self.more_headers = [header for header in headers if header[0].startswith(("access-control-", "vary"))]
                return
            if self.method != "HEAD":
                headers = [header for header in headers if header[0].lower() != "content-length"]
            self.answer = status, headers, content
        except Exception:
            log.exception("the app failed")
            self.answer, self.keeps_alive = Problem(500, UNKNOWN_OUTCOME).answer(), False
        self.connection.server.finish(self)

    def environ(self) -> dict[str, Any]:
        """Return the environment of WSGI (PEP 3333), with what is known of the request."""
        connection, path = self.connection, self.path
        prefix = connection.server.settings.prefix
        if (path + "/").startswith(prefix + "/"):
            path = path.removeprefix(prefix)
        environ = connection.server.environ | {
            "REQUEST_METHOD": self.method,
            "PATH_INFO": path,
            "QUERY_STRING": self.query,
            "SERVER_PROTOCOL": f"HTTP/{self.version}",
            "REMOTE_ADDR": connection.address,
            "wsgi.input": self.body.content if self.body else io.BytesIO(),
            "inlet.arrived_at": self.arrived_at,
            "inlet.is_abandoned": connection.is_abandoned,
            "inlet.put": self.put,
        }
        if time.monotonic() < self.admitted_at + 0.1:  # the token of a slow upload may have been removed meanwhile
            environ["inlet.client"] = self.client
        return environ | self.headers

    def put(self, entry: Entry, url: str) -> None:
        """Put a message into the queue of the store. Its result is the answer."""
        self.body, self.held = None, sum(map(sys.getsizeof, entry.bodies))
        self.connection.server.require_room(self)
        self.is_put, self.entry, self.url, entry.then = True, entry, url, self.entry_changed
        self.connection.server.store.put(entry)

    def count_refusal(self, problem: Problem) -> None:
        """Count a refusal that the app has not seen, and let pages of other origins read it."""
        path, origin = self.path, self.headers.get("HTTP_ORIGIN")
        server = self.connection.server
        if origin and origin in server.settings.cors.split(","):
            self.more_headers = [("Access-Control-Allow-Origin", origin), ("Vary", "Origin")]
        stream = path[1:] if path[1:] in server.store.schema.streams else ""
        client = self.client.name if self.client else ""
        server.store.statistics.answered(stream, problem.status, client, problem.detail, path)

    def give_up(self) -> None:
        """Answer that the outcome is unknown. Only the loop calls this."""
        problem = storage_problem(TimeoutError())
        if self.entry:
            self.connection.server.store.withdraw(self.entry)
            self.entry = None
        self.answer = problem.answer()
        self.count_refusal(problem)
        self.connection.answer(self)

    def entry_changed(self) -> None:
        """Take note that the entry has its result, or that nobody writes. The store calls this in any thread."""
        entry = self.entry
        if entry and entry.result:
            self.entry = None  # else the two would refer to each other
            self.answer = answer_to(entry, self.url)
            detail = entry.result.detail if isinstance(entry.result, Problem) else ""
            statistics = self.connection.server.store.statistics
            statistics.answered(entry.stream.name, int(self.answer[0][:3]), entry.client, detail)
            self.connection.server.finish(self)
        else:
            self.connection.server.wake()


class Body:
    """The body of a request as it comes in: length bytes, or chunks if that is None (RFC 9112, 6 and 7.1)."""

    def __init__(self, length: int | None):
        self.content = io.BytesIO()
        self.held = 0  # bytes
        self.complete = False
        self._left = length or 0  # bytes of the chunk
        self._next = "size" if length is None else "end of body"
        self._line = b""
        self._trailer_bytes = 0

    def take(self, data: bytes) -> bytes:
        """Take in what belongs to this body and return the rest; Problem 400 if a chunk is malformed."""
        while data and not self.complete:
            if self._left:
                piece, data = data[: self._left], data[self._left :]
                self._left -= len(piece)
                self.held += self.content.write(piece)
                self.complete = not self._left and self._next == "end of body"
            else:
                piece, end, data = data.partition(b"\n")
                self._line += piece + end
                if len(self._line) > MAX_LINE_BYTES:
                    raise Problem(400, "A line between the chunks of the body is too long.")
                if end:
                    self._take_line(self._line)
                    self._line = b""
        if self.complete:
            self.content.seek(0)
        return data

    def _take_line(self, line: bytes) -> None:
        if self._next == "size" and (size := CHUNK_LINE.fullmatch(line)):
            self._left = int(size[1], 16)
            self._next = "end of chunk" if self._left else "trailer"
        elif self._next == "end of chunk" and line == b"\r\n":
            self._next = "size"
        elif self._next == "trailer" and line == b"\r\n":
            self.complete = True
        elif self._next != "trailer" or not TRAILER_LINE.fullmatch(line):
            raise Problem(400, "The chunks of the body are malformed.")
        self._trailer_bytes += len(line) if self._next == "trailer" else 0
        if self._trailer_bytes > MAX_HEAD_BYTES:
            raise Problem(431, f"The trailers are larger than {MAX_HEAD_BYTES} bytes.")


@lru_cache(maxsize=1024)
def wsgi_name(header: bytes) -> str:
    """Return the name that WSGI has for a header; empty if it has a "_", which stands for "-" there."""
    name = header.decode().upper().replace("-", "_")
    return "" if b"_" in header else name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"


# ==================== migrate and backup ============================================================

SHOWN_IDS = 20


class BrokenRules(Exception):
    """Old messages break a new rule. The text names the rules and the ids, a line for each rule."""


def migrate(database: Database, schema: Schema) -> list[str]:
    """Give a database the tables of schema.sql, in one transaction, and return what was changed.

    A table that differs is made anew and its columns are copied; what is generated computes itself. Ids stay as they
    are, and used ones stay used. Raises BrokenRules or SetupError, having changed nothing.
    """
    with database.to_migrate(schema) as db:
        db.execute("PRAGMA foreign_keys = OFF")  # they are checked at the end
        db.execute("BEGIN IMMEDIATE")
        changes = [text for text, _ in differences(db, schema)]
        broken = Migration(db, schema).run()
        if broken:
            raise BrokenRules("\n".join(broken))  # and the connection, when it is closed, rolls back
        db.execute("COMMIT")
        checkpoint(db)
        return changes


class Migration:
    """One run of migrate, inside of its transaction. What a SELECT 1 does not find is looked for again on a cluster."""

    def __init__(self, db: sqlite3.Connection, schema: Schema):
        self._db = db
        self._schema = schema
        self._broken: dict[tuple[str, str], list[int]] = {}  # ids by (table, rule)

    def run(self) -> list[str]:
        """Change the database, and return the rules that rows break, a line for each."""
        old, new = schema_objects(self._db), self._schema.objects
        gone = leftovers(self._db, self._schema)
        tables = [name for kind, name in new if kind == "table" and (kind, name) in old]
        rebuilt = [name for name in tables if rules_for_rows(old, name) != rules_for_rows(new, name)]
        for each in (each for each in gone if each.kind == "table"):
            if self._db.execute(f"SELECT 1 FROM {quoted(each.name)}").fetchone():
                (count,) = self._db.execute(f"SELECT count(*) FROM {quoted(each.name)}").fetchone()
                left = f"the table {each.name} is not in the schema and holds {count} messages"
                raise SetupError(f"{left}: put it back, or drop it by hand")
            self._drop_keeping_used_ids(each.name)
        for key, each in old.items():  # drop what is gone, changed, or on a rebuilt table; made again below
            changed = each in gone or (key in new and not new[key].same_as(each))
            if each.kind != "table" and (changed or each.table in rebuilt):
                self._db.execute(f"DROP {each.kind} IF EXISTS {quoted(each.name)}")  # a view takes its triggers along
        for name in rebuilt:
            self._rebuild(old["table", name], new["table", name])
        if not self._broken:
            for key, each in new.items():
                if key not in schema_objects(self._db):  # looked up each time: FTS5 makes tables with its own
                    self._db.execute(each.sql)
                    spelling = "UPDATE sqlite_sequence SET name = ?1 WHERE name = ?1 COLLATE NOCASE"
                    self._db.execute(spelling, (each.name,))  # what AUTOINCREMENT knows, in another case
            for statement in self._schema.statements:
                if normal(statement)[0] == "insert":
                    self._db.execute(statement)
            for name in (name for kind, name in new if kind == "table"):
                for table, rowid, parent, _ in self._db.execute(f"PRAGMA foreign_key_check({quoted(name)})"):
                    self._broken.setdefault((table, f"FOREIGN KEY to {parent}"), []).append(rowid)
        lines = []
        for (table, rule), ids in self._broken.items():
            more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
            lines.append(f"{table}: {len(ids)} broke {rule!r}: ids {', '.join(map(str, ids[:SHOWN_IDS]))}{more}")
        return lines

    def _rebuild(self, old: SchemaObject, new: SchemaObject) -> None:
        """Copy the rows of a table to one without constraints, make the table anew, and copy them back.

        (To rename the old table would change what refers to it.)
        """
        db, copy = self._db, quoted(f"{old.name} before migrate")
        if normal(new.sql)[1] == "virtual":
            raise SetupError(
                f"the virtual table {new.name} has changed: drop it with sqlite3, migrate, and fill it again"
            )
        before, had_rowid = columns_of(db, old.name), self._has_rowid(old.name)
        show(f"copying {old.name}")
        rowid = '_rowid_ AS "rowid before migrate", ' if had_rowid else ""
        db.execute(f"CREATE TABLE {copy} AS SELECT {rowid}* FROM {quoted(old.name)}")
        self._drop_keeping_used_ids(old.name, new.name)
        db.execute(new.sql)
        for (kind, _), index in self._schema.objects.items():
            if (kind, index.table) == ("index", fold(new.name)) and index.unique:
                db.execute(index.sql)
        after = columns_of(db, new.name)
        kept = {name: column for name, column in after.items() if name in before and column["hidden"] <= 1}
        for name, column in before.items():
            data = f"SELECT 1 FROM {copy} AS c WHERE c.{quoted(column['name'])} IS NOT NULL"
            if name not in kept and column["hidden"] <= 1 and db.execute(data).fetchone():
                raise SetupError(
                    f"table {new.name}: the column {name} holds data: put it back, or empty it with sqlite3"
                )
        into = [quoted(column["name"]) for column in kept.values()]
        values = [f"c.{quoted(before[name]['name'])}" for name in kept]
        has_integer_key = any(column["pk"] and column["type"].upper() == "INTEGER" for column in after.values())
        if had_rowid and not has_integer_key and self._has_rowid(new.name):  # an integer key is the rowid
            into, values = [*into, "_rowid_"], [*values, 'c."rowid before migrate"']
        insert = f"INSERT INTO {quoted(new.name)} ({', '.join(into)}) SELECT {', '.join(values)} FROM {copy} AS c"
        try:
            db.execute(f"{insert} ORDER BY c.rowid")
        except sqlite3.Error as error:
            self._require_transaction(error)
            self._name_broken_rows(new.name, insert, copy, 'c."id"' if "id" in before else "c.rowid")
        db.execute(f"DROP TABLE {copy}")

    def _name_broken_rows(self, table: str, insert: str, copy: str, message_id: str) -> None:
        """Copy row by row, and note which rows break which rule."""
        for rowid, row_id in self._db.execute(f"SELECT c.rowid, {message_id} FROM {copy} AS c").fetchall():
            try:
                self._db.execute(f"{insert} WHERE c.rowid = ?", (rowid,))
            except sqlite3.Error as error:
                self._require_transaction(error)
                rule = self._schema.sentences.get(fold(str(error)), str(error))
                self._broken.setdefault((table, rule), []).append(row_id)

    def _require_transaction(self, error: sqlite3.Error) -> None:
        """Raise the error, unless it is a broken rule and the transaction is still open."""
        if not self._db.in_transaction or error.sqlite_errorname in ("SQLITE_FULL", "SQLITE_NOMEM"):
            raise error

    def _has_rowid(self, table: str) -> bool:
        """Has a table a rowid? https://www.sqlite.org/rowidtable.html"""
        with contextlib.suppress(sqlite3.OperationalError):
            return bool(self._db.execute(f"SELECT _rowid_ FROM {quoted(table)} LIMIT 0"))
        return False

    def _drop_keeping_used_ids(self, table: str, new_name: str = "") -> None:
        """Drop a table, but keep what AUTOINCREMENT knows of it: https://www.sqlite.org/autoinc.html"""
        # Renamed, and not read and inserted: on a cluster, ids are used meanwhile.
        rename, kept = "UPDATE sqlite_sequence SET name = ? WHERE name = ?", f"{table} before migrate"
        self._db.execute(rename, (kept, table))
        self._db.execute(f"DROP TABLE {quoted(table)}")
        self._db.execute(rename, (new_name or table, kept))


def rules_for_rows(objects: Objects, table: str) -> tuple:
    """Return what decides whether a table can hold a row: its CREATE, and those of its UNIQUE indexes."""
    mine = [made for (kind, _), made in objects.items() if (kind, made.table) == ("index", table) and made.unique]
    return normal(objects["table", table].sql), sorted(normal(index.sql) for index in mine)


def backup(database: Database, target: Path, replace: bool = False) -> None:
    """Copy a database as it is at one moment, while others write to it; SetupError if target cannot be made.

    target comes into being, or is replaced if that is allowed, only when the copy is whole and on disk.
    """
    target = target.resolve()
    for other in (f"{target}{suffix}" for suffix in ("-wal", "-shm", "-journal", "-lock")):
        if os.path.lexists(other):
            raise SetupError(f"{target} is in use, or {other} was left behind: remove that first")
    if target.is_dir():
        raise SetupError(f"{target} is a folder: backup takes the path of a file")
    taken = SetupError(f"{target} is there already: take another name, or --replace it")
    if target.exists() and (not replace or str(target) == str(database)):
        raise taken
    try:
        fd, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent)
        os.close(fd)
    except OSError as error:
        raise SetupError(f"{target} cannot be written: {error}") from None
    partial = Path(name)
    try:
        database.copy_to(name)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(target) if replace else os.link(partial, target)  # which fails if it has been made meanwhile
        sync_directory(target.parent)
    except FileExistsError:
        raise taken from None
    finally:
        partial.unlink(missing_ok=True)


def show(progress: str) -> None:
    """Show how far something is, on a terminal."""
    if sys.stderr.isatty():
        print(progress, file=sys.stderr, flush=True)


# ==================== The command line ==============================================================

COMMANDS = """commands:
  (none)                serve
  client add NAME       make a client, or one more token for it, and print the token, once, alone on stdout
  client list           print the clients: name, the beginning of the token's digest, when it was made, grants, scheme
  client remove NAME [DIGEST]  remove a client, or one token by the beginning of its digest; it stops within a second
  migrate               rebuild what schema.sql has changed; if old messages break a new rule, say which
  backup PATH           write a consistent copy of the database, while the service runs

A flag overrides the environment variable named beside it.
Exit status: 0 done, 1 not done (the line on stderr says why), 2 wrong usage or configuration."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors that are one clear line."""

    def error(self, message: str) -> None:
        self.exit(2, f"inlet: {message} (--help tells more)\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line; its --help is the reference."""
    about = "Takes in JSON messages over HTTP and files each one as a row in SQLite."
    as_it_stands = argparse.RawDescriptionHelpFormatter
    top = OneLineParser("service.py", description=about, epilog=COMMANDS, formatter_class=as_it_stands)
    top.add_argument("command", nargs="*", metavar="COMMAND", help="what to do, see below; to serve if left out")
    for each in fields(Settings):
        default = each.default.name if each.name == "schema" else each.default
        text = f"{each.metadata['takes']}; INLET_{each.name.upper()}, {default or 'none'}"
        top.add_argument(each.metadata["flag"], metavar="VALUE", help=text)
    grants = "what client add grants: write, read, write:STREAM, read:STREAM; those of NAME, or write read"
    top.add_argument("--can", nargs="+", metavar="GRANT", help=grants)
    signs = f"client add: the sender signs its messages, by one of {', '.join(SCHEMES)}; prints its secret"
    top.add_argument("--signs", metavar="SCHEME", choices=SCHEMES, help=signs)
    top.add_argument("--secret", metavar="-", choices="-", help="client add --signs: read the secret from stdin")
    top.add_argument("--replace", action="store_true", help="let backup replace a file")
    top.add_argument("--version", action="version", version=f"Inlet {__version__}")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = parser().parse_intermixed_args(arguments)
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        settings = settings_from(vars(options))
        database = database_at(settings.database)
        match options.command:
            case []:
                serve(settings, database)
            case ["client", *words]:
                client_command(database, words, options)
            case ["migrate"]:
                changes = migrate(database, read_schema(settings.schema))
                print("\n".join(changes or ["no table had changed; the INSERTs in the file were run"]))
            case ["backup", path]:
                backup(database, Path(path), options.replace)
            case words:
                raise SetupError(f"there is no command {' '.join(words)!r}, or it takes other words: --help shows them")
        return 0
    except SetupError as error:
        print(f"inlet: {error}", file=sys.stderr)
        return 2
    except BrokenRules as error:
        print(
            f"inlet: nothing was changed, because old messages break new rules (change them or the rules):\n{error}",
            file=sys.stderr,
        )
    except (sqlite3.Error, OSError) as error:
        print(f"inlet: {database}: {error}", file=sys.stderr)
    return 1


def serve(settings: Settings, database: Database) -> None:
    """Serve until SIGTERM or SIGINT."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # in all threads: run() waits for them
    token = secrets.token_urlsafe(32)
    store = Store(database, read_schema(settings.schema))
    is_new = store.open(token)
    clients = Clients(store, settings.cors)
    try:
        server = Server(
            create_app(store, clients, settings.max_body, settings.cors), settings, store, clients.authenticate
        )
    except (OSError, ValueError) as error:
        raise SetupError(f"cannot listen on {settings.listen}: {error}") from None
    host, _, port = settings.listen.rpartition(":")
    url = settings.listen if host == "unix" else f"http://{host}:{server.port}"
    print(f"Inlet {__version__} is listening on {url}", flush=True)
    if is_new:
        to = f"--unix-socket {port} http://localhost" if host == "unix" else url
        print(
            FIRST_STEPS.format(token=token, to=f"{to}{settings.prefix}/{next(iter(store.schema.streams))}"), flush=True
        )
    server.run()
    store.close()


FIRST_STEPS = """
This is the first start: the client "default" was made, and may write and read. Its token, shown only now:

{token}

Send a message:

curl -i {to} -H "Authorization: Bearer {token}" -H "Content-Type: application/json" -d '{{"hello": "world"}}'
"""


def client_command(database: Database, words: list[str], options: argparse.Namespace) -> None:
    """List the clients, or add or remove one, whatever schema.sql looks like; SetupError if that makes no sense."""
    secret = ""
    with database.alone() as db:
        db.execute("BEGIN IMMEDIATE")
        make_clients(db)
        match words:
            case ["list"]:
                listed = "c.name, substr(c.token, 1, 8), ifnull(c.made_at, 'unknown'), c.can, ifnull(c.signs, 'token')"
                for row in db.execute(f"SELECT {listed} FROM clients AS c ORDER BY c.name, c.made_at"):
                    print(*row, sep="\t")
            case ["add", name]:
                secret = add_client(db, name, options)
            case ["remove", name, *rest] if len(rest) < 2:
                digest = rest[0] if rest else ""
                tokens = "FROM clients WHERE name = ?1 AND substr(token, 1, length(?2)) = ?2"
                (count,) = db.execute(f"SELECT count(*) {tokens}", (name, digest)).fetchone()
                if rest and (not digest or count != 1):
                    raise SetupError(f"{name} has not exactly one token whose digest begins with {digest!r}")
                if not count:
                    raise SetupError(f"there is no client {name}")
                db.execute(f"DELETE {tokens}", (name, digest))
            case _:
                raise SetupError("client takes add NAME [--can GRANT …], list, or remove NAME, with --can at the end")
        db.execute("COMMIT")
    if secret:
        print(secret)


def add_client(db: sqlite3.Connection, name: str, options: argparse.Namespace) -> str:
    """Make a client and return its token, or its secret if it signs; SetupError if something makes no sense."""
    if not re.fullmatch(r"\w[\w.@-]{0,63}", name):
        raise SetupError("NAME takes up to 64 letters, digits, '.', '_', '-' and '@'")
    found = [made for made in schema_objects(db).values() if made.kind in ("table", "view")]
    streams = [made.name for made in found if made.kind == "view" or is_stream(db, made.name)]
    of_old = db.execute("SELECT c.can FROM clients AS c WHERE c.name = ? ORDER BY c.made_at DESC", (name,)).fetchone()
    can = options.can or (of_old[0].split() if of_old else ["write", "read"])
    for grant in can:
        action, colon, stream = grant.partition(":")
        if action not in ("write", "read"):
            raise SetupError(f"{grant} is no grant: they are write, read, write:STREAM and read:STREAM")
        if colon and stream not in streams:
            raise SetupError(f"there is no stream {stream}: there are {', '.join(streams)}")
    secret = secrets.token_urlsafe(32)
    if options.secret and not options.signs:
        raise SetupError("--secret is for a sender with --signs")
    if options.signs:
        scheme = SCHEMES[options.signs]
        secret = scheme.secret_prefix + base64.b64encode(secrets.token_bytes(32)).decode()
        secret = sys.stdin.readline().strip() if options.secret else secret
        try:
            long_enough = len(scheme.hmac_key(secret)) >= SHORTEST_SECRET
        except ValueError:
            long_enough = False
        if not long_enough:
            raise SetupError(f"this is not a secret of the scheme {options.signs}")
    # Older versions would accept the secret as a token if this were its plain digest.
    digest = digest_of(f"{options.signs} {secret}" if options.signs else secret)
    row = (name, digest, " ".join(can), utc_now(), options.signs, secret if options.signs else None)
    if db.execute("SELECT 1 FROM clients AS c WHERE c.token = ?", (digest,)).fetchone():
        raise SetupError("this secret is there already")
    db.execute(ADD_CLIENT, row)
    return secret


if __name__ == "__main__":
    sys.exit(main())
