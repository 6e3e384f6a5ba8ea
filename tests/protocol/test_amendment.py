"""What the vectors do not show: the interface of amendments, what people are told, and settings by random chains."""

import dataclasses
import random

import pytest

from protocol.amendment import (
    Amendment,
    Amendments,
    Ban,
    ChangeSettings,
    Pause,
    Resume,
    Rollback,
    Unban,
    check_rollback,
    sign_amendment,
)
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, digest
from protocol.ledger import CloseReason, Kind, RoundRecord, genesis_record, sign_record
from protocol.limits import AMENDMENT_BYTES_MAX
from protocol.run import kind_of_setting, sign_run
from tests.protocol.codec_samples import KEY, OTHER_KEY, make_run, refused

RUN = make_run()
PEER = bytes([7]) * 32
ACTIONS = (
    ChangeSettings({"inner.learning_rate": 0.001, "inner.overlap": True, "outer.rule": "mean", "compression.k": 7}),
    Pause(),
    Resume(),
    Rollback(3),
    Ban(PEER),
    Unban(PEER),
)


def chain_of(*items: tuple[int, ChangeSettings | Pause | Resume | Rollback | Ban | Unban]) -> Amendments:
    chain = Amendments(RUN)
    for round, action in items:
        chain = chain.append(sign_amendment(chain.draft(action, round), KEY))
    return chain


def record_at(round: int, chain: Amendments, kind: Kind = Kind.NULL) -> RoundRecord:
    return sign_record(
        RoundRecord(
            run_id=RUN.run_id,
            round=round,
            epoch=0,
            previous=NO_DIGEST,
            kind=kind,
            reason=CloseReason.OPERATOR if kind == Kind.ROLLBACK else CloseReason.DEADLINE,
            state_root=RUN.genesis_root,
            update_digest=NO_DIGEST,
            opened_ms=0,
            closed_ms=0,
            entries=(),
            amendment=chain.head,
        ),
        KEY,
    )


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: type(action).__name__)
def test_an_amendment_travels(action: ChangeSettings) -> None:
    amendment = sign_amendment(Amendments(RUN).draft(action, 5), KEY)
    data = amendment.to_bytes()
    again = Amendment.from_bytes(data, RUN)
    assert again == amendment
    assert again.to_bytes() == data
    assert again.digest == digest("amendment", data)
    assert len(data) <= AMENDMENT_BYTES_MAX


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: type(action).__name__)
def test_every_changed_bit_is_noticed(action: ChangeSettings) -> None:
    data = sign_amendment(Amendments(RUN).draft(action, 5), KEY).to_bytes()
    for bit in range(0, 8 * len(data), 5):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            Amendment.from_bytes(bytes(damaged), RUN)


def test_only_the_operator_amends() -> None:
    amendment = sign_amendment(Amendments(RUN).draft(Pause(), 5), OTHER_KEY)
    with refused(Code.BAD_SIGNATURE):
        Amendment.from_bytes(amendment.to_bytes(), RUN)


def test_without_amendments_the_run_is_the_signed_one() -> None:
    chain = Amendments(RUN)
    assert chain.config_at(9) is RUN
    assert (chain.head, chain.paused_from, chain.rollback_at(9)) == (NO_DIGEST, None, None)
    assert chain.banned_at(9) == frozenset()


def test_an_amended_run_keeps_its_name_and_whoever_signs() -> None:
    amended = RUN.amended({"inner.steps": 5, "outer.alpha": 0.5})
    assert (amended.run_id, amended.operator, amended.layout) == (RUN.run_id, RUN.operator, RUN.layout)
    assert (amended.inner.steps, amended.inner.batch_size) == (5, RUN.inner.batch_size)
    assert amended.outer.alpha_q16 == 1 << 15
    assert amended.nominal_tokens == 5 * RUN.inner.batch_size * RUN.data.sequence_length
    again = amended.amended({"inner.steps": RUN.inner.steps})
    assert (again.run_id, again.outer.alpha) == (RUN.run_id, 0.5)
    assert dataclasses.replace(amended, name="other").run_id == RUN.run_id
    with pytest.raises(AssertionError):
        sign_run(amended, KEY)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inner.learningrate": 0.1}, 'did you mean "inner.learning_rate"'),
        ({"speed": 5}, "table.key"),
        ({"steps": 5}, 'did you mean "inner.steps"'),
        ({"model.hidden_size": 256}, "start a new run"),
        ({"name": "other"}, "start a new run"),
        ({"inner.steps": 0}, "from 1 to 100000"),
        ({"inner.steps": 2.0}, "a whole number"),
        ({"rounds.grace_s_min": 100.0}, "make grace_s_min <= grace_s_max <= deadline_s"),
    ],
)
def test_people_are_told_what_is_wrong_with_a_change(changes: dict[str, int | float | str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RUN.amended(changes)


def test_the_kind_of_a_setting_is_known_by_its_key() -> None:
    keys = ("inner.learning_rate", "inner.steps", "inner.overlap", "outer.rule")
    assert [kind_of_setting(key) for key in keys] == [float, int, bool, str]


def test_a_whole_number_for_a_real_is_written_as_one() -> None:
    assert type(RUN.amended({"outer.alpha": 1}).outer.alpha) is float
    amendment = sign_amendment(Amendments(RUN).draft(ChangeSettings({"outer.alpha": 1}), 2), KEY)
    with refused(Code.BAD_AMENDMENT):
        Amendment.from_bytes(amendment.to_bytes(), RUN)


def test_what_follows_a_digest_can_be_asked_for() -> None:
    chain = chain_of((2, Pause()), (2, Resume()), (4, Ban(PEER)))
    assert chain.after(NO_DIGEST) == chain.chain
    assert chain.after(chain.chain[0].digest) == chain.chain[1:]
    assert chain.after(chain.head) == ()
    with refused(Code.BAD_AMENDMENT):
        chain.after(PEER)


def test_a_record_brings_in_what_holds_after_it() -> None:
    chain = chain_of((3, Ban(PEER)), (4, Rollback(1)))
    known = Amendments(RUN).follow(record_at(2, chain), chain.chain)
    assert known == chain
    assert known.follow(record_at(3, chain), ()) == chain
    with refused(Code.BAD_AMENDMENT):
        Amendments(RUN).follow(record_at(3, chain), chain.chain)
    known.check(record_at(4, chain, Kind.ROLLBACK))
    with refused(Code.BAD_AMENDMENT):
        known.check(record_at(4, chain))


def test_a_rollback_goes_to_the_state_of_its_target() -> None:
    genesis = genesis_record(RUN, KEY, 0)
    check_rollback(record_at(4, Amendments(RUN), Kind.ROLLBACK), genesis)
    with refused(Code.BAD_STATE):
        check_rollback(record_at(4, Amendments(RUN), Kind.ROLLBACK), dataclasses.replace(genesis, state_root=PEER))


@pytest.mark.parametrize("seed", range(30))
def test_the_later_round_overrides_the_earlier_in_whatever_order_they_came(seed: int) -> None:
    draw = random.Random(seed)
    items = [(draw.randrange(1, 9), draw.randrange(1, 99)) for _ in range(draw.randrange(1, 8))]
    chain = chain_of(*((round, ChangeSettings({"inner.steps": steps})) for round, steps in items))
    for round in range(10):
        held = [
            pair for pair in sorted(enumerate(items), key=lambda pair: (pair[1][0], pair[0])) if pair[1][0] <= round
        ]
        assert chain.config_at(round).inner.steps == (held[-1][1][1] if held else RUN.inner.steps)
