"""One machine alone: the baseline that a swarm has to beat at the same number of tokens per peer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peer.core.device import pick_device, pick_dtype, set_threads
from peer.core.replica import Replica, initial_state
from peer.data.prepare import Dataset, prepare
from protocol.run import RunConfig

EVAL_WINDOWS = 192
EVAL_BATCH = 16


@dataclass(frozen=True)
class Point:
    """Validation loss (nats a token) after so many tokens on one peer."""

    tokens: int
    val_loss: float


class Bench:
    """The run's data and one replica, for training alone and for evaluating states."""

    def __init__(self, run: RunConfig, cache: Path, threads: int) -> None:
        set_threads(threads)
        device = pick_device("cpu")
        self.run = run
        self.data: Dataset = prepare(run.data, cache, {})
        self.replica = Replica(run, device, pick_dtype("float32", device))

    def val_loss(self) -> float:
        """Validation loss of the replica's local parameters on the same windows every time."""
        return self.replica.evaluate(self.data.validation_batches(EVAL_WINDOWS, EVAL_BATCH))

    def loss_of(self, state: NDArray[np.float32]) -> float:  # f32[N]
        """Validation loss of outer parameters."""
        self.replica.load_outer(state)
        return self.val_loss()

    def train_alone(self, peer_key: bytes, every_rounds: int, on_round: Callable[[int, Point], None]) -> list[Point]:
        """Train as one peer that never hears of another, with the same batches, schedule and number of steps."""
        inner = self.run.inner
        self.replica.load_outer(initial_state(self.run.model))
        points = [Point(0, self.val_loss())]
        for round in range(1, self.run.outer.rounds + 1):
            batches = self.data.training_batches(round, peer_key, inner.steps, inner.batch_size)
            self.replica.train_steps(round, batches, lambda: False, lambda _steps, _loss: None)
            if round % every_rounds == 0 or round == self.run.outer.rounds:
                points.append(Point(round * self.run.nominal_tokens, self.val_loss()))
                on_round(round, points[-1])
        return points
