"""The engine for rqlite 8: SQLite on several machines, which agree on each write by Raft. https://rqlite.io

Cluster does what Database does in service.py, by the HTTP API of the nodes: https://rqlite.io/docs/api. A request to
/db/execute is one entry of the Raft log. It is answered when a majority of the nodes has it on disk, and the leader has
applied it.
"""

import contextlib
import http.client
import json
import math
import re
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import service
from service import BUSY_TIMEOUT_S, PAGE_BYTES, READ_TIMEOUT_S, Entry, Schema, SetupError, Stored, Stream

if TYPE_CHECKING:
    import nodes
else:
    nodes = service.needed("nodes", "a cluster")

COPY_TIMEOUT_S = 600.0
LOOK_UP_S = 60.0  # for the outcome of a migrate whose answer was lost
LOOK_S = 0.5  # before the triggers are read again, or a statement is compiled again
REQUEST_BYTES = 8 * 1024 * 1024  # of messages in one entry of the Raft log
READS = re.compile(r"SELECT|EXPLAIN|PRAGMA (?!\w+ =)")
FRESHNESS = re.compile(r"freshness=[1-9]\d*(?:ms|s|m)")
BLOB = re.compile(r"\s*x'[0-9a-f]*'\s*", re.IGNORECASE)  # a text that rqlite takes for a BLOB
ROW_AS_JSON = "row as JSON"  # the name of a column that has a whole row, as JSON in hexadecimal
MADE_BY_ANOTHER = ("table clients already exists", "table clients_version already exists")

# A node that becomes a cluster of one by peers.json replays its log without foreign keys (store/state.go, RecoverNode).
# So each request with messages turns them on. (In the transaction of _insert_lines it could not; the one before did.)
CHECK_FOREIGN_KEYS = ["PRAGMA foreign_keys = ON"]

# The names of SQLite's errors, by what it says: rqlite gives no names.
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
# Errors of one node. Other nodes may have carried out the statement.
FAULT = re.compile(
    "disk I/O error|database or disk is full|out of memory$|database disk image is malformed|database .*is locked"
    "|attempt to write a readonly database|unable to open database file|file is not a database|interrupted$"
    "|(?:execute|query) timeout$|context |locking protocol|database schema has changed|malformed database schema"
    "|bad parameter|authorization denied|access permission denied|query aborted|unknown (?:error|operation)"
    "|abort due to |no such (?:table: |module|savepoint)|vtable constructor failed|fts5: corruption"
    "|invalid fts5 file format|cannot .* transaction|sql: |driver: |(?:unexpected )?EOF$"
)
# What migrate has not found in the copy must not be in the cluster either: a row in this table undoes all of it.
GUARD = '"must not be there when it migrates"'


class Rows(list):
    """The rows of a query, with the methods of a cursor."""

    def fetchall(self) -> list[tuple]:
        return self

    def fetchone(self) -> tuple | None:
        return self[0] if self else None


@dataclass
class Connection:
    """What the service uses of an sqlite3.Connection. COMMIT sends all that was written since BEGIN, all or none.

    A read before the COMMIT does not see what was written.
    """

    cluster: "Cluster"
    level: str  # https://rqlite.io/docs/api/read-consistency
    deadline: float
    _writes: list[list] = field(default_factory=list)

    def execute(self, sql: str, values: tuple | dict = ()) -> Rows:
        if READS.match(sql):
            rows = self.cluster.query(sql, values, self.level, self.deadline)
            is_of_one = isinstance(values, dict) and values.get("until") == (values.get("after") or 0) + 1
            if not rows and is_of_one:  # Store.message(): a leader that was paused may not know the newest rows
                rows = self.cluster.query(sql, values, "linearizable", self.deadline)
            return rows
        if sql == "COMMIT":
            try:
                self.cluster.execute_all(self._writes, self.deadline)
            except sqlite3.OperationalError as error:
                if str(error) not in MADE_BY_ANOTHER:  # a process that started at the same moment
                    raise
        elif sql != "BEGIN IMMEDIATE":
            self._writes.append(statement(sql, values))
        return Rows()


@dataclass
class Recorder:
    """A connection to a copy of the database. It records the statements that write.

    A query for what must not be there (SELECT 1 …) is recorded as an INSERT into GUARD, which fails if it finds a row.
    """

    copy: sqlite3.Connection
    writes: list[list] = field(default_factory=list)

    def execute(self, sql: str, values: tuple = ()) -> sqlite3.Cursor:
        if sql.startswith("SELECT 1 "):
            self.writes.append([f"INSERT INTO {GUARD} {sql}", *values])
        elif service.normal(sql)[0] in ("create", "drop", "insert", "update"):
            self.writes.append(statement(sql, values))
        return self.copy.execute(sql, values)

    @property
    def in_transaction(self) -> bool:
        return self.copy.in_transaction


class Cluster(nodes.Nodes):
    """A cluster of rqlite. With ?freshness, reads go to one node until it fails."""

    is_near = False

    def __init__(self, where: str):
        scheme, _, rest = where.partition("://")
        user, at, hosts = rest.rpartition("@")
        hosts, _, option = hosts.partition("?")
        try:
            super().__init__([f"{scheme}://{user}{at}{host}" for host in hosts.split(",")])
            if option and not FRESHNESS.fullmatch(option):
                raise ValueError(option)
        except ValueError:  # without the value, for it can hold a password
            raise SetupError(
                "--database takes http://USER:PASSWORD@HOST:PORT,HOST:PORT,… for a cluster, and ?freshness=2s behind it"
            ) from None
        # With ?freshness, any node answers that has heard from the leader so recently.
        self._read_level = f"none&{option}&freshness_strict" if option else "weak"
        self.opened = 0  # no files are open here that could be replaced
        self._comparison: Any = None
        self._triggers, self._triggers_at = "", -math.inf  # their SQL, and when it was read
        self._compiled: dict[str, tuple[float, bool]] = {}  # when it was tried whether a stream can take messages
        self._closed = threading.Event()
        self.unknown = 0  # messages whose outcome is not known

    def __str__(self) -> str:
        return f"the cluster at {', '.join(node.name for node in self.nodes)}"

    def close(self) -> None:
        self._closed.set()
        if self._comparison:
            self._comparison.stop()
        super().close()

    def read_in_background(self, read: Callable[[], object], interval_s: float) -> None:
        """Call read() again and again in a thread, until close(): no request waits for it."""

        def run() -> None:
            while not self._closed.wait(interval_s):
                service.run_safely(read)

        threading.Thread(target=run, name="reads", daemon=True).start()

    def measures(self) -> Iterator[tuple[str, str, str, list[tuple[dict[str, str], float]]]]:
        """Yield metrics: the name, the type, what it is, and its values with their labels."""
        asked = {"node": self.current.name}
        yield "cluster_node", "gauge", "The node that this process asks.", [(asked, 1)]
        yield "cluster_repeated_total", "counter", "Requests that were sent to a node again.", [({}, self.repeated)]
        unknown = "Messages that got 503 though they may have been stored."
        yield "cluster_unknown_total", "counter", unknown, [({}, self.unknown)]
        if self._comparison:
            yield from self._comparison.measures()

    # The start

    @contextlib.contextmanager
    def alone(self, new_schema: Schema | None = None) -> Iterator[Connection]:
        """Yield a connection. Its COMMIT carries out all writes, or none; others may write meanwhile.

        new_schema: what is made if there is nothing. Without it, SetupError is raised then.
        """
        if new_schema:
            service.needed("same", "a cluster").require_deterministic(new_schema)
            self._require_foreign_keys()
        else:
            self._require_database()
        db: Any = Connection(self, "strong", time.monotonic() + BUSY_TIMEOUT_S)
        yield db
        if new_schema and not service.is_other(db, new_schema):
            self._try_out(new_schema)
            self._comparison = self._comparison or service.extra("same").Comparison(self, new_schema)

    def _try_out(self, schema: Schema) -> None:
        """Raise SetupError if the SQLite of the nodes cannot use a stream or a view."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        for stream in schema.streams.values():
            try:
                if stream.takes:
                    self.execute_all([statement(*stream.explain)], deadline)
                else:
                    self.query(*stream.explain, "weak", deadline)
            except sqlite3.Error as error:
                raise SetupError(f"{stream.name} cannot be used in {self}: {error}") from None

    def is_made(self) -> bool:
        sql = "SELECT 1 FROM sqlite_schema AS s WHERE s.name = 'clients'"
        return bool(self.query(sql, (), "strong", time.monotonic() + BUSY_TIMEOUT_S))

    def _require_database(self) -> None:
        if not self.is_made():
            raise SetupError(f"there is no database in {self}: the service makes it, by its first start")

    def _require_foreign_keys(self) -> None:
        for node in self.nodes:  # of those that answer
            with contextlib.suppress(sqlite3.Error, OSError, http.client.HTTPException):
                results = self.ask(node, "/db/query?level=none", b'["PRAGMA foreign_keys"]', nodes.CONNECT_TIMEOUT_S)
                if results[0].get("values") != [[1]]:
                    raise SetupError(f"the node {node.name} checks no foreign keys: start it with -fk")

    # Writing

    @contextlib.contextmanager
    def transaction(self, deadline: float) -> Iterator[Connection]:
        """Yield a connection that reads all that is stored. There is no transaction: insert() needs none."""
        yield Connection(self, "linearizable", deadline)

    def insert(self, db: Connection, entries: list[Entry], received_at: str) -> list[Stored | Exception]:
        """Insert the rows of entries. A refusal undoes only its entry.

        All messages for one stream are one statement: that takes half the time of a statement for each. A statement
        that is refused leaves nothing, and then each of its entries gets a statement of its own.
        """
        db.deadline = max((entry.deadline for entry in entries), default=db.deadline)
        results: dict[Entry, Stored | sqlite3.Error] = {}
        for portion in portions(entries):
            groups = grouped(portion)
            while groups:
                groups = self._insert_groups(groups, received_at, results)
        return [results[entry] for entry in entries]

    def _insert_groups(
        self, groups: list[list[Entry]], received_at: str, results: dict[Entry, Stored | sqlite3.Error]
    ) -> list[list[Entry]]:
        """Insert groups by one request, and add the results of their entries. Returns what has to be tried next.

        An entry whose deadline has passed is withdrawn, as long as it is certain that no node has taken it.
        """
        entries = [entry for group in groups for entry in group]
        deadlines = [entry.deadline for entry in entries]
        inserts = [insert_of(group[0].stream, rows_of(group, received_at)) for group in groups]
        writes = [CHECK_FOREIGN_KEYS, *inserts]
        try:
            _, *answers = self.send("/db/execute?noparse", writes, max(deadlines), repeat_until=min(deadlines))
        except nodes.NotTaken as error:
            late = [entry for entry in entries if entry.deadline < time.monotonic() + nodes.PAUSE_S]
            results |= dict.fromkeys(late, error)
            return [in_time for group in groups if (in_time := [entry for entry in group if entry not in late])]
        except sqlite3.Error as error:
            self.unknown += sum(len(entry.bodies) for entry in entries)
            results |= dict.fromkeys(entries, error)
            return []
        again: list[list[Entry]] = []
        for group, answer in zip(groups, answers, strict=True):
            refusal = self._refusal_in(answer, group[0].stream)
            if not refusal:
                results |= results_of(group, answer, received_at)
            elif refusal.sqlite_errorname not in service.REFUSALS and FAULT.match(str(refusal)):
                results |= dict.fromkeys(group, refusal)
            elif len(group) > 1:
                again += [[entry] for entry in group]
            else:
                lines = group[0].lines
                results[group[0]] = self._insert_lines(group[0], received_at) if lines else refusal
        return again

    def _insert_lines(self, entry: Entry, received_at: str) -> Stored | sqlite3.Error:
        """Insert a refused batch again, with a statement for each line, to find the bad line. It can succeed now."""
        statements = [insert_of(entry.stream, [row]) for row in rows_of([entry], received_at)]
        try:
            answers = self.send("/db/execute?noparse&transaction", statements, entry.deadline)
        except sqlite3.Error as error:
            self.unknown += 0 if isinstance(error, nodes.NotTaken) else len(entry.bodies)
            return error
        entry.ordinal = len(answers)  # they end at the one that was refused
        last = answers[-1] | {"rows_affected": len(answers)}  # as if one statement had inserted all
        return self._refusal_in(last, entry.stream) or results_of([entry], last, received_at)[entry]

    def execute_all(
        self, writes: list[list], deadline: float, timeout_s: float = nodes.WRITE_TIMEOUT_S, leader_only: bool = False
    ) -> None:
        """Carry out all statements, or none. Raises sqlite3.Error: one is refused, or the outcome is not known.

        timeout_s: how long a node may take. leader_only: no follower hands it on, for rqlite gives that 30 s only.
        """
        if writes:
            path = "/db/execute?noparse&transaction" + ("&redirect" if leader_only else "")
            answers = self.send(path, writes, deadline + timeout_s, timeout_s, repeat_until=deadline)
            if error := error_in(answers[-1]):
                raise error

    # Reading

    @contextlib.contextmanager
    def reader(self, limit_s: float = READ_TIMEOUT_S, abandoned: Any = None) -> Iterator[Connection]:
        """Yield a connection for queries. After limit_s they end with SQLITE_INTERRUPT, abandoned or not."""
        yield Connection(self, self._read_level, time.monotonic() + limit_s)

    def query(self, sql: str, values: tuple | dict, level: str, deadline: float) -> Rows:
        """Return the rows of a query."""
        (rows,) = self._query([(sql, values)], level, deadline)
        if isinstance(rows, sqlite3.Error):
            raise rows
        return rows

    def fetch(self, db: Connection, queries: list[tuple[str, dict]]) -> list[Rows | sqlite3.Error]:
        """Return the rows of each query, or its error."""
        try:
            return self._query(queries, db.level, db.deadline) if queries else []
        except sqlite3.Error as error:
            return [error] * len(queries)

    def _query(self, queries: list[tuple[str, Any]], level: str, deadline: float) -> list[Rows | sqlite3.Error]:
        left_ms = max(1, int((deadline - time.monotonic()) * 1000))
        path = f"/db/query?level={level}&timeout={left_ms + 500}ms&db_timeout={left_ms}ms"
        timeout_s = READ_TIMEOUT_S + 1 if level == self._read_level else nodes.WRITE_TIMEOUT_S  # only pages may be slow
        # The node ends a slow query before the deadline that is given here.
        answers = self.send(path, [statement(*query) for query in queries], deadline + 1, timeout_s)
        return [error_in(answer) or rows_in(answer) for answer in answers]

    def page_sql(self, stream: Stream, conditions: str, with_fields: bool) -> str:
        """Return the SQL of a page. The node ends the page after about PAGE_BYTES.

        The row of a view, and one with fields, is one JSON text in hexadecimal: rqlited cannot send an infinite number,
        or text that is not UTF-8, and writes 1.0 as 1.
        """
        order = "" if stream.id_place is None else " ORDER BY t.id"
        columns = list(stream.fields)
        if stream.has_ids:
            columns = ["body", "headers"] if stream.has_headers else ["body"]
        size = " + ".join(f"ifnull(octet_length(t.{service.quoted(column)}), 0)" for column in columns)
        # Without the row directly before: so there is one row more than fits, which says that there is more.
        bytes_before = f"sum({size}) OVER ({order} ROWS BETWEEN UNBOUNDED PRECEDING AND 2 PRECEDING)"
        page = f'SELECT t.*, {bytes_before} AS "bytes before" FROM "{stream.name}" AS t WHERE {conditions}{order}'
        selected = ", ".join(stream.selected())
        if with_fields or not stream.takes:
            texts = [column.replace("CAST(t.body AS BLOB)", "t.body") for column in stream.selected(with_fields)]
            selected = f"hex(json_array({', '.join(map(json_value, texts))})) AS {service.quoted(ROW_AS_JSON)}"
        return (
            f'SELECT {selected} FROM ({page} LIMIT :limit) AS t WHERE ifnull(t."bytes before", 0) < {PAGE_BYTES}{order}'
        )

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the database, by the name of the metric."""
        sql = "SELECT c.page_count * s.page_size FROM pragma_page_count AS c, pragma_page_size AS s"
        with contextlib.suppress(sqlite3.Error):
            return {"database_bytes": self.query(sql, (), "none", time.monotonic() + nodes.CONNECT_TIMEOUT_S)[0][0]}
        return {}

    # migrate and backup

    def copy_to(self, target: str) -> None:
        """Write a copy of the database to a file: https://rqlite.io/docs/guides/backup"""
        self._require_database()
        deadline, failure = time.monotonic() + BUSY_TIMEOUT_S, ""
        while time.monotonic() < deadline:  # a node makes one copy at a time
            for node in self.nodes:
                try:
                    self.ask(node, "/db/query?level=none", b'["SELECT 1"]', nodes.CONNECT_TIMEOUT_S)  # or it hangs
                    with node.request("GET", "/db/backup", b"", COPY_TIMEOUT_S) as answer, open(target, "wb") as file:
                        shutil.copyfileobj(answer, file)
                    if answer.status == 200:
                        service.require_whole(Path(target))
                        return
                    failure = f"{node.name}: {answer.status} {answer.reason}"
                except (sqlite3.Error, OSError, http.client.HTTPException) as error:
                    failure = f"{node.name}: {error}"
            time.sleep(nodes.PAUSE_S)
        raise sqlite3.OperationalError(f"no node gives a whole copy: {failure}")

    @contextlib.contextmanager
    def to_migrate(self, schema: Schema) -> Iterator[Recorder]:
        """Yield a connection to a copy of the database. If the block succeeds, its writes are sent to the cluster.

        The copy shows which rows break a rule. The cluster copies tables of its own, with the messages that came since.
        """
        service.needed("same", "a cluster").require_deterministic(schema)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy.db"
            self.copy_to(str(copy))
            with contextlib.closing(service.connect(copy, "rw", BUSY_TIMEOUT_S)) as db:
                recorder = Recorder(db)
                keys, will_change = keys_with_on_delete(db), service.differences(db, schema)
                yield recorder
                keys |= keys_with_on_delete(db)
        for parent, child in keys:  # PRAGMA foreign_keys = OFF does nothing inside of a transaction
            if [f"DROP TABLE {service.quoted(parent)}"] in recorder.writes:
                raise SetupError(
                    f"table {parent} cannot be changed on a cluster: ON DELETE in {child} would take effect"
                )
        if recorder.writes:
            guard = f'CREATE TABLE {GUARD} (found CONSTRAINT "what migrate drops is in use again" CHECK (false))'
            writes = [["PRAGMA defer_foreign_keys = ON"], [guard], *recorder.writes, [f"DROP TABLE {GUARD}"]]
            try:
                self.execute_all(writes, time.monotonic() + BUSY_TIMEOUT_S, COPY_TIMEOUT_S, leader_only=True)
            except sqlite3.OperationalError as error:
                if isinstance(error, nodes.NotTaken) or not will_change or not self._is_migrated(schema):
                    raise

    def _is_migrated(self, schema: Schema) -> bool:
        """Ask, behind all that is on its way in the Raft log, whether the database is now as schema.sql has it."""
        db: Any = Connection(self, "strong", time.monotonic() + LOOK_UP_S)
        return not service.differences(db, schema)

    # Refusals

    def _refusal_in(self, answer: dict[str, Any], stream: Stream) -> sqlite3.Error | None:
        """Return the error in the answer to an INSERT, with the name of its code, or None.

        A text that is not in ERRORS has the name TRIGGER if a trigger raises it. It has the name ERROR if the INSERT
        compiles, and the text is not that of a fault of the node.
        """
        error = error_in(answer)
        if error and not error.sqlite_errorname:
            if self._is_raised(str(error)):
                error.sqlite_errorname = "SQLITE_CONSTRAINT_TRIGGER"
            elif not FAULT.match(str(error)) and self._can_insert(stream):
                error.sqlite_errorname = "SQLITE_ERROR"
        return error

    def _is_raised(self, text: str) -> bool:
        """Does a trigger raise this text? They are read for one that is not known, because migrate can change them."""
        literal = text.replace("'", "''")
        raises = f"raise ( abort , '{literal}' )"
        if raises not in self._triggers and time.monotonic() > self._triggers_at + LOOK_S:
            self._triggers_at = time.monotonic()
            sql = "SELECT s.sql FROM sqlite_schema AS s WHERE s.type = 'trigger'"
            with contextlib.suppress(sqlite3.Error):
                rows = self.query(sql, (), "weak", time.monotonic() + nodes.CONNECT_TIMEOUT_S)
                self._triggers = "\n".join(" ".join(service.normal(sql)) for (sql,) in rows)
        return raises in self._triggers

    def _can_insert(self, stream: Stream) -> bool:
        """Can the nodes compile the INSERT of a stream?"""
        tried_at, is_possible = self._compiled.get(stream.name, (-math.inf, False))
        if time.monotonic() > tried_at + LOOK_S:
            is_possible = True
            try:
                self.execute_all([statement(*stream.explain)], time.monotonic() + nodes.CONNECT_TIMEOUT_S)
            except sqlite3.Error:
                is_possible = False
            self._compiled[stream.name] = time.monotonic(), is_possible
        return is_possible


def statement(sql: str, values: tuple | dict) -> list:
    """Return SQL with its parameters, as rqlite takes them. A text that it would take for a BLOB comes as JSON."""
    if isinstance(values, dict):
        for name, value in values.items():
            if isinstance(value, str) and BLOB.fullmatch(value):
                sql = re.sub(rf":{name}\b", f"(:{name} ->> '$')", sql)
                values = values | {name: json.dumps(value)}
        return [sql, values]
    if any(isinstance(value, str) and BLOB.fullmatch(value) for value in values):
        sql = re.sub(r"\?\d*", r"(\g<0> ->> '$')", sql)
        values = tuple(map(json.dumps, values))
    return [sql, *values]


def error_in(answer: dict[str, Any]) -> sqlite3.Error | None:
    """Return what SQLite would have raised, with the name of its code, or None."""
    if "error" not in answer:
        return None
    text = str(answer["error"])
    error = sqlite3.OperationalError(text)
    error.sqlite_errorname = next((name for pattern, name in ERRORS if re.match(pattern, text)), "")
    return error


def rows_in(answer: dict[str, Any]) -> Rows:
    rows = answer.get("values") or ()
    if answer.get("columns") == [ROW_AS_JSON]:
        rows = (json.loads(bytes.fromhex(text).decode(errors="replace")) for (text,) in rows)
    return Rows(map(tuple, rows))


def json_value(value: str) -> str:
    """Return the SQL of a value for json_array(): a BLOB in hexadecimal. || '' makes a text of what json() has made."""
    real = f"CASE {value} WHEN 9e999 THEN '9e999' WHEN -9e999 THEN '-9e999' ELSE printf('%!.17g', {value}) END"
    return (
        f"CASE typeof({value}) WHEN 'blob' THEN lower(hex({value})) WHEN 'text' THEN {value} || ''"
        f" WHEN 'real' THEN json({real}) ELSE {value} END"
    )


def keys_with_on_delete(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """Return (parent, child) for each foreign key whose ON DELETE changes rows of the child."""
    return set(
        db.execute(
            "SELECT p.name, s.name FROM sqlite_schema AS s, pragma_foreign_key_list(s.name) AS k, sqlite_schema AS p"
            " WHERE s.type = 'table' AND k.on_delete IN ('CASCADE', 'SET NULL', 'SET DEFAULT')"
            """ AND p.type = 'table' AND p.name = k."table" COLLATE NOCASE"""
        )
    )


def portions(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Yield the entries in lists of about REQUEST_BYTES."""
    portion, size = [], 0
    for entry in entries:
        portion.append(entry)
        size += sum(len(body) * (1 if body.isascii() else 4) for body in entry.bodies)
        if size >= REQUEST_BYTES or entry is entries[-1]:
            yield portion
            portion, size = [], 0


def grouped(entries: list[Entry]) -> list[list[Entry]]:
    """Return groups that one statement can insert: the messages of one stream, or one batch."""
    groups: dict[Any, list[Entry]] = {}
    for entry in entries:
        alone = entry.lines or not entry.bodies
        groups.setdefault(entry if alone else entry.stream.name, []).append(entry)
    return list(groups.values())


def rows_of(group: list[Entry], received_at: str) -> list[tuple]:
    return [row for entry in group for row in service.rows_of(entry, received_at, entry.bodies)]


def insert_of(stream: Stream, rows: list[tuple]) -> list:
    """Return the statement that inserts rows, with its parameter: one JSON text, which rqlited takes for no BLOB."""
    if not rows:  # for /healthz: a write that changes nothing
        return ["UPDATE clients SET name = name WHERE false"]
    into, _, _ = stream.insert.partition(" VALUES ")
    columns = ", ".join(f"j.value ->> {n}" for n in range(stream.insert.count("?")))
    return [f"{into} SELECT {columns} FROM json_each(?) AS j", json.dumps(rows, ensure_ascii=False)]


def results_of(group: list[Entry], answer: dict[str, Any], received_at: str) -> dict[Entry, Stored | sqlite3.Error]:
    """Return the results of entries that were inserted together: an error for each if their number is not right."""
    if answer.get("rows_affected", 0) != sum(len(entry.bodies) for entry in group):
        error = sqlite3.OperationalError(f"rqlite has inserted {answer.get('rows_affected')} rows")
        return dict.fromkeys(group, error)
    results: dict[Entry, Stored | sqlite3.Error] = {}
    last = answer.get("last_insert_id", 0)
    for entry in reversed(group):
        results[entry] = Stored(last - len(entry.bodies) + 1, last, received_at, len(entry.bodies))
        last -= len(entry.bodies)
    return results
