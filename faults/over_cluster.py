"""A plugin of pytest that lets the tests of service.py and its extras run over a cluster.

INLET_CLUSTER=http://… pytest -p over_cluster test_service.py extras

Each test begins with an empty cluster. In place of a path, it is given to the store and to the servers; what the tests
read and write by hand goes there as well.
"""

import contextlib
import os
import re
import sqlite3
import sys
import time

import pytest

import service
import test_service

rqlite = service.extra("rqlite")
CLUSTER = os.environ["INLET_CLUSTER"]


class Db:
    """What the tests use of an sqlite3.Connection."""

    def __init__(self, cluster):
        self._cluster = cluster

    def execute(self, sql, values=()):
        deadline = time.monotonic() + test_service.DEADLINE_S
        if not rqlite.READS.match(sql.lstrip()):
            self._cluster.execute_all([[sql, *values]], deadline)
            return rqlite.Rows()
        rows = self._cluster.query(sql, values, "strong", deadline)
        if "AS BLOB" in sql:  # rqlite gives it as a text
            rows = rqlite.Rows(tuple(v.encode() if isinstance(v, str) else v for v in row) for row in rows)
        return rows

    def executescript(self, script):
        pending = ""
        for piece in script.split(";"):
            pending += piece + ";"
            if sqlite3.complete_statement(pending):
                if pending.strip("; \n"):
                    self.execute(pending)
                pending = ""


def empty(db):
    """Drop all that there is."""
    made = db.execute(
        "SELECT s.type, s.name FROM sqlite_schema AS s WHERE s.sql IS NOT NULL AND s.name NOT LIKE 'sqlite_%'"
    )
    order = ["trigger", "view", "index", "table"]
    writes = [["PRAGMA defer_foreign_keys = ON"]]
    for kind, name in sorted(made, key=lambda row: order.index(row[0])):
        writes.append([f"DROP {kind} IF EXISTS {service.quoted(name)}"])
    if made:
        db._cluster.execute_all(writes, time.monotonic() + 10)


the_cluster = rqlite.Cluster(CLUSTER)
rqlite.Cluster.path = None  # for tests that hand it to add_tester()
# Stores of these tests compare no nodes: they end with connections of threads, and their tables go with each test.
service.extra("same").Comparison._run = lambda _: None


@pytest.fixture(autouse=True)
def a_cluster_in_place_of_a_file(monkeypatch):
    empty(Db(the_cluster))
    start = test_service.Process.start

    def start_on_cluster(process):
        where = process.arguments.index("--database") + 1
        process.arguments[where] = CLUSTER
        start(process)

    @contextlib.contextmanager
    def database_of(_):
        yield Db(the_cluster)

    def add_tester(path, name="tester", token=test_service.TOKEN, can="write read", original=test_service.add_tester):
        if path and path.exists():  # the server any_server, which tests share, has a file
            original(path, name, token, can)
            return
        row = (name, service.digest_of(token), can)
        Db(the_cluster).execute("INSERT INTO clients (name, token, can) VALUES (?, ?, ?)", row)

    def command_line(*arguments, original=test_service.command_line):
        command = original(*arguments)
        command[command.index("--database") + 1] = CLUSTER
        return command

    monkeypatch.setattr(service, "Database", lambda _: rqlite.Cluster(CLUSTER))
    monkeypatch.setattr(test_service.Process, "start", start_on_cluster)
    for function in (command_line, database_of, add_tester):
        name = function.__name__
        original = getattr(test_service, name)
        for module in list(sys.modules.values()):
            if vars(module).get(name) is original:  # the tests of the extras import it from there
                monkeypatch.setattr(module, name, function)


# What does not apply, and why.
ELSEWHERE = {
    "it is about the SQLite file, its WAL, its lock or its mode": """
        test_the_application_opens_the_database_at_its_first_request_and_not_before
        test_first_requests_that_cannot_be_served_fail_together_and_not_one_after_the_other
        test_an_application_that_is_not_set_up_says_so_in_answer_and_log
        test_a_process_may_fork_before_its_first_request_and_not_after_it
        test_service_py_alone_keeps_what_it_has_acknowledged
        test_it_ends_with_one_line_if_it_cannot_run_like_this[--database
        test_who_has_its_result_writes_for_nobody_else_before_it_returns
        test_a_message_costs_one_statement_its_token_none_and_a_batch_one_synced_transaction
        test_a_failing_disk_is_503_and_a_keyed_retry_finds_out
        test_another_program_that_holds_the_write_lock_is_503
        test_whoever_waits_too_long_is_answered_in_time_and_leaves_nothing
        test_a_symlink_is_the_database_it_leads_to
        test_a_database_or_wal_that_was_removed_is_never_written_to
        test_a_database_that_was_replaced_is_read_and_written_anew
        test_it_refuses_a_database_in_utf_16_and_one_that_it_may_not_write
        test_a_database_of_before_1_1_keeps_its_clients
        test_the_database_can_be_read_by_its_owner_only
        test_the_database_knows_which_index_serves_a_filter_best
        test_its_own_connections_are_in_autocommit_mode_and_spill_into_memory
        test_a_database_that_is_damaged_says_so
        test_an_older_database_that_is_put_in_the_place_of_this_one_has_its_clients
        test_the_clients_are_read_again_only_if_they_have_changed
        test_a_backup_is_never_put_over_its_own_database
        test_after_a_restore_a_token_that_is_removed_again_stops
        test_a_restored_database_with_other_rules_is_not_served
        test_a_backup_is_whole_also_right_after_a_restore
        test_a_backup_of_a_damaged_database_is_none
        test_a_generated_column_of_another_type_than_its_own_is_no_damage
        test_a_database_whose_link_leads_elsewhere_takes_nothing
        test_root_writes_nothing_where_a_link_in_place_of_the_lock_leads
        test_a_process_that_serves_stores_nothing_without_headers_when_migrate_adds_them
        test_a_lenient_batch_that_is_sent_again_reads_each_line_once
        test_metrics_can_be_read_while_the_database_cannot
        test_healthz_
        test_posts_that_come_together_share_a_commit_and_never_hold_up_a_reader
        test_the_first_token_is_the_one_that_the_owner_sets
        test_the_first_start_prints_a_curl_that_works_and_no_other_start_makes_a_client
        test_metrics_count_what_was_stored_and_refused
        test_a_restart_goes_on_with_the_next_id_whatever_was_deleted_and_is_read
        test_migrate_gives_a_stream_headers_and_old_messages_have_none
        test_it_ends_with_0_and_answers_what_is_in_flight
        test_livez_is_200_as_long_as_the_process_answers
        test_a_backup_that_cannot_be_is_one_line[inlet.db-itself]
        test_since_reads_few_rows_and_says_when_it_takes_too_long
        test_a_failure_to_read_the_clients_counts_for_the_stream
    """,
    "its servers have extras that the cluster needs deleted": """
        test_without_extras_the_rest_is_as_before
    """,
    "Python checks all JSON there, before the cluster sees it": """
        test_of_a_batch_the_first_line_that_is_refused_is_told[1]
        test_a_refusal_tells_no_large_text_apart_while_others_wait
        test_a_process_that_serves_stores_no_nonsense_when_migrate_takes_the_check_of_json_away
    """,
    "messages of one COMMIT can get their ids in another order": """
        test_what_fails_in_a_shared_commit_costs_only_itself
    """,
    "what is refused is kept by a request of its own": """
        test_a_stream_refused_that_is_full_costs_only_who_was_refused
        test_what_is_refused_is_kept_once_also_if_the_transaction_is_undone
    """,
    "the first SELECT * after a change of the schema can have the old number of columns in go-sqlite3": """
        test_migrate_keeps[what others refer to]
    """,
}


def pytest_collection_modifyitems(config, items):
    gone = [name for names in ELSEWHERE.values() for name in re.findall(r"(?m)^ +(\S.*)$", names)]
    for name in gone:
        if not any(item.name.startswith(name) for item in items):
            raise pytest.UsageError(f"there is no test {name} to be left out")
    left_out = [item for item in items if item.name.startswith(tuple(gone))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
