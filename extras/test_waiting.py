"""wait=SECONDS: a page that is empty comes when there is something to read."""

import contextlib
import json
import os
import socket
import statistics
import threading
import time

import pytest
from falcon.testing import create_environ

import service
from test_service import (
    AUTHORIZATION,
    DEADLINE_S,
    Process,
    add_tester,
    append,
    client_of,
    database_of,
    eventually,
    for_many_tests,
    rows,
    send,
    stream_sql,
)

SCHEMA = (
    stream_sql("messages", ", n INTEGER AS (body ->> 'n')")
    + stream_sql("copies")
    + "CREATE TRIGGER copy AFTER INSERT ON messages WHEN NEW.n = 7 BEGIN INSERT INTO copies (received_at, client, body)"
    " VALUES (NEW.received_at, NEW.client, NEW.body); END;\n"
    + "CREATE VIEW large AS SELECT * FROM messages WHERE n > 100;\n"
    + "CREATE VIEW larger AS SELECT * FROM large WHERE n > 200;\n"
)


@pytest.fixture(scope=for_many_tests)
def server(tmp_path_factory):
    """Tests read after what the others have stored."""
    folder = tmp_path_factory.mktemp("waiting")
    (folder / "schema.sql").write_text(SCHEMA)
    with contextlib.closing(Process(folder, "--schema", str(folder / "schema.sql"))) as server:
        add_tester(server.database)
        eventually(lambda: send(server.connect(), "GET", "/")[0] == 200)
        yield server


def newest(server, stream="messages"):
    """The highest id of a stream, or 0."""
    return rows(server, f"SELECT coalesce(max(id), 0) FROM {stream}")[0][0]


class Waiting(threading.Thread):
    """A GET on its own connection; what came, and after how many seconds."""

    def __init__(self, server, path):
        super().__init__(daemon=True)
        self._connection, self._path = server.connect(), path
        self.began = time.monotonic()
        self.start()

    def run(self):
        with contextlib.closing(self._connection) as connection:
            self.status, _, data = send(connection, "GET", self._path)
            self.ended = time.monotonic()
            self.page = json.loads(data)

    @property
    def took_s(self):
        self.join(DEADLINE_S)
        assert not self.is_alive()
        assert self.status == 200, self.page
        return self.ended - self.began

    @property
    def bodies(self):
        assert self.took_s >= 0
        return [message["body"] for message in self.page["messages"]]


def post(server, body, stream="messages"):
    with contextlib.closing(server.connect()) as connection:
        assert send(connection, "POST", f"/{stream}", body)[0] == 201


def test_an_empty_page_comes_when_a_message_does_or_at_the_deadline(server):
    last = newest(server)
    waiting = Waiting(server, f"/messages?after={last}&wait=30")
    time.sleep(0.3)
    assert waiting.is_alive()
    post(server, '{"n": 1}')
    assert waiting.bodies == [{"n": 1}]
    assert 0.3 < waiting.took_s < 5
    assert waiting.page["next"] == f"/messages?after={last + 1}&wait=30"
    assert Waiting(server, "/messages?wait=30").took_s < 5  # it is not empty
    late = Waiting(server, f"/messages?after={last + 1}&wait=1")
    assert late.bodies == []
    assert 0.9 < late.took_s < 5
    assert late.page["next"] == f"/messages?after={last + 1}&wait=1"


@pytest.mark.parametrize(("path", "other", "news"), [
    ("/messages?n=2&", '{"n": 1}', '{"n": 2}'), ("/large?fields=1&", '{"n": 1}', '{"n": 101}'),
    ("/larger?n=300&", '{"n": 250}', '{"n": 300}'), ("/copies?", '{"n": 8}', '{"n": 7}'),
])  # fmt: skip
def test_what_does_not_fit_ends_no_wait_and_what_does_ends_it(path, other, news, server):
    last = newest(server, "copies" if "copies" in path else "messages")
    waiting = Waiting(server, f"{path}after={last}&wait=30")
    for _ in range(3):
        post(server, other)
        time.sleep(0.1)
    assert waiting.is_alive()
    post(server, news)
    assert waiting.bodies == [json.loads(news)]
    assert waiting.took_s < 5


def test_rows_count_whoever_wrote_them(server):
    last = newest(server)
    waiting = Waiting(server, f"/messages?after={last}&wait=30")
    time.sleep(0.2)
    with database_of(server) as db:
        db.execute("INSERT INTO messages (received_at, client, body) VALUES ('t', 'c', '1')")
    assert waiting.bodies == [1]
    waiting = Waiting(server, f"/messages?after={last + 1}&wait=30")
    with contextlib.closing(Process(server.folder, "--schema", str(server.folder / "schema.sql"))) as other:
        post(other, "2")
    assert waiting.bodies == [2]


def test_no_wake_up_is_lost(server):
    """A sender that sends as soon as the consumer has asked, at all moments of its request."""
    path, delays = f"/messages?after={newest(server)}&wait=20", []
    with contextlib.closing(server.connect()) as sender:
        for n in range(60):
            waiting = Waiting(server, path)
            time.sleep(n % 15 / 1000)
            assert send(sender, "POST", "/messages", f'{{"n": {n}}}')[0] == 201
            sent = time.monotonic()
            assert waiting.bodies == [{"n": n}]
            delays.append(waiting.ended - sent)
            path = waiting.page["next"]
    assert max(delays) < 5  # and not the 20 s of the wait
    assert statistics.median(delays) < 0.2


def test_who_waits_holds_no_thread_and_a_stop_ends_the_wait_with_an_empty_page(open_store, server_with):
    open_store(SCHEMA)
    server = server_with()
    waiting = [Waiting(server, "/messages?wait=60") for _ in range(40)]
    time.sleep(0.5)
    with contextlib.closing(server.connect()) as connection:
        for _ in range(20):
            assert send(connection, "GET", "/messages")[0] == 200  # eight threads read
    assert all(each.is_alive() for each in waiting)
    began = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - began < 5
    assert all(each.bodies == [] for each in waiting)


def test_a_token_that_is_removed_ends_the_wait(server):
    add_tester(server.database, "other", "other")
    eventually(lambda: send(server.connect(), "GET", "/", Authorization="Bearer other")[0] == 200)
    with contextlib.closing(server.connect()) as connection:
        path, answer = f"/messages?after={newest(server)}&wait=30", []
        get = threading.Thread(
            target=lambda: answer.append(send(connection, "GET", path, Authorization="Bearer other"))
        )
        get.start()
        time.sleep(0.2)
        with database_of(server) as db:
            db.execute("DELETE FROM clients WHERE name = 'other'")
        time.sleep(1.2)
        post(server, "1")
        get.join(DEADLINE_S)
    assert answer[0][0] == 401


def test_where_nothing_can_hold_it_a_page_comes_at_once(open_store):
    store = open_store(SCHEMA)
    client = client_of(store)
    began = time.monotonic()
    assert client.get("/messages?wait=60").json == {"messages": [], "next": "/messages?after=0&wait=60"}
    assert time.monotonic() - began < 1
    append(store, "messages", "1")
    assert len(client.get("/messages?wait=60").json["messages"]) == 1
    for bad in ("61", "-1", "", "x", "1.5"):
        assert client.get(f"/messages?wait={bad}").status_code == 400


def runs_of(store, path, posts):
    """When a held GET runs again while messages come, and its answer. This is what connection.py does."""
    app, runs, answers = client_of(store).app, [], []
    doors = {"inlet.arrived_at": time.monotonic(), "inlet.may_hold": lambda: True, "inlet.held": None}
    doors |= {"inlet.is_abandoned": lambda: False}

    def run():
        where, _, query = path.partition("?")
        environ = create_environ(path=where, query_string=query, headers=AUTHORIZATION) | doors
        content = b"".join(app(environ, lambda *_: None))
        doors["inlet.held"] = environ.get("inlet.hold")
        if doors["inlet.held"]:
            doors["inlet.held"].held(lambda: runs.append(time.monotonic()) or run())
        else:
            answers.append(json.loads(content))

    run()
    for body in posts:
        append(store, "messages", body)
        time.sleep(0.15)
    return runs, answers


def test_a_filter_reads_only_what_is_new(open_store, monkeypatch):
    """Or many that wait would read all of a large table at each message."""
    store = open_store(SCHEMA)
    for n in range(20):
        append(store, "messages", f'{{"n": {n}}}')
    read, page = [], store.page
    monkeypatch.setattr(
        store, "page", lambda stream, after, *more, **named: read.append(after) or page(stream, after, *more, **named)
    )
    runs, answers = runs_of(store, "/messages?n=999&wait=30", ['{"n": 1}', '{"n": 2}', '{"n": 999}'])
    eventually(lambda: answers)
    assert read[0] == 0
    assert min(read[1:-1]) >= 20
    assert read[-1] == 0  # of what is found, all is read: older rows can fit by now as well
    assert [message["id"] for message in answers[0]["messages"]] == [23]
    assert answers[0]["next"] == "/messages?after=23&wait=30&n=999"
    assert 1 <= len(runs) <= 3


def test_what_fits_since_it_was_changed_comes_with_what_is_new(open_store):
    """And so does all that comes after a backup was put in the place of the database, whatever ids it had."""
    store = open_store(
        stream_sql("messages", ", released INTEGER, n INTEGER AS (body ->> 'n'), is_out INTEGER AS (released)")
        + "CREATE TRIGGER release AFTER INSERT ON messages WHEN NEW.n = 9 BEGIN UPDATE messages SET released = 1; END;\n"
    )
    for _ in range(3):
        append(store, "messages", "{}")
    _, answers = runs_of(store, "/messages?is_out=1&wait=30", ["{}", '{"n": 9}'])
    eventually(lambda: answers)
    assert [message["id"] for message in answers[0]["messages"]] == [1, 2, 3, 4, 5]


def test_who_waits_for_ids_that_are_far_away_is_not_woken(open_store):
    store = open_store(SCHEMA)
    runs, answers = runs_of(store, "/messages?after=1000&wait=30", ["1", "2", "3"])
    assert (runs, answers) == ([], [])


def test_the_client_that_waits_most_makes_room_for_others(open_store, monkeypatch):
    """One token could take all of it, and nobody else could wait."""
    module, store = service.extra("waiting"), open_store(SCHEMA)
    monkeypatch.setattr(module, "MOST_HELD", 4)
    waits, messages, released = module.Waits(store), store.schema.streams["messages"], []

    def waiting(client, held=None, is_empty=True):
        """The environ of a GET that is held, because its page is empty, or None."""
        environ = {"inlet.arrived_at": time.monotonic(), "inlet.may_hold": lambda: True, "inlet.held": held}
        environ |= {"inlet.is_abandoned": lambda: False}
        if not (wait := waits.begin(environ, client, messages, 0, 30)):
            return None
        if not is_empty or not wait.hold(environ):
            return None
        environ["inlet.hold"].held(lambda: released.append(wait))
        return environ

    first = [waiting("greedy") for _ in range(4)]
    assert all(first)
    assert waiting("greedy") is None  # it makes no room for itself
    assert waiting("modest", is_empty=False) is None
    assert all(environ["inlet.hold"].deadline for environ in first)  # who does not wait takes no room
    assert waiting("modest")
    assert waiting("another")
    assert waiting("another") is None  # it would have as many as the one that has most
    eventually(lambda: len(released) == 2)
    assert all(environ["inlet.hold"] in released for environ in first[:2])
    assert waits.count == 4
    monkeypatch.setattr(module, "MOST_HELD", 100)
    assert (
        waiting("greedy", held=released[0]) is None
    )  # it gets its page, and does not wait again, though there is room


def get_of(path):
    """A request, as bytes."""
    return f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: {AUTHORIZATION['Authorization']}\r\n\r\n".encode()


def test_a_client_that_has_gone_is_noticed_whatever_it_has_sent_before(server):
    with contextlib.closing(server.connect()) as connection:
        assert send(connection, "GET", "/messages")[0] == 200
    files = len(os.listdir(f"/proc/{server.process.pid}/fd")) if os.path.exists("/proc/self/fd") else 0
    request = get_of(f"/messages?after={newest(server)}&wait=60")
    crowd = [server.socket(request) for _ in range(50)]
    time.sleep(0.5)
    for sock in crowd:
        sock.sendall(b"\r\n")
        sock.close()
    if files:
        eventually(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) < files + 10)


def test_who_closes_only_its_own_side_gets_an_empty_page(server):
    path = f"/messages?after={newest(server)}&wait=60"
    with server.socket(get_of(path)) as sock:
        time.sleep(0.2)
        sock.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert received.endswith(f'{{"messages": [], "next": "{path}"}}'.encode())


def test_one_slow_look_delays_nobody_for_long(open_store, monkeypatch):
    store = open_store(SCHEMA)
    waits = service.extra("waiting").Waits(store)
    reader = store.database.reader

    @contextlib.contextmanager
    def slow(*arguments):
        with reader(*arguments) as db:
            time.sleep(0.3)
            yield db

    monkeypatch.setattr(store.database, "reader", slow)
    waits._look()
    assert waits._pause_s <= 0.2
