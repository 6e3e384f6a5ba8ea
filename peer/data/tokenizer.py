"""From text to token ids and back."""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the data rooms and the export need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""

    @property
    def end_of_document(self) -> int:
        """The id that separates documents in a token stream."""

    def encode(self, text: str) -> NDArray[np.uint32]:  # u32[tokens]
        """Turn text into ids, without the end of the document."""

    def decode(self, tokens: NDArray[np.integer]) -> str:  # any integer type, [tokens]
        """Turn ids into text; the end of a document becomes a blank line, unknown bytes become U+FFFD."""

    def to_json(self) -> str:
        """The same tokenizer as a Hugging Face tokenizer.json."""


class ByteTokenizer:
    """One token a byte of UTF-8, then the end of a document, then three ids that are never used.

    The spare ids make the vocabulary a multiple of four, which matrix products like.
    """

    vocab_size = 260
    end_of_document = 256

    def encode(self, text: str) -> NDArray[np.uint32]:  # u32[bytes]
        """Return the bytes of the text as ids."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def decode(self, tokens: NDArray[np.integer]) -> str:  # any integer type, [tokens]
        """Return the text of the ids; ids above the end of a document stand for nothing."""
        documents: list[bytearray] = [bytearray()]
        for token in tokens.tolist():
            if token < 256:
                documents[-1].append(token)
            elif token == self.end_of_document:
                documents.append(bytearray())
        return "\n\n".join(document.decode("utf-8", errors="replace") for document in documents)

    def to_json(self) -> str:
        """Describe the bytes as a BPE without merges, whose symbols stand for the bytes in order."""
        vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        tokenizer = FastTokenizer(BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = ByteLevelDecoder()
        tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True)])
        return tokenizer.to_str()


class JsonTokenizer:
    """A Hugging Face tokenizer.json. Its token `<|endoftext|>`, `</s>` or `<|end_of_text|>` ends a document."""

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        """Read the file. Raises ValueError when it is no tokenizer, or not the one with this hash."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        self.sha256 = hashlib.sha256(data).hexdigest()
        if sha256 is not None and self.sha256 != sha256:
            raise ValueError(
                f"{path} has sha256 {self.sha256}, the run asks for {sha256}; get the tokenizer of this run"
            )
        try:
            self._tokenizer = FastTokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception on bad files
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        ends = [self._tokenizer.token_to_id(name) for name in (END_OF_DOCUMENT, "</s>", "<|end_of_text|>")]
        known = [token for token in ends if token is not None]
        if not known:
            raise ValueError(f"{path} has no token that ends a document; add {END_OF_DOCUMENT} to it")
        self.end_of_document = int(known[0])
        self.vocab_size = int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> NDArray[np.uint32]:  # u32[tokens]
        """Turn text into ids, without special tokens."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, tokens: NDArray[np.integer]) -> str:  # any integer type, [tokens]
        """Turn ids into text; the end of a document becomes a blank line."""
        ends = np.flatnonzero(tokens == self.end_of_document)
        documents = [part[part != self.end_of_document] for part in np.split(tokens, ends)]
        return "\n\n".join(self._tokenizer.decode(document.tolist()) for document in documents)

    def to_json(self) -> str:
        """Return the tokenizer as it was read."""
        return str(self._tokenizer.to_str())


def _byte_symbols() -> list[str]:
    """The printable characters that byte-level tokenizers write for the bytes 0 to 255 (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]
