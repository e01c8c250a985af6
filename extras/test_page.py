"""The page for browsers that ask for /."""

import base64
import contextlib
import hashlib
import re

import service
from test_service import HERE, client_of, send

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def test_a_browser_gets_the_page_and_everybody_else_json(client):
    page = client.simulate_get("/", headers={"Accept": BROWSER})
    assert (page.status_code, page.content) == (200, (HERE / "extras" / "page.html").read_bytes())
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "no-referrer"
    assert page.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    policy = dict(rule.split(" ", 1) for rule in page.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"]
    assert set(policy["script-src"].split()) == {
        f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
        for part in re.findall(r"<script>(.*)</script>|<style>(.*)</style>", page.text, re.DOTALL)
        for part in filter(None, part)
    }
    for accept in (
        "*/*",
        "application/json",
        "application/json, text/html;q=0.5",
        "",
        BROWSER,
    ):  # with a token, also to a browser
        answer = client.get("/", Accept=accept)
        assert (answer.json["service"], answer.headers["Vary"], page.headers["Vary"]) == ("Inlet", "Accept", "Accept")
    for method, path in (("GET", "/messages"), ("POST", "/"), ("GET", "/nothing"), ("OPTIONS", "/")):
        answer = client.simulate_request(method, path, headers={"Accept": BROWSER})
        assert (answer.status_code, answer.headers["Content-Type"]) == (401, "application/problem+json")


def test_a_browser_asks_for_the_page_again_only_if_it_has_changed(any_server):
    with contextlib.closing(any_server.connect()) as connection:
        _, headers, content = send(connection, "GET", "/", Accept=BROWSER, Authorization="")
        for method, asked, wanted in (
            ("GET", "", 200),
            ("GET", headers["ETag"], 304),
            ("GET", f"W/{headers['ETag']}", 304),
            ("GET", "*", 304),
            ("HEAD", "", 200),
        ):
            status, again, data = send(connection, method, "/", Accept=BROWSER, If_None_Match=asked, Authorization="")
            assert (status, again["ETag"], data) == (
                wanted,
                headers["ETag"],
                content if (method, wanted) == ("GET", 200) else b"",
            )
            assert again["Content-Length"] == (None if wanted == 304 else str(len(content)))


def test_without_the_file_there_is_no_page(store, monkeypatch, tmp_path):
    monkeypatch.setattr(service.extra("page"), "__file__", str(tmp_path / "page.py"))
    answer = client_of(store).simulate_get("/", headers={"Accept": BROWSER})
    assert (answer.status_code, answer.headers["Content-Type"]) == (401, "application/problem+json")
    assert client_of(store).get("/", Accept=BROWSER).json["service"] == "Inlet"


def test_what_is_refused_gets_no_page(any_server):
    assert any_server.answers(b"GET / HTTP/1.1\r\nAccept: text/html\r\n\r\n")[0] == [400]


def test_who_takes_neither_the_page_nor_json_is_told(client):
    assert client.simulate_get("/", headers={"Accept": "text/plain"}).status_code == 401
    assert client.get("/", Accept="text/plain").status_code == 406
