"""Start the programs of a swarm as real processes through the command line, and read their events."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

SETTINGS = """
name = "small"
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
max_position_embeddings = 64
[data]
sequence_length = 64
[inner]
steps = {steps}
batch_size = 4
[compression]
k = 64
[outer]
rounds = {rounds}
[rounds]
start_peers = 2
grace_s_min = 0.5
grace_s_max = {grace_s}
deadline_s = 30.0
"""
Event = dict[str, Any]


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to whoever connects meanwhile."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def run_cli(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peer.cli", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def make_run(folder: Path, *, rounds: int = 12, steps: int = 5, grace_s: float = 3.0) -> Path:
    """A run folder with its own free ports."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "RUN.toml"
    settings.write_text(SETTINGS.format(rounds=rounds, steps=steps, grace_s=grace_s))
    ports = ("--port", str(free_port()), "--bootstrap-port", str(free_port()))
    made = run_cli("run", "new", str(settings), "--out", str(folder / "run"), *ports)
    assert made.returncode == 0, made.stderr
    return folder / "run"


class Program:
    """One process; a thread collects its events."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self.events: list[Event] = []
        self._came = threading.Condition()
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peer.cli", *arguments, "--json"],
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self._came:
                    self.events.append(json.loads(line))
                    self._came.notify_all()
        with self._came:
            self._came.notify_all()

    def all(self, name: str) -> list[Event]:
        return [event for event in list(self.events) if event["event"] == name]

    def wait_for(self, holds: Callable[[Event], bool], seconds: float = 30) -> Event:
        """Wait for an event, past or to come."""
        end_s = time.monotonic() + seconds
        seen = 0
        with self._came:
            while True:
                for event in self.events[seen:]:
                    if holds(event):
                        return event
                seen = len(self.events)
                left_s = end_s - time.monotonic()
                assert left_s > 0, f"{self.log.name}: waited in vain; it says\n{self.log.read_text()[-3000:]}"
                assert self._reader.is_alive(), f"{self.log.name} has died:\n{self.log.read_text()[-3000:]}"
                self._came.wait(min(left_s, 0.5))

    def wait_event(self, name: str, seconds: float = 30, **fields: Any) -> Event:
        wanted = {"event": name, **fields}
        return self.wait_for(lambda event: wanted.items() <= event.items(), seconds)

    def wait_end(self, seconds: float) -> int:
        status = self.process.wait(seconds)
        self._reader.join(5)
        return status

    def kill(self) -> None:
        """What kill -9 does, to the process alone."""
        self.process.kill()
        self.process.wait()
        self._reader.join(5)

    def clean_up(self) -> None:
        """End whatever a failed test has left of this process and its children."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


class Swarm:
    """The processes of one run folder."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.folder, self.run = folder, run
        self.programs: list[Program] = []

    def __enter__(self) -> "Swarm":
        return self

    def __exit__(self, *_: object) -> None:
        for program in self.programs:
            program.clean_up()

    def start(self, log: str, *arguments: str) -> Program:
        program = Program(self.folder / f"{log}.log", *arguments)
        self.programs.append(program)
        return program

    def aggregator(self) -> Program:
        program = self.start("aggregator", "aggregate", str(self.run))
        program.wait_event("aggregator ready")
        return program

    def bootstrap(self) -> Program:
        program = self.start("bootstrap", "bootstrap", str(self.run))
        program.wait_event("bootstrap ready")
        return program

    def peer(self, name: str) -> Program:
        home = str(self.folder / name)
        # The micro-batch is given, for one found by trying may differ from life to life, and with it the last bits.
        taste = ("--threads", "1", "--dtype", "float32", "--device", "cpu", "--micro-batch", "4")
        return self.start(name, "join", str(self.run / "invite.txt"), "--home", home, *taste)
