"""The honest table: messages a second by connections, Inlet beside tutorials, products and experts.

Inlet runs first and last in each round; the distance of the two says how much of a difference is noise.
"""

import groups
from servers import cpu_s, inlet, median, say, send_one_by_one, spread, system_calls, table, wrk

CONNECTIONS = (1, 16, 64, 256)
IN_SHORT = (1, 64)  # with --quick
TRACED_MESSAGES = 100
LAST = "Inlet, at the end of the round"


def measure(options):
    """{"groups": {name: group}, "loads": {name: {connections: figures}}, "fsyncs": {name: …}, "noise": …, "failures": …}"""
    found = groups.chosen(options)
    loads, fsyncs, failures = {}, {}, []
    for number in range(options.rounds):
        for name, peer in [*((name, peer) for name, (_, peer) in found.items()), (LAST, inlet())]:
            with peer.running() as process:
                runs, lost = loads_of(peer, process, options.seconds, IN_SHORT if options.quick else CONNECTIONS)
                if number == 0 and name != LAST:
                    fsyncs[name] = fsyncs_alone(peer, process)
            shown = ", ".join(f"{figures['rate']:,.0f}/s" for figures in runs.values())
            say(f"round {number + 1}: {name}: {shown}")
            for connections, figures in runs.items():
                loads.setdefault(name, {}).setdefault(connections, []).append(figures)
            if lost > 0:
                failures.append(f"{name} has no row for {lost:,} of its 2xx answers.")
    for name, (_, peer) in found.items():
        if peer.durable and fsyncs[name] < 1:
            failures.append(f"{name} makes only {fsyncs[name]:.2f} fsyncs for a message that comes alone.")
    last = loads.pop(LAST)
    noise = {c: median(map(distance, loads[groups.INLET][c], last[c])) for c in last}
    for connections in last:
        loads[groups.INLET][connections] += last[connections]
    return {
        "groups": {name: group for name, (group, _) in found.items()},
        "loads": {
            name: {connections: summary(runs) for connections, runs in by_connections.items()}
            for name, by_connections in loads.items()
        },
        "fsyncs": fsyncs,
        "noise": noise,
        "failures": failures,
    }


def loads_of(peer, process, seconds, connections):
    """The figures by connections, and how many 2xx have no row: too few by what wrk did not wait for at its end."""
    rows_before = peer.rows_at_rest(process.database) if peer.stores else 0
    taken = load(peer, process, 16, seconds / 3)["taken"]  # to warm it up
    runs = {each: load(peer, process, each, seconds) for each in connections}
    taken += sum(figures["taken"] for figures in runs.values())
    return runs, rows_before + taken - peer.rows_at_rest(process.database) if peer.stores else 0


def load(peer, process, connections, seconds):
    """One run of wrk: answers with 2xx a second, and the CPU time that each took."""
    before = cpu_s(process)
    figures = wrk(peer, connections, seconds)
    figures["cpu_us"] = (cpu_s(process) - before) / max(1, figures["requests"]) * 1e6
    figures["taken"] = figures["requests"] - figures["status_errors"]
    figures["rate"] = figures["taken"] / figures["duration_us"] * 1e6
    return figures


def fsyncs_alone(peer, process):
    """The fsyncs of a message that comes alone, while another connection to the database stays open.

    The last one that closes moves the WAL into the database and syncs that: with synchronous=NORMAL, too.
    """
    with peer.database_open(process.database):
        send_one_by_one(peer, 20)
        return system_calls(process, peer, TRACED_MESSAGES)["fsyncs"]


def distance(first, last):
    """How far two runs of the same server are from each other, as a part of their mean."""
    return abs(first["rate"] - last["rate"]) / (first["rate"] + last["rate"]) * 2


def summary(runs):
    return {
        "rate": median(run["rate"] for run in runs),
        "p50_ms": median(run["p50_us"] / 1000 for run in runs),
        "p99_ms": median(run["p99_us"] / 1000 for run in runs),
        "cpu_us": median(run["cpu_us"] for run in runs),
        "errors": sum(run["status_errors"] + run["socket_errors"] for run in runs),
    }


# Showing


def rate_of(found, name, connections):
    return found["loads"][name][connections]["rate"]["median"]


def markdown(found):
    """The table with the ratios, the one with latencies and CPU, and the noise."""
    names, measured = list(found["loads"]), list(found["noise"])
    rows, long = [], []
    group = None
    for name in names:
        if found["groups"][name] != group:
            group = found["groups"][name]
            if group != groups.INLET:
                rows.append([f"*{group}*"] + [""] * (len(measured) + 1))
        fsyncs = f"{found['fsyncs'][name]:.1f}" if group != "constants" else "–"
        rows.append([name, *(cell(found, name, connections) for connections in measured), fsyncs])
        at = found["loads"][name][64]
        shown = [f"{at[key]['median']:,.{digits}f}" for key, digits in (("p50_ms", 1), ("p99_ms", 1), ("cpu_us", 0))]
        long.append([name, spread(at["rate"]), *shown, f"{at['errors']:,}"])
    noise = ", ".join(f"{100 * found['noise'][c]['median']:.0f} % at {c}" for c in measured)
    head = ["messages/s with … connections (and Inlet / this)", *map(str, measured), "fsyncs"]
    return "\n\n".join(
        [
            table(head, rows),
            f"Inlet at the start and at the end of a round differ by: {noise} (medians).",
            table(["with 64 connections", "messages/s", "p50 ms", "p99 ms", "CPU µs", "errors"], long),
            *found["failures"],
        ]
    )


def cell(found, name, connections):
    rate = rate_of(found, name, connections)
    ratio = rate_of(found, groups.INLET, connections) / max(1, rate)
    if name == groups.INLET:
        return f"{rate:,.0f}"
    return f"{rate:,.0f} ({ratio:.{2 if ratio < 2 else 1 if ratio < 10 else 0}f})"


def targets(found):
    """Yields what is asked, how much of it, and what this run gave: (text, least, measured)."""
    measured = found["loads"]

    def slowest(connections, wanted):
        ratios = {
            name: rate_of(found, groups.INLET, connections) / max(1, rate_of(found, name, connections))
            for name, group in found["groups"].items()
            if group == wanted and name != groups.RQLITE  # it checks neither a token nor the JSON
        }
        return min(ratios.items(), key=lambda item: item[1], default=None)

    for connections in sorted({16, 64, 256} & set(found["noise"])):
        for group in ("tutorials", "products"):
            if nearest := slowest(connections, group):
                yield f"{connections} connections: Inlet / the best of the {group} ({nearest[0]})", 1.5, nearest[1]
    for text, name, connections, least in (
        ("1 connection: Inlet / Fastify", groups.FASTIFY, 1, 0.8),
        ("1 connection: Inlet / Falcon untuned", groups.FALCON, 1, 1.0),
        ("64 connections: Inlet / Falcon untuned", groups.FALCON, 64, 1.0),
        ("64 connections: Inlet / its own server with a constant", groups.CONSTANT, 64, 0.55),
    ):
        if name in measured:
            yield text, least, rate_of(found, groups.INLET, connections) / rate_of(found, name, connections)


def draw(found, path):
    """Inlet, the best of each group at 64 connections, and waitress with a constant; rates above, p99 below."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "inlet"  # the same figures make the same file
    import matplotlib.pyplot as plt

    best = {}
    for name, group in found["groups"].items():
        if group in ("tutorials", "products", "experts"):
            best[group] = max(name, best.get(group, name), key=lambda name: rate_of(found, name, 64))
    shown = {groups.INLET: groups.INLET} | {name: f"{name} (best of the {group})" for group, name in best.items()}
    if groups.WAITRESS in found["loads"]:
        shown[groups.WAITRESS] = groups.WAITRESS
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 9), sharex=True)
    for name, label in shown.items():
        by_connections = found["loads"][name]
        style = {"linewidth": 3} if name == groups.INLET else {"linewidth": 1.2}
        if name == groups.WAITRESS:
            style["linestyle"] = ":"
        rates = [by_connections[c]["rate"]["median"] for c in CONNECTIONS]
        above.plot(CONNECTIONS, rates, marker="o", label=label, **style)
        below.plot(CONNECTIONS, [by_connections[c]["p99_ms"]["median"] for c in CONNECTIONS], marker="o", **style)
    above.set(ylabel="messages per second")
    below.set(ylabel="p99 latency, milliseconds", xlabel="connections")
    steps = (1, 2, 5)
    for axes, ticks in (
        (above, [step * 10**power for power in (3, 4) for step in steps] + [100_000]),
        (below, [step * 10**power for power in (-1, 0, 1) for step in steps] + [100]),
    ):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(CONNECTIONS, CONNECTIONS, minor=False)
        axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="upper center", ncols=2)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, metadata={"Date": None})
