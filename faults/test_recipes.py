"""What README and deploy/README.md tell people to do with several processes and with files, done for real."""

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from common import Ledger, Server, database, seed, sql, wait_until
from deployed import BIN, free_port, nginx, running

from test_service import AUTHORIZATION, DEADLINE_S, HERE, TOKEN, copied, run, send


def test_two_processes_behind_one_nginx_restart_without_a_gap(tmp_path):
    """And nothing is stored twice, for each message has a key and is sent again when its answer does not come."""
    path = database(tmp_path)
    first, second = (Server(tmp_path, "--listen", f"127.0.0.1:{free_port()}") for _ in range(2))
    upstream = f"{first.address}; server {second.address}"
    stored, stop = [], threading.Event()
    with nginx(tmp_path, upstream) as address:

        def load(number):
            for n in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
                for _ in range(200):
                    connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S)
                    with contextlib.closing(connection):
                        status = send(connection, "POST", "/messages", str(n), Idempotency_Key=f"{number}-{n}")[0]
                    if status < 500:
                        break
                    time.sleep(0.1)
                stored.append((status, number, n))

        threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for process in (first, second):
            before = len(stored)
            while len(stored) < before + 200:
                stop.wait(0.05)
            assert process.end() == 0
            process.start()
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _, _ in stored} == {201}
    assert copied(path) == list(range(1, len(stored) + 1))
    for process in (first, second):
        assert process.end() == 0


def test_a_backup_is_restored_as_readme_says(tmp_path):
    path = database(tmp_path)
    with contextlib.closing(Server(tmp_path)) as server:
        for n in range(3):
            with contextlib.closing(server.connect()) as connection:
                send(connection, "POST", "/messages", str(n), Idempotency_Key=str(n))
        assert run(tmp_path, "backup", str(tmp_path / "copy.db")).returncode == 0
        with contextlib.closing(server.connect()) as connection:
            send(connection, "POST", "/messages", "3")
        server.kill()
        restore = command_with("restore.py copy.db").replace("deploy/", f"{HERE}/deploy/")
        path.chmod(0o640)
        subprocess.run(["sh", "-ec", restore], cwd=tmp_path, check=True, timeout=DEADLINE_S)
        assert path.stat().st_mode & 0o777 == 0o640
        (before,) = tmp_path.glob("inlet.db.before-*")
        assert sql(before / "inlet.db", "SELECT count(*) FROM messages") == [(4,)]
        for file in [*before.iterdir(), *tmp_path.glob("inlet.db*")]:  # a new disk, where nothing is
            if file.is_file():
                file.unlink()
        before.rmdir()
        subprocess.run(["sh", "-ec", restore], cwd=tmp_path, check=True, timeout=DEADLINE_S)
        assert path.stat().st_mode & 0o777 == 0o600
        server.start()
        request = urllib.request.Request(f"{server.url}/messages", headers=AUTHORIZATION)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            assert [message["id"] for message in json.load(answer)["messages"]] == [1, 2, 3]
        with contextlib.closing(server.connect()) as connection:
            assert send(connection, "POST", "/messages", "2", Idempotency_Key="2")[1]["Idempotent-Replayed"] == "true"


@pytest.mark.parametrize("kind", ["missing", "empty", "cut off", "a byte cut off", "another", "with a hole"])
def test_what_is_no_whole_backup_is_not_restored(kind, tmp_path):
    copy, path = tmp_path / "copy.db", database(tmp_path)
    if kind != "missing":
        assert run(tmp_path, "backup", str(copy)).returncode == 0
        whole = copy.read_bytes()
        contents = {"empty": b"", "cut off": whole[:8192], "a byte cut off": whole[:-1], "another": b"x" * 50_000}
        copy.write_bytes(contents.get(kind, whole[:-4096] + bytes(4096)))
    before = path.read_bytes()
    done = subprocess.run(["python3", HERE / "deploy/restore.py", copy, path], capture_output=True, timeout=DEADLINE_S)
    assert done.returncode > 0
    assert path.read_bytes() == before
    assert not [*tmp_path.glob("inlet.db.*"), *tmp_path.glob(".restore*")]


def test_a_restore_by_root_follows_no_link(tmp_path):
    """That the owner of the folder has put in its way."""
    copy, path = tmp_path / "copy.db", database(tmp_path)
    assert run(tmp_path, "backup", str(copy)).returncode == 0
    real = path.rename(tmp_path / "real.db")
    path.symlink_to(real)
    command = ["python3", HERE / "deploy/restore.py", copy, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, "is a link" in done.stderr) == (1, True)
    assert path.is_symlink()


OPERATING = (HERE / "deploy" / "README.md").read_text()


def command_with(words: str) -> str:
    """The one line of the commands in deploy/README.md that has these words in it."""
    blocks = re.findall("```sh\n(.*?)```", OPERATING, re.DOTALL)
    (line,) = (line for block in blocks for line in block.splitlines() if words in line)
    return line


def test_the_first_hour(tmp_path):
    """The commands of README as they stand there, with their answers. A number stands for any, and … for anything."""
    text = (HERE / "README.md").read_text()
    section = text[text.index("## The first hour") : text.index("## The schema is the API")]
    table, transcript = re.findall(r"^```\w*\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    for name in ("service.py", "extras", "schema.sql"):
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copy
        copy(HERE / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    with (tmp_path / "schema.sql").open("a") as file:
        file.write(table)
    server = Server(
        tmp_path, "--schema", str(tmp_path / "schema.sql"), "--listen", f"127.0.0.1:{free_port()}", INLET_TOKEN=TOKEN
    )
    setting, *steps = re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]
    asked = 0
    with subprocess.Popen(["bash"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:

        def done(command):
            shell.stdin.write(f"{command}\necho; echo --done\n")
            shell.stdin.flush()
            return "".join(iter(shell.stdout.readline, "--done\n")).strip()

        done(setting.replace("127.0.0.1:8080", server.address).replace("hMlptk…", TOKEN))
        for step in steps:
            command, _, answer = step.partition("\n")
            found = done(command)
            pattern = re.sub(r"\d+", r"\\d+", re.escape(answer.strip())).replace("…", ".*")
            assert re.fullmatch(pattern, found), (command, found)
            asked += bool(answer)
            if "migrate" in command:
                server.signal(signal.SIGTERM)
                assert server.end() == 0
                server.start()
        shell.stdin.close()
    assert asked >= 5
    assert server.end() == 0


def test_a_copy_for_datasette_has_no_client_and_no_secret_in_any_byte(tmp_path):
    """The line as it stands there, with Datasette itself in place of uvx."""
    path = database(tmp_path)
    assert run(tmp_path, "client", "add", "shop", "--signs", "github").returncode == 0
    sql(  # more of them, so that whole pages are free afterwards
        path,
        "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 99) INSERT INTO clients"
        " SELECT 'shop' || n, hex(randomblob(32)), 'write', 't', 'github', hex(randomblob(16)) FROM n",
    )
    secrets = [secret for (secret,) in sql(path, "SELECT secret FROM clients WHERE secret IS NOT NULL")]
    digests = [digest for (digest,) in sql(path, "SELECT token FROM clients")]
    sql(path, "INSERT INTO messages (received_at, client, body) VALUES ('t', 'x', '\"seen\"')")
    server = Server(tmp_path)
    line, uvx, _ = command_with("uvx datasette").partition(" && uvx datasette copy.db")
    assert uvx
    # Debian's sqlite3 overwrites what it deletes; that of others does not.
    other, command = tmp_path / "sqlite3", shutil.which("sqlite3")
    other.write_text(f'#!/bin/sh\nexec {command} -cmd "PRAGMA secure_delete = OFF" "$@"\n')
    other.chmod(0o755)
    environ = os.environ | {"INLET_DATABASE": str(path), "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"}
    line = line.replace(".venv/bin/python service.py", f"{sys.executable} {HERE}/service.py")
    subprocess.run(["bash", "-ec", line], cwd=tmp_path, env=environ, check=True)
    assert len(secrets) == 100
    assert secrets[0].encode() in path.read_bytes() + Path(f"{path}-wal").read_bytes()
    copies = list(tmp_path.glob("copy.db*"))
    held = b"".join(file.read_bytes() for file in copies)
    assert b"seen" in held
    assert not [text for text in (*secrets, *digests) if text.encode() in held]
    assert "clients" not in [name for (name,) in sql(tmp_path / "copy.db", "SELECT name FROM sqlite_schema")]
    port = free_port()
    with running([BIN / "datasette", "copy.db", "--port", str(port)], tmp_path, port, path="/-/versions.json"):

        def get(page):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=DEADLINE_S) as answer:
                return answer.read()

        tables = [table["name"] for table in json.loads(get("/copy.json"))["tables"]]
        assert "messages" in tables
        assert "clients" not in tables
        assert b"seen" in get("/copy/messages.json")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("/copy/clients.json")
    assert server.end() == 0


def test_VACUUM_under_flock_beside_the_service_loses_nothing_and_shrinks_the_file(tmp_path):
    """The command as it stands there, three times, while messages come in."""
    (command,) = set(re.findall("`(flock inlet.db-lock sqlite3 inlet.db VACUUM)`", OPERATING))
    path = database(tmp_path)
    sql(
        path,
        "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 20000) INSERT INTO messages"
        " (received_at, client, body) SELECT 't', 'x', json_quote(printf('%0900d', n)) FROM n",
        "DELETE FROM messages",
    )
    server = Server(tmp_path)
    ledger = Ledger(server.connect, chosen=seed(), first=20_001)
    ledger.must_answer()
    before = path.stat().st_size
    with ledger.sending(6):
        for _ in range(3):
            acknowledged = len(ledger.acknowledged)
            done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            wait_until(lambda a=acknowledged: len(ledger.acknowledged) > a + 100, "messages do not go on")
    assert set(ledger.statuses) <= {201, 422}
    assert server.end() == 0
    after = path.stat().st_size
    print(f"{before} bytes, and then {after}, longest gap {ledger.longest_gap():.2f} s")
    assert before > 18_000_000
    assert after < 5_000_000
    assert ledger.check(path) == len(ledger.acknowledged)
    assert min(ledger.acknowledged) == 20_001  # no id was used again
