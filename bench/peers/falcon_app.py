"""Falcon on waitress with nothing tuned: a connection a thread, one COMMIT for each INSERT."""

import json
import os
import sqlite3
import threading

import falcon
import waitress

local = threading.local()


def get_db():
    if not hasattr(local, "db"):
        local.db = sqlite3.connect(os.environ["BENCH_DATABASE"], timeout=30)
        local.db.execute("PRAGMA synchronous = FULL")
    return local.db


class Messages:
    def on_post(self, req, resp):
        message = req.get_media()
        db = get_db()
        cursor = db.execute(
            "INSERT INTO messages (received_at, client, body) VALUES (datetime('now'), ?, ?)",
            ("default", json.dumps(message)),
        )
        db.commit()
        resp.status = falcon.HTTP_201
        resp.media = {"id": cursor.lastrowid}


app = falcon.App()
app.add_route("/messages", Messages())

if __name__ == "__main__":
    waitress.serve(app, host="127.0.0.1", port=int(os.environ["BENCH_PORT"]))
