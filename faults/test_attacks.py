"""What a stranger may try: slow clients, malformed framing, bombs, floods, guesses, tricks, and random requests.

Directly at the service, and through nginx with deploy/nginx.conf.
"""

import base64
import contextlib
import gzip
import hashlib
import http.client
import json
import random
import re
import secrets
import socket
import sqlite3
import statistics
import subprocess
import threading
import time

import outside
import pytest
from common import Ledger, Server, database, scale, seed
from deployed import nginx

import service
from test_service import DEADLINE_S, TOKEN, add_tester, run, send, stream_sql


@pytest.fixture(params=["direct", "nginx"])
def entrance(request, server, tmp_path):
    """(host, port) to attack: the service itself, or nginx in front of it."""
    host, port = server.address.split(":")
    if request.param == "direct":
        yield host, int(port)
    else:
        with nginx(tmp_path, server.address) as address:
            yield address


def count(server):
    with contextlib.closing(sqlite3.connect(server.database)) as db:
        return db.execute("SELECT count(*) FROM messages").fetchone()[0]


# Slow clients

HEAD = f"POST /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def slow_clients(address, number, kind):
    """Connections that send or read a byte now and then."""
    stop = threading.Event()
    sockets = []
    for _ in range(number):
        sock = socket.socket()
        if kind == "reading":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(DEADLINE_S)
        sock.connect(address)
        if kind == "body":
            sock.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n".encode())
        elif kind == "reading":
            ask = f"GET /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
            sock.sendall(ask.encode() * 5)
        sockets.append(sock)

    def trickle():
        n = 0
        while not stop.wait(0.5):
            n += 1
            for sock in sockets:
                with contextlib.suppress(OSError):
                    sock.recv(1) if kind == "reading" else sock.send(
                        b" " if kind == "body" else HEAD[n : n + 1].encode()
                    )

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for sock in sockets:
            sock.close()


@pytest.mark.parametrize("kind", ["headers", "body", "reading", "idle"])
def test_slow_clients_do_not_stop_healthy_ones(kind, server, entrance):
    ledger = Ledger(lambda: http.client.HTTPConnection(*entrance, timeout=DEADLINE_S))
    for _ in range(10):  # pages worth reading slowly
        ledger.post(json.dumps("x" * 50_000).encode())
    with slow_clients(entrance, 2000 if kind == "idle" else 400, kind), ledger.sending(8):
        time.sleep(4)
    answered = len(ledger.acknowledged)
    print(f"{kind}: {answered} messages in 4 s beside the slow ones")
    assert answered > 20  # thousands, but for the readers, whose pages take all of the processor at first
    assert set(ledger.statuses) <= {201, 422}


# Framing

BODY = b'{"smuggled": false}'
SECOND = (HEAD + "Content-Length: 8\r\n\r\n").encode() + b'"second"'


def framings():
    """(name, bytes to send, how many rows at most)."""
    head, length = HEAD.encode(), str(len(BODY)).encode()
    chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    yield "CL and TE", head + b"Content-Length: " + length + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk, 1
    yield "TE and CL, smuggling", head + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + SECOND, 1
    yield "CL 0 and TE", head + b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n" + chunk + SECOND, 1
    yield "two lengths", head + b"Content-Length: " + length + b"\r\nContent-Length: 3\r\n\r\n" + BODY, 0
    yield "same length twice", head + (b"Content-Length: " + length + b"\r\n") * 2 + b"\r\n" + BODY, 1
    yield "list of lengths", head + b"Content-Length: 3, 3\r\n\r\n" + BODY, 0
    for bad in (b"-1", b"+19", b"0x13", b"19 ", b"1 9", b"", b"9" * 400, b"9" * 5000, b"1e3", b"\xb9"):
        yield f"length {bad[:20]!r}", head + b"Content-Length: " + bad + b"\r\n\r\n" + BODY, 1
    for te in (b"chunked, chunked", b"identity", b"gzip, chunked", b"chunked, gzip", b"xchunked", b"\x0bchunked", b"chunked\x00",
               b"Chunked", b" chunked", b"chunked;q=1", b"'chunked'", b",", b"chunked,", b""):  # fmt: skip
        yield f"TE {te!r}", head + b"Transfer-Encoding: " + te + b"\r\n\r\n" + chunk, 1
    yield "TE twice", head + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + chunk, 1
    yield "TE with a space", head + b"Transfer-Encoding : chunked\r\n\r\n" + chunk, 1
    for size in (
        b"-1",
        b"+13",
        b"0x13",
        b"1 3",
        b"g",
        b"",
        b"fffffffffffffffff",
        b"13;ext",
        b"13 ;ext=1",
        b"13\x00",
        b"013",
    ):
        yield (
            f"chunk size {size!r}",
            head + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
            1,
        )
    yield "chunk without end", head + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%b" % (len(BODY), BODY), 0
    yield "chunk, bare LF", head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk.replace(b"\r\n", b"\n"), 1
    yield (
        "trailer",
        head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk[:-2] + b"X: y\r\nContent-Length: 5\r\n\r\n" + SECOND,
        2,
    )
    for version in (
        b"HTTP/1.0",
        b"HTTP/1.2",
        b"HTTP/2.0",
        b"HTTP/0.9",
        b"http/1.1",
        b"HTTP/1.1 ",
        b"HTTP/11",
        b"",
        b"HTTP/1.1x",
    ):
        start = b"POST /messages " + version + b"\r\n"
        rest = head.partition(b"\r\n")[2]
        yield f"{version!r} chunked", start + rest + b"Transfer-Encoding: chunked\r\n\r\n" + chunk, 1
        yield f"{version!r} length", start + rest + b"Content-Length: " + length + b"\r\n\r\n" + BODY, 1
    yield "bare LF", (head + b"Content-Length: " + length + b"\r\n\r\n").replace(b"\r\n", b"\n") + BODY, 1
    yield "bare CR", (head + b"Content-Length: " + length + b"\r\n\r\n").replace(b"\r\n", b"\r") + BODY, 0
    for name, line in (
        ("NUL in a header", b"X: a\0b"), ("NUL in a name", b"X\0: a"), ("obs-fold", b"X: a\r\n b: c"), ("fold first", b" X: a"),
        ("no colon", b"nothing"), ("no name", b": x"), ("space in a name", b"X Y: a"), ("high bytes", b"X: \xff\xfe"),
        ("underscore", b"Content_Length: 3"), ("bare CR in a header", b"X: a\rb"), ("bare LF in a header", b"X: a\nY: b"),
    ):  # fmt: skip
        yield name, head + line + b"\r\nContent-Length: " + length + b"\r\n\r\n" + BODY, 1
    for target in (b"http://elsewhere/messages", b"*", b"//messages", b"/messages/../messages", b"/%6dessages", b"/messages%00", b"/messages;x",
                   b"/messages#x", b"http://[::1", b"http://[::1/messages", b"http://", b"/%", b"/%zz", b"/\xff", b"messages", b"/messages?%", b"/" + b"a" * 9000,
                   b"/messages http://x"):  # fmt: skip
        start = b"POST " + target + b" HTTP/1.1\r\n" + head.partition(b"\r\n")[2]
        yield f"target {target[:30]!r}", start + b"Content-Length: " + length + b"\r\n\r\n" + BODY, 1
    yield "no host", head.replace(b"Host: x\r\n", b"") + b"Content-Length: " + length + b"\r\n\r\n" + BODY, 1
    yield "two hosts", head + b"Host: y\r\nContent-Length: " + length + b"\r\n\r\n" + BODY, 1
    yield "garbage", bytes(range(256)) * 4 + b"\r\n\r\n", 0
    yield "TLS", bytes.fromhex("16030100a5010000a10303") + bytes(160), 0
    yield "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), 0
    yield "pipelined", SECOND * 3, 3
    yield (
        "100-continue, then another",
        head + b"Expect: 100-continue\r\nContent-Length: " + length + b"\r\n\r\n" + BODY + SECOND,
        2,
    )
    yield (
        "100-continue and an obs-fold",
        head + b"X: a\r\n b\r\nExpect: 100-continue\r\nContent-Length: " + length + b"\r\n\r\n",
        0,
    )
    yield "expectation unknown", head + b"Expect: a miracle\r\nContent-Length: " + length + b"\r\n\r\n" + BODY, 1


def answer_to(data, entrance, name):
    """All that comes back; the client says that it has no more to send only when nothing more comes, for nginx takes
    that for a client that has gone, and lets go of a request that the service still works on.
    """
    answer = b""
    with socket.create_connection(entrance, 5) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(data)
        sock.settimeout(0.15)
        with contextlib.suppress(TimeoutError):
            while more := sock.recv(65536):
                answer += more
            return answer
        sock.settimeout(5)
        sock.shutdown(socket.SHUT_WR)
        try:
            while more := sock.recv(65536):
                answer += more
        except TimeoutError:
            pytest.fail(f"{name}: no answer and no end within 5 s, after {answer!r}")
    return answer


def settled(server):
    """The number of rows, when it has stopped changing."""
    found = count(server)
    while time.sleep(0.05) or count(server) != found:
        found = count(server)
    return found


def test_malformed_framing_never_makes_two_rows_of_one_request(server, entrance):
    """Never more rows than requests, never a failure, never a hang, and the next client is served as ever."""
    tried = 0
    for name, data, most in framings():
        before = count(server)
        answer = answer_to(data, entrance, name)
        rows = settled(server) - before
        assert rows <= most, f"{name}: {rows} rows"
        created = answer.count(b" 201 Created")
        assert rows >= created, f"{name}: {created} were acknowledged, {rows} are there"
        assert not re.search(rb"HTTP/1\.[01] 50[0234] ", answer), name
        tried += 1
    assert send(http.client.HTTPConnection(*entrance, timeout=5), "POST", "/messages", "1")[0] == 201
    print(f"{tried} malformed requests")


CONFLICTING = {
    "CL and TE", "TE and CL, smuggling", "CL 0 and TE", "two lengths", "list of lengths", "TE b','", "TE b'chunked,'", "TE b''", "TE twice",
    "TE with a space", "chunk size b'-1'", "chunk size b'+13'", "chunk size b'0x13'", "chunk size b'1 3'", "chunk size b'g'", "chunk size b''",
    "chunk size b'fffffffffffffffff'", "chunk size b'13\\x00'", "chunk, bare LF", "'HTTP/1.0' chunked", "b'HTTP/1.0' chunked", "obs-fold", "fold first",
    "no colon", "no name", "space in a name", "NUL in a header", "NUL in a name", "bare CR in a header", "no host", "two hosts",
    "target b'http://[::1/messages'", "100-continue and an obs-fold",
}  # fmt: skip


def test_conflicting_framing_is_refused_directly(server):
    """A proxy in front may see it otherwise; RFC 9112, 6.1 and 6.3."""
    address = tuple(server.address.split(":"))
    for name, data, _ in framings():
        if name in CONFLICTING:
            with socket.create_connection(address, 5) as sock:
                sock.sendall(data)
                answer = http.client.HTTPResponse(sock)
                answer.begin()
                assert answer.status == 400, name
                assert answer.headers["Content-Type"] == "application/problem+json"
                answer.read()
                assert sock.recv(100) == b"", f"{name}: the connection stayed open"
            assert count(server) == 0, name


# Sizes


def test_gzip_bombs_cost_little(server, entrance):
    bomb = gzip.compress(bytes(1_000_000_000), 9)[:1_040_000]
    nested = gzip.compress(gzip.compress(bytes(500_000_000)))
    started = time.monotonic()
    for data in (bomb, nested) * 5:
        connection = http.client.HTTPConnection(*entrance, timeout=DEADLINE_S)
        assert send(connection, "POST", "/messages", data, Content_Encoding="gzip")[0] in (400, 413)
    assert time.monotonic() - started < 10
    with open(f"/proc/{server.pid}/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert peak < 120_000, f"{peak} kB"


@pytest.mark.parametrize("size", [3_000_000, 15_000_000])
def test_other_peoples_clients_read_why_a_body_is_too_large(size, server, entrance, tmp_path):
    """The body is sent before they look at the answer, and a connection that is reset takes the answer with it."""
    (tmp_path / "large").write_bytes(b"1" * size)
    host, port = entrance
    url, expected = f"http://{host}:{port}/messages", {"title", "status", "detail"}
    for name, command in outside.commands(tmp_path).items():
        done = subprocess.run(
            [*command, url, tmp_path / "large", f"Bearer {TOKEN}"], capture_output=True, timeout=6 * DEADLINE_S
        )
        status, _, body = done.stdout.partition(b"\n")
        assert (name, status, done.returncode) == (name, b"413", 0), done.stderr
        assert expected <= json.loads(body).keys(), name
    assert send(http.client.HTTPConnection(*entrance, timeout=5), "POST", "/messages", "1")[0] == 201


@pytest.mark.parametrize("framing", ["Content-Length: 1000000000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("token", [TOKEN, "a-guess"])
def test_a_body_without_an_end_is_cut_off(framing, token, server):
    """What is read of a body that is refused has a bound."""
    head = HEAD.replace(TOKEN, token) + framing + "\r\n\r\n"
    sent, piece = 0, b"%x\r\n%b\r\n" % (100_000, b"1" * 100_000)
    with server.growing_at_most(20), socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(head.encode())
            while sent < 200_000_000:
                sock.sendall(piece)
                sent += len(piece)
        print(f"cut off after {sent / 1e6:.0f} MB")
    assert sent < 100_000_000
    assert count(server) == 0


def test_floods_of_headers_are_refused(server, entrance):
    for headers in (
        b"X: y\r\n" * 10_000,
        b"X-Some: y\r\n" * 2500,
        b"Cookie: " + b"a" * 100_000 + b"\r\n",
        b"A" * 50_000 + b": x\r\n",
    ):
        with socket.create_connection(entrance, 5) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
            answer = sock.recv(1000)
            assert answer.split()[1] in (b"400", b"414", b"431"), answer
    assert send(http.client.HTTPConnection(*entrance, timeout=5), "POST", "/messages", "1")[0] == 201


# Tokens


def test_no_guess_at_a_token_comes_in(server, entrance):
    chosen = random.Random(2)
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    guesses = [
        "",
        " ",
        digest,
        TOKEN[:-1],
        TOKEN + "x",
        TOKEN.upper(),
        "null",
        "undefined",
        "' OR 1=1 --",
        "*",
        "%",
        "\xff" * 40,
    ]
    guesses += [secrets.token_urlsafe(32) for _ in range(200)]
    guesses += ["".join(chr(chosen.randint(33, 255)) for _ in range(chosen.randint(1, 200))) for _ in range(200)]
    headers = [f"Bearer {guess}" for guess in guesses] + [guess for guess in guesses if guess.strip()]
    headers += ["Basic " + base64.b64encode(f"tester:{guess}".encode()).decode() for guess in guesses]
    headers += [
        f"Bearer {TOKEN}, Bearer x",
        f"Bearer x, Bearer {TOKEN}",
        f"Digest {TOKEN}",
        f"Bearer  {TOKEN}x",
        "Bearer " + "x" * 7000,
    ]
    connection = http.client.HTTPConnection(*entrance, timeout=DEADLINE_S)
    for header in headers:
        for method, path in (("GET", "/messages"), ("POST", "/messages")):
            connection.request(
                method,
                path,
                b"1" if method == "POST" else None,
                {"Authorization": header, "Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            answer.read()
            assert answer.status in (400, 401), header
    with socket.create_connection(entrance, 5) as sock:  # two headers, one of them right
        sock.sendall(
            f"GET /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
        )
        assert sock.recv(1000).split()[1] in (b"400", b"401")
    assert count(server) == 0


def test_another_streams_grant_and_a_revoked_token_open_nothing(tmp_path):
    path = database(tmp_path)
    (tmp_path / "schema.sql").write_text((tmp_path / "schema.sql").read_text() + stream_sql("secrets"))
    assert run(tmp_path, "migrate").returncode == 0
    server = Server(tmp_path)
    add_tester(path, "narrow", "narrow", "write:messages read:messages")
    time.sleep(1.2)
    for route in ("/secrets", "/secrets/1", "/secrets?after=0"):
        assert send(server.connect(), "GET", route, Authorization="Bearer narrow")[0] == 403
    assert send(server.connect(), "POST", "/secrets", "1", Authorization="Bearer narrow")[0] == 403
    assert send(server.connect(), "POST", "/messages", "1", Authorization="Bearer narrow")[0] == 201
    assert b"secrets" not in send(server.connect(), "GET", "/", Authorization="Bearer narrow")[2]
    assert run(tmp_path, "client", "remove", "narrow").returncode == 0
    time.sleep(1.2)
    for method, route in (("GET", "/"), ("GET", "/messages"), ("POST", "/messages")):
        assert send(server.connect(), method, route, "1", Authorization="Bearer narrow")[0] == 401
    assert server.end() == 0


def test_the_time_of_a_refusal_says_nothing_about_the_token(tmp_path):
    """Tokens that share none, half or nearly all of the right one take equally long to refuse."""
    path = database(tmp_path)
    right = secrets.token_urlsafe(32)
    store = service.Store(service.Database(path), service.read_schema(tmp_path / "schema.sql"))
    store.open()
    add_tester(path, "x", right, "write")
    clients = service.Clients(store, 10**6)
    clients.authenticate({"HTTP_AUTHORIZATION": f"Bearer {right}"})
    guesses = {"none": "~" * len(right), "half": right[:21] + "~" * (len(right) - 21), "nearly all": right[:-1] + "~"}
    times = {name: [] for name in guesses}
    for _ in range(20_000):
        for name, guess in guesses.items():
            started = time.perf_counter_ns()
            with contextlib.suppress(service.Problem):
                clients.authenticate({"HTTP_AUTHORIZATION": f"Bearer {guess}"})
            times[name].append(time.perf_counter_ns() - started)
    store.close()
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(medians)
    assert max(medians.values()) - min(medians.values()) < 0.2 * min(medians.values())


# Tricks

TRICKS = ["' OR '1'='1", '" OR 1=1 --', "1; DROP TABLE messages", "%27%20OR%201", "../clients", "..%2fclients", "clients", "sqlite_schema",
          "messages--", "messages/*", "messages%00", "\u212aey", "NULL", "1e3", "0x10", "９", "1 UNION SELECT token FROM clients", "${x}", "{{7*7}}",
          "%s%n", "\\", "a" * 5000, "messages\t", "MESSAGES", "messages.json", ".", "..", "~", "-1", "9" * 40]  # fmt: skip


def test_tricks_in_names_ids_cursors_filters_and_keys(server, entrance):
    from urllib.parse import quote

    connection = http.client.HTTPConnection(*entrance, timeout=DEADLINE_S)
    assert send(connection, "POST", "/messages", '{"a": 1}')[0] == 201
    digest = service.digest_of(TOKEN).encode()
    for trick in TRICKS:
        text = quote(trick, safe="%/.")
        for method, path in (
            ("GET", f"/{text}"), ("POST", f"/{text}"), ("GET", f"/messages/{text}"), ("GET", f"/messages?after={text}"),
            ("GET", f"/messages?limit={text}"), ("GET", f"/messages?bad={text}"), ("GET", f"/messages?{text}=1"), ("DELETE", f"/messages/{text}"),
        ):  # fmt: skip
            status, _, data = send(connection, method, path, "1" if method == "POST" else None)
            assert status in (200, 400, 404, 405, 414, 301), (method, path, status)
            assert digest not in data
            if status == 200 and "bad=" in path:
                assert b'"messages": []' in data
        key = trick.encode("ascii", "ignore").decode().strip()
        assert send(connection, "POST", "/messages", "1", Idempotency_Key=key)[0] in (201, 400)
    with contextlib.closing(sqlite3.connect(server.database)) as db:
        assert db.execute("SELECT count(*) FROM clients").fetchone() == (1,)


# Random requests


def test_no_request_whatever_is_an_internal_error(server):
    """50,000 requests put together from what is right, nearly right and random."""
    chosen = seed()
    wanted, statuses, lock = scale(50_000, 200_000), {}, threading.Lock()
    paths = [
        "/",
        "/messages",
        "/messages/1",
        "/messages/x",
        "/healthz",
        "/nothing",
        "/messages?after=0",
        "/messages?limit=1&bad=1",
        "/messages?x",
    ]
    bodies = [
        b"",
        b"1",
        b"{}",
        b'{"a":',
        b"[" * 600,
        b"\xff",
        b'"\\ud800"',
        b"1\n2\n",
        b"NaN",
        gzip.compress(b"1"),
        b'{"bad": 1}',
        bytes(50),
    ]
    values = {
        "Content-Type": ["application/json"] * 9 + ["application/x-ndjson", "text/plain", "", ";", "application/json; charset=x", '"', "a/b;c=\"", "/"],
        "Content-Encoding": ["gzip", "identity", "br", "", "gzip, gzip"],
        "Idempotency-Key": ["k", '"k"', "", " ", "k" * 300, '"', "\xe9"],
        "Accept": ["*/*", "application/x-ndjson", "", ";;", "text/html;q=x", "application/json;q=2", ","],
        "Authorization": [f"Bearer {TOKEN}"] * 12 + ["Bearer x", "", "Basic", "Basic =", f"Basic {TOKEN}"],
        "Expect": ["100-continue", "x"], "Range": ["bytes=0-1"], "If-Match": ["*"], "X-Forwarded-For": ["1.2.3.4"], "Forwarded": ["for=x"],
        "X-HTTP-Method-Override": ["DELETE"], "Host": ["x", "", "a b", "[::1"], "Cookie": ["a=b; c", "\xff"],
    }  # fmt: skip

    def fuzz(own, number):
        connection = server.connect()
        for _ in range(number):
            method = own.choice(["GET", "POST", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "BREW"])
            path = own.choice(paths)
            if own.random() < 0.15:
                path += "".join(own.choice("%/?&=;.'\"\\~+*,:@!$()abc019") for _ in range(own.randint(1, 12)))
            body = own.choice(bodies)
            if own.random() < 0.2:
                body = own.randbytes(own.randint(0, 60))
            headers = {
                name: own.choice(some)
                for name, some in values.items()
                if own.random() < (0.97 if name in ("Authorization", "Content-Type") else 0.15)
            }
            headers.pop("Expect", None) if own.random() < 0.9 else None
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                data = answer.read()
            except (OSError, http.client.HTTPException, UnicodeError):
                connection.close()
                connection = server.connect()
                continue
            with lock:
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
            assert answer.status < 500 or answer.status == 501, (method, path, headers, body)
            if answer.status >= 400 and method != "HEAD":
                assert json.loads(data)["status"] == answer.status

    threads = [threading.Thread(target=fuzz, args=(random.Random(chosen.random()), wanted // 4)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(dict(sorted(statuses.items())))
    assert sum(statuses.values()) > 0.9 * wanted
    assert not [status for status in statuses if status >= 500 and status != 501]
    Ledger(server.connect).must_answer()
