"""How much of a machine its owner gives. Each limit is off until it is set: in the table `[limits]` of a settings file,
or by `sparseloco-peer limits` while the peer runs.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from peer.errors import UserCode, UserError
from peer.schedule import Schedule

MBIT_MIN = 0.5  # below that others give a slow transfer up
SHARE_MIN = 0.1


@dataclass(frozen=True)
class Limits:
    """The limits of one peer. Raises UserError BAD_CONFIG on a value that is not accepted."""

    schedule: str = ""
    """When to train, in local time, such as "22:00-07:00" or "mon-fri 19:00-08:00, sat-sun"; empty for always."""
    idle_minutes: float = 0.0
    """Train only when nobody has used this machine for so long; 0 to train always."""
    on_mains: bool = False
    """Whether to train only while the machine is not on battery."""
    exclusive_apps: tuple[str, ...] = ()
    """Names of programs that have the machine for themselves: while one of them runs, nothing is trained."""
    share: float = 1.0
    """The part of the time in which inner steps may run, 0.1 to 1; the device rests in between."""
    temperature_max: float = 0.0
    """Degrees Celsius above which training pauses until the device has cooled down; 0 for no ceiling."""
    up_mbit: float = 0.0
    """The most that is sent, in megabits a second; 0 for no cap."""
    down_mbit: float = 0.0
    """The most that is received, in megabits a second; 0 for no cap."""
    mb_a_day: float = 0.0
    """Megabytes that may travel in a day, both ways together; then the peer is offline until midnight. 0 for no cap."""
    disk_mb: float = 0.0
    """Megabytes that the home folder may take; 0 for no cap."""

    def __post_init__(self) -> None:
        for name, least, most in _RANGES:
            value: object = getattr(self, name)
            off = "" if name == "share" else "0 or "
            # In Python `true` is a number too, but no amount of anything.
            good = (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and (least <= value <= most or (value == 0 and name != "share"))
            )
            _demand(name, value, f"{off}a number from {least:g} to {most:g}", good)
        _demand("on_mains", self.on_mains, "true or false", type(self.on_mains) is bool)
        apps: object = self.exclusive_apps
        named = isinstance(apps, tuple) and all(isinstance(app, str) and app.strip() == app != "" for app in apps)
        _demand("exclusive_apps", apps, 'a list of names such as ["game", "obs"]', named)
        span = 'hours such as "22:00-07:00" or "mon-fri 19:00-08:00, sat-sun", or ""'
        _demand("schedule", self.schedule, span, _is_schedule(self.schedule))

    @classmethod
    def of(cls, table: Mapping[str, object], base: "Limits | None" = None) -> "Limits":
        """These values instead of those of `base`, or of the defaults. Raises UserError BAD_CONFIG."""
        known = [limit.name for limit in fields(cls)]
        for key in table:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                remedy = f"did you mean {near[0]}?" if near else f"remove it; the limits are {', '.join(known)}"
                raise UserError(UserCode.BAD_CONFIG, f"there is no limit {key!r}", remedy)
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
        }
        return dataclasses.replace(base or cls(), **values)

    def in_force(self) -> dict[str, object]:
        """Those that are set, by name."""
        free = Limits()
        return {
            limit.name: getattr(self, limit.name)
            for limit in fields(self)
            if getattr(self, limit.name) != getattr(free, limit.name)
        }


_RANGES = (
    ("idle_minutes", 0.0, 24 * 60.0),
    ("share", SHARE_MIN, 1.0),
    ("temperature_max", 30.0, 120.0),
    ("up_mbit", MBIT_MIN, 1e6),
    ("down_mbit", MBIT_MIN, 1e6),
    ("mb_a_day", 1.0, 1e9),
    ("disk_mb", 1.0, 1e9),
)


def _is_schedule(text: object) -> bool:
    try:
        return isinstance(text, str) and bool(Schedule.parse(text))
    except ValueError:
        return False


def _demand(name: str, value: object, accepted: str, holds: bool) -> None:
    if not holds:
        raise UserError(UserCode.BAD_CONFIG, f"{name} = {value!r} is not accepted", f"set {name} to {accepted}")
