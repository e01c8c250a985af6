"""Inlet under /ingest of a Django site that is already there: what to put into the site's wsgi.py."""

from wsgiref.util import shift_path_info

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path

import service

# Your site has its own settings and urls; these make the example complete.
urlpatterns = [path("", lambda request: HttpResponse("the site"))]
if not settings.configured:
    settings.configure(SECRET_KEY="example", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__)

site = get_wsgi_application()


def application(environ, start_response):
    """/ingest and all below it goes to Inlet, the rest to the site."""
    if f"{environ['PATH_INFO']}/".startswith("/ingest/"):
        shift_path_info(environ)
        return service.application(environ, start_response)
    return site(environ, start_response)
