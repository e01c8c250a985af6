-- One row for each element of an array: Telegraf's "metrics", SendGrid, the Reporting API, collectd. Numbers of any size
-- stay as they were sent, and texts keep their quotes. More than 10,000 elements would hold up all others
CREATE TABLE IF NOT EXISTS arrays (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at TEXT NOT NULL,
    client      TEXT NOT NULL,
    key         TEXT,
    body        TEXT NOT NULL CHECK (json_valid(body)),

    elements INTEGER AS (ifnull(json_array_length(body, '$.metrics'), json_array_length(body)))
        CONSTRAINT "an array has at most 10,000 elements" CHECK (elements <= 10000)
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS arrays_key ON arrays (client, key) WHERE key IS NOT NULL;
CREATE TABLE IF NOT EXISTS elements (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at TEXT NOT NULL,
    client      TEXT NOT NULL,
    key         TEXT,
    body        TEXT NOT NULL CHECK (json_valid(body))
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS elements_key ON elements (client, key) WHERE key IS NOT NULL;
CREATE TRIGGER IF NOT EXISTS each_element AFTER INSERT ON arrays
BEGIN
    INSERT INTO elements (received_at, client, key, body)
    SELECT NEW.received_at, NEW.client, NEW.key || '·' || e.key,  -- what no client can send as a key
        iif(e.type IN ('object', 'array'), e.value, NEW.body -> e.fullkey)  -- -> reads the whole body each time
    FROM json_each(NEW.body, iif(json_type(NEW.body) = 'array', '$', '$.metrics')) AS e;
END;
