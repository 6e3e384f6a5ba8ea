"""What must hold whatever happens. Each checker knows only what it saw, not what the machines or drivers think.

`BrokenError` names the checker that fired. They read packets and merge in their own plain way, so that the codec, its
kernels and the replica's accounting are held to something that they do not share.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peer.sim.clock import TIMER_LATE_S
from protocol.compress import error_feedback, to_float32
from protocol.errors import Code
from protocol.layout import kept, state_root
from protocol.ledger import CloseReason, Entry, Kind, RoundRecord, Verdict, check_link, check_record
from protocol.limits import CHUNK, CLIP_ONE, WEIGHT_MAX, WEIGHT_UNIT
from protocol.packet import Packet
from protocol.round import Close, TrainInner
from protocol.run import RunConfig
from protocol.update import to_update_tensor, update_values

STATES_KEPT = 64  # a leader that was away for long may go on from an old one
QUEUE_MAX = 4200  # entries of a record, and some
TRANSIENT = {Code.LATE, Code.DUPLICATE, Code.BUSY, Code.WRONG_DIGEST, Code.BAD_SESSION}


class BrokenError(Exception):
    """Something that must always hold does not."""

    def __init__(self, checker: str, what: str) -> None:
        super().__init__(what)
        self.checker = checker


def demand(holds: bool, checker: str, what: str) -> None:
    """Fire unless it holds."""
    if not holds:
        raise BrokenError(checker, what)


@dataclass(frozen=True)
class Made:
    """A packet that keeps the rules, as its bytes say."""

    peer: bytes
    round: int
    base_root: bytes
    tokens: int
    positions: NDArray[np.int64]  # i64[m] in the flat model
    grid: NDArray[np.int64]  # i64[m]


@dataclass(frozen=True)
class Open:
    """A packet whose fate its sender does not know, and what the sender held before and after it."""

    digest: bytes
    round: int
    total: int
    before: NDArray[np.float32]  # f32[N] acc
    after: NDArray[np.float32]  # f32[N] the residual


@dataclass
class Account:
    """One peer's books. Sums are in units of the grid, so nothing is lost in adding up."""

    memory: NDArray[np.float32]  # f32[N] what its residual must be
    disk: NDArray[np.float32]  # f32[N] what it must be after it died
    open: Open | None = None
    open_on_disk: Open | None = None
    settled: tuple[bytes, int, bool] | None = None  # packet, round, accepted: until its state has moved on
    steps: int = 0  # inner steps that are in no packet and not in the residual
    ahead: bool = False  # they were all done ahead of a round, so they go along when the state moves on
    local: NDArray[np.float32] | None = None  # f32[N] what its local parameters must be, None: the outer ones
    start: NDArray[np.float32] | None = None  # f32[N] where the steps that were done ahead began
    sent: int = 0
    kept_by_run: int = 0
    returned: int = 0
    excused: bool = False  # it lost records or its branch, so its last verdict cannot be checked


class Checkers:
    """All checkers of one simulation."""

    def __init__(self, run: RunConfig, state: NDArray[np.float32]) -> None:  # f32[N], of round 0
        self.run = run
        self.records: dict[bytes, RoundRecord] = {}
        self.rounds: dict[tuple[int, int], bytes] = {}  # (round, epoch) -> record
        self.made: dict[bytes, Made] = {}
        self.accounts: dict[bytes, Account] = {}
        self.orphaned = 0  # packets that a takeover made count never, or twice
        self._zeros = np.zeros_like(state)
        self._states = {state_root(state): state}
        self._recent: deque[bytes] = deque([run.genesis_root])
        # Packet and epoch of an accepting receipt -> round and base of the packet.
        self._receipted: dict[tuple[bytes, int], tuple[int, bytes]] = {}
        self._accepted: dict[bytes, frozenset[bytes]] = {}  # of each record
        self._moved_back: set[Code] = set()
        self._listed: dict[bytes, set[bytes]] = {}  # packet -> records that list it

    # The ledger

    def recorded(self, data: bytes) -> RoundRecord:
        """A record became durable: it is canonical, signed, the only one of its round and epoch, and follows."""
        record = RoundRecord.from_bytes(data)
        check_record(record, self.run)
        demand(record.to_bytes() == data, "canonical record", f"round {record.round} does not re-encode to itself")
        first = self.rounds.setdefault((record.round, record.epoch), record.digest)
        demand(first == record.digest, "one record a round", f"two of round {record.round}, epoch {record.epoch}")
        self.records[record.digest] = record
        good = (entry.packet_digest for entry in record.entries if entry.verdict == Verdict.ACCEPTED)
        self._accepted[record.digest] = frozenset(good)
        if record.kind == Kind.GENESIS:
            return record
        previous = self.records.get(record.previous)
        demand(previous is not None, "chain", f"round {record.round} names a record that nobody has")
        assert previous is not None
        check_link(previous, record)
        self._check_verdicts(record)
        if record.kind == Kind.APPLIED:
            self._check_update(previous, record)
        return record

    def _check_verdicts(self, record: RoundRecord) -> None:
        for entry in record.entries:
            where = self._listed.setdefault(entry.packet_digest, set())
            for other in where:
                # The same rubbish may come again in another round; what is accepted is listed once.
                counts = entry.verdict == Verdict.ACCEPTED or entry.packet_digest in self._accepted[other]
                once = not counts or not self._on_one_chain(self.records[other], record)
                demand(once, "one verdict a packet", _short(entry))
            where.add(record.digest)
        good = sum(entry.code in (0, Code.NO_QUORUM) for entry in record.entries)
        enough = good >= self.run.rounds.quorum
        demand(enough == (record.kind == Kind.APPLIED), "quorum", f"round {record.round} with {good} packets")
        listed = {entry.packet_digest: entry for entry in record.entries}
        due = (record.round, self.records[record.previous].state_root)
        for (packet, epoch), opened in list(self._receipted.items()):
            if (opened, epoch) != (due, record.epoch):
                continue
            demand(
                packet in listed, "receipt", f"{packet.hex()[:8]} had one, and round {record.round} does not list it"
            )
            wanted = 0 if record.kind == Kind.APPLIED else int(Code.NO_QUORUM)
            code = listed[packet].code
            demand(code == wanted, "receipt", f"{packet.hex()[:8]} had one, and its code is {code}")
            del self._receipted[packet, epoch]

    def _on_one_chain(self, early: RoundRecord, late: RoundRecord) -> bool:
        return self.ancestor(late, early.round) == early

    def ancestor(self, record: RoundRecord, round: int) -> RoundRecord | None:
        """The record of an earlier round on the way to this one, or this one."""
        while record.round > round:
            record = self.records[record.previous]
        return record if record.round == round else None

    def chain(self, record: RoundRecord) -> list[RoundRecord]:
        """All rounds up to this one, oldest first."""
        records = []
        while record.round > 0:
            records.append(record)
            record = self.records[record.previous]
        return records[::-1]

    def contributors(self, record: RoundRecord) -> int:
        """How many packets it accepted."""
        return len(self._accepted[record.digest])

    def _check_update(self, previous: RoundRecord, record: RoundRecord) -> None:
        """Merge once more, in the plainest way, from the bytes that the senders made."""
        base = self._states.get(previous.state_root)
        demand(base is not None, "state", f"round {record.round} is based on a state that nobody had")
        assert base is not None
        num, den = np.zeros(base.size, np.int64), np.zeros(base.size, np.int64)
        for entry in record.entries:
            if entry.verdict == Verdict.ACCEPTED:
                made = self.made.get(entry.packet_digest)
                demand(made is not None, "made by nobody", f"{_short(entry)} is accepted")
                assert made is not None
                claims = (made.peer, made.round, made.base_root, made.tokens)
                demand(claims == (entry.peer, record.round, previous.state_root, entry.tokens), "claims", _short(entry))
                weight = min(max(entry.tokens * WEIGHT_UNIT // self.run.nominal_tokens, 1), WEIGHT_MAX)
                demand((entry.weight, entry.clip) == (weight, CLIP_ONE), "weight", _short(entry))
                num[made.positions] += weight * made.grid
                den[made.positions] += weight
        divisor = np.maximum(den, 1)
        steps = np.sign(num) * ((np.abs(num) // divisor * self.run.outer.alpha_q16) >> 16)
        state = base.copy()
        offsets = self.run.layout.offsets
        for tensor, start in zip(self.run.layout.tensors, offsets[:-1], strict=True):
            update = to_update_tensor(steps[start : start + tensor.size])
            state[start + update.indices] -= update_values(update)
        demand(state_root(state) == record.state_root, "merge", f"round {record.round} leads to another state")
        if record.state_root not in self._states:
            self._states[record.state_root] = state
            self._recent.append(record.state_root)
        if len(self._recent) > STATES_KEPT:
            del self._states[self._recent.popleft()]
            self._forget(record.round - STATES_KEPT)

    def _forget(self, before: int) -> None:
        for packet in [name for name, made in self.made.items() if made.round < before]:
            del self.made[packet]

    # Packets and receipts

    def receipt(
        self,
        packet: bytes,
        accepted: bool,
        code: int,
        *,
        by: tuple[RoundRecord, int] | None,
        expected: set[Code] | None,
    ) -> None:
        """A receipt leaves. Before an accepting one the packet is durable; a hostile packet gets its own code.

        `by` is the head and the epoch of an aggregator that has the packet on its disk, None when it has not.
        """
        # What a record has decided is told to anybody who sends the packet once more.
        if expected is not None and packet not in self._listed:
            allowed = {int(item) for item in expected | TRANSIENT | self._moved_back}
            demand(code in allowed, "refusal", f"expected {expected}, got {code}")
        if not accepted:
            return
        demand(by is not None, "durable before receipt", packet.hex()[:8])
        assert by is not None
        head, epoch = by
        decided = any(self._on_one_chain(self.records[name], head) for name in self._listed.get(packet, ()))
        made = self.made.get(packet)
        if made is not None and not decided:
            self._receipted[packet, epoch] = made.round, made.base_root

    def takes_over(self, head: RoundRecord, newest: RoundRecord, epoch: int) -> None:
        """Another aggregator leads from a record on: in an epoch of its own, and at most one record back."""
        demand(all(epoch != record.epoch for record in self.records.values()), "epochs", f"{epoch} was used before")
        demand(newest.round <= head.round + 1, "takeover", f"from round {head.round}, and it knew {newest.round}")
        # What it promised before in this epoch, in which it signed nothing, others have decided.
        opened = head.round + 1, head.state_root
        self._receipted = {key: due for key, due in self._receipted.items() if key[1] != epoch or due == opened}
        # The round that a packet was made for may be open once more, or on another base.
        self._moved_back = {Code.WRONG_ROUND, Code.WRONG_BASE}

    def foreign(self, packet: Packet) -> None:
        """A hostile hand made a packet that keeps the rules."""
        self.made[packet.header.digest] = self._read(packet)

    def _read(self, packet: Packet) -> Made:
        header, layout = packet.header, self.run.layout
        parts = [
            _read_section(section, tensor.size, start, self.run.compression.k)
            for section, tensor, start in zip(packet.sections, layout.tensors, layout.offsets[:-1], strict=True)
        ]
        where, grid = (np.concatenate([part[item] for part in parts]) for item in (0, 1))
        return Made(header.peer, header.round, header.base_root, header.tokens, where, grid)

    # What a peer holds

    def joined(self, peer: bytes) -> None:
        """A peer begins with empty books."""
        self.accounts[peer] = Account(self._zeros, self._zeros)

    def died(self, peer: bytes, *, disk: bool) -> None:
        """A peer forgot all that was not durable, or everything."""
        if not disk:
            # Nobody knows any more what it had sent.
            self.accounts[peer] = Account(self._zeros, self._zeros, excused=True)
            return
        account = self.accounts[peer]
        account.memory, account.open = account.disk, account.open_on_disk
        _start_again(account)

    def worked(self, peer: bytes, steps: int, local: NDArray[np.float32]) -> None:  # f32[N], after
        """A peer did inner steps."""
        account = self.accounts[peer]
        account.steps += steps
        account.local = local.copy()

    def packed(
        self,
        packet: Packet,
        outer: NDArray[np.float32],
        local: NDArray[np.float32],
        residual: NDArray[np.float32],
    ) -> None:  # f32[N] each, the residual after
        """A peer took a packet out of acc: packet and residual make up acc, bit for bit."""
        account = self.accounts[packet.header.peer]
        claim = packet.header.inner_steps
        demand(claim == account.steps, "steps", f"a packet claims {claim}, and {account.steps} are in it")
        self._take_steps(account, outer, local)
        acc = error_feedback(account.memory, outer, local, self.run.compression.beta)
        made = self._read(packet)
        rest = acc.copy()
        rest[made.positions] -= to_float32(made.grid)
        demand(account.open is None, "one packet at a time", "the last one is not settled")
        demand(_same(rest, residual), "conservation", "packet and residual do not make up what was there")
        self.made[packet.header.digest] = made
        opened = Open(packet.header.digest, made.round, int(made.grid.sum()), acc, residual.copy())
        account.memory, account.open = opened.after, opened
        account.sent += opened.total

    def absorbed(
        self, peer: bytes, outer: NDArray[np.float32], local: NDArray[np.float32], residual: NDArray[np.float32]
    ) -> None:  # f32[N] each, the residual after
        """Steps that no packet took went into the residual."""
        account = self.accounts[peer]
        self._take_steps(account, outer, local)
        acc = error_feedback(account.memory, outer, local, self.run.compression.beta)
        demand(account.open is None, "one packet at a time", "there is a packet to settle")
        demand(_same(acc, residual), "conservation", "steps are missing from the residual")
        account.memory = residual.copy()

    def _take_steps(
        self, account: Account, outer: NDArray[np.float32], local: NDArray[np.float32]
    ) -> None:  # f32[N] each
        """All steps since the last time go into the residual or a packet; those done ahead were carried over before."""
        self._at_hand(account, outer, local)
        account.steps, account.ahead, account.start = 0, False, None

    def _at_hand(self, account: Account, outer: NDArray[np.float32], local: NDArray[np.float32]) -> None:
        wanted = outer if account.local is None else account.local
        demand(_same(wanted, local), "local parameters", "they are not what the last steps left")

    def carried(self, peer: bytes, outer: NDArray[np.float32], local: NDArray[np.float32]) -> None:  # f32[N] each
        """A peer has other outer parameters: the local ones are these and the steps that were done ahead."""
        account = self.accounts[peer]
        if account.start is None:
            demand(_same(outer, local), "local parameters", "they do not start from the outer ones")
            account.local = None
            return
        assert account.local is not None, "steps ahead begin somewhere"
        wanted = (account.local - account.start) + outer
        demand(_same(wanted, local), "carry-over", "the steps done ahead are not all there, and once")
        account.local, account.start = wanted, outer.copy()

    def diverged(self, peer: bytes, *, residual_lost: bool) -> None:
        """Its steps were worthless; if they had come into the residual, that starts anew."""
        account = self.accounts[peer]
        _start_again(account)
        account.memory = self._zeros if residual_lost else account.memory

    def settled(self, peer: bytes, round: int, accepted: bool, residual: NDArray[np.float32]) -> None:  # f32[N], after
        """A peer settled its packet: the residual is what the packet left, or what was there before, bit for bit."""
        account = self.accounts[peer]
        demand(account.open is not None, "settled twice", f"round {round}")
        assert account.open is not None
        packet = account.open
        wanted = packet.after if accepted else packet.before
        demand(packet.round == round, "settled", f"round {round} for a packet of round {packet.round}")
        demand(_same(wanted, residual), "conservation", f"accepted={accepted}, and the residual is not what it was")
        account.kept_by_run += packet.total if accepted else 0
        account.returned += 0 if accepted else packet.total
        account.settled = packet.digest, round, accepted
        account.memory, account.open = wanted, None

    def stored(self, peer: bytes, residual: NDArray[np.float32]) -> None:  # f32[N]
        """A peer's disk holds what its memory holds."""
        account = self.accounts[peer]
        demand(_same(account.memory, residual), "conservation", "the residual changed by itself")
        account.disk, account.open_on_disk = account.memory, account.open

    def excuse(self, peer: bytes) -> None:
        """It cannot know the record of its round: nobody has it, or the run went another way."""
        self.accounts[peer].excused = True

    def moved(self, peer: bytes, record: RoundRecord, outer: NDArray[np.float32]) -> None:  # f32[N]
        """A peer holds the state of a record: the same bits as everybody, and its last verdict was the record's."""
        demand(record.digest in self.records, "durable before broadcast", f"round {record.round}")
        demand(state_root(outer) == record.state_root, "equal roots", f"after round {record.round}")
        account = self.accounts[peer]
        demand(account.steps == 0 or account.ahead, "conservation", "steps that no packet took are not in the residual")
        if account.settled is not None and not account.excused:
            packet, round, accepted = account.settled
            fate = self.ancestor(record, round)
            listed = fate is not None and packet in self._accepted[fate.digest]
            if listed != accepted:
                left_behind = self._left_behind(record, packet, round, accepted)
                self.orphaned += left_behind
                demand(left_behind, "verdict", f"settled {packet.hex()[:8]} as {accepted}, the record says {listed}")
        account.settled, account.excused = None, False

    def _left_behind(self, record: RoundRecord, packet: bytes, round: int, accepted: bool) -> bool:
        """Whether a packet was settled by a record that a takeover left behind: then it counts never, or twice."""
        names = [name for (number, epoch), name in self.rounds.items() if number == round and epoch < record.epoch]
        return any((packet in self._accepted[name]) == accepted for name in names)

    def trains(
        self,
        peer: bytes,
        record: RoundRecord | None,
        job: TrainInner,
        outer: NDArray[np.float32],
        local: NDArray[np.float32],
    ) -> None:  # f32[N] each
        """A peer begins to train: from the recorded state for the round after it, or ahead for the one after that."""
        account, opened = self.accounts[peer], self.accounts[peer].open
        demand(record is not None and job.round == record.round + 1 + job.ahead, "trains", f"{job} from elsewhere")
        assert record is not None
        demand(state_root(outer) == record.state_root, "equal roots", f"{job} from another state")
        in_flight = opened is not None and opened.round == record.round + 1
        demand(
            in_flight if job.ahead else opened is None,
            "trains",
            f"{job}, and the packet in flight is of {opened and opened.round}",
        )
        demand(job.done == account.steps, "steps", f"{job}, and {account.steps} are done")
        demand(0 < job.steps <= self.run.inner.steps - job.done, "steps", f"{job} is more than a round has")
        self._at_hand(account, outer, local)
        account.ahead = job.ahead
        if job.ahead:
            demand(self.run.inner.overlap, "trains", f"{job}, and the run has no overlap")
            account.local = account.start = local.copy()

    # Time and memory

    def closes(self, now_s: float, deadline_s: float, round: int, close: Close) -> None:
        """A round closes: by its deadline, and not for its deadline before it."""
        demand(
            now_s <= deadline_s + TIMER_LATE_S + 1e-6,
            "deadline",
            f"round {round} closes {now_s - deadline_s:.3f} s late",
        )
        early = close.reason == CloseReason.DEADLINE and now_s < deadline_s - 1e-6
        demand(not early, "deadline", f"round {round} closes {deadline_s - now_s:.3f} s early")

    def bounded(self, who: str, machine: object, extra: dict[str, int]) -> None:
        """No container of a machine or driver grows without end."""
        sizes = {name: len(value) for name, value in vars(machine).items() if isinstance(value, dict | set | list)}
        for name, size in {**sizes, **extra}.items():
            demand(size <= QUEUE_MAX, "memory", f"{who} {name} holds {size}")

    def books_balance(self, last: int | None = None) -> None:
        """Over all packets: what was sent is with the run, was returned, or is still open.

        In the end nothing is open. `last` is then the epoch in which the run was completed.
        """
        final = last is not None
        for peer, account in self.accounts.items():
            still = account.open.total if account.open is not None else 0
            balance = account.kept_by_run + account.returned + still
            demand(account.sent == balance, "books", f"{peer.hex()[:8]}: {account.sent} sent, {balance} found again")
            demand(not final or account.open is None, "books", f"{peer.hex()[:8]} never learned its packet's fate")
        if final:
            # What another aggregator promised before a takeover and did not record went with it.
            broken = [packet for packet, epoch in self._receipted if epoch == last]
            demand(not broken, "receipt", f"{len(broken)} were never kept: {[name.hex()[:8] for name in broken[:3]]}")


def _read_section(
    section: bytes, size: int, start: int, k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # i64[m] each
    """Positions in the flat model and grid integers, read as SPEC 5 says."""
    chunks = -(-size // CHUNK)
    data = np.frombuffer(section, np.uint8).astype(np.int64)
    scales, ratios = data[:chunks], data[chunks : 2 * chunks]
    counts = [kept(min(CHUNK, size - CHUNK * chunk), k) if section[chunk] else 0 for chunk in range(chunks)]
    count = sum(counts)
    codes_at = len(section) - -(-count // 4)
    chunk = np.repeat(np.arange(chunks), counts)
    # A gap byte of 255 goes on by so much, any other by one more, and there a value stands.
    gaps = data[2 * chunks : codes_at]
    steps = np.cumsum(gaps + (gaps < 255))[gaps < 255]
    before = np.concatenate([[0], steps])[np.cumsum([0, *counts])[:-1]]
    where = start + CHUNK * chunk - 1 + steps - before[chunk]
    codes = (data[codes_at:, None] >> [0, 2, 4, 6]).ravel()[:count]
    high = (8 + (scales & 7)) << ((scales >> 3) + 5)
    magnitude = np.where(codes & 2, (high * (64 - ratios) >> 6)[chunk], high[chunk])
    return where, np.where(codes & 1, -magnitude, magnitude)


def _start_again(account: Account) -> None:
    """Steps are lost, and the local parameters are the outer ones."""
    account.steps, account.ahead, account.local, account.start = 0, False, None, None


def _same(left: NDArray[np.float32], right: NDArray[np.float32]) -> bool:
    return np.array_equal(left.view(np.uint32), right.view(np.uint32))


def _short(entry: Entry) -> str:
    return f"packet {entry.packet_digest.hex()[:8]} of {entry.peer.hex()[:8]}"
