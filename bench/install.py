"""What the benchmark needs: a virtual environment in bench/.venv, tools of Debian, and the peers that are compiled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent
PEERS = BENCH / "peers"
VENV = BENCH / ".venv"
BUILD = BENCH / ".build"
# Python's SQLite calls fdatasync. The SQLite in a crate, a Go module or an npm package calls fsync unless it is told
# that there is fdatasync, and fsync also writes the times of the file: https://www.sqlite.org/src/doc/trunk/src/os_unix.c
FDATASYNC = "-DHAVE_FDATASYNC=1"


def run(*command, **options):
    subprocess.run([str(word) for word in command], check=True, **options)


def continue_in_venv(*tools):
    """Installs what is missing, and goes on with the Python of bench/.venv."""
    if Path(sys.prefix) == VENV:
        return
    if not (VENV / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", VENV)
    uv = shutil.which("uv")  # which takes seconds where pip can take minutes
    command = [uv, "pip", "install", "--python", VENV / "bin" / "python"] if uv else [VENV / "bin" / "pip", "install"]
    run(*command, "-q", "-r", BENCH / "requirements.txt")
    require_tools(*tools)
    os.execv(VENV / "bin" / "python", [str(VENV / "bin" / "python"), *sys.argv])


def require_tools(*tools):
    """Installs Debian's packages of these names if the commands are missing. Takes root."""
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        require_packages(*missing)


def require_packages(*packages):
    run("apt-get", "update", "-q", stdout=subprocess.DEVNULL)
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ("apt-get", "install", "-y", "-q", "--no-install-recommends")
    run(*command, *packages, stdout=subprocess.DEVNULL, env=environ)


def go(source):
    """Compiles peers/SOURCE.go; what is compiled already takes a second."""
    environ = os.environ | {"CGO_ENABLED": "1", "CGO_CFLAGS": f"-O2 {FDATASYNC}"}
    run("go", "build", "-C", PEERS, "-trimpath", "-o", BUILD / source, f"{source}.go", env=environ)
    return BUILD / source


def rust(binary):
    environ = os.environ | {"LIBSQLITE3_FLAGS": FDATASYNC, "CARGO_TARGET_DIR": str(BUILD / "rust")}
    run("cargo", "build", "--quiet", "--release", "--locked", "--bin", binary, cwd=PEERS, env=environ)
    return BUILD / "rust" / "release" / binary


def node():
    """Installs peers/package.json, and compiles its SQLite. Does nothing if that was done."""
    if not (PEERS / "node_modules" / "better-sqlite3" / "build" / "Release" / "better_sqlite3.node").exists():
        command = ("npm", "install", "--silent", "--no-package-lock", "--build-from-source")
        run(*command, cwd=PEERS, env=os.environ | {"CFLAGS": FDATASYNC})
    return "node"


def rqlited():
    """rqlite as cluster/ has it; RQLITED names one that is there already."""
    if found := os.environ.get("RQLITED"):
        return Path(found)
    command = ("go", "build", "-C", BENCH.parent / "cluster" / "rqlited", "-trimpath", "-o", BUILD / "rqlited")
    run(*command, "github.com/rqlite/rqlite/v8/cmd/rqlited")
    return BUILD / "rqlited"


def everything():
    """Builds all peers: `python3 bench/install.py`, so that run.py need not wait for it."""
    node()
    for source in ("go_tutorial", "go_shared", "pocketbase"):
        go(source)
    for binary in ("rust_tutorial", "rust_shared"):
        rust(binary)


def python_at(path):
    """(path, version) of a Python; ValueError if it is none."""
    show = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        version = subprocess.run([path, "-c", show], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        version = ""
    if not version.startswith("3."):
        raise ValueError
    return path, version


def packages_for(version):
    """The two packages of the service for another version of Python, in a folder to put on its path."""
    folder = BUILD / f"packages-{version}"
    pins = [pin for pin in (BENCH / "requirements.txt").read_text().split() if pin.startswith(("falcon=", "waitress="))]
    command = (sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", folder, "--no-deps")
    run(*command, "--only-binary=:all:", "--python-version", version, *pins)
    return folder


if __name__ == "__main__":
    continue_in_venv()
    everything()
