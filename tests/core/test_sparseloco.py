import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from peer.core import sparseloco
from protocol import compress as reference
from protocol.limits import CHUNK
from protocol.packing import SparseTensor

SIZES = [1, 2, 63, 4095, 4096, 4097, 2 * 4096, 3 * 4096 + 100]
KINDS = ["normal", "ties", "scales", "bits", "zeros", "tiny", "huge", "denormal"]


def values_of(kind: str, size: int, seed: int) -> NDArray[np.float32]:  # -> f32[size], finite
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(size).astype(np.float32)
    if kind == "ties":
        return rng.choice(np.array([-2, -1, -0.5, -0.0, 0.0, 0.5, 1, 2], np.float32), size)
    if kind == "scales":
        return normal * np.exp2(rng.integers(-60, 4, -(-size // CHUNK)).astype(np.float32)).repeat(CHUNK)[:size]
    if kind == "bits":
        bits = rng.integers(0, 1 << 32, size, dtype=np.uint32)
        values = bits.view(np.float32)
        return np.where(np.isfinite(values), values, np.float32(1.5))
    if kind == "zeros":
        return np.where(rng.random(size) < 0.995, np.float32(-0.0), normal)
    factor = {"normal": 1e-3, "tiny": 2.0**-31, "huge": 1e30, "denormal": 1e-40}[kind]
    return normal * np.float32(factor)


def same(ours: SparseTensor, theirs: SparseTensor) -> None:
    assert ours.size == theirs.size
    for name in ("scales", "ratios", "indices", "codes"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return values.view(np.uint32)


def check_against_reference(acc: NDArray[np.float32], k: int, code_bits: int, device: str) -> None:
    on_device = torch.from_numpy(acc.copy()).to(device)
    ours, sent = sparseloco.compress_tensor(on_device, k, code_bits)
    theirs, expected = reference.compress(acc, k, code_bits)
    same(ours, theirs)
    np.testing.assert_array_equal(bits(on_device.cpu().numpy()), bits(expected))
    np.testing.assert_array_equal(sent.positions.cpu().numpy(), theirs.indices)
    sent.put_back(on_device)
    np.testing.assert_array_equal(bits(on_device.cpu().numpy()), bits(acc))


@settings(max_examples=120, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    kind=st.sampled_from(KINDS),
    k=st.sampled_from([1, 2, 64, 128, 500, 4096]),
    code_bits=st.sampled_from([1, 2]),
    seed=st.integers(0, 1 << 32),
)
def test_compress_equals_the_reference(size: int, kind: str, k: int, code_bits: int, seed: int) -> None:
    check_against_reference(values_of(kind, size, seed), k, code_bits, "cpu")


def test_batches_of_chunks_are_joined_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparseloco, "_BATCH_CHUNKS", 2)
    check_against_reference(values_of("normal", 7 * CHUNK + 9, 3), 64, 2, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_compress_equals_the_reference_on_a_gpu(kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for size in (50 * CHUNK + 9, 300):
        for code_bits in (1, 2):
            check_against_reference(values_of(kind, size, 3), 64, code_bits, "cuda")


def error_feedback(
    residual: NDArray[np.float32], outer: NDArray[np.float32], local: NDArray[np.float32], beta: float
) -> NDArray[np.float32]:
    acc = residual.copy()
    sparseloco.error_feedback(torch.from_numpy(acc), torch.from_numpy(outer), torch.from_numpy(local), beta)
    return acc


@settings(max_examples=50, deadline=None)
@given(kind=st.sampled_from(KINDS[:4]), beta=st.floats(0, 1), seed=st.integers(0, 1 << 32))
def test_error_feedback_rounds_twice(kind: str, beta: float, seed: int) -> None:
    residual, outer, local = (values_of(kind, 1000, seed + i) for i in range(3))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = reference.error_feedback(residual, outer, local, beta)
    np.testing.assert_array_equal(error_feedback(residual, outer, local, beta), expected)


def test_error_feedback_differs_from_a_fused_one() -> None:
    residual, outer, local = (values_of("normal", 10_000, i) for i in range(3))
    ours = error_feedback(residual, outer, local, 0.95)
    fused = (np.float64(np.float32(0.95)) * residual + (outer - local)).astype(np.float32)
    assert np.count_nonzero(ours != fused) > 1000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_divergence_is_refused_and_changes_nothing(bad: float) -> None:
    values = values_of("normal", 2 * CHUNK, 1)
    values[5000] = bad
    acc = torch.from_numpy(values.copy())
    with pytest.raises(ValueError, match="diverged"):
        sparseloco.compress_tensor(acc, 64, 2)
    np.testing.assert_array_equal(bits(acc.numpy()), bits(values))
