"""For schemathesis: what OpenAPI cannot say. A key is for one message only, and nobody waits for a page here."""

import uuid

import schemathesis


@schemathesis.hook
def before_call(ctx, case, kwargs):
    wait = str((case.query or {}).get("wait", ""))
    if wait.isdigit() and int(wait) <= 60:
        case.query["wait"] = 0
    key = str((case.headers or {}).get("Idempotency-Key", " "))
    if len(key) < 256 and key.isascii() and key.isprintable() and " " not in key:
        case.headers["Idempotency-Key"] = str(uuid.uuid4())
