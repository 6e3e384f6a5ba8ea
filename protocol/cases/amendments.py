"""Amendments, the chain that they form, and the records that bring them in (SPEC 8)."""

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from protocol.cases.records import APPLIED, GENESIS, NULL, ROLLBACK, RUN, STATE_1, STATE_2, TEXT, Entry, Record
from protocol.cases.vector import AGGREGATOR, BASE, OPERATOR, PEER, STRANGER, Fields, Row, Vector, noise, table
from protocol.errors import Code
from protocol.identity import PrivateKey, digest

ROUND_MAX = 2**32 - 1
RATE = {"inner.learning_rate": 0.001}
NOTHING: dict[str, Any] = {}


@dataclass(frozen=True)
class Amendment:
    """An amendment of any content, signed by any key. Nothing here minds whether it makes sense."""

    document: dict[str, Any] = field(default_factory=dict)
    text: bytes | None = None
    key: PrivateKey = field(default=OPERATOR, repr=False)
    version: int = 1
    length: int | None = None

    @cached_property
    def data(self) -> bytes:
        """The signed bytes."""
        text = self.text
        if text is None:
            text = json.dumps(self.document, sort_keys=True, separators=(",", ":")).encode("utf-8")
        length = len(text) if self.length is None else self.length
        return b"SLAM" + struct.pack("<HI", self.version, length) + text + self.key.sign("amendment", text)

    @cached_property
    def digest(self) -> bytes:
        """What names it."""
        return digest("amendment", self.data)

    def but(self, **changed: Any) -> "Amendment":
        """The same with other members of its json."""
        return replace(self, document={**self.document, **changed})

    def without(self, name: str) -> "Amendment":
        """The same without one member of its json."""
        return replace(self, document={key: value for key, value in self.document.items() if key != name})

    @property
    def canonical(self) -> bytes:
        """Its json."""
        return self.data[10:-64]


def amend(after: Amendment | None, round: int, action: str, **own: Any) -> Amendment:
    """The amendment that follows another, or the first one."""
    number = 1 if after is None else after.document["number"] + 1
    previous = RUN.run_id if after is None else after.digest
    chain = {"run_id": RUN.run_id.hex(), "number": number, "previous": previous.hex()}
    return Amendment({**chain, "round": round, "action": action, **own})


def chained(*links: tuple[int, str, dict[str, Any]]) -> tuple[Amendment, ...]:
    """A chain of amendments, each of a round, an action and what belongs to that."""
    chain: list[Amendment] = []
    for round, action, own in links:
        chain.append(amend(chain[-1] if chain else None, round, action, **own))
    return tuple(chain)


def settings(round: int, changes: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
    """A link that changes settings."""
    return round, "settings", {"changes": changes}


HALT, GO_ON = (3, "pause", NOTHING), (3, "resume", NOTHING)
RATES = amend(None, 2, "settings", changes=RATE)
PAUSE = amend(None, 2, "pause")
BACK = amend(None, 2, "rollback", to_round=0)
BAN = amend(None, 2, "ban", peer=PEER.public.hex())


def asked(amendment: Amendment | bytes) -> Fields:
    """The fields of a request."""
    return {"run": TEXT, "bytes": amendment if isinstance(amendment, bytes) else amendment.data}


def good_rows() -> Iterator[Row]:
    """One of every action, and the bounds."""
    yield "settings", "Another learning rate.", asked(RATES), None
    everything = {
        "inner.steps": 5,
        "inner.overlap": True,
        "inner.schedule": "constant",
        "inner.weight_decay": 0.0,
        "compression.k": 4096,
        "compression.code_bits": 1,
        "compression.beta": 1.0,
        "outer.rule": "mean",
        "outer.alpha": 2**-16,
        "outer.rounds": 100_000_000,
        "rounds.quorum": 1024,
        "rounds.deadline_s": 604800.0,
        "inner.adam_eps": 1e-12,
        "inner.grad_clip_norm": 1e6,
        "inner.min_lr_ratio": -0.0,
    }
    yield "many", "All kinds of values, at their bounds.", asked(RATES.but(changes=everything)), None
    yield "pause", "Nothing opens.", asked(PAUSE), None
    yield "resume", "By itself it need not follow a pause.", asked(amend(None, 2, "resume")), None
    yield "rollback", "Back to the genesis.", asked(BACK), None
    yield "rollback-one", "Back to the round before.", asked(BACK.but(to_round=1)), None
    yield "ban", "A peer is banned.", asked(BAN), None
    yield "ban-no-key", "What is banned need not be a key.", asked(BAN.but(peer="00" * 32)), None
    yield "unban", "It is not.", asked(BAN.but(action="unban")), None
    largest = RATES.but(number=ROUND_MAX, round=ROUND_MAX, previous="ff" * 32)
    yield "largest", "Number and round are 32 bits wide.", asked(largest), None
    crossed = RATES.but(changes={"rounds.grace_s_min": 86400.0})
    yield "crossed", "What other settings make of it shows in the chain.", asked(crossed), None


def envelope_rows() -> Iterator[Row]:
    """What holds it together, and who signed."""
    data = RATES.data
    yield "empty", "No bytes have no magic.", asked(b""), Code.BAD_MAGIC
    yield "magic", "It begins with SLAM.", asked(b"SLRN" + data[4:]), Code.BAD_MAGIC
    yield "head-cut", "The head is not whole.", asked(data[:9]), Code.TRUNCATED
    yield "version", "Version 2 is not this one.", asked(replace(RATES, version=2)), Code.VERSION
    yield "head-first", "Without a whole head nobody speaks of versions.", asked(b"SLAM\2\0"), Code.TRUNCATED
    yield "cut", "The last byte is missing.", asked(data[:-1]), Code.TRUNCATED
    yield "trailing", "A byte follows.", asked(data + b"\0"), Code.TRAILING
    yield (
        "length-more",
        "It claims a byte more.",
        asked(replace(RATES, length=len(RATES.canonical) + 1)),
        Code.TRUNCATED,
    )
    yield "length-less", "It claims a byte less.", asked(replace(RATES, length=len(RATES.canonical) - 1)), Code.TRAILING
    yield (
        "length-hostile",
        "A declared length is believed of nobody.",
        asked(replace(RATES, length=ROUND_MAX)),
        Code.TOO_LARGE,
    )
    room = (64 << 10) - 74
    yield "too-large", "At most 64 KiB in all.", asked(replace(RATES, length=room + 1)), Code.TOO_LARGE
    yield "largest", "64 KiB would be in order.", asked(replace(RATES, length=room)), Code.TRUNCATED
    yield "nested", "Nothing but brackets.", asked(Amendment(text=b"[" * 20_000)), Code.BAD_AMENDMENT
    yield (
        "version-first",
        "The version is checked before the length.",
        asked(replace(RATES, version=2, length=ROUND_MAX)),
        Code.VERSION,
    )
    yield "other-run", "An amendment of another run.", asked(RATES.but(run_id="00" * 32)), Code.OTHER_RUN
    yield "aggregator", "An aggregator amends nothing.", asked(replace(RATES, key=AGGREGATOR)), Code.BAD_SIGNATURE
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    yield "signature", "One bit of the signature differs.", asked(flipped), Code.BAD_SIGNATURE
    domain = data[:-64] + OPERATOR.sign("run", RATES.canonical)
    yield "domain", "The operator signed it as a run.", asked(domain), Code.BAD_SIGNATURE
    stolen = RATES.but(changes={"inner.learning_rate": 0.1}).data[:-64] + data[-64:]
    yield "stolen-signature", "The signature of another amendment.", asked(stolen), Code.BAD_SIGNATURE
    stranger = replace(RATES.but(run_id="00" * 32), key=STRANGER)
    yield "run-before-signature", "The run is checked before the signature.", asked(stranger), Code.OTHER_RUN
    meaning = RATES.but(run_id="00" * 32, number=0)
    yield "meaning-first", "The json is checked before the run.", asked(meaning), Code.BAD_AMENDMENT


Wrong = dict[str, tuple[str, Amendment]]


def form_rows() -> Iterator[Row]:
    """Texts that say nothing, or not in the one way. All are signed as they stand."""
    text = RATES.canonical
    huge = Amendment(text=text.replace(b'"round":2', b'"round":' + b"9" * 10_000))
    wrong: Wrong = {
        "no-json": ("It is cut.", Amendment(text=text[:-1])),
        "list": ("It is an object.", Amendment(text=b"[]")),
        "null": ("It is an object.", Amendment(text=b"null")),
        "not-ascii": ("It is ASCII.", Amendment(text=text.replace(b"settings", "séttings".encode()))),
        "not-utf-8": ("It is a text.", Amendment(text=text.replace(b"settings", b"\xff"))),
        "blank": ("It has no blanks.", Amendment(text=text.replace(b":", b": ", 1))),
        "order": ("Its keys are sorted.", Amendment(text=json.dumps(dict(reversed(RATES.document.items()))).encode())),
        "key-twice": ("No key comes twice.", Amendment(text=text[:-1] + b',"round":2}')),
        "no-run": ("It names its run.", RATES.without("run_id")),
        "no-number": ("It has a number.", RATES.without("number")),
        "no-previous": ("It names what was before.", RATES.without("previous")),
        "no-round": ("It says from when on.", RATES.without("round")),
        "no-action": ("It says what to do.", RATES.without("action")),
        "extra": ("It has no other key.", RATES.but(reason="loss")),
        "action": ("No such action.", RATES.but(action="stop")),
        "action-prototype": ("No such action.", PAUSE.but(action="constructor")),
        "action-list": ("An action is a text.", RATES.but(action=["settings"])),
        "action-number": ("An action is a text.", RATES.but(action=1)),
        "number-0": ("Numbers begin with 1.", RATES.but(number=0)),
        "number-large": ("Numbers have 32 bits.", RATES.but(number=2**32)),
        "number-real": ("A number is whole.", RATES.but(number=1.0)),
        "number-flag": ("A number is no flag.", RATES.but(number=True)),
        "round-0": ("Round 0 cannot change.", RATES.but(round=0)),
        "round-large": ("Rounds have 32 bits.", RATES.but(round=2**32)),
        "round-text": ("A round is a number.", RATES.but(round="2")),
        "round-huge": ("A round of ten thousand digits.", huge),
        "round-negative": ("A round is not negative.", RATES.but(round=-2)),
        "run-upper": ("Digests are lower case.", RATES.but(run_id=RUN.run_id.hex().upper())),
        "run-short": ("A digest has 64 digits.", RATES.but(run_id=RUN.run_id.hex()[:-2])),
        "previous-blank": ("A digest has no blanks.", RATES.but(previous=" " * 2 + "00" * 31)),
        "previous-number": ("A digest is a text.", RATES.but(previous=0)),
    }
    for name, (why, amendment) in wrong.items():
        yield name, why, asked(amendment), Code.BAD_AMENDMENT


def settings_rows() -> Iterator[Row]:
    """Settings that do not exist, cannot change, or not to this value."""
    text = RATES.canonical

    def changed(key: str, value: Any) -> Amendment:
        return RATES.but(changes={key: value})

    wrong: Wrong = {
        "changes-none": ("It changes something.", RATES.but(changes={})),
        "changes-list": ("Changes are an object.", RATES.but(changes=[["inner.steps", 5]])),
        "changes-null": ("Changes are an object.", RATES.but(changes=None)),
        "changes-missing": ("It says what changes.", RATES.without("changes")),
        "unknown-setting": ("No such setting.", changed("inner.learningrate", 0.1)),
        "unknown-table": ("No such table.", changed("optimizer.steps", 5)),
        "no-table": ("A setting has its table's name before it.", changed("steps", 5)),
        "table": ("A table is no setting.", changed("inner", {"steps": 5})),
        "deep": ("A setting has one dot.", changed("inner.steps.steps", 5)),
        "prototype": ("No such setting.", changed("inner.constructor", 5)),
        "prototype-table": ("No such table.", changed("constructor.name", "x")),
        "model": ("The model never changes.", changed("model.hidden_size", 256)),
        "data": ("The data never changes.", changed("data.seed", 2)),
        "name": ("The name never changes.", changed("name", "other")),
        "operator": ("The operator never changes.", changed("operator", STRANGER.public.hex())),
        "value-low": ("A value below its bound.", changed("inner.steps", 0)),
        "value-high": ("A value above its bound.", changed("compression.k", 4097)),
        "value-whole": ("A real has a point.", changed("inner.learning_rate", 1)),
        "value-real": ("A whole number has none.", changed("inner.steps", 5.0)),
        "value-flag": ("A number is no flag.", changed("inner.steps", True)),
        "value-null": ("A value is not null.", changed("inner.steps", None)),
        "value-text": ("A number is no text.", changed("inner.steps", "5")),
        "value-rule": ("No such rule.", changed("outer.rule", "median")),
        "value-flag-number": ("A flag is true or false.", changed("inner.overlap", 1)),
        "value-long": ("The shortest digits.", Amendment(text=text.replace(b"0.001", b"0.0010"))),
        "value-exponent": ("In the one form.", Amendment(text=text.replace(b"0.001", b"1e-3"))),
        "value-nan": ("NaN is no number.", Amendment(text=text.replace(b"0.001", b"NaN"))),
        "value-infinite": ("Nor is infinity.", Amendment(text=text.replace(b"0.001", b"1e999"))),
    }
    for name, (why, amendment) in wrong.items():
        yield name, why, asked(amendment), Code.BAD_AMENDMENT


def own_rows() -> Iterator[Row]:
    """What belongs to the other actions."""
    wrong: Wrong = {
        "changes-of-pause": ("A pause changes no settings.", PAUSE.but(changes=RATE)),
        "peer-of-rollback": ("A rollback concerns no peer.", BACK.but(peer="00" * 32)),
        "to-round-of-ban": ("A ban goes nowhere.", BAN.but(to_round=0)),
        "back-to-itself": ("A rollback goes back.", BACK.but(to_round=2)),
        "back-to-later": ("A rollback goes back.", BACK.but(to_round=3)),
        "back-negative": ("Nothing is before the genesis.", BACK.but(to_round=-1)),
        "back-nowhere": ("A rollback goes somewhere.", BACK.without("to_round")),
        "back-real": ("A round is whole.", BACK.but(to_round=0.0)),
        "ban-nobody": ("A ban names a peer.", BAN.without("peer")),
        "ban-upper": ("Keys are lower case.", BAN.but(peer="AB" * 32)),
        "ban-short": ("A key has 32 bytes.", BAN.but(peer="ab" * 31)),
        "unban-number": ("A key is a text.", BAN.but(action="unban", peer=7)),
    }
    for name, (why, amendment) in wrong.items():
        yield name, why, asked(amendment), Code.BAD_AMENDMENT


def brought(
    known: Sequence[Amendment],
    new: Sequence[Amendment],
    rounds: Sequence[int] = (),
    record: Record = NULL,
    **changed: Any,
) -> Fields:
    """The fields of a request: what the record before names, what this one brings in, and rounds to ask about."""
    head = new[-1].digest if new else known[-1].digest if known else bytes(32)
    return {
        "run": TEXT,
        "record": replace(record, **{"amendment": head, **changed}).data,
        "known": [item.data for item in known],
        "amendments": [item.data for item in new],
        "rounds": list(rounds),
    }


def chain_rows() -> Iterator[Row]:
    """Chains that are in order, and what holds by them in certain rounds."""
    yield "none", "A run as it was signed.", brought((), (), (0, 1, 9)), None
    yield "first", "From round 2 on.", brought((), (RATES,), (1, 2, 3)), None
    yield "known", "The record brings in nothing new.", brought((RATES,), (), (1, 2), round=7), None
    two = chained(settings(2, RATE), settings(4, {"inner.steps": 9}))
    yield "two-at-once", "Two at once.", brought((), two, (1, 2, 3, 4)), None
    yield "one-and-one", "One after the other.", brought(two[:1], two[1:], (3, 4), round=2), None
    earlier = chained(settings(9, {"inner.steps": 9}), settings(3, {"inner.steps": 3}))
    why = "A later amendment for an earlier round lets the first one stand."
    yield "earlier-round", why, brought((), earlier, (2, 3, 8, 9)), None
    same = chained(settings(3, {"inner.steps": 9}), settings(3, {"inner.steps": 3}))
    yield "same-round", "Of one round the higher number overrides.", brought((), same, (2, 3)), None
    moved = chained(
        settings(5, {"rounds.grace_s_max": 500.0, "rounds.deadline_s": 600.0}),
        settings(5, {"rounds.grace_s_min": 400.0}),
    )
    yield "times-together", "Times are in order in every round.", brought((), moved, (4, 5)), None
    form = {"compression.k": 32, "compression.code_bits": 1, "outer.rule": "mean", "outer.rounds": 2}
    yield (
        "form",
        "What packets look like may change too.",
        brought((), chained(settings(2, form)), (1, 2)),
        None,
    )
    crowd = chained(*(settings(number + 2, {"inner.steps": number + 1}) for number in range(64)))
    yield "sixty-four", "64 at once.", brought((), crowd, (1, 2, 65, 66)), None
    largest = chained(settings(ROUND_MAX, RATE))
    yield "last-round", "From the last round on.", brought((), largest, (2**32 - 2, ROUND_MAX)), None


def action_rows() -> Iterator[Row]:
    """Pauses, rollbacks and bans that are in order."""
    pause, resume = chained(HALT, GO_ON)
    yield "pause", "From round 3 on nothing opens.", brought((), (pause,), (2, 3, 9)), None
    yield "pause-before", "The rounds before close as ever.", brought((pause,), (), (3,), round=2), None
    yield (
        "resume",
        "The round that was held shut brings in its own resume.",
        brought((pause,), (resume,), (3,), round=3),
        None,
    )
    yield "resume-early", "A pause that is called off.", brought((pause,), (resume,), (3,), round=2), None
    yield "pause-and-resume", "Both at once.", brought((), (pause, resume), (3,), round=1), None
    again = chained(HALT, GO_ON, (5, "pause", {}))
    yield (
        "pause-again",
        "After a resume it may be paused once more.",
        brought(again[:2], again[2:], (4, 5), round=3),
        None,
    )
    while_shut = chained(HALT, (3, "rollback", {"to_round": 1}), GO_ON)
    back = replace(ROLLBACK, round=3)
    why = "While a pause holds the round shut, it can still become a rollback."
    yield "rollback-while-paused", why, brought(while_shut[:1], while_shut[1:], (3,), back), None
    changed = chained(HALT, settings(4, RATE), GO_ON)
    yield (
        "settings-while-paused",
        "Settings hold from the round after.",
        brought(changed[:1], changed[1:], (3, 4), round=3),
        None,
    )
    yield "rollback-announced", "A round to come is a rollback.", brought((), (BACK,), (1, 2, 3)), None
    yield "rollback", "The round is a rollback.", brought((BACK,), (), (2,), ROLLBACK, round=2), None
    twice = chained(
        (4, "rollback", {"to_round": 1}), (4, "rollback", {"to_round": 2}), (5, "rollback", {"to_round": 3})
    )
    yield "rollback-twice", "Of one round the higher number overrides.", brought((), twice, (4, 5)), None
    yield "ban-announced", "Its packets count as yet.", brought((), (BAN,), (1, 2), APPLIED), None
    other = (Entry(STRANGER.public),)
    yield "ban", "Others' packets count.", brought((BAN,), (), (2,), APPLIED, round=2, entries=other), None
    listed = (Entry(verdict=2, code=322, weight=0, clip=0),)
    yield (
        "ban-listed",
        "Its packets may be listed as refused.",
        brought((BAN,), (), (), NULL, round=2, entries=listed),
        None,
    )
    peer = {"peer": PEER.public.hex()}
    bans = chained((2, "ban", peer), (4, "unban", peer), (3, "ban", {"peer": STRANGER.public.hex()}), (6, "ban", peer))
    yield "bans", "Banned, unbanned, and banned again.", brought((), bans, (1, 2, 3, 4, 5, 6)), None
    yield "unbanned", "Its packets count again.", brought(bans, (), (), APPLIED, round=4), None
    yield "unban-nobody", "Nobody is banned.", brought((), (BAN.but(action="unban"),), (2,)), None


def broken_rows() -> Iterator[Row]:
    """Chains that do not hold."""
    second = amend(RATES, 4, "settings", changes=RATE)
    of_run, of_text = RUN.run_id.hex(), digest("amendment", RATES.canonical).hex()
    paused_late = amend(PAUSE, 9, "settings", changes=RATE)
    times = {"rounds.grace_s_min": 90.0}  # above grace_s_max
    wide, narrow = {"rounds.grace_s_max": 200.0}, {"rounds.deadline_s": 100.0}
    high = {"rounds.grace_s_min": 150.0}
    crowd = chained(*((number + 2, "ban", {"peer": PEER.public.hex()}) for number in range(65)))
    wrong: dict[str, tuple[str, Fields]] = {
        "number-2": ("The first one has the number 1.", brought((), (RATES.but(number=2),))),
        "number-again": ("The second one has the number 2.", brought((RATES,), (second.but(number=1),))),
        "number-skipped": ("No number is left out.", brought((RATES,), (second.but(number=3),))),
        "previous-run": ("Only the first one follows the run.", brought((RATES,), (second.but(previous=of_run),))),
        "previous-zero": ("The first one follows the run.", brought((), (RATES.but(previous="00" * 32),))),
        "previous-other": ("It follows another one.", brought((RATES,), (second.but(previous="ab" * 32),))),
        "previous-text": ("A digest covers the signature.", brought((RATES,), (second.but(previous=of_text),))),
        "order": ("They come in order.", brought((), (second, RATES))),
        "twice": ("None comes twice.", brought((RATES,), (RATES,))),
        "sixty-five": ("At most 64 at once.", brought((), crowd)),
        "record-names-none": ("The record names the newest.", brought((), (RATES,), amendment=bytes(32))),
        "record-names-older": ("The record names the newest.", brought((RATES,), (second,), amendment=RATES.digest)),
        "record-names-other": ("The record names another one.", brought((RATES,), (), amendment=STATE_1, round=3)),
        "record-forgets": ("No record forgets.", brought((RATES,), (), amendment=bytes(32), round=3)),
        "too-late": ("Round 2 closes with the record that brings it in.", brought((), (RATES,), round=2)),
        "much-too-late": ("Round 2 is long over.", brought((), (RATES,), round=9)),
        "ban-too-late": ("So that all know it before.", brought((), (BAN,), round=2)),
        "pause-too-late": ("So that all know it before.", brought((), (PAUSE,), round=2)),
        "rollback-too-late": ("So that all know it before.", brought((), (BACK,), record=ROLLBACK, round=2)),
        "rollback-after-resume": (
            "The round is no longer held shut.",
            brought(
                chained(HALT),
                chained(HALT, GO_ON, (3, "rollback", {"to_round": 1}))[1:],
                record=ROLLBACK,
                round=3,
            ),
        ),
        "settings-while-paused": (
            "Peers would not know them.",
            brought(chained(HALT), chained(HALT, settings(3, RATE), GO_ON)[1:], round=3),
        ),
        "paused-twice": ("A pause stands already.", brought((), chained(HALT, (5, "pause", {})))),
        "resumed-unpaused": ("No pause stands.", brought((), (amend(None, 3, "resume"),))),
        "resumed-twice": ("No pause stands any more.", brought((), chained(HALT, GO_ON, GO_ON))),
        "resumed-later": ("A resume names the round of the pause.", brought((), chained(HALT, (4, "resume", {})))),
        "resumed-earlier": ("A resume names the round of the pause.", brought((), chained(HALT, (2, "resume", {})))),
        "paused-settings": ("Only a resume ends a pause.", brought((PAUSE,), (paused_late,), round=2)),
        "times": ("Times are in order.", brought((), chained(settings(2, times)))),
        "times-later": (
            "In every round.",
            brought((), chained(settings(9, narrow), settings(5, {**wide, **high}))),
        ),
        "times-before": (
            "In every round, also in one before a mending one.",
            brought((), chained(settings(9, wide), settings(5, high))),
        ),
    }
    for name, (why, fields) in wrong.items():
        yield name, why, fields, Code.BAD_AMENDMENT


def kept_rows() -> Iterator[Row]:
    """Records that do not keep to amendments which are in order."""
    wrong: dict[str, tuple[str, Fields]] = {
        "paused-round": ("No round closes while it is held shut.", brought((PAUSE,), (), round=2)),
        "paused-later-round": ("Nor does a later one.", brought((PAUSE,), (), round=9)),
        "rollback-unordered": ("Nobody ordered a rollback.", brought((), (), record=ROLLBACK)),
        "rollback-other-round": ("Not in this round.", brought((BACK,), (), record=ROLLBACK, round=3)),
        "rollback-missing": ("The round was to be a rollback.", brought((BACK,), (), record=NULL, round=2)),
        "rollback-applied": ("The round was to be a rollback.", brought((BACK,), (), record=APPLIED, round=2)),
    }
    for name, (why, fields) in wrong.items():
        yield name, why, fields, Code.BAD_AMENDMENT
    yield "banned", "Its packet was accepted all the same.", brought((BAN,), (), (), APPLIED, round=2), Code.BANNED
    again = chained((2, "ban", {"peer": PEER.public.hex()}), (4, "unban", {"peer": PEER.public.hex()}))
    yield "banned-as-yet", "It is unbanned one round later.", brought(again, (), (), APPLIED, round=3), Code.BANNED
    pauses = chained((2, "ban", {"peer": PEER.public.hex()}), (2, "pause", {}))
    yield (
        "pause-first",
        "The pause is looked at before the ban.",
        brought(pauses, (), (), APPLIED, round=2),
        Code.BAD_AMENDMENT,
    )


def rollback_rows() -> Iterator[Row]:
    """Whether a rollback leads where it should."""
    yield (
        "there",
        "The state of the round to go back to.",
        {"target": APPLIED.data, "bytes": replace(ROLLBACK, state_root=STATE_1).data},
        None,
    )
    yield (
        "genesis",
        "The state of the genesis.",
        {"target": GENESIS.data, "bytes": replace(ROLLBACK, state_root=BASE).data},
        None,
    )
    yield (
        "elsewhere",
        "Another state.",
        {"target": APPLIED.data, "bytes": replace(ROLLBACK, state_root=STATE_2).data},
        Code.BAD_STATE,
    )
    yield (
        "nowhere",
        "No state.",
        {"target": GENESIS.data, "bytes": replace(ROLLBACK, state_root=noise("root", 32)).data},
        Code.BAD_STATE,
    )


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("amendment", "check amendment", good_rows())
    yield from table("amendment-envelope", "check amendment", envelope_rows())
    yield from table("amendment-form", "check amendment", form_rows())
    yield from table("amendment-settings", "check amendment", settings_rows())
    yield from table("amendment-own", "check amendment", own_rows())
    yield from table("amendments", "check amendments", chain_rows())
    yield from table("amendments-action", "check amendments", action_rows())
    yield from table("amendments-broken", "check amendments", broken_rows())
    yield from table("amendments-kept", "check amendments", kept_rows())
    yield from table("rollback", "check rollback", rollback_rows())
