"""Senders that sign their messages."""

import base64
import gzip
import hmac
import io
import json
import re
import sys
import time

import falcon.testing
import pytest

import service
from test_service import BATCH, HERE, TOKEN, client_of, eventually, in_http, rows, stream_sql

# How senders sign, as their documentation has it: the headers, with {hex} or {base64} of the HMAC, what is before the body
# in what it signs, the header that names the delivery, and a secret as they make it.
STANDARD = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SIGNED = {
    "standard": ({"Webhook-Signature": "v1,{base64}", "Webhook-Timestamp": "{at}"}, "{ident}.{at}.", "Webhook-Id", ""),
    "svix": ({"Svix-Signature": "v1,{base64}", "Svix-Timestamp": "{at}"}, "{ident}.{at}.", "Svix-Id", STANDARD),
    "github": ({"X-Hub-Signature-256": "sha256={hex}", "X-Hub-Signature": "sha1=0"}, "", "X-GitHub-Delivery", ""),
    "stripe": ({"Stripe-Signature": "t={at},v1={hex}"}, "{at}.", "", "whsec_abcdefgh12345"),
    "shopify": ({"X-Shopify-Hmac-Sha256": "{base64}"}, "", "X-Shopify-Webhook-Id", "shpss_0123456789"),
    "slack": (
        {"X-Slack-Signature": "v0={hex}", "X-Slack-Request-Timestamp": "{at}"},
        "v0:{at}:",
        "",
        "8f742231b10e8888",
    ),
    "zoom": ({"X-Zm-Signature": "v0={hex}", "X-Zm-Request-Timestamp": "{at}"}, "v0:{at}:", "", "zoom-secret-token"),
    "bitbucket": ({"X-Hub-Signature": "sha256={hex}"}, "", "X-Request-UUID", ""),
    # All that one of its webhooks sends in one second has the same X-WC-Webhook-Delivery-ID.
    "woocommerce": ({"X-WC-Webhook-Signature": "{base64}", "X-WC-Webhook-Delivery-ID": "d-1"}, "", "", ""),
}
TIMED = [scheme for scheme, (_, prefix, _, _) in SIGNED.items() if "{at}" in prefix]
MEMBERS = {"stripe": "id", "slack": "event_id"}  # of the body, that name the delivery


def signed(scheme, secret, body, at=None, ident="d-1"):
    """The headers with which a sender signs a body; at: the time that it signs."""
    headers, prefix, named, _ = SIGNED[scheme]
    in_base64 = scheme in ("standard", "svix")
    key = base64.b64decode(secret.removeprefix("whsec_")) if in_base64 else secret.encode()
    values = {"at": str(int(time.time() if at is None else at)), "ident": ident}
    digest = hmac.digest(key, prefix.format(**values).encode() + body, "sha256")
    values |= {"hex": digest.hex(), "base64": base64.b64encode(digest).decode()}
    made = {name: value.format(**values) for name, value in headers.items()}
    return made | ({named: ident} if named else {})


DELIVERY = b'{"id": "d-1", "event_id": "d-1", "n": 1}'


@pytest.fixture(params=SIGNED)
def sender(request, store, command, client, monkeypatch):
    """Sends a body, signed by a client of a scheme that may write to messages; (answer, the headers that it has sent)."""

    def add(dictated):
        monkeypatch.setattr(sys, "stdin", io.StringIO(dictated + "\n"))
        more = ["--secret", "-"] if dictated else []
        _, secret, _ = command("client", "add", "shop", "--signs", request.param, "--can", "write:messages", *more)
        return secret.strip()

    made = add(SIGNED[request.param][3])

    def send_it(body=DELIVERY, to="messages", secret=made, change=lambda headers: headers, more=None, **options):
        headers = change(signed(request.param, secret, body, **options)) | (more or {})
        return client.post(to, body, Authorization=None, **headers), headers

    send_it.scheme, send_it.secret, send_it.add = request.param, made, add
    send_it.names_it = request.param not in ("zoom", "woocommerce")  # does anything identify a delivery?
    return send_it


def test_a_signed_message_needs_no_token_and_its_delivery_is_its_key(sender, store):
    answer, _ = sender()
    key = "d-1" if sender.names_it else None
    found = rows(store, "SELECT client, key, body FROM messages")
    assert (answer.status_code, found) == (201, [("shop", key, DELIVERY.decode())])
    # A redelivery: the first body stays, for who can only try again.
    for body in (DELIVERY, DELIVERY.replace(b"1}", b"2}")) if sender.names_it else ():
        answer, _ = sender(body, at=time.time() + 1)
        assert (answer.status_code, answer.headers["Idempotent-Replayed"], answer.json["id"]) == (201, "true", 1)
    assert sender(to="readings")[0].status_code == 403
    for path, status in (("nothing", 404), ("healthz/x", 404), ("messages/1", 405), ("warm", 405), ("metrics", 405)):
        assert sender(to=path)[0].status_code == status, path
    packed = gzip.compress(DELIVERY.replace(b"d-1", b"d-2"))
    assert (
        sender(packed, ident="d-2", more={"Content-Encoding": "gzip"})[0].status_code == 201
    )  # it signs what it sends
    assert rows(store, "SELECT key FROM messages") == [(key,), (key and "d-2",)]


def test_a_signed_message_that_is_no_json_is_400(sender, store):
    """Also where a member of the body names the delivery: it is looked for in JSON only."""
    answer, _ = sender(b'{"id": nul}')
    assert (answer.status_code, answer.json["column"]) == (400, 8)
    assert rows(store, "SELECT * FROM messages") == []


def test_a_signature_that_is_not_right_is_401(sender, client, store):
    name = next(
        name for name in signed(sender.scheme, sender.secret, b"") if "sig" in name.lower() or "hmac" in name.lower()
    )
    made = signed(sender.scheme, sender.secret, DELIVERY)[name]
    for wrong in (
        "",
        "x",
        "é",
        "v1,é",
        "sha256=é",
        made[:-4],
        made.swapcase(),
        made + "0",
        ",".join(["v1=0"] * 2000),
        "t=1,v1=0",
    ):
        assert sender(change=lambda headers: headers | {name: wrong})[0].status_code == 401, wrong  # noqa: B023
    assert sender(secret="whsec_" + "A" * 44)[0].status_code == 401
    headers = signed(sender.scheme, sender.secret, DELIVERY)
    assert client.post("messages", DELIVERY + b" ", Authorization=None, **headers).status_code == 401
    assert client.post("messages", DELIVERY, Authorization="Bearer x", **headers).status_code == 401  # the token counts
    assert client.simulate_get("/messages", headers=headers).status_code == 401
    if sender.scheme in TIMED:
        for seconds, status in ((-301, 401), (301, 401), (-290, 201), (290, 201)):
            assert sender(at=time.time() + seconds)[0].status_code == status, seconds
    assert len(rows(store, "SELECT * FROM messages")) == (sender.scheme in TIMED) * (1 if sender.names_it else 2)


def test_what_names_a_delivery_is_its_key_whatever_it_looks_like(sender, store):
    """And where a header names it, an id in the body does not."""
    for name in ("a  b", "x" * 300, "order 1") if sender.names_it else ():
        body = json.dumps({"id": "other", "event_id": "other"} | {MEMBERS.get(sender.scheme, "x"): name}).encode()
        for replayed in (None, "true"):
            answer, _ = sender(body, ident=name)
            assert (answer.status_code, answer.headers.get("Idempotent-Replayed")) == (201, replayed), name
    named = SIGNED[sender.scheme][2]
    if sender.scheme in ("standard", "svix"):
        assert sender(more={named: None})[0].status_code == 401
    elif named:
        for _ in range(2):
            assert sender(more={named: None})[0].status_code == 201
        assert rows(store, "SELECT count(*) FROM messages WHERE key IS NULL") == [(2,)]


@pytest.mark.parametrize("header", ["X-GitHub-Delivery", "X-Gitea-Delivery", "X-Forgejo-Delivery"])
def test_the_delivery_headers_of_gitea_and_forgejo_are_known(header, store, command, client):
    _, secret, _ = command("client", "add", "forge", "--signs", "github", "--can", "write:messages")
    headers = signed("github", secret.strip(), DELIVERY) | {"X-GitHub-Delivery": None, header: "f-1"}
    for _ in range(2):
        assert client.post("messages", DELIVERY, Authorization=None, **headers).status_code == 201
    assert rows(store, "SELECT key FROM messages") == [("f-1",)]


# From the documentation of Slack and GitHub, and the tests of Svix' and Standard Webhooks' libraries.
SLACK_FORM = (
    b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V&channel_name=foobar"
    b"&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text=&response_url=https%3A%2F%2Fhooks.slack.com"
    b"%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN&trigger_id=398738663015.47445629121.803a0bc887a14d"
    b"10d2c447fce8b6703c"
)
STANDARD_SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
VECTORS = {
    "slack": ("8f742231b10e8888abcd99yyyzzz85a5", 1531420618, SLACK_FORM, {
        "X-Slack-Signature": "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
        "X-Slack-Request-Timestamp": "1531420618"}),
    "github": ("It's a Secret to Everybody", 0, b"Hello, World!", {
        "X-Hub-Signature-256": "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"}),
    "bitbucket": ("It's a Secret to Everybody", 0, b"Hello World!", {
        "X-Hub-Signature": "sha256=a4771c39fbe90f317c7824e83ddef3caae9cb3d976c214ace1f2937e133263c9"}),
    "svix": (STANDARD, 1614265330, b'{"test": 2432232314}', {"Svix-Id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "Svix-Timestamp": "1614265330", "Svix-Signature": STANDARD_SIGNATURE}),
    "standard": (STANDARD, 1614265330, b'{"test": 2432232314}', {"Webhook-Id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "Webhook-Timestamp": "1614265330", "Webhook-Signature": STANDARD_SIGNATURE}),
}  # fmt: skip


@pytest.mark.parametrize("scheme", VECTORS)
def test_what_vendors_have_published_is_valid_and_a_byte_more_is_not(scheme, monkeypatch):
    secret, at, body, headers = VECTORS[scheme]
    monkeypatch.setattr(time, "time", lambda: at)
    module = service.extra("senders")
    senders = module.Senders()
    senders.load([(service.Client("x", frozenset()), scheme, secret)])
    environ = falcon.testing.create_environ(headers=headers)
    assert senders.verify(environ, body)[0].name == "x"
    for changed, later in ((body + b" ", at), (body, at + 301)):
        monkeypatch.setattr(time, "time", lambda later=later: later)
        if later == at or scheme in TIMED:
            with pytest.raises(ValueError, match="signature"):
                senders.verify(environ, changed)


def test_a_batch_of_a_redelivery_says_what_there_is(sender, store):
    """The first content stays, so that this is what is counted."""
    if SIGNED[sender.scheme][2]:  # for others, each line would have to be an event
        for lines in (b"1\n2\n3", b"4", b"1\n2\n3\n4"):
            answer, _ = sender(lines, more=in_http(BATCH))
            assert (answer.json["count"], answer.json["first_id"], answer.json["last_id"]) == (3, 1, 3)


def test_another_token_or_secret_has_the_grants_of_its_client(store, command):
    command("client", "add", "x", "--can", "write:readings")
    for more in ([], ["--signs", "github"]):
        assert command("client", "add", "x", *more)[0] == 0
    assert rows(store, "SELECT DISTINCT can FROM clients WHERE name = 'x'") == [("write:readings",)]
    digests = [digest for (digest,) in rows(store, "SELECT token FROM clients WHERE name = 'x'")]
    assert command("client", "remove", "x", digests[0][:10])[0] == 0
    assert len(rows(store, "SELECT * FROM clients WHERE name = 'x'")) == 2


def test_a_secret_is_rotated_by_a_second_one(hasty_clients, sender, command, client):
    """Senders that can have two secrets sign with both; of the others either comes alone."""
    dictated = SIGNED[sender.scheme][3]
    other = sender.add(dictated and dictated[:-4] + "BBBB")
    eventually(lambda: sender(secret=other.strip())[0].status_code == 201, within_s=3)
    assert sender()[0].status_code == 201
    assert command("client", "remove", "shop", service.digest_of(f"{sender.scheme} {sender.secret}")[:8])[0] == 0
    eventually(lambda: sender()[0].status_code == 401, within_s=3)
    joined = {
        "standard": ("Webhook-Signature", " "),
        "svix": ("Svix-Signature", " "),
        "stripe": ("Stripe-Signature", ","),
    }
    if sender.scheme in joined:
        (name, separator), at = joined[sender.scheme], time.time()
        both = [signed(sender.scheme, secret, DELIVERY, at=at) for secret in (sender.secret, other.strip())]
        headers = both[0] | {name: separator.join(each[name] for each in both)}
        assert client.post("messages", DELIVERY, Authorization=None, **headers).status_code == 201


def test_secrets_that_senders_dictate_come_from_stdin(store, command, monkeypatch, one_line_error):
    for scheme, secret in (("stripe", "whsec_abcdefgh12345"), ("standard", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(secret + "\n"))
        assert command("client", "add", scheme, "--signs", scheme, "--secret", "-") == (0, secret + "\n", "")
        assert command("client", "list")[1].count(f"{scheme}\t{service.digest_of(f'{scheme} {secret}')[:8]}\t20") == 1
    for scheme in ("stripe", "svix", "shopify", "slack", "zoom"):  # nobody can tell them another one
        assert "--secret -" in one_line_error("client", "add", "x", "--signs", scheme)
    for scheme, secret in (("standard", "whsec_é"), ("github", "short"), ("shopify", "")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(secret + "\n"))
        assert scheme in one_line_error("client", "add", "x", "--signs", scheme, "--secret", "-")
    assert "--signs" in one_line_error("client", "add", "x", "--signs", "paypal")


def test_a_hundred_secrets_take_less_than_two_milliseconds(client, store, command):
    for _ in range(100):
        assert command("client", "add", "shop", "--signs", "github")[0] == 0
    body = json.dumps("x" * 10_000).encode()
    client.post("messages", body, Authorization=None, **signed("github", "the wrong secret", body))  # reads the clients
    environ = falcon.testing.create_environ(headers=signed("github", "the wrong secret", body))
    clients, taken = service.Clients(store, 10**6), []
    clients.read()
    for _ in range(20):
        started = time.perf_counter()
        with pytest.raises(ValueError, match="not valid"):
            clients.senders.verify(environ, body)
        taken.append(time.perf_counter() - started)
    assert min(taken) < 0.002  # 0.6 ms, when nothing else runs


@pytest.mark.parametrize("scheme", ["standard", "svix"])
def test_a_signature_of_long_ago_holds_for_no_part_of_what_it_signed(scheme, client, command, monkeypatch):
    """`id.time.body` can be split elsewhere, if somebody could put a time into the body."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{STANDARD}\n"))
    assert command("client", "add", "shop", "--signs", scheme, "--secret", "-")[0] == 0
    now = int(time.time())
    headers = signed(scheme, STANDARD, b'{"note": "hi.%d.n=1&rest="}' % now, at=now - 10**6)
    headers[SIGNED[scheme][2]] = f'd-1.{now - 10**6}.{{"note": "hi'
    headers[next(name for name in headers if name.endswith("Timestamp"))] = str(now)
    answer = client.post("messages", b'n=1&rest="}', Authorization=None, **FORMED | headers)
    assert answer.status_code == 401


def test_a_made_up_signature_tells_nothing_of_what_there_is(sender, client):
    for more in ({}, {"Content-Encoding": "br"}, {"Content-Length": "999999999"}, {"Content-Type": "text/plain"}):
        answers = [
            sender(to=to, secret="whsec_" + "A" * 44, more=more)[0] for to in ("messages", "nothing", "readings/1", "")
        ]
        assert {answer.status_code for answer in answers} == {413 if "Content-Length" in more else 401}
        assert len({(answer.content, str(sorted(answer.headers.items()))) for answer in answers}) == 1
    unsigned = client.simulate_post("/messages", body=DELIVERY)
    assert sender(secret="whsec_" + "A" * 44)[0].content == unsigned.content


def test_the_log_says_why_a_signature_is_not_valid(sender, caplog):
    caplog.set_level("INFO")
    assert sender(secret="whsec_" + "A" * 44)[0].status_code == 401
    assert f"The signature ({sender.scheme}) is not valid here." in caplog.text


# Tokens in other headers, forms, and bodies that are their own key


@pytest.mark.parametrize("header", sorted(service.extra("senders").TOKEN_HEADERS))
def test_a_token_in_another_header_is_as_good(header, client):
    name = header.removeprefix("HTTP_").replace("_", "-").title()
    for token, status in ((TOKEN, 201), ("wrong", 401), ("", 401)):
        assert client.post("messages", "1", Authorization=None, **{name: token}).status_code == status
    for authorization in (f"Bearer {TOKEN}", "Basic " + base64.b64encode(f"x:{TOKEN}".encode()).decode()):
        assert client.post("messages", "1", Authorization=authorization, **{name: TOKEN}).status_code == 201
        answer = client.post("messages", "1", Authorization=authorization, **{name: "other"})
        assert (answer.status_code, answer.json["detail"]) == (400, "The request has two different tokens.")
    assert client.simulate_get("/messages", headers={name: TOKEN}).status_code == 200
    unknown, none = (client.simulate_get(f"/{path}", headers={name: "x"}) for path in ("messages", "nothing"))
    assert unknown.content == none.content


FORMED = {"Content_Type": "application/x-www-form-urlencoded; charset=UTF-8"}
FORMS = {
    b"command=%2Fweather&text=94070&empty=&hi+there=%F0%9F%91%8B": {
        "command": "/weather", "text": "94070", "empty": "", "hi there": "👋"},
    b"a=1&b=2&a=3&a=": {"a": ["1", "3", ""], "b": "2"},
    b"payload=%7B%22action%22%3A%20%22opened%22%7D": {"payload": '{"action": "opened"}'},
    b"x%22%2C+%22admin%22%3A+%221=x%22, %22admin%22: %221&\\=\"": {'x", "admin": "1': 'x", "admin": "1', "\\": '"'},
    b"&&=&flag": {"": "", "flag": ""},
    b"%00=%0a": {"\0": "\n"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_an_object_of_texts(form, client, store):
    assert client.post("messages", form, **FORMED).status_code == 201
    (body,) = rows(store, "SELECT body FROM messages")[0]
    assert json.loads(body) == FORMS[form]


def test_a_form_that_is_not_right_is_refused(client, store):
    for form, status in ((b"a=%ff", 400), (b"\xff=1", 400), (b"&".join([b"a=1"] * 1001), 413)):
        assert client.post("messages", form, **FORMED).status_code == status
    for text in ('{"a": 1}', " [1]", '{"a": "b=c&d"}'):  # what curl -d sends without a Content-Type
        refused = client.post("messages", text, **FORMED)
        assert (refused.status_code, "as application/json" in refused.json["detail"]) == (415, True)
    latin = client.post("messages", b"a=1", Content_Type=f"{service.FORM}; charset=latin-1")
    assert latin.status_code == 415
    parts = client.post("messages", b"x", Content_Type="multipart/form-data; boundary=x")
    assert (parts.status_code, "multipart/form-data" in parts.json["detail"]) == (415, True)
    assert client.post("messages", b"&".join([b"a=1"] * 1000), **FORMED).status_code == 201
    assert len(rows(store, "SELECT * FROM messages")) == 1


def test_a_signed_form_is_checked_as_it_was_sent(sender, store):
    form = b"b=2&a=%2F&a=1"
    assert sender(form, more=in_http(FORMED))[0].status_code == 201
    key = "d-1" if SIGNED[sender.scheme][2] else None
    assert rows(store, "SELECT body, key FROM messages") == [('{"b": "2", "a": ["/", "1"]}', key)]


def test_the_same_body_of_a_client_that_can_send_no_key_is_one_message(store, client, command, hasty_clients):
    _, token, _ = command("client", "add", "syslog", "--can", "write:messages", "--key", "body")
    as_it = {"Authorization": f"Bearer {token.strip()}"}
    eventually(lambda: client.post("messages", "[1, 2]", **as_it).status_code == 201, within_s=3)
    assert client.post("messages", "[1, 2]", **as_it).headers["Idempotent-Replayed"] == "true"
    assert client.post("messages", "[1,2]", **as_it).headers.get("Idempotent-Replayed") is None
    for replayed in (None, "true"):
        answer = client.post("messages", "1\n2\n3", **BATCH, **as_it)
        assert (answer.json["count"], answer.headers.get("Idempotent-Replayed")) == (3, replayed)
    for key in ("a", "b"):  # a key of its own counts
        assert client.post("messages", "[1, 2]", Idempotency_Key=key, **as_it).status_code == 201
    assert len(rows(store, "SELECT * FROM messages")) == 7
    assert command("client", "add", "syslog")[0] == 0  # another token of it is alike
    assert command("client", "add", "syslog", "--can", "write:messages")[0] == 0
    assert rows(store, "SELECT DISTINCT can FROM clients WHERE name = 'syslog'") == [("write:messages key:body",)]
    # Each line of a lenient batch is its own key, because a sender that starts again cuts its batches elsewhere.
    for lines, replayed in (("a\n[7]\n[8]\n[7]", None), ("[8]\n[9]", None), ("[7]\n[8]\n[9]", "true")):
        answer = client.post("messages", lines, Prefer="handling=lenient", **BATCH, **as_it)
        assert (answer.status_code, answer.headers.get("Idempotent-Replayed")) == (201, replayed), lines
    assert len(rows(store, "SELECT * FROM messages")) == 10


def test_a_request_with_two_signatures_needs_one_that_is_valid(store, client, command, monkeypatch):
    """As those of Svix, which can have headers of both kinds."""
    secrets = {"standard": STANDARD, "svix": STANDARD[:-4] + "BBBB"}
    for scheme, secret in secrets.items():
        monkeypatch.setattr(sys, "stdin", io.StringIO(secret + "\n"))
        assert command("client", "add", scheme, "--signs", scheme, "--secret", "-")[0] == 0
    headers = signed("standard", secrets["standard"], DELIVERY) | signed("svix", secrets["svix"], DELIVERY)
    for wrong, client_name in (("Webhook-Signature", "svix"), ("Svix-Signature", "standard")):
        assert client.post("messages", DELIVERY, Authorization=None, **headers | {wrong: "v1,x"}).status_code == 201
        assert rows(store, "SELECT client FROM messages ORDER BY id DESC LIMIT 1") == [(client_name,)]
    none = headers | {"Webhook-Signature": "v1,x", "Svix-Signature": "v1,x"}
    assert client.post("messages", DELIVERY, Authorization=None, **none).status_code == 401


def test_a_form_is_cheap_to_read_and_not_larger_as_json(client):
    def seconds(form):
        started = time.process_time()
        service.extra("senders").form_as_json(form * (300_000 // len(form)), 10**7)
        return time.process_time() - started

    for form in (b"%", "%\xe9".encode(), b"%C3%A9", b"a+"):  # parse_qsl() takes 0.6 s for 1 MB of single %, and 180 MB
        eventually(lambda: seconds(form) < 2 * seconds(b"%41x"))  # noqa: B023
    assert client.post("messages", b"\1" * 50_000, **FORMED).status_code == 413


def test_a_form_that_holds_json_can_be_filtered_by_what_is_in_it(open_store):
    column = re.search("`(action TEXT AS .*?)`", (HERE / "deploy" / "senders" / "README.md").read_text(), re.DOTALL)[1]
    client = client_of(open_store(stream_sql("deliveries", f", {column}")))
    for action in ("opened", "closed"):
        assert client.post("deliveries", f"payload=%7B%22action%22%3A+%22{action}%22%7D", **FORMED).status_code == 201
    (found,) = client.get("/deliveries?action=closed").json["messages"]
    assert found["body"] == {"payload": '{"action": "closed"}'}


# What programs send that cannot be run here, as their documentation and sources have it: content type, body, messages.
SENT = {
    "Fluent Bit, json_lines": (service.NDJSON, b'{"date":1.5,"log":"a"}\n{"date":2.5,"log":"b"}\n', 2),
    "Fluent Bit, json": ("application/json", b'[{"date":1.5,"log":"a"},{"date":2.5,"log":"b"}]', 1),
    "Vector, newline_delimited": (service.NDJSON, b'{"message":"a"}\n{"message":"b"}', 2),
    "Logstash, json": (
        "application/json",
        b'{"@timestamp":"2026-11-29T10:00:00.000Z","@version":"1","message":"a"}',
        1,
    ),
    "fluentd": (service.NDJSON, b'{"message":"a"}\n{"message":"b"}\n', 2),
    "Datadog, a webhook": ("application/json", b'{"id": "1", "title": "[Triggered] x"}', 1),
}


@pytest.mark.parametrize("program", SENT)
def test_what_others_send_is_taken_and_kept(program, client, store):
    kind, body, number = SENT[program]
    assert client.post("messages", body, Content_Type=kind).status_code == 201
    kept = rows(store, "SELECT body FROM messages ORDER BY id")
    assert [text.encode() for (text,) in kept] == (body.split() if number > 1 else [body])
