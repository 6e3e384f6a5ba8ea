"""`sparseloco-peer doctor`: what this machine can do, and whether it will help a run, before it joins.

It measures what training and travelling will meet: the run's own model on the device, and the line to the aggregator
over the connection that packets take. It leaves nothing behind and takes no part.
"""

import asyncio
import platform
import shutil
import tempfile
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peer.config import PeerConfig
from peer.connection import as_user_error
from peer.controls import MEGABYTE, folder_bytes
from peer.core import codec
from peer.core.device import pick_device, pick_dtype, set_threads
from peer.core.replica import Replica
from peer.data.corpus import EMBEDDED
from peer.data.prepare import prepare
from peer.equip import STORED_TWICE_BYTES
from peer.errors import UserCode, UserError, explain, from_os_error, label, printable
from peer.find import Finder
from peer.fit import Fitted, fit_micro_batch, free_bytes, state_bytes
from peer.forecast import Forecast, Speeds, expected_traffic, forecast
from peer.limits import Limits
from peer.net.errors import LinkError, LinkFailure
from peer.net.link import Link
from peer.net.messages import Line, RoundClosed, RoundOpened
from peer.net.throttle import BYTES_PER_MBIT
from peer.store import Home
from peer.telemetry import LOG_BYTES_MAX
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.invite import Invite
from protocol.ledger import Kind, RoundRecord, Verdict, check_record
from protocol.limits import RECORD_BYTES_MAX
from protocol.run import RunConfig

PACKAGES = ("sparseloco-peer", "torch", "numpy", "grpcio", "hivemind", "transformers")
RECORDS = 8  # of the last rounds are looked at
EVENTS_S = 3.0  # for the newest record and the open round, which an aggregator tells at once
CLOCK_S = 3.0  # so wrong a clock makes records in the directory look expired
_LOADED_BYTES = 4  # more of each parameter on the disk while the state of the run is fetched


@dataclass(frozen=True)
class Finding:
    """What is wrong. An error keeps this machine from helping the run; a warning does not."""

    level: str
    code: Code | UserCode
    message: str
    remedy: str

    @classmethod
    def of(cls, error: UserError | ProtocolError, level: str = "error") -> "Finding":
        """What a program would have ended with."""
        if isinstance(error, UserError):
            return cls(level, error.code, error.message, error.remedy)
        sentence, remedy = explain(error)
        return cls(level, error.code, f"{sentence} ({error.detail})" if error.detail else sentence, remedy)

    def lines(self) -> list[str]:
        """The finding as errors are printed."""
        return [f"{self.level} {label(self.code)}: {printable(self.message)}", f"  try: {printable(self.remedy)}"]

    def to_json(self) -> dict[str, str | int]:
        """The finding as plain values."""
        return {
            "level": self.level,
            "code": self.code.value,
            "name": label(self.code),
            "message": self.message,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class _Run:
    """What an aggregator says of a run. `records` are the newest ones, newest first; sizes are those of the newest."""

    config: RunConfig
    records: list[RoundRecord]
    inner_steps: int
    update_bytes: int
    bundle_bytes: int
    line: Line | None


class Doctor:
    """Looks at this machine, then at a run. `say` hears each fact as a line once it is known."""

    def __init__(self, config: PeerConfig, say: Callable[[str], None]) -> None:
        self.facts: dict[str, dict[str, Any]] = {}
        self.findings: list[Finding] = []
        self._config, self._say = config, say
        self._device: torch.device | None = None
        self._forecast: Forecast | None = None

    @property
    def helps(self) -> bool:
        """Whether nothing keeps this machine from helping."""
        return not any(finding.level == "error" for finding in self.findings)

    def verdict(self) -> str:
        """The answer in a sentence."""
        problems = sum(finding.level == "error" for finding in self.findings)
        if problems:
            return f"This machine will not help yet: {_counted(problems, 'problem')} above."
        if self._forecast is None:
            return "Nothing here is in the way. With an invite, doctor says how much this machine helps that run."
        micro_batch, usual = self.facts["training"]["micro_batch"], self._forecast
        steps = _counted(usual.inner_steps, "inner step")
        return (
            f"This machine will help: {steps} a round at micro-batch {micro_batch}, "
            f"about {usual.accepted_per_hour:.0f} accepted contributions an hour."
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        findings = [finding.to_json() for finding in self.findings]
        return {"helps": self.helps, "verdict": self.verdict(), "facts": self.facts, "findings": findings}

    def look_around(self) -> None:
        """See what this machine is, whatever run it may join."""
        versions = {name: found for name in PACKAGES if (found := _version(name))}
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        self._fact(
            "software", f"Python {platform.python_version()}, {listed}", python=platform.python_version(), **versions
        )
        try:
            self._device = device = pick_device(self._config.device)
        except ValueError as error:
            self._find(UserError(UserCode.NO_DEVICE, str(error), "leave --device out: then the best one here is used"))
        else:
            set_threads(self._config.threads)
            dtype = str(pick_dtype(self._config.dtype, device)).removeprefix("torch.")
            name, kernels = _name_of(device), codec.kernels_in_use(device)
            self._fact("device", f"{device.type}: {name}; {dtype}", kind=device.type, name=name, dtype=dtype)
            path, _, why = kernels.partition(": ")
            self._fact("kernels", path, path=path, why=why)
            if why:
                self._find(
                    UserError(UserCode.MISSING_PACKAGE, f"compression is slower than it could be: {why}", why),
                    "warning",
                )
            free = free_bytes(device)
            self._fact("memory", "unknown" if free is None else f"{_size(free)} free", free_bytes=free)
        home = self._config.home.expanduser().absolute()
        try:
            free_disk = shutil.disk_usage(next(path for path in (home, *home.parents) if path.exists())).free
            self._fact("disk", f"{_size(free_disk)} free for {home}", free_bytes=free_disk, home=str(home))
        except OSError as error:
            self._find(from_os_error(error, home))
        limits = self._config.limits.in_force()
        if limits:
            self._fact("limits", ", ".join(f"{name} = {value}" for name, value in limits.items()), **limits)

    async def look_at_run(self, invite: Invite, *, plaintext: bool = False) -> None:
        """See what the run asks of this machine, and what it would make of it."""
        try:
            run = await self._ask(invite, plaintext=plaintext)
            self._check_disk(run.config)
            fitted = await asyncio.to_thread(self._fit, run.config)
        except LinkError as error:
            self._find(as_user_error(error))
        except (UserError, ProtocolError) as error:
            self._find(error)
        else:
            if fitted is not None:
                self._foresee(run, fitted)

    # The run

    async def _ask(self, invite: Invite, *, plaintext: bool) -> _Run:
        # Whoever only looks leaves nothing behind, and comes with a key of its own lest it end a peer's session.
        with tempfile.TemporaryDirectory() as folder:
            finder = await Finder.open(invite, Home(Path(folder)))
            try:
                try:
                    link = await finder.connect(PrivateKey.generate(), plaintext=plaintext)
                finally:
                    await self._check_directory(finder)
                assert finder.run is not None, "a link was made, and with it the run is known"
                async with link:
                    return await self._look(link, finder.run)
            finally:
                await finder.close()

    async def _look(self, link: Link, config: RunConfig) -> _Run:
        closed, opened = RoundClosed(link.head_record), None
        with suppress(TimeoutError):
            async with asyncio.timeout(EVENTS_S), aclosing(link.observe()) as events:
                async for event in events:
                    closed = event if isinstance(event, RoundClosed) else closed
                    opened = event if isinstance(event, RoundOpened) else opened
                    if opened is not None:
                        break
        records = [_checked(closed.record, config)]
        while len(records) < RECORDS and records[-1].kind != Kind.GENESIS:
            data = await link.fetch("record", records[-1].previous, size_max=RECORD_BYTES_MAX)
            records.append(_checked(data, config))
        size, steps = config.layout.size, config.inner.steps if opened is None else opened.inner_steps
        head = records[0]
        self._fact(
            "run",
            f"{config.name}: {size:,} parameters, round {head.round} of {config.outer.rounds}",
            name=config.name,
            run_id=config.run_id.hex(),
            parameters=size,
            round=head.round,
            rounds=config.outer.rounds,
            inner_steps=steps,
        )
        if head.round >= config.outer.rounds:
            message = f"the run is complete: round {head.round} of {config.outer.rounds} is over"
            self._find(UserError(UserCode.BAD_ARGUMENT, message, "ask its operator for the invite of another run"))
        return _Run(config, records, steps, closed.update_bytes, closed.bundle_bytes, await self._probe(link))

    async def _probe(self, link: Link) -> Line | None:
        self._say("  measuring the line, a few seconds")
        try:
            line = await link.probe()
        except ProtocolError as error:
            self._find(error, "warning")
            return None
        except LinkError as error:
            if error.failure != LinkFailure.NOT_OURS:
                raise
            self._find(ProtocolError(Code.VERSION, "the aggregator is too old to measure a line"), "warning")
            return None
        up_mbit, down_mbit = (speed / BYTES_PER_MBIT for speed in (line.up_bytes_per_s, line.down_bytes_per_s))
        text = f"{up_mbit:.1f} Mbit/s up, {down_mbit:.1f} Mbit/s down, {1000 * line.round_trip_s:.0f} ms round trip"
        self._fact("line", text, address=link.address, **asdict(line))
        if abs(line.clock_ahead_s) > CLOCK_S + line.round_trip_s / 2:
            way = "ahead of" if line.clock_ahead_s > 0 else "behind"
            message = f"the clock of this machine is {abs(line.clock_ahead_s):.0f} s {way} the aggregator's"
            self._find(UserError(UserCode.CLOCK_WRONG, message, _SET_CLOCK), "warning")
        return line

    async def _check_directory(self, finder: Finder) -> None:
        health = await finder.directory_health()
        working = health.connected and not health.problem
        text = _counted(health.peers, "node") if working else health.problem or "not reached"
        self._fact("directory", text, reached=working, nodes=health.peers)
        if not working:
            message = f"the directory is not reached, so only the addresses of the invite help: {text}"
            self._find(UserError(UserCode.NO_DIRECTORY, message, _REACH_DIRECTORY), "warning")

    # This machine, for this run

    def _check_disk(self, run: RunConfig) -> None:
        need = (STORED_TWICE_BYTES + _LOADED_BYTES) * run.layout.size + 2 * LOG_BYTES_MAX
        home, disk = self._config.home.expanduser().absolute(), self.facts.get("disk", {})
        room, cap = disk.get("free_bytes", need), self._config.limits.disk_mb
        if cap and home.exists():
            cap -= folder_bytes(home) / MEGABYTE
        if cap:
            room = min(room, max(0, round(cap * MEGABYTE)))
        disk["needed_bytes"] = need
        # Whoever has taken part before has most of it there already.
        if need > room and not (home / "runs" / run.run_id.hex() / "replica.safetensors").exists():
            message = f"this run needs {_size(need)} in {home}, and {_size(room)} are free for it"
            remedy = "free some space, name a folder on another disk with --home, or raise disk_mb in the limits"
            self._find(UserError(UserCode.DISK_FULL, message, remedy))

    def _fit(self, run: RunConfig) -> Fitted | None:
        """Train a little on made-up tokens: what a step costs does not depend on what they say."""
        device = self._device
        if device is None:
            return None
        self._say("  measuring how fast this device trains, a few seconds")
        free, need = free_bytes(device), state_bytes(run)
        if free is not None and need > free:
            message = f"this run needs {_size(need)} of memory before anything is trained, and {_size(free)} are free"
            raise UserError(UserCode.OUT_OF_MEMORY, message, _LESS_MEMORY)
        try:
            if run.data.corpus not in EMBEDDED or run.data.corpus in self._config.data_paths:
                prepare(run.data, self._config.home / "data", self._config.data_paths)
            replica = Replica(run, device, torch.float32)
        except ValueError as error:
            raise UserError(UserCode.NO_CORPUS, str(error), "get what the run needs, then ask again") from error
        shape = (run.inner.batch_size, run.data.sequence_length + 1)
        tokens = np.random.default_rng(1).integers(0, run.model.vocab_size, shape)
        fitted = fit_micro_batch(replica, tokens, dtype=self._config.dtype, micro_batch=self._config.micro_batch)
        need += fitted.micro_batch * fitted.activation_bytes
        self.facts["memory"]["needed_bytes"] = need
        self._fact(
            "training",
            f"{fitted.step_s:.3g} s an inner step, {fitted.why}; it needs {_size(need)} of memory",
            step_s=fitted.step_s,
            micro_batch=fitted.micro_batch,
            dtype=str(fitted.dtype).removeprefix("torch."),
            needed_bytes=need,
            why=fitted.why,
        )
        if free is not None and need > free:
            message = f"this run needs {_size(need)} of memory, and {_size(free)} are free"
            raise UserError(UserCode.OUT_OF_MEMORY, message, _LESS_MEMORY)
        return fitted

    def _foresee(self, run: _Run, fitted: Fitted) -> None:
        limits, config = self._config.limits, run.config
        speeds = _speeds(fitted, run.line, limits)
        contributors = sum(entry.verdict == Verdict.ACCEPTED for entry in run.records[0].entries)
        traffic = expected_traffic(config, contributors, run.update_bytes, run.bundle_bytes)
        usual = forecast(config, run.inner_steps, speeds, traffic, run.records)
        self._forecast = usual
        travel = f"{_size(traffic.packet_bytes)} up and {_size(traffic.down_bytes)} down"
        if run.line is not None:
            travel += f" in {usual.up_s:.1f} + {usual.down_s:.1f} s"
        text = f"{usual.inner_steps} steps in {usual.train_s:.1f} s, {travel}; a round takes {usual.round_s:.1f} s"
        self._fact("round", text, **asdict(traffic), **asdict(usual))
        if limits.mb_a_day:
            hour = usual.accepted_per_hour * (traffic.packet_bytes + traffic.down_bytes) / 1e6
            enough = min(24.0, limits.mb_a_day / hour) if hour else 24.0
            self._fact("a day", f"mb_a_day lasts for {enough:.1f} hours", hours=enough)
        if not usual.inner_steps:
            travel_s = usual.up_s + usual.down_s
            message = (
                f"a round takes packets for {usual.open_s:.1f} s, and not one inner step of {speeds.step_s:.1f} s "
                f"fits in beside {travel_s:.1f} s of travelling"
            )
            self._find(UserError(UserCode.TOO_SLOW, message, _FASTER))
        elif usual.inner_steps < run.inner_steps:
            message = f"only {usual.inner_steps} of the round's {run.inner_steps} inner steps are done in time"
            self._find(
                UserError(UserCode.TOO_SLOW, message, "nothing to do: what is done counts; " + _FASTER), "warning"
            )

    # What is said

    def _fact(self, name: str, text: str, /, **values: Any) -> None:
        self.facts[name] = values
        self._say(f"  {name:<10} {text}")

    def _find(self, error: UserError | ProtocolError, level: str = "error") -> None:
        finding = Finding.of(error, level)
        self.findings.append(finding)
        for line in finding.lines():
            self._say(line)


_SET_CLOCK = (
    "set it by itself: sudo timedatectl set-ntp true (or ask the operator, if it is the aggregator's that is wrong)"
)
_REACH_DIRECTORY = (
    "ask the operator whether `sparseloco-peer bootstrap` is running, and check that a firewall here lets TCP out;"
    " where hivemind is missing: pip install hivemind"
)
_LESS_MEMORY = "close other programs, take another device with --device, or join a run with a smaller model"
_FASTER = "train on a faster device, use a faster line, or join a run with longer rounds or a smaller model"


def _speeds(fitted: Fitted, line: Line | None, limits: Limits) -> Speeds:
    """What is left of the measured speeds under the owner's limits. A line that was not measured costs nothing."""
    caps = [cap * BYTES_PER_MBIT if cap else float("inf") for cap in (limits.up_mbit, limits.down_mbit)]
    up, down, trip_s = float("inf"), float("inf"), 0.0
    if line is not None:
        up, down, trip_s = line.up_bytes_per_s, line.down_bytes_per_s, line.round_trip_s
    return Speeds(fitted.step_s / limits.share, min(up, caps[0]), min(down, caps[1]), trip_s)


def _checked(data: bytes, run: RunConfig) -> RoundRecord:
    record = RoundRecord.from_bytes(data)
    check_record(record, run)
    return record


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return f"{name}, {_counted(torch.get_num_threads(), 'thread')}"
    return platform.processor() or platform.machine()


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
