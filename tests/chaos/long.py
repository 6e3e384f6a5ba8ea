"""`make chaos`: what is too long for every commit, with figures to write into docs/log.md.

    python -m tests.chaos.long [boundaries] [random] [churn] [slow]

Every part ends with a line of figures, or with what is wrong.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from tests.chaos.boundaries import Paced
from tests.chaos.siege import PEERS, Siege, boundaries, kill_at_boundaries, kill_at_random
from tests.chaos.training import Swarm, calm, churn, settings_of
from tests.peer.proxy import Faults, proxy_thread

RANDOM_KILLS = 200
SIX = ("one", "two", "three", "four", "five", "six")
CHURN_KILLS, CHURN_EVERY_S = 30, 10.0
SLOW_ROUNDS = 20
STEP_S, SLOW_STEP_S = 0.1, 1.0  # most of it asleep, lest what else the machine does decides
MBIT_PER_S = 125_000.0  # bytes


def tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def at_boundaries(folder: Path, seed: int) -> None:
    """Kill the aggregator at every durable write and message of its start and of a whole round."""
    for whole_round in (False, True):
        siege = Siege(folder / str(whole_round), quorum=PEERS)
        places = asyncio.run(boundaries(siege, whole_round=whole_round))
        missed = asyncio.run(kill_at_boundaries(siege, places, whole_round=whole_round))
        what = "a whole round" if whole_round else "the start and the first round"
        kinds = len({name for name, _ in places})
        tell(f"{what}: {len(places)} boundaries of {kinds} kinds, {len(missed)} of them not reached again {missed}")
        tell(f"  {siege.check(seed)}")


def at_random(folder: Path, seed: int) -> None:
    """Kill it at random moments, half of them where rounds wait for all and half where one packet is enough."""
    for quorum in (PEERS, 1):
        siege = Siege(folder / str(quorum), quorum=quorum, grace_s=0.5)
        asyncio.run(kill_at_random(siege, seed, RANDOM_KILLS // 2, 1.5))
        tell(f"quorum {quorum}, {RANDOM_KILLS // 2} kills: {siege.check(seed)}")


def churned(folder: Path, seed: int) -> None:
    """Kill one of six training peers every ten seconds, and compare with the same swarm left alone."""
    settings = settings_of(steps=20, peers=len(SIX), grace_s=(0.5, 3.0))
    pace = Paced(STEP_S)
    went = churn(folder / "churn", SIX, settings, pace, seed, kills=CHURN_KILLS, every_s=CHURN_EVERY_S)
    closed = 1 - went.null_rounds / went.rounds
    tell(f"{went}: {closed:.1%} of the rounds are not null")
    # Half as many tokens a round make a better model of as many tokens; so the number of rounds is told with the loss.
    quiet = calm(folder / "calm", SIX, settings, pace, went.tokens, 1800.0)
    tell(f"{quiet}: {went.loss / quiet.loss - 1:+.2%} of loss for the kills")
    assert closed >= 0.99 and went.loss <= 1.02 * quiet.loss


def slow_and_far(folder: Path, seed: int) -> None:
    """What a peer whose steps take ten times as long costs the others, and what one behind 1 Mbit/s brings in."""
    del seed  # nothing is drawn here
    settings = settings_of(steps=120, peers=3, quorum=2, hidden=64, k=256, grace_s=(0.1, 3.0))
    for name in ("equal", "slow", "far"):
        names = ("one", "two", name)
        with ExitStack() as stack:
            swarm = stack.enter_context(Swarm(folder / name, settings))
            proxy = stack.enter_context(proxy_thread(swarm.port, Faults(bytes_per_s=MBIT_PER_S)))
            aggregator = swarm.aggregator()
            for each in names:
                pace = Paced(SLOW_STEP_S if each == "slow" else STEP_S)
                swarm.peer(each, proxy if each == "far" else None, pace)
            first = 5  # before that it learns how long rounds are
            aggregator.wait_event("round closed", 3600.0, first + SLOW_ROUNDS - 1)
        waited_s, all_s = swarm.waited(("one", "two"), first)
        rounds = len(swarm.records()) - first
        counted = [round for round in swarm.counted(name) if round >= first]
        steps = swarm.steps(name, first) / swarm.steps("one", first)
        seen = swarm.check_roots(names)
        tell(f"{name}: counted in {len(counted)} of {rounds} rounds of {all_s / rounds:.1f} s, {seen} roots equal")
        tell(f"  with {steps:.1%} of the inner steps of another peer")
        tell(f"  {waited_s / all_s:.2%} of the time from the last packet of the other two to the record")
        assert counted and (name != "slow" or waited_s < 0.02 * all_s)


PARTS: dict[str, Callable[[Path, int], None]] = {
    "boundaries": at_boundaries,
    "random": at_random,
    "churn": churned,
    "slow": slow_and_far,
}


def main() -> None:
    """Run the parts that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for name in options.parts or PARTS:
        began_s = time.monotonic()
        tell(f"{name}, seed {options.seed}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder), options.seed)
        tell(f"  in {time.monotonic() - began_s:.0f} s\n")


if __name__ == "__main__":
    main()
