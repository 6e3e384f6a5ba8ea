"""The C++ kernels give the bits of the numpy reference, on every instruction set here and on any number of threads."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from peer.core.kernels import native
from protocol import arithmetic
from protocol.compress import compress, error_feedback
from protocol.errors import Code, ProtocolError
from protocol.layout import Layout, TensorSpec, kept_per_chunk
from protocol.packing import SparseTensor, check_section, decode_section, encode_section
from protocol.update import UpdateTensor, apply_update, check_update_section, encode_update_section
from tests.protocol.codec_samples import refused

LOADED = native.load()
if LOADED is None:
    pytest.skip("the installation built no kernels: no C++ compiler was there", allow_module_level=True)
NATIVE: native.Native = LOADED

SIZES = st.one_of(
    st.integers(1, 300), st.integers(4090, 4102), st.sampled_from([8192, 13000, 20 * 4096, 41 * 4096 + 77])
)
KS = st.one_of(st.integers(1, 4096), st.sampled_from([1, 32, 64, 128, 129, 256, 257, 512, 513, 4096]))
KINDS = st.sampled_from(["normal", "ties", "denormal", "zeros", "uneven", "any bits"])
SEEDS = st.integers(0, 2**32 - 1)
F32 = NDArray[np.float32]


@pytest.fixture(autouse=True)
def best_instructions_afterwards() -> Iterator[None]:
    yield
    NATIVE.use_instructions(-1)


def instruction_sets() -> Iterator[str]:
    """Switch to each instruction set that this machine has."""
    for number in range(3):
        if NATIVE.use_instructions(number):
            yield NATIVE.instructions


def inputs(size: int, kind: str, rng: np.random.Generator) -> tuple[F32, F32, F32]:
    """Residual, outer and local parameters. What differs between the kinds is what a kernel may treat as special."""
    residual, outer, local = (rng.standard_normal(size).astype(np.float32) for _ in range(3))
    if kind == "ties":
        residual, outer, local = np.round(2 * residual), np.round(outer), outer.copy()
    elif kind == "denormal":
        residual, local = residual * np.float32(1e-38), outer.copy()
    elif kind == "zeros":
        residual[:] = -0.0
        residual[::7] = 0.0
        outer[:] = local
    elif kind == "uneven":
        scales = np.exp(8 * rng.standard_normal(-(-size // 4096))) * (rng.random(-(-size // 4096)) > 0.3)
        residual, outer, local = ((a * np.repeat(scales, 4096)[:size]) for a in (residual, outer, local))
    elif kind == "any bits":
        words = rng.integers(0, 2**32, size, dtype=np.uint32)
        words[(words & 0x7F800000) == 0x7F800000] = 0  # neither NaN nor infinity, nor a sum that overflows
        residual, local = words.view(np.float32) / np.float32(2), outer.copy()
    return residual.astype(np.float32), outer.astype(np.float32), local.astype(np.float32)


def same_bits(left: F32, right: F32) -> bool:
    return np.array_equal(left.view(np.uint32), right.view(np.uint32))


def check_compress(size: int, k: int, code_bits: int, kind: str, threads: int, seed: int) -> bytes:
    residual, outer, local = inputs(size, kind, np.random.default_rng(seed))
    acc = error_feedback(residual, outer, local, 0.95)
    sparse, rest = compress(acc, k, code_bits)
    expected = encode_section(sparse, k, code_bits)
    for name in instruction_sets():
        mine = residual.copy()
        section, positions, originals = NATIVE.compress(mine, outer, local, 0.95, k, code_bits, threads)
        assert section == expected, name
        assert same_bits(mine, rest), name
        assert np.array_equal(positions, sparse.indices), name
        assert same_bits(originals, acc[positions]), name
    return expected


@settings(deadline=None, max_examples=150)
@given(SIZES, KS, st.sampled_from([1, 2]), KINDS, st.integers(1, 3), SEEDS)
def test_compress(size: int, k: int, code_bits: int, kind: str, threads: int, seed: int) -> None:
    check_compress(size, k, code_bits, kind, threads, seed)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_compress_several_blocks(threads: int) -> None:
    check_compress(2050 * 4096 + 9, 3, 2, "uneven", threads, seed=1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.float32(3.4e38)])
@pytest.mark.parametrize("place", [0, 4095, 4096, 9999])
def test_what_is_not_finite_is_an_error(value: float, place: int) -> None:
    for _ in instruction_sets():
        residual, outer, _ = inputs(10000, "normal", np.random.default_rng(0))
        residual[place] = outer[place] = value  # two large finite values overflow
        with pytest.raises(ValueError, match="NaN or infinity"):
            NATIVE.compress(residual, outer, -outer, 1.0, 64, 2, 2)


def test_a_caller_that_flushes_denormals_changes_nothing() -> None:
    residual, outer, local = inputs(5000, "denormal", np.random.default_rng(3))
    expected = error_feedback(residual, outer, local, 0.95)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this machine cannot flush denormals")
        NATIVE.compress(residual, outer, local, 0.95, 64, 2, threads=2)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(residual, expected), "all chunks are absent, so the residual is acc"


def random_sparse(size: int, k: int, code_bits: int, rng: np.random.Generator) -> SparseTensor:
    """Any legal tensor, not only those that compress makes."""
    counts = kept_per_chunk(size, k)
    counts[rng.random(len(counts)) < 0.2] = 0
    lengths = np.minimum(4096, size - np.arange(len(counts)) * 4096)
    parts = [
        np.sort(rng.choice(length, count, False)) + 4096 * chunk
        for chunk, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ]
    codes = rng.integers(0, 2, counts.sum()).astype(np.uint8)
    ratios = np.zeros(len(counts), np.uint8)
    for chunk, stop in enumerate(np.cumsum(counts)):
        if code_bits == 2 and counts[chunk] > 1 and rng.random() < 0.8:
            ratios[chunk] = rng.integers(1, 64)
            lows = rng.choice(counts[chunk], rng.integers(1, counts[chunk]), False)
            codes[stop - counts[chunk] + lows] |= 2
    scales = np.where(counts > 0, rng.integers(1, 256, len(counts)), 0).astype(np.uint8)
    return SparseTensor(size, scales, ratios, np.concatenate(parts).astype(np.int64), codes)


@settings(deadline=None, max_examples=100)
@given(SIZES, KS, st.sampled_from([1, 2]), SEEDS)
def test_encode_and_check(size: int, k: int, code_bits: int, seed: int) -> None:
    sparse = random_sparse(size, k, code_bits, np.random.default_rng(seed))
    section = encode_section(sparse, k, code_bits)
    assert NATIVE.encode(sparse, k, code_bits) == section
    for _ in instruction_sets():
        assert NATIVE.check_section(section, size, k, code_bits) == len(sparse.indices)


def draw_weights(kind: str, count: int, rng: np.random.Generator) -> list[int]:
    drawn: dict[str, list[int]] = {
        "equal": [1024] * count,
        "any": rng.integers(1, 4097, count).tolist(),
        "largest": [4096] * count,
    }
    return drawn[kind]


def draw_clips(kind: str, count: int, rng: np.random.Generator) -> list[int]:
    any_clips: list[int] = rng.choice([1, 2, 30001, 65535, 65536], count).tolist()
    return any_clips if kind == "any" else [65536] * count


def reference_merge(
    sections: list[bytes],
    weights: list[int],
    clips: list[int],
    size: int,
    k: int,
    code_bits: int,
    rule: str,
    alpha: int,
) -> UpdateTensor:
    contributions = [
        arithmetic.Contribution([decode_section(section, size, k, code_bits)], weight, clip)
        for section, weight, clip in zip(sections, weights, clips, strict=True)
    ]
    (update,) = arithmetic.merge(contributions, Layout((TensorSpec("t", (size,)),)), rule, alpha)
    return update


def check_merge(
    sections: list[bytes],
    weights: list[int],
    clips: list[int],
    size: int,
    k: int,
    code_bits: int,
    rule: str,
    alpha: int,
) -> None:
    update = reference_merge(sections, weights, clips, size, k, code_bits, rule, alpha)
    expected = encode_update_section(update)
    outer = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    stepped = outer.copy()
    apply_update(stepped, Layout((TensorSpec("t", (size,)),)), [update])
    total = sum(weights)
    for name in instruction_sets():
        for threads in (1, 3):
            merged = NATIVE.merge(sections, weights, clips, size, k, code_bits, rule, total, alpha, threads)
            assert merged == expected, name
            mine = outer.copy()
            NATIVE.outer_step(mine, merged, threads)
            assert same_bits(mine, stepped), name
        assert NATIVE.check_update_section(expected, size) == len(update.indices), name


@settings(deadline=None, max_examples=150)
@given(
    size=SIZES,
    k=KS,
    code_bits=st.sampled_from([1, 2]),
    count=st.sampled_from([1, 2, 3, 16]),
    rule=st.sampled_from(arithmetic.RULES),
    weights=st.sampled_from(["equal", "any", "largest"]),
    clips=st.sampled_from(["none", "any"]),
    alpha=st.sampled_from([1, 65536, 90001, 1 << 18]),
    seed=SEEDS,
)
def test_merge_and_outer_step(
    size: int, k: int, code_bits: int, count: int, rule: str, weights: str, clips: str, alpha: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sections = []
    for _ in range(count):
        if rng.random() < 0.5:
            sections.append(encode_section(random_sparse(size, k, code_bits, rng), k, code_bits))
        else:
            sections.append(encode_section(compress(inputs(size, "uneven", rng)[0], k, code_bits)[0], k, code_bits))
    check_merge(
        sections, draw_weights(weights, count, rng), draw_clips(clips, count, rng), size, k, code_bits, rule, alpha
    )


@pytest.mark.parametrize("rule", arithmetic.RULES)
def test_merge_of_the_largest_values_and_numbers(rule: str) -> None:
    """1024 contributors with the largest weight and scale fill 63 bits."""
    size, k = 4096, 8
    rng = np.random.default_rng(5)
    positions = np.arange(0, 4096, 512, dtype=np.int64)
    sparse = SparseTensor(size, np.array([255], np.uint8), np.zeros(1, np.uint8), positions, np.zeros(8, np.uint8))
    sections = [encode_section(sparse, k, 2)] * 1000
    sections += [encode_section(random_sparse(size, k, 2, rng), k, 2) for _ in range(24)]
    check_merge(sections, [4096] * 1024, [65536] * 1024, size, k, 2, rule, 1 << 18)
    check_merge(sections, rng.integers(1, 4097, 1024).tolist(), [65535] * 1024, size, k, 2, rule, 65536)


def test_merge_of_several_blocks() -> None:
    size = 2050 * 4096 + 9
    rng = np.random.default_rng(6)
    sections = [encode_section(random_sparse(size, 3, 2, rng), 3, 2) for _ in range(3)]
    check_merge(sections, [1024, 7, 4000], [65536, 65536, 1000], size, 3, 2, "mean_of_senders", 65536)


def verdict(check: Callable[..., int], *arguments: bytes | int) -> tuple[Code | None, int]:
    """The code that refuses a section, or how many values it has."""
    try:
        return None, check(*arguments)
    except ProtocolError as error:
        return error.code, 0


def mutate(data: bytes, other: bytes, tables: int, rng: np.random.Generator) -> bytes:
    """Flip, set, cut, insert or splice a few bytes, in the tables at the front more often than their share."""
    mutant = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        reach = min(len(mutant), tables) if rng.random() < 0.5 else len(mutant)
        place = int(rng.integers(0, max(reach, 1)))
        match rng.integers(0, 6):
            case 0 if mutant:
                mutant[place] ^= 1 << rng.integers(0, 8)
            case 1 if mutant:
                mutant[place] = rng.choice([0, 1, 63, 64, 127, 128, 254, 255])
            case 2:
                del mutant[place : place + rng.integers(1, 5)]
            case 3:
                mutant[place:place] = rng.integers(0, 256, rng.integers(1, 5), dtype=np.uint8).tobytes()
            case 4:
                mutant[place:] = other[place:]
            case _:
                # The bytes move but their number stays, so that later rules are reached.
                moved = mutant[place : place + 1]
                del mutant[place : place + 1]
                mutant[int(rng.integers(0, len(mutant) + 1)) : 0] = moved
    return bytes(mutant)


SHAPES = [(1, 1), (5, 4096), (300, 64), (4096, 64), (4097, 1000), (9000, 20), (3 * 4096, 4096), (1025 * 4096 + 3, 1)]


@pytest.mark.parametrize(("size", "k"), SHAPES)
@pytest.mark.parametrize("code_bits", [1, 2])
def test_mutated_packet_sections_get_the_same_verdict(size: int, k: int, code_bits: int) -> None:
    rng = np.random.default_rng([size, k, code_bits])
    sections = [encode_section(random_sparse(size, k, code_bits, rng), k, code_bits) for _ in range(4)]
    tables = -(-size // 4096) * code_bits + 4 * (-(-size // (1024 * 4096)))
    seen = set()
    for number in range(60 if size > 1 << 20 else 400):
        mutant = mutate(sections[number % 4], sections[(number + 1) % 4], tables, rng)
        expected = verdict(check_section, mutant, size, k, code_bits)
        seen.add(expected[0])
        for name in instruction_sets():
            mine = verdict(NATIVE.check_section, mutant, size, k, code_bits)
            assert mine == expected, (name, number, mutant.hex()[:200])
            if expected[0]:
                with refused(expected[0]):
                    NATIVE.merge([sections[0], mutant], [1, 1], [65536, 65536], size, k, code_bits, "mean", 2, 65536)
    assert len(seen) > 1, "some mutants are refused, and not all for the same reason or all of them"


@pytest.mark.parametrize("size", sorted({size for size, _ in SHAPES}))
def test_mutated_update_sections_get_the_same_verdict(size: int) -> None:
    rng = np.random.default_rng(size)
    k = 1 if size > 1 << 20 else 200
    updates = []
    for _ in range(4):
        sections = [encode_section(random_sparse(size, k, 2, rng), k, 2) for _ in range(2)]
        updates.append(encode_update_section(reference_merge(sections, [1, 2], [65536, 9], size, k, 2, "mean", 65536)))
    tables = 3 * -(-size // 4096) + 4 * (-(-size // (1024 * 4096)))
    outer = rng.standard_normal(size).astype(np.float32)
    seen = set()
    for number in range(60 if size > 1 << 20 else 400):
        mutant = mutate(updates[number % 4], updates[(number + 1) % 4], tables, rng)
        expected = verdict(check_update_section, mutant, size)
        seen.add(expected[0])
        for name in instruction_sets():
            mine = verdict(NATIVE.check_update_section, mutant, size)
            assert mine == expected, (name, number, mutant.hex()[:200])
        if expected[0]:
            stepped = outer.copy()
            with refused(expected[0]):
                NATIVE.outer_step(stepped, mutant)
            assert same_bits(stepped, outer), "a refused update changes nothing"
    assert len(seen) > 1, "some mutants are refused, and not all for the same reason or all of them"
