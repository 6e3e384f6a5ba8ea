"""SparseLoCo's sender side in torch on any device, bit-equal to `protocol.compress` (SPEC 4; arXiv 2508.15706).

`protocol.compress` is the reference in numpy and explains the steps. Here they run where the model is, and the
residual is made in place of acc.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.layout import Layout, kept
from protocol.limits import CHUNK, GRID_BITS, RATIO_STEPS, SCALE_FIELD_MAX, SCALE_FIELD_MIN
from protocol.packing import SparseTensor

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

    scales: Tensor  # i64[c] bfloat16 bits
    ratios: Tensor  # i64[c]
    columns: Tensor  # i64[c, kept] ascending
    codes: Tensor  # i64[c, kept]


def error_feedback(residual: Tensor, outer: Tensor, local: Tensor, beta: float) -> Tensor:  # f32[N] each -> f32[N]
    """Return acc = beta * residual + (outer - local). Two roundings: a fused multiply-add would give other bits."""
    return residual.mul(beta).add_(outer - local)


def compress(acc: Tensor, layout: Layout, k: int, code_bits: int) -> tuple[list[SparseTensor], Sent]:  # acc: f32[N]
    """Take the largest values of each chunk out of acc, which becomes the residual in place.

    Returns one sparse tensor per tensor of the layout, and what was taken. Raises ValueError on NaN or infinity and
    leaves acc as it was.
    """
    assert acc.dtype == torch.float32 and acc.shape == (layout.size,)
    if not bool(torch.isfinite(acc).all()):
        raise ValueError("the pseudo-gradient holds NaN or infinity: training diverged; lower the learning rate")
    sparse, positions, originals = [], [], []
    for tensor, offset in zip(layout.tensors, layout.offsets, strict=False):
        part, where, what = _compress_tensor(acc[offset : offset + tensor.size], k, code_bits)
        sparse.append(part)
        positions.append(where + offset)
        originals.append(what)
    return sparse, Sent(torch.cat(positions), torch.cat(originals))


def _compress_tensor(acc: Tensor, k: int, code_bits: int) -> tuple[SparseTensor, Tensor, Tensor]:  # f32[L], in place
    """Compress one tensor; also return the positions (i64[m]) and the values (f32[m]) that were taken."""
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
        torch.cat(scales).cpu().numpy().astype("uint16"),
        torch.cat(ratios).cpu().numpy().astype("uint8"),
        where.cpu().numpy(),
        torch.cat(codes).cpu().numpy().astype("uint8"),
    )
    return sparse, where.to(acc.device), torch.cat(originals)


def _batches(acc: Tensor, k: int) -> Iterator[tuple[int, Tensor, int]]:  # f32[L] -> start, f32[c, width], kept
    """Cut a tensor into batches of full chunks and at most one short chunk."""
    full = acc.numel() // CHUNK * CHUNK
    for start in range(0, full, _BATCH_CHUNKS * CHUNK):
        yield start, acc[start : min(start + _BATCH_CHUNKS * CHUNK, full)].view(-1, CHUNK), kept(CHUNK, k)
    if full < acc.numel():
        yield full, acc[full:].view(1, -1), kept(acc.numel() - full, k)


def _quantize(rows: Tensor, count: int, code_bits: int) -> _Quantized:  # f32[c, width]
    """Keep `count` values of each chunk and quantize them."""
    bits = rows.view(torch.int32)
    width = rows.shape[1]
    # No two keys are equal, so every device picks the same ones: a larger magnitude first, then a lower index.
    ranks = torch.arange(CHUNK - 1, CHUNK - 1 - width, -1, device=rows.device)
    keys = ((bits & 0x7FFFFFFF).long() << 12) | ranks
    columns = (CHUNK - 1 - (keys.topk(count, dim=1, sorted=False).values & (CHUNK - 1))).sort(dim=1).values
    sent = bits.gather(1, columns).long()
    field = (sent >> 23) & 0xFF
    exponent = field.clamp(min=1)
    mantissa = (sent & 0x7FFFFF) | ((field > 0).long() << 23)
    top = exponent.amax(dim=1)
    fixed = (mantissa << 6) >> (top[:, None] - exponent).clamp(max=30)  # unit 2^(top - 156)

    total = fixed.sum(dim=1)
    high = fixed * count > total[:, None]
    high |= ~high.any(dim=1, keepdim=True) | (code_bits == 1)
    high_count = high.sum(dim=1)
    high_sum = (fixed * high).sum(dim=1)
    high_mean = high_sum // high_count
    low_mean = (total - high_sum) // (count - high_count).clamp(min=1)

    # frexp of an exact float64 gives the bit length.
    drop = (torch.frexp(high_mean.double()).exponent.long() - 8).clamp(min=0)
    digits = (high_mean + ((1 << drop) >> 1)) >> drop
    carry = digits == 256
    digits, drop = torch.where(carry, 128, digits), drop + carry.long()
    scale_field = top + drop - 22
    scale = (digits << drop).clamp(min=1)
    ratios = (RATIO_STEPS - (128 * low_mean + scale) // (2 * scale)).clamp(0, RATIO_STEPS - 1)
    ratios = torch.where(high_count == count, 0, ratios)

    scales = (scale_field << 7) | (digits & 127)
    scales = torch.where(scale_field > SCALE_FIELD_MAX, (SCALE_FIELD_MAX << 7) | 127, scales)
    present = scale_field >= SCALE_FIELD_MIN
    codes = ((sent >> 31) & 1) | ((~high & (ratios > 0)[:, None]).long() << 1)
    return _Quantized(torch.where(present, scales, 0), torch.where(present, ratios, 0), columns, codes)


def _dequantize(q: _Quantized) -> Tensor:  # -> f32[c, kept]
    """The sent values as float32, exact; those of absent chunks mean nothing."""
    high = ((q.scales & 127) | 128) << ((q.scales >> 7) - (SCALE_FIELD_MIN - 1)).clamp(min=0)
    low = (high * (RATIO_STEPS - q.ratios)) >> 6
    magnitudes = torch.where((q.codes & 2) != 0, low[:, None], high[:, None])
    return torch.where((q.codes & 1) != 0, -magnitudes, magnitudes).float() * 2.0**-GRID_BITS
