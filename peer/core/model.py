"""The model: a Llama-style decoder in one file, with the parameter names of Hugging Face's LlamaForCausalLM.

RMSNorm before each part, rotary positions in the rotate-half convention, grouped-query attention, SwiGLU. With tied
embeddings the output matrix is the embedding, and there is one parameter for both.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from protocol.layout import Layout
from protocol.run import ModelConfig


class Linear(nn.Module):
    """x W^T without a bias. Unlike torch's, it draws no weights: the run says what they are."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        """Multiply, in bf16 under autocast."""
        return functional.linear(x, self.weight)


class Embedding(nn.Module):
    """One row per token."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, tokens: Tensor) -> Tensor:  # i64[B, T] -> f32[B, T, width]
        """Look the rows up."""
        return functional.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        """Normalize in float32 and return the type of x, so that the residual stream keeps its precision."""
        return functional.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal attention; `num_key_value_heads` below `num_attention_heads` shares keys and values between heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.shared_heads = config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        self.q_proj = Linear(config.hidden_size, self.heads * self.width)
        self.k_proj = Linear(config.hidden_size, self.shared_heads * self.width)
        self.v_proj = Linear(config.hidden_size, self.shared_heads * self.width)
        self.o_proj = Linear(self.heads * self.width, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, T, D], f32[T, W] twice -> [B, T, D]
        """Attend to the positions up to one's own."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.shared_heads, self.width).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.shared_heads, self.width).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        shared = self.shared_heads != self.heads
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        """Mix the features of each position."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer: attention, then MLP, each normalized before and added to the stream after."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, T, D], f32[T, W] twice -> [B, T, D]
        """Add what the layer has to say to the stream."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        width = config.hidden_size // config.num_attention_heads
        # On the CPU, so that every device turns by the same angles; no parameter, so it is never saved or trained.
        even = torch.arange(0, width, 2, dtype=torch.int64, device="cpu").float()
        self.frequencies = 1.0 / config.rope_theta ** (even / width)  # f32[W / 2]

    def forward(self, tokens: Tensor) -> Tensor:  # i64[B, T] -> [B, T, D]
        """The normalized stream after the last layer."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).float()
        angles = torch.outer(positions, self.frequencies.to(tokens.device)).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """The language model. Its parameters hold nothing yet: `initial_parameters` has the values of a new run."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:  # i64[B, T] -> f32[B, T, V] (bf16 under autocast)
        """The logits of the token after each position."""
        tied = self.config.tie_word_embeddings
        return functional.linear(self.model(tokens), self.model.embed_tokens.weight if tied else self.lm_head.weight)

    def loss(self, tokens: Tensor) -> Tensor:  # i64[B, T + 1] -> f32[]
        """Mean cross-entropy in nats a token of predicting each token from those before it."""
        logits = self(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, H, T, W], f32[T, W] twice -> [B, H, T, W]
    """Turn each pair (x[i], x[i + W/2]) by its position's angle (Su et al., arXiv 2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def layout_of(config: ModelConfig) -> Layout:
    """The names and shapes of the model's parameters, without allocating them."""
    with torch.device("meta"):
        model = Llama(config)
    return Layout.of((name, parameter.shape) for name, parameter in model.named_parameters())


def initial_parameters(config: ModelConfig) -> dict[str, Tensor]:
    """The parameters that a run starts from, f32 on the CPU, the same bits on every machine.

    Norms are one. Matrices are near-normal with standard deviation `initializer_range`, divided by sqrt(2 * layers)
    where a layer writes into the stream (Radford et al., 2019), so that depth does not swell it. Each value is the sum
    of four uniform 16-bit integers: exact integers and one float32 product, where a library's normal numbers
    differ in the last bit from one processor to the next.
    """
    parameters = {}
    for tensor in layout_of(config).tensors:
        if len(tensor.shape) == 1:
            parameters[tensor.name] = torch.ones(tensor.shape)
            continue
        std = config.initializer_range
        if tensor.name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_hidden_layers)
        seed = hashlib.sha256(f"{config.init_seed} {tensor.name}".encode("ascii")).digest()
        words = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(tensor.size).astype("<u8")
        sums = words.view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64) - 2 * 65535
        unit = np.float32(std / math.sqrt((65536**2 - 1) / 3))  # four uniforms have the variance 4 * (n^2 - 1) / 12
        parameters[tensor.name] = torch.from_numpy(sums.astype(np.float32) * unit).view(tensor.shape)
    return parameters
