"""A body that has not come whole is never stored, whatever server of deploy/ stands before the service."""

import contextlib
import http.client
import re
import socket
from collections import Counter

import pytest
from common import database, sql
from deployed import SERVERS

from test_service import DEADLINE_S, TOKEN, send

LARGE = 3_000_000  # bytes, more than --max-body
SIZED, CHUNKED = "Content-Length: %d", "Transfer-Encoding: chunked"


def chunk(data: str) -> str:
    return f"{len(data):x}\r\n{data}\r\n"


def cuts(text: str) -> dict[str, tuple[str, str]]:
    """Every way to cut a body, of which this text is a part that is whole in itself: the header, and what is sent."""
    rest, line = len(text) + 9, f"{len(text) + 9:x}\r\n"  # a chunk of which nine bytes are missing
    return {
        "a length, and less": (SIZED % rest, text),
        "a length, and nothing": (SIZED % rest, ""),
        "a length that is one too large": (SIZED % (len(text) + 1), text),
        "a cut between chunks": (CHUNKED, chunk(text)),
        "a cut between two chunks": (CHUNKED, chunk(text[:3]) + chunk(text[3:])),
        "a cut within a chunk": (CHUNKED, line + text),
        "a cut within the second chunk": (CHUNKED, chunk(text) + "9\r\n   "),
        "a cut behind the line of a chunk": (CHUNKED, chunk(text) + "9\r\n"),
        "a cut within the line of a chunk": (CHUNKED, chunk(text) + "9"),
        "a cut within the last chunk": (CHUNKED, chunk(text) + "0\r"),
        "a cut before the line break of a chunk": (CHUNKED, chunk(text).removesuffix("\r\n")),
        "a size that is no number": (CHUNKED, chunk(text) + "x\r\n \r\n0\r\n\r\n"),
        "a size that is negative": (CHUNKED, chunk(text) + "-1\r\n \r\n0\r\n\r\n"),
        "an empty size": (CHUNKED, chunk(text) + "\r\n \r\n0\r\n\r\n"),
        "no line break behind a chunk": (CHUNKED, chunk(text).removesuffix("\r\n") + "0\r\n\r\n"),
        "letters in place of the line break": (CHUNKED, chunk(text).removesuffix("\r\n") + "xx0\r\n\r\n"),
    }


TOO_LARGE = {
    "too large, and less": (SIZED % LARGE, '"' + "x" * (LARGE // 2)),
    "too large, and nothing": (SIZED % LARGE, ""),
    "far too large": (SIZED % (10 * LARGE), '"' + "x" * LARGE),
    "too large in chunks": (CHUNKED, chunk('"' + "x" * LARGE)),
    "too large within a chunk": (CHUNKED, f"{LARGE:x}\r\n" + '"' + "x" * (LARGE // 2)),
}


def answer_to(address, media_type: str, header: str, sent: str, end: str) -> int | None:
    """The status that a request gets, or None. The end is a close, a reset, a close for sending only, or an answer."""
    head = f"POST /messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {media_type}\r\n"
    with socket.create_connection(address, DEADLINE_S) as sock:
        try:
            sock.sendall(f"{head}{header}\r\nConnection: close\r\n\r\n{sent}".encode())
            if end == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            if end in ("reset", "close"):
                return None
            if end == "half-close":
                sock.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: sock.recv(65536), b""))
        except TimeoutError:
            raise
        except OSError:  # it has answered before all had come, and closed
            return None
    found = re.search(rb"\AHTTP/1\.[01] (\d{3}) ", received)
    assert found or not received, received[:100]
    return int(found[1]) if found else None


@pytest.mark.parametrize("name", SERVERS)
def test_a_body_that_has_not_come_whole_is_never_stored(name, tmp_path):
    """Each cut text names its cut, so that the row would show which one was stored. The next message is served."""
    path = database(tmp_path)
    # In a batch, the cut falls behind a whole line, within a line, or behind the last line.
    texts = [("application/json", '"cut %03d"')]
    texts += [("application/x-ndjson", f'"cut %03d"\n{more}') for more in ("", '"b', "1\n")]
    ways = [(media_type, text, what) for media_type, text in texts for what in cuts("")]
    ways += [("application/json", "", what) for what in TOO_LARGE]
    told = []
    with SERVERS[name](path) as address:
        for media_type, text, what in ways:
            for end in ("half-close", "close", "reset"):
                header, sent = TOO_LARGE[what] if what in TOO_LARGE else cuts(text % len(told))[what]
                told.append((media_type, what, end, answer_to(address, media_type, header, sent, end)))
            with contextlib.closing(http.client.HTTPConnection(*address, timeout=DEADLINE_S)) as connection:
                assert send(connection, "POST", "/messages", "1")[0] == 201, (media_type, what)
        for log in (tmp_path / "log", tmp_path / "server-log"):
            assert not log.exists() or "Traceback" not in log.read_text()
    # Only now, for the server has ended: nothing is on its way any more.
    stored = [body for (body,) in sql(path, "SELECT body FROM messages")]
    wrong = [told[int(body[5:8])] for body in stored if "cut" in body]
    assert not wrong, "\n".join(map(str, wrong))
    assert stored == ["1"] * len(ways)
    print(f"{name}: {Counter(status for *_, status in told)}")
    fine = (None, 400, 411, 413)
    if name == "apache":
        fine += (500,)  # mod_wsgi says that itself, as HTML, to a client that sends no more: the service never sees it
    unexpected = [each for each in told if each[3] not in fine]
    assert not unexpected, "\n".join(map(str, unexpected))


@pytest.mark.parametrize("name", SERVERS)
def test_a_chunked_body_that_has_come_whole_is_stored_or_411(name, tmp_path):
    """411 where the server cannot read chunks (Apache, uWSGI), or does not say if they were cut short (granian)."""
    path = database(tmp_path)
    with SERVERS[name](path) as address:
        for sent in (chunk('"whole"'), chunk('"who') + chunk('le"')):
            status = answer_to(address, "application/json", CHUNKED, f"{sent}0\r\n\r\n", "answer")
            # uWSGI closes with what it has not read, so that its answer can be lost.
            assert status in {"apache": [411], "granian": [411], "uwsgi": [411, None]}.get(name, [201])
    stored = sql(path, "SELECT body FROM messages")
    assert stored == ([('"whole"',)] * 2 if status == 201 else [])
