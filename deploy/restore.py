"""Put a backup in the place of a database whose service is stopped. What was there goes into a folder beside it.

    python3 restore.py COPY DATABASE       with - as COPY, it is read from stdin

The copy gets the owner and the mode of the database that was there. Nothing is changed if it is not whole.
"""

import contextlib
import os
import re
import shutil
import sqlite3
import sys
import tempfile
import time


def main(copy: str, database: str) -> None:
    """Raises SystemExit with a sentence."""
    database = os.path.abspath(database)
    if os.path.islink(database):
        raise SystemExit(f"{database} is a link: name the file that it leads to")
    folder = os.path.dirname(database)
    # Root works in a folder of its own, for the owner of the other one could put links in the way.
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=folder) as work:
        os.chdir(work)
        with open("copy.db", "xb") as new:
            os.fchmod(new.fileno(), 0o600)
            with sys.stdin.buffer if copy == "-" else open(copy, "rb") as source:
                shutil.copyfileobj(source, new)
            with contextlib.suppress(FileNotFoundError):
                there = os.lstat(database)
                os.fchmod(new.fileno(), there.st_mode & 0o777)
                if os.geteuid() == 0:
                    os.fchown(new.fileno(), there.st_uid, there.st_gid)
            new.flush()
            os.fsync(new.fileno())
        if damage := what_is_wrong("copy.db"):
            raise SystemExit(f"{copy} is no whole backup of Inlet ({damage}): nothing was changed")
        before = f"{database}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        os.mkdir(before, 0o700)
        for name in (database, f"{database}-wal", f"{database}-shm", f"{database}-lock"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(name, os.path.join(before, os.path.basename(name)))
        os.rename("copy.db", database)
        os.chdir(folder)
    file = os.open(folder, os.O_RDONLY)
    os.fsync(file)
    os.close(file)
    print(f"{database} is the backup now; what was there is in {before}")


def what_is_wrong(path: str) -> str:
    """Return why a file is no whole backup, or an empty text. A generated column may have a value of another type."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("SELECT count(*) FROM clients")
            (pages,), (size,) = db.execute("PRAGMA page_count").fetchone(), db.execute("PRAGMA page_size").fetchone()
            if pages * size != os.path.getsize(path):
                return "it was cut off"
            for (found,) in db.execute(f"PRAGMA quick_check({2**31 - 1})"):
                if found != "ok" and not re.match(r"(?:non-\w+|TEXT|NUMERIC) value in ", found):
                    return found
    except sqlite3.Error as error:
        return str(error)
    return ""


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(os.path.abspath(sys.argv[1]) if sys.argv[1] != "-" else "-", sys.argv[2])
