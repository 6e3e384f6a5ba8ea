"""The reference wire that we measure against must itself be right, or the comparison is worth nothing."""

import numpy as np
import pytest
import torch

from bench import reference_wire, torch_codec
from protocol.limits import CHUNK


def acc_of(chunks: int, seed: int) -> torch.Tensor:
    return torch.randn(chunks * CHUNK, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [0, 1, 2, 5, 64, 4095])
def test_indices_take_twelve_bits_and_come_back(count: int) -> None:
    columns = torch.randint(0, CHUNK, (count,), generator=torch.Generator().manual_seed(count))
    packed = reference_wire.pack_indices(columns)
    assert packed.numel() == -(-count // 2) * 3
    assert torch.equal(reference_wire.unpack_indices(packed, count), columns)


def test_the_extreme_indices_come_back() -> None:
    columns = torch.tensor([0, 4095, 4095, 0, 2048])
    assert reference_wire.unpack_indices(reference_wire.pack_indices(columns), 5).tolist() == columns.tolist()


def test_a_packet_carries_the_largest_values_and_leaves_the_rest() -> None:
    acc = acc_of(3, seed=1)
    before = acc.clone()
    packet, sent_at = reference_wire.encode(acc, 64)
    positions, values = reference_wire.decode(packet, len(acc), 64)
    assert torch.equal(positions, sent_at)
    assert len(packet) == reference_wire.packet_bytes(3 * 64, grids=1)
    least = before.abs().view(-1, CHUNK).topk(64, dim=1).values.amin(dim=1)
    assert bool((before[positions].abs().view(3, 64) >= least[:, None]).all())
    untouched = torch.ones_like(acc, dtype=torch.bool)
    untouched[positions] = False
    assert torch.equal(acc[untouched], before[untouched])
    assert torch.equal(acc[positions], before[positions] - values)


def test_a_bin_stands_for_the_mean_of_its_values() -> None:
    values = torch.tensor([-3.0, -3.5, -2.5, 3.0, 2.0, 4.0])
    codes, grid = reference_wire.quantize(values)
    sent = reference_wire.dequantize(codes, grid)
    for code in set(codes.tolist()):
        inside = codes == code
        torch.testing.assert_close(sent[inside].mean(), values[inside].mean())


def test_two_magnitudes_are_exact_on_a_grid_and_a_wide_range_is_not() -> None:
    signs = np.where(np.arange(100) % 2, 1.0, -1.0).astype(np.float32)
    assert reference_wire.relative_error([signs]) < 1e-12
    wide = signs * np.geomspace(0.01, 1, 100, dtype=np.float32)
    assert reference_wire.relative_error([wide]) > 0.01
    # Grids of their own serve two groups better than one for both.
    assert reference_wire.relative_error([signs, 100 * signs]) < reference_wire.relative_error(
        [np.concatenate((signs, 100 * signs))]
    )


@pytest.mark.parametrize("chunks", [1, 5, 300])
def test_the_torch_codec_takes_its_packet_out_of_the_residual(chunks: int) -> None:
    residual, outer = acc_of(chunks, seed=2), acc_of(chunks, seed=3)
    local = torch.zeros_like(outer)
    acc = residual * 0.9 + outer
    _, size = torch_codec.encode(residual, outer, local, 0.9, 64, 4096)
    assert size == chunks * (2 * 2 + 64 * 12 // 8 + 64 * 2 // 8)
    changed = (residual != acc).view(chunks, CHUNK).sum(dim=1)
    assert changed.max() <= 64 and changed.min() >= 60  # a value may equal its mean
    assert residual.square().sum() < acc.square().sum()


def test_scatter_add_sums_packets() -> None:
    dense = torch.full((8,), 7.0)
    first = (torch.tensor([0, 3]), torch.tensor([1.0, 2.0]))
    second = (torch.tensor([3, 5]), torch.tensor([0.5, -1.0]))
    torch_codec.scatter_add(dense, [first, second])
    assert dense.tolist() == [1.0, 0, 0, 2.5, 0, -1.0, 0, 0]
