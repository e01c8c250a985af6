"""A worker for work.sql: python worker.py. Start as many as you like. BASE is the address; TOKEN may write and read.

A job is recorded as done once. If a worker dies between its work and that, another one does the work again: let the
work bear that, or use the id of the job as the key of what it sends.
"""

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request

CREATED, OF_ANOTHER, IS_DONE = 201, 409, 422


def ask(path, message=None):
    """Return (status, JSON) of a GET, or of the POST of a message; tried again until there is an answer."""
    headers = {"Authorization": f"Bearer {os.environ['TOKEN']}", "Content-Type": "application/json"}
    if message:
        headers["Idempotency-Key"] = f"{os.getpid()}-{time.time_ns()}"
    body = json.dumps(message).encode() if message else None
    while True:
        request = urllib.request.Request(os.environ["BASE"] + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in (OF_ANOTHER, IS_DONE):
                return error.code, json.load(error)
            if error.code < 500:
                sys.exit(f"{path}: {error.code} {error.read().decode()}")
        except (OSError, http.client.HTTPException, ValueError):  # no answer, or not the whole of it
            pass
        time.sleep(1)


def work(job):
    print(job["id"], job["body"], flush=True)


while True:
    _, page = ask("/open_jobs?limit=10")
    for job in page["rows"]:
        if ask("/claims", {"job": job["id"], "attempt": job["attempt"]})[0] == CREATED:
            work(job)
            ask("/done", {"job": job["id"]})
    if not page["rows"]:
        time.sleep(1)
