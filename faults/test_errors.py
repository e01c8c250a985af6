"""A disk, a memory and a process that fail: every error is answered with 5xx, and the service recovers by itself.

The errors are injected into the system calls of a real server by strace, at the Nth call and then for good.
"""

import contextlib
import resource
import subprocess
import time

import pytest
from common import Ledger, Server, at_once, database, failing, scale, seed, timed

from test_service import send


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
def test_the_nth_call_fails_and_then_every_one_for_a_while(call, error, tmp_path):
    """N goes through the first calls of each thread; each time the server goes on by itself, and then restarts.

    Every other server has not opened its database for reading before, nor written to it.
    """
    path = database(tmp_path)
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    for number in range(2, scale(14, 80)):
        n, fresh = divmod(number, 2)
        server = Server(tmp_path)
        if not fresh:
            ledger.must_answer()
        with failing(server, f"{call}:error={error}:when={n}..{n + n % 3}"):
            for _ in range(12):
                ledger.send()
            ledger.must_answer()
        assert server.end() == 0
    print(f"{call} {error}: {ledger.statuses}, {ledger.check(path)} stored")
    assert any(status and status >= 500 for status in ledger.statuses), "no error was ever seen"
    assert set(ledger.statuses) <= {201, 422, 503, 507}


def test_a_disk_that_fails_for_good_is_5xx_until_it_works_again(tmp_path):
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    ledger.must_answer()
    with failing(server, "fdatasync:error=EIO"), ledger.sending(4):
        time.sleep(2)
        assert send(server.connect(), "GET", "/healthz")[0] == 503
        assert send(server.connect(), "GET", "/messages")[0] == 200
    assert ledger.statuses[503] > 10
    acknowledged = len(ledger.acknowledged)
    ledger.must_answer()
    with ledger.sending(4):
        time.sleep(1)
    assert len(ledger.acknowledged) > acknowledged + 10
    assert server.end() == 0
    ledger.check(path)


def test_a_disk_that_takes_two_seconds_to_sync_delays_writers_only(tmp_path):
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    ledger.must_answer()
    with failing(server, "fdatasync:delay_enter=2000000"), ledger.sending(40):
        deadline = time.monotonic() + 9
        while time.monotonic() < deadline:
            started = time.monotonic()
            assert send(server.connect(), "GET", "/messages")[0] == 200
            assert time.monotonic() - started < 1.9  # a reader that waited for a sync would take 2
            assert send(server.connect(), "GET", "/healthz")[0] in (200, 503)  # within its 2 seconds
            assert time.monotonic() - started < 5
            time.sleep(0.2)
    assert ledger.statuses[201] > 40
    ledger.must_answer()
    assert server.end() == 0
    ledger.check(path)


def test_a_commit_that_hangs_stops_no_read(tmp_path):
    """Every third sync of a thread takes 2 s: whichever thread is in it, another one serves the others at once."""
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    ledger.must_answer()
    until, writes, reads = time.monotonic() + 12, [], []

    def write():
        with contextlib.closing(server.connect()) as connection:
            while time.monotonic() < until:
                writes.append(timed(lambda: ledger.send(connection))[1])

    def read():
        with contextlib.closing(server.connect()) as connection:
            while time.monotonic() < until:
                (status, _, _), seconds = timed(lambda: send(connection, "GET", "/messages?limit=1"))
                assert status == 200
                reads.append(seconds)

    with failing(server, "fdatasync:delay_enter=2000000:when=3+3"):
        at_once(write, write, read)
    hung = sum(seconds > 1.9 for seconds in writes)
    print(f"{hung} of {len(writes)} writes hung, {len(reads)} reads took at most {max(reads):.3f} s")
    assert hung >= 4
    assert max(reads) < 1.0  # 0.04 s on a machine that does nothing else
    assert server.end() == 0
    ledger.check(path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_507_and_has_room_again_later(small_disk):
    path = database(small_disk)
    server = Server(small_disk)
    ledger = Ledger(lambda: server.connect(), size=5000, chosen=seed())
    ledger.must_answer()
    ballast = small_disk / "ballast"
    for _ in range(3):
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        seen = ledger.statuses[507]
        with ledger.sending(4):
            time.sleep(1.5)
        assert ledger.statuses[507] > seen
        assert send(server.connect(), "GET", "/messages?limit=1")[0] == 200
        ballast.unlink()
        ledger.must_answer()
    assert set(ledger.statuses) <= {201, 422, 503, 507, None}
    assert server.end() == 0
    ledger.check(path)


def test_a_limit_on_the_size_of_files_is_5xx(tmp_path):
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), size=2000, chosen=seed())
    ledger.must_answer()
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    with ledger.sending(4):
        time.sleep(2)
    assert ledger.statuses[503] + ledger.statuses[507] > 5
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    ledger.must_answer()
    assert server.end() == 0
    ledger.check(path)


def test_no_file_descriptors_left(tmp_path):
    """Connections that are there go on; new ones wait until there are descriptors again."""
    import os

    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    ledger.must_answer()
    existing = server.connect()
    existing.connect()
    ledger.send(existing)
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{server.pid}/fd"))
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used, hard))
    waiting = [server.connect() for _ in range(5)]
    for connection in waiting:
        connection.connect()
    for _ in range(5):
        assert ledger.send(existing) in (201, 422, 503)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (hard, hard))
    for connection in waiting:
        assert send(connection, "GET", "/healthz")[0] == 200
    ledger.must_answer()
    assert server.end() == 0
    ledger.check(path)


def test_no_memory_left(tmp_path):
    """The address space is limited to a little more than is used; large messages fail, and the service lives."""
    path = database(tmp_path)
    server = Server(tmp_path, "--max-body", "50000000")
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    ledger.must_answer()
    with open(f"/proc/{server.pid}/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.prlimit(server.pid, resource.RLIMIT_AS, (used + 30_000_000, resource.RLIM_INFINITY))
    failed = 0
    for n in range(5):
        large = f'"{n}'.encode() + b"x" * 40_000_000 + b'"'
        status, message_id = ledger.post(large, f"large-{n}")
        if status == 201:
            ledger.acknowledged[message_id] = large
        else:
            failed += 1
            ledger.unknown.append(large)
    assert failed
    resource.prlimit(server.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    ledger.must_answer()
    with ledger.sending(4):
        time.sleep(1)
    assert server.end() == 0
    assert ledger.statuses[201] > 10
    ledger.check(path)
    print(dict(ledger.statuses))
