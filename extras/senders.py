"""Senders that sign their messages: GitHub, Stripe, Shopify, and all that follow Standard Webhooks.

A client with a scheme has a secret in place of a token. A POST that has the signature header of the scheme, and no
Authorization, is checked against the clients of that scheme: HMAC-SHA256 of the body as it was sent. What identifies
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

from service import KEY, Client, SetupError, digest_of

SIGNED_WITHIN_S = 300  # for schemes that sign a time
SHORTEST_SECRET = 8  # bytes
MOST_SIGNATURES = 8  # in one header


class Scheme(NamedTuple):
    """How a sender signs a message. Headers have their names in WSGI."""

    signature_header: str  # that has signatures
    signature: str  # the pattern of one of them
    encode: Callable[[bytes], bytes]  # how it is written
    signed_prefix: str  # before the body: {time} is that of the signature, {id} is that of the delivery
    time: tuple[str, str] | None  # a header and a pattern
    delivery_header: str | None  # the header that names the delivery; None: the body's member id
    secret_prefix: str  # what our secrets begin with

    def hmac_key(self, secret: str) -> bytes:
        """Return the HMAC key in the text of a secret; ValueError if it is malformed."""
        if self.secret_prefix:
            return base64.b64decode(secret.removeprefix(self.secret_prefix), validate=True)
        return secret.encode()


SCHEMES = {
    "standard": Scheme(  # https://www.standardwebhooks.com
        "HTTP_WEBHOOK_SIGNATURE", r"(?<!\S)v1,(\S+)", base64.b64encode, "{id}.{time}.",
        ("HTTP_WEBHOOK_TIMESTAMP", r"^(\d{1,18})$"), "HTTP_WEBHOOK_ID", "whsec_"),
    "github": Scheme(  # https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries
        "HTTP_X_HUB_SIGNATURE_256", r"^sha256=(\S+)$", binascii.hexlify, "", None, "HTTP_X_GITHUB_DELIVERY", ""),
    "stripe": Scheme(  # https://docs.stripe.com/webhooks#verify-manually
        "HTTP_STRIPE_SIGNATURE", r"(?:^|,)v1=([^,\s]+)", binascii.hexlify, "{time}.",
        ("HTTP_STRIPE_SIGNATURE", r"(?:^|,)t=(\d{1,18})(?:,|$)"), None, ""),
    "shopify": Scheme(  # https://shopify.dev/docs/apps/build/webhooks/subscribe/https
        "HTTP_X_SHOPIFY_HMAC_SHA256", r"^(\S+)$", base64.b64encode, "", None, "HTTP_X_SHOPIFY_WEBHOOK_ID", ""),
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
        return scheme_of(environ) in self._by_scheme

    def unknown(self, environ: dict[str, Any]) -> str:
        """Return what the log says of a request that nobody here has signed; empty if it has no signature."""
        scheme = scheme_of(environ)
        return f"It is signed ({scheme}), but no client here signs like that." if scheme else ""

    def verify(self, environ: dict[str, Any], body: bytes) -> tuple[Client, Callable[[str], str | None]]:
        """Return the client that has signed a body, and a function: the key of the message, from its JSON text.

        Raises ValueError if there is none, or, where the scheme signs a time, if that is not of now.
        """
        name = scheme_of(environ) or ""
        scheme = SCHEMES[name]
        given = [text.encode("latin-1") for text in re.findall(scheme.signature, environ[scheme.signature_header])]
        delivery, signed_at = environ.get(scheme.delivery_header or "", ""), ""
        if scheme.time:
            header, pattern = scheme.time
            found = re.search(pattern, environ.get(header, ""), re.ASCII)
            signed_at = found[1] if found else "0"
            if abs(time.time() - int(signed_at)) > SIGNED_WITHIN_S:
                raise ValueError(f"The signature has no time, or one that is not within {SIGNED_WITHIN_S} s of now.")
        signed = scheme.signed_prefix.format(id=delivery, time=signed_at).encode("latin-1") + body
        if given and (delivery or "{id}" not in scheme.signed_prefix):
            for key, client in self._by_scheme.get(name, ()):
                expected = scheme.encode(hmac.digest(key, signed, "sha256"))
                if any(hmac.compare_digest(expected, signature) for signature in given[:MOST_SIGNATURES]):
                    return client, partial(key_of_delivery, delivery if scheme.delivery_header else None)
        raise ValueError(f"The signature ({name}) is not valid here.")


def scheme_of(environ: dict[str, Any]) -> str | None:
    """Return the name of the scheme by which a request is signed, or None."""
    return next((name for name, scheme in SCHEMES.items() if scheme.signature_header in environ), None)


def key_of_delivery(delivery: str | None, text: str) -> str | None:
    """Return the key for a delivery, which a header names, or if that is None, the member id of the message.

    It is that name, or its digest if it is not a valid key, or None if it is empty.
    """
    if delivery is None:
        message = json.loads(text, parse_int=float)
        delivery = message.get("id") if isinstance(message, dict) else ""
    if not isinstance(delivery, str) or not delivery:
        return None
    return delivery if re.fullmatch(KEY, delivery) else digest_of(delivery)


def secret_for(name: str, given: str | None) -> str:
    """Return the secret of a new client: the one that its sender has given, or a new one.

    Raises SetupError if there is no such scheme, or if the scheme has no such secrets.
    """
    if name not in SCHEMES:
        raise SetupError(f"--signs takes one of {', '.join(SCHEMES)}, not {name!r}")
    scheme = SCHEMES[name]
    if given is None:
        return scheme.secret_prefix + base64.b64encode(secrets.token_bytes(32)).decode()
    try:
        is_long_enough = len(scheme.hmac_key(given)) >= SHORTEST_SECRET
    except ValueError:
        is_long_enough = False
    if not is_long_enough:
        raise SetupError(f"this is not a secret of the scheme {name}")
    return given
