"""Many clients at once that do what costs most: the others wait for a moment at most, and memory has a bound."""

import contextlib
import gzip
import http.client
import json
import signal
import socket
import sqlite3
import threading
import time

import pytest
from common import Ledger, Server, at_once, database, failing, timed, wait_until
from deployed import free_port

from test_service import DEADLINE_S, TOKEN, send, stream_sql

POST = b"POST /messages HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
AUTHORIZED = b"Authorization: Bearer %b\r\n" % TOKEN.encode()
PROMPTLY_S = 1.0  # 20 ms on a machine that does nothing else


@contextlib.contextmanager
def serving(folder, *arguments, schema=None, **more):
    """A server with a fresh database; it has to end well, and without a word of trouble."""
    database(folder, *([schema] if schema else []))
    server = Server(folder, *arguments, **more)
    try:
        Ledger(server.connect).must_answer()
        yield server
        assert server.end() == 0
    finally:
        server.kill()
    log = (folder / "log").read_text()
    assert "Traceback" not in log
    assert len(log) < 100_000


@contextlib.contextmanager
def connections(server, number, receive_buffer=None):
    """Sockets to a server. A small receive_buffer, in bytes, is soon full if the answer is not read."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(number):
            sock = stack.enter_context(socket.socket())
            if receive_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.settimeout(DEADLINE_S)
            sock.connect(("127.0.0.1", server.port))
            found.append(sock)
        yield found


def answer_on(sock) -> tuple[int, bytes]:
    """(status, body) of the answer that comes next."""
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    return answer.status, answer.read()


def ask(server, method, path, body=None, **headers):
    """One request on a connection of its own: (status, headers, body)."""
    with contextlib.closing(server.connect()) as connection:
        return send(connection, method, path, body, **headers)


# Memory

LARGE = 2_500_000  # bytes
UNFINISHED = LARGE - 500_000
FRAMED = {
    "length": (b"Content-Length: %d\r\n\r\n" % LARGE, b""),
    "chunked": (b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % LARGE, b"\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("framing", FRAMED)
@pytest.mark.parametrize("token", [b"", b"Authorization: Bearer a-guess\r\n"])
def test_bodies_of_strangers_are_not_kept(framing, token, tmp_path):
    start, end = FRAMED[framing]
    with (
        serving(tmp_path, "--max-body", "4000000") as server,
        connections(server, 60) as strangers,
        server.growing_at_most(20),
    ):
        for sock in strangers:
            sock.sendall(POST + token + start + b"1" * UNFINISHED)
        server.wait_until_idle()
        assert timed(lambda: ask(server, "POST", "/messages", "1"))[0][0] == 201
        for sock in strangers:
            sock.sendall(b"1" * (LARGE - UNFINISHED) + end)
        assert {answer_on(sock)[0] for sock in strangers} == {401}


@pytest.mark.parametrize("framing", FRAMED)
def test_what_is_kept_of_unfinished_bodies_has_a_bound_in_all(framing, tmp_path):
    start, end = FRAMED[framing]
    with serving(tmp_path, "--max-body", "4000000") as server:
        with connections(server, 80) as clients, server.growing_at_most(160):  # all of them sent 160 MB
            for sock in clients:
                sock.sendall(POST + AUTHORIZED + start + b"1" * UNFINISHED)
            server.wait_until_idle()
            (status, _, _), seconds = timed(lambda: ask(server, "POST", "/messages", "1"))
            assert (status, seconds < PROMPTLY_S) == (201, True), seconds
            server.signal(signal.SIGSTOP)  # so that all of them grow in one turn of its loop
            for sock in clients:
                sock.sendall(b"1" * 50_000)
            server.signal(signal.SIGCONT)
            for sock in clients:
                sock.sendall(b"1" * (LARGE - UNFINISHED - 50_000) + end)
            statuses = [answer_on(sock)[0] for sock in clients]
        print(f"{statuses.count(201)} of {len(statuses)} were taken")
        assert set(statuses) == {201, 503}
        assert statuses.count(201) >= 20  # whoever is refused makes room for the others at once
        assert ask(server, "POST", "/messages", b"1" * LARGE)[0] == 201  # there is room again


def test_clients_that_never_read_their_pages_cost_bounded_memory_and_no_files(tmp_path):
    """150 of them, and 256 descriptors."""
    with serving(tmp_path, wrapper=("prlimit", "--nofile=256:256")) as server:
        for _ in range(9):
            assert ask(server, "POST", "/messages", json.dumps("x" * 500_000))[0] == 201
        with connections(server, 150, receive_buffer=4096) as clients, server.growing_at_most(250):
            for sock in clients:
                sock.sendall(b"GET /messages HTTP/1.1\r\nHost: x\r\n%b\r\n" % AUTHORIZED)
            server.wait_until_idle()
            for method, path, body in (
                ("POST", "/messages", "1"),
                ("GET", "/healthz", None),
                ("GET", "/messages/1", None),
            ):
                (status, _, data), seconds = timed(lambda: ask(server, method, path, body))
                assert status in (200, 201), (path, data)
                assert seconds < PROMPTLY_S, (path, seconds)
            assert not [
                file
                for file in server.open_files()
                if file.endswith("(deleted)") or "/tmp/" in file.replace(str(tmp_path), "")
            ]
        assert ask(server, "GET", "/messages")[0] == 200


def test_a_page_that_is_not_read_holds_no_thread(tmp_path):
    """A message over 16 MiB, asked for twice on each of more connections than there are threads."""
    with serving(tmp_path, "--max-body", "30000000", "--threads", "1") as server:
        status, headers, _ = ask(server, "POST", "/messages", json.dumps("x" * 25_000_000))
        assert status == 201
        with connections(server, 2, receive_buffer=4096) as clients:
            for path, sock in zip((headers["Location"], "/messages?limit=1000"), clients, strict=True):
                sock.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (path.encode(), AUTHORIZED) * 2)
            server.wait_until_idle()
            for path in ("/messages?limit=1", "/", "/healthz"):
                (status, _, data), seconds = timed(lambda: ask(server, "GET", path))
                assert (status, seconds < PROMPTLY_S) == (200, True), (path, seconds, data)


# Time


def test_refused_messages_keep_no_valid_one_waiting(tmp_path):
    """About 1 KB of gzip, which unpacks to nearly 1 MiB: a string without an end."""
    attack = gzip.compress(b'"' + b"x" * 1_040_000)
    assert len(attack) < 1200
    with serving(tmp_path) as server:

        def valid():
            with contextlib.closing(server.connect()) as connection:
                found = [timed(lambda: send(connection, "POST", "/messages", "1")) for _ in range(20)]
            assert {status for (status, _, _), _ in found} == {201}
            return sorted(seconds for _, seconds in found)

        stop, refused = threading.Event(), []

        def attacker():
            with contextlib.closing(server.connect()) as connection:
                while not stop.is_set():
                    refused.append(send(connection, "POST", "/messages", attack, Content_Encoding="gzip")[0])

        alone = valid()
        attackers = [threading.Thread(target=attacker) for _ in range(16)]
        for thread in attackers:
            thread.start()
        try:
            wait_until(lambda: len(refused) > 50, "nobody is refused")
            beside = valid()
            count = len(refused)
        finally:
            stop.set()
            for thread in attackers:
                thread.join()
        print(f"alone {alone[10]:.3f} s, beside {count} refused ones {beside[10]:.3f} s, at most {beside[-1]:.3f} s")
        assert set(refused) == {400}
        assert beside[-1] < PROMPTLY_S


def test_everybody_has_a_503_within_ten_seconds_of_arriving_at_a_locked_database(tmp_path):
    """300 clients, in three waves."""
    with serving(tmp_path) as server:

        def client(wave):
            time.sleep(3 * wave)
            return timed(lambda: ask(server, "POST", "/messages", "1"))

        with contextlib.closing(sqlite3.connect(server.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            found = at_once(*[lambda wave=n % 3: client(wave) for n in range(300)])
            assert ask(server, "GET", "/messages")[0] == 200
            other.execute("ROLLBACK")
        assert {(status, headers["Retry-After"]) for (status, headers, _), _ in found} == {(503, "2")}
        seconds = sorted(seconds for _, seconds in found)
        print(f"{seconds[0]:.1f} to {seconds[-1]:.1f} s")
        assert seconds[-1] < 12
        assert seconds[0] > 3, "some were given up too soon"
        Ledger(server.connect).must_answer(2)


# Each row costs about 20 µs of plain computing; what is the same for all rows, SQLite would compute once.
SLOW = stream_sql(
    "messages", ", slow INTEGER AS (instr(printf('%.*c', 2000, 'x'), printf('%.*c', 1000, 'x') || (body ->> 'n')))"
)
ROWS = """
    WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 1500000)
    INSERT INTO messages (received_at, client, body)
    SELECT '2026-11-22T10:00:00.123Z', 'c', '{"n": ' || n || '}' FROM c"""


def test_a_filter_without_an_index_ends_after_ten_seconds_or_with_its_client(tmp_path):
    """A large table; as many clients as there are threads."""
    with serving(tmp_path, schema=SLOW) as server:
        with contextlib.closing(sqlite3.connect(server.database)) as db, db:
            db.execute(ROWS)
        with connections(server, 8) as clients:
            for sock in clients:
                sock.sendall(b"GET /messages?slow=1 HTTP/1.1\r\nHost: x\r\n%b\r\n" % AUTHORIZED)
            busy = server.processor_time()
            wait_until(lambda: server.processor_time() > busy + 20, "nobody reads")
        for path in ("/messages?limit=1", "/messages/1500000", "/healthz"):  # all of them have hung up
            (status, _, data), seconds = timed(lambda: ask(server, "GET", path))
            assert (status, seconds < 3 * PROMPTLY_S) == (200, True), (path, seconds, data)
        (status, headers, data), seconds = timed(lambda: ask(server, "GET", "/messages?slow=1"))
        detail = json.loads(data)["detail"]
        print(f"{seconds:.1f} s: {detail}")
        assert (status, headers["Retry-After"]) == (503, "2")
        assert 9 < seconds < 13
        assert "slow" in detail


def test_many_slow_reads_hold_up_nothing_else_and_none_waits_for_ever(tmp_path):
    rows = ROWS.replace("1500000", "150000")
    assert rows != ROWS
    with serving(tmp_path, schema=f"{SLOW}CREATE VIEW few AS SELECT * FROM messages WHERE slow = 1;") as server:
        with contextlib.closing(sqlite3.connect(server.database)) as db, db:
            db.execute(rows)
        with connections(server, 200) as clients, connections(server, 200) as asking:
            for sock in clients:
                sock.sendall(b"GET /messages?slow=1 HTTP/1.1\r\nHost: x\r\n%b\r\n" % AUTHORIZED)
            for sock in asking:  # which looks for the last id of each view
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n%b\r\n" % AUTHORIZED)
            for path in ("/", "/openapi.json", "/messages?limit=1&since=2026-01-01", "/nothing"):
                (status, _, data), seconds = timed(lambda path=path: ask(server, "GET", path))
                assert (status, seconds < PROMPTLY_S) == (404 if path == "/nothing" else 200, True), (
                    path,
                    seconds,
                    data,
                )
            (status, _, data), seconds = timed(lambda: ask(server, "GET", "/messages?slow=1&limit=1"))
            print(f"{seconds:.1f} s: {status}")
            assert seconds < 22  # ten in the queue, and ten for its own read


def test_who_finds_no_room_waits_until_somebody_leaves(tmp_path):
    """With 256 descriptors there is room for 96 connections or so. The others wait in the backlog, and cost nothing."""
    with serving(tmp_path, "--threads", "32", wrapper=("prlimit", "--nofile=256:256")) as server:
        with connections(server, 120) as clients:
            server.wait_until_idle()
            before = server.processor_time()
            time.sleep(1)
            assert server.processor_time() - before < 25
            first, last = clients[0], clients[-1]
            for sock in (first, last):
                sock.sendall(POST + AUTHORIZED + b"Content-Length: 1\r\n\r\n1")
            assert answer_on(first)[0] == 201
            last.settimeout(0.5)
            with pytest.raises(TimeoutError):
                last.recv(1)
            for sock in clients[:40]:
                sock.close()
            last.settimeout(DEADLINE_S)
            assert answer_on(last)[0] == 201
        assert "connections are open" in (tmp_path / "log").read_text()
        assert ask(server, "POST", "/messages", "1")[0] == 201


def test_deaf_clients_that_send_a_byte_now_and_then_go_before_a_slow_reader(tmp_path):
    """What they send is discarded, so it does not count as a sign of life. Together they hold more than UNSENT_BYTES."""
    with serving(tmp_path, "--max-body", "40000000") as server:
        path = ask(server, "POST", "/messages", b'"%b"' % (b"x" * 30_000_000))[1]["Location"].encode()
        get = b"GET %b HTTP/1.1\r\nHost: x\r\n%b" % (path, AUTHORIZED)
        with connections(server, 3, receive_buffer=4096) as deaf, connections(server, 1, receive_buffer=65536) as ours:
            for sock in deaf[:2]:
                sock.sendall(get + b"Connection: close\r\n\r\n")
            time.sleep(1)
            (reader,) = ours
            reader.sendall(get + b"\r\n")
            received = 0
            for step in range(30):
                if step == 10:
                    deaf[2].sendall(get + b"Connection: close\r\n\r\n")
                received += len(reader.recv(50_000))
                for _ in range(10):
                    time.sleep(0.01)
                    for sock in deaf[:2]:
                        with contextlib.suppress(ConnectionError):
                            sock.send(b"x")
            while received < 30_000_000:
                data = reader.recv(2**20)
                assert data, f"the reader was closed after {received:,} bytes"
                received += len(data)


def test_crowds_that_ask_whether_it_is_ready_share_one_write(tmp_path):
    """Each sync takes 1.2 s, so what one of them has found is older than a second when the next one is looked at."""
    with serving(tmp_path) as server, failing(server, "fdatasync:delay_enter=1200000"):
        asked = [lambda: timed(lambda: ask(server, "GET", "/healthz"))] * 10
        found = at_once(*asked)
        assert {answer[0] for answer, _ in found} == {200}
        assert max(seconds for _, seconds in found) < 6


def test_a_server_with_two_addresses_ends_well_while_clients_come(tmp_path):
    """A new connection can get the descriptor of the listener that was closed; each close takes 0.3 s here.

    A name has two addresses in the /etc/hosts that only the server sees.
    """
    database(tmp_path)
    port = free_port()
    (tmp_path / "hosts").write_text("127.0.0.1 two.example\n127.0.0.2 two.example\n")
    its_hosts = ("unshare", "--mount", "sh", "-ec", 'mount --bind "$0" /etc/hosts; exec "$@"', str(tmp_path / "hosts"))
    server = Server(tmp_path, "--listen", f"two.example:{port}", wrapper=its_hosts)
    for host in ("127.0.0.1", "127.0.0.2"):
        socket.create_connection((host, port), DEADLINE_S).close()
    stop = threading.Event()

    def come():
        kept = []
        while not stop.is_set():
            for host in ("127.0.0.1", "127.0.0.2"):
                with contextlib.suppress(OSError):
                    kept.append(socket.create_connection((host, port), 1))
            time.sleep(0.1)  # at its end, it closes each of them

    thread = threading.Thread(target=come)
    try:
        thread.start()
        with failing(server, "close:delay_exit=300000"):
            server.signal(signal.SIGTERM)
            assert server.process.wait(DEADLINE_S) == 0
    finally:
        stop.set()
        thread.join()
        server.kill()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("name", ["loop", "waitress"])
def test_clients_that_do_not_read_their_pages_stop_no_writer(name, tmp_path):
    """All threads of waitress waited for 100 clients with pages of 4 MB that they never read."""
    database(tmp_path)
    server = Server(tmp_path, "--server", name)
    get = b"GET /messages HTTP/1.1\r\nHost: x\r\n%b\r\n" % AUTHORIZED
    for _ in range(5):
        assert ask(server, "POST", "/messages", json.dumps("x" * 1_000_000))[0] == 201
    with connections(server, 100) as deaf:
        for sock in deaf:
            sock.sendall(get * 8)
        time.sleep(5)  # until all have what fits
        for _ in range(5):
            for method, path, status in (("POST", "/messages", 201), ("GET", "/healthz", 200)):
                answer, taken_s = timed(lambda method=method, path=path: ask(server, method, path, "1"))
                assert answer[0] == status
                assert taken_s < 8
    server.kill()
