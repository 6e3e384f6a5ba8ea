"""Error feedback, top-k and two-bit quantization: the reference that every faster path equals bit for bit (SPEC 4).

Algorithm: SparseLoCo (arXiv 2508.15706). The quantizer is ours: two magnitudes per chunk, found by splitting the kept
ones at their mean, once more half-way between the two means, and rounding each to the nearer of what can be sent.
"""

import numpy as np
from numpy.typing import NDArray

from protocol.layout import kept
from protocol.limits import CHUNK, GRID_BITS, RATIO_STEPS, SCALE_MAX
from protocol.packing import SparseTensor

_BATCH_CHUNKS = 256  # chunks worked on at once: a Python step per million values, and some tens of MB of scratch
_SCALE_DIGITS = 4  # significant bits of a scale: 8 to 15

Quantized = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8]]


def error_feedback(
    residual: NDArray[np.float32], outer: NDArray[np.float32], local: NDArray[np.float32], beta: float
) -> NDArray[np.float32]:  # all f32[N]
    """Return acc = beta * residual + (outer - local), each operation rounded once to float32 and none fused."""
    return np.float32(beta) * residual + (outer - local)


def compress(
    acc: NDArray[np.float32], k: int, code_bits: int
) -> tuple[SparseTensor, NDArray[np.float32]]:  # acc: f32[N]
    """Keep and quantize the largest values of each chunk of one tensor; return them and the residual (f32[N]).

    The residual is what was not sent: acc minus the dequantized values. Raises ValueError on NaN or infinity, because
    a peer that diverged has nothing to contribute.
    """
    assert acc.dtype == np.float32 and acc.ndim == 1 and acc.size > 0
    assert 1 <= k <= CHUNK and code_bits in (1, 2)
    if not np.isfinite(acc).all():
        raise ValueError("the pseudo-gradient holds NaN or infinity: training diverged; lower the learning rate")
    full = acc.size // CHUNK * CHUNK
    parts: list[Quantized] = []
    for start in range(0, full, _BATCH_CHUNKS * CHUNK):
        rows = acc[start : min(start + _BATCH_CHUNKS * CHUNK, full)].reshape(-1, CHUNK)
        parts.append(_quantize(rows, start, k, code_bits))
    if full < acc.size:
        rows = acc[full:].reshape(1, -1)
        parts.append(_quantize(rows, full, kept(acc.size - full, k), code_bits))
    scales, ratios, indices, codes = zip(*parts, strict=True)
    sparse = SparseTensor(
        acc.size, np.concatenate(scales), np.concatenate(ratios), np.concatenate(indices), np.concatenate(codes)
    )
    residual = acc.copy()
    residual[sparse.indices] -= to_float32(dequantize(sparse))
    return sparse, residual


def _select(magnitudes: NDArray[np.uint32], count: int) -> NDArray[np.int64]:  # u32[c, L] -> i64[c, count]
    """Columns of the `count` largest of each row, ascending; of equal magnitudes the lowest column comes first."""
    length = magnitudes.shape[1]
    keys = magnitudes.astype(np.int64) * CHUNK + np.arange(CHUNK - 1, CHUNK - 1 - length, -1)
    least = np.partition(keys, length - count, axis=1)[:, length - count]
    return np.nonzero(keys >= least[:, None])[1].reshape(-1, count)


def bit_length(values: NDArray[np.int64]) -> NDArray[np.int64]:  # i64[n], below 2^53
    """Bits of each value; 0 for 0."""
    exponents: NDArray[np.int64] = np.frexp(values.astype(np.float64))[1].astype(np.int64)
    return exponents


def _quantize(rows: NDArray[np.float32], start: int, count: int, code_bits: int) -> Quantized:  # rows: f32[c, L]
    """Keep `count` values of each of these chunks of equal length, which start at flat position `start`."""
    bits = rows.view(np.uint32)
    columns = _select(bits & np.uint32(0x7FFFFFFF), count)
    sent = np.take_along_axis(bits, columns, axis=1).astype(np.int64)
    field = (sent >> 23) & 0xFF
    exponent = np.maximum(field, 1)
    mantissa = (sent & 0x7FFFFF) + (field > 0) * (1 << 23)
    top = exponent.max(axis=1)
    fixed = (mantissa << 6) >> np.minimum(top[:, None] - exponent, 30)  # unit 2^(top - 156)

    above = (fixed * count > fixed.sum(axis=1, keepdims=True)) | (code_bits == 1)
    is_high, high, low = _means(fixed, above)
    if code_bits == 2:
        is_high, high, low = _means(fixed, 2 * fixed > (high + low)[:, None])
    drop = np.maximum(bit_length(high) - _SCALE_DIGITS, 0)
    digits = (high + ((1 << drop) >> 1)) >> drop
    carry = digits == 1 << _SCALE_DIGITS
    digits, drop = np.where(carry, 8, digits), drop + carry
    scale = np.maximum(digits << drop, 1)  # 0 only in a chunk of zeros, which is absent
    ratio = np.clip(RATIO_STEPS - (128 * low + scale) // (2 * scale), 0, RATIO_STEPS - 1)
    ratio[is_high.all(axis=1)] = 0

    # The scale and the ratio are rounded: each value takes the nearer one, as long as both are still taken.
    nearest = 2 * fixed > (scale + ((scale * (RATIO_STEPS - ratio)) >> 6))[:, None]
    both = nearest.any(axis=1) & ~nearest.all(axis=1)
    is_high = np.where(both[:, None], nearest, is_high) | (ratio == 0)[:, None]

    scale_byte = ((top + drop - 123) << 3) + (digits - 8)
    present = scale_byte > 0
    codes = (sent >> 31) + 2 * ~is_high
    flat = columns + (start + np.arange(len(rows)) * rows.shape[1])[:, None]
    return (
        np.clip(scale_byte, 0, SCALE_MAX).astype(np.uint8),
        np.where(present, ratio, 0).astype(np.uint8),
        flat[present].reshape(-1),
        codes[present].reshape(-1).astype(np.uint8),
    )


def _means(
    fixed: NDArray[np.int64], is_high: NDArray[np.bool_]
) -> tuple[
    NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]
]:  # [c, count] each -> bool[c, count], i64[c], i64[c]
    """The high magnitudes, all of a chunk where none is, and the means of the high and the low ones of each chunk.

    Where no magnitude is low, both means are that of the high ones.
    """
    is_high = is_high | ~is_high.any(axis=1, keepdims=True)
    high_count = is_high.sum(axis=1)
    high_sum = (fixed * is_high).sum(axis=1)
    high = high_sum // high_count
    low_count = fixed.shape[1] - high_count
    low = np.where(low_count > 0, (fixed.sum(axis=1) - high_sum) // np.maximum(low_count, 1), high)
    return is_high, high, low


def dequantize(sparse: SparseTensor) -> NDArray[np.int64]:  # -> i64[m]
    """The sent values as integers in units of 2^-38, each below 2^40 in magnitude and never 0."""
    scales = sparse.scales.astype(np.int64)
    high = (8 + (scales & 7)) << ((scales >> 3) + 5)
    low = (high * (RATIO_STEPS - sparse.ratios.astype(np.int64))) >> 6
    chunks = sparse.indices // CHUNK
    magnitudes = np.where(sparse.codes & 2, low[chunks], high[chunks])
    grid: NDArray[np.int64] = np.where(sparse.codes & 1, -magnitudes, magnitudes)
    return grid


def to_float32(grid: NDArray[np.int64]) -> NDArray[np.float32]:  # i64[m] -> f32[m]
    """Grid integers as float32; exact for dequantized values, which have at most 10 significant bits."""
    return grid.astype(np.float32) * np.float32(2.0**-GRID_BITS)
