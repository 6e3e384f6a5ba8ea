import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.compress import compress
from protocol.errors import Code, ProtocolError
from protocol.layout import kept, kept_per_chunk
from protocol.packing import SectionForm, SparseTensor, decode_section, encode_section, section_bytes_max
from tests.protocol.codec_samples import gradient, plain_codes, plain_section, refused, same

SIZES = st.one_of(st.integers(1, 300), st.integers(4000, 4200), st.sampled_from([4096, 8192, 12288, 13000, 20000]))
KS = st.one_of(st.integers(1, 4096), st.sampled_from([1, 32, 64, 128, 4096]))


def random_sparse(size: int, k: int, code_bits: int, absent: float, seed: int) -> SparseTensor:
    """Any legal tensor, not only those that compress makes."""
    rng = np.random.default_rng(seed)
    counts = kept_per_chunk(size, k)
    counts[rng.random(len(counts)) < absent] = 0
    lengths = np.minimum(4096, size - np.arange(len(counts)) * 4096)
    chosen = [np.sort(rng.choice(length, count, False)) for length, count in zip(lengths, counts, strict=True)]
    scales = np.where(counts > 0, rng.integers(97 << 7, 130 << 7, len(counts)), 0).astype(np.uint16)
    codes = rng.integers(0, 2, counts.sum()).astype(np.uint8)
    ratios = np.zeros(len(counts), np.uint8)
    for chunk, stop in enumerate(np.cumsum(counts)):
        if code_bits == 2 and counts[chunk] > 1 and rng.random() < 0.8:
            ratios[chunk] = rng.integers(1, 64)
            lows = rng.choice(counts[chunk], rng.integers(1, counts[chunk]), False)
            codes[stop - counts[chunk] + lows] |= 2
    indices = np.concatenate([part + 4096 * chunk for chunk, part in enumerate(chosen)]).astype(np.int64)
    return SparseTensor(size, scales, ratios, indices, codes)


@settings(deadline=None, max_examples=200)
@given(SIZES, KS, st.sampled_from([1, 2]), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2**32 - 1))
def test_round_trip_and_plain_encoding(size: int, k: int, code_bits: int, absent: float, seed: int) -> None:
    sparse = random_sparse(size, k, code_bits, absent, seed)
    data = encode_section(sparse, k, code_bits)
    chunks = [[] for _ in sparse.scales]  # type: list[list[int]]
    for index in sparse.indices.tolist():
        chunks[index // 4096].append(index % 4096)
    values = plain_codes(sparse.codes.tolist(), code_bits)
    assert data == plain_section(sparse.scales.tolist(), sparse.ratios.tolist(), chunks, values, code_bits)
    assert len(data) <= section_bytes_max(size, k, code_bits)
    decoded = decode_section(data, size, k, code_bits)
    assert same(decoded, sparse)
    assert encode_section(decoded, k, code_bits) == data


@settings(deadline=None, max_examples=60)
@given(SIZES, KS, st.sampled_from([1, 2]), st.integers(0, 2**32 - 1))
def test_what_compress_makes_is_canonical(size: int, k: int, code_bits: int, seed: int) -> None:
    sparse, _ = compress(gradient(size, seed), k, code_bits)
    assert same(decode_section(encode_section(sparse, k, code_bits), size, k, code_bits), sparse)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 4079, 4080, 4095])
def test_gaps_around_every_multiple_of_255(gap: int) -> None:
    scales, none = np.array([100 << 7], np.uint16), np.zeros(1, np.uint8)
    sparse = SparseTensor(4096, scales, none, np.array([gap]), none)
    data = encode_section(sparse, 1, 1)
    assert data[6:-1] == b"\xff" * (gap // 255) + bytes([gap % 255])
    assert same(decode_section(data, 4096, 1, 1), sparse)


@pytest.mark.parametrize(("size", "k", "code_bits"), [(4096, 1, 1), (4096, 64, 2), (4096, 4096, 2), (9000, 3, 2)])
def test_the_bound_is_reached_when_every_chunk_ends_with_its_kept_values(size: int, k: int, code_bits: int) -> None:
    counts = kept_per_chunk(size, k)
    stops = np.minimum(np.arange(1, len(counts) + 1) * 4096, size)
    indices = np.concatenate([np.arange(stop - count, stop) for stop, count in zip(stops, counts, strict=True)])
    codes = np.zeros(len(indices), np.uint8)
    sparse = SparseTensor(
        size, np.full(len(counts), 120 << 7, np.uint16), np.zeros(len(counts), np.uint8), indices, codes
    )
    assert len(encode_section(sparse, k, code_bits)) == section_bytes_max(size, k, code_bits)


@settings(deadline=None)
@given(st.integers(1, 1 << 40), KS, st.sampled_from([1, 2, 8]))
def test_bound_is_the_formula_of_the_spec(size: int, k: int, bits: int) -> None:
    chunks, full, tail = -(-size // 4096), size // 4096, size % 4096
    counts = full * kept(4096, k) + kept(tail, k)
    gaps = full * (kept(4096, k) + (4096 - kept(4096, k)) // 255) + kept(tail, k) + (tail - kept(tail, k)) // 255
    tables = 2 * chunks + chunks * (bits != 1) + 4 * -(-chunks // 1024)
    assert SectionForm(k, bits).section_bytes_max(size) == tables + gaps + -(-counts * bits // 8)


def test_blocks_of_1024_chunks_are_counted_apart() -> None:
    size = 2050 * 4096 + 5
    rng = np.random.default_rng(2)
    scales = np.where(rng.random(2051) < 0.01, 110 << 7, 0).astype(np.uint16)
    scales[[1023, 1024, 2047, 2048, 2050]] = 111 << 7
    chunks = np.flatnonzero(scales)
    offsets = rng.integers(0, 5, len(chunks))
    codes = rng.integers(0, 2, len(chunks)).astype(np.uint8)
    sparse = SparseTensor(size, scales, np.zeros(2051, np.uint8), chunks * 4096 + offsets, codes)
    data = encode_section(sparse, 1, 2)
    blocks = struct.unpack_from("<3I", data, 3 * 2051)
    assert blocks == tuple(int(((chunks >= start) & (chunks < start + 1024)).sum()) for start in (0, 1024, 2048))
    assert same(decode_section(data, size, 1, 2), sparse)
    moved = bytearray(data)
    struct.pack_into("<2I", moved, 3 * 2051, blocks[0] - 1, blocks[1] + 1)
    with refused(Code.BAD_BLOCKS):
        decode_section(moved, size, 1, 2)


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
SCALE, RATIO, BLOCKS, GAPS, CODES = 4, 8, 9, 13, 15


def small_section(code_bits: int = 2) -> bytearray:
    """Positions 3 and 6 of the short chunk: one high and one low when there are two bits."""
    scales, ratios = [0, 0, 110 << 7], [0, 0, 20]
    return bytearray(plain_section(scales, ratios, [[], [], [3, 6]], plain_codes([1, code_bits], code_bits), code_bits))


def test_the_sample_that_the_refusals_start_from_is_accepted() -> None:
    data = small_section()
    assert (data[RATIO], data[BLOCKS], bytes(data[GAPS:CODES]), data[CODES]) == (20, 2, b"\3\2", 0b1001)
    assert decode_section(data, SIZE, K, 2).indices.tolist() == [8195, 8198]


def changed(offset: int, new: bytes) -> bytearray:
    data = small_section()
    data[offset : offset + len(new)] = new
    return data


def bf16(field: int, mantissa: int = 0, sign: int = 0) -> bytes:
    return struct.pack("<H", sign << 15 | field << 7 | mantissa)


@pytest.mark.parametrize(
    ("what", "data", "code"),
    [
        ("empty", b"", Code.TRUNCATED),
        ("tables cut", small_section()[: GAPS - 1], Code.TRUNCATED),
        ("gaps cut", small_section()[:GAPS], Code.TRUNCATED),
        ("codes cut", small_section()[:-1], Code.TRUNCATED),
        ("one byte more", small_section() + b"\0", Code.TRAILING),
        ("beyond the bound", small_section() + bytes(10_000), Code.TOO_LARGE),
        ("scale below 2^-30", changed(SCALE, bf16(96, 127)), Code.BAD_SCALE),
        ("denormal scale", changed(SCALE, bf16(0, 1)), Code.BAD_SCALE),
        ("scale of 8", changed(SCALE, bf16(130)), Code.BAD_SCALE),
        ("infinite scale", changed(SCALE, bf16(255)), Code.BAD_SCALE),
        ("NaN scale", changed(SCALE, bf16(255, 1)), Code.BAD_SCALE),
        ("negative scale", changed(SCALE, bf16(110, 0, 1)), Code.BAD_SCALE),
        ("ratio 64", changed(RATIO, b"\x40"), Code.BAD_RATIO),
        ("ratio 255", changed(RATIO, b"\xff"), Code.BAD_RATIO),
        ("ratio of an absent chunk", changed(RATIO - 1, b"\x01"), Code.BAD_RATIO),
        ("ratio without a low value", changed(CODES, b"\x01"), Code.BAD_RATIO),
        ("ratio without a high value", changed(CODES, b"\x0a"), Code.BAD_RATIO),
        ("low value without a ratio", changed(RATIO, b"\0"), Code.BAD_CODE),
        ("block one short", changed(BLOCKS, b"\1"), Code.TRAILING),
        ("block one long", changed(BLOCKS, b"\3"), Code.TRUNCATED),
        ("block of 4 GiB", changed(BLOCKS, b"\xff\xff\xff\xff"), Code.TRUNCATED),
        ("a gap too few", changed(GAPS, b"\xff"), Code.BAD_BLOCKS),
        ("last gap does not end", changed(GAPS + 1, b"\xff"), Code.BAD_BLOCKS),
        ("index at the end of a short chunk", changed(GAPS + 1, b"\x04"), Code.BAD_INDEX),
        ("index far beyond", changed(GAPS, b"\xfe"), Code.BAD_INDEX),
        ("padding bit", changed(CODES, b"\x89"), Code.BAD_PADDING),
        ("lowest padding bit", changed(CODES, b"\x19"), Code.BAD_PADDING),
    ],
)
def test_refusals(what: str, data: bytes, code: Code) -> None:
    with refused(code):
        decode_section(data, SIZE, K, 2)


def test_a_gap_too_many_in_a_block_is_refused() -> None:
    data = changed(BLOCKS, b"\3")
    data[GAPS:GAPS] = b"\0"
    with refused(Code.BAD_BLOCKS):
        decode_section(data, SIZE, K, 2)


def test_a_block_that_ends_in_a_continuation_is_refused() -> None:
    data = changed(BLOCKS, b"\3")
    data[CODES:CODES] = b"\xff"
    with refused(Code.BAD_BLOCKS):
        decode_section(data, SIZE, K, 2)


def test_a_gap_that_runs_over_the_end_of_its_block_is_refused() -> None:
    scales = [0] * 1025
    scales[0] = scales[1024] = 110 << 7
    chunks: list[list[int]] = [[] for _ in scales]
    chunks[0], chunks[1024] = [3], [300]
    data = plain_section(scales, [], chunks, b"\0", 1)
    assert decode_section(data, 1025 * 4096, 1, 1).indices.tolist() == [3, 1024 * 4096 + 300]
    assert data[2050:2058] == struct.pack("<2I", 1, 2)
    with refused(Code.BAD_BLOCKS):
        decode_section(data[:2050] + struct.pack("<2I", 2, 1) + data[2058:], 1025 * 4096, 1, 1)


def test_a_continuation_that_leaves_the_full_chunk_is_refused() -> None:
    good = plain_section([110 << 7], [0], [[4095]], b"\0", 1)
    assert decode_section(good, 4096, 1, 1).indices.tolist() == [4095]
    bad = good.replace(b"\xff\x0f", b"\xff\x10")
    with refused(Code.BAD_INDEX):
        decode_section(bad, 4096, 1, 1)


def test_one_bit_sections_have_no_ratios_and_check_their_padding() -> None:
    data = small_section(1)
    assert len(data) == len(small_section()) - 3
    assert decode_section(data, SIZE, K, 1).codes.tolist() == [1, 1]
    with refused(Code.BAD_PADDING):
        decode_section(data[:-1] + b"\x07", SIZE, K, 1)


def test_the_bound_is_checked_before_anything_is_allocated() -> None:
    data = bytes(20_000_000)
    tracemalloc.start()
    with refused(Code.TOO_LARGE):
        decode_section(data, 1 << 20, 64, 2)
    with refused(Code.TRUNCATED):
        decode_section(data[:1000], 1 << 40, 64, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("code_bits", [1, 2])
def test_mutated_sections_are_refused_or_canonical(code_bits: int) -> None:
    """Whatever bytes are accepted encode to themselves; everything else raises ProtocolError and nothing else."""
    rng = np.random.default_rng(99)
    sparse = random_sparse(SIZE, 40, code_bits, 0.0, seed=6)
    good = encode_section(sparse, 40, code_bits)
    accepted = 0
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
        try:
            decoded = decode_section(data, SIZE, 40, code_bits)
        except ProtocolError:
            continue
        accepted += 1
        assert encode_section(decoded, 40, code_bits) == data
    assert 50 < accepted < 2500
