-- Old messages are deleted. Keep the rule that you need, with the name of your stream.

-- Keep the last million messages; each message deletes at most ten, or the first one in a large table would stop all others
CREATE TRIGGER IF NOT EXISTS keep_a_million AFTER INSERT ON messages
BEGIN DELETE FROM messages WHERE id IN (SELECT id FROM messages WHERE id <= NEW.id - 1000000 ORDER BY id LIMIT 10); END;

-- Keep 30 days of the stream readings; without the index, each message would scan the table
CREATE INDEX IF NOT EXISTS readings_received_at ON readings (received_at);
CREATE TRIGGER IF NOT EXISTS keep_30_days AFTER INSERT ON readings
BEGIN DELETE FROM readings WHERE id IN (SELECT id FROM readings
    WHERE received_at < strftime('%Y-%m-%dT%H:%M:%fZ', NEW.received_at, '-30 days') ORDER BY received_at LIMIT 10); END;
