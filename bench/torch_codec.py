"""A straightforward codec in torch: top-k, gather, two means per chunk, pack; and scatter_add_ as the merge."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.reference_wire import pack_indices
from protocol.limits import CHUNK

BATCH_VALUES = 1 << 20  # a size whose scratch fits into the caches


def encode(
    residual: Tensor, outer: Tensor, local: Tensor, beta: float, k: int, batch: int
) -> tuple[list[Tensor], int]:  # f32[N] each, N and batch multiples of 4096; residual in place
    """Error feedback, the k largest of each chunk, two-bit codes, `batch` values at once; the parts and their bytes."""
    parts: list[Tensor] = []
    for start in range(0, residual.numel(), batch):
        cut = slice(start, start + batch)
        acc = residual[cut].mul_(beta).add_(outer[cut] - local[cut])
        parts += _encode_rows(acc.view(-1, CHUNK), k)
    return parts, sum(part.numel() * part.element_size() for part in parts)


def _encode_rows(rows: Tensor, k: int) -> list[Tensor]:  # f32[c, 4096], in place
    columns = rows.abs().topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    values = rows.gather(1, columns)
    magnitudes = values.abs()
    is_high = magnitudes > magnitudes.mean(dim=1, keepdim=True)
    high_count = is_high.sum(dim=1, keepdim=True)
    high_sum = (magnitudes * is_high).sum(dim=1, keepdim=True)
    high = high_sum / high_count.clamp(min=1)
    low = (magnitudes.sum(dim=1, keepdim=True) - high_sum) / (k - high_count).clamp(min=1)
    sent = torch.where(is_high, high, low).copysign_(values)
    rows.scatter_(1, columns, values - sent)
    codes = (values < 0).to(torch.uint8) | (~is_high).to(torch.uint8).mul_(2)
    quarters = codes.view(-1, 4)
    packed = quarters[:, 0] | (quarters[:, 1] << 2) | (quarters[:, 2] << 4) | (quarters[:, 3] << 6)
    return [high.bfloat16(), low.bfloat16(), pack_indices(columns.flatten()), packed]


def scatter_add(
    dense: Tensor, packets: Sequence[tuple[Tensor, Tensor]]
) -> None:  # f32[N] out, (i64[m], f32[m]) of each packet
    """Sum packets that are already decoded into a dense array."""
    dense.zero_()
    for positions, values in packets:
        dense.scatter_add_(0, positions, values)


def scatter_add_and_count(
    dense: Tensor, senders: Tensor, packets: Sequence[tuple[Tensor, Tensor]]
) -> None:  # f32[N] out, f32[N] out, (i64[m], f32[m]) of each packet
    """Sum decoded packets and count who sent each position, which is what mean_of_senders divides by."""
    scatter_add(dense, packets)
    senders.zero_()
    for positions, values in packets:
        senders.scatter_add_(0, positions, torch.ones_like(values))
