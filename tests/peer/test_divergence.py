"""A peer whose training diverges sits one round out and goes on."""

import math
from pathlib import Path

import pytest

from peer.client import Client
from protocol.round import MakePacket, ReplicaEvent, TrainInner
from protocol.run import parse_settings
from tests.peer.room import fields, make_run_folder, swarm
from tests.peer.swarm import SETTINGS

pytestmark = [pytest.mark.slow, pytest.mark.net]


class DivergesInTraining(Client):
    """Its parameters are no numbers when the inner steps of round 2 begin."""

    async def _train(self, effect: TrainInner) -> ReplicaEvent:
        if effect.round == 2:
            self._replica.flat.values[0] = math.nan
        return await super()._train(effect)


class DivergesAtTheEnd(Client):
    """Its parameters are no numbers after the last inner step of round 2."""

    async def _make_packet(self, effect: MakePacket) -> ReplicaEvent:
        if effect.round == 2:
            self._replica.flat.values[-1] = math.inf
        return await super()._make_packet(effect)


@pytest.mark.parametrize("kind", [DivergesInTraining, DivergesAtTheEnd])
async def test_a_peer_that_diverged_goes_on_with_the_next_round(tmp_path: Path, kind: type[Client]) -> None:
    run = make_run_folder(tmp_path, parse_settings(SETTINGS.format(rounds=4, steps=4, grace_s=3.0)), quorum=1)
    events = await swarm(tmp_path / "swarm", run, peers=(Client, kind))
    assert fields(events, "round closed", "accepted") == [2, 1, 2, 2]
    assert any("the work of round 2 is lost" in why and "diverged" in why for why in fields(events, "alarm", "why"))
    assert set(fields(events, "finished", "state_root")) == {fields(events, "round closed", "state_root")[-1]}
    assert sorted(fields(events, "finished", "accepted")) == [3, 4]
