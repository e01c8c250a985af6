"""What README names to read with: each program follows a stream, twice, and has each message once."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from common import Server, database, sql, wait_until
from deployed import free_port

from test_service import BATCH, HERE, TOKEN, database_of, run, send, stream_sql

RECIPES = HERE / "recipes"
FIRST, THEN = 2500, 300
SCHEMA = stream_sql("readings", ", sensor TEXT AS (body ->> 'sensor'), value REAL AS (body ->> 'value')") + (
    "CREATE VIEW by_sensor AS SELECT sensor, count(*) AS count FROM readings GROUP BY sensor;\n"
)


@pytest.fixture
def server(tmp_path):
    database(tmp_path, SCHEMA)
    server = Server(tmp_path)
    fill(server, 0, FIRST)
    yield server
    assert server.end() == 0


def fill(server, first, count):
    """Posts readings whose value is their number; every 100th has a whole number of 2^53 + 1."""
    for start in range(first, first + count, 1000):
        lines = (
            f'{{"sensor": "s{n % 3}", "value":  {n}.50' + (', "n": 9007199254740993}' if n % 100 == 0 else "}")
            for n in range(start, min(start + 1000, first + count))
        )
        with contextlib.closing(server.connect()) as connection:
            assert send(connection, "POST", "/readings", "\n".join(lines), **BATCH)[0] == 201


def ran(server, folder, *command, **environ):
    """What a program prints; it has to end."""
    environ = os.environ | {"BASE": server.url, "TOKEN": TOKEN, "PYTHONPATH": ""} | environ
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def followed(server, folder, command, wanted):
    """The lines of a program that goes on for ever, until so many have come."""
    environ = os.environ | {"BASE": server.url, "TOKEN": TOKEN}
    with subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(wanted)]
        more = threading.Thread(target=lambda: lines.append(process.stdout.readline()), daemon=True)
        more.start()
        fill(server, 10_000, 1)  # and one that comes while it waits
        more.join(20)
        process.kill()
        assert not more.is_alive()
    return [json.loads(line) for line in lines]


def test_curl_and_jq(server, tmp_path):
    file = tmp_path / "readings.ndjson"
    # Bytes that a crash has cut, and how many there are at the start. The last run begins behind a deep message.
    for cut, count in ((0, FIRST), (1, FIRST + THEN), (30, FIRST + 2 * THEN), (0, FIRST + 3 * THEN + 1)):
        if cut:
            file.write_text(file.read_text()[:-cut])
        environ = os.environ | {"BASE": server.url, "TOKEN": TOKEN}
        with subprocess.Popen(
            ["sh", RECIPES / "follow.sh", "readings"], cwd=tmp_path, env=environ, process_group=0
        ) as sh:
            wait_until(lambda wanted=count: file.is_file() and file.read_text().count("\n") == wanted, "it is stuck")
            fill(server, count, THEN)  # while it waits
            wait_until(lambda wanted=count + THEN: file.read_text().count("\n") == wanted, "it does not follow")
            if cut == 30:  # the last one is nested deeper than jq and many others can read
                assert send(server.connect(), "POST", "/readings", "[" * 500 + "]" * 500)[0] == 201
                wait_until(lambda wanted=count + THEN + 1: file.read_text().count("\n") == wanted, "deep")
            os.killpg(sh.pid, signal.SIGKILL)
        lines = file.read_text().splitlines()[: count + THEN]
        assert [json.loads(line)["id"] for line in lines] == list(range(1, count + THEN + 1))
        assert '"value":  100.50, "n": 9007199254740993}' in lines[100]


@pytest.mark.parametrize("language", ["node", "go"])
def test_a_program_follows(language, server, tmp_path):
    command = ["node", RECIPES / "follow.mjs"]
    if language == "go":
        command = [tmp_path / "follow"]
        subprocess.run(["go", "build", "-o", command[0], RECIPES / "follow.go"], check=True, timeout=120)
    seen = followed(server, tmp_path, [*command, "readings", "0"], FIRST)
    assert [message["id"] for message in seen] == list(range(1, FIRST + 2))
    again = followed(server, tmp_path, [*command, "readings", str(FIRST - 5)], 6)
    assert [message["id"] for message in again] == list(range(FIRST - 4, FIRST + 3))
    if language == "go":
        assert seen[0]["body"]["n"] == 9007199254740993


@pytest.mark.parametrize("language", ["node", "go"])
def test_a_program_sends_each_line_once_though_the_service_is_killed(language, tmp_path):
    database(tmp_path, stream_sql("readings"))
    server = Server(tmp_path, "--listen", f"127.0.0.1:{free_port()}")
    command = ["node", RECIPES / "send.mjs"]
    if language == "go":
        command = [tmp_path / "send"]
        subprocess.run(["go", "build", "-o", command[0], RECIPES / "send.go"], check=True, timeout=120)
    environ = os.environ | {"BASE": server.url, "TOKEN": TOKEN}
    with subprocess.Popen(
        [*command, "readings"], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sender:
        ids = []
        for n in range(300):
            sender.stdin.write(f'{{"n":  {n}}}\n')
            sender.stdin.flush()
            if n % 100 == 50:
                server.kill()
                server.start()
            ids.append(int(sender.stdout.readline()))
        sender.stdin.write("no JSON\n300\n")
        sender.stdin.close()
        ids.append(int(sender.stdout.readline()))
        assert sender.wait(20) == 1
    stored = sql(tmp_path / "inlet.db", "SELECT id, body FROM readings ORDER BY id")
    assert stored == [*((number, f'{{"n":  {n}}}') for n, number in enumerate(ids[:-1])), (ids[-1], "300")]


def test_pandas(server, tmp_path):
    assert (
        send(server.connect(), "POST", "/readings", f'{{"value": {FIRST}.5, "n": {"1" * 5000}, "a": "\\ud800"}}')[0]
        == 201
    )
    rows = list(csv.DictReader(io.StringIO(ran(server, tmp_path, sys.executable, RECIPES / "frame.py", "readings"))))
    assert [int(row["id"]) for row in rows] == list(range(1, FIRST + 2))
    assert [float(row["body.value"]) for row in rows] == [n + 0.5 for n in range(FIRST + 1)]
    assert rows[-1]["body.n"] == "1" * 5000


def test_dlt(server, tmp_path):
    import duckdb

    places = {"DLT_DATA_DIR": str(tmp_path / "dlt")}  # else dlt remembers the pipelines of other runs
    for count in (FIRST, FIRST + THEN, FIRST + THEN):
        ran(server, tmp_path, sys.executable, RECIPES / "dlt_pipeline.py", "readings", **places)
        with contextlib.closing(duckdb.connect(str(tmp_path / "inlet.duckdb"), read_only=True)) as db:
            found = "SELECT count(*), count(DISTINCT id), sum((body ->> 'value')::DOUBLE) FROM feed.readings"
            assert db.execute(found).fetchone() == (count, count, sum(n + 0.5 for n in range(count)))
        if count == FIRST:
            fill(server, FIRST, THEN)


def test_singer(server, tmp_path):
    environ = {
        "TAP": f"{os.environ['INLET_SINGER']}/singer-tap",
        "TARGET": f"{os.environ['INLET_SINGER']}/singer-target",
    }
    for count in (FIRST, FIRST + THEN, FIRST + THEN):
        ran(server, tmp_path, "sh", RECIPES / "singer.sh", **environ)
        lines = (tmp_path / "data" / "readings.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == list(range(1, count + 1))
        if count == FIRST:
            fill(server, FIRST, THEN)
    assert json.loads(json.loads(lines[100])["body"])["n"] == 9007199254740993


def test_duckdb_from_the_file_and_over_http(server, tmp_path):
    for number, count in enumerate((FIRST, FIRST + THEN, FIRST + THEN)):
        copy = tmp_path / f"backup-{number}.db"
        assert run(tmp_path, "backup", str(copy)).returncode == 0
        summed = sum(n + 0.5 for n in range(count))
        out = ran(server, tmp_path, sys.executable, RECIPES / "duckdb_file.py", copy)
        assert out == f"({count}, {count}, {count}, {summed})\n"
        assert ran(server, tmp_path, sys.executable, RECIPES / "duckdb_http.py") == f"({count}, {count}, {count})\n"
        if count == FIRST:
            fill(server, FIRST, THEN)


def test_what_grafana_asks_for(server):
    """The Infinity data source takes this: type JSON, URL …/by_sensor?limit=1000, rows at `rows`."""
    _, headers, data = send(server.connect(), "GET", "/by_sensor?limit=1000")
    assert headers["Content-Type"] == "application/json"
    assert json.loads(data)["rows"][0] == {"sensor": "s0", "count": 834}


def test_the_table_in_readme_names_what_is_there():
    text = (HERE / "README.md").read_text()
    for path in RECIPES.iterdir():
        assert f"recipes/{path.name}" in text, path.name


def test_work_is_shared_and_done_once_though_workers_die(tmp_path):
    """600 jobs, four workers, one of which is killed again and again."""
    lease = (RECIPES / "work.sql").read_text()
    assert "'-60 seconds'" in lease
    database(tmp_path, lease.replace("'-60 seconds'", "'-2 seconds'"))
    server = Server(tmp_path)
    with contextlib.closing(server.connect()) as connection:
        assert send(connection, "POST", "/jobs", "".join(f'{{"n": {n}}}\n' for n in range(600)), **BATCH)[0] == 201
    environ = os.environ | {"BASE": server.url, "TOKEN": TOKEN}

    def worker():
        command = [sys.executable, RECIPES / "worker.py"]
        return subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, cwd=tmp_path)

    workers = [worker() for _ in range(4)]

    def done():
        with database_of(server) as db:
            return db.execute("SELECT count(*), count(DISTINCT job) FROM done").fetchone()

    try:
        deadline, kills = time.monotonic() + 60, 0
        while done() != (600, 600):
            assert time.monotonic() < deadline, done()
            time.sleep(0.3)
            workers[0].kill()
            workers[0].wait()
            workers[0] = worker()
            kills += 1
    finally:
        for each in workers:
            each.kill()
            each.wait()
    with database_of(server) as db:
        claims, most = db.execute("SELECT count(*), max(attempt) FROM claims").fetchone()
        assert db.execute("SELECT count(DISTINCT client) FROM done").fetchone() == (1,)
    print(f"{kills} kills, {claims} claims, at most {most} of one job")
    assert kills > 3
    assert server.end() == 0


def test_a_job_that_is_done_cannot_be_claimed_and_attempts_never_collide(tmp_path):
    database(tmp_path, (RECIPES / "work.sql").read_text())
    server = Server(tmp_path)

    def post(stream, body):
        with contextlib.closing(server.connect()) as connection:
            return send(connection, "POST", f"/{stream}", json.dumps(body))[0]

    assert [post("jobs", 1), post("claims", {"job": 1, "attempt": 1}), post("claims", {"job": 1, "attempt": 2})] == [
        201
    ] * 3
    with database_of(server) as db:  # retention, and the leases are over
        db.execute("DELETE FROM claims WHERE id = 1")
        db.execute("UPDATE claims SET received_at = '2026-01-01T00:00:00.000Z'")
        assert db.execute("SELECT attempt FROM open_jobs").fetchall() == [(3,)]
    assert [post("done", {"job": 1}), post("claims", {"job": 1, "attempt": 3}), post("done", {"job": 1})] == [
        201,
        422,
        409,
    ]
    assert server.end() == 0


@pytest.mark.parametrize("more", ["", stream_sql("refused")])
def test_a_person_can_be_deleted(more, tmp_path):
    """The recipe, while the service runs: nothing of the person is in a file after them."""
    database(tmp_path, SCHEMA + more)
    server = Server(tmp_path)
    for n in range(200):
        body = f'{{"sensor": "{"Jane-Doe-4711" if n % 7 == 0 else "other"}", "value": {n}, "pad": "{"x" * 500}"}}'
        assert send(server.connect(), "POST", "/readings", body, Idempotency_Key=f"k{n}")[0] == 201
    assert "Jane-Doe-4711" in (RECIPES / "delete_a_person.sh").read_text()
    subprocess.run(["sh", RECIPES / "delete_a_person.sh"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    for path in tmp_path.glob("inlet.db*"):
        assert b"Jane-Doe-4711" not in path.read_bytes(), path
    with contextlib.closing(server.connect()) as connection:
        assert send(connection, "POST", "/readings", '{"sensor": "other", "value": 1}')[0] == 201
        page = json.loads(send(connection, "GET", "/readings?limit=1000&fields=1")[2])["messages"]
    assert len(page) == 200 - 29 + 1
    assert {message["fields"]["sensor"] for message in page} == {"other"}
    assert server.end() == 0
