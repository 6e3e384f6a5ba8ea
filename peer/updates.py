"""Getting a round's update here: as it is, or as the round's packets where those are smaller."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from peer.amendments import AmendedRun
from peer.connection import Connection
from peer.merge import accepted, sections_of_bundle, sections_of_update
from peer.net.messages import RoundClosed
from protocol.errors import ProtocolError
from protocol.identity import NO_DIGEST
from protocol.ledger import RoundRecord
from protocol.wire import bundle_bytes_max, update_wire_bytes_max

log = structlog.get_logger()


@dataclass(frozen=True)
class Fetched:
    """The sections of an update, in which form they came, and how many bytes that took."""

    form: str
    size: int
    sections: Sequence[bytes]


_NOTHING = Fetched("nothing", 0, ())


@dataclass(frozen=True)
class _Offer:
    """A bundle that the aggregator offers for the newest record, because it is smaller than the update."""

    record_digest: bytes
    size: int


class Updates:
    """Fetches updates over the connection, at most one of them beforehand."""

    def __init__(self, amended: AmendedRun, connection: Connection) -> None:
        self._amended, self._connection = amended, connection
        self._offer: _Offer | None = None
        self._prefetched: tuple[bytes, asyncio.Task[Fetched]] | None = None
        self.update_bytes = 0
        self.bundle_bytes = 0

    def facts(self) -> dict[str, int]:
        """The bytes that came."""
        return {
            "bytes_down": self.update_bytes + self.bundle_bytes,
            "update_bytes": self.update_bytes,
            "bundle_bytes": self.bundle_bytes,
        }

    def note(self, event: RoundClosed, record: RoundRecord) -> None:
        """Note the bundle that saves bytes, if one does whose packets fit into the memory that an update may need."""
        run = self._amended.settings(record.round)
        size_max = bundle_bytes_max(run, len(accepted(record.entries)))
        smaller = 0 < event.bundle_bytes < event.update_bytes and event.bundle_bytes <= size_max
        fits = size_max <= update_wire_bytes_max(run)
        self._offer = _Offer(record.digest, event.bundle_bytes) if smaller and fits else None

    async def prefetch(self, record: RoundRecord, base_root: bytes) -> None:
        """Fetch an update beforehand; whoever takes it has it, or hears why it is not here."""
        task = asyncio.create_task(self._fetch(record, base_root))
        self._prefetched = (record.digest, task)
        await asyncio.wait({task})

    async def take(self, record: RoundRecord, base_root: bytes) -> Fetched:
        """The update of a record, which leads on from `base_root`. Raises LinkError and ProtocolError."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[0] == record.digest:
            return await prefetched[1]
        return await self._fetch(record, base_root)

    async def _fetch(self, record: RoundRecord, base_root: bytes) -> Fetched:
        if record.update_digest == NO_DIGEST:
            return _NOTHING
        return await self._bundle(record, base_root) or await self._update(record)

    async def _update(self, record: RoundRecord) -> Fetched:
        run = self._amended.settings(record.round)
        limit = update_wire_bytes_max(run)
        data = await self._connection.link.fetch("update", record.update_digest, size_max=limit)
        self.update_bytes += len(data)
        return Fetched("update", len(data), await asyncio.to_thread(sections_of_update, data, record, run))

    async def _bundle(self, record: RoundRecord, base_root: bytes) -> Fetched | None:
        """Merge the round's packets where they are smaller than their update; None where that does not work out."""
        offer = self._offer
        if offer is None or offer.record_digest != record.digest:
            return None
        try:
            data = await self._connection.link.fetch("bundle", record.digest, size_max=offer.size)
            self.bundle_bytes += len(data)
            run = self._amended.settings(record.round)
            sections = await asyncio.to_thread(sections_of_bundle, data, record, base_root, run)
            return Fetched("bundle", len(data), sections)
        except ProtocolError as error:
            log.warning("the bundle is no good, so the update is fetched", round=record.round, why=str(error))
            self._offer = None
            return None
