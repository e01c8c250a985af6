-- Refuse a member that comes twice: of {"value": 5, "value": 1000}, a rule sees the first, and most programs the last
CREATE TRIGGER IF NOT EXISTS no_member_twice BEFORE INSERT ON readings
WHEN EXISTS (SELECT 1 FROM json_tree(NEW.body) WHERE typeof(key) = 'text' GROUP BY parent, key HAVING count(*) > 1)
BEGIN SELECT RAISE(ABORT, 'a member comes twice'); END;
