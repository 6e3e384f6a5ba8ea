import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers

from peer.data.tokenizer import ByteTokenizer, JsonTokenizer

TEXT = "The union is strong — naïve ☃ text.\n\n\tTwo  spaces \x00 and a tab."


def bpe_file(folder: Path, specials: list[str]) -> Path:
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the union is strong, the union is large"] * 5, trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokens.tolist() == list(text.encode("utf-8"))


def test_bytes_decode_documents_and_strange_ids() -> None:
    tokenizer = ByteTokenizer()
    tokens = np.array([72, 105, 256, 0xE2, 0x98, 256, 259, 33])
    assert tokenizer.decode(tokens) == "Hi\n\n�\n\n!"
    assert tokenizer.vocab_size > tokenizer.end_of_document


@given(st.text())
def test_bytes_as_json_are_the_same_tokenizer(text: str) -> None:
    other = FastTokenizer.from_str(ByteTokenizer().to_json())
    ids = other.encode(text).ids if "<|endoftext|>" not in text else ByteTokenizer().encode(text).tolist()
    assert ids == ByteTokenizer().encode(text).tolist()
    assert other.decode(ids) == text


def test_bytes_as_json_end_documents() -> None:
    other = FastTokenizer.from_str(ByteTokenizer().to_json())
    assert other.token_to_id("<|endoftext|>") == ByteTokenizer.end_of_document


def test_json_tokenizer_reads_a_file(tmp_path: Path) -> None:
    path = bpe_file(tmp_path, ["<pad>", "<|endoftext|>"])
    tokenizer = JsonTokenizer(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.end_of_document == 1
    assert int(tokens.max()) < tokenizer.vocab_size <= 300
    both = np.concatenate((tokens, np.array([1], dtype=np.uint32), tokens))
    assert tokenizer.decode(both).count("union") == 2
    assert FastTokenizer.from_str(tokenizer.to_json()).encode(TEXT).ids == tokens.tolist()


def test_json_tokenizer_refuses_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        JsonTokenizer(tmp_path / "absent.json")
    path = bpe_file(tmp_path, ["<pad>"])
    with pytest.raises(ValueError, match="no token that ends a document"):
        JsonTokenizer(path)
    with pytest.raises(ValueError, match="the run asks for"):
        JsonTokenizer(path, sha256="0" * 64)
    for junk in (b"", b"{}", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
            JsonTokenizer(path)
