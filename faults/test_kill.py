"""kill -9, restarts, signals and cut connections, under load."""

import contextlib
import signal
import socket
import time

from common import Ledger, Server, database, scale, seed

from test_service import DEADLINE_S, TOKEN, send


def test_kill_9_at_random_moments_under_load(tmp_path):
    """Two processes on one database; each round kills one of them, or both at once."""
    chosen, rounds = seed(), scale(80, 200)
    path = database(tmp_path)
    folders = [tmp_path / "a", tmp_path / "b"]
    servers = []
    for folder in folders:
        folder.mkdir()
        (folder / "schema.sql").write_text((tmp_path / "schema.sql").read_text())
        servers.append(Server(folder, "--database", str(path)))
    ledger = Ledger(lambda: chosen.choice(servers).connect(), chosen=chosen)
    with ledger.sending(6):
        for _ in range(rounds):
            time.sleep(chosen.uniform(0.01, 0.25))
            victims = chosen.choice([servers[:1], servers[1:], servers])
            for server in victims:
                server.kill()
            for server in victims:
                server.start()
    ledger.must_answer()
    for server in servers:
        assert server.end() == 0
    count = ledger.check(path)
    print(f"{rounds} rounds, {len(ledger.acknowledged)} acknowledged, {len(ledger.unknown)} unknown, {count} stored")
    assert len(ledger.acknowledged) > 20 * rounds


def test_restarts_under_load_lose_no_answer(tmp_path):
    """SIGTERM ends it with 0 in time; requests in flight get their answer or nothing, never a false one."""
    chosen = seed()
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), chosen=chosen)
    with ledger.sending(8):
        for round_ in range(10):
            time.sleep(chosen.uniform(0.1, 0.5))
            started = time.monotonic()
            server.signal(signal.SIGTERM)
            if round_ % 2:
                time.sleep(0.01)
                with contextlib.suppress(ProcessLookupError):
                    server.signal(signal.SIGTERM)  # and once more, which changes nothing
            assert server.process.wait(DEADLINE_S) == 0
            assert time.monotonic() - started < 8
            server.process.stdout.close()
            server.start()
    ledger.must_answer()
    server.end()
    print(f"{ledger.check(path)} stored, {len(ledger.unknown)} unknown")


def test_a_connection_that_is_cut_anywhere_gets_its_first_result_later(tmp_path):
    """The request is cut at every byte; then the whole of it is sent, and the client hangs up before the answer."""
    path = database(tmp_path)
    server = Server(tmp_path)
    body = b'{"cut": true}'
    request = (
        f"POST /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nIdempotency-Key: cut\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    address = tuple(server.address.split(":"))
    for length in range(0, len(request), 3):
        with socket.create_connection(address, DEADLINE_S) as sock:
            sock.sendall(request[:length])
    ledger = Ledger(server.connect)
    assert ledger.check(path) == 0
    for linger in (True, False):
        sock = socket.create_connection(address, DEADLINE_S)
        if linger:  # an RST in place of a FIN
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.sendall(request)
        sock.close()
    time.sleep(0.5)
    answers = [send(server.connect(), "POST", "/messages", body, Idempotency_Key="cut") for _ in range(3)]
    assert {status for status, _, _ in answers} == {201}
    assert len({data for _, _, data in answers}) == 1
    ledger.acknowledged[1] = body
    assert ledger.check(path) == 1
    assert server.end() == 0
