"""A client's connection to the server of loop.py: its socket, what http1.py knows of it, and the app that answers it.

The environment of a request (PEP 3333) has more keys:

    inlet.arrived_at     when it had come whole, a time.monotonic()
    inlet.is_abandoned   a function: has the client closed its side? (Where this is not Linux, unread input hides it.)
    inlet.refusal        if it is there: the status and the sentence that the app has to answer with
    inlet.answer_later   a function(poll, size) that puts the answer off; size: the bytes that the app keeps meanwhile.
                         It returns None if there is no room for them. Or else it returns a function to be called, in
                         any thread, when poll() may have the answer: (status, headers, content), or None. What the app
                         returns is not sent then; but its headers, without Content-*, go with the answer.
    inlet.may_hold       a function: may a GET still be held, until there is something to read? The app holds it by
                         putting something under inlet.hold; when the app has returned, its method held(run_again) is
                         called. What the app has returned is not sent. Any thread calls run_again(), once. Then the app
                         finds under inlet.held what has held the request.
"""

import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ, EVENT_WRITE
from typing import TYPE_CHECKING, Any

from service import Answer, extra

if TYPE_CHECKING:
    import http1
    from loop import Server
else:
    http1 = extra("http1")

log = logging.getLogger("inlet")

RECEIVE_BYTES = 65_536
SMALL_BYTES = 16_384  # bodies and answers up to this size are not counted
FAILED: Answer = (
    "503 Service Unavailable",
    [("Content-Type", "application/problem+json"), ("Retry-After", "2")],
    b'{"title": "Service Unavailable", "status": 503, "detail": "The app failed: the outcome is not known."}',
)


class Connection(http1.Connection):
    """A client's connection. While one of its requests is run, nothing more is read. Only the loop touches it, but for
    run() and is_abandoned().
    """

    def __init__(self, server: "Server", sock: socket.socket, address: str):
        super().__init__()
        self._server, self._socket, self._address = server, sock, address
        self._is_open = True
        self.active_at = self._arrived_at = time.monotonic()
        self._poll: Callable[[], Answer | None] | None = None  # for the answer, if it was put off
        self._returned: Answer | None = None  # what the app has returned
        self._is_taken: threading.Event | None = None  # has the loop taken that, if it is large?
        self._held_by: Any = None  # as inlet.hold has it
        self._account: Hashable = None  # as Server.admit has it
        self._counted = 0  # bytes in Server.held
        self._watched = 0  # events
        sock.setblocking(False)
        server.connections.add(self)
        self._watch(EVENT_READ)

    def _watch(self, events: int) -> None:
        """Let the selector tell of these events."""
        if events and not self._is_open:
            return
        if events != self._watched:
            selector = self._server.selector
            if not self._watched:
                selector.register(self._socket, events, self._ready)
            elif events:
                selector.modify(self._socket, events, self._ready)
            else:
                selector.unregister(self._socket)
            self._watched = events

    def _ready(self, events: int) -> None:
        try:
            if events & EVENT_READ and self.wants_input:
                self.receive(self._socket.recv(RECEIVE_BYTES))
                if self.awaits != "end":
                    self.active_at = time.monotonic()
                self._go_on()
            else:  # or what has come is not wanted: then this stops watching for it
                self._send()
        except BlockingIOError:
            pass
        except OSError:  # the client has gone
            self.close()
        except Exception:
            self.close()  # or the selector would report it again and again
            raise

    def _go_on(self) -> None:
        """Have the next request run, as soon as it is whole or nothing but its refusal can be answered.

        While it is run, the connection is still watched for input: to change that twice for each request would cost
        more than to ignore what comes then.
        """
        request = self.next_request()
        if not request and self.asks:
            may_have, self._account = 0, None
            if self.request.method == "POST":
                may_have, self._account = self._server.admit(self._environ())
            self.admit(may_have)
            request = self.next_request()
        size = len(request.body) if request else self.held if self.awaits == "body" else 0
        if (self._counted or size >= SMALL_BYTES) and not self._count(size):
            request = self.refuse(503, "Too many large bodies are on their way.")
            self._count(0)  # there is room for others at once
        if request:
            self._arrived_at, self._poll, self._returned, self._held_by = time.monotonic(), None, None, None
            self._server.add(self)
        elif self.is_done:
            self.close()
        elif self.output and self.awaits == "body":  # 100 Continue
            self._send()

    def _count(self, size: int) -> bool:
        """Take note of the bytes that are kept for the request. Is there room for them?"""
        held = self._server.held
        with self._server.held_lock:
            if abs(size - self._counted) >= SMALL_BYTES or not size:
                held[self._account] += size - self._counted
                self._counted = size
            return held[self._account] <= self._server.room

    def _environ(self) -> dict[str, Any]:
        environ = self.request.environ(self._server.prefix, self._address)
        environ["inlet.arrived_at"] = self._arrived_at
        environ["inlet.is_abandoned"] = self.is_abandoned
        environ["inlet.answer_later"] = self._answer_later
        if self.request.method != "POST":
            environ["inlet.may_hold"], environ["inlet.held"] = self._may_hold, self._held_by
        if self.request.refusal:
            environ["inlet.refusal"] = self.request.refusal.status, self.request.refusal.detail
        return environ

    def _answer_later(self, poll: Callable[[], Answer | None], size: int = 0) -> Callable[[], None] | None:
        if (self._counted or size >= SMALL_BYTES) and not self._count(size):
            return None
        self._poll, self.request.body = poll, b""
        return partial(self._server.changed, self)

    def _may_hold(self) -> bool:
        return not self._server.is_stopping

    def run(self, in_loop: bool = False) -> None:
        """Run the app, unless nobody waits for its answer any more. Any thread may call this."""
        request, returned = self.request, FAILED
        started: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
            started[:] = status, self._kept(headers)

        is_late = time.monotonic() > self._arrived_at + 1 and not self._held_by
        if not self._is_open or (is_late and self.is_abandoned()):
            request.keeps_alive = False
        else:
            try:
                environ = self._environ()
                content = b"".join(self._server.app(environ, start_response))
                returned = started[0], started[1], content
                self._held_by = environ.pop("inlet.hold", None)
                if self._held_by:
                    self._held_by.held(partial(self._server.add, self))
                    return
            except Exception:
                log.exception("the app failed")
                request.keeps_alive, self._poll = False, None
        is_large = len(returned[2]) > SMALL_BYTES and not (in_loop or self._poll)
        self._is_taken = is_taken = threading.Event() if is_large else None
        self._returned = returned
        if not (self._poll and in_loop):  # in the loop, nothing else has run meanwhile
            self._server.changed(self)
        if is_taken:  # or this thread would go on to read pages faster than the loop takes them
            is_taken.wait()

    def _kept(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return those headers of the app that are sent. HEAD says what GET would say."""
        left_out: tuple[str, ...] = ()
        if self._poll:
            left_out = ("content-",)  # the answer that comes later has its own
        elif self.request.method != "HEAD":
            left_out = ("content-length",)
        return [(name.title(), value) for name, value in headers if not name.lower().startswith(left_out)]

    def answer_if_there(self) -> None:
        """Send the answer, if the app has returned it, or has it by now. What the app keeps is counted until then."""
        answer = self._returned
        if answer and self._poll:
            late = self._poll()
            answer = (late[0], late[1] + answer[1], late[2]) if late else None
        if not answer:
            return
        self._poll = self._returned = None
        if self._is_taken:
            self._is_taken.set()
        if self._counted:
            self._count(0)
        if self._is_open:
            self._account = None
            if len(answer[2]) > SMALL_BYTES:
                self._server.make_room()
            self.answer(*answer, closes=self._server.is_stopping)
            self._send()

    def _send(self) -> None:
        """Send what the client takes at this moment. When that was all, go on with its next request.

        After the last answer, close for sending, but read on: to close while the client still sends could destroy it.
        """
        try:
            sent = self._socket.send(self.output)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        del self.output[:sent]
        if sent:
            self.active_at = time.monotonic()
        if not self.output and self.has_ended:
            self.close()
            return
        if not self.output and self.awaits == "end":
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        elif not self.output and self.awaits == "head" and self.held:
            self._go_on()
        self._watch(EVENT_READ * self.wants_input | EVENT_WRITE * bool(self.output))

    def close(self) -> None:
        self._is_open = False
        self.output.clear()
        if self.awaits != "answer":
            self._count(0)
        self._watch(0)
        self._server.connections.discard(self)
        self._socket.close()

    def is_abandoned(self) -> bool:
        """Has the client closed its side? Any thread may ask. Where this is not Linux, what is unread hides it."""
        try:
            if hasattr(select, "POLLRDHUP"):
                poller = select.poll()
                poller.register(self._socket, select.POLLRDHUP)
                return bool(poller.poll(0))
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except (OSError, ValueError):  # closed here
            return True
