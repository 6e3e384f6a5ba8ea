from datetime import UTC, datetime, timedelta

import pytest

from peer.schedule import Schedule

MONDAY = datetime(2026, 1, 5, tzinfo=UTC)


def at(day: int, clock: str) -> datetime:
    """A moment of the week that begins with a Monday."""
    hours, minutes = map(int, clock.split(":"))
    return MONDAY + timedelta(days=day, hours=hours, minutes=minutes)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("", [(0, "00:00"), (6, "23:59")], []),
        ("9:00-17:00", [(0, "09:00"), (5, "16:59")], [(0, "08:59"), (0, "17:00")]),
        ("22:00-07:00", [(0, "22:00"), (1, "06:59"), (0, "03:00")], [(0, "21:59"), (3, "07:00")]),
        ("sun 22:00-07:00", [(6, "22:00"), (0, "06:59")], [(0, "22:00"), (6, "06:00")]),
        ("mon-fri 19:00-08:00, sat-sun", [(0, "19:00"), (5, "07:00"), (6, "12:00")], [(0, "12:00"), (0, "07:00")]),
        ("fri-mon", [(4, "00:00"), (0, "23:59")], [(1, "00:00"), (3, "23:59")]),
        ("sat 00:00-24:00", [(5, "00:00"), (5, "23:59")], [(6, "00:00")]),
        ("12:00-12:00", [(0, "11:59"), (0, "12:00")], []),
    ],
)
def test_spans_of_days_and_hours(text: str, inside: list[tuple[int, str]], outside: list[tuple[int, str]]) -> None:
    schedule = Schedule.parse(text)
    assert [moment for moment in inside if not schedule.allows(at(*moment))] == []
    assert [moment for moment in outside if schedule.allows(at(*moment))] == []


def test_it_says_when_it_begins_again() -> None:
    schedule = Schedule.parse("sat 09:30-10:00")
    assert schedule.next_start(at(0, "12:00")) == at(5, "09:30")
    assert schedule.next_start(at(5, "10:00")) == at(12, "09:30")
    assert schedule.next_start(at(5, "09:45")) == at(5, "09:45")


@pytest.mark.parametrize(
    "text", ["always", "25:00-26:00", "10:00", "mon-", "xyz 10:00-11:00", "10:60-11:00", ",", "10-11"]
)
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no|are no"):
        Schedule.parse(text)
