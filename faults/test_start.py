"""Starts beside a service that runs, as a user who may not, and two at once: each works, or ends with one line."""

import contextlib
import http.client
import os
import pwd
import re
import subprocess
import sys
import sysconfig

import pytest
from common import Ledger, Server, database, wait_until

from test_service import DEADLINE_S, HERE, run, send, stream_sql


def ends_with_one_line(done: subprocess.CompletedProcess) -> str:
    """The line."""
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith("inlet: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_second_start_on_a_unix_socket_ends_and_the_first_goes_on(tmp_path):
    database(tmp_path)
    socket = tmp_path / "socket"
    server = Server(tmp_path, "--listen", f"unix:{socket}")
    ask = ["curl", "-sS", "--fail", "--unix-socket", socket, "http://localhost/healthz"]
    for _ in range(2):
        line = ends_with_one_line(run(tmp_path, "--listen", f"unix:{socket}"))
        assert str(socket) in line
        assert b'"ready": true' in subprocess.run(ask, capture_output=True, check=True).stdout
    server.kill()
    assert socket.exists()  # what a killed one leaves behind is in nobody's way
    server.start()
    assert b'"ready": true' in subprocess.run(ask, capture_output=True, check=True).stdout
    assert server.end() == 0


def test_a_second_start_on_a_port_ends_and_the_first_goes_on(tmp_path):
    database(tmp_path)
    server = Server(tmp_path)
    line = ends_with_one_line(run(tmp_path, "--listen", server.address))
    assert server.address in line
    Ledger(server.connect).must_answer(2)
    assert server.end() == 0


@pytest.mark.parametrize(
    ("nobodys", "there"),
    [
        ([], ["inlet.db"]),  # neither the file nor its folder
        (["."], ["inlet.db"]),  # a backup that root has put back
        (["inlet.db"], ["inlet.db"]),  # the WAL can have no place
        ([], []),
        ([".", "inlet.db"], ["inlet.db", "inlet.db-wal"]),  # root has opened it before
    ],
)
def test_a_start_on_a_database_that_it_may_not_write_is_one_line(nobodys, there, tmp_path):
    database(tmp_path)
    user = pwd.getpwnam("nobody")
    if "inlet.db-wal" in there:
        server = Server(tmp_path)
        Ledger(server.connect).must_answer()
        server.kill()
    for entry in tmp_path.glob("inlet.db*"):
        if entry.name not in there:
            entry.unlink()
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    for name in nobodys:
        os.chown(tmp_path / name, user.pw_uid, user.pw_gid)
    settings = {"INLET_DATABASE": str(tmp_path / "inlet.db"), "INLET_SCHEMA": str(tmp_path / "schema.sql")}
    become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    done = subprocess.run(
        [*become, "/usr/bin/python3", HERE / "service.py", "--listen", "127.0.0.1:0"],
        env=os.environ | settings | {"PYTHONPATH": sysconfig.get_path("purelib"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert "inlet.db" in ends_with_one_line(done)


def test_what_root_makes_beside_a_database_belongs_to_the_owner_of_the_database(tmp_path):
    """As after a restore, when root runs a command before the service starts."""
    path, user = database(tmp_path), pwd.getpwnam("nobody")
    (tmp_path / "inlet.db-lock").unlink()
    os.chown(path, user.pw_uid, user.pw_gid)
    command = [sys.executable, HERE / "service.py", "client", "add", "x"]
    settings = {"INLET_DATABASE": str(path), "INLET_SCHEMA": str(tmp_path / "schema.sql")}
    subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, timeout=DEADLINE_S)
    assert {file.stat().st_uid for file in tmp_path.glob("inlet.db*")} == {user.pw_uid}
    assert (tmp_path / "inlet.db-lock").exists()


def test_of_two_first_starts_one_prints_a_token_that_is_valid_for_both(tmp_path):
    for n in range(8):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "schema.sql").write_text(stream_sql("messages"))
        command = [sys.executable, HERE / "service.py", "--listen", "127.0.0.1:0"]
        settings = {"INLET_DATABASE": str(folder / "inlet.db"), "INLET_SCHEMA": str(folder / "schema.sql")}
        outputs = [folder / "a", folder / "b"]
        with contextlib.ExitStack() as stack:
            processes = []
            for output in outputs:
                file = stack.enter_context(open(output, "w"))
                processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | settings))
                stack.callback(processes[-1].kill)
            wait_until(lambda: all("listening on" in output.read_text() for output in outputs), "one did not start")
            addresses = [re.search(r"listening on http://(\S+)", output.read_text())[1] for output in outputs]
            for address in addresses:
                assert ask(address, "GET", "/healthz")[0] == 200  # so it has printed all that it prints
            tokens = [token for output in outputs for token in re.findall(r"(?m)^[\w-]{43}$", output.read_text())]
            assert len(tokens) == 1, f"round {n}"
            for address in addresses:
                assert ask(address, "POST", "/messages", "1", Authorization=f"Bearer {tokens[0]}")[0] == 201
            for process in processes:
                process.terminate()
                assert process.wait(DEADLINE_S) == 0


def ask(address, method, path, body=None, **headers):
    with contextlib.closing(http.client.HTTPConnection(address, timeout=DEADLINE_S)) as connection:
        return send(connection, method, path, body, **headers)
