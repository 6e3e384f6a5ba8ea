"""Two forms of one update: whichever a peer takes, and whatever an aggregator says of it, the bits are the same."""

import asyncio
import dataclasses
from contextlib import closing
from pathlib import Path

import pytest

from peer.aggregator import Aggregator
from peer.core import codec
from peer.merge import accepted, sections_of_bundle, sections_of_update
from peer.net.messages import RoundClosed, WatchEvent
from peer.operator import OperatorFolder
from peer.replay import replay
from peer.store import Home, RunFolder
from protocol.errors import Code, ProtocolError
from protocol.layout import state_root
from protocol.ledger import RoundRecord
from protocol.limits import WEIGHT_UNIT
from protocol.run import RunConfig, parse_settings
from protocol.wire import bundle_bytes_max, bundle_to_wire
from tests.peer.room import fields, make_run_folder, peer_key, swarm
from tests.peer.swarm import SETTINGS, Event

pytestmark = [pytest.mark.slow, pytest.mark.net]

ROUNDS = 7
PEERS = 2


class UpdatesOnly(Aggregator):
    """An aggregator that never offers a bundle."""

    def _choose_form(self, record: RoundRecord) -> None:
        pass


class BundlesOnly(Aggregator):
    """An aggregator that always offers a bundle, and says that the update is larger."""

    def _choose_form(self, record: RoundRecord) -> None:
        packets = [self._stored_packet(entry) for entry in accepted(record.entries)]
        self._folder.blobs.put("bundle", record.digest.hex(), bundle_to_wire(packets))

    def _closed_event(self) -> RoundClosed:
        event = super()._closed_event()
        return RoundClosed(event.record, event.bundle_bytes + 1, event.bundle_bytes)


class TellsOnePeerLess(BundlesOnly):
    """An aggregator that keeps rounds 2 and 3 from the second peer."""

    def _broadcast(self, event: WatchEvent) -> None:
        told = self._watchers
        if self.head.round in (2, 3):
            self._watchers = {peer: queues for peer, queues in told.items() if peer != peer_key(1).public}
        super()._broadcast(event)
        self._watchers = told


class Liar(BundlesOnly):
    """An aggregator whose bundles are wrong in another way each round; only the last one is good."""

    async def blob(self, kind: str, digest: bytes) -> bytes | Path | None:
        found = await super().blob(kind, digest)
        if kind != "bundle" or not isinstance(found, Path):
            return found
        data = found.read_bytes()
        first_end = 4 + int.from_bytes(data[:4], "little")
        lies = {
            1: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
            2: data[:-1],
            3: None,
            4: data + b"x",
            5: data[first_end:] + data[:first_end],
        }
        return lies.get(self.head.round, data)

    def _closed_event(self) -> RoundClosed:
        event = super()._closed_event()
        huge = bundle_bytes_max(self.run, 2) + 1
        return RoundClosed(event.record, 2 * huge, huge) if self.head.round == 6 else event


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of this file."""
    settings = parse_settings(SETTINGS.format(rounds=ROUNDS, steps=4, grace_s=3.0))
    # So many values that the bundle is the larger form in the first round and the smaller one in the last.
    dense = dataclasses.replace(settings.compression, k=2048)
    return make_run_folder(tmp_path_factory.mktemp("bundle"), dataclasses.replace(settings, compression=dense), PEERS)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> tuple[Path, list[Event]]:
    """A swarm whose aggregator offers what is smaller."""
    folder = tmp_path_factory.mktemp("honest")
    return folder, asyncio.run(swarm(folder, run_folder, Aggregator))


def roots(events: list[Event]) -> list[str]:
    """The state root after each round; both peers ended with the last one, and no packet was missed."""
    assert fields(events, "round closed", "accepted") == [PEERS] * ROUNDS
    found: list[str] = fields(events, "round closed", "state_root")
    assert fields(events, "finished", "state_root") == [found[-1]] * PEERS
    return found


def test_the_aggregator_offers_what_is_smaller_and_peers_take_it(honest: tuple[Path, list[Event]]) -> None:
    _, events = honest
    assert len(set(roots(events))) == ROUNDS
    broadcasts = [event for event in events if event["event"] == "broadcast"]
    forms = ["bundle" if event["bundle_bytes"] < event["update_bytes"] else "update" for event in broadcasts]
    assert (forms[0], forms[-1]) == ("update", "bundle")
    assert [event["form"] for event in broadcasts] == forms
    assert "2 packets together are not smaller" in broadcasts[0]["why"]
    assert "2 packets together are smaller" in broadcasts[-1]["why"]
    sizes = [event[f"{form}_bytes"] for event, form in zip(broadcasts, forms, strict=True)]
    for number, form, size in zip(range(1, ROUNDS + 1), forms, sizes, strict=True):
        taken = [(e["form"], e["bytes"]) for e in events if e["event"] == "round" and e["round"] == number]
        assert taken == [(form, size)] * PEERS, number
    for peer in (event for event in events if event["event"] == "finished"):
        assert peer["bytes_down"] == peer["bundle_bytes"] + peer["update_bytes"] == sum(sizes)
    assert len(fields(events, "kernels", "path")) == PEERS


@pytest.mark.parametrize("kind", [UpdatesOnly, BundlesOnly])
async def test_either_form_leads_to_the_same_roots(
    tmp_path: Path, run_folder: Path, honest: tuple[Path, list[Event]], kind: type[Aggregator]
) -> None:
    events = await swarm(tmp_path, run_folder, kind)
    form = "update" if kind is UpdatesOnly else "bundle"
    assert fields(events, "round", "form") == [form] * PEERS * ROUNDS
    assert roots(events) == roots(honest[1])


async def test_machines_without_kernels_end_with_the_same_roots(
    tmp_path: Path, run_folder: Path, honest: tuple[Path, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "_NATIVE", None)
    events = await swarm(tmp_path, run_folder)
    assert set(fields(events, "kernels", "path")) == {"torch and numpy"}
    assert roots(events) == roots(honest[1])


async def test_a_lying_bundle_costs_bytes_and_nothing_else(
    tmp_path: Path, run_folder: Path, honest: tuple[Path, list[Event]]
) -> None:
    events = await swarm(tmp_path, run_folder, Liar)
    for number in range(1, ROUNDS + 1):
        taken = [event["form"] for event in events if event["event"] == "round" and event["round"] == number]
        assert taken == ["update" if number < ROUNDS else "bundle"] * PEERS, number
    refused = fields(events, "the bundle is no good, so the update is fetched", "round")
    assert sorted(refused) == [number for number in range(1, 6) for _ in range(PEERS)], (
        "the huge one was never asked for"
    )
    assert roots(events) == roots(honest[1])


async def test_a_peer_that_missed_rounds_catches_up_by_their_updates(tmp_path: Path) -> None:
    run = make_run_folder(tmp_path, parse_settings(SETTINGS.format(rounds=5, steps=4, grace_s=3.0)), quorum=1)
    events = await swarm(tmp_path / "swarm", run, TellsOnePeerLess)
    assert fields(events, "round closed", "accepted") == [2, 2, 1, 1, 2]
    forms = {
        number: sorted(event["form"] for event in events if event["event"] == "round" and event["round"] == number)
        for number in range(1, 6)
    }
    missed, heard = ["bundle", "update"], ["bundle", "bundle"]
    assert forms == {1: heard, 2: missed, 3: missed, 4: heard, 5: heard}
    assert fields(events, "finished", "state_root") == [fields(events, "round closed", "state_root")[-1]] * PEERS


def stored(folder: Path) -> tuple[RunConfig, RunFolder]:
    run = OperatorFolder(folder / "run").load()[0].config
    return run, Home(folder / "run" / "aggregator").run(run.run_id)


def test_every_way_in_which_a_bundle_is_wrong_has_its_code(honest: tuple[Path, list[Event]]) -> None:
    run, store = stored(honest[0])
    with closing(store):
        rows = store.journal.records(ROUNDS - 2, ROUNDS)
        before, record, last = (RoundRecord.from_bytes(row.data) for row in rows)
        data = store.blobs.get("bundle", record.digest.hex())
        update = store.blobs.get("update", record.update_digest.hex())
        other = store.blobs.get("bundle", last.digest.hex())
    assert data is not None and update is not None and other is not None
    base = before.state_root
    sections = sections_of_bundle(data, record, base, run)
    assert sections == list(sections_of_update(update, record, run))
    lighter = [dataclasses.replace(entry, weight=entry.weight + 1) for entry in accepted(record.entries)[:1]]
    clipped = dataclasses.replace(record, entries=(*lighter, *record.entries[1:]))
    assert record.entries[0].weight == WEIGHT_UNIT
    cases = [
        (data[:-1], record, base, Code.TRUNCATED),
        (data[:3], record, base, Code.TRUNCATED),
        (b"", record, base, Code.TRUNCATED),
        (data + b"\0", record, base, Code.TRAILING),
        (data + bytes(bundle_bytes_max(run, 2)), record, base, Code.TOO_LARGE),
        (b"\xff" * 4 + data[4:], record, base, Code.TOO_LARGE),
        (other, record, base, Code.WRONG_DIGEST),
        (data, record, bytes(32), Code.WRONG_BASE),
        (data, clipped, base, Code.WRONG_DIGEST),
    ]
    for wrong, of, root, code in cases:
        with pytest.raises(ProtocolError) as caught:
            sections_of_bundle(wrong, of, root, run)
        assert caught.value.code is code


def test_the_ledger_replays_from_updates_and_old_bundles_go_with_their_rounds(
    honest: tuple[Path, list[Event]],
) -> None:
    run, store = stored(honest[0])
    with closing(store):
        *_, (last, flat) = replay(store, run, 0, ROUNDS)
        assert (last, state_root(flat).hex()) == (ROUNDS, roots(honest[1])[-1])
        held = [kind for number in range(1, ROUNDS + 1) for kind, _ in store.journal.blobs_of(number)]
        assert held.count("bundle") == held.count("update") == ROUNDS
        store.forget(keep_rounds=2, blob_bytes_max=0)
        sizes = [store.blobs.size("bundle", row.digest.hex()) > 0 for row in store.journal.records(1, ROUNDS)]
        assert sizes == [False] * (ROUNDS - 2) + [True] * 2
