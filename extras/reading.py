"""What few readers ask for: ?since=TIME, a page that begins with what came then or later, and text/csv."""

import csv
import sqlite3
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import service
from service import Problem, Store, Stream

DISORDER = timedelta(seconds=15)  # on a cluster: BUSY_TIMEOUT_S, 4 s for a node to answer, and 1 s between clocks


def time_in(text: str) -> str:
    """Return a date or a time (RFC 3339) as received_at has it; Problem 400."""
    try:
        return service.in_utc(datetime.fromisoformat(text.upper()))
    except (ValueError, OverflowError):
        raise Problem(400, "since takes a time such as 2026-11-27T00:00:00Z (a + is written %2B), or a date.") from None


def id_before(store: Store, stream: Stream, since: str, after: int, abandoned: Callable[[], bool]) -> int:
    """Return the id behind which a page begins: that of the last message before a time, or `after` if that is larger.

    It is found by bisection, because times grow with ids, so it needs no index. On a cluster they do so within
    DISORDER: from there on, the first message of that time or later is looked for. For a view, all this is done in the
    stream that it reads; if it reads several, in the view itself. Raises Problem 503 like page().
    """
    moment = datetime.fromisoformat(since)
    disorder = timedelta(0) if store.database.is_near else min(DISORDER, moment - datetime.min.replace(tzinfo=UTC))
    early = service.in_utc(moment - disorder)
    began, tables = time.monotonic(), [each for each in store.schema.streams.values() if each.takes]
    read = [each for each in tables if each.sources <= stream.sources]
    table = read[0] if len(read) == 1 else stream
    columns = "CAST(t.id AS INTEGER), CAST(ifnull(t.received_at, '') AS TEXT)"
    sql = f'SELECT {columns} FROM "{table.name}" AS t WHERE t.id > ? ORDER BY t.id LIMIT 1'
    last = store.last_id(table)
    low, high = after, service.MAX_ID if last is None else max(after, last)
    try:
        with store.database.reader(service.READ_TIMEOUT_S, abandoned) as db:
            db.text_factory = partial(str, encoding="utf-8", errors="replace")
            while low < high:
                middle = (low + high) // 2
                found = db.execute(sql, (middle,)).fetchone()
                is_before = found and found[1] < early and found[0] > middle
                low, high = (found[0], high) if is_before else (low, middle)
            if disorder:
                low = max(low, db.execute(before_first(table), (low, since)).fetchone()[0] or 0)
    except sqlite3.Error as error:
        raise store.read_problem(error, stream, (), began) or error from None
    return low


def before_first(table: Stream) -> str:
    """Return the SQL of the id before the first message behind an id that came at a time or later, or the last id.

    It is one statement: between two, messages could come, and be passed over.
    """
    rows = f'FROM "{table.name}" AS t'
    first = f"SELECT CAST(t.id AS INTEGER) - 1 {rows} WHERE t.id > ? AND t.received_at >= ? ORDER BY t.id LIMIT 1"
    return f"SELECT ifnull(({first}), (SELECT max(CAST(t.id AS INTEGER)) {rows}))"


def csv_page(stream: Stream, rows: list[bytes]) -> bytes:
    """Return the page that has these rows, with the names of its columns before them."""
    names = tuple(stream.fields)
    if stream.has_ids:
        names = (*service.MESSAGE_COLUMNS, *["headers"] * stream.has_headers, *names)
    return b"".join([csv_row(stream, names), *rows])


def csv_row(stream: Stream, row: tuple) -> bytes:
    return csv_line(in_csv(stream, row))


def in_csv(stream: Stream, row: tuple) -> list[Any]:
    """Return the columns of a row in their order in CSV: those of a feed with its fields before body and headers."""
    if not stream.has_ids:
        return list(row)
    fields = 5 + stream.has_headers
    return [*row[:4], *row[fields:], service.in_unicode(row[4]), *row[5:fields]]


def csv_line(values: Iterable[Any]) -> bytes:
    """Return a line as RFC 4180 has it: NULL is empty, a BLOB is in hexadecimal. Texts stay what they are."""
    texts = [value.hex() if isinstance(value, bytes) else value for value in values]
    return csv.writer(SimpleNamespace(write=str)).writerow(texts).encode()  # type: ignore[attr-defined]
