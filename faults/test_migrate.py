"""A migration of 1,000,000 messages: whole, and killed on the way."""

import contextlib
import hashlib
import io
import sqlite3
import subprocess
import sys
import tarfile
import time

import pytest
from common import database

from test_service import HERE, MESSAGE_COLUMNS, Process, send

MESSAGES = 1_000_000
INDEX = "CREATE UNIQUE INDEX readings_key ON readings (client, key) WHERE key IS NOT NULL;\n"
OLD = (
    f"CREATE TABLE readings ({MESSAGE_COLUMNS}, sensor TEXT AS (body ->> 'sensor'),"
    + " n INTEGER AS (body ->> 'n')) STRICT;\n"
    + INDEX
)
NEW = (
    f"""CREATE TABLE readings ({MESSAGE_COLUMNS}, sensor TEXT AS (body ->> 'sensor'), value REAL AS (body ->> 'value')
        CONSTRAINT "value must be positive" CHECK (value > 0)) STRICT;\n"""
    + INDEX
    + "CREATE INDEX readings_value ON readings (value);\n"
)


def fingerprint(db, columns="id, received_at, client, key, body"):
    """A digest of every row of the message columns, in the order of the ids."""
    digest = hashlib.sha256()
    for row in db.execute(f"SELECT {columns} FROM readings ORDER BY id"):
        digest.update(repr(row).encode())
    return digest.hexdigest()


def test_a_million_messages_come_through_a_migration_and_a_killed_one_changes_nothing(tmp_path):
    path, old, new = database(tmp_path, OLD), tmp_path / "schema.sql", tmp_path / "new.sql"
    new.write_text(NEW)
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(
        f"WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {MESSAGES})"
        " INSERT INTO readings (id, received_at, client, key, body)"
        " SELECT 3 * n, '2026-11-22T10:00:00.123Z', 'c' || (n % 7), CASE WHEN n % 2 THEN 'k' || n END,"
        """ '{"sensor":"s' || (n % 100) || '", "value": ' || n || '.50, "n": ' || n || '}' FROM c"""
    )
    before = fingerprint(db)
    db.close()
    command = [sys.executable, str(HERE / "service.py"), "migrate", "--database", str(path), "--schema", str(new)]

    killed = 0
    for delay in (0.3, 0.8, 1.5, 2.2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert fingerprint(db) == before
            if "n INTEGER" not in db.execute("SELECT sql FROM sqlite_schema WHERE name = 'readings'").fetchone()[0]:
                break  # killed behind its COMMIT
        with contextlib.closing(Process(tmp_path, "--schema", str(old))) as server:
            assert send(server.connect(), "GET", "/readings/3")[0] == 200
        killed += 1
    assert killed >= 2

    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{MESSAGES:,} messages migrated in {time.monotonic() - started:.1f} s; {killed} migrations killed before")
    assert (done.returncode, done.stderr) == (0, "")
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert fingerprint(db) == before
        assert db.execute("SELECT count(*), sum(value) FROM readings").fetchone() == (
            MESSAGES,
            MESSAGES * (MESSAGES + 1) / 2 + MESSAGES / 2,
        )
        assert [row[1] for row in db.execute("PRAGMA table_xinfo(readings)")][-2:] == ["sensor", "value"]
        assert "readings_value" in [row[1] for row in db.execute("PRAGMA index_list(readings)")]
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with contextlib.closing(Process(tmp_path, "--schema", str(new))) as server:
        status, headers, _ = send(server.connect(), "POST", "/readings", '{"sensor": "x", "value": 1}')
        assert (status, headers["Location"]) == (201, f"/readings/{3 * MESSAGES + 1}")
        assert send(server.connect(), "POST", "/readings", '{"sensor": "x", "value": -1}')[0] == 422


# The last one of 1.0; of 1.1, the last one without headers, views and signatures, and the last in which all was one file.
@pytest.mark.parametrize("commit", ["e5c88f3~1", "e7bf191", "38f8910"])
def test_a_database_of_an_older_version_is_served_with_every_message_key_and_token(commit, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    archive = subprocess.run(["git", "-C", HERE, "archive", commit], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(old, filter="data")
    new.mkdir()
    (new / "schema.sql").write_text((HERE / "schema.sql").read_text())

    def ask(process, method, path, body=None, **headers):
        with contextlib.closing(process.connect()) as connection:
            status, _, data = send(connection, method, path, body, Authorization=f"Bearer {token}", **headers)
        return status, data

    class Old(Process):
        program = (str(old / "service.py"),)

    with contextlib.closing(Old(old)) as process:
        token = process.printed(4).split()[-1]  # the first start tells it
        sent = [(str(n), f"key-{n}") for n in range(20)]
        answers = [ask(process, "POST", "/messages", body, Idempotency_Key=key) for body, key in sent]
        page = ask(process, "GET", "/messages")
    (old / "inlet.db").rename(new / "inlet.db")
    with contextlib.closing(Process(new, "--schema", str(new / "schema.sql"))) as process:
        assert [ask(process, "POST", "/messages", body, Idempotency_Key=key) for body, key in sent] == answers
        assert ask(process, "GET", "/messages") == page
        assert ask(process, "POST", "/messages", "1")[1].startswith(b'{"id": 21,')
