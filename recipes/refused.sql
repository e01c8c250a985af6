-- What rules refuse; GET /refused_by_day?day=2026-11-29 is what an owner mails.
-- Its messages are {"stream", "status", "detail", "line", "key", "body"}: key is that of the sender, and body a text, of
-- at most 64 KiB. Each try of a sender is a row of its own. Who may write to every stream may also send to this one.
CREATE TABLE IF NOT EXISTS refused (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at TEXT NOT NULL,
    client      TEXT NOT NULL,
    key         TEXT,
    body        TEXT NOT NULL CHECK (json_valid(body)),
    stream      TEXT AS (body ->> 'stream'),
    detail      TEXT AS (body ->> 'detail')
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS refused_key ON refused (client, key) WHERE key IS NOT NULL;
CREATE VIEW refused_by_day AS
SELECT substr(received_at, 1, 10) AS day, client, stream, detail, count(*) AS count, max(id) AS newest FROM refused
GROUP BY day, client, stream, detail;
CREATE VIEW refused_yesterday AS SELECT * FROM refused_by_day WHERE day = date('now', '-1 day');
