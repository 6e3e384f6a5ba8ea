"""What the tests of the core share: one thread, and a run small enough to train in seconds."""

from collections.abc import Callable, Iterator

import pytest
import torch

from peer.core.model import layout_of
from peer.core.replica import initial_state
from protocol.identity import PrivateKey
from protocol.layout import state_root
from protocol.run import (
    CompressionConfig,
    DataConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    RunConfig,
    RunSettings,
)

MakeRun = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_run() -> MakeRun:
    def make(model: ModelConfig | None = None, inner: InnerConfig | None = None, rounds: int = 10) -> RunConfig:
        model = model or ModelConfig(hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=2)
        settings = RunSettings(
            name="test",
            model=model,
            data=DataConfig(sequence_length=32),
            inner=inner or InnerConfig(steps=5, batch_size=4, warmup_steps=5, learning_rate=0.01),
            compression=CompressionConfig(k=256),
            outer=OuterConfig(rounds=rounds),
        )
        key = PrivateKey.from_bytes(bytes(range(32)))
        root = state_root(initial_state(model))
        return RunConfig.of(
            settings, operator=key.public, aggregators=(key.public,), layout=layout_of(model), genesis_root=root
        )

    return make
