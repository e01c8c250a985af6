"""Senders that sign their messages."""

import base64
import gzip
import hmac
import io
import json
import sys
import time

import falcon.testing
import pytest

import service
from test_service import BATCH, eventually, in_http, rows


def signed(scheme, secret, body, at=None, ident="d-1"):
    """The headers with which a sender signs a body, as its documentation has it; at: the time that it signs."""
    at = str(int(time.time() if at is None else at))
    if scheme == "standard":
        key, text = base64.b64decode(secret.removeprefix("whsec_")), f"{ident}.{at}.".encode() + body
        signature = base64.b64encode(hmac.digest(key, text, "sha256")).decode()
        return {"Webhook-Id": ident, "Webhook-Timestamp": at, "Webhook-Signature": f"v1,{signature}"}
    if scheme == "stripe":
        return {
            "Stripe-Signature": f"t={at},v1={hmac.digest(secret.encode(), at.encode() + b'.' + body, 'sha256').hex()}"
        }
    digest = hmac.digest(secret.encode(), body, "sha256")
    if scheme == "github":
        return {"X-GitHub-Delivery": ident, "X-Hub-Signature-256": f"sha256={digest.hex()}"}
    return {"X-Shopify-Webhook-Id": ident, "X-Shopify-Hmac-Sha256": base64.b64encode(digest).decode()}


DELIVERY = b'{"id": "d-1", "n": 1}'


@pytest.fixture(params=["standard", "github", "stripe", "shopify"])
def sender(request, store, command, client):
    """Sends a body, signed by a client of a scheme that may write to messages; (answer, the headers that it has sent)."""
    _, secret, _ = command("client", "add", "shop", "--signs", request.param, "--can", "write:messages")

    made = secret.strip()

    def send_it(body=DELIVERY, to="messages", secret=made, change=lambda headers: headers, more=None, **options):
        headers = change(signed(request.param, secret, body, **options)) | (more or {})
        return client.post(to, body, Authorization=None, **headers), headers

    send_it.scheme, send_it.secret = request.param, made
    return send_it


def test_a_signed_message_needs_no_token_and_its_delivery_is_its_key(sender, store):
    answer, _ = sender()
    assert (answer.status_code, rows(store, "SELECT client, key, body FROM messages")) == (
        201,
        [("shop", "d-1", DELIVERY.decode())],
    )
    for body in (
        DELIVERY,
        DELIVERY.replace(b"1}", b"2}"),
    ):  # a redelivery: the first body stays, for who can only try again
        answer, _ = sender(body, at=time.time() + 1)
        assert (answer.status_code, answer.headers["Idempotent-Replayed"], answer.json["id"]) == (201, "true", 1)
    assert sender(to="readings")[0].status_code == 403
    for path, status in (("nothing", 404), ("healthz/x", 404), ("messages/1", 405), ("warm", 405), ("metrics", 405)):
        assert sender(to=path)[0].status_code == status, path
    packed = gzip.compress(DELIVERY.replace(b"d-1", b"d-2"))
    assert (
        sender(packed, ident="d-2", more={"Content-Encoding": "gzip"})[0].status_code == 201
    )  # it signs what it sends
    assert rows(store, "SELECT key FROM messages") == [("d-1",), ("d-2",)]


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
    if sender.scheme in ("standard", "stripe"):
        for seconds, status in ((-301, 401), (301, 401), (-290, 201), (290, 201)):
            assert sender(at=time.time() + seconds)[0].status_code == status, seconds
    assert len(rows(store, "SELECT * FROM messages")) == (sender.scheme in ("standard", "stripe"))


def test_what_names_a_delivery_is_its_key_whatever_it_looks_like(sender, store):
    """And where a header names it, an id in the body does not."""
    names = ("a  b", "x" * 300, "order 1")
    for name in names:
        body = json.dumps({"id": name}).encode()
        for replayed in (None, "true"):
            answer, _ = sender(body, ident=name)
            assert (answer.status_code, answer.headers.get("Idempotent-Replayed")) == (201, replayed), name
    headers = {"github": "X-GitHub-Delivery", "shopify": "X-Shopify-Webhook-Id"}
    if name := headers.get(sender.scheme):
        for state in (b"1", b"2"):
            answer, _ = (
                sender(DELIVERY + state.replace(b"1", b" "), more={name: None})
                if state == b"1"
                else sender(DELIVERY, more={name: None})
            )
            assert answer.status_code == 201
        assert rows(store, "SELECT count(*) FROM messages WHERE key IS NULL") == [(2,)]
    if sender.scheme == "standard":
        assert sender(more={"Webhook-Id": None})[0].status_code == 401


def test_a_batch_of_a_redelivery_says_what_there_is(sender, store):
    """The first content stays, so that this is what is counted."""
    if sender.scheme != "stripe":  # for which each line would have to be an event
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
    _, other, _ = command("client", "add", "shop", "--signs", sender.scheme, "--can", "write:messages")
    eventually(lambda: sender(secret=other.strip())[0].status_code == 201, within_s=3)
    assert sender()[0].status_code == 201
    assert command("client", "remove", "shop", service.digest_of(f"{sender.scheme} {sender.secret}")[:8])[0] == 0
    eventually(lambda: sender()[0].status_code == 401, within_s=3)
    joined = {"standard": ("Webhook-Signature", " "), "stripe": ("Stripe-Signature", ",")}
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
