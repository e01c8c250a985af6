"""Lenient batches, the column `answer` and the stream `refused`."""

import concurrent.futures
import json
import time
from datetime import UTC, datetime, timedelta

import service
from test_service import BATCH, TOKEN, change, client_of, recipe, rows, stream_sql

# The column `answer`, lenient batches, and what is refused

ANSWERED = stream_sql(
    "hooks",
    """, event TEXT AS (body ->> 'event'),
    answer TEXT AS (CASE event WHEN 'challenge' THEN body ->> 'challenge' WHEN 'json' THEN json_object('id', body -> 'n')
        WHEN 'overflow' THEN abs(body ->> 'n') END)""",
)
LENIENT = BATCH | {"Prefer": "respond-async, handling=lenient"}
STRICT_RULES = """, n INTEGER NOT NULL AS (body ->> 'n') CONSTRAINT "n must be below 100" CHECK (n < 100)"""
REFUSED = stream_sql("strict", STRICT_RULES) + stream_sql("refused", ", sender TEXT AS (body ->> 'stream')")


def test_a_generated_column_answer_is_what_the_client_gets(open_store):
    store = open_store(ANSWERED)
    client = client_of(store)
    for body, content, kind in (
        ('{"event": "challenge", "challenge": "3eZ é"}', "3eZ é", "text/plain; charset=utf-8"),
        ('{"event": "challenge", "challenge": ""}', "", "text/plain; charset=utf-8"),
        (r'{"event": "challenge", "challenge": "{[\"a\"]:1}"}', '{["a"]:1}', "text/plain; charset=utf-8"),
        ('{"event": "json", "n": 12}', '{"id":12}', "application/json"),
    ):
        for replayed in (None, "true"):
            answer = client.post("hooks", body, Idempotency_Key=service.digest_of(body))
            assert (answer.status_code, answer.text, answer.headers["Content-Type"]) == (200, content, kind)
            assert answer.headers.get("Idempotent-Replayed") == replayed
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert store.statistics.answers == {("hooks", 201): 8, ("hooks", 503): 0}  # as the server counts what it stores
    other = client.post("hooks", '{"event": "push"}')
    assert (other.status_code, other.json["id"]) == (201, 5)
    batch = client.post("hooks", '{"event": "challenge", "challenge": "x"}', **BATCH)
    assert (batch.status_code, batch.json["count"]) == (201, 1)
    # What cannot be computed is refused, as every generated column, and what is no text is sent as it is.
    poison = client.post("hooks", json.dumps({"event": "overflow", "n": -(2**63)}))
    assert poison.status_code == 422
    broken = client.post("hooks", r'{"event": "challenge", "challenge": "\ud800"}')
    assert (broken.status_code, broken.content.decode()) == (200, "\N{REPLACEMENT CHARACTER}" * 3)


def test_a_stored_column_answer_is_only_a_column(open_store):
    client = client_of(open_store(stream_sql("messages", ", answer TEXT DEFAULT 'x'")))
    assert client.post("messages", "1").status_code == 201


def test_a_lenient_batch_stores_every_line_that_is_right(open_store):
    store = open_store(REFUSED.partition("CREATE TABLE IF NOT EXISTS refused")[0])
    client = client_of(store)
    body = b'{"n": 1}\n{"n": 100}\n\nnonsense\n{"n": 2}\n{"n": "\xff"}\n{"a": 3}\n{"n": 4}'
    answer = client.post("strict", body, **LENIENT)
    assert (answer.status_code, answer.headers["Preference-Applied"]) == (201, "handling=lenient")
    assert [answer.json[name] for name in ("count", "first_id", "last_id")] == [3, 1, 3]
    assert [(each["line"], each["status"]) for each in answer.json["refused"]] == [
        (2, 422),
        (4, 400),
        (6, 400),
        (7, 422),
    ]
    assert "n must be below 100" in answer.json["refused"][0]["detail"]
    assert "not UTF-8" in answer.json["refused"][2]["detail"]
    assert rows(store, "SELECT body FROM strict") == [('{"n": 1}',), ('{"n": 2}',), ('{"n": 4}',)]
    for body, count in (("[", 0), ('{"n": 100}', 0), ('{"n": 5}', 1)):
        answer = client.post("strict", body, **LENIENT)
        assert (answer.status_code, answer.json["count"], len(answer.json["refused"])) == (201, count, 1 - count)
        assert (answer.json["first_id"] is None) == (not count)
    many = client.post("strict", "[\n" * 300, **LENIENT).json["refused"]
    assert (len(many), many[-1]["line"]) == (100, 100)
    assert client.post("strict", "\n", **LENIENT).status_code == 400
    assert client.post("strict", '{"n": 100}', **BATCH, Prefer="handling=strict").status_code == 422


def test_a_key_makes_each_line_of_a_lenient_batch_once(open_store):
    store = open_store(REFUSED)
    client = client_of(store)
    body = '{"n": 100}\n{"n": 1}\n[\n{"n": 2}'
    first, second = (client.post("strict", body, Idempotency_Key="k", **LENIENT) for _ in range(2))
    assert (first.status_code, first.json) == (second.status_code, second.json)
    assert (first.json["count"], [each["line"] for each in first.json["refused"]]) == (2, [1, 3])
    assert (first.headers.get("Idempotent-Replayed"), second.headers["Idempotent-Replayed"]) == (None, "true")
    # Lines that were refused are mended, also one that was no JSON, and others are added. Their neighbours keep their keys.
    lines = ['{"n": 99}', '{"n": 1}', '{"n": 44}', '{"n": 2}', '{"n": 3}']
    mended = client.post("strict", "\n".join(lines), Idempotency_Key="k", **LENIENT)
    assert (mended.json["count"], mended.json["refused"]) == (5, [])
    wanted = [(1,), (2,), (3,), (44,), (99,)]
    assert sorted(rows(store, "SELECT n FROM strict")) == wanted
    # A batch in which a line that was stored stands elsewhere is another one.
    other = client.post("strict", "\n".join(lines[1:]), Idempotency_Key="k", **LENIENT)
    assert (other.status_code, "another body" in other.json["detail"]) == (422, True)
    assert sorted(rows(store, "SELECT n FROM strict")) == wanted
    good = '{"n": 6}\n{"n": 7}'
    for replayed in (None, "true"):  # all of it
        answer = client.post("strict", good, Idempotency_Key="good", **LENIENT)
        assert (answer.json["count"], answer.json["refused"]) == (2, [])
        assert answer.headers.get("Idempotent-Replayed") == replayed
    strict = client.post("strict", good, Idempotency_Key="good", **BATCH)
    assert strict.headers["Idempotent-Replayed"] == "true"
    single = client.post("strict", '{"n": 8}', Idempotency_Key="one")
    again = client.post("strict", '{"n": 8}\n{"n": 9}', Idempotency_Key="one", **LENIENT)
    assert (again.json["first_id"], again.json["count"]) == (single.json["id"], 2)


def test_what_was_stored_of_a_lenient_batch_is_never_answered_with_4xx(open_store):
    """Also where its key was used with other bodies, and that shows after the first portion."""
    store = open_store(REFUSED)
    client, key = client_of(store), {"Idempotency_Key": "k"}
    first = "\n" * 500 + "\n".join(f'{{"n": -{n}}}' for n in range(501, 601))
    assert client.post("strict", first, **key, **LENIENT).json["count"] == 100
    answer = client.post("strict", "\n".join(['{"n": 1}'] * 650), **key, **LENIENT)
    assert (answer.status_code, answer.json["count"]) == (201, 550)
    refused = answer.json["refused"]
    assert ([each["line"] for each in refused], {each["status"] for each in refused}) == ([*range(501, 601)], {422})
    assert rows(store, "SELECT count(*) FROM strict WHERE n = 1") == [(550,)]


def test_a_large_lenient_batch_comes_in_portions(open_store):
    """So that single messages come in between."""
    store = open_store(REFUSED)
    client = client_of(store)
    lines = "\n".join('{"n": 1}' if n % 100 else '{"n": 100}' for n in range(2600))
    first = client.post("strict", lines, Idempotency_Key="k", **LENIENT).json
    assert (first["count"], len(first["refused"])) == (2574, 26)
    assert (first["refused"][0]["line"], first["refused"][-1]["line"]) == (1, 2501)
    assert sum(store.statistics.commit_s.counts) >= 6
    second = client.post("strict", lines, Idempotency_Key="k", **LENIENT)
    assert (second.json, second.headers["Idempotent-Replayed"]) == (first, "true")
    assert rows(store, "SELECT count(*), count(DISTINCT key) FROM strict") == [(2574, 2574)]
    assert rows(store, "SELECT count(*) FROM refused") == [(52,)]


def test_a_lenient_batch_that_is_sent_again_reads_each_line_once(open_store):
    store = open_store(stream_sql("messages"))
    client = client_of(store)
    lines = "\n".join(map(str, range(1200)))
    answers = [client.post("messages", lines, Idempotency_Key="k", **LENIENT) for _ in range(2)]
    assert [answer.json["count"] for answer in answers] == [1200, 1200]
    assert answers[1].headers["Idempotent-Replayed"] == "true"
    portion = service.Entry(
        store.schema.streams["messages"], "tester", "k", ["500", "501"], lines=[501, 502], refused=[]
    )
    (found,) = store.database.fetch(service.connect(store.database.path, "ro", 1), [service.stored_under_key(portion)])
    assert [body for *_, body in found] == ["0", "500", "501"]  # and who has the key itself


def test_a_lenient_line_that_is_not_utf_8_has_its_column(open_store):
    answer = client_of(open_store(stream_sql("messages"))).post("messages", b'1\n{"n": "\xff"}', **LENIENT)
    assert "line 2 column 8" in answer.json["refused"][0]["detail"]


def test_all_of_a_lenient_batch_is_counted_while_it_waits(open_store):
    client, sizes = client_of(open_store(REFUSED)), []
    later = {"inlet.answer_later": lambda _, size: sizes.append(size)}  # None: there is no room
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": service.NDJSON, "Prefer": "handling=lenient"}
    body = "\n".join(json.dumps("x" * 100) for _ in range(2000))
    assert client.simulate_post("/strict", body=body, headers=headers, extras=later).status_code == 503
    assert sizes[0] > len(body)


def test_the_first_preference_counts(open_store):
    client = client_of(open_store(REFUSED))
    for prefer, status in (
        ("handling=strict, handling=lenient", 422), ('wait=1, Handling="LENIENT"', 201), ("x=handling=lenient", 422),
    ):  # fmt: skip
        assert client.post("strict", '{"n": 100}', **BATCH, Prefer=prefer).status_code == status, prefer


def test_what_is_refused_is_kept_once_also_if_the_transaction_is_undone(open_store):
    store = open_store(REFUSED + stream_sql("odd"))
    change(store, "INSERT INTO sqlite_sequence (name, seq) VALUES ('odd', 9223372036854775807)")
    entries = [
        service.Entry(store.schema.streams[stream], "x", key, [body])
        for stream, key, body in (("strict", "k", '{"n": 100}'), ("odd", None, "1"))
    ]
    store.queue.extend(entries)
    while store.queue:
        store.write()
    assert [entry.result.status for entry in entries] == [422, 503]
    assert rows(store, "SELECT count(*) FROM refused") == [(1,)]


def test_what_a_rule_refuses_is_kept_in_the_stream_refused(open_store):
    store = open_store(REFUSED)
    client = client_of(store)
    assert client.post("strict", '{"n": 100}', Idempotency_Key="k").status_code == 422
    assert client.post("strict", '{"n": 1}\n{"n": 101}', **BATCH).status_code == 422
    assert client.post("strict", '{"n": 102}\n{"n": 2}\n{"m": 1}', **LENIENT).status_code == 201
    for body in ('{"n": 3}', '{"n": 4}'):
        client.post("strict", body, Idempotency_Key="used")
    for not_kept in ("[", json.dumps({"n": "x" * 3_000_000})):
        client.post("strict", not_kept)
    client.post("strict", json.dumps({"n": 100, "text": "é" * 60_000}))
    kept = [json.loads(body) for (body,) in rows(store, "SELECT body FROM refused ORDER BY id")]
    wanted = [("k", None, '{"n": 100}'), (None, 2, '{"n": 101}'), (None, 1, '{"n": 102}'), (None, 3, '{"m": 1}')]
    wanted.append(("used", None, '{"n": 4}'))
    assert [(each["key"], each["line"], each["body"]) for each in kept[:5]] == wanted
    assert {each["stream"] for each in kept} == {"strict"}
    assert {each["status"] for each in kept} == {422}
    assert (kept[0]["detail"], len(kept[-1]["body"].encode()), len(kept)) == ("n must be below 100", 65_536, 6)
    assert rows(store, "SELECT DISTINCT client, sender FROM refused") == [("tester", "strict")]


def test_a_stream_refused_with_rules_of_its_own_stops_nobody(open_store):
    rules = """, line INTEGER AS (body ->> 'line') CHECK (line > 5), headers TEXT"""
    store = open_store(stream_sql("strict", STRICT_RULES) + stream_sql("refused", rules))
    client = client_of(store)
    assert client.post("refused", '{"line": 1}').status_code == 422  # and is not kept, or that would go on for ever
    assert client.post("strict", '{"n": 1}\n{"n": 100}', **LENIENT).json["count"] == 1
    assert client.post("strict", '{"n": 100}').status_code == 422
    assert rows(store, "SELECT count(*) FROM refused") == [(1,)]


def test_a_stream_refused_that_is_full_costs_only_who_was_refused(open_store):
    store = open_store(REFUSED)
    client = client_of(store)
    assert client.post("strict", '{"n": 100}').status_code == 422
    change(store, "UPDATE sqlite_sequence SET seq = 9223372036854775807 WHERE name = 'refused'")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda n: client.post("strict", f'{{"n": {100 if n == 3 else n}}}').status_code, range(8))
    assert sorted(answers) == [201] * 7 + [503]


# Of Telegraf, collectd, the Reporting API and SendGrid, and elements that are no objects.
ARRAYS = {
    '{"metrics": [{"n": 12345678901234567890123, "name": "big"}, {"n": 1.10}]}': [
        '{"n":12345678901234567890123,"name":"big"}', '{"n":1.10}'],
    '[{"values":[0.1],"time":1416062029.811},{"values":[1.10]}]': ['{"values":[0.1],"time":1416062029.811}', '{"values":[1.10]}'],
    '["a \\"b\\"", null, 1e400, [], 12345678901234567890]': ['"a \\"b\\""', "null", "1e400", "[]", "12345678901234567890"],
    "[]": [], "7": [], '{"other": [1]}': [],
}  # fmt: skip


def test_the_recipe_makes_a_row_of_each_element_of_an_array_once(open_store):
    store = open_store(recipe("arrays.sql") + recipe("refused.sql"))
    client = client_of(store)
    for body, elements in ARRAYS.items():
        change(store, "DELETE FROM elements")
        for _ in range(2):
            assert client.post("arrays", body, Idempotency_Key=service.digest_of(body)).status_code == 201
        assert [text for (text,) in rows(store, "SELECT body FROM elements ORDER BY id")] == elements
    assert client.post("arrays", "[1]").status_code == 201
    taken = []
    for number in (1_000, 10_000):
        started = time.process_time()
        assert client.post("arrays", json.dumps([{"n": 1.10, "text": "x" * 50}] * number)).status_code == 201
        taken.append(time.process_time() - started)
    assert taken[1] < 40 * taken[0]  # ten times as many took a hundred times as long
    assert client.post("arrays", json.dumps([1] * 10_001)).json["detail"] == "an array has at most 10,000 elements"


def test_the_recipe_tells_what_was_refused_yesterday(open_store):
    now = [service.utc_now()]
    store = open_store(
        stream_sql("strict", STRICT_RULES) + recipe("arrays.sql") + recipe("refused.sql"), clock=lambda: now[0]
    )
    client = client_of(store)
    for days in (0, 1, 1, 2):
        at = datetime.now(UTC) - timedelta(days=days)
        now[0] = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        assert client.post("strict", '{"n": 100}').status_code == 422
    wanted = {"client": "tester", "stream": "strict", "detail": "n must be below 100", "count": 2, "newest": 3}
    (found,) = client.get("/refused_yesterday").json["rows"]
    assert found.items() >= wanted.items()
    days = [row["day"] for row in client.get("/refused_by_day").json["rows"]]
    assert (len(days), found["day"] in days) == (3, True)
    assert client.get(f"/refused_by_day?day={found['day']}").json == {"rows": [found]}


def test_the_recipe_answers_those_that_want_something(open_store):
    column = recipe("answer.sql")
    client = client_of(open_store(stream_sql("hooks", f", {column}")))
    for body, status, text in (
        ('{"token":"x","challenge":"3eZbrw1a","type":"url_verification"}', 200, "3eZbrw1a"),
        ('[{"id":"1","data":{"validationCode":"512d38b6"}}]', 200, '{"validationResponse":"512d38b6"}'),
        ('{"requestId":"ed4","timestamp":1578090901599,"records":[]}', 200, '{"requestId":"ed4","timestamp":1578090901599}'),
        ('{"signature":{},"event-data":{"event":"opened"}}', 200, "ok"),
        ('{"requestId": null}', 201, None), ("[]", 201, None), ("1", 201, None),
    ):  # fmt: skip
        answer = client.post("hooks", body)
        assert (answer.status_code, text is None or answer.text) == (status, text is None or text)
