"""Sections: the canonical bytes of one tensor's part of a packet or an update (SPEC 5 and 7).

Both kinds have the same five parts: a head per chunk, an extra byte per chunk, the gap bytes of each block of 1024
chunks, the gap bytes themselves, and the values. `SectionForm` holds what differs. Nothing here loops over chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.errors import Code, ProtocolError
from protocol.identity import Buffer, merkle_root
from protocol.layout import Layout, chunk_lengths, kept, kept_per_chunk
from protocol.limits import BLOCK_CHUNKS, CHUNK, RATIO_STEPS, SCALE_FIELD_MAX, SCALE_FIELD_MIN, VERSION

SCALE_MIN = SCALE_FIELD_MIN << 7  # as bfloat16 bits
SCALE_MAX = SCALE_FIELD_MAX << 7 | 0x7F

_CONTINUE = 255  # a gap byte that adds 255 and does not end the gap


@dataclass(frozen=True)
class SectionForm:
    """How many values a chunk may have and how many bits each takes.

    In a packet (value_bits 1 or 2) a head is a scale, and a chunk has no values or kept(L). In an update (value_bits 8)
    a head is the count itself, up to the whole chunk, so k is 4096.
    """

    k: int
    value_bits: int

    @property
    def extra_bytes(self) -> int:
        """Ratios or exponents take one byte a chunk; one-bit packets have neither."""
        return 0 if self.value_bits == 1 else 1

    def counts(self, heads: NDArray[np.uint16], size: int) -> NDArray[np.int64]:  # heads: u16[n] -> i64[n]
        """Number of values of each chunk. Raises BAD_COUNT when an update claims more than a chunk holds."""
        if self.value_bits < 8:
            kept_counts: NDArray[np.int64] = np.where(heads != 0, kept_per_chunk(size, self.k), 0)
            return kept_counts
        counts = heads.astype(np.int64)
        if np.any(counts > chunk_lengths(size)):
            raise ProtocolError(Code.BAD_COUNT, "a chunk claims more values than it holds")
        return counts

    def fixed_bytes(self, size: int) -> int:
        """Bytes of heads, extras and blocks, which the layout alone decides."""
        chunks = -(-size // CHUNK)
        return chunks * (2 + self.extra_bytes) + 4 * -(-chunks // BLOCK_CHUNKS)

    def value_bytes(self, count: int) -> int:
        """Bytes of so many packed values."""
        return -(-count * self.value_bits // 8)

    def gap_bytes_max(self, size: int) -> int:
        """The most gap bytes that a tensor of this size can have: the gaps of a chunk sum to at most L - kept(L)."""
        full, tail = divmod(size, CHUNK)
        return full * self._chunk_gap_bytes_max(CHUNK) + self._chunk_gap_bytes_max(tail)

    def section_bytes_max(self, size: int) -> int:
        """The most bytes that a section of this size can have; known before a byte of it is read."""
        full, tail = divmod(size, CHUNK)
        count = full * kept(CHUNK, self.k) + kept(tail, self.k)
        return self.fixed_bytes(size) + self.gap_bytes_max(size) + self.value_bytes(count)

    def check_length(self, length: int, size: int) -> None:
        """Raise ProtocolError TOO_LARGE when a section of `length` bytes is beyond its bound."""
        if length > self.section_bytes_max(size):
            bound = self.section_bytes_max(size)
            raise ProtocolError(Code.TOO_LARGE, f"the section has {length} bytes, at most {bound} are possible")

    def _chunk_gap_bytes_max(self, length: int) -> int:
        count = kept(length, self.k)
        return count + (length - count) // _CONTINUE


@dataclass(frozen=True, eq=False)
class Section:
    """The five parts of a section, unchecked beyond their lengths. Arrays may be views of the section's bytes."""

    heads: NDArray[np.uint16]  # u16[n]
    extras: NDArray[np.uint8]  # u8[n], or u8[0] where the form has none
    blocks: NDArray[np.uint32]  # u32[ceil(n / 1024)]
    gaps: NDArray[np.uint8]  # u8[sum(blocks)]
    values: NDArray[np.uint8]  # u8[ceil(m * value_bits / 8)]

    def to_bytes(self) -> bytes:
        """Join the parts."""
        heads, blocks = self.heads.astype("<u2"), self.blocks.astype("<u4")
        return b"".join(part.tobytes() for part in (heads, self.extras, blocks, self.gaps, self.values))


def split_section(data: Buffer, size: int, form: SectionForm) -> tuple[Section, NDArray[np.int64]]:
    """Cut a section into its parts and count the values of each chunk (i64[n]).

    Raises ProtocolError TOO_LARGE, TRUNCATED, TRAILING, and in an update BAD_COUNT.
    """
    if len(data) > form.section_bytes_max(size):
        raise ProtocolError(
            Code.TOO_LARGE, f"the section has {len(data)} bytes, at most {form.section_bytes_max(size)} fit"
        )
    if len(data) < form.fixed_bytes(size):
        raise ProtocolError(
            Code.TRUNCATED, f"the section has {len(data)} bytes, its tables alone {form.fixed_bytes(size)}"
        )
    chunks = -(-size // CHUNK)
    heads = np.frombuffer(data, "<u2", chunks)
    extras = np.frombuffer(data, np.uint8, chunks * form.extra_bytes, 2 * chunks)
    blocks = np.frombuffer(data, "<u4", -(-chunks // BLOCK_CHUNKS), chunks * (2 + form.extra_bytes))
    counts = form.counts(heads, size)
    gap_bytes = int(blocks.sum(dtype=np.int64))
    value_bytes = form.value_bytes(int(counts.sum()))
    excess = len(data) - form.fixed_bytes(size) - gap_bytes - value_bytes
    if excess < 0:
        raise ProtocolError(Code.TRUNCATED, f"the section ends {-excess} bytes early")
    if excess > 0:
        raise ProtocolError(Code.TRAILING, f"the section goes on for {excess} bytes")
    gaps = np.frombuffer(data, np.uint8, gap_bytes, form.fixed_bytes(size))
    values = np.frombuffer(data, np.uint8, value_bytes, form.fixed_bytes(size) + gap_bytes)
    return Section(heads, extras, blocks, gaps, values), counts


def check_header(data: Buffer, magic: bytes, size: int) -> None:
    """Check what headers of packets and updates share: magic, version, length, reserved field.

    Raises ProtocolError BAD_MAGIC, TRUNCATED, VERSION, TRAILING or RESERVED.
    """
    if data[:4] != magic:
        raise ProtocolError(Code.BAD_MAGIC, f"these bytes do not begin with {magic.decode('ascii')}")
    if len(data) < 8:
        raise ProtocolError(Code.TRUNCATED, f"the header has {len(data)} bytes, not {size}")
    version = int.from_bytes(data[4:6], "little")
    if version != VERSION:
        raise ProtocolError(Code.VERSION, f"the header has version {version}, this program reads {VERSION}")
    if len(data) != size:
        code = Code.TRUNCATED if len(data) < size else Code.TRAILING
        raise ProtocolError(code, f"the header has {len(data)} bytes, not {size}")
    if data[6:8] != b"\0\0":
        raise ProtocolError(Code.RESERVED, "the reserved field of the header is not zero")


def check_sections(sections: Sequence[bytes], layout: Layout, form: SectionForm, root: bytes) -> None:
    """Check that there is one section a tensor, each within its bound, and that their Merkle root is `root`.

    Raises ProtocolError TRUNCATED, TRAILING, TOO_LARGE or BAD_MERKLE.
    """
    if len(sections) != len(layout.tensors):
        code = Code.TRUNCATED if len(sections) < len(layout.tensors) else Code.TRAILING
        raise ProtocolError(code, f"there are {len(sections)} sections for {len(layout.tensors)} tensors")
    for section, tensor in zip(sections, layout.tensors, strict=True):
        form.check_length(len(section), tensor.size)
    if merkle_root(sections) != root:
        raise ProtocolError(Code.BAD_MERKLE, "the sections are not those that the header names")


def encode_gaps(indices: NDArray[np.int64], size: int) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Code ascending positions (i64[m]) as gap bytes; return the bytes of each block (u32) and the bytes (u8)."""
    chunks = -(-size // CHUNK)
    chunk_starts = indices // CHUNK * CHUNK
    previous = np.maximum(np.concatenate(([-1], indices[:-1])), chunk_starts - 1)
    gaps = indices - previous - 1
    ends = np.cumsum(gaps // _CONTINUE + 1)
    data = np.full(int(ends[-1]) if len(ends) else 0, _CONTINUE, np.uint8)
    data[ends - 1] = gaps % _CONTINUE
    block_stops = np.arange(1, -(-chunks // BLOCK_CHUNKS) + 1) * (BLOCK_CHUNKS * CHUNK)
    byte_stops = np.concatenate(([0], ends))[np.searchsorted(indices, block_stops)]
    return np.diff(byte_stops, prepend=0).astype(np.uint32), data


def decode_gaps(
    section: Section, counts: NDArray[np.int64], size: int
) -> NDArray[np.int64]:  # counts: i64[n] -> i64[m]
    """Return the ascending positions in the tensor. Raises ProtocolError BAD_BLOCKS or BAD_INDEX."""
    stops = np.cumsum(section.blocks, dtype=np.int64)
    ends = np.flatnonzero(section.gaps != _CONTINUE)
    wanted = np.cumsum(np.add.reduceat(counts, np.arange(0, len(counts), BLOCK_CHUNKS)))
    filled = stops[section.blocks > 0]
    if np.any(np.searchsorted(ends, stops) != wanted) or np.any(section.gaps[filled - 1] == _CONTINUE):
        raise ProtocolError(Code.BAD_BLOCKS, "the gaps of a block of chunks do not end where the block ends")
    steps = section.gaps[ends] + _CONTINUE * (np.diff(ends, prepend=-1) - 1) + 1
    reached = np.concatenate(([0], np.cumsum(steps)))
    value_stops = np.cumsum(counts)
    before = reached[value_stops - counts]
    if np.any(reached[value_stops] - before > chunk_lengths(size)):
        raise ProtocolError(Code.BAD_INDEX, "an index lies outside its chunk")
    indices: NDArray[np.int64] = reached[1:] + np.repeat(np.arange(len(counts)) * CHUNK - before - 1, counts)
    return indices


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:  # codes: u8[m] -> u8[ceil(m * bits / 8)]
    """Pack codes of 1 or 2 bits, least significant bit first; padding bits are zero."""
    per_byte = 8 // bits
    padded = np.zeros(-(-len(codes) // per_byte) * per_byte, np.uint8)
    padded[: len(codes)] = codes
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1)
    return packed


def unpack_codes(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint8]:  # -> u8[count]
    """Undo `pack_codes`. Raises ProtocolError BAD_PADDING when a bit after the last code is set."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[:, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(-1)
    if np.any(codes[count:]):
        raise ProtocolError(Code.BAD_PADDING, "the bits after the last code are not zero")
    return codes[:count]


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """What one peer sends of one tensor: per present chunk a scale, a ratio and kept(L) positions with their codes."""

    size: int
    scales: NDArray[np.uint16]  # u16[n] bfloat16 bits, 0 for an absent chunk
    ratios: NDArray[np.uint8]  # u8[n], 0 where every value is high
    indices: NDArray[np.int64]  # i64[m] position in the flat tensor, ascending
    codes: NDArray[np.uint8]  # u8[m] bit 0: negative, bit 1: low

    def span(self, first: int, stop: int) -> "SparseTensor":
        """The part in chunks first to stop - 1 as a tensor of its own, so that big tensors merge piece by piece."""
        start, end = first * CHUNK, min(stop * CHUNK, self.size)
        low, high = np.searchsorted(self.indices, (start, end))
        indices = self.indices[low:high] - start
        return SparseTensor(
            end - start, self.scales[first:stop], self.ratios[first:stop], indices, self.codes[low:high]
        )


def section_bytes_max(size: int, k: int, code_bits: int) -> int:
    """The most bytes that a packet's section for a tensor of `size` values can have."""
    return SectionForm(k, code_bits).section_bytes_max(size)


def encode_section(sparse: SparseTensor, k: int, code_bits: int) -> bytes:
    """The canonical bytes of one tensor's part of a packet."""
    form = SectionForm(k, code_bits)
    assert len(sparse.indices) == len(sparse.codes) == form.counts(sparse.scales, sparse.size).sum()
    blocks, gaps = encode_gaps(sparse.indices, sparse.size)
    ratios = sparse.ratios if form.extra_bytes else sparse.ratios[:0]
    return Section(sparse.scales, ratios, blocks, gaps, pack_codes(sparse.codes, code_bits)).to_bytes()


def decode_section(data: Buffer, size: int, k: int, code_bits: int) -> SparseTensor:
    """Read a packet's section for a tensor of `size` values.

    Accepts only canonical bytes: what it returns encodes to `data` again. Raises ProtocolError with the code of the
    first rule that is broken, in the order of SPEC 5.
    """
    section, counts = split_section(data, size, SectionForm(k, code_bits))
    scales, present = section.heads, section.heads != 0
    if np.any(present & ((scales < SCALE_MIN) | (scales > SCALE_MAX))):
        raise ProtocolError(Code.BAD_SCALE, "a scale is negative or outside 2^-30 to 8")
    ratios = section.extras if code_bits == 2 else np.zeros(len(scales), np.uint8)
    if np.any(ratios >= RATIO_STEPS) or np.any(ratios[~present]):
        raise ProtocolError(Code.BAD_RATIO, "a ratio is above 63, or an absent chunk has one")
    indices = decode_gaps(section, counts, size)
    codes = unpack_codes(section.values, len(indices), code_bits)
    lows_before = np.concatenate(([0], np.cumsum(codes >> 1, dtype=np.int64)))
    value_stops = np.cumsum(counts)
    lows = lows_before[value_stops] - lows_before[value_stops - counts]
    if np.any(lows[ratios == 0]):
        raise ProtocolError(Code.BAD_CODE, "a value is low in a chunk whose ratio is 0")
    if np.any((ratios > 0) & ((lows == 0) | (lows == counts))):
        raise ProtocolError(Code.BAD_RATIO, "a chunk with a ratio lacks high values or low values")
    return SparseTensor(size, scales, ratios, indices, codes)
