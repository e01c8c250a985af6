"""Send to Inlet, and follow a stream, with nothing but Python: copy what you need.

send() and messages() go on through whatever can pass: a restart, a full disk, a network that is away.
"""

import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from decimal import Decimal
from http.client import HTTPException


def ask(request, tries):
    """Return the JSON that answers a request, which is tried again if need be.

    Raises HTTPError if it will never be taken (error.read() says why), TimeoutError after so many tries.
    """
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read(), parse_int=lambda n: int(n) if len(n) < 4000 else Decimal(n))
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 425, 429):
                raise
            asked_for = error.headers.get("Retry-After", "")
        except (OSError, HTTPException):
            asked_for = ""
        time.sleep(int(asked_for) if asked_for.isdigit() else min(2 ** min(attempt, 9) / 10, 30))
    raise TimeoutError(request.full_url)


def send(url, token, message):
    """Return the id of the message. The key makes it safe to send again when the outcome is unknown."""
    headers = {
        "Authorization": f"Bearer {token}",
        "Content-Type": "application/json",
        "Idempotency-Key": str(uuid.uuid4()),
    }
    return ask(urllib.request.Request(url, json.dumps(message).encode(), headers), tries=20)["id"]


def messages(url, token):
    """Yield every message of a stream once, for ever, each with the URL to go on from: keep that with your results.

    url: such as http://127.0.0.1:8080/messages?wait=30
    """
    while True:
        page = ask(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), tries=10**9)
        url = urllib.parse.urljoin(url, page["next"])
        for message in page["messages"]:
            yield message, re.sub(r"after=\d+", f"after={message['id']}", url, count=1)
        if not page["messages"]:
            time.sleep(1)
