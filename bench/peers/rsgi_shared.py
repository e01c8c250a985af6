"""granian's own interface, RSGI, as an expert uses it: all messages that wait share one transaction, in a thread."""

import hmac
import json
import os
import sqlite3
from datetime import UTC, datetime

TOKEN = "Bearer bench-secret"
INSERT = "INSERT INTO messages (received_at, client, body) VALUES (?, 'default', ?)"
JSON = [("content-type", "application/json")]


class Application:
    def __rsgi_init__(self, loop):
        self.loop = loop
        self.db = sqlite3.connect(os.environ["BENCH_DATABASE"], isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA synchronous = FULL")
        self.waiting = []  # a body and the future of its id
        self.writing = None

    async def __rsgi__(self, scope, protocol):
        if scope.method != "POST" or scope.path != "/messages":
            protocol.response_empty(404, [])
            return
        if not hmac.compare_digest(scope.headers.get("authorization") or "", TOKEN):
            protocol.response_empty(401, [])
            return
        try:
            body = (await protocol()).decode()
            json.loads(body)
        except (ValueError, RecursionError):
            protocol.response_str(400, JSON, '{"title": "Not JSON"}')
            return
        stored = self.loop.create_future()
        self.waiting.append((body, stored))
        if self.writing is None:
            self.writing = self.loop.create_task(self.write_all())
        if row_id := await stored:
            protocol.response_str(201, JSON, f'{{"id": {row_id}}}')
        else:
            protocol.response_str(422, JSON, '{"title": "Refused"}')

    async def write_all(self):
        while self.waiting:
            group, self.waiting = self.waiting, []
            try:
                ids = await self.loop.run_in_executor(None, self.write, [body for body, _ in group])
            except sqlite3.Error as error:
                for _, stored in group:
                    stored.set_exception(error)
            else:
                for (_, stored), row_id in zip(group, ids, strict=True):
                    stored.set_result(row_id)
        self.writing = None

    def write(self, bodies):
        now = datetime.now(UTC).isoformat()
        self.db.execute("BEGIN IMMEDIATE")
        try:
            ids = [self.insert(now, body) for body in bodies]
            self.db.execute("COMMIT")
        except sqlite3.Error:
            self.db.rollback()
            raise
        return ids

    def insert(self, now, body):
        """The id, or None if a rule refuses it."""
        try:
            return self.db.execute(INSERT, (now, body)).lastrowid
        except sqlite3.IntegrityError:
            return None


application = Application()
