from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peer.data.shards import HEADER_BYTES, open_shard, token_type, write_shard


@pytest.mark.parametrize(("vocab_size", "width"), [(2, 1), (256, 1), (257, 2), (65536, 2), (65537, 4), (1 << 24, 4)])
def test_round_trip_in_the_smallest_type(tmp_path: Path, vocab_size: int, width: int) -> None:
    tokens = np.random.default_rng(1).integers(0, vocab_size, 5000)
    path = tmp_path / "new" / "a.tokens"
    write_shard(path, [tokens[:17], tokens[17:17], tokens[17:]], vocab_size)
    shard = open_shard(path, verify=True)
    assert np.array_equal(shard.tokens, tokens)
    assert shard.vocab_size == vocab_size
    assert shard.tokens.dtype.itemsize == token_type(vocab_size).itemsize == width
    assert not shard.tokens.flags.writeable
    assert [entry.name for entry in path.parent.iterdir()] == ["a.tokens"]


def test_equal_tokens_have_an_equal_hash(tmp_path: Path) -> None:
    tokens = np.arange(100)
    write_shard(tmp_path / "a", [tokens], 260)
    write_shard(tmp_path / "b", [tokens[:1], tokens[1:]], 260)
    write_shard(tmp_path / "c", [tokens[::-1]], 260)
    a, b, c = (open_shard(tmp_path / name).sha256 for name in "abc")
    assert a == b != c


def test_failed_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_shard(path, [np.arange(10)], 260)
    before = path.read_bytes()
    for parts, complaint in (
        ([np.arange(10), np.array([260])], "outside the vocabulary"),
        ([np.array([-1])], "outside the vocabulary"),
        ([], "no tokens"),
    ):
        with pytest.raises(ValueError, match=complaint):
            write_shard(path, parts, 260)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_short_long_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    with pytest.raises(ValueError, match="cannot open"):
        open_shard(path)
    with pytest.raises(ValueError, match="cannot open"):
        open_shard(tmp_path)
    write_shard(path, [np.arange(100)], 260)
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:HEADER_BYTES], whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="its header promises"):
            open_shard(path)
    for data in (b"", whole[: HEADER_BYTES - 1], b"PK\3\4" + whole[4:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a token shard"):
            open_shard(path)
    path.write_bytes(whole[:4] + b"\2\0" + whole[6:])
    with pytest.raises(ValueError, match="version 2"):
        open_shard(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, HEADER_BYTES + 199), flip=st.integers(1, 255))
def test_any_changed_byte_is_noticed(tmp_path: Path, position: int, flip: int) -> None:
    path = tmp_path / "a.tokens"
    write_shard(path, [np.arange(100)], 260)
    data = bytearray(path.read_bytes())
    data[position] ^= flip
    path.write_bytes(data)
    if 16 <= position < 20:  # the vocabulary is a claim about the tokens, checked when they are read
        open_shard(path, verify=True)
    else:
        with pytest.raises(ValueError, match=str(path)):
            open_shard(path, verify=True)
