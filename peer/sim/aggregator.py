"""The aggregator's driver: performs what `AggregatorRound` decides, step by step as peer/aggregator.py does.

It may die between any two steps. What survives is `Disk`, and of that nothing is ever half-written.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from peer.core import codec
from peer.merge import accepted, check_contents, merge_packets, sections_of_update
from peer.sim.clock import chance_of, timer_s
from peer.sim.network import CONTROL_BYTES, Lane, Link
from peer.sim.settings import MBIT, genesis_state, key_of
from protocol.arithmetic import weight_of
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST
from protocol.layout import state_root
from protocol.ledger import Entry, Kind, RoundRecord, Verdict, genesis_record, sign_record
from protocol.limits import CLIP_ONE
from protocol.packet import Packet, check_claims
from protocol.round import (
    Accept,
    AggregatorEvent,
    AggregatorRound,
    Arrived,
    Close,
    Joined,
    Left,
    Opened,
    Refused,
    Reject,
    Submission,
    Tick,
    WakeAt,
)
from protocol.update import make_update
from protocol.wire import bundle_to_wire, packet_from_wire, update_to_wire

if TYPE_CHECKING:
    from peer.sim.swarm import Swarm
    from peer.sim.volunteer import Volunteer

SNAPSHOT_ROUNDS = 5
KEEP_ROUNDS = 12
MEET_S = 15.0
FIRST_WALL_MS = 1_700_000_000_000
Reply = Callable[[bool, int], None]


class CrashError(Exception):
    """The aggregator died between two steps."""


@dataclass(frozen=True)
class Row:
    """A packet in the journal; `verdict` is None until its round has closed."""

    packet: Arrived
    round: int
    base_root: bytes
    verdict: Verdict | None = None
    code: int = 0


@dataclass
class Disk:
    """What survives a crash."""

    records: list[RoundRecord] = field(default_factory=list)
    rows: dict[bytes, Row] = field(default_factory=dict)
    blobs: dict[tuple[str, bytes], bytes] = field(default_factory=dict)
    states: dict[bytes, bytes] = field(default_factory=dict)

    def mirror(self, own: "Disk") -> "Disk":
        """What an aggregator that follows the ledger has: all of it, and packets of its own that are undecided here."""
        head = self.records[-1]
        open_rows = {
            digest: row for digest, row in own.rows.items() if row.round > head.round and digest not in self.rows
        }
        # Of two packets of one peer the one counts for which this aggregator gave a receipt.
        rows = {digest: replace(row, verdict=None, code=0) for digest, row in open_rows.items()} | self.rows
        blobs = {("packet", digest): own.blobs["packet", digest] for digest in open_rows}
        return Disk(list(self.records), rows, {**blobs, **self.blobs}, dict(self.states))


class Aggregator:
    """One aggregator; `disk` and `epoch` are what a standby takes over with."""

    def __init__(self, swarm: "Swarm", name: str, *, disk: Disk | None = None, epoch: int = 0) -> None:
        self.swarm, self.clock, self.run, self.name = swarm, swarm.clock, swarm.run, name
        self.key = key_of(swarm.settings.seed, name)
        self.disk = Disk() if disk is None else disk
        self.epoch = epoch
        self.up = False
        self.retired = False
        self.life = 0
        self.crashes = 0
        self.links: dict[Link, Volunteer] = {}
        self.lanes = Lane(swarm.settings.aggregator_mbit * MBIT), Lane(swarm.settings.aggregator_mbit * MBIT)
        self._chance: random.Random = chance_of(swarm.settings.seed, name)
        self._wall_ms = FIRST_WALL_MS
        self._watchers: dict[bytes, list[tuple[Volunteer, Link]]] = {}
        self._parsed: dict[bytes, Packet] = {}
        self._states: list[tuple[bytes, NDArray[np.float32]]] = []
        self._wakes = 0
        self.round: AggregatorRound

    # Life and death

    def start(self) -> None:
        """Begin, or go on from the disk."""
        self.up = True
        self.life += 1
        self._watchers, self._parsed = {}, {}
        self.enter(self._start)

    def _start(self) -> None:
        if not self.disk.records:
            state = genesis_state(self.run.layout)
            self.disk.states[self.run.genesis_root] = state.tobytes()
            self._append(genesis_record(self.run, self.key, self._now_ms()))
        self._states = [self._recover()]
        head = self.disk.records[-1]
        opened = head.round + 1, head.state_root
        rows = [row.packet for row in self.disk.rows.values() if (row.round, row.base_root) == opened]
        self.round = AggregatorRound(self.run, *opened, self.clock.now_s, taken_up=rows, returning=self._contributors())
        self._opened_ms = self._now_ms()
        if head.round < self.run.outer.rounds:
            self.handle(Tick())

    def _contributors(self) -> frozenset[bytes]:
        """Whose packets counted in the last round in which any did."""
        counted = (frozenset(entry.peer for entry in accepted(item.entries)) for item in reversed(self.disk.records))
        return next(filter(None, counted), frozenset())

    def _recover(self) -> tuple[bytes, NDArray[np.float32]]:
        """The parameters of the head: the last snapshot, and the updates since."""
        records = self.disk.records
        start = len(records) - 1
        while records[start].state_root not in self.disk.states:
            start -= 1
        flat = np.frombuffer(self.disk.states[records[start].state_root], np.float32).copy()
        for record in records[start + 1 :]:
            if record.update_digest != NO_DIGEST:
                data = self.disk.blobs["update", record.update_digest]
                codec.outer_step(torch.from_numpy(flat), self.run.layout, sections_of_update(data, record, self.run))
        root = state_root(flat)
        assert root == records[-1].state_root, "snapshot and updates lead to the state of the head"
        return root, flat

    def crash(self, *, away_s: float | None = None) -> None:
        """Die, and come back after a while."""
        if not self.up:
            return
        self.up = False
        self.life += 1
        self.crashes += 1
        self.swarm.story.add(self.clock.now_s, self.name, "crashes")
        links, self.links = self.links, {}
        for link, peer in links.items():
            self.swarm.cut(link, peer, self)
        jump_s = self.swarm.faults.wall_jump_s
        self._wall_ms += int(1000 * self._chance.uniform(-jump_s, jump_s))
        self.clock.after(self._chance.uniform(1, 30) if away_s is None else away_s, self._come_back)

    def _come_back(self) -> None:
        if not self.retired:
            self.swarm.story.add(self.clock.now_s, self.name, "is back")
            self.start()

    def meet(self) -> None:
        """Compare heads with the other aggregators now and then; one that learns of a higher epoch leads no more."""
        if self.retired:
            return
        if self.up and not self.swarm.split:
            self.swarm.meet(self)
        self.clock.after(self._chance.uniform(0.5, 1) * MEET_S, self.meet)

    def retire(self) -> None:
        """Lead no more."""
        self.retired = True
        self.crash()

    def enter(self, action: Callable[[], object]) -> None:
        """Do something that may end in a crash half-way."""
        try:
            action()
        except CrashError:
            self.crash()

    def later(self, delay_s: float, action: Callable[[], object]) -> None:
        """Do something after a while, unless it has died by then."""
        life = self.life

        def act() -> None:
            if self.life == life:
                self.enter(action)

        self.clock.after(delay_s, act)

    def _step(self) -> None:
        """Here two steps meet between which it may die."""
        if self._chance.random() < self.swarm.faults.crash_point:
            raise CrashError

    def _now_ms(self) -> int:
        return self._wall_ms + int(self.clock.now_s * 1000)

    # What the network asks for

    def watch(self, peer: "Volunteer", link: Link) -> None:
        """A peer begins to watch: the head first, then the open round, then everything that happens."""
        watches = self._watchers.setdefault(peer.key.public, [])
        watches.append((peer, link))
        if len(watches) == 1:
            self.handle(Joined(peer.key.public))
        self._tell_record(peer, link)
        if not self.finished and not self.round.closed:
            self._tell_opened(peer, link)

    def leave(self, peer: "Volunteer", link: Link) -> None:
        """A link is gone, as this side noticed."""
        if self.links.pop(link, None) is None:
            return
        watches = self._watchers.get(peer.key.public, [])
        if (peer, link) in watches:
            watches.remove((peer, link))
            if not watches:
                del self._watchers[peer.key.public]
                self.handle(Left(peer.key.public))

    @property
    def finished(self) -> bool:
        """Whether the last round of the run is recorded."""
        return self.disk.records[-1].round >= self.run.outer.rounds

    def submit(self, peer: bytes, digest: bytes, data: bytes, reply: Reply) -> None:
        """Check a packet, keep it durably, and answer whether it counts."""
        row = self.disk.rows.get(digest)
        round = self.round
        code = round.refusal(peer, digest)
        if row is not None and row.verdict is not None:
            reply(row.verdict == Verdict.ACCEPTED, row.code)
        elif code is not None:
            reply(False, code)
        elif self._chance.random() < self.swarm.faults.busy:
            reply(False, self._chance.choice([Code.BUSY, Code.WRONG_DIGEST, Code.BAD_SESSION]))
        else:
            check_s = self._chance.uniform(0.01, 0.3)
            self.later(check_s, lambda: self._check_and_keep(peer, digest, data, round, reply))

    def _check_and_keep(self, peer: bytes, digest: bytes, data: bytes, round: AggregatorRound, reply: Reply) -> None:
        try:
            packet = self._checked(peer, digest, data, round)
        except ProtocolError as error:
            if round is self.round and error.code not in (Code.LATE, Code.WRONG_DIGEST, Code.NOT_A_MEMBER):
                self.handle(Refused(peer, digest, error.code))
            reply(False, error.code)
            return
        header = packet.header
        arrived = Arrived(peer, digest, header.tokens, header.inner_steps)
        self.disk.blobs["packet", digest] = data
        self._step()
        self.disk.rows.setdefault(digest, Row(arrived, header.round, header.base_root))
        self._step()
        if round is not self.round:
            reply(False, Code.LATE)
            return
        self._parsed[digest] = packet
        for effect in self.handle(arrived):
            if isinstance(effect, Accept):
                self._step()
                reply(True, 0)
            elif isinstance(effect, Reject):
                reply(False, effect.code)

    def _checked(self, peer: bytes, digest: bytes, data: bytes, round: AggregatorRound) -> Packet:
        packet = packet_from_wire(data, self.run)
        if packet.header.digest != digest:
            raise ProtocolError(Code.WRONG_DIGEST, "other bytes than announced")
        if packet.header.peer != peer:
            raise ProtocolError(Code.NOT_A_MEMBER, "another peer's packet")
        if packet.header.round < round.round:
            raise ProtocolError(Code.LATE, "the round has closed")
        check_claims(packet, self.run, round=round.round, base_root=round.base_root)
        check_contents(packet, self.run)
        return packet

    def serve(self, kind: str, digest: bytes) -> bytes | None:
        """Whatever a peer may fetch by its digest; None when it is not here."""
        if kind == "state":
            held = next((flat.tobytes() for root, flat in self._states if root == digest), None)
            return self.disk.states.get(digest) if held is None else held
        if kind == "record":
            return next((record.to_bytes() for record in reversed(self.disk.records) if record.digest == digest), None)
        return self.disk.blobs.get((kind, digest))

    @property
    def head(self) -> RoundRecord:
        """The newest record that it signed or copied."""
        return self.disk.records[-1]

    @property
    def state(self) -> NDArray[np.float32]:  # f32[N]
        """The parameters of the head."""
        return self._states[-1][1]

    # The round machine

    def handle(self, event: AggregatorEvent) -> tuple[object, ...]:
        """Feed one event and perform all effects but the receipts, which are returned with the rest."""
        effects = self.round.handle(event, self.clock.now_s)
        self.swarm.story.add(self.clock.now_s, self.name, event, effects)
        for effect in effects:
            if isinstance(effect, WakeAt):
                self._wakes += 1
                self.later(timer_s(effect.at_s - self.clock.now_s, self._chance), partial(self._tick, self._wakes))
            elif isinstance(effect, Close):
                self.swarm.checkers.closes(self.clock.now_s, self.round.deadline_at_s, self.round.round, effect)
                merge_s = self._chance.uniform(0.1, 2)
                self.later(merge_s, partial(self._settle, effect))
        return effects

    def _tick(self, wake: int) -> None:
        if wake == self._wakes and not self.round.closed and not self.finished:
            self.handle(Tick())

    def _settle(self, close: Close) -> None:
        """Merge, apply, write the update, now and then the state, and the record; each durable before the next."""
        root, flat = self._states[-1]
        update_digest = NO_DIGEST
        entries = tuple(self._entry(submission) for submission in close.submissions)
        if close.kind == Kind.APPLIED:
            root, flat, update_digest = self._merge(accepted(entries), flat)
            self._step()
        head = self.disk.records[-1]
        unsigned = RoundRecord(
            run_id=self.run.run_id,
            round=self.round.round,
            epoch=self.epoch,
            previous=head.digest,
            kind=close.kind,
            reason=close.reason,
            state_root=root,
            update_digest=update_digest,
            opened_ms=self._opened_ms,
            closed_ms=max(self._now_ms(), self._opened_ms),
            entries=entries,
        )
        record = sign_record(unsigned, self.key)
        if record.round % SNAPSHOT_ROUNDS == 0 or record.round >= self.run.outer.rounds:
            self.disk.states[root] = flat.tobytes()
            self._step()
        self._append(record)
        self._step()
        if record.kind == Kind.APPLIED:
            packets = [self.disk.blobs["packet", entry.packet_digest] for entry in accepted(entries)]
            update = self.disk.blobs["update", update_digest]
            update_bytes, bundle_bytes = self.swarm.sizes.broadcast(record, update, packets)
            if bundle_bytes < update_bytes:
                self.disk.blobs["bundle", record.digest] = bundle_to_wire(packets)
                self._step()
        self._states = [self._states[-1], (root, flat)]
        self._forget(record.round - KEEP_ROUNDS)
        self._broadcast(self._tell_record)
        self._step()
        self.swarm.closed(self, record)
        if not self.finished:
            self.round = self.round.next(self.run, record.state_root, self.clock.now_s)
            self._opened_ms = self._now_ms()
            self._broadcast(self._tell_opened)
            self.handle(Tick())

    def _entry(self, submission: Submission) -> Entry:
        good = submission.verdict == Verdict.ACCEPTED
        return Entry(
            submission.peer,
            submission.digest,
            submission.verdict,
            submission.code,
            submission.tokens,
            submission.inner_steps,
            weight_of(submission.tokens, self.run.nominal_tokens) if good else 0,
            CLIP_ONE if good else 0,
        )

    def _merge(self, entries: list[Entry], base: NDArray[np.float32]) -> tuple[bytes, NDArray[np.float32], bytes]:
        packets = []
        for entry in entries:
            packet = self._parsed.get(entry.packet_digest)
            packets.append(packet or packet_from_wire(self.disk.blobs["packet", entry.packet_digest], self.run))
        sections = merge_packets(packets, entries, self.run)
        flat = base.copy()
        codec.outer_step(torch.from_numpy(flat), self.run.layout, sections)
        root = state_root(flat)
        update = make_update(self.run, self.round.round, self.round.base_root, root, sections)
        self.disk.blobs["update", update.header.digest] = update_to_wire(update, self.run)
        return root, flat, update.header.digest

    def _append(self, record: RoundRecord) -> None:
        """The record and the verdicts of its packets become durable together."""
        parsed = self.swarm.checkers.recorded(record.to_bytes())
        self.swarm.story.cover(record.digest)
        self.disk.records.append(parsed)
        for entry in record.entries:
            row = self.disk.rows.get(entry.packet_digest)
            if row is not None:
                self.disk.rows[entry.packet_digest] = replace(row, verdict=entry.verdict, code=entry.code)
        self._parsed = {}

    def _forget(self, before: int) -> None:
        """Delete packets and updates of old rounds, and all states but the last few snapshots."""
        if not 0 <= before < len(self.disk.records):
            return
        record = self.disk.records[before]
        self.disk.blobs.pop(("update", record.update_digest), None)
        self.disk.blobs.pop(("bundle", record.digest), None)
        for digest in [digest for digest, row in self.disk.rows.items() if row.round <= before]:
            self.disk.blobs.pop(("packet", digest), None)
            del self.disk.rows[digest]
        recent = {record.state_root for record in self.disk.records[before:]} | {self.run.genesis_root}
        self.disk.states = {root: data for root, data in self.disk.states.items() if root in recent}

    # What it tells

    def _broadcast(self, tell: Callable[["Volunteer", Link], None]) -> None:
        for watches in self._watchers.values():
            for peer, link in watches:
                tell(peer, link)

    def _tell_record(self, peer: "Volunteer", link: Link) -> None:
        record = self.disk.records[-1]
        bundle = ("bundle", record.digest) in self.disk.blobs
        link.down(260 + 85 * len(record.entries), lambda: peer.told(link, record, bundle), ordered=True)

    def _tell_opened(self, peer: "Volunteer", link: Link) -> None:
        left_s = max(0.0, self.round.deadline_at_s - self.clock.now_s)
        steps = self.round.steps_for(peer.key.public)
        opened = Opened(self.round.round, self.round.base_root, steps, left_s)
        link.down(CONTROL_BYTES, lambda: peer.heard(link, opened), ordered=True)

    def check_bounds(self) -> None:
        """Nothing here grows without end."""
        sizes = {"watchers": len(self._watchers), "parsed": len(self._parsed), "rows": len(self.disk.rows) // 20}
        self.swarm.checkers.bounded(self.name, self.round, sizes)
