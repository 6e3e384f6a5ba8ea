"""`sparseloco-peer corpus`: from text files to the token shards that a run trains on."""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO, cast

from peer.data.documents import read_documents, train_tokenizer
from peer.data.prepare import TOKENIZER, Dataset, open_corpus, write_corpus
from peer.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from peer.errors import UserCode, UserError, os_errors
from peer.store import atomic_write
from peer.telemetry import duration

VOCABULARY_MIN = 300  # the bytes, the end of a document, and something to learn
TOKENIZER_DOCUMENTS = 200_000  # a vocabulary is the same from more, and the trainer keeps their words in memory
SAY_S = 5.0


class _Pass:
    """One reading of all files, which says now and then how far it is."""

    def __init__(self, what: str, paths: Sequence[Path], stream: TextIO) -> None:
        self._what, self._paths, self._stream = what, paths, stream
        with os_errors(paths[0]):
            self._sizes = {path: path.stat().st_size for path in paths}
        self._began_s = self._said_s = time.monotonic()
        self._done = 0
        self._now: Path | None = None

    def documents(self) -> Iterator[str]:
        """Every document, in the order of the files. Raises UserError."""
        try:
            yield from read_documents(self._paths, self._next)
        except ValueError as error:
            raise UserError(UserCode.NO_CORPUS, str(error), "mend that file or leave it out") from error

    def _next(self, path: Path) -> None:
        self._done += self._sizes[self._now] if self._now is not None else 0
        self._now = path
        now_s = time.monotonic()
        if self._done and now_s - self._said_s >= SAY_S:
            self._said_s = now_s
            whole = sum(self._sizes.values())
            left_s = (now_s - self._began_s) * (whole / self._done - 1)
            text = f"{self._what}: {100 * self._done / whole:.0f}% of {whole / 1e6:,.0f} MB, {duration(left_s)} left"
            print(text, file=self._stream, flush=True)


def make_corpus(
    paths: Sequence[Path],
    out: Path,
    *,
    tokenizer: Path | None,
    vocabulary: int | None,
    validation_fraction: float,
    stream: TextIO,
) -> tuple[Dataset, str]:
    """Make a corpus folder of files; return it opened, and what RUN.toml says as data.tokenizer.

    With neither a tokenizer.json nor the size of a vocabulary to learn, every byte is a token. Raises UserError.
    """
    if vocabulary is not None and not VOCABULARY_MIN <= vocabulary <= 1 << 20:
        raise UserError(
            UserCode.BAD_ARGUMENT,
            f"a vocabulary of {vocabulary} tokens cannot be learned",
            f"give --vocabulary {VOCABULARY_MIN} to {1 << 20}, for example 32768",
        )
    paths = list(_files(paths))
    if not paths:
        raise UserError(UserCode.NO_CORPUS, "there is no file to read", "name files, or folders that hold some")
    if vocabulary is not None:
        sample = itertools.islice(_Pass("learning the vocabulary", paths, stream).documents(), TOKENIZER_DOCUMENTS)
        atomic_write(out / TOKENIZER, train_tokenizer(sample, vocabulary).encode("utf-8"))
    elif tokenizer is not None:
        with os_errors(tokenizer):
            atomic_write(out / TOKENIZER, tokenizer.read_bytes())
    try:
        name, chosen = "bytes", cast(Tokenizer, ByteTokenizer())
        if vocabulary is not None or tokenizer is not None:
            read = JsonTokenizer(out / TOKENIZER)
            name, chosen = f"sha256:{read.sha256}", read
        count = sum(1 for _ in _Pass("counting", paths, stream).documents())
        write_corpus(_Pass("writing", paths, stream).documents(), count, chosen, out, validation_fraction)
        return open_corpus(out, chosen), name
    except ValueError as error:
        raise UserError(UserCode.NO_CORPUS, str(error), "give other files or another --validation-fraction") from error


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """Files as they are given, and those in folders by name."""
    for path in paths:
        with os_errors(path):
            if path.is_dir():
                yield from sorted(each for each in path.rglob("*") if each.is_file())
            else:
                path.stat()
                yield path
