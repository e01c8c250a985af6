"""What becomes of a message beyond 201 or a refusal, where a sender or the owner of schema.sql asks for it.

A lenient batch (Prefer: handling=lenient): each line stands for itself. A generated column `answer`: a message is
answered with its text. A stream `refused`: what rules refuse is kept there, in the same COMMIT.
"""

import json
import re
from typing import Any

import service
from service import JSON, PRIVATE, Entry, Problem, Store, Stored

PORTION = 500  # lines of a lenient batch in one COMMIT: one that is refused costs ten times as much as one that is not
LISTED_LINES = 100  # refused ones of a lenient batch, in its answer
NOTE_BYTES = 65_536  # of a message that a rule refuses, in the stream `refused`
# In hexadecimal: it may be no UTF-8, and rqlite sends only text.
ANSWER = (
    'SELECT hex(CAST(t.answer AS BLOB)), json_valid(t.answer) FROM "{}" AS t WHERE t.id = :id AND t.answer NOT NULL'
)


def is_lenient(environ: dict[str, Any]) -> bool:
    """Does a request ask that each line of its batch stands for itself? RFC 7240, 4.4: Prefer: handling=lenient"""
    found = re.search(r'(?:^|,)\s*handling\s*=\s*"?(\w+)', environ.get("HTTP_PREFER", ""), re.IGNORECASE)
    return bool(found and found[1].lower() == "lenient")


def lenient_lines(data: bytes) -> tuple[list[str], list[int], list[dict[str, Any]]]:
    """Return the JSON texts of a lenient batch and the numbers of their lines, and the lines that are no JSON.

    Problem 413 if there are too many.
    """
    texts, numbers, refused = [], [], []
    for line, number in zip(*service.numbered_lines(data.decode(errors="surrogateescape")), strict=True):
        try:
            if not line.isascii() and (odd := re.search("[\udc80-\udcff]", line)):
                raise service.json_problem("it is not UTF-8", line[: odd.start()], number)
            service.require_json(line, number)
        except Problem as problem:
            refused.append(refused_line(number, problem))
        else:
            texts.append(line)
            numbers.append(number)
    return texts, numbers, refused


def lenient(entry: Entry, refused: list[dict[str, Any]]) -> Entry:
    """Return an entry as a lenient batch. It comes to the disk in portions, so that it holds up nobody for long."""
    entry.refused = refused
    entry.later = list(zip(entry.bodies, entry.lines, strict=True))
    take_portion(entry)
    return entry


def take_portion(entry: Entry) -> None:
    portion, entry.later = entry.later[:PORTION], entry.later[PORTION:]
    entry.bodies, entry.lines = [body for body, _ in portion], [line for _, line in portion]


def refused_line(number: int, problem: Problem) -> dict[str, Any]:
    return {"line": number, "status": problem.status, "detail": problem.detail}


class Outcomes:
    """The store asks it twice about each group of entries that it writes. Only the thread that writes uses it."""

    def __init__(self) -> None:
        self.notes: list[tuple[Entry, Entry]] = []  # entries that rules have refused, and what is kept of each

    def of_refused(
        self, store: Store, db: Any, entry: Entry, problem: Problem, received_at: str, by_line: bool
    ) -> Stored | Problem:
        """Return the result of an entry that a rule refuses. by_line: of a lenient batch, others are inserted."""
        if entry.refused is not None and (by_line or entry.earlier):  # what is earlier is on disk
            return self._line_by_line(store, db, entry, received_at)
        kept_in = store.schema.streams.get("refused")
        if kept_in and kept_in.takes and entry.stream is not kept_in:
            line = problem.members.get("line")
            text = entry.bodies[entry.ordinal - 1] if line or not entry.lines else "\n".join(entry.bodies)
            body = {"stream": entry.stream.name, "status": problem.status, "detail": problem.detail, "line": line}
            body |= {"key": entry.key, "body": text.encode()[:NOTE_BYTES].decode(errors="ignore")}
            headers = (entry.headers or (None,)) if kept_in.has_headers else ()
            note = Entry(kept_in, entry.client, None, [json.dumps(body, ensure_ascii=False)], headers)
            self.notes.append((entry, note))
        return problem

    def _line_by_line(self, store: Store, db: Any, entry: Entry, received_at: str) -> Stored | Problem:
        lines = [
            Entry(entry.stream, entry.client, entry.key_of(n), [body], entry.headers, line=line)
            for n, (body, line) in enumerate(zip(entry.bodies, entry.lines, strict=True), 1)
        ]
        noted = len(self.notes)
        try:
            results = store.results(db, lines, received_at)
        except service.Undone as undone:
            raise service.Undone(entry, undone.error) from None
        self.notes[noted:] = [(entry, note) for _, note in self.notes[noted:]]
        stored, refused = [], []
        for line, result in zip(entry.lines, results, strict=True):
            if isinstance(result, Stored):
                stored.append(result)
            elif result.status < 500:
                refused.append(refused_line(line, result))
            else:
                return result  # the outcome of all lines is unknown
        if not stored:
            return Stored(0, 0, received_at, 0, refused=tuple(refused))
        first, last = min(each.first_id for each in stored), max(each.last_id for each in stored)
        replayed = all(each.replayed for each in stored)
        return Stored(first, last, stored[0].received_at, len(stored), replayed, tuple(refused))

    def complete(
        self, store: Store, db: Any, entries: list[Entry], results: list[Stored | Problem], received_at: str
    ) -> None:
        """Before the COMMIT: keep what was refused, and put answers of their own into the results."""
        self._keep_notes(store, db, received_at)
        asked = {}
        for n, (entry, result) in enumerate(zip(entries, results, strict=True)):
            if isinstance(result, Stored) and entry.refused is not None:
                if entry.later:
                    results[n] = result._replace(is_part=True)
                else:
                    results[n] = result._replace(answer=lenient_answer(entry, [*entry.earlier, result]))
            elif isinstance(result, Stored) and entry.stream.has_answer and entry.bodies and not entry.lines:
                asked[n] = ANSWER.format(entry.stream.name), {"id": result.first_id}
        answers = store.database.fetch(db, list(asked.values())) if asked else []
        for n, rows in zip(asked, answers, strict=True):
            result = results[n]
            if isinstance(rows, Exception):
                service.log.error("an answer of %s cannot be read: %s", entries[n].stream.name, service.words_of(rows))
            elif rows and isinstance(result, Stored):
                content = service.in_utf_8(bytes.fromhex(rows[0][0]))
                is_json = rows[0][1] and not service.only_json_valid(content)
                headers = headers_of(result, JSON if is_json else "text/plain; charset=utf-8")
                results[n] = result._replace(answer=("200 OK", headers, content))

    def go_on(self, entry: Entry, part: Stored) -> None:
        """Let the next portion of a lenient batch come: part is on disk."""
        entry.earlier += (part,)
        take_portion(entry)

    def _keep_notes(self, store: Store, db: Any, received_at: str) -> None:
        """Insert what is kept. If that undoes the transaction, the entry that it is about gets the blame."""
        owners, self.notes = {note: entry for entry, note in self.notes}, []
        try:
            for found in store.database.insert(db, list(owners), received_at) if owners else ():
                if isinstance(found, Exception):
                    service.log.error(
                        "what was refused cannot be kept in the stream refused: %s", service.words_of(found)
                    )
        except service.Undone as undone:
            raise service.Undone(owners[undone.entry], undone.error) from None


def headers_of(stored: Stored, kind: str) -> list[tuple[str, str]]:
    return [("Content-Type", kind), *PRIVATE, *([("Idempotent-Replayed", "true")] if stored.replayed else [])]


def lenient_answer(entry: Entry, parts: list[Stored]) -> service.Answer:
    """Return the answer to a lenient batch: 201 with what was stored, and the first LISTED_LINES that were refused."""
    refused = sorted([*(entry.refused or ()), *(line for part in parts for line in part.refused)], key=line_number)
    if refused:
        first = f"line {refused[0]['line']}: {service.shown(refused[0]['detail'], 256)}"
        key = f" (key {service.shown(entry.key)})" if entry.key else ""
        told = "%d lines of %s at /%s were refused; %s%s"
        service.log.info(told, len(refused), service.shown(entry.client), entry.stream.name, first, key)
    stored = [part for part in parts if part.number] or parts
    first_id, last_id = min(part.first_id for part in stored), max(part.last_id for part in stored)
    count, replayed = sum(part.number for part in parts), all(part.replayed for part in stored)
    members: dict[str, Any] = {"count": count, "first_id": first_id if count else None}
    members |= {"last_id": last_id if count else None, "refused": refused[:LISTED_LINES]}
    members |= {"received_at": stored[0].received_at}
    headers = [*headers_of(stored[0]._replace(replayed=replayed), JSON), ("Preference-Applied", "handling=lenient")]
    return "201 Created", headers, json.dumps(members).encode()


def line_number(refused: dict[str, Any]) -> int:
    return refused["line"]
