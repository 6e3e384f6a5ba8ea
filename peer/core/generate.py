"""Sample text from the model."""

import torch
from torch import Tensor

from peer.core.model import Llama


@torch.inference_mode()
def generate(
    model: Llama, prompt: Tensor, count: int, *, temperature: float, top_k: int, seed: int
) -> Tensor:  # i64[P] -> i64[P + count], on the CPU
    """Continue the prompt by `count` tokens.

    Each token is drawn from the `top_k` likeliest at this temperature (0 takes the likeliest). The model sees at most
    its `max_position_embeddings` last tokens. The prompt has at least one token.
    """
    assert len(prompt) >= 1 and top_k >= 1 and temperature >= 0
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt.cpu()
    model.eval()
    for _ in range(count):
        context = tokens[-model.config.max_position_embeddings :].to(device)
        logits = model(context[None])[0, -1].float().cpu()
        best, ids = logits.topk(min(top_k, len(logits)))
        if temperature == 0:
            chosen = 0
        else:
            chosen = int(torch.multinomial((best / temperature).softmax(dim=0), 1, generator=generator))
        tokens = torch.cat((tokens, ids[chosen].view(1)))
    return tokens
