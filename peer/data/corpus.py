"""The corpora that travel inside the package, as documents in the order of their dates."""

import hashlib
import lzma
from pathlib import Path

CORPORA = Path(__file__).with_name("corpora")

# Documents are joined by a blank line; none of them contains one, so they can be told apart again.
SEPARATOR = "\n\n"

# SHA-256 of the unpacked text, so that every peer trains on the same bytes or hears about it.
EMBEDDED = {"state-of-the-union": "d12b7b28eb509f03a61938808759df931fb6a3ac1cbbf55bce1201ec75e23471"}


def embedded_documents(name: str) -> list[str]:
    """Return the documents of an embedded corpus, oldest first.

    Raises ValueError when the package does not carry `name` or its file is damaged.
    """
    if name not in EMBEDDED:
        raise ValueError(
            f"no embedded corpus is called {name!r} (there is: {', '.join(EMBEDDED)}); "
            "map the name to a folder of token shards under data_paths in the peer config"
        )
    path = CORPORA / f"{name}.txt.xz"
    try:
        text = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(f"cannot read the embedded corpus {path}: {error}; reinstall sparseloco-peer") from error
    if hashlib.sha256(text).hexdigest() != EMBEDDED[name]:
        raise ValueError(f"the embedded corpus {path} is not the published one; reinstall sparseloco-peer")
    return text.decode("utf-8").split(SEPARATOR)


def held_out(count: int, validation_fraction: float) -> int:
    """How many of so many documents are held out: the last `validation_fraction` of them.

    Whole documents are held out, never random windows: a window's neighbours in training would leak it.
    At least one document stays on each side. Raises ValueError when that is impossible.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; choose a number between 0 and 1, such as 0.05")
    if count < 2:
        raise ValueError("a corpus needs at least two documents, one to train on and one to validate on")
    return min(max(1, round(count * validation_fraction)), count - 1)
