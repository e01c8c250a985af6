"""The benchmark: Inlet beside what people would use instead, on this machine, in one run.

    python3 bench/run.py                   all of it (20 minutes with --seconds 2)
    python3 bench/run.py --part rates      one part: rates, footprint, ceilings, growth
    python3 bench/run.py --quick           one short round of everything, to see that it works
    python3 bench/run.py --against COMMIT  Inlet as it is now beside Inlet as it was then (bench/against.py)

It makes a virtual environment in bench/.venv, installs the peers there and with npm, and wrk with apt-get if it is
missing. Every server gets a database of its own in WAL mode with synchronous = FULL, answers after its COMMIT, and
runs alone. Rounds are interleaved (A B C A B C …). Results: bench/results.json, bench/rates.svg, Markdown on stdout.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

BENCH = Path(__file__).resolve().parent
VENV = BENCH / ".venv"
if Path(sys.prefix) != VENV:
    if not (VENV / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    subprocess.run([VENV / "bin" / "pip", "install", "-q", "-r", BENCH / "requirements.txt"], check=True)
    against_itself = any(word.startswith("--against") for word in sys.argv)
    built = BENCH / "peers" / "node_modules" / "better-sqlite3" / "build" / "Release"
    if not built.exists() and not against_itself:
        subprocess.run(["npm", "install", "--silent", "--no-package-lock"], cwd=BENCH / "peers", check=True)
    tools = ["wrk", "strace"] if against_itself else ["wrk", "strace", "nginx"]
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        subprocess.run(["apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["apt-get", "install", "-y", "-q", *missing], check=True, stdout=subprocess.DEVNULL)
    os.execv(VENV / "bin" / "python", [VENV / "bin" / "python", *sys.argv])

import against  # noqa: E402
from servers import (  # noqa: E402
    MESSAGE,
    PORT,
    ROOT,
    cpu_s,
    inlet,
    median,
    peers,
    raise_descriptor_limit,
    rss_mb,
    say,
    send_one_by_one,
    spread,
    system_calls,
    table,
    wrk,
)

CONNECTIONS = (1, 4, 16, 64, 256, 1000)
INSERT = "INSERT INTO messages (received_at, client, key, body) VALUES (?, ?, ?, ?)"


# The parts


def rates(options):
    """Messages a second, latencies and CPU by the number of connections."""
    chosen = peers()
    samples = {peer.name: {} for peer in chosen}
    for number in range(options.rounds):
        for peer in chosen:
            with peer.running() as process:
                wrk(peer, 16, options.seconds / 3)
                for connections in CONNECTIONS:
                    before = cpu_s(process)
                    figures = wrk(peer, connections, options.seconds)
                    figures["cpu_us"] = (cpu_s(process) - before) / max(1, figures["requests"]) * 1e6
                    samples[peer.name].setdefault(connections, []).append(figures)
                rate = samples[peer.name][64][-1]["rate"]
                say(f"round {number + 1}: {peer.name}: {rate:,.0f}/s with 64 connections")
    return {
        name: {
            connections: {
                "rate": median(s["rate"] for s in runs),
                "p50_ms": median(s["p50_us"] / 1000 for s in runs),
                "p99_ms": median(s["p99_us"] / 1000 for s in runs),
                "p99_by_p50": median(s["p99_us"] / max(1, s["p50_us"]) for s in runs),
                "cpu_us": median(s["cpu_us"] for s in runs),
                "errors": sum(s["status_errors"] + s["socket_errors"] for s in runs),
            }
            for connections, runs in by_connections.items()
        }
        for name, by_connections in samples.items()
    }


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


def footprint(options):
    """What one message costs when it comes alone: counted over many, one at a time."""
    count = 100 if options.quick else 1000
    results = {}
    for peer in peers()[:7]:
        say(f"footprint: {peer.name}")
        found = {}
        with peer.running() as process:
            found["start_to_201_s"] = process.first_201_s
            send_one_by_one(peer, count)
            before = cpu_s(process)
            send_one_by_one(peer, count)
            found["cpu_us"] = (cpu_s(process) - before) / count * 1e6
            found["rss_mb"] = rss_mb(process)
            found |= system_calls(process, peer, count)
        found |= statements_and_calls(peer, count)
        results[peer.name] = found
    peer = inlet()
    with peer.running() as process:
        wrk_messages(peer, 1000)
        early = rss_mb(process)
        wrk_messages(peer, 10_000 if options.quick else 100_000)
        results["memory"] = {"after_1000_mb": early, "after_100000_mb": rss_mb(process)}
    return results


def wrk_messages(peer, wanted):
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


def ceilings(options):
    """What the sqlite3 module can do alone, and how much of it is left over HTTP."""
    samples = {}

    def add(name, value):
        samples.setdefault(name, []).append(value)
        say(f"{name}: {value:,.0f}/s")

    peer = inlet()
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            database = Path(folder) / "data.db"
            peer.prepare(database)
            db = sqlite3.connect(database, isolation_level=None)
            db.execute("PRAGMA synchronous = FULL")
            values = ("2026-11-22T10:00:00.123Z", "bench", None, MESSAGE)
            add("sqlite3: a COMMIT for each INSERT", per_second(lambda db=db: db.execute(INSERT, values), 1, options))

            def thousand(db=db):
                db.execute("BEGIN IMMEDIATE")
                db.executemany(INSERT, (values for _ in range(1000)))
                db.execute("COMMIT")

            add("sqlite3: 1,000 rows a COMMIT, executemany", per_second(thousand, 1000, options))
            page = "SELECT id, received_at, client, key, body FROM messages WHERE id > ? ORDER BY id LIMIT 1000"
            add(
                "sqlite3: fetchall of 1,000 rows",
                per_second(lambda db=db: db.execute(page, (0,)).fetchall(), 1000, options),
            )
            db.close()
            with peer.running(folder):
                ndjson = {"Content-Type": "application/x-ndjson"}
                batch = "\n".join([MESSAGE] * 1000)
                figures = wrk(peer, 4, options.seconds, body=batch, headers=ndjson)
                assert not figures["status_errors"]
                add("Inlet: NDJSON, 1,000 messages a request", figures["rate"] * 1000)
                path, accept = "/messages?after=0&limit=1000", {"Accept": "application/x-ndjson"}
                figures = wrk(peer, 4, options.seconds, "GET", path=path, headers=accept)
                assert not figures["status_errors"]
                add("Inlet: feed, 1,000 messages a page, NDJSON", figures["rate"] * 1000)
    return {name: median(values) for name, values in samples.items()}


def per_second(action, rows, options):
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < options.seconds:
        action()
        count += rows
    return count / passed


def growth(options):
    """The same rates in a small and in a large database, with larger bodies, and beside idle connections."""
    peer = inlet()
    rows = 100_000 if options.quick else 10_000_000
    results = {"rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        say(f"filling a database with {rows:,} messages")
        large, small = Path(folder) / "large", Path(folder) / "small"
        for place in (large, small):
            place.mkdir()
            peer.prepare(place / "data.db")
        db = sqlite3.connect(large / "data.db", isolation_level=None)
        for start in range(0, rows, 100_000):
            db.execute("BEGIN")
            db.execute(
                f"WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {min(100_000, rows)})"
                " INSERT INTO messages (received_at, client, body)"
                " SELECT '2026-11-22T10:00:00.123Z', 'bench', ? FROM n",
                (MESSAGE,),
            )
            db.execute("COMMIT")
            if start % 1_000_000 == 0:
                say(f"{start:,}")
        db.close()
        samples = {}
        for _ in range(options.rounds):
            for name, place in (("small", small), ("large", large)):
                with peer.running(place):
                    wrk(peer, 64, options.seconds / 3)
                    samples.setdefault(f"insert, {name}", []).append(wrk(peer, 64, options.seconds)["rate"])
                    if name == "large":
                        for where, after in (("start", 0), ("end", rows - 2000)):
                            path = f"/messages?after={after}&limit=1000"
                            rate = wrk(peer, 4, options.seconds, "GET", path=path)["rate"]
                            samples.setdefault(f"page at the {where}", []).append(rate)
        results["database"] = {name: median(values) for name, values in samples.items()}
    samples = {}
    for _ in range(options.rounds):
        for kib in (1, 16, 256):
            body = json.dumps("x" * (kib * 1024 - 2))
            with peer.running():
                samples.setdefault(f"{kib} KiB", []).append(wrk(peer, 64, options.seconds, body=body)["rate"])
        with peer.running():
            samples.setdefault("64 busy", []).append(wrk(peer, 64, options.seconds)["rate"])
            with idle_connections(1000, PORT):
                samples.setdefault("64 busy, 1,000 idle", []).append(wrk(peer, 64, options.seconds)["rate"])
            with nginx() as port:
                samples.setdefault("behind nginx, 64 busy", []).append(
                    wrk(peer, 64, options.seconds, port=port)["rate"]
                )
                with idle_connections(1000, port):
                    samples.setdefault("behind nginx, 64 busy, 1,000 idle", []).append(
                        wrk(peer, 64, options.seconds, port=port)["rate"]
                    )
    results["load"] = {name: median(values) for name, values in samples.items()}
    return results


@contextlib.contextmanager
def idle_connections(count, port):
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    time.sleep(1)
    yield
    for sock in sockets:
        sock.close()


@contextlib.contextmanager
def nginx(port=PORT + 1):
    with tempfile.TemporaryDirectory() as folder:
        configuration = f"""
            worker_processes 1; pid {folder}/pid; error_log {folder}/error; daemon off;
            events {{ worker_connections 4096; }}
            http {{ access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
              fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
              upstream inlet {{ server 127.0.0.1:{PORT}; keepalive 64; }}
              server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://inlet; proxy_http_version 1.1;
                proxy_set_header Connection ""; }} }} }}"""
        (Path(folder) / "conf").write_text(configuration)
        process = subprocess.Popen(["nginx", "-c", f"{folder}/conf", "-e", f"{folder}/error"])
        time.sleep(0.5)
        yield port
        process.terminate()
        process.wait()


# Showing


def markdown(results):
    parts = [f"{results['date']}, {results['machine']}; medians (min–max) of {results['rounds']} interleaved rounds."]
    if found := results.get("rates"):
        inlet = found["Inlet"]
        rows = []
        for name, by_connections in found.items():
            at = by_connections[64]
            ratio = inlet[64]["rate"]["median"] / at["rate"]["median"]
            rows.append(
                [
                    name,
                    spread(at["rate"]),
                    f"{ratio:.2f}",
                    f"{at['p50_ms']['median']:.1f}",
                    f"{at['p99_ms']['median']:.1f}",
                ]
                + [f"{at['cpu_us']['median']:,.0f}", f"{at['errors']}"]
            )
        head = ["64 connections, 450 bytes", "messages/s", "Inlet / this", "p50 ms", "p99 ms", "CPU µs", "errors"]
        parts.append(table(head, rows))
        rows = [
            [name] + [f"{by_connections[c]['rate']['median']:,.0f}" for c in CONNECTIONS]
            for name, by_connections in found.items()
        ]
        parts.append(table(["messages/s with … connections", *map(str, CONNECTIONS)], rows))
    if found := results.get("footprint"):
        columns = {
            "SQL statements": ("statements_per_message", "{:.2f}"),
            "files opened": ("opened_files", "{:.2f}"),
            "fsyncs": ("fsyncs", "{:.2f}"),
            "system calls": ("system_calls", "{:.0f}"),
            "Python calls": ("calls_per_message", "{:.0f}"),
            "CPU µs": ("cpu_us", "{:,.0f}"),
            "RSS MB": ("rss_mb", "{:.0f}"),
            "start to first 201, s": ("start_to_201_s", "{:.2f}"),
        }
        rows = []
        for name, figures in found.items():
            if name != "memory":
                shown = [(figures[key], form) for key, form in columns.values()]
                rows.append([name] + ["–" if value is None else form.format(value) for value, form in shown])
        parts.append(table(["one message at a time", *columns], rows))
        memory = found["memory"]
        ratio = memory["after_100000_mb"] / memory["after_1000_mb"]
        parts.append(
            f"Inlet's resident memory after 1,000 messages: {memory['after_1000_mb']:.1f} MB; after 100,000:"
            f" {memory['after_100000_mb']:.1f} MB ({ratio:.2f})."
        )
    if found := results.get("ceilings"):
        parts.append(table(["rows/s", "median (min–max)"], [[name, spread(f)] for name, f in found.items()]))
    if found := results.get("growth"):
        rows = [[name, spread(f)] for name, f in (found["database"] | found["load"]).items()]
        parts.append(table([f"requests/s (large: {found['rows']:,} messages)", "median (min–max)"], rows))
    parts.append(table(["figure", "target", "measured"], [[n, t, m] for n, t, m in targets(results)]))
    return "\n\n".join(parts)


def targets(results):
    """The figures that the project holds itself to, and what this run gave."""
    if found := results.get("rates"):

        def rate(name, connections=64):
            return found[name][connections]["rate"]["median"]

        for name, least in (
            ("Falcon + waitress, untuned", 12),
            ("Flask + waitress", 6),
            ("FastAPI + uvicorn", 6),
            ("Datasette", 6),
            ("Django + gunicorn", 10),
        ):
            yield f"Inlet / {name}", f"≥ {least}", f"{rate('Inlet') / rate(name):.1f}"
        for connections in (16, 64, 256):
            ratio = rate("Inlet", connections) / rate("Fastify + better-sqlite3", connections)
            yield f"Inlet / Fastify, {connections} connections", "≥ 1.0", f"{ratio:.2f}"
        yield (
            "Inlet / the same server, a constant",
            "≥ 0.75",
            f"{rate('Inlet') / rate('The same server, a constant'):.2f}",
        )
        yield (
            "Inlet on granian / Fastify",
            "≥ 1.4",
            f"{rate('Inlet on granian') / rate('Fastify + better-sqlite3'):.2f}",
        )
        yield "p99 / p50", "≤ 2.5", f"{found['Inlet'][64]['p99_by_p50']['median']:.2f}"
        cpu = {name: found[name][64]["cpu_us"]["median"] for name in found}
        yield "CPU per message, Inlet / Fastify", "≤ 1.0", f"{cpu['Inlet'] / cpu['Fastify + better-sqlite3']:.2f}"
        yield "CPU per message, Inlet / Flask", "≤ 0.25", f"{cpu['Inlet'] / cpu['Flask + waitress']:.2f}"
    if found := results.get("ceilings"):
        m = {name: figure["median"] for name, figure in found.items()}
        ratio = m["Inlet: NDJSON, 1,000 messages a request"] / m["sqlite3: 1,000 rows a COMMIT, executemany"]
        yield "NDJSON over HTTP / executemany in process", "≥ 0.5", f"{ratio:.2f}"
        ratio = m["Inlet: feed, 1,000 messages a page, NDJSON"] / m["sqlite3: fetchall of 1,000 rows"]
        yield "feed over HTTP / fetchall in process", "≥ 0.5", f"{ratio:.2f}"
    if found := results.get("growth"):
        m = {name: figure["median"] for name, figure in found["database"].items()}
        yield f"insert at {found['rows']:,} rows / at 0", "≥ 0.9", f"{m['insert, large'] / m['insert, small']:.2f}"
        yield "feed page at the end / at the start", "≥ 0.9", f"{m['page at the end'] / m['page at the start']:.2f}"
    if found := results.get("footprint"):
        memory, alone = found["memory"], found["Inlet"]
        ratio = memory["after_100000_mb"] / memory["after_1000_mb"]
        yield "resident memory, 100,000 / 1,000 messages", "≤ 1.1", f"{ratio:.2f}"
        yield "resident memory", "< 45 MB", f"{memory['after_100000_mb']:.1f} MB"
        counts = f"{alone['statements_per_message']:.2f}, {alone['opened_files']:.2f}, {alone['fsyncs']:.2f}"
        yield "SQL statements, opened files, fsyncs, alone", "3 (BEGIN, INSERT, COMMIT), 0, 1", counts


def draw(found, path):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    for name, by_connections in found.items():
        style = {"linewidth": 3} if name == "Inlet" else {"linewidth": 1.2}
        if name.startswith("The same"):
            style["linestyle"] = ":"
        left.plot(
            CONNECTIONS, [by_connections[c]["rate"]["median"] for c in CONNECTIONS], marker="o", label=name, **style
        )
        right.plot(CONNECTIONS, [by_connections[c]["p99_ms"]["median"] for c in CONNECTIONS], marker="o", **style)
    for axes, title in ((left, "messages per second"), (right, "p99 latency, milliseconds")):
        axes.set(xscale="log", yscale="log", title=title, xlabel="connections", xticks=CONNECTIONS)
        axes.set_xticklabels(CONNECTIONS)
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def machine():
    with open("/proc/cpuinfo") as file:
        model = next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), "unknown CPU")
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    return f"{os.cpu_count()} cores ({model}), {system}, {versions}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=["rates", "footprint", "ceilings", "growth"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of one run of wrk")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=BENCH / "results.json")
    parser.add_argument("--against", metavar="COMMIT", help="compare with this commit, and measure nothing else")
    parser.add_argument("--now", type=Path, default=ROOT, help="what is compared; the working tree, if not given")
    parser.add_argument("--json", type=Path, help="where the comparison goes besides stdout")
    options = parser.parse_args()
    if not options.against and (options.json or options.now != ROOT):
        parser.error("--now and --json belong to --against")
    if options.quick:
        options.rounds, options.seconds = 1, 1
    raise_descriptor_limit()
    this_run = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine(), "rounds": options.rounds}
    if options.against:
        results = this_run | against.compare(options)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(against.markdown(results))
        return
    results = json.loads(options.results.read_text()) if options.results.exists() and options.part else {}
    results |= this_run
    for part in options.part or ["rates", "footprint", "ceilings", "growth"]:
        results[part] = globals()[part](options)
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(options.results.read_text(), object_hook=whole_numbers)
    if "rates" in results and (not options.part or "rates" in options.part):
        draw(results["rates"], options.results.with_name("rates.svg"))
    print(markdown(results))


def whole_numbers(mapping):
    """JSON has only strings for names; the numbers of connections are numbers here."""
    return {int(name) if name.isdigit() else name: value for name, value in mapping.items()}


if __name__ == "__main__":
    main()
