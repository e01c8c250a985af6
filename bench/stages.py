"""Where the time of a message goes: what Inlet takes in each stage, with 1, 16 and 64 connections.

    python3 bench/stages.py [--seconds 3]

It measures functions of service.py and its server while wrk sends. The clocks themselves take time, so the sum is larger than what a
message takes without them. A stage does not contain the stages that it calls.
"""

import argparse
import contextlib
import json
import os
import sys
import threading
import time

import install

install.continue_in_venv("wrk")

from servers import BIND, PYTHON, Peer, raise_descriptor_limit, table, wrk  # noqa: E402

# What is measured: the stage, and the functions that belong to it.
STAGES = {
    "wait for requests, and look which connection has one": ("DefaultSelector.select",),
    "read from the socket": ("Connection._ready",),
    "parse": ("Connection.next_request",),
    "find the client of the token": ("Clients.authenticate",),
    "route, and make Falcon's request and response": ("Connection.run",),
    "check the JSON and make the entry": ("StreamResource.on_post",),
    "lock, look at the files, BEGIN": (),
    "INSERT": ("Database.insert",),
    "COMMIT": (),
    "share the results": ("Store._write_group",),
    "make the answer": ("StreamResource._late_answer", "Connection.answer"),
    "send": ("Connection._send",),
}


class Clock(threading.local):
    """The stages that a thread is in, and when the innermost one went on."""

    def __init__(self, spent):
        self.spent = spent
        self.stages = ["else"]
        self.began = time.perf_counter()
        self.cpu_began = time.thread_time()

    def turn_to(self, enters=None):
        """Count what has passed for the stage until now; go on in another one, or in the one around it."""
        sums = self.spent.setdefault(self.stages[-1], [0.0, 0.0])
        sums[0] += time.perf_counter() - self.began
        sums[1] += time.thread_time() - self.cpu_began
        if enters:
            self.stages.append(enters)
        else:
            self.stages.pop()
        self.began, self.cpu_began = time.perf_counter(), time.thread_time()


def serve_measured(arguments):
    """Run service.py with clocks; the seconds of each stage go into the file BENCH_STAGES, ten times a second."""
    import service

    spent = {}
    clock = Clock(spent)

    def measured(function, stage):
        def run(*arguments, **more):
            clock.turn_to(stage)
            try:
                return function(*arguments, **more)
            finally:
                clock.turn_to()

        return run

    for stage, names in STAGES.items():
        for name in names:
            owner, method = name.split(".")
            homes = [service, *map(service.extra, ("loop", "connection"))]
            owner = next(getattr(home, owner) for home in homes if hasattr(home, owner))
            setattr(owner, method, measured(getattr(owner, method), stage))
    original = service.Database.transaction

    @contextlib.contextmanager
    def transaction(database, deadline):
        manager = original(database, deadline)
        db = measured(manager.__enter__, "lock, look at the files, BEGIN")()
        try:
            yield db
        except BaseException:
            if not manager.__exit__(*sys.exc_info()):
                raise
        else:
            measured(manager.__exit__, "COMMIT")(None, None, None)

    service.Database.transaction = transaction

    def write():
        while True:
            name = os.environ["BENCH_STAGES"]
            with open(f"{name}.new", "w") as file:
                json.dump(spent, file)
            os.replace(f"{name}.new", name)
            time.sleep(0.1)

    threading.Thread(target=write, daemon=True).start()
    service.main(arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    raise_descriptor_limit()
    peer = Peer("Inlet", PYTHON, __file__, "serve", "--listen", BIND, "--database", "DATABASE", inlet=True)
    columns, head = [], []
    for connections in (1, 16, 64):
        with peer.running(environ={"BENCH_STAGES": "DATABASE.stages"}) as process:
            stages = process.database.with_name("data.db.stages")
            wrk(peer, connections, 1)
            before = seconds_in(stages)
            requests = wrk(peer, connections, options.seconds)["requests"]
            after = seconds_in(stages)
        head += [f"{connections}: µs", "CPU µs"]
        for which in (0, 1):
            columns.append(
                {s: (after[s][which] - before.get(s, (0, 0))[which]) / requests * 1e6 for s in (*STAGES, "else")}
            )
    rows = [[stage, *(f"{column[stage]:.1f}" for column in columns)] for stage in columns[0]]
    rows.append(["together", *(f"{sum(column.values()):.1f}" for column in columns)])
    print(table(["of one message, with … connections", *head], rows))


def seconds_in(stages):
    time.sleep(0.3)
    return json.loads(stages.read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve_measured(sys.argv[2:])
    else:
        main()
