"""The benchmark: Inlet beside what people would use instead, on this machine, in one run.

    python3 bench/run.py                   all of it (30 minutes with --seconds 2 --rounds 3)
    python3 bench/run.py --part rates      one part: rates, footprint, growth or waiting
    python3 bench/run.py --peers ': rust|: go' only these, beside Inlet; cms is WordPress
    python3 bench/run.py --quick           one short round of everything, to see that it works
    python3 bench/run.py --against COMMIT  Inlet as it is now beside Inlet as it was then (bench/against.py)

It makes a virtual environment in bench/.venv, installs the Python peers there, Node's in bench/peers, compiles the
others into bench/.build, and gets wrk, strace and nginx with apt-get. Without node, go or cargo their peers are left
out. Every server has a database of its own, answers after its COMMIT, and runs alone. Results: bench/results.json,
bench/rates.svg, and Markdown on stdout. The exit status is 1 if a peer loses a row or a durable one does not sync, or
if Inlet takes less than untuned Falcon, where that is measured, at 64 connections.
"""

import argparse
import json
import os
import platform
import re
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path

import install

against_itself = any(word.startswith("--against") for word in sys.argv)
install.continue_in_venv("wrk", "strace", *([] if against_itself else ["nginx"]))

import against  # noqa: E402
import footprint  # noqa: E402
import groups  # noqa: E402
import growth  # noqa: E402
import rates  # noqa: E402
import waiting  # noqa: E402
from servers import BENCH, ROOT, raise_descriptor_limit, table  # noqa: E402

PARTS = {"rates": rates, "footprint": footprint, "growth": growth, "waiting": waiting}


def markdown(results):
    shown = [f"{results['date']}, {results['machine']}; medians (min–max) of {results['rounds']} interleaved rounds."]
    asked = []
    for name, part in PARTS.items():
        if found := results.get(name):
            shown.append(part.markdown(found))
            asked += part.targets(found)
    rows = [
        [text, f"≥ {least}", f"{measured:.2f}", "met" if measured >= least else "missed"]
        for text, least, measured in asked
    ]
    return "\n\n".join([*shown, table(["figure", "asked", "measured", ""], rows)])


def failures(results):
    """What makes the run fail, a sentence each."""
    if found := results.get("rates"):
        yield from found["failures"]
        if groups.FALCON in found["loads"]:
            ours, theirs = (rates.rate_of(found, name, 64) for name in (groups.INLET, groups.FALCON))
            if ours < theirs:
                yield f"Inlet takes {ours:,.0f} messages/s at 64 connections, untuned Falcon {theirs:,.0f}."


def machine():
    with open("/proc/cpuinfo") as file:
        model = next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), "unknown CPU")
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    return f"{os.cpu_count()} cores ({model}), {system}, {versions}"


def whole_numbers(mapping):
    """JSON has only strings for names; the numbers of connections are numbers here."""
    return {int(name) if name.isdigit() else name: value for name, value in mapping.items()}


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="can be given more than once")
    only = {"type": lambda text: re.compile(text, re.IGNORECASE), "metavar": "REGEX"}
    parser.add_argument("--peers", help="only peers whose GROUP: NAME matches; case does not matter", **only)
    also = {"type": install.python_at, "metavar": "PATH", "action": "append", "default": []}
    parser.add_argument("--python", help="measure Inlet on this Python as well", **also)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of one run of wrk")
    parser.add_argument("--quick", action="store_true", help="one round of 1 s, and a smaller large database")
    parser.add_argument(
        "--results", type=Path, help="where they go; bench/results.json if everything is measured or --part is given"
    )
    parser.add_argument("--against", metavar="COMMIT", help="compare with this commit, and measure nothing else")
    parser.add_argument("--now", type=Path, default=ROOT, help="what is compared; the working tree, if not given")
    parser.add_argument("--json", type=Path, help="where the comparison goes besides stdout")
    options = parser.parse_args()
    if not options.against and (options.json or options.now != ROOT):
        parser.error("--now and --json belong to --against")
    if options.quick:
        options.rounds, options.seconds = 1, 1
    if not options.results and not options.quick and not options.peers:
        options.results = BENCH / "results.json"
    return options


def main():
    options = command_line()
    raise_descriptor_limit()
    this_run = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine(), "rounds": options.rounds}
    if options.against:
        results = this_run | against.compare(options)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(against.markdown(results))
        return
    results = this_run
    if options.results and options.results.exists() and options.part:
        results = json.loads(options.results.read_text(), object_hook=whole_numbers) | this_run
    for part in options.part or PARTS:
        results[part] = PARTS[part].measure(options)
        if options.results:
            options.results.write_text(json.dumps(results, indent=1) + "\n")
            if part == "rates":
                rates.draw(results["rates"], options.results.with_name("rates.svg"))
    print(markdown(results))
    if found := list(failures(results)):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
