"""Ledgers on the disk as they are, read without changing, locking or believing anything: for audits and for people."""

import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

from peer.errors import UserCode, UserError, os_errors
from peer.journal import PacketRow, RecordRow
from peer.store import BlobStore, StateStore
from protocol.run import RunConfig, SignedRun

FOLDERS_DEEP = 5
RUN_FILE = "run.bin"


def find_stores(folder: Path) -> list[Path]:
    """The folders below this one that hold a journal, nearest first. Raises UserError when the folder is not there."""
    with os_errors(folder):
        folder.stat()
        patterns = ["/".join(["*"] * depth + ["journal.sqlite"]) for depth in range(FOLDERS_DEEP + 1)]
        return [path.parent for pattern in patterns for path in sorted(folder.glob(pattern))]


class Stored:
    """One run's journal, blobs and states, read without changing or locking anything."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when the journal cannot be opened or the signed run is nowhere near it."""
        self.path = path
        self.journal = path / "journal.sqlite"
        self.blobs, self.states = BlobStore(path / "blobs"), StateStore(path / "states")
        try:
            self._connection = sqlite3.connect(f"file:{quote(str(self.journal.absolute()))}?mode=ro", uri=True)
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from error

    def close(self) -> None:
        """Close the journal."""
        self._connection.close()

    def _all(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: sqlite3.DatabaseError) -> UserError:
        return UserError(
            UserCode.DAMAGED_STORE, f"the journal {self.journal} cannot be read ({error})", "restore it from a copy"
        )

    def head(self) -> int:
        """The newest round, -1 when there is none."""
        return int(self._all("SELECT coalesce(max(round), -1) FROM records")[0][0])

    def problems(self) -> list[str]:
        """What SQLite itself finds wrong with the journal's file."""
        return [text for (text,) in self._all("PRAGMA integrity_check(8)") if text != "ok"]

    def record(self, round: int) -> RecordRow | None:
        """The row of one round, not checked."""
        rows = self._all("SELECT round, digest, state_root, update_digest, data FROM records WHERE round = ?", (round,))
        return RecordRow(*rows[0]) if rows else None

    def packets(self, round: int) -> list[PacketRow]:
        """The rows of one round's packets, not checked."""
        columns = "digest, round, peer, tokens, inner_steps, arrived_ms, verdict, code"
        return [PacketRow(*row) for row in self._all(f"SELECT {columns} FROM packets WHERE round = ?", (round,))]  # noqa: S608 - no foreign text is in it

    def rounds_of(self, root: bytes) -> list[int]:
        """The rounds after which the parameters had this root."""
        return [round for (round,) in self._all("SELECT round FROM records WHERE state_root = ?", (root,))]

    def kept_from(self) -> int:
        """The first round whose blobs retention has left here."""
        rows = self._all("SELECT value FROM meta WHERE name = 'first_round_with_blobs'")
        return int.from_bytes(rows[0][0], "little") if rows else 0

    def run(self) -> RunConfig:
        """The signed run, from the nearest folder that has it. Raises UserError, or ProtocolError when it is forged."""
        run_id = self._all("SELECT value FROM meta WHERE name = 'run_id'")[0][0]
        for folder in (self.path, *list(self.path.parents)[:FOLDERS_DEEP]):
            path = folder / RUN_FILE
            if path.exists():
                with os_errors(path):
                    return SignedRun.from_bytes(path.read_bytes(), run_id=run_id).config
        raise UserError(
            UserCode.NO_SUCH_FILE, f"there is no {RUN_FILE} near {self.path}", f"copy the run's {RUN_FILE} into it"
        )
