"""Which windows of the token stream belong to (round, peer): a pure function, so nothing is ever saved or skipped.

A stream of `tokens` tokens has `(tokens - 1) // T` windows; window i covers tokens i*T to i*T + T, both included, so
that every token but the first is predicted once in a pass. Each peer goes through all windows in an order of its own,
pass (`epoch`) after pass: a permutation keyed by (seed, peer, epoch). Within an epoch a peer never sees a window
twice. Peers need not know of each other, and the windows of two peers in the same rounds overlap only by
chance, in about count^2 / n_windows places. A peer that joins in round t starts where it would have been, had it
been there from the first round.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_FEISTEL_ROUNDS = 6


def window_count(tokens: int, sequence_length: int) -> int:
    """How many windows a stream has. Raises ValueError when it has none."""
    count = (tokens - 1) // sequence_length
    if count < 1:
        raise ValueError(
            f"a stream of {tokens} tokens has no window of {sequence_length} + 1; "
            "lower data.sequence_length or use a larger corpus"
        )
    return count


def windows_for(seed: int, round: int, peer_key: bytes, count: int, n_windows: int) -> NDArray[np.int64]:  # i64[count]
    """The windows that the peer trains on in a round, in order.

    `round` starts at 1; `count` is the number of windows of a full round (inner steps times batch size), the
    same in every round. A peer that does fewer steps takes a prefix.
    """
    assert round >= 1 and count >= 1 and n_windows >= 1
    positions = np.arange((round - 1) * count, round * count, dtype=np.int64)
    windows = np.empty(count, dtype=np.int64)
    for epoch in range(int(positions[0]) // n_windows, int(positions[-1]) // n_windows + 1):
        inside = positions // n_windows == epoch
        windows[inside] = permute(positions[inside] % n_windows, n_windows, _key(seed, epoch, peer_key))
    return windows


def validation_windows(count: int, n_windows: int) -> NDArray[np.int64]:  # i64[min(count, n_windows)]
    """At most `count` windows, spread evenly over the validation stream, the same for everybody."""
    count = min(count, n_windows)
    return np.arange(count, dtype=np.int64) * n_windows // count


def permute(indices: NDArray[np.int64], size: int, key: bytes) -> NDArray[np.int64]:  # i64[m] below size -> i64[m]
    """A keyed bijection of 0 .. size-1: a Feistel network on 2h >= log2(size) bits that walks on while outside.

    It is a good shuffle, not a cipher. Cycle walking (Black and Rogaway, 2002) takes at most four steps on average,
    because 2^(2h) is below 4 * size.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.frombuffer(hashlib.sha512(key).digest(), dtype="<u8")[:_FEISTEL_ROUNDS]
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, dtype=np.bool_)
    while outside.any():
        walking = values[outside]
        left, right = walking >> half, walking & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _key(seed: int, epoch: int, peer_key: bytes) -> bytes:
    """The key of one peer's order in one epoch."""
    return hashlib.sha256(
        b"sparseloco-peer/windows\0" + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little") + peer_key
    ).digest()


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:  # u64[m] -> u64[m]
    """Scramble 64-bit words: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
