"""What the dashboard and the metrics say of a run, summed up from its ledger as it lies on the disk.

`Board.read` takes in the records that came since and returns an immutable `View`; it reads files, so a thread does it.
What only the aggregator's memory knows (who is connected, which round is open) comes beside it as `Live`.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from peer.amendments import stored_amendments
from peer.errors import UserCode, UserError
from peer.journal import PacketRow
from peer.losses import bits_per_byte, perplexity
from peer.stored import Stored, find_stores
from protocol.amendment import Amendments
from protocol.errors import ProtocolError
from protocol.ledger import Kind, RoundRecord, Verdict
from protocol.run import RunConfig
from protocol.wire import packet_wire_bytes_max, update_wire_bytes_max

ROUNDS_KEPT = 1000  # of which all is known; of older ones the sums
ROUNDS_MAPPED = 60
PEERS_KEPT = 10_000
LOSSES_KEPT = 2000
READ_AT_ONCE = 100  # records, so that other threads get their turn while a long ledger is read
ALARM_ROUNDS = 10
DIVERGED = 1.1
STALE_DEADLINES = 1.5


@dataclass(frozen=True)
class Round:
    """One round as its record has it. Bytes are 0 where the files are gone."""

    round: int
    epoch: int
    kind: str
    reason: str
    closed_ms: int
    seconds: float
    accepted: int
    late: int
    refused: int
    tokens: int
    packet_bytes: int
    """The largest accepted packet in transport form."""
    download_bytes: int
    """The smaller of update and bundle in transport form."""
    state_root: str


@dataclass(frozen=True)
class PeerSums:
    """What the ledger says of one peer, in packets."""

    accepted: int = 0
    late: int = 0
    refused: int = 0
    tokens: int = 0
    last_round: int = 0


@dataclass(frozen=True)
class Loss:
    """Validation loss, nats a token, of the state after a round."""

    round: int
    loss: float


@dataclass(frozen=True)
class Sums:
    """Counts over the whole ledger."""

    rounds: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (kind, reason)
    verdicts: Mapping[str, int] = field(default_factory=dict)
    codes: Mapping[int, int] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class View:
    """A run at one moment. `branch` changes when a takeover gave up records, so that all must be read anew."""

    run: RunConfig
    amendments: Amendments
    head: RoundRecord
    branch: int
    behind: bool
    """Whether records are on the disk that are not in this view yet."""
    rounds: tuple[Round, ...]
    losses: tuple[Loss, ...]
    lowest: Loss | None
    peers: Mapping[bytes, PeerSums]
    verdicts: Mapping[int, Mapping[bytes, tuple[int, int]]]
    """Of the newest rounds, by round and peer: verdict and code."""
    sums: Sums
    open_packets: tuple[PacketRow, ...]
    """Packets that are stored for the round after the head; each of them had its receipt."""

    @cached_property
    def settings(self) -> RunConfig:
        """The run with the settings of the open round."""
        return self.amendments.config_at(self.head.round + 1)

    @property
    def complete(self) -> bool:
        """Whether the last round has closed."""
        return self.head.round >= self.settings.outer.rounds

    @cached_property
    def packet_bytes_max(self) -> int:
        """The most bytes of a packet in transport form."""
        return packet_wire_bytes_max(self.settings)

    @cached_property
    def download_bytes_max(self) -> int:
        """The most bytes of an update in transport form."""
        return update_wire_bytes_max(self.settings)


@dataclass(frozen=True)
class Live:
    """What the aggregator's memory knows. `newest` may not be in a record yet."""

    leading: bool = False
    connected: int = 0
    open_round: int | None = None
    closes_in_s: float = 0.0
    newest: Loss | None = None
    bytes_per_token: float | None = None
    """Of the held-out text; None where it is not known."""


@dataclass(frozen=True)
class Alarm:
    """Something that an operator should look at."""

    name: str
    text: str


ALARMS = ("divergence", "unguarded", "stale_head")


class Board:
    """One ledger and its sums. All calls come from one thread, for SQLite wants it so. Raises UserError."""

    def __init__(self, path: Path) -> None:
        """Raises UserError, or ProtocolError when the signed run beside the ledger is forged."""
        self._store = Stored(path)
        try:
            self.run = self._store.run()
        except BaseException:
            self._store.close()
            raise
        self._branch = 0
        self._view: View | None = None
        self._forget()

    def close(self) -> None:
        """Close the ledger."""
        self._store.close()

    def _forget(self) -> None:
        self._head: RoundRecord | None = None
        self._amendments = Amendments(self.run)
        self._rounds: deque[Round] = deque(maxlen=ROUNDS_KEPT)
        self._verdicts: deque[tuple[int, dict[bytes, tuple[int, int]]]] = deque(maxlen=ROUNDS_MAPPED)
        self._losses: list[Loss] = []
        self._lowest: Loss | None = None
        self._peers: dict[bytes, PeerSums] = {}
        self._kinds: Counter[tuple[str, str]] = Counter()
        self._counts: Counter[str] = Counter()
        self._codes: Counter[int] = Counter()
        self._tokens = 0

    def read(self) -> View | None:
        """Take in at most `READ_AT_ONCE` records; return the view when there is a first record, else None.

        It is the same object as the last time when nothing has changed.
        """
        newest = self._store.head()
        if newest < 0:
            return None
        self._check_branch()
        first = 0 if self._head is None else self._head.round + 1
        last = min(newest, first + READ_AT_ONCE - 1)
        for round in range(first, last + 1):
            row = self._store.record(round)
            if row is None:
                break
            self._take(RoundRecord.from_bytes(row.data), sizes=round > newest - ROUNDS_KEPT)
        assert self._head is not None, "there is a first record"
        packets = tuple(self._store.packets(self._head.round + 1)) if last == newest else ()
        view = self._view
        if (
            view is None
            or view.head is not self._head
            or view.open_packets != packets
            or view.behind != (last < newest)
        ):
            self._view = self._make_view(packets, behind=last < newest)
        return self._view

    def _check_branch(self) -> None:
        """Begin anew when a takeover has given up the record that was read last."""
        if self._head is not None:
            row = self._store.record(self._head.round)
            if row is None or row.digest != self._head.digest:
                self._branch += 1
                self._forget()

    def _make_view(self, packets: tuple[PacketRow, ...], *, behind: bool) -> View:
        assert self._head is not None, "there is a first record"
        return View(
            self.run,
            self._amendments,
            self._head,
            self._branch,
            behind,
            tuple(self._rounds),
            tuple(self._losses),
            self._lowest,
            dict(self._peers),
            dict(self._verdicts),
            Sums(dict(self._kinds), dict(self._counts), dict(self._codes), self._tokens),
            packets,
        )

    def _take(self, record: RoundRecord, *, sizes: bool) -> None:
        self._head = record
        if record.amendment != self._amendments.head:
            self._amendments = self._chain(record)
        if record.loss_micronats:
            self._take_loss(Loss(record.evaluated_round, record.loss_micronats / 1e6))
        if record.kind == Kind.GENESIS:
            return
        for entry in record.entries:
            known = self._peers.pop(entry.peer, PeerSums())
            name = entry.verdict.name.lower()
            tokens = entry.tokens if entry.verdict == Verdict.ACCEPTED else 0
            # It goes to the end, so that the first ones are those that were not seen for longest.
            self._peers[entry.peer] = PeerSums(
                known.accepted + (name == "accepted"),
                known.late + (name == "late"),
                known.refused + (name == "refused"),
                known.tokens + tokens,
                record.round,
            )
            self._counts[name] += 1
            self._tokens += tokens
            if entry.code:
                self._codes[entry.code] += 1
        while len(self._peers) > PEERS_KEPT:
            del self._peers[next(iter(self._peers))]
        self._kinds[record.kind.name.lower(), record.reason.name.lower()] += 1
        self._verdicts.append(
            (record.round, {entry.peer: (int(entry.verdict), entry.code) for entry in record.entries})
        )
        self._rounds.append(self._round(record, sizes=sizes))

    def _take_loss(self, loss: Loss) -> None:
        self._losses.append(loss)
        if self._lowest is None or loss.loss < self._lowest.loss:
            self._lowest = loss
        if len(self._losses) > LOSSES_KEPT:
            # Every second one shows the same curve.
            self._losses = self._losses[1::2]

    def _chain(self, record: RoundRecord) -> Amendments:
        try:
            return stored_amendments(self._store.blobs, self._amendments, record.amendment)
        except ProtocolError:
            # A record of before, or a folder that somebody copied without them: what is known is shown.
            return self._amendments

    def _round(self, record: RoundRecord, *, sizes: bool) -> Round:
        blobs, packets, download = self._store.blobs, [0], [0]
        verdicts = Counter(entry.verdict for entry in record.entries)
        accepted = [entry for entry in record.entries if entry.verdict == Verdict.ACCEPTED]
        if sizes and record.kind == Kind.APPLIED:
            packets += [blobs.size("packet", entry.packet_digest.hex()) for entry in accepted]
            download = [blobs.size("update", record.update_digest.hex()), blobs.size("bundle", record.digest.hex())]
        return Round(
            record.round,
            record.epoch,
            record.kind.name.lower(),
            record.reason.name.lower(),
            record.closed_ms,
            (record.closed_ms - record.opened_ms) / 1000,
            verdicts[Verdict.ACCEPTED],
            verdicts[Verdict.LATE],
            verdicts[Verdict.REFUSED],
            sum(entry.tokens for entry in accepted),
            max(packets),
            min((size for size in download if size), default=0),
            record.state_root.hex(),
        )


def newest_store(folder: Path) -> Path:
    """The ledger in or below a folder that has gone furthest. Raises UserError NO_SUCH_FILE when there is none."""
    found: list[tuple[int, int, Path]] = []
    for path in find_stores(folder):
        store = Stored(path)
        try:
            row = store.record(store.head())
            if row is not None:
                record = RoundRecord.from_bytes(row.data)
                found.append((record.epoch, record.round, path))
        finally:
            store.close()
    if not found:
        raise UserError(
            UserCode.NO_SUCH_FILE, f"there is no ledger in {folder}", "name a run's folder, or the home of a mirror"
        )
    return max(found)[-1]


def paused(view: View, live: Live) -> bool:
    """Whether the operator holds the next round shut. It is open before a record tells of its resumption."""
    return view.amendments.paused_at(view.head.round + 1) and live.open_round is None


def newest_loss(view: View, live: Live) -> Loss | None:
    """The newest evaluation, whether a record has it yet or not."""
    known = [loss for loss in (live.newest, *view.losses[-1:]) if loss is not None]
    return max(known, key=lambda loss: loss.round) if known else None


def alarms(view: View, live: Live, now_ms: int) -> list[Alarm]:
    """The alarms that stand now."""
    found = []
    newest, lowest, rules = newest_loss(view, live), view.lowest, view.settings.rounds
    if newest is not None and lowest is not None and not newest.loss <= DIVERGED * lowest.loss:
        above = 100 * (newest.loss / lowest.loss - 1)
        text = f"after round {newest.round} the validation loss is {newest.loss:.3f}, {above:.0f} % above the lowest"
        found.append(Alarm("divergence", f"{text}, {lowest.loss:.3f} after round {lowest.round}"))
    recent = view.rounds[-ALARM_ROUNDS:]
    null = [round.round for round in recent if round.kind == "null"]
    if null:
        text = f"{len(null)} of the last {len(recent)} rounds changed nothing, the newest is round {null[-1]}"
        found.append(Alarm("unguarded", f"{text}: fewer packets than the quorum of {rules.quorum} by the deadline"))
    silent_s = (now_ms - view.head.closed_ms) / 1000
    waiting = view.head.round > 0 and not (view.complete or paused(view, live) or view.behind)
    if waiting and silent_s > STALE_DEADLINES * rules.deadline_s:
        text = f"nothing has closed for {_span(silent_s)}, and a round may last {_span(rules.deadline_s)}"
        found.append(Alarm("stale_head", text))
    return found


def with_bits(loss: Loss, live: Live) -> dict[str, float | int | None]:
    """A loss as plain values, with perplexity and, where the bytes of a token are known, bits a byte."""
    bits = bits_per_byte(loss.loss, live.bytes_per_token) if live.bytes_per_token else None
    return {"round": loss.round, "loss": loss.loss, "perplexity": perplexity(loss.loss), "bits_per_byte": bits}


def known_bytes_per_token(run: RunConfig) -> float | None:
    """What is known without the held-out text: a byte is a byte."""
    return 1.0 if run.data.tokenizer == "bytes" else None


def _span(seconds: float) -> str:
    """A time in words short enough for a headline."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
