"""SparseLoCo's sender side in torch on any device, bit-equal to `protocol.compress` (SPEC 4; arXiv 2508.15706).

`protocol.compress` is the reference in numpy and explains the steps. Here they run where the model is, and the
residual is made in place of acc. `peer.core.codec` comes here where neither C++ nor Triton serves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.layout import kept
from protocol.limits import CHUNK, GRID_BITS, RATIO_STEPS, SCALE_MAX
from protocol.packing import SparseTensor

DIVERGED = "the pseudo-gradient holds NaN or infinity: training diverged; lower the learning rate"

_BATCH_CHUNKS = 4096  # chunks worked on at once: 16M values, whose 64-bit keys take 128 MB


@dataclass(frozen=True)
class Sent:
    """The values that left acc: where they stood in the flat model and what they were, so that they can return."""

    positions: Tensor  # i64[m]
    originals: Tensor  # f32[m]

    def put_back(self, residual: Tensor) -> None:  # f32[N], in place
        """Turn the residual that compress left into acc again, bit for bit."""
        residual[self.positions] = self.originals


@dataclass(frozen=True)
class _Quantized:
    """Chunks of one length, all on the device. Absent chunks have scale 0 and their values are still listed."""

    scales: Tensor  # i64[c]
    ratios: Tensor  # i64[c]
    columns: Tensor  # i64[c, kept] ascending
    codes: Tensor  # i64[c, kept]


def error_feedback(residual: Tensor, outer: Tensor, local: Tensor, beta: float) -> None:  # f32[N] each
    """Turn the residual into acc = beta * residual + (outer - local), in place.

    Two roundings: a fused multiply-add would give other bits.
    """
    residual.mul_(beta).add_(outer - local)


def compress_tensor(acc: Tensor, k: int, code_bits: int) -> tuple[SparseTensor, Sent]:  # acc: f32[L], in place
    """Take the largest values of each chunk of one tensor out of acc, which becomes the residual.

    Returns what is sent, and what was taken, with positions in this tensor. Raises ValueError on NaN or infinity and
    leaves acc as it was.
    """
    if not bool(torch.isfinite(acc).all()):
        raise ValueError(DIVERGED)
    scales, ratios, indices, codes, originals = [], [], [], [], []
    for start, rows, count in _batches(acc, k):
        # MPS can neither sort 64-bit keys nor hold float64.
        q = _quantize(rows.cpu() if rows.device.type == "mps" else rows, count, code_bits)
        present = q.scales != 0
        starts = torch.arange(len(rows), device=q.columns.device) * rows.shape[1] + start
        where = (q.columns + starts[:, None])[present].flatten()
        scales.append(q.scales)
        ratios.append(q.ratios)
        indices.append(where)
        codes.append(q.codes[present].flatten())
        where, dequantized = where.to(acc.device), _dequantize(q)[present].flatten().to(acc.device)
        originals.append(acc[where])
        acc[where] = originals[-1] - dequantized
    where = torch.cat(indices)
    sparse = SparseTensor(
        acc.numel(),
        torch.cat(scales).cpu().numpy().astype("uint8"),
        torch.cat(ratios).cpu().numpy().astype("uint8"),
        where.cpu().numpy(),
        torch.cat(codes).cpu().numpy().astype("uint8"),
    )
    return sparse, Sent(where.to(acc.device), torch.cat(originals))


def _batches(acc: Tensor, k: int) -> Iterator[tuple[int, Tensor, int]]:  # f32[L] -> start, f32[c, width], kept
    """Cut a tensor into batches of full chunks and at most one short chunk."""
    full = acc.numel() // CHUNK * CHUNK
    for start in range(0, full, _BATCH_CHUNKS * CHUNK):
        yield start, acc[start : min(start + _BATCH_CHUNKS * CHUNK, full)].view(-1, CHUNK), kept(CHUNK, k)
    if full < acc.numel():
        yield full, acc[full:].view(1, -1), kept(acc.numel() - full, k)


def _quantize(rows: Tensor, count: int, code_bits: int) -> _Quantized:  # f32[c, width]
    """Keep `count` values of each chunk and quantize them; the numbers are the steps of SPEC 4."""
    bits = rows.view(torch.int32)
    width = rows.shape[1]
    # 2. No two keys are equal, so every device picks the same ones: a larger magnitude first, then a lower index.
    ranks = torch.arange(CHUNK - 1, CHUNK - 1 - width, -1, device=rows.device)
    keys = ((bits & 0x7FFFFFFF).long() << 12) | ranks
    columns = (CHUNK - 1 - (keys.topk(count, dim=1, sorted=False).values & (CHUNK - 1))).sort(dim=1).values
    sent = bits.gather(1, columns).long()
    # 3. Magnitudes as integers.
    field = (sent >> 23) & 0xFF
    exponent = field.clamp(min=1)
    mantissa = (sent & 0x7FFFFF) | ((field > 0).long() << 23)
    top = exponent.amax(dim=1)
    fixed = (mantissa << 6) >> (top[:, None] - exponent).clamp(max=30)  # unit 2^(top - 156)
    # 4. Two means.
    if code_bits == 1:
        is_high = torch.ones_like(fixed, dtype=torch.bool)
        high, low = _means(fixed, is_high)
    else:
        is_high = _some(fixed * count > fixed.sum(dim=1)[:, None])
        high, low = _means(fixed, is_high)
        is_high = _some(2 * fixed > (high + low)[:, None])
        high, low = _means(fixed, is_high)
    # 5. The high mean becomes the scale; frexp of an exact float64 gives the bit length.
    drop = (torch.frexp(high.double()).exponent.long() - 4).clamp(min=0)
    digits = (high + ((1 << drop) >> 1)) >> drop
    carry = digits == 16
    digits, drop = torch.where(carry, 8, digits), drop + carry.long()
    scale = (digits << drop).clamp(min=1)
    # 6. The ratio of the low mean to the scale, and the codes by what the receiver will read.
    ratios = (RATIO_STEPS - (128 * low + scale) // (2 * scale)).clamp(0, RATIO_STEPS - 1)
    ratios = torch.where(is_high.all(dim=1), 0, ratios)
    again = 2 * fixed > (scale + ((scale * (RATIO_STEPS - ratios)) >> 6))[:, None]
    mixed = again.any(dim=1) & ~again.all(dim=1)
    is_high = torch.where(mixed[:, None], again, is_high) | (ratios == 0)[:, None]
    # 7. One byte a chunk; below its range the chunk is absent, above it the scale is the largest.
    scales = (((top + drop - 123) << 3) + (digits - 8)).clamp(0, SCALE_MAX)
    codes = ((sent >> 31) & 1) | ((~is_high).long() << 1)
    return _Quantized(scales, torch.where(scales != 0, ratios, 0), columns, codes)


def _some(is_high: Tensor) -> Tensor:  # bool[c, kept]
    """Where no value of a chunk is high, all are."""
    return is_high | ~is_high.any(dim=1, keepdim=True)


def _means(fixed: Tensor, is_high: Tensor) -> tuple[Tensor, Tensor]:  # i64[c, kept], bool[c, kept] -> i64[c], i64[c]
    """The mean of the high values of each chunk and that of the low ones, or the high one again without any."""
    high_count = is_high.sum(dim=1)
    high_sum = (fixed * is_high).sum(dim=1)
    low_count = fixed.shape[1] - high_count
    high = high_sum // high_count
    return high, torch.where(low_count == 0, high, (fixed.sum(dim=1) - high_sum) // low_count.clamp(min=1))


def _dequantize(q: _Quantized) -> Tensor:  # -> f32[c, kept]
    """The sent values as float32, exact; those of absent chunks mean nothing."""
    high = (8 + (q.scales & 7)) << ((q.scales >> 3) + 5)
    low = (high * (RATIO_STEPS - q.ratios)) >> 6
    magnitudes = torch.where((q.codes & 2) != 0, low[:, None], high[:, None])
    return torch.where((q.codes & 1) != 0, -magnitudes, magnitudes).float() * 2.0**-GRID_BITS
