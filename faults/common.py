"""What the faults have in common: servers to hurt, and an outside client that writes down every answer."""

import contextlib
import fcntl
import http.client
import json
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import service
from test_service import DEADLINE_S, TOKEN, Process, add_tester, send, stream_sql

SCHEMA = stream_sql("messages", ", bad INTEGER AS (body ->> 'bad') CONSTRAINT \"it is bad\" CHECK (bad IS NULL)")


def seed() -> random.Random:
    """Chance, which can be repeated: INLET_SEED sets it, and each test prints it."""
    number = int(os.environ.get("INLET_SEED", time.time_ns() % 10**9))
    print(f"INLET_SEED={number}", end=" ")
    return random.Random(number)


def scale(short: int, whole: int) -> int:
    """How many rounds: few in CI, all with INLET_FULL=1."""
    return whole if os.environ.get("INLET_FULL") else short


def database(folder: Path, schema: str = SCHEMA) -> Path:
    """A database with one client, and its schema.sql beside it."""
    path = folder / "inlet.db"
    (folder / "schema.sql").write_text(schema)
    store = service.Store(service.Database(path), service.read_schema(folder / "schema.sql"))
    store.open()
    store.close()
    add_tester(path)
    return path


def sql(path: Path, *statements: str) -> list:
    """Run SQL on a database by hand; the rows of the last statement."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return [db.execute(statement).fetchall() for statement in statements][-1]


def press(address: str, seconds: float, connections: int = 8) -> int:
    """Send messages as fast as it goes, on several connections; how many were taken."""
    until = time.monotonic() + seconds

    def client() -> int:
        taken = 0
        with contextlib.closing(http.client.HTTPConnection(address, timeout=DEADLINE_S)) as connection:
            while time.monotonic() < until:
                status, _, data = send(connection, "POST", "/messages", "1")
                assert status == 201, data
                taken += 1
        return taken

    return sum(at_once(*[client] * connections))


@contextlib.contextmanager
def held(path: Path):
    """Hold the lock that the processes share who write to a database; yields its file."""
    with open(f"{path}-lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def wait_until(condition: Callable[[], Any], what: str, within_s: float = DEADLINE_S) -> None:
    """Wait for a condition; what says in the failure what did not come about."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def at_once(*work: Callable[[], Any]) -> list:
    """What each call returns, when each runs in a thread of its own."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [running.result() for running in [pool.submit(each) for each in work]]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds that it took."""
    started = time.monotonic()
    result = work()
    return result, time.monotonic() - started


class Server(Process):
    """A server to hurt, our own and not waitress; wrapper is a command in front of it, such as strace."""

    started: ClassVar[list["Server"]] = []  # those that run; conftest.py ends what a failed test has left

    def __init__(self, folder: Path, *arguments: str, wrapper: tuple[str, ...] = (), **environ: str):
        self.wrapper = wrapper
        self.started.append(self)
        flags = ("--schema", str(folder / "schema.sql"), "--server", "loop")
        super().__init__(folder, *flags, *arguments, environ=environ)

    def start(self):
        real = subprocess.Popen
        try:
            subprocess.Popen = lambda command, **more: real([*self.wrapper, *command], start_new_session=True, **more)
            super().start()
        finally:
            subprocess.Popen = real

    @property
    def pid(self) -> int:
        """The process of the server itself, also under a wrapper."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else pid  # some wrappers become the server themselves

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def open_files(self) -> list[str]:
        """What its file descriptors refer to."""
        found = []
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                found.append(os.readlink(link))
        return found

    def status(self, name: str) -> int:
        """A number out of /proc/PID/status, such as Threads, VmRSS and VmHWM (in kB)."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    @contextlib.contextmanager
    def growing_at_most(self, megabytes: int):
        """The block fails if the memory of the server grows by more, be it only for a moment."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # VmHWM, the peak, starts anew
        before = self.status("VmRSS")
        yield
        grown = (self.status("VmHWM") - before) / 1000
        print(f"grew by {grown:.0f} MB")
        assert grown <= megabytes

    def unread_bytes(self) -> int:
        """How much has been sent to the server, and waits in the kernel."""
        found = 0
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, _, state, queues, *_ = line.split()
            if int(local.rpartition(":")[2], 16) == self.port and state == "01":  # ESTABLISHED
                found += int(queues.partition(":")[2], 16)
        return found

    def processor_time(self) -> int:
        """What it has used of the processor so far, in ticks of 10 ms."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def wait_until_idle(self) -> None:
        """Wait until it has read all that was sent to it, and does nothing."""
        quiet, used = 0, -1
        deadline = time.monotonic() + DEADLINE_S
        while quiet < 5:
            assert time.monotonic() < deadline, "the server has not come to rest"
            before, used = used, self.processor_time()
            quiet = quiet + 1 if used - before <= 1 and not self.unread_bytes() else 0
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def end(self) -> int:
        """SIGTERM, and the exit status."""
        self.signal(signal.SIGTERM)
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.kill()


def strace(*inject: str) -> tuple[str, ...]:
    calls = ",".join(sorted({rule.partition(":")[0] for rule in inject}))
    return (
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        f"trace={calls}",
        *(w for i in inject for w in ("-e", f"inject={i}")),
    )


@contextlib.contextmanager
def failing(server: Server, *inject: str):
    """strace injects faults into a server that runs already; they count from here on, in each thread."""
    tracer = subprocess.Popen([*strace(*inject), "-p", str(server.pid)])
    time.sleep(0.4)
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait()


class Ledger:
    """Sends messages from several threads, and knows of each what it was told."""

    def __init__(self, connect, path="/messages", size=60, chosen=None, first=1):
        self.connect = connect
        self.path = path
        self.size = size
        self.chosen = chosen or random.Random(1)
        self.acknowledged: dict[int, bytes] = {}
        self.keyed: dict[str, tuple[int, bytes]] = {}
        self.refused: list[bytes] = []
        self.unknown: list[bytes] = []
        self.unanswered_keys: dict[str, bytes] = {}
        self.statuses: Counter = Counter()
        self.taken_at: list[float] = []  # the moments of each 201
        self._count = first - 1  # of the messages; each has its number in it
        self._lock = threading.Lock()

    def post(self, body: bytes, key: str | None = None, connection=None):
        """(status, id) of one attempt; (None, None) without an answer."""
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        if key:
            headers["Idempotency-Key"] = key
        own = connection or self.connect()
        try:
            own.request("POST", self.path, body, headers)
            answer = own.getresponse()
            data = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError):
            own.close()
            self.statuses[None] += 1
            return None, None
        finally:
            if not connection:
                own.close()
        self.statuses[answer.status] += 1
        return answer.status, data.get("id")

    def send(self, connection=None, until=lambda: False) -> int | None:
        """Sends one new message: plain, with a key (retried until it is answered), or one that is to be refused."""
        with self._lock:
            self._count += 1
            number = self._count
            kind = self.chosen.random()
        bad = kind < 0.1
        key = f"key-{number}" if kind > 0.5 else None
        body = json.dumps({"n": number, "pad": "x" * self.size} | ({"bad": 1} if bad else {})).encode()
        status, message_id = self.post(body, key, connection)
        while key and (status is None or status >= 500) and not until():
            time.sleep(0.02)
            status, message_id = self.post(body, key)  # on a new connection: a server that was killed has a new port
        if status == 201:
            assert message_id not in self.acknowledged
            self.acknowledged[message_id] = body
            self.taken_at.append(time.monotonic())
            if key:
                self.keyed[key] = message_id, body
        elif status is not None and status < 500:
            assert bad, status
            self.refused.append(body)
        else:
            self.unknown.append(body)
        return status

    @contextlib.contextmanager
    def sending(self, threads: int = 4):
        """Sends on for as long as the block runs."""
        stop, errors = threading.Event(), []

        def produce():
            connection = self.connect()
            while not stop.is_set():
                try:
                    if self.send(connection, stop.is_set) is None:
                        connection = self.connect()
                        time.sleep(0.01)
                except Exception as error:
                    errors.append(error)
                    raise

        producers = [threading.Thread(target=produce, daemon=True) for _ in range(threads)]
        for thread in producers:
            thread.start()
        try:
            yield self
        finally:
            stop.set()
            for thread in producers:
                thread.join(60)
        assert not errors
        assert not any(thread.is_alive() for thread in producers)

    def must_answer(self, within_s: float = DEADLINE_S) -> None:
        """The service takes messages again, by itself."""
        deadline = time.monotonic() + within_s
        while self.send(until=lambda: time.monotonic() > deadline) != 201:
            assert time.monotonic() < deadline, "the service did not recover"
            time.sleep(0.05)

    def longest_gap(self) -> float:
        """The most seconds in which no message was taken."""
        return max(after - before for before, after in pairwise(self.taken_at))

    def check(self, path: Path) -> int:
        """The invariant, against the database; how many messages are in it."""
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            stored = db.execute("SELECT id, key, CAST(body AS BLOB) FROM messages").fetchall()
        return self.check_rows(stored)

    def check_rows(self, stored: list[tuple[int, str | None, bytes]]) -> int:
        by_id = {message_id: body for message_id, _, body in stored}
        # Counted first: pytest would print every message of a failing comparison.
        lost = [i for i, body in self.acknowledged.items() if by_id.get(i) != body]
        assert not lost, f"201 was sent for {lost[:10]}, and they are not there as they were sent"
        counts = Counter(body for _, _, body in stored)
        twice = [body[:40] for body, count in counts.items() if count > 1]
        assert not twice, f"{twice[:10]} are there twice"
        refused = [body[:40] for body in self.refused if body in counts]
        assert not refused, f"{refused[:10]} were refused, and are there"
        known = {*self.acknowledged.values(), *self.unknown}
        strangers = [body[:40] for body in counts if body not in known]
        assert not strangers, f"nobody has sent {strangers[:10]}"
        keys = Counter(key for _, key, _ in stored if key)
        doubled = [key for key, count in keys.items() if count > 1]
        assert not doubled, f"the keys {doubled[:10]} are there twice"
        return len(stored)
