"""The aggregator: takes packets in, closes rounds, merges exactly, signs the ledger and serves what peers fetch.

`AggregatorRound` decides when a round closes; this program performs what it decides. Nothing is acknowledged before it
is durable: a packet before its receipt, a record before its broadcast. After a restart the journal and the blobs give
back the head, the parameters and the packets of the open round.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from peer.bootstrap import wait_for_stop
from peer.core import codec
from peer.errors import UserCode, UserError
from peer.find import DHT_TTL_S
from peer.journal import PacketRow, RecordRow
from peer.merge import accepted, check_contents, merge_packets
from peer.net.directory import DirectoryError, open_directory
from peer.net.errors import LinkError
from peer.net.messages import ReceiptMsg, RoundClosed, RoundEvent, RoundOpened
from peer.net.service import Server, serve
from peer.net.tls import TlsIdentity, split_address
from peer.operator import OperatorFolder
from peer.replay import replay
from peer.store import Home, RunFolder, load_key
from protocol.arithmetic import weight_of
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, PrivateKey, merkle_root_of_hashes
from protocol.invite import Invite
from protocol.layout import piece_hashes, state_pieces
from protocol.ledger import Entry, Kind, RoundRecord, Verdict, genesis_record, sign_record
from protocol.limits import CLIP_ONE
from protocol.packet import PacketHeader, check_claims
from protocol.records import Ad, DhtKind, aggregators_key, make_dht_record
from protocol.round import (
    Accept,
    AggregatorEvent,
    AggregatorRound,
    Arrived,
    Close,
    Joined,
    Left,
    Refused,
    Reject,
    Submission,
    Tick,
    WakeAt,
)
from protocol.run import RunConfig, SignedRun
from protocol.update import make_update
from protocol.wire import bundle_to_wire, packet_from_wire, packet_wire_bytes_max, update_to_wire

log = structlog.get_logger()

SNAPSHOT_ROUNDS = 10  # a joiner replays at most this many updates
SNAPSHOTS_KEPT = 3
STATES_IN_MEMORY = 2
KEEP_ROUNDS = 1000
BLOB_BYTES_MAX = 8 << 30
WATCH_QUEUE_MAX = 64
RETRY_S = 10.0


class HeldState:
    """Outer parameters held in memory, cut into the pieces that joiners fetch."""

    def __init__(self, flat: NDArray[np.float32]) -> None:  # f32[N]
        self.flat = flat
        self.hashes = piece_hashes(flat)
        self.root = merkle_root_of_hashes(self.hashes)
        self.pieces = dict(zip(self.hashes, state_pieces(flat), strict=True))


class Aggregator:
    """One run as its aggregator sees it; `serve` in peer.net calls the handler methods."""

    def __init__(self, signed: SignedRun, key: PrivateKey, folder: RunFolder) -> None:
        self.run: RunConfig = signed.config
        self.submit_bytes_max = packet_wire_bytes_max(self.run)
        self.finished = asyncio.Event()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._signed = signed
        self._key = key
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._watchers: dict[bytes, set[asyncio.Queue[RoundEvent]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._states: deque[HeldState] = deque(maxlen=STATES_IN_MEMORY)
        self.head = self._recover()
        self.round = AggregatorRound(
            self.run,
            self.head.round + 1,
            self.head.state_root,
            self._loop.time(),
            taken_up=self._packets_of_open_round(),
        )
        self._opened_ms = now_ms()
        if self.head.round >= self.run.outer.rounds:
            self.finished.set()
        else:
            self._handle(Tick())

    # What the network asks for

    async def welcome(self, peer: bytes) -> bytes:
        """Every peer of the run is welcome; it learns the head of the ledger."""
        return self.head.to_bytes()

    async def joined(self, peer: bytes) -> None:
        """A peer watches the rounds."""
        log.info("peer joined", peer=peer, members=len(self.round.members) + 1)
        self._handle(Joined(peer))

    async def left(self, peer: bytes) -> None:
        """A peer's link is gone."""
        self._handle(Left(peer))
        log.info("peer left", peer=peer, members=len(self.round.members))

    async def watch(self, peer: bytes) -> AsyncGenerator[RoundEvent, None]:
        """The open round, or the last record of a finished run, and then everything that happens."""
        queue: asyncio.Queue[RoundEvent] = asyncio.Queue(WATCH_QUEUE_MAX)
        self._watchers.setdefault(peer, set()).add(queue)
        try:
            # The head first: its round may have closed between this peer's welcome and its watch.
            events: list[RoundEvent] = [self._closed_event()]
            if not self.finished.is_set() and not self.round.closed:
                events.append(self._opened_event())
            for event in events:
                yield event
            while True:
                yield await queue.get()
        finally:
            watches = self._watchers[peer]
            watches.discard(queue)
            if not watches:
                del self._watchers[peer]

    async def submit(self, peer: bytes, digest: bytes, data: bytes | Path) -> ReceiptMsg:
        """Check a packet, keep it durably, and answer whether it counts."""
        known = self._folder.journal.packet(digest)
        if known is not None and known.verdict is not None:
            return ReceiptMsg(digest, known.verdict == Verdict.ACCEPTED, known.code)
        round = self.round
        code = round.refusal(peer, digest)
        if code is not None:
            return ReceiptMsg(digest, False, code)
        try:
            header = await asyncio.to_thread(self._check_and_keep, peer, digest, data, round)
        except ProtocolError as error:
            log.warning("packet refused", peer=peer, round=round.round, code=int(error.code), why=error.detail)
            if round is self.round and error.code not in (Code.LATE, Code.WRONG_DIGEST, Code.NOT_A_MEMBER):
                self._handle(Refused(peer, digest, error.code))
            return ReceiptMsg(digest, False, error.code)
        if round is not self.round:
            return ReceiptMsg(digest, False, Code.LATE)
        receipt = self._handle(Arrived(peer, digest, header.tokens, header.inner_steps)).get(digest)
        assert receipt is not None, "the machine answers every packet"
        log.info("packet", peer=peer, round=round.round, accepted=receipt.accepted, code=receipt.code)
        return receipt

    async def blob(self, kind: str, digest: bytes) -> bytes | Path | None:
        """Whatever a peer may fetch by its digest; None when it is not here."""
        if kind == "run":
            return self._signed.to_bytes() if digest == self.run.run_id else None
        if kind == "record":
            row = self._folder.journal.record_by_digest(digest)
            return None if row is None else row.data
        if kind in ("packet", "update", "bundle"):
            return self._folder.blobs.path(kind, digest.hex())
        if kind == "state":
            held = next((state for state in self._states if state.root == digest), None)
            return b"".join(held.hashes) if held else self._folder.states.hashes(digest)
        if kind == "piece":
            piece = next((state.pieces[digest] for state in self._states if digest in state.pieces), None)
            return bytes(piece) if piece is not None else self._folder.states.piece(digest)
        return None

    async def close(self) -> None:
        """Stop timers and let a merge under way finish."""
        if self._timer is not None:
            self._timer.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # The round machine

    def _handle(self, event: AggregatorEvent) -> dict[bytes, ReceiptMsg]:
        """Feed one event, perform the effects and return the receipts among them by packet digest."""
        receipts: dict[bytes, ReceiptMsg] = {}
        for effect in self.round.handle(event, self._loop.time()):
            match effect:
                case Accept():
                    receipts[effect.digest] = ReceiptMsg(effect.digest, True, 0)
                case Reject():
                    receipts[effect.digest] = ReceiptMsg(effect.digest, False, effect.code)
                case WakeAt():
                    if self._timer is not None:
                        self._timer.cancel()
                    self._timer = self._loop.call_at(effect.at_s, self._tick)
                case Close():
                    task = self._loop.create_task(self._close_round(effect))
                    self._tasks.add(task)
                    task.add_done_callback(self._closed_task)
        return receipts

    def _tick(self) -> None:
        if not self.round.closed and not self.finished.is_set():
            self._handle(Tick())

    def _closed_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def _close_round(self, close: Close) -> None:
        record, state = await asyncio.to_thread(self._settle, close)
        self.head = record
        if state is not self._states[-1]:
            self._states.append(state)
        log.info(
            "round closed",
            round=record.round,
            kind=record.kind.name.lower(),
            reason=record.reason.name.lower(),
            accepted=len(accepted(record.entries)),
            packets=len(record.entries),
            seconds=(record.closed_ms - record.opened_ms) / 1000,
            state_root=record.state_root.hex(),
        )
        self._broadcast(self._closed_event())
        if record.round >= self.run.outer.rounds:
            self.finished.set()
            log.info("run complete", rounds=record.round, state_root=record.state_root.hex())
            return
        self.round = self.round.next(record.state_root, self._loop.time())
        self._opened_ms = now_ms()
        self._broadcast(self._opened_event())
        self._handle(Tick())

    def _opened_event(self) -> RoundOpened:
        left_s = max(0.0, self.round.deadline_at_s - self._loop.time())
        return RoundOpened(self.round.round, self.round.base_root, self.run.inner.steps, left_s)

    def _closed_event(self) -> RoundClosed:
        blobs, head = self._folder.blobs, self.head
        update_bytes = blobs.size("update", head.update_digest.hex())
        return RoundClosed(head.to_bytes(), update_bytes, blobs.size("bundle", head.digest.hex()))

    def _broadcast(self, event: RoundEvent) -> None:
        for queues in self._watchers.values():
            for queue in queues:
                # A watcher that has not read 64 events is stuck; it learns the head when it reads on or rejoins.
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(event)

    # Work in a thread

    def _check_and_keep(self, peer: bytes, digest: bytes, data: bytes | Path, round: AggregatorRound) -> PacketHeader:
        raw = data if isinstance(data, bytes) else data.read_bytes()
        packet = packet_from_wire(raw, self.run)
        header = packet.header
        if header.digest != digest:
            raise ProtocolError(Code.WRONG_DIGEST, "the bytes are another packet than the one announced")
        if header.peer != peer:
            raise ProtocolError(Code.NOT_A_MEMBER, "the packet was made by another peer than the one that sends it")
        if header.round < round.round:
            raise ProtocolError(Code.LATE, f"round {header.round} has closed")
        check_claims(packet, self.run, round=round.round, base_root=round.base_root)
        check_contents(packet, self.run)
        self._folder.blobs.put("packet", digest.hex(), raw)
        row = PacketRow(digest, header.round, peer, header.tokens, header.inner_steps, now_ms())
        self._folder.journal.add_packet(row)
        return header

    def _settle(self, close: Close) -> tuple[RoundRecord, HeldState]:
        """Merge, apply, write the update, the record and now and then the state; all durable on return."""
        state, update_digest = self._states[-1], NO_DIGEST
        entries = tuple(self._entry(submission) for submission in close.submissions)
        if close.kind == Kind.APPLIED:
            state, update_digest = self._merge(accepted(entries))
        record = sign_record(
            RoundRecord(
                run_id=self.run.run_id,
                round=self.round.round,
                epoch=0,
                previous=self.head.digest,
                kind=close.kind,
                reason=close.reason,
                state_root=state.root,
                update_digest=update_digest,
                opened_ms=self._opened_ms,
                closed_ms=max(now_ms(), self._opened_ms),
                entries=entries,
            ),
            self._key,
        )
        snapshot = record.round % SNAPSHOT_ROUNDS == 0 or record.round >= self.run.outer.rounds
        if snapshot:
            self._snapshot(state.flat, record.round)
        self._append(record)
        if record.kind == Kind.APPLIED:
            self._choose_form(record)
        if snapshot:
            # It looks at every blob, so not in every round.
            self._folder.forget(keep_rounds=KEEP_ROUNDS, blob_bytes_max=BLOB_BYTES_MAX)
        return record, state

    def _merge(self, entries: Sequence[Entry]) -> tuple[HeldState, bytes]:
        packets = []
        for entry in entries:
            packet = packet_from_wire(self._stored_packet(entry), self.run)
            # A second time, for what lay on a disk may have rotted there.
            check_claims(packet, self.run, round=self.round.round, base_root=self.round.base_root)
            packets.append(packet)
        sections = merge_packets(packets, entries, self.run)
        flat = self._states[-1].flat.copy()
        codec.outer_step(torch.from_numpy(flat), self.run.layout, sections)
        state = HeldState(flat)
        update = make_update(self.run, self.round.round, self.round.base_root, state.root, sections)
        self._folder.blobs.put("update", update.header.digest.hex(), update_to_wire(update, self.run))
        return state, update.header.digest

    def _choose_form(self, record: RoundRecord) -> None:
        """Offer the accepted packets together as a bundle where they are smaller than their update.

        The journal has the record already, so that every bundle on the disk belongs to one. After a crash in between
        there is the update alone, which is always there.
        """
        blobs, entries = self._folder.blobs, accepted(record.entries)
        update_bytes = blobs.size("update", record.update_digest.hex())
        bundle_bytes = sum(4 + blobs.size("packet", entry.packet_digest.hex()) for entry in entries)
        smaller = bundle_bytes < update_bytes
        if smaller:
            blobs.put("bundle", record.digest.hex(), bundle_to_wire([self._stored_packet(entry) for entry in entries]))
        log.info(
            "broadcast",
            round=record.round,
            form="bundle" if smaller else "update",
            update_bytes=update_bytes,
            bundle_bytes=bundle_bytes,
            why=f"{len(entries)} packets together are {'smaller' if smaller else 'not smaller'} than their update",
        )

    def _stored_packet(self, entry: Entry) -> bytes:
        raw = self._folder.blobs.get("packet", entry.packet_digest.hex())
        assert raw is not None, "an accepted packet is on the disk"
        return raw

    def _entry(self, submission: Submission) -> Entry:
        accepted = submission.verdict == Verdict.ACCEPTED
        return Entry(
            submission.peer,
            submission.digest,
            submission.verdict,
            submission.code,
            submission.tokens,
            submission.inner_steps,
            weight_of(submission.tokens, self.run.nominal_tokens) if accepted else 0,
            CLIP_ONE if accepted else 0,
        )

    def _append(self, record: RoundRecord) -> None:
        row = RecordRow(record.round, record.digest, record.state_root, record.update_digest, record.to_bytes())
        verdicts = {entry.packet_digest: (int(entry.verdict), entry.code) for entry in record.entries}
        self._folder.journal.close_round(row, verdicts)

    def _snapshot(self, flat: NDArray[np.float32], round: int) -> None:  # flat: f32[N]
        states, journal = self._folder.states, self._folder.journal
        root = states.save(flat, self.run.layout, {"run": self.run.name, "round": str(round)})
        first = max(0, round - SNAPSHOT_ROUNDS * SNAPSHOTS_KEPT)
        recent = {row.state_root for row in journal.records(first, round)}
        states.keep({self.run.genesis_root, root, *recent})

    # After a restart

    def _recover(self) -> RoundRecord:
        """Load the head and the parameters that belong to it, or begin the ledger."""
        journal, states = self._folder.journal, self._folder.states
        row = journal.head()
        if row is None:
            self._states.append(HeldState(states.load(self.run.genesis_root, self.run.layout)))
            record = genesis_record(self.run, self._key, now_ms())
            self._append(record)
            return record
        start = row.round
        while not states.has(journal.records(start, start)[0].state_root):
            start -= 1
        _, flat = deque(replay(self._folder, self.run, start, row.round), maxlen=1).pop()
        self._states.append(HeldState(flat))
        log.info("continuing", round=row.round, state_root=row.state_root.hex())
        return RoundRecord.from_bytes(row.data)

    def _packets_of_open_round(self) -> list[Arrived]:
        """Packets that had their receipts before a crash still count."""
        rows = self._folder.journal.packets(self.head.round + 1)
        return [Arrived(row.peer, row.digest, row.tokens, row.inner_steps) for row in rows]


def now_ms() -> int:
    """The wall clock, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


async def aggregate(
    folder: OperatorFolder, stop: asyncio.Event, *, listen: str | None = None, plaintext: bool = False
) -> None:
    """Run the aggregator of a run folder until `stop`. Raises UserError."""
    signed, invite = folder.load()
    home = Home(folder.aggregator_home)
    everywhere = "127.0.0.1" if plaintext else "0.0.0.0"  # noqa: S104 - volunteers come from anywhere
    try:
        host, port = split_address(listen or f"{everywhere}:{split_address(invite.addresses[0])[1]}")
    except LinkError as error:
        raise UserError(UserCode.BAD_ARGUMENT, error.reason, "write --listen HOST:PORT") from error
    with home.lock():
        key = load_key(home.key_path)
        store = home.run(signed.config.run_id)
        program = Aggregator(signed, key, store)
        server = await _serve(program, home, host, port, key, None if plaintext else folder.tls())
        path, _, why = codec.kernels_in_use(torch.device("cpu")).partition(": ")
        log.info("kernels", path=path, why=why)
        log.info("aggregator ready", run=signed.config.name, port=server.port, round=program.head.round)
        advert = asyncio.create_task(_advertise(program, invite, key, stop))
        stopped = asyncio.create_task(stop.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {stopped, program.failed, advert}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if program.failed.done():
                program.failed.result()
        finally:
            stop.set()
            stopped.cancel()
            await server.close()
            await program.close()
            await asyncio.gather(advert, return_exceptions=True)
            log.info("aggregator left", round=program.head.round, state_root=program.head.state_root.hex())
            store.close()


async def _serve(
    program: Aggregator, home: Home, host: str, port: int, key: PrivateKey, tls: TlsIdentity | None
) -> Server:
    try:
        return await serve(
            program, host=host, port=port, key=key, run_id=program.run.run_id, tls=tls, spool=home.path / "spool"
        )
    except OSError as error:
        raise UserError(
            UserCode.PORT_IN_USE,
            f"cannot listen on {host}:{port} ({error})",
            "stop the program that uses this port, or name another with --listen HOST:PORT",
        ) from error
    except ValueError as error:
        raise UserError(
            UserCode.BAD_ARGUMENT, str(error), "listen on 127.0.0.1, or leave --plaintext-local away"
        ) from error


async def _advertise(program: Aggregator, invite: Invite, key: PrivateKey, stop: asyncio.Event) -> None:
    """Keep our signed address and the head of the ledger in the directory; the run goes on without it."""
    directory = await open_directory(
        identity=None,
        run_ids=[program.run.run_id],
        aggregators={program.run.run_id: frozenset(program.run.aggregators)},
        bootstraps=invite.bootstraps,
        listen=None,
        notice=lambda text: log.warning("directory", notice=text),
    )
    log.info("directory", kind=directory.kind, why=directory.reason)
    dht_key = aggregators_key(program.run.run_id)
    try:
        while not stop.is_set():
            wait_s = DHT_TTL_S / 3
            expires_s = int(time.time()) + DHT_TTL_S
            ad = Ad(invite.addresses, invite.certificate_sha256, program.head.round, program.head.digest).to_payload()
            value = make_dht_record(key, dht_key, DhtKind.AGGREGATOR, ad, expires_s)
            try:
                await directory.publish(dht_key, key.public, value, expires_s)
                log.info("advertised", kind=directory.kind, addresses=list(invite.addresses))
            except DirectoryError as error:
                log.warning("not advertised", why=str(error))
                wait_s = RETRY_S
            await wait_for_stop(stop, wait_s)
    finally:
        await directory.close()
