"""An aggregator in a process of its own that is killed again and again, and peers that go by a script around it.

A scripted peer speaks the real protocol over real sockets and sends real packets, signed for the round that is open,
but what is in them was made once, so it costs nothing. It never gives up, and it remembers all that it was told.
"""

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, closing, suppress
from pathlib import Path

import numpy as np
import torch

from peer.audit import audit
from peer.core import codec
from peer.net.errors import LinkError
from peer.net.link import Link
from peer.net.messages import RoundClosed, RoundOpened
from peer.operator import OperatorFolder, RunPlace, new_run
from peer.store import Home, atomic_write
from protocol.errors import Code, ProtocolError
from protocol.invite import Invite
from protocol.ledger import CloseReason, Kind, RoundRecord, Verdict
from protocol.packet import make_packet
from protocol.run import RunConfig, RunSettings, parse_settings
from protocol.wire import packet_to_wire, update_from_wire, update_wire_bytes_max
from tests.chaos.boundaries import NOWHERE, Boundary, DieAt, KeepEveryState
from tests.chaos.nursery import Child, Spell
from tests.peer.room import peer_key
from tests.peer.swarm import SETTINGS, free_port
from tests.peer.test_swarm import ledger

PEERS = 3
FOREVER = 100_000  # rounds
RETRY_S = 0.05
DEADLINE_S = 60.0
END_S = 90.0
TRIES = 5
KEEP = KeepEveryState()


class ScriptedPeer:
    """What one peer sent and was told."""

    def __init__(self, run: RunConfig, invite: Invite, number: int) -> None:
        self.run, self.invite, self.key = run, invite, peer_key(number)
        self.sent: dict[bytes, int] = {}  # packet -> round
        self.receipted: dict[bytes, int] = {}
        self.refused: Counter[Code] = Counter()
        self.published: dict[int, bytes] = {}  # round -> the record's bytes
        self.updates = 0
        self._fetches = number == 0
        change = np.random.default_rng(number).normal(scale=1e-3, size=run.layout.size).astype(np.float32)
        outer, rules = torch.zeros(run.layout.size), run.compression
        residual, local = torch.zeros_like(outer), torch.from_numpy(change)
        self._sections, _ = codec.compress(residual, outer, local, run.layout, rules.beta, rules.k, rules.code_bits)

    @property
    def head(self) -> int:
        return max(self.published, default=-1)

    async def live(self) -> None:
        """Take part in every round, for ever."""
        while True:
            with suppress(LinkError):
                async with await self._open() as link:
                    self._note(link.head_record)
                    async with aclosing(link.watch()) as events:
                        async for event in events:
                            match event:
                                case RoundClosed():
                                    await self._fetch(link, self._note(event.record))
                                case RoundOpened():
                                    await self._submit(link, event)
            await asyncio.sleep(RETRY_S)

    async def _open(self) -> Link:
        return await Link.open(
            self.invite.addresses[0],
            run_id=self.run.run_id,
            key=self.key,
            expect_aggregators=self.run.aggregators,
            certificate_sha256=self.invite.certificate_sha256,
            timeout_s=10.0,
        )

    def _note(self, data: bytes) -> RoundRecord:
        record = RoundRecord.from_bytes(data)
        assert self.published.setdefault(record.round, data) == data, f"round {record.round} was recorded in two ways"
        return record

    async def _fetch(self, link: Link, record: RoundRecord) -> None:
        if self._fetches and record.kind == Kind.APPLIED and record.round:
            data = await link.fetch("update", record.update_digest, size_max=update_wire_bytes_max(self.run))
            assert update_from_wire(data, self.run).header.digest == record.update_digest
            self.updates += 1

    async def _submit(self, link: Link, opened: RoundOpened) -> None:
        tokens = self.run.nominal_tokens
        packet = make_packet(
            self.run, self.key, opened.round, opened.base_root, tokens, self.run.inner.steps, self._sections
        )
        digest = packet.header.digest
        if digest in self.receipted:
            return  # a real peer sends it again; this one trusts what it was promised
        self.sent[digest] = opened.round
        try:
            receipt = await link.submit(digest, packet_to_wire(packet, self.run))
        except ProtocolError as error:
            # The submit of a link that broke may still be under way there, or the disk may be full.
            if error.code not in (Code.BUSY, Code.BAD_SESSION):
                raise
            await asyncio.sleep(RETRY_S)
            await link.close()
            return
        if receipt.accepted:
            self.receipted[digest] = opened.round
        else:
            self.refused[Code(receipt.code)] += 1


@dataclasses.dataclass
class Generation:
    """One process of the aggregator: how it ended, and the rounds that it closed."""

    status: int
    first: int
    last: int


class Siege:
    """One run, its peers, and one aggregator after the other."""

    def __init__(
        self,
        folder: Path,
        *,
        quorum: int,
        grace_s: float = 0.2,
        through_port: int | None = None,
        log: Path | None = None,
    ) -> None:
        settings = parse_settings(SETTINGS.format(rounds=FOREVER, steps=5, grace_s=3.0))
        rules = dataclasses.replace(
            settings.rounds,
            quorum=quorum,
            start_peers=PEERS,
            grace_s_min=grace_s,
            grace_s_max=grace_s,
            deadline_s=DEADLINE_S,
        )
        self.folder, self.quorum = folder, quorum
        self.log = log or folder / "aggregator"
        self.path = make_run(folder, dataclasses.replace(settings, rounds=rules))
        signed, self.invite = OperatorFolder(self.path).load()
        self.run: RunConfig = signed.config
        seen = self.invite
        if through_port is not None:
            seen = dataclasses.replace(seen, addresses=(f"127.0.0.1:{through_port}",))
        self.peers = [ScriptedPeer(self.run, seen, number) for number in range(PEERS)]
        self.generations: list[Generation] = []
        self._heads = 0

    @asynccontextmanager
    async def peers_live(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as lives:
            tasks = [lives.create_task(peer.live()) for peer in self.peers]
            yield
            for task in tasks:
                task.cancel()

    def start(self, spell: Spell | None = None) -> Child:
        return Child(self.log, "aggregate", str(self.path), spell=spell)

    def ended(self, status: int) -> None:
        """Note what a process that is dead now has closed."""
        first, self._heads = self._heads + 1, self.head_on_disk()
        self.generations.append(Generation(status, first, self._heads))

    def head_on_disk(self) -> int:
        with closing(Home(OperatorFolder(self.path).aggregator_home).run(self.run.run_id)) as store:
            row = store.journal.head()
        assert row is not None
        return row.round

    async def rest(self, rounds: int = 2, spell: Spell = KEEP) -> None:
        """Let an aggregator close some rounds undisturbed, and end it."""
        child = self.start(spell)
        try:
            target = self.head_on_disk() + rounds
            async with asyncio.timeout(END_S):
                while min(peer.head for peer in self.peers) < target:
                    assert child.process.is_alive(), child.told()
                    await asyncio.sleep(RETRY_S)
        finally:
            child.kill()
        self.ended(-9)

    def check(self, seed: int) -> str:
        """Nothing that was promised is lost or doubled, and nothing that was published has changed; the figures."""
        records = ledger(self.path)
        entries = [(entry, record.round) for record in records for entry in record.entries]
        counts = Counter(entry.packet_digest for entry, _ in entries)
        assert max(counts.values()) == 1, f"seed {seed}: a packet is recorded twice"
        accepted = {entry.packet_digest: round for entry, round in entries if entry.verdict == Verdict.ACCEPTED}
        with closing(Home(OperatorFolder(self.path).aggregator_home).run(self.run.run_id)) as store:
            waiting = {row.digest for row in store.journal.packets(len(records))}
        sent = {digest: round for peer in self.peers for digest, round in peer.sent.items()}
        receipted = {digest: round for peer in self.peers for digest, round in peer.receipted.items()}
        lost = [d for d, round in receipted.items() if accepted.get(d) != round and d not in waiting]
        assert not lost, f"seed {seed}: {len(lost)} of {len(receipted)} receipted packets are lost"
        assert accepted.items() <= sent.items(), f"seed {seed}: a packet that nobody sent counts"
        for peer in self.peers:
            for round, data in peer.published.items():
                assert records[round].to_bytes() == data, f"seed {seed}: round {round} was published differently"
        self._check_delay(records, seed)
        (report,) = audit(self.path, None, None, lambda _done, _asked: None)
        assert report.passed, "\n".join(report.lines())
        slow = sum(record.reason != CloseReason.COMPLETE for record in records[1:])
        return (
            f"seed {seed}: {len(self.generations)} processes, {len(records) - 1} rounds, {len(receipted)} receipts, "
            f"0 lost, 0 doubled; {slow} rounds closed after a wait, 0 null; audit passed over {report.recomputed}"
        )

    def _check_delay(self, records: list[RoundRecord], seed: int) -> None:
        """No round is empty or waits for the deadline, and a kill makes at most the round wait that was open."""
        for record in records[1:]:
            assert record.kind == Kind.APPLIED and record.reason != CloseReason.DEADLINE, f"seed {seed}: {record.round}"
            if self.quorum == PEERS:
                assert len(record.entries) == PEERS, f"seed {seed}: round {record.round} went without a peer"
        if self.quorum == PEERS:
            for generation in self.generations:
                calm = records[generation.first + 1 : generation.last + 1]
                assert all(record.reason == CloseReason.COMPLETE for record in calm), f"seed {seed}: {generation}"


async def boundaries(siege: Siege, *, whole_round: bool) -> list[Boundary]:
    """Every boundary of a round that an undisturbed aggregator reaches, or of its start."""
    async with siege.peers_live():
        # After some rounds the oldest state is deleted in each.
        for _ in range(3):
            spell = await live_until(siege, NOWHERE, whole_round)
        found = spell.passed()
        await siege.rest()
    return found


async def kill_at_boundaries(siege: Siege, places: Sequence[Boundary], *, whole_round: bool) -> list[Boundary]:
    """Kill one aggregator after the other, each at the next boundary; return those that no process came to."""
    missed = []
    async with siege.peers_live():
        for place in places:
            # What is under way at the same time comes in any order, so a round may lack some occurrence of it.
            for _ in range(TRIES):
                spell = await live_until(siege, place, whole_round)
                if siege.generations[-1].status == -9:
                    assert spell.passed()[-1] == place
                    break
            else:
                missed.append(place)
        await siege.rest()
    return missed


async def live_until(siege: Siege, place: Boundary, whole_round: bool) -> DieAt:
    """Let one aggregator live until it reaches this boundary or has passed them all."""
    spell = DieAt(place, whole_round, siege.folder / "trace")
    child = siege.start(spell)
    try:
        status = await asyncio.to_thread(child.wait_end, END_S)
    finally:
        child.kill()
    assert status in (0, -9), child.told()
    siege.ended(status)
    return spell


async def kill_at_random(siege: Siege, seed: int, kills: int, life_s_max: float) -> None:
    """Kill an aggregator at a random moment of its life, so many times."""
    draw = random.Random(seed)
    async with siege.peers_live():
        for _ in range(kills):
            child = siege.start()
            await asyncio.sleep(draw.uniform(0.0, life_s_max))
            child.kill()
            assert child.process.exitcode == -9, child.told()
            siege.ended(-9)
        await siege.rest()


def make_run(folder: Path, settings: RunSettings) -> Path:
    """A run folder on a free port, without a directory."""
    path = folder / "run"
    new_run(settings, path, RunPlace("127.0.0.1", free_port(), free_port()))
    operator = OperatorFolder(path)
    invite = dataclasses.replace(operator.load()[1], bootstraps=())
    atomic_write(operator.invite_path, invite.to_text().encode("ascii"))
    return path
