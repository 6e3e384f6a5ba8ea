"""One simulation: puts the swarm together, lets things go wrong, and watches until the run is complete."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peer.merge import sections_of_bundle, sections_of_update
from peer.sim import hostile
from peer.sim.aggregator import Aggregator, Disk
from peer.sim.checkers import BrokenError, Checkers
from peer.sim.clock import Clock, Story, chance_of
from peer.sim.model import Problem
from peer.sim.network import Link, Traffic
from peer.sim.settings import NEVER, Faults, Settings, Sizes, genesis_state, key_of, make_run
from peer.sim.standby import StandbyDriver
from peer.sim.volunteer import STATE_PIECES, Volunteer
from protocol.errors import ProtocolError
from protocol.ledger import Kind, RoundRecord, Verdict
from protocol.packet import Packet
from protocol.round import Opened

SLACK_ROUNDS = 30  # a round length is waited so often for something to happen before the run counts as stuck
AGGREGATORS = ("A0", "A1", "A2")


class SimulationError(Exception):
    """A checker fired, or something else went wrong that never may."""

    def __init__(self, settings: Settings, checker: str, what: str, now_s: float, story: Story) -> None:
        super().__init__(f"{checker}: {what}")
        self.settings, self.checker, self.what, self.now_s, self.story = settings, checker, what, now_s, story


@dataclass
class Outcome:
    """What came out of a simulation without anything going wrong that may not."""

    settings: Settings
    digest: str
    events: int
    virtual_s: float
    losses: list[float]
    rounds: dict[str, int]
    """How many rounds closed for which reason."""
    listed: int
    accepted: int
    peer_rounds: int
    """Packets that were accepted or could have been: peers that were there, round by round."""
    inner_share: float
    """Share of the time that peers were there in which they did inner steps."""
    steps_counted: float
    """Share of the inner steps done that a record accepted."""
    up_bytes: int
    down_bytes: int
    crashes: int
    takeovers: int
    deaths: int
    attacks: int
    alarms: int
    orphaned: int
    """Packets that were settled by a record which a takeover left behind."""


class Swarm:
    """Everything in one place. `simulate` is the way in."""

    def __init__(self, settings: Settings, tell: Callable[[str], None] | None = None) -> None:
        self.settings = settings
        self.faults = settings.faults
        self.clock = Clock()
        self.story = Story(tell)
        self.chance = chance_of(settings.seed, "faults")
        self._wire = chance_of(settings.seed, "wire")
        keys = tuple(key_of(settings.seed, name).public for name in AGGREGATORS)
        self.run = make_run(settings, keys)
        self.sizes = Sizes(settings.values, settings.k)
        self.problem = Problem(self.run.layout.size, settings.seed, settings.k, settings.steps)
        self.checkers = Checkers(self.run, genesis_state(self.run.layout))
        self.seen: Packet | None = None
        self.step_s = settings.inner_s / settings.steps
        self.step_tokens = self.run.nominal_tokens // settings.steps
        self.pack_s = settings.inner_s / 50
        self.alarms = self.attacks = self.deaths = self.takeovers = 0
        self._links = 0
        self._read: tuple[bytes, bytes, bytes | None, Sequence[bytes]] | None = None
        self._gone = Traffic()
        self._closed: list[RoundRecord] = []
        self._losses: list[float] = []
        self._present = 0
        self._progress_s = 0.0
        self._split_until_s = 0.0
        self._complete = False
        self.standbys: list[StandbyDriver] = []
        self.aggregators = [Aggregator(self, AGGREGATORS[0])]
        self.peers = [self._peer(number) for number in range(settings.peers)]
        self._hostile = set(self.peers[: settings.hostile])

    @property
    def aggregator(self) -> Aggregator:
        """The one that leads in the highest epoch."""
        return max((item for item in self.aggregators if not item.retired), key=lambda item: item.epoch)

    def _peer(self, number: int) -> Volunteer:
        chance = chance_of(self.settings.seed, f"pace {number}")
        pace = chance.lognormvariate(0, 0.1) * (10.0 if chance.random() < self.settings.stragglers else 1.0)
        return Volunteer(self, f"P{number:0{len(str(self.settings.peers - 1))}d}", self.step_s * pace)

    # What happens

    def start(self) -> None:
        """Let everybody begin, and things go wrong from now on."""
        self.aggregator.start()
        self.aggregator.meet()
        for name in AGGREGATORS[1:]:
            self._stand_by(name)
        for peer in self.peers:
            self.clock.after(self.chance.uniform(0, self.settings.inner_s / 2), peer.start)
            self._churn(peer)
        faults = self.faults
        self._strike(faults.kill_s, self._kill_somebody)
        self._strike(faults.cut_s, self._cut_something)
        self._strike(faults.partition_s, self._partition)
        self._strike(faults.crash_s, self._crash)
        self._strike(faults.takeover_s, self._silence_the_leader)

    def go(self) -> Outcome:
        """Run until the run is complete and every peer has its last state. Raises SimulationError."""
        try:
            self.start()
            while not self._over():
                self.clock.step()
                stuck_s = SLACK_ROUNDS * (self.settings.rules.deadline_s + self.settings.away_s + self.settings.inner_s)
                if self.clock.now_s - self._progress_s > stuck_s or not self.clock.waiting:
                    raise BrokenError("progress", f"nothing has moved for {stuck_s:g} s")
            self._check_the_end()
        except (
            BrokenError,
            ProtocolError,
            AssertionError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            checker = error.checker if isinstance(error, BrokenError) else type(error).__name__
            raise SimulationError(self.settings, checker, str(error), self.clock.now_s, self.story) from error
        return self._outcome()

    def _over(self) -> bool:
        return all(peer.done for peer in self.peers)

    def _last(self) -> RoundRecord:
        """The last record of the run; of two branches that came to their ends, that of the higher epoch."""
        return max((peer.machine.record for peer in self.peers if peer.machine.record), key=lambda item: item.epoch)

    def _check_the_end(self) -> None:
        last = self._last()
        self.checkers.books_balance(last.epoch)
        for peer in self.peers:
            held = peer.machine.record
            assert held is not None, "a finished peer has a record"
            # Whoever finished before it could hear of a takeover has the last state of the other branch.
            wanted = held if held.epoch < last.epoch else last
            self.checkers.moved(peer.key.public, wanted, peer.replica.outer.numpy())

    def closed(self, leader: Aggregator, record: RoundRecord) -> None:
        """A round is over: take the figures, and look at what is checked once a round."""
        if record.round >= self.run.outer.rounds:
            self._complete = True
            self.faults = Faults()
        self._closed.append(record)
        self._progress_s = self.clock.now_s
        present = [peer for peer in self.peers if peer.up]
        self._present += len(present) if leader is self.aggregator else 0
        self._losses.append(self.problem.loss(leader.state))
        self.checkers.books_balance()
        leader.check_bounds()
        for peer in present:
            peer.check_bounds()
        limit = 60 * len(self.peers) + 400
        if self.clock.waiting > limit:
            raise BrokenError("memory", f"{self.clock.waiting} things are to happen")

    def opened(self, peer: Volunteer, event: Opened) -> None:
        """A peer heard of a round; a hostile one has plans for it."""
        if peer in self._hostile and peer.up:
            hostile.attack(peer, event)

    def _strike(self, mean_s: float, fault: Callable[[], object]) -> None:
        def again() -> None:
            if not self._complete:
                fault()
                self.clock.after(self.chance.expovariate(1 / mean_s), again)

        if mean_s < NEVER:
            self.clock.after(self.chance.expovariate(1 / mean_s), again)

    def _crash(self) -> None:
        self.aggregator.crash()

    def _kill_somebody(self) -> None:
        lose_disk = self.chance.random() < self.faults.lose_disk
        self._kill(self.chance.choice(self.peers), self.chance.uniform(1, 60), lose_disk=lose_disk)

    def _kill(self, peer: Volunteer, away_s: float, *, lose_disk: bool = False) -> None:
        if peer.up:
            self.deaths += 1
            peer.kill(away_s=away_s, lose_disk=lose_disk)

    def _churn(self, peer: Volunteer) -> None:
        """Half of the peers that are there are gone after the half-life."""
        settings = self.settings

        def leave() -> None:
            if not self._complete:
                away_s = self.chance.expovariate(1 / settings.away_s)
                self._kill(peer, away_s)
                self.clock.after(away_s + self._stay_s(), leave)

        if settings.half_life_s < NEVER:
            self.clock.after(self._stay_s(), leave)

    def _stay_s(self) -> float:
        return self.chance.expovariate(math.log(2) / self.settings.half_life_s)

    def _cut_something(self) -> None:
        peer = self.chance.choice(self.peers)
        if peer.link is not None:
            self.story.add(self.clock.now_s, peer.name, "its link breaks")
            peer.cut()

    def _partition(self) -> None:
        """A part of the peers reaches nobody; what takes longer than the keepalive breaks their links."""
        group = [peer for peer in self.peers if self.chance.random() < 0.4]
        length_s = self.chance.choice([3.0, 10.0, 40.0])
        self.story.add(self.clock.now_s, "net", f"{len(group)} peers are cut off for {length_s:g} s")
        for peer in group:
            peer.unreachable_until_s = self.clock.now_s + length_s
            if peer.link is not None:
                peer.link.stalled_until_s = peer.unreachable_until_s
                if length_s > 20:
                    peer.cut()

    def _silence_the_leader(self) -> None:
        """The leader is away for long, or the aggregators cannot hear each other; a standby takes over."""
        if self.aggregator.head.round > self.run.outer.rounds / 2:
            return
        length_s = self.chance.uniform(60, 200)
        if self.chance.random() < 0.5:
            self.aggregator.crash(away_s=length_s)
        else:
            self.story.add(self.clock.now_s, "net", f"the aggregators are split for {length_s:.0f} s")
            self._split_until_s = self.clock.now_s + length_s

    @property
    def split(self) -> bool:
        """Whether the aggregators cannot hear each other."""
        return self.clock.now_s < self._split_until_s

    def take_over(self, standby: StandbyDriver, leader: Aggregator) -> None:
        """A standby leads from now on."""
        self.story.add(self.clock.now_s, leader.name, f"takes over after round {leader.head.round}")
        self.takeovers += 1
        self.standbys.remove(standby)
        self.aggregators.append(leader)
        leader.start()
        leader.meet()

    def meet(self, leader: Aggregator) -> None:
        """A leader hears of the others' heads."""
        for other in [item for item in self.aggregators if item.up and item is not leader]:
            theirs = other.head.epoch, other.head.round
            # As long as it signed nothing in its epoch, one that has as many records goes on instead.
            yields = leader.epoch > leader.head.epoch and theirs >= (leader.head.epoch, leader.head.round)
            if (yields or theirs > (leader.epoch, leader.head.round)) and not leader.retired:
                self.retire(leader)

    def retire(self, leader: Aggregator) -> None:
        """A leader learned of a higher epoch."""
        self.story.add(self.clock.now_s, leader.name, "stands by")
        leader.retire()
        self._stand_by(leader.name, leader.disk)

    def _stand_by(self, name: str, own: Disk | None = None) -> None:
        standby = StandbyDriver(self, name, stood_by=self.takeovers, own=own)
        self.standbys.append(standby)
        standby.follow()

    def find(self, peer: Volunteer) -> Aggregator | None:
        """Where a peer joins: an aggregator that leads. One that has not heard of a takeover is told of it."""
        leaders = [item for item in self.aggregators if item.up]
        self._wire.shuffle(leaders)
        leaders.sort(key=lambda item: item.epoch != peer.newest[0])
        for leader in leaders:
            if leader.head.epoch >= peer.newest[0]:
                return leader
            if peer.newest > (leader.epoch, leader.head.round):
                self.retire(leader)
        return None

    # The network

    def connect(self, peer: Volunteer, aggregator: Aggregator) -> Link:
        """A new connection."""
        self._links += 1
        link = Link(self.clock, self._wire, self.settings.access, aggregator.lanes, self._links)
        aggregator.links[link] = peer
        return link

    def cut(self, link: Link, peer: Volunteer, aggregator: Aggregator) -> None:
        """Break a connection; either side notices in its own time."""
        if not link.alive:
            return
        link.alive = False
        self._gone.up += link.traffic.up
        self._gone.down += link.traffic.down
        self.clock.after(self._wire.uniform(0, 3), lambda: peer.lost(link))
        aggregator.later(self._wire.uniform(0, 20), lambda: aggregator.leave(peer, link))

    def size_of(self, kind: str, digest: bytes, data: bytes) -> int:
        """Bytes of a blob on a link."""
        if not self.settings.values:
            return len(data) if kind != "state" else len(data) // STATE_PIECES
        match kind:
            case "state":
                return self.sizes.state(data) // STATE_PIECES
            case "update":
                return self.sizes.update(data, self._contributors(digest))
            case "bundle":
                return self._contributors(digest) * (4 + self.sizes.packet(data))
            case _:
                return len(data)

    def _contributors(self, digest: bytes) -> int:
        found = (item for item in reversed(self._closed) if digest in (item.update_digest, item.digest))
        record = next(found, None)
        return 1 if record is None else self.checkers.contributors(record)

    def sections_of(self, data: bytes, record: RoundRecord, base_root: bytes | None = None) -> Sequence[bytes]:
        """What a peer reads and checks in an update, or with a base in a bundle.

        All peers read the same bytes, and what they make of them depends on nothing else, so it is done once.
        """
        if self._read is None or self._read[0] is not data or self._read[1:3] != (record.digest, base_root):
            if base_root is None:
                sections = sections_of_update(data, record, self.run)
            else:
                sections = sections_of_bundle(data, record, base_root, self.run)
            self._read = data, record.digest, base_root, sections
        return self._read[3]

    def state_of(self, data: bytes) -> NDArray[np.float32]:  # -> f32[N]
        """The parameters in these bytes."""
        return np.frombuffer(data, np.float32)

    # What came out

    def _outcome(self) -> Outcome:
        reasons: dict[str, int] = {}
        listed = accepted = steps = 0
        for record in self.checkers.chain(self._last()):
            name = "null" if record.kind == Kind.NULL else record.reason.name.lower()
            reasons[name] = reasons.get(name, 0) + 1
            listed += len(record.entries)
            good = [entry for entry in record.entries if entry.verdict == Verdict.ACCEPTED]
            accepted += len(good)
            steps += sum(entry.inner_steps for entry in good if entry.tokens == entry.inner_steps * self.step_tokens)
        there_s = sum(peer.present_s for peer in self.peers)
        return Outcome(
            settings=self.settings,
            digest=self.story.digest,
            events=self.story.events,
            virtual_s=self.clock.now_s,
            losses=self._losses,
            rounds=reasons,
            listed=listed,
            accepted=accepted,
            peer_rounds=self._present,
            inner_share=sum(peer.inner_s for peer in self.peers) / there_s if there_s else 0.0,
            steps_counted=steps / max(1, sum(peer.steps for peer in self.peers)),
            up_bytes=self._gone.up,
            down_bytes=self._gone.down,
            crashes=sum(item.crashes for item in self.aggregators),
            takeovers=self.takeovers,
            deaths=self.deaths,
            attacks=self.attacks,
            alarms=self.alarms,
            orphaned=self.checkers.orphaned,
        )


def simulate(settings: Settings, tell: Callable[[str], None] | None = None) -> Outcome:
    """Run one simulation to its end. Raises SimulationError; `tell` hears every event as a line."""
    return Swarm(settings, tell).go()


def replayed(settings: Settings) -> Outcome:
    """Run it twice; the same seed must give the same events and the same bytes."""
    first, second = simulate(settings), simulate(settings)
    if dataclasses.asdict(first) != dataclasses.asdict(second):
        raise SimulationError(settings, "replay", "the same seed gave another story", second.virtual_s, Story())
    return first
