"""Overlap in real processes behind a slow link: peers train ahead, and no step is lost or counted twice."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol.ledger import Kind
from tests.chaos.training import READY_S, Swarm, settings_of
from tests.peer.proxy import Faults, proxy_thread

NAMES = ("one", "two")
ROUNDS, STEPS = 6, 6


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_peers_train_ahead_while_packet_and_update_travel(tmp_path: Path) -> None:
    settings = settings_of(rounds=ROUNDS, steps=STEPS, peers=len(NAMES), hidden=64, k=512, grace_s=(20.0, 20.0))
    settings = dataclasses.replace(settings, inner=dataclasses.replace(settings.inner, overlap=True))
    with ExitStack() as stack:
        swarm = stack.enter_context(Swarm(tmp_path, settings))
        swarm.aggregator()
        proxy = stack.enter_context(proxy_thread(swarm.port, Faults(bytes_per_s=24_000.0)))
        for name in NAMES:
            swarm.peer(name, proxy)
        finished = [swarm.children[name].wait_event("finished", READY_S) for name in NAMES]
        records = swarm.records()[1:]
        swarm.check_roots(NAMES)
    assert [record.kind for record in records] == [Kind.APPLIED] * ROUNDS
    assert [entry.inner_steps for record in records for entry in record.entries] == [STEPS] * len(NAMES) * ROUNDS
    tokens = STEPS * settings.inner.batch_size * settings.data.sequence_length
    for event in finished:
        assert event["steps_ahead"] > 0
        assert event["tokens"] == ROUNDS * tokens, "each step was done once"
