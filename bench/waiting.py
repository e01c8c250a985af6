"""What consumers cost that wait for the next message (wait=60), and how soon they have it.

They are one process, which is this file as a program: waiting.py CONSUMERS TOKEN PORT. It prints how many milliseconds
after its sending each message has come to each consumer, when its stdin is closed.
"""

import contextlib
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONSUMERS = (1, 50, 500, 1000)
A_SECOND = 20  # messages, on the busy stream
WRITERS = 16  # connections
TABLE = """CREATE TABLE {0} (id INTEGER PRIMARY KEY AUTOINCREMENT, received_at TEXT NOT NULL, client TEXT NOT NULL,
    key TEXT, body TEXT NOT NULL CHECK (json_valid(body))) STRICT;
CREATE UNIQUE INDEX {0}_key ON {0} (client, key) WHERE key IS NOT NULL;
"""


def measure(options):
    """{consumers: figures}"""
    from servers import cpu_s, inlet, say

    seconds, found = (2, {}) if options.quick else (10, {})
    with tempfile.TemporaryDirectory() as folder:
        schema = Path(folder) / "schema.sql"
        schema.write_text(TABLE.format("messages") + TABLE.format("watched"))
        os.environ["INLET_SCHEMA"] = str(schema)
        try:
            for count in CONSUMERS[:1] if options.quick else CONSUMERS:
                peer = inlet()
                with peer.running() as process:
                    figures = found[str(count)] = {}
                    with consumers(peer, count) as running:
                        before = cpu_s(process)
                        time.sleep(seconds)
                        figures["quiet_cpu"] = (cpu_s(process) - before) / seconds
                        for _ in range(max(3, seconds)):
                            time.sleep(0.3)
                            peer.request("POST", "/watched", json.dumps(time.time()))
                        figures["quiet_ms"] = came(running)
                    with consumers(peer, count) as running:
                        before, began = cpu_s(process), time.monotonic()
                        for number in range(A_SECOND * seconds):
                            time.sleep(max(0, began + number / A_SECOND - time.monotonic()))
                            peer.request("POST", "/watched", json.dumps(time.time()))
                        figures["busy_cpu"] = (cpu_s(process) - before) / (time.monotonic() - began)
                        figures["busy_ms"] = came(running)
                    figures["writers"] = statistics.median(pairs(peer, count, 1 if options.quick else 8))
                say(f"waiting: {count}: {figures}")
        finally:
            del os.environ["INLET_SCHEMA"]
    return found


def pairs(peer, count, number):
    """Yields the rate of writers while so many wait, as a part of that while nobody does; bursts take turns."""
    from servers import wrk

    for turn in range(number):
        rates = {}
        for waits in (True, False) if turn % 2 else (False, True):
            with consumers(peer, count) if waits else contextlib.nullcontext():
                rates[waits] = wrk(peer, WRITERS, 2)["rate"]
        yield rates[True] / rates[False]


@contextlib.contextmanager
def consumers(peer, count):
    """Consumers of the stream `watched`, all of which wait."""
    from servers import PORT

    command = [sys.executable, __file__, str(count), peer.headers["Authorization"], str(PORT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        yield running
        running.communicate()


def came(running):
    """The milliseconds at the median, and at the 99th percentile."""
    time.sleep(0.5)
    found = json.loads(running.communicate()[0])
    return {"median": statistics.median(found), "p99": statistics.quantiles(found, n=100)[98], "messages": len(found)}


def markdown(found):
    from servers import table

    rows = []
    for count, figures in found.items():
        times = (f"{figures[name][part]:.0f}" for name in ("quiet_ms", "busy_ms") for part in ("median", "p99"))
        shares = f"{figures['quiet_cpu']:.1%}", f"{figures['busy_cpu']:.0%}"
        rows.append([count, *times, *shares, f"{figures['writers']:.2f}"])
    head = ["consumers that wait", "quiet: ms", "p99", "20 messages/s: ms", "p99", "CPU while quiet", "CPU at 20/s"]
    return table([*head, "writers of another stream, of none waiting"], rows)


def targets(found):
    for count in ("1", "50"):
        if count in found:
            yield (
                f"arrival at 20 messages/s, {count} waiting: 25 ms / median",
                1,
                25 / found[count]["busy_ms"]["median"],
            )
    last = max(found, key=int)
    yield f"{last} waiting, quiet: 5 % of a core / measured", 1, 0.05 / max(found[last]["quiet_cpu"], 0.0001)
    for count, figures in found.items():
        yield f"writers of another stream, {count} waiting / none", 0.95, figures["writers"]


class Consumer:
    """One connection that waits for what comes after the last message."""

    def __init__(self, authorization, port, selector, times):
        self._head = f" HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization}\r\n\r\n"
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._received, self._times = b"", times
        self.path = self._ask(b"/watched?limit=1000")
        while not self.path:
            self.receive(counts=False)
        selector.register(self._socket, selectors.EVENT_READ, self)

    def _ask(self, path):
        self._socket.sendall(b"GET " + path + self._head.encode())
        return b""

    def receive(self, counts=True):
        """Take what has come. A page that is whole is followed by the next request."""
        self._received += self._socket.recv(1_000_000)
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        if not length or len(body) < int(length):
            return
        now, page, self._received = time.time(), json.loads(body), b""
        if counts:
            self._times += [(now - message["body"]) * 1000 for message in page["messages"]]
        after = page["next"].partition("after=")[2].split("&")[0]
        if page["messages"] and not counts:  # not yet all that is there
            self._ask(page["next"].encode())
            return
        self.path = f"/watched?after={after}&limit=1000&wait=60".encode()
        self._ask(self.path)


def main():
    count, authorization, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    selector, times = selectors.DefaultSelector(), []
    all_of_them = [Consumer(authorization, port, selector, times) for _ in range(count)]
    selector.register(sys.stdin, selectors.EVENT_READ)
    print("waiting", flush=True)
    while all_of_them:
        for ready, _ in selector.select():
            if ready.fileobj is sys.stdin:
                print(json.dumps(times))
                return
            ready.data.receive()


if __name__ == "__main__":
    main()
