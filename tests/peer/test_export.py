import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from peer.core.flat import Flat
from peer.core.inner import InnerOptimizer
from peer.core.model import Llama, layout_of
from peer.core.replica import initial_state
from peer.data.tokenizer import ByteTokenizer
from peer.export import export_folder
from protocol.run import InnerConfig, ModelConfig

TEXT = "The union is strong — naïve ☃ text.\n\n\tTwo  spaces."


def model_config(tie: bool, shared_heads: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=shared_heads,
        tie_word_embeddings=tie,
        rope_theta=5000.0,
        rms_norm_eps=1e-6,
    )


def trained(config: ModelConfig) -> tuple[Llama, NDArray[np.float32]]:  # the model and its f32[N]
    """A model after some steps on text, so that no weight is special and norms are not one."""
    model = Llama(config)
    flat = Flat(model, layout_of(config), torch.device("cpu"))
    flat.values.copy_(torch.from_numpy(initial_state(config)))
    inner = InnerOptimizer(model, flat, InnerConfig(warmup_steps=0, learning_rate=0.02), 20, torch.float32)
    text = torch.tensor(list(("we the people " * 20).encode()))
    for step in range(20):
        inner.step(text[step : step + 160].view(4, 40), step, 0)
    return model.eval(), flat.values.numpy()


def test_folder_holds_the_state_and_the_configuration(tmp_path: Path) -> None:
    config = model_config(tie=True, shared_heads=2)
    state = initial_state(config)
    for _ in range(2):  # the second time it replaces the first
        export_folder(tmp_path / "out", config, state, ByteTokenizer())
    weights = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    layout = layout_of(config)
    assert sorted(weights) == [tensor.name for tensor in layout.tensors]
    assert np.array_equal(np.concatenate([weights[t.name].reshape(-1) for t in layout.tensors]), state)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["num_key_value_heads"] == 2
    tokenizer = FastTokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode(TEXT).ids == list(TEXT.encode())


@pytest.mark.hf
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shared_heads", [4, 2, 1])
def test_hugging_face_computes_the_same_logits(tmp_path: Path, tie: bool, shared_heads: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = model_config(tie, shared_heads)
    model, state = trained(config)
    export_folder(tmp_path, config, state, ByteTokenizer())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, 257, (3, 100)))
    with torch.no_grad():
        ours, other = model(tokens), theirs(tokens).logits
    assert float(ours.abs().max()) > 1.0
    assert float((ours - other).abs().max()) == 0.0


@pytest.mark.hf
def test_hugging_face_reads_the_tokenizer_and_generates(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = model_config(tie=True, shared_heads=2)
    export_folder(tmp_path, config, initial_state(config), ByteTokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
    assert tokenizer.decode(list(TEXT.encode())) == TEXT
    assert tokenizer.eos_token_id == ByteTokenizer.end_of_document
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    out = model.generate(**tokenizer("We", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 6)
