"""How packets and updates travel and rest on disk: header and frames of zstd-compressed planes (SPEC 6).

Digests and signatures never cover this form, so another zstd version may write other bytes. The length of every plane
follows from the layout and the planes before it, so nothing is expanded whose size was not known beforehand.
"""

import struct
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from protocol.errors import Code, ProtocolError
from protocol.identity import Buffer
from protocol.layout import Layout, TensorSpec
from protocol.limits import BLOCK_CHUNKS, FRAME_BYTES, ZSTD_WINDOW_BYTES_MAX
from protocol.packet import PACKET_HEADER_BYTES, Packet, PacketHeader, packet_form
from protocol.packing import Section, SectionForm, split_section
from protocol.run import RunConfig
from protocol.update import UPDATE_FORM, UPDATE_HEADER_BYTES, Update, UpdateHeader

_Item = TypeVar("_Item", bound=np.generic)

_COUNT = struct.Struct("<I")
_LENGTHS = struct.Struct("<II")
_PLANES = 6
_FRAME_HEAD_BYTES = _COUNT.size + _PLANES * _LENGTHS.size
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_LEVEL = 1  # higher levels gain nothing on gap bytes, whose distribution is flat


def packet_wire_bytes_max(run: RunConfig) -> int:
    """The most bytes that a packet of this run can have in transport form."""
    return PACKET_HEADER_BYTES + _frames_bytes_max(run.layout, packet_form(run))


def update_wire_bytes_max(run: RunConfig) -> int:
    """The most bytes that an update of this run can have in transport form."""
    return UPDATE_HEADER_BYTES + _frames_bytes_max(run.layout, UPDATE_FORM)


def packet_to_wire(packet: Packet, run: RunConfig) -> bytes:
    """The transport form of a packet that this run accepts or made."""
    return packet.header.to_bytes() + _to_frames(packet.sections, run.layout, packet_form(run))


def update_to_wire(update: Update, run: RunConfig) -> bytes:
    """The transport form of an update that this run accepts or made."""
    return update.header.to_bytes() + _to_frames(update.sections, run.layout, UPDATE_FORM)


def packet_from_wire(data: Buffer, run: RunConfig) -> Packet:
    """Read a packet of this run; signature, Merkle root and the contents of sections are left to `check_packet`.

    Raises ProtocolError: TOO_LARGE, a header's code, OTHER_RUN, TRUNCATED, TRAILING, BAD_FRAME or BAD_ZSTD.
    """
    _check_size(data, packet_wire_bytes_max(run))
    header = PacketHeader.from_bytes(data[:PACKET_HEADER_BYTES])
    _check_run(header.run_id, run)
    return Packet(header, _from_frames(data, PACKET_HEADER_BYTES, run.layout, packet_form(run)))


def update_from_wire(data: Buffer, run: RunConfig) -> Update:
    """Read an update of this run; its digest, Merkle root and the contents of sections are left to `check_update`.

    Raises ProtocolError: TOO_LARGE, a header's code, OTHER_RUN, TRUNCATED, TRAILING, BAD_FRAME, BAD_ZSTD or BAD_COUNT.
    """
    _check_size(data, update_wire_bytes_max(run))
    header = UpdateHeader.from_bytes(data[:UPDATE_HEADER_BYTES])
    _check_run(header.run_id, run)
    return Update(header, _from_frames(data, UPDATE_HEADER_BYTES, run.layout, UPDATE_FORM))


def _check_size(data: Buffer, bytes_max: int) -> None:
    if len(data) > bytes_max:
        raise ProtocolError(Code.TOO_LARGE, f"there are {len(data)} bytes; this run admits at most {bytes_max}")


def _check_run(run_id: bytes, run: RunConfig) -> None:
    if run_id != run.run_id:
        raise ProtocolError(Code.OTHER_RUN, "the bytes belong to another run, so their layout is unknown")


def _frames_bytes_max(layout: Layout, form: SectionForm) -> int:
    """The bound of all sections, each in a frame of its own, every plane stored as it is."""
    return sum(form.section_bytes_max(tensor.size) + _FRAME_HEAD_BYTES for tensor in layout.tensors)


def _to_frames(sections: Sequence[bytes], layout: Layout, form: SectionForm) -> bytes:
    frames: list[bytes] = []
    group: list[Section] = []
    group_bytes = 0
    for section, tensor in zip(sections, layout.tensors, strict=True):
        if group and group_bytes + len(section) > FRAME_BYTES:
            frames.append(_encode_frame(group))
            group, group_bytes = [], 0
        group.append(split_section(section, tensor.size, form)[0])
        group_bytes += len(section)
    frames.append(_encode_frame(group))
    return b"".join(frames)


def _encode_frame(group: Sequence[Section]) -> bytes:
    """Write sections plane by plane, because like compresses with like."""
    heads = np.concatenate([section.heads for section in group])
    planes = (
        (heads & 0xFF).astype(np.uint8),
        (heads >> 8).astype(np.uint8),
        np.concatenate([section.extras for section in group]),
        np.concatenate([section.blocks for section in group]).astype("<u4"),
        np.concatenate([section.gaps for section in group]),
        np.concatenate([section.values for section in group]),
    )
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    parts = [_COUNT.pack(len(group))]
    for plane in planes:
        raw = plane.tobytes()
        stored = compressor.compress(raw)
        if len(stored) >= len(raw):
            stored = raw
        parts += [_LENGTHS.pack(len(raw), len(stored)), stored]
    return b"".join(parts)


def _from_frames(data: Buffer, offset: int, layout: Layout, form: SectionForm) -> tuple[bytes, ...]:
    reader = _FrameReader(data, offset, form)
    sections: list[bytes] = []
    while len(sections) < len(layout.tensors):
        sections += reader.frame(layout.tensors[len(sections) :])
    if reader.offset != len(data):
        raise ProtocolError(Code.TRAILING, f"{len(data) - reader.offset} bytes follow the last frame")
    return tuple(sections)


class _FrameReader:
    """Walks over foreign bytes. Every length is checked before the bytes behind it are touched."""

    def __init__(self, data: Buffer, offset: int, form: SectionForm) -> None:
        self.offset = offset
        self._data = memoryview(data)
        self._form = form
        self._decompressor = zstandard.ZstdDecompressor()

    def frame(self, tensors: Sequence[TensorSpec]) -> list[bytes]:
        """Read one frame, which carries the sections of the first few of these tensors."""
        (count,) = _COUNT.unpack(self._take(_COUNT.size))
        if not 1 <= count <= len(tensors):
            raise ProtocolError(Code.BAD_FRAME, f"a frame claims {count} sections, {len(tensors)} are missing")
        form, sizes = self._form, [tensor.size for tensor in tensors[:count]]
        chunks = [tensor.chunks for tensor in tensors[:count]]
        block_counts = [-(-number // BLOCK_CHUNKS) for number in chunks]
        lows, highs = self._plane(sum(chunks)), self._plane(sum(chunks))
        heads = _cut(lows + highs.astype(np.uint16) * np.uint16(256), chunks)
        extra_lengths = [number * form.extra_bytes for number in chunks]
        extras = _cut(self._plane(sum(extra_lengths)), extra_lengths)
        blocks = _cut(self._plane(4 * sum(block_counts)).view("<u4"), block_counts)
        gap_lengths = [int(block.sum(dtype=np.int64)) for block in blocks]
        if any(length > form.gap_bytes_max(size) for length, size in zip(gap_lengths, sizes, strict=True)):
            raise ProtocolError(Code.TOO_LARGE, "the blocks of a section claim more gap bytes than are possible")
        gaps = _cut(self._plane(sum(gap_lengths)), gap_lengths)
        value_lengths = [
            form.value_bytes(int(form.counts(head, size).sum())) for head, size in zip(heads, sizes, strict=True)
        ]
        values = _cut(self._plane(sum(value_lengths)), value_lengths)
        parts = zip(heads, extras, blocks, gaps, values, strict=True)
        return [Section(*part).to_bytes() for part in parts]

    def _take(self, length: int) -> memoryview:
        if length > len(self._data) - self.offset:
            raise ProtocolError(Code.TRUNCATED, "the bytes end inside a frame")
        self.offset += length
        return self._data[self.offset - length : self.offset]

    def _plane(self, length: int) -> NDArray[np.uint8]:  # -> u8[length]
        """Read a plane that must have this length. Raises ProtocolError BAD_FRAME, TRUNCATED or BAD_ZSTD."""
        raw_length, stored_length = _LENGTHS.unpack(self._take(_LENGTHS.size))
        if raw_length != length or stored_length > raw_length:
            claim = f"{raw_length} bytes stored in {stored_length}"
            raise ProtocolError(Code.BAD_FRAME, f"a plane of {length} bytes claims {claim}")
        stored = self._take(stored_length)
        if stored_length == raw_length:
            return np.frombuffer(stored, np.uint8)
        return np.frombuffer(self._expand(stored, raw_length), np.uint8)

    def _expand(self, stored: memoryview, length: int) -> bytes:
        """Expand one zstd frame that declares exactly this length and no larger window than decoders must have."""
        try:
            if stored[:4] != _ZSTD_MAGIC:
                raise ProtocolError(Code.BAD_ZSTD, "a plane is not a zstd frame")
            declared = zstandard.get_frame_parameters(stored)
            if declared.content_size != length or declared.window_size > ZSTD_WINDOW_BYTES_MAX:
                claim = f"{declared.content_size} bytes and a window of {declared.window_size}"
                raise ProtocolError(Code.BAD_ZSTD, f"a plane of {length} bytes declares {claim}")
            raw = self._decompressor.decompress(stored, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ProtocolError(Code.BAD_ZSTD, f"a plane does not expand: {error}") from None
        if len(raw) != length:
            raise ProtocolError(Code.BAD_ZSTD, f"a plane expands to {len(raw)} bytes, not {length}")
        return raw


def _cut(plane: NDArray[_Item], lengths: Sequence[int]) -> list[NDArray[_Item]]:
    """Cut a plane into one part per section."""
    return np.split(plane, np.cumsum(lengths)[:-1])
