"""What one message costs when it comes alone: counted over many, one at a time."""

import json
import tempfile
import time
from pathlib import Path

import groups
from servers import cpu_s, inlet, rss_mb, say, send_one_by_one, system_calls, table, wrk

COUNTER = '''
"""Counts SQL statements and, if asked, Python calls; writes them to BENCH_SQL_LOG ten times a second."""
import json, os, sqlite3, sys, threading, time
statements = calls = 0
def count(statement):
    global statements
    statements += 1
class Connection(sqlite3.Connection):
    def __init__(self, *a, **k):
        super().__init__(*a, **k)
        self.set_trace_callback(count)
real = sqlite3.connect
def connect(*a, **k):
    k.setdefault("factory", Connection)
    return real(*a, **k)
sqlite3.connect = sqlite3.dbapi2.connect = connect
def profile(frame, event, argument):
    global calls
    calls += event == "call"
if os.environ.get("BENCH_CALLS"):
    threading.setprofile(profile)
    sys.setprofile(profile)
def write():
    sys.setprofile(None)
    while True:
        name = os.environ["BENCH_SQL_LOG"] + str(os.getpid())
        folder, base = os.path.split(name)
        with open(folder + "/new-" + base, "w") as file:
            json.dump({"statements": statements, "calls": calls}, file)
        os.replace(folder + "/new-" + base, name)
        time.sleep(0.1)
def start():
    threading.Thread(target=write, daemon=True).start()
os.register_at_fork(after_in_child=start)
start()
'''

# What is shown of each peer: the head of the column, the key, the form.
COLUMNS = (
    ("SQL statements", "statements_per_message", "{:.2f}"),
    ("files opened", "opened_files", "{:.2f}"),
    ("fsyncs", "fsyncs", "{:.2f}"),
    ("system calls", "system_calls", "{:.0f}"),
    ("Python calls", "calls_per_message", "{:.0f}"),
    ("CPU µs", "cpu_us", "{:,.0f}"),
    ("RSS MB", "rss_mb", "{:.0f}"),
    ("start to first 2xx, s", "start_to_2xx_s", "{:.2f}"),
)


def measure(options):
    """{"peers": {name: figures}, "memory": resident memory of Inlet after few and many messages}"""
    count = 50 if options.quick else 1000
    peers = {}
    for name, (_, peer) in groups.chosen(options).items():
        if not peer.stores:
            continue
        say(f"footprint: {name}")
        found = {}
        with peer.running() as process:
            found["start_to_2xx_s"] = process.first_2xx_s
            send_one_by_one(peer, count)
            statements = getattr(peer, "statements", lambda database: 0)
            statements_before, cpu_before = statements(process.database), cpu_s(process)
            send_one_by_one(peer, count)
            found["cpu_us"] = (cpu_s(process) - cpu_before) / count * 1e6
            found["statements_per_message"] = (statements(process.database) - statements_before) / count or None
            found["rss_mb"] = rss_mb(process)
            found |= system_calls(process, peer, count)
        if not found["statements_per_message"] and (name == groups.INLET or not options.quick):
            found |= statements_and_calls(peer, count)
        peers[name] = found
    peer = inlet()
    with peer.running() as process:
        send_many(peer, 1000)
        early = rss_mb(process)
        send_many(peer, 10_000 if options.quick else 100_000)
        memory = {"after_1000_mb": early, "after_100000_mb": rss_mb(process)}
    return {"peers": peers, "memory": memory}


def send_many(peer, wanted):
    done = 0
    while done < wanted:
        done += wrk(peer, 64, 1)["requests"]


def statements_and_calls(peer, count):
    """SQL statements and Python function calls of one message, counted inside of the process."""

    def counted(environ):
        time.sleep(1)
        files = [f for f in Path(environ["BENCH_SQL_LOG"]).parent.glob("count*") if not f.suffix]
        sums = [json.loads(file.read_text()) for file in files]
        return {name: sum(s.get(name, 0) for s in sums) for name in ("statements", "calls")}

    result = {}
    for name, more in (("statements", {}), ("calls", {"BENCH_CALLS": "1"})):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "sitecustomize.py").write_text(COUNTER)
            environ = {"COUNT_PATH": folder, "BENCH_SQL_LOG": f"{folder}/count"} | more
            with peer.running(environ=environ):
                send_one_by_one(peer, 20)
                before = counted(environ)[name]
                send_one_by_one(peer, count)
                after = counted(environ)[name]
                result[f"{name}_per_message"] = (after - before) / count if after else None
    return result


def markdown(found):
    rows = []
    for name, figures in found["peers"].items():
        values = [(figures.get(key), form) for _, key, form in COLUMNS]
        rows.append([name] + [form.format(value) if value is not None else "–" for value, form in values])
    early, late = (found["memory"][key] for key in ("after_1000_mb", "after_100000_mb"))
    return "\n\n".join(
        [
            table(["one message at a time", *(head for head, _, _ in COLUMNS)], rows),
            f"Inlet's resident memory after 1,000 messages: {early:.1f} MB; after 100,000: {late:.1f} MB.",
        ]
    )


def targets(found):
    early, late = (found["memory"][key] for key in ("after_1000_mb", "after_100000_mb"))
    yield "resident memory after 1,000 / 100,000 messages", 0.9, early / late
