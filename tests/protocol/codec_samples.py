"""Inputs for the codec tests, and SPEC 4, 5 and 7 written once more in plain Python integers to compare against."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from protocol.compress import compress
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.layout import Layout, kept
from protocol.packing import SparseTensor, encode_section
from protocol.run import CompressionConfig, RunConfig, RunSettings
from protocol.update import UpdateTensor, encode_update_section

KEY = PrivateKey.from_bytes(bytes(range(32)))
OTHER_KEY = PrivateKey.from_bytes(bytes(range(1, 33)))
BASE = bytes([7]) * 32
SHAPES = (("embed", (40, 300)), ("layer.weight", (64, 64)), ("norm", (13,)), ("scalar", ()), ("tail", (4097,)))


def make_run(k: int = 64, code_bits: int = 2, shapes: Sequence[tuple[str, tuple[int, ...]]] = SHAPES) -> RunConfig:
    settings = RunSettings("codec-test", compression=CompressionConfig(k=k, code_bits=code_bits))
    keys = (KEY.public,)
    return RunConfig.of(
        settings, operator=KEY.public, aggregators=keys, layout=Layout.of(shapes), genesis_root=bytes(32)
    )


def gradient(size: int, seed: int) -> NDArray[np.float32]:
    """Normal values whose scale differs from chunk to chunk, as in a model, with an all-zero chunk now and then."""
    rng = np.random.default_rng(seed)
    chunks = -(-size // 4096)
    scales = np.exp(rng.normal(-7, 2, chunks)) * (rng.random(chunks) > 0.1)
    values: NDArray[np.float32] = (rng.standard_normal(size) * np.repeat(scales, 4096)[:size]).astype(np.float32)
    return values


def sparse_tensors(run: RunConfig, seed: int) -> list[SparseTensor]:
    k, code_bits = run.compression.k, run.compression.code_bits
    return [
        compress(gradient(tensor.size, 1000 * seed + number), k, code_bits)[0]
        for number, tensor in enumerate(run.layout.tensors)
    ]


def packet_sections(run: RunConfig, tensors: Sequence[SparseTensor]) -> tuple[bytes, ...]:
    return tuple(encode_section(tensor, run.compression.k, run.compression.code_bits) for tensor in tensors)


def update_sections(tensors: Sequence[UpdateTensor]) -> tuple[bytes, ...]:
    return tuple(encode_update_section(tensor) for tensor in tensors)


def same(left: object, right: object) -> bool:
    """Whether two dataclasses of arrays and numbers hold the same bits."""
    pairs = [(value, vars(right)[name]) for name, value in vars(left).items()]
    return all(np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype for a, b in pairs)


@contextmanager
def refused(code: Code) -> Iterator[None]:
    with pytest.raises(ProtocolError) as caught:
        yield
    assert caught.value.code is code, caught.value


def float_bits(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


def plain_compress_chunk(
    values: Sequence[float], k: int, code_bits: int
) -> tuple[int, int, list[int], list[int], list[int]]:
    """SPEC 4 for one chunk, value by value: scale, ratio, positions, codes, grid values. Steps as numbered there."""
    words = [float_bits(value) for value in values]
    n = kept(len(words), k)
    by_magnitude = sorted(range(len(words)), key=lambda index: (-(words[index] & 0x7FFFFFFF), index))  # 2
    positions = sorted(by_magnitude[:n])
    exponents = [words[index] >> 23 & 0xFF for index in positions]  # 3
    top = max(1, *exponents)
    mantissas = [words[index] % 2**23 + (2**23 if e else 0) for index, e in zip(positions, exponents, strict=True)]
    f = [m * 64 // 2 ** (top - max(1, e)) for m, e in zip(mantissas, exponents, strict=True)]

    def means(highs: list[bool]) -> tuple[list[bool], int, int]:
        if not any(highs):
            highs = [True] * n
        high_ones = [value for value, high in zip(f, highs, strict=True) if high]
        low_ones = [value for value, high in zip(f, highs, strict=True) if not high]
        hi = sum(high_ones) // len(high_ones)
        return highs, hi, sum(low_ones) // len(low_ones) if low_ones else hi

    if code_bits == 1:  # 4
        highs, hi, lo = means([True] * n)
    else:
        highs, hi, lo = means([value * n > sum(f) for value in f])
        highs, hi, lo = means([2 * value > hi + lo for value in f])
    sh = max(0, hi.bit_length() - 4)  # 5
    r = (hi + (1 << sh >> 1)) >> sh
    if r == 16:
        r, sh = 8, sh + 1
    h, e = r << sh, top + sh - 123
    if e < 0 or (e, r) == (0, 8):  # 7
        return 0, 0, [], [], []
    ratio = 0 if all(highs) else min(63, max(0, 64 - (128 * lo + h) // (2 * h)))  # 6
    if ratio == 0:
        highs = [True] * n
    else:
        again = [2 * value > h + (h * (64 - ratio) >> 6) for value in f]
        highs = again if any(again) and not all(again) else highs
    scale = 255 if e > 31 else e * 8 + r - 8
    codes = [words[index] >> 31 | (0 if high else 2) for index, high in zip(positions, highs, strict=True)]
    return scale, ratio, positions, codes, [plain_grid(scale, ratio, code) for code in codes]


def plain_grid(scale: int, ratio: int, code: int) -> int:
    """One dequantized value in units of 2^-38."""
    high = (8 + scale % 8) << (scale // 8 + 5)
    magnitude = high * (64 - ratio) // 64 if code & 2 else high
    return -magnitude if code & 1 else magnitude


def plain_gaps(positions: Sequence[int]) -> bytes:
    """The gap bytes of one chunk."""
    data, previous = bytearray(), -1
    for position in positions:
        gap = position - previous - 1
        data += b"\xff" * (gap // 255) + bytes([gap % 255])
        previous = position
    return bytes(data)


def plain_blocks_and_gaps(chunks: Sequence[Sequence[int]]) -> bytes:
    """From the positions inside each chunk: gap bytes of each 1024 chunks but the last, then all gap bytes."""
    gaps = [plain_gaps(positions) for positions in chunks]
    blocks = [sum(map(len, gaps[start : start + 1024])) for start in range(0, len(gaps), 1024)][:-1]
    return struct.pack(f"<{len(blocks)}I", *blocks) + b"".join(gaps)


def plain_section(
    scales: Sequence[int], ratios: Sequence[int], chunks: Sequence[Sequence[int]], codes: Sequence[int], code_bits: int
) -> bytes:
    """SPEC 5 from the positions inside each chunk."""
    packed = sum(code << (number * code_bits) for number, code in enumerate(codes))
    tables = bytes(scales) + (bytes(ratios) if code_bits == 2 else b"")
    return tables + plain_blocks_and_gaps(chunks) + packed.to_bytes(-(-len(codes) * code_bits // 8), "little")


def plain_update_section(
    counts: Sequence[int], exponents: Sequence[int], chunks: Sequence[Sequence[int]], values: Sequence[int]
) -> bytes:
    """SPEC 7 from the positions inside each chunk."""
    tables = struct.pack(f"<{len(counts)}H", *counts) + bytes(exponents)
    return tables + plain_blocks_and_gaps(chunks) + struct.pack(f"{len(values)}b", *values)


def plain_positions(data: bytes, counts: Sequence[int], size: int, blocks: Sequence[int]) -> Code | list[int]:
    """Decode gap bytes one by one; `blocks` has the bytes of each block, the last included."""
    gaps: list[int] = []
    place = 0
    for number, length in enumerate(blocks):
        block = data[place : place + length] if length >= 0 else b""
        if len(block) != length or block.endswith(b"\xff"):
            return Code.BAD_BLOCKS
        place += length
        decoded, gap = [], 0
        for byte in block:
            gap += byte
            if byte != 255:
                decoded.append(gap)
                gap = 0
        if len(decoded) != sum(counts[1024 * number : 1024 * (number + 1)]):
            return Code.BAD_BLOCKS
        gaps += decoded
    positions = []
    left = iter(gaps)
    for chunk, count in enumerate(counts):
        index = 4096 * chunk - 1
        for _ in range(count):
            index += next(left) + 1
            if index >= min(4096 * (chunk + 1), size):
                return Code.BAD_INDEX
            positions.append(index)
    return positions


def plain_check_section(data: bytes, size: int, k: int, code_bits: int) -> Code | tuple[list[int], ...]:
    """SPEC 5, rule by rule: the first broken rule's code, or scales, ratios, positions and codes."""
    n, tables = -(-size // 4096), 1 if code_bits == 1 else 2
    keeps = [kept(min(4096, size - 4096 * chunk), k) for chunk in range(n)]
    stated = -(-n // 1024) - 1
    gaps_start = n * tables + 4 * stated
    if len(data) < gaps_start:
        return Code.TRUNCATED
    scales, ratios = list(data[:n]), list(data[n : 2 * n]) if code_bits == 2 else [0] * n
    counts = [keep if scale else 0 for keep, scale in zip(keeps, scales, strict=True)]
    gaps_stop = len(data) - -(-sum(counts) * code_bits // 8)
    if gaps_stop < gaps_start:
        return Code.TRUNCATED
    if any(ratio > 63 or (ratio and not scale) for ratio, scale in zip(ratios, scales, strict=True)):
        return Code.BAD_RATIO
    blocks = struct.unpack_from(f"<{stated}I", data, n * tables)
    gaps = data[gaps_start:gaps_stop]
    positions = plain_positions(gaps, counts, size, [*blocks, len(gaps) - sum(blocks)])
    if isinstance(positions, Code):
        return positions
    packed = int.from_bytes(data[gaps_stop:], "little")
    if packed >> (len(positions) * code_bits):
        return Code.BAD_PADDING
    codes = [packed >> (number * code_bits) & (2**code_bits - 1) for number in range(len(positions))]
    lows: list[list[int]] = [[] for _ in range(n)]
    for code, position in zip(codes, positions, strict=True):
        lows[position // 4096].append(code & 2)
    if any(any(low) and not ratio for low, ratio in zip(lows, ratios, strict=True)):
        return Code.BAD_CODE
    if any(ratio and (all(low) or not any(low)) for low, ratio in zip(lows, ratios, strict=True)):
        return Code.BAD_RATIO
    return scales, ratios, positions, codes


def plain_check_update_section(data: bytes, size: int) -> Code | tuple[list[int], ...]:
    """SPEC 7, rule by rule: the first broken rule's code, or counts, exponents, positions and values."""
    n = -(-size // 4096)
    stated = -(-n // 1024) - 1
    gaps_start = 3 * n + 4 * stated
    if len(data) < gaps_start:
        return Code.TRUNCATED
    counts, exponents = list(struct.unpack_from(f"<{n}H", data)), list(data[2 * n : 3 * n])
    if any(count > min(4096, size - 4096 * chunk) for chunk, count in enumerate(counts)):
        return Code.BAD_COUNT
    gaps_stop = len(data) - sum(counts)
    if gaps_stop < gaps_start:
        return Code.TRUNCATED
    if any(e > 35 or (e and not count) for e, count in zip(exponents, counts, strict=True)):
        return Code.BAD_EXPONENT
    blocks = struct.unpack_from(f"<{stated}I", data, 3 * n)
    gaps = data[gaps_start:gaps_stop]
    positions = plain_positions(gaps, counts, size, [*blocks, len(gaps) - sum(blocks)])
    if isinstance(positions, Code):
        return positions
    values = list(struct.unpack(f"{len(positions)}b", data[gaps_stop:]))
    if 0 in values or -128 in values:
        return Code.BAD_VALUE
    largest = [0] * n
    for position, value in zip(positions, values, strict=True):
        largest[position // 4096] = max(largest[position // 4096], abs(value))
    if any(e and m <= 63 for e, m in zip(exponents, largest, strict=True)):
        return Code.BAD_EXPONENT
    return counts, exponents, positions, values
