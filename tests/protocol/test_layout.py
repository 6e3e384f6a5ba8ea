import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.identity import merkle_root
from protocol.layout import (
    Layout,
    TensorSpec,
    chunk_lengths,
    kept,
    kept_per_chunk,
    piece_hashes,
    state_pieces,
    state_root,
)
from protocol.limits import PIECE_BYTES, TENSORS_MAX


def test_tensors_are_ordered_by_name_and_laid_end_to_end() -> None:
    layout = Layout.of([("b", [3, 4]), ("a.weight", (5,)), ("a", ()), ("B", (4097,))])
    assert [tensor.name for tensor in layout.tensors] == ["B", "a", "a.weight", "b"]
    assert [tensor.size for tensor in layout.tensors] == [4097, 1, 5, 12]
    assert [tensor.chunks for tensor in layout.tensors] == [2, 1, 1, 1]
    assert layout.offsets == (0, 4097, 4098, 4103, 4115)
    assert layout.size == 4115


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("", (1,), "1 to 200 printable ASCII"),
        ("a b", (1,), "1 to 200 printable ASCII"),
        ("ä", (1,), "1 to 200 printable ASCII"),
        ("a\n", (1,), "1 to 200 printable ASCII"),
        ("a" * 201, (1,), "1 to 200 printable ASCII"),
        ("a", (0,), "at least 1"),
        ("a", (3, -1), "at least 1"),
        ("a", (-2, -2), "at least 1"),
        ("a", (2**31 + 1,), "product at most 2147483648"),
        ("a", (1 << 20, 2049), "product at most 2147483648"),
        ("a", (1,) * 9, "at most 8"),
    ],
)
def test_a_tensor_outside_the_limits_is_refused(name: str, shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TensorSpec(name, shape)


def test_a_layout_outside_the_limits_is_refused() -> None:
    a, b = TensorSpec("a", (1,)), TensorSpec("b", (1,))
    for tensors in ((b, a), (a, a)):
        with pytest.raises(ValueError, match="sorted by name"):
            Layout(tensors)
    with pytest.raises(ValueError, match="1 to 16384 tensors"):
        Layout(())
    with pytest.raises(ValueError, match="1 to 16384 tensors"):
        Layout.of((f"t{i}", (1,)) for i in range(TENSORS_MAX + 1))
    with pytest.raises(ValueError, match="at most 1099511627776 values"):
        Layout((*(TensorSpec(f"a{number:03}", (1 << 20, 1 << 11)) for number in range(512)), b))


@given(st.integers(1, 4096), st.integers(1, 4096))
@settings(derandomize=True)
def test_a_chunk_keeps_its_share_and_at_least_one(length: int, k: int) -> None:
    count = kept(length, k)
    assert 1 <= count <= length
    assert count == length or (count - 1) * 4096 < k * length <= count * 4096
    assert kept(4096, k) == k


@given(st.integers(1, 20_000), st.integers(1, 4096))
@settings(derandomize=True)
def test_chunks_cover_a_tensor_and_only_the_last_is_short(size: int, k: int) -> None:
    lengths = chunk_lengths(size)
    assert lengths.dtype == np.int64
    assert lengths.sum() == size
    assert (lengths[:-1] == 4096).all()
    assert 1 <= lengths[-1] <= 4096
    assert kept_per_chunk(size, k).tolist() == [kept(int(length), k) for length in lengths]


def test_the_state_root_is_the_merkle_root_over_four_megabyte_pieces() -> None:
    values_a_piece = PIECE_BYTES // 4
    flat = np.arange(2 * values_a_piece + 3, dtype=np.float32)
    raw = flat.tobytes()
    pieces = [raw[:PIECE_BYTES], raw[PIECE_BYTES : 2 * PIECE_BYTES], raw[2 * PIECE_BYTES :]]
    assert [bytes(piece) for piece in state_pieces(flat)] == pieces
    assert piece_hashes(flat) == [hashlib.sha256(b"\0" + piece).digest() for piece in pieces]
    assert state_root(flat) == merkle_root(pieces)


def test_the_state_root_sees_every_bit() -> None:
    flat = np.zeros(3, dtype=np.float32)
    minus_zero = flat.copy()
    minus_zero[1] = -0.0
    assert state_root(flat) == state_root(flat.copy())
    assert state_root(minus_zero) != state_root(flat)
