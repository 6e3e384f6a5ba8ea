"""The one door to compression, checks, merge and outer step: the fastest path here, always the same bits.

C++ serves tensors on the CPU and everything that works on bytes; Triton serves tensors on CUDA; torch and the numpy
reference in `protocol` serve where neither is there. All work goes tensor by tensor, so beyond inputs and outputs no
more memory is taken than one tensor needs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from peer.core.kernels import gpu, native
from peer.core.sparseloco import Sent, compress_tensor, error_feedback
from protocol import arithmetic
from protocol.layout import Layout, TensorSpec, kept_per_chunk
from protocol.packing import check_section, decode_section, encode_section
from protocol.update import check_update_section, decode_update_section, encode_update_section, update_values

_NATIVE = native.load()
_NO_COMPILER = (
    "no C++ compiler was there at installation (install one, such as g++ or clang, and then sparseloco-peer again)"
)


def kernels_in_use(device: torch.device) -> str:
    """What the work for tensors on this device runs on; after a colon why it is not something faster."""
    bytes_path = "numpy" if _NATIVE is None else f"C++ ({_NATIVE.instructions})"
    reasons = [] if _NATIVE is not None else [_NO_COMPILER]
    if device.type == "cpu":
        tensor_path = "torch" if _NATIVE is None else bytes_path
    else:
        missing = gpu.why_not() if device.type == "cuda" else f"there are no kernels for {device.type}"
        tensor_path = "torch" if missing else "Triton"
        reasons += [missing] if missing else []
    path = " and ".join(dict.fromkeys((tensor_path, bytes_path)))
    return f"{path}: {'; '.join(reasons)}" if reasons else path


def compress(
    residual: Tensor,  # f32[N], becomes the new residual in place
    outer: Tensor,  # f32[N]
    local: Tensor,  # f32[N]
    layout: Layout,
    beta: float,
    k: int,
    code_bits: int,
) -> tuple[list[bytes], Sent]:
    """Take what a packet sends out of acc = beta * residual + (outer - local): its sections, and what was taken.

    Raises ValueError on NaN or infinity. Then a part of the residual is already overwritten, so the caller empties it.
    """
    assert residual.shape == outer.shape == local.shape == (layout.size,)
    most = sum(int(kept_per_chunk(tensor.size, k).sum()) for tensor in layout.tensors)
    positions = torch.empty(most, dtype=torch.int64, device=residual.device)
    originals = torch.empty(most, dtype=torch.float32, device=residual.device)
    sections, count = [], 0
    for tensor, start in zip(layout.tensors, layout.offsets[:-1], strict=True):
        span = slice(start, start + tensor.size)
        section, sent = _compress(residual[span], outer[span], local[span], beta, k, code_bits)
        sections.append(section)
        end = count + len(sent.positions)
        torch.add(sent.positions, start, out=positions[count:end])
        originals[count:end] = sent.originals
        count = end
    return sections, Sent(positions[:count], originals[:count])


def _compress(
    residual: Tensor, outer: Tensor, local: Tensor, beta: float, k: int, code_bits: int
) -> tuple[bytes, Sent]:  # f32[L] each; positions in this tensor
    if residual.device.type == "cpu" and _NATIVE is not None:
        section, positions, originals = _NATIVE.compress(
            residual.numpy(), outer.numpy(), local.numpy(), beta, k, code_bits, threads=torch.get_num_threads()
        )
        return section, Sent(torch.from_numpy(positions), torch.from_numpy(originals))
    if residual.device.type == "cuda" and not gpu.why_not():
        sparse, sent = gpu.compress_tensor(residual, outer, local, beta, k, code_bits)
    else:
        error_feedback(residual, outer, local, beta)
        sparse, sent = compress_tensor(residual, k, code_bits)
    encode = encode_section if _NATIVE is None else _NATIVE.encode
    return encode(sparse, k, code_bits), sent


def check_sections(sections: Sequence[bytes], layout: Layout, k: int, code_bits: int) -> int:
    """Check the contents of a packet's sections, and count the values in them. Raises ProtocolError."""
    check = check_section if _NATIVE is None else _NATIVE.check_section
    return sum(check(*pair, k, code_bits) for pair in _with_sizes(sections, layout))


def check_update_sections(sections: Sequence[bytes], layout: Layout) -> int:
    """Check the contents of an update's sections, and count the values in them. Raises ProtocolError."""
    check = check_update_section if _NATIVE is None else _NATIVE.check_update_section
    return sum(check(*pair) for pair in _with_sizes(sections, layout))


def _with_sizes(sections: Sequence[bytes], layout: Layout) -> list[tuple[bytes, int]]:
    return [(section, tensor.size) for section, tensor in zip(sections, layout.tensors, strict=True)]


def merge(
    packets: Sequence[Sequence[bytes]],
    weights: Sequence[int],
    clips: Sequence[int],
    layout: Layout,
    k: int,
    code_bits: int,
    rule: str,
    alpha_q16: int,
) -> list[bytes]:
    """Merge the sections of the accepted packets, which were checked, into those of the round's update."""
    assert packets, "a round without packets is a null round, not a merge"
    total_weight, threads, update = sum(weights), torch.get_num_threads(), []
    for number, tensor in enumerate(layout.tensors):
        parts = [packet[number] for packet in packets]
        if _NATIVE is None:
            update.append(_merge(parts, weights, clips, tensor, k, code_bits, rule, alpha_q16))
        else:
            rules = (tensor.size, k, code_bits, rule, total_weight, alpha_q16)
            update.append(_NATIVE.merge(parts, weights, clips, *rules, threads))
    return update


def _merge(
    sections: Sequence[bytes],
    weights: Sequence[int],
    clips: Sequence[int],
    tensor: TensorSpec,
    k: int,
    code_bits: int,
    rule: str,
    alpha_q16: int,
) -> bytes:
    contributions = [
        arithmetic.Contribution([decode_section(section, tensor.size, k, code_bits)], weight, clip)
        for section, weight, clip in zip(sections, weights, clips, strict=True)
    ]
    (merged,) = arithmetic.merge(contributions, Layout((tensor,)), rule, alpha_q16)
    return encode_update_section(merged)


def outer_step(outer: Tensor, layout: Layout, sections: Sequence[bytes]) -> None:  # outer: f32[N], in place
    """Subtract an update, whose sections were checked: one float32 subtraction at each position present."""
    assert outer.dtype == torch.float32 and outer.shape == (layout.size,)
    for section, tensor, start in zip(sections, layout.tensors, layout.offsets[:-1], strict=True):
        part = outer[start : start + tensor.size]
        if part.device.type == "cpu" and _NATIVE is not None:
            _NATIVE.outer_step(part.numpy(), section, threads=torch.get_num_threads())
        elif part.device.type == "cuda" and not gpu.why_not():
            gpu.outer_step(part, section)
        else:
            update = decode_update_section(section, tensor.size)
            positions = torch.from_numpy(update.indices).to(part.device)
            part[positions] = part[positions] - torch.from_numpy(update_values(update)).to(part.device)
