"""What befalls each peer in each round, drawn from a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from bench.convergence.setup import Setup


@dataclass(frozen=True)
class Fate:
    """One peer in one round. With no steps it is absent."""

    steps: int
    late: bool = False
    forgetful: bool = False


def fates_of(setup: Setup, seed: int) -> Iterator[list[Fate]]:
    """The fates of all peers, round after round, for ever. Somebody is always there and in time."""
    draw = random.Random(f"weather {seed}")
    weather = setup.weather
    while True:
        fates = [_fate(setup, draw) for _ in range(setup.peers)]
        if weather.calm or any(fate.steps and not fate.late for fate in fates):
            yield fates


def _fate(setup: Setup, draw: random.Random) -> Fate:
    weather = setup.weather
    # Everything is drawn every time, so that a peer's later fates do not depend on its earlier ones.
    absent, late, partial, forgetful, share = (draw.random() for _ in range(5))
    steps = setup.steps
    if partial < weather.partial:
        steps = 1 + int(share * (weather.steps_max or setup.steps - 1))
    if absent < weather.absent:
        steps = 0
    return Fate(steps, late < weather.late, forgetful < weather.forgetful)
