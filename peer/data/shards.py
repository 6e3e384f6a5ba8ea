"""Token shards: one file that holds a token stream, written whole and read through a memory map.

Layout, little-endian: `SLTK`, version u16, bytes per token u16 (1, 2 or 4), tokens u64, vocabulary u32, zero u32,
SHA-256 of the token bytes, zeros up to 64 bytes; then the tokens.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peer.store import replacing

MAGIC = b"SLTK"
VERSION = 1
HEADER_BYTES = 64
_HEADER = struct.Struct("<4sHHQII32s8x")
_TYPES: dict[int, np.dtype[np.unsignedinteger]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True)
class Shard:
    """An open token stream. `tokens` is a read-only memory map; `sha256` is the hash of its bytes."""

    path: Path
    tokens: NDArray[np.unsignedinteger]  # u8, u16 or u32 [tokens]
    vocab_size: int
    sha256: str


def token_type(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type that holds every id below `vocab_size`."""
    return _TYPES[1 if vocab_size <= 1 << 8 else 2 if vocab_size <= 1 << 16 else 4]


def write_shard(path: Path, parts: Iterable[NDArray[np.integer]], vocab_size: int) -> None:
    """Write token arrays, one after the other, as a shard. A reader sees the whole file or none.

    Raises ValueError when a token is outside the vocabulary or there are no tokens, UserError when the disk refuses.
    """
    kind = token_type(vocab_size)
    count, sha256 = 0, hashlib.sha256()
    with replacing(path) as file:
        file.write(bytes(HEADER_BYTES))
        for part in parts:
            if part.size and (int(part.min()) < 0 or int(part.max()) >= vocab_size):
                raise ValueError(f"a token of {path.name} is outside the vocabulary of {vocab_size}")
            data = part.astype(kind).tobytes()
            file.write(data)
            sha256.update(data)
            count += part.size
        if count == 0:
            raise ValueError(f"there are no tokens to write to {path}")
        file.seek(0)
        file.write(_HEADER.pack(MAGIC, VERSION, kind.itemsize, count, vocab_size, 0, sha256.digest()))


def open_shard(path: Path, *, verify: bool = False) -> Shard:
    """Open a shard for reading; with `verify` also hash its tokens.

    Raises ValueError when the file is missing, truncated, too long, foreign or (with `verify`) damaged.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"cannot open the token shard {path}: {error.strerror}") from error
    if len(head) < HEADER_BYTES or head[:4] != MAGIC:
        raise ValueError(f"{path} is not a token shard; make one with write_shard")
    _, version, width, count, vocab_size, zero, sha256 = _HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(f"{path} has shard version {version}, this program reads {VERSION}; make the shard again")
    if width not in _TYPES or zero != 0 or any(head[_HEADER.size - 8 :]) or count == 0 or vocab_size == 0:
        raise ValueError(f"{path} has a damaged header; make the shard again")
    if size != HEADER_BYTES + count * width:
        raise ValueError(f"{path} has {size} bytes, its header promises {HEADER_BYTES + count * width}; copy it again")
    tokens: NDArray[np.unsignedinteger] = np.memmap(
        path, dtype=_TYPES[width], mode="r", offset=HEADER_BYTES, shape=(count,)
    )
    if verify and hashlib.sha256(tokens.data).digest() != sha256:
        raise ValueError(f"the tokens of {path} do not have the hash in its header; copy it again")
    return Shard(path, tokens, vocab_size, sha256.hex())
