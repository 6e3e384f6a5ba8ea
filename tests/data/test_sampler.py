import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.data.sampler import permute, validation_windows, window_count, windows_for

ALICE, BOB = b"a" * 32, b"b" * 32


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.binary(min_size=32, max_size=32))
def test_permute_is_a_bijection(size: int, key: bytes) -> None:
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permute_shuffles_well() -> None:
    size = 10_000
    image = permute(np.arange(size), size, b"k" * 32).astype(np.float64)
    for lag in (1, 2, 16, 100):
        correlation = np.corrcoef(image[:-lag], image[lag:])[0, 1]
        assert abs(correlation) < 0.05, lag
    assert abs(np.corrcoef(image, np.arange(size))[0, 1]) < 0.05
    counts = np.bincount((image[:1000] // 1000).astype(np.int64), minlength=10)
    assert counts.min() > 60


def test_permute_works_beyond_32_bits() -> None:
    size = (1 << 40) + 12345
    image = permute(np.arange(10_000), size, b"k" * 32)
    assert len(np.unique(image)) == 10_000
    assert 0 <= image.min() < size // 100 and size - size // 100 < image.max() < size


def test_windows_are_pinned() -> None:
    # Peers on different versions must train on the same windows, so these numbers may never change.
    assert windows_for(7, 1, ALICE, 6, 1000).tolist() == [48, 873, 330, 347, 392, 642]
    assert windows_for(7, 334, BOB, 6, 1000).tolist() == [63, 695, 668, 704, 459, 496]


def test_rounds_walk_through_every_window_once_an_epoch() -> None:
    n, count = 997, 40
    rounds = [windows_for(3, t, ALICE, count, n) for t in range(1, 101)]
    stream = np.concatenate(rounds)
    for epoch in range(len(stream) // n):
        part = stream[epoch * n : (epoch + 1) * n]
        assert np.array_equal(np.sort(part), np.arange(n))
    assert not np.array_equal(stream[:n], stream[n : 2 * n])


def test_a_round_longer_than_the_corpus_repeats_it() -> None:
    windows = windows_for(3, 2, ALICE, 100, 7)
    assert np.bincount(windows, minlength=7).min() >= 13


def test_seed_round_and_peer_all_matter() -> None:
    base = windows_for(1, 1, ALICE, 100, 5000)
    assert np.array_equal(base, windows_for(1, 1, ALICE, 100, 5000))
    for other in (
        windows_for(2, 1, ALICE, 100, 5000),
        windows_for(1, 2, ALICE, 100, 5000),
        windows_for(1, 1, BOB, 100, 5000),
    ):
        assert len(np.intersect1d(base, other)) < 20


def test_peers_overlap_only_by_chance() -> None:
    n, count, peers = 20_000, 400, 8
    seen = [set(windows_for(5, 1, bytes([p]) * 32, count, n).tolist()) for p in range(peers)]
    overlaps = [len(seen[a] & seen[b]) for a in range(peers) for b in range(a)]
    assert np.mean(overlaps) < 2 * count * count / n


@pytest.mark.parametrize(("tokens", "length", "expected"), [(101, 10, 10), (100, 10, 9), (11, 10, 1), (2, 1, 1)])
def test_window_count(tokens: int, length: int, expected: int) -> None:
    assert window_count(tokens, length) == expected


def test_too_short_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence_length"):
        window_count(10, 10)


def test_validation_windows_are_spread_evenly() -> None:
    assert validation_windows(4, 100).tolist() == [0, 25, 50, 75]
    assert validation_windows(100, 3).tolist() == [0, 1, 2]
