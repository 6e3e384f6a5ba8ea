"""The journal of one run: which packets arrived, which rounds closed, in SQLite.

What a method has written is on the disk when it returns (write-ahead log, synchronous = FULL), so a receipt may be
sent or a record published right after. Rows hold digests and verdicts; the bytes of packets and updates are blobs.
"""

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from peer.errors import UserCode, UserError

SCHEMA_VERSION = 1
BUSY_S = 5.0

Row = tuple[Any, ...]  # what SQLite returns; the schema says what is in it

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE records (
    round INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    state_root BLOB NOT NULL,
    update_digest BLOB NOT NULL,
    data BLOB NOT NULL
);
CREATE TABLE packets (
    digest BLOB PRIMARY KEY,
    round INTEGER NOT NULL,
    peer BLOB NOT NULL,
    tokens INTEGER NOT NULL,
    inner_steps INTEGER NOT NULL,
    arrived_ms INTEGER NOT NULL,
    verdict INTEGER,
    code INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX packets_by_round ON packets (round);
"""


@dataclass(frozen=True)
class RecordRow:
    """A round that closed. `update_digest` is 32 zero bytes when the round changed nothing."""

    round: int
    digest: bytes
    state_root: bytes
    update_digest: bytes
    data: bytes


@dataclass(frozen=True)
class PacketRow:
    """A packet that arrived (or that we sent). `verdict` is None until its round closes, then a ledger.Verdict."""

    digest: bytes
    round: int
    peer: bytes
    tokens: int
    inner_steps: int
    arrived_ms: int
    verdict: int | None = None
    code: int = 0


class Journal:
    """The durable memory of one run. May be used from several threads."""

    def __init__(self, path: Path, run_id: bytes) -> None:
        self.path = path
        self._lock = threading.Lock()
        with self._errors():
            self._connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._open(run_id)
        except BaseException:
            self._connection.close()
            raise

    def _open(self, run_id: bytes) -> None:
        with self._errors():
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
        with self._transaction() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.execute("INSERT INTO meta VALUES ('run_id', ?)", (run_id,))
        if version > SCHEMA_VERSION:
            raise UserError(
                UserCode.NEWER_STORE,
                f"{self.path} was written by a newer sparseloco-peer (schema {version}, not {SCHEMA_VERSION})",
                "install the newest sparseloco-peer: pip install --upgrade sparseloco-peer",
            )
        if self.meta("run_id") != run_id:
            raise UserError(
                UserCode.OTHER_RUN_STORED,
                f"{self.path} belongs to another run",
                "name an unused folder with --home (or --out)",
            )

    def close(self) -> None:
        """Close the file. Further calls are an error."""
        with self._lock:
            self._connection.close()

    # What is not a round: small named values such as the signed run.

    def meta(self, name: str) -> bytes | None:
        """A named value, or None."""
        row = self._one("SELECT value FROM meta WHERE name = ?", (name,))
        return None if row is None else bytes(row[0])

    def set_meta(self, name: str, value: bytes) -> None:
        """Write a named value, durably."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # Packets

    def add_packet(self, packet: PacketRow) -> None:
        """Note a packet, durably. Noting it again changes nothing."""
        assert 0 <= packet.tokens < 1 << 63, "check_packet bounds the tokens before they come here"
        with self._transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO packets VALUES (?, ?, ?, ?, ?, ?, ?, ?)", astuple(packet))

    def packet(self, digest: bytes) -> PacketRow | None:
        """One packet, or None."""
        row = self._one("SELECT * FROM packets WHERE digest = ?", (digest,))
        return None if row is None else PacketRow(*row)

    def packets(self, round_number: int) -> list[PacketRow]:
        """The packets of one round by arrival."""
        rows = self._all("SELECT * FROM packets WHERE round = ? ORDER BY arrived_ms, digest", (round_number,))
        return [PacketRow(*row) for row in rows]

    # Rounds

    def close_round(self, record: RecordRow, verdicts: Mapping[bytes, tuple[int, int]]) -> None:
        """Append the next record and set (verdict, code) of its packets by digest: all of it, or nothing."""
        with self._transaction() as connection:
            (head,) = connection.execute("SELECT max(round) FROM records").fetchone()
            if head is not None and record.round != head + 1:
                raise ValueError(f"record {record.round} does not follow record {head}")
            connection.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?)", astuple(record))
            connection.executemany(
                "UPDATE packets SET verdict = ?, code = ? WHERE digest = ?",
                [(verdict, code, digest) for digest, (verdict, code) in verdicts.items()],
            )

    def rewind(self, round_number: int) -> None:
        """Forget the records after this round, for they lie on a branch that was given up, and what they decided."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM records WHERE round > ?", (round_number,))
            connection.execute("UPDATE packets SET verdict = NULL, code = 0 WHERE round > ?", (round_number,))

    def head(self) -> RecordRow | None:
        """The last record, or None before the first."""
        row = self._one("SELECT * FROM records ORDER BY round DESC LIMIT 1", ())
        return None if row is None else RecordRow(*row)

    def record(self, round_number: int) -> RecordRow | None:
        """The record of one round, or None."""
        row = self._one("SELECT * FROM records WHERE round = ?", (round_number,))
        return None if row is None else RecordRow(*row)

    def record_by_digest(self, digest: bytes) -> RecordRow | None:
        """The record with this digest, or None."""
        row = self._one("SELECT * FROM records WHERE digest = ?", (digest,))
        return None if row is None else RecordRow(*row)

    def first_with_state(self, state_root: bytes) -> RecordRow | None:
        """The record of the first round that led to this state, or None."""
        row = self._one("SELECT * FROM records WHERE state_root = ? ORDER BY round LIMIT 1", (state_root,))
        return None if row is None else RecordRow(*row)

    def records(self, first: int, last: int) -> list[RecordRow]:
        """The records of the rounds first..last that are here, in order."""
        rows = self._all("SELECT * FROM records WHERE round BETWEEN ? AND ? ORDER BY round", (first, last))
        return [RecordRow(*row) for row in rows]

    def blobs_of(self, round_number: int) -> list[tuple[str, bytes]]:
        """Kind and digest of every blob that the round's rows name; not every round has a bundle."""
        packets = [("packet", packet.digest) for packet in self.packets(round_number)]
        record = self.record(round_number)
        if record is None or not any(record.update_digest):
            return packets
        return [*packets, ("update", record.update_digest), ("bundle", record.digest)]

    # SQLite

    def _one(self, query: str, values: tuple[object, ...]) -> Row | None:
        rows = self._all(query, values)
        return rows[0] if rows else None

    def _all(self, query: str, values: tuple[object, ...]) -> list[Row]:
        with self._lock, self._errors():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # After some failures, a full disk among them, SQLite has already rolled back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # our own mistake, not the disk's
        except sqlite3.DatabaseError as error:
            raise _user_error(error, self.path) from error


def _user_error(error: sqlite3.DatabaseError, path: Path) -> UserError:
    """Say in our words what SQLite reported; the primary code is the low byte."""
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_FULL:
            code, what = UserCode.DISK_FULL, "there is no room left to write"
            remedy = "free some space; the same command then continues where it stopped"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            code, what = UserCode.NO_PERMISSION, "this user may not write"
            remedy = f"give this user the right to write {path.parent}, or name another folder with --home (or --out)"
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            code, what = UserCode.HOME_IN_USE, "another program is holding"
            remedy = "stop the other program, or name another folder with --home (or --out)"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            code, what = UserCode.DAMAGED_STORE, "this is no journal, or a damaged one:"
            remedy = f"move {path} away and start again: a peer fetches what it needs; an aggregator needs its backup"
        case _:
            code, what = UserCode.DISK_ERROR, "the journal cannot be used:"
            remedy = "check the disk (dmesg, smartctl) and its mount, or name a folder on another disk"
    return UserError(code, f"{what} {path} ({error})", remedy)
