"""/openapi.json: what a client may use. faults/test_openapi.py checks it with schemathesis."""

import time

import pytest

from test_service import AUTHORIZATION, add_tester, client_of, stream_sql

RULES = """,
    sensor TEXT NOT NULL AS (body ->> 'sensor') CHECK (json_type(body, '$.sensor') = 'text'),
    "Unit" TEXT AS (body->>'$.unit') CHECK ("Unit" IN ('C', 'it''s')),
    value REAL AS (body ->> 'value') NOT NULL CONSTRAINT "a sentence" CHECK (value BETWEEN -90 AND 60.5),
    count INTEGER AS (body ->> 'count') CHECK (count IS NULL OR (json_type(body, '$.count') IN ('integer') AND count >= 0)),
    low REAL AS (body ->> 'low') CHECK (low > -1 AND low < 1),
    name TEXT AS (body ->> 'name') CHECK (length(name) BETWEEN 1 AND 20),
    free TEXT AS (body ->> 'free') CHECK (free = 'a' OR low > 5),
    deep TEXT AS (body ->> '$.a.b'), size INTEGER AS (json_array_length(body)), any ANY AS (body ->> 'any'),
    CHECK (json_type(body) = 'object')"""
SCHEMA = (
    stream_sql("messages")
    + stream_sql("readings", RULES)
    + "CREATE VIEW warm AS SELECT * FROM readings WHERE value > 20;\n"
    "CREATE VIEW counts AS SELECT sensor, count(*) AS n FROM readings GROUP BY sensor;\n"
)


@pytest.fixture
def store(open_store):
    return open_store(SCHEMA)


def test_the_body_is_described_as_far_as_the_table_tells_it(client):
    found = client.get("/openapi.json").json["components"]["schemas"]
    assert found["messages"] == {"properties": {}, "required": []}
    assert found["readings"] == {
        "type": "object",
        "required": ["sensor", "value"],
        "properties": {
            "sensor": {"type": "string"},
            "unit": {"type": ["string", "null"], "enum": ["C", "it's", None]},
            "value": {"type": "number", "minimum": -90, "maximum": 60.5},
            "count": {"type": ["integer", "null"], "minimum": 0, "maximum": 2**63 - 1},
            "low": {"type": ["number", "null"], "exclusiveMinimum": -1, "exclusiveMaximum": 1},
            "name": {"type": ["string", "null"], "maxLength": 20},
            "free": {"type": ["string", "null"]},
        },
    }


def test_a_client_sees_what_it_may_use_and_no_more(client, store):
    def paths(token):
        return client.get("/openapi.json", Authorization=f"Bearer {token}").json["paths"]

    add_tester(store.database.path, "writer", "w", "write:readings")
    add_tester(store.database.path, "reader", "r", "read:counts read:messages")
    mine = client.get("/openapi.json").json
    assert list(mine["paths"]) == [
        *("/", "/healthz", "/livez", "/metrics", "/messages", "/messages/{id}", "/messages/{id}/body"),
        *("/readings", "/readings/{id}", "/readings/{id}/body", "/warm", "/warm/{id}", "/warm/{id}/body", "/counts"),
    ]
    assert {path: list(methods) for path, methods in paths("w").items()} == {
        "/": ["get"],
        "/healthz": ["get"],
        "/livez": ["get"],
        "/readings": ["post"],
    }
    assert list(paths("r")) == [
        "/",
        "/healthz",
        "/livez",
        "/messages",
        "/messages/{id}",
        "/messages/{id}/body",
        "/counts",
    ]
    assert list(paths("r")["/messages"]) == ["get"]
    assert client.simulate_get("/openapi.json").status_code == 401
    names = [parameter["name"] for parameter in mine["paths"]["/readings"]["get"]["parameters"]]
    assert names[:6] == ["after", "limit", "fields", "wait", "since", "sensor"]
    assert [each["name"] for each in mine["paths"]["/counts"]["get"]["parameters"]] == ["limit", "sensor", "n"]
    sent = {path: list(mine["paths"][path]["post"]["requestBody"]["content"]) for path in ("/messages", "/readings")}
    assert [("application/x-www-form-urlencoded" in kinds) for kinds in sent.values()] == [True, False]


def test_every_path_that_is_named_answers_as_it_says(client):
    client.post("readings", '{"sensor": "a", "value": 21}')
    client.post("messages", "1")
    described = client.get("/openapi.json").json
    assert (described["openapi"], described["servers"]) == ("3.1.0", [{"url": "/"}])
    for path, methods in described["paths"].items():
        answer = client.get(path.replace("{id}", "1"))
        assert answer.status_code == 200, path
        kind = answer.headers["Content-Type"].partition(";")[0]
        assert kind in methods["get"]["responses"]["200"]["content"], path
    inside = client.simulate_get("/openapi.json", headers=AUTHORIZATION, extras={"SCRIPT_NAME": "/a b"})
    assert inside.json["servers"] == [{"url": "/a%20b"}]


def test_without_fields_or_with_an_answer(open_store):
    store = open_store(stream_sql("x", ", answer TEXT AS (body ->> 'a')"))
    assert "200" in client_of(store).get("/openapi.json").json["paths"]["/x"]["post"]["responses"]


@pytest.mark.parametrize("check", [
    "n <= 1e5", "n <= 10 * 100", "n < 0x100", "n <= 1.5e3", "n <= 100 - m", "(n > 100) = 0", "n > 1 OR m > 1", "abs(n) < 5",
    "-n < 5", "m + n < 5", "length(t) <= 10 * 10", "t IN ('a') = 0", "t IN ('a', 'b') COLLATE NOCASE", "NOT n > 5",
])  # fmt: skip
def test_a_rule_that_is_not_simple_says_nothing(check, open_store):
    columns = ", n REAL AS (body ->> 'n'), m REAL AS (body ->> 'm'), t TEXT AS (body ->> 't')"
    client = client_of(open_store(stream_sql("x", f"{columns}, CHECK ({check})")))
    members = client.get("/openapi.json").json["components"]["schemas"]["x"]["properties"]
    assert members == {
        "n": {"type": ["number", "null"]},
        "m": {"type": ["number", "null"]},
        "t": {"type": ["string", "null"]},
    }


def test_numbers_as_sql_writes_them_and_names_that_are_used_here(open_store):
    rule = ", n INTEGER AS (body ->> 'n') CHECK (n BETWEEN 001 AND 999)"
    store = open_store(stream_sql("problem", rule) + stream_sql("a") + stream_sql("body_of_a"))
    described = client_of(store).get("/openapi.json").json
    schema = described["components"]["schemas"]["problem"]["properties"]["n"]
    assert (schema["minimum"], schema["maximum"]) == (1, 999)
    names = [each["operationId"] for methods in described["paths"].values() for each in methods.values()]
    assert len(set(names)) == len(names)


def test_many_columns_take_no_time(open_store):
    columns = "".join(f", c{n} TEXT AS (body ->> 'c{n}') CHECK (length(c{n}) <= 20)" for n in range(400))
    store, started = open_store(stream_sql("x", columns)), time.process_time()
    client_of(store)
    assert time.process_time() - started < 1.5
