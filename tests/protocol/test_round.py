import dataclasses
import itertools
import random
import typing

import pytest

from protocol import round as machines
from protocol.errors import Code
from protocol.ledger import CloseReason, Kind, RoundRecord
from protocol.limits import CONTRIBUTORS_MAX, RECORD_ENTRIES_MAX
from protocol.round import (
    Accept,
    AggregatorRound,
    Alarm,
    Applied,
    ApplyUpdate,
    ArrivalHistory,
    Arrived,
    CatchUp,
    Close,
    Connected,
    Failed,
    InnerDone,
    Joined,
    LoadState,
    Lost,
    MakePacket,
    Opened,
    PacketReady,
    Receipt,
    Recorded,
    Refused,
    Reject,
    ReplicaRound,
    Settle,
    Tick,
    TrainInner,
)
from protocol.run import RoundConfig
from tests.protocol.transcripts import SCENARIOS, Player, named, run_of

RULES = RoundConfig(grace_s_min=2.0, grace_s_max=60.0)
JOBS = (TrainInner, MakePacket, ApplyUpdate, LoadState, CatchUp)


def peer(number: int) -> bytes:
    return number.to_bytes(32, "big")


def arrived(number: int) -> Arrived:
    return Arrived(peer(number), peer(number + 10**6), 5120, 20)


def chain(
    count: int,
    *,
    epoch: int = 0,
    branch: str = "s",
    after: RoundRecord | None = None,
    rollbacks: frozenset[int] = frozenset(),
) -> list[RoundRecord]:
    player = Player()
    first = 0
    if after is not None:
        player.records["r"] = after
        first = after.round + 1
    records = []
    for number in range(first, first + count):
        fields = {"round": str(number), "root": f"{branch}{number}", "epoch": str(epoch)}
        if number:
            fields["after"] = "r"
        if number in rollbacks:
            fields["kind"] = "rollback"
        player.records["r"] = player._record(fields)
        records.append(player.records["r"])
    return records


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.txt")), ids=lambda path: path.stem)
def test_a_scenario_plays_as_it_was_written_down(path: typing.Any) -> None:
    text = path.read_text("utf-8")
    assert Player().play(text) == text, "if the change is meant: python -m tests.protocol.transcripts"


def test_there_are_scenarios_for_both_machines() -> None:
    names = {path.stem.partition("-")[0] for path in SCENARIOS.glob("*.txt")}
    assert names == {"aggregator", "replica"}


@pytest.mark.parametrize("name", ["AggregatorEvent", "AggregatorEffect", "ReplicaEvent", "ReplicaEffect"])
def test_there_are_at_most_eleven_kinds_of_each(name: str) -> None:
    assert len(typing.get_args(getattr(machines, name))) <= 11


# The aggregator's round


def test_the_record_does_not_depend_on_the_order_of_arrival() -> None:
    closings = set()
    for order in itertools.permutations(range(4)):
        machine = AggregatorRound(run_of({"quorum": "4"}), 5, named("s4"), 0.0)
        effects = [effect for number in order for effect in machine.handle(arrived(number), 1.0)]
        closings.add(next(effect for effect in effects if isinstance(effect, Close)))
    assert len(closings) == 1


def test_a_full_round_closes_and_takes_nobody_more() -> None:
    members = frozenset(peer(number) for number in range(CONTRIBUTORS_MAX + 5))
    machine = AggregatorRound(run_of({}), 5, named("s4"), 0.0, members=members)
    for number in range(CONTRIBUTORS_MAX - 1):
        assert machine.handle(arrived(number), 1.0)[0] == Accept(peer(number), peer(number + 10**6))
    close = machine.handle(arrived(CONTRIBUTORS_MAX - 1), 1.0)[1]
    assert isinstance(close, Close)
    assert (close.kind, close.reason, len(close.submissions)) == (Kind.APPLIED, CloseReason.COMPLETE, CONTRIBUTORS_MAX)
    assert machine.handle(arrived(2000), 1.0) == (Reject(peer(2000), peer(2000 + 10**6), Code.LATE),)


def test_bad_packets_never_fill_the_record() -> None:
    machine = AggregatorRound(run_of({"quorum": "2"}), 5, named("s4"), 0.0, members=frozenset({peer(9001), peer(9002)}))
    for number in range(5000):
        assert isinstance(machine.handle(Refused(peer(number), peer(number), Code.BAD_INDEX), 1.0)[0], Reject)
    effects = [*machine.handle(arrived(9001), 2.0), *machine.handle(arrived(9002), 2.0)]
    close = next(effect for effect in effects if isinstance(effect, Close))
    assert len(close.submissions) == RECORD_ENTRIES_MAX - CONTRIBUTORS_MAX + 2


def test_a_packet_is_judged_before_its_bytes_are_read() -> None:
    machine = AggregatorRound(run_of({"quorum": "2"}), 5, named("s4"), 0.0)
    assert machine.refusal(peer(1), named("x")) is None
    machine.handle(arrived(1), 1.0)
    assert machine.refusal(peer(1), peer(1 + 10**6)) is None
    assert machine.refusal(peer(1), named("x")) == Code.DUPLICATE
    machine.handle(arrived(2), 1.0)
    assert machine.closed
    assert machine.refusal(peer(3), named("x")) == Code.LATE


def test_of_two_stored_packets_of_one_peer_the_first_is_taken_up() -> None:
    packets = [arrived(1), dataclasses.replace(arrived(1), digest=named("second"))]
    machine = AggregatorRound(run_of({}), 5, named("s4"), 0.0, taken_up=packets)
    assert machine.refusal(peer(1), packets[0].digest) is None
    assert machine.refusal(peer(1), packets[1].digest) == Code.DUPLICATE


def test_the_next_round_knows_the_members_and_the_arrivals() -> None:
    machine = AggregatorRound(run_of({}), 5, named("s4"), 100.0, members=frozenset({peer(1)}))
    machine.handle(Joined(peer(2)), 101.0)
    machine.handle(arrived(1), 107.0)
    assert machine.closed
    machine.handle(Joined(peer(3)), 108.0)
    after = machine.next(machine.run, named("s5"), 110.0)
    assert (after.round, after.base_root, after.deadline_at_s) == (6, named("s5"), 410.0)
    assert after.members == {peer(1), peer(2), peer(3)}
    assert after.history.arrivals_s == (7.0,)


def test_the_grace_follows_the_arrivals_within_its_bounds() -> None:
    history = ArrivalHistory((10.0, 12.0, 14.0, 16.0, 18.0))
    assert ArrivalHistory().grace_s(5.0, RULES) == 60.0
    assert history.grace_s(10.0, RULES) == 14.0 + 3 * 2.0 - 10.0
    assert history.grace_s(19.9, RULES) == 2.0
    assert ArrivalHistory((1000.0,)).grace_s(5.0, RULES) == 60.0
    # One straggler in the past does not stretch the wait.
    assert history.add([500.0]).grace_s(10.0, RULES) == pytest.approx(15.0 + 3 * 3.0 - 10.0)


def test_the_history_is_bounded_and_a_large_round_does_not_crowd_out_the_others() -> None:
    history = ArrivalHistory().add([1.0] * 10).add([float(number) for number in range(1000)])
    assert len(history.arrivals_s) == 26
    assert (history.arrivals_s[10], history.arrivals_s[-1]) == (0.0, 999.0)
    for _ in range(10):
        history = history.add([2.0] * 16)
    assert history.arrivals_s == (2.0,) * 64


def test_with_overlap_a_round_lasts_nearly_as_long_as_a_packet_takes_however_early_the_first_ones_come() -> None:
    for overlap, length_s in (("yes", 0.9 * 100.0), ("no", 5.0 + 2.0)):
        run = run_of({"overlap": overlap})
        members = frozenset(peer(number) for number in range(3))
        machine = AggregatorRound(run, 5, named("s4"), 0.0, members=members)
        for start_s in (0.0, 100.0, 200.0):
            for number in range(3):
                machine.handle(arrived(number), start_s + 5.0)
            assert machine.closed
            machine = machine.next(run, named("s"), start_s + 100.0)
        machine.handle(arrived(0), 305.0)
        machine.handle(arrived(1), 305.5)
        machine.handle(Tick(), 300.0 + length_s - 0.1)
        assert not machine.closed
        machine.handle(Tick(), 300.0 + length_s)
        assert machine.closed


def test_packets_without_all_their_steps_tell_nothing_of_how_long_one_takes() -> None:
    run = run_of({"overlap": "yes"})
    machine = AggregatorRound(run, 5, named("s4"), 0.0)
    machine.handle(arrived(1), 5.0)
    machine = machine.next(run, named("s5"), 5.0)
    machine.handle(dataclasses.replace(arrived(1), inner_steps=run.inner.steps - 1), 30.0)
    machine = machine.next(run, named("s6"), 30.0)
    machine.handle(arrived(1), 50.0)
    machine = machine.next(run, named("s7"), 50.0)
    assert not machine.history.cycles_s
    machine.handle(arrived(1), 77.0)
    assert machine.history.cycles_s == (27.0,)


def test_who_sent_nothing_in_time_is_asked_for_fewer_steps_and_by_and_by_for_all_again() -> None:
    run = run_of({})
    machine = AggregatorRound(run, 5, named("s4"), 0.0, members=frozenset({peer(1), peer(2)}))
    asked = list[int]()
    for round in range(60):
        machine.handle(arrived(1), 100.0 * round + 2.0)
        if round >= 3:
            machine.handle(arrived(2), 100.0 * round + 3.0)
        machine.handle(Tick(), 100.0 * round + 90.0)
        assert machine.closed
        machine = machine.next(run, named("s"), 100.0 * (round + 1))
        asked.append(machine.steps_for(peer(2)))
        assert machine.steps_for(peer(1)) == run.inner.steps
    assert asked[:3] == [run.inner.steps, int(0.75 * run.inner.steps), int(0.75 * asked[1])]
    assert asked[2:] == sorted(asked[2:]) and asked[-1] == run.inner.steps


def test_a_round_without_quorum_asks_nobody_for_less() -> None:
    run = run_of({"quorum": "2"})
    machine = AggregatorRound(run, 5, named("s4"), 0.0, members=frozenset({peer(1), peer(2)}))
    machine.handle(arrived(1), 2.0)
    machine.handle(Tick(), machine.deadline_at_s)
    assert machine.next(run, named("s4"), 400.0).steps_for(peer(2)) == run.inner.steps


# The replica's rounds


def test_far_behind_the_newest_state_is_loaded_after_the_packet_is_settled() -> None:
    records = chain(80)
    machine = ReplicaRound(run_of({"rounds": "1000"}), record=records[3], packet=(4, named("p4")))
    assert machine.handle(Connected(records[79]), 0.0) == (CatchUp(records[3], records[79]),)
    assert machine.handle(Recorded(tuple(records[4:])), 1.0) == (Settle(4, False), LoadState(records[79]))
    assert machine.handle(Applied(79, records[79].state_root), 2.0) == ()
    near = ReplicaRound(run_of({"rounds": "1000"}), record=records[3])
    near.handle(Connected(records[67]), 0.0)
    assert near.handle(Recorded(tuple(records[4:68])), 1.0) == (ApplyUpdate(records[4]),)


def test_when_the_records_between_are_gone_the_head_is_loaded() -> None:
    records = chain(9)
    machine = ReplicaRound(run_of({}), record=records[3])
    machine.handle(Connected(records[8]), 0.0)
    assert machine.handle(Failed("nobody has them", gone=True), 1.0) == (LoadState(records[8]),)


def test_another_branch_of_the_same_epoch_is_refused_without_asking_over_and_over() -> None:
    records = chain(6)
    other = chain(4, branch="x", after=records[3])
    machine = ReplicaRound(run_of({}), record=records[5])
    assert machine.handle(Recorded((other[3],)), 0.0) == (CatchUp(records[5], other[3]),)
    effects = machine.handle(Recorded(tuple(other[2:])), 1.0)
    assert [type(effect) for effect in effects] == [Alarm]
    assert machine.handle(Tick(), 2.0) == ()


def test_a_branch_of_a_lower_epoch_is_ignored_and_one_of_a_higher_is_followed_from_anywhere() -> None:
    records = chain(6, epoch=1)
    old = chain(5, branch="x", after=records[3])
    machine = ReplicaRound(run_of({}), record=records[5])
    for record in old:
        assert machine.handle(Recorded((record,)), 0.0) == ()
    new = chain(1, epoch=2, branch="n", after=records[2])
    assert machine.handle(Recorded(tuple(new)), 1.0) == (LoadState(new[0]),)
    assert machine.handle(Applied(3, new[0].state_root), 2.0) == ()
    assert machine.record == new[0]


def test_a_takeover_beyond_a_gap_is_followed_from_its_first_record() -> None:
    records = chain(6)
    new = chain(4, epoch=1, branch="n", after=records[5])
    machine = ReplicaRound(run_of({}), record=records[4], packet=(5, named("p5")))
    assert machine.handle(Connected(new[-1]), 0.0) == (CatchUp(records[4], new[-1]),)
    effects = machine.handle(Recorded((records[5], *new)), 1.0)
    assert effects == (Settle(5, False), ApplyUpdate(records[5]))


def test_answers_to_jobs_that_are_not_under_way_change_nothing() -> None:
    records = chain(5)
    machine = ReplicaRound(run_of({}), record=records[4])
    for event in (
        InnerDone(5, 3, 300),
        PacketReady(named("p")),
        Receipt(named("p"), True, 0),
        Applied(4, named("zzz")),
        Failed("late"),
        Lost("again"),
        Tick(),
    ):
        assert machine.handle(event, 0.0) == ()


def random_event(draw: random.Random, records: list[RoundRecord]) -> machines.ReplicaEvent:
    round = draw.randrange(8)
    root = named(f"s{round}") if draw.random() < 0.8 else named("bad")
    packet = named(f"p{round}")
    choices: list[machines.ReplicaEvent] = [
        Connected(draw.choice(records)),
        Lost("x"),
        Opened(round, root, draw.choice([0, 20, 2**32 - 1]), draw.choice([-1.0, 0.0, 50.0, float("inf")])),
        Recorded(tuple(draw.choices(records, k=draw.randrange(1, 4)))),
        Recorded(tuple(records[round : round + 3])),
        InnerDone(round, draw.randrange(3), 100),
        PacketReady(packet),
        Receipt(packet, draw.random() < 0.5, draw.choice([0, Code.BUSY, Code.LATE, 999])),
        Applied(round, root),
        Failed("x", gone=draw.random() < 0.5),
        Tick(),
    ]
    return draw.choice(choices)


@pytest.mark.parametrize("seed", range(300))
def test_no_order_of_events_breaks_the_rules_of_a_replica(seed: int) -> None:
    draw = random.Random(seed)
    good = chain(8, rollbacks=frozenset(draw.sample(range(3, 8), draw.randrange(3))))
    records = [*good, *chain(4, branch="x", after=good[3]), *chain(3, epoch=1, branch="n", after=good[4])]
    overlap = draw.choice(["yes", "no"])
    machine = ReplicaRound(run_of({"overlap": overlap}), record=draw.choice([None, good[2]]))
    job: object = None
    now_s = 0.0
    for _ in range(120):
        now_s += draw.choice([0.0, 0.5, 20.0])
        event = random_event(draw, records)
        under_way = job
        if job is not None and draw.random() < 0.4:
            event = _answer(job, draw)
        settled = False
        for effect in machine.handle(event, now_s):
            if isinstance(effect, JOBS):
                assert machine._job is effect
                if under_way is not None:
                    assert event_ends(event, under_way), f"{effect} beside {under_way}"
                # What a replica owes to a round is settled before its state moves on.
                assert settled or not isinstance(effect, ApplyUpdate | LoadState) or machine._work is None
                assert not isinstance(effect, ApplyUpdate) or effect.record.kind != Kind.ROLLBACK
            settled = settled or isinstance(effect, Settle)
        job = machine._job


def _answer(job: object, draw: random.Random) -> machines.ReplicaEvent:
    match job:
        case TrainInner():
            return InnerDone(job.round, draw.randrange(job.steps + 1), 100)
        case MakePacket():
            return PacketReady(named(f"p{job.round}"))
        case ApplyUpdate() | LoadState():
            root = job.record.state_root if draw.random() < 0.8 else named("bad")
            return Applied(job.record.round, root, draw.choice(RUNS))
        case _:
            return Failed("x")


RUNS = [None, *(run_of({"overlap": "yes"}).amended({"inner.learning_rate": rate}) for rate in (0.1, 0.2))]


def event_ends(event: machines.ReplicaEvent, job: object) -> bool:
    """Whether the event is an answer to this job, so that the next one may begin."""
    match event:
        case Failed():
            return True
        case InnerDone():
            return isinstance(job, TrainInner) and event.round == job.round
        case PacketReady():
            return isinstance(job, MakePacket)
        case Applied():
            return isinstance(job, ApplyUpdate | LoadState) and event.round == job.record.round
        case Recorded():
            return isinstance(job, CatchUp)
        case _:
            return False


def test_an_aggregator_holds_the_packets_that_count_and_no_others() -> None:
    machine = AggregatorRound(run_of({"quorum": "2"}), 5, b"", 0.0, members=frozenset({peer(1)}), taken_up=[arrived(2)])
    machine.handle(arrived(1), 1.0)
    assert machine.holds(peer(1), peer(1 + 10**6)) and machine.holds(peer(2), peer(2 + 10**6))
    assert not machine.holds(peer(1), peer(2 + 10**6)) and not machine.holds(peer(3), peer(3 + 10**6))
