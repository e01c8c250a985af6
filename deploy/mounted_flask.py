"""Inlet under /ingest of a Flask site that is already there; `app` goes to whatever serves the site, with threads."""

from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import service

app = Flask(__name__)


@app.get("/")
def index():
    return "the site"


app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/ingest": service.application})
