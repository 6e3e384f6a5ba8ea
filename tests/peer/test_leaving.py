"""Pause, limits, finish and Ctrl+C on live processes: what was trained is sent, and the residual survives."""

import hashlib
import json
import signal
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import torch

from peer import keep
from peer.cli import main
from peer.core.replica import Replica
from protocol.ledger import CloseReason
from tests.chaos.nursery import Child
from tests.chaos.training import READY_S, Swarm, settings_of
from tests.peer.swarm import Event

pytestmark = [pytest.mark.slow, pytest.mark.net, pytest.mark.timeout(300)]

NAMES = ("one", "two")
END_S = 20.0  # nobody takes longer to leave
ENDLESS = 100_000  # inner steps: no round ends because they are done


def command(name: str, home: Path, *options: str) -> None:
    assert main([name, "--home", str(home), *options]) == 0


def press_ctrl_c(child: Child) -> None:
    child.signal(signal.SIGINT)


def is_training(child: Child) -> None:
    """Wait until at least one inner step of this life is done."""
    wait_until(lambda: any(event["name"] == "first inner step" for event in child.all("phase")), child)


def wait_until(condition: Callable[[], bool], child: Child) -> None:
    end_s = time.monotonic() + READY_S
    while not condition():
        assert time.monotonic() < end_s and child.process.is_alive(), child.told()
        time.sleep(0.05)


def replica_path(swarm: Swarm, name: str) -> Path:
    return swarm.folder / name / "runs" / swarm.run.run_id.hex() / "replica.safetensors"


def kept(swarm: Swarm, name: str) -> tuple[keep.Kept, float]:
    """What is stored of a peer, and the norm of its residual."""
    replica = Replica(swarm.run, torch.device("cpu"), torch.float32)
    found = keep.load(replica_path(swarm, name), replica)
    assert found is not None
    return found, float(torch.linalg.vector_norm(replica.residual))


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pause_resume_and_caps(tmp_path: Path) -> None:
    settings = settings_of(steps=30, peers=2, hidden=64, k=512, grace_s=(4.0, 30.0))
    with Swarm(tmp_path, settings) as swarm:
        aggregator = swarm.aggregator()
        (tmp_path / "two").mkdir()
        today = {"date": datetime.now().astimezone().date().isoformat(), "bytes": 5_000_000}
        (tmp_path / "two" / "traffic.json").write_text(json.dumps(today))
        two = [swarm.peer(name) for name in NAMES][1]
        two.wait_event("round", READY_S, 2)
        told = [(event["name"], event["seconds"]) for event in two.all("phase")]
        assert [name for name, _ in told] == [
            "find",
            "verify",
            "download",
            "replay",
            "first inner step",
            "first accepted packet",
        ]
        assert all(seconds >= 0 for _, seconds in told) and "Your first contribution counts" in two.told()

        command("pause", tmp_path / "two")
        two.wait_event("paused", READY_S)
        first = swarm.head() + 2  # by then the round is over in which it paused
        aggregator.wait_event("round closed", READY_S, first + 2)
        two.wait_event("round", READY_S, first + 2)  # it follows
        command("resume", tmp_path / "two")
        two.wait_event("resumed", READY_S)
        last = swarm.head()
        swarm.wait_counted("two", 2, READY_S)

        command("limits", tmp_path / "two", "--up-mbit", "0.5")
        two.wait_event("control", READY_S)
        capped = swarm.head() + 3
        two.wait_event("round", READY_S, capped)

        # A day's megabytes that have travelled take it off the line, and more of them bring it back.
        seen = len(aggregator.all("peer left"))
        command("limits", tmp_path / "two", "--mb-a-day", "1")
        wait_until(lambda: len(aggregator.all("peer left")) > seen, two)
        command("limits", tmp_path / "two", "--mb-a-day", "0")
        two.wait_event("connected again", READY_S)
        two.wait_event("round", READY_S, swarm.head() + 1)
        swarm.check_roots(NAMES)
        counted, records = swarm.counted("two"), swarm.records()
        events = two.events()
    quiet = range(first, last + 1)
    assert len(quiet) >= 3 and not set(quiet) & set(counted), "paused, it sends nothing"
    # Nobody waits for a peer that is paused: with its watch it would cost four seconds of grace a round.
    assert {records[round].reason for round in quiet} == {CloseReason.COMPLETE}
    assert max(counted) > last
    took_s = seconds_of_upload(events, capped)
    assert took_s is not None
    seconds, size = took_s
    assert seconds >= 0.9 * size / 62_500, "half a megabit a second"


def seconds_of_upload(events: list[Event], after: int) -> tuple[float, int] | None:
    """How long the packet of a round from `after` on took from the disk to its receipt, and its bytes."""
    stored_at: str | None = None
    for event in events:
        if event["event"] == "stored" and event["round"] >= after:
            stored_at = event["at"]
        if event["event"] == "receipt" and stored_at is not None:
            passed = datetime.fromisoformat(event["at"]) - datetime.fromisoformat(stored_at)
            return passed.total_seconds(), event["bytes"]
    return None


def test_whoever_leaves_sends_what_is_done_and_the_residual_survives(tmp_path: Path) -> None:
    settings = settings_of(steps=ENDLESS, peers=2, grace_s=(1.0, 3.0))
    with Swarm(tmp_path, settings) as swarm:
        aggregator = swarm.aggregator()
        one, two = (swarm.peer(name) for name in NAMES)
        for child in (one, two):
            is_training(child)

        # The first Ctrl+C and `finish` send the steps that there are.
        press_ctrl_c(one)
        assert one.wait_end(END_S) == 0, one.told()
        assert "leaving; Ctrl+C again leaves at once" in one.told() and "finishing: before_leaving=" in one.told()
        assert "The same command goes on." in one.told() and "the first round closes when 2 peers" in one.told()
        command("finish", tmp_path / "two")
        assert two.wait_end(END_S) == 0, two.told()
        aggregator.wait_event("round closed", READY_S, 1)
        assert [child.all("receipt")[-1]["accepted"] for child in (one, two)] == [True, True]
        entries = {entry.packet_digest: entry for entry in swarm.records()[1].entries}
        for name in NAMES:
            stored, norm = kept(swarm, name)
            assert stored.packet is not None and norm > 0
            assert 0 < entries[stored.packet.header.digest].inner_steps < ENDLESS

        # It goes on from there. The second Ctrl+C leaves at once, and what was stored stays as it was.
        one = swarm.peer("one")
        is_training(one)
        assert one.all("resumed") and not one.all("state loaded")
        before = digest_of(replica_path(swarm, "one"))
        one.signal(signal.SIGSTOP)  # so that both are there before it could leave
        press_ctrl_c(one)
        one.signal(signal.SIGTERM)  # the same as Ctrl+C, but two of one kind would arrive as one
        one.signal(signal.SIGCONT)
        assert one.wait_end(END_S) in (128 + signal.SIGINT, 128 + signal.SIGTERM), one.told()
        assert digest_of(replica_path(swarm, "one")) == before

        # With nobody to send it to, the packet is stored and goes out in the next life.
        two = swarm.peer("two")
        is_training(two)
        aggregator.kill()
        press_ctrl_c(two)
        assert two.wait_end(END_S) == 0, two.told()
        stored, _ = kept(swarm, "two")
        assert stored.packet is not None and stored.packet.header.round == 2
        aggregator = swarm.aggregator()
        two = swarm.peer("two")
        assert two.wait_event("receipt", READY_S)["accepted"]
        assert two.all("resumed")[0]["packet"] == stored.packet.header.digest.hex()
        press_ctrl_c(two)
        assert two.wait_end(END_S) == 0, two.told()


def test_a_peer_that_slept_connects_again_at_once(tmp_path: Path) -> None:
    with Swarm(tmp_path, settings_of(steps=30, peers=1, grace_s=(0.5, 3.0))) as swarm:
        swarm.aggregator()
        peer = swarm.peer("one")
        peer.wait_event("round", READY_S, 1)
        peer.signal(signal.SIGSTOP)
        time.sleep(13)
        peer.signal(signal.SIGCONT)
        peer.wait_event("awake again", READY_S)
        peer.wait_event("connected again", READY_S)
        swarm.wait_all(["one"], 2, READY_S)
        swarm.check_roots(["one"])
