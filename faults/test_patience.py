"""What takes seconds, because somebody has to wait: of the loop, of /healthz and of migrate."""

import contextlib
import json
import subprocess
import time

import pytest

from test_service import (
    FROM_TESTER,
    HERE,
    MANY,
    POST,
    READING,
    SCHEMA,
    Process,
    another_process_has_its_turn,
    another_program_writes,
    append,
    change,
    eventually,
    open_store,
    rows,
    run,
    schemas,
    send,
    sending,
    server_with,
    slow_store,
    start,
    store,
    stream_sql,
    within,
)

__all__ = ["open_store", "schemas", "server_with", "store"]


def test_clients_that_do_not_read_and_idle_ones_stop_nobody(server_with, store):
    """Large answers pile up for clients that never read; there is one thread for all that read."""
    for size in [1_000_000] * 5 + [40_000_000]:
        append(store, "messages", json.dumps("x" * size))
    ask = b"GET /messages?after=%d HTTP/1.1\r\n" + FROM_TESTER + b"\r\n"
    server = server_with("--threads", "1")
    with contextlib.ExitStack() as stack:
        sent = [ask % 5 * 2, ask % 0 * 4, *[b""] * 300]
        large, deaf, *_ = [stack.enter_context(server.socket(data)) for data in sent]
        for _ in range(10):
            with within(3):
                assert send(server.connect(), "GET", "/readings")[0] == 200
                assert send(server.connect(), "POST", "/readings", READING)[0] == 201
        for sock, left in ((deaf, 4 * 5_000_000), (large, 80_000_000)):  # and who reads at last gets everything
            while left > 0:
                data = sock.recv(2**20)
                assert data
                left -= len(data)


def test_readers_that_were_abandoned_by_their_clients_stop(server_with, open_store):
    slow_store(open_store, 4_000)
    server = server_with("--threads", "1")
    assert send(server.connect(), "GET", "/messages")[0] == 200
    for late in (b"", b"\r"):  # one alone would take READ_TIMEOUT_S
        with server.socket(b"GET /messages?slow=0 HTTP/1.1\r\n" + FROM_TESTER + b"\r\n") as sock:
            time.sleep(0.02)
            sock.sendall(late)
    with within(10):  # this waits for the same thread, and has no row to look at
        assert send(server.connect(), "GET", "/messages?slow=0&after=4000")[0] == 200


class Impatient(Process):
    """A server that waits for a second at its end."""

    program = (
        "-c",
        f"import sys; sys.path[0] = {str(HERE)!r}; import service; service.extra('loop').DRAIN_S = 1; service.main()",
    )


def test_it_ends_in_time_while_bodies_stall_and_clients_go_on_sending(tmp_path, store):
    with contextlib.closing(Impatient(tmp_path, "--schema", str(tmp_path / "schema.sql"))) as server:
        stalled = server.socket(POST + b"Content-Length: 9\r\n\r\nhalf")
        with stalled, sending(server, "1", count=8) as answers, within(10):
            eventually(lambda: len(answers) > 50)
            assert server.terminate() == 0


def test_one_byte_holds_up_no_end(store, server_with):
    server = server_with()
    with server.socket(b"G"), within(5):
        assert send(server.connect(), "GET", "/healthz")[0] == 200
        assert server.terminate() == 0
        server.start()


def test_healthz_holds_no_thread_while_nothing_can_be_written(server_with, store):
    server = server_with("--threads", "1")
    with another_program_writes(store):
        asking = [server.connect() for _ in range(8)]
        for connection in asking:
            connection.request("GET", "/healthz")
        with within(6):
            assert [connection.getresponse().status for connection in asking] == [503] * 8
            for _ in range(20):
                assert send(server.connect(), "GET", "/healthz")[0] == 503
                assert send(server.connect(), "GET", "/messages")[0] == 200


def test_a_migration_waits_for_its_turn_and_if_it_is_killed_leaves_everything_as_it_was(store, tmp_path):
    change(store, MANY.format(50_000, 1))
    changed = SCHEMA.replace(stream_sql("messages"), stream_sql("messages", ", n INTEGER AS (body ->> 'n')"))
    (tmp_path / "schema.sql").write_text(changed)
    question = "SELECT count(*), max(id), sum({}) FROM messages"
    with another_process_has_its_turn(store), start(tmp_path, "migrate") as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
    for delay in (0.3, 0.4, 0.5):
        with start(tmp_path, "migrate") as process:
            time.sleep(delay)
            process.kill()
        assert rows(store, question.format("body ->> 'n'")) == [(50_000, 50_000, 1_250_025_000)]
    assert run(tmp_path, "migrate").returncode == 0
    assert rows(store, question.format("n")) == [(50_000, 50_000, 1_250_025_000)]
