"""HTTP/1.1 without sockets: bytes in, requests out; answers to bytes. RFC 9112, in the style of h11.

A Connection is given what a client sends, as it comes. next_request() returns a Request when it is whole, or when
nothing but its refusal can be answered; None means that more bytes are needed. answer() puts an answer into `output`,
which is to be sent. Requests are answered one after the other.

What two servers in a row could understand differently is refused (RFC 9112, 11.2). What can never become a request is
refused at once. No byte is looked at again and again, however small the pieces are that it comes in.
"""

import io
import re
import sys
import time
from collections.abc import Iterable
from email.utils import formatdate
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

MAX_HEAD_BYTES = 16_384  # also of the trailers of a body
MAX_HEADER_LINES = 100
LONGEST_KEPT_NAME = 64  # bytes of the name of a header
MAX_CHUNK_LINE_BYTES = 1024
FREE_CHUNKS = 1000  # of a body, whatever their size
MIN_CHUNK_BYTES = 16  # on average, of a body with more chunks: a chunk costs 0.5 µs, and a byte 1 ns
LEFT_OUT_BYTES = 64 * 1024 * 1024  # that a client may send after its last answer, because it reads only then

# Possessive quantifiers take one pass. The expressions of waitress 3.0.2 take 29 s for 16 KB of `GET a://111…`.
# A whole head is read as a text in Latin-1, and what is to become one as bytes.
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
REQUEST_LINE = rf"({TOKEN}) ([!-~]++) HTTP/1\.([01])\r\n"
FIELD_LINE = rf"{TOKEN}:[\t -~\x80-\xff]*+\r\n"
FIRST_LINE = re.compile(REQUEST_LINE.encode())
HEAD = re.compile(rf"{REQUEST_LINE}((?:{FIELD_LINE})*+)")
NEVER_IN_A_HEAD = re.compile(rb"[^\t\r\n -~\x80-\xff]|(?<!\r)\n|\r[^\n]")
EMPTY_LINES = re.compile(rb"(?:\r\n)*+")  # before a request: RFC 9112, 2.2
HOST = r"(?:\[[0-9A-Fa-f:.]++\]|[A-Za-z0-9._~!$&'()*+,;=%-]*+)(?::[0-9]*+)?"
HOST_FIELD = re.compile(HOST)
TARGET = re.compile(rf"(?:https?://(?![:/?]){HOST}|(?=[/*]))(\*|/[^?#]*+)?(?:\?([^#]*+))?", re.IGNORECASE | re.ASCII)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*+;[\t -~\x80-\xff]{0,%d}+)?\r\n" % (MAX_CHUNK_LINE_BYTES - 20))
TRAILER_LINE = re.compile(FIELD_LINE.encode())
http_date = lru_cache(maxsize=1)(formatdate)


class Refusal(Exception):
    """What has come can be answered only with this status and sentence, and the connection is of no use after that."""

    def __init__(self, status: int, detail: str):
        super().__init__(detail)
        self.status, self.detail = status, detail


def malformed() -> Refusal:
    return Refusal(400, "The request is not well-formed HTTP/1.1.")


class Request:
    """A request. length: the bytes of its body as the head has them, or None if the body comes in chunks."""

    method, path, query, version = "GET", "/", "", "1.1"
    keeps_alive = True
    expects_continue = False
    length: int | None = 0
    body = b""
    refusal: Refusal | None = None  # the only answer

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}  # by their names in WSGI

    def read(self, head: str) -> None:
        """Take in a head, without the empty line. Refusal 400 or 501; what was understood until then stays."""
        match = HEAD.fullmatch(head)
        target = match and TARGET.fullmatch(match[2])
        if not match or not target:
            raise malformed()
        self.method, self.version = match[1], f"1.{match[3]}"
        self.path, self.query = target[1] or "/", target[2] or ""
        if "%" in self.path:
            self.path = unquote_to_bytes(self.path).decode("latin-1")
        headers = self.headers
        for line in match[4].split("\r\n")[:-1]:
            name, _, value = line.partition(":")
            if key := wsgi_name(name) if len(name) <= LONGEST_KEPT_NAME else new_wsgi_name(name):
                text = value.strip(" \t")
                headers[key] = f"{headers[key]}, {text}" if key in headers else text
        # " " is no host, so it stands for none in HTTP/1.1; two Hosts have been joined with a comma and a space.
        if not HOST_FIELD.fullmatch(headers.get("HTTP_HOST", "" if self.version == "1.0" else " ")):
            raise Refusal(400, "A request has one Host.")
        if "HTTP_CONNECTION" in headers or self.version != "1.1":
            options = members(headers.get("HTTP_CONNECTION", ""))
            self.keeps_alive = "close" not in options and (self.version == "1.1" or "keep-alive" in options)
        self.expects_continue = self.version == "1.1" and headers.get("HTTP_EXPECT", "").lower() == "100-continue"
        self.length = self._body_length()

    def _body_length(self) -> int | None:
        """Return what the headers say about the body: RFC 9112, 6.3. Refusal if that is not clear."""
        length, coding = self.headers.get("CONTENT_LENGTH"), self.headers.pop("HTTP_TRANSFER_ENCODING", None)
        if coding is not None:
            codings = members(coding)
            if length is not None or self.version == "1.0" or "" in codings or "chunked" in codings[:-1]:
                raise Refusal(400, "It is not clear where the body ends.")
            if codings != ["chunked"]:
                raise Refusal(501, "The only Transfer-Encoding here is chunked.")
            return None
        if length is None:
            return 0
        if len(length) > 18 or not (length.isascii() and length.isdigit()):
            raise Refusal(400, "Content-Length is not a number of bytes.")
        return int(length)

    def environ(self, prefix: str, address: str) -> dict[str, Any]:
        """Return the environment of WSGI (PEP 3333). prefix: the path of the app; address: that of the client."""
        path = self.path
        if prefix and (path + "/").startswith(prefix + "/"):
            path = path.removeprefix(prefix)
        environ = {
            "REQUEST_METHOD": self.method,
            "SCRIPT_NAME": prefix,
            "PATH_INFO": path,
            "QUERY_STRING": self.query,
            "REMOTE_ADDR": address,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": f"HTTP/{self.version}",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(self.body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        } | self.headers
        if self.length is None:  # it has come in chunks
            environ["CONTENT_LENGTH"] = str(len(self.body))
        return environ


def members(field: str) -> list[str]:
    """Return the members of a header that is a list with commas, in lower case."""
    return [member.strip(" \t").lower() for member in field.split(",")]


def new_wsgi_name(header: str) -> str:
    """Return the name that WSGI has for a header; empty if it has a "_", which stands for "-" there."""
    name = header.upper().replace("-", "_")
    return "" if "_" in header else name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"


wsgi_name = lru_cache(maxsize=1024)(new_wsgi_name)


class Chunks:
    """A body that comes in chunks: RFC 9112, 7.1."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._left = 0  # bytes of the chunk that is under way
        self._expected = "size"  # what comes next behind that: size, line break, or trailer
        self._count = 0
        self._trailer_bytes = 0

    def take(self, data: bytearray) -> bool:
        """Take out of the input what belongs to the body. Is it whole? Refusal 400 or 431 if it is malformed."""
        at, is_whole = 0, False
        while not is_whole and at < len(data):
            if self._left:
                piece = data[at : at + self._left]
                self.content += piece
                self._left -= len(piece)
                at += len(piece)
            elif self._expected == "size" and (size := CHUNK_LINE.match(data, at)):
                at = self._take_size(size)
            elif self._expected == "line break" and data.startswith(b"\r\n", at):
                self._expected = "size"
                at += 2
            else:
                end = data.find(b"\n", at, at + MAX_CHUNK_LINE_BYTES) + 1
                if not end and len(data) - at < MAX_CHUNK_LINE_BYTES:
                    break
                is_whole = self._take_trailer(bytes(data[at:end]))
                at = end
        del data[:at]
        return is_whole

    def _take_size(self, size: re.Match[bytes]) -> int:
        """Take the line before a chunk; return where it ends."""
        if self._count > FREE_CHUNKS and len(self.content) < self._count * MIN_CHUNK_BYTES:
            raise Refusal(400, f"The chunks of the body have less than {MIN_CHUNK_BYTES} bytes on average.")
        self._count += 1
        self._left = int(size[1], 16)
        self._expected = "line break" if self._left else "trailer"
        return size.end()

    def _take_trailer(self, line: bytes) -> bool:
        """Take a line behind the last chunk. Is it the last one of the body?"""
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MAX_HEAD_BYTES:
            raise Refusal(431, f"The trailers are larger than {MAX_HEAD_BYTES} bytes.")
        if self._expected != "trailer" or not (line == b"\r\n" or TRAILER_LINE.fullmatch(line)):
            raise Refusal(400, "The chunks of the body are malformed.")
        return line == b"\r\n"


class Connection:
    """What one client sends and is sent, in their order, without the socket."""

    def __init__(self) -> None:
        self.request = Request()  # the one that was read last, as far as it could be read
        self.output = bytearray()  # what is to be sent
        # What comes next: head, body, answer, or end (then what the client still sends is left out).
        self.awaits = "head"
        self._limit: int | None = None  # the bytes that the body may have; None: nobody has said
        self.has_ended = False  # will the client send no more?
        self._left_out = 0  # bytes
        self._input = bytearray()
        self._looked = 0  # how far the input was searched for the end of a head
        self._has_first_line = False
        self._chunks: Chunks | None = None

    def receive(self, data: bytes) -> None:
        """Take in what the client has sent. No data: it will send no more."""
        if not data:
            self.has_ended = True
        elif self.awaits == "end":
            self._left_out += len(data)
        else:
            self._input += data

    @property
    def wants_input(self) -> bool:
        is_busy = self.awaits == "answer" or (self.output and self.awaits != "end")
        return not (self.has_ended or is_busy)

    @property
    def is_idle(self) -> bool:
        """Is there no request and no answer that is unfinished?"""
        return not self.output and (self.awaits == "end" or (self.awaits == "head" and not self._input))

    @property
    def is_done(self) -> bool:
        """Is there nothing more to do but to close?"""
        return (self.has_ended and not self.output) or self._left_out > LEFT_OUT_BYTES

    @property
    def held(self) -> int:
        """The bytes that have come of the body that is awaited."""
        return len(self._input) + (len(self._chunks.content) if self._chunks else 0)

    @property
    def asks(self) -> bool:
        """Is a body awaited of which nobody has said yet how large it may be?"""
        return self.awaits == "body" and self._limit is None

    def next_request(self) -> Request | None:
        """Return the next request: when it is whole, when its body is larger than it may be, or to be refused."""
        try:
            if self.awaits == "head" and self._read_head():
                self.awaits, self._limit = "body", None
            if self.awaits != "body" or (body := self._read_body()) is None:
                return None
            self.request.body, self.awaits = body, "answer"
        except Refusal as refusal:
            self.refuse(refusal.status, refusal.detail)
        return self.request

    def admit(self, limit: int) -> None:
        """Say how many bytes the body may have. A client that expects it is told to go on: RFC 9110, 10.1.1."""
        self._limit = limit
        if self.request.expects_continue and (self.request.length or 1) <= limit:
            self.output += b"HTTP/1.1 100 Continue\r\n\r\n"

    def refuse(self, status: int, detail: str) -> Request:
        """Return the request, to be answered with this before it is whole. What has come of its body is thrown away."""
        self._input.clear()
        self._chunks = None
        self.request.refusal, self.request.keeps_alive, self.awaits = Refusal(status, detail), False, "answer"
        return self.request

    def answer(self, status: str, headers: Iterable[tuple[str, str]], content: bytes, closes: bool = False) -> None:
        """Answer the request. closes: is this the last answer, also to a client that would go on?

        Content-Length is set here; headers must not have it.
        """
        closes = closes or not self.request.keeps_alive
        lines = [f"HTTP/1.1 {status}"]
        lines += [f"{name}: {value}" for name, value in headers]
        lines += ["Server: Inlet", f"Date: {http_date(int(time.time()), usegmt=True)}"]
        if self.request.method == "HEAD":
            content = b""
        elif not status.startswith("304"):
            lines.append(f"Content-Length: {len(content)}")
        if closes or self.request.version == "1.0":
            lines.append("Connection: close" if closes else "Connection: keep-alive")
        self.output += "\r\n".join([*lines, "", ""]).encode("latin-1")
        self.output += content
        self.request.body, self._chunks = b"", None  # an idle connection keeps nothing
        if closes:
            self._input.clear()
        self.awaits = "end" if closes else "head"

    def _read_head(self) -> bool:
        """Read the head of the next request when it is whole. Refusal 400, 431 or 501."""
        data = self._input
        if not self._has_first_line and data.startswith(b"\r\n"):
            del data[: EMPTY_LINES.match(data).end()]  # type: ignore[union-attr]  # it matches anything
            self._looked = 0
        end = data.find(b"\r\n\r\n", max(0, self._looked - 3))
        if end > MAX_HEAD_BYTES or (end < 0 and len(data) > MAX_HEAD_BYTES + 3):
            raise Refusal(431, f"The headers are larger than {MAX_HEAD_BYTES} bytes.")
        if end < 0:
            self._refuse_early(max(0, self._looked - 1))
            self._looked = len(data)
            return False
        self.request, self._looked, self._has_first_line = Request(), 0, False
        if data.count(b"\n", 0, end) > MAX_HEADER_LINES:
            raise Refusal(431, f"There are more than {MAX_HEADER_LINES} headers.")
        self.request.read(data[: end + 2].decode("latin-1"))
        del data[: end + 4]
        self._chunks = Chunks() if self.request.length is None else None
        return True

    def _refuse_early(self, start: int) -> None:
        """Raise Refusal if the beginning of a head, of which the bytes from start on are new, can never become one."""
        data = self._input
        if NEVER_IN_A_HEAD.search(data, start):
            raise malformed()
        if not self._has_first_line:
            self._has_first_line = data.find(b"\r\n", start) >= 0
            if not (FIRST_LINE.match(data) if self._has_first_line else data[start:].isascii()):
                raise malformed()

    def _read_body(self) -> bytes | None:
        """Return the body when it is whole, or what there is of it when it is too large. Refusal 400 or 431."""
        chunks = self._chunks
        if chunks:
            is_whole, size = chunks.take(self._input), len(chunks.content)
        else:
            size = self.request.length or 0
            is_whole = len(self._input) >= size
        if not is_whole:
            if self._limit is None or (self._limit > 0 and size <= self._limit):
                return None
            self.request.keeps_alive = False
        if chunks:
            self._chunks = None
            return bytes(chunks.content)
        body = bytes(memoryview(self._input)[:size]) if is_whole else b""
        del self._input[:size]
        return body
