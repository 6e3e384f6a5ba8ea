"""Everything a program keeps on disk, except the journal: keys, blobs, states.

A home folder belongs to one program at a time:

    <home>/key                              who we are, mode 0600
    <home>/lock                             held while a program runs here
    <home>/log.jsonl                        one event a line (peer.telemetry)
    <home>/runs/<run_id>/journal.sqlite     records and packets (peer.journal)
    <home>/runs/<run_id>/blobs/             packets, updates and amendments by digest, bundles by record
    <home>/runs/<run_id>/states/            outer parameters by state root
    <home>/runs/<run_id>/replica.safetensors  a peer's residual, moments and packet in flight (peer.keep)

A file appears under its name only when it is complete and on the disk, so a power cut leaves old bytes or new bytes,
never half of each. Whatever the operating system refuses becomes a UserError with a remedy.
"""

import json
import os
import re
import secrets
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from peer.errors import UserCode, UserError, os_errors
from peer.journal import Journal
from protocol.identity import PrivateKey
from protocol.layout import Layout, piece_hashes, state_root
from protocol.limits import PIECE_BYTES

BLOB_KINDS = ("packet", "update", "bundle", "amendment")
_TEMPORARY = ".tmp"
_DIGEST_HEX = re.compile(r"[0-9a-f]{64}")
_HASH_BYTES = 32


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Give a file to write; when the block ends well it is synced and takes the place of `path`, else it vanishes."""
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def atomic_write(path: Path, data: bytes | memoryview, mode: int = 0o644) -> None:
    """Write a whole file so that it is either complete and on the disk, or absent. Raises UserError."""
    with replacing(path, mode) as file:
        file.write(data)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut. Windows has no such call and needs none."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_key(path: Path) -> PrivateKey:
    """Read a private key file. Raises UserError when others may read it, or when it is damaged or absent."""
    with os_errors(path):
        mode = path.stat().st_mode
        if os.name == "posix" and mode & 0o077:
            raise UserError(
                UserCode.OPEN_KEY,
                f"other users of this machine may read the private key {path}",
                f"chmod 600 '{path}'; if somebody may have read it, delete it, and a new one is made",
            )
        text = path.read_bytes()
    try:
        return PrivateKey.from_text(text.decode("ascii"))
    except ValueError as error:
        raise UserError(
            UserCode.BAD_KEY_FILE,
            f"{path} holds no usable private key",
            f"restore {path} from a backup, or delete it: a new key (and so a new identity) is then made",
        ) from error


def load_or_make_key(path: Path) -> PrivateKey:
    """Read the private key, or make one that only this user may read. Raises UserError as `load_key` does."""
    if not path.exists():
        atomic_write(path, PrivateKey.generate().to_text().encode("ascii") + b"\n", mode=0o600)
    return load_key(path)


class Home:
    """The folder of one program."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        with os_errors(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def key_path(self) -> Path:
        """The private key of this identity."""
        return self.path / "key"

    @property
    def log_path(self) -> Path:
        """The events, one JSON object a line."""
        return self.path / "log.jsonl"

    def run(self, run_id: bytes) -> "RunFolder":
        """The part of this home that belongs to one run."""
        return RunFolder(self.path / "runs" / run_id.hex(), run_id)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this home alone, and clear away what a killed predecessor left half-written.

        Raises UserError HOME_IN_USE at once when another process holds it. The lock dies with its process.
        """
        path = self.path / "lock"
        with os_errors(path):
            file = path.open("ab")
        with file:
            if not _try_lock(file):
                raise UserError(
                    UserCode.HOME_IN_USE,
                    f"another program is running in {self.path}",
                    "stop it first, or give this one its own folder with --home; two peers never share a key",
                )
            with os_errors(self.path):
                for leftover in self.path.rglob(f".*{_TEMPORARY}"):
                    leftover.unlink(missing_ok=True)
            yield


def _try_lock(file: BinaryIO) -> bool:
    """Lock an open file for this process alone; False when another has it."""
    try:
        if sys.platform == "win32":
            import msvcrt  # noqa: PLC0415  exists on Windows only

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl  # noqa: PLC0415  does not exist on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class RunFolder:
    """What a home holds about one run: `journal`, `blobs` and `states`."""

    def __init__(self, path: Path, run_id: bytes) -> None:
        self.path = path
        with os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        self.blobs = BlobStore(path / "blobs")
        self.states = StateStore(path / "states")
        self.journal = Journal(path / "journal.sqlite", run_id)

    @property
    def replica_path(self) -> Path:
        """Where a peer keeps its replica (peer.keep)."""
        return self.path / "replica.safetensors"

    def close(self) -> None:
        """Close the journal."""
        self.journal.close()

    def forget(self, *, keep_rounds: int, blob_bytes_max: int) -> int:
        """Delete the packets, updates and bundles of old rounds; return the bytes freed.

        Those of the last `keep_rounds` rounds always stay, since a peer that comes back replays them. Of the older
        ones the newest stay as far as `blob_bytes_max` reaches. Journal rows stay: they are small and tell the story.
        """
        head = self.journal.head()
        if head is None:
            return 0
        left = blob_bytes_max
        freed = 0
        full = False
        # Everything below this round went earlier, so a long run does not look at all its rounds again and again.
        first = int.from_bytes(self.journal.meta("first_round_with_blobs") or b"", "little")
        kept_from = first
        for round_number in range(head.round, first - 1, -1):
            blobs = self.journal.blobs_of(round_number)
            size = sum(self.blobs.size(kind, digest.hex()) for kind, digest in blobs)
            left -= size
            full = full or left < 0
            if full and round_number <= head.round - keep_rounds:
                for kind, digest in blobs:
                    self.blobs.delete(kind, digest.hex())
                freed += size
                kept_from = max(kept_from, round_number + 1)
        if kept_from != first:
            self.journal.set_meta("first_round_with_blobs", kept_from.to_bytes(8, "little"))
        return freed


class BlobStore:
    """Files named by the digest that others ask for. Content never changes under its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, kind: str, digest_hex: str, data: bytes | memoryview) -> Path:
        """Keep a blob durably; writing it again changes nothing. Raises UserError."""
        path = self._place(kind, digest_hex)
        if not path.exists():
            atomic_write(path, data)
        return path

    def path(self, kind: str, digest_hex: str) -> Path | None:
        """Where the blob lies, or None."""
        path = self._place(kind, digest_hex)
        return path if path.exists() else None

    def get(self, kind: str, digest_hex: str) -> bytes | None:
        """The blob's bytes, or None. Raises UserError when the disk fails."""
        path = self._place(kind, digest_hex)
        with os_errors(path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def size(self, kind: str, digest_hex: str) -> int:
        """The blob's size in bytes; 0 when it is not here."""
        path = self._place(kind, digest_hex)
        with os_errors(path):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                return 0

    def delete(self, kind: str, digest_hex: str) -> None:
        """Forget a blob; nothing happens when it is not here."""
        path = self._place(kind, digest_hex)
        with os_errors(path):
            path.unlink(missing_ok=True)

    def _place(self, kind: str, digest_hex: str) -> Path:
        # A name may come from the network, so nothing but a digest ever becomes a part of a path.
        if kind not in BLOB_KINDS or not _DIGEST_HEX.fullmatch(digest_hex):
            raise ValueError(f"{kind!r} {digest_hex[:80]!r} names no blob")
        return self.folder / kind / digest_hex[:2] / digest_hex


class StateStore:
    """Outer parameters as safetensors files named by their state root.

    The tensors lie in a file in the order of the layout, so after its header the file is the state of SPEC 3, byte for
    byte, and its pieces of 4 MiB are served straight from it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces: dict[bytes, tuple[bytes, int]] = {}  # hash of a piece -> a state that has it, and which piece
        if folder.exists():
            with os_errors(folder):
                for root in self.roots():
                    self._index(root)

    def save(self, flat: NDArray[np.float32], layout: Layout, metadata: Mapping[str, str]) -> bytes:  # flat: f32[N]
        """Keep the parameters durably and return their state root. `metadata` is for people. Raises UserError."""
        assert flat.size == layout.size, "the parameters do not have the size of the layout"
        hashes = piece_hashes(flat)
        root = state_root(flat)
        if not self.has(root):
            with replacing(self._file(root)) as file:
                tensors = [(tensor.name, "F32", tensor.shape, 4 * tensor.size) for tensor in layout.tensors]
                file.write(safetensors_header(tensors, {**metadata, "state_root": root.hex()}))
                file.write(np.ascontiguousarray(flat, dtype="<f4").data)
            # Written last: a state without its piece hashes counts as absent.
            atomic_write(self._hash_file(root), b"".join(hashes))
        self._index(root)
        return root

    def load(self, root: bytes, layout: Layout) -> NDArray[np.float32]:  # f32[N]
        """Read the parameters with this root and check every bit. Raises UserError when absent or damaged."""
        path = self._file(root)
        flat = np.empty(layout.size, dtype=np.float32)
        with os_errors(path):
            path.stat()
            try:
                with safe_open(path, framework="numpy") as file:
                    if sorted(file.keys()) != [tensor.name for tensor in layout.tensors]:
                        raise _damaged(path)
                    for tensor, start in zip(layout.tensors, layout.offsets, strict=False):
                        values = file.get_tensor(tensor.name)
                        if values.shape != tensor.shape or values.dtype != np.float32:
                            raise _damaged(path)
                        flat[start : start + tensor.size] = values.reshape(-1)
            except SafetensorError as error:
                raise _damaged(path) from error
        if state_root(flat) != root:
            raise _damaged(path)
        return flat

    def has(self, root: bytes) -> bool:
        """Whether the state is here, complete."""
        return self._file(root).exists() and self._hash_file(root).exists()

    def roots(self) -> list[bytes]:
        """The roots of all complete states."""
        names = (path.stem for path in self.folder.glob("*.pieces") if _DIGEST_HEX.fullmatch(path.stem))
        return sorted(root for root in map(bytes.fromhex, names) if self.has(root))

    def hashes(self, root: bytes) -> bytes | None:
        """The piece hashes of a state, 32 bytes each, or None when the state is not here."""
        path = self._hash_file(root)
        with os_errors(path):
            return path.read_bytes() if self.has(root) else None

    def piece(self, piece_hash: bytes) -> bytes | None:
        """The bytes of one piece, at most 4 MiB, or None when no state here has it."""
        place = self._pieces.get(piece_hash)
        if place is None:
            return None
        root, index = place
        path = self._file(root)
        with os_errors(path), path.open("rb") as file:
            header_bytes = 8 + int.from_bytes(file.read(8), "little")
            file.seek(header_bytes + index * PIECE_BYTES)
            return file.read(PIECE_BYTES)

    def keep(self, roots: Collection[bytes]) -> None:
        """Delete every other state, and halves that a crash has left of one."""
        names = {root.hex() for root in roots}
        # The hashes go first, for a state without them counts as absent.
        for path in (*self.folder.glob("*.pieces"), *self.folder.glob("*.safetensors")):
            if path.stem not in names and _DIGEST_HEX.fullmatch(path.stem):
                with os_errors(path):
                    path.unlink(missing_ok=True)
        self._pieces = {piece: place for piece, place in self._pieces.items() if place[0] in roots}
        # A piece that two states share may have been indexed under the one that went.
        for root in self.roots():
            self._index(root)

    def _index(self, root: bytes) -> None:
        hashes = self._hash_file(root).read_bytes()
        for index in range(len(hashes) // _HASH_BYTES):
            self._pieces[hashes[index * _HASH_BYTES : (index + 1) * _HASH_BYTES]] = (root, index)

    def _file(self, root: bytes) -> Path:
        return self.folder / f"{root.hex()}.safetensors"

    def _hash_file(self, root: bytes) -> Path:
        return self.folder / f"{root.hex()}.pieces"


def safetensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: (name, dtype, shape, bytes) of each tensor, in the order of their data.

    Padded so that the data is aligned to 8 bytes.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, dtype, shape, size in tensors:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _damaged(path: Path) -> UserError:
    return UserError(
        UserCode.DAMAGED_STORE,
        f"{path} does not hold the parameters that its name promises",
        f"delete {path} and start the same command again: the parameters are fetched anew",
    )
