"""Links with bandwidth, latency, loss and cuts. Each stream keeps its order and loses nothing while its link lives."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from peer.sim.clock import Clock

CONTROL_BYTES = 200  # of a request or a receipt, frames and all
RETRANSMIT_S = 0.4


@dataclass(frozen=True)
class Access:
    """How somebody is connected."""

    up_bytes_s: float
    down_bytes_s: float
    latency_s: float = 0.05
    loss: float = 0.0  # chance that something of a message is lost on the way and sent again


class Lane:
    """One direction of an access line; what is carried queues up."""

    def __init__(self, bytes_s: float) -> None:
        self.bytes_s = bytes_s
        self._free_s = 0.0

    def take(self, now_s: float, size: int) -> float:
        """When the last of these bytes has gone through."""
        self._free_s = max(self._free_s, now_s) + size / self.bytes_s
        return self._free_s


@dataclass
class Traffic:
    """Bytes that one peer sent and fetched."""

    up: int = 0
    down: int = 0


class Link:
    """One connection of a peer to an aggregator."""

    def __init__(
        self, clock: Clock, chance: random.Random, access: Access, far: tuple[Lane, Lane], number: int
    ) -> None:
        """`far` is the other side's lanes: for what goes up, for what comes down."""
        self.number = number
        self.alive = True
        self.stalled_until_s = 0.0
        self.traffic = Traffic()
        self._clock, self._chance, self._access = clock, chance, access
        self._near = (Lane(access.up_bytes_s), Lane(access.down_bytes_s))
        self._far = far
        self._ordered_s = [0.0, 0.0]
        self._waiting: dict[int, Callable[[], None]] = {}
        self._calls = 0

    def up(self, size: int, action: Callable[[], None], *, survives: bool = False) -> None:
        """Carry to the aggregator. What `survives` may have got there although the link broke at that moment."""
        self.traffic.up += size
        kept = survives and self._chance.random() < 0.3
        self._carry(0, size, action, ordered=False, kept=kept)

    def down(self, size: int, action: Callable[[], None], *, ordered: bool = False) -> None:
        """Carry to the peer; the watch is one ordered stream."""
        self.traffic.down += size
        self._carry(1, size, action, ordered=ordered, kept=False)

    def _carry(self, way: int, size: int, action: Callable[[], None], *, ordered: bool, kept: bool) -> None:
        now_s = max(self._clock.now_s, self.stalled_until_s)
        at_s = max(self._near[way].take(now_s, size), self._far[way].take(now_s, size)) + self._access.latency_s
        while self._chance.random() < self._access.loss:
            at_s += self._chance.uniform(0.5, 2) * RETRANSMIT_S
        if ordered:
            at_s = self._ordered_s[way] = max(at_s, self._ordered_s[way])

        def arrive() -> None:
            if self.stalled_until_s > self._clock.now_s:
                self._clock.at(self.stalled_until_s, arrive)
            elif self.alive or kept:
                action()

        self._clock.at(at_s, arrive)

    def call(self, failed: Callable[[], None]) -> int:
        """Note that an answer is awaited; if the link breaks first, `failed` is called."""
        self._calls += 1
        self._waiting[self._calls] = failed
        return self._calls

    def answered(self, call: int) -> bool:
        """Whether this answer was awaited still."""
        return self._waiting.pop(call, None) is not None

    @property
    def calls_waiting(self) -> int:
        """How many answers are awaited."""
        return len(self._waiting)

    def abandon(self) -> list[Callable[[], None]]:
        """What is to be called because no answer will come any more."""
        waiting, self._waiting = self._waiting, {}
        return list(waiting.values())
