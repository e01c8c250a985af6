"""The command forward."""

import base64
import contextlib
import hashlib
import hmac
import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
import time

import pytest

import service
from test_service import DEADLINE_S, HERE, TOKEN, Process, add_tester, eventually, for_many_tests, send, stream_sql

KEY = b"k" * 24
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
BODIES = [
    '{"n":1}',
    ' {"n" :\n 2.10} \n',
    '"[{, \\"messages\\": [é"',
    "[]",
    '{"a":[{"body": 5}],"a":1}',
    "1" * 5000,
    "7",
]


@pytest.fixture(scope=for_many_tests)
def source(tmp_path_factory):
    """Each test has a stream of its own in it."""
    folder = tmp_path_factory.mktemp("source")
    names = ("messages", "refused", "gone", "filtered", "failing")
    columns = ", headers TEXT, n TEXT AS (body ->> 'n')"
    (folder / "schema.sql").write_text("".join(stream_sql(name, columns) for name in names))
    with contextlib.closing(Process(folder, "--schema", str(folder / "schema.sql"))) as server:
        add_tester(server.database)
        eventually(lambda: send(server.connect(), "GET", "/")[0] == 200)
        yield server


class Target(http.server.BaseHTTPRequestHandler):
    """Keeps what comes, and answers what `answers` has for it: a status, and headers."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.came.append((self.path, dict(self.headers.items()), body, time.monotonic()))
        status, headers = self.server.answers.pop(0) if self.server.answers else (204, {})
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        content = b"" if status == 204 else b'{"why":\n"no"}'
        for header in ({} if status == 204 else {"Content-Length": len(content)} | headers).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def target():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Target) as server:
        server.came, server.answers = [], []
        server.url = f"http://127.0.0.1:{server.server_port}/hook?a=1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextlib.contextmanager
def forwarding(folder, stream, to, *flags, **environ):
    """The command as a process; it is told to stop at the end of the block."""
    command = [sys.executable, str(HERE / "service.py"), "forward", stream, to, *flags]
    environ = os.environ | {"INLET_TOKEN": TOKEN, "INLET_SECRET": SECRET} | environ
    process = subprocess.Popen(command, cwd=folder, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        yield process
        process.terminate()
        process.said = process.communicate(timeout=DEADLINE_S)[1]
        assert "Traceback" not in process.said
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def post(server, body, stream="messages"):
    with contextlib.closing(server.connect()) as connection:
        assert send(connection, "POST", f"/{stream}", body)[0] == 201


def test_each_message_comes_signed_in_order_and_as_it_was_sent(source, target, tmp_path):
    for body in BODIES[:5]:
        post(source, body.encode())
    with forwarding(tmp_path, f"{source.url}/messages", target.url) as process:
        eventually(lambda: len(target.came) == 5)
        for body in BODIES[5:]:
            post(source, body.encode())
        eventually(lambda: len(target.came) == 7)
        eventually(lambda: (tmp_path / "messages.cursor").read_text().startswith(f"{7:019}\n"))
    assert process.returncode == 0
    for number, (path, headers, body, _) in enumerate(target.came, 1):
        assert (path, body.decode()) == ("/hook?a=1", BODIES[number - 1])
        assert (headers["webhook-id"], headers["Content-Type"]) == (f"messages-{number}", "application/json")
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        digest = base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
        assert headers["webhook-signature"] == f"v1,{digest}"
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    with forwarding(tmp_path, f"{source.url}/messages", target.url):
        post(source, "8")
        eventually(lambda: len(target.came) == 8)  # it goes on from its cursor
    assert target.came[7][2] == b"8"
    assert (tmp_path / "messages.cursor").stat().st_mode & 0o777 == 0o600


def test_what_can_pass_is_sent_again_and_what_cannot_is_put_aside(source, target, tmp_path):
    target.answers = [(0, {}), (302, {"Location": "/"}), (401, {}), (503, {"Retry-After": "1"})]
    target.answers += [(200, {}), (422, {}), (413, {})]
    for n in range(1, 5):
        post(source, f'{{"n":\n{n}}}', "refused")
    with forwarding(tmp_path, f"{source.url}/refused", target.url) as process:
        eventually(lambda: len(target.came) == 8)
        refused = tmp_path / "refused.cursor.refused"
        eventually(lambda: (tmp_path / "refused.cursor").read_text().startswith(f"{4:019}\n"))
    assert [headers["webhook-id"][-1] for _, headers, _, _ in target.came] == list("11111234")
    pauses = [after[3] - before[3] for before, after in itertools.pairwise(target.came[:5])]
    assert pauses.pop() > 0.9  # it was asked for
    assert all(later > 1.5 * sooner for sooner, later in itertools.pairwise(pauses)), pauses
    kept = [json.loads(line) for line in refused.read_text().splitlines()]
    assert [(each["status"], each["message"]["id"], each["message"]["body"]) for each in kept] == [
        (422, 2, {"n": 2}),
        (413, 3, {"n": 3}),
    ]
    assert kept[0]["answer"] == '{"why":\n"no"}'
    assert process.said.count("trying again") == 4
    assert "message 2 is refused: 422" in process.said
    assert TOKEN not in process.said
    assert SECRET not in process.said


def test_410_ends_it_and_the_message_stays(source, target, tmp_path):
    post(source, "1", "gone")
    target.answers = [(410, {})]
    with forwarding(tmp_path, f"{source.url}/gone", target.url) as process:
        assert process.wait(DEADLINE_S) == 1
        assert "410" in process.stderr.read()
    with forwarding(tmp_path, f"{source.url}/gone", target.url):
        eventually(lambda: len(target.came) == 2)
    assert [came[2] for came in target.came] == [b"1", b"1"]


def test_a_filter_of_the_source_holds_and_a_name_is_at_listen(source, target, tmp_path):
    for n in "aba":
        post(source, f'{{"n": "{n}"}}', "filtered")
    with forwarding(tmp_path, f"{source.url}/filtered?n=a", target.url):
        eventually(lambda: len(target.came) == 2)
    with forwarding(tmp_path, "filtered", target.url, "--listen", source.address, "--cursor", "other"):
        eventually(lambda: len(target.came) == 5)
    assert (tmp_path / "other").is_file()


def test_ids_that_do_not_grow_are_no_feed(target, tmp_path):
    class Source(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = b'{"messages": [{"id": 9, "body": 9}, {"id": 3, "body": 3}], "next": "/x?after=3"}'
            self.send_response(200)
            self.send_header("Content-Length", len(page))
            self.end_headers()
            self.wfile.write(page)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Source) as source:
        threading.Thread(target=source.serve_forever, daemon=True).start()
        with forwarding(tmp_path, f"http://127.0.0.1:{source.server_port}/x", target.url) as process:
            assert "does not answer with its feed" in "".join(process.stderr.readline() for _ in range(2))
        source.shutdown()
    assert target.came == []


@pytest.mark.parametrize("page", [
    '[]', '{"messages": [{"body": 1}]}', '{"messages": [{[1]: 2}]}', '{"messages": [{{"a": 1}: 2}]}', '{"messages": [{"id": 1.5, "body": 1}]}',
    f'{{"messages": [{{"id": {"9" * 25}, "body": 1}}]}}', f'{{"messages": [{{"id": {"9" * 5000}, "body": 1}}]}}',
    '{"messages": [{"id": -1, "body": 1}]}', '{"messages": [{"id": 1, "body": ' + "[" * 200_000, '{"messages": [{"id": 1, "body": 1',
])  # fmt: skip
def test_a_page_that_is_no_feed_is_never_taken_for_one(page):
    forward = service.extra("forward")
    with pytest.raises((ValueError, LookupError, RecursionError)):
        list(forward.messages_in(page))


def test_it_says_in_one_line_why_it_cannot_run(source, target, one_line_error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = f"{source.url}/failing"

    def said(*words, **environ):
        for name, value in ({"INLET_TOKEN": TOKEN, "INLET_SECRET": SECRET, "INLET_SECRET_FILE": ""} | environ).items():
            monkeypatch.setenv(name, value)
        return one_line_error("forward", *words)

    assert "INLET_TOKEN" in said(stream, target.url, INLET_TOKEN="")
    assert "INLET_SECRET" in said(stream, target.url, INLET_SECRET="")
    assert "INLET_SECRET has to be whsec_" in said(stream, target.url, INLET_SECRET="whsec_nobase64!")
    assert "INLET_SECRET_FILE" in said(stream, target.url, INLET_SECRET_FILE="nowhere")
    bad_urls = ("nowhere", "ftp://a/b", "http:///a", "http://a:99999/", "http://a:b@c/", "http://a..b/", "http://a/a b")
    for bad in (*bad_urls, f"http://{'a' * 70}/"):
        assert "forward takes" in said(stream, bad)
    for name, text in (("bad", "5\n"), ("empty", "")):  # an empty one would begin again
        (tmp_path / name).write_text(text)
        assert "is no cursor" in said(stream, target.url, "--cursor", name)
    assert "cannot be used" in said(stream, target.url, "--cursor", "no/folder")
    with forwarding(tmp_path, stream, target.url):
        eventually(lambda: (tmp_path / "failing.cursor").is_file())
        time.sleep(0.3)
        assert "another process uses" in said(stream, target.url)
    assert "belongs to" in said(stream, f"{target.url}2")
    with forwarding(tmp_path, f"{stream}?nothing=1", target.url, "--cursor", "new") as process:
        assert process.wait(DEADLINE_S) == 2
        assert "cannot be read: 400" in process.stderr.read()
