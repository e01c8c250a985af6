"""Other processes, other hands on the files, and another clock."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from common import SCHEMA, Ledger, Server, at_once, database, failing, held, press, seed, strace, wait_until

import service
from test_service import DEADLINE_S, HERE, TOKEN, run, send, stream_sql


def test_a_process_that_holds_the_lock_of_sqlite_for_long(tmp_path):
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    ledger.must_answer()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with ledger.sending(3):
            time.sleep(13)
            assert send(server.connect(), "GET", "/messages")[0] == 200
            assert ledger.statuses[503] > 0
            other.execute("ROLLBACK")
            time.sleep(1)
    ledger.must_answer()
    assert server.end() == 0
    ledger.check(path)


def test_a_sibling_that_is_stopped_in_the_middle_of_a_commit(tmp_path):
    """SIGSTOP while its fsync is slow: the other process answers 503, and both go on after SIGCONT."""
    path = database(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "schema.sql").write_text(SCHEMA)
    server, sibling = Server(tmp_path), Server(tmp_path / "b", "--database", str(path))
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    other = Ledger(lambda: sibling.connect())
    ledger.must_answer()
    tracer = subprocess.Popen(
        [
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=fdatasync",
            "-e",
            "inject=fdatasync:delay_enter=1000000",
        ]
        + ["-p", str(sibling.pid)]
    )
    time.sleep(0.5)
    pending = threading.Thread(target=other.send)
    pending.start()
    time.sleep(0.5)
    tracer.kill()  # what is stopped stays inside of its COMMIT
    sibling.signal(signal.SIGSTOP)
    tracer.wait()
    with ledger.sending(3):
        time.sleep(12)
        assert send(server.connect(), "GET", "/messages")[0] == 200
        sibling.signal(signal.SIGCONT)
        time.sleep(1)
    pending.join(30)
    ledger.must_answer()
    other.must_answer()
    print(dict(ledger.statuses), dict(other.statuses))
    assert server.end() == sibling.end() == 0
    with contextlib.closing(sqlite3.connect(path)) as db:
        stored = db.execute("SELECT id, key, CAST(body AS BLOB) FROM messages").fetchall()
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    by_id = {message_id: body for message_id, _, body in stored}
    for told in (ledger, other):
        assert all(by_id[message_id] == body for message_id, body in told.acknowledged.items())


def test_a_reader_that_stays_makes_the_wal_grow_which_is_logged_and_shrinks_after(tmp_path):
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), size=20_000, chosen=seed())
    ledger.must_answer()
    wal = Path(f"{path}-wal")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM messages").fetchall()
        with ledger.sending(4):
            deadline = time.monotonic() + 60
            while wal.stat().st_size < 80_000_000:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert "the WAL has grown" in (tmp_path / "log").read_text()
    with ledger.sending(4):
        deadline = time.monotonic() + 20
        while wal.stat().st_size > 20_000_000:
            assert time.monotonic() < deadline, "the WAL did not shrink"
            time.sleep(0.1)
    assert server.end() == 0
    ledger.check(path)


def test_a_database_that_is_taken_away_and_comes_back(tmp_path):
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    ledger.must_answer()
    with ledger.sending(4):
        time.sleep(0.5)
        os.rename(path, tmp_path / "away")
        time.sleep(1.5)
        assert not path.exists(), "it made a new database in the place of the one that is gone"
        os.rename(tmp_path / "away", path)
        time.sleep(0.5)
    assert ledger.statuses[503] > 0
    ledger.must_answer()
    assert server.end() == 0
    ledger.check(path)


def test_a_database_that_is_replaced_by_its_backup_under_the_running_service(tmp_path):
    """What came after the backup goes with the old file, by the owner's hand; what comes later is in the new one."""
    path = database(tmp_path)
    server = Server(tmp_path)
    before, between, after = (Ledger(lambda: server.connect(), chosen=seed()) for _ in range(3))
    with before.sending(4):
        time.sleep(0.5)
    service.backup(service.Database(path), tmp_path / "copy")
    with between.sending(4):
        time.sleep(0.5)
    os.rename(path, tmp_path / "original")
    for name in ("wal", "shm"):
        os.unlink(f"{path}-{name}")
    os.rename(tmp_path / "copy", path)
    time.sleep(1.2)
    with after.sending(4):
        time.sleep(0.5)
    after.must_answer()
    assert server.end() == 0
    with contextlib.closing(sqlite3.connect(path)) as db:
        stored = db.execute("SELECT id, CAST(body AS BLOB) FROM messages").fetchall()
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    bodies = dict(stored)
    for told in (before, after):
        lost = [i for i, body in told.acknowledged.items() if bodies.get(i) != body]
        assert not lost, lost[:10]


def test_a_file_system_that_becomes_read_only(tmp_path):
    """As it does behind an error with errors=remount-ro: every write is EROFS."""
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    ledger.must_answer()
    with failing(server, "pwrite64:error=EROFS"), ledger.sending(4):
        time.sleep(1.5)
        assert send(server.connect(), "GET", "/messages")[0] == 200
        assert send(server.connect(), "GET", "/healthz")[0] == 503
    assert ledger.statuses[503] > 10
    ledger.must_answer()
    assert server.end() == 0
    ledger.check(path)


@pytest.mark.parametrize("damage", ["no database", "a hole", "cut short"])
def test_a_corrupt_database_at_the_start_is_one_line(damage, tmp_path):
    path = database(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "no database":
        content = b"this is no database, but a text that somebody has put here by mistake" * 100
    elif damage == "a hole":
        content[100:4096] = bytes(3996)
    else:
        content = content[:5000]
    path.write_bytes(content)
    done = run(tmp_path, "--listen", "127.0.0.1:0")
    assert done.returncode == 2
    assert done.stderr.startswith("inlet: ")
    assert done.stderr.count("\n") == 1
    assert path.read_bytes() == content


def test_a_clock_that_steps_a_year_back_and_forth(tmp_path):
    """faketime moves the clock of the server; ids grow all the same, tokens work, and nothing waits for a year."""
    path = database(tmp_path)
    library = next(Path("/usr/lib").rglob("faketime/libfaketimeMT.so.1"))
    control = tmp_path / "clock"
    control.write_text("+0")
    environ = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(control), "FAKETIME_NO_CACHE": "1"}
    server = Server(tmp_path, FAKETIME_DONT_FAKE_MONOTONIC="1", **environ)
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    ids = []
    for step in ("+0", "-365d", "+365d", "-1d", "+0"):
        control.write_text(step)
        time.sleep(0.2)
        for _ in range(10):
            ledger.must_answer(5)
        ids.append(max(ledger.acknowledged))
    assert ids == sorted(set(ids))
    assert server.end() == 0
    ledger.check(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        years = {row[0] for row in db.execute("SELECT substr(received_at, 1, 4) FROM messages")}
    assert len(years) >= 3, "the clock did not step"


def test_prefork_servers_never_share_a_connection(tmp_path):
    """The module is imported, and even used, before the fork; each child opens files of its own."""
    path = database(tmp_path)
    code = """
import os, sys, falcon.testing, service
def post(n):
    client = falcon.testing.TestClient(service.application)
    headers = {"Authorization": "Bearer " + sys.argv[1], "Content-Type": "application/json"}
    return client.simulate_post("/messages", body=str(n), headers=headers).status_code
assert post(0) == 201
children = []
for child in range(4):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if all(post(child * 100 + n) == 201 for n in range(50)) else 1)
    children.append(pid)
assert all(post(1000 + n) == 201 for n in range(50))
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""
    environ = os.environ | {
        "INLET_DATABASE": str(path),
        "INLET_SCHEMA": str(tmp_path / "schema.sql"),
        "PYTHONPATH": str(HERE),
    }
    done = subprocess.run([sys.executable, "-c", code, TOKEN], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("SELECT count(*), count(DISTINCT id) FROM messages").fetchone() == (251, 251)


def test_forks_of_a_busy_process_neither_hang_nor_fail(tmp_path):
    """25 children of a process whose threads write and read all the time; each writes, reads and ends."""
    path = database(tmp_path)
    environ = os.environ | {"INLET_DATABASE": str(path), "INLET_SCHEMA": str(tmp_path / "schema.sql")}
    environ["PYTHONPATH"] = str(HERE)
    command = [sys.executable, HERE / "faults" / "forking.py", "25", TOKEN]
    with open(tmp_path / "forking-log", "w+") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            status = process.wait(90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and children that hang
        log.seek(0)
        assert (status, printed := log.read()) == (0, "25 children worked\n"), printed[-5000:]
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def siblings(tmp_path, number, **more):
    """The path of a database, and servers that share it."""
    path, servers = database(tmp_path), []
    for n in range(number):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "schema.sql").write_text(SCHEMA)
        servers.append(Server(folder, "--database", str(path), **more))
    return path, servers


@pytest.mark.parametrize("disk", ["quick", "slow"])
def test_none_of_four_processes_starves_under_full_load(disk, tmp_path):
    """On a slow disk, the one that has just written is always the first to try again."""
    wrapper = () if disk == "quick" else strace("fdatasync:delay_exit=30000")
    path, servers = siblings(tmp_path, 4, wrapper=wrapper)
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        pressing = [pool.submit(press, server.address, 6) for server in servers]
        taken = [each.result() for each in pressing]
    print(taken)
    assert min(taken) > sum(taken) / 4 / 3
    for server in servers:
        assert server.end() == 0
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*), count(DISTINCT id) FROM messages").fetchone() == (sum(taken),) * 2


def test_a_lock_that_is_held_elsewhere_leaves_no_threads_and_no_descriptors(tmp_path):
    """While it is still held, after 40 requests have waited for it in vain, one after the other."""
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(server.connect)
    ledger.must_answer()
    threads, files = server.status("Threads"), sorted(server.open_files())

    def late(n):
        time.sleep(0.1 * n)
        return ledger.post(b"1")[0]

    with held(path):
        assert set(at_once(*[lambda n=n: late(n) for n in range(40)])) == {503}
        wait_until(lambda: len(server.open_files()) <= len(files), f"descriptors stay, in place of {files}")
        assert server.status("Threads") <= threads + 8  # of those that read, some may have started since
    ledger.must_answer(2)
    assert server.end() == 0


def test_a_symbolic_link_and_the_database_behind_it_are_one(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.mkdir()
    path = database(real)
    (link / "inlet.db").symlink_to("../real/inlet.db")
    (link / "schema.sql").write_text(SCHEMA)
    servers = [Server(real), Server(link)]
    ledger = Ledger(lambda: chosen.choice(servers).connect(), chosen=(chosen := seed()))
    with ledger.sending(4):
        wait_until(lambda: len(ledger.acknowledged) > 200, f"{ledger.statuses}")
    assert set(ledger.statuses) <= {201, 422}
    for server in servers:
        assert send(server.connect(), "GET", "/healthz")[0] == 200
        assert send(server.connect(), "GET", "/messages?limit=1")[0] == 200
    with held(path):
        connections = [server.connect() for server in servers]
        for connection in connections:
            connection.request(
                "POST", "/messages", "1", {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
            )
        for connection in connections:
            connection.sock.settimeout(0.5)
            with pytest.raises(TimeoutError):  # both wait for the same lock
                connection.sock.recv(1, socket.MSG_PEEK)
            connection.sock.settimeout(DEADLINE_S)
    for connection in connections:
        answer = connection.getresponse()
        assert (answer.status, answer.read()[:6]) == (201, b'{"id":'), answer.status
    assert {entry.name for entry in link.iterdir()} == {"inlet.db", "schema.sql", "log"}
    for server in servers:
        assert server.end() == 0


def test_a_stream_that_was_dropped_costs_only_the_messages_for_it(tmp_path):
    """One POST to it and 40 others share a COMMIT, in a process that was there before the migration."""
    path = database(tmp_path, SCHEMA + stream_sql("dropped"))
    server = Server(tmp_path)
    ledger = Ledger(server.connect)
    ledger.must_answer()
    (tmp_path / "schema.sql").write_text(SCHEMA)
    assert run(tmp_path, "migrate").returncode == 0
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    for n in (0, 20, 40):
        connections = [server.connect() for _ in range(41)]
        with held(path):  # until all of them have come
            for each, connection in enumerate(connections):
                connection.request("POST", "/dropped" if each == n else "/messages", "1", headers)
            wait_until(lambda: not server.unread_bytes(), "the server does not read")
        answers = [connection.getresponse() for connection in connections]
        assert answers.pop(n).status == 503
        assert [answer.status for answer in answers] == [201] * 40
    ledger.must_answer(2)
    assert server.end() == 0
