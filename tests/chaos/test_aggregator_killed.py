"""An aggregator that is killed wherever it may be loses no packet that has its receipt, and changes no record.

`make chaos` kills it at every boundary and at 200 random moments; here it is at some of them.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from peer.journal import Journal
from tests.chaos.siege import PEERS, Siege, boundaries, kill_at_boundaries, kill_at_random, live_until

pytestmark = [pytest.mark.slow, pytest.mark.net]

SEED = 4
# One of each kind of step at which something is durable or was said; the rest is drawn.
ALWAYS = (
    "before COMMIT packets",
    "after COMMIT packets",
    "before send SubmitReply receipt",
    "after send SubmitReply receipt",
    "after fsync update folder",
    "before COMMIT records",
    "after COMMIT records",
    "before send RoundEvent closed",
    "after send RoundEvent closed",
)


@pytest.mark.timeout(300)
async def test_killed_at_boundaries_of_a_round(tmp_path: Path) -> None:
    siege = Siege(tmp_path, quorum=PEERS)
    places = await boundaries(siege, whole_round=True)
    kinds = {name for name, _ in places}
    assert kinds >= {*ALWAYS, "after fsync states", "before unlink states", "before send SubmitReply go"}, kinds
    draw = random.Random(SEED)
    chosen = [(name, draw.randint(1, sum(name == kind for kind, _ in places))) for name in ALWAYS]
    chosen += draw.sample([place for place in places if place not in chosen], 8)
    assert await kill_at_boundaries(siege, chosen, whole_round=True) == []
    siege.check(SEED)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("quorum", [1, PEERS])
async def test_killed_at_random_moments(tmp_path: Path, quorum: int) -> None:
    siege = Siege(tmp_path, quorum=quorum, grace_s=0.5)
    await kill_at_random(siege, SEED, 8, 1.5)
    siege.check(SEED)


@dataclass(frozen=True)
class Forget:
    """What the journal has of packets is never read."""

    def install(self) -> None:
        Journal.packets = lambda _journal, _round: []  # type: ignore[method-assign,assignment]  # a bug on purpose


async def test_an_aggregator_that_forgets_what_it_took_in_is_caught(tmp_path: Path) -> None:
    siege = Siege(tmp_path, quorum=1)
    async with siege.peers_live():
        spell = await live_until(siege, ("after send SubmitReply receipt", 1), True)
        assert spell.passed()[-1][0] == "after send SubmitReply receipt"
        await siege.rest(spell=Forget())
    with pytest.raises(AssertionError, match="lost"):
        siege.check(SEED)


async def test_the_check_sees_a_lost_packet_and_a_changed_record(tmp_path: Path) -> None:
    siege = Siege(tmp_path, quorum=PEERS)
    async with siege.peers_live():
        await siege.rest()
    siege.check(SEED)
    peer = siege.peers[0]
    peer.receipted[bytes(32)] = 1
    with pytest.raises(AssertionError, match="lost"):
        siege.check(SEED)
    del peer.receipted[bytes(32)]
    changed = bytearray(peer.published[1])
    changed[-1] ^= 1
    peer.published[1] = bytes(changed)
    with pytest.raises(AssertionError, match="published differently"):
        siege.check(SEED)
