"""What is simulated: how many peers, how they are connected, what goes wrong; and the run that they take part in."""

import hashlib
import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from peer.sim.clock import chance_of
from peer.sim.network import Access
from protocol.identity import PrivateKey
from protocol.layout import Layout, state_root
from protocol.ledger import RoundRecord, Verdict
from protocol.limits import CHUNK
from protocol.packet import PACKET_HEADER_BYTES
from protocol.run import CompressionConfig, InnerConfig, OuterConfig, RoundConfig, RunConfig, RunSettings
from protocol.update import UPDATE_HEADER_BYTES

MBIT = 125_000.0  # bytes a second
NEVER = math.inf

_UPDATE_BITS = 6.2  # of a value in an update, which zstd has made smaller
_OVERLAP = 0.72

# A full chunk, a short one, and a tensor of one short chunk: small, and every path of the codec is in it.
_SHAPES = (("long", (CHUNK + 404,)), ("short", (40,)))


@dataclass(frozen=True)
class Faults:
    """What goes wrong: mean seconds between two faults in the whole swarm, and chances each time."""

    kill_s: float = NEVER
    """A peer dies and comes back with what its disk holds."""
    lose_disk: float = 0.0
    """Chance that a peer that dies loses its disk too."""
    cut_s: float = NEVER
    """A connection breaks."""
    partition_s: float = NEVER
    """A part of the peers cannot reach anybody for a while."""
    crash_s: float = NEVER
    """The aggregator dies at any time and comes back with what its disk holds."""
    crash_point: float = 0.0
    """Chance that it dies between two durable steps."""
    takeover_s: float = NEVER
    """The aggregator dies for good, and another goes on in a higher epoch from what it has mirrored."""
    busy: float = 0.0
    """Chance that an upload is turned away for now."""
    duplicate: float = 0.0
    """Chance that an upload arrives twice."""
    diverge: float = 0.0
    """Chance that a peer's training ends in NaN."""
    corrupt: float = 0.0
    """Chance that a bit flips while an update is applied."""
    wall_jump_s: float = 0.0
    """How far the aggregator's wall clock may jump when it restarts."""
    drift: float = 0.0
    """How much faster or slower a peer's clock runs, at most, as a share."""


MIXED = Faults(
    kill_s=60.0,
    lose_disk=0.1,
    cut_s=40.0,
    partition_s=300.0,
    crash_s=400.0,
    crash_point=0.002,
    takeover_s=900.0,
    busy=0.03,
    duplicate=0.05,
    diverge=0.01,
    corrupt=0.01,
    wall_jump_s=3600.0,
    drift=0.02,
)


_RULES = RoundConfig(quorum=2, grace_s_min=1.0, grace_s_max=15.0, deadline_s=60.0, start_peers=2)


@dataclass(frozen=True)
class Settings:
    """One simulation. The seed decides everything that these leave open."""

    seed: int = 1
    peers: int = 12
    rounds: int = 50
    hostile: int = 0
    """Peers that break the rules besides keeping them."""
    faults: Faults = Faults()
    access: Access = field(default_factory=lambda: Access(100 * MBIT, 100 * MBIT))
    """How a peer is connected."""
    aggregator_mbit: float = 10_000.0
    inner_s: float = 10.0
    """Seconds that a usual peer takes for the inner steps of a round."""
    stragglers: float = 0.1
    """Share of peers whose steps take 10 times as long."""
    half_life_s: float = NEVER
    """Time after which half of the peers that are there have gone, memory and all."""
    away_s: float = 60.0
    """Mean time that a peer which has gone stays away."""
    rules: RoundConfig = _RULES
    steps: int = 10
    k: int = 256
    values: int = 0
    """Bytes on the links are those of a model of so many values; 0: those of the tiny model itself."""
    overlap: bool = False
    """Whether peers train on while packet and update travel."""


def drawn(seed: int, *, rounds: int = 50) -> Settings:
    """A small swarm in bad weather, all of it drawn from the seed."""
    chance = chance_of(seed, "weather")
    peers = chance.randint(4, 14)
    harsh = chance.choice([0.5, 1.0, 2.0])
    deadline_s = chance.choice([25.0, 60.0])
    return Settings(
        seed=seed,
        peers=peers,
        rounds=rounds,
        hostile=chance.choice([0, 1, 1, 2]),
        faults=replace(
            MIXED,
            kill_s=MIXED.kill_s * harsh,
            cut_s=MIXED.cut_s * harsh,
            crash_s=MIXED.crash_s * harsh,
            takeover_s=chance.choice([NEVER, MIXED.takeover_s, MIXED.takeover_s / 5]),
        ),
        access=Access(
            up_bytes_s=chance.choice([300.0, 2e3, 1e6]),
            down_bytes_s=chance.choice([3e3, 1e6]),
            latency_s=chance.choice([0.01, 0.1, 0.4]),
            loss=chance.choice([0.0, 0.02, 0.1]),
        ),
        # With few values the gaps are long, with many short.
        k=chance.choice([16, 128, 256]),
        stragglers=chance.choice([0.0, 0.1, 0.3]),
        half_life_s=chance.choice([NEVER, 300.0]),
        away_s=chance.choice([10.0, 60.0]),
        rules=RoundConfig(
            quorum=chance.choice([1, 2, max(2, peers // 2)]),
            grace_s_min=1.0,
            grace_s_max=15.0,
            deadline_s=deadline_s,
            start_peers=chance.randint(1, 3),
        ),
        overlap=chance.random() < 0.4,
    )


def key_of(seed: int, name: str) -> PrivateKey:
    """The key that this seed gives to this name."""
    return PrivateKey.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest())


def genesis_state(layout: Layout) -> NDArray[np.float32]:  # f32[N]
    """The parameters of round 0."""
    return np.zeros(layout.size, np.float32)


def make_run(settings: Settings, aggregators: tuple[bytes, ...]) -> RunConfig:
    """The run that is simulated: tiny tensors, and rules as in any run."""
    layout = Layout.of(_SHAPES)
    operator = key_of(settings.seed, "operator").public
    written = RunSettings(
        "simulation",
        inner=InnerConfig(steps=settings.steps, overlap=settings.overlap),
        compression=CompressionConfig(k=settings.k),
        outer=OuterConfig(rounds=settings.rounds, alpha=0.7),
        rounds=settings.rules,
    )
    root = state_root(genesis_state(layout))
    return RunConfig.of(written, operator=operator, aggregators=aggregators, layout=layout, genesis_root=root)


def _entropy(share: float) -> float:
    """Bits that tell of one position whether it is among a share of all."""
    return -sum(part * math.log2(part) for part in (share, 1 - share) if part > 0)


class Sizes:
    """How many bytes things have on the links: their own, or those that they would have with a large model.

    A packet has two bytes a chunk, and for each value that it keeps its position at the entropy and 2 bits of code. An
    update has three bytes a chunk, and for each value that it changes its position at the entropy and 6.2 bits. Packets
    agree on positions more often than chance, so together R of them cover what R^0.72 would that chose by chance. So
    packets come out within 10 % and updates within a third of those measured in docs/log.md.
    """

    def __init__(self, values: int, k: int) -> None:
        self._values, self._k = values, k
        self._chunks = -(-values // CHUNK)

    def state(self, data: bytes) -> int:
        """Outer parameters."""
        return 4 * self._values or len(data)

    def packet(self, data: bytes) -> int:
        """A packet in transport form."""
        if not self._values:
            return len(data)
        return PACKET_HEADER_BYTES + int(self._chunks * (2 + (_entropy(self._k / CHUNK) * CHUNK + 2 * self._k) / 8))

    def update(self, data: bytes, contributors: int) -> int:
        """An update in transport form."""
        if not self._values:
            return len(data)
        share = 1 - (1 - self._k / CHUNK) ** contributors**_OVERLAP
        return UPDATE_HEADER_BYTES + int(self._chunks * (3 + CHUNK * (_entropy(share) + _UPDATE_BITS * share) / 8))

    def bundle(self, packets: list[bytes]) -> int:
        """The packets of a round together."""
        return sum(4 + self.packet(packet) for packet in packets)

    def broadcast(self, record: RoundRecord, update: bytes, packets: list[bytes]) -> tuple[int, int]:
        """The update and the bundle of an applied round."""
        count = sum(entry.verdict == Verdict.ACCEPTED for entry in record.entries)
        return self.update(update, count), self.bundle(packets)
