"""How large is a round's update, and when are its packets together smaller?

Replicas of the demo's model train in this process, each on its own data, and exchange all their packets round after
round. In every round the first R packets are merged as a round of R peers would merge them. All sizes are those of the
transport form, with everything included.

    python -m bench.update_size --peers 64 --rounds 2 --k 64 256
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import gettempdir

import torch

from bench import real_gradients as real
from peer.core import codec
from protocol.arithmetic import RULES
from protocol.limits import CLIP_ONE, WEIGHT_UNIT
from protocol.packet import make_packet
from protocol.run import RunConfig, RunSettings, parse_settings
from protocol.update import make_update
from protocol.wire import bundle_to_wire, packet_to_wire, update_to_wire

COUNTS = (2, 4, 8, 20, 64)


@dataclass(frozen=True)
class Sizes:
    """The two forms of one round."""

    k: int
    rule: str
    round: int
    peers: int
    update_bytes: int
    bundle_bytes: int
    values: int
    """Values in the update."""
    density: float
    """Share of the model's values that the update changes."""
    bits_per_value: float
    """Bits of the update for each of its values."""

    @property
    def smaller(self) -> str:
        """The form that travels."""
        return "bundle" if self.bundle_bytes < self.update_bytes else "update"

    def line(self) -> str:
        """A row of the table."""
        return (
            f"{self.k:4} {self.rule:16} {self.round:5} {self.peers:3} {self.update_bytes:9,} {self.bundle_bytes:9,} "
            f"{self.density:8.3f} {self.bits_per_value:6.2f} {self.smaller}"
        )


def sizes_of(run: RunConfig, round: int, packets: Sequence[Sequence[bytes]], rule: str) -> Sizes:
    """Merge these packets of a round by a rule, and measure both forms."""
    rules, count = run.compression, len(packets)
    weights, clips = [WEIGHT_UNIT] * count, [CLIP_ONE] * count
    k, code_bits = rules.k, rules.code_bits
    sections = codec.merge(packets, weights, clips, run.layout, k, code_bits, rule, run.outer.alpha_q16)
    # The roots only fill the headers: 32 bytes each, whatever they are.
    update = make_update(run, round, run.genesis_root, run.genesis_root, sections)
    tokens, steps = run.nominal_tokens, run.inner.steps
    wires = [
        packet_to_wire(make_packet(run, real.OPERATOR, round, run.genesis_root, tokens, steps, packet), run)
        for packet in packets
    ]
    update_bytes = len(update_to_wire(update, run))
    values = codec.check_update_sections(sections, run.layout)
    return Sizes(
        k=k,
        rule=rule,
        round=round,
        peers=count,
        update_bytes=update_bytes,
        bundle_bytes=len(bundle_to_wire(wires)),
        values=values,
        density=values / run.layout.size,
        bits_per_value=8 * update_bytes / values,
    )


def measure(settings: RunSettings, k: int, peers: int, rounds: int, seed: int, cache: Path) -> list[Sizes]:
    """Train so many peers for so many rounds, and measure each round."""
    run = real.make_run(real.with_k(settings, k))
    data, replicas = real.open_data(run, cache), real.replicas_of(run, peers)
    found = []
    for round in range(1, rounds + 1):
        loss = real.train_round(replicas, data, round, seed)
        packets = []
        for replica in replicas:
            packets.append(replica.make_contribution())
            replica.commit()
        update = real.merge(run, packets)
        for replica in replicas:
            replica.apply(update)
        print(f"k = {k}, round {round} of {rounds}: training loss {loss:.3f}", flush=True)
        rows = [sizes_of(run, round, packets[:count], rule) for count in COUNTS if count <= peers for rule in RULES]
        for row in rows:
            print(row.line(), flush=True)
        found += rows
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=Path, default=real.DEMO, help="RUN.toml to train, instead of the demo's")
    parser.add_argument("--peers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--k", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(gettempdir()) / "sparseloco-bench")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = parse_settings(arguments.settings.read_text("utf-8"))
    print(f"seed {arguments.seed}, {codec.kernels_in_use(torch.device('cpu'))}, torch {torch.__version__}")
    print(f"{'k':>4} {'rule':16} {'round':>5} {'R':>3} {'update':>9} {'bundle':>9} {'density':>8} {'bits':>6} smaller")
    rows = list[Sizes]()
    for k in arguments.k:
        rows += measure(settings, k, arguments.peers, arguments.rounds, arguments.seed, arguments.cache)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) | {"smaller": row.smaller} for row in rows], indent=1))


if __name__ == "__main__":
    main()
