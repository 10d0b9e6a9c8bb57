"""The answers of a study, in an SQLite file to which answers are only appended.

Every answer is committed before the rater sees the next question. Of several answers to a question, the last counts.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import sqlite3
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lavie_jax.errors import UserError

FILE = "answers.sqlite"
_TABLES = """
    CREATE TABLE IF NOT EXISTS study (id TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS raters (
        number INTEGER PRIMARY KEY, name TEXT NOT NULL, key TEXT NOT NULL UNIQUE, token TEXT NOT NULL UNIQUE,
        started TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS answers (
        number INTEGER PRIMARY KEY, rater INTEGER NOT NULL REFERENCES raters (number), question TEXT NOT NULL,
        videos TEXT NOT NULL, answer TEXT NOT NULL, seconds REAL NOT NULL, time TEXT NOT NULL
    );
    CREATE INDEX IF NOT EXISTS of_rater ON answers (rater);
"""


@dataclasses.dataclass(frozen=True)
class Rater:
    """A rater; `token` is the secret by which the page identifies itself."""

    number: int
    name: str
    token: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """The last answer of a rater to a question.

    Attributes:
        rater: name of the rater.
        question: id of the question.
        videos: ids of the videos in the order on the page.
        answer: `{"better": id}` for a pair, {metric: label} for a single video, or `{"problem": text}`.
        seconds: from the moment the videos first played until the answer.
    """

    rater: str
    question: str
    videos: Sequence[str]
    answer: Mapping[str, str]
    seconds: float


class Answers:
    """The open answer file of a study, for all threads of a server."""

    def __init__(self, path: Path, study_id: str):
        """Opens the file, or makes it. Raises UserError if it belongs to another study or cannot be used."""
        self.lock = threading.Lock()
        try:
            # Each statement is a transaction. With a write-ahead log that is synchronised at each commit, neither a
            # kill nor a power failure loses a committed answer, and readers do not wait.
            self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
            try:
                self.connection.execute("PRAGMA journal_mode = WAL")
                self.connection.execute("PRAGMA synchronous = FULL")
                self.connection.executescript(_TABLES)
                self.connection.execute("INSERT INTO study SELECT ? WHERE NOT EXISTS (SELECT * FROM study)", [study_id])
                _check_study(self.connection, path, study_id)
            except BaseException:
                self.connection.close()
                raise
        except sqlite3.Error as error:
            raise UserError(f"the answer file {os.fspath(path)!r} cannot be used: {error}") from error

    def close(self) -> None:
        """Closes the file."""
        with self.lock:
            self.connection.close()

    def _execute(self, statement: str, values: Sequence[Any]) -> list[tuple]:
        with self.lock:
            return self.connection.execute(statement, values).fetchall()

    def find(self, name: str) -> Rater | None:
        """Returns the rater of this name, in whatever case and spacing it is written."""
        rows = self._execute("SELECT number, name, token FROM raters WHERE key = ?", [_key(name)])
        return Rater(*rows[0]) if rows else None

    def by_token(self, token: str) -> Rater | None:
        """Returns the rater with this token."""
        rows = self._execute("SELECT number, name, token FROM raters WHERE token = ?", [token])
        return Rater(*rows[0]) if rows else None

    def add_rater(self, name: str) -> Rater | None:
        """Adds a rater. Returns None if the name is taken."""
        row = [" ".join(name.split()), _key(name), secrets.token_urlsafe(16), _now()]
        try:
            self._execute("INSERT INTO raters (name, key, token, started) VALUES (?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            return None
        return self.find(name)

    def append(
        self, rater: Rater, question: str, videos: Sequence[str], answer: Mapping[str, str], seconds: float
    ) -> None:
        """Appends an answer, which is on the disk when this returns. Raises sqlite3.Error if it is not."""
        row = [rater.number, question, json.dumps(videos), json.dumps(answer), seconds, _now()]
        self._execute(
            "INSERT INTO answers (rater, question, videos, answer, seconds, time) VALUES (?, ?, ?, ?, ?, ?)", row
        )

    def of(self, rater: Rater) -> dict[str, Mapping[str, str]]:
        """Returns the rater's answers by the question's id."""
        rows = self._execute("SELECT question, answer FROM answers WHERE rater = ? ORDER BY number", [rater.number])
        return {question: json.loads(answer) for question, answer in rows}


def read(path: Path, study_id: str) -> list[Answer]:
    """Reads all answers, also while a server writes to the file.

    Raises:
        UserError: there is no such file, or it belongs to another study.
    """
    with _reading(path, study_id) as connection:
        rows = connection.execute(
            "SELECT raters.name, question, videos, answer, seconds FROM answers "
            "JOIN raters ON raters.number = rater ORDER BY answers.number"
        ).fetchall()
    last = {}
    for name, question, videos, answer, seconds in rows:
        last[name, question] = Answer(name, question, json.loads(videos), json.loads(answer), seconds)
    return list(last.values())


def tokens(path: Path, study_id: str) -> set[str]:
    """Returns the tokens of all raters: two files that share one have the same answers. Raises like `read`."""
    with _reading(path, study_id) as connection:
        return {token for (token,) in connection.execute("SELECT token FROM raters")}


@contextlib.contextmanager
def _reading(path: Path, study_id: str) -> Iterator[sqlite3.Connection]:
    if not path.is_file():
        raise UserError(f"{os.fspath(path)!r} does not exist: nobody has answered yet; start serve")
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)
        try:
            _check_study(connection, path, study_id)
            yield connection
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise UserError(f"the answer file {os.fspath(path)!r} cannot be read: {error}") from error


def _check_study(connection: sqlite3.Connection, path: Path, study_id: str) -> None:
    stored = [row[0] for row in connection.execute("SELECT id FROM study")]
    if stored != [study_id]:
        other = ", ".join(stored) or "none"
        raise UserError(f"the answer file {os.fspath(path)!r} belongs to another study: {other}, not {study_id}")


def _key(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
