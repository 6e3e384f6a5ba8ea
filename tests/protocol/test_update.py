import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocol.errors import Code, ProtocolError
from protocol.identity import digest, merkle_root
from protocol.limits import EXPONENT_MAX
from protocol.update import (
    Update,
    UpdateHeader,
    UpdateTensor,
    apply_update,
    check_update,
    check_update_claims,
    check_update_section,
    decode_update_section,
    encode_update_section,
    join_update_tensors,
    make_update,
    to_update_tensor,
    update_section_bytes_max,
    update_values,
)
from tests.protocol.codec_samples import (
    BASE,
    make_run,
    plain_check_update_section,
    plain_update_section,
    refused,
    same,
    update_sections,
)

SIZES = st.one_of(st.integers(1, 200), st.sampled_from([4095, 4096, 4097, 9000, 12288]))
DENSITIES = st.sampled_from([0.0, 0.001, 0.1, 1.0])
LARGEST = (15 << 36) * 4


def random_step(size: int, density: float, bits: int, seed: int) -> NDArray[np.int64]:
    """A merged step whose chunks differ in scale, up to the largest that the limits admit."""
    rng = np.random.default_rng(seed)
    chunk_bits = np.repeat(rng.integers(0, bits + 1, -(-size // 4096)), 4096)[:size]
    step = (rng.standard_normal(size) * 2.0**chunk_bits).astype(np.int64)
    return np.where(rng.random(size) < density, np.clip(step, -LARGEST, LARGEST), 0)


def plain_update(step: list[int]) -> tuple[list[int], list[int], list[list[int]], list[int]]:
    """SPEC 7 from the merged step to the update, value by value."""
    counts, exponents, chunks, values = [], [], [], []
    for start in range(0, len(step), 4096):
        chunk = step[start : start + 4096]
        largest, e = max(map(abs, chunk)), 0
        while (largest + ((1 << e) >> 1)) >> e > 127:
            e += 1
        rounded = [((abs(a) + ((1 << e) >> 1)) >> e) * (-1 if a < 0 else 1) for a in chunk]
        chunks.append([index for index, m in enumerate(rounded) if m])
        values += [m for m in rounded if m]
        counts.append(len(chunks[-1]))
        exponents.append(e)
    return counts, exponents, chunks, values


@settings(deadline=None, max_examples=150)
@given(SIZES, DENSITIES, st.integers(0, 45), st.integers(0, 2**32 - 1))
def test_update_equals_the_rules_in_plain_integers(size: int, density: float, bits: int, seed: int) -> None:
    step = random_step(size, density, bits, seed)
    update = to_update_tensor(step)
    counts, exponents, chunks, values = plain_update(step.tolist())
    data = encode_update_section(update)
    assert data == plain_update_section(counts, exponents, chunks, values)
    assert len(data) <= update_section_bytes_max(size)
    decoded = decode_update_section(data, size)
    assert same(decoded, update)
    assert encode_update_section(decoded) == data
    assert check_update_section(data, size) == len(values)
    assert plain_check_update_section(data, size) == (counts, exponents, decoded.indices.tolist(), values)
    grid = np.zeros(size, np.int64)
    shifts = decoded.exponents[decoded.indices // 4096].astype(np.int64)
    grid[decoded.indices] = decoded.values.astype(np.int64) << shifts
    assert same(to_update_tensor(grid), decoded)
    half = np.repeat((1 << np.array(exponents, np.int64)) >> 1, 4096)[:size]
    assert np.all(np.abs(grid - step) <= half)


@pytest.mark.parametrize(
    ("largest", "exponent", "value"),
    [(0, 0, []), (1, 0, [1]), (127, 0, [127]), (128, 1, [64]), (254, 1, [127]), (255, 2, [64]), (509, 2, [127])],
)
def test_exponent_is_the_least_that_fits(largest: int, exponent: int, value: list[int]) -> None:
    update = to_update_tensor(np.array([-largest]))
    assert update.exponents.tolist() == [exponent]
    assert (-update.values).tolist() == value


def test_the_largest_step_that_the_limits_admit_has_the_largest_exponent() -> None:
    update = to_update_tensor(np.array([LARGEST, -LARGEST]))
    assert update.exponents.tolist() == [EXPONENT_MAX]
    assert update_values(update).tolist() == [15.0, -15.0]


def test_values_are_exact_float32() -> None:
    update = UpdateTensor(
        3 * 4096,
        np.array([2, 0, 1], np.uint16),
        np.array([0, 0, 35], np.uint8),
        np.array([5, 6, 8192]),
        np.array([-127, 1, 64], np.int8),
    )
    assert update_values(update).tolist() == [-127 * 2.0**-38, 2.0**-38, 8.0]
    assert update_values(update).dtype == np.float32


def test_apply_is_one_float32_subtraction_at_the_positions_present_and_nothing_else() -> None:
    run = make_run()
    rng = np.random.default_rng(1)
    tensors = [
        to_update_tensor(random_step(tensor.size, 0.05, 34, seed)) for seed, tensor in enumerate(run.layout.tensors)
    ]
    before = rng.standard_normal(run.layout.size).astype(np.float32)
    before[::7] = -0.0
    after = before.copy()
    apply_update(after, run.layout, tensors)
    wanted = before.copy()
    for tensor, start in zip(tensors, run.layout.offsets[:-1], strict=True):
        for index, value in zip(tensor.indices.tolist(), update_values(tensor), strict=True):
            wanted[start + index] = np.float32(np.float64(before[start + index]) - np.float64(value))
    assert np.array_equal(after.view(np.uint32), wanted.view(np.uint32))
    assert not np.array_equal(after, before)


def test_parts_of_a_tensor_join_to_the_whole() -> None:
    step = random_step(20_000, 0.1, 40, seed=3)
    parts = [to_update_tensor(step[start : start + 8192]) for start in range(0, 20_000, 8192)]
    assert same(join_update_tensors(parts), to_update_tensor(step))


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([1024, 1025, 2050]), st.integers(1, 4096), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_round_trip_over_several_blocks(chunks: int, tail: int, present: int, seed: int) -> None:
    size = (chunks - 1) * 4096 + tail
    rng = np.random.default_rng(seed)
    step = np.zeros(size, np.int64)
    step[rng.integers(0, size, present)] = rng.integers(-LARGEST, LARGEST, present)
    update = to_update_tensor(step)
    data = encode_update_section(update)
    positions: list[list[int]] = [[] for _ in range(chunks)]
    for index in update.indices.tolist():
        positions[index // 4096].append(index % 4096)
    parts = update.counts.tolist(), update.exponents.tolist(), positions, update.values.tolist()
    assert data == plain_update_section(*parts)
    assert same(decode_update_section(data, size), update)
    assert check_update_section(data, size) == len(update.indices)


def test_bound_is_the_formula_of_the_spec() -> None:
    for size in (1, 4095, 4096, 4097, 1024 * 4096, 1024 * 4096 + 1, 1 << 31):
        chunks = -(-size // 4096)
        assert update_section_bytes_max(size) == 3 * chunks + 4 * (-(-chunks // 1024) - 1) + 2 * size


# Two chunks, the second of 8 values: its positions 3 and 6 hold 64 and -127 at exponent 5.
SIZE = 4104
COUNT, EXPONENT, GAPS, VALUES = 2, 5, 6, 8
SECTION = plain_update_section([0, 2], [0, 5], [[], [3, 6]], [64, -127])


def changed(offset: int, new: bytes) -> bytes:
    return SECTION[:offset] + new + SECTION[offset + len(new) :]


def with_gaps(gaps: bytes) -> bytes:
    return SECTION[:GAPS] + gaps + SECTION[VALUES:]


def test_the_sample_that_the_refusals_start_from_is_accepted() -> None:
    update = decode_update_section(SECTION, SIZE)
    assert update.indices.tolist() == [4099, 4102]
    assert update_values(update).tolist() == [64 * 2.0**-33, -127 * 2.0**-33]


@pytest.mark.parametrize(
    ("what", "data", "code"),
    [
        ("empty", b"", Code.TRUNCATED),
        ("tables cut", SECTION[: GAPS - 1], Code.TRUNCATED),
        ("nothing but tables", SECTION[:GAPS], Code.TRUNCATED),
        ("more values than the chunk holds", changed(COUNT, b"\x09"), Code.BAD_COUNT),
        ("count of 65535", changed(COUNT - 2, b"\xff\xff"), Code.BAD_COUNT),
        ("more values than the section", changed(COUNT, b"\x05"), Code.TRUNCATED),
        ("beyond the bound", SECTION + bytes(9000), Code.TOO_LARGE),
        ("exponent 36", changed(EXPONENT, b"\x24"), Code.BAD_EXPONENT),
        ("exponent of an empty chunk", changed(EXPONENT - 1, b"\1"), Code.BAD_EXPONENT),
        ("one value more", changed(COUNT, b"\x03"), Code.BAD_BLOCKS),
        ("one value less", changed(COUNT, b"\x01"), Code.BAD_BLOCKS),
        ("values cut", SECTION[:-1], Code.BAD_BLOCKS),
        ("one byte more", SECTION + b"\1", Code.BAD_BLOCKS),
        ("a gap too few", with_gaps(b"\3"), Code.BAD_BLOCKS),
        ("a gap too many", with_gaps(b"\3\2\1"), Code.BAD_BLOCKS),
        ("last gap does not end", with_gaps(b"\3\xff"), Code.BAD_BLOCKS),
        ("a continuation at the end", with_gaps(b"\3\2\xff"), Code.BAD_BLOCKS),
        ("index outside", with_gaps(b"\3\4"), Code.BAD_INDEX),
        ("continuations without end", with_gaps(b"\3" + b"\xff" * 300 + b"\2"), Code.BAD_INDEX),
        ("zero", changed(VALUES, b"\0"), Code.BAD_VALUE),
        ("-128", changed(VALUES, b"\x80"), Code.BAD_VALUE),
        ("zero where all are small", changed(VALUES, b"\0\1"), Code.BAD_VALUE),
        ("exponent larger than needed", changed(VALUES, b"\x3f\xc1"), Code.BAD_EXPONENT),
    ],
)
def test_refused_sections(what: str, data: bytes, code: Code) -> None:
    with refused(code):
        decode_update_section(data, SIZE)
    with refused(code):
        check_update_section(data, SIZE)
    assert code is Code.TOO_LARGE or plain_check_update_section(data, SIZE) is code


def test_refusing_takes_no_more_memory_than_the_section_and_a_constant() -> None:
    size = 8 << 20
    counts, exponents = np.full(size >> 12, 4096, np.uint16), np.zeros(size >> 12, np.uint8)
    exponents[-1] = 1
    data = encode_update_section(UpdateTensor(size, counts, exponents, np.arange(size), np.ones(size, np.int8)))
    tracemalloc.start()
    with refused(Code.BAD_EXPONENT):
        decode_update_section(data, size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(data)


def test_mutated_sections_are_refused_or_canonical() -> None:
    rng = np.random.default_rng(17)
    good = encode_update_section(to_update_tensor(random_step(9000, 0.02, 20, seed=2)))
    accepted, codes = 0, set()
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        plain = plain_check_update_section(bytes(data), 9000)
        try:
            decoded = decode_update_section(data, 9000)
        except ProtocolError as error:
            assert plain is error.code  # noqa: PT017  either outcome is allowed
            codes.add(error.code)
            continue
        accepted += 1
        parts = decoded.counts, decoded.exponents, decoded.indices, decoded.values
        assert plain == tuple(part.tolist() for part in parts)
        assert encode_update_section(decoded) == data
    assert 100 < accepted < 2900
    assert {Code.BAD_BLOCKS, Code.BAD_INDEX, Code.BAD_COUNT, Code.BAD_EXPONENT, Code.BAD_VALUE} <= codes


RUN = make_run()
TENSORS = [to_update_tensor(random_step(tensor.size, 0.1, 30, seed=9)) for tensor in RUN.layout.tensors]
NEW = bytes([8]) * 32
UPDATE = make_update(RUN, 4, BASE, NEW, update_sections(TENSORS))
HEADER = UPDATE.header.to_bytes()


def test_header_bytes_are_those_of_the_spec() -> None:
    root = merkle_root(UPDATE.sections)
    assert b"SLUP\1\0\0\0" + RUN.run_id + struct.pack("<I", 4) + BASE + NEW + root == HEADER
    assert len(HEADER) == 140
    assert UPDATE.header.digest == digest("update", HEADER)
    assert UpdateHeader.from_bytes(HEADER) == UPDATE.header


def test_an_update_is_accepted_and_gives_back_its_tensors() -> None:
    decoded = check_update(UPDATE, RUN, digest=UPDATE.header.digest)
    assert all(same(left, right) for left, right in zip(decoded, TENSORS, strict=True))
    assert make_update(RUN, 4, BASE, NEW, update_sections(decoded)) == UPDATE


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"SLPK" + HEADER[4:], Code.BAD_MAGIC),
        (HEADER[:7], Code.TRUNCATED),
        (HEADER[:-1], Code.TRUNCATED),
        (HEADER + b"\0", Code.TRAILING),
        (HEADER[:4] + b"\2" + HEADER[5:], Code.VERSION),
        (HEADER[:6] + b"\1" + HEADER[7:], Code.RESERVED),
    ],
)
def test_refused_headers(data: bytes, code: Code) -> None:
    with refused(code):
        UpdateHeader.from_bytes(data)


def with_sections(*sections: bytes) -> Update:
    return Update(replace(UPDATE.header, sections_root=merkle_root(sections)), sections)


@pytest.mark.parametrize(
    ("what", "update", "code"),
    [
        ("another run", replace(UPDATE, header=replace(UPDATE.header, run_id=bytes(32))), Code.OTHER_RUN),
        ("other sections", replace(UPDATE, sections=(*UPDATE.sections[:-1], b"x")), Code.BAD_MERKLE),
        ("a section too few", with_sections(*UPDATE.sections[1:]), Code.TRUNCATED),
        ("a section too many", with_sections(*UPDATE.sections, b""), Code.TRAILING),
        ("a section too large", with_sections(*UPDATE.sections[:-1], bytes(50_000)), Code.TOO_LARGE),
    ],
)
def test_refused_updates(what: str, update: Update, code: Code) -> None:
    with refused(code):
        check_update_claims(update, RUN, digest=update.header.digest)
    with refused(code):
        check_update(update, RUN, digest=update.header.digest)


def test_the_contents_of_sections_are_no_claims() -> None:
    update = with_sections(*UPDATE.sections[:-1], b"")
    check_update_claims(update, RUN, digest=update.header.digest)
    with refused(Code.TRUNCATED):
        check_update(update, RUN, digest=update.header.digest)


def test_an_update_with_another_digest_is_refused_whatever_its_header_says() -> None:
    for other in (replace(UPDATE.header, new_root=bytes(32)), replace(UPDATE.header, round=5)):
        with refused(Code.WRONG_DIGEST):
            check_update(replace(UPDATE, header=other), RUN, digest=UPDATE.header.digest)
