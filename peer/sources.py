"""Where a peer gets the outer parameters that it lacks: from aggregators and from other peers."""

from pathlib import Path

from peer.connection import Connection
from peer.download import StateLoader
from peer.find import Finder, Place
from peer.net.link import Link
from peer.net.throttle import Traffic
from protocol.identity import PrivateKey
from protocol.run import RunConfig


def state_loader(
    run: RunConfig,
    folder: Path,
    connection: Connection,
    finder: Finder,
    key: PrivateKey,
    traffic: Traffic,
    plaintext: bool,
) -> StateLoader:
    """What brings the parameters here, from whoever has them; `folder` is for what is under way, `key` is our own."""

    async def fetch(kind: str, digest: bytes, size_max: int) -> bytes:
        return await connection.link.fetch(kind, digest, size_max=size_max)

    async def places() -> list[Place]:
        peers = [place for place in await finder.peer_places() if place.aggregators != (key.public,)]
        return [*await finder.places(), *peers]

    async def open_source(place: Place) -> Link:
        link = await place.dial(run.run_id, plaintext=plaintext)
        link.traffic = traffic
        return link

    return StateLoader(run, folder, fetch, places, open_source)
