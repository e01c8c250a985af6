"""A power cut at every point of a recorded run.

strace records what the server does to its files and what it sends. For each cut point, the files are built again as
a disk could hold them: what had been synced is there; of what was written later, nothing, everything, or a random part
in any order, with torn sectors. SQLite opens the result, and every 201 that had been sent has to be in it.
"""

import contextlib
import re
import sqlite3
import time

from common import Ledger, Server, database, scale, seed

SECTOR = 512
CALLS = "openat,creat,pwrite64,write,ftruncate,fsync,fdatasync,unlink,unlinkat,rename,renameat2,sendto,sendmsg"
LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
UNFINISHED = re.compile(r"^(\d+) +(.*) <unfinished \.\.\.>$")
RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$")


def text(hexadecimal: str) -> str:
    """What strace -xx has written as \\x2f\\x74…"""
    return bytes.fromhex(hexadecimal.replace("\\x", "")).decode()


def events(trace, path):
    """What happened, in order: ("write", file, offset, data), ("truncate", file, size), ("sync", file), ("sent", data).

    A call counts when it has returned: a sync that was under way at the cut had not synced. But an answer counts
    from the moment that it is handed to the kernel.
    """
    started = {}
    names = {str(path): "db", f"{path}-wal": "wal"}
    for raw in trace.read_text(errors="replace").splitlines():
        if unfinished := UNFINISHED.match(raw):
            started[unfinished[1]] = unfinished[2]
            if unfinished[2].startswith("send") and (data := re.search(r'"((?:\\x..)*)"', unfinished[2])):
                yield "sent", bytes.fromhex(data[1].replace("\\x", ""))
            continue
        if resumed := RESUMED.match(raw):
            if resumed[2].startswith("send"):
                continue
            raw = f"{resumed[1]} {started.pop(resumed[1])}{resumed[3]}"
        line = LINE.match(raw)
        if not line or int(line[4]) < 0:
            continue
        call, arguments = line[2], line[3]
        target = re.match(r"\d+<((?:\\x..)*)>", arguments)
        name = names.get(text(target[1])) if target else None
        if call == "pwrite64" and name:
            data, _, offset = re.search(r'"((?:\\x..)*)", (\d+), (\d+)$', arguments).groups()
            yield "write", name, int(offset), bytes.fromhex(data.replace("\\x", ""))
        elif call == "ftruncate" and name:
            yield "truncate", name, int(arguments.rpartition(", ")[2])
        elif call in ("fsync", "fdatasync") and name:
            yield "sync", name
        elif call in ("sendto", "sendmsg") and (data := re.search(r'"((?:\\x..)*)"', arguments)):
            yield "sent", bytes.fromhex(data[1].replace("\\x", ""))
        elif call in ("unlink", "unlinkat", "rename", "renameat2"):
            touched = {names.get(text(found)) for found in re.findall(r'"((?:\\x..)*)"', arguments)} - {None}
            # The WAL goes when the last connection closes, after a checkpoint. Until the next one has been synced,
            # with its directory, the old one may be there again.
            assert touched <= {"wal"}, f"this does not know how to cut {call}"
            if touched:
                assert call == "unlink"
                yield "truncate", "wal", 0


def apply(event, content: bytearray):
    """Does a write or a truncation to a file's content."""
    if event[0] == "truncate":
        del content[event[2] :]
        content.extend(bytes(max(0, event[2] - len(content))))
    else:
        _, _, offset, data = event
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data


def torn(event, chosen):
    """A write of which only some sectors have reached the disk."""
    if event[0] == "truncate":
        return [event]
    _, name, offset, data = event
    pieces = [("write", name, offset + at, data[at : at + SECTOR]) for at in range(0, len(data), SECTOR)]
    return [piece for piece in pieces if chosen.random() < 0.7]


def test_a_power_cut_at_any_point_loses_no_acknowledged_message(tmp_path):
    chosen = seed()
    path = database(tmp_path)
    durable = {"db": bytearray(path.read_bytes()), "wal": bytearray()}  # as of the last sync of each file
    trace = tmp_path / "trace"
    wrapper = ("strace", "-f", "-y", "-xx", "-s", "10000000", "-e", f"trace={CALLS}", "-o", str(trace))
    ledger = Ledger(lambda: server.connect(), size=1500, chosen=chosen)
    server = Server(tmp_path, wrapper=wrapper)
    with ledger.sending(4):
        time.sleep(scale(5, 20))
    server.signal(9)  # a restart is part of the recording: another process opens the files, and empties the WAL
    server.process.wait()
    server.kill()
    second = tmp_path / "trace2"
    server.wrapper = (*wrapper[:-1], str(second))
    server.start()
    with ledger.sending(4):
        time.sleep(scale(2, 10))
    server.end()

    recorded = [*events(trace, path), *events(second, path)]
    writes = sum(event[0] == "write" for event in recorded)
    syncs = sum(event[0] == "sync" for event in recorded)
    assert syncs > 50
    assert any(event[:2] == ("write", "db") for event in recorded), "there was no checkpoint in this run"

    points = sorted(chosen.sample(range(len(recorded)), min(len(recorded), scale(300, len(recorded)))))
    pending = {"db": [], "wal": []}
    sent, tried = set(), 0
    everything = set(ledger.acknowledged.values()) | set(ledger.unknown)
    for point, event in enumerate(recorded):
        if point in points:
            for variant in ("synced only", "everything", "a torn part"):
                files = {}
                for name, content in durable.items():
                    later = pending[name]
                    if variant == "synced only":
                        later = []
                    elif variant == "a torn part":
                        later = [p for e in later if chosen.random() < 0.7 for p in torn(e, chosen)]
                        chosen.shuffle(later)
                    files[name] = bytearray(content)
                    for late in later:
                        apply(late, files[name])
                check_cut(tmp_path / "cut.db", files, sent, ledger, everything, f"{variant} at {point}")
                tried += 1
        if event[0] == "sent":
            sent.update(int(number) for number in re.findall(rb'^HTTP/1.1 201.*?{"id": (\d+)', event[1], re.S))
        elif event[0] == "sync":
            for late in pending[event[1]]:
                apply(late, durable[event[1]])
            pending[event[1]].clear()
        else:
            pending[event[1]].append(event)
    assert len(sent) > 50
    print(
        f"{tried} cuts at {len(points)} points of {len(recorded)} events ({writes} writes, {syncs} syncs), {len(sent)} answers"
    )


def check_cut(cut, files, sent, ledger, everything, where):
    cut.write_bytes(files["db"])
    wal = cut.with_name("cut.db-wal")
    wal.write_bytes(files["wal"])
    with contextlib.suppress(FileNotFoundError):
        cut.with_name("cut.db-shm").unlink()
    with contextlib.closing(sqlite3.connect(cut)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)], where
        stored = db.execute("SELECT id, key, CAST(body AS BLOB) FROM messages").fetchall()
    by_id = {message_id: body for message_id, _, body in stored}
    gone = sorted(sent - by_id.keys())  # counted first: pytest would print every message of a failing comparison
    assert not gone, f"{where}: answers for {gone[:10]} had been sent, and they are gone"
    changed = [i for i in sent if i in ledger.acknowledged and by_id[i] != ledger.acknowledged[i]]
    assert not changed, f"{where}: {changed[:10]} are not what was sent"
    strangers = [i for i, body in by_id.items() if body not in everything]
    assert not strangers, f"{where}: nobody has sent {strangers[:10]}"
    twice = len(stored) - len(set(by_id.values()))
    assert not twice, f"{where}: {twice} messages are there twice"


def test_the_answer_is_sent_after_the_sync_has_returned(tmp_path):
    """From the trace: between the last write to the WAL before an answer and that answer, a sync has returned."""
    path = database(tmp_path)
    trace = tmp_path / "trace"
    wrapper = ("strace", "-f", "-y", "-xx", "-s", "10000000", "-e", f"trace={CALLS}", "-o", str(trace))
    server = Server(tmp_path, wrapper=wrapper)
    ledger = Ledger(server.connect)
    for _ in range(50):
        ledger.send()
    server.end()
    written = answers = syncs = 0
    for event in events(trace, path):
        if event[:2] == ("write", "wal"):
            written += 1
        elif event == ("sync", "wal"):
            written, syncs = 0, syncs + 1
        elif event[0] == "sent" and event[1].startswith(b"HTTP/1.1 201"):
            assert written == 0, "an answer was sent while the WAL was not synced"
            answers += 1
    assert answers == len(ledger.acknowledged) > 30
    assert syncs >= answers
