"""One training from its first parameters to its last, with the curve of its validation loss."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.convergence.methods import Cost, method_of, replica_for_evaluation
from bench.convergence.setup import Setup
from bench.convergence.weather import fates_of
from peer.data.prepare import Dataset

EVAL_BATCH = 32
EVAL_WINDOWS = 192  # of each kind of text


@dataclass(frozen=True)
class Point:
    """The training after a round: tokens by all peers, bytes up of the mean peer, bytes down of each."""

    round: int
    trained: int
    accepted: int
    bytes_up: int
    bytes_down: int
    loss: float


@dataclass(frozen=True)
class Result:
    """A finished training. `cpu_s` is the time of the process."""

    setup: Setup
    seed: int
    parameters: int
    curve: tuple[Point, ...]
    cpu_s: float

    @property
    def loss(self) -> float:
        """Validation loss at the end; infinite when training diverged."""
        return self.curve[-1].loss


def spent(setup: Setup, round: int, trained: int, accepted: int) -> int:
    """How much of the setup's budget is used up, in tokens."""
    by_rounds = round * setup.budget // setup.rounds
    return {"trained": trained, "accepted": accepted, "rounds": by_rounds}[setup.until]


def train(
    setup: Setup,
    seed: int,
    corpora: Sequence[Dataset],
    on_point: Callable[[Point], None],
    points: int = 12,
) -> Result:
    """Train until the budget is used up, and evaluate about `points` times: the mean over the kinds of text."""
    began_s = time.process_time()
    method = method_of(setup, corpora, seed)
    judge = replica_for_evaluation(method.run)

    def loss() -> float:
        judge.load_outer(method.state())
        each = [judge.evaluate(text.validation_batches(EVAL_WINDOWS, EVAL_BATCH)) for text in corpora]
        return sum(each) / len(each)

    def point(loss: float) -> Point:
        return Point(round, sums.trained, sums.accepted, sums.bytes_up // setup.peers, sums.bytes_down, loss)

    every = max(1, setup.budget // points)
    sums, curve, round = Cost(0, 0, 0, 0), [Point(0, 0, 0, 0, 0, loss())], 0
    fates, counted = fates_of(setup, seed), 0
    try:
        while counted < setup.budget:
            round += 1
            cost = method.round(round, next(fates))
            sums = Cost(*(getattr(sums, part.name) + getattr(cost, part.name) for part in dataclasses.fields(Cost)))
            before, counted = counted, spent(setup, round, sums.trained, sums.accepted)
            if before // every != counted // every or counted >= setup.budget:
                curve.append(point(loss()))
                on_point(curve[-1])
    except ValueError:  # diverged
        curve.append(point(float("inf")))
    return Result(setup, seed, method.run.layout.size, tuple(curve), time.process_time() - began_s)
