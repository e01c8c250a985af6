"""A disk, a memory and a process that fail: every error is answered with 503, and the service recovers by itself.

The errors are injected into the system calls of a real server by strace, at the Nth call and then for good.
"""

import contextlib
import http.client
import json
import os
import pwd
import resource
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest
from common import Ledger, Server, at_once, database, failing, scale, seed, sql, timed, wait_until
from deployed import answers, free_port

from test_service import HERE, send, stream_sql


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
    assert ledger.statuses[503], "no error was ever seen"
    assert set(ledger.statuses) <= {201, 422, 503}


def test_a_disk_that_fails_for_good_is_503_until_it_works_again(tmp_path):
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
    subprocess.run(["umount", "--lazy", folder], check=True)  # a failed test leaves a server in it


def fill(folder: Path) -> Path:
    """Fill a file system wholly; the file that does."""
    with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return folder / "ballast"


def test_a_full_disk_is_503_and_has_room_again_later(small_disk):
    path = database(small_disk)
    server = Server(small_disk)
    ledger = Ledger(lambda: server.connect(), size=5000, chosen=seed())
    ledger.must_answer()
    for _ in range(3):
        ballast = fill(small_disk)
        seen = ledger.statuses[503]
        with ledger.sending(4):
            time.sleep(1.5)
        assert ledger.statuses[503] > seen
        status, headers, data = send(server.connect(), "POST", "/messages", json.dumps("x" * 10_000))
        assert (status, headers["Retry-After"], json.loads(data)["detail"][:17]) == (503, "2", "The disk is full.")
        assert send(server.connect(), "GET", "/messages?limit=1")[0] == 200
        ballast.unlink()
        ledger.must_answer()
    assert set(ledger.statuses) <= {201, 422, 503, None}
    assert server.end() == 0
    ledger.check(path)


def test_a_container_that_starts_on_a_full_disk_lets_read(small_disk):
    """Its migrate fails, but the database has the schema that the service has."""
    path, port = database(small_disk), free_port()
    with contextlib.closing(Server(small_disk)) as server:
        assert send(server.connect(), "POST", "/messages", "1")[0] == 201
    fill(small_disk)
    settings = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "INLET_DATABASE": str(path),
        "INLET_SCHEMA": str(small_disk / "schema.sql"),
        "INLET_LISTEN": f"127.0.0.1:{port}",
    }
    command = ["sh", HERE / "deploy" / "start.sh"]
    with subprocess.Popen(command, cwd=HERE, env=os.environ | settings, stderr=subprocess.PIPE, text=True) as container:
        wait_until(lambda: answers(port, "/livez"), "it does not start")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            assert send(connection, "GET", "/messages")[0] == 200
        container.terminate()
        assert container.wait(20) == 0
        assert "disk is full" in container.stderr.read()


@pytest.mark.parametrize("end", ["SIGTERM", "SIGTERM, then sqlite3", "kill -9", "kill -9, and the -shm is gone"])
def test_a_start_on_a_full_disk_serves_what_there_is_and_takes_more_when_there_is_room(end, small_disk, tmp_path):
    database(tmp_path)  # for its schema.sql; the log must have room
    path = database(small_disk)
    server = Server(tmp_path, "--database", str(path))
    for n in range(20):
        assert send(server.connect(), "POST", "/messages", str(n))[0] == 201
    if end.startswith("SIGTERM"):
        assert server.end() == 0
    else:
        server.kill()
        assert Path(f"{path}-wal").stat().st_size > 0
    if end.endswith("sqlite3"):
        sql(path, "SELECT count(*) FROM messages")  # the last one that closes it removes its WAL and its -shm
        assert not Path(f"{path}-shm").exists()
    if end.endswith("gone"):  # as after a power cut, which it need not outlive
        Path(f"{path}-shm").unlink()
    ballast = fill(small_disk)
    server.start()

    def ask(method, body=None, **headers):
        with contextlib.closing(server.connect()) as connection:
            status, _, data = send(connection, method, "/messages", body, **headers)
            return status, json.loads(data)

    def feed():
        status, page = ask("GET")
        if status == 503 and end.endswith("gone"):  # what is in the WAL cannot be read then
            return old
        assert status == 200, page
        return [(message["id"], message["body"]) for message in page["messages"]]

    old = [(n + 1, n) for n in range(20)]
    assert feed() == old
    for _ in range(3):
        status, problem = ask("POST", json.dumps("x" * 900_000))  # the WAL has left less room than that
        assert (status, problem.get("detail", "")[:17]) == (503, "The disk is full."), problem
        assert feed() == old
    ballast.unlink()
    wait_until(lambda: ask("POST", '"new"', Idempotency_Key="k")[0] == 201, "it does not take a message", 5)
    assert feed() == [*old, (21, "new")]
    wait_until(lambda: send(server.connect(), "GET", "/healthz")[0] == 200, "it is not ready", 5)
    assert server.end() == 0
    assert sql(path, "PRAGMA integrity_check", "SELECT count(*) FROM messages") == [(21,)]
    assert "Traceback" not in server.log


# As `unshare --mount`, it sees all file systems read-only, but for one folder; then it goes on as nobody.
READ_ONLY = """
mount --make-rprivate /
mount --bind "$1" "$1"
mount -o remount,bind,ro /
mount -o remount,bind,ro /dev/shm
shift 2
exec setpriv --reuid=nobody --regid=nogroup --clear-groups /usr/bin/python3 "$@"
"""


@pytest.fixture
def on_read_only_disk(tmp_path):
    """Starts a server as nobody on a disk that is read-only, but for the folder of its database."""
    user = pwd.getpwnam("nobody")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)

    def start(**environ):
        for entry in (tmp_path, *tmp_path.iterdir()):
            os.chown(entry, user.pw_uid, user.pw_gid)
        wrapper = ("unshare", "--mount", "sh", "-ec", READ_ONLY, "sh", str(tmp_path))
        environ = {"PYTHONPATH": sysconfig.get_path("purelib"), "PYTHONDONTWRITEBYTECODE": "1"} | environ
        server = Server(tmp_path, wrapper=wrapper, **environ)
        for folder in ("/tmp", "/var/tmp", "/dev/shm", os.getcwd()):  # here SQLite would have put its files
            touched = subprocess.run(
                ["nsenter", "-t", str(server.pid), "-m", "touch", f"{folder}/x"], capture_output=True
            )
            assert b"Read-only" in touched.stderr
        return server

    return start


INDEXED = (
    stream_sql("messages", ", name TEXT AS (body ->> 'name')")
    + """
CREATE INDEX messages_name ON messages (name);
CREATE VIEW names AS SELECT name, count(*) AS number FROM (SELECT body ->> 'other' AS name FROM messages) GROUP BY name;
"""
)


def test_large_batches_are_stored_on_a_disk_that_is_read_only_but_for_the_database(on_read_only_disk, tmp_path):
    path = database(tmp_path, INDEXED)
    server = on_read_only_disk()
    with contextlib.closing(server.connect()) as connection:
        for batch in range(12):
            lines = [json.dumps({"name": f"{n * 7919 % 6500:05} of {batch}", "pad": "x" * 50}) for n in range(6500)]
            body = "\n".join(lines)
            status, _, data = send(connection, "POST", "/messages", body, Content_Type="application/x-ndjson")
            assert (status, json.loads(data)["count"]) == (201, 6500), data
            assert send(connection, "GET", "/healthz")[0] == 200
    assert server.end() == 0
    assert sql(path, "PRAGMA integrity_check", "SELECT count(*) FROM messages") == [(12 * 6500,)]


def test_a_large_report_on_a_read_only_disk_needs_SQLITE_TMPDIR_as_readme_says(on_read_only_disk, tmp_path):
    path = database(tmp_path, INDEXED)
    sql(
        path,
        "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 60000) INSERT INTO messages"
        " (received_at, client, body) SELECT 't', 'x', json_object('other', printf('%0300d', n * 7919 % 60000)) FROM n",
    )
    (tmp_path / "temporary").mkdir()
    for environ in ({}, {"SQLITE_TMPDIR": str(tmp_path / "temporary")}):
        server = on_read_only_disk(**environ)
        with contextlib.closing(server.connect()) as connection:
            status, _, data = send(connection, "GET", "/names?limit=3")
            assert (status, len(json.loads(data).get("rows", []))) == ((200, 3) if environ else (503, 0)), data
            assert send(connection, "POST", "/messages", '{"name": "a"}')[0] == 201
        assert server.end() == 0


@pytest.mark.parametrize("damage", ["all pages but the first", "the pages in the middle"])
def test_a_database_that_is_damaged_beside_the_service_gets_503_that_names_the_backup(damage, tmp_path):
    """As `cp other.db inlet.db` does it: the pages change in the file that the service has open."""
    path = database(tmp_path)
    server = Server(tmp_path)
    with contextlib.closing(server.connect()) as connection:
        for n in range(400):
            assert send(connection, "POST", "/messages", json.dumps(f"{n} {'x' * 3000}"))[0] == 201
    sql(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    pages = path.stat().st_size // 4096
    first, end = (1, pages) if damage.startswith("all") else (pages // 3, 2 * pages // 3)
    with open(path, "r+b") as file:
        file.seek(4096 * first)
        file.write(b"\x5a" * 4096 * (end - first))
    until, told = time.monotonic() + 4, Counter()
    with contextlib.closing(server.connect()) as connection:
        while time.monotonic() < until:
            for method, path, body in (("GET", "/messages?limit=1000", None), ("POST", "/messages", '"new"')):
                status, headers, data = send(connection, method, path, body)
                told[status, "" if status < 300 else json.loads(data)["detail"]] += 1
                assert status < 300 or (status, headers["Retry-After"]) == (503, "2"), data
            assert send(connection, "GET", "/messages?after=200")[0] == 503  # which are in the middle
        if damage.startswith("all"):
            assert {status for status, _ in told} == {503}
            assert send(connection, "GET", "/healthz")[0] == 503
    print(told)
    assert all("has to be restored from a backup" in detail for status, detail in told if status == 503), told
    lines = [line.partition(" inlet ")[2] for line in server.log.splitlines() if " CRITICAL " in line]
    assert lines
    assert "restore a backup" in lines[0]
    assert len(set(lines)) == len(lines), lines  # each one at most once a minute
    assert "Traceback" not in server.log
    server.kill()


def test_a_limit_on_the_size_of_files_is_503(tmp_path):
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), size=2000, chosen=seed())
    ledger.must_answer()
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    with ledger.sending(4):
        time.sleep(2)
    assert ledger.statuses[503] > 5
    assert set(ledger.statuses) <= {201, 422, 503, None}
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    ledger.must_answer()
    assert server.end() == 0
    ledger.check(path)


def test_no_file_descriptors_left(tmp_path):
    """Connections that are there go on; new ones wait until there are descriptors again."""
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
