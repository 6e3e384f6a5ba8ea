"""A swarm of round machines without network, disk or clock, under random faults; and what must hold whatever happens.

Everything is drawn from one seed. Mass stands in for pseudo-gradients: an inner step makes one unit, a packet sends two
thirds of what its sender holds. What is durable survives a kill, everything else is lost with it.
"""

import dataclasses
import heapq
import random
from collections.abc import Callable
from typing import Any

from protocol.errors import Code
from protocol.identity import NO_DIGEST, digest
from protocol.ledger import CloseReason, Entry, Kind, RoundRecord, Verdict, check_link
from protocol.round import (
    Accept,
    AggregatorEvent,
    AggregatorRound,
    Alarm,
    Applied,
    ApplyUpdate,
    Arrived,
    CatchUp,
    Close,
    Connected,
    Failed,
    InnerDone,
    Joined,
    Left,
    LoadState,
    Lost,
    MakePacket,
    Opened,
    PacketReady,
    Receipt,
    Recorded,
    Reject,
    ReplicaEvent,
    ReplicaRound,
    Send,
    Settle,
    StopInner,
    Tick,
    TrainInner,
    WakeAt,
)
from protocol.run import OuterConfig, RoundConfig, RunConfig, RunSettings
from tests.protocol.codec_samples import make_run

STEPS = 10


@dataclasses.dataclass(frozen=True)
class Faults:
    """Mean seconds between faults of each kind over the whole swarm; chances of the others."""

    kill_s: float = 60.0
    cut_s: float = 30.0
    crash_s: float = 300.0
    fail: float = 0.05
    corrupt: float = 0.02
    busy: float = 0.05


class Clock:
    """Virtual time and what is to happen."""

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._count, action))

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._events)
            action()
        self.now_s = until_s


class Link:
    """A connection that keeps the order of its messages until it is cut."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.alive = True
        self._free_s = {"up": 0.0, "down": 0.0}

    def carry(self, direction: str, action: Callable[[], None], delay_s: float = 0.0) -> None:
        delay_s += self.clock.random.uniform(0.01, 0.5)
        at_s = max(self._free_s[direction], self.clock.now_s + delay_s)
        self._free_s[direction] = at_s

        def arrive() -> None:
            if self.alive:
                action()

        self.clock.after(at_s - self.clock.now_s, arrive)


class Aggregator:
    """The aggregator's driver: `records` and `journal` are durable."""

    def __init__(self, swarm: "Swarm") -> None:
        run = swarm.run
        self.swarm, self.clock = swarm, swarm.clock
        genesis = RoundRecord(
            run.run_id, 0, 0, NO_DIGEST, Kind.GENESIS, CloseReason.NONE, run.genesis_root, NO_DIGEST, 0, 0, ()
        )
        self.records = [genesis]
        self.journal: dict[bytes, Arrived] = {}
        self.receipted: set[bytes] = set()
        self.epoch = 0
        self.up = True
        self.life = 0
        self._begin()

    def _begin(self) -> None:
        self.links: list[Link] = []
        self.watchers: dict[bytes, list[Link]] = {}
        head = self.records[-1]
        self.round = AggregatorRound(
            self.swarm.run,
            head.round + 1,
            head.state_root,
            self.clock.now_s,
            taken_up=[item for item in self.journal.values() if item.inner_steps],
        )
        self.handle(Tick())

    def crash(self) -> None:
        if not self.up:
            return
        self.up = False
        self.life += 1
        for link in self.links:
            link.alive = False
        self.clock.after(self.clock.random.uniform(1, 40), self._restart)

    def _restart(self) -> None:
        self.up = True
        self.life += 1
        self._begin()

    def watch(self, peer: bytes, link: Link) -> None:
        self.watchers.setdefault(peer, []).append(link)
        if len(self.watchers[peer]) == 1:
            self.handle(Joined(peer))
        self.swarm.deliver(peer, link, Recorded((self.records[-1],)))
        if not self.round.closed:
            self.swarm.deliver(peer, link, self._opened())

    def leave(self, peer: bytes, link: Link) -> None:
        if self.up and link in self.watchers.get(peer, []):
            self.watchers[peer].remove(link)
            if not self.watchers[peer]:
                del self.watchers[peer]
                self.handle(Left(peer))

    def submit(self, peer: bytes, link: Link, packet: Arrived, round: int) -> None:
        code = self.round.refusal(peer, packet.digest)
        if code is None and round != self.round.round:
            code = Code.LATE if round < self.round.round else Code.WRONG_ROUND
        if code is None and self.clock.random.random() < self.swarm.faults.busy:
            code = self.clock.random.choice([Code.BUSY, Code.WRONG_DIGEST])
        if code is None:
            self.journal.setdefault(packet.digest, packet)
            for effect in self.handle(packet):
                if isinstance(effect, Accept):
                    self.receipted.add(effect.digest)
                    self.swarm.deliver(peer, link, Receipt(effect.digest, True, 0))
                elif isinstance(effect, Reject):
                    self.swarm.deliver(peer, link, Receipt(effect.digest, False, effect.code))
        else:
            self.swarm.deliver(peer, link, Receipt(packet.digest, False, code))

    def handle(self, event: AggregatorEvent) -> tuple[Any, ...]:
        assert self.up
        effects = self.round.handle(event, self.clock.now_s)
        for effect in effects:
            if isinstance(effect, WakeAt):
                self._later(max(0.0, effect.at_s - self.clock.now_s), lambda: self.handle(Tick()))
            elif isinstance(effect, Close):
                assert self.clock.now_s <= self.round.deadline_at_s + 1e-6
                self._later(self.clock.random.uniform(0.1, 5), lambda close=effect: self._record(close))
        return effects

    def _later(self, delay_s: float, action: Callable[[], None] | Callable[[], Any]) -> None:
        life = self.life
        self.clock.after(delay_s, lambda: action() if self.up and self.life == life else None)

    def _record(self, close: Close) -> None:
        head = self.records[-1]
        entries = []
        for item in close.submissions:
            good = item.verdict == Verdict.ACCEPTED
            weight, clip = (1024, 65536) if good else (0, 0)
            entries.append(
                Entry(item.peer, item.digest, item.verdict, item.code, item.tokens, item.inner_steps, weight, clip)
            )
        applied = close.kind == Kind.APPLIED
        content = head.state_root + b"".join(e.packet_digest for e in entries if e.verdict == Verdict.ACCEPTED)
        record = RoundRecord(
            self.swarm.run.run_id,
            self.round.round,
            self.epoch,
            head.digest,
            close.kind,
            close.reason,
            digest("update", content) if applied else head.state_root,
            digest("update", content + b"u") if applied else NO_DIGEST,
            int(self.round.started_s * 1000),
            int(self.clock.now_s * 1000),
            tuple(entries),
        )
        check_link(head, record)
        RoundRecord.from_bytes(record.to_bytes())
        self.records.append(record)
        self.journal.clear()
        self.swarm.check_receipts(record)
        for peer, links in self.watchers.items():
            for link in links:
                self.swarm.deliver(peer, link, Recorded((record,)))
        self.round = self.round.next(record.state_root, self.clock.now_s)
        for peer, links in self.watchers.items():
            for link in links:
                self.swarm.deliver(peer, link, self._opened())
        self.handle(Tick())

    def _opened(self) -> Opened:
        left_s = self.round.deadline_at_s - self.clock.now_s
        return Opened(self.round.round, self.round.base_root, STEPS, left_s)


@dataclasses.dataclass
class Disk:
    """What a replica keeps: its record, its residual, and an unsettled packet with what undoes it."""

    record: RoundRecord | None = None
    residual: int = 0
    packet: tuple[int, bytes, int, int] | None = None  # round, digest, mass sent, inner steps
    made: int = 0  # mass that was ever made durable
    packets: int = 0


class Replica:
    """A replica's driver."""

    def __init__(self, swarm: "Swarm", peer: bytes, step_s: float) -> None:
        self.swarm, self.clock, self.peer, self.step_s = swarm, swarm.clock, peer, step_s
        self.disk = Disk()
        self.settled: set[bytes] = set()
        self.up = False
        self.life = 0
        self.link: Link | None = None
        self.start()

    def start(self) -> None:
        self.up = True
        self.life += 1
        self.work = 0
        self.root = None if self.disk.record is None else self.disk.record.state_root
        packet = self.disk.packet and self.disk.packet[:2]
        self.machine = ReplicaRound(self.swarm.run, record=self.disk.record, packet=packet)
        self.job: Any = None
        self.stop_s: float | None = None
        self._dial()

    def kill(self) -> None:
        if self.up:
            self.up = False
            self.life += 1
            self._cut()
            self.clock.after(self.clock.random.uniform(1, 60), self.start)

    def cut(self) -> None:
        if self.up and self.link is not None:
            self._cut()
            self._later(self.clock.random.uniform(0, 3), self._lost)

    def _cut(self) -> None:
        if self.link is not None:
            link, self.link = self.link, None
            link.alive = False
            notice_s = self.clock.random.uniform(0, 20)
            self.clock.after(notice_s, lambda: self.swarm.aggregator.leave(self.peer, link))

    def _lost(self) -> None:
        if self.link is None:
            self.handle(Lost("cut"))
            self._later(self.clock.random.uniform(0.5, 10), self._dial)

    def _dial(self) -> None:
        if self.link is not None:
            return
        if not self.swarm.aggregator.up:
            self._later(self.clock.random.uniform(1, 10), self._dial)
            return
        link = self.link = Link(self.clock)
        self.swarm.aggregator.links.append(link)
        head = self.swarm.aggregator.records[-1]
        link.carry("down", lambda: self.handle(Connected(head)))
        link.carry("up", lambda: self.swarm.aggregator.watch(self.peer, link), delay_s=self.clock.random.uniform(0, 8))
        self._guard(link)

    def _guard(self, link: Link) -> None:
        """Notice within seconds that the other side is gone."""
        if self.link is link and not link.alive:
            self.link = None
            self._lost()
        elif self.link is link:
            self._later(2.0, lambda: self._guard(link))

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        life = self.life
        self.clock.after(delay_s, lambda: action() if self.up and self.life == life else None)

    def handle(self, event: ReplicaEvent) -> None:
        assert self.up
        for effect in self.machine.handle(event, self.clock.now_s):
            if isinstance(effect, TrainInner | MakePacket | ApplyUpdate | LoadState | CatchUp):
                assert self.job is None, f"{effect} while {self.job} is under way"
                self.job = effect
            self._perform(effect)

    def _answer(self, delay_s: float, event: Callable[[], ReplicaEvent]) -> None:
        def answer() -> None:
            self.job = None
            self.handle(event())

        self._later(delay_s, answer)

    def _perform(self, effect: Any) -> None:
        chance = self.clock.random.random
        delay_s = self.clock.random.uniform(0.1, 4)
        match effect:
            case WakeAt():
                self._later(max(0.0, effect.at_s - self.clock.now_s), lambda: self.handle(Tick()))
            case TrainInner():
                assert self.disk.record is not None
                assert self.root == self.disk.record.state_root
                assert (self.disk.packet, self.work) == (None, 0)
                started_s = self.clock.now_s
                self.stop_s = started_s + effect.steps * self.step_s
                self._train(effect, started_s)
            case StopInner():
                self.stop_s = min(self.stop_s or 0.0, self.clock.now_s + self.step_s)
            case MakePacket():
                self._answer(delay_s, lambda: self._pack(effect))
            case Send():
                self._send(effect)
            case Settle():
                self._settle(effect)
            case ApplyUpdate() | LoadState() if chance() < self.swarm.faults.fail:
                gone = chance() < 0.3
                self._answer(delay_s, lambda: Failed("no", gone=gone))
            case ApplyUpdate():
                self._answer(delay_s, lambda: self._apply(effect, self.root))
            case LoadState():
                self._answer(delay_s * 10, lambda: self._apply(effect, None))
            case CatchUp():
                self._answer(delay_s, lambda: self._catch_up(effect))
            case Alarm():
                self.swarm.alarms.append(effect.reason)

    def _train(self, effect: TrainInner, started_s: float) -> None:
        def look() -> None:
            assert self.stop_s is not None
            if self.clock.now_s < self.stop_s - 1e-9:
                self._later(min(self.step_s, self.stop_s - self.clock.now_s), look)
                return
            self.work = min(effect.steps, int((self.clock.now_s - started_s) / self.step_s + 1e-6))
            self.job = None
            self.handle(InnerDone(effect.round, self.work, self.work * 100))

        look()

    def _pack(self, effect: MakePacket) -> ReplicaEvent:
        if self.clock.random.random() < self.swarm.faults.fail:
            self.work = 0
            return Failed("not a number")
        acc = self.disk.residual + self.work
        sent = 2 * acc // 3
        name = digest("packet", self.peer + self.disk.packets.to_bytes(4, "little"))
        self.disk = dataclasses.replace(
            self.disk,
            residual=acc - sent,
            packet=(effect.round, name, sent, effect.steps),
            made=self.disk.made + self.work,
            packets=self.disk.packets + 1,
        )
        self.swarm.mass[name] = sent
        self.work = 0
        return PacketReady(name)

    def _send(self, effect: Send) -> None:
        assert self.disk.packet is not None
        round, name, _, steps = self.disk.packet
        assert name == effect.digest
        link = self.link
        if link is not None:
            packet = Arrived(self.peer, name, steps * 100, steps)
            upload_s = self.clock.random.uniform(0.2, 3)
            link.carry("up", lambda: self.swarm.aggregator.submit(self.peer, link, packet, round), delay_s=upload_s)

    def _settle(self, effect: Settle) -> None:
        if self.disk.packet is None:
            assert not effect.accepted
            assert self.work > 0
            disk = dataclasses.replace(
                self.disk, residual=self.disk.residual + self.work, made=self.disk.made + self.work
            )
        else:
            round, name, sent, _ = self.disk.packet
            assert round == effect.round
            assert name not in self.settled
            self.settled.add(name)
            back = 0 if effect.accepted else sent
            disk = dataclasses.replace(self.disk, residual=self.disk.residual + back, packet=None)
        self.disk, self.work = disk, 0

    def _apply(self, effect: ApplyUpdate | LoadState, base: bytes | None) -> ReplicaEvent:
        record = effect.record
        if isinstance(effect, ApplyUpdate):
            previous = self.swarm.aggregator.records[record.round - 1]
            assert base == previous.state_root, "an update is applied to the state that it was made for"
        if self.clock.random.random() < self.swarm.faults.corrupt:
            self.root = b"corrupt".ljust(32)
            return Applied(record.round, self.root)
        self.root = record.state_root
        self.disk = dataclasses.replace(self.disk, record=record)
        return Applied(record.round, record.state_root)

    def _catch_up(self, effect: CatchUp) -> ReplicaEvent:
        if self.clock.random.random() < self.swarm.faults.fail:
            return Failed("no")
        records = self.swarm.aggregator.records
        return Recorded(tuple(records[effect.have.round + 1 : effect.head.round + 1]))


class Swarm:
    """One aggregator and its peers, with the checks that hold at any time."""

    def __init__(self, seed: int, peers: int, faults: Faults, *, quorum: int = 2) -> None:
        self.clock = Clock(seed)
        self.faults = faults
        self.run = _run(quorum)
        self.mass: dict[bytes, int] = {}
        self.alarms: list[str] = []
        self.aggregator = Aggregator(self)
        speeds = [self.clock.random.choice([0.5, 1.0, 1.5, 20.0]) for _ in range(peers)]
        self.replicas = {
            bytes([i + 1]) * 32: Replica(self, bytes([i + 1]) * 32, speed) for i, speed in enumerate(speeds)
        }
        self._fault(faults.kill_s, lambda: self._anyone().kill())
        self._fault(faults.cut_s, lambda: self._anyone().cut())
        self._fault(faults.crash_s, self.aggregator.crash)

    def _anyone(self) -> Replica:
        return self.clock.random.choice(list(self.replicas.values()))

    def _fault(self, mean_s: float, strike: Callable[[], Any]) -> None:
        def again() -> None:
            if self.faults is not CALM:
                strike()
                self.clock.after(self.clock.random.expovariate(1 / mean_s), again)

        if mean_s < float("inf"):
            self.clock.after(self.clock.random.expovariate(1 / mean_s), again)

    def deliver(self, peer: bytes, link: Link, event: ReplicaEvent) -> None:
        def arrive() -> None:
            replica = self.replicas[peer]
            if replica.up and replica.link is link:
                replica.handle(event)

        link.carry("down", arrive)

    def check_receipts(self, record: RoundRecord) -> None:
        """Every packet with a receipt stands in the record of its round, accepted unless the round is null."""
        listed = {entry.packet_digest: entry for entry in record.entries}
        assert self.aggregator.receipted <= set(listed)
        for name in self.aggregator.receipted:
            accepted = listed[name].verdict == Verdict.ACCEPTED
            assert accepted or listed[name].code == Code.NO_QUORUM
        self.aggregator.receipted.clear()

    def check_mass(self) -> None:
        """What a peer ever made is applied, in its residual, or in a packet whose fate is open."""
        applied: dict[bytes, int] = {}
        fate: dict[bytes, bool] = {}
        for record in self.aggregator.records:
            for entry in record.entries:
                fate[entry.packet_digest] = entry.verdict == Verdict.ACCEPTED
                if fate[entry.packet_digest]:
                    applied[entry.peer] = applied.get(entry.peer, 0) + self.mass[entry.packet_digest]
        for peer, replica in self.replicas.items():
            disk = replica.disk
            held = disk.packet[2] if disk.packet is not None and not fate.get(disk.packet[1], False) else 0
            assert applied.get(peer, 0) + disk.residual + held == disk.made


CALM = Faults(float("inf"), float("inf"), float("inf"), 0.0, 0.0, 0.0)


def _run(quorum: int) -> RunConfig:
    rules = RoundConfig(quorum=quorum, grace_s_min=1.0, grace_s_max=20.0, deadline_s=60.0, start_peers=2)
    run = make_run()
    settings = RunSettings("machines", outer=OuterConfig(rounds=100_000), rounds=rules)
    return RunConfig.of(
        settings, operator=run.operator, aggregators=run.aggregators, layout=run.layout, genesis_root=run.genesis_root
    )
