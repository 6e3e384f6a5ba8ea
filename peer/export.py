"""Write the trained model as a Hugging Face folder, which `AutoModelForCausalLM` and `AutoTokenizer` open."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from peer.core.model import layout_of
from peer.data.tokenizer import Tokenizer
from peer.store import atomic_write
from protocol.run import ModelConfig


def export_folder(
    folder: Path, config: ModelConfig, state: NDArray[np.float32], tokenizer: Tokenizer
) -> None:  # state: f32[N]
    """Write weights, configuration and tokenizer into `folder`, replacing what an earlier export left there.

    Raises UserError when the disk refuses.
    """
    layout = layout_of(config)
    assert state.dtype == np.float32 and state.shape == (layout.size,)
    weights = {
        tensor.name: state[start : start + tensor.size].reshape(tensor.shape)
        for tensor, start in zip(layout.tensors, layout.offsets[:-1], strict=True)
    }
    end = tokenizer.end_of_document
    tokenizer_json = tokenizer.to_json()
    end_name = FastTokenizer.from_str(tokenizer_json).id_to_token(end)
    atomic_write(folder / "model.safetensors", safetensors.numpy.save(weights, metadata={"format": "pt"}))
    _write_json(folder / "config.json", _model_config(config, end))
    _write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "do_sample": True})
    atomic_write(folder / "tokenizer.json", tokenizer_json.encode("utf-8"))
    names = {"bos_token": end_name, "eos_token": end_name}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            **names,
        },
    )
    _write_json(folder / "special_tokens_map.json", names)


def _model_config(config: ModelConfig, end: int) -> dict[str, Any]:
    """The model in LlamaConfig's words. A document starts where another ended, so one token marks both."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        # Old and new readers look for the base of the rotary frequencies in different places.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(document, indent=2) + "\n").encode("utf-8"))
