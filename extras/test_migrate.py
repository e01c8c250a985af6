"""The command migrate."""

import json
import re

import pytest

import service
from test_service import (
    ODD_FIELDS,
    ODD_RULE,
    READING,
    READINGS,
    SCHEMA,
    X,
    append,
    change,
    client_of,
    eventually,
    reading,
    rows,
    sending,
    stream_sql,
)


@pytest.fixture
def migrate(command, tmp_path, monkeypatch, request):
    """Changes schema.sql and runs migrate: (status, stdout, stderr)."""
    if "server" not in request.fixturenames:  # nobody has to look meanwhile
        monkeypatch.setattr(service.extra("migrate"), "SCHEMA_LOOK_S", 0)

    def run_it(*changes, sql=SCHEMA):
        for old, new in changes:
            assert old in sql
            sql = sql.replace(old, new)
        (tmp_path / "schema.sql").write_text(sql)
        return command("migrate")

    return run_it


def test_migrate_recomputes_everything_but_the_messages(client, store, migrate):
    for n in range(30):
        client.post("readings", reading(value=n, note=f"n{n}", colour="red"), Idempotency_Key=f"k{n}")
    change(store, "DELETE FROM readings WHERE id IN (7, 30)")
    messages = rows(store, "SELECT id, received_at, client, key, body FROM readings")
    changes = [
        ("batch TEXT AS (body ->> 'batch'),", "colour TEXT AS (body ->> 'colour') CHECK (colour = 'red'),"),
        ('CREATE UNIQUE INDEX "one reading for each batch" ON readings (batch)', "CREATE INDEX by_note ON readings (note)"),
        ("value > 20", "value > 10"), ("mondays", "tuesdays"), ("'b-4'", "'b-5'"),
    ]  # fmt: skip
    status, printed, errors = migrate(*changes)
    assert (status, errors) == (0, "")
    for words in ("readings has changed", "index by_note is new", "index one reading for each batch", "view warm"):
        assert words in printed, words
    assert rows(store, "SELECT id, received_at, client, key, body FROM readings") == messages
    assert set(rows(store, "SELECT colour FROM readings")) == {("red",)}
    assert rows(store, "SELECT * FROM counts") == [("a-17", 30)]  # triggers do not run again
    assert len(rows(store, "SELECT * FROM sensors")) == 3
    status, printed, errors = migrate(*changes)
    assert (status, errors, printed[:20]) == (0, "", "no table had changed")


def test_migrate_says_which_messages_break_a_new_rule_and_changes_nothing(client, store, migrate):
    for n in range(60):
        client.post("readings", json.dumps({"sensor": "a-17", "value": n, "note": f"n{n % 55}"}))
    for body in "112":
        client.post("messages", body)
    before = store_as_it_is(store)
    status, _, errors = migrate(
        ('"value must be between -90 and 60" CHECK (value BETWEEN -90 AND 60)', '"not so warm" CHECK (value < 5 OR value > 7)'),
        ('"one reading for each batch" ON readings (batch)', '"one note each" ON readings (note)'),
        ("CREATE VIEW", 'CREATE UNIQUE INDEX "no doubles" ON messages (body);\nCREATE VIEW'),
    )  # fmt: skip
    assert status == 1
    assert "3 broke 'not so warm': ids 6, 7, 8\n" in errors
    assert "5 broke 'one note each': ids 56, 57, 58, 59, 60\n" in errors
    assert "1 broke 'no doubles': ids 2\n" in errors
    status, _, errors = migrate((" TEXT AS (body ->> 'note')", " TEXT AS (body ->> 'note') REFERENCES sensors (name)"))
    assert status == 1
    assert "60 broke 'FOREIGN KEY to sensors': ids 1, 2, 3" in errors
    assert "and 40 more" in errors
    assert store_as_it_is(store) == before
    assert client.post("readings", READING).status_code == 201


def store_as_it_is(store):
    tables = ("sqlite_schema", "messages", "readings", "sensors", "counts", "sqlite_sequence")
    return [rows(store, f"SELECT rowid, * FROM {table}") for table in tables]


def test_migrate_never_drops_a_stream_with_messages_and_never_uses_an_id_again(store, migrate, open_store):
    for n in range(3):
        append(store, "messages", str(n))
    status, _, errors = migrate((stream_sql("messages"), ""))
    assert status == 2
    assert "messages is not in the schema and holds 3 messages" in errors
    change(store, "DELETE FROM messages")
    assert migrate((stream_sql("messages"), ""))[0] == 0
    assert migrate()[0] == 0
    assert append(open_store(), "messages", "1") == 4


T = X + "CREATE TABLE t "


V = X + "CREATE VIEW v AS SELECT {0} AS a; CREATE TRIGGER i INSTEAD OF INSERT ON v BEGIN SELECT {0}; END;"


DOCS = "CREATE TABLE docs (t TEXT{}); CREATE VIRTUAL TABLE found USING fts5 (t, content=docs);"


# schema.sql before and after; what is done between; what is asked then, and the answer, or the words of the refusal.
MIGRATIONS = {
    "what others refer to": (
        SCHEMA, SCHEMA.replace("sensors (name TEXT PRIMARY KEY)", "sensors (Name TEXT PRIMARY KEY, place TEXT)")
        .replace("sensors VALUES", "sensors (name) VALUES"), "",
        "SELECT *, (SELECT count(*) FROM sqlite_schema WHERE sql LIKE '%before migrate%') FROM sensors",
        [("a-17", None, 0), ("b-4", None, 0)]),
    "a column with data": (T + "(n);", T + "(m);", "INSERT INTO t VALUES (3)", "SELECT n FROM t", "table t: .*column n .*data"),
    "a column without data": (T + "(a, n);", T + "(a, m);", "INSERT INTO t VALUES (3, NULL)", "SELECT * FROM t", [(3, None)]),
    "a column that is not ASCII": (
        T + '("Öffnung", a);', T + '("Öffnung", A, b);', "INSERT INTO t VALUES (1, 2)", 'SELECT "Öffnung", a FROM t', [(1, 2)]),
    "another letter that is not ASCII": (
        T + '("Öffnung");', T + '("öffnung");', "INSERT INTO t VALUES (1)", 'SELECT "Öffnung" FROM t', "column Öffnung .*data"),
    "the case of everything": (
        X + "CREATE TABLE T (A); CREATE VIEW V AS SELECT A FROM T;",
        X.replace("x_key", "X_key").replace(" x ", " X ") + "CREATE TABLE t (a); CREATE VIEW v AS SELECT a FROM t;",
        "INSERT INTO T VALUES (1); INSERT INTO x (received_at, client, body) VALUES ('t', 'c', 1)", "SELECT v.a, x.id FROM v, x", [(1, 1)]),
    "the case of what has changed": (
        X + "CREATE TABLE T (A, B); CREATE VIEW V AS SELECT A FROM T;", X + "CREATE TABLE t (a, b, c); CREATE VIEW v AS SELECT b FROM t;",
        "INSERT INTO T VALUES (1, 2)", "SELECT v.*, t.a FROM v, t", [(2, 1)]),
    "rowids of a lookup table": (
        X + DOCS.format(""), X + DOCS.format(", more TEXT"), "INSERT INTO docs (rowid, t) VALUES (3, 'a'), (7, 'needle'), (9, 'z');"
        " INSERT INTO found (found) VALUES ('rebuild')", "SELECT rowid, t FROM found WHERE found MATCH 'needle'", [(7, "needle")]),
    "rowids of a table with columns of such names": (
        T + "(oid, rowid TEXT);", T + "(oid, rowid TEXT, b);", "INSERT INTO t (_rowid_, oid, rowid) VALUES (5, 1, 'x')",
        "SELECT _rowid_, oid, rowid FROM t", [(5, 1, "x")]),
    "a table without rowids": (
        T + "(a PRIMARY KEY) WITHOUT ROWID;", T + "(a PRIMARY KEY, b);", "INSERT INTO t VALUES ('k')", "SELECT a FROM t", [("k",)]),
    "an INSTEAD OF trigger that has left": (
        V.format(1), V.format(1).partition("CREATE TRIGGER")[0], "", "SELECT count(*) FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = 'v'", [(0,)]),
    "a view and its trigger that have changed": (
        V.format(1), V.format(2), "", "SELECT a, (SELECT sql LIKE '%SELECT 2%' FROM sqlite_schema WHERE name = 'i') FROM v", [(2, 1)]),
    "a trigger and an index that have left": (
        X + "CREATE TRIGGER i AFTER INSERT ON X BEGIN SELECT 1; END; CREATE INDEX j ON x (body);", X, "",
        "SELECT count(*) FROM sqlite_schema WHERE name IN ('i', 'j')", [(0,)]),
    "a generated column that becomes an ordinary one": (
        T + "(a, b AS (a + 1));", T + "(a, b);", "INSERT INTO t VALUES (1)", "SELECT a, b FROM t", [(1, 2)]),
    "an ordinary column that becomes a generated one": (
        T + "(a, b);", T + "(a, b AS (a + 1));", "INSERT INTO t VALUES (1, 5)", "SELECT b FROM t", "table t: .*column b .*data"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after", "done", "question", "answer"), MIGRATIONS.values(), ids=MIGRATIONS)
def test_migrate_keeps(before, after, done, question, answer, open_store, migrate):
    store = open_store(before)
    change(store, done)
    was = rows(store, question)
    status, _, errors = migrate(sql=after)
    if isinstance(answer, str):
        assert (status, rows(store, question)) == (2, was)
        assert re.search(answer, errors)
    else:
        assert (status, rows(store, question)) == (0, answer), errors
        open_store(after)  # finds no difference


def test_migrate_works_beside_a_running_server(server, store, migrate):
    with sending(server, READING, "readings") as answers:
        eventually(lambda: len(answers) > 200)
        assert migrate(("value BETWEEN -90 AND 60", "value BETWEEN -90 AND 61"))[0] == 0
        count = len(answers)
        eventually(lambda: len(answers) > count + 50)
    assert {status for status, _ in answers} == {201}
    assert [row[0] for row in rows(store)] == [message_id for _, message_id in answers]


@pytest.mark.parametrize("before", ["", "ALTER TABLE messages RENAME TO archive", "DROP TABLE messages"])
def test_a_process_that_serves_stores_no_nonsense_when_migrate_takes_the_check_of_json_away(
    before, server, store, migrate
):
    with sending(server, "nul", "messages") as answers:
        eventually(lambda: len(answers) > 20)
        change(store, before)
        assert migrate((" CHECK (json_valid(body))", ""))[0] == 0
        eventually(lambda: "takes messages in another way" in server.log)
    assert {status for status, _ in answers} <= {400, 503}
    assert rows(store, "SELECT * FROM messages") == []


def test_a_process_that_serves_stores_nothing_without_headers_when_migrate_adds_them(server, store, migrate):
    with sending(server, READING, "readings") as answers:
        eventually(lambda: len(answers) > 20)
        assert migrate((READINGS, f", headers TEXT{READINGS}"))[0] == 0
        count = rows(store, "SELECT count(*) FROM readings")
        eventually(lambda: "takes messages in another way" in server.log)
    assert {status for status, _ in answers} == {201, 503}
    assert rows(store, "SELECT count(*) FROM readings") == count


def test_migrate_names_a_message_whose_error_is_not_utf_8(open_store, migrate):
    store = open_store(stream_sql("messages"))
    change(
        store, *(f"INSERT INTO messages (received_at, client, body) VALUES ('t', 'c', '{body}')" for body in ODD_FIELDS)
    )
    status, _, errors = migrate(sql=stream_sql("messages", ODD_RULE))
    assert (status, "ids 1" in errors, "ids 2" in errors) == (1, True, True)


def test_migrate_ends_with_one_line_where_an_index_fails_with_an_error_that_is_not_utf_8(open_store, migrate):
    store = open_store(stream_sql("messages"))
    change(store, f"INSERT INTO messages (received_at, client, body) VALUES ('t', 'c', '{ODD_FIELDS[1]}')")
    index = "CREATE INDEX odd ON messages (json_extract(body -> 'new', body ->> 'field'));"
    status, _, errors = migrate(sql=stream_sql("messages") + index)
    assert (status, errors.count("\n")) == (1, 1)


def test_migrate_gives_a_stream_headers_and_old_messages_have_none(client, store, migrate):
    client.post("readings", READING)
    assert migrate((READINGS, f", headers TEXT{READINGS}"))[0] == 0
    with_headers = client_of(
        service.Store(store.database, service.read_schema(store.database.path.with_name("schema.sql")))
    )
    with_headers.post("readings", READING, X_A="1")
    old, new = with_headers.get("/readings").json["messages"]
    assert (old["headers"], new["headers"]["x-a"]) == (None, "1")
