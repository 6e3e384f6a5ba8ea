"""Our own re-implementation of the published reference wire of SparseLoCo (arXiv 2508.15706), to measure against.

Per packet or per tensor one grid of 4 levels: the kept values are centred on their mean, cut into 4 bins over 6
standard deviations, and a bin stands for the mean of what fell into it. Every index takes 12 bits, every code a byte.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol.limits import CHUNK

LEVELS = 4
RANGE_SIGMAS = 6.0
TABLE_BYTES = 4 * (LEVELS + 1)  # the means of the bins and the mean of all, float32


@dataclass(frozen=True)
class Grid:
    """One grid: a code c stands for table[c] + shift."""

    table: Tensor  # f32[4]
    shift: Tensor  # f32[]


def quantize(values: Tensor) -> tuple[Tensor, Grid]:  # f32[m] -> u8[m], grid
    """Fit a grid to these values and code them."""
    shift = values.mean()
    centred = values - shift
    sigma = centred.norm() / max(values.numel() - 1, 1) ** 0.5
    step = (RANGE_SIGMAS * sigma / LEVELS).clamp(min=1e-12)
    codes = (centred / step + LEVELS // 2).round_().clamp_(0, LEVELS - 1).to(torch.uint8)
    sums = torch.zeros(LEVELS).scatter_add_(0, codes.long(), centred)
    counts = torch.zeros(LEVELS).scatter_add_(0, codes.long(), torch.ones_like(centred))
    return codes, Grid(sums / counts.clamp(min=1), shift)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:  # u8[m] -> f32[m]
    """What the receiver makes of the codes."""
    return grid.table[codes.long()] + grid.shift


def pack_indices(columns: Tensor) -> Tensor:  # i64[m] below 4096 -> u8[ceil(m / 2) * 3]
    """Two indices in three bytes."""
    if columns.numel() % 2:
        columns = torch.cat((columns, columns.new_zeros(1)))
    first, second = columns.view(-1, 2).unbind(1)
    return torch.stack((first & 255, (first >> 8) | ((second & 15) << 4), second >> 4), dim=1).to(torch.uint8).flatten()


def unpack_indices(packed: Tensor, count: int) -> Tensor:  # u8[...] -> i64[count]
    """The indices of `pack_indices`."""
    low, middle, high = packed.long().view(-1, 3).unbind(1)
    return torch.stack((low | ((middle & 15) << 8), (middle >> 4) | (high << 4)), dim=1).flatten()[:count]


def encode(acc: Tensor, k: int) -> tuple[bytes, Tensor]:  # acc: f32[N], N a multiple of 4096; in place
    """Take the largest values of each chunk out of acc and return the packet, one grid for all, and the positions."""
    rows = acc.view(-1, CHUNK)
    columns = rows.abs().topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    values = rows.gather(1, columns)
    codes, grid = quantize(values.flatten())
    rows.scatter_(1, columns, values - dequantize(codes, grid).view_as(values))
    packet = b"".join(
        part.numpy().tobytes() for part in (pack_indices(columns.flatten()), codes, grid.table, grid.shift)
    )
    starts = torch.arange(len(rows)).mul_(CHUNK)
    return packet, (columns + starts[:, None]).flatten()


def decode(packet: bytes, size: int, k: int) -> tuple[Tensor, Tensor]:  # -> i64[m], f32[m]
    """Positions and values of a packet of `encode` for `size` values."""
    count = size // CHUNK * k
    data = np.frombuffer(packet, np.uint8)
    index_bytes = -(-count // 2) * 3
    columns = unpack_indices(torch.from_numpy(data[:index_bytes].copy()), count)
    codes = torch.from_numpy(data[index_bytes : index_bytes + count].copy())
    table = torch.from_numpy(np.frombuffer(packet, "<f4", LEVELS + 1, index_bytes + count).copy())
    starts = torch.arange(size // CHUNK).mul_(CHUNK).repeat_interleave(k)
    return columns + starts, dequantize(codes, Grid(table[:LEVELS], table[LEVELS]))


def packet_bytes(count: int, grids: int) -> int:
    """Bytes of a packet of so many values with so many grids."""
    return -(-count // 2) * 3 + count + grids * TABLE_BYTES


def relative_error(groups: list[NDArray[np.float32]]) -> float:  # kept values, one group per grid
    """Squared error of the dequantized values relative to the kept values' own squares."""
    error = total = 0.0
    for group in groups:
        values = torch.from_numpy(np.ascontiguousarray(group).reshape(-1))
        error += float((values.double() - dequantize(*quantize(values)).double()).square().sum())
        total += float(values.double().square().sum())
    return error / total
