# What mod_wsgi loads. Its processes do not get the environment of a shell, so the settings stand here.
import os

os.environ.setdefault("INLET_DATABASE", "/var/lib/inlet/inlet.db")

from service import application  # noqa: E402, F401
