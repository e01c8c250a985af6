"""The command forward: follow a stream of an Inlet, and POST each message to a URL, in order, until it is taken.

A message goes out signed, as Standard Webhooks has it (https://www.standardwebhooks.com), its body byte for byte. It is
sent again, after growing pauses, until the target answers 2xx. A crash of any side can repeat it; then it has the same
webhook-id, STREAM-ID. What the target refuses for good (other 4xx than those of TRY_AGAIN) goes into a file, and the
next message follows. 410 ends the command.

The token that reads comes from INLET_TOKEN, and the secret that signs from INLET_SECRET, or from the files that are
named by INLET_TOKEN_FILE and INLET_SECRET_FILE. It reads over HTTP, so it may run anywhere.
"""

import argparse
import base64
import fcntl
import hashlib
import hmac
import http.client
import json
import logging
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import SplitResult, urlsplit

from service import (
    JSON,
    JSON_DECODER,
    MAX_ID,
    STOP_SIGNALS,
    SetupError,
    __version__,
    secret_in,
    shown,
    sync_directory,
    unix_path,
    utc_now,
)

log = logging.getLogger("inlet")

WAIT_S = 30  # that a read waits for a message
PAUSE_S = 1.0  # before the next read, where the server cannot wait
TIMEOUT_S = 30.0  # for an answer, beyond WAIT_S
LONGEST_PAUSE_S = 60.0  # between two tries, unless Retry-After asks for more
LONGEST_RETRY_AFTER_S = 3600
LARGEST_PAGE = 1_100_000_000  # bytes: what --max-body can be, and more
LARGEST_ANSWER = 1024 * 1024  # of the target
FAILURES = (OSError, http.client.HTTPException, ValueError)  # ValueError: such as a chunk of a size below 0
# The first four are about the URL or the secret: one that is wrong must not put a whole stream aside.
TRY_AGAIN = (401, 403, 404, 405, 408, 425, 429)
GONE = 410
CURSOR = re.compile(r"(\d{19})\n(.*)\n(.*)\n")  # the id, the stream, the target
WHITE_SPACE = " \t\r\n"  # of JSON


class Refused(Exception):
    """The other side will not take this. The text is its answer."""

    def __init__(self, status: int, answer: bytes):
        super().__init__(answer.decode(errors="replace"))
        self.status = status


class Message(NamedTuple):
    id: int
    body: bytes
    envelope: str


class Answer(http.client.HTTPResponse):
    """http.client of Python 3.11 to 3.14 leaves out 100, and takes any other 1xx for the answer (RFC 9110, 15.2)."""

    def _read_status(self) -> tuple[str, int, str]:
        status = super()._read_status()  # type: ignore[misc]
        while 100 < status[1] < 200:
            http.client.parse_headers(self.fp)
            status = super()._read_status()  # type: ignore[misc]
        return status


class Peer:
    """A server that is asked again and again until it answers, over one connection."""

    def __init__(self, url: SplitResult, timeout_s: float, largest: int):
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(url.hostname or "", url.port, timeout=timeout_s)
        self._connection.response_class = Answer
        self._name, self._timeout_s, self._largest = url.netloc, timeout_s, largest

    def ask(self, method: str, target: str, body: bytes | None, headers: Callable[[], dict[str, str]]) -> bytes:
        """Return the answer, if it is 2xx, however long that takes; Refused if it will never be."""
        pause_s = 0.1
        while True:
            asked_for = ""
            try:
                status, asked_for, content = self._try(method, target, body, headers())
                if 200 <= status < 300:
                    return content
                if 400 <= status < 500 and status not in TRY_AGAIN:
                    raise Refused(status, content)
                reason = f"it answers {status}"
            except FAILURES as error:
                self._connection.close()
                reason = shown(f"{type(error).__name__}: {error}", 200)
            wanted_s = min(int(asked_for), LONGEST_RETRY_AFTER_S) if re.fullmatch(r"\d{1,9}", asked_for) else 0
            log.warning("%s: %s; trying again", self._name, reason)
            time.sleep(max(pause_s, wanted_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _try(self, method: str, target: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """Return the status, Retry-After and the content. It takes at most the time-out, whatever comes meanwhile."""
        connection, content = self._connection, bytearray()
        if connection.sock and select.select([connection.sock], [], [], 0)[0]:
            connection.close()  # the other side has closed it, or has said what is no answer to this
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s)
        try:
            connection.request(method, target, body, headers)
            answer = connection.getresponse()
            is_taken = method == "POST" and 200 <= answer.status < 300  # whatever it still says
            with suppress(*FAILURES) if is_taken else nullcontext():
                while (piece := answer.read1(65_536)) and len(content) <= self._largest:
                    content += piece
            if answer.length == 0:
                answer.close()
            if not answer.isclosed():
                connection.close()
            return answer.status, answer.headers.get("Retry-After", "").strip(), bytes(content)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


class Cursor:
    """The file that says which message was taken last, and for whom. Another process cannot use it meanwhile."""

    def __init__(self, path: Path, stream: str, target: str):
        self.refused_path = path.with_name(f"{path.name}.refused")
        try:
            if not path.exists():
                make_cursor(path, f"{0:019}\n{stream}\n{target}\n")
            self._fd = os.open(path, os.O_RDWR)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(f"another process uses {path}") from None
        except OSError as error:
            raise SetupError(f"{path} cannot be used: {error}") from None
        text = os.pread(self._fd, 65_536, 0).decode(errors="replace")
        found = CURSOR.fullmatch(text)
        if not found:
            raise SetupError(f"{path} is no cursor")
        if found.groups()[1:] != (stream, target):
            raise SetupError(f"{path} belongs to {found[2]} and {found[3]}: --cursor names another one")
        self.after = int(found[1])

    def advance(self, message_id: int) -> None:
        """Note that a message was taken. The digits are in one sector of the disk, which is written whole or not."""
        os.pwrite(self._fd, b"%019d" % message_id, 0)
        os.fsync(self._fd)
        self.after = message_id

    def keep_refused(self, message: Message, refusal: Refused) -> None:
        """Append a message that was refused for good, with the answer, to a file of one JSON object a line."""
        head = json.dumps({"refused_at": utc_now(), "status": refusal.status, "answer": str(refusal)[:10_000]})
        line = f'{head[:-1]}, "message": {message.envelope}}}'.replace("\n", " ").replace("\r", " ")
        with suppress(FileNotFoundError), open(self.refused_path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            line = line if file.read() in (b"", b"\n") else f"\n{line}"  # a crash has cut the last one
        try:
            write_synced(self.refused_path, f"{line}\n", os.O_APPEND)
        except OSError as error:
            raise SetupError(f"{self.refused_path} cannot be written: {error}") from None


def make_cursor(path: Path, text: str) -> None:
    """Make a file that is never there without its text: a crash must not leave one that cannot be used."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    write_synced(new, text, os.O_TRUNC)
    with suppress(FileExistsError):  # another process has made it meanwhile
        os.link(new, path)
    new.unlink()
    sync_directory(path.absolute().parent)


def write_synced(path: Path, text: str, flags: int) -> None:
    """Write to a file, which may be new, and sync it."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.absolute().parent)


def run(stream: str, to: str, options: argparse.Namespace) -> int:
    """Forward until the target answers 410, or the process is told to stop; the exit status.

    Raises SetupError if the settings make no sense, or a file cannot be written.
    """
    source, target = url_of(stream_url(stream, options)), url_of(to)
    name = source.path.rstrip("/").rpartition("/")[2]
    token = given("INLET_TOKEN", "a token that may read")
    key = key_of(given("INLET_SECRET", "a secret that signs, as whsec_…"))
    cursor = Cursor(Path(options.cursor or f"{name}.cursor"), source.geturl(), to)
    signal.signal(signal.SIGALRM, took_too_long)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    log.info("forwarding %s after id %d to %s", name, cursor.after, target.netloc)
    peer = Peer(target, TIMEOUT_S, LARGEST_ANSWER)
    path = target._replace(scheme="", netloc="", path=target.path or "/").geturl()
    for message in messages(source, token, cursor):
        webhook_id = f"{name}-{message.id}"
        try:
            peer.ask("POST", path, message.body, lambda: signed(webhook_id, message.body, key))  # noqa: B023
        except Refused as refusal:
            if refusal.status == GONE:
                print(f"inlet: {target.hostname} answers 410 Gone: it wants no more messages", file=sys.stderr)
                return 1
            log.warning("message %d is refused: %d; it is in %s", message.id, refusal.status, cursor.refused_path)
            cursor.keep_refused(message, refusal)
        cursor.advance(message.id)
    return 0


def took_too_long(*_: Any) -> NoReturn:
    raise TimeoutError("no answer in time")


def messages(source: SplitResult, token: str, cursor: Cursor) -> Iterator[Message]:
    """Yield each message after the cursor, in order, for ever; SetupError if they can never be read."""
    peer = Peer(source, WAIT_S + TIMEOUT_S, LARGEST_PAGE)
    headers = {"Authorization": f"Bearer {token}", "Accept": JSON}
    while True:
        began = time.monotonic()
        query = "&".join(filter(None, [f"after={cursor.after}&wait={WAIT_S}", source.query]))
        try:
            page = peer.ask("GET", f"{source.path}?{query}", None, lambda: headers).decode()
            found = list(messages_in(page))
            ids = [cursor.after, *(message.id for message in found)]
            if any(later <= earlier for earlier, later in pairwise(ids)):
                raise ValueError("ids that do not grow")
        except Refused as refusal:
            raise SetupError(f"{source.path} cannot be read: {refusal.status} {shown(str(refusal), 300)}") from None
        except (ValueError, LookupError, RecursionError) as error:
            log.warning("%s does not answer with its feed (%s); trying again", source.netloc, type(error).__name__)
            found = []
        yield from found
        if not found:
            time.sleep(max(0.0, PAUSE_S - (time.monotonic() - began)))


def messages_in(page: str) -> Iterator[Message]:
    """Yield the messages of a page, with their bodies as they were sent: nothing reads and writes them anew."""
    start = page.find("[") + 1
    if not page.startswith('{"messages": ['):
        raise ValueError("it is not the feed of an Inlet")
    while page[start] == "{":
        position, found = start, {}
        while page[position] in "{,":
            name, end = JSON_DECODER.raw_decode(page, position + (1 if page[position] == "{" else 2))
            value_at = end + 2  # behind ": "
            _, end = JSON_DECODER.raw_decode(page, value_at + len(leading(page, value_at)))
            position = end + len(leading(page, end))
            found[str(name)] = page[value_at:position]
        if not 0 < int(found["id"]) <= MAX_ID:
            raise ValueError("there is no such id")
        yield Message(int(found["id"]), found["body"].encode(), page[start : position + 1])
        start = position + (3 if page[position + 1] == "," else 1)


def leading(text: str, start: int) -> str:
    """Return the white space that a text has there."""
    end = start
    while text[end] in WHITE_SPACE:
        end += 1
    return text[start:end]


def signed(webhook_id: str, body: bytes, key: bytes) -> dict[str, str]:
    """Return the headers of a message: standard-webhooks/spec, `Webhook headers`."""
    now = str(int(time.time()))
    digest = hmac.digest(key, f"{webhook_id}.{now}.".encode() + body, hashlib.sha256)
    signature = f"v1,{base64.b64encode(digest).decode()}"
    about = {"Content-Type": JSON, "User-Agent": f"Inlet/{__version__}"}
    return about | {"webhook-id": webhook_id, "webhook-timestamp": now, "webhook-signature": signature}


def stream_url(stream: str, options: argparse.Namespace) -> str:
    """Return the URL of a stream: STREAM itself, or that of a name at --listen."""
    if "://" in stream or unix_path(options.listen):
        return stream
    return f"http://{options.listen}{options.prefix}/{stream}"


def url_of(text: str) -> SplitResult:
    """Return a URL; SetupError if it is none that can be asked."""
    with suppress(ValueError):
        url = urlsplit(text)
        has_host = url.hostname and url.hostname.encode("idna") and url.port != 0 and "@" not in url.netloc
        if url.scheme in ("http", "https") and has_host and not re.search(r"[^!-~]", text):
            return url._replace(fragment="")
    hint = "with neither a password nor a space in it"
    raise SetupError(f"forward takes a STREAM (its name, or its http:// or https:// URL) and a URL to send to, {hint}")


def given(name: str, what: str) -> str:
    """Return a token or secret from the environment, or the file that is named there; SetupError if there is none."""
    text = secret_in(name)
    if not re.fullmatch(r"[!-~]+", text):
        raise SetupError(f"forward needs {name}, or {name}_FILE: {what}")
    return text


def key_of(secret: str) -> bytes:
    """Return the key of a secret as Standard Webhooks writes it: whsec_ and base64."""
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError:
        raise SetupError("INLET_SECRET has to be whsec_ and base64") from None
