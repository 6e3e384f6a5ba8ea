"""Finding the aggregator: first by its signed records in the directory, then by the addresses in the invite."""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from typing import Self

import structlog

from peer.net.directory import Directory, DirectoryError, open_directory
from peer.store import Home, atomic_write
from protocol.errors import ProtocolError
from protocol.identity import PrivateKey
from protocol.invite import Invite
from protocol.records import Ad, DhtKind, aggregators_key, make_dht_record, payload_of, peers_key

log = structlog.get_logger()

GOOD_PEERS_MAX = 16
DHT_TTL_S = 300


@dataclass(frozen=True)
class Place:
    """Where an aggregator may be dialled, who may answer there, and with which certificate (None: any)."""

    address: str
    aggregators: tuple[bytes, ...]
    certificate_sha256: bytes | None


class Finder:
    """The directory as a peer uses it. Directory nodes that worked are kept on disk for the next start."""

    def __init__(self, invite: Invite, home: Home, directory: Directory) -> None:
        self._invite, self._home, self._directory = invite, home, directory

    @classmethod
    async def open(cls, invite: Invite, home: Home) -> Self:
        """Open the directory through the invite's bootstraps and those that worked before."""
        remembered = _remembered(home)
        directory = await open_directory(
            identity=None,
            run_ids=[invite.run_id],
            bootstraps=list(dict.fromkeys([*invite.bootstraps, *remembered])),
            listen=None,
            notice=lambda text: log.warning("directory", notice=text),
            aggregators={invite.run_id: frozenset({invite.aggregator_key})},
        )
        log.info("directory", kind=directory.kind, why=directory.reason)
        return cls(invite, home, directory)

    async def places(self) -> list[Place]:
        """Everywhere an aggregator may be, best first, each once. Never empty."""
        invite = self._invite
        key = invite.aggregator_key
        places = []
        try:
            found = await self._directory.lookup(aggregators_key(invite.run_id))
            if key in found:
                ad = Ad.from_payload(payload_of(found[key]))
                log.info("found in the directory", addresses=list(ad.addresses), round=ad.head_round)
                places = [Place(address, (key,), ad.certificate_sha256) for address in ad.addresses]
        except (DirectoryError, ProtocolError) as error:
            log.warning("the directory did not help", why=str(error))
        places += [Place(address, (key,), invite.certificate_sha256) for address in invite.addresses]
        return list(dict.fromkeys(places))

    async def announce(self, key: PrivateKey, head_round: int, head_digest: bytes) -> None:
        """Show ourselves to the others, and keep good nodes. Nothing depends on it, so failures are only logged."""
        dht_key = peers_key(self._invite.run_id)
        expires_s = int(time.time()) + DHT_TTL_S
        payload = Ad((), bytes(32), head_round, head_digest).to_payload()
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

    async def close(self) -> None:
        """Leave the directory."""
        await self._directory.close()


def _remembered(home: Home) -> list[str]:
    """Directory nodes of the last time; a damaged file is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        names = json.loads((home.path / "directory.json").read_bytes())
        if isinstance(names, list):
            return [name for name in names if isinstance(name, str)][:GOOD_PEERS_MAX]
    return []
