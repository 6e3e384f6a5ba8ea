"""Swarms of real processes on the loopback interface, with TLS and the directory, through the command line."""

import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from peer.store import Home, load_key
from protocol.identity import NO_DIGEST
from protocol.ledger import RoundRecord, Verdict, check_link, check_record
from protocol.run import SignedRun
from tests.peer.swarm import Program, Swarm, make_run

pytestmark = [pytest.mark.slow, pytest.mark.net]


def ledger(run_folder: Path) -> list[RoundRecord]:
    """All records of the aggregator, each checked against the run and the one before it."""
    run = SignedRun.from_bytes((run_folder / "run.bin").read_bytes(), run_id=None).config
    store = Home(run_folder / "aggregator").run(run.run_id)
    try:
        head = store.journal.head()
        assert head is not None
        records = [RoundRecord.from_bytes(row.data) for row in store.journal.records(0, head.round)]
    finally:
        store.close()
    assert [record.round for record in records] == list(range(len(records)))
    for record in records:
        check_record(record, run)
    for previous, record in pairwise(records):
        check_link(previous, record)
    return records


def accepted_rounds(records: list[RoundRecord], home: Path) -> list[int]:
    peer = load_key(home / "key").public
    return [
        record.round
        for record in records
        if any(entry.peer == peer and entry.verdict == Verdict.ACCEPTED for entry in record.entries)
    ]


def finish(peers: list[Program], aggregator: Program, rounds: int) -> str:
    """Wait until all peers have ended well, and return the state root that all share with the aggregator."""
    root: str = aggregator.wait_event("run complete", 90, rounds=rounds)["state_root"]
    for peer in peers:
        assert peer.wait_end(20) == 0, peer.log.read_text()[-3000:]
        assert [event["state_root"] for event in peer.all("finished")] == [root]
    return root


def children(pid: int) -> set[int]:
    """All living descendants of a process."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)
    found, front = set[int](), {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front} - found
        found |= front
    return found


def interrupt(program: Program) -> None:
    """Press Ctrl+C once, and see the program end with status 0."""
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.wait_end(30) == 0, program.log.read_text()[-3000:]


def test_a_third_peer_joins_late_and_all_end_with_the_same_parameters(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=24, steps=60)
    with Swarm(tmp_path, run) as swarm:
        swarm.bootstrap()
        aggregator = swarm.aggregator()
        peers = [swarm.peer("one"), swarm.peer("two")]
        aggregator.wait_event("round closed", 60, round=2)
        peers.append(swarm.peer("three"))
        root = finish(peers, aggregator, 24)
    records = ledger(run)
    assert records[-1].state_root.hex() == root != records[0].state_root.hex()
    late = accepted_rounds(records, tmp_path / "three")
    assert late and late[0] > 2
    assert 1 in accepted_rounds(records, tmp_path / "one") and 1 in accepted_rounds(records, tmp_path / "two")
    assert any(peer.all("found in the directory") for peer in peers)


def test_a_killed_peer_is_not_waited_for_and_comes_back(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=32, steps=60)
    with Swarm(tmp_path, run) as swarm:
        aggregator = swarm.aggregator()
        one, two = swarm.peer("one"), swarm.peer("two")
        two.wait_event("round", 60, round=2)
        two.kill()
        killed_in = len(aggregator.all("round closed")) + 1
        aggregator.wait_event("round closed", round=killed_in + 1)
        again = swarm.peer("two")
        finish([one, again], aggregator, 32)
    records = ledger(run)
    kept, lost = accepted_rounds(records, tmp_path / "one"), accepted_rounds(records, tmp_path / "two")
    assert killed_in + 1 in kept and killed_in + 1 not in lost
    assert lost[-1] > killed_in + 1, "the peer that came back was accepted again"


def test_control_c_ends_every_program_and_leaves_no_orphan(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=500, steps=20)
    with Swarm(tmp_path, run) as swarm:
        bootstrap, aggregator = swarm.bootstrap(), swarm.aggregator()
        peers = [swarm.peer("one"), swarm.peer("two")]
        programs = [*peers, aggregator, bootstrap]
        aggregator.wait_event("round closed", 60, round=2)
        offspring = set[int]().union(*(children(program.process.pid) for program in programs))
        for program in programs:
            interrupt(program)
        alive = [pid for pid in offspring if Path(f"/proc/{pid}").exists()]
        assert not alive
    assert ledger(run)[-1].round >= 2


def test_a_killed_aggregator_goes_on_where_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=12, steps=20)
    with Swarm(tmp_path, run) as swarm:
        first = swarm.aggregator()
        peers = [swarm.peer("one"), swarm.peer("two")]
        closed = first.wait_event("round closed", 60, round=3)
        first.kill()
        second = swarm.aggregator()
        finish(peers, second, 12)
        assert all(peer.all("connected again") for peer in peers)
    records = ledger(run)
    assert records[3].state_root.hex() == closed["state_root"]
    assert len(records) == 13 and records[-1].update_digest != NO_DIGEST
    assert accepted_rounds(records, tmp_path / "one")[-1] > 4
