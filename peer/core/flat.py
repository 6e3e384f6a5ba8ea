"""One contiguous buffer for all parameters and one for all gradients, in the order of the layout.

The model's parameters and their gradients are views of these buffers. So the pseudo-gradient, error feedback and the
outer step are single vector operations, and the state root hashes one array.
"""

import torch
from torch import Tensor, nn

from protocol.layout import Layout


class Flat:
    """A model whose parameters live in `values` and whose gradients live in `gradients`."""

    def __init__(self, model: nn.Module, layout: Layout, device: torch.device) -> None:
        """Replace the model's parameters, which may be on the meta device, by views of new zeroed buffers."""
        self.layout = layout
        self.values = torch.zeros(layout.size, device=device)  # f32[N]
        self.gradients = torch.zeros(layout.size, device=device)  # f32[N]
        names = [tensor.name for tensor in layout.tensors]
        assert Layout.of((name, parameter.shape) for name, parameter in model.named_parameters()) == layout
        self.parameters: dict[str, nn.Parameter] = {}
        for name, value, gradient in zip(names, self.views(self.values), self.views(self.gradients), strict=True):
            parameter = nn.Parameter(value)
            parameter.grad = gradient
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameter)
            self.parameters[name] = parameter

    def views(self, flat: Tensor) -> list[Tensor]:  # f32[N] -> one view per tensor, in its shape
        """Cut a flat buffer into the layout's tensors without copying."""
        starts = zip(self.layout.tensors, self.layout.offsets[:-1], strict=True)
        return [flat[start : start + tensor.size].view(tensor.shape) for tensor, start in starts]


def flatten(parameters: dict[str, Tensor], layout: Layout) -> Tensor:  # -> f32[N]
    """Copy named tensors into one flat buffer in the order of the layout."""
    assert set(parameters) == {tensor.name for tensor in layout.tensors}
    return torch.cat([parameters[tensor.name].flatten() for tensor in layout.tensors])
