"""Load that lasts: memory, descriptors, threads and the WAL stay flat; overload is answered late or with 503."""

import os
import time
from pathlib import Path

from common import Ledger, Server, database, scale, seed


def measured(pid: int, path: Path) -> dict[str, int]:
    """What a process holds at this moment."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "rss_kb": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "wal_bytes": os.path.getsize(f"{path}-wal"),
    }


def test_nothing_grows_under_load_that_lasts(tmp_path):
    """Forty seconds here, half an hour with INLET_FULL=1; readings are compared between the first and the last third."""
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), size=400, chosen=seed())
    seconds, readings = scale(40, 1800), []
    with ledger.sending(16):
        time.sleep(5)
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            time.sleep(1)
            readings.append(measured(server.pid, path))
    third = len(readings) // 3
    early = {name: max(reading[name] for reading in readings[:third]) for name in readings[0]}
    late = {name: max(reading[name] for reading in readings[-third:]) for name in readings[0]}
    print(f"{len(ledger.acknowledged)} messages in {seconds} s; early {early}, late {late}")
    assert late["rss_kb"] < early["rss_kb"] * 1.1
    assert late["threads"] == early["threads"]
    assert late["descriptors"] <= early["descriptors"] + 2
    assert late["wal_bytes"] < early["wal_bytes"] * 1.5 + 1_000_000
    assert server.end() == 0
    ledger.check(path)


def test_overload_is_answered_late_or_with_503_and_passes(tmp_path):
    """Ten times more clients than threads, all at once."""
    path = database(tmp_path)
    server = Server(tmp_path)
    ledger = Ledger(lambda: server.connect(), chosen=seed())
    with ledger.sending(100):
        time.sleep(10)
    assert set(ledger.statuses) <= {201, 422, 503}
    assert ledger.statuses[201] > 200
    started = time.monotonic()
    ledger.must_answer()
    assert time.monotonic() - started < 5
    assert server.end() == 0
    print(dict(ledger.statuses), ledger.check(path), "stored")
