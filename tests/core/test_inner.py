import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from peer.core.flat import Flat, flatten
from peer.core.inner import InnerOptimizer, learning_rate
from peer.core.model import Llama, initial_parameters, layout_of
from protocol.run import InnerConfig, ModelConfig

MODEL = ModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_key_value_heads=2)
CPU = torch.device("cpu")


def optimizer_of(config: InnerConfig, total_steps: int = 100) -> InnerOptimizer:
    model, layout = Llama(MODEL), layout_of(MODEL)
    flat = Flat(model, layout, CPU)
    flat.values.copy_(flatten(initial_parameters(MODEL), layout))
    return InnerOptimizer(model, flat, config, total_steps, torch.float32)


def batch(seed: int, size: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (size, 17)))


def test_schedule_rises_falls_and_stays() -> None:
    config = InnerConfig(learning_rate=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, step, 110) for step in range(150)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(rates[10:111]))
    assert rates[60] == pytest.approx(0.55)
    assert rates[110:] == pytest.approx([0.1] * 40)


def test_constant_schedule_and_no_warmup() -> None:
    config = InnerConfig(learning_rate=0.5, warmup_steps=0, schedule="constant")
    assert {learning_rate(config, step, step, 10) for step in range(30)} == {0.5}


def test_a_late_joiner_warms_up() -> None:
    config = InnerConfig(learning_rate=1.0, warmup_steps=10, min_lr_ratio=0.0)
    rates = [learning_rate(config, 500 + own, own, 1000) for own in range(12)]
    assert rates[0] == pytest.approx(0.1 * learning_rate(config, 500, 500, 1000))
    assert rates[11] == learning_rate(config, 511, 511, 1000)


def adamw_by_hand(
    values: NDArray[np.float64], gradients: list[NDArray[np.float64]], decays: NDArray[np.float64], config: InnerConfig
) -> NDArray[np.float64]:
    """AdamW as Loshchilov and Hutter write it (arXiv 1711.05101), with clipping before it."""
    first, second = np.zeros_like(values), np.zeros_like(values)
    for step, raw in enumerate(gradients):
        gradient = raw * min(1.0, config.grad_clip_norm / math.sqrt(float(raw @ raw)))
        rate = learning_rate(config, step, step, 100)
        first = config.adam_beta1 * first + (1 - config.adam_beta1) * gradient
        second = config.adam_beta2 * second + (1 - config.adam_beta2) * gradient**2
        mean = first / (1 - config.adam_beta1 ** (step + 1))
        square = second / (1 - config.adam_beta2 ** (step + 1))
        values = values - rate * decays * values - rate * mean / (np.sqrt(square) + config.adam_eps)
    return values


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_step_is_adamw(clip: float) -> None:
    config = InnerConfig(
        learning_rate=0.01, warmup_steps=3, weight_decay=0.3, grad_clip_norm=clip, adam_eps=1e-6, adam_beta2=0.9
    )
    inner = optimizer_of(config)
    start = inner.flat.values.double().numpy()
    decays = np.concatenate([np.full(t.size, 0.3 if len(t.shape) > 1 else 0.0) for t in inner.flat.layout.tensors])
    gradients = []
    for step in range(5):
        before = inner.flat.gradients
        loss = inner.model.loss(batch(step))
        grads = torch.autograd.grad(loss, list(inner.flat.parameters.values()))
        gradients.append(torch.cat([gradient.flatten() for gradient in grads]).double().numpy())
        assert inner.step(batch(step), step, 0) == pytest.approx(float(loss.detach()))
        assert inner.flat.gradients is before
    expected = adamw_by_hand(start, gradients, decays, config)
    moved = np.abs(expected - start).max()
    assert moved > 0.01
    np.testing.assert_allclose(inner.flat.values.numpy(), expected, rtol=0, atol=1e-4 * moved)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 6, 100])
def test_micro_batches_change_nothing_but_rounding(micro_batch: int) -> None:
    config = InnerConfig(learning_rate=0.01, warmup_steps=0, adam_eps=1e-3)
    whole, parts = optimizer_of(config), optimizer_of(config)
    for step in range(3):
        assert parts.step(batch(step), step, micro_batch) == pytest.approx(whole.step(batch(step), step, 0), rel=1e-5)
    torch.testing.assert_close(parts.flat.values, whole.flat.values, rtol=0, atol=2e-5)


def test_state_continues_bit_for_bit() -> None:
    config = InnerConfig(learning_rate=0.01, warmup_steps=4)
    one, other = optimizer_of(config), optimizer_of(config)
    for step in range(3):
        one.step(batch(step), step, 0)
    saved = {name: value.clone() for name, value in one.state().items()}
    other.flat.values.copy_(one.flat.values)
    other.load_state(saved)
    for step in range(3, 6):
        assert one.step(batch(step), step, 0) == other.step(batch(step), step, 0)
    assert torch.equal(one.flat.values, other.flat.values)
    assert torch.equal(one.second, other.second)


def test_foreign_moments_are_refused() -> None:
    inner = optimizer_of(InnerConfig())
    state = inner.state()
    with pytest.raises(ValueError, match="do not fit"):
        inner.load_state({**state, "first": torch.zeros(3)})
    with pytest.raises(ValueError, match="do not fit"):
        inner.load_state({**state, "second": inner.second.double()})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_reaches_neither_parameters_nor_moments(bad: float) -> None:
    inner = optimizer_of(InnerConfig(learning_rate=0.01, warmup_steps=0))
    inner.step(batch(0), 0, 0)
    place = int(inner.first.abs().argmax())
    inner.flat.values[place] = bad
    before = {name: value.clone() for name, value in inner.state().items()} | {"values": inner.flat.values.clone()}
    with pytest.raises(ValueError, match="diverged at inner step 1"):
        inner.step(batch(1), 1, 0)
    after = {**inner.state(), "values": inner.flat.values}
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)
