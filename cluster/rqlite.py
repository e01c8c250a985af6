"""Inlet's engine for rqlite 8: SQLite on several machines, which agree on each write by Raft. https://rqlite.io

Cluster does what Database does in service.py, by the HTTP API of the nodes: https://rqlite.io/docs/api. What is sent to
/db/execute is one entry of the Raft log. It is answered when a majority of the nodes has it on disk, and the leader has
applied it.
"""

import base64
import contextlib
import http.client
import json
import re
import select
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import service
from service import BUSY_TIMEOUT_S, PAGE_BYTES, READ_TIMEOUT_S, Entry, Schema, SetupError, Stored, Stream

CONNECT_TIMEOUT_S = 1.0
WRITE_TIMEOUT_S = 4.0  # a new leader is there after 1 to 3 s
BYTES_A_SECOND = 4 * 1024 * 1024  # that a write takes at least
MIGRATE_TIMEOUT_S = 600.0
ROW_AS_JSON = "row as JSON"  # the only column of a query that gives its rows like this
IDLE_S = 20.0  # a connection that was idle for so long is not used again
PAUSE_S = 0.05  # before a node is asked again
REQUEST_BYTES = 8 * 1024 * 1024  # of messages in one entry of the Raft log
READS = re.compile(r"SELECT|EXPLAIN|PRAGMA (?!\w+ =)")
BLOB = re.compile(r"\s*x'[0-9a-f]*'\s*", re.IGNORECASE)  # a text that rqlite takes for a BLOB

# What would differ from node to node: where it stands, a pattern, and why it is refused.
TIME = "date|time|datetime|julianday|unixepoch"
UNSAFE_RULES = (
    ("table trigger insert", r"\b(?:random|randomblob) \(", "each node has random numbers of its own"),
    ("table trigger insert", r"\bcurrent_(?:date|time|timestamp)\b", "each node has a clock of its own"),
    ("table insert", rf"\b(?:{TIME}|strftime) \((?: \)|[^)]*'now')", "each node has a clock of its own"),
    (
        "trigger",
        rf"\b(?:{TIME}) \( (?!(?:\w+ \. )?received_at\b)|\bstrftime \( (?!'[^']*' , (?:\w+ \. )?received_at\b)",
        "a time can be 'now', and each node has a clock of its own; only received_at is safe",
    ),
    ("trigger", r"\b(?:changes|total_changes|last_insert_rowid) \(", "each node counts for itself"),
    ("trigger", r"\braise \( abort , (?!'(?:[^']|'')*' \))", "RAISE takes only a text in single quotes on a cluster"),
)
# SQLite's sentences, because rqlite gives no codes. What is not here is a fault, and not a refusal.
ERRORS = (
    ("NOT NULL constraint failed: ", "SQLITE_CONSTRAINT_NOTNULL"),
    ("CHECK constraint failed: ", "SQLITE_CONSTRAINT_CHECK"),
    ("UNIQUE constraint failed: ", "SQLITE_CONSTRAINT_UNIQUE"),
    ("FOREIGN KEY constraint failed$", "SQLITE_CONSTRAINT_FOREIGNKEY"),
    (r"cannot store \w+ value in \w+ column ", "SQLITE_CONSTRAINT_DATATYPE"),
    ("datatype mismatch$", "SQLITE_MISMATCH"),
    ("string or blob too big$", "SQLITE_TOOBIG"),
    ("integer overflow$|malformed JSON$|bad JSON path|JSON path error|JSON cannot hold ", "SQLITE_ERROR"),
    ("non-deterministic use of |LIKE or GLOB pattern too complex$", "SQLITE_ERROR"),
    ("database or disk is full$", "SQLITE_FULL"),
    ("query timeout$", "SQLITE_INTERRUPT"),
)
# What has not to do with the statement, so that it can be different in each node.
FAULT = re.compile(
    "disk I/O error|database or disk is full|out of memory|database disk image|database .*is locked|attempt to write"
    "|unable to open|file is not a database|interrupted|.*timeout|context "
)


class NotTaken(sqlite3.OperationalError):
    """A request that was certainly not carried out, so it can be sent again."""


class Node:
    """One rqlited, and the connections to it that nobody uses."""

    def __init__(self, url: SplitResult):
        self.name = f"{url.hostname}:{url.port or 4001}"
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._new: Callable[..., http.client.HTTPConnection] = lambda **more: kind(
            url.hostname, url.port or 4001, **more
        )
        self._headers = {"Content-Type": "application/json"}
        if url.username:
            user = f"{unquote(url.username)}:{unquote(url.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        self._idle: list[tuple[http.client.HTTPConnection, float]] = []

    @contextlib.contextmanager
    def answer(self, method: str, path: str, body: bytes, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
        """Send a request, and give a block the answer, which it has to read to its end.

        Raises NotTaken if there is no connection, and OSError or HTTPException if there is no answer.
        """
        connection = self._idle_connection()
        if not connection:
            connection = self._new(timeout=min(timeout_s, CONNECT_TIMEOUT_S))
            try:
                connection.connect()
            except OSError as error:
                raise NotTaken(f"{self.name}: {error}") from None
        try:
            connection.sock.settimeout(timeout_s)
            connection.request(method, path, body, self._headers)
            yield connection.getresponse()
        except BaseException:
            connection.close()
            raise
        self._idle.append((connection, time.monotonic()))

    def _idle_connection(self) -> http.client.HTTPConnection | None:
        """Return a connection that the node has not closed: a write that is sent on such a one has no known outcome."""
        while self._idle:
            with contextlib.suppress(IndexError):
                connection, used_at = self._idle.pop()
                if connection.sock and time.monotonic() < used_at + IDLE_S:
                    poller = select.poll()
                    poller.register(connection.sock, select.POLLIN)
                    if not poller.poll(0):
                        return connection
                connection.close()
        return None

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[0].close()


class Rows(list):
    """The rows of a query, with the methods of a cursor."""

    def fetchall(self) -> list[tuple]:
        return self

    def fetchone(self) -> tuple | None:
        return self[0] if self else None


class Connection:
    """What the service uses of an sqlite3.Connection. COMMIT sends all that was written since BEGIN, all or none.

    done_by_another: the error which says that another process has done the same before.
    """

    def __init__(self, cluster: "Cluster", level: str, deadline: float, done_by_another: str = ""):
        self.deadline = deadline
        self._cluster = cluster
        self._level = level
        self._done_by_another = done_by_another
        self._writes: list[list] = []

    def execute(self, sql: str, values: tuple | dict = ()) -> Rows:
        if READS.match(sql):
            return self._cluster.query(sql, values, self._level, self.deadline)
        if sql.startswith("BEGIN"):
            self._writes = []
        elif sql != "COMMIT":
            self._writes.append([sql, *values])
        elif self._writes:
            try:
                self._cluster.execute_all(self._writes, self.deadline)
            except sqlite3.OperationalError as error:
                if str(error) != self._done_by_another:
                    raise
        return Rows()


class Recorder:
    """A connection to a copy of the database, which notes what is written."""

    def __init__(self, copy: sqlite3.Connection):
        self._copy = copy
        self.writes: list[list] = []

    def execute(self, sql: str, values: tuple = ()) -> sqlite3.Cursor:
        if re.match("CREATE|DROP|INSERT|UPDATE|DELETE", sql.lstrip(), re.IGNORECASE):
            self.writes.append([sql, *values])
        return self._copy.execute(sql, values)

    @property
    def in_transaction(self) -> bool:
        return self._copy.in_transaction


class Cluster:
    """The nodes of a cluster. One of them is asked, as long as it answers; it passes on what only the leader can do."""

    def __init__(self, where: str):
        first, *others = where.split(",")
        before, _, _ = first.rpartition("@")
        before = f"{before}@" if before else f"{first.partition('://')[0]}://"
        try:
            urls = [urlsplit(each if "://" in each else before + each) for each in (first, *others)]
            self._nodes = [Node(url) for url in urls]
            wrong = any(not url.hostname or url.path.strip("/") or url.query for url in urls)
        except ValueError:
            wrong = True
        if wrong:  # without the value, for it can hold a password
            raise SetupError(
                "--database (INLET_DATABASE) takes http://[USER:PASSWORD@]HOST:PORT,HOST:PORT,… for rqlite"
            )
        self._preferred = 0  # the node that is asked first
        self._raised: set[str] = set()  # the texts of RAISE

    def __str__(self) -> str:
        return f"the cluster at {', '.join(node.name for node in self._nodes)}"

    def close(self) -> None:
        for node in self._nodes:
            node.close()

    # The start

    def _require_safe(self, schema: Schema) -> None:
        """Raise SetupError if the nodes would compute a rule of schema.sql differently."""
        inserts = [("insert", "an INSERT", sql) for sql in schema.statements if service.normal(sql)[0] == "insert"]
        for kind, name, sql in [*((made.kind, made, made.sql) for made in schema.objects.values()), *inserts]:
            for kinds, pattern, reason in UNSAFE_RULES:
                if kind in kinds.split() and re.search(pattern, service.plain(sql)):
                    raise SetupError(f"{name}: on a cluster, {reason}")
        for trigger in (made for made in schema.objects.values() if made.kind == "trigger"):
            if re.search(rf"\binto \W?{re.escape(trigger.table)}\b", service.plain(trigger.sql)):
                raise SetupError(f"{trigger}: on a cluster, a trigger cannot insert into its own table")
            texts = re.findall(r"\braise \( abort , '((?:[^']|'')*)'", service.plain(trigger.sql))
            self._raised.update(text.replace("''", "'") for text in texts)

    @contextlib.contextmanager
    def alone(self, mode: str = "rw", schema: Schema | None = None) -> Iterator[Connection]:
        """Give a block a connection, of which the writes between BEGIN and COMMIT are all done or none.

        With the mode rwc the database may be new, and has this schema. Else SetupError is raised if it is new.
        """
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        if mode == "rwc":
            self._require_safe(schema)
            self._require_foreign_keys()
            yield Connection(self, "strong", deadline, "table clients already exists")
        else:
            self._require_database()
            yield Connection(self, "strong", deadline)

    def _require_database(self) -> None:
        made = "SELECT 1 FROM sqlite_schema AS s WHERE s.name = 'clients'"
        if not self.query(made, (), "strong", time.monotonic() + BUSY_TIMEOUT_S):
            raise SetupError(f"there is no database in {self}: the service makes it, by its first start")

    def _require_foreign_keys(self) -> None:
        for node in self._nodes:
            with contextlib.suppress(sqlite3.Error):
                results = self._ask(node, "/db/query?level=none", b'["PRAGMA foreign_keys"]', CONNECT_TIMEOUT_S)
                if results[0].get("values") != [[1]]:
                    raise SetupError(f"the node {node.name} checks no foreign keys: start it with -fk")

    # Writing

    @contextlib.contextmanager
    def transaction(self, deadline: float) -> Iterator[Connection]:
        """Give a block a connection that reads what has been written. Each request of insert() is a transaction."""
        yield Connection(self, "linearizable", deadline)

    def insert(self, db: Connection, entries: list[Entry], received_at: str) -> list[Stored | Exception]:
        """Insert the rows of entries. A refusal undoes only its entry.

        One statement inserts what is for the same stream: that takes half the time of one for each message. If it is
        refused, nothing of it is there, and each entry gets a statement of its own.
        """
        found: dict[Entry, Stored | Exception] = {}
        waiting = together(entries)
        while waiting:
            refused = []
            for group, result in zip(waiting, self._send_groups(waiting, received_at, db.deadline), strict=True):
                error = self._error(result["error"]) if "error" in result else None
                if error is None:
                    found |= stored(group, result.get("last_insert_id", 0), received_at)
                elif FAULT.match(str(error)):  # of the leader: other nodes may have inserted it
                    found |= dict.fromkeys(group, error)
                elif len(group) > 1:
                    refused += [[entry] for entry in group]
                else:
                    found[group[0]] = (
                        self._insert_lines(group[0], received_at, db.deadline) if group[0].batch else error
                    )
            waiting = refused
        return [found[entry] for entry in entries]

    def _send_groups(self, groups: list[list[Entry]], received_at: str, deadline: float) -> list[dict[str, Any]]:
        results, statements, size = [], [], 0
        for group in groups:
            statements.append(insert_of(group, received_at))
            size += sum(len(body) for entry in group for body in entry.bodies)
            if size >= REQUEST_BYTES or group is groups[-1]:
                results += self._send("/db/execute?noparse", statements, deadline)
                statements, size = [], 0
        return results

    def _insert_lines(self, entry: Entry, received_at: str, deadline: float) -> Stored | Exception:
        """Insert a batch that was refused line by line, all or none, and return the error of the bad line.

        What has refused it can be gone meanwhile: then it is stored.
        """
        statements = [
            insert_of([replace(entry, key=key, bodies=[body])], received_at)
            for _, _, key, body, *_ in service.rows_of(entry, received_at)
        ]
        try:
            results = self._send("/db/execute?noparse&transaction", statements, deadline)
        except sqlite3.Error as error:
            return error
        if "error" in results[-1]:
            entry.line = len(results)
            return self._error(results[-1]["error"])
        return stored([entry], results[-1]["last_insert_id"], received_at)[entry]

    def execute_all(self, writes: list[list], deadline: float, timeout_s: float = WRITE_TIMEOUT_S) -> None:
        """Carry out all statements, or none: then sqlite3.Error is raised."""
        results = self._send("/db/execute?noparse&transaction", writes, deadline, timeout_s)
        if "error" in results[-1]:
            raise self._error(results[-1]["error"])

    # Reading

    @contextlib.contextmanager
    def reader(
        self, limit_s: float = READ_TIMEOUT_S, abandoned: Callable[[], bool] = lambda: False
    ) -> Iterator[Connection]:
        """Give a block a connection for queries; after limit_s they end with SQLITE_INTERRUPT."""
        yield Connection(self, "weak", time.monotonic() + limit_s)

    def query(self, sql: str, values: tuple | dict, level: str, deadline: float) -> Rows:
        """Return the rows of a query. Levels: https://rqlite.io/docs/api/read-consistency"""
        parameters = list(values)
        if isinstance(values, dict):
            for name in [name for name, value in values.items() if isinstance(value, str) and BLOB.fullmatch(value)]:
                literal = "'" + values[name].replace("'", "''") + "'"
                sql = re.sub(rf":{name}\b", lambda _, literal=literal: literal, sql)
                values = {other: value for other, value in values.items() if other != name}
            parameters = [values]
        left_ms = max(1, int((deadline - time.monotonic()) * 1000))
        path = f"/db/query?level={level}&timeout={left_ms + 500}ms&db_timeout={left_ms}ms"
        (result,) = self._send(path, [[sql, *parameters]], deadline + 1)  # so that the node is the one that ends it
        if "error" in result:
            raise self._error(result["error"])
        rows = result.get("values", ())
        if result["columns"] == [ROW_AS_JSON]:
            rows = (json.loads(bytes.fromhex(text).decode(errors="replace")) for (text,) in rows)
        return Rows(map(tuple, rows))

    def page_sql(self, stream: Stream, conditions: str) -> str:
        """Return the SQL of a page. It ends after PAGE_BYTES in the node already.

        The row of a view is one JSON text in hexadecimal: rqlited cannot send an infinite number, or text that is not
        UTF-8, and writes 1.0 as 1.
        """
        order = " ORDER BY t.id" if stream.has_ids else ""
        columns = ("body", *["headers"] * stream.has_headers) if stream.has_ids else stream.fields
        size = " + ".join(f"ifnull(octet_length(t.{service.quoted(column)}), 0)" for column in columns)
        before = f"sum({size}) OVER ({order} ROWS UNBOUNDED PRECEDING) - ({size})"
        page = (
            f'SELECT t.*, {before} AS "bytes before" FROM "{stream.name}" AS t WHERE {conditions}{order} LIMIT :limit'
        )
        selected = ", ".join(stream.selected)
        if not stream.takes:
            members = " || ',' || ".join(map(json_value, stream.selected))
            selected = f"hex('[' || {members} || ']') AS {service.quoted(ROW_AS_JSON)}"
        return f'SELECT {selected} FROM ({page}) AS t WHERE t."bytes before" < {PAGE_BYTES}{order}'

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the database, by the name of the metric."""
        sql = "SELECT c.page_count * s.page_size FROM pragma_page_count AS c, pragma_page_size AS s"
        with contextlib.suppress(sqlite3.Error):
            return {"database_bytes": self.query(sql, (), "none", time.monotonic() + CONNECT_TIMEOUT_S)[0][0]}
        return {}

    # migrate and backup

    def copy_to(self, target: str) -> None:
        """Write a copy of the database to a file: https://rqlite.io/docs/guides/backup"""
        self._require_database()
        deadline, failure = time.monotonic() + BUSY_TIMEOUT_S, ""
        while time.monotonic() < deadline:  # a node makes one copy at a time
            for node in self._nodes:
                try:
                    with node.answer("GET", "/db/backup", b"", MIGRATE_TIMEOUT_S) as answer, open(target, "wb") as file:
                        shutil.copyfileobj(answer, file)
                    if answer.status == 200 and is_whole(target):
                        return
                    failure = f"{node.name}: {answer.status} {answer.reason}"
                except (sqlite3.Error, OSError, http.client.HTTPException) as error:
                    failure = f"{node.name}: {error}"
            time.sleep(PAUSE_S)
        raise sqlite3.OperationalError(f"no node gives a whole copy: {failure}")

    @contextlib.contextmanager
    def to_migrate(self, schema: Schema) -> Iterator[Recorder]:
        """Give a block a connection to a copy. If it raises nothing, what it has written is done to the cluster.

        The copy tells which rows break a rule. The statements copy whole tables, so with what has come meanwhile.
        """
        self._require_safe(schema)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy.db"
            self.copy_to(str(copy))
            with contextlib.closing(service.connect(copy, "rw", BUSY_TIMEOUT_S)) as db:
                recorder = Recorder(db)
                before = acting_keys(db)
                yield recorder
                keys = before | acting_keys(db)
        dropped = {sql for sql, *_ in recorder.writes}
        for table, child in keys:  # the cluster cannot leave foreign keys aside while a table is made anew
            if f"DROP TABLE {service.quoted(table)}" in dropped:
                raise SetupError(
                    f"table {table} cannot be changed on a cluster: ON DELETE in {child} would take effect"
                )
        if recorder.writes:
            writes = [["PRAGMA defer_foreign_keys = ON"], *recorder.writes]
            self.execute_all(writes, time.monotonic() + MIGRATE_TIMEOUT_S, MIGRATE_TIMEOUT_S)

    # Requests

    def _send(
        self, path: str, statements: list[list], deadline: float, timeout_s: float = WRITE_TIMEOUT_S
    ) -> list[dict[str, Any]]:
        """Return the results of statements, one for each.

        What was certainly not carried out is sent to the next node, until the deadline, and so are queries. Raises
        sqlite3.OperationalError for what has no known outcome.
        """
        is_query, body = path.startswith("/db/query"), json.dumps(statements).encode()
        timeout_s += len(body) / BYTES_A_SECOND
        while True:
            asked, left_s = self._preferred, deadline - time.monotonic()
            try:
                return self._ask(self._nodes[asked], path, body, left_s if is_query else min(left_s, timeout_s))
            except (NotTaken, OSError, http.client.HTTPException) as error:
                self._preferred = (asked + 1) % len(self._nodes)
                can_repeat = isinstance(error, NotTaken) or is_query
                if not can_repeat or time.monotonic() + PAUSE_S > deadline:
                    raise sqlite3.OperationalError(f"{type(error).__name__}: {error}") from None
            time.sleep(PAUSE_S)

    def _ask(self, node: Node, path: str, body: bytes, timeout_s: float) -> list[dict[str, Any]]:
        with node.answer("POST", path, body, max(timeout_s, PAUSE_S)) as answer:
            text = answer.read().decode(errors="replace").strip()
        found: Any = None
        if answer.status == 200:
            with contextlib.suppress(ValueError):
                found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("results"), list):
            return found["results"]
        error = str(found["error"]) if isinstance(found, dict) and "error" in found else text
        if error.endswith(("not leader", "leader not found")) or "write protobuf" in error:
            raise NotTaken(f"{node.name}: {error}")
        if error.startswith("node failed to process"):  # the node has asked the leader, and got no answer
            raise OSError(f"{node.name}: {error}")
        raise sqlite3.OperationalError(f"{node.name}: {answer.status} {error[:200]}")

    def _error(self, text: str) -> sqlite3.Error:
        """Return what SQLite would have raised, with the name of its code."""
        error = sqlite3.OperationalError(text)
        error.sqlite_errorname = next((name for pattern, name in ERRORS if re.match(pattern, text)), "")
        if text in self._raised:
            error.sqlite_errorname = "SQLITE_CONSTRAINT_TRIGGER"
        return error


def acting_keys(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """Return the tables with rows of which others are deleted or changed, each with the name of the other table."""
    found = db.execute(
        "SELECT p.name, s.name FROM sqlite_schema AS s, pragma_foreign_key_list(s.name) AS k, sqlite_schema AS p"
        " WHERE s.type = 'table' AND k.on_delete IN ('CASCADE', 'SET NULL', 'SET DEFAULT')"
        """ AND p.type = 'table' AND p.name = k."table" COLLATE NOCASE"""
    )
    return set(found)


def is_whole(database: str) -> bool:
    with contextlib.closing(sqlite3.connect(database)) as db:
        return db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)


def json_value(value: str) -> str:
    """Return the SQL that writes a value as JSON; a BLOB in hexadecimal, as service.report_row() has it."""
    as_text = (
        f"CASE typeof({value}) WHEN 'blob' THEN lower(hex({value})) WHEN 'text' THEN {value} || '' ELSE {value} END"
    )
    return f"json_quote({as_text})"  # || makes a text of JSON


def together(entries: list[Entry]) -> list[list[Entry]]:
    """Return the entries in groups that one statement can insert: messages for the same stream, or one batch."""
    groups: list[list[Entry]] = []
    open_groups: dict[str, tuple[list[Entry], int]] = {}  # by stream, with their bytes
    for entry in entries:
        if entry.batch or not entry.bodies:
            groups.append([entry])
            continue
        group, size = open_groups.get(entry.stream.name, ([], 0))
        if not group:
            groups.append(group)
        group.append(entry)
        size += len(entry.bodies[0])
        open_groups[entry.stream.name] = (group, size) if size < REQUEST_BYTES else ([], 0)
    return groups


def insert_of(group: list[Entry], received_at: str) -> list:
    """Return the statement that inserts the messages of a group, with its parameters; rqlited keeps JSON as it is."""
    stream = group[0].stream
    if stream is None:  # it only tries to write
        return ["UPDATE clients SET name = name WHERE false"]
    into, _, _ = stream.insert.partition(" VALUES ")
    columns = ", ".join(f"j.value ->> {n}" for n in range(4 + stream.has_headers))
    rows = [row for entry in group for row in service.rows_of(entry, received_at)]
    return [f"{into} SELECT {columns} FROM json_each(?) AS j", json.dumps(rows)]


def stored(group: list[Entry], last: int, received_at: str) -> dict[Entry, Stored]:
    """Return the results of entries whose messages have the ids up to this one."""
    found, count = {}, sum(len(entry.bodies) for entry in group)
    first = last - count + 1
    for entry in group:
        found[entry] = Stored(first, first + len(entry.bodies) - 1, received_at, len(entry.bodies))
        first += len(entry.bodies)
    return found
