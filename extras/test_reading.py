"""?since=TIME, and pages as CSV."""

import csv
import io
import json

import service
from test_service import FIELDS, NOW, append, change, client_of, ids, stream_sql, watch


def hourly(store, hours):
    """A store whose clock gives these hours, and messages at them."""
    times = iter(f"2026-11-27T{hour:02}:00:00.000Z" for hour in hours)
    store._clock = lambda: next(times)
    for hour in hours:
        append(store, "messages", f'{{"hour": {hour}}}')


def test_since_begins_where_received_at_reaches_a_time(open_store):
    view = "CREATE VIEW even AS SELECT * FROM messages WHERE body ->> 'hour' % 2 = 0;"
    store = open_store(stream_sql("messages", ", hour INTEGER AS (body ->> 'hour')") + view)
    client = client_of(store)
    assert client.get("/messages?since=2026-11-27").json == {
        "messages": [],
        "next": "/messages?after=0&since=2026-11-27T00%3A00%3A00.000Z",
    }
    hourly(store, [1, 2, 2, 2, 5, 9, 10, 11])
    change(store, "DELETE FROM messages WHERE id IN (1, 5, 8)")
    for since, found in {
        "2026-11-27": [2, 3, 4, 6, 7], "2026-11-27T02:00:00Z": [2, 3, 4, 6, 7], "2026-11-27T02:00:00.001Z": [6, 7],
        "2026-11-27t02:30:00z": [6, 7], "2026-11-27T03:30:00%2B01:00": [6, 7], "2026-11-27T10:00": [7], "2026-11-28": [], "1000-01-01": [2, 3, 4, 6, 7],
    }.items():  # fmt: skip
        page = client.get(f"/messages?since={since}")
        assert ids(page) == found, since
        assert ("since" in page.json["next"]) == (not found)
        assert ids(client.get(page.json["next"])) == []
    assert ids(client.get("/messages?since=2026-11-27T02:00:00Z&after=3&limit=1&hour=9")) == [6]
    assert ids(client.get("/even?since=2026-11-27T02:30:00Z")) == [7]
    assert (
        client.get("/messages?since=2026-11-28").json["next"] == "/messages?after=7&since=2026-11-28T00%3A00%3A00.000Z"
    )
    for bad in (
        "",
        "yesterday",
        "2026-11-27T25:00:00Z",
        "0001-01-01T00:00:00%2B01:00",
        "2026-11-27T00:00:00Z&since=2026",
    ):
        answer = client.get(f"/messages?since={bad}")
        assert (answer.status_code, "since" in answer.json["detail"]) == (400, True), bad


def test_since_reads_few_rows_and_says_when_it_takes_too_long(open_store, monkeypatch):
    slow = "WHERE (WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n) = 1"
    store = open_store(stream_sql("messages") + f"CREATE VIEW slow AS SELECT * FROM messages {slow};")
    hourly(store, list(range(24)) * 20)
    monkeypatch.setattr(service, "READ_TIMEOUT_S", 0.2)
    assert client_of(store).get("/slow?since=2026-11-27").status_code == 503
    ran = watch(monkeypatch)
    client_of(store).get("/messages?since=2026-11-27T12:00:00Z")
    assert 5 < sum("WHERE t.id > ? ORDER BY" in sql or "ifnull(t.received_at" in sql for sql in ran) < 15


def test_since_works_on_a_view_of_few_rows_and_on_any_received_at(open_store, monkeypatch):
    views = "".join(f"CREATE VIEW {name} AS SELECT id, {what} AS received_at, client, key, body FROM messages {where};"
                    for name, what, where in (("rare", "received_at", "WHERE body ->> 'hour' = 23"),
                                              ("nulls", "NULL", ""), ("numbers", "1764000000", "")))  # fmt: skip
    store = open_store(stream_sql("messages") + views + "CREATE VIEW texts AS SELECT id || '' AS id, received_at, client,"
                       " key, body FROM messages;")  # fmt: skip
    hourly(store, list(range(24)))
    client = client_of(store)
    ran = watch(monkeypatch)
    assert ids(client.get("/rare?since=2026-11-27T12:00:00Z")) == [24]
    assert not any("ifnull(t.received_at, '') AS TEXT) FROM \"rare\" AS t WHERE t.id > ? " in sql for sql in ran)
    for view in ("rare", "nulls"):  # what is shown to who may read the view only
        page = client.get(f"/{view}?since=2026-11-27T23:30:00Z&after=3").json
        assert page == {"messages": [], "next": f"/{view}?after=3&since=2026-11-27T23%3A30%3A00.000Z"}
    for view in ("nulls", "numbers", "texts"):
        assert client.get(f"/{view}?since=2026-11-27T12:00:00Z").status_code == 200, view


def test_pages_are_csv_if_asked(open_store):
    report = "CREATE VIEW sums AS SELECT a, sum(\"b c\") AS sum, x'00ff' AS raw, NULL AS none FROM x GROUP BY a;"
    client = client_of(open_store(stream_sql("x", FIELDS) + stream_sql("plain") + report, clock=lambda: NOW))
    for body in ('{"a": "=1+1", "b": 1}', '{"a": "é, \\"q\\"\\n", "list": [1]}'):
        client.post("x", body, Idempotency_Key=f"k{len(body)}")
    client.post("plain", '[1,"a"]')
    answer = client.get("/x", Accept="text/csv")
    assert (answer.headers["Content-Type"], answer.headers["Link"]) == (
        "text/csv; charset=utf-8",
        '</x?after=2>; rel="next"',
    )
    assert answer.headers["Vary"] == "Accept"
    head, *found = csv.reader(io.StringIO(answer.text, newline=""), strict=True)
    assert head == ["id", "received_at", "client", "key", "a", "b c", "raw", "n", "body", "headers"]
    assert [row[:8] for row in found] == [
        ["1", NOW, "tester", "k21", "=1+1", "1.0", "3d312b31", ""],
        ["2", NOW, "tester", "k32", 'é, "q"\n', "", "c3a92c202271220a", "1"],
    ]
    assert json.loads(found[1][8]) == {"a": 'é, "q"\n', "list": [1]}
    assert json.loads(found[1][9])["idempotency-key"] == "k32"
    assert client.get("/plain", Accept="text/csv").text == (
        f'id,received_at,client,key,body\r\n1,{NOW},tester,,"[1,""a""]"\r\n'
    )
    assert client.get("/plain?after=1", Accept="text/csv").text == "id,received_at,client,key,body\r\n"
    sums = client.get("/sums", Accept="text/csv")
    assert sums.text == 'a,sum,raw,none\r\n=1+1,1.0,00ff,\r\n"é, ""q""\n",,00ff,\r\n'
    assert "Link" not in sums.headers
