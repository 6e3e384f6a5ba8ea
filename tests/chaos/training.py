"""Swarms of training peers as real processes, and what their ledger says of them afterwards."""

import asyncio
import dataclasses
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from peer.operator import OperatorFolder
from peer.replay import replay
from peer.solo import Bench
from peer.store import Home, RunFolder, load_key
from protocol.ledger import Kind, RoundRecord, Verdict
from protocol.run import RunSettings, parse_settings
from tests.chaos.nursery import Child, Spell
from tests.chaos.siege import FOREVER, make_run
from tests.peer.proxy import Proxy
from tests.peer.swarm import SETTINGS
from tests.peer.test_swarm import ledger

READY_S = 120.0
ROUNDS_MAX = 1000
TASTE = ("--threads", "1", "--dtype", "float32", "--device", "cpu", "--micro-batch", "4")


def settings_of(
    *,
    rounds: int = FOREVER,
    steps: int,
    peers: int,
    quorum: int = 1,
    hidden: int = 32,
    k: int = 64,
    grace_s: tuple[float, float],
) -> RunSettings:
    """A run of a small model whose learning rate does not depend on how many rounds there will be."""
    settings = parse_settings(SETTINGS.format(rounds=rounds, steps=steps, grace_s=3.0))
    return dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, hidden_size=hidden, intermediate_size=2 * hidden),
        inner=dataclasses.replace(settings.inner, schedule="constant", learning_rate=0.001),
        compression=dataclasses.replace(settings.compression, k=k),
        rounds=dataclasses.replace(
            settings.rounds,
            quorum=quorum,
            start_peers=peers,
            grace_s_min=grace_s[0],
            grace_s_max=grace_s[1],
            deadline_s=60.0,
        ),
    )


class Swarm:
    """One run, its aggregator and its peers by name."""

    def __init__(self, folder: Path, settings: RunSettings) -> None:
        self.folder, self.path = folder, make_run(folder, settings)
        operator = OperatorFolder(self.path)
        signed, self.invite = operator.load()
        self.run, self.port = signed.config, int(self.invite.addresses[0].rpartition(":")[2])
        self.children: dict[str, Child] = {}
        self.lives: list[tuple[str, Child]] = []  # every process there was

    def __enter__(self) -> "Swarm":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children.values():
            child.kill()

    def aggregator(self, spell: Spell | None = None) -> Child:
        return self._start("aggregator", spell, "aggregate", str(self.path))

    def peer(self, name: str, through: Proxy | None = None, spell: Spell | None = None) -> Child:
        """Start this peer, for the first time or again."""
        invite, path = self.invite, self.folder / f"{name}.invite"
        if through is not None:
            invite = dataclasses.replace(invite, addresses=(f"127.0.0.1:{through.port}",))
        path.write_text(invite.to_text())
        home = self.folder / name
        home.mkdir(exist_ok=True)
        if not (home / "data").exists():
            (home / "data").symlink_to(OperatorFolder(self.path).aggregator_home / "data")
        return self._start(name, spell, "join", str(path), "--home", str(home), *TASTE)

    def _start(self, name: str, spell: Spell | None, *arguments: str) -> Child:
        child = Child(self.folder / name, *arguments, spell=spell)
        self.children[name] = child
        self.lives.append((name, child))
        return child

    def key(self, name: str) -> bytes:
        return load_key(self.folder / name / "key").public

    @contextmanager
    def store(self) -> Iterator[RunFolder]:
        home = Home(OperatorFolder(self.path).aggregator_home)
        with closing(home.run(self.run.run_id)) as store:
            yield store

    def records(self) -> list[RoundRecord]:
        return ledger(self.path)

    def head(self) -> int:
        closed = self.children["aggregator"].all("round closed")
        return int(closed[-1]["round"]) if closed else 0

    def wait_all(self, names: Sequence[str], rounds: int, seconds: float) -> None:
        """Wait until each of these peers has applied a round that many after the newest one of now."""
        target = self.head() + rounds
        for name in names:
            self.children[name].wait_event("round", seconds, target)

    def wait_counted(self, name: str, more: int, seconds: float) -> None:
        """Wait until so many more packets of this peer count."""
        events = self.children[name].all("round")
        target, seen = more + sum(event["mine_counted"] for event in events), len(events)
        while sum(event["mine_counted"] for event in self.children[name].all("round")) < target:
            seen += 1
            self.children[name].wait_event("round", seconds, self.head() + 1)
            assert seen < ROUNDS_MAX, f"{name} is never counted"

    def check_roots(self, names: Sequence[str]) -> int:
        """Whatever any peer ever held after a round is what the record says; how often it was looked at."""
        roots = {record.round: record.state_root.hex() for record in self.records()}
        seen = [
            (name, event["round"], event["state_root"])
            for name, child in self.lives
            if name in names
            for event in child.all("round")
        ]
        assert {name for name, _, _ in seen} == set(names)
        assert [each for each in seen if roots[each[1]] != each[2]] == []
        return len(seen)

    def counted(self, name: str) -> list[int]:
        """The rounds in which a packet of this peer counts."""
        key = self.key(name)
        return [
            record.round
            for record in self.records()
            if any(entry.peer == key and entry.verdict == Verdict.ACCEPTED for entry in record.entries)
        ]

    def steps(self, name: str, first: int) -> int:
        """How many inner steps of this peer count in the rounds from `first`."""
        entries = [entry for record in self.records()[first:] for entry in record.entries]
        return sum(entry.inner_steps for entry in entries if entry.peer == self.key(name) and entry.weight)

    def tokens(self) -> list[int]:
        """After each round, how many tokens are in the parameters."""
        total, found = 0, []
        for record in self.records():
            total += sum(entry.tokens for entry in record.entries if entry.verdict == Verdict.ACCEPTED)
            found.append(total)
        return found

    def loss_at(self, tokens: int, rounds: int = 5) -> float:
        """Validation loss once so many tokens are in the parameters, the mean of some rounds up to that."""
        last = next(round for round, total in enumerate(self.tokens()) if total >= tokens)
        bench = Bench(self.run, OperatorFolder(self.path).aggregator_home / "data", threads=1)
        with self.store() as store:
            states = replay(store, self.run, 0, last)
            losses = [bench.loss_of(state) for round, state in states if round > last - rounds]
        return sum(losses) / len(losses)

    def waited(self, fast: Sequence[str], first: int) -> tuple[float, float]:
        """Seconds from the last packet of the fast peers to the record, in the rounds from `first`; and all seconds."""
        keys, waited_ms, all_ms = {self.key(name) for name in fast}, 0, 0
        records = self.records()
        with self.store() as store:
            for record in records[first:]:
                arrived = [row.arrived_ms for row in store.journal.packets(record.round) if row.peer in keys]
                waited_ms += record.closed_ms - max(arrived, default=record.opened_ms)
                all_ms += record.closed_ms - record.opened_ms
        return waited_ms / 1000, all_ms / 1000


@contextmanager
def slowed(child: Child, share: float, period_s: float = 0.1) -> Iterator[None]:
    """Let a process run for this share of the time only."""
    ended = threading.Event()

    def turns() -> None:
        while not ended.is_set() and child.process.is_alive():
            child.signal(signal.SIGSTOP)
            ended.wait(period_s * (1 - share))
            child.signal(signal.SIGCONT)
            ended.wait(period_s * share)

    thread = threading.Thread(target=turns, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)


@dataclass(frozen=True)
class Went:
    """How a swarm went."""

    kills: int
    rounds: int
    null_rounds: int
    tokens: int
    loss: float
    roots_seen: int


def churn(
    folder: Path, names: Sequence[str], settings: RunSettings, pace: Spell, seed: int, *, kills: int, every_s: float
) -> Went:
    """Kill a random peer every so many seconds and start it again by the same command."""
    draw = random.Random(seed)
    with Swarm(folder, settings) as swarm:
        swarm.aggregator()
        for name in names:
            swarm.peer(name, spell=pace)
        for name in names:
            swarm.children[name].wait_event("round", READY_S)
        for _ in range(kills):
            time.sleep(every_s)
            name = draw.choice(list(names))
            swarm.children[name].kill()
            swarm.peer(name, spell=pace)
        swarm.wait_all(names, 2, READY_S)
    return _went(swarm, names, swarm.tokens()[-1], kills)


def calm(folder: Path, names: Sequence[str], settings: RunSettings, pace: Spell, tokens: int, seconds: float) -> Went:
    """The same swarm, and nobody is killed, until it has trained on as many tokens."""
    with Swarm(folder, settings) as swarm:
        aggregator = swarm.aggregator()
        for name in names:
            swarm.peer(name, spell=pace)
        enough = -(-tokens // (len(names) * swarm.run.nominal_tokens))
        aggregator.wait_event("round closed", seconds, enough)
        while swarm.tokens()[-1] < tokens:  # some packets came late
            enough += 1
            aggregator.wait_event("round closed", READY_S, enough)
    return _went(swarm, names, tokens, 0)


def _went(swarm: Swarm, names: Sequence[str], tokens: int, kills: int) -> Went:
    records = swarm.records()[1:]
    null_rounds = sum(record.kind == Kind.NULL for record in records)
    return Went(kills, len(records), null_rounds, tokens, swarm.loss_at(tokens), swarm.check_roots(names))


async def cut_every(proxy: Proxy, every_s: float) -> None:
    """Cut all connections every so many seconds, for ever."""
    while True:
        await asyncio.sleep(every_s)
        proxy.cut_all()
