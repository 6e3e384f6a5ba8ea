from collections.abc import Callable

import pytest
import torch

from peer.core.generate import generate
from peer.core.replica import Replica
from protocol.run import ModelConfig, RunConfig

MODEL = ModelConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.5,
)


@pytest.fixture
def replica(make_run: Callable[..., RunConfig]) -> Replica:
    return Replica(make_run(MODEL), torch.device("cpu"), torch.float32)


def test_a_seed_repeats_and_another_differs(replica: Replica) -> None:
    prompt = torch.tensor([72, 105])

    def draw(seed: int) -> list[int]:
        return generate(replica.model, prompt, 50, temperature=1.0, top_k=200, seed=seed).tolist()

    assert draw(1) == draw(1) != draw(2)
    assert len(draw(1)) == 52 and draw(1)[:2] == [72, 105]
    assert all(0 <= token < MODEL.vocab_size for token in draw(1))


def test_zero_temperature_takes_the_likeliest(replica: Replica) -> None:
    prompt = torch.tensor([1, 2, 3])
    tokens = generate(replica.model, prompt, 5, temperature=0.0, top_k=50, seed=0)
    for end in range(3, 8):
        with torch.no_grad():
            assert int(replica.model(tokens[None, :end])[0, -1].argmax()) == int(tokens[end])
    assert torch.equal(tokens, generate(replica.model, prompt, 5, temperature=1.0, top_k=1, seed=9))
