"""Inlet on an rqlite cluster beside Inlet on a file, on this machine, in one run.

    python3 bench/cluster.py [--seconds 2] [--rounds 3]

It starts three nodes with cluster/start.sh, all on this machine: a real cluster has a processor and a disk for each, and
a network between them. Rounds are interleaved. Prints tables in Markdown.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import install

install.continue_in_venv("wrk")

from servers import MESSAGE, PORT, PYTHON, ROOT, inlet, median, say, spread, table, wrk  # noqa: E402

CONNECTIONS = (1, 16, 64, 256)
NODES = "http://127.0.0.1:4101,127.0.0.1:4102,127.0.0.1:4103"
BATCH = "\n".join([MESSAGE] * 1000)
NDJSON = {"Content-Type": "application/x-ndjson"}


@contextlib.contextmanager
def cluster():
    """Three nodes, with a client."""
    with tempfile.TemporaryDirectory() as folder:
        command = [ROOT / "cluster" / "start.sh", folder]
        nodes = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            if not any("are ready" in line for line in nodes.stdout):
                raise SystemExit("the nodes do not start")
            with front_end(PORT):
                command = [PYTHON, ROOT / "service.py", "client", "add", "bench", "--database", NODES]
                token = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
            yield {"Authorization": f"Bearer {token}"}
        finally:
            os.killpg(nodes.pid, signal.SIGTERM)
            nodes.wait()


@contextlib.contextmanager
def front_end(port):
    command = [PYTHON, ROOT / "service.py", "--listen", f"127.0.0.1:{port}", "--database", NODES]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert "listening" in process.stdout.readline()
        yield
    finally:
        process.terminate()
        process.wait()


def loaded(peer, connections, seconds, ports, **more):
    """The messages a second of several servers together; each has its share of the connections."""
    share = max(1, connections // len(ports))
    with ThreadPoolExecutor(len(ports)) as pool:
        runs = list(pool.map(lambda port: wrk(peer, share, seconds, port=port, **more), ports))
    failed = sum(figures["status_errors"] + figures["socket_errors"] for figures in runs)
    assert not failed, failed
    return sum(figures["rate"] for figures in runs)


def measure(samples, name, peer, ports, options):
    for connections in CONNECTIONS:
        if connections >= len(ports):
            rate = loaded(peer, connections, options.seconds, ports)
            samples.setdefault((name, connections), []).append(rate)
    batches = loaded(peer, 4, options.seconds, ports, body=BATCH, headers=NDJSON) * 1000
    samples.setdefault((name, "batches"), []).append(batches)
    say(f"{name}: {samples[name, 64][-1]:,.0f}/s with 64 connections, {batches:,.0f}/s in batches")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    samples = {}
    with cluster() as authorization:
        on_cluster = inlet()
        on_cluster.headers |= authorization
        for _ in range(options.rounds):
            peer = inlet()
            with peer.running():
                measure(samples, "a file", peer, [PORT], options)
            with front_end(PORT), front_end(PORT + 1):
                measure(samples, "a cluster, 1 front end", on_cluster, [PORT], options)
                measure(samples, "a cluster, 2 front ends", on_cluster, [PORT, PORT + 1], options)
    names = list(dict.fromkeys(name for name, _ in samples))
    rows = []
    for figure in (*CONNECTIONS, "batches"):
        of_file = median(samples["a file", figure])["median"]
        row = ["batches of 1,000, 4 connections" if figure == "batches" else f"{figure} connection{'s' * (figure > 1)}"]
        for name in names:
            found = samples.get((name, figure))
            shown = f"{spread(median(found))}, {median(found)['median'] / of_file:.2f}" if found else "–"
            row.append(shown)
        rows.append(row)
    print(table(["messages/s (min–max), and the ratio to the file", *names], rows))
    print(json.dumps({f"{name}, {figure}": values for (name, figure), values in samples.items()}), file=sys.stderr)


if __name__ == "__main__":
    main()
