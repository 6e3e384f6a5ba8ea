"""`sparseloco-peer status`: the chain of a run at a glance, from a folder that holds it or from a living aggregator."""

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peer.amendments import describe, fetched_amendments, stored_amendments
from peer.connection import as_user_error
from peer.errors import UserCode, UserError
from peer.find import Finder
from peer.net.errors import LinkError
from peer.store import Home
from peer.stored import Stored, find_stores
from protocol.amendment import Amendments
from protocol.identity import PrivateKey
from protocol.invite import Invite
from protocol.ledger import Kind, RoundRecord, Verdict, check_record
from protocol.limits import RECORD_BYTES_MAX
from protocol.run import RunConfig


@dataclass(frozen=True)
class RoundLine:
    """One round. Sizes are None where they are not known, as of a round that is looked at from afar."""

    round: int
    epoch: int
    kind: str
    reason: str
    seconds: float
    accepted: int
    late: int
    refused: int
    tokens: int
    packet_bytes: int | None
    update_bytes: int | None
    state_root: str

    def text(self) -> str:
        """The round as a line of the table."""
        sizes = ["-" if size is None else f"{size:,}" for size in (self.packet_bytes, self.update_bytes)]
        return (
            f"{self.round:>7} {self.epoch:>5} {self.kind:<8} {self.reason:<9} {self.seconds:>8.1f} {self.accepted:>8} "
            f"{self.late:>5} {self.refused:>8} {self.tokens:>13,} {sizes[0]:>13} {sizes[1]:>13}  {self.state_root[:16]}"
        )


_TITLE = (
    f"{'round':>7} {'epoch':>5} {'kind':<8} {'closed by':<9} {'seconds':>8} {'accepted':>8} "
    f"{'late':>5} {'refused':>8} {'tokens':>13} {'packet bytes':>13} {'update bytes':>13}  state root"
)


@dataclass(frozen=True)
class Chain:
    """The newest rounds of a run, oldest first. Records are checked one by one; `audit` checks what they say."""

    source: str
    run: str
    run_id: str
    rounds: int
    head: int
    epoch: int
    aggregator: str
    closed_ms: int
    state_root: str
    loss: float | None
    """Validation loss, nats a token, of the state after round `loss_round`; None when these rounds say nothing."""
    loss_round: int | None
    amendments: tuple[str, ...]
    """What the operator changed, oldest first."""
    last: tuple[RoundLine, ...]

    def to_json(self) -> dict[str, Any]:
        """The chain as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The chain for people."""
        closed = datetime.fromtimestamp(self.closed_ms / 1000, UTC).isoformat(timespec="seconds")
        return [
            f"run {self.run} ({self.run_id[:16]}) as {self.source} has it",
            f"round {self.head} of {self.rounds}, epoch {self.epoch}, closed {closed}",
            f"signed by {self.aggregator[:16]}, state root {self.state_root}",
            *([] if self.loss is None else [f"validation loss {self.loss:.4f} after round {self.loss_round}"]),
            *(f"amended: {text}" for text in self.amendments),
            "",
            _TITLE,
            *(line.text() for line in self.last),
        ]


def status_of_folder(folder: Path, count: int) -> Chain:
    """The newest chain that a folder holds. Raises UserError when there is none, ProtocolError when it is damaged."""
    chains = []
    for path in find_stores(folder):
        with closing(Stored(path)) as store:
            if store.head() >= 0:
                chains.append(_chain_of_store(store, count))
    if not chains:
        raise UserError(
            UserCode.NO_SUCH_FILE, f"there is no ledger in {folder}", "name a run's folder, or the invite of a run"
        )
    return max(chains, key=lambda chain: (chain.epoch, chain.head))


def _chain_of_store(store: Stored, count: int) -> Chain:
    run, head = store.run(), store.head()
    records, lines = [], []
    for round in range(max(0, head - count + 1), head + 1):
        row = store.record(round)
        if row is not None:
            record = _checked(row.data, run)
            blobs = store.blobs
            packets = sum(blobs.size("packet", entry.packet_digest.hex()) for entry in record.entries)
            records.append(record)
            lines.append(_line(record, packets, blobs.size("update", record.update_digest.hex())))
    amendments = stored_amendments(store.blobs, Amendments(run), records[-1].amendment)
    return _chain(str(store.path), amendments, records, lines)


async def status_of_run(invite_text: str, count: int, *, plaintext: bool = False) -> Chain:
    """The newest chain, asked of an aggregator of the run. Raises UserError or ProtocolError."""
    invite = Invite.from_text(invite_text)
    # Whoever only looks leaves nothing behind, and comes with a key of its own lest it end a peer's session.
    with tempfile.TemporaryDirectory() as folder:
        finder = await Finder.open(invite, Home(Path(folder)))
        try:
            link = await finder.connect(PrivateKey.generate(), plaintext=plaintext)
            run = finder.run
            assert run is not None, "a link was made, and with it the run is known"
            async with link:
                records = [_checked(link.head_record, run)]
                while len(records) < count and records[-1].kind != Kind.GENESIS:
                    data = await link.fetch("record", records[-1].previous, size_max=RECORD_BYTES_MAX)
                    records.append(_checked(data, run))

                async def fetch(kind: str, digest: bytes, size_max: int) -> bytes:
                    return await link.fetch(kind, digest, size_max=size_max)

                amendments = await fetched_amendments(Amendments(run), records[0].amendment, fetch, None)
        except LinkError as error:
            raise as_user_error(error) from error
        finally:
            await finder.close()
    lines = [_line(record, None, None) for record in reversed(records)]
    return _chain(f"the aggregator at {link.address}", amendments, records[::-1], lines)


def _checked(data: bytes, run: RunConfig) -> RoundRecord:
    record = RoundRecord.from_bytes(data)
    check_record(record, run)
    return record


def _chain(source: str, amendments: Amendments, records: Sequence[RoundRecord], lines: list[RoundLine]) -> Chain:
    """Sum up records, oldest first, of which the last one names these amendments."""
    run, head = amendments.config_at(records[-1].round + 1), records[-1]
    evaluated = [(record.loss_micronats / 1e6, record.evaluated_round) for record in records if record.loss_micronats]
    loss, loss_round = evaluated[-1] if evaluated else (None, None)
    return Chain(
        source,
        run.name,
        run.run_id.hex(),
        run.outer.rounds,
        head.round,
        head.epoch,
        head.aggregator.hex(),
        head.closed_ms,
        head.state_root.hex(),
        loss,
        loss_round,
        tuple(describe(amendment) for amendment in amendments.chain),
        tuple(lines),
    )


def _line(record: RoundRecord, packet_bytes: int | None, update_bytes: int | None) -> RoundLine:
    verdicts = [entry.verdict for entry in record.entries]
    return RoundLine(
        record.round,
        record.epoch,
        record.kind.name.lower(),
        record.reason.name.lower(),
        (record.closed_ms - record.opened_ms) / 1000,
        verdicts.count(Verdict.ACCEPTED),
        verdicts.count(Verdict.LATE),
        verdicts.count(Verdict.REFUSED),
        sum(entry.tokens for entry in record.entries if entry.verdict == Verdict.ACCEPTED),
        packet_bytes,
        update_bytes,
        record.state_root.hex(),
    )
