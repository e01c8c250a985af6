"""The fixtures of test_service.py, for the tests of the extras."""

from test_service import (
    any_server,
    client,
    command,
    hasty_clients,
    one_line_error,
    open_store,
    schemas,
    server,
    server_with,
    store,
)

__all__ = [
    "any_server",
    "client",
    "command",
    "hasty_clients",
    "one_line_error",
    "open_store",
    "schemas",
    "server",
    "server_with",
    "store",
]
