"""When a peer may train: hours of the day and days of the week, in local time.

    22:00-07:00                         every night
    mon-fri 19:00-08:00, sat-sun        weekday nights, and the whole weekend

A span that goes past midnight belongs to the day on which it begins.
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES = 24 * 60
_SPAN = re.compile(
    r"(?:(?P<days>[a-z]{3}(?:-[a-z]{3})?))?\s*(?:(?P<from>\d{1,2}:\d{2})\s*-\s*(?P<to>\d{1,2}:\d{2}))?", re.IGNORECASE
)


@dataclass(frozen=True)
class Span:
    """Minutes after midnight of each of some days (0 is Monday); `end` may lie on the next day."""

    days: frozenset[int]
    begin: int
    end: int

    def holds(self, at: datetime) -> bool:
        """Whether this moment lies in the span."""
        minute = 60 * at.hour + at.minute
        today = at.weekday() in self.days and self.begin <= minute < self.end
        return today or ((at.weekday() - 1) % 7 in self.days and minute + _DAY_MINUTES < self.end)


@dataclass(frozen=True)
class Schedule:
    """Some spans; none at all means always."""

    spans: tuple[Span, ...]

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Read a schedule. Raises ValueError."""
        return cls(tuple(_span(part.strip()) for part in text.split(",")) if text.strip() else ())

    def allows(self, at: datetime) -> bool:
        """Whether a peer may train at this moment of local time."""
        return not self.spans or any(span.holds(at) for span in self.spans)

    def next_start(self, at: datetime) -> datetime | None:
        """When training is allowed again, to the minute; None when it never is."""
        minute = at.replace(second=0, microsecond=0)
        for ahead in range(8 * _DAY_MINUTES):
            if self.allows(minute + timedelta(minutes=ahead)):
                return minute + timedelta(minutes=ahead)
        return None


def _span(text: str) -> Span:
    match = _SPAN.fullmatch(text)
    if match is None or not text:
        raise ValueError(f"{text!r} is no span of time")
    days = _days(match["days"])
    if match["from"] is None:
        return Span(days, 0, _DAY_MINUTES)
    begin, end = _minutes(match["from"]), _minutes(match["to"])
    return Span(days, begin, end if end > begin else end + _DAY_MINUTES)


def _days(text: str | None) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    names = text.lower().split("-")
    if any(name not in DAYS for name in names):
        raise ValueError(f"{text!r} are no days; they are called {', '.join(DAYS)}")
    first, last = DAYS.index(names[0]), DAYS.index(names[-1])
    return frozenset((first + more) % 7 for more in range((last - first) % 7 + 1))


def _minutes(text: str) -> int:
    hours, minutes = map(int, text.split(":"))
    if minutes > 59 or 60 * hours + minutes > _DAY_MINUTES:
        raise ValueError(f"{text!r} is no time of day")
    return 60 * hours + minutes
