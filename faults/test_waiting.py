"""Crowds that wait for a message."""

import contextlib
import time

from common import Server, database, timed, wait_until

from test_service import AUTHORIZATION, send, stream_sql

HEAD = "Host: a\r\nAuthorization: " + AUTHORIZATION["Authorization"] + "\r\n\r\n"


def test_beyond_a_thousand_and_for_who_has_gone_nothing_is_held(tmp_path):
    database(tmp_path)
    server = Server(tmp_path)
    waiting = f"GET /messages?wait=60 HTTP/1.1\r\n{HEAD}".encode()
    crowd = [server.socket(waiting) for _ in range(1000)]

    def is_answered_at_once():
        with contextlib.closing(server.connect()) as connection:
            return timed(lambda: send(connection, "GET", "/messages?wait=2"))[1] < 1

    def is_full():
        crowd.append(server.socket(waiting))  # the last try may have been one of the thousand
        return is_answered_at_once()

    wait_until(is_full, "more than a thousand are held")
    for sock in crowd:
        sock.close()
    wait_until(lambda: not is_answered_at_once(), "there is no room again")
    assert server.end() == 0


def test_a_thousand_that_nothing_fits_cost_the_senders_little(tmp_path):
    """Each message wakes all of them."""
    database(tmp_path, stream_sql("messages", ", n INTEGER AS (body ->> 'n')"))
    server = Server(tmp_path)

    def sent_in(seconds):
        until, count = time.monotonic() + seconds, 0
        with contextlib.closing(server.connect()) as connection:
            while time.monotonic() < until:
                assert send(connection, "POST", "/messages", "1")[0] == 201
                count += 1
        return count

    sent_in(1)
    alone = sent_in(3)
    crowd = [server.socket(f"GET /messages?n=7&wait=60 HTTP/1.1\r\n{HEAD}".encode()) for _ in range(990)]
    time.sleep(2)
    beside = sent_in(3)
    print(f"{alone} messages alone, {beside} beside 990 that wait")
    assert beside > 0.4 * alone
    for sock in crowd:
        sock.close()
    assert server.end() == 0


def test_a_crowd_with_a_filter_without_an_index_holds_up_nobody(tmp_path):
    """Each of 100 waits with a filter reads the whole table once, and not again at each message."""
    database(tmp_path)
    server = Server(tmp_path)
    with contextlib.closing(server.connect()) as connection:
        for _ in range(15):
            lines = "1\n" * 10_000
            assert send(connection, "POST", "/messages", lines, Content_Type="application/x-ndjson")[0] == 201
    crowd = [server.socket(f"GET /messages?bad=7&wait=60 HTTP/1.1\r\n{HEAD}".encode()) for _ in range(100)]
    wait_until(
        lambda: timed(lambda: send(server.connect(), "GET", "/messages?bad=1&after=150000"))[1] < 0.5, "first reads", 60
    )
    for _ in range(3):
        with contextlib.closing(server.connect()) as connection:
            assert send(connection, "POST", "/messages", "1")[0] == 201
            taken_s = timed(lambda: send(connection, "GET", "/messages?bad=1&after=150000"))[1]
        assert taken_s < 2, taken_s
    for sock in crowd:
        sock.close()
    assert server.end() == 0
