"""What both sides are given, and what is told of each."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from bench.swarm.links import Link
from bench.swarm.meter import Peer
from peer.demo import SETTINGS
from protocol.run import RunSettings, parse_settings

AGGREGATOR = "aggregator"
SERVER = Link(1e9, 1e9)
MODELS = {"demo": (16, 0.25), "10m": (30, 1.8)}  # inner steps a round, seconds of one


@dataclass(frozen=True)
class Case:
    """One comparison."""

    settings: RunSettings
    peers: tuple[str, ...]
    step_s: float
    link: Link
    round_trip_s: float
    points: int
    """After how many rounds the loss is evaluated."""

    @property
    def matchmaking_s(self) -> float:
        """How long hivemind's peers look for each other before the end of a round, at most."""
        return max(1.5, min(5.0, 0.5 * self.settings.inner.steps * self.step_s))


@dataclass(frozen=True)
class Point:
    """Validation loss of the swarm's parameters, nats a token, so many seconds after the first inner step."""

    seconds: float
    tokens: int
    loss: float


@dataclass(frozen=True)
class Went:
    """How one side went."""

    label: str
    peers: Sequence[Peer]
    curve: Sequence[Point]
    note: str

    def mean(self, name: str) -> float:
        """The mean over the peers of one of their figures."""
        return float(sum(getattr(peer, name) for peer in self.peers) / len(self.peers))

    def at(self, seconds: float) -> float:
        """The loss that was reached by then."""
        return [point.loss for point in self.curve if point.seconds <= seconds or point is self.curve[0]][-1]


def looked_at(rounds: int, points: int) -> list[int]:
    """About so many rounds, evenly spread, with the last one."""
    every = max(1, rounds // points)
    return [*range(every, rounds, every), rounds]


def settings_of(model: str, *, peers: int, rounds: int, seed: int) -> RunSettings:
    """The demo's settings for so many peers, or those of a model of ten million parameters on the same text."""
    settings, steps = parse_settings(SETTINGS.read_text("utf-8")), MODELS[model][0]
    if model == "10m":
        # One sequence a step: what travels does not depend on it, and the steps are paced.
        settings = dataclasses.replace(
            settings,
            name="ten-million",
            model=dataclasses.replace(
                settings.model, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, initializer_range=0.02
            ),
            inner=dataclasses.replace(settings.inner, batch_size=1, learning_rate=0.001),
        )
    return dataclasses.replace(
        settings,
        inner=dataclasses.replace(settings.inner, steps=steps),
        data=dataclasses.replace(settings.data, seed=seed),
        outer=dataclasses.replace(settings.outer, rounds=rounds),
        rounds=dataclasses.replace(
            settings.rounds, start_peers=peers, quorum=peers, grace_s_max=60.0, deadline_s=600.0
        ),
    )
