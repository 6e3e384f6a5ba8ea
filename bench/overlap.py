"""What overlap gains on a slow link, and what it costs in loss.

The same swarm twice, once without and once with `inner.overlap`: real processes, each peer behind a throttling proxy.
Both train the demo's model on equal tokens with equal settings; the proxy's rate is that of each direction.

    python -m bench.overlap --kbit 500 --rounds 50
"""

import argparse
import dataclasses
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from peer.demo import SETTINGS
from peer.operator import OperatorFolder
from peer.replay import replay
from peer.solo import Bench
from protocol.ledger import Verdict
from protocol.run import RunSettings, parse_settings
from tests.chaos.training import READY_S, Swarm
from tests.peer.proxy import Faults, proxy_thread

NAMES = ("one", "two")
ROUND_S_MAX = 300.0


@dataclass(frozen=True)
class Went:
    """How one of the two swarms went."""

    overlap: bool
    inner_share: float
    """Share of the peers' time, from their first inner step to the end, that they spent in inner steps."""
    round_s: float
    """Seconds a round, without the first."""
    loss: float
    """Validation loss after the last round, nats a token."""
    inner_steps: int
    """Inner steps that count."""

    def line(self) -> str:
        """A row of the table."""
        return (
            f"overlap {'on' if self.overlap else 'off':3} {self.inner_share:6.1%} of the time in inner steps, "
            f"{self.round_s:6.2f} s a round, loss {self.loss:.4f} after {self.inner_steps:,} inner steps"
        )


def settings_of(rounds: int, steps: int, *, overlap: bool) -> RunSettings:
    """The demo's settings, for two peers."""
    settings = parse_settings(SETTINGS.read_text("utf-8"))
    return dataclasses.replace(
        settings,
        inner=dataclasses.replace(settings.inner, steps=steps, overlap=overlap),
        outer=dataclasses.replace(settings.outer, rounds=rounds),
        rounds=dataclasses.replace(settings.rounds, start_peers=len(NAMES), quorum=len(NAMES)),
    )


def swarm(folder: Path, settings: RunSettings, bytes_per_s: float) -> Went:
    """Train one swarm to the end of its run."""
    with ExitStack() as stack:
        swarm = stack.enter_context(Swarm(folder, settings))
        swarm.aggregator()
        rounds = settings.outer.rounds
        for name in NAMES:
            swarm.peer(name, stack.enter_context(proxy_thread(swarm.port, Faults(bytes_per_s=bytes_per_s))))
        for name in NAMES:
            swarm.children[name].wait_event("state loaded", READY_S)
        finished = [swarm.children[name].wait_event("finished", ROUND_S_MAX * rounds) for name in NAMES]
        records = swarm.records()
        with swarm.store() as store:
            *_, (_, state) = replay(store, swarm.run, 0, rounds)
        bench = Bench(swarm.run, OperatorFolder(swarm.path).aggregator_home / "data", threads=1)
        counted = [e.inner_steps for record in records for e in record.entries if e.verdict == Verdict.ACCEPTED]
        return Went(
            settings.inner.overlap,
            sum(event["inner_time_share"] for event in finished) / len(finished),
            (records[-1].closed_ms - records[1].closed_ms) / 1000 / (rounds - 1),
            bench.loss_of(state),
            sum(counted),
        )


def main() -> None:
    """Print both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kbit", type=float, default=500.0, help="kilobits a second of each direction of each peer")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--steps", type=int, default=16, help="inner steps a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{len(NAMES)} peers at {options.kbit:g} kbit/s, {options.rounds} rounds of {options.steps} inner steps")
    for overlap in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(options.rounds, options.steps, overlap=overlap)
            print(swarm(Path(folder), settings, 125 * options.kbit).line(), flush=True)


if __name__ == "__main__":
    main()
