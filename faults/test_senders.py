"""Programs that teams already run send to Inlet, each with its file in deploy/senders/, while Inlet is stopped and started.

In between, something else answers 503 in its place, as a proxy does.
"""

import contextlib
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from common import Server, database, sql, wait_until
from deployed import BIN, DEPLOY, adapted, free_port, running, temporary_paths
from playwright.sync_api import sync_playwright

from test_service import DEADLINE_S, TOKEN, run, stream_sql

HALF = 10  # of the events are sent before the outage, and as many in it
OUTAGE_S = 2
NPM = Path(os.environ.get("INLET_SENDERS", "INLET_SENDERS is not set"))
SCHEMA = stream_sql("events", ", headers TEXT, event TEXT AS (headers ->> 'ce-id')")


class Unavailable(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
        else:
            self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        self.send_response(503)
        self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def unavailable(port):
    """Something that answers 503 to all POSTs; yields the list of their paths."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Unavailable) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.asked
        server.shutdown()
        thread.join()


@pytest.fixture
def server(tmp_path):
    database(tmp_path, SCHEMA)
    with contextlib.closing(Server(tmp_path, "--listen", f"127.0.0.1:{free_port()}")) as server:
        yield server


def token_of(server, *flags):
    return run(server.folder, "client", "add", "program", "--can", "write:events", *flags).stdout.strip()


def for_server(server, name, token, *changes):
    """A file of deploy/senders/, for this server."""
    changes = (("127.0.0.1:8080", server.address), ("THE-TOKEN", token), *changes)
    return adapted(f"senders/{name}", server.folder, *changes)


def through_an_outage(server, send, number_of):
    """Half of the events are sent, and half of them while Inlet is stopped, or 503 is answered in its place.

    send(first, last) sends events; number_of is the SQL of how many different ones are stored. Returns the rows.
    """
    path = server.folder / "inlet.db"

    def stored():
        return sql(path, f"SELECT {number_of} FROM events")[0][0]

    send(0, HALF)
    wait_until(lambda: stored() == HALF, "the first half is not there")
    assert server.end() == 0
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, HALF, 2 * HALF)
        time.sleep(OUTAGE_S)
        with unavailable(server.port) as asked:
            wait_until(lambda: asked, "nothing was sent again")
        server.start()
        wait_until(lambda: stored() == 2 * HALF, "what was sent in the outage does not come", 90)
        sent.result()
    print(f"{len(asked)} requests got 503")
    return sql(path, "SELECT key, body, headers FROM events ORDER BY id")


def test_alertmanager(server):
    """An alert can come twice, if the answer to the first was lost."""
    token, port = token_of(server), free_port()
    config = for_server(server, "alertmanager.yml", token)
    command = ["prometheus-alertmanager", f"--config.file={config}", f"--storage.path={server.folder}/alerts"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]

    def send(first, last):
        alerts = [{"labels": {"alertname": "test", "n": str(n)}} for n in range(first, last)]
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{port}/api/v2/alerts"
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(alerts).encode(), headers), timeout=DEADLINE_S)

    with running(command, server.folder, port, path="/-/ready"):
        rows = through_an_outage(server, send, "count(DISTINCT body ->> '$.commonLabels.n')")
    assert len(rows) >= 2 * HALF
    identities = {
        tuple(json.loads(body)["alerts"][0][name] for name in ("fingerprint", "startsAt")) for _, body, _ in rows
    }
    assert len(identities) == 2 * HALF  # which is how the file says that they are told apart


def test_syslog_ng(server):
    """Also what it has on its disk when it is killed."""
    folder = server.folder
    token = token_of(server, "--key", "body")
    config = for_server(
        server, "syslog-ng.conf", token, ("/run/inlet-syslog", f"{folder}/socket"), ("/var/lib/syslog-ng", str(folder))
    )
    command = [
        "syslog-ng",
        "-F",
        "-f",
        config,
        "-R",
        folder / "persist",
        "-c",
        folder / "control",
        "-p",
        folder / "pid",
    ]
    running_now = []

    def start():
        (folder / "socket").unlink(missing_ok=True)
        running_now.append(subprocess.Popen([str(word) for word in command]))
        wait_until((folder / "socket").exists, "syslog-ng does not listen")

    def send(first, last):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            for n in range(first, last):
                sock.sendto(f"<13>Nov 29 10:00:00 program: n={n}".encode(), str(folder / "socket"))
        if first:
            time.sleep(1)  # until it has written them
            running_now[-1].send_signal(signal.SIGKILL)
            running_now[-1].wait()
            start()

    start()
    try:
        rows = through_an_outage(server, send, "count(DISTINCT body ->> 'MESSAGE')")
    finally:
        running_now[-1].terminate()
        running_now[-1].wait()
    assert sorted(json.loads(body)["MESSAGE"] for _, body, _ in rows) == sorted(f"n={n}" for n in range(2 * HALF))
    assert all(key for key, _, _ in rows)
    assert len({json.loads(body)["UNIQID"] for _, body, _ in rows}) == 2 * HALF  # also a line that is like another one


def test_telegraf(server):
    folder = server.folder
    token = token_of(server, "--key", "body")
    changes = ("/run/telegraf.sock", f"{folder}/sock"), ("/var/lib/telegraf", f"{folder}/buffer")
    config = for_server(server, "telegraf.conf", token, *changes)
    process = subprocess.Popen([os.environ["INLET_TELEGRAF"], "--quiet", "--config", config])

    def send(first, last):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            for n in range(first, last):
                sock.sendto(f"app n={n}i\n".encode(), str(folder / "sock"))

    try:
        wait_until((folder / "sock").exists, "telegraf does not listen", 30)
        rows = through_an_outage(server, send, "count(DISTINCT body ->> '$.fields.n')")
    finally:
        process.terminate()
        process.wait()
    assert sorted(json.loads(body)["fields"]["n"] for _, body, _ in rows) == list(range(2 * HALF))


def test_opentelemetry(server):
    """It tries again for about ten seconds."""
    assert (NPM / "node_modules" / "@opentelemetry").is_dir(), NPM
    script = NPM / "opentelemetry.mjs"  # beside its packages
    script.write_text((DEPLOY / "senders" / script.name).read_text())
    environ = os.environ | {"INLET_URL": f"{server.url}/events", "INLET_TOKEN": token_of(server)}

    def send(first, last):
        subprocess.run(["node", script, str(last - first)], env=environ, check=True)

    rows = through_an_outage(server, send, "count(*)")
    texts = [
        json.loads(body)["resourceLogs"][0]["scopeLogs"][0]["logRecords"][0]["body"]["stringValue"]
        for _, body, _ in rows
    ]
    assert sorted(texts) == sorted(2 * [f"event {n}" for n in range(HALF)])


def test_node_red(server):
    """Whoever sends to it has its answer when Inlet has taken the message."""
    folder, port = server.folder / "node-red", free_port()
    folder.mkdir()
    (folder / "flows.json").write_text((DEPLOY / "senders" / "node-red.json").read_text())
    (folder / "flows_cred.json").write_text(json.dumps({"send": {"password": "${INLET_TOKEN}"}}))
    settings = (
        f'flowFile: "flows.json", httpAdminRoot: false, credentialSecret: false, uiHost: "127.0.0.1", uiPort: {port}'
    )
    (folder / "settings.js").write_text(f"module.exports = {{{settings}}};\n")
    environ = {
        "INLET_URL": f"{server.url}/events",
        "INLET_TOKEN": token_of(server),
        "NODE_RED_ENABLE_TELEMETRY": "false",
    }
    command = ["node", NPM / "node_modules" / "node-red" / "red.js", "--userDir", folder, "flows.json"]

    def post(n):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/in", b'{"n": %d}' % n, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=90) as answer:
            return answer.status

    def send(first, last):
        with ThreadPoolExecutor(last - first) as pool:
            assert set(pool.map(post, range(first, last))) <= {200, 201}

    def is_there():  # it listens before it has started the flow
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)) as connection:
            connection.request("OPTIONS", "/in")
            return connection.getresponse().status == 200

    with running(command, server.folder, port, environ, path="/in"):
        wait_until(is_there, "the flow does not start")
        rows = through_an_outage(server, send, "count(DISTINCT body ->> 'n')")
    assert sorted(json.loads(body)["n"] for _, body, _ in rows) == list(range(2 * HALF))
    assert len({key for key, _, _ in rows}) == 2 * HALF


@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_cloudevents(mode, server):
    environ = os.environ | {"INLET_URL": f"{server.url}/events", "INLET_TOKEN": token_of(server)}

    def send(first, last):
        script = DEPLOY / "senders" / "cloudevents_sender.py"
        subprocess.run([BIN / "python", script, mode, str(last - first)], env=environ, check=True)

    for key, body, headers in through_an_outage(server, send, "count(DISTINCT key)"):
        named = json.loads(headers)["ce-id"] if mode == "binary" else json.loads(body)["id"]
        assert key == named


PAGE = "<!doctype html><title>t</title><script>1</script><img src='http://example.invalid/x.png'>"
SITE = """
daemon off; pid {folder}/pid; error_log stderr; events {{}}
http {{
    access_log off; {places}
    upstream inlet {{ server {address}; }}
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {folder}/cert.pem;
        ssl_certificate_key {folder}/key.pem;
        location = / {{
            default_type text/html;
            add_header Content-Security-Policy "default-src 'self'; {directive}";
            add_header Reporting-Endpoints 'csp="https://localhost:{port}/hook-Zk3/reports"';
            return 200 "{page}";
        }}
        location / {{ proxy_pass http://127.0.0.1:{hooks}; proxy_set_header Host $http_host; }}
    }}
    include {folder}/webhooks.conf;
}}
"""
OPENSSL = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 3 -subj /CN=localhost"
OPENSSL += " -addext subjectAltName=DNS:localhost"


@contextlib.contextmanager
def a_site(server, directive):
    """A page over https that reports to deploy/webhooks.conf; yields (its URL, a tab of Chromium)."""
    folder, port, hooks = server.folder, free_port(), free_port()
    adapted(
        "webhooks.conf",
        folder,
        ("listen 8090;", f"listen 127.0.0.1:{hooks};"),
        ("THE-SECRET-PATH", "hook-Zk3"),
        ("THE-TOKEN", TOKEN),
        ("https://site.example", f"https://localhost:{port}"),
        ("inlet/messages", "inlet/events"),
    )
    ports = {"address": server.address, "port": port, "hooks": hooks}
    site = SITE.format(folder=folder, places=temporary_paths(folder), directive=directive, page=PAGE, **ports)
    (folder / "all.conf").write_text(site)
    subprocess.run(OPENSSL.split(), cwd=folder, check=True, capture_output=True)
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--ignore-certificate-errors",
        "--short-reporting-delay",
    ]
    with (
        running(["nginx", "-p", folder, "-c", folder / "all.conf"], folder, hooks, path="/"),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        yield f"https://localhost:{port}/", browser.new_page(ignore_https_errors=True)
        browser.close()


def test_a_browser_reports_what_csp_has_stopped_and_sends_beacons(server):
    path = server.folder / "inlet.db"
    with a_site(server, "report-uri /hook-Zk3/reports") as (url, page):
        page.goto(url)
        wait_until(lambda: sql(path, "SELECT count(*) FROM events")[0][0] == 2, "no report comes")
        beacon = "([n, key]) => navigator.sendBeacon('/hook-Zk3/reports?key=' + key, JSON.stringify({n}))"
        for n in (1, 2, 2):
            assert page.evaluate(beacon, [n, f"key-{n}"])
        wait_until(lambda: sql(path, "SELECT count(*) FROM events")[0][0] == 4, "no beacon comes")
    rows = sql(path, "SELECT key, body FROM events ORDER BY id")
    assert {json.loads(body)["csp-report"]["blocked-uri"] for _, body in rows[:2]} >= {"inline"}
    assert [(key, json.loads(body)) for key, body in rows[2:]] == [("key-1", {"n": 1}), ("key-2", {"n": 2})]


def test_a_browser_sends_its_reports_again_until_they_are_taken(server):
    path = server.folder / "inlet.db"
    with a_site(server, "report-to csp") as (url, page):
        assert server.end() == 0
        page.goto(url)
        time.sleep(OUTAGE_S)
        server.start()
        count = "SELECT count(*) FROM events, json_each(events.body) AS r"
        wait_until(lambda: sql(path, count)[0][0] >= 2, "no report comes after the outage", 60)
    reports = [report for (body,) in sql(path, "SELECT body FROM events") for report in json.loads(body)]
    assert {report["type"] for report in reports} == {"csp-violation"}
    assert "inline" in {report["body"]["blockedURL"] for report in reports}
