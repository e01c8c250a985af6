"""Put a backup in the place of a database whose service is stopped. What was there goes into a folder beside it.

    python3 restore.py COPY DATABASE       with - as COPY, it is read from stdin

The copy gets the mode of the database that was there, and its owner, if root runs this. Nothing is changed if the copy
is not whole.
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
    # Root works inside of a private folder: the owner of the other one cannot put a symlink in place of copy.db.
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=folder) as work:
        os.chdir(work)
        with open("copy.db", "xb") as new:
            os.fchmod(new.fileno(), 0o600)
            with sys.stdin.buffer if copy == "-" else open(copy, "rb") as source:
                shutil.copyfileobj(source, new)
            with contextlib.suppress(FileNotFoundError):
                old = os.lstat(database)
                os.fchmod(new.fileno(), old.st_mode & 0o777)
                if os.geteuid() == 0:
                    os.fchown(new.fileno(), old.st_uid, old.st_gid)
            new.flush()
            os.fsync(new.fileno())
        if damage := what_is_wrong("copy.db"):
            raise SystemExit(f"{copy} is no whole backup of Inlet ({damage}): nothing was changed")
        old_folder = f"{database}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        names = (database, f"{database}-wal", f"{database}-shm", f"{database}-lock")
        if has_old := any(map(os.path.lexists, names)):
            os.mkdir(old_folder, 0o700)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.rename(name, os.path.join(old_folder, os.path.basename(name)))
        os.rename("copy.db", database)
        os.chdir(folder)
    folder_fd = os.open(folder, os.O_RDONLY)
    os.fsync(folder_fd)
    os.close(folder_fd)
    print(f"{database} is the backup now{f'; what was there is in {old_folder}' if has_old else ''}")


def what_is_wrong(path: str) -> str:
    """Return why a file is no whole backup, or an empty text.

    quick_check also tells a value whose type differs from its column. That is no damage (require_whole in service.py).
    """
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
