"""When a round opens and closes, and what a replica does meanwhile: two pure state machines.

An event and the time go in, effects come out. The machines never call out, never look at a clock and draw nothing at
random, so a network driver and a simulator run the same code. `now_s` is seconds since any fixed moment and never
decreases. SPEC "Round rules" says what they promise to others; here is how.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST
from protocol.ledger import CloseReason, Kind, RoundRecord, Verdict, check_link
from protocol.limits import CONTRIBUTORS_MAX, RECORD_ENTRIES_MAX
from protocol.run import RoundConfig, RunConfig

HISTORY_MAX = 64
HISTORY_PER_ROUND = 16
AHEAD_SHARE = 0.9
OFFER_AFTER_MISS = 0.75
OFFER_GROWTH = 32  # an offer grows by one part in so many
REFUSED_MAX = RECORD_ENTRIES_MAX - CONTRIBUTORS_MAX
REPLAY_ROUNDS_MAX = 64
RETRY_S_MIN = 1.0
RETRY_S_MAX = 60.0
RESERVE_S_MIN = 1.0
RESERVE_SHARE = 0.05
MISSED_SHARE = 0.9
ACCEPTED_GROWTH = 1.03
# The aggregator never took in these bytes, so sending them again can help. Any other refusal is final.
RESENDABLE = frozenset({Code.BUSY, Code.WRONG_DIGEST, Code.BAD_SESSION})


# ---------------------------------------------------------------- the aggregator's round


@dataclass(frozen=True)
class Arrived:
    """A packet that passed every check is stored durably; may it count?"""

    peer: bytes
    digest: bytes
    tokens: int
    inner_steps: int


@dataclass(frozen=True)
class Refused:
    """A packet that arrived in full broke a rule."""

    peer: bytes
    digest: bytes
    code: Code


@dataclass(frozen=True)
class Joined:
    """A peer began to watch the rounds."""

    peer: bytes


@dataclass(frozen=True)
class Left:
    """A peer's last watch ended."""

    peer: bytes


@dataclass(frozen=True)
class RolledBack:
    """The operator's amendments take the run back in this round, so it closes at once and no packet counts."""


@dataclass(frozen=True)
class Tick:
    """Nothing happened, but time passed."""


@dataclass(frozen=True)
class Accept:
    """Tell the peer that its packet is safe and counts."""

    peer: bytes
    digest: bytes


@dataclass(frozen=True)
class Reject:
    """Tell the peer that its packet does not count, and why."""

    peer: bytes
    digest: bytes
    code: Code


@dataclass(frozen=True)
class WakeAt:
    """Send a Tick at this time; replaces any earlier wish."""

    at_s: float


@dataclass(frozen=True)
class Submission:
    """A packet in the order of the record, with the machine's verdict; code is 0 when accepted."""

    peer: bytes
    digest: bytes
    verdict: Verdict
    code: int
    tokens: int
    inner_steps: int


@dataclass(frozen=True)
class Close:
    """The round is over: merge the accepted submissions (of an applied round) and sign the record."""

    kind: Kind
    reason: CloseReason
    submissions: tuple[Submission, ...]


AggregatorEvent = Arrived | Refused | Joined | Left | RolledBack | Tick
AggregatorEffect = Accept | Reject | WakeAt | Close


@dataclass(frozen=True)
class ArrivalHistory:
    """When packets came, newest last, at most 64 of each: seconds from the start of their round to the arrival, and
    from one packet of a peer to its next, where both had all their inner steps."""

    arrivals_s: tuple[float, ...] = ()
    cycles_s: tuple[float, ...] = ()
    whole_at_s: Mapping[bytes, float] = field(default_factory=dict)
    """When the packets of the newest round came that had all their inner steps, by peer, on the clock of `add`."""

    def add(self, arrivals_s: Sequence[float], whole_at_s: Mapping[bytes, float] | None = None) -> "ArrivalHistory":
        """Append one round."""
        whole_at_s, before_s = whole_at_s or {}, self.whole_at_s
        cycles_s = [max(0.0, at_s - before_s[peer]) for peer, at_s in whole_at_s.items() if peer in before_s]
        return ArrivalHistory(
            (*self.arrivals_s, *_thinned(arrivals_s))[-HISTORY_MAX:],
            (*self.cycles_s, *_thinned(cycles_s))[-HISTORY_MAX:],
            whole_at_s,
        )

    def grace_s(self, elapsed_s: float, rules: RoundConfig) -> float:
        """How long to wait on after the quorum, `elapsed_s` into the round: until median + 3 MAD, within the rules."""
        if not self.arrivals_s:
            return rules.grace_s_max
        median = statistics.median(self.arrivals_s)
        deviation = statistics.median(abs(arrival - median) for arrival in self.arrivals_s)
        return min(max(median + 3 * deviation - elapsed_s, rules.grace_s_min), rules.grace_s_max)

    def length_s(self) -> float:
        """How long a round lasts at least whose peers train ahead of it.

        Who has sent its packet is at work on the next one, so an earlier end would only cut that one short. It is a
        little less than a peer takes for a packet: when all could be faster, each round is a little shorter."""
        return AHEAD_SHARE * statistics.median(self.cycles_s) if self.cycles_s else 0.0


def _thinned(times_s: Sequence[float]) -> list[float]:
    """At most 16 of the times of a round, evenly spaced, lest its stragglers alone fill the memory."""
    times, last = sorted(times_s), len(times_s) - 1
    if len(times) <= HISTORY_PER_ROUND:
        return times
    return [times[i * last // (HISTORY_PER_ROUND - 1)] for i in range(HISTORY_PER_ROUND)]


_NO_HISTORY = ArrivalHistory()


class AggregatorRound:
    """One round as the aggregator sees it, from its opening to its closing.

    `taken_up` are packets of this round that had receipts before the aggregator restarted, or another one took over;
    they count. Nobody remembers who was there then, so such a round awaits those who are expected to come back,
    `returning`; when that is not known either, it does not close early.
    """

    def __init__(
        self,
        run: RunConfig,
        round: int,
        base_root: bytes,
        opened_s: float,
        *,
        members: frozenset[bytes] = frozenset(),
        history: ArrivalHistory = _NO_HISTORY,
        taken_up: Sequence[Arrived] = (),
        returning: frozenset[bytes] = frozenset(),
    ) -> None:
        self.run = run
        self.round = round
        self.base_root = base_root
        self.started_s = opened_s
        self.closed = round > run.outer.rounds  # nothing follows the last round of the run
        self.history = history
        self._rules = run.rounds
        self._opening = members
        self._present = set(members)
        self._accepted: dict[bytes, Arrived] = {}
        for packet in taken_up:
            self._accepted.setdefault(packet.peer, packet)
        self._returning = returning
        self._unknown = bool(taken_up) and not returning
        self._arrivals_s: list[float] = []
        self._whole_at_s: dict[bytes, float] = {}
        self._offers: dict[bytes, int] = {}  # whom to ask for fewer inner steps, or soon: it missed a round
        self._refused: dict[bytes, Refused] = {}
        self._started = round > 1 or len(members) >= run.rounds.start_peers
        self._grace_at_s: float | None = None
        self._wake_at_s: float | None = None

    @property
    def members(self) -> frozenset[bytes]:
        """Who watches the rounds now."""
        return frozenset(self._present)

    @property
    def deadline_at_s(self) -> float:
        """When the round closes at the latest. It moves only when somebody comes to a round that nobody was in."""
        return self.started_s + self._rules.deadline_s

    def next(self, run: RunConfig, base_root: bytes, opened_s: float) -> "AggregatorRound":
        """Open the round after this one, with the members of now and what this one taught about arrivals.

        `run` has the settings of that round, which amendments may have changed."""
        assert self.closed, "a round opens when the one before it has closed"
        later = AggregatorRound(run, self.round + 1, base_root, opened_s, members=self.members, history=self.history)
        later._offers = self._next_offers()
        return later

    def steps_for(self, peer: bytes) -> int:
        """How many inner steps a peer is asked for: fewer after two rounds that closed without its packet."""
        return min(self._offers.get(peer, self.run.inner.steps), self.run.inner.steps)

    def _next_offers(self) -> dict[bytes, int]:
        """Ask those for less who were here all the time and sent nothing again, and others by and by for all."""
        offers = {}
        for peer in self._present:
            offer = self.steps_for(peer)
            missed = self._accepted and peer in self._opening and self._is_awaited(peer)
            if missed:
                offers[peer] = max(1, int(OFFER_AFTER_MISS * offer)) if peer in self._offers else offer
            elif peer in self._offers:
                offer += -(-offer // OFFER_GROWTH) if peer in self._accepted else 0
                if offer < self.run.inner.steps:
                    offers[peer] = offer
        return offers

    def refusal(self, peer: bytes, digest: bytes) -> Code | None:
        """Say before its bytes are read why a packet would be rejected; None when it is welcome."""
        held = self._accepted.get(peer)
        if held is not None:
            return None if held.digest == digest else Code.DUPLICATE
        return Code.LATE if self.closed else None

    def holds(self, peer: bytes, digest: bytes) -> bool:
        """Whether this packet counts already."""
        held = self._accepted.get(peer)
        return held is not None and held.digest == digest

    def handle(self, event: AggregatorEvent, now_s: float) -> tuple[AggregatorEffect, ...]:
        """Take in one event; return what is to be done, in this order."""
        effects: list[AggregatorEffect] = []
        match event:
            case Arrived():
                effects.append(self._arrive(event, now_s))
            case Refused():
                effects.append(self._refuse(event))
            case Joined():
                if not self._present and not self._accepted:
                    self.started_s = now_s
                self._present.add(event.peer)
            case Left():
                self._present.discard(event.peer)
            case RolledBack():
                if not self.closed:
                    effects.append(self._close(Kind.ROLLBACK, CloseReason.OPERATOR))
            case Tick():
                self._wake_at_s = None  # it may come a little early, and is then wished for again
        if not self.closed:
            effects.extend(self._close_or_wait(now_s))
        return tuple(effects)

    def _arrive(self, event: Arrived, now_s: float) -> AggregatorEffect:
        code = self.refusal(event.peer, event.digest)
        if code is not None:
            return Reject(event.peer, event.digest, code)
        if event.peer not in self._accepted:
            self._accepted[event.peer] = event
            self._arrivals_s.append(now_s - self.started_s)
            if event.inner_steps >= self.run.inner.steps:
                self._whole_at_s[event.peer] = now_s
            earlier = self._refused.get(event.peer)
            if earlier is not None and earlier.digest == event.digest:
                del self._refused[event.peer]
        return Accept(event.peer, event.digest)

    def _refuse(self, event: Refused) -> AggregatorEffect:
        """Note the first bad packet of a peer for the record; a damaged copy of an accepted packet is not noted."""
        held = self._accepted.get(event.peer)
        known = event.peer in self._refused or (held is not None and held.digest == event.digest)
        if not self.closed and not known and len(self._refused) < REFUSED_MAX:
            self._refused[event.peer] = event
        return Reject(event.peer, event.digest, event.code)

    def _is_awaited(self, peer: bytes) -> bool:
        return peer not in self._accepted and peer not in self._refused

    def _awaits_somebody(self) -> bool:
        """Whether packets are still to come: of members since the opening, or if none is left, of those who came later.

        After a restart or a takeover also of those who have not found their way back yet. It is asked at every arrival,
        so it looks no further than to the first who is awaited.
        """
        if any(map(self._is_awaited, self._returning)):
            return True
        stayed = (peer for peer in self._opening if peer in self._present and peer not in self._refused)
        first = next(stayed, None)
        if first is None:
            return any(map(self._is_awaited, self._present))
        return first not in self._accepted or any(peer not in self._accepted for peer in stayed)

    def _close_or_wait(self, now_s: float) -> list[AggregatorEffect]:
        if not self._started:
            self._started = len(self._present | set(self._accepted)) >= self._rules.start_peers
        count = len(self._accepted)
        quorum = count >= self._rules.quorum
        if quorum and self._started:
            if self._grace_at_s is None:
                self._grace_at_s = now_s + self.history.grace_s(now_s - self.started_s, self._rules)
                if self.run.inner.overlap:
                    self._grace_at_s = max(self._grace_at_s, self.started_s + self.history.length_s())
            if count == CONTRIBUTORS_MAX or not (self._unknown or self._awaits_somebody()):
                return [self._close(Kind.APPLIED, CloseReason.COMPLETE)]
            if now_s >= min(self._grace_at_s, self.deadline_at_s):
                grace = self._grace_at_s <= self.deadline_at_s
                return [self._close(Kind.APPLIED, CloseReason.GRACE if grace else CloseReason.DEADLINE)]
        if not self._present and not self._accepted:
            return []
        if now_s >= self.deadline_at_s:
            return [self._close(Kind.APPLIED if quorum else Kind.NULL, CloseReason.DEADLINE)]
        wake_at_s = self.deadline_at_s if self._grace_at_s is None else min(self._grace_at_s, self.deadline_at_s)
        if wake_at_s == self._wake_at_s:
            return []
        self._wake_at_s = wake_at_s
        return [WakeAt(wake_at_s)]

    def _close(self, kind: Kind, reason: CloseReason) -> Close:
        """Close. In a null round or a rollback nothing counts: packets get a code, and their senders keep the mass."""
        verdict, code = (Verdict.ACCEPTED, 0) if kind == Kind.APPLIED else (Verdict.REFUSED, int(Code.NO_QUORUM))
        if kind == Kind.ROLLBACK:
            verdict, code = Verdict.LATE, int(Code.LATE)
        submissions = [
            Submission(item.peer, item.digest, verdict, code, item.tokens, item.inner_steps)
            for item in self._accepted.values()
        ]
        submissions += [
            Submission(item.peer, item.digest, Verdict.REFUSED, int(item.code), 0, 0) for item in self._refused.values()
        ]
        if kind != Kind.APPLIED:
            self._accepted.clear()
        self.closed = True
        self.history = self.history.add(self._arrivals_s, self._whole_at_s)
        return Close(kind, reason, tuple(sorted(submissions, key=lambda item: (item.peer, item.digest))))


# ---------------------------------------------------------------- the replica's rounds


@dataclass(frozen=True)
class Connected:
    """The link to an aggregator stands; `head` is its newest record, already checked against the run."""

    head: RoundRecord


@dataclass(frozen=True)
class Lost:
    """The link is gone, and with it any upload under way."""

    reason: str


@dataclass(frozen=True)
class Opened:
    """The aggregator says that a round is open."""

    round: int
    base_root: bytes
    inner_steps: int
    closes_in_s: float


@dataclass(frozen=True)
class Recorded:
    """Records, oldest first, each checked against the run: one from the watch, or at least two in answer to CatchUp."""

    records: tuple[RoundRecord, ...]


@dataclass(frozen=True)
class InnerDone:
    """Answer to TrainInner: so many inner steps were done, fewer than asked after StopInner."""

    round: int
    steps: int
    tokens: int


@dataclass(frozen=True)
class PacketReady:
    """Answer to MakePacket: packet, residual and what undoes it are stored durably."""

    digest: bytes


@dataclass(frozen=True)
class Receipt:
    """Answer to Send. `code` is 0 when accepted."""

    digest: bytes
    accepted: bool
    code: int


@dataclass(frozen=True)
class Applied:
    """Answer to ApplyUpdate or LoadState: the outer parameters now have this root.

    `run` has the settings of the round after this one, where they are others than those of the round before it."""

    round: int
    state_root: bytes
    run: RunConfig | None = None


@dataclass(frozen=True)
class Prefetched:
    """Answer to Prefetch: the update of this record is here, or could not be had, so that nothing more is to await."""

    digest: bytes


@dataclass(frozen=True)
class Failed:
    """The job under way (TrainInner, MakePacket, ApplyUpdate, LoadState or CatchUp) ended without its answer.

    `gone` says that trying again is useless: what was asked for no longer exists anywhere."""

    reason: str
    gone: bool = False


@dataclass(frozen=True)
class TrainInner:
    """Do so many inner steps: from the outer parameters, or on from the `done` steps that were done ahead.

    Steps ahead that `done` does not count are thrown away.

    `ahead` says that the round is not open yet: train on from the packet in flight, and carry the steps over to the
    outer parameters of whatever update comes."""

    round: int
    steps: int
    done: int = 0
    ahead: bool = False


@dataclass(frozen=True)
class StopInner:
    """End training after the current step and answer InnerDone."""

    round: int


@dataclass(frozen=True)
class MakePacket:
    """Compress the round's work into a packet and store it."""

    round: int
    steps: int
    tokens: int


@dataclass(frozen=True)
class Send:
    """Upload the stored packet; the same bytes each time."""

    digest: bytes


@dataclass(frozen=True)
class Settle:
    """Decide where the round's work belongs: to the run (accepted), or wholly back into the residual.

    Not accepted covers both a packet (undo it) and inner steps that never became one (fold them in)."""

    round: int
    accepted: bool


@dataclass(frozen=True)
class Prefetch:
    """Fetch the record's update while training goes on; answer Prefetched."""

    record: RoundRecord


@dataclass(frozen=True)
class ApplyUpdate:
    """Store the record; fetch its update and apply it (a null round has none); answer Applied."""

    record: RoundRecord


@dataclass(frozen=True)
class LoadState:
    """Get the outer parameters that the record names, whatever ours are; answer Applied. The residual stays."""

    record: RoundRecord


@dataclass(frozen=True)
class CatchUp:
    """Fetch the records from `head` back to the one after `have`; answer Recorded with all, oldest first."""

    have: RoundRecord
    head: RoundRecord


@dataclass(frozen=True)
class Alarm:
    """Something is wrong that people should know of."""

    reason: str


ReplicaEvent = (
    Connected | Lost | Opened | Recorded | InnerDone | PacketReady | Receipt | Prefetched | Applied | Failed | Tick
)
ReplicaEffect = (
    TrainInner | StopInner | MakePacket | Send | Settle | Prefetch | ApplyUpdate | LoadState | CatchUp | Alarm | WakeAt
)
_Job = TrainInner | MakePacket | ApplyUpdate | LoadState | CatchUp


class _Pace:
    """When a replica must stop training for its packet to arrive in time, learned from its own rounds.

    A round mostly closes before its deadline, so a slow replica would never arrive. After a round that it missed it
    works 0.9 of that round's length, and 3 % longer after each that it made: it sends the steps it has.
    """

    def __init__(self) -> None:
        self._budget_s = float("inf")
        self._step_s = 0.0
        self._delivery_s: float | None = None
        self._round = -1
        self._opened_s = 0.0
        self._closes_at_s = 0.0
        self._trains_since_s = 0.0
        self._packs_since_s: float | None = None

    def opened(self, round: int, closes_at_s: float, now_s: float) -> None:
        """Note when a round opened and when it closes at the latest."""
        if round != self._round:
            self._round, self._opened_s = round, now_s
        self._closes_at_s = closes_at_s

    def stop_at_s(self) -> float:
        """The time to stop training in the open round."""
        length_s = min(self._closes_at_s - self._opened_s, self._budget_s)
        delivery_s = RESERVE_SHARE * length_s if self._delivery_s is None else 2 * self._delivery_s
        return self._opened_s + length_s - min(max(delivery_s, RESERVE_S_MIN) + self._step_s, length_s / 2)

    def trains(self, now_s: float) -> None:
        """Training begins."""
        self._trains_since_s = now_s

    def trained(self, steps: int, now_s: float) -> None:
        """Note how long an inner step takes."""
        self._step_s = (now_s - self._trains_since_s) / max(steps, 1)

    def packs(self, now_s: float) -> None:
        """The making of a packet begins."""
        self._packs_since_s = now_s

    def delivered(self, now_s: float) -> None:
        """Note how long it took from the end of training until the packet was there, or the round over."""
        if self._packs_since_s is not None:
            self._delivery_s = now_s - self._packs_since_s

    def made(self) -> None:
        """Note that our packet was in time."""
        self._budget_s *= ACCEPTED_GROWTH

    def missed(self, record: RoundRecord) -> None:
        """Note that a round closed before our packet was there."""
        self._budget_s = MISSED_SHARE * (record.closed_ms - record.opened_ms) / 1000


@dataclass
class _Ahead:
    """Inner steps for a round that is not open yet, done while the packet of the round before travels."""

    steps: int = 0
    tokens: int = 0
    over: bool = False  # no more of them for the packet in flight
    prefetch: bytes = b""  # the record whose update is on its way
    fetched: bytes = b""  # the record whose update is here


@dataclass
class _Work:
    """Inner steps of one round whose fate no record has decided yet, and their packet once it exists."""

    round: int
    steps: int = 0
    tokens: int = 0
    digest: bytes | None = None
    sending: bool = False
    answered: bool = False
    delivered: bool = False  # an answer came, from this aggregator or an earlier one
    late: bool = True  # as far as we know, until a receipt says otherwise


class ReplicaRound:
    """What one replica does, round after round, for the whole run.

    At most one job is under way: TrainInner, MakePacket, ApplyUpdate, LoadState or CatchUp. Each ends with exactly one
    answer. Only Send, StopInner and Prefetch run beside a job. All events say what is so; `_advance` alone decides what
    to do. With `inner.overlap` it does not wait for the record of a packet that it sent, but trains on meanwhile.
    """

    def __init__(
        self, run: RunConfig, *, record: RoundRecord | None = None, packet: tuple[int, bytes] | None = None
    ) -> None:
        """Start from what is stored: the record of the held state, and the round and digest of an unsettled packet.

        `run` has the settings of the round after that record; `Applied` brings those of later rounds."""
        assert packet is None or (record is not None and packet[0] == record.round + 1), "a packet follows its record"
        self.run = run
        self.record = record
        self._queue: list[RoundRecord] = []  # linked after `record`, still to be applied
        self._wanted: RoundRecord | None = None  # a record beyond a gap
        self._reload = record is None  # the state cannot be reached by updates
        self._job: _Job | None = None
        self._work = None if packet is None else _Work(packet[0], digest=packet[1])
        self._ahead = _Ahead()
        self._opened: Opened | None = None
        self._opened_at_s = 0.0
        self._skipped_round = 0
        self._connected = False
        self._stopping = False
        self._pace = _Pace()
        self._retry_at_s = 0.0
        self._resend_at_s = 0.0
        self._backoff_s = RETRY_S_MIN
        self._wake_at_s = 0.0

    @property
    def finished(self) -> bool:
        """Whether the last round of the run is applied."""
        return self.record is not None and self.record.round >= self.run.outer.rounds

    def handle(self, event: ReplicaEvent, now_s: float) -> tuple[ReplicaEffect, ...]:
        """Take in one event; return what is to be done, in this order."""
        effects: list[ReplicaEffect] = []
        match event:
            case Connected():
                self._connect(now_s)
                self._take_record(event.head, effects)
            case Lost():
                self._connected = False
                if self._work is not None:
                    self._work.sending = False
            case Opened():
                self._open(event, now_s)
            case Recorded():
                self._recorded(event.records, effects)
            case InnerDone():
                self._inner_done(event, now_s)
            case PacketReady():
                if isinstance(self._job, MakePacket) and self._work is not None:
                    self._job = None
                    self._work.digest = event.digest
            case Receipt():
                self._receipt(event, now_s)
            case Prefetched() if event.digest == self._ahead.prefetch:
                self._ahead.fetched = event.digest
            case Applied():
                self._applied(event, now_s, effects)
            case Failed():
                self._failed(event, now_s, effects)
            case Tick():
                self._wake_at_s = 0.0  # it may come a little early, and is then wished for again
        self._advance(now_s, effects)
        return tuple(effects)

    # ------------------------------------------------ what the events mean

    def _connect(self, now_s: float) -> None:
        self._connected = True
        self._opened = None
        self._retry_at_s = self._resend_at_s = now_s
        if self._work is not None:
            # Another aggregator, or one that lost its disk, may not have the packet that had a receipt.
            self._work.answered = False

    def _open(self, event: Opened, now_s: float) -> None:
        """Note the round. What it says is bounded, because it is not signed."""
        if self._opened is not None and event.round < self._opened.round:
            return
        self._opened, self._opened_at_s = event, now_s
        self._bound(event)

    def _bound(self, opened: Opened) -> None:
        closes_in_s = min(max(opened.closes_in_s, 0.0), self.run.rounds.deadline_s)
        self._pace.opened(opened.round, self._opened_at_s + closes_in_s, self._opened_at_s)

    def _take_record(self, record: RoundRecord, effects: list[ReplicaEffect]) -> None:
        """Put a record where it belongs: known, next, beyond a gap, or on another branch of higher epoch."""
        tail = self._queue[-1] if self._queue else self.record
        if tail is None:
            self._queue.append(record)
            return
        known, previous = self._known(record.round), self._known(record.round - 1)
        if record.epoch < tail.epoch or (known is not None and known.digest == record.digest):
            return
        newer = record.epoch > tail.epoch
        if record.round > tail.round + 1:
            if self._wanted is None or (record.epoch, record.round) > (self._wanted.epoch, self._wanted.round):
                self._wanted = record
        elif (record.round > tail.round or newer) and previous is not None and _follows(previous, record):
            self._queue = [item for item in self._queue if item.round < record.round] if newer else self._queue
            self._queue.append(record)
        elif newer:
            # An aggregator took over from a point before ours. Its branch is the run now; updates do not lead there.
            self._queue = [record]
            self._reload = True
            self._opened = None
        elif record.round > tail.round or known is not None:
            effects.append(
                Alarm(f"the aggregator signed a record of round {record.round} that does not fit its others")
            )

    def _known(self, round: int) -> RoundRecord | None:
        """The record of this round among those that wait and, unless they are another branch of it, the applied one."""
        if self._queue and round >= self._queue[0].round:
            place = round - self._queue[0].round
            return self._queue[place] if place < len(self._queue) else None
        return self.record if self.record is not None and round == self.record.round else None

    def _recorded(self, records: tuple[RoundRecord, ...], effects: list[ReplicaEffect]) -> None:
        """Take records in, and end a CatchUp that they answer.

        An answer that does not lead on from our records is of a branch that we refused."""
        for record in records:
            self._take_record(record, effects)
        job = self._job
        if not isinstance(job, CatchUp) or len(records) < 2 or records[-1].digest != job.head.digest:
            return
        self._job = None
        if self._wanted is not None and self._wanted.digest == job.head.digest:
            self._wanted = None
        if len(records) > REPLAY_ROUNDS_MAX:
            self._reload = True

    def _tail_round(self) -> int:
        if self._queue:
            return self._queue[-1].round
        return -1 if self.record is None else self.record.round

    def _inner_done(self, event: InnerDone, now_s: float) -> None:
        if not isinstance(self._job, TrainInner) or event.round != self._job.round:
            return
        job, self._job, ahead = self._job, None, self._ahead
        self._pace.trained(event.steps, now_s)
        steps, tokens = ahead.steps + event.steps, ahead.tokens + event.tokens
        if job.ahead:
            ahead.steps, ahead.tokens, ahead.over = steps, tokens, True
        elif steps > 0:
            self._work, self._ahead = _Work(event.round, steps, tokens), _Ahead()
        else:
            self._skipped_round = event.round

    def _receipt(self, event: Receipt, now_s: float) -> None:
        """Note that the packet need not be sent again. Whether it counts, the record alone says."""
        work = self._work
        if work is None or work.digest != event.digest:
            return
        work.sending = False
        if not event.accepted and event.code in RESENDABLE:
            self._resend_at_s = self._back_off(now_s)
            return
        work.answered = True
        work.late = event.code == Code.LATE
        if not work.delivered:
            work.delivered = True
            self._pace.delivered(now_s)

    def _applied(self, event: Applied, now_s: float, effects: list[ReplicaEffect]) -> None:
        job = self._job
        if not isinstance(job, ApplyUpdate | LoadState) or event.round != job.record.round:
            return
        self._job = None
        if event.state_root != job.record.state_root:
            effects.append(Alarm(f"the state after round {event.round} is not what the record says; loading it anew"))
            self._reload = True
            if isinstance(job, LoadState):
                self._retry_at_s = self._back_off(now_s)
            return
        place = next((i for i, item in enumerate(self._queue) if item.digest == job.record.digest), None)
        if place is None:
            # While we were at it, the run moved to another branch.
            self._reload = True
            return
        self.record = job.record
        self._amend(event.run)
        del self._queue[: place + 1]
        self._reload = self._reload and isinstance(job, ApplyUpdate) and bool(self._queue)
        self._backoff_s = RETRY_S_MIN

    def _amend(self, run: RunConfig | None) -> None:
        """Go by the settings of the next round. Steps that were done ahead by other ones do not count in it."""
        if run is None:
            return
        if run.inner != self.run.inner:
            self._ahead = _Ahead()
        self.run = run
        if self._opened is not None:
            self._bound(self._opened)

    def _failed(self, event: Failed, now_s: float, effects: list[ReplicaEffect]) -> None:
        job, self._job = self._job, None
        match job:
            case TrainInner(ahead=True):
                effects.append(Alarm(f"the steps ahead of round {job.round} are lost: {event.reason}"))
                self._ahead = _Ahead(over=True)
            case TrainInner() | MakePacket():
                # The driver throws this round's steps away: what could not be compressed must not reach the residual.
                effects.append(Alarm(f"the work of round {job.round} is lost: {event.reason}"))
                self._work, self._ahead = None, _Ahead()
                self._skipped_round = job.round
            case ApplyUpdate() if event.gone:
                self._reload = True
            case CatchUp() if event.gone:
                self._queue = [job.head]
                self._reload = True
            case ApplyUpdate() | LoadState() | CatchUp():
                self._retry_at_s = self._back_off(now_s)
            case None:
                pass

    def _back_off(self, now_s: float) -> float:
        """The time of the next try; each wait is twice the one before until something succeeds."""
        at_s = now_s + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, RETRY_S_MAX)
        return at_s

    # ------------------------------------------------ what to do about it

    def _advance(self, now_s: float, effects: list[ReplicaEffect]) -> None:
        if self._wanted is not None and self._tail_round() >= self._wanted.round:
            self._wanted = None
        if isinstance(self._job, TrainInner) and not self._stopping:
            if self._job.ahead:
                self._prefetch(effects)
            if self._should_stop(self._job, now_s):
                self._stopping = True
                effects.append(StopInner(self._job.round))
        if self._job is None and now_s >= self._retry_at_s:
            self._job = self._next_job(now_s, effects)
            if self._job is not None:
                effects.append(self._job)
        self._send(now_s, effects)
        self._wake(now_s, effects)

    def _should_stop(self, job: TrainInner, now_s: float) -> bool:
        if job.ahead:
            awaited = len(self._queue) == 1 and self._ahead.prefetch == self._queue[0].digest != self._ahead.fetched
            return (bool(self._queue) and not awaited) or self._wanted is not None
        superseded = self._opened is not None and self._opened.round != job.round
        return bool(self._queue) or self._wanted is not None or superseded or now_s >= self._pace.stop_at_s()

    def _prefetch(self, effects: list[ReplicaEffect]) -> None:
        """Let the update of the packet's round travel while training ahead goes on."""
        if len(self._queue) != 1 or self._reload or self._queue[0].update_digest == NO_DIGEST:
            return
        record = self._queue[0]
        if self._ahead.prefetch != record.digest:
            self._ahead.prefetch = record.digest
            effects.append(Prefetch(record))

    def _next_job(self, now_s: float, effects: list[ReplicaEffect]) -> _Job | None:
        """Choose the next job: close gaps first, then follow the records, then work for the open round."""
        if self._wanted is not None:
            # The older one: what waits may be of a branch that forked off before ours and is not as long yet.
            held = [item for item in (self.record, *self._queue[:1]) if item is not None]
            return CatchUp(min(held, key=lambda item: item.round), self._wanted)
        if self._queue:
            self._settle(now_s, effects)
            if any(record.kind == Kind.ROLLBACK for record in self._queue):
                # No update leads there, and what was done ahead is part of what the operator takes back.
                self._reload, self._ahead = True, _Ahead()
            return LoadState(self._queue[-1]) if self._reload else ApplyUpdate(self._queue[0])
        if self.record is None:
            return None
        if self._work is not None:
            if self._work.digest is not None:
                return self._train_ahead(self._work.round + 1, now_s)
            self._pace.packs(now_s)
            return MakePacket(self._work.round, self._work.steps, self._work.tokens)
        return self._train(now_s, effects)

    def _train_ahead(self, round: int, now_s: float) -> _Job | None:
        """With overlap, begin the next round's steps while the packet of this one travels."""
        if not self.run.inner.overlap or self._ahead.over or round > self.run.outer.rounds:
            return None
        self._stopping = False
        self._pace.trains(now_s)
        return TrainInner(round, self.run.inner.steps, ahead=True)

    def _train(self, now_s: float, effects: list[ReplicaEffect]) -> _Job | None:
        """Train for the open round, if there is one that wants it; steps that were done ahead are part of its work."""
        opened, ahead = self._opened, self._ahead
        assert self.record is not None, "a replica trains from a record"
        if opened is None or opened.round != self.record.round + 1 or opened.round == self._skipped_round:
            return None
        if self.finished or now_s >= self._pace.stop_at_s():
            return None
        if opened.base_root != self.record.state_root:
            effects.append(
                Alarm(f"the aggregator opened round {opened.round} on a state that its record does not name")
            )
            self._skipped_round = opened.round
            return None
        steps = min(max(opened.inner_steps, 1), self.run.inner.steps) - ahead.steps
        if steps <= 0:
            self._work, self._ahead = _Work(opened.round, ahead.steps, ahead.tokens), _Ahead()
            self._pace.packs(now_s)
            return MakePacket(self._work.round, self._work.steps, self._work.tokens)
        self._stopping = False
        self._pace.trains(now_s)
        return TrainInner(opened.round, steps, ahead.steps)

    def _settle(self, now_s: float, effects: list[ReplicaEffect]) -> None:
        """Settle our work before the state moves on: the record of its round says whether it counts."""
        work, self._work = self._work, None
        if work is None:
            return
        self._ahead.over = False
        record = next((item for item in self._queue if item.round == work.round), None)
        accepted = record is not None and work.digest is not None and record.accepted(work.digest)
        effects.append(Settle(work.round, accepted))
        if work.sending and not work.delivered:
            self._pace.delivered(now_s)
        if accepted:
            self._pace.made()
        elif record is not None and record.kind == Kind.APPLIED and work.late:
            self._pace.missed(record)

    def _send(self, now_s: float, effects: list[ReplicaEffect]) -> None:
        work = self._work
        if work is None or work.digest is None or work.sending or work.answered or self._queue:
            return  # once a record waits that settles it, the packet must not come to count elsewhere
        current = self._opened is not None and self._opened.round == work.round
        if self._connected and current and now_s >= self._resend_at_s:
            work.sending = True
            effects.append(Send(work.digest))

    def _wake(self, now_s: float, effects: list[ReplicaEffect]) -> None:
        times = []
        if isinstance(self._job, TrainInner) and not self._job.ahead and not self._stopping:
            times.append(self._pace.stop_at_s())
        if self._job is None and (self._queue or self._wanted is not None):
            times.append(self._retry_at_s)
        if self._work is not None and self._work.digest is not None and not self._work.answered:
            times.append(self._resend_at_s)
        at_s = min((time for time in times if time > now_s), default=0.0)
        if at_s and at_s != self._wake_at_s:
            self._wake_at_s = at_s
            effects.append(WakeAt(at_s))


def _follows(previous: RoundRecord, record: RoundRecord) -> bool:
    try:
        check_link(previous, record)
    except ProtocolError:
        return False
    return True
