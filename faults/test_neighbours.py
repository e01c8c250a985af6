"""Other processes, other hands on the files, and another clock."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import pytest
from common import SCHEMA, Ledger, Server, database, failing, seed

import service
from test_service import HERE, TOKEN, run, send


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
    service.backup(path, tmp_path / "copy", lambda *_: None)
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
    import sys

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
