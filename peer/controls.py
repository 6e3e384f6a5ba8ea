"""What the owner of a machine lets its peer do at the moment: by settings, and by commands while it runs.

`sparseloco-peer pause`, `resume`, `finish` and `limits` write one small file into the home, which the peer looks at
twice a second; the peer answers in another one. Pause and limits stay when the peer is started again.

    <home>/control.json    what was asked for last
    <home>/state.json      what the peer makes of it
    <home>/traffic.json    how many bytes have travelled today
"""

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import structlog

from peer import sensors
from peer.errors import UserCode, UserError, os_errors
from peer.limits import Limits
from peer.net.throttle import Traffic
from peer.schedule import Schedule
from peer.store import Home, atomic_write

log = structlog.get_logger()

TICK_S = 0.5
SENSE_S = 5.0  # the machine itself is looked at less often
DISK_S = 60.0
COOL_BY = 5.0  # degrees below the ceiling at which training goes on
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Wish:
    """What the owner asked for while the peer runs. `limits` are values that replace those of the settings file."""

    paused: bool = False
    limits: dict[str, object] = field(default_factory=dict)
    finish: str = ""
    """The token of the peer's life that is to finish; another life takes no notice."""
    token: str = ""
    """Names this wish, so that the peer's answer can be told from an older one."""


@dataclass(frozen=True)
class Hold:
    """Why nothing is trained. `offline` says that nothing may travel either."""

    why: str
    offline: bool = False


@dataclass(frozen=True)
class State:
    """What a peer says of itself. `life` names the process, `token` the newest wish that it knows."""

    life: str
    token: str
    state: str
    why: str
    limits: dict[str, object]


def read_wish(home: Path) -> Wish:
    """The newest wish. Raises UserError BAD_FILE when the file is damaged."""
    path = home / "control.json"
    with os_errors(path):
        if not path.exists():
            return Wish()
        data = path.read_bytes()
    try:
        wish = Wish(**json.loads(data))
        Limits.of(wish.limits)
    except (ValueError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            UserCode.BAD_FILE, f"{path} holds no wishes of a peer's owner ({error})", f"delete {path}"
        ) from error
    return wish


def write_wish(home: Path, wish: Wish) -> None:
    """Ask the peer of this home for something. Raises UserError."""
    atomic_write(home / "control.json", json.dumps(vars(wish)).encode("utf-8"), mode=0o600)


def read_state(home: Path) -> State | None:
    """What the peer said last, None when it said nothing that can be read."""
    with suppress(OSError, ValueError, TypeError):
        return State(**json.loads((home / "state.json").read_bytes()))
    return None


class Controls:
    """Decides whether a peer may train. `hold` says why it may not, `limits` are those in force."""

    def __init__(self, home: Home, limits: Limits, traffic: Traffic, changed: Callable[[], None]) -> None:
        """`changed` hears when `hold`, `limits` or `finish` have changed; `life` names this life of the peer."""
        self._home, self._base, self._traffic, self._changed = home.path, limits, traffic, changed
        self._wish = read_wish(self._home)
        self._seen = self._stamp()
        self.life = secrets.token_hex(8)
        self._day = _Day(self._home / "traffic.json", traffic)
        self._machine = Machine(self._home)
        self._told: State | None = None
        self.limits = Limits.of(self._wish.limits, limits)
        self.hold: Hold | None = None
        self.finish = False
        self.device = "cpu"
        self._sensed: str | None = None
        self._activity = "starting"
        self._apply()

    async def watch(self) -> None:
        """Look at wishes and machine for as long as the peer runs."""
        sensed_s = float("-inf")
        self._decide(news=False)
        try:
            while True:
                news = self._read()
                if news or time.monotonic() - sensed_s >= SENSE_S:
                    sensed_s = time.monotonic()
                    self._sensed = await asyncio.to_thread(self._machine.objection, self.limits, self.device)
                    self._day.note()
                self._decide(news=news)
                await asyncio.sleep(TICK_S)
        finally:
            self._day.note()

    def say(self, activity: str) -> None:
        """Note what the peer does where nothing holds it, such as "training"."""
        self._activity = activity
        self._tell()

    def _read(self) -> bool:
        """Take the newest wish in; whether there is one."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self._wish = read_wish(self._home)
        except UserError as error:
            log.warning("control", why=error.message)
            return False
        self.limits = Limits.of(self._wish.limits, self._base)
        self.finish = self.finish or self._wish.finish == self.life
        self._apply()
        log.info("control", paused=self._wish.paused, limits=self.limits.in_force(), finish=self.finish)
        return True

    def _apply(self) -> None:
        self._traffic.cap(self.limits.up_mbit, self.limits.down_mbit)

    def _stamp(self) -> tuple[int, int] | None:
        with suppress(OSError):
            status = (self._home / "control.json").stat()
            return status.st_ino, status.st_mtime_ns
        return None

    def _decide(self, *, news: bool) -> None:
        before, self.hold = self.hold, self._objection()
        if self.hold != before:
            if self.hold is not None:
                log.info("paused", why=self.hold.why)
            else:
                log.info("resumed")
        if self.hold != before or news:
            self._changed()
        self._tell()

    def _objection(self) -> Hold | None:
        now, limits = datetime.now().astimezone(), self.limits
        if self._wish.paused:
            return Hold("by you: `sparseloco-peer resume` goes on")
        if limits.mb_a_day and self._day.bytes >= limits.mb_a_day * MEGABYTE:
            return Hold(f"the {limits.mb_a_day:g} MB of today have travelled; until midnight", offline=True)
        schedule = Schedule.parse(limits.schedule)
        if not schedule.allows(now):
            begins = schedule.next_start(now)
            return Hold("by the schedule" + (f" until {begins:%a %H:%M}" if begins else ""))
        return Hold(self._sensed) if self._sensed else None

    def _tell(self) -> None:
        state, why = ("paused", self.hold.why) if self.hold is not None else (self._activity, "")
        told = State(self.life, self._wish.token, state, why, self.limits.in_force())
        if told != self._told:
            self._told = told
            with suppress(UserError):  # the answer is a courtesy: a full disk is told elsewhere
                _write(self._home / "state.json", vars(told))


class _Day:
    """The bytes that have travelled today, also before this peer was started again."""

    def __init__(self, path: Path, traffic: Traffic) -> None:
        self._path, self._traffic = path, traffic
        self._date, self._earlier = "", 0
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(path.read_bytes())
            self._date, self._earlier = str(known["date"]), int(known["bytes"])
        self._base, self._noted = traffic.total, -1

    @property
    def bytes(self) -> int:
        self._turn()
        return self._earlier + self._traffic.total - self._base

    def note(self) -> None:
        """Keep the count where it has changed; it is worth no wait for the disk."""
        count = self.bytes
        if count != self._noted:
            self._noted = count
            with suppress(UserError):
                _write(self._path, {"date": self._date, "bytes": count})

    def _turn(self) -> None:
        today = datetime.now().astimezone().date().isoformat()
        if today != self._date:
            self._date, self._earlier, self._base = today, 0, self._traffic.total


class Machine:
    """What speaks against training on this machine at the moment. Blocks for some milliseconds."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._idleness = sensors.Idleness()
        self._hot = False
        self._disk: tuple[float, int] | None = None  # when the home was measured, and its bytes
        self._unknown: set[str] = set()

    def objection(self, limits: Limits, device: str) -> str | None:
        """The first reason not to train, None when there is none."""
        app = sensors.running(limits.exclusive_apps) if limits.exclusive_apps else None
        if app is not None:
            return f"while {app} runs"
        if limits.on_mains and self._known("on_mains", sensors.on_mains()) is False:
            return "while the machine is on battery"
        if limits.idle_minutes:
            idle_s = self._known("idle_minutes", self._idleness.seconds())
            if idle_s is not None and idle_s < 60 * limits.idle_minutes:
                return "while the machine is in use"
        return self._too_hot(limits, device) or self._too_large(limits)

    def _known(self, limit: str, value: float | None) -> float | None:
        """The value; one that this machine does not tell is said once, for its limit cannot be kept."""
        if value is None and limit not in self._unknown:
            self._unknown.add(limit)
            log.warning("this machine does not tell what a limit needs, so it is not kept", limit=limit)
        return value

    def _too_hot(self, limits: Limits, device: str) -> str | None:
        degrees = self._known("temperature_max", sensors.temperature(device)) if limits.temperature_max else None
        ceiling = limits.temperature_max - (COOL_BY if self._hot else 0)
        self._hot = degrees is not None and degrees > ceiling
        return f"until the device has cooled down below {limits.temperature_max - COOL_BY:g} °C" if self._hot else None

    def _too_large(self, limits: Limits) -> str | None:
        if not limits.disk_mb:
            return None
        if self._disk is None or time.monotonic() - self._disk[0] >= DISK_S:
            self._disk = time.monotonic(), folder_bytes(self._home)
        full = self._disk[1] > limits.disk_mb * MEGABYTE
        return f"{self._home} takes {self._disk[1] / MEGABYTE:.0f} of {limits.disk_mb:g} MB" if full else None


def folder_bytes(folder: Path) -> int:
    """What the files in a folder take; links are not followed."""
    total = 0
    with suppress(OSError):
        for path in folder.rglob("*"):
            with suppress(OSError):
                total += path.lstat().st_size
    return total


def _write(path: Path, values: dict[str, object]) -> None:
    """Write a file that may be lost in a power cut, but is never seen half-written. Raises UserError."""
    with os_errors(path):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        temporary.write_text(json.dumps(values), "utf-8")
        temporary.replace(path)
