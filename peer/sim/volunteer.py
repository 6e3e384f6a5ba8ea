"""A peer's driver: performs what `ReplicaRound` decides, as peer/client.py does. Of all it knows its disk survives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from peer.sim.clock import chance_of, timer_s
from peer.sim.model import PlainReplica
from peer.sim.network import CONTROL_BYTES, Link
from peer.sim.settings import key_of
from protocol.errors import Code
from protocol.identity import NO_DIGEST
from protocol.ledger import RoundRecord
from protocol.packet import make_packet
from protocol.round import (
    Alarm,
    Applied,
    ApplyUpdate,
    CatchUp,
    Connected,
    Failed,
    InnerDone,
    LoadState,
    Lost,
    MakePacket,
    Opened,
    PacketReady,
    Prefetch,
    Prefetched,
    Receipt,
    Recorded,
    ReplicaEffect,
    ReplicaEvent,
    ReplicaRound,
    Send,
    Settle,
    StopInner,
    Tick,
    TrainInner,
    WakeAt,
)
from protocol.wire import packet_to_wire

if TYPE_CHECKING:
    from peer.sim.swarm import Swarm

_JOBS = TrainInner | MakePacket | ApplyUpdate | LoadState | CatchUp
_OWN_TIME_S = 0.05  # for what takes a moment
STATE_PIECES = 4


@dataclass(frozen=True)
class StoredPacket:
    """A packet whose fate is open."""

    round: int
    digest: bytes
    wire: bytes


@dataclass(frozen=True)
class Disk:
    """What survives a peer's death. It is replaced as a whole, never changed in part."""

    record: RoundRecord | None = None
    state: dict[str, Tensor] | None = None
    packet: StoredPacket | None = None


@dataclass
class Fetched:
    """An update that was asked for ahead of its turn: its sections or why there are none, and who waits for them."""

    record: RoundRecord
    outcome: Sequence[bytes] | Failed | None = None
    awaited: bool = False


class Volunteer:
    """One peer of the swarm."""

    def __init__(self, swarm: "Swarm", name: str, step_s: float) -> None:
        seed = swarm.settings.seed
        self.swarm, self.clock, self.run, self.name, self.step_s = swarm, swarm.clock, swarm.run, name, step_s
        self.key = key_of(seed, name)
        self.chance = chance_of(seed, name)
        self.disk = Disk()
        self.up = False
        self.done = False
        self.life = 0
        self.inner_s = 0.0
        self.steps = 0
        self._pieces_of, self._pieces = b"", 0
        self.present_s = 0.0
        self.unreachable_until_s = 0.0
        self.newest = (0, 0)  # epoch and round of the newest record that it has seen; it remembers them
        self.link: Link | None = None
        self._rate = 1 + self.chance.uniform(-swarm.settings.faults.drift, swarm.settings.faults.drift)
        self._since_s = 0.0
        self.replica: PlainReplica
        self.machine: ReplicaRound
        swarm.checkers.joined(self.key.public)

    # Life and death

    def start(self) -> None:
        """Begin, or go on from the disk."""
        self.up = True
        self.life += 1
        self._since_s = self.clock.now_s
        self._job: ReplicaEffect | None = None
        self._wakes = 0
        self._steps_end_s = 0.0
        self._bundle_of = b""
        self._fetched: Fetched | None = None
        self.replica = PlainReplica(self.run, self.swarm.problem, self.chance)
        if self.disk.state is not None:
            self.replica.load_state(self.disk.state)
        packet = self.disk.packet
        open_packet = None if packet is None else (packet.round, packet.digest)
        self.machine = ReplicaRound(self.run, record=self.disk.record, packet=open_packet)
        self._dial()

    def kill(self, *, away_s: float, lose_disk: bool = False) -> None:
        """Die and come back later."""
        if not self.up:
            return
        self.swarm.story.add(self.clock.now_s, self.name, "dies" + (" and loses its disk" if lose_disk else ""))
        self._end()
        if lose_disk:
            self.disk, self._pieces_of = Disk(), b""
        self.swarm.checkers.died(self.key.public, disk=not lose_disk)
        self.clock.after(away_s, self.start)

    def _end(self) -> None:
        self.up = False
        self.life += 1
        self.present_s += self.clock.now_s - self._since_s
        if self.link is not None:
            self.cut()
            self.link = None

    def cut(self) -> None:
        """Break its link, if there is one; it does not know yet."""
        if self.link is not None:
            self.swarm.cut(self.link, self, self._aggregator)

    def later(self, delay_s: float, action: Callable[[], object]) -> None:
        """Do something after a while, unless this life is over by then."""
        life = self.life

        def act() -> None:
            if self.life == life:
                action()

        self.clock.after(delay_s, act)

    @property
    def own_time_s(self) -> float:
        """The time on this peer's own clock, which counts from when it was started and may be fast or slow."""
        return (self.clock.now_s - self._since_s) * self._rate

    def _store(self, record: RoundRecord | None, packet: StoredPacket | None) -> None:
        state = {name: value.clone() for name, value in self.replica.state().items()}
        self.disk = Disk(record, state, packet)
        self.swarm.checkers.stored(self.key.public, self.replica.residual.numpy())

    # The link

    def _dial(self) -> None:
        if self.link is not None or self.done:
            return
        aggregator = self.swarm.find(self)
        if aggregator is None or self.clock.now_s < self.unreachable_until_s:
            self.later(self.chance.uniform(1, 8), self._dial)
            return
        self._aggregator = aggregator
        link = self.link = self.swarm.connect(self, aggregator)
        # What the aggregator says in the join, and the watch that begins some time after it.
        head = aggregator.disk.records[-1]
        link.down(CONTROL_BYTES, lambda: self.heard(link, Connected(head)), ordered=True)
        wait_s = self.chance.uniform(0, 2)
        watch = partial(aggregator.watch, self, link)
        self.later(wait_s, lambda: link.up(CONTROL_BYTES, lambda: aggregator.enter(watch)))

    def lost(self, link: Link) -> None:
        """This side noticed that the link is dead."""
        if link is not self.link:
            return
        self.link = None
        calls = link.abandon()
        early = self.chance.random() < 0.5
        if early:
            self.handle(Lost("cut"))
        for failed in calls:
            failed()
        if not early:
            self.handle(Lost("cut"))
        self.later(self.chance.uniform(0.5, 8), self._dial)

    def heard(self, link: Link, event: ReplicaEvent) -> None:
        """Something came down the watch."""
        if self.up and link is self.link:
            if isinstance(event, Connected):
                self.newest = max(self.newest, (event.head.epoch, event.head.round))
            self.handle(event)
            if isinstance(event, Opened):
                self.swarm.opened(self, event)

    def told(self, link: Link, record: RoundRecord, bundle: bool) -> None:
        """A record came down the watch, and whether its packets are offered as a bundle."""
        if self.up and link is self.link:
            self._bundle_of = record.digest if bundle else b""
            self.newest = max(self.newest, (record.epoch, record.round))
            self.handle(Recorded((record,)))

    def fetch(
        self, kind: str, digest: bytes, got: Callable[[bytes | None], None], lost: Callable[[], None] | None = None
    ) -> None:
        """Ask for a blob; None means that it is not there. A lost link fails the job under way, or calls `lost`."""
        failed, link = lost or self._fail, self.link
        if link is None:
            self.later(_OWN_TIME_S, failed)
            return
        aggregator = self._aggregator
        life = self.life
        call = link.call(lambda: failed() if self.life == life else None)

        def answer() -> None:
            data = aggregator.serve(kind, digest)
            size = CONTROL_BYTES if data is None else self.swarm.size_of(kind, digest, data)
            link.down(size, lambda: got(data) if link.answered(call) and self.life == life else None)

        link.up(CONTROL_BYTES, answer)

    # The machine

    def handle(self, event: ReplicaEvent) -> None:
        """Feed one event and perform what comes out."""
        if self.done:
            return
        effects = self.machine.handle(event, self.own_time_s)
        self.swarm.story.add(self.clock.now_s, self.name, event, effects)
        for effect in effects:
            if isinstance(effect, _JOBS):
                assert self._job is None, f"{type(effect).__name__} while {self._job} is under way"
                self._job = effect
            self._perform(effect)
        if self.machine.finished:
            self.done = True
            self._end()

    def _perform(self, effect: ReplicaEffect) -> None:
        match effect:
            case WakeAt():
                self._wakes += 1
                wake = self._wakes
                delay_s = timer_s((effect.at_s - self.own_time_s) / self._rate, self.chance)
                self.later(delay_s, lambda: self._tick(wake))
            case TrainInner():
                self._train(effect)
            case StopInner():
                self._stop()
            case MakePacket():
                self.later(self.swarm.pack_s, lambda: self._pack(effect))
            case Send():
                self.submit(effect.digest, self._wire(effect.digest), self._receipt(effect.digest))
            case Settle():
                self._settle(effect)
            case Prefetch():
                self._prefetch(effect.record)
            case ApplyUpdate():
                self._apply_update(effect.record)
            case LoadState():
                self._fetch_state(effect.record)
            case CatchUp():
                self._catch_up(effect, [effect.head])
            case Alarm():
                self.swarm.alarms += 1

    def _tick(self, wake: int) -> None:
        if wake == self._wakes:
            self.handle(Tick())

    def _finish(self, event: ReplicaEvent) -> None:
        self._job = None
        self.handle(event)

    def _fail(self, *, gone: bool = False, reason: str = "lost") -> None:
        if isinstance(self._job, LoadState | CatchUp) and gone:
            # Whoever cannot have the records between must not be held to them.
            self.swarm.checkers.excuse(self.key.public)
        self._finish(Failed(reason, gone))

    # The jobs

    def _train(self, effect: TrainInner) -> None:
        replica = self.replica
        self.swarm.checkers.trains(
            self.key.public, self.machine.record, effect, replica.outer.numpy(), replica.flat.values.numpy()
        )
        if effect.ahead:
            replica.begin_ahead()
        began_s = self.clock.now_s
        self._steps_end_s = began_s + effect.steps * self.step_s
        self._began_s = began_s
        self._await_steps(effect)

    def _await_steps(self, effect: TrainInner) -> None:
        end_s = self._steps_end_s

        def ended() -> None:
            if end_s != self._steps_end_s or self._job is not effect:
                return
            steps = min(effect.steps, round((end_s - self._began_s) / self.step_s))
            self.inner_s += end_s - self._began_s
            self.steps += steps
            self.replica.descend(steps)
            if steps and self.chance.random() < self.swarm.faults.diverge:
                if self.chance.random() < 0.5:
                    self._start_again("diverged", residual_lost=False)
                    return
                self.replica.diverge()  # in the last step, so that only who reads the parameters notices
            self.swarm.checkers.worked(self.key.public, steps, self.replica.flat.values.numpy())
            self._finish(InnerDone(effect.round, steps, steps * self.swarm.step_tokens))

        self.later(end_s - self.clock.now_s, ended)

    def _stop(self) -> None:
        """End after the step that is under way."""
        assert isinstance(self._job, TrainInner)
        steps = int((self.clock.now_s - self._began_s) / self.step_s) + (self.chance.random() < 0.9)
        end_s = min(self._steps_end_s, max(self._began_s + steps * self.step_s, self.clock.now_s))
        if end_s < self._steps_end_s:
            self._steps_end_s = end_s
            self._await_steps(self._job)

    def _pack(self, effect: MakePacket) -> None:
        record, checkers = self.machine.record, self.swarm.checkers
        assert record is not None, "work starts from a record"
        outer, local = self.replica.outer.numpy(), self.replica.flat.values.numpy().copy()
        try:
            sections = self.replica.make_contribution()
        except ValueError as error:
            self._start_again(str(error), residual_lost=True)
            return
        packet = make_packet(self.run, self.key, effect.round, record.state_root, effect.tokens, effect.steps, sections)
        checkers.packed(packet, outer, local, self.replica.residual.numpy())
        self.swarm.seen = packet
        stored = StoredPacket(effect.round, packet.header.digest, packet_to_wire(packet, self.run))
        self._store(record, stored)
        self._finish(PacketReady(stored.digest))

    def _start_again(self, reason: str, *, residual_lost: bool) -> None:
        """After training diverged: go back to the outer parameters and sit this round out."""
        self.replica.abandon()
        self.swarm.checkers.diverged(self.key.public, residual_lost=residual_lost)
        self._fail(reason=reason)

    def _wire(self, digest: bytes) -> bytes:
        packet = self.disk.packet
        assert packet is not None and packet.digest == digest, "the machine sends what was made last"
        return packet.wire

    def _receipt(self, digest: bytes) -> Callable[[bool, int], None]:
        return lambda accepted, code: self.handle(Receipt(digest, accepted, code))

    def submit(
        self,
        digest: bytes,
        wire: bytes,
        answered: Callable[[bool, int], None],
        expected: set[Code] | None = None,
    ) -> None:
        """Upload a packet. `expected` are the codes for which a hostile one must be refused."""
        link, life = self.link, self.life
        if link is None:
            self.later(_OWN_TIME_S, lambda: answered(False, Code.BUSY))
            return
        aggregator = self._aggregator
        call = link.call(lambda: answered(False, Code.BUSY) if self.life == life else None)

        def reply(accepted: bool, code: int) -> None:
            durable = digest in aggregator.disk.rows and ("packet", digest) in aggregator.disk.blobs
            by = (aggregator.head, aggregator.epoch) if durable else None
            self.swarm.checkers.receipt(digest, accepted, code, by=by, expected=expected)
            link.down(
                CONTROL_BYTES,
                lambda: answered(accepted, code) if link.answered(call) and self.life == life else None,
            )

        aggregator_life = aggregator.life

        def arrive() -> None:
            if aggregator.up and aggregator.life == aggregator_life:
                aggregator.enter(lambda: aggregator.submit(self.key.public, digest, wire, reply))

        size = self.swarm.sizes.packet(wire)
        link.up(size, arrive, survives=True)
        if self.chance.random() < self.swarm.faults.duplicate:
            link.up(size, arrive, survives=True)

    def _settle(self, effect: Settle) -> None:
        """Commit what counts; put everything else back into the residual. Durable at once."""
        replica, checkers, peer = self.replica, self.swarm.checkers, self.key.public
        if self.disk.packet is None:
            local = replica.flat.values.numpy().copy()
            try:
                replica.absorb()
            except ValueError:
                replica.abandon()
                checkers.diverged(peer, residual_lost=False)
                return
            checkers.absorbed(peer, replica.outer.numpy(), local, replica.residual.numpy())
        else:
            if effect.accepted:
                replica.commit()
            else:
                replica.restore()
            checkers.settled(peer, effect.round, effect.accepted, replica.residual.numpy())
        self._store(self.disk.record, None)

    def _apply_update(self, record: RoundRecord) -> None:
        fetched, self._fetched = self._fetched, None
        if fetched is None or fetched.record.digest != record.digest:
            self._get_update(record, partial(self._got_update, record))
        elif fetched.outcome is None:
            fetched.awaited = True
        else:
            self._got_update(record, fetched.outcome)

    def _prefetch(self, record: RoundRecord) -> None:
        """Fetch an update beside the training; whoever applies it takes it, or hears why it is not here."""
        fetched = self._fetched = Fetched(record)

        def ended(outcome: Sequence[bytes] | Failed) -> None:
            fetched.outcome = outcome
            self.handle(Prefetched(record.digest))
            if fetched.awaited:
                self._got_update(record, outcome)

        self._get_update(record, ended)

    def _got_update(self, record: RoundRecord, outcome: Sequence[bytes] | Failed) -> None:
        if isinstance(outcome, Failed):
            self._fail(gone=outcome.gone, reason=outcome.reason)
        else:
            self._applied(record, outcome)

    def _get_update(self, record: RoundRecord, ended: Callable[[Sequence[bytes] | Failed], None]) -> None:
        """Fetch and read an update in the form that is offered."""
        base = self.machine.record
        assert base is not None, "an update follows a record"

        def lost() -> None:
            ended(Failed("lost"))

        def got_bundle(data: bytes | None) -> None:
            self._bundle_of = b""
            if data is None:
                self.fetch("update", record.update_digest, got_update, lost)
            else:
                ended(self.swarm.sections_of(data, record, base.state_root))

        def got_update(data: bytes | None) -> None:
            if data is None:
                ended(Failed("the update is gone", gone=True))
            else:
                ended(self.swarm.sections_of(data, record))

        if record.update_digest == NO_DIGEST:
            self.later(_OWN_TIME_S, lambda: ended(()))
        elif self._bundle_of == record.digest:
            self.fetch("bundle", record.digest, got_bundle, lost)
        else:
            self.fetch("update", record.update_digest, got_update, lost)

    def _applied(self, record: RoundRecord, sections: Sequence[bytes]) -> None:
        root = self._carried(self.replica.apply(sections))
        if self.chance.random() < self.swarm.faults.corrupt:
            self.replica.flip_bit()
            root = self._carried(self.replica.apply(()))
        self._arrived_at(record, root)

    def _carried(self, root: bytes) -> bytes:
        """Let the checkers see what became of the local parameters."""
        self.swarm.checkers.carried(self.key.public, self.replica.outer.numpy(), self.replica.flat.values.numpy())
        return root

    def _fetch_state(self, record: RoundRecord) -> None:
        """Fetch the state piece by piece; the pieces that are there stay, through cuts and deaths."""

        def got(data: bytes | None) -> None:
            self._pieces += 1
            if data is None:
                self._pieces_of = b""
                self._fail(gone=True, reason="the state is gone")
            elif self._pieces < STATE_PIECES:
                self._fetch_state(record)
            else:
                self._pieces_of = b""
                self._arrived_at(record, self._carried(self.replica.load_outer(self.swarm.state_of(data))))

        if self._pieces_of != record.state_root:
            self._pieces_of, self._pieces = record.state_root, 0
        self.fetch("state", record.state_root, got)

    def _arrived_at(self, record: RoundRecord, root: bytes) -> None:
        if root == record.state_root:
            # The machine may have gone to another branch meanwhile, but this is a state of the run.
            self._store(record, None)
            self.swarm.checkers.moved(self.key.public, record, self.replica.outer.numpy())
        self._finish(Applied(record.round, root))

    def _catch_up(self, effect: CatchUp, records: list[RoundRecord]) -> None:
        """Fetch one record after the other, back to the one that is held."""
        if records[-1].round <= effect.have.round + 1:
            self._finish(Recorded(tuple(reversed(records))))
            return

        def got(data: bytes | None) -> None:
            if data is None:
                self._fail(gone=True, reason="the record is gone")
            else:
                self._catch_up(effect, [*records, self.swarm.checkers.records[RoundRecord.from_bytes(data).digest]])

        self.fetch("record", records[-1].previous, got)

    def check_bounds(self) -> None:
        """Nothing here grows without end."""
        waiting = 0 if self.link is None else self.link.calls_waiting
        self.swarm.checkers.bounded(self.name, self.machine, {"calls": 100 * waiting})
