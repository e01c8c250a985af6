"""Inlet as it is now beside Inlet as it was in an older commit, taking turns in one run.

Both run with the same interpreter and the same packages. Each figure starts each server anew, with an empty database,
then and now one right after the other; who goes first changes with every figure and every round. A ratio is of two
figures of the same round, and what is shown is the median of the rounds.
"""

import functools
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import servers
from servers import ROOT, median, say, spread, table, wrk

# Connections. What is measured now is to be as fast as then, as lean, and there as soon, but for the noise.
LOADS = (1, 16, 64, 256, 1000)
AT_LEAST, CPU_AT_MOST, RSS_AT_MOST, START_AT_MOST = 0.97, 1.03, 1.02, 1.05
POSTS = {n: f"{n:,} connection{'s' if n > 1 else ''}" for n in LOADS}
CONSTANT = "a constant, 64 connections"
GRANIAN = "granian, 64 connections"
GUNICORN = "gunicorn with two workers, 64 connections"
SYSTEM_CALLS = "system_calls"  # as servers.system_calls names it
TRACED_MESSAGES = 200


class Line(NamedTuple):
    """A line of the table: a value of a figure, then and now, and the ratio of now to the base."""

    title: str
    figure: str
    value: str = "rate"
    base: tuple[str, str] | None = None  # a figure and whose it is; without one, the same figure then
    at_least: float | None = None
    at_most: float | None = None


LINES = [
    *(Line(f"messages/s, {POSTS[n]}", POSTS[n], at_least=AT_LEAST) for n in LOADS),
    *(Line(f"CPU µs a message, {POSTS[n]}", POSTS[n], "cpu_us", at_most=CPU_AT_MOST) for n in LOADS),
    Line("RSS MB, 64 connections", POSTS[64], "rss_mb", at_most=RSS_AT_MOST),
    Line("ms from the start to the first 201", POSTS[64], "start_ms", at_most=START_AT_MOST),
    Line("messages/s behind granian, 64 connections", GRANIAN, at_least=AT_LEAST),
    Line("messages/s behind gunicorn, two workers, 64 connections", GUNICORN, at_least=AT_LEAST),
    Line("answers/s of its own server, a constant, 64 connections", CONSTANT),
    Line("… / plain waitress, a constant", CONSTANT, base=(CONSTANT, "waitress")),
    Line("64 connections / the server of then, a constant", POSTS[64], base=(CONSTANT, "then"), at_least=0.8),
    Line("64 connections / the server of now, a constant", POSTS[64], base=(CONSTANT, "now"), at_least=0.6),
    Line(
        "CPU µs, one connection / Falcon + waitress, untuned",
        POSTS[1],
        "cpu_us",
        base=(POSTS[1], "falcon"),
        at_most=1.0,
    ),
    Line("system calls a message, one connection", SYSTEM_CALLS, SYSTEM_CALLS),
]


def compare(options):
    """Runs all rounds; returns the raw samples and the lines of the table."""
    commit = git("rev-parse", "--short", f"{options.against}^{{commit}}").decode().strip()
    shown = git("describe", "--always", "--dirty").decode().strip() if options.now == ROOT else str(options.now)
    with tempfile.TemporaryDirectory() as folder:
        then, now = Path(folder) / "then", Path(folder) / "now"
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
            archive.extractall(then, filter="data")
        # A copy, so that all rounds measure the same, whatever is edited meanwhile.
        shutil.copytree(options.now, now, ignore=shutil.ignore_patterns(".*", "bench", "*.db*", "__pycache__"))
        for root in (then, now):
            require_installed(root / "requirements.txt")
        results = {"then": commit, "now": shown, "seconds": options.seconds, "load": os.getloadavg()[0]}
        rounds = [one_round(then, now, number, options.seconds) for number in range(options.rounds)]
    lines = [line_of(line, rounds) for line in LINES]
    return results | {"lines": lines, "troubles": list(troubles(rounds)), "samples": rounds}


def git(*command):
    done = subprocess.run(["git", "-C", ROOT, *command], stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"git {command[0]} did not work")  # git itself has said why
    return done.stdout


def require_installed(requirements):
    """Ends if a version wants other packages than those that both run with."""
    installed = (servers.BENCH / "requirements.txt").read_text().splitlines()
    for pin in requirements.read_text().splitlines():
        if pin and not pin.startswith(("#", "pytest")) and pin not in installed:
            raise SystemExit(f"{requirements} wants {pin}, which is not in bench/requirements.txt")


# Measuring


def one_round(then, now, number, seconds):
    """Measures every figure once; returns {figure: {server: sample}}."""
    samples = {}
    for place, (figure, measure, by_name) in enumerate(plan(then, now, seconds)):
        names = list(by_name)
        if (number + place) % 2:
            names.reverse()
        samples[figure] = {name: measure(by_name[name]) for name in names}
        value = SYSTEM_CALLS if figure == SYSTEM_CALLS else "rate"
        shown = (f"{name} {sample[value]:,.0f}" for name, sample in samples[figure].items())
        say(f"round {number + 1}: {figure}: {', '.join(shown)}")
    return samples


def plan(then, now, seconds):
    """Yields a figure, the function that measures it, and the servers to measure, by name."""

    def both(server, *more):
        return {"then": server(*more, root=then), "now": server(*more, root=now)}

    at_64 = functools.partial(load, 64, seconds)
    for connections in LOADS:
        beside = {"falcon": servers.untuned_falcon()} if connections == 1 else {}
        yield POSTS[connections], functools.partial(load, connections, seconds), both(servers.inlet) | beside
        if connections == 64:
            beside = {"waitress": servers.constant("waitress", "wsgi")}
            yield CONSTANT, at_64, both(servers.constant, "inlet", "wsgi") | beside
    yield GRANIAN, at_64, both(servers.on_granian)
    yield GUNICORN, at_64, both(servers.on_gunicorn, 2)
    yield SYSTEM_CALLS, traced, both(servers.inlet)


def load(connections, seconds, peer):
    """A run of wrk after a shorter one: answers with 2xx a second, CPU, and 2xx without a row in the database."""
    with peer.running() as process:
        wrk(peer, connections, seconds / 3)
        rows_before, cpu_before = peer.rows_at_rest(process.database), servers.cpu_s(process)
        figures = wrk(peer, connections, seconds)
        figures["cpu_us"] = (servers.cpu_s(process) - cpu_before) / max(1, figures["requests"]) * 1e6
        rows = peer.rows_at_rest(process.database) - rows_before
        figures |= {"rss_mb": servers.rss_mb(process), "start_ms": process.first_2xx_s * 1000}
    taken = figures["requests"] - figures["status_errors"]
    figures["rate"] = taken / figures["duration_us"] * 1e6
    figures["without_row"] = max(0, taken - rows) if peer.stores else 0
    return figures


def traced(peer):
    with peer.running() as process:
        servers.send_one_by_one(peer, 20)
        return servers.system_calls(process, peer, TRACED_MESSAGES)


# Showing


def line_of(line, rounds):
    """The figures of one line, over all rounds."""

    def values(figure, server):
        return [samples[figure][server][line.value] for samples in rounds]

    then, now = values(line.figure, "then"), values(line.figure, "now")
    base = values(*line.base) if line.base else then
    ratio = median(value / max(1e-9, other) for value, other in zip(now, base, strict=True))
    asked = met = None
    if line.at_least:
        asked, met = f"≥ {line.at_least}", ratio["median"] >= line.at_least
    elif line.at_most:
        asked, met = f"≤ {line.at_most}", ratio["median"] <= line.at_most
    if any(samples[line.figure]["now"].get("without_row") for samples in rounds):
        met = False  # whatever it was fast at
    title = f"{line.title} ({median(base)['median']:,.0f})" if line.base else line.title
    return {"figure": title, "then": median(then), "now": median(now), "ratio": ratio, "asked": asked, "met": met}


def troubles(rounds):
    """Yields a sentence for each figure and server that did not answer everything with a 2xx, or not keep it."""
    kinds = {
        "status_errors": "answers were not 2xx",
        "socket_errors": "connections failed or timed out",
        "without_row": "2xx answers have no row in the database",
    }
    for figure, by_name in rounds[0].items():
        for name in by_name:
            for kind, text in kinds.items():
                if count := sum(samples[figure][name].get(kind, 0) for samples in rounds):
                    yield f"{figure}, {name}: {count:,} {text}."


def markdown(results):
    rows = []
    for line in results["lines"]:
        verdict = {True: "met", False: "missed", None: ""}[line["met"]]
        then, now = (f"{line[name]['median']:,.0f}" for name in ("then", "now"))
        rows.append([line["figure"], then, now, spread(line["ratio"], "{:.2f}"), line["asked"] or "", verdict])
    first = (
        f"{results['date']}, {results['machine']}; now ({results['now']}) against {results['then']}: medians of"
        f" {results['rounds']} rounds of {results['seconds']:g} s. The ratio is the median of the rounds' ratios."
        f" Load average of the machine at the start: {results['load']:.1f}."
    )
    last = " ".join(results["troubles"]) or "Every answer was a 2xx, and every 2xx has its row in the database."
    head = ["figure", "then", "now", "ratio (min–max)", "asked", ""]
    return "\n\n".join([first, table(head, rows), last])
