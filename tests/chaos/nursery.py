"""The programs as real processes, forked from one that has loaded torch already, so that a restart takes a moment.

What runs in them is the command line. They die by kill -9, and what they held in memory is gone.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Protocol

import torch

import peer.client
import peer.standby  # noqa: F401  loaded once here instead of in every process
from peer.cli import main
from tests.peer.swarm import Event

POLL_S = 0.02
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.chaos.nursery", "tests.chaos.boundaries"])


class Spell(Protocol):
    """Something that changes the world of a process before its program starts."""

    def install(self) -> None: ...


def _live(log: Path, arguments: tuple[str, ...], spell: Spell | None) -> None:
    for descriptor, suffix in ((1, ".jsonl"), (2, ".log")):
        file = os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    torch.set_num_threads(1)
    if spell is not None:
        spell.install()
    sys.exit(main([*arguments, "--json"]))


class Child:
    """One process of a program. Its events are appended to `log`.jsonl, what it tells its user to `log`.log."""

    def __init__(self, log: Path, *arguments: str, spell: Spell | None = None) -> None:
        self.log, self.path = log, log.with_suffix(".jsonl")
        self._before = self.path.stat().st_size if self.path.exists() else 0
        self.process = _forks.Process(target=_live, args=(log, arguments, spell), daemon=True)
        self.process.start()

    def events(self) -> list[Event]:
        """What this process has said so far."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._before)
            return [json.loads(line) for line in file.read().split(b"\n")[:-1] if line]

    def all(self, name: str) -> list[Event]:
        return [event for event in self.events() if event["event"] == name]

    def wait_event(self, name: str, seconds: float, at_least: int = 0) -> Event:
        """Wait for an event, of a round that is at least this one."""
        end_s = time.monotonic() + seconds
        while True:
            found = next((event for event in self.all(name) if event.get("round", 0) >= at_least), None)
            if found is not None:
                return found
            assert time.monotonic() < end_s, f"{self.log.name}: no {name!r} in {seconds} s; it says\n{self.told()}"
            assert self.process.is_alive(), f"{self.log.name} has died:\n{self.told()}"
            time.sleep(5 * POLL_S)

    def told(self) -> str:
        path = self.log.with_suffix(".log")
        return path.read_text()[-3000:] if path.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_end(self, seconds: float) -> int:
        """The exit status, -9 after kill -9."""
        self.process.join(seconds)
        status = self.process.exitcode
        assert status is not None, f"{self.log.name} still lives after {seconds} s:\n{self.told()}"
        return status

    def kill(self) -> None:
        """What kill -9 does. Harmless when it is dead already."""
        self.process.kill()
        self.process.join(10)
