-- For the stream readings of README. GET /hours: how many in each hour; GET /latest: the newest of each sensor
CREATE VIEW hours AS SELECT substr(received_at, 1, 13) AS hour, count(*) AS count FROM readings GROUP BY hour;
CREATE VIEW latest AS SELECT * FROM readings WHERE id IN (SELECT max(id) FROM readings GROUP BY sensor);
