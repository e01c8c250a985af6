"""forward, while all three of its sides are killed."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import Server, database, seed, sql
from deployed import free_port

from test_service import BATCH, HERE, TOKEN, send

SECRET = f"whsec_{base64.b64encode(b'k' * 24).decode()}"
# A time-out of 30 s would make this test too long.
FORWARD = """import sys, service
service.extra("forward").TIMEOUT_S = 1.0
service.extra("forward").WAIT_S = 2
service.extra("forward").LONGEST_PAUSE_S = 0.5
sys.exit(service.main())"""


class Program:
    """A process that is killed and started again."""

    def __init__(self, folder: Path, *command: str):
        self._folder, self._command = folder, command
        self.start()

    def start(self) -> None:
        environ = os.environ | {"INLET_TOKEN": TOKEN, "INLET_SECRET": SECRET, "PYTHONPATH": str(HERE)}
        with open(self._folder / "forward.log", "a") as log:
            self.process = subprocess.Popen(self._command, cwd=self._folder, stderr=log, env=environ)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def fill(server: Server, first: int, count: int) -> None:
    with contextlib.closing(server.connect()) as connection:
        for start in range(first, first + count, 1000):
            lines = "".join(f'{{"n" : {n}}}\n' for n in range(start, start + 1000))
            assert send(connection, "POST", "/messages", lines, **BATCH)[0] == 201


def test_nothing_is_lost_and_all_is_in_order_though_every_side_is_killed(tmp_path):
    chosen, count = seed(), 20_000
    database(tmp_path)
    port, target_port = free_port(), free_port()
    server = Server(tmp_path, "--listen", f"127.0.0.1:{port}")
    fill(server, 0, count)
    came = tmp_path / "came"
    came.touch()
    target = [sys.executable, str(Path(__file__).with_name("webhook_target.py")), str(target_port), SECRET, str(came)]
    urls = f"http://127.0.0.1:{port}/messages", f"http://127.0.0.1:{target_port}/hook"
    programs = [server, Program(tmp_path, *target), Program(tmp_path, sys.executable, "-c", FORWARD, "forward", *urls)]
    kills, started = 0, time.monotonic()

    def is_done() -> bool:
        return (tmp_path / "messages.cursor").is_file() and int(
            (tmp_path / "messages.cursor").read_text()[:19]
        ) == count

    try:
        while not is_done():
            assert time.monotonic() < started + 300
            time.sleep(chosen.uniform(0.1, 1.5))
            victim = chosen.choice(programs)
            victim.kill()
            if chosen.random() < 0.3:
                time.sleep(chosen.uniform(0, 0.5))
            victim.start()
            kills += 1
    finally:
        for program in programs[1:]:
            program.kill()
    seen = [json.loads(line) for line in came.read_text().splitlines()]
    first = {}
    for webhook_id, body in seen:
        assert first.setdefault(webhook_id, body) == body  # a repeat is the same message
    assert list(first) == [f"messages-{n}" for n in range(1, count + 1)]  # all, each first one in order
    assert list(first.values()) == [f'{{"n" : {n}}}' for n in range(count)]
    assert not (tmp_path / "messages.cursor.refused").exists()
    print(f"{kills} kills, {len(seen) - count} repeats, {time.monotonic() - started:.0f} s")
    assert kills > 10


def test_a_relay_of_two_inlets_has_each_message_once(tmp_path):
    chosen, count = seed(), 5000
    folders = [tmp_path / "from", tmp_path / "to"]
    for folder in folders:
        folder.mkdir()
        database(folder)
    ports = [free_port(), free_port()]
    source, relay = (
        Server(folder, "--listen", f"127.0.0.1:{port}") for folder, port in zip(folders, ports, strict=True)
    )
    key = "INSERT INTO clients (name, token, can, signs, secret) VALUES ('relay', 'x', 'write', 'standard', '{}')"
    sql(folders[1] / "inlet.db", key.format(SECRET))
    time.sleep(1)  # until it is known there
    fill(source, 0, count)
    urls = [f"http://127.0.0.1:{port}/messages" for port in ports]
    forward = Program(tmp_path, sys.executable, "-c", FORWARD, "forward", *urls)
    try:
        deadline = time.monotonic() + 120
        while sql(folders[1] / "inlet.db", "SELECT count(*) FROM messages") != [(count,)]:
            assert time.monotonic() < deadline
            time.sleep(chosen.uniform(0.1, 0.8))
            victim = chosen.choice([source, relay, forward])
            victim.kill()
            victim.start()
    finally:
        forward.kill()
    rows = sql(folders[1] / "inlet.db", "SELECT body, key, client FROM messages ORDER BY id")
    assert rows == [(f'{{"n" : {n}}}', f"messages-{n + 1}", "relay") for n in range(count)]
    assert not (tmp_path / "messages.cursor.refused").exists()
    for server in (source, relay):
        server.signal(signal.SIGTERM)
        assert server.end() == 0
