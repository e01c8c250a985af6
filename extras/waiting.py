"""wait=SECONDS: a GET whose page is empty is held until there is something to read, or its time is over.

As long as a GET is held, one thread looks at the last ids of all tables, every PAUSE_S. So it sees each new row,
whoever wrote it: a trigger, another process, SQL. It lets those GETs run again that read a table which has got another
last id since they began. In between, a GET costs neither a thread nor SQL. This is for a server that can hold a request
(connection.py); elsewhere, and beyond MOST_HELD, an empty page is answered at once.
"""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from service import Problem, Store, Stream, fold, run_safely

MOST_HELD = 1000  # GETs, by this process
PAUSE_S = 0.020  # between two looks; longer where a look takes long: at most a tenth of the time goes into them
SCAN_S = 0.100  # between two looks at what is held, if no table has changed
AGAIN_S = 0.050  # a GET that was woken for nothing, because of its filter, is not woken sooner
GONE_S = 1.0  # between two looks for clients that have gone

LastIds = Mapping[str, int]  # by the folded names of tables


@dataclass(slots=True, eq=False)
class Wait:
    """A GET that can be held. last_ids: what was there before it read."""

    waits: "Waits"
    environ: dict[str, Any]
    sources: frozenset[str]
    last_ids: LastIds
    deadline: float  # a time.monotonic(), as all times here
    not_before: float
    run_again: Callable[[], None] | None = None

    def hold(self) -> None:
        """Hold the request, as soon as the app has returned."""
        self.environ["inlet.hold"] = self._held

    def _held(self, run_again: Callable[[], None]) -> None:
        self.run_again = run_again
        self.waits.add(self)

    def has_news(self, last_ids: LastIds) -> bool:
        return any(last_ids.get(source) != self.last_ids.get(source) for source in self.sources)


class Waits:
    """All GETs that are held."""

    def __init__(self, store: Store):
        self._store = store
        self._pause_s = PAUSE_S
        self._lock = threading.Lock()  # for what follows
        self._held: list[Wait] = []
        self._is_watched = False
        self._last_ids: LastIds = {}
        self._looked_at = self._scan_at = self._gone_at = 0.0

    def begin(self, environ: dict[str, Any], stream: Stream, seconds: int) -> Wait | None:
        """Return what can hold a GET, or None if it has to be answered. To be called before it reads."""
        now, arrived_at = time.monotonic(), environ.get("inlet.arrived_at", 0.0)
        may_hold = environ.get("inlet.may_hold")
        if not may_hold or not may_hold() or now >= arrived_at + seconds or len(self._held) >= MOST_HELD:
            return None
        if now > self._looked_at + 2 * self._pause_s:  # nobody looks, or is late
            self._look()
        # One that arrived a while ago was woken before, and has found nothing.
        not_before = now + AGAIN_S if now > arrived_at + AGAIN_S else now
        return Wait(self, environ, stream.sources, self._last_ids, arrived_at + seconds, not_before)

    def add(self, wait: Wait) -> None:
        with self._lock:
            self._held.append(wait)
            self._scan_at = 0.0
            if self._is_watched:
                return
            self._is_watched = True
        threading.Thread(target=self._watch, daemon=True).start()

    def _look(self) -> bool:
        """Read the last ids: https://www.sqlite.org/autoinc.html. Returns True if one has changed."""
        sql, began = "SELECT s.name, s.seq FROM sqlite_sequence AS s", time.monotonic()
        with contextlib.suppress(sqlite3.Error, OSError, Problem), self._store.database.reader(1.0) as db:
            last_ids = {fold(name): last_id for name, last_id in db.execute(sql).fetchall()}
            has_changed = last_ids != self._last_ids
            self._last_ids, self._looked_at = last_ids, time.monotonic()
            self._pause_s = max(PAUSE_S, 10 * (self._looked_at - began))
            return has_changed
        return False

    def _watch(self) -> None:
        """Look, and let run again what is due, until nothing is held."""
        while self._is_watched:
            time.sleep(self._pause_s)
            run_safely(self._wake_due)

    def _wake_due(self) -> None:
        has_changed, now = self._look(), time.monotonic()
        if not has_changed and now < self._scan_at:
            return
        with self._lock:
            due, held = [], []
            is_stopping = not self._held[0].environ["inlet.may_hold"]()
            looks_for_gone, self._scan_at = now > self._gone_at + GONE_S, now + SCAN_S
            for wait in self._held:
                has_news = wait.has_news(self._last_ids)
                is_gone = looks_for_gone and wait.environ["inlet.is_abandoned"]()
                if is_stopping or is_gone or now >= wait.deadline or (has_news and now >= wait.not_before):
                    due.append(wait)
                else:
                    held.append(wait)
                    self._scan_at = 0.0 if has_news else self._scan_at
            self._held, self._is_watched = held, bool(held)
            self._gone_at = now if looks_for_gone else self._gone_at
        for wait in due:
            if wait.run_again:
                run_safely(wait.run_again)
