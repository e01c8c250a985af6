"""/openapi.json, by the tools of others: a validator, a generator of clients, and schemathesis against a real server."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import Server, database
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from test_service import TOKEN, readme, send, stream_sql

BIN = Path(sys.executable).parent
SCHEMA = (
    stream_sql("messages")
    + stream_sql("notes", """, headers TEXT,
        note TEXT NOT NULL AS (body ->> 'note') CHECK (json_type(body, '$.note') = 'text'),
        kind TEXT AS (body ->> 'kind')
            CHECK (kind IS NULL OR (json_type(body, '$.kind') = 'text' AND kind IN ('a', 'b')))""")
    + "".join(readme("sql")[:1]).replace("AS (body ->> 'sensor') REFERENCES sensors (name)",
        "AS (body ->> 'sensor') CHECK (json_type(body, '$.sensor') = 'text')")
    + """CREATE VIEW warm AS SELECT * FROM readings WHERE value > 20;
    CREATE VIEW by_sensor AS SELECT sensor, count(*) AS n, max(id) AS id FROM readings GROUP BY sensor;
    CREATE VIEW notes_by_kind AS SELECT kind, count(*) AS n FROM notes GROUP BY kind;\n"""
)  # fmt: skip


@pytest.fixture
def server(tmp_path):
    database(tmp_path, SCHEMA)
    server = Server(tmp_path)
    yield server
    assert server.end() == 0
    assert "Traceback" not in server.log


@pytest.fixture
def described(server):
    return json.loads(send(server.connect(), "GET", "/openapi.json")[2])


def test_it_is_valid(described):
    validate(described, cls=OpenAPIV31SpecValidator)
    assert described["components"]["schemas"]["readings"]["required"] == ["sensor", "value"]


def test_schemathesis_finds_nothing(server, tmp_path):
    seed = os.environ.get("INLET_SEED", str(os.getpid()))
    command = [
        BIN / "st",
        "run",
        f"{server.url}/openapi.json",
        "-H",
        f"Authorization: Bearer {TOKEN}",
        "--workers",
        "2",
    ]
    options = ["--max-examples", "25", "--seed", seed, "--continue-on-failure", "--no-color", "--warnings", "off"]
    environ = os.environ | {"SCHEMATHESIS_HOOKS": "openapi_hooks", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    print(done.stdout.rstrip().splitlines()[-1], f"seed {seed}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed, \d+ skipped", done.stdout)[1]) > 1000
    assert server.process.poll() is None


def test_a_client_that_is_made_from_it_sends_and_reads(server, described, tmp_path, monkeypatch):
    (tmp_path / "openapi.json").write_text(json.dumps(described))
    command = [BIN / "openapi-python-client", "generate", "--path", "openapi.json", "--meta", "none"]
    command += ["--output-path", "made_client"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (tmp_path / "made_client" / "client.py").is_file(), done.stdout + done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    made = importlib.import_module("made_client")
    send_one, read = (
        importlib.import_module(f"made_client.api.default.{name}") for name in ("send_readings", "read_readings")
    )
    reading = importlib.import_module("made_client.models").Readings(sensor="a-17", value=21.5)
    client = made.AuthenticatedClient(server.url, TOKEN)
    with client:
        stored = send_one.sync_detailed(client=client, body=reading, idempotency_key="k")
        assert (stored.status_code, stored.parsed.id) == (201, 1)
        assert send_one.sync_detailed(client=client, body=reading, idempotency_key="k").parsed.id == 1
        page = read.sync(client=client, sensor="a-17", limit=10)
        assert [(message.id, message.body.value) for message in page.messages] == [(1, 21.5)]
        assert page.next_ == "/readings?after=1&limit=10&sensor=a-17"
        refused = importlib.import_module("made_client.models").Readings(sensor="a-17", value=99)
        assert send_one.sync_detailed(client=client, body=refused).parsed.detail == "value must be between -90 and 60"
