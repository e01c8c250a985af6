-- A second stream, filled by a trigger. Clients with the grant write could write to it over HTTP too: grant write:readings
CREATE TABLE IF NOT EXISTS alarms (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at TEXT NOT NULL,
    client      TEXT NOT NULL,
    key         TEXT,
    body        TEXT NOT NULL CHECK (json_valid(body)),
    hour        TEXT AS (substr(received_at, 1, 13)),  -- GET /alarms?hour=2026-11-22T10
    day         TEXT AS (substr(received_at, 1, 10))  -- GET /alarms?day=2026-11-22; the index makes it quick
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS alarms_key ON alarms (client, key) WHERE key IS NOT NULL;
CREATE INDEX IF NOT EXISTS alarms_hour ON alarms (hour);
CREATE INDEX IF NOT EXISTS alarms_day ON alarms (day);
CREATE TRIGGER IF NOT EXISTS alarm AFTER INSERT ON readings WHEN NEW.value > 50
BEGIN INSERT INTO alarms (received_at, client, body) VALUES (NEW.received_at, NEW.client, NEW.body); END;
