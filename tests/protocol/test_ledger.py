import dataclasses
import struct

import pytest

from protocol.errors import Code
from protocol.identity import NO_DIGEST, PrivateKey, digest
from protocol.ledger import (
    CloseReason,
    Entry,
    Kind,
    RoundRecord,
    Verdict,
    check_link,
    check_record,
    genesis_record,
    sign_record,
)
from protocol.limits import RECORD_BYTES_MAX, RECORD_ENTRIES_MAX
from tests.protocol.codec_samples import KEY, OTHER_KEY, make_run, refused

RUN = make_run()
A, B, C = (bytes([i]) * 32 for i in (1, 2, 3))
ENTRIES = (
    Entry(A, B, Verdict.ACCEPTED, 0, 5120, 20, 1024, 65536),
    Entry(B, A, Verdict.LATE, Code.LATE, 5120, 20, 0, 0),
    Entry(B, B, Verdict.ACCEPTED, 0, 10, 1, 1, 1),
    Entry(C, A, Verdict.REFUSED, Code.BAD_RATIO, 0, 0, 0, 0),
)
GENESIS = genesis_record(RUN, KEY, 1_000)
HEAD_BYTES, ENTRY_BYTES = 204, 85


def make_record() -> RoundRecord:
    return RoundRecord(
        run_id=RUN.run_id,
        round=1,
        epoch=0,
        previous=GENESIS.digest,
        kind=Kind.APPLIED,
        reason=CloseReason.GRACE,
        state_root=C,
        update_digest=A,
        opened_ms=2_000,
        closed_ms=3_500,
        entries=ENTRIES,
        amendment=B,
        loss_micronats=2_345_678,
    )


RECORD = sign_record(make_record(), KEY)
NULL = sign_record(
    dataclasses.replace(
        make_record(),
        kind=Kind.NULL,
        reason=CloseReason.DEADLINE,
        state_root=GENESIS.state_root,
        update_digest=NO_DIGEST,
        entries=(Entry(A, B, Verdict.REFUSED, Code.NO_QUORUM, 5120, 20, 0, 0),),
    ),
    KEY,
)
ROLLBACK = sign_record(dataclasses.replace(NULL, kind=Kind.ROLLBACK, reason=CloseReason.OPERATOR, state_root=C), KEY)


def forged(record: RoundRecord) -> bytes:
    """The bytes of any fields, whether or not they fit each other, under a true signature."""
    unsigned = dataclasses.replace(record, aggregator=KEY.public)
    return dataclasses.replace(unsigned, signature=KEY.sign("record", unsigned._signed_bytes)).to_bytes()


def test_the_bytes_are_those_of_the_specification() -> None:
    expected = b"SLRR" + struct.pack("<HBB", 1, 1, 2) + RUN.run_id + struct.pack("<II", 1, 0)
    expected += GENESIS.digest + C + A + B + struct.pack("<QQIII", 2_000, 3_500, 0, 2_345_678, 4)
    assert len(expected) == HEAD_BYTES
    for e in ENTRIES:
        expected += e.peer + e.packet_digest
        expected += struct.pack("<BHQIHI", e.verdict, e.code, e.tokens, e.inner_steps, e.weight, e.clip)
    expected += KEY.public
    assert RECORD.to_bytes() == expected + KEY.sign("record", expected)
    assert RECORD.digest == digest("record", RECORD.to_bytes())


@pytest.mark.parametrize("record", [GENESIS, RECORD, NULL, ROLLBACK], ids=["genesis", "applied", "null", "rollback"])
def test_a_record_travels_and_is_believed(record: RoundRecord) -> None:
    again = RoundRecord.from_bytes(record.to_bytes())
    assert again == record
    assert again.digest == record.digest
    check_record(again, RUN)


def test_only_accepted_packets_are_accepted() -> None:
    assert [digest_ for digest_ in (A, B, C) if RECORD.accepted(digest_)] == [B]


def test_the_largest_record_fits_the_limit() -> None:
    assert HEAD_BYTES + RECORD_ENTRIES_MAX * ENTRY_BYTES + 96 <= RECORD_BYTES_MAX


def test_a_cut_long_or_foreign_record_is_refused() -> None:
    data = RECORD.to_bytes()
    count = struct.pack("<I", RECORD_ENTRIES_MAX + 1)
    for bad, code in (
        (b"", Code.BAD_MAGIC),
        (b"SLPK" + data[4:], Code.BAD_MAGIC),
        (data[: HEAD_BYTES - 1], Code.TRUNCATED),
        (data[:-1], Code.TRUNCATED),
        (data + b"\0", Code.TRAILING),
        (data[:4] + b"\2\0" + data[6:], Code.VERSION),
        (data[: HEAD_BYTES - 4] + count + data[HEAD_BYTES:], Code.TOO_LARGE),
        (data[:6] + b"\4" + data[7:], Code.BAD_RECORD),
        (data[:7] + b"\5" + data[8:], Code.BAD_RECORD),
        (data[: HEAD_BYTES + 64] + b"\3" + data[HEAD_BYTES + 65 :], Code.BAD_RECORD),
    ):
        with refused(code):
            RoundRecord.from_bytes(bad)


def changed_entry(place: int, **fields: int) -> tuple[Entry, ...]:
    entries = list(ENTRIES)
    entries[place] = dataclasses.replace(entries[place], **fields)  # type: ignore[arg-type]  # fields of any kind
    return tuple(entries)


many = tuple(Entry(i.to_bytes(32, "big"), A, Verdict.ACCEPTED, 0, 1, 1, 1, 1) for i in range(1025))


@pytest.mark.parametrize(
    ("why", "record"),
    [
        ("closed before opened", dataclasses.replace(make_record(), closed_ms=1_999)),
        ("unsorted", dataclasses.replace(make_record(), entries=ENTRIES[::-1])),
        ("twice", dataclasses.replace(make_record(), entries=(ENTRIES[0], ENTRIES[0]))),
        (
            "two accepted of one peer",
            dataclasses.replace(make_record(), entries=(ENTRIES[0], dataclasses.replace(ENTRIES[0], packet_digest=C))),
        ),
        ("too many accepted", dataclasses.replace(make_record(), entries=many)),
        ("applied with nothing accepted", dataclasses.replace(make_record(), entries=ENTRIES[3:])),
        ("applied without update", dataclasses.replace(make_record(), update_digest=NO_DIGEST)),
        ("applied without reason", dataclasses.replace(make_record(), reason=CloseReason.NONE)),
        ("applied as round 0", dataclasses.replace(make_record(), round=0)),
        ("accepted with a code", dataclasses.replace(make_record(), entries=changed_entry(0, code=1))),
        ("accepted without weight", dataclasses.replace(make_record(), entries=changed_entry(0, weight=0))),
        ("accepted with too much weight", dataclasses.replace(make_record(), entries=changed_entry(0, weight=4097))),
        ("accepted without clip", dataclasses.replace(make_record(), entries=changed_entry(0, clip=0))),
        ("accepted with too large a clip", dataclasses.replace(make_record(), entries=changed_entry(0, clip=65537))),
        ("late without a code", dataclasses.replace(make_record(), entries=changed_entry(1, code=0))),
        ("refused with a weight", dataclasses.replace(make_record(), entries=changed_entry(3, weight=1))),
        ("refused with a clip", dataclasses.replace(make_record(), entries=changed_entry(3, clip=1))),
        ("null with an accepted packet", dataclasses.replace(NULL, entries=ENTRIES)),
        ("null with an update", dataclasses.replace(NULL, update_digest=A)),
        ("null before the deadline", dataclasses.replace(NULL, reason=CloseReason.COMPLETE)),
        ("null by the operator", dataclasses.replace(NULL, reason=CloseReason.OPERATOR)),
        ("rollback at the deadline", dataclasses.replace(NULL, kind=Kind.ROLLBACK)),
        ("rollback with an accepted packet", dataclasses.replace(ROLLBACK, entries=ENTRIES)),
        ("rollback with an update", dataclasses.replace(ROLLBACK, update_digest=A)),
        ("a loss of this very round", dataclasses.replace(make_record(), evaluated_round=1)),
        ("no loss of a round", dataclasses.replace(make_record(), round=3, evaluated_round=1, loss_micronats=0)),
        ("genesis with an amendment", dataclasses.replace(GENESIS, amendment=A)),
        ("genesis with a loss", dataclasses.replace(GENESIS, loss_micronats=1)),
        ("genesis later", dataclasses.replace(GENESIS, round=1)),
        ("genesis with a predecessor", dataclasses.replace(GENESIS, previous=A)),
        ("genesis with a reason", dataclasses.replace(GENESIS, reason=CloseReason.COMPLETE)),
        ("genesis with an update", dataclasses.replace(GENESIS, update_digest=A)),
        ("genesis with entries", dataclasses.replace(GENESIS, entries=ENTRIES[3:])),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(why: str, record: RoundRecord) -> None:
    with refused(Code.BAD_RECORD):
        RoundRecord.from_bytes(forged(record))
    with refused(Code.BAD_RECORD):
        sign_record(record, KEY)


def test_a_record_is_believed_for_its_run_and_aggregator_alone() -> None:
    with refused(Code.OTHER_RUN):
        check_record(RECORD, make_run(k=65))
    with refused(Code.NOT_AN_AGGREGATOR):
        check_record(sign_record(make_record(), OTHER_KEY), RUN)
    with refused(Code.BAD_SIGNATURE):
        check_record(dataclasses.replace(RECORD, closed_ms=RECORD.closed_ms + 1), RUN)
    with refused(Code.BAD_RECORD):
        check_record(sign_record(dataclasses.replace(GENESIS, state_root=A), KEY), RUN)
    with refused(Code.NOT_AN_AGGREGATOR):
        check_record(genesis_record(RUN, PrivateKey.generate(), 0), RUN)


def test_records_form_one_chain() -> None:
    check_link(GENESIS, RECORD)
    check_link(GENESIS, NULL)
    check_link(GENESIS, ROLLBACK)
    later = dataclasses.replace(make_record(), round=2, previous=RECORD.digest, epoch=1)
    check_link(RECORD, later)
    for previous, record in (
        (GENESIS, dataclasses.replace(RECORD, round=2)),
        (GENESIS, dataclasses.replace(RECORD, previous=A)),
        (NULL, later),
        (
            dataclasses.replace(GENESIS, epoch=1),
            dataclasses.replace(RECORD, previous=dataclasses.replace(GENESIS, epoch=1).digest),
        ),
    ):
        with refused(Code.BROKEN_CHAIN):
            check_link(previous, record)
    with refused(Code.BAD_STATE):
        check_link(GENESIS, dataclasses.replace(NULL, state_root=C))


def test_every_changed_bit_of_a_record_is_noticed() -> None:
    data = RECORD.to_bytes()
    for bit in range(0, 8 * len(data), 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Exception, match=r"SL\d+"):
            check_record(RoundRecord.from_bytes(bytes(damaged)), RUN)
