"""How packets and updates travel and rest on disk: header and frames of zstd-compressed planes (SPEC 6).

Digests and signatures never cover this form, so another zstd version may write other bytes. The length of every plane
follows from the layout, the head of its frame and the planes before it, so nothing is expanded whose size was not known
and checked beforehand.
"""

import struct
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import zstandard
from numpy.typing import NDArray

from protocol.errors import Code, ProtocolError
from protocol.identity import Buffer
from protocol.layout import Layout, TensorSpec
from protocol.limits import FRAME_BYTES, ZSTD_WINDOW_BYTES_MAX
from protocol.packet import PACKET_HEADER_BYTES, Packet, PacketHeader, packet_form
from protocol.packing import Section, SectionForm, split_section
from protocol.run import RunConfig
from protocol.update import UPDATE_FORM, UPDATE_HEADER_BYTES, Update, UpdateHeader

_SIZE = struct.Struct("<I")  # of a packet in a bundle
_HEAD = struct.Struct(
    "<II"
)  # of a frame: how many sections, how many gap bytes; the stored length of each plane follows
_FRAME_HEAD_BYTES_MAX = _HEAD.size + 6 * 4
_SCAN_BYTES = 1 << 16  # gap bytes looked at together, so that scratch memory stays in the caches
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


def bundle_bytes_max(run: RunConfig, count: int) -> int:
    """The most bytes that a bundle of `count` packets of this run can have."""
    return count * (_SIZE.size + packet_wire_bytes_max(run))


def bundle_to_wire(packets: Sequence[bytes]) -> bytes:
    """The packets of a round, each in transport form, in the order of its record (SPEC 11)."""
    return b"".join(part for packet in packets for part in (_SIZE.pack(len(packet)), packet))


def bundle_from_wire(data: Buffer, count: int, run: RunConfig) -> list[bytes]:
    """Cut a bundle into its `count` packets in transport form; each is left to `packet_from_wire`.

    Raises ProtocolError TOO_LARGE, TRUNCATED or TRAILING.
    """
    _check_size(data, bundle_bytes_max(run, count))
    packet_bytes_max = packet_wire_bytes_max(run)
    reader = _Reader(data, 0)
    packets = []
    for _ in range(count):
        (size,) = _SIZE.unpack(reader.take(_SIZE.size))
        if size > packet_bytes_max:
            raise ProtocolError(Code.TOO_LARGE, f"a packet claims {size} bytes; this run admits {packet_bytes_max}")
        packets.append(bytes(reader.take(size)))
    reader.check_end()
    return packets


def _frames_bytes_max(layout: Layout, form: SectionForm) -> int:
    """The bound of all sections, each in a frame of its own, every plane stored as it is."""
    return sum(form.section_bytes_max(tensor.size) + _FRAME_HEAD_BYTES_MAX for tensor in layout.tensors)


def _planes(form: SectionForm) -> int:
    """The heads of updates have two planes, since their low and their high bytes are unlike."""
    return 4 + form.head_bytes


def _to_frames(sections: Sequence[bytes], layout: Layout, form: SectionForm) -> bytes:
    frames: list[bytes] = []
    group: list[Section] = []
    group_bytes = 0
    for section, tensor in zip(sections, layout.tensors, strict=True):
        if group and group_bytes + len(section) > FRAME_BYTES:
            frames.append(_encode_frame(group, form))
            group, group_bytes = [], 0
        group.append(split_section(section, tensor.size, form))
        group_bytes += len(section)
    frames.append(_encode_frame(group, form))
    return b"".join(frames)


def _encode_frame(group: Sequence[Section], form: SectionForm) -> bytes:
    """Write sections plane by plane, because like compresses with like."""
    heads = np.concatenate([section.heads.view(np.uint8).reshape(-1, form.head_bytes) for section in group])
    planes = (
        *(heads[:, place] for place in range(form.head_bytes)),
        np.concatenate([section.extras for section in group]),
        np.concatenate([section.blocks.astype("<u4", copy=False).view(np.uint8) for section in group]),
        np.concatenate([section.gaps for section in group]),
        np.concatenate([section.values for section in group]),
    )
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    stored = []
    for plane in planes:
        raw = plane.tobytes()
        compressed = compressor.compress(raw)
        stored.append(compressed if len(compressed) < len(raw) else raw)
    lengths = struct.pack(f"<{len(stored)}I", *map(len, stored))
    return _HEAD.pack(len(group), sum(len(section.gaps) for section in group)) + lengths + b"".join(stored)


def _from_frames(data: Buffer, offset: int, layout: Layout, form: SectionForm) -> tuple[bytes, ...]:
    reader = _Reader(data, offset)
    sections: list[bytes] = []
    while len(sections) < len(layout.tensors):
        sections += _decode_frame(reader, layout.tensors[len(sections) :], form)
    reader.check_end()
    return tuple(sections)


def _decode_frame(reader: "_Reader", tensors: Sequence[TensorSpec], form: SectionForm) -> list[bytes]:
    """Read one frame, which carries the sections of the first few of these tensors."""
    count, gap_bytes = _HEAD.unpack(reader.take(_HEAD.size))
    stored_lengths = struct.unpack(f"<{_planes(form)}I", reader.take(4 * _planes(form)))
    stored = iter([reader.take(length) for length in stored_lengths])
    if not 1 <= count <= len(tensors):
        raise ProtocolError(Code.BAD_FRAME, f"a frame claims {count} sections, {len(tensors)} are missing")
    sizes = [tensor.size for tensor in tensors[:count]]
    gap_bytes_max = sum(form.gap_bytes_max(size) for size in sizes)
    if gap_bytes > gap_bytes_max:
        raise ProtocolError(
            Code.TOO_LARGE, f"a frame claims {gap_bytes} gap bytes, at most {gap_bytes_max} are possible"
        )

    chunks = [tensor.chunks for tensor in tensors[:count]]
    heads = np.empty((sum(chunks), form.head_bytes), np.uint8)
    for place in range(form.head_bytes):
        heads[:, place] = _expand(next(stored), sum(chunks))
    heads_of = _cut(heads, chunks)
    head_type = f"<u{form.head_bytes}"
    counts = [form.count(part.view(head_type)[:, 0], size) for part, size in zip(heads_of, sizes, strict=True)]
    extra_lengths = [number * form.extra_bytes for number in chunks]
    extras = _cut(_expand(next(stored), sum(extra_lengths)), extra_lengths)
    block_lengths = [4 * form.stated_blocks(size) for size in sizes]
    blocks = _cut(_expand(next(stored), sum(block_lengths)), block_lengths)
    gaps = _cut_gaps(_expand(next(stored), gap_bytes), counts)
    value_lengths = [form.value_bytes(number) for number in counts]
    values = _cut(_expand(next(stored), sum(value_lengths)), value_lengths)
    sections = zip(heads_of, extras, blocks, gaps, values, strict=True)
    return [b"".join(part.data for part in parts) for parts in sections]


class _Reader:
    """Walks over foreign bytes. Every length is checked before the bytes behind it are touched."""

    def __init__(self, data: Buffer, offset: int) -> None:
        self._data = memoryview(data)
        self._offset = offset

    def take(self, length: int) -> memoryview:
        """The next bytes. Raises ProtocolError TRUNCATED when there are not so many."""
        if length > len(self._data) - self._offset:
            raise ProtocolError(
                Code.TRUNCATED, f"{length} bytes are claimed, {len(self._data) - self._offset} are left"
            )
        self._offset += length
        return self._data[self._offset - length : self._offset]

    def check_end(self) -> None:
        """Raise ProtocolError TRAILING when bytes are left."""
        if self._offset != len(self._data):
            raise ProtocolError(Code.TRAILING, f"{len(self._data) - self._offset} bytes are left over")


def _expand(stored: memoryview, length: int) -> NDArray[np.uint8]:  # -> u8[length]
    """The plane of this length that is stored so. Raises ProtocolError BAD_FRAME or BAD_ZSTD.

    A compressed plane is one zstd frame that declares exactly this length and no larger window than decoders must have.
    """
    if len(stored) > length:
        raise ProtocolError(Code.BAD_FRAME, f"a plane of {length} bytes is stored in {len(stored)}")
    if len(stored) == length:
        return np.frombuffer(stored, np.uint8)
    try:
        if stored[:4] != _ZSTD_MAGIC:
            raise ProtocolError(Code.BAD_ZSTD, "a plane is not a zstd frame")
        declared = zstandard.get_frame_parameters(stored)
        if declared.content_size != length or declared.window_size > ZSTD_WINDOW_BYTES_MAX:
            claim = f"{declared.content_size} bytes and a window of {declared.window_size}"
            raise ProtocolError(Code.BAD_ZSTD, f"a plane of {length} bytes declares {claim}")
        raw = zstandard.ZstdDecompressor().decompress(stored, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError(Code.BAD_ZSTD, f"a plane does not expand: {error}") from None
    if len(raw) != length:
        raise ProtocolError(Code.BAD_ZSTD, f"a plane expands to {len(raw)} bytes, not {length}")
    return np.frombuffer(raw, np.uint8)


def _cut_gaps(gaps: NDArray[np.uint8], counts: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Cut gap bytes where each section has as many gaps as values. Raises ProtocolError BAD_FRAME."""
    wanted = np.cumsum(counts, dtype=np.int64)
    stops = np.zeros(len(counts), np.int64)
    seen = 0
    for start in range(0, len(gaps), _SCAN_BYTES):
        batch = gaps[start : start + _SCAN_BYTES]
        # Bytes that continue a gap are rare, so the ends are found from the number of these before each.
        continued = np.flatnonzero(batch == 255)
        ends_before = continued - np.arange(len(continued))
        ends = len(batch) - len(continued)
        here = (seen < wanted) & (wanted <= seen + ends)
        last = wanted[here] - seen - 1
        stops[here] = start + last + np.searchsorted(ends_before, last, side="right") + 1
        seen += ends
    if seen != wanted[-1] or stops[-1] != len(gaps):
        raise ProtocolError(Code.BAD_FRAME, f"the gaps of a frame do not end with its {wanted[-1]} values")
    return _cut(gaps, np.diff(stops, prepend=0).tolist())


def _cut(plane: NDArray[np.uint8], lengths: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Cut a plane into one part per section."""
    stops = list(accumulate(lengths))
    return [plane[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]
