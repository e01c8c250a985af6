"""Django in one file: a model, a view, the ORM (https://docs.djangoproject.com/en/5.2/ref/databases/#sqlite-notes)."""

import json
import os

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import models
from django.http import JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

settings.configure(
    SECRET_KEY="bench",
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    # What `django-admin startproject` writes.
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "django.contrib.messages",
    ],
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ["BENCH_DATABASE"],
            "OPTIONS": {
                "timeout": 30,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL",
            },
        }
    },
)
django.setup()


class Message(models.Model):
    received_at = models.DateTimeField(auto_now_add=True)
    client = models.TextField()
    key = models.TextField(null=True)
    body = models.JSONField()

    class Meta:
        app_label = "bench"
        db_table = "messages"


@csrf_exempt
@require_POST
def create(request):
    message = Message.objects.create(client="default", body=json.loads(request.body))
    return JsonResponse({"id": message.pk}, status=201)


urlpatterns = [path("messages", create)]
application = get_wsgi_application()
