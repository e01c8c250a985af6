"""The server of loop.py, connection.py and http1.py: what holds with it, and not with waitress.

All tests of test_service.py hold with both: .ci/run runs them a second time with INLET_SERVER=waitress. These do not:

    test_posts_that_come_together_…   waitress has 72 threads. If all wait for the lock, a GET waits, too.
    test_what_is_not_http_…           waitress answers text/plain, and takes some of it: a Content-Length with a sign, two
                                      Hosts, chunk sizes with spaces. What is no request is not in our log.
    test_what_can_never_become_…      waitress waits for the end of the head, 120 s.
    test_no_head_takes_long_to_refuse It reads heads of 4,096 bytes at most, because they take it long.
    test_connection_is_a_list         It knows `Connection: close`, but not a list.
    test_100_continue_…               It says 100 before the app has seen the head.
    test_who_may_not_write_…          It reads the whole body before the app sees the head.
    test_a_byte_of_a_dripped_upload_… It is not ours to bound.
"""

import concurrent.futures
import contextlib
import hmac
import json
import random
import selectors
import socket
import threading
import time
import types

import pytest

import service
from test_service import (
    BATCH,
    CHUNKED,
    GET,
    HOST,
    POST,
    TOKEN,
    add_tester,
    another_process_has_its_turn,
    eventually,
    in_threads,
    many_at_once,
    send,
    within,
)


def test_posts_that_come_together_share_a_commit_and_never_hold_up_a_reader(server, store):
    """Another process has its turn for a second; what comes meanwhile is written in few COMMITs, deep JSON too."""
    assert send(server.connect(), "POST", "/messages", "0")[0] == 201
    with another_process_has_its_turn(store):
        waiting = many_at_once(server, 100, body="[" * 512 + "]" * 512)
        for _ in range(10):
            with within(1):
                assert send(server.connect(), "GET", "/messages")[0] == 200
    answers = [connection.getresponse() for connection in waiting]
    assert {answer.status for answer in answers} == {201}
    assert len({json.load(answer)["received_at"] for answer in answers}) <= 10


@pytest.mark.parametrize(("request_", "status"), [
    (GET + b"bad header\r\n" + HOST + b"\r\n", 400), (GET + b"\r\n", 400), (GET + HOST + HOST + b"\r\n", 400),
    (GET + b"Host: a b\r\n\r\n", 400), (GET + HOST + b"X: \x01\r\n\r\n", 400), (GET + HOST + b"X: a\r\n b\r\n\r\n", 400),
    (GET + HOST + b"X: a\nY: b\r\n\r\n", 400), (GET + HOST + b"X : a\r\n\r\n", 400), (GET + HOST + b"X: " + b"x" * 20_000, 431),
    *[(b"GET " + target + b"\r\n" + HOST + b"\r\n", 400) for target in (b"/?\x01 HTTP/1.1", b"/\x7f HTTP/1.1", b"/ HTTP/1.2",
      b"/  HTTP/1.1", b"http://[::1/x HTTP/1.1", b"healthz HTTP/1.1", b"/healthz")],
    *[(POST + b"Content-Length: " + length + b"\r\n\r\n1", 400) for length in (b"9" * 5000, b"+1", b"1\r\nContent-Length: 1")],
    (POST + b"Content-Length: 99999999999\r\n\r\n", 413), (POST + b"Transfer-Encoding: ,\r\n\r\n", 400),
    *[(POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n1\r\n1\r\n0\r\n\r\n", status) for coding, status in (
      (b"chunked\r\nContent-Length: 1", 400), (b"chunked\r\nTransfer-Encoding: chunked", 400), (b"gzip", 501), (b"gzip, chunked", 501))],
    (CHUNKED.replace(b"1.1", b"1.0") + b"1\r\n1\r\n0\r\n\r\n", 400), (CHUNKED + b"1;" + b"x" * 5000 + b"\r\n1\r\n0\r\n\r\n", 400),
    *[(CHUNKED + line + b"\r\n1\r\n0\r\n\r\n", 400) for line in (b"0x1", b"+1", b"1 x", b"1;\x01", b"", b"1\n", b"1_0")],
    *[(CHUNKED + b"1\r\n1" + end + b"\r\n\r\n", 400) for end in (b"1\r\n0", b"\r\n0\r\nX: \x01", b"\r\n0\r\nno trailer")],
], ids=lambda value: value[-60:].decode("latin-1") if isinstance(value, bytes) else None)  # fmt: skip
def test_what_is_not_http_gets_one_answer_and_the_connection_is_closed(request_, status, any_server):
    """What two servers could read in two ways must not become a second request."""
    statuses, received = any_server.answers(request_)
    head, _, body = received.partition(b"\r\n\r\n")
    assert statuses == [status] == [json.loads(body)["status"]]
    assert b"Content-Type: application/problem+json" in head


@pytest.mark.parametrize("request_", [
    b"GET a://" + b"1" * 16_000 + b" HTTP/x\r\n" + HOST + b"\r\n",
    b"GET /" + b"%" * 16_000 + b"\x01 HTTP/1.1\r\n" + HOST + b"\r\n",
    *[GET + HOST + b"X" + middle * 16_000 + b"\x01\r\n\r\n" for middle in (b":", b" ", b"\t", b": a", b":\t")],
], ids=range(7))  # fmt: skip
def test_no_head_takes_long_to_refuse(request_, any_server):
    with within(1):
        assert any_server.answers(request_)[0] == [400 if len(request_) < 16_500 else 431]


@pytest.mark.parametrize("value", [b"close", b"TE, close", b"Close ,keep-alive", b"x\r\nConnection: close"])
def test_connection_is_a_list(value, any_server):
    first = GET + HOST + b"Connection: keep-alive, TE\r\n\r\n"  # stays open
    assert any_server.answers(first + GET + HOST + b"Connection: " + value + b"\r\n\r\n")[0] == [200, 200]


@pytest.mark.parametrize(("request_", "statuses"), [
    # The body has come with its head: RFC 9110, 10.1.1 lets a server leave the 100 out then.
    (POST + b"Expect: 100-Continue\r\nConnection: close\r\nContent-Length: 1\r\n\r\n1", [201]),
    *[(POST + b"Expect: 100-continue\r\nConnection: close\r\n" + length + b"\r\n", statuses) for length, statuses in (
      (b"", [411]), (b"Content-Length: 0\r\n", [400]), (b"Content-Length: 999999999\r\n", [413]))],
    (POST.replace(TOKEN.encode(), b"x") + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n", [401]),
    (POST.replace(b"1.1", b"1.0") + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n1", [201]),
    (POST + b"bad header\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n", [400]),
    (POST + b"Expect: 100-continue\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", [400]),
    (GET + HOST + b"Expect: 100-continue\r\nConnection: close\r\n\r\n", [200]),
], ids=range(9))  # fmt: skip
def test_100_continue_is_said_to_whom_it_is_meant(request_, statuses, any_server):
    assert any_server.answers(request_)[0] == statuses


@pytest.mark.parametrize(
    "data", [bytes.fromhex("16030100a5010000a10303"), b"GET / HTTP/1.1\n", b"\xff\xfe", b"hello\r\n"], ids=range(4)
)
def test_what_can_never_become_a_request_is_refused_at_once_and_logged(data, any_server):
    with any_server.socket(data) as sock, within(2):
        assert sock.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert "400 to '' at '/': 'The request is not well-formed HTTP/1.1.'" in any_server.log


def test_who_may_not_write_is_told_before_the_body_comes(any_server):
    add_tester(any_server.database, "reader", "reader", "read write:readings")
    who = [("reader", "/messages", 403), ("stranger", "/messages", 401), (TOKEN, "/nothing", 404), (TOKEN, "/", 405)]
    eventually(lambda: send(any_server.connect(), "GET", "/messages", Authorization="Bearer reader")[0] == 200)
    for framing in ("Content-Length: 1000000", "Transfer-Encoding: chunked"):
        for token, path, status in who:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n{framing}\r\n\r\n"
            with any_server.socket(head.encode()) as sock:
                answer = sock.recv(1000)
                assert answer.startswith(f"HTTP/1.1 {status} ".encode())
                assert b"Connection: close" in answer


class Uploads:
    """A server to the connections of connection.py, with so many uploads that have begun; it runs no app."""

    def __init__(self, number):
        self.selector, self.connections, self.held = selectors.DefaultSelector(), set(), {None: 0, 1: 0}
        self.held_lock = threading.Lock()
        self.prefix, self.room, self.admit = "", 10**9, lambda _: (10**7, 1)
        self.add = lambda connection: None
        self.clients = [self.begin() for _ in range(number)]

    def begin(self):
        theirs, ours = socket.socketpair()
        connection = service.extra("connection").Connection(self, ours, "localhost")
        theirs.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n" + b"a" * 20_000)
        self.selector.get_key(ours).data(selectors.EVENT_READ)
        return connection, theirs

    def cost_of_a_byte(self):
        """The CPU time to take one more byte of one of them; the least of several times."""
        (connection, theirs), taken = self.clients[0], []
        for _ in range(20):
            started = time.process_time()
            for _ in range(100):
                theirs.sendall(b"a")
                connection._ready(selectors.EVENT_READ)
            taken.append(time.process_time() - started)
        return min(taken)

    def close(self):
        for connection, theirs in self.clients:
            connection.close()
            theirs.close()


def test_a_byte_of_a_dripped_upload_costs_the_same_however_many_there_are():
    """All connections were counted at each recv: 286 µs a byte with 3,500 uploads."""
    few, many = Uploads(2), Uploads(1500)
    assert many.held[1] >= 1500 * 20_000
    eventually(lambda: many.cost_of_a_byte() < 2 * few.cost_of_a_byte())
    for uploads in (few, many):
        uploads.close()
        assert uploads.held[1] == 0


def test_bodies_that_are_on_their_way_have_a_limit_for_each_account():
    uploads = Uploads(0)
    uploads.room, refused = 100_000, []
    uploads.add = lambda connection: refused.append(connection.request.refusal.status)
    uploads.clients = [uploads.begin() for _ in range(7)]
    assert refused == [503] * 2
    uploads.admit = lambda _: (10**7, None)
    uploads.clients.append(uploads.begin())
    assert refused == [503] * 2
    uploads.close()


def test_a_head_that_comes_in_pieces_is_in_nobodys_account():
    """What was counted for nobody was taken from the account of the client: after 4,096 such heads, none had room."""
    uploads = Uploads(0)
    theirs, ours = socket.socketpair()
    connection = service.extra("connection").Connection(uploads, ours, "localhost")
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nX: "
    for data in (head + b"x" * (16_384 - len(head)), b"\r\n\r\n", b"123456789"):
        theirs.sendall(data)
        connection._ready(selectors.EVENT_READ)
        assert set(uploads.held.values()) == {0}
    assert connection.request.body == b"123456789"
    connection.close()
    assert set(uploads.held.values()) == {0}
    theirs.close()


def test_a_turn_that_fails_leaves_the_loop_to_its_thread():
    """The thread that stands by must not become the loop while the other one still is."""

    def fail():
        raise RuntimeError

    server = service.extra("loop").Server(None, [], None, fail, bool, None, (1,), "", 0, 1)
    server._loop_thread = threading.get_ident()
    server._wake()  # or it would wait for a client
    with pytest.raises(RuntimeError):
        server._turn()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(server._stand_by).result()
    assert server._loop_thread == threading.get_ident()


@pytest.mark.parametrize(("size", "headers", "is_slow"), [
    (20_000, {}, True), (100, {"HTTP_CONTENT_ENCODING": "gzip"}, True), (100, {}, False),
])  # fmt: skip
def test_what_may_take_long_to_check_is_not_run_in_the_loop(size, headers, is_slow):
    """A signature over 1 MB, tried with 100 secrets, took 63 ms; 1 KB of gzip with a million brackets 500 ms."""
    server = service.extra("loop").Server(None, [], None, None, bool, None, (1,), "", 0, 1)
    slow = []
    server._run_slow_post = slow.append
    request = service.extra("http1").Request()
    request.method, request.body, request.headers = "POST", b"x" * size, headers
    server.add(types.SimpleNamespace(request=request, run=None))
    assert (len(slow), len(server._posts)) == (is_slow, not is_slow)


def test_no_page_is_read_before_the_loop_has_taken_the_last_one():
    """Pages piled up that no limit had counted: 56 of them, with 252 MB, on a busy machine."""
    pages = []

    def app(environ, start_response):
        pages.append(environ["PATH_INFO"])
        start_response("200 OK", [])
        return [b"x" * 20_000]

    server = service.extra("loop").Server(app, [], None, None, bool, lambda *_: 0, (1,), "", 0, 10)
    pairs = [socket.socketpair() for _ in range(5)]
    for theirs, ours in pairs:
        connection = service.extra("connection").Connection(server, ours, "localhost")
        theirs.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        connection._ready(selectors.EVENT_READ)
    for n in range(5):
        eventually(lambda n=n: len(server._changed) == 1 and len(pages) == n + 1)
        time.sleep(0.05)
        assert len(pages) == n + 1
        if n == 1:
            server._changed[0].close()  # its client has gone
        server._answer_changed()
    for theirs, ours in pairs:
        theirs.close()
        ours.close()


def test_an_idle_connection_keeps_nothing_of_what_it_has_sent():
    """Answered bodies stayed until the next request, and nobody counted them: 4 GB, without a token."""
    http1 = service.extra("http1")
    for body in (
        b"Content-Length: 100000\r\n\r\n" + b"x" * 100_000,
        b"Transfer-Encoding: chunked\r\n\r\n186A0\r\n" + b"x" * 100_000 + b"bad",
    ):
        connection = http1.Connection()
        connection.receive(b"POST / HTTP/1.1\r\nHost: x\r\n" + body)
        connection.next_request()
        connection.admit(10**6)
        connection.next_request()
        connection.answer("400 Bad Request", [], b"")
        assert (connection.request.body, connection._chunks, connection.held < 10) == (b"", None, True)


def test_a_reset_while_a_request_is_run_leaves_the_room_as_it_was():
    """80 resets of large messages took all of the room for good."""
    uploads, size = Uploads(0), 100_000
    theirs, ours = socket.socketpair()
    connection = service.extra("connection").Connection(uploads, ours, "localhost")
    connection._account = 1
    connection.awaits = "answer"
    uploads.changed, results = lambda each: each.answer_if_there(), [None]

    def app(environ, start_response):
        connection.close()  # as the loop does when the client has gone
        assert environ["inlet.answer_later"](results.pop, size)
        start_response("200 OK", [])
        return []

    uploads.app = app
    connection.run()
    assert uploads.held[1] == size  # for as long as the app keeps it
    results.append(("201 Created", [], b""))
    connection.answer_if_there()
    assert set(uploads.held.values()) == {0}
    theirs.close()


def test_a_connection_that_is_closed_while_it_goes_on_is_no_traceback(server):
    pipelined = GET + HOST + b"\r\n" + POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    for _ in range(20):
        server.socket(pipelined).close()
    assert send(server.connect(), "GET", "/healthz")[0] == 200
    assert "Traceback" not in server.log


@pytest.mark.parametrize(("path", "query", "lane"), [
    ("/livez", "", 0), ("/healthz", "", 1), ("/metrics/", "", 1), ("/messages", "after=3&limit=10", 2), ("/messages/7", "", 2),
    ("/messages", "since=2026-11-27T00:00:00Z&wait=3", 2), ("/readings", "sensor=a", 3), ("/warm", "", 3),
    ("/", "", 2), ("/nothing", "", 2), ("*", "", 2),
])  # fmt: skip
def test_slow_reads_hold_up_no_others(path, query, lane, store, monkeypatch):
    """60 clients that filtered by a column without an index made a page take 4 s."""
    given = {}
    monkeypatch.setattr(
        service.extra("loop"),
        "Server",
        lambda *arguments: given.update(all=arguments) or types.SimpleNamespace(run=print),
    )
    service.run_loop(None, [], service.parser().parse_args([]), store, service.Clients(store, 10))
    lane_of, lanes = given["all"][5:7]
    assert lane_of(path, query) == lane
    assert len(lanes) == 4
    assert sum(lanes) == 2 + 8


def test_an_idle_server_never_sleeps_while_something_is_to_be_written(server):
    """Large messages that come at the same moment, and the portions of a lenient batch, waited for a second."""
    took, large = [], '"' + "x" * 20_000 + '"'

    def post(_):
        with contextlib.closing(server.connect()) as connection:
            for _ in range(60):
                time.sleep(random.uniform(0, 0.004))
                began = time.monotonic()
                assert send(connection, "POST", "/messages", large)[0] == 201
                took.append(time.monotonic() - began)

    with in_threads(post, 3):
        pass
    assert len(took) == 180
    assert sum(each > 0.5 for each in took) == 0
    with contextlib.closing(server.connect()) as connection, within(5):
        answer = send(connection, "POST", "/messages", "1\n" * 7500, **BATCH, Prefer="handling=lenient")
        assert json.loads(answer[2])["count"] == 7500


def test_a_large_signed_message_gets_its_answer(server, command, store):
    _, secret, _ = command("client", "add", "shop", "--signs", "github")
    eventually(lambda: "shop" in command("client", "list")[1])
    body = json.dumps("x" * 100_000).encode()
    signature = f"sha256={hmac.digest(secret.strip().encode(), body, 'sha256').hex()}"
    with contextlib.closing(server.connect()) as connection:
        for n in range(5):
            signed = {"X_Hub_Signature_256": signature, "X_GitHub_Delivery": f"d-{n}", "Authorization": ""}
            eventually(lambda signed=signed: send(connection, "POST", "/messages", body, **signed)[0] == 201)
            wrong = signed | {"X_Hub_Signature_256": "sha256=" + "0" * 64}
            assert send(connection, "POST", "/messages", body, **wrong)[0] == 401
