"""The server that `python service.py` runs: WSGI, in which the POSTs of many connections share one COMMIT.

A turn of the loop: read what has come in → run POST A, POST B, POST C: each queues its message, and postpones its
answer → after_turn(): one COMMIT of A, B and C → send three answers. A thread for each request would cost two
thread switches a message, and a fight for the GIL at each row.

Threads: one is the loop. Only it touches connections, and it runs the POSTs, but for those that may take long to check:
they have a thread of their own, and so have GETs. Another stands by, because after_turn() can take long: the disk is
slow, or somebody holds the lock. When it has taken STUCK_S, the thread that stands by becomes the loop; the other one
stands by when its write has ended.

How a POST gets its answer: the app calls environ["inlet.answer_later"](poll), and gets a function `changed`. Any thread
calls changed() when there may be an answer, or work for after_turn(). The loop then calls poll(): it returns the
answer, or None. Every other answer is what the app returns. See connection.py, which stands between a socket and the
app; http1.py knows what HTTP is.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from selectors import EVENT_READ, DefaultSelector
from typing import TYPE_CHECKING, Any

from service import extra, run_safely

if TYPE_CHECKING:
    from connection import Connection
else:
    Connection = extra("connection").Connection

log = logging.getLogger("inlet")

SMALL_BYTES = 16_384  # a larger body may take long to check: 1 KB of gzip can have a million brackets in it
UNSENT_BYTES = 64 * 1024 * 1024  # of answers; above it, the client that has not read for longest is closed
IDLE_S = 120  # after which a connection without a running request is closed
GATHER_S = 0.010  # the longest that a POST waits for others before after_turn()
AWAKE_S = 0.000_060  # after which the loop sleeps until there is something to do
STUCK_S = 0.020  # after this time in after_turn(), the other thread becomes the loop
DRAIN_S = 11  # how long a server that was told to stop waits for the requests in flight


class Server:
    """Serves a WSGI app on sockets that listen.

    admit(environ) is asked when a head has come without the whole of its body: how many bytes may that have, and to
    whose account do they go? room is the limit for the sum of each account. With 0 bytes, the app is run without the
    body. after_turn() is called at the end of each turn, and soon again while is_due(). Kinds of GETs have lanes, so
    that slow ones hold up no others: lane_of(path, query) is the number of one, and lanes has the threads of each.
    """

    def __init__(
        self,
        app: Callable[..., Iterable[bytes]],
        listeners: list[socket.socket],
        admit: Callable[[dict[str, Any]], tuple[int, Hashable]],
        after_turn: Callable[[], None],
        is_due: Callable[[], bool],
        lane_of: Callable[[str, str], int],
        lanes: tuple[int, ...],
        prefix: str,
        room: int,
        most_connections: int,
    ):
        self.app, self.admit, self.prefix, self.room = app, admit, prefix, room
        self.connections: set[Connection] = set()
        # It remembers which connections it watches. poll() takes all of them in each turn: with 1,000 idle clients that
        # was a fifth slower.
        self.selector = DefaultSelector()
        self.is_stopping = False
        self.held: Counter[Hashable] = Counter()  # bytes of bodies that are on their way, by account
        self.held_lock = threading.Lock()
        self._listeners, self._accepts, self._most_connections = listeners, False, most_connections
        self._after_turn, self._is_due, self._lane_of = after_turn, is_due, lane_of
        self._lanes, self._run_slow_post = [worker_threads(number) for number in lanes], worker_threads(1)
        self._posts: deque[Connection] = deque()
        self._changed: deque[Connection] = deque()  # that may have their answers
        self._waker, woken = socket.socketpair()
        for sock in (self._waker, *listeners):
            sock.setblocking(False)
        self.selector.register(woken, EVENT_READ, lambda _: woken.recv(4096))
        self._is_woken = False  # since it last looked
        self._lock = threading.Lock()  # for what follows
        self._loop_thread = 0
        self._is_writing = False  # is the loop in after_turn()?
        self._writes = 0  # how often it was
        self._has_written = threading.Event()  # since the thread that stands by last looked
        self._look_at = self._drain_until = 0.0
        self._ended = threading.Event()

    def run(self, stop_signals: set[signal.Signals]) -> None:
        """Serve until one of these signals comes, which all threads have to block; let requests in flight finish."""
        for _ in range(2):
            threading.Thread(target=self._take_turns, daemon=True).start()
        signal.sigwait(stop_signals)
        self.is_stopping = True
        self._wake()
        self._ended.wait()

    def add(self, connection: "Connection") -> None:
        """Have a request run that has come whole."""
        request = connection.request
        if request.method != "POST" and not request.refusal:
            self._lanes[self._lane_of(request.path, request.query)](connection.run)
        elif len(request.body) > SMALL_BYTES or "HTTP_CONTENT_ENCODING" in request.headers:
            self._run_slow_post(connection.run)
        else:
            self._posts.append(connection)

    def changed(self, connection: "Connection") -> None:
        """Take note that an answer may be there, or work for after_turn(). Any thread calls this."""
        self._changed.append(connection)
        if threading.get_ident() != self._loop_thread and not self._is_woken:
            self._wake()

    def make_room(self) -> None:
        """Close connections whose clients do not read, as long as too much of answers is held."""
        unsent = sorted((each for each in self.connections if each.output), key=lambda each: -each.active_at)
        while sum(len(each.output) for each in unsent) > UNSENT_BYTES:
            unsent.pop().close()

    def _wake(self) -> None:
        self._is_woken = True
        with suppress(BlockingIOError):  # it is full: the loop will wake
            self._waker.send(b"!")

    def _take_turns(self) -> None:
        me = threading.get_ident()
        with self._lock:
            self._loop_thread = self._loop_thread or me
        while not self._ended.is_set():
            run_safely(self._turn if self._loop_thread == me else self._stand_by)

    def _stand_by(self) -> None:
        """Become the loop if the write that is under way now is still under way after STUCK_S."""
        self._has_written.wait()
        self._has_written.clear()
        seen = self._writes
        time.sleep(STUCK_S)
        with self._lock:
            if self._is_writing and self._writes == seen:
                self._loop_thread, self._is_writing = threading.get_ident(), False

    def _turn(self) -> None:
        self._is_woken = False
        self._answer_changed()
        self._watch_listeners()
        for ready, events in self._select():
            ready.data(events)
        now = time.monotonic()
        if now > self._look_at:
            self._look_at = now + 1
            waiting = [each for each in self.connections if each.awaits != "answer"]
            for idle in (each for each in waiting if each.active_at < now - IDLE_S):
                idle.close()
        if self.is_stopping:
            self._drain(now)
        while self._posts and time.monotonic() < now + GATHER_S:
            self._posts.popleft().run(in_loop=True)
        self._answer_changed()
        self._write()

    def _select(self) -> list[Any]:
        """Wait for something to do, at most a second.

        A client that has its answer often sends again at once. To sleep and be woken takes longer than that. So for
        AWAKE_S the loop only yields the processor: with one connection, 2,480 messages a second in place of 2,230.
        """
        busy, is_due, awake_until = self._posts or self._changed, self._is_due(), time.monotonic() + AWAKE_S
        while not (ready := self.selector.select(0)) and not busy and not is_due and time.monotonic() < awake_until:
            os.sched_yield()
        if not ready and not busy:
            ready = self.selector.select(0.001 if is_due else 0.02 if self.is_stopping else 1)
        return ready

    def _answer_changed(self) -> None:
        for _ in range(len(self._changed)):  # what comes meanwhile has to wait for a turn, like everything else
            self._changed.popleft().answer_if_there()

    def _write(self) -> None:
        """Call after_turn(). If that takes longer than STUCK_S, the other thread is the loop then."""
        self._writes += 1
        self._is_writing = True
        if not self._has_written.is_set():
            self._has_written.set()
        try:
            self._after_turn()
        finally:
            with self._lock:
                if self._loop_thread == threading.get_ident():
                    self._is_writing = False

    def _watch_listeners(self) -> None:
        """Let the selector tell of new clients as long as there is room for them."""
        accepts = len(self.connections) < self._most_connections and not self.is_stopping
        if accepts != self._accepts:
            self._accepts = accepts
            if not accepts and not self.is_stopping:
                log.warning("%d connections are open: others wait until one is closed", len(self.connections))
            for listener in self._listeners:
                if accepts:
                    self.selector.register(listener, EVENT_READ, partial(self._accept, listener))
                else:
                    self.selector.unregister(listener)

    def _accept(self, listener: socket.socket, _: int = EVENT_READ) -> None:
        """Accept all who wait."""
        try:
            while len(self.connections) < self._most_connections:
                sock, address = listener.accept()
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                Connection(self, sock, address[0] if address else "localhost")
        except BlockingIOError:
            pass
        except OSError as error:  # the client has gone, or no file or memory is left
            log.warning("no connection can be accepted: %s", error)
            time.sleep(0.1)  # or the loop would try without a pause

    def _drain(self, now: float) -> None:
        """Take no more connections, and end when the requests in flight have their answers, or after DRAIN_S.

        For a request whose head is not whole, a second has to do.
        """
        if not self._drain_until:
            self._drain_until = now + DRAIN_S
            self._watch_listeners()  # before a new connection gets the number of a closed one
            for listener in self._listeners:
                self._accept(listener)
                listener.close()
            return
        head_is_late = now > self._drain_until - DRAIN_S + 1
        idle = (
            each.is_idle or (head_is_late and each.awaits == "head" and not each.output) for each in self.connections
        )
        if now > self._drain_until or all(idle):
            self._ended.set()


def worker_threads(number: int) -> Callable[[Callable[[], object]], None]:
    """Return a function that has something run by the next of so many threads that is free."""
    work: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def run() -> None:
        while True:
            run_safely(work.get())

    for _ in range(number):
        threading.Thread(target=run, daemon=True).start()
    return work.put
