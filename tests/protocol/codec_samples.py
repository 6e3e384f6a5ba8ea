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
from protocol.packing import SparseTensor
from protocol.run import CompressionConfig, RunConfig, RunSettings

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


def same(left: object, right: object) -> bool:
    """Whether two dataclasses of arrays and numbers hold the same bits."""
    pairs = [(value, vars(right)[name]) for name, value in vars(left).items()]
    return all(np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype for a, b in pairs)


@contextmanager
def refused(code: Code) -> Iterator[None]:
    with pytest.raises(ProtocolError) as caught:
        yield
    assert caught.value.code is code, caught.value


def plain_compress_chunk(
    values: Sequence[float], k: int, code_bits: int
) -> tuple[int, int, list[int], list[int], list[int]]:
    """SPEC 4 for one chunk, value by value: scale, ratio, indices, codes, grid values."""
    words = [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]
    count = kept(len(words), k)
    order = sorted(range(len(words)), key=lambda index: (-(words[index] & 0x7FFFFFFF), index))
    chosen = sorted(order[:count])
    exponents = [max(1, words[index] >> 23 & 255) for index in chosen]
    hidden = [(1 << 23) if words[index] >> 23 & 255 else 0 for index in chosen]
    mantissas = [(words[index] & 0x7FFFFF) + bit for index, bit in zip(chosen, hidden, strict=True)]
    top = max(exponents)
    fixed = [(m << 6) >> (top - e) for m, e in zip(mantissas, exponents, strict=True)]
    highs = [code_bits == 1 or f * count > sum(fixed) for f in fixed]
    if not any(highs):
        highs = [True] * count
    high_part = [f for f, high in zip(fixed, highs, strict=True) if high]
    low_part = [f for f, high in zip(fixed, highs, strict=True) if not high]
    hi = sum(high_part) // len(high_part)
    sh = max(0, hi.bit_length() - 8)
    r = (hi + ((1 << sh) >> 1)) >> sh
    if r == 256:
        r, sh = 128, sh + 1
    h, field = r << sh, top + sh - 22
    if field < 97:
        return 0, 0, [], [], []
    ratio = 0
    if low_part:
        ratio = min(63, max(0, 64 - (128 * (sum(low_part) // len(low_part)) + h) // (2 * h)))
    if field > 129:
        field, r = 129, 255
    signs = [words[index] >> 31 for index in chosen]
    codes = [sign + (2 if ratio and not high else 0) for sign, high in zip(signs, highs, strict=True)]
    high_value = r << (field - 96)
    sizes = [high_value * (64 - ratio) >> 6 if code & 2 else high_value for code in codes]
    grid = [-size if code & 1 else size for size, code in zip(sizes, codes, strict=True)]
    return field << 7 | r - 128, ratio, chosen, codes, grid


def plain_gaps(positions: Sequence[int]) -> bytes:
    """The gap bytes of one chunk."""
    data, previous = bytearray(), -1
    for position in positions:
        gap = position - previous - 1
        data += b"\xff" * (gap // 255) + bytes([gap % 255])
        previous = position
    return bytes(data)


def plain_section(
    heads: Sequence[int], extras: Sequence[int], chunks: Sequence[Sequence[int]], values: bytes, code_bits: int
) -> bytes:
    """SPEC 5 and 7 from positions inside each chunk and packed values."""
    gaps = [plain_gaps(positions) for positions in chunks]
    blocks = [sum(map(len, gaps[start : start + 1024])) for start in range(0, len(gaps), 1024)]
    tables = struct.pack(f"<{len(heads)}H", *heads) + (bytes(extras) if code_bits != 1 else b"")
    return tables + struct.pack(f"<{len(blocks)}I", *blocks) + b"".join(gaps) + values


def plain_codes(codes: Sequence[int], code_bits: int) -> bytes:
    total = sum(code << (number * code_bits) for number, code in enumerate(codes))
    return total.to_bytes(-(-len(codes) * code_bits // 8), "little")
