"""Text files of one's own as documents, and a tokenizer made for them: what `sparseloco-peer corpus` reads."""

import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from peer.data.tokenizer import END_OF_DOCUMENT
from peer.errors import os_errors


def read_documents(paths: Sequence[Path], watch: Callable[[Path], None]) -> Iterator[str]:
    """Yield the documents of files, one at a time: each line's "text" of a .jsonl, any other file as a whole.

    Files that end in .gz or .xz are unpacked. `watch` hears of each file before it is read. Raises UserError when a
    file cannot be read, ValueError when it is not what its name says.
    """
    for path in paths:
        watch(path)
        with os_errors(path):
            try:
                with path.open("rb") as packed, _unpacked(path, packed) as file:
                    yield from _documents(path, file)
            except (gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
                raise ValueError(f"{path} cannot be unpacked: {error}") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _unpacked(path: Path, packed: BinaryIO) -> gzip.GzipFile | lzma.LZMAFile | BinaryIO:
    match path.suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=packed)
        case ".xz":
            return lzma.LZMAFile(packed)
        case _:
            return packed


def _documents(path: Path, file: gzip.GzipFile | lzma.LZMAFile | BinaryIO) -> Iterator[str]:
    if ".jsonl" not in path.suffixes:
        yield file.read().decode("utf-8")
        return
    for number, line in enumerate(file, 1):
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise ValueError(f'{path}, line {number} is not an object with a "text"')
        yield item["text"]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> str:
    """Make a byte-level BPE of so many tokens from documents; return its tokenizer.json. Every text can be encoded."""
    tokenizer = FastTokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_DOCUMENT, special=True)],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return str(tokenizer.to_str())
