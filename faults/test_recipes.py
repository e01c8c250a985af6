"""What README tells people to do with several processes and with files, done for real."""

import contextlib
import http.client
import itertools
import json
import threading
import time
import urllib.request

import pandas
from common import Server, database
from deployed import free_port, nginx

from test_service import AUTHORIZATION, DEADLINE_S, TOKEN, copied, readme, run, send


def test_a_page_becomes_a_table_of_pandas(tmp_path):
    exec("".join(readme("py")), names := {})
    database(tmp_path)
    with contextlib.closing(Server(tmp_path)) as server, contextlib.closing(server.connect()) as connection:
        for value in (1, 2.5):
            send(connection, "POST", "/messages", json.dumps({"value": value, "sensor": {"name": "a"}}))
        table = names["frame"](f"{server.url}/messages", TOKEN)
    assert isinstance(table, pandas.DataFrame)
    assert (table["body.value"].sum(), set(table["body.sensor.name"]), list(table["id"])) == (3.5, {"a"}, [1, 2])


def test_two_processes_behind_one_nginx_restart_without_a_gap(tmp_path):
    """And nothing is stored twice, for each message has a key and is sent again when its answer does not come."""
    path = database(tmp_path)
    first, second = (Server(tmp_path, "--listen", f"127.0.0.1:{free_port()}") for _ in range(2))
    upstream = f"{first.address}; server {second.address}"
    stored, stop = [], threading.Event()
    with nginx(tmp_path, upstream) as address:

        def load(number):
            for n in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
                for _ in range(200):
                    connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S)
                    with contextlib.closing(connection):
                        status = send(connection, "POST", "/messages", str(n), Idempotency_Key=f"{number}-{n}")[0]
                    if status < 500:
                        break
                    time.sleep(0.1)
                stored.append((status, number, n))

        threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for process in (first, second):
            before = len(stored)
            while len(stored) < before + 200:
                stop.wait(0.05)
            assert process.end() == 0
            process.start()
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _, _ in stored} == {201}
    assert copied(path) == list(range(1, len(stored) + 1))
    for process in (first, second):
        assert process.end() == 0


def test_a_backup_is_restored_as_readme_says(tmp_path):
    path = database(tmp_path)
    with contextlib.closing(Server(tmp_path)) as server:
        for n in range(3):
            with contextlib.closing(server.connect()) as connection:
                send(connection, "POST", "/messages", str(n), Idempotency_Key=str(n))
        assert run(tmp_path, "backup", str(tmp_path / "copy.db")).returncode == 0
        with contextlib.closing(server.connect()) as connection:
            send(connection, "POST", "/messages", "3")
        server.kill()
        (tmp_path / "away").mkdir()
        for file in tmp_path.glob("inlet.db*"):
            if not file.name.endswith("-lock"):
                file.rename(tmp_path / "away" / file.name)
        (tmp_path / "copy.db").rename(path)
        server.start()
        request = urllib.request.Request(f"{server.url}/messages", headers=AUTHORIZATION)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            assert [message["id"] for message in json.load(answer)["messages"]] == [1, 2, 3]
        with contextlib.closing(server.connect()) as connection:
            assert send(connection, "POST", "/messages", "2", Idempotency_Key="2")[1]["Idempotent-Replayed"] == "true"
