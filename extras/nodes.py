"""The nodes of a cluster, by the HTTP API of rqlite 8: which of them is asked, and what is sent to the next one."""

import base64
import contextlib
import http.client
import io
import json
import math
import os
import re
import select
import sqlite3
import ssl
import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from service import SetupError

CONNECT_TIMEOUT_S = 1.0
WRITE_TIMEOUT_S = 4.0  # a new leader is there after 1 to 3 s
BYTES_A_SECOND = 4 * 1024 * 1024  # the slowest transfer of a request
IDLE_S = 20.0  # a connection that was idle for so long is not used again
PAUSE_S = 0.05  # before a node is asked again
HAND_ON_S = 10.0  # before the leader is looked for among the nodes again
LARGEST_ANSWER = 256 * 1024 * 1024  # bytes
HOST = re.compile(r"[\w:-]+(\.[\w:-]+)*\.?")

# Answers of a node that has certainly carried nothing out: store/store.go, http/service.go and cluster/client.go of
# rqlite 8.43.4, and api.go of hashicorp/raft 1.7.3. "pool get" and "write": it could not hand a request to the leader.
NOT_TAKEN = re.compile(
    r"(?:node failed to process \w+ on remote node at \S+: )?(?:not leader|(?:leader address: )?leader not found"
    r"|store not open|store not ready|leadership transfer in progress|timed out enqueuing operation"
    r"|(?:pool get|write length|write protobuf bytes): .*)",
    re.DOTALL,
)


class NotTaken(sqlite3.OperationalError):
    """A request that was certainly not carried out, so it can be sent again."""


class NotLeader(NotTaken):
    """The node is not the leader, and was asked not to hand the request on."""


class Node:
    """One rqlited, and its idle connections. Raises ValueError if the URL has no host, or a path, query or fragment."""

    def __init__(self, url: SplitResult):
        host = url.hostname or ""
        if not HOST.fullmatch(host) or url.path.strip("/") or url.query or url.fragment:
            raise ValueError(url)
        self.name = f"{host}:{url.port or 4001}"
        if url.scheme == "https":
            self._new: Any = partial(http.client.HTTPSConnection, host, url.port or 4001, context=tls_context())
        else:
            self._new = partial(http.client.HTTPConnection, host, url.port or 4001)
        self._headers = {"Content-Type": "application/json"}
        if url.username:
            user = f"{unquote(url.username)}:{unquote(url.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        self._idle: list[tuple[http.client.HTTPConnection, float, int]] = []  # used last at that time, by that process

    @contextlib.contextmanager
    def request(self, method: str, path: str, body: bytes, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield its answer. The block reads all of it.

        Raises NotTaken if there is no connection, and OSError or HTTPException if there is no answer.
        """
        timeout_s = max(timeout_s, PAUSE_S)  # 0 would mean not to wait
        connection = self._idle_connection()
        if not connection:
            connection = self._new(timeout=min(timeout_s, CONNECT_TIMEOUT_S))
            try:
                connection.connect()
            except (OSError, ValueError) as error:  # ValueError: of a name that is no name
                raise NotTaken(f"{self.name}: {error}") from None
        try:
            connection.sock.settimeout(timeout_s)
            connection.request(method, path, body, self._headers)
            connection.response_class = partial(response_until, time.monotonic() + timeout_s)
            yield connection.getresponse()
        except BaseException:
            connection.close()
            raise
        self._idle.append((connection, time.monotonic(), os.getpid()))

    def _idle_connection(self) -> http.client.HTTPConnection | None:
        """Return a connection that is still open, or None. A write on a closed one has no known outcome."""
        with contextlib.suppress(IndexError):
            while True:
                connection, used_at, user = self._idle.pop()
                if connection.sock and time.monotonic() < used_at + IDLE_S and user == os.getpid():
                    poller = select.poll()
                    poller.register(connection.sock, select.POLLIN)
                    if not poller.poll(0):
                        return connection
                connection.close()
        return None

    def close(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop()[0].close()


class DeadlineSocket(io.RawIOBase):
    """A socket for http.client with one deadline for the whole answer. settimeout() limits only each recv()."""

    def __init__(self, sock: Any, until: float):
        self._sock, self._until = sock, until
        # It keeps the socket open, which http.client closes after the head of a last answer.
        self._file = sock.makefile("rb", buffering=0)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the answer did not end in time")
        self._sock.settimeout(left_s)
        return self._file.readinto(buffer)


def response_until(deadline: float, sock: Any, **more: Any) -> http.client.HTTPResponse:
    limited: Any = DeadlineSocket(sock, deadline)
    return http.client.HTTPResponse(limited, **more)


def tls_context() -> ssl.SSLContext:
    """Return how to speak to nodes: with a certificate of our own, if they ask for one. SetupError if it is no good."""
    context = ssl.create_default_context()  # SSL_CERT_FILE names the authority
    if certificate := os.environ.get("INLET_NODE_CERT"):
        try:
            context.load_cert_chain(certificate, os.environ.get("INLET_NODE_KEY"))
        except OSError as error:
            raise SetupError(f"INLET_NODE_CERT and INLET_NODE_KEY cannot be used: {error}") from None
    return context


class Nodes:
    """The nodes of a cluster. Raises ValueError for a URL that cannot be that of a node.

    Requests go to the leader, but for queries with level=none: they go to one node until it fails.
    """

    def __init__(self, urls: list[str]):
        self.nodes = [Node(urlsplit(url)) for url in urls]
        self.repeated = 0  # requests that were sent again
        self._current = 0  # the node that is asked
        self._led_at = -math.inf  # when the leader has answered
        self._handed_on_until = -math.inf  # until then, a follower may hand requests on: no listed node leads

    @property
    def current(self) -> Node:
        return self.nodes[self._current]

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def send(
        self,
        path: str,
        statements: list[list],
        deadline: float,
        timeout_s: float = WRITE_TIMEOUT_S,
        repeat_until: float | None = None,
    ) -> list[dict[str, Any]]:
        """Return the answers to statements, one for each; those of a transaction end at the one that is refused.

        A query, and what was certainly not carried out, is sent to the next node, until the deadline, or an earlier
        time. Raises NotTaken then, or sqlite3.OperationalError for what has no known outcome.
        """
        body = json.dumps(statements, ensure_ascii=False).encode(errors="replace")
        timeout_s += len(body) / BYTES_A_SECOND
        tried: set[int] = set()
        saw_follower = False
        while True:
            asked = self._current
            try:
                answers = self._ask_leader(self.nodes[asked], path, body, min(deadline - time.monotonic(), timeout_s))
                return whole(answers, len(statements), "transaction" in path)
            except (sqlite3.Error, OSError, http.client.HTTPException) as error:
                self._current = (asked + 1) % len(self.nodes)
                tried.add(asked)
                saw_follower = saw_follower or isinstance(error, NotLeader)
                if saw_follower and len(tried) == len(self.nodes):
                    self._let_hand_on()
                can_repeat = path.startswith("/db/query") or isinstance(error, NotTaken)
                if not can_repeat or time.monotonic() + PAUSE_S > (repeat_until or deadline):
                    kind = NotTaken if isinstance(error, NotTaken) else sqlite3.OperationalError
                    raise kind(str(error) or type(error).__name__) from None
            self.repeated += 1
            time.sleep(PAUSE_S)

    def _ask_leader(self, node: Node, path: str, body: bytes, timeout_s: float) -> list[dict[str, Any]]:
        """Return the answers of a node. A follower refuses what is for the leader, unless it may hand it on for now.

        It may not always: it then loses all answers if an error in one is not UTF-8 (it quotes a lone surrogate).
        """
        if "level=none" in path or "redirect" in path or time.monotonic() <= self._handed_on_until:
            return self.ask(node, path, body, timeout_s)
        answers = self.ask(node, f"{path}&redirect", body, timeout_s)
        self._led_at = time.monotonic()
        return answers

    def _let_hand_on(self) -> None:
        """Let a follower hand requests on for a time, unless there was a leader a moment ago: an election may go on."""
        if time.monotonic() > self._led_at + WRITE_TIMEOUT_S:
            self._handed_on_until = time.monotonic() + HAND_ON_S

    def ask(self, node: Node, path: str, body: bytes, timeout_s: float) -> list[dict[str, Any]]:
        """Return the answers of a node. Raises NotTaken, or another error if the outcome is not known."""
        data = bytearray()
        with node.request("POST", path, body, timeout_s) as answer:
            while part := answer.read1(65_536):
                data += part
                if len(data) > LARGEST_ANSWER:
                    raise sqlite3.OperationalError(f"{node.name}: the answer has more than {LARGEST_ANSWER} bytes")
            answer.close()  # read1() does not see the end
        text = data.decode(errors="replace").strip()
        found = object_in(text) if answer.status == 200 else {}
        error = str(found.get("error", text))
        answers = found.get("results")
        if "error" not in found and isinstance(answers, list) and all(map(is_answer, answers)):
            return answers
        told = f"{node.name}: {answer.status} {error[:200]}"
        if NOT_TAKEN.fullmatch(error):
            raise NotTaken(told)
        if answer.status == 401:
            raise NotTaken(f"{node.name}: the user or the password is wrong, or the user lacks a permission")
        if answer.status == 301:  # it was asked to redirect
            raise NotLeader(f"{node.name} is not the leader")
        if answer.status in (307, 308, 400, 403, 404, 405):
            raise NotTaken(told)
        raise sqlite3.OperationalError(told)


def whole(answers: list[dict[str, Any]], number: int, is_transaction: bool) -> list[dict[str, Any]]:
    """Return the answers to so many statements; sqlite3.OperationalError if they are not whole."""
    is_refused = is_transaction and answers and "error" in answers[-1]
    if len(answers) != number and not is_refused:
        raise sqlite3.OperationalError(f"{len(answers)} answers to {number} statements")
    return answers


def object_in(text: str) -> dict[str, Any]:
    """Return the JSON object that a text is, or an empty one."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        return found if isinstance(found, dict) else {}
    return {}


def is_answer(found: Any) -> bool:
    """Is this what a node answers to one statement?"""
    if not isinstance(found, dict):
        return False
    rows, last_id = found.get("values") or [], found.get("last_insert_id", 0)
    return isinstance(last_id, int) and isinstance(rows, list) and all(isinstance(row, list) for row in rows)
