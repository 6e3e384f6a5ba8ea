"""The outer step on the device, bit-equal to `protocol.update.apply_update` (SPEC 7)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.layout import Layout
from protocol.update import UpdateTensor, update_values


def outer_step(outer: Tensor, layout: Layout, tensors: Sequence[UpdateTensor]) -> None:  # f32[N], in place
    """Subtract the update: one float32 subtraction at each position present, no other position touched."""
    assert outer.dtype == torch.float32 and outer.shape == (layout.size,)
    for update, tensor, offset in zip(tensors, layout.tensors, layout.offsets[:-1], strict=True):
        assert update.size == tensor.size
        part = outer[offset : offset + tensor.size]
        positions = torch.from_numpy(update.indices).to(outer.device)
        part[positions] = part[positions] - torch.from_numpy(update_values(update)).to(outer.device)
