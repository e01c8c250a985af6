-- GitHub: client add github --signs github --can write:deliveries, its secret into the settings of the repository,
-- with the URL https://…/deliveries and the content type application/json; then GET /pushes
CREATE TABLE IF NOT EXISTS deliveries (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at TEXT NOT NULL,
    client      TEXT NOT NULL,
    key         TEXT,
    body        TEXT NOT NULL CHECK (json_valid(body)),
    headers     TEXT,
    event       TEXT AS (headers ->> 'x-github-event'),
    source_ip   TEXT AS (headers ->> 'x-forwarded-for')  -- behind deploy/nginx.conf; without it, it is what the client says
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS deliveries_key ON deliveries (client, key) WHERE key IS NOT NULL;
CREATE VIEW pushes AS SELECT * FROM deliveries WHERE event = 'push';
