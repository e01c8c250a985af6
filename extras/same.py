"""What keeps the nodes of a cluster the same.

require_deterministic() checks schema.sql: each node runs each statement for itself, and has to get the same.
Comparison checks the nodes: one that could not run a statement, because its disk was full for a moment, goes on without
it, and answers as if nothing were wrong.
"""

import contextlib
import http.client
import json
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import service
from service import BUSY_TIMEOUT_S, Schema, SchemaObject, SetupError, Stream, log

INTERVAL_S = 60.0
COUNTED = 100_000  # newest rows of each stream; a node writes nothing else while it counts
READ = 1000  # newest rows of each stream
BODY_BYTES = 1024  # of the end of a body: all of most messages
TIMES = 3  # a row differs only if it does so in each of three reads: it may be changed between two
PAUSE_S = 1.0
KEPT_S = 600  # then the rows of a comparison are deleted
TABLE = '"nodes compared"'
MAKE = f"CREATE TABLE IF NOT EXISTS {TABLE} (run TEXT, at INTEGER, stream TEXT, last_id INTEGER, newest INTEGER) STRICT"

# Functions whose result can differ between nodes, and what is to be said about SQL that calls one.
OWN_NUMBERS, OWN_CLOCK = "each node has random numbers of its own", "each node has a clock of its own"
OWN_COUNTS = "each node counts for itself (the id of a message is NEW.id)"
NONDETERMINISTIC_FUNCTIONS = {
    **dict.fromkeys(("random", "randomblob"), OWN_NUMBERS),
    **dict.fromkeys(("current_date", "current_time", "current_timestamp", "timediff"), OWN_CLOCK),
    **dict.fromkeys(("changes", "total_changes", "last_insert_rowid"), OWN_COUNTS),
    **dict.fromkeys(("sqlite_version", "sqlite_source_id"), "each node may have a version of its own"),
}
TIME = "date|time|datetime|julianday|unixepoch"
RECEIVED_AT = r"new \. received_at(?: , '')* \)"  # NEW.received_at, with modifiers
# The name before a "(" is that of a table, and not of a function, behind these words.
NOT_A_TABLE = "".join(f"(?<!{word} )" for word in ("table", "exists", "view", "into", "references", "with"))
CALL = rf"\b{NOT_A_TABLE}\w+(?= \()|\bcurrent_\w+"  # the name of a function that is called
# Patterns for what without_strings() returns, such as: strftime ( '' , new . received_at )
NONDETERMINISTIC = (
    (
        rf"\b{NOT_A_TABLE}(?:{TIME}) \( (?!{RECEIVED_AT})|\bstrftime \( (?!'' , {RECEIVED_AT})",
        f"{OWN_CLOCK}, and a message could say 'now': a time here is NEW.received_at, with modifiers in quotes",
    ),
    (r"\bpragma_", "a pragma can tell each node something else"),
    (r"\b(?:new|old)_?\b(?! \.)", "new and old are the rows of a trigger: give everything else another name"),
    (r"\braise \( abort , (?!'' \))", "RAISE takes only a text in single quotes"),
)
# The same for its levels(), such as: insert into x [] select id from messages
WITHOUT_ORDER = (
    (r"\blimit\b", "LIMIT needs ORDER BY, or each node may take other rows"),
    (
        r"\binto .*?\b(?:select|with)\b.*"
        r" from (?!json_(?:each|tree) \[\](?: as)?(?: (?!join)\w+)?(?: where .*)?$)",
        "INSERT … SELECT … FROM needs ORDER BY, or each node may give the rows other ids",
    ),
)
FILLS_A_TABLE = "insert|create table .* as (?:select|with|values) "


class Reached:
    """What SQLite's authorizer tells of schema.sql: https://www.sqlite.org/c3ref/set_authorizer.html

    calls: functions, by the names of the triggers and views that call them. inserted: tables into which the triggers
    of one stream insert, or whose received_at they change. filled: the same, of all streams.
    """

    def __init__(self) -> None:
        self.calls: dict[str, set[str]] = {}
        self.inserted: set[str] = set()
        self.filled: set[str] = set()

    def note(self, action: int, first: str | None, second: str | None, _: Any, source: str | None) -> int:
        if source:  # a trigger, a view, or WITH
            called = self.calls.setdefault(service.fold(source), set())
            if action == sqlite3.SQLITE_FUNCTION:
                called.add(str(second))
            is_time = action == sqlite3.SQLITE_UPDATE and service.fold(str(second)) == "received_at"
            if action == sqlite3.SQLITE_INSERT or is_time:
                self.inserted.add(service.fold(str(first)))
        return sqlite3.SQLITE_OK


def require_deterministic(schema: Schema) -> None:
    """Raise SetupError if the nodes could compute a rule of schema.sql differently.

    SQLite's authorizer tells which triggers and views a message reaches, and which functions these call.
    """
    reached = Reached()
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.set_authorizer(reached.note)
        for sql in schema.statements:
            refuse_filling(sql)
            db.execute(sql)
        for made in schema.objects.values():
            if made.kind == "table":
                refuse_in_table(db, made)
        reached.filled |= reached.inserted
        for stream in (stream for stream in schema.streams.values() if stream.takes):
            reached.inserted.clear()
            db.execute(*stream.explain)
            if service.fold(stream.name) in reached.inserted:
                reason = "no trigger may insert into the table of its message, or change its received_at"
                raise SetupError(f"table {stream.name}: on a cluster, {reason}")
            reached.filled |= reached.inserted
    for made in schema.objects.values():
        if made.kind in ("trigger", "view") and service.fold(made.name) in reached.calls:
            refuse_in_code(made, reached)


def refuse_in_code(made: SchemaObject, reached: Reached) -> None:
    """Raise SetupError for a trigger or view that could give each node something else."""
    text = without_strings(made.sql)
    if made.table in reached.filled:  # there, received_at can be what a message says
        text = text.replace("new . received_at", "received_at")
    # The authorizer tells of a function in WITH under the name that it has there.
    functions = {*reached.calls[service.fold(made.name)], *re.findall(CALL, text)}
    refuse_nondeterministic(str(made), text, sorted(functions))


def refuse_filling(sql: str) -> None:
    """Raise SetupError if each node could put something else into a table by a statement of schema.sql."""
    text = without_strings(sql)
    if re.match(FILLS_A_TABLE, text):
        refuse_nondeterministic(f"the statement {service.shown(sql)}", text, re.findall(CALL, text))


def refuse_in_table(db: sqlite3.Connection, table: SchemaObject) -> None:
    """Raise SetupError if a CHECK, a generated column or a DEFAULT could be something else in each node.

    SQLite allows clocks in a CHECK. A node that restarts replays its log, and gets another result.
    """
    refuse_nondeterministic(str(table), "", re.findall(CALL, without_strings(table.sql)))
    for (default,) in db.execute("SELECT c.dflt_value FROM pragma_table_xinfo(?) AS c", (table.name,)):
        if default and re.search(CALL, without_strings(default)):
            reason = "a DEFAULT calls no function and names no clock: a trigger can write NEW.received_at"
            raise SetupError(f"{table}: on a cluster, {reason}")


def refuse_nondeterministic(what: str, text: str, functions: Iterable[str]) -> None:
    """Raise SetupError if each node could get something else from SQL, which calls these functions."""
    named = NONDETERMINISTIC_FUNCTIONS
    reasons = [f"{function}: {named[function]}" for function in functions if function in named]
    reasons += [reason for pattern, reason in NONDETERMINISTIC if re.search(pattern, text)]
    for level in levels(text):
        for each in level.split(" ; "):
            if "order by" not in each:
                reasons += [reason for pattern, reason in WITHOUT_ORDER if re.search(pattern, each)]
    if reasons:
        raise SetupError(f"{what}: on a cluster, {reasons[0]}")


def levels(text: str) -> Iterator[str]:
    """Yield what stands in each pair of parentheses, with [] for those in it, and then what stands in none."""
    while inner := re.search(r"\([^()]*\)", text):
        yield inner[0][1:-1]
        text = text[: inner.start()] + "[]" + text[inner.end() :]
    yield text


def without_strings(sql: str) -> str:
    """Return SQL as words with one space between them.

    A string becomes '', except 'now', 'localtime' and 'utc'. A quoted name loses its quotes, and ends with _, so that
    it is no keyword; the name of a function stays. INSERT INTO "my x" VALUES ("abs"('2')) gives
    insert into my_x_ values ( abs ( '' ) ).
    """
    words = []
    tokens = service.normal(sql)
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        text = service.fold(token[1:-1])
        if token[0] in "'\"" and text in ("now", "localtime", "utc"):
            words.append(f"'{text}'")
        elif token[0] in '"`[':
            words.append(re.sub(r"\W", "_", text) + ("" if following == "(" else "_"))
        else:
            words.append("''" if token[0] == "'" else token)
    return " ".join(words)


class Comparison:
    """A thread that compares the nodes of a cluster once a minute, until stop().

    It writes, by one entry of the Raft log, what each node has: the last id of each stream, and the number of its
    newest rows. Each node computes that for itself, at the same place of the log. Then it is read from each node, and
    with it the newest rows. differing: the streams in which the nodes differ.
    """

    def __init__(self, cluster: Any, schema: Schema):
        self._cluster = cluster
        self._streams = [stream for stream in schema.streams.values() if stream.takes]
        self._stopped = threading.Event()
        self.compared = 0  # nodes, at the last time
        self.differing: set[str] = set()
        threading.Thread(target=self._run, name="nodes", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def measures(self) -> Iterator[tuple[str, str, str, list[tuple[dict[str, str], float]]]]:
        """Yield metrics, as Cluster.measures() does."""
        yield "cluster_nodes", "gauge", "The nodes that --database names.", [({}, len(self._cluster.nodes))]
        yield "cluster_nodes_compared", "gauge", "Those that were compared last time.", [({}, self.compared)]
        differ = [({"stream": stream.name}, float(stream.name in self.differing)) for stream in self._streams]
        yield "cluster_nodes_differ", "gauge", "Do the nodes have different rows?", differ

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.compare()
            except (sqlite3.Error, OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                self.compared = 0  # the last three: a node answers something else than it was asked
                log.warning("the nodes could not be compared: %s", error)
            self._stopped.wait(INTERVAL_S)

    def compare(self) -> None:
        """Compare the nodes that answer; sqlite3.Error if the cluster takes no writes."""
        found = self._states()
        self.compared = len(found)
        for stream in self._streams:
            states = {name: state[stream.name] for name, state in found.items() if stream.name in state}
            if len(set(states.values())) > 1:
                told = ", ".join(f"{name} has {state[1]} up to id {state[0]}" for name, state in states.items())
                self._tell(stream, f"of the newest {COUNTED} messages, {told}")
            elif states and (how := self._differing_row(stream, list(states), max(states.values())[0])):
                self._tell(stream, how)
            elif stream.name in self.differing:
                self.differing.discard(stream.name)
                log.info("the nodes that answer (%s) are the same in %s again", ", ".join(found), stream.name)

    def _tell(self, stream: Stream, how: str) -> None:
        self.differing.add(stream.name)
        log.error("the nodes differ in %s: %s (see cluster/README.md)", stream.name, how)

    def _states(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return what each node has, by its name: (last id, number of the newest rows) by the name of a stream."""
        run, now = secrets.token_hex(8), int(time.time())
        writes: list[list] = [[MAKE], [f"DELETE FROM {TABLE} WHERE at < ?", now - KEPT_S]]
        for stream in self._streams:
            last_id = "ifnull((SELECT s.seq FROM sqlite_sequence AS s WHERE s.name = ? COLLATE NOCASE), 0)"
            newest = f'(SELECT count(*) FROM "{stream.name}" AS t WHERE t.id > {last_id} - {COUNTED})'
            insert = f"INSERT INTO {TABLE} SELECT ?, ?, ?, {last_id}, {newest}"
            writes.append([insert, run, now, stream.name, stream.name, stream.name])
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        self._cluster.execute_all(writes, deadline)
        found: dict[str, dict[str, tuple[int, int]]] = {}
        waiting = list(self._cluster.nodes)
        while waiting and time.monotonic() < deadline:
            for node in waiting.copy():  # one that is behind has it a little later
                sql = f"SELECT c.stream, c.last_id, c.newest FROM {TABLE} AS c WHERE c.run = ?"
                rows = self._rows(node, sql, run)
                if rows:
                    found[node.name] = {stream: (last_id, newest) for stream, last_id, newest in rows}
                if rows or rows is None:
                    waiting.remove(node)
            if waiting:
                time.sleep(0.1)
        return found

    def _differing_row(self, stream: Stream, names: list[str], last_id: int) -> str:
        """Return which of the newest rows, up to an id, is not the same in all nodes each time; empty if none is."""
        sql = (
            "SELECT t.id, t.received_at, hex(t.client), hex(t.key), octet_length(t.body),"
            f' hex(substr(CAST(t.body AS BLOB), -{BODY_BYTES})) FROM "{stream.name}" AS t WHERE t.id > ? AND t.id <= ?'
        )
        nodes = [node for node in self._cluster.nodes if node.name in names]
        differing: set[int] = set()
        rows: dict[str, dict[int, tuple]] = {}
        for attempt in range(TIMES):
            if attempt:
                time.sleep(PAUSE_S)
            read = {node.name: self._rows(node, sql, last_id - READ, last_id) for node in nodes}
            rows = {name: {row[0]: tuple(row[1:]) for row in each} for name, each in read.items() if each is not None}
            ids = {row_id for each in rows.values() for row_id in each}
            now = {row_id for row_id in ids if len({each.get(row_id) for each in rows.values()}) > 1}
            differing = now & differing if attempt else now  # in all reads until now
            if not differing:
                return ""
        first = min(differing)
        alike: dict[tuple | None, list[str]] = {}  # the names of the nodes that have the same
        for name, each in rows.items():
            alike.setdefault(each.get(first), []).append(name)
        return f"message {first} is one thing in {', and another in '.join(map(', '.join, alike.values()))}"

    def _rows(self, node: Any, sql: str, *values: Any) -> list[list] | None:
        """Return what one node has, whatever the others have, or None if it does not answer."""
        with contextlib.suppress(sqlite3.Error, OSError, http.client.HTTPException):
            body = json.dumps([[sql, *values]]).encode()
            answers = self._cluster.ask(node, "/db/query?level=none", body, BUSY_TIMEOUT_S)
            return answers[0].get("values") or []  # none if it has not come as far as the table
        return None
