"""Sanic with the sqlite3 module: one process, one connection, one COMMIT for each INSERT."""

import json
import os
import sqlite3

from sanic import Sanic
from sanic.response import json as answer

app = Sanic("bench")


@app.before_server_start
async def connect(app):
    app.ctx.db = sqlite3.connect(os.environ["BENCH_DATABASE"], timeout=30)
    app.ctx.db.execute("PRAGMA synchronous = FULL")


@app.post("/messages")
async def create(request):
    db = app.ctx.db
    cursor = db.execute(
        "INSERT INTO messages (received_at, client, body) VALUES (datetime('now'), ?, ?)",
        ("default", json.dumps(request.json)),
    )
    db.commit()
    return answer({"id": cursor.lastrowid}, status=201)


if __name__ == "__main__":
    app.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), single_process=True, access_log=False)
