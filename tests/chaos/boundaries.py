"""Where a program may die: before and after every durable write and every message, seen from outside of it.

`DieAt` and `JumpingClock` go into the process of a program before it starts and replace what Python offers it: fsync,
rename and unlink, SQLite's COMMIT, the write of a gRPC message, the wall clock. `Paced` gives it a device of a known
speed. The programs know nothing of it.
"""

import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import peer.aggregator
from peer.core.inner import InnerOptimizer
from peer.net.service import Context, _Service

CLOSED = "after COMMIT records"  # the record of a round is durable
FOLDERS = ("packet", "update", "bundle", "states")


Boundary = tuple[str, int]  # what happens there, and which occurrence of it this is, from 1
NOWHERE: Boundary = ("", 0)


@dataclass(frozen=True)
class KeepEveryState:
    """Every round keeps its state, not only every tenth, so each round has all kinds of writes."""

    def install(self) -> None:
        vars(peer.aggregator)["SNAPSHOT_ROUNDS"] = 1


@dataclass(frozen=True)
class DieAt:
    """Die as by kill -9 at this boundary, once it is noted in `trace`; the boundaries passed before are there too.

    Counting goes from the start of the process to its first record, or with `whole_round` from the first record to the
    second. A process that comes to the end of it leaves with status 0.
    """

    boundary: Boundary
    whole_round: bool
    trace: Path

    def install(self) -> None:
        KeepEveryState().install()
        self.trace.write_bytes(b"")
        reach = _Counter(self).reach
        _watch_files(reach)
        _watch_journal(reach)
        _watch_messages(reach)

    def passed(self) -> list[Boundary]:
        """All boundaries that the process reached, the one where it died last."""
        seen = Counter[str]()
        found = []
        for name in self.trace.read_text().splitlines():
            seen[name] += 1
            found.append((name, seen[name]))
        return found


class _Counter:
    def __init__(self, at: DieAt) -> None:
        self._at = at
        self._lock = threading.Lock()  # boundaries are reached in several threads
        self._seen = Counter[str]()
        self._records = 0

    def reach(self, name: str) -> None:
        with self._lock:
            self._records += name == CLOSED
            if self._records < self._at.whole_round:
                return
            if self._records > self._at.whole_round:
                os._exit(0)
            self._seen[name] += 1
            with self._at.trace.open("a") as file:
                file.write(name + "\n")
            if (name, self._seen[name]) == self._at.boundary:
                os.kill(os.getpid(), signal.SIGKILL)


def _place(path: str | os.PathLike[str]) -> str:
    parts = Path(path).parts
    return next((folder for folder in FOLDERS if folder in parts), parts[-1])


def _watch_files(reach: Callable[[str], None]) -> None:
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def watched_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        name = f"fsync {_place(path)}{' folder' if path.is_dir() else ''}"
        reach(f"before {name}")
        fsync(descriptor)
        reach(f"after {name}")

    def watched_replace(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        reach(f"before rename {_place(target)}")
        replace(source, target)
        reach(f"after rename {_place(target)}")

    def watched_unlink(path: str | os.PathLike[str]) -> None:
        # Of all that is deleted, only what is kept by its digest matters after a crash.
        if _place(path) not in FOLDERS:
            unlink(path)
            return
        reach(f"before unlink {_place(path)}")
        unlink(path)
        reach(f"after unlink {_place(path)}")

    os.fsync = watched_fsync  # type: ignore[assignment]  # nobody here has anything else than a number
    os.replace, os.unlink = watched_replace, watched_unlink  # type: ignore[assignment]  # nor folders by number


def _watch_journal(reach: Callable[[str], None]) -> None:
    connect = sqlite3.connect

    class Watched(sqlite3.Connection):
        table = "nothing"

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            words = sql.split()
            if words[0] == "INSERT":
                self.table = words[words.index("INTO") + 1]
            if words[0] != "COMMIT":
                return super().execute(sql, *values)
            reach(f"before COMMIT {self.table}")
            done = super().execute(sql)
            reach(f"after COMMIT {self.table}")
            self.table = "nothing"
            return done

    def watched_connect(path: Path, timeout: float, isolation_level: None, check_same_thread: bool) -> Watched:
        return connect(
            path, timeout, isolation_level=isolation_level, check_same_thread=check_same_thread, factory=Watched
        )

    sqlite3.connect = watched_connect  # type: ignore[assignment]  # takes what the journal gives


def _watch_messages(reach: Callable[[str], None]) -> None:
    write = _Service._write

    async def watched_write(service: _Service, context: Context, message: Any) -> None:
        name = f"send {message.DESCRIPTOR.name} {' '.join(field.name for field, _ in message.ListFields())}"
        if name.endswith("heartbeat"):
            await write(service, context, message)
            return
        reach(f"before {name}")
        await write(service, context, message)
        reach(f"after {name}")

    _Service._write = watched_write  # type: ignore[method-assign,assignment]  # a shim for it


@dataclass(frozen=True)
class JumpingClock:
    """The wall clock jumps by each of these in turn, after every so many seconds."""

    jumps_s: tuple[float, ...]
    every_s: float

    def install(self) -> None:
        began_s, now_ns = time.monotonic(), time.time_ns

        def jumping_ns() -> int:
            turn = int((time.monotonic() - began_s) / self.every_s)
            return now_ns() + round(1e9 * self.jumps_s[turn % len(self.jumps_s)])

        time.time_ns = jumping_ns
        time.time = lambda: jumping_ns() / 1e9


@dataclass(frozen=True)
class Paced:
    """An inner step takes so many seconds, as on a device that is slower than this one, however busy this one is."""

    step_s: float

    def install(self) -> None:
        due_s = 0.0

        def paced(work: Callable[[], float]) -> float:
            nonlocal due_s
            now_s = time.monotonic()
            # What a busy machine delays by less than a step is caught up with.
            due_s = self.step_s + (due_s if 0 <= now_s - due_s < self.step_s else now_s)
            loss = work()
            time.sleep(max(0.0, due_s - time.monotonic()))
            return loss

        around_inner_steps(paced)


def around_inner_steps(do: Callable[[Callable[[], float]], float]) -> None:
    """From now on let `do` do each inner step of this process, and return its loss."""
    step = InnerOptimizer.step

    def done(inner: InnerOptimizer, tokens: Tensor, number: int, micro_batch: int) -> float:
        return do(lambda: step(inner, tokens, number, micro_batch))

    InnerOptimizer.step = done  # type: ignore[method-assign,assignment]  # a shim for it
