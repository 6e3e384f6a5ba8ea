"""Round records and how they follow each other (SPEC 8)."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from protocol.cases.vector import (
    AGGREGATOR,
    BASE,
    OPERATOR,
    PEER,
    SECOND,
    STRANGER,
    Fields,
    Row,
    Vector,
    make_run,
    noise,
    table,
    text_of,
)
from protocol.errors import Code
from protocol.identity import PrivateKey, digest

ZERO = bytes(32)
RUN = make_run()
TEXT = text_of(RUN)
STATE_1, STATE_2 = bytes([0x51]) * 32, bytes([0x52]) * 32


@dataclass(frozen=True)
class Entry:
    """One entry, in or out of order."""

    peer: bytes = PEER.public
    packet: bytes = noise("packet", 32)
    verdict: int = 0
    code: int = 0
    tokens: int = 64
    steps: int = 4
    weight: int = 1024
    clip: int = 65536

    def to_bytes(self) -> bytes:
        """The 85 bytes of SPEC 8."""
        numbers = (self.verdict, self.code, self.tokens, self.steps, self.weight, self.clip)
        return self.peer + self.packet + struct.pack("<BHQIHI", *numbers)


@dataclass(frozen=True)
class Record:
    """A record of any content, signed by any key. Nothing here minds whether it makes sense."""

    kind: int = 1
    reason: int = 1
    run_id: bytes = RUN.run_id
    round: int = 1
    epoch: int = 0
    previous: bytes = ZERO
    state_root: bytes = STATE_1
    update_digest: bytes = noise("update", 32)
    amendment: bytes = ZERO
    opened_ms: int = 1_700_000_000_000
    closed_ms: int = 1_700_000_060_000
    evaluated_round: int = 0
    loss_micronats: int = 0
    entries: Sequence[Entry] = (Entry(),)
    key: PrivateKey = field(default=AGGREGATOR, repr=False)
    version: int = 1
    count: int | None = None

    @cached_property
    def data(self) -> bytes:
        """The signed bytes."""
        head = b"SLRR" + struct.pack("<HBB", self.version, self.kind, self.reason) + self.run_id
        head += struct.pack("<II", self.round, self.epoch) + self.previous + self.state_root + self.update_digest
        head += self.amendment
        count = len(self.entries) if self.count is None else self.count
        head += struct.pack("<QQIII", self.opened_ms, self.closed_ms, self.evaluated_round, self.loss_micronats, count)
        body = head + b"".join(entry.to_bytes() for entry in self.entries) + self.key.public
        return body + self.key.sign("record", body)

    @property
    def digest(self) -> bytes:
        """What names it."""
        return digest("record", self.data)


GENESIS = Record(0, 0, round=0, state_root=BASE, update_digest=ZERO, entries=(), closed_ms=1_700_000_000_000)
APPLIED = Record(previous=GENESIS.digest)
NULL = Record(2, 3, previous=GENESIS.digest, state_root=BASE, update_digest=ZERO, entries=())
ROLLBACK = replace(NULL, kind=3, reason=4, state_root=STATE_2)
LATE = Entry(STRANGER.public, noise("late", 32), 1, 319, 64, 4, 0, 0)
REFUSED = Entry(SECOND.public, noise("refused", 32), 2, 302, 0, 0, 0, 0)


def ordered(*entries: Entry) -> tuple[Entry, ...]:
    """Entries as a record holds them."""
    return tuple(sorted(entries, key=lambda entry: (entry.peer, entry.packet)))


def many(count: int, verdict: int) -> tuple[Entry, ...]:
    """So many entries of so many peers, which need not be keys."""
    rest = (0, 64, 4, 1024, 65536) if verdict == 0 else (319, 64, 4, 0, 0)
    peers = sorted(noise("peers", 32 * count)[32 * number : 32 * number + 32] for number in range(count))
    return tuple(Entry(peer, peer, verdict, *rest) for peer in peers)


def asked(record: Record | bytes) -> Fields:
    """The fields of a request."""
    return {"run": TEXT, "bytes": record if isinstance(record, bytes) else record.data}


def good_rows() -> Iterator[Row]:
    """Records in order."""
    yield "genesis", "Round 0, from which every chain starts.", asked(GENESIS), None
    yield "applied", "A round with one packet.", asked(APPLIED), None
    yield "null", "A round that closed with too few packets.", asked(NULL), None
    entries = ordered(Entry(), LATE, REFUSED, Entry(packet=noise("twice", 32), verdict=2, code=318, weight=0, clip=0))
    yield "verdicts", "All verdicts, and a second packet of one peer.", asked(replace(APPLIED, entries=entries)), None
    bounds = ordered(Entry(weight=1, clip=1), Entry(STRANGER.public, weight=4096, tokens=2**48))
    yield "bounds", "The least and the largest weight and clip.", asked(replace(APPLIED, entries=bounds)), None
    yield "second-key", "Any of the run's aggregators may sign.", asked(replace(APPLIED, key=SECOND)), None
    listed = replace(NULL, entries=ordered(replace(REFUSED, code=321), LATE))
    yield "null-with-entries", "A null round lists packets, none of them accepted.", asked(listed), None
    for reason, name in ((2, "grace"), (3, "deadline")):
        yield f"reason-{name}", f"Closed by {name}.", asked(replace(APPLIED, reason=reason)), None
    yield "rollback", "The operator took the run back.", asked(ROLLBACK), None
    listed = replace(ROLLBACK, entries=ordered(REFUSED, LATE))
    yield "rollback-with-entries", "A rollback lists packets, none of them accepted.", asked(listed), None
    yield (
        "amendment",
        "It knows an amendment, which is not asked for here.",
        asked(replace(NULL, amendment=STATE_1)),
        None,
    )
    first = replace(APPLIED, evaluated_round=0, loss_micronats=1)
    yield "loss-of-genesis", "The loss of the initial state.", asked(first), None
    late = replace(APPLIED, round=2**32 - 1, epoch=2**32 - 1, opened_ms=2**53 - 1, closed_ms=2**53 - 1)
    late = replace(late, evaluated_round=2**32 - 2, loss_micronats=2**32 - 1)
    yield "largest", "Round and epoch are 32 bits wide.", asked(late), None


def envelope_rows() -> Iterator[Row]:
    """What holds the fields together, and who signed."""
    data = APPLIED.data
    yield "magic", "It begins with SLRR.", asked(b"SLRX" + data[4:]), Code.BAD_MAGIC
    yield "empty", "No bytes have no magic.", asked(b""), Code.BAD_MAGIC
    yield "version", "Version 2 is not this one.", asked(replace(APPLIED, version=2)), Code.VERSION
    yield "head-cut", "The head is not whole.", asked(data[:100]), Code.TRUNCATED
    short = replace(APPLIED, version=2).data[:203]
    yield "length-before-version", "Without a whole head nobody speaks of versions.", asked(short), Code.TRUNCATED
    yield "entry-cut", "The entry is not whole.", asked(data[:240]), Code.TRUNCATED
    yield "signature-cut", "The last byte is missing.", asked(data[:-1]), Code.TRUNCATED
    yield "trailing", "A byte follows.", asked(data + b"\0"), Code.TRAILING
    yield "count-one-more", "It claims an entry more than it has.", asked(replace(APPLIED, count=2)), Code.TRUNCATED
    yield "count-one-less", "It claims an entry less than it has.", asked(replace(APPLIED, count=0)), Code.TRAILING
    yield "count-4097", "At most 4096 entries, whatever is there.", asked(replace(APPLIED, count=4097)), Code.TOO_LARGE
    yield (
        "count-hostile",
        "A declared count is believed of nobody.",
        asked(replace(APPLIED, count=2**32 - 1)),
        Code.TOO_LARGE,
    )
    yield "other-run", "A record of another run.", asked(replace(APPLIED, run_id=ZERO)), Code.OTHER_RUN
    yield "operator", "The operator is no aggregator.", asked(replace(APPLIED, key=OPERATOR)), Code.NOT_AN_AGGREGATOR
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    yield "signature", "One bit of the signature differs.", asked(flipped), Code.BAD_SIGNATURE
    other = data[:60] + bytes([data[60] ^ 1]) + data[61:]
    yield "signed-bytes", "The signature covers the whole record.", asked(other), Code.BAD_SIGNATURE
    stolen = data[:-96] + SECOND.public + data[-64:]
    yield "stolen-signature", "Another aggregator's key above the signature.", asked(stolen), Code.BAD_SIGNATURE
    meaningless = replace(APPLIED, run_id=ZERO, kind=4)
    yield "meaning-first", "The fields are checked before the run.", asked(meaningless), Code.BAD_RECORD
    stranger = replace(APPLIED, run_id=ZERO, key=STRANGER)
    yield "run-before-key", "The run is checked before the signer.", asked(stranger), Code.OTHER_RUN
    forged = replace(APPLIED, key=STRANGER).data[:-1] + b"\0"
    yield "signer-first", "The signer is checked before the signature.", asked(forged), Code.NOT_AN_AGGREGATOR
    unknown = replace(APPLIED, version=2, count=9999)
    yield "version-first", "The version is checked before the number of entries.", asked(unknown), Code.VERSION


def meaning_rows() -> Iterator[Row]:
    """Fields that do not fit each other. All are signed as they stand."""
    accepted = Entry()
    wrong: dict[str, tuple[str, Record]] = {
        "kind": ("No kind 4.", replace(APPLIED, kind=4)),
        "reason": ("No reason 5.", replace(APPLIED, reason=5)),
        "verdict": ("No verdict 3.", replace(APPLIED, entries=ordered(accepted, replace(LATE, verdict=3)))),
        "closed-before-opened": ("Time runs forwards.", replace(APPLIED, opened_ms=2, closed_ms=1)),
        "order": ("Entries ascend by peer.", replace(APPLIED, entries=ordered(accepted, LATE)[::-1])),
        "order-of-packets": (
            "Entries of one peer ascend by packet.",
            replace(APPLIED, entries=ordered(replace(LATE, packet=b"b" * 32), replace(LATE, packet=b"a" * 32))[::-1]),
        ),
        "twice": ("No entry comes twice.", replace(APPLIED, entries=(accepted, accepted))),
        "verdict-apart": (
            "Peer and packet name an entry; another verdict makes no other one.",
            replace(APPLIED, entries=(accepted, replace(LATE, peer=accepted.peer, packet=accepted.packet))),
        ),
        "two-accepted": (
            "Of each peer at most one packet is accepted.",
            replace(APPLIED, entries=ordered(accepted, replace(accepted, packet=b"a" * 32))),
        ),
        "accepted-code": ("An accepted packet has no code.", replace(APPLIED, entries=(replace(accepted, code=319),))),
        "weight-0": ("An accepted packet has a weight.", replace(APPLIED, entries=(replace(accepted, weight=0),))),
        "weight-4097": ("A weight is at most 4096.", replace(APPLIED, entries=(replace(accepted, weight=4097),))),
        "clip-0": ("An accepted packet has a clip factor.", replace(APPLIED, entries=(replace(accepted, clip=0),))),
        "clip-65537": ("A clip factor is at most 65536.", replace(APPLIED, entries=(replace(accepted, clip=65537),))),
        "late-without-code": ("It says why.", replace(APPLIED, entries=ordered(accepted, replace(LATE, code=0)))),
        "late-weight": (
            "A late packet weighs nothing.",
            replace(APPLIED, entries=ordered(accepted, replace(LATE, weight=1))),
        ),
        "refused-clip": ("Nor has it a clip.", replace(APPLIED, entries=ordered(accepted, replace(REFUSED, clip=1)))),
        "genesis-previous": ("Nothing is before the genesis.", replace(GENESIS, previous=STATE_1)),
        "genesis-update": ("No update leads to the genesis.", replace(GENESIS, update_digest=STATE_1)),
        "genesis-reason": ("The genesis has no reason.", replace(GENESIS, reason=3)),
        "genesis-entries": ("The genesis has no entries.", replace(GENESIS, entries=(LATE,))),
        "genesis-round": ("The genesis is round 0.", replace(GENESIS, round=1)),
        "genesis-state": ("The genesis names the run's initial state.", replace(GENESIS, state_root=STATE_1)),
        "round-0-applied": ("Round 0 is the genesis.", replace(APPLIED, round=0)),
        "round-0-null": ("Round 0 is the genesis.", replace(NULL, round=0)),
        "applied-none": ("An applied round has an accepted packet.", replace(APPLIED, entries=ordered(LATE, REFUSED))),
        "applied-empty": ("An applied round has an entry.", replace(APPLIED, entries=())),
        "applied-update": ("An applied round names its update.", replace(APPLIED, update_digest=ZERO)),
        "applied-reason": ("An applied round closed for a reason.", replace(APPLIED, reason=0)),
        "null-accepted": ("A null round accepts nothing.", replace(NULL, entries=(accepted,))),
        "null-update": ("A null round has no update.", replace(NULL, update_digest=STATE_1)),
        "null-complete": ("A null round closes at the deadline.", replace(NULL, reason=1)),
        "null-grace": ("A null round closes at the deadline.", replace(NULL, reason=2)),
        "null-no-reason": ("A null round closes at the deadline.", replace(NULL, reason=0)),
        "null-operator": ("The operator closes rollbacks alone.", replace(NULL, reason=4)),
        "applied-operator": ("The operator closes rollbacks alone.", replace(APPLIED, reason=4)),
        "rollback-deadline": ("The operator closes rollbacks.", replace(ROLLBACK, reason=3)),
        "rollback-no-reason": ("The operator closes rollbacks.", replace(ROLLBACK, reason=0)),
        "rollback-accepted": ("A rollback accepts nothing.", replace(ROLLBACK, entries=(accepted,))),
        "rollback-update": ("A rollback has no update.", replace(ROLLBACK, update_digest=STATE_1)),
        "round-0-rollback": ("Round 0 is the genesis.", replace(ROLLBACK, round=0)),
        "genesis-operator": ("The genesis has no reason.", replace(GENESIS, reason=4)),
        "genesis-amendment": ("The genesis knows no amendment.", replace(GENESIS, amendment=STATE_1)),
        "genesis-loss": ("Nothing was measured before the genesis.", replace(GENESIS, loss_micronats=1)),
        "genesis-evaluated": ("Nothing was measured before it.", replace(GENESIS, evaluated_round=1)),
        "loss-of-itself": ("The loss is of an earlier state.", replace(APPLIED, evaluated_round=1, loss_micronats=1)),
        "loss-of-later": ("The loss is of an earlier state.", replace(NULL, evaluated_round=2, loss_micronats=9)),
        "loss-missing": ("A round without a loss.", replace(APPLIED, round=7, evaluated_round=3)),
    }
    for name, (why, record) in wrong.items():
        yield name, why, asked(record), Code.BAD_RECORD
    crowd = replace(APPLIED, entries=many(1025, 0))
    yield "1025-accepted", "At most 1024 packets are accepted.", asked(crowd), Code.BAD_RECORD


def link_rows() -> Iterator[Row]:
    """Which record may follow which."""
    second = replace(APPLIED, round=2, previous=APPLIED.digest, state_root=STATE_2)
    null = replace(NULL, round=2, previous=APPLIED.digest, state_root=STATE_1)

    def after(previous: Record, record: Record) -> Fields:
        return {"previous": previous.data, "bytes": record.data}

    yield "first", "Round 1 follows the genesis.", after(GENESIS, APPLIED), None
    yield "second", "Round 2 follows round 1.", after(APPLIED, second), None
    yield "null", "A null round keeps the state.", after(APPLIED, null), None
    yield "epoch-higher", "An epoch may be skipped.", after(APPLIED, replace(second, epoch=7)), None
    yield "other-aggregator", "Another aggregator may go on.", after(APPLIED, replace(second, key=SECOND)), None
    back = replace(ROLLBACK, round=2, previous=APPLIED.digest)
    yield "rollback", "A rollback goes to any state as far as its neighbours show.", after(APPLIED, back), None
    unchanged = replace(second, state_root=STATE_1)
    yield "applied-same-state", "An update may change nothing.", after(APPLIED, unchanged), None
    yield (
        "previous",
        "It names another predecessor.",
        after(APPLIED, replace(second, previous=GENESIS.digest)),
        Code.BROKEN_CHAIN,
    )
    yield "itself", "No record follows itself.", after(APPLIED, APPLIED), Code.BROKEN_CHAIN
    yield "gap", "Round 3 does not follow round 1.", after(APPLIED, replace(second, round=3)), Code.BROKEN_CHAIN
    yield "same-round", "Round 1 does not follow round 1.", after(APPLIED, replace(second, round=1)), Code.BROKEN_CHAIN
    lower = replace(APPLIED, epoch=3)
    yield (
        "epoch-lower",
        "Epochs never fall.",
        after(lower, replace(second, previous=lower.digest, epoch=2)),
        Code.BROKEN_CHAIN,
    )
    yield (
        "null-state",
        "A null round keeps the state.",
        after(APPLIED, replace(null, state_root=STATE_2)),
        Code.BAD_STATE,
    )
    both = replace(null, state_root=STATE_2, previous=GENESIS.digest)
    yield "chain-first", "The chain is checked before the state.", after(APPLIED, both), Code.BROKEN_CHAIN


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("record", "check record", good_rows())
    yield from table("record-envelope", "check record", envelope_rows())
    yield from table("record-meaning", "check record", meaning_rows())
    yield from table("link", "check link", link_rows())
