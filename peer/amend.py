"""The operator's actions on a run that goes on: show what would change, sign an amendment, bring it to the aggregators.

The aggregator that leads says which amendments there are and which round's record takes the next; all of it is checked
here once more. Nothing is asked, but everything is explained, and a dry run sends nothing.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peer.amendments import describe, fetched_amendments
from peer.connection import as_user_error
from peer.errors import UserCode, UserError, os_errors, printable
from peer.find import Finder
from peer.net.errors import LinkError
from peer.net.link import Link
from peer.operator import OperatorFolder
from peer.store import Home, atomic_write, load_key
from protocol.amendment import (
    Action,
    Amendment,
    Amendments,
    Ban,
    ChangeSettings,
    Pause,
    Resume,
    Rollback,
    Unban,
    sign_amendment,
)
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.invite import Invite
from protocol.ledger import Kind, RoundRecord, Verdict, check_record
from protocol.limits import RECORD_BYTES_MAX, ROUND_MAX
from protocol.run import RunConfig, Setting, kind_of_setting

RECENT_ROUNDS = 20  # in which peers are looked for
TRIES = 5  # a round may close between the look at the run and the amendment
OTHERS_S = 5.0  # how long another aggregator may take to answer

_WHO = {
    "inner": "every peer trains by it, also those that join later",
    "compression": "every packet holds what it says",
    "outer": "every update is merged by it",
    "rounds": "the aggregator opens and closes rounds by it",
}
_KIND = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Wish:
    """What the operator wants: the action, and from when: a round, or so many rounds after the open one.

    The peer of a ban may be the beginning of a key, as it is shown. A resume goes on where the pause began.
    """

    action: Action
    start: str = "+1"
    peer: str = ""


@dataclass(frozen=True)
class Situation:
    """A run as its aggregator has it. `amendments` has those that no record names yet too."""

    run: RunConfig
    amendments: Amendments
    next_record: int
    records: tuple[RoundRecord, ...]  # the newest, newest first

    @property
    def contributors(self) -> list[bytes]:
        """Whose packets counted in the newest rounds."""
        return _senders(self.records)

    @property
    def keys(self) -> set[bytes]:
        """Every peer that the newest records or a ban name."""
        named = {entry.peer for record in self.records for entry in record.entries}
        return named | {item.action.peer for item in self.amendments.chain if isinstance(item.action, Ban | Unban)}


def _senders(records: Sequence[RoundRecord]) -> list[bytes]:
    entries = [entry for record in records for entry in record.entries if entry.verdict == Verdict.ACCEPTED]
    return list(dict.fromkeys(entry.peer for entry in entries))


def parse_setting(text: str) -> tuple[str, Setting]:
    """Read `table.key=value`. Raises UserError that names the key and the remedy."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise UserError(UserCode.BAD_ARGUMENT, f"{text!r} sets nothing", "write it as --set inner.learning_rate=0.001")
    try:
        kind = kind_of_setting(key)
    except ValueError as error:
        what, _, remedy = str(error).rpartition("; ")
        raise UserError(UserCode.BAD_ARGUMENT, what, remedy) from error
    try:
        return key, _value(kind, value)
    except ValueError as error:
        remedy = f"write {_KIND[kind]}, for example --set {key}={_example(kind)}"
        raise UserError(UserCode.BAD_ARGUMENT, f"{key} = {value!r} is not {_KIND[kind]}", remedy) from error


def _value(kind: type, text: str) -> Setting:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if kind is int:
        return int(text)
    return float(text) if kind is float else text.strip("\"'")


def _example(kind: type) -> str:
    return {bool: "true", int: "20", float: "0.5"}.get(kind, "cosine")


def parse_settings(texts: Sequence[str]) -> ChangeSettings:
    """All `--set` options of a command. Raises UserError."""
    settings = [parse_setting(text) for text in texts]
    twice = next((key for number, (key, _) in enumerate(settings) if key in dict(settings[:number])), None)
    if twice is not None:
        raise UserError(UserCode.BAD_ARGUMENT, f"{twice} is set twice", "name each setting once")
    return ChangeSettings(dict(settings))


async def amend(folder: OperatorFolder, wish: Wish, *, dry_run: bool = False, plaintext: bool = False) -> list[str]:
    """Sign what the operator wants and bring it to the aggregators; what that means, line by line.

    Raises UserError when it makes no sense, or when this folder cannot sign, and ProtocolError when it is refused.
    """
    signed, invite = folder.load()
    key, run = _operator_key(folder, signed.config), signed.config
    # Whoever only brings something leaves nothing behind, and comes with a key made for it.
    with tempfile.TemporaryDirectory() as temporary:
        finder = _finder(folder, run, invite, Path(temporary))
        try:
            async with await _connect(finder, plaintext=plaintext) as link:
                situation = await look(link, run)
                amendment, lines = _write(situation, wish, key)
                if dry_run:
                    return [*lines, "", "this is a dry run: nothing was sent"]
                tries = 1
                while not await _bring(link, amendment, situation, last=tries == TRIES):
                    situation, tries = await look(link, run), tries + 1
                    amendment, lines = _write(situation, wish, key)
                told = []
                if len(run.aggregators) > 1:
                    told = await _tell_others(finder, link, amendment, plaintext=plaintext)
        except LinkError as error:
            raise as_user_error(error) from error
        finally:
            await finder.close()
    lines.append(f"{link.address} has it, and the record of round {situation.next_record} will name it")
    return [*lines, *told]


def _write(situation: Situation, wish: Wish, key: PrivateKey) -> tuple[Amendment, list[str]]:
    """The signed amendment, and what it means."""
    amendment = sign_amendment(draft(situation, wish), key)
    changed = situation.amendments.bring_in(amendment, situation.next_record)
    return amendment, explain(situation, amendment, changed)


async def _bring(link: Link, amendment: Amendment, situation: Situation, *, last: bool) -> bool:
    """Bring it to the aggregator; False when a round has closed meanwhile, so that another one has to be written."""
    try:
        await link.amend(amendment.to_bytes())
    except ProtocolError as error:
        if last or error.code != Code.BAD_AMENDMENT or (await link.amend()).round == situation.next_record:
            raise
        return False
    return True


def _finder(folder: OperatorFolder, run: RunConfig, invite: Invite, temporary: Path) -> Finder:
    """A finder that knows what this folder's aggregator knows of the others, and is not online yet."""
    home = Home(temporary)
    known = Path("runs") / run.run_id.hex() / "aggregators.json"
    if (folder.aggregator_home / known).is_file():
        with os_errors(folder.aggregator_home / known):
            atomic_write(home.path / known, (folder.aggregator_home / known).read_bytes())
    return Finder(invite, home, run)


async def _connect(finder: Finder, *, plaintext: bool) -> Link:
    """Join the aggregator that leads; the directory, which takes seconds, is asked when it is not where it was."""
    try:
        return await finder.connect(PrivateKey.generate(), plaintext=plaintext, standby=False)
    except LinkError:
        await finder.go_online()
        return await finder.connect(PrivateKey.generate(), plaintext=plaintext, standby=False)


def _operator_key(folder: OperatorFolder, run: RunConfig) -> PrivateKey:
    path = folder.path / "operator.key"
    if not path.exists():
        raise UserError(
            UserCode.NO_SUCH_FILE,
            f"{folder.path} holds no operator.key, and only with that key can the run be changed",
            "run this where `sparseloco-peer run new` made the run, or copy operator.key here for as long as it takes",
        )
    key = load_key(path)
    if key.public != run.operator:
        raise UserError(
            UserCode.BAD_KEY_FILE, f"{path} is not the key that signed this run", "restore it from your backup"
        )
    return key


async def look(link: Link, run: RunConfig) -> Situation:
    """How a run stands at the aggregator of this link. Raises LinkError and ProtocolError."""

    async def fetch(kind: str, digest: bytes, size_max: int) -> bytes:
        return await link.fetch(kind, digest, size_max=size_max)

    records = [RoundRecord.from_bytes(link.head_record)]
    check_record(records[0], run)
    while len(records) < RECENT_ROUNDS and records[-1].kind != Kind.GENESIS:
        record = RoundRecord.from_bytes(await fetch("record", records[-1].previous, RECORD_BYTES_MAX))
        check_record(record, run)
        records.append(record)
    # Last, for a round may close at any moment.
    known = await link.amend()
    amendments = await fetched_amendments(Amendments(run), known.newest, fetch, None)
    return Situation(run, amendments, known.round, tuple(records))


def draft(situation: Situation, wish: Wish) -> Amendment:
    """The amendment of a wish, without a signature. Raises UserError when it makes no sense in this situation."""
    action, amendments = wish.action, situation.amendments
    if isinstance(action, Ban | Unban):
        action = type(action)(_whole_key(situation, wish.peer))
    if isinstance(action, Resume):
        if amendments.paused_from is None:
            raise UserError(UserCode.BAD_ARGUMENT, "the run is not paused", "nothing to do: rounds open by themselves")
        return amendments.draft(action, amendments.paused_from)
    round = _start(situation, wish)
    _demand_change(amendments, action, round)
    return amendments.draft(action, round)


def _start(situation: Situation, wish: Wish) -> int:
    """The round from which it is to hold."""
    first = situation.next_record + 1
    held_shut = isinstance(wish.action, Rollback) and situation.amendments.paused_at(situation.next_record)
    if held_shut:
        first = situation.next_record
    text = wish.start.removeprefix("+")
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise UserError(
            UserCode.BAD_ARGUMENT, f"{wish.start!r} is no round", f"write --from {first}, or --from +1 for the next one"
        )
    number = int(text)
    round = first - 1 + number if wish.start.startswith("+") else number
    if not first <= round <= ROUND_MAX:
        raise UserError(
            UserCode.BAD_ARGUMENT,
            f"from round {round} on is too early: round {situation.next_record} is the next to close, and everybody has"
            " to know before a round opens",
            f"write --from {first} or a later round",
        )
    return round


def _whole_key(situation: Situation, text: str) -> bytes:
    """The key that begins like this."""
    word = text.lower()
    hexadecimal = word and not word.strip("0123456789abcdef")
    if hexadecimal and len(word) == 64:
        return bytes.fromhex(word)
    found = sorted(key for key in situation.keys if key.hex().startswith(word)) if hexadecimal else []
    if len(found) != 1:
        what = f"{len(found)} peers have keys that begin with {text!r}" if found else f"no known peer is {text!r}"
        remedy = "name a peer by its key, 64 hexadecimal digits: `sparseloco-peer run peers FOLDER --json` shows them"
        raise UserError(UserCode.BAD_ARGUMENT, what, remedy)
    return found[0]


def _demand_change(amendments: Amendments, action: Action, round: int) -> None:
    """Refuse what would change nothing, or cannot be. Raises UserError."""
    match action:
        case ChangeSettings(changes):
            try:
                same = amendments.config_at(round).amended(changes) == amendments.config_at(round).amended({})
            except ValueError as error:
                what, _, remedy = str(error).rpartition("; ")
                raise UserError(UserCode.BAD_ARGUMENT, what or remedy, remedy) from error
            problem = f"round {round} has these settings already" if same else ""
        case Pause():
            since = amendments.paused_from
            problem = "" if since is None else f"the run is paused from round {since} on already"
        case Rollback(to_round):
            problem = "" if to_round < round else f"round {round} cannot go back to round {to_round}"
        case Ban(peer):
            problem = "this peer is banned already" if peer in amendments.banned_at(round) else ""
        case Unban(peer):
            problem = "" if peer in amendments.banned_at(round) else "this peer is not banned"
        case _:
            problem = ""
    if problem:
        raise UserError(UserCode.BAD_ARGUMENT, problem, "`sparseloco-peer status FOLDER` shows what holds now")


# What is told


def explain(situation: Situation, amendment: Amendment, changed: Amendments) -> list[str]:
    """What an amendment would do: from which round, what changes, and who is affected."""
    round, run = amendment.round, situation.run
    lines = [
        f"amendment {amendment.number} of run {run.name}: {describe(amendment)}",
        f"  round {situation.next_record} is the next to close",
    ]
    peers = len(situation.contributors)
    seen = f"{peers} {'peer' if peers == 1 else 'peers'} had packets in the last {len(situation.records)} rounds"
    match amendment.action:
        case ChangeSettings(changes):
            return [*lines, *_difference(situation.amendments, changed, changes, round), f"  {seen}"]
        case Pause():
            return [*lines, f"  rounds before {round} go on as ever; peers wait, and keep what they have", f"  {seen}"]
        case Resume():
            return [*lines, f"  round {round} opens as soon as the aggregator has this; {seen}"]
        case Rollback(to_round):
            undone = f"what the rounds {to_round + 1} to {round - 1} did to the parameters is undone"
            kept = "their records stay, and so do the peers' residuals and moments"
            return [*lines, f"  {undone}; {kept}", f"  {seen}"]
        case Ban(peer):
            counted = sum(peer in _senders([record]) for record in situation.records)
            return [*lines, f"  it had packets in {counted} of the last {len(situation.records)} rounds"]
        case _:
            return lines


def _difference(before: Amendments, after: Amendments, keys: Iterable[str], round: int) -> list[str]:
    """Each setting that changes, old and new, and whom its table concerns."""
    old, new = before.config_at(round), after.config_at(round)
    changed = [key for key in sorted(keys) if _setting(old, key) != _setting(new, key)]
    width = max((len(key) for key in changed), default=0)
    lines = [f"  {key:<{width}}  {_setting(old, key)!r} -> {_setting(new, key)!r}" for key in changed]
    return lines + [f"  [{table}] {_WHO[table]}" for table in dict.fromkeys(key.partition(".")[0] for key in changed)]


def _setting(run: RunConfig, key: str) -> Setting:
    table, _, name = key.partition(".")
    value: Setting = getattr(getattr(run, table), name)
    return value


async def _tell_others(finder: Finder, first: Link, amendment: Amendment, *, plaintext: bool) -> list[str]:
    """Bring it to the standbys too, lest it is lost with the aggregator that leads before a record names it."""
    lines = []
    for place in await finder.places():
        if first.aggregator in place.aggregators:
            continue
        try:
            async with await place.dial(amendment.run_id, plaintext=plaintext, timeout_s=OTHERS_S) as link:
                await link.amend(amendment.to_bytes())
            lines.append(f"{place.address}, which stands by, has it too")
        except (LinkError, ProtocolError) as error:
            lines.append(f"{place.address}, which stands by, does not have it yet: {printable(str(error))}")
    return lines
