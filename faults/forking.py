"""A process that embeds service:application, and forks while its threads write and read. Run by test_neighbours.py.

Each child writes, reads and ends; what it found is its exit status. Arguments: the number of children, a token.
"""

import gc
import itertools
import os
import signal
import sys
import threading
import time

import falcon.testing

import service

DEADLINE_S = 30
WRITERS, READERS = 4, 4


class Client:
    """Calls the application, and counts what worked."""

    def __init__(self, token: str):
        self._app = falcon.testing.TestClient(service.application)
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self.done = itertools.count()
        self.count = 0

    def post(self) -> None:
        answer = self._app.simulate_post("/messages", body="1", headers=self._headers)
        self._note(answer, 201)

    def get(self) -> None:
        self._note(self._app.simulate_get("/messages?limit=20", headers=self._headers), 200)

    def _note(self, answer, wanted: int) -> None:
        if answer.status_code != wanted:
            raise AssertionError(f"{answer.status_code} {answer.text}")
        self.count = next(self.done)


def child(number: int, token: str) -> int:
    client = Client(token)
    for _ in range(5):
        client.post()
        client.get()
    gc.collect()
    return 0


def main(children: int, token: str) -> int:
    client, stop = Client(token), threading.Event()

    def work(call):
        while not stop.is_set():
            call()

    threads = [threading.Thread(target=work, args=(client.post,), daemon=True) for _ in range(WRITERS)]
    threads += [threading.Thread(target=work, args=(client.get,), daemon=True) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    pids = []
    for number in range(children):
        wait_for_more(client, 10)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = child(number, token)
            finally:
                # As gunicorn's workers end; the others end at once, as those of uWSGI.
                sys.exit(status) if number % 2 else os._exit(status)
        pids.append(pid)
    wait_for_more(client, 10)
    stop.set()
    deadline, failed = time.monotonic() + DEADLINE_S, {}
    for number, pid in enumerate(pids):
        status = wait(pid, deadline)
        if status:
            failed[number] = status
    for thread in threads:
        thread.join(DEADLINE_S)
    print(f"of {children} children failed: {failed}" if failed else f"{children} children worked")
    return int(bool(failed) or any(thread.is_alive() for thread in threads))


def wait_for_more(client: Client, number: int) -> None:
    """Wait until the threads have done some more work."""
    wanted, deadline = client.count + number, time.monotonic() + DEADLINE_S
    while client.count < wanted:
        if time.monotonic() > deadline:
            raise AssertionError("the parent hangs")
        time.sleep(0.001)


def wait(pid: int, deadline: float) -> int | str:
    """The exit status of a child, or that it hangs."""
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
