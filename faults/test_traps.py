"""What strangers found in the store: schemas, migrations, files and signals that once lost or changed something."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from common import Server, database, failing, held, sql, wait_until

import service
from test_service import DEADLINE_S, HERE, TOKEN, run, send, stream_sql


@pytest.fixture
def opened(tmp_path):
    """Opens a store on a schema beside the stream `messages`; the database stays when the schema changes."""
    stores = []

    def open_it(sql):
        (tmp_path / "schema.sql").write_text(stream_sql("messages") + sql)
        stores.append(
            service.Store(service.Database(tmp_path / "inlet.db"), service.read_schema(tmp_path / "schema.sql"))
        )
        stores[-1].open()
        return stores[-1]

    yield open_it
    for store in stores:
        store.close()


def migrated(tmp_path, schema):
    (tmp_path / "schema.sql").write_text(stream_sql("messages") + schema)
    done = run(tmp_path, "migrate")
    assert (done.returncode, done.stderr) == (0, "")


def append(store, body, stream="messages", client="x", key=None):
    return store.append(service.Entry(store.schema.streams[stream], client, key, [body]))


def refusal(store, body, stream):
    with pytest.raises(service.Problem) as refused:
        append(store, body, stream)
    return refused.value.status, str(refused.value)


def test_a_column_that_becomes_the_integer_primary_key_keeps_its_values(opened, tmp_path):
    store = opened("CREATE TABLE sensors (name TEXT NOT NULL UNIQUE, number INTEGER) STRICT;")
    sql(store.database.path, "INSERT INTO sensors VALUES ('a', 4711), ('b', 815)")
    migrated(tmp_path, "CREATE TABLE sensors (name TEXT NOT NULL UNIQUE, number INTEGER PRIMARY KEY) STRICT;")
    assert sql(store.database.path, "SELECT name, number FROM sensors ORDER BY name") == [("a", 4711), ("b", 815)]


def test_ids_are_not_used_again_when_a_stream_comes_back_in_another_case(opened, tmp_path):
    store = opened(stream_sql("Orders"))
    for n in range(3):
        append(store, str(n), "Orders")
    sql(store.database.path, "DELETE FROM Orders")
    migrated(tmp_path, "")
    migrated(tmp_path, stream_sql("orders"))
    assert append(opened(stream_sql("orders")), "1", "orders").first_id == 4


def test_the_sentence_of_a_trigger_is_passed_on_as_it_is(opened):
    sentence = "see https://orders.example.com/help"
    store = opened(
        stream_sql("orders")
        + f"CREATE TRIGGER no BEFORE INSERT ON orders BEGIN SELECT RAISE(ABORT, '{sentence}'); END;"
    )
    assert refusal(store, "1", "orders") == (422, sentence)


def test_the_name_of_a_check_may_have_any_symbol(opened):
    store = opened(stream_sql("x", ", n INTEGER AS (body ->> 'n') CONSTRAINT preis_in_€ CHECK (n > 0)"))
    assert refusal(store, '{"n": 0}', "x") == (422, "preis_in_€")


def test_what_a_virtual_table_refuses_is_the_fault_of_the_message(opened):
    store = opened(
        stream_sql("x", ", low REAL AS (body ->> 'low'), high REAL AS (body ->> 'high')")
        + "CREATE VIRTUAL TABLE box USING rtree (id, low, high);"
        + "CREATE TRIGGER fill AFTER INSERT ON x BEGIN INSERT INTO box VALUES (NEW.id, NEW.low, NEW.high); END;"
    )
    assert append(store, '{"low": 1, "high": 2}', "x").first_id == 1
    assert refusal(store, '{"low": 2, "high": 1}', "x")[0] == 422


def test_a_replay_is_of_this_very_client(opened):
    columns = stream_sql("x", ", serial INTEGER AS (body ->> 'serial') UNIQUE")
    columns = columns.replace("client TEXT NOT NULL", "client TEXT NOT NULL COLLATE NOCASE")
    store = opened(columns.replace("(client, key)", "(client COLLATE BINARY, key)"))
    append(store, '{"serial": 1}', "x", "Bob", "k")
    with pytest.raises(service.Problem) as refused:
        append(store, '{"serial": 1}', "x", "bob", "k")
    assert refused.value.status == 409


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("CREATE TRIGGER temp.no BEFORE INSERT ON messages BEGIN SELECT RAISE(ABORT, 'no'); END;", "not TEMP"),
        ("CREATE TABLE temp.x (a);", "not TEMP"),
        ("CREATE TABLE l (a); INSERT INTO l VALUES (1) RETURNING a;", "INSERT OR IGNORE"),
        ("CREATE TABLE l (a UNIQUE); INSERT INTO l VALUES (1);", "INSERT OR IGNORE"),
    ],
)
def test_a_schema_that_would_not_do_what_it_says_is_refused(statement, words, opened):
    with pytest.raises(service.SetupError, match=words):
        opened(statement)


def test_a_grant_names_a_stream_that_is_there(tmp_path):
    database(tmp_path)
    for stream in ("clients", "MESSAGES", "messages_key", "nothing"):
        done = run(tmp_path, "client", "add", "y", "--can", f"write:{stream}")
        assert (done.returncode, f"no stream {stream}" in done.stderr) == (2, True)


def test_a_backup_through_a_symlink_does_not_replace_the_database(tmp_path):
    path = database(tmp_path)
    (tmp_path / "link.db").symlink_to(path)
    done = run(tmp_path, "backup", str(tmp_path / "link.db"), "--replace")
    assert done.returncode == 2
    assert (tmp_path / "link.db").is_symlink()


def test_a_wal_that_was_removed_while_somebody_reads_loses_nothing(tmp_path):
    """What is in it can only be saved when the reader has gone: until then, 503."""
    path = database(tmp_path)
    server = Server(tmp_path)
    for n in range(5):
        assert send(server.connect(), "POST", "/messages", str(n))[0] == 201
    code = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN")
db.execute("SELECT count(*) FROM messages").fetchone()
print("reading", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "reading\n"
        for n in (5, 6, 7):
            assert send(server.connect(), "POST", "/messages", str(n))[0] == 201
        os.unlink(f"{path}-wal")
        assert send(server.connect(), "POST", "/messages", "8")[0] == 503
        reader.kill()
    for n in (9, 10):
        assert send(server.connect(), "POST", "/messages", str(n))[0] == 201
    assert server.end() == 0
    stored = sql(path, "SELECT id, body FROM messages ORDER BY id")
    assert [int(body) for _, body in stored if body != "8"] == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]
    assert [message_id for message_id, _ in stored] == list(range(1, len(stored) + 1))


def test_what_waits_for_the_lock_at_the_end_gets_its_answer(tmp_path):
    path = database(tmp_path)
    server = Server(tmp_path)
    connection = server.connect()
    assert send(connection, "POST", "/messages", "0")[0] == 201
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        connection.request("POST", "/messages", "1", headers)
        time.sleep(0.3)
        server.signal(signal.SIGTERM)
        time.sleep(6.5)
        other.execute("ROLLBACK")
    assert connection.getresponse().status == 201
    assert server.process.wait(DEADLINE_S) == 0


def test_bodies_that_come_while_the_service_ends_are_stored_as_they_were_sent_or_not_at_all(tmp_path):
    """A slow COMMIT at the end once let two threads read the same sockets, which swapped the blocks of bodies."""
    path = database(tmp_path)
    server = Server(tmp_path)
    host, port = server.address.split(":")
    head = f"POST /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"

    def begin(body, sent):
        """A connection whose request has come in part."""
        request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
        sock = socket.create_connection((host, int(port)), DEADLINE_S)
        sock.sendall(request[:sent])
        return sock, request[sent:]

    # Each block of eight characters is another one.
    bodies = [json.dumps("".join(f"{n:03}{block:05}" for block in range(15_500))) for n in range(150)]
    large = [begin(body, 300) for body in bodies]
    small = [begin('"x"', -1), begin('"x"', -1)]
    answers = {}

    def finish(n):
        sock, rest = large[n]
        with contextlib.suppress(OSError):
            for at in range(0, len(rest), 30_000):
                sock.sendall(rest[at : at + 30_000])
                time.sleep(0.001)
            answers[n] = sock.recv(65536)[:12]

    time.sleep(0.3)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        server.signal(signal.SIGTERM)
        for sock, rest in small:  # their COMMITs wait for the lock
            time.sleep(0.15)
            sock.sendall(rest)
        time.sleep(0.1)
        other.execute("ROLLBACK")
    threads = [threading.Thread(target=finish, args=(n,)) for n in range(150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert server.process.wait(DEADLINE_S) == 0
    stored = {body for (body,) in sql(path, "SELECT body FROM messages")} - {'"x"'}
    assert stored <= set(bodies), "a body was stored that nobody has sent"
    created = {bodies[n] for n, answer in answers.items() if answer == b"HTTP/1.1 201"}
    assert len(created) > 100
    assert created <= stored
    assert "Socket error" not in (tmp_path / "log").read_text()


def test_answers_that_nobody_reads_are_bounded(tmp_path):
    path = database(tmp_path)
    page = json.dumps("x" * 8_000_000)
    sql(path, f"INSERT INTO messages (received_at, client, body) VALUES ('t', 'x', '{page}')")
    server = Server(tmp_path)
    assert send(server.connect(), "GET", "/messages")[0] == 200
    ask = f"GET /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    host, port = server.address.split(":")
    deaf = [socket.create_connection((host, int(port)), DEADLINE_S) for _ in range(150)]
    for sock in deaf:
        sock.sendall(ask)
    time.sleep(3)
    status = Path(f"/proc/{server.pid}/status").read_text()
    peak_mb = int(status.partition("VmHWM:")[2].split()[0]) // 1024
    print(f"{peak_mb} MB at most")
    assert peak_mb < 500  # 1,200 MB were asked for
    assert send(server.connect(), "GET", "/messages/1")[0] == 200
    for sock in deaf:
        sock.close()
    assert server.end() == 0


def test_heads_without_their_bodies_keep_nobody_out(tmp_path):
    database(tmp_path)
    server = Server(tmp_path)
    host, port = server.address.split(":")
    head = f"GET /x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 1048576\r\n\r\n".encode()
    waiting = [socket.create_connection((host, int(port)), DEADLINE_S) for _ in range(100)]
    for sock in waiting:
        sock.sendall(head)
    large = json.dumps("x" * 500_000).encode()
    assert send(server.connect(), "POST", "/messages", large)[0] == 201
    assert send(server.connect(), "POST", "/messages", [large[:9], large[9:]])[0] == 201
    for sock in waiting:
        sock.close()
    assert server.end() == 0


def test_a_child_that_outlives_a_killed_parent_does_not_keep_the_lock(tmp_path):
    """The parent serves, forks a child that only sleeps, and is killed while it waits for SQLite inside of its turn."""
    path = database(tmp_path)
    code = """
import os, sys, threading, time, falcon.testing, service
client = falcon.testing.TestClient(service.application)
headers = {"Authorization": "Bearer " + sys.argv[1], "Content-Type": "application/json"}
post = lambda: client.simulate_post("/messages", body="1", headers=headers)
assert post().status_code == 201
threading.Thread(target=post, daemon=True).start()
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("forked", flush=True)
while True:
    post()
"""
    environ = os.environ | {
        "INLET_DATABASE": str(path),
        "INLET_SCHEMA": str(tmp_path / "schema.sql"),
        "PYTHONPATH": str(HERE),
    }
    command = [sys.executable, "-c", code, TOKEN]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        try:
            assert parent.stdout.readline() == "forked\n"
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                time.sleep(0.5)  # the parent is in its turn now, and waits
                parent.kill()
                parent.wait()
            assert run(tmp_path, "client", "list").returncode == 0
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


EMBEDDED = """
import os, signal, sqlite3, sys, threading, time, falcon.testing, service
client = falcon.testing.TestClient(service.application)
headers = {"Authorization": "Bearer " + sys.argv[1], "Content-Type": "application/json"}
post = lambda body="1": client.simulate_post("/messages", body=body, headers=headers)
assert post().status_code == 201
"""


@contextlib.contextmanager
def embedding(folder, code, schema="", is_used=True):
    """A process that runs this code, when it has used service:application. Its log is the file `embedding-log`."""
    path = folder / "inlet.db"
    if not path.exists():
        database(folder, stream_sql("messages") + schema)
    environ = os.environ | {
        "INLET_DATABASE": str(path),
        "INLET_SCHEMA": str(folder / "schema.sql"),
        "PYTHONPATH": str(HERE),
    }
    command = [sys.executable, "-c", EMBEDDED + code if is_used else code, TOKEN]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with (
        open(folder / "embedding-log", "w") as log,
        subprocess.Popen(command, env=environ, stderr=log, **pipes) as process,
    ):
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_child_that_outlives_its_parent_is_refused_and_nothing_is_lost(tmp_path):
    """Beside a service that starts then. At its end, the child closes what it has inherited."""
    code = """
client.simulate_get("/messages", headers=headers)
if os.fork() == 0:
    for line in sys.stdin:
        print(post(line).status_code, flush=True)
    sys.exit()
print("forked", flush=True)
time.sleep(60)
"""
    with embedding(tmp_path, code) as parent:

        def through_the_child(body):
            parent.stdin.write(f"{body}\n")
            parent.stdin.flush()
            return int(parent.stdout.readline())

        assert parent.stdout.readline() == "forked\n"
        assert through_the_child(0) == 503
        parent.kill()
        ids, statuses = [], []
        with contextlib.closing(Server(tmp_path)) as server, contextlib.closing(server.connect()) as connection:
            for n in range(10):
                ids.append(json.loads(send(connection, "POST", "/messages", str(n))[2])["id"])
                statuses.append(through_the_child(n))
            parent.stdin.close()
            assert parent.stdout.read() == ""  # the child has ended
            ids.append(json.loads(send(connection, "POST", "/messages", "1")[2])["id"])
    assert statuses == [503] * 10
    assert ids == list(range(2, 13))
    assert [row[0] for row in sql(tmp_path / "inlet.db", "SELECT id FROM messages")] == list(range(1, 13))
    assert "was forked" in (tmp_path / "embedding-log").read_text()


def test_threads_that_fork_at_once_and_children_that_fork_again_do_not_hang(tmp_path):
    code = """
done = [0, 0]
def fork(number):
    for done[number] in range(1, 21):
        child = os.fork()
        if not child:
            if not (grandchild := os.fork()):
                os._exit(0)
            os.waitpid(grandchild, 0)
            os._exit(0)
        os.waitpid(child, 0)
def write():
    while done != [20, 20]:
        assert post().status_code == 201
threads = [threading.Thread(target=fork, args=(n,)) for n in (0, 1)] + [threading.Thread(target=write) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(done)
"""
    with embedding(tmp_path, code) as process:
        assert process.communicate(timeout=60)[0] == "[20, 20]\n"


SLOW_VIEW = """
    CREATE VIEW slow AS WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) AS n FROM n;"""
SLOW_STEP = """
    CREATE VIEW slow AS SELECT
    instr(replace(hex(zeroblob(400000)), '0', 'a'), replace(hex(zeroblob(200000)), '0', 'a') || 'b') AS n;"""


@pytest.mark.parametrize("view", ["of many steps", "of one step, which nothing can end"])
def test_a_fork_waits_for_no_read_and_holds_up_no_message(view, tmp_path):
    code = """
reading = threading.Thread(target=lambda: client.simulate_get("/slow", headers=headers), daemon=True)
used = time.process_time()
reading.start()
while time.process_time() < used + 0.3: time.sleep(0.01)
started = time.monotonic()
if os.fork() == 0: os._exit(0)
print(post("1").status_code, time.monotonic() - started < 1, reading.is_alive(), flush=True)
os._exit(0)
"""
    with embedding(tmp_path, code, SLOW_VIEW if view == "of many steps" else SLOW_STEP) as process:
        assert process.communicate(timeout=60)[0] == "201 True True\n"


def test_a_child_that_is_refused_touches_no_file_of_the_database(tmp_path):
    code = """
client.simulate_get("/messages", headers=headers)
if os.fork() == 0:
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    print(post("2").status_code, client.simulate_get("/messages", headers=headers).status_code, flush=True)
    os._exit(0)
os.wait()
"""
    told = tmp_path / "told"
    with embedding(tmp_path, code) as process:
        child = process.stdout.readline().strip()
        with subprocess.Popen(["strace", "-f", "-qq", "-y", "-o", told, "-p", child]):  # ends with the child
            status = Path(f"/proc/{child}/status")
            wait_until(lambda: "TracerPid:\t0\n" not in status.read_text(), "it is not traced")
            assert process.communicate("go on\n", timeout=60)[0] == "503 503\n"
    calls = told.read_text()
    assert '"503' in calls  # so what it did was seen
    assert "inlet.db" not in calls


def test_a_removed_wal_is_saved_also_when_the_process_forks_before_it_writes(tmp_path):
    code = """
ids = [post(str(n)).json["id"] for n in range(100)]
client.simulate_get("/messages", headers=headers)
os.unlink(os.environ["INLET_DATABASE"] + "-wal")
if os.fork() == 0: os._exit(0)
post("100")
page = client.simulate_get("/messages?limit=1000", headers=headers).json["messages"]
print(set(ids) <= {message["id"] for message in page}, flush=True)
"""
    with embedding(tmp_path, code) as process:
        assert process.communicate(timeout=60)[0] == "True\n"


def test_a_signal_while_a_process_forks_beside_its_first_request_spoils_nothing(tmp_path):
    """If the fork waits, the handler raises in the thread that forks, and Python forks all the same."""
    code = """
import os, signal, sys, threading, time, falcon.testing, service
client = falcon.testing.TestClient(service.application)
headers = {"Authorization": "Bearer " + sys.argv[1], "Content-Type": "application/json"}
post = lambda body="1": client.simulate_post("/messages", body=body, headers=headers).status_code
forks = True
def interrupt(*_):
    if forks: raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupt)
results = []
first = threading.Thread(target=lambda: results.append(post("1")))
first.start()
def waits(): return any(os.path.realpath(f"/proc/self/fd/{n}").endswith("-lock") for n in os.listdir("/proc/self/fd"))
while not waits(): time.sleep(0.01)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
if os.fork() == 0:
    if os.fork() == 0: os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
forks = False
print("forked", flush=True)
print(os.wait()[1])
first.join()
print(results, post("2"), client.simulate_get("/messages", headers=headers).status_code)
"""
    with held(database(tmp_path, stream_sql("messages"))) as lock, embedding(tmp_path, code, is_used=False) as process:
        assert process.stdout.readline() == "forked\n"
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert process.communicate(timeout=60)[0] == "0\n[201] 201 200\n"


def test_the_wal_is_looked_at_once_a_second_and_not_for_each_message(tmp_path):
    """After a look, Linux notes the exact time of the next write, and the COMMIT takes a third longer. The folder has
    to be at rest for a second: whatever changes in it can be the WAL.
    """
    database(tmp_path)
    server, told = Server(tmp_path), tmp_path.parent / "told"
    try:
        connection = server.connect()
        assert send(connection, "POST", "/messages", "1")[0] == 201
        time.sleep(2)
        started = time.monotonic()
        command = [
            "strace",
            "-f",
            "-qq",
            "-e",
            "trace=stat,newfstatat,statx,fdatasync",
            "-o",
            told,
            "-p",
            str(server.pid),
        ]
        with subprocess.Popen(command) as tracer:
            while time.monotonic() < started + 3:
                assert send(connection, "POST", "/messages", "1")[0] == 201
            tracer.terminate()
        calls = told.read_text().splitlines()
        assert sum("fdatasync" in call for call in calls) > 100
        assert 1 <= sum("-wal" in call for call in calls) <= 10  # for its identity, and its size
        (tmp_path / "inlet.db-wal").rename(tmp_path / "elsewhere")  # and a WAL that goes is noticed at once
        assert send(connection, "POST", "/messages", "1")[0] == 201
        assert "was removed or replaced" in (tmp_path / "log").read_text()
    finally:
        server.kill()


def test_a_sync_that_hangs_is_503_in_time_for_all_who_wait(tmp_path):
    """Also for the message that is in the COMMIT, and for those behind it."""
    database(tmp_path)
    server = Server(tmp_path)
    assert send(server.connect(), "POST", "/messages", "0", Idempotency_Key="0")[0] == 201
    answers = []

    def post(n):
        started = time.monotonic()
        status = send(server.connect(), "POST", "/messages", str(n), Idempotency_Key=str(n))[0]
        answers.append((status, round(time.monotonic() - started)))

    with failing(server, "fdatasync:delay_enter=15000000:when=1"):
        threads = [threading.Thread(target=post, args=(n,)) for n in range(1, 5)]
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join()
        assert {status for status, _ in answers} == {503}
        assert {seconds for _, seconds in answers} <= {10, 11}
        metrics = send(server.connect(), "GET", "/metrics")[2].decode()
        assert (
            'inlet_requests_total{stream="messages",status="503"} 4' in metrics
        )  # the alert does not wait for the disk
    assert server.end() == 0
    assert sql(tmp_path / "inlet.db", "SELECT count(*) = count(DISTINCT key) FROM messages") == [(1,)]


@pytest.mark.parametrize("messages", [1, 50])
def test_commands_wait_until_a_removed_wal_is_saved(messages, tmp_path):
    """A second WAL below the -shm of a running service would destroy both."""
    database(tmp_path)
    with contextlib.closing(Server(tmp_path)) as server:
        for n in range(messages):
            assert send(server.connect(), "POST", "/messages", str(n))[0] == 201
        (tmp_path / "inlet.db-wal").unlink()
        refused = run(tmp_path, "client", "add", "bob")
        assert refused.returncode == 2
        assert "was removed" in refused.stderr
        assert send(server.connect(), "POST", "/messages", '"next"')[0] == 201
        assert run(tmp_path, "client", "add", "bob").returncode == 0
        assert server.end() == 0
    assert sql(tmp_path / "inlet.db", "SELECT count(*) FROM messages") == [(messages + 1,)]


def test_a_database_in_place_of_another_is_noticed_also_if_its_folder_looks_as_before(tmp_path):
    """As tar and rsync leave it: with its own time. Each message after that is in the new one."""
    database(tmp_path)
    with contextlib.closing(Server(tmp_path)) as server:
        connection = server.connect()
        assert send(connection, "POST", "/messages", '"old"')[0] == 201
        (copy := tmp_path.parent / "copy").mkdir()
        database(copy)
        time.sleep(2.1)
        assert send(connection, "POST", "/messages", '"old"')[0] == 201
        times = tmp_path.stat()
        for suffix in ("-wal", "-shm"):
            (tmp_path / f"inlet.db{suffix}").unlink()
        (copy / "inlet.db").rename(tmp_path / "inlet.db")
        os.utime(tmp_path, ns=(times.st_atime_ns, times.st_mtime_ns))
        statuses = [send(server.connect(), "POST", "/messages", str(n))[0] for n in range(20)]
        assert statuses.count(201) >= 18
        assert server.end() == 0
    assert sql(tmp_path / "inlet.db", "SELECT count(*) FROM messages") == [(statuses.count(201),)]


def test_a_folder_that_is_swapped_while_the_database_is_opened_is_noticed(tmp_path, monkeypatch):
    old, new, away = (tmp_path / name for name in ("data", "new", "away"))
    for folder in (old, new):
        folder.mkdir()
        database(folder)
    schema = service.read_schema(old / "schema.sql")
    store = service.Store(service.Database(old / "inlet.db"), schema)
    real = service.connect

    def swapped(*arguments):
        db = real(*arguments)
        if new.exists():
            old.rename(away)
            new.rename(old)
        return db

    monkeypatch.setattr(service, "connect", swapped)
    results = []
    for n in range(3):
        with contextlib.suppress(service.Problem):
            results.append(store.append(service.Entry(schema.streams["messages"], "x", None, [str(n)])))
    store.close()
    assert len(results) >= 2
    assert sql(old / "inlet.db", "SELECT count(*) FROM messages") == [(len(results),)]
