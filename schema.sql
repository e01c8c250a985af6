-- The streams of this Inlet service. The schema is the API:
--
--   * A table that has the five columns id, received_at, client, key and body
--     is a stream. POST /NAME inserts one row into it, GET /NAME reads it.
--   * The body is the message, byte for byte as it was sent. Every other column
--     is generated from it:            sensor TEXT AS (body ->> 'sensor')
--     and can be asked for:            GET /readings?sensor=a-17
--   * Constraints are the validation. What breaks one is refused with 422 (with
--     409 for UNIQUE). The name of a CHECK, or of a UNIQUE INDEX, is what the client reads:
--         CONSTRAINT "value must be between -90 and 60" CHECK (value BETWEEN -90 AND 60)
--     NOT NULL makes a member required; REFERENCES holds it to a lookup table. A column
--     converts to its type and does not refuse. For a whole number below 2^63:
--         CHECK (json_type(body, '$.n') = 'integer' AND typeof(n) = 'integer')
--   * Triggers are the business logic. They run in the transaction of the message,
--     and refuse it with  SELECT RAISE(ABORT, 'a sentence for the client').
--   * One more column, headers TEXT, holds the headers of the request:
--                                      event TEXT AS (headers ->> 'x-github-event')
--   * GET /NAME reads a view, unless its name begins with _.
--   * Lookup tables and indexes may stand here too; they have no route. Fill a
--     lookup table with INSERT OR IGNORE.
--
-- A new database is made from this file. After a change to it, run
-- `python service.py migrate`: messages are copied, and all else is computed
-- again from their bodies, so that no change can lose one.
--
-- A stream with all of this (remove the two dashes in front to have it):
--
-- CREATE TABLE IF NOT EXISTS readings (
--     id          INTEGER PRIMARY KEY AUTOINCREMENT,
--     received_at TEXT NOT NULL,
--     client      TEXT NOT NULL,
--     key         TEXT,
--     body        TEXT NOT NULL CHECK (json_valid(body)),
--
--     sensor TEXT NOT NULL AS (body ->> 'sensor'),
--     value  REAL NOT NULL AS (body ->> 'value')
--         CONSTRAINT "value must be between -90 and 60" CHECK (value BETWEEN -90 AND 60)
-- ) STRICT;
-- CREATE UNIQUE INDEX IF NOT EXISTS readings_key ON readings (client, key) WHERE key IS NOT NULL;
-- CREATE INDEX IF NOT EXISTS readings_sensor ON readings (sensor);

-- One stream for anything: POST /messages takes every JSON message.
CREATE TABLE IF NOT EXISTS messages (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,       -- the cursor: grows in commit order, never reused
    received_at TEXT NOT NULL,                           -- UTC, RFC 3339, milliseconds; set by the service
    client      TEXT NOT NULL,                           -- who sent it
    key         TEXT,                                    -- its Idempotency-Key, if it had one
    body        TEXT NOT NULL CHECK (json_valid(body))   -- the JSON, byte for byte as it was sent
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS messages_key ON messages (client, key) WHERE key IS NOT NULL;
