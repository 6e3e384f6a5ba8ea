"""A round's inner steps as a volunteer's machine does them: for a share of the time, and in what memory there is."""

import time
from collections.abc import Callable, Iterable, Iterator
from threading import Event

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from peer.core.replica import Replica, Trained
from peer.errors import UserCode, UserError
from peer.fit import out_of_memory

log = structlog.get_logger()

Batches = Iterable[NDArray[np.int64]]  # i64[B, T + 1] each


class Trainer:
    """Trains one replica. `share` is the part of the time in which inner steps run; another thread may change it."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.share = 1.0

    def train(
        self,
        round: int,
        batches: Callable[[int], Batches],
        stop: Event,
        on_step: Callable[[int, float], None],
        done: int,
    ) -> Trained:
        """Do inner steps until the batches end or `stop` is set; a step that runs is finished, a rest is not.

        `batches(n)` are those of the round without the first n; `done` steps of it are done. `on_step` hears how many
        steps this call has done, and the loss of the last one. Raises ValueError when training diverges, and UserError
        OUT_OF_MEMORY when not even one sequence at a time fits.
        """
        run, losses = self.replica.run, list[float]()

        def note(_steps: int, loss: float) -> None:
            losses.append(loss)
            on_step(len(losses), loss)

        while True:
            before = done + len(losses)
            try:
                with out_of_memory(self.replica):
                    rested = self._rested(batches(before), stop)
                    self.replica.train_steps(round, rested, stop.is_set, note, before)
                break
            except UserError as error:
                if error.code != UserCode.OUT_OF_MEMORY or self._batch_part() == 1:
                    raise
            # A step that failed has changed nothing but gradients, and by now the error has let go of its memory.
            self._halve()
        tokens = len(losses) * run.inner.batch_size * run.data.sequence_length
        return Trained(len(losses), tokens, sum(losses) / len(losses) if losses else float("nan"))

    def _rested(self, batches: Batches, stop: Event) -> Iterator[NDArray[np.int64]]:
        """The batches, with a rest after each step that leaves training its share of the time."""
        for batch in batches:
            began_s = time.monotonic()
            yield batch
            if self.share < 1:
                stop.wait((time.monotonic() - began_s) * (1 - self.share) / self.share)

    def _batch_part(self) -> int:
        return self.replica.micro_batch or self.replica.run.inner.batch_size

    def _halve(self) -> None:
        self.replica.micro_batch = self._batch_part() // 2
        if self.replica.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("memory ran out: fewer sequences at a time from here on", micro_batch=self.replica.micro_batch)
