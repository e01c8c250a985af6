"""Other processes, other hands on the files, and another clock."""

import contextlib
import itertools
import json
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
from common import SCHEMA, Ledger, Server, at_once, database, failing, held, press, seed, sql, strace, wait_until

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


def siblings(tmp_path, number, schema=SCHEMA, **more):
    """The path of a database, and servers that share it."""
    path, servers = database(tmp_path, schema), []
    for n in range(number):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "schema.sql").write_text(schema)
        servers.append(Server(folder, "--database", str(path), **more))
    return path, servers


def lost(path, *ledgers):
    """What these were told is there, and is not."""
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
    bodies = dict(sql(path, "SELECT id, CAST(body AS BLOB) FROM messages"))
    return [i for told in ledgers for i, body in told.acknowledged.items() if bodies.get(i) != body]


@pytest.mark.parametrize("files", ["the WAL and the -shm are removed", "the WAL and the -shm are left in place"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_database_that_is_replaced_by_its_backup_under_the_running_service(processes, files, tmp_path):
    """What came after the backup goes with the old file, by the owner's hand; what is sent later is in the new one."""
    path, servers = siblings(tmp_path, processes)
    chosen = seed()
    before, between, after = (
        Ledger(lambda: chosen.choice(servers).connect(), chosen=chosen, first=first) for first in (1, 10**6, 2 * 10**6)
    )
    with before.sending(4):
        time.sleep(0.5)
    service.backup(service.Database(path), tmp_path / "copy")
    with between.sending(4):
        wait_until(lambda: len(between.acknowledged) > 50, "nothing is taken")
    os.link(path, tmp_path / "original")
    if files == "the WAL and the -shm are removed":
        for name in ("wal", "shm"):
            os.unlink(f"{path}-{name}")
    os.rename(tmp_path / "copy", path)
    with after.sending(4):
        wait_until(lambda: len(after.acknowledged) > 100, f"{after.statuses}")
    after.must_answer()
    for server in servers:
        Ledger(server.connect, chosen=chosen, first=3 * 10**6).must_answer()
        assert server.end() == 0
        assert "removed or replaced" in server.log
        assert "Traceback" not in server.log
    assert not (missing := lost(path, before, after)), missing[:10]
    strangers = sql(path, "SELECT count(*) FROM messages WHERE body ->> 'n' >= 1e6 AND body ->> 'n' < 2e6")
    assert strangers == [(0,)], "what was sent before the restore is in the new file"
    found = list(tmp_path.glob("inlet.db-wal.of-replaced-*"))
    assert len(found) == (files == "the WAL and the -shm are left in place")
    for aside in found:  # with it, the old database is whole
        aside.rename(tmp_path / "original-wal")
        assert not (missing := lost(tmp_path / "original", before, between)), missing[:10]


SLOW_VIEW = """
    CREATE VIEW slow AS WITH RECURSIVE n (i) AS (SELECT count(*) FROM messages UNION ALL SELECT i + 1 FROM n)
    SELECT count(*) AS n FROM n;"""


@pytest.mark.parametrize("wal", ["is empty", "has messages"])
@pytest.mark.parametrize("kind", ["the one that reads has not written yet", "the one that reads is slow"])
def test_who_reads_right_after_a_restore_spoils_nothing(kind, wal, tmp_path):
    """In the new database, and beside the WAL and the -shm of the old one, which another process puts aside then."""
    path, (first, second) = siblings(tmp_path, 2, SCHEMA + SLOW_VIEW)
    before, after = (Ledger(lambda: first.connect(), chosen=seed(), first=number) for number in (1, 10**6))
    others = Ledger(lambda: second.connect(), chosen=before.chosen, first=2 * 10**6)
    is_slow = kind == "the one that reads is slow"
    for _ in range(20):
        before.must_answer()
    if is_slow:
        others.must_answer()
    service.backup(service.Database(path), tmp_path / "copy")
    if wal == "is empty":
        sql(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert send(second.connect(), "GET", "/messages")[0] == 200
    os.rename(tmp_path / "copy", path)
    reading = threading.Thread(target=lambda: send(second.connect(), "GET", "/slow" if is_slow else "/messages"))
    used = second.processor_time()
    reading.start()
    if is_slow:
        wait_until(lambda: second.processor_time() > used + 20 or not reading.is_alive(), "nobody reads")
    else:
        reading.join()
    for _ in range(20):
        after.must_answer()
        others.must_answer()
    reading.join()
    ids = [*after.acknowledged, *others.acknowledged]
    assert len(ids) == len(set(ids)), "two messages have one id"
    for server in (first, second):
        assert server.end() == 0
    assert not (missing := lost(path, before, after, others)), missing[:10]


def test_a_feed_never_shows_what_came_after_the_backup_that_was_restored(tmp_path):
    """Nobody writes between: what is in the WAL that was left in place is not of this database."""
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(server.connect)
    ledger.must_answer()
    service.backup(service.Database(path), tmp_path / "copy")
    for _ in range(5):
        ledger.must_answer()
    os.rename(tmp_path / "copy", path)
    status, _, page = send(server.connect(), "GET", "/messages")
    assert status == 503 or len(json.loads(page)["messages"]) == 1, page
    wait_until(lambda: send(server.connect(), "GET", "/messages")[0] == 200, "it cannot be read")
    assert len(json.loads(send(server.connect(), "GET", "/messages")[2])["messages"]) == 1
    assert server.end() == 0


@pytest.mark.parametrize("both_write", [True, False])
def test_a_wal_that_is_removed_under_two_processes_loses_nothing(both_write, tmp_path):
    """The first that notices saves what is in it; the other one has it open, too."""
    path, servers = siblings(tmp_path, 2)
    turns = itertools.cycle(servers if both_write else servers[:1])
    ledger = Ledger(lambda: next(turns).connect(), chosen=(chosen := seed()))
    with ledger.sending(4):
        for _ in range(5):
            taken = len(ledger.acknowledged)
            wait_until(lambda: len(ledger.acknowledged) > taken + 50, f"{ledger.statuses}")
            os.unlink(f"{path}-wal")
    assert set(ledger.statuses) <= {201, 422, 503}
    for server in servers:
        Ledger(server.connect, chosen=chosen, first=10**6).must_answer()
        assert server.end() == 0
        assert "removed or replaced" in server.log or (not both_write and server is servers[1])
    assert not (missing := lost(path, ledger)), missing[:10]


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


def forked(path, code):
    """Run this code in a process that embeds service:application, and forks; what it has printed."""
    environ = os.environ | {"INLET_DATABASE": str(path), "INLET_SCHEMA": str(path.with_name("schema.sql"))}
    command = [sys.executable, "-c", EMBEDDING + code, TOKEN]
    done = subprocess.run(command, env=environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


EMBEDDING = """
import os, sys, falcon.testing, service
def post(n):
    client = falcon.testing.TestClient(service.application)
    headers = {"Authorization": "Bearer " + sys.argv[1], "Content-Type": "application/json"}
    return client.simulate_post("/messages", body=str(n), headers=headers).status_code
def fork(work):
    child = os.fork()
    if child == 0:
        os._exit(not work())
    return child
def failed(children):
    return sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
"""


def test_processes_that_forked_before_their_first_request_never_share_a_connection(tmp_path):
    """The module is imported before the fork; each child opens files of its own."""
    path = database(tmp_path)
    done = forked(path, """
children = [fork(lambda: all(post(child * 100 + n) == 201 for n in range(50))) for child in range(4)]
assert all(post(1000 + n) == 201 for n in range(50))
sys.exit(failed(children))
""")  # fmt: skip
    assert done.stderr == ""
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
    assert sql(path, "SELECT count(*), count(DISTINCT id) FROM messages") == [(250, 250)]


def test_a_child_that_was_forked_after_the_first_message_is_refused_and_the_log_says_so(tmp_path):
    """Its parent goes on, and a child that it has from before that message, too."""
    path = database(tmp_path)
    done = forked(path, """
early, told = os.pipe()
children = [fork(lambda: os.read(early, 1) and all(post(n) == 201 for n in range(50)))]
assert post(1000) == 201
children += [fork(lambda: all(post(n) == 503 for n in range(50))) for _ in range(4)]
os.write(told, b"!")
assert all(post(1001 + n) == 201 for n in range(50))
sys.exit(failed(children))
""")  # fmt: skip
    assert set(done.stderr.splitlines()) == {"this process was forked from one that uses the database: start it anew"}
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
    assert sql(path, "SELECT count(*), count(DISTINCT id) FROM messages") == [(101, 101)]


def test_forks_of_a_busy_process_hang_nowhere_and_lose_nothing(tmp_path):
    """25 children of a process whose threads write and read all the time; each is refused ten times, and ends."""
    path = database(tmp_path)
    environ = os.environ | {"INLET_DATABASE": str(path), "INLET_SCHEMA": str(tmp_path / "schema.sql")}
    environ["PYTHONPATH"] = str(HERE)
    command = [sys.executable, HERE / "faults" / "forking.py", "25", TOKEN]
    printed, log = tmp_path / "forking-printed", tmp_path / "forking-log"
    with open(printed, "w") as stdout, open(log, "w") as stderr:
        process = subprocess.Popen(command, env=environ, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            status = process.wait(90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and children that hang
    found, ids = printed.read_text().splitlines()
    assert (status, found) == (0, "25 children were refused"), log.read_text()[-5000:]
    assert log.read_text().count("was forked") == 25  # once a minute, and each child is a process of its own
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
    stored = [message_id for (message_id,) in sql(path, "SELECT id FROM messages")]
    assert len(stored) > 25
    assert sorted(json.loads(ids)) == stored


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
