"""The bench's own arithmetic: sizes, bounds, ratios and what its inputs are made of."""

import math
import struct

import numpy as np
import pytest
import torch

from bench import codec, quantizers
from bench.inputs import shuffled
from bench.real_gradients import kept_rows
from protocol.layout import Layout
from protocol.limits import CHUNK
from protocol.packet import PACKET_HEADER_BYTES


def test_the_bound_counts_the_ways_to_choose() -> None:
    layout = Layout.of([("a", (2, CHUNK)), ("b", (100,))])
    bits = 2 * math.log2(math.comb(CHUNK, 64)) + math.log2(math.comb(100, 2))
    assert codec.bound_bits(layout, 64) == pytest.approx(bits / (2 * 64 + 2), rel=1e-9)


def test_gap_bytes_are_the_fourth_plane_of_each_frame() -> None:
    frames = b""
    for stored in ((3, 2, 0, 50, 7), (1, 1, 4, 20, 0)):
        frames += struct.pack("<7I", 1, 99, *stored) + bytes(sum(stored))
    assert codec.gap_bytes(bytes(PACKET_HEADER_BYTES) + frames) == 70


def test_a_ratio_is_the_median_of_the_turns() -> None:
    assert codec.ratio({"a": [2.0, 30.0, 4.0], "b": [1.0, 1.0, 1.0]}, "a", "b") == 4.0


def test_turns_interleave_and_restore_before_each() -> None:
    seen: list[str] = []
    contestants = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    times = codec.take_turns(2, contestants, lambda: seen.append("-"), threads=1)
    assert "".join(seen) == "-a-b" * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_shuffled_copies_hold_the_same_values_in_every_chunk() -> None:
    source = torch.arange(2 * CHUNK + 5, dtype=torch.float32)
    copies = shuffled(source)
    first, second = next(copies), next(copies)
    assert torch.equal(first, source[: 2 * CHUNK]) and not torch.equal(first, second)
    assert torch.equal(second.view(2, -1).sort(dim=1).values.flatten(), first)


def test_kept_rows_takes_the_lowest_index_of_a_tie() -> None:
    layout = Layout.of([("a", (CHUNK + 100,))])
    acc = np.ones(layout.size, np.float32)
    acc[50] = -2.0
    full, short = kept_rows(acc, layout, 64)
    assert full[1].tolist() == [[*range(64)]]
    assert short[1].tolist() == [[CHUNK, CHUNK + 1]]
    acc[4000] = 3.0
    full, _ = kept_rows(acc, layout, 64)
    assert full[1].tolist() == [[*range(63), 4000]]
    assert full[2][0, 50] == -2.0 and full[2][0, 63] == 3.0


def test_quantizers_are_exact_where_they_can_be() -> None:
    rows = np.array([[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    np.testing.assert_array_equal(quantizers.two_means(rows, 2), rows)
    np.testing.assert_array_equal(quantizers.two_means(rows, 2, 4, 64), rows)
    np.testing.assert_array_equal(quantizers.of_maximum(rows, 0.5, 1.0), rows)
    np.testing.assert_allclose(quantizers.fixed_ratio(np.array([[7.0, 8.0, 8.0, 7.0]]), 7 / 8, 8), [[7, 8, 8, 7]])
    np.testing.assert_array_equal(quantizers.rounded(np.array([[0.0, 17.0, 31.0]]), 4), [[0.0, 16.0, 32.0]])
