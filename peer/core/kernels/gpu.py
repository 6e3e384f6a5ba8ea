"""Compression and the outer step on a CUDA device through Triton, bit-equal to `protocol.compress` (SPEC 4 and 7).

Triton comes with torch's CUDA builds on Linux. It is imported at the first use, and `why_not` says why it cannot
serve: then torch does the same on the device, more slowly.
"""

import functools
import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peer.core.sparseloco import DIVERGED, Sent
from protocol import compress as reference
from protocol.identity import Buffer
from protocol.layout import Layout, kept
from protocol.limits import BLOCK_CHUNKS, CHUNK
from protocol.packing import SparseTensor
from protocol.update import apply_update, encode_update_section, to_update_tensor

_WARP_VALUES = 512  # 16 values a thread: more of them spill registers
_CONTINUE = 255


@functools.cache
def why_not() -> str:
    """Say in one line why the kernels do not serve on this machine; nothing when they do. The first call compiles."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        gives_same_bits = self_test(torch.device("cuda"))
    except Exception as error:  # noqa: BLE001  Triton fails in many ways: no C compiler, an old driver, an old card
        return f"Triton does not work here: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return "" if gives_same_bits else "Triton gives other bits than the reference here"


def compress_tensor(
    residual: Tensor, outer: Tensor, local: Tensor, beta: float, k: int, code_bits: int
) -> tuple[SparseTensor, Sent]:  # f32[L] each, residual in place
    """Take the packet's values out of acc = beta * residual + (outer - local); `residual` becomes what is left.

    Returns what is sent, and what was taken, with positions in this tensor. Raises ValueError on NaN or infinity; then
    the residual is worthless.
    """
    from peer.core.kernels import triton_kernels  # noqa: PLC0415  Triton is not everywhere

    for values in (residual, outer, local):
        assert values.dtype == torch.float32 and values.shape == residual.shape and values.is_contiguous()
    assert residual.ndim == 1 and 1 <= k <= CHUNK and code_bits in (1, 2)
    size, device = residual.numel(), residual.device
    chunks = -(-size // CHUNK)
    last_count = kept(size - (chunks - 1) * CHUNK, k)
    columns = torch.empty(chunks, k, dtype=torch.int16, device=device)
    originals = torch.empty(chunks, k, device=device)
    diverged = torch.zeros(1, dtype=torch.int32, device=device)
    scales, ratios = torch.empty(2, chunks, dtype=torch.uint8, device=device)
    codes = torch.empty(chunks, k, dtype=torch.uint8, device=device)
    width = _width(k)
    fed = (residual, outer, local, columns, originals, diverged, size, float(np.float32(beta)), k, last_count)
    kept_values = (residual, columns, originals, scales, ratios, codes, k, last_count, code_bits == 1, width)
    options = triton_kernels.NO_FUSION
    with torch.cuda.device(residual.get_device()):  # Triton launches on the current device
        triton_kernels.select_chunks[(chunks,)](*fed, num_warps=_warps(CHUNK), **options)
        triton_kernels.quantize_chunks[(chunks,)](*kept_values, num_warps=_warps(width), **options)
    if bool(diverged):
        raise ValueError(DIVERGED)
    is_sent = (scales != 0)[:, None].repeat(1, k)
    is_sent[-1, last_count:] = False
    where = (columns + torch.arange(0, chunks * CHUNK, CHUNK, device=device)[:, None])[is_sent]
    arrays = (part.cpu().numpy() for part in (scales, ratios, where, codes[is_sent]))
    return SparseTensor(size, *arrays), Sent(where, originals[is_sent])


def outer_step(outer: Tensor, section: Buffer) -> None:  # outer: f32[L], in place
    """Decode an update's section of one tensor on the device and subtract it.

    The section has passed the checks of SPEC 7; nothing is refused here. The work goes block by block, so that what is
    needed beside the section stays small.
    """
    from peer.core.kernels import triton_kernels  # noqa: PLC0415  Triton is not everywhere

    assert outer.dtype == torch.float32 and outer.ndim == 1 and outer.is_contiguous()
    data = np.frombuffer(section, np.uint8).copy()
    chunks = -(-outer.numel() // CHUNK)
    tables = 3 * chunks + 4 * (-(-chunks // BLOCK_CHUNKS) - 1)
    counts = data[: 2 * chunks].view("<u2").astype(np.int64)
    value_stops = np.concatenate(([0], np.cumsum(counts)))
    gaps_stop = len(data) - int(value_stops[-1])
    block_bytes = data[3 * chunks : tables].copy().view("<u4").astype(np.int64)
    gap_stops = np.concatenate(([0], np.cumsum(block_bytes), [gaps_stop - tables]))
    width = _width(int(counts.max()))

    on_device = torch.from_numpy(data).to(outer.device)
    heads, exponents = on_device[: 2 * chunks].view(torch.int16), on_device[2 * chunks : 3 * chunks]
    gaps, values = on_device[tables:gaps_stop], on_device[gaps_stop:].view(torch.int8)
    for block, first in enumerate(range(0, chunks, BLOCK_CHUNKS)):
        stop = min(first + BLOCK_CHUNKS, chunks)
        part = outer[first * CHUNK : stop * CHUNK]
        start, end = int(value_stops[first]), int(value_stops[stop])
        block_gaps = gaps[int(gap_stops[block]) : int(gap_stops[block + 1])]
        ends = torch.nonzero(block_gaps != _CONTINUE).flatten()
        assert len(ends) == end - start, "the section was not checked"
        firsts = torch.from_numpy((value_stops[first:stop] - start).astype(np.int32)).to(outer.device)
        buffers = (part, heads[first:stop], exponents[first:stop], firsts, ends, block_gaps, values[start:end])
        with torch.cuda.device(outer.get_device()):
            triton_kernels.apply_chunks[(stop - first,)](
                *buffers, part.numel(), width, num_warps=_warps(width), **triton_kernels.NO_FUSION
            )


def self_test(device: torch.device) -> bool:
    """Whether the kernels give the reference's bits here, for values that tell roundings apart, and refuse NaN."""
    rng = np.random.default_rng(1)
    # One chunk of denormals, one near 2^-30, where chunks become absent.
    steps = np.array([1e-3, 1e-40, 2.0**-31, 1.0, 1e-2], np.float32).repeat(CHUNK)[: 4 * CHUNK + 100]
    residual, outer, local = rng.standard_normal((3, len(steps)), np.float32) * steps
    acc = reference.error_feedback(residual, outer, local, 0.95)
    pairs: list[tuple[NDArray[np.generic], NDArray[np.generic]]] = []
    for code_bits in (1, 2):
        theirs, expected = reference.compress(acc, 64, code_bits)
        left, old, trained = (torch.tensor(values, device=device) for values in (residual, outer, local))
        ours, sent = compress_tensor(left, old, trained, 0.95, 64, code_bits)
        pairs += [(getattr(ours, name), getattr(theirs, name)) for name in ("scales", "ratios", "indices", "codes")]
        pairs += [(sent.positions.cpu().numpy(), theirs.indices), (sent.originals.cpu().numpy(), acc[theirs.indices])]
        pairs += [(left.cpu().numpy(), expected)]
    update = to_update_tensor((acc.astype(np.float64) * 2.0**30).astype(np.int64))
    stepped = torch.tensor(outer, device=device)
    outer_step(stepped, encode_update_section(update))
    apply_update(outer, Layout.of([("t", outer.shape)]), [update])
    pairs += [(stepped.cpu().numpy(), outer)]
    return all(ours.tobytes() == theirs.tobytes() for ours, theirs in pairs) and _notices_nan(device)


def _notices_nan(device: torch.device) -> bool:
    """Whether one NaN among many values is refused: compilers may assume that there is none."""
    values = torch.ones(2 * CHUNK, device=device)
    local = values.clone()
    local[CHUNK + 1] = torch.nan
    try:
        compress_tensor(values, torch.ones_like(values), local, 0.95, 64, 2)
    except ValueError:
        return True
    return False


def _width(count: int) -> int:
    """Lanes of a program for so many values: a power of two, and at least a warp."""
    return 1 << max(5, (count - 1).bit_length())


def _warps(width: int) -> int:
    """Warps of a program that works on so many values at once."""
    return max(1, width // _WARP_VALUES)
