"""What is new in `readings` goes into copy.duckdb, out of the SQLite file: python duckdb_file.py copy-of-inlet.db

pip install duckdb==1.5.5 duckdb-extension-sqlite-scanner==1.5.5 (or, where duckdb.org can be reached, INSTALL sqlite).
DuckDB does not see generated columns as such, so SQLite has to select them. Give it a backup, because the database has
secrets, and each time one of another name: DuckDB leaves a -wal and a -shm beside it, and backup replaces no such file.
"""

import sys
from pathlib import Path

import duckdb
import duckdb_extension_sqlite_scanner

db = duckdb.connect("copy.duckdb")
db.load_extension(str(next(Path(duckdb_extension_sqlite_scanner.__path__[0]).rglob("*.duckdb_extension"))))
db.execute(f"ATTACH '{sys.argv[1]}' AS inlet (TYPE sqlite, READ_ONLY)")
db.execute("CREATE TABLE IF NOT EXISTS readings (id BIGINT, received_at TIMESTAMPTZ, sensor VARCHAR, value DOUBLE)")
[last] = db.execute("SELECT ifnull(max(id), 0) FROM readings").fetchone()
query = f"SELECT id, received_at, sensor, value FROM readings WHERE id > {last} ORDER BY id"
db.execute(f"INSERT INTO readings FROM sqlite_query('inlet', '{query}')")
print(db.execute("SELECT count(*), count(DISTINCT id), max(id), sum(value) FROM readings").fetchone())
