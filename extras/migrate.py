"""The command migrate: give a database the tables that schema.sql has now, and lose no message.

A table that differs is made anew, and its ordinary columns are copied; what is generated computes itself. Ids stay as
they are, and used ones stay used. All of it is one transaction.
"""

import sqlite3
import sys
import time
from contextlib import suppress

from service import (
    MESSAGE_COLUMNS,
    SCHEMA_LOOK_S,
    Column,
    Database,
    Objects,
    Schema,
    SchemaObject,
    SetupError,
    analyze,
    checkpoint,
    columns_of,
    differences,
    fold,
    leftovers,
    normal,
    quoted,
    schema_objects,
    show,
    sqlite_error,
)

SHOWN_IDS = 20
OLD_ROWID = '"rowid before migrate"'


def run(database: Database, schema: Schema) -> int:
    """Migrate, and print what was changed, or which messages break a new rule; return the exit status.

    Raises SetupError. If not all goes well, nothing has changed.
    """
    with database.to_migrate(schema) as db:
        db.execute("PRAGMA foreign_keys = OFF")  # they are checked at the end
        db.execute("BEGIN IMMEDIATE")
        old, changes = schema_objects(db), [text for text, _ in differences(db, schema)]
        if broken := Migration(db, schema).run():
            told = "inlet: nothing was changed, because old messages break new rules (change them or the rules):"
            print("\n".join([told, *broken]), file=sys.stderr)
            return 1  # and the connection, when it is closed, rolls back
        new = [made for key, made in schema.objects.items() if key not in old or old[key].words != made.words]
        if any(made.name in schema.streams and made.kind == "table" for made in new):
            # A process that serves may insert what this stream does not take, or leave the check of JSON to it. While
            # the lock is held for so long, it looks at the schema before its next message.
            time.sleep(SCHEMA_LOOK_S)
        db.execute("COMMIT")
        analyze(db)
        checkpoint(db)
    print(
        "\n".join(
            changes
            or ["no table had changed; the INSERTs in the file were run, and its views are new at the next start"]
        )
    )
    if changes:
        print("restart each service that runs now: until then it has the old routes and sentences")
    return 0


class Migration:
    """One run of migrate, inside of its transaction. What a SELECT 1 does not find is looked for again on a cluster."""

    def __init__(self, db: sqlite3.Connection, schema: Schema):
        self._db = db
        self._schema = schema
        self._broken: dict[tuple[str, str], list[int]] = {}  # ids by (table, rule)

    def run(self) -> list[str]:
        """Change the database, and return the rules that rows break, a line for each."""
        old, new = schema_objects(self._db), self._schema.objects
        gone = leftovers(self._db, self._schema)
        tables = [name for kind, name in new if kind == "table" and (kind, name) in old]
        rebuilt = [name for name in tables if rules_for_rows(old, name) != rules_for_rows(new, name)]
        for made in gone:
            if made.kind == "table":
                self._drop_stream(made.name)
        for key, made in old.items():  # drop what is gone, changed, or on a rebuilt table; it is made again below
            has_changed = made in gone or (key in new and new[key].words != made.words)
            if made.kind != "table" and (has_changed or made.table in rebuilt):
                self._db.execute(f"DROP {made.kind} IF EXISTS {quoted(made.name)}")  # a view takes its triggers along
        for name in rebuilt:
            self._rebuild(old["table", name], new["table", name])
        if not self._broken:
            try:
                self._make_what_is_new()
            except UnicodeDecodeError as error:
                raise sqlite_error(error) from None
            self._check_foreign_keys()
        return [self._line(*broken) for broken in self._broken.items()]

    def _drop_stream(self, name: str) -> None:
        """Drop a stream that schema.sql no longer has; SetupError if it holds messages."""
        if self._db.execute(f"SELECT 1 FROM {quoted(name)}").fetchone():
            (count,) = self._db.execute(f"SELECT count(*) FROM {quoted(name)}").fetchone()
            left = f"the table {name} is not in the schema and holds {count} messages"
            raise SetupError(f"{left}: put it back, or drop it by hand")
        self._drop_keeping_used_ids(name, name)

    def _make_what_is_new(self) -> None:
        for key, made in self._schema.objects.items():
            if key not in schema_objects(self._db):  # looked up each time: FTS5 makes tables with its own
                self._db.execute(made.sql)
                # What AUTOINCREMENT knows may be there in another case.
                spelling = "UPDATE sqlite_sequence SET name = ? WHERE name = ? COLLATE NOCASE"
                self._db.execute(spelling, (made.name, made.name))
        for statement in self._schema.statements:
            if normal(statement)[0] == "insert":
                self._db.execute(statement)

    def _check_foreign_keys(self) -> None:
        for name in (name for kind, name in self._schema.objects if kind == "table"):
            for table, rowid, parent, _ in self._db.execute(f"PRAGMA foreign_key_check({quoted(name)})"):
                self._broken.setdefault((table, f"FOREIGN KEY to {parent}"), []).append(rowid)

    @staticmethod
    def _line(broken: tuple[str, str], ids: list[int]) -> str:
        table, rule = broken
        more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
        return f"{table}: {len(ids)} broke {rule!r}: ids {', '.join(map(str, ids[:SHOWN_IDS]))}{more}"

    def _rebuild(self, old: SchemaObject, new: SchemaObject) -> None:
        """Copy the rows of a table to one without constraints, make the table anew, and copy them back.

        (To rename the old table would change what refers to it.)
        """
        db, copy = self._db, quoted(f"{old.name} before migrate")
        if new.words[1] == "virtual":
            hint = "drop it with sqlite3, migrate, and fill it again"
            raise SetupError(f"the virtual table {new.name} has changed: {hint}")
        show(f"copying {old.name}")
        before = columns_of(db, old.name)
        rowid = f"_rowid_ AS {OLD_ROWID}, " if self._has_rowid(old.name) else ""
        db.execute(f"CREATE TABLE {copy} AS SELECT {rowid}* FROM {quoted(old.name)}")
        self._drop_keeping_used_ids(old.name, new.name)
        db.execute(new.sql)
        for (kind, _), index in self._schema.objects.items():
            if (kind, index.table) == ("index", fold(new.name)) and index.is_unique:
                db.execute(index.sql)
        insert = self._copy_back(new.name, copy, before, has_old_rowid=bool(rowid))
        try:
            db.execute(f"{insert} ORDER BY c.rowid")
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._require_transaction(sqlite_error(error))
            self._name_broken_rows(new.name, insert, copy, 'c."id"' if "id" in before else "c.rowid")
        db.execute(f"DROP TABLE {copy}")

    def _copy_back(self, table: str, copy: str, before: dict[str, Column], has_old_rowid: bool) -> str:
        """Return the SQL that copies ordinary columns, and rowids, back into a table that was made anew.

        Raises SetupError if a column that has gone holds data.
        """
        after = columns_of(self._db, table)
        kept = [name for name, column in after.items() if name in before and not column.is_generated]
        for name, column in before.items():
            data = f"SELECT 1 FROM {copy} AS c WHERE c.{quoted(column.name)} IS NOT NULL"
            if name not in kept and not column.is_generated and self._db.execute(data).fetchone():
                hint = "put it back, or empty it with sqlite3"
                raise SetupError(f"table {table}: the column {name} holds data: {hint}")
        into = [quoted(after[name].name) for name in kept]
        values = [f"c.{quoted(before[name].name)}" for name in kept]
        has_integer_key = any(column.definition == MESSAGE_COLUMNS["id"] for column in after.values())
        if has_old_rowid and not has_integer_key and self._has_rowid(table):  # an integer key is the rowid
            into, values = [*into, "_rowid_"], [*values, f"c.{OLD_ROWID}"]
        return f"INSERT INTO {quoted(table)} ({', '.join(into)}) SELECT {', '.join(values)} FROM {copy} AS c"

    def _name_broken_rows(self, table: str, insert: str, copy: str, message_id: str) -> None:
        """Copy row by row, and note which rows break which rule."""
        for rowid, row_id in self._db.execute(f"SELECT c.rowid, {message_id} FROM {copy} AS c").fetchall():
            try:
                self._db.execute(f"{insert} WHERE c.rowid = ?", (rowid,))
            except (sqlite3.Error, UnicodeDecodeError) as raised:
                error = sqlite_error(raised)
                self._require_transaction(error)
                rule = self._schema.sentences.get(fold(str(error)), str(error))
                self._broken.setdefault((table, rule), []).append(row_id)

    def _require_transaction(self, error: sqlite3.Error) -> None:
        """Raise the error, unless it is a broken rule and the transaction is still open."""
        if not self._db.in_transaction or error.sqlite_errorname in ("SQLITE_FULL", "SQLITE_NOMEM"):
            raise error

    def _has_rowid(self, table: str) -> bool:
        """Has a table a rowid? https://www.sqlite.org/rowidtable.html"""
        with suppress(sqlite3.OperationalError):
            return bool(self._db.execute(f"SELECT _rowid_ FROM {quoted(table)} LIMIT 0"))
        return False

    def _drop_keeping_used_ids(self, table: str, new_name: str) -> None:
        """Drop a table, but keep what AUTOINCREMENT knows of it, for a new name: https://www.sqlite.org/autoinc.html"""
        # Renamed, and not read and inserted: on a cluster, ids are used meanwhile.
        rename, kept = "UPDATE sqlite_sequence SET name = ? WHERE name = ?", f"{table} before migrate"
        self._db.execute(rename, (kept, table))
        self._db.execute(f"DROP TABLE {quoted(table)}")
        self._db.execute(rename, (new_name, kept))


def rules_for_rows(objects: Objects, table: str) -> tuple:
    """Return what decides whether a table can hold a row: its CREATE, and those of its UNIQUE indexes."""
    mine = [made for (kind, _), made in objects.items() if (kind, made.table) == ("index", table) and made.is_unique]
    return objects["table", table].words, sorted(index.words for index in mine)
