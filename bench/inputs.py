"""What the codec is measured on: a real pseudo-gradient of 16M values, and larger inputs made from it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.real_gradients import (
    OPERATOR,
    demo_settings,
    exchange,
    make_run,
    open_data,
    replicas_of,
    train_round,
    with_k,
)
from peer.core.model import layout_of
from protocol.limits import CHUNK
from protocol.run import ModelConfig, RunConfig

WARM_ROUNDS = 4  # after which the residual holds what earlier packets could not carry
STEPS = 8


@dataclass(frozen=True)
class Inputs:
    """What `compress` is given, f32[N] each, and the run whose layout cuts it."""

    run: RunConfig
    residual: Tensor
    outer: Tensor
    local: Tensor

    @property
    def delta(self) -> Tensor:  # f32[N]
        """The pseudo-gradient."""
        return self.outer - self.local

    @property
    def acc(self) -> Tensor:  # f32[N]
        """beta * residual + delta, two roundings."""
        return self.residual.mul(self.run.compression.beta).add_(self.delta)


def model_of(millions: int) -> ModelConfig:
    """A model of about 16 or 128 million parameters whose matrices are whole chunks."""
    width, inner, layers = {16: (768, 2432, 2), 128: (1024, 2816, 10)}[millions]
    return ModelConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
        initializer_range=0.03,
    )


def real_inputs(k: int, seed: int, cache: Path) -> Inputs:
    """Train one replica of 16M parameters for a few rounds and stop before its next packet."""
    settings = with_k(replace(demo_settings(), model=model_of(16)), k)
    inner = replace(settings.inner, steps=STEPS, batch_size=2, learning_rate=0.002, warmup_steps=STEPS)
    run = make_run(replace(settings, inner=inner))
    data = open_data(run, cache)
    replicas = replicas_of(run, 1)
    for round in range(1, WARM_ROUNDS + 1):
        train_round(replicas, data, round, seed)
        exchange(replicas)
    train_round(replicas, data, WARM_ROUNDS + 1, seed)
    (replica,) = replicas
    return Inputs(run, replica.residual.clone(), replica.outer.clone(), replica.flat.values.detach().clone())


def with_packets(inputs: Inputs, k: int, code_bits: int) -> Inputs:
    """The same values for packets of another k."""
    run = inputs.run
    return replace(inputs, run=replace(run, compression=replace(run.compression, k=k, code_bits=code_bits)))


def enlarged(inputs: Inputs, millions: int) -> Inputs:
    """Inputs for a larger model: copies, each with the columns of every chunk in another order. For speed alone."""
    model = model_of(millions)
    layout = layout_of(model)
    settings = replace(demo_settings(), model=model, compression=inputs.run.compression)
    run = RunConfig.of(
        settings, operator=OPERATOR.public, aggregators=(OPERATOR.public,), layout=layout, genesis_root=bytes(32)
    )
    big = Inputs(run, *(torch.empty(layout.size) for _ in range(3)))
    for source, target in ((inputs.residual, big.residual), (inputs.outer, big.outer), (inputs.local, big.local)):
        start = 0
        for copy in shuffled(source):
            end = min(start + len(copy), len(target))
            target[start:end] = copy[: end - start]
            start = end
            if start == len(target):
                break
    return big


def shuffled(source: Tensor) -> Iterator[Tensor]:  # f32[N] -> f32[N rounded down to whole chunks], without end
    """The values as they are, then again and again with the columns of every chunk in another order."""
    rows = source[: len(source) // CHUNK * CHUNK].view(-1, CHUNK)
    yield rows.flatten()
    draws = torch.Generator().manual_seed(0)
    while True:
        yield rows[:, torch.randperm(CHUNK, generator=draws)].flatten()
