"""The file of a peer's replica: it comes back bit for bit, whole or not at all."""

import dataclasses
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from peer import keep
from peer.core.model import layout_of
from peer.core.replica import Replica, initial_state
from peer.errors import UserCode, UserError
from protocol.identity import PrivateKey
from protocol.layout import state_root
from protocol.ledger import RoundRecord, genesis_record
from protocol.packet import make_packet
from protocol.run import CompressionConfig, DataConfig, ModelConfig, RunConfig, RunSettings
from protocol.wire import packet_to_wire

KEY = PrivateKey.from_bytes(bytes(range(32)))
MODEL = ModelConfig(hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_key_value_heads=2)


def run_of(model: ModelConfig = MODEL, name: str = "test") -> RunConfig:
    settings = RunSettings(
        name=name, model=model, data=DataConfig(sequence_length=32), compression=CompressionConfig(k=64)
    )
    root = state_root(initial_state(model))
    return RunConfig.of(
        settings, operator=KEY.public, aggregators=(KEY.public,), layout=layout_of(model), genesis_root=root
    )


RUN = run_of()
RECORD = genesis_record(RUN, KEY, 1)


def new_replica(run: RunConfig = RUN) -> Replica:
    return Replica(run, torch.device("cpu"), torch.float32)


def trained(seed: int) -> Replica:
    """A replica after some inner steps, with a residual."""
    draw = np.random.default_rng(seed)
    replica = new_replica()
    replica.residual.copy_(torch.from_numpy(draw.standard_normal(RUN.layout.size) * 1e-3))
    batches = draw.integers(0, 256, (3, 2, 33))
    replica.train_steps(1, batches, lambda: False, lambda _steps, _loss: None)
    return replica


def contribute(replica: Replica) -> bytes:
    """Make the packet of round 1; its transport form."""
    return packet_to_wire(make_packet(RUN, KEY, 1, RECORD.state_root, 64, 3, replica.make_contribution()), RUN)


def bits(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return np.frombuffer(tensor.numpy().tobytes(), np.uint8)


def assert_same(one: Replica, other: Replica) -> None:
    states = one.state(), other.state()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        np.testing.assert_array_equal(bits(tensor), bits(states[1][name]), name)


def save(path: Path, replica: Replica, wire: bytes | None, record: RoundRecord = RECORD) -> int:
    return keep.save(path, replica, record, wire, lambda: False)


@pytest.mark.parametrize("in_flight", [True, False])
def test_a_replica_comes_back_bit_for_bit(tmp_path: Path, in_flight: bool) -> None:
    path = tmp_path / "replica.safetensors"
    one, other = trained(1), new_replica()
    wire = contribute(one) if in_flight else None
    if not in_flight:
        one.absorb()
    assert save(path, trained(2), None) > 0
    size = save(path, one, wire)
    assert path.stat().st_size == size
    kept = keep.load(path, other)
    assert kept is not None
    assert (kept.record, kept.state_root) == (RECORD, RUN.genesis_root)
    assert_same(one, other)
    assert (kept.packet is not None) == in_flight
    if kept.packet is not None:
        assert (kept.packet.wire, kept.packet.header.round) == (wire, 1)
        for replica in (one, other):
            replica.restore()
        assert_same(one, other)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_the_file_takes_sixteen_bytes_a_parameter_and_is_plain_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "replica.safetensors"
    replica = trained(1)
    size = save(path, replica, None)
    assert 16 * RUN.layout.size < size < 16 * RUN.layout.size + 3000
    tensors = load_file(path)
    np.testing.assert_array_equal(bits(tensors["residual"]), bits(replica.residual))
    assert int(tensors["inner.own_steps"]) == 3


def test_where_nothing_is_stored_nothing_changes(tmp_path: Path) -> None:
    replica = new_replica()
    path = tmp_path / "replica.safetensors"
    assert keep.load(path, replica) is None
    assert_same(replica, new_replica())
    save(path, replica, None)
    keep.forget(path)
    keep.forget(path)
    assert not path.exists()


def span_of(path: Path, name: str) -> tuple[int, int]:
    """Where a tensor lies in the file."""
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + header_bytes])[name]["data_offsets"]
    return 8 + header_bytes + start, 8 + header_bytes + end


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


PARTS = (
    "residual",
    "inner.first",
    "inner.second",
    "inner.own_steps",
    "sent.positions",
    "sent.originals",
    "record",
    "packet",
)


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_is_found(tmp_path: Path, part: str) -> None:
    path = tmp_path / "replica.safetensors"
    replica = trained(1)
    save(path, replica, contribute(replica))
    start, end = span_of(path, part)
    flip(path, (start + end) // 2)
    with pytest.raises(UserError, match="damaged-store") as caught:
        keep.load(path, new_replica())
    assert str(path) in caught.value.remedy


def test_damaged_outer_parameters_show_by_their_root_and_cost_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "replica.safetensors"
    one, other = trained(1), new_replica()
    save(path, one, None)
    flip(path, span_of(path, "outer")[0] + 2)
    kept = keep.load(path, other)
    assert kept is not None and kept.state_root != kept.record.state_root
    np.testing.assert_array_equal(bits(one.residual), bits(other.residual))
    np.testing.assert_array_equal(bits(one.inner.first), bits(other.inner.first))


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, 50_000])
def test_a_file_that_ends_early_is_found(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "replica.safetensors"
    save(path, trained(1), None)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match="damaged-store"):
        keep.load(path, new_replica())


def change_metadata(path: Path, old: str, new: str) -> None:
    data = path.read_bytes()
    assert data.count(old.encode()) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old.encode(), new.encode()))


@pytest.mark.parametrize(
    ("new", "code"), [("9", UserCode.NEWER_STORE), ("x", UserCode.DAMAGED_STORE), ("-", UserCode.DAMAGED_STORE)]
)
def test_another_version_is_named(tmp_path: Path, new: str, code: UserCode) -> None:
    path = tmp_path / "replica.safetensors"
    save(path, trained(1), None)
    change_metadata(path, '"replica_version":"1"', f'"replica_version":"{new}"')
    with pytest.raises(UserError) as caught:
        keep.load(path, new_replica())
    assert caught.value.code == code


def test_a_replica_of_another_run_or_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "replica.safetensors"
    save(path, trained(1), None)
    with pytest.raises(UserError, match="other-run"):
        keep.load(path, new_replica(run_of(name="other")))
    larger = run_of(dataclasses.replace(MODEL, num_hidden_layers=2))
    change_metadata(path, RUN.run_id.hex(), larger.run_id.hex())
    with pytest.raises(UserError, match="damaged-store"):
        keep.load(path, new_replica(larger))


def test_a_packet_that_does_not_follow_the_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "replica.safetensors"
    replica = trained(1)
    sections = replica.make_contribution()
    save(path, replica, packet_to_wire(make_packet(RUN, KEY, 2, RECORD.state_root, 64, 3, sections), RUN))
    with pytest.raises(UserError, match="round 2"):
        keep.load(path, new_replica())


def test_a_contribution_is_never_stored_without_its_packet(tmp_path: Path) -> None:
    replica = trained(1)
    with pytest.raises(AssertionError):
        save(tmp_path / "replica.safetensors", replica, b"packet")
    replica.make_contribution()
    with pytest.raises(AssertionError):
        save(tmp_path / "replica.safetensors", replica, None)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "replica.safetensors"
    one, other = trained(1), new_replica()
    save(path, one, None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal, so a write beyond the limit fails as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * RUN.layout.size, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            save(path, trained(2), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == UserCode.DISK_FULL
    assert "continues" in caught.value.remedy
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert keep.load(path, other) is not None
    assert_same(one, other)


def test_leaving_gives_up_a_save_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "replica.safetensors"
    one, other = trained(1), new_replica()
    save(path, one, None)
    asked = iter([False] * 4 + [True])
    with pytest.raises(keep.LeavingError):
        keep.save(path, trained(2), RECORD, None, lambda: next(asked))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert keep.load(path, other) is not None
    assert_same(one, other)


def test_blocks_are_those_of_the_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that is written in many blocks is the file that is written in one."""
    path, small = tmp_path / "one", tmp_path / "many"
    replica = trained(1)
    wire = contribute(replica)
    save(path, replica, wire)
    monkeypatch.setattr(keep, "_BLOCK_BYTES", 1000)
    save(small, replica, wire)
    assert path.read_bytes() == small.read_bytes()
    assert keep.load(small, new_replica()) is not None
