import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.compress import compress
from protocol.errors import Code, ProtocolError
from protocol.layout import kept, kept_per_chunk
from protocol.packing import (
    SectionForm,
    SparseTensor,
    check_section,
    decode_section,
    encode_section,
    section_bytes_max,
)
from tests.protocol.codec_samples import gradient, plain_check_section, plain_section, refused, same

SIZES = st.one_of(
    st.integers(1, 300), st.integers(4000, 4200), st.sampled_from([4096, 8192, 12288, 13000, 20000, 65 * 4096 + 9])
)
KS = st.one_of(st.integers(1, 4096), st.sampled_from([1, 32, 64, 128, 4096]))


def random_sparse(size: int, k: int, code_bits: int, absent: float, seed: int) -> SparseTensor:
    """Any legal tensor, not only those that compress makes."""
    rng = np.random.default_rng(seed)
    counts = kept_per_chunk(size, k)
    counts[rng.random(len(counts)) < absent] = 0
    lengths = np.minimum(4096, size - np.arange(len(counts)) * 4096)
    chosen = [np.sort(rng.choice(length, count, False)) for length, count in zip(lengths, counts, strict=True)]
    scales = np.where(counts > 0, rng.integers(1, 256, len(counts)), 0).astype(np.uint8)
    codes = rng.integers(0, 2, counts.sum()).astype(np.uint8)
    ratios = np.zeros(len(counts), np.uint8)
    for chunk, stop in enumerate(np.cumsum(counts)):
        if code_bits == 2 and counts[chunk] > 1 and rng.random() < 0.8:
            ratios[chunk] = rng.integers(1, 64)
            lows = rng.choice(counts[chunk], rng.integers(1, counts[chunk]), False)
            codes[stop - counts[chunk] + lows] |= 2
    indices = np.concatenate([part + 4096 * chunk for chunk, part in enumerate(chosen)]).astype(np.int64)
    return SparseTensor(size, scales, ratios, indices, codes)


def plain_bytes(sparse: SparseTensor, code_bits: int) -> bytes:
    chunks: list[list[int]] = [[] for _ in sparse.scales]
    for index in sparse.indices.tolist():
        chunks[index // 4096].append(index % 4096)
    return plain_section(sparse.scales.tolist(), sparse.ratios.tolist(), chunks, sparse.codes.tolist(), code_bits)


@settings(deadline=None, max_examples=200)
@given(SIZES, KS, st.sampled_from([1, 2]), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2**32 - 1))
def test_round_trip_and_plain_encoding(size: int, k: int, code_bits: int, absent: float, seed: int) -> None:
    sparse = random_sparse(size, k, code_bits, absent, seed)
    data = encode_section(sparse, k, code_bits)
    assert data == plain_bytes(sparse, code_bits)
    assert len(data) <= section_bytes_max(size, k, code_bits)
    decoded = decode_section(data, size, k, code_bits)
    assert same(decoded, sparse)
    assert encode_section(decoded, k, code_bits) == data
    assert check_section(data, size, k, code_bits) == len(sparse.indices)
    plain = plain_check_section(data, size, k, code_bits)
    assert plain == tuple(part.tolist() for part in (sparse.scales, sparse.ratios, sparse.indices, sparse.codes))


@settings(deadline=None, max_examples=10)
@given(
    st.sampled_from([1024, 1025, 2048, 2050]),
    st.integers(1, 4096),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.sampled_from([0.0, 0.5, 0.999, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_round_trip_over_several_blocks(
    chunks: int, tail: int, k: int, code_bits: int, absent: float, seed: int
) -> None:
    size = (chunks - 1) * 4096 + tail
    sparse = random_sparse(size, k, code_bits, absent, seed)
    data = encode_section(sparse, k, code_bits)
    assert data == plain_bytes(sparse, code_bits)
    assert same(decode_section(data, size, k, code_bits), sparse)
    assert check_section(data, size, k, code_bits) == len(sparse.indices)
    assert len(data) <= section_bytes_max(size, k, code_bits)


@settings(deadline=None, max_examples=60)
@given(SIZES, KS, st.sampled_from([1, 2]), st.integers(0, 2**32 - 1))
def test_what_compress_makes_is_canonical(size: int, k: int, code_bits: int, seed: int) -> None:
    sparse, _ = compress(gradient(size, seed), k, code_bits)
    assert same(decode_section(encode_section(sparse, k, code_bits), size, k, code_bits), sparse)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 4079, 4080, 4095])
def test_gaps_around_every_multiple_of_255(gap: int) -> None:
    scales, none = np.array([100], np.uint8), np.zeros(1, np.uint8)
    sparse = SparseTensor(4096, scales, none, np.array([gap]), none)
    data = encode_section(sparse, 1, 1)
    assert data[1:-1] == b"\xff" * (gap // 255) + bytes([gap % 255])
    assert same(decode_section(data, 4096, 1, 1), sparse)


@pytest.mark.parametrize(("size", "k", "code_bits"), [(4096, 1, 1), (4096, 64, 2), (4096, 4096, 2), (9000, 3, 2)])
def test_the_bound_is_reached_when_every_chunk_ends_with_its_kept_values(size: int, k: int, code_bits: int) -> None:
    counts = kept_per_chunk(size, k)
    stops = np.minimum(np.arange(1, len(counts) + 1) * 4096, size)
    indices = np.concatenate([np.arange(stop - count, stop) for stop, count in zip(stops, counts, strict=True)])
    codes = np.zeros(len(indices), np.uint8)
    sparse = SparseTensor(size, np.full(len(counts), 120, np.uint8), np.zeros(len(counts), np.uint8), indices, codes)
    assert len(encode_section(sparse, k, code_bits)) == section_bytes_max(size, k, code_bits)


@settings(deadline=None)
@given(st.integers(1, 1 << 31), KS, st.sampled_from([1, 2]))
def test_bound_is_the_formula_of_the_spec(size: int, k: int, bits: int) -> None:
    chunks, full, tail = -(-size // 4096), size // 4096, size % 4096
    counts = full * kept(4096, k) + kept(tail, k)
    gaps = full * (kept(4096, k) + (4096 - kept(4096, k)) // 255) + kept(tail, k) + (tail - kept(tail, k)) // 255
    tables = chunks + chunks * (bits == 2) + 4 * (-(-chunks // 1024) - 1)
    assert (
        section_bytes_max(size, k, bits)
        == SectionForm(k, bits).section_bytes_max(size)
        == tables + gaps + -(-counts * bits // 8)
    )


BIG = 2050 * 4096 + 5


def three_blocks() -> tuple[bytes, tuple[int, ...]]:
    """A section of 2051 chunks, few of them present and each with one value, and the gap bytes of its three blocks."""
    rng = np.random.default_rng(2)
    scales = np.where(rng.random(2051) < 0.01, 110, 0).astype(np.uint8)
    scales[[1023, 1024, 2047, 2048, 2050]] = 111
    chunks = np.flatnonzero(scales)
    codes = rng.integers(0, 2, len(chunks)).astype(np.uint8)
    indices = chunks * 4096 + rng.integers(0, 5, len(chunks))
    data = encode_section(SparseTensor(BIG, scales, np.zeros(2051, np.uint8), indices, codes), 1, 2)
    assert decode_section(data, BIG, 1, 2).indices.tolist() == indices.tolist()
    lengths = tuple(int(((chunks >= start) & (chunks < start + 1024)).sum()) for start in (0, 1024, 2048))
    return data, lengths


def test_all_blocks_but_the_last_are_stated() -> None:
    data, lengths = three_blocks()
    assert struct.unpack_from("<2I", data, 2 * 2051) == lengths[:2]
    present = sum(lengths)
    assert len(data) == 2 * 2051 + 2 * 4 + present + -(-present // 4)


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("one byte to the next block", -1, 1),
        ("one byte to the last block", 0, -1),
        ("one byte from the last block", 0, 1),
        ("one byte of the first to the last", -1, 0),
        ("more than there is", 0, 1000),
        ("4 GiB", 0, 0xFFFFFF00),
        ("4 GiB twice", 0xFFFFFF00, 0xFFFFFF00),
    ],
)
def test_blocks_with_other_lengths_are_refused(what: str, first: int, second: int) -> None:
    data, lengths = three_blocks()
    moved = bytearray(data)
    struct.pack_into("<2I", moved, 2 * 2051, lengths[0] + first, lengths[1] + second)
    assert plain_check_section(bytes(moved), BIG, 1, 2) is Code.BAD_BLOCKS
    with refused(Code.BAD_BLOCKS):
        check_section(moved, BIG, 1, 2)


def test_rules_are_checked_in_their_order_over_all_blocks() -> None:
    """A rule that is broken in the last block comes before a later rule that is broken in the first."""
    data, lengths = three_blocks()
    gaps = 2 * 2051 + 8
    for at, byte, code in [
        (-1, data[-1] ^ 2, Code.BAD_CODE),
        (gaps + sum(lengths), data[gaps + sum(lengths)] ^ 2, Code.BAD_CODE),
        (gaps + sum(lengths) - 1, 5, Code.BAD_INDEX),
        (gaps, 255, Code.BAD_BLOCKS),
        (2051 + 2050, 64, Code.BAD_RATIO),
    ]:
        changed = bytearray(data)
        changed[at] = byte
        assert plain_check_section(bytes(changed), BIG, 1, 2) is code
        with refused(code):
            check_section(changed, BIG, 1, 2)
        data = bytes(changed)


def test_span_cuts_a_tensor_at_chunks() -> None:
    sparse = random_sparse(5 * 4096 + 10, 64, 2, 0.2, seed=4)
    parts = [sparse.span(first, first + 2) for first in (0, 2, 4)]
    assert [part.size for part in parts] == [8192, 8192, 4106]
    joined = np.concatenate([part.indices + 8192 * number for number, part in enumerate(parts)])
    assert np.array_equal(joined, sparse.indices)
    assert np.array_equal(np.concatenate([part.codes for part in parts]), sparse.codes)
    assert np.array_equal(np.concatenate([part.ratios for part in parts]), sparse.ratios)


# Two chunks of 4096 and a short one of 8; k = 1024 keeps 1024, 1024 and 2. The third chunk alone is present.
SIZE, K = 8200, 1024
SCALE, RATIO, GAPS, CODES = 2, 5, 6, 8


def small_section(code_bits: int = 2) -> bytes:
    """Positions 3 and 6 of the short chunk: one high and one low when there are two bits."""
    return plain_section([0, 0, 110], [0, 0, 20], [[], [], [3, 6]], [1, code_bits], code_bits)


def test_the_sample_that_the_refusals_start_from_is_accepted() -> None:
    data = small_section()
    assert (data[SCALE], data[RATIO], bytes(data[GAPS:CODES]), data[CODES]) == (110, 20, b"\3\2", 0b1001)
    assert decode_section(data, SIZE, K, 2).indices.tolist() == [8195, 8198]


def changed(offset: int, new: bytes) -> bytes:
    data = small_section()
    return data[:offset] + new + data[offset + len(new) :]


def with_gaps(gaps: bytes) -> bytes:
    data = small_section()
    return data[:GAPS] + gaps + data[CODES:]


@pytest.mark.parametrize(
    ("what", "data", "code"),
    [
        ("empty", b"", Code.TRUNCATED),
        ("tables cut", small_section()[: GAPS - 1], Code.TRUNCATED),
        ("nothing but tables", small_section()[:GAPS], Code.TRUNCATED),
        ("too short for the codes of one more chunk", changed(SCALE - 1, b"\1"), Code.TRUNCATED),
        ("beyond the bound", small_section() + bytes(10_000), Code.TOO_LARGE),
        ("ratio 64", changed(RATIO, b"\x40"), Code.BAD_RATIO),
        ("ratio 255", changed(RATIO, b"\xff"), Code.BAD_RATIO),
        ("ratio of an absent chunk", changed(RATIO - 1, b"\x01"), Code.BAD_RATIO),
        ("gaps and codes of an absent chunk", changed(SCALE, b"\0"), Code.BAD_RATIO),
        ("gaps where all chunks are absent", changed(SCALE, b"\0\0\0\0"), Code.BAD_BLOCKS),
        ("no gaps", with_gaps(b""), Code.BAD_BLOCKS),
        ("a gap too few", with_gaps(b"\3"), Code.BAD_BLOCKS),
        ("a gap too many", with_gaps(b"\1\1\1"), Code.BAD_BLOCKS),
        ("the last byte cut", small_section()[:-1], Code.BAD_BLOCKS),
        ("one byte more", small_section() + b"\0", Code.BAD_BLOCKS),
        ("the first gap does not end", with_gaps(b"\xff\2"), Code.BAD_BLOCKS),
        ("the last gap does not end", with_gaps(b"\3\xff"), Code.BAD_BLOCKS),
        ("a continuation at the end", with_gaps(b"\3\2\xff"), Code.BAD_BLOCKS),
        ("index at the end of a short chunk", with_gaps(b"\3\4"), Code.BAD_INDEX),
        ("index far beyond", with_gaps(b"\xfe\2"), Code.BAD_INDEX),
        ("a continuation out of a short chunk", with_gaps(b"\xff\3\2"), Code.BAD_INDEX),
        ("continuations without end", with_gaps(b"\3" + b"\xff" * 300 + b"\2"), Code.BAD_INDEX),
        ("padding bit", changed(CODES, b"\x89"), Code.BAD_PADDING),
        ("lowest padding bit", changed(CODES, b"\x19"), Code.BAD_PADDING),
        ("low value without a ratio", changed(RATIO, b"\0"), Code.BAD_CODE),
        ("ratio without a low value", changed(CODES, b"\x01"), Code.BAD_RATIO),
        ("ratio without a high value", changed(CODES, b"\x0a"), Code.BAD_RATIO),
    ],
)
def test_refusals(what: str, data: bytes, code: Code) -> None:
    with refused(code):
        decode_section(data, SIZE, K, 2)
    with refused(code):
        check_section(data, SIZE, K, 2)
    assert code is Code.TOO_LARGE or plain_check_section(data, SIZE, K, 2) is code


@pytest.mark.parametrize("scale", [1, 7, 8, 128, 255])
def test_every_scale_but_zero_is_a_magnitude(scale: int) -> None:
    assert decode_section(changed(SCALE, bytes([scale])), SIZE, K, 2).scales.tolist() == [0, 0, scale]


def test_a_gap_that_runs_over_the_end_of_its_block_is_refused() -> None:
    scales = [0] * 1025
    scales[0] = scales[1024] = 110
    chunks: list[list[int]] = [[] for _ in scales]
    chunks[0], chunks[1024] = [3], [300]
    data = plain_section(scales, [], chunks, [0, 0], 1)
    assert decode_section(data, 1025 * 4096, 1, 1).indices.tolist() == [3, 1024 * 4096 + 300]
    assert data[1025:1029] == struct.pack("<I", 1)
    with refused(Code.BAD_BLOCKS):
        check_section(data[:1025] + struct.pack("<I", 2) + data[1029:], 1025 * 4096, 1, 1)


def test_a_continuation_that_leaves_the_full_chunk_is_refused() -> None:
    good = plain_section([110], [0], [[4095]], [0], 1)
    assert decode_section(good, 4096, 1, 1).indices.tolist() == [4095]
    bad = good.replace(b"\xff\x0f", b"\xff\x10")
    with refused(Code.BAD_INDEX):
        check_section(bad, 4096, 1, 1)


def test_one_bit_sections_have_no_ratios_and_check_their_padding() -> None:
    data = small_section(1)
    assert len(data) == len(small_section()) - 3
    assert decode_section(data, SIZE, K, 1).codes.tolist() == [1, 1]
    with refused(Code.BAD_PADDING):
        check_section(data[:-1] + b"\x07", SIZE, K, 1)


def test_the_bound_is_checked_before_anything_is_allocated() -> None:
    data = bytes(20_000_000)
    tracemalloc.start()
    with refused(Code.TOO_LARGE):
        check_section(data, 1 << 20, 64, 2)
    with refused(Code.TRUNCATED):
        check_section(data[:1000], 1 << 31, 64, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("broken", ["the last rule", "one block has all gap bytes"])
def test_refusing_takes_no_more_memory_than_the_section_and_a_constant(broken: str) -> None:
    """At k = 4096 each of 8 million values takes ten bits, but would take 72 decoded."""
    size = 8 << 20
    codes = np.full(size, 2, np.uint8)
    codes[::4096] = 0
    ratios = np.full(size >> 12, 9, np.uint8)
    if broken == "the last rule":
        codes[-4096] = 2
    sparse = SparseTensor(size, np.full(size >> 12, 99, np.uint8), ratios, np.arange(size), codes)
    data = bytearray(encode_section(sparse, 4096, 2))
    if broken != "the last rule":
        struct.pack_into("<I", data, 2 * (size >> 12), size)
    tracemalloc.start()
    with refused(Code.BAD_RATIO if broken == "the last rule" else Code.BAD_BLOCKS):
        decode_section(data, size, 4096, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(data) + 16_000_000


@pytest.mark.parametrize("code_bits", [1, 2])
def test_mutated_sections_are_refused_or_canonical(code_bits: int) -> None:
    """Whatever bytes are accepted encode to themselves; everything else raises ProtocolError and nothing else."""
    rng = np.random.default_rng(99)
    sparse = random_sparse(SIZE, 40, code_bits, 0.0, seed=6)
    good = encode_section(sparse, 40, code_bits)
    accepted, codes = 0, set()
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            kind, place = rng.integers(4), rng.integers(len(data))
            if kind == 0:
                del data[place]
            elif kind == 1:
                data.insert(place, rng.integers(256))
            else:
                data[place] = rng.integers(256) if kind == 2 else data[place] ^ 1 << rng.integers(8)
        plain = plain_check_section(bytes(data), SIZE, 40, code_bits)
        try:
            decoded = decode_section(data, SIZE, 40, code_bits)
        except ProtocolError as error:
            assert plain is error.code  # noqa: PT017  either outcome is allowed
            codes.add(error.code)
            continue
        accepted += 1
        assert plain == (*(part.tolist() for part in (decoded.scales, decoded.ratios, decoded.indices, decoded.codes)),)
        assert encode_section(decoded, 40, code_bits) == data
    assert 50 < accepted < 2500
    two_bits = {Code.BAD_RATIO, Code.BAD_CODE} if code_bits == 2 else set()
    assert codes == {Code.BAD_BLOCKS, Code.BAD_INDEX, Code.BAD_PADDING} | two_bits
