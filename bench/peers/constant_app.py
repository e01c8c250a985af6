"""Inlet's own server answering the same POST with a constant: what is left is HTTP, routing and the body."""

import os
import signal

import falcon

import service


class Messages:
    def on_post(self, req, resp):
        service.read_body(req.env, 1_048_576)
        resp.status = falcon.HTTP_201
        resp.set_header("Location", "/messages/1")
        resp.data = b'{"id": 1, "received_at": "2026-11-22T10:00:00.123Z"}'


class NoStore:
    gather = None


app = falcon.App()
app.add_route("/messages", Messages())

if __name__ == "__main__":
    settings = service.Settings(listen=f"127.0.0.1:{os.environ['BENCH_PORT']}")
    server = service.Server(app, NoStore(), settings)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.run()
