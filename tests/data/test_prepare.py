import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from peer.data.prepare import TOKENIZER, TRAIN, VALIDATION, Dataset, prepare, read_windows, write_corpus
from peer.data.shards import open_shard, write_shard
from peer.data.tokenizer import ByteTokenizer, JsonTokenizer
from protocol.run import DataConfig

ALICE = b"a" * 32
CONFIG = DataConfig(sequence_length=64, validation_fraction=0.05)


def small_corpus(folder: Path) -> list[str]:
    documents = [f"Speech number {i}: " + "the union is strong. " * (10 + i) for i in range(20)]
    write_corpus(documents, len(documents), ByteTokenizer(), folder, 0.1)
    return documents


def test_embedded_corpus_is_prepared_once(tmp_path: Path) -> None:
    first = prepare(CONFIG, tmp_path, {})
    stamp = first.train.path.stat().st_mtime_ns
    second = prepare(CONFIG, tmp_path, {})
    assert second.train.path.stat().st_mtime_ns == stamp
    assert first.sha256 == second.sha256
    assert len(first.train.tokens) + len(first.validation.tokens) == 10_761_622 - 2 * 232 + 233
    assert first.tokenizer.decode(first.train.tokens[:15]) == "Fellow-Citizens"


def test_embedded_corpus_heals_and_is_pinned(tmp_path: Path) -> None:
    dataset = prepare(CONFIG, tmp_path, {})
    path, expected = dataset.train.path, dataset.sha256
    del dataset
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert prepare(CONFIG, tmp_path, {}).sha256 == expected
    pinned = DataConfig(sequence_length=64, validation_fraction=0.05, corpus_sha256=expected)
    assert prepare(pinned, tmp_path, {}).sha256 == expected
    with pytest.raises(ValueError, match="the run wants"):
        prepare(DataConfig(sequence_length=64, validation_fraction=0.1, corpus_sha256=expected), tmp_path, {})


def test_several_peers_prepare_at_once(tmp_path: Path) -> None:
    datasets: list[Dataset] = []
    threads = [threading.Thread(target=lambda: datasets.append(prepare(CONFIG, tmp_path, {}))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(datasets) == 3 and len({dataset.sha256 for dataset in datasets}) == 1


def test_own_corpus_keeps_documents_apart(tmp_path: Path) -> None:
    documents = small_corpus(tmp_path)
    dataset = prepare(DataConfig(corpus="speeches", sequence_length=64), tmp_path / "cache", {"speeches": tmp_path})
    decoded = dataset.tokenizer.decode(np.asarray(dataset.train.tokens)).split("\n\n")
    assert decoded == [*documents[:18], ""]
    assert not (tmp_path / "cache").exists()


def test_batches_are_the_windows_of_the_sampler(tmp_path: Path) -> None:
    small_corpus(tmp_path)
    dataset = prepare(DataConfig(corpus="speeches", sequence_length=16), tmp_path, {"speeches": tmp_path})
    batches = list(dataset.training_batches(2, ALICE, steps=3, batch_size=4))
    again = list(dataset.training_batches(2, ALICE, steps=3, batch_size=4))
    assert [batch.shape for batch in batches] == [(4, 17)] * 3
    assert all(batch.dtype == np.int64 for batch in batches)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    stream = dataset.train.tokens.tobytes()
    assert all(row.astype("<u2").tobytes() in stream for batch in batches for row in batch)


def test_validation_batches_cover_the_held_out_stream(tmp_path: Path) -> None:
    small_corpus(tmp_path)
    dataset = prepare(DataConfig(corpus="speeches", sequence_length=16), tmp_path, {"speeches": tmp_path})
    batches = list(dataset.validation_batches(10**9, 8))
    predicted = np.concatenate([batch[:, 1:].reshape(-1) for batch in batches])
    assert np.array_equal(predicted, dataset.validation.tokens[1 : len(predicted) + 1])
    assert len(dataset.validation.tokens) - 1 - len(predicted) < 16
    assert sum(len(batch) for batch in dataset.validation_batches(5, 2)) == 5


def test_a_token_outside_the_vocabulary_never_reaches_the_model(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_shard(path, [np.arange(100)], 260)
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xff\xff"
    path.write_bytes(data)
    shard = open_shard(path)
    assert read_windows(shard, np.array([0]), 10).shape == (1, 11)
    with pytest.raises(ValueError, match="outside its vocabulary"):
        read_windows(shard, np.array([0, 9 - 1, 0]), 11)


def test_vocabulary_is_checked_against_the_model(tmp_path: Path) -> None:
    small_corpus(tmp_path)
    dataset = prepare(DataConfig(corpus="speeches", sequence_length=16), tmp_path, {"speeches": tmp_path})
    dataset.check_vocabulary(260)
    with pytest.raises(ValueError, match="vocab_size >= 260"):
        dataset.check_vocabulary(259)


def test_tokenizer_of_the_run_is_checked(tmp_path: Path) -> None:
    small_corpus(tmp_path)
    (tmp_path / TOKENIZER).write_text(ByteTokenizer().to_json())
    digest = hashlib.sha256((tmp_path / TOKENIZER).read_bytes()).hexdigest()
    config = DataConfig(corpus="speeches", tokenizer=f"sha256:{digest}", sequence_length=16)
    assert isinstance(prepare(config, tmp_path, {"speeches": tmp_path}).tokenizer, JsonTokenizer)
    with pytest.raises(ValueError, match="data_paths"):
        prepare(config, tmp_path, {})
    (tmp_path / TOKENIZER).write_text(ByteTokenizer().to_json() + " ")
    with pytest.raises(ValueError, match="the run asks for"):
        prepare(config, tmp_path, {"speeches": tmp_path})


def test_missing_shards_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=TRAIN):
        prepare(DataConfig(corpus="speeches"), tmp_path, {"speeches": tmp_path})
    small_corpus(tmp_path)
    (tmp_path / VALIDATION).unlink()
    with pytest.raises(ValueError, match=VALIDATION):
        prepare(DataConfig(corpus="speeches"), tmp_path, {"speeches": tmp_path})
    with pytest.raises(ValueError, match="no embedded corpus"):
        prepare(DataConfig(corpus="speeches"), tmp_path, {})
