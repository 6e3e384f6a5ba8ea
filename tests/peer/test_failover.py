"""A run with two aggregators loses one, then the other: real processes, and no directory to find them in."""

import asyncio
import shutil
import signal
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from peer.aggregator import Aggregator
from peer.audit import audit
from peer.operator import OperatorFolder
from peer.store import Home, RunFolder, load_key
from protocol.ledger import RoundRecord, Verdict, check_link, check_record
from protocol.run import RunConfig, SignedRun
from tests.peer.swarm import SETTINGS, Program, Swarm, free_port, run_cli

pytestmark = [pytest.mark.slow, pytest.mark.net, pytest.mark.timeout(400)]

ROUNDS = 24
DEADLINE_S = 30.0  # as in SETTINGS


def make_run(folder: Path) -> Path:
    """A run with a standby. Its rounds wait for the second peer, but not for ever."""
    (folder / "RUN.toml").write_text(SETTINGS.format(rounds=ROUNDS, steps=80, grace_s=12.0))
    ports = ("--port", str(free_port()), "--bootstrap-port", str(free_port()))
    standby = ("--standby", f"127.0.0.1:{free_port()}")
    made = run_cli("run", "new", str(folder / "RUN.toml"), "--out", str(folder / "run"), *ports, *standby)
    assert made.returncode == 0, made.stderr
    return folder / "run"


def run_of(folder: Path) -> RunConfig:
    return SignedRun.from_bytes((folder / "run.bin").read_bytes(), run_id=None).config


def chain_of(store: RunFolder, run: RunConfig) -> list[RoundRecord]:
    """All records of a folder, checked against the run and each other."""
    head = store.journal.head()
    assert head is not None
    records = [RoundRecord.from_bytes(row.data) for row in store.journal.records(0, head.round)]
    for record in records:
        check_record(record, run)
    for previous, record in pairwise(records):
        check_link(previous, record)
    return records


def counted(record: RoundRecord) -> set[bytes]:
    return {entry.peer for entry in record.entries if entry.verdict == Verdict.ACCEPTED}


async def close_again(folder: Path, run: RunConfig, packets: dict[bytes, tuple[bytes, bytes]]) -> RoundRecord:
    """What the aggregator of this folder makes of the open round, given these packets by digest."""
    operator = OperatorFolder(folder)
    signed, _ = operator.load()
    home = Home(operator.aggregator_home)
    with closing(home.run(run.run_id)) as store:
        program = Aggregator(signed, load_key(home.key_path), store)
        before = program.head.round
        for digest, (peer, wire) in packets.items():
            receipt = await program.submit(peer, digest, wire)
            assert receipt.accepted
        async with asyncio.timeout(2 * DEADLINE_S):
            while program.head.round == before:  # noqa: ASYNC110 - the round closes by itself, after its grace
                await asyncio.sleep(0.05)
        record = RoundRecord.from_bytes(store.journal.records(before + 1, before + 1)[0].data)
        await program.close()
    return record


def standby_of(swarm: Swarm, run: Path, log: str) -> Program:
    program = swarm.start(log, "aggregate", str(run), "--standby")
    program.wait_event("standing by")
    return program


def test_one_aggregator_after_the_other_is_killed_and_the_run_goes_on(tmp_path: Path) -> None:
    run_folder = make_run(tmp_path)
    run, standby_folder = run_of(run_folder), run_folder / "standby-1"
    with Swarm(tmp_path, run_folder) as swarm:
        first = swarm.aggregator()
        second = standby_of(swarm, standby_folder, "standby")
        mirror = swarm.start("mirror", "mirror", str(run_folder / "invite.txt"), "--home", str(tmp_path / "mirror"))
        one, two = swarm.peer("one"), swarm.peer("two")
        second.wait_event("copied", 90, round=2)

        # A packet has its receipt and a copy, while the other peer hangs; then the aggregator and the sender die.
        two.process.send_signal(signal.SIGSTOP)
        copied = second.wait_for(lambda event: event["event"] == "packet copied" and event["round"] > 2, 60)
        lost = copied["round"]
        one.wait_event("receipt", accepted=True)
        first.kill()
        one.kill()
        shutil.copytree(run_folder, tmp_path / "as-it-was")
        two.process.send_signal(signal.SIGCONT)
        second.wait_event("round closed", 2 * DEADLINE_S, round=lost)

        # Back again, the first one hears of the second one's epoch before it opens anything.
        first = swarm.start("aggregator-again", "aggregate", str(run_folder))
        first.wait_event("superseded", 60)
        first.wait_for(lambda event: event["event"] == "copied" and event["round"] == event["of"] > lost, 60)
        assert not first.all("aggregator ready")
        one = swarm.peer("one")
        one.wait_event("round", 60)
        second.kill()
        first.wait_event("aggregator ready", 2 * DEADLINE_S)
        root = first.wait_event("run complete", 120)["state_root"]
        for peer in (one, two):
            assert peer.wait_end(30) == 0, peer.log.read_text()[-3000:]
            assert [event["state_root"] for event in peer.all("finished")] == [root]
        assert mirror.wait_end(30) == 0, mirror.log.read_text()[-3000:]

    with (
        closing(Home(run_folder / "aggregator").run(run.run_id)) as store,
        closing(Home(tmp_path / "mirror").run(run.run_id)) as copy,
    ):
        records = chain_of(store, run)
        assert len(records) == ROUNDS + 1 and records[-1].state_root.hex() == root
        assert [record.digest for record in chain_of(copy, run)] == [record.digest for record in records]
        for entry in (entry for record in records for entry in record.entries):
            assert copy.blobs.path("packet", entry.packet_digest.hex()) is not None
        packets = {
            entry.packet_digest: (entry.peer, copy.blobs.get("packet", entry.packet_digest.hex()) or b"")
            for entry in records[lost].entries
        }
    epochs = [record.epoch for record in records]
    assert epochs[lost - 1] == 0 < epochs[lost] < epochs[-1], epochs
    assert bytes.fromhex(copied["peer"]) in counted(records[lost]), "its packet had a receipt"
    assert load_key(tmp_path / "two" / "key").public in counted(records[lost])

    for folder in (run_folder, tmp_path / "mirror"):
        for report in audit(folder, None, None, lambda *_: None):
            assert report.passed, "\n".join(report.lines())

    theirs = asyncio.run(close_again(tmp_path / "as-it-was", run, packets))
    ours = records[lost]
    same = ("run_id", "round", "previous", "kind", "state_root", "update_digest", "entries")
    assert [getattr(theirs, name) for name in same] == [getattr(ours, name) for name in same]
