"""The trained model as a Hugging Face folder, which `AutoModelForCausalLM` and `AutoTokenizer` open, and back.

Every file takes the place of the one before in one step, and only weights and card differ between two rounds of a run:
so whoever loads the folder while a newer round is written gets a whole model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as FastTokenizer

from peer.checkpoint import Checkpoint
from peer.core.model import layout_of
from peer.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from peer.errors import UserCode, UserError, os_errors
from peer.model_card import model_card
from peer.store import atomic_write, replacing, safetensors_header
from protocol.run import ModelConfig, RunConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
CARD = "README.md"


@dataclass(frozen=True)
class Model:
    """A model and its tokenizer, ready to be built. `state` is f32[N] in the order of the layout."""

    config: ModelConfig
    state: NDArray[np.float32]
    tokenizer: Tokenizer


def export_checkpoint(checkpoint: Checkpoint, folder: Path, tokenizer: Tokenizer, licence: str) -> None:
    """Write a checkpoint with its model card. Raises UserError when the folder holds something else."""
    _check_place(folder, checkpoint.run)
    metadata = {
        "run": checkpoint.run.name,
        "run_id": checkpoint.run.run_id.hex(),
        "round": str(checkpoint.round),
    }
    export_folder(folder, checkpoint.run.model, checkpoint.state, tokenizer, metadata)
    atomic_write(folder / CARD, model_card(checkpoint, licence).encode("utf-8"))


def _check_place(folder: Path, run: RunConfig) -> None:
    """Nothing but an export of the same run is ever written over."""
    with os_errors(folder):
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    written = _metadata(folder / WEIGHTS).get("run_id") if WEIGHTS in names else None
    # Hidden files are other tools' business, such as the `.git` of a model hub.
    if written != run.run_id.hex() and any(not name.startswith(".") for name in names):
        raise UserError(
            UserCode.BAD_ARGUMENT, f"{folder} holds something else than an export of this run", "name an empty folder"
        )


def exported_round(folder: Path) -> int:
    """The round of an earlier export, -1 where there is none."""
    written = _metadata(folder / WEIGHTS).get("round", "") if (folder / WEIGHTS).is_file() else ""
    return int(written) if written.isascii() and written.isdigit() else -1


def _metadata(weights: Path) -> dict[str, str]:
    try:
        with os_errors(weights), safe_open(weights, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def tokenizer_of(run: RunConfig, path: Path | None) -> Tokenizer:
    """The run's tokenizer. One that is no part of this program is read from `path`. Raises UserError."""
    if run.data.tokenizer == "bytes":
        return ByteTokenizer()
    if path is None:
        raise UserError(
            UserCode.BAD_ARGUMENT,
            f"the run uses the tokenizer {run.data.tokenizer}, which is not stored with its parameters",
            "name its tokenizer.json with --tokenizer",
        )
    try:
        return JsonTokenizer(path, sha256=run.data.tokenizer.removeprefix("sha256:"))
    except ValueError as error:
        raise UserError(UserCode.NO_CORPUS, str(error), "name the tokenizer.json of this run") from error


def export_folder(
    folder: Path,
    config: ModelConfig,
    state: NDArray[np.float32],  # f32[N]
    tokenizer: Tokenizer,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights, configuration and tokenizer into `folder`, replacing what an earlier export left there.

    `metadata` goes into the head of the weights. Raises UserError when the disk refuses.
    """
    layout = layout_of(config)
    assert state.dtype == np.float32 and state.shape == (layout.size,)
    end = tokenizer.end_of_document
    tokenizer_json = tokenizer.to_json()
    end_name = FastTokenizer.from_str(tokenizer_json).id_to_token(end)
    with replacing(folder / WEIGHTS) as file:
        # The state is already what a safetensors file holds, so it is written as it is and never copied.
        tensors = [(tensor.name, "F32", tensor.shape, 4 * tensor.size) for tensor in layout.tensors]
        file.write(safetensors_header(tensors, {**(metadata or {}), "format": "pt"}))
        file.write(np.ascontiguousarray(state, dtype="<f4").data)
    _write_json(folder / CONFIG, _model_config(config, end))
    _write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "do_sample": True})
    atomic_write(folder / TOKENIZER, tokenizer_json.encode("utf-8"))
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


def open_export(folder: Path) -> Model:
    """Read what `export_folder` wrote. Raises UserError when the folder is no such export, or a damaged one."""
    path = folder / CONFIG
    with os_errors(path):
        data = path.read_bytes()
    names = {item.name for item in fields(ModelConfig)}
    try:
        written: Any = json.loads(data)
        if not isinstance(written, dict) or written.get("model_type") != "llama":
            raise ValueError("its model is not of the kind that this program exports")
        config = ModelConfig(**{name: value for name, value in written.items() if name in names})
        tokenizer = JsonTokenizer(folder / TOKENIZER)
        return Model(config, _read_weights(folder / WEIGHTS, config), tokenizer)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            UserCode.BAD_FILE, f"{folder} cannot be read as an exported model: {error}", "export it again"
        ) from error


def _read_weights(path: Path, config: ModelConfig) -> NDArray[np.float32]:  # -> f32[N]
    layout = layout_of(config)
    state = np.empty(layout.size, dtype=np.float32)
    with os_errors(path):
        path.stat()
        with safe_open(path, framework="numpy") as file:
            if sorted(file.keys()) != [tensor.name for tensor in layout.tensors]:
                raise ValueError("its tensors are not those of its config.json")
            for tensor, start in zip(layout.tensors, layout.offsets, strict=False):
                values = file.get_tensor(tensor.name)
                if values.shape != tensor.shape or values.dtype != np.float32:
                    raise ValueError(f"the tensor {tensor.name} has another shape or type than its config.json says")
                state[start : start + tensor.size] = values.reshape(-1)
    return state


def _write_json(path: Path, document: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(document, indent=2) + "\n").encode("utf-8"))
