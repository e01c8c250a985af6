"""Senders that cannot send `Authorization: Bearer`, or JSON: they sign, have a header of their own, or send forms.

Signatures. A client with a scheme has a secret in place of a token. A POST that has the signature header of the scheme,
and no token, is checked against the clients of that scheme: HMAC-SHA256 of the body as it was sent. What identifies
the delivery is the key of its message, so that a redelivery is a replay.
"""

import base64
import binascii
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from service import KEY, Client, Problem, SetupError, digest_of, too_large

# Each may have the token in place of Authorization.
TOKEN_HEADERS = frozenset(
    ("HTTP_X_API_KEY", "HTTP_X_GITLAB_TOKEN", "HTTP_X_TELEGRAM_BOT_API_SECRET_TOKEN", "HTTP_X_AMZ_FIREHOSE_ACCESS_KEY")
)
MOST_FIELDS = 1000  # of a form
SIGNED_WITHIN_S = 300  # for schemes that sign a time
SHORTEST_SECRET = 8  # bytes
MOST_SIGNATURES = 8  # in one header


class Scheme(NamedTuple):
    """How a sender signs a message. Headers have their names in WSGI."""

    signature_header: str  # that has signatures
    signature: str  # the pattern of one of them
    encode: Callable[[bytes], bytes]  # how it is written
    signed_prefix: str = ""  # before the body: {time} is that of the signature, {id} is that of the delivery
    time: tuple[str, str] | None = None  # a header and a pattern
    delivery: tuple[str, ...] = ()  # the headers that can name the delivery: the first that is there does
    delivery_member: str = ""  # of the body, if no header names it
    secret_prefix: str = ""  # of secrets whose rest is base64; empty: the secret is plain text
    is_ours: bool = True  # may we make the secret?

    def hmac_key(self, secret: str) -> bytes:
        """Return the HMAC key in the text of a secret; ValueError if it is malformed."""
        if self.secret_prefix:
            return base64.b64decode(secret.removeprefix(self.secret_prefix), validate=True)
        return secret.encode()


# To add one: a row here, one in SIGNED of test_senders.py, and one in the table of deploy/senders/README.md.
BASE64, HEX, SECONDS = base64.b64encode, binascii.hexlify, r"^(\d{1,18})$"
SCHEMES = {
    # https://www.standardwebhooks.com
    "standard": Scheme("HTTP_WEBHOOK_SIGNATURE", r"(?<!\S)v1,(\S+)", BASE64, "{id}.{time}.",
        ("HTTP_WEBHOOK_TIMESTAMP", SECONDS), ("HTTP_WEBHOOK_ID",), secret_prefix="whsec_"),
    # https://docs.svix.com/receiving/verifying-payloads/how-manual
    "svix": Scheme("HTTP_SVIX_SIGNATURE", r"(?<!\S)v1,(\S+)", BASE64, "{id}.{time}.",
        ("HTTP_SVIX_TIMESTAMP", SECONDS), ("HTTP_SVIX_ID",), secret_prefix="whsec_", is_ours=False),
    # https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries, also for Gitea, Forgejo and Meta
    "github": Scheme("HTTP_X_HUB_SIGNATURE_256", r"^sha256=(\S+)$", HEX,
        delivery=("HTTP_X_GITHUB_DELIVERY", "HTTP_X_FORGEJO_DELIVERY", "HTTP_X_GITEA_DELIVERY")),
    # https://docs.stripe.com/webhooks#verify-manually
    "stripe": Scheme("HTTP_STRIPE_SIGNATURE", r"(?:^|,)v1=([^,\s]+)", HEX, "{time}.",
        ("HTTP_STRIPE_SIGNATURE", r"(?:^|,)t=(\d{1,18})(?:,|$)"), delivery_member="id", is_ours=False),
    # https://shopify.dev/docs/apps/build/webhooks/subscribe/https
    "shopify": Scheme("HTTP_X_SHOPIFY_HMAC_SHA256", r"^(\S+)$", BASE64,
        delivery=("HTTP_X_SHOPIFY_WEBHOOK_ID",), is_ours=False),
    # https://docs.slack.dev/authentication/verifying-requests-from-slack
    "slack": Scheme("HTTP_X_SLACK_SIGNATURE", r"^v0=(\S+)$", HEX, "v0:{time}:",
        ("HTTP_X_SLACK_REQUEST_TIMESTAMP", SECONDS), delivery_member="event_id", is_ours=False),
    # https://developers.zoom.us/docs/api/webhooks/#verify-with-zooms-header
    "zoom": Scheme("HTTP_X_ZM_SIGNATURE", r"^v0=(\S+)$", HEX, "v0:{time}:",
        ("HTTP_X_ZM_REQUEST_TIMESTAMP", SECONDS), is_ours=False),
    # https://support.atlassian.com/bitbucket-cloud/docs/manage-webhooks
    "bitbucket": Scheme("HTTP_X_HUB_SIGNATURE", r"^sha256=(\S+)$", HEX, delivery=("HTTP_X_REQUEST_UUID",)),
    # https://woocommerce.com/document/webhooks
    # Its X-WC-Webhook-Delivery-ID names no delivery: all that a webhook sends in one second has the same.
    "woocommerce": Scheme("HTTP_X_WC_WEBHOOK_SIGNATURE", r"^(\S+)$", BASE64),
}  # fmt: skip


class Senders:
    """The clients that sign."""

    def __init__(self) -> None:
        self._by_scheme: dict[str, list[tuple[bytes, Client]]] = {}  # each with its HMAC key

    def load(self, clients: Iterable[tuple[Client, str, str]]) -> None:
        """Take the clients that there are now, each with its scheme and secret."""
        by_scheme: dict[str, list[tuple[bytes, Client]]] = {}
        for client, name, secret in clients:
            if name in SCHEMES:  # others come from a newer version
                by_scheme.setdefault(name, []).append((SCHEMES[name].hmac_key(secret), client))
        self._by_scheme = by_scheme

    def know(self, environ: dict[str, Any]) -> bool:
        """Has a request a signature of a scheme that a client has?"""
        return any(SCHEMES[name].signature_header in environ for name in self._by_scheme)

    def unknown(self, environ: dict[str, Any]) -> str:
        """Return what the log says of a request whose signature is of a scheme that no client has; empty if none."""
        schemes = [name for name, scheme in SCHEMES.items() if scheme.signature_header in environ]
        return f"It is signed ({', '.join(schemes)}), but no client here signs like that." if schemes else ""

    def verify(self, environ: dict[str, Any], body: bytes) -> tuple[Client, Callable[[str], str | None]]:
        """Return the client that has signed a body, and a function: the key of the message, from its JSON text.

        Raises ValueError if there is none, or, where the scheme signs a time, if that is not of now.
        """
        reasons = []
        for name in self._by_scheme:
            if SCHEMES[name].signature_header in environ:
                try:
                    return self._verify(name, environ, body)
                except ValueError as error:
                    reasons.append(str(error))
        raise ValueError(" ".join(reasons))

    def _verify(self, name: str, environ: dict[str, Any], body: bytes) -> tuple[Client, Callable[[str], str | None]]:
        scheme = SCHEMES[name]
        given = [text.encode("latin-1") for text in re.findall(scheme.signature, environ[scheme.signature_header])]
        delivery, signed_at = next((environ[header] for header in scheme.delivery if header in environ), ""), ""
        if scheme.time:
            header, pattern = scheme.time
            found = re.search(pattern, environ.get(header, ""), re.ASCII)
            signed_at = found[1] if found else "0"
            if abs(time.time() - int(signed_at)) > SIGNED_WITHIN_S:
                raise ValueError(f"The signature has no time, or one that is not within {SIGNED_WITHIN_S} s of now.")
        signed = scheme.signed_prefix.format(id=delivery, time=signed_at).encode("latin-1") + body
        # With a full stop in the id, it would not be clear what the time is, and what the body.
        if given and ("{id}" not in scheme.signed_prefix or (delivery and "." not in delivery)):
            for key, client in self._by_scheme[name]:
                expected = scheme.encode(hmac.digest(key, signed, "sha256"))
                if any(hmac.compare_digest(expected, signature) for signature in given[:MOST_SIGNATURES]):
                    return client, partial(key_of_delivery, delivery, scheme.delivery_member)
        raise ValueError(f"The signature ({name}) is not valid here.")


def key_of_delivery(delivery: str, member: str, text: str) -> str | None:
    """Return the key for a delivery. A scheme has a header that names it, or a member of the message does.

    The key is that name, or its digest if it is not a valid key, or None if it is empty.
    """
    if member:
        message = json.loads(text, parse_int=float)
        named = message.get(member) if isinstance(message, dict) else ""
        delivery = named if isinstance(named, str) else ""
    if not delivery:
        return None
    return delivery if re.fullmatch(KEY, delivery) else digest_of(delivery)


def one_token(environ: dict[str, Any], token: str) -> str:
    """Return the one token of a request. token: that in Authorization. Problem 400 if there are two that differ."""
    tokens = {environ[name] for name in TOKEN_HEADERS & environ.keys()} | {token}
    tokens.discard("")
    if len(tokens) > 1:
        raise Problem(400, "The request has two different tokens.")
    return tokens.pop() if tokens else ""


def form_as_json(form: bytes, most_bytes: int) -> bytes:
    """Return the fields of a form as a JSON object of texts, with an array where a name comes several times.

    Problem 400 if it is not in UTF-8, 413 if it has too many fields, or as JSON too many bytes; 415 if it is JSON, as
    `curl -d` sends it. https://url.spec.whatwg.org/#urlencoded-parsing
    """
    if form.lstrip()[:1] in (b"{", b"["):  # in a form, these are escaped
        raise Problem(415, "This is JSON, but its Content-Type says that it is a form: send it as application/json.")
    if form.count(b"&") >= MOST_FIELDS:
        raise Problem(413, f"The form has more than {MOST_FIELDS} fields.", limit=MOST_FIELDS)
    fields: dict[str, Any] = {}
    try:
        for field in filter(None, form.split(b"&")):
            name, value = (unquoted(part) for part in (*field.split(b"=", 1), b"")[:2])
            if name not in fields:
                fields[name] = value
            elif isinstance(fields[name], list):
                fields[name].append(value)
            else:
                fields[name] = [fields[name], value]
    except UnicodeDecodeError:
        raise Problem(400, "The form is not UTF-8.") from None
    found = json.dumps(fields, ensure_ascii=False).encode()
    if len(found) > most_bytes:
        raise too_large(most_bytes)
    return found


def unquoted(text: bytes) -> str:
    """Return a name or value of a form. A % that begins no escape stays."""
    return re.sub(rb"(?:%[0-9A-Fa-f]{2})++", unescaped, text.replace(b"+", b" ")).decode()


def unescaped(escapes: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escapes[0].replace(b"%", b"").decode())


def secret_for(name: str, given: str | None) -> str:
    """Return the secret of a new client: the one that its sender has given, or a new one.

    Raises SetupError if there is no such scheme, or if the scheme has no such secrets.
    """
    if name not in SCHEMES:
        raise SetupError(f"--signs takes one of {', '.join(SCHEMES)}, not {name!r}")
    scheme = SCHEMES[name]
    if given is None and not scheme.is_ours:
        raise SetupError(f"the secret of the scheme {name} is made by the sender: --secret - reads it from stdin")
    if given is None:
        return scheme.secret_prefix + base64.b64encode(secrets.token_bytes(32)).decode()
    try:
        is_long_enough = len(scheme.hmac_key(given)) >= SHORTEST_SECRET
    except ValueError:
        is_long_enough = False
    if not is_long_enough:
        raise SetupError(f"this is not a secret of the scheme {name}")
    return given
