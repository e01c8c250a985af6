"""A process that embeds service:application, and forks while its threads write and read. Run by test_neighbours.py.

Each child is refused, and ends; whether it was is its exit status. Arguments: the number of children, a token. The last
line that is printed has the ids that the parent was told.
"""

import gc
import itertools
import json
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
    """Calls the application, and counts the answers that are as they should be."""

    def __init__(self, token: str, post_status: int = 201, get_status: int = 200):
        self._app = falcon.testing.TestClient(service.application)
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._post_status, self._get_status = post_status, get_status
        self._done = itertools.count(1)
        self.count = 0
        self.ids: list[int] = []

    def post(self) -> None:
        answer = self._app.simulate_post("/messages", body="1", headers=self._headers)
        self._note(answer, self._post_status)
        if answer.status_code == 201:
            self.ids.append(answer.json["id"])

    def get(self) -> None:
        self._note(self._app.simulate_get("/messages?limit=20", headers=self._headers), self._get_status)

    def _note(self, answer, wanted: int) -> None:
        if answer.status_code != wanted:
            raise AssertionError(f"{answer.status_code} {answer.text}")
        self.count = next(self._done)


def child(token: str) -> int:
    client = Client(token, 503, 503)
    for _ in range(5):
        client.post()
        client.get()
    gc.collect()
    return int(client.count != 10)


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
                status = child(token)
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
    print(f"of {children} children failed: {failed}" if failed else f"{children} children were refused")
    print(json.dumps(client.ids))
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
