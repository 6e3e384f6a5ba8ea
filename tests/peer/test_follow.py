"""Finding and following aggregators that disagree: real sockets, hand-made ledgers of null rounds."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from peer.aggregator import Aggregator, append_record
from peer.core.replica import Replica, initial_state
from peer.find import DHT_TTL_S, AdBook, Finder, sign_ad
from peer.follow import Follower, stored_head
from peer.journal import PacketRow
from peer.net.directory import bootstrap_multiaddr
from peer.net.errors import LinkError
from peer.net.messages import Aggregators, WatchEvent
from peer.net.service import serve
from peer.net.tls import TlsIdentity, make_tls_identity
from peer.operator import OperatorFolder, RunPlace, new_run
from peer.standby import Copy
from peer.store import Home, RunFolder, load_key
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, PrivateKey
from protocol.invite import Invite
from protocol.ledger import CloseReason, Kind, RoundRecord, sign_record
from protocol.packet import make_packet
from protocol.records import Ad
from protocol.run import RunConfig, SignedRun, parse_settings
from protocol.wire import packet_to_wire
from tests.peer.swarm import SETTINGS, free_port

pytestmark = pytest.mark.net

TLS = make_tls_identity()


@dataclasses.dataclass
class House:
    """A run with three aggregators, and folders for their ledgers."""

    path: Path
    signed: SignedRun
    keys: list[PrivateKey]
    genesis: RoundRecord

    @property
    def run(self) -> RunConfig:
        return self.signed.config

    def ledger(self, name: str, records: list[RoundRecord]) -> RunFolder:
        folder = Home(self.path / name).run(self.run.run_id)
        folder.states.save(initial_state(self.run.model), self.run.layout, {})
        for record in records:
            append_record(folder, record)
        return folder

    def invite(self, port: int, number: int = 0) -> Invite:
        return Invite(self.run.run_id, self.keys[number].public, TLS.fingerprint, (f"127.0.0.1:{port}",), ())

    def ad(self, number: int, port: int, expires_s: int | None = None) -> bytes:
        ad = Ad((f"127.0.0.1:{port}",), TLS.fingerprint, 0, self.genesis.digest)
        return sign_ad(self.run.run_id, self.keys[number], ad, expires_s or int(time.time()) + DHT_TTL_S)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    path = tmp_path_factory.mktemp("house")
    standbys = ("127.0.0.1:7702", "127.0.0.1:7703")
    settings = parse_settings(SETTINGS.format(rounds=9, steps=1, grace_s=1.0))
    new_run(settings, path / "run", RunPlace("127.0.0.1", 7700, 7701, standbys))
    folders = [OperatorFolder(path / "run"), *(OperatorFolder(path / "run" / f"standby-{n}") for n in (1, 2))]
    signed, _ = folders[0].load()
    with closing(Home(folders[0].aggregator_home).run(signed.config.run_id)) as store:
        genesis = stored_head(store)
    assert genesis is not None
    return House(path, signed, [load_key(folder.aggregator_home / "key") for folder in folders], genesis)


def null_rounds(
    house: House, after: RoundRecord, count: int, *, epoch: int = 0, by: int = 0, closed_ms: int = 1
) -> list[RoundRecord]:
    records = [after]
    for _ in range(count):
        record = RoundRecord(
            run_id=house.run.run_id,
            round=records[-1].round + 1,
            epoch=epoch,
            previous=records[-1].digest,
            kind=Kind.NULL,
            reason=CloseReason.DEADLINE,
            state_root=after.state_root,
            update_digest=NO_DIGEST,
            opened_ms=0,
            closed_ms=closed_ms,
            entries=(),
        )
        records.append(sign_record(record, house.keys[by]))
    return records[1:]


class Leader(Copy):
    """A ledger that is served as if its aggregator led; it remembers what it was shown."""

    standby = False

    def __init__(self, house: House, folder: RunFolder, number: int, ads: tuple[bytes, ...] = ()) -> None:
        super().__init__(house.signed, folder, house.keys[number], AdBook(house.run.run_id))
        self.records: list[bytes] = []
        self._ads = ads

    async def shown(self, peer: bytes, record: bytes, ad: bytes) -> None:
        self.records.append(record)

    async def watch(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        yield Aggregators(self._ads)
        yield self._closed_event()


class Waiting(Leader):
    standby = True


@asynccontextmanager
async def served(house: House, handler: Leader, number: int, tls: TlsIdentity = TLS) -> AsyncIterator[int]:
    key, spool = house.keys[number], house.path / f"spool-{number}"
    server = await serve(handler, host="127.0.0.1", port=0, key=key, run_id=house.run.run_id, tls=tls, spool=spool)
    try:
        yield server.port
    finally:
        await server.close(0.2)


def finder_of(house: House, path: Path, invite: Invite) -> Finder:
    return Finder(invite, Home(path))


async def learn(finder: Finder, key: PrivateKey) -> None:
    """Connect and watch for a moment, as a peer does."""
    async with await finder.connect(key) as link:
        async for _ in link.watch():
            pass


# ---------------------------------------------------------------- where aggregators are


def test_the_newest_ad_of_each_aggregator_counts_and_forged_ones_do_not(house: House) -> None:
    book, now_s = AdBook(house.run.run_id), int(time.time())
    older, newer = house.ad(0, 1001, now_s - 9999), house.ad(0, 1002, now_s + 60)
    assert book.add(newer)
    assert not book.add(older) and not book.add(newer)
    assert not book.add(house.ad(0, 1002, now_s + 90)), "it says the same for longer"
    assert [place.address for place in book.places()[house.keys[0].public]] == ["127.0.0.1:1002"]
    for bad in (newer[:-1], newer[:-1] + b"\0", house.keys[1].public + newer[32:], b"", bytes(200)):
        with pytest.raises(ProtocolError):
            book.add(bad)
    stranger = sign_ad(house.run.run_id, PrivateKey.generate(), Ad((), bytes(32), 0, bytes(32)), now_s + 60)
    assert not book.add_all([stranger, b"x", house.ad(1, 1003)[:-1]], house.run.aggregators)
    assert book.add_all([b"x", house.ad(1, 1003)], house.run.aggregators)
    assert len(book.signed()) == 2 and len(book.signed(but=house.keys[1].public)) == 1


@pytest.mark.slow
async def test_a_directory_without_bootstraps_is_told_of_once(house: House, tmp_path: Path) -> None:
    dead = bootstrap_multiaddr(PrivateKey.generate().public, "127.0.0.1", free_port())
    invite = dataclasses.replace(house.invite(free_port()), bootstraps=(dead,))
    with capture_logs() as logs:
        finder = await Finder.open(invite, Home(tmp_path))
        try:
            for _ in range(3):
                assert [place.address for place in await finder.places()] == list(invite.addresses)
        finally:
            await finder.close()
    assert [log["event"] for log in logs].count("the directory did not help") == 1


async def test_a_peer_remembers_where_the_standby_is_when_the_leader_is_gone(house: House, tmp_path: Path) -> None:
    key = PrivateKey.generate()
    with (
        closing(house.ledger("remember-0", [house.genesis])) as one,
        closing(house.ledger("remember-1", [house.genesis])) as two,
    ):
        async with served(house, Waiting(house, two, 1), 1) as second:
            async with served(house, Leader(house, one, 0, (house.ad(1, second),)), 0) as first:
                invite = house.invite(first)
                finder = finder_of(house, tmp_path, invite)
                await learn(finder, key)
                async with await finder.connect(key) as link:
                    assert link.aggregator == house.keys[0].public, "one that leads comes before one that waits"
                await finder.close()
            again = finder_of(house, tmp_path, invite)
            async with await again.connect(key) as link:
                assert (link.aggregator, link.standby) == (house.keys[1].public, True)
            with pytest.raises(LinkError):
                await again.connect(key, standby=False)


async def test_a_leader_that_missed_a_takeover_is_passed_over_and_shown_the_record(
    house: House, tmp_path: Path
) -> None:
    key = PrivateKey.generate()
    newer = null_rounds(house, house.genesis, 1, epoch=1, by=1)
    with (
        closing(house.ledger("missed-0", [house.genesis, *null_rounds(house, house.genesis, 3)])) as one,
        closing(house.ledger("missed-1", [house.genesis, *newer])) as two,
    ):
        stale = Leader(house, one, 0)
        async with served(house, stale, 0) as first:
            async with served(house, Leader(house, two, 1, (house.ad(0, first),)), 1) as second:
                finder = finder_of(house, tmp_path, house.invite(second, 1))
                await learn(finder, key)
                assert (await finder.meet(key, newer[0]))[0][1]
                await finder.close()
            assert stale.records == [newer[0].to_bytes()]
            again = finder_of(house, tmp_path, house.invite(first))
            with pytest.raises(LinkError):
                await again.connect(key)
            assert stale.records == [newer[0].to_bytes()] * 2


async def test_who_is_not_named_by_the_run_is_no_aggregator(house: House, tmp_path: Path) -> None:
    stranger = PrivateKey.generate()
    with closing(house.ledger("stranger", [house.genesis])) as folder:
        false = dataclasses.replace(house, keys=[stranger])
        async with served(false, Leader(false, folder, 0), 0) as port:
            finder = finder_of(house, tmp_path, false.invite(port))
            with pytest.raises(ProtocolError) as caught:
                await finder.connect(PrivateKey.generate())
            assert caught.value.code is Code.NOT_AN_AGGREGATOR


# ---------------------------------------------------------------- copies


async def copy(
    house: House, folder: RunFolder, home: Path, handler: Leader, number: int, until: bytes, seconds: float = 20
) -> None:
    """Follow this one until the copy has the record."""
    async with served(house, handler, number) as port:
        finder = finder_of(house, home, house.invite(port, number))
        follower = Follower(house.run, folder, finder, PrivateKey.generate())
        following = asyncio.create_task(follower.follow())
        try:
            async with asyncio.timeout(seconds):
                while (follower.head is None or follower.head.digest != until) and not following.done():  # noqa: ASYNC110 - a test looks from outside
                    await asyncio.sleep(0.02)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def test_a_copy_goes_over_to_a_branch_of_higher_epoch_and_never_back(house: House, tmp_path: Path) -> None:
    ours = null_rounds(house, house.genesis, 4)
    theirs = null_rounds(house, ours[1], 3, epoch=1, by=1)
    with (
        closing(house.ledger("branch-copy", [])) as folder,
        closing(house.ledger("branch-0", [house.genesis, *ours])) as one,
        closing(house.ledger("branch-1", [house.genesis, *ours[:2], *theirs])) as two,
    ):
        await copy(house, folder, tmp_path / "a", Leader(house, one, 0), 0, ours[-1].digest)
        await copy(house, folder, tmp_path / "b", Leader(house, two, 1), 1, theirs[-1].digest)
        kept = [row.digest for row in folder.journal.records(0, 9)]
        assert kept == [record.digest for record in (house.genesis, *ours[:2], *theirs)]
        # The old leader has two more rounds of the lower epoch.
        for record in null_rounds(house, ours[-1], 2):
            append_record(one, record)
        with pytest.raises(TimeoutError):
            await copy(house, folder, tmp_path / "c", Leader(house, one, 0), 0, NO_DIGEST, seconds=2)
        assert [row.digest for row in folder.journal.records(0, 9)] == kept


async def test_a_copy_refuses_a_second_record_of_one_round(house: House, tmp_path: Path) -> None:
    first = null_rounds(house, house.genesis, 2)
    second = null_rounds(house, house.genesis, 3, closed_ms=2)
    with (
        closing(house.ledger("twice-copy", [house.genesis, *first])) as folder,
        closing(house.ledger("twice", [house.genesis, *second])) as one,
    ):
        with pytest.raises(TimeoutError):
            await copy(house, folder, tmp_path, Leader(house, one, 0), 0, second[-1].digest, seconds=2)
        assert stored_head(folder) == first[-1]


# ---------------------------------------------------------------- fencing


async def lead(house: House, folder: RunFolder, number: int, epoch: int = 0) -> Aggregator:
    return Aggregator(house.signed, house.keys[number], folder, epoch=epoch)


async def test_a_leader_stops_for_a_higher_epoch_and_for_its_own_lost_records(house: House) -> None:
    rounds = null_rounds(house, house.genesis, 3)
    peer = PrivateKey.generate().public
    with closing(house.ledger("fence-0", [house.genesis, *rounds[:2]])) as folder:
        for newer in (rounds[2], null_rounds(house, house.genesis, 1, epoch=1, by=1)[0]):
            program = await lead(house, folder, 0)
            await program.shown(peer, rounds[0].to_bytes(), b"")
            assert not program.superseded.done()
            await program.shown(peer, newer.to_bytes(), b"")
            assert program.superseded.result() == newer
            with pytest.raises(ProtocolError) as caught:
                await program.submit(peer, bytes(32), b"")
            assert caught.value.code is not Code.LATE
            await program.close()
        program = await lead(house, folder, 0)
        forged = dataclasses.replace(rounds[2], epoch=7)
        with pytest.raises(ProtocolError):
            await program.shown(peer, forged.to_bytes(), b"")
        assert not program.superseded.done()
        await program.close()


async def test_a_new_leader_yields_as_long_as_it_has_no_record_of_its_own(house: House) -> None:
    rounds = null_rounds(house, house.genesis, 3)
    with closing(house.ledger("yield-1", [house.genesis, *rounds[:2]])) as folder:
        cases = [(rounds[1], True, True), (rounds[2], True, True), (rounds[0], True, False), (rounds[2], False, False)]
        for record, leads, yields in cases:
            program = await lead(house, folder, 1)
            assert program.epoch > 0
            program.consider(record, leads=leads)
            assert program.superseded.done() is yields, (record.round, leads)
            await program.close()


async def test_packets_that_began_from_another_state_are_not_taken_up(house: House) -> None:
    run, sections = house.run, Replica(house.run, torch.device("cpu"), torch.float32).make_contribution()
    with closing(house.ledger("taken-up", [house.genesis])) as folder:
        packets = []
        for base_root in (house.genesis.state_root, bytes(32)):
            packet = make_packet(run, PrivateKey.generate(), 1, base_root, 64, 1, sections)
            folder.blobs.put("packet", packet.header.digest.hex(), packet_to_wire(packet, run))
            folder.journal.add_packet(PacketRow(packet.header.digest, 1, packet.header.peer, 64, 1, 1))
            packets.append(packet.header)
        program = await lead(house, folder, 0)
        assert [program.round.holds(packet.peer, packet.digest) for packet in packets] == [True, False]
        await program.close()
