"""Following a run without taking part: a complete copy of it, every byte checked, for a standby or for anybody.

The copy has the signed run, every record, the packets that each one lists and the update that they lead to, which is
made anew from the packets and not fetched: whoever follows has audited the aggregator round by round. Where old packets
are gone their update is fetched instead, and where that is gone too the state of a later round.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing, closing, suppress
from itertools import pairwise
from typing import Protocol

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from peer.aggregator import (
    BLOB_BYTES_MAX,
    KEEP_ROUNDS,
    append_record,
    is_snapshot,
    now_ms,
    save_snapshot,
)
from peer.amendments import describe, fetched_amendments, follow, stored_amendments
from peer.connection import as_user_error
from peer.core import codec
from peer.core.replica import initial_state
from peer.download import StateLoader
from peer.find import Finder, Place
from peer.journal import PacketRow
from peer.merge import accepted, check_contents, sections_of_bundle, sections_of_update
from peer.net.errors import LinkError
from peer.net.link import Link
from peer.net.messages import PacketStored, RoundClosed
from peer.replay import stored_state
from peer.store import Home, RunFolder, load_or_make_key
from protocol.amendment import Amendments, check_rollback
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, PrivateKey
from protocol.invite import Invite
from protocol.layout import state_root
from protocol.ledger import Kind, RoundRecord, check_link, check_record
from protocol.limits import RECORD_BYTES_MAX
from protocol.packet import PacketHeader, check_claims
from protocol.run import RunConfig
from protocol.update import make_update
from protocol.wire import bundle_to_wire, packet_from_wire, packet_wire_bytes_max, update_to_wire, update_wire_bytes_max

log = structlog.get_logger()

FETCHES = 4  # at once
BACKOFF_S_MIN = 1.0
BACKOFF_S_MAX = 5.0

Flat = NDArray[np.float32]  # f32[N]
Todo = asyncio.Queue[RoundRecord | PacketStored]


class Lease(Protocol):
    """Who wants to know whether the aggregator that is followed is alive, and how far the copy is."""

    def heard(self, head: RoundRecord) -> None:
        """A sign of life; `head` is its newest record."""

    def lost(self) -> None:
        """The link to it is gone."""

    def recorded(self, record: RoundRecord, run: RunConfig) -> None:
        """The copy has this round, complete; `run` has the settings of the round after it."""


class _NoLease:
    """A mirror that wants nothing but the copy."""

    def heard(self, head: RoundRecord) -> None:
        pass

    def lost(self) -> None:
        pass

    def recorded(self, record: RoundRecord, run: RunConfig) -> None:
        pass


class Follower:
    """Keeps the copy in a RunFolder up to date for as long as `follow` runs."""

    def __init__(
        self,
        run: RunConfig,
        folder: RunFolder,
        finder: Finder,
        key: PrivateKey,
        *,
        ad: bytes = b"",
        plaintext: bool = False,
        lease: Lease | None = None,
    ) -> None:
        """Follow with this key. With an `ad` this is an aggregator that stands by; it follows only one that leads."""
        self.run, self.head = run, stored_head(folder)
        self._folder, self._finder, self._key = folder, finder, key
        self._ad, self._plaintext = ad, plaintext
        self._lease: Lease = lease or _NoLease()
        self._amendments = self._named()  # by the record of `head`
        self._flat: Flat | None = None  # the state after the round of `head`, once it is needed
        self._turns = asyncio.Semaphore(FETCHES)

    @property
    def finished(self) -> bool:
        """Whether the copy has the last round of the run."""
        return self.head is not None and self.head.round >= self.settings.outer.rounds

    @property
    def settings(self) -> RunConfig:
        """The run with the settings of the round after the head's."""
        return self._amendments.config_at(0 if self.head is None else self.head.round + 1)

    def _named(self) -> Amendments:
        head = NO_DIGEST if self.head is None else self.head.amendment
        return stored_amendments(self._folder.blobs, Amendments(self.run), head)

    async def follow(self) -> None:
        """Follow until the run is complete, through lost connections and from one aggregator to the next."""
        wait_s = BACKOFF_S_MIN
        while not self.finished:
            try:
                link = await self._finder.connect(self._key, plaintext=self._plaintext, standby=not self._ad)
                async with link:
                    log.info("following", address=link.address, aggregator=link.aggregator)
                    wait_s = BACKOFF_S_MIN
                    await self._watch(link)
                why = "the aggregator ended the connection"
            except (LinkError, ProtocolError) as error:
                why = str(error)
            self._lease.lost()
            if not self.finished:
                log.warning("not following", why=why, retry_in_s=wait_s)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, BACKOFF_S_MAX)

    # What the aggregator says

    async def _watch(self, link: Link) -> None:
        """Note signs of life as they come, and beside it fetch what they tell of, one after the other."""
        todo: Todo = asyncio.Queue()
        tasks = [asyncio.create_task(self._listen(link, todo)), asyncio.create_task(self._fetch_all(link, todo))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _listen(self, link: Link, todo: Todo) -> None:
        newest = self._checked(link.head_record)
        todo.put_nowait(newest)
        self._lease.heard(newest)
        shown = b"" if self.head is None else self.head.to_bytes()
        async with aclosing(link.observe(shown, self._ad)) as events:
            async for event in events:
                if isinstance(event, RoundClosed):
                    newest = self._checked(event.record)
                    todo.put_nowait(newest)
                elif isinstance(event, PacketStored):
                    todo.put_nowait(event)
                self._lease.heard(newest)

    async def _fetch_all(self, link: Link, todo: Todo) -> None:
        while not self.finished:
            item = await todo.get()
            if isinstance(item, RoundRecord):
                await self._catch_up(link, item)
            else:
                await self._keep_open(link, item.digest)

    def _checked(self, data: bytes) -> RoundRecord:
        record = RoundRecord.from_bytes(data)
        check_record(record, self.run)
        return record

    # Records

    async def _catch_up(self, link: Link, head: RoundRecord) -> None:
        """Take over every round up to this record that is not here yet."""
        ours = self.head
        if ours is not None and (head.digest == ours.digest or head.epoch < ours.epoch):
            return
        records = await self._missing(link, head)
        for previous, record in pairwise(records):
            check_link(previous, record)
        await asyncio.to_thread(self._fork, records[0])
        chains = await self._follow_amendments(link, records)
        began_s = time.monotonic()
        for place, record in enumerate(records):
            try:
                size = await self._take(link, record, chains[place])
            except ProtocolError as error:
                if error.code != Code.NOT_FOUND:
                    raise
                log.info("no longer there", round=record.round, why=error.detail)
                await self._jump(link, records[place:], chains[place:])
                return
            eta_s = (time.monotonic() - began_s) / (place + 1) * (len(records) - place - 1)
            log.info(
                "copied",
                round=record.round,
                of=head.round,
                packets=len(record.entries),
                bytes=size,
                eta_s=round(eta_s),
                state_root=record.state_root.hex(),
            )

    async def _missing(self, link: Link, head: RoundRecord) -> list[RoundRecord]:
        """The records from the first that is not here to the head."""
        records, journal = [head], self._folder.journal
        while records[-1].round > 0 and journal.record_by_digest(records[-1].previous) is None:
            digest = records[-1].previous
            record = self._checked(await link.fetch("record", digest, size_max=RECORD_BYTES_MAX))
            if record.digest != digest:
                raise ProtocolError(Code.WRONG_DIGEST, "the record is another than the one asked for")
            records.append(record)
        return records[::-1]

    async def _follow_amendments(self, link: Link, records: Sequence[RoundRecord]) -> list[Amendments]:
        """The amendments that each of these records names, which must keep to them; they lead on from the head."""

        async def fetch(kind: str, digest: bytes, size_max: int) -> bytes:
            return await link.fetch(kind, digest, size_max=size_max)

        chain, chains = self._amendments, list[Amendments]()
        newest = await fetched_amendments(chain, records[-1].amendment, fetch, self._folder.blobs)
        for record in records:
            chain = follow(chain, record, newest)
            chains.append(chain)
        for amendment in newest.after(self._amendments.head):
            log.info("amendment", number=amendment.number, says=describe(amendment))
        return chains

    def _fork(self, first: RoundRecord) -> None:
        """Give up our records from this one's round on, when it is of a higher epoch."""
        ours = self.head
        if ours is not None and first.round == 0:
            raise ProtocolError(Code.BROKEN_CHAIN, "the run has two first records")
        if ours is None or first.previous == ours.digest:
            return
        row = self._folder.journal.record(first.round - 1)
        assert row is not None, "the record before is here"
        check_link(RoundRecord.from_bytes(row.data), first)
        if first.epoch <= ours.epoch:
            reason = f"the aggregator signed a record of round {first.round} that does not fit its others"
            raise ProtocolError(Code.BROKEN_CHAIN, reason)
        log.warning("another branch", round=first.round, epoch=first.epoch, given_up=ours.round - first.round + 1)
        self._folder.journal.rewind(first.round - 1)
        self.head, self._flat = stored_head(self._folder), None
        self._amendments = self._named()

    async def _take(self, link: Link, record: RoundRecord, amendments: Amendments) -> int:
        """Copy one round; return the bytes fetched. Raises ProtocolError NOT_FOUND when it is gone there."""
        run = amendments.config_at(record.round)
        digests = [entry.packet_digest for entry in record.entries]
        packets = await asyncio.gather(*(self._packet(link, digest, run) for digest in digests))
        wires = {digest: wire for digest, (wire, _) in zip(digests, packets, strict=True) if wire is not None}
        size = sum(count for _, count in packets)
        update = None
        if record.kind == Kind.APPLIED and any(item.packet_digest not in wires for item in accepted(record.entries)):
            update = await link.fetch("update", record.update_digest, size_max=update_wire_bytes_max(self.run))
            size += len(update)
        await asyncio.to_thread(self._apply, record, wires, update, amendments)
        self._lease.recorded(record, self.settings)
        return size

    def _apply(
        self, record: RoundRecord, wires: dict[bytes, bytes], update: bytes | None, amendments: Amendments
    ) -> None:
        """Redo the round, compare, and keep it. Raises ProtocolError where the record tells something else."""
        run = amendments.config_at(record.round)
        if record.kind == Kind.APPLIED:
            self._step(record, wires, update, run)
        elif record.kind == Kind.ROLLBACK:
            self._go_back(record, amendments)
        for digest, wire in wires.items():
            self._keep(digest, wire, run, arrived_ms=record.closed_ms)
        snapshot = is_snapshot(record, amendments)
        if snapshot and record.round:
            save_snapshot(self._folder, amendments, self._state(), record.round)
        append_record(self._folder, record)
        self.head, self._amendments = record, amendments
        if snapshot and self._ad:
            self._folder.forget(keep_rounds=KEEP_ROUNDS, blob_bytes_max=BLOB_BYTES_MAX)

    def _go_back(self, record: RoundRecord, amendments: Amendments) -> None:
        """Take the state of the round to which the operator took the run back."""
        to_round = amendments.rollback_at(record.round)
        assert to_round is not None, "the record keeps to its amendments"
        row = self._folder.journal.record(to_round)
        assert row is not None, "every record before this one is here"
        check_rollback(record, RoundRecord.from_bytes(row.data))
        self._state()  # the first one is stored if it was not
        self._flat = stored_state(self._folder, self.run, to_round)

    def _step(self, record: RoundRecord, wires: dict[bytes, bytes], update: bytes | None, run: RunConfig) -> None:
        base = self.head
        assert base is not None, "an applied round follows another"
        flat = self._state()
        if update is None:
            data = bundle_to_wire([wires[entry.packet_digest] for entry in accepted(record.entries)])
            sections: Sequence[bytes] = sections_of_bundle(data, record, base.state_root, run)
            made = make_update(self.run, record.round, base.state_root, record.state_root, list(sections))
            update = update_to_wire(made, run)
        else:
            sections = sections_of_update(update, record, run)
        # Until the root is known to be right, nobody may take the array for the state of `head`.
        self._flat = None
        codec.outer_step(torch.from_numpy(flat), run.layout, sections)
        if state_root(flat) != record.state_root:
            raise ProtocolError(Code.BAD_STATE, f"the packets of round {record.round} do not lead to its state")
        self._flat = flat
        self._folder.blobs.put("update", record.update_digest.hex(), update)

    def _state(self) -> Flat:
        """The state after the round of `head`."""
        if self._flat is None:
            assert self.head is not None, "there is a state when there is a record"
            states = self._folder.states
            if not states.has(self.run.genesis_root):
                flat = initial_state(self.run.model)
                if state_root(flat) != self.run.genesis_root:
                    raise ProtocolError(Code.BAD_STATE, "the model of this run does not begin with its genesis_root")
                states.save(flat, self.run.layout, {"run": self.run.name, "round": "0"})
            self._flat = stored_state(self._folder, self.run, self.head.round)
        return self._flat

    async def _jump(self, link: Link, records: Sequence[RoundRecord], chains: Sequence[Amendments]) -> None:
        """Keep these records alone, for nobody has their contents any more, and the state of the last one."""
        loaded: list[Flat] = []

        def adopt(flat: Flat) -> bytes:
            loaded.append(flat.copy())
            return state_root(loaded[0])

        def apply(sections: Sequence[bytes]) -> bytes:
            codec.outer_step(torch.from_numpy(loaded[0]), self.run.layout, sections)
            return state_root(loaded[0])

        async def fetch(kind: str, digest: bytes, size_max: int) -> bytes:
            return await link.fetch(kind, digest, size_max=size_max)

        loader = StateLoader(self.run, self._folder.path / "loading", fetch, self._finder.places, self._open)
        held = await asyncio.to_thread(self._state)
        await loader.load(records[-1], held, adopt, apply)
        await asyncio.to_thread(self._land, loaded[0], records, chains[-1])
        loader.forget()
        self._lease.recorded(records[-1], self.settings)

    def _land(self, flat: Flat, records: Sequence[RoundRecord], amendments: Amendments) -> None:
        for record in records[:-1]:
            append_record(self._folder, record)
        save_snapshot(self._folder, amendments, flat, records[-1].round)
        append_record(self._folder, records[-1])
        self.head, self._flat, self._amendments = records[-1], flat, amendments

    async def _open(self, place: Place) -> Link:
        return await place.dial(self.run.run_id, plaintext=self._plaintext)

    # Packets

    async def _packet(self, link: Link, digest: bytes, run: RunConfig) -> tuple[bytes | None, int]:
        """A packet in transport form, and the bytes that were fetched for it; None where it is gone."""
        wire = await asyncio.to_thread(self._folder.blobs.get, "packet", digest.hex())
        if wire is not None:
            return wire, 0
        async with self._turns:
            try:
                wire = await link.fetch("packet", digest, size_max=packet_wire_bytes_max(run))
            except ProtocolError as error:
                if error.code != Code.NOT_FOUND:
                    raise
                return None, 0
        return wire, len(wire)

    async def _keep_open(self, link: Link, digest: bytes) -> None:
        """Keep a packet of the open round, which counts when this standby takes over."""
        head = self.head
        if head is None or self._folder.journal.packet(digest) is not None:
            return
        run = self.settings
        wire, _ = await self._packet(link, digest, run)
        if wire is None:
            return

        def check_and_keep(wire: bytes) -> None:
            packet = packet_from_wire(wire, run)
            check_claims(packet, run, round=head.round + 1, base_root=head.state_root)
            check_contents(packet, run)
            self._keep(digest, wire, run, arrived_ms=now_ms())
            log.info("packet copied", peer=packet.header.peer, round=packet.header.round)

        with suppress(ProtocolError):
            # The aggregator should not have taken it; what its record says of it is another matter.
            await asyncio.to_thread(check_and_keep, wire)

    def _keep(self, digest: bytes, wire: bytes, run: RunConfig, *, arrived_ms: int) -> None:
        header: PacketHeader = packet_from_wire(wire, run).header
        if header.digest != digest:
            raise ProtocolError(Code.WRONG_DIGEST, "the packet is another than the one asked for")
        self._folder.blobs.put("packet", digest.hex(), wire)
        row = PacketRow(digest, header.round, header.peer, header.tokens, header.inner_steps, arrived_ms)
        self._folder.journal.add_packet(row)


def stored_head(folder: RunFolder) -> RoundRecord | None:
    """The newest record of a folder."""
    row = folder.journal.head()
    return None if row is None else RoundRecord.from_bytes(row.data)


async def mirror(invite: Invite, home: Home, stop: asyncio.Event, *, plaintext: bool = False) -> None:
    """Copy a run and follow it until it is complete or `stop` is set. Raises UserError."""
    key = load_or_make_key(home.key_path)
    finder = await Finder.open(invite, home)
    try:
        try:
            await (await finder.connect(key, plaintext=plaintext)).close()
        except LinkError as error:
            raise as_user_error(error) from error
        assert finder.run is not None, "it came with the first link"
        with closing(home.run(invite.run_id)) as folder:
            follower = Follower(finder.run, folder, finder, key, plaintext=plaintext)
            log.info("mirror", run=finder.run.name, rounds=finder.run.outer.rounds, folder=folder.path)
            following, stopped = asyncio.create_task(follower.follow()), asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    following.result()
            finally:
                for task in (following, stopped):
                    task.cancel()
                await asyncio.gather(following, stopped, return_exceptions=True)
            head = follower.head
            log.info("mirror left", round=-1 if head is None else head.round, complete=follower.finished)
    finally:
        await finder.close()
