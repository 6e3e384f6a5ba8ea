import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from peer.core.model import layout_of
from peer.core.replica import Replica, initial_state
from peer.errors import UserCode, UserError, render
from peer.fit import REPLICA_BYTES, Fitted, fit_micro_batch, free_bytes, out_of_memory, state_bytes
from protocol.identity import PrivateKey
from protocol.layout import state_root
from protocol.run import CompressionConfig, DataConfig, InnerConfig, ModelConfig, OuterConfig, RunConfig, RunSettings
from tests.peer.scarce import leave_memory, run_alone

CPU = torch.device("cpu")


def small_replica(batch_size: int, sequence_length: int, device: torch.device = CPU) -> Replica:
    model = ModelConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=sequence_length,
    )
    settings = RunSettings(
        name="fit",
        model=model,
        data=DataConfig(sequence_length=sequence_length),
        inner=InnerConfig(steps=4, batch_size=batch_size, warmup_steps=2),
        compression=CompressionConfig(k=64),
        outer=OuterConfig(rounds=4),
    )
    key = PrivateKey.from_bytes(bytes(range(32)))
    root = state_root(initial_state(model))
    run = RunConfig.of(
        settings, operator=key.public, aggregators=(key.public,), layout=layout_of(model), genesis_root=root
    )
    return Replica(run, device, torch.float32)


def batch_of(replica: Replica, seed: int = 5) -> NDArray[np.int64]:  # i64[B, T + 1]
    shape = (replica.run.inner.batch_size, replica.run.data.sequence_length + 1)
    return np.random.default_rng(seed).integers(0, 256, shape)


def train(replica: Replica, batches: list[NDArray[np.int64]]) -> None:
    replica.train_steps(1, batches, lambda: False, lambda _steps, _loss: None)


def everything(replica: Replica) -> dict[str, NDArray[np.uint8]]:
    """All bits that the next inner step depends on."""
    tensors = {**replica.state(), "local": replica.flat.values, "random": torch.get_rng_state()}
    tensors |= {f"step {i}": entry["step"] for i, entry in enumerate(replica.inner._adam.state.values())}
    return {name: tensor.cpu().reshape(-1).view(torch.uint8).numpy().copy() for name, tensor in tensors.items()}


def test_trying_leaves_the_replica_as_it_was() -> None:
    replica = small_replica(8, 32)
    train(replica, [batch_of(replica, seed) for seed in (1, 2)])
    before = everything(replica)
    fitted = fit_micro_batch(replica, batch_of(replica))
    after = everything(replica)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert (replica.micro_batch, replica.dtype) == (0, torch.float32), "the caller decides whether to take it"
    fitted.apply(replica)
    assert (replica.micro_batch, replica.inner.dtype) == (fitted.micro_batch, fitted.dtype)


def test_a_replica_that_was_fitted_trains_to_the_same_bits() -> None:
    batches = [batch_of(small_replica(4, 32), seed) for seed in (1, 2, 3)]
    tried, plain = small_replica(4, 32), small_replica(4, 32)
    for replica in (tried, plain):
        train(replica, batches[:1])
    fit_micro_batch(tried, batches[0], micro_batch=3)
    for replica in (tried, plain):
        train(replica, batches[1:])
    assert torch.equal(tried.flat.values, plain.flat.values)


def test_what_is_found_is_within_what_was_allowed() -> None:
    replica = small_replica(6, 32)
    fitted = fit_micro_batch(replica, batch_of(replica))
    assert 1 <= fitted.micro_batch <= 6
    assert fitted.step_s > 0
    assert str(fitted.micro_batch) in fitted.why
    assert "6 sequences" in fitted.why
    # A sequence holds at least its residual stream, at each of the two norms of each layer.
    assert fitted.activation_bytes > 2 * 2 * 32 * 64 * 4
    chosen = fit_micro_batch(replica, batch_of(replica), dtype="bfloat16", micro_batch=2)
    assert (chosen.micro_batch, chosen.dtype) == (2, torch.bfloat16)
    whole = fit_micro_batch(replica, batch_of(replica), dtype="float32", micro_batch=500)
    assert (whole.micro_batch, whole.dtype) == (6, torch.float32)


def test_without_time_the_smallest_is_taken() -> None:
    replica = small_replica(8, 32)
    fitted = fit_micro_batch(replica, batch_of(replica), budget_s=0.0)
    assert fitted.micro_batch == 1
    assert "too long" in fitted.why


def test_the_activations_of_a_sequence_grow_with_its_length() -> None:
    short, long = (small_replica(2, length) for length in (32, 128))
    bytes_of = [fit_micro_batch(each, batch_of(each), dtype="float32").activation_bytes for each in (short, long)]
    assert bytes_of[1] == pytest.approx(4 * bytes_of[0], rel=0.25)


def largest_that_fits() -> None:
    replica = small_replica(64, 2048)
    batch = batch_of(replica)
    one = fit_micro_batch(replica, batch[:1], dtype="float32")
    before = everything(replica)
    leave_memory(one.activation_bytes + (8 << 20))
    fitted = fit_micro_batch(replica, batch, dtype="float32", budget_s=60.0)
    assert fitted.micro_batch == 1 and fitted.why.startswith("1 of 64 sequences")
    assert fitted.why.endswith("2 do not fit into memory")
    with pytest.raises(UserError, match="64 sequences") as asked:
        fit_micro_batch(replica, batch, dtype="float32", micro_batch=64)
    assert asked.value.code is UserCode.OUT_OF_MEMORY and "micro_batch" in render(asked.value)
    assert all(np.array_equal(value, before[name]) for name, value in everything(replica).items())
    fitted.apply(replica)
    train(replica, [batch[: fitted.micro_batch]])
    replica.micro_batch = 0
    with pytest.raises(UserError, match="the memory of cpu is used up with 64 sequences"), out_of_memory(replica):
        train(replica, [batch])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_where_memory_runs_out_the_largest_that_fits_is_found_and_more_is_an_error_with_a_remedy() -> None:
    run_alone(largest_that_fits)


def test_other_errors_pass_the_memory_guard() -> None:
    replica = small_replica(2, 32)
    with pytest.raises(RuntimeError, match="another"), out_of_memory(replica):
        raise RuntimeError("another")
    with pytest.raises(UserError) as caught, out_of_memory(replica):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert caught.value.code is UserCode.OUT_OF_MEMORY


def test_memory_is_counted() -> None:
    replica = small_replica(2, 32)
    held = [replica.outer, replica.residual, replica.flat.values, replica.flat.gradients]
    held += [replica.inner.first, replica.inner.second]
    assert sum(tensor.nbytes for tensor in held) == REPLICA_BYTES * replica.run.layout.size == state_bytes(replica.run)
    free = free_bytes(CPU)
    assert free is None or 0 <= free < 1 << 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_on_cuda_the_micro_batch_grows_to_the_whole_batch() -> None:
    replica = small_replica(16, 128, torch.device("cuda"))
    before = everything(replica)
    fitted: Fitted = fit_micro_batch(replica, batch_of(replica))
    assert all(np.array_equal(value, before[name]) for name, value in everything(replica).items())
    assert fitted.micro_batch > 1
