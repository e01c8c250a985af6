"""http1.py, without a network: tables of bytes. Whatever the pieces that they come in, the result is the same."""

import random
import time

import pytest

import service
from test_service import eventually

http1 = service.extra("http1")
LIMIT = 100  # bytes of a body
HOST = b"Host: x\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST
POST = b"POST /m HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def read(*pieces, answers=True, limit=LIMIT):
    """What requests there are in the bytes of a client: of each (method, path, body), or the status of its refusal."""
    connection, found = http1.Connection(), []
    for piece in pieces:
        connection.receive(piece)
        while True:
            request = connection.next_request()
            if not request and connection.asks:
                connection.admit(limit)
                request = connection.next_request()
            if not request:
                break
            found.append(request.refusal.status if request.refusal else (request.method, request.path, request.body))
            if not request.keeps_alive or not answers:
                return found
            connection.answer("200 OK", [], b"")
    return found


WHOLE = {
    "no body": (GET + b"\r\n", [("GET", "/", b"")]),
    "empty lines before it": (b"\r\n\r\n" + GET + b"\r\n", [("GET", "/", b"")]),
    "two": (GET + b"\r\n" + POST + b"Content-Length: 3\r\n\r\nabc", [("GET", "/", b""), ("POST", "/m", b"abc")]),
    "two, with empty lines between": (POST + b"Content-Length: 1\r\n\r\na\r\n" + GET + b"\r\n", [("POST", "/m", b"a"), ("GET", "/", b"")]),
    "length 0": (POST + b"Content-Length: 0\r\n\r\n" + GET + b"\r\n", [("POST", "/m", b""), ("GET", "/", b"")]),
    "a body that looks like a head": (POST + b"Content-Length: 4\r\n\r\n\r\n\r\n", [("POST", "/m", b"\r\n\r\n")]),
    "chunks": (CHUNKED + b"1\r\na\r\n2;x=y\r\nbc\r\n0\r\n\r\n" + GET + b"\r\n", [("POST", "/m", b"abc"), ("GET", "/", b"")]),
    "a chunk of line breaks": (CHUNKED + b"4\r\n\r\n\r\n\r\n0\r\n\r\n", [("POST", "/m", b"\r\n\r\n")]),
    "no chunk": (CHUNKED + b"0\r\n\r\n", [("POST", "/m", b"")]),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\nX: y\r\nZ:\r\n\r\n" + GET + b"\r\n", [("POST", "/m", b"a"), ("GET", "/", b"")]),
    "the limit": (POST + b"Content-Length: 100\r\n\r\n" + b"a" * 100, [("POST", "/m", b"a" * 100)]),
    "the last one": (GET + b"Connection: close\r\n\r\n" + GET + b"\r\n", [("GET", "/", b"")]),
    "HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n" + GET + b"\r\n", [("GET", "/", b"")]),
    "an absolute target": (b"GET http://a:1/b?c HTTP/1.1\r\n" + HOST + b"\r\n", [("GET", "/b", b"")]),
    "an encoded target": (b"GET /%C3%A9%2F HTTP/1.1\r\n" + HOST + b"\r\n", [("GET", "/Ã©/", b"")]),
    "100 headers": (b"GET / HTTP/1.1\r\n" + HOST + b"a:\r\n" * 99 + b"\r\n", [("GET", "/", b"")]),
}  # fmt: skip
REFUSED = {
    "TLS": (bytes.fromhex("16030100a5010000a10303"), 400),
    "a bare line feed": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    "a bare line feed behind a header": (GET + b"X: a\nY: b\r\n\r\n", 400),
    "a bare line feed at first": (b"\n" + GET + b"\r\n", 400),
    "a bare carriage return": (GET + b"X: a\rb\r\n\r\n", 400),
    "NUL": (b"GET /\0 HTTP/1.1\r\n", 400),
    "binary": (b"\xff\xd8\xff\xe0", 400),
    "one word": (b"hello\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\n", 400),
    "not visible in the target": (b"GET /\x7f HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + HOST + b"\r\n", 400),
    "a folded header": (GET + b"X: a\r\n b\r\n\r\n", 400),
    "a space before the colon": (GET + b"X : a\r\n\r\n", 400),
    "length and chunks": (POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n1", 400),
    "no length": (POST + b"Content-Length: x\r\n\r\n1", 400),
    "another coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "chunks twice": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n", 400),
    "chunks in HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0"), 400),
    "101 headers": (b"GET / HTTP/1.1\r\n" + HOST + b"a:\r\n" * 100 + b"\r\n", 431),
    "a head without an end": (b"GET / HTTP/1.1\r\nX: " + b"x" * 17_000, 431),
    "no size": (CHUNKED + b"\r\na\r\n", 400),
    "a size with a sign": (CHUNKED + b"+1\r\na\r\n", 400),
    "a size of another base": (CHUNKED + b"0x1\r\na\r\n", 400),
    "a size that is too large": (CHUNKED + b"fffffffff\r\na\r\n", 400),
    "a size, and a bare line feed": (CHUNKED + b"1\na\r\n", 400),
    "a chunk that is longer than its size": (CHUNKED + b"1\r\nab\r\n", 400),
    "a chunk extension without an end": (CHUNKED + b"1;" + b"x" * 1100, 400),
    "no trailer": (CHUNKED + b"0\r\nno trailer\r\n\r\n", 400),
    "trailers without an end": (CHUNKED + b"0\r\n" + b"a: b\r\n" * 2800, 431),
    "tiny chunks": (CHUNKED + b"1\r\na\r\n" * 1100, 400),
}  # fmt: skip


@pytest.mark.parametrize(("data", "found"), WHOLE.values(), ids=WHOLE)
def test_it_reads_the_same_requests_whatever_the_pieces(data, found):
    assert read(data) == found
    for at in range(len(data)):
        assert read(data[:at], data[at:]) == found, at
    assert read(*(data[at : at + 1] for at in range(len(data)))) == found
    chosen = random.Random(1)
    for _ in range(50):
        cuts = sorted(chosen.sample(range(len(data)), min(5, len(data))))
        assert read(*(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))) == found, cuts


@pytest.mark.parametrize(("data", "status"), REFUSED.values(), ids=REFUSED)
def test_it_refuses_the_same_whatever_the_pieces_and_as_soon_as_it_can(data, status):
    limit = 10**6
    assert read(data, limit=limit) == [status]
    for at in range(0, len(data), max(1, len(data) // 100)):
        assert read(data[:at], data[at:], limit=limit) == [status], at
    assert read(*(data[at : at + 1] for at in range(len(data))), limit=limit) == [status]


@pytest.mark.parametrize("data", [
    POST + b"Content-Length: 101\r\n\r\n", POST + b"Content-Length: 999999999999\r\n\r\n" + b"a" * 50,
    CHUNKED + b"65\r\n" + b"a" * 101, CHUNKED + (b"20\r\n" + b"a" * 32 + b"\r\n") * 4,
], ids=range(4))  # fmt: skip
def test_a_body_that_is_too_large_is_not_waited_for_and_the_connection_ends(data):
    for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
        connection, request = http1.Connection(), None
        for piece in pieces:
            connection.receive(piece)
            request = request or connection.next_request()
            if not request and connection.asks:
                connection.admit(LIMIT)
                request = connection.next_request()
        assert (request.path, request.keeps_alive, request.refusal) == ("/m", False, None)
        assert len(request.body) <= len(data)
        length = request.environ("", "")["CONTENT_LENGTH"]
        assert int(length) > LIMIT  # so that the app sees it


def test_a_body_that_nobody_wants_is_not_kept():
    connection = http1.Connection()
    connection.receive(POST + b"Content-Length: 5\r\n\r\nab")
    assert (connection.next_request(), connection.asks) == (None, True)
    connection.admit(0)
    request = connection.next_request()
    assert (request.body, request.keeps_alive) == (b"", False)


@pytest.mark.parametrize(("version", "more", "limit", "output"), [
    ("1.1", "Expect: 100-continue\r\nContent-Length: 3\r\n", 3, b"HTTP/1.1 100 Continue\r\n\r\n"),
    ("1.1", "Expect: 100-Continue\r\nTransfer-Encoding: chunked\r\n", 3, b"HTTP/1.1 100 Continue\r\n\r\n"),
    ("1.1", "Expect: 100-continue\r\nContent-Length: 4\r\n", 3, b""), ("1.1", "Content-Length: 3\r\n", 3, b""),
    ("1.1", "Expect: 100-continue\r\nContent-Length: 3\r\n", 0, b""), ("1.0", "Expect: 100-continue\r\nContent-Length: 3\r\n", 3, b""),
])  # fmt: skip
def test_100_continue_is_for_a_body_that_is_taken(version, more, limit, output):
    connection = http1.Connection()
    connection.receive(f"POST / HTTP/{version}\r\nHost: x\r\n{more}\r\n".encode())
    assert connection.next_request() is None
    connection.admit(limit)
    assert connection.output == output


ANSWERS = {
    "one of several": (GET + b"\r\n", {}, b"HTTP/1.1 200 OK\r\nX-A: b\r\nServer: Inlet\r\nDate: D\r\nContent-Length: 2\r\n\r\nok", "head"),
    "the last one that the client wants": (GET + b"Connection: x, Close\r\n\r\n", {}, b"Content-Length: 2\r\nConnection: close\r\n\r\nok", "end"),
    "the last one of the server": (GET + b"\r\n", {"closes": True}, b"Content-Length: 2\r\nConnection: close\r\n\r\nok", "end"),
    "HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", {}, b"Connection: close\r\n\r\nok", "end"),
    "HTTP/1.0 that goes on": (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", {}, b"Connection: keep-alive\r\n\r\nok", "head"),
    "HEAD": (b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n", {}, b"Date: D\r\n\r\n", "head"),
    "a refusal": (b"nothing\r\n\r\n", {}, b"Connection: close\r\n\r\nok", "end"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "more", "output", "then"), ANSWERS.values(), ids=ANSWERS)
def test_it_writes_answers(data, more, output, then, monkeypatch):
    monkeypatch.setattr(http1, "http_date", lambda *_, **__: "D")
    connection = http1.Connection()
    connection.receive(data)
    assert connection.next_request()
    connection.answer("200 OK", [("X-A", "b")], b"ok", **more)
    assert connection.output.endswith(output)
    assert connection.awaits == then
    if then == "end":
        connection.receive(GET + b"\r\n")
        assert connection.next_request() is None


def test_while_a_request_is_run_nothing_is_read():
    connection = http1.Connection()
    connection.receive(GET + b"\r\n" + GET + b"\r\n")
    assert connection.next_request()
    assert (connection.next_request(), connection.wants_input) == (None, False)
    connection.answer("200 OK", [], b"")
    assert (connection.wants_input, connection.is_idle) == (False, False)  # until the answer is sent
    connection.output.clear()
    assert connection.next_request()


def cost(data, piece):
    """The nanoseconds of CPU that a byte takes, in pieces of this size; the least of three times."""
    pieces, taken = [data[at : at + piece] for at in range(0, len(data), piece)], []
    for _ in range(3):
        started = time.process_time()
        read(*pieces, answers=False, limit=10**7)
        taken.append(time.process_time() - started)
    return min(taken) / len(data) * 1e9


@pytest.mark.parametrize("framed", ["length", "chunks", "head"])
def test_the_cost_of_a_byte_does_not_grow_with_what_has_come(framed):
    """Ratios, not times, and a busy machine gets another try: eight times the bytes, in the same small pieces, cost
    about eight times as much.
    """

    def made(size):
        if framed == "length":
            return POST + b"Content-Length: %d\r\n\r\n" % size + b"a" * size
        if framed == "chunks":
            return CHUNKED + (b"20\r\n" + b"a" * 32 + b"\r\n") * (size // 38) + b"0\r\n\r\n"
        return b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * (size // 64)

    eventually(lambda: cost(made(1_000_000), 100) < 3 * cost(made(125_000), 100))


def test_a_byte_in_chunks_has_a_bounded_cost():
    """Against a byte with Content-Length, which costs 0.5 ns. A byte in chunks of one cost 1,400 times as much, before
    chunks that are mostly tiny were refused.
    """
    size = 1_000_000
    by_length = POST + b"Content-Length: %d\r\n\r\n" % size + b"a" * size
    chunks = CHUNKED + (b"10\r\n" + b"a" * 16 + b"\r\n") * (size // 16) + b"0\r\n\r\n"
    assert read(chunks, limit=10**7) == [("POST", "/m", b"a" * size)]
    eventually(lambda: cost(chunks, 65_536) < 600 * cost(by_length, 65_536))
