"""When a standby takes a run over from the aggregator that leads it: a pure state machine.

As in protocol.round, an event and the time go in and effects come out. SPEC "Round rules" says what this promises.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.ledger import RoundRecord
from protocol.round import Tick, WakeAt
from protocol.run import RunConfig

HEARTBEAT_S = 5.0  # an aggregator that has nothing to say says so this often
LEASE_S_MIN = 2 * HEARTBEAT_S
LEASE_S_MAX = 60.0


@dataclass(frozen=True)
class Heard:
    """The aggregator that leads gave a sign of life; `head` is its newest record, checked against the run."""

    head: RoundRecord


@dataclass(frozen=True)
class Recorded:
    """Our copy of the run is complete up to this record."""

    record: RoundRecord


@dataclass(frozen=True)
class TakeOver:
    """Lead the run from now on, in this epoch, from the newest record that our copy has."""

    epoch: int


StandbyEvent = Heard | Recorded | Tick
StandbyEffect = TakeOver | WakeAt


def next_epoch(aggregators: Sequence[bytes], key: bytes, epoch: int) -> int:
    """The lowest epoch above `epoch` that belongs to this aggregator.

    Epoch e > 0 belongs to number e mod n of the run's n aggregators, so no two of them ever sign in the same one.
    """
    first = epoch + 1
    return first + (aggregators.index(key) - first) % len(aggregators)


def lease_s_of(record: RoundRecord) -> float:
    """How long to wait for a sign of life: the length of a round, within 10 to 60 seconds."""
    return min(max((record.closed_ms - record.opened_ms) / 1000, LEASE_S_MIN), LEASE_S_MAX)


class Standby:
    """Waits for the lease of the leading aggregator to expire, and takes over once.

    Each sign of life renews the lease. Of several standbys the one with the lowest next epoch waits for one lease, the
    next one for two, and so on, so that each has heard of the one before it. A standby takes over only from a leader
    that it has heard itself since it was started, and only when its copy has every record of it, or all but the last:
    otherwise it would throw away what others have.
    """

    def __init__(self, run: RunConfig, key: bytes, *, lease_s: float | None = None) -> None:
        """Stand by with this key, which is one of the run's aggregators; without a lease it follows the rounds."""
        self.run, self.key = run, key
        self.head: RoundRecord | None = None
        self._lease_s = lease_s
        self._newest: RoundRecord | None = None
        self._heard_s = 0.0
        self._wake_at_s: float | None = None
        self._over = False

    def handle(self, event: StandbyEvent, now_s: float) -> tuple[StandbyEffect, ...]:
        """Take in one event; return what is to be done."""
        match event:
            case Heard():
                self._heard_s = now_s
                newest = self._newest
                if newest is None or (event.head.epoch, event.head.round) >= (newest.epoch, newest.round):
                    self._newest = event.head
            case Recorded():
                self.head = event.record
            case Tick():
                pass
        return self._decide(now_s)

    @property
    def expires_s(self) -> float | None:
        """When this standby takes over unless it hears something before; None while it must not."""
        head, newest = self.head, self._newest
        if self._over or head is None or newest is None or head.round >= self.run.outer.rounds:
            return None
        if head.digest not in (newest.digest, newest.previous):
            return None
        lease_s = lease_s_of(head) if self._lease_s is None else self._lease_s
        return self._heard_s + lease_s * (1 + self._rank(newest))

    def _rank(self, newest: RoundRecord) -> int:
        """How many other standbys come before this one."""
        standbys = [key for key in self.run.aggregators if key not in (newest.aggregator, self.key)]
        ours = self._epoch(self.key, newest)
        return sum(self._epoch(key, newest) < ours for key in standbys)

    def _epoch(self, key: bytes, newest: RoundRecord) -> int:
        return next_epoch(self.run.aggregators, key, newest.epoch)

    def _decide(self, now_s: float) -> tuple[StandbyEffect, ...]:
        at_s = self.expires_s
        if at_s is None or self._newest is None:
            return ()
        if now_s >= at_s:
            self._over = True
            return (TakeOver(self._epoch(self.key, self._newest)),)
        if at_s == self._wake_at_s:
            return ()
        self._wake_at_s = at_s
        return (WakeAt(at_s),)
