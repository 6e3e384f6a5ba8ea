"""What the operator changes while the run goes on: a chain of signed amendments, which round records name (SPEC 8)."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from protocol.errors import Code, ProtocolError
from protocol.identity import DIGEST_BYTES, NO_DIGEST, SIGNATURE_BYTES, PrivateKey, digest, verify
from protocol.ledger import Kind, RoundRecord, Verdict
from protocol.limits import AMENDMENT_BYTES_MAX, AMENDMENTS_PER_RECORD_MAX, ROUND_MAX, VERSION
from protocol.run import RunConfig, Setting, canonical_json, is_setting

_MAGIC = b"SLAM"
_HEAD_BYTES = 10


@dataclass(frozen=True)
class ChangeSettings:
    """From the round on these settings hold, such as {"inner.learning_rate": 0.001}."""

    changes: Mapping[str, Setting]


@dataclass(frozen=True)
class Pause:
    """The round does not open, nor does any after it, until the run is resumed."""


@dataclass(frozen=True)
class Resume:
    """The round that a pause holds shut, or was to hold shut, opens after all."""


@dataclass(frozen=True)
class Rollback:
    """The round takes the run back to the state of the record of round `to_round`."""

    to_round: int


@dataclass(frozen=True)
class Ban:
    """From the round on no packet of this peer counts."""

    peer: bytes


@dataclass(frozen=True)
class Unban:
    """From the round on packets of this peer count again."""

    peer: bytes


Action = ChangeSettings | Pause | Resume | Rollback | Ban | Unban


@dataclass(frozen=True)
class Amendment:
    """One change of the run, effective from a round on. Made unsigned; `sign_amendment` adds the signature.

    `number` counts from 1; `previous` is the digest of the amendment before it, for the first one the run_id.
    """

    run_id: bytes
    number: int
    previous: bytes
    round: int
    action: Action
    signature: bytes = bytes(SIGNATURE_BYTES)

    def to_json(self) -> bytes:
        """The canonical JSON of SPEC 8."""
        name, own = _to_document(self.action)
        chain = {"run_id": self.run_id.hex(), "number": self.number, "previous": self.previous.hex()}
        return canonical_json({**chain, "round": self.round, "action": name, **own})

    def to_bytes(self) -> bytes:
        """The form of SPEC 8."""
        text = self.to_json()
        return _MAGIC + VERSION.to_bytes(2, "little") + len(text).to_bytes(4, "little") + text + self.signature

    @cached_property
    def digest(self) -> bytes:
        """The 32 bytes that name this amendment."""
        return digest("amendment", self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, run: RunConfig) -> "Amendment":
        """Read an amendment and check all that needs no other one.

        Raises ProtocolError: BAD_MAGIC, TRUNCATED, VERSION, TOO_LARGE, TRAILING, BAD_AMENDMENT, OTHER_RUN or
        BAD_SIGNATURE.
        """
        if data[:4] != _MAGIC:
            raise ProtocolError(Code.BAD_MAGIC, "these bytes are not an amendment")
        if len(data) < _HEAD_BYTES:
            raise ProtocolError(Code.TRUNCATED, "the amendment ends in its head")
        version, length = int.from_bytes(data[4:6], "little"), int.from_bytes(data[6:10], "little")
        if version != VERSION:
            raise ProtocolError(Code.VERSION, f"the amendment has version {version}, this program reads {VERSION}")
        end = _HEAD_BYTES + length + SIGNATURE_BYTES
        if end > AMENDMENT_BYTES_MAX:
            raise ProtocolError(Code.TOO_LARGE, f"an amendment has at most {AMENDMENT_BYTES_MAX} bytes, this one {end}")
        if len(data) != end:
            code = Code.TRUNCATED if len(data) < end else Code.TRAILING
            raise ProtocolError(code, f"the amendment has {len(data)} bytes, not {end}")
        text, signature = data[_HEAD_BYTES:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
        try:
            amendment = _from_document(json.loads(text.decode("ascii")), signature)
            canonical = amendment.to_json() == text
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProtocolError(Code.BAD_AMENDMENT, str(error) or type(error).__name__) from None
        if not canonical:
            raise ProtocolError(Code.BAD_AMENDMENT, "the amendment is not written in canonical JSON")
        if amendment.run_id != run.run_id:
            raise ProtocolError(Code.OTHER_RUN, "the amendment belongs to another run")
        verify(run.operator, "amendment", text, signature)
        return amendment


def sign_amendment(amendment: Amendment, key: PrivateKey) -> Amendment:
    """Return the amendment with the signature of this key, which is the operator's."""
    return dataclasses.replace(amendment, signature=key.sign("amendment", amendment.to_json()))


_NAMES: dict[str, type] = {
    "settings": ChangeSettings,
    "pause": Pause,
    "resume": Resume,
    "rollback": Rollback,
    "ban": Ban,
    "unban": Unban,
}
_NAME_OF = {kind: name for name, kind in _NAMES.items()}


def _to_document(action: Action) -> tuple[str, dict[str, Any]]:
    """The name of the action and its own keys."""
    own: dict[str, Any] = {}
    match action:
        case ChangeSettings(changes):
            own = {"changes": dict(changes)}
        case Rollback(to_round):
            own = {"to_round": to_round}
        case Ban(peer) | Unban(peer):
            own = {"peer": peer.hex()}
    return _NAME_OF[type(action)], own


def _from_document(document: Any, signature: bytes) -> Amendment:
    """Make an amendment from parsed JSON. Raises ValueError, TypeError or KeyError.

    Keys that are left over, and values in another form than theirs, show when it is written again."""
    round = _whole(document["round"], 1, ROUND_MAX)
    return Amendment(
        _digest_of(document["run_id"]),
        _whole(document["number"], 1, ROUND_MAX),
        _digest_of(document["previous"]),
        round,
        _action_of(document, round),
        signature,
    )


def _action_of(document: Any, round: int) -> Action:
    match document["action"]:
        case "settings":
            changes = document["changes"]
            if not isinstance(changes, dict) or not changes:
                raise ValueError("the amendment changes no setting")
            for key, value in changes.items():
                if not is_setting(key, value):
                    raise ValueError(f"{key[:80]!r} cannot change, or not to this value")
            return ChangeSettings(changes)
        case "pause":
            return Pause()
        case "resume":
            return Resume()
        case "rollback":
            return Rollback(_whole(document["to_round"], 0, round - 1))
        case "ban":
            return Ban(_digest_of(document["peer"]))
        case "unban":
            return Unban(_digest_of(document["peer"]))
    raise ValueError("the amendment's action is unknown")


def _whole(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"a whole number from {low} to {high} was expected")
    return value


def _digest_of(value: Any) -> bytes:
    if not isinstance(value, str) or len(value) != 2 * DIGEST_BYTES:
        raise ValueError(f"{2 * DIGEST_BYTES} hexadecimal digits were expected")
    return bytes.fromhex(value)


@dataclass(frozen=True)
class Amendments:
    """All amendments of a run so far, in their order; immutable. `run` is the run as it was signed."""

    run: RunConfig
    chain: tuple[Amendment, ...] = ()

    @property
    def head(self) -> bytes:
        """The digest of the newest one, which the round records name; zero when there is none."""
        return self.chain[-1].digest if self.chain else NO_DIGEST

    @property
    def paused_from(self) -> int | None:
        """The round that does not open before the run is resumed; None when no pause holds or is announced."""
        last = next((item for item in reversed(self.chain) if isinstance(item.action, Pause | Resume)), None)
        return last.round if last is not None and isinstance(last.action, Pause) else None

    def paused_at(self, round: int) -> bool:
        """Whether this round must not open."""
        return self.paused_from is not None and round >= self.paused_from

    def config_at(self, round: int) -> RunConfig:
        """The run with the settings of this round. Of two changes of a setting the one of the later round holds."""
        changes: dict[str, Setting] = {}
        for action in self._in_force(round):
            if isinstance(action, ChangeSettings):
                changes.update(action.changes)
        return self.run.amended(changes) if changes else self.run

    def banned_at(self, round: int) -> frozenset[bytes]:
        """The peers whose packets do not count in this round."""
        banned: set[bytes] = set()
        for action in self._in_force(round):
            match action:
                case Ban(peer):
                    banned.add(peer)
                case Unban(peer):
                    banned.discard(peer)
        return frozenset(banned)

    def rollback_at(self, round: int) -> int | None:
        """The round to whose state this one takes the run back; None when it is a round like any other."""
        targets = [item.action for item in self.chain if item.round == round and isinstance(item.action, Rollback)]
        return targets[-1].to_round if targets else None

    def after(self, head: bytes) -> tuple[Amendment, ...]:
        """The amendments that follow the one of this digest (zero is before the first), oldest first.

        Raises ProtocolError BAD_AMENDMENT when it is none of ours."""
        heads = [NO_DIGEST, *(item.digest for item in self.chain)]
        if head not in heads:
            raise ProtocolError(Code.BAD_AMENDMENT, "the amendments follow from another one than the record names")
        return self.chain[heads.index(head) :]

    def draft(self, action: Action, round: int) -> Amendment:
        """The next amendment of this chain, still without a signature."""
        previous = self.head if self.chain else self.run.run_id
        return Amendment(self.run.run_id, len(self.chain) + 1, previous, round, action)

    def append(self, amendment: Amendment) -> "Amendments":
        """Return the chain with one more amendment, whose own form and signature were checked.

        Raises ProtocolError BAD_AMENDMENT when it does not follow, or does not go with those before it.
        """
        wanted = self.draft(amendment.action, amendment.round)
        if (amendment.number, amendment.previous) != (wanted.number, wanted.previous):
            raise ProtocolError(
                Code.BAD_AMENDMENT, f"amendment {amendment.number} does not follow the {len(self.chain)} known ones"
            )
        if isinstance(amendment.action, Pause) and self.paused_from is not None:
            raise ProtocolError(Code.BAD_AMENDMENT, f"a pause from round {self.paused_from} on is there already")
        if isinstance(amendment.action, Resume) and amendment.round != self.paused_from:
            raise ProtocolError(Code.BAD_AMENDMENT, f"no pause holds round {amendment.round} shut as the first one")
        longer = Amendments(self.run, (*self.chain, amendment))
        if isinstance(amendment.action, ChangeSettings):
            for round in sorted({item.round for item in longer.chain if item.round >= amendment.round}):
                try:
                    longer.config_at(round)
                except ValueError as error:
                    raise ProtocolError(Code.BAD_AMENDMENT, f"in round {round}: {error}") from None
        return longer

    def bring_in(self, amendment: Amendment, record_round: int) -> "Amendments":
        """Return the chain with the amendment that the record of this round is the first to name.

        All that others have to know before a round opens is brought in by an earlier record. Raises ProtocolError
        BAD_AMENDMENT.
        """
        longer = self.append(amendment)
        held_shut = isinstance(amendment.action, Rollback) and self.paused_at(record_round)
        earliest = record_round if isinstance(amendment.action, Resume) or held_shut else record_round + 1
        if amendment.round < earliest:
            raise ProtocolError(
                Code.BAD_AMENDMENT,
                f"the record of round {record_round} is too late for one from round {amendment.round}",
            )
        return longer

    def follow(self, record: RoundRecord, amendments: Sequence[Amendment]) -> "Amendments":
        """Return the chain that `record` names: this one, of the record before it, and `amendments`, oldest first.

        Checks that the record keeps to it. Raises ProtocolError BAD_AMENDMENT or BANNED.
        """
        if len(amendments) > AMENDMENTS_PER_RECORD_MAX:
            raise ProtocolError(Code.BAD_AMENDMENT, f"a record brings in at most {AMENDMENTS_PER_RECORD_MAX}")
        longer = self
        for amendment in amendments:
            longer = longer.bring_in(amendment, record.round)
        if longer.head != record.amendment:
            raise ProtocolError(Code.BAD_AMENDMENT, f"the record of round {record.round} names another amendment")
        longer.check(record)
        return longer

    def check(self, record: RoundRecord) -> None:
        """Check that a record of this chain keeps to it. Raises ProtocolError BAD_AMENDMENT or BANNED."""
        if self.paused_at(record.round):
            raise ProtocolError(Code.BAD_AMENDMENT, f"round {record.round} closed although the run is paused")
        if (record.kind == Kind.ROLLBACK) != (self.rollback_at(record.round) is not None):
            raise ProtocolError(
                Code.BAD_AMENDMENT, f"round {record.round} is a rollback that nobody ordered, or is none"
            )
        banned = self.banned_at(record.round)
        if any(entry.peer in banned and entry.verdict == Verdict.ACCEPTED for entry in record.entries):
            raise ProtocolError(Code.BANNED, f"round {record.round} accepted a packet of a banned peer")

    def _in_force(self, round: int) -> Iterator[Action]:
        """What holds in this round, by effective round and number, so that the later one overrides the earlier."""
        begun = (item for item in self.chain if item.round <= round)
        return (item.action for item in sorted(begun, key=lambda item: (item.round, item.number)))


def check_rollback(record: RoundRecord, target: RoundRecord) -> None:
    """Check that a rollback has the state of the record that it goes back to. Raises ProtocolError BAD_STATE."""
    if record.state_root != target.state_root:
        raise ProtocolError(
            Code.BAD_STATE, f"the rollback in round {record.round} is not to the state of round {target.round}"
        )
