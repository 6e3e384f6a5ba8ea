import dataclasses
import math

import numpy as np
import pytest
import torch

from peer.core.flat import Flat, flatten
from peer.core.inner import autocast
from peer.core.model import Llama, initial_parameters, layout_of
from peer.core.replica import initial_state
from protocol.layout import state_root
from protocol.run import ModelConfig

SMALL = ModelConfig(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


def ready(config: ModelConfig, scale: float = 1.0) -> Llama:
    model, layout = Llama(config), layout_of(config)
    flat = Flat(model, layout, torch.device("cpu"))
    flat.values.copy_(scale * flatten(initial_parameters(config), layout))
    return model


def tokens_of(config: ModelConfig, batch: int, length: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, config.vocab_size, (batch, length)))


def test_names_and_shapes_are_hugging_faces() -> None:
    shapes = {tensor.name: tensor.shape for tensor in layout_of(SMALL).tensors}
    assert shapes["model.embed_tokens.weight"] == (260, 48)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (48, 48)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (24, 48)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (48, 80)
    assert shapes["model.norm.weight"] == (48,)
    assert len(shapes) == 2 * 9 + 2
    untied = layout_of(dataclasses.replace(SMALL, tie_word_embeddings=False))
    assert "lm_head.weight" in [tensor.name for tensor in untied.tensors]


def test_initial_state_is_pinned() -> None:
    # Two versions or machines that start from other bits cannot train together, so this root may never change.
    assert state_root(initial_state(ModelConfig())).hex()[:16] == "eabbf8abb7d4b057"


def test_initial_parameters_have_the_wanted_spread() -> None:
    config = dataclasses.replace(SMALL, hidden_size=128, intermediate_size=320, initializer_range=0.05)
    parameters = initial_parameters(config)
    for name, value in parameters.items():
        if value.ndim == 1:
            assert bool((value == 1).all())
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.05 / math.sqrt(4) if writes else 0.05
        assert abs(float(value.std()) / std - 1) < 0.03, name
        assert abs(float(value.mean())) < 4 * std / math.sqrt(value.numel()), name
    flat = flatten(parameters, layout_of(config))
    assert not torch.equal(flat, torch.from_numpy(initial_state(dataclasses.replace(config, init_seed=2))))


def test_a_new_model_knows_nothing() -> None:
    model, tokens = ready(SMALL), tokens_of(SMALL, 4, 65)
    assert abs(float(model.loss(tokens).detach()) - math.log(SMALL.vocab_size)) < 0.1


def test_no_position_sees_the_future() -> None:
    model, tokens = ready(SMALL, scale=5.0), tokens_of(SMALL, 2, 40)
    changed = tokens.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % SMALL.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=1e-5, atol=1e-5)
    assert float((before[:, 25:] - after[:, 25:]).abs().min(dim=-1).values.max()) > 0


def test_order_matters() -> None:
    model, tokens = ready(SMALL, scale=5.0), tokens_of(SMALL, 1, 20)
    swapped = tokens.clone()
    swapped[0, [3, 4]] = tokens[0, [4, 3]]
    with torch.no_grad():
        difference = (model(tokens)[0, -1] - model(swapped)[0, -1]).abs().max()
    assert float(difference) > 1e-3


def test_loss_is_the_mean_cross_entropy() -> None:
    model, tokens = ready(SMALL, scale=5.0), tokens_of(SMALL, 3, 11)
    with torch.no_grad():
        chances = model(tokens[:, :-1]).double().softmax(dim=-1)
        picked = chances.gather(2, tokens[:, 1:, None])
        assert float(model.loss(tokens)) == pytest.approx(-float(picked.log().mean()), rel=1e-5)


def test_bf16_stays_close_and_keeps_float32_parameters() -> None:
    model, tokens = ready(SMALL, scale=3.0), tokens_of(SMALL, 4, 33)
    exact = float(model.loss(tokens).detach())
    with autocast(torch.device("cpu"), torch.bfloat16):
        loss = model.loss(tokens)
    torch.autograd.backward(loss)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) != exact
    assert float(loss.detach()) == pytest.approx(exact, rel=5e-3)
    assert all(p.dtype == torch.float32 and p.grad is not None for p in model.parameters())
