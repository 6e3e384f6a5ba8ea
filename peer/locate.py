"""Where stored bytes are not what they should be: the part of a file, and the byte, as exactly as it can be known.

The truth is seldom stored twice. But digests say when a guess is right, so the one bit that rotted is found by trying,
where there are not too many to try; and what two files must agree on is compared, value by value.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from peer.store import safetensors_header
from protocol.errors import ProtocolError
from protocol.identity import digest, leaf_hash, merkle_root, merkle_root_of_hashes
from protocol.layout import Layout
from protocol.limits import CHUNK, PIECE_BYTES
from protocol.packet import PACKET_HEADER_BYTES, packet_form
from protocol.packing import SectionForm, split_section
from protocol.run import RunConfig
from protocol.update import UPDATE_FORM, UPDATE_HEADER_BYTES
from protocol.wire import packet_from_wire, update_from_wire

# Trying a bit takes a hash or two; this is a second or so for small things, and large ones are told in fewer words.
_HASHED_BYTES_MAX = 1 << 28

Fields = Sequence[tuple[str, int]]
_PACKET_FIELDS: Fields = (
    ("magic", 4),
    ("version", 2),
    ("reserved", 2),
    ("run_id", 32),
    ("round", 4),
    ("base_root", 32),
    ("peer", 32),
    ("tokens", 8),
    ("inner_steps", 4),
    ("sections_root", 32),
    ("signature", 64),
)
_UPDATE_FIELDS: Fields = (*_PACKET_FIELDS[:6], ("new_root", 32), ("sections_root", 32))
_HEADERS = {"packet": (_PACKET_FIELDS, PACKET_HEADER_BYTES), "update": (_UPDATE_FIELDS, UPDATE_HEADER_BYTES)}
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_HEAD_BYTES = 18
_HEAD = "its head"
_RECORD_FIELDS: Fields = (
    ("magic", 4),
    ("version", 2),
    ("kind", 1),
    ("reason", 1),
    ("run_id", 32),
    ("round", 4),
    ("epoch", 4),
    ("previous", 32),
    ("state_root", 32),
    ("update_digest", 32),
    ("opened_ms", 8),
    ("closed_ms", 8),
    ("entries", 4),
)
_ENTRY_FIELDS: Fields = (
    ("peer", 32),
    ("packet_digest", 32),
    ("verdict", 1),
    ("code", 2),
    ("tokens", 8),
    ("inner_steps", 4),
    ("weight", 2),
    ("clip", 4),
)
_RECORD_BYTES = sum(size for _, size in _RECORD_FIELDS)
_ENTRY_BYTES = sum(size for _, size in _ENTRY_FIELDS)
_TAIL_BYTES = 96


@dataclass(frozen=True)
class Place:
    """A difference. `byte` counts from the start of what `part` names, and is -1 where only the part is known."""

    part: str
    byte: int
    expected: str
    found: str

    def __str__(self) -> str:
        where = f"{self.part}, byte {self.byte}" if self.byte >= 0 else self.part
        return f"{where}: expected {self.expected}, found {self.found}"


def flipped_bit(data: bytes, good: Callable[[bytes], bool], spans: Iterable[tuple[int, int]], cost: int) -> int | None:
    """The one bit within these spans of bytes whose flip makes `data` good; `cost` are the bytes that a try hashes."""
    trial, budget = bytearray(data), _HASHED_BYTES_MAX // max(cost, 256)
    for start, stop in spans:
        for bit in range(8 * start, 8 * stop):
            if not budget:
                return None
            budget -= 1
            trial[bit // 8] ^= 1 << bit % 8
            if good(bytes(trial)):
                return bit
            trial[bit // 8] ^= 1 << bit % 8
    return None


def mended(data: bytes, bit: int) -> bytes:
    """The data with this bit flipped."""
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def _at(data: bytes, bit: int, part: str, start: int = 0) -> Place:
    byte = bit // 8
    return Place(part, byte - start, f"{data[byte] ^ 1 << bit % 8:02x}", f"{data[byte]:02x} (one bit flipped)")


def first_difference(expected: bytes, found: bytes, part: str) -> Place | None:
    """The first byte that differs."""
    if expected == found:
        return None
    most = min(len(expected), len(found))
    a, b = np.frombuffer(expected, np.uint8, most), np.frombuffer(found, np.uint8, most)
    different = np.flatnonzero(a != b)
    if not different.size:
        return Place(part, most, f"{len(expected)} bytes", f"{len(found)} bytes")
    byte = int(different[0])
    return Place(part, byte, f"{expected[byte]:02x}", f"{found[byte]:02x}")


# ---------------------------------------------------------------- records


def record_field(data: bytes, byte: int) -> str:
    """Which field of a round record this byte belongs to."""
    if byte < _RECORD_BYTES:
        return _field(_RECORD_FIELDS, byte)
    if byte >= len(data) - _TAIL_BYTES:
        return "aggregator" if byte < len(data) - _TAIL_BYTES + 32 else "signature"
    number, rest = divmod(byte - _RECORD_BYTES, _ENTRY_BYTES)
    return f"entry {number}, {_field(_ENTRY_FIELDS, rest)}"


def _field(fields: Fields, byte: int) -> str:
    for name, size in fields:
        if byte < size:
            return name
        byte -= size
    return "beyond the end"


def mend_record(data: bytes, digests: Iterable[bytes]) -> tuple[bytes, Place] | None:
    """The record with one of these digests that differs from `data` in one bit, and where."""
    wanted = set(digests)
    bit = flipped_bit(data, lambda trial: digest("record", trial) in wanted, [(0, len(data))], len(data))
    if bit is None:
        return None
    return mended(data, bit), _at(data, bit, f"field {record_field(data, bit // 8)}")


# ---------------------------------------------------------------- packets and updates


def header_place(raw: bytes, kind: str, wanted: bytes) -> Place | None:
    """Where the header of a packet or update is not the one with this digest; None when it is."""
    fields, size = _HEADERS[kind]
    header = raw[:size]
    if digest(kind, header) == wanted:
        return None
    bit = flipped_bit(header, lambda trial: digest(kind, trial) == wanted, [(0, len(header))], size)
    if bit is not None:
        return _at(header, bit, f"header, field {_field(fields, bit // 8)}")
    return Place("header", -1, f"digest {wanted.hex()[:16]}", f"digest {digest(kind, header).hex()[:16]}")


def planes(raw: bytes, kind: str, run: RunConfig) -> Iterator[tuple[int, int, str]]:
    """Where the head and the planes of each frame lie in the file, as far as it can be read: (start, stop, name)."""
    form, at = (packet_form(run), PACKET_HEADER_BYTES) if kind == "packet" else (UPDATE_FORM, UPDATE_HEADER_BYTES)
    heads = ["scales"] if form.head_bytes == 1 else ["low bytes of counts", "high bytes of counts"]
    names = [*heads, "ratios" if kind == "packet" else "exponents", "blocks", "gaps", "codes"]
    head = struct.Struct(f"<II{len(names)}I")
    number, frame = 0, 0
    while at + head.size <= len(raw) and number < len(run.layout.tensors):
        count, _, *lengths = head.unpack_from(raw, at)
        sections = f"frame {frame} (sections {number} to {number + count - 1})"
        yield at, at + head.size, f"{sections}, {_HEAD}"
        at += head.size
        for name, length in zip(names, lengths, strict=True):
            stop = min(at + length, len(raw))
            yield at, stop, f"{sections}, {name}"
            at = stop
        number, frame = number + max(count, 1), frame + 1


def file_place(expected: bytes, found: bytes, kind: str, run: RunConfig) -> Place:
    """The first byte at which two files of one packet or update differ, and what it belongs to."""
    place = first_difference(expected, found, "the file")
    assert place is not None, "the files differ"
    fields, size = _HEADERS[kind]
    if place.byte < size:
        name = f"header, field {_field(fields, place.byte)}"
    else:
        spans = planes(expected, kind, run)
        name = next((name for start, stop, name in spans if start <= place.byte < stop), "its end")
    return Place(f"{name}, in the file", place.byte, place.expected, place.found)


def plane_place(raw: bytes, kind: str, run: RunConfig, error: ProtocolError, root: bytes) -> Place:
    """Where a packet or update that cannot be read is damaged. `root` is the Merkle root that its sections must have.

    As many bits are tried as take a few seconds: first those of frames' heads and of the beginnings of planes, for they
    are few and damage there is what mostly stops a reader. Else it is the first plane that does not expand.
    """
    spans = list(planes(raw, kind, run))
    beginnings = [(start, min(start + _ZSTD_HEAD_BYTES, stop)) for start, stop, _ in spans]
    rests = [(begun, stop) for (_, begun), (_, stop, _) in zip(beginnings, spans, strict=True)]
    heads = [(start, stop) for start, stop, name in spans if name.endswith(_HEAD)]
    tries = [*heads, *beginnings, *rests]
    bit = flipped_bit(raw, lambda trial: reads_as(trial, kind, run, root), tries, 8 * len(raw))
    for start, stop, name in spans:
        if bit is not None and start <= bit // 8 < stop:
            return _at(raw, bit, f"{name}, in the file")
        if bit is None and raw[start : start + 4] == _ZSTD_MAGIC:
            try:
                zstandard.ZstdDecompressor().decompress(raw[start:stop], max_output_size=1 << 30)
            except zstandard.ZstdError as why:
                return Place(f"{name}, in the file from byte {start} to {stop}", -1, "a zstd frame", str(why))
    return Place("its frames", -1, "frames that can be read", f"{error.code.name} ({error.detail})")


def section_place(expected: bytes, found: bytes, number: int, layout: Layout, form: SectionForm) -> Place:
    """The first byte at which two sections differ, and what it says."""
    name = section_name(number, layout)
    place = first_difference(expected, found, name)
    assert place is not None, "the sections differ"
    part = _part_of(expected, place.byte, layout.tensors[number].size, form)
    return Place(f"{name}, {part}", place.byte, place.expected, place.found)


def section_name(number: int, layout: Layout) -> str:
    """A section and the tensor that it is of."""
    return f"section {number} ({layout.tensors[number].name})"


def _part_of(section: bytes, byte: int, size: int, form: SectionForm) -> str:
    parts = split_section(section, size, form)
    for name, part in (
        ("heads of chunks", parts.heads),
        ("ratios or exponents", parts.extras),
        ("blocks", parts.blocks),
        ("gaps", parts.gaps),
        ("values", parts.values),
    ):
        if byte < part.nbytes:
            return name
        byte -= part.nbytes
    return "its end"


def packet_section_place(
    sections: Sequence[bytes], root: bytes, suspects: Iterable[tuple[int, str]], layout: Layout
) -> Place:
    """Where the sections of a packet are not those of its Merkle root.

    `suspects` are the numbers of sections to look at, best first, with what speaks against them.
    """
    hashes, named = [leaf_hash(section) for section in sections], ""
    for number, why in suspects:
        named = named or (f"{section_name(number, layout)}, {why}" if why else "")
        section = sections[number]

        def good(trial: bytes, number: int = number) -> bool:
            return merkle_root_of_hashes([*hashes[:number], leaf_hash(trial), *hashes[number + 1 :]]) == root

        bit = flipped_bit(section, good, [(0, len(section))], len(section) + 64 * len(hashes))
        if bit is not None:
            return _at(section, bit, section_name(number, layout))
    found = merkle_root_of_hashes(hashes)
    return Place(named or "its sections", -1, f"Merkle root {root.hex()[:16]}", found.hex()[:16])


def reads_as(raw: bytes, kind: str, run: RunConfig, root: bytes) -> bool:
    """Whether this is a packet or update in transport form whose sections have this Merkle root."""
    try:
        sections = packet_from_wire(raw, run).sections if kind == "packet" else update_from_wire(raw, run).sections
    except ProtocolError:
        return False
    return merkle_root(sections) == root


# ---------------------------------------------------------------- states


def state_place(
    path: Path,
    flat: NDArray[np.float32],  # f32[N]
    root: bytes,
    rounds: Sequence[int],
    run: RunConfig,
) -> Place | None:
    """Where a stored state is not `flat`, which has this root after these rounds; None when it is, to the last bit."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        text = file.read(min(header_bytes, 1 << 24))
        place = _state_header_place(header_bytes, text, root, rounds, run)
        if place is not None:
            return place
        expected = memoryview(flat.data).cast("B")
        for start in range(0, len(expected), PIECE_BYTES):
            piece = expected[start : start + PIECE_BYTES]
            here = first_difference(bytes(piece), file.read(len(piece)), "parameters")
            if here is not None:
                return _value_place(here, start, run.layout)
        rest = len(file.read())
    return Place("its end", -1, "nothing more", f"{rest} bytes more") if rest else None


def _value_place(place: Place, start: int, layout: Layout) -> Place:
    """Say of a byte of the parameters which tensor's it is."""
    byte = start + place.byte
    number = next(i for i, offset in enumerate(layout.offsets[1:]) if byte < 4 * offset)
    inside = byte - 4 * layout.offsets[number]
    part = f"tensor {number} ({layout.tensors[number].name}), value {inside // 4} (chunk {inside // 4 // CHUNK})"
    return Place(part, inside, place.expected, place.found)


def _state_header_place(size: int, text: bytes, root: bytes, rounds: Sequence[int], run: RunConfig) -> Place | None:
    """Compare the head of a safetensors file with what `StateStore.save` writes after one of these rounds."""
    tensors = [(tensor.name, "F32", tensor.shape, 4 * tensor.size) for tensor in run.layout.tensors]
    heads = [
        safetensors_header(tensors, {"run": run.name, "round": str(round), "state_root": root.hex()})
        for round in rounds
    ]
    found = size.to_bytes(8, "little") + text
    return None if found in heads else first_difference(heads[0], found, "header")
