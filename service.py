#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["falcon==4.4.0", "waitress==3.0.2"]
# ///
"""Inlet takes in JSON messages over HTTP and files each one as a row in SQLite.

Run it:    python service.py               (every flag: python service.py --help)
Embed it:  any WSGI server with threads, as service:application

THE SCHEMA IS THE API.  schema.sql is the only file that an owner edits. A table in it with the five message
columns (id, received_at, client, key, body) is a stream. The body is the message; the columns behind
it are generated from it. Constraints are the validation, triggers are the business logic.

ROUTES
    POST /{stream}       take one message (application/json, or a form), or many, all or none (application/x-ndjson)
    GET  /{stream}       the feed: messages in commit order, ?after=ID&limit=N&FIELD=VALUE, wait, fields, since
    GET  /{stream}/{id}  one message; /{stream}/{id}/body is its body alone
    GET  /{view}         the same for a view with the message columns; {"rows": […]} for any other view
    GET  /               the streams and views that this client may use, and the version
    GET  /healthz        can a message be written now?  (needs no token; /livez: does the process answer?)

GUARANTEES
 1. 201 is sent after the COMMIT that holds the message has been synced to disk (WAL, synchronous=FULL).
 2. The body is kept byte for byte. It is checked, but never written anew. (A form becomes JSON.)
 3. One Idempotency-Key of one client names at most one message or batch of a stream. A UNIQUE index decides, so a
    retry gets the first answer again, whatever threads, processes and crashes came between.
 4. 4xx: nothing was stored in the stream; do not retry unchanged. 5xx, no answer: outcome unknown; retry with the key.
 5. Ids grow in commit order and are not used again (but after a restore): who follows the feed's `next` misses no
    message.

LIMITS
 Linux or macOS; one SQLite file on a local disk (a network file system breaks guarantee 1), or an rqlite cluster:
 cluster/README.md.
 A body has at most --max-body bytes, as it is sent and as it is unpacked. A message is nested at most 512 deep.
 A batch has at most 10,000 messages. On the open Internet, put a web server in front: it is better with slow clients.

EXTRAS
 This file, schema.sql, falcon and waitress are the whole service. Each file in extras/ adds something, and may be
 deleted: a faster server (loop, connection, http1), senders that sign or send forms, lenient batches and other answers
 (outcomes), reads that wait for the next message (waiting), CSV and ?since (reading), /metrics, /openapi.json, the
 commands migrate and forward, a cluster (rqlite, nodes, same), the page (which needs reading).

TO CHANGE                                     SEE
 a route, or what it answers                  the app, resources
 a flag                                       settings
 what makes a table a stream                  the schema
 what a client reads when a rule refuses it   REFUSALS in the store
 how messages reach the disk                  the store, the engine
 who may come in, a header of every answer    clients
 CORS: which headers a page may read          exposed, in the app
 what the log says                            statistics
 what a POST may contain                      reading requests
 what GET takes and shows                     query_from, ViewResource, Store.page; page_sql, also in extras/rqlite.py
 the server, a command                        serving, the command line
"""

import argparse
import base64
import bisect
import contextlib
import difflib
import errno
import fcntl
import gc
import hashlib
import json
import logging
import math
import os
import re
import resource
import secrets
import signal
import socket
import sqlite3
import stat
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from itertools import accumulate, repeat
from json.encoder import encode_basestring as json_string
from operator import length_hint
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, NamedTuple, NoReturn
from urllib.parse import quote, urlencode

import falcon
from falcon.util.mediatypes import best_match

__version__ = "1.2.0"

HERE = Path(__file__).absolute().parent
log = logging.getLogger("inlet")
LINES_A_SECOND = 10  # of each kind, in the log
SHOWN = 64  # characters of a text of a client
# The extras import `service`. As `python service.py`, this module is called __main__, and would be loaded once more.
sys.modules.setdefault("service", sys.modules[__name__])


def extra(name: str) -> Any:
    """Return the module extras/NAME.py, or None if it is not there. It is loaded once, by its path."""
    module_name = f"inlet_{name}"
    if module_name not in sys.modules and (path := HERE / "extras" / f"{name}.py").is_file():
        loader = SourceFileLoader(module_name, str(path))
        module = module_from_spec(ModuleSpec(module_name, loader, origin=str(path)))
        module.__file__ = str(path)
        sys.modules[module_name] = module  # dataclasses in it look it up
        try:
            loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules.get(module_name)


def needed(name: str, what: str) -> Any:
    """Return an extra; SetupError if it is not there, though something that was asked for needs it."""
    if not (module := extra(name)):
        raise SetupError(f"{what} needs extras/{name}.py, which is not there")
    return module


class LineLimit(logging.Filter):
    """Keeps the log small, whatever clients do: LINES_A_SECOND, then their number; each CRITICAL line once a minute.

    It has no lock, because a process that forks could leave it locked in its child.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: Counter[str] = Counter()  # of this second, by kind: the text before its values are put in
        self._second_ends = 0.0
        self._told: dict[str, float] = {}  # when each critical line may come again

    def filter(self, record: logging.LogRecord) -> bool:
        self.tell()
        if not self._is_wanted(record):
            return False
        text = record.getMessage()
        if not text.isprintable():  # SQLite's words can have what a client has sent
            record.msg, record.args = repr(text), ()
        return True

    def _is_wanted(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.CRITICAL:
            self._lines[record.msg] += 1
            return self._lines[record.msg] <= LINES_A_SECOND
        text, now = record.getMessage(), time.monotonic()
        if now < self._told.get(text, now):
            return False
        self._told[text] = now + 60
        return True

    def tell(self) -> None:
        """When a second is over, log how many lines were left out in it."""
        if time.monotonic() < self._second_ends:
            return
        self._second_ends = time.monotonic() + 1
        lines, self._lines = self._lines, Counter()
        for kind, number in lines.items():
            if number > LINES_A_SECOND:
                such = re.sub("%[sd]", "...", kind)
                log.getChild("more").info("and %d more such lines: %s", number - LINES_A_SECOND, such)


line_limit = LineLimit()
log.addFilter(line_limit)


def shown(text: str, limit: int = SHOWN) -> str:
    """Return a text of a client as the log may have it: escaped, and not long."""
    return repr(text[:limit])[:limit]


# ==================== The app: which resource answers which path ====================================


def create_app(store: "Store", clients: "Clients") -> falcon.App:
    """Return the WSGI app that serves a store to its clients."""
    exposed, origins = ["Location", "Link", "Idempotent-Replayed", "Retry-After"], clients.origins
    middleware: list[Any] = [falcon.CORSMiddleware(origins, expose_headers=exposed)] if origins else []
    if page := extra("page"):
        middleware += page.middleware()
    app = falcon.App(middleware=[*middleware, clients])
    app.req_options.strip_url_path_trailing_slash = True
    app.add_route("/", RootResource(store))
    app.add_route("/healthz", HealthResource(store, clients))
    app.add_route("/livez", LiveResource())
    if metrics := extra("metrics"):
        app.add_route("/metrics", metrics.MetricsResource(store))
    if openapi := extra("openapi"):
        app.add_route("/openapi.json", openapi.OpenApiResource(store))
    waiting = extra("waiting")
    waits = waiting.Waits(store) if waiting else None
    for stream in store.schema.streams.values():
        resource = (StreamResource if stream.takes else ViewResource)(store, stream, clients.max_body, waits)
        app.add_route(f"/{stream.name}", resource)
        if stream.has_ids:
            one = f"/{stream.name}/{{message_id:int(min=1, max={MAX_ID})}}"
            app.add_route(one, resource, suffix="message")
            app.add_route(f"{one}/body", resource, suffix="body")
    app.add_error_handler((Exception, falcon.HTTPError), answer_error)
    return app


def answer_error(req: falcon.Request, resp: falcon.Response, error: Exception, params: dict) -> None:
    """Answer whatever a request raised: a refusal of ours, one of Falcon's, a read that failed, or a bug."""
    match error:
        case Problem():
            problem = error
        case falcon.HTTPNotFound():
            problem = nothing_here()
        case falcon.HTTPError():  # Falcon says 400 to methods that it does not know; RFC 9110, 15.6.2 says 501
            status = 405 if isinstance(error, falcon.HTTPMethodNotAllowed) else 501
            problem = Problem(status, "This path does not take this method.", dict(error.headers or {}))
        case sqlite3.Error() | TimeoutError():
            log.error("the database cannot be read: %s: %s", type(error).__name__, words_of(error))
            problem = Problem(503, f"{cause_of(error)} Try again.")
        case _:
            log.error("unexpected error at %s %s", shown(req.method), shown(req.path), exc_info=error)
            problem = Problem(503, f"An unexpected error. {UNKNOWN_OUTCOME}")
    req.context.detail = problem.reason
    resp.status, headers, resp.data = problem.answer()
    resp.set_headers(headers)


def nothing_here() -> "Problem":
    return Problem(404, "There is nothing at this path.")


class LazyApplication:
    """The app for other servers, made by the first request in a process.

    So importing this module touches no disk, and a server that forks before its first request (gunicorn --preload,
    uWSGI) shares nothing. A process that is forked later answers 503: SQLite keeps its locks in memory, and a child
    that has inherited them would write without a lock (https://www.sqlite.org/howtocorrupt.html, 2.6).
    """

    def __init__(self) -> None:
        self._app: falcon.App | None = None
        self._process = 0  # that makes it, or has made it
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        """A child inherits a lock as it is, and perhaps no thread that would release it."""
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        try:
            app = self._app if self._app and self._process == os.getpid() else self._make_once(environ)
        except SetupError as error:
            log.critical("%s", error)
            status, headers, content = Problem(503, "The service is not set up; its log says why.").answer()
            start_response(status, headers)
            return [content]
        return app(environ, start_response)

    def _make_once(self, environ: dict[str, Any]) -> falcon.App:
        if "uwsgi.version" in environ:
            import uwsgi  # only there inside of uWSGI

            if not {"enable-threads", "threads"} & {os.fsdecode(name) for name in uwsgi.opt}:
                raise SetupError("uWSGI runs no threads of Python: set enable-threads = true")
        if not self._lock.acquire(timeout=BUSY_TIMEOUT_S):
            raise SetupError("the database is still being opened for another request")
        try:
            if self._process not in (0, os.getpid()):
                raise SetupError("this process was forked from one that uses the database: start it anew")
            if not self._app:
                self._process = os.getpid()
                settings = parser().parse_args([])
                store = Store(database_at(settings.database), read_schema(settings.schema))
                store.open(first_token())
                self._app = create_app(store, Clients(store, settings.max_body, settings.cors))
            return self._app
        finally:
            if not self._app and self._process == os.getpid():
                self._process = 0  # it has failed
            self._lock.release()


application = LazyApplication()


# ==================== Settings ======================================================================


class SetupError(Exception):
    """The service cannot run like this. The text is one line that says what to change."""


UP_TO_65535 = r"[0-5]?\d{1,4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5]"
ORIGIN = r"https?://[^\s,/]+"
# What an owner can set by a flag --NAME, else by INLET_NAME: its default, a pattern of valid values, words for --help.
SETTINGS = {
    "listen": ("127.0.0.1:8080", rf"unix:.+|.+:({UP_TO_65535})", "HOST:PORT, [IPV6]:PORT or unix:PATH"),
    "database": ("inlet.db", ".+", "the path of the SQLite file, or http://HOST:PORT,… of rqlite"),
    "schema": (HERE / "schema.sql", ".+", "the path of the streams' file"),
    "server": ("", "loop|waitress", "loop, or waitress if extras/loop.py is not there or not wanted"),
    "threads": (8, r"[1-9]\d{0,2}", "the number of threads that read, 1 to 999"),
    "max-body": (1_048_576, r"[1-9]\d{0,8}", "the bytes of the largest body, compressed or not"),
    "cors": ("", rf"{ORIGIN}(,{ORIGIN})*", "origins whose pages may use it: https://a.example,https://b.example"),
    "prefix": ("", r"(/[\w.~-]+)+", "the path that a proxy has it under, such as /ingest"),
}


def setting(name: str, text: str) -> Any:
    """Return the value of a setting; SetupError if it makes no sense."""
    default, pattern, takes = SETTINGS[name]
    kind: Any = type(default)
    if text != str(default) and not re.fullmatch(pattern, text, re.ASCII):
        given = "" if name == "database" else f", not {text!r}"  # it can hold a password
        raise SetupError(f"--{name} ({variable(name)}) takes {takes}{given}")
    return kind(text)


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"INLET_{name.upper().replace('-', '_')}"


def secret_in(name: str) -> str:
    """Return a secret from the environment, or from the file that NAME_FILE names; empty if there is none.

    Raises SetupError if the file cannot be read.
    """
    path = os.environ.get(f"{name}_FILE", "")
    try:
        return (Path(path).read_text() if path else os.environ.get(name, "")).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{name}_FILE cannot be read: {error}") from None


def first_token() -> str:
    """Return what the owner wants as the token of `default` in a new database, or nothing; SetupError if it is none."""
    token = secret_in("INLET_TOKEN")
    if token and not re.fullmatch(r"[!-~]{16,}", token):
        raise SetupError("INLET_TOKEN takes 16 visible ASCII characters or more")
    return token


# ==================== Problems: every refusal, as RFC 9457 has it ===================================

Answer = tuple[str, list[tuple[str, str]], bytes]  # status line, headers and content, as WSGI has them
PRIVATE = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]  # in all answers but the page
RETRY_AFTER_S = 2
FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
UNKNOWN_OUTCOME = "Try again with the same Idempotency-Key: whether the message was stored is not known."


class Problem(Exception):
    """An answer other than success.

    status is the HTTP status, detail a sentence that a person can act on. members stand beside them in the JSON,
    and headers go with the answer. reason: what the log says in place of detail. Nothing in it may hold a token, a body
    or SQL. Every failure of ours is 503: many senders throw away what got 500 or 507.
    """

    def __init__(
        self, status: int, detail: str, headers: dict[str, str] | None = None, reason: str = "", **members: Any
    ):
        super().__init__(detail)
        self.status, self.detail, self.reason = status, detail, reason or detail
        self.headers = dict(headers or {})
        if status == 503:
            self.headers["Retry-After"] = str(RETRY_AFTER_S)
        self._line = falcon.code_to_http_status(status)
        self.members = {"title": self._line[4:], "status": status, "detail": detail, **members}

    def answer(self) -> Answer:
        headers = [("Content-Type", "application/problem+json"), *PRIVATE, *self.headers.items()]
        return self._line, headers, json.dumps(self.members).encode()


def cause_of(error: Exception) -> str:
    """Return a sentence about a failure of the database. https://www.sqlite.org/rescode.html"""
    name = getattr(error, "sqlite_errorname", "")
    if name in FULL:
        return "The disk is full."
    if name.startswith(DAMAGED):
        log.critical("the database is damaged (%s): stop the service, and restore a backup", error)
        return "The database is damaged, and has to be restored from a backup."
    if name.startswith("SQLITE_BUSY") or isinstance(error, TimeoutError):
        return "The database is busy."
    return "The database cannot be used at the moment."


def words_of(error: Exception) -> str:
    """Return the text of an error for the log. It leaves out what SQLite quotes from a message."""
    text = re.split(r"['\"]|\[(?!Errno|SSL)|(?<=no such column: )", str(error))[0]
    return shown(text, 200)[1:-1]  # without the quotes of repr()


def sqlite_error(error: Any) -> Any:
    """Return an error as sqlite3.Error. sqlite3 raises UnicodeDecodeError if the text of SQLite's error is not UTF-8.

    Such a text quotes a lone surrogate of a message, for example in a JSON path.
    """
    if isinstance(error, UnicodeDecodeError):
        error = sqlite3.OperationalError(bytes(error.object).decode(errors="replace"))
        error.sqlite_errorname = "SQLITE_ERROR"
    return error


def storage_problem(error: Exception) -> Problem:
    """Return what a client is told when its message could not be written."""
    return Problem(503, f"{cause_of(error)} {UNKNOWN_OUTCOME}")


# ==================== The schema, read into streams =================================================

OLDEST_SQLITE = (3, 38, 0)  # the first with ->> built in
WITHOUT_TOKEN = ("/healthz", "/livez")
RESERVED_NAMES = ("clients", "clients_version", "healthz", "livez", "metrics")
MESSAGE_COLUMNS = {
    "id": "INTEGER PRIMARY KEY",  # AUTOINCREMENT
    "received_at": "TEXT NOT NULL",
    "client": "TEXT NOT NULL",
    "key": "TEXT",
    "body": "TEXT NOT NULL",
}
# SQL that would undo more than one message, or lose one without a word: the kind of object that has it, a pattern, and
# why it is refused.
UNSAFE_RULES = (
    ("trigger", r"raise \( (?:rollback|fail|ignore)\b", "only RAISE(ABORT, 'sentence') refuses just one message"),
    ("trigger", r"(?:insert|update) or (?:rollback|fail)\b", "OR ROLLBACK and OR FAIL undo more than one message"),
    ("table", r"initially deferred\b", "a deferred foreign key cannot refuse one message; leave DEFERRED out"),
    ("table", r"on conflict\b", "ON CONFLICT in a table could drop a message behind its 201; leave it out"),
)
IN_RAISE = re.compile(r'(raise\s*\(\s*abort\s*,\s*)"(?:[^"]|"")*"', re.IGNORECASE)
# Group 1 is a token. White space and comments match too, but leave it empty.
SQL_TOKEN = re.compile(
    r"""\s+|--[^\n]*|/\*.*?(?:\*/|\Z)|('(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]|[\w$\x80-\U0010ffff]+|.)""",
    re.DOTALL,
)


def fold(name: str) -> str:
    """Return a name as SQLite compares it: only ASCII letters lose their case."""
    if name.isascii():
        return name.lower()
    return name.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")


def quoted(name: str) -> str:
    """Return a name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def in_backticks(sql: str) -> str:
    """Return SQL with names in backticks in place of double quotes, so that it fails where a name names nothing.

    In double quotes, SQLite takes such a name for a string: https://www.sqlite.org/quirks.html#dblquote. The
    sentence of a RAISE may stand in double quotes, so it is replaced first.
    """

    def renamed(token: re.Match[str]) -> str:
        if token[0][0] != '"':
            return token[0]
        return "`" + token[0][1:-1].replace('""', '"').replace("`", "``") + "`"

    return SQL_TOKEN.sub(renamed, IN_RAISE.sub(r"\1'a sentence'", sql))


def normal(sql: str) -> list[str]:
    """Return the tokens of a piece of SQL, without comments, white space, and case outside of quotes."""
    return [token if token[0] in "'\"`[" else fold(token) for token in SQL_TOKEN.findall(sql) if token]


class Column(NamedTuple):
    """A column of a table or view. definition: its type, PRIMARY KEY and NOT NULL, as far as it has them."""

    name: str
    definition: str
    can_be_empty: int  # by an INSERT that does not name it
    is_hidden: int
    is_generated: int
    has_type: int  # does a value in it always have one type?


def columns_of(db: sqlite3.Connection, table: str) -> dict[str, Column]:
    """Return the columns of a table or view by their folded names."""
    rows = db.execute(  # https://www.sqlite.org/pragma.html#pragma_table_xinfo
        """SELECT x.name, upper(x.type) || iif(x.pk, ' PRIMARY KEY', iif(x."notnull", ' NOT NULL', '')),
            NOT x."notnull" OR x.dflt_value IS NOT NULL OR x.pk, x.hidden > 0, x.hidden > 1,
            upper(x.type) NOT IN ('', 'ANY', 'BLOB')
        FROM pragma_table_xinfo(?, 'main') AS x ORDER BY x.cid""",
        (table,),
    )
    return {fold(row[0]): Column(*row) for row in rows}


class SchemaObject(NamedTuple):
    """A table, index, trigger or view: its type, its name, the table that it belongs to (folded), its CREATE."""

    kind: str
    name: str
    table: str
    sql: str

    @property
    def words(self) -> list[str]:
        """What the CREATE says, however it is written."""
        return normal(self.sql)

    @property
    def checks_json(self) -> bool:
        return "check ( json_valid ( body ) )" in self.unquoted

    @property
    def unquoted(self) -> str:
        """Its words, without quoted names and texts."""
        return " ".join(word for word in self.words if word[0] not in "'\"`[")

    @property
    def is_unique(self) -> bool:
        return self.words[1] == "unique"

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
    """What has a route: a table that takes messages, or a view. A view without the message columns is a report.

    fields: the columns to filter by, and whether each has a type. has_ids: it is a feed. id_place: which column of a
    page is the id, by which it is ordered; a report can have none. sources: the tables that it reads. has_answer: the
    generated column `answer` is what a message is answered with. checks_json: it has CHECK (json_valid(body)).
    """

    name: str
    fields: dict[str, bool]
    takes: bool = True
    has_ids: bool = True
    has_headers: bool = False
    has_answer: bool = False
    id_place: int | None = 0
    sources: frozenset[str] = frozenset()
    checks_json: bool = False

    @cached_property
    def insert(self) -> str:
        """The SQL that inserts a message: received_at, client, key, body, and headers if the table has them."""
        if self.has_headers:
            return f'INSERT INTO "{self.name}" (received_at, client, key, body, headers) VALUES (?, ?, ?, ?, ?)'
        return f'INSERT INTO "{self.name}" (received_at, client, key, body) VALUES (?, ?, ?, ?)'

    def selected(self, with_fields: bool = False) -> list[str]:
        """Return the SQL of what a page has of a row t: id, received_at, client, key, body in bytes, headers if it has
        them, and its fields if they are wanted. A report has fields only.
        """
        fields = [f"t.{quoted(name)}" for name in self.fields]
        if not self.has_ids:
            return fields
        return self._of_message + fields if with_fields else self._of_message

    @cached_property
    def _of_message(self) -> list[str]:
        """A feed view can have anything in its columns: they are made what they should be."""
        columns = ["t.id", "t.received_at", "t.client", "t.key", "CAST(t.body AS BLOB)"]
        if not self.takes:
            received_at, client = "CAST(ifnull(t.received_at, '') AS TEXT)", "CAST(ifnull(t.client, '') AS TEXT)"
            columns = ["CAST(t.id AS INTEGER)", received_at, client, "CAST(t.key AS TEXT)", text_as_json("t.body")]
        return [*columns, text_as_json("t.headers")] if self.has_headers else columns

    @cached_property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """The parameters of GET that are no fields, with the range of each number. `since` is a time."""
        if self.has_ids:
            since = {"since": (0, 0)} if extra("reading") else {}
            pages = {"after": (0, MAX_ID), "limit": (1, LARGEST_PAGE)}
            return pages | {"wait": (0, LONGEST_WAIT_S), "fields": (0, 1)} | since
        after = {} if self.id_place is None else {"after": (-MAX_ID - 1, MAX_ID)}
        return after | {"limit": (1, LARGEST_PAGE)}

    @property
    def explain(self) -> tuple[str, tuple]:
        """The SQL that compiles the insert, with its triggers and foreign keys, or the view; and values for it."""
        if not self.takes:
            return f"EXPLAIN SELECT * FROM {quoted(self.name)}", ()
        return f"EXPLAIN {self.insert}", (None,) * self.insert.count("?")


def text_as_json(column: str) -> str:
    """Return the SQL of a column as JSON: what is no JSON becomes a string. What else it takes: only_json_valid()."""
    text = f"CAST({column} AS TEXT)"
    return f"iif(json_valid({text}) AND NOT instr({text}, char(0)), {text}, json_quote({text}))"


@dataclass(frozen=True)
class Schema:
    """All that schema.sql says."""

    path: Path
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
            streams = [stream_from(db, table, strict[fold(table.name)]) for table in tables]
            streams += [view_from(db, made) for made in objects.values() if made.kind == "view"]
            refuse_names_of_nothing(text, filter(None, streams))
        except SetupError as error:
            raise SetupError(f"{path}: {error}") from None
        sentences = dict(pair for table in tables for pair in sentences_of(db, table))
    by_name = {stream.name: stream for stream in streams if stream}
    if not any(stream.takes for stream in by_name.values()):
        raise SetupError(f"{path}: no table has the columns of a stream ({', '.join(MESSAGE_COLUMNS)})")
    return Schema(path, by_name, statements, objects, sentences)


def run_script(db: sqlite3.Connection, text: str, rewritten: Callable[[str], str] = str) -> list[str]:
    """Run schema.sql in an empty database and return its statements; SetupError names the line that fails.

    rewritten: what is run in place of a CREATE.
    """
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
            db.execute(rewritten(pending) if words[0] == "create" else pending)
        except sqlite3.Error as error:
            hint = ": the name of a member has single quotes" if "generated column loop" in str(error) else ""
            raise SetupError(f"{where}: {error}{hint}") from None
        if db.execute("SELECT 1 FROM sqlite_temp_schema").fetchone():
            raise SetupError(f"{where}: only CREATE (not TEMP) and INSERT may stand here")
        if words[0] == "insert" and not adds_nothing(db, pending):
            raise SetupError(f"{where}: each migrate runs this again: use INSERT OR IGNORE and a key")
        statements.append(pending)
        line, pending = line + pending.count("\n"), ""
    return statements


def refuse_names_of_nothing(text: str, streams: Iterable[Stream]) -> None:
    """Raise SetupError for a name in double quotes that names nothing: a rule with it would hold for every message."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        try:
            run_script(db, text, in_backticks)
            for stream in streams:
                db.execute(*stream.explain)
        except (sqlite3.Error, SetupError) as error:
            hint = "in double quotes, SQLite takes it for a text if it names nothing; write a text in single quotes"
            raise SetupError(f"{error}: {hint}") from None


def adds_nothing(db: sqlite3.Connection, insert: str) -> bool:
    """Does an INSERT that has been run add nothing when it is run again?"""
    changes = db.total_changes
    with contextlib.suppress(sqlite3.Error):
        db.execute(insert).fetchall()
        return db.total_changes == changes
    return False


def refuse_unsafe_rules(made: SchemaObject) -> None:
    """Raise SetupError for what cannot be kept to one message, and for what belongs to the service."""
    if fold(made.name) in ("clients", "clients_version"):
        raise SetupError(f"{made} belongs to the service, which makes it: take it out of this file")
    for kind, pattern, reason in UNSAFE_RULES:
        if made.kind == kind and re.search(rf"\b{pattern}", made.unquoted):
            raise SetupError(f"{made}: {reason}")


def stream_from(db: sqlite3.Connection, table: SchemaObject, is_strict: bool) -> Stream | None:
    """Return the stream that a table is, or None; SetupError says what an almost-stream lacks."""
    columns, almost = columns_of(db, table.name), f"{table} is almost a stream"
    if len(columns.keys() & MESSAGE_COLUMNS.keys()) < 3:
        return None
    for name, definition in MESSAGE_COLUMNS.items():
        if name not in columns or columns[name].definition != definition or columns[name].is_hidden:
            raise SetupError(f"{almost}: it needs the column {name} {definition}")
    if "autoincrement" not in table.words:
        raise SetupError(f"{almost}: its id needs AUTOINCREMENT, or ids could be used again")
    if not is_strict:
        raise SetupError(f"{almost}: it must end with STRICT, as in CREATE TABLE {table.name} (…) STRICT")
    headers = columns.pop("headers", None)
    if headers and (headers.definition != "TEXT" or headers.is_hidden):
        raise SetupError(f"{table}: its column headers must be headers TEXT")
    fields = {column.name: bool(column.has_type) for column in columns.values() if column.is_generated}
    has_answer = "answer" in columns and bool(columns["answer"].is_generated)
    stream = Stream(
        table.name,
        fields,
        has_headers=bool(headers),
        has_answer=has_answer,
        sources=frozenset([fold(table.name)]),
        checks_json=table.checks_json,
    )
    require_route(table, columns, stream)
    for name, column in columns.items():
        if not (name in MESSAGE_COLUMNS or column.is_generated or column.can_be_empty):
            raise SetupError(f"{table}: nothing can fill the column {name}; generate it from the body")
    require_insert(db, table, stream)
    return stream


def require_insert(db: sqlite3.Connection, table: SchemaObject, stream: Stream) -> None:
    """Raise SetupError if no message can be inserted, or if no UNIQUE index holds a key to one message.

    SQLite itself says whether there is such an index: it compiles an ON CONFLICT only if there is.
    """
    sql, values = stream.explain
    try:
        db.execute(sql, values)
    except sqlite3.Error as error:
        raise SetupError(f"{table} can take no message: {error}") from None
    by_key = "ON CONFLICT (client COLLATE BINARY, key COLLATE BINARY) WHERE key IS NOT NULL DO NOTHING"
    try:
        db.execute(f"{sql} {by_key}", values)
    except sqlite3.Error:
        index = f"CREATE UNIQUE INDEX {table.name}_key ON {table.name} (client, key) WHERE key IS NOT NULL"
        raise SetupError(f"{table} is almost a stream: it lacks its index, {index}") from None


def view_from(db: sqlite3.Connection, view: SchemaObject) -> Stream | None:
    """Return what a view has to show, or None if its name begins with _; SetupError if it cannot be read."""
    read: set[str] = set()

    def note(action: int, table: str | None, *_: Any) -> int:  # https://www.sqlite.org/c3ref/set_authorizer.html
        if action == sqlite3.SQLITE_READ and table:
            read.add(fold(table))
        return sqlite3.SQLITE_OK

    try:
        db.set_authorizer(note)
        db.execute(f"EXPLAIN SELECT * FROM {quoted(view.name)}")  # there is no table clients here, so none may be read
    except sqlite3.Error as error:
        raise SetupError(f"{view}: {error}") from None
    finally:
        db.set_authorizer(None)
    if view.name.startswith("_"):
        return None
    columns = columns_of(db, view.name)
    has_ids = columns.keys() >= MESSAGE_COLUMNS.keys()
    id_place = list(columns).index("id") if "id" in columns else None
    of_message = {*MESSAGE_COLUMNS, "headers"} if has_ids else set()
    fields = {column.name: bool(column.has_type) for name, column in columns.items() if name not in of_message}
    has_headers = has_ids and "headers" in columns
    id_place = 0 if has_ids else id_place  # a page of a feed has its id first, whatever the view has
    stream = Stream(view.name, fields, False, has_ids, has_headers, id_place=id_place, sources=frozenset(read))
    require_route(view, columns, stream)
    return stream


def require_route(made: SchemaObject, columns: Iterable[str], stream: Stream) -> None:
    """Raise SetupError if the name of a table or view cannot be a path, or a column is called like a parameter."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", made.name) or fold(made.name) in RESERVED_NAMES:
        hint = "use up to 64 letters, digits, _ and -, a letter first, and no name of the service's"
        raise SetupError(f"{made.kind} {made.name!r} cannot be a route: {hint}")
    for name in [*stream.parameters, "since"] if stream.has_ids else stream.parameters:
        if name in columns:
            raise SetupError(f"{made}: GET has a parameter {name}; name the column otherwise")


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
        is_serious = new.kind != "index" or new.is_unique or bool(old and old.is_unique)
        if not old:
            found.append((f"{new} is new", is_serious))
        elif new.words != old.words:
            before, after = ([line.strip() for line in made.sql.splitlines()] for made in (old, new))
            lines = [f"[{line}]" for line in difflib.ndiff(before, after) if line[0] in "+-"]
            found.append((" ".join([f"{new} has changed", *lines]), is_serious))
    gone = leftovers(db, schema)
    return found + [(f"{old} is not in the schema", old.kind != "index" or old.is_unique) for old in gone]


def is_other(db: sqlite3.Connection, schema: Schema) -> bool:
    """Does a database differ from schema.sql so that it must not be served?"""
    return any(is_serious for _, is_serious in differences(db, schema))


def leftovers(db: sqlite3.Connection, schema: Schema) -> list[SchemaObject]:
    """Return what schema.sql no longer has: streams, and indexes and triggers of tables that it still has."""
    known = {name for kind, name in schema.objects if kind in ("table", "view")}
    gone = [old for key, old in schema_objects(db).items() if key not in schema.objects and old.kind != "view"]
    return [old for old in gone if (is_stream(db, old.name) if old.kind == "table" else old.table in known)]


def is_stream(db: sqlite3.Connection, table: str) -> bool:
    """Has a table of a database, or a view, the columns of a message?"""
    return columns_of(db, table).keys() >= MESSAGE_COLUMNS.keys()


# ==================== The store: commit entries, read rows ==========================================

MAX_ID = 2**63 - 1
BUSY_TIMEOUT_S = 10.0  # from the arrival of a message to its 503
READ_TIMEOUT_S = 10.0  # for the SQL of one page
SCHEMA_LOOK_S = 1.0  # between two looks whether the database still has this schema
LAST_ID_S = 0.2  # for the last ids of views, which can take a look at all rows
ROWS_OF_BATCHES = 1000  # in one COMMIT, unless one batch has more: single messages wait for all of them

# What a client reads, by SQLite's name of the error. {said} are SQLite's words, {text} the same without the table's
# name, {subject} what they are about.
REFUSALS = {
    "SQLITE_CONSTRAINT_NOTNULL": (422, "{subject} is required"),
    "SQLITE_CONSTRAINT_CHECK": (422, "The message breaks a rule of this stream (CHECK)"),
    "SQLITE_CONSTRAINT_FOREIGNKEY": (422, "The message refers to something that does not exist (FOREIGN KEY)"),
    "SQLITE_CONSTRAINT_TRIGGER": (422, "{said}"),
    "SQLITE_CONSTRAINT_DATATYPE": (422, "{text}"),  # of STRICT tables that triggers fill: cannot store TEXT value in …
}
for name in ("UNIQUE", "PRIMARYKEY", "ROWID"):
    REFUSALS[f"SQLITE_CONSTRAINT_{name}"] = (409, "Another message has the same {subject}")
# Such as an overflow in an expression, or what a virtual table refuses.
CANNOT_BE_APPLIED = "A rule of this stream cannot be applied to the message"
for name in ("ERROR", "TOOBIG", "MISMATCH", "CONSTRAINT", "CONSTRAINT_VTAB"):
    REFUSALS[f"SQLITE_{name}"] = (422, CANNOT_BE_APPLIED)
MIGRATE = "run migrate (not with an old schema.sql: that would bring old rules back)"


def utc_now() -> str:
    """Return the time in UTC as RFC 3339, with milliseconds."""
    return in_utc(datetime.now(UTC))


def in_utc(moment: datetime) -> str:
    """Return a moment as received_at has it. One without a time zone is in UTC."""
    moment = moment.astimezone(UTC) if moment.tzinfo else moment
    return moment.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


class Stored(NamedTuple):
    """The result of an entry that is on disk. replayed: it was there before, under the same key."""

    first_id: int
    last_id: int
    received_at: str
    number: int = 1  # of messages
    replayed: bool = False
    refused: tuple[dict[str, Any], ...] = ()  # lines of a lenient batch
    is_part: bool = False  # there is more of the lenient batch
    answer: Answer | None = None  # in place of the usual one


def nothing() -> None:
    """Do nothing."""


@dataclass(slots=True, eq=False)
class Entry:
    """What one request wants written into a stream: JSON texts, of which the small ones may be checked by the stream.

    Without any, it only tests whether a write works. lines: the number of the line of each body, if it is a batch. key
    stands for all bodies. refused: None, or of a lenient batch the list of its lines that are not JSON. earlier: what
    came of those portions of it that are on disk. line: the number of the line, if this is one line of a lenient batch.
    deadline, a time.monotonic(), is when the client gets its 503. changed is called when there is a result, or when
    somebody has to call Store.write().
    """

    stream: Stream
    client: str = ""
    key: str | None = None
    bodies: list[str] = field(default_factory=list)
    headers: tuple[str | None, ...] = ()  # the request's, as one JSON object, if the stream has a column for them
    lines: list[int] = field(default_factory=list)
    refused: list[dict[str, Any]] | None = None
    later: Sequence[tuple[str, int]] = ()  # of a lenient batch: lines that come in other COMMITs
    earlier: tuple[Stored, ...] = ()
    line: int = 0
    signed: bool = False  # then a known key gets its first answer, even with another body
    deadline: float = field(default_factory=lambda: time.monotonic() + BUSY_TIMEOUT_S)
    ordinal: int = 1  # of the body that was refused
    was_undone: bool = False  # another entry of its stream has failed, and has taken this one with it
    result: Stored | Problem | None = None
    changed: Callable[[], object] = nothing

    def key_of(self, ordinal: int) -> str | None:
        """Return the key of a body: the first has the batch's key k1, line 2 `k1 2`. No client's key has a space.

        In a lenient batch, k1 is that of line 1 only; with an empty key, each is named by its digest.
        """
        if self.key is None or (ordinal == 1 and self.refused is None):
            return self.key
        if not self.key:
            return digest_of(self.bodies[ordinal - 1])
        number = self.lines[ordinal - 1]
        return self.key if number == 1 else f"{self.key} {number}"


class Undone(Exception):
    """An entry has failed, and SQLite has rolled back the whole transaction. error: what it has raised."""

    def __init__(self, entry: Entry, error: Exception):
        super().__init__(error)
        self.entry, self.error = entry, error


class Store:
    """The messages. Many threads append, and one COMMIT takes what has come together.

    If no thread writes, one that appends becomes the writer: it writes the whole queue in one COMMIT, while the others
    wait for their results. Then it tells one of those that still wait to be the next. With 64 threads, a plain lock
    gave 1.8 messages a COMMIT, and this gives 63 (bench/threads.py). A server without a thread for each entry puts it
    into the queue, and calls write() and look_after().

    Batches come to the disk in their order, but single messages wait for one large batch at most.
    """

    def __init__(self, database: "Database", schema: Schema, clock: Callable[[], str] = utc_now):
        self.schema = schema
        self.database = database
        self.statistics = Statistics(stream.name for stream in schema.streams.values() if stream.takes)
        self.queue: deque[Entry] = deque()  # entries that nobody writes yet
        self._group: list[Entry] = []  # what is being written
        outcomes = extra("outcomes")
        self._outcomes = outcomes.Outcomes() if outcomes else None
        self._turn = threading.Lock()  # of the thread that writes
        self._look_at = 0.0  # for entries whose deadline has passed
        self._schema_look_at, self._schema_version = 0.0, (0, -1)  # does the database still have this schema?
        self._clock = clock
        # Threads that read pages at once fight for the GIL at every row: four made 110 pages a second, and 200 in turn.
        # A read with a filter can be slow, so it does not take this lock.
        self.page_turn: Any = threading.Lock() if database.is_near else contextlib.nullcontext()

    def open(self, default_token: str = "") -> bool:
        """Open the database, or make it; SetupError if it cannot be used or differs from the schema.

        Returns True if it was made, together with the client `default`, if a token for it is given.
        """
        database = self.database
        try:
            with database.alone(self.schema) as db:
                is_new = self._make(db, default_token)
                found = differences(db, self.schema)
                self._schema_version = database.opened, schema_version(db)
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorname", "") not in FULL or not database.is_near:
                raise SetupError(f"{database} cannot be opened: {error}") from None
            log.error("the disk is full: no message can be written, only read")
            is_new = False
            database.save_wal()
            with database.reader() as db:
                found = differences(db, self.schema)
        if any(is_serious for _, is_serious in found):
            told = "; ".join(text for text, _ in found)
            raise SetupError(f"{database} differs from {self.schema.path.name} ({told}): {MIGRATE}")
        for text, _ in found:
            log.warning("%s: run migrate", text)
        return is_new

    def _make(self, db: sqlite3.Connection, default_token: str) -> bool:
        """Make what there is not, in one transaction. Returns True if nothing was there."""
        if db.execute("PRAGMA encoding").fetchone() != ("UTF-8",):
            raise SetupError(f"{self.database} is not in UTF-8: copy it into a new database")
        is_new = not schema_objects(db)
        db.execute("BEGIN IMMEDIATE")
        touch(db)  # which fails now, where each message would fail later
        make_clients(db, is_new)
        if is_new:
            for statement in self.schema.statements:
                db.execute(statement)
            if default_token:
                row = ("default", digest_of(default_token), "write read", utc_now(), None, None)
                db.execute(ADD_CLIENT, row)
        db.execute("COMMIT")
        if is_new and default_token:  # on a cluster, another process may have been first
            mine = "SELECT 1 FROM clients AS c WHERE c.token = ?"
            is_new = bool(db.execute(mine, (digest_of(default_token),)).fetchone())
        return is_new

    def close(self) -> None:
        """Let a COMMIT that is under way end, then close."""
        has_turn = self._turn.acquire(timeout=BUSY_TIMEOUT_S)
        self.database.close()
        if has_turn:
            self._turn.release()

    # Writing

    def append(self, entry: Entry) -> Stored:
        """Commit the messages of an entry to disk, all or none.

        Raises Problem: 4xx when a rule of the schema refused them (nothing is stored), 5xx when the outcome is unknown.
        """
        told: SimpleQueue[None] = SimpleQueue()
        entry.changed = partial(told.put, None)
        self.queue.append(entry)
        try:
            while not entry.result:
                self.write()
                if not entry.result:
                    told.get(timeout=max(0.0, entry.deadline - time.monotonic()))
        except Empty:
            pass
        finally:
            self._give_up(entry, TimeoutError())
        if isinstance(entry.result, Stored):
            return entry.result
        raise entry.result or storage_problem(TimeoutError())

    def write(self) -> None:
        """Write what is queued, if no other thread does. What has come meanwhile is left to those who wait for it."""
        if self.queue and self._turn.acquire(blocking=False):
            try:
                self._write_group()
            finally:
                self._turn.release()
                self._tell_one()

    def look_after(self) -> None:
        """Once a second, give late entries a 503; once a minute, log what came."""
        now = time.monotonic()
        if now > self._look_at:
            self._look_at = now + 1
            self.statistics.tell()
            for entry in [*self._group, *self.queue]:
                if entry.deadline < now:
                    self._give_up(entry, TimeoutError())

    def _write_group(self) -> None:
        """Write what is queued, with a file by one COMMIT, and give each entry its result."""
        began, waiting = time.monotonic(), list(self.queue)
        try:
            with self.database.transaction(min((entry.deadline for entry in waiting), default=began)) as db:
                self._require_schema(db)
                self._take_group()
                received_at = self._clock()
                results = self.results(db, self._group, received_at)
                if self._outcomes:
                    self._outcomes.complete(self, db, self._group, results, received_at)
            new = [each.number for each in results if isinstance(each, Stored) and not each.replayed]
            self.statistics.committed(time.monotonic() - began, sum(new))
            self._give_all(results)
        except Undone as error:
            self._write_others_again(error)
        except (sqlite3.Error, OSError, MemoryError) as error:
            # A TimeoutError says that the lock was not free in time. Entries that can wait longer stay in the queue.
            until = time.monotonic() if isinstance(error, TimeoutError) else math.inf
            self._give_all_up(self._group or [entry for entry in waiting if entry.deadline <= until], error)
        finally:
            for entry in self._group:  # that has no result, because there is a bug
                self._give_up(entry, RuntimeError())
            self._group = []
            if self._outcomes:
                self._outcomes.notes = []

    def _give_all(self, results: list[Stored | Problem]) -> None:
        """Give the group its results. A lenient batch of which only a part is there goes on."""
        group, self._group = self._group, []
        for entry, result in zip(group, results, strict=True):
            if self._outcomes and isinstance(result, Stored) and result.is_part:
                self._outcomes.go_on(entry, result)
                self.queue.appendleft(entry)  # those that came first end first
            else:
                self._give(entry, result)

    def _require_schema(self, db: sqlite3.Connection) -> None:
        """Every SCHEMA_LOOK_S, raise DatabaseError if the database has other rules than this process or schema.sql.

        It may have those of this process, or, after a migrate, those that schema.sql has by now. But each stream must
        still have, or lack, `headers`, and it must keep its CHECK of JSON.
        """
        opened = self.database.opened
        if time.monotonic() < self._schema_look_at and opened == self._schema_version[0]:
            return
        version = opened, schema_version(db)
        if version != self._schema_version and is_other(db, self.schema):
            try:
                migrated = read_schema(self.schema.path)
                is_migrated = not is_other(db, migrated)
            except SetupError:
                is_migrated = False
            if not is_migrated:
                raise sqlite3.DatabaseError(f"it differs from schema.sql: {MIGRATE}")
            after = {fold(stream.name): stream for stream in migrated.streams.values()}
            for stream in self.schema.streams.values():
                new = after.get(fold(stream.name), stream)
                if new.has_headers != stream.has_headers or (stream.checks_json and not new.checks_json):
                    raise sqlite3.DatabaseError(f"{new.name} takes messages in another way: start the service again")
            log.warning(
                "the database was migrated: start the service again, for the routes and sentences of schema.sql"
            )
        self._schema_version, self._schema_look_at = version, time.monotonic() + SCHEMA_LOOK_S

    def _take_group(self) -> None:
        """Take all single messages, and batches of up to ROWS_OF_BATCHES rows in sum. The first one may be larger."""
        rows, later = 0, []
        with contextlib.suppress(IndexError):
            while True:
                entry = self.queue.popleft()
                if rows and entry.lines and rows + len(entry.lines) > ROWS_OF_BATCHES:
                    later.append(entry)
                elif not entry.result:
                    self._group.append(entry)
                rows += len(entry.lines)  # also of one that is put off: no later batch overtakes it
        self.queue.extendleft(reversed(later))

    def _write_others_again(self, undone: Undone) -> None:
        """Give up an entry that has undone the group, and queue the others again.

        When that happens to its stream a second time, it may happen to each of its entries: they are given up with it.
        """
        log.error("a message for %s has undone its transaction: %s", undone.entry.stream.name, words_of(undone))
        again: list[Entry] = []
        for entry in self._group:
            is_of_stream = entry.stream is undone.entry.stream
            if entry is undone.entry or (is_of_stream and entry.was_undone):
                self._give_up(entry, undone.error)
            else:
                entry.was_undone = entry.was_undone or is_of_stream
                again.append(entry)
        self._group = []
        self.queue.extendleft(reversed(again))

    def _give_all_up(self, entries: list[Entry], error: Exception) -> None:
        if entries:
            kind = type(error).__name__
            log.error("%d requests could not be written: %s: %s", len(entries), kind, words_of(error))
        for entry in entries:
            self._give_up(entry, error)

    def _give_up(self, entry: Entry, error: Exception) -> None:
        """Give an entry without a result a 503, or a 400 if its text is not JSON."""
        if not entry.result:
            with contextlib.suppress(ValueError):  # it is being written
                self.queue.remove(entry)
            self._give(entry, malformed(entry) or storage_problem(error))
            self._tell_one()  # this one may have been told to write

    def _give(self, entry: Entry, result: Stored | Problem) -> None:
        entry.result = entry.result or result
        run_safely(entry.changed)
        entry.changed = nothing  # or it and its request would refer to each other

    def _tell_one(self) -> None:
        """Tell one that waits to write, if nobody does."""
        if self.queue and not self._turn.locked():
            with contextlib.suppress(IndexError):  # it is empty by now
                run_safely(self.queue[0].changed)

    def results(self, db: sqlite3.Connection, entries: list[Entry], received_at: str) -> list[Stored | Problem]:
        """Insert entries, and return their results. What is refused may be no JSON, a replay, or a lenient batch."""
        inserted = self.database.insert(db, entries, received_at)
        if not any(isinstance(found, Exception) for found in inserted):
            return inserted  # type: ignore[return-value]
        both = list(zip(entries, inserted, strict=True))
        keyed = [entry for entry, found in both if isinstance(found, Exception) and entry.key is not None]
        stored = dict(zip(keyed, self.database.fetch(db, [stored_under_key(entry) for entry in keyed]), strict=True))
        results: list[Stored | Problem] = []
        for entry, found in both:
            if isinstance(found, Stored):
                results.append(found)
            elif problem := malformed(entry):
                results.append(problem)
            else:
                replay = self._replay(entry, stored.get(entry, []))
                result = replay or self._refusal(entry, found)
                if self._outcomes and isinstance(result, Problem) and result.status < 500:
                    result = self._outcomes.of_refused(self, db, entry, result, received_at, not replay)
                results.append(result)
        return results

    def _replay(self, entry: Entry, rows: list[tuple] | Exception) -> Stored | Problem | None:
        """Return what the rows under the key of an entry stand for, a Problem if for something else, or None."""
        if isinstance(rows, Exception):
            return storage_problem(rows)
        if not rows:
            return None
        sent = {entry.key_of(ordinal): body for ordinal, body in enumerate(entry.bodies, 1)}
        stored = {key: body for _, _, key, body in rows}
        if stored == sent or (entry.signed and entry.refused is None):
            return Stored(rows[0][0], rows[-1][0], rows[0][1], len(rows), replayed=True)
        if entry.refused is not None and all(sent.get(key, body) == body for key, body in stored.items()):
            # No row for line 1: the bare key is another request's. It is a retry only if all its lines are stored.
            has_line_1 = entry.earlier or entry.lines[0] == 1
            if has_line_1 or entry.key not in stored or sent.keys() <= stored.keys():
                return None  # some of its lines are there
        or_deleted = ", or some of its messages have been deleted since" if stored.items() <= sent.items() else ""
        line: dict[str, Any] = {"line": entry.line} if entry.line else {}
        return Problem(422, f"This Idempotency-Key was used before, with another body{or_deleted}.", **line)

    def _refusal(self, entry: Entry, error: Exception) -> Problem:
        """Return why an entry was not inserted: a rule that it breaks, or a fault of the database."""
        said, name = str(error), getattr(error, "sqlite_errorname", "")
        if said.startswith("cannot store "):  # Python 3.11 has no name for it
            name = "SQLITE_CONSTRAINT_DATATYPE"
        if name not in REFUSALS:
            log.error("a message for %s could not be stored: %s: %s", entry.stream.name, name, words_of(error))
            return storage_problem(error)
        status, words = REFUSALS[name]
        text = re.sub(rf"\b{entry.stream.name}\.", "", said, flags=re.IGNORECASE)
        words = words.format(said=said, text=text, subject=text.rpartition(": ")[2].removeprefix("index "))
        members: dict[str, Any] = {"stream": entry.stream.name}
        if entry.line or entry.lines:
            members["line"] = entry.line or entry.lines[entry.ordinal - 1]
        reason = f"{words}: {words_of(error)}" if words == CANNOT_BE_APPLIED else ""
        return Problem(status, self.schema.sentences.get(fold(said), words), reason=reason, **members)

    # Reading

    def page(
        self,
        stream: Stream,
        after: int | None,
        limit: int,
        filters: dict[str, str],
        abandoned: Callable[[], bool] = lambda: False,
        until: int = MAX_ID,
        with_fields: bool = False,
    ) -> Iterator[tuple]:
        """Yield rows as Stream.selected has them, those with ids in their order: at most limit rows, with ids over
        after, up to until. filters: columns, and the texts that they must equal. Closing it ends its snapshot.

        Raises Problem 503 after READ_TIMEOUT_S in SQL, or when abandoned() says that nobody waits for the rows.
        """
        values: dict[str, Any] = {"after": after, "until": until, "limit": limit}
        conditions = ["true"] if after is None else ["t.id > :after AND t.id <= :until"]
        for number, (column, text) in enumerate(filters.items()):
            conditions.append(condition(stream, column, number))
            values |= {f"text{number}": text, f"number{number}": number_in(text)}
        sql, began = self.database.page_sql(stream, " AND ".join(conditions), with_fields), time.monotonic()
        try:
            with self.database.reader(READ_TIMEOUT_S, abandoned) as db:
                # A text may not be UTF-8 (a lone surrogate). Rows of a stream without fields stay bytes until
                # envelope(), for half the cost.
                as_bytes = stream.takes and not with_fields
                db.text_factory = bytes if as_bytes else partial(str, encoding="utf-8", errors="replace")
                yield from db.execute(sql, values)
        except sqlite3.Error as error:
            if not (problem := self.read_problem(error, stream, filters, began)):
                raise
            raise problem from None

    def read_problem(
        self, error: sqlite3.Error, stream: Stream, filters: Iterable[str], began: float
    ) -> Problem | None:
        """Return what a client is told when its page cannot be read, or None if the database has failed."""
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_ERROR" and not stream.takes:
            log.error("the view %s cannot be read: %s", stream.name, words_of(error))
            return Problem(503, "The SQL of this view fails on what is stored; the log says why.")
        if name != "SQLITE_INTERRUPT":
            return None
        if time.monotonic() - began < READ_TIMEOUT_S:
            return Problem(503, "The read was ended, because its client has closed the connection.")
        missing = self._missing_indexes(stream, filters)
        return Problem(503, f"This read took more than {READ_TIMEOUT_S:.0f} s.{missing}")

    def _missing_indexes(self, stream: Stream, filters: Iterable[str]) -> str:
        """Return a sentence for each of these columns that has no index."""
        sentences = ""
        for column in filters:
            plan = f'EXPLAIN QUERY PLAN SELECT 1 FROM "{stream.name}" AS t WHERE {condition(stream, column, 0)}'
            with self.database.reader() as db:
                steps = db.execute(plan, {"text0": "", "number0": ""})
                if any(step[3].startswith("SCAN") for step in steps):  # sqlite.org/eqp.html
                    sentences += f" There is no index on {column}."
        return sentences

    def last_id(self, stream: Stream, within_s: float = LAST_ID_S) -> int | None:
        """Return the last id of a stream, also of a message that was deleted, or that of a view.

        None if it cannot be found in time.
        """
        if within_s <= 0:
            return None
        sql = "SELECT s.seq FROM sqlite_sequence AS s WHERE s.name = :name COLLATE NOCASE"
        if not stream.takes:
            sql = f'SELECT CAST(t.id AS INTEGER) FROM "{stream.name}" AS t ORDER BY t.id DESC LIMIT 1'
        with contextlib.suppress(sqlite3.DatabaseError), self.database.reader(within_s) as db:
            return (db.execute(sql, {"name": stream.name}).fetchone() or (0,))[0]
        return None

    def last_ids(self, streams: Iterable[Stream]) -> dict[str, int | None]:
        """Return the last id of each stream or view by its name, as far as they can be found in LAST_ID_S together."""
        until = time.monotonic() + LAST_ID_S
        return {each.name: self.last_id(each, until - time.monotonic()) for each in streams}

    def message(self, stream: Stream, message_id: int, with_fields: bool = False) -> tuple | None:
        """Return the row with an id, as page() has it, or None."""
        return next(self.page(stream, message_id - 1, 1, {}, until=message_id, with_fields=with_fields), None)


def rows_of(entry: Entry, received_at: str, bodies: Iterable[str]) -> Iterator[tuple]:
    """Yield what is inserted for each body. Without a key, all of it happens in C: that halves what a batch costs."""
    keys = repeat(None) if entry.key is None else map(entry.key_of, range(1, len(entry.bodies) + 1))
    return zip(repeat(received_at), repeat(entry.client), keys, bodies, *map(repeat, entry.headers), strict=False)


def stored_under_key(entry: Entry) -> tuple[str, dict[str, Any]]:
    """Return the SQL of the rows that have the key of an entry, and its parameters."""
    is_lenient = entry.refused is not None
    keys = [entry.key, *map(entry.key_of, range(1, len(entry.bodies) + 1))] if is_lenient else []
    of_portion = " AND +t.key IN (SELECT j.value FROM json_each(:keys) AS j)" if is_lenient else ""
    rows = f'SELECT t.id, t.received_at, t.key, t.body FROM "{entry.stream.name}" AS t'
    of_client = "WHERE t.client COLLATE BINARY = :client"
    return (
        # Not OR: with it, SQLite 3.53 reads the whole table, and older ones an index on client alone, if there is one.
        f"{rows} {of_client} AND t.key COLLATE BINARY = :key{of_portion} UNION ALL"
        f" {rows} {of_client} AND t.key COLLATE BINARY > :first AND t.key COLLATE BINARY < :end{of_portion}"
        " ORDER BY 1 LIMIT :most",
        {
            "client": entry.client,
            "key": entry.key,
            "first": f"{entry.key} ",  # the keys of a batch are between `key ` and `key!`
            "end": "" if entry.line else f"{entry.key}!",
            "keys": json.dumps(keys),
            # One too many shows that it was something else.
            "most": -1 if entry.signed or is_lenient else len(entry.bodies) + 1,
        },
    )


def condition(stream: Stream, column: str, number: int) -> str:
    """Return the SQL of filter NUMBER: a column equals :textN, or, where it has no type, :numberN."""
    other = "" if stream.fields[column] else f", :number{number}"
    return f"t.{quoted(column)} IN (:text{number}{other})"


def number_in(text: str) -> int | float | str:
    """Return the number that a text is in JSON, as SQLite would keep it, or the text."""
    if not re.fullmatch(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", text, re.ASCII):
        return text
    number = int(text) if re.fullmatch(r"-?\d{1,19}", text) and abs(int(text)) <= MAX_ID else float(text)
    return number if math.isfinite(number) else text  # a cluster cannot be asked for an infinite one


def run_safely(work: Callable[[], object]) -> None:
    """Run something for a thread that has to go on whatever happens: without it the service would only look alive."""
    try:
        work()
    except Exception:
        with contextlib.suppress(Exception):  # there may be no memory left to say so
            log.exception("the server failed")


# ==================== The engine: open, insert, query and close one SQLite file =====================

LARGE_WAL_BYTES = 16 * 1024 * 1024  # it is about 4 MiB if no reader stays for long
LOCK_BYTES = 200  # for the identities of two files
SQLITE_STEPS = 10_000  # between two looks at the clock: less than 10 ms


def database_at(where: str) -> "Database":
    """Return the engine for the setting --database."""
    if where.startswith(("http://", "https://")):
        return needed("rqlite", "a cluster").Cluster(where)
    # What looks like a mistyped URL. It is not shown, for it can hold a password.
    if re.search(r"://|^https?:|^[^/]*:\d+(,|$)|:.*@", where, re.IGNORECASE):
        raise SetupError("--database (INLET_DATABASE) begins with http:// or https:// if it is for a cluster")
    return Database(Path(where))


# Each statement is a transaction, but for BEGIN and COMMIT: what SQLite itself does. Python 3.12 has a name for it.
AUTOCOMMIT: dict[str, Any] = {"autocommit": True} if sys.version_info >= (3, 12) else {"isolation_level": None}


def connect(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    """Return a connection in autocommit mode; mode is ro, rw or rwc as in https://www.sqlite.org/uri.html"""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, check_same_thread=False, timeout=busy_timeout_s, **AUTOCOMMIT)
    try:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = FULL")  # in WAL mode: one fsync of the WAL in every COMMIT
        db.execute("PRAGMA checkpoint_fullfsync = ON")  # macOS: fsync alone does not reach the disk there
        db.execute("PRAGMA fullfsync = ON")
    except sqlite3.Error:
        db.close()
        raise
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
    """One SQLite file: a connection that writes, and a pool of connections that read and never wait for a writer.

    is_near: a statement costs microseconds, and not a round trip to a cluster.
    """

    is_near = True

    def __init__(self, path: Path):
        self._given = path.absolute()
        self.path = path.resolve()  # once: the WAL of a symlinked database stands beside the real file
        self._folder, self._wal, self._shm = str(self.path.parent), f"{self.path}-wal", f"{self.path}-shm"
        self._lock: IO | None = None
        self._writer: sqlite3.Connection | None = None
        self.opened = 0  # how often somebody has put other files in the place of those that were open
        self._files: tuple = ()  # the identities of the database and its WAL when they were opened
        self._last_look: tuple = ()  # what the folder was when the files were looked at
        self._wal_is_large = False
        self._readers: list[tuple[sqlite3.Connection, Any]] = []  # idle ones, each with the files that it has open

    def __str__(self) -> str:
        return str(self.path)

    def is_made(self) -> bool:
        return file_size(self.path) > 0

    @contextlib.contextmanager
    def alone(self, new_schema: Schema | None = None) -> Iterator[sqlite3.Connection]:
        """Yield a connection while no other process writes.

        new_schema: what is made if there is no database. Without it, SetupError is raised then.
        """
        path, mode = self.path, "rwc" if new_schema else "rw"
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
            self._hide_from_others()
        has_messages = file_size(path) > 0
        with self._lock_file() as file, locked(file, time.monotonic() + BUSY_TIMEOUT_S):
            self._put_aside_old_wal(file)
            if os.path.exists(self._shm) and not os.path.exists(self._wal):
                # A second WAL would make the -shm of those who have it open wrong.
                hint = "if a process has it open, it saves that WAL with its next message; if none has, remove the -shm"
                raise SetupError(f"the WAL of {path} was removed, but not its -shm: {hint}")
            with contextlib.closing(connect(path, mode, BUSY_TIMEOUT_S)) as db:
                if new_schema and db.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                    raise SetupError(f"{path} cannot have a WAL here: a 201 would not mean that it is on disk")
                yield db
                if new_schema and has_messages:
                    analyze(db)
            if new_schema:
                sync_directory(path.parent)  # else a power cut could lose the new file and its messages

    def _hide_from_others(self) -> None:
        """Let only the owner read a database that every user can read: it has secrets of senders."""
        for path in (self.path, Path(self._wal), Path(self._shm)):
            with contextlib.suppress(FileNotFoundError):
                mode = path.lstat().st_mode  # nobody has to follow a link
                if stat.S_ISREG(mode) and mode & stat.S_IROTH:
                    try:
                        path.chmod(0o600)
                        log.warning("every user could read %s: now only its owner can", path)
                    except PermissionError:
                        log.warning("every user can read %s, and it has secrets of senders", path)

    def to_migrate(self, schema: Schema) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """Return what migrate works on. A cluster needs the schema for that."""
        return self.alone()

    @contextlib.contextmanager
    def transaction(self, deadline: float) -> Iterator[sqlite3.Connection]:
        """Run a block in a transaction and commit it to disk, in one thread at a time; TimeoutError if it cannot begin.

        A COMMIT that fails has an unknown outcome. Then, and after every other error, the connection is thrown away:
        that rolls back, and nothing is committed twice. A COMMIT into files that were replaced meanwhile has failed.
        """
        if not self._lock:
            self._lock = self._lock_file()
            os.register_at_fork(after_in_child=self._let_go_of_lock)  # or a child would keep it when its parent dies
        with locked(self._lock, deadline):
            try:
                if self._files_are_others():
                    self._let_go_of_files(deadline)
                db = self._writer or self._open_writer(self._lock)
                poll(lambda: db.execute("BEGIN IMMEDIATE"), deadline, "another program")
                yield db
                db.execute("COMMIT")
            except TimeoutError:  # no lock was free, so nothing has begun
                raise
            except BaseException:
                self._close(self._writer)
                self._writer = None
                raise
            # The writer stays: it alone may have a WAL that was removed, and saves it before the next transaction.
            if self._files_are_others():
                raise sqlite3.OperationalError("the database was replaced during the COMMIT")

    def insert(self, db: sqlite3.Connection, entries: list[Entry], received_at: str) -> list[Stored | Exception]:
        """Insert the rows of entries. An error that is returned has undone only its entry; any other is raised."""
        return [self._insert(db, entry, received_at) for entry in entries]

    def fetch(self, db: sqlite3.Connection, queries: list[tuple[str, dict]]) -> list[list[tuple] | sqlite3.Error]:
        """Return the rows of each query, or its error."""
        return [rows_or_error(db, *query) for query in queries]

    def _insert(self, db: sqlite3.Connection, entry: Entry, received_at: str) -> Stored | Exception:
        if not entry.bodies:
            touch(db)
            return Stored(0, 0, received_at, 0)
        insert, left = entry.stream.insert, iter(entry.bodies)
        rows = rows_of(entry, received_at, left)
        try:
            if entry.lines:
                db.execute("SAVEPOINT batch")
            inserted = db.execute(insert, next(rows))
            first, last, count = inserted.lastrowid or 0, inserted.lastrowid or 0, inserted.rowcount
            if entry.lines:
                count += max(0, db.executemany(insert, rows).rowcount)
                (last,) = db.execute("SELECT last_insert_rowid()").fetchone()
            if count != len(entry.bodies):  # a trigger that was added beside us can do that
                raise sqlite3.DatabaseError(f"{count} of {len(entry.bodies)} rows were inserted")
            if entry.lines:
                db.execute("RELEASE batch")
            return Stored(first, last, received_at, len(entry.bodies))
        except (sqlite3.Error, UnicodeDecodeError, MemoryError) as error:
            entry.ordinal = len(entry.bodies) - length_hint(left)
            return self._undo(db, entry, sqlite_error(error))

    def _undo(self, db: sqlite3.Connection, entry: Entry, error: Exception) -> Exception:
        """Undo what was inserted of an entry, and return its error, or why its stream takes no message at all."""
        error.__traceback__ = None  # it is a result: its frames would keep the entry in memory
        # FULL, IOERR, NOMEM and BUSY may have rolled everything back, and the next INSERT would be a
        # transaction of its own: https://www.sqlite.org/lang_transaction.html (3, response to errors)
        if not db.in_transaction:
            raise Undone(entry, error) from None
        if entry.lines:
            db.execute("ROLLBACK TO batch")
            db.execute("RELEASE batch")
        if entry.line:  # that was looked at when its batch was refused
            return error
        return self._fault(db, entry.stream) or error

    @staticmethod
    def _fault(db: sqlite3.Connection, stream: Stream) -> sqlite3.Error | None:
        """Return why no message at all can be inserted into a stream, or None."""
        compiled, values = stream.explain
        try:
            db.execute(f"{compiled} -- {time.monotonic_ns()}", values)  # a new text: SQLite compiles it anew
        except sqlite3.Error as error:
            return sqlite3.DatabaseError(f"no message can be inserted: {error}")
        return None

    def close(self) -> None:
        """Close the connections; the WAL goes into the database."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        with contextlib.suppress(OSError, sqlite3.Error), self._lock_file() as file, locked(file, deadline):
            if self._files_are_others():
                self._let_go_of_files(deadline)
            elif self._writer:
                checkpoint(self._writer)
            self._close_all()

    def _lock_file(self) -> IO:
        """Open the file that is there to be locked, by its owner only: who can read it can lock it."""
        name, flags = f"{self.path}-lock", os.O_RDWR | os.O_NOFOLLOW  # root must not write where a link leads
        while True:
            with contextlib.suppress(FileNotFoundError):
                return open(os.open(name, flags), "r+b")
            with contextlib.suppress(FileExistsError):  # another process has made it meanwhile
                fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, mode=0o600)
                if os.geteuid() == 0 and self.path.exists():  # SQLite does the same for the WAL
                    owner = self.path.stat()
                    os.fchown(fd, owner.st_uid, owner.st_gid)
                return open(fd, "r+b")

    def _let_go_of_lock(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def _put_aside_old_wal(self, lock: IO) -> None:
        """Put a WAL aside that belongs to the database that was here before this one.

        The lock says which files a process has opened last to write. So a WAL is not opened with a database that is
        not its own, whichever process is the first to see that, also after a restart. But a copy that is made where
        the database was removed can get its inode: deploy/restore.py moves the WAL away.
        """
        with contextlib.suppress(ValueError):  # it is empty
            old_database, old_wal = json.loads(os.pread(lock.fileno(), LOCK_BYTES, 0))
            wal = identity(self._wal)
            if old_database != identity(self.path) and wal in (None, old_wal):
                if wal:
                    aside = f"{self._wal}.of-replaced-{time.time_ns()}"
                    log.error("%s was replaced: the WAL of the old one is %s now", self.path, aside)
                    os.replace(self._wal, aside)
                Path(self._shm).unlink(missing_ok=True)

    def _note_files(self, lock: IO) -> None:
        """Note which files are open now, for all processes."""
        self._files = identity(self.path), identity(self._wal)
        with contextlib.suppress(OSError):  # the disk is full
            os.pwrite(lock.fileno(), json.dumps(self._files).encode().ljust(LOCK_BYTES), 0)

    def _is_noted(self, *files: list[int] | None) -> bool:
        """Does the lock name these files: are they those that a process has opened last to write?"""
        with self._lock_file() as lock:
            return os.pread(lock.fileno(), LOCK_BYTES, 0).rstrip() == json.dumps(files).encode()

    def _open_writer(self, lock: IO) -> sqlite3.Connection:
        """Open the connection that writes, while no other process does."""
        self._put_aside_old_wal(lock)
        opened = identity(self.path)
        self._writer = db = connect(self.path, "rw", 1.0)  # never makes a file in place of one that has gone
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA journal_size_limit = {LARGE_WAL_BYTES}")  # what a long reader made grow shrinks after
        db.execute("PRAGMA temp_store = MEMORY")  # a large batch needs room, and the disk may be read-only elsewhere
        # After a failed fsync the kernel marks the lost pages as clean: https://lwn.net/Articles/752063/. A WAL with a
        # hole in it ends there. So what an earlier process left in the WAL goes to the database. If a reader prevents
        # that, another connection uses the WAL, so it is intact.
        checkpoint(db)
        self._note_files(lock)
        if self._files[0] != opened:
            raise sqlite3.OperationalError("the database was replaced while it was opened")
        return db

    def _files_are_others(self) -> bool:
        """Is the database another file than the one that was opened, or its WAL another than the one that is open?

        They are looked at once a second, and when their folder has changed. For stat() makes the next write to a file
        slower: 260 µs for a COMMIT in place of 190. Linux then notes the exact time of the write
        (docs.kernel.org/filesystems/multigrain-ts.html). A change in the last second may not show in the ctime of the
        folder.
        """
        folder, now, files = os.stat(self._folder), time.time(), self._files
        look = folder.st_dev, folder.st_ino, folder.st_ctime_ns, int(now)
        if not files or (look == self._last_look and folder.st_ctime < now - 1):
            return False
        if self._wal_is_large != (file_size(self._wal) > LARGE_WAL_BYTES):
            self._wal_is_large = not self._wal_is_large
            why = "a reader stays open, or a transaction was large"
            change = f"has grown: {why}" if self._wal_is_large else "is small again"
            log.warning("the WAL %s (%d MiB)", change, file_size(self._wal) // 2**20)
        if self._given.resolve() != self.path:
            raise sqlite3.OperationalError(f"{self._given} leads to another file now: start the service again")
        wal = identity(self._wal)
        # Who only reads goes on with a WAL that was removed until a process that writes has saved it.
        if identity(self.path) != files[0] or (wal != files[1] and (self._writer or self._is_noted(files[0], wal))):
            return True
        self._last_look = look
        return False

    def _let_go_of_files(self, deadline: float) -> None:
        """Close all connections, because somebody has removed or replaced the database or its WAL.

        What is in a WAL that was removed goes into its database, as soon as nobody reads it. If another process has
        done that, the lock names the new WAL, and the -shm belongs to that one.
        """
        files, found = self._files, identity(self.path)
        if not found:
            raise sqlite3.OperationalError("the database is not there")
        log.error("%s or its WAL was removed or replaced; opening it again", self.path)
        if found == files[0] and self._is_noted(*files) and (writer := self._writer):
            poll(lambda: checkpoint(writer, required=True), deadline, "a reader of the removed WAL")
        self._close_all()

    def _close_all(self) -> None:
        """Close all connections that nobody uses. A reader that is in use is closed when it is to be used again."""
        self._close(self._writer)
        self._writer, self._files = None, ()
        self.opened += 1
        with contextlib.suppress(IndexError):
            while True:
                self._close(self._readers.pop()[0])

    @staticmethod
    def _close(db: sqlite3.Connection | None) -> None:
        with contextlib.suppress(sqlite3.Error):
            if db:
                db.close()

    @staticmethod
    def page_sql(stream: Stream, conditions: str, with_fields: bool) -> str:
        """Return the SQL of a page; the parameter :limit is the number of its rows."""
        order = "" if stream.id_place is None else " ORDER BY t.id"
        selected = ", ".join(stream.selected(with_fields))
        return f'SELECT {selected} FROM "{stream.name}" AS t WHERE {conditions}{order} LIMIT :limit'

    @contextlib.contextmanager
    def reader(
        self, limit_s: float = READ_TIMEOUT_S, abandoned: Callable[[], bool] = lambda: False
    ) -> Iterator[sqlite3.Connection]:
        """Lend a connection. Its query ends with SQLITE_INTERRUPT after limit_s, or when abandoned() is true."""
        began = time.monotonic()

        def give_up() -> bool:
            taken_s = time.monotonic() - began
            return taken_s > limit_s or (taken_s > 1 and abandoned())

        if not self._files or self._files_are_others():
            self._open_again(began + limit_s)
        files: tuple = identity(self.path), self._files
        idle = self._idle_reader(files)
        db, is_live = (idle, True) if idle else self._open_reader()
        db.set_progress_handler(give_up, SQLITE_STEPS)
        db.text_factory = str  # whoever had it before may have wanted another
        try:
            yield db
        except (sqlite3.Error, UnicodeDecodeError) as error:
            is_live = False  # the connection may be broken: it is closed
            raise sqlite_error(error)  # noqa: B904
        finally:
            if is_live:
                self._readers.append((db, files))
            else:
                self._close(db)

    def _open_again(self, deadline: float) -> None:
        """Open the database for reading, or another one that was put in its place, while no process writes."""
        with self._lock_file() as file, locked(file, deadline):
            if self._files_are_others():
                self._let_go_of_files(deadline)
            if not self._files:
                self._put_aside_old_wal(file)
                reader, is_live = self._open_reader()
                if is_live:
                    self._files = identity(self.path), identity(self._wal)
                self._close(reader)

    def _open_reader(self) -> tuple[sqlite3.Connection, bool]:
        """Return a new connection, and whether it sees what is written later.

        It does not where a full disk has no room for a -shm. Then, if nothing is in a WAL, it reads the file as it is:
        https://www.sqlite.org/uri.html (immutable).
        """
        try:
            return connect(self.path, "ro", BUSY_TIMEOUT_S), True
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname not in FULL or file_size(self._wal):
                raise
            return connect(self.path, "ro&immutable=1", BUSY_TIMEOUT_S), False

    def save_wal(self) -> None:
        """Move the WAL into the database as far as that goes without a -shm, for which a full disk has no room."""
        with (
            self._lock_file() as file,
            locked(file, time.monotonic() + BUSY_TIMEOUT_S),
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(self.path, **AUTOCOMMIT)) as db,
        ):
            db.execute("PRAGMA locking_mode = EXCLUSIVE")  # first of all: https://www.sqlite.org/wal.html, 8
            db.execute("PRAGMA synchronous = FULL")
            checkpoint(db)

    def _idle_reader(self, files: tuple) -> sqlite3.Connection | None:
        """Return a connection to these files that nobody uses, or None."""
        with contextlib.suppress(IndexError):
            while True:
                db, its_files = self._readers.pop()
                if its_files == files:
                    return db
                self._close(db)
        return None

    def sizes(self) -> dict[str, int]:
        """Return the bytes of its files, and those that are free on its disk, by the names of the metrics."""
        disk = os.statvfs(self.path.parent)
        sizes = {"database_bytes": file_size(self.path), "wal_bytes": file_size(self._wal)}
        return sizes | {"disk_free_bytes": disk.f_bavail * disk.f_frsize}

    def copy_to(self, target: str) -> None:
        """Write a copy of what it is at this moment to a file."""
        if not self.path.is_file():
            raise SetupError(f"there is no database {self}")
        os.chmod(target, self.path.stat().st_mode)
        with contextlib.closing(self._snapshot()) as source, contextlib.closing(sqlite3.connect(target)) as copy:
            source.backup(copy, pages=10_000, progress=lambda _, left, of: show(f"{left} of {of} pages left"))

    def _snapshot(self) -> sqlite3.Connection:
        """Return a connection that sees the database as it is now: else a copy would begin again at every write."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(PermissionError):  # of a user who may read the database, and not write
                file = stack.enter_context(self._lock_file())
                stack.enter_context(locked(file, time.monotonic() + BUSY_TIMEOUT_S))
                self._put_aside_old_wal(file)
            source = connect(self.path, "ro", BUSY_TIMEOUT_S)
            source.execute("BEGIN")
            source.execute("SELECT 1 FROM sqlite_schema").fetchall()
        return source


def rows_or_error(db: sqlite3.Connection, sql: str, values: dict) -> list[tuple] | sqlite3.Error:
    try:
        return db.execute(sql, values).fetchall()
    except (sqlite3.Error, UnicodeDecodeError) as error:
        return sqlite_error(error).with_traceback(None)


def identity(path: str | Path) -> list[int] | None:
    """Return [device, inode] of a file, or None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        return [found.st_dev, found.st_ino]
    return None


def file_size(path: str | Path) -> int:
    """Return the bytes of a file; 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.getsize(path)
    return 0


def analyze(db: sqlite3.Connection) -> None:
    """Let SQLite see which index serves which filter best, by 400 rows of each: https://sqlite.org/lang_analyze.html"""
    db.execute("PRAGMA analysis_limit = 400")
    db.execute("ANALYZE")


def schema_version(db: sqlite3.Connection) -> int:
    """Return a number that changes with each CREATE, DROP and ALTER: sqlite.org/pragma.html#pragma_schema_version"""
    return db.execute("PRAGMA schema_version").fetchone()[0]


def touch(db: sqlite3.Connection) -> None:
    """Write page 1 as it is: a write that changes nothing."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    db.execute(f"PRAGMA user_version = {version}")


def checkpoint(db: sqlite3.Connection, required: bool = False) -> None:
    """Move the WAL into the database, without waiting for readers. Sets the busy_timeout of db to 0.

    Raises BlockingIOError if all of it is required, and a reader keeps a part of it in the WAL.
    """
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


# ==================== Statistics: what the log says, and extras/metrics.py shows ====================

COMMIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
GROUP_SIZES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000)
COUNTED_CLIENTS = 1000  # whose refusals are counted; those of more are counted together


class Histogram:
    """How often values were seen up to each bound, or above the last one, and their sum."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


class Statistics:
    """Counts of this process."""

    def __init__(self, streams: Iterable[str]):
        # By stream and status. What has an alert is there from the start, with 0.
        self.answers = Counter({(stream, status): 0 for stream in streams for status in (201, 503)})
        self.refused: dict[str, Counter[int]] = {}  # by client and status
        self.commit_s, self.group_sizes = Histogram(COMMIT_S), Histogram(GROUP_SIZES)
        self._mutex = threading.Lock()
        self._slowest_s = 0.0  # COMMIT of this minute
        self._minute_ends = time.monotonic() + 60
        self._of_minute: Counter[int] = Counter()  # what it has brought, by the first digit of the status

    def answered(
        self, stream: str, status: int, detail: str = "", path: str = "", client: str = "", by: str = ""
    ) -> None:
        """Count an answer; if it is a refusal, let the log say so. by: address and key, as sent_by() has them."""
        with self._mutex:
            self.answers[stream, status] += 1
            if status == 201 or status >= 400:
                self._of_minute[status // 100] += 1
            if status >= 400:
                is_counted = client in self.refused or len(self.refused) < COUNTED_CLIENTS
                self.refused.setdefault(client if is_counted else "others", Counter())[status] += 1
        if status >= 400:
            where = shown(path or f"/{stream}")
            level = logging.WARNING if status == 503 else logging.INFO
            log.log(level, f"{status} to %s at %s: %s (%s)", shown(client), where, shown(detail, 256), by)

    def committed(self, seconds: float, messages: int) -> None:
        """Count a COMMIT with what was stored by it. One thread at a time calls this."""
        self.commit_s.add(seconds)
        self.group_sizes.add(messages)
        self._slowest_s = max(self._slowest_s, seconds)

    def tell(self) -> None:
        """Log what came in the last minute, if it is over and something came."""
        line_limit.tell()
        now = time.monotonic()
        with self._mutex:
            if now < self._minute_ends:
                return
            of_minute, self._of_minute, self._minute_ends = self._of_minute, Counter(), now + 60
            slowest_s, self._slowest_s = self._slowest_s, 0.0
        if of_minute:
            told = "in a minute: %d requests stored, %d refused, %d failed; slowest COMMIT %.3f s"
            log.info(told, of_minute[2], of_minute[4], of_minute[5], slowest_s)


def sent_by(environ: dict[str, Any], key: str | None = None) -> str:
    """Return where a message comes from, and its key, for the log. Any client can forge X-Forwarded-For."""
    claim = environ.get("HTTP_X_FORWARDED_FOR")
    claims = f", X-Forwarded-For claims {shown(claim)}" if claim else ""
    return f"from {environ.get('REMOTE_ADDR', '')}{claims}{f', key {shown(key)}' if key else ''}"


# ==================== Clients: who may come in ======================================================

CLIENTS_REFRESH_S = 0.8  # how soon every process knows of a new or a revoked token
CLIENTS_TIMEOUT_S = 1.0  # to read them, for the server's loop waits
CLIENTS_RETRY_S = 0.05  # after they could not be read, or after a token was not among them
CLIENTS_TABLE = """CREATE TABLE clients (
    name    TEXT NOT NULL,
    token   TEXT NOT NULL UNIQUE,  -- SHA-256 in hexadecimal: of the token, or of `SCHEME SECRET`
    can     TEXT NOT NULL,         -- grants with spaces between: write read write:NAME read:NAME
    made_at TEXT,
    signs   TEXT,                  -- the name of a scheme, for a sender that signs its messages (extras/senders.py)
    secret  TEXT                   -- that it shares with us
) STRICT"""
# What says whether the clients have changed. It begins at random, so that no two databases have the same.
CLIENTS_VERSION = "SELECT v.version, EXISTS (SELECT 1 FROM clients AS c) FROM clients_version AS v"
KEY_IS_BODY = "key:body"  # among the grants of a client that can send no key: the digest of a body is its key
ADD_CLIENT = """INSERT INTO clients (name, token, can, made_at, signs, secret)
    VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""
SEND_A_TOKEN = "Send a token: Authorization: Bearer TOKEN."
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="inlet", Basic realm="inlet"'}
INVALID_TOKEN = {"WWW-Authenticate": 'Bearer realm="inlet", error="invalid_token", Basic realm="inlet"'}


@dataclass(frozen=True)
class Client:
    """Somebody with a token, or who signs. grants are write and read, for all streams or with :STREAM for one."""

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


class Clients:
    """Falcon middleware: a path needs a token or a signature, but those WITHOUT_TOKEN, the page and CORS preflights.

    The clients table is kept in memory, so that a request costs no SQL for its token. A 401 is the same at each path,
    also at one that does not exist. cors: origins whose pages may use it, with commas.
    """

    def __init__(self, store: Store, max_body: int, cors: str = ""):
        self.max_body, self.origins = max_body, cors.split(",") if cors else []
        self._database, self._statistics = store.database, store.statistics
        self._streams = {f"/{stream.name}": stream for stream in store.schema.streams.values() if stream.takes}
        self._version: tuple | None = None  # of what is kept
        self._by_digest: dict[str, Client] = {}
        senders = extra("senders")
        self.senders = senders.Senders() if senders else None  # that sign
        self._token_headers: frozenset[str] = senders.TOKEN_HEADERS if senders else frozenset()
        self._read_at = self._missed_at = -CLIENTS_REFRESH_S
        self._known_at = -math.inf  # when they were read without an error
        self._failure: Exception | None = None  # of the last time
        # On a cluster, a thread reads them, for it can take seconds; and an election shuts nobody out.
        self._has_reader, self._grace_s = False, 0.0 if self._database.is_near else BUSY_TIMEOUT_S

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        req.context.body = None
        if "inlet.refusal" in req.env:  # the server could not even read it
            raise Problem(*req.env["inlet.refusal"])
        is_preflight = req.method == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in req.env
        if is_preflight and req.env.get("HTTP_ORIGIN") in self.origins:
            resp.complete = True
            resp.set_header("Allow", "GET, HEAD, POST")
        elif req.path not in WITHOUT_TOKEN:
            req.context.client = self.authenticate(req.env)
            if not req.context.client:
                self._verify(req)
            if req.path.startswith("//"):  # Falcon would take it for the path without the first slash
                raise nothing_here()

    def _verify(self, req: falcon.Request) -> None:
        """Read the body of a signed message, and find its sender; Problem 401."""
        context = req.context
        context.body, senders = read_body(req.env, self.max_body), self.senders
        try:
            context.client, context.key_of = senders.verify(req.env, context.body)  # type: ignore[union-attr]
        except ValueError as error:
            raise self._unless_new(no_token(req.env, reason=str(error))) from None

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: Any, succeeded: bool) -> None:
        """Count the answer, unless it is given later."""
        context = req.context
        if not getattr(context, "is_put_off", False):
            of_path = self._streams.get(req.path) if self._failure else None  # then no resource was reached
            stream = resource.stream if isinstance(resource, ViewResource) else of_path
            client = context.client.name if context.get("client") else ""
            by = sent_by(req.env, req.env.get("HTTP_IDEMPOTENCY_KEY"))
            status = 201 if req.method == "POST" and resp.status_code == 200 else resp.status_code  # the column answer
            name = stream.name if stream else ""
            self._statistics.answered(name, status, context.get("detail") or "", req.path, client, by)
            self._statistics.tell()
            if not resp.get_header("Cache-Control"):
                resp.set_headers(PRIVATE)
        if self.origins:
            resp.append_header("Vary", "Origin")

    def authenticate(self, environ: dict[str, Any]) -> Client | None:
        """Return the client whose token is in a request. None for a POST that is signed: its body says who sent it.

        Raises Problem 401, 400 if it has two tokens, or 503 if the clients cannot be read.
        """
        if not self._has_reader and time.monotonic() >= self._read_at + CLIENTS_REFRESH_S:
            self.read()
        if self._failure and time.monotonic() >= self._known_at + self._grace_s:
            raise self._cannot_be_read(self._failure)
        authorization = environ.get("HTTP_AUTHORIZATION")
        token = token_in(authorization) if authorization else ""
        if not environ.keys().isdisjoint(self._token_headers):
            token = extra("senders").one_token(environ, token)
        if not authorization and not token:
            if environ["REQUEST_METHOD"] == "POST" and self.senders and self.senders.know(environ):
                return None
            reason = self.senders.unknown(environ) if self.senders else ""
            raise self._unless_new(no_token(environ, reason)) if reason else no_token(environ)
        # What is looked up is a digest: how long that takes says nothing about how much of a token is right.
        digest = digest_of(token)
        waits = self._failure or time.monotonic() <= self._missed_at + CLIENTS_RETRY_S
        if digest not in self._by_digest and not waits:
            began = time.monotonic()
            self.read()  # it may be new
            taken_s = time.monotonic() - began
            self._missed_at = time.monotonic() + 9 * taken_s  # so wrong tokens take a tenth of the time at most
        client = self._by_digest.get(digest)
        if client is None:
            raise self._unless_new(Problem(401, "This token is not valid here.", INVALID_TOKEN))
        return client

    @staticmethod
    def _cannot_be_read(failure: Exception) -> Problem:
        return Problem(503, f"{cause_of(failure)} Nothing was stored: try again.")

    def _unless_new(self, problem: Problem) -> Problem:
        """Return a 401, or a 503 while the clients cannot be read: this one may have been added meanwhile."""
        return self._cannot_be_read(self._failure) if self._failure else problem

    def lack(self, token: str) -> bool:
        """Return True if no client has this token; False also if the clients cannot be read."""
        return not self.read() and digest_of(token) not in self._by_digest

    def admit(self, environ: dict[str, Any]) -> tuple[int, bool]:
        """Return how many bytes the body of a POST may have, and whether it is known whose it is.

        It is 0 bytes if the app will refuse the request, whatever is in its body.
        """
        with contextlib.suppress(Problem):
            client = self.authenticate(environ)
            if not client:
                return self.max_body, False
            if stream := self._streams.get(environ["PATH_INFO"].removesuffix("/")):
                client.require("write", stream)
                return self.max_body, True
        return 0, False

    def read(self) -> Exception | None:
        """Read the clients table again if it has changed. Returns the error, if any.

        While it cannot be read, every request gets 503. On a cluster, known tokens hold for 10 s, so that an election
        refuses nobody.
        """
        failure: Exception | None = None
        try:
            version = self._version_now()
            if not version or version != self._version:
                counted = "(SELECT v.version FROM clients_version AS v)" if version else "NULL"
                sql = f"SELECT c.name, c.can, c.token, c.signs, c.secret, {counted} FROM clients AS c"
                with self._database.reader(CLIENTS_TIMEOUT_S) as db:
                    rows = db.execute(sql).fetchall()
                self._keep(rows)
                # A node of a cluster that starts again can have older rows than the one that was asked before.
                is_same = version and version[1] and {row[5] for row in rows} == {version[1][0]}
                self._version = version if is_same else None
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:  # the last two: a node answers nonsense
            log.error("the clients cannot be read: %s", error)
            failure = error.with_traceback(None)
        if not self._database.is_near and not self._has_reader:
            engine: Any = self._database
            self._has_reader = True
            engine.read_in_background(self.read, CLIENTS_REFRESH_S)
        self._read_at = time.monotonic()
        if not failure:
            self._known_at = self._read_at
        self._failure = failure
        if failure:  # the next try comes after CLIENTS_RETRY_S
            self._read_at += CLIENTS_RETRY_S - CLIENTS_REFRESH_S
        return failure

    def _version_now(self) -> tuple | None:
        """Return what changes with the clients; None if an older database is in the place of this one."""
        try:
            with self._database.reader(CLIENTS_TIMEOUT_S) as db:
                return self._database.opened, db.execute(CLIENTS_VERSION).fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return None
            raise

    def _keep(self, rows: list[tuple]) -> None:
        found = [(Client(name, frozenset(can.lower().split())), *of_client) for name, can, *of_client, _ in rows]
        self._by_digest = {digest: client for client, digest, signs, _ in found if not signs}
        if not found:
            log.warning("there is no client: python service.py client add NAME")
        if self.senders:
            self.senders.load((client, signs, secret) for client, _, signs, secret in found if signs)
        elif len(self._by_digest) < len(found):
            log.warning("a client signs its messages, but extras/senders.py is not there")


def no_token(environ: dict[str, Any], reason: str = "") -> Problem:
    """Return the refusal of a request that has no token. reason, if it has a signature, is for the log."""
    hint = SEND_A_TOKEN
    if "mod_wsgi.version" in environ:
        hint += " If you did: Apache has kept it to itself, and needs WSGIPassAuthorization On."
    return Problem(401, hint, CHALLENGE, reason)


def make_clients(db: sqlite3.Connection, is_new: bool = False) -> None:
    """Make the clients table, or rebuild that of an older Inlet.

    is_new: the database was empty. On a cluster, CREATE fails if another front end was first.
    """
    columns = {} if is_new else columns_of(db, "clients")
    if "signs" not in columns:
        old = db.execute("SELECT c.name, c.token, c.can FROM clients AS c").fetchall() if columns else []
        if columns:
            db.execute("DROP TABLE clients")
        db.execute(CLIENTS_TABLE)
        for row in old:
            db.execute("INSERT INTO clients (name, token, can) VALUES (?, ?, ?)", row)
    if is_new or not columns_of(db, "clients_version"):
        db.execute("CREATE TABLE clients_version (version INTEGER NOT NULL) STRICT")
        db.execute(f"INSERT INTO clients_version VALUES ({secrets.randbits(62)})")
        for event in ("INSERT", "UPDATE", "DELETE"):
            change = "UPDATE clients_version SET version = version + 1"
            db.execute(f"CREATE TRIGGER clients_after_{event} AFTER {event} ON clients BEGIN {change}; END")


def digest_of(token: str) -> str:
    """Return the SHA-256 digest of a text in hexadecimal: of a token, that is all that is kept."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def token_in(authorization: str) -> str:
    """Return the token in Authorization: Bearer (RFC 6750), or Basic (RFC 7617) with it as password; or Problem 401."""
    scheme, _, credentials = authorization.partition(" ")
    scheme, credentials = scheme.lower(), credentials.strip(" ")
    if scheme not in ("bearer", "basic"):
        raise Problem(401, "Send Authorization: Bearer TOKEN, or Basic with the token as password.", INVALID_TOKEN)
    return password_in(credentials) if scheme == "basic" else credentials


def password_in(credentials: str) -> str:
    """Return the password in the credentials of a Basic Authorization header; empty if there is none."""
    try:
        padded = credentials + "=" * (-len(credentials) % 4)
        return base64.b64decode(padded, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


# ==================== Reading requests ==============================================================

MAX_DEPTH = 512  # of arrays and objects: under the limit of every SQLite (1000 from 3.42 on) and of Python
LARGE_TEXT = 16_384  # characters
LARGEST_BATCH = 10_000  # messages: about 0.1 s during which nobody else can write
READ_OF_TOO_LARGE = 16 * 1024 * 1024  # bytes
PIECE_BYTES = 65_536  # that are read at once of what is thrown away, or of a body that a server gives in parts
KEY = r"[!-~]{1,255}"
LONGEST_MEDIA_TYPE = 256  # characters: Falcon's parser takes time with the square of their number
JSON = "application/json"
NDJSON = "application/x-ndjson"
NDJSON_TYPES = (NDJSON, "application/jsonl", "application/ndjson")
CSV = "text/csv"  # for extras/reading.py
FORM = "application/x-www-form-urlencoded"  # for extras/senders.py
ACCEPTED_TYPES = [JSON, "application/*+json", *NDJSON_TYPES]
HEADERS = ("HTTP_", "CONTENT_TYPE", "CONTENT_LENGTH")  # what they begin with in WSGI
# Such a header is never kept. Most that end with KEY are secrets: API_KEY, ACCESS_KEY, SUBSCRIPTION_KEY.
SECRET_HEADER = re.compile(
    "AUTH(?!OR)|AUTHORI|BEARER|COOKIE|SIGNATURE|HMAC|TOKEN|SECRET|API_?KEY|PASS|JWT|OIDC|CREDENTIAL|SESSION|CERT|OTP"
    "|ACCESS_CODE|SIGN?$|(?<![A-Z])SIGN?(?![A-Z])|(?<!EVENT_)(?<!IDEMPOTENCY_)KEYS?(?![A-Z])"
)
MOST_HEADERS = 1024 * 1024  # bytes in all rows of a batch
MOST_MEMBERS = 100  # of a gzip body
DEFAULT_PAGE = 100  # messages
LARGEST_PAGE = 1000
LONGEST_WAIT_S = 60

# A string in a JSON text, or a bracket outside of strings. A string without an end goes to the end of the text.
STRING = r'"(?:[^"\\]++|\\.?)*+(?:"|\Z)'
STRING_OR_BRACKET = re.compile(rf"{STRING}|[\[\]{{}}]", re.DOTALL)
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
TAKES_ODD_NAMES = sqlite3.sqlite_version_info < (3, 42, 0)  # does json_valid() take {["a"]: 1}?
DEPTH_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# parse_int: a whole number may have more digits than int() takes (4300); its value is of no interest here.
JSON_DECODER = json.JSONDecoder(parse_int=float, parse_constant=refuse_constant)


def json_texts(data: bytes, is_batch: bool, by_rule: bool) -> tuple[list[str], list[int]]:
    """Return a body as text; of a batch, its messages and the numbers of their lines. Problem 413; 400 if not JSON.

    by_rule: a CHECK (json_valid(body)) will refuse what is not JSON as RFC 8259 has it. But that passes over what
    follows a NUL, allows more depth, and before SQLite 3.42 took {["a"]: 1}: such texts are checked here. So are large
    ones: to look for the error in them during the transaction would hold up others.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise json_problem("it is not UTF-8", data[: error.start].decode()) from None
    texts, lines = numbered_lines(text) if is_batch else ([text], [1])
    by_rule = by_rule and b"\0" not in data and not (TAKES_ODD_NAMES and may_have_odd_names(data))
    for text, line in zip(texts, lines, strict=True):
        if not by_rule or (len(text) > MAX_DEPTH and (len(text) > LARGE_TEXT or may_be_deep(text))):
            require_json(text, line)
    return texts, lines if is_batch else []


def may_have_odd_names(data: bytes) -> bool:
    """May a text have an array or an object as the name of a member? In JSON, no bracket stands before a colon."""
    squeezed = data.translate(None, b" \t\r\n")
    return b"]:" in squeezed or b"}:" in squeezed


def only_json_valid(data: bytes) -> bool:
    """Is a text no JSON, though json_valid() takes it? The SQLite that has stored it may be older than this one."""
    if b"\0" in data or may_have_odd_names(data):
        try:
            JSON_DECODER.decode(data.decode())
        except (ValueError, RecursionError):
            return True
    return False


def numbered_lines(text: str) -> tuple[list[str], list[int]]:
    """Return the lines of a batch and their numbers; Problem 400 or 413. Blank lines are left out, but counted."""
    if text.count("\n") > LARGEST_BATCH:
        raise Problem(413, f"The batch has more than {LARGEST_BATCH} lines.", limit=LARGEST_BATCH)
    lines = text.split("\n")
    numbers = [number for number, line in enumerate(lines, 1) if line.strip(" \t\r")]
    if not numbers:
        raise Problem(400, "The batch is empty.")
    if len(numbers) > LARGEST_BATCH:
        raise Problem(413, f"The batch has more than {LARGEST_BATCH} messages.", limit=LARGEST_BATCH)
    return [lines[number - 1].removesuffix("\r") for number in numbers], numbers


def malformed(entry: Entry) -> Problem | None:
    """Return the refusal of an entry that was not inserted, if the text that failed is not JSON.

    Large texts are left out: json_texts() has checked them.
    """
    try:
        for text in entry.bodies[entry.ordinal - 1 : entry.ordinal]:
            if len(text) <= LARGE_TEXT:
                require_json(text, entry.lines[entry.ordinal - 1] if entry.lines else 1)
    except Problem as problem:
        problem.__traceback__ = problem.__context__ = None  # they refer to the entry, which would stay in memory
        return problem
    return None


def require_json(text: str, first_line: int = 1) -> None:
    """Raise Problem 400 if a text is not one JSON value."""
    pauses = len(text) > LARGE_TEXT and gc.isenabled()
    try:
        if pauses:
            gc.disable()  # 40 ms for a million brackets in place of 240
        JSON_DECODER.decode(text)
    except RecursionError:
        refuse_depth(text, first_line)
        raise
    except json.JSONDecodeError as error:
        reason = "it begins with a byte-order mark" if text.startswith("\ufeff") else error.msg
        raise json_problem(reason, text[: error.pos], first_line) from None
    except ValueError as error:
        raise json_problem(str(error), text[: place_of_constant(text)], first_line) from None
    finally:
        if pauses:
            gc.enable()
    if may_be_deep(text):
        refuse_depth(text, first_line)


def place_of_constant(text: str) -> int:
    """Return where NaN, Infinity or -Infinity stands in a text: the decoder has a place only for unknown words."""
    try:
        JSON_DECODER.decode(text.replace("NaN", "nan").replace("Infinity", "infinity"))
    except json.JSONDecodeError as error:
        return error.pos
    return 0


def refuse_depth(text: str, first_line: int) -> None:
    """Raise Problem 400 if a text has too many arrays and objects inside of each other."""
    brackets = re.sub(STRING, "", text, flags=re.DOTALL).encode().translate(None, NOT_BRACKETS)
    if max(accumulate(map(DEPTH_STEP.__getitem__, brackets)), default=0) <= MAX_DEPTH:
        return
    depth = 0
    for found in STRING_OR_BRACKET.finditer(text):
        depth += DEPTH_STEP.get(ord(found[0][0]), 0)
        if depth > MAX_DEPTH:
            raise json_problem(f"it is nested more than {MAX_DEPTH} deep", text[: found.start()], first_line)


def may_be_deep(text: str) -> bool:
    return text.count("[") + text.count("{") > MAX_DEPTH


def json_problem(reason: str, text_before: str, first_line: int = 1) -> Problem:
    """Return the refusal of a body, with the place (counted from 1, in characters) where it stops being JSON."""
    line = text_before.count("\n") + first_line
    column = len(text_before) - text_before.rfind("\n")
    return Problem(400, f"The body is not JSON: {reason}, line {line} column {column}.", line=line, column=column)


def kind_of(content_type: str | None) -> str:
    """Return what a Content-Type says: JSON, NDJSON (one message on each line) or FORM. Problem 415 if another one."""
    if content_type == JSON:  # what nearly all send
        return JSON
    kind, options = falcon.parse_header((content_type or "")[:LONGEST_MEDIA_TYPE])
    kind, forms = kind.lower(), [FORM] if extra("senders") else []
    in_utf_8 = options.get("charset", "utf-8").lower() in ("utf-8", "utf8", "us-ascii")
    if in_utf_8 and len(content_type or "") <= LONGEST_MEDIA_TYPE:
        if kind in (*NDJSON_TYPES, *forms):
            return FORM if kind in forms else NDJSON
        if re.fullmatch(r"application/(?:json|csp-report)|[\w.-]+/[\w.+-]+\+json", kind, re.ASCII):
            return JSON
    accepted = ACCEPTED_TYPES + forms
    hint = "Send one message as application/json (or any +json), many as application/x-ndjson, in UTF-8"
    detail = f"{hint}, and not as {shown(content_type or '')}."
    raise Problem(415, detail, {"Accept-Post": ", ".join(accepted)}, accepted=accepted)


def without_gzip(data: bytes, coding: str | None, max_body: int) -> bytes:
    """Return a body with its Content-Encoding undone; Problem 400 if broken, 413 if too large, 415 if not gzip.

    Nothing is unpacked past the limit: a small body cannot use more memory than a large one.
    """
    if not coding or coding.lower() == "identity":
        return data
    if coding.lower() not in ("gzip", "x-gzip"):
        raise Problem(415, "The only Content-Encoding here is gzip.", {"Accept-Encoding": "gzip"}, accepted=["gzip"])
    unpacked = bytearray()
    for _ in range(MOST_MEMBERS):
        member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            unpacked += member.decompress(data, max_body + 1 - len(unpacked))
        except zlib.error:
            raise Problem(400, "The body is not gzip.") from None
        if len(unpacked) > max_body:
            raise too_large(max_body)
        if not member.eof:
            raise Problem(400, "The body is not whole gzip.")
        data = member.unused_data
        if not data:
            return bytes(unpacked)
    raise Problem(400, f"The body has more than {MOST_MEMBERS} members of gzip.")


def read_body(environ: dict[str, Any], max_body: int) -> bytes:
    """Return the body of a request, whole; Problem 400 if it is cut short, 411 without a length, 413 if too large."""
    length, stream = environ.get("CONTENT_LENGTH"), environ["wsgi.input"]
    in_chunks = environ.get("wsgi.input_terminated") and environ.get("HTTP_TRANSFER_ENCODING")
    if in_chunks and environ.get("SERVER_SOFTWARE", "").lower().startswith("granian"):
        in_chunks = None  # granian 2.7 gives chunks that were cut short to the app as if they were the whole body
    if not length and not in_chunks:
        raise Problem(411, "Send a Content-Length.")
    if length and not (length.isascii() and length.isdigit()):
        raise Problem(400, "Content-Length is not a number.")
    wanted = int(length.lstrip("0")[:19] or "0") if length else max_body + 1
    try:
        if length and wanted > max_body:
            for _ in pieces(stream, READ_OF_TOO_LARGE):  # or other servers would close on a client that still sends
                pass
            raise too_large(max_body)
        data = stream.read(wanted)  # at once: in pieces, a byte would be copied three times more
        if len(data) < wanted:
            data += b"".join(pieces(stream, wanted - len(data)))
    except Problem:
        raise
    except Exception:  # gunicorn has classes of its own for malformed chunks
        raise Problem(400, "The body was cut short, or its chunks are malformed.") from None
    if length and len(data) < wanted:
        raise Problem(400, f"The body was cut short: {len(data)} of {wanted} bytes came.")
    if len(data) > max_body:
        raise too_large(max_body)
    return data


def pieces(stream: IO[bytes], wanted: int) -> Iterator[bytes]:
    """Yield what a stream gives, up to so many bytes. It may raise what it likes if the client has gone."""
    while wanted and (piece := stream.read(min(wanted, PIECE_BYTES))):
        yield piece
        wanted -= len(piece)


def too_large(max_body: int) -> Problem:
    return Problem(413, f"The body is larger than {max_body} bytes.", limit=max_body)


def idempotency_key(header: str | None) -> str | None:
    """Return the Idempotency-Key of a request, bare or a quoted string (RFC 8941, 3.3.3); Problem 400 if malformed."""
    if header and 1 < len(header) < 1024 and header[0] == header[-1] == '"':
        header = re.sub(r'\\(["\\])', r"\1", header[1:-1])
    if header is not None and not re.fullmatch(KEY, header):
        raise Problem(400, "Idempotency-Key takes 1 to 255 visible ASCII characters, without spaces.")
    return header


def kept_headers(environ: dict[str, Any], rows: int) -> str:
    """Return the headers of a request as one JSON object, sorted by their names in lower case, without secrets.

    Problem 413 if all copies together, one for each row, are too large.
    """
    kept = [name for name in environ if name.startswith(HEADERS) and not SECRET_HEADER.search(name) and environ[name]]
    headers = {name.removeprefix("HTTP_").replace("_", "-").lower(): environ[name] for name in kept}
    text = json.dumps(headers, sort_keys=True)
    if rows * len(text) > MOST_HEADERS:
        detail = f"The headers, once for each message, have more than {MOST_HEADERS} bytes."
        raise Problem(413, detail, limit=MOST_HEADERS)
    return text


class Query(NamedTuple):
    """What a GET asks for. numbers: the parameters that are numbers, as far as they are given; since: a time, or ""."""

    numbers: dict[str, int]
    since: str
    filters: dict[str, str]


def query_from(params: Mapping[str, str | list[str]], stream: Stream, only: Sequence[str] = ()) -> Query:
    """Return the parameters of a query; Problem 400 if one is unknown, doubled or out of range. only: no others."""
    known = only or [*stream.parameters, *stream.fields]
    numbers, since, filters = {}, "", {}
    for name, value in params.items():
        if name not in known:
            raise Problem(400, f"There is no parameter {shown(name)}: there are {', '.join(known)}.", parameters=known)
        if isinstance(value, list):
            raise Problem(400, f"The parameter {name} is given more than once.")
        if name not in stream.parameters:
            filters[name] = value
        elif name == "since":
            since = extra("reading").time_in(value)
        else:
            low, high = stream.parameters[name]
            if not re.fullmatch(r"-?[0-9]{1,19}", value) or not low <= int(value) <= high:
                raise Problem(400, f"{name} takes a whole number from {low} to {high}.")
            numbers[name] = int(value)
    return Query(numbers, since, filters)


def preferred(req: falcon.Request, resp: falcon.Response, *types: str) -> str:
    """Return which media type the client prefers, the first if it does not say; Problem 406 if it takes none."""
    resp.set_header("Vary", "Accept")
    accept = ",".join(part for part in req.accept.lower().split(",") if part.strip())  # RFC 9110, 5.6.1
    if accept in ("*/*", types[0]):
        return types[0]
    if len(accept) > LONGEST_MEDIA_TYPE:
        raise Problem(400, f"Accept takes at most {LONGEST_MEDIA_TYPE} characters.")
    kind = ""
    with contextlib.suppress(ValueError):  # it is malformed
        kind = best_match(types, accept)
    if not kind:
        raise Problem(406, f"Accept names nothing that is here: {', '.join(types)}.", accepted=types)
    return kind


# ==================== Resources =====================================================================

PAGE_BYTES = 4 * 1024 * 1024  # a page of the feed ends after about this much


def envelope(stream: Stream, row: tuple, with_fields: bool = False) -> bytes:
    """Return a message as the feed gives it. The body is put in as it was sent: it is JSON already."""
    message_id, body = row[0], row[4]
    received_at, client, key = map(in_unicode, row[1:4])
    head = (
        f'{{"id": {message_id}, "received_at": {json_string(received_at)}, "client": {json_string(client)},'
        f' "key": {"null" if key is None else json_string(key)}, "body": '
    )
    tail = b', "headers": %b' % in_json(row[5] or b"null") if stream.has_headers else b""
    if with_fields:
        tail += f', "fields": {object_of(stream.fields, row[5 + stream.has_headers :])}'.encode()
    return b"%b%b%b}" % (head.encode(), in_json(body), tail)


def in_json(text: bytes | str) -> bytes:
    """Return a text that json_valid() takes, as a string if it is no JSON: a trigger can have made it."""
    data = in_utf_8(text)
    return json_string(data.decode()).encode() if only_json_valid(data) else data


def in_unicode(text: bytes | str | None) -> Any:
    """Return a text, or None. What is not UTF-8 in it is replaced."""
    return text.decode(errors="replace") if isinstance(text, bytes) else text


def in_utf_8(body: bytes | str) -> bytes:
    """Return a body. Only a trigger can have made one that is not UTF-8, out of a lone surrogate: that is replaced."""
    return body if isinstance(body, bytes) and body.isascii() else in_unicode(body).encode()


def object_of(names: Iterable[str], row: tuple) -> str:
    """Return columns as a JSON object; a BLOB in hexadecimal, an infinity as a number that is too large."""
    members = []
    for name, value in zip(names, row, strict=True):
        is_infinite = isinstance(value, float) and math.isinf(value)
        text = f"{value:.0f}".replace("inf", "9e999") if is_infinite else json.dumps(value, default=bytes.hex)
        members.append(f"{json_string(name)}: {text}")
    return f"{{{', '.join(members)}}}"


def as_lines(texts: list[bytes]) -> bytes:
    """Return JSON texts, each on a line. They have line breaks between tokens only, where a space means the same."""
    return b"".join(b"%b\n" % text.replace(b"\n", b" ").replace(b"\r", b" ") for text in texts)


def link(req: falcon.Request, name: str) -> str:
    """Return the path of a stream or view, below the one that the app is mounted under."""
    return f"{quote(req.root_path) if req.root_path else ''}/{name}"


def answer_to(entry: Entry, stored: Stored, url: str) -> Answer:
    """Return the answer to a POST that was stored; url is that of its stream."""
    if stored.answer:
        return stored.answer
    headers = [("Content-Type", JSON), *PRIVATE]
    if stored.replayed:
        headers.append(("Idempotent-Replayed", "true"))
    if entry.lines:
        ids = f'"count": {stored.number}, "first_id": {stored.first_id}, "last_id": {stored.last_id}'
    else:
        ids = f'"id": {stored.first_id}'
        headers.append(("Location", f"{url}/{stored.first_id}"))
    return "201 Created", headers, f'{{{ids}, "received_at": "{stored.received_at}"}}'.encode()


class ViewResource:
    """/{view}, /{view}/{id} and /{view}/{id}/body. waits: extras/waiting.py, if it is there."""

    def __init__(self, store: Store, stream: Stream, max_body: int, waits: Any = None):
        self._store, self._max_body, self._waits = store, max_body, waits
        self.stream = stream
        self._reading = extra("reading")
        self._kinds = (JSON, *NDJSON_TYPES, CSV) if self._reading else (JSON, *NDJSON_TYPES)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        stream = self.stream
        req.context.client.require("read", stream)
        query = query_from(req.params, stream)
        kind = preferred(req, resp, *self._kinds)
        arrived_at = req.env.get("inlet.arrived_at", math.inf)
        if not req.env.get("inlet.held") and time.monotonic() > arrived_at + READ_TIMEOUT_S:
            raise Problem(503, "Too many slow reads are waiting.")
        wait = None  # begins before the page is read: what comes meanwhile ends it
        if self._waits and (wait_s := query.numbers.get("wait")):
            wait = self._waits.begin(req.env, req.context.client.name, stream, query.numbers.get("after", 0), wait_s)
        is_abandoned = req.env.get("inlet.is_abandoned", lambda: False)
        seen = wait.seen if wait else 0
        texts, has_more, after = self._page(query, kind, is_abandoned, seen)
        if texts and seen:  # older rows may have been changed, and fit now: read the whole page
            texts, has_more, after = self._page(query, kind, is_abandoned)
        if wait and not texts and wait.hold(req.env):
            req.context.is_put_off = True
            return
        member, tail = b"messages" if stream.has_ids else b"rows", b', "more": true' if has_more else b""
        if next_page := self._next_page(req, query, after, not texts):
            resp.set_header("Link", f'<{next_page}>; rel="next"')
            tail = (b"" if stream.has_ids else tail) + f', "next": {json_string(next_page)}'.encode()
        if kind == JSON:
            resp.data = b'{"%b": [%b]%b}' % (member, b", ".join(texts), tail)
        elif kind == CSV:
            resp.content_type, resp.data = f"{CSV}; charset=utf-8", self._reading.csv_page(stream, texts)
        else:
            resp.content_type, resp.data = NDJSON, as_lines(texts)

    def _next_page(self, req: falcon.Request, query: Query, after: int | None, is_empty: bool) -> str:
        """Return the path of the page behind an id, or of this one once more if it is empty; "" if there is none."""
        stream = self.stream
        if stream.id_place is None or (after is None and not is_empty):
            return ""
        given: dict[str, Any] = {} if after is None else {"after": after}
        given |= {name: number for name, number in query.numbers.items() if name != "after"}
        if query.since and is_empty:
            given["since"] = query.since
            if not stream.takes:  # an id of the stream would tell what the view does not show
                given["after"] = query.numbers.get("after", 0)
        return f"{link(req, stream.name)}?{urlencode(given | query.filters)}"

    def _page(
        self, query: Query, kind: str, is_abandoned: Callable[[], bool], seen: int = 0
    ) -> tuple[list[bytes], bool, int | None]:
        """Return the texts of rows, whether there are more, and the id that the next page comes after, if any.

        seen: look only at what has a larger id.
        """
        stream, (numbers, since, filters) = self.stream, query
        texts: list[bytes] = []
        size = rows_of_last_id = 0
        with_fields, limit = kind == CSV or bool(numbers.get("fields")), numbers.get("limit", DEFAULT_PAGE)
        after = numbers.get("after", 0 if stream.has_ids else None)
        if since and after is not None:
            after = self._reading.id_before(self._store, stream, since, after, is_abandoned)
        with self._store.page_turn if stream.takes and not filters else contextlib.nullcontext():
            begin = seen if seen and after is not None and seen > after else after
            # One row more than are shown says that there are more.
            for row in self._store.page(stream, begin, limit + 1, filters, is_abandoned, with_fields=with_fields):
                row_id = None if stream.id_place is None else row[stream.id_place]
                if len(texts) == limit or size >= PAGE_BYTES:
                    if isinstance(row_id, int) and row_id == after:  # a view has this id again, and the next page not
                        rows = self._store.page(
                            stream, max(after - 1, -MAX_ID - 1), -1, filters, is_abandoned, after, with_fields
                        )
                        texts[len(texts) - rows_of_last_id :] = self._whole(rows, after, kind, with_fields)
                    return texts, True, after
                texts.append(self._text(row, kind, with_fields))
                size += len(texts[-1])
                rows_of_last_id = rows_of_last_id + 1 if row_id == after else 1
                after = row_id if isinstance(row_id, int) else None
        return texts, False, after

    def _whole(self, rows: Iterator[tuple], row_id: int, kind: str, with_fields: bool) -> Iterator[bytes]:
        """Yield the texts of all rows that have one id: a view over a join may have it several times."""
        size = 0
        for number, row in enumerate(rows):
            text = self._text(row, kind, with_fields)
            size += len(text)
            if number >= LARGEST_PAGE or size > 4 * PAGE_BYTES:
                raise Problem(503, f"The view has the id {row_id} too often for a page: it should have it once.")
            yield text

    def _text(self, row: tuple, kind: str, with_fields: bool) -> bytes:
        """Return a row as an envelope, as an object or as a line of CSV."""
        if kind == CSV:
            return self._reading.csv_row(self.stream, row)
        if self.stream.has_ids:
            return envelope(self.stream, row, with_fields)
        return object_of(self.stream.fields, row).encode()

    def on_get_message(self, req: falcon.Request, resp: falcon.Response, message_id: int) -> None:
        req.context.client.require("read", self.stream)
        with_fields = bool(query_from(req.params, self.stream, ["fields"]).numbers.get("fields"))
        resp.data = envelope(self.stream, self._row(req, message_id, with_fields), with_fields)
        if preferred(req, resp, JSON, *NDJSON_TYPES) in NDJSON_TYPES:
            resp.content_type, resp.data = NDJSON, as_lines([resp.data])

    def on_get_body(self, req: falcon.Request, resp: falcon.Response, message_id: int) -> None:
        req.context.client.require("read", self.stream)
        preferred(req, resp, JSON)
        resp.data = in_json(self._row(req, message_id)[4])

    def _row(self, req: falcon.Request, message_id: int, with_fields: bool = False) -> tuple:
        """Return the row of a message; Problem 404."""
        row = self._store.message(self.stream, message_id, with_fields)
        if row is None or str(message_id) not in req.path.split("/"):  # Falcon takes 0_1 for a number
            raise Problem(404, "There is no message with this id.", stream=self.stream.name)
        return row

    on_head = on_get
    on_head_message = on_get_message
    on_head_body = on_get_body


class StreamResource(ViewResource):
    """/{stream} and /{stream}/{id}"""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        entry, url = self._entry(req), link(req, self.stream.name)
        answer_later = req.env.get("inlet.answer_later")
        if not answer_later:
            resp.status, headers, resp.data = answer_to(entry, self._store.append(entry), url)
            resp.set_headers(headers)
            return
        late = partial(self._late_answer, entry, url, req.env.get("REMOTE_ADDR"), req.env.get("HTTP_X_FORWARDED_FOR"))
        bodies = entry.bodies + [body for body, _ in entry.later]
        changed = answer_later(late, sum(map(sys.getsizeof, bodies)))
        if not changed:
            raise Problem(503, "Too many large messages wait for their COMMIT.")
        req.context.is_put_off = True
        entry.changed = changed
        self._store.queue.append(entry)

    def _entry(self, req: falcon.Request) -> Entry:
        """Return what a POST wants written; Problem if it cannot be."""
        stream, context, environ = self.stream, req.context, req.env
        deadline = environ.get("inlet.arrived_at", time.monotonic()) + BUSY_TIMEOUT_S
        if time.monotonic() > deadline:  # it has waited for others that take long to check
            raise storage_problem(TimeoutError())
        context.client.require("write", stream)
        is_signed = context.body is not None  # the middleware has read it, to verify its signature
        data = context.body if is_signed else read_body(environ, self._max_body)
        kind = kind_of(req.content_type)
        data = without_gzip(data, environ.get("HTTP_CONTENT_ENCODING"), self._max_body)
        outcomes, refused = extra("outcomes"), None
        if kind == FORM:
            data = extra("senders").form_as_json(data, self._max_body)
        if kind == NDJSON and outcomes and outcomes.is_lenient(environ):
            texts, lines, refused = outcomes.lenient_lines(data)
        else:
            by_rule = stream.checks_json and self._store.database.is_near and not is_signed
            texts, lines = json_texts(data, kind == NDJSON, by_rule)
        if is_signed:
            key = context.key_of(texts[0]) if texts else None
        else:
            key = idempotency_key(environ.get("HTTP_IDEMPOTENCY_KEY"))
        if key is None and KEY_IS_BODY in context.client.grants:
            key = digest_of(data.decode()) if refused is None else ""  # then each line is its own
        headers = (kept_headers(environ, len(texts)),) if stream.has_headers else ()
        entry = Entry(stream, context.client.name, key, texts, headers, lines, signed=is_signed, deadline=deadline)
        return outcomes.lenient(entry, refused) if refused is not None else entry

    def _late_answer(self, entry: Entry, url: str, address: str | None, claim: str | None) -> Answer | None:
        """Return the answer to an entry, if it has its result, and count it."""
        result, count = entry.result, self._store.statistics.answered
        if isinstance(result, Stored):
            count(self.stream.name, 201)
            return answer_to(entry, result, url)
        if isinstance(result, Problem):
            by = sent_by({"REMOTE_ADDR": address, "HTTP_X_FORWARDED_FOR": claim}, entry.key)
            count(self.stream.name, result.status, result.reason, "", entry.client, by)
            return result.answer()
        return None


class RootResource:
    """/"""

    def __init__(self, store: Store):
        self._store = store
        streams = store.schema.streams
        self._views = [each for each in streams.values() if each.has_ids and not each.takes]
        self._lock = threading.Lock()  # for what follows
        self._last_ids: dict[str, int | None] = {}  # of views
        self._stale_at = 0.0

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        preferred(req, resp, JSON)
        streams: dict[str, dict[str, Any]] = {}
        views: dict[str, dict[str, Any]] = {}
        all_streams = self._store.schema.streams
        last_ids = self._store.last_ids(each for each in all_streams.values() if each.takes) | self._last_ids_of_views()
        for name, stream in all_streams.items():
            actions = ("write", "read") if stream.takes else ("read",)
            can = [action for action in actions if req.context.client.can(action, stream)]
            if can:
                found: dict[str, Any] = {"href": link(req, name), "can": can, "fields": list(stream.fields)}
                if stream.has_ids:
                    found["last_id"] = last_ids[name]
                (streams if stream.takes else views)[name] = found
        resp.media = {"service": "Inlet", "version": __version__, "streams": streams, "views": views}

    on_head = on_get

    def _last_ids_of_views(self) -> dict[str, int | None]:
        """Return them as they were a moment ago: this takes LAST_ID_S at most, and then rests for ten times as long."""
        with self._lock:
            began = time.monotonic()
            if began > self._stale_at:
                self._last_ids = self._store.last_ids(self._views)
                self._stale_at = time.monotonic() + 10 * (time.monotonic() - began)
            return self._last_ids


class LiveResource:
    """/livez: this process answers. A full disk must not make an orchestrator kill it."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = {"alive": True}

    on_head = on_get


class HealthResource:
    """/healthz: alive is that this process answers; ready is that a message can be written now.

    The first request has a page written and synced, in a thread. Those that arrive within EVERY_S get its
    result, too. They wait for it at most until PATIENCE_S after it began.
    """

    EVERY_S = 1.0
    PATIENCE_S = 2.0

    def __init__(self, store: Store, clients: Clients):
        self._store = store
        self._clients = clients
        self._mutex = threading.Lock()
        self._thread = ThreadPoolExecutor(1)
        self._began_at = -self.EVERY_S
        self._probe: Future[None] = Future()
        self._probe.set_result(None)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        try:
            with self._mutex:
                arrived_at = req.env.get("inlet.arrived_at", time.monotonic())
                if self._probe.done() and arrived_at > self._began_at + self.EVERY_S:
                    self._probe, self._began_at = self._thread.submit(self._write), time.monotonic()
            self._probe.result(max(0.0, self._began_at + self.PATIENCE_S - time.monotonic()))
        except Exception as error:  # whatever it is, it must not say that all is well
            log.error("not ready: %s: %s", type(error).__name__, str(error) or "it takes too long")
            raise Problem(503, "No message can be written, or it takes too long.", alive=True, ready=False) from None
        resp.media = {"alive": True, "ready": True}

    on_head = on_get

    def _write(self) -> None:
        self._store.append(Entry(next(iter(self._store.schema.streams.values()))))
        if failure := self._clients.read():
            raise failure


# ==================== Serving: by extras/loop.py, or by waitress ====================================

CONNECTIONS = 4096  # fewer if the process may not open as many files
BACKLOG = 1024  # connections that wait to be accepted
BODIES_BYTES = 64 * 1024 * 1024  # the limit for the sum of large bodies on their way, in each account of the loop
WAITRESS_THREADS = 64  # a message waits in one for its COMMIT, which it shares with the others
DRAIN_S = BUSY_TIMEOUT_S + 1  # how long waitress waits for the requests in flight when it was told to stop
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
PLAIN_QUERY = re.compile(r"(?:(?:after|limit|wait|fields|since)=[\w:.%-]*+(?:&|\Z))*+")  # in one pass
FIRST_STEPS = """
This is the first start: the client "default" was made, and may write and read. Its token, shown only now:

{token}

Send a message:

curl -i {to} -H "Authorization: Bearer {token}" -H "Content-Type: application/json" -d '{{"hello": "world"}}'
"""


def serve(settings: argparse.Namespace, database: Database) -> None:
    """Serve until SIGTERM or SIGINT."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the server takes them
    has_loop = extra("http1") and extra("connection") and extra("loop")
    if settings.server == "loop" and not has_loop:
        raise SetupError("--server loop needs loop.py, connection.py and http1.py in extras/")
    if not has_loop and not settings.server:
        log.warning("loop.py, connection.py or http1.py is not in extras/: waitress serves, which is slower")
    store = Store(database, read_schema(settings.schema))
    try:
        listeners = listening_sockets(settings.listen)
    except (OSError, ValueError) as error:
        raise SetupError(f"cannot listen on {settings.listen}: {error}") from None
    given = first_token()
    token = given or secrets.token_urlsafe(32)
    is_new = store.open(token)  # behind all that can fail: it is shown only now
    tell_where(settings, listeners, store.schema, token if is_new and not given else "")
    clients = Clients(store, settings.max_body, settings.cors)
    if given and clients.lack(given):
        log.warning("INLET_TOKEN is not a token of this database: only a new one takes it (client add makes others)")
    app = create_app(store, clients)
    if has_loop and settings.server != "waitress":
        run_loop(app, listeners, settings, store, clients)
    else:
        run_waitress(app, listeners, settings)
    store.close()


def tell_where(settings: argparse.Namespace, listeners: list[socket.socket], schema: Schema, new_token: str) -> None:
    """Print where the service listens and, at a first start, how to send it a message."""
    path = unix_path(settings.listen)
    url = settings.listen if path else f"http://{settings.listen.rpartition(':')[0]}:{listeners[0].getsockname()[1]}"
    print(f"Inlet {__version__} is listening on {url}", flush=True)
    if new_token:
        to = f"--unix-socket {path} http://localhost" if path else url.replace("//0.0.0.0:", "//127.0.0.1:")
        to += f"{settings.prefix}/{next(iter(schema.streams))}"
        print(FIRST_STEPS.format(token=new_token, to=to), flush=True)


def unix_path(listen: str) -> str:
    """Return the path of a Unix socket in the setting --listen; empty if it is not one."""
    return listen.removeprefix("unix:") if listen.startswith("unix:") else ""


def listening_sockets(listen: str) -> list[socket.socket]:
    """Return sockets that listen there, one for each address of a host; OSError or ValueError if that cannot be."""
    if path := unix_path(listen):
        return [listening_unix_socket(path)]
    host, _, port = listen.rpartition(":")
    listeners: list[socket.socket] = []
    failure = OSError()
    for family, _, _, _, address in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
        if listeners:  # if 0 was asked for, all have the port that the system has chosen for the first
            address = (address[0], listeners[0].getsockname()[1], *address[2:])
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        try:
            listeners.append(socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both))
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # localhost may have an IPv6 that is off
                raise
            failure = error
    if not listeners:
        raise failure
    return listeners


def listening_unix_socket(path: str) -> socket.socket:
    """Return a Unix socket that listens at a path; OSError or ValueError if that cannot be."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as other, contextlib.suppress(OSError):
        other.connect(path)
        raise ValueError("another process listens there")
    if Path(path).is_socket():  # that nobody has listened on since its process ended
        os.unlink(path)
    listener = socket.create_server(path, family=socket.AF_UNIX, backlog=BACKLOG)
    # Any user may connect: tokens decide who may come in, and the proxy in front mostly runs as another user.
    os.chmod(path, 0o666)
    return listener


def connection_limit(threads: int) -> int:
    """Return how many connections there may be, and raise the limit of open files to the most that is allowed."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = 64 + 3 * threads  # each thread that reads opens the database, its WAL and its -shm
    return CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, files - spare))


def run_loop(
    app: falcon.App, listeners: list[socket.socket], settings: argparse.Namespace, store: Store, clients: Clients
) -> None:
    """Serve by extras/loop.py until one of STOP_SIGNALS comes."""

    def after_turn() -> None:
        store.look_after()
        store.write()

    def is_due() -> bool:
        return bool(store.queue)

    def lane_of(path: str, query: str) -> int:
        """Return which threads run a GET: probes wait for no reads, and plain pages not for slow ones."""
        name = f"{path.removeprefix(settings.prefix)}/".split("/")[1]
        if name in ("livez", "healthz", "metrics"):
            return 0 if name == "livez" else 1
        stream = store.schema.streams.get(name)
        is_plain = PLAIN_QUERY.fullmatch(query)
        return 3 if stream and not (stream.takes and is_plain) else 2

    lanes = 1, 1, max(1, settings.threads // 2), max(1, settings.threads - settings.threads // 2)
    room, limit = max(BODIES_BYTES, 4 * settings.max_body), connection_limit(settings.threads)
    server = extra("loop").Server(
        app, listeners, clients.admit, after_turn, is_due, lane_of, lanes, settings.prefix, room, limit
    )
    server.run(STOP_SIGNALS)


class Counted:
    """An app for waitress that knows how many threads run it. readers: how many of them may answer a GET.

    A thread of waitress is blocked while a slow client takes a large answer, or while it waits for its turn to read.
    """

    def __init__(self, app: falcon.App, readers: int):
        self._app = app
        self._running: set[int] = set()
        self._may_read = threading.BoundedSemaphore(readers)

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        reads = environ["REQUEST_METHOD"] in ("GET", "HEAD") and not environ["PATH_INFO"].startswith(WITHOUT_TOKEN)
        self._running.add(threading.get_ident())
        try:
            if reads and not self._may_read.acquire(blocking=False):
                status, headers, content = Problem(503, "Too many answers are being read. Try again.").answer()
                start_response(status, [*headers, ("Content-Length", str(len(content)))])
                yield content
                return
            try:
                yield from self._app(environ, start_response)
            finally:
                if reads:
                    self._may_read.release()
        finally:
            self._running.discard(threading.get_ident())

    def stop(self, *_: Any) -> NoReturn:
        """Let requests end. This handler of a signal runs in the thread of waitress's loop, so no others come."""
        deadline, quiet = time.monotonic() + DRAIN_S, 0
        while quiet < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
            quiet = 0 if self._running else quiet + 1
        raise SystemExit


def run_waitress(app: falcon.App, listeners: list[socket.socket], settings: argparse.Namespace) -> None:
    """Serve by waitress until one of STOP_SIGNALS comes."""
    import waitress  # other servers, and the loop, do without it

    threads = WAITRESS_THREADS + settings.threads
    counted = Counted(app, threads // 2)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a warning for each request that waits for a thread
    server = waitress.create_server(
        counted,
        sockets=listeners,
        threads=threads,
        url_prefix=settings.prefix,
        ident="Inlet",
        max_request_header_size=4096,  # its expressions go back and forth: 16 KB of `GET a://111…` take 26 s
        max_request_body_size=settings.max_body + READ_OF_TOO_LARGE,  # up to this, the app itself says what is wrong
        connection_limit=connection_limit(threads),
        channel_timeout=120,  # seconds
        outbuf_high_watermark=1024 * 1024,  # bytes of an answer, above which its thread waits for the client
        clear_untrusted_proxy_headers=False,
        asyncore_use_poll=True,  # select() takes only 1024 files
    )
    for number in STOP_SIGNALS:
        signal.signal(number, counted.stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    server.run()


# ==================== The command line ==============================================================

COMMANDS = """commands:
  (none)                serve
  client add NAME       make a client, or one more token for it, and print the token, once, alone on stdout
  client list           print the clients: name, the beginning of the token's digest, when it was made, grants, scheme
  client remove NAME [DIGEST]  remove a client, or one token by the beginning of its digest; it stops within a second
  migrate               rebuild what schema.sql has changed; if old messages break a new rule, say which
  backup PATH           write a consistent copy of the database, while the service runs
  forward STREAM URL    follow a stream of a service that runs, and POST each message, signed, to a URL

A flag overrides the environment variable named beside it.
Exit status: 0 done, 1 not done (the line on stderr says why), 2 wrong usage or configuration."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors that are SetupErrors."""

    def error(self, message: str) -> NoReturn:
        raise SetupError(f"{message} (--help tells more)")


def parser() -> argparse.ArgumentParser:
    """Return the command line; its --help is the reference."""
    about = "Takes in JSON messages over HTTP and files each one as a row in SQLite."
    as_it_stands = argparse.RawDescriptionHelpFormatter
    top = OneLineParser("service.py", description=about, epilog=COMMANDS, formatter_class=as_it_stands)
    top.add_argument("command", nargs="*", metavar="COMMAND", help="what to do, see below; to serve if left out")
    for name, (default, _, takes) in SETTINGS.items():
        if_not_set = default.name if isinstance(default, Path) else default or "not set"
        value = os.environ.get(variable(name), "").strip() or str(default)
        text = f"{takes}; {variable(name)}, {if_not_set}"
        top.add_argument(f"--{name}", metavar="VALUE", default=value, type=partial(setting, name), help=text)
    grants = "what client add grants: write, read, write:STREAM, read:STREAM; those of NAME, or write read"
    top.add_argument("--can", nargs="+", action="extend", metavar="GRANT", help=grants)
    signs = "client add: the sender signs its messages by this scheme (extras/senders.py); prints its secret"
    top.add_argument("--signs", metavar="SCHEME", help=signs)
    top.add_argument("--secret", metavar="-", choices="-", help="client add --signs: read the secret from stdin")
    body = "client add: the same body is one message, for a sender that can send no key"
    top.add_argument("--key", choices=["body"], help=body)
    top.add_argument("--replace", action="store_true", help="let backup replace a file")
    top.add_argument("--cursor", metavar="PATH", help="forward: the file that says how far it is; STREAM.cursor")
    top.add_argument("--version", action="version", version=f"Inlet {__version__}")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        options = parser().parse_intermixed_args(arguments)
        database = database_at(options.database)
        match options.command:
            case []:
                serve(options, database)
            case ["client", *words]:
                client_command(database, words, options)
            case ["migrate"] if not database.is_made():
                print("there is no database yet: the first start makes it")
            case ["migrate"]:
                return needed("migrate", "the command migrate").run(database, read_schema(options.schema))
            case ["backup", path]:
                backup(database, Path(path), options.replace)
            case ["forward", stream, url]:
                return needed("forward", "the command forward").run(stream, url, options)
            case words:
                raise SetupError(f"there is no command {' '.join(words)!r}, or it takes other words: --help shows them")
        return 0
    except SetupError as error:
        print(f"inlet: {error}", file=sys.stderr)
        return 2
    except (sqlite3.Error, OSError) as error:
        print(f"inlet: {database}: {error}", file=sys.stderr)
        return 1


def client_command(database: Database, words: list[str], options: argparse.Namespace) -> None:
    """List the clients, or add or remove one, whatever schema.sql looks like; SetupError if that makes no sense."""
    secret = ""
    if words[:1] == ["add"] and not database.is_made():
        Store(database, read_schema(options.schema)).open()  # without a client `default`
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
                remove_client(db, name, *rest)
            case _:
                raise SetupError("client takes add NAME [--can GRANT …], list, or remove NAME, with --can at the end")
        db.execute("COMMIT")
    if secret:
        print(secret)


def remove_client(db: sqlite3.Connection, name: str, digest: str | None = None) -> None:
    """Remove a client, or its one token whose digest begins like this; SetupError if there is none."""
    tokens = "FROM clients WHERE name = ? AND substr(token, 1, length(?)) = ?"
    values = (name, digest or "", digest or "")
    (count,) = db.execute(f"SELECT count(*) {tokens}", values).fetchone()
    if digest is not None and (not digest or count != 1):
        raise SetupError(f"{name} has not exactly one token whose digest begins with {digest!r}")
    if not count:
        raise SetupError(f"there is no client {name}")
    db.execute(f"DELETE {tokens}", values)


def add_client(db: sqlite3.Connection, name: str, options: argparse.Namespace) -> str:
    """Make a client and return its token, or its secret if it signs; SetupError if something makes no sense."""
    if not re.fullmatch(r"\w[\w.@-]{0,63}", name):
        raise SetupError("NAME takes up to 64 letters, digits, '.', '_', '-' and '@'")
    of_old = db.execute("SELECT c.can FROM clients AS c WHERE c.name = ? ORDER BY c.made_at DESC", (name,)).fetchone()
    old = of_old[0].split() if of_old else []
    can = options.can or old or ["write", "read"]
    if (options.key or KEY_IS_BODY in old) and KEY_IS_BODY not in can:
        can.append(KEY_IS_BODY)
    require_grants(db, [grant for grant in can if grant != KEY_IS_BODY])
    if options.secret and not options.signs:
        raise SetupError("--secret is for a sender with --signs")
    secret = secrets.token_urlsafe(32)
    if options.signs:
        given = sys.stdin.readline().strip() if options.secret else None
        secret = needed("senders", "--signs").secret_for(options.signs, given)
    # Older versions would accept the secret as a token if this were its plain digest.
    digest = digest_of(f"{options.signs} {secret}" if options.signs else secret)
    if db.execute("SELECT 1 FROM clients AS c WHERE c.token = ?", (digest,)).fetchone():
        raise SetupError("this secret is there already")
    kept = secret if options.signs else None
    db.execute(ADD_CLIENT, (name, digest, " ".join(can), utc_now(), options.signs, kept))
    return secret


def require_grants(db: sqlite3.Connection, grants: list[str]) -> None:
    """Raise SetupError for what is no grant, or one for a stream that is not there."""
    found = [made for made in schema_objects(db).values() if made.kind in ("table", "view")]
    streams = [made.name for made in found if made.kind == "view" or is_stream(db, made.name)]
    for grant in grants:
        action, colon, stream = grant.partition(":")
        if action not in ("write", "read"):
            raise SetupError(f"{grant} is no grant: they are write, read, write:STREAM and read:STREAM")
        if colon and stream not in streams:
            raise SetupError(f"there is no stream {stream}: there are {', '.join(streams)}")


def backup(database: Database, target: Path, replace: bool = False) -> None:
    """Copy a database as it is at one moment, while others write to it; SetupError if target cannot be made.

    target comes into being, or is replaced if that is allowed, only when the copy is whole and on disk.
    """
    target = target.resolve()
    is_taken = f"{target} is there already: take another name, or --replace it"
    require_place(target, database)
    if target.exists() and not replace:
        raise SetupError(is_taken)
    try:
        fd, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent)
        os.close(fd)
    except OSError as error:
        raise SetupError(f"{target} cannot be written: {error}") from None
    copy = Path(name)
    try:
        database.copy_to(name)
        require_whole(copy)
        with open(copy, "rb") as file:
            os.fsync(file.fileno())
        if replace:
            copy.replace(target)
        else:
            os.link(copy, target)  # which fails if it has been made meanwhile
        sync_directory(target.parent)
    except FileExistsError:
        raise SetupError(is_taken) from None
    finally:
        copy.unlink(missing_ok=True)


def require_whole(copy: Path) -> None:
    """Raise DatabaseError if a copy is damaged, as its source then is.

    quick_check also tells where a generated column has another type than its own, such as a number that is too large
    for an INTEGER. That is no damage: SQLite converts what a rule does not refuse.
    """
    with contextlib.closing(sqlite3.connect(copy)) as db:
        tables = [made.name for made in schema_objects(db).values() if made.kind == "table"]
        columns = [(table, column) for table in tables for column in columns_of(db, table).values()]
        generated = {f"{table}.{column.name}" for table, column in columns if column.is_generated}
        for (found,) in db.execute(f"PRAGMA quick_check({2**31 - 1})"):  # all that it finds, not the first 100
            of_type = re.fullmatch(r"(?:non-\w+|TEXT|NUMERIC) value in (.*)", found)
            if found != "ok" and not (of_type and of_type[1] in generated):
                raise sqlite3.DatabaseError(f"the copy is damaged: {found}")


def require_place(target: Path, database: Database) -> None:
    """Raise SetupError if a backup there could be mistaken for something else, or destroy it."""
    if str(target) == str(database):
        raise SetupError(f"{target} is the database itself: take another name")
    for other in (f"{target}{suffix}" for suffix in ("-wal", "-shm", "-journal", "-lock")):
        if os.path.lexists(other):
            raise SetupError(f"{target} may be a database that is in use, for there is {other}: take another name")
    if target.is_dir():
        raise SetupError(f"{target} is a folder: backup takes the path of a file")


def show(progress: str) -> None:
    """Show how far something is, on a terminal."""
    if sys.stderr.isatty():
        print(progress, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
