"""The one ruler for both sides: inner steps by pace and clock, bytes by link, processor time by namespace."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.swarm.links import Network, enter, processes
from tests.chaos.boundaries import around_inner_steps

EVERY_S = 1.0
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Step:
    """One inner step: when it began on the machine's monotonic clock, how long it took, and its processor time."""

    began_s: float
    seconds: float
    cpu_s: float


class Pacer:
    """Does inner steps that take at least `step_s`, and writes down each in a file that any process can read later.

    A step is never shorter, even after a wait: what the network delays is not made good by faster steps.
    """

    def __init__(self, path: Path, step_s: float) -> None:
        self._path, self._step_s = path, step_s

    def step(
        self, work: Callable[[], float], elsewhere: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)
    ) -> float:
        """Do the work and return its loss. `elsewhere`: seconds and processor time of the step that are not in it."""
        began_s, cpu_s = time.monotonic(), time.thread_time()
        loss = work()
        cpu_s = time.thread_time() - cpu_s
        more_s, more_cpu_s = elsewhere()
        time.sleep(max(0.0, began_s + self._step_s - more_s - time.monotonic()))
        seconds = time.monotonic() - began_s + more_s
        with self._path.open("a") as file:
            file.write(f"{began_s} {seconds} {cpu_s + more_cpu_s}\n")
        return loss


def monotonic_of(wall_ms: int) -> float:
    """A moment of the wall clock on the machine's monotonic clock, in seconds."""
    return wall_ms / 1000 - time.time() + time.monotonic()


def steps_of(path: Path) -> list[Step]:
    """What a Pacer wrote."""
    return [Step(*map(float, line.split())) for line in path.read_text().splitlines()]


def _settle_in(namespace: str) -> None:
    enter(namespace)
    # Linux shares processor time among sessions: with one for all our programs each would have less of a busy machine
    # than the peers of the other systems, which are sessions of their own.
    os.setsid()


@dataclass(frozen=True)
class Machine:
    """A program of ours that runs in a namespace."""

    namespace: str

    def install(self) -> None:
        """Enter it, before the program starts any thread."""
        _settle_in(self.namespace)


@dataclass(frozen=True)
class PacedMachine:
    """The same with inner steps by a Pacer."""

    namespace: str
    path: Path
    step_s: float

    def install(self) -> None:
        """Enter it and put the Pacer around the inner optimizer's step."""
        _settle_in(self.namespace)
        around_inner_steps(Pacer(self.path, self.step_s).step)


@dataclass(frozen=True)
class Used:
    """What a machine has used up to some moment: bytes sent and received, and processor seconds."""

    up: float
    down: float
    cpu_s: float

    def __sub__(self, other: "Used") -> "Used":
        return Used(self.up - other.up, self.down - other.down, self.cpu_s - other.cpu_s)


class Sampler:
    """Reads every second what each machine has used so far."""

    def __init__(self, network: Network, names: Sequence[str]) -> None:
        self._network, self._names = network, names
        self._times: list[float] = []
        self._used: dict[str, list[Used]] = {name: [] for name in names}
        self._cpu_s: dict[str, dict[int, float]] = {name: {} for name in names}  # by process, the dead included
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)

    def _run(self) -> None:
        while True:
            self._sample()
            if self._ended.wait(EVERY_S):
                return

    def _sample(self) -> None:
        found = processes([self._network.namespace(name) for name in self._names])
        now_s = time.monotonic()
        for name in self._names:
            seen = self._cpu_s[name]
            for process in found[self._network.namespace(name)]:
                with suppress(OSError):
                    # The fields after the name, which may hold spaces: 11 and 12 are user and system time.
                    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                    seen[process] = (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND
            self._used[name].append(Used(*self._network.carried(name), sum(seen.values())))
        self._times.append(now_s)

    def at(self, name: str, moment_s: float) -> Used:
        """What it had used at this moment of the monotonic clock; between two samples in proportion."""
        times = list(self._times)
        used = self._used[name][: len(times)]
        columns = ([each.up for each in used], [each.down for each in used], [each.cpu_s for each in used])
        return Used(*(float(np.interp(moment_s, times, column)) for column in columns))


@dataclass(frozen=True)
class Peer:
    """What one peer did in the steady part of a run, from the second round's first step to the last round's first."""

    inner_share: float
    """Share of the wall clock in inner steps."""
    round_s: float
    up: float
    """Bytes sent a round."""
    down: float
    """Bytes received a round."""
    cpu_s: float
    """Processor seconds a round outside of inner steps."""
    step_s: float
    """Mean seconds of an inner step, the pace included."""
    step_cpu_s: float
    """Mean processor seconds of an inner step."""


def peer_of(sampler: Sampler, name: str, steps: Sequence[Step], per_round: int) -> Peer:
    """The figures of a peer that did `per_round` inner steps a round. It has done at least three rounds."""
    last = (len(steps) // per_round - 1) * per_round
    assert last > per_round, f"{name} did {len(steps)} inner steps: three rounds of {per_round} are the least"
    counted, rounds = steps[per_round:last], last / per_round - 1
    began_s, ended_s = steps[per_round].began_s, steps[last].began_s
    used = sampler.at(name, ended_s) - sampler.at(name, began_s)
    cpu_s = sum(step.cpu_s for step in counted)
    return Peer(
        sum(step.seconds for step in counted) / (ended_s - began_s),
        (ended_s - began_s) / rounds,
        used.up / rounds,
        used.down / rounds,
        (used.cpu_s - cpu_s) / rounds,
        sum(step.seconds for step in counted) / len(counted),
        cpu_s / len(counted),
    )
