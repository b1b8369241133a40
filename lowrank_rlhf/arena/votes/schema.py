"""The tables of a vote store, and opening its file: nothing in it is ever changed or deleted, only added to."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_rlhf.errors import UserError

APPLICATION_ID = 0x4C525648  # "LRVH" in the file's header: a store of ours
VERSION = 1
BUSY_SECONDS = 30

# A record column holds the whole record as JSON (records.py); the columns beside it are what is looked up
TABLES = """
CREATE TABLE comparisons (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    annotator TEXT NOT NULL,
    repeat_of TEXT REFERENCES comparisons (id),
    created TEXT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX comparisons_by_annotator ON comparisons (annotator, seq);
CREATE TABLE votes (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    comparison TEXT NOT NULL REFERENCES comparisons (id),
    annotator TEXT NOT NULL,
    kind TEXT NOT NULL,
    answer TEXT,
    supersedes TEXT REFERENCES votes (id),
    withdrawn INTEGER NOT NULL,
    created TEXT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX votes_by_comparison ON votes (comparison, seq);
CREATE TABLE scores (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    answer TEXT NOT NULL,
    scored_by TEXT NOT NULL,
    score REAL NOT NULL,
    created TEXT NOT NULL,
    UNIQUE (answer, scored_by)
);
CREATE VIEW answers AS SELECT
    comparisons.id AS comparison,
    shown.key AS position,
    json_extract(shown.value, '$.id') AS id,
    json_extract(shown.value, '$.speaker.name') AS model,
    json_extract(shown.value, '$.speaker.run') AS run,
    json_extract(shown.value, '$.speaker.step') AS step,
    json_extract(shown.value, '$.speaker.adapter_hash') AS adapter_hash,
    json_extract(shown.value, '$.decoding.temperature') AS temperature,
    json_extract(shown.value, '$.decoding.seed') AS seed,
    json_extract(shown.value, '$.tokens') AS tokens,
    json_extract(shown.value, '$.text') AS text
FROM comparisons, json_each(comparisons.record, '$.answers') AS shown;
"""
KEPT = ("comparisons", "votes", "scores")


def append_only(table: str) -> str:
    return "".join(
        f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} are only added to'); END;\n"
        for verb in ("UPDATE", "DELETE")
    )


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What the file or the disk does wrong becomes one clear message; what we do wrong keeps its traceback.

    Raises:
        UserError: the disk is full, or the file cannot be read or written, is damaged, locked or no SQLite file.
    """
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or ""
        for prefix, words in MEANINGS.items():
            if name.startswith(prefix):
                raise UserError(f"{path}: {words} ({error})") from error
        raise


MEANINGS = {
    "SQLITE_FULL": "the disk is full; nothing of this was stored and what was stored before is intact, make room",
    "SQLITE_IOERR": "the disk is full or does not read and write; what was stored before is intact",
    "SQLITE_READONLY": "the file or its folder cannot be written; give this user the right to",
    "SQLITE_CANTOPEN": "the file cannot be opened; give a file in a folder that this user may write to",
    "SQLITE_PERM": "the file cannot be opened; give this user the right to",
    "SQLITE_AUTH": "the file cannot be opened; give this user the right to",
    "SQLITE_BUSY": f"another program has locked the file for {BUSY_SECONDS} seconds; close it and try again",
    "SQLITE_NOTADB": "this is not a vote store but another kind of file; give another name",
    "SQLITE_CORRUPT": "the file is damaged; go back to a copy, or save its readable part with `sqlite3 FILE .recover`",
}


def connect(path: Path, *, create: bool = False) -> sqlite3.Connection:
    """A connection as every part uses it; transactions are begun by hand.

    Raises:
        sqlite3.Error: see `told`.
    """
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def open_store(path: Path, *, create: bool) -> sqlite3.Connection:
    """A connection to a store that is checked, and made where there is none.

    Raises:
        UserError: there is no such file (and `create` is off), or it is not a store of a version we know.
    """
    if not path.is_file():
        if path.exists():
            raise UserError(f"{path}: this is a folder; give the name of a file for the votes, as {path / 'votes.db'}")
        if not create:
            raise UserError(f"{path}: there is no such file; give the store the app wrote (its --store)")
        _make_folder(path)
    with told(path):
        connection = connect(path, create=create)
        try:
            _check(path, connection)
            return connection
        except BaseException:
            connection.close()
            raise


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: its folder cannot be made ({error.strerror}); give another name") from error


def _check(path: Path, connection: sqlite3.Connection) -> None:
    if _version(path, connection) == 0:
        connection.execute("BEGIN IMMEDIATE")  # of several programs that open a new file at once, one makes it
        with connection:
            if _version(path, connection) == 0:
                for statement in _statements(TABLES + "".join(map(append_only, KEPT))):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
    _write_ahead(connection)


def _statements(script: str) -> Iterator[str]:
    """`executescript` would commit the transaction it stands in."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _version(path: Path, connection: sqlite3.Connection) -> int:
    """The schema's number, 0 for an empty file.

    Raises:
        UserError: it is another program's, or of a newer version than this one.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == 0 and version == 0 and objects == 0:
        return 0
    if application != APPLICATION_ID:
        raise UserError(f"{path}: this is another program's database, not a vote store; give another name")
    if version > VERSION:
        raise UserError(
            f"{path}: a newer lowrank-rlhf wrote this store (its version is {version}, this one knows {VERSION}); "
            "upgrade lowrank-rlhf"
        )
    return int(version)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Readers do not wait for a writer, and a kill in the middle of a write loses that write alone."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:  # the switch does not wait for other openers by itself
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > until:
                raise
            time.sleep(0.02)


def identity(path: Path) -> tuple[int, int] | None:
    """Which file has this name now."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
