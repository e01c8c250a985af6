"""python3 bench/threads.py [THREADS [PROCESSES]]: how many messages threads that append at once store, without HTTP.

What servers with a thread for each request (gunicorn, granian, mod_wsgi, uWSGI) get from shared COMMITs. Each process has
that many threads; all write to one database in a temporary folder for three seconds.
"""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 3
BODY = '{"sensor": "a-17", "pad": "' + "x" * 400 + '"}'


def append_for_a_while(database: Path, threads: int) -> None:
    """Prints what this process has stored, and what it cost."""
    sys.path.insert(0, str(ROOT))
    import service

    commits = 0

    def clock() -> str:  # the store asks for the time once in each COMMIT
        nonlocal commits
        commits += 1
        return service.utc_now()

    store = service.Store(service.Database(database), service.read_schema(ROOT / "schema.sql"), clock)
    store.open()
    stream, stored, stop_at = store.schema.streams["messages"], [0] * threads, time.monotonic() + SECONDS

    def append(number: int) -> None:
        while time.monotonic() < stop_at:
            store.append(service.Entry(stream, "bench", None, [BODY]))
            stored[number] += 1

    cpu_s = time.process_time()
    running = [threading.Thread(target=append, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    cpu_us = (time.process_time() - cpu_s) / sum(stored) * 1e6
    store.close()
    print(
        f"{sum(stored) / SECONDS:,.0f} messages/s, {sum(stored) / commits:.1f} a COMMIT, {cpu_us:.0f} µs of CPU each",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["in"]:
        append_for_a_while(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        threads, processes = (*map(int, sys.argv[1:]), *(64, 1)[len(sys.argv) - 1 :])
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "in", f"{folder}/inlet.db", str(threads)]
            for process in [subprocess.Popen(command) for _ in range(processes)]:
                process.wait()
