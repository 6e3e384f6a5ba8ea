"""What is on the disk of outer parameters that are still on their way here."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from peer.errors import os_errors
from peer.store import atomic_write
from protocol.errors import Code, ProtocolError
from protocol.identity import leaf_hash, merkle_root_of_hashes
from protocol.layout import state_pieces
from protocol.limits import PIECE_BYTES

HASH_BYTES = 32
_BEGUN = ".part"


class PartialState:
    """What is on the disk of a state that is not complete: whole pieces, and the beginnings of others.

    <folder>/<state root>/hashes     of all pieces
    <folder>/<state root>/data       the state, with holes
    <folder>/<state root>/have       a byte for each piece, 1 when it is there
    <folder>/<state root>/N.part     the first bytes of piece N
    """

    def __init__(self, folder: Path, root: bytes, size: int) -> None:
        """Go on with what is there of the state with this root, of `size` bytes; other states' pieces are deleted."""
        self.root, self.size = root, size
        self.count = -(-size // PIECE_BYTES)
        self.hashes: list[bytes] = []
        self.folder = folder / root.hex()
        self._data, self._have = self.folder / "data", self.folder / "have"
        with os_errors(self.folder):
            for other in folder.glob("*"):
                if other != self.folder:
                    shutil.rmtree(other, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            for path, length in ((self._data, size), (self._have, self.count)):
                with path.open("ab") as file:
                    file.truncate(length)
            marks = self._have.read_bytes()
            path = self.folder / "hashes"
            stored = path.read_bytes() if path.exists() else b""
        self.missing = set(range(self.count))
        self.begun = {int(path.stem) for path in self.folder.glob(f"*{_BEGUN}") if path.stem.isdecimal()}
        with suppress(ProtocolError):
            self.set_hashes(stored)
            self._recheck(marks)

    def set_hashes(self, data: bytes) -> None:
        """Take the hashes of all pieces. Raises ProtocolError BAD_STATE unless they lead to the root."""
        hashes = [data[start : start + HASH_BYTES] for start in range(0, len(data), HASH_BYTES)]
        if len(data) != HASH_BYTES * self.count or merkle_root_of_hashes(hashes) != self.root:
            raise ProtocolError(Code.BAD_STATE, "the piece hashes do not lead to the state root")
        if not self.hashes:
            atomic_write(self.folder / "hashes", data)
        self.hashes = hashes

    def _recheck(self, marks: bytes) -> None:
        """Count what is marked as there, unless a power cut took it."""
        with os_errors(self._data), self._data.open("rb") as file:
            for index in (index for index, mark in enumerate(marks) if mark):
                file.seek(index * PIECE_BYTES)
                if leaf_hash(file.read(self.length(index))) == self.hashes[index]:
                    self.missing.discard(index)

    def length(self, index: int) -> int:
        """How many bytes this piece has."""
        return min(PIECE_BYTES, self.size - index * PIECE_BYTES)

    @property
    def held_bytes(self) -> int:
        """Bytes of the pieces that are there, whole and checked."""
        return self.size - sum(map(self.length, self.missing))

    def adopt(self, flat: NDArray[np.float32]) -> None:  # f32[N]
        """Take the pieces that other parameters share with this state."""
        for index, piece in enumerate(state_pieces(flat)):
            if index in self.missing and leaf_hash(piece) == self.hashes[index]:
                self.finish(index, piece)

    def beginning(self, index: int) -> bytes:
        """The first bytes of a piece, not checked yet."""
        path = self._part(index)
        with os_errors(path):
            return path.read_bytes()[: self.length(index)] if path.exists() else b""

    def append_to(self, index: int) -> BinaryIO:
        """A file that takes the next bytes of a piece as they come."""
        path = self._part(index)
        with os_errors(path):
            return path.open("ab", buffering=0)

    def forget_beginning(self, index: int) -> None:
        """Start this piece anew."""
        with os_errors(self.folder):
            self._part(index).unlink(missing_ok=True)

    def finish(self, index: int, piece: bytes | memoryview) -> bool:
        """Keep a whole piece; False when it is not what its hash says."""
        good = len(piece) == self.length(index) and leaf_hash(piece) == self.hashes[index]
        if good:
            for path, place, data in ((self._data, index * PIECE_BYTES, piece), (self._have, index, b"\1")):
                with os_errors(path), path.open("r+b") as file:
                    file.seek(place)
                    file.write(data)
            self.missing.discard(index)
        self.forget_beginning(index)
        return good

    def flat(self) -> NDArray[np.float32]:  # f32[N]
        """The complete state, mapped from the disk and not read into memory; it may be written to, for nobody else."""
        assert not self.missing, "pieces are missing"
        return np.memmap(self._data, dtype="<f4", mode="c")

    def delete(self) -> None:
        """Delete it from the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, index: int) -> Path:
        return self.folder / f"{index}{_BEGUN}"
