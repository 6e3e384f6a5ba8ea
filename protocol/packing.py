"""Sections: the canonical bytes of one tensor's part of a packet or an update (SPEC 5 and 7).

Both kinds have the same five parts: a head per chunk, an extra byte per chunk, the gap bytes of each block of 1024
chunks but the last, the gap bytes themselves, and the values. `SectionForm` holds what differs. Foreign sections are
checked a few chunks at a time, so that refusing one takes no memory to speak of, and are decoded only when they passed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.errors import Code, ProtocolError
from protocol.identity import Buffer, merkle_root
from protocol.layout import Layout, chunk_lengths, kept, kept_per_chunk
from protocol.limits import BLOCK_CHUNKS, CHUNK, RATIO_STEPS, VERSION

_CONTINUE = 255  # a gap byte that adds 255 and does not end the gap
_BATCH_CHUNKS = 64  # chunks checked at once: at most 262,144 values, so some MB of scratch; a block is whole batches


def _spans(size: int, step: int) -> Iterator[tuple[slice, int]]:
    """Runs of `step` chunks of a tensor of `size` values: which chunks, and how many values they cover together."""
    chunks = -(-size // CHUNK)
    for first in range(0, chunks, step):
        stop = min(first + step, chunks)
        yield slice(first, stop), min(stop * CHUNK, size) - first * CHUNK


@dataclass(frozen=True)
class SectionForm:
    """How many values a chunk may have and how many bits each takes.

    In a packet (value_bits 1 or 2) a head is a scale, and a chunk has no values or kept(L). In an update (value_bits 8)
    a head is the count itself, up to the whole chunk, so k is 4096.
    """

    k: int
    value_bits: int

    @property
    def head_bytes(self) -> int:
        """A scale takes one byte a chunk, a count two."""
        return 2 if self.value_bits == 8 else 1

    @property
    def extra_bytes(self) -> int:
        """Ratios or exponents take one byte a chunk; one-bit packets have neither."""
        return 0 if self.value_bits == 1 else 1

    def counts(self, heads: NDArray[np.uint8] | NDArray[np.uint16], size: int) -> NDArray[np.int64]:  # -> i64[n]
        """Values of each chunk, by its head. Raises BAD_COUNT when an update claims more than a chunk holds."""
        if self.value_bits < 8:
            kept_counts: NDArray[np.int64] = np.where(heads != 0, kept_per_chunk(size, self.k), 0)
            return kept_counts
        counts = heads.astype(np.int64)
        if np.any(counts > chunk_lengths(size)):
            raise ProtocolError(Code.BAD_COUNT, "a chunk claims more values than it holds")
        return counts

    def count(self, heads: NDArray[np.uint8] | NDArray[np.uint16], size: int) -> int:
        """Values of all these chunks together, in the memory of a block. Raises BAD_COUNT like `counts`."""
        if self.value_bits < 8:
            tail = size - (len(heads) - 1) * CHUNK
            return int(np.count_nonzero(heads[:-1])) * kept(CHUNK, self.k) + bool(heads[-1]) * kept(tail, self.k)
        return sum(int(self.counts(heads[span], covered).sum()) for span, covered in _spans(size, BLOCK_CHUNKS))

    def fixed_bytes(self, size: int) -> int:
        """Bytes of heads, extras and blocks, which the layout alone decides."""
        chunks = -(-size // CHUNK)
        return chunks * (self.head_bytes + self.extra_bytes) + 4 * self.stated_blocks(size)

    @staticmethod
    def stated_blocks(size: int) -> int:
        """Blocks whose gap bytes a section states: all but the last, which has the rest."""
        return -(-size // (BLOCK_CHUNKS * CHUNK)) - 1

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
        bound = self.section_bytes_max(size)
        if length > bound:
            raise ProtocolError(Code.TOO_LARGE, f"the section has {length} bytes, at most {bound} are possible")

    def _chunk_gap_bytes_max(self, length: int) -> int:
        count = kept(length, self.k)
        return count + (length - count) // _CONTINUE


@dataclass(frozen=True, eq=False)
class Section:
    """The five parts of a section for a tensor of `size` values. Arrays may be views of the section's bytes."""

    form: SectionForm
    size: int
    heads: NDArray[np.uint8] | NDArray[np.uint16]  # u8[n], in an update u16[n]
    extras: NDArray[np.uint8]  # u8[n], or u8[0] where the form has none
    blocks: NDArray[np.uint32]  # u32[ceil(n / 1024) - 1]
    gaps: NDArray[np.uint8]  # u8[g]
    values: NDArray[np.uint8]  # u8[ceil(count * value_bits / 8)]

    def to_bytes(self) -> bytes:
        """Join the parts."""
        heads = self.heads.astype(f"<u{self.form.head_bytes}", copy=False)
        blocks = self.blocks.astype("<u4", copy=False)
        return b"".join(part.tobytes() for part in (heads, self.extras, blocks, self.gaps, self.values))

    def batches(self) -> Iterator[tuple[slice, slice, NDArray[np.int64]]]:
        """Walk over the section: which chunks, which of all values are theirs, and how many each chunk has (i64)."""
        stop = 0
        for span, covered in _spans(self.size, _BATCH_CHUNKS):
            counts = self.form.counts(self.heads[span], covered)
            start, stop = stop, stop + int(counts.sum())
            yield span, slice(start, stop), counts

    def check_gaps(self) -> None:
        """Check that there is a gap for each value, block by block, and that none leaves its chunk.

        Raises ProtocolError BAD_BLOCKS or BAD_INDEX.
        """
        stop = 0
        block_bytes = [*map(int, self.blocks), len(self.gaps) - int(self.blocks.sum(dtype=np.int64))]
        for (span, covered), length in zip(_spans(self.size, BLOCK_CHUNKS), block_bytes, strict=True):
            start, stop = stop, stop + length
            wanted = int(self.form.counts(self.heads[span], covered).sum())
            gaps = self.gaps[start:stop]
            ends = len(gaps) - int(np.count_nonzero(gaps == _CONTINUE))
            if len(gaps) != length or ends != wanted or (length > 0 and gaps[-1] == _CONTINUE):
                raise ProtocolError(Code.BAD_BLOCKS, "the gaps of a block of chunks do not end where the block ends")
        for _ in self._positions():
            pass

    def indices(self) -> NDArray[np.int64]:  # -> i64[m]
        """The ascending positions in the tensor, of a section whose gaps were checked."""
        count = self.form.count(self.heads, self.size)
        indices = np.empty(count, np.int64)
        for values, positions in self._positions():
            indices[values] = positions
        return indices

    def _positions(self) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """Decode the gaps of one batch after the other, of a section with as many gaps as values."""
        place = 0
        for span, values, counts in self.batches():
            lengths = chunk_lengths(min(span.stop * CHUNK, self.size) - span.start * CHUNK)
            count = values.stop - values.start
            # Honest gaps end within these bytes, however many there are after them.
            reach = count + len(counts) * (CHUNK // _CONTINUE)
            ends = np.flatnonzero(self.gaps[place : place + reach] != _CONTINUE)[:count]
            if len(ends) < count:
                raise ProtocolError(Code.BAD_INDEX, "an index lies far outside its chunk")
            steps = self.gaps[place + ends] + _CONTINUE * (np.diff(ends, prepend=-1) - 1) + 1
            reached = np.concatenate(([0], np.cumsum(steps)))
            stops = np.cumsum(counts)
            before = reached[stops - counts]
            if np.any(reached[stops] - before > lengths):
                raise ProtocolError(Code.BAD_INDEX, "an index lies outside its chunk")
            place += int(ends[-1]) + 1 if count else 0
            starts = np.arange(span.start, span.stop) * CHUNK
            yield values, reached[1:] + np.repeat(starts - before - 1, counts)


def split_section(data: Buffer, size: int, form: SectionForm) -> Section:
    """Cut a section into its parts.

    Raises ProtocolError TOO_LARGE, TRUNCATED, and in an update BAD_COUNT.
    """
    form.check_length(len(data), size)
    fixed = form.fixed_bytes(size)
    if len(data) < fixed:
        raise ProtocolError(Code.TRUNCATED, f"the section has {len(data)} bytes, its tables alone {fixed}")
    chunks = -(-size // CHUNK)
    head_type = np.dtype(f"<u{form.head_bytes}")
    heads = np.frombuffer(data, head_type, chunks)
    extras = np.frombuffer(data, np.uint8, chunks * form.extra_bytes, chunks * form.head_bytes)
    blocks = np.frombuffer(data, "<u4", form.stated_blocks(size), chunks * (form.head_bytes + form.extra_bytes))
    gap_bytes = len(data) - fixed - form.value_bytes(form.count(heads, size))
    if gap_bytes < 0:
        raise ProtocolError(Code.TRUNCATED, f"the section lacks {-gap_bytes} bytes of values")
    gaps = np.frombuffer(data, np.uint8, gap_bytes, fixed)
    values = np.frombuffer(data, np.uint8, len(data) - fixed - gap_bytes, fixed + gap_bytes)
    return Section(form, size, heads, extras, blocks, gaps, values)


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
    """Code ascending positions (i64[m]) as gap bytes; return the bytes of each block but the last, and all bytes."""
    previous = np.maximum(np.concatenate(([-1], indices[:-1])), indices // CHUNK * CHUNK - 1)
    gaps = indices - previous - 1
    ends = np.cumsum(gaps // _CONTINUE + 1)
    data = np.full(int(ends[-1]) if len(ends) else 0, _CONTINUE, np.uint8)
    data[ends - 1] = gaps % _CONTINUE
    block_stops = np.arange(1, SectionForm.stated_blocks(size) + 1) * (BLOCK_CHUNKS * CHUNK)
    byte_stops = np.concatenate(([0], ends))[np.searchsorted(indices, block_stops)]
    return np.diff(byte_stops, prepend=0).astype(np.uint32), data


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:  # codes: u8[m] -> u8[ceil(m * bits / 8)]
    """Pack codes of 1 or 2 bits, least significant bit first; padding bits are zero."""
    per_byte = 8 // bits
    padded = np.zeros(-(-len(codes) // per_byte) * per_byte, np.uint8)
    padded[: len(codes)] = codes
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1)
    return packed


def unpack_codes(packed: NDArray[np.uint8], which: slice, bits: int) -> NDArray[np.uint8]:  # -> u8[stop - start]
    """The codes from `which.start` to `which.stop - 1`."""
    per_byte = 8 // bits
    first = which.start // per_byte
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    octets = packed[first : -(-which.stop // per_byte), None]
    codes = (octets >> shifts & np.uint8((1 << bits) - 1)).reshape(-1)
    return codes[which.start - first * per_byte : which.stop - first * per_byte]


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """What one peer sends of one tensor: per present chunk a scale, a ratio and kept(L) positions with their codes."""

    size: int
    scales: NDArray[np.uint8]  # u8[n] five bits of exponent and three of mantissa, 0 for an absent chunk
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
    assert len(sparse.indices) == len(sparse.codes) == form.count(sparse.scales, sparse.size)
    blocks, gaps = encode_gaps(sparse.indices, sparse.size)
    ratios = sparse.ratios if form.extra_bytes else sparse.ratios[:0]
    values = pack_codes(sparse.codes, code_bits)
    return Section(form, sparse.size, sparse.scales, ratios, blocks, gaps, values).to_bytes()


def check_section(data: Buffer, size: int, k: int, code_bits: int) -> int:
    """Check a packet's section for a tensor of `size` values and return how many of them it sends.

    Accepts only canonical bytes, and takes memory for a few chunks, whatever the size. Raises ProtocolError with the
    code of the first rule that is broken, in the order of SPEC 5.
    """
    return _checked_section(data, size, SectionForm(k, code_bits))[1]


def decode_section(data: Buffer, size: int, k: int, code_bits: int) -> SparseTensor:
    """Read a packet's section for a tensor of `size` values: what it returns encodes to `data` again.

    Raises ProtocolError like `check_section`, before it allocates anything for the values.
    """
    section, count = _checked_section(data, size, SectionForm(k, code_bits))
    scales = section.heads.astype(np.uint8, copy=False)
    ratios = section.extras if code_bits == 2 else np.zeros(len(scales), np.uint8)
    codes = unpack_codes(section.values, slice(0, count), code_bits)
    return SparseTensor(size, scales, ratios, section.indices(), codes)


def _checked_section(data: Buffer, size: int, form: SectionForm) -> tuple[Section, int]:
    section = split_section(data, size, form)
    if form.extra_bytes:
        for span, _ in _spans(size, BLOCK_CHUNKS):
            ratios = section.extras[span]
            if np.any(ratios >= RATIO_STEPS) or np.any(ratios[section.heads[span] == 0]):
                raise ProtocolError(Code.BAD_RATIO, "a ratio is above 63, or an absent chunk has one")
    section.check_gaps()
    count = form.count(section.heads, size)
    used_bits = count * form.value_bits % 8
    if used_bits and section.values[-1] >> used_bits:
        raise ProtocolError(Code.BAD_PADDING, "the bits after the last code are not zero")
    if form.extra_bytes:
        _check_lows(section)
    return section, count


def _check_lows(section: Section) -> None:
    """Check that a chunk has both low and high values exactly when it has a ratio. Raises BAD_CODE or BAD_RATIO."""
    lacking = False
    for span, values, counts in section.batches():
        ratios = section.extras[span]
        codes = unpack_codes(section.values, values, section.form.value_bits)
        lows = sums_by_chunk(codes > 1, counts)
        if np.any(lows[ratios == 0]):
            raise ProtocolError(Code.BAD_CODE, "a value is low in a chunk whose ratio is 0")
        lacking |= bool(np.any((ratios > 0) & ((lows == 0) | (lows == counts))))
    if lacking:
        raise ProtocolError(Code.BAD_RATIO, "a chunk with a ratio lacks high values or low values")


def sums_by_chunk(
    flags: NDArray[np.bool_], counts: NDArray[np.int64]
) -> NDArray[np.int64]:  # flags: bool[sum(counts)], counts: i64[n] -> i64[n]
    """How many flags are set among the values of each chunk."""
    sums = np.concatenate(([0], np.cumsum(flags, dtype=np.int64)))
    stops = np.cumsum(counts)
    per_chunk: NDArray[np.int64] = sums[stops] - sums[stops - counts]
    return per_chunk
