"""When a round opens and closes, and what a replica does meanwhile: two pure state machines.

An event and the time go in, effects come out. The machines never call out, never look at a clock and draw nothing at
random, so a network driver and a simulator run the same code. `now_s` is seconds since any fixed moment and never
decreases. SPEC "Round rules" says what they promise to others; here is how.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import Code
from protocol.ledger import CloseReason, Kind, RoundRecord, Verdict
from protocol.limits import CONTRIBUTORS_MAX, RECORD_ENTRIES_MAX
from protocol.run import RoundConfig, RunConfig

HISTORY_MAX = 64
HISTORY_PER_ROUND = 16
REFUSED_MAX = RECORD_ENTRIES_MAX - CONTRIBUTORS_MAX
REPLAY_ROUNDS_MAX = 64
RETRY_S_MIN = 1.0
RETRY_S_MAX = 60.0
RESERVE_S_MIN = 1.0
RESERVE_SHARE = 0.05
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


AggregatorEvent = Arrived | Refused | Joined | Left | Tick
AggregatorEffect = Accept | Reject | WakeAt | Close


@dataclass(frozen=True)
class ArrivalHistory:
    """Seconds from the start of a round to the arrival of its packets, newest last, at most 64."""

    arrivals_s: tuple[float, ...] = ()

    def add(self, arrivals_s: Sequence[float]) -> "ArrivalHistory":
        """Append one round. A large round is thinned evenly, lest its stragglers alone fill the memory."""
        times = sorted(arrivals_s)
        if len(times) > HISTORY_PER_ROUND:
            last = len(times) - 1
            times = [times[i * last // (HISTORY_PER_ROUND - 1)] for i in range(HISTORY_PER_ROUND)]
        return ArrivalHistory((*self.arrivals_s, *times)[-HISTORY_MAX:])

    def grace_s(self, elapsed_s: float, rules: RoundConfig) -> float:
        """How long to wait on after the quorum, `elapsed_s` into the round: until median + 3 MAD, within the rules."""
        if not self.arrivals_s:
            return rules.grace_s_max
        median = statistics.median(self.arrivals_s)
        deviation = statistics.median(abs(arrival - median) for arrival in self.arrivals_s)
        return min(max(median + 3 * deviation - elapsed_s, rules.grace_s_min), rules.grace_s_max)


class AggregatorRound:
    """One round as the aggregator sees it, from its opening to its closing.

    `awaited` are the members for whom the round waits; the other members may submit but hold nobody up.
    """

    def __init__(  # noqa: PLR0913 - a round is exactly these things
        self,
        run: RunConfig,
        round: int,
        base_root: bytes,
        opened_s: float,
        *,
        members: frozenset[bytes] = frozenset(),
        awaited: frozenset[bytes] | None = None,
        history: ArrivalHistory = ArrivalHistory(),
    ) -> None:
        self.run = run
        self.round = round
        self.base_root = base_root
        self.started_s = opened_s
        self.closed = False
        self.history = history
        self._rules = run.rounds
        self._present = set(members)
        self._awaited = members if awaited is None else awaited
        self._accepted: dict[bytes, Arrived] = {}
        self._arrivals_s: list[float] = []
        self._refused: dict[bytes, Refused] = {}
        self._enough_members = round > 1
        self._ready_s: float | None = None
        self._grace_at_s = float("inf")
        self._wake_s: float | None = None

    @property
    def members(self) -> frozenset[bytes]:
        """Who watches the rounds now."""
        return frozenset(self._present)

    @property
    def deadline_at_s(self) -> float:
        """When the round closes at the latest. It moves only while nobody is present."""
        return self.started_s + self._rules.deadline_s

    def refusal(self, peer: bytes, digest: bytes) -> Code | None:
        """Say before its bytes are read why a packet would be rejected; None when it is welcome."""
        held = self._accepted.get(peer)
        if held is not None:
            return None if held.digest == digest else Code.DUPLICATE
        return Code.LATE if self.closed else None

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
            case Tick():
                pass
        if not self.closed:
            effects.extend(self._close_or_wait(now_s))
        return tuple(effects)

    def next(self, base_root: bytes, opened_s: float) -> "AggregatorRound":
        """Open the round after this one with the members of now.

        Whoever kept this round waiting in vain is a member but not awaited, until it submits again: a peer that is
        slow, still downloading or frozen costs the others one grace period, not one a round.
        """
        assert self.closed, "a round opens when the one before it has closed"
        idle = self._expected() - set(self._accepted)
        return AggregatorRound(
            self.run,
            self.round + 1,
            base_root,
            opened_s,
            members=self.members,
            awaited=self.members - idle - (self._opening_idle()),
            history=self.history,
        )
