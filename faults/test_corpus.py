"""Real JSON through a real process that is killed by -9 again and again.

The corpus is the webhook payloads of npm's @octokit/webhooks-examples; INLET_CORPUS names the folder that npm
has put it in (`npm install --prefix FOLDER @octokit/webhooks-examples@7.6.1`).
"""

import contextlib
import http.client
import json
import os
import random
import threading
import time
from pathlib import Path

from common import database

from test_service import Process, send, stream_sql

KILLS = 20
SENDERS = 6


def corpus() -> list[bytes]:
    """Every payload in several ways to write it, and the files of the package as they are."""
    files = sorted(Path(os.environ["INLET_CORPUS"]).rglob("webhooks-examples/*/index.json"))
    assert len(files) == 6, "the corpus is not where INLET_CORPUS says"
    styles = [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}, {"indent": "\t", "sort_keys": True}]
    bodies = [file.read_bytes() for file in files]
    for file in files:
        payloads = [example for event in json.loads(file.read_bytes()) for example in event["examples"]]
        bodies += [json.dumps(payload, **style).encode() for payload in payloads for style in styles]
    return bodies


def messages_of(page: bytes) -> tuple[list[tuple[int, str | None, bytes]], str]:
    """(id, key, body as it stands in the page) of every message of a page, and the next page."""
    text, decoder, found = page.decode(), json.JSONDecoder(), []
    at = len('{"messages": [')
    while text[at] == "{":
        envelope, end = decoder.raw_decode(text, at)
        start = text.index('"body": ', at) + len('"body": ')
        found.append((envelope["id"], envelope["key"], text[start : end - 1].encode()))
        at = end + len(", ") if text.startswith(", ", end) else end
    return found, json.loads(page)["next"]


def test_every_acknowledged_message_is_there_exactly_once(tmp_path):
    seed = int(os.environ.get("INLET_SEED", time.time_ns() % 10**9))
    print(f"seed {seed}")
    chosen = random.Random(seed)
    database(tmp_path, stream_sql("messages"))
    process = Process(tmp_path, "--schema", str(tmp_path / "schema.sql"), "--max-body", "16000000")

    bodies = corpus()
    work = [(f"key-{n}" if n % 2 else None, body) for n, body in enumerate(bodies)]
    chosen.shuffle(work)
    acknowledged, keyed, unknown, unexpected = {}, {}, [], []
    taken, lock, done = iter(work), threading.Lock(), threading.Event()

    def next_message():
        with lock:
            return next(taken, None)

    def attempt(key, body):
        """The id in the answer, or None if there was none."""
        try:
            with contextlib.closing(process.connect()) as connection:
                status, _, data = send(
                    connection, "POST", "/messages", body, **({"Idempotency_Key": key} if key else {})
                )
        except (OSError, http.client.HTTPException):
            time.sleep(0.01)
            return None
        if status == 201:
            return json.loads(data)["id"]
        unexpected.append((status, data))
        return None

    def produce():
        while message := next_message():
            key, body = message
            message_id = attempt(key, body)
            while key and message_id is None:  # a keyed message is sent until it has its answer
                message_id = attempt(key, body)
            if message_id is None:
                unknown.append(body)
            else:
                acknowledged[message_id] = body
                if key:
                    keyed[key] = message_id, body

    producers = [threading.Thread(target=produce) for _ in range(SENDERS)]
    for thread in producers:
        thread.start()
    kills = 0
    while any(thread.is_alive() for thread in producers) or kills < KILLS:
        time.sleep(chosen.uniform(0.02, 0.15))
        process.kill()
        process.process.stdout.close()
        process.start()
        kills += 1
        time.sleep(0.1)  # or nothing would ever be answered
    done.set()
    for thread in producers:
        thread.join()

    connection, path, stored = process.connect(), "/messages?limit=1000", []
    while True:
        found, path = messages_of(send(connection, "GET", path)[2])
        if not found:
            break
        stored += found
    by_id = {message_id: body for message_id, _, body in stored}
    print(f"{len(acknowledged)} acknowledged, {len(unknown)} without an answer, {len(stored)} stored, {kills} kills")

    assert not unexpected
    assert kills >= KILLS
    assert len(acknowledged) + len(unknown) == len(work)
    assert len(by_id) == len(stored)
    assert all(by_id[message_id] == body for message_id, body in acknowledged.items())
    assert {key: message_id for message_id, key, _ in stored if key} == {key: i for key, (i, _) in keyed.items()}
    leftover = [body for message_id, body in by_id.items() if message_id not in acknowledged]
    for body in leftover:  # stored without an answer: once, and only what was sent
        unknown.remove(body)
    for key, (message_id, body) in chosen.sample(sorted(keyed.items()), 200):
        status, headers, data = send(connection, "POST", "/messages", body, Idempotency_Key=key)
        assert (status, headers["Idempotent-Replayed"], json.loads(data)["id"]) == (201, "true", message_id)
    assert process.terminate() == 0
    process.process.stdout.close()
