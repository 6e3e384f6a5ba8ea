"""What a peer offers to others, and how a replica is brought to a record by it: over real sockets."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from structlog.testing import capture_logs

from peer import download
from peer.core import codec
from peer.core.replica import initial_state
from peer.download import Rules, StateLoader
from peer.errors import UserError
from peer.find import Place
from peer.merge import sections_of_update
from peer.net.link import Link
from peer.operator import OperatorFolder
from peer.serving import Donor, serve_others
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, PrivateKey
from protocol.layout import state_root
from protocol.ledger import RoundRecord
from protocol.run import RunConfig
from tests.peer.swarm import free_port
from tests.peer.test_audit import Maker

pytestmark = pytest.mark.net

KEY = PrivateKey.from_bytes(b"d" * 32)
HEAD = 15
Flat = NDArray[np.float32]


class Ledger:
    """A run of some rounds, the state after each of them, and a donor that followed it."""

    def __init__(self, folder: Path) -> None:
        maker = Maker(folder / "run")
        self.run: RunConfig = maker.run
        self.donor = Donor(OperatorFolder(folder / "run").load()[0], folder / "offered")
        self.records, self.states = [maker.record], [maker.flat.copy()]
        for round in range(1, HEAD + 1):
            base_root = maker.record.state_root
            maker.round(round)
            self.records.append(maker.record)
            self.states.append(maker.flat.copy())
            sections: Sequence[bytes] = ()
            if maker.record.update_digest != NO_DIGEST:
                raw = maker.store.blobs.get("update", maker.record.update_digest.hex())
                assert raw is not None
                sections = sections_of_update(raw, maker.record, maker.run)
            self.donor.applied(maker.record, base_root, None if round == 1 else sections, maker.flat)
        maker.store.close()


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return Ledger(tmp_path_factory.mktemp("serving"))


@asynccontextmanager
async def serving(ledger: Ledger, folder: Path) -> AsyncIterator[Place]:
    address = f"127.0.0.1:{free_port()}"
    server, certificate = await serve_others(ledger.donor, address, ledger.run.run_id, KEY, folder)
    try:
        yield Place(address, (KEY.public,), certificate)
    finally:
        await server.close(0.2)


async def open_link(ledger: Ledger, place: Place) -> Link:
    return await Link.open(
        place.address,
        run_id=ledger.run.run_id,
        key=PrivateKey.generate(),
        expect_aggregators=place.aggregators,
        certificate_sha256=place.certificate_sha256,
    )


async def brought_to(ledger: Ledger, folder: Path, record: RoundRecord, held: Flat) -> Flat:
    """Let a replica that holds these parameters be brought to the record by the donor alone."""
    outer = held.copy()

    def adopt(flat: Flat) -> bytes:
        outer[:] = flat
        return state_root(outer)

    def apply(sections: Sequence[bytes]) -> bytes:
        codec.outer_step(torch.from_numpy(outer), ledger.run.layout, sections)
        return state_root(outer)

    async with serving(ledger, folder) as place, await open_link(ledger, place) as link:

        async def fetch(kind: str, digest: bytes, size_max: int) -> bytes:
            return await link.fetch(kind, digest, size_max=size_max)

        async def places() -> list[Place]:
            return [place]

        async def open_source(place: Place) -> Link:
            return await open_link(ledger, place)

        rules = Rules(patience_s=5.0)
        loader = StateLoader(ledger.run, folder / "loading", fetch, places, open_source, rules=rules)
        assert await loader.load(record, outer, adopt, apply) == record.state_root
        loader.forget()
        assert not (folder / "loading").exists()
    return outer


@pytest.mark.parametrize(("round", "replayed"), [(HEAD, 0), (HEAD - 1, 0), (12, 2), (10, 0)])
async def test_a_replica_is_brought_to_a_record(ledger: Ledger, tmp_path: Path, round: int, replayed: int) -> None:
    held = initial_state(ledger.run.model)
    with capture_logs() as logs:
        outer = await brought_to(ledger, tmp_path, ledger.records[round], held)
    assert np.array_equal(outer, ledger.states[round])
    assert [entry["replayed"] for entry in logs if entry["event"] == "state loaded"] == [replayed]


async def test_a_large_state_is_fetched_as_of_a_round_that_sources_keep(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SMALL_STATE_BYTES", 0)
    with capture_logs() as logs:
        outer = await brought_to(ledger, tmp_path, ledger.records[HEAD], initial_state(ledger.run.model))
    assert np.array_equal(outer, ledger.states[HEAD])
    assert [entry["replayed"] for entry in logs if entry["event"] == "state loaded"] == [HEAD - 10]


async def test_a_state_that_is_here_already_is_not_fetched(ledger: Ledger, tmp_path: Path) -> None:
    with capture_logs() as logs:
        await brought_to(ledger, tmp_path, ledger.records[12], ledger.states[10])
    assert not any(entry.get("received") for entry in logs)


async def test_what_nobody_has_is_not_found(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError) as raised:
        await brought_to(ledger, tmp_path, ledger.records[3], ledger.states[12])
    assert raised.value.code == Code.NOT_FOUND


async def test_a_donor_serves_and_does_nothing_else(ledger: Ledger, tmp_path: Path) -> None:
    async with serving(ledger, tmp_path) as place, await open_link(ledger, place) as link:
        head = ledger.records[HEAD]
        assert link.head_record == head.to_bytes()
        assert await link.fetch("record", head.digest, size_max=1 << 20) == head.to_bytes()
        assert (await link.fetch("run", ledger.run.run_id, size_max=1 << 20))[:4] == b"SLRN"
        for kind, digest in (("packet", head.entries[0].packet_digest), ("record", bytes(32)), ("key", bytes(32))):
            with pytest.raises(ProtocolError) as raised:
                await link.fetch(kind, digest, size_max=1 << 20)
            assert raised.value.code == Code.NOT_FOUND
        with pytest.raises(ProtocolError) as raised:
            await link.submit(head.entries[0].packet_digest, b"x")
        assert raised.value.code == Code.NOT_AN_AGGREGATOR
        assert len([event async for event in link.watch()]) == 1


async def test_old_snapshots_and_updates_go(ledger: Ledger) -> None:
    folder = ledger.donor._states.folder
    assert {path.stem for path in folder.glob("*.pieces")} == {ledger.records[10].state_root.hex()}
    kept = {path.name for path in folder.parent.glob("blobs/update/*/*")}
    assert kept == {ledger.records[round].update_digest.hex() for round in range(10, HEAD + 1)}


async def test_a_port_that_is_taken_is_said(ledger: Ledger, tmp_path: Path) -> None:
    async with serving(ledger, tmp_path) as place:
        with pytest.raises(UserError):
            await serve_others(ledger.donor, place.address, ledger.run.run_id, KEY, tmp_path / "other")
