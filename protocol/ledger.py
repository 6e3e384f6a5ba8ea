"""The ledger: one signed record a round, each naming the one before it (SPEC 8)."""

import dataclasses
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from protocol.errors import Code, ProtocolError
from protocol.identity import KEY_BYTES, NO_DIGEST, SIGNATURE_BYTES, PrivateKey, digest, verify
from protocol.limits import CLIP_ONE, CONTRIBUTORS_MAX, RECORD_BYTES_MAX, RECORD_ENTRIES_MAX, VERSION, WEIGHT_MAX
from protocol.run import RunConfig

_MAGIC = b"SLRR"
_HEAD = struct.Struct("<4sHBB32sII32s32s32s32sQQIII")
_ENTRY = struct.Struct("<32s32sBHQIHI")


class Kind(IntEnum):
    """What a round did to the state."""

    GENESIS = 0
    APPLIED = 1
    NULL = 2
    ROLLBACK = 3


class CloseReason(IntEnum):
    """Why a round closed when it did."""

    NONE = 0
    COMPLETE = 1
    GRACE = 2
    DEADLINE = 3
    OPERATOR = 4


class Verdict(IntEnum):
    """What became of a packet."""

    ACCEPTED = 0
    LATE = 1
    REFUSED = 2


@dataclass(frozen=True)
class Entry:
    """One packet's fate: weight and clip are 0 unless accepted, code is 0 when accepted."""

    peer: bytes
    packet_digest: bytes
    verdict: Verdict
    code: int
    tokens: int
    inner_steps: int
    weight: int
    clip: int

    def _problem(self) -> str:
        if self.verdict == Verdict.ACCEPTED:
            if self.code:
                return "an accepted packet has an error code"
            if not 1 <= self.weight <= WEIGHT_MAX or not 1 <= self.clip <= CLIP_ONE:
                return "an accepted packet's weight or clip factor is out of range"
        elif not self.code or self.weight or self.clip:
            return "a packet that was not accepted has a weight or lacks an error code"
        return ""


@dataclass(frozen=True)
class RoundRecord:
    """How one round ended. Made unsigned; `sign_record` adds the aggregator's key and signature.

    `amendment` names the newest amendment of the run that is announced or in force. `loss_micronats` is what the
    aggregator measured, in 1e-6 nats a token: the validation loss after round `evaluated_round`. 0 is none.
    """

    run_id: bytes
    round: int
    epoch: int
    previous: bytes
    kind: Kind
    reason: CloseReason
    state_root: bytes
    update_digest: bytes
    opened_ms: int
    closed_ms: int
    entries: tuple[Entry, ...]
    amendment: bytes = NO_DIGEST
    evaluated_round: int = 0
    loss_micronats: int = 0
    aggregator: bytes = NO_DIGEST
    signature: bytes = bytes(SIGNATURE_BYTES)

    @cached_property
    def _signed_bytes(self) -> bytes:
        head = _HEAD.pack(
            _MAGIC,
            VERSION,
            self.kind,
            self.reason,
            self.run_id,
            self.round,
            self.epoch,
            self.previous,
            self.state_root,
            self.update_digest,
            self.amendment,
            self.opened_ms,
            self.closed_ms,
            self.evaluated_round,
            self.loss_micronats,
            len(self.entries),
        )
        entries = (_ENTRY.pack(*(getattr(entry, name) for name in _ENTRY_FIELDS)) for entry in self.entries)
        return head + b"".join(entries) + self.aggregator

    def to_bytes(self) -> bytes:
        """The form of SPEC 8."""
        return self._signed_bytes + self.signature

    @cached_property
    def digest(self) -> bytes:
        """The 32 bytes that name this record."""
        return digest("record", self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> "RoundRecord":
        """Read a record and check all that needs neither the run nor its neighbours.

        Raises ProtocolError BAD_MAGIC, VERSION, TRUNCATED, TRAILING, TOO_LARGE or BAD_RECORD.
        """
        if data[:4] != _MAGIC:
            raise ProtocolError(Code.BAD_MAGIC, "these bytes are not a round record")
        if len(data) < _HEAD.size:
            raise ProtocolError(Code.TRUNCATED, "the round record ends in its head")
        head = _HEAD.unpack_from(data)
        _, version, kind, reason, run_id, number, epoch, previous, root, update, amendment = head[:11]
        opened, closed, evaluated_round, loss, count = head[11:]
        if version != VERSION:
            raise ProtocolError(Code.VERSION, f"the record has version {version}, this program reads {VERSION}")
        if count > RECORD_ENTRIES_MAX or len(data) > RECORD_BYTES_MAX:
            raise ProtocolError(Code.TOO_LARGE, f"a record has at most {RECORD_ENTRIES_MAX} entries")
        end = _HEAD.size + count * _ENTRY.size + KEY_BYTES + SIGNATURE_BYTES
        if len(data) != end:
            code = Code.TRUNCATED if len(data) < end else Code.TRAILING
            raise ProtocolError(code, f"the record has {len(data)} bytes, not {end}")
        if kind > max(Kind) or reason > max(CloseReason):
            raise ProtocolError(Code.BAD_RECORD, f"kind {kind} or reason {reason} is unknown")
        entries = tuple(_entries(data[_HEAD.size : end - KEY_BYTES - SIGNATURE_BYTES]))
        key, signature = data[end - KEY_BYTES - SIGNATURE_BYTES : end - SIGNATURE_BYTES], data[end - SIGNATURE_BYTES :]
        record = cls(
            run_id,
            number,
            epoch,
            previous,
            Kind(kind),
            CloseReason(reason),
            root,
            update,
            opened,
            closed,
            entries,
            amendment,
            evaluated_round,
            loss,
            key,
            signature,
        )
        _check_meaning(record)
        return record

    def accepted(self, packet_digest: bytes) -> bool:
        """Whether this packet is part of the round's update."""
        return any(entry.packet_digest == packet_digest and entry.verdict == Verdict.ACCEPTED for entry in self.entries)


_ENTRY_FIELDS = tuple(item.name for item in dataclasses.fields(Entry))


def _entries(data: bytes) -> Iterator[Entry]:
    for peer, packet_digest, verdict, *rest in _ENTRY.iter_unpack(data):
        if verdict > max(Verdict):
            raise ProtocolError(Code.BAD_RECORD, f"verdict {verdict} is unknown")
        yield Entry(peer, packet_digest, Verdict(verdict), *rest)


def _check_meaning(record: RoundRecord) -> None:
    """Raise ProtocolError BAD_RECORD unless the fields of the record fit each other."""
    problems = [entry._problem() for entry in record.entries]
    problems.append(_head_problem(record))
    order = [(entry.peer, entry.packet_digest) for entry in record.entries]
    if any(left >= right for left, right in itertools.pairwise(order)):
        problems.append("the entries are not sorted by peer and packet, each once")
    accepted = [entry.peer for entry in record.entries if entry.verdict == Verdict.ACCEPTED]
    if len(accepted) > CONTRIBUTORS_MAX or len(set(accepted)) < len(accepted):
        problems.append(f"more than {CONTRIBUTORS_MAX} packets are accepted, or two of one peer")
    if (record.kind == Kind.APPLIED) != bool(accepted):
        problems.append("an applied round has accepted packets, any other has none")
    for problem in problems:
        if problem:
            raise ProtocolError(Code.BAD_RECORD, problem)


def _head_problem(record: RoundRecord) -> str:
    if record.closed_ms < record.opened_ms:
        return "the round closed before it opened"
    if (record.kind == Kind.APPLIED) != (record.update_digest != NO_DIGEST):
        return "an applied round names its update, any other names none"
    if (record.kind == Kind.GENESIS) != (record.round == 0):
        return "the genesis record, and no other, is round 0"
    if (record.kind == Kind.ROLLBACK) != (record.reason == CloseReason.OPERATOR):
        return "the operator closes the rounds that take the run back, and no other"
    if record.evaluated_round >= record.round if record.loss_micronats else record.evaluated_round > 0:
        return "the loss is of no state before this round"
    if record.kind == Kind.GENESIS:
        named = record.previous != NO_DIGEST or record.amendment != NO_DIGEST
        if named or record.reason != CloseReason.NONE or record.entries:
            return "the genesis record has no previous record, no amendment, no reason and no entries"
    elif record.reason == CloseReason.NONE:
        return "the record does not say why the round closed"
    if record.kind == Kind.NULL and record.reason != CloseReason.DEADLINE:
        return "a null round closes at the deadline"
    return ""


def sign_record(record: RoundRecord, key: PrivateKey) -> RoundRecord:
    """Return the record with this aggregator's key and signature. Its fields must fit each other."""
    unsigned = dataclasses.replace(record, aggregator=key.public)
    _check_meaning(unsigned)
    return dataclasses.replace(unsigned, signature=key.sign("record", unsigned._signed_bytes))


def genesis_record(run: RunConfig, key: PrivateKey, opened_ms: int) -> RoundRecord:
    """The signed record of round 0, which every chain of the run starts from."""
    record = RoundRecord(
        run_id=run.run_id,
        round=0,
        epoch=0,
        previous=NO_DIGEST,
        kind=Kind.GENESIS,
        reason=CloseReason.NONE,
        state_root=run.genesis_root,
        update_digest=NO_DIGEST,
        opened_ms=opened_ms,
        closed_ms=opened_ms,
        entries=(),
    )
    return sign_record(record, key)


def check_record(record: RoundRecord, run: RunConfig) -> None:
    """Check that the record belongs to the run and one of its aggregators signed it.

    Raises ProtocolError OTHER_RUN, BAD_RECORD, NOT_AN_AGGREGATOR, BAD_KEY or BAD_SIGNATURE.
    """
    if record.run_id != run.run_id:
        raise ProtocolError(Code.OTHER_RUN, "the record belongs to another run")
    if record.kind == Kind.GENESIS and record.state_root != run.genesis_root:
        raise ProtocolError(Code.BAD_RECORD, "the genesis record does not name the run's initial state")
    if record.aggregator not in run.aggregators:
        raise ProtocolError(Code.NOT_AN_AGGREGATOR, "the record is signed by nobody whom the run names")
    verify(record.aggregator, "record", record._signed_bytes, record.signature)


def check_link(previous: RoundRecord, record: RoundRecord) -> None:
    """Check that `record` follows `previous`. Raises ProtocolError BROKEN_CHAIN or BAD_STATE."""
    if record.round != previous.round + 1:
        raise ProtocolError(Code.BROKEN_CHAIN, f"round {record.round} cannot follow round {previous.round}")
    if record.previous != previous.digest:
        raise ProtocolError(Code.BROKEN_CHAIN, f"the record of round {record.round} names another predecessor")
    if record.epoch < previous.epoch:
        raise ProtocolError(Code.BROKEN_CHAIN, f"epoch {record.epoch} follows epoch {previous.epoch}")
    if record.kind == Kind.NULL and record.state_root != previous.state_root:
        raise ProtocolError(Code.BAD_STATE, f"the null round {record.round} changes the state")
