"""/metrics, for Prometheus."""

import time

from test_service import AUTHORIZATION, BATCH, READING, add_tester, change


def metrics(client):
    """The samples of /metrics: name with labels → value."""
    answer = client.get("/metrics")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in answer.text.splitlines() if line[0] != "#"
    }


def test_metrics_count_what_was_stored_and_refused(client, store):
    before = metrics(client)
    for status in (201, 503):  # an alert needs a zero before the first
        assert before[f'inlet_requests_total{{stream="messages",status="{status}"}}'] == 0
    assert before['inlet_messages_total{stream="readings"}'] == 0
    for body, status in ((READING, 201), (READING, 201), ("{}", 422), ("no", 400)):
        assert client.post("readings", body).status_code == status
    client.post("messages", "1\n2\n3", **BATCH)
    change(store, "DELETE FROM readings")
    after = metrics(client)
    assert after['inlet_messages_total{stream="readings"}'] == 2  # also of what was deleted, and in other processes
    assert after['inlet_messages_total{stream="messages"}'] == 3
    counted = {"201": 2, "422": 1, "400": 1}
    for status, count in counted.items():
        assert after[f'inlet_requests_total{{stream="readings",status="{status}"}}'] == count
    assert after['inlet_refused_total{client="tester",status="422"}'] == 1
    assert after["inlet_disk_free_bytes"] > 0
    assert after["inlet_commits_total"] == after["inlet_commit_duration_seconds_count"] == 5
    assert after["inlet_messages_per_commit_sum"] == 5
    assert after['inlet_messages_per_commit_bucket{le="+Inf"}'] == 5
    assert 0 < after["inlet_commit_duration_seconds_sum"] < 4
    assert after["inlet_database_bytes"] > 0 < after["inlet_wal_bytes"]
    assert after["inlet_waiting"] == 0
    assert abs(time.time() - after["process_start_time_seconds"]) < 3600
    assert after["process_resident_memory_bytes"] > 10_000_000


def test_refusals_are_counted_by_client_and_of_a_thousand_at_most(client, store):
    add_tester(store.database.path, 'a "b"\\\n', "odd", "read")
    assert client.post("messages", "1", Authorization="Bearer odd").status_code == 403
    assert metrics(client)['inlet_refused_total{client="a \\"b\\"\\\\\\n",status="403"}'] == 1
    for n in range(2000):
        store.statistics.answered("messages", 422, client=f"c{n}")
    counted = {name: n for name, n in metrics(client).items() if name.startswith("inlet_refused_total")}
    assert 1000 < len(counted) <= 1002
    assert counted['inlet_refused_total{client="others",status="422"}'] > 990


def test_metrics_can_be_read_while_the_database_cannot(client, store):
    client.post("messages", "1")
    path = store.database.path
    path.rename(path.with_suffix(".away"))
    seen = metrics(client)
    assert not any(name.startswith("inlet_messages_total") for name in seen)
    assert (seen["inlet_database_bytes"], seen["inlet_commits_total"]) == (0, 1)


def test_metrics_need_a_grant_for_everything(client, store):
    add_tester(store.database.path, "writer", "w", "write read:messages")
    assert client.get("/metrics", Authorization="Bearer w").status_code == 403
    assert client.simulate_get("/metrics").status_code == 401


def test_a_probe_may_ask_by_head(client):
    assert client.simulate_head("/metrics", headers=AUTHORIZATION).status_code == 200
