"""The Triton kernels against the numpy reference: on CUDA, or interpreted where TRITON_INTERPRET=1 is set."""

import importlib.util
import os
import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from peer.core.kernels import gpu
from protocol import compress as reference
from protocol.layout import Layout, chunk_lengths
from protocol.limits import BLOCK_CHUNKS, CHUNK, EXPONENT_MAX
from protocol.update import UpdateTensor, apply_update, encode_update_section

KINDS = ["normal", "ties", "scales", "bits", "zeros", "tiny", "huge", "denormal"]
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available() and HAS_TRITON:
        return torch.device("cuda")
    if HAS_TRITON and INTERPRETED:
        return torch.device("cpu")
    pytest.skip("needs Triton, and a CUDA device or TRITON_INTERPRET=1")


def values_of(kind: str, size: int, seed: int) -> NDArray[np.float32]:  # -> f32[size], finite
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(size).astype(np.float32)
    if kind == "ties":
        return rng.choice(np.array([-2, -1, -0.5, -0.0, 0.0, 0.5, 1, 2], np.float32), size)
    if kind == "scales":
        return normal * np.exp2(rng.integers(-60, 4, -(-size // CHUNK)).astype(np.float32)).repeat(CHUNK)[:size]
    if kind == "bits":
        values = rng.integers(0, 1 << 32, size, dtype=np.uint32).view(np.float32)
        return np.where(np.abs(values) < 1e38, values, np.float32(1.5))
    if kind == "zeros":
        return np.where(rng.random(size) < 0.995, np.float32(-0.0), normal)
    factor = {"normal": 1e-3, "tiny": 2.0**-31, "huge": 1e30, "denormal": 1e-40}[kind]
    return normal * np.float32(factor)


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return values.view(np.uint32)


def check(size: int, kind: str, k: int, code_bits: int, beta: float, device: torch.device) -> None:
    residual, outer, local = (values_of(kind, size, seed) for seed in (1, 2, 3))
    acc = reference.error_feedback(residual, outer, local, beta)
    theirs, expected = reference.compress(acc, k, code_bits)
    left, old, trained = (torch.tensor(values, device=device) for values in (residual, outer, local))
    ours, sent = gpu.compress_tensor(left, old, trained, beta, k, code_bits)
    assert ours.size == size
    for name in ("scales", "ratios", "indices", "codes"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)
    np.testing.assert_array_equal(bits(left.cpu().numpy()), bits(expected))
    sent.put_back(left)
    np.testing.assert_array_equal(bits(left.cpu().numpy()), bits(acc))


@pytest.mark.gpu
@pytest.mark.parametrize("code_bits", [1, 2])
@pytest.mark.parametrize("k", [1, 64, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_compress_equals_the_reference(kind: str, k: int, code_bits: int, device: torch.device) -> None:
    check(3 * CHUNK + 100, kind, k, code_bits, 0.95, device)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [2, 63, 128, 500, 4095])
@pytest.mark.parametrize("size", [1, 2, 65, CHUNK - 1, CHUNK, CHUNK + 1])
def test_compress_equals_the_reference_for_every_shape(size: int, k: int, device: torch.device) -> None:
    check(size, "normal", k, 2, 0.95, device)


@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_beta_is_rounded_to_float32_once(beta: float, device: torch.device) -> None:
    check(CHUNK, "normal", 64, 2, beta, device)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_divergence_is_refused(bad: float, device: torch.device) -> None:
    values = values_of("normal", 2 * CHUNK + 7, 1)
    for place in (0, 5000, 2 * CHUNK + 6):
        local = values.copy()
        local[place] = bad
        left, old, trained = (torch.tensor(part, device=device) for part in (values, values, local))
        with pytest.raises(ValueError, match="diverged"):
            gpu.compress_tensor(left, old, trained, 0.95, 64, 2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter is numpy
def test_an_overflow_in_acc_is_refused(device: torch.device) -> None:
    big = np.full(CHUNK, 3e38, np.float32)
    left, old, trained = (torch.tensor(part, device=device) for part in (big, big, -big))
    with pytest.raises(ValueError, match="diverged"):
        gpu.compress_tensor(left, old, trained, 0.95, 64, 2)


def update_of(size: int, density: float, seed: int) -> UpdateTensor:
    """An update whose chunks are empty, sparse or full, with every exponent that there is."""
    rng = np.random.default_rng(seed)
    densities = rng.choice([0, density / 100, density, 1], -(-size // CHUNK))
    indices = np.flatnonzero(rng.random(size) < densities.repeat(CHUNK)[:size])
    counts = np.bincount(indices // CHUNK, minlength=len(densities))
    exponents = np.where(counts > 0, np.arange(len(counts)) % (EXPONENT_MAX + 1), 0)
    values = (rng.integers(64, 128, len(indices)) * rng.choice([-1, 1], len(indices))).astype(np.int8)
    assert (counts <= chunk_lengths(size)).all()
    return UpdateTensor(size, counts.astype(np.uint16), exponents.astype(np.uint8), indices, values)


def check_outer_step(update: UpdateTensor, device: torch.device) -> None:
    outer = values_of("scales", update.size, 4)
    stepped = torch.tensor(outer, device=device)
    gpu.outer_step(stepped, encode_update_section(update))
    apply_update(outer, Layout.of([("t", (update.size,))]), [update])
    np.testing.assert_array_equal(bits(stepped.cpu().numpy()), bits(outer))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 300, CHUNK, 40 * CHUNK + 9])
@pytest.mark.parametrize("seed", range(3))
def test_outer_step_equals_the_reference(size: int, seed: int, device: torch.device) -> None:
    check_outer_step(update_of(size, 0.2, seed), device)


@pytest.mark.gpu
def test_outer_step_crosses_blocks_of_chunks(device: torch.device) -> None:
    check_outer_step(update_of((BLOCK_CHUNKS + 3) * CHUNK + 5, 0.001, 1), device)


@pytest.mark.gpu
def test_an_empty_update_changes_nothing(device: torch.device) -> None:
    check_outer_step(update_of(3 * CHUNK, 0, 0), device)
    nothing = np.zeros(0, np.int64)
    check_outer_step(
        UpdateTensor(5, np.zeros(1, np.uint16), np.zeros(1, np.uint8), nothing, nothing.astype(np.int8)), device
    )


@pytest.mark.gpu
def test_a_section_that_nobody_checked_writes_only_into_its_tensor(device: torch.device) -> None:
    count, exponent, gap, value = b"\x01\x00", b"\x00", b"\xc8", b"\x01"
    flat = torch.zeros(CHUNK, device=device)
    gpu.outer_step(flat[:100], count + exponent + gap + value)
    assert not flat.any()


@pytest.mark.gpu
def test_the_self_test_passes(device: torch.device) -> None:
    assert gpu.self_test(device)


@pytest.mark.gpu
def test_the_self_test_finds_fused_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (torch.cuda.is_available() and HAS_TRITON) or INTERPRETED:
        pytest.skip("needs Triton and a CUDA device; the interpreter fuses nothing")
    from peer.core.kernels import triton_kernels  # noqa: PLC0415  Triton is not everywhere

    monkeypatch.setattr(triton_kernels, "NO_FUSION", {"enable_fp_fusion": True})
    assert not gpu.self_test(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [80, 90])
def test_no_kernel_fuses_or_flushes_when_compiled(capability: int) -> None:
    if not HAS_TRITON or INTERPRETED:
        pytest.skip("needs Triton, not interpreted; no device")
    assert not re.search(r"\bfma\.|\.ftz\b", compiled("select_chunks", capability, fuses=False))
    assert not re.search(r"\bfma\.|\.ftz\b", compiled("quantize_chunks", capability, fuses=False))
    assert not re.search(r"\bfma\.|\.ftz\b", compiled("apply_chunks", capability, fuses=False))
    assert re.search(r"\bfma\.", compiled("select_chunks", capability, fuses=True))


def compiled(name: str, capability: int, *, fuses: bool) -> str:
    """The kernel as PTX for cards of this capability; no card is needed for it."""
    triton = pytest.importorskip("triton", "3.3")
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415  Triton is not everywhere

    from peer.core.kernels import triton_kernels  # noqa: PLC0415  Triton is not everywhere

    flats = {"residual": "*fp32", "outer": "*fp32", "local": "*fp32"}
    chosen = {"columns": "*i16", "originals": "*fp32"}
    numbers = {"k": "i32", "last_count": "i32"}
    signature = {
        "select_chunks": flats | chosen | {"diverged": "*i32", "size": "i32", "beta": "fp32"} | numbers,
        "quantize_chunks": {"residual": "*fp32"}
        | chosen
        | {"scales": "*u8", "ratios": "*u8", "codes": "*u8"}
        | numbers,
        "apply_chunks": {
            "outer": "*fp32",
            "counts": "*i16",
            "exponents": "*u8",
            "firsts": "*i32",
            "ends": "*i64",
            "gaps": "*u8",
            "values": "*i8",
            "size": "i32",
        },
    }[name]
    built_in = {
        "select_chunks": {},
        "quantize_chunks": {"one_bit": False, "width": 64},
        "apply_chunks": {"width": 1024},
    }[name]
    signature |= dict.fromkeys(built_in, "constexpr")
    kernel = getattr(triton_kernels, name)
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=built_in)
    options = triton_kernels.NO_FUSION | {"enable_fp_fusion": fuses}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx: str = binary.asm["ptx"]
    return ptx


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so() -> None:
    assert gpu.why_not() == "there is no CUDA device"
