"""The chain at a glance, from a folder and from a living aggregator."""

import json
from pathlib import Path

import pytest

from peer.status import status_of_folder
from tests.peer.swarm import Swarm, make_run, run_cli
from tests.peer.test_audit import NULL_ROUND, PEERS, ROUNDS, whole

__all__ = ["whole"]

pytestmark = pytest.mark.net


def test_the_status_of_a_folder(whole: Path) -> None:
    chain = status_of_folder(whole, ROUNDS + 5)
    assert (chain.head, chain.rounds, chain.run, chain.epoch) == (ROUNDS, ROUNDS, "small", 0)
    assert [line.round for line in chain.last] == list(range(ROUNDS + 1))
    null, before, last = chain.last[NULL_ROUND], chain.last[NULL_ROUND - 1], chain.last[-1]
    assert (null.kind, null.reason, null.accepted, null.refused) == ("null", "deadline", 0, PEERS)
    assert null.state_root == before.state_root and last.state_root == chain.state_root
    assert last.accepted == PEERS and last.packet_bytes and last.update_bytes
    shown = run_cli("status", str(whole), "--rounds", "2")
    assert shown.returncode == 0 and f"round {ROUNDS} of {ROUNDS}" in shown.stdout
    assert [int(line.split()[0]) for line in shown.stdout.splitlines()[-2:]] == [ROUNDS - 1, ROUNDS]


def test_a_folder_without_a_ledger(tmp_path: Path) -> None:
    shown = run_cli("status", str(tmp_path))
    assert shown.returncode == 1 and "try:" in shown.stderr


@pytest.mark.slow
def test_the_status_of_a_living_aggregator(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=3, steps=3)
    with Swarm(tmp_path, run) as swarm:
        aggregator = swarm.aggregator()
        before = run_cli("status", str(run / "invite.txt"), "--json")
        assert before.returncode == 0, before.stderr
        assert [line["kind"] for line in json.loads(before.stdout)["last"]] == ["genesis"]
        peers = [swarm.peer("one"), swarm.peer("two")]
        root = aggregator.wait_event("run complete", 90)["state_root"]
        for peer in peers:
            peer.wait_end(30)
        after = run_cli("status", str(run / "invite.txt"), "--json")
        chain = json.loads(after.stdout)
        assert (chain["head"], chain["state_root"]) == (3, root)
        assert [line["accepted"] for line in chain["last"]] == [0, 2, 2, 2]
