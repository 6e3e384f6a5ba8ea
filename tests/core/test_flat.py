import math

import pytest
import torch

from peer.core.flat import Flat, flatten
from peer.core.model import Llama, initial_parameters, layout_of
from protocol.run import ModelConfig

CONFIG = ModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_key_value_heads=2)


def filled() -> tuple[Llama, Flat]:
    with torch.device("meta"):
        model = Llama(CONFIG)
    flat = Flat(model, layout_of(CONFIG), torch.device("cpu"))
    flat.values.copy_(flatten(initial_parameters(CONFIG), flat.layout))
    return model, flat


def test_parameters_and_gradients_live_in_the_buffers() -> None:
    model, flat = filled()
    for spec, start in zip(flat.layout.tensors, flat.layout.offsets[:-1], strict=True):
        parameter = model.get_parameter(spec.name)
        assert parameter.data_ptr() == flat.values[start:].data_ptr()
        assert parameter.grad is not None and parameter.grad.data_ptr() == flat.gradients[start:].data_ptr()
        assert tuple(parameter.shape) == spec.shape
    assert sum(parameter.numel() for parameter in model.parameters()) == flat.layout.size


def test_backward_fills_the_buffer_and_adds_to_it() -> None:
    model, flat = filled()
    tokens = torch.arange(40).view(2, 20)
    expected = torch.autograd.grad(model.loss(tokens), list(flat.parameters.values()))
    torch.autograd.backward(model.loss(tokens))
    assert torch.equal(flat.gradients, torch.cat([gradient.flatten() for gradient in expected]))
    once = flat.gradients.clone()
    torch.autograd.backward(model.loss(tokens))
    assert torch.equal(flat.gradients, once * 2)


def test_writing_the_buffer_moves_the_model() -> None:
    model, flat = filled()
    flat.values.zero_()
    assert float(model.loss(torch.arange(10).view(1, 10)).detach()) == pytest.approx(math.log(260))
