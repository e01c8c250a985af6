"""Three real nodes of rqlite, each in a network namespace of its own, and two front ends: what can break, and does."""

import contextlib
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from urllib.request import Request, urlopen

import pytest
from common import SCHEMA, Ledger, Server, at_once, database, seed, wait_until

import service
from test_service import DEADLINE_S, HERE, TOKEN, send, stream_sql

rqlite, same, migrate = (service.extra(name) for name in ("rqlite", "same", "migrate"))
NotTaken = service.extra("nodes").NotTaken
RQLITED = os.environ.get("INLET_RQLITED") or shutil.which("rqlited")
ADDRESSES = [f"10.77.0.{n}" for n in (1, 2, 3)]
URL = f"http://{','.join(f'{address}:4001' for address in ADDRESSES)}"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def network():
    """Three namespaces on one bridge. The front ends stand outside of them, on the bridge."""
    assert RQLITED, "rqlited is not here: INLET_RQLITED names it"

    def remove():
        for n in (1, 2, 3):  # the link first: a namespace goes some time after its deletion
            subprocess.run(["ip", "link", "delete", f"inlet-veth-{n}"], capture_output=True)
            subprocess.run(["ip", "netns", "delete", f"inlet-{n}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", "inlet-bridge"], capture_output=True)

    remove()
    ip("link", "add", "inlet-bridge", "type", "bridge")
    ip("address", "add", "10.77.0.254/24", "dev", "inlet-bridge")
    ip("link", "set", "inlet-bridge", "up")
    for n, address in enumerate(ADDRESSES, 1):
        ip("netns", "add", f"inlet-{n}")
        ip("link", "add", f"inlet-veth-{n}", "type", "veth", "peer", "name", "eth0", "netns", f"inlet-{n}")
        ip("link", "set", f"inlet-veth-{n}", "master", "inlet-bridge", "up")
        ip("-n", f"inlet-{n}", "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", f"inlet-{n}", "link", "set", "eth0", "up")
        ip("-n", f"inlet-{n}", "link", "set", "lo", "up")
    yield
    remove()


class Node:
    """One rqlited in its namespace."""

    def __init__(self, number, folder, without=(), join=""):
        self.name, self.address, self.folder = f"inlet-{number}", ADDRESSES[number - 1], folder / f"node-{number}"
        self.within = ["ip", "netns", "exec", self.name]
        raft = ",".join(f"{address}:4002" for address in ADDRESSES)
        where = ["-http-addr", f"{self.address}:4001", "-raft-addr", f"{self.address}:4002"]
        together = {"-bootstrap-expect": "3", "-join": raft}
        self.flags = ["-node-id", self.name, *where]
        self.flags += [word for flag, value in together.items() if flag not in without for word in (flag, value)]
        self.command = [RQLITED, "-fk", *self.flags, str(self.folder)]
        if join:
            self.start_by_node_sh(JOIN=join)
        else:
            self.start()

    def start(self):
        with open(f"{self.folder}.log", "a") as log:
            command = [*self.within, *self.command]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def start_by_node_sh(self, **environ):
        """Run it by node.sh, from now on."""
        script = [f"RQLITED={RQLITED}", HERE / "cluster" / "node.sh", str(self.folder), *self.flags]
        self.command = ["env", *(f"{name}={value}" for name, value in environ.items()), *script]
        self.start()

    def kill(self):
        """End it and what it has started: a rqlited that is left would fail all tests that follow."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not self.is_there(), f"{self.name} does not end")  # a child of node.sh may take a moment

    def is_there(self):
        with contextlib.suppress(OSError), socket.create_connection((self.address, 4001), 0.5):
            return True

    def signal(self, number):
        self.process.send_signal(number)

    def ask(self, path, statements=None):
        data = None if statements is None else json.dumps(statements).encode()
        request = Request(f"http://{self.address}:4001{path}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=2) as answer:
            return answer.read().decode()

    def query(self, sql):
        return json.loads(self.ask("/db/query?level=none", [sql]))["results"][0].get("values", [])

    def is_ready(self):
        with contextlib.suppress(OSError):
            return "[+]leader ok" in self.ask("/readyz")

    def is_leader(self):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads(self.ask("/status"))["store"]["raft"]["state"] == "Leader"

    def cut_off(self, verb):
        """Add (-A) or delete (-D) the rules that drop what comes from the others, and goes to them."""
        for other in ADDRESSES:
            if other != self.address:
                for chain, side in (("INPUT", "-s"), ("OUTPUT", "-d")):
                    rule = [verb, chain, side, other, "-j", "DROP"]
                    subprocess.run(["ip", "netns", "exec", self.name, "iptables", *rule], check=True)


class Cluster:
    """Three nodes, and two front ends, which have a client."""

    def __init__(self, folder):
        self.folder, self.front_ends = folder, []
        (folder / "schema.sql").write_text(SCHEMA)
        self.nodes = [Node(number, folder) for number in (1, 2, 3)]
        self.wait_until_ready()

    def start_front_ends(self):
        folder = self.folder
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / "schema.sql").write_text(SCHEMA)
            self.front_ends.append(Server(folder / name, "--database", URL))
            if not self.rows("SELECT 1 FROM clients WHERE name = 'tester'"):
                self.write(
                    "INSERT INTO clients (name, token, can) VALUES ('tester', ?, 'write read')",
                    service.digest_of(TOKEN),
                )

    def wait_until_ready(self):
        for node in self.nodes:
            wait_until(node.is_ready, f"{node.name} is not ready", 40)

    def command(self, *words, schema=SCHEMA, given=None):
        """Run a command on the cluster: (status, stdout, stderr)."""
        (self.folder / "schema.sql").write_text(schema)
        files = ["--database", URL, "--schema", str(self.folder / "schema.sql")]
        line = [sys.executable, str(HERE / "service.py"), *words, *files]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, input=given)
        return done.returncode, done.stdout, done.stderr

    def rows(self, sql):
        """What the leader has."""
        return json.loads(self.leader().ask("/db/query?level=strong", [sql]))["results"][0].get("values", [])

    def write(self, sql, *values):
        result = json.loads(self.leader().ask("/db/execute", [[sql, *values]]))["results"][0]
        assert "error" not in result, result

    def leader(self):
        found = []
        wait_until(lambda: found.extend(node for node in self.nodes if node.is_leader()) or found, "there is no leader")
        return found[0]

    def follower(self):
        leader = self.leader()
        return next(node for node in self.nodes if node is not leader)

    def ledger(self):
        chosen = seed()
        return Ledger(lambda: chosen.choice(self.front_ends).connect(), chosen=chosen)

    def end(self):
        for node in self.nodes:
            node.kill()

    def check_nodes(self):
        """The messages, which all nodes have."""
        self.wait_until_ready()
        sql = "SELECT id, key, body FROM messages ORDER BY id"
        wait_until(lambda: len({json.dumps(node.query(sql)) for node in self.nodes}) == 1, "the nodes differ")
        return self.nodes[0].query(sql)

    def check(self, ledger, follower):
        """Whatever has happened: what was acknowledged is there once, the nodes are equal, and the feed is complete."""
        ledger.must_answer()
        stored = [(message_id, key, body.encode()) for message_id, key, body in self.check_nodes()]
        count = ledger.check_rows(stored)
        wait_until(lambda: follower.seen and follower.seen[-1] == stored[-1][0], "the feed has not come to its end")
        assert follower.seen == [message_id for message_id, _, _ in stored]
        statuses = dict(ledger.statuses)
        print(f"{count} stored, statuses {statuses}, longest gap {ledger.longest_gap():.1f} s", end=" ")
        assert statuses.keys() <= {201, 422, 503, None}
        for front_end in self.front_ends:
            assert "Traceback" not in front_end.log


class Follower:
    """Follows the feed, now at one front end and now at the other."""

    def __init__(self, cluster):
        self.seen, self.stopped = [], False
        self._cluster, self._thread = cluster, threading.Thread(target=self._follow, daemon=True)

    def _follow(self):
        path, turn = "/messages?limit=1000", 0
        while not self.stopped:
            turn += 1
            with (
                contextlib.suppress(OSError, http.client.HTTPException),
                contextlib.closing(self._cluster.front_ends[turn % 2].connect()) as connection,
            ):
                status, _, data = send(connection, "GET", path)
                if status == 200:
                    page = json.loads(data)
                    self.seen += [message["id"] for message in page["messages"]]
                    path = page["next"]
            time.sleep(0.05)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stopped = True
        self._thread.join(DEADLINE_S)


@pytest.fixture
def nodes(network, tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.end()


@pytest.fixture
def cluster(nodes):
    nodes.start_front_ends()
    return nodes


@contextlib.contextmanager
def under_load(cluster):
    """16 senders for as long as the block runs, and then all that has to hold."""
    ledger = cluster.ledger()
    with Follower(cluster) as follower:
        with ledger.sending(16):
            wait_until(lambda: len(ledger.acknowledged) > 100, "nothing is taken")
            yield ledger
        cluster.check(ledger, follower)


def taken_again(ledger, within_s=20):
    """Wait until messages are taken as before."""
    count, at = len(ledger.taken_at) + 100, time.monotonic()
    wait_until(lambda: len(ledger.taken_at) > count and ledger.taken_at[-1] > at + 0.5, "no message is taken", within_s)


def test_a_leader_that_is_killed_ten_times(cluster):
    with under_load(cluster) as ledger:
        gaps = []
        for _ in range(10):
            leader, count = cluster.leader(), len(ledger.taken_at)
            leader.kill()
            taken_again(ledger)
            gaps.append(max(after - before for before, after in pairwise(ledger.taken_at[count - 1 :])))
            leader.start()
            wait_until(leader.is_ready, "the node does not come back")
    print(f"gaps: {median(gaps):.1f} s at the median, {min(gaps):.1f} to {max(gaps):.1f} s", end=" ")
    assert ledger.longest_gap() < 8


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_a_node_that_hangs(role, cluster):
    with under_load(cluster) as ledger:
        node = getattr(cluster, role)()
        node.signal(signal.SIGSTOP)
        try:
            taken_again(ledger)
        finally:
            node.signal(signal.SIGCONT)
        taken_again(ledger)
    assert ledger.longest_gap() < 12


def test_without_a_majority_every_answer_is_503_until_it_is_back(cluster):
    with under_load(cluster) as ledger:
        two = cluster.nodes[1:]
        for node in two:
            node.kill()
        lost = ledger.statuses.copy()
        time.sleep(2)
        later = ledger.statuses.copy()
        time.sleep(10)
        assert (ledger.statuses - later).keys() <= {503}
        assert (ledger.statuses - lost)[503] >= 10  # of 16 senders, who wait for up to 11 s
        connection = cluster.front_ends[0].connect()
        assert send(connection, "GET", "/healthz")[0] == 503
        for node in two:
            node.start()
        taken_again(ledger, 40)


def test_all_nodes_are_killed(cluster):
    with under_load(cluster) as ledger:
        for node in cluster.nodes:
            node.kill()
        time.sleep(1)
        for node in cluster.nodes:
            node.start()
        taken_again(ledger, 40)


def test_a_front_end_is_killed(cluster):
    with under_load(cluster) as ledger:
        for _ in range(5):
            time.sleep(0.5)
            cluster.front_ends[0].kill()
            cluster.front_ends[0].start()
        taken_again(ledger)


def test_a_leader_that_is_cut_off_from_the_others(cluster):
    with under_load(cluster) as ledger:
        leader = cluster.leader()
        leader.cut_off("-A")
        taken_again(ledger)
        time.sleep(2)
        leader.cut_off("-D")
        taken_again(ledger)
    assert ledger.longest_gap() < 10


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_node_sh_kills_a_node_before_its_disk_is_full_and_starts_it_when_there_is_room(role, cluster):
    node = getattr(cluster, role)()
    node.kill()
    moved = node.folder.rename(node.folder.with_name("moved"))
    node.folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(node.folder)], check=True)
    filler, log = node.folder / "filler", Path(f"{node.folder}.log")
    try:
        shutil.copytree(moved, node.folder, dirs_exist_ok=True)
        node.start_by_node_sh(ROOM_MIB="100")
        cluster.wait_until_ready()
        with under_load(cluster) as ledger:
            filler.write_bytes(bytes(shutil.disk_usage(node.folder).free - 80 * 2**20))
            wait_until(lambda: "the node is killed" in log.read_text(), "the node is not killed")
            taken_again(ledger)
            filler.unlink()
            wait_until(node.is_ready, "the node does not come back")
            taken_again(ledger)
    finally:
        node.kill()
        wait_until(lambda: not subprocess.run(["umount", str(node.folder)]).returncode, "its folder is in use")


def remove(node, asked):
    """README's command: does the cluster confirm it?"""
    body = json.dumps({"id": node.name}).encode()
    request = Request(f"http://{asked.address}:4001/remove", body, method="DELETE")
    with contextlib.suppress(OSError), urlopen(request, timeout=5):
        return True


def test_a_node_that_has_lost_its_folder_is_replaced_as_readme_says(cluster):
    with under_load(cluster) as ledger:
        lost = cluster.leader()
        lost.kill()
        shutil.rmtree(lost.folder)
        taken_again(ledger)
        assert remove(lost, cluster.leader())
        lost.start_by_node_sh(JOIN=f"{cluster.leader().address}:4001")  # the wrong port
        assert lost.process.wait(DEADLINE_S) == 1
        assert (lost.folder / "raft.db").exists()
        lost.start_by_node_sh(JOIN=f"{cluster.leader().address}:4002")
        wait_until(lost.is_ready, "the new node does not come up")
        *_, started = re.findall("launch command: (.*)", Path(f"{lost.folder}.log").read_text())
        assert f" -bootstrap-expect 0 -join {cluster.leader().address}:4002 " in started  # though there was a raft.db
        taken_again(ledger)
        assert [path.stat().st_mode & 0o077 for path in (lost.folder, lost.folder / "db.sqlite")] == [0, 0]


def test_a_node_that_has_forgotten_its_votes_undoes_nothing(cluster):
    """With c down, a and b have X. b loses its folder, a is cut off, and c comes back: b must not vote for c."""
    a, b, c = cluster.nodes
    c.kill()
    taken = retried(cluster.front_ends[0].connect(), '"X"', "x")
    b.kill()
    shutil.rmtree(b.folder)
    b.start_by_node_sh()
    assert b.process.wait(DEADLINE_S) == 1
    assert "has no raft.db" in Path(f"{b.folder}.log").read_text()
    assert not remove(b, a)  # the two others have to agree
    a.cut_off("-A")
    c.start()
    time.sleep(4)
    assert not c.is_leader()
    a.cut_off("-D")
    wait_until(lambda: remove(b, a), "b cannot be removed", 40)
    b.start_by_node_sh(JOIN=f"{a.address}:4002")
    assert [body for _, _, body in cluster.check_nodes()] == ['"X"']
    assert retried(cluster.front_ends[1].connect(), '"X"', "x") == taken


def test_start_sh_keeps_the_others_and_says_how_to_replace_a_lost_node(tmp_path):
    (tmp_path / "data").mkdir()
    script, log = [HERE / "cluster" / "start.sh", tmp_path / "data"], tmp_path / "log"

    @contextlib.contextmanager
    def started():
        with open(log, "w") as file:
            environ = os.environ | {"RQLITED": RQLITED}
            process = subprocess.Popen(script, stdout=file, stderr=file, env=environ, start_new_session=True)
        try:
            wait_until(lambda: "nodes are ready" in log.read_text(), "they are not ready", 90)
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(DEADLINE_S)

    with started():
        assert "3 nodes are ready" in log.read_text()
    shutil.rmtree(tmp_path / "data" / "n2")
    with started():
        assert "2 nodes are ready" in log.read_text()
        (command,) = re.findall(r"(?m)^ +(curl .*JOIN=.*)$", log.read_text())
        with subprocess.Popen(
            ["bash", "-c", command], start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as again:
            try:
                ready = ["curl", "-sf", "http://127.0.0.1:4102/readyz?sync"]
                wait_until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, "it is not back", 40)
            finally:
                os.killpg(again.pid, signal.SIGTERM)


def test_a_node_that_differs_is_told_until_it_is_replaced(cluster):
    """The row is taken out of the file of one node, behind the back of rqlite."""
    schema, database = service.read_schema(cluster.folder / "schema.sql"), service.database_at(URL)

    def compared(comparison):
        comparison.compare()
        return comparison.compared, comparison.differing

    with under_load(cluster):
        comparison = same.Comparison(database, schema)
        for _ in range(5):
            assert compared(comparison) == (3, set())
        comparison.stop()
    for change in ("DELETE FROM messages WHERE id = 50", "UPDATE messages SET client = 'another' WHERE id = 60"):
        comparison = same.Comparison(database, schema)
        comparison.stop()
        node = cluster.follower()
        with contextlib.closing(sqlite3.connect(node.folder / "db.sqlite", isolation_level=None)) as db:
            db.execute(change)
        assert compared(comparison) == (3, {"messages"})
        cluster.front_ends[0].kill()
        cluster.front_ends[0].start()
        connection = cluster.front_ends[0].connect()
        line = b'inlet_cluster_nodes_differ{stream="messages"} 1.0'
        wait_until(lambda: line in send(connection, "GET", "/metrics")[2], "it is not told")
        assert "the nodes differ in messages: " in cluster.front_ends[0].log
        shown = send(connection, "GET", "/metrics")[2].decode()
        rules = (HERE / "deploy" / "prometheus-rules.yml").read_text()
        assert all(f"\n{name}" in shown for name in re.findall(r"inlet_cluster_\w+", rules + README))
        node.kill()
        assert compared(comparison) == (2, set())
        shutil.rmtree(node.folder)
        assert remove(node, cluster.leader())
        node.start_by_node_sh(JOIN=f"{cluster.leader().address}:4002")
        cluster.check_nodes()
        assert compared(comparison) == (3, set())  # also if no message has come
    database.close()


def test_migrate_whose_answer_is_lost_looks_up_what_became_of_it(cluster):
    """Both ways: it was not carried out, and it was."""
    (cluster.folder / "schema.sql").write_text(CHANGED)
    schema, database = service.read_schema(cluster.folder / "schema.sql"), service.database_at(URL)
    database.nodes.sort(key=lambda node: cluster.leader().address not in node.name)
    ask = database.ask

    def lose(node, path, *rest):
        if "execute" in path:
            if is_sent:
                ask(node, path, *rest)
            raise ConnectionResetError("the answer is lost")
        return ask(node, path, *rest)

    is_sent, database.ask = False, lose
    with pytest.raises(sqlite3.OperationalError, match="lost"):
        migrate.run(database, schema)
    is_sent, database._current = True, 0
    assert migrate.run(database, schema) == 0
    assert cluster.rows("SELECT count(*) FROM pragma_table_xinfo('messages') AS c WHERE c.name = 'n'") == [[1]]


class Reader(Node):
    """A node that does not vote, on the bridge."""

    def __init__(self, folder):
        self.name, self.address, self.folder, self.within = "inlet-4", "10.77.0.254", folder / "node-4", []
        where = ["-http-addr", f"{self.address}:4001", "-raft-addr", f"{self.address}:4002"]
        join = ["-raft-non-voter", "-join", ",".join(f"{address}:4002" for address in ADDRESSES)]
        self.command = [RQLITED, "-fk", "-node-id", self.name, *where, *join, str(self.folder)]
        self.start()


def test_a_node_that_does_not_vote_answers_reads_as_long_as_it_hears_from_the_leader(cluster):
    reader = Reader(cluster.folder)
    try:
        wait_until(reader.is_ready, "the reader does not come up", 40)
        (cluster.folder / "c").mkdir()
        (cluster.folder / "c" / "schema.sql").write_text(SCHEMA)
        server = Server(cluster.folder / "c", "--database", f"http://{reader.address}:4001?freshness=2s")
        connection = server.connect()
        assert retried(connection, '"X"', "x")
        wait_until(lambda: b'"body": "X"' in send(connection, "GET", "/messages")[2], "the reader has no message")
        assert send(connection, "GET", "/messages/1")[0] == 200
        for node in cluster.nodes:
            node.kill()
        time.sleep(2.5)
        assert send(connection, "GET", "/messages")[0] == 503
        server.end()
    finally:
        reader.kill()


def test_connections_that_the_nodes_have_closed_fail_no_message(cluster):
    """They are noticed before anything is sent, so that even a message without a key gets its 201."""
    connections = [front_end.connect() for front_end in cluster.front_ends]
    for round_ in range(3):
        for connection in connections:
            assert [send(connection, "POST", "/messages", "1")[0] for _ in range(5)] == [201] * 5, round_
        for node in cluster.nodes:
            node.kill()
        for node in cluster.nodes:
            node.start()
        cluster.wait_until_ready()


def test_a_retry_that_comes_after_a_new_leader_gets_the_first_answer(cluster):
    connections = [front_end.connect() for front_end in cluster.front_ends]
    first = [send(connections[0], "POST", "/messages", str(n), Idempotency_Key=str(n))[2] for n in range(20)]
    cluster.leader().kill()
    for n, answer in enumerate(first):
        for connection in connections:
            again = retried(connection, str(n), str(n))
            assert again == answer


def retried(connection, body, key):
    """The answer to a message with a key that is sent until it is taken."""
    status, deadline = None, time.monotonic() + DEADLINE_S
    while status != 201:
        assert time.monotonic() < deadline, status
        status, _, data = send(connection, "POST", "/messages", body, Idempotency_Key=key)
    return data


# Commands


CHANGED = SCHEMA.replace("bad INTEGER AS", "n INTEGER AS (body ->> 'n'), bad INTEGER AS")


def test_migrate_under_load_loses_nothing(cluster):
    with under_load(cluster):
        for schema in (CHANGED, SCHEMA, CHANGED):
            for file in cluster.folder.glob("*/schema.sql"):  # on the machine of each front end, before it is migrated
                file.write_text(schema)
            status, printed, errors = cluster.command("migrate", schema=schema)
            assert (status, errors) == (0, "")
            assert "table messages has changed" in printed
            time.sleep(0.3)
    assert cluster.rows("SELECT count(*) FROM messages WHERE n IS NOT body ->> 'n'") == [[0]]
    assert cluster.command("migrate", schema=CHANGED)[1].startswith("no table had changed")


def test_migrate_does_what_stands_behind_a_comment(nodes):
    schema = (
        SCHEMA
        + "-- first\nCREATE TABLE x (a UNIQUE);\n-- then\n INSERT OR IGNORE INTO x VALUES (1); /* and */ CREATE INDEX y ON x (a);"
    )
    (nodes.folder / "schema.sql").write_text(SCHEMA)
    service.Store(service.database_at(URL), service.read_schema(nodes.folder / "schema.sql")).open()
    assert nodes.command("migrate", schema=schema)[0] == 0
    assert nodes.rows("SELECT a FROM x") == [[1]]
    assert nodes.rows("SELECT name FROM sqlite_schema WHERE name = 'y'") == [["y"]]


def test_migrate_names_the_messages_that_break_a_new_rule_and_changes_nothing(cluster):
    connection = cluster.front_ends[0].connect()
    for n in range(5):
        assert send(connection, "POST", "/messages", json.dumps({"n": n}))[0] == 201
    before = cluster.rows("SELECT sql FROM sqlite_schema ORDER BY name")
    stricter = SCHEMA.replace(
        ", bad INTEGER AS", ", n INTEGER AS (body ->> 'n') CONSTRAINT \"too many\" CHECK (n < 3), bad INTEGER AS"
    )
    status, _, errors = cluster.command("migrate", schema=stricter)
    assert (status, "messages: 2 broke 'too many': ids 4, 5" in errors) == (1, True)
    assert cluster.rows("SELECT sql FROM sqlite_schema ORDER BY name") == before


PARENT = "CREATE TABLE sensors (name TEXT PRIMARY KEY{more}) STRICT; INSERT OR IGNORE INTO sensors (name) VALUES ('a');"
CHILD = ", sensor TEXT AS (body ->> 'sensor') REFERENCES sensors (name)"


def test_migrate_changes_what_others_refer_to_unless_that_would_delete_messages(nodes):
    def schema(action="", more=""):
        return stream_sql("messages", CHILD + action) + PARENT.format(more=more)

    (nodes.folder / "schema.sql").write_text(schema())
    database = service.database_at(URL)
    service.Store(database, service.read_schema(nodes.folder / "schema.sql")).open()
    nodes.write("INSERT INTO messages (received_at, client, body) VALUES ('t', 'c', ?)", '{"sensor": "a"}')
    assert nodes.command("migrate", schema=schema(more=", place TEXT"))[0] == 0
    assert nodes.rows("SELECT m.id, s.name, s.place FROM messages AS m, sensors AS s WHERE s.name = m.sensor") == [
        [1, "a", None]
    ]
    status, _, error = nodes.command("migrate", schema=schema(" ON DELETE CASCADE", ", place TEXT, more TEXT"))
    assert (status, "ON DELETE" in error) == (2, True), error
    assert nodes.command("migrate", schema=schema(" ON DELETE CASCADE", ", place TEXT"))[0] == 0
    assert nodes.command("migrate", schema=schema(more=", place TEXT, more TEXT"))[0] == 2
    assert nodes.rows("SELECT id FROM messages") == [[1]]
    database.close()


def test_a_file_goes_to_a_cluster_and_back_and_ids_go_on(nodes, tmp_path):
    path = database(tmp_path)
    with contextlib.closing(Server(tmp_path)) as server:
        for n in range(3):
            assert send(server.connect(), "POST", "/messages", str(n), Idempotency_Key=str(n))[0] == 201
    copy = tmp_path / "copy.db"
    service.backup(service.Database(path), copy)
    request = Request(
        f"http://{ADDRESSES[0]}:4001/db/load", copy.read_bytes(), {"Content-Type": "application/octet-stream"}
    )
    with urlopen(request, timeout=DEADLINE_S) as answer:
        assert answer.status == 200
    nodes.start_front_ends()
    connections = [front_end.connect() for front_end in nodes.front_ends]
    assert json.loads(retried(connections[0], "2", "2"))["id"] == 3
    assert json.loads(send(connections[1], "POST", "/messages", "3")[2])["id"] == 4
    nodes.write("DELETE FROM messages WHERE id = 4")
    back = tmp_path / "back"
    back.mkdir()
    assert nodes.command("backup", str(back / "inlet.db")) == (0, "", "")
    (back / "schema.sql").write_text(SCHEMA)
    with contextlib.closing(Server(back)) as server:
        assert json.loads(send(server.connect(), "POST", "/messages", "4")[2])["id"] == 5
        assert json.loads(retried(server.connect(), "0", "0"))["id"] == 1


def test_a_cluster_without_foreign_keys_is_refused(nodes):
    node = nodes.nodes[1]
    node.kill()
    node.command.remove("-fk")
    node.start()
    nodes.wait_until_ready()
    status, _, error = nodes.command()
    assert (status, error.count("\n"), "start it with -fk" in error, node.address in error) == (2, 1, True, True)


def test_a_front_end_starts_while_a_node_hangs(nodes):
    hanging = nodes.follower()
    hanging.signal(signal.SIGSTOP)
    try:
        nodes.start_front_ends()
    finally:
        hanging.signal(signal.SIGCONT)


FEW = (
    "CREATE TABLE x (a, b); CREATE VIEW few AS SELECT count(*) AS n FROM messages WHERE received_at > datetime('now'); "
)


@pytest.mark.parametrize(("more", "words"), [
    *[(f"CREATE TABLE x (a DEFAULT {default});", "table x") for default in (
        "(random())", "CURRENT_TIMESTAMP", "(datetime('now'))", "(unixepoch())", "(strftime('%f'))", "(sqlite_version())", '("random"())', "(1 + (abs(1)))")],
    (stream_sql("jobs", ", due TEXT AS (body ->> 'due') CHECK (due > CURRENT_TIMESTAMP)"), "table jobs.*clock"),
    ("CREATE TABLE x (a CHECK (a > random()));", "table x.*random"), ('CREATE TABLE x (a CHECK (a > "changes"()));', "table x.*counts"),
    ('CREATE TABLE "a b" (a UNIQUE); INSERT OR IGNORE INTO "a b" SELECT id FROM messages;', "the statement.*a b.*ORDER BY"),
    ("CREATE TABLE x (a UNIQUE); INSERT OR IGNORE INTO x VALUES (date('now'));", "the statement.*clock"),
    ("CREATE TABLE x (a UNIQUE); INSERT OR IGNORE INTO x VALUES (1 + random() * 0);", "the statement.*random"),
    ("CREATE TABLE x (a UNIQUE); INSERT OR IGNORE INTO x SELECT id FROM messages;", "the statement.*ORDER BY"),
    ("CREATE TABLE x AS SELECT random() AS a;", "the statement"),
    (FEW + " CREATE VIEW fewer AS SELECT n FROM few; CREATE TRIGGER y BEFORE INSERT ON messages BEGIN SELECT RAISE(ABORT, 'wait') FROM fewer WHERE n > 9; END;", "view few.*clock"),
    (FEW + " CREATE VIEW some AS SELECT id FROM messages LIMIT 3; CREATE TRIGGER y BEFORE INSERT ON messages BEGIN DELETE FROM x WHERE a IN some; END;", "view some.*LIMIT"),
    (FEW + " CREATE TRIGGER y BEFORE INSERT ON messages BEGIN SELECT RAISE(ABORT, 'wait') FROM \"FEW\" WHERE n > 9; END;", "view few.*clock"),
    (stream_sql("events") + "CREATE TABLE x (a); CREATE TRIGGER y AFTER INSERT ON messages BEGIN INSERT INTO events (received_at, client, body) VALUES (NEW.body, 'c', '1'); END;"
     "CREATE TRIGGER z AFTER INSERT ON events BEGIN INSERT INTO x VALUES (date(NEW.received_at)); END;", "trigger z.*NEW.received_at"),
    (stream_sql("events") + "CREATE TABLE x (a); CREATE TRIGGER y AFTER INSERT ON messages BEGIN UPDATE events SET received_at = NEW.body; END;"
     "CREATE TRIGGER z AFTER UPDATE ON events BEGIN INSERT INTO x VALUES (date(NEW.received_at)); END;", "trigger z.*NEW.received_at"),
    (stream_sql("events").replace("received_at", "RECEIVED_AT") + "CREATE TABLE x (a); CREATE TRIGGER y AFTER INSERT ON messages BEGIN UPDATE events SET received_at = NEW.body; END;"
     "CREATE TRIGGER z AFTER UPDATE ON events BEGIN INSERT INTO x VALUES (date(NEW.received_at)); END;", "trigger z.*NEW.received_at"),
    ("CREATE TABLE kinds (name UNIQUE, at); CREATE TRIGGER made AFTER INSERT ON kinds BEGIN UPDATE kinds SET at = datetime('now') WHERE name = NEW.name; END;"
     "INSERT OR IGNORE INTO kinds (name) VALUES ('a');", "trigger made.*clock"),
    ("CREATE TABLE kinds (name UNIQUE, at); CREATE VIEW dice AS SELECT random() AS n; INSERT OR IGNORE INTO kinds (name, at) SELECT 'a', n FROM dice ORDER BY 1;", "view dice.*random"),
    (stream_sql("events") + "CREATE TABLE x (a); CREATE TABLE kinds (name UNIQUE); CREATE TRIGGER y AFTER INSERT ON kinds BEGIN INSERT INTO events (received_at, client, body) VALUES (NEW.name, 'c', '1'); END;"
     "CREATE TRIGGER z AFTER INSERT ON events BEGIN INSERT INTO x VALUES (date(NEW.received_at)); END; INSERT OR IGNORE INTO kinds (name) VALUES ('now');", "trigger z.*NEW.received_at"),
    ("CREATE TABLE kinds (name UNIQUE); INSERT OR IGNORE INTO main.kinds (name) SELECT id FROM messages;", "the statement.*ORDER BY"),
    (stream_sql("audit") + "CREATE TRIGGER y AFTER INSERT ON messages BEGIN INSERT INTO audit (received_at, client, body) VALUES ('t', 'c', '1'); END;"
     "CREATE TRIGGER z AFTER INSERT ON audit BEGIN INSERT INTO \"Messages\" (received_at, client, body) VALUES ('t', 'c', '1'); END;", "of its message"),
    *[(f"CREATE TABLE x (a, b); CREATE TRIGGER y AFTER INSERT ON messages BEGIN {sql}; END;", f"trigger y.*{words}|of its message") for sql, words in (
        ("INSERT INTO x (a) VALUES (random())", "random"), ("INSERT INTO x (a) VALUES (datetime())", "clock"),
        ("INSERT INTO x (a) VALUES (date(NEW.body ->> 'day'))", "received_at"), ("INSERT INTO x (a) VALUES (current_time)", "clock"),
        ("INSERT INTO x (a) VALUES (strftime('%s', NEW.body))", "received_at"), ("INSERT INTO x (a) VALUES (changes())", "counts"),
        ("SELECT RAISE(ABORT, \"words\")", "single quotes"), ("INSERT INTO x (a) VALUES (sqlite_version())", "version"),
        ("INSERT INTO x (a) VALUES (strftime('%H', NEW.received_at, 'localtime'))", "clock"),
        ("INSERT INTO x (a) VALUES (date(NEW.received_at, NEW.body ->> 'by'))", "received_at"),
        ("INSERT INTO x (a) VALUES (\"date\"(NEW.body))", "received_at"), ("INSERT INTO x (a) VALUES (date(NEW.\"received_at\"))", "received_at"),
        ("SELECT RAISE(ABORT, 'no') WHERE (WITH dice AS (SELECT random() AS r) SELECT r FROM dice) > 0", "random"),
        ("SELECT RAISE(ABORT, 'no') WHERE NEW.body > (WITH t AS (SELECT current_timestamp AS c) SELECT c FROM t)", "clock"),
        ("UPDATE x SET a = (SELECT date(received_at) FROM (SELECT NEW.body AS received_at))", "received_at"),
        ("UPDATE x SET a = (SELECT date(new.received_at) FROM (SELECT NEW.body AS received_at) AS new)", "another name"),
        ("UPDATE x SET a = (SELECT date(new.received_at) FROM (SELECT NEW.body AS received_at) \"new\")", "another name"),
        ("UPDATE x SET a = (SELECT file FROM pragma_database_list)", "pragma"), ("UPDATE messages SET received_at = NEW.body", "of its message"), ("INSERT INTO \"x\" (\"a\") SELECT m.id FROM messages AS m", "ORDER BY"),
        ("INSERT INTO x SELECT m.id, 1 FROM messages AS m", "ORDER BY"), ("REPLACE INTO x (a) SELECT id FROM messages", "ORDER BY"),
        ("INSERT INTO x (a) SELECT j.value FROM json_each(NEW.body) AS j JOIN messages", "ORDER BY"),
        ("INSERT INTO x (a) SELECT j.value FROM json_each(NEW.body) AS j, messages", "ORDER BY"),
        ("INSERT INTO x (a) VALUES ((SELECT a FROM x LIMIT 1))", "LIMIT"), ("UPDATE x SET a = (SELECT id FROM messages LIMIT 1)", "LIMIT"),
        ("INSERT INTO x (a) SELECT a FROM x WHERE b IN (SELECT a FROM x ORDER BY a)", "ORDER BY"),
        ("INSERT INTO messages (received_at, client, body) VALUES ('t', 'c', '1')", "of its message"))],
])  # fmt: skip
def test_rules_that_each_node_would_compute_for_itself_are_refused(more, words, tmp_path):
    (tmp_path / "schema.sql").write_text(stream_sql("messages") + more)
    schema = service.read_schema(tmp_path / "schema.sql")
    with pytest.raises(service.SetupError, match=words):
        same.require_deterministic(schema)


def test_rules_that_are_the_same_in_every_node_are_taken(tmp_path):
    """Also SQL that no message reaches."""
    (tmp_path / "schema.sql").write_text(stream_sql("messages", ", day TEXT AS (date(body ->> 'day'))") + """
        CREATE TABLE x (a, b DEFAULT 'now(', c DEFAULT (1 + (2)), changes DEFAULT -1, "limit" CHECK ("limit" > 1), "current_time" TEXT);
        CREATE TABLE changes (at UNIQUE); CREATE TABLE IF NOT EXISTS "time" (at REFERENCES changes (at));
        CREATE VIEW last_hour AS SELECT * FROM messages WHERE received_at > datetime('now', '-1 hour');
        CREATE TRIGGER z AFTER DELETE ON x BEGIN INSERT INTO x (a) VALUES (random()); END;
        CREATE TRIGGER y AFTER INSERT ON messages BEGIN
            INSERT INTO x (a) VALUES (strftime('%Y', NEW.received_at)), (date(NEW.received_at, '-1 day'));
            INSERT INTO x (a) SELECT j.value FROM json_each(NEW.body, '$.list') AS j WHERE j.value > 1;
            INSERT INTO "x" ("limit") VALUES (NEW.body), ("strftime"('%Y', NEW.received_at));
            INSERT INTO changes (at) VALUES (NEW.id); INSERT INTO time (at) VALUES (unixepoch(NEW.received_at));
            INSERT INTO x (a) SELECT NEW.id WHERE NEW.id > (SELECT max(a) FROM x);
            INSERT INTO x (a) VALUES ((SELECT a FROM x ORDER BY a LIMIT 1));
            INSERT INTO x (a, b) SELECT m.id, (SELECT a FROM x ORDER BY a LIMIT 1) FROM messages AS m ORDER BY m.id LIMIT 2;
            SELECT RAISE(ABORT, 'it''s not random()') WHERE NEW.body = '0';
        END;""")  # fmt: skip
    same.require_deterministic(service.read_schema(tmp_path / "schema.sql"))


def test_user_and_password_are_used_and_never_told(tmp_path):
    users = [{"username": "inlet", "password": "se:cret/1", "perms": ["execute", "query", "status", "ready", "backup"]}]
    (tmp_path / "users.json").write_text(json.dumps(users))
    (tmp_path / "schema.sql").write_text(SCHEMA)
    command = [
        RQLITED,
        "-fk",
        "-auth",
        str(tmp_path / "users.json"),
        "-http-addr",
        "127.0.0.1:4190",
        "-raft-addr",
        "127.0.0.1:4191",
    ]
    node = subprocess.Popen([*command, str(tmp_path / "node")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with contextlib.closing(Server(tmp_path, "--database", "http://inlet:se%3Acret%2F1@127.0.0.1:4190")) as server:
            assert send(server.connect(), "GET", "/healthz")[0] == 200
            node.kill()
            wait_until(lambda: send(server.connect(), "GET", "/healthz")[0] == 503, "it says that it is ready")
    finally:
        node.kill()
        node.wait()
    log = (tmp_path / "log").read_text()
    for where in (
        "http://inlet:se%3Acret@127.0.0.1:4190", "http://inlet:secret@[x:4001", "http://inlet:secret@a/path", "http://inlet:4001#secret@a",
        "http://inlet:secret\n@a:4001", "inlet:secret@a", "http//inlet:secret@a", "//inlet:secret@a:1", "HTTP://inlet:secret@a:4001", "http://inlet:secret@a..b:4001", "http:inlet:secret@a:4001", '"http://inlet:secret@a:4001"',
    ):  # fmt: skip
        line = [sys.executable, str(HERE / "service.py"), "--database", where, "client", "list"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=30)
        assert (done.returncode > 0, done.stderr.count("\n")) == (True, 1)
        log += done.stderr
    assert "127.0.0.1:4190" in log
    assert "cret" not in log


def test_nodes_with_tls(tmp_path):
    """The nodes have a certificate, which SSL_CERT_FILE names; a front end that does not know it does not start."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [*make, "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    (tmp_path / "schema.sql").write_text(SCHEMA)
    tls = ["-http-cert", str(certificate), "-http-key", str(key)]
    command = [
        RQLITED,
        "-fk",
        *tls,
        "-http-addr",
        "localhost:4190",
        "-raft-addr",
        "127.0.0.1:4191",
        str(tmp_path / "node"),
    ]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with contextlib.closing(
            Server(tmp_path, "--database", "https://localhost:4190", SSL_CERT_FILE=str(certificate))
        ) as server:
            assert send(server.connect(), "GET", "/healthz")[0] == 200
        line = [sys.executable, str(HERE / "service.py"), "--database", "https://localhost:4190", "client", "list"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=30)
        assert (done.returncode, "CERTIFICATE_VERIFY_FAILED" in done.stderr) == (1, True)
    finally:
        node.kill()
        node.wait()


README = (HERE / "cluster" / "README.md").read_text()


def test_three_nodes_with_mutual_tls_for_both_ports(tmp_path):
    """The flags that README gives. Without a certificate of the authority, nobody is answered."""
    (flags,) = re.findall(r"```sh\n    (-http-cert .*?)```", README, re.DOTALL)

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True)

    openssl(
        *[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=authority",
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
        ]
    )
    (tmp_path / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl(*["req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", "a.key", "-out", "a.csr"])
    openssl(
        *[
            "x509",
            "-req",
            "-in",
            "a.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            "names",
            "-out",
            "a.pem",
        ]
    )
    (tmp_path / "schema.sql").write_text(SCHEMA)
    tls, nodes = flags.replace("\\\n", " ").split(), []
    join = ",".join(f"localhost:{port}" for port in (4291, 4292, 4293))
    try:
        for n in (1, 2, 3):
            where = ["-node-id", f"n{n}", "-http-addr", f"localhost:428{n}", "-raft-addr", f"localhost:429{n}"]
            command = [RQLITED, "-fk", *tls, *where, "-bootstrap-expect", "3", "-join", join, str(tmp_path / f"n{n}")]
            with open(tmp_path / f"n{n}.log", "w") as log:
                nodes.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log))
        url = "https://localhost:4281,localhost:4282,localhost:4283"
        trust = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
        mine = trust | {"INLET_NODE_CERT": str(tmp_path / "a.pem"), "INLET_NODE_KEY": str(tmp_path / "a.key")}
        ready = [
            "curl",
            "-sf",
            "--cacert",
            "ca.pem",
            "--cert",
            "a.pem",
            "--key",
            "a.key",
            "https://localhost:4281/readyz",
        ]
        wait_until(lambda: subprocess.run(ready, cwd=tmp_path, capture_output=True).returncode == 0, "no leader", 40)
        line = [sys.executable, str(HERE / "service.py"), "--database", url, "client", "list"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=30, env=os.environ | trust)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        with contextlib.closing(Server(tmp_path, "--database", url, **mine)) as server:
            assert send(server.connect(), "GET", "/healthz")[0] == 200
        bad = os.environ | mine | {"INLET_NODE_KEY": str(tmp_path / "ca.key")}
        done = subprocess.run(line, capture_output=True, text=True, timeout=30, env=bad)
        assert (done.returncode, "INLET_NODE_CERT" in done.stderr, done.stderr.count("\n")) == (2, True, 1)
    finally:
        for node in nodes:
            node.kill()
            node.wait()


def test_one_node_goes_on_alone_when_the_majority_is_lost_for_good(nodes, monkeypatch):
    """As README says, and the others join again, empty. rqlite replays its log without foreign keys then."""
    product = ", product TEXT AS (body ->> 'product') REFERENCES products (name)"
    products = "CREATE TABLE products (name TEXT PRIMARY KEY); INSERT OR IGNORE INTO products VALUES ('tea');"
    monkeypatch.setitem(globals(), "SCHEMA", SCHEMA + stream_sql("orders", product) + products)
    nodes.start_front_ends()
    cluster, (a, b, c) = nodes, nodes.nodes
    orders = cluster.front_ends[0].connect()
    bodies = ['{"product": "tea"}', '{"product": "milk"}', '{"product": "tea"}']
    assert [send(orders, "POST", "/orders", body)[0] for body in bodies] == [201, 422, 201]
    for n in range(20):
        assert retried(cluster.front_ends[0].connect(), str(n), f"k{n}")
    cluster.check_nodes()
    for node in (b, c):
        node.kill()
        shutil.rmtree(node.folder)
    assert "last_log_index" in json.loads(a.ask("/status"))["store"]["raft"]
    a.kill()
    (content,) = re.findall(r'`(\[\{"id": "a".*?\])`', README)
    peers = content.replace('"a"', f'"{a.name}"').replace('"a:4002"', f'"{a.address}:4002"')
    (a.folder / "raft" / "peers.json").write_text(peers)
    a.start()
    wait_until(a.is_leader, "it does not lead", 40)
    assert retried(cluster.front_ends[1].connect(), "20", "k20")
    for node in (b, c):
        node.start_by_node_sh(JOIN=f"{a.address}:4002")
        wait_until(node.is_ready, "it does not join", 40)
    assert [key for _, key, _ in cluster.check_nodes()] == [f"k{n}" for n in range(21)]
    assert cluster.rows("SELECT id, body FROM orders") == [[1, bodies[0]], [2, bodies[0]]]
    assert retried(cluster.front_ends[0].connect(), "7", "k7")


def test_a_large_file_boots_a_node_and_the_others_join(network, tmp_path):
    path = database(tmp_path)
    with contextlib.closing(Server(tmp_path)) as server:
        for n in range(5):
            assert send(server.connect(), "POST", "/messages", str(n), Idempotency_Key=str(n))[0] == 201
    service.backup(service.Database(path), tmp_path / "checked.db")
    nodes = Cluster.__new__(Cluster)
    nodes.folder, nodes.front_ends, nodes.nodes = tmp_path, [], []
    (command,) = re.findall(r"`(curl -f http://a:4001/boot [^`]*)`", README)
    try:
        first = Node(1, tmp_path, ["-bootstrap-expect", "-join"])
        nodes.nodes.append(first)
        wait_until(first.is_leader, "it does not lead", 40)
        subprocess.run(["sh", "-ec", command.replace("//a:", f"//{first.address}:")], cwd=tmp_path, check=True)
        for number in (2, 3):
            nodes.nodes.append(Node(number, tmp_path, join=f"{first.address}:4002"))
            wait_until(nodes.nodes[-1].is_ready, "it does not join", 40)
        nodes.start_front_ends()
        assert json.loads(retried(nodes.front_ends[0].connect(), "2", "2"))["id"] == 3
        assert json.loads(retried(nodes.front_ends[1].connect(), "5", "5"))["id"] == 6
        assert len(nodes.check_nodes()) == 6
    finally:
        nodes.end()


def test_a_cluster_without_its_scheme_is_not_taken_for_a_file(tmp_path):
    for where in ("127.0.0.1:4101,127.0.0.1:4102", "a:4001", "https:a"):
        with pytest.raises(service.SetupError, match="http://"):
            service.database_at(where)
    for where in (tmp_path / "a:b.db", f"{tmp_path}//inlet.db"):
        assert isinstance(service.database_at(str(where)), service.Database)


# What a group has in common


def served(nodes, sql):
    """A front end on this schema, with a client."""
    (nodes.folder / "schema.sql").write_text(sql)
    server = Server(nodes.folder, "--database", URL)
    nodes.write("INSERT INTO clients (name, token, can) VALUES ('tester', ?, 'write read')", service.digest_of(TOKEN))
    return server


def test_a_rule_that_sounds_like_a_fault_refuses_only_its_message(nodes):
    words = ("interrupted", "context is required", "out of memory", "timeout")
    rules = "".join(f" SELECT RAISE(ABORT, '{text}') WHERE NEW.body ->> 'raise' = '{text}';" for text in words)
    sql = stream_sql(
        "messages",
        ", timeout INTEGER NOT NULL AS (body ->> 'timeout') CONSTRAINT \"timeout must be over 0\" CHECK (timeout > 0)",
    )
    server = served(nodes, sql + f"CREATE TRIGGER t BEFORE INSERT ON messages BEGIN {rules} END;")
    bad = [{}, {"timeout": 0}, *({"timeout": 1, "raise": text} for text in words)]

    def sender(bodies):
        with contextlib.closing(server.connect()) as connection:
            return [send(connection, "POST", "/messages", json.dumps(body))[0] for body in bodies]

    found = at_once(*[lambda: sender(bad * 5)] * 2, *[lambda: sender([{"timeout": 5}] * 30)] * 8)
    assert found == [[422] * 30] * 2 + [[201] * 30] * 8
    lines = "\n".join(['{"timeout": 1}', '{"timeout": 1}', "{}", '{"timeout": 1}'])
    status, _, data = send(server.connect(), "POST", "/messages", lines, Content_Type="application/x-ndjson")
    assert (status, json.loads(data)["line"]) == (422, 3)


def test_what_no_rule_can_be_applied_to_is_refused_as_with_a_file(nodes):
    """rqlite gives no codes, and Inlet does not know all sentences of SQLite. One such line costs only itself."""
    server = served(
        nodes,
        stream_sql("messages", ", odd INTEGER AS (body ->> 'a' LIKE 'x' ESCAPE body ->> 'escape')")
        + "CREATE VIRTUAL TABLE boxes USING rtree (id, low, high); CREATE VIRTUAL TABLE texts USING fts5 (body);"
        "CREATE TRIGGER box AFTER INSERT ON messages WHEN NEW.body ->> 'low' NOT NULL BEGIN"
        " INSERT INTO boxes VALUES (NEW.id, NEW.body ->> 'low', 5); END;"
        "CREATE TRIGGER find AFTER INSERT ON messages WHEN NEW.body ->> 'find' NOT NULL BEGIN"
        " DELETE FROM texts WHERE texts MATCH NEW.body ->> 'find'; END;",
    )
    bad = ['{"a": "b", "escape": "xy"}', '{"low": 9}', '{"find": "a AND"}']
    assert [send(server.connect(), "POST", "/messages", body)[0] for body in bad] == [422] * 3
    lines, lenient = "\n".join(['{"a": 1}', *bad] * 50), {"Prefer": "handling=lenient"}
    status, _, data = send(
        server.connect(),
        "POST",
        "/messages",
        lines,
        Content_Type="application/x-ndjson",
        Idempotency_Key="k",
        **lenient,
    )
    assert (status, json.loads(data)["count"], len(json.loads(data)["refused"])) == (201, 50, 100)


def test_since_misses_nothing_that_two_front_ends_have_stored_in_another_order(nodes):
    """received_at is there before the nodes are asked."""
    server = served(nodes, stream_sql("messages"))
    seconds = [0, 3, 9, 1, 2, 8, 9, 30, 20, 29]
    for second in seconds:
        at = f"2026-11-30T00:00:{second:02}.000Z"
        nodes.write("INSERT INTO messages (received_at, client, body) VALUES (?, 'c', '1')", at)
    for since, first in (("00", 1), ("03", 2), ("04", 3), ("10", 8), ("30", 8), ("31", None)):
        page = json.loads(send(server.connect(), "GET", f"/messages?since=2026-11-30T00:00:{since}Z")[2])
        assert next((message["id"] for message in page["messages"]), None) == first, since
    assert "after=10&" in page["next"]
    assert send(server.connect(), "GET", "/messages?since=0001-01-01")[0] == 200
    with served_senders(server):  # of what comes while it is asked
        for _ in range(100):
            since = service.utc_now()
            page = json.loads(send(server.connect(), "GET", f"/messages?limit=1000&since={since}")[2])
            after, shown = int(re.search(r"after=(\d+)", page["next"])[1]), {m["id"] for m in page["messages"]}
            rows = nodes.rows(f"SELECT id FROM messages WHERE received_at >= '{since}' AND id <= {after}")
            assert {row_id for (row_id,) in rows} <= shown


@contextlib.contextmanager
def served_senders(server):
    """Four senders, as long as the block runs."""
    ended = threading.Event()

    def run():
        with contextlib.closing(server.connect()) as connection:
            while not ended.is_set():
                send(connection, "POST", "/messages", "1")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(DEADLINE_S)


def test_a_copy_does_not_wait_for_a_node_that_hangs(cluster, monkeypatch):
    monkeypatch.setattr(rqlite, "COPY_TIMEOUT_S", 20)
    follower = cluster.follower()
    others = [node.address for node in cluster.nodes if node is not follower]
    where = f"http://{','.join(f'{address}:4001' for address in (follower.address, *others))}"
    follower.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        service.backup(service.database_at(where), cluster.folder / "copy.db")
        assert time.monotonic() - started < 10
    finally:
        follower.signal(signal.SIGCONT)


def test_texts_that_rqlite_takes_for_blobs_are_texts(nodes):
    """A key, what a filter asks for, and a secret."""
    server = served(nodes, stream_sql("messages", ", a TEXT AS (body ->> 'a')"))
    odd = "x'41'"
    answers = [
        send(server.connect(), "POST", "/messages", json.dumps({"a": odd}), Idempotency_Key=odd)[2] for _ in range(2)
    ]
    assert answers[0] == answers[1]
    found = json.loads(send(server.connect(), "GET", f"/messages?a={odd}")[2])["messages"]
    assert [(message["key"], message["body"]) for message in found] == [(odd, {"a": odd})]
    secret = "x'4142434445464748'"
    line = ["client", "add", "shop", "--signs", "stripe", "--secret", "-"]
    assert nodes.command(*line, given=f"{secret}\n", schema=stream_sql("messages")) == (0, f"{secret}\n", "")


def test_a_rule_that_migrate_has_added_refuses_with_its_words_in_front_ends_that_run(nodes):
    server = served(nodes, stream_sql("messages"))
    rule = "CREATE TRIGGER t BEFORE INSERT ON messages WHEN NEW.body = '0' BEGIN SELECT RAISE(ABORT, 'it''s 0'); END;"
    assert nodes.command("migrate", schema=stream_sql("messages") + rule)[0] == 0
    status, _, data = send(server.connect(), "POST", "/messages", "0")
    assert (status, json.loads(data)["detail"]) == (422, "it's 0")


def test_a_schema_that_only_the_sqlite_of_this_machine_can_use_is_refused(nodes):
    rule = "CREATE TABLE x (a); CREATE TRIGGER t AFTER INSERT ON messages BEGIN INSERT INTO x VALUES (sqrt(2)); END;"
    status, _, error = nodes.command(schema=stream_sql("messages") + rule)
    assert (status, error.count("\n"), "sqrt" in error) == (2, 1, True)


def test_reports_have_the_same_numbers_as_with_a_file_and_say_if_there_is_more(nodes):
    columns = ", ".join(f"{n} AS c{n}" for n in range(400))
    views = f"""CREATE VIEW wide AS SELECT {columns};
        CREATE VIEW large AS SELECT id, body FROM messages;
        CREATE VIEW numbers AS SELECT 0.1 + 0.2 AS a, 1732622400.123456 AS b, 1.7976931348623157e308 AS c, -9e999 AS d, 1.0 AS e, x'00ff' AS f;"""
    server = served(nodes, stream_sql("messages") + views)
    connection = server.connect()
    text = send(connection, "GET", "/numbers")[2].decode()
    assert (
        text
        == '{"rows": [{"a": 0.30000000000000004, "b": 1732622400.123456, "c": 1.7976931348623157e+308, "d": -9e999, "e": 1.0, "f": "00ff"}]}'
    )
    assert json.loads(send(connection, "GET", "/wide")[2])["rows"][0]["c399"] == 399
    for _ in range(7):
        assert send(connection, "POST", "/messages", json.dumps("x" * 900_000))[0] == 201
    answer = json.loads(send(connection, "GET", "/large")[2])
    assert (len(answer["rows"]), answer.get("more")) == (5, True)


def test_migrate_leaves_what_came_meanwhile(nodes):
    """A stream that is taken out of the file, and a column, have to be empty at the end as well."""
    headers = stream_sql("messages", ", headers TEXT")
    database = service.database_at(URL)
    for before, after, insert in (
        (stream_sql("messages") + stream_sql("orders"), stream_sql("messages"), "orders (received_at, client, body) VALUES ('t', 'c', '1')"),
        (headers, stream_sql("messages"), "messages (received_at, client, body, headers) VALUES ('t', 'c', '1', '{}')"),
    ):  # fmt: skip
        (nodes.folder / "schema.sql").write_text(before)
        schema = service.read_schema(nodes.folder / "schema.sql")
        if not nodes.rows("SELECT 1 FROM sqlite_schema"):
            service.Store(database, schema).open()
        else:
            assert nodes.command("migrate", schema=before)[0] == 0
        (nodes.folder / "schema.sql").write_text(after)
        schema = service.read_schema(nodes.folder / "schema.sql")
        with pytest.raises(sqlite3.Error), database.to_migrate(schema) as db:  # noqa: PT012
            db.execute("BEGIN IMMEDIATE")
            assert migrate.Migration(db, schema).run() == []
            db.execute("COMMIT")
            nodes.write(f"INSERT INTO {insert}")
        table = insert.split()[0]
        assert nodes.rows(f"SELECT count(*) FROM {table}") == [[1]]
        nodes.write(f"DELETE FROM {table}")
        assert nodes.command("migrate", schema=after)[0] == 0


# The engine, against nodes that misbehave


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """A node that reads a request, and then does what its server says, which can have answers for the first requests.

    Without an answer, it closes the connection.
    """

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.close_connection = (self.server.answer is None and not self.server.answers) or self.server.hangs_up
        self.server.asked.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.delay_s)
        answer = self.server.answers.pop(0) if self.server.answers else self.server.answer
        if answer == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b" ")
                    time.sleep(0.1)
        elif answer:
            status, text = answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def misbehaving():
    """Two nodes that answer as they are told, and the engine that asks them."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) for _ in range(2)]
    for server in servers:
        server.asked, server.answer, server.answers, server.hangs_up, server.delay_s = [], None, [], False, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = service.database_at("http://" + ",".join(f"127.0.0.1:{server.server_port}" for server in servers))
    yield (*servers, cluster)
    cluster.close()
    for server in servers:
        server.shutdown()
        server.server_close()


STORED = {"last_insert_id": 1, "rows_affected": 1}
GOOD = 200, json.dumps({"results": [STORED]})


def answered(*results):
    """What a node answers to INSERTs. Before them stands the PRAGMA that switches foreign keys on."""
    return 200, json.dumps({"results": [{}, *results]})


@pytest.mark.parametrize(("answer", "is_sent_again"), [
    (None, False),  # it closes the connection
    ((500, "x"), False), ((200, "no json"), False), ((200, "[1]"), False), ((200, "{}"), False), ((200, '{"results": []}'), False),
    ((200, '{"results": [1]}'), False), ((200, "[" * 9999), False), ((301, ""), True), ((401, ""), True), ((200, '{"results": [{}], "error": "leadership lost while committing log"}'), False),
    ((200, '{"error": "node failed to process Execute on remote node at b: read protobuf length: EOF"}'), False),
    ((503, "leader not found\n"), True), ((200, '{"results": [], "error": "not leader"}'), True),
    ((500, "leader address: leader not found\n"), True),
    *[((200, f'{{"error": "{text}"}}'), True) for text in ("store not open", "store not ready", "leadership transfer in progress", "timed out enqueuing operation")],
    *[((200, f'{{"error": "node failed to process Execute on remote node at b:4002: {text}"}}'), True) for text in (
        "pool get: dial tcp 10.0.0.1:4002: connect: connection refused", "write length: broken pipe", "write protobuf bytes: broken pipe", "store not ready", "not leader")],
    *[((200, f'{{"error": "{text}"}}'), False) for text in ("raft is already shutdown", "no write length: x", "node failed to process Execute on remote node at b: read protobuf bytes: EOF")],
])  # fmt: skip
def test_a_write_is_sent_again_only_if_it_was_certainly_not_taken(answer, is_sent_again, misbehaving):
    first, second, cluster = misbehaving
    first.answer, second.answer = answer, GOOD
    try:
        cluster.send("/db/execute", [["INSERT"]], time.monotonic() + 5)
    except sqlite3.OperationalError:
        assert not is_sent_again
    assert (len(first.asked), len(second.asked)) == (1, int(is_sent_again))
    cluster.send("/db/execute", [["INSERT"]], time.monotonic() + 5)  # the next one goes to the other node
    assert (len(first.asked), len(second.asked)) == (1, 1 + is_sent_again)


@pytest.mark.parametrize("answer", [
    None, (200, '{"error": "node failed to process Query on remote node at b: EOF"}'), (500, "x"), (401, ""), (200, "<html>"), (200, '{"results": null}'),
])  # fmt: skip
def test_a_query_is_sent_again(answer, misbehaving):
    first, second, cluster = misbehaving
    first.answer, second.answer = answer, (200, '{"results": [{"columns": ["1"], "values": [[1]]}]}')
    assert cluster.query("SELECT 1", (), "weak", time.monotonic() + 5) == [(1,)]
    assert (len(first.asked), len(second.asked)) == (1, 1)


def test_a_node_that_does_not_answer_holds_a_write_up_for_seconds_only(misbehaving):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        cluster = service.database_at(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(sqlite3.OperationalError):
            cluster.execute_all([["INSERT"]], started + 10)
        assert 3 < time.monotonic() - started < 6


def test_a_node_that_fails_at_every_query_is_an_error(misbehaving, tmp_path):
    first, second, cluster = misbehaving
    first.answer = second.answer = 200, '{"results": [{"error": "disk I/O error"}]}'
    with pytest.raises(sqlite3.OperationalError, match="disk"):
        cluster.query("SELECT 1", (), "weak", time.monotonic() + 1)
    first.answer = second.answer = answered({"error": "disk I/O error"})
    (tmp_path / "schema.sql").write_text(SCHEMA)
    entry = service.Entry(service.read_schema(tmp_path / "schema.sql").streams["messages"], "c", None, ["1"])
    with cluster.transaction(time.monotonic() + 1) as db:
        (error,) = cluster.insert(db, [entry], "t")
    assert str(error) == "disk I/O error"
    first.answer = second.answer = 200, '{"results": []}'
    with pytest.raises(sqlite3.OperationalError):
        cluster.execute_all([["INSERT"]], time.monotonic() + 1)


@pytest.mark.parametrize("size", [1, 20_000])
def test_an_answer_that_is_the_last_of_its_connection_is_read_whole(size):
    """Proxies send such, also in HTTP/1.0."""

    def answer(listener):
        connection = listener.accept()[0]
        connection.recv(65_536)
        content = json.dumps({"results": [{"columns": ["1"], "values": [["x" * size]]}]})
        for part in (f"HTTP/1.0 200 OK\r\nContent-Length: {len(content)}\r\n\r\n", content[:9], content[9:]):
            connection.sendall(part.encode())
            time.sleep(0.05)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        cluster = service.database_at(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert cluster.query("SELECT 1", (), "weak", time.monotonic() + 2) == [("x" * size,)]


def test_slow_nodes_do_not_add_up(misbehaving, tmp_path):
    """Eight last ids were asked for one after the other, and pages of a stream were read in turn."""
    first, second, cluster = misbehaving
    first.delay_s = second.delay_s = 1.3
    first.answer = second.answer = 200, json.dumps({"results": [{"values": [[7, "t", "c", None, "1"]]}]})
    (tmp_path / "schema.sql").write_text("".join(stream_sql(f"s{n}") for n in range(8)))
    store = service.Store(cluster, service.read_schema(tmp_path / "schema.sql"))
    started = time.monotonic()
    assert len(store.last_ids(store.schema.streams.values())) == 8
    assert time.monotonic() - started < 4
    resource = service.StreamResource(store, store.schema.streams["s1"], 1000)
    query = service.Query({}, "", {})
    found = at_once(*[lambda: resource._page(query, service.JSON, lambda: False)[2]] * 6)
    assert (found, time.monotonic() - started < 8) == ([7] * 6, True)


def test_a_node_that_drips_its_answer_holds_nothing_up(misbehaving):
    first, second, cluster = misbehaving
    first.answer, second.answer = "drip", (200, '{"results": [{"columns": ["1"], "values": [[1]]}]}')
    started = time.monotonic()
    with contextlib.suppress(sqlite3.Error):
        cluster.query("SELECT 1", (), "weak", started + 1)
    assert time.monotonic() - started < 4
    assert cluster.query("SELECT 1", (), "weak", time.monotonic() + 1) == [(1,)]


@pytest.mark.parametrize("kind", ["head", "continue", "chunk"])
def test_a_node_whose_head_has_no_end_holds_nothing_up(kind, misbehaving):
    """Each byte comes in time, but not all of them together."""
    _, second, _ = misbehaving
    second.answer = 200, '{"results": [{"columns": ["1"], "values": [[1]]}]}'
    head = b"HTTP/1.1 200 OK\r\n"
    begin, part = {
        "head": (head, b"x"), "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100), "chunk": (head + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    }[kind]  # fmt: skip

    def trickle(listener):
        with contextlib.suppress(OSError):
            connection = listener.accept()[0]
            connection.recv(65_536)
            connection.sendall(begin)
            while True:
                connection.sendall(part)
                time.sleep(0.0 if kind == "continue" else 0.2)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=trickle, args=(listener,), daemon=True).start()
        cluster = service.database_at(f"http://127.0.0.1:{listener.getsockname()[1]},127.0.0.1:{second.server_port}")
        started = time.monotonic()
        with contextlib.suppress(sqlite3.Error):
            cluster.query("SELECT 1", (), "strong", started + 2)
        assert time.monotonic() - started < 5
        assert cluster.query("SELECT 1", (), "strong", time.monotonic() + 2) == [(1,)]


@pytest.mark.parametrize(
    "answer", ['{"values": [1]}', '{"values": 1}', '{"last_insert_id": "x", "rows_affected": 1}', ""]
)
def test_a_node_that_answers_nonsense_is_left_for_another(answer, misbehaving, tmp_path):
    first, second, cluster = misbehaving
    first.answer, second.answer = (200, f'{{"results": [{{}}, {answer}]}}'), answered(STORED)
    for result in inserted(cluster, entries_for(tmp_path, 5)):
        assert isinstance(result, sqlite3.Error)
    assert inserted(cluster, entries_for(tmp_path, 5))[0].first_id == 1


def test_a_comparison_goes_on_whatever_a_node_answers(misbehaving, tmp_path, monkeypatch):
    first, second, cluster = misbehaving
    monkeypatch.setattr(same, "INTERVAL_S", 0.1)
    monkeypatch.setattr(same, "BUSY_TIMEOUT_S", 0.3)
    (tmp_path / "schema.sql").write_text(SCHEMA)
    comparison = same.Comparison(cluster, service.read_schema(tmp_path / "schema.sql"))
    for first.answer in (
        (200, "{}"),
        (200, '{"results": []}'),
        (200, '{"results": [{"values": [[1]]}, {}, {}]}'),
        None,
    ):
        second.answer = first.answer
        time.sleep(0.5)
        asked = len(first.asked)
        wait_until(lambda asked=asked: len(first.asked) > asked + 2, "it asks no more")
    comparison.stop()


@pytest.mark.parametrize(
    ("raised", "pause_s", "name"), [("no", 0, "SQLITE_CONSTRAINT_TRIGGER"), ("other", 60, "SQLITE_ERROR")]
)
def test_lines_that_triggers_refuse_cost_one_look_at_the_triggers(
    raised, pause_s, name, misbehaving, tmp_path, monkeypatch
):
    """A text that is known is not looked for again, however long ago that was, and others not at once."""
    monkeypatch.setattr(rqlite, "LOOK_S", pause_s)
    first, _, cluster = misbehaving
    refused = answered(*[{"error": "no"}] * 50)
    sql = f"CREATE TRIGGER t ... SELECT RAISE(ABORT, '{raised}')"
    triggers = 200, json.dumps({"results": [{"values": [[sql]]}]})
    first.answers, first.answer = [answered({"error": "no"}), triggers], refused
    if name == "SQLITE_ERROR":
        first.answers.append(GOOD)  # the INSERT can be compiled
    results = inserted(cluster, entries_for(tmp_path, *[5] * 50))
    assert {each.sqlite_errorname for each in results} == {name}
    assert len(first.asked) == 3 + (name == "SQLITE_ERROR")


@pytest.mark.parametrize("text", [
    "disk I/O error", "database is locked", "database table is locked: messages", "locking protocol", "database schema has changed", "bad parameter or other API misuse",
    "authorization denied", "no such table: main.kinds", "malformed database schema (x)", "fts5: corruption found reading blob", "invalid fts5 file format (found 5)",
    "driver: bad connection", "sql: database is closed", "unexpected EOF", "cannot start a transaction within a transaction", "unknown error", "vtable constructor failed: x",
])  # fmt: skip
def test_a_fault_of_a_node_is_never_the_fault_of_a_message(text, misbehaving, tmp_path):
    first, _, cluster = misbehaving
    no_trigger = 200, '{"results": [{"values": []}]}'
    first.answers = [answered({"error": text}), no_trigger, GOOD]  # the INSERT can be compiled
    (error,) = inserted(cluster, entries_for(tmp_path, 5))
    assert error.sqlite_errorname not in service.REFUSALS


def clients_of(cluster, tmp_path, monkeypatch):
    """Clients that no thread reads."""
    (tmp_path / "schema.sql").write_text(SCHEMA)
    monkeypatch.setattr(cluster, "read_in_background", lambda *_: None)
    return service.Clients(service.Store(cluster, service.read_schema(tmp_path / "schema.sql")), 1000)


def test_a_new_token_is_refused_by_nobody_who_cannot_read_the_clients(misbehaving, tmp_path, monkeypatch):
    """A 401 would let its sender throw messages away."""
    first, second, cluster = misbehaving
    clients = clients_of(cluster, tmp_path, monkeypatch)
    row = ["tester", "write read", service.digest_of(TOKEN), None, None, 1]
    first.answers = [(200, json.dumps({"results": [{"values": [values]}]})) for values in ([1, 1], row)]
    environ = {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}", "REQUEST_METHOD": "POST"}
    assert clients.authenticate(environ)
    first.answer = second.answer = 503, "leader not found"
    asked = len(first.asked)
    for reads in (True, False):  # while it is known that they cannot be read, nobody waits for it in the loop
        with pytest.raises(service.Problem) as raised:
            clients.authenticate(environ | {"HTTP_AUTHORIZATION": "Bearer another"})
        assert (raised.value.status, len(first.asked) > asked) == (503, reads)
        asked, clients._missed_at = len(first.asked), 0.0
    with pytest.raises(service.Problem) as raised:
        clients.authenticate({"REQUEST_METHOD": "POST"})
    assert raised.value.status == 401


def test_tokens_hold_while_there_is_no_leader_but_not_for_ever(misbehaving, tmp_path, monkeypatch):
    first, second, cluster = misbehaving
    clients = clients_of(cluster, tmp_path, monkeypatch)
    row = ["tester", "write read", service.digest_of(TOKEN), None, None, 1]
    first.answers = [(200, json.dumps({"results": [{"values": [values]}]})) for values in ([1, 1], row)]
    environ = {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}", "REQUEST_METHOD": "GET"}
    assert clients.authenticate(environ).name == "tester"
    first.answer = second.answer = 503, "leader not found"
    assert clients.read()
    assert clients.authenticate(environ).name == "tester"
    monkeypatch.setattr(clients, "_known_at", time.monotonic() - service.BUSY_TIMEOUT_S)
    assert clients.read()
    with pytest.raises(service.Problem, match="try again"):
        clients.authenticate(environ)


def test_clients_are_read_whole_when_each_answer_takes_longer_than_a_second(misbehaving, tmp_path, monkeypatch):
    first, second, cluster = misbehaving
    clients = clients_of(cluster, tmp_path, monkeypatch)
    first.delay_s = second.delay_s = 1.3
    for n in (1, 2):
        rows = [[n, 1], ["tester", "write read", service.digest_of(f"token {n}"), None, None, n]]
        first.answers = [(200, json.dumps({"results": [{"values": [row]}]})) for row in rows]
        second.answers, cluster._current = [], 0
        assert clients.read() is None
        assert service.digest_of(f"token {n}") in clients._by_digest
    first.answer = second.answer = 200, '{"results": [{"values": [[1]]}]}'
    first.delay_s = second.delay_s = 0
    assert isinstance(clients.read(), Exception)


def test_a_write_that_has_inserted_another_number_of_rows_is_not_stored(misbehaving, tmp_path):
    first, second, cluster = misbehaving
    (tmp_path / "schema.sql").write_text(SCHEMA)
    stream = service.read_schema(tmp_path / "schema.sql").streams["messages"]
    entry = service.Entry(stream, "c", None, ["1"])
    with cluster.transaction(time.monotonic() + 5) as db:
        for first.answer in (answered({}), answered({"last_insert_id": 7, "rows_affected": 2})):
            second.answer = first.answer
            (error,) = cluster.insert(db, [entry], "t")
            assert "has inserted" in str(error)


def entries_for(tmp_path, *left_s):
    (tmp_path / "schema.sql").write_text(SCHEMA)
    stream = service.read_schema(tmp_path / "schema.sql").streams["messages"]
    return [service.Entry(stream, "c", None, [str(n)], deadline=time.monotonic() + s) for n, s in enumerate(left_s)]


def inserted(cluster, entries):
    with cluster.transaction(min(entry.deadline for entry in entries)) as db:
        return cluster.insert(db, entries, "t")


def test_a_message_whose_time_is_nearly_over_takes_no_time_from_its_group(misbehaving, tmp_path):
    first, _, cluster = misbehaving
    first.answer, first.delay_s = answered({"last_insert_id": 50, "rows_affected": 50}), 0.3
    results = inserted(cluster, entries_for(tmp_path, 0.1, *[10] * 49))
    assert [each.first_id for each in results] == list(range(1, 51))


def test_a_message_is_withdrawn_at_its_own_deadline_while_no_node_takes_it(misbehaving, tmp_path):
    first, second, cluster = misbehaving
    first.answer = second.answer = 503, "leader not found"
    entries = entries_for(tmp_path, 0.3, *[10] * 49)
    found = []
    thread = threading.Thread(target=lambda: found.extend(inserted(cluster, entries)))
    thread.start()
    time.sleep(1)
    first.answer = second.answer = answered({"last_insert_id": 49, "rows_affected": 49})
    thread.join(DEADLINE_S)
    assert isinstance(found[0], NotTaken)
    assert [each.first_id for each in found[1:]] == list(range(1, 50))
    assert (cluster.repeated > 2, cluster.unknown) == (True, 0)


def test_what_the_first_request_of_a_group_has_confirmed_is_stored_whatever_becomes_of_the_second(
    misbehaving, tmp_path
):
    """Two portions, two streams of which one is refused, and an answer about another number of rows."""
    first, second, cluster = misbehaving
    entries = entries_for(tmp_path, *[10] * 42)
    entries[40].bodies = [json.dumps("x" * rqlite.REQUEST_BYTES)]
    full = answered({"last_insert_id": 41, "rows_affected": 41})
    first.answers, first.answer, second.answer = [full], None, None
    results = inserted(cluster, entries)
    assert [each.first_id for each in results[:41]] == list(range(1, 42))
    assert isinstance(results[41], sqlite3.OperationalError)
    assert cluster.unknown == 1
    other = service.Stream("orders", {})
    for entry in entries[:2]:
        entry.stream = other
    good, bad = {"last_insert_id": 40, "rows_affected": 40}, {"error": "NOT NULL constraint failed: orders.a"}
    entries[40].bodies = ["1"]
    for answer in ([bad, good], [{"last_insert_id": 7, "rows_affected": 1}, good]):
        cluster._current = 0
        first.answers, first.answer, second.answer = [answered(*answer)], None, None
        results = inserted(cluster, entries)
        assert [each.first_id for each in results[2:]] == list(range(1, 41))
        assert all(isinstance(each, sqlite3.OperationalError) for each in results[:2])


def test_migrate_goes_to_the_leader_and_looks_up_what_became_of_it(misbehaving, tmp_path):
    """A node that is not the leader hands a request on for 30 s only."""
    first, second, cluster = misbehaving
    first.answer, second.answer = (301, ""), (200, '{"results": [{}]}')
    cluster.execute_all([["UPDATE"]], time.monotonic() + 5, 30)
    assert ["redirect" in path for path in (*first.asked, *second.asked)] == [True, True]
    second.answer = 301, ""
    with pytest.raises(NotTaken, match="is not the leader"):
        cluster.execute_all([["UPDATE"]], time.monotonic() + 0.5, 30)


def test_if_no_node_in_the_list_is_the_leader_they_hand_requests_on(misbehaving):
    first, second, cluster = misbehaving
    first.answers, second.answers, first.answer = [(301, "")], [(301, "")], GOOD
    for _ in range(3):
        assert cluster.send("/db/execute?noparse", [["INSERT"]], time.monotonic() + 5)
    assert ["redirect" in path for path in first.asked] == [True, False, False, False]
    assert ["redirect" in path for path in second.asked] == [True]


def test_an_election_is_waited_for_and_nothing_handed_on(misbehaving):
    """The followers go on to name the leader that has died."""
    first, second, cluster = misbehaving
    first.answers, second.answers, second.answer = [GOOD], [(301, "")] * 3, GOOD
    first.answer = 503, "leader not found"
    for _ in range(2):
        assert cluster.send("/db/execute?noparse", [["INSERT"]], time.monotonic() + 5)
    assert all("redirect" in path for path in (*first.asked, *second.asked))
    assert len(second.asked) == 4


def test_an_error_that_is_not_utf_8_fails_alone_whichever_node_leads(nodes):
    """A follower that hands the request on would lose the answers to all."""
    rule = ", value TEXT AS (json_extract(body -> 'new', body ->> 'field'))"
    server = served(nodes, stream_sql("messages", rule) + stream_sql("x"))
    for _ in range(3):
        odd = [lambda: send(server.connect(), "POST", "/messages", r'{"field": "\ud800", "new": {}}')[0]] * 4
        good = [lambda: send(server.connect(), "POST", "/x", "1")[0]] * 12
        assert at_once(*odd, *good) == [422] * 4 + [201] * 12, server.log
        leader = nodes.leader()
        leader.kill()
        leader.start()
        nodes.wait_until_ready()
        wait_until(lambda: send(server.connect(), "GET", "/healthz")[0] == 200, "it takes nothing")


def test_a_start_while_the_disk_of_the_leader_is_full_ends_in_one_line(misbehaving, tmp_path, monkeypatch):
    _, _, cluster = misbehaving
    (tmp_path / "schema.sql").write_text(SCHEMA)
    store, full = service.Store(cluster, service.read_schema(tmp_path / "schema.sql")), "database or disk is full"
    monkeypatch.setattr(cluster, "_require_foreign_keys", service.nothing)

    def fail(*_):
        raise rqlite.error_in({"error": full})

    monkeypatch.setattr(store, "_make", fail)
    with pytest.raises(service.SetupError, match=full):
        store.open("x" * 20)


def test_one_message_that_is_not_found_is_looked_for_in_all_that_is_stored(misbehaving, tmp_path):
    """A leader that was paused does not know yet what a newer one has stored."""
    first, _, cluster = misbehaving
    (tmp_path / "schema.sql").write_text(SCHEMA)
    store = service.Store(cluster, service.read_schema(tmp_path / "schema.sql"))
    empty, row = ({"results": [{"columns": ["1"], **more}]} for more in ({}, {"values": [[7, "t", "c", None, "1"]]}))
    first.answers = [(200, json.dumps(empty)), (200, json.dumps(row))]
    assert store.message(store.schema.streams["messages"], 7)[0] == 7
    assert [re.search("level=([a-z]+)", path)[1] for path in first.asked] == ["weak", "linearizable"]
    first.answers, first.asked = [(200, json.dumps(empty))], []
    assert list(store.page(store.schema.streams["messages"], 6, 101, {})) == []
    assert len(first.asked) == 1


def test_reads_with_a_freshness_are_answered_by_the_node_itself(misbehaving):
    first, second, _ = misbehaving
    where = ",".join(f"127.0.0.1:{server.server_port}" for server in (first, second))
    cluster = service.database_at(f"http://{where}?freshness=2s")
    first.answer = 200, '{"error": "stale read"}'
    second.answer = 200, '{"results": [{"columns": ["1"], "values": [[1]]}]}'
    with cluster.reader() as db:
        assert db.execute("SELECT 1") == [(1,)]
    assert "level=none&freshness=2s&freshness_strict" in first.asked[0]
    for option in ("freshness=2", "freshness=0s", "level=none", "freshness=2s&x"):
        with pytest.raises(service.SetupError, match="freshness"):
            service.database_at(f"http://{where}?{option}")


def test_all_keys_of_a_group_are_looked_up_by_one_request(misbehaving):
    first, _, cluster = misbehaving
    first.answer = 200, json.dumps({"results": [{"columns": ["1"], "values": [[n]]} for n in range(50)]})
    with cluster.transaction(time.monotonic() + 5) as db:
        assert cluster.fetch(db, [("SELECT 1", {})] * 50) == [[(n,)] for n in range(50)]
        first.answer = misbehaving[1].answer = 500, ""
        db.deadline = 0.0
        assert all(isinstance(each, sqlite3.Error) for each in cluster.fetch(db, [("SELECT 1", {})] * 2))
    assert len(first.asked) == 2


def test_a_connection_that_the_node_has_closed_is_not_used(misbehaving):
    first, second, cluster = misbehaving
    first.answer, first.hangs_up = GOOD, True
    for _ in range(3):
        assert cluster.send("/db/execute", [["INSERT"]], time.monotonic() + 5)
        time.sleep(0.2)
    assert (len(first.asked), len(second.asked)) == (3, 0)


def test_a_request_has_about_8_mib_of_messages_whatever_their_letters():
    stream = service.Stream("messages", {})

    def sizes(text, count):
        entries = [service.Entry(stream, bodies=[text]) for _ in range(count)]
        return [len(portion) for portion in rqlite.portions(entries)]

    assert sizes("x" * 2**20, 20) == [8, 8, 4]
    assert sizes("😀" * 2**18, 20) == [8, 8, 4]


def test_a_child_uses_no_connection_of_its_parent(misbehaving):
    first, _, cluster = misbehaving
    first.answer = 200, '{"results": [{"columns": ["1"], "values": [[1]]}]}'
    cluster.query("SELECT 1", (), "weak", time.monotonic() + 5)
    assert cluster.nodes[0]._idle
    if (child := os.fork()) == 0:
        os._exit(cluster.nodes[0]._idle_connection() is not None)
    assert os.waitpid(child, 0)[1] == 0


# The contract


def test_the_tests_of_the_service_over_a_cluster(nodes):
    """over_cluster.py names those that do not apply."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "over_cluster",
        "-p",
        "no:cacheprovider",
        str(HERE / "test_service.py"),
        str(HERE / "extras"),
    ]
    environ = os.environ | {"INLET_CLUSTER": URL, "PYTHONPATH": f"{HERE / 'faults'}:{HERE}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environ, cwd=HERE)
    print(done.stdout[-3000:])
    assert done.returncode == 0
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 530
