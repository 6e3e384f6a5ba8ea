"""Who is joined: sessions, and the bounds on what strangers can make an aggregator hold."""

import asyncio
import ipaddress
import os
from collections import Counter, deque
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

from peer.net.messages import SESSION_BYTES
from protocol.errors import Code, ProtocolError
from protocol.standby import HEARTBEAT_S

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceLimits:
    """What one aggregator holds at most, and how long it waits. Sizes are bytes."""

    sessions_max: int = 2048
    sessions_per_source_max: int = 128
    """A source is an IPv4 address or an IPv6 /64 network. Peers behind one NAT share it."""
    joins_max: int = 128
    joins_per_source_max: int = 32
    join_step_s: float = 10.0
    session_idle_s: float = 120.0
    """A session without a running call for this long makes room for others."""
    fetches_per_session_max: int = 4
    submits_max: int = 32
    """Packets received at once; later ones wait their turn up to `submit_turn_s`."""
    submit_turn_s: float = 60.0
    submit_memory_bytes_max: int = 1 << 20
    """Larger packets are received into a file."""
    amends_per_minute_max: int = 60
    """Each makes us check a signature, so nobody may ask for many."""
    probes_max: int = 4
    """Probes at once, since each takes as much of our line as it gets."""
    probes_per_minute_max: int = 20
    """Of all peers together. With the next limit it bounds what strangers can make us send for nothing."""
    probes_per_session_minute_max: int = 4
    probe_bytes_max: int = 8 << 20
    """Of one probe in each direction."""
    probe_s_max: float = 30.0
    frame_gap_s: float = 30.0
    """The longest wait for the next frame of a submit, and for a slow reader to take one of a fetch."""
    bytes_per_s_min: int = 8 << 10
    """A submit slower than this in all is given up."""
    heartbeat_s: float = HEARTBEAT_S
    keepalive_s: float = 5.0
    keepalive_timeout_s: float = 10.0


class SessionEndedError(Exception):
    """The session ended while a call of it was running."""


class PerMinute:
    """Counts what happens, and refuses what comes too often."""

    def __init__(self, most: int, what: str) -> None:
        self._most, self._what = most, what
        self._recent_s: deque[float] = deque()

    def demand(self) -> None:
        """Count one more. Raises ProtocolError BUSY when the last minute had as many as it may."""
        now_s, recent = asyncio.get_running_loop().time(), self._recent_s
        while recent and now_s - recent[0] > 60:
            recent.popleft()
        if len(recent) >= self._most:
            raise ProtocolError(Code.BUSY, f"at most {self._most} {self._what}")
        recent.append(now_s)


class Session:
    """One joined peer on one connection. Its running calls end with it."""

    def __init__(self, peer: bytes, source: str, now: float, limits: ServiceLimits) -> None:
        self.token = os.urandom(SESSION_BYTES)
        self.peer = peer
        self.source = source
        self.calls = 0
        self.fetches = 0
        self.amends = PerMinute(limits.amends_per_minute_max, "amendments a minute are looked at")
        self.probes = PerMinute(limits.probes_per_session_minute_max, "probes of a peer a minute are served")
        self.last_used_s = now
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watch: asyncio.Future[None] | None = None

    def end(self, reason: str) -> None:
        """End the running calls of the session with this reason."""
        if not self._ended.done():
            self._ended.set_result(reason)

    def take_watch(self) -> asyncio.Future[None]:
        """Make the caller the session's one watch; an older one sees its future done."""
        if self._watch is not None and not self._watch.done():
            self._watch.set_result(None)
        self._watch = asyncio.get_running_loop().create_future()
        return self._watch

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run one call of this session. Raises SessionEndedError with the reason when the session ends first."""
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(work)
        self.calls += 1
        try:
            await first_of(task, self._ended)
            if task.done():
                return task.result()
            raise SessionEndedError(self._ended.result())
        finally:
            task.cancel()  # does nothing when it is done
            await asyncio.gather(task, return_exceptions=True)
            self.calls -= 1
            self.last_used_s = loop.time()


class Sessions:
    """All sessions and half-open joins, within their bounds."""

    def __init__(self, limits: ServiceLimits) -> None:
        self._limits = limits
        self._by_token: dict[bytes, Session] = {}
        self._by_peer: dict[bytes, Session] = {}
        self._joining: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_token)

    @contextmanager
    def half_open(self, source: str) -> Iterator[None]:
        """Hold one place among the joins that have not proved anything yet. Raises ProtocolError BUSY."""
        if self._joining.total() >= self._limits.joins_max:
            raise ProtocolError(Code.BUSY, "too many peers are joining at this moment")
        if self._joining[source] >= self._limits.joins_per_source_max:
            raise ProtocolError(Code.BUSY, "too many peers are joining from this network at this moment")
        self._joining[source] += 1
        try:
            yield
        finally:
            self._joining[source] -= 1
            if not self._joining[source]:
                del self._joining[source]

    def admit(self, peer: bytes, source: str) -> Session:
        """Open a session for a peer that has proved its key; its older session ends. Raises ProtocolError BUSY."""
        older = self._by_peer.get(peer)
        if older is not None:
            self._remove(older, "you joined again with the same key; this older session is over")
        now = asyncio.get_running_loop().time()
        for session in list(self._by_token.values()):
            if not session.calls and now - session.last_used_s > self._limits.session_idle_s:
                self._remove(session, "the session was idle for too long")
        if len(self._by_token) >= self._limits.sessions_max:
            raise ProtocolError(Code.BUSY, "the aggregator has as many peers as it can serve")
        here = sum(session.source == source for session in self._by_token.values())
        if here >= self._limits.sessions_per_source_max:
            raise ProtocolError(Code.BUSY, "too many peers of this network are joined already")
        session = Session(peer, source, now, self._limits)
        self._by_token[session.token] = session
        self._by_peer[peer] = session
        return session

    def find(self, token: bytes) -> Session:
        """The session with this token. Raises ProtocolError BAD_SESSION."""
        session = self._by_token.get(token)
        if session is None:
            raise ProtocolError(Code.BAD_SESSION, "no such session: join again")
        return session

    def end_all(self, reason: str) -> None:
        """End every session, because the service stops."""
        for session in list(self._by_token.values()):
            self._remove(session, reason)

    def _remove(self, session: Session, reason: str) -> None:
        del self._by_token[session.token]
        if self._by_peer.get(session.peer) is session:
            del self._by_peer[session.peer]
        session.end(reason)


async def first_of(*waiting: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Wait until one of these is done, or the time is over."""
    await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


def source_of(grpc_peer: str) -> str:
    """The network that a connection comes from, out of gRPC's "ipv4:1.2.3.4:567" or "ipv6:%5B::1%5D:567"."""
    family, _, rest = unquote(grpc_peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return family
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))
