"""Three real Inlets behind nginx with deploy/shards.conf: what holds within a shard, and what a dead one costs others."""

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections import Counter

import pytest
from common import Server, database, sql, wait_until
from deployed import DEPLOY, adapted, free_port, running, temporary_paths

from test_service import DEADLINE_S, HERE, run, send

SHARDS = {"acme": 0, "globex": 0, "initech": 1, "umbrella": 2}  # as the table has them
MESSAGES = 150


class Shards:
    """Three services, and the nginx that knows whose clients are whose."""

    def __init__(self, folder, port):
        self.port, self.folders = port, [folder / f"shard{n}" for n in (1, 2, 3)]
        for each in self.folders:
            each.mkdir()
            database(each)
        self.servers = [Server(each, "--listen", f"127.0.0.1:{free_port()}") for each in self.folders]
        self.tokens = {name: run(self.folders[n], "client", "add", name).stdout.strip() for name, n in SHARDS.items()}

    def ask(self, name, method, path, body=None, token=None, **headers):
        """Ask by the host of a client, with the token of a client (its own)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        headers |= {"Host": f"{name}.in.example.com", "Authorization": f"Bearer {self.tokens.get(token or name)}"}
        with contextlib.closing(connection):
            return send(connection, method, path, body, **headers)


@pytest.fixture
def shards(tmp_path):
    port = free_port()
    found = Shards(tmp_path, port)
    changes = [(f"server 10.0.0.{n}:8080", f"server {server.address}") for n, server in enumerate(found.servers, 1)]
    adapted("shards.conf", tmp_path, ("listen 80;", f"listen 127.0.0.1:{port};"), *changes)
    main = tmp_path / "nginx-main.conf"
    main.write_text(
        f"daemon off; pid {tmp_path}/nginx.pid; user root; events {{ worker_connections 1024; }}"
        f" http {{ access_log off; {temporary_paths(tmp_path)} include {tmp_path}/shards.conf; }}"
    )
    with running(["nginx", "-c", main, "-e", tmp_path / "nginx-error"], tmp_path, port):
        yield found
    for server in found.servers:
        server.end()


def test_keys_hold_through_kills_of_one_shard_and_nobody_else_notices(shards):
    statuses = {name: Counter() for name in SHARDS}

    def send_all(name):
        for n in range(MESSAGES):
            key, body, status = f"k{n}", json.dumps({"client": name, "n": n}), None
            while status != 201:
                status, headers, data = shards.ask(name, "POST", "/messages", body, Idempotency_Key=key)
                statuses[name][status] += 1
                if status != 201:
                    assert (headers["Content-Type"], headers["Retry-After"]) == ("application/problem+json", "2")
                    assert json.loads(data)["status"] == 503
                    time.sleep(0.05)
            status, found = 503, b""
            while status == 503:
                status, _, found = shards.ask(name, "GET", headers["Location"])
            assert (status, found[-len(body) - 1 :]) == (200, f"{body}}}".encode())

    threads = [threading.Thread(target=send_all, args=(name,)) for name in SHARDS]
    for thread in threads:
        thread.start()
    for n in (20, 60, 100):
        wait_until(lambda n=n: statuses["initech"][201] > n, "nothing is taken")
        shards.servers[1].kill()
        time.sleep(0.5)
        shards.servers[1].start()
    for thread in threads:
        thread.join(60)
    print(statuses, end=" ")
    assert all(statuses[name].keys() == {201} for name in ("acme", "globex", "umbrella"))
    assert statuses["initech"].keys() == {201, 503}
    for n, folder in enumerate(shards.folders):
        stored = sql(
            folder / "inlet.db", "SELECT client, key, body ->> 'client', body ->> 'n' FROM messages ORDER BY id"
        )
        wanted = [(name, f"k{m}", name, m) for name, shard in SHARDS.items() if shard == n for m in range(MESSAGES)]
        assert sorted(stored) == sorted(wanted)


def test_a_client_of_another_shard_and_an_unknown_host_get_nothing(shards):
    assert shards.ask("initech", "POST", "/messages", "1", token="acme")[0] == 401
    status, headers, _ = shards.ask("acme", "POST", "/messages", "1" * 1_200_000)
    assert (status, headers["Content-Type"]) == (413, "application/problem+json")
    status, headers, data = shards.ask("unknown", "POST", "/messages", "1", token="acme")
    assert (status, headers["Content-Type"], json.loads(data)["status"]) == (404, "application/problem+json", 404)
    assert [sql(each / "inlet.db", "SELECT count(*) FROM messages") for each in shards.folders] == [[(0,)]] * 3


def test_a_consumer_has_a_cursor_for_each_shard(shards, tmp_path):
    """The commands of shards.md, stopped and started again; curl finds nginx under each name."""
    (commands,) = re.findall("```sh\n(.*?)```", (DEPLOY / "shards.md").read_text(), re.DOTALL)
    shutil.copytree(HERE / "recipes", tmp_path / "recipes")
    (tmp_path / ".curlrc").write_text(f'connect-to = "::127.0.0.1:{shards.port}"\n')
    names = ("acme", "initech", "umbrella")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(shards.tokens[name])
    for part in range(2):
        for name in SHARDS:
            for n in range(5 * part, 5 * part + 5):
                assert shards.ask(name, "POST", "/messages", json.dumps([name, n]))[0] == 201
        environ = os.environ | {"CURL_HOME": str(tmp_path)}
        with subprocess.Popen(
            ["sh", "-c", f"{commands}\nwait"], cwd=tmp_path, env=environ, start_new_session=True
        ) as follower:
            wanted = sorted([name, n] for name in SHARDS for n in range(5 * part + 5))

            def consumed():
                files = [tmp_path / name / "messages.ndjson" for name in names]
                lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
                return sorted(json.loads(line)["body"] for line in lines)

            wait_until(lambda wanted=wanted, consumed=consumed: consumed() == wanted, "it does not follow")
            os.killpg(follower.pid, 9)
