"""A server that answers the POST with a constant, so that what is left is HTTP and the body.

python constant_app.py SERVER APP: SERVER is inlet (the Server of the service.py on the path) or waitress as it comes;
APP is wsgi (nothing but the answer) or falcon (with a route, as Inlet has it).
"""

import inspect
import os
import signal
import sys
import types

import falcon
import waitress

BODY = b'{"id": 1, "received_at": "2026-11-22T10:00:00.123Z"}'
HEADERS = [
    ("Content-Type", "application/json"),
    ("Location", "/messages/1"),
    ("Content-Length", str(len(BODY))),
]  # fmt: skip
LISTEN = f"127.0.0.1:{os.environ['BENCH_PORT']}"


def read_body(environ):
    return environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))


def wsgi_app(environ, start_response):
    read_body(environ)
    start_response("201 Created", HEADERS)
    return [BODY]


class Messages:
    def on_post(self, req, resp):
        read_body(req.env)
        resp.status = falcon.HTTP_201
        resp.set_header("Location", "/messages/1")
        resp.data = BODY


def falcon_app():
    app = falcon.App()
    app.add_route("/messages", Messages())
    return app


def serve_with_inlet(app):
    import service

    if hasattr(service, "Server"):  # before the server was an extra
        serve_with_older_inlet(app, service)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, service.STOP_SIGNALS)
    newer = {"is_due": lambda: False} if "is_due" in inspect.signature(service.extra("loop").Server).parameters else {}
    server = service.extra("loop").Server(
        app,
        service.listening_sockets(LISTEN),
        admit=lambda environ: (1_048_576, None),
        after_turn=lambda: None,
        lane_of=lambda path, query: 0,
        lanes=(8,),
        prefix="",
        room=64 * 1024 * 1024,
        most_connections=4096,
        **newer,
    )
    server.run(service.STOP_SIGNALS)


def serve_with_older_inlet(app, service):
    # What a Server can be made of; each version takes those that its constructor names. An older one wants a store.
    parts = {
        "app": app,
        "store": types.SimpleNamespace(queue=[], statistics=types.SimpleNamespace(tell=lambda: None)),
        "settings": service.Settings(listen=LISTEN),
        "authenticate": lambda *_: None,
    }
    wanted = inspect.signature(service.Server).parameters
    if hasattr(service, "STOP_SIGNALS"):
        signal.pthread_sigmask(signal.SIG_BLOCK, service.STOP_SIGNALS)
    else:
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server = service.Server(**{name: part for name, part in parts.items() if name in wanted})
    server.run()


if __name__ == "__main__":
    _, server_name, app_name = sys.argv
    app = {"wsgi": wsgi_app, "falcon": falcon_app()}[app_name]
    if server_name == "inlet":
        serve_with_inlet(app)
    else:
        waitress.serve(app, listen=LISTEN)
