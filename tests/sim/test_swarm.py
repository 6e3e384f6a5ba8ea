"""The simulated swarm: seeds in bad weather, and that its checkers see what is planted."""

import dataclasses
from collections.abc import Callable

import pytest

from peer.sim.command import failure_lines
from peer.sim.network import Access
from peer.sim.settings import MBIT, MIXED, Faults, Settings, drawn
from peer.sim.swarm import SimulationError, Swarm, replayed, simulate
from protocol.ledger import Kind, Verdict
from protocol.run import RoundConfig


@pytest.mark.parametrize("seed", range(6))
def test_a_swarm_in_bad_weather_loses_nothing_and_all_agree(seed: int) -> None:
    outcome = simulate(drawn(seed, rounds=20))
    assert sum(outcome.rounds.values()) == 20


def test_a_seed_gives_the_same_events_and_bytes_every_time() -> None:
    first, other = replayed(drawn(7, rounds=12)), simulate(drawn(8, rounds=12))
    assert first.digest != other.digest


def test_a_calm_swarm_learns_and_wastes_nothing() -> None:
    outcome = simulate(Settings(peers=6, rounds=30, stragglers=0.0))
    assert outcome.rounds.keys() <= {"complete", "grace"}
    assert outcome.peer_rounds == 180
    assert min(outcome.accepted / 180, outcome.steps_counted) > 0.95
    assert (outcome.deaths, outcome.crashes, outcome.alarms) == (0, 0, 0)
    assert outcome.losses[-1] < 0.1 < outcome.losses[0]


def stormy(seed: int) -> Settings:
    settings = drawn(seed, rounds=20)
    return dataclasses.replace(settings, faults=dataclasses.replace(MIXED, takeover_s=150.0))


def test_all_kinds_of_faults_happen() -> None:
    outcomes = [simulate(stormy(seed)) for seed in (1, 15, 22)]
    assert {reason for outcome in outcomes for reason in outcome.rounds} >= {"complete", "grace", "deadline"}
    for name in ("deaths", "crashes", "takeovers", "attacks", "alarms"):
        assert sum(getattr(outcome, name) for outcome in outcomes) > 0, name


def test_two_slow_peers_alone_still_train() -> None:
    swarm = Swarm(Settings(peers=2, rounds=12, stragglers=1.0, inner_s=20.0))
    swarm.go()
    records = swarm.aggregator.disk.records
    assert sum(record.kind == Kind.APPLIED for record in records) >= 8


def test_a_slow_peer_sends_the_steps_that_it_has_and_holds_nobody_up() -> None:
    swarm = Swarm(Settings(peers=8, rounds=20, stragglers=0.0))
    slow = swarm.peers[-1]
    slow.step_s *= 3
    outcome = swarm.go()
    entries = [entry for record in swarm.aggregator.disk.records for entry in record.entries]
    steps = [e.inner_steps for e in entries if e.peer == slow.key.public and e.verdict == Verdict.ACCEPTED]
    assert len(steps) >= 12
    assert all(count < 10 for count in steps)
    assert outcome.inner_share > 0.5


def test_whoever_trains_ahead_waits_less_and_all_steps_count() -> None:
    slow = Settings(peers=6, rounds=15, stragglers=0.0, access=Access(300.0, 3e3))
    waits, trains = simulate(slow), simulate(dataclasses.replace(slow, overlap=True))
    assert trains.inner_share > waits.inner_share + 0.1
    assert trains.steps_counted > 0.8
    assert trains.losses[-1] < 0.5 < trains.losses[0]


def test_with_overlap_packets_keep_all_their_steps_and_rounds_are_shorter() -> None:
    rules = RoundConfig(quorum=5, grace_s_min=1.0, grace_s_max=120.0, deadline_s=630.0, start_peers=10)
    line = Access(10 * MBIT, 100 * MBIT)
    waits = Settings(peers=20, rounds=25, stragglers=0.0, access=line, inner_s=120.0, rules=rules, k=64, values=10**9)
    trains = Swarm(dataclasses.replace(waits, overlap=True))
    went = trains.go()
    entries = [entry for record in trains.aggregator.disk.records for entry in record.entries]
    steps = [entry.inner_steps for entry in entries if entry.verdict == Verdict.ACCEPTED]
    assert len(steps) > 0.95 * 20 * 25 and sum(steps) > 0.9 * len(steps) * trains.run.inner.steps
    assert went.virtual_s < 0.9 * simulate(waits).virtual_s


def test_a_round_below_quorum_is_null_and_its_packets_go_back() -> None:
    rules = RoundConfig(quorum=5, grace_s_min=1.0, grace_s_max=10.0, deadline_s=30.0, start_peers=1)
    outcome = simulate(Settings(peers=4, rounds=5, rules=rules, stragglers=0.0))
    assert outcome.rounds == {"null": 5}
    assert outcome.accepted == 0
    assert outcome.losses[-1] == outcome.losses[0]


def test_a_replica_whose_state_is_damaged_says_so_and_heals() -> None:
    swarm = Swarm(Settings(peers=4, rounds=12, stragglers=0.0))

    def damage() -> None:
        swarm.peers[1].replica.outer[5] += 1.0

    swarm.clock.after(40.0, damage)
    assert swarm.go().alarms == 1


# Each damage is done once, in the middle of a run, and one checker or another has to see it.


def _drain(swarm: Swarm) -> None:
    swarm.peers[0].replica.residual.zero_()


def _forget_a_packet(swarm: Swarm) -> None:
    swarm.aggregator.round._accepted.popitem()


def _lose_a_record(swarm: Swarm) -> None:
    swarm.aggregator.disk.records.pop()
    swarm.aggregator.crash()


def _change_the_state(swarm: Swarm) -> None:
    swarm.aggregator.state[3] += 1.0


def _stop(swarm: Swarm) -> None:
    swarm.aggregator.crash(away_s=1e9)


@pytest.mark.parametrize(
    ("damage", "checkers"),
    [
        (_drain, {"conservation"}),
        (_forget_a_packet, {"receipt"}),
        (_lose_a_record, {"one record a round"}),
        (_change_the_state, {"merge"}),
        (_stop, {"progress"}),
    ],
)
def test_a_checker_sees_the_damage(damage: Callable[[Swarm], None], checkers: set[str]) -> None:
    swarm = Swarm(Settings(peers=4, rounds=12, seed=3))

    def wait() -> None:
        open_packets = sum(peer.disk.packet is not None for peer in swarm.peers)
        for standby in swarm.standbys:
            standby.over = True  # lest one of them makes up for it
        round = swarm.aggregator.round
        if round.round > 5 and open_packets >= 2 and len(round._accepted) >= 2 and not round.closed:
            damage(swarm)
        else:
            swarm.clock.after(0.1, wait)

    swarm.clock.after(0.0, wait)
    with pytest.raises(SimulationError) as caught:
        swarm.go()
    assert caught.value.checker in checkers, caught.value


def test_a_failure_says_seed_time_checker_last_events_and_how_to_replay_it() -> None:
    swarm = Swarm(Settings(peers=4, rounds=12, seed=3))
    swarm.clock.after(60.0, lambda: _drain(swarm))
    with pytest.raises(SimulationError) as caught:
        swarm.go()
    *events, verdict, replay = failure_lines(caught.value, "sparseloco-peer simulate --seed 3 --trace")
    assert len(events) > 30
    assert any("Settle round=" in line for line in events)
    assert verdict.startswith(f"seed 3 failed at t={caught.value.now_s:.3f} s: conservation: ")
    assert replay == "replay it: sparseloco-peer simulate --seed 3 --trace"


def test_the_story_is_told_in_the_style_of_the_scenarios() -> None:
    lines: list[str] = []
    simulate(Settings(peers=2, rounds=2, stragglers=0.0), lines.append)
    shapes = [line.partition(" ")[0] for line in lines if line.startswith("t=")]
    assert len(shapes) > 20
    assert any(line.startswith("    TrainInner round=1 steps=10") for line in lines)
    assert any(" A0 Arrived peer=" in line for line in lines)


def test_faults_are_off_unless_asked_for() -> None:
    assert Settings().faults == Faults()
    assert all(value > 0 for value in dataclasses.astuple(MIXED))
