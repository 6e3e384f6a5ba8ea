"""Sample text from the model."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peer.core.model import Llama, layout_of
from protocol.run import ModelConfig


def build_model(config: ModelConfig, state: NDArray[np.float32], device: torch.device) -> Llama:  # state: f32[N]
    """The model with these parameters. On the CPU it shares their memory."""
    layout = layout_of(config)
    with torch.device("meta"):
        model = Llama(config)
    flat = torch.from_numpy(state).to(device)
    starts = zip(layout.tensors, layout.offsets, strict=False)
    parameters = {tensor.name: flat[start : start + tensor.size].view(tensor.shape) for tensor, start in starts}
    model.load_state_dict(parameters, assign=True)
    return model


@torch.inference_mode()
def sample(
    model: Llama, prompt: Tensor, count: int, *, temperature: float, top_k: int, seed: int
) -> Iterator[int]:  # prompt: i64[P]
    """Continue the prompt by `count` tokens, one after the other.

    Each token is drawn from the `top_k` likeliest at this temperature (0 takes the likeliest). The model sees at most
    its `max_position_embeddings` last tokens. The prompt has at least one token.
    """
    assert len(prompt) >= 1 and top_k >= 1 and temperature >= 0
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    context = prompt.cpu()
    model.eval()
    for _ in range(count):
        context = context[-model.config.max_position_embeddings :]
        logits = model(context[None].to(device))[0, -1].float().cpu()
        best, ids = logits.topk(min(top_k, len(logits)))
        if temperature == 0:
            chosen = 0
        else:
            chosen = int(torch.multinomial((best / temperature).softmax(dim=0), 1, generator=generator))
        context = torch.cat((context, ids[chosen].view(1)))
        yield int(ids[chosen])


def generate(
    model: Llama, prompt: Tensor, count: int, *, temperature: float, top_k: int, seed: int
) -> Tensor:  # i64[P] -> i64[P + count], on the CPU
    """The prompt and what `sample` makes of it."""
    tokens = list(sample(model, prompt, count, temperature=temperature, top_k=top_k, seed=seed))
    return torch.cat((prompt.cpu(), torch.tensor(tokens, dtype=torch.int64)))
