"""The aggregator: takes packets in, closes rounds, merges exactly, signs the ledger and serves what peers fetch.

`AggregatorRound` decides when a round closes; this program performs what it decides. Nothing is acknowledged before it
is durable: a packet before its receipt, a record before its broadcast. After a restart the journal and the blobs give
back the head, the parameters and the packets of the open round. Which of several aggregators leads is decided in
peer.standby; the one that does not has no `Aggregator`.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from peer.amendments import describe, keep_waiting, stored_amendments, with_waiting
from peer.core import codec
from peer.download import SNAPSHOT_ROUNDS
from peer.find import AdBook
from peer.journal import PacketRow, RecordRow
from peer.merge import accepted, check_contents, merge_packets
from peer.net.messages import Aggregators, Amended, PacketStored, ReceiptMsg, RoundClosed, RoundOpened, WatchEvent
from peer.replay import stored_state
from peer.store import RunFolder
from protocol.amendment import Amendment, Amendments, Rollback
from protocol.arithmetic import weight_of
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, PrivateKey, merkle_root_of_hashes
from protocol.layout import piece_hashes, state_pieces
from protocol.ledger import Entry, Kind, RoundRecord, Verdict, check_record, genesis_record, sign_record
from protocol.limits import AMENDMENTS_PER_RECORD_MAX, CLIP_ONE
from protocol.packet import PACKET_HEADER_BYTES, PacketHeader, check_claims
from protocol.round import (
    Accept,
    AggregatorEvent,
    AggregatorRound,
    ArrivalHistory,
    Arrived,
    Close,
    Joined,
    Left,
    Refused,
    Reject,
    RolledBack,
    Submission,
    Tick,
    WakeAt,
)
from protocol.run import RunConfig, SignedRun
from protocol.standby import next_epoch
from protocol.update import make_update
from protocol.wire import bundle_to_wire, packet_from_wire, packet_wire_bytes_max, update_to_wire

log = structlog.get_logger()

SNAPSHOTS_KEPT = 3
STATES_IN_MEMORY = 2
KEEP_ROUNDS = 1000
BLOB_BYTES_MAX = 8 << 30
WATCH_QUEUE_MAX = 64
OBSERVER_QUEUE_MAX = 2048  # the packets of a whole round
HISTORY_ROUNDS = 8


class SupersededError(Exception):
    """Another aggregator leads the run, so this one signs nothing more."""


@dataclass(frozen=True)
class Evaluation:
    """The validation loss of the state after a round, in 1e-6 nats a token."""

    round: int
    loss_micronats: int


_NO_EVALUATION = Evaluation(0, 0)


class HeldState:
    """Outer parameters held in memory, cut into the pieces that joiners fetch."""

    def __init__(self, flat: NDArray[np.float32]) -> None:  # f32[N]
        self.flat = flat
        self.hashes = piece_hashes(flat)
        self.root = merkle_root_of_hashes(self.hashes)
        self.pieces = dict(zip(self.hashes, state_pieces(flat), strict=True))


class Aggregator:
    """One run as the aggregator that leads it sees it; `serve` in peer.net calls the handler methods.

    It goes on in the epoch of its own newest record, or else opens the next one of its own, at least `epoch`.
    """

    standby = False

    def __init__(
        self, signed: SignedRun, key: PrivateKey, folder: RunFolder, *, book: AdBook | None = None, epoch: int = 0
    ) -> None:
        self.run: RunConfig = signed.config  # as it was signed; `round.run` has the settings of the open round
        self.finished = asyncio.Event()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.superseded: asyncio.Future[RoundRecord] = asyncio.get_running_loop().create_future()
        # Whoever measures it puts it here; the next record says it, once.
        self.evaluation: Evaluation | None = None
        self._book = book or AdBook(signed.config.run_id)
        self._signed = signed
        self._key = key
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._watchers: dict[bytes, set[asyncio.Queue[WatchEvent]]] = {}
        self._observers: set[asyncio.Queue[WatchEvent]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._states: deque[HeldState] = deque(maxlen=STATES_IN_MEMORY)
        self.head = self._recover()
        ours = self.head.aggregator == key.public
        own_epoch = self.head.epoch if ours else next_epoch(self.run.aggregators, key.public, self.head.epoch)
        self.epoch = max(epoch, own_epoch)
        # What the head names, and what waits for the next record.
        named = stored_amendments(folder.blobs, Amendments(self.run), self.head.amendment)
        self._amendments = with_waiting(folder, named, self.head.round + 1)
        self._amending = asyncio.Lock()
        self._banned = self._amendments.banned_at(self.head.round + 1)
        self.round = self._first_round()
        self.submit_bytes_max = packet_wire_bytes_max(self.round.run)
        self._opened_ms, self._opened_s = now_ms(), self._loop.time()
        self._closed_ms = self._opened_ms
        if self._complete:
            self.finished.set()
        elif not self.round.closed:
            self._start_round()

    @property
    def state(self) -> NDArray[np.float32]:  # f32[N]
        """The outer parameters after the round of `head`. They never change: the next round has an array of its own."""
        return self._states[-1].flat

    # What the network asks for

    async def welcome(self, peer: bytes) -> bytes:
        """Every peer of the run is welcome; it learns the head of the ledger."""
        return self.head.to_bytes()

    async def joined(self, peer: bytes) -> None:
        """A peer watches the rounds."""
        if peer in self._banned:
            log.info("banned peer looks on", peer=peer)
            return
        log.info("peer joined", peer=peer, members=len(self.round.members) + 1)
        self._handle(Joined(peer))

    async def left(self, peer: bytes) -> None:
        """A peer's link is gone."""
        self._handle(Left(peer))
        log.info("peer left", peer=peer, members=len(self.round.members))

    async def shown(self, peer: bytes, record: bytes, ad: bytes) -> None:
        """Hear of a takeover, or where another aggregator is. Raises ProtocolError when it is not signed."""
        if record:
            newest = RoundRecord.from_bytes(record)
            check_record(newest, self.run)
            self.consider(newest)
        if ad and self._book.add_all([ad], self.run.aggregators):
            self._broadcast(Aggregators(tuple(self._book.signed(but=self._key.public))))

    def consider(self, record: RoundRecord, *, leads: bool = False) -> None:
        """Stop for good when a record says that another aggregator took over, or that we lost some that we signed.

        As long as we signed nothing in our epoch, another one that `leads` and has as many records goes on instead.
        """
        ours, theirs = (self.head.epoch, self.head.round), (record.epoch, record.round)
        yields = leads and self.epoch > self.head.epoch and theirs >= ours
        if (yields or theirs > (self.epoch, self.head.round)) and not self.superseded.done():
            self.superseded.set_result(record)

    async def watch(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        """The head and the open round, if there is one, and then everything that happens."""
        queue: asyncio.Queue[WatchEvent] = asyncio.Queue(WATCH_QUEUE_MAX)
        self._watchers.setdefault(peer, set()).add(queue)
        try:
            for event in self._now(peer):
                yield event
            while True:
                yield await queue.get()
        finally:
            watches = self._watchers[peer]
            watches.discard(queue)
            if not watches:
                del self._watchers[peer]

    async def observe(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        """The same, and each packet of the open round that is stored here."""
        queue: asyncio.Queue[WatchEvent] = asyncio.Queue(OBSERVER_QUEUE_MAX)
        self._observers.add(queue)
        try:
            stored = self._folder.journal.packets(self.round.round)
            for event in chain(self._now(None), (PacketStored(row.digest) for row in stored)):
                yield event
            while True:
                yield await queue.get()
        finally:
            self._observers.discard(queue)

    async def receipt(self, peer: bytes, digest: bytes) -> ReceiptMsg | None:
        """What is known of a packet without its bytes: it is here already, or it cannot count any more."""
        self._demand_the_lead()
        known = self._folder.journal.packet(digest)
        if known is not None and known.verdict is not None:
            return ReceiptMsg(digest, known.verdict == Verdict.ACCEPTED, known.code)
        if peer in self._banned:
            return ReceiptMsg(digest, False, Code.BANNED)
        if self.round.holds(peer, digest):
            return ReceiptMsg(digest, True, 0)
        code = self.round.refusal(peer, digest)
        return None if code is None else ReceiptMsg(digest, False, code)

    async def submit(self, peer: bytes, digest: bytes, data: bytes | Path) -> ReceiptMsg:
        """Check a packet, keep it durably, and answer whether it counts."""
        known = await self.receipt(peer, digest)
        if known is not None:
            return known
        round = self.round
        try:
            header = await asyncio.to_thread(self._check_and_keep, peer, digest, data, round)
        except ProtocolError as error:
            log.warning("packet refused", peer=peer, round=round.round, code=int(error.code), why=error.detail)
            if round is self.round and error.code not in (Code.LATE, Code.WRONG_DIGEST, Code.NOT_A_MEMBER):
                self._handle(Refused(peer, digest, error.code))
            return ReceiptMsg(digest, False, error.code)
        self._demand_the_lead()
        if round is not self.round:
            return ReceiptMsg(digest, False, Code.LATE)
        receipt = self._handle(Arrived(peer, digest, header.tokens, header.inner_steps)).get(digest)
        assert receipt is not None, "the machine answers every packet"
        if receipt.accepted:
            _tell(self._observers, PacketStored(digest))
        log.info("packet", peer=peer, round=round.round, accepted=receipt.accepted, code=receipt.code)
        return receipt

    def _demand_the_lead(self) -> None:
        if self.superseded.done():
            raise ProtocolError(Code.BUSY, "another aggregator leads the run now")

    async def blob(self, kind: str, digest: bytes) -> bytes | Path | None:
        """Whatever a peer may fetch by its digest; None when it is not here."""
        held = next((state for state in self._states if state.root == digest), None)
        if kind == "state" and held is not None:
            return b"".join(held.hashes)
        piece = next((state.pieces[digest] for state in self._states if digest in state.pieces), None)
        if kind == "piece" and piece is not None:
            return bytes(piece)
        return stored_blob(self._signed, self._folder, kind, digest)

    async def amend(self, peer: bytes, data: bytes) -> Amended:
        """Keep the operator's next amendment for the next record. Raises ProtocolError, with a reason for people."""
        self._demand_the_lead()
        if data:
            # One at a time, for each follows from the one before.
            async with self._amending:
                await self._take_amendment(Amendment.from_bytes(data, self.run))
        return Amended(self._amendments.head, self._next_record)

    @property
    def _next_record(self) -> int:
        """The round whose record brings in an amendment that comes now."""
        return self.round.round + 1 if self.round.closed else self.round.round

    async def _take_amendment(self, amendment: Amendment) -> None:
        if amendment in self._amendments.chain:
            return
        if self.finished.is_set():
            raise ProtocolError(Code.BAD_AMENDMENT, "the run is complete: no record is left that could bring it in")
        demand_room(self._amendments, self.head)
        self._amendments.bring_in(amendment, self._next_record)
        await asyncio.to_thread(prepare_amendment, self._folder, self.run, amendment)
        # A round may have closed meanwhile. From here on nothing comes in between.
        longer = self._amendments.bring_in(amendment, self._next_record)
        self._demand_the_lead()
        keep_waiting(self._folder, amendment)
        self._amendments = longer
        log.info("amendment", number=amendment.number, says=describe(amendment), digest=amendment.digest)
        if self._idle:
            self._open_next()

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
        if self.superseded.done():
            return receipts
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
                    # The wall clock may jump while a round is open, and peers learn from how long rounds take.
                    self._closed_ms = self._opened_ms + round(1000 * (self._loop.time() - self._opened_s))
                    # What comes from here on is for the record after this one.
                    task = self._loop.create_task(self._close_round(effect, self._amendments))
                    self._tasks.add(task)
                    task.add_done_callback(self._closed_task)
        return receipts

    def _tick(self) -> None:
        if not self.round.closed and not self.finished.is_set():
            self._handle(Tick())

    def _closed_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = task.exception()
        if error is not None and not isinstance(error, SupersededError) and not self.failed.done():
            self.failed.set_exception(error)

    async def _close_round(self, close: Close, amendments: Amendments) -> None:
        record, state = await asyncio.to_thread(self._settle, close, amendments)
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
        self._open_next()

    @property
    def _complete(self) -> bool:
        """Whether the last round of the run has its record."""
        return self.head.round >= self._amendments.config_at(self.head.round + 1).outer.rounds

    @property
    def _idle(self) -> bool:
        """Whether no round is open or being closed, for the operator has paused the run."""
        return self.round.closed and self.head.round == self.round.round and not self.finished.is_set()

    def _open_next(self) -> None:
        """Open the round after the head's, unless the run is complete or paused."""
        number, head = self.head.round + 1, self.head
        if self._complete:
            self.finished.set()
            log.info("run complete", rounds=head.round, state_root=head.state_root.hex())
            return
        if self._amendments.paused_at(number):
            log.info("paused", round=number)
            return
        self._ban(self._amendments.banned_at(number))
        run = self._amendments.config_at(number)
        self.round = self.round.next(run, head.state_root, self._loop.time())
        self.submit_bytes_max = packet_wire_bytes_max(run)
        self._opened_ms, self._opened_s = now_ms(), self._loop.time()
        self._start_round()

    def _start_round(self) -> None:
        """Let the round that was made begin; where the operator takes the run back it ends at once."""
        if self._amendments.rollback_at(self.round.round) is not None:
            self._handle(RolledBack())
            return
        for watcher, queues in self._watchers.items():
            _tell(queues, self._opened_event(watcher))
        _tell(self._observers, self._opened_event(None))
        self._handle(Tick())

    def _ban(self, banned: frozenset[bytes]) -> None:
        """Before a round opens: nobody awaits the packets of banned peers, and those who may send again are awaited."""
        for peer in banned & self.round.members:
            self._handle(Left(peer))
        for peer in (self._banned - banned) & self._watchers.keys():
            self._handle(Joined(peer))
        self._banned = banned

    def _now(self, peer: bytes | None) -> list[WatchEvent]:
        """Where other aggregators are, the head (its round may have closed since the welcome), and the open round."""
        events: list[WatchEvent] = []
        ads = tuple(self._book.signed(but=self._key.public))
        if ads:
            events.append(Aggregators(ads))
        events.append(self._closed_event())
        if not self.finished.is_set() and not self.round.closed:
            events.append(self._opened_event(peer))
        return events

    def _opened_event(self, peer: bytes | None) -> RoundOpened:
        """The open round as this peer is told of it, or an observer (None)."""
        left_s = max(0.0, self.round.deadline_at_s - self._loop.time())
        steps = self.round.run.inner.steps if peer is None else self.round.steps_for(peer)
        return RoundOpened(self.round.round, self.round.base_root, steps, left_s)

    def _closed_event(self) -> RoundClosed:
        blobs, head = self._folder.blobs, self.head
        update_bytes = blobs.size("update", head.update_digest.hex())
        return RoundClosed(head.to_bytes(), update_bytes, blobs.size("bundle", head.digest.hex()))

    def _broadcast(self, event: WatchEvent) -> None:
        _tell(chain(self._observers, *self._watchers.values()), event)

    # Work in a thread

    def _check_and_keep(self, peer: bytes, digest: bytes, data: bytes | Path, round: AggregatorRound) -> PacketHeader:
        raw = data if isinstance(data, bytes) else data.read_bytes()
        packet = packet_from_wire(raw, round.run)
        header = packet.header
        if header.digest != digest:
            raise ProtocolError(Code.WRONG_DIGEST, "the bytes are another packet than the one announced")
        if header.peer != peer:
            raise ProtocolError(Code.NOT_A_MEMBER, "the packet was made by another peer than the one that sends it")
        if header.round < round.round:
            raise ProtocolError(Code.LATE, f"round {header.round} has closed")
        check_claims(packet, round.run, round=round.round, base_root=round.base_root)
        check_contents(packet, round.run)
        self._folder.blobs.put("packet", digest.hex(), raw)
        row = PacketRow(digest, header.round, peer, header.tokens, header.inner_steps, now_ms())
        self._folder.journal.add_packet(row)
        return header

    def _settle(self, close: Close, amendments: Amendments) -> tuple[RoundRecord, HeldState]:
        """Merge, apply, write the update, the record and now and then the state; all durable on return."""
        state, update_digest = self._states[-1], NO_DIGEST
        entries = tuple(self._entry(submission) for submission in close.submissions)
        if close.kind == Kind.APPLIED:
            state, update_digest = self._merge(accepted(entries))
        elif close.kind == Kind.ROLLBACK:
            to_round = amendments.rollback_at(self.round.round)
            assert to_round is not None, "the amendments say so"
            state = HeldState(stored_state(self._folder, self.run, to_round))
        if self.superseded.done():
            raise SupersededError
        evaluation = self._take_evaluation()
        record = sign_record(
            RoundRecord(
                run_id=self.run.run_id,
                round=self.round.round,
                epoch=self.epoch,
                previous=self.head.digest,
                kind=close.kind,
                reason=close.reason,
                state_root=state.root,
                update_digest=update_digest,
                opened_ms=self._opened_ms,
                closed_ms=self._closed_ms,
                entries=entries,
                amendment=amendments.head,
                evaluated_round=evaluation.round,
                loss_micronats=evaluation.loss_micronats,
            ),
            self._key,
        )
        snapshot = is_snapshot(record, amendments)
        if snapshot:
            save_snapshot(self._folder, amendments, state.flat, record.round)
        append_record(self._folder, record)
        if record.kind == Kind.APPLIED:
            self._choose_form(record)
        if snapshot:
            # It looks at every blob, so not in every round.
            self._folder.forget(keep_rounds=KEEP_ROUNDS, blob_bytes_max=BLOB_BYTES_MAX)
        return record, state

    def _take_evaluation(self) -> Evaluation:
        """What was measured of an earlier state since the last record, or nothing."""
        evaluation = self.evaluation
        if evaluation is None or not 0 <= evaluation.round < self.round.round or evaluation.loss_micronats <= 0:
            return _NO_EVALUATION
        self.evaluation = None
        return evaluation

    def _merge(self, entries: Sequence[Entry]) -> tuple[HeldState, bytes]:
        packets = []
        for entry in entries:
            packet = packet_from_wire(self._stored_packet(entry), self.round.run)
            # A second time, for what lay on a disk may have rotted there.
            check_claims(packet, self.round.run, round=self.round.round, base_root=self.round.base_root)
            packets.append(packet)
        sections = merge_packets(packets, entries, self.round.run)
        flat = self._states[-1].flat.copy()
        codec.outer_step(torch.from_numpy(flat), self.round.run.layout, sections)
        state = HeldState(flat)
        update = make_update(self.round.run, self.round.round, self.round.base_root, state.root, sections)
        self._folder.blobs.put("update", update.header.digest.hex(), update_to_wire(update, self.round.run))
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
            weight_of(submission.tokens, self.round.run.nominal_tokens) if accepted else 0,
            CLIP_ONE if accepted else 0,
        )

    # After a restart

    def _recover(self) -> RoundRecord:
        """Load the head and the parameters that belong to it, or begin the ledger."""
        journal, states = self._folder.journal, self._folder.states
        row = journal.head()
        if row is None:
            self._states.append(HeldState(states.load(self.run.genesis_root, self.run.layout)))
            record = genesis_record(self.run, self._key, now_ms())
            append_record(self._folder, record)
            return record
        self._states.append(HeldState(stored_state(self._folder, self.run, row.round)))
        log.info("continuing", round=row.round, state_root=row.state_root.hex())
        return RoundRecord.from_bytes(row.data)

    def _first_round(self) -> AggregatorRound:
        """The round after the head's; while the run is paused the head's, which has closed."""
        head, now_s = self.head, self._loop.time()
        run = self._amendments.config_at(head.round + 1)
        history = self._history(run.inner.steps)
        if self._amendments.paused_at(head.round + 1):
            log.info("paused", round=head.round + 1)
            closed = AggregatorRound(run, head.round, head.state_root, now_s, history=history)
            closed.closed = True
            return closed
        return AggregatorRound(
            run,
            head.round + 1,
            head.state_root,
            now_s,
            history=history,
            taken_up=self._packets_of_open_round(),
            returning=self._contributors() - self._banned,
        )

    def _packets_of_open_round(self) -> list[Arrived]:
        """Packets that had their receipts before a crash still count, if they began from our head."""
        rows = self._folder.journal.packets(self.head.round + 1)
        return [
            Arrived(row.peer, row.digest, row.tokens, row.inner_steps)
            for row in rows
            if row.peer not in self._banned and self._base_root(row.digest) == self.head.state_root
        ]

    def _base_root(self, digest: bytes) -> bytes:
        """What a stored packet began from: another state where a takeover has changed the round before."""
        path = self._folder.blobs.path("packet", digest.hex())
        assert path is not None, "a packet is stored before it is noted"
        with path.open("rb") as file:
            return PacketHeader.from_bytes(file.read(PACKET_HEADER_BYTES)).base_root

    def _contributors(self) -> frozenset[bytes]:
        """Whose packets counted in the last round in which any did: they are expected back."""
        rows = self._folder.journal.records(max(1, self.head.round - HISTORY_ROUNDS + 1), self.head.round)
        for row in reversed(rows):
            entries = accepted(RoundRecord.from_bytes(row.data).entries)
            if entries:
                return frozenset(entry.peer for entry in entries)
        return frozenset()

    def _history(self, steps: int) -> ArrivalHistory:
        """When the packets of the last rounds came; those of so many inner steps tell how long such a packet takes."""
        history = ArrivalHistory()
        for row in self._folder.journal.records(max(1, self.head.round - HISTORY_ROUNDS + 1), self.head.round):
            record, packets = RoundRecord.from_bytes(row.data), self._folder.journal.packets(row.round)
            counted_ms = {packet.peer: packet.arrived_ms for packet in packets if packet.verdict == Verdict.ACCEPTED}
            whole = {entry.peer for entry in accepted(record.entries) if entry.inner_steps >= steps}
            history = history.add(
                [max(0, arrived_ms - record.opened_ms) / 1000 for arrived_ms in counted_ms.values()],
                {peer: arrived_ms / 1000 for peer, arrived_ms in counted_ms.items() if peer in whole},
            )
        # The journal goes by the wall clock, the rounds to come by another one.
        return ArrivalHistory(history.arrivals_s, history.cycles_s)


def _tell(queues: Iterable[asyncio.Queue[WatchEvent]], event: WatchEvent) -> None:
    for queue in queues:
        # A watcher that has not read so many events is stuck; it learns the head when it reads on or rejoins.
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(event)


def stored_blob(signed: SignedRun, folder: RunFolder, kind: str, digest: bytes) -> bytes | Path | None:
    """What the disk has of this kind under this digest, or None."""
    match kind:
        case "run":
            return signed.to_bytes() if digest == signed.config.run_id else None
        case "record":
            row = folder.journal.record_by_digest(digest)
            return None if row is None else row.data
        case "packet" | "update" | "bundle" | "amendment":
            return folder.blobs.path(kind, digest.hex())
        case "state":
            return folder.states.hashes(digest)
        case "piece":
            return folder.states.piece(digest)
        case _:
            return None


def append_record(folder: RunFolder, record: RoundRecord) -> None:
    """Close a round in the journal."""
    row = RecordRow(record.round, record.digest, record.state_root, record.update_digest, record.to_bytes())
    verdicts = {entry.packet_digest: (int(entry.verdict), entry.code) for entry in record.entries}
    folder.journal.close_round(row, verdicts)


def demand_room(amendments: Amendments, head: RoundRecord) -> None:
    """Raise ProtocolError BUSY when the next record cannot bring in one more amendment."""
    if len(amendments.after(head.amendment)) >= AMENDMENTS_PER_RECORD_MAX:
        raise ProtocolError(Code.BUSY, f"{AMENDMENTS_PER_RECORD_MAX} amendments wait for the next record already")


def prepare_amendment(folder: RunFolder, run: RunConfig, amendment: Amendment) -> None:
    """Keep the state to which an amendment takes the run back; others need no preparation.

    Raises ProtocolError BAD_AMENDMENT when that state cannot be had here.
    """
    action = amendment.action
    if not isinstance(action, Rollback):
        return
    row = folder.journal.record(action.to_round)
    if row is None:
        raise ProtocolError(Code.BAD_AMENDMENT, f"round {action.to_round} has not closed yet")
    try:
        flat = stored_state(folder, run, action.to_round)
    except ProtocolError as error:
        reason = f"the state after round {action.to_round} cannot be made any more: {error.detail}"
        raise ProtocolError(Code.BAD_AMENDMENT, reason) from None
    folder.states.save(flat, run.layout, {"run": run.name, "round": str(action.to_round)})


def is_snapshot(record: RoundRecord, amendments: Amendments) -> bool:
    """Whether the state after this record's round is kept: of every tenth, of the last, and after a rollback."""
    last = amendments.config_at(record.round + 1).outer.rounds
    return record.round % SNAPSHOT_ROUNDS == 0 or record.round >= last or record.kind == Kind.ROLLBACK


def save_snapshot(
    folder: RunFolder,
    amendments: Amendments,
    flat: NDArray[np.float32],  # f32[N]
    round: int,
) -> None:
    """Keep the state after a round, whose record comes next, and forget the oldest one."""
    states, journal, run = folder.states, folder.journal, amendments.run
    root = states.save(flat, run.layout, {"run": run.name, "round": str(round)})
    first = max(0, round - SNAPSHOT_ROUNDS * SNAPSHOTS_KEPT)
    recent = {row.state_root for row in journal.records(first, round)}
    ahead = [
        item.action.to_round for item in amendments.chain if isinstance(item.action, Rollback) and item.round > round
    ]
    targets = {row.state_root for to_round in ahead for row in journal.records(to_round, to_round)}
    states.keep({run.genesis_root, root, *recent, *targets})


def now_ms() -> int:
    """The wall clock, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000
