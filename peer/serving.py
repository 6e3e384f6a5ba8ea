"""A peer that others can reach offers them what they need to join or to heal: states, updates and records, read-only.

It answers the same calls as an aggregator, as nobody but itself: who asks knows this peer's key from its signed record
in the directory, and checks every byte against the ledger. It keeps the state of every tenth round on the disk, and
small ones of the newest rounds in memory, because its own parameters change while somebody is still fetching them.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from peer.download import SMALL_STATE_BYTES, SNAPSHOT_ROUNDS
from peer.errors import UserCode, UserError, os_errors
from peer.net.messages import Amended, ReceiptMsg, RoundClosed, WatchEvent
from peer.net.service import Server, serve
from peer.net.throttle import Traffic
from peer.net.tls import TlsIdentity, is_loopback, make_tls_identity, split_address
from peer.store import BlobStore, StateStore, atomic_write
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.layout import piece_hashes, state_pieces
from protocol.ledger import RoundRecord
from protocol.run import RunConfig, SignedRun
from protocol.update import make_update
from protocol.wire import update_to_wire

log = structlog.get_logger()

SNAPSHOTS_KEPT = 2
STATES_IN_MEMORY = 2  # small ones; whoever began to fetch the last one may end


@dataclass(frozen=True)
class _Held:
    """A small state in memory; nobody writes to it."""

    root: bytes
    hashes: tuple[bytes, ...]
    pieces: dict[bytes, memoryview]

    @classmethod
    def of(cls, root: bytes, flat: NDArray[np.float32]) -> "_Held":  # flat: f32[N], copied
        own = flat.copy()
        hashes = tuple(piece_hashes(own))
        return cls(root, hashes, dict(zip(hashes, state_pieces(own), strict=True)))


@dataclass(frozen=True)
class _Offered:
    """What is offered at one moment, replaced as a whole. `records` go back to the oldest snapshot, newest last."""

    records: tuple[RoundRecord, ...] = ()
    held: tuple[_Held, ...] = ()

    def record(self, digest: bytes) -> RoundRecord | None:
        return next((record for record in self.records if record.digest == digest), None)


class Donor:
    """A peer as a source of states for others; `serve` in peer.net calls the handler methods."""

    submit_bytes_max = 1
    standby = True

    def __init__(self, signed: SignedRun, folder: Path) -> None:
        """`folder` holds snapshots and updates; it belongs to this object alone."""
        self._signed = signed
        self._run: RunConfig = signed.config
        self._states, self._blobs = StateStore(folder / "states"), BlobStore(folder / "blobs")
        self._snapshots: tuple[RoundRecord, ...] = ()
        self._now = _Offered()
        self.resting = False  # nothing is handed out

    def applied(
        self,
        record: RoundRecord,
        base_root: bytes,
        sections: Sequence[bytes] | None,
        flat: NDArray[np.float32],  # f32[N]
    ) -> None:
        """Offer the state `flat` after a round, and the update that led there from `base_root`. Blocks on the disk.

        `sections` are those of the update, none for a null round, None when the state was loaded.
        """
        run, now = self._run, self._now
        follows = sections is not None and bool(now.records) and record.previous == now.records[-1].digest
        records = (*now.records, record) if follows else (record,)
        if follows and sections:
            update = make_update(run, record.round, base_root, record.state_root, sections)
            self._blobs.put("update", record.update_digest.hex(), update_to_wire(update, run))
        if record.round % SNAPSHOT_ROUNDS == 0:
            self._states.save(flat, run.layout, {"run": run.name, "round": str(record.round)})
            self._snapshots = (*self._snapshots, record)[-SNAPSHOTS_KEPT:]
            self._states.keep({snapshot.state_root for snapshot in self._snapshots})
        first = self._snapshots[0].round if self._snapshots else record.round
        recent = tuple(item for item in records if item.round >= first)
        held = (_Held.of(record.state_root, flat),) if flat.nbytes <= SMALL_STATE_BYTES else ()
        self._now = _Offered(recent, (*now.held, *held)[-STATES_IN_MEMORY:])
        for item in records[: len(records) - len(recent)]:
            self._blobs.delete("update", item.update_digest.hex())

    # What the network asks for

    async def welcome(self, peer: bytes) -> bytes:
        """Whoever comes learns the newest record that this peer has."""
        records = self._now.records
        return records[-1].to_bytes() if records else b""

    async def joined(self, peer: bytes) -> None:
        """Nobody takes part in rounds here."""

    async def left(self, peer: bytes) -> None:
        """Nobody takes part in rounds here."""

    async def shown(self, peer: bytes, record: bytes, ad: bytes) -> None:
        """What others know is looked up in the directory."""

    async def watch(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        """The newest record, and nothing more: rounds are watched at the aggregator."""
        records = self._now.records
        if records:
            yield RoundClosed(records[-1].to_bytes())

    def observe(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        """The same as a watch."""
        return self.watch(peer)

    async def receipt(self, peer: bytes, digest: bytes) -> ReceiptMsg | None:
        """Nothing is known of packets here."""
        return None

    async def submit(self, peer: bytes, digest: bytes, data: bytes | Path) -> ReceiptMsg:
        """Packets go to the aggregator. Raises ProtocolError NOT_AN_AGGREGATOR."""
        raise ProtocolError(Code.NOT_AN_AGGREGATOR, "this is a peer: packets go to the aggregator")

    async def blob(self, kind: str, digest: bytes) -> bytes | Path | None:
        """Whatever somebody may fetch by its digest; None when it is not here."""
        now = self._now
        if self.resting:
            return None
        match kind:
            case "run":
                return self._signed.to_bytes() if digest == self._run.run_id else None
            case "record":
                record = now.record(digest)
                return None if record is None else record.to_bytes()
            case "update":
                return self._blobs.path("update", digest.hex())
            case "state":
                held = next((held for held in now.held if held.root == digest), None)
                return b"".join(held.hashes) if held else await asyncio.to_thread(self._states.hashes, digest)
            case "piece":
                piece = next((held.pieces[digest] for held in now.held if digest in held.pieces), None)
                return bytes(piece) if piece is not None else await asyncio.to_thread(self._states.piece, digest)
        return None

    async def amend(self, peer: bytes, data: bytes) -> Amended:
        """Amendments go to the aggregator. Raises ProtocolError NOT_AN_AGGREGATOR."""
        raise ProtocolError(Code.NOT_AN_AGGREGATOR, "this is a peer: amendments go to the aggregator")


async def serve_others(
    donor: Donor,
    address: str,
    run_id: bytes,
    key: PrivateKey,
    home: Path,
    *,
    plaintext: bool = False,
    traffic: Traffic | None = None,
) -> tuple[Server, bytes]:
    """Listen on the port of `address`; return the server and its certificate's fingerprint. Raises UserError.

    It listens on all interfaces, because behind a forwarded port `address` is the router's; on loopback only if that
    is what `address` names.
    """
    host, port = split_address(address)
    inside = host if is_loopback(host) else "0.0.0.0"  # noqa: S104 - whoever joins comes from anywhere
    tls = None if plaintext else await asyncio.to_thread(load_or_make_tls, home / "tls.pem")
    try:
        server = await serve(
            donor, host=inside, port=port, key=key, run_id=run_id, tls=tls, spool=home / "spool", traffic=traffic
        )
    except (OSError, ValueError) as error:
        raise UserError(
            UserCode.PORT_IN_USE, f"cannot listen on {inside}:{port} ({error})", "name another port with --serve"
        ) from error
    log.info("serving", address=address, port=server.port)
    return server, tls.fingerprint if tls else bytes(32)


def load_or_make_tls(path: Path) -> TlsIdentity:
    """The certificate in this file, made on first use. Raises UserError."""
    if not path.exists():
        atomic_write(path, make_tls_identity().to_bytes(), mode=0o600)
    with os_errors(path):
        data = path.read_bytes()
    try:
        return TlsIdentity.from_bytes(data)
    except ValueError as error:
        raise UserError(UserCode.BAD_KEY_FILE, f"{path}: {error}", f"delete {path}; a new one is made") from error
