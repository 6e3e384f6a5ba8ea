"""Finding an aggregator: by signed records from the directory, from other aggregators and from the last time, and by
the invite.

A run may have several aggregators, of which one leads and the others stand by. Whoever was found once is remembered on
the disk with its address, so that a peer finds the next one when the first is gone, also where there is no directory:

    <home>/runs/<run_id>/run.bin              the signed run, which says whose records count
    <home>/runs/<run_id>/aggregators.json     their newest addresses, signed by themselves, and the newest record seen
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import structlog

from peer.net.directory import Directory, DirectoryError, DirectoryHealth, StaticDirectory, open_directory
from peer.net.errors import LinkError, LinkFailure
from peer.net.link import Link
from peer.store import Home, atomic_write
from protocol.errors import Code, ProtocolError
from protocol.identity import KEY_BYTES, NO_DIGEST, PrivateKey
from protocol.invite import Invite
from protocol.ledger import RoundRecord, check_record
from protocol.limits import DHT_TTL_S_MIN, RUN_BYTES_MAX
from protocol.records import (
    Ad,
    DhtKind,
    aggregators_key,
    check_dht_record,
    make_dht_record,
    payload_of,
    peers_key,
)
from protocol.run import RunConfig, SignedRun

log = structlog.get_logger()

GOOD_PEERS_MAX = 16
STRANGERS_MAX = 8
DHT_TTL_S = 300
FIRST_LOOKUP_S = 8.0
LOOKUP_S = 3.0  # where others are known already, a slow directory must not hold up a reconnection
SHOW_S = 5.0
MEET_S = 5.0
DIAL_S = 15.0


@dataclass(frozen=True)
class Place:
    """Where an aggregator may be dialled, who may answer there, and with which certificate (None: any)."""

    address: str
    aggregators: tuple[bytes, ...]
    certificate_sha256: bytes | None

    async def dial(
        self, run_id: bytes, key: PrivateKey | None = None, *, plaintext: bool, timeout_s: float = DIAL_S
    ) -> Link:
        """Connect, and be sure of who answers. Raises as Link.open does.

        Without a key one is made for this link alone, for a second session of the same key would end the first."""
        return await Link.open(
            self.address,
            run_id=run_id,
            key=key or PrivateKey.generate(),
            expect_aggregators=self.aggregators,
            certificate_sha256=None if plaintext else self.certificate_sha256,
            plaintext=plaintext,
            timeout_s=timeout_s,
        )


class AdBook:
    """Where the aggregators of a run say that they are reached: the newest ad of each, signed by itself.

    An ad that has expired is no proof of life, but its address is still the best guess, and the join decides.
    """

    def __init__(self, run_id: bytes) -> None:
        self.run_id = run_id
        self._ads: dict[bytes, tuple[int, Ad, bytes]] = {}  # key -> expiry, what it says, its bytes

    def add(self, signed: bytes) -> bool:
        """Take key || DHT record; whether it told us anything new. Raises ProtocolError when it is not good."""
        key, value = signed[:KEY_BYTES], signed[KEY_BYTES:]
        expires_s = int.from_bytes(value[7:15], "little")  # the record says it itself, after magic, version and kind
        record = check_dht_record(aggregators_key(self.run_id), key, value, expires_s, expires_s - DHT_TTL_S_MIN)
        ad = Ad.from_payload(record.payload)
        known = self._ads.get(key)
        if known is not None and known[0] >= expires_s:
            return False
        self._ads[key] = expires_s, ad, signed
        before = None if known is None else (known[1].addresses, known[1].certificate_sha256)
        return before != (ad.addresses, ad.certificate_sha256)

    def add_all(self, signed: Iterable[bytes], keys: Iterable[bytes]) -> bool:
        """Take those that are good and of these keys; whether any told us something new."""
        allowed, news = set(keys), False
        for each in signed:
            if each[:KEY_BYTES] in allowed:
                with contextlib.suppress(ProtocolError):
                    news = self.add(each) or news
        return news

    def signed(self, but: bytes = b"") -> list[bytes]:
        """All ads as they are handed on, except that of one key."""
        return [signed for key, (_, _, signed) in sorted(self._ads.items()) if key != but]

    def places(self) -> dict[bytes, list[Place]]:
        """Where each key is reached."""
        return {
            key: [Place(address, (key,), ad.certificate_sha256) for address in ad.addresses]
            for key, (_, ad, _) in self._ads.items()
        }


def sign_ad(run_id: bytes, key: PrivateKey, ad: Ad, expires_s: int) -> bytes:
    """An aggregator's ad as it is handed on: its key and its DHT record."""
    return key.public + make_dht_record(key, aggregators_key(run_id), DhtKind.AGGREGATOR, ad.to_payload(), expires_s)


class Finder:
    """How a program finds the aggregators of one run, and what it knows of them."""

    def __init__(self, invite: Invite, home: Home, run: RunConfig | None = None) -> None:
        """Know what was known the last time; the directory is reached after `go_online`."""
        self.run = run
        self.head: RoundRecord | None = None  # the newest record, of the highest epoch, that we have seen
        self.book = AdBook(invite.run_id)
        self._invite, self._home = invite, home
        self._directory: Directory = StaticDirectory("it has not been opened yet")
        self._unhelpful: str | None = None  # why it did not help the last time, which is told once
        self._folder = home.path / "runs" / invite.run_id.hex()
        self._link: Link | None = None
        self._recall()

    @classmethod
    async def open(cls, invite: Invite, home: Home) -> Self:
        """A finder that is online."""
        finder = cls(invite, home)
        await finder.go_online()
        return finder

    async def go_online(self) -> None:
        """Open the directory through the invite's bootstraps and those that worked before."""
        run_id = self._invite.run_id
        self._directory = directory = await open_directory(
            identity=None,
            run_ids=[run_id],
            bootstraps=list(dict.fromkeys([*self._invite.bootstraps, *_remembered(self._home)])),
            listen=None,
            notice=lambda text: log.warning("directory", notice=text),
            # Before the run is known nobody can say who its aggregators are; `connect` sorts the others out.
            aggregators={} if self.run is None else {run_id: frozenset(self.run.aggregators)},
        )
        log.info("directory", kind=directory.kind, why=directory.reason)

    @property
    def _keys(self) -> tuple[bytes, ...]:
        return (self._invite.aggregator_key,) if self.run is None else self.run.aggregators

    async def places(self) -> list[Place]:
        """Everywhere an aggregator may be, the one that led last first, each once. Never empty."""
        invite, strangers = self._invite, AdBook(self._invite.run_id)
        try:
            async with asyncio.timeout(FIRST_LOOKUP_S if self.run is None else LOOKUP_S):
                found = await self._directory.lookup(aggregators_key(invite.run_id))
            self._note(found)
            if self.run is None:
                others = [key + value for key, value in found.items() if key not in self._keys]
                strangers.add_all(others[:STRANGERS_MAX], found)
        except (DirectoryError, TimeoutError) as error:
            if str(error) != self._unhelpful:
                log.warning("the directory did not help", why=str(error))
            self._unhelpful = str(error)
        by_key = self.book.places()
        by_key.setdefault(invite.aggregator_key, [])
        by_key[invite.aggregator_key] += [
            Place(address, (invite.aggregator_key,), invite.certificate_sha256) for address in invite.addresses
        ]
        leader = invite.aggregator_key if self.head is None else self.head.aggregator
        known = sorted(by_key, key=lambda key: (key != leader, key != invite.aggregator_key))
        places = [place for key in known for place in by_key[key]]
        places += [place for offered in strangers.places().values() for place in offered]
        return list(dict.fromkeys(places))

    async def connect(self, key: PrivateKey, *, plaintext: bool = False, standby: bool = True) -> Link:
        """Join an aggregator that leads, or else (with `standby`) one that stands by and would lead next.

        One that has not heard of a takeover is told, and passed over. Raises LinkError or ProtocolError.
        """
        self._harvest()
        failure: LinkError | ProtocolError | None = None
        waiting: Link | None = None
        for place in await self.places():
            if place.aggregators == (key.public,):
                continue
            try:
                link = await self._open(place, key, plaintext=plaintext)
            except (LinkError, ProtocolError) as error:
                failure = failure or error
                continue
            if not link.standby:
                if waiting is not None:
                    await waiting.close()
                self._link = link
                return link
            if waiting is None and standby:
                waiting = link
            else:
                await link.close()
        if waiting is not None:
            self._link = waiting
            return waiting
        raise failure or LinkError(LinkFailure.REFUSED, "all aggregators that answer stand by", retryable=True)

    async def meet(
        self, key: PrivateKey, head: RoundRecord, *, plaintext: bool = False
    ) -> list[tuple[RoundRecord, bool]]:
        """The heads of the other aggregators that answer now, and whether each leads; one behind ours is shown ours."""

        async def greet(place: Place) -> tuple[RoundRecord, bool] | None:
            try:
                async with await place.dial(self._invite.run_id, key, plaintext=plaintext, timeout_s=MEET_S) as link:
                    await self._learn(link)
                    theirs = self._checked(link.head_record)
                    if theirs.epoch < head.epoch:
                        await link.show(head.to_bytes(), SHOW_S)
                    return theirs, not link.standby
            except (LinkError, ProtocolError) as error:
                log.info("another aggregator is away", address=place.address, why=str(error))
                return None

        self._harvest()
        others = [place for place in await self.places() if place.aggregators != (key.public,)]
        return [met for met in await asyncio.gather(*map(greet, others)) if met is not None]

    async def _open(self, place: Place, key: PrivateKey, *, plaintext: bool) -> Link:
        link = await place.dial(self._invite.run_id, key, plaintext=plaintext)
        try:
            await self._learn(link)
            if self.head is not None and self._checked(link.head_record).epoch < self.head.epoch:
                await link.show(self.head.to_bytes(), SHOW_S)
                reason = f"the aggregator at {link.address} has not heard that another one took over"
                raise LinkError(LinkFailure.SERVER, reason, retryable=True)
        except BaseException:
            await link.close()
            raise
        return link

    async def _learn(self, link: Link) -> None:
        """Get the run from the first aggregator, and see whether this one is named by it."""
        if self.run is None:
            size_max = RUN_BYTES_MAX + 1024
            data = await link.fetch("run", self._invite.run_id, size_max=size_max)
            self.run = SignedRun.from_bytes(data, run_id=self._invite.run_id).config
            await asyncio.to_thread(atomic_write, self._folder / "run.bin", data)
        if link.aggregator not in self.run.aggregators:
            raise ProtocolError(Code.NOT_AN_AGGREGATOR, f"{link.address} is run by a key that the run does not name")
        self._saw(link.head_record)

    # What we know

    def _checked(self, data: bytes) -> RoundRecord:
        assert self.run is not None, "a link was made before, and with it the run is known"
        record = RoundRecord.from_bytes(data)
        check_record(record, self.run)
        return record

    def _saw(self, data: bytes) -> bool:
        """Note a record that an aggregator showed, if it is the newest. Raises ProtocolError."""
        record = self._checked(data)
        news = self.head is None or (record.epoch, record.round) > (self.head.epoch, self.head.round)
        if news:
            self.head = record
        return news

    def _note(self, ads: Mapping[bytes, bytes]) -> None:
        news = [key for key, value in ads.items() if self.book.add_all([key + value], self._keys)]
        for key in news:
            addresses = [place.address for place in self.book.places()[key]]
            log.info("found in the directory", aggregator=key, addresses=addresses)
        if news:
            self._remember()

    def _harvest(self) -> None:
        """Keep what the link told us on the way: records, and where other aggregators are."""
        if self._link is None or self.run is None:
            return
        news = self.book.add_all(self._link.ads, self.run.aggregators)
        with contextlib.suppress(ProtocolError):
            news = self._saw(self._link.head_record) or news
        if news:
            self._remember()

    def _remember(self) -> None:
        known = {
            "ads": [signed.hex() for signed in self.book.signed()],
            "head": "" if self.head is None else self.head.to_bytes().hex(),
        }
        atomic_write(self._folder / "aggregators.json", json.dumps(known).encode("ascii"))

    def _recall(self) -> None:
        """Read what was remembered; a damaged file is no reason to stop."""
        if self.run is None:
            self.run = _stored_run(self._folder)
        if self.run is None:
            return
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ProtocolError):
            known = json.loads((self._folder / "aggregators.json").read_bytes())
            self.book.add_all((bytes.fromhex(text) for text in known["ads"]), self.run.aggregators)
            if known["head"]:
                self._saw(bytes.fromhex(known["head"]))

    # The directory

    async def directory_health(self) -> DirectoryHealth:
        """How the directory is doing now."""
        return await self._directory.health()

    async def peer_places(self) -> list[Place]:
        """Where peers offer to others what they hold, as themselves; nobody vouches for them."""
        try:
            async with asyncio.timeout(LOOKUP_S):
                found = await self._directory.lookup(peers_key(self._invite.run_id))
        except (DirectoryError, TimeoutError) as error:
            log.warning("the directory did not help", why=str(error))
            return []
        places = []
        for key, value in found.items():
            with contextlib.suppress(ProtocolError):
                ad = Ad.from_payload(payload_of(value))
                certificate = ad.certificate_sha256 if any(ad.certificate_sha256) else None
                places += [Place(address, (key,), certificate) for address in ad.addresses]
        # So that not all joiners ask the same few.
        return random.sample(places, min(len(places), STRANGERS_MAX))

    async def announce(
        self,
        key: PrivateKey,
        head_round: int,
        head_digest: bytes,
        addresses: tuple[str, ...] = (),
        certificate_sha256: bytes = NO_DIGEST,
    ) -> None:
        """Show ourselves to the others, with addresses if we serve them, and keep good nodes.

        Nothing depends on it, so failures are only logged.
        """
        self._harvest()
        dht_key = peers_key(self._invite.run_id)
        expires_s = int(time.time()) + DHT_TTL_S
        payload = Ad(addresses, certificate_sha256, head_round, head_digest).to_payload()
        value = make_dht_record(key, dht_key, DhtKind.PEER, payload, expires_s)
        try:
            await self._directory.publish(dht_key, key.public, value, expires_s)
            peers = await self._directory.lookup(dht_key)
            log.info("peers in the directory", peers=len(peers))
        except DirectoryError as error:
            log.warning("not announced", why=str(error))
        good = self._directory.good_peers()[:GOOD_PEERS_MAX]
        if good:
            data = json.dumps(good).encode("ascii")
            await asyncio.to_thread(atomic_write, self._home.path / "directory.json", data)

    async def advertise(self, signed_ad: bytes, expires_s: int) -> None:
        """Publish an aggregator's ad, and see where the others are. Raises DirectoryError."""
        dht_key = aggregators_key(self._invite.run_id)
        await self._directory.publish(dht_key, signed_ad[:KEY_BYTES], signed_ad[KEY_BYTES:], expires_s)
        self._note(await self._directory.lookup(dht_key))

    async def close(self) -> None:
        """Leave the directory."""
        self._harvest()
        await self._directory.close()


def remember_ads(home: Home, signed: SignedRun, ads: Iterable[bytes]) -> None:
    """Write down beforehand where the aggregators of a run will be reached."""
    folder = home.path / "runs" / signed.config.run_id.hex()
    known = {"ads": [ad.hex() for ad in ads], "head": ""}
    atomic_write(folder / "run.bin", signed.to_bytes())
    atomic_write(folder / "aggregators.json", json.dumps(known).encode("ascii"))


def _stored_run(folder: Path) -> RunConfig | None:
    with contextlib.suppress(OSError, ProtocolError):
        return SignedRun.from_bytes((folder / "run.bin").read_bytes(), run_id=bytes.fromhex(folder.name)).config
    return None


def _remembered(home: Home) -> list[str]:
    """Directory nodes of the last time; a damaged file is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        names = json.loads((home.path / "directory.json").read_bytes())
        if isinstance(names, list):
            return [name for name in names if isinstance(name, str)][:GOOD_PEERS_MAX]
    return []
