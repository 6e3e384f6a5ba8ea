"""Compression and the outer step in Triton: one program a chunk, whose values stay in registers (SPEC 4 and 7).

`peer.core.kernels.gpu` launches them, and alone imports this module, for Triton is not everywhere. All is integer
arithmetic, but for error feedback and one subtraction a value, which must not be fused: launch with NO_FUSION.
"""

from collections.abc import Callable
from typing import Any

import triton
from triton import language as tl

from protocol.limits import CHUNK, GRID_BITS

# Else mul and add become one FMA, which rounds once where SPEC 4 rounds twice.
NO_FUSION = {"enable_fp_fusion": False}

_CHUNK = tl.constexpr(CHUNK)
_GRID = tl.constexpr(2.0**-GRID_BITS)
_GRID_FIELD = tl.constexpr(127 - GRID_BITS)  # the exponent field of that float32
_CONTINUE = tl.constexpr(255)  # the gap byte that adds 255 and goes on


def _jit(function: Callable[..., Any]) -> Any:
    """Compile for the device at the first launch. Counts change from tensor to tensor and are never built in."""
    return triton.jit(function, do_not_specialize=["k", "last_count", "beta"])


@_jit
def select_chunks(  # noqa: PLR0913, PLR0917  a kernel takes its buffers one by one
    residual: tl.tensor,  # f32[size], becomes acc in place
    outer: tl.tensor,  # f32[size]
    local: tl.tensor,  # f32[size]
    columns: tl.tensor,  # i16[n, k], out: which values of the chunk are kept, ascending
    originals: tl.tensor,  # f32[n, k], out: acc there
    diverged: tl.tensor,  # i32[1], set to 1 when a value is NaN or infinite
    size: tl.tensor,
    beta: tl.tensor,
    k: tl.tensor,  # values that a full chunk keeps
    last_count: tl.tensor,  # values that the last chunk keeps
) -> None:
    """Error feedback and the largest values of one chunk: steps 1 and 2 of SPEC 4."""
    chunk = tl.program_id(0)
    start = chunk.to(tl.int64) * _CHUNK
    lanes = tl.arange(0, _CHUNK)
    inside = lanes < tl.minimum(size - start, _CHUNK).to(tl.int32)
    old = tl.load(residual + start + lanes, mask=inside, other=0.0)
    learned = tl.load(outer + start + lanes, mask=inside, other=0.0)
    learned -= tl.load(local + start + lanes, mask=inside, other=0.0)
    acc = beta * old + learned
    tl.store(residual + start + lanes, acc, mask=inside)

    magnitudes = tl.where(inside, acc.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    tl.store(diverged, 1, mask=tl.max(magnitudes, 0) >= 0x7F800000)
    is_kept, slots = _select(magnitudes, tl.where(chunk == tl.num_programs(0) - 1, last_count, k))
    first = chunk.to(tl.int64) * k
    tl.store(columns + first + slots, lanes.to(tl.int16), mask=is_kept)
    tl.store(originals + first + slots, acc, mask=is_kept)


@_jit
def _select(
    magnitudes: tl.tensor, count: tl.tensor
) -> tl.tensor:  # i32[4096], -1 outside the chunk -> bool[4096], i32[4096]
    """Find the `count` largest, of equal ones those with the lowest index; also the slot of each, in their order."""
    # The count-th largest magnitude is the greatest number that is at most so many of them, found bit by bit.
    least = tl.full([], 0, tl.int32)
    for step in range(31):
        candidate = least | (1 << (30 - step))
        least = tl.where(_count(magnitudes >= candidate) >= count, candidate, least)
    is_above, is_tied = magnitudes > least, magnitudes == least
    room = count - _count(is_above)
    # Two counts in one scan: neither is above 4096.
    ranks = tl.cumsum((is_above.to(tl.int32) << 16) | is_tied.to(tl.int32), 0)
    above, tied = ranks >> 16, ranks & 0xFFFF
    return is_above | (is_tied & (tied <= room)), above + tl.minimum(tied, room) - 1


@_jit
def quantize_chunks(  # noqa: PLR0913, PLR0917  a kernel takes its buffers one by one
    residual: tl.tensor,  # f32[size], holds acc; the sent values are taken out of it
    columns: tl.tensor,  # i16[n, k]
    originals: tl.tensor,  # f32[n, k]
    scales: tl.tensor,  # u8[n], out
    ratios: tl.tensor,  # u8[n], out
    codes: tl.tensor,  # u8[n, k], out; those of absent chunks mean nothing
    k: tl.tensor,  # values that a full chunk keeps
    last_count: tl.tensor,  # values that the last chunk keeps
    one_bit: tl.constexpr,
    width: tl.constexpr,  # a power of two, at least k
) -> None:
    """Quantize the kept values of one chunk and write what they leave: steps 3 to 8 of SPEC 4."""
    chunk = tl.program_id(0)
    count = tl.where(chunk == tl.num_programs(0) - 1, last_count, k)
    lanes = tl.arange(0, width)
    is_kept = lanes < count
    first = chunk.to(tl.int64) * k
    acc = tl.load(originals + first + lanes, mask=is_kept, other=0.0)
    bits = acc.to(tl.int32, bitcast=True)
    scale, ratio, is_low = _quantize(bits & 0x7FFFFFFF, is_kept, count, one_bit)
    is_negative = bits < 0
    tl.store(scales + chunk, scale.to(tl.uint8))
    tl.store(ratios + chunk, ratio.to(tl.uint8))
    code = is_negative.to(tl.int32) | (is_low.to(tl.int32) << 1)
    tl.store(codes + first + lanes, code.to(tl.uint8), mask=is_kept)

    high = (8 + (scale & 7)).to(tl.int64) << ((scale >> 3) + 5)
    low = (high * (64 - ratio)) >> 6
    values = tl.where(is_low, low.to(tl.float32), high.to(tl.float32)) * _GRID
    rest = acc - tl.where(is_negative, -values, values)
    places = chunk.to(tl.int64) * _CHUNK + tl.load(columns + first + lanes, mask=is_kept, other=0)
    tl.store(residual + places, rest, mask=lanes < tl.where(scale > 0, count, 0))


@_jit
def _quantize(magnitudes: tl.tensor, is_kept: tl.tensor, count: tl.tensor, one_bit: tl.constexpr) -> tl.tensor:
    """Steps 3 to 7: the scale (0 where the chunk is absent), the ratio, and which values (bool[width]) are low."""
    fields = magnitudes >> 23
    top = tl.maximum(tl.max(fields, 0), 1)
    mantissas = (magnitudes & 0x7FFFFF) | tl.where(fields > 0, 1 << 23, 0)
    fixed = (mantissas << 6) >> tl.minimum(top - tl.maximum(fields, 1), 30)
    total = tl.sum(fixed.to(tl.int64), 0)
    # Of whole numbers f * n > S and f > floor(S / n) say the same. Values above `split` are high: -1 makes all so.
    split = -1 if one_bit else (total // count).to(tl.int32)
    split, high_count, high, low = _two_means(fixed, is_kept, count, total, split)
    if not one_bit:
        split, high_count, high, low = _two_means(fixed, is_kept, count, total, ((high + low) >> 1).to(tl.int32))

    length = _count((high >> tl.arange(0, 32)) > 0)
    shift = tl.maximum(length - 4, 0)
    digits = ((high + ((1 << shift) >> 1)) >> shift).to(tl.int32)
    shift = tl.where(digits == 16, shift + 1, shift)
    digits = tl.where(digits == 16, 8, digits)
    # Below 0 the chunk is absent, above 255 it has the largest scale that there is.
    scale = tl.minimum(tl.maximum(((top + shift - 123) << 3) + digits - 8, 0), 255)

    rounded = tl.maximum(digits.to(tl.int64) << shift, 1)
    ratio = 64 - (128 * low + rounded) // (2 * rounded)
    ratio = tl.minimum(tl.maximum(ratio, 0), 63).to(tl.int32)
    ratio = tl.where((high_count == count) | (scale == 0), 0, ratio)
    middle = ((rounded + ((rounded * (64 - ratio)) >> 6)) >> 1).to(tl.int32)
    nearer = _count(is_kept & (fixed > middle))
    split = tl.where((nearer > 0) & (nearer < count), middle, split)
    return scale, ratio, is_kept & (fixed <= tl.where(ratio > 0, split, -1))


@_jit
def _two_means(fixed: tl.tensor, is_kept: tl.tensor, count: tl.tensor, total: tl.tensor, split: tl.tensor) -> tl.tensor:
    """Split the kept values: -1 for `split` when it has none above, the number of high ones, and both means."""
    split = tl.where(tl.max(fixed, 0) > split, split, -1)
    is_high = is_kept & (fixed > split)
    high_count = _count(is_high)
    high_sum = tl.sum(tl.where(is_high, fixed, 0).to(tl.int64), 0)
    high = high_sum // high_count
    low_count = count - high_count
    low = tl.where(low_count > 0, (total - high_sum) // tl.maximum(low_count, 1), high)
    return split, high_count, high, low


@_jit
def _count(condition: tl.tensor) -> tl.tensor:  # bool[m] -> i32
    """How many are true."""
    return tl.sum(condition.to(tl.int32), 0)


@_jit
def apply_chunks(
    outer: tl.tensor,  # f32[size], in place
    counts: tl.tensor,  # i16[n]
    exponents: tl.tensor,  # u8[n]
    firsts: tl.tensor,  # i32[n]: the number of values before each chunk
    ends: tl.tensor,  # i64[m]: where each value's gap ends in `gaps`
    gaps: tl.tensor,  # u8[g]
    values: tl.tensor,  # i8[m]
    size: tl.tensor,
    width: tl.constexpr,  # a power of two; no count is above it
) -> None:
    """Subtract one chunk of an update from the outer parameters, at the positions present only."""
    chunk = tl.program_id(0)
    lanes = tl.arange(0, width)
    is_present = lanes < tl.load(counts + chunk).to(tl.int32)
    number = tl.load(firsts + chunk) + lanes
    end = tl.load(ends + number, mask=is_present, other=0)
    before = tl.load(ends + number - 1, mask=is_present & (number > 0), other=-1)
    gap = tl.load(gaps + end, mask=is_present, other=0).to(tl.int64) + _CONTINUE * (end - before - 1)
    column = tl.cumsum(tl.where(is_present, gap + 1, 0), 0) - 1
    # 2^(e - 38), put together from its bits.
    unit = ((tl.load(exponents + chunk).to(tl.int32) + _GRID_FIELD) << 23).to(tl.float32, bitcast=True)
    step = tl.load(values + number, mask=is_present, other=0).to(tl.float32) * unit
    places = chunk.to(tl.int64) * _CHUNK + column
    # Checked sections have no index outside; a wrong one must not write into what belongs to others.
    is_inside = is_present & (column < _CHUNK) & (places < size)
    tl.store(outer + places, tl.load(outer + places, mask=is_inside, other=0.0) - step, mask=is_inside)
