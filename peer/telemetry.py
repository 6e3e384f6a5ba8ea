"""What a program says while it runs: events, one a line, and a progress display.

Events go to three places: a short line for people on stderr, a JSON line to a file, and with `--json` the same JSON
line to stdout. Modules log through structlog (`structlog.get_logger().info("round closed", round=7)`); `Telemetry`
decides where that goes. On a terminal the progress bar stays below the events; elsewhere it becomes a plain line every
few seconds.
"""

import contextlib
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import structlog
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from peer.errors import os_errors, printable
from peer.trackers import Tracker

LOG_BYTES_MAX = 16 << 20  # then the file is kept once as log.jsonl.1 and begun anew
PLAIN_INTERVAL_S = 5.0  # between two progress lines where there is no terminal
WINDOW = 64  # reports over which speed is measured
CLOSE_S = 3.0  # how long a tracker may take to finish


class Telemetry:
    """Sends every event of this process to stderr, to a file and, if asked, to stdout. Use as a context manager.

    `program` marks each event, so that the logs of several programs can be read together. A log file that cannot be
    opened is a UserError; one that fails later (a full disk) is given up with one warning, because training goes on.
    `listener`, if set, hears the name and the facts of every event before it is written; so does a `tracker`, which
    like the log file is given up when it fails.
    """

    def __init__(
        self,
        program: str,
        *,
        file: Path | None,
        json_stdout: bool,
        stderr: TextIO | None = None,
        stdout: TextIO | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self._program = program
        self._tracker = tracker
        self._file = None if file is None else LogFile(file)
        self._stdout = (stdout or sys.stdout) if json_stdout else None
        self._lock = threading.Lock()
        self.listener: Callable[[str, Mapping[str, Any]], None] | None = None
        self.console = _Console(file=stderr or sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def __enter__(self) -> "Telemetry":
        processors: list[structlog.typing.Processor] = [
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            self._write,
        ]
        structlog.configure(processors=processors, cache_logger_on_first_use=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        structlog.reset_defaults()
        self.close()

    def close(self) -> None:
        """Finish what is written to: for a program that leaves at once."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            # It may want to talk to a machine that does not answer, and nobody waits long for that.
            closing = threading.Thread(target=tracker.close, daemon=True)
            closing.start()
            closing.join(CLOSE_S)
        if self._file is not None:
            self._file.close()

    def say(self, sentence: str) -> None:
        """Tell people something that is no event."""
        with self._lock:
            self.console.say(printable(sentence))

    def _write(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        """The last processor: it writes the event and tells structlog that nothing is left to do."""
        now = datetime.now(UTC)
        level, name = event.pop("level"), event.pop("event")
        line = json_line(now, self._program, level, name, event)
        if self.listener is not None:
            self.listener(name, event)
        with self._lock:
            self.console.say(human_line(now, level, name, event))
            if self._file is not None:
                self._write_file(line)
            if self._stdout is not None:
                self._write_stdout(line)
            if self._tracker is not None:
                self._track(name, event)
        raise structlog.DropEvent

    def _track(self, name: str, facts: Mapping[str, Any]) -> None:
        assert self._tracker is not None
        try:
            self._tracker.heard(name, facts)
        except Exception as error:  # noqa: BLE001 - somebody else's code; training goes on without it
            self.console.say(printable(f"warning: the tracker is given up: {type(error).__name__}: {error}"))
            self._tracker = None

    def _write_file(self, line: str) -> None:
        assert self._file is not None
        try:
            self._file.write(line)
        except OSError as error:
            self.console.say(f"warning: the log file {self._file.path} is given up: {error.strerror}")
            self._file.close()
            self._file = None

    def _write_stdout(self, line: str) -> None:
        assert self._stdout is not None
        try:
            self._stdout.write(line)
            self._stdout.flush()
        except OSError:
            # As with stderr: the reader has gone, we stay.
            self._stdout = None


class _Console(Console):
    """A console that goes silent when whoever read it has gone: that is no reason to leave the swarm."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def say(self, line: str) -> None:
        """Print a line, or nothing more at all when it goes to a file whose disk is full."""
        try:
            self.print(line)
        except OSError:
            self.quiet = True


class LogFile:
    """A file that never holds more than `bytes_max`: when full it becomes `NAME.1`, replacing the one before."""

    def __init__(self, path: Path, bytes_max: int = LOG_BYTES_MAX) -> None:
        self.path = path
        self._bytes_max = bytes_max
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)
        self._size = self._file.tell()

    def write(self, line: str) -> None:
        """Append one line at once. Raises OSError."""
        data = line.encode()
        if self._size and self._size + len(data) > self._bytes_max:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._open()
        self._file.write(data)
        self._size += len(data)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()


def json_line(now: datetime, program: str, level: str, name: str, fields: Mapping[str, Any]) -> str:
    """One event as one JSON object and a line end. Bytes become hex, paths text, numbers that JSON lacks null."""
    head = {"at": now.isoformat(timespec="milliseconds"), "program": program, "level": level, "event": name}
    return json.dumps({**head, **{key: _jsonable(value) for key, value in fields.items()}}, ensure_ascii=True) + "\n"


def human_line(now: datetime, level: str, name: str, fields: Mapping[str, Any]) -> str:
    """One event for people: local time, what happened, the facts. Foreign text cannot break out of the line."""
    clock = now.astimezone().strftime("%H:%M:%S")
    mark = "" if level == "info" else f"{level}: "
    facts = " ".join(f"{key}={_short(value)}" for key, value in fields.items())
    return printable(f"{clock} {mark}{name}: {facts}" if facts else f"{clock} {mark}{name}")


def _jsonable(value: object) -> object:
    match value:
        case bool() | int() | str() | None:
            return value
        case float():
            return value if value - value == 0 else None
        case bytes():
            return value.hex()
        case Mapping():
            return {str(key): _jsonable(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_jsonable(item) for item in value]
        case _:
            return str(value)


def _short(value: object) -> str:
    match value:
        case bytes():
            return value.hex()[:12]
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        case float():
            return f"{value:.4g}"
        case list() | tuple() | set() | frozenset():
            return "[" + ", ".join(_short(item) for item in value) + "]"
        case str() if value == "" or any(character.isspace() for character in value):
            return json.dumps(value)
        case _:
            return str(value)


@dataclass(frozen=True)
class Reading:
    """What the progress display shows. None where it is not known yet."""

    round: int
    rounds: int
    step: int
    steps: int
    tokens_per_s: float | None
    loss: float | None
    eta_s: float | None

    @property
    def done(self) -> float:
        """Share of the run, 0 to 1."""
        whole = self.rounds * self.steps
        return min(1.0, ((self.round - 1) * self.steps + self.step) / whole) if whole else 0.0

    def facts(self) -> str:
        """Speed, loss and ETA as text."""
        speed = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f}"
        loss = "-" if self.loss is None else f"{self.loss:.3f}"
        return f"{speed} tokens/s  loss {loss}  ETA {duration(self.eta_s)}"

    def line(self) -> str:
        """The whole display as one plain line."""
        place = f"round {self.round}/{self.rounds}  step {self.step}/{self.steps}"
        return f"progress {100 * self.done:3.0f}%  {place}  {self.facts()}"


class Meter:
    """Turns reports into readings. Speed counts waiting for others too, so the ETA is honest. Reads no clock itself."""

    def __init__(self, rounds: int, steps_per_round: int) -> None:
        self._rounds = rounds
        self._steps = steps_per_round
        self._loss: float | None = None
        self._tokens = 0
        self._past: deque[tuple[float, int, float]] = deque(maxlen=WINDOW)  # when, tokens so far, share done

    def report(self, now_s: float, *, round: int, step: int, tokens: int, loss: float | None) -> Reading:
        """Take a report: we are at `step` of `round`, and have trained on `tokens` more since the last report."""
        self._tokens += tokens
        self._loss = loss if loss is not None else self._loss
        bare = Reading(round, self._rounds, step, self._steps, None, self._loss, None)
        self._past.append((now_s, self._tokens, bare.done))
        then_s, tokens_then, done_then = self._past[0]
        passed_s = now_s - then_s
        speed = eta_s = None
        if passed_s > 0:
            speed = (self._tokens - tokens_then) / passed_s
            if bare.done > done_then:
                eta_s = (1 - bare.done) * passed_s / (bare.done - done_then)
        return Reading(round, self._rounds, step, self._steps, speed, self._loss, eta_s)


class Progress:
    """Shows where the run is: a bar on a terminal, else a plain line every few seconds. Use as a context manager."""

    def __init__(
        self, console: Console, rounds: int, steps_per_round: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._clock = clock
        self._meter = Meter(rounds, steps_per_round)
        self._printed_s: float | None = None
        self._bar: RichProgress | None = None
        if console.is_terminal:
            place = TextColumn("round {task.fields[round]}/{task.fields[rounds]}")
            facts = TextColumn("{task.fields[facts]}")
            self._bar = RichProgress(place, BarColumn(bar_width=24), facts, console=console, transient=True)
            self._task = self._bar.add_task("run", total=1.0, round=0, rounds=rounds, facts="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def report(self, *, round: int, step: int, tokens: int, loss: float | None) -> Reading:
        """We are at `step` of `round`; `tokens` were trained on since the last report. Call it as often as you like."""
        now_s = self._clock()
        reading = self._meter.report(now_s, round=round, step=step, tokens=tokens, loss=loss)
        if self._bar is not None:
            self._bar.update(self._task, completed=reading.done, round=round, facts=reading.facts())
        elif self._printed_s is None or now_s - self._printed_s >= PLAIN_INTERVAL_S:
            self._printed_s = now_s
            self._console.print(reading.line())
        return reading


def duration(seconds: float | None) -> str:
    """A time span as people write it: 0:42, 12:05, 3:04:05; `-` when unknown."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
