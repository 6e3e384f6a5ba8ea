"""`sparseloco-peer inspect`: says what a file of this project holds, and never shows a secret.

A file is known by how it begins. Only the head of large files is read, except for what a check needs in full.
"""

import json
import math
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from peer.amendments import describe
from peer.errors import UserCode, UserError, os_errors
from protocol.amendment import Amendment
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey, leaf_hash, merkle_root_of_hashes
from protocol.invite import Invite
from protocol.ledger import RoundRecord, check_record
from protocol.limits import (
    AMENDMENT_BYTES_MAX,
    CONTRIBUTORS_MAX,
    INVITE_CHARS_MAX,
    PIECE_BYTES,
    RECORD_BYTES_MAX,
    RUN_BYTES_MAX,
)
from protocol.packet import PACKET_HEADER_BYTES, PacketHeader, check_packet
from protocol.run import RunConfig, SignedRun
from protocol.update import UPDATE_HEADER_BYTES, UpdateHeader, check_update
from protocol.wire import packet_from_wire, packet_wire_bytes_max, update_from_wire, update_wire_bytes_max

HEAD_BYTES = 256
SAFETENSORS_HEADER_BYTES_MAX = 100 << 20  # the limit of the format itself
SUMMARY_BYTES_MAX = 1 << 20
_PACKET = b"SLPK"
_KEY_WORD = b"sparseloco-peer-key-1"
_OTHER = (
    "name a run.bin, packet, update, bundle, record, amendment, invite, key, state (.safetensors), token shard or"
    " summary.json"
)


def inspect(file: Path, run: Path | None) -> list[str]:
    """Describe a file line by line; with `run` packets and updates are decoded in full.

    Raises UserError or ProtocolError when the file is none of ours, damaged or from another run.
    """
    with os_errors(file), file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
        size = file.stat().st_size
    config = None if run is None else _read_run(run).config
    if head[:4] in _BINARY:
        return _BINARY[head[:4]](file, size, config)
    if head[4:8] == _PACKET:
        return _bundle(file, size)
    if head.startswith(_KEY_WORD):
        return _key(file, size)
    if head.lstrip().startswith(b"slp"):
        return _invite(file, size)
    if head.lstrip().startswith(b"{"):
        return _summary(file, size)
    if head[8:9] == b"{":
        return _state(file, size)
    raise UserError(UserCode.BAD_FILE, f"{file} is no file of this project", _OTHER)


def _bytes_of(file: Path, size: int, bytes_max: int, what: str) -> bytes:
    """Read a whole file that must be small. Raises ProtocolError TOO_LARGE before anything is read."""
    if size > bytes_max:
        raise ProtocolError(Code.TOO_LARGE, f"{what} has at most {bytes_max} bytes, this file has {size}")
    with os_errors(file):
        return file.read_bytes()


def _damaged(file: Path, why: str) -> UserError:
    return UserError(UserCode.BAD_FILE, f"{file} is damaged: {why}", "copy it again from where it came")


def _read_run(file: Path) -> SignedRun:
    with os_errors(file):
        size = file.stat().st_size
    return SignedRun.from_bytes(_bytes_of(file, size, RUN_BYTES_MAX + 1024, "a signed run"), run_id=None)


def _time(ms: int) -> str:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return f"{ms} ms after 1970"


def _run(file: Path, size: int, _config: RunConfig | None) -> list[str]:
    signed = _read_run(file)
    run = signed.config
    return [
        f"signed run {run.name!r}, {size:,} bytes, signature valid",
        f"run_id        {run.run_id.hex()}",
        f"operator      {run.operator.hex()}",
        *(f"aggregator    {key.hex()}" for key in run.aggregators),
        f"parameters    {run.layout.size:,} in {len(run.layout.tensors)} tensors",
        f"rounds        {run.outer.rounds} of {run.inner.steps} inner steps, {run.nominal_tokens:,} tokens each",
        f"packet        at most {packet_wire_bytes_max(run):,} bytes",
        f"update        at most {update_wire_bytes_max(run):,} bytes",
        f"genesis root  {run.genesis_root.hex()}",
    ]


def _packet(file: Path, size: int, run: RunConfig | None) -> list[str]:
    with os_errors(file), file.open("rb") as opened:
        header = PacketHeader.from_bytes(opened.read(PACKET_HEADER_BYTES))
    lines = [
        f"packet, {size:,} bytes",
        f"digest        {header.digest.hex()}",
        f"run_id        {header.run_id.hex()}",
        f"round         {header.round}",
        f"peer          {header.peer.hex()}",
        f"base root     {header.base_root.hex()}",
        f"claims        {header.tokens:,} tokens in {header.inner_steps} inner steps",
    ]
    if run is None:
        return [*lines, "not checked   name the run with --run run.bin to decode it in full"]
    data = _bytes_of(file, size, packet_wire_bytes_max(run), "a packet of this run")
    tensors = check_packet(packet_from_wire(data, run), run, round=header.round, base_root=header.base_root)
    return [*lines, *_values(size, sum(tensor.indices.size for tensor in tensors), run), "signature     valid"]


def _bundle(file: Path, size: int) -> list[str]:
    """The packets of a round as an aggregator offers them together (SPEC 11); only their headers are read."""
    lines, start = list[str](), 0
    with os_errors(file), file.open("rb") as opened:
        while start < size:
            opened.seek(start)
            packet_bytes = int.from_bytes(opened.read(4), "little")
            start += 4 + packet_bytes
            header = PacketHeader.from_bytes(opened.read(min(packet_bytes, PACKET_HEADER_BYTES)))
            if start > size or len(lines) == CONTRIBUTORS_MAX:
                raise _damaged(file, "it ends inside a packet, or holds more packets than a round has")
            lines.append(
                f"  packet {header.digest.hex()[:16]} peer {header.peer.hex()[:16]} round {header.round} "
                f"tokens {header.tokens:,} steps {header.inner_steps}, {packet_bytes:,} bytes"
            )
    return [f"bundle of {len(lines)} packets, {size:,} bytes, not checked", *lines]


def _update(file: Path, size: int, run: RunConfig | None) -> list[str]:
    with os_errors(file), file.open("rb") as opened:
        header = UpdateHeader.from_bytes(opened.read(UPDATE_HEADER_BYTES))
    lines = [
        f"update, {size:,} bytes",
        f"digest        {header.digest.hex()}",
        f"run_id        {header.run_id.hex()}",
        f"round         {header.round}",
        f"base root     {header.base_root.hex()}",
        f"new root      {header.new_root.hex()}",
    ]
    if run is None:
        return [*lines, "not checked   name the run with --run run.bin to decode it in full"]
    data = _bytes_of(file, size, update_wire_bytes_max(run), "an update of this run")
    tensors = check_update(update_from_wire(data, run), run, digest=header.digest)
    return [*lines, *_values(size, sum(tensor.indices.size for tensor in tensors), run)]


def _values(size: int, count: int, run: RunConfig) -> list[str]:
    share = 100 * count / run.layout.size
    lines = [f"values        {count:,} of {run.layout.size:,} ({share:.2f} %)"]
    return [*lines, f"bits a value  {8 * size / count:.2f}, everything included"] if count else lines


def _record(file: Path, size: int, run: RunConfig | None) -> list[str]:
    record = RoundRecord.from_bytes(_bytes_of(file, size, RECORD_BYTES_MAX, "a round record"))
    if run is not None:
        check_record(record, run)
    return [
        f"round record, {size:,} bytes" + (", valid in this run" if run is not None else ""),
        f"digest        {record.digest.hex()}",
        f"run_id        {record.run_id.hex()}",
        f"round         {record.round}, epoch {record.epoch}",
        f"kind          {record.kind.name.lower()}, closed by {record.reason.name.lower()}",
        f"previous      {record.previous.hex()}",
        f"state root    {record.state_root.hex()}",
        f"update        {record.update_digest.hex()}",
        f"amendment     {record.amendment.hex()}",
        f"opened        {_time(record.opened_ms)}",
        f"closed        {_time(record.closed_ms)}",
        f"aggregator    {record.aggregator.hex()}",
        *_evaluated(record),
        f"entries       {len(record.entries)}",
        *(
            f"  {entry.verdict.name.lower():8} peer {entry.peer.hex()[:16]} packet {entry.packet_digest.hex()[:16]} "
            f"code {entry.code} tokens {entry.tokens:,} steps {entry.inner_steps} "
            f"weight {entry.weight} clip {entry.clip}"
            for entry in record.entries
        ),
    ]


def _evaluated(record: RoundRecord) -> list[str]:
    if not record.loss_micronats:
        return []
    return [f"loss          {record.loss_micronats / 1e6:.6f} nats a token after round {record.evaluated_round}"]


def _amendment(file: Path, size: int, run: RunConfig | None) -> list[str]:
    data = _bytes_of(file, size, AMENDMENT_BYTES_MAX, "an amendment")
    if run is None:
        remedy = "name the run with --run run.bin: the signature in it is checked against the run's operator"
        raise UserError(UserCode.BAD_ARGUMENT, f"{file} is an amendment of some run", remedy)
    amendment = Amendment.from_bytes(data, run)
    return [
        f"amendment {amendment.number}, {size:,} bytes, signature valid",
        f"digest        {amendment.digest.hex()}",
        f"previous      {amendment.previous.hex()}",
        f"says          {describe(amendment)}",
    ]


def _shard(file: Path, size: int, _config: RunConfig | None) -> list[str]:
    from peer.data.shards import open_shard  # noqa: PLC0415  only this kind needs the data room

    try:
        shard = open_shard(file)
    except ValueError as error:
        raise UserError(UserCode.BAD_FILE, str(error), "copy the shard again or make it anew") from error
    return [
        f"token shard, {size:,} bytes",
        f"tokens        {shard.tokens.size:,} of type {shard.tokens.dtype.name}",
        f"vocabulary    {shard.vocab_size:,}",
        f"sha256        {shard.sha256} (as the header says; not checked)",
    ]


def _key(file: Path, size: int) -> list[str]:
    data = _bytes_of(file, size, 1024, "a key file")
    try:
        key = PrivateKey.from_text(data.decode("ascii"))
    except ValueError as error:
        remedy = f"restore {file} from a backup, or delete it to get a new identity"
        raise UserError(UserCode.BAD_KEY_FILE, f"{file} holds no usable private key", remedy) from error
    return ["private key (not shown)", f"public key    {key.public.hex()}"]


def _invite(file: Path, size: int) -> list[str]:
    data = _bytes_of(file, size, 2 * INVITE_CHARS_MAX, "an invite")
    invite = Invite.from_text(data.decode("utf-8", errors="replace"))
    return [
        "invite",
        f"run_id        {invite.run_id.hex()}",
        f"aggregator    {invite.aggregator_key.hex()}",
        f"certificate   {invite.certificate_sha256.hex()}",
        *(f"address       {address}" for address in invite.addresses),
        *(f"bootstrap     {bootstrap}" for bootstrap in invite.bootstraps),
    ]


def _state(file: Path, size: int) -> list[str]:
    with os_errors(file), file.open("rb") as opened:
        (header_bytes,) = struct.unpack("<Q", opened.read(8))
    if header_bytes > min(size - 8, SAFETENSORS_HEADER_BYTES_MAX):
        raise _damaged(file, "it ends inside its header")
    try:
        with os_errors(file), safe_open(file, framework="numpy") as tensors:
            slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118 - it is no dictionary
            shapes = [tuple(part.get_shape()) for part in slices]
            float32 = all(part.get_dtype() == "F32" for part in slices)
            metadata = tensors.metadata() or {}
    except SafetensorError as error:
        raise _damaged(file, str(error)) from error
    lines = [
        f"parameters in safetensors form, {size:,} bytes",
        f"tensors       {len(shapes)}",
        f"parameters    {sum(math.prod(shape) for shape in shapes):,}",
        *(f"{name.replace('_', ' '):13} {value} (as the file says)" for name, value in sorted(metadata.items())),
    ]
    if float32 and shapes:
        root = _state_root(file, 8 + header_bytes).hex()
        lines.append(f"computed root {root}")
        if metadata.get("state_root", root) != root:
            raise _damaged(file, "its parameters do not have the state root that it names")
    return lines


def _state_root(file: Path, start: int) -> bytes:
    """The state root of the parameters that begin here, read piece by piece."""
    with os_errors(file), file.open("rb") as opened:
        opened.seek(start)
        hashes = [leaf_hash(piece) for piece in iter(lambda: opened.read(PIECE_BYTES), b"")]
    return merkle_root_of_hashes(hashes)


def _summary(file: Path, size: int) -> list[str]:
    data = _bytes_of(file, size, SUMMARY_BYTES_MAX, "a summary")
    try:
        summary: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "it is not JSON") from error
    if not isinstance(summary, dict) or "final_val_loss" not in summary:
        raise UserError(UserCode.BAD_FILE, f"{file} is JSON, but no summary of a run", _OTHER)
    return ["summary of a run", *(f"{name:28} {value}" for name, value in summary.items())]


_BINARY: dict[bytes, Callable[[Path, int, RunConfig | None], list[str]]] = {
    b"SLRN": _run,
    _PACKET: _packet,
    b"SLUP": _update,
    b"SLRR": _record,
    b"SLAM": _amendment,
    b"SLTK": _shard,
}
