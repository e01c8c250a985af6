"""Three real nodes of rqlite, each in a network namespace of its own, and two front ends: what can break, and does."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from common import SCHEMA, Ledger, Server, at_once, seed, timed, wait_until

import service
from test_service import BATCH, DEADLINE_S, HERE, TOKEN, send, stream_sql

RQLITED = os.environ.get("INLET_RQLITED") or shutil.which("rqlited")
ADDRESSES = [f"10.77.0.{n}" for n in (1, 2, 3)]
URL = f"http://{','.join(f'{address}:4001' for address in ADDRESSES)}"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module", autouse=True)
def network():
    """Three namespaces on one bridge. The front ends stand outside of them, on the bridge."""
    assert RQLITED, "rqlited is not here: INLET_RQLITED names it"

    def remove():
        for name in ("inlet-1", "inlet-2", "inlet-3"):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
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

    def __init__(self, number, folder, *flags):
        self.name, self.address, self.folder = f"inlet-{number}", ADDRESSES[number - 1], folder / f"node-{number}"
        raft = ",".join(f"{address}:4002" for address in ADDRESSES)
        flags = flags or ("-fk",)
        where = ["-http-addr", f"{self.address}:4001", "-raft-addr", f"{self.address}:4002"]
        together = ["-bootstrap-expect", "3", "-join", raft]
        self.command = [RQLITED, *flags, "-node-id", self.name, *where, *together, str(self.folder)]
        self.start()

    def start(self):
        with open(f"{self.folder}.log", "a") as log:
            command = ["ip", "netns", "exec", self.name, *self.command]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self):
        self.process.kill()
        self.process.wait()

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
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.ask("/status"))["store"]["raft"]["state"] == "Leader"

    def is_cut_off(self, *verb):
        for other in ADDRESSES:
            if other != self.address:
                for chain, side in (("INPUT", "-s"), ("OUTPUT", "-d")):
                    rule = [*verb, chain, side, other, "-j", "DROP"]
                    subprocess.run(["ip", "netns", "exec", self.name, "iptables", *rule], check=True)


class Cluster:
    def __init__(self, folder):
        self.folder = folder
        (folder / "schema.sql").write_text(SCHEMA)
        self.nodes = [Node(number, folder) for number in (1, 2, 3)]
        self.wait_until_ready()
        self.front_ends = []
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / "schema.sql").write_text(SCHEMA)
            self.front_ends.append(Server(folder / name, "--database", URL))
            if name == "a":
                self.write(
                    "INSERT INTO clients (name, token, can) VALUES ('tester', ?, 'write read')",
                    service.digest_of(TOKEN),
                )

    def wait_until_ready(self):
        for node in self.nodes:
            wait_until(node.is_ready, f"{node.name} is not ready", 40)

    def write(self, sql, *values):
        result = json.loads(self.nodes[0].ask("/db/execute", [[sql, *values]]))["results"][0]
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

    def check(self, ledger, follower):
        """Whatever has happened: what was acknowledged is there once, the nodes are equal, and the feed is complete."""
        ledger.must_answer()
        self.wait_until_ready()
        sql = "SELECT id, key, body FROM messages ORDER BY id"
        rows = [[]]
        wait_until(lambda: rows.append(self.nodes[0].query(sql)) or rows[-1] == rows[-2] and all(
            node.query(sql) == rows[-1] for node in self.nodes), "the nodes differ")  # fmt: skip
        stored = [(message_id, key, body.encode()) for message_id, key, body in rows[-1]]
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
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.end()


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
        for _ in range(10):
            leader = cluster.leader()
            leader.kill()
            taken_again(ledger)
            leader.start()
            wait_until(leader.is_ready, "the node does not come back")
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
    assert ledger.longest_gap() < 10


def test_without_a_majority_every_answer_is_503_until_it_is_back(cluster):
    with under_load(cluster) as ledger:
        two = cluster.nodes[1:]
        for node in two:
            node.kill()
        time.sleep(2)
        before = ledger.statuses.copy()
        time.sleep(10)
        meanwhile = ledger.statuses - before
        assert meanwhile[503] > 20
        assert meanwhile.keys() <= {503}
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
        leader.is_cut_off("-A")
        taken_again(ledger)
        time.sleep(2)
        leader.is_cut_off("-D")
        taken_again(ledger)
    assert ledger.longest_gap() < 10


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_a_disk_that_is_full(role, cluster):
    """The node is started again with more room. If it has lost something, it has to be replaced: see cluster/README.md"""
    node = getattr(cluster, role)()
    node.kill()
    moved = node.folder.rename(node.folder.with_name("moved"))
    node.folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(node.folder)], check=True)
    try:
        shutil.copytree(moved, node.folder, dirs_exist_ok=True)
        node.start()
        cluster.wait_until_ready()
        with under_load(cluster) as ledger:
            filler = node.folder / "filler"
            with contextlib.suppress(OSError), open(filler, "wb") as file:
                while True:
                    file.write(bytes(1 << 16))
            time.sleep(5)
            taken_again(ledger)
            node.kill()
            filler.unlink()
            node.start()
            wait_until(node.is_ready, "the node does not come back")
            taken_again(ledger)
    finally:
        node.kill()
        subprocess.run(["umount", "-l", str(node.folder)], check=True)


def test_a_node_is_replaced_by_an_empty_one(cluster):
    with under_load(cluster) as ledger:
        node = cluster.leader()
        node.kill()
        shutil.rmtree(node.folder)
        taken_again(ledger)
        node.start()
        wait_until(node.is_ready, "the new node does not come up")
        taken_again(ledger)
