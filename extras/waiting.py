"""wait=SECONDS: a GET whose page is empty is held until there is something to read, or its time is over.

As long as a GET is held, one thread looks at the last ids of all tables, every PAUSE_S. So it sees each new row,
whoever wrote it: a trigger, another process, SQL. It lets those GETs run again that read a table which has got another
last id since they began. In between, a GET costs neither a thread nor SQL. This is for a server that can hold a request
(connection.py); elsewhere an empty page is answered at once. If MOST_HELD GETs are held and one more comes, the client
that has most of them loses the one that would end first. One more of that client is answered at once.
"""

import contextlib
import math
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from service import Store, Stream, fold, nothing, run_safely

MOST_HELD = 1000  # GETs, by this process
PAUSE_S = 0.015  # the shortest between two looks: it is ten times as long as a look, within these bounds
LONGEST_PAUSE_S = 0.2
SCAN_S = 0.250  # between two looks at all that is held: whose time is over?
# A GET that was woken for nothing, because of its filter, is not woken again before the longest of these is over:
AGAIN_S = 0.050
TIMES_AS_LONG = 10  # times what it took
SHARE_S = 0.002  # for each GET that is held: all of them cost a part of a core only
GONE_S = 1.0  # between two looks for clients that have gone

LastIds = Mapping[str, int]  # by the folded names of tables


@dataclass(slots=True, eq=False)
class Wait:
    """A GET that can be held. last_ids: what was there before it read. All times are as time.monotonic() has them.

    seen: rows up to this id were looked at before, and did not fit. after: its parameter; where it reads one table,
    only a larger id is news.
    """

    waits: "Waits"
    client: str
    sources: frozenset[str]
    after: int
    last_ids: LastIds
    seen: int
    began: float
    deadline: float
    is_abandoned: Callable[[], bool]
    is_again: bool
    not_before: float = 0.0
    run_again: Callable[[], None] = nothing

    def hold(self, environ: dict[str, Any]) -> bool:
        """Hold the request, as soon as the app has returned; False if there is no room for it."""
        if not self.waits.has_room(self.client):
            return False
        now = time.monotonic()
        if self.is_again:
            self.not_before = now + max(AGAIN_S, TIMES_AS_LONG * (now - self.began), SHARE_S * self.waits.count)
        environ["inlet.hold"] = self
        return True

    def held(self, run_again: Callable[[], None]) -> None:
        self.run_again = run_again
        self.waits.add(self)

    def has_news(self, last_ids: LastIds) -> bool:
        if last_ids is self.last_ids:
            return False
        changed = [each for each in self.sources if last_ids.get(each) != self.last_ids.get(each)]
        return bool(changed) and (len(self.sources) > 1 or last_ids.get(changed[0], 0) > self.after)


class Waits:
    """All GETs that are held."""

    def __init__(self, store: Store):
        self._store = store
        self._pause_s = PAUSE_S
        self._lock = threading.Lock()  # for what follows
        self._held: dict[frozenset[str], list[Wait]] = {}  # by the tables that they read
        self.count = 0
        self._watcher: threading.Thread | None = None
        self._may_hold: Callable[[], bool] = bool  # of the server
        self._last_ids: LastIds = {}
        self._looked_at = self._scan_at = self._gone_at = 0.0

    def begin(self, environ: dict[str, Any], client: str, stream: Stream, after: int, seconds: int) -> Wait | None:
        """Return what can hold a GET, or None if it has to be answered. To be called before it reads."""
        now, deadline = time.monotonic(), environ.get("inlet.arrived_at", 0.0) + seconds
        may_hold = environ.get("inlet.may_hold")
        if not may_hold or not may_hold() or now >= deadline:
            return None
        is_abandoned, before = environ["inlet.is_abandoned"], environ["inlet.held"]
        if is_abandoned() or (before and before.deadline < now):  # it has made room
            return None
        if now > self._looked_at + 2 * self._pause_s:  # nobody looks, or is late
            self._look()
        self._may_hold, last_ids, seen = may_hold, self._last_ids, 0
        if before and len(stream.sources) == 1:
            (table,) = stream.sources
            last_id = before.last_ids.get(table, 0)
            seen = last_id if last_id <= last_ids.get(table, 0) else 0  # else a backup was restored
        return Wait(self, client, stream.sources, after, last_ids, seen, now, deadline, is_abandoned, bool(before))

    def has_room(self, client: str) -> bool:
        """May a client wait? If too many do, one of another client that has more is let go."""
        if self.count < MOST_HELD:
            return True
        with self._lock:
            held = [wait for waits in self._held.values() for wait in waits if wait.deadline]
            if len(held) < MOST_HELD:  # those that were let go are on their way
                return True
            of_client = Counter(wait.client for wait in held)
            most = max(of_client, key=of_client.__getitem__, default=client)
            if of_client[most] <= of_client[client] + 1:
                return False
            first = min((wait for wait in held if wait.client == most), key=lambda wait: wait.deadline)
            first.deadline = self._scan_at = 0.0
        return True

    def add(self, wait: Wait) -> None:
        with self._lock:
            self._held.setdefault(wait.sources, []).append(wait)
            self.count += 1
            if wait.has_news(self._last_ids):
                self._scan_at = 0.0
            if not self._watcher:
                self._watcher = threading.Thread(target=self._watch, daemon=True)
                self._watcher.start()

    def _look(self) -> set[str]:
        """Read the last ids (https://www.sqlite.org/autoinc.html), and return the tables where they have changed."""
        sql, began = "SELECT s.name, s.seq FROM sqlite_sequence AS s", time.monotonic()
        with contextlib.suppress(sqlite3.Error, OSError), self._store.database.reader(1.0) as db:
            found, before = {fold(name): last_id for name, last_id in db.execute(sql).fetchall()}, self._last_ids
            self._last_ids, self._looked_at = before if found == before else found, time.monotonic()
            self._pause_s = min(LONGEST_PAUSE_S, max(PAUSE_S, 10 * (self._looked_at - began)))
            return {name for name in found.keys() | before.keys() if found.get(name) != before.get(name)}
        return set()

    def _watch(self) -> None:
        """Look, and let run again what is due, until nothing is held."""
        while self._watcher is threading.current_thread():
            time.sleep(self._pause_s)
            run_safely(self._wake_due)

    def _wake_due(self) -> None:
        """Let run again what has something to read, whose time is over, and all if the server stops."""
        changed, now = self._look(), time.monotonic()
        due: list[Wait] = []
        with self._lock:
            looks_at_all, looks_for_gone = now >= self._scan_at, now >= self._gone_at
            for sources, waits in self._held.items():
                if looks_at_all or looks_for_gone or not changed.isdisjoint(sources):
                    until = now if self._may_hold() else math.inf
                    woken = {
                        wait
                        for wait in waits
                        if wait.deadline <= until
                        or (wait.not_before <= now and wait.has_news(self._last_ids))
                        or (looks_for_gone and wait.is_abandoned())
                    }
                    self._held[sources] = [wait for wait in waits if wait not in woken]
                    due += woken
            self._scan_at = now + SCAN_S if looks_at_all else self._scan_at
            self._gone_at = now + GONE_S if looks_for_gone else self._gone_at
            self.count -= len(due)
            if not self.count:
                self._watcher = None
        for wait in due:
            run_safely(wait.run_again)
