"""Signed senders with the packages and payloads of those who send, and what others read from /metrics."""

import base64
import contextlib
import datetime
import hmac
import http.client
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import slack_sdk.signature
import standardwebhooks
import stripe
import svix.webhooks
from common import Server, database
from deployed import DEPLOY, adapted, free_port, running, temporary_paths
from prometheus_client.parser import text_string_to_metric_families

from service import digest_of
from test_service import AUTHORIZATION, DEADLINE_S, READING, eventually, run, send, stream_sql

# https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries#testing-the-webhook-payload-validation
GITHUB_SECRET, GITHUB_BODY = "It's a Secret to Everybody", b"Hello, World!"
GITHUB_DIGEST = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
SVIX_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SCHEMA = stream_sql("messages", ", headers TEXT, event TEXT AS (headers ->> 'x-github-event')") + stream_sql("other")


@pytest.fixture
def server(tmp_path):
    database(tmp_path, SCHEMA)
    with contextlib.closing(Server(tmp_path, "--schema", str(tmp_path / "schema.sql"))) as process:
        yield process


def add(folder: Path, scheme: str, secret: str, *more: str) -> None:
    """A client that signs with a secret that it dictates."""
    added = run(folder, "client", "add", scheme, "--signs", scheme, "--secret", "-", *more, given=f"{secret}\n")
    assert (added.returncode, added.stdout.strip()) == (0, secret), added.stderr


def post(server: Server, body: bytes, **headers: str) -> tuple[int, dict]:
    """Without a token; (status, JSON)."""
    with contextlib.closing(server.connect()) as connection:
        connection.request("POST", "/messages", body, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer.status, json.load(answer)


def test_what_the_standardwebhooks_package_signs_is_taken(server, tmp_path):
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    add(tmp_path, "standard", secret)
    signer, now = standardwebhooks.Webhook(secret), datetime.datetime.now(datetime.UTC)
    for number, body in enumerate(['{"test": 2432232314}', "é", "{}"]):
        text = json.dumps(body) if body == "é" else body
        signature = signer.sign(f"msg_{number}", now, text)
        headers = {"webhook-id": f"msg_{number}", "webhook-timestamp": str(int(now.timestamp()))}
        other = "v1," + base64.b64encode(b"x" * 32).decode()
        for given in (signature, f"{other} v2,x {signature}"):
            assert post(server, text.encode(), **headers, **{"webhook-signature": given})[1]["id"] == number + 1
    assert post(server, b"{} ", **headers, **{"webhook-signature": signature})[0] == 401


def test_the_vector_in_the_documentation_of_github(server, tmp_path):
    add(tmp_path, "github", GITHUB_SECRET)
    assert hmac.digest(GITHUB_SECRET.encode(), GITHUB_BODY, "sha256").hex() == GITHUB_DIGEST
    headers = {"X-Hub-Signature-256": f"sha256={GITHUB_DIGEST}", "X-GitHub-Delivery": "d"}
    status, problem = post(server, GITHUB_BODY, **headers)
    assert (status, "not JSON" in problem["detail"]) == (400, True)  # so the signature was right
    assert post(server, GITHUB_BODY + b"!", **headers)[0] == 401


def test_the_payloads_of_github_come_in_with_their_events(server, tmp_path):
    add(tmp_path, "github", GITHUB_SECRET)
    (file,) = Path(os.environ["INLET_CORPUS"]).rglob("webhooks-examples/api.github.com/index.json")
    sent = 0
    for event in json.loads(file.read_bytes()):
        for example in event["examples"]:
            body, sent = json.dumps(example).encode(), sent + 1
            digest = hmac.digest(GITHUB_SECRET.encode(), body, "sha256").hex()
            headers = {"X-GitHub-Event": event["name"], "X-GitHub-Delivery": f"d-{sent}"}
            assert post(server, body, **headers, **{"X-Hub-Signature-256": f"sha256={digest}"})[1]["id"] == sent
    assert sent > 100
    with contextlib.closing(server.connect()) as connection:
        page = json.loads(send(connection, "GET", "/messages?event=push")[2])["messages"]
    assert page
    assert {message["headers"]["x-github-event"] for message in page} == {"push"}


def test_what_the_stripe_package_signs_is_taken(server, tmp_path):
    secret = "whsec_test_secret"
    add(tmp_path, "stripe", secret)
    for number in (1, 2):
        body = json.dumps({"id": f"evt_{number}", "object": "event"})
        at = int(time.time())
        v1 = stripe.WebhookSignature._compute_signature(f"{at}.{body}", secret)
        header = f"t={at},v1={'0' * 64},v1={v1},v0=x"
        assert stripe.Webhook.construct_event(body, header, secret)["id"] == f"evt_{number}"
        for _ in range(2):
            assert post(server, body.encode(), **{"Stripe-Signature": header})[1]["id"] == number
        assert post(server, body.encode() + b" ", **{"Stripe-Signature": header})[0] == 401


@contextlib.contextmanager
def secret_path(server: Server):
    """nginx with deploy/webhooks.conf in front of a server; yields (host, port). The path is /hook-Zk3."""
    folder, port, token = server.folder, free_port(), AUTHORIZATION["Authorization"]
    changes = [("listen 8090;", f"listen 127.0.0.1:{port};"), ("THE-SECRET-PATH", "hook-Zk3")]
    changes += [("THE-VERIFY-TOKEN", "verify-me"), ("Bearer THE-TOKEN", token)]
    adapted("webhooks.conf", folder, *changes)
    upstream = f"upstream inlet {{ server {server.address}; keepalive 8; }}"
    conf = folder / "all.conf"
    conf.write_text(
        f"daemon off; pid {folder}/pid; error_log stderr; events {{}}"
        f" http {{ access_log off; {temporary_paths(folder)} {upstream} include {folder}/webhooks.conf; }}"
    )
    with running(["nginx", "-p", folder, "-c", conf], folder, port, path="/"):
        yield "127.0.0.1", port


def ask(address, method: str, path: str, body: bytes | None = None, **headers: str):
    """Without a token, as a sender that can send nothing but its own headers; (status, headers, body)."""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=DEADLINE_S)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_a_sender_that_can_neither_sign_nor_send_headers(server):
    """As Amazon SNS: text/plain, the id of the delivery in a header of its own."""
    body = b'{"Type": "Notification", "Message": "m"}'
    headers = {"Content-Type": "text/plain; charset=UTF-8", "x-amz-sns-message-id": "sns-1"}
    with secret_path(server) as address:
        for path, method, status in (("/hook-Zk3", "POST", 201), ("/hook-Zk3", "GET", 403), ("/hook", "POST", 404)):
            for _ in range(2):
                found, _, answer = ask(address, method, path, body if method == "POST" else None, **headers)
                assert found == status
                if found == 201:
                    assert json.loads(answer)["id"] == 1
    with contextlib.closing(server.connect()) as connection:
        (message,) = json.loads(send(connection, "GET", "/messages")[2])["messages"]
    assert (message["key"], message["body"]["Message"]) == ("sns-1", "m")


DELIVERY_HEADERS = ["Idempotency-Key", "x-amz-sns-message-id", "x-request-uuid", "i-twilio-idempotency-token"]


def test_what_names_a_delivery_is_its_key_and_a_redelivery_is_a_replay(server):
    """Of several, the first in this order; each one alone; and none, which makes a message each time."""
    cases = [DELIVERY_HEADERS[n:] for n in range(len(DELIVERY_HEADERS))] + [[name] for name in DELIVERY_HEADERS]
    keys = []
    with secret_path(server) as address:
        for number, names in enumerate(cases):
            headers = {name: f"{name}-{number}" for name in names}
            keys.append(f"{names[0]}-{number}")
            first, again = (ask(address, "POST", "/hook-Zk3", b"1", **headers) for _ in range(2))
            assert (first[0], again[0], first[2]) == (201, 201, again[2]), names
            assert first[1]["Idempotent-Replayed"] is None
            assert again[1]["Idempotent-Replayed"] == "true", names
            assert ask(address, "POST", "/hook-Zk3", b"2", **headers)[0] == 422
        ids = [json.loads(ask(address, "POST", "/hook-Zk3", b"1")[2])["id"] for _ in range(2)]
    assert ids == [len(cases) + 1, len(cases) + 2]
    with contextlib.closing(server.connect()) as connection:
        messages = json.loads(send(connection, "GET", "/messages")[2])["messages"]
    assert [message["key"] for message in messages] == [*keys, None, None]


def test_a_page_of_an_origin_that_cors_names_may_use_the_secret_path(tmp_path):
    database(tmp_path, SCHEMA)
    server = Server(tmp_path, "--cors", "https://shop.example")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with secret_path(server) as address:
        for origin, allowed in (("https://shop.example", "https://shop.example"), ("https://other.example", None)):
            found, headers, _ = ask(address, "OPTIONS", "/hook-Zk3", Origin=origin, **asks)
            assert (found, headers["Access-Control-Allow-Origin"]) == (200, allowed)
            if allowed:
                assert (headers["Access-Control-Allow-Methods"], headers["Access-Control-Allow-Headers"]) == (
                    "GET, HEAD, POST",
                    "content-type",
                )
            found, headers, _ = ask(address, "POST", "/hook-Zk3", b"1", Origin=origin)
            assert (found, headers["Access-Control-Allow-Origin"]) == (201, allowed)
        assert ask(address, "PUT", "/hook-Zk3", b"1")[0] == 403
    assert server.end() == 0


def bodies(server):
    with contextlib.closing(server.connect()) as connection:
        return [message["body"] for message in json.loads(send(connection, "GET", "/messages")[2])["messages"]]


def test_forms_and_senders_that_can_only_get_come_through_the_secret_path(server):
    """And a value of a query stays a value, whatever is in it."""
    query = "temp=21.5&id=shelly-1&x=x%22%2C%20%22admin%22%3A%20%221&n=%0a&u=%E2%82%AC"
    wanted = {"temp": "21.5", "id": "shelly-1", "x": 'x", "admin": "1', "n": "\n", "u": "€"}
    with secret_path(server) as address:
        assert ask(address, "GET", f"/hook-Zk3/get?{query}")[0] == 201
        assert ask(address, "POST", "/hook-Zk3/get", b"1")[0] == 403
        assert ask(address, "HEAD", "/hook-Zk3/get?a=1")[0] == 403
        assert ask(address, "GET", "/hook-Zk3/get")[0] == 400
        for kind in ("application/x-www-form-urlencoded", "text/plain"):
            headers = {"Content-Type": kind, "I-Twilio-Idempotency-Token": "t-1"}
            assert ask(address, "POST", "/hook-Zk3/form", query.encode(), **headers)[0] == 201
    assert bodies(server) == [wanted, wanted]  # the second form was a redelivery


def test_handshakes_are_answered_and_then_posts_pass(server, tmp_path):
    add(tmp_path, "github", GITHUB_SECRET, "--can", "write:messages")
    body = b'{"object": "page"}'
    signed = f"sha256={hmac.digest(GITHUB_SECRET.encode(), body, 'sha256').hex()}"
    with secret_path(server) as address:
        meta = "/hook-Zk3/meta?hub.mode=subscribe&hub.challenge=1158201444&hub.verify_token="
        for token, status, text in (
            ("verify-me", 200, b"1158201444"),
            ("verify-m", 403, None),
            ("verify-me2", 403, None),
        ):
            found, headers, content = ask(address, "GET", meta + token)
            assert (found, text is None or (content, headers["Content-Type"]) == (text, "text/plain")) == (status, True)
        forged = "/hook-Zk3/meta?hub.verify_token=verify-me&hub.challenge=%3Cscript%3E"
        assert ask(address, "GET", forged)[2] == b""
        for signature, status in ((signed, 201), (signed[:-1] + "x", 401)):
            headers = {"Content-Type": "application/json", "X-Hub-Signature-256": signature}
            assert ask(address, "POST", "/hook-Zk3/meta", body, **headers)[0] == status
        # However the path is written, what is not signed does not come in.
        for path in (
            "/hook-Zk3/meta",
            "/hook-Zk3/%6deta",
            "/hook-Zk3/meta#",
            "//hook-Zk3//met%61",
            "/hook-Zk3/x/../meta",
        ):
            found, _, _ = ask(address, "POST", path, body, **{"Content-Type": "application/json"})
            assert found == 401, path
        found, headers, content = ask(address, "GET", "/hook-Zk3/dropbox?challenge=a-B_9")
        assert (found, content, headers["X-Content-Type-Options"]) == (200, b"a-B_9", "nosniff")
        assert ask(address, "POST", "/hook-Zk3/dropbox", b'{"list_folder": {}}')[0] == 201
        origin = {"WebHook-Request-Origin": "eventemitter.example"}
        found, headers, _ = ask(address, "OPTIONS", "/hook-Zk3/cloudevents", **origin)
        allowed = (headers["WebHook-Allowed-Origin"], headers["WebHook-Allowed-Rate"], headers["Allow"])
        assert (found, allowed) == (200, ("eventemitter.example", "*", "POST"))
        headers = {"Content-Type": "application/cloudevents+json"}
        assert ask(address, "POST", "/hook-Zk3/cloudevents", b'{"id": "1"}', **headers)[0] == 201
    assert bodies(server) == [{"object": "page"}, {"list_folder": {}}, {"id": "1"}]


def test_a_token_that_the_sender_has_for_somebody_else_does_no_harm(server):
    with secret_path(server) as address:
        for name in ("X-Gitlab-Token", "X-Api-Key", "X-Amz-Firehose-Access-Key", "Authorization"):
            assert ask(address, "POST", "/hook-Zk3", b"1", **{name: "theirs"})[0] == 201, name


def test_reports_and_beacons_of_one_site_come_in(server):
    with secret_path(server) as address:
        for origin, status in (("https://site.example", 201), ("https://other.example", 403), ("", 403)):
            for kind in ("application/csp-report", "application/reports+json", "text/plain;charset=UTF-8"):
                headers = {"Origin": origin, "Content-Type": kind, "Cookie": "a=b"}
                assert ask(address, "POST", "/hook-Zk3/reports", b"{}", **headers)[0] == status, (origin, kind)
        for _ in range(2):
            headers = {"Origin": "https://site.example", "Content-Type": "text/plain"}
            assert ask(address, "POST", "/hook-Zk3/reports?key=k-1", b'{"n": 1}', **headers)[0] == 201
    assert bodies(server) == [{}, {}, {}, {"n": 1}]


def test_what_the_packages_of_slack_svix_and_github_sign_is_taken(server, tmp_path):
    secret = "8f742231b10e8888abcd99yyyzzz85a5"
    for scheme, theirs in (("slack", secret), ("svix", SVIX_SECRET), ("github", GITHUB_SECRET)):
        add(tmp_path, scheme, theirs, "--can", "write:messages")
    at, body = str(int(time.time())), '{"event_id": "Ev1", "type": "event_callback"}'
    headers = {"X-Slack-Request-Timestamp": at}
    headers["X-Slack-Signature"] = slack_sdk.signature.SignatureVerifier(secret).generate_signature(
        timestamp=at, body=body
    )
    ids = [post(server, body.encode(), **headers)[1]["id"] for _ in range(2)]
    assert ids == [1, 1]
    assert post(server, body.encode() + b" ", **headers)[0] == 401
    wrong = slack_sdk.signature.SignatureVerifier(secret + "x").generate_signature(timestamp=at, body=body)
    assert post(server, body.encode(), **headers | {"X-Slack-Signature": wrong})[0] == 401

    for minutes, status in ((0, 201), (6, 401)):
        now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=minutes)
        signature = svix.webhooks.Webhook(SVIX_SECRET).sign("msg_1", now, "{}")
        headers = {"svix-id": "msg_1", "svix-timestamp": str(int(now.timestamp())), "svix-signature": signature}
        assert post(server, b"{}", **headers)[0] == status

    script = "import('@octokit/webhooks-methods').then(m => m.sign(process.argv[1], process.argv[2])).then(console.log)"
    modules = Path(os.environ["INLET_CORPUS"])
    signed = subprocess.run(
        ["node", "-e", script, GITHUB_SECRET, "[1]"], cwd=modules, capture_output=True, text=True, check=True
    )
    headers = {"X-Hub-Signature-256": signed.stdout.strip(), "X-GitHub-Delivery": "g-1"}
    assert [post(server, text, **headers)[0] for text in (b"[1]", b"[2]")] == [201, 401]


# /metrics


def test_the_parser_of_prometheus_reads_every_metric(server):
    with contextlib.closing(server.connect()) as connection:
        for body in (READING, "no"):
            send(connection, "POST", "/messages", body)
        _, _, text = send(connection, "GET", "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    assert families["inlet_commit_duration_seconds"].type == families["inlet_messages_per_commit"].type == "histogram"
    assert families["inlet_messages"].type == "counter"
    assert {sample.labels["stream"]: sample.value for sample in families["inlet_messages"].samples} == {
        "messages": 1,
        "other": 0,
    }
    requests = {(s.labels["stream"], s.labels["status"]): s.value for s in families["inlet_requests"].samples}
    assert (requests["messages", "201"], requests["messages", "400"]) == (1, 1)
    for name in ("commit_duration_seconds", "messages_per_commit"):
        counts = [s.value for s in families[f"inlet_{name}"].samples if s.name.endswith("_bucket")]
        assert counts == sorted(counts)
    for name in ("inlet_build_info", "inlet_waiting", "inlet_wal_bytes", "inlet_database_bytes", "inlet_commits"):
        assert families[name].documentation
    assert {"process_start_time_seconds", "process_cpu_seconds", "process_resident_memory_bytes"} <= families.keys()


def test_prometheus_scrapes_it_with_a_token_and_takes_the_rules(server, tmp_path):
    for tool in ("prometheus", "promtool"):
        assert shutil.which(tool), tool
    port, token = free_port(), tmp_path / "inlet-token"
    token.write_text(run(tmp_path, "client", "add", "prometheus", "--can", "read").stdout.strip())
    changes = [("/etc/prometheus/inlet-token", str(token)), ("127.0.0.1:8080", server.address)]
    file = adapted("prometheus.yml", tmp_path, *changes)
    file.write_text("global: {scrape_interval: 1s}\n" + file.read_text())
    shutil.copy(DEPLOY / "prometheus-rules.yml", tmp_path)
    checked = subprocess.run(["promtool", "check", "config", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    rules = (DEPLOY / "prometheus-rules.yml").read_text().count("- alert:")
    assert f" {rules} rules found" in checked.stdout
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--web.listen-address=127.0.0.1:{port}",
        f"--storage.tsdb.path={tmp_path}/tsdb",
    ]
    with running(command, tmp_path, port, path="/-/ready"), contextlib.closing(server.connect()) as connection:
        send(connection, "POST", "/messages", "1")

        def value(query):
            url = f"http://127.0.0.1:{port}/api/v1/query?query={query}"
            with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
                return [float(each["value"][1]) for each in json.load(answer)["data"]["result"]]

        eventually(lambda: value("up") == [1])
        eventually(lambda: 1 in value("inlet_messages_total"))
        assert value("inlet_build_info") == [1]
        assert send(connection, "POST", "/messages", "no")[0] == 400
        dashboard = json.loads((DEPLOY / "grafana.json").read_text())
        queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        assert len(queries) > 10
        for query in queries:
            asked = query.replace("$instance", ".*").replace("$__rate_interval", "1m")
            command = ["promtool", "query", "instant", f"http://127.0.0.1:{port}", asked]
            eventually(lambda command=command: " => " in subprocess.check_output(command, text=True))


def test_a_token_is_rotated_under_load_and_nobody_is_refused(server, tmp_path):
    """In two processes: a new token is valid at once, and the old one ends within a second."""
    first = Server(tmp_path, "--schema", str(tmp_path / "schema.sql"))
    token, refused, stop = run(tmp_path, "client", "add", "rotated").stdout.strip(), [], threading.Event()
    used = [token]

    def load(process):
        with contextlib.closing(process.connect()) as connection:
            while not stop.is_set():
                status, _, _ = send(connection, "POST", "/messages", "1", Authorization=f"Bearer {used[0]}")
                refused.extend([status] * (status != 201))

    threads = [threading.Thread(target=load, args=(process,)) for process in (first, server) * 4]
    for thread in threads:
        thread.start()
    for _ in range(5):
        old, used[0] = used[0], run(tmp_path, "client", "add", "rotated").stdout.strip()
        time.sleep(0.5)  # every request with the old one has ended
        assert run(tmp_path, "client", "remove", "rotated", digest_of(old)[:12]).returncode == 0
        time.sleep(1.5)
        for process in (first, server):
            with contextlib.closing(process.connect()) as connection:
                assert send(connection, "POST", "/messages", "1", Authorization=f"Bearer {old}")[0] == 401
    stop.set()
    for thread in threads:
        thread.join()
    assert refused == []
    assert first.end() == 0
