"""Write the frozen vectors: `python -m protocol.make_vectors`; with --check compare instead, byte for byte."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from protocol.cases import (
    amendments,
    arithmetic,
    bundles,
    compress,
    follow,
    identity,
    meeting,
    packets,
    records,
    runs,
    sections,
    transport,
    updates,
)
from protocol.cases.vector import Vector

FOLDER = Path(__file__).parent / "vectors"
FILES: dict[str, Callable[[], Iterable[Vector]]] = {
    "identity.json": identity.vectors,
    "runs.json": runs.vectors,
    "sections.json": sections.vectors,
    "compress.json": compress.vectors,
    "packets.json": packets.vectors,
    "updates.json": updates.vectors,
    "transport.json": transport.vectors,
    "arithmetic.json": arithmetic.vectors,
    "bundles.json": bundles.vectors,
    "records.json": records.vectors,
    "amendments.json": amendments.vectors,
    "follow.json": follow.vectors,
    "meeting.json": meeting.vectors,
}


def contents(vectors: Iterable[Vector]) -> str:
    """The text of a file: one vector a line, so that a changed vector is a changed line, and each run but once."""
    names: dict[str, str] = {}
    lines = []
    for vector in vectors:
        request: dict[str, Any] = dict(vector.request)
        if "run" in request:
            request["run"] = names.setdefault(request["run"], f"run {len(names) + 1}")
        line = {"name": vector.name, "why": vector.why, "request": request, "expect": vector.expect}
        lines.append(json.dumps(line))
    runs = json.dumps({name: text for text, name in names.items()})
    return f'{{"runs": {runs},\n "vectors": [\n' + ",\n".join(lines) + "\n]}\n"


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Write or compare every file; the exit status is 1 when one differs from what is made."""
    parser = argparse.ArgumentParser(prog="python -m protocol.make_vectors", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(arguments).check
    different = {path.name for path in folder.glob("*.json")} - set(FILES)
    for name, vectors in FILES.items():
        path, text = folder / name, contents(vectors())
        if not check:
            path.write_text(text, "ascii")
        elif not path.exists() or path.read_text("ascii") != text:
            different.add(name)
    for name in sorted(different):
        print(f"{name} is not what the cases make; run `make vectors` and read the difference", file=sys.stderr)
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
