"""Virtual time, chance, and the story of what happened."""

import dataclasses
import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence

from protocol.ledger import CloseReason, Kind, RoundRecord

LAST_EVENTS = 60
TIMER_LATE_S = 0.02
_TIMER_S = (-0.005, TIMER_LATE_S)
_SHORT = 4  # bytes of a digest that tell it from others in a story


class Clock:
    """What happens when, in one order that the seed alone decides."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something at a time; of two things at one time, the one that was asked for first."""
        self._count += 1
        heapq.heappush(self._queue, (max(time_s, self.now_s), self._count, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something after a while."""
        self.at(self.now_s + delay_s, action)

    def step(self) -> None:
        """Go on to the next thing that happens."""
        self.now_s, _, action = heapq.heappop(self._queue)
        action()

    @property
    def waiting(self) -> int:
        """How many things are still to happen."""
        return len(self._queue)


def timer_s(delay_s: float, chance: random.Random) -> float:
    """When a timer for this delay goes off: mostly a little late, now and then a little early."""
    return max(0.001, delay_s + chance.uniform(*_TIMER_S))


def chance_of(seed: int, what: str) -> random.Random:
    """A source of chance of its own for each thing that is drawn, so that one more draw here moves nothing there."""
    return random.Random(f"{seed} {what}")


class Story:
    """What happened: the last events for people, and a digest over all of them."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self.events = 0
        self._tell = tell
        self._hash = hashlib.sha256()
        self._last: deque[tuple[float, str, object, Sequence[object]]] = deque(maxlen=LAST_EVENTS)

    def add(self, now_s: float, who: str, event: object, effects: Sequence[object] = ()) -> None:
        """Note an event that a machine took in and the effects that came out; a fault is a text."""
        self.events += 1
        marks = [f"{now_s!r} {who}".encode(), _mark(event), *map(_mark, effects)]
        self._hash.update(b" ".join(marks))
        self._last.append((now_s, who, event, effects))
        if self._tell is not None:
            for line in _lines(now_s, who, event, effects):
                self._tell(line)

    def cover(self, data: bytes) -> None:
        """Let the digest cover these bytes too."""
        self._hash.update(data)

    @property
    def digest(self) -> str:
        """Equal digests mean that the same things happened at the same times, with the same bytes."""
        return self._hash.hexdigest()

    def last_lines(self) -> list[str]:
        """The last events, as a trace shows them."""
        return [line for entry in self._last for line in _lines(*entry)]


def _mark(item: object) -> bytes:
    """What the digest covers of an event or effect: its kind, and the name of the bytes that it is about."""
    if isinstance(item, str):
        return item.encode()
    named = getattr(item, "digest", None) or getattr(item, "state_root", None)
    name: bytes = named if isinstance(named, bytes) else b""
    return type(item).__name__.encode() + name


def _lines(now_s: float, who: str, event: object, effects: Sequence[object]) -> list[str]:
    """In the style of tests/scenarios: what goes in at the left margin, what comes out below it."""
    return [f"t={now_s:.3f} {who} {_shown(event)}", *(f"    {_shown(effect)}" for effect in effects)]


def _shown(item: object) -> str:
    if isinstance(item, str):
        return item
    assert dataclasses.is_dataclass(item)
    fields = [field.name for field in dataclasses.fields(item)]
    return " ".join([type(item).__name__, *(f"{name}={_value(getattr(item, name))}" for name in fields)])


def _value(value: object) -> str:
    match value:
        case bytes():
            return value[:_SHORT].hex()
        case RoundRecord():
            return f"{value.round}/{value.epoch}:{value.digest[:_SHORT].hex()}"
        case bool():
            return "yes" if value else "no"
        case Kind() | CloseReason():
            return value.name
        case float():
            return f"{value:.3f}"
        case tuple() if value and isinstance(value[0], RoundRecord):
            return ",".join(map(_value, value))
        case tuple():
            return f"{len(value)}"
        case _:
            return str(value)
