"""extras/page.html in a real Chromium.

Run as a program, it makes the picture for README: PYTHONPATH=. python faults/test_page.py extras/page.png
"""

import contextlib
import csv
import http.server
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from common import Server, database
from deployed import BIN, free_port, nginx, running
from playwright.sync_api import Page, expect, sync_playwright

from test_service import DEADLINE_S, HERE, TOKEN, Process, add_tester, database_of, run, send, stream_sql

EVIL = "</script><img src=x onerror=ran.push(1)>"
EVIL_STREAM = stream_sql("evil", f""", headers TEXT, "{EVIL}" TEXT AS (body ->> '$."{EVIL}"')""")
SCHEMA = (
    stream_sql("messages", ", headers TEXT")
    + stream_sql("readings", """,
        sensor TEXT AS (body ->> 'sensor'),
        value REAL AS (body ->> 'value') CONSTRAINT "value must be below 60" CHECK (value < 60)""")
    + EVIL_STREAM
    + "CREATE VIEW warm AS SELECT * FROM readings WHERE value > 20;\n"
    + "CREATE VIEW sensors AS SELECT sensor, count(*) AS n, 12345678901234567890 * 1.0 AS large, NULL AS none"
    + " FROM readings GROUP BY sensor;\n"
)  # fmt: skip
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium():
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        assert path, "there is no chromium"
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser):
    """A tab that sees which scripts run, and in which no error may go unnoticed."""
    with contextlib.closing(browser.new_context(viewport={"width": 1100, "height": 800})) as context:
        errors = []
        tab = context.new_page()
        tab.set_default_timeout(DEADLINE_S * 1000)
        expect.set_options(timeout=DEADLINE_S * 1000)
        tab.add_init_script("window.ran = []; onsecuritypolicyviolation = (event) => ran.push(event.blockedURI)")
        tab.on("pageerror", lambda error: errors.append(str(error)))
        yield tab
        if not tab.url.startswith("about:"):
            assert tab.evaluate("window.ran || []") == []
        assert errors == []


@pytest.fixture
def server(tmp_path):
    database(tmp_path, SCHEMA)
    with contextlib.closing(Server(tmp_path)) as server:
        yield server


def post(server, body, stream="messages", **headers):
    with contextlib.closing(server.connect()) as connection:
        status, _, data = send(connection, "POST", f"/{stream}", body, **headers)
        assert status == 201, data
        return json.loads(data)


def get(server, path):
    with contextlib.closing(server.connect()) as connection:
        return send(connection, "GET", path)[2]


def post_many(server, number, stream="messages", first=0):
    lines = "".join(f'{{"n": {n}}}\n' for n in range(first, first + number))
    return post(server, lines, stream, Content_Type="application/x-ndjson")


def enter(page: Page, url: str, token: str = TOKEN) -> None:
    page.goto(url)
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Show", exact=True).click()


def replace_the_answer(page: Page, answer) -> None:
    """The service takes each POST from now on, and the page gets another answer."""

    def take(route):
        if route.request.method == "POST":
            route.fetch()
            answer(route)
        else:
            route.continue_()

    page.route("**/messages", take)


def cells(page: Page, row: int) -> list[str]:
    """Return the texts of a row, when it is there: the page writes its heads before its rows."""
    found = page.locator("#rows > tr:not(.detail)").nth(row)
    found.wait_for(state="attached")
    return found.locator("td").all_text_contents()


def ids(page: Page) -> list[int]:
    return [int(text) for text in page.locator("#rows > tr:not(.detail) button").all_text_contents()]


def test_the_detector_sees_a_script_that_runs(browser):
    """Without this, the test of hostile messages could not fail."""
    with contextlib.closing(browser.new_context()) as context:
        tab = context.new_page()
        tab.set_content("<p id=here>")
        tab.evaluate("(html) => { window.ran = []; document.getElementById('here').innerHTML = html }", EVIL)
        tab.wait_for_function("ran.length > 0")


def test_a_first_look_with_the_token_that_the_first_start_has_printed(page, tmp_path):
    with contextlib.closing(Process(tmp_path)) as process:
        token = process.printed(4).split()[-1]
        answer = page.goto(process.url)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        expect(page.locator("#health")).to_have_text("Messages can be taken")
        page.get_by_label("Token").fill(f" {token}\n")
        page.keyboard.press("Enter")
        expect(page.locator("#end")).to_have_text("There are no messages.")
        with contextlib.closing(process.connect()) as connection:
            send(connection, "POST", "/messages", '{"hello":   1.10}', Authorization=f"Bearer {token}")
        expect(page.locator("#rows button")).to_have_text(["1"])
        assert cells(page, 0)[2:] == ['{"hello":   1.10}', "default", ""]
        assert page.evaluate("Object.values(sessionStorage)") == [token]
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        page.reload()
        expect(page.locator("#rows button")).to_have_text(["1"])  # the tab still knows it
        page.get_by_role("button", name="Forget").click()
        assert page.evaluate("sessionStorage.length") == 0
        expect(page.get_by_label("Token")).to_be_focused()
        assert page.locator("#rows > tr").count() == 0


def test_messages_arrive_while_one_looks_and_nothing_moves_while_one_reads(page, server):
    post_many(server, 200)
    enter(page, server.url)
    expect(page.locator("#rows button").first).to_have_text("200")
    assert ids(page) == list(range(200, 150, -1))
    post_many(server, 3, first=200)
    expect(page.locator("#rows button").first).to_have_text("203")
    expect(page.locator("#news")).to_have_text("New up to id 203")
    page.locator("#scroll").evaluate("(it) => it.scrollTop = 300")
    page.get_by_role("button", name="190", exact=True).click()
    place = page.locator("#rows .detail").bounding_box()
    for n in range(10):
        post_many(server, 100, first=1000 + n * 100)
        time.sleep(0.15)
    newer = page.locator("#newer")
    expect(newer).to_have_text("Show 1000 newer messages")
    assert page.locator("#rows .detail").bounding_box() == pytest.approx(place, abs=60)  # the line above appeared
    place = page.locator("#rows .detail").bounding_box()
    post(server, "1")
    expect(newer).to_have_text("Show 1001 newer messages")
    assert page.locator("#rows .detail").bounding_box() == place
    newer.click()
    expect(page.locator("#rows button").first).to_have_text("1204")
    found = ids(page)
    assert found == list(range(1204, 1204 - len(found), -1))
    expect(page.locator("#names li").first).to_contain_text("last id 1204, 1004 new")
    assert page.locator("#rows > tr").count() <= 500


def test_older_pages_end_with_the_first_message_also_where_many_were_deleted(page, server):
    post_many(server, 1000)
    with database_of(server) as db:
        db.execute("DELETE FROM messages WHERE id BETWEEN 20 AND 930")
    enter(page, server.url)
    expect(page.locator("#rows button").first).to_have_text("1000")
    older = page.get_by_role("button", name="Older messages")
    wanted = [*range(1000, 930, -1), *range(19, 0, -1)]
    for _ in range(10):
        older.click()
        expect(page.locator("#end")).not_to_have_text("Looking…")
        if page.locator("#end").text_content() == "There are no older messages.":
            break
    assert ids(page) == wanted


def test_large_bodies_long_numbers_and_the_order_of_members_are_shown_as_they_were_sent(page, server):
    long = "1" + "0" * 9_999
    post(server, f'{{"z":{long},"a":1.10,"z":[],"b":{{}},"c":[1,{{"d":null}}]}}')
    enter(page, server.url)
    page.get_by_role("button", name="1", exact=True).click()
    expect(page.locator("#rows pre")).not_to_be_empty()
    assert page.locator("#rows pre").text_content() == (
        f'{{\n  "z": {long},\n  "a": 1.10,\n  "z": [],\n  "b": {{}},\n'
        '  "c": [\n    1,\n    {\n      "d": null\n    }\n  ]\n}'
    )
    page.get_by_role("button", name="1", exact=True).click()
    for body in (json.dumps("x" * (2**20 - 2)), "[" * 512 + "1," * 400_000 + "1" + "]" * 512):
        sent = post(server, body)["id"]
        page.get_by_role("button", name=str(sent), exact=True).click()
        expect(page.locator("#rows pre")).not_to_be_empty()
        assert len(page.locator("#rows pre").text_content()) == 20_000
        with page.expect_download() as download:
            page.get_by_role("link", name="Save all of it").click()
        assert Path(download.value.path()).read_text() == body
        page.get_by_role("button", name=str(sent), exact=True).click()


def test_nothing_that_is_in_a_message_runs(page, server):
    body = json.dumps({EVIL: EVIL, "a": EVIL})
    post(server, body, "evil", Idempotency_Key="</script><img/src=x/onerror=ran.push(1)>", X_Evil=EVIL)
    with database_of(server) as db:
        db.execute("UPDATE evil SET client = ?", (EVIL,))
    enter(page, f"{server.url}/#evil")
    page.get_by_role("button", name="1", exact=True).click()
    expect(page.locator("#rows pre")).to_have_text(f'{{\n  "{EVIL}": "{EVIL}",\n  "a": "{EVIL}"\n}}')
    expect(page.locator("#rows .detail dl")).to_contain_text(EVIL)
    assert cells(page, 0)[2] == cells(page, 0)[4] == EVIL
    page.get_by_text("Filter", exact=True).click()
    page.get_by_role("textbox", name=EVIL).fill(EVIL)
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.locator("#rows button")).to_have_text(["1"])
    page.get_by_text("Send a message").click()
    page.get_by_label("Message, as JSON").fill(EVIL)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("#sent")).to_contain_text("400")
    time.sleep(0.5)
    assert page.evaluate("ran") == []


def test_fields_filters_headers_and_reports(page, server):
    for n in range(60):
        post(server, f'{{"sensor": "s{n % 3}", "value": {n}.50}}', "readings")
    post(server, "1", X_Who="me")
    enter(page, server.url)
    page.get_by_role("button", name="1", exact=True).click()
    expect(page.locator("#rows .detail")).to_contain_text("x-whome")
    page.get_by_role("link", name="readings").click()
    expect(page.locator("#title")).to_be_focused()
    expect(page.locator("#head")).to_have_text("idreceived_atsensorvaluebodyclientkey")
    assert cells(page, 0)[2:4] == ["s2", "59.5"]
    page.get_by_text("Filter", exact=True).click()
    page.get_by_role("textbox", name="sensor").fill("s1")
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.locator("#rows button").first).to_have_text("59")
    assert ids(page) == list(range(59, 0, -3))  # more than are among the last 50
    post(server, '{"sensor": "s0", "value": 1}', "readings")
    post(server, '{"sensor": "s1", "value": 1}', "readings")
    expect(page.locator("#rows button").first).to_have_text("62")
    page.get_by_role("link", name="warm").click()
    expect(page.locator("#rows button").first).to_have_text("60")
    assert ids(page) == list(range(60, 20, -1))
    page.get_by_role("link", name="sensors").click()
    expect(page.locator("#head")).to_have_text("sensornlargenone")
    assert cells(page, 1) == ["s1", "21", "1.2345678901234567e+19", ""]
    post(server, '{"sensor": "s1", "value": 1}', "readings")
    expect(page.locator("#rows > tr").nth(1)).to_contain_text("22")  # it is read again
    page.go_back()
    expect(page.locator("#title")).to_have_text("warm")


def heads(page):
    return page.locator("#head th:visible").all_text_contents()


def column(page, number):
    found = page.locator("#rows > tr:not(.detail):visible").all()
    return [row.locator("td").nth(number).text_content() for row in found]


def test_columns_are_what_the_schema_makes_of_a_message(page, tmp_path):
    """Also those that are no member of the body."""
    columns = ", size INTEGER AS (json_array_length(body -> 'list')), list TEXT AS (body ->> '$.list[0]')"
    database(tmp_path, stream_sql("messages", columns))
    with contextlib.closing(Server(tmp_path)) as server:
        post(server, '{"list": ["a", "b", "c"], "size": "no"}')
        enter(page, server.url)
        expect(page.locator("#rows button")).to_have_text(["1"])
        assert cells(page, 0)[2:4] == ["3", "a"]
        assert "num" in page.locator("#rows td").nth(2).get_attribute("class")
        assert "num" not in page.locator("#rows td").nth(3).get_attribute("class")


def test_what_is_loaded_is_sorted_searched_and_its_columns_hidden(page, server):
    for sensor, value in (("b", 10), ("a", 9), ("c", -3), ("a", 30)):
        post(server, f'{{"sensor": "{sensor}", "value": {value}}}', "readings")
    enter(page, f"{server.url}/#readings")
    expect(page.locator("#rows button").first).to_have_text("4")
    by_value = page.get_by_role("button", name="value", exact=True)
    by_value.click()
    assert column(page, 3) == ["-3.0", "9.0", "10.0", "30.0"]
    assert page.locator("#head th").nth(3).get_attribute("aria-sort") == "ascending"
    by_value.click()
    assert column(page, 3) == ["30.0", "10.0", "9.0", "-3.0"]
    post(server, '{"sensor": "d", "value": 20}', "readings")
    expect(page.locator("#rows > tr")).to_have_count(5)
    assert column(page, 3) == ["30.0", "20.0", "10.0", "9.0", "-3.0"]  # what comes is sorted in
    page.get_by_role("button", name="sensor", exact=True).click()
    assert column(page, 2) == ["a", "a", "b", "c", "d"]
    page.get_by_label("Search what is loaded").fill('"A"')
    expect(page.locator("#news")).to_have_text('2 of 5 loaded rows have “"A"”')
    assert column(page, 2) == ["a", "a"]
    page.get_by_label("Search what is loaded").fill("")
    page.get_by_text("Columns", exact=True).click()
    page.locator("#columns").get_by_label("client").uncheck()
    assert "client" not in heads(page)
    page.get_by_role("link", name="warm").click()
    expect(page.locator("#title")).to_have_text("warm")
    assert "client" in heads(page)
    page.go_back()
    expect(page.locator("#title")).to_have_text("readings")
    expect(page.locator("#rows button").first).to_have_text("5")
    assert "client" not in heads(page)  # the choice stays


def test_a_filter_stands_in_the_url(page, server):
    for n in range(6):
        post(server, f'{{"sensor": "s {n % 2}&", "value": {n}}}', "readings")
    enter(page, f"{server.url}/#readings")
    page.get_by_text("Filter", exact=True).click()
    page.get_by_role("textbox", name="sensor").fill("s 1&")
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.locator("#rows button")).to_have_text(["6", "4", "2"])
    url = page.url
    page.get_by_role("button", name="sensor = s 1& ✕").click()
    expect(page.locator("#rows button")).to_have_count(6)
    page.go_back()
    expect(page.locator("#rows button")).to_have_text(["6", "4", "2"])
    page.goto("about:blank")
    page.goto(url)  # as somebody with whom it was shared
    expect(page.locator("#rows button")).to_have_text(["6", "4", "2"])
    page.goto(f"{server.url}/#/nowhere?sensor=1")
    expect(page.locator("#title")).to_have_text("messages")


def test_csv_and_bodies_are_saved(page, server):
    post_many(server, 1500)
    enter(page, server.url)
    expect(page.locator("#rows button").first).to_have_text("1500")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    assert download.value.suggested_filename == "messages.csv"
    with open(download.value.path(), newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert [row["body"] for row in rows] == [f'{{"n": {n}}}' for n in range(1500)]
    post(server, '{"sensor": "é,", "value": 1}'.encode(), "readings")
    page.get_by_role("link", name="sensors").click()
    expect(page.locator("#end")).to_have_text("Rows: 1")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    assert (
        Path(download.value.path()).read_bytes().decode() == 'sensor,n,large,none\r\n"é,",1,1.2345678901234567e+19,\r\n'
    )


def test_charts_have_axes_that_can_be_read(page, tmp_path):
    views = """CREATE VIEW by_sensor AS SELECT sensor, count(*) AS n FROM readings GROUP BY sensor;
    CREATE VIEW by_hour AS SELECT substr(received_at, 1, 13) AS hour, avg(value) AS mean FROM readings GROUP BY hour;"""
    database(tmp_path, stream_sql("readings", """, sensor TEXT AS (body ->> 'sensor'),
        value REAL AS (body ->> 'value'), other REAL AS (body ->> 'other')""") + views)  # fmt: skip
    with contextlib.closing(Server(tmp_path)) as server:
        with database_of(server) as db:
            for n in range(240):
                at = (datetime.now(UTC) - timedelta(minutes=(240 - n) / 10)).isoformat(timespec="milliseconds")[:23]
                body = json.dumps({"sensor": f"s{n % 3}", "value": n, "other": -n / 1000})
                db.execute("INSERT INTO readings (received_at, client, body) VALUES (?, 'c', ?)", (f"{at}Z", body))
            db.execute("UPDATE readings SET received_at = '2026-01-02' || substr(received_at, 11) WHERE id < 3")
        enter(page, f"{server.url}/#readings")
        minutes, values = page.locator(".chart").nth(0), page.locator(".chart").nth(1)
        expect(minutes.locator("rect")).to_have_count(30)
        heights = [float(bar.get_attribute("height")) for bar in minutes.locator("rect").all()]
        assert heights[0] == 0 < min(heights[7:29])
        assert set(minutes.locator("text").all_text_contents()) >= {"0", "5", "10"}
        assert re.fullmatch(r"\d\d:\d\d", minutes.locator("text").last.text_content())
        expect(values.locator("strong")).to_have_text("239.0")
        assert len(values.locator("polyline").get_attribute("points").split()) == 50
        page.get_by_label("The field of the chart").select_option("other")
        expect(values.locator("strong")).to_have_text("-0.239")
        page.get_by_role("link", name="by_sensor").click()
        expect(page.locator("#rows > tr")).to_have_count(3)  # with bars behind the numbers
        bars = page.locator("#rows td").evaluate_all("all => all.map((cell) => cell.style.getPropertyValue('--part'))")
        assert [bar for bar in bars if bar] == ["100%"] * 3
        page.get_by_role("link", name="by_hour").click()
        expect(page.locator(".chart polyline")).to_have_count(1)


@pytest.mark.parametrize("values", [
    (21.5, 21.500000000000004), (1764000000000000256, 1764000000000000512), (5e-324, 0), (7, 7), (0, 0), (1e299, -1e299),
    (-24000072, 5142857142.857142), (1764440000000, 1764440001000), (1.7e308, -1.7e308),
])  # fmt: skip
def test_no_number_freezes_a_chart_or_is_rounded(values, page, tmp_path):
    database(tmp_path, stream_sql("messages", ", value ANY AS (body ->> 'value')"))
    with contextlib.closing(Server(tmp_path)) as server:
        for value in values:
            post(server, json.dumps({"value": value}))
        enter(page, server.url)
        expect(page.locator("#rows > tr")).to_have_count(2)
        if abs(values[0]) > 1e300:  # there is no room for it in a drawing
            return
        drawn = page.locator(".chart").last
        expect(drawn.locator("polyline")).to_have_count(1)
        assert 2 <= drawn.locator("line").count() <= 5
        marks = drawn.locator("text[text-anchor=end]").all_text_contents()
        assert len(set(marks)) == len(marks) or values[0] > 1e18
        assert float(drawn.locator("strong").text_content()) == values[1]
        xs = "(it) => [it, ...it.querySelectorAll('text')].map((each) => each.getBoundingClientRect().x)"
        left, *texts = drawn.evaluate(xs)
        assert min(texts) >= left


def test_what_is_not_there_is_told(page, server):
    post(server, '{"sensor": "s", "value": 1}', "readings")
    enter(page, f"{server.url}/#/readings?sensr=s")
    expect(page.locator("#trouble")).to_contain_text("sensr")
    page.get_by_title("Take this filter away").click()
    expect(page.locator("#rows > tr")).to_have_count(1)
    expect(page.locator("#trouble")).to_be_hidden()
    page.goto(f"{server.url}/#/nosuch")
    expect(page.locator("#note")).to_have_text("There is no nosuch here.")


def test_it_is_live_only_while_the_service_answers(page, server):
    post(server, "1")
    enter(page, server.url)
    expect(page.locator("#live")).to_have_text("Live")
    page.get_by_role("link", name="readings").click()
    expect(page.locator("#title")).to_have_text("readings")
    expect(page.locator("#live")).to_have_text("Live", timeout=4000)  # and not when the last wait is over
    server.kill()
    expect(page.locator("#live")).to_have_text("")
    page.evaluate("new MutationObserver(() => { document.title = $('live').textContent || document.title; })"
                  ".observe($('live'), {childList: true})")  # fmt: skip
    page.wait_for_timeout(4000)
    assert page.title() == "Inlet"


def test_what_was_refused_comes_first(page, tmp_path):
    database(tmp_path, SCHEMA + stream_sql("refused", ", detail TEXT AS (body ->> 'detail')"))
    with contextlib.closing(Server(tmp_path)) as server:
        assert send(server.connect(), "POST", "/readings", '{"value": 60}')[0] == 422
        enter(page, server.url)
        expect(page.locator("#names b").first).to_have_text("refused")
        expect(page.locator("#names .count").first).to_have_text("1")
        expect(page.locator("#title")).to_have_text("messages")  # it is not what opens
        page.get_by_role("link", name="refused").click()
        expect(page.locator("#rows > tr")).to_contain_text("value must be below 60")


def test_a_message_is_there_at_once(page, server):
    """It is waited for: the page would look once a second."""
    post(server, "1")
    enter(page, server.url)
    expect(page.locator("#live")).to_have_text("Live")
    took = []
    for number in range(2, 10):
        page.wait_for_timeout(700)
        began = time.monotonic()
        post(server, "1")
        expect(page.locator("#rows button").first).to_have_text(str(number))
        took.append(time.monotonic() - began)
    assert sorted(took)[4] < 0.4, took


def test_a_message_is_sent_and_a_refused_one_says_where_and_why(page, server):
    enter(page, f"{server.url}/#readings")
    page.get_by_text("Send a message").click()
    message, sent = page.get_by_label("Message, as JSON"), page.locator("#sent")

    def send_it():
        page.wait_for_timeout(600)  # a second click right after the first is not meant
        page.get_by_role("button", name="Send", exact=True).click()

    message.fill('{"sensor": "😀", "value": 1.10}')
    send_it()
    expect(sent).to_contain_text("/1 at 2")
    expect(page.locator("#rows button").first).to_have_text("1")
    send_it()
    expect(sent).to_contain_text("/2 at 2")  # a key of its own
    message.fill('{"sensor": "😀",\n "värde😀": nul}')
    send_it()
    expect(sent).to_contain_text("line 2 column 12")
    message.fill('{"value": 60}')
    send_it()
    expect(sent).to_have_text("422: value must be below 60")
    message.fill('{"value": 3}')
    with database_of(server) as db:
        assert [key is not None for (key,) in db.execute("SELECT key FROM readings")] == [True, True]
        db.execute("BEGIN IMMEDIATE")
        send_it()
        expect(sent).to_contain_text("503: The database is busy.")
        expect(page.locator("#health")).to_have_text("No message can be written, or it takes too long.")
        db.execute("ROLLBACK")
    send_it()
    expect(sent).to_contain_text("/3 at 2")
    with database_of(server) as db:
        assert db.execute("SELECT count(*) FROM readings").fetchone() == (3,)


def test_a_message_whose_answer_is_lost_is_stored_once(page, server):
    enter(page, server.url)
    page.get_by_text("Send a message").click()
    page.get_by_label("Message, as JSON").fill("1")
    replace_the_answer(page, lambda route: route.abort())
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("#sent")).to_contain_text(
        "No answer: The service does not answer. If you send it again, it is stored once."
    )
    page.unroute("**/messages")
    page.wait_for_timeout(600)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("#sent")).to_contain_text("/1 at 2")
    with database_of(server) as db:
        assert db.execute("SELECT count(*) FROM messages").fetchone() == (1,)


@pytest.mark.parametrize(
    "odd",
    [
        {"status": 200, "body": "<html>Please log in", "content_type": "text/html"},
        {"status": 204},
        {"status": 201, "body": '{"id": '},
        {"status": 502, "body": '{"a\tb": 1, "line": 0, "column": 7}'},
        {"status": 408, "body": "[1]"},
        {"status": 429},
    ],
    ids=lambda odd: str(odd["status"]),
)
def test_an_answer_that_is_not_of_the_service_is_no_201_and_the_key_stays(odd, page, server):
    """A proxy took the message to the service, and answers something else."""
    enter(page, server.url)
    page.get_by_text("Send a message").click()
    page.get_by_label("Message, as JSON").fill("1")
    replace_the_answer(page, lambda route: route.fulfill(**odd))
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("#sent")).to_contain_text("If you send it again, it is stored once.")
    page.unroute("**/messages")
    page.wait_for_timeout(600)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("#sent")).to_contain_text("/1 at 2")


def test_of_two_clicks_at_once_one_sends(page, server):
    enter(page, server.url)
    page.get_by_text("Send a message").click()
    page.get_by_label("Message, as JSON").fill("1")
    held = []
    page.route("**/messages", lambda route: held.append(route) if route.request.method == "POST" else route.continue_())
    for _ in range(3):
        page.get_by_role("button", name="Send", exact=True).click()
    page.wait_for_timeout(500)
    assert len(held) == 1
    held[0].continue_()
    expect(page.locator("#sent")).to_contain_text("/1 at 2")
    page.unroute("**/messages")
    page.wait_for_timeout(600)
    page.get_by_role("button", name="Send", exact=True).dblclick(delay=120)
    expect(page.locator("#sent")).to_contain_text("/2 at 2")
    page.wait_for_timeout(1000)
    assert len(json.loads(get(server, "/messages"))["messages"]) == 2


def test_what_comes_late_for_another_token_is_dropped(page, server):
    add_tester(server.database, "other", "other-token", "read:messages")
    held = []

    def hold(route):
        if route.request.headers.get("authorization") == "Bearer wrong":
            held.append(route)
        else:
            route.continue_()

    page.route("**/*", hold)
    enter(page, server.url, "wrong")
    while not held:
        page.wait_for_timeout(20)
    page.get_by_label("Token").fill("other-token")
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.locator("#names b")).to_have_text(["messages"])  # at once, although the other has no answer yet
    for route in held:
        route.continue_()
    page.wait_for_timeout(1500)
    assert page.evaluate("sessionStorage.getItem('inlet-token')") == "other-token"
    expect(page.locator("#names b")).to_have_text(["messages"])
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_service_that_hangs_is_told(page, server):
    enter(page, server.url)
    expect(page.locator("#end")).to_have_text("There are no messages.")
    server.signal(signal.SIGSTOP)
    try:
        expect(page.get_by_role("alert")).to_contain_text("The service does not answer.", timeout=40_000)
    finally:
        server.signal(signal.SIGCONT)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_names_of_fields_that_mean_something_in_a_browser(page, tmp_path):
    names = ("replaceChildren", "children", "constructor", "__proto__", "toString", "id")
    columns = "".join(f""", "{name}" TEXT AS (body ->> '{name}')""" for name in names[:-1])
    database(tmp_path, stream_sql("messages", columns) + stream_sql("others"))
    with contextlib.closing(Server(tmp_path)) as server:
        post(server, json.dumps({name: name for name in names}))
        enter(page, server.url)
        expect(page.locator("#rows button")).to_have_text(["1"])
        assert cells(page, 0)[2:7] == list(names[:-1])
        page.get_by_text("Filter", exact=True).click()
        assert [page.locator(f"#field-{n}").input_value() for n in range(5)] == [""] * 5
        page.get_by_role("textbox", name="__proto__").fill("x")
        page.get_by_role("button", name="Show", exact=True).click()
        expect(page.locator("#end")).to_have_text("No message fits the filter.")
        page.get_by_role("textbox", name="__proto__").fill("__proto__")
        page.get_by_role("button", name="Show", exact=True).click()
        expect(page.locator("#rows button")).to_have_text(["1"])
        page.get_by_role("link", name="others").click()
        expect(page.locator("#title")).to_have_text("others")


def test_a_filter_finds_a_large_message_among_others(page, server):
    post(server, '{"sensor": "b"}\n' * 7, "readings", Content_Type="application/x-ndjson")
    post(server, json.dumps({"sensor": "a", "x": "x" * (2**20 - 40)}), "readings")
    post(server, '{"sensor": "b"}\n' * 33, "readings", Content_Type="application/x-ndjson")
    enter(page, f"{server.url}/#readings")
    page.get_by_text("Filter", exact=True).click()
    page.get_by_role("textbox", name="sensor").fill("a")
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.locator("#rows button")).to_have_text(["8"])


def test_no_text_freezes_the_page(page, server):
    """What is to be laid out takes time with the square of the accents on one letter."""
    body = json.dumps({"a": "a" + "\u0301" * 400_000}, ensure_ascii=False)
    post(server, body.encode())
    enter(page, server.url)
    page.get_by_role("button", name="1", exact=True).click()
    expect(page.locator("#rows pre")).not_to_be_empty()
    started = time.monotonic()
    page.evaluate("document.getElementById('scroll').scrollHeight")
    page.get_by_role("button", name="1", exact=True).click()
    expect(page.locator("#rows pre")).to_have_count(0)
    assert time.monotonic() - started < 8


def test_a_view_is_shown_as_it_is_now_also_if_its_last_id_takes_long_to_find(page, tmp_path):
    latest = (
        "CREATE VIEW latest AS SELECT * FROM readings WHERE id IN (SELECT max(id) FROM readings GROUP BY sensor);\n"
    )
    slow = (
        "instr(printf('%.*c', 2000, 'x'), printf('%.*c', 1000, 'x') || (body -> 'n')) = 0"  # about 20 µs for each row
    )
    rare = f"CREATE VIEW rare AS SELECT * FROM readings WHERE {slow} AND body -> 'n' = '7';"
    database(tmp_path, stream_sql("readings", ", sensor TEXT AS (body ->> 'sensor')") + latest + rare)
    with contextlib.closing(Server(tmp_path)) as server:
        for sensor in ("a", "b", "a", "a", "b"):
            post(server, f'{{"sensor": "{sensor}"}}', "readings")
        enter(page, f"{server.url}/#latest")
        expect(page.locator("#rows button")).to_have_text(["5", "4"])
        post(server, '{"sensor": "a"}', "readings")
        expect(page.locator("#rows button")).to_have_text(["6", "5"])
        with database_of(server) as db:
            db.execute("""WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 100000)
                INSERT INTO readings (received_at, client, body) SELECT 'now', 'c', '{"n": ' || n || '}' FROM c""")  # fmt: skip
        assert json.loads(get(server, "/"))["views"]["rare"]["last_id"] is None
        page.get_by_role("link", name="rare").click()
        expect(page.locator("#rows button")).to_have_text(["13"], timeout=60_000)


def test_a_backup_that_was_restored_is_noticed(page, server):
    post_many(server, 20)
    enter(page, server.url)
    expect(page.locator("#rows button").first).to_have_text("20")
    with database_of(server) as db:
        db.execute("DELETE FROM messages WHERE id > 3")
        db.execute("UPDATE sqlite_sequence SET seq = 3 WHERE name = 'messages'")
    post(server, "1")
    expect(page.locator("#rows button")).to_have_text(["4", "3", "2", "1"])


def test_a_slow_report_holds_up_no_other_stream(page, tmp_path):
    endless = "CREATE VIEW endless AS WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) AS n FROM n;"
    database(tmp_path, stream_sql("messages") + endless)
    with contextlib.closing(Server(tmp_path)) as server:
        post(server, "1")
        enter(page, f"{server.url}/#endless")
        expect(page.locator("#end")).to_have_text("Looking…")
        started = time.monotonic()
        page.get_by_role("link", name="messages").click()
        expect(page.locator("#rows button")).to_have_text(["1"])
        assert time.monotonic() - started < 5


def test_older_messages_stay_while_others_come(page, server):
    post_many(server, 200)
    enter(page, server.url)
    expect(page.locator("#rows button").first).to_have_text("200")
    page.get_by_role("button", name="Older messages").click()
    expect(page.locator("#end")).to_have_text("50 older ones were added")
    for n in range(5):
        post_many(server, 50, first=200 + n * 50)
        page.wait_for_timeout(300)
    expect(page.locator("#newer")).to_have_text("Show 250 newer messages")
    assert ids(page) == list(range(200, 100, -1))
    expect(page.locator("#end")).to_have_text("50 older ones were added")


def test_what_to_do_with_a_revoked_token_a_missing_grant_and_a_wrong_one(page, server, tmp_path):
    enter(page, server.url, "wrong")
    expect(page.get_by_role("alert")).to_contain_text("Paste a token that is valid")
    enter(page, server.url, "💥")
    expect(page.get_by_role("alert")).to_contain_text("Paste a token that is valid")
    add_tester(server.database, "writer", "only-writes", "write:messages")
    enter(page, server.url, "only-writes")
    expect(page.locator("#note")).to_have_text("This token may only send here.")
    expect(page.locator("#names b")).to_have_text(["messages"])
    page.get_by_role("button", name="Forget").click()
    enter(page, server.url)
    expect(page.locator("#names b").first).to_have_text("messages")
    assert run(tmp_path, "client", "remove", "tester").returncode == 0
    expect(page.get_by_role("alert")).to_contain_text("This token is not valid here. Paste a token that is valid.")
    assert page.evaluate("sessionStorage.length") == 0
    add_tester(server.database, "nobody", "nothing", "read:no-such-stream")
    enter(page, server.url, "nothing")
    expect(page.get_by_role("alert")).to_contain_text("may use nothing here")


def test_a_service_that_is_stopped_and_started_again(page, server):
    post(server, "1")
    server.arguments += ["--listen", server.address]
    enter(page, server.url)
    expect(page.locator("#rows button")).to_have_text(["1"])
    server.end()
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer.")
    expect(page.locator("#health")).to_have_text("The service does not answer.")
    assert ids(page) == [1]
    server.start()
    post(server, "2")
    expect(page.locator("#rows button").first).to_have_text("2")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("#health")).to_have_text("Messages can be taken")


def test_views_that_fail_and_reads_that_are_slow_are_told(page, tmp_path):
    database(
        tmp_path, stream_sql("messages") + "CREATE VIEW broken AS SELECT abs(-9223372036854775808) AS n FROM messages;"
    )
    with contextlib.closing(Server(tmp_path)) as server:
        post(server, "1")
        enter(page, f"{server.url}/#broken")
        expect(page.get_by_role("alert")).to_contain_text("The SQL of this view fails on what is stored")


@pytest.mark.parametrize("prefix", ["", "/ingest"])
def test_it_works_under_a_path_and_behind_nginx(prefix, page, tmp_path):
    database(tmp_path, SCHEMA)
    flags = ("--prefix", prefix) if prefix else ()
    with (
        contextlib.closing(Server(tmp_path, *flags)) as server,
        nginx(tmp_path, server.address, prefix) as (host, port),
    ):
        for url in (f"http://{host}:{port}{prefix}/", f"{server.url}{prefix}"):
            enter(page, url)
            page.get_by_text("Send a message").click()
            page.get_by_label("Message, as JSON").fill("1")
            page.get_by_role("button", name="Send", exact=True).click()
            expect(page.locator("#sent")).to_contain_text("201")
            expect(page.locator("#health")).to_have_text("Messages can be taken")
            page.get_by_role("button", name="Forget").click()


def test_it_works_inside_of_a_site_that_is_already_there(page, tmp_path):
    """SCRIPT_NAME, as deploy/mounted_flask.py has it."""
    path, port = database(tmp_path, SCHEMA), free_port()
    environ = {"INLET_DATABASE": str(path), "INLET_SCHEMA": str(tmp_path / "schema.sql")}
    environ["PYTHONPATH"] = f"{HERE}:{HERE / 'deploy'}"
    command = [BIN / "gunicorn", "--threads", "8", "-b", f"127.0.0.1:{port}", "mounted_flask:app"]
    with running(command, tmp_path, port, environ, "/ingest/healthz"):
        enter(page, f"http://127.0.0.1:{port}/ingest/")
        page.get_by_text("Send a message").click()
        page.get_by_label("Message, as JSON").fill("1")
        page.get_by_role("button", name="Send", exact=True).click()
        expect(page.locator("#rows button").first).to_have_text("1")


@pytest.mark.parametrize("allowed", [True, False])
def test_a_page_of_another_origin_may_use_the_service_only_if_cors_says_so(allowed, browser, tmp_path):
    database(tmp_path, SCHEMA)

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{other.server_port}"
    flags = ("--cors", f"https://else.example,{origin}") if allowed else ()
    script = """async ([url, token]) => {
        const headers = {Authorization: `Bearer ${token}`, "Content-Type": "application/json", "Idempotency-Key": "k"};
        try {
            const sent = await fetch(`${url}/messages`, {method: "POST", headers, body: "1"});
            const refused = await fetch(`${url}/messages`, {method: "POST", headers, body: "nul"});
            const feed = await fetch(`${url}/messages`, {headers: {Authorization: `Bearer ${token}`}});
            return [sent.status, sent.headers.get("Location"), refused.status, (await refused.json()).line, feed.status];
        } catch (error) { return error.name; }
    }"""
    with contextlib.closing(Server(tmp_path, *flags)) as server, contextlib.closing(browser.new_context()) as context:
        tab = context.new_page()
        tab.goto(origin)
        found = tab.evaluate(script, [server.url, TOKEN])
        with database_of(server) as db:
            (stored,) = db.execute("SELECT count(*) FROM messages").fetchone()
    other.shutdown()
    assert (found, stored) == (([201, "/messages/1", 400, 1, 200], 1) if allowed else ("TypeError", 0))


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (1100, "dark"), (360, "light")])
def test_everybody_can_use_it(width, scheme, page, server):
    """axe-core finds no violation, a phone does not scroll sideways, and the keyboard is enough."""
    axe = (Path(os.environ["INLET_CORPUS"]) / "node_modules" / "axe-core" / "axe.min.js").read_text()
    page.set_viewport_size({"width": width, "height": 740})
    page.emulate_media(color_scheme=scheme)

    def check():
        page.evaluate(axe)
        found = page.evaluate(
            "async () => (await axe.run()).violations.map((it) => [it.id, it.nodes.map((n) => n.html)])"
        )
        assert found == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    post_many(server, 60)
    post(server, '{"sensor": "a", "value": 1}', "readings")
    post(server, json.dumps({"text": "x" * 5000}), X_Who="me")
    page.goto(server.url)
    check()
    page.get_by_label("Token").focus()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    check()
    page.keyboard.type(TOKEN)  # the focus is in the field
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator("#rows button").first).to_have_text("61")

    def tab_to(locator):
        for _ in range(80):
            page.keyboard.press("Tab")
            if locator.evaluate("(it) => it === document.activeElement"):
                return
        raise AssertionError("the keyboard does not come there")

    tab_to(page.locator("summary").first)
    page.keyboard.press("Enter")
    tab_to(page.get_by_label("Message, as JSON"))
    page.keyboard.type("[1,")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#sent")).to_contain_text("400")
    tab_to(page.locator("#rows button").first)
    page.keyboard.press("Enter")
    expect(page.locator("#rows .detail dl")).to_contain_text("x-who")
    check()
    post(server, "1")
    tab_to(page.locator("#older"))
    page.keyboard.press("Enter")
    expect(page.locator("#newer")).to_have_text("Show 1 newer message")
    check()
    page.get_by_role("link", name="readings").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#rows button")).to_have_text(["1"])
    page.get_by_text("Filter", exact=True).click()
    check()
    page.get_by_role("link", name="sensors").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#end")).to_have_text("Rows: 1")
    check()


def picture(path: Path) -> None:
    """Take the picture for README: three sensors that send for a minute."""
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        folder = Path(name)
        database(folder, SCHEMA.replace(EVIL_STREAM, ""))
        with contextlib.closing(Server(folder)) as server:
            tab = browser.new_page(viewport={"width": 1000, "height": 620})
            enter(tab, f"{server.url}/#readings")
            for _ in range(240):
                reading = {"sensor": f"a-{chance.randint(1, 3)}", "value": round(chance.gauss(21, 3), 1), "unit": "C"}
                post(server, json.dumps(reading), "readings")
                time.sleep(chance.choice([0.01, 0.1, 0.4]))
            expect(tab.locator("#rows button").first).to_have_text("240")
            tab.locator("#rows button").nth(2).click()
            tab.screenshot(path=path)
    assert path.stat().st_size < 100_000


if __name__ == "__main__":
    picture(Path(sys.argv[1]))
