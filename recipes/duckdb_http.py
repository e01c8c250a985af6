"""What is new in `readings` goes into readings.duckdb, over HTTP: python duckdb_http.py

pip install duckdb==1.5.5 duckdb-extension-httpfs==1.5.5 (or, where duckdb.org can be reached, INSTALL httpfs). BASE is
the address of the service, and TOKEN may read. DuckDB writes JSON anew: 1.10 becomes 1.1.
"""

import os
from pathlib import Path

import duckdb
import duckdb_extension_httpfs

base, token = os.environ["BASE"], os.environ["TOKEN"]
db = duckdb.connect("readings.duckdb")
db.load_extension(str(next(Path(duckdb_extension_httpfs.__path__[0]).rglob("*.duckdb_extension"))))
db.execute("SET force_download = true")  # else each page is asked for twice, and can have changed meanwhile
db.execute(f"""CREATE SECRET inlet (TYPE http, SCOPE '{base}', EXTRA_HTTP_HEADERS MAP {{
    'Authorization': 'Bearer {token}', 'Accept': 'application/x-ndjson'}})""")
db.execute("CREATE TABLE IF NOT EXISTS readings (id BIGINT, received_at TIMESTAMPTZ, client VARCHAR, body JSON)")
columns = "{id: 'BIGINT', received_at: 'TIMESTAMPTZ', client: 'VARCHAR', body: 'JSON'}"
more = True
while more:
    [last] = db.execute("SELECT ifnull(max(id), 0) FROM readings").fetchone()
    page = f"{base}/readings?limit=1000&after={last}"
    [more] = db.execute(f"INSERT INTO readings FROM read_ndjson('{page}', columns = {columns})").fetchone()
print(db.execute("SELECT count(*), count(DISTINCT id), max(id) FROM readings").fetchone())
