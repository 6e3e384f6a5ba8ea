"""Make the run's data ready on this machine: `prepare` returns the `Dataset` that training reads from."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peer.data.corpus import EMBEDDED, embedded_documents, held_out
from peer.data.sampler import validation_windows, window_count, windows_for
from peer.data.shards import Shard, open_shard, write_shard
from peer.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from protocol.run import DataConfig

TRAIN = "train.tokens"
VALIDATION = "validation.tokens"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Dataset:
    """Training and validation tokens of a run."""

    train: Shard
    validation: Shard
    tokenizer: Tokenizer
    sequence_length: int
    seed: int

    @property
    def sha256(self) -> str:
        """What DataConfig.corpus_sha256 pins: SHA-256 over both token hashes, training first, 64 hex digits."""
        return hashlib.sha256(bytes.fromhex(self.train.sha256 + self.validation.sha256)).hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError when the model's vocabulary cannot hold this data's tokens."""
        needed = max(self.train.vocab_size, self.validation.vocab_size)
        if needed > vocab_size:
            raise ValueError(f"the data needs model.vocab_size >= {needed}, the run has {vocab_size}; raise it")

    def training_batches(
        self, round: int, peer_key: bytes, steps: int, batch_size: int
    ) -> Iterator[NDArray[np.int64]]:  # steps times i64[batch_size, T + 1]
        """The peer's batches of a full round of `steps` inner steps, in order."""
        total = window_count(len(self.train.tokens), self.sequence_length)
        windows = windows_for(self.seed, round, peer_key, steps * batch_size, total)
        return (read_windows(self.train, part, self.sequence_length) for part in windows.reshape(steps, batch_size))

    def validation_batches(
        self, count: int, batch_size: int
    ) -> Iterator[NDArray[np.int64]]:  # i64[up to batch_size, T + 1]
        """At most `count` validation windows, the same for every peer and round, in batches."""
        total = window_count(len(self.validation.tokens), self.sequence_length)
        windows = validation_windows(count, total)
        starts = range(0, len(windows), batch_size)
        return (
            read_windows(self.validation, windows[start : start + batch_size], self.sequence_length) for start in starts
        )


def read_windows(
    shard: Shard, windows: NDArray[np.int64], sequence_length: int
) -> NDArray[np.int64]:  # windows: i64[B] -> i64[B, T + 1]
    """Copy windows out of a shard. Raises ValueError when a token is outside the shard's vocabulary.

    The check matters on a GPU, where an index outside the embedding kills the process.
    """
    positions = windows[:, None] * sequence_length + np.arange(sequence_length + 1)
    batch: NDArray[np.int64] = shard.tokens[positions].astype(np.int64)
    if int(batch.max()) >= shard.vocab_size:
        raise ValueError(f"{shard.path} holds a token outside its vocabulary of {shard.vocab_size}; copy it again")
    return batch


def prepare(config: DataConfig, cache: Path, data_paths: Mapping[str, Path]) -> Dataset:
    """Open the run's token shards; those of an embedded corpus are made in the folder `cache` on first use.

    A corpus that is not embedded is a folder in `data_paths`, or one of its name in `cache`, made by `write_corpus`.
    Raises ValueError when the data are missing, damaged or not those that the run names.
    """
    folder = data_paths.get(config.corpus)
    if folder is None and config.corpus not in EMBEDDED and (cache / config.corpus).is_dir():
        folder = cache / config.corpus
    tokenizer = _open_tokenizer(config, folder)
    if folder is None:
        dataset = _embedded(config, tokenizer, cache)
    else:
        dataset = _open(config, tokenizer, folder, verify=False)
    if config.corpus_sha256 not in ("", dataset.sha256):
        raise ValueError(
            f"the tokens of {config.corpus} here have sha256 {dataset.sha256}, the run wants {config.corpus_sha256}; "
            "get the shards of this run, or the version of sparseloco-peer that made it"
        )
    return dataset


def write_corpus(
    documents: Iterable[str], count: int, tokenizer: Tokenizer, folder: Path, validation_fraction: float
) -> None:
    """Write `count` documents (oldest first) as the shards of a corpus folder: the last ones become the validation.

    Raises ValueError when documents and fraction leave one of both empty.
    """
    training = count - held_out(count, validation_fraction)
    rest = iter(documents)
    for name, part in ((TRAIN, itertools.islice(rest, training)), (VALIDATION, rest)):
        write_shard(folder / name, _tokens_of(part, tokenizer), tokenizer.vocab_size)


def open_corpus(folder: Path, tokenizer: Tokenizer) -> Dataset:
    """Open a corpus folder outside any run, and check its hashes. Raises ValueError."""
    return _open(DataConfig(), tokenizer, folder, verify=True)


def _tokens_of(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[NDArray[np.uint32]]:
    end = np.array([tokenizer.end_of_document], dtype=np.uint32)
    return itertools.chain.from_iterable((tokenizer.encode(document), end) for document in documents)


def _open_tokenizer(config: DataConfig, folder: Path | None) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if folder is None:
        raise ValueError(
            f"the run uses the tokenizer {config.tokenizer}; put its {TOKENIZER} into a folder with the shards of "
            f"{config.corpus} and name that folder under data_paths in the peer config"
        )
    return JsonTokenizer(folder / TOKENIZER, sha256=config.tokenizer.removeprefix("sha256:"))


def _open(config: DataConfig, tokenizer: Tokenizer, folder: Path, *, verify: bool) -> Dataset:
    train, validation = (open_shard(folder / name, verify=verify) for name in (TRAIN, VALIDATION))
    return Dataset(train, validation, tokenizer, config.sequence_length, config.seed)


def _embedded(config: DataConfig, tokenizer: Tokenizer, cache: Path) -> Dataset:
    """Open the cached shards of an embedded corpus, or make them. Several processes may do so at once."""
    version = EMBEDDED.get(config.corpus, "")[:12]
    folder = cache / f"{config.corpus}-{version}-bytes-{config.validation_fraction}"
    try:
        return _open(config, tokenizer, folder, verify=True)
    except ValueError:
        # Missing, or damaged by a full disk or a power cut: the text is here, so make them again.
        documents = embedded_documents(config.corpus)
        write_corpus(documents, len(documents), tokenizer, folder, config.validation_fraction)
        return _open(config, tokenizer, folder, verify=True)
