"""What a peer shows while it runs: some live lines on a terminal, below its events; elsewhere a plain line at times.

It hears the same events as the log, so it knows nothing that a reader of the log would not.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.text import Text

from peer import sensors
from peer.net.throttle import Traffic
from peer.phases import Phases
from peer.telemetry import Meter, Progress, Reading, duration

REFRESH_PER_S = 2.0
SENSE_S = 5.0
BAR_CHARS = 24


class View:
    """The display of one peer. Use as a context manager; `heard` takes the events."""

    def __init__(
        self, console: Console, phases: Phases, traffic: Traffic, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._phases, self._traffic, self._clock = console, phases, traffic, clock
        self._live: Live | None = None
        self._name = ""
        self._plain: Progress | None = None
        self._meter: Meter | None = None
        self._reading: Reading | None = None
        self._activity, self._paused, self._detail = "", "", ""
        self._closes_at_s: float | None = None
        self._accepted = self._refused = 0
        self._contributors: int | None = None
        self._degrees: float | None = None

    def __enter__(self) -> "View":
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=REFRESH_PER_S, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, name: str, rounds: int, steps: int) -> None:
        """The run is known: its name, its rounds, and the inner steps of each."""
        self._name, self._meter = name, Meter(rounds, steps)
        self._plain = None if self._live is not None else Progress(self._console, rounds, steps)

    def report(self, *, round: int, step: int, tokens: int, loss: float | None) -> None:
        """We are at `step` of `round`; `tokens` were trained on since the last report."""
        assert self._meter is not None, "a run begins before it is trained on"
        if self._plain is not None:
            self._plain.report(round=round, step=step, tokens=tokens, loss=loss)
        else:
            self._reading = self._meter.report(self._clock(), round=round, step=step, tokens=tokens, loss=loss)

    def say(self, activity: str) -> None:
        """What the peer does now, where nothing holds it."""
        self._activity, self._detail = activity, ""

    def opened(self, closes_in_s: float) -> None:
        """A round is open, and closes within so many seconds."""
        self._closes_at_s = self._clock() + closes_in_s

    def heard(self, name: str, facts: Mapping[str, Any]) -> None:
        """Take an event of the log in."""
        match name:
            case "receipt":
                self._accepted += bool(facts["accepted"])
                self._refused += not facts["accepted"]
            case "round":
                self._contributors = facts["contributors"]
            case "paused":
                self._paused = str(facts["why"])
            case "resumed":
                self._paused = ""
            case "downloading":
                share = f"{decimal(facts['bytes'])} of {decimal(facts['of'])}"
                self._detail = f"{share}, {decimal(facts['bytes_per_s'])}/s, ETA {duration(facts['eta_s'])}"
            case "replaying":
                self._detail = f"round {facts['round']} of {facts['of']}, ETA {duration(facts['eta_s'])}"

    async def sense(self, device: str) -> None:
        """Keep an eye on the temperature, for as long as the view is shown. Only a terminal shows it."""
        while self._live is not None:
            self._degrees = await asyncio.to_thread(sensors.temperature, device)
            await asyncio.sleep(SENSE_S)

    def lines(self) -> list[str]:
        """What a terminal shows, line by line."""
        reading, left_s = self._reading, None
        if self._closes_at_s is not None:
            left_s = max(0.0, self._closes_at_s - self._clock())
        state = f"paused {self._paused}" if self._paused else self._activity or "starting"
        phase = f"  [{self._phases.current}]" if self._phases.current else ""
        detail = f"  {self._detail}" if self._detail else ""
        lines = [f"{self._name or 'sparseloco-peer'}: {state}{phase}{detail}"]
        if reading is not None:
            bar = "━" * round(BAR_CHARS * reading.done)
            place = f"round {reading.round}/{reading.rounds}  step {reading.step}/{reading.steps}"
            closes = f"  closes within {duration(left_s)}" if left_s is not None else ""
            lines.append(f"{place}  {bar:╌<{BAR_CHARS}} {100 * reading.done:.0f}%{closes}")
            lines.append(reading.facts())
        receipts = f"{self._accepted} accepted" + (f", {self._refused} not" if self._refused else "")
        peers = "-" if self._contributors is None else str(self._contributors)
        heat = "" if self._degrees is None else f"  {self._degrees:.0f} °C"
        up, down = decimal(self._traffic.up.total), decimal(self._traffic.down.total)
        lines.append(f"my packets {receipts}  peers {peers}  up {up}  down {down}{heat}")
        return lines

    def _render(self) -> Text:
        return Text("\n".join(self.lines()), no_wrap=True, overflow="ellipsis")
