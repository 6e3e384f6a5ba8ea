"""Inner steps in little memory and for a part of the time."""

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from peer.core.model import layout_of
from peer.core.replica import Replica, initial_state
from peer.errors import UserCode, UserError
from peer.training import Trainer
from protocol.identity import PrivateKey
from protocol.layout import state_root
from protocol.run import DataConfig, InnerConfig, ModelConfig, RunConfig, RunSettings

KEY = PrivateKey.from_bytes(bytes(32))
LENGTH, BATCH = 256, 128


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SPARE = "earlier tests of this process left it free memory, which no limit takes away"


def new_trainer(batch: int = BATCH, length: int = LENGTH) -> Trainer:
    model = ModelConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=length,
    )
    settings = RunSettings(
        name="small",
        model=model,
        data=DataConfig(sequence_length=length),
        inner=InnerConfig(steps=4, batch_size=batch, warmup_steps=0),
    )
    run = RunConfig.of(
        settings,
        operator=KEY.public,
        aggregators=(KEY.public,),
        layout=layout_of(model),
        genesis_root=state_root(initial_state(model)),
    )
    return Trainer(Replica(run, torch.device("cpu"), torch.float32))


def batches(trainer: Trainer, first: int) -> Iterator[NDArray[np.int64]]:
    run, draw = trainer.replica.run, np.random.default_rng(1)
    shape = (run.inner.batch_size, run.data.sequence_length + 1)
    return islice((draw.integers(0, 256, shape) for _ in range(run.inner.steps)), first, None)


@contextmanager
def little_memory(more: int) -> Iterator[None]:
    """Let this process have only so many more bytes than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to know how much memory is in use")
def test_where_memory_runs_out_fewer_sequences_are_taken_and_every_step_is_done_once() -> None:
    trainer, plenty = new_trainer(), new_trainer()
    heard: list[int] = []
    # The logits of a whole batch alone are 32 MiB, and the backward pass needs several times as much.
    with little_memory(48 << 20):
        done = trainer.train(
            1, lambda first: batches(trainer, first), threading.Event(), lambda steps, _: heard.append(steps), 0
        )
    if trainer.replica.micro_batch == 0:
        pytest.skip(SPARE)
    assert 0 < trainer.replica.micro_batch < BATCH
    assert heard == [1, 2, 3, 4] and (done.steps, done.tokens) == (4, 4 * BATCH * LENGTH)
    plenty.train(1, lambda first: batches(plenty, first), threading.Event(), lambda *_: None, 0)
    torch.testing.assert_close(trainer.replica.flat.values, plenty.replica.flat.values, rtol=0, atol=2e-4)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to know how much memory is in use")
def test_where_not_even_one_sequence_fits_there_is_a_remedy() -> None:
    trainer = new_trainer(batch=2, length=1 << 14)
    code = None
    with little_memory(4 << 20):
        try:
            trainer.train(1, lambda first: batches(trainer, first), threading.Event(), lambda *_: None, 0)
        except UserError as error:
            code = error.code
    if code is None:
        pytest.skip(SPARE)
    assert code is UserCode.OUT_OF_MEMORY
    assert trainer.replica.inner.own_steps == 0


def test_a_share_of_the_time_is_a_rest_after_each_step_and_ends_when_it_is_told() -> None:
    trainer, stop = new_trainer(batch=2, length=32), threading.Event()
    trainer.share = 0.1
    asked_s, done_s = list[float](), list[float]()

    def asked(first: int) -> Iterator[NDArray[np.int64]]:
        for batch in batches(trainer, first):
            asked_s.append(time.monotonic())
            yield batch

    def on_step(steps: int, _loss: float) -> None:
        done_s.append(time.monotonic())
        if steps == 4:
            trainer.share = 1e-9  # years of rest, if nobody ended it
            stop.set()

    assert trainer.train(1, asked, stop, on_step, 0).steps == 4
    rests_s = [after - before for before, after in zip(done_s, asked_s[1:], strict=False)]
    steps_s = [after - before for before, after in zip(asked_s, done_s, strict=True)]
    # A cap is a least time; nine times a step is what it is meant to be.
    assert len(rests_s) == 3 and all(rest > 5 * step for rest, step in zip(rests_s, steps_s, strict=False))
