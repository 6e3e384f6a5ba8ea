"""`sparseloco-peer run peers`: who contributes to a run, as its ledger has it."""

import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peer.amend import look
from peer.amendments import stored_amendments
from peer.connection import as_user_error
from peer.errors import UserCode, UserError
from peer.find import Finder
from peer.net.errors import LinkError
from peer.store import Home
from peer.stored import Stored, find_stores
from protocol.amendment import Amendments
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.invite import Invite
from protocol.ledger import Kind, RoundRecord, Verdict, check_record
from protocol.limits import RECORD_BYTES_MAX


@dataclass(frozen=True)
class PeerLine:
    """What the ledger says of one peer: packets by verdict, tokens that count, when it was last seen, and refusals."""

    peer: str
    accepted: int
    late: int
    refused: int
    tokens: int
    last_round: int
    last_ms: int
    codes: dict[str, int]
    """Why packets did not count, by the name of the code."""
    banned: bool

    def text(self, now_ms: int) -> str:
        """The peer as a line of the table."""
        seen = _ago((now_ms - self.last_ms) / 1000)
        codes = ", ".join(f"{name} x{count}" for name, count in sorted(self.codes.items()))
        notes = "BANNED  " * self.banned + codes
        return (
            f"{self.peer[:16]:<16} {self.accepted:>8} {self.late:>5} {self.refused:>8} {self.tokens:>15,} "
            f"{self.last_round:>10} {seen:>10}  {notes}"
        ).rstrip()


_TITLE = (
    f"{'peer':<16} {'accepted':>8} {'late':>5} {'refused':>8} {'tokens':>15} "
    f"{'last round':>10} {'last seen':>10}  notes"
)


@dataclass(frozen=True)
class Contributors:
    """The peers of some rounds, those that were seen last first."""

    run: str
    first_round: int
    last_round: int
    peers: tuple[PeerLine, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for people."""
        now_ms = round(datetime.now(UTC).timestamp() * 1000)
        count = "1 peer" if len(self.peers) == 1 else f"{len(self.peers)} peers"
        head = f"run {self.run}, rounds {self.first_round} to {self.last_round}: {count}"
        return [head, "", _TITLE, *(peer.text(now_ms) for peer in self.peers)]


def contributors_of_folder(folder: Path, count: int) -> Contributors:
    """The peers of the newest `count` rounds that a folder has. Raises UserError and ProtocolError."""
    newest: tuple[tuple[int, int], Contributors] | None = None
    for path in find_stores(folder):
        with closing(Stored(path)) as store:
            head = store.head()
            if head < 0:
                continue
            run = store.run()
            rows = (store.record(round) for round in range(max(0, head - count + 1), head + 1))
            records = [RoundRecord.from_bytes(row.data) for row in rows if row is not None]
            for record in records:
                check_record(record, run)
            if records and (newest is None or (records[-1].epoch, head) > newest[0]):
                amendments = stored_amendments(store.blobs, Amendments(run), records[-1].amendment)
                newest = (records[-1].epoch, head), _sum_up(amendments, records)
    if newest is None:
        raise UserError(
            UserCode.NO_SUCH_FILE, f"there is no ledger in {folder}", "name a run's folder, or the invite of a run"
        )
    return newest[1]


async def contributors_of_run(invite_text: str, count: int, *, plaintext: bool = False) -> Contributors:
    """The peers of the newest `count` rounds, asked of an aggregator. Raises UserError and ProtocolError."""
    invite = Invite.from_text(invite_text)
    with tempfile.TemporaryDirectory() as folder:
        finder = await Finder.open(invite, Home(Path(folder)))
        try:
            async with await finder.connect(PrivateKey.generate(), plaintext=plaintext) as link:
                assert finder.run is not None, "a link was made, and with it the run is known"
                situation = await look(link, finder.run)
                records = list(situation.records[:count])
                while len(records) < count and records[-1].kind != Kind.GENESIS:
                    digest = records[-1].previous
                    record = RoundRecord.from_bytes(await link.fetch("record", digest, size_max=RECORD_BYTES_MAX))
                    if record.digest != digest:
                        raise ProtocolError(Code.WRONG_DIGEST, "the record is another than the one asked for")
                    records.append(record)
        except LinkError as error:
            raise as_user_error(error) from error
        finally:
            await finder.close()
    return _sum_up(situation.amendments, records[::-1])


def _sum_up(amendments: Amendments, records: list[RoundRecord]) -> Contributors:
    """Sum up records, oldest first; every banned peer has a line."""
    newest = records[-1]
    banned = amendments.banned_at(newest.round + 1)
    seen = {entry.peer: record for record in records for entry in record.entries}
    lines = [_line(peer, records, seen[peer], banned=peer in banned) for peer in seen]
    lines += [PeerLine(peer.hex(), 0, 0, 0, 0, 0, 0, {}, True) for peer in sorted(banned - seen.keys())]
    lines.sort(key=lambda line: (-line.last_round, -line.accepted, line.peer))
    return Contributors(amendments.run.name, records[0].round, newest.round, tuple(lines))


def _line(peer: bytes, records: Iterable[RoundRecord], last: RoundRecord, *, banned: bool) -> PeerLine:
    entries = [entry for record in records for entry in record.entries if entry.peer == peer]
    verdicts = Counter(entry.verdict for entry in entries)
    return PeerLine(
        peer.hex(),
        verdicts[Verdict.ACCEPTED],
        verdicts[Verdict.LATE],
        verdicts[Verdict.REFUSED],
        sum(entry.tokens for entry in entries if entry.verdict == Verdict.ACCEPTED),
        last.round,
        last.closed_ms,
        dict(Counter(_name(entry.code) for entry in entries if entry.code)),
        banned,
    )


def _name(code: int) -> str:
    try:
        return Code(code).name.lower().replace("_", "-")
    except ValueError:
        return f"SL{code}"


def _ago(seconds: float) -> str:
    if seconds > 1e9:
        return "never"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
