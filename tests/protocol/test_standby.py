import random

import pytest

from protocol.ledger import RoundRecord
from protocol.round import Tick, WakeAt
from protocol.run import OuterConfig, RunConfig, RunSettings
from protocol.standby import (
    LEASE_S_MAX,
    LEASE_S_MIN,
    Heard,
    Recorded,
    Standby,
    StandbyEffect,
    TakeOver,
    lease_s_of,
    next_epoch,
)
from tests.protocol.codec_samples import make_run
from tests.protocol.transcripts import Player

KEYS = tuple(sorted(bytes([number]) * 32 for number in range(5)))


def run_of(aggregators: tuple[bytes, ...], rounds: int = 60) -> RunConfig:
    run = make_run()
    settings = RunSettings("standby", outer=OuterConfig(rounds=rounds))
    made = RunConfig.of(
        settings, operator=run.operator, aggregators=run.aggregators, layout=run.layout, genesis_root=bytes(32)
    )
    # The machine only compares keys, and these are easier to read than points of the curve.
    object.__setattr__(made, "aggregators", aggregators)
    return made


class Ledger:
    """Records of one chain after the other, signed by whoever leads."""

    def __init__(self) -> None:
        self._player = Player()

    def record(self, round: int, *, after: str = "", epoch: int = 0, seconds: float = 20, by: int = 0) -> RoundRecord:
        fields = {"round": str(round), "root": f"s{round}", "epoch": str(epoch), "seconds": str(seconds)}
        if after:
            fields["after"] = after
        record = self._player._record(fields)
        object.__setattr__(record, "aggregator", KEYS[by])
        self._player.records[f"r{round}e{epoch}"] = record
        return record


def ticks(standby: Standby, seconds: list[float]) -> list[tuple[float, StandbyEffect]]:
    return [(at_s, effect) for at_s in seconds for effect in standby.handle(Tick(), at_s)]


def test_a_standby_takes_over_when_the_lease_of_one_round_is_over() -> None:
    ledger, standby = Ledger(), Standby(run_of(KEYS[:2]), KEYS[1])
    r4 = ledger.record(4)
    assert standby.handle(Recorded(r4), 0.0) == ()
    assert standby.handle(Heard(r4), 1.0) == (WakeAt(21.0),)
    assert standby.handle(Heard(r4), 6.0) == (WakeAt(26.0),)
    assert standby.handle(Tick(), 21.0) == ()
    assert standby.handle(Tick(), 26.0) == (TakeOver(1),)
    assert standby.handle(Tick(), 99.0) == (), "it takes over once"


def test_a_standby_that_heard_nobody_since_it_was_started_waits_for_ever() -> None:
    standby = Standby(run_of(KEYS[:2]), KEYS[1], lease_s=10)
    standby.handle(Recorded(Ledger().record(4)), 0.0)
    assert ticks(standby, [10.0, 1000.0, 1e6]) == []


def test_a_standby_takes_over_one_round_behind_but_not_two() -> None:
    ledger = Ledger()
    r4 = ledger.record(4)
    r5 = ledger.record(5, after="r4e0")
    r6 = ledger.record(6, after="r5e0")
    for newest, effects in ((r5, [(10.0, TakeOver(1))]), (r6, [])):
        standby = Standby(run_of(KEYS[:2]), KEYS[1], lease_s=10)
        standby.handle(Recorded(r4), 0.0)
        standby.handle(Heard(newest), 0.0)
        assert ticks(standby, [10.0]) == effects


def test_the_copy_may_catch_up_after_the_lease_is_over() -> None:
    ledger = Ledger()
    r4 = ledger.record(4)
    r5 = ledger.record(5, after="r4e0")
    r6 = ledger.record(6, after="r5e0")
    standby = Standby(run_of(KEYS[:2]), KEYS[1], lease_s=10)
    standby.handle(Recorded(r4), 0.0)
    standby.handle(Heard(r6), 0.0)
    assert standby.handle(Recorded(r5), 11.0) == (TakeOver(1),)


def test_a_copy_of_a_branch_that_was_given_up_does_not_lead() -> None:
    ledger = Ledger()
    r9 = ledger.record(9)
    other = ledger.record(8, epoch=1, by=1)
    standby = Standby(run_of(KEYS[:3]), KEYS[2], lease_s=10)
    standby.handle(Recorded(r9), 0.0)
    standby.handle(Heard(other), 0.0)
    assert ticks(standby, [1e6]) == []


def test_nobody_takes_over_a_complete_run() -> None:
    standby = Standby(run_of(KEYS[:2], rounds=4), KEYS[1], lease_s=10)
    r4 = Ledger().record(4)
    standby.handle(Recorded(r4), 0.0)
    standby.handle(Heard(r4), 0.0)
    assert ticks(standby, [1e6]) == []


def test_standbys_wait_for_each_other_and_never_share_an_epoch() -> None:
    r4 = Ledger().record(4, by=2)
    taken: list[tuple[float, int]] = []
    for key in (KEYS[0], KEYS[1], KEYS[3], KEYS[4]):
        standby = Standby(run_of(KEYS), key, lease_s=10)
        standby.handle(Recorded(r4), 0.0)
        standby.handle(Heard(r4), 0.0)
        for at_s, effect in ticks(standby, [float(second) for second in range(100)]):
            if isinstance(effect, TakeOver):
                taken.append((at_s, effect.epoch))
    assert sorted(taken) == [(10.0, 1), (20.0, 3), (30.0, 4), (40.0, 5)]


def test_a_standby_that_hears_of_a_takeover_gives_the_new_leader_its_lease() -> None:
    ledger = Ledger()
    r4 = ledger.record(4)
    r5 = ledger.record(5, after="r4e0", epoch=1, by=1)
    standby = Standby(run_of(KEYS[:3]), KEYS[2], lease_s=10)
    standby.handle(Recorded(r4), 0.0)
    standby.handle(Heard(r4), 0.0)
    standby.handle(Heard(r4), 12.0)  # the first standby leads, and has no record yet
    standby.handle(Heard(r5), 15.0)
    standby.handle(Recorded(r5), 16.0)
    assert ticks(standby, [20.0, 24.9, 25.0]) == [(25.0, TakeOver(2))], "the first lease is that of the new leader"


@pytest.mark.parametrize("seed", range(20))
def test_epochs_of_different_aggregators_never_meet(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 64)
    aggregators = [bytes([number]) for number in range(count)]
    owners: dict[int, bytes] = {}
    for _ in range(200):
        key, epoch = draw.choice(aggregators), draw.randrange(500)
        own = next_epoch(aggregators, key, epoch)
        assert epoch < own <= epoch + count
        assert owners.setdefault(own, key) == key, f"seed {seed}"


def test_a_lease_is_as_long_as_a_round_within_bounds() -> None:
    ledger = Ledger()
    for seconds, lease_s in ((0, LEASE_S_MIN), (3, LEASE_S_MIN), (25, 25.0), (3600, LEASE_S_MAX)):
        assert lease_s_of(ledger.record(1, seconds=seconds)) == lease_s
