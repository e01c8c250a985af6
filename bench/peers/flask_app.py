"""Flask, with the database as its tutorial has it (https://flask.palletsprojects.com/tutorial/database/)."""

import os
import sqlite3

from flask import Flask, g, request

app = Flask(__name__)


def get_db():
    if "db" not in g:
        g.db = sqlite3.connect(os.environ["BENCH_DATABASE"], timeout=30)
        g.db.execute("PRAGMA synchronous = FULL")
    return g.db


@app.teardown_appcontext
def close_db(error):
    db = g.pop("db", None)
    if db is not None:
        db.close()


@app.post("/messages")
def create():
    message = request.get_json()
    db = get_db()
    cursor = db.execute(
        "INSERT INTO messages (received_at, client, body) VALUES (datetime('now'), ?, ?)",
        ("default", app.json.dumps(message)),
    )
    db.commit()
    return {"id": cursor.lastrowid}, 201
