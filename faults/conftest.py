"""What holds for every test of this folder."""

import pytest
from common import Server


@pytest.fixture(autouse=True)
def no_server_outlives_its_test():
    yield
    while Server.started:
        Server.started.pop().kill()
