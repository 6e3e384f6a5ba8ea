"""A peer's one connection to the aggregator that leads: made, watched, and made anew whenever it breaks.

A machine that slept finds its old connection dead though nothing says so, thus a jump of the clock ends it at once.
"""

import asyncio
import time
from contextlib import aclosing
from typing import Protocol

import structlog

from peer.bootstrap import wait_for_stop
from peer.errors import UserCode, UserError
from peer.find import Finder
from peer.net.errors import LinkError, LinkFailure
from peer.net.link import Link
from peer.net.messages import RoundClosed, RoundEvent, RoundOpened
from peer.net.throttle import Traffic
from protocol.errors import ProtocolError
from protocol.identity import PrivateKey

log = structlog.get_logger()

FIRST_PATIENCE_S = 30.0  # how long the very first connection is tried before the user is told
BACKOFF_S_MIN = 1.0
BACKOFF_S_MAX = 30.0
TICK_S = 1.0
ASLEEP_S = 10.0  # a tick that comes so late means that the machine, or this program, stood still


class Listener(Protocol):
    """Who hears what the connection brings. Raises ProtocolError on bytes that break the rules: that ends the link."""

    async def connected(self, link: Link) -> None:
        """A link stands; the newest record of its aggregator is not checked."""

    async def heard(self, link: Link, event: RoundEvent) -> None:
        """A round opened or closed."""

    def lost(self, reason: str) -> None:
        """The link is gone."""


class Connection:
    """Keeps one link for a peer, for as long as `keep` runs."""

    def __init__(
        self,
        finder: Finder,
        key: PrivateKey,
        stop: asyncio.Event,
        traffic: Traffic,
        *,
        plaintext: bool = False,
        patience_s: float = FIRST_PATIENCE_S,
    ) -> None:
        self._finder, self._key, self._stop, self._traffic = finder, key, stop, traffic
        self._plaintext, self._patience_s = plaintext, patience_s
        self._link: Link | None = None
        self._changed = asyncio.Event()
        self._renew = ""  # why the link is to be made anew
        self._wait_s = BACKOFF_S_MIN
        self._observing = self._offline = False

    @property
    def link(self) -> Link:
        """The link that stands. Raises LinkError when there is none at the moment."""
        if self._link is None:
            raise LinkError(LinkFailure.CUT, "there is no connection at the moment", retryable=True)
        return self._link

    @property
    def stands(self) -> bool:
        """Whether there is a link."""
        return self._link is not None

    async def first(self) -> Link:
        """Connect, or say when patience runs out why that is impossible. Raises UserError and ProtocolError."""
        began_s, wait_s = time.monotonic(), BACKOFF_S_MIN
        while True:
            try:
                return await self._open()
            except LinkError as error:
                impatient = time.monotonic() - began_s + wait_s > self._patience_s
                if not error.retryable or impatient or self._stop.is_set():
                    raise as_user_error(error) from error
                log.warning("no aggregator yet", why=error.reason, retry_in_s=wait_s)
            await wait_for_stop(self._stop, wait_s)
            wait_s = min(2 * wait_s, BACKOFF_S_MAX)

    async def keep(self, link: Link, listener: Listener) -> None:
        """Hear what the link brings, and make a new one whenever it breaks, until `stop` is set."""
        watchman = asyncio.create_task(self._watch_the_clock())
        try:
            while not self._stop.is_set():
                self._link = link
                try:
                    reason = await self._follow(link, listener)
                except (LinkError, ProtocolError) as error:
                    reason = str(error)
                self._link = None
                listener.lost(reason)
                await link.close()
                log.warning("connection lost", why=reason)
                while not self._stop.is_set():
                    again = await self._again()
                    if again is not None:
                        link = again
                        break
        finally:
            watchman.cancel()

    async def close(self) -> None:
        """Close the link that stands, if there is one."""
        if self._link is not None:
            await self._link.close()

    def observe(self, observing: bool) -> None:
        """Look on without being awaited by the rounds, or take part again."""
        if observing != self._observing:
            self._observing = observing
            self._changed.set()

    def go_offline(self, offline: bool) -> None:
        """Have no connection at all, or have one again."""
        if offline != self._offline:
            self._offline = offline
            self._renew = "this peer goes offline" if offline else ""
            self._changed.set()

    def renew(self, why: str) -> None:
        """Make the link anew at once, whatever its state seems to be."""
        self._renew = why
        self._changed.set()

    async def _open(self) -> Link:
        """Join an aggregator, wherever the finder finds one. Raises LinkError or ProtocolError."""
        link = await self._finder.connect(self._key, plaintext=self._plaintext)
        link.traffic = self._traffic
        return link

    async def _follow(self, link: Link, listener: Listener) -> str:
        """Hear the link out; why it ended. Raises LinkError or ProtocolError."""
        await listener.connected(link)
        while not self._renew:
            self._changed.clear()
            hearing = asyncio.create_task(self._hear(link, listener, observing=self._observing))
            changed = asyncio.create_task(self._changed.wait())
            try:
                await asyncio.wait({hearing, changed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (hearing, changed):
                    task.cancel()
                await asyncio.gather(hearing, changed, return_exceptions=True)
            if not hearing.cancelled():
                hearing.result()
                return "the aggregator ended the connection"
        return self._renew

    async def _hear(self, link: Link, listener: Listener, *, observing: bool) -> None:
        async with aclosing(link.observe() if observing else link.watch()) as events:
            async for event in events:
                self._wait_s = BACKOFF_S_MIN
                if isinstance(event, RoundOpened | RoundClosed):
                    await listener.heard(link, event)

    async def _again(self) -> Link | None:
        """Try until there is a new link; None when it is time to leave, or to try at once from the beginning."""
        if self._renew:
            self._wait_s, self._renew = BACKOFF_S_MIN, ""
        while not self._stop.is_set() and not self._renew:
            await self._pause(self._wait_s)
            if self._offline or self._stop.is_set():
                continue
            self._wait_s = min(2 * self._wait_s, BACKOFF_S_MAX)
            try:
                link = await self._open()
            except (LinkError, ProtocolError) as error:
                log.warning("no aggregator", why=str(error), retry_in_s=self._wait_s)
                continue
            log.info("connected again", address=link.address)
            return link
        return None

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or less when something has changed or it is time to leave."""
        self._changed.clear()
        waits = [asyncio.create_task(event.wait()) for event in (self._changed, self._stop)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _watch_the_clock(self) -> None:
        """Renew the link when the machine has slept. Asleep, the clock of intervals stands still and the other not."""
        while True:
            before_s = time.time()
            await asyncio.sleep(TICK_S)
            if time.time() - before_s > TICK_S + ASLEEP_S:
                log.info("awake again", seconds=round(time.time() - before_s))
                self.renew("this machine slept")


def as_user_error(error: LinkError) -> UserError:
    """What a failed first connection means for the person at the keyboard."""
    code, remedy = _LINK_REMEDIES.get(error.failure, _OTHER_LINK)
    return UserError(code, error.reason, remedy)


_OTHER_LINK = (UserCode.CONNECTION_LOST, "check the network and start the same command again; what is done is kept")
_LINK_REMEDIES = {
    LinkFailure.ADDRESS: (UserCode.UNKNOWN_HOST, "ask the operator for a new invite: its address is unusable"),
    LinkFailure.DNS: (UserCode.UNKNOWN_HOST, "check the network and its DNS, or ask the operator for a new invite"),
    LinkFailure.REFUSED: (UserCode.UNREACHABLE, "ask the operator whether `sparseloco-peer aggregate` is running"),
    LinkFailure.HERE: (
        UserCode.UNREACHABLE,
        "start `sparseloco-peer aggregate` here; if it runs elsewhere, ask for an invite made with `run invite --host`",
    ),
    LinkFailure.UNREACHABLE: (
        UserCode.UNREACHABLE,
        "check this machine's network, and ask the operator whether others reach the address of the invite",
    ),
    LinkFailure.TIMEOUT: (
        UserCode.TIMED_OUT,
        "ask the operator whether that TCP port is open to others, and check that a firewall here lets it out",
    ),
    LinkFailure.CERTIFICATE: (
        UserCode.WRONG_CERTIFICATE,
        "ask the operator for the newest invite; do not go on if it is the same: somebody may sit in between",
    ),
    LinkFailure.NOT_OURS: (
        UserCode.UNREACHABLE,
        "ask the operator for the right address: something else answers there",
    ),
}
