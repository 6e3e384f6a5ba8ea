"""How well the run's newest state predicts text that nobody trains on, measured beside the aggregator's work.

It must never delay a round: one thread with one torch thread measures a fixed subset of the held-out text, rests most
of the time while the machine is busy, and passes over the states that come meanwhile. A system's own priorities would
not do: a thread that waits for the processor while it holds the interpreter's lock holds up the aggregator.
"""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from peer.aggregator import Aggregator, Evaluation
from peer.core.model import Llama
from peer.data.prepare import Dataset, prepare
from protocol.run import DataConfig, RunConfig

log = structlog.get_logger()

WINDOWS = 64  # enough to see a round's progress, for they are the same in every round
BATCH_TOKENS = 1024  # one batch is not interrupted, so a large model takes few tokens at a time
LOOK_S = 0.5
REST = 4.0  # on a busy machine, times as long as the work before it
COUNTED_TOKENS = 1 << 16  # from which the bytes of a token are counted
MICRONATS = 1_000_000
MICRONATS_MAX = 2**32 - 1  # stands for whatever is larger, and for what is no number


def micronats(loss: float) -> int:
    """A loss in nats as a record says it, in units of 1e-6, from 1 to 2^32 - 1."""
    units = loss * MICRONATS
    return max(1, round(units)) if units < MICRONATS_MAX else MICRONATS_MAX


def bytes_per_token(config: DataConfig, data: Dataset) -> float:
    """Bytes of UTF-8 behind a token of the held-out text, counted on its beginning."""
    if config.tokenizer == "bytes":
        return 1.0
    tokens = data.validation.tokens[:COUNTED_TOKENS]
    return len(data.tokenizer.decode(tokens.astype(np.int64)).encode("utf-8")) / len(tokens)


class Evaluator:
    """Evaluates the states of an aggregator, one at a time. `newest` stays when a record has taken it."""

    def __init__(self, run: RunConfig, cache: Path, every: int) -> None:
        """`cache` is where the aggregator keeps the tokens of an embedded corpus; `every` counts rounds."""
        self.newest: Evaluation | None = None
        self.bytes_per_token: float | None = None
        self._run, self._cache, self._every = run, cache, every
        self._stop = threading.Event()
        self._data: Dataset | None = None

    async def follow(self, program: Aggregator) -> None:
        """Evaluate the first, every n-th and the last state until cancelled; return when that cannot be done."""
        executor = ThreadPoolExecutor(1, "evaluation", initializer=_one_torch_thread)
        try:
            await asyncio.get_running_loop().run_in_executor(executor, self._prepare)
            due = program.head.round
            while True:
                round = program.head.round
                last = program.finished.is_set() and (self.newest is None or self.newest.round < round)
                if round >= due or last:
                    due = round + self._every
                    await self._evaluate(program, executor)
                else:
                    await asyncio.sleep(LOOK_S)
        except Exception as error:  # noqa: BLE001 - rounds go on without a loss, whatever is wrong with it
            log.warning("not evaluating", why=f"{type(error).__name__}: {error}")
        finally:
            self._stop.set()
            executor.shutdown(wait=False)

    async def _evaluate(self, program: Aggregator, executor: ThreadPoolExecutor) -> None:
        began_s, round = time.monotonic(), program.head.round
        loss = await asyncio.get_running_loop().run_in_executor(executor, self._loss, program.state)
        self.newest = program.evaluation = Evaluation(round, micronats(loss))
        log.info("evaluated", round=round, loss=loss, seconds=time.monotonic() - began_s)

    # In the thread

    def _prepare(self) -> None:
        self._data = prepare(self._run.data, self._cache, {})
        self.bytes_per_token = bytes_per_token(self._run.data, self._data)

    def _loss(self, state: NDArray[np.float32]) -> float:  # f32[N]
        """Mean loss of the state on the fixed windows, nats a token."""
        assert self._data is not None, "the text is ready before"
        model = _model_of(self._run, state)
        loss_sum, count = 0.0, 0
        batch_size = max(1, BATCH_TOKENS // self._run.data.sequence_length)
        for batch in self._unhurried(self._data.validation_batches(WINDOWS, batch_size)):
            with torch.inference_mode():
                loss_sum += float(model.loss(torch.from_numpy(batch))) * len(batch)
            count += len(batch)
        return loss_sum / count

    def _unhurried(self, batches: Iterator[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:  # i64[B, T + 1] each
        """The batches, with rests between them while there are more programs at work than processors."""
        for batch in batches:
            began_s = time.monotonic()
            yield batch
            rest_s = REST * (time.monotonic() - began_s) if _machine_is_busy() else 0.0
            if self._stop.wait(rest_s):
                return  # the aggregator is leaving, and nobody waits for the rest


def _one_torch_thread() -> None:
    """Let this thread compute alone, and leave the default to all others."""
    default = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch has a number for each thread that has begun to compute, and one for those that have not. Both were set.
    other = threading.Thread(target=torch.set_num_threads, args=(default,))
    other.start()
    other.join()


def _machine_is_busy() -> bool:
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return True  # this system does not say


def _model_of(run: RunConfig, state: NDArray[np.float32]) -> Llama:  # f32[N]
    """The model with these parameters, which are not copied."""
    with torch.device("meta"):
        model = Llama(run.model)
    flat, layout = torch.from_numpy(np.require(state, requirements="W")), run.layout
    starts = zip(layout.tensors, layout.offsets[:-1], strict=True)
    views = {tensor.name: flat[start : start + tensor.size].view(tensor.shape) for tensor, start in starts}
    model.load_state_dict(views, assign=True)
    return model.eval()
