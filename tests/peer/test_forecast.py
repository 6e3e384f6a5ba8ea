"""The arithmetic of `doctor`, checked by hand and against real packets."""

import dataclasses

import numpy as np
import pytest
import torch

from peer.core.replica import Replica
from peer.forecast import Speeds, Traffic, expected_packet_bytes, expected_traffic, forecast
from protocol.identity import NO_DIGEST, PrivateKey
from protocol.layout import Layout
from protocol.ledger import CloseReason, Kind, RoundRecord
from protocol.packet import make_packet
from protocol.run import CompressionConfig, InnerConfig, RoundConfig, RunConfig
from protocol.wire import packet_to_wire, update_wire_bytes_max
from tests.peer.test_fit import small_replica

FAST = Speeds(step_s=1.0, up_bytes_per_s=1000.0, down_bytes_per_s=2000.0, round_trip_s=0.5)
TRAFFIC = Traffic(packet_bytes=4000.0, down_bytes=6000.0)  # 4 + 2 * 0.5 s up, 3 + 0.5 s down


def run_of(*, overlap: bool = False, k: int = 64, code_bits: int = 2) -> RunConfig:
    return dataclasses.replace(
        small_replica(2, 32).run,
        inner=InnerConfig(steps=10, batch_size=2, overlap=overlap),
        rounds=RoundConfig(quorum=1, grace_s_min=1.0, grace_s_max=5.0, deadline_s=100.0, start_peers=3),
        compression=CompressionConfig(k=k, code_bits=code_bits),
    )


def round_of(length_s: float, reason: CloseReason = CloseReason.GRACE, kind: Kind = Kind.APPLIED) -> RoundRecord:
    opened_ms = 1_000_000
    times = opened_ms, opened_ms + round(1000 * length_s)
    return RoundRecord(NO_DIGEST, 1, 0, NO_DIGEST, kind, reason, NO_DIGEST, NO_DIGEST, *times, ())


def test_a_round_is_training_and_travelling_one_after_the_other() -> None:
    usual = forecast(run_of(), 10, FAST, TRAFFIC, [round_of(30.0)])
    assert (usual.inner_steps, usual.train_s, usual.up_s, usual.down_s) == (10, 10.0, 5.0, 3.5)
    assert usual.open_s == 30.0
    assert usual.round_s == 30.0, "the others take longer"
    assert usual.accepted_per_hour == 120.0


def test_with_overlap_the_longer_of_the_two_counts() -> None:
    for overlap, mine_s in ((False, 18.5), (True, 10.0)):
        usual = forecast(run_of(overlap=overlap), 10, FAST, TRAFFIC, [])
        assert usual.open_s == 100.0, "without rounds the deadline is all that is known"
        assert usual.round_s == mine_s
        assert usual.accepted_per_hour == pytest.approx(3600 / mine_s)


def test_what_is_not_done_in_time_is_left_out() -> None:
    # 0.9 * 15 s - 8.5 s of travelling leave five steps of a second.
    usual = forecast(run_of(), 10, FAST, TRAFFIC, [round_of(15.0)] * 3)
    assert (usual.inner_steps, usual.round_s) == (5, 15.0)
    none = forecast(run_of(), 10, FAST, TRAFFIC, [round_of(9.0)])
    assert (none.inner_steps, none.accepted_per_hour) == (0, 0.0)
    slow_line = dataclasses.replace(FAST, up_bytes_per_s=1.0)
    assert forecast(run_of(overlap=True), 10, slow_line, TRAFFIC, [round_of(15.0)]).inner_steps == 0


def test_a_round_that_was_complete_would_have_waited_and_null_rounds_say_nothing() -> None:
    records = [round_of(6.0, CloseReason.COMPLETE), round_of(100.0, CloseReason.DEADLINE, Kind.NULL)]
    assert forecast(run_of(), 10, FAST, TRAFFIC, records).open_s == 6.0 + 5.0
    assert forecast(run_of(), 10, FAST, TRAFFIC, [round_of(98.0, CloseReason.COMPLETE)]).open_s == 100.0


def test_traffic_is_that_of_the_newest_round_where_there_is_one() -> None:
    run = run_of()
    packet = expected_packet_bytes(run)
    assert expected_traffic(run, 4, 900, 400) == Traffic(100.0, 400.0)
    assert expected_traffic(run, 40, 900, 0) == Traffic(packet, 900.0)
    first = expected_traffic(run, 0, 0, 0)
    assert first == Traffic(packet, min(3 * packet, update_wire_bytes_max(run)))


@pytest.mark.parametrize(("k", "code_bits"), [(64, 2), (64, 1), (512, 2), (4096, 2)])
def test_the_expected_size_is_that_of_real_packets(k: int, code_bits: int) -> None:
    run = dataclasses.replace(small_replica(2, 32).run, compression=CompressionConfig(k=k, code_bits=code_bits))
    replica = Replica(run, torch.device("cpu"), torch.float32)
    batches = [np.random.default_rng(seed).integers(0, 256, (2, 33)) for seed in range(3)]
    replica.train_steps(1, batches, lambda: False, lambda _steps, _loss: None)
    sections = replica.make_contribution()
    packet = make_packet(run, PrivateKey.generate(), 1, run.genesis_root, 192, 3, sections)
    assert expected_packet_bytes(run) == pytest.approx(len(packet_to_wire(packet, run)), rel=0.1)


def test_a_value_costs_as_many_bits_as_was_measured_on_large_models() -> None:
    run = dataclasses.replace(run_of(), layout=Layout.of([("large", (4096, 4096))]))
    assert 9.55 < 8 * expected_packet_bytes(run) / (64 * 4096) < 9.75
