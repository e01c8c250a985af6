"""/metrics, in the text format of Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/"""

import platform
import resource
import sqlite3
import time
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import falcon

from service import Histogram, Store, __version__

STARTED_AT = time.time()

Samples = Iterable[tuple[dict[str, Any], float]]  # labels and values


class MetricsResource:
    """/metrics"""

    def __init__(self, store: Store):
        self._store = store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        req.context.client.require("read")
        lines = [*self._of_database(), *self._of_requests(), *of_process()]
        resp.content_type = "text/plain; version=0.0.4; charset=utf-8"
        resp.text = "\n".join([*lines, ""])

    on_head = on_get

    def _of_database(self) -> list[str]:
        store = self._store
        about = {"version": __version__, "sqlite": sqlite3.sqlite_version, "python": platform.python_version()}
        last_ids = store.last_ids(each for each in store.schema.streams.values() if each.takes)
        lines = [
            *family("inlet_build_info", "gauge", "The versions that run.", [(about, 1)]),
            *family(
                "inlet_messages_total",
                "counter",
                "Messages that were stored, by all processes.",
                [({"stream": name}, last_id) for name, last_id in last_ids.items() if last_id is not None],
            ),
            *family("inlet_waiting", "gauge", "Requests whose messages wait for a COMMIT.", [({}, len(store.queue))]),
        ]
        for name, size in store.database.sizes().items():
            lines += family(
                f"inlet_{name}", "gauge", "Bytes: of the database, of its WAL, or free on its disk.", [({}, size)]
            )
        engine: Any = store.database
        for name, kind, about_it, samples in () if engine.is_near else engine.measures():
            lines += family(f"inlet_{name}", kind, about_it, samples)
        return lines

    def _of_requests(self) -> list[str]:
        counts = self._store.statistics
        answers = [({"stream": stream, "status": status}, n) for (stream, status), n in counts.answers.copy().items()]
        refused = [
            ({"client": client, "status": status}, n)
            for client, counted in counts.refused.copy().items()
            for status, n in counted.copy().items()
        ]
        lines = [*family("inlet_requests_total", "counter", "Requests that this process has answered.", answers)]
        lines += family("inlet_refused_total", "counter", "Requests of a client that were refused.", refused)
        lines += family(
            "inlet_commits_total", "counter", "COMMITs of this process.", [({}, sum(counts.commit_s.counts))]
        )
        lines += histogram("inlet_commit_duration_seconds", "From BEGIN to COMMIT.", counts.commit_s)
        return [*lines, *histogram("inlet_messages_per_commit", "Messages.", counts.group_sizes)]


def of_process() -> Iterator[str]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    for name, kind, about, value in (
        ("start_time_seconds", "gauge", "When this process started, in Unix time.", STARTED_AT),
        ("cpu_seconds_total", "counter", "CPU time of this process.", used.ru_utime + used.ru_stime),
        ("resident_memory_bytes", "gauge", "Its memory.", resident_bytes(used.ru_maxrss)),
    ):
        yield from family(f"process_{name}", kind, about, [({}, value)])


def family(name: str, kind: str, about: str, samples: Samples) -> Iterator[str]:
    """Yield the lines of a metric."""
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        pairs = ",".join(f'{label}="{escaped(str(text))}"' for label, text in labels.items())
        yield f"{name}{{{pairs}}} {value}" if pairs else f"{name} {value}"


def escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def histogram(name: str, about: str, seen: Histogram) -> Iterator[str]:
    """Yield the lines of a histogram."""
    yield from family(name, "histogram", about, [])
    counts = list(accumulate(seen.counts))
    for bound, count in zip([*seen.bounds, "+Inf"], counts, strict=True):
        yield f'{name}_bucket{{le="{bound}"}} {count}'
    yield f"{name}_sum {seen.sum}"
    yield f"{name}_count {counts[-1]}"


def resident_bytes(largest: int) -> int:
    """Return the memory of this process; where there is no /proc (macOS), the most that it has had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return largest
