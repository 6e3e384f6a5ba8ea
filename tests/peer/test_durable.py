"""A peer that is killed at any moment ends with the bits of one that was not, and no learned value is lost or doubled.

The runs here take a packet of every peer into every round, however long that takes, so a peer that is killed and
started again must make the same packets as in a calm swarm. A packet is a function of residual, moments and outer
parameters, so equal packets in all rounds are equal replicas.
"""

import asyncio
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from peer import keep
from peer.aggregator import Aggregator, HeldState
from peer.client import Client
from peer.core.replica import Replica
from peer.data.prepare import Dataset, prepare
from peer.merge import sections_of_update
from peer.operator import OperatorFolder
from peer.store import Home, RunFolder, atomic_write
from protocol.amendment import Amendments
from protocol.compress import dequantize, to_float32
from protocol.errors import Code
from protocol.identity import NO_DIGEST
from protocol.ledger import CloseReason, Kind, RoundRecord, Verdict
from protocol.packet import check_packet, make_packet
from protocol.round import Close, ReplicaEvent, Submission, TrainInner
from protocol.run import RunConfig, parse_settings
from protocol.wire import packet_from_wire, packet_to_wire
from tests.peer.dying import POINTS
from tests.peer.room import fields, make_run_folder, peer_key, swarm
from tests.peer.swarm import SETTINGS, Event, Swarm, free_port, make_run, run_cli
from tests.peer.test_swarm import finish, ledger

pytestmark = [pytest.mark.slow, pytest.mark.net]

ROOT = Path(__file__).parents[2]
# What the records of the first peer's rounds say.
ROUNDS = 7
REFUSED_ROUND, NULL_ROUND, LATE_ROUND = 3, 4, 5


# The rule of conservation on the disk


class Watched(Client):
    """A peer of which every stored replica stays, as stored-ROUND.safetensors."""

    def _store(self, wire: bytes | None) -> None:
        super()._store(wire)
        assert self._machine.record is not None
        path = self._folder.replica_path
        os.link(path, path.with_name(f"stored-{self._machine.record.round + 1}.safetensors"))


class Late(Watched):
    """It has not yet made its packet when round LATE_ROUND closes."""

    async def _train(self, effect: TrainInner) -> ReplicaEvent:
        done = await super()._train(effect)
        if effect.round == LATE_ROUND:
            self._stop_inner.clear()
            await asyncio.to_thread(self._stop_inner.wait)
        return done


class Strict(Aggregator):
    """It refuses the first peer's packet in one round, and all packets in another."""

    def _settle(self, close: Close, amendments: Amendments) -> tuple[RoundRecord, HeldState]:
        def refused(submission: Submission, code: Code) -> Submission:
            return dataclasses.replace(submission, verdict=Verdict.REFUSED, code=int(code))

        submissions = close.submissions
        if self.round.round == NULL_ROUND:
            nothing = tuple(refused(submission, Code.NO_QUORUM) for submission in submissions)
            return super()._settle(Close(Kind.NULL, CloseReason.DEADLINE, nothing), amendments)
        if self.round.round == REFUSED_ROUND:
            first = peer_key(0).public
            submissions = tuple(
                refused(submission, Code.TOO_LARGE) if submission.peer == first else submission
                for submission in submissions
            )
        return super()._settle(dataclasses.replace(close, submissions=submissions), amendments)


def bits(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return np.frombuffer(tensor.numpy().tobytes(), np.uint8)


class Retold:
    """The life of one peer told again from what it stored, the records and their updates."""

    def __init__(self, folder: Path, number: int) -> None:
        operator = OperatorFolder(folder / "run")
        self.run: RunConfig = operator.load()[0].config
        self.records = ledger(folder / "run")
        self.key = peer_key(number)
        home = folder / f"peer-{number}"
        self.files = {int(path.stem.removeprefix("stored-")): path for path in home.rglob("stored-*.safetensors")}
        self.data: Dataset = prepare(self.run.data, home / "data", {})
        self.aggregator: RunFolder = Home(operator.aggregator_home).run(self.run.run_id)

    def stored(self, round: int) -> tuple[Replica, keep.Kept]:
        """A fresh replica from what was stored in this round."""
        replica = Replica(self.run, torch.device("cpu"), torch.float32)
        kept = keep.load(self.files[round], replica)
        assert kept is not None and kept.record == self.records[round - 1]
        assert kept.state_root == kept.record.state_root
        return replica, kept

    def settle(self, replica: Replica, kept: keep.Kept, record: RoundRecord) -> bool:
        """Settle as the record says, and check the residual value by value; whether the packet counted."""
        if kept.packet is None:
            return False
        packet = packet_from_wire(kept.packet.wire, self.run)
        tensors = check_packet(packet, self.run, round=record.round, base_root=kept.record.state_root)
        places = [tensor.indices + start for tensor, start in zip(tensors, self.run.layout.offsets, strict=False)]
        positions = torch.from_numpy(np.concatenate(places))
        values = to_float32(np.concatenate([dequantize(tensor) for tensor in tensors]))
        stored = load_file(self.files[record.round])
        order = torch.argsort(stored["sent.positions"])
        originals = stored["sent.originals"][order]
        assert torch.equal(stored["sent.positions"][order], positions)
        before = replica.residual.clone()
        accepted = record.accepted(kept.packet.header.digest)
        if accepted:
            replica.commit()
            lacks = originals - torch.from_numpy(values)
            np.testing.assert_array_equal(bits(replica.residual[positions]), bits(lacks), "it lacks what was sent")
        else:
            replica.restore()
            np.testing.assert_array_equal(bits(replica.residual[positions]), bits(originals), "it has all of it back")
        before[positions] = replica.residual[positions]
        np.testing.assert_array_equal(bits(before), bits(replica.residual), "nothing else has changed")
        return accepted

    def apply(self, replica: Replica, record: RoundRecord) -> None:
        sections: list[bytes] = []
        if record.update_digest != NO_DIGEST:
            data = self.aggregator.blobs.get("update", record.update_digest.hex())
            assert data is not None
            sections = list(sections_of_update(data, record, self.run))
        assert replica.apply(sections) == record.state_root

    def work(self, replica: Replica, round: int, base: bytes, *, late: bool) -> bytes | None:
        """Train a round and make its packet, or fold its steps into the residual."""
        inner = self.run.inner
        batches = self.data.training_batches(round, self.key.public, inner.steps, inner.batch_size)
        done = replica.train_steps(round, batches, lambda: False, lambda _steps, _loss: None)
        if late:
            replica.absorb()
            return None
        sections = replica.make_contribution()
        return packet_to_wire(make_packet(self.run, self.key, round, base, done.tokens, done.steps, sections), self.run)


async def test_every_stored_replica_follows_from_the_one_before_and_its_record(tmp_path: Path) -> None:
    settings = parse_settings(SETTINGS.format(rounds=ROUNDS, steps=4, grace_s=3.0))
    run = make_run_folder(tmp_path, settings, quorum=1)
    events = await swarm(tmp_path / "swarm", run, Strict, (Late, Watched))
    assert fields(events, "round closed", "accepted") == [2, 2, 1, 0, 1, 2, 2]
    torch.set_num_threads(1)
    for number, accepted in enumerate(({1, 2, 6, 7}, {1, 2, 3, 5, 6, 7})):
        peer = Retold(tmp_path / "swarm", number)
        with closing(peer.aggregator):
            assert sorted(peer.files) == list(range(1, ROUNDS + 1))
            found = set()
            for round in range(1, ROUNDS):
                replica, kept = peer.stored(round)
                found |= {round} if peer.settle(replica, kept, peer.records[round]) else set()
                peer.apply(replica, peer.records[round])
                after, kept_after = peer.stored(round + 1)
                late = number == 0 and round + 1 == LATE_ROUND
                wire = peer.work(replica, round + 1, kept_after.record.state_root, late=late)
                assert wire == (kept_after.packet.wire if kept_after.packet else None)
                assert replica.state().keys() == after.state().keys()
                for name, tensor in after.state().items():
                    np.testing.assert_array_equal(bits(replica.state()[name]), bits(tensor), f"{name} in {round + 1}")
            found |= {ROUNDS} if peer.settle(*peer.stored(ROUNDS), peer.records[ROUNDS]) else set()
            assert found == accepted


# Processes that are killed

PATIENT_ROUNDS = 9
Story = list[tuple[str, dict[str, str]]]  # of each round: the state root, and the accepted packet of each peer


@dataclasses.dataclass(frozen=True)
class Calm:
    """A run that takes no round without both peers, and how it went when nobody was killed."""

    folder: Path
    story: Story

    def lay_out(self, folder: Path) -> Path:
        """The same run again, with the same keys, as it was before its first round."""
        shutil.copytree(self.folder / "run", folder / "run")
        for number, name in enumerate(("one", "two")):
            home = folder / name
            atomic_write(home / "key", peer_key(number).to_text().encode("ascii"), mode=0o600)
            (home / "data").symlink_to(self.folder / "data")
        return folder / "run"


def story(run: Path) -> Story:
    return [
        (
            record.state_root.hex(),
            {entry.peer.hex(): entry.packet_digest.hex() for entry in record.entries if entry.verdict == 0},
        )
        for record in ledger(run)
    ]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    folder = tmp_path_factory.mktemp("calm")
    text = SETTINGS.format(rounds=PATIENT_ROUNDS, steps=40, grace_s=3.0)
    patient = text.replace("start_peers = 2", "start_peers = 2\nquorum = 2").replace("= 30.0", "= 250.0")
    (folder / "RUN.toml").write_text(patient)
    ports = ("--port", str(free_port()), "--bootstrap-port", str(free_port()))
    made = run_cli("run", "new", str(folder / "RUN.toml"), "--out", str(folder / "run"), *ports)
    assert made.returncode == 0, made.stderr
    (folder / "data").mkdir()
    run = Calm(folder, []).lay_out(folder / "swarm")
    with Swarm(folder / "swarm", run) as swarm:
        aggregator = swarm.aggregator()
        finish([swarm.peer("one"), swarm.peer("two")], aggregator, PATIENT_ROUNDS)
    found = story(run)
    assert [len(packets) for _, packets in found] == [0] + [2] * PATIENT_ROUNDS
    return Calm(folder, found)


def run_two(folder: Path, run: Path, *start: str) -> subprocess.CompletedProcess[str]:
    """Let peer "two" live until it ends by itself; `start` is what Python runs."""
    taste = ("--threads", "1", "--dtype", "float32", "--device", "cpu", "--micro-batch", "4", "--json")
    return subprocess.run(
        [sys.executable, *start, "join", str(run / "invite.txt"), "--home", str(folder / "two"), *taste],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def die(folder: Path, run: Path, point: str, round: int) -> list[Event]:
    """Let peer "two" live until it kills itself; return its events."""
    done = run_two(folder, run, "-m", "tests.peer.dying", point, str(round))
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(400)
def test_a_peer_killed_at_each_point_of_a_round_makes_the_packets_that_it_would_have_made(
    calm: Calm, tmp_path: Path
) -> None:
    run = calm.lay_out(tmp_path)
    with Swarm(tmp_path, run) as swarm:
        aggregator, one = swarm.aggregator(), swarm.peer("one")
        resumed = []
        for round, point in enumerate(POINTS, start=2):
            events = die(tmp_path, run, point, round)
            resumed.append(
                [(event["round"], event["packet"] is not None) for event in events if event["event"] == "resumed"]
            )
            if point == "saving":
                assert list((tmp_path / "two").rglob(".*.tmp")), "it died with half a file"
        two = swarm.peer("two")
        finish([one, two], aggregator, PATIENT_ROUNDS)
    # Each time it goes on from its last packet, whose round may have been settled before it died.
    assert resumed == [[], [(0, True)], [(1, True)], [(3, True)], [(4, True)], [(5, True)]]
    assert story(run) == calm.story
    assert not list((tmp_path / "two").rglob("replica.safetensors"))
    assert not list((tmp_path / "two").rglob(".*.tmp"))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_peers_stopped_at_random_moments_make_the_packets_that_they_would_have_made(
    calm: Calm, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    run = calm.lay_out(tmp_path)
    with Swarm(tmp_path, run) as swarm:
        aggregator = swarm.aggregator()
        peers = {name: swarm.peer(name) for name in ("one", "two")}
        for _ in range(4):
            name = draw.choice(["one", "two"])
            peers[name].wait_event("run")
            time.sleep(draw.uniform(0.0, 2.0))
            if draw.random() < 0.5:
                peers[name].kill()
            else:
                # The first Ctrl+C would send what is done so far; with the second it leaves at once. Two signals of one
                # kind may arrive as one.
                for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
                    os.killpg(peers[name].process.pid, number)
                peers[name].wait_end(15)
            peers[name] = swarm.peer(name)
        finish(list(peers.values()), aggregator, PATIENT_ROUNDS)
    assert story(run) == calm.story, f"seed {seed}"


@pytest.mark.timeout(300)
def test_a_peer_whose_disk_is_full_ends_with_a_remedy_and_goes_on_once_there_is_room(
    calm: Calm, tmp_path: Path
) -> None:
    run = calm.lay_out(tmp_path)
    # Every file but the stored replica is smaller.
    limited = (
        "import resource, sys\n"
        "from peer.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    with Swarm(tmp_path, run) as swarm:
        aggregator, one = swarm.aggregator(), swarm.peer("one")
        done = run_two(tmp_path, run, "-c", limited)
        assert done.returncode == 1 and "error SL803 disk-full" in done.stderr, done.stderr[-3000:]
        assert "replica.safetensors" in done.stderr and "  try: free some space" in done.stderr
        assert not list((tmp_path / "two").rglob("*replica.safetensors*"))
        finish([one, swarm.peer("two")], aggregator, PATIENT_ROUNDS)
    assert story(run) == calm.story


def test_a_peer_that_comes_back_long_after_settles_and_follows(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=10, steps=20)
    with Swarm(tmp_path, run) as swarm:
        aggregator = swarm.aggregator()
        one, two = swarm.peer("one"), swarm.peer("two")
        two.wait_event("stored", 60, round=2)
        two.kill()
        root = aggregator.wait_event("run complete", 60)["state_root"]
        assert one.wait_end(20) == 0
        again = swarm.peer("two")
        finish([again], aggregator, 10)
        assert [event["round"] for event in again.all("resumed")] == [1]
        assert not again.all("state loaded"), "updates led from the stored parameters to the last ones"
        # Nothing is left to do, and the last parameters are at home.
        once_more = swarm.peer("two")
        finish([once_more], aggregator, 10)
        assert once_more.all("state loaded") and not once_more.all("downloading")
    assert ledger(run)[-1].state_root.hex() == root
