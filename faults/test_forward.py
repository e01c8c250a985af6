"""forward, while all three of its sides are killed."""

import base64
import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from common import Server, database, seed, sql, wait_until
from deployed import free_port

from test_service import BATCH, HERE, TOKEN, send, stream_sql

SECRET = f"whsec_{base64.b64encode(b'k' * 24).decode()}"
# A time-out of 30 s would make this test too long.
FORWARD = """import sys, service
service.extra("forward").TIMEOUT_S = 1.0
service.extra("forward").WAIT_S = 2
service.extra("forward").LONGEST_PAUSE_S = 0.5
sys.exit(service.main())"""


class Program:
    """A process that is killed and started again."""

    def __init__(self, folder: Path, *command: str, **environ: str):
        self._folder, self._command, self._environ = folder, command, environ
        self.start()

    def start(self) -> None:
        environ = os.environ | {"INLET_TOKEN": TOKEN, "INLET_SECRET": SECRET, "PYTHONPATH": str(HERE)} | self._environ
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


@contextlib.contextmanager
def forwarding(folder, *words, **environ):
    program = Program(folder, sys.executable, "-c", FORWARD, "forward", *words, **environ)
    try:
        yield
    finally:
        program.kill()


@pytest.fixture
def source(tmp_path):
    database(tmp_path, stream_sql("messages"))
    server = Server(tmp_path)
    yield server
    assert server.end() == 0


def post(server, body):
    with contextlib.closing(server.connect()) as connection:
        assert send(connection, "POST", "/messages", body)[0] == 201


def raw_target(answers):
    """A target that sends these bytes, one after the other, for each request; and what came, by webhook-id."""
    came, listener = [], socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            with contextlib.suppress(OSError), listener.accept()[0] as sock, sock.makefile("rb") as file:
                while line := file.readline():
                    headers = {}
                    while (line := file.readline().strip()) != b"":
                        headers[line.partition(b":")[0].lower()] = line.partition(b":")[2].strip().decode()
                    file.read(int(headers[b"content-length"]))
                    came.append(headers[b"webhook-id"])
                    for pause, data in answers(len(came)):
                        time.sleep(pause)
                        sock.sendall(data)
                    if answers(len(came))[-1][1] not in (OK, NOT_NOW):
                        break

    threading.Thread(target=serve, daemon=True).start()
    return came, f"http://127.0.0.1:{listener.getsockname()[1]}/"


OK, NOT_NOW = b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


@pytest.mark.parametrize("answers", [
    lambda n: [(0, EARLY + EARLY + (NOT_NOW if n == 3 else OK))],  # what is not yet the answer
    lambda n: [(0, OK)] + ([(0.1, b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n")] if n == 3 else []),  # said to nobody
    lambda n: [(0, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n")] if n == 2 else [(0, OK)],
    lambda n: [(0, b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort")] if n == 2 else [(0, OK)],
    lambda n: [(0, b"\x1b[2Jowned\r\n\r\n")] if n == 2 else [(0, OK)],
], ids=["103", "unsolicited", "chunk", "cut", "garbage"])  # fmt: skip
def test_a_target_that_speaks_oddly_gets_each_message_and_none_is_put_aside(answers, source, tmp_path):
    came, url = raw_target(answers)
    cursor = tmp_path / "c"
    with forwarding(tmp_path, f"{source.url}/messages/", url, "--cursor", "c"):
        for first in (1, 4):
            for n in range(first, first + 3):
                post(source, str(n))
            wait_until(lambda end=first + 2: cursor.exists() and int(cursor.read_text()[:19]) == end, "it is stuck")
            time.sleep(0.3)
    assert list(dict.fromkeys(came)) == [f"messages-{n}" for n in range(1, 7)]
    assert not (tmp_path / "c.refused").exists()
    assert "\x1b" not in (tmp_path / "forward.log").read_text()


def test_a_message_of_70_mb_comes_through(tmp_path):
    database(tmp_path, stream_sql("messages"))
    server = Server(tmp_path, "--max-body", "100000000")
    lengths = []

    class Target(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            lengths.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Target) as target:
        threading.Thread(target=target.serve_forever, daemon=True).start()
        for body in (b"1", b'"%b"' % (b"x" * 70_000_000), b"2"):
            post(server, body)
        with forwarding(tmp_path, f"{server.url}/messages", f"http://127.0.0.1:{target.server_port}/"):
            wait_until(lambda: lengths[-1:] == [1] and len(lengths) >= 3, "it is stuck")
        target.shutdown()
    assert lengths == [1, 70_000_002, 1]
    assert server.end() == 0


def test_an_answer_that_never_ends_holds_nothing_up(source, tmp_path):
    def drip(n):
        return [(0, b"HTTP/1.1 200 OK\r\n\r\n")] + [(0.2, b"x")] * 50 if n == 1 else [(0, OK)]

    post(source, "1")
    post(source, "2")
    came, url = raw_target(drip)
    with forwarding(tmp_path, f"{source.url}/messages", url):
        wait_until(lambda: came[-1:] == ["messages-2"], "200 was not enough")
    assert came == ["messages-1", "messages-2"]  # 200 was enough


def test_a_line_that_a_crash_has_cut_spoils_no_other(source, tmp_path):
    (tmp_path / "messages.cursor.refused").write_text('{"refused_at": "20')
    post(source, '{"n": "\N{LATIN SMALL LETTER E WITH ACUTE}"}'.encode())
    _, url = raw_target(lambda n: [(0, b"HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n")])
    with forwarding(tmp_path, f"{source.url}/messages", url, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"):
        cursor = tmp_path / "messages.cursor"
        wait_until(lambda: cursor.exists() and int(cursor.read_text()[:19]) == 1, "it is stuck")
    lines = (tmp_path / "messages.cursor.refused").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1])["message"]["body"] == {"n": "\N{LATIN SMALL LETTER E WITH ACUTE}"}


def test_what_is_wrong_with_the_source_can_pass(source, tmp_path):
    for path, token, word in (("messages", "wrong", "401"), ("nothing", TOKEN, "404"), ("healthz", TOKEN, "its feed")):
        with forwarding(tmp_path, f"{source.url}/{path}", "http://127.0.0.1:1/", "--cursor", word, INLET_TOKEN=token):
            log = tmp_path / "forward.log"
            wait_until(lambda word=word, log=log: word in log.read_text() and "trying again" in log.read_text(), word)
