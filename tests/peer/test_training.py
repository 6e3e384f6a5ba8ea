"""Inner steps in little memory and for a part of the time."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice

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
from tests.peer.scarce import leave_memory, run_alone

KEY = PrivateKey.from_bytes(bytes(32))
LENGTH, BATCH = 256, 128


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


def fewer_sequences() -> None:
    trainer, plenty = new_trainer(), new_trainer()
    heard: list[int] = []
    # The logits of a whole batch alone are 32 MiB, and the backward pass needs several times as much.
    leave_memory(48 << 20)
    done = trainer.train(
        1, lambda first: batches(trainer, first), threading.Event(), lambda steps, _: heard.append(steps), 0
    )
    taken = trainer.replica.micro_batch
    assert 0 < taken < BATCH
    assert heard == [1, 2, 3, 4] and (done.steps, done.tokens) == (4, 4 * BATCH * LENGTH)
    plenty.replica.micro_batch = 1
    plenty.train(1, lambda first: batches(plenty, first), threading.Event(), lambda *_: None, 0)
    torch.testing.assert_close(trainer.replica.flat.values, plenty.replica.flat.values, rtol=0, atol=2e-4)


def not_even_one() -> None:
    trainer = new_trainer(batch=2, length=1 << 14)
    leave_memory(4 << 20)
    with pytest.raises(UserError) as caught:
        trainer.train(1, lambda first: batches(trainer, first), threading.Event(), lambda *_: None, 0)
    assert caught.value.code is UserCode.OUT_OF_MEMORY
    assert trainer.replica.inner.own_steps == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize("scene", [fewer_sequences, not_even_one])
def test_where_memory_runs_out_fewer_sequences_are_taken_or_there_is_a_remedy(scene: Callable[[], None]) -> None:
    run_alone(scene)


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
