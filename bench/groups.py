"""Who is measured, in groups, and which tool each needs besides Python."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import NamedTuple

import install
from servers import BIN, BIND, MESSAGE, PORT, PYTHON, Peer, Rqlite, WordPress, constant, inlet, say, untuned_falcon

SECRET = {"Authorization": "Bearer bench-secret"}  # the experts' token
WORDPRESS = ("wordpress", "php-fpm", "php-mysql", "mariadb-server", "nginx-light")


def flask(name):
    return Peer(name, "BIN/waitress-serve", f"--listen={BIND}", "flask_app:app")


def django(name):
    return Peer(name, "BIN/gunicorn", "-b", BIND, "-w", "2", "--threads", "4", "django_app:application")


def fastapi(name):
    return Peer(name, "BIN/uvicorn", "--port", str(PORT), "--no-access-log", "fastapi_app:app")


def sanic(name):
    return Peer(name, PYTHON, "sanic_app.py")


def fastify(name):
    return Peer(name, install.node(), "fastify_app.js")


def go(name):
    return Peer(name, install.go("go_tutorial"))


def rust(name):
    return Peer(name, install.rust("rust_tutorial"))


def pocketbase(name, *arguments, durable=True):
    return Peer(
        name,
        install.go("pocketbase"),
        *arguments,
        path="/api/collections/messages/records",
        body=json.dumps({"body": json.loads(MESSAGE)}),
        makes_token=True,
        rows_in="DATABASE.pocketbase/data.db",
        durable=durable,
    )


def pocketbase_full(name):
    return pocketbase(name, "full")


def pocketbase_normal(name):
    return pocketbase(name, durable=False)


def rqlite(name):
    return Rqlite(name, install.rqlited())


def datasette(name):
    secret = "bench-secret"
    create_token = [BIN / "datasette", "create-token", "root", "--secret", secret]
    token = subprocess.run(create_token, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    row = {"row": {"received_at": "2026-11-22T10:00:00Z", "client": "default", "body": MESSAGE}}
    command = ("BIN/datasette", "DATABASE", "--port", str(PORT), "--root", "--secret", secret)
    headers = {"Authorization": f"Bearer {token}"}
    return Peer(name, *command, path="/data/messages/-/insert", body=json.dumps(row), headers=headers)


def fastify_shared(name):
    return Peer(name, install.node(), "fastify_shared.js", headers=SECRET)


def go_shared(name):
    return Peer(name, install.go("go_shared"), headers=SECRET)


def rust_shared(name):
    return Peer(name, install.rust("rust_shared"), headers=SECRET)


def granian_rsgi(name):
    options = ("--interface", "rsgi", "--host", "127.0.0.1", "--port", str(PORT), "--workers", "1", "--http", "1")
    return Peer(name, "BIN/granian", *options, "rsgi_shared:application", headers=SECRET)


def inlet_constant(name):
    return constant("inlet", "falcon", name)


def waitress_constant(name):
    return constant("waitress", "wsgi", name)


def wordpress(name):
    install.require_packages(*WORDPRESS)
    return WordPress(name)


class Choice(NamedTuple):
    group: str
    name: str
    make: Callable[[str], Peer]  # compiles it if need be
    tool: str | None = None  # without it the peer is left out

    @property
    def title(self):
        return f"{self.group}: {self.name}"


INLET = "Inlet"
FALCON = "Falcon, untuned"
FASTIFY = "Fastify"
RQLITE = "rqlite, one node"
CONSTANT = "Inlet's server, a constant"
WAITRESS = "waitress, a constant"
CHOICES = (
    Choice("tutorials", "Flask", flask),
    Choice("tutorials", "Django", django),
    Choice("tutorials", "FastAPI", fastapi),
    Choice("tutorials", "Sanic", sanic),
    Choice("tutorials", FALCON, untuned_falcon),
    Choice("tutorials", FASTIFY, fastify, "npm"),
    Choice("tutorials", "Go net/http", go, "go"),
    Choice("tutorials", "Rust axum", rust, "cargo"),
    Choice("products", "PocketBase, FULL", pocketbase_full, "go"),
    Choice("products", "PocketBase as it comes", pocketbase_normal, "go"),
    Choice("products", RQLITE, rqlite, "go"),
    Choice("products", "Datasette", datasette),
    Choice("experts", "granian RSGI", granian_rsgi),
    Choice("experts", "Fastify, shared COMMITs", fastify_shared, "npm"),
    Choice("experts", "Go, shared COMMITs", go_shared, "go"),
    Choice("experts", "Rust, shared COMMITs", rust_shared, "cargo"),
    Choice("constants", CONSTANT, inlet_constant),
    Choice("constants", WAITRESS, waitress_constant),
    Choice("cms", "WordPress", wordpress),
)


def chosen(options):
    """{name: (group, peer)}: Inlet, then those that --peers asks for; without it all but WordPress."""
    found = {INLET: (INLET, inlet())}
    wanted = options.peers or re.compile("^(?!cms)")
    if not any(wanted.search(choice.title) for choice in CHOICES):
        raise SystemExit(f"no peer matches: {', '.join(choice.title for choice in CHOICES)}")
    for python, version in options.python:
        packages = install.packages_for(version)
        name = f"Inlet on Python {version}"
        found[name] = (INLET, inlet(python=python, packages=packages, name=name))
    for choice in CHOICES:
        if not wanted.search(choice.title):
            continue
        if choice.tool and not shutil.which(choice.tool):
            say(f"{choice.name} is left out: {choice.tool} is not here")
            continue
        found[choice.name] = (choice.group, choice.make(choice.name))
    return found
