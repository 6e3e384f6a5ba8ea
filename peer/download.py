"""Outer parameters from several sources at once: piece by piece, each checked, resumable at any byte (SPEC 11).

A late joiner and a replica that heals use it alike. Whatever arrives goes to the disk at once, so that a cut
connection, a lost source or a killed process costs next to nothing; memory holds one piece for each fetch under way.
Sources take the next piece when they have delivered one, so slow ones get fewer; one that lies is never asked again.
"""

import asyncio
import math
import shutil
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from peer.errors import os_errors
from peer.find import Place
from peer.merge import sections_of_update
from peer.net.errors import LinkError, LinkFailure
from peer.net.link import Link
from peer.partial import HASH_BYTES, PartialState
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST
from protocol.layout import state_root
from protocol.ledger import Kind, RoundRecord
from protocol.limits import RECORD_BYTES_MAX
from protocol.run import RunConfig
from protocol.wire import update_wire_bytes_max

log = structlog.get_logger()

SNAPSHOT_ROUNDS = 10  # who serves states keeps those of every so many rounds: a joiner replays at most so many updates
SNAPSHOTS_TRIED = 3
SMALL_STATE_BYTES = 64 << 20
FOR_GOOD = math.inf


@dataclass(frozen=True)
class Rules:
    """How patient a download is, and how much it does at once."""

    sources_max: int = 8
    lanes: int = 2
    """Fetches under way at one source, so that its line is not idle between two pieces."""
    stall_s: float = 20.0
    """A fetch that moves nothing for so long is given to another source."""
    failures_max: int = 3
    """So many failures of a source without a byte in between, and it is left alone for `rest_s`."""
    rest_s: float = 30.0
    backoff_s: float = 0.2
    patience_s: float = 60.0
    """After so long without a byte from anybody the download gives up; what is on the disk stays."""
    steal_s: float = 1.0
    """An idle lane takes a piece over that it would have so much sooner, and in half the time."""
    report_s: float = 5.0
    tick_s: float = 0.2


_RULES = Rules()


Places = Callable[[], Awaitable[list[Place]]]
Open = Callable[[Place], Awaitable[Link]]
# What a source may answer when it is busy or was started again; it is asked again a little later.
_PASSING = frozenset({Code.BUSY, Code.BAD_SESSION})


@dataclass
class _Source:
    """One place that offers the state. It is not asked before `rests_until_s`."""

    place: Place
    lanes: set["asyncio.Task[None]"] = field(default_factory=set)
    failures: int = 0
    suspicions: int = 0
    rests_until_s: float = 0.0
    lacks_it: bool = False
    bytes: int = 0
    busy_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """How fast one of its lanes is."""
        return self.bytes / self.busy_s if self.busy_s else 0.0


@dataclass
class _Flight:
    """A piece that is being fetched. Cancelling `task` takes it away from its source."""

    source: _Source
    task: "asyncio.Task[bytes]"
    begun_s: float
    moved_s: float
    left: int
    moved: int = 0
    taken: bool = False

    def left_s(self, now_s: float) -> float:
        """How long it will take at the speed so far."""
        return self.left * (now_s - self.begun_s) / self.moved if self.moved else math.inf


class Download:
    """One state on its way here. `run` ends when the last piece is there."""

    def __init__(
        self,
        state: PartialState,
        places: Places,
        open_link: Open,
        *,
        rules: Rules = _RULES,
        held: NDArray[np.float32] | None = None,  # f32[N]
    ) -> None:
        """`places` names the sources, again and again while the download runs; `open_link` makes a link of our own.

        `held` are other parameters, whose pieces are taken where they are the same.
        """
        self.state = state
        self._held = held
        self.received_bytes = 0
        self._places, self._open, self._rules = places, open_link, rules
        self._sources: dict[Place, _Source] = {}
        self._flights: dict[int, _Flight] = {}
        # Who sent the beginning of a piece. One from before a restart is nobody's.
        self._authors: dict[int, set[Place | None]] = {index: {None} for index in state.begun}
        self._queue = deque(sorted(state.missing, key=lambda index: (index not in state.begun, index)))
        self._adopting = asyncio.Lock()
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._began_s = self._moved_s = time.monotonic()

    async def run(self) -> None:
        """Fetch what is missing.

        Raises ProtocolError NOT_FOUND when no source has this state, LinkError when no source is of use for long, and
        UserError when the disk fails.
        """
        if not self.state.missing:
            return
        tasks = {asyncio.create_task(self._guarded(self._recruit())), asyncio.create_task(self._guarded(self._watch()))}
        try:
            await self._over
        finally:
            tasks.update(lane for source in self._sources.values() for lane in source.lanes)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._report()
            by_source = {source.place.address: source.bytes for source in self._sources.values()}
            log.info("sources", bytes_from=by_source)

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        """Whatever fails in a part of the download ends the whole of it."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 -- `run` raises it again
            self._end(error)

    def _end(self, error: Exception | None = None) -> None:
        if self._over.done():
            return
        if error is None:
            self._over.set_result(None)
        else:
            self._over.set_exception(error)

    # Sources

    async def _recruit(self) -> None:
        """Look for sources, for as long as the download takes."""
        while True:
            for place in await self._places():
                self._enlist(self._sources.setdefault(place, _Source(place)))
            await asyncio.sleep(self._rules.rest_s if self._working() else self._rules.tick_s)

    def _working(self) -> int:
        return sum(bool(source.lanes) for source in self._sources.values())

    def _enlist(self, source: _Source) -> None:
        if source.lanes or self._rests(source) or self._working() >= self._rules.sources_max:
            return
        source.lacks_it = False
        for _ in range(self._rules.lanes):
            lane = asyncio.create_task(self._guarded(self._lane(source)))
            source.lanes.add(lane)
            lane.add_done_callback(source.lanes.discard)

    def _rests(self, source: _Source) -> bool:
        return time.monotonic() < source.rests_until_s

    def _rest(self, source: _Source, seconds: float, why: str) -> None:
        """Leave a source alone, with the pieces that it was about to send."""
        if not self._rests(source):
            log.warning("source dropped", address=source.place.address, for_good=seconds == FOR_GOOD, why=why)
        source.rests_until_s = max(source.rests_until_s, time.monotonic() + seconds)
        source.failures = 0
        for flight in self._flights.values():
            if flight.source is source:
                flight.task.cancel()

    def _failed(self, source: _Source, why: str) -> None:
        source.failures += 1
        if source.failures > self._rules.failures_max:
            self._rest(source, self._rules.rest_s, why)

    async def _watch(self) -> None:
        """Take pieces from sources that stall, say how it goes, and notice when there is nobody left to ask."""
        reported_s = time.monotonic()
        while True:
            await asyncio.sleep(self._rules.tick_s)
            now_s = time.monotonic()
            for flight in self._flights.values():
                if now_s - flight.moved_s > self._rules.stall_s:
                    flight.task.cancel()
            if now_s - reported_s >= self._rules.report_s:
                reported_s = now_s
                self._report()
            self._demand_a_source(now_s - self._moved_s)

    def _demand_a_source(self, idle_s: float) -> None:
        sources = self._sources.values()
        if any(source.lacks_it for source in sources) and all(
            source.lacks_it or source.rests_until_s == FOR_GOOD for source in sources
        ):
            raise ProtocolError(Code.NOT_FOUND, f"nobody has the state {self.state.root.hex()[:16]} any more")
        if idle_s > self._rules.patience_s:
            reason = f"none of {len(sources)} sources of the parameters is of use"
            raise LinkError(LinkFailure.UNREACHABLE, reason, retryable=True)

    def _report(self) -> None:
        state, seconds = self.state, time.monotonic() - self._began_s
        rate = self.received_bytes / seconds if seconds else 0.0
        left = state.size - state.held_bytes
        log.info(
            "downloading",
            bytes=state.held_bytes,
            of=state.size,
            received=self.received_bytes,
            bytes_per_s=round(rate),
            eta_s=round(left / rate) if rate else None,
            sources=self._working(),
        )

    # Pieces

    async def _lane(self, source: _Source) -> None:
        """Fetch piece after piece from one source, over one link after another."""
        while not self._rests(source) and not self._over.done():
            try:
                async with await self._open(source.place) as link:
                    await self._list(link)
                    while (index := await self._next(source)) is not None:
                        await self._fetch(link, source, index)
            except LinkError as error:
                if error.retryable:
                    self._failed(source, error.reason)
                else:
                    self._rest(source, FOR_GOOD, error.reason)
            except ProtocolError as error:
                source.lacks_it = error.code == Code.NOT_FOUND
                if error.code in _PASSING:
                    self._failed(source, str(error))
                else:
                    self._rest(source, self._rules.rest_s if source.lacks_it else FOR_GOOD, str(error))
            if source.failures:
                await asyncio.sleep(self._rules.backoff_s * source.failures)

    async def _list(self, link: Link) -> None:
        """Get the hashes of the pieces, and look which are here. Raises ProtocolError BAD_STATE when they lie."""
        state = self.state
        if not state.hashes:
            # Every lane asks, for they are small, and a silent source must not keep the others waiting.
            state.set_hashes(await link.fetch("state", state.root, size_max=HASH_BYTES * state.count))
        async with self._adopting:
            held, self._held = self._held, None
            if held is not None:
                await asyncio.to_thread(state.adopt, held)
                if not state.missing:
                    self._end()

    async def _next(self, source: _Source) -> int | None:
        """The next piece that this source is to send; None when it rests or all is done."""
        while not self._rests(source) and not self._over.done():
            if self._queue:
                index = self._queue.popleft()
                if index in self.state.missing:
                    return index
                continue
            slow = self._slowest(source)
            if slow is not None and await self._take_over(slow):
                return slow
            await asyncio.sleep(self._rules.tick_s)
        return None

    async def _take_over(self, index: int) -> bool:
        """Take a piece from its source; False when it came after all."""
        flight = self._flights[index]
        flight.taken = True
        flight.task.cancel()
        # Its lane has let go of it as soon as it has seen the cancellation.
        while self._flights.get(index) is flight:  # noqa: ASYNC110  it takes a turn or two of the loop
            await asyncio.sleep(0)
        return index in self.state.missing

    def _slowest(self, source: _Source) -> int | None:
        """A piece on its way that this source would have much sooner, if there is one."""
        now_s, rate = time.monotonic(), source.bytes_per_s
        if not rate:
            return None
        gains = [
            (flight.left_s(now_s), index)
            for index, flight in self._flights.items()
            if not flight.taken and now_s - flight.begun_s > self._rules.steal_s
        ]
        left_s, index = max(gains, default=(0.0, 0))
        ours_s = self._flights[index].left / rate if gains else 0.0
        return index if left_s > 2 * ours_s + self._rules.steal_s else None

    async def _fetch(self, link: Link, source: _Source, index: int) -> None:
        """Fetch one piece, or what is missing of it."""
        state, now_s = self.state, time.monotonic()
        beginning, authors = state.beginning(index), self._authors.setdefault(index, set())

        def keep(frame: bytes) -> None:
            with os_errors(state.folder):
                file.write(frame)
            authors.add(source.place)
            flight.moved_s = self._moved_s = time.monotonic()
            flight.moved += len(frame)
            flight.left -= len(frame)
            self.received_bytes += len(frame)
            source.bytes += len(frame)
            source.failures = 0

        with state.append_to(index) as file:
            piece_hash, length = state.hashes[index], state.length(index)
            fetch = link.fetch("piece", piece_hash, size_max=length, resume=beginning, sink=keep)
            flight = _Flight(source, asyncio.create_task(fetch), now_s, now_s, length - len(beginning))
            self._flights[index] = flight
            try:
                await self._land(flight, index)
            finally:
                flight.task.cancel()
                source.busy_s += time.monotonic() - now_s
                del self._flights[index]
                if index in state.missing and not flight.taken:
                    self._queue.appendleft(index)

    async def _land(self, flight: _Flight, index: int) -> None:
        """Wait for a piece, or until it is taken away, and keep it."""
        await asyncio.wait({flight.task})
        if flight.task.cancelled():
            if not flight.taken and not self._rests(flight.source):
                address, stall_s = flight.source.place.address, self._rules.stall_s
                raise LinkError(LinkFailure.TIMEOUT, f"{address} sent nothing for {stall_s:g} s", retryable=True)
            return
        piece = flight.task.result()
        good = await asyncio.to_thread(self.state.finish, index, piece)
        authors = self._authors.pop(index) | {flight.source.place}
        if not good:
            self._suspect(authors, index)
        elif not self.state.missing:
            self._end()

    def _suspect(self, authors: set[Place | None], index: int) -> None:
        """A piece is wrong. Who sent all of it lied; of several authors each is given one more chance."""
        for place in authors:
            source = self._sources.get(place) if place is not None else None
            if source is not None:
                source.suspicions += 1
                if len(authors) == 1 or source.suspicions > 1:
                    self._rest(source, FOR_GOOD, f"piece {index} that it sent is not what its hash says")


Fetch = Callable[[str, bytes, int], Awaitable[bytes]]
Flat = NDArray[np.float32]  # f32[N]
Sections = Sequence[bytes]


class StateLoader:
    """Brings a replica to the parameters that a record names, by a state that others still hold and the updates since.

    A large state is fetched as of a round whose state sources keep for long, since the newest one would be gone before
    it is here; a small one is fetched as of the record itself.
    """

    def __init__(
        self, run: RunConfig, folder: Path, fetch: Fetch, places: Places, open_link: Open, *, rules: Rules = _RULES
    ) -> None:
        """`folder` is for what is under way; `fetch` gets a record or an update of at most so many bytes."""
        self._run, self._folder, self._rules = run, folder, rules
        self._fetch, self._places, self._open = fetch, places, open_link

    async def load(
        self, record: RoundRecord, held: Flat, adopt: Callable[[Flat], bytes], apply: Callable[[Sections], bytes]
    ) -> bytes:
        """Hand the parameters of a record over, by `adopt` and then `apply`; both return the state root reached.

        `held` are parameters that are here already: pieces that they share are not fetched. Returns the record's root.
        Raises LinkError, ProtocolError (NOT_FOUND when nobody has such a state) and UserError.
        """
        chain = [record]
        known: Flat | None = held
        held_root = await asyncio.to_thread(state_root, held)
        failure: ProtocolError | None = None
        for asked in await self._starts(chain):
            back = asked
            try:
                await self._extend(chain, asked)
                back = _since_rollback(chain, asked)
                base = chain[back]
                flat = (
                    known if known is not None and base.state_root == held_root else await self._download(base, known)
                )
                known = None  # it may share the memory that `adopt` overwrites
                _demand_root(base, await asyncio.to_thread(adopt, flat))
                began_s = time.monotonic()
                for done, item in enumerate(reversed(chain[:back]), start=1):
                    _demand_root(item, await asyncio.to_thread(apply, await self._sections(item)))
                    eta_s = (time.monotonic() - began_s) / done * (back - done)
                    log.info("replaying", round=item.round, of=record.round, eta_s=round(eta_s, 1))
            except ProtocolError as error:
                if error.code != Code.NOT_FOUND:
                    raise
                log.info("no longer there", round=record.round - back, why=error.detail)
                failure = error
            else:
                log.info("state loaded", round=record.round, replayed=back, state_root=record.state_root.hex())
                return record.state_root
        assert failure is not None, "there is at least one state to start from"
        raise failure

    def forget(self) -> None:
        """Delete what is kept of a state that has been loaded and is stored elsewhere by now."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _starts(self, chain: list[RoundRecord]) -> list[int]:
        """How many rounds before the record to start from, best first."""
        head = chain[0].round
        snapshot = head - head % SNAPSHOT_ROUNDS
        rounds = list(range(snapshot, -1, -SNAPSHOT_ROUNDS))[:SNAPSHOTS_TRIED]
        large = 4 * self._run.layout.size > SMALL_STATE_BYTES
        rounds = [*rounds, head] if large else [head, *rounds]
        begun = {bytes.fromhex(path.name) for path in self._folder.glob("*") if len(path.name) == 2 * HASH_BYTES}
        if begun:
            # What is half here already goes first, as long as anybody has the rest.
            with suppress(ProtocolError):
                await self._extend(chain, head - min(rounds))
            rounds.sort(key=lambda round: not any(item.round == round and item.state_root in begun for item in chain))
        return [head - round for round in dict.fromkeys(rounds)]

    async def _extend(self, chain: list[RoundRecord], back: int) -> None:
        """Follow the chain down to so many rounds before its first record; each record names the one before."""
        while len(chain) <= back:
            digest = chain[-1].previous
            record = RoundRecord.from_bytes(await self._fetch("record", digest, RECORD_BYTES_MAX))
            if record.digest != digest:
                raise ProtocolError(Code.WRONG_DIGEST, "the record is another than the one asked for")
            chain.append(record)

    async def _download(self, base: RoundRecord, held: Flat | None) -> Flat:
        size = 4 * self._run.layout.size
        partial = await asyncio.to_thread(PartialState, self._folder, base.state_root, size)
        log.info("fetching the parameters", round=base.round, bytes=partial.held_bytes, of=size)
        await Download(partial, self._places, self._open, rules=self._rules, held=held).run()
        return partial.flat()

    async def _sections(self, record: RoundRecord) -> Sections:
        if record.update_digest == NO_DIGEST:
            return ()
        data = await self._fetch("update", record.update_digest, update_wire_bytes_max(self._run))
        return await asyncio.to_thread(sections_of_update, data, record, self._run)


def _demand_root(record: RoundRecord, root: bytes) -> None:
    if root != record.state_root:
        raise ProtocolError(Code.BAD_STATE, f"the parameters of round {record.round} are not those of its record")


def _since_rollback(chain: Sequence[RoundRecord], back: int) -> int:
    """So many rounds before the newest record of a chain, but not before a rollback: no update leads over one."""
    taken_back = (index for index, record in enumerate(chain[:back]) if record.kind == Kind.ROLLBACK)
    return next(taken_back, back)
