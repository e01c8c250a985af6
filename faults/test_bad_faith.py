"""What strangers found: requests that no client sends by mistake, and what must not come of them."""

import contextlib
import gzip
import http.client
import json
import re
import select
import socket
import sqlite3
import struct
import time
from pathlib import Path

import pytest
from common import Server, database

import service
from test_service import DEADLINE_S, TOKEN, add_tester, run, send, stream_sql

HEAD = f"POST /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"


def connect(server):
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), DEADLINE_S)


def all_of(sock):
    """Everything that comes until the server closes for sending."""
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


def rows(server):
    with contextlib.closing(sqlite3.connect(server.database)) as db:
        return [row[0] for row in db.execute("SELECT body FROM messages ORDER BY id")]


def cpu_s(pid):
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / 100


def require_idle(server):
    """It takes less than a quarter of a second of CPU in a second, and no connection is told of for ever."""
    before = cpu_s(server.pid)
    time.sleep(1)
    assert cpu_s(server.pid) - before < 0.25


def test_urgent_data_is_left_out_and_costs_nothing(server, tmp_path):
    """It has no place in HTTP, and a loop that is told of it would be told for ever."""
    with connect(server) as sock:
        sock.send(b"!", socket.MSG_OOB)
        require_idle(server)
        sock.sendall(HEAD.encode() + b"Connection: close\r\nContent-Length: 1\r\n\r\n1")
        assert all_of(sock).startswith(b"HTTP/1.1 201 ")
    assert (tmp_path / "log").stat().st_size < 10_000


@pytest.mark.parametrize("ends", ["open", "closed for sending", "reset"])
@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_who_sends_on_and_does_not_read_costs_nothing(connection, ends, server):
    """An answer that cannot be sent waits beside input that nobody wants: the loop sleeps, whichever comes."""
    for _ in range(20):
        assert (
            send(http.client.HTTPConnection(server.address), "POST", "/messages", json.dumps("x" * 900_000))[0] == 201
        )
    with connect(server) as sock:
        get = f"GET /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: {connection}\r\n\r\n"
        sock.sendall(get.encode())
        time.sleep(0.5)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(1000):
                sock.send(b"x" * 10_000)
        if ends == "closed for sending":
            sock.shutdown(socket.SHUT_WR)
        elif ends == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        require_idle(server)
    require_idle(server)


def test_a_client_that_leaves_between_two_refusals_costs_nobody_a_turn(server, tmp_path):
    """The second answer cannot be sent, so the connection is closed while the first one is being sent."""
    refused = b"POST /messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    for _ in range(200):
        with connect(server) as sock:
            sock.sendall(refused + b"garbage\r\n\r\n")
    assert send(http.client.HTTPConnection(server.address, timeout=DEADLINE_S), "POST", "/messages", "1")[0] == 201
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_trailers_have_a_limit(server):
    with connect(server) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(
            HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n1\r\n1\r\n0\r\n" + b"a:\r\n" * 10_000 + b"\r\n"
        )
        assert all_of(sock).startswith(b"HTTP/1.1 431 ")
    assert rows(server) == []


@pytest.mark.parametrize("method", ["post", "Post", "get", "head"])
def test_methods_are_case_sensitive(method, server):
    with connect(server) as sock:
        sock.sendall(HEAD.replace("POST", method).encode() + b"Connection: close\r\nContent-Length: 1\r\n\r\n1")
        assert all_of(sock).startswith(b"HTTP/1.1 501 ")
    assert rows(server) == []


def test_what_stands_behind_a_refused_request_is_never_run(server):
    """All come in one piece. The loop may still be reading when the refusal has been answered, above all when it reads
    the clients again, once a second.
    """
    behind = HEAD.encode() + b"Content-Length: 8\r\n\r\n" + b'"behind"'
    for _ in range(8):
        time.sleep(service.CLIENTS_REFRESH_S + 0.1)
        for _ in range(20):
            with connect(server) as sock:
                sock.sendall(b"BAD\r\n\r\n" + behind)
                assert all_of(sock).count(b"HTTP/1.1 ") == 1
    assert rows(server) == []


@pytest.mark.parametrize("kind", ["gzip that is refused", "messages"])
def test_pipelined_posts_do_not_hold_up_anybody(kind, server):
    """Kilobytes that cost seconds: the loop goes on reading and accepting between them."""
    if kind == "messages":
        request = HEAD.encode() + b"Content-Length: 1\r\n\r\n1"
        connections, each = 200, 50
    else:
        packed = gzip.compress(b"[" + b"[]," * 349_000)  # 1 KB
        request = HEAD.encode() + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(packed), packed)
        connections, each = 20, 6
    socks = [connect(server) for _ in range(connections)]
    for sock in socks:
        sock.sendall(request * each)
    waited = []
    for _ in range(5):
        started = time.monotonic()
        assert (
            send(http.client.HTTPConnection(server.address, timeout=DEADLINE_S), "GET", "/messages?limit=1")[0] == 200
        )
        waited.append(time.monotonic() - started)
    for sock in socks:
        sock.close()
    print(f"{kind}: GETs took {max(waited):.2f} s at most")
    assert max(waited) < 2


def test_a_removed_token_does_not_finish_what_it_has_begun(server):
    """The head of the request came while the token was valid."""
    with connect(server) as sock:
        sock.sendall(HEAD.encode() + b"Content-Length: 3\r\n\r\n12")
        time.sleep(0.2)
        with contextlib.closing(sqlite3.connect(server.database, isolation_level=None)) as db:
            db.execute("DELETE FROM clients")
        time.sleep(service.CLIENTS_REFRESH_S + 0.3)
        sock.sendall(b"3")
        assert sock.recv(1000).startswith(b"HTTP/1.1 401 ")
    assert rows(server) == []


def test_the_time_to_wait_for_the_lock_begins_when_a_message_is_there(server, monkeypatch):
    """A body that took longer to come than a message may wait is not refused for that."""
    with connect(server) as sock:
        sock.sendall(HEAD.encode() + b"Content-Length: 3\r\n\r\n1")
        time.sleep(service.BUSY_TIMEOUT_S - 4)
        sock.sendall(b"2")
        time.sleep(5)
        with contextlib.closing(sqlite3.connect(server.database, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            sock.sendall(b"3")
            time.sleep(0.5)
            db.execute("ROLLBACK")
        assert sock.recv(1000).startswith(b"HTTP/1.1 201 ")


def test_a_thousand_refusals_a_second_do_not_fill_the_log(server, tmp_path):
    """And what comes from outside, or stands in the table by hand, breaks no line of it."""
    add_tester(tmp_path / "inlet.db", "a\nb", "odd")
    before = len(server.log.splitlines())
    request = b"GET /messages?%s=1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer odd\r\n%s\r\n"
    with connect(server) as sock:
        sock.sendall(request % (b"%0a%1b[31m", b"") * 1999 + request % (b"x", b"Connection: close\r\n"))
        assert all_of(sock).count(b"HTTP/1.1 400 ") == 2000
    time.sleep(1.1)
    with contextlib.closing(server.connect()) as connection:
        send(connection, "POST", "/messages", "no")
    lines = [line for line in server.log.splitlines()[before:] if " INFO " in line]
    counted = sum(int(number) for line in lines for number in re.findall(r"and (\d+) more such lines: 400", line))
    named = [line for line in lines if " to 'a\\nb' at '/messages': " in line]
    assert len(named) + counted == 2000
    assert len(named) < 200
    assert all(line[:3] == "202" and line.isprintable() for line in server.log.splitlines())


@pytest.mark.parametrize(("version", "more"), [("1.0", ""), ("1.1", "Connection: close\r\n"), ("1.1", "")])
def test_a_client_that_has_closed_for_sending_gets_its_whole_answer(version, more, server):
    with contextlib.closing(server.connect()) as connection:
        for _ in range(5):
            assert send(connection, "POST", "/messages", b'"' + b"x" * 1_000_000 + b'"')[0] == 201
    with connect(server) as sock:
        head = f"GET /messages HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{more}\r\n"
        sock.sendall(head.encode())
        sock.shutdown(socket.SHUT_WR)
        time.sleep(0.5)
        head, _, body = all_of(sock).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head.decode()
    assert len(body) > 4_000_000


@pytest.mark.parametrize(
    "request_", ["HEAD / HTTP/1.1\r\n\r\n", "HEAD / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: x\r\n\r\n"]
)
def test_an_answer_to_head_has_no_content(request_, server):
    with connect(server) as sock:
        sock.sendall(request_.encode())
        assert all_of(sock).endswith(b"\r\n\r\n")


def test_a_body_that_nobody_asked_for_is_left_out_and_never_waited_for(server):
    """One that has come whole is no request. Where it has not, the connection ends with the answer."""
    get = b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\nhello"
    with connect(server) as sock:
        sock.sendall(get % 5 + get % 5 + get % 6)
        answers = all_of(sock)
    assert answers.count(b"HTTP/1.1 ") == answers.count(b"HTTP/1.1 200 OK") == 3


def test_small_bodies_that_unpack_to_large_ones_have_a_bound_while_they_wait(server, tmp_path):
    large = '"\U0001f600'.encode() + b"a" * 1_048_500 + b'"'  # four bytes a character, in Python
    packed = gzip.compress(large)
    head = HEAD.encode() + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    with contextlib.ExitStack() as stack, server.growing_at_most(300):
        db = stack.enter_context(contextlib.closing(sqlite3.connect(tmp_path / "inlet.db", isolation_level=None)))
        db.execute("BEGIN IMMEDIATE")
        sockets = [stack.enter_context(connect(server)) for _ in range(200)]
        for sock in sockets:
            sock.sendall(head + packed)
        refused = sum(sock.recv(12) == b"HTTP/1.1 503" for sock in sockets[-100:])
        db.execute("ROLLBACK")
    assert refused == 100
    assert send(server.connect(), "POST", "/messages", large)[0] == 201


def test_messages_that_take_long_to_check_do_not_hold_up_small_ones(server):
    packed = gzip.compress(b"[" + b"[1]," * 260_000 + b"1]")
    head = HEAD.encode() + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(connect(server)).sendall(head + packed)
        time.sleep(0.3)
        started = time.monotonic()
        assert send(server.connect(), "POST", "/messages", "1")[0] == 201
        assert time.monotonic() - started < 5  # 60 of them take 20 s


def test_reads_that_nobody_waits_for_are_not_run_and_healthz_waits_for_none(tmp_path):
    view = "CREATE VIEW slow AS WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {}) SELECT sum(i) FROM n;"
    database(tmp_path, stream_sql("messages") + view.format(3_000_000))
    with contextlib.closing(Server(tmp_path)) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                sock = stack.enter_context(connect(server))
                sock.sendall(f"GET /slow HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
            time.sleep(0.3)
            started = time.monotonic()
            assert send(server.connect(), "GET", "/healthz")[0] == 200
            assert send(server.connect(), "GET", "/metrics")[0] == 200
            assert time.monotonic() - started < 3
        started = time.monotonic()  # all have gone now
        assert send(server.connect(), "GET", "/messages")[0] == 200
        assert time.monotonic() - started < 15  # 100 of them take 40 s


def test_uploads_that_are_aborted_leave_nothing(server):
    head = HEAD.encode() + b"Content-Length: 1048576\r\n\r\n" + b"a" * 1_048_500
    with server.growing_at_most(200):
        for _ in range(8):
            with contextlib.ExitStack() as stack:
                for _ in range(60):
                    stack.enter_context(connect(server)).sendall(head)
                for _ in range(400):  # so that the garbage collector takes the others for old
                    stack.enter_context(connect(server)).sendall(b"POST / HTTP/1.1\r\nHost: x\r\n")
                time.sleep(0.3)
            time.sleep(0.3)


def test_who_only_pretends_to_sign_takes_no_room_from_those_who_are_known(server, tmp_path):
    assert run(tmp_path, "client", "add", "shop", "--signs", "github").returncode == 0
    unknown = "POST /messages HTTP/1.1\r\nHost: x\r\nX-Hub-Signature-256: sha256=0\r\nContent-Length: 1048576\r\n\r\n"
    time.sleep(1)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(connect(server)) for _ in range(80)]
        for sock in sockets:
            sock.sendall(unknown.encode() + b"a" * 1_048_500)
        server.wait_until_idle()
        assert send(server.connect(), "POST", "/messages", json.dumps("x" * 500_000))[0] == 201
        readable, _, _ = select.select(sockets, [], [], 0)
        assert len(readable) >= 10  # the limit is 64 MiB
        assert {sock.recv(12) for sock in readable} == {b"HTTP/1.1 503"}
