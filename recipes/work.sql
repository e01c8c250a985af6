-- Work that several workers share (worker.py): POST /jobs, and each is done once, also if a worker dies.
-- A claim holds for a minute. It is unique, so of two workers that claim a job, one gets 409. Where the work can take
-- longer than that, two workers can do it, but only one of them is recorded in `done`. Where there is a stream `refused`, it
-- gets a row for each claim that came second.
CREATE TABLE IF NOT EXISTS jobs (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at TEXT NOT NULL,
    client      TEXT NOT NULL,
    key         TEXT,
    body        TEXT NOT NULL CHECK (json_valid(body))
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS jobs_key ON jobs (client, key) WHERE key IS NOT NULL;

CREATE TABLE IF NOT EXISTS claims (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at TEXT NOT NULL,
    client      TEXT NOT NULL,
    key         TEXT,
    body        TEXT NOT NULL CHECK (json_valid(body)),
    job         INTEGER NOT NULL AS (body ->> 'job') CONSTRAINT "job must be an id" CHECK (typeof(job) = 'integer'),
    attempt     INTEGER NOT NULL AS (body ->> 'attempt')
        CONSTRAINT "attempt must be a whole number" CHECK (typeof(attempt) = 'integer')
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS claims_key ON claims (client, key) WHERE key IS NOT NULL;
CREATE UNIQUE INDEX IF NOT EXISTS "another worker has this job" ON claims (job, attempt);

CREATE TABLE IF NOT EXISTS done (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at TEXT NOT NULL,
    client      TEXT NOT NULL,
    key         TEXT,
    body        TEXT NOT NULL CHECK (json_valid(body)),
    job         INTEGER NOT NULL AS (body ->> 'job') CONSTRAINT "job must be an id" CHECK (typeof(job) = 'integer')
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS done_key ON done (client, key) WHERE key IS NOT NULL;
CREATE UNIQUE INDEX IF NOT EXISTS "this job is done" ON done (job);

CREATE TRIGGER IF NOT EXISTS no_claim_of_what_is_done BEFORE INSERT ON claims
WHEN EXISTS (SELECT 1 FROM done AS d WHERE d.job = NEW.body ->> 'job')
BEGIN SELECT RAISE(ABORT, 'this job is done'); END;

-- GET /open_jobs?limit=10: what nobody has done, and nobody works on
CREATE VIEW open_jobs AS
SELECT j.id, j.body, (SELECT ifnull(max(c.attempt), 0) + 1 FROM claims AS c WHERE c.job = j.id) AS attempt FROM jobs AS j
WHERE NOT EXISTS (SELECT 1 FROM done AS d WHERE d.job = j.id)
    AND NOT EXISTS (SELECT 1 FROM claims AS c
        WHERE c.job = j.id AND c.received_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-60 seconds'));
