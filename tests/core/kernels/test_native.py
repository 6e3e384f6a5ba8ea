"""The C++ kernels give the bits of the numpy reference, with every instruction set and number of threads."""

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from peer.core.kernels import native
from peer.core.kernels.native import Native
from protocol import arithmetic, packing, update
from protocol import compress as reference
from protocol.errors import Code, ProtocolError
from protocol.layout import Layout, TensorSpec, chunk_lengths, kept_per_chunk
from protocol.limits import ALPHA_MAX, BLOCK_CHUNKS, CHUNK, CLIP_ONE, CONTRIBUTORS_MAX, EXPONENT_MAX, WEIGHT_MAX
from protocol.packing import SparseTensor, encode_section
from protocol.update import UpdateTensor, encode_update_section
from tests.core.kernels.fuzz import mutate

INSTRUCTIONS = {"portable": 0, "AVX2": 1, "AVX-512": 2}
THREADS = (1, 3)
MANY = 70 * CHUNK + 17  # so many chunks that three threads share a compression
BLOCKS = (BLOCK_CHUNKS + 3) * CHUNK + 11  # and so many that two share a merge and an outer step

sizes = st.one_of(
    st.integers(1, 200),
    st.builds(lambda chunks, rest: max(1, chunks * CHUNK + rest), st.integers(1, 4), st.integers(-3, 3)),
    st.integers(1, 5 * CHUNK),
)
# On both sides of the steps in which the kernel chooses the size of its blocks.
ks = st.one_of(st.sampled_from([1, 2, 16, 64, 128, 129, 256, 257, 512, 513, CHUNK - 1, CHUNK]), st.integers(1, CHUNK))
code_bits_of = st.sampled_from([1, 2])
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=25, deadline=None)


def loaded() -> Native:
    kernels = native.load()
    if kernels is None:
        pytest.skip("the installation built no kernels: no C++ compiler was there")
    return kernels


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Native]:
    found = loaded()
    if not found.use_instructions(INSTRUCTIONS[request.param]):
        pytest.skip(f"this machine has no {request.param}")
    assert found.instructions == request.param
    yield found
    found.use_instructions(-1)


def each_instruction_set(kernels: Native) -> Iterator[str]:
    for name, number in INSTRUCTIONS.items():
        if kernels.use_instructions(number):
            yield name
    kernels.use_instructions(-1)


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return values.view(np.uint32)


def ordinary(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    return rng.standard_normal(length) * 2.0 ** rng.integers(-40, 8)


def ties(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    """Few magnitudes, so that the lowest index decides."""
    return rng.choice([-1.0, 1.0, 1.5, -1.5], length) * 2.0 ** rng.integers(-10, 3)


def all_equal(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    return np.full(length, rng.choice([-0.75, 1e-3, 1.0]))


def zeros(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    return rng.choice([0.0, -0.0], length)


def few(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    """Fewer than are kept, the rest zeros of both signs."""
    return np.where(rng.random(length) < 0.004, rng.standard_normal(length), rng.choice([0.0, -0.0], length))


def denormal(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    return rng.standard_normal(length) * 1e-39


def almost_absent(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    """Around 2^-31 and 2^-30, where a chunk begins to be worth sending."""
    return rng.choice([-1.0, 1.0], length) * 2.0**-30 * rng.uniform(0.4, 1.2, length)


def huge(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    """Far above the largest scale, up to the largest of all float32."""
    return rng.uniform(-1, 1, length) * 10.0 ** rng.integers(0, 39)


def uneven(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    """A tiny value here and there, hidden in its block by others that are alike."""
    return np.where(rng.random(length) < 0.03, 1e-12, rng.uniform(1, 1.9, length))


def any_bits(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    """Every finite exponent alike."""
    patterns = rng.integers(0, 2**32, length, dtype=np.uint32)
    patterns &= np.where(patterns & 0x7F800000 == 0x7F800000, np.uint32(0xBFFFFFFF), np.uint32(0xFFFFFFFF))
    return patterns.view(np.float32).astype(np.float64)


KINDS = [ordinary, ordinary, ties, all_equal, zeros, few, denormal, almost_absent, huge, uneven, any_bits]


def values_of(size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A kind of values for each chunk."""
    lengths = chunk_lengths(size)
    chosen = rng.integers(len(KINDS), size=len(lengths))
    parts = [KINDS[kind](rng, int(length)) for kind, length in zip(chosen, lengths, strict=True)]
    return np.concatenate(parts).astype(np.float32)


def flows_of(size: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], ...]:
    """Residual, outer and local, of which often one alone decides, so that the kinds show in acc."""
    flows = tuple(values_of(size, rng) for _ in range(3))
    for flow in flows:
        if rng.random() < 0.4:
            flow[:] = rng.choice([0.0, -0.0])
        else:
            np.divide(flow, 4, out=flow)  # so that sums of huge values stay finite
    return flows


def check_compress(kernels: Native, size: int, k: int, code_bits: int, beta: float, seed: int) -> None:
    flows = flows_of(size, np.random.default_rng(seed))
    acc = reference.error_feedback(flows[0], flows[1], flows[2], beta)
    sparse, rest = reference.compress(acc, k, code_bits)
    expected = encode_section(sparse, k, code_bits)
    for threads in THREADS:
        residual, outer, local = (flow.copy() for flow in flows)
        section, positions, originals = kernels.compress(residual, outer, local, beta, k, code_bits, threads)
        assert section == expected
        np.testing.assert_array_equal(bits(residual), bits(rest))
        np.testing.assert_array_equal(bits(outer), bits(flows[1]), "only the residual changes")
        np.testing.assert_array_equal(bits(local), bits(flows[2]), "only the residual changes")
        np.testing.assert_array_equal(positions, sparse.indices)
        residual[positions] = originals
        np.testing.assert_array_equal(bits(residual), bits(acc), "what was taken can be put back")
    assert kernels.encode(sparse, k, code_bits) == expected
    assert kernels.check_section(expected, size, k, code_bits) == len(sparse.indices)


@quick
@given(sizes, ks, code_bits_of, st.sampled_from([0.0, 0.5, 0.95, 1.0]), seeds)
def test_compress_is_bit_equal(kernels: Native, size: int, k: int, code_bits: int, beta: float, seed: int) -> None:
    check_compress(kernels, size, k, code_bits, beta, seed)


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS))
def test_each_kind_of_values_is_compressed_for_each_size_of_block(
    kernels: Native, kind: Callable[[np.random.Generator, int], NDArray[np.float64]]
) -> None:
    rng = np.random.default_rng(8)
    acc = np.concatenate([kind(rng, CHUNK), kind(rng, CHUNK), kind(rng, 1000)]).astype(np.float32)
    negative = np.full_like(acc, -0.0)  # acc + -0 is acc, the sign of a zero included
    for k in (1, 64, 128, 129, 256, 257, 512, 513, 2049, CHUNK):
        for code_bits in (1, 2):
            sparse, rest = reference.compress(acc, k, code_bits)
            residual = negative.copy()
            section, positions, originals = kernels.compress(residual, acc, np.zeros_like(acc), 1.0, k, code_bits)
            assert section == encode_section(sparse, k, code_bits), (k, code_bits)
            np.testing.assert_array_equal(bits(residual), bits(rest))
            np.testing.assert_array_equal(bits(originals), bits(acc[positions]))


@pytest.mark.parametrize("code_bits", [1, 2])
def test_a_chunk_is_absent_just_where_the_reference_says(kernels: Native, code_bits: int) -> None:
    """The smallest scale is 9/8 of 2^-30, and what rounds to it is sent."""
    for edge in (0.5, 1.0, 1.0625, 1.125):
        for step in (-1, 0, 1):
            word = np.array([edge * 2.0**-30], np.float32).view(np.uint32) + np.uint32(step % 2**32)
            acc = np.resize(word.view(np.float32), CHUNK)
            sparse, _ = reference.compress(acc, 64, code_bits)
            section, _, _ = kernels.compress(np.zeros_like(acc), acc, np.zeros_like(acc), 1.0, 64, code_bits)
            assert section == encode_section(sparse, 64, code_bits), (edge, step)


@pytest.mark.parametrize("code_bits", [1, 2])
@pytest.mark.parametrize("k", [64, 256])
def test_compress_is_bit_equal_with_several_threads(kernels: Native, k: int, code_bits: int) -> None:
    check_compress(kernels, MANY, k, code_bits, 0.95, k + code_bits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 5, CHUNK, CHUNK + 1, MANY])
def test_compress_refuses_what_is_not_finite(kernels: Native, size: int, bad: float) -> None:
    for place in (0, size // 2, size - 1):
        for threads in THREADS:
            residual, outer, local = (np.ones(size, np.float32) for _ in range(3))
            local[place] = bad
            with pytest.raises(ValueError, match="NaN or infinity"):
                kernels.compress(residual, outer, local, 0.95, 64, 2, threads)


def test_compress_refuses_sums_that_overflow(kernels: Native) -> None:
    residual, outer = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
    local = np.zeros(CHUNK, np.float32)
    outer[77], local[77] = 3e38, -3e38
    with pytest.raises(ValueError, match="NaN or infinity"):
        kernels.compress(residual, outer, local, 0.95, 64, 2)


def test_a_caller_that_flushes_denormals_changes_nothing(kernels: Native) -> None:
    rng = np.random.default_rng(3)
    residual, outer, local = (denormal(rng, CHUNK + 9).astype(np.float32) for _ in range(3))
    acc = reference.error_feedback(residual, outer, local, 0.95)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this machine cannot flush denormals")
        kernels.compress(residual, outer, local, 0.95, 64, 2)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(bits(residual), bits(acc), "all chunks are absent, so the residual is acc")


def sparse_of(size: int, k: int, code_bits: int, rng: np.random.Generator, present: float = 0.8) -> SparseTensor:
    """A section that no peer would make, but each may send: any scales, ratios, positions and codes that are valid."""
    counts, lengths = kept_per_chunk(size, k), chunk_lengths(size)
    scales = rng.integers(1, 256, len(counts)).astype(np.uint8)
    scales[rng.random(len(counts)) < 0.2] = 255
    scales[rng.random(len(counts)) >= present] = 0
    ratios = np.zeros(len(counts), np.uint8)
    indices, codes = [], []
    for chunk in np.flatnonzero(scales):
        count, length = int(counts[chunk]), int(lengths[chunk])
        reach = length if rng.random() < 0.7 else min(length, 2 * count)
        indices.append(chunk * CHUNK + length - reach + np.sort(rng.permutation(reach)[:count]))
        code = rng.integers(0, 2, count).astype(np.uint8)
        if code_bits == 2 and count > 1 and rng.random() < 0.8:
            ratios[chunk] = rng.integers(1, 64)
            code |= (2 * rng.integers(0, 2, count)).astype(np.uint8)
            code[[0, -1]] = (code[[0, -1]] & 1) | (0, 2)
        codes.append(code)
    empty = np.empty(0, np.int64)
    return SparseTensor(
        size, scales, ratios, np.concatenate([empty, *indices]), np.concatenate([empty[:0].astype(np.uint8), *codes])
    )


def update_of(size: int, rng: np.random.Generator, present: float = 0.8) -> UpdateTensor:
    """Any valid update of one tensor."""
    lengths = chunk_lengths(size)
    counts = rng.integers(1, lengths + 1) * (rng.random(len(lengths)) < present)
    if rng.random() < 0.5:
        counts = np.minimum(counts, rng.integers(1, 40))
    exponents = np.where(counts > 0, rng.integers(0, EXPONENT_MAX + 1, len(counts)), 0)
    indices, values = [np.empty(0, np.int64)], [np.empty(0, np.int8)]
    for chunk in np.flatnonzero(counts):
        count = int(counts[chunk])
        indices.append(chunk * CHUNK + np.sort(rng.permutation(int(lengths[chunk]))[:count]))
        value = rng.integers(1, 128, count) * rng.choice([-1, 1], count)
        value[rng.integers(count)] = rng.choice([-127, -64, 64, 127])
        values.append(value.astype(np.int8))
    return UpdateTensor(
        size, counts.astype(np.uint16), exponents.astype(np.uint8), np.concatenate(indices), np.concatenate(values)
    )


@quick
@given(sizes, ks, code_bits_of, seeds)
def test_encode_and_check_agree_on_any_valid_section(
    kernels: Native, size: int, k: int, code_bits: int, seed: int
) -> None:
    sparse = sparse_of(size, k, code_bits, np.random.default_rng(seed))
    section = encode_section(sparse, k, code_bits)
    assert packing.check_section(section, size, k, code_bits) == len(sparse.indices)
    assert kernels.encode(sparse, k, code_bits) == section
    assert kernels.check_section(section, size, k, code_bits) == len(sparse.indices)


def check_merge(kernels: Native, sparse: Sequence[SparseTensor], k: int, code_bits: int, seed: int) -> bytes:
    """Both rules, with weights, clip factors and alpha of many kinds, and now and then packets that lie elsewhere."""
    rng = np.random.default_rng(seed)
    size, count = sparse[0].size, len(sparse)
    weights, clips = (
        [[highest] * count, [1] * count, [1024] * count, rng.integers(1, highest + 1, count).tolist()][rng.integers(4)]
        for highest in (WEIGHT_MAX, CLIP_ONE)
    )
    alpha_q16 = [1, 40000, 65536, ALPHA_MAX, int(rng.integers(1, ALPHA_MAX))][rng.integers(5)]
    total_weight = min(sum(weights) + int(rng.choice([0, 0, 1, 4096])), CONTRIBUTORS_MAX * WEIGHT_MAX)
    total = arithmetic.zero(size)
    for tensor, weight, clip in zip(sparse, weights, clips, strict=True):
        arithmetic.add(total, tensor, weight, clip)
    sections = [encode_section(tensor, k, code_bits) for tensor in sparse]
    section = b""
    for rule in arithmetic.RULES:
        step = arithmetic.quotient(total, rule, total_weight, alpha_q16)
        expected = encode_update_section(update.to_update_tensor(step))
        for threads in THREADS:
            section = kernels.merge(
                sections, weights, clips, size, k, code_bits, rule, total_weight, alpha_q16, threads
            )
            assert section == expected
    return section


@quick
@given(sizes, ks, code_bits_of, st.sampled_from([1, 2, 3, 8, 20]), seeds)
def test_merge_is_bit_equal(kernels: Native, size: int, k: int, code_bits: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_merge(kernels, [sparse_of(size, k, code_bits, rng) for _ in range(count)], k, code_bits, seed)


@quick
@given(sizes, ks, code_bits_of, st.sampled_from([2, 5]), seeds)
def test_merge_of_what_peers_compress_is_bit_equal(
    kernels: Native, size: int, k: int, code_bits: int, count: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    accs = [np.clip(values_of(size, rng), -1e30, 1e30) for _ in range(count)]
    check_merge(kernels, [reference.compress(acc, k, code_bits)[0] for acc in accs], k, code_bits, seed)


def test_merge_of_a_full_round_is_bit_equal(kernels: Native) -> None:
    """1024 packets with the largest values and weights there are: the sums need all 63 bits."""
    rng = np.random.default_rng(5)
    sparse = [sparse_of(300, 256, 2, rng, present=1.0) for _ in range(1024)]
    check_merge(kernels, sparse, 256, 2, seed=1)
    for tensor in sparse:
        tensor.scales[:] = 255
    for seed in (2, 3):
        check_merge(kernels, sparse, 256, 2, seed)


@pytest.mark.parametrize("sign", [0, 1])
def test_merge_divides_exactly_where_a_double_would_round_up(kernels: Native, sign: int) -> None:
    """A sum one below 40,000 times a value that is rounded up: as a double the quotient is that value itself."""
    total_weight, boundary = 40_000, 199 << 32
    # Weight, scale and clip factor of packets that send the one position: values of 15 << 36, 9 << 36, 15 << 32, ...
    terms = [(4096, 255, CLIP_ONE)] * 8 + [(33166 - 8 * 4096, 255, CLIP_ONE), (1, 249, CLIP_ONE)]
    terms += [(1, 8 * (shift - 5) + 7, CLIP_ONE) for shift in range(8, 36, 4)] + [(1, 8, 255 << 7)]
    one = np.zeros(1, np.int64)
    code = np.array([sign], np.uint8)
    sparse = [SparseTensor(1, np.array([scale], np.uint8), np.zeros(1, np.uint8), one, code) for _, scale, _ in terms]
    total = arithmetic.zero(1)
    for tensor, (weight, _, clip) in zip(sparse, terms, strict=True):
        arithmetic.add(total, tensor, weight, clip)
    assert abs(int(total.num[0])) == total_weight * boundary - 1
    sections = [encode_section(tensor, 64, 2) for tensor in sparse]
    weights, _, clips = zip(*terms, strict=True)
    merged = kernels.merge(sections, weights, clips, 1, 64, 2, "mean", total_weight, 65536)
    step = arithmetic.quotient(total, "mean", total_weight, 65536)
    assert merged == encode_update_section(update.to_update_tensor(step))
    assert abs(int(update.decode_update_section(merged, 1).values[0])) == 99, "and not 100"


def check_outer_step(kernels: Native, tensor: UpdateTensor, outer: NDArray[np.float32]) -> None:
    expected = outer.copy()
    update.apply_update(expected, Layout((TensorSpec("a", (outer.size,)),)), [tensor])
    section = encode_update_section(tensor)
    for threads in THREADS:
        stepped = outer.copy()
        kernels.outer_step(stepped, section, threads)
        np.testing.assert_array_equal(bits(stepped), bits(expected))


@quick
@given(sizes, seeds)
def test_outer_step_is_bit_equal(kernels: Native, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensor = update_of(size, rng)
    section = encode_update_section(tensor)
    assert update.check_update_section(section, size) == len(tensor.values)
    assert kernels.check_update_section(section, size) == len(tensor.values)
    check_outer_step(kernels, tensor, values_of(size, rng))


@pytest.mark.parametrize("code_bits", [1, 2])
def test_sections_of_several_blocks_are_bit_equal(kernels: Native, code_bits: int) -> None:
    rng = np.random.default_rng(code_bits)
    sparse = [sparse_of(BLOCKS, 3, code_bits, rng, present=0.3) for _ in range(2)]
    section = encode_section(sparse[0], 3, code_bits)
    assert kernels.encode(sparse[0], 3, code_bits) == section
    assert kernels.check_section(section, BLOCKS, 3, code_bits) == len(sparse[0].indices)
    merged = check_merge(kernels, sparse, 3, code_bits, code_bits)
    tensor = update.decode_update_section(merged, BLOCKS)
    check_outer_step(kernels, tensor, np.linspace(-1, 1, BLOCKS, dtype=np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("code_bits", [1, 2])
def test_compression_of_several_blocks_is_bit_equal(kernels: Native, code_bits: int) -> None:
    check_compress(kernels, BLOCKS, 64, code_bits, 0.95, code_bits)


# Where mutations start from: shapes of sections, some with more than one block.
SHAPES = [(1, 4, 2), (300, 600, 2), (CHUNK, 64, 2), (CHUNK + 5, 64, 1), (3 * CHUNK + 700, 200, 2), (5 * CHUNK, 4096, 1)]
LARGE_SHAPE = (BLOCKS, 1, 2)


def outcome(check: Callable[..., int], data: bytes, *shape: int) -> str:
    try:
        return f"{check(data, *shape)} values"
    except ProtocolError as error:
        return error.code.name


def mutations_of(valid: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Valid sections with one change or, less often, a few."""
    chance = random.Random(seed)
    for _ in range(count):
        data = mutate(chance.choice(valid), chance.choice(valid), chance)
        while chance.random() < 0.3:
            data = mutate(data, chance.choice(valid), chance)
        yield data


def check_verdicts(kernels: Native, shape: tuple[int, int, int], count: int, seed: int) -> set[str]:
    """Check, merge and the reference must agree on mutated sections of packets. Returns what came of them."""
    size, k, code_bits = shape
    rng = np.random.default_rng(seed)
    valid = [encode_section(sparse_of(size, k, code_bits, rng), k, code_bits) for _ in range(4)]
    seen = set()
    for number, data in enumerate(mutations_of(valid, count, seed)):
        expected = outcome(packing.check_section, data, *shape)
        seen.add(expected)
        for name in each_instruction_set(kernels):
            assert outcome(kernels.check_section, data, *shape) == expected, (name, shape, seed, number)
        if expected in Code.__members__ and size < BLOCKS:
            with pytest.raises(ProtocolError) as caught:
                kernels.merge([valid[0], data], [1024, 1024], [CLIP_ONE, CLIP_ONE], *shape, "mean", 2048, 65536)
            assert caught.value.code.name == expected, (shape, seed, number)
    return seen


def check_update_verdicts(kernels: Native, size: int, count: int, seed: int) -> set[str]:
    """Check, outer step and the reference must agree on mutated sections of updates; a refused one changes nothing."""
    rng = np.random.default_rng(seed)
    valid = [encode_update_section(update_of(size, rng)) for _ in range(4)]
    outer = values_of(size, rng)
    before = outer.copy()
    seen = set()
    for number, data in enumerate(mutations_of(valid, count, seed)):
        expected = outcome(update.check_update_section, data, size)
        seen.add(expected)
        for name in each_instruction_set(kernels):
            assert outcome(kernels.check_update_section, data, size) == expected, (name, size, seed, number)
        if expected in Code.__members__:
            with pytest.raises(ProtocolError) as caught:
                kernels.outer_step(outer, data, threads=3)
            assert caught.value.code.name == expected, (size, seed, number)
    np.testing.assert_array_equal(bits(outer), bits(before))
    return seen


PACKET_CODES = {"TRUNCATED", "TOO_LARGE", "BAD_RATIO", "BAD_BLOCKS", "BAD_INDEX", "BAD_CODE", "BAD_PADDING"}
UPDATE_CODES = {"TRUNCATED", "TOO_LARGE", "BAD_COUNT", "BAD_BLOCKS", "BAD_INDEX", "BAD_EXPONENT", "BAD_VALUE"}


@pytest.mark.parametrize("k", [1, 27, 28, 29, 64, 300])
def test_a_ratio_wants_high_and_low_values(kernels: Native, k: int) -> None:
    """Each chunk alone: one value of the other kind is enough, wherever it is, and none is not."""
    for chunk in range(3):
        for places, code in [([], Code.BAD_RATIO), ([0], None), ([k - 1], None), ([k // 2], None)]:
            for few, many in [(0, 2), (2, 0)]:
                ratios = np.array([5 * (number == chunk) for number in range(3)], np.uint8)
                codes = np.zeros((3, k), np.uint8)
                codes[chunk] = many
                codes[chunk, places] = few
                indices = np.concatenate([np.arange(k) + number * CHUNK for number in range(3)])
                sparse = SparseTensor(3 * CHUNK, np.full(3, 99, np.uint8), ratios, indices, codes.reshape(-1))
                section = encode_section(sparse, k, 2)
                expected = outcome(packing.check_section, section, 3 * CHUNK, k, 2)
                assert expected == ("BAD_RATIO" if code or k == 1 else f"{3 * k} values")
                assert outcome(kernels.check_section, section, 3 * CHUNK, k, 2) == expected


@pytest.mark.parametrize(
    ("count", "seed"), [pytest.param(400, 1, id="some"), pytest.param(15_000, 2, id="many", marks=pytest.mark.slow)]
)
def test_verdicts_on_mutated_sections_are_those_of_the_reference(count: int, seed: int) -> None:
    kernels = loaded()
    seen = check_verdicts(kernels, LARGE_SHAPE, count // 20, seed)
    for shape in SHAPES:
        seen |= check_verdicts(kernels, shape, count, seed)
    assert seen >= PACKET_CODES and seen - PACKET_CODES, "every code is met, and valid sections too"


@pytest.mark.parametrize(
    ("count", "seed"), [pytest.param(400, 1, id="some"), pytest.param(15_000, 2, id="many", marks=pytest.mark.slow)]
)
def test_verdicts_on_mutated_updates_are_those_of_the_reference(count: int, seed: int) -> None:
    kernels = loaded()
    seen = set()
    for size, _, _ in SHAPES:
        seen |= check_update_verdicts(kernels, size, count, seed)
    assert seen >= UPDATE_CODES and seen - UPDATE_CODES, "every code is met, and valid sections too"
