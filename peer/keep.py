"""What a peer's replica needs after a crash: one file a run, `<home>/runs/<run_id>/replica.safetensors`.

It holds the residual, the Adam moments and their own steps, the outer parameters, the record that they belong to, and
the packet in flight with what undoes it. It is written before the packet is sent, in place of the one before, so a
killed peer loses at most the inner steps that were in no packet yet: it sends the same bytes again, and whatever the
record of the round says, settling and the updates since lead to the bits of a peer that was never killed.

The file takes 16 bytes a parameter (16.2 with a packet at k = 64), and while it is replaced the disk holds it twice.
"""

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peer.core.replica import Replica
from peer.errors import UserCode, UserError, os_errors
from peer.store import replacing, safetensors_header
from protocol.errors import ProtocolError
from protocol.ledger import RoundRecord, check_record
from protocol.packet import PacketHeader, check_claims
from protocol.run import RunConfig
from protocol.wire import packet_from_wire

VERSION = 1
_BLOCK_BYTES = 64 << 20
_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


class LeavingError(Exception):
    """A save was given up because the program is to leave; the file is the one from before."""


@dataclass(frozen=True)
class InFlight:
    """A packet whose round has no record yet, as far as the stored state knows."""

    header: PacketHeader
    wire: bytes  # its transport form, as it is sent


@dataclass(frozen=True)
class Kept:
    """What was stored beside the replica's own tensors. `state_root` is that of the outer parameters in the file."""

    record: RoundRecord
    state_root: bytes
    packet: InFlight | None


def save(path: Path, replica: Replica, record: RoundRecord, wire: bytes | None, should_stop: Callable[[], bool]) -> int:
    """Keep the replica durably; return the bytes written. Nobody may change it meanwhile, for nothing is copied.

    `record` is the one that the outer parameters belong to, `wire` the packet of the contribution in flight. Raises
    UserError when the disk fails or is full, and LeavingError; the old file is then as it was.
    """
    state = replica.state()
    assert ("sent.positions" in state) == (wire is not None), "a contribution and its packet are stored together"
    state["record"] = _tensor(record.to_bytes())
    if wire is not None:
        state["packet"] = _tensor(wire)
    # The widest first, so that every tensor is aligned in the file.
    state = dict(sorted(state.items(), key=lambda item: -item[1].element_size()))
    metadata = {
        "replica_version": str(VERSION),
        "run_id": replica.run.run_id.hex(),
        "round": str(record.round),
        "crc32": f"{_checksum(state):08x}",
    }
    shapes = [(name, _DTYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for name, tensor in state.items()]
    with replacing(path) as file:
        file.write(safetensors_header(shapes, metadata))
        for tensor in state.values():
            for block in _blocks(tensor):
                if should_stop():
                    raise LeavingError(f"{path} was not written: the program leaves")
                file.write(block)
                if len(block) == _BLOCK_BYTES:
                    # On the disk bit by bit, so that leaving never waits for gigabytes.
                    file.flush()
                    os.fsync(file.fileno())
        return file.tell()


def load(path: Path, replica: Replica) -> Kept | None:
    """Continue from what `save` stored, or do nothing and return None where nothing is. Raises UserError.

    The replica has the settings of the round after `stored_record`, in which its packet was made.

    The checksum leaves the outer parameters out: their root says what they are, and others have them too.
    """
    if not path.exists():
        return None
    with os_errors(path):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                _check_origin(path, metadata, replica.run)
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            if metadata.get("crc32") != f"{_checksum(state):08x}":
                raise ValueError("the checksum differs")
            record = RoundRecord.from_bytes(_bytes(state["record"]))
            check_record(record, replica.run)
            packet = _in_flight(state, record, replica.run)
            root = replica.load_state(state)
        except (SafetensorError, ProtocolError, ValueError, KeyError) as error:
            raise UserError(
                UserCode.DAMAGED_STORE,
                f"{path} does not hold the replica that was stored in it ({error})",
                f"delete {path} and start the same command again: the peer then begins with an empty residual",
            ) from error
    return Kept(record, root, packet)


def stored_record(path: Path, run: RunConfig) -> RoundRecord | None:
    """The record that a stored replica belongs to, or None. What is wrong with the file shows when it is loaded."""
    try:
        with safe_open(path, framework="pt") as file:
            record = RoundRecord.from_bytes(_bytes(file.get_tensor("record")))
        check_record(record, run)
    except (SafetensorError, ProtocolError, OSError):
        return None
    return record


def forget(path: Path) -> None:
    """Delete what is stored, if anything is. Raises UserError."""
    with os_errors(path):
        path.unlink(missing_ok=True)


def _check_origin(path: Path, metadata: Mapping[str, str], run: RunConfig) -> None:
    version = metadata.get("replica_version", "")
    if not version.isascii() or not version.isdigit():
        raise ValueError("it is no stored replica")
    if int(version) > VERSION:
        raise UserError(
            UserCode.NEWER_STORE,
            f"{path} was written by a newer sparseloco-peer (version {version}, not {VERSION})",
            "install the newest sparseloco-peer: pip install --upgrade sparseloco-peer",
        )
    if metadata.get("run_id") != run.run_id.hex():
        raise UserError(
            UserCode.OTHER_RUN_STORED,
            f"{path} belongs to another run",
            "move it back to the folder of its run, or name an unused folder with --home",
        )


def _in_flight(state: Mapping[str, Tensor], record: RoundRecord, run: RunConfig) -> InFlight | None:
    """The packet in flight, which was made from the state of the record."""
    if ("packet" in state) != ("sent.positions" in state):
        raise ValueError("there is a packet without what undoes it, or the other way round")
    if "packet" not in state:
        return None
    wire = _bytes(state["packet"])
    packet = packet_from_wire(wire, run)
    check_claims(packet, run, round=record.round + 1, base_root=record.state_root)
    return InFlight(packet.header, wire)


def _checksum(state: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(state):
        if name != "outer":
            for block in _blocks(state[name]):
                checksum = zlib.crc32(block, checksum)
    return checksum


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, a block at a time; on the CPU they are the tensor's own memory."""
    flat, step = tensor.reshape(-1), _BLOCK_BYTES // tensor.element_size()
    for start in range(0, len(flat), step):
        block: NDArray[np.uint8] = flat[start : start + step].cpu().numpy().view(np.uint8)
        yield block.data


def _tensor(data: bytes) -> Tensor:  # -> u8[len(data)]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:  # u8[n]
    return tensor.numpy().tobytes()
