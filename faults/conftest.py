"""What holds for every test of this folder."""

import pytest
from common import Server, database


@pytest.fixture(autouse=True)
def no_server_outlives_its_test():
    yield
    while Server.started:
        Server.started.pop().kill()


@pytest.fixture
def server(tmp_path):
    """A server that has to end well, without a traceback."""
    database(tmp_path)
    server = Server(tmp_path)
    yield server
    assert server.end() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
