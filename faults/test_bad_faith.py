"""What strangers found: requests that no client sends by mistake, and what must not come of them."""

import contextlib
import gzip
import http.client
import socket
import sqlite3
import time
from pathlib import Path

import pytest

import service
from test_service import DEADLINE_S, TOKEN, add_tester, send

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


def test_urgent_data_closes_the_connection_and_costs_nothing(server, tmp_path):
    """poll() reports it for ever, and nobody reads it."""
    with connect(server) as sock:
        sock.send(b"!", socket.MSG_OOB)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    before = cpu_s(server.pid)
    time.sleep(1)
    assert cpu_s(server.pid) - before < 0.5
    assert (tmp_path / "log").stat().st_size < 10_000


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
    counted = sum(int(line.split()[-3]) for line in lines if line.endswith(" more refusals"))
    named = [line for line in lines if " to 'a\\nb' at /messages: " in line]
    assert len(named) + counted == 2000
    assert len(named) < 200
    assert all(line[:3] == "202" and line.isprintable() for line in server.log.splitlines())
