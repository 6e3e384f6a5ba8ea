"""What befalls each peer in each round, drawn from a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from bench.convergence.setup import Setup, Weather


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
    away = [draw.random() < weather.absent for _ in range(setup.peers)]
    while True:
        fates = [_fate(setup, draw, is_away) for is_away in away]
        away = [_still_away(weather, draw, is_away) for is_away in away]
        if weather.calm or any(fate.steps and not fate.late for fate in fates):
            yield fates


def _still_away(weather: Weather, draw: random.Random, is_away: bool) -> bool:
    """Whether the peer is absent in the next round: spells end by chance, and begin so often that the share fits."""
    returns = 1 / weather.spell
    if weather.spell == 1:
        return draw.random() < weather.absent
    leaves = min(1.0, returns * weather.absent / (1 - weather.absent))
    return draw.random() >= returns if is_away else draw.random() < leaves


def _fate(setup: Setup, draw: random.Random, is_away: bool) -> Fate:
    weather = setup.weather
    # Everything is drawn every time, so that a peer's later fates do not depend on its earlier ones.
    late, partial, forgetful, share = (draw.random() for _ in range(4))
    steps = setup.steps
    if partial < weather.partial:
        steps = weather.steps_min + int(share * (setup.steps - weather.steps_min))
    return Fate(0 if is_away else steps, late < weather.late, forgetful < weather.forgetful)
