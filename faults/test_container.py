"""The container: image, compose and Kubernetes files as they stand in deploy/, built and run by podman.

No registry is needed: INLET_BASE names the folder of a Debian with python3 and python3-venv, made by debootstrap, which
becomes the base image. Root, podman, runc, catatonit and podman-compose have to be there.
"""

import base64
import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from deployed import DEPLOY, adapted, free_port

from test_service import HERE, eventually

TOKEN = "a-token-of-thirty-two-characters"
# What it takes to run containers inside of a container: no systemd, and no right to raise limits.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=8192:8192", "nproc=1000:1000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


COMMANDS = (DEPLOY / "README.md").read_text().splitlines()


class Podman:
    """podman with everything that it keeps in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "containers.conf").write_text(CONTAINERS_CONF)
        places = f'graphroot = "{folder}/graph"\nrunroot = "{folder}/run"'
        (folder / "storage.conf").write_text(f'[storage]\ndriver = "overlay"\n{places}\n')
        self.environ = os.environ | {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "BUILDAH_ISOLATION": "chroot",
        }

    def __call__(self, *words, program="podman", status=0, stdin=subprocess.DEVNULL, **options):
        """What a command prints on stdout; it has to end with this status."""
        command = [program, *map(str, words)]
        done = subprocess.run(
            command, env=self.environ, stdin=stdin, capture_output=True, text=True, timeout=120, **options
        )
        assert done.returncode == status, (command, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout.strip()

    def shell(self, command: str, **options):
        """Runs a command of deploy/README.md, which says docker."""
        assert command in COMMANDS
        return self("-c", re.sub(r"\bdocker\b", "podman", command), program="sh", **options)

    def build(self, tag: str, folder: Path = HERE):
        """Builds the image of a folder, with the base image that stands in for python:slim."""
        options = "-q --format docker --network host --build-arg PYTHON=localhost/python -f deploy/Dockerfile -t"
        self("build", *options.split(), tag, ".", cwd=folder)

    def log(self, container: str) -> str:
        done = subprocess.run(["podman", "logs", container], env=self.environ, capture_output=True, text=True)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def podman():
    base = Path(os.environ["INLET_BASE"])
    with tempfile.TemporaryDirectory(dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        podman = Podman(Path(folder))
        without = [f"--exclude=./{name}" for name in ("clone", "corpus", "proc/*")]
        tree = subprocess.Popen(["tar", "-C", base, "--one-file-system", *without, "-c", "."], stdout=subprocess.PIPE)
        podman("import", "-q", "-", "localhost/python", stdin=tree.stdout)
        assert tree.wait() == 0
        podman.build("inlet")
        yield podman
        for words in (["pod", "rm", "-fa"], ["rm", "-fa"], ["image", "rm", "-fa"]):
            podman(*words)


@pytest.fixture
def clean(podman):
    """podman, which has no container and no volume after the test."""
    yield podman
    for words in (["pod", "rm", "-fa"], ["rm", "-fa"], ["volume", "rm", "-fa"]):
        podman(*words)


def request(port, method, path, token=TOKEN, body=None, **headers):
    """(status, answer as JSON)"""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"} | headers
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def is_ready(port):
    with contextlib.suppress(OSError, http.client.HTTPException):
        return request(port, "GET", "/healthz")[0] == 200
    return False


def start(podman, port, image="inlet", *more):
    """A container with a read-only root and no capabilities, on a port of this machine."""
    safe = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    where = ["-p", f"127.0.0.1:{port}:8080", "-v", "messages:/data", "-e", f"INLET_TOKEN={TOKEN}"]
    podman("run", "-d", "--name", "inlet", *safe, *where, *more, image)
    eventually(lambda: is_ready(port))


@contextlib.contextmanager
def senders(port, token=TOKEN):
    """Send keyed messages while the block runs; yields the keys that got a 201."""
    acknowledged, numbers, done = [], itertools.count(), threading.Event()

    def send():
        while not done.is_set():
            number = next(numbers)
            with contextlib.suppress(OSError, http.client.HTTPException):
                key = {"Idempotency-Key": f"k{number}"}
                status, _ = request(port, "POST", "/messages", token, f'{{"n": {number}}}', **key)
                if status == 201:
                    acknowledged.append(f"k{number}")

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        yield acknowledged
    finally:
        done.set()
        for thread in threads:
            thread.join()


def keys_in(port):
    keys, path = [], "/messages?limit=1000"
    while (page := request(port, "GET", path)[1])["messages"]:
        keys += [message["key"] for message in page["messages"]]
        path = page["next"]
    return keys


def test_the_image_has_what_it_needs_and_nothing_else(clean):
    podman = clean
    (image,) = json.loads(podman("inspect", "inlet"))
    config = image["Config"]
    assert (config["User"], config["Volumes"]) == ("10001:10001", {"/data": {}})
    assert image["Healthcheck"]["Test"] == ["CMD", "python", "healthy.py"]
    inside = ["run", "--rm", "--read-only", "inlet"]
    assert podman(*inside, "id", "-u") == "10001"
    podman(*inside, "python", "-c", "import pytest", status=1)
    podman(*inside, "sh", "-c", "touch /srv/inlet/x || exit 7", status=7)
    files = podman(*inside, "find", "/srv/inlet", "-mindepth", "1", "-maxdepth", "1", "-printf", "%f ").split()
    scripts = {"healthy.py", "restore.py", "start.sh"}
    assert {*files} == {".venv", "extras", "requirements.txt", "schema.sql", "service.py"} | scripts
    assert "test_" not in podman(*inside, "ls", "extras")
    assert podman(*inside, "python", "service.py", "--version").startswith("Inlet ")


def test_a_volume_keeps_what_was_acknowledged_through_stops_an_upgrade_and_a_restore(clean, tmp_path):
    podman, port = clean, free_port()
    start(podman, port)
    assert TOKEN not in podman.log("inlet")
    podman("exec", "inlet", "python", "healthy.py")
    other = podman.shell("docker exec inlet python service.py client add NAME").split()[0]
    assert request(port, "POST", "/messages", other, '{"n": -1}')[0] == 201

    with senders(port) as acknowledged:
        eventually(lambda: len(acknowledged) > 300)
        began = time.monotonic()
        podman.shell("docker stop inlet")
    assert time.monotonic() - began < 9  # podman kills after ten seconds
    assert podman("inspect", "inlet", "--format", "{{.State.ExitCode}}") == "0"
    podman("start", "inlet")
    eventually(lambda: is_ready(port))
    assert set(acknowledged) <= set(kept := keys_in(port))
    assert len(kept) == len(set(kept))

    # The same volume with an image that has another schema.
    copy = tmp_path / "inlet"
    shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns(".*", "bench", "faults", "*.db*", "__pycache__"))
    schema = (copy / "schema.sql").read_text()
    body = "body        TEXT NOT NULL CHECK (json_valid(body))"
    assert body in schema.rpartition("CREATE TABLE")[2]
    before, table, after = schema.rpartition(body)
    (copy / "schema.sql").write_text(f"{before}{table},\n    n INTEGER AS (body ->> 'n'){after}")
    podman.build("inlet2", copy)
    (migrate,) = (line for line in COMMANDS if line.endswith("service.py migrate"))
    assert "messages has changed" in podman(*migrate.replace("inlet python", "inlet2 python").split()[1:])
    assert keys_in(port) == kept  # the old container still serves
    podman.shell("docker stop inlet && docker rm inlet")
    start(podman, port, "inlet2")
    assert keys_in(port) == kept
    assert len(request(port, "GET", "/messages?n=-1")[1]["messages"]) == 1

    for volume in ("as it is", "as it is", "new"):
        podman.shell("docker exec inlet python service.py backup --replace /data/copy.db")
        podman.shell("docker cp inlet:/data/copy.db .", cwd=tmp_path)
        assert request(port, "POST", "/messages", body='{"n": -2}')[0] == 201
        podman.shell("docker stop inlet && docker rm inlet")
        if volume == "new":
            podman("volume", "rm", "messages")
        podman.shell(
            "docker run --rm -i -v messages:/data inlet python restore.py - /data/inlet.db <copy.db", cwd=tmp_path
        )
        start(podman, port, "inlet2")
        assert keys_in(port) == kept
    assert request(port, "POST", "/messages", other, '{"n": -3}')[0] == 201


@pytest.mark.parametrize("delay_s", [0, 0.2, 0.4, 0.6])
def test_it_ends_at_once_also_while_it_starts(delay_s, clean):
    podman = clean
    podman("run", "-d", "--name", "inlet", "inlet")
    time.sleep(delay_s)
    began = time.monotonic()
    podman("stop", "inlet")
    assert time.monotonic() - began < 5
    assert podman("inspect", "inlet", "--format", "{{.State.ExitCode}}") in ("0", "143")


def test_it_is_not_served_when_it_cannot_be_migrated(clean):
    podman = clean
    podman("run", "-d", "--name", "inlet", "-e", "INLET_SCHEMA=/nowhere", "inlet")
    assert podman("wait", "inlet") == "2"


@pytest.mark.parametrize("listen", ["unix:/data/inlet.sock", "[::1]:8080", "127.0.0.1:9000"])
def test_its_health_follows_listen(listen, clean):
    podman = clean
    podman("run", "-d", "--name", "inlet", "--read-only", "-e", f"INLET_LISTEN={listen}", "inlet")
    eventually(lambda: "listening" in podman.log("inlet"))
    podman("exec", "inlet", "python", "healthy.py")
    podman("exec", "-e", "INLET_LISTEN=127.0.0.1:9", "inlet", "python", "healthy.py", status=1)
    podman("exec", "inlet", "sh", "-c", "mv /data/inlet.db /data/away; mkdir /data/inlet.db")
    eventually(lambda: unhealthy(podman))


def unhealthy(podman):
    done = subprocess.run(["podman", "exec", "inlet", "python", "healthy.py"], env=podman.environ, capture_output=True)
    return done.returncode == 1


def test_compose(clean, tmp_path):
    podman, port, folder = clean, free_port(), tmp_path / "deploy"
    folder.mkdir()
    limits = ("nofile: 8192", "nofile: 8192\n      nproc: 1000")  # or podman would set one that is not allowed here
    adapted("compose.yaml", folder, ("127.0.0.1:8080:8080", f"127.0.0.1:{port}:8080"), limits)
    (folder / "token").write_text(f"{TOKEN}\n")
    compose = ["-f", "compose.yaml"]
    podman(*compose, "up", "-d", "--no-build", program="podman-compose", cwd=folder)
    eventually(lambda: is_ready(port))
    assert request(port, "POST", "/messages", body="1")[0] == 201
    podman("exec", "inlet", "python", "healthy.py")
    podman(*compose, "down", program="podman-compose", cwd=folder)
    podman(*compose, "up", "-d", "--no-build", program="podman-compose", cwd=folder)
    eventually(lambda: is_ready(port))
    assert len(keys_in(port)) == 1


def test_kubernetes(clean, tmp_path):
    podman, port = clean, free_port()
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "inlet"}}
    secret |= {"data": {"token": base64.b64encode(TOKEN.encode()).decode()}}
    file = adapted(
        "kubernetes.yaml", tmp_path, ("containerPort: 8080", f"containerPort: 8080\n              hostPort: {port}")
    )
    file.write_text(f"{json.dumps(secret)}\n---\n{file.read_text()}")
    podman("kube", "play", file)
    eventually(lambda: is_ready(port))
    token = podman("exec", "inlet-pod-0-inlet", "cat", "/run/secrets/inlet/token")  # podman 4.3 leaves it in base64
    assert token in (TOKEN, secret["data"]["token"])
    assert request(port, "POST", "/messages", token, "1")[0] == 201
    (container,) = json.loads(podman("inspect", "inlet-pod-0-inlet"))
    assert (container["HostConfig"]["ReadonlyRootfs"], container["Config"]["User"]) == (True, "10001:10001")
    place = podman("volume", "inspect", "inlet-messages", "--format", "{{.Mountpoint}}")
    with senders(port, token) as acknowledged:
        eventually(lambda: len(acknowledged) > 100)
        podman("pod", "stop", "inlet-pod-0")
    with contextlib.closing(sqlite3.connect(f"{place}/inlet.db")) as db:
        kept = [key for (key,) in db.execute("SELECT key FROM messages WHERE key NOT NULL")]
    assert set(acknowledged) <= set(kept)
    assert len(kept) == len(set(kept))
    podman("kube", "down", file)
