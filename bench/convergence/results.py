"""Finished trainings, one JSON object a line, appended as they finish; whoever runs the same again skips them."""

import dataclasses
import json
from pathlib import Path

from bench.convergence.setup import Setup, setup_from
from bench.convergence.training import Point, Result


class Results:
    """The results of one file. A line that a killed run left half-written is passed over and cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_key: dict[tuple[str, int], Result] = {}
        whole = 0
        if path.exists():
            data = path.read_bytes()
            for line in data.splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self._take(_result_from(json.loads(line)))
            if whole < len(data):
                with path.open("r+b") as file:
                    file.truncate(whole)

    def _take(self, result: Result) -> None:
        self._by_key[result.setup.key, result.seed] = result

    def get(self, setup: Setup, seed: int) -> Result | None:
        """The training of this setup and seed, if it is finished."""
        return self._by_key.get((setup.key, seed))

    def seeds(self, setup: Setup) -> list[Result]:
        """All finished trainings of this setup, by seed."""
        return [result for (key, _), result in sorted(self._by_key.items()) if key == setup.key]

    def add(self, result: Result) -> None:
        """Keep a finished training."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="ascii") as file:
            file.write(json.dumps(dataclasses.asdict(result), allow_nan=True) + "\n")
        self._take(result)


def _result_from(document: dict[str, object]) -> Result:
    setup, curve = document.pop("setup"), document.pop("curve")
    assert isinstance(setup, dict) and isinstance(curve, list)
    points = tuple(Point(**point) for point in curve)
    return Result(**document, setup=setup_from(setup), curve=points)  # type: ignore[arg-type]  # JSON of our own
